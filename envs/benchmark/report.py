"""The benchmark at the end of every run: the same fresh episodes for every contestant, paired differences, a verdict.

All contestants play the same episodes (the market is drawn once per batch and replayed), so differences are paired and
their confidence intervals are far narrower than those of the levels. Intervals are 95 %.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from arch.bootstrap import CircularBlockBootstrap

from envs.run import page
from envs.run.errors import UsageError, check
from envs.run.files import read_json, write_json

Episodes = dict[str, np.ndarray]  # name of a measure → (episodes,) float64
Z95 = 1.959964

# Measures of an episode: the sums of these entries of a step's `info`, and the means of the absolute values of those
SUMMED = ("cost", "turnover", "income", "fills", "trades")
AVERAGED = ("net_delta", "gross_delta", "net_vega", "half_spread")


@dataclass
class Estimate:
    """A mean with its standard error and 95 % confidence interval."""

    mean: float
    se: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"

    def short(self) -> str:
        """The same for a narrow column: mean ± half the width of the interval."""
        return f"{self.mean:+.3f} ± {0.5 * (self.high - self.low):.3f}"


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
    """One condition of the verdict, and the figure that decided it.

    `margin` is how far that lies beyond its bar, in its own unit, below zero where it misses it; None: it is no number.
    """

    name: str
    passed: bool
    detail: str
    margin: float | None = None


class Table(NamedTuple):
    """A further table of a benchmark: header and rows of numbers and strings."""

    header: list[str]
    body: list[list]

    def cells(self) -> list[list[str]]:
        """The rows as text."""
        return [[x if isinstance(x, str) else f"{x:.3f}" for x in row] for row in self.body]

    def __str__(self) -> str:
        return markdown_table(self.header, self.cells())


def _in_words(setting) -> str:
    """A setting for people: 'name value, name value' in place of a dict."""
    if isinstance(setting, dict):
        return ", ".join(f"{name} {value:.4g}" for name, value in setting.items())
    return str(setting)


@dataclass
class Benchmark:
    """Everything that the benchmark found, to be printed and written.

    Attributes:
        settings: what was evaluated: seeds, episodes, market, tuned parameters, bars of the verdict.
        rows: `summarise` of every contestant.
        advantages: paired differences of the objective, agent − contestant.
        shares: named ratios, such as the share of the gap that was closed.
        criteria: the verdict.
        remarks: lines printed above the verdict.
        tables: further tables, printed below the first, by name.
        others: further reports of the same run, by the stem of their files.
        files: further results for programs to read, by the name of their JSON file.

    Nothing in it depends on time or place, so equal runs write equal files.
    """

    title: str
    settings: dict
    rows: dict[str, dict[str, float]]
    advantages: dict[str, Estimate]
    shares: dict[str, Estimate] = field(default_factory=dict)
    criteria: list[Criterion] = field(default_factory=list)
    columns: Mapping[str, str] = field(default_factory=lambda: COLUMNS)
    advantage_title: str = "agent − it, paired [95 %]"
    remarks: list[str] = field(default_factory=list)
    tables: dict[str, Table] = field(default_factory=dict)
    others: dict[str, "Benchmark"] = field(default_factory=dict)
    files: dict[str, dict] = field(default_factory=dict)
    withdrawn: str = ""

    @property
    def passed(self) -> bool:
        """Whether every criterion holds; true of a benchmark whose verdict was withdrawn."""
        return bool(self.withdrawn) or all(criterion.passed for criterion in self.criteria)

    def withdraw(self, reason: str) -> None:
        """Puts `reason` in the place of the verdict."""
        self.withdrawn = reason

    def require(self, name: str, passed: bool, detail: str, margin: float | None = None) -> None:
        """Adds a criterion."""
        self.criteria.append(Criterion(name, bool(passed), detail, None if margin is None else float(margin)))

    def require_at_least(self, name: str, value: float, bar: float, detail: str) -> None:
        """Adds the criterion that `value` is not below `bar`."""
        self.require(name, value >= bar, detail, value - bar)

    def require_at_most(self, name: str, value: float, bar: float, detail: str) -> None:
        """Adds the criterion that `value` is not above `bar`."""
        self.require(name, value <= bar, detail, bar - value)

    def require_advantage(self, contestant: str) -> None:
        """Adds the criterion that the agent beats `contestant`: lower 95 % bound of the paired difference > 0."""
        advantage = self.advantages[contestant]
        self.require(f"beats {contestant}", advantage.low > 0, f"{advantage}, lower bound > 0", advantage.low)

    def contestants(self) -> Table:
        """The contestants, a row each, as text."""
        compared = [self.advantage_title] if self.advantages else []
        body = []
        for name, row in self.rows.items():
            cells = {key: f"{row[key]:.3f}" for key in self.columns}
            if "objective" in cells:
                cells["objective"] = f"{row['objective']:.4f} ± {row['objective_se']:.4f}"
            advantage = [str(self.advantages.get(name, ""))] if compared else []
            body.append([name, *advantage, *cells.values()])
        return Table(["contestant", *compared, *self.columns.values()], body)

    def table(self) -> str:
        """The contestants as a Markdown table that also reads well in a terminal."""
        return str(self.contestants())

    def verdict(self) -> str:
        """One line per share and criterion, then BENCHMARK PASSED or BENCHMARK FAILED with what failed."""
        lines = [
            f"{name}: {100 * s.mean:.2f} % [{100 * s.low:.2f}, {100 * s.high:.2f}]" for name, s in self.shares.items()
        ]
        if self.withdrawn:
            return "\n".join([*lines, self.withdrawn])
        lines += [f"{'ok    ' if c.passed else 'FAILED'} {c.name}: {c.detail}" for c in self.criteria]
        failed = [c.name for c in self.criteria if not c.passed]
        lines.append("BENCHMARK PASSED" if not failed else "BENCHMARK FAILED: " + "; ".join(failed))
        return "\n".join(lines)

    def text(self) -> str:
        """All that is printed at the end of a run."""
        tables = [self.table(), *(f"{name}:\n\n{table}" for name, table in self.tables.items())]
        return "\n\n".join([self.title, *tables, "\n".join([*self.remarks, self.verdict()])])

    def html(self) -> str:
        """The same as part of a page: the verdict first, the settings folded."""
        *lines, last = self.verdict().splitlines()
        contestants = self.contestants()
        tables = [f"<h3>{page.text(name)}</h3>\n{page.table(t.header, t.cells())}" for name, t in self.tables.items()]
        return "\n".join([
            f"<h2>{page.text(self.title)}</h2>",
            page.verdict(last, None if self.withdrawn else self.passed),
            "<ul>", *(f"<li>{page.text(line)}</li>" for line in [*lines, *self.remarks]), "</ul>",
            page.table(contestants.header, contestants.cells()),
            *tables,
            page.folded("What was evaluated", page.facts({n: _in_words(v) for n, v in self.settings.items()})),
            *(other.html() for other in self.others.values()),
        ])  # fmt: skip

    def write(self, folder: Path, stem: str = "benchmark") -> None:
        """Writes `stem`.json (everything, in full precision), `stem`.md (what people read) and the rest."""
        content = asdict(self)
        for name in ("others", "files"):
            del content[name]
        passed = None if self.withdrawn else self.passed
        write_json(folder / f"{stem}.json", {"passed": passed, **content})
        settings = "\n".join(f"- {name}: {_in_words(value)}" for name, value in self.settings.items())
        tables = "\n\n".join([self.table(), *(f"## {name}\n\n{table}" for name, table in self.tables.items())])
        verdict = "\n\n".join([*self.remarks, *self.verdict().splitlines()])
        text = f"# {self.title}\n\n{settings}\n\n{tables}\n\n{verdict}\n"
        (folder / f"{stem}.md").write_text(text, encoding="utf-8")
        for name, data in self.files.items():
            write_json(folder / name, data)
        for name, other in self.others.items():
            other.withdrawn = self.withdrawn
            other.write(folder, name)

    @classmethod
    def read(cls, folder: Path) -> "Benchmark":
        """What `write` has written into a run folder, without `files`.

        Raises:
            UsageError: a damaged file, or none.
        """
        result = cls._read(folder / "benchmark.json")
        for path in sorted(folder.glob("benchmark_*.json")):
            result.others[path.stem] = cls._read(path)
        return result

    @classmethod
    def _read(cls, path: Path) -> "Benchmark":
        check(not path.is_symlink(), f"{path}: a link (a file of the run's own)")
        try:
            content = dict(read_json(path))
            content.pop("passed")
            for name in ("advantages", "shares"):
                content[name] = {key: Estimate(**value) for key, value in content[name].items()}
            content["criteria"] = [Criterion(**criterion) for criterion in content["criteria"]]
            content["tables"] = {name: Table(*table) for name, table in content["tables"].items()}
            result = cls(**content)
            result.html()
            return result
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):  # of another form, or not to be printed
            raise UsageError(f"{path}: damaged, or of another version") from None


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
