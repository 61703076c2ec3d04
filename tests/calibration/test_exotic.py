"""The value of an exotic, its bounds, and what a policy has learnt."""

import math

import pytest
import torch

from envs.benchmark.calibration import jackknife, market_floor, price_bound
from envs.calibration import exotic
from envs.calibration.exotic import nested_gain, switch_values, value_exotic
from envs.calibration.game import CalibrationGame, play, sample
from envs.market import smiles

SP500 = smiles.SURFACES["sp500-2018"]


def test_bermudan_of_local_volatility(monkeypatch):
    """reference.md: switch value about 1.3 to 1.4 vol points; the fake cashflows telescope to the option's own."""
    game = CalibrationGame(SP500, 2**14, task="exotic", state="path-dependent")
    assert game.payoff.strikes[1] == pytest.approx(1.013996, abs=2e-6)
    paths = sample(game, CalibrationGame.step_dupire, 2**17, 4)
    value = value_exotic(paths)
    switch = float(switch_values(game, torch.tensor([value.price, value.floor])))
    assert 1.2 < switch < 1.45
    assert value.floor == pytest.approx(0.0106646, rel=0.03)
    error = jackknife(value.price, value.without[:, 0]).se
    assert 0 < error < 1e-4
    # Two sides of the price: the nested one is not below
    monkeypatch.setattr(exotic, "NESTED_STATES", 128)
    monkeypatch.setattr(exotic, "NESTED_PATHS", 1024)
    upper = float(paths.exercises[0].double().mean()) + nested_gain(game, CalibrationGame.step_dupire)
    assert value.price - 3 * error < upper < value.price + 1.5e-4
    play(game, CalibrationGame.step_dupire, 4)
    cashflows = game.exotic_cashflows()
    assert cashflows.shape == (52, 1, 2**14)
    assert cashflows[-1].mean().item() == pytest.approx(game.exotic_paid().mean().item(), rel=0.01)
    assert cashflows[-1].mean().item() == pytest.approx(value.price, rel=0.02)


def test_nested_bound_is_above_the_price_and_tightens(monkeypatch):
    """Jensen: with few paths from each state it is far above, with more it comes down, never below the price."""
    game = CalibrationGame(SP500, 2**14, task="exotic", state="path-dependent")
    monkeypatch.setattr(exotic, "VALIDATION_PATHS", 2**14)
    gains = []
    for paths, states in ((8, 2048), (64, 512), (512, 128)):
        monkeypatch.setattr(exotic, "NESTED_PATHS", paths)
        monkeypatch.setattr(exotic, "NESTED_STATES", states)
        gains.append(nested_gain(game, CalibrationGame.step_dupire))
    assert gains[0] > gains[1] + 1e-4 > gains[2] + 1e-4
    assert gains[2] == pytest.approx(0.00240, abs=4e-4)  # 131 bp less the European's 107


def test_control_variate_of_the_price(monkeypatch):
    """Local volatility's own price is right on any increments once its sampling error is taken out."""
    monkeypatch.setattr("envs.calibration.game.REFERENCE_PATHS", 2**17)
    game = CalibrationGame(SP500, 2000, task="exotic", state="path-dependent", reference="local-vol")
    for seed in (1, 2):
        play(game, CalibrationGame.step_dupire, seed)
        corrected = game.exotic_paid().mean() - game.exotic_sampling_error()
        assert float(corrected) == pytest.approx(game.reference_price, rel=1e-4)


@pytest.mark.parametrize("payoff", ["bermudan-call", "bermudan-put", "forward-start-call"])
def test_local_volatility_is_between_the_bounds_of_all_models(payoff, monkeypatch):
    monkeypatch.setattr("envs.benchmark.calibration.NUM_NODES", 41)
    game = CalibrationGame(SP500, 2**15, task="exotic", payoff=payoff)
    value = value_exotic(sample(game, CalibrationGame.step_dupire, 2**16, 1))
    least, greatest = price_bound(game, "min"), price_bound(game, "max")
    assert least < value.price < greatest
    assert value.floor == pytest.approx(market_floor(game), rel=0.03, abs=1e-12)
    if payoff == "bermudan-call":  # reference.md
        assert least == pytest.approx(0.010665, abs=5e-6)
    assert price_bound(game, "target") is None


def test_kink_is_found():
    x = 0.02 * torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    values = 1 + 2 * (x - 0.004).clamp(min=0) + 0.01 * torch.randn(20_000, generator=torch.Generator().manual_seed(1))
    assert math.log(exotic._kink(x, values.double())) == pytest.approx(0.004, abs=0.002)
