"""The benchmark of phase 0: errors, intervals, and the verdict."""

import math

import pytest
import torch
from common import check_margins

from envs.benchmark import calibration
from envs.calibration.exotic import Dependence
from envs.calibration.game import CalibrationGame
from envs.calibration.slv import VolatilityDynamics
from envs.market import smiles

SP500 = smiles.SURFACES["sp500-2018"]
HESTON = smiles.SURFACES["heston"]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_jackknife_is_the_usual_error_of_a_mean():
    sample = torch.randn(12, generator=generator(), dtype=torch.float64)
    without = (sample.sum() - sample) / 11
    estimate = calibration.jackknife(sample.mean(), without)
    assert estimate.se == pytest.approx(float(sample.std() / 12**0.5))


def test_judged_smile():
    game = CalibrationGame(SP500, 100)
    steps = {
        "agent": CalibrationGame.step_dupire,
        calibration.DUPIRE: CalibrationGame.step_dupire,
        calibration.CONSTANT: CalibrationGame.step_constant,
    }
    outcome = {
        name: calibration.calibrate(calibration.benchmark_paths(game, step, 120_000).prices, game.volatility_errors)
        for name, step in steps.items()
    }
    result = calibration.judge_smile("smile", {"paths": 120_000}, outcome)
    assert result.advantages[calibration.DUPIRE].mean == 0
    assert result.rows[calibration.DUPIRE]["rmse"] < 0.2 < 3 < result.rows[calibration.CONSTANT]["rmse"]
    failed = {criterion.name for criterion in result.criteria if not criterion.passed}
    assert "has 1,000,000 paths or more" in failed
    assert "beats constant volatility" not in failed
    assert "its RMSE − agent's" in result.table()


def test_judged_slv():
    """Forward starts within 0.1 everywhere, vanillas within 0.12; the true η and ρ beside those of the models."""
    game = CalibrationGame(HESTON, 100, task="slv", state="non-path-dependent", action_map="stochastic")

    def errors(size, rows, columns):
        each = torch.full((rows, columns), size, dtype=torch.float64)
        return calibration.Calibration(each, each.expand(12, -1, -1))

    def judged(forward, vanillas):
        fits = {"agent": errors(vanillas, len(game.days), 11), calibration.DUPIRE: errors(0.1, len(game.days), 11)}
        starts = {"agent": errors(forward, 3, 7), calibration.DUPIRE: errors(0.4, 3, 7)}
        moves = {name: VolatilityDynamics(1.2, -0.6) for name in fits}
        result = calibration.judge_slv("slv", {"paths": 2**20}, game, fits, starts, moves)
        check_margins(result)
        return result, [criterion.passed for criterion in result.criteria]

    result, passed = judged(0.09, 0.11)
    assert passed == [True] * 4
    assert result.settings["true η, ρ"] == "1.250, -0.700"
    assert result.advantages[calibration.DUPIRE].mean == pytest.approx(0.31)
    assert judged(0.11, 0.11)[1] == [True, False, True, True]
    assert judged(0.09, 0.13)[1] == [True, True, False, True]
    assert judged(0.5, 0.11)[1] == [False, False, True, True]


def judged_exotic(monkeypatch, agent, objective="min", target=None, **settings):
    """The verdict on invented prices: (price, upper) of the agent above a European of 107 bp; Dupire has 131."""
    monkeypatch.setattr(calibration, "NUM_NODES", 41)
    game = CalibrationGame(SP500, 100, task="exotic", **{"state": "path-dependent", **settings})
    errors = torch.full((len(game.days), 11), 0.1, dtype=torch.float64)
    vanillas = calibration.Calibration(errors, errors.expand(12, -1, -1))

    def priced(price, upper, floor=107e-4):
        without = torch.tensor([[price, floor]], dtype=torch.float64).repeat(12, 1)
        return calibration.PricedExotic(price, upper, floor, without, vanillas)

    played = {"agent": priced(*agent), calibration.DUPIRE: priced(131e-4, 131e-4)}
    learnt = Dependence(*[torch.zeros(1)] * 4, (0.3, -0.3), 1.0)
    result = calibration.judge_exotic("exotic", {"paths": 2**20}, game, played, learnt, objective, target)
    return result, {criterion.name.split()[0]: criterion.passed for criterion in result.criteria}


def test_judged_exotic(monkeypatch):
    """Min: the share of the way is judged by the upper side of the price. Target: by the price. Local: by Dupire's."""
    result, passed = judged_exotic(monkeypatch, (109e-4, 110e-4))
    (share,) = result.shares.values()
    assert share.mean == pytest.approx(1 - 2 / 24, abs=1e-3)
    assert result.criteria[0].detail == "at least 87.5 %"
    assert all(passed.values())
    _, passed = judged_exotic(monkeypatch, (109e-4, 115e-4))
    assert not passed["85"]
    _, passed = judged_exotic(monkeypatch, (106e-4, 107e-4))
    assert not passed["not"]  # below the European
    result, _ = judged_exotic(monkeypatch, (160e-4, 161e-4), "max")
    (share,) = result.shares.values()
    assert 0.6 < share.mean < 0.9
    for price, right in ((120.3e-4, True), (120.5e-4, False)):
        result, passed = judged_exotic(monkeypatch, (price, price), "target", 120e-4)
        assert passed["price"] == right
        assert not result.shares
    _, passed = judged_exotic(monkeypatch, (129e-4, 129e-4), state="local")
    assert not passed["price"]
    result, _ = judged_exotic(monkeypatch, (110e-4, math.nan), days=(21, 36, 51))  # no bound, no upper side
    assert not result.shares
    assert "at most" not in result.table()
