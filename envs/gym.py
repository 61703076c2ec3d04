"""The environments of the gymnasium registry, numpy in and out: one episode at a time, and a batch of them.

    gymnasium.make("OptionHedging-v0")                    a row of `HedgingEnv`
    gymnasium.make_vec("OptionHedging-v0", num_envs=64)   64 of them
    gymnasium.make("OptionQuoting-v0")                    a row of `QuotingEnv`, from one maker's seat
    gymnasium.make_vec("OptionQuoting-v0", num_envs=64)   64 of them

Keyword arguments are those of the batched environment. Quotes that cross are moved to the middle between them, so that
every action of the space is legal. To train on a GPU use the batched environments themselves: they
take and return torch tensors, and nothing leaves the device.
"""

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv

from envs.baselines.makers import avellaneda_stoikov
from envs.market.hedging import HedgingEnv
from envs.market.quoting import QuotingEnv
from envs.market.rivals import AgainstRivals


def against_avellaneda_stoikov(
    num_envs: int = 1, rival_risk_aversion: float = 0.24, rival_k: float = 0.66, **settings
) -> AgainstRivals:
    """One maker's seat of a `QuotingEnv`, all others taken by Avellaneda–Stoikov makers.

    Args:
        rival_risk_aversion, rival_k: parameters of the rivals (`envs.baselines.makers.avellaneda_stoikov`); the
            defaults are tuned in the default market.
        settings: as `QuotingEnv`.
    """
    market = QuotingEnv(num_envs, **settings)
    rival = avellaneda_stoikov(market, rival_risk_aversion, rival_k)
    return AgainstRivals(market, [rival] * (market.num_makers - 1))


def reset_numpy(env: HedgingEnv | AgainstRivals, seed: int | None, options: dict | None) -> np.ndarray:
    """`env.reset` with an array: observations (num_envs, size)."""
    observation, _ = env.reset(seed=seed, options=options)
    return observation.float().cpu().numpy()


def step_numpy(env: HedgingEnv | AgainstRivals, actions: np.ndarray) -> tuple:
    """`env.step` with arrays: observation, reward, terminated, truncated, info.

    Raises:
        ValueError: actions of another shape, or that are not finite.
    """
    actions = np.asarray(actions, np.float64)
    shape = (env.num_envs, *env.single_action_space.shape)
    if actions.shape != shape:
        raise ValueError(f"actions have the shape {actions.shape} (must be {shape}, environments first)")
    if not np.isfinite(actions).all():
        row, number = np.argwhere(~np.isfinite(actions))[0]
        raise ValueError(f"number {number} of the action in environment {row} is {actions[row, number]} (finite)")
    actions = torch.as_tensor(actions, dtype=env.dtype, device=env.device)
    if isinstance(env, AgainstRivals):
        actions = env.env.uncrossed(actions)  # any action of the space may come, from agents that know nothing yet
    observation, reward, *ends, info = env.step(actions)
    terminated, truncated = (x.cpu().numpy() for x in ends)
    info = {name: value.cpu().numpy() for name, value in info.items()}
    return observation.float().cpu().numpy(), reward.double().cpu().numpy(), terminated, truncated, info


class SingleGymEnv(gym.Env):
    """The only row of a batched environment."""

    metadata = {"render_modes": []}

    def __init__(self, env: HedgingEnv | AgainstRivals):
        self.env = env
        self.observation_space = env.single_observation_space
        self.action_space = env.single_action_space

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        return reset_numpy(self.env, seed, options)[0], {}

    def step(self, action):
        observation, reward, terminated, truncated, info = step_numpy(self.env, np.asarray(action)[None])
        info = {name: value.item() for name, value in info.items()}
        return observation[0], reward.item(), terminated.item(), truncated.item(), info


class GymVectorEnv(VectorEnv):
    """All rows of a batched environment, with gymnasium's usual autoreset (`AutoresetMode.NEXT_STEP`).

    All rows end together. The step after that ignores its actions, starts the next episodes and has a reward of 0.
    """

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP, "render_modes": []}

    def __init__(self, env: HedgingEnv | AgainstRivals):
        self.env = env
        self.num_envs = env.num_envs
        self.single_observation_space = env.single_observation_space
        self.single_action_space = env.single_action_space
        self.observation_space = env.observation_space
        self.action_space = env.action_space
        self.ended = False

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        self.ended = False
        return reset_numpy(self.env, seed, options), {}

    def step(self, actions):
        if self.ended:
            self.ended = False
            nothing = np.zeros(self.num_envs, bool)
            return reset_numpy(self.env, None, None), np.zeros(self.num_envs), nothing, nothing.copy(), {}
        observation, reward, terminated, truncated, info = step_numpy(self.env, actions)
        self.ended = bool(terminated.any())
        # As gymnasium's own vector environments do: which rows have the value
        info |= {f"_{name}": np.ones(self.num_envs, bool) for name in info}
        return observation, reward, terminated, truncated, info


class HedgingGymEnv(SingleGymEnv):
    """gymnasium's `OptionHedging-v0`. Arguments as `HedgingEnv`."""

    def __init__(self, **settings):
        super().__init__(HedgingEnv(num_envs=1, **settings))


class HedgingGymVectorEnv(GymVectorEnv):
    """gymnasium's `OptionHedging-v0`, a batch. Arguments as `HedgingEnv`."""

    def __init__(self, num_envs: int = 1, **settings):
        super().__init__(HedgingEnv(num_envs, **settings))


class QuotingGymEnv(SingleGymEnv):
    """gymnasium's `OptionQuoting-v0`. Arguments as `against_avellaneda_stoikov`."""

    def __init__(self, **settings):
        super().__init__(against_avellaneda_stoikov(num_envs=1, **settings))


class QuotingGymVectorEnv(GymVectorEnv):
    """gymnasium's `OptionQuoting-v0`, a batch. Arguments as `against_avellaneda_stoikov`."""

    def __init__(self, num_envs: int = 1, **settings):
        super().__init__(against_avellaneda_stoikov(num_envs, **settings))
