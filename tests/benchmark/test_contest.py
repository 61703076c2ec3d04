"""Playing fresh episodes, tuning, and watching a policy while it learns."""

import numpy as np
import pytest
import torch
from common import SP500_GARCH

from envs import HedgingEnv
from envs.baselines import hedgers
from envs.benchmark.contest import play, play_fresh, tune
from envs.benchmark.report import compare, estimate
from envs.market import dynamics


def test_contestants_meet_the_same_market_and_copies_tie():
    env = HedgingEnv(256)
    band = hedgers.constant_band(env, 0.05)
    contestants = {
        "agent": band,
        "copy": hedgers.constant_band(env, 0.05),
        "delta": hedgers.black_scholes_delta(env),
    }
    played = play_fresh(env, contestants, episodes=600, seed=5)
    assert len(played["agent"]["pnl"]) == 600
    assert np.array_equal(played["agent"]["objective"], played["copy"]["objective"])
    alone = play_fresh(env, {"delta": contestants["delta"]}, episodes=600, seed=5)
    assert np.array_equal(alone["delta"]["objective"], played["delta"]["objective"])
    other = play_fresh(env, {"delta": contestants["delta"]}, episodes=600, seed=6)
    assert not np.array_equal(other["delta"]["objective"], played["delta"]["objective"])


def test_pairing_narrows_the_interval():
    env = HedgingEnv(8192)
    contestants = {"agent": hedgers.constant_band(env, 0.05), "delta": hedgers.black_scholes_delta(env)}
    played = play_fresh(env, contestants, 8192, seed=0)
    result = compare("t", {}, played, "agent")
    assert result.advantages["delta"].se < 0.75 * result.rows["delta"]["objective_se"]


@pytest.mark.parametrize("start", [0.001, 0.04, 1.0])
def test_tuning_finds_the_same_interior_optimum_from_anywhere(start):
    env = HedgingEnv(4096)
    env.reset(seed=0)

    def value(width):
        return play(env, hedgers.constant_band(env, width))["objective_centred"].mean()

    (best,) = tune(env, lambda width: hedgers.constant_band(env, width), [start])
    assert 0.02 < best < 0.1
    assert value(best) > max(value(best * 1.3), value(best / 1.3))


def test_reference_levels_of_tuned_bands():
    """reference.md: Whalley–Wilmott tuned −0.325 in gbm, −0.395 in garch."""
    for model, reference in ((dynamics.GBM(), -0.325), (SP500_GARCH, -0.395)):
        env = HedgingEnv(100_000, model)
        env.reset(seed=0)
        small = HedgingEnv(8192, model)
        small.reset(seed=1)
        (tuned,) = tune(small, lambda a, small=small: hedgers.whalley_wilmott(small, a), [1.0])
        ours = estimate(play(env, hedgers.whalley_wilmott(env, tuned))["objective"])
        assert abs(ours.mean - reference) < 2 * np.hypot(ours.se, 0.003)


def test_play_sums_the_raw_reward():
    env = HedgingEnv(64)
    env.reset(seed=0)
    played = play(env, hedgers.black_scholes_delta(env))
    env.replay()
    total = sum(env.step(torch.zeros(64, 2))[1] for _ in range(30))
    np.testing.assert_allclose(played["objective"], total.numpy(), rtol=1e-6)
