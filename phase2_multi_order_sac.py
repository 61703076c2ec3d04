"""Phase 2: hedge a book of options fed by Poisson client orders, learned with SAC and measured against the classics.

Clients buy and sell calls and puts of several strikes and expiries at given prices; the agent hedges the book's delta
once a day at a proportional cost. Its action is a no-trade band around the Black–Scholes delta. CleanRL's SAC, batched:
whole episodes of every environment go into a replay buffer on the device, then come the updates. All the finance is in
envs/; copy this file, change thirty lines, run it.
"""

import copy
import math
import sys
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn as nn
from tqdm import tqdm

from envs import HedgingEnv, baselines, benchmark, dynamics, figures, hedging, runs

Tensor = torch.Tensor
PHASE = "phase2"  # a checkpoint is only loaded into the phase that wrote it
EXPLORATION_SEED = 4_000_000  # added to --seed, which itself seeds the market and stays below a million


@dataclass
class Args:
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
      python phase2_multi_order_sac.py --resume runs/NAME    go on where a run stopped
      python phase2_multi_order_sac.py --evaluate runs/NAME --cost-rate 2e-3

    One call, of which the exact optimum is known:

      python phase2_multi_order_sac.py --num-strikes 1 --expiries 30 --arrival-rate 0.25 --mean-order-size 1
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
    """compile the loss with torch.compile (needs a C++ compiler; worth it on long runs)"""
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
    runs.check_range(args, 1, 101, "num_strikes")
    runs.check_range(args, 0.01, 50, "strike_spacing")
    runs.check_range(args, 0, 10, "arrival_rate", open_low=True)
    runs.check_range(args, 1, 100, "mean_order_size")
    runs.check_range(args, 0, 100, "client_spread")
    lowest = 100.0 - args.strike_spacing * (args.num_strikes - 1) / 2
    runs.check(lowest > 0, f"--strike-spacing is {args.strike_spacing} (the lowest strike would be {lowest:g})")
    increasing = all(a < b for a, b in pairwise(args.expiries))
    runs.check(
        increasing and args.expiries != () and args.expiries[0] >= 1 and args.expiries[-1] == args.num_steps,
        f"--expiries is {' '.join(map(str, args.expiries)) or 'empty'} (increasing days from 1 to --num-steps = "
        f"{args.num_steps}, which is the last)",
    )
    options = args.num_strikes * len(args.expiries)
    runs.check(options <= 100, f"--num-strikes × --expiries are {options} options (at most 100)")
    runs.check_range(args, 2, 2**26, "eval_episodes")
    runs.check_range(args, 1, 1024, "torch_threads")
    runs.check_range(args, 1, 4096, "hidden_size")
    runs.check_name(args.exp_name)
    if args.evaluate is not None:
        return  # the rest is about training
    fitted = args.dynamics == "garch"
    runs.check(fitted or not (args.history or args.history_end), "--history and --history-end need --dynamics garch")
    runs.check_range(args, 0, math.inf, "learning_rate", "reward_scale", "alpha", open_low=True)
    runs.check_range(args, 0, 1, "gamma")
    runs.check_range(args, 0, 1, "tau", "average", open_low=True)
    runs.check_range(args, 0, 1, "random_share")
    runs.check_range(args, -1000, 1.38, "target_entropy")  # 2 ln 2 is that of uniform actions
    runs.check_range(args, 1, 2**20, "num_envs", "batch_size", "num_evaluations")
    runs.check_range(args, 0, 999_999, "seed")  # the seeds above are of tuning, validation and benchmark
    episode = args.num_envs * args.num_steps
    runs.check_range(args, episode, 10**12, "total_timesteps")
    runs.check_range(args, max(args.batch_size, episode), 10**10, "buffer_size")
    runs.check_range(args, 0, 64, "utd", open_low=True)
    runs.check_range(args, 0, args.total_timesteps, "learning_starts")
    runs.check(not args.cudagraphs or (args.cuda and torch.cuda.is_available()), "--cudagraphs needs a GPU and --cuda")
    runs.check(not (args.cudagraphs and args.compile), "--cudagraphs and --compile exclude each other")
    runs.check(runs.world_size() == 1, "torchrun trains phases 1, 3 and 4; this one learns in one process")


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
    half = (args.num_strikes - 1) / 2
    strikes = [100.0 + args.strike_spacing * (i - half) for i in range(args.num_strikes)]
    settings = {"options": hedging.option_grid(strikes, args.expiries), "initial_position": 0.0}
    settings |= {"num_steps": args.num_steps, "cost_rate": args.cost_rate, "risk_aversion": args.risk_aversion}
    settings |= {"arrival_rate": args.arrival_rate, "mean_order_size": args.mean_order_size}
    return HedgingEnv(num_envs, model, client_spread=args.client_spread, device=device, **settings)


# ALGO LOGIC: the agent


class Twin(nn.Module):
    """Two critics of two hidden layers in one batched product: input (n, size) → values (2, n)."""

    def __init__(self, size: int, hidden: int):
        super().__init__()
        shapes = ((size, hidden), (hidden, hidden), (hidden, 1))
        pairs = [[nn.Linear(*shape) for _ in range(2)] for shape in shapes]
        self.weights = nn.ParameterList([torch.stack([layer.weight.detach().T for layer in pair]) for pair in pairs])
        self.biases = nn.ParameterList([torch.stack([layer.bias.detach()[None] for layer in pair]) for pair in pairs])

    def forward(self, x: Tensor, frozen: bool = False) -> Tensor:
        """With `frozen` no gradient reaches the parameters, only the input."""
        x = x.expand(2, -1, -1)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            weight, bias = (weight.detach(), bias.detach()) if frozen else (weight, bias)
            x = torch.baddbmm(bias, x if i == 0 else torch.relu_(x), weight)
        return x[..., 0]


class Agent(nn.Module):
    """Squashed Gaussian policy and twin critics of the book after a trade.

    The cost of a trade is known, and what it leads to depends on the book after it alone (the post-decision state of
    Powell 2011, section 4.6). So Q(s, a) = −cost(s, a) + C(book after the trade), and only C is learnt. The best
    no-trade band does not depend on what is held, only what is done with it, so the actor does not see the net delta.
    The actor moves with the noise of every update; the policy has a moving average of its weights.
    """

    def __init__(self, env: HedgingEnv, hidden: int):
        super().__init__()
        size, actions = env.single_observation_space.shape[0], env.single_action_space.shape[0]
        self.actor = nn.Sequential(
            nn.Linear(size, hidden), nn.ReLU(True), nn.Linear(hidden, hidden), nn.ReLU(True),
            nn.Linear(hidden, 2 * actions),
        )  # fmt: skip
        with torch.no_grad():  # starts at the band that `fit` finds
            self.actor[-1].weight.mul_(0.01)
            self.actor[-1].bias.copy_(torch.tensor([0.0, 0.0, -1.0, -1.0]))
        self.average_actor = copy.deepcopy(self.actor).requires_grad_(False)
        self.critic = Twin(size, hidden)
        self.target_critic = Twin(size, hidden).requires_grad_(False)
        self.target_critic.load_state_dict(self.critic.state_dict())
        self.log_alpha = nn.Parameter(torch.zeros(()))
        # Observations are standardised, in natural units, by what a constant band met before training, and the agent's
        # bands have its half-width as their unit. Saved with the policy, which so means the same in any other market.
        self.register_buffer("observation_mean", torch.zeros(size))
        self.register_buffer("observation_std", torch.ones(size))
        self.register_buffer("half_width", torch.ones(()))  # shares
        self.register_buffer("offset", torch.ones(()))  # shares
        self.register_buffer("reward_unit", torch.ones(()))  # currency
        self.register_buffer("observation_units", env.observation_units.clone(), persistent=False)

    @torch.no_grad()
    def fit(self, env: HedgingEnv) -> None:
        """Finds the units of rewards and bands and the scales of the observation on a market apart."""
        env.reset(seed=benchmark.SCALE_SEED)
        cost = benchmark.play(env, baselines.black_scholes_delta(env))["cost"].mean()
        self.reward_unit.fill_(cost if cost > 1e-4 else 1.0)
        (width,) = benchmark.tune(env, lambda width: baselines.constant_band(env, width), [0.1], [1.3])
        self.half_width.fill_(width)
        # Where volatility moves with the spot, the best centre is about the minimum-variance delta, at any cost.
        minimum_variance, offsets = baselines.minimum_variance_delta(env), []
        observation, _ = env.replay()
        seen = []
        for _ in range(env.num_steps):
            seen.append(observation * self.observation_units)
            offsets.append(minimum_variance(observation)[:, 0])
            observation, *_ = env.step(self.to_band(observation.new_zeros(env.num_envs, 2)))
        self.offset.copy_(2.0 * torch.maximum(self.half_width, torch.cat(offsets).square().mean().sqrt()))
        mean, std = torch.cat(seen).mean(0), torch.cat(seen).std(0)
        self.observation_mean.copy_(mean)
        # What never varies in training (gbm's volatility) must not be blown up where it differs, in another market.
        self.observation_std.copy_(torch.where(std < 1e-3, 1.0, std))

    def normalise(self, observation: Tensor) -> Tensor:
        natural = observation * self.observation_units
        return ((natural - self.observation_mean) / self.observation_std).clamp(-10, 10)

    def head(self, actor: nn.Module, observation: Tensor) -> tuple[Tensor, Tensor]:
        """Observation (n, size) → mean and logarithmic standard deviation (n, 2) of the Gaussian to be squashed."""
        book = self.normalise(observation)
        book[:, hedging.NET_DELTA] = 0.0
        mean, log_std = actor(book).chunk(2, -1)
        return mean, log_std.clamp(-5, 1)

    def to_band(self, action: Tensor) -> Tensor:
        """Action (n, 2) in (−1, 1) → (centre offset, half-width) in shares; zero is the best constant band."""
        return torch.stack((self.offset * action[:, 0], self.half_width * torch.exp(1.5 * action[:, 1])), -1)

    def act(self, observation: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Observation (n, size), normals (n, 2) → action (n, 2) in (−1, 1) and its log-probability (n,)."""
        mean, log_std = self.head(self.actor, observation)
        raw = mean + log_std.exp() * noise
        log_slope = 2 * (math.log(2) - raw - nn.functional.softplus(-2 * raw))  # ln(1 − tanh²), stable where it is tiny
        logprob = -0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi) - log_slope
        return torch.tanh(raw), logprob.sum(-1)

    def policy(self, observation: Tensor) -> Tensor:
        """The deterministic policy that is benchmarked: observation (n, size) → environment action (n, 2)."""
        return self.to_band(torch.tanh(self.head(self.average_actor, observation)[0]))


# ALGO LOGIC: SAC


class ReplayBuffer(nn.Module):
    """The last `capacity` transitions, as preallocated tensors on the device; a module, so that it can be saved.

    An action is kept as what it did: the net delta after the trade, which the critics take in place of the one before.
    """

    def __init__(self, capacity: int, observation_size: int):
        super().__init__()
        self.register_buffer("observations", torch.zeros(capacity, observation_size))
        self.register_buffer("net_deltas", torch.zeros(capacity))  # after the trade, in the observation's units
        self.register_buffer("rewards", torch.zeros(capacity))  # scaled, without the cost of the trade
        self.register_buffer("next_observations", torch.zeros(capacity, observation_size))
        self.register_buffer("dones", torch.zeros(capacity))
        self.register_buffer("position", torch.zeros((), dtype=torch.long))  # tensors, so that a CUDA graph sees them
        self.register_buffer("filled", torch.zeros((), dtype=torch.long))

    @property
    def columns(self) -> tuple[Tensor, ...]:
        """What a transition is made of, in the order of `add` and `sample`."""
        return self.observations, self.net_deltas, self.rewards, self.next_observations, self.dones

    @staticmethod
    def bytes_needed(capacity: int, observation_size: int) -> int:
        return 4 * capacity * (2 * observation_size + 3)

    def add(self, *columns: Tensor) -> None:
        """Writes (n, …) observations, net deltas, rewards, next observations and dones over the oldest."""
        capacity, n = len(self.rewards), len(columns[0])
        rows = (self.position + torch.arange(n, device=self.rewards.device)) % capacity
        for kept, column in zip(self.columns, columns, strict=True):
            kept.index_copy_(0, rows, column)
        self.position.copy_((self.position + n) % capacity)
        self.filled.copy_((self.filled + n).clamp(max=capacity))

    def sample(self, size: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """`size` transitions, uniformly, with replacement."""
        u = torch.rand(size, generator=generator, device=self.rewards.device, dtype=torch.float64)
        rows = (u * self.filled).long()
        return tuple(kept[rows] for kept in self.columns)


@torch.no_grad()
def rollout(env: HedgingEnv, agent: Agent, buffer: ReplayBuffer, args: Args, generator, explore: bool) -> None:
    """Plays one whole episode in every environment into the buffer: by the policy in some of them, and at random in
    `args.random_share` of them, or with `explore` in all. Else the critics would see no net delta far from the policy's
    own bands, and forget what is wrong with it."""
    scale, dt = args.reward_scale / agent.reward_unit, env.dynamics.dt
    minimum_variance = baselines.minimum_variance_delta(env)
    num_random = env.num_envs if explore else round(args.random_share * env.num_envs)
    observation, _ = env.reset()
    for _ in range(env.num_steps):
        noise = torch.randn(env.num_envs, 2, generator=generator, device=env.device)
        action, _ = agent.act(observation, noise)
        action[:num_random] = torch.erf(noise[:num_random] / math.sqrt(2))  # uniform in (−1, 1)
        band = agent.to_band(action)
        after, trade_cost = env.after_trade(observation, band)
        net_delta = env.book_scale * after[:, hedging.NET_DELTA]
        centre, spot_variance = minimum_variance(observation)[:, 0], env.spot[env.t] ** 2 * env.variance[env.t] * dt
        risk = 0.5 * env.risk_aversion * spot_variance * net_delta * (net_delta - 2 * centre)
        next_observation, _, terminated, _, info = env.step(band)
        # Not the raw reward, but one with the same optimum and a small part of its noise: the gain over Black–Scholes
        # delta hedging on the same path. ΔW has mean zero, and so has all that the policy cannot change. Of ½ΔW², less
        # the hedger's own, stands the expectation, to first order: least at the minimum-variance delta. The cost of
        # this trade is known to the critics; the hedger's is that of its *next* trade. (Its last one was known before
        # ours, and the net delta would stand in for it.)
        reward = scale * (info["hedged_cost"] - (info["cost"] - trade_cost) - risk)
        buffer.add(observation, after[:, hedging.NET_DELTA], reward, next_observation, terminated.float())
        observation = next_observation


def sac_loss(agent: Agent, env: HedgingEnv, batch: tuple[Tensor, ...], noise: Tensor, args: Args):
    """Losses of critics, actor and temperature, summed (they share no gradient), and their parts."""
    observations, net_deltas, rewards, next_observations, dones = batch

    def value(critic, observation: Tensor, action: Tensor, **options) -> Tensor:
        """min Q(s, a) of the twins: the known cost of the trade, and what the critics say of the book after it."""
        after, cost = env.after_trade(observation, agent.to_band(action))
        return critic(agent.normalise(after), **options).amin(0) - args.reward_scale / agent.reward_unit * cost

    alpha = agent.log_alpha.exp()
    with torch.no_grad():
        next_actions, next_logprobs = agent.act(next_observations, noise[0])
        next_values = value(agent.target_critic, next_observations, next_actions) - alpha * next_logprobs
        targets = rewards + args.gamma * (1 - dones) * next_values  # expiry is terminal
    traded = hedging.with_net_delta(observations, net_deltas)
    critic_loss = (agent.critic(agent.normalise(traded)) - targets).square().mean(-1).sum()
    actions, logprobs = agent.act(observations, noise[1])
    values = value(agent.critic, observations, actions, frozen=True)
    actor_loss = (alpha.detach() * logprobs - values).mean()
    alpha_loss = -(alpha * (logprobs.detach().mean() + args.target_entropy)) if args.autotune else 0.0 * alpha
    loss = critic_loss + actor_loss + alpha_loss
    with torch.no_grad():
        parts = torch.stack((critic_loss, actor_loss, values.mean(), -logprobs.mean(), alpha))
    return loss, parts


LOSS_NAMES = ("losses/critic_loss", "losses/actor_loss", "losses/q_value", "losses/entropy", "losses/alpha")
METRICS = (
    "global_step", "charts/updates", "charts/objective", "charts/gain_over_black_scholes",
    "charts/share_of_gap_closed", "charts/SPS", "charts/learning_rate", *LOSS_NAMES,
)  # fmt: skip


def update(agent: Agent, env, optimizer, buffer: ReplayBuffer, loss_function, args: Args, generator, updates: int):
    """`updates` gradient updates. Returns the mean of the loss parts (5,) and never waits for the device."""
    parts = []
    targets, critics = list(agent.target_critic.parameters()), list(agent.critic.parameters())
    averages, actors = list(agent.average_actor.parameters()), list(agent.actor.parameters())
    for _ in range(updates):
        noise = torch.randn(2, args.batch_size, 2, generator=generator, device=buffer.rewards.device)
        loss, loss_parts = loss_function(agent, env, buffer.sample(args.batch_size, generator), noise, args)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(targets, critics, args.tau)
            torch._foreach_lerp_(averages, actors, args.average)
        parts.append(loss_parts)
    return torch.stack(parts).mean(0)


def train(args: Args, model: dynamics.Dynamics, run_dir: Path, device: torch.device, checkpoint: dict | None, tracker):
    """Trains from scratch or from `checkpoint`; logs, evaluates and saves `args.num_evaluations` times.

    Returns the agent and the environment steps it was trained for."""
    torch.manual_seed(args.seed)
    env = make_env(args, model, args.num_envs, device)
    size = env.single_observation_space.shape[0]
    buffer = ReplayBuffer(args.buffer_size, size).to(device)
    agent = Agent(env, args.hidden_size).to(device)
    agent.fit(make_env(args, model, 1024, device))
    agent.log_alpha.data.fill_(math.log(args.alpha))
    trained = [parameter for parameter in agent.parameters() if parameter.requires_grad]
    # A tensor as learning rate, so that a captured update sees it change
    optimizer = torch.optim.Adam(
        trained, lr=torch.tensor(args.learning_rate, device=device), fused=True, capturable=device.type == "cuda"
    )
    generator = torch.Generator(device).manual_seed(args.seed + EXPLORATION_SEED)  # also samples the buffer
    env.generator.manual_seed(args.seed)  # the market

    episode = args.num_envs * args.num_steps
    num_iterations = args.total_timesteps // episode
    updates = max(1, round(args.utd * episode))
    warm_up = math.ceil(args.learning_starts / episode)  # iterations of random actions
    used = updates * args.batch_size / episode
    print(f"each iteration: {episode:,} environment steps, then {updates} updates of {args.batch_size} transitions, so")
    print(f"updates to data 1 to {episode / updates:,.0f}; each step is used {used:.2g} times")
    evaluations = {math.ceil(num_iterations * (i + 1) / args.num_evaluations) for i in range(args.num_evaluations)}
    first, rows, done, refill = 1, None, 0, 0
    if checkpoint is not None:
        try:
            agent.load_state_dict(checkpoint["agent"])
            optimizer.load_state_dict(checkpoint["optimizer"])
            for group in optimizer.param_groups:  # read onto the CPU, where a captured update would not see it change
                group["lr"] = group["lr"].to(device)
            generator.set_state(checkpoint["generator"])
            env.generator.set_state(checkpoint["market_generator"])
            first, rows, done = checkpoint["iteration"] + 1, int(checkpoint["rows"]), int(checkpoint["updates"])
            if checkpoint["buffer"] is not None:
                buffer.load_state_dict(checkpoint["buffer"])
            else:
                refill = warm_up  # by the policy as it is
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
            raise runs.UsageError(f"{run_dir}: does not fit this script, or was made on another device") from None
    metrics = runs.MetricsFile(run_dir / "metrics.csv", METRICS, resume_from=rows)

    def save(iteration: int) -> None:
        if args.save_model:
            content = {"phase": PHASE, "args": asdict(args), "iteration": iteration, "rows": metrics.rows}
            content |= {"agent": agent.state_dict(), "optimizer": optimizer.state_dict()}
            content |= {"generator": generator.get_state(), "market_generator": env.generator.get_state()}
            content |= {"updates": done, "buffer": buffer.state_dict() if args.save_buffer else None}
            content |= {"tracker": tracker.id if tracker else None}
            runs.save_checkpoint(run_dir / "checkpoint.pt", content)

    validation = benchmark.hedging_validation(make_env(args, model, 4096, device))
    if checkpoint is None:  # the untrained policy, for the learning curve
        metrics.write({"global_step": 0, **validation(agent.policy)})
        save(0)
    loss_function = torch.compile(sac_loss) if args.compile else sac_loss

    def iterate() -> Tensor:
        rollout(env, agent, buffer, args, generator, explore=False)
        return update(agent, env, optimizer, buffer, loss_function, args, generator, updates)

    learn = iterate
    progress = tqdm(total=num_iterations * episode, initial=(first - 1) * episode, unit="step", unit_scale=True)
    progress.set_description("gain over Black–Scholes —")
    clock, clock_steps = time.perf_counter(), 0
    losses = None
    for iteration in range(first, num_iterations + 1):
        if args.anneal_lr:
            optimizer.param_groups[0]["lr"].fill_(args.learning_rate * (1 - (iteration - 1) / num_iterations))
        if iteration <= warm_up or iteration < first + refill:
            rollout(env, agent, buffer, args, generator, explore=iteration <= warm_up)
        else:
            if args.cudagraphs and learn is iterate:
                everything = nn.ModuleList([agent, buffer])
                learn = runs.cuda_graph(iterate, everything, optimizer, [generator, env.generator])
            losses = learn()
            done += updates
        clock_steps += episode
        progress.update(episode)
        if iteration not in evaluations:
            continue
        row = {"global_step": iteration * episode, "charts/updates": done}
        if losses is not None:  # there have been updates
            row |= dict(zip(LOSS_NAMES, losses.tolist(), strict=True))  # waits for the device, so the speed is honest
        row["charts/SPS"] = int(clock_steps / (time.perf_counter() - clock))
        row["charts/learning_rate"] = optimizer.param_groups[0]["lr"].item()
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
    return agent, num_iterations * episode


# BENCHMARK


def run_benchmark(args: Args, model: dynamics.Dynamics, agent: Agent, steps: int, run_dir: Path, device: torch.device):
    """The agent against every baseline and the exact optimum on fresh episodes; writes report and figures."""
    contest = benchmark.hedging_contest(
        lambda model, num_envs: make_env(args, model, num_envs, device), model, agent.policy, args.eval_episodes
    )
    settings = {"dynamics": args.dynamics, "cost_rate": args.cost_rate, "risk_aversion": args.risk_aversion}
    settings |= {"num_strikes": args.num_strikes, "expiries": list(args.expiries), "arrival_rate": args.arrival_rate}
    settings |= {"mean_order_size": args.mean_order_size, "client_spread": args.client_spread}
    settings |= {"run seed": args.seed, "training steps": steps}
    if args.dynamics == "historical":
        settings |= {"closes": args.history or "S&P 500", "model fitted until": str(model.dates[0])}
    title = f"Phase 2 ({args.dynamics}, cost {1e4 * args.cost_rate:g} bp, risk aversion {args.risk_aversion:g})"
    result = benchmark.judge_hedging(title, settings, contest, share_required=0.95)
    result.write(run_dir)
    if args.dynamics == "historical":
        apart = contest.non_overlapping(args.num_steps)
        benchmark.judge_hedging(f"{title}, non-overlapping windows", settings, apart).write(
            run_dir, "benchmark_non_overlapping"
        )
        figures.advantage_by_date(run_dir / "advantage_by_date.png", model.dates, contest, title)
    figures.hedging_report(run_dir, title, contest)
    figures.book_episode(run_dir / "book_episode.png", title, contest)
    return result


# MAIN


def start_tracker(args: Args, run_dir: Path, run_id: str | None):
    """Weights & Biases, or None. Online or offline as WANDB_MODE says."""
    if not args.track:
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
        with artifact.new_file("checkpoint.pt", mode="wb") as file:  # without the buffer: what --evaluate needs
            torch.save({**runs.load_checkpoint(run_dir, PHASE), "buffer": None}, file)
        tracker.log_artifact(artifact)
    here = Path(__file__).parent
    code = {here / Path(__file__).name, *(here / "envs").glob("*.py")}
    tracker.log_code(str(here), include_fn=lambda path: Path(path) in code)
    tracker.finish()


def load_agent(args: Args, checkpoint: dict, env: HedgingEnv) -> Agent:
    """The agent of a checkpoint, to be evaluated in another market than it was trained in, but not on its own past."""
    agent = Agent(env, args.hidden_size).to(env.device)
    try:
        agent.load_state_dict(checkpoint["agent"])
    except (RuntimeError, AttributeError, TypeError):
        raise runs.UsageError(f"{args.evaluate}: does not fit this script, its networks have other shapes") from None
    runs.check(all(x.isfinite().all() for x in agent.state_dict().values()), f"{args.evaluate}: NaN in its networks")
    trained = runs.saved_args(Args, checkpoint["args"], args.evaluate)
    for name, known, book in (
        ("--num-strikes is", trained.num_strikes, args.num_strikes),
        ("--expiries has", len(trained.expiries), len(args.expiries)),
    ):
        runs.check(known == book, f"{name} {book}, but the agent was trained with {known}: its book is another one")
    if args.dynamics == "historical" and trained.dynamics == "garch":
        seen = trained.history_end
        apart = trained.history == args.history and seen is not None and seen <= args.history_end
        until = f"closes of {trained.history or 'the S&P 500'} until {seen or 'their end'}"
        runs.check(apart, f"--history-end is {args.history_end}, but the agent was trained on {until}")
    return agent


def main(argv) -> bool:
    """Runs the command; True if the benchmark passed."""
    resume_needs = ("rows", "optimizer", "generator", "market_generator", "updates", "buffer", "tracker")
    args, checkpoint = runs.parse_command(Args, argv, PHASE, resume_needs)
    validate(args)
    model = make_dynamics(args)
    torch.set_num_threads(args.torch_threads)
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    name = f"{args.dynamics}__{args.exp_name}__{'evaluate__' if args.evaluate else ''}{args.seed}"
    run_dir = Path(args.resume or f"runs/{name}__{time.strftime('%Y%m%d-%H%M%S')}")
    if args.evaluate is not None:
        agent = load_agent(args, checkpoint, make_env(args, model, 1, device))
        trained = runs.saved_args(Args, checkpoint["args"], args.evaluate)
        steps = trained.num_envs * trained.num_steps * checkpoint["iteration"]
    else:
        size = make_env(args, model, 1, device).single_observation_space.shape[0]
        memory = ReplayBuffer.bytes_needed(args.buffer_size, size)
        runs.check_memory(memory, device, f"--buffer-size {args.buffer_size}")
    tracker = start_tracker(args, run_dir, checkpoint["tracker"] if args.resume and checkpoint else None)
    if args.resume is None:
        run_dir = runs.new_folder(run_dir)
        runs.write_json(run_dir / "args.json", asdict(args))
    print(f"{run_dir}: {args.dynamics} on {device}; trading days (252 a year), money in the currency of S = 100")
    if args.evaluate is None:
        print(f"replay buffer: {args.buffer_size:,} transitions, {memory / 2**20:,.0f} MiB on {device}")
        agent, steps = train(args, model, run_dir, device, checkpoint, tracker)
    result = run_benchmark(args, model, agent, steps, run_dir, device)
    print(f"\n{result.title}\n\n{result.table()}\n\n{result.verdict()}\nreport and figures: {run_dir}")
    if tracker:
        finish_tracker(tracker, result, run_dir)
    return result.passed


if __name__ == "__main__":
    runs.run(main, sys.argv[1:])
