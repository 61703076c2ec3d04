"""The benchmark at the end of every run: the same fresh episodes for every contestant, paired differences, a verdict.

All contestants play the same episodes (the market is drawn once per batch and replayed), so differences are paired and
their confidence intervals are far narrower than those of the levels. Intervals are 95 %.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path

import numpy as np
import torch

from envs import baselines, optimum
from envs.baselines import Policy
from envs.dynamics import GBM, Dynamics, Historical
from envs.hedging import HedgingEnv
from envs.quoting import AgainstRivals
from envs.runs import write_json

Episodes = dict[str, np.ndarray]  # name of a measure → (episodes,) float64
Z95 = 1.959964
NAMED = "Black–Scholes delta"  # the baseline that the user named, of hedging

# Apart from each other and from the seeds of training, which are below a million
BENCHMARK_SEED, TUNING_SEED, VALIDATION_SEED, SCALE_SEED = 1_000_000, 2_000_000, 3_000_000, 5_000_000


# What of a step's `info` is kept of an episode: its sum, or the mean of its absolute value over the steps
SUMMED = ("cost", "turnover", "income", "fills", "trades")
AVERAGED = ("net_delta", "gross_delta", "net_vega", "half_spread")


@torch.no_grad()
def play(env: HedgingEnv | AgainstRivals, policy: Policy) -> Episodes:
    """Plays the environment's current market from its start. Returns per-episode measures, each (num_envs,):

    `objective` Σ r_t; `pnl` Σ income_t + ΔW_t − cost_t; what `SUMMED` and `AVERAGED` name; and `objective_centred`, the
    objective less what no policy can change in mean, with far less noise: for tuning and validation, never for the
    benchmark. When hedging that is Σ income_t + ΔW_t (a martingale pays nothing), when quoting the environment's noise.
    """
    observation, _ = env.replay()
    sums: dict[str, torch.Tensor] = {}

    def add(name: str, value: torch.Tensor) -> None:
        sums[name] = sums[name] + value if name in sums else value

    for _ in range(env.num_steps):
        observation, reward, _, _, info = env.step(policy(observation))
        earned = info["income"] + info["wealth_change"]
        add("objective", reward)
        add("objective_centred", reward - info.get("noise", earned))
        add("pnl", earned - info["cost"])
        for name in SUMMED:
            if name in info:
                add(name, info[name])
        for name in AVERAGED:
            if name in info:
                add(name, info[name].abs() / env.num_steps)
    return {name: value.double().cpu().numpy() for name, value in sums.items()}


def evaluate(env, contestants: Mapping[str, Policy], episodes: int, seed: int) -> dict[str, Episodes]:
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

    Climbs the grid start_i · ratio^k_i until every neighbour, diagonal ones too, is worse, so the result is interior by
    construction (unless 80 evaluations or a factor of `MOST` do not suffice); then, from there, with the next of
    `ratios`.
    """
    best = tuple(float(x) for x in start)
    for ratio in ratios:
        best = _climb(env, family, best, ratio, diagonally=ratio == ratios[-1])
    return best


def _climb(
    env, family: Callable[..., Policy], start: tuple[float, ...], ratio: float, diagonally: bool
) -> tuple[float, ...]:
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
    best, improved = (0,) * len(start), True
    while improved and len(values) < 80:
        improved = False
        for move in directions:
            while value(after := tuple(map(sum, zip(best, move, strict=True)))) > value(best) and len(values) < 80:
                best, improved = after, True
            if improved:
                break
    return parameters(best)


def hedging_baselines(env: HedgingEnv) -> tuple[dict[str, Policy], dict[str, float]]:
    """Every classical hedging strategy, the bands tuned on the environment's current market.

    Returns:
        The policies by name, and the tuned parameters by the same names.
    """
    centre = baselines.minimum_variance_delta(env)
    risk_aversion = max(env.risk_aversion, 1e-3)
    policies = {NAMED: baselines.black_scholes_delta(env), "Leland": baselines.leland(env)}
    families: dict[str, tuple[Callable[[float], Policy], float]] = {
        "Whalley–Wilmott, tuned": (lambda a: baselines.whalley_wilmott(env, a), risk_aversion),
        "Zakamouline, tuned": (lambda a: baselines.zakamouline(env, a), risk_aversion),
        "constant band, tuned": (lambda width: baselines.constant_band(env, width), 0.05 * env.book_scale**0.5),
    }
    asymptotic, authors = baselines.whalley_wilmott, "Whalley–Wilmott"
    if env.order_law.rate > 0:  # orders move the delta too
        asymptotic, authors = baselines.kallsen_muhle_karbe, "Kallsen–Muhle-Karbe"
        families[f"{authors}, tuned"] = (lambda a: asymptotic(env, a), risk_aversion)
    if env.smile.skewed:  # elsewhere the centre is Black–Scholes
        policies["minimum-variance delta"] = centre
        start = families["constant band, tuned"][1]
        families["min-variance band, tuned"] = (lambda width: baselines.constant_band(env, width, centre), start)
        families[f"min-variance {authors}, tuned"] = (lambda a: asymptotic(env, a, centre), risk_aversion)
    parameters = {name: tune(env, family, [start])[0] for name, (family, start) in families.items()}
    policies |= {name: family(parameters[name]) for name, (family, _) in families.items()}
    return policies, parameters


class Validation:
    """Watches a policy while it learns, on a few thousand episodes apart from those of training and benchmark.

    Calling it with a policy gives its objective, its gain over `baseline` and, if the `best` possible policy is known,
    the share of what is possible that this is; all without the noise that no policy can change.

    Args:
        env: of as many episodes as are played.
        baseline: policy to compare with; `name` goes into the names of the metrics.
        best: the exact optimum, or None.
    """

    def __init__(self, env: HedgingEnv | AgainstRivals, baseline: Policy, name: str, best: Policy | None = None):
        self.env, self.name = env, name
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
        metrics = {"charts/objective": float(objective.mean()), f"charts/gain_over_{self.name}": gain}
        return metrics if np.isnan(self.gap) else {**metrics, "charts/share_of_gap_closed": gain / self.gap}


def hedging_validation(env: HedgingEnv) -> Validation:
    """`Validation` beside Black–Scholes delta hedging and, where it is known, the exact optimum."""
    best = optimum.optimal_hedge(env) if optimum.has_optimum(env) else None
    return Validation(env, baselines.black_scholes_delta(env), "black_scholes", best)


@dataclass
class Estimate:
    """A mean with its standard error and 95 % confidence interval."""

    mean: float
    se: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


def estimate(sample: np.ndarray, block: int = 1, seed: int = 0) -> Estimate:
    """Mean of `sample` (n,) with a 95 % confidence interval.

    Args:
        block: 1 for independent episodes (normal interval). More for dependent ones in time order, such as overlapping
            windows: circular block bootstrap (Politis & Romano 1992) of blocks of this length, 2,000 resamples.

    Raises:
        ValueError: fewer than five blocks, of which no interval can be made.
    """
    mean = float(sample.mean())
    if block > max(1, len(sample) / 5):
        raise ValueError(f"{len(sample)} dependent values are too few for blocks of {block} (at least five blocks)")
    if block == 1:
        se = float(sample.std(ddof=1) / len(sample) ** 0.5)
        return Estimate(mean, se, mean - Z95 * se, mean + Z95 * se)
    from arch.bootstrap import CircularBlockBootstrap

    bootstrap = CircularBlockBootstrap(block, sample, seed=seed)
    means = bootstrap.apply(np.mean, 2000)
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(mean, float(means.std(ddof=1)), float(low), float(high))


def gap_closed(agent: np.ndarray, baseline: np.ndarray, optimum: np.ndarray) -> Estimate:
    """Share of the way from `baseline` to `optimum` that `agent` has gone.

    1 − E[optimum − agent]/E[optimum − baseline], both differences paired; standard error by the delta method.
    """
    missing, gap = optimum - agent, optimum - baseline
    ratio = missing.mean() / gap.mean()
    se = float((missing - ratio * gap).std(ddof=1) / abs(gap.mean()) / len(gap) ** 0.5)
    share = 1.0 - float(ratio)
    return Estimate(share, se, share - Z95 * se, share + Z95 * se)


RATIOS = (("market_share", "fills", "trades"), ("delta_share", "net_delta", "gross_delta"))


def relative_gain(agent: np.ndarray, baseline: np.ndarray, block: int = 1) -> Estimate:
    """How far the mean of `agent` is above that of `baseline`, as a share of the latter; paired, by the delta method.

    `block` as in `estimate`.
    """
    ratio = float((agent - baseline).mean() / baseline.mean())
    error = estimate((agent - (1.0 + ratio) * baseline) / abs(baseline.mean()), block)  # of mean zero
    return Estimate(ratio, error.se, ratio + error.low, ratio + error.high)


def summarise(episodes: Episodes, block: int = 1) -> dict[str, float]:
    """The row of a contestant: levels of its objective and risk measures, in currency; `block` as in `estimate`."""
    pnl = episodes["pnl"]
    worst = np.sort(pnl)[: max(1, len(pnl) // 20)]
    objective = estimate(episodes["objective"], block)
    return {
        "objective": objective.mean,
        "objective_se": objective.se,
        "pnl_mean": float(pnl.mean()),
        "pnl_sd": float(pnl.std(ddof=1)),
        "cvar95": float(worst.mean()),  # mean P&L of the worst 5 % of episodes
        "cost_plus_sd": float(-pnl.mean() + 1.5 * pnl.std(ddof=1)),  # Cao, Chen, Hull & Poulos (2021), eq. 1
        **{name: float(episodes[name].mean()) for name in (*SUMMED, *AVERAGED) if name in episodes},
        **{name: float(episodes[a].sum() / max(episodes[b].sum(), 1e-12)) for name, a, b in RATIOS if b in episodes},
    }


# Key in a contestant's row → title in the table
COLUMNS = {
    "objective": "objective",
    "pnl_mean": "P&L mean",
    "pnl_sd": "P&L sd",
    "cvar95": "CVaR95",
    "cost_plus_sd": "−mean+1.5sd",
    "cost": "cost",
    "turnover": "turnover",
    "net_delta": "|net delta|",
}


def markdown_table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table that also reads well in a terminal: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *body, strict=True)]

    def render(cells: Sequence[str]) -> str:
        first = cells[0].ljust(widths[0])
        return "| " + " | ".join([first] + [c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True)]) + " |"

    rule = "|" + "|".join("-" * (w + 1) + (":" if i else "-") for i, w in enumerate(widths)) + "|"
    return "\n".join([render(header), rule, *map(render, body)])


@dataclass
class Criterion:
    """One condition of the verdict, and the figure that decided it."""

    name: str
    passed: bool
    detail: str


@dataclass
class Benchmark:
    """Everything that the benchmark found, to be printed and written.

    `settings` says what was evaluated (seeds, episodes, market, tuned parameters); `rows` are the contestants'
    `summarise`; `advantages` the paired agent − contestant differences of the objective; `shares` named ratios such as
    the gap closed; `criteria` the verdict. Nothing in it depends on time or place, so equal runs write equal files.
    """

    title: str
    settings: dict
    rows: dict[str, dict[str, float]]
    advantages: dict[str, Estimate]
    shares: dict[str, Estimate] = field(default_factory=dict)
    criteria: list[Criterion] = field(default_factory=list)
    columns: Mapping[str, str] = field(default_factory=lambda: COLUMNS)
    advantage_title: str = "agent − it, paired [95 %]"

    @property
    def passed(self) -> bool:
        return all(criterion.passed for criterion in self.criteria)

    def require(self, name: str, passed: bool, detail: str) -> None:
        """Adds a criterion."""
        self.criteria.append(Criterion(name, bool(passed), detail))

    def require_advantage(self, contestant: str) -> None:
        """Adds the criterion that the agent beats `contestant`: lower 95 % bound of the paired difference > 0."""
        advantage = self.advantages[contestant]
        self.require(f"beats {contestant}", advantage.low > 0, f"{advantage}, lower bound > 0")

    def table(self) -> str:
        """The benchmark as a Markdown table that also reads well in a terminal."""
        compared = [self.advantage_title] if self.advantages else []
        body = []
        for name, row in self.rows.items():
            cells = {key: f"{row[key]:.3f}" for key in self.columns}
            if "objective" in cells:
                cells["objective"] = f"{row['objective']:.4f} ± {row['objective_se']:.4f}"
            advantage = [str(self.advantages.get(name, ""))] if compared else []
            body.append([name, *advantage, *cells.values()])
        return markdown_table(["contestant", *compared, *self.columns.values()], body)

    def verdict(self) -> str:
        """One line per share and criterion, then BENCHMARK PASSED or BENCHMARK FAILED with what failed."""
        lines = [
            f"{name}: {100 * s.mean:.2f} % [{100 * s.low:.2f}, {100 * s.high:.2f}]" for name, s in self.shares.items()
        ]
        lines += [f"{'ok    ' if c.passed else 'FAILED'} {c.name}: {c.detail}" for c in self.criteria]
        failed = [c.name for c in self.criteria if not c.passed]
        lines.append("BENCHMARK PASSED" if not failed else "BENCHMARK FAILED: " + "; ".join(failed))
        return "\n".join(lines)

    def write(self, folder: Path, stem: str = "benchmark") -> None:
        """Writes `stem`.json (all figures, full precision) and `stem`.md (title, table, verdict, settings)."""
        content = {"passed": self.passed, **asdict(self)}
        write_json(folder / f"{stem}.json", content)
        settings = "\n".join(f"- {name}: {value}" for name, value in self.settings.items())
        verdict = self.verdict().replace("\n", "\n\n")
        text = f"# {self.title}\n\n{settings}\n\n{self.table()}\n\n{verdict}\n"
        (folder / f"{stem}.md").write_text(text, encoding="utf-8")


def compare(
    title: str,
    settings: dict,
    played: Mapping[str, Episodes],
    agent: str,
    block: int = 1,
    columns: Mapping[str, str] = COLUMNS,
) -> Benchmark:
    """Benchmark of `played` (see `evaluate`): rows, and the paired advantage of `agent` over every other contestant."""
    mine = played[agent]["objective"]
    advantages = {
        name: estimate(mine - episodes["objective"], block) for name, episodes in played.items() if name != agent
    }
    rows = {name: summarise(e, block) for name, e in played.items()}
    return Benchmark(title, settings, rows, advantages, columns=columns)


@dataclass
class Contest:
    """What a benchmark compares, and what came of it.

    `policies` and `played` (see `play`) by contestant, the agent among them as "agent"; `parameters` of those that were
    tuned; `best` is the contestant that the agent is measured and drawn beside, `exact` whether it is the true optimum;
    `block` is the length of the dependence between episodes (1: none); `env` has the market that the policies know.
    """

    policies: dict[str, Policy]
    played: dict[str, Episodes]
    parameters: dict[str, float] | dict[str, tuple[float, ...]]
    best: str
    exact: bool
    block: int
    settings: dict
    env: HedgingEnv | AgainstRivals

    def non_overlapping(self, num_steps: int) -> "Contest":
        """The same contest on every `num_steps`-th window, which share no day."""
        apart = {name: {m: x[::num_steps] for m, x in sample.items()} for name, sample in self.played.items()}
        return replace(self, played=apart, block=1)


def windows_played(model: Historical, num_steps: int) -> str:
    """What an evaluation on real closes played, in words."""
    return f"all of {num_steps} days, {model.dates[1]} to {model.dates[-1]}, returns demeaned"


def hedging_contest(
    make_env: Callable[[Dynamics, int], HedgingEnv], model: Dynamics, agent: Policy, episodes: int
) -> Contest:
    """Tunes every baseline, solves for the optimum where that can be done, and plays all of them on fresh episodes.

    On real closes nothing is tuned: the baselines, like the agent, come from the model fitted to the time before.

    Args:
        make_env: (model, number of environments) → environment.
        model: of the market to benchmark in; with `Historical`, all its windows are the episodes.
        episodes: number of episodes otherwise.
    """
    historical = isinstance(model, Historical)
    fitted = model.garch if historical else model
    tuning = make_env(fitted, min(16_384, episodes))
    tuning.reset(seed=TUNING_SEED)
    policies, parameters = hedging_baselines(tuning)
    policies = {"agent": agent, **policies}
    # Where no optimum is known, the agent is drawn beside the strongest of the classics.
    best = max(parameters, key=lambda name: play(tuning, policies[name])["objective_centred"].mean())
    exact = optimum.has_optimum(tuning) and not historical
    if optimum.has_optimum(tuning):
        best = "exact optimum" if exact else "optimum of the fitted model"
        policies[best] = optimum.optimal_hedge(tuning)
    settings = {f"{name}: parameter": parameter for name, parameter in parameters.items()}
    settings["tuning seed"] = TUNING_SEED
    if historical:
        num_steps = tuning.num_steps
        env = make_env(model, model.num_windows(num_steps))
        episodes = env.num_envs
        settings["windows"] = windows_played(model, num_steps)
    else:
        env = make_env(model, min(episodes, 8192))
        settings["benchmark seed"] = BENCHMARK_SEED
        if exact:
            settings["exact optimum: value predicted by dynamic programming"] = policies[best].value
    played = evaluate(env, policies, episodes, BENCHMARK_SEED)
    # Windows that overlap share days: blocks of twice their length cover the dependence.
    block = 2 * tuning.num_steps if historical else 1
    return Contest(policies, played, parameters, best, exact, block, settings, tuning)


def judge_hedging(title: str, settings: dict, contest: Contest, share_required: float = 0.97) -> Benchmark:
    """The verdict on a hedging agent: it must beat the named baseline and every tuned band, and close the gap.

    Where the exact optimum is known, `share_required` of the way from the named baseline to it. Where trading is free
    under gbm, agent, optimum and Black–Scholes delta are all the same, and must agree within 3 standard errors.
    """
    played, env = contest.played, contest.env
    settings = {**settings, "episodes": len(played["agent"]["pnl"]), **contest.settings}
    result = compare(title, settings, played, "agent", contest.block)
    free = env.cost_rate == 0 and contest.exact and isinstance(env.dynamics, GBM)
    if free:
        for name in (contest.best, NAMED):
            difference, limit = result.advantages[name].mean, 3 * result.rows["agent"]["objective_se"]
            result.require(f"agrees with {name}", abs(difference) <= limit, f"{difference:+.5f}, within ±{limit:.5f}")
    else:
        for name in (NAMED, *contest.parameters):
            result.require_advantage(name)
    if contest.exact and not free:
        share = gap_closed(*(played[name]["objective"] for name in ("agent", NAMED, contest.best)))
        result.shares[f"gap from {NAMED} to {contest.best} closed"] = share
        needed = f"closes {100 * share_required:g} % of the gap"
        result.require(needed, share.mean >= share_required, f"{100 * share.mean:.2f} %")
    if "benchmark seed" in settings:
        result.require("has 8,192 episodes or more", settings["episodes"] >= 8192, f"{settings['episodes']:,}")
    return result
