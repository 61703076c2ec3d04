"""The Bermudan of the calibration game: its value, and what a policy of its task has learnt."""

import pytest
import torch

from envs.benchmark.calibration import jackknife
from envs.calibration.bermudan import bermudan
from envs.calibration.game import EXERCISE_DAY, CalibrationGame, play, sample
from envs.market import smiles

SP500 = smiles.SURFACES["sp500-2018"]


def test_bermudan_of_local_volatility():
    """reference.md: switch value about 1.3 to 1.4 vol points; the fake cashflows telescope to the option's own."""
    game = CalibrationGame(SP500, 2**14, task="bermudan", state="path-dependent")
    assert game.strike_t2 == pytest.approx(1.013996, abs=2e-6)
    value = bermudan(game, sample(game, CalibrationGame.step_dupire, 2**17, 4))
    assert 1.2 < value.switch_value < 1.45
    assert value.floor <= value.price <= value.price_in_sample + 2e-5
    assert value.floor == pytest.approx(0.0106646, rel=0.03)
    error = jackknife(value.switch_value, value.without).se
    assert 0 < error < 0.1
    play(game, CalibrationGame.step_dupire, 4)
    cashflows = game.bermudan_cashflows()
    assert cashflows.shape == (52, 1, 2**14)
    assert torch.equal(cashflows[0], cashflows[EXERCISE_DAY])
    assert cashflows[-1].mean().item() == pytest.approx(game.bermudan_paid().mean().item(), rel=0.01)
    assert cashflows[-1].mean().item() == pytest.approx(value.price, rel=0.02)
