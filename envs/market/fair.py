"""Fair values of European options: the expectation of the payoff under a model, as tables of the premium over a price.

The reference price is Black–Scholes' at the volatility √`dynamics.expected_average_variance(variance, steps_left)`, the
same for all strikes. The premium is

    (fair value − reference price)/strike,    a function of steps to expiry m, x = ln(S/K) and the variance v.

It is zero in `GBM` and small and smooth elsewhere, so that a table of it is much more accurate than one of prices. With
zero rates put–call parity holds for both prices: the premium of a put is that of the call.

    table = premium_table(Heston(dt=1 / 504), 60, 120)
    premium, slope_in_x, slope_in_v = table(steps_left, (spot / strike).log(), variance).unbind(-1)

`Heston` by its characteristic function, in continuous time (the scheme's steps are short enough not to matter);
`Merton` by his series; any other model whose state is the variance by backward induction over its own `step`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.interpolate import CubicSpline
from scipy.stats import poisson

from envs.market import black_scholes
from envs.market.dynamics import GBM, Dynamics, Heston, Merton

Tensor = torch.Tensor
F64 = torch.float64

NUM_MONEYNESS = 129
MAX_MONEYNESS = 3.0  # of z = ln(S/K)/√τ: five standard deviations at a volatility of 60 %
CENTRE = 0.1  # z nodes are evenly spaced near the money up to here and geometrically beyond
NUM_VARIANCES = 41
MAX_VOLATILITY = 1.0  # of the nodes in √v, which start at 0
# Backward induction goes through nodes that paths hardly visit: what is wrong at the edge would come back from there
NUM_INDUCTION_VARIANCES = 61
MAX_INDUCTION_VOLATILITY = 2.0

# Fourier integrals run over u√τ from 0 to MAX_FREQUENCY: 64 panels of 32 Gauss–Legendre nodes. Even at a volatility of
# 5 %, φ has vanished there, and e^{iux} turns by half a radian between nodes at the edge of the table.
MAX_FREQUENCY = 400.0
NUM_PANELS = 64
PANEL_NODES = 32

HALF_LINE_NODES = {1: 8, 2: 6, 3: 4}  # quadrature nodes on either side of zero, by noise_size
LAST_STEP_NODES = {1: 4001, 2: 161, 3: 41}  # nodes per normal for the payoff, which has a kink


@dataclass(frozen=True)
class PremiumTable:
    """Premiums on a grid of steps to expiry × z = ln(S/K)/√(m dt) × variance, and their interpolation.

    Attributes:
        first: the least steps to expiry m; the others follow one by one.
        dt: length of a step, years.
        moneyness: (Z,) nodes in z, CENTRE·sinh of evenly spaced numbers.
        variance: (V,) nodes in annualised variance, evenly spaced in √v from 0; one if the variance is constant.
        values: (M, Z, V, 3): premium over the strike, its derivative in x = ln(S/K) at fixed v, and its derivative in
            v at fixed x.
    """

    first: int
    dt: float
    moneyness: Tensor
    variance: Tensor
    values: Tensor

    @property
    def last(self) -> int:
        """The most steps to expiry."""
        return self.first + len(self.values) - 1

    def to(self, *args, **kwargs) -> "PremiumTable":
        """The table on another device or in another dtype; arguments as in `Tensor.to`."""
        names = ("moneyness", "variance", "values")
        return replace(self, **{name: getattr(self, name).to(*args, **kwargs) for name in names})

    def __call__(self, steps_left: Tensor, log_moneyness: Tensor, variance: Tensor) -> Tensor:
        """Premium over the strike and its derivatives in ln(S/K) and in the variance, as in `values`.

        Args:
            steps_left: whole numbers (of any dtype); beyond the table they count as its nearest, and 0 gives 0.
            log_moneyness: ln(S/K).
            variance: annualised.

        Shape: all three broadcast to (…); the result is (…, 3). Outside the grid it is what it is at the edge.

        Derivatives are interpolated bilinearly, in x and v. The premium is the bilinear mean of the four corners'
        f + ½ ∇f·(distance to the corner), which is exact for quadratics, where that of f alone is for linear functions.
        """
        _, num_moneyness, num_variances, _ = self.values.shape
        dtype = self.values.dtype
        m = steps_left.clamp(self.first, self.last)
        root_time = (m.to(dtype).clamp(min=1.0) * self.dt).sqrt()
        z = torch.minimum((log_moneyness / root_time).clamp(min=-MAX_MONEYNESS), self.moneyness[-1])
        spacing = 2.0 * math.asinh(MAX_MONEYNESS / CENTRE) / (num_moneyness - 1)
        y = (z / CENTRE).abs()
        arsinh = z.sign() * (y + (y * y + 1.0).sqrt()).log()  # `torch.asinh` takes ten times as long
        i = (arsinh / spacing).floor().long() + (num_moneyness - 1) // 2
        i = i.clamp(0, num_moneyness - 2)
        below = self.moneyness[i]
        above = self.moneyness[i + 1]
        share = (z - below) / (above - below)
        corner = ((m.long() - self.first) * num_moneyness + i) * num_variances  # of `rows`
        corners = [(corner, 1.0 - share, root_time * (z - below), None)]
        corners += [(corner + num_variances, share, root_time * (z - above), None)]
        if num_variances > 1:
            v = torch.minimum(variance.clamp(min=0.0), self.variance[-1])
            j = ((v / self.variance[-1]).sqrt() * (num_variances - 1)).long().clamp(max=num_variances - 2)
            low = self.variance[j]
            high = self.variance[j + 1]
            share = (v - low) / (high - low)
            sides = ((j, 1.0 - share, v - low), (j + 1, share, v - high))
            corners = [(c + k, weight * w, dx, dv) for c, weight, dx, _ in corners for k, w, dv in sides]
        else:
            shape = torch.broadcast_shapes(corner.shape, variance.shape)
            corners = [(c.expand(shape), weight, dx, torch.zeros_like(dx)) for c, weight, dx, _ in corners]
        return self._mean(corners) * (steps_left > 0)[..., None]

    def _mean(self, corners: list[tuple[Tensor, Tensor, Tensor, Tensor]]) -> Tensor:
        """Weighted mean (…, 3) over corners: row of the table, weight, distances in x and v."""
        rows = self.values.reshape(-1, 3)
        total = 0.0
        correction = 0.0
        for index, weight, dx, dv in corners:
            row = rows.index_select(0, index.reshape(-1)).view(*index.shape, 3)
            weighted = weight[..., None] * row
            total = total + weighted
            correction = correction + dx * weighted[..., 1] + dv * weighted[..., 2]
        return torch.cat([(total[..., 0] + 0.5 * correction)[..., None], total[..., 1:]], -1)


def premium_table(dynamics: Dynamics, first: int, last: int) -> PremiumTable:
    """Premiums at `first` … `last` steps to expiry (0 ≤ first ≤ last), in float64 on the CPU.

    Raises:
        ValueError: if the steps to expiry are not in order.
        NotImplementedError: if the model has no `step` of its own.
    """
    if not 0 <= first <= last:
        raise ValueError(f"steps to expiry from {first} to {last} (0 ≤ first ≤ last)")
    angle = math.asinh(MAX_MONEYNESS / CENTRE)
    z = CENTRE * torch.sinh(torch.linspace(-angle, angle, NUM_MONEYNESS, dtype=F64))
    if isinstance(dynamics, GBM | Merton):
        v = torch.tensor([dynamics.initial_variance], dtype=F64)
    elif isinstance(dynamics, Heston):
        v = torch.linspace(0.0, MAX_VOLATILITY, NUM_VARIANCES, dtype=F64) ** 2
    else:
        v = torch.linspace(0.0, MAX_INDUCTION_VOLATILITY, NUM_INDUCTION_VARIANCES, dtype=F64) ** 2
    table = PremiumTable(first, dynamics.dt, z, v, torch.zeros(last - first + 1, len(z), len(v), 3, dtype=F64))
    if isinstance(dynamics, GBM):
        return table
    if isinstance(dynamics, Heston):
        slabs = _heston_slabs(dynamics, z, v, first, last)
    elif isinstance(dynamics, Merton):
        slabs = _merton_slabs(dynamics, z, v, first, last)
    else:
        slabs = _induction_slabs(dynamics, z, v, last)
    for m, premium in slabs:
        if m >= first:
            table.values[m - first] = _with_derivatives(premium, z * math.sqrt(m * dynamics.dt), v)
    return table


_KNOWN: dict[tuple, PremiumTable] = {}  # the last few tables, for `known_premium_table`


def known_premium_table(dynamics: Dynamics, first: int, last: int) -> PremiumTable:
    """`premium_table`, made once for each model and range: a market is made many times, in many sizes."""
    key = (type(dynamics), tuple(sorted(dynamics.parameters().items())), first, last)
    if key not in _KNOWN:
        if len(_KNOWN) >= 8:
            _KNOWN.pop(next(iter(_KNOWN)))
        _KNOWN[key] = premium_table(dynamics, first, last)
    return _KNOWN[key]


def _with_derivatives(premium: Tensor, x: Tensor, variance: Tensor) -> Tensor:
    """Premium (Z, V) → (Z, V, 3), with its derivatives in x (Z,) and in the variance (V,), by cubic splines."""
    values = premium.numpy()
    in_x = CubicSpline(x.numpy(), values, axis=0)(x.numpy(), 1)
    in_v = np.zeros_like(values)
    if len(variance) > 1:
        in_v = CubicSpline(variance.numpy(), values, axis=1)(variance.numpy(), 1)
    return torch.from_numpy(np.stack([values, in_x, in_v], -1))


def _reference(dynamics: Dynamics, x: Tensor, variance: Tensor, steps_left: int) -> Tensor:
    """Black–Scholes price of a call over its strike, at the expected average variance; x and variance broadcast."""
    volatility = dynamics.expected_average_variance(variance, steps_left).sqrt()
    return black_scholes.price(x.exp(), 1.0, steps_left * dynamics.dt, volatility)


# HESTON


def heston_call(spot, strike, time_to_expiry, variance, model: Heston) -> Tensor:
    """Price of a call in Heston's model, by its characteristic function, in float64.

    Args:
        spot, strike: > 0, in the same currency.
        time_to_expiry: years, > 0.
        variance: annualised, today's.
        model: its other parameters; `dt` does not matter.

    Shape: the first four (tensors or numbers) broadcast; the result has the broadcast shape.
    """
    numbers = (torch.as_tensor(number, dtype=F64) for number in (spot, strike, time_to_expiry, variance))
    spot, strike, tau, variance = numbers  # broadcast late, as the characteristic function knows no strike
    volatility = model.expected_average_variance(variance, tau / model.dt).sqrt()
    years, today = tau.numpy()[..., None], variance.numpy()[..., None]
    return _lewis_price(spot, strike, tau, volatility, lambda u: _heston_integrand(model, u, years, today))


def heston_forward_start_call(strike, start, time_to_expiry, model: Heston) -> Tensor:
    """Price, at time 0 and over the spot, of the call on S_T/S_s with T = s + τ in Heston's model, in float64.

    By the tower property it is E[C(1, K, τ, v_s)]. Given v_s the characteristic function is e^{A + B v_s}, and v_s/c
    has a non-central χ² distribution, c = ξ²(1 − e^{−κs})/4κ, whose transform is known (Cox, Ingersoll & Ross 1985;
    Kruse & Nögel 2005): E[e^{Bv_s}] = (1 − 2cB)^{−2κθ/ξ²} e^{B e^{−κs} v/(1 − 2cB)}.

    Args:
        strike: K, > 0, a ratio of spots.
        start: s, years, ≥ 0.
        time_to_expiry: τ, years from the start to expiry, > 0.
        model: with today's variance; `dt` does not matter.

    Shape: the first three (tensors or numbers) broadcast; the result has the broadcast shape.
    """
    strike, start, tau = (torch.as_tensor(number, dtype=F64) for number in (strike, start, time_to_expiry))
    today = torch.as_tensor(model.initial_variance, dtype=F64)
    # E[∫ v dt] to the start and to expiry
    before, total = (model.expected_average_variance(today, t / model.dt) * t for t in (start, start + tau))
    volatility = ((total - before) / tau).sqrt()
    years, variance = tau.numpy()[..., None], (total - before).numpy()[..., None]
    decay = np.exp(-model.mean_reversion * start.numpy())[..., None]
    scale = model.vol_of_vol**2 * (1.0 - decay) / (4.0 * model.mean_reversion)
    power = 2.0 * model.mean_reversion * model.mean_variance / model.vol_of_vol**2

    def integrand(u: np.ndarray) -> np.ndarray:
        level, slope = _heston_exponent(model, u, years)
        denominator = 1.0 - 2.0 * scale * slope
        phi = np.exp(level + slope * decay * model.initial_variance / denominator - power * np.log(denominator))
        q = u**2 + 0.25
        return (phi - np.exp(-0.5 * q * variance)) / q

    return _lewis_price(torch.ones_like(strike), strike, tau, volatility, integrand)


def _lewis_price(spot, strike, tau, volatility, integrand) -> Tensor:
    """Black–Scholes price plus the premium −√(SK)/π ∫₀^∞ Re[e^{iu ln(S/K)} integrand(u)] du; tensors that broadcast.

    `integrand` takes u, of the shape of tau and a last axis of nodes; see `_heston_integrand`.
    """
    frequency, weight = _frequencies()
    root_time = np.sqrt(tau.numpy())
    u = frequency / root_time[..., None]
    x = (spot / strike).log().numpy()
    integral = (np.exp(1j * u * x[..., None]) * integrand(u)).real @ weight / root_time
    premium = torch.as_tensor(-np.exp(0.5 * x) / math.pi * integral)
    return black_scholes.price(spot, strike, tau, volatility) + strike * premium


def _heston_slabs(model: Heston, z: Tensor, variance: Tensor, first: int, last: int) -> Iterator[tuple[int, Tensor]]:
    """Steps to expiry m and the premium (Z, V) there. In u√τ and z = x/√τ, e^{iux} is the same for every m."""
    frequency, weight = _frequencies()
    phase = np.outer(z.numpy(), frequency)
    cosine = np.cos(phase) * weight
    sine = np.sin(phase) * weight
    for m in range(max(first, 1), last + 1):
        tau = m * model.dt
        u = frequency[:, None] / math.sqrt(tau)
        integrand = _heston_integrand(model, u, tau, variance.numpy())
        integral = (cosine @ integrand.real - sine @ integrand.imag) / math.sqrt(tau)
        yield m, torch.from_numpy(-np.exp(0.5 * z.numpy() * math.sqrt(tau))[:, None] / math.pi * integral)


def _frequencies() -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of the integral over u√τ, both (NUM_PANELS·PANEL_NODES,)."""
    node, weight = np.polynomial.legendre.leggauss(PANEL_NODES)
    half = 0.5 * MAX_FREQUENCY / NUM_PANELS
    middle = half * (2.0 * np.arange(NUM_PANELS) + 1.0)
    return (middle[:, None] + half * node).ravel(), np.tile(half * weight, NUM_PANELS)


def _heston_integrand(model: Heston, u: np.ndarray, tau, variance) -> np.ndarray:
    """[φ(u − i/2) − φ_BS(u − i/2)]/(u² + ¼), φ_BS at the expected average variance; all arguments broadcast.

    Lewis (2001): C = S − √(SK)/π ∫₀^∞ Re[e^{iu ln(S/K)} φ(u − i/2)] du/(u² + ¼), so that the same integral of the
    difference gives that of the prices. Both φ are 1 at ±i/2: the quotient has no poles, and is small.
    """
    q = u**2 + 0.25
    level, slope = _heston_exponent(model, u, tau)
    kappa = model.mean_reversion
    total_variance = model.mean_variance * tau + (variance - model.mean_variance) * -np.expm1(-kappa * tau) / kappa
    return (np.exp(level + slope * variance) - np.exp(-0.5 * q * total_variance)) / q


def _heston_exponent(model: Heston, u: np.ndarray, tau) -> tuple[np.ndarray, np.ndarray]:
    """A and B of φ(u − i/2) = e^{A + Bv}, for ln S over τ years; u and τ broadcast.

    In the form without a branch cut (Albrecher, Mayer, Schoutens & Tistaert 2007), where (β − d)/ξ² is written as
    −(u² + ¼)/(β + d), which loses no digits as ξ → 0.
    """
    kappa = model.mean_reversion
    xi = model.vol_of_vol
    q = u**2 + 0.25
    beta = kappa - model.correlation * xi * (0.5 + 1j * u)
    d = np.sqrt(beta**2 + xi**2 * q)
    ratio = -q / (beta + d)
    g = xi**2 * ratio / (beta + d)
    decay = np.exp(-d * tau)
    level = kappa * model.mean_variance * (ratio * tau - 2.0 / xi**2 * np.log1p(g * (1.0 - decay) / (1.0 - g)))
    return level, ratio * (1.0 - decay) / (1.0 - g * decay)


# MERTON


def _merton_slabs(model: Merton, z: Tensor, variance: Tensor, first: int, last: int) -> Iterator[tuple[int, Tensor]]:
    """Steps to expiry m and the premium (Z, 1) there: Merton (1976), Black–Scholes given the number of jumps n.

    Given n, ln S has n(μ + ½δ²) more drift and nδ² more variance; dividing by the mean keeps the spot a martingale.
    """
    for m in range(max(first, 1), last + 1):
        tau = m * model.dt
        jumps = model.jump_rate * tau
        n = torch.arange(math.ceil(jumps + 10.0 * math.sqrt(jumps)) + 20, dtype=F64)
        probability = torch.from_numpy(poisson.pmf(n.numpy(), jumps))
        growth = n * (model.jump_mean + 0.5 * model.jump_volatility**2)
        growth = growth - (probability @ growth.exp()).log()
        volatility = (model.volatility**2 + n * model.jump_volatility**2 / tau).sqrt()
        x = z[:, None] * math.sqrt(tau)
        fair = black_scholes.price((x + growth).exp(), 1.0, tau, volatility) @ probability
        yield m, fair[:, None] - _reference(model, x, variance, m)


# ANY OTHER


def _induction_slabs(dynamics: Dynamics, z: Tensor, variance: Tensor, last: int) -> Iterator[tuple[int, Tensor]]:
    """Steps to expiry m = 1 … last and the premium p_m (Z, V) there, backwards from expiry.

    p_{m+1}(x, v) = E[BS_m(x + r, v') + p_m(x + r, v')] − BS_{m+1}(x, v), where r and v' are the model's own step: the
    kink of the payoff meets no quadrature, only the smooth BS_m, exact at the nodes, and p_m, interpolated.
    """
    if last == 0:
        return
    node, weight = _half_line_rule(HALF_LINE_NODES.get(dynamics.noise_size, 3))
    node = torch.cat([-node.flip(0), node])  # a kink of the next variance at 0, as in GJR-GARCH, is at no node
    weight = torch.cat([weight.flip(0), weight])
    log_return, next_variance, weight = _steps(dynamics, variance, node, weight)
    premium = _last_step(dynamics, z * math.sqrt(dynamics.dt), variance)
    yield 1, premium
    for m in range(2, last + 1):
        x = z * math.sqrt((m - 1) * dynamics.dt)
        before = PremiumTable(m - 1, dynamics.dt, z, variance, _with_derivatives(premium, x, variance)[None])
        x = z[:, None, None] * math.sqrt(m * dynamics.dt)
        later = before(torch.tensor(m - 1), x + log_return, next_variance)[..., 0]
        later = later + _reference(dynamics, x + log_return, next_variance, m - 1)
        premium = later @ weight - _reference(dynamics, x[..., 0], variance, m)
        yield m, premium


def _half_line_rule(num_nodes: int) -> tuple[Tensor, Tensor]:
    """Gauss quadrature for the standard normal density on [0, ∞): nodes and weights (num_nodes,), of sum ½.

    Stieltjes' recurrence for the orthogonal polynomials, on a fine Gauss–Legendre grid, then the eigenvalues of the
    Jacobi matrix (Golub & Welsch 1969; Gautschi 2004, section 2.2).
    """
    grid, measure = np.polynomial.legendre.leggauss(300)
    grid = 6.0 * (grid + 1.0)
    measure = measure * 6.0 * np.exp(-0.5 * grid**2) / math.sqrt(2.0 * math.pi)
    diagonal = np.zeros(num_nodes)
    beside = np.zeros(num_nodes)  # beside[k] couples the polynomials k − 1 and k
    previous = np.zeros_like(grid)
    current = np.full_like(grid, measure.sum() ** -0.5)
    for k in range(num_nodes):
        diagonal[k] = measure @ (grid * current**2)
        following = (grid - diagonal[k]) * current - beside[k] * previous
        norm = math.sqrt(measure @ following**2)
        previous = current
        current = following / norm
        if k + 1 < num_nodes:
            beside[k + 1] = norm
    nodes, vectors = np.linalg.eigh(np.diag(diagonal) + np.diag(beside[1:], 1) + np.diag(beside[1:], -1))
    return torch.from_numpy(nodes), torch.from_numpy(0.5 * vectors[0] ** 2)


def _steps(dynamics: Dynamics, variance: Tensor, node: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-returns and next variances (V, Q) of the model's step from every variance, and weights (Q,).

    The rule (n,) for one normal is used for each: Q = n^noise_size. Log-returns are shifted, by less than the error of
    the quadrature, to keep E[e^log-return] = 1.
    """
    size = dynamics.noise_size
    noise = torch.stack(torch.meshgrid(*[node] * size, indexing="ij"), -1).reshape(-1, size)
    weight = torch.stack(torch.meshgrid(*[weight] * size, indexing="ij"), -1).reshape(-1, size).prod(-1)
    weight = weight / weight.sum()
    start = variance.repeat_interleave(len(noise))
    log_return, next_variance = dynamics.step(start, noise.repeat(len(variance), 1))
    log_return = log_return.view(len(variance), -1)
    log_return = log_return - (log_return.exp() @ weight).log()[:, None]
    return log_return, next_variance.view(len(variance), -1), weight


def _last_step(dynamics: Dynamics, x: Tensor, variance: Tensor) -> Tensor:
    """Premium (Z, V) one step before expiry, from many nodes of the log-return r, weight q, evenly spaced in the noise.

    E[(e^{x + r} − 1)⁺] = e^x Σ_{r > −x} q e^r − Σ_{r > −x} q: sums over the tail of the sorted log-returns.
    """
    node = torch.linspace(-8.0, 8.0, LAST_STEP_NODES.get(dynamics.noise_size, 21), dtype=F64)
    log_return, _, weight = _steps(dynamics, variance, node, black_scholes.normal_pdf(node))
    log_return, order = log_return.sort(1)
    weight = weight[order]
    tails = []
    for mass in (weight * log_return.exp(), weight):
        tails.append(torch.nn.functional.pad(mass.flip(1).cumsum(1).flip(1), (0, 1)))
    above = torch.searchsorted(log_return, -x.expand(len(variance), -1).contiguous())
    spots, probabilities = (tail.gather(1, above) for tail in tails)
    fair = x.exp() * spots - probabilities
    return fair.T - _reference(dynamics, x[:, None], variance, 1)
