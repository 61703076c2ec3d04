"""Figures that every phase draws: each explains itself (title, units, baseline and optimum drawn in)."""

from collections.abc import Mapping
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure

from envs.baselines import Policy
from envs.benchmark import BENCHMARK_SEED, NAMED, VALIDATION_SEED, Benchmark, Contest, play
from envs.calibration import AGENT as AGENT_NAME
from envs.calibration import (
    CONSTANT,
    DUPIRE,
    FIRST_JUDGED,
    STRIKES,
    Calibration,
    CalibrationGame,
    Dependence,
    rmse,
)
from envs.hedging import NET_DELTA, REFERENCE_VOLATILITY, HedgingEnv
from envs.league import Competition, CrossPlay
from envs.makers import GLFT, NAMED_MAKER, STRONGEST_MAKER
from envs.marlvol import Marlvol
from envs.quoting import ASK, BID, AgainstRivals
from envs.runs import read_metrics

AGENT, BASELINE, OPTIMUM, OTHER = "#1f5fbf", "#c23b22", "#2a8f4f", "#8a8a8a"
STYLE = {
    "figure.dpi": 110, "axes.grid": True, "grid.alpha": 0.25, "axes.spines.top": False, "axes.spines.right": False,
    "legend.frameon": False, "font.size": 10,
}  # fmt: skip


def _new(rows: int = 1, columns: int = 1, size: tuple[float, float] = (7.5, 4.5), **options):
    """A figure in our style and its axes; no pyplot, so the user's backend and settings stay as they are."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size)
        return figure, figure.subplots(rows, columns, **options)


def _save(figure, path: Path) -> None:
    with matplotlib.rc_context(STYLE):
        figure.savefig(path, bbox_inches="tight", metadata={"Software": None})


def hedging_report(folder: Path, title: str, contest: Contest) -> None:
    """The figures of a hedging benchmark: training (if there is a metrics.csv), no-trade band, P&L distributions."""
    best, played, policies = contest.best, contest.played, contest.policies
    curve = read_metrics(folder / "metrics.csv")
    if curve:  # the levels on the very episodes that the curve was measured on
        validation = contest.env.like(4096)
        validation.reset(seed=VALIDATION_SEED)
        colours = {NAMED: BASELINE, "constant band, tuned": OTHER, "Whalley–Wilmott, tuned": OTHER}
        colours = {**{name: colour for name, colour in colours.items() if name != best}, best: OPTIMUM}
        objectives = {name: play(validation, policies[name])["objective_centred"].mean() for name in colours}
        levels = {name: (level - objectives[NAMED], colours[name]) for name, level in objectives.items()}
        metric = "charts/gain_over_black_scholes"
        learning_curve(folder / "learning_curve.png", curve, metric, levels, contest.exact, f"{title}: training")
    bands = contest.env.like(161)
    no_trade_bands(folder / "no_trade_bands.png", bands, policies["agent"], policies[best], best, title)
    pnls = {
        name: (played[name]["pnl"], colour) for name, colour in (("agent", AGENT), (NAMED, BASELINE), (best, OPTIMUM))
    }
    episodes = len(played["agent"]["pnl"])
    pnl_distributions(folder / "pnl.png", pnls, f"{title}: P&L on the same {episodes:,} episodes")


def learning_curve(
    path: Path, curve: list[dict], metric: str, levels: Mapping[str, tuple[float, str]], exact: bool, title: str
) -> None:
    """Gain over the named baseline during training, beside the contestants' levels; and what is left to the optimum.

    Args:
        curve: rows of metrics.csv, `metric` the name of the gain in them.
        levels: label → (paired gain over the named baseline on the same episodes, colour), the named baseline first and
            the best known last.
        exact: whether that is the exact optimum, so that nothing can be above it.
    """
    figure, panels = _new(1, 2 if exact else 1, (12 if exact else 7.5, 4.5), squeeze=False)
    axes, rest = panels[0][0], panels[0][-1]
    steps = [row["global_step"] / 1e6 for row in curve]
    gains = np.array([row[metric] for row in curve])
    axes.plot(steps, gains, color=AGENT, marker=".", label="agent (mean action)")
    best, (best_level, _) = list(levels.items())[-1]
    for i, (label, (level, colour)) in enumerate(levels.items()):
        style = {"color": colour, "linestyle": ("--", "-.", ":", "-")[i % 4]}
        axes.axhline(level, label=f"{label} ({level:+.4f})", **style)
        if exact and label != best:
            rest.axhline(best_level - level, label=label, **style)
    # Early values can be far below everything of interest
    known = [level for level, _ in levels.values()]
    low, high = min(known), max(*known, gains[-1])
    margin = 0.35 * max(high - low, 1e-6)
    axes.set_ylim(low - margin, high + margin)
    axes.set(xlabel="environment steps (millions)", ylabel=f"objective above {next(iter(levels))} (currency)")
    axes.legend(frameon=True, edgecolor="none", framealpha=0.9, loc="lower right", fontsize=9)
    if exact:
        rest.plot(steps, best_level - gains, color=AGENT, marker=".", label="agent (mean action)")
        rest.set(xlabel="environment steps (millions)", ylabel=f"objective below {best} (currency)", yscale="log")
        rest.legend(frameon=True, edgecolor="none", framealpha=0.9, loc="upper right", fontsize=9)
    figure.suptitle(f"{title}, validation episodes")
    figure.tight_layout()
    _save(figure, path)


def pnl_distributions(path: Path, pnls: Mapping[str, tuple[np.ndarray, str]], title: str) -> None:
    """Densities of the P&L of an episode on the same episodes: label → (sample (n,), colour); CVaR95 dashed."""
    figure, axes = _new()
    everything = np.concatenate([sample for sample, _ in pnls.values()])
    bins = np.linspace(*np.quantile(everything, [0.001, 0.999]), 80 if len(everything) > 20_000 else 30)
    for label, (sample, colour) in pnls.items():
        cvar = np.sort(sample)[: max(1, len(sample) // 20)].mean()
        text = f"{label}: mean {sample.mean():.3f}, sd {sample.std(ddof=1):.3f}, CVaR95 {cvar:.2f}"
        axes.hist(sample, bins, density=True, histtype="step", color=colour, linewidth=1.6, label=text)
        axes.axvline(cvar, color=colour, linestyle="--", linewidth=1)
    axes.set(title=title, xlabel="P&L of an episode (currency; dashed: mean of the worst 5 %)", ylabel="density")
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * 1.3)
    axes.legend(frameon=False, loc="upper left", fontsize=9)
    _save(figure, path)


def advantage_by_date(path: Path, dates: np.ndarray, contest: Contest, title: str) -> None:
    """Where on the calendar the agent wins: its paired advantage per window, averaged over a year of window starts.

    Args:
        dates: days of the real closes; window i starts on dates[i].
    """
    played = contest.played
    drawn = (NAMED, "Whalley–Wilmott, tuned", contest.best, "min-variance band, tuned", NAMED_MAKER, GLFT)
    rivals = [name for name in dict.fromkeys(drawn) if name in played]
    advantages = {name: played["agent"]["objective"] - played[name]["objective"] for name in rivals}
    dates = dates[: len(played["agent"]["objective"])]
    figure, axes = _new(size=(9, 4.5))
    year = min(252, len(dates))
    for i, (name, advantage) in enumerate(advantages.items()):
        mean = np.convolve(advantage, np.ones(year) / year, "valid")
        axes.plot(dates[year - 1 :], mean, color=(BASELINE, OTHER, OPTIMUM, AGENT)[i % 4], label=f"agent − {name}")
    axes.axhline(0.0, color="black", linewidth=0.8)
    axes.set(
        title=title, xlabel="last window of the year averaged starts on", ylabel="advantage in objective (currency)"
    )
    axes.legend(frameon=False, loc="best", fontsize=9)
    _save(figure, path)


def no_trade_bands(path: Path, env: HedgingEnv, agent: Policy, reference: Policy, name: str, title: str) -> None:
    """The learnt no-trade band beside a reference one, over the spot, one panel per time.

    Args:
        env: its `num_envs` is the number of spots drawn; the variance is its model's initial one. A book that client
            orders make is drawn at about half its typical size, short of every option.
        agent, reference: policies; `name` says what the reference is.
    """
    days = sorted({0, env.num_steps // 3, env.num_steps * 2 // 3, *range(env.num_steps - 3, env.num_steps)} - {-1, -2})
    sold = torch.ceil(0.5 * env.position_scale) if env.order_law.rate > 0 else torch.zeros_like(env.position_scale)
    orders = torch.zeros(env.num_envs, env.num_steps, env.num_options, 2).to(sold)
    orders[:, 0, :, 0] = sold
    figure, axes = _new(2, -(-len(days) // 2), (12, 7.5), squeeze=False, sharey=True)
    drawn = []
    for axis, day in zip(axes.flat, days, strict=False):
        left = env.num_steps - day
        # ± 2 standard deviations of what is left, but at least those of a week
        width = 2 * (env.dynamics.initial_variance * max(left, 5) * env.dynamics.dt) ** 0.5
        log_moneyness = torch.linspace(-width, width, env.num_envs, device=env.device, dtype=env.dtype)
        spots = env.middle_strike * log_moneyness.exp()
        paths = spots[:, None].repeat(1, env.num_steps + 1)
        variances = env.dynamics.typical_variance(env.times.long(), paths / env.initial_spot)
        env.set_market(paths, variances, (orders, orders))
        env.replay()
        env.t, env.holding = day, -env.delta[day]  # as if hedged at the Black–Scholes delta until now
        x = spots.cpu().numpy()
        lower, upper = _edges(reference, env.observe())
        reach = 1.5 * float(np.quantile(np.abs((lower, upper)), 0.9))
        low, high = (_traded_to(env, agent, start) for start in (-reach, reach))
        drawn += [lower, upper]
        colour = OPTIMUM if "optimum" in name else OTHER
        axis.fill_between(x, lower, upper, color=colour, alpha=0.25, linewidth=0, label=f"{name}: no trade inside")
        axis.plot(x, low, color=AGENT, linewidth=1.5, label="agent: trades to these lines from outside")
        axis.plot(x, high, color=AGENT, linewidth=1.5)
        axis.axhline(0.0, color=BASELINE, linestyle="--", linewidth=1, label="Black–Scholes delta")
        axis.set_title(f"{left} day{'s' if left > 1 else ''} to {'the end' if env.num_options > 1 else 'expiry'}")
        axis.set_xlabel("spot (currency)")
    limit = 1.6 * np.quantile(np.abs(drawn), 0.95)  # just before expiry a band may be as wide as all there is
    axes.flat[0].set_ylim(-limit, limit)
    for axis in axes.flat[len(days) :]:
        axis.set_visible(False)
    for row in axes:
        row[0].set_ylabel("shares held less Black–Scholes hedge")
    axes.flat[0].legend(frameon=True, edgecolor="none", framealpha=0.7, loc="upper left", fontsize=8)
    book = ", ".join(f"{n:g}" for n in sorted(set(sold.tolist()))) if env.order_law.rate > 0 else ""
    figure.suptitle(f"{title}: the learnt no-trade band" + (f" of a book short {book} of every option" if book else ""))
    figure.tight_layout()
    _save(figure, path)


@torch.no_grad()
def book_episode(path: Path, title: str, contest: Contest) -> None:
    """One simulated episode: spot and orders, net delta before and after hedging with the band, book, cost."""
    env = contest.env.like(1)
    env.reset(seed=BENCHMARK_SEED)
    names = ("agent", NAMED, contest.best)
    colours = dict(zip(names, (AGENT, BASELINE, OPTIMUM), strict=True))
    days = np.arange(env.num_steps)
    cost, before, after, edges = {}, [], [], []
    for name in names:
        observation, _ = env.replay()
        costs = []
        for _ in range(env.num_steps):
            if name == "agent":
                before.append((env.holding + env.delta[env.t]).item())
                edges.append([edge.item() for edge in _edges(contest.policies[name], observation)])
            observation, _, _, _, info = env.step(contest.policies[name](observation))
            costs.append(info["cost"].item())
            if name == "agent":
                after.append(info["net_delta"].item())
        cost[name] = np.cumsum(costs)
    figure, axes = _new(2, 2, (13, 8), sharex=True)
    (market, hedge), (book, costs) = axes
    market.plot(np.arange(env.num_steps + 1), env.spot[:, 0].cpu().numpy(), color="black", label="spot")
    for side, label, marker in ((0, "clients buy", "^"), (1, "clients sell", "v")):
        size = env.order_size[:, 0, :, side].cpu().numpy()
        day, option = size.nonzero()
        last = np.array([env.options[i].expiry == env.num_steps for i in option], bool)
        # those of a nearer expiry hollow and a little to the left, so that none hides another
        for chosen, face, shift, expiry in ((last, AGENT, 0.0, "last"), (~last, "none", -0.3, "nearer")):
            if chosen.any():
                strikes, area = env.strike.cpu().numpy()[option[chosen]], 25 * size[day[chosen], option[chosen]] ** 0.7
                style = {"marker": marker, "facecolors": face, "edgecolors": AGENT, "alpha": 0.7}
                market.scatter(day[chosen] + shift, strikes, area, **style, label=f"{label}, {expiry} expiry")
    market.set(title="spot, and client orders at their strikes (area: size)", ylabel="currency")
    low, high = np.array(edges).T
    hedge.fill_between(days, low, high, step="mid", color=AGENT, alpha=0.15, linewidth=0, label="agent's no-trade band")
    hedge.vlines(days, before, after, color=AGENT, linewidth=1)
    hedge.plot(days, before, "o", color=OTHER, markersize=4, label="net delta before the trade")
    hedge.plot(days, after, "o", color=AGENT, markersize=4, label="after it")
    hedge.axhline(0.0, color=BASELINE, linestyle="--", linewidth=1, label=NAMED)
    hedge.set(title="what the agent does about it", ylabel="net delta (shares)")
    gamma = (env.gamma[:-1, 0] * env.initial_spot / 100).cpu().numpy()  # delta gained by one per cent of the spot
    book.plot(days, env.delta[:-1, 0].cpu().numpy(), color=AGENT, label="delta of the options (shares)")
    book.plot(days, gamma, color=OTHER, label="change of that delta as the spot rises 1 % (shares)")
    book.bar(
        days,
        env.position[:-1, 0].sum(-1).cpu().numpy(),
        color=OTHER,
        alpha=0.25,
        label="options held, puts and calls, less those sold",
    )
    book.set(title="the book", ylabel="shares, options", xlabel="trading day")
    for name in names:
        costs.plot(days, cost[name], color=colours[name], label=f"{name}: {cost[name][-1]:.3f}")
    costs.set(
        title="cost of hedging, cumulative (the last with the unwinding)", ylabel="currency", xlabel="trading day"
    )
    for axis in axes.flat:
        for expiry in sorted({option.expiry for option in env.options}):
            axis.axvline(expiry, color="black", linestyle=":", linewidth=0.8)
        axis.legend(frameon=True, edgecolor="none", framealpha=0.6, loc="best", fontsize=8)
    figure.suptitle(f"{title}: one episode (dotted: expiry)")
    figure.tight_layout()
    _save(figure, path)


def cost_trend(path: Path, rows: Mapping[float, Mapping[str, Mapping[str, float]]], title: str) -> None:
    """How much is hedged as trading gets dearer: turnover and what delta is left, against the cost rate.

    Args:
        rows: cost rate → contestant → its figures (`benchmark.json`'s rows), of one run each.
    """
    styles = {
        "agent": (AGENT, "o-"), NAMED: (BASELINE, "s--"), "constant band, tuned": (OTHER, "^:"),
        "Whalley–Wilmott, tuned": (OTHER, "v-."), "exact optimum": (OPTIMUM, "-"),
    }  # fmt: skip
    rates = sorted(rows)
    figure, axes = _new(1, 2, (12, 4.8))
    labels = {"turnover": "shares traded in an episode", "net_delta": "mean |net delta| after trading (shares)"}
    for axis, (measure, label) in zip(axes, labels.items(), strict=True):
        for name, (colour, line) in styles.items():
            if all(name in rows[rate] for rate in rates):
                values = [rows[rate][name][measure] for rate in rates]
                axis.plot([1e4 * rate for rate in rates], values, line, color=colour, label=name, markersize=5)
        axis.set(xscale="log", xlabel="cost rate (basis points)", ylabel=label)
        axis.set_xticks([1e4 * rate for rate in rates], [f"{1e4 * rate:g}" for rate in rates], minor=False)
        axis.minorticks_off()
        axis.legend(frameon=False, fontsize=9)
    figure.suptitle(title)
    figure.tight_layout()
    _save(figure, path)


@torch.no_grad()
def _traded_to(env: HedgingEnv, policy: Policy, net_delta: float) -> np.ndarray:
    """Net delta that the policy trades to at the environment's time from `net_delta`; NaN where it does not trade.

    A policy that sees the net delta may say anything of a band's far edge, or of both from within: only what it does
    tells what it has learnt.
    """
    env.holding = net_delta - env.delta[env.t]
    observation = env.observe()
    after, _ = env.after_trade(observation, policy(observation))
    after = env.book_scale * after[:, NET_DELTA]
    return torch.where((after - net_delta).abs() > 1e-4 * abs(net_delta), after, torch.nan).cpu().numpy()


@torch.no_grad()
def _edges(policy: Policy, observation: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper edge of the band, in shares above the Black–Scholes delta."""
    offset, half_width = policy(observation).unbind(-1)
    half_width = half_width.clamp(min=0)
    return (offset - half_width).cpu().numpy(), (offset + half_width).cpu().numpy()


def quoting_report(folder: Path, title: str, contest: Contest, sweep: Mapping | None = None) -> None:
    """The figures of a quoting benchmark: training (if there is a metrics.csv), quotes, an episode, P&L, rivals."""
    policies, played, best = contest.policies, contest.played, contest.best
    colours = {NAMED_MAKER: BASELINE, GLFT: OTHER, STRONGEST_MAKER: OTHER}
    colours = {**{name: colour for name, colour in colours.items() if name != best}, best: OPTIMUM}
    curve = read_metrics(folder / "metrics.csv")
    if curve:  # the levels on the very episodes that the curve was measured on
        validation = contest.env.like(4096)
        validation.reset(seed=VALIDATION_SEED)
        objectives = {name: play(validation, policies[name])["objective_centred"].mean() for name in colours}
        levels = {name: (level - objectives[NAMED_MAKER], colours[name]) for name, level in objectives.items()}
        metric = "charts/gain_over_avellaneda_stoikov"
        learning_curve(folder / "learning_curve.png", curve, metric, levels, contest.exact, f"{title}: training")
    drawn = {"agent": AGENT, NAMED_MAKER: BASELINE, best: OPTIMUM}
    learnt_quotes(folder / "learnt_quotes.png", contest, drawn, title)
    quoting_episode(folder / "episode.png", contest, drawn, title)
    pnls = {name: (played[name]["pnl"], colour) for name, colour in drawn.items()}
    episodes = len(played["agent"]["pnl"])
    pnl_distributions(folder / "pnl.png", pnls, f"{title}: P&L on the same {episodes:,} episodes")
    if sweep is not None:
        rival_sweep(folder / "rival_sweep.png", sweep, {**drawn, STRONGEST_MAKER: colours[STRONGEST_MAKER]}, title)


@torch.no_grad()
def learnt_quotes(path: Path, contest: Contest, colours: Mapping[str, str], title: str) -> None:
    """Skew against vega, half-spread against time and against implied volatility, beside the classical makers'.

    Spot at its start, the book hedged, the rivals quoting without inventory; no order flow.
    """
    env, policies = contest.env, contest.policies
    steps = env.num_steps
    vega = torch.linspace(-1.0, 1.0, 81, device=env.device)
    figure, (skews, times, volatilities) = _new(1, 3, (16, 4.8))
    still = env.standing_still(len(vega))
    for t, line in ((0, "-"), (steps // 2, "--"), (steps * 5 // 6, ":")):
        observation = still.observe_at(t, vega)
        for name, colour in colours.items():
            label = name if t == 0 else None
            skews.plot(vega.cpu(), policies[name](observation)[:, 1].cpu(), line, color=colour, label=label)
        skews.plot([], [], line, color="black", label=f"{100 * (1 - t / steps):.0f} % of the time left")
    skews.set(title="skew: how quotes lean against inventory", xlabel="net vega held (currency per vol point)")
    skews.set_ylabel("skew (vol points; positive attracts sellers)")
    skews.axhline(0.0, color="black", linewidth=0.6)
    model = env.env.dynamics
    variances = model.initial_variance * torch.linspace(0.5, 2.0, 41, device=env.device, dtype=env.env.dtype) ** 2
    moving = env.standing_still(len(variances), variances)
    days = torch.arange(steps, device=env.device)
    single = env.standing_still(1)
    for name, colour in colours.items():
        spread = [policies[name](single.observe_at(t))[0, 0].item() for t in range(steps)]
        times.plot(days.cpu(), spread, color=colour, label=name)
        observation = moving.observe_at(steps // 2)
        implied = 100 * REFERENCE_VOLATILITY * observation[:, 3].exp()
        marker = "o" if implied.std() < 1e-3 else ""  # on a calibrated smile it is the spot's, which stands still here
        spreads = policies[name](observation)[:, 0].cpu()
        volatilities.plot(implied.cpu(), spreads, marker=marker, color=colour, label=name)
    times.set(title="half-spread without inventory", xlabel="step", ylabel="half-spread (vol points)")
    volatilities.set(title="the same at half-time", xlabel="implied volatility (%)", ylabel="half-spread (vol points)")
    for axis in (skews, times, volatilities):
        axis.legend(frameon=True, edgecolor="none", framealpha=0.6, loc="best", fontsize=9)
    figure.suptitle(f"{title}: the learnt quotes")
    figure.tight_layout()
    _save(figure, path)


@torch.no_grad()
def quoting_episode(
    path: Path, contest: Contest, colours: Mapping[str, str], title: str, rival_name: str = "rival"
) -> None:
    """One simulated episode: quotes and fills of agent and rival, their inventories, the hedge, the wealth."""
    env = contest.env.like(1)
    market, seat = env.env, env.seat
    rival = (seat + 1) % market.num_makers
    env.reset(seed=BENCHMARK_SEED)
    steps = np.arange(env.num_steps)
    wealth, edges, fills, vegas, net, bands = {}, [], [], [], [], []
    for name in colours:
        observation, _ = env.replay()
        wealth[name] = [0.0]
        for t in range(env.num_steps):
            action = contest.policies[name](observation)
            observation, _, _, _, info = env.step(action)
            wealth[name].append(market.wealth[0, seat].item())
            if name == "agent":
                edges.append(market.edges[0, [seat, rival]].cpu().numpy())
                fills.append(market.fills[0, [seat, rival]].sum(-1).cpu().numpy())
                vegas.append((market.position[0, [seat, rival]] * market.vega[t, 0]).sum(-1).cpu().numpy())
                net.append(info["net_delta"].item())
                centre, half_width = action[0, 2].item(), max(action[0, 3].item(), 0.0)
                bands.append([centre - half_width, centre + half_width])
    edges, fills, vegas, bands = (np.array(x) for x in (edges, fills, vegas, bands))
    figure, axes = _new(2, 2, (14, 8), sharex=True)
    (quotes, inventory), (hedge, money) = axes
    for i, (who, colour, line) in enumerate((("agent", AGENT, "-"), (rival_name, BASELINE, "--"))):
        quotes.step(steps, edges[:, i, ASK], line, where="mid", color=colour, label=f"{who}: ask and bid")
        quotes.step(steps, -edges[:, i, BID], line, where="mid", color=colour)
        inventory.plot(steps, vegas[:, i], line, color=colour, label=who)
    for i, (who, colour) in enumerate((("agent", AGENT), (rival_name, BASELINE))):
        for side, sign, marker, verb in ((ASK, 1, "^", "sells"), (BID, -1, "v", "buys")):
            some = fills[:, i, side] > 0
            style = {"marker": marker, "color": colour, "alpha": 0.5, "label": f"{who} {verb}"}
            quotes.scatter(steps[some], sign * edges[some, i, side], 18 * fills[some, i, side], **style)
    quotes.axhline(0.0, color="black", linewidth=0.8)
    quotes.set(title="quotes around the mark, and fills (area: options)", ylabel="vol points")
    inventory.axhline(0.0, color="black", linewidth=0.8)
    inventory.set(title="inventory", ylabel="net vega (currency per vol point)")
    hedge.fill_between(steps, *bands.T, step="mid", color=AGENT, alpha=0.15, linewidth=0, label="no-trade band")
    hedge.plot(steps, net, "o-", color=AGENT, markersize=3, linewidth=1, label="net delta after hedging")
    hedge.axhline(0.0, color=BASELINE, linestyle="--", linewidth=1, label="Black–Scholes delta neutral")
    hedge.set(title="the agent's hedge", ylabel="net delta (shares)", xlabel="step")
    for name, colour in colours.items():
        money.plot(np.arange(env.num_steps + 1), wealth[name], color=colour, label=f"{name}: {wealth[name][-1]:.2f}")
    title_of_money = "wealth of each in the same seat, with the same takers" if len(colours) > 1 else "wealth"
    money.set(title=title_of_money, ylabel="currency", xlabel="step")
    for axis in axes.flat:
        columns = 3 if axis is quotes else 1  # flat, between asks and bids
        axis.legend(frameon=True, edgecolor="none", framealpha=0.6, loc="best", fontsize=8, ncols=columns)
    figure.suptitle(f"{title}: one episode")
    figure.tight_layout()
    _save(figure, path)


def rival_sweep(path: Path, sweep: Mapping, colours: Mapping[str, str], title: str) -> None:
    """Objective against other rivals than the one of training: `sweep` as `makers.rival_sweep` returns it."""
    figure, panels = _new(1, 2, (13, 4.8), sharey=True)
    for axis, (what, rows) in zip(panels, sweep.items(), strict=True):
        for name, colour in colours.items():
            if name not in next(iter(rows.values())):
                continue  # it was made for one rival
            line = "o-" if name == "agent" else "s--"
            axis.plot(list(rows), [row[name] for row in rows.values()], line, color=colour, label=name, markersize=4)
        axis.axvline(1.0, color="black", linestyle=":", linewidth=0.8, label="the rival of this benchmark")
        axis.set(xscale="log", xlabel=f"rival's {what}, as a multiple", ylabel="objective (currency)")
        axis.set_xticks(list(rows), [f"{x:g}" for x in rows], minor=False)
        axis.minorticks_off()
    panels[0].legend(frameon=False, fontsize=9)
    figure.suptitle(f"{title}: against other rivals")
    figure.tight_layout()
    _save(figure, path)


def selfplay_report(folder: Path, title: str, contest: Contest, league: CrossPlay, compete: Competition) -> None:
    """The figures of self-play: those of a quoting benchmark, cross-play, the edge over training, an episode of the
    agent among its likes, market shares."""
    quoting_report(folder, title, contest)
    cross_play(folder / "cross_play.png", league, title)
    curve = read_metrics(folder / "metrics.csv")
    if curve:
        edge_over_training(
            folder / "edge_over_training.png", {"this run": curve}, compete.nash, compete.monopoly, title
        )
    policy, market = contest.policies["agent"], contest.env.env
    mirror = AgainstRivals(market, [policy] * (market.num_makers - 1))
    name = "selfplay_episode.png"
    quoting_episode(folder / name, replace(contest, env=mirror), {"agent": AGENT}, title, "its like")
    market_shares(folder / "market_shares.png", league, market.num_makers, title)


def cross_play(path: Path, league: CrossPlay, title: str) -> None:
    """Heat map of every policy's objective against every other, and the ratings."""
    size = len(league.names)
    figure, (heat, bars) = _new(1, 2, (7.5 + 0.75 * size, 2.4 + 0.5 * size), width_ratios=(2.2, 1))
    means = league.objective.mean(-1)
    # Objectives differ more between columns (how tough a rival is) than between rows (how good one is): colours say how
    # far a policy is from the agent in the same column
    lead = means - means[league.names.index("agent")]
    of_snapshots = [name.startswith("step ") for name in league.names]
    most = float(np.abs(lead[of_snapshots]).max(initial=1e-6))  # so that what changes in training can be seen
    image = heat.imshow(lead, cmap="RdBu", vmin=-most, vmax=most, aspect="auto")
    for i in range(size):
        for j in range(size):
            colour = "white" if abs(lead[i, j]) > 0.7 * most else "black"
            heat.text(j, i, f"{means[i, j]:.2f}", ha="center", va="center", color=colour, fontsize=8)
    heat.set_xticks(range(size), league.names, rotation=35, ha="right")
    heat.set_yticks(range(size), league.names)
    heat.grid(False)
    heat.set(xlabel="rivals", title="objective (currency) of the row against the column")
    figure.colorbar(image, ax=heat, label="above what the agent earns there", extend="both", pad=0.02)
    colours = [AGENT if name == "agent" or name.startswith("step ") else BASELINE for name in league.names]
    bars.barh(range(size), league.ratings, color=colours)
    bars.axvline(0.0, color="black", linewidth=0.8)
    bars.invert_yaxis()
    bars.set_yticks(range(size), [])
    for i, rating in enumerate(league.ratings):
        bars.text(max(rating, 0.0), i, f" {rating:+.2f}", va="center", fontsize=8)
    bars.margins(x=0.2)
    title_of_bars = f"rating ({100 * league.intransitivity:.2f} % of the margins intransitive)"
    bars.set(title=title_of_bars, xlabel="earned above the average policy, same rivals (currency)")
    figure.suptitle(f"{title}: cross-play")
    figure.tight_layout()
    _save(figure, path)


def edge_over_training(path: Path, curves: Mapping[str, list[dict]], nash: float, monopoly: float, title: str) -> None:
    """Mean half-spread of the agent among its likes over training: label → rows of metrics.csv, of one run each."""
    figure, axes = _new()
    shades = (AGENT, BASELINE, OTHER, "#b8860b", "#6a3d9a", "#008b8b")
    for (label, curve), colour in zip(curves.items(), cycle(shades), strict=False):
        steps = [row["global_step"] / 1e6 for row in curve]
        edges = [row["charts/selfplay_half_spread"] for row in curve]
        axes.plot(steps, edges, color=colour, marker=".", label=label)
    axes.axhline(nash, color=OPTIMUM, linestyle="-", label=f"Nash without risk and costs ({nash:.3f})")
    axes.axhline(monopoly, color="black", linestyle=":", label=f"monopoly without risk and costs ({monopoly:.3f})")
    axes.set(xlabel="environment steps (millions)", ylabel="mean half-spread, all makers alike (vol points)")
    axes.legend(frameon=True, edgecolor="none", framealpha=0.8, loc="best", fontsize=9)
    axes.set_title(f"{title}:\ndo makers that learn from each other compete or collude?", fontsize=10)
    _save(figure, path)


def market_shares(path: Path, league: CrossPlay, num_makers: int, title: str) -> None:
    """Who gets the takers: the agent, its rivals, nobody, for every kind of rival; and how that came with training."""
    figure, (rivals, training) = _new(1, 2, (14, 0.45 * len(league.names) + 2.2), width_ratios=(1.5, 1))
    agent, names = league.names.index("agent"), league.names
    own, others = 100 * league.share[agent], 100 * league.others_share[agent]
    rows = np.arange(len(names))
    rivals.barh(rows, own, color=AGENT, label="the agent")
    rivals.barh(rows, others, left=own, color=BASELINE, label="its rivals" if num_makers > 2 else "its rival")
    rivals.barh(rows, 100 - own - others, left=own + others, color=OTHER, alpha=0.5, label="walk away")
    rivals.set_yticks(rows, names)
    rivals.invert_yaxis()
    rivals.set(xlabel="share of the takers (%)", ylabel="rivals", title="the agent against …")
    snapshots = [name for name in names if name.startswith("step ")] + ["agent"]
    where = [names.index(name) for name in snapshots]
    for name, colour, line in ((NAMED_MAKER, BASELINE, "s--"), (STRONGEST_MAKER, OTHER, "^:"), ("agent", AGENT, "o-")):
        column = names.index(name)
        share = league.share[where, column] / (league.share[where, column] + league.others_share[where, column])
        training.plot(range(len(where)), 100 * share, line, color=colour, label=f"against {name}")
    training.axhline(100 / num_makers, color="black", linewidth=0.8, label="an equal part")
    training.set_xticks(range(len(where)), snapshots, rotation=20, ha="right")
    training.set(ylabel="share of all trades (%)", title="market share of each snapshot")
    for axis in (rivals, training):
        axis.legend(frameon=True, edgecolor="none", framealpha=0.8, loc="best", fontsize=8)
    figure.suptitle(f"{title}: market shares")
    figure.tight_layout()
    _save(figure, path)


def calibration_report(
    folder: Path,
    title: str,
    game: CalibrationGame,
    result: Benchmark,
    played: Mapping[str, Calibration],
    market: Marlvol,
) -> None:
    """The figures of a calibrated smile: training (if there is a metrics.csv), the smiles, local volatility."""
    curve = read_metrics(folder / "metrics.csv")
    if curve:
        levels = {CONSTANT: BASELINE, DUPIRE: OPTIMUM}
        levels = {name: (result.rows[name]["rmse"], colour) for name, colour in levels.items()}
        calibration_curve(folder / "learning_curve.png", curve, levels, f"{title}: training")
    continuum_of_smiles(folder / "smiles.png", game, played, title)
    learnt_local_volatility(folder / "local_volatility.png", market, title)


def calibration_curve(path: Path, curve: list[dict], levels: Mapping[str, tuple[float, str]], title: str) -> None:
    """RMSE during training beside the levels (label → level, colour) of models that do not learn."""
    figure, axes = _new()
    steps = [row["global_step"] / 1e6 for row in curve]
    axes.semilogy(
        steps, [row["charts/rmse"] for row in curve], color=AGENT, marker=".", label="agent (mean action): RMSE"
    )
    worst = [row["charts/max_error"] for row in curve]
    axes.semilogy(steps, worst, color=AGENT, linestyle=":", linewidth=1, label="agent: largest error")
    for label, (level, colour) in levels.items():
        axes.axhline(level, color=colour, linestyle="--", label=f"{label}: RMSE {level:.3f}")
    axes.set(title=title, xlabel="player steps (millions)", ylabel="error of implied volatility (vol points)")
    axes.legend()
    _save(figure, path)


def continuum_of_smiles(path: Path, game: CalibrationGame, played: Mapping[str, Calibration], title: str) -> None:
    """The market's smiles and the agent's, as the paper's figure 1; and the errors of agent and Dupire everywhere."""
    figure, panels = _new(1, 3, (17, 5), gridspec_kw={"width_ratios": (1.6, 1, 1)})
    days = game.days.tolist()
    shown = sorted({day for day in (7, 14, 21, 30, 40, game.num_steps) if day <= game.num_steps})
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(shown)))
    for day, colour in zip(shown, colours, strict=True):
        i = days.index(day)
        strike, market = game.strike[i].cpu().numpy(), 100 * game.market_volatility[i].cpu().numpy()
        panels[0].plot(strike, market, color=colour, label=f"day {day}")
        panels[0].plot(strike, market + played[AGENT_NAME].errors[i].numpy(), "o", color=colour, markersize=4)
        panels[0].plot(strike, market + played[DUPIRE].errors[i].numpy(), "x", color=colour, markersize=4, alpha=0.6)
    panels[0].plot([], [], "ko", markersize=4, label="agent")
    panels[0].plot([], [], "kx", markersize=4, label=DUPIRE)
    panels[0].set(title="market (lines) and models", xlabel="strike / spot", ylabel="implied volatility (%)")
    panels[0].legend(ncols=2)
    for axes, name in zip(panels[1:], (AGENT_NAME, DUPIRE), strict=True):
        errors = played[name].errors.numpy()
        half = float(STRIKES[1] - STRIKES[0]) / 2  # of a cell
        extent = (float(STRIKES[0]) - half, float(STRIKES[-1]) + half, days[-1] + 0.5, days[0] - 0.5)
        image = axes.imshow(errors, aspect="auto", extent=extent, cmap="RdBu", vmin=-0.4, vmax=0.4)
        axes.axhline(FIRST_JUDGED - 0.5, color="black", linewidth=0.8, linestyle="--")
        error = float(rmse(played[name].errors))
        axes.set(title=f"{name}\nRMSE {error:.3f} below the line", xlabel="ln(strike / spot) (standard deviations)")
        axes.grid(False)
    panels[1].set_ylabel("maturity (trading days)")
    figure.colorbar(image, ax=panels[1:], label="model − market (vol points)")
    figure.suptitle(f"{title}: the continuum of smiles", y=1.04)
    _save(figure, path)


def learnt_local_volatility(path: Path, market: Marlvol, title: str) -> None:
    """√E[σ_t²|S_t] that was learnt beside Dupire's local volatility of the same smile, where 99 % of the paths are."""
    figure, axes = _new()
    game = market.game
    shown = [day for day in (5, 15, 30, game.num_steps - 1) if day < game.num_steps]
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.85, len(shown)))
    for day, colour in zip(shown, colours, strict=True):
        x = torch.linspace(-2.6, 2.0, 93) * game.grid.scale[day]
        step, spot = torch.tensor(day * market.steps_per_day), x.exp()
        learnt = 100 * market.typical_variance(step, spot).sqrt()
        dupire = 100 * game.grid.lookup(game.local_volatility[day][None], day, x[None])[0]
        axes.plot(spot, learnt, color=colour, label=f"day {day}")
        axes.plot(spot, dupire, "--", color=colour, linewidth=1)
    axes.plot([], [], "k-", label="learnt")
    axes.plot([], [], "k--", linewidth=1, label="Dupire")
    axes.set(title=f"{title}: local volatility", xlabel="spot / initial spot", ylabel="volatility (%)")
    axes.legend()
    _save(figure, path)


def bermudan_report(folder: Path, title: str, result: Benchmark, learnt: Dependence, beside: str | None) -> None:
    """The figures of a Bermudan: its price during training, beside another run's, and what volatility depends on."""
    curves = {"this run": read_metrics(folder / "metrics.csv")}
    if beside is not None:
        curves[f"{beside}"] = read_metrics(Path(beside) / "metrics.csv")
    if curves["this run"]:
        bermudan_training(folder / "learning_curve.png", curves, result, title)
    learnt_dependence(folder / "learnt_dependence.png", learnt, title)


def bermudan_training(path: Path, curves: Mapping[str, list[dict]], result: Benchmark, title: str) -> None:
    """Bermudan price (label → rows of a metrics.csv) beside local volatility's and the European floor."""
    figure, axes = _new()
    for (label, curve), colour in zip(curves.items(), (AGENT, OTHER), strict=False):
        steps = [row["global_step"] / 1e6 for row in curve]
        axes.plot(steps, [1e4 * row["charts/bermudan_price"] for row in curve], color=colour, marker=".", label=label)
    theirs = result.rows[DUPIRE]
    axes.axhline(theirs["price"], color=BASELINE, linestyle="--", label=f"{DUPIRE}: {theirs['price']:.1f}")
    floor = result.rows[AGENT_NAME]["floor"]
    axes.axhline(floor, color="black", linestyle=":", label=f"European floor: {floor:.1f}")
    axes.set(title=f"{title}: Bermudan price", xlabel="player steps (millions)", ylabel="price (bp of the spot)")
    axes.legend()
    _save(figure, path)


def learnt_dependence(path: Path, learnt: Dependence, title: str) -> None:
    """Mean of the learnt m and of the localised volatility against ln S_t1 and against ln S_t, after t1."""
    figure, axes = _new(2, 2, (12, 8))
    rows = (("learnt σ_t (m, before localisation)", learnt.log_multiplier.exp(), 1.0),)
    rows += (("localised volatility (%)", learnt.volatility, 100.0),)
    columns = (("ln S_t1", learnt.log_spot_t1), ("ln S_t, t > t1", learnt.log_spot))
    for (label, values, unit), line in zip(rows, axes, strict=True):
        for (name, x), axis in zip(columns, line, strict=True):
            x, values_ = x.flatten().cpu(), unit * values.flatten().cpu()
            edges = torch.quantile(x[:: max(1, len(x) // 200_000)], torch.linspace(0.01, 0.99, 41))
            index = torch.bucketize(x, edges)
            counts = torch.bincount(index, minlength=42)[1:-1].clamp(min=1)
            mean, middle = (torch.bincount(index, y.double(), 42)[1:-1] / counts for y in (values_, x))
            axis.plot(middle, mean, color=AGENT, marker=".", label="mean over paths and days")
            axis.set(xlabel=name, ylabel=label)
            if name == "ln S_t1":
                axis.axvline(0.0, color=BASELINE, linestyle="--", label="k1")
                axis.axvline(
                    np.log(learnt.kink), color=OPTIMUM, linestyle=":", label="where the mean localised volatility bends"
                )
            axis.legend()
    figure.suptitle(f"{title}: what was learnt")
    figure.tight_layout()
    _save(figure, path)
