"""HedgingEnv: hedge a book of options at a cost, many episodes at once, everything a tensor on one device.

The market maker holds a book of European options that are settled in cash, and trades the underlying once a step. In
phase 1 the book is one sold call. In phase 2 clients keep trading with it: on every option and side orders arrive as a
Poisson process, at given prices, whatever the hedging policy does. Within a step the orders arrive, the market maker
trades at the current spot, then the market moves. With W = cash + shares + options marked at Black–Scholes and ΔW its
change as the market moves, the reward is

    r_t = income_t + ΔW_t − cost_t − ½ · risk_aversion · ΔW_t²          (Kolm & Ritter 2019, eq. 7)

where cost_t = cost_rate · |shares traded| · spot, charged on the opening trade and on the final unwinding too, and
income_t is the client spread on the step's orders.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from scipy.stats import nbinom, poisson

from envs import black_scholes
from envs.dynamics import GBM, Dynamics, draw_noise, normal_cdf

Tensor = torch.Tensor

# Fixed scales of the observation: a policy means the same under every model of the underlying.
REFERENCE_VOLATILITY = 0.2
MIN_VARIANCE = 1e-6  # a variance process may touch zero; its logarithm is observed
OBSERVATION_NAMES = (
    "time left",
    "next step's share",
    "moneyness",
    "log-volatility",
    "book delta",
    "book delta's step sd",
    "book vega",
    "net delta",
)  # and after them the position in every option
NET_DELTA = OBSERVATION_NAMES.index("net delta")


class Option(NamedTuple):
    """A European option: strike in currency, expiry as the step at whose beginning it is settled in cash."""

    strike: float
    expiry: int
    is_call: bool = True


def option_grid(strikes: Sequence[float], expiries: Sequence[int], spot: float = 100.0) -> list[Option]:
    """One option for every strike and expiry, the one out of the money: puts below the spot, calls from there up.

    That is what clients trade. The one in the money is, by put–call parity, the same option and a share.

    Args:
        strikes: increasing, currency.
        expiries: increasing, steps from the start.

    Raises:
        ValueError: strikes or expiries empty or not increasing.
    """
    for name, values in (("strikes", strikes), ("expiries", expiries)):
        if len(values) == 0 or any(a >= b for a, b in pairwise(values)):
            raise ValueError(f"{name} are {', '.join(f'{x:g}' for x in values) or 'none'} (one or more, increasing)")
    return [Option(float(strike), expiry, strike >= spot) for expiry in expiries for strike in strikes]


class OrderLaw:
    """Orders of one kind in one step: their number is Poisson, their sizes are geometric (1, 2, …) and independent.

    `draw` inverts the joint distribution function of (number, total size), so it takes one normal.

    Args:
        rate: mean number of orders in a step, ≥ 0.
        mean_size: mean size of an order, options, ≥ 1 (1: every order is for one option).
    """

    def __init__(self, rate: float, mean_size: float, device: torch.device, dtype: torch.dtype):
        self.rate, self.mean_size = rate, mean_size
        # E[size²] of the geometric distribution: so the total size in a step has variance rate · E[size²]
        self.variance = rate * mean_size * (2.0 * mean_size - 1.0)
        numbers, sizes, probabilities = [0], [0], [poisson.pmf(0, rate)]
        for number in range(1, int(poisson.isf(1e-10, rate)) + 2):
            p = 1.0 / mean_size
            extra = np.arange(int(nbinom.isf(1e-8, number, p)) + 1) if mean_size > 1 else np.zeros(1, int)
            numbers += [number] * len(extra)
            sizes += [*(number + extra)]
            share = nbinom.pmf(extra, number, p) if mean_size > 1 else np.ones(1)
            probabilities += [*(poisson.pmf(number, rate) * share)]
        self.probabilities = np.array(probabilities) / np.sum(probabilities)
        self.sizes = np.array(sizes)
        # P(cell or a later one): rare cells are the last, where floats are fine
        tail = np.cumsum(self.probabilities[::-1])
        self.tail = torch.tensor(tail[:-1], device=device, dtype=dtype)  # increasing
        self.number = torch.tensor(numbers[::-1], device=device, dtype=dtype)
        self.size = torch.tensor(sizes[::-1], device=device, dtype=dtype)

    def size_probabilities(self) -> np.ndarray:
        """P(total size of a step's orders = 0, 1, …)."""
        return np.bincount(self.sizes, self.probabilities)

    def draw(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Standard normals → number of orders and their total size, each of the shape of `noise`."""
        cell = torch.bucketize(normal_cdf(-noise), self.tail)
        return self.number[cell], self.size[cell]


def with_net_delta(observation: Tensor, net_delta: Tensor) -> Tensor:
    """The observation (n, …) with another net delta (n,), in the observation's units."""
    return torch.cat((observation[:, :NET_DELTA], net_delta[:, None], observation[:, NET_DELTA + 1 :]), -1)


class HedgingState(NamedTuple):
    """What an observation says, in natural units; (n,), the last three (n, num_options)."""

    step: Tensor  # trades made so far, 0 … num_steps, integer
    spot: Tensor  # currency
    variance: Tensor  # annualised variance that drives the next step
    delta: Tensor  # Black–Scholes delta of the book, shares
    gamma: Tensor  # Black–Scholes gamma of the book, shares per currency
    holding: Tensor  # shares held before this step's trade
    position: Tensor  # options held, + long; 0 once expired
    volatility: Tensor  # the mark's: √(expected average variance to expiry)
    time_to_expiry: Tensor  # years


class HedgingEnv(VectorEnv):
    """A book of European options, fed by client orders and hedged with shares at a proportional cost.

    Args:
        num_envs: episodes played side by side; all start and end together.
        dynamics: model of the underlying (`envs.dynamics`); its `dt` is the time between trades.
        num_steps: trades in an episode (default 30 trading days).
        options: what the book may hold; the last ones expire at `num_steps`, where the episode ends. By default one
            call struck at the spot. See `option_grid`.
        initial_position: of every option, + long; taken at its mark. By default short one.
        arrival_rate: mean number of client orders a step, on each option and side, while the option lives.
        mean_order_size: of their geometric size, options.
        client_spread: what a client pays per option over (or gets below) its mark, currency.
        spot: initial spot, currency.
        cost_rate: proportional cost per unit of currency traded (1e-3 = 10 bp).
        risk_aversion: weight of ½ΔW², 1/currency.
        device, dtype: where and in what precision everything lives.

    Action (n, 2): a no-trade band around the hedge of the book's Black–Scholes delta, (centre offset in shares,
    half-width ≥ 0 in shares). The holding moves to the nearest edge of [−Δ + offset − half-width, −Δ + offset +
    half-width]; half-width 0 is a plain target, so every hedging strategy can be written in it. A negative half-width
    counts as 0.

    Observation (n, 8 + num_options), see `OBSERVATION_NAMES`: share of the time left; dt/τ, the next step's share of
    the time to the next expiry (the best policy changes sharply just before it, and this says when); ln(S/K)/(σ√τ) for
    the middle strike and the next expiry; ln(√v/20 %); the book's Black–Scholes delta; Γ S √(v dt), the standard
    deviation of its delta over the next step; its vega over S₀√T; its net delta before the trade; the position in every
    option. Positions are unlimited, so all that grows with the book is divided by `book_scale`, a typical size of it:
    the root mean square position of the last step, added up over the options as if they were independent. `decode`
    returns natural units.

    Expiry is termination, never truncation. There is no autoreset (`AutoresetMode.DISABLED`): call `reset` after
    `num_steps` steps. `info` holds, per step and environment: `wealth_change` ΔW (before costs), `income`, `cost`,
    `turnover` (shares, absolute) and `net_delta` (shares, after the trade). Two more tell what befalls Black–Scholes
    delta hedging of the same book on the same path; they do not depend on the actions, so they can serve as control
    variates: `hedged_change`, its ΔW, and `hedged_cost`, the cost of its trade after that change (at the end, of
    unwinding).

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
        options: Sequence[Option] | None = None,
        initial_position: float = -1.0,
        arrival_rate: float = 0.0,
        mean_order_size: float = 1.0,
        client_spread: float = 0.0,
        spot: float = 100.0,
        cost_rate: float = 1e-3,
        risk_aversion: float = 1.0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        self.settings = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        at_least_one = {"num_envs": num_envs, "num_steps": num_steps, "mean_order_size": mean_order_size}
        not_negative = {"cost_rate": cost_rate, "risk_aversion": risk_aversion, "arrival_rate": arrival_rate}
        for name, value in at_least_one.items():
            if not 1 <= value < float("inf"):
                raise ValueError(f"{name} is {value} (at least 1)")
        for name, value in {**not_negative, "client_spread": client_spread}.items():
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name} is {value} (0 or more)")
        if not 0 < spot < float("inf"):
            raise ValueError(f"spot is {spot} (positive)")
        if not abs(initial_position) < float("inf"):
            raise ValueError(f"initial_position is {initial_position} (a finite number)")
        options = [Option(spot, num_steps)] if options is None else [Option(*option) for option in options]
        for strike, expiry, _ in options:
            if not 0 < strike < float("inf"):
                raise ValueError(f"strike is {strike} (positive)")
            if not (1 <= expiry <= num_steps and expiry == int(expiry)):
                raise ValueError(f"expiry is {expiry} (whole steps, at least 1, at most num_steps = {num_steps})")
        if not options or max(option.expiry for option in options) < num_steps:
            raise ValueError(f"expiry of the last option is not num_steps = {num_steps}, where the episode ends")
        self.num_envs, self.num_steps, self.num_options = num_envs, num_steps, len(options)
        self.dynamics = dynamics if dynamics is not None else GBM()
        self.initial_spot, self.initial_position = float(spot), float(initial_position)
        self.cost_rate, self.risk_aversion, self.client_spread = float(cost_rate), float(risk_aversion), client_spread
        self.device, self.dtype = torch.device(device), dtype
        self.options = options
        tensor = {"device": self.device, "dtype": dtype}
        self.strike = torch.tensor([option.strike for option in options], **tensor)
        self.expiry = torch.tensor([option.expiry for option in options], **tensor)
        self.is_call = torch.tensor([option.is_call for option in options], device=self.device)
        self.middle_strike = float(np.median([option.strike for option in options]))
        self.order_law = OrderLaw(arrival_rate, mean_order_size, **tensor)
        # Root mean square position at expiry: both sides' orders add their variances
        self.position_scale = (initial_position**2 + 2.0 * self.order_law.variance * self.expiry).sqrt().clamp(min=1.0)
        self.book_scale = float(self.position_scale.square().sum().sqrt())
        # Natural units of the observation's columns: shares, and options
        units = torch.ones(len(OBSERVATION_NAMES), **tensor)
        units[OBSERVATION_NAMES.index("book delta") : NET_DELTA + 1] = self.book_scale
        self.observation_units = torch.cat((units, self.position_scale))
        # Steps to expiry of every option at each time, and to the next expiry (at the end, where nothing is left, 1)
        times = torch.arange(num_steps + 1, **tensor)
        self.steps_left = (self.expiry - times[:, None]).clamp(min=0)  # (num_steps + 1, num_options)
        next_expiry = torch.where(self.steps_left > 0, self.steps_left, num_steps + 1).amin(-1)
        self.steps_to_next_expiry = torch.where(next_expiry > num_steps, 1.0, next_expiry)  # (num_steps + 1,)
        self.time_left = 1.0 - times / num_steps
        self.times, self.smile = times, self.dynamics.smile(self.strike / self.initial_spot, self.expiry)

        shape = (len(OBSERVATION_NAMES) + len(options),)
        self.single_observation_space = gym.spaces.Box(-np.inf, np.inf, shape, np.float32)
        high = np.full(2, self.book_scale, np.float32)
        self.single_action_space = gym.spaces.Box(high * np.array([-1, 0], np.float32), high, dtype=np.float32)
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, num_envs)
        self.generator = torch.Generator(self.device)
        self.generator.seed()  # as gymnasium does: random until reset(seed=…)
        self.t = num_steps  # so that step before reset is an error

    def like(self, num_envs: int) -> "HedgingEnv":
        """The same environment with another number of rows."""
        return HedgingEnv(**{**self.settings, "num_envs": num_envs})

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Tensor, dict]:
        """Draws the whole market of an episode, orders included. Returns observation and an empty info.

        The same seed gives the same market, whatever the policy; row i does not depend on `num_envs`.
        """
        mask = (options or {}).get("reset_mask")
        if mask is not None and not np.all(mask):
            raise ValueError("all environments end together: reset_mask must be all True")
        if seed is not None:
            self.generator.manual_seed(seed)
        n, steps, per_step = self.num_envs, self.num_steps, self.dynamics.noise_size
        split = steps * per_step
        size = split + (2 * steps * self.num_options if self.order_law.rate > 0 else 0)
        noise = draw_noise(n, size, self.generator, self.dtype)
        spot, variance = self.dynamics.simulate(noise[:, :split].view(n, steps, per_step), self.initial_spot)
        orders = None
        if self.order_law.rate > 0:
            orders = self.order_law.draw(noise[:, split:].view(n, steps, self.num_options, 2))
        self.set_market(spot, variance, orders)
        return self.replay()

    def set_market(self, spot: Tensor, variance: Tensor, orders: tuple[Tensor, Tensor] | None = None) -> None:
        """Replaces the market by given paths; `replay` then starts on them.

        Computes all that does not depend on actions, for all times at once, stored time first: (num_steps + 1, n, …).

        Args:
            spot, variance: (n, num_steps + 1).
            orders: number of orders and their total size, both (n, num_steps, num_options, 2), [..., 0] what clients
                buy and [..., 1] what they sell; orders for an option that has expired are dropped. None: no orders.
        """
        self.spot, self.variance = spot.T.contiguous(), variance.T.clamp(min=MIN_VARIANCE).contiguous()
        steps_left, dt = self.steps_left[:, None], self.dynamics.dt  # (num_steps + 1, 1, num_options)
        volatility = self.smile.volatility(self.times[:, None], self.spot / self.initial_spot, self.variance)
        self.mark, delta, gamma, vega = black_scholes.greeks(
            self.spot[..., None], self.strike, steps_left * dt, volatility, self.is_call
        )
        alive = (self.steps_left > 0)[:-1, None]
        if orders is None:
            self.order_number = self.order_size = torch.zeros(self.num_steps, 1, 1, 2).to(self.spot)
        else:
            self.order_number, self.order_size = (x.transpose(0, 1) * alive[..., None] for x in orders)
        # Held from each time until the next, after its orders; nothing is left at the end
        position = self.initial_position + (self.order_size[..., 1] - self.order_size[..., 0]).cumsum(0)
        self.position = torch.cat(((position * alive).expand_as(self.mark[1:]), torch.zeros_like(self.mark[:1])))
        self.income = self.client_spread * self.order_size.sum((-1, -2)).expand_as(self.spot[1:])
        self.book_value = (self.position * self.mark).sum(-1)
        # Every change of position is a trade at the mark, settlement in cash included
        self.cash_flow = -(self.position.diff(dim=0, prepend=torch.zeros_like(self.mark[:1])) * self.mark).sum(-1)
        self.cash_flow[:-1] += self.income
        self.book_change = (self.position[:-1] * self.mark.diff(dim=0)).sum(-1)
        self.delta = (self.position * delta).sum(-1)
        self.gamma = (self.position * torch.where(steps_left > 0, gamma, 0.0)).sum(-1)  # ∞ at expiry at the money
        vega = (self.position * vega).sum(-1)
        self.hedged_change = self.book_change - self.delta[:-1] * self.spot.diff(dim=0)
        self.hedged_cost = self.cost_rate * self.delta.diff(dim=0).abs() * self.spot[1:]

        next_steps = self.steps_to_next_expiry[:, None]
        remaining_sd = (self.dynamics.expected_average_variance(self.variance, next_steps) * next_steps * dt).sqrt()
        features = (
            self.time_left[:, None].expand_as(self.spot),
            next_steps.reciprocal().expand_as(self.spot),
            black_scholes.log_ratio(self.spot, torch.full_like(self.spot, self.middle_strike)) / remaining_sd,
            0.5 * torch.log(self.variance / REFERENCE_VOLATILITY**2),
            self.delta / self.book_scale,
            self.gamma * self.spot * (self.variance * dt).sqrt() / self.book_scale,
            vega / (self.initial_spot * (self.num_steps * dt) ** 0.5 * self.book_scale),
        )
        self.features = torch.stack(features, -1)
        self.position_features = self.position / self.position_scale

    def replay(self) -> tuple[Tensor, dict]:
        """Starts the same episodes again: no shares, the initial book bought at its mark, the first orders filled."""
        self.t = 0
        self.holding = torch.zeros_like(self.spot[0])
        self.cash = self.cash_flow[0]
        return self.observe(), {}

    def observe(self) -> Tensor:
        """Observation (n, 8 + num_options) of the current state."""
        net_delta = (self.holding + self.delta[self.t]) / self.book_scale
        return torch.cat((self.features[self.t], net_delta[:, None], self.position_features[self.t]), dim=-1)

    def _spot(self, observation: Tensor) -> Tensor:
        """Spot (n,) of an observation."""
        next_steps = torch.round(observation[:, 1].reciprocal())
        variance = (REFERENCE_VOLATILITY * torch.exp(observation[:, 3])) ** 2
        average = self.dynamics.expected_average_variance(variance, next_steps)
        return self.middle_strike * torch.exp(observation[:, 2] * (average * next_steps * self.dynamics.dt).sqrt())

    def decode(self, observation: Tensor) -> HedgingState:
        """Observation (n, 8 + num_options) → its natural units."""
        time_left, _, _, log_volatility, delta, delta_sd, _, net_delta = observation[:, :8].unbind(-1)
        step = torch.round((1.0 - time_left) * self.num_steps)
        spot, variance = self._spot(observation), (REFERENCE_VOLATILITY * torch.exp(log_volatility)) ** 2
        gamma = self.book_scale * delta_sd / (spot * (variance * self.dynamics.dt).sqrt())
        steps_left = (self.expiry - step[:, None]).clamp(min=0)
        volatility = self.smile.volatility(step, spot / self.initial_spot, variance)
        delta, holding = self.book_scale * delta, self.book_scale * (net_delta - delta)
        position = self.position_scale * observation[:, 8:]
        time_to_expiry = steps_left * self.dynamics.dt
        return HedgingState(step.long(), spot, variance, delta, gamma, holding, position, volatility, time_to_expiry)

    @staticmethod
    def to_band(net_delta: Tensor, actions: Tensor) -> Tensor:
        """Net delta (…) in shares → the nearest one in the band of actions (…, 2), where the trade takes it."""
        centre, half_width = actions[..., 0], actions[..., 1].clamp(min=0)
        return torch.minimum(torch.maximum(net_delta, centre - half_width), centre + half_width)

    def after_trade(self, observation: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """What the trade of a step does, before the market moves: a function of observation and action alone.

        Returns:
            The observation after the trade, which differs in its net delta, and the cost of the trade (n,), currency.
        """
        before = self.book_scale * observation[:, NET_DELTA]
        after = self.to_band(before, actions)
        cost = self.cost_rate * (after - before).abs() * self._spot(observation)
        return with_net_delta(observation, after / self.book_scale), cost

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, dict]:
        """Trades, then moves the market. actions (n, 2) → observation, reward, terminated, truncated (n,), info.

        Raises:
            RuntimeError: the episode is over; call `reset`.
        """
        if self.t >= self.num_steps:
            raise RuntimeError("the episode is over (or never began): call reset()")
        t, spot = self.t, self.spot[self.t]
        net_delta = self.holding + self.delta[t]
        traded = self.to_band(net_delta, actions) - net_delta
        net_delta, holding, turnover = net_delta + traded, self.holding + traded, traded.abs()
        cost = self.cost_rate * turnover * spot
        wealth_change = holding * (self.spot[t + 1] - spot) + self.book_change[t]
        self.cash = self.cash - traded * spot - cost + self.cash_flow[t + 1]
        self.t = t + 1
        done = self.t == self.num_steps
        if done:  # the last options have been settled; the shares are sold
            unwinding = self.cost_rate * holding.abs() * self.spot[t + 1]
            cost, turnover = cost + unwinding, turnover + holding.abs()
            self.cash = self.cash + holding * self.spot[t + 1] - unwinding
            holding = torch.zeros_like(holding)
        self.holding = holding
        income = self.income[t]
        reward = income + wealth_change - cost - 0.5 * self.risk_aversion * wealth_change**2
        terminated = torch.full((self.num_envs,), done, device=self.device)
        truncated = torch.zeros_like(terminated)
        info = {
            "wealth_change": wealth_change,
            "income": income,
            "cost": cost,
            "turnover": turnover,
            "net_delta": net_delta,
            "hedged_change": self.hedged_change[t],
            "hedged_cost": self.hedged_cost[t],
        }
        return self.observe(), reward, terminated, truncated, info

    @property
    def wealth(self) -> Tensor:
        """(n,) cash + shares + options at their mark, costs paid; once the episode is over, all of it is cash."""
        return self.cash + self.holding * self.spot[self.t] + self.book_value[self.t]


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
