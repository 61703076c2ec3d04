"""Makers that learn from each other, measured: cross-play and ratings, exploitability, competition or collusion."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import torch

from envs import optimum
from envs.baselines import Policy
from envs.benchmark import (
    BENCHMARK_SEED,
    Benchmark,
    Contest,
    Estimate,
    estimate,
    evaluate,
    markdown_table,
    relative_gain,
)
from envs.makers import NAMED_MAKER, quoting_benchmark, require_episodes
from envs.quoting import AgainstRivals, QuotingEnv
from envs.runs import write_json


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

    def table(self) -> str:
        """Mean objectives and ratings as a Markdown table."""
        header = ["objective against →", *self.names, "rating"]
        rows = [
            [name, *(f"{x:.3f}" for x in means), f"{rating:+.3f}"]
            for name, means, rating in zip(self.names, self.means, self.ratings, strict=True)
        ]
        return markdown_table(header, rows)

    def summary(self) -> str:
        """How transitive it all is, in one line."""
        cycles = "; ".join(" > ".join((*cycle, cycle[0])) for cycle in self.cycles) or "none"
        return f"intransitive part of the margins between them: {100 * self.intransitivity:.2f} %; cycles: {cycles}"

    def write(self, folder: Path) -> None:
        """Writes cross_play.json."""
        content = {
            "names": self.names, "objective": self.means.tolist(), "margins": self.margins.tolist(),
            "ratings": self.ratings.tolist(), "intransitivity": self.intransitivity, "cycles": self.cycles,
            "share of takers": self.share.tolist(), "others' share of takers": self.others_share.tolist(),
        }  # fmt: skip
        write_json(folder / "cross_play.json", content)


@torch.no_grad()
def match(market: QuotingEnv, one: Policy, others: Policy) -> tuple[torch.Tensor, torch.Tensor]:
    """Plays the market's current episodes, `one` in the first seat: objectives and fills, each (n, num_makers)."""
    observation, _ = market.replay()
    objective, fills = 0.0, 0.0
    for _ in range(market.num_steps):
        rest = others(observation[:, 1:].flatten(0, 1)).unflatten(0, (market.num_envs, -1))
        actions = torch.cat((one(observation[:, 0])[:, None], rest), 1)
        observation, reward, _, _, info = market.step(actions)
        objective, fills = objective + reward, fills + info["fills"]
    return objective, fills


def cross_play(market: QuotingEnv, policies: Mapping[str, Policy], episodes: int) -> CrossPlay:
    """Plays every policy against every other on `episodes` fresh episodes, in batches of at most 4,096.

    All seats are alike and takers are the same, so with two makers one match gives both sides of it.
    """
    names, size = list(policies), len(policies)
    market = market.like(min(4096, episodes))
    batches = -(-episodes // market.num_envs)
    objective = np.zeros((size, size, batches * market.num_envs))
    others, fills = np.zeros_like(objective), np.zeros((2, size, size))
    for batch in range(batches):
        market.reset(seed=BENCHMARK_SEED + batch)
        rows = slice(batch * market.num_envs, (batch + 1) * market.num_envs)
        for i in range(size):
            for j in range(i if market.num_makers == 2 else 0, size):
                earned, filled = match(market, policies[names[i]], policies[names[j]])
                own, rest = earned[:, 0].cpu().numpy(), earned[:, 1:].mean(1).cpu().numpy()
                counts = filled[:, 0].mean().item(), filled[:, 1:].sum(1).mean().item()
                objective[i, j, rows], others[i, j, rows], fills[:, i, j] = own, rest, fills[:, i, j] + counts
                if market.num_makers == 2 and i != j:
                    objective[j, i, rows], others[j, i, rows] = rest, own
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
    env = AgainstRivals(market.like(min(4096, episodes)), [policy] * (market.num_makers - 1))
    played = evaluate(env, {"response": response, "policy": policy}, episodes, BENCHMARK_SEED)
    own, better = played["policy"]["objective"], played["response"]["objective"]
    return Exploitability(estimate(better - own), relative_gain(better, own), float(own.mean()))


@dataclass
class Competition:
    """How makers that all follow one policy compete, beside what is known where nothing is risked and hedging is free.

    `edge` is their mean edge, `nash` and `monopoly` those of the equilibrium and of makers who agree, vol points.
    `collusion` is (π − π_Nash)/(π_monopoly − π_Nash) with π the edge expected of a taker (Calvano et al. 2020, eq. 9):
    0 is competition, 1 a cartel. `exploitability` is what the best edge against the others' would earn more in each
    step, as a share.
    """

    edge: float
    nash: float
    monopoly: float
    collusion: float
    exploitability: float


@torch.no_grad()
def competition(market: QuotingEnv, policy: Policy, episodes: int = 4096) -> Competition:
    """Plays `policy` in every seat and compares its edges with the closed forms of `envs.optimum`."""
    market = market.like(episodes)
    k, reference, makers = market.choice_sensitivity, market.reference_edge, market.num_makers
    observation, _ = market.reset(seed=BENCHMARK_SEED)
    edge = weight = earned = best = 0.0
    for t in range(market.num_steps):
        actions = policy(observation.flatten(0, 1)).unflatten(0, (market.num_envs, makers))
        edges = market.to_edges(actions)  # (n, makers, 2)
        takers = (market.intensity[t] * market.total_vega[t][:, None])[:, None]  # (n, 1, 2), weighted by vega
        rivals = edges[:, market.rivals].transpose(-1, -2)  # (n, makers, 2, makers − 1)
        answer = optimum.best_response(rivals, k, reference)
        picked = 1.0 - 1.0 / (k * answer)  # the first-order condition, solved for P
        edge += float((edges * takers).sum() / makers)
        earned += float((edges * market.choice_probabilities(edges) * takers).sum())
        best += float((answer * picked * takers).sum())
        weight += float(takers.sum())
        observation, *_ = market.step(actions)
    nash, monopoly = (solve(makers, k, reference) for solve in (optimum.nash_edge, optimum.monopoly_edge))

    def profit(edge: float) -> float:
        odds = np.exp(-k * (edge - reference))
        return makers * edge * odds / (1.0 + makers * odds)

    collusion = (earned / weight - profit(nash)) / (profit(monopoly) - profit(nash))
    return Competition(edge / weight, nash, monopoly, float(collusion), best / earned - 1.0)


def judge_selfplay(
    title: str,
    settings: dict,
    contest: Contest,
    league: CrossPlay | None,
    snapshots: Sequence[str],
    exploited: Exploitability | None,
    compete: Competition,
    default_market: bool,
) -> Benchmark:
    """The verdict on a maker that learnt by self-play.

    It must earn more than Avellaneda–Stoikov would in its seat, in the default market by 28 %; more than each of its
    `snapshots` from before, whoever the rivals are; and a best response to it may gain no more than 2 %. Where nothing
    is risked and hedging is free, its edge must be within 3 % of the Nash equilibrium's, a best response in closed form
    gain no more than 0.3 %, and the collusion index lie within ±0.1.
    """
    market = contest.env.env
    neutral = market.risk_aversion == market.cost_rate == 0
    names = ("edge", "nash", "monopoly", *(("collusion", "exploitability") if neutral else ()))
    settings = {**settings, "competition": {name: getattr(compete, name) for name in names}}
    result, gains = quoting_benchmark(title, settings, contest)
    if neutral:
        off = compete.edge / compete.nash - 1.0
        detail = f"{compete.edge:.4f}, {100 * off:+.2f} % off {compete.nash:.4f} (a monopoly's: {compete.monopoly:.4f})"
        result.require("edge within 3 % of Nash", abs(off) <= 0.03, detail)
        share = compete.exploitability
        result.require("exploitable, in closed form, by 0.3 % at most", share <= 0.003, f"{100 * share:.3f} %")
        index = compete.collusion
        result.require("collusion index within ±0.1", abs(index) <= 0.1, f"{index:+.3f}")
    else:
        result.require_advantage(NAMED_MAKER)
        if default_market:
            gain = gains["objective"].mean if "objective" in gains else float("nan")
            result.require(f"objective 28 % above {NAMED_MAKER}", gain >= 0.28, f"{100 * gain:+.1f} %")
    if exploited is not None:
        result.shares["best response, trained, gains (a lower bound)"] = exploited.share
        if not neutral:
            little = exploited.gain.mean <= 0.02 * exploited.objective
            detail = f"{100 * exploited.share.mean:+.2f} %, {exploited.gain}"
            detail = detail if exploited.gain.mean != 0 else "none that was trained is better"
            result.require("best response gains 2 % at most", little, detail)
    if league is not None and not neutral:
        worst = min(
            ((league.advantage("agent", old, rival), old, rival) for old in snapshots for rival in league.names),
            key=lambda found: found[0].mean,
            default=None,
        )
        if worst is not None:
            advantage, old, rival = worst
            detail = f"by least than {old}, against {rival}: {advantage}"
            result.require("earns more than its snapshots against every rival", advantage.mean > 0, detail)
    require_episodes(result)
    return result
