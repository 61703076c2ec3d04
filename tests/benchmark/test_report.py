"""Intervals, shares, and the report with its verdict."""

import json

import numpy as np
import pytest

from envs.benchmark import report


def test_interval_covers_the_mean():
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        interval = report.estimate(generator.normal(1.0, 2.0, 200))
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
            interval = report.estimate(windows, block)
            covered[block] += interval.low < 0 < interval.high
    assert covered[1] / 60 < 0.5
    assert covered[60] / 60 > 0.85


def test_gap_closed():
    generator = np.random.default_rng(0)
    market = generator.normal(0, 5.0, 10_000)  # common to all
    optimum, baseline = market + 1.0, market + generator.normal(0, 0.1, 10_000)
    agent = optimum - 0.02 + generator.normal(0, 0.01, 10_000)
    share = report.gap_closed(agent, baseline, optimum)
    assert share.mean == pytest.approx(0.98, abs=1e-3)
    assert share.se < 1e-3
    assert report.gap_closed(optimum, baseline, optimum).mean == 1.0
    assert report.gap_closed(baseline, baseline, optimum).mean == 0.0


def test_verdict_and_report(tmp_path):
    rng = np.random.default_rng(0)
    measures = ("objective", "pnl", "cost", "turnover", "net_delta")
    played = {name: {m: rng.normal(level, 1, 1000) for m in measures} for name, level in (("agent", 1), ("rival", 0))}
    result = report.compare("title", {"seed": 1}, played, "agent")
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
    summary = report.summarise({m: np.arange(100.0) for m in measures})
    assert summary["cvar95"] == 2.0  # mean of 0 … 4
    assert summary["pnl_sd"] == pytest.approx(np.arange(100.0).std(ddof=1))
