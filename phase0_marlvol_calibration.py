"""Phase 0: calibrate the market's volatility to a real option smile, by multi-agent reinforcement learning (MARLVol).

Every Monte Carlo trajectory is a player whose action is its own volatility for the day. All players share one policy,
and one reward: the error of the option prices that they produce together (Vadori; equation numbers are the paper's).
PPO learns from the experience of a few basis players; the others' exploration is interpolated from theirs. The result
is a market for the other phases. All the finance is in envs/. Copy this file, change thirty lines, run it.
"""

import copy
import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn

from envs.benchmark.calibration import BASIS_POINT, Validation, exotic_benchmark, slv_benchmark, smile_benchmark
from envs.calibration import interpolation
from envs.calibration.game import (
    ACTION_MAPS,
    FIRST_JUDGED,
    REFERENCES,
    STATES,
    TASKS,
    CalibrationGame,
    State,
    Step,
    last_day,
)
from envs.calibration.marlvol import Marlvol, export_market, layers_of, mean_actions, policy_step, policy_tables
from envs.calibration.payoffs import PAYOFFS
from envs.calibration.regression import REGRESSIONS
from envs.figures.calibration import calibration_report, exotic_report, slv_report
from envs.market import smiles
from envs.market.units import TRADING_DAYS
from envs.models import MOST_STEPS_PER_DAY, SmileArgs, make_surface
from envs.run.args import CapturedRunArgs, check_choice, check_range
from envs.run.errors import UsageError, check
from envs.run.files import check_memory, peak_memory, read_metrics
from envs.run.ranks import average, average_gradients, check_equal_parameters, rank, world_size
from envs.run.run import Run, run_main
from envs.run.seeds import EXPLORATION_SEED

Tensor = torch.Tensor
PHASE = "phase0"  # a checkpoint is only loaded into the phase that wrote it
DIVERGED = 100.0  # KL divergence of one update, 14 standard deviations of the exploration; --target-kl is 0.01
QUICK = {"num_iterations": 40, "num_evaluations": 8, "eval_paths": 120_000}  # the flags that --quick sets
PRESETS = {
    "default": {},
    "paper": {
        "action_map": "normal", "num_players": 120_000, "num_runs": 10, "num_basis": 100,
        "common_random_numbers": False, "antithetic": False, "reference": "black-scholes", "regression": "polynomial",
        "learning_rate": 1e-4, "anneal_lr": False, "average": 1.0, "update_epochs": 30, "num_minibatches": 10,
        "clip_coef": 0.3, "target_kl": 0.01, "exploration_std": 0.3, "learn_std": True, "state_std": True,
        "hidden_layers": 3, "hidden_size": 50,
    },
}  # fmt: skip


@dataclass
class Args(SmileArgs, CapturedRunArgs):
    """Phase 0: calibrate a diffusion to an option smile by multi-agent RL (MARLVol), then benchmark the fit.

    Thousands of trajectories are players who share one policy for their volatilities and one reward, the error of the
    implied volatilities that their payoffs add up to. At the end the mean policy is priced on fresh paths beside
    constant volatility and beside Dupire's local volatility on the same daily grid and the same paths. The other tasks
    keep the vanillas on the market, and move the price of an exotic (down, up, or to a target) or fit forward-start
    options. Exit code 0: benchmark passed; 1: failed; 2: bad input; 3: diverged; 130: Ctrl-C. Everything is written to
    runs/<run name>/.

    Commands to start from:

      python phase0_marlvol_calibration.py                        the S&P 500 of 1 August 2018
      python phase0_marlvol_calibration.py --smile quotes.csv     your own: maturity, strike, implied_volatility
      python phase0_marlvol_calibration.py --reward difference    each path's own effect in place of the paper's reward
      python phase0_marlvol_calibration.py --preset paper         all of the paper's settings
      python phase0_marlvol_calibration.py --resume runs/NAME     go on where a run stopped
      torchrun --nproc-per-node 2 phase0_marlvol_calibration.py   data-parallel; --num-runs is each process's

    An exotic, the paper's Bermudan by default: as cheap or as dear as the vanillas let it be, or at a price in basis
    points; without memory of the first date, and with it, both in one figure; another payoff:

      python phase0_marlvol_calibration.py --task exotic --objective max
      python phase0_marlvol_calibration.py --task exotic --objective target --target-price 120
      python phase0_marlvol_calibration.py --task exotic --state non-path-dependent --no-antithetic
      python phase0_marlvol_calibration.py --task exotic --beside runs/NAME
      python phase0_marlvol_calibration.py --task exotic --payoff forward-start-call --days 21 51 --strikes 1.0

    Stochastic local volatility: vanillas and forward-start options of a Heston model, whose parameters are known:

      python phase0_marlvol_calibration.py --task slv --smile heston

    Then trade in the market that came out:

      python phase1_delta_hedge_ppo.py --dynamics marlvol --marlvol-checkpoint runs/NAME
    """

    exp_name: str = Path(__file__).stem
    """name of the experiment, part of the run's name"""
    evaluate: str | None = None
    """CHECKPOINT or run folder: no training, only the benchmark"""
    save_model: bool = True
    """write checkpoint.pt, which --resume, --evaluate and the other phases' --marlvol-checkpoint need"""
    preset: str = "default"
    """default, or paper: the paper's settings where they differ from ours; other flags still change them"""

    # The game
    task: str = "local-vol"
    """local-vol: fit all strikes and maturities; exotic: move an exotic's price, with the vanillas on the market; slv:
    fit forward-start options, with the vanillas on the market"""
    payoff: str = "bermudan-call"
    """the exotic: bermudan-call, bermudan-put, forward-start-call, asian-call, up-and-out-call, variance-swap"""
    days: tuple[int, ...] | None = None
    """trading days of the exotic: t1, which a path-dependent state remembers, …, the last one; by default 21 and the
    end"""
    strikes: tuple[float, ...] | None = None
    """in units of the spot: of a Bermudan one for each day (by default its Europeans are worth the same), of the
    up-and-out call the strike and the barrier"""
    objective: str = "min"
    """min, max or target: what the exotic's price is to be"""
    target_price: float | None = None
    """price of the exotic for --objective target, in basis points of the spot"""
    act_before_t1: bool = False
    """players choose volatilities before the exotic's first day too; the exercise rule then knows the last one"""
    steps_per_day: int = 1
    """time steps of a trading day: 2 makes T = 102 half days of 51 days"""
    vega_weights: bool = False
    """weight the errors of implied volatilities by vega, instead of equally"""

    state: str | None = None
    """local: (t, S), the default of local-vol; non-path-dependent: the last volatility too, the default of slv;
    path-dependent: both at t1 too, the default of exotic"""
    action_map: str | None = None
    """what actions are: direct (ln σ), normal (mean and variance of ln σ), stochastic (μ, η, ρ of ln σ's diffusion); by
    default stochastic for slv, else direct"""
    reward: str = "shared"
    """shared (the paper's) or difference (each path's first-order effect on the shared error or price)"""
    num_players: int | None = None
    """n, trajectories of a run, in antithetic pairs; by default 5,000, or 2,500 for slv"""
    num_runs: int | None = None
    """B, runs side by side that explore; one more follows the mean policy; by default 10, or 20 for slv"""
    num_basis: int | None = None
    """n_p, basis players drawn at every step: only they sample exploration and are learnt from; by default 20, or 60
    for exotic, whose states have more dimensions"""
    basis_players: bool = True
    """interpolate the others' exploration from the basis players'; otherwise every player has its own"""
    interpolation: str | None = None
    """linear (between neighbours, or on Delaunay's simplices where a state has two or three dimensions; the default of
    the state local) or nearest"""
    neighbours: int = 1
    """k of --interpolation nearest: the mean of the k nearest basis players, weighted by 1/distance"""
    common_random_numbers: bool = True
    """all runs have the same Brownian increments and basis players"""
    baseline: str | None = None
    """of the rewards: runs, the mean of the same player's over the runs (the default with common random numbers), or
    critic, the value network (the default without)"""
    centre_errors: bool = True
    """with common random numbers: count a run's errors as those of the run without exploration, and what its own
    exploration adds beyond the average"""
    antithetic: bool = True
    """runs explore in pairs, Z and −Z"""
    regression: str = "knots"
    """of a Bermudan's continuation value in training: on knots (piecewise linear) or polynomial (degree 8)"""
    reference: str = "local-vol"
    """model whose error on the same paths is subtracted: local-vol (Dupire's), black-scholes, none"""

    # The algorithm
    num_iterations: int | None = None
    """rollouts, each followed by an update; by default 1000, or 200 for exotic and 250 for slv, whose steps cost
    more"""
    learning_rate: float = 1e-2
    """learning rate of Adam"""
    anneal_lr: bool = True
    """let the learning rate fall linearly to zero"""
    average: float = 0.01
    """how far the moving average of the actor's weights, which is the policy that is evaluated, goes at each update; 1
    for the weights themselves"""
    update_epochs: int = 4
    """passes over a rollout"""
    num_minibatches: int = 4
    """minibatches an epoch"""
    clip_coef: float = 0.3
    """PPO's clipping of the probability ratio"""
    target_kl: float | None = None
    """the KL penalty's weight is adapted to this divergence an update; by default 0.01, or 0.03 for slv"""
    vf_coef: float = 0.5
    """weight of the value loss, where the critic is the baseline"""
    exploration_std: float | None = None
    """standard deviation of the exploration, in units of the action (ln σ); by default 0.1, exotic 0.3, slv 0.5"""
    learn_std: bool = False
    """learn the exploration's standard deviation"""
    state_std: bool = False
    """learn it as a network of the state, the paper's π^σ(x)"""
    hidden_layers: int = 2
    """hidden layers of the networks"""
    hidden_size: int | None = None
    """units of a hidden layer; by default 64, or 32 for slv"""

    # The benchmark
    eval_paths: int = 1_200_000
    """fresh paths of the final benchmark"""
    beside: str | None = None
    """run folder of another exotic run, drawn into the figure of the training"""

    def fill(self) -> None:
        """Fills in the flags whose defaults depend on another flag."""
        super().fill()
        if self.task == "exotic":
            defaults = {"state": "path-dependent", "num_basis": 60, "num_iterations": 200, "exploration_std": 0.3}
        elif self.task == "slv":
            # Its errors have few directions and much noise: more and smaller runs, which explore further
            defaults = {"state": "non-path-dependent", "action_map": "stochastic", "num_players": 2500, "num_runs": 20}
            defaults |= {"num_iterations": 250, "exploration_std": 0.5, "target_kl": 0.03, "hidden_size": 32}
        else:
            defaults = {}
        state = self.state or defaults.get("state", "local")
        common = {
            "state": "local", "action_map": "direct", "num_players": 5000, "num_runs": 10, "num_basis": 20,
            "interpolation": "linear" if state == "local" else "nearest", "num_iterations": 1000, "target_kl": 0.01,
            "baseline": "runs" if self.common_random_numbers else "critic", "exploration_std": 0.1, "hidden_size": 64,
        }  # fmt: skip
        for name, value in {**common, **defaults}.items():
            if getattr(self, name) is None:
                setattr(self, name, value)

    def check(self) -> None:
        """Raises UsageError for the first argument that cannot work."""
        check_choice(self, "preset", PRESETS)
        check_choice(self, "task", TASKS)
        check_choice(self, "state", STATES)
        check_choice(self, "action_map", ACTION_MAPS)
        check_choice(self, "reward", ("shared", "difference"))
        check_choice(self, "interpolation", ("linear", "nearest"))
        check_choice(self, "reference", REFERENCES)
        check_choice(self, "baseline", ("runs", "critic"))
        check_choice(self, "regression", REGRESSIONS)
        check_choice(self, "payoff", PAYOFFS)
        check_choice(self, "objective", ("min", "max", "target"))
        super().check()
        if self.objective == "target":
            check(self.target_price is not None, "--objective target needs --target-price, basis points of the spot")
            check_range(self, 0, 1e4, "target_price", open_low=True)
        else:
            check(self.target_price is None, "--target-price is for --objective target")
        if self.task != "exotic":
            for name in ("payoff", "strikes", "objective", "act_before_t1"):
                unchanged = getattr(self, name) == getattr(Args, name)
                check(unchanged, f"--{name.replace('_', '-')} is for --task exotic")
        check_range(self, 1000, 2**24, "eval_paths")
        check_range(self, 1, MOST_STEPS_PER_DAY, "steps_per_day")
        if self.beside is not None:
            check(self.task == "exotic", "--beside is for --task exotic")
            curve = read_metrics(Path(self.beside) / "metrics.csv")
            drawn = curve and "charts/exotic_price" in curve[0]
            check(drawn, f"--beside is {self.beside} (the folder of a run with --task exotic)")
        if self.trains:
            self.check_training()
        else:
            check(self.beside is None, "--beside is for the figure of a training, not for --evaluate")

    def check_training(self) -> None:
        """Raises UsageError for the first flag of game or algorithm that cannot work."""
        check(self.task == "local-vol" or not self.vega_weights, "--vega-weights is for --task local-vol")
        # Without actions before t1 the last volatility at t1 is no dimension of its own
        remembered = 1 if self.task == "exotic" and not self.act_before_t1 else 2
        dimensions = {"local": 1, "non-path-dependent": 2, "path-dependent": 2 + remembered}
        few = self.interpolation == "nearest" or dimensions[self.state] <= 3
        check(few, "--interpolation linear is for states of three dimensions at most (or nearest)")
        check(self.interpolation == "nearest" or self.neighbours == 1, "--neighbours is for --interpolation nearest")
        known = self.task != "exotic" or self.reward == "shared" or self.action_map != "stochastic"
        check(known, "--reward difference of --task exotic is for --action-map direct or normal")
        if self.task == "slv":
            check(self.smile == "heston", "--task slv needs --smile heston, which has forward-start options")
            check(self.state != "local", "--task slv needs a --state with the last volatility (non-path-dependent)")
            check(self.reward == "shared", "--task slv is for --reward shared")
        walks = self.action_map != "stochastic" or self.state != "local"
        check(walks, "--action-map stochastic needs a --state with the last volatility (non-path-dependent)")
        check_range(self, 100, 2**22, "num_players")
        check_range(self, 2, self.num_players, "num_basis")
        check_range(self, 1, self.num_basis, "neighbours")
        check_range(self, 1, 1024, "num_runs")
        same = self.common_random_numbers or self.baseline == "critic"
        check(same, "--baseline runs needs common random numbers")
        several = self.num_runs > 1 or self.baseline == "critic"
        check(several, f"--num-runs is {self.num_runs} (at least 2 with --baseline runs)")
        even = self.num_runs % 2 == 0 or not self.antithetic
        check(even, f"--num-runs is {self.num_runs} (even with --antithetic)")
        check_range(self, 1, 10**7, "num_iterations")
        check_range(self, 1, 2**16, "update_epochs", "hidden_size")
        check_range(self, 1, 10, "hidden_layers")
        check_range(self, 1, self.num_runs * self.num_basis * (FIRST_JUDGED + 1), "num_minibatches")
        check_range(self, 0, math.inf, "learning_rate", "target_kl", "exploration_std", open_low=True)
        check_range(self, 0, 1, "clip_coef", "average", open_low=True)
        check_range(self, 0, math.inf, "vf_coef")


def make_game(args: Args, surface: smiles.Surface, device: torch.device) -> CalibrationGame:
    """The game to train in: the runs that explore, and one that follows the mean policy."""
    num_steps = (args.num_steps or min(51, last_day(surface))) * args.steps_per_day
    if args.evaluate is None:  # paths, volatilities, shocks, and what is made of them on the way
        num_bytes = 4 * 4 * num_steps * args.num_players * (args.num_runs + 1)
        check_memory(num_bytes, device, f"--num-players {args.num_players} --num-runs {args.num_runs}")
    try:
        return CalibrationGame(
            surface, args.num_players, args.num_runs + 1, num_steps, args.task, args.state, args.action_map,
            common=args.common_random_numbers, reference=args.reference, vega_weights=args.vega_weights,
            payoff=args.payoff, days=args.days, strikes=args.strikes, act_before_t1=args.act_before_t1,
            regression=args.regression, steps_per_day=args.steps_per_day, device=device,
        )  # fmt: skip
    except ValueError as error:
        name = str(error).split()[0]
        message = str(error).replace("num_steps", "--num-steps")
        raise UsageError(message if name == "num_steps" else f"--{message}") from None


# ALGO LOGIC: the agent


def layer_init(layer: nn.Linear, std: float = math.sqrt(2)) -> nn.Linear:
    nn.init.orthogonal_(layer.weight, std)
    nn.init.zeros_(layer.bias)
    return layer


class Agent(nn.Module):
    """Gaussian policy and value function of a player, tanh networks of its state; shared by all players.

    Advantages have unit variance however small the error is, and Adam's steps do not shrink with the gradient either.
    So near the end the actor wanders about the best weights. The policy is a moving average of its weights, which is
    nearer to them (Polyak & Juditsky 1992).
    """

    def __init__(self, game: CalibrationGame, args: Args):
        super().__init__()

        def network(outputs: int, std: float) -> nn.Sequential:
            layers = []
            size = game.observation_size
            for _ in range(args.hidden_layers):
                layers += [layer_init(nn.Linear(size, args.hidden_size)), nn.Tanh()]
                size = args.hidden_size
            return nn.Sequential(*layers, layer_init(nn.Linear(size, outputs), std))

        self.actor_mean = network(game.action_size, 0.01)
        self.average_actor = copy.deepcopy(self.actor_mean).requires_grad_(False)
        self.critic = network(1, 1.0)
        logstd = torch.full((game.action_size,), math.log(args.exploration_std))
        self.actor_logstd = nn.Parameter(logstd, requires_grad=args.learn_std)
        self.actor_logstd_change = network(game.action_size, 0.01) if args.state_std else None
        self.register_buffer("kl_coef", torch.tensor(1.0))  # weight of the KL penalty, adapted

    def log_std(self, observations: Tensor) -> Tensor:
        """ln π^σ of the exploration, (…, size), or (size,) where it does not depend on the state."""
        if self.actor_logstd_change is None:
            return self.actor_logstd
        return self.actor_logstd + self.actor_logstd_change(observations).clamp(-2, 2)

    def stepper(self, game: CalibrationGame) -> Step:
        """The averaged mean policy as a step of this game or of one like it: what is benchmarked."""
        return policy_step(self.average_actor, policy_tables(game, self.average_actor) if game.is_local else None)


def log_prob(mean: Tensor, logstd: Tensor, actions: Tensor) -> Tensor:
    """Of a Gaussian, up to a constant: mean and actions (m, size) → (m,)."""
    return (-0.5 * ((actions - mean) * (-logstd).exp()) ** 2 - logstd).sum(-1)


# ALGO LOGIC: exploration by basis players


def spread_noise(game: CalibrationGame, args: Args, players: Tensor, noise: Tensor) -> Tensor:
    """Interpolates the noise (num_runs, num_basis, size) of the basis `players` to all (num_runs, n, size), (15)."""
    points = (game.state.log_spot[..., None] if game.is_local else game.observe()[..., 1:])[: args.num_runs]
    if args.interpolation == "linear":
        return interpolation.linear(points[:, players], noise, points)
    return interpolation.nearest(points[:, players], noise, points, args.neighbours)


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
    num_runs, n, size = args.num_runs, args.num_players, game.action_size
    first = game.first_move  # before, nobody has a choice
    # Every step has basis players of its own, the same in all runs
    lots = torch.rand(game.num_steps, n, generator=generator, device=game.device)
    basis = lots.topk(args.num_basis, dim=1).indices
    tables = policy_tables(game, agent.actor_mean) if game.is_local else None
    steps = []
    for t in range(game.num_steps):
        players = basis[t]
        if t < first:
            game.step(torch.zeros(num_runs + 1, n, size, device=game.device))
            continue
        seen = game.features(t, State(*(x[:num_runs, players] for x in game.state)))
        # At t = 0 all players are at the same state, so they have the same noise
        alike = t == 0 and args.basis_players
        noise = sample_noise(args, (1 if alike else args.num_basis, size), generator).expand(-1, args.num_basis, -1)
        actions = mean_actions(game, agent.actor_mean, tables)
        if not args.basis_players:
            spread = sample_noise(args, (n, size), generator)
        else:
            spread = spread_noise(game, args, players, noise)
        everyone = game.observe()[:num_runs] if args.state_std else seen
        actions[:num_runs] += agent.log_std(everyone).exp() * spread
        means = agent.actor_mean(seen)
        logstds = agent.log_std(seen)
        chosen = means + logstds.exp() * noise
        actions[:num_runs, players] = chosen  # exactly
        game.step(actions)
        steps.append((seen, chosen, means, logstds.expand_as(chosen)))
    observations, actions, means, logstds = (torch.stack(column) for column in zip(*steps, strict=True))
    returns = rewards_to_go(game, args, basis)[first:].expand(*observations.shape[:3])
    # The scale of rewards-to-go differs by orders of magnitude between the first day and the last
    returns = (returns - returns.mean((1, 2), keepdim=True)) / (returns.std((1, 2), keepdim=True) + 1e-12)
    if args.baseline == "runs":
        # The baseline is what the same player earned on the same increments in all runs; or in a run and its mirror
        # image alone, because what both of them earn is of second order in the exploration and shows no direction
        alike = returns.unflatten(1, (2, -1)) if args.antithetic else returns[:, None]
        baseline = alike.mean(1 if args.antithetic else 2, keepdim=True)
        advantages = (alike - baseline).flatten(1, 2)
    else:
        advantages = returns - agent.critic(observations)[..., 0]
    advantages = advantages / (advantages.std((1, 2), keepdim=True) + 1e-12)
    batch = (observations, actions, means, logstds, log_prob(means, logstds, actions), advantages, returns)
    return Batch(*(x.flatten(0, 2) for x in batch))


def price_slope(game: CalibrationGame, args: Args, paid: Tensor) -> float | Tensor:
    """Derivative of what is maximised with respect to the exotic's price, units of S₀.

    What is maximised is minus the price, the price, or −(price − target)², in vol points of `exotic_unit`. The price is
    that of the run without exploration, whose cashflows are the last of `paid` (R, n).
    """
    if args.objective == "target":
        price = paid[-1].mean() - game.exotic_sampling_error()
        return -2.0 * (price - args.target_price * BASIS_POINT) / game.exotic_unit**2
    return (1.0 if args.objective == "max" else -1.0) / game.exotic_unit


def rewards_to_go(game: CalibrationGame, args: Args, basis: Tensor) -> Tensor:
    """Sum of the rewards from each step on, (T, num_runs, num_basis), or (…, 1) where all players share it.

    Args:
        basis: (T, num_basis) players.
    """
    num_runs, shared = args.num_runs, args.reward == "shared"
    # (R, rows, strikes), the mean policy's run last
    errors = {"local-vol": game.errors, "slv": game.forward_errors, "exotic": lambda: None}[game.task]()
    if errors is not None and shared:
        explored = errors[:num_runs]
        if args.common_random_numbers and args.centre_errors:
            # Exploration raises everybody's variance on average, which is no error of the policy. So a run's error is
            # that of the run without exploration, and what its own exploration adds beyond the average. The square of
            # the latter is no error of the policy either: (e + d)² − d²
            added = explored - explored.mean(0)
            rewards = game.shared_rewards(errors[-1] + added) - game.shared_rewards(added)
        else:
            rewards = game.shared_rewards(explored)
        rewards = rewards.T[..., None]
    elif errors is not None:
        # The run without exploration says where the policy's prices are off
        paths = torch.stack([x[:num_runs, basis.flatten()] for x in game.log_spots])
        rewards = game.difference_rewards(errors[-1], paths)  # (T, num_runs, T · num_basis)
    else:
        paid = game.exotic_paid()
        slope = price_slope(game, args, paid)
        if not shared:
            # What a path is paid, and what its volatility does to the others' by the leverage, now and later
            to_go = slope * (paid + game.leverage_effects(paid).flip(0).cumsum(0).flip(0))
            return to_go[:, :num_runs].gather(2, basis[:, None].expand(-1, num_runs, -1))
        prices = game.exotic_cashflows().mean(-1, keepdim=True)  # (days + 1, R, 1)
        rewards = game.settled(slope * prices[:, :num_runs].diff(dim=0))
    to_go = rewards.flip(0).cumsum(0).flip(0)
    if shared:
        return to_go
    # Each basis player's reward counts from the step on at which it was one
    return to_go.unflatten(-1, basis.shape).diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def ppo_loss(agent: Agent, batch: Batch, args: Args) -> tuple[Tensor, Tensor]:
    """Loss of a minibatch, and its parts: policy loss, value loss, KL divergence, clipped fraction."""
    means = agent.actor_mean(batch.observations)
    logstds = agent.log_std(batch.observations)
    ratio = (log_prob(means, logstds, batch.actions) - batch.logprobs).exp()
    clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    policy_loss = -torch.minimum(ratio * batch.advantages, clipped * batch.advantages).mean()
    # (Validation would wait for the device.)
    new = torch.distributions.Normal(means, logstds.exp(), validate_args=False)
    old = torch.distributions.Normal(batch.means, batch.logstds.exp(), validate_args=False)
    kl = torch.distributions.kl_divergence(old, new).sum(-1).mean()
    value_loss = torch.zeros_like(kl)
    if args.baseline == "critic":
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
            average_gradients(agent)  # over the processes of torchrun
            optimizer.step()
            parts.append(loss_parts)
    parts = average(torch.stack(parts).mean(0))
    # As in RLlib's PPO: the weight rises by half when the divergence is twice the target, and falls back below half
    kl = parts[2]
    factor = torch.where(kl > 2 * args.target_kl, 1.5, torch.where(kl < 0.5 * args.target_kl, 1 / 1.5, 1.0))
    agent.kl_coef.mul_(factor).clamp_(1e-4, 1e4)
    check_equal_parameters(agent)
    return parts


def train(run: Run, game: CalibrationGame) -> Agent:
    """Trains the agent, from scratch or from where `run` resumes."""
    args: Args = run.args
    torch.manual_seed(args.seed)
    agent = Agent(game, args).to(run.device)
    if args.save_model and not game.is_local:
        layers_of(agent.actor_mean, game.observation_size)  # or it could not be saved as a market in the end
    # A tensor as learning rate, so that a captured update sees it change
    optimizer = torch.optim.Adam(
        [p for p in agent.parameters() if p.requires_grad], lr=torch.tensor(args.learning_rate, device=run.device),
        eps=1e-5, fused=True, capturable=run.device.type == "cuda",
    )  # fmt: skip
    generator = run.generator(args.seed + EXPLORATION_SEED)  # of paths, exploration and minibatches
    run.keep(agent=agent, optimizer=optimizer, generator=generator, surface=smiles.to_dict(game.surface))
    validation = Validation(game)
    if run.iteration == 0:  # the untrained policy, for the learning curve
        run.log(validation(agent.stepper(game)))

    def iterate() -> Tensor:
        return update(agent, optimizer, rollout(game, agent, args, generator), args, generator)

    iterate = run.captured(iterate)
    steps = game.num_steps * args.num_runs * args.num_players * world_size()
    largest_kl = torch.zeros((), device=run.device)  # of an update since the last evaluation
    for iteration in run.iterations(args.num_iterations, steps):
        if args.anneal_lr:
            optimizer.param_groups[0]["lr"].fill_(args.learning_rate * (1 - (iteration - 1) / args.num_iterations))
        losses = iterate()
        largest_kl = torch.maximum(largest_kl, losses[2])
        # The first updates move fast, so the average begins with a short memory
        weight = max(args.average, 10 / (iteration + 9))
        for mean, new in zip(agent.average_actor.parameters(), agent.actor_mean.parameters(), strict=True):
            mean.data.lerp_(new.data, weight)
        if run.due(iteration):
            row = dict(zip(LOSS_NAMES, losses.tolist(), strict=True))
            row |= {
                "charts/learning_rate": optimizer.param_groups[0]["lr"].item(),
                "losses/kl_coef": agent.kl_coef.item(),
            }
            run.check_finite(row, agent)
            run.check_at_most(DIVERGED, {"losses/approx_kl": largest_kl.item()})
            largest_kl.zero_()
            row |= validation(agent.stepper(game))
            # At the end the checkpoint has a market, for the other phases' --marlvol-checkpoint
            also = {"market": export_market(game, agent.average_actor)} if iteration == args.num_iterations else {}
            run.log(row, validation.describe(row), **also)
    return agent


# BENCHMARK


def benchmark(run: Run, game: CalibrationGame, agent: Agent):
    """The mean policy on fresh paths beside local and constant volatility on the same: (result, its figures)."""
    args: Args = run.args
    settings = {"smile": args.smile, "task": args.task, "state": args.state, "action map": args.action_map}
    settings |= {"reward": args.reward, "days": game.num_days, **run.settings()}
    if args.task == "exotic":
        settings |= {"payoff": args.payoff, "objective": args.objective, "target price (bp)": args.target_price}
    contest = {
        "title": f"Phase 0 ({args.smile}, {args.task}, {args.state})",
        "settings": settings,
        "game": game,
        "models": {"agent": agent.stepper(game)},
        "num_paths": args.eval_paths,
    }
    if args.task == "slv":
        result, fits, forward = slv_benchmark(**contest)
        return result, partial(slv_report, game=game, result=result, played=fits, forward=forward)
    if args.task == "exotic":
        target = None if args.target_price is None else args.target_price * BASIS_POINT
        result, fits, learnt = exotic_benchmark(**contest, objective=args.objective, target_price=target)
        figures = {"game": game, "result": result, "played": fits, "learnt": learnt, "beside": args.beside}
        return result, partial(exotic_report, **figures)
    result, fits = smile_benchmark(**contest)
    market = Marlvol(export_market(game, agent.average_actor), game.dt)
    return result, partial(calibration_report, game=game, result=result, played=fits, market=market)


def check_game(run: Run, surface: smiles.Surface) -> None:
    """Raises `UsageError` if an agent would be benchmarked in another game, or go on with another smile."""
    args = run.args
    if args.evaluate is not None:
        for name in ("task", "state", "action_map", "act_before_t1", "steps_per_day"):
            new, old = getattr(args, name), getattr(run.trained, name)
            check(new == old, f"--{name.replace('_', '-')} is {new}, but the agent was trained with {old}")
        check(type(run.steps) is int, f"{args.evaluate}: does not fit this script, it has no steps")
    elif args.resume is not None and run.checkpoint is not None:
        same = run.saved("surface") == smiles.to_dict(surface)
        check(same, f"{args.resume}: was calibrated to another smile than {args.smile} is now")


def main(argv) -> bool:
    """Runs the command; True if the benchmark passed."""
    run = Run.open(Args, argv, PHASE, lambda args: {**PRESETS.get(args.preset, {}), **(QUICK if args.quick else {})})
    args: Args = run.args
    surface, fits = make_surface(args)
    check_game(run, surface)
    game = make_game(args, surface, run.device)
    if args.evaluate is not None:
        agent = Agent(game, args).to(run.device)
        run.load(agent)
    players = f"{args.num_runs} × {args.num_players:,} players" if args.evaluate is None else "evaluation"
    what = f"{args.smile}, {args.task} on {run.device}, {players}; errors in vol points, trading days"
    run.begin(args.task, what)
    for fit in fits:
        error = f"RMSE {fit.rmse:.2f}, at most {fit.worst:.2f} vol points"
        print(f"SVI at {TRADING_DAYS * fit.maturity:.1f} days: {fit.num_quotes} quotes, {error}")
    if args.evaluate is None:
        with run.training():
            agent = train(run, game)
        print(f"memory at its peak: {peak_memory(run.device):.2f} GiB")
    if rank() > 0:
        return True  # the first process benchmarks
    return run.finish(*benchmark(run, game, agent))


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
