"""HedgingEnv: hedge one sold option at a cost, many episodes at once, everything a tensor on one device.

The market maker is short one European call and trades the underlying once a day until expiry. Within a step it trades
at the current spot, then the market moves. With W = cash + shares + option marked at Black–Scholes, the reward is

    r_t = ΔW_t − cost_t − ½ · risk_aversion · ΔW_t²          (Kolm & Ritter 2019, eq. 7, with costs kept apart)

where cost_t = cost_rate · |shares traded| · spot, charged on the opening trade and on the final unwinding too.
"""

from typing import NamedTuple

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv

from envs import black_scholes
from envs.dynamics import GBM, Dynamics, draw_noise

Tensor = torch.Tensor

# Fixed scales of the observation: a policy means the same under every model of the underlying.
REFERENCE_VOLATILITY = 0.2
MIN_VARIANCE = 1e-6  # a variance process may touch zero; its logarithm is observed
OBSERVATION_NAMES = (
    "time left",
    "next step's share",
    "moneyness",
    "log-volatility",
    "delta",
    "delta's step sd",
    "net delta",
)
ACTION_NAMES = ("centre offset", "half-width")


class HedgingState(NamedTuple):
    """What an observation says, in natural units; every field (n,)."""

    step: Tensor  # trades made so far, 0 … num_steps, integer
    spot: Tensor  # currency
    variance: Tensor  # annualised variance that drives the next step
    volatility: Tensor  # the mark's: √(expected average variance to expiry)
    time_to_expiry: Tensor  # years
    delta: Tensor  # Black–Scholes delta of one call, shares
    gamma: Tensor  # Black–Scholes gamma of one call, 1/currency
    holding: Tensor  # shares held before this step's trade


class HedgingEnv(VectorEnv):
    """Short one European call, hedged with shares at a proportional cost.

    Args:
        num_envs: episodes played side by side; all start and end together.
        dynamics: model of the underlying (`envs.dynamics`); its `dt` is the time between trades.
        num_steps: trades until expiry (default 30 trading days).
        spot, strike: initial spot and strike, currency.
        cost_rate: proportional cost per unit of currency traded (1e-3 = 10 bp).
        risk_aversion: weight of ½ΔW², 1/currency.
        device, dtype: where and in what precision everything lives.

    Action (n, 2): a no-trade band around the Black–Scholes delta, (centre offset in shares, half-width ≥ 0 in shares).
    The holding moves to the nearest edge of [Δ + offset − half-width, Δ + offset + half-width]; half-width 0 is a plain
    target, so every hedging strategy can be written in it. A negative half-width counts as 0.

    Observation (n, 7), see `OBSERVATION_NAMES`: share of the time left; dt/τ, the next step's share of the time that is
    left (the best policy changes sharply just before expiry, and this says when); ln(S/K)/(σ√τ), the moneyness in
    standard deviations of what is left; ln(√v/20 %); Black–Scholes delta; Γ S √(v dt), the standard deviation of the
    delta over the next step; net delta before the trade. `decode` returns them in natural units.

    Expiry is termination, never truncation. There is no autoreset (`AutoresetMode.DISABLED`): call `reset` after
    `num_steps` steps. `info` holds, per step and environment: `wealth_change` ΔW (before costs), `cost`, `traded`
    (shares, absolute), `net_delta` (shares, after the trade) and `hedged_change`, the ΔW of a book that holds the
    Black–Scholes delta on the same path: it does not depend on the actions, so it can serve as a control variate.

    Raises:
        ValueError: an argument outside its range.

    Example:
        >>> env = HedgingEnv(num_envs=1024)
        >>> observation, _ = env.reset(seed=1)
        >>> observation, reward, terminated, truncated, info = env.step(torch.zeros(1024, 2))  # Black–Scholes delta
    """

    metadata = {"autoreset_mode": AutoresetMode.DISABLED, "render_modes": []}

    def __init__(
        self,
        num_envs: int = 1,
        dynamics: Dynamics | None = None,
        num_steps: int = 30,
        spot: float = 100.0,
        strike: float = 100.0,
        cost_rate: float = 1e-3,
        risk_aversion: float = 1.0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        at_least_one = {"num_envs": num_envs, "num_steps": num_steps}
        not_negative = {"cost_rate": cost_rate, "risk_aversion": risk_aversion}
        for name, value in at_least_one.items():
            if value < 1:
                raise ValueError(f"{name} is {value} (at least 1)")
        for name, value in not_negative.items():
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name} is {value} (0 or more)")
        if not (0 < spot < float("inf") and 0 < strike < float("inf")):
            raise ValueError(f"spot {spot} and strike {strike} (both positive)")
        self.num_envs, self.num_steps = num_envs, num_steps
        self.dynamics = dynamics if dynamics is not None else GBM()
        self.initial_spot, self.strike = float(spot), float(strike)
        self.cost_rate, self.risk_aversion = float(cost_rate), float(risk_aversion)
        self.position = -1.0  # calls held: short one
        self.device, self.dtype = torch.device(device), dtype
        self.single_observation_space = gym.spaces.Box(-np.inf, np.inf, (len(OBSERVATION_NAMES),), np.float32)
        self.single_action_space = gym.spaces.Box(
            np.array([-1.0, 0.0], np.float32), np.array([1.0, 1.0], np.float32), dtype=np.float32
        )
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, num_envs)
        self.generator = torch.Generator(self.device)
        self.generator.seed()  # as gymnasium does: random until reset(seed=…)
        self.steps_left = torch.arange(num_steps, -1, -1, device=self.device, dtype=dtype)  # at each time
        self.t = num_steps  # so that step before reset is an error

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Tensor, dict]:
        """Draws the whole market of an episode. Returns observation (n, 7) and an empty info.

        The same seed gives the same market, whatever the policy; row i does not depend on `num_envs`.
        """
        mask = (options or {}).get("reset_mask")
        if mask is not None and not np.all(mask):
            raise ValueError("all environments end together: reset_mask must be all True")
        if seed is not None:
            self.generator.manual_seed(seed)
        shape = (self.num_envs, self.num_steps, self.dynamics.noise_size)
        noise = draw_noise(self.num_envs, shape[1] * shape[2], self.generator, self.dtype).view(shape)
        self.set_market(*self.dynamics.simulate(noise, self.initial_spot))
        return self.replay()

    def set_market(self, spot: Tensor, variance: Tensor) -> None:
        """Replaces the market by given paths, spot and variance (n, num_steps + 1); `replay` then starts on them.

        Computes all that does not depend on actions, for all times at once, stored time first: (num_steps + 1, n).
        """
        self.spot, self.variance = spot.T.contiguous(), variance.T.clamp(min=MIN_VARIANCE).contiguous()
        steps_left = self.steps_left[:, None]
        tau = steps_left * self.dynamics.dt
        self.volatility = self.dynamics.expected_average_variance(self.variance, steps_left).sqrt()
        self.mark = black_scholes.price(self.spot, self.strike, tau, self.volatility)
        self.delta = black_scholes.delta(self.spot, self.strike, tau, self.volatility)
        self.gamma = black_scholes.gamma(self.spot, self.strike, tau, self.volatility)
        # At expiry, where nothing is left, the last step's stands in: the observation is terminal.
        remaining_sd = self.volatility * (steps_left.clamp(min=1) * self.dynamics.dt).sqrt()
        self.features = torch.stack(
            (
                (steps_left / self.num_steps).expand_as(self.spot),
                steps_left.clamp(min=1).reciprocal().expand_as(self.spot),
                black_scholes.log_ratio(self.spot, torch.full_like(self.spot, self.strike)) / remaining_sd,
                0.5 * torch.log(self.variance / REFERENCE_VOLATILITY**2),
                self.delta,
                # at expiry the gamma is no longer used, and may be infinite
                torch.where(steps_left > 0, self.gamma * self.spot * (self.variance * self.dynamics.dt).sqrt(), 0.0),
            ),
            dim=-1,
        )
        self.hedged_change = -self.position * (self.delta[:-1] * self.spot.diff(dim=0) - self.mark.diff(dim=0))

    def replay(self) -> tuple[Tensor, dict]:
        """Starts the same episodes again: sells the call at its mark and holds no shares, so wealth is zero."""
        self.t = 0
        self.holding = torch.zeros_like(self.spot[0])
        self.cash = -self.position * self.mark[0]
        return self.observe(), {}

    def observe(self) -> Tensor:
        """Observation (n, 7) of the current state."""
        net_delta = self.holding + self.position * self.delta[self.t]
        return torch.cat((self.features[self.t], net_delta[:, None]), dim=-1)

    def decode(self, observation: Tensor) -> HedgingState:
        """Observation (n, 7) → its natural units."""
        time_left, _, moneyness, log_volatility, delta, delta_sd, net_delta = observation.unbind(-1)
        steps_left = torch.round(time_left * self.num_steps)
        variance = (REFERENCE_VOLATILITY * torch.exp(log_volatility)) ** 2
        volatility = self.dynamics.expected_average_variance(variance, steps_left).sqrt()
        remaining_sd = volatility * (steps_left.clamp(min=1) * self.dynamics.dt).sqrt()
        spot = self.strike * torch.exp(moneyness * remaining_sd)
        gamma = delta_sd / (spot * (variance * self.dynamics.dt).sqrt())
        step = (self.num_steps - steps_left).long()
        time_to_expiry, holding = steps_left * self.dynamics.dt, net_delta - self.position * delta
        return HedgingState(step, spot, variance, volatility, time_to_expiry, delta, gamma, holding)

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, dict]:
        """Trades, then moves the market. actions (n, 2) → observation (n, 7), reward, terminated, truncated (n,), info.

        Raises:
            RuntimeError: the episode is over; call `reset`.
        """
        if self.t >= self.num_steps:
            raise RuntimeError("the episode is over (or never began): call reset()")
        t, spot = self.t, self.spot[self.t]
        centre = -self.position * self.delta[t] + actions[:, 0]
        half_width = actions[:, 1].clamp(min=0)
        holding = torch.minimum(torch.maximum(self.holding, centre - half_width), centre + half_width)
        traded = holding - self.holding
        cost = self.cost_rate * traded.abs() * spot
        self.cash = self.cash - traded * spot - cost
        self.t = t + 1
        wealth_change = holding * (self.spot[t + 1] - spot) + self.position * (self.mark[t + 1] - self.mark[t])
        turnover = traded.abs()
        net_delta = holding + self.position * self.delta[t]
        done = self.t == self.num_steps
        if done:  # the shares are sold and the option is settled in cash
            unwinding = self.cost_rate * holding.abs() * self.spot[t + 1]
            cost, turnover = cost + unwinding, turnover + holding.abs()
            self.cash = self.cash + holding * self.spot[t + 1] + self.position * self.mark[t + 1] - unwinding
            holding = torch.zeros_like(holding)
        self.holding = holding
        reward = wealth_change - cost - 0.5 * self.risk_aversion * wealth_change**2
        terminated = torch.full((self.num_envs,), done, device=self.device)
        truncated = torch.zeros_like(terminated)
        info = {
            "wealth_change": wealth_change,
            "cost": cost,
            "traded": turnover,
            "net_delta": net_delta,
            "hedged_change": self.hedged_change[t],
        }
        return self.observe(), reward, terminated, truncated, info

    @property
    def wealth(self) -> Tensor:
        """(n,) cash + shares + option at its mark, costs paid; once the episode is over, all of it is cash."""
        if self.t == self.num_steps:
            return self.cash
        return self.cash + self.holding * self.spot[self.t] + self.position * self.mark[self.t]


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
