"""Phase 3: quote bid and ask against an Avellaneda–Stoikov maker and hedge the book, learned with PPO.

Makers of European options quote, takers choose among them or walk away, and every maker hedges the delta of its book at
a cost. The agent sets its half-spread, its skew, the delta it wants to be left with and a no-trade band around it; its
rival is the classical answer, tuned. CleanRL's PPO with GAE, batched: a rollout is one whole episode of every
environment. All the finance is in envs/; copy this file, change thirty lines, run it.
"""

import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn

from envs import AgainstRivals, QuotingEnv, benchmark, dynamics, figures, makers, quoting, runs

Tensor = torch.Tensor
PHASE = "phase3"  # a checkpoint is only loaded into the phase that wrote it
EPISODES = 4096  # played side by side for validation and benchmark
EXPLORATION_SEED = 4_000_000  # added to --seed, which itself seeds the market and stays below a million


@dataclass
class Args:
    """Phase 3: train a PPO agent to make markets in options against a Black–Scholes maker, then benchmark it.

    Two makers (or more) quote five calls of one expiry, twice a trading day; takers arrive at random, with persistent
    order flow, and pick a maker or walk away. The agent sets half-spread and skew in vol points and hedges its delta at
    a cost; the others quote by Avellaneda–Stoikov around Black–Scholes, tuned. At the end the agent is compared with
    that maker in the same seat, with the same takers, and with GLFT quotes, a minimum-variance delta and a no-trade
    band, all tuned; under gbm also with dynamic programming, and with the exact optimum, the best response, where
    nothing is risked and hedging is free. Exit code 0: benchmark passed; 1: failed; 2: bad input; 3: diverged; 130:
    Ctrl-C. Everything is written to runs/<run name>/.

    Commands to start from:

      python phase3_spread_vs_bs.py                         Heston's stochastic volatility
      python phase3_spread_vs_bs.py --dynamics garch        or gbm, merton
      python phase3_spread_vs_bs.py --resume runs/NAME      go on where a run stopped
      python phase3_spread_vs_bs.py --evaluate runs/NAME --dynamics merton
      python phase3_spread_vs_bs.py --evaluate runs/NAME --rival-spread 0.7
      torchrun --nproc-per-node 2 phase3_spread_vs_bs.py    data-parallel; --num-envs is each process's

    Where the answer is known exactly, without risk aversion and cost:

      python phase3_spread_vs_bs.py --dynamics gbm --risk-aversion 0 --cost-rate 0
    """

    exp_name: str = Path(__file__).stem
    """name of the experiment, part of the run's name"""
    seed: int = 1
    """seed of the run; the same seed gives the same numbers, bitwise, on the same machine"""
    cuda: bool = True
    """use the GPU if there is one"""
    torch_threads: int = 1
    """CPU threads of torch; these small networks are fastest on one"""
    track: bool = False
    """log to Weights & Biases (WANDB_MODE=offline works without an account)"""
    wandb_project_name: str = "option-market-making"
    """the W&B project"""
    wandb_entity: str | None = None
    """the W&B entity (team); your own account by default"""
    save_model: bool = True
    """write checkpoint.pt, which --resume and --evaluate need"""
    evaluate: str | None = None
    """CHECKPOINT or run folder: no training, only the benchmark; market flags may differ from those trained with"""
    resume: str | None = None
    """run folder: continue it to exactly the numbers of an uninterrupted run"""
    compile: bool = False
    """compile policy and loss with torch.compile (needs a C++ compiler; worth it on long runs)"""
    cudagraphs: bool = False
    """capture rollout and update as one CUDA graph (GPU only), for the launches that dominate with few environments"""

    # The market
    dynamics: str = "heston"
    """model of the underlying: gbm, garch, heston, merton, marlvol; historical (real closes) with --evaluate only"""
    volatility: float = 0.2
    """annualised volatility, a decimal: of gbm, and at the start and in the long run of heston"""
    mean_reversion: float = 4.0
    """speed of heston's mean reversion, per year"""
    vol_of_vol: float = 0.5
    """volatility of heston's variance"""
    correlation: float = -0.7
    """correlation of heston's variance with the spot"""
    history: str | None = None
    """CSV with columns date and close for garch and historical; the S&P 500 of 1999–2018 by default"""
    history_end: str | None = None
    """YYYY-MM-DD: garch is fitted on closes up to this day, historical replays the closes after it"""
    marlvol_checkpoint: str | None = None
    """run folder or checkpoint of phase 0, whose market marlvol is"""
    num_steps: int = 60
    """steps of an episode, half a trading day each (garch, historical: a day); the options live twice as long"""
    num_makers: int = 2
    """makers in the market: the agent and its rivals"""
    arrival_rate: float = 0.5
    """mean number of takers a step who want to buy (and to sell) each option"""
    flow_sd: float = 0.5
    """standard deviation of the order flow's imbalance: takers come at arrival_rate × (1 ± imbalance)"""
    choice_sensitivity: float = 2.0
    """k of the takers' logit choice, per vol point: the larger, the more the best price takes all"""
    cost_rate: float = 5e-4
    """proportional cost of hedging per unit of currency traded (5e-4 = 5 bp)"""
    risk_aversion: float = 1.0
    """weight of ½ΔW² in the reward, 1/currency"""
    privileged: bool = False
    """let the agent see its rivals' vegas and positions (for study)"""
    rival_spread: float = 1.0
    """the rivals' half-spread, as a multiple of what Avellaneda–Stoikov's formula says"""
    rival_risk_aversion: float = 1.0
    """the rivals' risk aversion, as a multiple of the tuned one"""

    # The algorithm
    total_timesteps: int = 9_000_000
    """environment steps of the whole run, over all environments"""
    num_envs: int = 1024
    """environments side by side"""
    learning_rate: float = 1.5e-3
    """learning rate of Adam"""
    anneal_lr: bool = True
    """let the learning rate fall linearly to zero"""
    gamma: float = 1.0
    """discount factor"""
    gae_lambda: float = 0.85
    """λ of generalised advantage estimation; higher ones earn more, but no more objective, at more risk"""
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

    # The benchmark
    tuning_episodes: int = 2048
    """episodes that the classical makers, the rival among them, are tuned on"""
    num_evaluations: int = 20
    """how often in the run the policy is evaluated, logged and saved"""
    eval_episodes: int = 32_768
    """episodes of the final benchmark (with historical: all the windows there are)"""


def validate(args: Args) -> None:
    """Raises UsageError for the first argument that cannot work."""
    names = dynamics.NAMES if args.evaluate else [name for name in dynamics.NAMES if name != "historical"]
    hint = "" if args.evaluate else "; historical with --evaluate"
    runs.check(args.dynamics in names, f"--dynamics is {args.dynamics!r} (one of {', '.join(names)}{hint})")
    market, calibrated = args.marlvol_checkpoint, args.dynamics == "marlvol"
    runs.check(market or not calibrated, "--dynamics marlvol needs --marlvol-checkpoint, a run of phase 0")
    runs.check(calibrated or not market or args.evaluate, "--marlvol-checkpoint needs --dynamics marlvol")
    runs.check_range(args, 1e-3, 10, "volatility")
    runs.check_range(args, 1e-3, 100, "mean_reversion")
    runs.check_range(args, 1e-3, 3, "vol_of_vol")
    runs.check_range(args, -1, 1, "correlation")
    runs.check_range(args, 0, 0.5, "cost_rate")
    runs.check_range(args, 0, 1e3, "risk_aversion")
    runs.check_range(args, 1, 2520, "num_steps")
    runs.check_range(args, 2, 16, "num_makers")
    runs.check_range(args, 0, 20, "arrival_rate", open_low=True)
    runs.check_range(args, 0, 10, "flow_sd")
    runs.check_range(args, 0, 1e6, "choice_sensitivity", "rival_spread", "rival_risk_aversion", open_low=True)
    most = 3 / math.sqrt(2 * args.num_steps / 504)  # beyond, the spot is as good as zero at the end
    runs.check(args.volatility <= most, f"--volatility is {args.volatility} (at most {most:.2g} over --num-steps)")
    runs.check_range(args, 2, 2**26, "eval_episodes", "tuning_episodes")
    runs.check_range(args, 1, 1024, "torch_threads")
    runs.check_name(args.exp_name)
    if args.evaluate is not None:
        return  # the rest is about training
    fitted = args.dynamics == "garch"
    runs.check(fitted or not (args.history or args.history_end), "--history and --history-end need --dynamics garch")
    runs.check_range(args, 0, math.inf, "learning_rate", "max_grad_norm", "reward_scale", open_low=True)
    runs.check_range(args, 0, 1, "gamma", "gae_lambda")
    runs.check_range(args, 0, 1, "clip_coef", open_low=True)
    runs.check_range(args, 0, math.inf, "ent_coef", "vf_coef")
    runs.check_range(args, 1, 2**20, "num_envs", "num_minibatches", "update_epochs", "num_evaluations")
    runs.check_range(args, 0, 999_999, "seed")  # the seeds above are of tuning, validation and benchmark
    batch_size = args.num_envs * args.num_steps
    runs.check(
        batch_size % args.num_minibatches == 0 and batch_size // args.num_minibatches > 1,
        f"--num-minibatches is {args.num_minibatches} (must divide num_envs × num_steps = {batch_size}, > 1 each)",
    )
    runs.check_range(args, batch_size * runs.world_size(), 10**12, "total_timesteps")
    runs.check(not args.cudagraphs or (args.cuda and torch.cuda.is_available()), "--cudagraphs needs a GPU and --cuda")
    runs.check(not (args.cudagraphs and args.compile), "--cudagraphs and --compile exclude each other")
    runs.check(not (args.cudagraphs and runs.world_size() > 1), "--cudagraphs is for one process, not for torchrun")


def make_dynamics(args: Args) -> dynamics.Dynamics:
    """The model of the underlying that the flags describe; data errors become usage errors."""
    dt = 0.5 / dynamics.TRADING_DAYS
    try:
        if args.dynamics == "heston":
            variance = args.volatility**2
            return dynamics.Heston(variance, variance, args.mean_reversion, args.vol_of_vol, args.correlation, dt)
        history = (args.history, args.history_end, args.num_steps)
        model = dynamics.make(args.dynamics, args.volatility, *history, dt, checkpoint=args.marlvol_checkpoint)
    except ValueError as error:
        raise runs.UsageError(str(error)) from None
    allowed = f"at most {model.last_step // 2} with this market: options expire after twice that, and the smile ends"
    runs.check(2 * args.num_steps <= model.last_step, f"--num-steps is {args.num_steps} ({allowed})")
    return model


def make_market(args: Args, model: dynamics.Dynamics, num_envs: int, device: torch.device) -> QuotingEnv:
    names = ("num_makers", "num_steps", "arrival_rate", "flow_sd", "choice_sensitivity", "cost_rate", "risk_aversion")
    settings = {name: getattr(args, name) for name in names}
    return QuotingEnv(num_envs, model, expiry=2 * args.num_steps, privileged=args.privileged, device=device, **settings)


# ALGO LOGIC: the agent


def layer_init(layer: nn.Linear, std: float = math.sqrt(2)) -> nn.Linear:
    nn.init.orthogonal_(layer.weight, std)
    nn.init.zeros_(layer.bias)
    return layer


class Agent(nn.Module):
    """Gaussian policy and value function, 2×64 tanh each; the environment's action is `to_quote` of the raw one.

    Raw action zero is a maker with constant half-spread, skew and target delta proportional to its vega, and a constant
    band: linear in what the strongest classical maker does, which `fit` measures. So training starts from there.
    """

    def __init__(self, market: QuotingEnv):
        super().__init__()
        size, actions = market.maker_observation_space.shape[0], market.maker_action_space.shape[0]

        def network(outputs: int, std: float) -> nn.Sequential:
            return nn.Sequential(
                layer_init(nn.Linear(size, 64)), nn.Tanh(), layer_init(nn.Linear(64, 64)), nn.Tanh(),
                layer_init(nn.Linear(64, outputs), std),
            )  # fmt: skip

        self.actor_mean = network(actions, 0.01)
        self.critic = network(1, 1.0)
        self.actor_logstd = nn.Parameter(torch.full((actions,), -0.5))
        # Observations are standardised by what the classical maker met before training, and saved with the policy.
        self.register_buffer("observation_mean", torch.zeros(size))
        self.register_buffer("observation_std", torch.ones(size))
        # Half-spread (vol points), skew and target delta per unit of vega, half-width of the band (shares)
        self.register_buffer("linear_maker", torch.tensor([1.0, -1.0, 0.0, 0.1]))

    @torch.no_grad()
    def fit(self, env: AgainstRivals, classic) -> None:
        """Sets normaliser and linear maker from episodes that `classic` plays in the agent's seat."""
        observation, _ = env.reset(seed=benchmark.SCALE_SEED)
        seen, done = [], []
        for _ in range(env.num_steps):
            action = classic(observation)
            seen.append(observation)
            done.append(action)
            observation, *_ = env.step(action)
        seen, done = torch.cat(seen), torch.cat(done)
        vega, (half_spread, skew, target, band) = seen[:, quoting.VEGA], done.unbind(-1)
        square = vega.square().mean().clamp(min=1e-12)
        slopes = (skew * vega).mean() / square, (target * vega).mean() / square
        self.linear_maker.copy_(torch.stack((half_spread.mean(), *slopes, band.mean().clamp(min=0.01))))
        self.observation_mean.copy_(seen.mean(0))
        # What never varies in training (gbm's volatility) must not be blown up where it differs, in another market.
        self.observation_std.copy_(torch.where(seen.std(0) < 1e-2, 1.0, seen.std(0)))

    def normalise(self, observation: Tensor) -> Tensor:
        return ((observation - self.observation_mean) / self.observation_std).clamp(-10, 10)

    def to_quote(self, observation: Tensor, raw_action: Tensor) -> Tensor:
        """Observation (n, size) and raw action (n, 4) → half-spread, skew, target delta, half-width of the band."""
        half_spread, skew, target, band = self.linear_maker
        raw, vega = raw_action.clamp(-5, 5), observation[:, quoting.VEGA]
        quotes = half_spread * (0.6 * raw[:, 0]).exp(), skew * vega + 0.5 * half_spread * raw[:, 1]
        return torch.stack((*quotes, target * vega + 0.4 * raw[:, 2], band * raw[:, 3].exp()), -1)

    def act(self, observation: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised observation (n, size), normals (n, 4) → raw action (n, 4), log-probability and value (n,)."""
        action = self.actor_mean(observation) + self.actor_logstd.exp() * noise
        logprob = (-0.5 * noise**2 - self.actor_logstd - 0.5 * math.log(2 * math.pi)).sum(-1)
        return action, logprob, self.critic(observation)[:, 0]

    def evaluate(self, observation: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised observations and raw actions → log-probabilities (n,), entropy (), values (n,)."""
        noise = (action - self.actor_mean(observation)) * torch.exp(-self.actor_logstd)
        logprob = (-0.5 * noise**2 - self.actor_logstd - 0.5 * math.log(2 * math.pi)).sum(-1)
        entropy = (0.5 + 0.5 * math.log(2 * math.pi) + self.actor_logstd).sum()
        return logprob, entropy, self.critic(observation)[:, 0]

    def policy(self, observation: Tensor) -> Tensor:
        """The deterministic policy that is benchmarked: observation (n, size) → environment action (n, 4)."""
        return self.to_quote(observation, self.actor_mean(self.normalise(observation)))


# ALGO LOGIC: PPO


class Batch(NamedTuple):
    """A rollout, flattened over time and environments: (num_steps · num_envs, …)."""

    observations: Tensor  # normalised
    actions: Tensor  # raw
    logprobs: Tensor
    advantages: Tensor
    returns: Tensor


@torch.no_grad()
def rollout(env: AgainstRivals, agent: Agent, act, args: Args, generator: torch.Generator) -> Batch:
    """Plays one whole episode in every environment and estimates advantages (GAE; the end is terminal)."""
    observation, _ = env.reset()
    steps = []
    for _ in range(env.num_steps):
        normalised = agent.normalise(observation)
        noise = torch.randn(env.num_envs, 4, generator=generator, device=env.device)
        action, logprob, value = act(normalised, noise)
        observation, reward, _, _, info = env.step(agent.to_quote(observation, action))
        # Who trades and how the market moves is chance; what the environment knows of its mean is learnt from instead:
        # the expected edge, no first-order ΔW, and its expected square. The optimum is the same and the noise less.
        steps.append((normalised, action, logprob, args.reward_scale * (reward - info["noise"]), value))
    observations, actions, logprobs, rewards, values = (torch.stack(column) for column in zip(*steps, strict=True))
    advantages = torch.empty_like(rewards)
    next_value, advantage = torch.zeros_like(rewards[0]), torch.zeros_like(rewards[0])
    for t in reversed(range(env.num_steps)):
        error = rewards[t] + args.gamma * next_value - values[t]
        advantage = error + args.gamma * args.gae_lambda * advantage
        advantages[t], next_value = advantage, values[t]
    return Batch(*(x.flatten(0, 1) for x in (observations, actions, logprobs, advantages, advantages + values)))


def ppo_loss(agent: Agent, batch: Batch, args: Args) -> tuple[Tensor, Tensor]:
    """Loss of a minibatch, and its parts: policy loss, value loss, entropy, approximate KL, clipped fraction."""
    logprobs, entropy, values = agent.evaluate(batch.observations, batch.actions)
    logratio = logprobs - batch.logprobs
    ratio = logratio.exp()
    advantages = batch.advantages
    if args.norm_adv:
        advantages = runs.standardise(advantages)
    clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    policy_loss = -torch.minimum(ratio * advantages, clipped * advantages).mean()
    value_loss = 0.5 * (values - batch.returns).square().mean()
    loss = policy_loss - args.ent_coef * entropy + args.vf_coef * value_loss
    with torch.no_grad():
        approx_kl = (ratio - 1 - logratio).mean()
        clip_fraction = ((ratio - 1).abs() > args.clip_coef).float().mean()
        parts = torch.stack((policy_loss, value_loss, entropy, approx_kl, clip_fraction))
    return loss, parts


LOSS_NAMES = ("losses/policy_loss", "losses/value_loss", "losses/entropy", "losses/approx_kl", "losses/clipfrac")
METRICS = (
    "global_step", "charts/objective", "charts/gain_over_avellaneda_stoikov", "charts/SPS", "charts/learning_rate",
    *LOSS_NAMES, *(f"losses/action_std_{i}" for i in range(4)),
)  # fmt: skip


def update(agent: Agent, optimizer, batch: Batch, loss_function, args: Args, generator: torch.Generator) -> Tensor:
    """PPO's epochs over one rollout. Returns the mean of the loss parts (5,) and never waits for the device."""
    parts = []
    size = len(batch.logprobs)
    for _ in range(args.update_epochs):
        order = torch.rand(size, generator=generator, device=batch.logprobs.device).argsort()
        for index in order.view(args.num_minibatches, -1):
            loss, loss_parts = loss_function(agent, Batch(*(x[index] for x in batch)), args)
            optimizer.zero_grad()
            loss.backward()
            runs.average_gradients(agent)  # over the processes of torchrun
            nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
            optimizer.step()
            parts.append(loss_parts)
    runs.check_equal_parameters(agent)
    return torch.stack(parts).mean(0)


def train(args: Args, classics: makers.Makers, run_dir: Path, device: torch.device, checkpoint: dict | None, tracker):
    """Trains from scratch or from `checkpoint`; logs, evaluates and saves `args.num_evaluations` times.

    Returns the agent and the environment steps it was trained for."""
    torch.manual_seed(args.seed)
    env = classics.env.like(args.num_envs)
    agent = Agent(env.env).to(device)
    agent.fit(env.like(1024), classics.policies[makers.STRONGEST_MAKER])
    # A tensor as learning rate, so that a captured update sees it change
    optimizer = torch.optim.Adam(
        agent.parameters(), lr=torch.tensor(args.learning_rate, device=device), eps=1e-5, fused=True,
        capturable=device.type == "cuda",
    )  # fmt: skip
    # Each process of torchrun has its own streams, of the market and of exploration, which also shuffles minibatches
    generator = torch.Generator(device).manual_seed(runs.rank_seed(args.seed + EXPLORATION_SEED))
    env.generator.manual_seed(runs.rank_seed(args.seed))

    batch_size = args.num_envs * args.num_steps * runs.world_size()
    num_iterations = args.total_timesteps // batch_size
    evaluations = {math.ceil(num_iterations * (i + 1) / args.num_evaluations) for i in range(args.num_evaluations)}
    first, rows = 1, None
    if checkpoint is not None:
        try:
            agent.load_state_dict(checkpoint["agent"])
            optimizer.load_state_dict(checkpoint["optimizer"])
            for group in optimizer.param_groups:  # read onto the CPU, where a captured update would not see it change
                group["lr"] = group["lr"].to(device)
            generator.set_state(checkpoint["generator"][runs.rank()])
            env.generator.set_state(checkpoint["market_generator"][runs.rank()])
            first, rows = int(checkpoint["iteration"]) + 1, int(checkpoint["rows"])
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
            raise runs.UsageError(f"{run_dir}: does not fit this script, or was made on another device") from None
    metrics = runs.MetricsFile(run_dir / "metrics.csv", METRICS, resume_from=rows)

    def save(iteration: int) -> None:
        if args.save_model:
            content = {"phase": PHASE, "args": asdict(args), "iteration": iteration, "rows": metrics.rows}
            content |= {"agent": agent.state_dict(), "optimizer": optimizer.state_dict()}
            content |= {"generator": runs.gather(generator.get_state()), "world_size": runs.world_size()}
            content |= {"market_generator": runs.gather(env.generator.get_state())}
            content |= {"tracker": tracker.id if tracker else None, "makers": classics.parameters}
            content |= {"origin": classics.origin}
            runs.save_checkpoint(run_dir / "checkpoint.pt", content)

    validation = benchmark.Validation(env.like(EPISODES), classics.policies[makers.NAMED_MAKER], "avellaneda_stoikov")
    if checkpoint is None:  # the untrained policy, for the learning curve
        metrics.write({"global_step": 0, **validation(agent.policy)})
        save(0)
    act = torch.compile(agent.act) if args.compile else agent.act
    loss_function = torch.compile(ppo_loss) if args.compile else ppo_loss

    def iterate() -> Tensor:
        batch = rollout(env, agent, act, args, generator)
        return update(agent, optimizer, batch, loss_function, args, generator)

    if args.cudagraphs:
        iterate = runs.cuda_graph(iterate, agent, optimizer, [generator, env.generator])
    progress = runs.progress_bar(num_iterations * batch_size, (first - 1) * batch_size)
    progress.set_description("gain over Avellaneda–Stoikov —")
    clock, clock_steps = time.perf_counter(), 0
    for iteration in range(first, num_iterations + 1):
        if args.anneal_lr:
            optimizer.param_groups[0]["lr"].fill_(args.learning_rate * (1 - (iteration - 1) / num_iterations))
        try:
            losses = iterate()
        except quoting.BadQuote as error:  # they are NaN
            raise runs.DivergenceError(
                f"{error}, by step {iteration * batch_size}; {runs.last_good(run_dir)}"
            ) from None
        clock_steps += batch_size
        progress.update(batch_size)
        if iteration not in evaluations:
            continue
        row = {"global_step": iteration * batch_size}
        row |= dict(zip(LOSS_NAMES, losses.tolist(), strict=True))  # waits for the device, so the speed is honest
        row["charts/SPS"] = int(clock_steps / (time.perf_counter() - clock))
        row["charts/learning_rate"] = optimizer.param_groups[0]["lr"].item()
        row |= {f"losses/action_std_{i}": std for i, std in enumerate(agent.actor_logstd.exp().tolist())}
        parameters = {f"parameter {name}": p.sum().item() for name, p in agent.named_parameters()}
        runs.check_finite({**row, **parameters}, row["global_step"], run_dir)
        row |= validation(agent.policy)
        metrics.write(row)
        if tracker:
            tracker.log(row, step=row["global_step"])
        save(iteration)
        gain, objective = row["charts/gain_over_avellaneda_stoikov"], row["charts/objective"]
        relative = f" ({100 * gain / (objective - gain):+.1f} %)" if objective - gain > 0.01 else ""
        progress.set_description(f"gain over Avellaneda–Stoikov {gain:+.3f}{relative}")
        clock, clock_steps = time.perf_counter(), 0
    progress.close()
    return agent, num_iterations * batch_size


# BENCHMARK


MARKET = (
    "dynamics", "volatility", "mean_reversion", "vol_of_vol", "correlation", "num_steps", "num_makers", "arrival_rate",
    "flow_sd", "choice_sensitivity", "cost_rate", "risk_aversion", "rival_spread", "rival_risk_aversion",
)  # fmt: skip


def run_benchmark(args: Args, classics: makers.Makers, agent: Agent, steps: int, run_dir: Path, model):
    """The agent and every classical maker in the same seat on fresh episodes; writes report and figures."""
    market = {name: getattr(args, name) for name in MARKET}
    default_market = market == {name: getattr(Args(), name) for name in MARKET} and not args.privileged
    settings = {**market, "privileged": args.privileged, "run seed": args.seed, "training steps": steps}
    title = f"Phase 3 ({args.dynamics}, cost {1e4 * args.cost_rate:g} bp, risk aversion {args.risk_aversion:g})"
    replayed = None
    if args.dynamics == "historical":
        settings |= {"closes": args.history or "S&P 500", "model fitted until": str(model.dates[0])}
        windows = make_market(args, model, model.num_windows(args.num_steps), classics.env.device)
        replayed = AgainstRivals(windows, classics.env.rivals)
    contest = makers.quoting_contest(classics, agent.policy, args.eval_episodes, replayed)
    result = makers.judge_quoting(title, settings, contest, default_market)
    result.write(run_dir)
    if args.dynamics == "historical":
        apart = contest.non_overlapping(args.num_steps)
        makers.judge_quoting(f"{title}, non-overlapping windows", settings, apart, default_market).write(
            run_dir, "benchmark_non_overlapping"
        )
        figures.advantage_by_date(run_dir / "advantage_by_date.png", model.dates, contest, title)
    sweep = makers.rival_sweep(contest, ("agent", makers.NAMED_MAKER, makers.GLFT, makers.STRONGEST_MAKER))
    runs.write_json(run_dir / "rival_sweep.json", sweep)
    figures.quoting_report(run_dir, title, contest, sweep)
    return result


# MAIN


def start_tracker(args: Args, run_dir: Path, run_id: str | None):
    """Weights & Biases, or None. Online or offline as WANDB_MODE says."""
    if not args.track or runs.rank() > 0:
        return None
    import wandb  # only here: a run without --track needs no account and no import

    try:
        return wandb.init(
            project=args.wandb_project_name, entity=args.wandb_entity, config=asdict(args), name=run_dir.name,
            id=run_id, resume="allow", save_code=True,
        )  # fmt: skip
    except wandb.errors.Error as error:
        reason = str(error).splitlines()[0]
        raise runs.UsageError(f"--track: {reason} (WANDB_MODE=offline works without an account)") from None


def finish_tracker(tracker, result: benchmark.Benchmark, run_dir: Path) -> None:
    """Benchmark table, figures, checkpoint and code to W&B."""
    import wandb

    columns = ["contestant", *next(iter(result.rows.values()))]
    table = wandb.Table(columns=columns, data=[[name, *row.values()] for name, row in result.rows.items()])
    tracker.log({"benchmark/table": table})
    tracker.log({f"benchmark/{path.stem}": wandb.Image(str(path)) for path in sorted(run_dir.glob("*.png"))})
    tracker.summary["benchmark/passed"] = result.passed
    for name, share in result.shares.items():
        tracker.summary[f"benchmark/{name}"] = share.mean
    for name, advantage in result.advantages.items():
        tracker.summary[f"benchmark/advantage over {name}"] = advantage.mean
    if (run_dir / "checkpoint.pt").is_file():
        artifact = wandb.Artifact(f"{PHASE}-{tracker.id}", type="model")
        artifact.add_file(str(run_dir / "checkpoint.pt"))
        tracker.log_artifact(artifact)
    here = Path(__file__).parent
    code = {here / Path(__file__).name, *(here / "envs").glob("*.py"), makers.RECORDED}
    tracker.log_code(str(here), include_fn=lambda path: Path(path) in code)
    tracker.finish()


def load_agent(args: Args, checkpoint: dict, market: QuotingEnv) -> Agent:
    """The agent of a checkpoint, to be evaluated in another market than it was trained in, but not on its own past."""
    agent = Agent(market).to(market.device)
    try:
        agent.load_state_dict(checkpoint["agent"])
    except (RuntimeError, AttributeError, TypeError):
        raise runs.UsageError(f"{args.evaluate}: does not fit this script, its networks have other shapes") from None
    runs.check(all(x.isfinite().all() for x in agent.state_dict().values()), f"{args.evaluate}: NaN in its networks")
    trained = runs.saved_args(Args, checkpoint["args"], args.evaluate)
    if args.dynamics == "historical" and trained.dynamics == "garch":
        seen = trained.history_end
        apart = trained.history == args.history and seen is not None and seen <= args.history_end
        until = f"closes of {trained.history or 'the S&P 500'} until {seen or 'their end'}"
        runs.check(apart, f"--history-end is {args.history_end}, but the agent was trained on {until}")
    return agent


def main(argv) -> bool:
    """Runs the command; True if the benchmark passed."""
    resume_needs = ("rows", "optimizer", "generator", "market_generator", "world_size", "tracker", "makers", "origin")
    args, checkpoint = runs.parse_command(Args, argv, PHASE, resume_needs)
    validate(args)
    model = make_dynamics(args)
    torch.set_num_threads(args.torch_threads)
    device = runs.join_ranks(args.cuda)
    fitted = model.garch if args.dynamics == "historical" else model  # what the makers know
    market = make_market(args, fitted, args.tuning_episodes, device)
    for flag, rows in (("--num-envs", max(args.num_envs, EPISODES)), ("--tuning-episodes", args.tuning_episodes)):
        runs.check_memory(3 * 4 * rows * market.noise_size, device, f"{flag} {rows}")  # noise, marks and a copy
    name = f"{args.dynamics}__{args.exp_name}__{'evaluate__' if args.evaluate else ''}{args.seed}"
    run_dir = Path(args.resume or f"runs/{name}__{time.strftime('%Y%m%d-%H%M%S')}")
    if args.evaluate is not None:
        agent = load_agent(args, checkpoint, market)
        trained = runs.saved_args(Args, checkpoint["args"], args.evaluate)
        batch_size = trained.num_envs * trained.num_steps * checkpoint.get("world_size", 1)
        steps = batch_size * checkpoint["iteration"]
    tracker = start_tracker(args, run_dir, checkpoint["tracker"] if args.resume and checkpoint else None)
    if args.resume is None:
        run_dir = runs.new_folder(run_dir)
        runs.write_json(run_dir / "args.json", asdict(args))
    print(f"{run_dir}: {args.dynamics} on {device}; edges in vol points, vega per vol point, S = 100, 252 days a year")
    print("the classical makers, tuned, are the rival and what has to be beaten …", flush=True)
    if args.resume and checkpoint:  # the very same opponents
        try:
            classics = makers.assemble(market, checkpoint["makers"], checkpoint["origin"])
        except (AttributeError, KeyError, TypeError, ValueError):
            raise runs.UsageError(
                f"{args.resume}: does not fit this script, its makers have other parameters"
            ) from None
    else:
        classics = makers.classical_makers(market, args.rival_spread, args.rival_risk_aversion)
    if args.evaluate is None:
        with runs.naming_last_good(run_dir):
            agent, steps = train(args, classics, run_dir, device, checkpoint, tracker)
    if runs.rank() > 0:
        return True  # the first process benchmarks
    result = run_benchmark(args, classics, agent, steps, run_dir, model)
    print(f"\n{result.title}\n\n{result.table()}\n\n{result.verdict()}\nreport and figures: {run_dir}")
    if tracker:
        finish_tracker(tracker, result, run_dir)
    return result.passed


if __name__ == "__main__":
    runs.run(main, sys.argv[1:])
