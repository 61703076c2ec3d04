"""The calibrated market as a model of the underlying: paths and marks."""

import math

import pytest
import torch
import torch.nn as nn
from common import dupire_market

from envs import HedgingEnv
from envs.baselines import hedgers
from envs.benchmark.contest import play as play_episodes
from envs.calibration import marlvol
from envs.calibration.game import NODES, CalibrationGame, play
from envs.market import dynamics, smiles

SP500 = smiles.SURFACES["sp500-2018"]


def policy_of(game, slope=0.0, own=None):
    """A network of one hidden layer whose first output is about −slope · z, and the others are `own`."""
    policy = nn.Sequential(nn.Linear(game.observation_size, 1), nn.Tanh(), nn.Linear(1, game.action_size))
    for parameter in policy.parameters():
        nn.init.zeros_(parameter)
    with torch.no_grad():
        policy[0].weight[0, 1] = 0.05  # of 2z
        policy[2].weight[0, 0] = -10.0 * slope
        if own is not None:
            policy[2].bias[1:] = torch.tensor(own)
    return policy


def market(slope=0.1, own=None, surface=SP500, **settings):
    game = CalibrationGame(surface, 100, **settings)
    return marlvol.export_market(game, policy_of(game, slope, own))


MARKETS = {
    "local": {},
    "normal": {"action_map": "normal", "own": (0.5,)},
    "stochastic": {"action_map": "stochastic", "state": "non-path-dependent", "own": (0.0, 0.0)},
    "exotic": {"task": "exotic", "state": "path-dependent"},
    "slv": {
        "surface": smiles.SURFACES["heston"],
        "task": "slv",
        "state": "non-path-dependent",
        "action_map": "stochastic",
        "own": (-0.3, -0.7),
    },
}


@pytest.fixture(scope="module", autouse=True)
def fewer_particles():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(marlvol, "PARTICLES", 2**14)
        yield


@pytest.mark.parametrize("name", MARKETS)
@pytest.mark.parametrize("per_day", [1, 2])
def test_paths_are_martingales_row_by_row(name, per_day):
    model = marlvol.Marlvol(market(**MARKETS[name]), dt=1 / (252 * per_day))
    assert model.last_step == 51 * per_day
    num_steps = 31 * per_day
    noise = torch.randn(2**14, num_steps, model.noise_size, generator=torch.Generator().manual_seed(0))
    spot, variance = model.simulate(noise)
    assert spot.shape == variance.shape == (2**14, num_steps + 1)
    for t in (1, per_day, num_steps // 2, num_steps):
        assert abs(spot[:, t].mean() - 100) < 4 * spot[:, t].std() / 2**7
    # the variance drives the next step: conditionally lognormal
    log_return = spot.log().diff(dim=1) + 0.5 * variance[:, :-1] * model.dt
    standardised = log_return / (variance[:, :-1] * model.dt).sqrt()
    assert standardised.double().std().item() == pytest.approx(1, abs=0.01)
    torch.testing.assert_close(standardised, noise[..., 0], atol=5e-3, rtol=5e-3)
    few, _ = model.simulate(noise[:100])
    torch.testing.assert_close(few, spot[:100], rtol=1e-5, atol=0)
    assert name != "local" or torch.equal(few, spot[:100])
    whole, _ = model.simulate(torch.zeros(3, model.last_step, model.noise_size))
    assert whole.shape == (3, model.last_step + 1)


def test_a_market_of_half_days():
    """It is a model in steps of half a day, or less, and no other one."""
    content = market(num_steps=102, steps_per_day=2)
    model = marlvol.Marlvol(content, dt=1 / 504)
    assert (model.substeps, model.last_step, model.dt) == (1, 102, 1 / 504)
    spot, _ = model.simulate(torch.randn(2**14, 102, 1, generator=torch.Generator().manual_seed(0)))
    assert abs(spot[:, -1].mean() - 100) < 4 * spot[:, -1].std() / 2**7
    assert marlvol.Marlvol(content, dt=1 / 1008).last_step == 204
    with pytest.raises(ValueError, match="was calibrated in steps of 1/2 day"):
        marlvol.Marlvol(content, dt=1 / 252)


def test_projection_is_the_conditional_variance():
    """Gyöngy: E[σ_t²|S_t], known for "normal", found by particles for "stochastic"."""
    for name in ("normal", "stochastic"):
        model = marlvol.Marlvol(market(**MARKETS[name]))
        noise = torch.randn(2**16, 31, model.noise_size, generator=torch.Generator().manual_seed(1))
        spot, variance = model.simulate(noise)
        near = (spot[:, 30] / 100 - 1).abs() < 0.002
        expected = model.typical_variance(torch.tensor(30), torch.tensor(1.0)).item()
        # σ² of the stochastic map has heavy tails, and there are few particles here
        tolerance = 0.02 if name == "normal" else 0.2
        assert variance[near, 30].mean().item() == pytest.approx(expected, rel=tolerance), name


def test_flat_volatility_is_black_scholes():
    model = marlvol.Marlvol(market(slope=0.0))
    env = HedgingEnv(64, model, options=[(95.0, 20, False), (100.0, 20, True), (103.0, 30, True)], num_steps=30)
    env.reset(seed=0)
    volatility = env.smile.volatility(env.times[:20, None], env.spot[:20] / 100, env.variance[:20])
    near = (env.spot[:20] / 100 - 1).abs() < 0.05
    torch.testing.assert_close(volatility[near], torch.full_like(volatility[near], model.volatility), atol=6e-4, rtol=0)
    assert env.smile.slope(torch.tensor(5.0), torch.tensor(1.0), torch.tensor(0.01)).abs().max() < 1e-2
    gbm = HedgingEnv(64, dynamics.GBM(model.volatility), num_steps=30)
    gbm.reset(seed=0)
    torch.testing.assert_close(HedgingEnv(64, model).reset(seed=0)[0][:, 4], gbm.observe()[:, 4], atol=1e-3, rtol=0)


@pytest.mark.parametrize("per_day", [1, 2])
def test_marks_are_on_the_smile_and_martingales(per_day, monkeypatch):
    monkeypatch.setattr(marlvol, "PARTICLES", 2**16)
    content = dupire_market()
    model = marlvol.Marlvol(content, dt=1 / (252 * per_day))
    strikes, expiry = (95.0, 98.0, 100.0, 102.0), 30 * per_day
    env = HedgingEnv(2**15, model, options=[(k, expiry, k >= 100) for k in strikes], num_steps=expiry)
    env.reset(seed=3)
    at_start = env.smile.volatility(torch.tensor(0.0), torch.tensor(1.0), torch.tensor(0.01))
    smile = SP500.implied_volatility(torch.tensor(strikes).div(100).log(), 30 / 252)
    torch.testing.assert_close(at_start.double(), smile, atol=0.003, rtol=0)  # a daily grid is 0.1 vol points off
    for t in (1, 2, 10, 25, expiry):
        change = (env.mark[t] - env.mark[0]).double()
        assert (change.mean(0).abs() < 4 * change.std(0) / 2**7.5 + 2e-3).all(), t
    # a minimum-variance delta on the smile's slope leaves less than Black–Scholes'
    policies = {"black_scholes": hedgers.black_scholes_delta(env), "smile": hedgers.minimum_variance_delta(env)}
    sd = {name: play_episodes(env, policy)["pnl"].std() for name, policy in policies.items()}
    assert sd["smile"] < 0.95 * sd["black_scholes"]
    state = env.decode(env.replay()[0])
    torch.testing.assert_close(state.volatility, at_start.expand(2**15, -1), atol=1e-5, rtol=0)


def test_unusable_markets():
    content, path_dependent = market(), market(**MARKETS["exotic"])
    for change in ({"layers": []}, {"layers": None}, {"leverage": None}):
        with pytest.raises(ValueError, match="market is of another kind"):
            marlvol.Marlvol({**path_dependent, **change})
    for change in (
        {"tables": None},
        {"projection": content["projection"][:3]},
        {"game": {"task": "x"}},
        {"surface": {}},
    ):
        with pytest.raises(ValueError, match="market is of another kind"):
            marlvol.Marlvol({**content, **change})
    nan = content["projection"].clone()
    nan[3, 3] = math.nan
    with pytest.raises(ValueError, match="market is of another kind"):
        marlvol.Marlvol({**content, "projection": nan})
    with pytest.raises(ValueError, match=r"expiry is 60 \(at most 51 steps, where the smile ends\)"):
        HedgingEnv(4, marlvol.Marlvol(content), num_steps=60)


def test_tables_say_what_the_network_says():
    game = CalibrationGame(SP500, 1000)
    policy = policy_of(game, 0.2)
    tables = marlvol.policy_tables(game, policy).detach()
    assert tables.shape == (51, 1, NODES)
    play(game, marlvol.policy_step(policy, None), 0)
    by_network = game.log_spots[-1]
    play(game, marlvol.policy_step(policy, tables), 0)
    difference = (game.log_spots[-1] - by_network).abs()
    assert difference.quantile(0.99) < 1e-4  # but where a crash has left the grid


def test_a_network_that_cannot_be_saved_is_refused():
    game = CalibrationGame(SP500, 100, task="exotic", state="path-dependent")
    policy = nn.Sequential(nn.Linear(5, 4), nn.SiLU(), nn.Linear(4, 1))
    with pytest.raises(ValueError, match="cannot be saved as a market"):
        marlvol.export_market(game, policy)
    assert marlvol.export_market(
        CalibrationGame(SP500, 100), nn.Sequential(nn.Linear(2, 4), nn.SiLU(), nn.Linear(4, 1))
    )
