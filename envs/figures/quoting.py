"""Figures of quoting (phase 3)."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes

from envs.benchmark.contest import Contest
from envs.benchmark.makers import AVELLANEDA_STOIKOV, GLFT, LINEAR_START
from envs.figures import style
from envs.figures.style import AGENT, BASELINE, OPTIMUM, OTHER
from envs.market.quoting import ASK, BID, AgainstRivals
from envs.run.files import read_metrics
from envs.run.seeds import BENCHMARK_SEED

Colours = Mapping[str, str]  # contestant → colour


def quoting_report(folder: Path, contest: Contest) -> None:
    """The figures of a quoting benchmark: quotes, an episode, P&L distributions.

    Also the learning curve if the folder has a metrics.csv, the objective against other rivals if `contest.sweep` has
    it, and the advantage by date on real closes.
    """
    title = contest.title
    best = contest.best
    colours = {AVELLANEDA_STOIKOV: BASELINE, GLFT: OTHER, LINEAR_START: OTHER}
    colours.pop(best, None)
    colours[best] = OPTIMUM  # the last
    curve = read_metrics(folder / "metrics.csv")
    if curve:
        gains = style.validation_gains(contest, list(colours))
        levels = {name: (gain, colours[name]) for name, gain in gains.items()}
        metric = "charts/gain_over_avellaneda_stoikov"
        style.learning_curve(folder / "learning_curve.png", curve, metric, levels, contest.exact, f"{title}: training")
    drawn = {"agent": AGENT, AVELLANEDA_STOIKOV: BASELINE, best: OPTIMUM}
    learnt_quotes(folder / "learnt_quotes.png", contest, drawn)
    quoting_episode(folder / "episode.png", contest, drawn)
    pnls = {name: (contest.played[name]["pnl"], colour) for name, colour in drawn.items()}
    episodes = len(contest.played["agent"]["pnl"])
    style.pnl_distributions(folder / "pnl.png", pnls, f"{title}: P&L on the same {episodes:,} episodes")
    if contest.sweep is not None:
        also = {LINEAR_START: colours[LINEAR_START]}
        rival_sweep(folder / "rival_sweep.png", contest.sweep, {**drawn, **also}, title)
    if contest.dates is not None:
        style.advantage_by_date(folder / "advantage_by_date.png", contest)


@torch.no_grad()
def learnt_quotes(path: Path, contest: Contest, colours: Colours) -> None:
    """Skew against vega, half-spread against time and against implied volatility, beside the classical makers'.

    The spot is at its start, the book is hedged, the rivals quote without inventory, and there is no order flow.
    """
    figure, axes = style.new(1, 3, (16, 4.8))
    _skew_panel(axes[0], contest, colours)
    _spread_by_time_panel(axes[1], contest, colours)
    _spread_by_volatility_panel(axes[2], contest, colours)
    for axis in axes:
        style.legend(axis, framealpha=0.6)
    figure.suptitle(f"{contest.title}: the learnt quotes")
    figure.tight_layout()
    style.save(figure, path)


def _skew_panel(axis: Axes, contest: Contest, colours: Colours) -> None:
    market = contest.env.env
    steps = market.num_steps
    vega = torch.linspace(-1.0, 1.0, 81, device=market.device)
    still = contest.env.standing_still(len(vega))
    for t, line in ((0, "-"), (steps // 2, "--"), (steps * 5 // 6, ":")):
        observation = still.observe_at(t, vega)
        for name, colour in colours.items():
            skew = market.by_name(contest.policies[name](observation))["skew"]
            axis.plot(vega.cpu(), skew.cpu(), line, color=colour, label=name if t == 0 else None)
        axis.plot([], [], line, color="black", label=f"{100 * (1 - t / steps):.0f} % of the time left")
    axis.axhline(0.0, color="black", linewidth=0.6)
    axis.set(title="skew: how quotes lean against inventory", xlabel="net vega held (currency per vol point)")
    axis.set_ylabel("skew (vol points; positive attracts sellers)")


def _spread_by_time_panel(axis: Axes, contest: Contest, colours: Colours) -> None:
    market = contest.env.env
    still = contest.env.standing_still(1)
    for name, colour in colours.items():
        actions = [contest.policies[name](still.observe_at(t)) for t in range(market.num_steps)]
        axis.plot([market.by_name(action)["half_spread"].item() for action in actions], color=colour, label=name)
    axis.set(title="half-spread without inventory", xlabel="step", ylabel="half-spread (vol points)")


def _spread_by_volatility_panel(axis: Axes, contest: Contest, colours: Colours) -> None:
    market = contest.env.env
    volatilities = torch.linspace(0.5, 2.0, 41, device=market.device, dtype=market.dtype)
    variances = market.dynamics.initial_variance * volatilities**2
    still = contest.env.standing_still(len(variances), variances)
    observation = still.observe_at(market.num_steps // 2)
    implied = 100 * market.decode(observation).volatility
    # A calibrated smile is a function of the spot, which stands still here: one point
    marker = "o" if implied.std() < 1e-3 else ""
    for name, colour in colours.items():
        spread = market.by_name(contest.policies[name](observation))["half_spread"]
        axis.plot(implied.cpu(), spread.cpu(), marker=marker, color=colour, label=name)
    axis.set(
        title="half-spread without inventory, half of the time left",
        xlabel="implied volatility (%)",
        ylabel="half-spread (vol points)",
    )


class QuotedEpisode(NamedTuple):
    """The data of one episode, step by step."""

    wealth: dict[str, list[float]]  # contestant → (num_steps + 1,) currency
    edges: np.ndarray  # (num_steps, 2, 2) of the agent and a rival, ask and bid, vol points
    fills: np.ndarray  # (num_steps, 2, 2) the same, options
    vegas: np.ndarray  # (num_steps, 2) of the agent and a rival, currency per vol point
    net_delta: np.ndarray  # (num_steps,) the agent's after hedging, shares
    band: np.ndarray  # (num_steps, 2) edges of the agent's no-trade band, shares


@torch.no_grad()
def quoting_episode(path: Path, contest: Contest, colours: Colours, rival_name: str = "rival") -> None:
    """One simulated episode: quotes and fills of agent and rival, their inventories, the hedge, the wealth."""
    episode = _played(contest, colours)
    makers = {"agent": (AGENT, "-"), rival_name: (BASELINE, "--")}
    figure, axes = style.new(2, 2, (14, 8), sharex=True)
    (quotes, inventory), (hedge, money) = axes
    _quote_panel(quotes, episode, makers)
    steps = np.arange(len(episode.net_delta))
    for i, (who, (colour, line)) in enumerate(makers.items()):
        inventory.plot(steps, episode.vegas[:, i], line, color=colour, label=who)
    inventory.axhline(0.0, color="black", linewidth=0.8)
    inventory.set(title="inventory", ylabel="net vega (currency per vol point)")
    hedge.fill_between(steps, *episode.band.T, step="mid", color=AGENT, alpha=0.15, linewidth=0, label="no-trade band")
    hedge.plot(steps, episode.net_delta, "o-", color=AGENT, markersize=3, linewidth=1, label="net delta after hedging")
    hedge.axhline(0.0, color=BASELINE, linestyle="--", linewidth=1, label="Black–Scholes delta neutral")
    hedge.set(title="the agent's hedge", ylabel="net delta (shares)", xlabel="step")
    for name, wealth in episode.wealth.items():
        money.plot(np.arange(len(wealth)), wealth, color=colours[name], label=f"{name}: {wealth[-1]:.2f}")
    title = "wealth of each contestant, in the same seat with the same takers" if len(colours) > 1 else "wealth"
    money.set(title=title, ylabel="currency", xlabel="step")
    for axis in axes.flat:
        columns = 3 if axis is quotes else 1  # flat, to fit between asks and bids
        style.legend(axis, framealpha=0.6, fontsize=8, ncols=columns)
    figure.suptitle(f"{contest.title}: one episode")
    figure.tight_layout()
    style.save(figure, path)


def _played(contest: Contest, colours: Colours) -> QuotedEpisode:
    """Plays the first episode of the benchmark's seed with every contestant that has a colour, the agent among them."""
    env: AgainstRivals = contest.env.like(1)
    market = env.env
    both = [env.seat, (env.seat + 1) % market.num_makers]
    env.reset(seed=BENCHMARK_SEED)
    wealth = {}
    edges = []
    fills = []
    vegas = []
    net_deltas = []
    bands = []
    for name in colours:
        observation, _ = env.replay()
        wealth[name] = [0.0]
        for t in range(env.num_steps):
            action = contest.policies[name](observation)
            observation, _, _, _, info = env.step(action)
            wealth[name].append(market.wealth[0, env.seat].item())
            if name == "agent":
                edges.append(market.edges[0, both].cpu().numpy())
                fills.append(market.fills[0, both].sum(-1).cpu().numpy())
                vegas.append((market.position[0, both] * market.vega[t, 0]).sum(-1).cpu().numpy())
                net_deltas.append(info["net_delta"].item())
                hedge = {name: value.item() for name, value in market.by_name(action).items()}
                half_width = max(hedge["band"], 0.0)
                bands.append([hedge["target"] - half_width, hedge["target"] + half_width])
    return QuotedEpisode(wealth, *(np.array(x) for x in (edges, fills, vegas, net_deltas, bands)))


def _quote_panel(axis: Axes, episode: QuotedEpisode, makers: Mapping[str, tuple[str, str]]) -> None:
    """Asks above and bids below the mark, and fills on them; `makers`: name → (colour, line)."""
    edges = episode.edges
    fills = episode.fills
    steps = np.arange(len(edges))
    for i, (who, (colour, line)) in enumerate(makers.items()):
        axis.step(steps, edges[:, i, ASK], line, where="mid", color=colour, label=f"{who}: ask and bid")
        axis.step(steps, -edges[:, i, BID], line, where="mid", color=colour)
    for i, (who, (colour, _)) in enumerate(makers.items()):
        for side, sign, marker, verb in ((ASK, 1, "^", "sells"), (BID, -1, "v", "buys")):
            some = fills[:, i, side] > 0
            marks = {"marker": marker, "color": colour, "alpha": 0.5, "label": f"{who} {verb}"}
            axis.scatter(steps[some], sign * edges[some, i, side], 18 * fills[some, i, side], **marks)
    axis.axhline(0.0, color="black", linewidth=0.8)
    axis.set(title="quotes around the mark, and fills (area: options)", ylabel="quote − mark (vol points)")


def rival_sweep(path: Path, sweep: Mapping, colours: Colours, title: str) -> None:
    """Objective against other rivals than the one of training, from `envs.benchmark.quoting.rival_sweep`."""
    figure, panels = style.new(1, 2, (13, 4.8), sharey=True)
    for axis, (what, rows) in zip(panels, sweep.items(), strict=True):
        for name, colour in colours.items():
            if name not in next(iter(rows.values())):
                continue  # a contestant that was made for one rival
            line = "o-" if name == "agent" else "s--"
            axis.plot(list(rows), [row[name] for row in rows.values()], line, color=colour, label=name, markersize=4)
        axis.axvline(1.0, color="black", linestyle=":", linewidth=0.8, label="the rival of this benchmark")
        axis.set(xscale="log", xlabel=f"rival's {what} (multiple of the benchmark's)", ylabel="objective (currency)")
        axis.set_xticks(list(rows), [f"{x:g}" for x in rows], minor=False)
        axis.minorticks_off()
    style.legend(panels[0])
    figure.suptitle(f"{title}: objective against other rivals")
    figure.tight_layout()
    style.save(figure, path)
