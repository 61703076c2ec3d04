"""Best, competitive and agreed edges with a fair value off the reference price and informed takers."""

import math

import pytest
import torch

from envs.optimum.edges import BestEdges, EdgeTable, best_edge, choice_probability, monopoly_edges, nash_edges
from envs.optimum.quotes import best_response, monopoly_edge, nash_edge

F64 = torch.float64
K = 2.0
REFERENCE_EDGE = 1.0
GAPS = torch.linspace(-6.0, 6.0, 49, dtype=F64)


def uniform(generator, low, high, *shape):
    return low + (high - low) * torch.rand(*shape, generator=generator, dtype=F64)


def random_market(num_rivals, seed=0, n=300):
    """Rivals (n, num_rivals), gap, informed share and cost (n,)."""
    generator = torch.Generator().manual_seed(seed)
    rivals = uniform(generator, -2.0, 4.0, n, num_rivals)
    gap = uniform(generator, -6.0, 6.0, n)
    share = uniform(generator, 0.0, 1.0, n) ** 2
    cost = uniform(generator, -2.0, 2.0, n)
    return rivals, gap, share, cost


def profit_by_hand(edge, rivals, gap, share, cost):
    """π(d) as defined, by logit weights."""

    def picked(shift):
        ours = torch.exp(-K * (edge - shift - REFERENCE_EDGE))
        theirs = torch.exp(-K * (rivals - shift[..., None] - REFERENCE_EDGE)).sum(-1)
        return ours / (1.0 + ours + theirs)

    return ((1.0 - share) * picked(torch.zeros_like(gap)) + share * picked(gap)) * (edge - gap - cost)


@pytest.mark.parametrize("num_rivals", [0, 1, 3])
def test_choice_probability(num_rivals):
    rivals, gap, share, _ = random_market(num_rivals)
    edge = torch.linspace(-3.0, 5.0, len(gap), dtype=F64)
    ours = choice_probability(edge, rivals, K, REFERENCE_EDGE, gap, share)
    earned_at_one = profit_by_hand(edge, rivals, gap, share, edge - gap - 1.0)
    torch.testing.assert_close(ours, earned_at_one)
    torch.testing.assert_close(
        choice_probability(edge, rivals, K, REFERENCE_EDGE),
        profit_by_hand(edge, rivals, 0.0 * gap, 0.0, edge - 1.0),
    )


@pytest.mark.parametrize("num_rivals", [0, 1, 3])
def test_best_edge_earns_most(num_rivals):
    """Against all edges on a fine grid that is wider than the search."""
    rivals, gap, share, cost = random_market(num_rivals)
    ours = best_edge(rivals, K, REFERENCE_EDGE, gap, share, cost)
    grid = gap + cost + torch.linspace(0.0, 15.0, 7501, dtype=F64)[:, None]
    earned = profit_by_hand(grid, rivals, gap, share, cost)
    most, which = earned.max(0)
    at_ours = profit_by_hand(ours, rivals, gap, share, cost)
    assert (at_ours >= most * (1.0 - 1e-6)).all()
    near = (ours - grid.gather(0, which[None])[0]).abs() < 3e-3
    assert near.double().mean() > 0.99  # two maxima may earn the same, or nearly merge
    in_floats = best_edge(rivals.float(), K, REFERENCE_EDGE, gap.float(), share.float(), cost.float()).double()
    assert (in_floats - ours).abs().quantile(0.99) < 1e-5
    assert (profit_by_hand(in_floats, rivals, gap, share, cost) >= most * (1.0 - 1e-6)).all()


@pytest.mark.parametrize("num_rivals", [0, 1, 3])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_a_table_of_best_edges(num_rivals, share):
    rivals, gap, _, cost = random_market(num_rivals)
    exact = best_edge(rivals, K, REFERENCE_EDGE, gap, share, cost)
    for dtype, most in ((F64, 2e-5), (torch.float32, 5e-5)):
        fast = BestEdges(share, dtype=dtype)(
            rivals.to(dtype), K, REFERENCE_EDGE, gap.to(dtype), cost.to(dtype)
        ).double()
        assert (fast - exact).abs().quantile(0.99) < most
        earned = [profit_by_hand(edge, rivals, gap, share, cost) for edge in (fast, exact)]
        assert (earned[0] >= earned[1] * (1.0 - 2e-3)).all()
        assert (earned[0] >= earned[1] * (1.0 - 1e-6)).double().mean() > 0.99


def test_best_edge_between_two_maxima():
    """A lone maker whose informed takers know of a bad price: serve both kinds, or the uninformed alone."""
    nobody = torch.empty(0, dtype=F64)
    gap = torch.tensor(-5.0, dtype=F64)
    grid = gap + torch.linspace(0.3, 9.0, 87001, dtype=F64)
    edges = []
    for share in torch.linspace(0.5, 0.95, 10, dtype=F64):
        earned = profit_by_hand(grid, nobody.expand(len(grid), 0), gap.expand(len(grid)), share, 0.0)
        inner = earned[1:-1]
        maxima = (inner > earned[:-2]) & (inner > earned[2:])
        best = best_edge(nobody, K, REFERENCE_EDGE, gap, share)
        assert float(best) == pytest.approx(float(grid[earned.argmax()]), abs=2e-4)
        edges.append((int(maxima.sum()), float(best)))
    assert max(count for count, _ in edges) == 2
    assert max(-b for _, b in edges) > 2.5  # the informed are worth serving where there are many
    assert max(b for _, b in edges) > -1.0  # and not where there are few


def test_best_edge_of_one_kind_is_the_best_response():
    rivals, gap, share, cost = random_market(2, seed=1)
    market = (K, REFERENCE_EDGE)
    close = {"rtol": 0.0, "atol": 1e-9}
    uninformed = best_response(rivals, *market, gap + cost)
    torch.testing.assert_close(best_edge(rivals, *market, gap, 0.0, cost), uninformed, **close)
    informed = gap + best_response(rivals - gap[:, None], *market, cost)
    torch.testing.assert_close(best_edge(rivals, *market, gap, 1.0, cost), informed, **close)
    neither = best_response(rivals, *market, cost)
    torch.testing.assert_close(best_edge(rivals, *market, 0.0, share, cost), neither, **close)
    torch.testing.assert_close(best_edge(rivals, *market), best_response(rivals, *market), **close)


def test_best_edge_broadcasts():
    generator = torch.Generator().manual_seed(2)
    rivals = uniform(generator, 0.0, 2.0, 6, 1, 5, 2)
    gap = uniform(generator, -2.0, 2.0, 3, 5)
    cost = uniform(generator, -1.0, 1.0, 6, 3, 1)
    edges = best_edge(rivals, K, REFERENCE_EDGE, gap, 0.2, cost)
    assert edges.shape == (6, 3, 5)
    alone = best_edge(rivals[4, 0, 2], K, REFERENCE_EDGE, gap[1, 2], 0.2, cost[4, 1, 0])
    torch.testing.assert_close(edges[4, 1, 2], alone)


@pytest.mark.parametrize("num_makers", [2, 3])
def test_nash_edges_leave_nothing_to_gain(num_makers):
    """One equilibrium for every gap; no deviation on a fine grid earns more."""
    for share in (0.0, 0.1, 0.2, 0.5, 1.0):
        nash = nash_edges(num_makers, K, REFERENCE_EDGE, GAPS, share)
        assert (nash.count == 1).all()
        assert (nash.regret < 1e-9).all()
        rivals = nash.edge[:, None].expand(-1, num_makers - 1)
        grid = GAPS + torch.linspace(0.0, 15.0, 3001, dtype=F64)[:, None]
        most = profit_by_hand(grid, rivals, GAPS, share, 0.0).amax(0)
        assert (profit_by_hand(nash.edge, rivals, GAPS, share, 0.0) >= most).all()


@pytest.mark.parametrize("start", [-8.0, 1.0, 12.0])
@pytest.mark.parametrize("share", [0.2, 0.8])
def test_best_responses_come_to_nash(start, share):
    """From anywhere: so it is the one symmetric equilibrium, and easily learnt."""
    for num_makers in (2, 3):
        edge = torch.full_like(GAPS, start)
        for _ in range(60):
            edge = best_edge(edge[:, None].expand(-1, num_makers - 1), K, REFERENCE_EDGE, GAPS, share)
        nash = nash_edges(num_makers, K, REFERENCE_EDGE, GAPS, share)
        torch.testing.assert_close(edge, nash.edge, rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("num_makers", [2, 3])
def test_limits_of_nash_and_monopoly(num_makers):
    market = (num_makers, K, REFERENCE_EDGE)
    competing, agreed = nash_edge(*market), monopoly_edge(*market)
    close = {"rtol": 0.0, "atol": 1e-9}
    torch.testing.assert_close(nash_edges(*market, GAPS, 1.0).edge, GAPS + competing, **close)
    torch.testing.assert_close(monopoly_edges(*market, GAPS, 1.0), GAPS + agreed, **close)
    nothing = torch.zeros(1, dtype=F64)
    assert float(nash_edges(*market, nothing, 0.3).edge) == pytest.approx(competing, abs=1e-9)
    assert float(monopoly_edges(*market, nothing, 0.3)) == pytest.approx(agreed, abs=1e-9)
    edge = nash_edges(*market, GAPS, 0.0).edge
    share = 1.0 / (num_makers + torch.exp(K * (edge - REFERENCE_EDGE)))
    torch.testing.assert_close(edge - GAPS, 1.0 / (K * (1.0 - share)), **close)
    if num_makers == 2:
        assert competing == pytest.approx(0.7995, abs=5e-5)
        assert agreed == pytest.approx(1.187, abs=5e-4)


@pytest.mark.parametrize("num_makers", [1, 2, 3])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.8, 1.0])
def test_monopoly_earns_most_together(num_makers, share):
    def earned_by_each(edge):
        rivals = edge[..., None].expand(*edge.shape, num_makers - 1)
        return profit_by_hand(edge, rivals, GAPS, share, 0.0)

    agreed = monopoly_edges(num_makers, K, REFERENCE_EDGE, GAPS, share)
    most = earned_by_each(GAPS + torch.linspace(0.0, 15.0, 7501, dtype=F64)[:, None]).amax(0)
    assert (earned_by_each(agreed) >= most * (1.0 - 1e-9)).all()
    if num_makers > 1:
        nash = nash_edges(num_makers, K, REFERENCE_EDGE, GAPS, share).edge
        assert (agreed > nash).all()
        assert (earned_by_each(agreed) > earned_by_each(nash)).all()


def test_table():
    table = EdgeTable(2, K, REFERENCE_EDGE, 0.2)
    gap = torch.linspace(-7.9, 7.9, 1000, dtype=F64)
    assert table.nash(gap.float().reshape(10, 100)).shape == (10, 100)
    nash = nash_edges(2, K, REFERENCE_EDGE, gap, 0.2).edge.float()
    torch.testing.assert_close(table.nash(gap.float()), nash, rtol=0.0, atol=1e-4)
    agreed = monopoly_edges(2, K, REFERENCE_EDGE, gap, 0.2).float()
    torch.testing.assert_close(table.monopoly(gap.float()), agreed, rtol=0.0, atol=1e-4)
    beyond = table.nash(torch.tensor([8.0, 10.0]))
    assert float(beyond.diff()) == pytest.approx(2.0, abs=0.01)
    assert table.regret.max() < 1e-9
    assert math.isclose(float(table.nash(torch.zeros(1))), nash_edge(2, K, REFERENCE_EDGE), abs_tol=1e-6)
