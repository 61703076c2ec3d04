"""Phase 4: makers that learn from each other, by self-play with PPO.

The market is phase 3's: makers of European options quote, takers choose among them or walk away, and every maker hedges
the delta of its book at a cost. Two models are kept: π_new learns, π_old takes the other seats; after the update π_new
becomes π_old. The algorithm is CleanRL's PPO with GAE, batched: a rollout is one whole episode of every environment.
All the finance is in envs/. Copy this file, change thirty lines, run it.
"""

import copy
import math
import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn as nn

from envs import AgainstRivals, QuotingEnv
from envs.benchmark.contest import Validation
from envs.benchmark.league import MET_IN_TRAINING, SelfplayValidation, selfplay_benchmark
from envs.benchmark.makers import (
    Makers,
    against,
    classical_makers,
)
from envs.figures.selfplay import selfplay_report
from envs.market.dynamics import Dynamics
from envs.market.history import Historical
from envs.market.quoting import BadQuote, uncross
from envs.market.rivals import in_market
from envs.market.units import TRADING_DAYS
from envs.models import QuotingArgs, check_options, check_unseen, make_model
from envs.networks import ActorCritic, Adam, clip_gradients, minibatches
from envs.run.args import BatchedRunArgs, check_copies, check_ppo, check_range, saved_args
from envs.run.errors import check
from envs.run.files import check_memory, load_checkpoint, load_weights
from envs.run.ranks import average as average_over_ranks
from envs.run.ranks import average_gradients, check_equal_parameters, rank, rank_seed, standardise
from envs.run.run import Run, progress_bar, run_main
from envs.run.seeds import EXPLORATION_SEED, OPPONENT_SEED, RESPONSE_SEED, SCALE_SEED

Tensor = torch.Tensor
PHASE = "phase4"  # a checkpoint is only loaded into the phase that wrote it
EPISODES = 2048  # played side by side for validation
HIDDEN = 64  # width of the hidden layers
IMITATION = 1200  # updates that imitate the classical maker before training
RIVAL_SCALES = (0.7, 2.0)  # of the middles and of the widths of rivals' quotes in observations, see `Agent.seen`
CLASSICS_AT_FIRST = 0.4  # of their rows that classical makers have when the run starts; at its end they have all
MOST = 6.0  # vol points: quotes further out are imitated as this far out, where next to nobody trades
QUICK = {"total_timesteps": 200_000, "eval_episodes": 1024, "num_evaluations": 8}  # the flags that --quick sets


@dataclass
class Args(QuotingArgs, BatchedRunArgs):
    """Phase 4: train makers of options by self-play, so that they anticipate each other, then benchmark them.

    Two makers (or more) quote five options of one expiry, twice a trading day; takers arrive at random, with persistent
    order flow, and pick a maker or walk away; some of them know the fair values. The agent sets an ask and a bid for
    every option, in vol points from Black–Scholes, and hedges its delta at a cost; so do its opponents, which are its
    own past selves. At the end it is compared with the classical maker, Black–Scholes with Avellaneda–Stoikov quotes,
    tuned, in the same seat with the same takers; snapshots of the run and the classical makers play each other; a best
    response is trained against it, to see what it leaves on the table; and where nothing is risked and hedging is free,
    its edge is set beside the exact optimum, the Nash equilibrium's, and the monopoly's. Exit code 0: benchmark passed;
    1: failed; 2: bad input; 3: diverged; 130: Ctrl-C. Everything is written to runs/<run name>/.

    Commands to start from:

      python phase4_selfplay.py --num-envs 64               the main job, on a GPU if there is one
      python phase4_selfplay.py --opponent pool             fictitious self-play over past snapshots
      python phase4_selfplay.py --num-makers 3
      python phase4_selfplay.py --resume runs/NAME          go on where a run stopped
      python phase4_selfplay.py --evaluate runs/NAME --dynamics garch
      torchrun --nproc-per-node 2 phase4_selfplay.py        data-parallel; --num-envs is each process's

    Where the answer is known exactly, without risk aversion and cost, from a wide start and a narrow one:

      python benchmarks/selfplay_starts.py --neutral --seeds 1
    """

    exp_name: str = Path(__file__).stem
    """name of the experiment, part of the run's name"""
    evaluate: str | None = None
    """CHECKPOINT or run folder: only the benchmark (with --no-exploitability no training at all); market flags may
    differ from those trained with"""

    # Self-play
    opponent: Literal["lag", "league", "pool", "baseline"] = "lag"
    """who takes the seats that the classical makers leave: the agent some updates ago; that and, in other rows, one of
    a pool of its snapshots; the pool alone (fictitious self-play); or the tuned Avellaneda–Stoikov maker"""
    lag: int = 1
    """how many updates behind the latest opponent is"""
    past_share: float = 0.5
    """share of the rows without classical makers in which the opponent is from the pool, with --opponent league"""
    pool_size: int = 16
    """snapshots of the pool, evenly spaced over the run so far"""
    pool_sampling: Literal["uniform", "prioritised"] = "uniform"
    """how one is chosen for an iteration: all alike, or the more often the more it earns beyond the agent"""
    classical_share: float = 0.5
    """share of the rows in which the classical makers have the other seats at the end of the run (it grows), each its
    part of them, so that the agent remains good against makers unlike itself"""
    guests: tuple[str, ...] = ()
    """run folders or checkpoints of other runs, whose agents join the cross-play and, with --opponent pool, the pool"""
    start_edge: float | None = None
    """half-spread that training starts from, vol points, at raw action zero; by default that of the strongest classical
    maker, which the agent imitates first"""

    # The algorithm
    total_timesteps: int = 6_000_000
    """environment steps of the whole run, over all environments"""
    num_envs: int = 64
    """environments side by side; more of them are faster, but make fewer updates of as many steps"""
    learning_rate: float = 1.4e-3
    """learning rate of Adam"""
    anneal_share: float = 0.75
    """share of the run, its last, in which the learning rate falls to zero, as the square of what is left"""
    gamma: float = 1.0
    """discount factor; at 0 no maker is credited with how its rivals will react to its quotes"""
    gae_lambda: float = 0.85
    """λ of generalised advantage estimation"""
    min_std: float = 0.15
    """floor of the exploration's standard deviation (raw action): what is better shows in proportion to it"""
    copies: int = 4
    """rows that meet the same market and explore in opposite pairs (an even number, or 1); the mean of their advantages
    is taken off as luck"""
    episodes: int = 8
    """whole episodes of every environment that an update is made from, played side by side"""
    num_minibatches: int = 8
    """minibatches an epoch; must divide num_envs × num_steps"""
    update_epochs: int = 4
    """passes over a rollout"""
    norm_adv: bool = True
    """normalise advantages in each minibatch"""
    clip_coef: float = 0.2
    """PPO's clipping of the probability ratio"""
    ent_coef: float = 0.0
    """weight of the entropy bonus"""
    vf_coef: float = 0.5
    """weight of the value loss"""
    max_grad_norm: float = 0.5
    """gradients are clipped to this norm"""
    reward_scale: float = 0.2
    """the training reward is multiplied by this, so that values are of order one"""
    average: float = 0.35
    """share of the run over which a moving average of the agent's weights reaches back; it is what is benchmarked"""

    # The benchmark
    exploitability: bool = True
    """train a best response to the final policy, as long again as the training"""
    tuning_episodes: int = 2048
    """episodes that the classical makers are tuned on"""
    eval_episodes: int = 8192
    """episodes of the final benchmark (with historical: all the windows there are)"""

    @property
    def rows(self) -> int:
        """Episodes that this process plays side by side."""
        return self.episodes * self.num_envs

    @property
    def steps_per_iteration(self) -> int:
        """Environment steps of all processes in one iteration."""
        return self.episodes * super().steps_per_iteration

    @property
    def apart(self) -> bool:
        """Whether quotes are credited apart: where nothing but the step counts."""
        return self.gamma == 0

    @property
    def trains(self) -> bool:
        """Whether this command trains anything; a best response is trained in an evaluation, too."""
        return self.evaluate is None or (self.exploitability and self.dynamics != "historical")

    def check(self) -> None:
        """Raises UsageError for the first argument that cannot work."""
        super().check()
        check_range(self, 2, 2**26, "eval_episodes", "tuning_episodes")
        if self.trains:
            check_ppo(self)
            check_range(self, 0, 1, "average", "min_std", "anneal_share", open_low=True)
            check_copies(self)
            check_range(self, 1, 1024, "episodes")
            updates = self.num_iterations
            check(1 <= self.lag <= updates, f"--lag is {self.lag} (at least 1, at most the run's {updates} updates)")
            check_range(self, 2, 4096, "pool_size")
            check_range(self, 0, 1, "classical_share", "past_share")
            if self.start_edge is not None:
                check_range(self, 0, 10, "start_edge", open_low=True)


def make_market(args: Args, model: Dynamics, num_envs: int, device: torch.device) -> QuotingEnv:
    return QuotingEnv(num_envs, model, args.options(model.dt), device=device, **args.market())


# ALGO LOGIC: the agent


class Agent(nn.Module):
    """Gaussian policy and value function, two tanh layers each; the environment's action is `to_quote` of the raw one.

    The raw action is half-spread, skew, target delta and band, and a tilt and a width for each option. At zero it is a
    maker with one constant half-spread, the same for all options, who neither skews nor tilts its quotes and hedges the
    Black–Scholes delta within a constant band. `imitate` makes a classical maker of it. If quotes are credited `apart`
    (see `rollout`), each has a number of its own: what is added to every ask and to every bid, in place of tilts and
    widths.
    """

    def __init__(self, market: QuotingEnv, apart: bool = False):
        super().__init__()
        self.apart = apart
        size = market.maker_observation_space.shape[0]
        self.options = options = market.num_options
        self.parts = (4, options, options)  # of the raw action: common numbers, tilts, widths
        self.network = ActorCritic(size, sum(self.parts), HIDDEN)
        self.actor_logstd = nn.Parameter(torch.full((sum(self.parts),), -0.5))
        self.choice = (market.choice_sensitivity, market.reference_edge)
        self.rival_edges = market.columns["rival edges"]
        # Observations are standardised by what the classical maker met before training, and saved with the policy.
        self.register_buffer("observation_mean", torch.zeros(size))
        self.register_buffer("observation_std", torch.ones(size))
        self.register_buffer("half_spread", torch.tensor(1.0))  # of raw action zero, vol points
        self.register_buffer("band", torch.tensor(0.1))  # the same, shares

    @torch.no_grad()
    def fit(self, envs: list[AgainstRivals], classic) -> tuple[Tensor, Tensor]:
        """Sets the scales, those of the observations too, from episodes that `classic` plays in the agent's seat.

        Returns what it observed and what it did, (steps, …).
        """
        observed = []
        acted = []
        for env in envs:
            observation, _ = env.reset(seed=SCALE_SEED)
            for _ in range(env.num_steps):
                action = classic(observation)
                observed.append(observation)
                acted.append(action)
                observation = env.advance(action)
        observed = torch.cat(observed)
        acted = torch.cat(acted)
        action = envs[0].env.by_name(acted)
        self.half_spread.copy_(0.5 * (action["ask"] + action["bid"]).clamp(max=MOST).mean())
        self.band.copy_(action["band"].mean().clamp(0.01, 1.0))
        seen = self.seen(observed)
        self.observation_mean.copy_(seen.mean(0))
        # A column that never varies here (gbm's volatility) must not be blown up in another market where it does. The
        # columns of rivals' quotes have a wide scale, so that the agent starts with weak reactions to them: strong ones
        # can be exploited, and self-play among makers that react to each other takes long to settle. The middles tell
        # who the rival is, and nobody moves them for nothing, so theirs is less wide.
        std = torch.where(seen.std(0) < 1e-2, 1.0, seen.std(0))
        rivals = std[self.rival_edges].view(-1, 2, self.options)
        rivals.copy_(rivals.new_tensor(RIVAL_SCALES)[:, None].expand_as(rivals))
        self.observation_std.copy_(std)
        return observed, acted

    def imitate(self, market: QuotingEnv, observed: Tensor, acted: Tensor, generator: torch.Generator) -> None:
        """Regresses the policy on another maker's actions: least squares, quotes weighted by their option's vega."""
        optimizer = Adam(self.network.parameters(), 0.01)
        vegas = market.vegas_at(market.decode(observed))
        weight = torch.cat((vegas, vegas), 1) / vegas.mean()  # of asks and bids
        quotes = weight.shape[1]
        normalised = self.normalise(observed)
        for i in range(IMITATION):
            optimizer.param_groups[0]["lr"].fill_(0.01 * (1 - i / IMITATION))
            rows = torch.randint(len(observed), (512,), generator=generator, device=observed.device)
            wanted = acted[rows]
            missed = self.to_quote(observed[rows], self.network.actor(normalised[rows])) - wanted.clamp(-MOST, MOST)
            loss = (missed[:, :quotes].square() * weight[rows]).mean() + 3.0 * missed[:, quotes:].square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            self.actor_logstd.fill_(math.log(0.2))  # near an optimum, wide exploration leads away from it

    def seen(self, observation: Tensor) -> Tensor:
        """The observation with what the rivals' quotes attract in place of the quotes themselves.

        An edge d would attract the share 1/(1 + exp(k(d − d_ref))) of the takers if there were nobody else. It is
        bounded, so edges unlike those of training do no harm. Asks' less bids' shares say where the middle of a rival's
        quotes is, their sums how wide they are.
        """
        k, reference = self.choice
        share = torch.sigmoid(-k * (observation[:, self.rival_edges] - reference))
        ask, bid = share.unflatten(1, (-1, 2, self.options)).unbind(2)
        share = torch.stack((ask - bid, ask + bid), 2).flatten(1)
        before, after = observation[:, : self.rival_edges.start], observation[:, self.rival_edges.stop :]
        return torch.cat((before, share, after), 1)

    def normalise(self, observation: Tensor) -> Tensor:
        return ((self.seen(observation) - self.observation_mean) / self.observation_std).clamp(-10, 10)

    def to_quote(self, observation: Tensor, raw_action: Tensor) -> Tensor:
        """Observation (n, size) and raw action → environment action, its numbers in the order of `action_bounds`."""
        common, *of_options = raw_action.split(self.parts, -1)
        common = common.clamp(-5, 5)
        # The level of all half-spreads is what self-play has to find: a large factor, so that it is found faster
        level = 1.2 * common[:, :1]
        if self.apart:  # far from the money the fair value may lie 10 vol points off the reference price
            ask, bid = (added.clamp(-10, 10) for added in of_options)
            half_spread = self.half_spread * level.exp()
            ask, bid = uncross(half_spread + common[:, 1:2] + ask, half_spread - common[:, 1:2] + bid)
        else:
            tilt, width = (x.clamp(-5, 5) for x in of_options)
            half_spreads = self.half_spread * (level + 0.5 * width).exp()
            up = common[:, 1:2] + tilt  # of asks and bids, vol points
            ask, bid = half_spreads + up, half_spreads - up
        target = 0.4 * common[:, 2:3]
        band = self.band * common[:, 3:4].exp()
        return torch.cat((ask, bid, target, band), -1)

    def logprob(self, noise: Tensor) -> Tensor:
        """Log-probability (…, 1) of the raw action that lies `noise` (…, actions) standard deviations from the mean; of
        quotes that are credited apart (…, 1 + quotes), of the common numbers together and of every quote's."""
        log_density = -0.5 * noise.square() - (self.actor_logstd + 0.5 * math.log(2 * math.pi))
        if not self.apart:
            return log_density.sum(-1, keepdim=True)
        common, quotes = log_density.tensor_split([self.parts[0]], -1)
        return torch.cat((common.sum(-1, keepdim=True), quotes), -1)

    def evaluate_actions(self, observation: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised observations and raw actions → log-probabilities as `logprob`, entropy (), values (n,)."""
        mean, value = self.network(observation)
        logprob = self.logprob((action - mean) * torch.exp(-self.actor_logstd))
        entropy = (0.5 + 0.5 * math.log(2 * math.pi) + self.actor_logstd).sum()
        return logprob, entropy, value

    def policy(self, observation: Tensor) -> Tensor:
        """The deterministic policy that is benchmarked: observation (n, size) → environment action."""
        return self.to_quote(observation, self.network.actor(self.normalise(observation)))


# ALGO LOGIC: self-play


def to_vector(agent: Agent) -> Tensor:
    """All that the agent is, parameters and normaliser, as one vector: a snapshot."""
    return torch.cat([value.flatten() for value in agent.state_dict().values()])


def from_vector(agent: Agent, snapshot: Tensor) -> None:
    """Makes `agent` what it was at that snapshot, in place (a captured CUDA graph knows its tensors by address)."""
    values = list(agent.state_dict().values())
    for value, part in zip(values, snapshot.split([value.numel() for value in values]), strict=True):
        value.copy_(part.view_as(value))


def at(snapshot: Tensor, agent: Agent):
    """The policy of a snapshot, to be benchmarked."""
    past = copy.deepcopy(agent)
    from_vector(past, snapshot)
    return past.policy


class Opponents(nn.Module):
    """The policies in the other seats: classical makers in the first rows, then a past self, then the latest one.

    `latest` (lag, …) and `pool` (size, …) hold snapshots, vectors as `to_vector` makes them: the last iterates, in a
    ring; guests, and then a pool that stays evenly spaced over the run, because every second snapshot goes when it is
    full (average past play, Heinrich, Lanctot & Silver 2015). Each has its share of the rows of every update, not a
    share of the updates: so each update is good against all of them. The classical makers' share grows during the run;
    what they do not have yet, the agent's own past has.
    """

    def __init__(self, args: Args, agent: Agent, guests: list[Tensor], classics: list, market: QuotingEnv):
        """`classics` have the named baseline first; `market` is the one that they all play in."""
        super().__init__()
        self.args = args
        share = args.classical_share
        past = {"league": args.past_share, "pool": 1.0}.get(args.opponent, 0.0)
        if args.opponent == "baseline":
            share, classics = 1.0, classics[:1]
        groups = market.num_envs // args.copies  # of rows
        ends = [args.copies * round(share * groups * (i + 1) / len(classics)) for i in range(len(classics))]
        rows = [slice(first, end) for first, end in zip([0, *ends], ends, strict=False)]
        self.first = ends[-1]  # row of the past self
        self.end = min(market.num_envs, self.first + args.copies * round((1.0 - share) * past * groups))  # of its rows
        self.seats = market.num_makers - 1  # of opponents, in each row
        self.newest = copy.deepcopy(agent).requires_grad_(False)
        self.past = copy.deepcopy(agent).requires_grad_(False)
        place = torch.zeros(self.first)  # of a row among its maker's, from 0 to 1; copies of a market have the same
        for own in rows:
            group = torch.arange(own.stop - own.start) // args.copies * args.copies
            place[own] = group / max(1, own.stop - own.start)
        self.register_buffer("place", place.repeat_interleave(self.seats)[:, None], persistent=False)
        self.register_buffer("classics", torch.ones(1), persistent=False)  # share of their rows that they have now
        playing = [(in_market(classic, market, own), own) for classic, own in zip(classics, rows, strict=True)]
        self.playing = [(policy, own) for policy, own in playing if own.start < own.stop]
        self.guests = len(guests)
        self.stored = 0  # snapshots in the pool
        self.spacing = 1  # updates from one of them to the next
        self.register_buffer("latest", to_vector(agent).repeat(args.lag, 1))
        self.register_buffer("pool", torch.stack([*guests, *[to_vector(agent)] * args.pool_size]))
        self.register_buffer("scores", torch.zeros(len(self.pool)))  # what each earns beyond the agent
        self.register_buffer("born", torch.full((len(self.pool),), -1))  # after how many updates
        self.register_buffer("chosen", torch.zeros(1, dtype=torch.long))

    def get_extra_state(self) -> list[int]:
        return [self.stored, self.spacing]

    def set_extra_state(self, state: list[int]) -> None:
        self.stored, self.spacing = map(int, state)
        fits = 0 <= self.stored <= self.args.pool_size and self.spacing >= 1
        check(fits, "the run to resume does not fit this script, its pool has other sizes")

    @torch.no_grad()
    def advance(self, agent: Agent, iteration: int, generator: torch.Generator) -> None:
        """Chooses the opponents of this iteration (1, 2, …) and remembers the agent as it is before its update."""
        slot = (iteration - 1) % self.args.lag  # what was put there `lag` updates ago; at first the untrained agent
        from_vector(self.newest, self.latest[slot])
        self.latest[slot] = to_vector(agent)
        done = (iteration - 1) / self.args.num_iterations
        self.classics.fill_(CLASSICS_AT_FIRST + (1.0 - CLASSICS_AT_FIRST) * done)
        if self.first < self.end:
            if (iteration - 1) % self.spacing == 0:
                self._add(agent, iteration - 1)
            self._choose(generator)

    def _add(self, agent: Agent, updates: int) -> None:
        """Adds the agent to the pool, which is thinned out when it is full."""
        if self.stored == self.args.pool_size:
            for tensor in (self.pool, self.scores, self.born):
                kept = tensor[self.guests :: 2].clone()
                tensor[self.guests : self.guests + len(kept)] = kept
            self.stored = len(kept)
            self.spacing *= 2
            if updates % self.spacing != 0:
                return
        new = self.guests + self.stored
        self.pool[new] = to_vector(agent)
        self.scores[new] = self.scores[:new].mean().nan_to_num()
        self.born[new] = updates
        self.stored += 1

    def _choose(self, generator: torch.Generator) -> None:
        """Draws the past self from guests and pool: the largest logit plus Gumbel noise is a softmax's choice, made
        without waiting for the device."""
        scores = self.scores[: self.guests + self.stored]
        logits = torch.zeros_like(scores)
        if self.args.pool_sampling == "prioritised":
            logits = (scores - scores.mean()) / scores.std(correction=0).clamp(min=1e-6)
        gumbel = -torch.empty_like(scores).exponential_(generator=generator).log()
        self.chosen.copy_((logits + gumbel).argmax(keepdim=True))
        from_vector(self.past, self.pool[self.chosen][0])

    def policy(self, observation: Tensor) -> Tensor:
        """Observation (rows · seats, size) → environment action, without exploration."""
        seats = self.seats
        classics = [play(observation[own.start * seats : own.stop * seats]) for play, own in self.playing]
        if self.args.opponent == "baseline":
            return torch.cat(classics)
        past = slice(self.first * seats, self.end * seats)
        if self.args.opponent == "pool":
            played = self.past.policy(observation)
        else:
            played = self.newest.policy(observation)
            if past.start < past.stop:
                played[past] = self.past.policy(observation[past])
        if classics:
            now = self.place < self.classics
            played[: past.start] = torch.where(now, torch.cat(classics), played[: past.start])
        return played

    def score(self, lead: Tensor) -> None:
        """Learns by how much the opponents' objectives were above the agent's in an iteration, lead (rows,)."""
        if self.first < self.end:
            ahead = average_over_ranks(lead[self.first : self.end].mean())
            self.scores[self.chosen] += 0.2 * (ahead - self.scores[self.chosen])


# ALGO LOGIC: PPO


class Batch(NamedTuple):
    """Steps of a rollout, in any order: (n, …)."""

    observations: Tensor  # normalised
    actions: Tensor  # raw
    logprobs: Tensor  # (n, 1), or (n, 1 + quotes) if they are credited apart
    advantages: Tensor  # the same
    returns: Tensor


def exploration_noise(env: QuotingEnv, agent: Agent, args: Args, generator: torch.Generator) -> Tensor:
    """Normals (num_steps, num_envs, actions), the exploration's noise. Copies of a market explore in pairs, in opposite
    directions: what they earn then differs more by what they try than it would with independent noise."""
    shape = (env.num_steps, env.num_envs // min(args.copies, 2), len(agent.actor_logstd))
    noise = torch.randn(shape, generator=generator, device=agent.actor_logstd.device)
    return noise if args.copies == 1 else torch.stack((noise, -noise), 2).flatten(1, 2)


@torch.no_grad()
def rollout(market: QuotingEnv, agent: Agent, opponent, args: Args, generator: torch.Generator) -> tuple[Batch, Tensor]:
    """Plays one whole episode in every environment and estimates the agent's advantages (GAE; the end is terminal).

    The agent's seat goes round from row to row, `opponent` has all others. Also returns by how much the opponents'
    objectives were above the agent's, (num_envs,). In the loop is only what the next action needs; the rest is done for
    all steps at once.
    """
    n, num_makers = market.num_envs, market.num_makers
    rows = torch.arange(n, device=market.device)
    seats = rows % num_makers
    # Where the agent is among all makers of all rows, and where the others; and the order that puts both back
    own = rows * num_makers + seats
    others = (rows[:, None] * num_makers + market.rivals[seats]).flatten()
    in_seats = torch.cat((own, others)).argsort()
    observation, _ = market.reset(options={"copies": args.copies})
    noise = exploration_noise(market, agent, args, generator)
    exploration = agent.actor_logstd.exp() * noise
    steps = []
    for t in range(market.num_steps):
        observation = observation.flatten(0, 1)
        seen = observation[own]
        normalised = agent.normalise(seen)
        action = agent.network.actor(normalised) + exploration[t]
        steps.append((normalised, action))
        quotes = torch.cat((agent.to_quote(seen, action), opponent(observation[others])))
        observation = market.advance(quotes[in_seats].unflatten(0, (n, num_makers)))
    observations, actions = (torch.stack(column) for column in zip(*steps, strict=True))
    rewards, info = market.settle()
    # Who trades and how the market moves is chance. The agent learns from the means that the environment knows: the
    # expected edge, no ΔW, and its expected square. The optimum is the same and there is less noise.
    rewards = rewards - info["noise"]
    earned = rewards.flatten(1)[:, own]
    lead = ((rewards.sum(-1) - earned) / (num_makers - 1) - earned).sum(0)
    rewards = args.reward_scale * earned
    values = agent.network.critic(observations.flatten(0, 1)).view_as(rewards)
    if agent.apart:
        values = torch.zeros_like(values)  # the mean of the copies, below, is the better baseline then
    advantages = rewards - values  # the errors of one step, before they are added up
    advantages[:-1] += args.gamma * values[1:]
    for t in reversed(range(market.num_steps - 1)):
        advantages[t] += args.gamma * args.gae_lambda * advantages[t + 1]
    returns = advantages + values
    # Copies of a market differ in their exploration (and in the seat): their mean advantage is luck, and is taken off
    luck = advantages.unflatten(1, (-1, args.copies)).mean(-1) if args.copies > 1 else torch.zeros_like(advantages)
    advantages = advantages - luck.repeat_interleave(args.copies, 1)
    advantages = advantages[..., None]
    if agent.apart:  # where nothing but the step counts, a quote is credited without what the others earn in it
        incomes = args.reward_scale * market.expected_incomes().flatten(1, 2)[:, own].flatten(2)
        incomes = incomes - incomes.unflatten(1, (-1, args.copies)).mean(2).repeat_interleave(args.copies, 1)
        others = incomes.sum(-1, keepdim=True) - incomes
        advantages = torch.cat((advantages, advantages - others), -1)
    columns = (observations, actions, agent.logprob(noise), advantages, returns)
    return Batch(*(column.flatten(0, 1) for column in columns)), lead


def ppo_loss(agent: Agent, batch: Batch, args: Args) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Loss of a minibatch, and what `describe` takes: policy loss, value loss, entropy, logarithms of the ratios."""
    logprobs, entropy, values = agent.evaluate_actions(batch.observations, batch.actions)
    logratio = logprobs - batch.logprobs
    ratio = logratio.exp()
    advantages = batch.advantages
    if args.norm_adv:
        advantages = standardise(advantages)
    clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    policy_loss = -torch.minimum(ratio * advantages, clipped * advantages).sum(-1).mean()
    value_loss = 0.5 * nn.functional.mse_loss(values, batch.returns)
    loss = policy_loss - args.ent_coef * entropy + args.vf_coef * value_loss
    return loss, (policy_loss, value_loss, entropy, logratio)


LOSS_NAMES = ("losses/policy_loss", "losses/value_loss", "losses/entropy", "losses/approx_kl", "losses/clipfrac")


@torch.no_grad()
def describe(parts: tuple[Tensor, ...], args: Args) -> Tensor:
    """What is logged of a minibatch's loss, (5,), in the order of `LOSS_NAMES`."""
    policy_loss, value_loss, entropy, logratio = parts
    approx_kl = (logratio.exp() - 1 - logratio).mean()
    clip_fraction = ((logratio.exp() - 1).abs() > args.clip_coef).float().mean()
    return torch.stack((policy_loss, value_loss, entropy, approx_kl, clip_fraction))


def update(agent: Agent, optimizer, batch: Batch, loss_function, args: Args, generator: torch.Generator) -> Tensor:
    """PPO's epochs over one rollout. Returns `describe` of the last minibatch (5,) and never waits for the device."""
    for _ in range(args.update_epochs):
        for minibatch in minibatches(batch, args.num_minibatches, generator):
            loss, parts = loss_function(agent, minibatch, args)
            optimizer.zero_grad()
            loss.backward()
            average_gradients(agent)  # over the processes of torchrun
            clip_gradients(agent.parameters(), args.max_grad_norm)
            optimizer.step()
            with torch.no_grad():
                agent.actor_logstd.clamp_(min=math.log(args.min_std))
    check_equal_parameters(agent)
    return describe(parts, args)


@torch.no_grad()
def follow(average: Agent, agent: Agent, args: Args) -> None:
    """Moves the moving average of the weights by one update."""
    rate = min(1.0, 1.0 / (args.average * args.num_iterations))
    torch._foreach_lerp_(list(average.parameters()), list(agent.parameters()), rate)


def anneal(optimizer, args: Args, iteration: int) -> None:
    """Sets the learning rate of this iteration: makers that learn from each other move with every update's noise, and
    the square gives them a long calm at the end."""
    left = 1.0 - (iteration - 1) / args.num_iterations
    optimizer.param_groups[0]["lr"].fill_(args.learning_rate * min(1.0, left / args.anneal_share) ** 2)


def starting_agent(run: Run, classic, rivals: list, market: QuotingEnv) -> Agent:
    """The agent before training: an imitation of a classical maker, as it plays against each of `rivals`."""
    args: Args = run.args
    agent = Agent(market, args.apart).to(run.device)
    observed, acted = agent.fit([against(market.like(512), rival) for rival in rivals], classic)
    same_everywhere = torch.Generator(run.device).manual_seed(args.seed + EXPLORATION_SEED)  # in every process
    agent.imitate(market, observed, acted, same_everywhere)
    if args.start_edge is not None:
        agent.half_spread.fill_(args.start_edge)
    return agent


def train(run: Run, classics: Makers, guests: dict[str, Tensor]) -> tuple[Agent, dict[str, Tensor]]:
    """Trains by self-play, from scratch or from where `run` resumes.

    Returns the moving average of the agent, and snapshots of what played at each quarter of the run, by name.
    """
    args: Args = run.args
    torch.manual_seed(args.seed)
    market = classics.env.env.like(args.rows)
    known = [classics.policies[name] for name in MET_IN_TRAINING if name in classics.policies]
    agent = starting_agent(run, classics.policies[classics.imitated], known, market)
    average = copy.deepcopy(agent).requires_grad_(False)  # moves less with the noise of every update
    opponents = Opponents(args, agent, list(guests.values()), known, market).to(run.device)
    optimizer = Adam(agent.parameters(), args.learning_rate, eps=1e-5)
    generator = run.generator(args.seed + EXPLORATION_SEED)  # of exploration and minibatches
    market.generator.manual_seed(rank_seed(args.seed))
    pool_generator = torch.Generator(run.device).manual_seed(args.seed + OPPONENT_SEED)  # the same in every process
    snapshots = {"step 0": to_vector(agent)}
    run.keep(
        agent=average, learner=agent, opponents=opponents, optimizer=optimizer, generator=generator,
        market_generator=market.generator, pool_generator=pool_generator, snapshots=snapshots, guests=guests,
        makers=classics.parameters, origin=classics.origin,
    )  # fmt: skip
    validation = SelfplayValidation(classics, EPISODES)
    if run.iteration == 0:  # the untrained policy, for the learning curve
        run.log(validation(average.policy))
    loss_function = torch.compile(ppo_loss) if args.compile else ppo_loss

    def iterate() -> Tensor:
        batch, lead = rollout(market, agent, opponents.policy, args, generator)
        opponents.score(lead)
        losses = update(agent, optimizer, batch, loss_function, args, generator)
        follow(average, agent, args)
        return losses

    iterate = run.captured(iterate)
    quarters = {math.ceil(args.num_iterations * i / 4) for i in range(1, 4)} - {args.num_iterations}
    for iteration in run.iterations(args.num_iterations, args.steps_per_iteration):
        anneal(optimizer, args, iteration)
        opponents.advance(agent, iteration, pool_generator)
        losses = iterate()
        if iteration in quarters:
            snapshots[f"step {run.steps:,}"] = to_vector(agent)
        if run.due(iteration):
            row = dict(zip(LOSS_NAMES, losses.tolist(), strict=True))
            row |= {f"losses/action_std_{i}": std for i, std in enumerate(agent.actor_logstd.exp().tolist())}
            row["charts/learning_rate"] = optimizer.param_groups[0]["lr"].item()
            run.check_finite(row, agent)
            row |= validation(average.policy)
            run.log(row, validation.describe(row))
    return average, snapshots


def best_response(run: Run, market: QuotingEnv, agent: Agent) -> Agent:
    """Trains a copy of `agent` for as many steps again against `agent` itself, which stays as it is.

    Its gain is a lower bound of how far the policy can be exploited. Returns the best of ten evaluations of the
    moving average, or `agent` if none of them is better.
    """
    args: Args = run.args
    market = market.like(args.rows)
    response = copy.deepcopy(agent).requires_grad_(True)
    average = copy.deepcopy(agent).requires_grad_(False)
    optimizer = Adam(response.parameters(), args.learning_rate, eps=1e-5)
    generator = run.generator(args.seed + RESPONSE_SEED + EXPLORATION_SEED)
    market.generator.manual_seed(rank_seed(args.seed + RESPONSE_SEED))
    validation = Validation(against(market.like(EPISODES), agent.policy), agent.policy, "the agent")

    def iterate() -> Tensor:
        batch, _ = rollout(market, response, agent.policy, args, generator)
        losses = update(response, optimizer, batch, ppo_loss, args, generator)
        follow(average, response, args)
        return losses

    iterate = run.captured(iterate, response, average, optimizer, generator, market.generator)
    best = agent
    best_gain = 0.0
    evaluations = {math.ceil(args.num_iterations * (i + 1) / 10) for i in range(10)}
    with progress_bar(args.num_iterations * args.steps_per_iteration) as progress:
        for iteration in range(1, args.num_iterations + 1):
            anneal(optimizer, args, iteration)
            iterate()
            progress.update(args.steps_per_iteration)
            if iteration in evaluations:
                gain = validation(average.policy)[validation.gain]
                run.check_finite({"the best response's gain": gain}, response)  # NaN is never above the best
                if gain > best_gain:
                    best = copy.deepcopy(average)
                    best_gain = gain
                progress.set_description(f"best response to the agent gains {best_gain:+.3f}")
    return best


# BENCHMARK


def benchmark(
    run: Run, classics: Makers, agent: Agent, past: dict[str, Tensor], response: Agent | None, model: Dynamics
):
    """The agent, its `past` selves and every classical maker against each other, and the best `response` to the agent:
    (result, contest, cross-play, competition)."""
    args: Args = run.args
    title = f"Phase 4 ({args.dynamics}, {args.num_makers} makers, cost {1e4 * args.cost_rate:g} bp, "
    opponent = f"{args.opponent} {args.lag}" if args.opponent == "lag" else args.opponent
    return selfplay_benchmark(
        title=f"{title}risk aversion {args.risk_aversion:g})",
        settings={**args.described(), **run.settings(), "opponent": opponent},
        agent=agent.policy,
        classics=classics,
        past={name: at(snapshot, agent) for name, snapshot in past.items()},
        response=None if response is None else response.policy,
        make_market=lambda model, num_envs: make_market(args, model, num_envs, run.device),
        model=model,
        episodes=args.eval_episodes,
        default_market=args.described() == Args().described(),
    )


def load_guests(run: Run, market: QuotingEnv) -> dict[str, Tensor]:
    """Snapshots of the agents of other runs, by the names of their folders; a checkpoint has its own guests."""
    if run.checkpoint is not None and run.args.guests == run.trained.guests:
        return run.load_vectors("guests", len(to_vector(Agent(market))))
    guests = {}
    for source in run.args.guests:
        content = load_checkpoint(source, PHASE, ["agent", "args"])
        own = saved_args(Args, content["args"], f"--guests {source}")
        fits = own.apart == (run.trained or run.args).apart
        check(fits, f"--guests {source}: was trained with --gamma {own.gamma:g}, its actions mean something else here")
        guest = Agent(market, own.apart).to(run.device)
        load_weights(guest, content["agent"], f"--guests {source}")
        name = f"guest {(Path(source) if os.path.isdir(source) else Path(source).parent).resolve().name}"
        check(name not in guests, f"--guests {source}: another guest has the same name")
        guests[name] = to_vector(guest)
    return guests


def main(argv) -> bool:
    """Runs the command; True if the benchmark passed."""
    run = Run.open(Args, argv, PHASE, QUICK)
    args: Args = run.args
    model = make_model(args, dt=0.5 / TRADING_DAYS)
    fitted = model.garch if isinstance(model, Historical) else model  # what the makers know
    size = make_market(args, fitted, 1, run.device).noise_size
    for flag, rows in (
        (f"--num-envs {args.num_envs} with --episodes {args.episodes}", max(args.rows, EPISODES)),
        (f"--tuning-episodes {args.tuning_episodes}", args.tuning_episodes),
    ):
        check_memory(3 * 4 * rows * size, run.device, flag)  # noise, marks and a copy
    check_memory(1024 * args.eval_episodes, torch.device("cpu"), f"--eval-episodes {args.eval_episodes}")
    market = make_market(args, fitted, args.tuning_episodes, run.device)
    agent = Agent(market, (run.trained or args).apart).to(run.device)
    kept = args.pool_size + args.lag
    check_memory(8 * kept * len(to_vector(agent)), run.device, f"{kept} past selves (--lag, --pool-size)")
    if args.evaluate is not None:
        check_options(args, run.trained)
        run.load(agent)
        snapshots = run.load_vectors("snapshots", len(to_vector(agent)))
        check_unseen(args, run.trained)
    guests = load_guests(run, market)
    run.begin(args.dynamics, f"{args.dynamics} on {run.device}; edges in vol points, vega per vol point, S = 100")
    print("the classical makers, tuned, are what has to be beaten …", flush=True)
    response = None
    with run.training(BadQuote):  # a quote that is NaN
        classics = classical_makers(market, known=run.saved("makers"), origin=run.saved("origin"))
        if args.evaluate is None:
            agent, snapshots = train(run, classics, guests)
        if args.exploitability and args.dynamics != "historical":
            response = best_response(run, market, agent)
    if rank() > 0:
        return True  # the first process benchmarks
    result, contest, league, competition = benchmark(run, classics, agent, {**snapshots, **guests}, response, model)
    return run.finish(result, partial(selfplay_report, contest=contest, league=league, competition=competition))


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
