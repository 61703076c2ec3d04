"""The classical makers, tuned, and the benchmark of a maker against them.

What `envs.benchmark` is to hedging: the same seat, rivals and takers for every contestant, tuned baselines, a verdict.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from envs import baselines, optimum
from envs.baselines import Policy
from envs.benchmark import (
    BENCHMARK_SEED,
    TUNING_SEED,
    Benchmark,
    Contest,
    Estimate,
    compare,
    evaluate,
    play,
    relative_gain,
    tune,
    windows_played,
)
from envs.dynamics import GBM
from envs.quoting import AgainstRivals, QuotingEnv

NAMED_MAKER = "Avellaneda–Stoikov, tuned"  # the baseline that the user named, hedged at the Black–Scholes delta
CONSTANT_SPREAD, GLFT = "constant spread, tuned", "GLFT, tuned"
STRONGEST_MAKER = "GLFT, min-variance band, tuned"
INVENTORY_DP = "dynamic programming, tuned"  # under gbm
BEST_RESPONSE = "best response (exact)"  # under gbm without risk aversion and costs
RIVAL = "rival"
RISK_NEUTRAL = 1e-6  # the risk aversion of a formula that divides by it, where there is none
NEVER_HEDGED = 1e3  # half-width of a band, shares
COARSE_TO_FINE = (1.3, 1.08)  # ratios of the grids that parameters are tuned on
RECORDED = Path(__file__).with_name("tuned_makers.json")  # written by benchmarks/tune_makers.py

Parameters = dict[str, tuple[float, ...]]

QUOTING_COLUMNS = {
    "objective": "objective",
    "pnl_mean": "P&L mean",
    "pnl_sd": "P&L sd",
    "cvar95": "CVaR95",
    "income": "edge earned",
    "cost": "hedging cost",
    "market_share": "market share",
    "half_spread": "half-spread",
    "net_delta": "|net delta|",
    "delta_share": "of gross delta",
    "net_vega": "|net vega|",
}


def _policy(name: str, env: AgainstRivals, parameters: Sequence[float]) -> Policy:
    """The maker of that name in the seat of `env`."""
    market = env.env
    if name == NAMED_MAKER:
        return baselines.avellaneda_stoikov(market, *parameters)
    if name == CONSTANT_SPREAD:
        return baselines.constant_spread(market, *parameters)
    if name == GLFT:
        return baselines.glft(market, *parameters)
    if name == STRONGEST_MAKER:
        return baselines.minimum_variance_band(market, baselines.glft(market, *parameters[:2]), parameters[2])
    if name == INVENTORY_DP:
        return optimum.optimal_quotes(env, *parameters)
    raise ValueError(f"no maker is called {name!r}")


@dataclass
class Makers:
    """The classical makers, tuned, in the market that the agent enters.

    `env` is that market from the agent's seat (its `like` has it in any size); `policies` by name, what an agent has to
    beat in its seat; `parameters` by the same names, and the rival's: risk aversion and k (then the band in shares, or
    the rival's multiple of the spread); `origin` says where they come from.
    """

    env: AgainstRivals
    policies: dict[str, Policy]
    parameters: Parameters
    origin: str


def against(market: QuotingEnv, rival: Sequence[float]) -> AgainstRivals:
    """The market from one seat, every other taken by the Avellaneda–Stoikov maker with these parameters."""
    return AgainstRivals(market, [baselines.avellaneda_stoikov(market, *rival)] * (market.num_makers - 1))


def tune_rival(market: QuotingEnv) -> tuple[float, float]:
    """Risk aversion and k of the Avellaneda–Stoikov maker that is tuned against makers like itself.

    Tunes one seat against rivals with the parameters found before, until they repeat; six times at most, and then they
    are off by a step or two of the grid.
    """
    rivals, parameters = None, (start := (max(0.25 * market.risk_aversion, RISK_NEUTRAL), 0.8))
    for _ in range(6):
        if parameters == rivals:
            break
        rivals = parameters
        env = against(market, rivals)
        env.reset(seed=TUNING_SEED)
        parameters = _tune(NAMED_MAKER, env, rivals, globally=rivals == start)
    return rivals


def _tune(name: str, env: AgainstRivals, start: Sequence[float], globally: bool = False) -> tuple[float, ...]:
    """Parameters of the maker, from `start`; those whose best value in this market is 0 or ∞ are set to it.

    Without risk aversion nothing is hedged that costs anything, and where hedging is free there is no band. Quotes too
    wide for any trade are a local optimum, so a search can go on `globally`, from the best of eight starts.
    """
    market, start = env.env, tuple(start)
    first, last = 0, len(start)
    if market.risk_aversion == 0 and name != CONSTANT_SPREAD:
        first, start = 1, (RISK_NEUTRAL, *start[1:])
    if len(start) == 3 and (market.risk_aversion == 0 or market.cost_rate == 0):
        last, start = 2, (*start[:2], 0.0 if market.cost_rate == 0 else NEVER_HEDGED)

    def family(*free: float) -> Policy:
        return _policy(name, env, (*start[:first], *free, *start[last:]))

    def value(free: Sequence[float]) -> float:
        return play(env, family(*free))["objective_centred"].mean()

    starts = [start[first:last]]
    if globally and first == 0:
        starts = [(start[0] * x, start[1] * y) for x in (0.25, 1.0, 4.0, 16.0) for y in (0.5, 1.0)]
    return (*start[:first], *tune(env, family, max(starts, key=value), COARSE_TO_FINE), *start[last:])


def tune_makers(market: QuotingEnv, start: tuple[float, float], rival: tuple[float, ...]) -> Parameters:
    """Parameters of every classical maker, tuned against `rival` from risk aversion and k of `start`; and rival's."""
    env = against(market, rival)
    env.reset(seed=TUNING_SEED)
    found = {
        RIVAL: rival,
        CONSTANT_SPREAD: _tune(CONSTANT_SPREAD, env, (1.2,)),
        NAMED_MAKER: _tune(NAMED_MAKER, env, start, True),
    }
    found[GLFT] = _tune(GLFT, env, (5.0 * start[0], start[1]), True)
    found[STRONGEST_MAKER] = _tune(STRONGEST_MAKER, env, (*found[GLFT], 0.15))
    if isinstance(market.dynamics, GBM) and market.risk_aversion > 0:
        found[INVENTORY_DP] = _tune(INVENTORY_DP, env, (2.0 * market.risk_aversion, 0.2, 0.05))
    return found


def describe(market: QuotingEnv) -> str:
    """What the makers' parameters depend on, in words that are the same on every machine."""
    beside = ("num_envs", "dynamics", "privileged", "device", "dtype")
    settings = {name: value for name, value in market.settings.items() if name not in beside}
    model = ", ".join(f"{name} {value:.4g}" for name, value in market.dynamics.parameters().items())
    parts = [f"{type(market.dynamics).__name__} ({model})"]
    for name, value in settings.items():
        value = value if isinstance(value, Sequence) else (value,)
        parts.append(f"{name} {' '.join(f'{x:.4g}' for x in value)}")
    return ", ".join(parts)


def classical_makers(market: QuotingEnv, rival_spread: float = 1.0, rival_risk_aversion: float = 1.0) -> Makers:
    """The rivals, Avellaneda–Stoikov makers tuned against each other, and every classical maker tuned against them.

    The parameters are those recorded in tuned_makers.json if this market is there, and are tuned now if not.

    Args:
        market: its number of rows is the number of episodes that tuning plays.
        rival_spread, rival_risk_aversion: multiples of the tuned rival's half-spread and risk aversion.
    """
    recorded = json.loads(RECORDED.read_text(encoding="utf-8")) if RECORDED.exists() else {}
    known = recorded.get(describe(market))
    if known and rival_spread == rival_risk_aversion == 1.0:
        origin = f"recorded, tuned on {known['episodes']:,} episodes of seed {known['seed']}"
        return assemble(market, known["parameters"], origin)
    risk_aversion, k = known["parameters"][RIVAL][:2] if known else tune_rival(market)
    rival = (rival_risk_aversion * risk_aversion, k, rival_spread)
    parameters = tune_makers(market, (risk_aversion, k), rival)
    return assemble(market, parameters, f"tuned on {market.num_envs:,} episodes of seed {TUNING_SEED}")


def assemble(market: QuotingEnv, parameters: Mapping[str, Sequence[float]], origin: str) -> Makers:
    """The makers with these parameters, the rival's among them, in this market."""
    parameters = {name: tuple(values) for name, values in parameters.items()}
    env = against(market, parameters[RIVAL])
    policies = {name: _policy(name, env, values) for name, values in parameters.items() if name != RIVAL}
    return Makers(env, policies, parameters, origin)


def quoting_contest(makers: Makers, agent: Policy, episodes: int, replayed: AgainstRivals | None = None) -> Contest:
    """Plays the agent and every classical maker, in the same seat and with the same takers, on fresh episodes.

    Under gbm with them the inventory dynamic programming, tuned too, or, without risk aversion and costs, the best
    response, which is exact.

    Args:
        episodes: number of episodes.
        replayed: the market over real closes, one row for every window: these are the episodes then.
    """
    market, policies, best = makers.env.env, {"agent": agent, **makers.policies}, STRONGEST_MAKER
    exact = isinstance(market.dynamics, GBM) and market.risk_aversion == market.cost_rate == 0
    if exact:
        best = BEST_RESPONSE
        policies[best] = optimum.optimal_quotes(makers.env)
    elif INVENTORY_DP in policies:
        best = INVENTORY_DP
    settings = {f"{name}: parameters": list(values) for name, values in makers.parameters.items()}
    settings |= {"parameters of the makers": makers.origin, "benchmark seed": BENCHMARK_SEED}
    env = makers.env.like(min(4096, episodes)) if replayed is None else replayed
    if replayed is not None:
        episodes = env.num_envs
        settings["windows"] = windows_played(env.env.dynamics, env.num_steps)
    played = evaluate(env, policies, episodes, BENCHMARK_SEED)
    # Windows that overlap share days: blocks of twice their length cover the dependence.
    block = 1 if replayed is None else 2 * market.num_steps
    return Contest(policies, played, makers.parameters, best, exact, block, settings, makers.env)


@torch.no_grad()
def edge_error(env: AgainstRivals, policy: Policy) -> float:
    """Mean of |edge / best response − 1| over both sides and all steps of the environment's current market.

    The best response is to what the rivals quote in that very step, as if nothing were risked and hedging free.
    """
    market, total = env.env, 0.0
    observation, _ = env.replay()
    for _ in range(env.num_steps):
        observation, *_ = env.step(policy(observation))
        rivals = market.edges[:, env.other_seats].transpose(1, 2)
        best = optimum.best_response(rivals, market.choice_sensitivity, market.reference_edge)
        total += float((market.edges[:, env.seat] / best - 1.0).abs().mean())
    return total / env.num_steps


def quoting_benchmark(title: str, settings: dict, contest: Contest) -> tuple[Benchmark, dict[str, Estimate]]:
    """The benchmark of a maker before its verdict, and how far it is above the named baseline, as a share of that."""
    agent, named = contest.played["agent"], contest.played[NAMED_MAKER]
    settings = {**settings, "episodes": len(agent["pnl"]), **contest.settings}
    result = compare(title, settings, contest.played, "agent", contest.block, QUOTING_COLUMNS)
    gains = {}
    for name, label in (("objective", "objective"), ("pnl", "mean P&L")):
        if named[name].mean() > 0:  # or a share of it means nothing
            gains[label] = relative_gain(agent[name], named[name], contest.block)
            result.shares[f"{label} above {NAMED_MAKER}"] = gains[label]
    return result, gains


def require_episodes(result: Benchmark) -> None:
    """Adds the criterion that enough episodes were played; on real closes there are as many as there are."""
    if "windows" not in result.settings:
        episodes = result.settings["episodes"]
        result.require("has 8,192 episodes or more", episodes >= 8192, f"{episodes:,}")


def judge_quoting(title: str, settings: dict, contest: Contest, default_market: bool) -> Benchmark:
    """The verdict on a maker: it must beat every classical one in its seat, with the same takers.

    In the default market by how much: an objective 30 % and a mean P&L 12 % above the named baseline's at no higher a
    standard deviation, and 0.2 of objective above the strongest. Under gbm, within 0.03 of the dynamic programming;
    where nothing is risked and hedging is free, an edge within 3 % of the best response.
    """
    played = contest.played
    result, gains = quoting_benchmark(title, settings, contest)
    rows = result.rows
    if contest.exact:
        env = contest.env.like(4096)
        env.reset(seed=BENCHMARK_SEED)
        error = edge_error(env, contest.policies["agent"])
        result.require("edge within 3 % of the best response", error <= 0.03, f"{100 * error:.2f} % off on average")
    else:
        for name in contest.parameters:
            if name in played and name != INVENTORY_DP:
                result.require_advantage(name)
    if contest.best != STRONGEST_MAKER:
        difference = result.advantages[contest.best]
        result.require(f"within 0.03 of {contest.best}", difference.mean >= -0.03, str(difference))
    if default_market:
        for label, bar in (("objective", 0.30), ("mean P&L", 0.12)):
            gain = gains[label].mean if label in gains else float("nan")
            result.require(f"{label} {100 * bar:g} % above {NAMED_MAKER}", gain >= bar, f"{100 * gain:+.1f} %")
        own, other = rows["agent"]["pnl_sd"], rows[NAMED_MAKER]["pnl_sd"]
        result.require(f"P&L sd no higher than of {NAMED_MAKER}", own <= other, f"{own:.3f}, {other:.3f}")
        margin = result.advantages[STRONGEST_MAKER].mean
        result.require(f"0.2 above {STRONGEST_MAKER}", margin >= 0.2, f"{margin:+.4f}")
    require_episodes(result)
    return result


SPREADS, RISK_AVERSIONS = (0.6, 0.8, 1.0, 1.25, 1.6), (0.25, 0.5, 1.0, 2.0, 4.0)


def rival_sweep(
    contest: Contest, names: Sequence[str], episodes: int = 1024
) -> dict[str, dict[float, dict[str, float]]]:
    """Objectives against other rivals than the agent was trained against: multiples of their spread and risk aversion.

    Returns:
        "half-spread" and "risk aversion" → multiple → contestant → mean objective, without the market's noise.
    """
    market, (risk_aversion, k, spread) = contest.env.env.like(episodes), contest.parameters[RIVAL]
    market.reset(seed=BENCHMARK_SEED)
    sweep = {"half-spread": {}, "risk aversion": {}}
    variants = [("half-spread", x, (risk_aversion, k, x * spread)) for x in SPREADS]
    variants += [("risk aversion", x, (x * risk_aversion, k, spread)) for x in RISK_AVERSIONS]
    for what, multiple, arguments in variants:
        env = against(market, arguments)
        sweep[what][multiple] = {
            name: float(play(env, contest.policies[name])["objective_centred"].mean()) for name in names
        }
    return sweep
