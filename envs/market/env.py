"""MarketEnv: what HedgingEnv and QuotingEnv have in common.

One table describes the observation and one the action. Spaces, columns and checks follow from them.
"""

from collections.abc import Callable
from itertools import accumulate, groupby
from typing import NamedTuple, Self

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv

from envs.market.dynamics import draw_noise

Tensor = torch.Tensor

ROWS_TOGETHER = 32  # a multiple of what vectorised loops take at a time
ROWS_AHEAD = 512  # rows of all episodes whose paths are computed at once


class Part(NamedTuple):
    """A part of an observation.

    Attributes:
        width: number of columns.
        values: environment → current values, (num_envs, width) or (num_envs, num_makers, width), or what broadcasts.
        unit: natural units of 1 in the observation, a number or (width,). It tells policies; it scales nothing.
        over_time: actions do not change this part. Then `values` is called once, for speed, when the market is set, and
            gives all times: (num_steps + 1, num_envs, width), in a `QuotingEnv` (num_steps + 1, num_envs, 1, width).
    """

    width: int
    values: Callable[["MarketEnv"], Tensor]
    unit: Tensor | float = 1.0
    over_time: bool = False


class MarketEnv(VectorEnv):
    """Base class of the batched environments, torch tensors in and out.

    A subclass adds an observation by a row in `observation_parts` and an action by a row in `action_bounds`, at any
    place in them:

        from envs.market.env import Part

        class MyEnv(QuotingEnv):
            def observation_parts(self):
                return {**super().observation_parts(), "flow²": Part(1, lambda env: env.flow[:, None, None] ** 2)}

            def action_bounds(self):
                return {**super().action_bounds(), "premium": (-1.0, 1.0)}

            def to_edges(self, actions):
                premium = self.by_name(actions)["premium"][..., None]  # on the asks of all options
                return super().to_edges(actions) + torch.stack((premium, torch.zeros_like(premium)), -2)

    An observation should be of order one: agents do not stretch a column whose standard deviation is below 0.01. The
    method that uses a number of an action finds it by name (`by_name`); one name may stand for several numbers, such as
    the asks of all options. A policy returns the numbers in the order of `action_bounds`, or by name through
    `to_action`. A subclass with arguments of its own adds them to `settings` in its
    constructor, for `like`.

    Attributes:
        settings: arguments of the constructor.
        columns: name of a part of the observation → slice of its columns.
        action_columns: name in an action → its column, or the slice of its columns if it stands for several numbers.
        action_size: numbers of one agent's action.
        t: steps made so far.
        generator: source of all randomness; random until `reset(seed=…)`.
    """

    metadata = {"autoreset_mode": AutoresetMode.DISABLED, "render_modes": []}

    def observation_parts(self) -> dict[str, Part]:
        """The parts of an observation by name, in order."""
        raise NotImplementedError

    def action_bounds(self) -> dict[str, tuple[float, float] | tuple[float, float, int]]:
        """The numbers of an action by name, in order: lowest and highest value in the action space, and how many
        numbers the name stands for. A name without a count is one number, without an axis of its own."""
        raise NotImplementedError

    def _read_tables(self) -> tuple[gym.spaces.Box, gym.spaces.Box]:
        """Sets `columns` and `action_columns`; returns the spaces of one agent's observation and action."""
        self.parts = self.observation_parts()
        ends = list(accumulate((part.width for part in self.parts.values()), initial=0))
        self.columns = dict(zip(self.parts, map(slice, ends[:-1], ends[1:]), strict=True))
        observation = gym.spaces.Box(-np.inf, np.inf, (ends[-1],), np.float32)
        self.action_columns = {}
        lows = []
        highs = []
        for name, (low, high, *count) in self.action_bounds().items():
            first = len(lows)
            lows += [low] * (count[0] if count else 1)
            highs += [high] * (count[0] if count else 1)
            self.action_columns[name] = slice(first, len(lows)) if count else first
        self.action_size = len(lows)
        low, high = np.array(lows, np.float32), np.array(highs, np.float32)
        return observation, gym.spaces.Box(low, high, dtype=np.float32)

    def _set_spaces(self, observation: gym.spaces.Box, action: gym.spaces.Box) -> None:
        """Sets the spaces from those of one environment."""
        self.single_observation_space = observation
        self.single_action_space = action
        self.observation_space = gym.vector.utils.batch_space(observation, self.num_envs)
        self.action_space = gym.vector.utils.batch_space(action, self.num_envs)

    def _close_episode(self) -> None:
        """The state before the first reset: a step is an error, and the generator has a random seed."""
        self.generator = torch.Generator(self.device)
        self.generator.seed()
        self.ahead = []  # (state of the generator after it, paths) of the episodes drawn ahead
        self.t = self.num_steps

    def like(self, num_envs: int) -> Self:
        """The same environment with another number of rows."""
        return type(self)(**{**self.settings, "num_envs": num_envs})

    def _seed(self, seed: int | None, options: dict | None) -> None:
        """Checks and applies the arguments of `reset` that all environments have."""
        mask = (options or {}).get("reset_mask")
        if mask is not None and not np.all(mask):
            raise ValueError("all environments end together: reset_mask must be all True")
        if seed is not None:
            self.generator.manual_seed(seed)

    def _draw_paths(self, n: int, normals: int, paths: Callable[[Tensor], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """The paths (n, …) of the next episode, from `normals` numbers of the generator for each of its rows.

        On a CPU, operations on few rows cost as much as on many. So few environments have the paths of several episodes
        computed at once, and the generator is then put where drawing this one alone would have left it: numbers and
        checkpoints do not depend on it. Rows are filled up so that no row is at the end of a vectorised loop, where the
        last digits differ.
        """
        rows = -(-n // ROWS_TOGETHER) * ROWS_TOGETHER
        episodes = ROWS_AHEAD // rows
        if episodes < 2 or self.device.type != "cpu" or self.dynamics.follows_row_numbers:
            return tuple(column[:n] for column in paths(draw_noise(rows, normals, self.generator, self.dtype)))
        fits = self.ahead and len(self.ahead[0][1][0]) == rows
        if not (fits and torch.equal(self.generator.get_state(), self.state)):
            noise = []
            states = []
            for _ in range(episodes):
                noise.append(draw_noise(rows, normals, self.generator, self.dtype))
                states.append(self.generator.get_state())
            columns = (column.split(rows) for column in paths(torch.cat(noise)))
            self.ahead = list(zip(states, zip(*columns, strict=True), strict=True))
        self.state, columns = self.ahead.pop(0)
        self.generator.set_state(self.state)
        return tuple(column[:n] for column in columns)

    def _check_running(self) -> None:
        if self.t >= self.num_steps:
            raise RuntimeError("the episode is over (or never began): call reset()")

    def advance(self, actions: Tensor) -> Tensor:
        """Trades and moves the market: actions → the next observation. What it earned is left to `settle`.

        Raises:
            RuntimeError: the episode is over; call `reset`.
        """
        raise NotImplementedError

    def settle(self, steps: int | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Rewards and `info` of the last `steps` steps, of all since the start by default: (steps, num_envs, …)."""
        raise NotImplementedError

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """`advance`, and `settle` for this step: actions → observation, reward, terminated, truncated, info.

        A policy that needs no rewards on the way is faster with `advance` in a loop and one `settle` at the end.

        Raises:
            RuntimeError: the episode is over; call `reset`.
        """
        observation = self.advance(actions)
        reward, info = self.settle(1)
        terminated = torch.full((self.num_envs,), self.t == self.num_steps, device=self.device)
        info = {name: values[0] for name, values in info.items()}
        return observation, reward[0], terminated, torch.zeros_like(terminated), info

    def _join_parts(self) -> None:
        """Sets `blocks`: the observation's parts, with neighbours that are known for all times evaluated and joined."""
        self.blocks = []
        for over_time, parts in groupby(self.parts.values(), lambda part: part.over_time):
            if over_time:
                pairs = [(part.values(self), part.width) for part in parts]
                shape = np.broadcast_shapes(*(values.shape[:-1] for values, _ in pairs))
                self.blocks.append(torch.cat([values.expand(*shape, width) for values, width in pairs], -1))
            else:
                self.blocks += parts

    def observe(self) -> Tensor:
        """Observation of the current state: (num_envs, size), or (num_envs, num_makers, size) with several makers."""
        shape = self.holding.shape
        values = []
        for block in self.blocks:
            if isinstance(block, Part):
                values.append(block.values(self).expand(*shape, block.width))
            else:
                values.append(block[self.t].expand(*shape, -1))
        return torch.cat(values, -1)

    def column(self, observation: Tensor, name: str) -> Tensor:
        """A part of one column (…) of observations (…, size)."""
        return observation[..., self.columns[name].start]

    def action_names(self) -> list[str]:
        """A name for every column of an action, for messages: "target", "ask 0", "ask 1" …"""
        names = []
        for name, column in self.action_columns.items():
            names += [name] if isinstance(column, int) else [f"{name} {i}" for i in range(column.stop - column.start)]
        return names

    def check_columns(self, actions: Tensor) -> None:
        """Raises ValueError if `actions` (…, size) have another number of columns than `action_bounds` says."""
        if actions.shape[-1] != self.action_size:
            names = ", ".join(self.action_columns)
            raise ValueError(f"actions have {actions.shape[-1]} columns ({self.action_size}: {names})")

    def by_name(self, actions: Tensor) -> dict[str, Tensor]:
        """Actions (…, size) → their numbers by name, (…), or (…, count) where a name stands for several.

        Raises:
            ValueError: `actions` have another number of columns.
        """
        self.check_columns(actions)
        return {name: actions[..., column] for name, column in self.action_columns.items()}

    def to_action(self, **numbers: Tensor | float) -> Tensor:
        """Actions (…, size) from their numbers by name, one of them at least a tensor; those not named are 0.

        A tensor is (…), or (…, count) for a name that stands for several numbers; a number fills its columns. So a
        policy that knows the numbers of this environment also works in a subclass that has more.
        """
        unknown = numbers.keys() - self.action_columns.keys()
        if unknown:
            raise ValueError(f"an action has no {', '.join(sorted(unknown))} (only {', '.join(self.action_columns)})")
        name, example = next((name, x) for name, x in numbers.items() if isinstance(x, Tensor))
        batch = example.shape if isinstance(self.action_columns[name], int) else example.shape[:-1]
        action = example.new_zeros(*batch, self.action_size)
        for name, value in numbers.items():
            action[..., self.action_columns[name]] = value
        return action
