"""Phase 1: hedge one sold option at a cost, learned with PPO and measured against the exact optimum.

The agent is short one at-the-money call for 30 trading days and trades the underlying once a day at a proportional
cost. Its action is a no-trade band around the Black–Scholes delta. CleanRL's PPO with GAE, batched: a rollout is one
whole episode of every environment. All the finance is in envs/; copy this file, change thirty lines, run it.
"""

import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn

from envs import HedgingEnv, benchmark, dynamics, figures, runs

Tensor = torch.Tensor
PHASE = "phase1"  # a checkpoint is only loaded into the phase that wrote it
EXPLORATION_SEED = 4_000_000  # added to --seed, which itself seeds the market and stays below a million


@dataclass
class Args:
    """Phase 1: train a PPO agent to hedge one sold option, then benchmark it.

    The agent is short one at-the-money call (S = K = 100, 30 trading days) and trades the underlying once a day at a
    proportional cost. At the end it is compared, on the same fresh episodes, with Black–Scholes delta hedging, with
    tuned no-trade bands and, for gbm and garch, with the exact optimum. Exit code 0: benchmark passed; 1: failed;
    2: bad input; 3: diverged; 130: Ctrl-C. Everything is written to runs/<run name>/.

    Commands to start from:

      python phase1_delta_hedge_ppo.py                      constant volatility (phase 1a)
      python phase1_delta_hedge_ppo.py --dynamics garch     autocorrelated volatility (phase 1b)
      python phase1_delta_hedge_ppo.py --resume runs/NAME   go on where a run stopped
      python phase1_delta_hedge_ppo.py --evaluate runs/NAME --dynamics heston

    Train on the S&P 500 until 2010, then hedge the real one of 2011 to 2018:

      python phase1_delta_hedge_ppo.py --dynamics garch --history-end 2010-12-31
      python phase1_delta_hedge_ppo.py --evaluate runs/NAME --dynamics historical
      torchrun --nproc-per-node 2 phase1_delta_hedge_ppo.py    data-parallel; --num-envs is each process's
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
    dynamics: str = "gbm"
    """model of the underlying: gbm, garch, heston, merton, marlvol; historical (real closes) with --evaluate only"""
    volatility: float = 0.2
    """annualised volatility of gbm, a decimal"""
    history: str | None = None
    """CSV with columns date and close for garch and historical; the S&P 500 of 1999–2018 by default"""
    history_end: str | None = None
    """YYYY-MM-DD: garch is fitted on closes up to this day, historical replays the closes after it"""
    marlvol_checkpoint: str | None = None
    """run folder or checkpoint of phase 0, whose market marlvol is"""
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
    num_evaluations: int = 20
    """how often in the run the policy is evaluated, logged and saved"""
    eval_episodes: int = 65_536
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
    runs.check_range(args, 0, 0.5, "cost_rate")
    runs.check_range(args, 0, 1e6, "risk_aversion")
    runs.check_range(args, 1, 2520, "num_steps")
    most = 3 / math.sqrt(args.num_steps / 252)  # beyond, the spot is as good as zero at the end
    runs.check(args.volatility <= most, f"--volatility is {args.volatility} (at most {most:.2g} over --num-steps)")
    runs.check_range(args, 2, 2**26, "eval_episodes")
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
    try:
        history = (args.history, args.history_end, args.num_steps)
        model = dynamics.make(args.dynamics, args.volatility, *history, checkpoint=args.marlvol_checkpoint)
    except ValueError as error:
        raise runs.UsageError(str(error)) from None
    allowed = f"at most {model.last_step} with this market: the smile ends there"
    runs.check(args.num_steps <= model.last_step, f"--num-steps is {args.num_steps} ({allowed})")
    return model


def make_env(args: Args, model: dynamics.Dynamics, num_envs: int, device: torch.device) -> HedgingEnv:
    settings = {"num_steps": args.num_steps, "cost_rate": args.cost_rate, "risk_aversion": args.risk_aversion}
    return HedgingEnv(num_envs, model, device=device, **settings)


# ALGO LOGIC: the agent


def layer_init(layer: nn.Linear, std: float = math.sqrt(2)) -> nn.Linear:
    nn.init.orthogonal_(layer.weight, std)
    nn.init.zeros_(layer.bias)
    return layer


class Agent(nn.Module):
    """Gaussian policy and value function, 2×64 tanh each; the environment's action is `to_band` of the raw one."""

    def __init__(self, env: HedgingEnv):
        super().__init__()
        size, actions = env.single_observation_space.shape[0], env.single_action_space.shape[0]

        def network(outputs: int, std: float) -> nn.Sequential:
            return nn.Sequential(
                layer_init(nn.Linear(size, 64)), nn.Tanh(), layer_init(nn.Linear(64, 64)), nn.Tanh(),
                layer_init(nn.Linear(64, outputs), std),
            )  # fmt: skip

        self.actor_mean = network(actions, 0.01)
        self.critic = network(1, 1.0)
        self.actor_logstd = nn.Parameter(torch.full((actions,), -1.0))
        # Observations are standardised by what a fixed band met before training, and saved with the policy.
        self.register_buffer("observation_mean", torch.zeros(size))
        self.register_buffer("observation_std", torch.ones(size))

    @torch.no_grad()
    def fit_normaliser(self, env: HedgingEnv) -> None:
        observation, _ = env.reset(seed=benchmark.SCALE_SEED)
        seen = []
        for _ in range(env.num_steps):
            seen.append(observation)
            observation, *_ = env.step(self.to_band(observation.new_zeros(env.num_envs, 2)))
        mean, std = torch.cat(seen).mean(0), torch.cat(seen).std(0)
        self.observation_mean.copy_(mean)
        # What never varies in training (gbm's volatility) must not be blown up where it differs, in another market.
        self.observation_std.copy_(torch.where(std < 1e-2, 1.0, std))

    def normalise(self, observation: Tensor) -> Tensor:
        return ((observation - self.observation_mean) / self.observation_std).clamp(-10, 10)

    @staticmethod
    def to_band(raw_action: Tensor) -> Tensor:
        """Raw action (n, 2) → (centre offset, half-width) in shares; zero is a band of ±0.05 around the delta."""
        return torch.stack((0.1 * raw_action[:, 0], 0.05 * raw_action[:, 1].clamp(-5, 3).exp()), -1)

    def act(self, observation: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised observation (n, size), normals (n, 2) → raw action (n, 2), log-probability and value (n,)."""
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
        """The deterministic policy that is benchmarked: observation (n, size) → environment action (n, 2)."""
        return self.to_band(self.actor_mean(self.normalise(observation)))


# ALGO LOGIC: PPO


class Batch(NamedTuple):
    """A rollout, flattened over time and environments: (num_steps · num_envs, …)."""

    observations: Tensor  # normalised
    actions: Tensor  # raw
    logprobs: Tensor
    advantages: Tensor
    returns: Tensor


@torch.no_grad()
def rollout(env: HedgingEnv, agent: Agent, act, args: Args, generator: torch.Generator) -> Batch:
    """Plays one whole episode in every environment and estimates advantages (GAE; expiry is terminal)."""
    observation, _ = env.reset()
    steps = []
    for _ in range(env.num_steps):
        observation = agent.normalise(observation)
        noise = torch.randn(env.num_envs, 2, generator=generator, device=env.device)
        action, logprob, value = act(observation, noise)
        next_observation, reward, _, _, info = env.step(agent.to_band(action))
        # Two terms of the reward do not depend on the policy, in mean: ΔW (shares earn nothing on average, and the
        # option's mark moves as it will) and the squared ΔW of the Black–Scholes hedge on the same path. Without them
        # the optimum is the same and the noise less.
        hedged_risk = 0.5 * env.risk_aversion * info["hedged_change"] ** 2
        reward = args.reward_scale * (reward - info["wealth_change"] + hedged_risk)
        steps.append((observation, action, logprob, reward, value))
        observation = next_observation
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
    "global_step", "charts/objective", "charts/gain_over_black_scholes", "charts/share_of_gap_closed", "charts/SPS",
    "charts/learning_rate", *LOSS_NAMES, "losses/action_std_0", "losses/action_std_1",
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


def train(args: Args, model: dynamics.Dynamics, run_dir: Path, device: torch.device, checkpoint: dict | None, tracker):
    """Trains from scratch or from `checkpoint`; logs, evaluates and saves `args.num_evaluations` times.

    Returns the agent and the environment steps it was trained for."""
    torch.manual_seed(args.seed)
    env = make_env(args, model, args.num_envs, device)
    agent = Agent(env).to(device)
    agent.fit_normaliser(make_env(args, model, 1024, device))
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
            content |= {"tracker": tracker.id if tracker else None}
            runs.save_checkpoint(run_dir / "checkpoint.pt", content)

    validation = benchmark.hedging_validation(make_env(args, model, 4096, device))
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
    progress.set_description("gain over Black–Scholes —")
    clock, clock_steps = time.perf_counter(), 0
    for iteration in range(first, num_iterations + 1):
        if args.anneal_lr:
            optimizer.param_groups[0]["lr"].fill_(args.learning_rate * (1 - (iteration - 1) / num_iterations))
        losses = iterate()
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
        gain, share = row["charts/gain_over_black_scholes"], row.get("charts/share_of_gap_closed", math.nan)
        possible = "" if math.isnan(share) else f" ({100 * share:.1f} % of what is possible)"
        progress.set_description(f"gain over Black–Scholes {gain:+.4f}{possible}")
        clock, clock_steps = time.perf_counter(), 0
    progress.close()
    return agent, num_iterations * batch_size


# BENCHMARK


def run_benchmark(args: Args, model: dynamics.Dynamics, agent: Agent, steps: int, run_dir: Path, device: torch.device):
    """The agent against every baseline and the exact optimum on fresh episodes; writes report and figures."""
    contest = benchmark.hedging_contest(
        lambda model, num_envs: make_env(args, model, num_envs, device), model, agent.policy, args.eval_episodes
    )
    settings = {"dynamics": args.dynamics, "cost_rate": args.cost_rate, "risk_aversion": args.risk_aversion}
    settings |= {"num_steps": args.num_steps, "run seed": args.seed, "training steps": steps}
    if args.dynamics == "historical":
        settings |= {"closes": args.history or "S&P 500", "model fitted until": str(model.dates[0])}
    title = f"Phase 1 ({args.dynamics}, cost {1e4 * args.cost_rate:g} bp, risk aversion {args.risk_aversion:g})"
    result = benchmark.judge_hedging(title, settings, contest, share_required=0.97)
    result.write(run_dir)
    if args.dynamics == "historical":
        apart = contest.non_overlapping(args.num_steps)
        benchmark.judge_hedging(f"{title}, non-overlapping windows", settings, apart).write(
            run_dir, "benchmark_non_overlapping"
        )
        figures.advantage_by_date(run_dir / "advantage_by_date.png", model.dates, contest, title)
    figures.hedging_report(run_dir, title, contest)
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
    code = {here / Path(__file__).name, *(here / "envs").glob("*.py")}
    tracker.log_code(str(here), include_fn=lambda path: Path(path) in code)
    tracker.finish()


def load_agent(args: Args, checkpoint: dict, env: HedgingEnv) -> Agent:
    """The agent of a checkpoint, to be evaluated in another market than it was trained in, but not on its own past."""
    agent = Agent(env).to(env.device)
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
    resume_needs = ("rows", "optimizer", "generator", "market_generator", "world_size", "tracker")
    args, checkpoint = runs.parse_command(Args, argv, PHASE, resume_needs)
    validate(args)
    model = make_dynamics(args)
    torch.set_num_threads(args.torch_threads)
    device = runs.join_ranks(args.cuda)
    name = f"{args.dynamics}__{args.exp_name}__{'evaluate__' if args.evaluate else ''}{args.seed}"
    run_dir = Path(args.resume or f"runs/{name}__{time.strftime('%Y%m%d-%H%M%S')}")
    if args.evaluate is not None:
        agent = load_agent(args, checkpoint, make_env(args, model, 1, device))
        trained = runs.saved_args(Args, checkpoint["args"], args.evaluate)
        batch_size = trained.num_envs * trained.num_steps * checkpoint.get("world_size", 1)
        steps = batch_size * checkpoint["iteration"]
    tracker = start_tracker(args, run_dir, checkpoint["tracker"] if args.resume and checkpoint else None)
    if args.resume is None:
        run_dir = runs.new_folder(run_dir)
        runs.write_json(run_dir / "args.json", asdict(args))
    print(f"{run_dir}: {args.dynamics} on {device}; trading days (252 a year), money in the currency of S = 100")
    if args.evaluate is None:
        with runs.naming_last_good(run_dir):
            agent, steps = train(args, model, run_dir, device, checkpoint, tracker)
    if runs.rank() > 0:
        return True  # the first process benchmarks
    result = run_benchmark(args, model, agent, steps, run_dir, device)
    print(f"\n{result.title}\n\n{result.table()}\n\n{result.verdict()}\nreport and figures: {run_dir}")
    if tracker:
        finish_tracker(tracker, result, run_dir)
    return result.passed


if __name__ == "__main__":
    runs.run(main, sys.argv[1:])
