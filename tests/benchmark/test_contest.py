"""Playing fresh episodes, tuning, and watching a policy while it learns."""

import numpy as np
import pytest
import torch
from common import SP500_GARCH

from envs import HedgingEnv
from envs.baselines import hedgers
from envs.benchmark import contest
from envs.benchmark.contest import Contest, Validation, play, play_fresh, tune
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
    np.testing.assert_allclose(played["objective"], total.numpy(), rtol=1e-5, atol=1e-6)


def test_tuning_stays_within_bounds_where_there_is_no_optimum():
    """The wider, the better: the search ends at `MOST` times its start."""
    env = HedgingEnv(16, cost_rate=0.5, risk_aversion=0.0)
    env.reset(seed=0)
    (width,) = tune(env, lambda width: hedgers.constant_band(env, width), [1e-4], ratios=(3.0,))
    assert 1e-4 * contest.MOST / 3 <= width <= 1e-4 * contest.MOST


def test_validation_is_the_objective_less_what_no_policy_can_change():
    env = HedgingEnv(2048)
    delta, band = hedgers.black_scholes_delta(env), hedgers.constant_band(env, 0.05)
    wide = hedgers.constant_band(env, 0.5)
    validate = Validation(env, delta, "Black–Scholes", best=band)
    assert validate(delta)["charts/gain_over_black_scholes"] == 0
    assert validate(delta)["charts/share_of_gap_closed"] == 0
    metrics = validate(band)
    assert metrics["charts/share_of_gap_closed"] == pytest.approx(1)
    assert metrics["charts/gain_over_black_scholes"] > 0
    assert validate.describe(metrics).endswith(" (100.0 % of what is possible)")
    assert validate(band) == metrics  # the same episodes every time
    assert "charts/share_of_gap_closed" not in Validation(env, delta, "Black–Scholes")(band)
    assert "charts/share_of_gap_closed" not in Validation(env, delta, "Black–Scholes", best=delta)(band)
    raw = play(env, band)["objective"]
    centred = play(env, band)["objective_centred"]
    assert centred.std() < 0.8 * raw.std()
    difference = estimate(raw - centred)
    assert difference.low < 0 < difference.high
    assert validate(wide)["charts/objective"] < metrics["charts/objective"]


def test_a_gain_is_a_share_of_a_baseline_that_earns():
    validate = Validation(HedgingEnv(16), lambda observation: torch.zeros(16, 2), "Avellaneda–Stoikov")
    assert validate.gain == "charts/gain_over_avellaneda_stoikov"
    for objective, expected in ((1.5, "gain over Avellaneda–Stoikov +0.5000 (+50.0 %)"),
                                (0.5, "gain over Avellaneda–Stoikov +0.5000")):  # fmt: skip
        metrics = {"charts/objective": objective, "charts/gain_over_avellaneda_stoikov": 0.5}
        assert validate.describe(metrics) == expected


def test_windows_that_do_not_overlap():
    env = HedgingEnv(1, num_steps=30)
    played = {"agent": {"objective": np.arange(100.0), "pnl": -np.arange(100.0)}}
    whole = Contest("title", {}, played, {}, "", False, 60, {"windows": "all"}, env)
    apart = whole.non_overlapping()
    assert apart.played["agent"]["objective"].tolist() == [0.0, 30.0, 60.0, 90.0]
    assert apart.played["agent"]["pnl"].tolist() == [0.0, -30.0, -60.0, -90.0]
    assert (apart.block, apart.title) == (1, "title, non-overlapping windows")
    assert apart.settings == whole.settings
    assert len(whole.played["agent"]["pnl"]) == 100
