"""Phase 2: hedge a book of options fed by Poisson client orders, learned with SAC and measured against the classics.

Clients buy and sell calls and puts of several strikes and expiries at given prices; the agent hedges the book's delta
once a day at a proportional cost. Its action is a no-trade band around the Black–Scholes delta. The algorithm is
CleanRL's SAC, batched: whole episodes of every environment go into a replay buffer on the device, then come the
updates. All the finance is in envs/. Copy this file, change thirty lines, run it.
"""

import copy
import math
import sys
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn

from envs import HedgingEnv
from envs.baselines.hedgers import black_scholes_delta, constant_band, minimum_variance_delta
from envs.benchmark import bars
from envs.benchmark.contest import play, tune
from envs.benchmark.hedging import hedging_benchmark, hedging_validation
from envs.figures.hedging import hedging_report
from envs.market.dynamics import Dynamics
from envs.market.hedging import option_grid
from envs.models import HedgingArgs, check_unseen, make_model
from envs.networks import Adam, Networks
from envs.run.args import BatchedRunArgs, check_range
from envs.run.errors import check
from envs.run.files import check_memory
from envs.run.ranks import world_size
from envs.run.run import Run, run_main
from envs.run.seeds import EXPLORATION_SEED, SCALE_SEED

Tensor = torch.Tensor
PHASE = "phase2"  # a checkpoint is only loaded into the phase that wrote it
UPDATES_AT_ONCE = 32  # whose batches are gathered together
QUICK = {"total_timesteps": 500_000, "eval_episodes": 8192, "num_evaluations": 8}  # the flags that --quick sets


@dataclass
class Args(HedgingArgs, BatchedRunArgs):
    """Phase 2: train a SAC agent to hedge a book of options fed by client orders, then benchmark it.

    Client orders arrive as a Poisson process on every option and side: puts below the spot, calls from there up, five
    strikes and two expiries, the nearer of which is settled in cash on the way. Prices are given, so all that the agent
    decides is how to hedge the book's delta, once a day at a proportional cost. At the end it is compared, on the same
    fresh episodes, with Black–Scholes delta hedging, with tuned no-trade bands and, for one strike and expiry in gbm,
    with the exact optimum. Exit code 0: benchmark passed; 1: failed; 2: bad input; 3: diverged; 130: Ctrl-C. Everything
    is written to runs/<run name>/.

    Commands to start from:

      python phase2_multi_order_sac.py                       ten options, two expiries
      python phase2_multi_order_sac.py --dynamics garch      the same with autocorrelated volatility
      python phase2_multi_order_sac.py --dynamics mixture    many models at once, for an agent that carries over
      python phase2_multi_order_sac.py --resume runs/NAME    go on where a run stopped
      python phase2_multi_order_sac.py --evaluate runs/NAME --cost-rate 2e-3

    One call, of which the exact optimum is known:

      python phase2_multi_order_sac.py --num-strikes 1 --expiries 30 --arrival-rate 0.25 --mean-order-size 1
    """

    exp_name: str = Path(__file__).stem
    """name of the experiment, part of the run's name"""

    # The market
    num_steps: int = 30
    """trading days in an episode"""
    num_strikes: int = 5
    """strikes, centred on the initial spot of 100"""
    strike_spacing: float = 5.0
    """distance between strikes, currency"""
    expiries: tuple[int, ...] = (15, 30)
    """expiries in trading days from the start, increasing; the last ends the episode and equals --num-steps"""
    arrival_rate: float = 0.1
    """mean number of client orders a day, on each option and side"""
    mean_order_size: float = 2.0
    """mean of the geometric size of an order, options; 1: every order is for one option"""
    client_spread: float = 0.05
    """what a client pays per option over its mark, or gets below it, currency; the same for every policy"""
    cost_rate: float = 1e-3
    """proportional cost per unit of currency traded (1e-3 = 10 bp)"""
    risk_aversion: float = 0.1
    """weight of ½ΔW² in the reward, 1/currency"""

    # The algorithm
    total_timesteps: int = 8_000_000
    """environment steps of the whole run, over all environments"""
    num_envs: int = 1024
    """environments side by side"""
    random_share: float = 0.25
    """share of the environments that always act at random, so that the critics know more than the policy's own bands"""
    buffer_size: int = 1_000_000
    """environment steps that the replay buffer keeps; its memory is printed before training"""
    save_buffer: bool = True
    """keep the replay buffer in checkpoint.pt; without it a resumed run first fills a new one, with fewer updates and
    other numbers"""
    learning_starts: int = 30_000
    """environment steps with random actions before the first update"""
    batch_size: int = 1024
    """transitions in an update"""
    utd: float = 1 / 1024
    """updates-to-data ratio: gradient updates per environment step, rounded to whole updates an episode of all
    environments, at least one; each step is used utd × batch_size times, and fresh ones are cheap"""
    learning_rate: float = 1e-3
    """learning rate of Adam, for actor, critics and temperature"""
    anneal_lr: bool = True
    """let the learning rate fall linearly to zero"""
    gamma: float = 1.0
    """discount factor"""
    tau: float = 0.005
    """share of the critics that moves into the target critics at every update"""
    average: float = 0.001
    """the same for the moving average of the actor's weights, which is the policy that is evaluated"""
    hidden_size: int = 128
    """width of the two hidden layers of actor and critics"""
    autotune: bool = True
    """adapt the temperature, the weight of the entropy, to --target-entropy"""
    alpha: float = 0.02
    """temperature; with --autotune where it starts"""
    target_entropy: float = -2.0
    """entropy that --autotune holds the policy at, of the two squashed actions together"""
    reward_scale: float = 10.0
    """training rewards have the unit in which Black–Scholes hedging costs this much in an episode, on average"""

    # The benchmark
    eval_episodes: int = 65_536
    """episodes of the final benchmark (with historical: all the windows there are)"""

    def check(self) -> None:
        """Raises UsageError for the first argument that cannot work."""
        super().check()
        check_range(self, 0, 0.5, "cost_rate")
        check_range(self, 0, 1e6, "risk_aversion")
        self.check_book()
        check_range(self, 2, 2**26, "eval_episodes")
        check_range(self, 1, 4096, "hidden_size")
        if self.trains:
            check_range(self, 0, math.inf, "learning_rate", "reward_scale", "alpha", open_low=True)
            check_range(self, 0, 1, "gamma")
            check_range(self, 0, 1, "tau", "average", open_low=True)
            check_range(self, 0, 1, "random_share")
            check_range(self, -1000, 1.38, "target_entropy")  # 2 ln 2 is that of uniform actions
            check_range(self, 1, 2**20, "batch_size")
            check_range(self, max(self.batch_size, self.num_envs * self.num_steps), 10**10, "buffer_size")
            check_range(self, 0, 64, "utd", open_low=True)
            check_range(self, 0, self.total_timesteps, "learning_starts")
            check(world_size() == 1, "torchrun trains phases 1, 3 and 4; this one learns in one process")

    def check_book(self) -> None:
        """Raises UsageError for the first flag of the book that cannot work."""
        check_range(self, 1, 101, "num_strikes")
        check_range(self, 0.01, 50, "strike_spacing")
        check_range(self, 0, 10, "arrival_rate", open_low=True)
        check_range(self, 1, 100, "mean_order_size")
        check_range(self, 0, 100, "client_spread")
        lowest = 100.0 - self.strike_spacing * (self.num_strikes - 1) / 2
        check(lowest > 0, f"--strike-spacing is {self.strike_spacing} (the lowest strike would be {lowest:g})")
        increasing = all(a < b for a, b in pairwise(self.expiries))
        check(
            increasing and self.expiries != () and self.expiries[0] >= 1 and self.expiries[-1] == self.num_steps,
            f"--expiries is {' '.join(map(str, self.expiries)) or 'empty'} (increasing days from 1 to --num-steps = "
            f"{self.num_steps}, which is the last)",
        )
        options = self.num_strikes * len(self.expiries)
        check(options <= 100, f"--num-strikes × --expiries are {options} options (at most 100)")


def make_env(args: Args, model: Dynamics, num_envs: int, device: torch.device) -> HedgingEnv:
    half = (args.num_strikes - 1) / 2
    strikes = [100.0 + args.strike_spacing * (i - half) for i in range(args.num_strikes)]
    names = (
        "num_steps", "cost_rate", "risk_aversion", "trader_view", "arrival_rate", "mean_order_size", "client_spread",
    )  # fmt: skip
    settings = {name: getattr(args, name) for name in names}
    options = option_grid(strikes, args.expiries)
    return HedgingEnv(num_envs, model, options=options, initial_position=0.0, device=device, **settings)


# ALGO LOGIC: the agent


class Agent(nn.Module):
    """Squashed Gaussian policy and twin critics of the book after a trade.

    The cost of a trade is known, and what it leads to depends on the book after it alone (the post-decision state of
    Powell 2011, section 4.6). So Q(s, a) = −cost(s, a) + C(book after the trade), and only C is learnt. The best
    no-trade band does not depend on what is held, only what is done with it, so the actor does not see the net delta.
    The actor moves with the noise of every update; the policy has a moving average of its weights.
    """

    def __init__(self, env: HedgingEnv, hidden: int):
        super().__init__()
        size = env.single_observation_space.shape[0]
        actions = env.single_action_space.shape[0]
        self.num_actions = actions
        self.net_delta = env.columns["net delta"]
        self.actor = Networks(size, hidden, {"actor": 2 * actions}, "relu")
        with torch.no_grad():  # starts at the band that `fit` finds
            weight, bias = self.actor.layers("actor")[-1]
            weight.mul_(0.01)
            bias.copy_(torch.tensor([0.0] * actions + [-1.0] * actions))
        self.average_actor = copy.deepcopy(self.actor).requires_grad_(False)
        self.critics = Networks(size, hidden, {"one": 1, "two": 1}, "relu")
        self.target_critics = copy.deepcopy(self.critics).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.zeros(()))
        # A constant band played before training gives the scales: observations are standardised, in natural units, by
        # what it met, and its half-width is the unit of the agent's bands. They are saved with the policy, so that it
        # means the same in any other market.
        self.register_buffer("observation_mean", torch.zeros(size))
        self.register_buffer("observation_std", torch.ones(size))
        self.register_buffer("half_width", torch.ones(()))  # shares
        self.register_buffer("offset", torch.ones(()))  # shares
        self.register_buffer("reward_unit", torch.ones(()))  # currency
        self.register_buffer("observation_units", env.observation_units.clone(), persistent=False)

    @torch.no_grad()
    def fit(self, env: HedgingEnv) -> None:
        """Finds the units of rewards and bands and the scales of the observation on a market apart."""
        env.reset(seed=SCALE_SEED)
        cost = play(env, black_scholes_delta(env))["cost"].mean()
        self.reward_unit.fill_(cost if cost > 1e-4 else 1.0)
        (width,) = tune(env, lambda width: constant_band(env, width), [0.1], [1.3])
        self.half_width.fill_(width)
        # Where volatility moves with the spot, the best centre is about the minimum-variance delta, at any cost.
        minimum_variance = minimum_variance_delta(env)
        offsets = []
        seen = []
        observation, _ = env.replay()
        for _ in range(env.num_steps):
            seen.append(observation * self.observation_units)
            offsets.append(minimum_variance(observation)[:, 0])
            observation = env.advance(self.to_band(observation.new_zeros(env.num_envs, self.num_actions)))
        self.offset.copy_(2.0 * torch.maximum(self.half_width, torch.cat(offsets).square().mean().sqrt()))
        std = torch.cat(seen).std(0)
        self.observation_mean.copy_(torch.cat(seen).mean(0))
        # A column that never varies here (gbm's volatility) must not be blown up in another market, where it does.
        self.observation_std.copy_(torch.where(std < 1e-3, 1.0, std))

    def book(self, observation: Tensor) -> Tensor:
        """Observation (…, size) → what the actor sees: all of it normalised, and 0 in the place of the net delta."""
        natural = observation * self.observation_units
        book = ((natural - self.observation_mean) / self.observation_std).clamp(-10, 10)
        book[..., self.net_delta] = 0.0
        return book

    def with_net_delta(self, book: Tensor, net_delta: Tensor) -> Tensor:
        """What the critics see: the book (n, size) with a net delta (n,) in shares."""
        column = self.net_delta
        normalised = (net_delta[:, None] - self.observation_mean[column]) / self.observation_std[column]
        return torch.cat((book[:, : column.start], normalised.clamp(-10, 10), book[:, column.stop :]), -1)

    def head(self, actor: Networks, book: Tensor) -> tuple[Tensor, Tensor]:
        """Book (n, size) → mean and log standard deviation (n, actions) of the Gaussian to be squashed."""
        mean, log_std = actor.only("actor", book).chunk(2, -1)
        return mean, log_std.clamp(-5, 1)

    def to_band(self, action: Tensor) -> Tensor:
        """Action (n, actions) in (−1, 1) → (centre offset, half-width) in shares; zero is the best constant band."""
        return torch.stack((self.offset * action[:, 0], self.half_width * torch.exp(1.5 * action[:, 1])), -1)

    def act(self, book: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Book, normals (n, actions) → action (n, actions) in (−1, 1) and its log-probability (n,)."""
        mean, log_std = self.head(self.actor, book)
        raw = mean + log_std.exp() * noise
        log_slope = 2 * (math.log(2) - raw - nn.functional.softplus(-2 * raw))  # ln(1 − tanh²), stable where it is tiny
        logprob = -0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi) - log_slope
        return torch.tanh(raw), logprob.sum(-1)

    def policy(self, observation: Tensor) -> Tensor:
        """The deterministic policy that is benchmarked: observation (n, size) → environment action."""
        return self.to_band(torch.tanh(self.head(self.average_actor, self.book(observation))[0]))


# ALGO LOGIC: SAC


class Batch(NamedTuple):
    """Transitions (n, …). An action is kept as what it did: the net delta after the trade, in the place of the one
    before."""

    books: Tensor  # what the actor sees, see `Agent.book`
    net_deltas: Tensor  # before the trade, shares
    share_costs: Tensor  # what trading one share costs, scaled
    traded: Tensor  # net delta after the trade, shares
    rewards: Tensor  # scaled, without the cost of the trade
    dones: Tensor
    next_books: Tensor
    next_net_deltas: Tensor
    next_share_costs: Tensor


class ReplayBuffer(nn.Module):
    """The last `capacity` transitions, in one table on the device: a row of it is gathered at once. A module, so that
    it can be saved."""

    def __init__(self, capacity: int, observation_size: int):
        super().__init__()
        self.widths = self.column_widths(observation_size)
        self.register_buffer("table", torch.zeros(capacity, sum(self.widths)))
        self.register_buffer("position", torch.zeros((), dtype=torch.long))  # tensors, so that a CUDA graph sees them
        self.register_buffer("filled", torch.zeros((), dtype=torch.long))

    @staticmethod
    def column_widths(observation_size: int) -> list[int]:
        """Of what a `Batch` is made of."""
        return [observation_size if "books" in name else 1 for name in Batch._fields]

    @classmethod
    def bytes_needed(cls, capacity: int, observation_size: int) -> int:
        return 4 * capacity * sum(cls.column_widths(observation_size))

    def add(self, batch: Batch) -> None:
        """Writes transitions over the oldest."""
        rows = torch.cat([column.view(len(column), -1) for column in batch], -1)
        where = (self.position + torch.arange(len(rows), device=rows.device)) % len(self.table)
        self.table.index_copy_(0, where, rows)
        self.position.copy_((self.position + len(rows)) % len(self.table))
        self.filled.copy_((self.filled + len(rows)).clamp(max=len(self.table)))

    def batch(self, rows: Tensor) -> Batch:
        """Rows (n, …) of the table by name."""
        columns = rows.split(self.widths, -1)
        return Batch(*(x if "books" in name else x[:, 0] for name, x in zip(Batch._fields, columns, strict=True)))

    def sample(self, number: int, size: int, generator: torch.Generator) -> list[Batch]:
        """`number` batches of `size` transitions, uniformly, with replacement."""
        u = torch.rand(number * size, generator=generator, device=self.table.device, dtype=torch.float64)
        rows = self.table[(u * self.filled).long()]
        return [self.batch(part) for part in rows.split(size)]


@torch.no_grad()
def rollout(env: HedgingEnv, agent: Agent, buffer: ReplayBuffer, args: Args, generator, explore: bool) -> None:
    """Plays one whole episode in every environment into the buffer.

    The policy acts in some of them, and chance in `args.random_share` of them (with `explore` in all). Otherwise the
    critics would see no net delta far from the policy's own bands, and forget what is wrong with it. In the loop is
    only what the next action needs; the rest is done for all steps at once.
    """
    num_random = env.num_envs if explore else round(args.random_share * env.num_envs)
    observation, _ = env.reset()
    shape = (env.num_steps, env.num_envs, agent.num_actions)
    noise = torch.randn(shape, generator=generator, device=env.device)
    by_chance = torch.erf(noise[:, :num_random] / math.sqrt(2))  # uniform in (−1, 1)
    observations = [observation]
    for t in range(env.num_steps):
        mean, log_std = agent.head(agent.actor, agent.book(observation))
        action = torch.tanh(mean + log_std.exp() * noise[t])
        action[:num_random] = by_chance[t]
        observation = env.advance(agent.to_band(action))
        observations.append(observation)
    observations = torch.stack(observations)
    _, info = env.settle()
    scale = args.reward_scale / agent.reward_unit
    books = agent.book(observations)
    net_deltas = env.book_scale * env.column(observations, "net delta")
    traded = info["net_delta"]
    share_costs = env.cost_rate * env.spot
    trade_cost = share_costs[:-1] * (traded - net_deltas[:-1]).abs()
    centre = minimum_variance_delta(env)(observations[:-1])[..., 0]
    spot_variance = env.spot[:-1] ** 2 * env.variance[:-1] * env.dynamics.dt
    risk = 0.5 * env.risk_aversion * spot_variance * traded * (traded - 2 * centre)
    # The reward that is learnt from has the optimum of the raw one and a small part of its noise. It is the gain
    # over Black–Scholes delta hedging on the same path, without ΔW, whose mean is zero. ½ΔW² less that of the delta
    # hedge is replaced by its expectation, to first order; that is least at the minimum-variance delta. The critics
    # know the cost of this trade, so it is added back. The delta hedge's cost is that of its *next* trade: its last
    # one was known before ours, and the net delta would reveal it.
    reward = scale * (info["hedged_cost"] - (info["cost"] - trade_cost) - risk)
    dones = torch.zeros_like(reward)
    dones[-1] = 1.0
    share_costs = scale * share_costs
    now = (books[:-1], net_deltas[:-1], share_costs[:-1])
    later = (books[1:], net_deltas[1:], share_costs[1:])
    buffer.add(Batch(*(column.flatten(0, 1) for column in (*now, traded, reward, dones, *later))))


def sac_loss(agent: Agent, env: HedgingEnv, batch: Batch, noise: Tensor, args: Args):
    """Losses of critics, actor and temperature, summed (they share no gradient), and what is logged of them."""

    def value(critics: Networks, book, net_delta, share_cost, action, **options) -> Tensor:
        """min Q(s, a) of the twins: the known cost of the trade, and what the critics say of the book after it."""
        after = env.to_band(net_delta, agent.to_band(action))
        one, two = critics(agent.with_net_delta(book, after), **options)
        return torch.minimum(one, two)[:, 0] - share_cost * (after - net_delta).abs()

    alpha = agent.log_alpha.exp()
    with torch.no_grad():
        next_actions, next_logprobs = agent.act(batch.next_books, noise[0])
        next_state = (batch.next_books, batch.next_net_deltas, batch.next_share_costs)
        next_values = value(agent.target_critics, *next_state, next_actions) - alpha * next_logprobs
        targets = batch.rewards + args.gamma * (1 - batch.dones) * next_values  # expiry is terminal
    one, two = agent.critics(agent.with_net_delta(batch.books, batch.traded))
    mean_square = nn.functional.mse_loss
    critic_loss = mean_square(one[:, 0], targets) + mean_square(two[:, 0], targets)
    actions, logprobs = agent.act(batch.books, noise[1])
    state = (batch.books, batch.net_deltas, batch.share_costs)
    values = value(agent.critics, *state, actions, frozen=True)
    actor_loss = (alpha.detach() * logprobs - values).mean()
    entropy = -logprobs.detach().mean()
    alpha_loss = alpha * (entropy - args.target_entropy) if args.autotune else 0.0 * alpha
    return critic_loss + actor_loss + alpha_loss, (critic_loss, actor_loss, values, entropy, alpha)


LOSS_NAMES = ("losses/critic_loss", "losses/actor_loss", "losses/q_value", "losses/entropy", "losses/alpha")


@torch.no_grad()
def describe(parts: tuple[Tensor, ...]) -> Tensor:
    """What is logged of a batch's loss, (5,), in the order of `LOSS_NAMES`."""
    return torch.stack([part.mean() for part in parts])


def update(agent: Agent, env, optimizer, buffer: ReplayBuffer, loss_function, args: Args, generator, updates: int):
    """`updates` gradient updates. Returns `describe` of the last one (5,) and never waits for the device."""
    size = args.batch_size
    for first in range(0, updates, UPDATES_AT_ONCE):
        number = min(UPDATES_AT_ONCE, updates - first)
        noise = torch.randn(number, 2, size, agent.num_actions, generator=generator, device=env.device)
        for batch, own_noise in zip(buffer.sample(number, size, generator), noise, strict=True):
            loss, parts = loss_function(agent, env, batch, own_noise, args)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                agent.target_critics.vector.lerp_(agent.critics.vector, args.tau)
                agent.average_actor.vector.lerp_(agent.actor.vector, args.average)
    return describe(parts)


def train(run: Run, model: Dynamics) -> Agent:
    """Trains the agent, from scratch or from where `run` resumes."""
    args: Args = run.args
    torch.manual_seed(args.seed)
    env = make_env(args, model, args.num_envs, run.device)
    buffer = ReplayBuffer(args.buffer_size, env.single_observation_space.shape[0]).to(run.device)
    agent = Agent(env, args.hidden_size).to(run.device)
    agent.fit(env.like(1024))
    agent.log_alpha.data.fill_(math.log(args.alpha))
    optimizer = Adam([parameter for parameter in agent.parameters() if parameter.requires_grad], args.learning_rate)
    generator = run.generator(args.seed + EXPLORATION_SEED)  # also samples the buffer
    env.generator.manual_seed(args.seed)
    counts = {"updates": 0}
    run.keep(
        agent=agent, optimizer=optimizer, generator=generator, market_generator=env.generator, counts=counts,
        buffer=buffer if args.save_buffer else None,
    )  # fmt: skip
    filled = int(buffer.filled)
    check(0 <= filled <= args.buffer_size, f"{run.folder}: its buffer holds {filled} steps of {args.buffer_size}")
    episode = args.num_envs * args.num_steps
    updates = max(1, round(args.utd * episode))
    warm_up = math.ceil(args.learning_starts / episode)  # iterations of random actions
    refilled = 0 if args.save_buffer else run.iteration + warm_up  # a resumed run first fills a new buffer
    used = updates * args.batch_size / episode
    print(f"each iteration: {episode:,} environment steps, then {updates} updates of {args.batch_size} transitions, so")
    print(f"updates to data 1 to {episode / updates:,.0f}; each step is used {used:.2g} times")
    validation = hedging_validation(env.like(4096))
    if run.iteration == 0:  # the untrained policy, for the learning curve
        run.log(validation(agent.policy))
    loss_function = torch.compile(sac_loss) if args.compile else sac_loss

    def iterate() -> Tensor:
        rollout(env, agent, buffer, args, generator, explore=False)
        return update(agent, env, optimizer, buffer, loss_function, args, generator, updates)

    iterate = run.captured(iterate, agent, buffer, optimizer, generator, env.generator)
    losses = None
    for iteration in run.iterations(args.num_iterations, args.steps_per_iteration):
        if args.anneal_lr:
            optimizer.param_groups[0]["lr"].fill_(args.learning_rate * (1 - (iteration - 1) / args.num_iterations))
        if iteration <= max(warm_up, refilled):
            rollout(env, agent, buffer, args, generator, explore=iteration <= warm_up)
        else:
            losses = iterate()
            counts["updates"] += updates
        if run.due(iteration):
            row = {"charts/updates": counts["updates"]}
            if losses is not None:  # there have been updates
                row |= dict(zip(LOSS_NAMES, losses.tolist(), strict=True))
            row["charts/learning_rate"] = optimizer.param_groups[0]["lr"].item()
            run.check_finite(row, agent)
            row |= validation(agent.policy)
            run.log(row, validation.describe(row))
    return agent


# BENCHMARK


def benchmark(run: Run, model: Dynamics, agent: Agent):
    """The agent against every baseline and the exact optimum on fresh episodes: (result, contest)."""
    args: Args = run.args
    market = (
        "dynamics",
        "cost_rate",
        "risk_aversion",
        "num_strikes",
        "arrival_rate",
        "mean_order_size",
        "client_spread",
    )
    settings = {name: getattr(args, name) for name in market} | {"expiries": list(args.expiries)}
    return hedging_benchmark(
        title=f"Phase 2 ({args.dynamics}, cost {1e4 * args.cost_rate:g} bp, risk aversion {args.risk_aversion:g})",
        settings={**settings, **run.settings()},
        agent=agent.policy,
        make_env=lambda model, num_envs: make_env(args, model, num_envs, run.device),
        model=model,
        episodes=args.eval_episodes,
        bars=bars.HEDGE_BOOK,
    )


def check_book(args: Args, trained: Args) -> None:
    """Raises `UsageError` if the agent was trained with a book of other options."""
    for name, known, book in (
        ("--num-strikes is", trained.num_strikes, args.num_strikes),
        ("--expiries has", len(trained.expiries), len(args.expiries)),
    ):
        check(known == book, f"{name} {book}, but the agent was trained with {known}: its book is another one")


def main(argv) -> bool:
    """Runs the command; True if the benchmark passed."""
    run = Run.open(Args, argv, PHASE, QUICK)
    args: Args = run.args
    model = make_model(args)
    env = make_env(args, model, 1, run.device)
    size = env.single_observation_space.shape[0]
    memory = ReplayBuffer.bytes_needed(args.buffer_size, size)
    check_memory(1024 * args.eval_episodes, torch.device("cpu"), f"--eval-episodes {args.eval_episodes}")
    if args.evaluate is None:
        check_memory(96 * args.num_envs * args.num_steps * size, run.device, f"--num-envs {args.num_envs}")
        check_memory(memory, run.device, f"--buffer-size {args.buffer_size}")
    else:
        agent = Agent(env, args.hidden_size).to(run.device)
        run.load(agent)
        check_book(args, run.trained)
        check_unseen(args, run.trained)
    run.begin(args.dynamics, f"{args.dynamics} on {run.device}; trading days (252 a year), currency of S = 100")
    if args.evaluate is None:
        print(f"replay buffer: {args.buffer_size:,} transitions, {memory / 2**20:,.0f} MiB on {run.device}")
        with run.training():
            agent = train(run, model)
    result, contest = benchmark(run, model, agent)
    return run.finish(result, partial(hedging_report, contest=contest))


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
