"""The environments of gymnasium's registry: numpy in and out, one episode at a time and a batch of them."""

import inspect

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode

from envs import AgainstRivals, HedgingEnv, HedgingGymEnv, QuotingEnv, QuotingGymEnv
from envs.baselines import makers
from envs.gym import against_avellaneda_stoikov

IDS = {
    "OptionHedging-v0": ({"num_steps": 5}, np.array([0.01, 0.02], np.float32)),
    "OptionQuoting-v0": ({"num_steps": 5}, np.array([1.0] * 5 + [0.8] * 5 + [0.0, 0.2], np.float32)),
}  # id → settings of short episodes, an action
DEFAULTS = inspect.signature(against_avellaneda_stoikov).parameters
TUNED = [DEFAULTS[name].default for name in ("rival_risk_aversion", "rival_k")]


@pytest.mark.parametrize("settings", [{}, {"options": [(95.0, 3, False), (100.0, 5)], "arrival_rate": 0.5}])
def test_registered_environment(settings):
    env = gym.make("OptionHedging-v0", num_steps=5, **settings)
    check_env(env.unwrapped, skip_render_check=True)


def test_single_environment_is_a_row_of_the_batched_one():
    vector = gym.make_vec("OptionHedging-v0", num_envs=8, vectorization_mode="vector_entry_point")
    single = HedgingGymEnv()
    observation, _ = single.reset(seed=3)
    batched, _ = vector.reset(seed=3)
    np.testing.assert_array_equal(observation, batched[0])
    for _ in range(30):
        observation, reward, terminated, _, _ = single.step(np.array([0.01, 0.02], np.float32))
        batched, rewards, *_ = vector.step(np.array([[0.01, 0.02]] * 8, np.float32))
        np.testing.assert_allclose(observation, batched[0], rtol=1e-5, atol=1e-6)
        assert reward == pytest.approx(rewards[0], abs=1e-5)
    assert terminated


def test_trains_in_stable_baselines3():
    sb3 = pytest.importorskip("stable_baselines3")
    model = sb3.PPO("MlpPolicy", gym.make("OptionHedging-v0"), n_steps=60, batch_size=60, device="cpu", seed=0)
    model.learn(240)
    env = gym.make("OptionHedging-v0")
    observation, _ = env.reset(seed=0)
    action, _ = model.predict(observation, deterministic=True)
    assert env.action_space.contains(action)


def test_gymnasium_checks_the_environment_and_stable_baselines_trains_in_it():
    from stable_baselines3 import PPO

    check_env(gym.make("OptionQuoting-v0").unwrapped, skip_render_check=True)
    options = [(95.0, 8, False), (100.0, 8, True), (102.0, 12, True)]
    surface = gym.make("OptionQuoting-v0", num_steps=8, options=options, informed_share=0.5)
    check_env(surface.unwrapped, skip_render_check=True)
    assert surface.action_space.shape == (8,)
    env = gym.make("OptionQuoting-v0", num_steps=8)
    PPO("MlpPolicy", env, n_steps=16, batch_size=8, n_epochs=1, device="cpu").learn(32)


def test_the_single_environment_is_the_batch_of_one():
    single, batch = QuotingGymEnv(num_steps=6), QuotingEnv(1, num_steps=6)
    env = AgainstRivals(batch, [makers.avellaneda_stoikov(batch, *TUNED)])
    one, _ = single.reset(seed=4)
    two, _ = env.reset(seed=4)
    action = IDS["OptionQuoting-v0"][1]
    for _ in range(6):
        assert np.allclose(one, two[0].numpy())
        one, reward, *_ = single.step(action)
        two, rewards, *_ = env.step(torch.from_numpy(action)[None])
        assert reward == pytest.approx(rewards.item())


def batched(name: str, settings: dict) -> HedgingEnv | AgainstRivals:
    """The environment in tensors that 16 rows of `name` are."""
    if name == "OptionHedging-v0":
        return HedgingEnv(16, **settings)
    market = QuotingEnv(16, **settings)
    return AgainstRivals(market, [makers.avellaneda_stoikov(market, *TUNED)])


@pytest.mark.parametrize("name", IDS)
def test_a_batch_in_numpy_is_the_batch_in_tensors(name):
    settings, action = IDS[name]
    vector = gym.make_vec(name, num_envs=16, **settings)
    env = batched(name, settings)
    rng = np.random.default_rng(0)
    observation, info = vector.reset(seed=3)
    expected, _ = env.reset(seed=3)
    assert vector.num_envs == 16
    assert info == {}
    for t in range(5):
        assert isinstance(observation, np.ndarray)
        assert observation.shape == vector.observation_space.shape == (16, *vector.single_observation_space.shape)
        assert observation.dtype == vector.observation_space.dtype
        np.testing.assert_array_equal(observation, expected.numpy())
        actions = (action * rng.uniform(0.5, 1.5, (16, len(action)))).astype(np.float32)
        observation, reward, terminated, truncated, info = vector.step(actions)
        expected, rewards, _, _, infos = env.step(torch.from_numpy(actions))
        np.testing.assert_array_equal(reward, rewards.numpy())
        for ends in (terminated, truncated):
            assert ends.shape == (16,)
            assert ends.dtype == bool
        assert terminated.all() == (t == 4)
        assert not truncated.any()
        for key, value in infos.items():
            np.testing.assert_array_equal(info[key], value.numpy())
            assert info[f"_{key}"].all()
    vector.close()


@pytest.mark.parametrize("name", IDS)
def test_the_next_episode_starts_by_itself(name):
    """gymnasium's usual autoreset: the step after the last ignores its actions and pays nothing."""
    settings, action = IDS[name]
    vector = gym.make_vec(name, num_envs=16, **settings)
    assert vector.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP
    first, _ = vector.reset(seed=3)
    seen = []
    for t in range(12):
        observation, reward, terminated, truncated, info = vector.step(np.tile(action, (16, 1)))
        seen.append(observation)
        assert terminated.all() == (t in (4, 10))
        assert not truncated.any()
        if t == 5:
            assert (reward == 0).all()
            assert info == {}
            np.testing.assert_array_equal(observation[:, 0], first[:, 0])  # all of the time is left
    again, _ = vector.reset(seed=3)
    np.testing.assert_array_equal(again, first)
    np.testing.assert_array_equal(vector.step(np.tile(action, (16, 1)))[0], seen[0])
    assert not np.array_equal(seen[0], seen[6])  # the next episode is another one


@pytest.mark.parametrize("name", IDS)
def test_a_reset_in_mid_episode_or_after_it_begins_anew(name):
    settings, action = IDS[name]
    vector = gym.make_vec(name, num_envs=8, **settings)
    for steps in (2, 5):
        first, _ = vector.reset(seed=1)
        for _ in range(steps):
            vector.step(np.tile(action, (8, 1)))
        again, _ = vector.reset(seed=1)
        np.testing.assert_array_equal(again, first)
        _, reward, *_ = vector.step(np.tile(action, (8, 1)))
        assert (reward != 0).any()


@pytest.mark.parametrize("name", IDS)
def test_sampled_actions_and_wrappers(name):
    settings, _ = IDS[name]
    vector = gym.make_vec(name, num_envs=4, **settings)
    vector = gym.wrappers.vector.RecordEpisodeStatistics(vector)
    vector.reset(seed=0)
    vector.action_space.seed(0)
    total = np.zeros(4)
    for _ in range(5):
        actions = vector.action_space.sample()
        assert vector.action_space.contains(actions)
        _, reward, _, _, info = vector.step(actions)
        total += reward
    np.testing.assert_allclose(info["episode"]["r"], total, rtol=1e-6)
    assert (info["episode"]["l"] == 5).all()


@pytest.mark.parametrize("name", IDS)
def test_actions_that_cannot_be_played(name):
    settings, action = IDS[name]
    vector = gym.make_vec(name, num_envs=3, **settings)
    single = gym.make(name, **settings).unwrapped
    vector.reset(seed=0)
    single.reset(seed=0)
    for value in (np.nan, np.inf, -np.inf):
        bad = np.tile(action, (3, 1))
        bad[2, 1] = value
        with pytest.raises(ValueError, match=f"number 1 of the action in environment 2 is {value}"):
            vector.step(bad)
        with pytest.raises(ValueError, match=f"number 1 of the action in environment 0 is {value}"):
            single.step(bad[2])
    for shape in ((3, len(action) + 1), (2, len(action)), (len(action),), (3, 1, len(action)), ()):
        with pytest.raises(ValueError, match="actions have the shape"):
            vector.step(np.zeros(shape, np.float32))
    for shape in ((len(action) - 1,), (1, len(action)), ()):
        with pytest.raises(ValueError, match="actions have the shape"):
            single.step(np.zeros(shape, np.float32))
    _, reward, *_ = vector.step(np.tile(action, (3, 1)))  # nothing has been lost
    assert np.isfinite(reward).all()


def test_rivals_are_those_that_are_asked_for():
    settings, action = IDS["OptionQuoting-v0"]

    def income(**rivals):
        vector = gym.make_vec("OptionQuoting-v0", num_envs=64, **settings, **rivals)
        vector.reset(seed=0)
        return sum(vector.step(np.tile(action, (64, 1)))[4]["income"].mean() for _ in range(5))

    assert (
        income(rival_k=0.4) > income() == income(rival_risk_aversion=TUNED[0], rival_k=TUNED[1])
    )  # rivals that quote wider
    assert gym.make_vec("OptionQuoting-v0", num_envs=2, num_makers=3).single_observation_space.shape == (33,)
