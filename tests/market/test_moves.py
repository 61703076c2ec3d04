"""How the options move in the next step: against closed forms, and against what a market does."""

import math

import pytest
import torch
from common import MODELS, calls, model_called, quoted

from envs import QuotingEnv
from envs.market import black_scholes, dynamics, moves
from envs.market.quoting import QuotingState

F64 = torch.float64
HALF_DAYS = 1 / 504


def state_of(step, spot, variance) -> QuotingState:
    """What the tables are asked for: steps, spots in currency and variances, each (n,)."""
    return QuotingState(step, spot, variance, *[None] * 7)


@pytest.fixture
def many_samples(monkeypatch):
    """So many simulated steps that only the grid and the method are left to be wrong."""
    monkeypatch.setattr(moves, "SAMPLES", 2**21)


@pytest.mark.parametrize("expiries", [(24,), (16, 48)])
def test_black_scholes_hedges_gbm_but_for_gamma(expiries, many_samples):
    """A hedged option moves by ½Γ(ΔS² − E ΔS²), of variance ½Γ²S⁴σ⁴dt², and all options together."""
    market = QuotingEnv(1, dynamics.GBM(0.2, HALF_DAYS), quoted(*expiries, dt=HALF_DAYS), num_steps=2)
    table = moves.StepMoves(market)
    assert table.exposure.shape == (2, 17, 1, market.num_options)
    assert table.exposure.abs().max() < 1e-3
    spot = 100.0 * table.grid.spot[:, None]
    for t in (0, 1):
        tau = (market.expiry.double() - t) * HALF_DAYS
        gamma = black_scholes.greeks(spot, market.strike.double(), tau, 0.2).gamma
        size = gamma * spot**2 * 0.2**2 * HALF_DAYS  # of ½Γ(ΔS² − E ΔS²), times √2
        expected = 0.5 * size[:, :, None] * size[:, None, :]
        near = expected > 0.1 * expected.amax()
        torch.testing.assert_close(table.covariance[t, :, 0][near], expected[near], rtol=0.1, atol=0)
        total = table.covariance[t, :, 0].sum((-1, -2)) / expected.sum((-1, -2))
        torch.testing.assert_close(total, torch.ones_like(total), rtol=0.03, atol=0)
    state = state_of(torch.tensor([1]), torch.tensor([101.0]), torch.tensor([0.04]))
    assert table.exposure_at(state).abs().max() < 1e-3


MARKETS = {
    "heston": dynamics.Heston(dt=HALF_DAYS),
    "heston at 30 %": dynamics.Heston(0.09, dt=HALF_DAYS),
    "garch": MODELS["garch"],
}


@pytest.mark.parametrize("name", MARKETS)
def test_exposure_and_covariance_are_those_of_a_market(name, many_samples):
    """The fair values' moves in 100,000 steps of the market itself, regressed on the spot's."""
    model, n = MARKETS[name], 100_000
    options = quoted(24, 40, dt=model.dt, moneyness=(-1.0, 0.0, 1.0))
    market = QuotingEnv(n, model, options, num_steps=1, arrival_rate=1e-6, dtype=F64)
    market.reset(seed=1)
    table = moves.StepMoves(market)
    move = market.spot[1] - market.spot[0]
    change = market.mark[1] - market.mark[0]
    hedge = (move[:, None] * change).sum(0) / move.square().sum()
    left = change - change.mean(0) - hedge * (move - move.mean())[:, None]
    state = state_of(torch.zeros(1), market.spot[0, :1], market.variance[0, :1])
    exposure = hedge - market.delta[0, 0]
    assert exposure.abs().min() > 0.02  # Black–Scholes does not do
    torch.testing.assert_close(table.exposure_at(state)[0], exposure, rtol=0.05, atol=2e-3)
    empirical = left.T @ left / n
    where = state.step, state.spot / 100, state.variance
    ours = table.grid.interpolate(table.covariance, *where)[0]
    torch.testing.assert_close(ours, empirical, rtol=0.15, atol=0.01 * empirical.amax().item())
    scale = ours.diagonal().sqrt()
    assert torch.linalg.eigvalsh(ours / scale / scale[:, None]).min() > -1e-9


def test_the_samples_that_makers_use_are_near_enough(monkeypatch):
    """In the default market, at the state that it starts in: exposure within 10 %, covariance within 20 %."""
    market = QuotingEnv(1, num_steps=1, options=quoted(120, dt=HALF_DAYS), dtype=F64)
    few = moves.StepMoves(market)
    monkeypatch.setattr(moves, "SAMPLES", 2**21)
    many = moves.StepMoves(market)
    one = torch.ones(1, dtype=F64)
    for table, rtol in (("exposure", 0.1), ("covariance", 0.2)):
        one_time = (x.grid.interpolate(getattr(x, table), 0 * one, one, 0.04 * one) for x in (few, many))
        torch.testing.assert_close(*one_time, rtol=rtol, atol=1e-4)


def test_tables_of_vegas_and_gaps_are_the_markets():
    """At the grid's own states, for every expiry."""
    market = QuotingEnv(1, options=quoted(16, 24, dt=HALF_DAYS), num_steps=12, dtype=F64)
    table = moves.StepMoves(market)
    assert table.vegas.shape == table.gaps.shape == (12, 17, 10, 10)
    x, v = (i.flatten() for i in torch.meshgrid(torch.arange(17), torch.arange(10), indexing="ij"))
    for t in (0, 7):
        step = torch.full((170,), t)
        state = state_of(step, 100.0 * table.grid.spot[x], table.grid.variance[v])
        torch.testing.assert_close(table.vegas[t].flatten(0, 1), market.vegas_at(state))
        torch.testing.assert_close(table.gaps[t].flatten(0, 1), market.gap_at(state))
        torch.testing.assert_close(table.exposure_at(state), table.exposure[t].flatten(0, 1))


def test_a_calibrated_market_moves_by_its_projection():
    """What marlvol's options do in a step is told by the spot alone: the hedge is the slope, and little is left."""
    market = QuotingEnv(1, model_called("marlvol"), quoted(24), num_steps=12, dtype=F64)
    table = moves.StepMoves(market)
    assert table.exposure.isfinite().all()
    middle = len(table.grid.spot) // 2
    at = int((table.grid.variance - market.dynamics.initial_variance).abs().argmin())
    exposure, covariance = (x[0, middle, at] for x in (table.exposure, table.covariance))
    bump = 0.5
    spots = 1.0 + torch.tensor([-bump, bump], dtype=F64) / 100
    now = torch.zeros(2, dtype=F64)
    volatility = market.smile.volatility(now, spots, now)
    time = 24 * market.dynamics.dt
    price = black_scholes.price(100 * spots[:, None], market.strike, time, volatility, market.is_call)
    flat = market.reference_volatility(now[:1], torch.ones(1, dtype=F64), now[:1])
    delta = black_scholes.delta(torch.tensor(100.0), market.strike, time, flat[0], market.is_call)
    torch.testing.assert_close(exposure, (price[1] - price[0]) / (2 * bump) - delta, rtol=0.1, atol=0.02)
    assert covariance.diagonal().sqrt().max() < 0.2  # currency


def test_interpolation_is_exact_for_what_is_linear():
    """In ln S and √v, at every step; constant beyond the grid, and the last row serves all later steps."""
    grid = moves.StateGrid(QuotingEnv(1, num_steps=3, fair_marks=False, dtype=F64))
    assert grid.spot[0].log().item() == pytest.approx(-4 * 0.2 * math.sqrt(3 / 504))
    assert (grid.root[0], grid.root[-1]) == (pytest.approx(0.02), pytest.approx(0.6))

    def linear(step, log_spot, root):
        return torch.stack((2.0 * step + log_spot, 1.0 - 3.0 * root, log_spot * root + step), -1)

    axes = torch.meshgrid(torch.arange(3, dtype=F64), grid.log_spot, grid.root, indexing="ij")
    table = linear(*axes)
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(2, 500, generator=generator, dtype=F64)
    log_spot = grid.log_spot[0] + uniform[0] * (grid.log_spot[-1] - grid.log_spot[0])
    root = grid.root[0] + uniform[1] * (grid.root[-1] - grid.root[0])
    step = torch.arange(500) % 3
    found = grid.interpolate(table, step, log_spot.exp(), root.square())
    torch.testing.assert_close(found, linear(step.to(F64), log_spot, root))
    late = grid.interpolate(table, step + 2, log_spot.exp(), root.square())
    torch.testing.assert_close(late, linear(torch.full_like(root, 2.0), log_spot, root))
    far = grid.interpolate(table, step, (4.0 * log_spot).exp(), (4.0 * root).square())
    cut = (4.0 * log_spot).clamp(grid.log_spot[0], grid.log_spot[-1]), (4.0 * root).clamp(max=grid.root[-1])
    torch.testing.assert_close(far, linear(step.to(F64), *cut))
    roots = torch.tensor([0.02, 0.2, 0.33, 0.6, 0.9], dtype=F64)
    steps, cut = torch.meshgrid(torch.arange(3, dtype=F64), roots.clamp(max=0.6), indexing="ij")
    expected = linear(steps, grid.log_spot[0].expand_as(cut), cut)
    torch.testing.assert_close(grid.in_variance(table[:, 0], roots), expected)


def test_a_constant_variance_has_one_node():
    grid = moves.StateGrid(QuotingEnv(1, dynamics.GBM(0.3, HALF_DAYS), num_steps=3, dtype=F64))
    assert grid.variance.tolist() == [pytest.approx(0.09)]
    table = torch.rand(3, 17, 1, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    one = torch.ones(1, dtype=F64)
    for variance in (0.01, 0.09, 0.5):
        torch.testing.assert_close(grid.interpolate(table, one, one, variance * one)[0], table[1, 8, 0])


@pytest.mark.parametrize("name", ["heston", "heston without Feller", "garch"])
def test_the_variances_chain_keeps_the_mean_of_the_root(name):
    """Rows sum to 1, nothing is negative, and E √v' is the model's, to what its grid holds."""
    model = MODELS[name]
    market = QuotingEnv(1, model, calls(24), num_steps=12, fair_marks=False, dtype=F64)
    roots = torch.linspace(0.3, 2.5, 45, dtype=F64) * model.initial_variance**0.5
    transition = moves.variance_transition(market, roots)
    assert transition.shape == (45, 45)
    assert (transition >= 0).all()
    torch.testing.assert_close(transition.sum(1), torch.ones(45, dtype=F64))
    n = 40_000
    noise = torch.randn(n, model.noise_size, generator=torch.Generator().manual_seed(0), dtype=F64)
    for i in (5, 20, 35):
        _, after = model.step(roots[i].square().expand(n), noise)
        root = after.sqrt().clamp(roots[0], roots[-1])
        error = 5 * root.std().item() / n**0.5
        assert (transition[i] @ roots).item() == pytest.approx(root.mean().item(), abs=error)
        spread = (transition[i] @ roots.square() - (transition[i] @ roots) ** 2).item()
        within = 0.25 * (roots[1] - roots[0]).item() ** 2  # what sharing out between two nodes adds at most
        assert root.var().item() * 0.9 < spread < root.var().item() * 1.1 + within
    constant = moves.variance_transition(market, roots[:1])
    assert constant.tolist() == [[1.0]]
