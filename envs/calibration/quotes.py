"""Option quotes from a CSV file: read, checked for static arbitrage, and fitted by SVI slices."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import least_squares

from envs.market import black_scholes
from envs.market.smiles import CALIBRATED, SVI, Slices, density_factor, double, find_arbitrage
from envs.market.units import VOL_POINT

# READING


class Quote(NamedTuple):
    """A row of the file; `load_quotes` gives strikes in units of the spot."""

    line: int
    maturity: float  # years
    strike: float
    volatility: float  # annualised decimal


MIN_QUOTES = 5  # per maturity, as SVI has five parameters
COLUMNS = {"maturity": 5.0, "strike": math.inf, "implied_volatility": 5.0}  # name → largest value allowed


def load_quotes(path: str, spot: float = 1.0) -> list[list[Quote]]:
    """Quotes of a CSV, a list for each maturity, sorted by strike; strikes are divided by `spot`.

    Args:
        path: CSV with a header and the columns maturity (years), strike and implied_volatility (decimal).
        spot: price of the underlying, in the currency of the strikes.

    Raises:
        ValueError: naming file and line: a missing column, a value that is not a number or outside its range, the same
            option twice, too few strikes at a maturity, or strikes on one side of the spot only.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file")
    try:
        quotes = _read(path, spot)
    except (UnicodeDecodeError, csv.Error):
        raise ValueError(f"{path}: not a CSV file in UTF-8") from None
    if not quotes:
        raise ValueError(f"{path}: no quotes")
    maturities = sorted({quote.maturity for quote in quotes})
    smiles = [sorted((q for q in quotes if q.maturity == t), key=lambda q: q.strike) for t in maturities]
    for smile in smiles:
        where = f"{path}, line {smile[0].line}: maturity {smile[0].maturity:g}"
        if len(smile) < MIN_QUOTES:
            raise ValueError(f"{where} has {len(smile)} strikes (at least {MIN_QUOTES})")
        if not smile[0].strike < 1.0 < smile[-1].strike:
            strikes = f"{spot * smile[0].strike:g} to {spot * smile[-1].strike:g}"
            raise ValueError(f"{where} has strikes from {strikes} (on both sides of the spot, {spot:g})")
    return smiles


def _read(path: str, spot: float) -> list[Quote]:
    """Quotes of a CSV in the order of the file."""
    quotes = []
    lines = {}  # (maturity, strike) → line
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        fields = {name.strip().lower(): name for name in reader.fieldnames or []}
        found = ", ".join(name if name.isprintable() else repr(name) for name in fields)
        for column in COLUMNS:
            if column not in fields:
                raise ValueError(f"{path}, line 1: no column '{column}' (found: {found or 'nothing'})")
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            maturity, strike, volatility = (_number(row[fields[column]], column, where) for column in COLUMNS)
            quote = Quote(reader.line_num, maturity, strike / spot, volatility)
            option = (quote.maturity, quote.strike)
            if option in lines:
                raise ValueError(f"{where}: the same maturity and strike as line {lines[option]}")
            lines[option] = quote.line
            quotes.append(quote)
    return quotes


def _number(text: str | None, column: str, where: str) -> float:
    """The number in a cell, within the range of its column."""
    text = (text or "").strip()
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{where}: {column} {text!r} is not a number") from None
    high = COLUMNS[column]
    if not (0 < value <= high and math.isfinite(value)):
        allowed = "a positive finite number" if high == math.inf else f"more than 0, at most {high:g}"
        raise ValueError(f"{where}: {column} {text} ({allowed})")
    return value


# ARBITRAGE BETWEEN QUOTES

TOLERANCE = 1e-6  # of prices, in units of the spot
ROUNDING = 5e-5  # of volatilities that are quoted with four decimals


def quoted_arbitrage(smiles: Sequence[Sequence[Quote]]) -> list[tuple[Quote, str]]:
    """Rows whose prices admit a static arbitrage with other rows, each with its description.

    At a maturity the call price must fall with the strike, by no more than the strike rises, and be convex in it, from
    the strike 0 on. It must be no more than the price of a later call of the same strike (Gatheral & Jacquier 2014,
    section 2), nor than the interpolated price between later calls of the two strikes around it.
    """
    found = []
    earlier = []  # (quote, call price)
    for smile in smiles:
        strike = double([q.strike for q in smile])
        maturity = double([q.maturity for q in smile])
        volatility = double([q.volatility for q in smile])
        call, _, _, vega = black_scholes.greeks(torch.ones_like(strike), strike, maturity, volatility)
        rounding = TOLERANCE + ROUNDING * vega
        slope = call.diff() / strike.diff()
        if (call[0] - 1.0) / strike[0] - slope[0] > rounding[:2].sum() / strike[0]:
            found.append((smile[1], f"butterfly arbitrage with line {smile[0].line} and a strike of zero"))
        noise = (rounding[1:] + rounding[:-1]) / strike.diff()
        for j in range(len(slope)):
            if not -1.0 - noise[j] <= slope[j] <= noise[j]:
                found.append((smile[j + 1], f"vertical spread arbitrage with line {smile[j].line}"))
        for j in range(1, len(slope)):
            share = (strike[j + 1] - strike[j]) / (strike[j + 1] - strike[j - 1])
            butterfly = share * call[j - 1] + (1.0 - share) * call[j + 1] - call[j]
            if butterfly < -(share * rounding[j - 1] + rounding[j] + (1.0 - share) * rounding[j + 1]):
                lines = f"lines {smile[j - 1].line} and {smile[j + 1].line}"
                found.append((smile[j], f"butterfly arbitrage with {lines}: it costs {float(butterfly):.2g} spots"))
        for quote, price in earlier:
            left = int(torch.searchsorted(strike, quote.strike, right=True)) - 1
            inside = strike[0] <= quote.strike <= strike[-1]
            if inside and price > np.interp(quote.strike, strike, call + 2.0 * rounding):
                found.append((smile[left], f"calendar arbitrage with line {quote.line}: it is worth less, and later"))
        earlier += zip(smile, call.tolist(), strict=True)
    return found


# FITTING


class Fit(NamedTuple):
    """How well a slice fits its quotes: maturity in years, and errors in vol points."""

    maturity: float
    num_quotes: int
    rmse: float
    worst: float


def fit_svi(smile: Sequence[Quote], before: SVI | None = None) -> tuple[SVI, Fit]:
    """Raw SVI through the quotes of a maturity: least squares in implied volatility, by SciPy's trust region.

    Butterflies, and calendar spreads with the slice `before`, are penalised, so that the fit adds no arbitrage to
    quotes that have none. It starts from several smiles, as the problem has local minima.
    """
    maturity = smile[0].maturity
    k = np.log([q.strike for q in smile])
    volatility = np.array([q.volatility for q in smile])
    w = volatility**2 * maturity
    low, high = (z * np.sqrt(np.interp(0.0, k, w)) for z in CALIBRATED)
    between = double(np.linspace(min(low, k.min()), max(high, k.max()), 81))

    def errors(svi: SVI) -> np.ndarray:
        return np.sqrt(np.maximum(svi.total_variance(k)[0], 1e-12) / maturity) - volatility

    def residuals(x: np.ndarray) -> np.ndarray:
        svi = SVI(*x)
        w_between, slope, curvature = svi.total_variance(between)
        w_between = w_between.clamp(min=1e-12)
        butterfly = (0.01 - density_factor(between, w_between, slope, curvature)).clamp(min=0)
        rise = w_between - (before.total_variance(between)[0] if before is not None else 0.0)
        calendar = (1e-6 - rise).clamp(min=0) / float(w.mean())
        return np.concatenate([errors(svi) / VOL_POINT, 10.0 * butterfly.numpy(), 1e3 * calendar.numpy()])

    low = [-1.0, 0.0, -0.999, 2 * k.min() - 0.1, 1e-3]
    high = [4.0 * w.max(), 10.0, 0.999, 2 * k.max() + 0.1, 5.0]
    starts = [(0.5 * w.min(), 0.5 * w.max() / np.ptp(k), rho, 0.0, 0.3 * np.ptp(k)) for rho in (-0.7, -0.2, 0.3)]
    if before is not None:  # total variance has to grow everywhere, and between neighbouring days only a little
        starts.append(np.clip((1.01 * before.a, 1.01 * before.b, *before[2:]), low, high))
    fits = [least_squares(residuals, start, bounds=(low, high), x_scale="jac", max_nfev=200) for start in starts]
    svi = SVI(*map(float, min(fits, key=lambda fit: fit.cost).x))
    error = errors(svi)
    rmse = float(np.sqrt((error**2).mean())) / VOL_POINT
    return svi, Fit(maturity, len(k), rmse, float(np.abs(error).max()) / VOL_POINT)


def load(path: str, spot: float = 1.0, allow_arbitrage: bool = False) -> tuple[Slices, list[Fit]]:
    """The surface fitted to a CSV of quotes (see `load_quotes`), and how well it fits each maturity.

    Raises:
        ValueError: see `load_quotes`; and, unless `allow_arbitrage`, quotes or fitted slices with static arbitrage,
            naming the first offending line.
    """
    smiles = load_quotes(path, spot)
    hint = "(--allow-arbitrage to calibrate to it all the same)"
    if not allow_arbitrage and (found := quoted_arbitrage(smiles)):
        quote, what = found[0]
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise ValueError(f"{path}, line {quote.line}: {what}{more} {hint}")
    slices, fits = [], []
    for smile in smiles:
        svi, fit = fit_svi(smile, slices[-1] if slices else None)
        slices.append(svi)
        fits.append(fit)
    maturities = [smile[0].maturity for smile in smiles]
    surface = Slices(maturities, slices)
    grids = [_judged_moneyness(smile, svi) for smile, svi in zip(smiles, slices, strict=True)]
    if not allow_arbitrage and (violations := find_arbitrage(surface, maturities, grids)):
        worst = violations[0]
        smile = smiles[maturities.index(worst.t)]
        nearest = min(smile, key=lambda q: abs(math.log(q.strike) - worst.k))
        raise ValueError(f"{path}, line {nearest.line}: {worst}, in the SVI slice fitted to its maturity {hint}")
    return surface, fits


def _judged_moneyness(smile: Sequence[Quote], svi: SVI) -> np.ndarray:
    """Log-moneyness (201,) over the range of the quotes and of the strikes that are calibrated to."""
    at_the_money = max(float(svi.total_variance(double(0.0))[0]), 0.0)
    low, high = (z * math.sqrt(at_the_money) for z in CALIBRATED)
    return np.linspace(min(low, np.log(smile[0].strike)), max(high, np.log(smile[-1].strike)), 201)
