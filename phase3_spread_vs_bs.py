"""Phase 3: quote bid and ask against an Avellaneda–Stoikov maker and hedge the book, learned with PPO.

Makers of European options quote, takers choose among them or walk away, and every maker hedges the delta of its book at
a cost. The agent sets an ask and a bid for every option, the delta it wants to be left with and a no-trade band around
it; its rival is the classical answer, tuned. The algorithm is CleanRL's PPO with GAE, batched: a rollout is one whole
episode of every environment. All the finance is in envs/. Copy this file, change thirty lines, run it.
"""

import copy
import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn as nn

from envs import AgainstRivals, QuotingEnv
from envs.benchmark.makers import Makers, classical_makers
from envs.benchmark.quoting import quoting_benchmark, quoting_validation
from envs.figures.quoting import quoting_report
from envs.market.dynamics import Dynamics
from envs.market.history import Historical
from envs.market.quoting import BadQuote, uncross
from envs.market.units import TRADING_DAYS
from envs.models import QuotingArgs, check_options, check_unseen, make_model
from envs.networks import ActorCritic, Adam, clip_gradients, minibatches
from envs.run.args import BatchedRunArgs, check_copies, check_ppo, check_range
from envs.run.files import check_memory
from envs.run.ranks import average_gradients, check_equal_parameters, rank, rank_seed, standardise
from envs.run.run import Run, run_main
from envs.run.seeds import EXPLORATION_SEED, SCALE_SEED

Tensor = torch.Tensor
PHASE = "phase3"  # a checkpoint is only loaded into the phase that wrote it
EPISODES = 4096  # played side by side for validation and benchmark
HIDDEN = 64  # width of the hidden layers
IMITATION = 1200  # updates that imitate the classical maker before training
MOST = 6.0  # vol points: quotes further out are imitated as this far out, where next to nobody trades
QUICK = {"total_timesteps": 500_000, "num_envs": 256, "eval_episodes": 4096, "num_evaluations": 8}  # set by --quick


@dataclass
class Args(QuotingArgs, BatchedRunArgs):
    """Phase 3: train a PPO agent to make markets in options against a Black–Scholes maker, then benchmark it.

    Two makers (or more) quote five options of one expiry, twice a trading day; takers arrive at random, with persistent
    order flow, and pick a maker or walk away; some of them know the fair values. The agent sets an ask and a bid for
    every option, in vol points from Black–Scholes, and hedges its delta at a cost; the others quote by
    Avellaneda–Stoikov around Black–Scholes, tuned. At the end the agent is compared with that maker in the same seat,
    with the same takers, and with makers that know the model and its smile, all tuned; where nothing is risked and
    hedging is free, with the exact optimum, the best response. Exit code 0: benchmark passed; 1: failed; 2: bad input;
    3: diverged; 130: Ctrl-C. Everything is written to runs/<run name>/.

    Commands to start from:

      python phase3_spread_vs_bs.py                         Heston's stochastic volatility
      python phase3_spread_vs_bs.py --dynamics garch        or gbm, merton
      python phase3_spread_vs_bs.py --informed-share 0.5    more takers who know the fair values
      python phase3_spread_vs_bs.py --expiries 60 90 120 180
      python phase3_spread_vs_bs.py --resume runs/NAME      go on where a run stopped
      python phase3_spread_vs_bs.py --evaluate runs/NAME --dynamics merton
      python phase3_spread_vs_bs.py --evaluate runs/NAME --rival-spread 0.7
      torchrun --nproc-per-node 2 phase3_spread_vs_bs.py    data-parallel; --num-envs is each process's

    Where the answer is known exactly, without risk aversion and cost:

      python phase3_spread_vs_bs.py --risk-aversion 0 --cost-rate 0 --gamma 0 --min-std 0.05
    """

    exp_name: str = Path(__file__).stem
    """name of the experiment, part of the run's name"""

    # The rivals
    rival_spread: float = 1.0
    """the rivals' half-spread, as a multiple of what Avellaneda–Stoikov's formula says"""
    rival_risk_aversion: float = 1.0
    """the rivals' risk aversion, as a multiple of the tuned one"""

    # The algorithm
    start: Literal["classic", "neutral"] = "classic"
    """what training starts from: an imitation of the strongest classical maker; or one constant half-spread without
    skew, the same for all options"""
    total_timesteps: int = 8_000_000
    """environment steps of the whole run, over all environments"""
    num_envs: int = 512
    """environments side by side"""
    learning_rate: float = 7e-4
    """learning rate of Adam"""
    anneal_lr: bool = True
    """let the learning rate fall linearly to zero"""
    gamma: float = 1.0
    """discount factor"""
    gae_lambda: float = 0.85
    """λ of generalised advantage estimation; higher ones earn more, but no more objective, at more risk"""
    min_std: float = 0.15
    """floor of the exploration's standard deviation (raw action): what is better shows in proportion to it"""
    copies: int = 4
    """rows that meet the same market and explore in opposite pairs (an even number, or 1); the mean of their advantages
    is taken off as luck"""
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
    average: float = 0.1
    """share of the run over which a moving average of the agent's weights reaches back; it is what is benchmarked"""

    # The benchmark
    tuning_episodes: int = 2048
    """episodes that the classical makers, the rival among them, are tuned on"""
    eval_episodes: int = 8192
    """episodes of the final benchmark (with historical: all the windows there are)"""

    @property
    def apart(self) -> bool:
        """Whether quotes are credited apart: where nothing but the step counts."""
        return self.gamma == 0

    def described(self) -> dict:
        """The flags that make a market another one, for the report."""
        rival = {"rival_spread": self.rival_spread, "rival_risk_aversion": self.rival_risk_aversion}
        return {**super().described(), **rival}

    def check(self) -> None:
        """Raises UsageError for the first argument that cannot work."""
        super().check()
        check_range(self, 0, 1e6, "rival_spread", "rival_risk_aversion", open_low=True)
        check_range(self, 2, 2**26, "eval_episodes", "tuning_episodes")
        if self.trains:
            check_ppo(self)
            check_range(self, 0, 1, "average", "min_std", open_low=True)
            check_copies(self)


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
        options = market.num_options
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
    def fit(self, env: AgainstRivals, classic) -> tuple[Tensor, Tensor]:
        """Sets the scales, those of the observations too, from episodes that `classic` plays in the agent's seat.

        Returns what it observed and what it did, (steps, …).
        """
        observation, _ = env.reset(seed=SCALE_SEED)
        observed = []
        acted = []
        for _ in range(env.num_steps):
            action = classic(observation)
            observed.append(observation)
            acted.append(action)
            observation = env.advance(action)
        observed = torch.cat(observed)
        acted = torch.cat(acted)
        action = env.env.by_name(acted)
        self.half_spread.copy_(0.5 * (action["ask"] + action["bid"]).clamp(max=MOST).mean())
        self.band.copy_(action["band"].mean().clamp(0.01, 1.0))
        seen = self.seen(observed)
        self.observation_mean.copy_(seen.mean(0))
        # A column that never varies here (gbm's volatility) must not be blown up in another market, where it does.
        std = seen.std(0)
        self.observation_std.copy_(torch.where(std < 1e-2, 1.0, std))
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
        bounded, so edges unlike those of training do no harm.
        """
        k, reference = self.choice
        share = torch.sigmoid(-k * (observation[:, self.rival_edges] - reference))
        before, after = observation[:, : self.rival_edges.start], observation[:, self.rival_edges.stop :]
        return torch.cat((before, share, after), 1)

    def normalise(self, observation: Tensor) -> Tensor:
        return ((self.seen(observation) - self.observation_mean) / self.observation_std).clamp(-10, 10)

    def to_quote(self, observation: Tensor, raw_action: Tensor) -> Tensor:
        """Observation (n, size) and raw action → environment action, its numbers in the order of `action_bounds`."""
        common, *of_options = raw_action.split(self.parts, -1)
        common = common.clamp(-5, 5)
        level = 0.6 * common[:, :1]
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


# ALGO LOGIC: PPO


class Batch(NamedTuple):
    """Steps of a rollout, in any order: (n, …)."""

    observations: Tensor  # normalised
    actions: Tensor  # raw
    logprobs: Tensor  # (n, 1), or (n, 1 + quotes) if they are credited apart
    advantages: Tensor  # the same
    returns: Tensor


def exploration_noise(env: AgainstRivals, agent: Agent, args: Args, generator: torch.Generator) -> Tensor:
    """Normals (num_steps, num_envs, actions), the exploration's noise. Copies of a market explore in pairs, in opposite
    directions: what they earn then differs more by what they try than it would with independent noise."""
    shape = (env.num_steps, env.num_envs // min(args.copies, 2), len(agent.actor_logstd))
    noise = torch.randn(shape, generator=generator, device=agent.actor_logstd.device)
    return noise if args.copies == 1 else torch.stack((noise, -noise), 2).flatten(1, 2)


@torch.no_grad()
def rollout(env: AgainstRivals, agent: Agent, args: Args, generator: torch.Generator) -> Batch:
    """Plays one whole episode in every environment and estimates advantages (GAE; the end is terminal).

    In the loop is only what the next action needs; the rest is done for all steps at once.
    """
    observation, _ = env.reset(options={"copies": args.copies})
    noise = exploration_noise(env, agent, args, generator)
    exploration = agent.actor_logstd.exp() * noise
    steps = []
    for t in range(env.num_steps):
        normalised = agent.normalise(observation)
        action = agent.network.actor(normalised) + exploration[t]
        steps.append((normalised, action))
        observation = env.advance(agent.to_quote(observation, action))
    observations, actions = (torch.stack(column) for column in zip(*steps, strict=True))
    rewards, info = env.settle()
    # Who trades and how the market moves is chance. The agent learns from the means that the environment knows: the
    # expected edge, no ΔW, and its expected square. The optimum is the same and there is less noise.
    rewards = args.reward_scale * (rewards - info["noise"])
    values = agent.network.critic(observations.flatten(0, 1)).view_as(rewards)
    if agent.apart:
        values = torch.zeros_like(values)  # the mean of the copies, below, is the better baseline then
    advantages = rewards - values  # the errors of one step, before they are added up
    advantages[:-1] += args.gamma * values[1:]
    for t in reversed(range(env.num_steps - 1)):
        advantages[t] += args.gamma * args.gae_lambda * advantages[t + 1]
    returns = advantages + values
    # Copies of a market differ in their exploration: their mean advantage is luck, and is taken off
    luck = advantages.unflatten(1, (-1, args.copies)).mean(-1) if args.copies > 1 else torch.zeros_like(advantages)
    advantages = advantages - luck.repeat_interleave(args.copies, 1)
    advantages = advantages[..., None]
    if agent.apart:  # where nothing but the step counts, a quote is credited without what the others earn in it
        incomes = args.reward_scale * env.env.expected_incomes()[:, :, env.seat].flatten(2)
        incomes = incomes - incomes.unflatten(1, (-1, args.copies)).mean(2).repeat_interleave(args.copies, 1)
        others = incomes.sum(-1, keepdim=True) - incomes
        advantages = torch.cat((advantages, advantages - others), -1)
    columns = (observations, actions, agent.logprob(noise), advantages, returns)
    return Batch(*(column.flatten(0, 1) for column in columns))


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


def train(run: Run, classics: Makers) -> Agent:
    """Trains the agent, from scratch or from where `run` resumes. Returns the moving average of its weights."""
    args: Args = run.args
    torch.manual_seed(args.seed)
    env = classics.env.like(args.num_envs)
    agent = Agent(env.env, args.apart).to(run.device)
    generator = run.generator(args.seed + EXPLORATION_SEED)  # of exploration and minibatches
    observed, acted = agent.fit(env.like(2048), classics.policies[classics.imitated])
    if args.start == "classic":
        same_everywhere = torch.Generator(run.device).manual_seed(args.seed + EXPLORATION_SEED)  # in every process
        agent.imitate(env.env, observed, acted, same_everywhere)
    average = copy.deepcopy(agent).requires_grad_(False)  # moves less with the noise of every update
    optimizer = Adam(agent.parameters(), args.learning_rate, eps=1e-5)
    env.generator.manual_seed(rank_seed(args.seed))
    run.keep(
        agent=average, learner=agent, optimizer=optimizer, generator=generator, market_generator=env.generator,
        makers=classics.parameters, origin=classics.origin,
    )  # fmt: skip
    validation = quoting_validation(classics, EPISODES)
    if run.iteration == 0:  # the untrained policy, for the learning curve
        run.log(validation(average.policy))
    loss_function = torch.compile(ppo_loss) if args.compile else ppo_loss

    def iterate() -> Tensor:
        batch = rollout(env, agent, args, generator)
        losses = update(agent, optimizer, batch, loss_function, args, generator)
        follow(average, agent, args)
        return losses

    iterate = run.captured(iterate)
    for iteration in run.iterations(args.num_iterations, args.steps_per_iteration):
        if args.anneal_lr:
            optimizer.param_groups[0]["lr"].fill_(args.learning_rate * (1 - (iteration - 1) / args.num_iterations))
        losses = iterate()
        if run.due(iteration):
            row = dict(zip(LOSS_NAMES, losses.tolist(), strict=True))
            row |= {f"losses/action_std_{i}": std for i, std in enumerate(agent.actor_logstd.exp().tolist())}
            row["charts/learning_rate"] = optimizer.param_groups[0]["lr"].item()
            run.check_finite(row, agent)
            row |= validation(average.policy)
            run.log(row, validation.describe(row))
    return average


# BENCHMARK


def benchmark(run: Run, classics: Makers, agent: Agent, model: Dynamics):
    """The agent and every classical maker in the same seat on fresh episodes: (result, contest)."""
    args: Args = run.args
    return quoting_benchmark(
        title=f"Phase 3 ({args.dynamics}, cost {1e4 * args.cost_rate:g} bp, risk aversion {args.risk_aversion:g})",
        settings={**args.described(), **run.settings()},
        agent=agent.policy,
        classics=classics,
        make_market=lambda model, num_envs: make_market(args, model, num_envs, run.device),
        model=model,
        episodes=args.eval_episodes,
        default_market=args.described() == Args().described(),
    )


def main(argv) -> bool:
    """Runs the command; True if the benchmark passed."""
    run = Run.open(Args, argv, PHASE, QUICK)
    args: Args = run.args
    model = make_model(args, dt=0.5 / TRADING_DAYS)
    fitted = model.garch if isinstance(model, Historical) else model  # what the makers know
    size = make_market(args, fitted, 1, run.device).noise_size
    for flag, rows in (("--num-envs", max(args.num_envs, EPISODES)), ("--tuning-episodes", args.tuning_episodes)):
        check_memory(3 * 4 * rows * size, run.device, f"{flag} {rows}")  # noise, marks and a copy
    check_memory(1024 * args.eval_episodes, torch.device("cpu"), f"--eval-episodes {args.eval_episodes}")
    market = make_market(args, fitted, args.tuning_episodes, run.device)
    if args.evaluate is not None:
        agent = Agent(market, run.trained.apart).to(run.device)
        check_options(args, run.trained)
        run.load(agent)
        check_unseen(args, run.trained)
    run.begin(args.dynamics, f"{args.dynamics} on {run.device}; edges in vol points, vega per vol point, S = 100")
    print("the classical makers, tuned, are the rival and what has to be beaten …", flush=True)
    with run.training(BadQuote):  # a quote that is NaN
        classics = classical_makers(
            market, args.rival_spread, args.rival_risk_aversion, known=run.saved("makers"), origin=run.saved("origin")
        )
        if args.evaluate is None:
            agent = train(run, classics)
    if rank() > 0:
        return True  # the first process benchmarks
    result, contest = benchmark(run, classics, agent, model)
    return run.finish(result, partial(quoting_report, contest=contest))


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
