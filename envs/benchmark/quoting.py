"""The benchmark of a maker: the same seat, rivals and takers for every contestant."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from envs.benchmark.bars import QUOTING, QUOTING_KNOWN
from envs.benchmark.contest import Contest, Validation, play, play_fresh, real_closes, require_episodes
from envs.benchmark.makers import (
    AVELLANEDA_STOIKOV,
    BELIEVER_BAND,
    BEST_RESPONSE,
    KNOWING,
    RIVAL,
    Makers,
    against_rival,
)
from envs.benchmark.report import Benchmark, Episodes, Estimate, Table, compare, relative_gain
from envs.market.dynamics import Dynamics
from envs.market.hedging import Policy
from envs.market.history import Historical
from envs.market.quoting import ASK, QuotingEnv
from envs.market.rivals import AgainstRivals
from envs.optimum.edges import best_edge
from envs.optimum.makers import BestResponse
from envs.run.seeds import BENCHMARK_SEED

COLUMNS = {  # key in a contestant's row → title in the table
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
SPREADS = (0.6, 0.8, 1.0, 1.25, 1.6)  # of the rivals in `rival_sweep`, multiples of what they are in the benchmark
RISK_AVERSIONS = (0.25, 0.5, 1.0, 2.0, 4.0)


def quoting_validation(classics: Makers, episodes: int) -> Validation:
    """`Validation` beside Avellaneda–Stoikov in the same seat."""
    return Validation(classics.env.like(episodes), classics.policies[AVELLANEDA_STOIKOV], "Avellaneda–Stoikov")


def quoting_benchmark(
    *,
    title: str,
    settings: dict,
    agent: Policy,
    classics: Makers,
    make_market: Callable[[Dynamics, int], QuotingEnv],
    model: Dynamics,
    episodes: int,
    default_market: bool,
) -> tuple[Benchmark, Contest]:
    """The benchmark of a maker: the contest and its verdict.

    Args:
        title, settings: of the report.
        classics: the classical makers in the market that they know.
        make_market: (model, number of environments) → market.
        model: of the underlying; with `Historical`, all its windows are the episodes.
        episodes: number of episodes otherwise.
        default_market: whether the bars of the default market apply.
    """
    contest = quoting_contest(title, classics, agent, make_market, model, episodes)
    result = judge_quoting(settings, contest, default_market)
    if contest.dates is not None:
        apart = contest.non_overlapping()
        result.others["benchmark_non_overlapping"] = judge_quoting(settings, apart, default_market)
    contest.sweep = rival_sweep(contest)
    result.files["rival_sweep.json"] = contest.sweep
    return result, contest


def quoting_contest(
    title: str,
    classics: Makers,
    agent: Policy,
    make_market: Callable[[Dynamics, int], QuotingEnv],
    model: Dynamics,
    episodes: int,
) -> Contest:
    """Plays the agent and every classical maker, in the same seat and with the same takers, on fresh episodes.

    Without risk aversion and costs also the best response, which is exact. Arguments as in `quoting_benchmark`.
    """
    market = classics.env.env
    policies = {"agent": agent, **classics.policies}
    exact = market.is_neutral
    if exact:
        policies[BEST_RESPONSE] = BestResponse(classics.env)
    settings = {f"{name}: parameters": list(values) for name, values in classics.parameters.items()}
    settings |= {"parameters of the makers": classics.origin, "benchmark seed": BENCHMARK_SEED}
    env = classics.env.like(min(4096, episodes))
    block = 1
    dates = None
    if isinstance(model, Historical):
        episodes = model.num_windows(market.num_steps)
        env = AgainstRivals(make_market(model, episodes), classics.env.rivals)
        settings |= real_closes(model, market.num_steps)
        block = 2 * market.num_steps  # windows that overlap share days: blocks of twice their length cover that
        dates = model.dates
    played = play_fresh(env, policies, episodes, BENCHMARK_SEED)
    best = BEST_RESPONSE if exact else strongest(played)
    return Contest(title, policies, played, classics.parameters, best, exact, block, settings, classics.env, dates)


def strongest(played: Mapping[str, Episodes]) -> str:
    """The classical maker with the highest mean objective."""
    return max((name for name in played if name != "agent"), key=lambda name: played[name]["objective"].mean())


@dataclass
class KnownEdges:
    """A maker's edges beside the exact ones.

    Attributes:
        edges, exact: (2, num_options) mean edges of asks and bids over the reference prices, vol points, over all
            takers who come: the maker's own, and the exact ones.
        apart: mean of `relative_error` in every single state, over options and sides; far from the money and near the
            end of an episode a state counts as much as any other, though hardly anything depends on it.
    """

    edges: np.ndarray
    exact: np.ndarray
    apart: float

    @property
    def off(self) -> np.ndarray:
        """(2, num_options), the relative error of the mean edges."""
        return relative_error(self.edges, self.exact)


def relative_error(edges, exact):
    """|edge − exact|/max(|exact|, 1 vol point), of arrays or tensors of one shape."""
    return abs(edges - exact) / abs(exact).clip(1.0)


def edge_table(**rows: np.ndarray) -> Table:
    """Edges (2, num_options) of asks and bids, a row for every name."""
    options = range(next(iter(rows.values())).shape[1])
    header = ["vol points", *(f"{side} {i}" for side in ("ask", "bid") for i in options)]
    return Table(header, [[name.replace("_", " "), *edges.flatten().tolist()] for name, edges in rows.items()])


@torch.no_grad()
def beside_best(env: AgainstRivals, policy: Policy) -> KnownEdges:
    """Plays the environment's current market and compares the policy's edges with the best response's.

    The best response is to what the rivals quote in that very step, as if nothing were risked and hedging free.
    """
    market = env.env
    sums = torch.zeros(2, 2, market.num_options, dtype=torch.float64, device=market.device)
    weight = torch.zeros(2, market.num_options, dtype=torch.float64, device=market.device)
    apart = 0.0
    observation, _ = env.replay()
    for t in range(env.num_steps):
        observation = env.advance(policy(observation))
        rivals = market.edges[:, env.other_seats].movedim(1, -1)
        arguments = (market.choice_sensitivity, market.reference_edge, market.gap[t], market.informed_share)
        best = best_edge(rivals, *arguments)
        own = market.edges[:, env.seat]
        takers = market.intensity[t][:, :, None] * market.vega[t][:, None]  # (n, 2, O), weighted by vega
        sums += torch.stack(((own * takers).sum(0), (best * takers).sum(0)))
        weight += takers.sum(0)
        apart += float(relative_error(own, best).mean())
    return KnownEdges(*(sums / weight).cpu().numpy(), apart / env.num_steps)


@torch.no_grad()
def learnt_smile(env: AgainstRivals, policy: Policy) -> tuple[np.ndarray, np.ndarray]:
    """Middles of the quotes without inventory at the start of an episode, and fair values, over the reference prices.

    Both (num_options,), vol points.
    """
    still = env.standing_still(1)
    action = env.env.by_name(policy(still.observe_at(0)))
    middle = 0.5 * (action["ask"] - action["bid"])[0]
    return middle.double().cpu().numpy(), still.env.gap[0, 0, ASK].double().cpu().numpy()


def require_smile(result: Benchmark, env: AgainstRivals, policy: Policy, bar: float) -> None:
    """Adds the criterion that the quotes follow the fair values: correlated, and between them and the reference."""
    middle, fair = learnt_smile(env, policy)
    correlation = float(np.corrcoef(middle, fair)[0, 1])
    share = middle / fair  # of the way from the reference price to the fair value
    within = bool(((share >= 0) & (share <= 1)).all())
    detail = f"correlation {correlation:.3f}, {share.min():.2f} to {share.max():.2f} of the way to the fair values"
    name = f"quotes follow the smile (correlation {bar:g}, between)"
    result.require(name, correlation >= bar and within, detail, min(correlation - bar, share.min(), 1.0 - share.max()))


def compare_makers(settings: dict, contest: Contest, bars: dict) -> tuple[Benchmark, dict[str, Estimate]]:
    """The benchmark of a maker before its verdict, and its gains over the named baseline, as shares of that."""
    agent = contest.played["agent"]
    named = contest.played[AVELLANEDA_STOIKOV]
    settings = {**settings, "episodes": len(agent["pnl"]), **contest.settings}
    if bars:
        settings["bars"] = bars
    result = compare(contest.title, settings, contest.played, "agent", contest.block, COLUMNS)
    gains = {}
    for name, label in (("objective", "objective"), ("pnl", "mean P&L")):
        if named[name].mean() > 0:  # or a share of it means nothing
            gains[label] = relative_gain(agent[name], named[name], contest.block)
            result.shares[f"{label} above {AVELLANEDA_STOIKOV}"] = gains[label]
    return result, gains


def require_gain(result: Benchmark, gains: dict[str, Estimate], label: str, bar: float) -> None:
    """Adds the criterion that the agent is above the named baseline by the share `bar` of it."""
    gain = gains[label].mean if label in gains else float("nan")
    result.require_at_least(f"{label} {100 * bar:g} % above {AVELLANEDA_STOIKOV}", gain, bar, f"{100 * gain:+.1f} %")


def require_margin(result: Benchmark, name: str, bar: float) -> None:
    """Adds the criterion that the agent's objective is above a contestant's by `bar`, currency."""
    advantage = result.advantages[name]
    result.require_at_least(f"{bar:g} above {name}", advantage.mean, bar, str(advantage))


def judge_quoting(settings: dict, contest: Contest, default_market: bool) -> Benchmark:
    """The verdict on a maker: it must beat every classical one in its seat, with the same takers.

    In the default market the bars QUOTING say by how much, at no higher a standard deviation than the strongest one's.
    Where nothing is risked and hedging is free, its edges and its objective must be close to those of the best response
    instead (bars QUOTING_KNOWN).
    """
    bars = QUOTING_KNOWN if contest.exact else QUOTING if default_market else {}
    result, _ = compare_makers(settings, contest, bars)
    if contest.exact:
        env = contest.env.like(4096)
        env.reset(seed=BENCHMARK_SEED)
        known = beside_best(env, contest.policies["agent"])
        result.tables["mean edges over the reference price"] = edge_table(agent=known.edges, best_response=known.exact)
        error = known.off.mean()
        bar = bars["edge off the best response"]
        detail = f"{100 * error:.2f} % off on average over options and sides; {100 * known.apart:.2f} % state by state"
        result.require_at_most(f"edge within {100 * bar:g} % of the best response", error, bar, detail)
        bar = bars["objective below it"] * result.rows[contest.best]["objective"]
        difference = result.advantages[contest.best]
        name = f"objective within {100 * bars['objective below it']:g} % of {contest.best}"
        result.require_at_least(name, difference.mean, -bar, str(difference))
    else:
        for name in contest.parameters:
            if name in contest.played:
                result.require_advantage(name)
    if default_market:
        require_smile(result, contest.env, contest.policies["agent"], bars["correlation with the smile"])
        require_margin(result, AVELLANEDA_STOIKOV, bars["above Avellaneda–Stoikov"])
        require_margin(result, contest.best, bars["above the strongest classic"])
        own = result.rows["agent"]["pnl_sd"]
        other = result.rows[contest.best]["pnl_sd"]
        result.require_at_most(f"P&L sd no higher than of {contest.best}", own, other, f"{own:.3f}, {other:.3f}")
    require_episodes(result)
    return result


def rival_sweep(
    contest: Contest,
    names: Sequence[str] = ("agent", AVELLANEDA_STOIKOV, BELIEVER_BAND, *KNOWING),
    episodes: int = 1024,
) -> dict[str, dict[float, dict[str, float]]]:
    """Objectives against other rivals than the agent was trained against: multiples of their spread and risk aversion.

    Returns:
        "half-spread" and "risk aversion" → multiple → contestant → mean objective, without the market's noise.
    """
    market = contest.env.env.like(episodes)
    risk_aversion, k, spread = contest.parameters[RIVAL]
    market.reset(seed=BENCHMARK_SEED)
    sweep = {"half-spread": {}, "risk aversion": {}}
    variants = [("half-spread", x, (risk_aversion, k, x * spread)) for x in SPREADS]
    variants += [("risk aversion", x, (x * risk_aversion, k, spread)) for x in RISK_AVERSIONS]
    for what, multiple, arguments in variants:
        env = against_rival(market, arguments)
        sweep[what][multiple] = {
            name: float(play(env, contest.policies[name])["objective_centred"].mean())
            for name in names
            if name in contest.policies
        }
    return sweep
