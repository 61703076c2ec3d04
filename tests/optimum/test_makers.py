"""Makers that know the model: the best response, the closed form of many assets, dynamic programming."""

from functools import cache

import numpy as np
import pytest
import torch
from common import calls, quoted

from envs import AgainstRivals, QuotingEnv
from envs.baselines import makers
from envs.benchmark.contest import play
from envs.benchmark.quoting import beside_best
from envs.benchmark.report import estimate
from envs.market import dynamics
from envs.market.moves import StepMoves
from envs.market.quoting import QuotingState
from envs.optimum.makers import BestResponse, MultiAsset, VegaProgramming, rival_edges
from envs.optimum.quotes import best_response

F64 = torch.float64
HALF_DAYS = 1 / 504
NEUTRAL = {"risk_aversion": 0.0, "cost_rate": 0.0}


def gbm_market(num_envs, **settings) -> QuotingEnv:
    return QuotingEnv(num_envs, dynamics.GBM(0.2, HALF_DAYS), **settings)


def constant_rival(market: QuotingEnv, edge: float = 1.1) -> AgainstRivals:
    return AgainstRivals(market, [makers.constant_spread(market, edge)] * (market.num_makers - 1))


@cache
def default_market() -> tuple[AgainstRivals, StepMoves]:
    """The default market against an Avellaneda–Stoikov maker."""
    market = QuotingEnv(512)
    return AgainstRivals(market, [makers.avellaneda_stoikov(market, 0.25, 0.8)]), StepMoves(market)


def costs_of(policy, market: QuotingEnv, step: int, vega: torch.Tensor, variance: float = 0.04) -> torch.Tensor:
    """Marginal costs (n, 2, num_options) at the initial spot, of books of these vegas (n,)."""
    here = torch.full_like(vega, market.initial_spot), torch.full_like(vega, variance)
    state = QuotingState(torch.full_like(vega, step), *here, *[None] * 7)
    observation = vega.new_zeros(len(vega), market.maker_observation_space.shape[0])
    observation[:, market.columns["net vega"]] = vega[:, None]
    return policy.costs(policy.public_terms(state), market.vegas_at(state), observation)


# THE BEST RESPONSE


@pytest.mark.parametrize("informed_share", [0.0, 0.2, 0.6, 1.0])
@pytest.mark.parametrize("model", [dynamics.GBM(0.2, HALF_DAYS), dynamics.Heston(dt=HALF_DAYS)], ids=["gbm", "heston"])
def test_best_response_is_the_argmax_by_brute_force(model, informed_share):
    """Of [(1 − s) P(d) + s P(d − g)] (d − g), over a fine grid, at what rivals quote, option by option and side."""
    market = QuotingEnv(6, model, num_makers=3, num_steps=3, informed_share=informed_share, dtype=F64)
    market.reset(seed=0)
    generator = torch.Generator().manual_seed(0)
    half_spread = 0.2 + 2.0 * torch.rand(6, 3, 5, generator=generator, dtype=F64)
    up = torch.randn(6, 3, 5, generator=generator, dtype=F64)
    band = torch.zeros(6, 3, dtype=F64)
    market.step(market.to_action(ask=half_spread + up, bid=half_spread - up, target=0.0, band=band))
    seen = market.observe()[:, 0]
    quotes = market.to_edges(BestResponse(constant_rival(market))(seen)).numpy()[..., None]
    gap = market.gap[1].numpy()[..., None]
    assert (np.abs(gap).max() > 1.0) == (not isinstance(model, dynamics.GBM))
    rivals = market.edges[:, 1:].numpy()[..., None]  # (n, 2, sides, options, 1)

    def profit(d):
        picked = 0.0
        for share, over in ((1 - informed_share, 0.0 * gap), (informed_share, gap)):
            odds = np.exp(-2.0 * (d - over - 1.0))
            others = np.exp(-2.0 * (rivals - over[:, None] - 1.0)).sum(1)
            picked = picked + share * odds / (1.0 + odds + others)
        return picked * (d - gap)

    grid = profit(gap + np.linspace(0.0, 12.0, 12_001))
    best = grid.max(-1)
    crossing = (quotes[:, 0] + quotes[:, 1] < 1e-6)[:, None]  # where the best edges would cross
    ours = profit(quotes)[..., 0]
    assert (ours <= best + 1e-6).all()
    assert (np.abs(ours - best) < 1e-6 * best + 1e-7)[~np.broadcast_to(crossing[..., 0], ours.shape)].all()
    assert crossing.mean() < 0.05


@pytest.mark.parametrize("informed_share", [0.0, 0.5])
@pytest.mark.parametrize("name", ["gbm", "heston"])
def test_best_response_earns_most_where_nothing_is_risked(name, informed_share):
    """Against rivals that never change, no other maker earns more in expectation."""
    model = dynamics.GBM(0.2, HALF_DAYS) if name == "gbm" else dynamics.Heston(dt=HALF_DAYS)
    market = QuotingEnv(512, model, quoted(120, dt=HALF_DAYS), num_steps=20, informed_share=informed_share, **NEUTRAL)
    env = constant_rival(market)
    moves = StepMoves(market)
    glft = makers.glft(market, 1e-6, 0.9)
    others = {
        "constant": makers.constant_spread(market, 0.9),
        "Avellaneda–Stoikov": makers.avellaneda_stoikov(market, 0.25, 0.8),
        "with the smile": makers.with_the_smile(market, glft, moves, 1.0, 0.0),
        "half of the smile": makers.with_the_smile(market, glft, moves, 0.5, 0.0),
        "multi-asset": MultiAsset(env, moves, 1.0, 1.1, 0.8, 0.0),
        "programming": VegaProgramming(env, moves, 1.0, 1.1, 0.8, 0.0),
    }
    best = BestResponse(env)
    env.reset(seed=0)
    assert beside_best(env, best).apart < 2e-3 if name == "gbm" else beside_best(env, best).apart < 0.03
    value = play(env, best)["objective_centred"]
    for label, policy in others.items():
        gain = estimate(value - play(env, policy)["objective_centred"])
        assert gain.mean > 0, label
        assert gain.mean > 3 * gain.se or gain.mean > -1e-3 * value.mean(), label
    scaled = [lambda o, x=x: torch.cat((x * best(o)[:, :10], best(o)[:, 10:]), 1) for x in (0.95, 1.05)]
    for policy in scaled if name == "gbm" else []:
        assert value.mean() > play(env, policy)["objective_centred"].mean()


# RISK AVERSION


def test_without_risk_aversion_all_are_the_best_response():
    env, moves = default_market()
    best = BestResponse(env, moves, 1.1, 0.7, 0.2)
    neutral = [kind(env, moves, 1e-12, 1.1, 0.7, 0.2) for kind in (MultiAsset, VegaProgramming)]
    observation, _ = env.reset(seed=0)
    for _ in range(6):
        expected = best(observation)
        assert (env.env.by_name(expected)["band"] == 0.2).all()
        for policy in neutral:
            off = (policy(observation) - expected).abs()
            assert off.mean() < 1e-4
            assert off.max() < 0.05  # where two edges earn the same, rounding decides
        observation, *_ = env.step(expected)


def test_programming_without_risk_is_the_best_response():
    market = gbm_market(256, **NEUTRAL, options=calls(120, HALF_DAYS), num_steps=20)
    env = constant_rival(market)
    policy = VegaProgramming(env, StepMoves(market), 0.0, 1.0, 1.0, 0.0)
    for step, vega in ((0, 1.0), (10, 3.0), (18, 5.0)):  # no fill leads beyond the grid, which is felt nearby
        assert costs_of(policy, market, step, torch.linspace(-vega, vega, 11)).abs().max() < 1e-3
    env.reset(seed=0)
    assert beside_best(env, policy).apart < 2e-3  # before the first quote the rival's is not known
    still = env.standing_still(1)
    best = best_response(torch.tensor([1.1]), 2.0, 1.0)
    quotes = market.by_name(policy(still.observe_at(5)))
    for side in ("ask", "bid"):
        torch.testing.assert_close(quotes[side], best.expand(1, 5), rtol=1e-4, atol=1e-4)
    assert quotes["target"].abs() < 1e-3
    assert quotes["band"] == 0


@pytest.mark.parametrize("kind", [MultiAsset, VegaProgramming])
def test_inventory_is_charged_for(kind):
    market = gbm_market(1, options=calls(120, HALF_DAYS))
    env = constant_rival(market)
    moves = StepMoves(market)
    policy, averse = (kind(env, moves, risk_aversion, 1.0, 1.0, 0.2) for risk_aversion in (1.0, 2.0))
    still = env.standing_still(9)
    vega = torch.linspace(-2, 2, 9)
    observation = still.observe_at(0, vega)
    state = market.decode(observation)
    costs, more = (x.costs(x.public_terms(state), market.vegas_at(state), observation) for x in (policy, averse))
    assert (costs[4] > 0).all()  # flat, every trade adds risk
    assert (more[4] > costs[4]).all()
    torch.testing.assert_close(costs[:, 0], costs.flip(0)[:, 1], rtol=1e-2, atol=1e-4)  # buying mirrors selling
    assert (costs[:, 0].diff(dim=0) < 0).all()  # the more is held, the more gladly it is sold
    assert (costs[:, 1].diff(dim=0) > 0).all()
    quotes, wider = (market.by_name(x(observation)) for x in (policy, kind(env, moves, 1.0, 1.5, 1.0, 0.2)))
    torch.testing.assert_close(wider["ask"] + wider["bid"], 1.5 * (quotes["ask"] + quotes["bid"]))
    torch.testing.assert_close(wider["ask"] - wider["bid"], quotes["ask"] - quotes["bid"], rtol=1e-4, atol=1e-4)
    assert (quotes["ask"] < quotes["bid"])[5:].all()  # long: sells
    assert (quotes["ask"] > quotes["bid"])[:4].all()
    assert (quotes["band"] == 0.2).all()
    if kind is VegaProgramming:
        assert 0 < averse.value < policy.value
        late = costs_of(policy, market, 59, vega)
        assert (late[:, 0] - late[:, 1]).abs().max() < (costs[:, 0] - costs[:, 1]).abs().max()  # little is left to fear


def test_a_closed_form_tells_options_apart_by_their_risk_and_not_by_vega_alone():
    """What is held in the wing makes the wing's own quotes move most."""
    env, moves = default_market()
    policy = MultiAsset(env, moves, 3.0, 1.0, 1.0, 0.0)
    observation = env.standing_still(1).observe_at(10)
    positions = env.env.columns["positions"]
    flat = env.env.by_name(policy(observation))
    held = observation.clone()
    held[:, positions] = torch.tensor([4.0, 0.0, 0.0, 0.0, 0.0])
    moved = env.env.by_name(policy(held))["ask"] - flat["ask"]
    assert (moved < 0).all()
    assert moved[0].argmin() == 0


def test_programming_predicts_its_value_where_its_assumptions_hold():
    """Far from expiry the spot's moves hardly change the vegas, and hedging is free; so the model is nearly exact."""
    settings = {"num_steps": 20, "risk_aversion": 1e4, "cost_rate": 0.0, "flow_sd": 0.0}
    options = calls(6000, HALF_DAYS, (0.0, 0.1))
    market = gbm_market(4096, options=options, **settings, dtype=F64)
    env = constant_rival(market)
    moves = StepMoves(market)
    policy = VegaProgramming(env, moves, 1e4, 1.0, 1.0, 0.0)
    env.reset(seed=0)
    played = play(env, policy)["objective"]
    neutral = play(env, BestResponse(env))["objective"]
    assert neutral.mean() < 0.8 * played.mean()  # so inventory does matter here
    assert played.mean() == pytest.approx(policy.value, rel=0.03)
    closed = play(env, MultiAsset(env, moves, 1e4, 1.0, 1.0, 0.0))["objective"]
    assert closed.mean() == pytest.approx(played.mean(), rel=0.02)


def test_programming_predicts_its_value_in_heston_too():
    """With both kinds of takers, where nothing is risked: the value is the best response's."""
    market = QuotingEnv(1024, options=quoted(120, dt=HALF_DAYS), num_steps=10, flow_sd=0.0, **NEUTRAL)
    env = constant_rival(market)
    policy = VegaProgramming(env, StepMoves(market), 0.0, 1.0, 1.0, 0.0)
    env.reset(seed=0)
    played = play(env, policy)["objective_centred"]
    assert played.mean() == pytest.approx(policy.value, rel=0.03)


def test_those_who_know_the_smile_beat_those_who_do_not():
    """In the default market, with parameters that nobody has tuned."""
    env, moves = default_market()
    market = env.env
    env.reset(seed=0)
    glft = makers.minimum_variance_band(market, makers.glft(market, 1.2, 0.8), 0.15)
    base = play(env, glft)["objective_centred"]
    for kind in (MultiAsset, VegaProgramming):
        gain = estimate(play(env, kind(env, moves, 3.0, 1.1, 0.8, 0.15))["objective_centred"] - base)
        assert gain.low > 1.0, kind.__name__


def test_what_rivals_quote_without_inventory():
    env, _ = default_market()
    edges = rival_edges(env)
    assert edges.shape == (60, 2, 5, 1)
    assert edges.dtype == F64
    still = env.standing_still(1)
    rival = env.rivals[0](still.observe_at(0))
    torch.testing.assert_close(edges[0, :, :, 0].float(), env.env.to_edges(rival)[0], rtol=1e-4, atol=1e-4)
    assert (edges[1:] <= edges[:-1]).all()  # the risk that is left falls with time
