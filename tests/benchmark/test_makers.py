"""The classical makers, tuned."""

import pytest

from envs import QuotingEnv
from envs.baselines import makers as formulas
from envs.benchmark import makers
from envs.benchmark.contest import play
from envs.market import dynamics
from envs.run.seeds import TUNING_SEED


def gbm_market(num_envs, **settings) -> QuotingEnv:
    return QuotingEnv(num_envs, dynamics.GBM(0.2, 1 / 504), **settings)


@pytest.mark.slow
def test_tuning_is_repeatable_and_beats_its_neighbours():
    market = QuotingEnv(32, num_steps=4, expiry=8)
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
    wide = makers.classical_makers(market, rival_spread=1.5, rival_risk_aversion=2.0)
    a, k, spread = tuned.parameters[makers.RIVAL]
    assert wide.parameters[makers.RIVAL] == (2 * a, k, 1.5 * spread)


def test_without_risk_the_rivals_quote_the_nash_edge():
    market = gbm_market(512, risk_aversion=0.0, cost_rate=0.0, num_steps=20, expiry=40)
    tuned = makers.classical_makers(market)
    action = tuned.env.rivals[0](tuned.env.standing_still(1).observe_at(3))
    assert action[0, 0] == pytest.approx(0.7995, rel=0.08)  # the grid's step
    assert action[0, 1].abs() < 1e-4
