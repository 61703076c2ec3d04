"""QuotingEnv: makers compete for takers of European options and hedge the inventory that their trades leave.

In every step each maker quotes a bid and an ask on every option, takers arrive and trade with a maker or walk away,
every maker hedges the delta of its book at a cost, and then the market moves: quote → fills → hedge → move. With
W = cash + shares + options at their fair value, ΔW its change as the market moves, and income the edge over the fair
value that the step's fills have earned, a maker's reward is

    r_t = income_t + ΔW_t − cost_t − ½ · risk_aversion · ΔW_t²          (Kolm & Ritter 2019, eq. 7),

so risk is that of the inventory, not of the earned edge. The episode ends before the options expire: the book is marked
and the hedge unwound at cost.

An option has two prices. Its *reference price* is what a Black–Scholes maker believes: one volatility, the root of the
expected average variance, for all strikes. Its *fair value* is the expectation of its payoff under the model of the
underlying, so the smile that this model has is the difference between the two. Quotes are edges over the reference
price; most takers compare them with it, and informed ones with the fair value.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise, zip_longest
from typing import NamedTuple
from weakref import WeakKeyDictionary

import gymnasium as gym
import numpy as np
import torch
from scipy.stats import poisson

from envs.market import black_scholes
from envs.market.black_scholes import normal_cdf
from envs.market.dynamics import Dynamics, Heston
from envs.market.env import MarketEnv, Part
from envs.market.fair import known_premium_table
from envs.market.hedging import Option, check_increasing, nearest_in_band
from envs.market.units import MIN_VARIANCE, REFERENCE_VOLATILITY, VOL_POINT

Tensor = torch.Tensor
ASK, BID = 0, 1  # takers buy at the ask and sell at the bid: the axis before the options', of quotes, takers and fills
MAX_FLOW = 0.9  # the order flow's imbalance is cut here, so that some takers come to either side
ROUNDING = 1e-4  # vol points by which quotes may cross: an edge is the sum of numbers of a few vol points
MIN_VEGA = 1e-3  # currency per vol point: what is divided by a vega, which vanishes far from the money, is cut here
ROWS_AT_ONCE = 4096  # rows times steps that are settled together, so that they fit into the cache of a CPU
# Tables of a market, (num_steps + 1 or num_steps, n, …)
TABLES = (
    "spot", "variance", "intensity", "marks", "before", "volatility", "reference", "mark", "delta", "vega", "premium",
    "gap", "fair_delta", "fair_slope", "scaled_log_spot", "log_volatility", "variance_surprise", "covariance",
    "next_variance_variance", "return_variance", "residual_sd",
)  # fmt: skip


class BadQuote(ValueError):
    """An action that no market takes. The message names the number, the maker and the step."""


class QuotingState(NamedTuple):
    """A maker's observation in natural units; (n,), the last two wider."""

    step: Tensor  # steps made so far, integer
    spot: Tensor  # currency
    variance: Tensor  # annualised variance that drives the next step
    volatility: Tensor  # of the reference price of the middle option
    time_to_expiry: Tensor  # of the middle option, years
    vega: Tensor  # of the own book, currency per vol point
    net_delta: Tensor  # own, shares, before this step's fills
    flow: Tensor  # moving average of takers' buys less sells, per expected taker
    rivals: Tensor  # (n, num_makers − 1, 2, num_options) their last ask and bid edges, vol points
    position: Tensor  # (n, num_options) own, + long


class Market(NamedTuple):
    """What makers and takers meet at one time, the axis of the environments last; at the end there are no takers."""

    seen: list[Tensor | Part]  # the parts of an observation in order, (width, num_makers, n) where they are known
    of_book: Tensor  # (2, 1, num_options, n) vegas and deltas
    residual_sd: Tensor  # (n,)
    utility: Tensor | None  # (kinds, 1, 2, num_options, n) of a quote at the reference price, by kind of takers
    marks: Tensor | None  # (max_takers, 1, 1, 2, num_options, n)
    before: Tensor | None  # (2, num_options, n) how many marks come before those of each kind, summed over the kinds


class Trades(NamedTuple):
    """What the makers did in a step, the axis of the environments last: all that `settle` needs of it."""

    edges: Tensor  # (num_makers, 2, num_options, n)
    picked: Tensor  # the same: probability that a taker picks the maker
    fills: Tensor  # the same: takers who traded with the maker
    position: Tensor  # (num_makers, num_options, n) after the fills
    traded: Tensor  # (num_makers, n) shares bought
    holding: Tensor  # (num_makers, n) shares after that


def rows_last(values: Tensor, rows: int = 0) -> Tensor:
    """`values` with the axis `rows`, that of the environments, moved to the end, in memory too. The other axes of a
    market are short, and a CPU is many times faster along a long one."""
    return values.movedim(rows, -1).contiguous()


def uncross(ask: Tensor, bid: Tensor) -> tuple[Tensor, Tensor]:
    """Edges of asks and bids (…), those that cross (an ask below its bid) moved to the middle between them."""
    excess = 0.5 * (ask + bid).clamp(max=0)
    ask = ask - excess
    return ask, torch.maximum(bid - excess, -ask)


def moneyness_grid(moneyness: Sequence[float], expiries: Sequence[int], dt: float, spot: float = 100.0) -> list[Option]:
    """One option for every moneyness z and expiry: strike spot · exp(z · 0.2 · √T), the option out of the money.

    Args:
        moneyness: z, increasing: distance from the money in standard deviations of a volatility of 20 %.
        expiries: increasing, steps from the start.
        dt: years of a step.

    Raises:
        ValueError: moneyness or expiries empty or not increasing.
    """
    check_increasing(moneyness=moneyness, expiries=expiries)
    return [
        Option(float(spot * np.exp(z * REFERENCE_VOLATILITY * (expiry * dt) ** 0.5)), int(expiry), z >= 0)
        for expiry in expiries
        for z in moneyness
    ]


class QuotingEnv(MarketEnv):
    """A market of `num_makers` makers in European options, many episodes side by side.

    Takers: on each option, buyers and sellers arrive as Poisson processes with intensities λ(1 + f) and λ(1 − f), f an
    autoregressive imbalance (a Cox process: order flow is persistent). A taker sees every maker's quote and picks by
    multinomial logit (McFadden 1974): P(maker i) ∝ exp(−k(dᵢ − d_ref)), outside option 1, dᵢ the maker's edge on that
    side in vol points: over the fair value where the taker is informed, and over the reference price otherwise. Each
    taker carries a mark, uniform in [0, 1]; marks below `informed_share` are the informed. On what is left of a mark
    the makers' intervals are laid out in the order of their edges, best first. So every policy on the same seed meets
    the same takers, and swapping two makers swaps their results path by path (where two quote exactly alike, the lower
    seat comes first).

    Args:
        num_envs: episodes side by side; all start and end together.
        dynamics: model of the underlying; its `dt` is the time between quotes. Default: Heston, half a trading day.
        options: quoted, in the order of their expiry and strike; they expire after the episode or with its end.
            Default: five of one expiry, twice as far as the episode's end, see `moneyness_grid`.
        num_makers: makers, at least 1. All seats are alike.
        num_steps: steps of an episode.
        arrival_rate: λ, mean number of takers a step on each option and side.
        flow_sd, flow_half_life: standard deviation of f, and its half-life in steps.
        choice_sensitivity: k, per vol point. The larger, the more takers go to the best price.
        reference_edge: d_ref, vol points: at this edge a taker is as likely to pick a single maker as to walk away.
        informed_share: share of the takers that compare quotes with the fair value.
        toxic_share: share of the takers that know the variance of the next step, and compare quotes with what options
            will be worth at it if the spot stays. Both shares together are 1 at most.
        fair_marks: False: options are worth their reference price, also to informed takers.
        spot: initial spot, currency.
        cost_rate: proportional cost of hedging per unit of currency traded.
        risk_aversion: weight of ½ΔW², 1/currency.
        privileged: every maker observes its rivals' vegas and positions too.
        device, dtype: where and in what precision everything lives.

    Action (n, num_makers, actions), see `action_bounds`: edges of the asks above and of the bids below the reference
    prices, in vol points of each option's vega; then target net delta and half-width ≥ 0 of a no-trade band around it,
    in shares (`quote` composes it). After the fills the holding moves to the nearest edge of the band, if the net delta
    is outside. A negative band counts as 0. Deltas and vegas are those of the reference prices.

    Observation (n, num_makers, size), see `observation_parts`: public information and the own book.

    `info` holds, per step, environment and maker: `wealth_change` ΔW, `income`, `cost`, `turnover` (shares, absolute),
    `net_delta` (shares, after hedging), `gross_delta` (Σ |position · delta|), `net_vega`, `half_spread` (mean over the
    options), `sold` and `bought` (options), `fills` (both), `trades` (of all makers together) and `noise`. The noise is
    a part of the reward whose conditional mean is zero whatever the maker does: what income is above its expectation;
    ΔW, a martingale difference as options are worth their fair values; and what ½ΔW² is above its expectation, to first
    order in spot and variance. (Both are of the book before the step's fills, if some takers know the next move.) The
    reward without it has the same optimum and far less variance.

    `step` is two things, for those who play whole episodes: `advance` does only what the next action needs, and at the
    end `settle` says what all steps earned.

    There is no autoreset (`AutoresetMode.DISABLED`). `step` checks its actions, `settle` those of all steps; on a GPU
    their shape alone, because what is in them would have to be waited for. NaN shows up in the rewards there.

    Raises:
        ValueError: an argument outside its range; `BadQuote`, which is one, an action that is NaN or whose quotes cross
            (the ask of an option below its bid).
    """

    def __init__(
        self,
        num_envs: int = 1,
        dynamics: Dynamics | None = None,
        options: Sequence[Option] | None = None,
        num_makers: int = 2,
        num_steps: int = 60,
        arrival_rate: float = 0.5,
        flow_sd: float = 0.5,
        flow_half_life: float = 8.0,
        choice_sensitivity: float = 2.0,
        reference_edge: float = 1.0,
        informed_share: float = 0.2,
        toxic_share: float = 0.0,
        fair_marks: bool = True,
        spot: float = 100.0,
        cost_rate: float = 5e-4,
        risk_aversion: float = 1.0,
        privileged: bool = False,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        dynamics = dynamics if dynamics is not None else Heston(dt=1 / 504)
        if options is None:
            options = moneyness_grid((-1.0, -0.5, 0.0, 0.5, 1.0), (2 * num_steps,), dynamics.dt, spot)
        options = [Option(*option) for option in options]
        self.settings = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        self._check_settings()
        self.num_envs = num_envs
        self.num_makers = num_makers
        self.num_steps = num_steps
        self.options = options
        self.num_options = len(options)
        self.dynamics = dynamics
        self.initial_spot = float(spot)
        self.arrival_rate = float(arrival_rate)
        self.flow_sd = float(flow_sd)
        self.flow_persistence = 0.5 ** (1.0 / flow_half_life)
        self.choice_sensitivity = float(choice_sensitivity)
        self.reference_edge = float(reference_edge)
        self.informed_share = float(informed_share)
        self.toxic_share = float(toxic_share)
        self.fair_marks = fair_marks
        self.cost_rate = float(cost_rate)
        self.risk_aversion = float(risk_aversion)
        self.privileged = privileged
        self.device = torch.device(device)
        self.dtype = dtype
        # More takers than this on one option and side in a step would come once in a million, in the busiest flow
        busiest = arrival_rate * (1.0 + (MAX_FLOW if flow_sd > 0 else 0.0))
        self.max_takers = max(1, int(poisson.isf(1e-6, busiest)))
        # The kinds of takers, who know most first, and their shares of the marks, (kinds, 1, …)
        others = max(0.0, 1.0 - self.toxic_share - self.informed_share)
        self.takers = {"toxic": self.toxic_share, "informed": self.informed_share, "others": others}
        self.takers = {kind: share for kind, share in self.takers.items() if share > 1e-6}
        shares = torch.tensor(list(self.takers.values()), device=self.device, dtype=dtype).view(-1, 1, 1, 1, 1)
        self.taker_shares = shares
        self.first_marks = shares.cumsum(0) - shares
        self._set_options()
        self._set_clock()
        seats = torch.arange(num_makers, device=self.device)
        self.rivals = (seats[:, None] + seats[1:]) % num_makers  # of each seat, next seat first
        self.maker_observation_space, self.maker_action_space = self._read_tables()
        batch = gym.vector.utils.batch_space
        self._set_spaces(batch(self.maker_observation_space, num_makers), batch(self.maker_action_space, num_makers))
        kinds = len(self.takers)
        self._below = self.taker_shares.new_empty(self.max_takers, kinds, num_makers, 2, self.num_options, num_envs)
        self._close_episode()

    def _check_settings(self) -> None:
        settings = self.settings
        for name in ("num_envs", "num_makers", "num_steps"):
            value = settings[name]
            if not (1 <= value < float("inf") and value == int(value)):
                raise ValueError(f"{name} is {value} (a whole number, at least 1)")
        for name in ("choice_sensitivity", "flow_half_life", "spot", "arrival_rate"):
            if not 0 < settings[name] < float("inf"):
                raise ValueError(f"{name} is {settings[name]} (more than 0)")
        for name in ("cost_rate", "risk_aversion", "flow_sd"):
            if not 0 <= settings[name] < float("inf"):
                raise ValueError(f"{name} is {settings[name]} (0 or more)")
        if not abs(settings["reference_edge"]) < float("inf"):
            raise ValueError(f"reference_edge is {settings['reference_edge']} (a finite number)")
        for name, most in (("informed_share", 1.0), ("toxic_share", 1.0 - settings["informed_share"])):
            if not 0 <= settings[name] <= most + 1e-6:
                raise ValueError(f"{name} is {settings[name]} (at least 0, at most {most:g})")
        options = settings["options"]
        if not options or any(b[:2] <= a[:2] for a, b in pairwise((expiry, strike) for strike, expiry, _ in options)):
            raise ValueError("options are none or not in the order of their expiry and strike")
        for strike, expiry, _ in options:
            if not 0 < strike < float("inf"):
                raise ValueError(f"strike is {strike} (more than 0)")
            if not (settings["num_steps"] <= expiry <= settings["dynamics"].last_step and expiry == int(expiry)):
                allowed = f"whole steps, at least num_steps = {settings['num_steps']}"
                if settings["dynamics"].last_step < float("inf"):
                    allowed += f", at most {settings['dynamics'].last_step}, where the model ends"
                raise ValueError(f"expiry is {expiry} ({allowed})")

    def _set_options(self) -> None:
        """Tensors of the options (num_options,), and the smile that they are priced on."""
        tensor = {"device": self.device, "dtype": self.dtype}
        expiries = [option.expiry for option in self.options]
        self.strike = torch.tensor([option.strike for option in self.options], **tensor)
        self.is_call = torch.tensor([option.is_call for option in self.options], device=self.device)
        # One number stands for all expiries that are alike, so that what depends on it is computed once
        self.expiry = torch.tensor(expiries if len(set(expiries)) > 1 else expiries[:1], **tensor)
        self.smile = self.dynamics.smile(self.strike / self.initial_spot, self.expiry)
        # The option nearest to the money at each option's expiry, and at the expiry in the middle
        distance = [abs(np.log(option.strike / self.initial_spot)) for option in self.options]
        nearest = {expiry: [i for i in range(self.num_options) if expiries[i] == expiry] for expiry in expiries}
        nearest = {expiry: min(among, key=distance.__getitem__) for expiry, among in nearest.items()}
        self.at_the_money = [nearest[expiry] for expiry in expiries]
        self.middle = nearest[expiries[self.num_options // 2]]
        self.premiums = None
        if self.fair_marks and not self.smile.is_fair:
            table = known_premium_table(self.dynamics.pricing_model, min(expiries) - self.num_steps, max(expiries))
            self.premiums = table.to(**tensor)

    @property
    def is_neutral(self) -> bool:
        """Whether nothing is risked, hedging is free and nobody knows more than the fair value: then the best response
        to given quotes is known exactly."""
        return self.risk_aversion == self.cost_rate == self.toxic_share == 0

    def of_middle(self, values: Tensor) -> Tensor:
        """Values (…, 1 or num_options) of the options → (…) of the middle option."""
        return values[..., self.middle if values.shape[-1] > 1 else 0]

    def reference_volatility(self, step: Tensor, spot: Tensor, variance: Tensor) -> Tensor:
        """Volatility of the reference prices, the same for all strikes: step, spot (over the initial one) and variance,
        which broadcast to (…) → (…, 1 or num_options)."""
        volatility = self.smile.volatility(step, spot, variance)
        return volatility[..., self.at_the_money] if self.smile.is_fair else volatility

    def premium_at(self, step: Tensor, spot: Tensor, variance: Tensor) -> Tensor:
        """Fair value less reference price of the options, and its derivatives in spot and in variance, currency.

        Step, spot (over the initial one) and variance, which broadcast to (…) → (…, num_options, 3).
        """
        if not self.fair_marks:
            shape = torch.broadcast_shapes(step.shape, spot.shape, variance.shape)
            return spot.new_zeros(*shape, self.num_options, 3)
        steps_left = self.expiry - step[..., None]
        if self.smile.is_fair:
            volatility = self.smile.volatility(step, spot, variance)
            arguments = (self.initial_spot * spot[..., None], self.strike, steps_left * self.dynamics.dt)
            fair, reference = (
                black_scholes.greeks(*arguments, sigma) for sigma in (volatility, volatility[..., self.at_the_money])
            )
            return torch.stack((fair.price - reference.price, fair.delta - reference.delta, 0.0 * fair.price), -1)
        log_moneyness = (self.initial_spot * spot[..., None] / self.strike).log()
        premium, by_log_spot, by_variance = self.premiums(steps_left, log_moneyness, variance[..., None]).unbind(-1)
        by_spot = by_log_spot / (self.initial_spot * spot[..., None])
        return self.strike[:, None] * torch.stack((premium, by_spot, by_variance), -1)

    def _set_clock(self) -> None:
        """The times 0 … num_steps, (num_steps + 1,), and what is left to the options' expiry, (…, 1 or num_options)."""
        steps = torch.arange(self.num_steps + 1, device=self.device)
        self.times = steps.to(self.dtype)
        self.time_left = 1.0 - steps / self.num_steps  # share of the episode
        self.steps_left = self.expiry - self.times[:, None]  # to expiry
        self.time_to_expiry = self.steps_left * self.dynamics.dt  # years

    def observation_parts(self) -> dict[str, Part]:
        """Public information, the own book, the rivals' last quotes and, with `privileged`, the rivals' books.

        "moneyness" is ln(S/S₀)/(σ√τ), "log implied volatility" ln(σ/20 %), of the middle option's reference price. "net
        vega" is in currency per vol point, "net delta" in shares. "vega risk" is what one standard deviation of the
        volatility's own (unhedgeable) move in the next step is worth to the book, currency. "order flow" is a moving
        average of takers' buys less sells, per taker expected. "rival edges" are the rivals' last edges in vol points,
        next seat first and of each the asks first (before any quote: d_ref).
        """

        def path(values: Callable[[QuotingEnv], Tensor]) -> Part:
            """A column from values (num_steps + 1, n) that actions do not change, the same for all makers."""
            return Part(1, lambda env: values(env)[..., None, None], over_time=True)

        rivals = self.num_makers - 1
        parts = {
            "time left": path(lambda env: env.time_left[:, None]),
            "√τ": path(lambda env: env.of_middle(env.time_to_expiry).sqrt()[:, None]),
            "moneyness": path(lambda env: env.scaled_log_spot),
            "log implied volatility": path(lambda env: env.log_volatility),
            "net vega": Part(1, lambda env: env.net_vega[..., None]),
            "net delta": Part(1, lambda env: env.net_delta[..., None]),
            "vega risk": Part(1, lambda env: (env._net_vega * env.at[env.t].residual_sd).T[..., None]),
            "order flow": Part(1, lambda env: env.flow[:, None, None]),
            "rival edges": Part(2 * rivals * self.num_options, lambda env: env.rival_edges),
            "positions": Part(self.num_options, lambda env: env.position),
        }
        if self.privileged:
            width = rivals * self.num_options
            parts["rival vegas"] = Part(rivals, lambda env: env.net_vega[:, env.rivals])
            parts["rival positions"] = Part(width, lambda env: env.position[:, env.rivals].flatten(2))
        return parts

    def action_bounds(self) -> dict[str, tuple]:
        """Edges of asks and bids over the reference prices, vol points; target net delta and half-width of its band,
        shares."""
        edges = (-10.0, 10.0, self.num_options)
        return {"ask": edges, "bid": edges, "target": (-5.0, 5.0), "band": (0.0, 5.0)}

    def quote(
        self,
        half_spread: Tensor,
        skew: Tensor | float = 0.0,
        tilt: Tensor | float = 0.0,
        target: Tensor | float = 0.0,
        band: Tensor | float = 0.0,
    ) -> Tensor:
        """The action (n, actions) that asks half_spread + skew + tilt and bids half_spread − skew − tilt.

        Args:
            half_spread: (n,) of all options or (n, num_options), vol points.
            skew: (n,) vol points; a positive one moves all quotes up, so it attracts sellers.
            tilt: (num_options,) or (n, num_options), the same for each option.
            target, band: (n,) net delta and half-width of the band around it, shares.
        """
        if half_spread.dim() == 1:
            half_spread = half_spread[:, None].expand(-1, self.num_options)
        up = tilt + (skew[:, None] if isinstance(skew, Tensor) else skew)
        return self.to_action(ask=half_spread + up, bid=half_spread - up, target=target, band=band)

    @property
    def noise_size(self) -> int:
        """Random numbers that an episode takes."""
        takers = 2 * self.num_options * self.max_takers
        return self.num_steps * (self.dynamics.noise_size + 1 + takers)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Tensor, dict]:
        """Draws the whole market of an episode, takers and their marks included. Returns observation, empty info.

        The same seed gives the same market, whatever the policies; row i does not depend on `num_envs`.

        Args:
            options: `copies` (1 unless given, must divide `num_envs`): this many neighbouring rows get the same market,
                takers included, so that only the makers' actions differ between them.
        """
        copies = (options or {}).get("copies", 1)
        if not (copies >= 1 and self.num_envs % copies == 0):
            raise ValueError(f"copies is {copies} (at least 1, must divide num_envs = {self.num_envs})")
        self._seed(seed, options)
        self.set_market(*self._draw_paths(self.num_envs // copies, self.noise_size, self._paths), copies)
        return self.replay()

    def _paths(self, noise: Tensor) -> tuple[Tensor, ...]:
        """Normals (n, noise_size) → what `set_market` takes: spot, variance, intensity and marks."""
        n = len(noise)
        steps = self.num_steps
        per_step = self.dynamics.noise_size
        sizes = (steps * per_step, steps, noise.shape[1] - steps * (per_step + 1))
        of_underlying, of_flow, of_takers = noise.split(sizes, 1)
        spot, variance = self.dynamics.simulate(of_underlying.view(n, steps, per_step), self.initial_spot)
        flow = self._autoregression(of_flow)
        intensity = self.arrival_rate * torch.stack((1.0 + flow, 1.0 - flow), -1)  # (n, steps, 2)
        return spot, variance, intensity, self._marks(of_takers, intensity)

    def _autoregression(self, noise: Tensor) -> Tensor:
        """Imbalance f of the order flow (n, steps), stationary, cut at ±`MAX_FLOW`, from normals of that shape."""
        flow = self.flow_sd * noise[:, 0]
        flows = [flow]
        for t in range(1, noise.shape[1]):
            innovation = self.flow_sd * (1.0 - self.flow_persistence**2) ** 0.5 * noise[:, t]
            flow = self.flow_persistence * flow + innovation
            flows.append(flow)
        return torch.stack(flows, 1).clamp(-MAX_FLOW, MAX_FLOW)

    def _marks(self, noise: Tensor, intensity: Tensor) -> Tensor:
        """Marks of the takers (see `set_market`) from normals (n, …) and their intensity (n, num_steps, 2).

        They are a Poisson process of this intensity: the gaps are exponential. Takers beyond 1 do not arrive.
        """
        # In place: an episode has thousands
        gaps = normal_cdf(rows_last(noise)).clamp_(min=torch.finfo(self.dtype).tiny).log_().neg_()
        marks = gaps.view(self.num_steps, 2, self.num_options, self.max_takers, -1).cumsum(3)
        return marks.div_(rows_last(intensity)[:, :, None, None]).movedim(-1, 0)

    def set_market(self, spot: Tensor, variance: Tensor, intensity: Tensor, marks: Tensor, copies: int = 1) -> None:
        """Replaces the market by a given one; `replay` then starts on it.

        Computes all that does not depend on actions, for all times at once, stored time first: (num_steps + 1, n, …).

        Args:
            spot, variance: (n/copies, num_steps + 1).
            intensity: (n/copies, num_steps, 2) mean number of takers who buy and who sell, on each option.
            marks: (n/copies, num_steps, 2, num_options, max_takers) of the takers, increasing; beyond 1: none.
            copies: this many neighbouring rows get each of these markets.
        """
        self.spot = spot.T.contiguous()
        self.variance = variance.T.clamp(min=MIN_VARIANCE).contiguous()
        self.intensity = intensity.transpose(0, 1)
        self.marks = marks.transpose(0, 1)
        self.before = sum((self.marks < first).sum(-1, dtype=self.dtype) for first in self.first_marks.flatten())
        self._value_options()
        self._set_moments()
        for name in TABLES:
            table = rows_last(getattr(self, name), 1).repeat_interleave(copies, -1)
            setattr(self, name, table.movedim(-1, 1))
        self._join_parts()
        self._set_times()
        self.known = WeakKeyDictionary()  # what makers have computed of this market, see `envs.market.rivals`

    def _set_times(self) -> None:
        """Sets `at`, the market at each time."""
        shape = (-1, -1, self.num_makers, self.num_envs)
        seen = [x if isinstance(x, Part) else x.transpose(1, 3).expand(shape).contiguous() for x in self.blocks]
        seen = [[x if isinstance(x, Part) else x[t] for x in seen] for t in range(self.num_steps + 1)]
        of_book = torch.stack((self.vega, self.delta), 1).transpose(-1, -2)[:, :, None].contiguous()
        gap = self.gap[:-1].movedim(1, -1)
        noticed = {"informed": gap, "others": torch.zeros_like(gap)}  # what takers take off an edge
        if "toxic" in self.takers:
            noticed["toxic"] = gap + self._foreseen().movedim(1, -1)
        noticed = torch.stack([noticed[kind] for kind in self.takers], 1)[:, :, None]
        utility = self.choice_sensitivity * (noticed + self.reference_edge)
        marks = self.marks.movedim(1, -1).movedim(3, 1)
        before = self.before.movedim(1, -1)
        tables = (seen, of_book, self.residual_sd, utility, marks[:, :, None, None], before)
        self.at = [Market(*now) for now in zip_longest(*tables)]

    def _value_options(self) -> None:
        """Prices and Greeks of the options, moneyness and implied volatility of the observation."""
        spot = self.spot / self.initial_spot
        volatility = self.reference_volatility(self.times[:, None], spot, self.variance)  # (…, 1 or num_options)
        self.volatility = self.of_middle(volatility)
        time_to_expiry = self.time_to_expiry[:, None]
        greeks = black_scholes.greeks(self.spot[..., None], self.strike, time_to_expiry, volatility, self.is_call)
        self.reference = greeks.price
        self.delta = greeks.delta
        self.vega = VOL_POINT * greeks.vega  # per vol point
        premium, fair_delta, fair_slope = self.premium_at(self.times[:, None], spot, self.variance).unbind(-1)
        self.mark = self.reference + premium
        self.premium = torch.stack((premium, -premium), -2)  # what the seller and the buyer of an option give away
        self.gap = self.premium / self.vega.clamp(min=MIN_VEGA)[..., None, :]  # the same in vol points
        self.fair_delta = self.delta + fair_delta
        # ∂mark/∂v; that of the reference price is 100 · vega · ∂σ/∂v
        slope = volatility_slope(self.dynamics, volatility, self.steps_left[:, None])
        self.fair_slope = self.vega * slope + fair_slope
        middle_time = self.of_middle(self.time_to_expiry)[:, None]
        log_spot = black_scholes.log_ratio(self.spot, torch.full_like(self.spot, self.initial_spot))
        self.scaled_log_spot = log_spot / (self.volatility * middle_time.clamp(min=0.5 * self.dynamics.dt).sqrt())
        self.log_volatility = torch.log(self.volatility / REFERENCE_VOLATILITY)

    def _foreseen(self) -> Tensor:
        """What the takers who know the next step's variance add to the gap, (num_steps, n, 2, num_options), vol points:
        how much more options are worth at it, if the spot stays."""
        state = (self.times[:-1, None], self.spot[:-1] / self.initial_spot, self.variance[1:])
        arguments = (self.spot[:-1, ..., None], self.strike, self.time_to_expiry[:-1, None])
        reference = black_scholes.greeks(*arguments, self.reference_volatility(*state), self.is_call).price
        worth = reference + self.premium_at(*state)[..., 0]
        more = (worth - self.mark[:-1]) / self.vega[:-1].clamp(min=MIN_VEGA)
        return torch.stack((more, -more), -2)

    def _set_moments(self) -> None:
        """Moments of each step's spot and variance, for the vega risk and for `_penalty_surprise`."""
        dynamics = self.dynamics
        mean, self.next_variance_variance = dynamics.next_variance_moments(self.variance)
        self.variance_surprise = self.variance[1:] - mean[:-1]
        self.covariance = dynamics.return_volatility_covariance(self.variance) * self.variance * dynamics.dt
        self.return_variance = dynamics.return_variance(self.variance)
        middle = self.of_middle(self.steps_left)[:, None]
        self.residual_sd = hedged_volatility_variance(dynamics, self.variance, middle).sqrt() * dynamics.dt**0.5

    def replay(self) -> tuple[Tensor, dict]:
        """Starts the same episodes again, every maker with nothing. Returns observation and an empty info."""
        tensor = {"device": self.device, "dtype": self.dtype}
        makers = self.num_makers
        options = self.num_options
        n = self.num_envs
        self.t = 0
        self.flow = torch.zeros(n, **tensor)
        # The rows last, see `rows_last`; everybody else sees them first, by the properties below
        self._holding = torch.zeros(makers, n, **tensor)
        self._position = torch.zeros(makers, options, n, **tensor)
        self._edges = torch.full((makers, 2, options, n), self.reference_edge, **tensor)
        self._cash = torch.zeros(makers, n, **tensor)
        self._booked = 0  # steps whose trades are in the cash
        self.trades: list[Trades] = []
        self.actions: list[Tensor] = []
        return self.observe(), {}

    @property
    def position(self) -> Tensor:
        """(n, num_makers, num_options) options, + long."""
        return self._position.movedim(-1, 0)

    @property
    def holding(self) -> Tensor:
        """(n, num_makers) shares."""
        return self._holding.T

    @property
    def net_vega(self) -> Tensor:
        """(n, num_makers) of the options when last observed, currency per vol point."""
        return self._net_vega.T

    @property
    def net_delta(self) -> Tensor:
        """(n, num_makers) of shares and options when last observed."""
        return self._net_delta.T

    @property
    def edges(self) -> Tensor:
        """(n, num_makers, 2, num_options) last quoted, vol points."""
        return self._edges.movedim(-1, 0)

    @property
    def rival_edges(self) -> Tensor:
        """(n, num_makers, …) of every maker's rivals, next seat first and of each the asks first."""
        edges = self._edges.flatten(1, 2).index_select(0, self.rivals.T.flatten())
        return edges.unflatten(0, self.rivals.T.shape).permute(3, 1, 0, 2).flatten(2)

    @property
    def fills(self) -> Tensor:
        """(n, num_makers, 2, num_options) takers who traded in the last step."""
        return self.trades[-1].fills.movedim(-1, 0)

    @property
    def cash(self) -> Tensor:
        """(n, num_makers) received for options and shares less paid for them, and the costs of hedging."""
        if self._booked < len(self.trades):
            now = slice(self._booked, len(self.trades))
            trades = self._trades_of(now)
            _, info = self._settle(now)
            bought = trades.fills[:, :, BID] - trades.fills[:, :, ASK]
            paid = (bought * self._table("mark", now)).sum(2) + trades.traded * self._table("spot", now)
            self._cash = self._cash + (info["income"] - info["cost"] - paid).sum(0)
            if now.stop == self.num_steps:  # the shares are sold
                self._cash = self._cash + trades.holding[-1] * self.spot[-1]
            self._booked = now.stop
        return self._cash.T

    @property
    def wealth(self) -> Tensor:
        """(n, num_makers) cash + shares + options at their fair value, costs paid."""
        options = (self.position * self.mark[self.t][:, None]).sum(-1)
        return self.cash + self.holding * self.spot[self.t][:, None] + options

    def observe(self) -> Tensor:
        """Observation (n, num_makers, size) of the current state, each maker from its own seat."""
        now = self.at[self.t]
        self._net_vega, option_delta = (now.of_book * self._position).sum(2)
        self._net_delta = self._holding + option_delta
        shape = (self.num_envs, self.num_makers)
        values = []
        for part in now.seen:
            if isinstance(part, Part):
                value = part.values(self)
                value = value if value.shape[:2] == shape else value.expand(*shape, -1)
                values.append(value.permute(2, 1, 0))
            else:
                values.append(part)
        return torch.cat(values).permute(2, 1, 0)

    def decode(self, observation: Tensor) -> QuotingState:
        """Observation of one maker (n, size) → its natural units."""
        step = torch.round((1.0 - self.column(observation, "time left")) * self.num_steps)
        volatility = REFERENCE_VOLATILITY * self.column(observation, "log implied volatility").exp()
        scale = volatility * ((self.of_middle(self.expiry) - step).clamp(min=0.5) * self.dynamics.dt).sqrt()
        spot = (self.column(observation, "moneyness") * scale).exp()  # over the initial one
        variance = self.smile.variance(step, spot, volatility)
        return QuotingState(
            step=step.long(),
            spot=self.initial_spot * spot,
            variance=variance.clamp(min=MIN_VARIANCE),
            volatility=volatility,
            time_to_expiry=self.column(observation, "√τ") ** 2,
            vega=self.column(observation, "net vega"),
            net_delta=self.column(observation, "net delta"),
            flow=self.column(observation, "order flow"),
            rivals=observation[:, self.columns["rival edges"]].unflatten(-1, (-1, 2, self.num_options)),
            position=observation[:, self.columns["positions"]],
        )

    def public_observations(self, first: int, last: int) -> Tensor:
        """What makers observe in the current market at the steps first … last − 1, whatever they do; the rest is 0.

        Returns:
            ((last − first) · n, size), time first.
        """
        observation = self.spot.new_zeros(last - first, self.num_envs, self.maker_observation_space.shape[0])
        column = 0
        for block in self.blocks:
            width = block.width if isinstance(block, Part) else block.shape[-1]
            if isinstance(block, Tensor):
                observation[..., column : column + width] = block[first:last, :, 0]
            column += width
        return observation.flatten(0, 1)

    def uncrossed(self, actions: Tensor) -> Tensor:
        """Actions (…, actions) with quotes that cross (an ask below its bid) moved to the middle between them."""
        action = self.by_name(actions)
        ask, bid = uncross(action["ask"], action["bid"])
        return self.to_action(**{**action, "ask": ask, "bid": bid})

    def vegas_at(self, state: QuotingState) -> Tensor:
        """Vegas (n, num_options) of the reference prices, currency per vol point, at least `MIN_VEGA`."""
        volatility = self.reference_volatility(state.step, state.spot / self.initial_spot, state.variance)
        time_to_expiry = (self.expiry - state.step[:, None]) * self.dynamics.dt
        arguments = (state.spot[:, None], self.strike, time_to_expiry, volatility)
        return (VOL_POINT * black_scholes.vega(*arguments)).clamp(min=MIN_VEGA)

    def gap_at(self, state: QuotingState) -> Tensor:
        """(Fair value − reference price)/vega (n, num_options), vol points."""
        premium = self.premium_at(state.step, state.spot / self.initial_spot, state.variance)[..., 0]
        return premium / self.vegas_at(state)

    def to_edges(self, actions: Tensor) -> Tensor:
        """Actions (…, actions) → edges of the asks and of the bids over the reference prices (…, 2, num_options)."""
        action = self.by_name(actions)
        return torch.stack((action["ask"], action["bid"]), -2)

    def choice_probabilities(self, edges: Tensor) -> Tensor:
        """P(a taker of each kind picks each maker) in this step; the rest walk away. Who knows most comes first.

        Args:
            edges: (num_makers, 2, num_options, n), vol points.

        Returns:
            (kinds, num_makers, 2, num_options, n).
        """
        utility = torch.sub(self.at[self.t].utility, edges, alpha=self.choice_sensitivity)
        most = utility.amax(1, keepdim=True).clamp_(min=0)  # taken off, so that nothing overflows
        odds = utility.sub_(most).exp_()
        return odds.div_(odds.sum(1, keepdim=True).add_(most.neg_().exp_()))

    def _fills(self, edges: Tensor, probabilities: Tensor) -> Tensor:
        """Number of takers who trade with each maker, (num_makers, 2, num_options, n); see `choice_probabilities`."""
        now = self.at[self.t]
        # On the marks of a kind of takers the best price has the first interval, the next the second, …
        if self.num_makers == 2:  # without the general sort, which takes long
            swapped = edges[1] < edges[0]
            one, other = probabilities.unbind(1)
            ends = torch.stack((torch.where(swapped, other, one), one + other), 1)
        else:
            order = edges.argsort(dim=0, stable=True)  # the lower seat first where they are alike
            ends = probabilities.gather(1, order.expand_as(probabilities)).cumsum(1)
        ends = torch.addcmul(self.first_marks, self.taker_shares, ends)
        # As numbers at once, into memory that is there: both save most of the time
        below = torch.lt(now.marks, ends, out=self._below).sum((0, 1))
        below.sub_(now.before)
        if self.num_makers == 2:
            best, both = below
            first = torch.where(swapped, both - best, best)
            return torch.stack((first, both - first))
        served = below.diff(dim=0, prepend=torch.zeros_like(below[:1]))
        return torch.zeros_like(served).scatter(0, order, served)

    def advance(self, actions: Tensor) -> Tensor:
        """Quotes, fills, hedges, then moves the market. What was earned is left to `settle`.

        Args:
            actions: (n, num_makers, actions), see the class.

        Returns:
            observation (n, num_makers, size).

        Raises:
            RuntimeError: the episode is over; call `reset`.
            BadQuote: actions of another shape.
        """
        self._check_running()
        self._check_shape(actions)
        target, band = (actions[..., self.action_columns[name]].T for name in ("target", "band"))
        self._edges = rows_last(self.to_edges(actions))
        probabilities = self.choice_probabilities(self._edges)
        fills = self._fills(self._edges, probabilities)
        bought = fills[:, BID] - fills[:, ASK]
        self._position = self._position + bought
        imbalance = bought.sum((0, 1)) / (-2.0 * self.num_options * self.arrival_rate)  # what takers bought
        self.flow = torch.lerp(imbalance, self.flow, self.flow_persistence)
        before = (self._position * self.at[self.t].of_book[1]).sum(1).add_(self._holding)
        traded = nearest_in_band(before, target, band) - before
        self._holding = self._holding + traded
        picked = (self.taker_shares * probabilities).sum(0)
        self.trades.append(Trades(self._edges, picked, fills, self._position, traded, self._holding))
        self.actions.append(actions)
        self.t += 1
        if self.t == self.num_steps:  # the shares are sold; the options stay in the book, at their mark
            self._holding = torch.zeros_like(self._holding)
        return self.observe()

    def settle(self, steps: int | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Rewards and `info` of the last `steps` steps, of all since the start by default: (steps, n, num_makers).

        Raises:
            BadQuote: on a CPU, an action that is not finite, or quotes that cross.
        """
        start = 0 if steps is None else self.t - steps
        at_once = max(1, ROWS_AT_ONCE // self.num_envs)
        parts = []
        for first in range(start, self.t, at_once):
            now = slice(first, min(first + at_once, self.t))
            if self.device.type == "cpu":
                self._check(torch.stack(self.actions[now]), first)
            parts.append(self._settle(now))
        rewards, infos = zip(*parts, strict=True)
        info = {name: torch.cat([info[name] for info in infos]).transpose(1, 2) for name in infos[0]}
        return torch.cat(rewards).transpose(1, 2), info

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, dict]:
        """`advance`, and `settle` for this step; on a CPU nothing happens if the actions are bad.

        Returns:
            observation (n, num_makers, size), reward (n, num_makers), terminated and truncated (n,), info.
        """
        self._check_running()
        self._check_shape(actions)
        if self.device.type == "cpu":
            self._check(actions[None], self.t)
        return super().step(actions)

    def expected_incomes(self) -> Tensor:
        """What every quote was expected to earn in each step since the start, over all takers who might have come:
        (steps, n, num_makers, 2, num_options), currency. Their sum is the income less its part of the noise."""
        now = slice(0, self.t)
        edges, picked, *_ = self._trades_of(now)
        return picked.mul_(self._earned(edges, now)).mul_(self._table("intensity", now)[:, :, :, None]).movedim(-1, 1)

    def _earned(self, edges: Tensor, now: slice) -> Tensor:
        """What each fill at these edges (steps, num_makers, 2, num_options, n) earns, currency; in their place."""
        return edges.mul_(self._table("vega", now)[:, :, None]).sub_(self._table("premium", now))

    def _trades_of(self, now: slice) -> Trades:
        """The trades of these steps, (steps, …)."""
        return Trades(*(torch.stack(values) for values in zip(*self.trades[now], strict=True)))

    def _table(self, name: str, now: slice, later: int = 0) -> Tensor:
        """A table of the market at these steps or later, with an axis for the makers: (steps, 1, …, n)."""
        return getattr(self, name)[now.start + later : now.stop + later].movedim(1, -1)[:, None]

    def _settle(self, now: slice) -> tuple[Tensor, dict[str, Tensor]]:
        """`settle` for these steps, the environments last: (steps, num_makers, n)."""
        edges, picked, fills, position, traded, holding = self._trades_of(now)
        spot = self._table("spot", now)
        half_spread = edges.mean((2, 3))
        sold, bought = fills.sum(3).unbind(2)
        of_maker = sold + bought
        # The book whose moves are luck. Takers who know the next move choose what comes into it in this step
        book = (position, holding)
        if self.toxic_share > 0:
            book = (position - (fills[:, :, BID] - fills[:, :, ASK]), holding - traded)
        earned = self._earned(edges, now)
        income = fills.mul_(earned).sum((2, 3))
        expected_income = (picked.mul_(earned).sum(3) * self._table("intensity", now)).sum(2)
        move = self._table("spot", now, 1) - spot
        mark_move = self._table("mark", now, 1) - self._table("mark", now)
        wealth_change = holding * move + (position * mark_move).sum(2)
        turnover = traded.abs()
        cost = self.cost_rate * turnover * spot
        if now.stop == self.num_steps:  # the shares are sold
            turnover[-1] += holding[-1].abs()
            cost[-1] += self.cost_rate * holding[-1].abs() * self.spot[-1]
        luck = (book[0] * mark_move).sum(2) + book[1] * move - self._penalty_surprise(now, *book, move)
        noise = income - expected_income + luck
        option_delta = position * self._table("delta", now)
        info = {
            "wealth_change": wealth_change,
            "income": income,
            "cost": cost,
            "turnover": turnover,
            "net_delta": holding + option_delta.sum(2),
            "gross_delta": option_delta.abs().sum(2),
            "net_vega": (position * self._table("vega", now)).sum(2),
            "half_spread": half_spread,
            "sold": sold,
            "bought": bought,
            "fills": of_maker,
            "trades": of_maker.sum(1, keepdim=True).expand_as(of_maker),
            "noise": noise,
        }
        return income + wealth_change - cost - 0.5 * self.risk_aversion * wealth_change**2, info

    def _penalty_surprise(self, now: slice, position: Tensor, holding: Tensor, move: Tensor) -> Tensor:
        """The part of ½ · risk_aversion · ΔW² that a step's spot and variance explain, less its expectation.

        To first order ΔW is L = ∂W/∂S · ΔS + ∂W/∂v · (v' − E v'), whose mean square is known.
        """
        spot = self._table("spot", now)
        delta = holding + (position * self._table("fair_delta", now)).sum(2)  # ∂W/∂S
        slope = (position * self._table("fair_slope", now)).sum(2)  # ∂W/∂v
        square = spot**2 * self._table("return_variance", now)  # E ΔS²
        linear = delta * move + slope * self._table("variance_surprise", now)
        expected = delta**2 * square + slope**2 * self._table("next_variance_variance", now)
        expected = expected + 2.0 * delta * slope * (spot * self._table("covariance", now))
        return 0.5 * self.risk_aversion * (linear**2 - expected)

    def _check_shape(self, actions: Tensor) -> None:
        wanted = (self.num_envs, self.num_makers, self.action_size)
        if actions.shape != wanted:
            message = f"({wanted}: environments, makers, {self.action_size})"
            raise BadQuote(f"actions have the shape {tuple(actions.shape)} {message}")

    def _check(self, actions: Tensor, first: int) -> None:
        """Raises BadQuote for the first bad action of the steps first, …, (steps, n, num_makers, actions)."""
        if not torch.isfinite(actions.sum()) and not actions.isfinite().all():  # the sum alone says it fast
            step, maker, number = (~actions.isfinite()).any(1).nonzero()[0].tolist()
            raise BadQuote(f"{self.action_names()[number]} of maker {maker} is not finite at step {first + step}")
        action = self.by_name(actions)
        spread = action["ask"] + action["bid"]
        if spread.amin() < -ROUNDING:
            least = spread.amin((1, 2))  # (steps, num_options)
            step = int((least.amin(1) < -ROUNDING).nonzero()[0])
            option = int(least[step].argmin())
            where = f"of option {option} at step {first + step}"
            raise BadQuote(f"ask + bid {where} are {least[step, option].item():g} (0 or more, or the quotes cross)")


def volatility_slope(dynamics: Dynamics, volatility: Tensor, steps_left: Tensor) -> Tensor:
    """∂σ/∂v of the mark's σ, vol points per unit of variance."""
    return dynamics.variance_slope(steps_left) / (2.0 * volatility * VOL_POINT)


def hedged_volatility_variance(dynamics: Dynamics, variance: Tensor, steps_left: Tensor) -> Tensor:
    """Variance rate of the implied volatility that no hedge with shares removes: α²(1 − ρ²), vol points² a year.

    α is the absolute volatility of the implied volatility, ρ its correlation with the spot (Stoikov & Sağlam 2009).
    """
    _, variance_of_variance = dynamics.next_variance_moments(variance)
    hedgeable = dynamics.return_volatility_covariance(variance) ** 2 * variance
    residual = (variance_of_variance / dynamics.dt - hedgeable).clamp(min=0)
    volatility = dynamics.expected_average_variance(variance, steps_left).sqrt()
    return residual * volatility_slope(dynamics, volatility, steps_left) ** 2
