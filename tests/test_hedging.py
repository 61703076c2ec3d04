import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import MODELS
from gymnasium.utils.env_checker import check_env

from envs import HedgingEnv, HedgingGymEnv, baselines, benchmark, dynamics

F64 = torch.float64


def random_actions(env, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.tensor([0.3, 0.3], dtype=env.dtype)
    return [torch.randn(env.num_envs, 2, generator=generator, dtype=env.dtype) * scale for _ in range(env.num_steps)]


def play(env, actions):
    """Rewards, infos and final observation of one episode."""
    env.replay()
    steps = [env.step(action) for action in actions]
    return torch.stack([s[1] for s in steps]), [s[4] for s in steps], steps


@pytest.mark.parametrize("name", MODELS)
def test_wealth_is_cash_plus_marked_positions(name):
    """Whatever the actions: the sum of ΔW − cost is the final cash, recomputed here from the trades alone."""
    env = HedgingEnv(500, MODELS[name], dtype=F64)
    env.reset(seed=0)
    actions = random_actions(env)
    cash, holding = env.mark[0].clone(), torch.zeros(500, dtype=F64)  # the call is sold at its mark
    total = torch.zeros(500, dtype=F64)
    env.replay()
    torch.testing.assert_close(env.wealth, torch.zeros(500, dtype=F64))
    for t, action in enumerate(actions):
        centre, half_width = env.delta[t] + action[:, 0], action[:, 1].clamp(min=0)
        target = torch.minimum(torch.maximum(holding, centre - half_width), centre + half_width)
        cash -= (target - holding) * env.spot[t] + env.cost_rate * (target - holding).abs() * env.spot[t]
        holding = target
        _, _, terminated, _, info = env.step(action)
        total += info["wealth_change"] - info["cost"]
        if not terminated.all():
            marked = cash + holding * env.spot[t + 1] - env.mark[t + 1]
            torch.testing.assert_close(env.wealth, marked, atol=1e-9, rtol=0)
        else:
            cash += holding * env.spot[t + 1] - env.cost_rate * holding.abs() * env.spot[t + 1]
            cash -= (env.spot[t + 1] - 100).clamp(min=0)  # settled at the payoff
        if not terminated.all():
            torch.testing.assert_close(env.wealth, total, atol=1e-9, rtol=0)
    torch.testing.assert_close(env.cash, cash, atol=1e-9, rtol=0)
    torch.testing.assert_close(total, cash, atol=1e-9, rtol=0)
    assert (env.holding == 0).all()


def test_reward_is_kolm_ritter():
    env = HedgingEnv(200, risk_aversion=3.0, cost_rate=2e-3, dtype=F64)
    env.reset(seed=0)
    rewards, infos, _ = play(env, random_actions(env))
    for reward, info in zip(rewards, infos, strict=True):
        change = info["wealth_change"]
        torch.testing.assert_close(reward, change - info["cost"] - 1.5 * change**2)


def test_opening_and_unwinding_are_charged():
    env = HedgingEnv(50, cost_rate=0.01, num_steps=2, dtype=F64)
    env.reset(seed=0)
    hold_one = [torch.stack((1 - env.delta[t], torch.zeros(50, dtype=F64)), -1) for t in (0, 1)]
    _, infos, _ = play(env, hold_one)
    torch.testing.assert_close(infos[0]["cost"], torch.full((50,), 1.0, dtype=F64))
    torch.testing.assert_close(infos[1]["cost"], 0.01 * env.spot[2])
    torch.testing.assert_close(infos[1]["traded"], torch.ones(50, dtype=F64))


def test_band_moves_to_the_nearest_edge():
    env = HedgingEnv(3, dtype=F64)
    env.reset(seed=0)
    centre = env.delta[0]
    env.holding = torch.stack((centre[0] - 0.2, centre[1] + 0.01, centre[2] + 0.3))
    env.step(torch.tensor([[0.0, 0.05]] * 3, dtype=F64))
    after = torch.stack((centre[0] - 0.05, centre[1] + 0.01, centre[2] + 0.05))
    torch.testing.assert_close(env.holding, after)


def test_same_seed_same_market_and_zero_is_a_seed():
    env = HedgingEnv(20)
    first, _ = env.reset(seed=0)
    spot = env.spot.clone()
    for action in random_actions(env):
        env.step(action)
    env.reset()
    assert not torch.equal(env.spot, spot)  # without a seed the stream goes on
    again, _ = env.reset(seed=0)
    assert torch.equal(env.spot, spot)
    assert torch.equal(first, again)
    env.reset(seed=1)
    assert not torch.equal(env.spot, spot)


@pytest.mark.parametrize("name", MODELS)
def test_rows_do_not_depend_on_other_rows(name):
    """Neither on how many there are, nor on what is done in them."""
    big, small = HedgingEnv(100, MODELS[name]), HedgingEnv(10, MODELS[name])
    big.reset(seed=0)
    small.reset(seed=0)
    actions = random_actions(big)
    rewards, _, steps = play(big, actions)
    few, _, few_steps = play(small, [action[:10] for action in actions])
    torch.testing.assert_close(rewards[:, :10], few, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(steps[-1][0][:10], few_steps[-1][0], rtol=1e-5, atol=1e-6)
    changed = [action.clone() for action in actions]
    for action in changed:
        action[10:] += 0.1
    others, _, _ = play(big, changed)
    assert torch.equal(others[:, :10], rewards[:, :10])
    assert not torch.equal(others[:, 10:], rewards[:, 10:])


def test_terminal_contract():
    env = HedgingEnv(4, num_steps=3)
    with pytest.raises(RuntimeError, match="reset"):
        env.step(torch.zeros(4, 2))
    env.reset(seed=0)
    for t in range(3):
        observation, _, terminated, truncated, _ = env.step(torch.zeros(4, 2))
        assert terminated.all() == (t == 2)
        assert not truncated.any()
        assert observation.isfinite().all()
    with pytest.raises(RuntimeError, match="reset"):
        env.step(torch.zeros(4, 2))
    with pytest.raises(ValueError, match="reset_mask"):
        env.reset(options={"reset_mask": np.array([True, False, True, True])})


@pytest.mark.parametrize("name", MODELS)
def test_decode_inverts_observe(name):
    env = HedgingEnv(100, MODELS[name], num_steps=10, dtype=F64)
    env.reset(seed=0)
    for t, action in enumerate(random_actions(env)):
        state = env.decode(env.observe())
        assert (state.step == t).all()
        expected = (env.spot[t], env.variance[t], env.volatility[t], env.delta[t], env.gamma[t], env.holding)
        decoded = (state.spot, state.variance, state.volatility, state.delta, state.gamma, state.holding)
        for value, truth in zip(decoded, expected, strict=True):
            torch.testing.assert_close(value, truth, rtol=1e-9, atol=1e-11)
        env.step(action)


def test_free_trading_loses_nothing_on_average_and_fine_hedging_replicates():
    """Zero cost: whatever is traded, the mean P&L is zero; and the hedging error falls like √Δt."""
    env = HedgingEnv(30_000, cost_rate=0.0, dtype=F64)
    env.reset(seed=0)
    _, infos, _ = play(env, random_actions(env))
    pnl = sum(info["wealth_change"] for info in infos)
    assert abs(pnl.mean()) < 4 * pnl.std() / len(pnl) ** 0.5
    spread = []
    for per_day in (1, 4, 16):
        fine = HedgingEnv(8_000, dynamics.GBM(dt=1 / 252 / per_day), 30 * per_day, cost_rate=0.0, dtype=F64)
        fine.reset(seed=0)
        spread.append(benchmark.play(fine, baselines.black_scholes_delta(fine))["pnl"].std())
    assert spread[0] / spread[1] == pytest.approx(2, rel=0.05)
    assert spread[1] / spread[2] == pytest.approx(2, rel=0.05)


def test_control_variate_is_the_delta_hedge():
    env = HedgingEnv(50, MODELS["heston"], dtype=F64)
    env.reset(seed=0)
    _, infos, _ = play(env, [torch.zeros(50, 2, dtype=F64)] * 30)
    for info in infos:
        torch.testing.assert_close(info["hedged_change"], info["wealth_change"], atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    "bad",
    [{"num_envs": 0}, {"num_steps": 0}, {"cost_rate": -1e-3}, {"risk_aversion": -1}, {"risk_aversion": float("nan")},
     {"spot": 0.0}, {"strike": -1.0}],
)  # fmt: skip
def test_bad_arguments(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        HedgingEnv(**bad)


def test_registered_environment():
    env = gym.make("OptionHedging-v0", num_steps=5)
    check_env(env.unwrapped, skip_render_check=True)
    vector = gym.make_vec("OptionHedging-v0", num_envs=8, vectorization_mode="vector_entry_point")
    single = HedgingGymEnv()
    observation, _ = single.reset(seed=3)
    batched, _ = vector.reset(seed=3)
    np.testing.assert_array_equal(observation, batched[0].numpy())
    for _ in range(30):
        observation, reward, terminated, _, _ = single.step(np.array([0.01, 0.02], np.float32))
        batched, rewards, *_ = vector.step(torch.tensor([[0.01, 0.02]] * 8))
        np.testing.assert_allclose(observation, batched[0].numpy(), rtol=1e-5, atol=1e-6)
        assert reward == pytest.approx(rewards[0].item(), abs=1e-5)
    assert terminated


def test_trains_in_stable_baselines3():
    sb3 = pytest.importorskip("stable_baselines3")
    model = sb3.PPO("MlpPolicy", gym.make("OptionHedging-v0"), n_steps=60, batch_size=60, device="cpu", seed=0)
    model.learn(240)
    env = gym.make("OptionHedging-v0")
    observation, _ = env.reset(seed=0)
    action, _ = model.predict(observation, deterministic=True)
    assert env.action_space.contains(action)
