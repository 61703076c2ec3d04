"""Makers in a market: classical ones, whose formulas are computed once for an episode, and one seat among rivals."""

from collections.abc import Callable, Sequence
from typing import Self

import gymnasium as gym
import torch
from gymnasium.vector import VectorEnv

from envs.market.hedging import Policy
from envs.market.quoting import QuotingEnv, QuotingState

Tensor = torch.Tensor
ROWS_AT_ONCE = 16_384  # for which terms are computed together


class Maker:
    """A policy in two parts, of which the first does not depend on what the maker holds or its rivals quote.

    On a known market the first is computed for many steps at once (`in_market`), which gives the same numbers and saves
    most of the time where rows are few.

    Args:
        env: the market that it is made for.
        terms: public state (the first five fields of `QuotingState`, (n,)) → tensors (n, …).
        respond: (these tensors, observation (n, size)) → action.

    A subclass may define the two as methods instead.
    """

    def __init__(
        self,
        env: QuotingEnv,
        terms: Callable[[QuotingState], Sequence[Tensor]],
        respond: Callable[[Sequence[Tensor], Tensor], Tensor],
    ):
        self.env = env
        self.terms = terms
        self.respond = respond

    def __call__(self, observation: Tensor) -> Tensor:
        """Observation (n, size) → action (n, actions)."""
        return self.respond(self.terms(self.env.decode(observation)), observation)


def in_market(policy: Policy, market: QuotingEnv, rows: slice = slice(None)) -> Policy:
    """The policy on observations of the current step of `market`, of one maker or several in each of these rows.

    It does what `policy` does, faster if that is a `Maker`.
    """
    return _InMarket(policy, market, rows) if isinstance(policy, Maker) else policy


class _InMarket:
    def __init__(self, maker: Maker, market: QuotingEnv, rows: slice):
        self.maker = maker
        self.market = market
        self.rows = range(*rows.indices(market.num_envs))

    def __call__(self, observation: Tensor) -> Tensor:
        market = self.market
        of_maker = market.known.setdefault(self.maker, {})
        which = (self.rows, len(observation), market.t)
        if which not in of_maker:
            of_maker.update(self._compute(market.t, len(observation)))
        return self.maker.respond(of_maker[which], observation)

    def _compute(self, first: int, makers: int) -> dict:
        """The terms of some steps from the first on, for so many makers, the same number in each row."""
        market = self.market
        rows = self.rows
        last = min(first + max(1, ROWS_AT_ONCE // len(rows)), market.num_steps)
        seen = market.public_observations(first, last).unflatten(0, (last - first, market.num_envs))
        seen = seen[:, rows.start : rows.stop].flatten(0, 1)
        terms = [x.unflatten(0, (last - first, len(rows))) for x in self.maker.terms(self.maker.env.decode(seen))]
        if makers > len(rows):
            terms = [term.repeat_interleave(makers // len(rows), 1) for term in terms]
        steps = zip(*(term.unbind() for term in terms), strict=True) if terms else [()] * (last - first)
        return {(rows, makers, t): step for t, step in zip(range(first, last), steps, strict=True)}


class AgainstRivals(VectorEnv):
    """One seat of a `QuotingEnv`, the others taken by given policies: a market for one learner or one contestant.

    Args:
        env: the market of all makers.
        rivals: their policies, observation (n, size) → action, one for every other seat, next seat first.
        seat: of the learner.

    Observation (n, size), action (n, actions), reward (n,) and `info` (n,) are those of the seat, see `QuotingEnv`.
    """

    metadata = QuotingEnv.metadata

    def __init__(self, env: QuotingEnv, rivals: Sequence[Policy], seat: int = 0):
        if len(rivals) != env.num_makers - 1:
            raise ValueError(f"{len(rivals)} rivals (num_makers − 1 = {env.num_makers - 1})")
        if not 0 <= seat < env.num_makers:
            raise ValueError(f"seat is {seat} (at least 0, at most {env.num_makers - 1})")
        self.env = env
        self.rivals = list(rivals)
        self.playing = [in_market(policy, env) for policy in rivals]
        self.seat = seat
        self.other_seats = [(seat + 1 + i) % env.num_makers for i in range(len(rivals))]
        self.num_envs = env.num_envs
        self.num_steps = env.num_steps
        self.device = env.device
        self.dtype = env.dtype
        self.single_observation_space = env.maker_observation_space
        self.single_action_space = env.maker_action_space
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, env.num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, env.num_envs)

    @property
    def generator(self) -> torch.Generator:
        return self.env.generator

    def like(self, num_envs: int) -> Self:
        """The same market with another number of rows."""
        return type(self)(self.env.like(num_envs), self.rivals, self.seat)

    def standing_still(self, num_envs: int, variance: Tensor | float | None = None) -> Self:
        """The same market with constant spot, constant variance (n,) and no takers, in which to look at policies."""
        still = self.like(num_envs)
        market = still.env
        steps = self.num_steps
        tensor = {"device": self.device, "dtype": market.dtype}
        variance = torch.as_tensor(market.dynamics.initial_variance if variance is None else variance, **tensor)
        intensity = torch.full((num_envs, steps, 2), market.arrival_rate, **tensor)
        nobody = torch.full((num_envs, steps, 2, market.num_options, 1), 2.0, **tensor)
        spot = torch.full((num_envs, steps + 1), market.initial_spot, **tensor)
        market.set_market(spot, variance.expand(num_envs)[:, None].expand_as(spot), intensity, nobody)
        still.replay()
        return still

    def observe_at(self, t: int, vega: Tensor | float = 0.0) -> Tensor:
        """Observation of the seat (n, size) at step t of the current market, after the rivals have quoted without
        inventory. The seat holds `vega` (currency per vol point) in the middle option, hedged."""
        market = self.env
        market.replay()
        market.t = t
        for seat, policy in zip(self.other_seats, self.rivals, strict=True):
            market.edges[:, seat] = market.to_edges(policy(market.observe()[:, seat]))
        middle = market.middle
        held = vega / market.vega[t, :, middle]
        market.position[:, self.seat, middle] = held
        market.holding[:, self.seat] = -held * market.delta[t, :, middle]
        return market.observe()[:, self.seat]

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Tensor, dict]:
        """As `QuotingEnv.reset`, from the seat."""
        self.observations, info = self.env.reset(seed=seed, options=options)
        return self.observations[:, self.seat], info

    def replay(self) -> tuple[Tensor, dict]:
        """As `QuotingEnv.replay`, from the seat."""
        self.observations, info = self.env.replay()
        return self.observations[:, self.seat], info

    def _with_rivals(self, actions: Tensor) -> Tensor:
        """Actions of all makers (n, num_makers, actions) from those of the seat (n, actions)."""
        self.env.check_columns(actions)
        everyone = [None] * self.env.num_makers
        everyone[self.seat] = actions
        for seat, policy in zip(self.other_seats, self.playing, strict=True):
            everyone[seat] = policy(self.observations[:, seat])
        return torch.stack(everyone, 1)

    def advance(self, actions: Tensor) -> Tensor:
        """As `QuotingEnv.advance`: actions (n, actions) → observation (n, size) of the seat."""
        self.observations = self.env.advance(self._with_rivals(actions))
        return self.observations[:, self.seat]

    def settle(self, steps: int | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """As `QuotingEnv.settle`: rewards and `info` (steps, n) of the seat."""
        rewards, info = self.env.settle(steps)
        return rewards[..., self.seat], {name: values[..., self.seat] for name, values in info.items()}

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, dict]:
        """actions (n, actions) → observation (n, size), reward, terminated, truncated (n,), info of the seat."""
        self.observations, reward, terminated, truncated, info = self.env.step(self._with_rivals(actions))
        info = {name: value[:, self.seat] for name, value in info.items()}
        return self.observations[:, self.seat], reward[:, self.seat], terminated, truncated, info
