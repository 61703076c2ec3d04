"""The exact optimum of hedging one option, by dynamic programming.

`optimal_hedge` covers two cases. Without client orders (phase 1) the state is (time, spot, variance, holding), and the
market must be Markov in (spot, variance) and driven by one normal a step: gbm and garch. With client orders (phase 2)
the state is (time, spot, position, holding), in gbm.
"""

from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
import torch

from envs.market import black_scholes
from envs.market.dynamics import GARCH, GBM
from envs.market.hedging import HedgingEnv, OrderLaw
from envs.market.units import TRADING_DAYS

Tensor = torch.Tensor
MAX_POSITION = 60  # options; a larger grid of positions takes too long at the resolution that a band needs


class Resolution(NamedTuple):
    """Number of nodes of each grid, and of the quadrature over a step's normal."""

    spots: int
    variances: int
    holdings: int
    quadrature: int


GBM_RESOLUTION = Resolution(spots=401, variances=1, holdings=201, quadrature=31)
GARCH_RESOLUTION = Resolution(spots=201, variances=29, holdings=121, quadrature=21)
ORDERS_RESOLUTION = Resolution(spots=201, variances=1, holdings=1001, quadrature=64)


class Grids(NamedTuple):
    """Nodes of the state x, v, n, h, and of the Gauss–Hermite quadrature over a step's normal."""

    log_spots: np.ndarray  # (M,) x = ln(S/K)
    log_variances: np.ndarray  # (J,) ln v; one node for gbm
    positions: np.ndarray  # (P,) n, options held; one node without client orders
    holdings: np.ndarray  # (H,) h, shares held
    normals: np.ndarray  # (Q,)
    weights: np.ndarray  # (Q,), their sum is 1


class MarketStep(NamedTuple):
    """One step of the market from every node (x, v), for every quadrature node."""

    spot: np.ndarray  # (M,) currency
    next_spot: np.ndarray  # (J, M, Q)
    next_variance: Tensor  # (J, 1, Q)
    transition: np.ndarray | sp.csr_matrix  # (J·M, J·M), E[f(x', v') | x, v] = transition @ f


class Moments(NamedTuple):
    """Conditional moments of a step's changes ΔS of the spot and ΔC of the option's mark, each (J, M, 1)."""

    spot_square: np.ndarray  # E[ΔS²]
    cross: np.ndarray  # E[ΔS ΔC]
    option_square: np.ndarray  # E[ΔC²]
    option_mean: np.ndarray  # E[ΔC]: not 0 where the mark differs from the fair value


class OptimalHedge:
    """The optimal no-trade band of a `HedgingEnv` with one option, as a policy: observation → action.

    Attributes:
        value: expected objective of an episode under this policy, currency.
        log_spots, log_variances, positions: see `Grids`.
        lower, upper: (num_steps, P, J, M) edges of the band in shares held: buy up to `lower`, sell down to `upper`.
        actions: (num_steps, P, J, M, size) the same band as the environment's actions.
    """

    def __init__(self, env: HedgingEnv, value: float, grids: Grids, lower: np.ndarray, upper: np.ndarray):
        self.env = env
        self.value = value
        self.log_spots = grids.log_spots
        self.log_variances = grids.log_variances
        self.positions = grids.positions
        self.lower = lower
        self.upper = upper
        strike, _, is_call = env.options[0]
        steps_left = torch.arange(env.num_steps, 0, -1, dtype=torch.float64)[:, None, None, None]
        spot = strike * torch.from_numpy(grids.log_spots).exp()
        variance = torch.from_numpy(grids.log_variances).exp()[:, None]
        volatility = env.dynamics.expected_average_variance(variance, steps_left).sqrt()
        option_delta = black_scholes.delta(spot, strike, steps_left * env.dynamics.dt, volatility, is_call)
        delta = torch.from_numpy(grids.positions)[:, None, None] * option_delta
        offset = 0.5 * (torch.from_numpy(lower) + torch.from_numpy(upper)) + delta
        half_width = 0.5 * (torch.from_numpy(upper) - torch.from_numpy(lower))
        self.actions = env.to_action(offset=offset, half_width=half_width).to(env.device, env.dtype)

    def __call__(self, observation: Tensor) -> Tensor:
        """The band at the observed state, bilinear between the grid's spots and variances."""
        state = self.env.decode(observation)
        x_index, x_weight = self._locate(self.log_spots, torch.log(state.spot / self.env.options[0].strike))
        v_index, v_weight = self._locate(self.log_variances, torch.log(state.variance))
        n = torch.round(state.position[:, 0] - self.positions[0]).long().clamp(0, len(self.positions) - 1)
        t = state.step.clamp(max=self.env.num_steps - 1)
        action = 0.0
        for i in (0, 1):
            for j in (0, 1):
                v = (v_index + j).clamp(max=len(self.log_variances) - 1)
                weight = (x_weight if i else 1 - x_weight) * (v_weight if j else 1 - v_weight)
                action = action + weight[:, None] * self.actions[t, n, v, x_index + i]
        return action

    @staticmethod
    def _locate(grid: np.ndarray, points: Tensor) -> tuple[Tensor, Tensor]:
        """Index of the node below each point (n,), and how far the point is towards the next node, 0 to 1."""
        if len(grid) == 1:
            return torch.zeros_like(points, dtype=torch.long), torch.zeros_like(points)
        u = ((points - grid[0]) / (grid[1] - grid[0])).clamp(0, len(grid) - 1)
        index = u.floor().long().clamp(max=len(grid) - 2)
        return index, u - index


def has_optimum(env: HedgingEnv) -> bool:
    """Whether `optimal_hedge` can solve `env`.

    It takes one option, and either gbm or garch without client orders, or gbm with client orders whose likely sum is
    at most `MAX_POSITION`.
    """
    solvable = GBM if env.order_law.rate > 0 else GBM | GARCH
    return env.num_options == 1 and isinstance(env.dynamics, solvable) and _position_limit(env) <= MAX_POSITION


def _position_limit(env: HedgingEnv) -> int:
    """Five standard deviations of the sum of an episode's orders, options."""
    return int(np.ceil(5.0 * (2.0 * env.order_law.variance * env.num_steps) ** 0.5))


def optimal_hedge(env: HedgingEnv, position_limit: int | None = None) -> OptimalHedge:
    """Solves the hedging problem of `env` by dynamic programming.

    On a CPU core it takes 0.1 s for gbm, 2 s for garch, 7 s or more with client orders.

    Q_t(x, v, n, h) is the value of holding h shares and n options over the next step, V_t(x, v, n, h) the value just
    before the trade of time t, and k the net size of client orders:

        Q_t(x, v, n, h) = E[ΔW − ½a ΔW² + V_{t+1}(x', v', n − k, h)],    ΔW = h ΔS + n ΔC,
        V_t(x, v, n, h) = max_{h'} Q_t(x, v, n, h') − cost·S·|h' − h|,

    and V_T = −cost·S·|h|. Q is concave in h, so the optimal policy is a no-trade band: buy up to argmax(Q − cost·S·h),
    sell down to argmax(Q + cost·S·h). Expectations over the market are Gauss–Hermite sums of values interpolated
    cubically on the grid.

    Args:
        position_limit: orders that would take |n − initial position| beyond it are cut. The default, five standard
            deviations of the sum of an episode's orders, is as good as no limit.

    Raises:
        ValueError: `has_optimum(env)` is False.
    """
    law = env.order_law
    if not has_optimum(env):
        model = type(env.dynamics).__name__.lower()
        raise ValueError(
            f"no exact optimum for {env.num_options} options under {model} with {law.rate:g} orders a step "
            f"(only for one option, under gbm with no more than {MAX_POSITION} of it likely, or garch without orders)"
        )
    limit = 0
    if law.rate > 0:
        limit = _position_limit(env) if position_limit is None else position_limit
    grids = _grids(env, limit)
    market = _market_step(env, grids)
    order_transition = _order_transition(law, limit)

    share_cost = env.cost_rate * market.spot[:, None] * grids.holdings  # cost·S·h (M, H)
    shape = (len(grids.positions), len(grids.log_variances), len(grids.log_spots), len(grids.holdings))
    value = np.broadcast_to(-np.abs(share_cost), shape).copy()  # V_T
    lower = np.empty((env.num_steps, *shape[:-1]))
    upper = np.empty_like(lower)
    for t in reversed(range(env.num_steps)):
        moments = _moments(env, grids, market, env.num_steps - t)
        for i, n in enumerate(grids.positions):  # one position at a time fits in the processor's cache
            next_value = (market.transition @ value[i].reshape(-1, shape[-1])).reshape(shape[1:])
            q = _q(next_value, moments, n, grids.holdings, env.risk_aversion)
            value[i], lower[t, i], upper[t, i] = _trade(q, share_cost, grids.holdings)
        if limit > 0:  # the orders of time t come before its trade
            value = (order_transition @ value.reshape(shape[0], -1)).reshape(shape)
    client_income = 2.0 * law.rate * law.mean_size * env.num_steps * env.client_spread
    objective = client_income + _value_at_start(env, grids, value[limit])
    return OptimalHedge(env, objective, grids, lower, upper)


def _grids(env: HedgingEnv, limit: int) -> Grids:
    """Grids that hold all states likely to be met, with positions up to `limit` from the initial one."""
    dynamics = env.dynamics
    strike, _, is_call = env.options[0]
    is_gbm = isinstance(dynamics, GBM)
    resolution = GBM_RESOLUTION if is_gbm else GARCH_RESOLUTION
    if env.order_law.rate > 0:
        resolution = ORDERS_RESOLUTION

    standard_deviation = (dynamics.initial_variance * env.num_steps * dynamics.dt) ** 0.5
    width = (6.0 if is_gbm else 9.0) * max(standard_deviation, 1e-3)
    middle = np.log(env.initial_spot / strike)
    log_spots = np.linspace(middle - width, middle + width, resolution.spots)

    if is_gbm:
        log_variances = np.log([dynamics.initial_variance])
    else:  # variance cannot fall below ω/(1 − β), and exceeds 60 times its mean less than once in a billion days
        lowest = 0.9 * TRADING_DAYS * dynamics.omega / (1 - dynamics.beta)
        log_variances = np.linspace(np.log(lowest), np.log(60 * dynamics.initial_variance), resolution.variances)

    positions = env.initial_position + np.arange(-limit, limit + 1.0)
    option_delta = (0.0, 1.0) if is_call else (-1.0, 0.0)
    hedges = -np.outer(positions, option_delta)  # the range of the Black–Scholes hedge
    room = 0.2 * max(1.0, np.abs(positions).max() ** 0.5)  # and beyond it
    holdings = np.linspace(hedges.min() - room, hedges.max() + room, resolution.holdings)

    normals, weights = np.polynomial.hermite_e.hermegauss(resolution.quadrature)
    return Grids(log_spots, log_variances, positions, holdings, normals, weights / weights.sum())


def _market_step(env: HedgingEnv, grids: Grids) -> MarketStep:
    """Where the market goes in one step from every node, and its transition matrix."""
    num_variances = len(grids.log_variances)
    num_normals = len(grids.normals)
    variance = torch.from_numpy(np.exp(grids.log_variances)).repeat_interleave(num_normals)
    noise = torch.from_numpy(grids.normals).repeat(num_variances)[:, None]
    log_return, next_variance = env.dynamics.step(variance, noise)
    log_return = log_return.view(num_variances, num_normals).numpy()
    next_log_variance = next_variance.log().view(num_variances, num_normals).numpy()
    next_log_spot = grids.log_spots[None, :, None] + log_return[:, None, :]  # (J, M, Q)
    strike = env.options[0].strike
    return MarketStep(
        spot=strike * np.exp(grids.log_spots),
        next_spot=strike * np.exp(next_log_spot),
        next_variance=next_variance.view(num_variances, 1, num_normals),
        transition=_transition(grids, next_log_spot, next_log_variance),
    )


def _transition(grids: Grids, next_log_spot: np.ndarray, next_log_variance: np.ndarray) -> np.ndarray | sp.csr_matrix:
    """(J·M, J·M) matrix of E[f(x', v') | x, v] from values of f on the grid.

    Args:
        next_log_spot: (J, M, Q).
        next_log_variance: (J, Q).
    """
    num_variances = len(grids.log_variances)
    num_spots = len(grids.log_spots)
    size = num_variances * num_spots
    x_nodes, x_weights = _interpolation(grids.log_spots, next_log_spot)
    v_nodes, v_weights = _interpolation(grids.log_variances, next_log_variance)
    columns = v_nodes[:, None, :, None, :] * num_spots + x_nodes[None]  # (4 or 1, 4, J, M, Q)
    entries = grids.weights * v_weights[:, None, :, None, :] * x_weights[None]
    rows = np.broadcast_to(np.arange(size).reshape(num_variances, num_spots, 1), columns.shape)
    matrix = sp.csr_matrix((entries.ravel(), (rows.ravel(), columns.ravel())), shape=(size, size))
    return matrix.toarray() if num_variances == 1 else matrix  # for gbm it is small and half full


def _moments(env: HedgingEnv, grids: Grids, market: MarketStep, steps_left: int) -> Moments:
    """Moments of ΔS and ΔC over the step that begins `steps_left` steps before expiry."""
    variance = torch.from_numpy(np.exp(grids.log_variances))[:, None]
    spot_change = market.next_spot - market.spot[:, None]
    mark = _mark(env, market.spot[None], variance, steps_left)
    option_change = _mark(env, market.next_spot, market.next_variance, steps_left - 1) - mark[..., None]
    weights = grids.weights
    return Moments(
        spot_square=(weights * spot_change**2).sum(-1)[..., None],
        cross=(weights * spot_change * option_change).sum(-1)[..., None],
        option_square=(weights * option_change**2).sum(-1)[..., None],
        option_mean=(weights * option_change).sum(-1)[..., None],
    )


def _mark(env: HedgingEnv, spot: np.ndarray, variance: Tensor, steps_left: int) -> np.ndarray:
    """The environment's mark of the option, currency; spot and variance broadcast."""
    strike, _, is_call = env.options[0]
    volatility = env.dynamics.expected_average_variance(variance, steps_left).sqrt()
    time_to_expiry = steps_left * env.dynamics.dt
    return black_scholes.price(torch.from_numpy(spot), strike, time_to_expiry, volatility, is_call).numpy()


def _q(next_value: np.ndarray, moments: Moments, n: float, h: np.ndarray, risk_aversion: float) -> np.ndarray:
    """Q = E[V'] + E[ΔW] − ½a E[ΔW²] of n options and h (H,) shares at every node, (J, M, H); E[ΔS] = 0."""
    square = moments.spot_square * h**2 + 2 * n * moments.cross * h + n**2 * moments.option_square  # E[ΔW²]
    return next_value + n * moments.option_mean - 0.5 * risk_aversion * square


def _trade(q: np.ndarray, share_cost: np.ndarray, holdings: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """V = max_{h'} Q(h') − cost·S·|h' − h| at every node (J, M, H), and the no-trade band's edges (J, M)."""
    lower, best_buy = _peak(q - share_cost, holdings)
    upper, best_sell = _peak(q + share_cost, holdings)
    upper = np.maximum(upper, lower)  # where trading is free they are equal but for rounding
    value = np.where(holdings > upper[..., None], best_sell[..., None] - share_cost, q)
    value = np.where(holdings < lower[..., None], best_buy[..., None] + share_cost, value)
    return value, lower, upper


def _peak(values: np.ndarray, grid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Argmax and maximum along the last axis of concave `values`, refined by the parabola through three nodes."""
    middle = np.clip(values.argmax(-1), 1, len(grid) - 2)
    low, mid, high = (np.take_along_axis(values, (middle + i)[..., None], -1)[..., 0] for i in (-1, 0, 1))
    slope = 0.5 * (high - low)
    curvature = low - 2 * mid + high
    shift = np.clip(-slope / np.minimum(curvature, -1e-300), -1.0, 1.0)
    peak = mid + slope * shift + 0.5 * curvature * shift**2
    return grid[middle] + shift * (grid[1] - grid[0]), peak


def _value_at_start(env: HedgingEnv, grids: Grids, value: np.ndarray) -> float:
    """Value (J, M, H) of the initial position → its value without shares, at the initial spot and variance."""
    x_nodes, x_weights = _interpolation(grids.log_spots, np.array(np.log(env.initial_spot / env.options[0].strike)))
    v_nodes, v_weights = _interpolation(grids.log_variances, np.array(np.log(env.dynamics.initial_variance)))
    without_shares = [np.interp(0.0, grids.holdings, row) for row in value.reshape(-1, len(grids.holdings))]
    without_shares = np.array(without_shares).reshape(value.shape[:2])[v_nodes[:, None], x_nodes[None]]
    return float((v_weights[:, None] * x_weights[None] * without_shares).sum())


def _interpolation(grid: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cubic Lagrange interpolation on a uniform grid, constant beyond it: nodes and weights, (4, *points.shape)."""
    if len(grid) == 1:
        return np.zeros((1, *points.shape), dtype=int), np.ones((1, *points.shape))
    u = np.clip((points - grid[0]) / (grid[1] - grid[0]), 0, len(grid) - 1)
    first = np.clip(np.floor(u).astype(int) - 1, 0, len(grid) - 4)
    nodes = first + np.arange(4).reshape(4, *[1] * points.ndim)
    weights = np.ones(nodes.shape)
    for i in range(4):
        for j in range(4):
            if i != j:
                weights[i] *= (u - nodes[j]) / (i - j)
    return nodes, weights


def _order_transition(law: OrderLaw, limit: int) -> np.ndarray:
    """(P, P) probabilities of going from one position to another in a step; moves beyond ±limit stop there."""
    one_side = law.size_probabilities()
    net = np.convolve(one_side, one_side[::-1])  # of clients' sells less their buys, from −m to m
    change = np.arange(-len(one_side) + 1, len(one_side))
    matrix = np.zeros((2 * limit + 1, 2 * limit + 1))
    for i in range(2 * limit + 1):
        np.add.at(matrix[i], np.clip(i + change, 0, 2 * limit), net)
    return matrix
