"""Smiles: the implied volatilities that a market is calibrated to, free of arbitrage, and Dupire's local volatility.

A `Surface` is the total implied variance w(k, t) = σ²t of every strike and maturity, with its derivatives in closed
form. k = ln(K/forward) is log-moneyness (zero rates and dividends, so the forward is the spot), t is in years of 252
trading days, volatilities are annualised decimals. Tensors are float64 and broadcast.

Sources: Gatheral & Jacquier (2014), *Arbitrage-free SVI volatility surfaces*; Dupire (1994), *Pricing with a smile*;
Gatheral (2006), *The Volatility Surface*, chapter 1.
"""

import csv
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import least_squares

from envs import black_scholes
from envs.dynamics import TRADING_DAYS

Tensor = torch.Tensor
VOL_POINT = 0.01
LOW, HIGH = 0.01, 2.0  # volatilities beyond are no smile's
CALIBRATED = (-2.5, 1.5)  # range of the strikes that are calibrated to, in standard deviations from the money


def _double(x) -> Tensor:
    return torch.as_tensor(x, dtype=torch.float64)


class TotalVariance(NamedTuple):
    """w(k, t) and its derivatives ∂w/∂k, ∂²w/∂k² and ∂w/∂t, all of one shape."""

    w: Tensor
    dk: Tensor
    dkk: Tensor
    dt: Tensor


def density_factor(k: Tensor, w: Tensor, dk: Tensor, dkk: Tensor) -> Tensor:
    """g = (1 − kw'/2w)² − w'²/4 (1/w + ¼) + w''/2, the risk-neutral density over Black–Scholes' at the same w.

    Where it is negative a butterfly has a negative price (Gatheral & Jacquier 2014, eq. 2.1).
    """
    return (1.0 - 0.5 * k * dk / w) ** 2 - 0.25 * dk**2 * (1.0 / w + 0.25) + 0.5 * dkk


class Surface:
    """Base class: total implied variance of any log-moneyness k and maturity t (years, > 0)."""

    last_maturity: float = math.inf  # years; there is nothing to calibrate to beyond

    def total_variance(self, k: Tensor, t: Tensor) -> TotalVariance:
        """k and t, of one shape → w and its derivatives."""
        raise NotImplementedError

    def __call__(self, k, t) -> TotalVariance:
        """`total_variance` of numbers or tensors that broadcast."""
        return self.total_variance(*torch.broadcast_tensors(_double(k), _double(t)))

    def implied_volatility(self, k, t) -> Tensor:
        """√(w/t), annualised; at least `LOW`, which only a surface with arbitrage needs."""
        return (self(k, t).w / _double(t)).clamp(min=LOW**2).sqrt()

    def call_price(self, k, t) -> Tensor:
        """Price of the call of strike e^k on a spot of 1."""
        k = _double(k)
        return black_scholes.price(torch.ones_like(k), k.exp(), _double(t), self.implied_volatility(k, t))

    def density_factor(self, k, t) -> Tensor:
        """`density_factor` of numbers or tensors that broadcast."""
        v = self(k, t)
        return density_factor(_double(k), v.w, v.dk, v.dkk)

    def local_volatility(self, k, t) -> Tensor:
        """Dupire's σ(t, S₀e^k) = √(∂w/∂t / g), annualised (Gatheral 2006, eq. 1.10).

        Kept within [LOW, HIGH], which only a surface with arbitrage, or far beyond its quotes, ever needs: where the
        density g vanishes or is negative it is HIGH.
        """
        density, growth = self.density_factor(k, t), self(k, t).dt
        variance = torch.where(density > 0, growth / density, HIGH**2)
        return variance.clamp(LOW**2, HIGH**2).sqrt()


@dataclass
class SSVI(Surface):
    """SSVI with a power-law φ (Gatheral & Jacquier 2014, section 4): one surface, no arbitrage within its bounds.

    w = θ/2 (1 + ρφk + √((φk + ρ)² + 1 − ρ²)), φ = η/(θ^γ(1 + θ)^{1−γ}), at-the-money variance θ = αt + βt².
    """

    alpha: float
    beta: float
    eta: float
    gamma: float
    rho: float
    last_maturity: float = math.inf

    def total_variance(self, k, t):
        rho, gamma = self.rho, self.gamma
        theta, growth = self.alpha * t + self.beta * t**2, self.alpha + 2.0 * self.beta * t
        phi = self.eta / (theta**gamma * (1.0 + theta) ** (1.0 - gamma))
        phi_growth = -phi * (gamma / theta + (1.0 - gamma) / (1.0 + theta))  # ∂φ/∂θ
        u = phi * k + rho
        root = (u**2 + 1.0 - rho**2).sqrt()
        w = 0.5 * theta * (1.0 + rho * phi * k + root)
        slope = 0.5 * theta * (rho + u / root)  # ∂w/∂(φk)
        curvature = 0.5 * theta * (1.0 - rho**2) / root**3
        return TotalVariance(w, phi * slope, phi**2 * curvature, growth * (w / theta + phi_growth * k * slope))


class SVI(NamedTuple):
    """A slice, raw parametrisation: w(k) = a + b(ρ(k − m) + √((k − m)² + s²)) (Gatheral & Jacquier 2014, eq. 3.1)."""

    a: float
    b: float
    rho: float
    m: float
    s: float

    def total_variance(self, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """w, w' and w'' at k; parameters may be numbers or tensors that broadcast with it."""
        root = ((k - self.m) ** 2 + self.s**2) ** 0.5
        w = self.a + self.b * (self.rho * (k - self.m) + root)
        return w, self.b * (self.rho + (k - self.m) / root), self.b * self.s**2 / root**3


class Slices(Surface):
    """SVI slices, their total variance linear in time between them, and in proportion to it before the first.

    Linear interpolation of w at the same k keeps a surface free of calendar arbitrage if its slices are (Gatheral &
    Jacquier 2014, lemma 5.1). There is nothing after the last slice.

    Raises:
        ValueError: maturities that are not positive and increasing.
    """

    def __init__(self, maturities: Sequence[float], slices: Sequence[SVI]):
        if not maturities or maturities[0] <= 0 or any(a >= b for a, b in pairwise(maturities)):
            raise ValueError(f"maturities are {', '.join(f'{t:g}' for t in maturities) or 'none'} (> 0, increasing)")
        if len(slices) != len(maturities):
            raise ValueError(f"{len(slices)} slices of {len(maturities)} maturities")
        self.maturities, self.slices = [float(t) for t in maturities], [SVI(*map(float, x)) for x in slices]
        self.last_maturity = self.maturities[-1]
        # A slice of maturity 0, where nothing is left, before the others
        self._times = _double([0.0, *self.maturities])
        self._parameters = _double([(0.0, 0.0, 0.0, 0.0, 1.0), *self.slices])

    def total_variance(self, k, t):
        times, parameters = self._times.to(k.device), self._parameters.to(k.device)
        after = torch.searchsorted(times, t.contiguous()).clamp(1, len(times) - 1)
        before = SVI(*parameters[after - 1].unbind(-1)).total_variance(k)
        behind = SVI(*parameters[after].unbind(-1)).total_variance(k)
        span = times[after] - times[after - 1]
        weight = (t - times[after - 1]) / span
        w, dk, dkk = (x + weight * (y - x) for x, y in zip(before, behind, strict=True))
        return TotalVariance(w, dk, dkk, (behind[0] - before[0]) / span)


_SP500_2018_DAYS = (30, 37, 44, 58, 65)  # calendar days
_SP500_2018 = (
    (-0.002299, 0.037194, -0.1949, 0.01365, 0.07761),
    (-0.001527, 0.034842, -0.2904, 0.01085, 0.06511),
    (-0.001309, 0.036072, -0.3150, 0.01329, 0.06122),
    (-0.000897, 0.039019, -0.3951, 0.01607, 0.05611),
    (-0.001073, 0.041569, -0.3786, 0.02090, 0.06007),
)
_SP500_2024 = (
    (-0.0082692, 0.053738, -0.52741, -0.076754, 0.195930),
    (-0.0840525, 0.160208, 0.08353, 0.099442, 0.536163),
)
NAMED = {
    # The S&P 500 of 1 August 2018 (spot 2813.18): one arbitrage-free surface through its slices, 0.23 vol points from
    # them, valid to 51 days
    "sp500-2018": SSVI(0.0071, 0.01771, 4.72038, 0.3168, -0.53222, last_maturity=51.5 / TRADING_DAYS),
    # The slices themselves, rougher: between the first two, total variance falls from K/S = 1.12 on
    "sp500-2018-slices": Slices([days / 365 for days in _SP500_2018_DAYS], [SVI(*x) for x in _SP500_2018]),
    "sp500-2024": Slices([20 / 251, 40 / 251], [SVI(*x) for x in _SP500_2024]),  # 21 June 2024
}


def to_dict(surface: Surface) -> dict:
    """A surface as numbers, for a checkpoint."""
    if isinstance(surface, SSVI):
        return {"ssvi": asdict(surface)}
    return {"maturities": surface.maturities, "slices": [list(x) for x in surface.slices]}


def from_dict(content: dict) -> Surface:
    """The surface of `to_dict`.

    Raises:
        KeyError, TypeError, ValueError: not one.
    """
    return SSVI(**content["ssvi"]) if "ssvi" in content else Slices(content["maturities"], content["slices"])


# ARBITRAGE


def moneyness_grid(surface: Surface, t, z) -> Tensor:
    """k that lies `z` standard deviations from the money, √w(0, t) each; broadcasts."""
    return _double(z) * surface(0.0, t).w.sqrt()


class Violation(NamedTuple):
    """A static arbitrage: `kind` butterfly or calendar, at log-moneyness k and maturity t (years), of that size."""

    kind: str
    k: float
    t: float
    size: float

    def __str__(self) -> str:
        what = "density factor" if self.kind == "butterfly" else "total variance falls in time by"
        where = f"{TRADING_DAYS * self.t:.1f} days, K/S = {math.exp(self.k):.3f}"
        return f"{self.kind} arbitrage at {where}: {what} {self.size:.2g}"


def find_arbitrage(surface: Surface, maturities: Sequence[float], k: Sequence[Sequence[float]]) -> list[Violation]:
    """The worst butterfly at each maturity and the worst calendar spread to the one before it, if there are any.

    Args:
        maturities: years, increasing.
        k: for each maturity the log-moneyness (n,) to look at; calendars only where both maturities have quotes.
    """
    found = []
    for i, (t, points) in enumerate(zip(maturities, map(_double, k), strict=True)):
        density = surface.density_factor(points, t)
        if density.min() < 0:
            found.append(Violation("butterfly", float(points[density.argmin()]), t, float(density.min())))
        if i > 0:
            earlier = _double(k[i - 1])
            both = points[(points >= earlier.min()) & (points <= earlier.max())]
            growth = surface(both, t).w - surface(both, maturities[i - 1]).w
            if len(both) and growth.min() < 0:
                found.append(Violation("calendar", float(both[growth.argmin()]), t, float(-growth.min())))
    return found


# A SMILE FROM A FILE


class Quote(NamedTuple):
    """A row of the file: its line, maturity in years, strike (of a spot of 1, after `load_quotes`), volatility."""

    line: int
    maturity: float
    strike: float
    volatility: float


MIN_QUOTES = 5  # of a maturity: SVI has five parameters
COLUMNS = ("maturity", "strike", "implied_volatility")


def load_quotes(path: str, spot: float = 1.0) -> list[list[Quote]]:
    """Quotes of a CSV, by maturity, each by strike; strikes are divided by `spot`.

    Args:
        path: CSV with a header and the columns maturity (years), strike and implied_volatility (decimal).
        spot: of the underlying, in the currency of the strikes.

    Raises:
        ValueError: naming file and line: a missing column, a value that is no number or outside its range, the same
            option twice, too few strikes at a maturity, or strikes on one side of the spot only.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file")
    quotes, seen = [], {}
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = {name.strip().lower(): name for name in reader.fieldnames or []}
            names = ", ".join(name if name.isprintable() else repr(name) for name in columns)
            for column in COLUMNS:
                if column not in columns:
                    raise ValueError(f"{path}, line 1: no column '{column}' (found: {names or 'nothing'})")
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                values = []
                for column, high in zip(COLUMNS, (5.0, math.inf, 5.0), strict=True):
                    text = (row[columns[column]] or "").strip()
                    try:
                        value = float(text)
                    except ValueError:
                        raise ValueError(f"{where}: {column} {text!r} is not a number") from None
                    if not (0 < value <= high and math.isfinite(value)):
                        allowed = "a positive finite number" if high == math.inf else f"more than 0, at most {high:g}"
                        raise ValueError(f"{where}: {column} {text} ({allowed})")
                    values.append(value)
                quote = Quote(reader.line_num, values[0], values[1] / spot, values[2])
                if (twin := seen.get(quote[1:3])) is not None:
                    raise ValueError(f"{where}: the same maturity and strike as line {twin}")
                seen[quote[1:3]] = quote.line
                quotes.append(quote)
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


TOLERANCE = 1e-6  # of the spot, in prices
ROUNDING = 5e-5  # of quoted volatilities, of four decimals


def quoted_arbitrage(smiles: Sequence[Sequence[Quote]]) -> list[tuple[Quote, str]]:
    """Rows whose prices admit a static arbitrage with other rows, and which one.

    At a maturity the call must fall with the strike, by no more than the strike rises, and be convex in it, from the
    strike 0 on; and it must be worth no more than a later one of its strike (Gatheral & Jacquier 2014, section 2), nor
    than what lies between the later ones of two strikes around it.
    """
    found, earlier = [], []
    for smile in smiles:
        strike, t, volatility = (_double([q[j] for q in smile]) for j in (2, 1, 3))
        call, _, _, vega = black_scholes.greeks(torch.ones_like(strike), strike, t, volatility)
        slope, rounding = call.diff() / strike.diff(), TOLERANCE + ROUNDING * vega
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
        for quote, worth in earlier:
            left = int(torch.searchsorted(strike, quote.strike, right=True)) - 1
            between = strike[0] <= quote.strike <= strike[-1]
            if between and worth > np.interp(quote.strike, strike, call + 2.0 * rounding):
                found.append((smile[left], f"calendar arbitrage with line {quote.line}: it is worth less, and later"))
        earlier += zip(smile, call.tolist(), strict=True)
    return found


class Fit(NamedTuple):
    """How well a slice fits its quotes: maturity in years, and errors in vol points."""

    maturity: float
    num_quotes: int
    rmse: float
    worst: float


def fit_svi(smile: Sequence[Quote], before: SVI | None = None) -> tuple[SVI, Fit]:
    """Raw SVI through the quotes of a maturity: least squares in implied volatility, by SciPy's trust region.

    Butterflies, and calendar spreads over the slice `before`, are penalised, so that the fit adds no arbitrage to
    quotes that have none. Started from several smiles, as the problem has local minima.
    """
    k, t = np.log([q.strike for q in smile]), smile[0].maturity
    volatility = np.array([q.volatility for q in smile])
    w = volatility**2 * t
    low, high = (z * np.sqrt(np.interp(0.0, k, w)) for z in CALIBRATED)
    between = _double(np.linspace(min(low, k.min()), max(high, k.max()), 81))

    def residuals(x: np.ndarray) -> np.ndarray:
        svi = SVI(*x)
        fitted = np.sqrt(np.maximum(svi.total_variance(k)[0], 1e-12) / t)
        w_between, slope, curvature = svi.total_variance(between)
        w_between = w_between.clamp(min=1e-12)
        butterfly = (0.01 - density_factor(between, w_between, slope, curvature)).clamp(min=0)
        rise = w_between - (before.total_variance(between)[0] if before is not None else 0.0)
        calendar = (1e-6 - rise).clamp(min=0) / float(w.mean())
        error = (fitted - volatility) / VOL_POINT
        return np.concatenate([error, 10.0 * butterfly.numpy(), 1e3 * calendar.numpy()])

    low = [-1.0, 0.0, -0.999, 2 * k.min() - 0.1, 1e-3]
    high = [4.0 * w.max(), 10.0, 0.999, 2 * k.max() + 0.1, 5.0]
    starts = [(0.5 * w.min(), 0.5 * w.max() / np.ptp(k), rho, 0.0, 0.3 * np.ptp(k)) for rho in (-0.7, -0.2, 0.3)]
    if before is not None:  # variance has to grow everywhere, if only a little: the slice of a day before is near
        starts.append(np.clip((1.01 * before.a, 1.01 * before.b, *before[2:]), low, high))
    fits = [least_squares(residuals, start, bounds=(low, high), x_scale="jac", max_nfev=200) for start in starts]
    svi = SVI(*map(float, min(fits, key=lambda fit: fit.cost).x))
    error = np.sqrt(np.maximum(svi.total_variance(k)[0], 1e-12) / t) - volatility
    return svi, Fit(t, len(k), float(np.sqrt((error**2).mean())) / VOL_POINT, float(np.abs(error).max()) / VOL_POINT)


def load(path: str, spot: float = 1.0, allow_arbitrage: bool = False) -> tuple[Slices, list[Fit]]:
    """The surface fitted to a CSV of quotes (see `load_quotes`), and how well each maturity fits.

    Raises:
        ValueError: what `load_quotes` raises; and, unless `allow_arbitrage`, quotes or fitted slices with static
            arbitrage, naming the first offending line.
    """
    smiles = load_quotes(path, spot)
    if not allow_arbitrage and (found := quoted_arbitrage(smiles)):
        quote, what = found[0]
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise ValueError(f"{path}, line {quote.line}: {what}{more} (--allow-arbitrage to calibrate to it all the same)")
    slices, fits = [], []
    for smile in smiles:
        svi, fit = fit_svi(smile, slices[-1] if slices else None)
        slices.append(svi)
        fits.append(fit)
    maturities = [smile[0].maturity for smile in smiles]
    surface = Slices(maturities, slices)
    # Where there are quotes, and where the calibration looks if that is beyond
    grids = []
    for smile, svi in zip(smiles, slices, strict=True):
        low, high = (z * math.sqrt(max(float(svi.total_variance(_double(0.0))[0]), 0.0)) for z in CALIBRATED)
        grids.append(np.linspace(min(low, np.log(smile[0].strike)), max(high, np.log(smile[-1].strike)), 201))
    if not allow_arbitrage and (violations := find_arbitrage(surface, maturities, grids)):
        worst = violations[0]
        smile = smiles[maturities.index(worst.t)]
        nearest = min(smile, key=lambda q: abs(math.log(q.strike) - worst.k))
        hint = "(--allow-arbitrage to calibrate to it all the same)"
        raise ValueError(f"{path}, line {nearest.line}: {worst}, in the SVI slice fitted to its maturity {hint}")
    return surface, fits
