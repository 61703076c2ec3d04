"""Phase 0: calibrate the market's volatility to a real option smile, by multi-agent reinforcement learning (MARLVol).

Every Monte Carlo trajectory is a player whose action is its own volatility for the day; all share one policy, and the
error of the option prices that they produce together (Vadori; equation numbers are the paper's). PPO on the experience
of a few basis players, from whom the others' exploration is interpolated. What comes out is a market for the other
phases. All the finance is in envs/; copy this file, change thirty lines, run it.
"""

import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn

from envs import benchmark, calibration, figures, marlvol, runs, smiles
from envs.calibration import CalibrationGame

Tensor = torch.Tensor
PHASE = "phase0"  # a checkpoint is only loaded into the phase that wrote it
EXPLORATION_SEED = 4_000_000  # added to --seed, which itself seeds the market and stays below a million


@dataclass
class Args:
    """Phase 0: calibrate a diffusion to an option smile by multi-agent RL (MARLVol), then benchmark the fit.

    Thousands of trajectories are players who share one policy for their volatilities and one reward, the error of the
    implied volatilities that their payoffs add up to. At the end the mean policy is priced on fresh paths beside
    constant volatility and beside Dupire's local volatility on the same daily grid and the same paths. The other task
    makes a Bermudan option as cheap as the vanillas allow. Exit code 0: benchmark passed; 1: failed; 2: bad input;
    3: diverged; 130: Ctrl-C. Everything is written to runs/<run name>/.

    Commands to start from:

      python phase0_marlvol_calibration.py                        the S&P 500 of 1 August 2018
      python phase0_marlvol_calibration.py --smile quotes.csv     your own: maturity, strike, implied_volatility
      python phase0_marlvol_calibration.py --reward shared        the paper's reward
      python phase0_marlvol_calibration.py --preset paper         all of the paper's settings
      python phase0_marlvol_calibration.py --resume runs/NAME     go on where a run stopped
      torchrun --nproc-per-node 2 phase0_marlvol_calibration.py   data-parallel; --num-runs is each process's

    The Bermudan, with and without memory of the first exercise date, and both in one figure:

      python phase0_marlvol_calibration.py --task bermudan --state non-path-dependent
      python phase0_marlvol_calibration.py --task bermudan --beside runs/NAME

    Then trade in the market that came out:

      python phase1_delta_hedge_ppo.py --dynamics marlvol --marlvol-checkpoint runs/NAME
    """

    exp_name: str = Path(__file__).stem
    """name of the experiment, part of the run's name"""
    seed: int = 1
    """seed of the run; the same seed gives the same numbers, bitwise, on the same machine"""
    cuda: bool = True
    """use the GPU if there is one"""
    torch_threads: int = 1
    """CPU threads of torch"""
    track: bool = False
    """log to Weights & Biases (WANDB_MODE=offline works without an account)"""
    wandb_project_name: str = "option-market-making"
    """the W&B project"""
    wandb_entity: str | None = None
    """the W&B entity (team); your own account by default"""
    save_model: bool = True
    """write checkpoint.pt, which --resume, --evaluate and the other phases' --marlvol-checkpoint need"""
    evaluate: str | None = None
    """CHECKPOINT or run folder: no training, only the benchmark"""
    resume: str | None = None
    """run folder: continue it to exactly the numbers of an uninterrupted run"""
    preset: str = "default"
    """default, or paper: the paper's settings where they differ from ours; other flags still change them"""

    # The target
    task: str = "local-vol"
    """local-vol: fit all strikes and maturities; bermudan: the cheapest Bermudan with the vanillas on the market"""
    smile: str = "sp500-2018"
    """sp500-2018, sp500-2018-slices, sp500-2024, or a CSV: maturity (years), strike, implied_volatility (decimal)"""
    smile_spot: float = 1.0
    """spot (or forward) that the strikes of a CSV belong to"""
    allow_arbitrage: bool = False
    """calibrate to a CSV with static arbitrage all the same"""
    num_steps: int | None = None
    """trading days to the last maturity that is fitted; by default 51, or as many as the smile has"""
    vega_weights: bool = False
    """weight the errors of implied volatilities by vega, instead of equally"""

    # The game
    state: str | None = None
    """local: (t, S), the default; non-path-dependent: the last volatility too; path-dependent: both at t1 too, the
    default of bermudan"""
    action_map: str = "direct"
    """what actions are: direct (ln σ), normal (mean and variance of ln σ), stochastic (μ, η, ρ of ln σ's diffusion)"""
    reward: str = "shared"
    """shared (the paper's) or difference (each path's first-order effect on the shared error)"""
    num_players: int = 5_000
    """n, trajectories of a run; in antithetic pairs"""
    num_runs: int = 10
    """B, runs side by side that explore; one more follows the mean policy"""
    num_basis: int = 60
    """n_p, basis players drawn at every step: only they sample exploration and are learnt from"""
    basis_players: bool = True
    """interpolate the others' exploration from the basis players'; otherwise every player has its own"""
    interpolation: str | None = None
    """linear (for the state local, and its default) or nearest (for the others)"""
    common_random_numbers: bool = True
    """all runs have the same Brownian increments and basis players, so that their mean reward can be the baseline"""
    antithetic: bool = True
    """runs explore in pairs, Z and −Z"""
    regression: str = "knots"
    """of the Bermudan's continuation value in training, on S_t1: knots (piecewise linear) or polynomial (degree 8)"""
    reference: str = "local-vol"
    """model whose error on the same paths is subtracted: local-vol (Dupire's), black-scholes, none"""

    # The algorithm
    num_iterations: int | None = None
    """rollouts, each followed by an update; by default 800, or 120 for bermudan, whose steps cost more"""
    learning_rate: float = 1e-2
    """learning rate of Adam"""
    anneal_lr: bool = True
    """let the learning rate fall linearly to zero"""
    update_epochs: int = 4
    """passes over a rollout"""
    num_minibatches: int = 4
    """minibatches an epoch"""
    clip_coef: float = 0.3
    """PPO's clipping of the probability ratio"""
    target_kl: float = 0.01
    """the KL penalty's weight is adapted to this divergence an update"""
    vf_coef: float = 0.5
    """weight of the value loss, where the critic is the baseline (without common random numbers)"""
    exploration_std: float | None = None
    """standard deviation of the exploration, in units of the action (ln σ); by default 0.1, or 0.3 for bermudan"""
    learn_std: bool = False
    """learn the exploration's standard deviation"""
    hidden_layers: int = 2
    """hidden layers of the networks"""
    hidden_size: int = 64
    """units of a hidden layer"""

    # The benchmark
    num_evaluations: int = 20
    """how often in the run the policy is evaluated, logged and saved"""
    eval_paths: int = 1_200_000
    """fresh paths of the final benchmark"""
    beside: str | None = None
    """run folder of the other Bermudan state, drawn into the figure of the training"""


PRESETS = {
    "default": {},
    "paper": {
        "action_map": "normal", "num_players": 120_000, "num_runs": 10, "num_basis": 100,
        "common_random_numbers": False, "antithetic": False, "reference": "black-scholes", "regression": "polynomial",
        "learning_rate": 1e-4, "anneal_lr": False, "update_epochs": 30, "num_minibatches": 10, "clip_coef": 0.3,
        "target_kl": 0.01, "exploration_std": 0.3, "learn_std": True, "hidden_layers": 3, "hidden_size": 50,
    },
}  # fmt: skip


def resolve(args: Args) -> None:
    """Fills in what depends on the task or on another flag."""
    bermudan = args.task == "bermudan"
    state = args.state or ("path-dependent" if bermudan else "local")
    for field, value in (
        ("state", state), ("interpolation", "linear" if state == "local" else "nearest"),
        ("num_iterations", 120 if bermudan else 800), ("exploration_std", 0.3 if bermudan else 0.1),
    ):  # fmt: skip
        if getattr(args, field) is None:
            setattr(args, field, value)


def validate(args: Args) -> None:
    """Raises UsageError for the first argument that cannot work."""
    for field, names in (
        ("preset", PRESETS), ("task", calibration.TASKS), ("state", calibration.STATES),
        ("action_map", calibration.ACTION_MAPS), ("reward", ("shared", "difference")),
        ("interpolation", ("linear", "nearest")), ("reference", calibration.REFERENCES),
        ("regression", calibration.REGRESSIONS),
    ):  # fmt: skip
        value, flag = getattr(args, field), field.replace("_", "-")
        runs.check(value in names, f"--{flag} is {value!r} (one of {', '.join(names)})")
    runs.check_range(args, 0, math.inf, "smile_spot", open_low=True)
    if args.num_steps is not None:
        runs.check_range(args, calibration.FIRST_JUDGED + 1, 504, "num_steps")
    runs.check_range(args, 1000, 2**24, "eval_paths")
    runs.check_range(args, 1, 1024, "torch_threads")
    runs.check_name(args.exp_name)
    runs.check_range(args, 0, 999_999, "seed")  # the seeds above are of exploration, validation and benchmark
    own = args.smile not in smiles.NAMED
    runs.check(own or args.smile_spot == 1.0, "--smile-spot is for a --smile from a CSV")
    runs.check(own or not args.allow_arbitrage, "--allow-arbitrage is for a --smile from a CSV")
    if args.beside is not None:
        runs.check(args.task == "bermudan", "--beside is for --task bermudan")
        curve = runs.read_metrics(Path(args.beside) / "metrics.csv")
        drawn = curve and "charts/bermudan_price" in curve[0]
        runs.check(drawn, f"--beside is {args.beside} (the folder of a run with --task bermudan)")
    if args.evaluate is not None:
        runs.check(args.beside is None, "--beside is for the figure of a training, not for --evaluate")
        return  # the rest is about training
    runs.check(args.task == "local-vol" or not args.vega_weights, "--vega-weights is for --task local-vol")
    linear = args.interpolation == "linear"
    runs.check(not linear or args.state == "local", "--interpolation linear needs --state local (or nearest)")
    walks = args.action_map != "stochastic" or args.state != "local"
    runs.check(walks, "--action-map stochastic needs a --state with the last volatility (non-path-dependent)")
    runs.check_range(args, 100, 2**22, "num_players")
    runs.check_range(args, 2, args.num_players, "num_basis")
    runs.check_range(args, 1, 1024, "num_runs")
    common = args.common_random_numbers
    runs.check(
        not common or args.num_runs > 1, f"--num-runs is {args.num_runs} (at least 2 with common random numbers)"
    )
    runs.check(not args.antithetic or args.num_runs % 2 == 0, f"--num-runs is {args.num_runs} (even with --antithetic)")
    runs.check_range(args, 1, 10**7, "num_iterations")
    runs.check_range(args, 1, 2**16, "update_epochs", "num_evaluations", "hidden_size")
    runs.check_range(args, 1, 10, "hidden_layers")
    batch_size = args.num_runs * args.num_basis * (calibration.FIRST_JUDGED + 1)
    runs.check_range(args, 1, batch_size, "num_minibatches")
    runs.check_range(args, 0, math.inf, "learning_rate", "target_kl", "exploration_std", open_low=True)
    runs.check_range(args, 0, 1, "clip_coef", open_low=True)
    runs.check_range(args, 0, math.inf, "vf_coef")


def make_surface(args: Args) -> tuple[smiles.Surface, list[smiles.Fit]]:
    """The smile that the flags name, or fitted to a CSV, and how well; data errors become usage errors."""
    if args.smile in smiles.NAMED:
        return smiles.NAMED[args.smile], []
    names = ", ".join(smiles.NAMED)
    runs.check(Path(args.smile).is_file(), f"--smile is {args.smile!r} (one of {names}, or a CSV file)")
    try:
        return smiles.load(args.smile, args.smile_spot, args.allow_arbitrage)
    except ValueError as error:
        raise runs.UsageError(str(error)) from None


def make_game(args: Args, surface: smiles.Surface, device: torch.device) -> CalibrationGame:
    """The game to train in: the runs that explore, and one that follows the mean policy."""
    last = calibration.last_day(surface)
    shortest = calibration.FIRST_JUDGED + 1
    runs.check(last >= shortest, f"--smile is {args.smile}, which ends after {last} days (at least {shortest})")
    num_steps = args.num_steps or min(51, last)
    if args.evaluate is None:  # paths, volatilities, shocks, and what is made of them on the way
        num_bytes = 4 * 4 * num_steps * args.num_players * (args.num_runs + 1)
        runs.check_memory(num_bytes, device, f"--num-players {args.num_players} --num-runs {args.num_runs}")
    try:
        return CalibrationGame(
            surface, args.num_players, args.num_runs + 1, num_steps, args.task, args.state,
            args.action_map, args.common_random_numbers, args.reference, args.vega_weights, args.regression, device,
        )  # fmt: skip
    except ValueError as error:
        raise runs.UsageError(str(error).replace("num_steps", "--num-steps")) from None


# ALGO LOGIC: the agent


def layer_init(layer: nn.Linear, std: float = math.sqrt(2)) -> nn.Linear:
    nn.init.orthogonal_(layer.weight, std)
    nn.init.zeros_(layer.bias)
    return layer


class Agent(nn.Module):
    """Gaussian policy and value function of a player, tanh networks of its state; shared by all players."""

    def __init__(self, game: CalibrationGame, args: Args):
        super().__init__()

        def network(outputs: int, std: float) -> nn.Sequential:
            layers, size = [], game.observation_size
            for _ in range(args.hidden_layers):
                layers += [layer_init(nn.Linear(size, args.hidden_size)), nn.Tanh()]
                size = args.hidden_size
            return nn.Sequential(*layers, layer_init(nn.Linear(size, outputs), std))

        self.actor_mean = network(game.action_size, 0.01)
        self.critic = network(1, 1.0)
        logstd = torch.full((game.action_size,), math.log(args.exploration_std))
        self.actor_logstd = nn.Parameter(logstd, requires_grad=args.learn_std)
        self.register_buffer("kl_coef", torch.tensor(1.0))  # weight of the KL penalty, adapted

    def log_prob(self, mean: Tensor, actions: Tensor) -> Tensor:
        """Up to a constant: mean and actions (m, size) → (m,)."""
        return (-0.5 * ((actions - mean) * (-self.actor_logstd).exp()) ** 2 - self.actor_logstd).sum(-1)

    def stepper(self, game: CalibrationGame) -> calibration.Step:
        """The mean policy as a step of this game or of one like it: what is benchmarked."""
        return marlvol.policy_step(
            self.actor_mean, marlvol.policy_tables(game, self.actor_mean) if game.is_local else None
        )


# ALGO LOGIC: exploration by basis players


def interpolate_linear(basis: Tensor, noise: Tensor, points: Tensor) -> Tensor:
    """Noise (R, n_p, size) of basis players at positions (R, n_p), piecewise linear at points (R, m) → (R, m, size)."""
    position, order = basis.sort(-1)
    noise = noise.gather(1, order[..., None].expand_as(noise))
    right = torch.searchsorted(position, points.contiguous()).clamp(1, basis.shape[1] - 1)
    left_position, right_position = position.gather(1, right - 1), position.gather(1, right)
    weight = ((points - left_position) / (right_position - left_position).clamp(min=1e-9)).clamp(0, 1)[..., None]
    index = right[..., None].expand(-1, -1, noise.shape[-1])
    return torch.lerp(noise.gather(1, index - 1), noise.gather(1, index), weight)


def interpolate_nearest(basis: Tensor, noise: Tensor, points: Tensor) -> Tensor:
    """Noise (R, n_p, size) of the basis player whose state (R, n_p, d) is nearest to each point (R, m, d)."""
    nearest = torch.cdist(points, basis).argmin(-1)
    return noise.gather(1, nearest[..., None].expand(-1, -1, noise.shape[-1]))


def sample_noise(args: Args, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Normals (num_runs, …), in pairs Z and −Z of runs if antithetic."""
    device = generator.device
    if not args.antithetic:
        return torch.randn(args.num_runs, *shape, generator=generator, device=device)
    noise = torch.randn(args.num_runs // 2, *shape, generator=generator, device=device)
    return torch.cat((noise, -noise))


# ALGO LOGIC: PPO


class Batch(NamedTuple):
    """The basis players' experience, flattened over time, runs and players: (m, …)."""

    observations: Tensor
    actions: Tensor
    means: Tensor  # of the policy that acted
    logstds: Tensor  # and its exploration's
    logprobs: Tensor
    advantages: Tensor
    returns: Tensor


@torch.no_grad()
def rollout(game: CalibrationGame, agent: Agent, args: Args, generator: torch.Generator) -> Batch:
    """Plays all runs once, with the basis players' exploration, and estimates their advantages."""
    game.reset(generator)
    num_runs, n, size, std = args.num_runs, args.num_players, game.action_size, agent.actor_logstd.exp()
    first = calibration.EXERCISE_DAY if game.task == "bermudan" else 0  # before, nobody has a choice
    # Every step has basis players of its own, the same in all runs
    lots = torch.rand(game.num_steps, n, generator=generator, device=game.device)
    basis = lots.topk(args.num_basis, dim=1).indices
    tables = marlvol.policy_tables(game, agent.actor_mean) if game.is_local else None
    steps = []
    for t in range(game.num_steps):
        players = basis[t]
        if t < first:
            game.step(torch.zeros(num_runs + 1, n, size, device=game.device))
            continue
        seen = game.features(t, calibration.State(*(x[:num_runs, players] for x in game.state)))
        # At t = 0 all players are at the same state, so they have the same noise
        alike = t == 0 and args.basis_players
        noise = sample_noise(args, (1 if alike else args.num_basis, size), generator).expand(-1, args.num_basis, -1)
        actions = marlvol.mean_actions(game, agent.actor_mean, tables)
        if not args.basis_players:
            spread = sample_noise(args, (n, size), generator)
        elif args.interpolation == "linear":
            log_spot = game.state.log_spot[:num_runs]
            spread = interpolate_linear(log_spot[:, players], noise, log_spot)
        else:
            spread = interpolate_nearest(seen, noise, game.observe()[:num_runs])
        actions[:num_runs] += std * spread
        means = agent.actor_mean(seen)
        chosen = means + std * noise
        actions[:num_runs, players] = chosen  # exactly
        game.step(actions)
        steps.append((seen, chosen, means))
    observations, actions, means = (torch.stack(column) for column in zip(*steps, strict=True))
    returns = rewards_to_go(game, args, basis)[first:].expand(*observations.shape[:3])
    # The scale of rewards-to-go differs by orders of magnitude between the first day and the last
    returns = (returns - returns.mean((1, 2), keepdim=True)) / (returns.std((1, 2), keepdim=True) + 1e-12)
    if args.common_random_numbers:  # the same player on the same increments: what it earned in the other runs
        # is the baseline; or in the mirror image alone, as what both earn (of second order) is of no direction
        rivals = returns.unflatten(1, (2, -1)) if args.antithetic else returns[:, None]
        mean = rivals.mean(1 if args.antithetic else 2, keepdim=True)
        advantages = (rivals - mean).flatten(1, 2)
    else:
        advantages = returns - agent.critic(observations)[..., 0]
    advantages = advantages / (advantages.std((1, 2), keepdim=True) + 1e-12)
    logstds = agent.actor_logstd.clone().expand_as(actions)
    batch = (observations, actions, means, logstds, agent.log_prob(means, actions), advantages, returns)
    return Batch(*(x.flatten(0, 2) for x in batch))


def rewards_to_go(game: CalibrationGame, args: Args, basis: Tensor) -> Tensor:
    """Sum of the rewards from each step on, (T, num_runs, num_basis), or (…, 1) where all players share it.

    Args:
        basis: (T, num_basis) players.
    """
    num_runs, shared = args.num_runs, args.reward == "shared"
    errors = game.errors() if game.task == "local-vol" else None  # (R, days, strikes), the mean policy's run last
    if game.task == "local-vol" and shared:
        explored = errors[:num_runs]
        if args.common_random_numbers:
            # Exploration raises everybody's variance on average, which is no error of the policy: only what a run's
            # own exploration adds to the error of the run without
            explored = errors[-1] + explored - explored.mean(0)
        rewards = game.shared_rewards(explored).T[..., None]
    elif game.task == "local-vol":
        # Where the policy's prices are off is what the run without exploration says
        paths = torch.stack([x[:num_runs, basis.flatten()] for x in game.log_spots])
        rewards = game.difference_rewards(errors[-1], paths)  # (T, num_runs, T · num_basis)
    elif shared:
        rewards = -game.bermudan_cashflows().mean(-1, keepdim=True).diff(dim=0)[:, :num_runs]
    else:
        return -game.bermudan_paid()[:num_runs, basis].transpose(0, 1)
    to_go = rewards.flip(0).cumsum(0).flip(0)
    if shared:
        return to_go
    # Of each player from the step on at which it was a basis player
    return to_go.unflatten(-1, basis.shape).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def ppo_loss(agent: Agent, batch: Batch, args: Args) -> tuple[Tensor, Tensor]:
    """Loss of a minibatch, and its parts: policy loss, value loss, KL divergence, clipped fraction."""
    means = agent.actor_mean(batch.observations)
    ratio = (agent.log_prob(means, batch.actions) - batch.logprobs).exp()
    clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    policy_loss = -torch.minimum(ratio * batch.advantages, clipped * batch.advantages).mean()
    new = torch.distributions.Normal(means, agent.actor_logstd.exp())
    old = torch.distributions.Normal(batch.means, batch.logstds.exp())
    kl = torch.distributions.kl_divergence(old, new).sum(-1).mean()
    value_loss = torch.zeros_like(kl)
    if not args.common_random_numbers:
        value_loss = 0.5 * (agent.critic(batch.observations)[:, 0] - batch.returns).square().mean()
    loss = policy_loss + agent.kl_coef * kl + args.vf_coef * value_loss
    clip_fraction = ((ratio - 1).abs() > args.clip_coef).float().mean()
    return loss, torch.stack((policy_loss, value_loss, kl, clip_fraction)).detach()


LOSS_NAMES = ("losses/policy_loss", "losses/value_loss", "losses/approx_kl", "losses/clipfrac")


def update(agent: Agent, optimizer, batch: Batch, args: Args, generator: torch.Generator) -> Tensor:
    """PPO's epochs over one rollout, then the KL penalty's weight. Returns the last epoch's loss parts (4,)."""
    size = len(batch.logprobs)
    for _ in range(args.update_epochs):
        parts = []
        order = torch.rand(size, generator=generator, device=batch.logprobs.device).argsort()
        for index in order.chunk(args.num_minibatches):
            loss, loss_parts = ppo_loss(agent, Batch(*(x[index] for x in batch)), args)
            optimizer.zero_grad()
            loss.backward()
            runs.average_gradients(agent)  # over the processes of torchrun
            optimizer.step()
            parts.append(loss_parts)
    parts = runs.average(torch.stack(parts).mean(0))
    kl = parts[2]  # after RLlib's PPO: half as much again when it is twice the target, and back
    factor = torch.where(kl > 2 * args.target_kl, 1.5, torch.where(kl < 0.5 * args.target_kl, 1 / 1.5, 1.0))
    agent.kl_coef.mul_(factor).clamp_(1e-4, 1e4)
    runs.check_equal_parameters(agent)
    return parts


METRICS = {
    "local-vol": ("charts/rmse", "charts/max_error"),
    "bermudan": ("charts/bermudan_price", "charts/european_floor", "charts/switch_value", "charts/rmse"),
}
COMMON_METRICS = ("global_step", "charts/seconds_per_iteration", "charts/learning_rate", *LOSS_NAMES, "losses/kl_coef")


def train(args: Args, game: CalibrationGame, run_dir: Path, device: torch.device, checkpoint: dict | None, tracker):
    """Trains from scratch or from `checkpoint`; logs, evaluates and saves `args.num_evaluations` times.

    Returns the agent and the player steps it was trained for."""
    torch.manual_seed(args.seed)
    agent = Agent(game, args).to(device)
    optimizer = torch.optim.Adam([p for p in agent.parameters() if p.requires_grad], lr=args.learning_rate, eps=1e-5)
    # Each process of torchrun has paths and exploration of its own
    generator = torch.Generator(device).manual_seed(runs.rank_seed(args.seed + EXPLORATION_SEED))
    evaluations = {math.ceil(args.num_iterations * (i + 1) / args.num_evaluations) for i in range(args.num_evaluations)}
    batch_size = game.num_steps * args.num_runs * args.num_players * runs.world_size()
    first, rows = 1, None
    if checkpoint is not None:
        try:
            agent.load_state_dict(checkpoint["agent"])
            optimizer.load_state_dict(checkpoint["optimizer"])
            generator.set_state(checkpoint["generator"][runs.rank()])
            first, rows = int(checkpoint["iteration"]) + 1, int(checkpoint["rows"])
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
            raise runs.UsageError(f"{run_dir}: does not fit this script, or was made on another device") from None
    if args.save_model and not game.is_local:
        marlvol.layers_of(agent.actor_mean, game.observation_size)  # or it could not be saved in the end
    fields = (*COMMON_METRICS, *METRICS[args.task])
    metrics = runs.MetricsFile(run_dir / "metrics.csv", fields, resume_from=rows)

    def save(iteration: int) -> None:
        if args.save_model:
            content = {"phase": PHASE, "args": asdict(args), "iteration": iteration, "rows": metrics.rows}
            content |= {"agent": agent.state_dict(), "optimizer": optimizer.state_dict()}
            content |= {"generator": runs.gather(generator.get_state()), "world_size": runs.world_size()}
            content |= {"steps": iteration * batch_size, "surface": smiles.to_dict(game.surface)}
            content |= {"tracker": tracker.id if tracker else None}
            if iteration == args.num_iterations:  # for the other phases' --marlvol-checkpoint
                content |= {"market": marlvol.export_market(game, agent.actor_mean)}
            runs.save_checkpoint(run_dir / "checkpoint.pt", content)

    validation = calibration.Validation(game)
    if checkpoint is None:  # the untrained policy, for the learning curve
        metrics.write({"global_step": 0, **validation(agent.stepper(game))})
        save(0)
    progress = runs.progress_bar(args.num_iterations * batch_size, (first - 1) * batch_size)
    progress.set_description("calibration error —")
    clock, clock_iterations = time.perf_counter(), 0
    for iteration in range(first, args.num_iterations + 1):
        if args.anneal_lr:
            optimizer.param_groups[0]["lr"] = args.learning_rate * (1 - (iteration - 1) / args.num_iterations)
        batch = rollout(game, agent, args, generator)
        losses = update(agent, optimizer, batch, args, generator)
        clock_iterations += 1
        progress.update(batch_size)
        if iteration not in evaluations:
            continue
        row = {"global_step": iteration * batch_size}
        row |= dict(zip(LOSS_NAMES, losses.tolist(), strict=True))  # waits for the device, so the speed is honest
        row["charts/seconds_per_iteration"] = (time.perf_counter() - clock) / clock_iterations
        row["charts/learning_rate"] = optimizer.param_groups[0]["lr"]
        row["losses/kl_coef"] = agent.kl_coef.item()
        parameters = {f"parameter {name}": p.sum().item() for name, p in agent.named_parameters()}
        runs.check_finite({**row, **parameters}, row["global_step"], run_dir)
        row |= validation(agent.stepper(game))
        metrics.write(row)
        if tracker:
            tracker.log(row, step=row["global_step"])
        save(iteration)
        progress.set_description(validation.describe(row))
        clock, clock_iterations = time.perf_counter(), 0
    progress.close()
    return agent, args.num_iterations * batch_size


# BENCHMARK


def run_benchmark(args: Args, game: CalibrationGame, agent: Agent, steps: int, run_dir: Path):
    """The mean policy on fresh paths beside local and constant volatility on the same; writes report and figures."""
    paths = args.eval_paths // calibration.NUM_CHUNKS * calibration.NUM_CHUNKS
    settings = {"smile": args.smile, "task": args.task, "state": args.state, "action map": args.action_map}
    settings |= {"reward": args.reward, "days": game.num_steps, "run seed": args.seed, "training steps": steps}
    settings |= {"paths": paths, "benchmark seed": benchmark.BENCHMARK_SEED}
    title = f"Phase 0 ({args.smile}, {args.task}, {args.state})"
    step = agent.stepper(game)
    models = {calibration.AGENT: step, calibration.DUPIRE: CalibrationGame.step_dupire}
    if args.task == "local-vol":
        models[calibration.CONSTANT] = CalibrationGame.step_constant
    played = {name: calibration.benchmark_paths(game, model, paths) for name, model in models.items()}
    if args.task == "bermudan":
        settings |= {"k1": game.strike_t1, "k2": game.strike_t2}
        learnt = calibration.learnt_dependence(game, step)
        result = calibration.judge_bermudan(title, settings, game, played, learnt)
        settings["mean localised volatility bends at S_t1 ="] = learnt.kink
        figures.bermudan_report(run_dir, title, result, learnt, args.beside)
    else:
        fits = {name: calibration.calibrate(game, of) for name, of in played.items()}
        result = calibration.judge_smile(title, settings, fits)
        market = marlvol.Marlvol(marlvol.export_market(game, agent.actor_mean))
        figures.calibration_report(run_dir, title, game, result, fits, market)
    result.write(run_dir)
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
    for name, value in result.rows[calibration.AGENT].items():
        tracker.summary[f"benchmark/{name}"] = value
    if (run_dir / "checkpoint.pt").is_file():
        artifact = wandb.Artifact(f"{PHASE}-{tracker.id}", type="model")
        artifact.add_file(str(run_dir / "checkpoint.pt"))
        tracker.log_artifact(artifact)
    here = Path(__file__).parent
    code = {here / Path(__file__).name, *(here / "envs").glob("*.py")}
    tracker.log_code(str(here), include_fn=lambda path: Path(path) in code)
    tracker.finish()


def load_agent(args: Args, checkpoint: dict, game: CalibrationGame) -> Agent:
    """The agent of a checkpoint, to be benchmarked on other paths or against another smile, but in its own game."""
    trained = runs.saved_args(Args, checkpoint["args"], args.evaluate)
    for name in ("task", "state", "action_map"):
        new, old = getattr(args, name), getattr(trained, name)
        runs.check(new == old, f"--{name.replace('_', '-')} is {new}, but the agent was trained with {old}")
    runs.check(type(checkpoint.get("steps")) is int, f"{args.evaluate}: does not fit this script, it has no steps")
    agent = Agent(game, args).to(game.device)
    try:
        agent.load_state_dict(checkpoint["agent"])
    except (RuntimeError, AttributeError, TypeError):
        raise runs.UsageError(f"{args.evaluate}: does not fit this script, its networks have other shapes") from None
    runs.check(all(x.isfinite().all() for x in agent.state_dict().values()), f"{args.evaluate}: NaN in its networks")
    return agent


def main(argv) -> bool:
    """Runs the command; True if the benchmark passed."""
    resume_needs = ("rows", "optimizer", "generator", "world_size", "surface", "tracker")
    args, checkpoint = runs.parse_command(Args, argv, PHASE, resume_needs)
    if args.preset in PRESETS and args.evaluate is None and args.resume is None:
        args = runs.parse_args(Args, argv, default=Args(**PRESETS[args.preset]))
    resolve(args)
    validate(args)
    torch.set_num_threads(args.torch_threads)
    surface, fits = make_surface(args)
    if args.resume is not None and checkpoint is not None:
        same = checkpoint["surface"] == smiles.to_dict(surface)
        runs.check(same, f"{args.resume}: was calibrated to another smile than {args.smile} is now")
    device = runs.join_ranks(args.cuda)
    game = make_game(args, surface, device)
    name = f"{args.task}__{args.exp_name}__{'evaluate__' if args.evaluate else ''}{args.seed}"
    run_dir = Path(args.resume or f"runs/{name}__{time.strftime('%Y%m%d-%H%M%S')}")
    if args.evaluate is not None:
        agent = load_agent(args, checkpoint, game)
        steps = checkpoint["steps"]
    tracker = start_tracker(args, run_dir, checkpoint["tracker"] if args.resume and checkpoint else None)
    if args.resume is None:
        run_dir = runs.new_folder(run_dir)
        runs.write_json(run_dir / "args.json", asdict(args))
    for fit in fits:
        error = f"RMSE {fit.rmse:.2f}, at most {fit.worst:.2f} vol points"
        print(f"SVI at {smiles.TRADING_DAYS * fit.maturity:.1f} days: {fit.num_quotes} quotes, {error}")
    players = f"{args.num_runs} × {args.num_players:,} players" if args.evaluate is None else "evaluation"
    print(f"{run_dir}: {args.smile}, {args.task} on {device}, {players}; errors in vol points, trading days")
    if args.evaluate is None:
        with runs.naming_last_good(run_dir):
            agent, steps = train(args, game, run_dir, device, checkpoint, tracker)
        print(f"memory at its peak: {runs.peak_memory(device):.2f} GiB")
    if runs.rank() > 0:
        return True  # the first process benchmarks
    result = run_benchmark(args, game, agent, steps, run_dir)
    print(f"\n{result.title}\n\n{result.table()}\n\n{result.verdict()}\nreport and figures: {run_dir}")
    if tracker:
        finish_tracker(tracker, result, run_dir)
    return result.passed


if __name__ == "__main__":
    runs.run(main, sys.argv[1:])
