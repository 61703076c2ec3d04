"""Playing: the same fresh episodes for every contestant, strategies tuned on episodes of their own."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import torch

from envs.benchmark.bars import MIN_EPISODES
from envs.benchmark.report import AVERAGED, SUMMED, Benchmark, Episodes, estimate
from envs.market.hedging import HedgingEnv, Policy
from envs.market.history import Historical
from envs.market.rivals import AgainstRivals, in_market
from envs.run.seeds import VALIDATION_SEED


@torch.no_grad()
def play(env: HedgingEnv | AgainstRivals, policy: Policy) -> Episodes:
    """Plays the environment's current market from its start. Returns per-episode measures, each (num_envs,):

    `objective` Σ r_t; `pnl` Σ income_t + ΔW_t − cost_t; what `SUMMED` and `AVERAGED` name; and `objective_centred`, the
    objective less what no policy can change in mean, with far less noise: for tuning and validation, never for the
    benchmark. When hedging that is Σ income_t + ΔW_t (a martingale pays nothing), when quoting the environment's noise.
    """
    if isinstance(env, AgainstRivals):
        policy = in_market(policy, env.env)
    observation, _ = env.replay()
    for _ in range(env.num_steps):
        observation = env.advance(policy(observation))
    reward, info = env.settle()
    earned = info["income"] + info["wealth_change"]
    measures = {
        "objective": reward,
        "objective_centred": reward - info.get("noise", earned),
        "pnl": earned - info["cost"],
        **{name: info[name] for name in SUMMED if name in info},
        **{name: info[name].abs() / env.num_steps for name in AVERAGED if name in info},
    }
    return {name: value.sum(0).double().cpu().numpy() for name, value in measures.items()}


def play_fresh(env, contestants: Mapping[str, Policy], episodes: int, seed: int) -> dict[str, Episodes]:
    """Plays `episodes` fresh episodes with every contestant: batches of `env.num_envs`, reset with seed, seed + 1, …

    Returns:
        For every contestant its measures (see `play`), each (episodes,), row i the same market for all.
    """
    batches = -(-episodes // env.num_envs)
    played = {name: [] for name in contestants}
    for batch in range(batches):
        env.reset(seed=seed + batch)
        for name, policy in contestants.items():
            played[name].append(play(env, policy))
    return {
        name: {measure: np.concatenate([p[measure] for p in parts])[:episodes] for measure in parts[0]}
        for name, parts in played.items()
    }


MOST = 1000.0  # a tuned parameter is at most this many times larger or smaller than where its search began


def tune(
    env: HedgingEnv | AgainstRivals,
    family: Callable[..., Policy],
    start: Sequence[float],
    ratios: Sequence[float] = (1.15,),
) -> tuple[float, ...]:
    """Parameters of a strategy that are best on the environment's current market.

    Climbs the grid start_i · ratio^k_i until every neighbour is worse (up to three parameters, diagonal ones too), so
    the result is interior by construction (unless 80 evaluations or a factor of `MOST` do not suffice); then, from
    there, with the next of `ratios`.
    """
    best = tuple(float(x) for x in start)
    for ratio in ratios:
        best = _climb(env, family, best, ratio, diagonally=ratio == ratios[-1] and len(best) <= 3)
    return best


def _climb(env, family: Callable[..., Policy], start: tuple[float, ...], ratio: float, diagonally: bool):
    """`tune` on the grid of one ratio."""
    values: dict[tuple[int, ...], float] = {}

    def parameters(point: tuple[int, ...]) -> tuple[float, ...]:
        return tuple(x * ratio**k for x, k in zip(start, point, strict=True))

    def value(point: tuple[int, ...]) -> float:
        if ratio ** max(map(abs, point)) > MOST:
            return -np.inf
        if point not in values:
            values[point] = play(env, family(*parameters(point)))["objective_centred"].mean()
        return values[point]

    # Along the axes first, then diagonally: parameters that trade off against each other make ridges
    directions = sorted(product((-1, 0, 1), repeat=len(start)), key=lambda move: sum(map(abs, move)))[1:]
    directions = directions if diagonally else directions[: 2 * len(start)]
    best = (0,) * len(start)
    improved = True
    while improved and len(values) < 80:
        improved = False
        for move in directions:
            while value(after := tuple(map(sum, zip(best, move, strict=True)))) > value(best) and len(values) < 80:
                best = after
                improved = True
            if improved:
                break
    return parameters(best)


class Validation:
    """Watches a policy while it learns, on a few thousand episodes apart from those of training and benchmark.

    Calling it with a policy gives its objective, its gain over `baseline` and, if the `best` possible policy is known,
    the share of the gap between these two that the policy closes; all without the noise that no policy can change.

    Args:
        env: plays as many episodes as it has rows.
        baseline: policy to compare with.
        name: of the baseline, as people write it; "gain over" it becomes the name of a metric.
        best: the exact optimum, or None.
    """

    def __init__(self, env: HedgingEnv | AgainstRivals, baseline: Policy, name: str, best: Policy | None = None):
        self.env = env
        self.name = name
        self.gain = "charts/gain_over_" + name.lower().replace("–", "_").replace(" ", "_")
        env.reset(seed=VALIDATION_SEED)
        self.baseline = self._objective(baseline)
        self.gap = np.nan
        if best is not None:
            gap = estimate(self._objective(best) - self.baseline)
            self.gap = gap.mean if gap.low > 0 else np.nan  # a share of nothing is not a number

    def _objective(self, policy: Policy) -> np.ndarray:
        return play(self.env, policy)["objective_centred"]

    def __call__(self, policy: Policy) -> dict[str, float]:
        objective = self._objective(policy)
        gain = float((objective - self.baseline).mean())
        metrics = {"charts/objective": float(objective.mean()), self.gain: gain}
        return metrics if np.isnan(self.gap) else {**metrics, "charts/share_of_gap_closed": gain / self.gap}

    def describe(self, metrics: Mapping[str, float]) -> str:
        """The figure that matters, for a progress bar: the gain, and what share of the possible or of the baseline."""
        gain = metrics[self.gain]
        baseline = metrics["charts/objective"] - gain
        relative = ""
        if "charts/share_of_gap_closed" in metrics:
            relative = f" ({100 * metrics['charts/share_of_gap_closed']:.1f} % of what is possible)"
        elif baseline > 0.01:
            relative = f" ({100 * gain / baseline:+.1f} %)"
        return f"gain over {self.name} {gain:+.4f}{relative}"


@dataclass
class Contest:
    """What a benchmark compares, and what came of it.

    Attributes:
        title: of the benchmark.
        policies, played: by contestant, the agent among them as "agent"; see `play` for what is measured.
        parameters: of the contestants that were tuned.
        best: the contestant that the agent is measured and drawn beside.
        exact: whether that is the true optimum.
        block: length of the dependence between episodes (1: none).
        settings: what was played, for the report.
        env: the market that the policies know.
        dates: days of the real closes, window i starts on dates[i]; None where the market was simulated.
        sweep: objectives against other rivals, where they were measured; see `envs.benchmark.quoting.rival_sweep`.
    """

    title: str
    policies: dict[str, Policy]
    played: dict[str, Episodes]
    parameters: dict[str, float] | dict[str, tuple[float, ...]]
    best: str
    exact: bool
    block: int
    settings: dict
    env: HedgingEnv | AgainstRivals
    dates: np.ndarray | None = None
    sweep: dict | None = None

    def non_overlapping(self) -> "Contest":
        """The same contest on every window of real closes that shares no day with the one before it."""
        length = self.env.num_steps
        apart = {name: {m: x[::length] for m, x in sample.items()} for name, sample in self.played.items()}
        return replace(self, title=f"{self.title}, non-overlapping windows", played=apart, block=1)


def real_closes(model: Historical, num_steps: int) -> dict[str, str]:
    """Settings of an evaluation on real closes, for the report."""
    windows = f"all of {num_steps} days, {model.dates[1]} to {model.dates[-1]}, returns demeaned"
    return {"closes": model.source, "model fitted until": str(model.dates[0]), "windows": windows}


def require_episodes(result: Benchmark) -> None:
    """Adds the criterion that enough episodes were played; on real closes there are as many as there are."""
    if "windows" not in result.settings:
        episodes = result.settings["episodes"]
        result.require(f"has {MIN_EPISODES:,} episodes or more", episodes >= MIN_EPISODES, f"{episodes:,}")
