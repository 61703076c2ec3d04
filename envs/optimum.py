"""Exact references: what is the most that any policy could reach?

`optimal_hedge` solves phase 1 by dynamic programming over (time, spot, variance, holding) when the market is Markov in
(spot, variance) and driven by one normal a step: gbm and garch.
"""

import numpy as np
import scipy.sparse as sp
import torch

from envs import black_scholes
from envs.dynamics import GARCH, GBM, Dynamics
from envs.hedging import HedgingEnv

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


class OptimalHedge:
    """The optimal no-trade band of a `HedgingEnv`, as a policy: observation (n, 7) → action (n, 2).

    Attributes:
        value: expected objective of an episode under this policy, currency.
        log_spots: (M,) grid of ln(S/K); log_variances: (J,) grid of ln v (one node for gbm).
        lower, upper: (num_steps, J, M) edges of the band in shares held against one short call: buy up to `lower`,
            sell down to `upper`.
    """

    def __init__(self, env: HedgingEnv, value, log_spots, log_variances, lower, upper):
        self.env, self.value = env, value
        self.log_spots, self.log_variances, self.lower, self.upper = log_spots, log_variances, lower, upper
        steps_left = torch.arange(env.num_steps, 0, -1, dtype=torch.float64)[:, None, None]
        spot = env.strike * torch.from_numpy(log_spots).exp()
        variance = torch.from_numpy(log_variances).exp()[:, None]
        volatility = env.dynamics.expected_average_variance(variance, steps_left).sqrt()
        delta = black_scholes.delta(spot, env.strike, steps_left * env.dynamics.dt, volatility)
        lower, upper = torch.from_numpy(lower), torch.from_numpy(upper)
        action = torch.stack((0.5 * (lower + upper) - delta, 0.5 * (upper - lower)), -1)
        self.actions = action.to(env.device, env.dtype)  # (num_steps, J, M, 2), in the environment's action units

    def __call__(self, observation: Tensor) -> Tensor:
        """Bilinear interpolation of the band between the grid's nodes."""
        state = self.env.decode(observation)
        x_index, x_weight = self._locate(self.log_spots, torch.log(state.spot / self.env.strike))
        v_index, v_weight = self._locate(self.log_variances, torch.log(state.variance))
        t = state.step.clamp(max=self.env.num_steps - 1)
        action = 0.0
        for i in (0, 1):
            for j in (0, 1):
                v = (v_index + j).clamp(max=len(self.log_variances) - 1)
                weight = (x_weight if i else 1 - x_weight) * (v_weight if j else 1 - v_weight)
                action = action + weight[:, None] * self.actions[t, v, x_index + i]
        return action

    @staticmethod
    def _locate(grid: np.ndarray, points: Tensor) -> tuple[Tensor, Tensor]:
        if len(grid) == 1:
            return torch.zeros_like(points, dtype=torch.long), torch.zeros_like(points)
        u = ((points - grid[0]) / (grid[1] - grid[0])).clamp(0, len(grid) - 1)
        index = u.floor().long().clamp(max=len(grid) - 2)
        return index, u - index


def has_optimum(dynamics: Dynamics) -> bool:
    """Whether `optimal_hedge` can solve this model: Markov in (spot, variance), one normal a step."""
    return isinstance(dynamics, GBM | GARCH)


def optimal_hedge(env: HedgingEnv) -> OptimalHedge:
    """Solves the hedging problem of `env` exactly by dynamic programming (0.5 s for gbm, seconds for garch, on a CPU).

    With Q_t(x, v, h) the value of holding h shares over the next step,

        Q_t(x, v, h) = E[ΔW − ½a ΔW² + V_{t+1}(x', v', h)],   V_t(x, v, h) = max_{h'} Q_t(x, v, h') − cost·S·|h' − h|,

    and V_T = −cost·S·|h|. Q is concave in h, so the optimal policy is a no-trade band: buy up to argmax(Q − cost·S·h),
    sell down to argmax(Q + cost·S·h). Expectations by Gauss–Hermite, as one sparse matrix from grid to grid.

    Raises:
        ValueError: a model other than gbm and garch.
    """
    dynamics = env.dynamics
    if not has_optimum(dynamics):
        raise ValueError(f"no exact optimum for {type(dynamics).__name__.lower()} (only gbm and garch)")
    num_steps, strike, cost_rate, dt = env.num_steps, env.strike, env.cost_rate, dynamics.dt
    initial_variance, is_gbm = dynamics.initial_variance, isinstance(dynamics, GBM)
    num_spots, num_variances, num_holdings, num_nodes = (401, 1, 201, 31) if is_gbm else (201, 29, 121, 21)

    width = (6.0 if is_gbm else 9.0) * max((initial_variance * num_steps * dt) ** 0.5, 1e-3)
    x0 = np.log(env.initial_spot / strike)
    x = np.linspace(x0 - width, x0 + width, num_spots)
    if is_gbm:
        log_v = np.log([initial_variance])
    else:  # the variance can fall no lower than ω/(1 − β); above 60 times its mean it is not seen in a billion days
        log_v = np.linspace(
            np.log(0.9 * 252 * dynamics.omega / (1 - dynamics.beta)), np.log(60 * initial_variance), num_variances
        )
    holdings = np.linspace(-0.2, 1.2, num_holdings)
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

    spot = strike * np.exp(x)
    next_spot = strike * np.exp(next_x)
    spot_change = next_spot - spot[:, None]
    spot_change_sq = (weights * spot_change**2).sum(-1)

    def mark(spots: np.ndarray, variances: Tensor, steps_left: int) -> np.ndarray:
        volatility = dynamics.expected_average_variance(variances, steps_left).sqrt()
        return black_scholes.price(torch.from_numpy(spots), strike, steps_left * dt, volatility).numpy()

    trade_cost = cost_rate * spot[None, :, None]  # per share
    value = np.broadcast_to(-trade_cost * np.abs(holdings), (num_variances, num_spots, num_holdings))
    lower, upper = (np.empty((num_steps, num_variances, num_spots)) for _ in range(2))
    node_variance, next_variance = torch.from_numpy(np.exp(log_v))[:, None], next_v.view(num_variances, 1, num_nodes)
    for t in reversed(range(num_steps)):
        steps_left = num_steps - t
        mark_change = (
            mark(next_spot, next_variance, steps_left - 1) - mark(spot[None], node_variance, steps_left)[..., None]
        )
        drift = -(weights * mark_change).sum(-1)[
            ..., None
        ]  # E[ΔW]: shares earn nothing, a mark may be off its fair value
        cross = (weights * spot_change * mark_change).sum(-1)[..., None]
        mark_change_sq = (weights * mark_change**2).sum(-1)[..., None]
        # E[ΔW²] for h shares against one short call
        risk = spot_change_sq[..., None] * holdings**2 - 2 * cross * holdings + mark_change_sq
        q = (
            (transition @ value.reshape(size, num_holdings)).reshape(value.shape)
            + drift
            - 0.5 * env.risk_aversion * risk
        )
        lower[t], best_buy = _peak(q - trade_cost * holdings, holdings)
        upper[t], best_sell = _peak(q + trade_cost * holdings, holdings)
        upper[t] = np.maximum(upper[t], lower[t])  # equal but for rounding when trading is free
        buy = best_buy[..., None] + trade_cost * holdings
        sell = best_sell[..., None] - trade_cost * holdings
        value = np.where(holdings < lower[t][..., None], buy, np.where(holdings > upper[t][..., None], sell, q))
    # Value of starting with no shares, at x0 and the initial variance
    x_nodes, x_weights = _interpolation(x, np.array(x0))
    v_nodes, v_weights = _interpolation(log_v, np.array(np.log(initial_variance)))
    at_start = np.array([np.interp(0.0, holdings, row) for row in value.reshape(size, num_holdings)])
    at_start = at_start.reshape(num_variances, num_spots)[v_nodes[:, None], x_nodes[None]]
    objective = float((v_weights[:, None] * x_weights[None] * at_start).sum())
    return OptimalHedge(env, objective, x, log_v, lower, upper)
