"""Rows that each follow a model of their own, and what a trader sees of them."""

import math
from dataclasses import fields

import pytest
import torch
from common import MODELS, book_env

from envs import HedgingEnv
from envs.baselines import hedgers
from envs.market.dynamics import GBM
from envs.market.mixture import RANGES, Mixture, mixed_models

F64 = torch.float64
DT = 1 / 252


@pytest.fixture(scope="module")
def mixture() -> Mixture:
    return Mixture(mixed_models(DT))


def test_models_are_what_the_ranges_say(mixture):
    assert len(mixture.models) == 4 * len(RANGES)
    assert [type(model).__name__.lower() for model in mixture.models[:4]] == list(RANGES)
    for model in mixture.models:
        low, high = RANGES[type(model).__name__.lower()]["volatility"]
        typical = {"GBM": "volatility", "Merton": "volatility", "Heston": "mean_variance", "GARCH": "initial_variance"}
        value = getattr(model, typical[type(model).__name__])
        assert low <= (value if typical[type(model).__name__] == "volatility" else value**0.5) <= high
    assert [str(model) for model in mixture.models] == [str(model) for model in mixed_models(DT)]  # always the same
    assert len({str(model) for model in mixture.models}) == len(mixture.models)


def test_every_row_follows_its_own_model(mixture):
    """Whatever is asked, row i gets what model i modulo their number says of it."""
    size = len(mixture.models)
    n = size + 5
    noise = torch.randn(n, 6, mixture.noise_size, generator=torch.Generator().manual_seed(1), dtype=F64)
    spot, variance = mixture.simulate(noise)
    strike, expiry = torch.tensor([0.95, 1.0], dtype=F64), torch.tensor([10.0, 20.0], dtype=F64)
    smile = mixture.smile(strike, expiry)
    step = torch.arange(7, dtype=F64)[:, None]
    moved = spot.T / 100
    marked = smile.volatility(step, moved, variance.T)
    slope = smile.slope(step, moved, variance.T)
    expected = mixture.expected_average_variance(variance.T, 20.0 - step)
    for i in range(n):
        model = mixture.models[i % size]
        own_spot, own_variance = model.simulate(noise[i : i + 1, :, : model.noise_size])
        torch.testing.assert_close(spot[i], own_spot[0])
        torch.testing.assert_close(variance[i], own_variance[0])
        own = (step, own_spot.T / 100, own_variance.T)
        torch.testing.assert_close(marked[:, i], model.smile(strike, expiry).volatility(*own)[:, 0])
        torch.testing.assert_close(slope[:, i], model.smile(strike, expiry).slope(*own)[:, 0])
        torch.testing.assert_close(expected[:, i], model.expected_average_variance(own_variance.T, 20.0 - step)[:, 0])


def test_it_is_a_martingale(mixture):
    noise = torch.randn(64_000, 30, mixture.noise_size, generator=torch.Generator().manual_seed(2), dtype=F64)
    spot, _ = mixture.simulate(noise)
    of_model = spot[:, -1].unflatten(0, (-1, len(mixture.models)))
    error = of_model.std(0) / len(of_model) ** 0.5
    assert ((of_model.mean(0) - 100).abs() < 4 * error).all()


def test_models_need_one_time_step():
    with pytest.raises(ValueError, match="2 different time steps"):
        Mixture([GBM(), GBM(dt=1 / 504)])


@pytest.mark.parametrize("make_env", [HedgingEnv, book_env])
def test_rows_do_not_depend_on_their_number(mixture, make_env):
    big, small = make_env(100, mixture, trader_view=True), make_env(10, mixture, trader_view=True)
    observations = [env.reset(seed=3)[0] for env in (big, small)]
    torch.testing.assert_close(observations[0][:10], observations[1])
    torch.testing.assert_close(big.spot[:, :10], small.spot)


@pytest.mark.parametrize("make_env", [HedgingEnv, book_env])
@pytest.mark.parametrize("name", [*MODELS, "mixture"])
def test_what_a_trader_sees_can_be_decoded(name, make_env, mixture):
    """By those who know the model: implied variances are affine in the model's own."""
    env = make_env(100, mixture if name == "mixture" else MODELS[name], dtype=F64, trader_view=True)
    observation, _ = env.reset(seed=0)
    for t in range(env.num_steps):
        state = env.decode(observation)
        expected = (env.spot[t], env.variance[t], env.delta[t], env.gamma[t], env.holding, env.position[t])
        decoded = (state.spot, state.variance, state.delta, state.gamma, state.holding, state.position)
        for value, truth in zip(decoded, expected, strict=True):
            torch.testing.assert_close(value, truth, rtol=1e-6, atol=1e-8)
        observation = env.advance(torch.zeros(100, 2, dtype=F64))


@pytest.mark.parametrize("name", MODELS)
def test_hedges_are_the_same_in_a_traders_view(name):
    """Policies that know the model do not see less in it."""
    views = [HedgingEnv(50, MODELS[name], dtype=F64, trader_view=trader) for trader in (False, True)]
    for policy in (hedgers.minimum_variance_delta, hedgers.whalley_wilmott, hedgers.zakamouline):
        actions = [policy(env)(env.reset(seed=4)[0]) for env in views]
        torch.testing.assert_close(*actions, rtol=1e-6, atol=1e-9)


def test_a_trader_sees_the_past_alone():
    env = HedgingEnv(20, MODELS["heston"], dtype=F64, trader_view=True)
    env.reset(seed=5)
    seen = [env.blocks[-1].clone()]
    spot, variance = env.spot.T.clone(), env.variance.T.clone()
    spot[:, 11:] *= 1.1
    variance[:, 11:] *= 2.0
    env.set_market(spot, variance)
    seen.append(env.blocks[-1])
    assert torch.equal(seen[0][:11], seen[1][:11])
    recent = slice(-4, None)  # the last four columns
    assert ((seen[0] - seen[1])[11:, :, recent].abs() > 1e-6).all(-1).any()


def test_recent_measures_tell_the_models_apart():
    """In gbm the implied volatility stands still and delta hedging earns what gamma does; heston's falls as the spot
    rises, and its hedged P&L has the risk of the volatility on top."""
    seen = {}
    for name in ("gbm", "heston"):
        env = HedgingEnv(4000, MODELS[name], dtype=F64, trader_view=True)
        env.reset(seed=6)
        parts = ("realised", "leverage", "vol of vol", "P&L")
        at = {part: env.blocks[-1][:, :, i - 4] for i, part in enumerate(parts)}
        at["vol of vol"] = at["vol of vol"] - math.log(0.01)  # the least
        assert all((x[0].abs() < 1e-12).all() for x in at.values())  # nothing has happened yet
        seen[name] = {part: x[10] for part, x in at.items()}
    assert (seen["gbm"]["leverage"] == 0).all()
    assert (seen["gbm"]["vol of vol"].abs() < 1e-12).all()
    assert seen["heston"]["vol of vol"].min() > 1.0
    assert seen["heston"]["leverage"].mean() < -0.2
    # Squares are unbiased, their logarithms a little low
    assert seen["gbm"]["realised"].mul(2).exp().mean().item() == pytest.approx(1.0, abs=0.01)
    assert seen["gbm"]["P&L"].mean().abs() < 0.12
    assert seen["heston"]["P&L"].mean() > 0.4
    env.forget()
    assert (env.blocks[-1][:, :, -4:] == env.blocks[-1][:1, :, -4:]).all()


def test_parameters_are_named(mixture):
    parameters = mixture.parameters()
    assert len(parameters) == len(mixture.models)
    assert all(field.name in parameters["model 0"] for field in fields(mixture.models[0]))
