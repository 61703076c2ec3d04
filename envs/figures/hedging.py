"""Figures of hedging (phases 1 and 2)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes

from envs.benchmark.contest import Contest
from envs.benchmark.hedging import BLACK_SCHOLES
from envs.figures import style
from envs.figures.style import AGENT, BASELINE, OPTIMUM, OTHER
from envs.market.hedging import HedgingEnv, Policy
from envs.market.mixture import Mixture
from envs.run.files import read_metrics
from envs.run.seeds import BENCHMARK_SEED


def hedging_report(folder: Path, contest: Contest) -> None:
    """The figures of a hedging benchmark: no-trade band and P&L distributions.

    Also the learning curve if the folder has a metrics.csv, an episode if clients trade with the book, and the
    advantage by date on real closes.
    """
    title = contest.title
    best = contest.best
    curve = read_metrics(folder / "metrics.csv")
    if curve:
        colours = {BLACK_SCHOLES: BASELINE, "constant band, tuned": OTHER, "Whalley–Wilmott, tuned": OTHER}
        colours.pop(best, None)
        colours[best] = OPTIMUM  # the last
        gains = style.validation_gains(contest, list(colours))
        levels = {name: (gain, colours[name]) for name, gain in gains.items()}
        metric = "charts/gain_over_black_scholes"
        style.learning_curve(folder / "learning_curve.png", curve, metric, levels, contest.exact, f"{title}: training")
    policies = contest.policies
    if not isinstance(contest.env.dynamics, Mixture):  # there every row has a model of its own, and its own bands
        env = contest.env.like(161)
        no_trade_bands(folder / "no_trade_bands.png", env, policies["agent"], policies[best], best, title)
    drawn = {"agent": AGENT, BLACK_SCHOLES: BASELINE, best: OPTIMUM}
    pnls = {name: (contest.played[name]["pnl"], colour) for name, colour in drawn.items()}
    episodes = len(contest.played["agent"]["pnl"])
    style.pnl_distributions(folder / "pnl.png", pnls, f"{title}: P&L on the same {episodes:,} episodes")
    if contest.env.order_law.rate > 0:
        book_episode(folder / "book_episode.png", contest)
    if contest.dates is not None:
        style.advantage_by_date(folder / "advantage_by_date.png", contest)


def no_trade_bands(path: Path, env: HedgingEnv, agent: Policy, reference: Policy, name: str, title: str) -> None:
    """The learnt no-trade band beside a reference one, over the spot, one panel per time.

    Args:
        env: its `num_envs` is the number of spots drawn; the variance is its model's initial one. With client orders
            the book drawn is short of every option, about half its typical position.
        agent: learnt policy.
        reference: policy drawn beside it.
        name: of the reference.
    """
    num_steps = env.num_steps
    days = sorted({0, num_steps // 3, num_steps * 2 // 3, *range(max(0, num_steps - 3), num_steps)})
    sold = torch.zeros_like(env.position_scale)
    of_a_book = ""
    if env.order_law.rate > 0:
        sold = torch.ceil(0.5 * env.position_scale)
        sizes = ", ".join(f"{n:g}" for n in sorted(set(sold.tolist())))
        of_a_book = f" of a book short {sizes} of every option"
    figure, axes = style.new(2, -(-len(days) // 2), (12, 7.5), squeeze=False, sharey=True)
    bands = []
    for axis, day in zip(axes.flat, days, strict=False):
        spots = _spread_over_spots(env, day, sold)
        bands.append(_band_panel(axis, env, spots, agent, reference, name))
        left = num_steps - day
        axis.set_title(f"{left} day{'s' if left > 1 else ''} to {'the end' if env.num_options > 1 else 'expiry'}")
    limit = 1.6 * np.quantile(np.abs(bands), 0.95)  # just before expiry a band may have no limits
    axes.flat[0].set_ylim(-limit, limit)
    for axis in axes.flat[len(days) :]:
        axis.set_visible(False)
    for row in axes:
        row[0].set_ylabel("shares held − Black–Scholes hedge")
    style.legend(axes.flat[0], "upper left", framealpha=0.7, fontsize=8)
    figure.suptitle(f"{title}: the learnt no-trade band{of_a_book}")
    figure.tight_layout()
    style.save(figure, path)


def _spread_over_spots(env: HedgingEnv, day: int, sold: torch.Tensor) -> np.ndarray:
    """Puts every row at a spot of its own on that day, short `sold`, hedged at the Black–Scholes delta: spots (n,)."""
    # ± 2 standard deviations of the time left, at least of a week
    width = 2 * (env.dynamics.initial_variance * max(env.num_steps - day, 5) * env.dynamics.dt) ** 0.5
    log_moneyness = torch.linspace(-width, width, env.num_envs, device=env.device, dtype=env.dtype)
    spots = env.middle_strike * log_moneyness.exp()
    paths = spots[:, None].repeat(1, env.num_steps + 1)
    variances = env.dynamics.typical_variance(env.times.long(), paths / env.initial_spot)
    orders = torch.zeros(env.num_envs, env.num_steps, env.num_options, 2).to(sold)
    orders[:, 0, :, 0] = sold
    env.set_market(paths, variances, (orders, orders))
    if env.trader_view:
        env.forget()  # on paths that stand still nothing moves, which is no news here
    env.replay()
    env.t = day
    env.holding = -env.delta[day]
    return spots.cpu().numpy()


def _band_panel(
    axis: Axes, env: HedgingEnv, spots: np.ndarray, agent: Policy, reference: Policy, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """Draws both bands at the environment's state; returns the edges of the reference."""
    lower, upper = _edges(env, reference, env.observe())
    reach = 1.5 * float(np.quantile(np.abs((lower, upper)), 0.9))
    colour = OPTIMUM if "optimum" in name else OTHER
    axis.fill_between(spots, lower, upper, color=colour, alpha=0.25, linewidth=0, label=f"{name}: no trade inside")
    low = _traded_to(env, agent, -reach)
    high = _traded_to(env, agent, reach)
    axis.plot(spots, low, color=AGENT, linewidth=1.5, label="agent: trades to these lines from outside")
    axis.plot(spots, high, color=AGENT, linewidth=1.5)
    axis.axhline(0.0, color=BASELINE, linestyle="--", linewidth=1, label="Black–Scholes delta")
    axis.set_xlabel("spot (currency)")
    return lower, upper


@torch.no_grad()
def _traded_to(env: HedgingEnv, policy: Policy, net_delta: float) -> np.ndarray:
    """Net delta that the policy trades to at the environment's time from `net_delta`; NaN where it does not trade.

    Only the trade shows what a policy has learnt that sees the net delta: the far edge of its band does not matter, and
    neither edge matters while the net delta is between them.
    """
    env.holding = net_delta - env.delta[env.t]
    observation = env.observe()
    after, _ = env.after_trade(observation, policy(observation))
    after = env.book_scale * env.column(after, "net delta")
    return torch.where((after - net_delta).abs() > 1e-4 * abs(net_delta), after, torch.nan).cpu().numpy()


@torch.no_grad()
def _edges(env: HedgingEnv, policy: Policy, observation: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper edge of the band, in shares above the Black–Scholes hedge."""
    action = env.by_name(policy(observation))
    half_width = action["half_width"].clamp(min=0)
    return (action["offset"] - half_width).cpu().numpy(), (action["offset"] + half_width).cpu().numpy()


class HedgedEpisode(NamedTuple):
    """The data of one episode."""

    cost: dict[str, np.ndarray]  # contestant → (num_steps,) cumulative, currency
    before: np.ndarray  # (num_steps,) the agent's net delta before its trade, shares
    after: np.ndarray  # (num_steps,) and after it
    edges: np.ndarray  # (num_steps, 2) of the agent's band, shares above the Black–Scholes hedge


@torch.no_grad()
def book_episode(path: Path, contest: Contest) -> None:
    """One simulated episode: spot and orders, net delta before and after hedging with the band, book, cost."""
    env = contest.env.like(1)
    env.reset(seed=BENCHMARK_SEED)
    colours = {"agent": AGENT, BLACK_SCHOLES: BASELINE, contest.best: OPTIMUM}
    episode = _played(env, contest.policies, list(colours))
    figure, axes = style.new(2, 2, (13, 8), sharex=True)
    _order_panel(axes[0, 0], env)
    _hedge_panel(axes[0, 1], episode)
    _book_panel(axes[1, 0], env)
    for name, cost in episode.cost.items():
        axes[1, 1].plot(np.arange(env.num_steps), cost, color=colours[name], label=f"{name}: {cost[-1]:.3f}")
    axes[1, 1].set_title("cumulative cost of hedging (the last value includes the unwinding)")
    axes[1, 1].set(ylabel="currency", xlabel="trading day")
    for axis in axes.flat:
        for expiry in sorted({option.expiry for option in env.options}):
            axis.axvline(expiry, color="black", linestyle=":", linewidth=0.8)
        style.legend(axis, framealpha=0.6, fontsize=8)
    figure.suptitle(f"{contest.title}: one episode (dotted: expiry)")
    figure.tight_layout()
    style.save(figure, path)


def _played(env: HedgingEnv, policies: Mapping[str, Policy], names: Sequence[str]) -> HedgedEpisode:
    """Plays the environment's market, one row, with every contestant named."""
    cost = {}
    before = []
    after = []
    edges = []
    for name in names:
        observation, _ = env.replay()
        costs = []
        for _ in range(env.num_steps):
            if name == "agent":
                before.append((env.holding + env.delta[env.t]).item())
                edges.append([edge.item() for edge in _edges(env, policies[name], observation)])
            observation, _, _, _, info = env.step(policies[name](observation))
            costs.append(info["cost"].item())
            if name == "agent":
                after.append(info["net_delta"].item())
        cost[name] = np.cumsum(costs)
    return HedgedEpisode(cost, np.array(before), np.array(after), np.array(edges))


def _order_panel(axis: Axes, env: HedgingEnv) -> None:
    """The spot, and client orders at their strikes."""
    axis.plot(np.arange(env.num_steps + 1), env.spot[:, 0].cpu().numpy(), color="black", label="spot")
    strike = env.strike.cpu().numpy()
    for side, label, marker in ((0, "clients buy", "^"), (1, "clients sell", "v")):
        size = env.order_size[:, 0, :, side].cpu().numpy()
        day, option = size.nonzero()
        last = np.array([env.options[i].expiry == env.num_steps for i in option], bool)
        # Nearer expiries are hollow and a little to the left, so that no order hides another
        for chosen, face, shift, expiry in ((last, AGENT, 0.0, "last"), (~last, "none", -0.3, "nearer")):
            if chosen.any():
                area = 25 * size[day[chosen], option[chosen]] ** 0.7
                marks = {"marker": marker, "facecolors": face, "edgecolors": AGENT, "alpha": 0.7}
                text = f"{label}, {expiry} expiry"
                axis.scatter(day[chosen] + shift, strike[option[chosen]], area, **marks, label=text)
    axis.set(title="spot, and client orders at their strikes (area: size)", ylabel="currency")


def _hedge_panel(axis: Axes, episode: HedgedEpisode) -> None:
    """The agent's net delta before and after each trade, and its band."""
    days = np.arange(len(episode.before))
    band = {"color": AGENT, "alpha": 0.15, "linewidth": 0, "label": "agent's no-trade band"}
    axis.fill_between(days, *episode.edges.T, step="mid", **band)
    axis.vlines(days, episode.before, episode.after, color=AGENT, linewidth=1)
    axis.plot(days, episode.before, "o", color=OTHER, markersize=4, label="net delta before the trade")
    axis.plot(days, episode.after, "o", color=AGENT, markersize=4, label="net delta after the trade")
    axis.axhline(0.0, color=BASELINE, linestyle="--", linewidth=1, label=BLACK_SCHOLES)
    axis.set(title="the agent's hedge", ylabel="net delta (shares)")


def _book_panel(axis: Axes, env: HedgingEnv) -> None:
    """Delta, gamma and size of the options held."""
    days = np.arange(env.num_steps)
    delta = env.delta[:-1, 0].cpu().numpy()
    gamma = (env.gamma[:-1, 0] * env.initial_spot / 100).cpu().numpy()
    held = env.position[:-1, 0].sum(-1).cpu().numpy()
    axis.plot(days, delta, color=AGENT, label="delta of the options (shares)")
    axis.plot(days, gamma, color=OTHER, label="change of that delta as the spot rises 1 % (shares)")
    axis.bar(days, held, color=OTHER, alpha=0.25, label="net number of options held")
    axis.set(title="the book", ylabel="shares or options", xlabel="trading day")


def cost_trend(path: Path, rows: Mapping[float, Mapping[str, Mapping[str, float]]], title: str) -> None:
    """How much is hedged as trading gets dearer: turnover and remaining delta against the cost rate.

    Args:
        rows: cost rate → contestant → its figures (`benchmark.json`'s rows), of one run each.
    """
    styles = {
        "agent": (AGENT, "o-"), BLACK_SCHOLES: (BASELINE, "s--"), "constant band, tuned": (OTHER, "^:"),
        "Whalley–Wilmott, tuned": (OTHER, "v-."), "exact optimum": (OPTIMUM, "-"),
    }  # fmt: skip
    rates = sorted(rows)
    figure, axes = style.new(1, 2, (12, 4.8))
    labels = {"turnover": "shares traded in an episode", "net_delta": "mean |net delta| after trading (shares)"}
    for axis, (measure, label) in zip(axes, labels.items(), strict=True):
        for name, (colour, line) in styles.items():
            if all(name in rows[rate] for rate in rates):
                values = [rows[rate][name][measure] for rate in rates]
                axis.plot([1e4 * rate for rate in rates], values, line, color=colour, label=name, markersize=5)
        axis.set(xscale="log", xlabel="cost rate (basis points)", ylabel=label)
        axis.set_xticks([1e4 * rate for rate in rates], [f"{1e4 * rate:g}" for rate in rates], minor=False)
        axis.minorticks_off()
        style.legend(axis)
    figure.suptitle(title)
    figure.tight_layout()
    style.save(figure, path)
