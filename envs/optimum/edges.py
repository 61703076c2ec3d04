"""Best, competitive and agreed edges where the fair value lies off the reference price, and some takers know it.

A maker quotes an edge d over the reference price of an option, in vol points of its vega. On that side the fair value
lies a `gap` g from the reference price, so that a fill earns d − g. A share s of the takers is informed: they see d − g
in place of d. With r the rivals' edges and c a marginal cost, a maker earns per taker

    π(d) = [(1 − s) P(d; r) + s P(d − g; r − g)] (d − g − c),    P(d; r) = x(d)/(1 + x(d) + Σ x(rᵢ)),

with x(d) = e^{−k(d − d_ref)}. Each kind of taker alone has one optimum in closed form, `quotes.best_response`. Both
together can have two local maxima, so `best_edge` searches.
"""

import math
from typing import NamedTuple

import torch

from envs.optimum.quotes import lambert_w

Tensor = torch.Tensor

GRID_POINTS = 16  # of the search between the optima of either kind
NEWTON_STEPS = 6
LEAST_DERIVATIVE = 0.1  # in these steps; at a maximum of one kind of takers it is at least 1
ROOT_POINTS = 257  # of the search for symmetric equilibria
TABLE_LIMIT, TABLE_STEP = 32.0, 0.125  # of `BestEdges`
TABLE_NEWTON_STEPS = 2
REGRET_TOLERANCE = 1e-7  # relative regret up to which a common edge counts as an equilibrium


def choice_probability(
    edge: Tensor,
    rivals: Tensor,
    k: float,
    reference_edge: float,
    gap: Tensor | float = 0.0,
    informed_share: Tensor | float = 0.0,
) -> Tensor:
    """Probability that a taker of either kind picks the maker: (1 − s) P(d; r) + s P(d − g; r − g).

    Args:
        edge: d (…), vol points.
        rivals: r (…, number of rivals) on the same side, vol points; the number may be zero.
        k, reference_edge: of the choice, see `QuotingEnv`; per vol point and vol points.
        gap: g (…), vol points, how far the fair value lies from the reference price, against the maker.
        informed_share: s (…), in [0, 1].

    Returns:
        The probability (…), all arguments broadcast.
    """
    gap, share = (_as_tensor(value, rivals) for value in (gap, informed_share))
    uninformed, informed = _even_edges(rivals, k, reference_edge, gap)
    return (1.0 - share) * (k * (uninformed - edge)).sigmoid() + share * (k * (informed - edge)).sigmoid()


def best_edge(
    rivals: Tensor,
    k: float,
    reference_edge: float,
    gap: Tensor | float = 0.0,
    informed_share: Tensor | float = 0.0,
    marginal_cost: Tensor | float = 0.0,
) -> Tensor:
    """Edge that earns most per taker: the global argmax over d of π(d), see the top of the file.

    In u = k(d − g − c) a kind of taker who picks with probability P = σ(a − u) gives u P(u), whose slope has the sign
    of 1 − u(1 − P). As u(1 − P) increases where u > 0, its one maximum is 1 + W(e^{a − 1}), the `best_response`. Every
    maximum of the mixture therefore lies between those of the two kinds. There a grid finds the first local maximum
    from the left and the first from the right, and Newton's method, kept in its bracket by bisection, refines both.

    Args:
        rivals, k, reference_edge, gap, informed_share: see `choice_probability`.
        marginal_cost: c (…), vol points: the cost of a trade, to be taken from what it earns.

    Returns:
        The edge (…), vol points, all arguments broadcast; right to about 1e-6 in single precision, except where two
        maxima merge or earn the same: there it may be off, but still earns the most up to about 1e-6 of it.
    """
    gap, share, cost = (_as_tensor(value, rivals) for value in (gap, informed_share, marginal_cost))
    even, base = _even_margins(rivals, k, reference_edge, gap, gap + cost)
    return base + _best_margin(even, share.expand_as(base)) / k


class BestEdges:
    """`best_edge` for one share of informed takers, several times as fast, for makers who answer in every step.

    The margin u = k(d − g − c) depends on two numbers alone, see `_even_margins`. Newton's method starts from the
    nearest node of a table of it. So it is right to about 1e-6, except where two maxima earn nearly the same.

    Args:
        informed_share: s, in [0, 1].
    """

    def __init__(self, informed_share: float, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32):
        self.share = informed_share
        self.nodes = round(2 * TABLE_LIMIT / TABLE_STEP) + 1
        even = TABLE_STEP * torch.arange(self.nodes, device=device, dtype=dtype) - TABLE_LIMIT
        even = torch.stack(torch.meshgrid(even, even, indexing="ij"))
        self.margins = _best_margin(even, even.new_full((), informed_share).expand_as(even[0])).flatten()

    def __call__(
        self, rivals: Tensor, k: float, reference_edge: float, gap: Tensor, marginal_cost: Tensor | float = 0.0
    ) -> Tensor:
        """As `best_edge`; margins at which half of the takers pick the maker are cut at ±`TABLE_LIMIT`."""
        even, base = _even_margins(rivals, k, reference_edge, gap, gap + marginal_cost)
        even = even.clamp_(-TABLE_LIMIT, TABLE_LIMIT)
        uninformed, informed = torch.round((even + TABLE_LIMIT) / TABLE_STEP).long()
        u = self.margins[uninformed * self.nodes + informed]
        takers = _Takers(even, base.new_full((), self.share).expand_as(base))
        for _ in range(TABLE_NEWTON_STEPS):
            value, derivative = takers.slope(u[None])
            u = u - (value / derivative.clamp_(min=LEAST_DERIVATIVE))[0].clamp_(-TABLE_STEP, TABLE_STEP)
        return base + u / k


class Equilibrium(NamedTuple):
    """Symmetric equilibria in pure strategies, one for every gap.

    Attributes:
        edge: (…) vol points, the common edge from which leaving pays least.
        regret: (…) what leaving it earns at best, max_d π(d)/π(edge) − 1; above 1e-7 it is no equilibrium.
        count: (…) how many common edges are equilibria.
    """

    edge: Tensor
    regret: Tensor
    count: Tensor


def nash_edges(num_makers: int, k: float, reference_edge: float, gap: Tensor, informed_share: float) -> Equilibrium:
    """Common edge that is the best response to itself where `num_makers` compete, for every gap.

    Where all quote d, the first-order condition is k(d − g) E[1 − P | picked] = 1. As for `best_edge`, its roots lie
    between those of the two kinds of takers alone. A grid and bisection find them; `best_edge` then tells which of them
    are equilibria. Where the best response jumps there may be none, so look at the regret. With 2, 3 and 5 makers, k 2,
    d_ref 1, ten shares between 0 and 1 and gaps from −6 to 6 vol points there was always exactly one.

    Args:
        num_makers: M ≥ 2.
        k, reference_edge, gap, informed_share: see `choice_probability`.
    """
    gaps = gap.double()
    edges = _symmetric_roots(num_makers, k, reference_edge, gaps, informed_share)
    market = (edges[..., None].expand(*edges.shape, num_makers - 1), k, reference_edge, gaps, informed_share)
    kept = choice_probability(edges, *market) * (edges - gaps)
    best = best_edge(*market)
    deviating = choice_probability(best, *market) * (best - gaps)
    regret = (deviating / kept - 1.0).clamp(min=0.0).nan_to_num(nan=math.inf)
    least, which = regret.min(0)
    edge = edges.gather(0, which[None])[0]
    return Equilibrium(edge.to(gap.dtype), least.to(gap.dtype), (regret <= REGRET_TOLERANCE).sum(0))


def monopoly_edges(num_makers: int, k: float, reference_edge: float, gap: Tensor, informed_share: float) -> Tensor:
    """Edge (…), vol points, that `num_makers` would agree on, for every gap: argmax of what they earn together.

    M makers with a common edge d are picked as one with the edge d − ln(M)/k would be. So it is the best edge of a
    maker without rivals whose reference edge is d_ref + ln(M)/k.

    Args:
        num_makers: M ≥ 1.
        k, reference_edge, gap, informed_share: see `choice_probability`.
    """
    nobody = gap.new_empty((*gap.shape, 0))
    return best_edge(nobody, k, reference_edge + math.log(num_makers) / k, gap, informed_share)


class EdgeTable:
    """`nash_edges` and `monopoly_edges` on a grid of gaps, linear between its nodes and beyond.

    Between two nodes on either side of a jump the edge lies between both branches.

    Attributes:
        gaps: (N,) the grid, vol points.
        edges: (2, N) Nash and monopoly edges, vol points.
        regret: (N,) of the Nash edges, see `Equilibrium`.
    """

    def __init__(
        self,
        num_makers: int,
        k: float,
        reference_edge: float,
        informed_share: float,
        largest_gap: float = 8.0,
        num_gaps: int = 801,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        gaps = torch.linspace(-largest_gap, largest_gap, num_gaps, dtype=torch.float64)
        equilibrium = nash_edges(num_makers, k, reference_edge, gaps, informed_share)
        agreed = monopoly_edges(num_makers, k, reference_edge, gaps, informed_share)
        self.largest_gap = largest_gap
        self.gaps = gaps.to(device, dtype)
        self.edges = torch.stack((equilibrium.edge, agreed)).to(device, dtype)
        self.regret = equilibrium.regret.to(device, dtype)

    def nash(self, gap: Tensor) -> Tensor:
        """Nash edges (…) at the gaps (…), vol points."""
        return self._interpolate(self.edges[0], gap)

    def monopoly(self, gap: Tensor) -> Tensor:
        """Monopoly edges (…) at the gaps (…), vol points."""
        return self._interpolate(self.edges[1], gap)

    def _interpolate(self, edges: Tensor, gap: Tensor) -> Tensor:
        last = len(self.gaps) - 1
        position = (gap + self.largest_gap) * (last / (2.0 * self.largest_gap))
        index = position.floor().clamp(0, last - 1)
        weight = position - index
        index = index.long()
        return torch.lerp(edges[index], edges[index + 1], weight)


def _even_margins(rivals: Tensor, k: float, reference_edge: float, gap: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
    """k(a − base) (2, …), a the edges at which half of the uninformed and half of the informed takers pick the maker,
    and `base` (…), both broadcast."""
    *even, base = torch.broadcast_tensors(*_even_edges(rivals, k, reference_edge, gap), base)
    return k * (torch.stack(even) - base), base


def _best_margin(even: Tensor, share: Tensor) -> Tensor:
    """Margin u (…) of most profit, from `_even_margins` (2, …) and the share of the informed (…)."""
    alone = 1.0 + lambert_w(even - 1.0)  # where u(1 − P) = 1, for either kind
    low, high = alone.amin(0), alone.amax(0)
    return _search(_Takers(even, share), low, high - low)


def _as_tensor(value: Tensor | float, like: Tensor) -> Tensor:
    """A number becomes a tensor on the device of `like`, without a copy from the host."""
    return value if isinstance(value, Tensor) else like.new_full((), value)


def _even_edges(rivals: Tensor, k: float, reference_edge: float, gap: Tensor) -> tuple[Tensor, Tensor]:
    """Edges (…), vol points, at which half of the uninformed and half of the informed takers pick the maker.

    P(d; r) = σ(k(a − d)) with a = d_ref − ln(1 + Σ x(rᵢ))/k. For the informed, who see d − g and r − g, walking away
    weighs e^{−kg} in place of 1.
    """
    log_rivals = (-k * (rivals - reference_edge)).logsumexp(-1)
    uninformed = torch.logaddexp(log_rivals, torch.zeros_like(log_rivals))
    informed = torch.logaddexp(log_rivals, -k * gap)
    return reference_edge - uninformed / k, reference_edge - informed / k


class _Takers:
    """The mixture (1 − s) σ(a₀ − u) + s σ(a₁ − u) of picking a maker whose margin is u = k(d − g − c).

    All are divided by e^{shift}, the size of the larger one where both are small, lest both become zero.

    Args:
        even: a (2, …), the margins at which half of the uninformed and half of the informed pick the maker.
        share: s (…).
    """

    def __init__(self, even: Tensor, share: Tensor):
        shift = even.amax(0).clamp_(max=0.0)
        self.scale = shift.exp()
        self.offset = (shift - even)[:, None]
        self.share = share
        self.weight = torch.stack((1.0 - share, share))[:, None]

    def picked(self, u: Tensor) -> Tensor:
        """Scaled probabilities (2, points, …) that an uninformed and an informed taker picks the maker at u (points,
        …)."""
        return (u + self.offset).exp_().add_(self.scale).reciprocal_()

    def profit(self, u: Tensor) -> Tensor:
        """Scaled u [(1 − s) P + s P'] (points, …)."""
        return torch.lerp(*self.picked(u), self.share).mul_(u)

    def slope(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """f(u) = u h(u) − 1, which is zero at a maximum of the profit and below zero left of it, and its derivative.

        h = E[1 − P | picked] = S₁/S₀ with Sₙ = E[P(1 − P)ⁿ] over the takers, and h' = h² + h − 2S₂/S₀.
        """
        picked = self.picked(u)
        term = self.weight * picked
        left = picked.mul_(self.scale).neg_().add_(1.0)  # 1 − P
        s0 = term.sum(0)
        s1 = term.mul_(left).sum(0)
        s2 = term.mul_(left).sum(0)
        h = s1.div_(s0)
        derivative = torch.addcmul(h, u, (h + 1.0).mul_(h).sub_(s2.div_(s0), alpha=2.0))
        return (u * h).sub_(1.0), derivative


def _search(takers: _Takers, low: Tensor, width: Tensor) -> Tensor:
    """Margin u (…) of most profit in [low, low + width] (…), by a grid and Newton's method."""
    nodes = torch.arange(GRID_POINTS, device=low.device, dtype=low.dtype).reshape(-1, *[1] * low.dim())
    step = width / (GRID_POINTS - 1)
    profit = takers.profit(torch.addcmul(low, nodes, step))
    rises = (profit[1:] - profit[:-1]).sign_()  # arithmetic, as `where` takes ten times as long on a CPU
    right = (nodes[1:] * rises).amax(0).clamp_(min=0.0)
    left = rises.clamp_(min=0.0).mul_(GRID_POINTS).add_(nodes[:-1]).amin(0).clamp_(max=GRID_POINTS - 1.0)
    peaks = _climb(takers, low + step * torch.stack((left, right)), step)
    profit = takers.profit(peaks)
    return torch.where(profit[0] >= profit[1], *peaks)


def _climb(takers: _Takers, start: Tensor, step: Tensor) -> Tensor:
    """Local maxima (2, …) of the profit about a grid step from the starts (2, …), by Newton's method.

    Every step goes uphill: near a minimum, where Newton's would go down, the derivative is bounded from below. On a
    narrow grid rounding decides which node is highest, hence the margin.
    """
    margin = 0.05 + step
    lower = (start - margin).clamp(min=0.5)  # where u(1 − P) = 1, u is at least 1
    upper = start + margin
    u = start
    for _ in range(NEWTON_STEPS):
        value, derivative = takers.slope(u)
        u = torch.addcdiv(u, value, derivative.clamp_(min=LEAST_DERIVATIVE), value=-1.0).clamp_(lower, upper)
    return u


def _symmetric_roots(num_makers: int, k: float, reference_edge: float, gap: Tensor, informed_share: float) -> Tensor:
    """Edges (roots, …), vol points, that solve the first-order condition where all quote the same; NaN fills up.

    As 0 < P < 1/M, k(d − g)(1 − P) = 1 bounds k(d − g) by 1 and M/(M − 1), for either kind and so for both.
    """

    def too_high(edge):
        odds = (-k * (torch.stack((edge, edge - gap)) - reference_edge)).exp()
        picked = odds / (1.0 + num_makers * odds)
        of_kind = (1.0 - informed_share) * picked[0], informed_share * picked[1]
        lost = of_kind[0] * (1.0 - picked[0]) + of_kind[1] * (1.0 - picked[1])
        return k * (edge - gap) * lost > of_kind[0] + of_kind[1]

    parts = torch.linspace(0.0, 1.0, ROOT_POINTS, device=gap.device, dtype=gap.dtype).reshape(-1, *[1] * gap.dim())
    grid = gap + (1.0 + parts / (num_makers - 1.0)) / k
    above = too_high(grid)
    crossing = above[1:] != above[:-1]
    num_roots = int(crossing.sum(0).max())
    present, cell = crossing.byte().sort(dim=0, descending=True, stable=True)
    cell = cell[:num_roots]
    lower = grid.gather(0, cell)
    upper = grid.gather(0, cell + 1)
    at_lower = above.gather(0, cell)
    for _ in range(50):
        middle = 0.5 * (lower + upper)
        same = too_high(middle) == at_lower
        lower = torch.where(same, middle, lower)
        upper = torch.where(same, upper, middle)
    return torch.where(present[:num_roots] > 0, 0.5 * (lower + upper), math.nan)
