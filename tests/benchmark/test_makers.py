"""The classical makers, tuned."""

import pytest
import torch
from common import INVENTED, quoted

from envs import QuotingEnv
from envs.baselines import makers as formulas
from envs.benchmark import makers
from envs.benchmark.contest import play
from envs.market import dynamics
from envs.market.moves import StepMoves
from envs.optimum.makers import MultiAsset, VegaProgramming
from envs.run.errors import UsageError
from envs.run.seeds import TUNING_SEED


def gbm_market(num_envs, **settings) -> QuotingEnv:
    return QuotingEnv(num_envs, dynamics.GBM(0.2, 1 / 504), **settings)


@pytest.mark.slow
def test_tuning_is_repeatable_and_beats_its_neighbours():
    market = QuotingEnv(32, num_steps=4)
    tuned = makers.classical_makers(market)
    assert makers.classical_makers(market).parameters == tuned.parameters
    assert set(tuned.parameters) == {*tuned.policies, makers.RIVAL}
    env = tuned.env
    env.reset(seed=TUNING_SEED)
    a, k = tuned.parameters["GLFT, tuned"]
    best = play(env, tuned.policies["GLFT, tuned"])["objective_centred"].mean()
    fine = makers.COARSE_TO_FINE[-1]
    for x, y in (
        (a * fine, k),
        (a / fine, k),
        (a, k * fine),
        (a, k / fine),
        (a * fine, k / fine),
        (a / fine, k * fine),
    ):
        assert play(env, formulas.glft(market, x, y))["objective_centred"].mean() <= best
    assert set(tuned.parameters) == set(INVENTED)
    for name in makers.KNOWING:  # the model, and so it pays to believe in some of the smile
        assert len(tuned.parameters[name]) == 4
        assert tuned.parameters[name][2] > 0
    wide = makers.classical_makers(market, rival_spread=1.5, rival_risk_aversion=2.0)
    a, k, spread = tuned.parameters[makers.RIVAL]
    assert wide.parameters[makers.RIVAL] == (2 * a, k, 1.5 * spread)


def test_without_risk_the_rivals_quote_the_nash_edge():
    market = gbm_market(512, risk_aversion=0.0, cost_rate=0.0, num_steps=20)
    tuned = makers.classical_makers(market)
    quotes = market.by_name(tuned.env.rivals[0](tuned.env.standing_still(1).observe_at(3)))
    for side in ("ask", "bid"):
        assert quotes[side][0].tolist() == [pytest.approx(0.7995, rel=0.08)] * 5  # the grid's step
    assert (quotes["ask"] - quotes["bid"]).abs().max() < 2e-4
    assert not {makers.MULTI_ASSET, makers.VEGA_DP} & set(tuned.policies)  # they are the best response
    assert {makers.AS_SMILE, makers.GLFT_SMILE} < set(tuned.policies)
    assert tuned.parameters[makers.GLFT_SMILE][0] == makers.RISK_NEUTRAL


def test_every_maker_has_its_formula_and_parameters():
    market = QuotingEnv(32, options=quoted(24, dt=1 / 504), num_steps=12)
    found = makers.assemble(market, INVENTED, "invented")
    assert found.parameters == INVENTED
    assert set(found.policies) == set(INVENTED) - {makers.RIVAL}
    env, moves = found.env, StepMoves(market)
    glft = formulas.glft(market, 1.2, 0.8)
    named = formulas.avellaneda_stoikov(market, 0.25, 0.8)
    expected = {
        makers.AVELLANEDA_STOIKOV: named,
        makers.CONSTANT_SPREAD: formulas.constant_spread(market, 2.0),
        makers.GLFT: glft,
        makers.BELIEVER_BAND: formulas.minimum_variance_band(market, glft, 0.15),
        makers.AS_SMILE: formulas.with_the_smile(market, named, moves, 0.6, 0.1),
        makers.GLFT_SMILE: formulas.with_the_smile(market, glft, moves, 0.4, 0.2),
        makers.MULTI_ASSET: MultiAsset(env, moves, 3.0, 1.1, 0.8, 0.15),
        makers.VEGA_DP: VegaProgramming(env, moves, 2.0, 1.2, 0.9, 0.12),
    }
    observation, _ = env.reset(seed=0)
    for _ in range(4):
        for name, policy in expected.items():
            assert torch.equal(found.policies[name](observation), policy(observation)), name
        assert torch.equal(env.rivals[0](observation), named(observation))
        observation, *_ = env.step(found.policies[makers.MULTI_ASSET](observation))
    with pytest.raises(ValueError, match="no maker is called 'nobody'"):
        makers.classical_maker("nobody", env, (1.0, 1.0, 1.0, 1.0), moves)


def test_parameters_of_other_makers_are_refused():
    """As those of a run from before every option had its quotes."""
    market = QuotingEnv(2, num_steps=3, fair_marks=False)
    for known in (
        {makers.RIVAL: (0.25, 0.8), "inventory dynamic programming, tuned": (1.0, 0.1, 0.2)},
        {makers.RIVAL: (0.25, 0.8), makers.MULTI_ASSET: (3.0, 1.1)},
        {makers.AVELLANEDA_STOIKOV: (0.25, 0.8)},
        {makers.RIVAL: None},
    ):
        with pytest.raises(UsageError, match="its makers have other parameters"):
            makers.classical_makers(market, known=known)


def test_a_market_is_described_by_all_that_makers_are_tuned_for():
    def described(**settings):
        return makers.describe(QuotingEnv(**{"num_steps": 3, "fair_marks": False, **settings}))

    usual = described()
    assert usual == described(num_envs=7, privileged=True, dtype=torch.float64)
    for settings in (
        {"informed_share": 0.3}, {"options": quoted(8, dt=1 / 504)}, {"fair_marks": True}, {"num_makers": 3},
        {"options": quoted(6, 8, dt=1 / 504)}, {"dynamics": dynamics.Heston(0.05, dt=1 / 504)}, {"arrival_rate": 1.0},
    ):  # fmt: skip
        assert described(**settings) != usual, settings
    puts = [option._replace(is_call=False) for option in QuotingEnv(num_steps=3, fair_marks=False).options]
    assert described(options=puts) != usual
    assert "100C6" in usual
