"""Phase 4: makers that learn from each other, by self-play with PPO.

The market is phase 3's: makers of European options quote, takers choose among them or walk away, and every maker hedges
the delta of its book at a cost. Two models are kept: π_new learns, π_old takes the other seats; after the update π_new
becomes π_old. CleanRL's PPO with GAE, batched: a rollout is one whole episode of every environment. All the finance is
in envs/; copy this file, change thirty lines, run it.
"""

import copy
import math
import sys
import time
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn as nn

from envs import AgainstRivals, QuotingEnv, benchmark, dynamics, figures, league, makers, quoting, runs

Tensor = torch.Tensor
PHASE = "phase4"  # a checkpoint is only loaded into the phase that wrote it
EPISODES = 2048  # played side by side for validation
EXPLORATION_SEED = 4_000_000  # added to --seed, which itself seeds the market and stays below a million
OPPONENT_SEED, RESPONSE_SEED = 6_000_000, 7_000_000  # likewise: the choice from the pool, the best response's run
# The classical makers that take their turns as opponents
CLASSICS = (makers.NAMED_MAKER, makers.STRONGEST_MAKER, makers.GLFT, makers.CONSTANT_SPREAD)


@dataclass
class Args:
    """Phase 4: train makers of options by self-play, so that they anticipate each other, then benchmark them.

    Two makers (or more) quote five calls of one expiry, twice a trading day; takers arrive at random, with persistent
    order flow, and pick a maker or walk away. The agent sets half-spread and skew in vol points and hedges its delta at
    a cost; so do its opponents, which are its own past selves. At the end it is compared with the classical maker,
    Black–Scholes with Avellaneda–Stoikov quotes, tuned, in the same seat with the same takers; snapshots of the run and
    the classical makers play each other; a best response is trained against it, to see what it leaves on the table; and
    where nothing is risked and hedging is free, its edge is set beside the exact optimum, the Nash equilibrium's, and
    the monopoly's. Exit code 0: benchmark passed; 1: failed; 2: bad input; 3: diverged; 130: Ctrl-C. Everything is
    written to runs/<run name>/.

    Commands to start from:

      python phase4_selfplay.py --num-envs 64               the main job, on a GPU if there is one
      python phase4_selfplay.py --opponent pool             fictitious self-play over past snapshots
      python phase4_selfplay.py --num-makers 3
      python phase4_selfplay.py --resume runs/NAME          go on where a run stopped
      python phase4_selfplay.py --evaluate runs/NAME --dynamics garch
      torchrun --nproc-per-node 2 phase4_selfplay.py        data-parallel; --num-envs is each process's

    Where the answer is known exactly, without risk aversion and cost, from a wide start and a narrow one:

      python phase4_selfplay.py --dynamics gbm --risk-aversion 0 --cost-rate 0 --gamma 0 --start-edge 1.2
      python phase4_selfplay.py --dynamics gbm --risk-aversion 0 --cost-rate 0 --gamma 0 --start-edge 0.5
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
    """CHECKPOINT or run folder: only the benchmark (with --no-exploitability no training at all); market flags may
    differ from those trained with"""
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
    """makers in the market, that learn from each other"""
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

    # Self-play
    opponent: Literal["lag", "pool", "baseline"] = "lag"
    """who takes the other seats: the agent some updates ago; one of a pool of its snapshots (fictitious self-play); the
    tuned Avellaneda–Stoikov maker"""
    lag: int = 1
    """how many updates behind the opponent is, with --opponent lag"""
    pool_size: int = 16
    """snapshots of a --opponent pool, evenly spaced over the run so far"""
    pool_sampling: Literal["uniform", "prioritised"] = "uniform"
    """how one is chosen for an iteration: all alike, or the more often the more it earns beyond the agent"""
    classical_share: float = 0.2
    """share of the updates in which a classical maker, in turn, takes the other seats, so that the agent remains good
    against makers unlike itself"""
    guests: tuple[str, ...] = ()
    """run folders or checkpoints of other runs, whose agents join the cross-play and, with --opponent pool, the pool"""
    start_edge: float | None = None
    """half-spread that training starts from, vol points; by default that of the strongest classical maker"""

    # The algorithm
    total_timesteps: int = 3_000_000
    """environment steps of the whole run, over all environments"""
    num_envs: int = 64
    """environments side by side; more of them are faster, but make fewer updates of as many steps"""
    learning_rate: float = 2e-3
    """learning rate of Adam"""
    anneal_share: float = 0.25
    """share of the run, its last, in which the learning rate falls linearly to zero"""
    gamma: float = 1.0
    """discount factor; at 0 no maker is credited with how its rivals will react to its quotes"""
    gae_lambda: float = 0.85
    """λ of generalised advantage estimation"""
    min_std: float = 0.25
    """floor of the exploration's standard deviation (raw action): what is better shows in proportion to it"""
    copies: int = 4
    """rows that meet the same market; the mean of their advantages is taken off as luck"""
    num_minibatches: int = 1
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
    exploitability: bool = True
    """train a best response to the final policy, as long again as the training"""
    tuning_episodes: int = 2048
    """episodes that the classical makers are tuned on"""
    num_evaluations: int = 20
    """how often in the run the policy is evaluated, logged and saved"""
    eval_episodes: int = 8192
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
    runs.check_range(args, 0, 1e6, "choice_sensitivity", open_low=True)
    most = 3 / math.sqrt(2 * args.num_steps / 504)  # beyond, the spot is as good as zero at the end
    runs.check(args.volatility <= most, f"--volatility is {args.volatility} (at most {most:.2g} over --num-steps)")
    runs.check_range(args, 2, 2**26, "eval_episodes", "tuning_episodes")
    runs.check_range(args, 1, 1024, "torch_threads")
    runs.check_name(args.exp_name)
    if args.evaluate is not None and (not args.exploitability or args.dynamics == "historical"):
        return  # the rest is about training
    fitted = args.dynamics == "garch" or args.evaluate is not None
    runs.check(fitted or not (args.history or args.history_end), "--history and --history-end need --dynamics garch")
    runs.check_range(args, 0, math.inf, "learning_rate", "max_grad_norm", "reward_scale", open_low=True)
    runs.check_range(args, 0, 1, "gamma", "gae_lambda")
    runs.check_range(args, 0, 1, "clip_coef", "average", "min_std", "anneal_share", open_low=True)
    runs.check_range(args, 0, math.inf, "ent_coef", "vf_coef")
    runs.check_range(args, 1, 2**20, "num_envs", "num_minibatches", "update_epochs", "num_evaluations")
    runs.check_range(args, 0, 999_999, "seed")  # the seeds above are of tuning, validation and benchmark
    batch_size = args.num_envs * args.num_steps
    runs.check(
        batch_size % args.num_minibatches == 0 and batch_size // args.num_minibatches > 1,
        f"--num-minibatches is {args.num_minibatches} (must divide num_envs × num_steps = {batch_size}, > 1 each)",
    )
    runs.check_range(args, batch_size * runs.world_size(), 10**12, "total_timesteps")
    runs.check(
        args.copies >= 1 and args.num_envs % args.copies == 0,
        f"--copies is {args.copies} (at least 1, must divide --num-envs = {args.num_envs})",
    )
    updates = num_updates(args)
    runs.check(1 <= args.lag <= updates, f"--lag is {args.lag} (at least 1, at most the run's {updates} updates)")
    runs.check_range(args, 2, 4096, "pool_size")
    runs.check_range(args, 0, 1, "classical_share")
    if args.start_edge is not None:
        runs.check_range(args, 0, 10, "start_edge", open_low=True)
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
        self.first, self.choice = len(quoting.OBSERVATION_NAMES), (market.choice_sensitivity, market.reference_edge)
        self.rival_quotes = slice(self.first, self.first + 2 * (market.num_makers - 1))  # columns of the observation
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
        seen, done = self.attraction(torch.cat(seen)), torch.cat(done)
        vega, (half_spread, skew, target, band) = seen[:, quoting.VEGA], done.unbind(-1)
        square = vega.square().mean().clamp(min=1e-12)
        slopes = (skew * vega).mean() / square, (target * vega).mean() / square
        self.linear_maker.copy_(torch.stack((half_spread.mean(), *slopes, band.mean().clamp(min=0.01))))
        self.observation_mean.copy_(seen.mean(0))
        # What never varies in training (gbm's volatility) must not be blown up where it differs, in another market, nor
        # what rivals quote, who here are more alike than those to come.
        std = torch.where(seen.std(0) < 1e-2, 1.0, seen.std(0))
        std[self.rival_quotes] = std[self.rival_quotes].clamp(0.15, 0.3)
        self.observation_std.copy_(std)

    def attraction(self, observation: Tensor) -> Tensor:
        """The observation with, in place of each edge d that a rival quotes, how many takers it would get if there were
        nobody else: 1/(1 + exp(k(d − d_ref))). Bounded, so wider and narrower rivals than in training are no riddle."""
        (k, reference), quotes = self.choice, observation[:, self.rival_quotes]
        share = torch.sigmoid(-k * (quotes - reference))
        return torch.cat((observation[:, : self.first], share, observation[:, self.rival_quotes.stop :]), 1)

    def normalise(self, observation: Tensor) -> Tensor:
        return ((self.attraction(observation) - self.observation_mean) / self.observation_std).clamp(-10, 10)

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
    """Who takes the other seats: past selves of the agent, now and then a classical maker.

    `snapshots` (size, …) are vectors as `to_vector` makes them: the last `lag` iterates in a ring, or guests and the
    pool, of which every second one goes when it is full, so that they stay evenly spaced over the run (average past
    play, Heinrich, Lanctot & Silver 2015). `actor` is the one that plays now.
    """

    def __init__(self, args: Args, agent: Agent, guests: list[Tensor], classics: list):
        super().__init__()
        self.args, self.classics = args, classics  # the named baseline first
        self.turn = 0  # whose it is: 0 `actor`'s, i that of the i-th classic
        self.actor = copy.deepcopy(agent).requires_grad_(False)
        size = args.pool_size if args.opponent == "pool" else args.lag
        self.guests = len(guests) if args.opponent == "pool" else 0
        self.stored, self.spacing = 0, 1  # of the pool: how many there are, updates from one to the next
        self.register_buffer("snapshots", torch.stack([*guests[: self.guests], *[to_vector(agent)] * size]))
        self.register_buffer("scores", torch.zeros(len(self.snapshots)))  # what each earns beyond the agent
        self.register_buffer("born", torch.full((len(self.snapshots),), -1))  # the pool's: after how many updates
        self.register_buffer("chosen", torch.zeros(1, dtype=torch.long))

    @torch.no_grad()
    def advance(self, agent: Agent, iteration: int, generator: torch.Generator) -> None:
        """Chooses the opponent of this iteration (1, 2, …) and remembers the agent as it is before its update."""
        before, turns = (math.floor(i * self.args.classical_share) for i in (iteration - 1, iteration))
        self.turn = 1 + before % len(self.classics) if turns > before else 0
        self.turn = 1 if self.args.opponent == "baseline" else self.turn
        if self.args.opponent == "lag":
            slot = (iteration - 1) % self.args.lag  # what was put there `lag` updates ago; at first the untrained agent
            from_vector(self.actor, self.snapshots[slot])
            self.snapshots[slot] = to_vector(agent)
        elif self.args.opponent == "pool":
            if (iteration - 1) % self.spacing == 0 and self.stored == self.args.pool_size:
                for tensor in (self.snapshots, self.scores, self.born):
                    kept = tensor[self.guests :: 2].clone()
                    tensor[self.guests : self.guests + len(kept)] = kept
                self.stored, self.spacing = len(kept), 2 * self.spacing
            if (iteration - 1) % self.spacing == 0:
                self.snapshots[self.guests + self.stored] = to_vector(agent)
                self.scores[self.guests + self.stored] = self.scores[: self.guests + self.stored].mean().nan_to_num()
                self.born[self.guests + self.stored] = iteration - 1
                self.stored += 1
            scores = self.scores[: self.guests + self.stored]
            # By the largest of their logits plus Gumbel noise: a softmax's choice, without waiting for the device
            logits = torch.zeros_like(scores)
            if self.args.pool_sampling == "prioritised":
                logits = (scores - scores.mean()) / scores.std(correction=0).clamp(min=1e-6)
            gumbel = -torch.empty_like(scores).exponential_(generator=generator).log()
            self.chosen.copy_((logits + gumbel).argmax(keepdim=True))
            from_vector(self.actor, self.snapshots[self.chosen][0])

    def policy(self, observation: Tensor) -> Tensor:
        """Observation (n, size) → environment action (n, 4), without exploration."""
        return self.classics[self.turn - 1](observation) if self.turn else self.actor.policy(observation)

    def score(self, lead: Tensor) -> None:
        """Learns from an iteration by how much the opponent's objective was above the agent's, lead ()."""
        if self.args.opponent == "pool" and self.turn == 0:
            self.scores[self.chosen] += 0.2 * (lead - self.scores[self.chosen])


# ALGO LOGIC: PPO


class Batch(NamedTuple):
    """A rollout, flattened over time and environments: (num_steps · num_envs, …)."""

    observations: Tensor  # normalised
    actions: Tensor  # raw
    logprobs: Tensor
    advantages: Tensor
    returns: Tensor


@torch.no_grad()
def rollout(
    market: QuotingEnv, agent: Agent, opponent, act, args: Args, generator: torch.Generator
) -> tuple[Batch, Tensor]:
    """Plays one whole episode in every environment and estimates the agent's advantages (GAE; the end is terminal).

    The agent's seat goes round from row to row, `opponent` has all others. Also returns by how much the opponent's
    objective was above the agent's, ()."""
    n, num_makers, device = market.num_envs, market.num_makers, market.device
    rows = torch.arange(n, device=device)
    seats = rows % num_makers
    others = market.rivals[seats]  # (n, num_makers − 1)
    observation, _ = market.reset(options={"copies": args.copies})
    steps, lead = [], torch.zeros((), device=device)
    for _ in range(market.num_steps):
        own = observation[rows, seats]
        normalised = agent.normalise(own)
        noise = torch.randn(n, 4, generator=generator, device=device)
        action, logprob, value = act(normalised, noise)
        quotes = own.new_empty(n, num_makers, 4)
        quotes[rows, seats] = agent.to_quote(own, action)
        seen = observation[rows[:, None], others].flatten(0, 1)
        quotes[rows[:, None], others] = opponent(seen).unflatten(0, (n, num_makers - 1))
        observation, reward, _, _, info = market.step(quotes)
        # Who trades and how the market moves is chance; what the environment knows of its mean is learnt from instead:
        # the expected edge, no first-order ΔW, and its expected square. The optimum is the same and the noise less.
        reward = reward - info["noise"]
        earned = reward[rows, seats]
        lead = lead + ((reward.sum(1) - earned) / (num_makers - 1) - earned).mean()
        steps.append((normalised, action, logprob, args.reward_scale * earned, value))
    observations, actions, logprobs, rewards, values = (torch.stack(column) for column in zip(*steps, strict=True))
    advantages = torch.empty_like(rewards)
    next_value, advantage = torch.zeros_like(rewards[0]), torch.zeros_like(rewards[0])
    for t in reversed(range(market.num_steps)):
        error = rewards[t] + args.gamma * next_value - values[t]
        advantage = error + args.gamma * args.gae_lambda * advantage
        advantages[t], next_value = advantage, values[t]
    returns = advantages + values
    # Copies of a market differ in what is explored (and in the seat): their mean advantage is luck, and is taken off
    luck = advantages.unflatten(1, (-1, args.copies)).mean(-1) if args.copies > 1 else torch.zeros_like(advantages)
    advantages = advantages - luck.repeat_interleave(args.copies, 1)
    return Batch(*(x.flatten(0, 1) for x in (observations, actions, logprobs, advantages, returns))), lead


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
    "global_step", "charts/objective", "charts/gain_over_avellaneda_stoikov",
    "charts/selfplay_objective", "charts/selfplay_half_spread", "charts/SPS", "charts/learning_rate",
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
            with torch.no_grad():
                agent.actor_logstd.clamp_(min=math.log(args.min_std))
            parts.append(loss_parts)
    runs.check_equal_parameters(agent)
    return torch.stack(parts).mean(0)


def make_optimizer(args: Args, agent: Agent, device: torch.device) -> torch.optim.Adam:
    """Adam, with a tensor as learning rate, so that a captured update sees it change."""
    rate = torch.tensor(args.learning_rate, device=device)
    return torch.optim.Adam(agent.parameters(), lr=rate, eps=1e-5, fused=True, capturable=device.type == "cuda")


def num_updates(args: Args) -> int:
    return args.total_timesteps // (args.num_envs * args.num_steps * runs.world_size())


@torch.no_grad()
def follow(average: Agent, agent: Agent, args: Args) -> None:
    """Moves the moving average of the weights by one update."""
    rate = min(1.0, 1.0 / (args.average * num_updates(args)))
    torch._foreach_lerp_(list(average.parameters()), list(agent.parameters()), rate)


def anneal(optimizer, args: Args, iteration: int) -> None:
    left = 1.0 - (iteration - 1) / num_updates(args)
    optimizer.param_groups[0]["lr"].fill_(args.learning_rate * min(1.0, left / args.anneal_share))


class Watch:
    """What is followed while makers learn: their result against the baseline, and how they quote among themselves.

    The objective of self-play is no measure of progress: it falls as competition gets tighter."""

    def __init__(self, classics: makers.Makers):
        baseline = classics.policies[makers.NAMED_MAKER]
        self.against_baseline = benchmark.Validation(classics.env.like(EPISODES), baseline, "avellaneda_stoikov")
        self.market = classics.env.env.like(256)
        self.market.reset(seed=benchmark.VALIDATION_SEED)

    def __call__(self, agent: Agent) -> dict[str, float]:
        mirror = AgainstRivals(self.market, [agent.policy] * (self.market.num_makers - 1))
        played = benchmark.play(mirror, agent.policy)
        measured = {"objective": "objective_centred", "half_spread": "half_spread"}
        row = {f"charts/selfplay_{name}": float(played[key].mean()) for name, key in measured.items()}
        return {**self.against_baseline(agent.policy), **row}


def train(args: Args, classics: makers.Makers, run_dir: Path, device, checkpoint: dict | None, tracker, guests=None):
    """Trains from scratch or from `checkpoint`; logs, evaluates and saves `args.num_evaluations` times.

    Returns the agent, the environment steps it was trained for, and what played at each quarter of the run, by name.
    """
    torch.manual_seed(args.seed)
    market = classics.env.env.like(args.num_envs)
    agent = Agent(market).to(device)
    agent.fit(classics.env.like(1024), classics.policies[makers.STRONGEST_MAKER])
    if args.start_edge is not None:
        agent.linear_maker[0] = args.start_edge
    known = [classics.policies[name] for name in CLASSICS]
    guests = guests or {}
    opponents = Opponents(args, agent, list(guests.values()), known).to(device)
    average = copy.deepcopy(agent).requires_grad_(False)  # moves less with the noise of every update
    optimizer = make_optimizer(args, agent, device)
    # Each process of torchrun has its own streams, of the market and of exploration, which also shuffles minibatches
    generator = torch.Generator(device).manual_seed(runs.rank_seed(args.seed + EXPLORATION_SEED))
    market.generator.manual_seed(runs.rank_seed(args.seed))
    pool_generator = torch.Generator(device).manual_seed(args.seed + OPPONENT_SEED)  # they meet the same opponent

    batch_size = args.num_envs * args.num_steps * runs.world_size()
    num_iterations = num_updates(args)
    evaluations = {math.ceil(num_iterations * (i + 1) / args.num_evaluations) for i in range(args.num_evaluations)}
    quarters = {math.ceil(num_iterations * i / 4) for i in range(1, 4)} - {num_iterations}
    snapshots = {"step 0": to_vector(agent)}
    first, rows = 1, None
    if checkpoint is not None:
        try:
            average.load_state_dict(checkpoint["agent"])
            agent.load_state_dict(checkpoint["learner"])
            opponents.load_state_dict(checkpoint["opponents"])
            opponents.stored, opponents.spacing = map(int, checkpoint["pool"])
            optimizer.load_state_dict(checkpoint["optimizer"])
            for group in optimizer.param_groups:  # read onto the CPU, where a captured update would not see it change
                group["lr"] = group["lr"].to(device)
            generator.set_state(checkpoint["generator"][runs.rank()])
            market.generator.set_state(checkpoint["market_generator"][runs.rank()])
            pool_generator.set_state(checkpoint["pool_generator"])
            snapshots = {name: snapshot.to(device) for name, snapshot in checkpoint["snapshots"].items()}
            first, rows = int(checkpoint["iteration"]) + 1, int(checkpoint["rows"])
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
            raise runs.UsageError(f"{run_dir}: does not fit this script, or was made on another device") from None
    metrics = runs.MetricsFile(run_dir / "metrics.csv", METRICS, resume_from=rows)

    def save(iteration: int) -> None:
        if args.save_model:
            content = {"phase": PHASE, "args": asdict(args), "iteration": iteration, "rows": metrics.rows}
            content |= {"agent": average.state_dict(), "learner": agent.state_dict()}
            content |= {"optimizer": optimizer.state_dict()}
            content |= {"opponents": opponents.state_dict(), "pool": [opponents.stored, opponents.spacing]}
            content |= {"snapshots": snapshots, "guests": guests}
            content |= {"generator": runs.gather(generator.get_state()), "world_size": runs.world_size()}
            content |= {"market_generator": runs.gather(market.generator.get_state())}
            content |= {"pool_generator": pool_generator.get_state(), "tracker": tracker.id if tracker else None}
            content |= {"makers": classics.parameters, "origin": classics.origin}
            runs.save_checkpoint(run_dir / "checkpoint.pt", content)

    watch = Watch(classics)
    if checkpoint is None:  # the untrained policy, for the learning curve
        metrics.write({"global_step": 0, **watch(average)})
        save(0)
    act = torch.compile(agent.act) if args.compile else agent.act
    loss_function = torch.compile(ppo_loss) if args.compile else ppo_loss

    def iterate(turn: int) -> Tensor:
        opponents.turn = turn
        batch, lead = rollout(market, agent, opponents.policy, act, args, generator)
        opponents.score(runs.average(lead))
        losses = update(agent, optimizer, batch, loss_function, args, generator)
        follow(average, agent, args)
        return losses

    if args.cudagraphs:
        learners, streams = nn.ModuleList([agent, average, opponents]), [generator, market.generator]
        eager = iterate

        @cache  # a graph for each turn, as each is other code
        def captured(turn: int):
            return runs.cuda_graph(partial(eager, turn), learners, optimizer, streams)

        def iterate(turn: int) -> Tensor:
            return captured(turn)()

    progress = runs.progress_bar(num_iterations * batch_size, (first - 1) * batch_size)
    progress.set_description("gain over Avellaneda–Stoikov —")
    clock, clock_steps = time.perf_counter(), 0
    for iteration in range(first, num_iterations + 1):
        anneal(optimizer, args, iteration)
        opponents.advance(agent, iteration, pool_generator)
        try:
            losses = iterate(opponents.turn)
        except quoting.BadQuote as error:  # they are NaN
            raise runs.DivergenceError(
                f"{error}, by step {iteration * batch_size}; {runs.last_good(run_dir)}"
            ) from None
        clock_steps += batch_size
        progress.update(batch_size)
        if iteration in quarters:
            snapshots[f"step {iteration * batch_size:,}"] = to_vector(agent)
        if iteration not in evaluations:
            continue
        row = {"global_step": iteration * batch_size}
        row |= dict(zip(LOSS_NAMES, losses.tolist(), strict=True))  # waits for the device, so the speed is honest
        row["charts/SPS"] = int(clock_steps / (time.perf_counter() - clock))
        row["charts/learning_rate"] = optimizer.param_groups[0]["lr"].item()
        row |= {f"losses/action_std_{i}": std for i, std in enumerate(agent.actor_logstd.exp().tolist())}
        parameters = {f"parameter {name}": p.sum().item() for name, p in agent.named_parameters()}
        runs.check_finite({**row, **parameters}, row["global_step"], run_dir)
        row |= watch(average)
        metrics.write(row)
        if tracker:
            tracker.log(row, step=row["global_step"])
        save(iteration)
        gain, objective = row["charts/gain_over_avellaneda_stoikov"], row["charts/objective"]
        relative = f" ({100 * gain / (objective - gain):+.1f} %)" if objective - gain > 0.01 else ""
        progress.set_description(f"gain over Avellaneda–Stoikov {gain:+.3f}{relative}")
        clock, clock_steps = time.perf_counter(), 0
    progress.close()
    return average, num_iterations * batch_size, snapshots


def best_response(args: Args, market: QuotingEnv, agent: Agent, run_dir: Path) -> Agent:
    """Trains a copy of `agent` for as many steps again against `agent` itself, which stays as it is.

    What it gains is a lower bound of what the policy leaves to be exploited. Returns the best of ten evaluations of the
    moving average, and `agent` if none of them is better.
    """
    device = market.device
    market, response = market.like(args.num_envs), copy.deepcopy(agent).requires_grad_(True)
    optimizer = make_optimizer(args, response, device)
    generator = torch.Generator(device).manual_seed(runs.rank_seed(args.seed + RESPONSE_SEED + EXPLORATION_SEED))
    market.generator.manual_seed(runs.rank_seed(args.seed + RESPONSE_SEED))
    frozen = AgainstRivals(market.like(EPISODES), [agent.policy] * (market.num_makers - 1))
    validation = benchmark.Validation(frozen, agent.policy, "frozen")
    average = copy.deepcopy(agent).requires_grad_(False)
    best, best_gain = agent, 0.0

    def iterate() -> Tensor:
        batch, _ = rollout(market, response, agent.policy, response.act, args, generator)
        losses = update(response, optimizer, batch, ppo_loss, args, generator)
        follow(average, response, args)
        return losses

    if args.cudagraphs:
        learners = nn.ModuleList([response, average])
        iterate = runs.cuda_graph(iterate, learners, optimizer, [generator, market.generator])
    steps = args.num_envs * args.num_steps * runs.world_size()
    evaluations = {math.ceil(num_updates(args) * (i + 1) / 10) for i in range(10)}
    progress = runs.progress_bar(num_updates(args) * steps)
    for iteration in range(1, num_updates(args) + 1):
        anneal(optimizer, args, iteration)
        try:
            iterate()
        except quoting.BadQuote as error:
            raise runs.DivergenceError(f"{error}, training the best response; {runs.last_good(run_dir)}") from None
        progress.update(steps)
        if iteration in evaluations:
            gain = validation(average.policy)["charts/gain_over_frozen"]
            if gain > best_gain:
                best, best_gain = copy.deepcopy(average), gain
            progress.set_description(f"best response to the agent gains {best_gain:+.3f}")
    progress.close()
    return best


# BENCHMARK


MARKET = (
    "dynamics", "volatility", "mean_reversion", "vol_of_vol", "correlation", "num_steps", "num_makers", "arrival_rate",
    "flow_sd", "choice_sensitivity", "cost_rate", "risk_aversion",
)  # fmt: skip


def run_benchmark(
    args: Args, classics: makers.Makers, agent: Agent, steps: int, run_dir: Path, model, past: dict, response
):
    """The agent and every classical maker in the same seat on fresh episodes, then all of them and the `past` selves
    against each other, and the best `response`, if there is one; writes report and figures."""
    flags = {name: getattr(args, name) for name in MARKET}
    default_market = flags == {name: getattr(Args(), name) for name in MARKET} and not args.privileged
    settings = {**flags, "privileged": args.privileged, "run seed": args.seed, "training steps": steps}
    settings["opponent"] = f"{args.opponent} {args.lag}" if args.opponent == "lag" else args.opponent
    title = f"Phase 4 ({args.dynamics}, {args.num_makers} makers, cost {1e4 * args.cost_rate:g} bp, "
    title += f"risk aversion {args.risk_aversion:g})"
    market, replayed = classics.env.env, None
    if args.dynamics == "historical":
        settings |= {"closes": args.history or "S&P 500", "model fitted until": str(model.dates[0])}
        settings["cross-play and competition"] = "in the fitted garch"
        windows = make_market(args, model, model.num_windows(args.num_steps), classics.env.device)
        replayed = AgainstRivals(windows, classics.env.rivals)
    contest = makers.quoting_contest(classics, agent.policy, args.eval_episodes, replayed)
    policies = {**{name: at(snapshot, agent) for name, snapshot in past.items()}, "agent": agent.policy}
    played = league.cross_play(market, {**policies, **classics.policies}, args.eval_episodes)
    played.write(run_dir)
    exploited = None
    if response is not None:
        exploited = league.exploitability(market, agent.policy, response.policy, args.eval_episodes)
    compete = league.competition(market, agent.policy)
    snapshots = [name for name in past if name.startswith("step ")]
    judged = None if args.dynamics == "historical" else played
    result = league.judge_selfplay(title, settings, contest, judged, snapshots, exploited, compete, default_market)
    result.write(run_dir)
    if args.dynamics == "historical":
        apart = contest.non_overlapping(args.num_steps)
        league.judge_selfplay(
            f"{title}, non-overlapping windows", settings, apart, None, (), None, compete, default_market
        ).write(run_dir, "benchmark_non_overlapping")
        figures.advantage_by_date(run_dir / "advantage_by_date.png", model.dates, contest, title)
    figures.selfplay_report(run_dir, title, contest, played, compete)
    return result, played


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


def finish_tracker(tracker, result: benchmark.Benchmark, played: league.CrossPlay, run_dir: Path) -> None:
    """Benchmark table, figures, checkpoint and code to W&B."""
    import wandb

    columns = ["contestant", *next(iter(result.rows.values()))]
    table = wandb.Table(columns=columns, data=[[name, *row.values()] for name, row in result.rows.items()])
    means = [[name, *row, rating] for name, row, rating in zip(played.names, played.means, played.ratings, strict=True)]
    cross_play = wandb.Table(columns=["objective against", *played.names, "rating"], data=means)
    tracker.log({"benchmark/table": table, "benchmark/cross_play": cross_play})
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


def agent_of(checkpoint: dict, market: QuotingEnv, source: str) -> Agent:
    """The agent of a checkpoint, in this market; `source` names it in errors."""
    agent = Agent(market).to(market.device)
    try:
        agent.load_state_dict(checkpoint["agent"])
    except (RuntimeError, AttributeError, TypeError):
        raise runs.UsageError(f"{source}: does not fit this script, its networks have other shapes") from None
    runs.check(all(x.isfinite().all() for x in agent.state_dict().values()), f"{source}: NaN in its networks")
    return agent


def load_agent(args: Args, checkpoint: dict, market: QuotingEnv) -> Agent:
    """The agent of a checkpoint, to be evaluated in another market than it was trained in, but not on its own past."""
    agent = agent_of(checkpoint, market, args.evaluate)
    trained = runs.saved_args(Args, checkpoint["args"], args.evaluate)
    length, snapshots = len(to_vector(agent)), checkpoint.get("snapshots")
    runs.check(isinstance(snapshots, dict), f"{args.evaluate}: does not fit this script, it has no snapshots")
    for name, snapshot in snapshots.items():
        fits = isinstance(snapshot, Tensor) and snapshot.shape == (length,)
        runs.check(fits, f"{args.evaluate}: snapshot {name!r} does not fit this market, it is not of {length} numbers")
    if args.dynamics == "historical" and trained.dynamics == "garch":
        seen = trained.history_end
        apart = trained.history == args.history and seen is not None and seen <= args.history_end
        until = f"closes of {trained.history or 'the S&P 500'} until {seen or 'their end'}"
        runs.check(apart, f"--history-end is {args.history_end}, but the agent was trained on {until}")
    return agent


def load_guests(args: Args, market: QuotingEnv) -> dict[str, Tensor]:
    """Snapshots of the agents of other runs, by the names of their folders."""
    guests = {}
    for source in args.guests:
        guest = agent_of(runs.load_checkpoint(source, PHASE, ["agent"]), market, f"--guests {source}")
        name = f"guest {(Path(source) if Path(source).is_dir() else Path(source).parent).resolve().name}"
        runs.check(name not in guests, f"--guests {source}: another guest has the same name")
        guests[name] = to_vector(guest)
    return guests


def main(argv) -> bool:
    """Runs the command; True if the benchmark passed."""
    resume_needs = (
        "rows", "learner", "optimizer", "generator", "market_generator", "pool_generator", "opponents", "pool",
        "guests", "snapshots", "world_size", "tracker", "makers", "origin",
    )  # fmt: skip
    args, checkpoint = runs.parse_command(Args, argv, PHASE, resume_needs)
    validate(args)
    model = make_dynamics(args)
    torch.set_num_threads(args.torch_threads)
    device = runs.join_ranks(args.cuda)
    fitted = model.garch if args.dynamics == "historical" else model  # what the makers know
    market = make_market(args, fitted, args.tuning_episodes, device)
    for flag, rows in (("--num-envs", max(args.num_envs, EPISODES)), ("--tuning-episodes", args.tuning_episodes)):
        runs.check_memory(3 * 4 * rows * market.noise_size, device, f"{flag} {rows}")  # noise, marks and a copy
    kept = args.pool_size if args.opponent == "pool" else args.lag
    runs.check_memory(8 * kept * len(to_vector(Agent(market))), device, f"{kept} past selves (--lag, --pool-size)")
    name = f"{args.dynamics}__{args.exp_name}__{'evaluate__' if args.evaluate else ''}{args.seed}"
    run_dir = Path(args.resume or f"runs/{name}__{time.strftime('%Y%m%d-%H%M%S')}")
    if args.evaluate is not None:
        agent = load_agent(args, checkpoint, market)
        trained = runs.saved_args(Args, checkpoint["args"], args.evaluate)
        batch_size = trained.num_envs * trained.num_steps * checkpoint.get("world_size", 1)
        steps, snapshots = batch_size * checkpoint["iteration"], checkpoint["snapshots"]
    if checkpoint and args.guests == runs.saved_args(Args, checkpoint["args"], "").guests:  # the very same
        guests = {name: guest.to(device) for name, guest in checkpoint.get("guests", {}).items()}
    else:
        guests = load_guests(args, market)
    tracker = start_tracker(args, run_dir, checkpoint["tracker"] if args.resume and checkpoint else None)
    if args.resume is None:
        run_dir = runs.new_folder(run_dir)
        runs.write_json(run_dir / "args.json", asdict(args))
    print(f"{run_dir}: {args.dynamics} on {device}; edges in vol points, vega per vol point, S = 100, 252 days a year")
    print("the classical makers, tuned, are what has to be beaten …", flush=True)
    if args.resume and checkpoint:  # the very same opponents
        try:
            classics = makers.assemble(market, checkpoint["makers"], checkpoint["origin"])
        except (AttributeError, KeyError, TypeError, ValueError):
            raise runs.UsageError(
                f"{args.resume}: does not fit this script, its makers have other parameters"
            ) from None
    else:
        classics = makers.classical_makers(market)
    if args.evaluate is None:
        with runs.naming_last_good(run_dir):
            agent, steps, snapshots = train(args, classics, run_dir, device, checkpoint, tracker, guests)
    response = None
    if args.exploitability and args.dynamics != "historical":
        with runs.naming_last_good(run_dir):
            response = best_response(args, market, agent, run_dir)
    if runs.rank() > 0:
        return True  # the first process benchmarks
    past = {**snapshots, **guests}
    result, played = run_benchmark(args, classics, agent, steps, run_dir, model, past, response)
    print(f"\n{result.title}\n\n{result.table()}\n\n{played.table()}\n\n{played.summary()}\n{result.verdict()}")
    print(f"report and figures: {run_dir}")
    if tracker:
        finish_tracker(tracker, result, played, run_dir)
    return result.passed


if __name__ == "__main__":
    runs.run(main, sys.argv[1:])
