"""Real closes: reading them, fitting GJR-GARCH to them with the package `arch`, replaying windows of them."""

import csv
import math
import os
from datetime import date

import numpy as np
import torch
from arch import arch_model
from arch.data import nasdaq, sp500

from envs.market.black_scholes import normal_cdf
from envs.market.dynamics import GARCH, Dynamics
from envs.market.units import TRADING_DAYS

Tensor = torch.Tensor


class Windows(Dynamics):
    """Windows of real closes; variance filtered by a GARCH model.

    The simple returns of the period are divided by their mean growth, so that no drift is earned. Each window is
    rescaled to the initial spot. The variance of day t uses returns before t only.

    Args:
        closes: (n,) consecutive daily closes.
        garch: the model whose filter gives the variance.
        warm_up: (m,) closes before the period, on which the filter is run in (may be empty).
        dates: (n,) dates of `closes`, for reporting.
        source: where they are from, for reporting.
    """

    def __init__(
        self, closes: np.ndarray, garch: GARCH, warm_up: np.ndarray | None = None, dates=None, source: str = "closes"
    ):
        self.garch = garch
        self.source = source
        self.dt = garch.dt
        self.dates = dates
        growth = closes[1:] / closes[:-1]
        self.log_returns = torch.from_numpy(np.log(growth / growth.mean()))
        # The model was fitted with zero mean, so the shock is the whole log-return; the filter must not know the
        # period's mean.
        before = np.zeros(0) if warm_up is None else np.diff(np.log(warm_up))
        shocks = torch.from_numpy(np.concatenate([before, np.log(growth)]))
        variances = [torch.tensor(garch.initial_variance, dtype=torch.float64)]
        for shock in shocks:
            variances.append(garch.next_variance(variances[-1], shock))
        self.variances = torch.stack(variances[len(before) :])

    @property
    def initial_variance(self) -> float:
        return float(self.variances[0])

    @property
    def pricing_model(self) -> GARCH:
        return self.garch

    def num_windows(self, num_steps: int) -> int:
        """Number of overlapping windows of `num_steps` returns."""
        return len(self.log_returns) - num_steps + 1

    def starts(self, noise: Tensor) -> Tensor:
        """Noise (n, num_steps, noise_size) → the close (n,) that each path starts at."""
        raise NotImplementedError

    def simulate(self, noise, spot=100.0):
        num_steps = noise.shape[1]
        start = self.starts(noise)
        index = start[:, None] + torch.arange(num_steps + 1)
        cumulative = torch.cat([torch.zeros(1, dtype=torch.float64), self.log_returns.cumsum(0)])
        log_spot = math.log(spot) + cumulative[index] - cumulative[start][:, None]
        return log_spot.exp().to(noise), self.variances[index].to(noise)

    def expected_average_variance(self, variance, num_steps):
        return self.garch.expected_average_variance(variance, num_steps)

    def return_volatility_covariance(self, variance):
        return self.garch.return_volatility_covariance(variance)

    def next_variance_moments(self, variance):
        return self.garch.next_variance_moments(variance)

    def return_variance(self, variance):
        return self.garch.return_variance(variance)


class Historical(Windows):
    """All windows of real closes, for out-of-sample evaluation: path i is the window that starts at close i (modulo the
    number of windows), and the noise is ignored."""

    follows_row_numbers = True

    def starts(self, noise):
        return torch.arange(len(noise)) % self.num_windows(noise.shape[1])


class Bootstrapped(Windows):
    """Windows of real closes drawn at random, to train on: the moving block bootstrap (Künsch 1989) with blocks as long
    as an episode, so that all that real returns do within one is kept."""

    def starts(self, noise):
        windows = self.num_windows(noise.shape[1])
        uniform = normal_cdf(noise[:, 0, 0].double()).cpu()
        return (uniform * windows).long().clamp(max=windows - 1)


SHIPPED = {None: sp500, "nasdaq": nasdaq}


def load_closes(path: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Daily closes, oldest first: (dates as datetime64[D], closes), both (n,).

    Args:
        path: CSV with a header and the columns `date` (YYYY-MM-DD) and `close` (any case); or None for the S&P 500, and
            "nasdaq" for the Nasdaq Composite, which the package `arch` ships, 1999-01-04 to 2018-12-31.

    Raises:
        ValueError: naming file and line, for a missing column, a date that is malformed, out of order or more than 14
            days after the one before it, or a close that is not a positive finite number.
    """
    if path in SHIPPED:
        frame = SHIPPED[path].load()
        return frame.index.values.astype("datetime64[D]"), frame["Adj Close"].to_numpy(dtype=np.float64)
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such file")
    dates = []
    closes = []
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = {name.strip().lower(): name for name in reader.fieldnames or []}
            for column in ("date", "close"):
                if column not in columns:
                    raise ValueError(f"{path}, line 1: no column '{column}' (found: {', '.join(columns) or 'nothing'})")
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                text_date, text_close = (row[columns[c]] or "" for c in ("date", "close"))
                try:
                    day = date.fromisoformat(text_date.strip())
                except ValueError:
                    raise ValueError(f"{where}: date {text_date!r} is not of the form YYYY-MM-DD") from None
                try:
                    close = float(text_close)
                except ValueError:
                    raise ValueError(f"{where}: close {text_close!r} is not a number") from None
                if not (math.isfinite(close) and close > 0):
                    raise ValueError(f"{where}: close {text_close.strip()} is not a positive finite number")
                if dates and day <= dates[-1]:
                    raise ValueError(f"{where}: date {day} does not come after {dates[-1]}")
                if dates and (day - dates[-1]).days > 14:
                    raise ValueError(f"{where}: gap of {(day - dates[-1]).days} days after {dates[-1]} (at most 14)")
                dates.append(day)
                closes.append(close)
    except (UnicodeDecodeError, csv.Error):
        raise ValueError(f"{path}: not a CSV file in UTF-8") from None
    if len(closes) < 2:
        raise ValueError(f"{path}: {len(closes)} closes (at least 2)")
    return np.array(dates, dtype="datetime64[D]"), np.array(closes)


MIN_CLOSES = 500  # two years; a GARCH fit on less is mostly noise


def fit_garch(closes: np.ndarray) -> GARCH:
    """GJR-GARCH(1,1), zero mean, normal, fitted by `arch` to 100·log-returns of `closes` (n,).

    Raises:
        ValueError: fewer than 500 closes, constant closes, or a fit that does not converge or is not stationary.
    """
    if len(closes) < MIN_CLOSES:
        raise ValueError(f"{len(closes)} closes are too few to fit garch (at least {MIN_CLOSES})")
    returns = 100.0 * np.diff(np.log(closes))
    if returns.std() == 0:
        raise ValueError("all closes are equal: garch cannot be fitted")
    model = arch_model(returns, mean="Zero", vol="GARCH", p=1, o=1, q=1, rescale=False)
    fit = model.fit(disp="off", show_warning=False)
    if fit.convergence_flag != 0:
        raise ValueError(f"garch does not fit these closes (the optimiser stopped with code {fit.convergence_flag})")
    p = fit.params
    garch = GARCH(
        omega=p["omega"] / 100.0**2, alpha=p["alpha[1]"], gamma=p["gamma[1]"], beta=p["beta[1]"], dt=1 / TRADING_DAYS
    )
    if not (garch.omega > 0 and 0 < garch.persistence < 1 and 1e-6 < garch.initial_variance < 100):
        raise ValueError(f"the fitted garch is not stationary (persistence {garch.persistence:.4f})")
    return garch
