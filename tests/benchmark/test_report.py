import json

import numpy as np
import pytest
import torch
from conftest import SP500_GARCH

from envs import HedgingEnv, baselines, benchmark, dynamics


def test_contestants_meet_the_same_market_and_copies_tie():
    env = HedgingEnv(256)
    band = baselines.constant_band(env, 0.05)
    contestants = {
        "agent": band,
        "copy": baselines.constant_band(env, 0.05),
        "delta": baselines.black_scholes_delta(env),
    }
    played = benchmark.evaluate(env, contestants, episodes=600, seed=5)
    assert len(played["agent"]["pnl"]) == 600
    assert np.array_equal(played["agent"]["objective"], played["copy"]["objective"])
    alone = benchmark.evaluate(env, {"delta": contestants["delta"]}, episodes=600, seed=5)
    assert np.array_equal(alone["delta"]["objective"], played["delta"]["objective"])
    other = benchmark.evaluate(env, {"delta": contestants["delta"]}, episodes=600, seed=6)
    assert not np.array_equal(other["delta"]["objective"], played["delta"]["objective"])


def test_pairing_narrows_the_interval():
    env = HedgingEnv(8192)
    contestants = {"agent": baselines.constant_band(env, 0.05), "delta": baselines.black_scholes_delta(env)}
    played = benchmark.evaluate(env, contestants, 8192, seed=0)
    result = benchmark.compare("t", {}, played, "agent")
    assert result.advantages["delta"].se < 0.75 * result.rows["delta"]["objective_se"]


def test_interval_covers_the_mean():
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        interval = benchmark.estimate(generator.normal(1.0, 2.0, 200))
        covered += interval.low < 1.0 < interval.high
    assert 0.92 < covered / 400 < 0.98


def test_block_bootstrap_respects_overlapping_windows():
    """Sums over overlapping windows of white noise: the block interval covers, the naive one is far too narrow."""
    generator = np.random.default_rng(0)
    covered = {1: 0, 60: 0}
    for _ in range(60):
        noise = generator.normal(size=1029)
        windows = np.convolve(noise, np.ones(30), "valid")
        for block in covered:
            interval = benchmark.estimate(windows, block)
            covered[block] += interval.low < 0 < interval.high
    assert covered[1] / 60 < 0.5
    assert covered[60] / 60 > 0.85


def test_gap_closed():
    generator = np.random.default_rng(0)
    market = generator.normal(0, 5.0, 10_000)  # common to all
    optimum, baseline = market + 1.0, market + generator.normal(0, 0.1, 10_000)
    agent = optimum - 0.02 + generator.normal(0, 0.01, 10_000)
    share = benchmark.gap_closed(agent, baseline, optimum)
    assert share.mean == pytest.approx(0.98, abs=1e-3)
    assert share.se < 1e-3
    assert benchmark.gap_closed(optimum, baseline, optimum).mean == 1.0
    assert benchmark.gap_closed(baseline, baseline, optimum).mean == 0.0


@pytest.mark.parametrize("start", [0.001, 0.04, 1.0])
def test_tuning_finds_the_same_interior_optimum_from_anywhere(start):
    env = HedgingEnv(4096)
    env.reset(seed=0)

    def value(width):
        return benchmark.play(env, baselines.constant_band(env, width))["objective_centred"].mean()

    (best,) = benchmark.tune(env, lambda width: baselines.constant_band(env, width), [start])
    assert 0.02 < best < 0.1
    assert value(best) > max(value(best * 1.3), value(best / 1.3))


def test_reference_levels_of_tuned_bands():
    """reference.md: Whalley–Wilmott tuned −0.325 in gbm, −0.395 in garch."""
    for model, reference in ((dynamics.GBM(), -0.325), (SP500_GARCH, -0.395)):
        env = HedgingEnv(100_000, model)
        env.reset(seed=0)
        small = HedgingEnv(8192, model)
        small.reset(seed=1)
        (tuned,) = benchmark.tune(small, lambda a, small=small: baselines.whalley_wilmott(small, a), [1.0])
        ours = benchmark.estimate(benchmark.play(env, baselines.whalley_wilmott(env, tuned))["objective"])
        assert abs(ours.mean - reference) < 2 * np.hypot(ours.se, 0.003)


def test_verdict_and_report(tmp_path):
    rng = np.random.default_rng(0)
    measures = ("objective", "pnl", "cost", "turnover", "net_delta")
    played = {name: {m: rng.normal(level, 1, 1000) for m in measures} for name, level in (("agent", 1), ("rival", 0))}
    result = benchmark.compare("title", {"seed": 1}, played, "agent")
    result.require_advantage("rival")
    assert result.passed
    assert result.verdict().endswith("BENCHMARK PASSED")
    result.require("is better than perfect", False, "it is not")
    assert not result.passed
    assert result.verdict().endswith("BENCHMARK FAILED: is better than perfect")
    result.write(tmp_path)
    content = json.loads((tmp_path / "benchmark.json").read_text())
    assert content["passed"] is False
    assert content["rows"]["agent"]["objective"] == pytest.approx(played["agent"]["objective"].mean())
    assert "BENCHMARK FAILED" in (tmp_path / "benchmark.md").read_text()
    summary = benchmark.summarise({m: np.arange(100.0) for m in measures})
    assert summary["cvar95"] == 2.0  # mean of 0 … 4
    assert summary["pnl_sd"] == pytest.approx(np.arange(100.0).std(ddof=1))


def test_play_sums_the_raw_reward():
    env = HedgingEnv(64)
    env.reset(seed=0)
    played = benchmark.play(env, baselines.black_scholes_delta(env))
    env.replay()
    total = sum(env.step(torch.zeros(64, 2))[1] for _ in range(30))
    np.testing.assert_allclose(played["objective"], total.numpy(), rtol=1e-6)
