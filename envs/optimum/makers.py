"""Makers that know the model: best quotes at a marginal cost of inventory. Policies: observation (n, size) → action.

`BestResponse` values no inventory, and is exact where nothing is risked and hedging is free. `MultiAsset` takes the
cost from the closed form of Bergault, Evangelista, Guéant & Vieira (2021), `VegaProgramming` from the dynamic
programming of Baldacci, Bergault & Guéant (2021). They know the fair values, and how the options move
(`envs.market.moves`); they see what every maker sees.
"""

import math
from collections.abc import Sequence
from functools import cache

import torch

from envs.market.moves import StepMoves, variance_transition
from envs.market.quoting import QuotingState
from envs.market.rivals import AgainstRivals, Maker
from envs.optimum import vega
from envs.optimum.edges import BestEdges, best_edge, choice_probability
from envs.optimum.multi_asset import prices_of_risk, quadratic_value

Tensor = torch.Tensor
COSTS = (-12.0, 12.0, 97)  # grid of marginal costs, vol points: first, last, number
HORIZON_VEGA = 40  # the dynamic programming's books reach to this many options of average vega
VEGAS, VOLATILITIES = 241, 33  # nodes of its grid
SUBSTEPS = 4  # of a step, so that about one fill is expected in each


best_edges = cache(BestEdges)  # makers of one market share the table


class BestResponse(Maker):
    """Quotes the best edges against the rivals' last ones, option by option and side by side.

    Args:
        env: the market from the maker's seat.
        moves: of the options; None: hedged at the Black–Scholes delta.
        spread: multiple of the best half-spread that is quoted.
        share: of the way from the reference price to the fair value that the maker believes in.
        band: half-width of the no-trade band, shares.
    """

    def __init__(
        self,
        env: AgainstRivals,
        moves: StepMoves | None = None,
        spread: float = 1.0,
        share: float = 1.0,
        band: float = 0.0,
    ):
        self.env = env.env
        self.moves = moves
        self.spread = spread
        self.share = share
        self.band = band
        self.best_edges = best_edges(self.env.informed_share, self.env.device, self.env.dtype)

    def public_terms(self, state: QuotingState) -> tuple[Tensor, ...]:
        """What the marginal costs need of the public state, tensors (n, …)."""
        return ()

    def costs(self, public: Sequence[Tensor], vegas: Tensor, observation: Tensor) -> Tensor | float:
        """Marginal costs of a fill (n, 2, num_options), vol points, from `public_terms` and the options' vegas."""
        return 0.0

    def terms(self, state: QuotingState) -> tuple[Tensor, ...]:
        vegas = self.env.vegas_at(state)
        exposure = torch.zeros_like(vegas) if self.moves is None else self.moves.exposure_at(state)
        return vegas, self.share * self.env.gap_at(state), exposure, *self.public_terms(state)

    def respond(self, terms: Sequence[Tensor], observation: Tensor) -> Tensor:
        market = self.env
        vegas, gap, exposure, *public = terms
        rivals = observation[:, market.columns["rival edges"]].unflatten(-1, (-1, 2, market.num_options))
        edges = self.best_edges(
            rivals.movedim(1, -1), market.choice_sensitivity, market.reference_edge,
            gap=torch.stack((gap, -gap), -2), marginal_cost=self.costs(public, vegas, observation),
        )  # fmt: skip
        ask, bid = edges.unbind(-2)
        half_spread = self.spread * (0.5 * (ask + bid)).clamp(min=0)
        target = -(observation[:, market.columns["positions"]] * exposure).sum(-1)
        return market.quote(half_spread, tilt=0.5 * (ask - bid), target=target, band=self.band)


class MultiAsset(BestResponse):
    """The multi-asset closed form: inventories are priced by a quadratic value function, at every state of a grid.

    Its Hamiltonians are expanded around the best response to what the rivals quote without inventory.

    Args:
        env, moves, spread, share, band: as `BestResponse`.
        risk_aversion: γ, 1/currency.
    """

    @torch.no_grad()
    def __init__(
        self, env: AgainstRivals, moves: StepMoves, risk_aversion: float, spread: float, share: float, band: float
    ):
        super().__init__(env, moves, spread, share, band)
        market = self.env
        vegas, gaps = moves.vegas, share * moves.gaps  # (T, X, V, O)
        rivals = rival_edges(env)[:, None, None]  # (T, 1, 1, 2, O, R)
        gaps = torch.stack((gaps, -gaps), -2)  # (T, X, V, 2, O)
        spacing = 0.25
        profits = [best_profit(env, rivals, gaps, torch.full_like(gaps, c)) for c in (-spacing, 0.0, spacing)]
        slope = (profits[2] - profits[0]) / (2.0 * spacing)
        curvature = (profits[2] - 2.0 * profits[1] + profits[0]) / spacing**2
        rate = market.arrival_rate
        curvature = rate * curvature.mean(-2).clamp(min=1e-4) / vegas
        steps_left = market.num_steps - torch.arange(market.num_steps, dtype=vegas.dtype, device=vegas.device)
        a, b = quadratic_value(
            moves.covariance, curvature, rate * slope[..., 0, :], rate * slope[..., 1, :], risk_aversion,
            steps_left[:, None, None],
        )  # fmt: skip
        self.a = a.to(market.dtype)
        self.b = b.to(market.dtype)

    def public_terms(self, state):
        where = state.step, state.spot / self.env.initial_spot, state.variance
        return tuple(self.moves.grid.interpolate(table, *where) for table in (self.a, self.b))

    def costs(self, public, vegas, observation):
        position = observation[:, self.env.columns["positions"]]
        return (prices_of_risk(*public, position) / vegas[..., None]).transpose(-1, -2)


class VegaProgramming(BestResponse):
    """Dynamic programming in (time, variance, vega of the book), the spot at its start.

        V_t(v, x) = U_t + Σ_options Σ_sides λ max_d ν P(d) (d − gap − c),   c = (U_t(v, x) − U_t(v, x ∓ ν))/ν,
        U_t(v, x) = −½ a ρ_t(v) x² + E[V_{t+1}(v', x ν_{t+1}/ν_t) | v],

    with ν the options' vegas, and ρ the variance of a step's move of a hedged book, per unit of vega, if it holds all
    options alike. It leaves out that options differ in more than their vega, that the spot's moves change a book's
    vega, the cost of hedging, the persistence of order flow, and the rivals' inventories.

    Args:
        env, moves, spread, share, band: as `BestResponse`.
        risk_aversion: a, 1/currency.

    Attributes:
        value: expected objective of an episode, currency, as the dynamic programming predicts it.
    """

    @torch.no_grad()
    def __init__(
        self, env: AgainstRivals, moves: StepMoves, risk_aversion: float, spread: float, share: float, band: float
    ):
        super().__init__(env, moves, spread, share, band)
        market = self.env
        at_start = len(moves.grid.spot) // 2
        roots = moves.grid.root
        if len(roots) > 1:
            roots = torch.linspace(float(roots[0]), float(roots[-1]), VOLATILITIES).to(roots)

        def along(table: Tensor) -> Tensor:
            """A table of the state grid (T, X, V, …) at the initial spot and the variances here, (T, V, …)."""
            return moves.grid.in_variance(table[:, at_start], roots)

        vegas = along(moves.vegas)  # (T, V, O)
        gaps = share * along(moves.gaps)
        risk = along(moves.covariance).sum((-1, -2)) / vegas.sum(-1).square()  # (T, V)
        transition = variance_transition(market, roots)
        rivals = rival_edges(env)
        x = HORIZON_VEGA * float(vegas[0].mean()) * torch.linspace(-1, 1, VEGAS).to(vegas)
        value = x.new_zeros(len(roots), len(x))
        history = []
        for t in reversed(range(market.num_steps)):
            rescale = 1.0 if t + 1 == market.num_steps else float(vegas[t + 1].mean() / vegas[t].mean())
            value = vega.move(value, x, transition, 0.5 * risk_aversion * risk[t][:, None] * x**2, rescale)
            history.append(value)
            profit = self._profit(env, rivals[t], gaps[t], vegas[t])
            for _ in range(SUBSTEPS):
                value, _ = vega.trade(value, x, vegas[t], profit, limit=math.inf)  # linear beyond the grid
        self.x = x.to(market.dtype)
        self.roots = roots.to(market.dtype)
        self.held = torch.stack(history[::-1]).to(market.dtype)  # U (T, V, X)
        start = self.x.new_full((1,), market.dynamics.initial_variance).sqrt()
        nothing = self.x.new_zeros(1)
        self.value = float(self._at(value[None].to(market.dtype), nothing, start, nothing[:, None])[0, 0])

    def _profit(self, env: AgainstRivals, rivals: Tensor, gaps: Tensor, vegas: Tensor) -> vega.Profit:
        """Marginal costs (V, X, O, 2) → the substep's expected profit of the best quotes, read from a table."""
        market = self.env
        costs = torch.linspace(*COSTS[:2], COSTS[2]).to(gaps)
        sides = torch.stack((gaps, -gaps), -1)[..., None]  # (V, O, 2, 1)
        rivals = rivals.transpose(0, 1)[:, :, None]  # (O, 2, 1, R)
        table = best_profit(env, rivals, *torch.broadcast_tensors(sides, costs))  # (V, O, 2, C)
        scale = market.arrival_rate / SUBSTEPS * vegas[:, None, :, None]

        def profit(cost: Tensor) -> Tensor:
            u = (cost - COSTS[0]) * ((COSTS[2] - 1) / (COSTS[1] - COSTS[0]))
            u = u.clamp(0, COSTS[2] - 1)
            node = u.long().clamp(max=COSTS[2] - 2)
            rows = node.permute(0, 2, 3, 1)  # (V, O, 2, X)
            low = table.gather(-1, rows).permute(0, 3, 1, 2)
            high = table.gather(-1, rows + 1).permute(0, 3, 1, 2)
            return scale * torch.lerp(low, high, u - node)

        return profit

    def _at(self, table: Tensor, step: Tensor, root: Tensor, x: Tensor) -> Tensor:
        """U (T, V, X) at steps and roots of the variance (n,), and vegas (n, k) → (n, k); linear."""
        step = step.long().clamp(max=len(table) - 1)[:, None]
        u = ((x - self.x[0]) / (self.x[1] - self.x[0])).clamp(0, len(self.x) - 1)
        i = u.long().clamp(max=len(self.x) - 2)
        j = torch.zeros_like(step)
        w = torch.zeros_like(root)[:, None]
        if len(self.roots) > 1:
            w = ((root - self.roots[0]) / (self.roots[1] - self.roots[0])).clamp(0, len(self.roots) - 1)[:, None]
            j = w.long().clamp(max=len(self.roots) - 2)
            w = w - j
        after = (j + 1).clamp(max=len(self.roots) - 1)
        low = torch.lerp(table[step, j, i], table[step, j, i + 1], u - i)
        high = torch.lerp(table[step, after, i], table[step, after, i + 1], u - i)
        return torch.lerp(low, high, w)

    def public_terms(self, state):
        return state.step, state.variance.sqrt()

    def costs(self, public, vegas, observation):
        book = self.env.column(observation, "net vega")[:, None]
        after = torch.cat((book, book - vegas, book + vegas), -1)  # now, sold one of each option, bought one
        value = self._at(self.held, *public, after)
        change = value[:, :1] - value[:, 1:]
        return change.unflatten(-1, (2, -1)) / vegas[:, None]


def best_profit(env: AgainstRivals, rivals: Tensor, gaps: Tensor, costs: Tensor) -> Tensor:
    """max_d P(a taker picks us | d) (d − gap − cost) against rivals (…, R), vol points; gaps and costs (…)."""
    market = env.env
    arguments = (market.choice_sensitivity, market.reference_edge)
    kinds = {"gap": gaps, "informed_share": market.informed_share}
    edge = best_edge(rivals, *arguments, **kinds, marginal_cost=costs)
    return choice_probability(edge, rivals, *arguments, **kinds) * (edge - gaps - costs)


def rival_edges(env: AgainstRivals) -> Tensor:
    """Edges (num_steps, 2, num_options, rivals) that the rivals quote at the initial spot, holding nothing; float64."""
    still = env.standing_still(1)
    edges = []
    for t in range(env.num_steps):
        still.observe_at(t)
        edges.append(still.env.edges[0, env.other_seats].movedim(0, -1))
    return torch.stack(edges).double()
