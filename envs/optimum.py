"""Exact references: what is the most that any policy could reach?

`optimal_hedge` solves the hedging of one kind of option by dynamic programming: phase 1 over (time, spot, variance,
holding) when the market is Markov in (spot, variance) and driven by one normal a step (gbm and garch), phase 2 with one
strike and expiry over (time, spot, position, holding) in gbm. Quoting: `best_response` is the best edge against given
rivals where nothing is risked, in closed form, and `optimal_quotes` adds what inventory costs, by dynamic programming
in gbm.
"""

import numpy as np
import scipy.sparse as sp
import torch
from scipy.special import lambertw

from envs import black_scholes
from envs.dynamics import GARCH, GBM
from envs.hedging import HedgingEnv, OrderLaw
from envs.quoting import ASK, BID, VOL_POINT, AgainstRivals

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


def best_response(rivals: Tensor, k: float, reference_edge: float, marginal_cost: Tensor | float = 0.0) -> Tensor:
    """Edge that earns most per taker, who picks by logit: argmax_d (d − c) P(picks us | d, rivals' edges).

    The first-order condition d = c + 1/(k(1 − P)) (Anderson, de Palma & Thisse 1992, chapter 7) has the solution
    d = c + (1 + W)/k with Lambert's W e^W = e^{−1 − k(c − d_ref)}/(1 + Σ e^{−k(dᵢ − d_ref)}).

    Args:
        rivals: (…, number of rivals) their edges on the same side, vol points.
        k, reference_edge: of the choice, see `QuotingEnv`.
        marginal_cost: c (…), vol points: what a trade costs us beside the edge it earns.

    Returns:
        The edge (…), vol points.
    """
    walking_away = rivals.new_full((*rivals.shape[:-1], 1), reference_edge)
    others = -k * (torch.cat((rivals, walking_away), -1) - reference_edge)
    log_z = -1.0 - k * (marginal_cost - reference_edge) - others.logsumexp(-1)
    tiny = torch.finfo(rivals.dtype).tiny
    w = torch.nn.functional.softplus(log_z).clamp(min=tiny)
    for _ in range(12):  # Newton's method on w + ln w = ln z: quadratic, from either side
        w = (w * (1.0 + log_z - w.log()) / (1.0 + w)).clamp(min=tiny)
    return marginal_cost + (1.0 + w) / k


def nash_edge(num_makers: int, k: float, reference_edge: float) -> float:
    """Edge, vol points, that is the best response to itself where `num_makers` compete: d = 1/(k(1 − s(d))).

    s(d) is the share of takers that each of them then has. Without risk aversion and costs; see `best_response`.
    """
    edge = torch.tensor(reference_edge, dtype=torch.float64)
    for _ in range(200):  # a contraction: each step answers less than it is given
        edge = best_response(edge.expand(num_makers - 1), k, reference_edge)
    return float(edge)


def monopoly_edge(num_makers: int, k: float, reference_edge: float) -> float:
    """Edge, vol points, that `num_makers` would agree on: d = 1/(k(1 − M s(d))), solved by Lambert's W."""
    return float((1.0 + lambertw(num_makers * np.exp(k * reference_edge - 1.0)).real) / k)


class OptimalQuotes:
    """Quotes of the inventory dynamic programming as a policy: observation (n, size) → action (n, 4).

    Each side is the best response to the rivals' last quotes with the marginal cost of inventory, which the dynamic
    programming gives by time and vega. Hedged at the Black–Scholes delta, with a constant band.

    Attributes:
        value: expected objective of an episode, currency, as the dynamic programming predicts it.
        vegas: (X,) grid of the book's vega, currency per vol point.
        marginal_costs: (num_steps, X, 2) of selling and of buying one more unit of vega, vol points.
    """

    def __init__(self, env: AgainstRivals, value: float, vegas: Tensor, marginal_costs: Tensor, band: float):
        self.market, self.value, self.band = env.env, value, band
        self.vegas = vegas.to(self.market.device, self.market.dtype)
        self.marginal_costs = marginal_costs.to(self.market.device, self.market.dtype)

    def __call__(self, observation: Tensor) -> Tensor:
        state, market = self.market.decode(observation), self.market
        u = (state.vega - self.vegas[0]) / (self.vegas[1] - self.vegas[0])
        u = u.clamp(0, len(self.vegas) - 1)
        index = u.floor().long().clamp(max=len(self.vegas) - 2)
        t, weight = state.step.clamp(max=market.num_steps - 1), (u - index)[:, None]
        cost = (1.0 - weight) * self.marginal_costs[t, index] + weight * self.marginal_costs[t, index + 1]
        edges = best_response(state.rivals.transpose(-1, -2), market.choice_sensitivity, market.reference_edge, cost)
        half_spread, skew = 0.5 * (edges[:, ASK] + edges[:, BID]), 0.5 * (edges[:, ASK] - edges[:, BID])
        zero = torch.zeros_like(skew)
        return torch.stack((half_spread.clamp(min=0), skew, zero, zero + self.band), -1)


@torch.no_grad()
def optimal_quotes(
    env: AgainstRivals, risk_aversion: float | None = None, fill_cost: float = 0.0, band: float = 0.0
) -> OptimalQuotes:
    """Inventory dynamic programming of a maker under gbm (Guéant, Lehalle & Fernandez-Tapia 2013, with logit demand).

    With one expiry and constant volatility the risks of all options are proportional: a hedged book of vega x (currency
    per vol point) has the gamma 100x/(S²στ), and E[ΔW²] = ½(100xσ dt/τ)² in a step. So the state is (t, x), and

        V_t(x) = U_t(x) + Σ_sides max_d λ P(d) Σ_j [ν_j (d − c₀) + U_t(x ∓ ν_j) − U_t(x)],
        U_t(x) = −½ a ½(100xσ dt/τ)² + V_{t+1}(x ν_{t+1}/ν_t),

    with ν_j the vegas at the initial spot. The maximum is `best_response`; each step is cut into several, so that fewer
    than one fill is expected in each. Without risk aversion and costs this is the best response, exact. Otherwise what
    the model leaves out (the spot's moves turn a book without vega into one with it, hedging costs, order flow
    persists, rivals have inventories) makes it an approximation, whose two parameters can be tuned for it.

    Args:
        risk_aversion: a, by default the market's.
        fill_cost: c₀, what a fill costs beside, vol points.
        band: half-width of the no-trade band, shares.

    Raises:
        ValueError: another model than gbm.
    """
    market = env.env
    if not isinstance(market.dynamics, GBM):
        raise ValueError(f"no inventory dynamic programming under {type(market.dynamics).__name__.lower()} (only gbm)")
    sigma, dt, k = market.dynamics.volatility, market.dynamics.dt, market.choice_sensitivity
    spot, time_to_expiry = torch.tensor(market.initial_spot, dtype=torch.float64), market.steps_left.cpu().double() * dt
    strike = market.strike.cpu().double()
    greeks = black_scholes.greeks(spot, strike, time_to_expiry[:, None], sigma)
    vega = VOL_POINT * greeks.vega  # (num_steps + 1, J)
    risk_aversion = market.risk_aversion if risk_aversion is None else risk_aversion
    still = env.standing_still(1)  # the rivals quote as if they held nothing
    quoted = []
    for t in range(market.num_steps):
        still.observe_at(t)
        quoted.append(still.env.edges[0, env.other_seats].T)
    quoted = torch.stack(quoted).cpu().double()  # (num_steps, 2, rivals)

    x = torch.linspace(-60, 60, 1201, dtype=torch.float64) * vega[0].mean()
    value, costs = torch.zeros_like(x), []
    substeps = int(np.ceil(4.0 * market.arrival_rate * market.num_options))  # fewer than one fill in each

    def at(values: Tensor, points: Tensor) -> Tensor:
        return torch.from_numpy(np.interp(points.numpy(), x.numpy(), values.numpy()))

    for t in reversed(range(market.num_steps)):
        risk = 0.5 * (x * sigma * dt / (VOL_POINT * time_to_expiry[t])) ** 2
        held = at(value, x * vega[t + 1].mean() / vega[t].mean()) - 0.5 * risk_aversion * risk
        value, cost = held, [None, None]
        for _ in range(substeps):
            held = value
            for side, sign in ((ASK, -1.0), (BID, 1.0)):
                change = sum(at(held, x + sign * nu) - held for nu in vega[t])
                cost[side] = fill_cost - change / vega[t].sum()
                rivals = quoted[t, side].expand(len(x), -1)
                edge = best_response(rivals, k, market.reference_edge, cost[side])
                picked = 1.0 - 1.0 / (k * (edge - cost[side]))  # the first-order condition, solved for P
                value = value + market.arrival_rate / substeps * picked * (edge - cost[side]) * vega[t].sum()
        costs.append(torch.stack(cost, -1))
    return OptimalQuotes(env, float(at(value, torch.zeros(1))), x, torch.stack(costs[::-1]), band)
