"""Makers that learn from each other, measured: cross-play and ratings, exploitability, competition or collusion."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from scipy.stats import norm

from envs.benchmark.bars import SELFPLAY, SELFPLAY_NEUTRAL
from envs.benchmark.contest import Contest, play, play_fresh, require_episodes
from envs.benchmark.makers import (
    AVELLANEDA_STOIKOV,
    BELIEVER_BAND,
    GLFT_SMILE,
    MULTI_ASSET,
    Makers,
    against,
)
from envs.benchmark.quoting import (
    compare_makers,
    edge_table,
    quoting_contest,
    quoting_validation,
    relative_error,
    require_gain,
)
from envs.benchmark.report import Benchmark, Estimate, Table, estimate, relative_gain
from envs.market.dynamics import Dynamics
from envs.market.hedging import Policy
from envs.market.quoting import QuotingEnv, rows_last
from envs.market.rivals import in_market
from envs.optimum.edges import EdgeTable, best_edge, choice_probability
from envs.run.seeds import BENCHMARK_SEED, VALIDATION_SEED

# The classics that join the cross-play: two that believe in Black–Scholes, two that know the model. Agents have met all
# of them in training but one, which is there to see how they do against a maker that they do not know.
LEAGUE = (AVELLANEDA_STOIKOV, BELIEVER_BAND, GLFT_SMILE, MULTI_ASSET)
MET_IN_TRAINING = (AVELLANEDA_STOIKOV, GLFT_SMILE, MULTI_ASSET)
LEAGUE_EPISODES = 4096  # of each match of the cross-play


@dataclass
class CrossPlay:
    """Every policy in one seat against every policy in all the others, on the same episodes.

    Attributes:
        names: of the P policies.
        objective: (P, P, episodes) of the row's policy, the column's in all other seats.
        others: (P, P, episodes) mean objective of the column's policy in those seats.
        share, others_share: (P, P) of all takers that come, those who trade with the row's policy, and with the others.
    """

    names: list[str]
    objective: np.ndarray
    others: np.ndarray
    share: np.ndarray
    others_share: np.ndarray

    def advantage(self, one: str, other: str, against: str) -> Estimate:
        """How much more `one` earns than `other` where all rivals are `against`; paired, 95 % interval."""
        i, j, column = (self.names.index(name) for name in (one, other, against))
        return estimate(self.objective[i, column] - self.objective[j, column])

    @property
    def means(self) -> np.ndarray:
        """(P, P) mean objective of the row's policy against the column's, currency."""
        return self.objective.mean(-1)

    @property
    def margins(self) -> np.ndarray:
        """(P, P) antisymmetric: by how much the row's policy earns more than the column's where they meet, currency.

        With more than two makers the mean of one among many of the other kind, and the other way round.
        """
        lead = (self.objective - self.others).mean(-1)
        return 0.5 * (lead - lead.T)

    @property
    def ratings(self) -> np.ndarray:
        """(P,) what each earns above the average policy against the same rivals, currency; their mean is zero.

        Fits objectives by rating of the row + toughness of the column, least squares. Elo counts wins; makers do not
        win against each other, each earns what it earns (the sum is not zero), so the rating is of that.
        """
        return self.means.mean(1) - self.means.mean()

    @property
    def intransitivity(self) -> float:
        """Share of the margins' squares that no rating explains: 0, all is strength; 1, it is rock-paper-scissors.

        The cyclic part of the Hodge decomposition of the margins (Jiang, Lim, Yao & Ye 2011; Balduzzi et al. 2019).
        """
        strength = self.margins.mean(1)
        cyclic = self.margins - (strength[:, None] - strength)
        return float((cyclic**2).sum() / max((self.margins**2).sum(), 1e-300))

    @property
    def cycles(self) -> list[tuple[str, str, str]]:
        """Triples of which each beats the next and the last the first, every time with a margin beyond its 95 %."""
        lead = 0.5 * (self.objective - self.others)
        error = (lead - lead.swapaxes(0, 1)).std(-1, ddof=1) / lead.shape[-1] ** 0.5
        beats = self.margins > 1.96 * error
        found = []
        for i, j, k in combinations(range(len(self.names)), 3):
            for a, b, c in ((i, j, k), (i, k, j)):
                if beats[a, b] and beats[b, c] and beats[c, a]:
                    found.append((self.names[a], self.names[b], self.names[c]))
        return found

    def table(self) -> Table:
        """Mean objectives and ratings."""
        rows = zip(self.names, self.means.tolist(), self.ratings, strict=True)
        return Table(
            ["objective against →", *self.names, "rating"],
            [[name, *means, f"{rating:+.3f}"] for name, means, rating in rows],
        )

    def summary(self) -> str:
        """How transitive it all is, in one line."""
        cycles = "; ".join(" > ".join((*cycle, cycle[0])) for cycle in self.cycles) or "none"
        return f"intransitive part of the margins between them: {100 * self.intransitivity:.2f} %; cycles: {cycles}"

    def content(self) -> dict:
        """Everything, for a JSON file."""
        return {
            "names": self.names, "objective": self.means.tolist(), "margins": self.margins.tolist(),
            "ratings": self.ratings.tolist(), "intransitivity": self.intransitivity, "cycles": self.cycles,
            "share of takers": self.share.tolist(), "others' share of takers": self.others_share.tolist(),
        }  # fmt: skip


class SelfplayValidation:
    """Watches makers while they learn: their result against the named baseline, and how they quote among themselves.

    The objective of self-play is no measure of progress: it falls as competition gets tighter. Calling it with a policy
    gives both.
    """

    def __init__(self, classics: Makers, episodes: int):
        self.against_baseline = quoting_validation(classics, episodes)
        self.market = classics.env.env.like(256)
        self.market.reset(seed=VALIDATION_SEED)

    def __call__(self, policy: Policy) -> dict[str, float]:
        played = play(against(self.market, policy), policy)
        return {
            **self.against_baseline(policy),
            "charts/selfplay_objective": float(played["objective_centred"].mean()),
            "charts/selfplay_half_spread": float(played["half_spread"].mean()),
        }

    def describe(self, metrics: Mapping[str, float]) -> str:
        """The figure that matters, for a progress bar."""
        return self.against_baseline.describe(metrics)


@torch.no_grad()
def match(market: QuotingEnv, one: Policy, others: Policy) -> tuple[torch.Tensor, torch.Tensor]:
    """Plays the market's current episodes, `one` in the first seat: objectives and fills, each (n, num_makers)."""
    one, others = in_market(one, market), in_market(others, market)
    observation, _ = market.replay()
    for _ in range(market.num_steps):
        rest = others(observation[:, 1:].flatten(0, 1)).unflatten(0, (market.num_envs, -1))
        observation = market.advance(torch.cat((one(observation[:, 0])[:, None], rest), 1))
    rewards, info = market.settle()
    return rewards.sum(0), info["fills"].sum(0)


def cross_play(market: QuotingEnv, policies: Mapping[str, Policy], episodes: int) -> CrossPlay:
    """Plays every policy against every other on `episodes` fresh episodes, in batches of at most 4,096.

    All seats are alike and takers are the same, so with two makers one match gives both sides of it.
    """
    names = list(policies)
    size = len(names)
    market = market.like(min(4096, episodes))
    two = market.num_makers == 2
    batches = -(-episodes // market.num_envs)
    objective = np.zeros((size, size, batches * market.num_envs))
    others = np.zeros_like(objective)
    fills = np.zeros((2, size, size))  # of the row's policy, and of the others
    for batch in range(batches):
        market.reset(seed=BENCHMARK_SEED + batch)
        rows = slice(batch * market.num_envs, (batch + 1) * market.num_envs)
        for i in range(size):
            for j in range(i if two else 0, size):
                earned, filled = match(market, policies[names[i]], policies[names[j]])
                own = earned[:, 0].cpu().numpy()
                rest = earned[:, 1:].mean(1).cpu().numpy()
                counts = filled[:, 0].mean().item(), filled[:, 1:].sum(1).mean().item()
                objective[i, j, rows] = own
                others[i, j, rows] = rest
                fills[:, i, j] += counts
                if two and i != j:
                    objective[j, i, rows] = rest
                    others[j, i, rows] = own
                    fills[:, j, i] += counts[::-1]
    takers = 2 * market.num_options * market.arrival_rate * market.num_steps * batches
    return CrossPlay(names, objective[..., :episodes], others[..., :episodes], *(fills / takers))


@dataclass
class Exploitability:
    """What a best response to a policy, found by training, earns more than the policy itself; a lower bound."""

    gain: Estimate  # currency
    share: Estimate  # of the policy's objective
    objective: float  # the policy's own, currency


def exploitability(market: QuotingEnv, policy: Policy, response: Policy, episodes: int) -> Exploitability:
    """Plays `response` and `policy` in one seat, `policy` in all others, on the same fresh episodes."""
    env = against(market.like(min(4096, episodes)), policy)
    played = play_fresh(env, {"response": response, "policy": policy}, episodes, BENCHMARK_SEED)
    own = played["policy"]["objective"]
    better = played["response"]["objective"]
    return Exploitability(estimate(better - own), relative_gain(better, own), float(own.mean()))


@dataclass
class Competition:
    """How makers that all follow one policy compete, beside what is known where nothing is risked and hedging is free.

    Attributes:
        edges, nash, monopoly: (2, num_options) mean edges of asks and bids over the reference prices, vol points, over
            all takers who come: the makers' own, those of the equilibrium, and those of makers who agree.
        collusion: (π − π_Nash)/(π_monopoly − π_Nash), π what all takers are expected to pay over the fair values
            (Calvano et al. 2020, eq. 9): 0 is competition, 1 a cartel.
        exploitability: what the best edges against the others' would earn more in each step, as a share.
    """

    edges: np.ndarray
    nash: np.ndarray
    monopoly: np.ndarray
    collusion: float
    exploitability: float

    @property
    def off_nash(self) -> np.ndarray:
        """(2, num_options), `relative_error` of the edges."""
        return relative_error(self.edges, self.nash)


@torch.no_grad()
def competition(market: QuotingEnv, policy: Policy, episodes: int = 4096) -> Competition:
    """Plays `policy` in every seat and compares its edges with the equilibrium's, see `envs.optimum.edges`."""
    market = market.like(episodes)
    makers = market.num_makers
    choice = (market.choice_sensitivity, market.reference_edge)
    table = EdgeTable(makers, *choice, market.informed_share, device=market.device, dtype=market.dtype)
    observation, _ = market.reset(seed=BENCHMARK_SEED)
    sums = torch.zeros(3, 2, market.num_options, dtype=torch.float64, device=market.device)
    weight = torch.zeros(2, market.num_options, dtype=torch.float64, device=market.device)
    earned = torch.zeros(3, dtype=torch.float64, device=market.device)  # by these edges, Nash's and the monopoly's
    best = 0.0
    for t in range(market.num_steps):
        actions = policy(observation.flatten(0, 1)).unflatten(0, (market.num_envs, makers))
        edges = rows_last(market.to_edges(actions))  # (makers, 2, O, n)
        gap = rows_last(market.gap[t])  # (2, O, n)
        takers = market.intensity[t].T[:, None] * market.vega[t].T  # the same, weighted by vega
        agreed = (table.nash(gap), table.monopoly(gap))
        for i, quoted in enumerate((edges, *(x.expand_as(edges) for x in agreed))):
            sums[i] += (quoted * takers).sum(-1).mean(0)
            picked = (market.taker_shares * market.choice_probabilities(quoted)).sum(0)
            earned[i] += ((quoted - gap) * picked * takers).sum()
        weight += takers.sum(-1)
        rivals = edges[market.rivals].movedim(1, -1)  # (makers, 2, O, n, makers − 1)
        kinds = (gap, market.informed_share)
        answer = best_edge(rivals, *choice, *kinds)
        best += float((choice_probability(answer, rivals, *choice, *kinds) * (answer - gap) * takers).sum())
        observation = market.advance(actions)
    own, nash, monopoly = earned.tolist()
    gain = (best - own) / max(abs(own), 1e-9)
    return Competition(*(sums / weight).cpu().numpy(), (own - nash) / (monopoly - nash), gain)


def snapshots_ahead(margins: Sequence[Estimate], level: float) -> list[bool]:
    """Which of the margins (agent − snapshot) are below zero at this level of all of them together.

    Holm's (1979) step-down correction of one-sided normal tests: the chance that even one snapshot that is not ahead is
    called ahead is at most `level`, however the margins depend on each other.
    """
    p_values = [norm.cdf(m.mean / m.se) if m.se > 0 else float(m.mean >= 0) for m in margins]
    ahead = [False] * len(margins)
    for rank, i in enumerate(np.argsort(p_values, kind="stable")):
        if p_values[i] > level / (len(margins) - rank):
            break
        ahead[i] = True
    return ahead


def require_progress(result: Benchmark, league: CrossPlay, snapshots: Sequence[str], level: float) -> None:
    """Adds the criterion that no snapshot of the run earns more than the agent, and the table of all margins."""
    pairs = [(old, rival) for old in snapshots for rival in league.names]
    if not pairs:
        return
    margins = {pair: league.advantage("agent", *pair) for pair in pairs}
    body = [[old, *(margins[old, rival].short() for rival in league.names)] for old in snapshots]
    result.tables["objective, agent − its snapshot, against the column"] = Table(["snapshot", *league.names], body)
    ahead = sum(snapshots_ahead(list(margins.values()), level))
    old, rival = min(pairs, key=lambda pair: margins[pair].mean)
    detail = (
        f"{ahead} of {len(pairs)} margins below 0 (Holm's test, {100 * level:g} %); the least {margins[old, rival]}"
    )
    # The first step of Holm's test decides whether any is; in standard errors
    margin = min(x.mean / x.se if x.se > 0 else x.mean for x in margins.values()) - norm.ppf(level / len(pairs))
    detail = f"{detail}, {old} against {rival}"
    result.require("no snapshot is ahead, whoever the rivals are", ahead == 0, detail, margin)


def selfplay_benchmark(
    *,
    title: str,
    settings: dict,
    agent: Policy,
    classics: Makers,
    past: Mapping[str, Policy],
    response: Policy | None,
    make_market: Callable[[Dynamics, int], QuotingEnv],
    model: Dynamics,
    episodes: int,
    default_market: bool,
) -> tuple[Benchmark, Contest, CrossPlay, Competition]:
    """The benchmark of a maker that learnt by self-play: against the classics in one seat, everyone against everyone,
    the best response, competition; and its verdict.

    Args:
        title, settings, classics, make_market, model, episodes, default_market: as in `quoting_benchmark`.
        past: policies that join the cross-play, by name: snapshots of the run, called "step …", and guests.
        response: a best response to the agent, found by training; None: there is none.
    """
    contest = quoting_contest(title, classics, agent, make_market, model, episodes)
    market = classics.env.env
    rivals = {name: classics.policies[name] for name in LEAGUE if name in classics.policies}
    league = cross_play(market, {**past, "agent": agent, **rivals}, min(episodes, LEAGUE_EPISODES))
    exploited = None if response is None else exploitability(market, agent, response, episodes)
    compete = competition(market, agent)
    snapshots = [name for name in past if name.startswith("step ")]
    verdict = {"compete": compete, "default_market": default_market}
    if contest.dates is None:
        verdict |= {"league": league, "snapshots": snapshots, "exploited": exploited}
    else:  # cross-play is in the fitted model, and no criterion on real closes
        settings = {**settings, "cross-play and competition": "in the fitted garch"}
    result = judge_selfplay(settings, contest, **verdict)
    if contest.dates is not None:
        result.others["benchmark_non_overlapping"] = judge_selfplay(settings, contest.non_overlapping(), **verdict)
    result.tables = {"objective of the row against the column": league.table(), **result.tables}
    result.remarks.append(league.summary())
    result.files["cross_play.json"] = league.content()
    return result, contest, league, compete


def judge_selfplay(
    settings: dict,
    contest: Contest,
    *,
    compete: Competition,
    default_market: bool,
    league: CrossPlay | None = None,
    snapshots: Sequence[str] = (),
    exploited: Exploitability | None = None,
) -> Benchmark:
    """The verdict on a maker that learnt by self-play.

    It must earn more than Avellaneda–Stoikov would in its seat, in the default market by a margin; no snapshot of its
    run may be ahead of it, whoever the rivals are; and a best response to it may gain little (bars SELFPLAY). Where
    nothing is risked and hedging is free, its edges must be near the Nash equilibrium's, a best response in closed form
    must gain next to nothing, and the makers must not collude (bars SELFPLAY_NEUTRAL).
    """
    market = contest.env.env
    neutral = market.is_neutral
    bars = SELFPLAY_NEUTRAL if neutral else SELFPLAY
    found = {name: float(getattr(compete, name).mean()) for name in ("edges", "nash", "monopoly")}
    if neutral:
        found |= {"collusion": compete.collusion, "exploitability": compete.exploitability}
    settings = {**settings, "competition": found}
    result, gains = compare_makers(settings, contest, bars)
    if exploited is not None:
        result.shares["best response, trained, gains (a lower bound)"] = exploited.share
    if neutral:
        require_competition(result, compete, bars)
    else:
        result.require_advantage(AVELLANEDA_STOIKOV)
        if default_market:
            require_gain(result, gains, "objective", bars["objective gain"])
        if exploited is not None:
            bar = bars["best response gains"]
            most = bar * exploited.objective
            detail = f"{100 * exploited.share.mean:+.2f} %, {exploited.gain}"
            detail = detail if exploited.gain.mean != 0 else "none that was trained is better"
            result.require_at_most(f"best response gains {100 * bar:g} % at most", exploited.gain.mean, most, detail)
        if league is not None:
            require_progress(result, league, snapshots, bars["snapshot level"])
    require_episodes(result)
    return result


def require_competition(result: Benchmark, compete: Competition, bars: dict[str, float]) -> None:
    """Adds the criteria of makers that compete, where the equilibrium and the cartel are known."""
    off = compete.off_nash
    bar = bars["edge off Nash"]
    detail = f"{100 * off.max():.2f} % at most, {100 * off.mean():.2f} % on average over options and sides"
    result.require_at_most(f"edges within {100 * bar:g} % of Nash", off.max(), bar, detail)
    edges = edge_table(agent=compete.edges, Nash=compete.nash, monopoly=compete.monopoly)
    result.tables["edges over the reference price, makers that are all the agent"] = edges
    share = compete.exploitability
    bar = bars["exploitable"]
    name = f"exploitable, in closed form, by {100 * bar:g} % at most"
    result.require_at_most(name, share, bar, f"{100 * share:.3f} %")
    index = compete.collusion
    bar = bars["collusion index"]
    result.require_at_most(f"collusion index within ±{bar:g}", abs(index), bar, f"{index:+.3f}")
