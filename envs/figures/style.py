"""Colours, legend, and the figures of all phases: learning curve, P&L distributions, advantage by date."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from envs.benchmark.contest import Contest, play
from envs.benchmark.hedging import BLACK_SCHOLES
from envs.benchmark.makers import AVELLANEDA_STOIKOV, GLFT
from envs.market.units import TRADING_DAYS
from envs.run.seeds import VALIDATION_SEED

AGENT = "#1f5fbf"
BASELINE = "#c23b22"
OPTIMUM = "#2a8f4f"  # or the best contestant known
OTHER = "#8a8a8a"
STYLE = {
    "figure.dpi": 110, "axes.grid": True, "grid.alpha": 0.25, "axes.spines.top": False, "axes.spines.right": False,
    "font.size": 10,
}  # fmt: skip


def new(rows: int = 1, columns: int = 1, size: tuple[float, float] = (7.5, 4.5), **options):
    """A figure in our style and its axes. It does not use pyplot, so the user's backend and settings do not change."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size)
        return figure, figure.subplots(rows, columns, **options)


def rows_of_panels(
    rows: Sequence[Sequence[str]], size: tuple[float, float], **options
) -> tuple[Figure, dict[str, Axes]]:
    """A figure in our style and its axes by name. Every row is as wide as the figure, whatever its number of panels."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        return figure, figure.subplot_mosaic([[[list(row)]] for row in rows], **options)


def save(figure: Figure, path: Path) -> None:
    with matplotlib.rc_context(STYLE):
        figure.savefig(path, bbox_inches="tight", metadata={"Software": None})


def legend(axes: Axes, loc: str = "best", framealpha: float = 0.8, fontsize: int = 9, **options) -> None:
    """A legend without a frame, on a translucent background."""
    axes.legend(frameon=True, edgecolor="none", framealpha=framealpha, loc=loc, fontsize=fontsize, **options)


def legend_below(figure: Figure, axes: Axes, columns: int = 4) -> None:
    """The legend of these axes, below all panels."""
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=columns, frameon=False)


def legend_beside(figure: Figure, axes: Axes) -> None:
    """The legend of these axes, on the right of all panels."""
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", frameon=False)


def validation_gains(contest: Contest, names: list[str]) -> dict[str, float]:
    """Gain over the first contestant of every contestant named, currency, on the learning curve's own episodes."""
    validation = contest.env.like(4096)
    validation.reset(seed=VALIDATION_SEED)
    objectives = {name: play(validation, contest.policies[name])["objective_centred"].mean() for name in names}
    return {name: objective - objectives[names[0]] for name, objective in objectives.items()}


def learning_curve(
    path: Path, curve: list[dict], metric: str, levels: Mapping[str, tuple[float, str]], exact: bool, title: str
) -> None:
    """Gain over the named baseline during training, beside the contestants'; and the gap to the optimum, if known.

    Args:
        curve: rows of metrics.csv.
        metric: name of the gain in them.
        levels: label → (paired gain over the named baseline on the same episodes, colour), the named baseline first and
            the best contestant last.
        exact: whether the last is the exact optimum, so that nothing can be above it.
    """
    figure, panels = new(1, 2 if exact else 1, (12 if exact else 7.5, 4.5), squeeze=False)
    axes = panels[0][0]
    steps = [row["global_step"] / 1e6 for row in curve]
    gains = np.array([row[metric] for row in curve])
    lines = dict(zip(levels, cycle(("--", "-.", ":", "-")), strict=False))
    axes.plot(steps, gains, color=AGENT, marker=".", label="agent (mean action)")
    # The axis leaves out what would flatten the curve: early values of the agent far below all others, or contestants
    # far below all of the agent's
    known = [level for level, _ in levels.values()]
    low = max(min(known), min(*gains, known[-1]))
    high = max(*known, gains[-1])
    margin = 0.35 * max(high - low, 1e-6)
    axes.set_ylim(low - margin, high + margin)
    for label, (level, colour) in levels.items():
        below = ", below" if level < low - margin else ""
        axes.axhline(level, color=colour, linestyle=lines[label], label=f"{label} ({level:+.4f}{below})")
    axes.set(xlabel="environment steps (millions)", ylabel=f"objective above {next(iter(levels))} (currency)")
    legend(axes, "lower right", 0.9)
    if exact:
        gap = panels[0][1]
        optimum = list(levels)[-1]
        for label, (level, colour) in levels.items():
            if label != optimum:
                gap.axhline(known[-1] - level, color=colour, linestyle=lines[label], label=label)
        gap.plot(steps, known[-1] - gains, color=AGENT, marker=".", label="agent (mean action)")
        gap.set(xlabel="environment steps (millions)", ylabel=f"objective below {optimum} (currency)", yscale="log")
        legend(gap, "upper right", 0.9)
    figure.suptitle(f"{title}, validation episodes")
    figure.tight_layout()
    save(figure, path)


def pnl_distributions(path: Path, pnls: Mapping[str, tuple[np.ndarray, str]], title: str) -> None:
    """Densities of an episode's P&L on the same episodes, CVaR95 dashed: label → (sample (n,), colour)."""
    figure, axes = new()
    everything = np.concatenate([sample for sample, _ in pnls.values()])
    bins = np.linspace(*np.quantile(everything, [0.001, 0.999]), 80 if len(everything) > 20_000 else 30)
    for label, (sample, colour) in pnls.items():
        cvar = np.sort(sample)[: max(1, len(sample) // 20)].mean()
        text = f"{label}: mean {sample.mean():.3f}, sd {sample.std(ddof=1):.3f}, CVaR95 {cvar:.2f}"
        axes.hist(sample, bins, density=True, histtype="step", color=colour, linewidth=1.6, label=text)
        axes.axvline(cvar, color=colour, linestyle="--", linewidth=1)
    axes.set(title=title, xlabel="P&L of an episode (currency; dashed: mean of the worst 5 %)", ylabel="density")
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * 1.3)  # room for the legend
    legend(axes, "upper left")
    save(figure, path)


def advantage_by_date(path: Path, contest: Contest) -> None:
    """The agent's paired advantage over the calendar, a moving average over a year of windows.

    `contest.dates` are the days of the real closes; window i starts on dates[i].
    """
    played = contest.played
    ours = played["agent"]["objective"]
    drawn = {
        BLACK_SCHOLES: (BASELINE, "-"), AVELLANEDA_STOIKOV: (BASELINE, "-"), GLFT: (OTHER, "-"),
        "Whalley–Wilmott, tuned": (OTHER, "-"), "min-variance band, tuned": (OTHER, "--"),
    }  # fmt: skip
    drawn[contest.best] = (OPTIMUM, "-")
    dates = contest.dates[: len(ours)]
    year = min(TRADING_DAYS, len(dates))
    figure, axes = new(size=(9, 4.5))
    for name, (colour, line) in drawn.items():
        if name in played:
            mean = np.convolve(ours - played[name]["objective"], np.ones(year) / year, "valid")
            axes.plot(dates[year - 1 :], mean, line, color=colour, label=f"agent − {name}")
    axes.axhline(0.0, color="black", linewidth=0.8)
    axes.set(
        title=f"{contest.title}: the agent's advantage by date",
        xlabel=f"start of the last window (each point is the mean over {year} successive windows)",
        ylabel="advantage in objective, paired (currency)",
    )
    legend(axes)
    save(figure, path)
