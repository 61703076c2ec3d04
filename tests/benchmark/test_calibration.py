"""The benchmark of phase 0: errors, intervals, and the verdict."""

import pytest
import torch

from envs.benchmark import calibration
from envs.calibration.game import CalibrationGame
from envs.market import smiles

SP500 = smiles.SURFACES["sp500-2018"]


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
        name: calibration.calibrate(game, calibration.benchmark_paths(game, step, 120_000))
        for name, step in steps.items()
    }
    result = calibration.judge_smile("smile", {"paths": 120_000}, outcome)
    assert result.advantages[calibration.DUPIRE].mean == 0
    assert result.rows[calibration.DUPIRE]["rmse"] < 0.2 < 3 < result.rows[calibration.CONSTANT]["rmse"]
    failed = {criterion.name for criterion in result.criteria if not criterion.passed}
    assert "has 1,000,000 paths or more" in failed
    assert "beats constant volatility" not in failed
    assert "its RMSE − agent's" in result.table()
