"""The environments of the gymnasium registry: one episode at a time, numpy in and out."""

import gymnasium as gym
import torch

from envs.baselines.makers import avellaneda_stoikov
from envs.market.hedging import HedgingEnv
from envs.market.quoting import AgainstRivals, QuotingEnv


class HedgingGymEnv(gym.Env):
    """`HedgingEnv` for one environment, numpy in and out: gymnasium's `OptionHedging-v0`. Arguments as `HedgingEnv`."""

    metadata = {"render_modes": []}

    def __init__(self, **kwargs):
        self.env = HedgingEnv(num_envs=1, **kwargs)
        self.observation_space = self.env.single_observation_space
        self.action_space = self.env.single_action_space

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        observation, _ = self.env.reset(seed=seed)
        return observation[0].float().cpu().numpy(), {}

    def step(self, action):
        action = torch.as_tensor(action, dtype=self.env.dtype, device=self.env.device)[None]
        observation, reward, terminated, truncated, info = self.env.step(action)
        info = {name: value.item() for name, value in info.items()}
        return observation[0].float().cpu().numpy(), reward.item(), terminated.item(), truncated.item(), info


class QuotingGymEnv(gym.Env):
    """One maker against Avellaneda–Stoikov makers, one environment, numpy in and out: gymnasium's `OptionQuoting-v0`.

    Args:
        rival_risk_aversion, rival_k: parameters of the rivals (`baselines.avellaneda_stoikov`); the defaults are tuned
            in the default market.
        settings: as `QuotingEnv`.
    """

    metadata = {"render_modes": []}

    def __init__(self, rival_risk_aversion: float = 0.23, rival_k: float = 0.8, **settings):
        market = QuotingEnv(num_envs=1, **settings)
        rival = avellaneda_stoikov(market, rival_risk_aversion, rival_k)
        self.env = AgainstRivals(market, [rival] * (market.num_makers - 1))
        self.observation_space = self.env.single_observation_space
        self.action_space = self.env.single_action_space

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        observation, _ = self.env.reset(seed=seed)
        return observation[0].float().cpu().numpy(), {}

    def step(self, action):
        action = torch.as_tensor(action, dtype=self.env.env.dtype, device=self.env.device)[None]
        observation, reward, terminated, truncated, info = self.env.step(action)
        info = {name: value.item() for name, value in info.items()}
        return observation[0].float().cpu().numpy(), reward.item(), terminated.item(), truncated.item(), info
