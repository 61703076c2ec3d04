"""Figures of quoting (phase 3)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from envs.benchmark.contest import Contest
from envs.benchmark.makers import (
    AS_SMILE,
    AVELLANEDA_STOIKOV,
    BELIEVER_BAND,
    BEST_RESPONSE,
    CONSTANT_SPREAD,
    GLFT,
    GLFT_SMILE,
    MULTI_ASSET,
    VEGA_DP,
)
from envs.figures import style
from envs.figures.style import AGENT, BASELINE, OPTIMUM, OTHER
from envs.market.quoting import ASK, BID, QuotingEnv
from envs.market.rivals import AgainstRivals
from envs.market.units import TRADING_DAYS, VOL_POINT
from envs.run.files import read_metrics
from envs.run.seeds import BENCHMARK_SEED

Tensor = torch.Tensor
Colours = Mapping[str, str]  # contestant → colour
LIGHT_RED, LIGHT_GREEN = "#e08b7c", "#74bd8d"
LOOKS = {  # contestants of the sweeps → colour, marker and line
    "that believe in Black–Scholes": {
        AVELLANEDA_STOIKOV: (BASELINE, "s-"), BELIEVER_BAND: (LIGHT_RED, "^--"), GLFT: (LIGHT_RED, "v:"),
        CONSTANT_SPREAD: (LIGHT_RED, "x-."),
    },
    "that know the fair values": {
        MULTI_ASSET: (OPTIMUM, "D-"), VEGA_DP: (OPTIMUM, "P--"), AS_SMILE: (LIGHT_GREEN, "s:"),
        GLFT_SMILE: (LIGHT_GREEN, "^-."), BEST_RESPONSE: (OPTIMUM, "*-"),
    },
}  # fmt: skip


def quoting_report(folder: Path, contest: Contest) -> None:
    """The figures of a quoting benchmark: quotes, an episode, P&L distributions.

    Also the learning curve if the folder has a metrics.csv, the objective against other rivals if `contest.sweep` has
    it, and the advantage by date on real closes.
    """
    title = contest.title
    best = contest.best
    colours = {AVELLANEDA_STOIKOV: BASELINE, GLFT: OTHER, BELIEVER_BAND: OTHER}
    colours = {name: colour for name, colour in colours.items() if name in contest.policies and name != best}
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
        rival_sweep(folder / "rival_sweep.png", contest.sweep, title)
    if contest.dates is not None:
        style.advantage_by_date(folder / "advantage_by_date.png", contest)


def option_names(market: QuotingEnv) -> list[str]:
    """Strike and kind of every option, "94.6 put"; with several expiries also the trading days to its expiry."""
    several = len({option.expiry for option in market.options}) > 1
    names = []
    for strike, expiry, is_call in market.options:
        days = f", {trading_days(market, expiry)} d" if several else ""
        names.append(f"{strike:.1f} {'call' if is_call else 'put'}{days}")
    return names


def trading_days(market: QuotingEnv, steps: int) -> int:
    """Trading days of this many steps."""
    return round(steps * market.dynamics.dt * TRADING_DAYS)


def shown_expiries(market: QuotingEnv) -> list[list[int]]:
    """The options of each expiry; of more than three expiries those of the first, a middle one and the last."""
    expiries = sorted({option.expiry for option in market.options})
    groups = [[i for i, option in enumerate(market.options) if option.expiry == expiry] for expiry in expiries]
    if len(groups) > 3:
        groups = [groups[0], groups[len(groups) // 2], groups[-1]]
    return groups


@torch.no_grad()
def learnt_quotes(path: Path, contest: Contest, colours: Colours) -> None:
    """Bid and ask per strike beside the fair values and Black–Scholes; below, skew and half-spread.

    The spot is at its start, the rivals quote without inventory, and there is no order flow. The maker has no inventory
    either, but for the panel of the skew, where its book is hedged.
    """
    market = contest.env.env
    groups = shown_expiries(market)
    times = (0, market.num_steps // 2)
    smiles = [[f"{row} {column}" for column in range(len(groups))] for row in range(len(times))]
    if len(groups) == 1:
        smiles = [["0 0", "1 0"]]  # beside each other
    rows = [*smiles, ["skew", "time", "volatility"]]
    heights = [1.25] * len(smiles) + [1.0]
    figure, axes = style.rows_of_panels(rows, (16, 4.6 * len(rows)), height_ratios=heights)
    still = contest.env.standing_still(1)
    for row, t in enumerate(times):
        quoted = {name: _edges(contest, name, still.observe_at(t))[0] for name in colours}
        for column, group in enumerate(groups):
            _smile_panel(axes[f"{row} {column}"], still.env, t, group, quoted, colours)
    _skew_panel(axes["skew"], contest, colours)
    _spread_by_time_panel(axes["time"], contest, colours)
    _spread_by_volatility_panel(axes["volatility"], contest, colours)
    style.legend_below(figure, axes["0 0"])
    style.legend(axes["skew"], framealpha=0.6, fontsize=8)
    figure.suptitle(f"{contest.title}: the smile that the agent has learnt (quotes without inventory, the skew apart)")
    style.save(figure, path)


def _edges(contest: Contest, name: str, observation: Tensor) -> Tensor:
    """What the contestant quotes at these observations: edges (n, 2, num_options), vol points."""
    return contest.env.env.to_edges(contest.policies[name](observation))


def _smile_panel(
    axis: Axes, market: QuotingEnv, t: int, options: Sequence[int], quoted: Mapping[str, Tensor], colours: Colours
) -> None:
    """Bids, asks and fair values of some options of one expiry at step t, as volatilities.

    A price is the reference price plus its edge times the vega, so here it is the reference volatility plus the edge.
    """
    spot = market.spot[t] / market.initial_spot
    reference = market.reference_volatility(market.times[t], spot, market.variance[t]) / VOL_POINT
    reference = reference.expand(1, market.num_options)[0, options].cpu().numpy()
    strikes = np.array([market.options[i].strike for i in options])
    fair = reference + market.gap[t][0, ASK, options].cpu().numpy()
    axis.axhline(reference[0], color="black", linestyle=":", label="Black–Scholes: one volatility for all strikes")
    axis.plot(strikes, fair, "D-", color="black", markersize=5, linewidth=1.5, label="fair value", zorder=3)
    levels = []
    for name, edges in quoted.items():
        ask, bid = edges[:, options].cpu().numpy()
        levels += [reference + ask, reference - bid]
        marks = {"color": colours[name], "markersize": 6}
        line = "-" if name == "agent" else "--"
        axis.plot(strikes, reference + ask, f"{line}v", label=f"{name}: ask ▼ and bid ▲", linewidth=1, **marks)
        axis.plot(strikes, reference - bid, f"{line}^", linewidth=1, **marks)
        if name == "agent":
            axis.fill_between(strikes, reference - bid, reference + ask, color=AGENT, alpha=0.12, linewidth=0)
            axis.plot(strikes, reference + 0.5 * (ask - bid), "o-", label="agent: mid", linewidth=3, **marks)
    _limit(axis, np.concatenate(levels), fair, 3.0)
    axis.set_xticks(strikes, [f"{strike:.1f}" for strike in strikes])
    left = trading_days(market, market.options[options[0]].expiry - t)
    axis.set_title(f"{'start' if t == 0 else 'middle'} of the episode, {left} trading days to expiry")
    axis.set(xlabel="strike", ylabel="reference volatility + edge (%)")


def _limit(axis: Axes, quotes: np.ndarray, fair: np.ndarray, room: float) -> None:
    """Shows all quotes, and fair values that are no further off than `room` times the height that the quotes take.

    The vega of an option far from the money vanishes, so its fair value can be very many vol points off.
    """
    low = quotes.min()
    high = quotes.max()
    height = max(high - low, 0.1)
    low = min(low, max(fair.min(), low - room * height))
    high = max(high, min(fair.max(), high + room * height))
    axis.set_ylim(low - 0.08 * height, high + 0.08 * height)


def _skew_panel(axis: Axes, contest: Contest, colours: Colours) -> None:
    market = contest.env.env
    steps = market.num_steps
    vega = torch.linspace(-1.0, 1.0, 81, device=market.device)
    still = contest.env.standing_still(len(vega))
    for t, line in ((0, "-"), (steps // 2, "--"), (steps * 5 // 6, ":")):
        observation = still.observe_at(t, vega)
        for name, colour in colours.items():
            edges = _edges(contest, name, observation)
            skew = 0.5 * (edges[:, ASK] - edges[:, BID]).mean(-1)
            axis.plot(vega.cpu(), skew.cpu(), line, color=colour)
        axis.plot([], [], line, color="black", label=f"{100 * (1 - t / steps):.0f} % of the time left")
    axis.axhline(0.0, color="black", linewidth=0.6)
    axis.set(title="how quotes lean against inventory", xlabel="vega held at the money (currency per vol point)")
    axis.set_ylabel("mean skew (vol points; + attracts sellers)")


def _spread_by_time_panel(axis: Axes, contest: Contest, colours: Colours) -> None:
    still = contest.env.standing_still(1)
    for name, colour in colours.items():
        spreads = [_edges(contest, name, still.observe_at(t)).mean().item() for t in range(still.num_steps)]
        axis.plot(spreads, color=colour)
    axis.set(title="half-spread over the episode", xlabel="step")
    axis.set_ylabel("mean half-spread (vol points)")


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
        spread = _edges(contest, name, observation).mean((-1, -2))
        axis.plot(implied.cpu(), spread.cpu(), marker=marker, color=colour)
    axis.set(title="half-spread by volatility, middle of the episode")
    axis.set(xlabel="reference volatility (%)", ylabel="mean half-spread (vol points)")


class QuotedEpisode(NamedTuple):
    """The data of one episode, step by step."""

    wealth: dict[str, list[float]]  # contestant → (num_steps + 1,) currency
    edges: np.ndarray  # (num_steps, 2, 2, num_options) of the agent and a rival, ask and bid, vol points
    fills: np.ndarray  # (num_steps, 2, 2, num_options) the same, number of takers
    gap: np.ndarray  # (num_steps, num_options) fair value less reference price, vol points
    positions: np.ndarray  # (num_steps, num_options) the agent's after the fills, options
    vegas: np.ndarray  # (num_steps, 2) of the agent and a rival, currency per vol point
    net_delta: np.ndarray  # (num_steps,) the agent's after hedging, shares
    band: np.ndarray  # (num_steps, 2) edges of the agent's no-trade band, shares


@torch.no_grad()
def quoting_episode(path: Path, contest: Contest, colours: Colours, rival_name: str = "rival") -> None:
    """One simulated episode: quotes and fills of agent and rival, their inventories, the hedge, the wealth.

    The quotes are those of three options of the middle expiry: lowest strike, nearest the money, highest strike.
    """
    episode = _played(contest, colours)
    makers = {"agent": (AGENT, "-"), rival_name: (BASELINE, "--")}
    market = contest.env.env
    expiry = market.options[market.middle].expiry
    alike = [i for i, option in enumerate(market.options) if option.expiry == expiry]
    shown = sorted({alike[0], market.middle, alike[-1]})
    rows = ([f"quotes {i}" for i in shown], ("positions", "inventory", "hedge", "money"))
    figure, axes = style.rows_of_panels(rows, (18, 9.5), height_ratios=(1.3, 1.0))
    names = option_names(market)
    for i in shown:
        _quote_panel(axes[f"quotes {i}"], episode, i, makers)
        axes[f"quotes {i}"].set_title(f"{names[i]}: quotes and fills")
    quotes = episode.edges[..., shown] * np.array([1.0, -1.0])[:, None]  # asks above the reference price, bids below
    for i in shown:
        _limit(axes[f"quotes {i}"], quotes, episode.gap[:, shown], 0.8)
    _position_panel(figure, axes["positions"], episode.positions, names)
    _inventory_panel(axes["inventory"], episode, makers)
    _hedge_panel(axes["hedge"], episode)
    money = axes["money"]
    for name, wealth in episode.wealth.items():
        money.plot(np.arange(len(wealth)), wealth, color=colours[name], label=f"{name}: {wealth[-1]:.2f}")
    title = "wealth, each in the agent's seat" if len(colours) > 1 else "wealth"
    money.set(title=title, ylabel="currency", xlabel="step")
    for name in ("inventory", "hedge", "money"):
        style.legend(axes[name], framealpha=0.6, fontsize=8)
    style.legend_below(figure, axes[f"quotes {shown[0]}"])
    figure.suptitle(f"{contest.title}: one episode")
    style.save(figure, path)


def _played(contest: Contest, colours: Colours) -> QuotedEpisode:
    """Plays the first episode of the benchmark's seed with every contestant that has a colour, the agent among them."""
    env: AgainstRivals = contest.env.like(1)
    market = env.env
    both = [env.seat, (env.seat + 1) % market.num_makers]
    env.reset(seed=BENCHMARK_SEED)
    wealth = {}
    steps = []
    for name in colours:
        observation, _ = env.replay()
        wealth[name] = [0.0]
        for t in range(env.num_steps):
            action = contest.policies[name](observation)
            observation, _, _, _, info = env.step(action)
            wealth[name].append(market.wealth[0, env.seat].item())
            if name != "agent":
                continue
            hedge = market.by_name(action)
            target = hedge["target"].item()
            half_width = max(hedge["band"].item(), 0.0)
            steps.append((
                market.edges[0, both].cpu().numpy(),
                market.fills[0, both].cpu().numpy(),
                market.gap[t][0, ASK].cpu().numpy(),
                market.position[0, env.seat].cpu().numpy(),
                (market.position[0, both] * market.vega[t, 0]).sum(-1).cpu().numpy(),
                info["net_delta"].item(),
                (target - half_width, target + half_width),
            ))  # fmt: skip
    return QuotedEpisode(wealth, *(np.array(column) for column in zip(*steps, strict=True)))


def _quote_panel(axis: Axes, episode: QuotedEpisode, option: int, makers: Mapping[str, tuple[str, str]]) -> None:
    """Asks and bids of an option, its fair value and its fills; `makers`: name → (colour, line)."""
    steps = np.arange(len(episode.edges))
    axis.axhline(0.0, color="black", linestyle=":", label="Black–Scholes reference price")
    axis.plot(steps, episode.gap[:, option], color="black", linewidth=1.8, label="fair value, where it is in view")
    for i, (who, (colour, line)) in enumerate(makers.items()):
        asks = episode.edges[:, i, ASK, option]
        bids = -episode.edges[:, i, BID, option]
        axis.step(steps, asks, line, where="mid", color=colour, linewidth=1.2, label=f"{who}: ask and bid")
        axis.step(steps, bids, line, where="mid", color=colour, linewidth=1.2)
        if i == 0:
            axis.fill_between(steps, bids, asks, step="mid", color=colour, alpha=0.1, linewidth=0)
        for side, level, marker, verb in ((ASK, asks, "^", "sells"), (BID, bids, "v", "buys")):
            fills = episode.fills[:, i, side, option]
            some = fills > 0
            marks = {"marker": marker, "color": colour, "alpha": 0.65, "label": f"{who} {verb}", "zorder": 3}
            axis.scatter(steps[some], level[some], 36 * fills[some], **marks)
    axis.set(xlabel="step", ylabel="price − reference price (vol points)")


def _position_panel(figure: Figure, axis: Axes, positions: np.ndarray, names: Sequence[str]) -> None:
    """The agent's position in each option, as a heat map."""
    most = max(float(np.abs(positions).max()), 1.0)
    image = axis.imshow(positions.T, cmap="RdBu", vmin=-most, vmax=most, aspect="auto", interpolation="nearest")
    axis.set_yticks(range(len(names)), names, fontsize=9 if len(names) < 10 else 6)
    axis.grid(False)
    axis.set(title="the agent's position per option", xlabel="step")
    figure.colorbar(image, ax=axis, label="options held (+ long)", pad=0.02)


def _inventory_panel(axis: Axes, episode: QuotedEpisode, makers: Mapping[str, tuple[str, str]]) -> None:
    steps = np.arange(len(episode.vegas))
    for i, (who, (colour, line)) in enumerate(makers.items()):
        axis.plot(steps, episode.vegas[:, i], line, color=colour, label=who)
    axis.axhline(0.0, color="black", linewidth=0.8)
    axis.set(title="vega of the book", ylabel="net vega (currency per vol point)", xlabel="step")


def _hedge_panel(axis: Axes, episode: QuotedEpisode) -> None:
    steps = np.arange(len(episode.net_delta))
    axis.fill_between(steps, *episode.band.T, step="mid", color=AGENT, alpha=0.15, linewidth=0, label="no-trade band")
    axis.plot(steps, episode.net_delta, "o-", color=AGENT, markersize=3, linewidth=1, label="net delta after hedging")
    axis.axhline(0.0, color=BASELINE, linestyle="--", linewidth=1, label="Black–Scholes delta neutral")
    axis.set(title="the agent's hedge", ylabel="net delta (shares)", xlabel="step")


def rival_sweep(path: Path, sweep: Mapping, title: str) -> None:
    """Objective against other rivals than the one of training, from `envs.benchmark.quoting.rival_sweep`."""
    figure, axes = style.rows_of_panels([list(sweep)], (14, 4.8))
    for what, rows in sweep.items():
        axis = axes[what]
        if what != next(iter(sweep)):
            axis.sharey(axes[next(iter(sweep))])
        _sweep_lines(axis, rows)
        axis.axvline(1.0, color="black", linestyle=":", linewidth=0.8, label="the rival of this benchmark")
        axis.set(xscale="log", xlabel=f"rival's {what} (multiple of the benchmark's)", ylabel="objective (currency)")
        axis.set_xticks(list(rows), [f"{x:g}" for x in rows], minor=False)
        axis.minorticks_off()
    style.legend_beside(figure, axis)
    figure.suptitle(f"{title}: objective against other rivals")
    style.save(figure, path)


def taker_sweep(path: Path, sweep: Mapping[float, Mapping[str, Mapping[str, float]]], title: str, takers: str) -> None:
    """Objective, mean P&L and half-spread of every contestant against the share of the takers who know something.

    Args:
        sweep: share → contestant → "objective" and "pnl", currency, and "half_spread", vol points. Contestants whose
            names begin with "agent" are drawn as agents.
        takers: "informed" or "toxic".
    """
    figure, axes = style.rows_of_panels([["objective", "pnl", "half_spread"]], (20, 5.4))
    shares = sorted(sweep, key=float)
    labels = {
        "objective": "objective: P&L less the penalty for risk", "pnl": "mean P&L", "half_spread": "mean half-spread"
    }  # fmt: skip
    known = {"informed": "the fair value", "toxic": "the next step's variance"}[takers]
    for measure, label in labels.items():
        axis = axes[measure]
        rows = {
            float(share): {name: row[measure] for name, row in sweep[share].items() if measure in row}
            for share in shares
        }
        _sweep_lines(axis, rows)
        axis.set_xticks(list(rows), [f"{share:g}" for share in rows])
        axis.set(title=label, xlabel=f"share of takers who know {known}", ylabel="currency per episode")
        if measure == "half_spread":
            axis.set(ylabel="vol points", yscale="log")
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter("{x:g}")
            continue
        axis.axhline(0.0, color="black", linewidth=1.6, label="zero: what a maker earns that does not quote")
        values = [value for row in rows.values() for value in row.values()]
        high = 1.1 * max(*values, 1e-6)
        low = max(1.1 * min(*values, -0.1 * high), -0.5 * high)  # a disaster must not flatten the rest
        axis.axhspan(low, 0.0, color="black", alpha=0.05, linewidth=0, zorder=0)
        axis.set_ylim(low, high)
        for share, row in rows.items():
            for value in row.values():
                if value < low:
                    place = {"xytext": (0, 4), "textcoords": "offset points", "ha": "center", "color": AGENT}
                    axis.annotate(f"{value:.0f} ↓", (share, low), **place)
    style.legend_beside(figure, axes["pnl"])
    figure.suptitle(f"{title}: who still earns as takers learn {known}?")
    style.save(figure, path)


def _sweep_lines(axis: Axes, rows: Mapping[float, Mapping[str, float]]) -> None:
    """A line for every contestant, x → contestant → value, grouped in the legend by what they know."""
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    agents = [name for name in names if name.startswith("agent")]
    lines = ("o-", "o--", "o:", "o-.")
    groups = {"": {name: (AGENT, lines[i % len(lines)]) for i, name in enumerate(agents)}}
    groups |= {f"makers {what}:": {n: look for n, look in looks.items() if n in names} for what, looks in LOOKS.items()}
    known = [name for looks in groups.values() for name in looks]
    groups["others:"] = {name: (OTHER, "o:") for name in names if name not in known}
    for group, looks in groups.items():
        if group and looks:
            axis.plot([], [], " ", label=group)
        for name, (colour, line) in looks.items():
            points = [(x, row[name]) for x, row in rows.items() if name in row]
            own = name in agents
            width = {"linewidth": 2.6 if own else 1.3, "markersize": 7 if own else 5, "zorder": 4 if own else 2}
            hollow = {"markerfacecolor": "white"} if own and line != "o-" else {}
            axis.plot(*zip(*points, strict=True), line, color=colour, label=name, **width, **hollow)
