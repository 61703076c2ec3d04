"""Exact references: what is the most that any policy could reach?

`optimal_hedge` solves the hedging of one kind of option by dynamic programming: phase 1 over (time, spot, variance,
holding) when the market is Markov in (spot, variance) and driven by one normal a step (gbm and garch), phase 2 with one
strike and expiry over (time, spot, position, holding) in gbm.
"""

import numpy as np
import scipy.sparse as sp
import torch

from envs import black_scholes
from envs.dynamics import GARCH, GBM
from envs.hedging import HedgingEnv, OrderLaw

Tensor = torch.Tensor


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


def _peak(values: np.ndarray, grid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Argmax and maximum along the last axis of concave `values`, refined by the parabola through three nodes."""
    best = values.argmax(-1)
    inner = np.clip(best, 1, len(grid) - 2)
    low, mid, high = (np.take_along_axis(values, (inner + i)[..., None], -1)[..., 0] for i in (-1, 0, 1))
    slope, curvature = 0.5 * (high - low), low - 2 * mid + high
    shift = np.clip(-slope / np.minimum(curvature, -1e-300), -1.0, 1.0)
    peak = mid + slope * shift + 0.5 * curvature * shift**2
    return grid[inner] + shift * (grid[1] - grid[0]), peak


MAX_POSITION = 60  # options, of the dynamic programming with client orders


class OptimalHedge:
    """The optimal no-trade band of a `HedgingEnv` with one option, as a policy: observation → action (n, 2).

    Attributes:
        value: expected objective of an episode under this policy, currency.
        log_spots: (M,) grid of ln(S/K); log_variances: (J,) grid of ln v (one node for gbm).
        positions: (P,) options held (one node without client orders).
        lower, upper: (num_steps, P, J, M) edges of the band in shares held: buy up to `lower`, sell down to `upper`.
    """

    def __init__(self, env: HedgingEnv, value, log_spots, log_variances, positions, lower, upper):
        self.env, self.value = env, value
        self.log_spots, self.log_variances, self.positions = log_spots, log_variances, positions
        self.lower, self.upper = lower, upper
        steps_left = torch.arange(env.num_steps, 0, -1, dtype=torch.float64)[:, None, None, None]
        spot = env.options[0].strike * torch.from_numpy(log_spots).exp()
        variance = torch.from_numpy(log_variances).exp()[:, None]
        volatility = env.dynamics.expected_average_variance(variance, steps_left).sqrt()
        arguments = (spot, env.options[0].strike, steps_left * env.dynamics.dt, volatility, env.options[0].is_call)
        delta = torch.from_numpy(positions)[:, None, None] * black_scholes.delta(*arguments)
        lower, upper = torch.from_numpy(lower), torch.from_numpy(upper)
        action = torch.stack((0.5 * (lower + upper) + delta, 0.5 * (upper - lower)), -1)
        self.actions = action.to(env.device, env.dtype)  # (num_steps, P, J, M, 2), in the environment's action units

    def __call__(self, observation: Tensor) -> Tensor:
        """Bilinear interpolation of the band between the grid's spots and variances."""
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
        if len(grid) == 1:
            return torch.zeros_like(points, dtype=torch.long), torch.zeros_like(points)
        u = ((points - grid[0]) / (grid[1] - grid[0])).clamp(0, len(grid) - 1)
        index = u.floor().long().clamp(max=len(grid) - 2)
        return index, u - index


def has_optimum(env: HedgingEnv) -> bool:
    """Whether `optimal_hedge` can solve this: one option; without client orders gbm and garch, with them gbm.

    And no more positions than a grid can hold at the resolution that a band needs.
    """
    solvable = GBM if env.order_law.rate > 0 else GBM | GARCH
    return env.num_options == 1 and isinstance(env.dynamics, solvable) and _position_limit(env) <= MAX_POSITION


def _position_limit(env: HedgingEnv) -> int:
    """Five standard deviations of what the orders of an episode add up to, options."""
    return int(np.ceil(5.0 * (2.0 * env.order_law.variance * env.num_steps) ** 0.5))


def optimal_hedge(env: HedgingEnv, position_limit: int | None = None) -> OptimalHedge:
    """Solves the hedging problem of `env` exactly by dynamic programming (on a CPU 0.2 s for gbm, 2 s for garch, 20 s
    with client orders).

    With Q_t(x, v, n, h) the value of holding h shares and n options over the next step and V_t that of the moment
    before its trade, k the net size of client orders,

        Q_t(x, v, n, h) = E[ΔW − ½a ΔW² + V_{t+1}(x', v', n − k, h)],
        V_t(x, v, n, h) = max_{h'} Q_t(x, v, n, h') − cost·S·|h' − h|,

    and V_T = −cost·S·|h|. Q is concave in h, so the optimal policy is a no-trade band: buy up to argmax(Q − cost·S·h),
    sell down to argmax(Q + cost·S·h). Expectations over the market by Gauss–Hermite, as one matrix from grid to grid.

    Args:
        position_limit: |n − initial position| beyond which orders are cut; by default five standard deviations of
            what the orders of an episode add up to, which is as good as none.

    Raises:
        ValueError: what `has_optimum` denies.
    """
    dynamics, law = env.dynamics, env.order_law
    if not has_optimum(env):
        model = type(dynamics).__name__.lower()
        raise ValueError(
            f"no exact optimum for {env.num_options} options under {model} with {law.rate:g} orders a step "
            f"(only for one option, under gbm with no more than {MAX_POSITION} of it likely, or garch without orders)"
        )
    num_steps, cost_rate, dt = env.num_steps, env.cost_rate, dynamics.dt
    (strike, _, is_call), option_delta = env.options[0], (0.0, 1.0) if env.options[0].is_call else (-1.0, 0.0)
    initial_variance, is_gbm = dynamics.initial_variance, isinstance(dynamics, GBM)
    num_spots, num_variances, num_holdings, num_nodes = (401, 1, 201, 31) if is_gbm else (201, 29, 121, 21)
    limit = 0
    if law.rate > 0:
        limit = _position_limit(env) if position_limit is None else position_limit
        num_spots, num_holdings, num_nodes = 201, 1001, 64
    positions = env.initial_position + np.arange(-limit, limit + 1.0)
    num_positions = len(positions)

    width = (6.0 if is_gbm else 9.0) * max((initial_variance * num_steps * dt) ** 0.5, 1e-3)
    x0 = np.log(env.initial_spot / strike)
    x = np.linspace(x0 - width, x0 + width, num_spots)
    if is_gbm:
        log_v = np.log([initial_variance])
    else:  # the variance can fall no lower than ω/(1 − β); above 60 times its mean it is not seen in a billion days
        log_v = np.linspace(
            np.log(0.9 * 252 * dynamics.omega / (1 - dynamics.beta)), np.log(60 * initial_variance), num_variances
        )
    hedges = -np.outer(positions, option_delta)  # the range of the Black–Scholes hedge, and some room
    room = 0.2 * max(1.0, np.abs(positions).max() ** 0.5)
    holdings = np.linspace(hedges.min() - room, hedges.max() + room, num_holdings)
    nodes, weights = np.polynomial.hermite_e.hermegauss(num_nodes)
    weights = weights / weights.sum()

    # One step from every variance node with every quadrature node: log-return and next variance, (J, Q).
    v = torch.from_numpy(np.exp(log_v)).repeat_interleave(num_nodes)
    log_return, next_v = dynamics.step(v, torch.from_numpy(nodes).repeat(num_variances)[:, None])
    log_return, next_log_v = log_return.view(-1, num_nodes).numpy(), next_v.log().view(-1, num_nodes).numpy()
    next_x = x[None, :, None] + log_return[:, None, :]  # (J, M, Q)

    # Transition matrix on the grid: (P f)[j, i] = E[f(x', v') | x_i, v_j].
    x_nodes, x_weights = _interpolation(x, next_x)
    v_nodes, v_weights = _interpolation(log_v, next_log_v)
    columns = v_nodes[:, None, :, None, :] * num_spots + x_nodes[None]  # (4 or 1, 4, J, M, Q)
    entries = weights * v_weights[:, None, :, None, :] * x_weights[None]
    rows = np.broadcast_to(np.arange(num_variances * num_spots).reshape(num_variances, num_spots, 1), columns.shape)
    size = num_variances * num_spots
    transition = sp.csr_matrix((entries.ravel(), (rows.ravel(), columns.ravel())), shape=(size, size))
    if is_gbm:
        transition = transition.toarray()  # small and not that sparse
    order_transition = _order_transition(law, limit)

    spot = strike * np.exp(x)
    next_spot = strike * np.exp(next_x)
    spot_change = next_spot - spot[:, None]
    spot_change_sq = (weights * spot_change**2).sum(-1)

    def mark(spots: np.ndarray, variances: Tensor, steps_left: int) -> np.ndarray:
        volatility = dynamics.expected_average_variance(variances, steps_left).sqrt()
        return black_scholes.price(torch.from_numpy(spots), strike, steps_left * dt, volatility, is_call).numpy()

    def per_state(values: np.ndarray) -> np.ndarray:
        """(J, M) → (J, M, H) by broadcasting."""
        return values[..., None]

    trade_cost = cost_rate * spot[:, None]  # per share, (M, 1)
    shape = (num_positions, num_variances, num_spots, num_holdings)
    value = np.broadcast_to(-trade_cost * np.abs(holdings), shape).copy()
    lower, upper = (np.empty((num_steps, *shape[:-1])) for _ in range(2))
    node_variance, next_variance = torch.from_numpy(np.exp(log_v))[:, None], next_v.view(num_variances, 1, num_nodes)
    for t in reversed(range(num_steps)):
        steps_left = num_steps - t
        mark_change = (
            mark(next_spot, next_variance, steps_left - 1) - mark(spot[None], node_variance, steps_left)[..., None]
        )
        drift = per_state((weights * mark_change).sum(-1))  # shares earn nothing, a mark may be off its fair value
        cross = per_state((weights * spot_change * mark_change).sum(-1))
        mark_change_sq = per_state((weights * mark_change**2).sum(-1))
        for i, n in enumerate(positions):  # one at a time, in the cache
            # E[ΔW²] of n options and h shares
            risk = per_state(spot_change_sq) * holdings**2 + 2 * n * cross * holdings + n**2 * mark_change_sq
            expected = (transition @ value[i].reshape(size, num_holdings)).reshape(shape[1:])
            q = expected + n * drift - 0.5 * env.risk_aversion * risk
            lower[t, i], best_buy = _peak(q - trade_cost * holdings, holdings)
            upper[t, i], best_sell = _peak(q + trade_cost * holdings, holdings)
            upper[t, i] = np.maximum(upper[t, i], lower[t, i])  # equal but for rounding when trading is free
            buy = best_buy[..., None] + trade_cost * holdings
            sell = best_sell[..., None] - trade_cost * holdings
            inside = np.where(holdings > upper[t, i][..., None], sell, q)
            value[i] = np.where(holdings < lower[t, i][..., None], buy, inside)
        if limit > 0:
            value = (order_transition @ value.reshape(num_positions, -1)).reshape(shape)
    # Value of starting with no shares, at x0 and the initial variance, before the first orders
    x_nodes, x_weights = _interpolation(x, np.array(x0))
    v_nodes, v_weights = _interpolation(log_v, np.array(np.log(initial_variance)))
    at_start = np.array([np.interp(0.0, holdings, row) for row in value[limit].reshape(size, num_holdings)])
    at_start = at_start.reshape(num_variances, num_spots)[v_nodes[:, None], x_nodes[None]]
    income = 2.0 * law.rate * law.mean_size * num_steps * env.client_spread
    objective = income + float((v_weights[:, None] * x_weights[None] * at_start).sum())
    return OptimalHedge(env, objective, x, log_v, positions, lower, upper)


def _order_transition(law: OrderLaw, limit: int) -> np.ndarray:
    """(P, P) probabilities of going from one position to another in a step; what would go beyond ±limit stops there."""
    one_side = law.size_probabilities()
    net = np.convolve(one_side, one_side[::-1])  # sells less buys, from −m to m
    change = np.arange(-len(one_side) + 1, len(one_side))
    matrix = np.zeros((2 * limit + 1, 2 * limit + 1))
    for i in range(2 * limit + 1):
        np.add.at(matrix[i], np.clip(i + change, 0, 2 * limit), net)
    return matrix
