"""Smiles: surfaces of implied volatility to calibrate to, their local volatility (Dupire's), and arbitrage in them.

A `Surface` is the total implied variance w(k, t) = σ²t of every strike and maturity, with its derivatives in closed
form. k = ln(K/forward) is log-moneyness (zero rates and dividends, so the forward is the spot), t is in years of 252
trading days, volatilities are annualised decimals. Tensors are float64 and broadcast.

Sources: Gatheral & Jacquier (2014), *Arbitrage-free SVI volatility surfaces*; Dupire (1994), *Pricing with a smile*;
Gatheral (2006), *The Volatility Surface*, chapter 1.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from scipy.interpolate import RectBivariateSpline

from envs.market import black_scholes
from envs.market.dynamics import Heston
from envs.market.fair import heston_call, heston_forward_start_call
from envs.market.units import TRADING_DAYS

Tensor = torch.Tensor
LOW, HIGH = 0.01, 2.0  # bounds of implied and local volatilities
CALIBRATED = (-2.5, 1.5)  # range of the strikes that are calibrated to, in standard deviations from the money


def double(x) -> Tensor:
    return torch.as_tensor(x, dtype=torch.float64)


class TotalVariance(NamedTuple):
    """w(k, t) and its derivatives ∂w/∂k, ∂²w/∂k² and ∂w/∂t, all of one shape."""

    w: Tensor
    dk: Tensor
    dkk: Tensor
    dt: Tensor


def density_factor(k: Tensor, w: Tensor, dk: Tensor, dkk: Tensor) -> Tensor:
    """g = (1 − kw'/2w)² − w'²/4 (1/w + ¼) + w''/2, the risk-neutral density divided by Black–Scholes' at the same w.

    A butterfly has a negative price where g is negative (Gatheral & Jacquier 2014, eq. 2.1).
    """
    return (1.0 - 0.5 * k * dk / w) ** 2 - 0.25 * dk**2 * (1.0 / w + 0.25) + 0.5 * dkk


class Surface:
    """Base class: total implied variance of any log-moneyness k and maturity t (years, > 0)."""

    last_maturity: float = math.inf  # years, end of the surface

    def total_variance(self, k: Tensor, t: Tensor) -> TotalVariance:
        """k and t, of one shape → w and its derivatives."""
        raise NotImplementedError

    def __call__(self, k, t) -> TotalVariance:
        """`total_variance` of numbers or tensors that broadcast."""
        return self.total_variance(*torch.broadcast_tensors(double(k), double(t)))

    def implied_volatility(self, k, t) -> Tensor:
        """√(w/t), annualised, and at least `LOW`; only a surface with arbitrage reaches this bound."""
        return (self(k, t).w / double(t)).clamp(min=LOW**2).sqrt()

    def call_price(self, k, t) -> Tensor:
        """Price of the call of strike e^k on a spot of 1."""
        k = double(k)
        return black_scholes.price(torch.ones_like(k), k.exp(), double(t), self.implied_volatility(k, t))

    def forward_volatility(self, k, start, end) -> Tensor:
        """Implied volatility of the option that pays (S_end/S_start − e^k)⁺; vanillas do not fix it.

        Raises:
            ValueError: not a surface of a model.
        """
        raise ValueError("smile has vanillas alone, no forward-start options")

    def density_factor(self, k, t) -> Tensor:
        """`density_factor` of numbers or tensors that broadcast."""
        v = self(k, t)
        return density_factor(double(k), v.w, v.dk, v.dkk)

    def local_volatility(self, k, t) -> Tensor:
        """Dupire's σ(t, S₀e^k) = √(∂w/∂t / g), annualised (Gatheral 2006, eq. 1.10).

        It is clamped to [LOW, HIGH], and HIGH where g is not positive. Only a surface with arbitrage reaches these
        bounds, or one far beyond its quotes.
        """
        density = self.density_factor(k, t)
        growth = self(k, t).dt
        variance = torch.where(density > 0, growth / density, HIGH**2)
        return variance.clamp(LOW**2, HIGH**2).sqrt()


@dataclass
class SSVI(Surface):
    """SSVI with a power-law φ (Gatheral & Jacquier 2014, section 4), without arbitrage if its parameters allow none.

    w = θ/2 (1 + ρφk + √((φk + ρ)² + 1 − ρ²)), φ = η/(θ^γ(1 + θ)^{1−γ}), at-the-money variance θ = αt + βt².
    """

    alpha: float
    beta: float
    eta: float
    gamma: float
    rho: float
    last_maturity: float = math.inf

    def total_variance(self, k, t):
        rho = self.rho
        gamma = self.gamma
        theta = self.alpha * t + self.beta * t**2
        growth = self.alpha + 2.0 * self.beta * t  # ∂θ/∂t
        phi = self.eta / (theta**gamma * (1.0 + theta) ** (1.0 - gamma))
        phi_growth = -phi * (gamma / theta + (1.0 - gamma) / (1.0 + theta))  # ∂φ/∂θ
        u = phi * k + rho
        root = (u**2 + 1.0 - rho**2).sqrt()
        w = 0.5 * theta * (1.0 + rho * phi * k + root)
        slope = 0.5 * theta * (rho + u / root)  # ∂w/∂(φk)
        curvature = 0.5 * theta * (1.0 - rho**2) / root**3
        return TotalVariance(w, phi * slope, phi**2 * curvature, growth * (w / theta + phi_growth * k * slope))


class SVI(NamedTuple):
    """A raw SVI slice, w(k) = a + b(ρ(k − m) + √((k − m)² + s²)) (Gatheral & Jacquier 2014, eq. 3.1)."""

    a: float
    b: float
    rho: float
    m: float
    s: float

    def total_variance(self, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """w, w' and w'' at k; the parameters may be numbers or tensors that broadcast with k."""
        root = ((k - self.m) ** 2 + self.s**2) ** 0.5
        w = self.a + self.b * (self.rho * (k - self.m) + root)
        return w, self.b * (self.rho + (k - self.m) / root), self.b * self.s**2 / root**3


class Slices(Surface):
    """SVI slices; total variance is linear in time between them, and proportional to time before the first.

    Linear interpolation of w at the same k keeps a surface free of calendar arbitrage if its slices are (Gatheral &
    Jacquier 2014, lemma 5.1). The surface ends at the last slice.

    Raises:
        ValueError: maturities that are not positive and increasing.
    """

    def __init__(self, maturities: Sequence[float], slices: Sequence[SVI]):
        if not maturities or maturities[0] <= 0 or any(a >= b for a, b in pairwise(maturities)):
            raise ValueError(f"maturities are {', '.join(f'{t:g}' for t in maturities) or 'none'} (> 0, increasing)")
        if len(slices) != len(maturities):
            raise ValueError(f"{len(slices)} slices of {len(maturities)} maturities")
        self.maturities = [float(t) for t in maturities]
        self.slices = [SVI(*map(float, x)) for x in slices]
        self.last_maturity = self.maturities[-1]
        # With a slice of maturity 0 and no variance before the others
        self._times = double([0.0, *self.maturities])
        self._parameters = double([(0.0, 0.0, 0.0, 0.0, 1.0), *self.slices])

    def total_variance(self, k, t):
        times = self._times.to(k.device)
        parameters = self._parameters.to(k.device)
        after = torch.searchsorted(times, t.contiguous()).clamp(1, len(times) - 1)
        before = SVI(*parameters[after - 1].unbind(-1)).total_variance(k)
        behind = SVI(*parameters[after].unbind(-1)).total_variance(k)
        span = times[after] - times[after - 1]
        weight = (t - times[after - 1]) / span
        w, dk, dkk = (x + weight * (y - x) for x, y in zip(before, behind, strict=True))
        return TotalVariance(w, dk, dkk, (behind[0] - before[0]) / span)


@dataclass
class HestonSurface(Surface):
    """The smiles of Heston's model, by its characteristic function: vanillas, and forward starts that go with them.

    w/t is tabulated in k/√t, to `WIDTH` standard deviations, and √t, and interpolated by cubic splines. Beyond, the
    volatility stays what it is at the edge.
    """

    initial_variance: float = 0.04
    mean_variance: float = 0.04
    mean_reversion: float = 4.0
    vol_of_vol: float = 0.5
    correlation: float = -0.7
    last_maturity: float = 0.5

    WIDTH = 5.0
    FIRST = 0.25 / TRADING_DAYS  # years; before, w/t is as it is then

    def __post_init__(self):
        parameters = (self.initial_variance, self.mean_variance, self.mean_reversion, self.vol_of_vol, self.correlation)
        self.model = Heston(*parameters)

    @cached_property
    def _spline(self) -> RectBivariateSpline:
        edge = self.WIDTH * math.sqrt(max(self.initial_variance, self.mean_variance))
        y = np.linspace(-edge, edge, 81)
        root = np.linspace(math.sqrt(self.FIRST), math.sqrt(self.last_maturity) + 0.01, 32)
        t = double(root**2)
        strike = double(y[:, None] * root).exp()
        call = heston_call(1.0, strike, t, self.initial_variance, self.model)
        out = torch.where(strike < 1.0, call - 1.0 + strike, call)  # of the money
        volatility = black_scholes.implied_volatility(out, torch.ones_like(strike), strike, t, strike >= 1.0)
        return RectBivariateSpline(y, root, (volatility**2).numpy())

    def total_variance(self, k, t):
        y = k.cpu().numpy() / np.sqrt(t.cpu().numpy())
        root = np.sqrt(t.cpu().numpy())
        edge = self._spline.tck[0][-1]
        inside = np.abs(y) <= edge
        at = (np.clip(y, -edge, edge), np.maximum(root, math.sqrt(self.FIRST)))
        variance = self._spline(*at, grid=False)
        dy, dyy = (np.where(inside, self._spline(*at, dx=order, grid=False), 0.0) for order in (1, 2))
        dt = variance - 0.5 * y * dy + 0.5 * root * self._spline(*at, dy=1, grid=False)
        return TotalVariance(*(torch.as_tensor(x).to(k) for x in (root**2 * variance, root * dy, dyy, dt)))

    def forward_volatility(self, k, start, end):
        k, start, end = torch.broadcast_tensors(double(k), double(start), double(end))
        call = heston_forward_start_call(k.exp(), start, end - start, self.model)
        return black_scholes.implied_volatility(call, torch.ones_like(k), k.exp(), end - start)


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
SURFACES = {
    # The S&P 500 of 1 August 2018 (spot 2813.18): an arbitrage-free surface fitted to the slices below with an RMSE of
    # 0.23 vol points, valid to 51 days
    "sp500-2018": SSVI(0.0071, 0.01771, 4.72038, 0.3168, -0.53222, last_maturity=51.5 / TRADING_DAYS),
    # The slices themselves, rougher: between the first two, total variance falls in time where K/S > 1.12
    "sp500-2018-slices": Slices([days / 365 for days in _SP500_2018_DAYS], [SVI(*x) for x in _SP500_2018]),
    "sp500-2024": Slices([20 / 251, 40 / 251], [SVI(*x) for x in _SP500_2024]),  # 21 June 2024
    "heston": HestonSurface(),
}


def to_dict(surface: Surface) -> dict:
    """The parameters of a surface, for a checkpoint."""
    if isinstance(surface, SSVI):
        return {"ssvi": asdict(surface)}
    if isinstance(surface, HestonSurface):
        return {"heston": asdict(surface)}
    return {"maturities": surface.maturities, "slices": [list(x) for x in surface.slices]}


def from_dict(content: dict) -> Surface:
    """The surface of `to_dict`.

    Raises:
        KeyError, TypeError, ValueError: not the content of a surface.
    """
    for name, kind in (("ssvi", SSVI), ("heston", HestonSurface)):
        if name in content:
            return kind(**content[name])
    return Slices(content["maturities"], content["slices"])


# ARBITRAGE


def moneyness_grid(surface: Surface, t, z) -> Tensor:
    """k at `z` standard deviations √w(0, t) from the money; z and t broadcast."""
    return double(z) * surface(0.0, t).w.sqrt()


class Violation(NamedTuple):
    """A static arbitrage at log-moneyness k and maturity t (years).

    `kind` is butterfly, of `size` the density factor, or calendar, of `size` the fall of total variance.
    """

    kind: str
    k: float
    t: float
    size: float

    def __str__(self) -> str:
        what = "density factor" if self.kind == "butterfly" else "total variance falls in time by"
        where = f"{TRADING_DAYS * self.t:.1f} days, K/S = {math.exp(self.k):.3f}"
        return f"{self.kind} arbitrage at {where}: {what} {self.size:.2g}"


def find_arbitrage(surface: Surface, maturities: Sequence[float], k: Sequence[Sequence[float]]) -> list[Violation]:
    """The worst butterfly of each maturity and the worst calendar spread with the maturity before, if there are any.

    Args:
        maturities: years, increasing.
        k: (n,) log-moneyness to check, for each maturity; calendar spreads are checked where the ranges of both
            maturities overlap.
    """
    found = []
    for i, (t, points) in enumerate(zip(maturities, map(double, k), strict=True)):
        density = surface.density_factor(points, t)
        if density.min() < 0:
            found.append(Violation("butterfly", float(points[density.argmin()]), t, float(density.min())))
        if i > 0:
            earlier = double(k[i - 1])
            both = points[(points >= earlier.min()) & (points <= earlier.max())]
            growth = surface(both, t).w - surface(both, maturities[i - 1]).w
            if len(both) and growth.min() < 0:
                found.append(Violation("calendar", float(both[growth.argmin()]), t, float(-growth.min())))
    return found
