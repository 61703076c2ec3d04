"""Figures of self-play (phase 4)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from envs.benchmark.contest import Contest
from envs.benchmark.league import Competition, CrossPlay
from envs.benchmark.makers import AVELLANEDA_STOIKOV, BELIEVER_BAND
from envs.figures import style
from envs.figures.quoting import option_names, quoting_episode, quoting_report
from envs.figures.style import AGENT, BASELINE, OPTIMUM, OTHER
from envs.market.rivals import AgainstRivals
from envs.run.files import read_metrics


def selfplay_report(folder: Path, contest: Contest, league: CrossPlay, competition: Competition) -> None:
    """The figures of self-play: those of a quoting benchmark, cross-play, market shares, edges per option beside the
    equilibrium's, an episode of the agent against copies of itself; and its edge over training if the folder has a
    metrics.csv."""
    title = contest.title
    quoting_report(folder, contest)
    cross_play(folder / "cross_play.png", league, title)
    curve = read_metrics(folder / "metrics.csv")
    if curve:
        path = folder / "edge_over_training.png"
        known = (float(competition.nash.mean()), float(competition.monopoly.mean()))
        edge_over_training(path, {"this run": curve}, *known, title)
    market = contest.env.env
    competing_edges(folder / "competition.png", competition, option_names(market), title)
    copies = [contest.policies["agent"]] * (market.num_makers - 1)
    mirror = replace(contest, env=AgainstRivals(market, copies), title=f"{title}: the agent against copies of itself")
    quoting_episode(folder / "selfplay_episode.png", mirror, {"agent": AGENT}, "copy")
    market_shares(folder / "market_shares.png", league, market.num_makers, title)


def cross_play(path: Path, league: CrossPlay, title: str, reference: str = "agent", called: str = "the agent") -> None:
    """Heat map of every policy's objective against every other, and the ratings.

    The colours are the lead over the policy `reference`, `called` so; it and snapshots ("step …") have bars of the
    agent's colour.
    """
    size = len(league.names)
    figure, (heat, bars) = style.new(1, 2, (7.5 + 0.75 * size, 2.4 + 0.5 * size), width_ratios=(2.2, 1))
    _objective_panel(figure, heat, league, reference, called)
    _rating_panel(bars, league, reference)
    figure.suptitle(f"{title}: cross-play")
    figure.tight_layout()
    style.save(figure, path)


def _objective_panel(figure: Figure, axis: Axes, league: CrossPlay, reference: str, called: str) -> None:
    """Objectives, coloured by the lead over `reference` against the same rivals.

    The objectives themselves differ more between columns (how tough a rival is) than between rows (how good a policy
    is). The colours are scaled to the snapshots if there are any, so that what changes in training can be seen.
    """
    names = league.names
    means = league.means
    lead = means - means[names.index(reference)]
    snapshots = [name.startswith("step ") for name in names]
    most = float(np.abs(lead[snapshots] if any(snapshots) else lead).max(initial=1e-6))
    image = axis.imshow(lead, cmap="RdBu", vmin=-most, vmax=most, aspect="auto")
    for i in range(len(names)):
        for j in range(len(names)):
            colour = "white" if abs(lead[i, j]) > 0.7 * most else "black"
            axis.text(j, i, f"{means[i, j]:.2f}", ha="center", va="center", color=colour, fontsize=8)
    axis.set_xticks(range(len(names)), names, rotation=35, ha="right")
    axis.set_yticks(range(len(names)), names)
    axis.grid(False)
    axis.set(xlabel="rivals", ylabel="policy", title="objective (currency) of the row against the column")
    figure.colorbar(image, ax=axis, label=f"lead over {called} (currency)", extend="both", pad=0.02)


def _rating_panel(axis: Axes, league: CrossPlay, reference: str) -> None:
    rows = range(len(league.names))
    learnt = [name == reference or name.startswith("step ") for name in league.names]
    axis.barh(rows, league.ratings, color=[AGENT if own else BASELINE for own in learnt])
    axis.axvline(0.0, color="black", linewidth=0.8)
    axis.invert_yaxis()
    axis.set_yticks(rows, [])
    for i, rating in enumerate(league.ratings):
        axis.text(max(rating, 0.0), i, f" {rating:+.2f}", va="center", fontsize=8)
    axis.margins(x=0.2)
    axis.set_title(f"rating ({100 * league.intransitivity:.2f} % of the margins intransitive)")
    axis.set_xlabel("objective above the average policy's (currency)")


def edge_over_training(path: Path, curves: Mapping[str, list[dict]], nash: float, monopoly: float, title: str) -> None:
    """Mean half-spread of the agent among copies of itself over training.

    Args:
        curves: label → rows of a run's metrics.csv.
        nash, monopoly: means over sides and options, vol points.
    """
    figure, axes = style.new()
    shades = (AGENT, BASELINE, OTHER, "#b8860b", "#6a3d9a", "#008b8b")
    for (label, curve), colour in zip(curves.items(), cycle(shades), strict=False):
        steps = [row["global_step"] / 1e6 for row in curve]
        edges = [row["charts/selfplay_half_spread"] for row in curve]
        axes.plot(steps, edges, color=colour, marker=".", label=label)
    axes.axhline(nash, color=OPTIMUM, linestyle="-", label=f"Nash without risk and costs, mean ({nash:.3f})")
    label = f"monopoly without risk and costs, mean ({monopoly:.3f})"
    axes.axhline(monopoly, color="black", linestyle=":", label=label)
    axes.set(xlabel="environment steps (millions)", ylabel="mean over sides and options (vol points)")
    axes.margins(y=0.35)  # room for the legend
    style.legend(axes)
    axes.set_title(f"{title}:\nhalf-spread of makers that learn from each other: compete or collude?", fontsize=10)
    style.save(figure, path)


def competing_edges(path: Path, competition: Competition, names: Sequence[str], title: str) -> None:
    """Mean edges of the asks and bids of every option, makers that are all the agent, beside Nash and monopoly.

    Args:
        names: of the options.
    """
    size = len(names)
    figure, axes = style.rows_of_panels([["asks", "bids"]], (max(11.0, 3.0 + 0.9 * size), 5.0))
    axes["bids"].sharey(axes["asks"])
    rows = np.arange(size)
    for side, axis in enumerate((axes["asks"], axes["bids"])):
        nash = competition.nash[side]
        monopoly = competition.monopoly[side]
        axis.vlines(rows, nash, monopoly, color=OTHER, linewidth=5, alpha=0.3, label="between competition and cartel")
        axis.plot(rows, monopoly, "_", color="black", markersize=16, markeredgewidth=2, label="monopoly")
        axis.plot(rows, nash, "_", color=OPTIMUM, markersize=16, markeredgewidth=2.5, label="Nash")
        axis.plot(rows, competition.edges[side], "o", color=AGENT, markersize=7, label="the agent, in all seats")
        axis.axhline(0.0, color="black", linestyle=":", linewidth=1.0, label="Black–Scholes reference price")
        axis.set_xticks(rows, names, rotation=35 if size > 3 else 0, ha="right" if size > 3 else "center")
        axis.set_xlim(-0.6, size - 0.4)
    axes["asks"].set(title="asks, above the reference price", ylabel="mean edge (vol points)")
    axes["bids"].set(title="bids, below the reference price", ylabel="mean edge (vol points)")
    style.legend_below(figure, axes["asks"], 5)
    what = "edges per option beside those of makers who compete and who agree, without risk and costs"
    figure.suptitle(f"{title}:\n{what}")
    style.save(figure, path)


def market_shares(path: Path, league: CrossPlay, num_makers: int, title: str) -> None:
    """Who gets the takers: the agent, its rivals, nobody, for every kind of rival; and the snapshots of training."""
    figure, (rivals, training) = style.new(1, 2, (14, 0.45 * len(league.names) + 2.2), width_ratios=(1.5, 1))
    _taker_panel(rivals, league, num_makers)
    _snapshot_panel(training, league, num_makers)
    style.legend(rivals, "lower center", fontsize=8, ncols=3, bbox_to_anchor=(0.5, 1.0))
    style.legend(training, fontsize=8)
    figure.suptitle(f"{title}: market shares")
    figure.tight_layout()
    style.save(figure, path)


def _taker_panel(axis: Axes, league: CrossPlay, num_makers: int) -> None:
    agent = league.names.index("agent")
    own = 100 * league.share[agent]
    others = 100 * league.others_share[agent]
    rows = np.arange(len(league.names))
    axis.barh(rows, own, color=AGENT, label="the agent")
    axis.barh(rows, others, left=own, color=BASELINE, label="its rivals" if num_makers > 2 else "its rival")
    axis.barh(rows, 100 - own - others, left=own + others, color=OTHER, alpha=0.5, label="nobody: they walk away")
    axis.set_yticks(rows, league.names)
    axis.invert_yaxis()
    axis.set(xlabel="share of the takers (%)", ylabel="rivals")
    axis.set_title("who gets the takers, by kind of rival", pad=24)  # room for the legend


def _snapshot_panel(axis: Axes, league: CrossPlay, num_makers: int) -> None:
    names = league.names
    snapshots = [name for name in names if name.startswith("step ")] + ["agent"]
    rows = [names.index(name) for name in snapshots]
    styles = {AVELLANEDA_STOIKOV: (BASELINE, "s--"), BELIEVER_BAND: (OTHER, "^:"), "agent": (AGENT, "o-")}
    for name, (colour, line) in styles.items():
        if name not in names:
            continue
        own = league.share[rows, names.index(name)]
        others = league.others_share[rows, names.index(name)]
        share = 100 * own / np.maximum(own + others, 1e-9)
        axis.plot(range(len(rows)), share, line, color=colour, label=f"against {name}")
    axis.axhline(100 / num_makers, color="black", linewidth=0.8, label="an equal share")
    axis.set_xticks(range(len(rows)), snapshots, rotation=20, ha="right")
    axis.set(ylabel="share of all trades (%)", title="market share of each snapshot")
