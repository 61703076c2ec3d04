"""Exact references of quoting.

`best_response` is the best edge against given rivals, in closed form where nothing is risked; `nash_edge` and
`monopoly_edge` are the edges of makers who compete and of makers who agree. `optimal_quotes` adds the cost of
inventory, by dynamic programming in gbm.
"""

import numpy as np
import torch
from scipy.special import lambertw

from envs.market import black_scholes
from envs.market.dynamics import GBM
from envs.market.quoting import ASK, BID, AgainstRivals, QuotingEnv
from envs.market.units import VOL_POINT

Tensor = torch.Tensor


def best_response(rivals: Tensor, k: float, reference_edge: float, marginal_cost: Tensor | float = 0.0) -> Tensor:
    """Edge that earns most per taker, who picks by logit: argmax_d (d − c) P(picks us | d, rivals' edges).

    The first-order condition d = c + 1/(k(1 − P)) (Anderson, de Palma & Thisse 1992, chapter 7) has the solution
    d = c + (1 + W)/k with Lambert's W e^W = e^{−1 − k(c − d_ref)}/(1 + Σ e^{−k(dᵢ − d_ref)}).

    Args:
        rivals: (…, number of rivals) their edges on the same side, vol points.
        k, reference_edge: of the choice, see `QuotingEnv`.
        marginal_cost: c (…), vol points: the cost of a trade, to be taken from the edge it earns.

    Returns:
        The edge (…), vol points.
    """
    walking_away = rivals.new_full((*rivals.shape[:-1], 1), reference_edge)
    others = -k * (torch.cat((rivals, walking_away), -1) - reference_edge)
    log_z = -1.0 - k * (marginal_cost - reference_edge) - others.logsumexp(-1)
    tiny = torch.finfo(rivals.dtype).tiny
    w = torch.nn.functional.softplus(log_z).clamp(min=tiny)
    for _ in range(12):  # Newton's method on w + ln w = ln z converges quadratically, from either side
        w = (w * (1.0 + log_z - w.log()) / (1.0 + w)).clamp(min=tiny)
    return marginal_cost + (1.0 + w) / k


def nash_edge(num_makers: int, k: float, reference_edge: float) -> float:
    """Edge, vol points, that is the best response to itself where `num_makers` compete: d = 1/(k(1 − s(d))).

    s(d) is the share of takers that each of them then has. Without risk aversion and costs; see `best_response`.
    """
    edge = torch.tensor(reference_edge, dtype=torch.float64)
    for _ in range(200):  # the best response is a contraction
        edge = best_response(edge.expand(num_makers - 1), k, reference_edge)
    return float(edge)


def monopoly_edge(num_makers: int, k: float, reference_edge: float) -> float:
    """Edge, vol points, that `num_makers` would agree on: d = 1/(k(1 − M s(d))), solved by Lambert's W."""
    return float((1.0 + lambertw(num_makers * np.exp(k * reference_edge - 1.0)).real) / k)


class OptimalQuotes:
    """Quotes of the inventory dynamic programming as a policy: observation (n, size) → action.

    Each side is the best response to the rivals' last quotes with the marginal cost of inventory, which the dynamic
    programming gives by time and vega. Hedged at the Black–Scholes delta, with a constant band.

    Attributes:
        value: expected objective of an episode, currency, as the dynamic programming predicts it.
        vegas: (X,) grid of the book's vega, currency per vol point.
        marginal_costs: (num_steps, X, 2) of selling and of buying one more unit of vega, vol points.
    """

    def __init__(self, env: AgainstRivals, value: float, vegas: Tensor, marginal_costs: Tensor, band: float):
        self.market = env.env
        self.value = value
        self.band = band
        self.vegas = vegas.to(self.market.device, self.market.dtype)
        self.marginal_costs = marginal_costs.to(self.market.device, self.market.dtype)

    def __call__(self, observation: Tensor) -> Tensor:
        market = self.market
        state = market.decode(observation)
        u = (state.vega - self.vegas[0]) / (self.vegas[1] - self.vegas[0])
        u = u.clamp(0, len(self.vegas) - 1)
        index = u.floor().long().clamp(max=len(self.vegas) - 2)
        weight = (u - index)[:, None]
        t = state.step.clamp(max=market.num_steps - 1)
        cost = (1.0 - weight) * self.marginal_costs[t, index] + weight * self.marginal_costs[t, index + 1]
        edges = best_response(state.rivals.transpose(-1, -2), market.choice_sensitivity, market.reference_edge, cost)
        half_spread = 0.5 * (edges[:, ASK] + edges[:, BID])
        skew = 0.5 * (edges[:, ASK] - edges[:, BID])
        return market.to_action(half_spread=half_spread.clamp(min=0), skew=skew, target=0.0, band=self.band)


@torch.no_grad()
def optimal_quotes(
    env: AgainstRivals, risk_aversion: float | None = None, fill_cost: float = 0.0, band: float = 0.0
) -> OptimalQuotes:
    """Inventory dynamic programming of a maker under gbm (Guéant, Lehalle & Fernandez-Tapia 2013, with logit demand).

    With one expiry and constant volatility the risks of all options are proportional: a hedged book of vega x (currency
    per vol point) has the gamma 100x/(S²στ), and E[ΔW²] = ½(100xσ dt/τ)² in a step. So the state is (t, x), and

        V_t(x) = U_t(x) + Σ_sides max_d λ P(d) Σ_j [ν_j (d − c₀) + U_t(x ∓ ν_j) − U_t(x)],
        U_t(x) = −½ a ½(100xσ dt/τ)² + V_{t+1}(x ν_{t+1}/ν_t),

    with ν_j the vegas at the initial spot. The maximum is `best_response`. Each step is cut into substeps, so that
    fewer than one fill is expected in each. Without risk aversion and costs the quotes are the best response, exactly.
    Otherwise they are an approximation, whose two parameters can be tuned: the model leaves out that the spot's moves
    change a book's vega, the cost of hedging, the persistence of order flow, and the rivals' inventories.

    Args:
        risk_aversion: a, by default the market's.
        fill_cost: c₀, a further cost of each fill, vol points.
        band: half-width of the no-trade band, shares.

    Raises:
        ValueError: another model than gbm.
    """
    market = env.env
    if not isinstance(market.dynamics, GBM):
        raise ValueError(f"no inventory dynamic programming under {type(market.dynamics).__name__.lower()} (only gbm)")
    if risk_aversion is None:
        risk_aversion = market.risk_aversion
    vegas = _option_vegas(market)  # ν (num_steps + 1, J)
    rivals = _rival_edges(env)  # (num_steps, 2, number of rivals)
    x = torch.linspace(-60, 60, 1201, dtype=torch.float64) * vegas[0].mean()
    num_substeps = int(np.ceil(4.0 * market.arrival_rate * market.num_options))

    value = torch.zeros_like(x)
    marginal_costs = []
    for t in reversed(range(market.num_steps)):
        held = _interpolate(x * vegas[t + 1].mean() / vegas[t].mean(), x, value)
        value = held - 0.5 * risk_aversion * _risk(market, x, t)
        for _ in range(num_substeps):
            value, costs = _trade(market, x, value, vegas[t], rivals[t], market.arrival_rate / num_substeps, fill_cost)
        marginal_costs.append(costs)
    at_start = float(_interpolate(torch.zeros(1), x, value))
    return OptimalQuotes(env, at_start, x, torch.stack(marginal_costs[::-1]), band)


def _times_to_expiry(market: QuotingEnv) -> Tensor:
    """τ (num_steps + 1,) of the options, years."""
    return market.steps_left.cpu().double() * market.dynamics.dt


def _option_vegas(market: QuotingEnv) -> Tensor:
    """Vegas (num_steps + 1, J) of the options at the initial spot, currency per vol point."""
    spot = torch.tensor(market.initial_spot, dtype=torch.float64)
    strike = market.strike.cpu().double()
    greeks = black_scholes.greeks(spot, strike, _times_to_expiry(market)[:, None], market.dynamics.volatility)
    return VOL_POINT * greeks.vega


def _rival_edges(env: AgainstRivals) -> Tensor:
    """Edges (num_steps, 2, number of rivals) that the rivals quote at the initial spot, holding nothing; vol points."""
    still = env.standing_still(1)
    edges = []
    for t in range(env.num_steps):
        still.observe_at(t)
        edges.append(still.env.edges[0, env.other_seats].T)
    return torch.stack(edges).cpu().double()


def _risk(market: QuotingEnv, x: Tensor, t: int) -> Tensor:
    """E[ΔW²] = ½(100xσ dt/τ)² of a hedged book of vega x (X,) in step t, currency²."""
    time_to_expiry = _times_to_expiry(market)[t]
    return 0.5 * (x * market.dynamics.volatility * market.dynamics.dt / (VOL_POINT * time_to_expiry)) ** 2


def _trade(
    market: QuotingEnv, x: Tensor, value: Tensor, vegas: Tensor, rivals: Tensor, takers: float, fill_cost: float
) -> tuple[Tensor, Tensor]:
    """Takers of one substep: U → U + Σ_sides max_d λ P(d) Σ_j [ν_j (d − c₀) + U(x ∓ ν_j) − U(x)].

    The sum over j is (d − c) Σ_j ν_j with the marginal cost c = c₀ − Σ_j [U(x ∓ ν_j) − U(x)]/Σ_j ν_j.

    Args:
        x, value: (X,) grid of vegas and U on it.
        vegas: ν (J,).
        rivals: (2, number of rivals) their edges.
        takers: λ, mean number of them on each option and side.

    Returns:
        The new value (X,), and c of selling and of buying (X, 2).
    """
    k = market.choice_sensitivity
    total_vega = vegas.sum()
    after = value
    costs = []
    for side, sign in ((ASK, -1.0), (BID, 1.0)):
        change = sum(_interpolate(x + sign * vega, x, value) - value for vega in vegas)
        cost = fill_cost - change / total_vega
        edge = best_response(rivals[side].expand(len(x), -1), k, market.reference_edge, cost)
        picked = 1.0 - 1.0 / (k * (edge - cost))  # the first-order condition, solved for P
        after = after + takers * picked * (edge - cost) * total_vega
        costs.append(cost)
    return after, torch.stack(costs, -1)


def _interpolate(points: Tensor, x: Tensor, values: Tensor) -> Tensor:
    """Values on the grid x (X,) → at points, linear between the nodes, constant beyond."""
    return torch.from_numpy(np.interp(points.numpy(), x.numpy(), values.numpy()))
