"""Phase 1: hedge one sold option at a cost, learned with PPO and measured against the exact optimum.

The agent is short one at-the-money call for 30 trading days and trades the underlying once a day at a proportional
cost. Its action is a no-trade band around the Black–Scholes delta. The algorithm is CleanRL's PPO with GAE, batched: a
rollout is one whole episode of every environment. All the finance is in envs/. Copy this file, change thirty lines, run
it.
"""

import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn

from envs import HedgingEnv
from envs.benchmark import bars
from envs.benchmark.hedging import hedging_benchmark, hedging_validation
from envs.figures.hedging import hedging_report
from envs.market.dynamics import Dynamics
from envs.models import HedgingArgs, check_unseen, make_model
from envs.networks import ActorCritic, Adam, clip_gradients, minibatches
from envs.run.args import BatchedRunArgs, check_ppo, check_range
from envs.run.files import check_memory
from envs.run.ranks import average_gradients, check_equal_parameters, rank, rank_seed, standardise
from envs.run.run import Run, run_main
from envs.run.seeds import EXPLORATION_SEED, SCALE_SEED

Tensor = torch.Tensor
PHASE = "phase1"  # a checkpoint is only loaded into the phase that wrote it
HIDDEN = 64  # width of the hidden layers
QUICK = {"total_timesteps": 1_000_000, "eval_episodes": 8192, "num_evaluations": 8}  # the flags that --quick sets


@dataclass
class Args(HedgingArgs, BatchedRunArgs):
    """Phase 1: train a PPO agent to hedge one sold option, then benchmark it.

    The agent is short one at-the-money call (S = K = 100, 30 trading days) and trades the underlying once a day at a
    proportional cost. At the end it is compared, on the same fresh episodes, with Black–Scholes delta hedging, with
    tuned no-trade bands and, for gbm and garch, with the exact optimum. Exit code 0: benchmark passed; 1: failed;
    2: bad input; 3: diverged; 130: Ctrl-C. Everything is written to runs/<run name>/.

    Commands to start from:

      python phase1_delta_hedge_ppo.py                      constant volatility (phase 1a)
      python phase1_delta_hedge_ppo.py --dynamics garch     autocorrelated volatility (phase 1b)
      python phase1_delta_hedge_ppo.py --dynamics mixture   many models at once, for an agent that carries over
      python phase1_delta_hedge_ppo.py --resume runs/NAME   go on where a run stopped
      python phase1_delta_hedge_ppo.py --evaluate runs/NAME --dynamics heston

    Train on the S&P 500 until 2010, then hedge the real one of 2011 to 2018:

      python phase1_delta_hedge_ppo.py --dynamics garch --history-end 2010-12-31
      python phase1_delta_hedge_ppo.py --dynamics bootstrap --history-end 2010-12-31
      python phase1_delta_hedge_ppo.py --evaluate runs/NAME --dynamics historical
      torchrun --nproc-per-node 2 phase1_delta_hedge_ppo.py    data-parallel; --num-envs is each process's
    """

    exp_name: str = Path(__file__).stem
    """name of the experiment, part of the run's name"""

    # The market
    dynamics: str = "gbm"
    """model of the underlying: gbm, garch, heston, merton, marlvol; mixture, where the environments have the first four
    in turn, with parameters of their own; bootstrap, windows of the real closes until --history-end at random;
    historical, all windows after it, with --evaluate only"""
    num_steps: int = 30
    """trading days to expiry: the length of an episode and of a rollout"""
    cost_rate: float = 1e-3
    """proportional cost per unit of currency traded (1e-3 = 10 bp)"""
    risk_aversion: float = 1.0
    """weight of ½ΔW² in the reward, 1/currency"""

    # The algorithm
    total_timesteps: int = 12_000_000
    """environment steps of the whole run, over all environments"""
    num_envs: int = 1024
    """environments side by side"""
    learning_rate: float = 1e-3
    """learning rate of Adam"""
    anneal_lr: bool = True
    """let the learning rate fall linearly to zero"""
    gamma: float = 1.0
    """discount factor"""
    gae_lambda: float = 0.6
    """λ of generalised advantage estimation; low, because a trade is felt within days"""
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
    reward_scale: float = 10.0
    """the training reward is multiplied by this, so that values are of order one"""

    # The benchmark
    eval_episodes: int = 65_536
    """episodes of the final benchmark (with historical: all the windows there are)"""

    @property
    def models(self) -> list[str]:
        """What --dynamics may be. The reward of the other phases has the model's moments in it, not the closes'."""
        return [*super().models, "bootstrap"]

    def check(self) -> None:
        """Raises UsageError for the first argument that cannot work."""
        super().check()
        check_range(self, 0, 0.5, "cost_rate")
        check_range(self, 0, 1e6, "risk_aversion")
        check_range(self, 2, 2**26, "eval_episodes")
        if self.trains:
            check_ppo(self)


def make_env(args: Args, model: Dynamics, num_envs: int, device: torch.device) -> HedgingEnv:
    names = ("num_steps", "cost_rate", "risk_aversion", "trader_view")
    settings = {name: getattr(args, name) for name in names}
    return HedgingEnv(num_envs, model, device=device, **settings)


# ALGO LOGIC: the agent


class Agent(nn.Module):
    """Gaussian policy and value function of two tanh layers; the environment's action is `to_band` of the raw one."""

    def __init__(self, env: HedgingEnv):
        super().__init__()
        size = env.single_observation_space.shape[0]
        actions = env.single_action_space.shape[0]
        self.network = ActorCritic(size, actions, HIDDEN)
        self.actor_logstd = nn.Parameter(torch.full((actions,), -1.0))
        # Observations are standardised by what a fixed band met before training, and saved with the policy.
        self.register_buffer("observation_mean", torch.zeros(size))
        self.register_buffer("observation_std", torch.ones(size))

    @torch.no_grad()
    def fit_normaliser(self, env: HedgingEnv) -> None:
        observation, _ = env.reset(seed=SCALE_SEED)
        band = self.to_band(self.actor_logstd.new_zeros(env.num_envs, len(self.actor_logstd)))
        seen = []
        for _ in range(env.num_steps):
            seen.append(observation)
            observation = env.advance(band)
        std = torch.cat(seen).std(0)
        self.observation_mean.copy_(torch.cat(seen).mean(0))
        # A column that never varies here (gbm's volatility) must not be blown up in another market, where it does.
        self.observation_std.copy_(torch.where(std < 1e-2, 1.0, std))

    def normalise(self, observation: Tensor) -> Tensor:
        return ((observation - self.observation_mean) / self.observation_std).clamp(-10, 10)

    @staticmethod
    def to_band(raw_action: Tensor) -> Tensor:
        """Raw action (n, actions) → (centre offset, half-width) in shares; zero is a band of ±0.05 around the delta."""
        return torch.stack((0.1 * raw_action[:, 0], 0.05 * raw_action[:, 1].clamp(-5, 3).exp()), -1)

    def logprob(self, noise: Tensor) -> Tensor:
        """Log-probability (…) of the raw action that lies `noise` (…, actions) standard deviations from the mean."""
        log_density = -0.5 * noise.square().sum(-1)
        return log_density - (self.actor_logstd + 0.5 * math.log(2 * math.pi)).sum()

    def evaluate_actions(self, observation: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised observations and raw actions → log-probabilities (n,), entropy (), values (n,)."""
        mean, value = self.network(observation)
        logprob = self.logprob((action - mean) * torch.exp(-self.actor_logstd))
        entropy = (0.5 + 0.5 * math.log(2 * math.pi) + self.actor_logstd).sum()
        return logprob, entropy, value

    def policy(self, observation: Tensor) -> Tensor:
        """The deterministic policy that is benchmarked: observation (n, size) → environment action."""
        return self.to_band(self.network.actor(self.normalise(observation)))


# ALGO LOGIC: PPO


class Batch(NamedTuple):
    """Steps of a rollout, in any order: (n, …)."""

    observations: Tensor  # normalised
    actions: Tensor  # raw
    logprobs: Tensor
    advantages: Tensor
    returns: Tensor


@torch.no_grad()
def rollout(env: HedgingEnv, agent: Agent, args: Args, generator: torch.Generator) -> Batch:
    """Plays one whole episode in every environment and estimates advantages (GAE; expiry is terminal).

    In the loop is only what the next action needs; the rest is done for all steps at once.
    """
    observation, _ = env.reset()
    shape = (env.num_steps, env.num_envs, len(agent.actor_logstd))
    noise = torch.randn(shape, generator=generator, device=env.device)
    exploration = agent.actor_logstd.exp() * noise
    steps = []
    for t in range(env.num_steps):
        observation = agent.normalise(observation)
        action = agent.network.actor(observation) + exploration[t]
        steps.append((observation, action))
        observation = env.advance(agent.to_band(action))
    observations, actions = (torch.stack(column) for column in zip(*steps, strict=True))
    reward, info = env.settle()
    # The mean of two terms of the reward does not depend on the policy: ΔW (shares earn nothing on average, and the
    # option's mark moves whatever is done) and the squared ΔW of the Black–Scholes hedge on the same path. Without
    # them the optimum is the same and there is less noise.
    hedged_risk = 0.5 * env.risk_aversion * info["hedged_change"] ** 2
    rewards = args.reward_scale * (reward - info["wealth_change"] + hedged_risk)
    values = agent.network.critic(observations.flatten(0, 1)).view_as(rewards)
    advantages = rewards - values  # the errors of one step, before they are added up
    advantages[:-1] += args.gamma * values[1:]
    for t in reversed(range(env.num_steps - 1)):
        advantages[t] += args.gamma * args.gae_lambda * advantages[t + 1]
    columns = (observations, actions, agent.logprob(noise), advantages, advantages + values)
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
    policy_loss = -torch.minimum(ratio * advantages, clipped * advantages).mean()
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
    check_equal_parameters(agent)
    return describe(parts, args)


def train(run: Run, model: Dynamics) -> Agent:
    """Trains the agent, from scratch or from where `run` resumes."""
    args: Args = run.args
    torch.manual_seed(args.seed)
    env = make_env(args, model, args.num_envs, run.device)
    agent = Agent(env).to(run.device)
    agent.fit_normaliser(env.like(1024))
    optimizer = Adam(agent.parameters(), args.learning_rate, eps=1e-5)
    generator = run.generator(args.seed + EXPLORATION_SEED)  # of exploration and minibatches
    env.generator.manual_seed(rank_seed(args.seed))
    run.keep(agent=agent, optimizer=optimizer, generator=generator, market_generator=env.generator)
    validation = hedging_validation(env.like(4096))
    if run.iteration == 0:  # the untrained policy, for the learning curve
        run.log(validation(agent.policy))
    loss_function = torch.compile(ppo_loss) if args.compile else ppo_loss

    def iterate() -> Tensor:
        batch = rollout(env, agent, args, generator)
        return update(agent, optimizer, batch, loss_function, args, generator)

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
            row |= validation(agent.policy)
            run.log(row, validation.describe(row))
    return agent


# BENCHMARK


def benchmark(run: Run, model: Dynamics, agent: Agent):
    """The agent against every baseline and the exact optimum on fresh episodes: (result, contest)."""
    args: Args = run.args
    market = ("dynamics", "cost_rate", "risk_aversion", "num_steps")
    return hedging_benchmark(
        title=f"Phase 1 ({args.dynamics}, cost {1e4 * args.cost_rate:g} bp, risk aversion {args.risk_aversion:g})",
        settings={**{name: getattr(args, name) for name in market}, **run.settings()},
        agent=agent.policy,
        make_env=lambda model, num_envs: make_env(args, model, num_envs, run.device),
        model=model,
        episodes=args.eval_episodes,
        bars=bars.HEDGE_OPTION,
    )


def main(argv) -> bool:
    """Runs the command; True if the benchmark passed."""
    run = Run.open(Args, argv, PHASE, QUICK)
    args: Args = run.args
    model = make_model(args)
    env = make_env(args, model, 1, run.device)
    size = env.single_observation_space.shape[0]
    check_memory(1024 * args.eval_episodes, torch.device("cpu"), f"--eval-episodes {args.eval_episodes}")
    if args.evaluate is None:  # a rollout, and what its market is made of
        check_memory(96 * args.num_envs * args.num_steps * size, run.device, f"--num-envs {args.num_envs}")
    else:
        agent = Agent(env).to(run.device)
        run.load(agent)
        check_unseen(args, run.trained)
    run.begin(args.dynamics, f"{args.dynamics} on {run.device}; trading days (252 a year), currency of S = 100")
    if args.evaluate is None:
        with run.training():
            agent = train(run, model)
    if rank() > 0:
        return True  # the first process benchmarks
    result, contest = benchmark(run, model, agent)
    return run.finish(result, partial(hedging_report, contest=contest))


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
