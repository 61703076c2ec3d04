"""Stochastic local volatility: forward-start options, and Heston's dynamics under localisation."""

import math

import pytest
import torch

from envs.calibration import slv
from envs.calibration.game import CalibrationGame, judged, play, sample
from envs.market import smiles

HESTON = smiles.SURFACES["heston"]


def game_of(num_players, **settings):
    kind = {"task": "slv", "state": "non-path-dependent", "action_map": "stochastic"}
    return CalibrationGame(HESTON, num_players, **{**kind, **settings})


def test_forward_starts_of_the_model_and_of_local_volatility():
    """Heston's own dynamics have its forward smiles, but for the daily grid; local volatility only its vanillas."""
    game = game_of(2**15)
    assert game.forward_days == [(10, 30), (21, 41), (31, 51)]
    sizes = {}
    for name, step in {"Heston": slv.heston_step, "Dupire": CalibrationGame.step_dupire}.items():
        paths = sample(game, step, 2**17, 1)
        vanillas = judged(game.volatility_errors(paths.prices.mean(0)))
        forward = game.forward_volatility_errors(paths.forward_prices.mean(0))
        sizes[name] = float(forward.abs().max())
        assert vanillas.square().mean().sqrt() < 0.13
    assert sizes["Heston"] < 0.35
    assert sizes["Dupire"] > 0.6


def test_constant_volatility_has_flat_forward_smiles():
    game = game_of(2**16)
    play(game, CalibrationGame.step_constant, 1)
    volatility = game.forward_volatility_errors(game.forward_prices(game.log_spots))[0] / 100 + game.forward_volatility
    assert 100 * (volatility - game.constant_volatility).abs().max() < 0.35


def test_reference_takes_out_what_the_sample_is_off_by(monkeypatch):
    monkeypatch.setattr("envs.calibration.game.REFERENCE_PATHS", 2**14)
    game = game_of(2000, reference="local-vol")
    play(game, CalibrationGame.step_dupire, 3)
    torch.testing.assert_close(game.forward_errors()[0], game.reference_forward_errors, atol=1e-3, rtol=0)
    assert torch.equal(game.like(num_runs=2).reference_forward_errors, game.reference_forward_errors)


def test_rewards_are_settled_where_the_options_expire():
    game = game_of(100)
    errors = torch.zeros(2, 3, 7).double()
    errors[0, 1] = 0.5
    rewards = game.shared_rewards(errors)
    assert rewards.shape == (2, 51)
    assert rewards[0, 40].item() == pytest.approx(-0.25)
    assert rewards.count_nonzero() == 1


def test_dynamics_of_volatility():
    """η and ρ of Heston's √v are ξ/(2√E[v]) and its correlation; with the bound off in a calm model, closely."""
    found = slv.volatility_dynamics(game_of(100), slv.heston_step)
    truth = slv.heston_dynamics(game_of(100))
    assert truth == (pytest.approx(1.25), -0.7)
    assert found.eta == pytest.approx(truth.eta, rel=0.05)
    assert found.rho == pytest.approx(truth.rho, abs=0.04)
    # The same of a map with constant η and ρ, whose leverage is a function of (t, S)
    constant = slv.volatility_dynamics(
        game_of(100), lambda game: game.step(torch.tensor((0.0, math.log(0.5), 0.0)).expand(*game.state[0].shape, 3))
    )
    assert -0.75 < constant.rho < -0.4  # ρ is 0 in the map: what there is comes from the vanillas' skew
    assert constant.eta > 0.9


def test_a_smile_without_forward_starts():
    with pytest.raises(ValueError, match="smile has vanillas alone, no forward-start options"):
        CalibrationGame(smiles.SURFACES["sp500-2018"], 100, task="slv")
