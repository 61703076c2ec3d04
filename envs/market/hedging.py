"""HedgingEnv: hedge a book of options at a cost, many episodes at once, everything a tensor on one device.

The market maker holds a book of European options that are settled in cash, and trades the underlying once a step. In
phase 1 the book is one sold call. In phase 2 clients keep trading with it: on every option and side orders arrive as a
Poisson process, at given prices, whatever the hedging policy does. Within a step the orders arrive, the market maker
trades at the current spot, then the market moves. With W = cash + shares + options marked at Black–Scholes and ΔW its
change as the market moves, the reward is

    r_t = income_t + ΔW_t − cost_t − ½ · risk_aversion · ΔW_t²          (Kolm & Ritter 2019, eq. 7)

where cost_t = cost_rate · |shares traded| · spot, charged on the opening trade and on the final unwinding too, and
income_t is the client spread on the step's orders.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import nbinom, poisson

from envs.market import black_scholes
from envs.market.black_scholes import normal_cdf
from envs.market.dynamics import GBM, Dynamics
from envs.market.env import MarketEnv, Part
from envs.market.units import MIN_VARIANCE, REFERENCE_VOLATILITY

Tensor = torch.Tensor

RECENT = 10  # steps, of the moving averages in a trader's view

Policy = Callable[[Tensor], Tensor]  # observation (n, size) → action (n, size of an action)


class Option(NamedTuple):
    """A European option: strike in currency, expiry as the step at whose beginning it is settled in cash."""

    strike: float
    expiry: int
    is_call: bool = True


def check_increasing(**values: Sequence[float]) -> None:
    """Raises ValueError for the first of the named lists that is empty or not increasing."""
    for name, numbers in values.items():
        if len(numbers) == 0 or any(a >= b for a, b in pairwise(numbers)):
            raise ValueError(f"{name} are {', '.join(f'{x:g}' for x in numbers) or 'none'} (one or more, increasing)")


def option_grid(strikes: Sequence[float], expiries: Sequence[int], spot: float = 100.0) -> list[Option]:
    """One option for every strike and expiry, the one out of the money: puts below the spot, calls from there up.

    Clients trade options out of the money. The option in the money is, by put–call parity, the same option and a share.

    Args:
        strikes: increasing, currency.
        expiries: increasing, steps from the start.

    Raises:
        ValueError: strikes or expiries empty or not increasing.
    """
    check_increasing(strikes=strikes, expiries=expiries)
    return [Option(float(strike), expiry, strike >= spot) for expiry in expiries for strike in strikes]


class OrderLaw:
    """Orders of one kind in one step: their number is Poisson, their sizes are geometric (1, 2, …) and independent.

    `draw` inverts the joint distribution function of (number, total size), so it takes one normal.

    Args:
        rate: mean number of orders in a step, ≥ 0.
        mean_size: mean size of an order, options, ≥ 1 (1: every order is for one option).
    """

    def __init__(self, rate: float, mean_size: float, device: torch.device, dtype: torch.dtype):
        self.rate = rate
        self.mean_size = mean_size
        # Variance of the total size in a step: rate · E[size²] of the geometric distribution
        self.variance = rate * mean_size * (2.0 * mean_size - 1.0)
        numbers, sizes, probabilities = self._cells()
        self.probabilities = np.array(probabilities) / np.sum(probabilities)
        self.sizes = np.array(sizes)
        # P(cell or a later one). Rare cells come last, so they have the numbers near 0, where floats are dense.
        tail = np.cumsum(self.probabilities[::-1])
        self.tail = torch.tensor(tail[:-1], device=device, dtype=dtype)  # increasing
        self.number = torch.tensor(numbers[::-1], device=device, dtype=dtype)
        self.size = torch.tensor(sizes[::-1], device=device, dtype=dtype)

    def _cells(self) -> tuple[list[int], list[int], list[float]]:
        """Every (number, total size) that is not too rare to matter, and its probability."""
        numbers = [0]
        sizes = [0]
        probabilities = [poisson.pmf(0, self.rate)]
        for number in range(1, int(poisson.isf(1e-10, self.rate)) + 2):
            extra = np.zeros(1, int)  # total size beyond one option per order
            share = np.ones(1)
            if self.mean_size > 1:
                p = 1.0 / self.mean_size
                extra = np.arange(int(nbinom.isf(1e-8, number, p)) + 1)
                share = nbinom.pmf(extra, number, p)
            numbers += [number] * len(extra)
            sizes += [*(number + extra)]
            probabilities += [*(poisson.pmf(number, self.rate) * share)]
        return numbers, sizes, probabilities

    def size_probabilities(self) -> np.ndarray:
        """P(total size of a step's orders = 0, 1, …)."""
        return np.bincount(self.sizes, self.probabilities)

    def draw(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Standard normals → number of orders and their total size, each of the shape of `noise`."""
        cell = torch.bucketize(normal_cdf(-noise), self.tail)
        return self.number[cell], self.size[cell]


def nearest_in_band(net_delta: Tensor, centre: Tensor, half_width: Tensor) -> Tensor:
    """Net delta (…) → the nearest one in [centre − half-width, centre + half-width]; negative widths count as 0."""
    half_width = half_width.clamp(min=0)
    return torch.minimum(torch.maximum(net_delta, centre - half_width), centre + half_width)


class HedgingState(NamedTuple):
    """An observation in natural units; (n,), the last three (n, num_options)."""

    step: Tensor  # trades made so far, 0 … num_steps, integer
    spot: Tensor  # currency
    variance: Tensor  # annualised variance that drives the next step
    delta: Tensor  # Black–Scholes delta of the book, shares
    gamma: Tensor  # Black–Scholes gamma of the book, shares per currency
    holding: Tensor  # shares held before this step's trade
    position: Tensor  # options held, + long; 0 once expired
    volatility: Tensor  # the mark's: √(expected average variance to expiry)
    time_to_expiry: Tensor  # years


class HedgingEnv(MarketEnv):
    """A book of European options, fed by client orders and hedged with shares at a proportional cost.

    Args:
        num_envs: episodes played side by side; all start and end together.
        dynamics: model of the underlying (`envs.market.dynamics`); its `dt` is the time between trades.
        num_steps: trades in an episode (default 30 trading days).
        options: the options of the book; the last ones expire at `num_steps`, where the episode ends. By default one
            call struck at the spot. See `option_grid`.
        initial_position: of every option, + long; taken at its mark. By default short one.
        arrival_rate: mean number of client orders a step, on each option and side, while the option lives.
        mean_order_size: of their geometric size, options.
        client_spread: what a client pays per option over (or gets below) its mark, currency.
        spot: initial spot, currency.
        cost_rate: proportional cost per unit of currency traded (1e-3 = 10 bp).
        risk_aversion: weight of ½ΔW², 1/currency.
        trader_view: what is observed of the volatility is what a trader sees, not the state of the model; see
            `trader_parts`.
        device, dtype: where and in what precision everything lives.

    Action (n, 2), see `action_bounds`: a no-trade band around the hedge of the book's Black–Scholes delta, its offset
    and its half-width ≥ 0, both in shares. The holding moves to the nearest edge of [−Δ + offset − half-width,
    −Δ + offset + half-width]. A half-width of 0 is a plain target, so every hedging strategy can be written as a band.
    A negative half-width counts as 0.

    Observation (n, size), see `observation_parts`. Positions are unlimited, so all that grows with the book is divided
    by `book_scale`, the root mean square position of the last step, added up over the options as if they were
    independent. `decode` returns natural units.

    Expiry is termination, never truncation. There is no autoreset (`AutoresetMode.DISABLED`): call `reset` after
    `num_steps` steps. `info` holds, per step and environment: `wealth_change` ΔW (before costs), `income`, `cost`,
    `turnover` (shares, absolute), `net_delta` (shares, after the trade), and two results of Black–Scholes delta hedging
    of the same book on the same path: `hedged_change`, its ΔW, and `hedged_cost`, the cost of its trade after that
    change (at the end, of unwinding). These two do not depend on the actions, so they can serve as control variates.

    Raises:
        ValueError: an argument outside its range.

    Example:
        >>> env = HedgingEnv(num_envs=1024)
        >>> observation, _ = env.reset(seed=1)
        >>> observation, reward, terminated, truncated, info = env.step(torch.zeros(1024, 2))  # Black–Scholes delta
    """

    def __init__(
        self,
        num_envs: int = 1,
        dynamics: Dynamics | None = None,
        num_steps: int = 30,
        options: Sequence[Option] | None = None,
        initial_position: float = -1.0,
        arrival_rate: float = 0.0,
        mean_order_size: float = 1.0,
        client_spread: float = 0.0,
        spot: float = 100.0,
        cost_rate: float = 1e-3,
        risk_aversion: float = 1.0,
        trader_view: bool = False,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        self.settings = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        self.options = [Option(spot, num_steps)] if options is None else [Option(*option) for option in options]
        self._check_settings()
        self.num_envs = num_envs
        self.num_steps = num_steps
        self.num_options = len(self.options)
        self.dynamics = dynamics if dynamics is not None else GBM()
        self.initial_spot = float(spot)
        self.initial_position = float(initial_position)
        self.cost_rate = float(cost_rate)
        self.risk_aversion = float(risk_aversion)
        self.client_spread = client_spread
        self.trader_view = trader_view
        self.device = torch.device(device)
        self.dtype = dtype
        self.order_law = OrderLaw(arrival_rate, mean_order_size, self.device, dtype)
        self._set_options()
        self._set_times()
        observation, action = self._read_tables()
        units = [self.strike.new_ones(part.width) * part.unit for part in self.parts.values()]
        self.observation_units = torch.cat(units)
        self._set_spaces(observation, action)
        self._close_episode()

    def _check_settings(self) -> None:
        settings = self.settings
        for name in ("num_envs", "num_steps", "mean_order_size"):
            if not 1 <= settings[name] < float("inf"):
                raise ValueError(f"{name} is {settings[name]} (at least 1)")
        for name in ("cost_rate", "risk_aversion", "arrival_rate", "client_spread"):
            if not 0 <= settings[name] < float("inf"):
                raise ValueError(f"{name} is {settings[name]} (0 or more)")
        if not 0 < settings["spot"] < float("inf"):
            raise ValueError(f"spot is {settings['spot']} (positive)")
        if not abs(settings["initial_position"]) < float("inf"):
            raise ValueError(f"initial_position is {settings['initial_position']} (a finite number)")
        num_steps = settings["num_steps"]
        for strike, expiry, _ in self.options:
            if not 0 < strike < float("inf"):
                raise ValueError(f"strike is {strike} (positive)")
            if not (1 <= expiry <= num_steps and expiry == int(expiry)):
                raise ValueError(f"expiry is {expiry} (whole steps, at least 1, at most num_steps = {num_steps})")
        if not self.options or max(option.expiry for option in self.options) < num_steps:
            raise ValueError(f"expiry of the last option is not num_steps = {num_steps}, where the episode ends")

    def _set_options(self) -> None:
        """Tensors of the options (num_options,), and the scales of their positions."""
        tensor = {"device": self.device, "dtype": self.dtype}
        self.strike = torch.tensor([option.strike for option in self.options], **tensor)
        self.expiry = torch.tensor([option.expiry for option in self.options], **tensor)
        self.is_call = torch.tensor([option.is_call for option in self.options], device=self.device)
        self.middle_strike = float(np.median([option.strike for option in self.options]))
        self.smile = self.dynamics.smile(self.strike / self.initial_spot, self.expiry)
        # Root mean square position at expiry: both sides' orders add their variances
        variance = self.settings["initial_position"] ** 2 + 2.0 * self.order_law.variance * self.expiry
        self.position_scale = variance.sqrt().clamp(min=1.0)
        self.book_scale = float(self.position_scale.square().sum().sqrt())
        self.vega_scale = self.initial_spot * (self.num_steps * self.dynamics.dt) ** 0.5 * self.book_scale

    def _set_times(self) -> None:
        """The times 0 … num_steps, and at each of them the steps left to every expiry and to the next one."""
        self.times = torch.arange(self.num_steps + 1, device=self.device, dtype=self.dtype)
        self.time_left = 1.0 - self.times / self.num_steps
        self.steps_left = (self.expiry - self.times[:, None]).clamp(min=0)  # (num_steps + 1, num_options)
        next_expiry = torch.where(self.steps_left > 0, self.steps_left, self.num_steps + 1).amin(-1)
        # (num_steps + 1,); 1 at the end, where no option is left
        self.steps_to_next_expiry = torch.where(next_expiry > self.num_steps, 1.0, next_expiry)

    def observation_parts(self) -> dict[str, Part]:
        """Public information, the book, and the net delta before the trade.

        "next step's share" is dt/τ with τ the time to the next expiry: the best policy changes sharply just before it.
        "moneyness" is ln(S/K)/(σ√τ) of the middle strike at the next expiry, "log-volatility" is ln(√v/20 %), and
        "book delta's step sd" is the standard deviation of the book's delta over the next step, Γ S √(v dt). In a
        trader's view √v is the volatility that options of the next expiry are marked at. The book's delta, its sd and
        the net delta are over `book_scale`, its vega also over S₀√T, the position in every option over its
        `position_scale`.
        """

        def path(values: Callable[[HedgingEnv], Tensor], unit: float = 1.0) -> Part:
            """A column from values (num_steps + 1, n) that actions do not change."""
            return Part(1, lambda env: values(env)[..., None], unit, over_time=True)

        book = self.book_scale
        return {
            "time left": path(lambda env: env.time_left[:, None]),
            "next step's share": path(lambda env: env.steps_to_next_expiry.reciprocal()[:, None]),
            "moneyness": path(lambda env: env.moneyness),
            "log-volatility": path(lambda env: env.log_volatility),
            "book delta": path(lambda env: env.delta / env.book_scale, book),
            "book delta's step sd": path(lambda env: env.delta_sd / env.book_scale, book),
            "book vega": path(lambda env: env.vega / env.vega_scale, book),
            "net delta": Part(1, lambda env: ((env.holding + env.delta[env.t]) / env.book_scale)[:, None], book),
            "positions": Part(self.num_options, lambda env: env.position_features, self.position_scale, over_time=True),
            **(self.trader_parts(path) if self.trader_view else {}),
        }

    @staticmethod
    def trader_parts(path: Callable[..., Part]) -> dict[str, Part]:
        """What a trader has seen of the market lately, from which the model can be guessed.

        "realised volatility" is the logarithm of the recent one, over the implied one. "leverage" is the slope of the
        implied volatility on ln S, "volatility of volatility" the logarithm of how far it moves. "hedged P&L" is the
        logarithm of the root mean square of what the book has earned with Black–Scholes delta hedging, over what its
        gamma would earn if returns were normal with the implied volatility: 0 in gbm. See `_set_recent`.
        """
        return {
            "realised volatility": path(lambda env: env.realised_volatility),
            "leverage": path(lambda env: env.leverage),
            "volatility of volatility": path(lambda env: env.vol_of_vol),
            "hedged P&L": path(lambda env: env.hedged_pnl),
        }

    def action_bounds(self) -> dict[str, tuple[float, float]]:
        """The band, shares."""
        return {"offset": (-self.book_scale, self.book_scale), "half_width": (0.0, self.book_scale)}

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Tensor, dict]:
        """Draws the whole market of an episode, orders included. Returns observation and an empty info.

        The same seed gives the same market, whatever the policy; row i does not depend on `num_envs`.
        """
        self._seed(seed, options)
        normals = self.num_steps * self.dynamics.noise_size
        if self.order_law.rate > 0:
            normals += 2 * self.num_steps * self.num_options
        spot, variance, *orders = self._draw_paths(self.num_envs, normals, self._paths)
        self.set_market(spot, variance, tuple(orders) or None)
        return self.replay()

    def _paths(self, noise: Tensor) -> tuple[Tensor, ...]:
        """Normals (n, as many as an episode takes) → what `set_market` takes: spot, variance and any orders."""
        n = len(noise)
        split = self.num_steps * self.dynamics.noise_size
        spot_noise = noise[:, :split].view(n, self.num_steps, self.dynamics.noise_size)
        paths = self.dynamics.simulate(spot_noise, self.initial_spot)
        if self.order_law.rate > 0:
            paths += self.order_law.draw(noise[:, split:].view(n, self.num_steps, self.num_options, 2))
        return paths

    def set_market(self, spot: Tensor, variance: Tensor, orders: tuple[Tensor, Tensor] | None = None) -> None:
        """Replaces the market by given paths; `replay` then starts on them.

        Computes all that does not depend on actions, for all times at once, stored time first: (num_steps + 1, n, …).

        Args:
            spot, variance: (n, num_steps + 1).
            orders: number of orders and their total size, both (n, num_steps, num_options, 2), [..., 0] what clients
                buy and [..., 1] what they sell; orders for an option that has expired are dropped. None: no orders.
        """
        self.spot = spot.T.contiguous()
        self.variance = variance.T.clamp(min=MIN_VARIANCE).contiguous()
        time_to_expiry = self.steps_left[:, None] * self.dynamics.dt  # (num_steps + 1, 1, num_options)
        volatility = self.smile.volatility(self.times[:, None], self.spot / self.initial_spot, self.variance)
        greeks = black_scholes.greeks(self.spot[..., None], self.strike, time_to_expiry, volatility, self.is_call)
        self.mark = greeks.price
        self._fill_orders(orders)
        self.delta = (self.position * greeks.delta).sum(-1)
        gamma = torch.where(time_to_expiry > 0, greeks.gamma, 0.0)  # ∞ at expiry at the money
        self.gamma = (self.position * gamma).sum(-1)
        self.vega = (self.position * greeks.vega).sum(-1)
        self.spot_change = self.spot.diff(dim=0)
        self.hedged_change = self.book_change - self.delta[:-1] * self.spot_change
        self.hedged_cost = self.cost_rate * self.delta.diff(dim=0).abs() * self.spot[1:]
        self._set_features()
        self._join_parts()

    def _fill_orders(self, orders: tuple[Tensor, Tensor] | None) -> None:
        """The book with the client orders, its value and its cash flows; see `set_market`."""
        alive = (self.steps_left > 0)[:-1, None]
        if orders is None:
            self.order_number = self.order_size = self.spot.new_zeros(self.num_steps, 1, 1, 2)
        else:
            number, size = orders
            self.order_number = number.transpose(0, 1) * alive[..., None]
            self.order_size = size.transpose(0, 1) * alive[..., None]
        nothing = torch.zeros_like(self.mark[:1])
        # Held from each time until the next, after its orders; nothing is left at the end
        position = self.initial_position + (self.order_size[..., 1] - self.order_size[..., 0]).cumsum(0)
        self.position = torch.cat(((position * alive).expand_as(self.mark[1:]), nothing))
        self.income = self.client_spread * self.order_size.sum((-1, -2)).expand_as(self.spot[1:])
        self.book_value = (self.position * self.mark).sum(-1)
        # Every change of position is a trade at the mark, settlement in cash included
        self.cash_flow = -(self.position.diff(dim=0, prepend=nothing) * self.mark).sum(-1)
        self.cash_flow[:-1] += self.income
        self.book_change = (self.position[:-1] * self.mark.diff(dim=0)).sum(-1)

    def _set_features(self) -> None:
        """What is observed and takes more than a division."""
        dt = self.dynamics.dt
        next_steps = self.steps_to_next_expiry[:, None]
        implied_variance = self.dynamics.expected_average_variance(self.variance, next_steps)
        log_moneyness = black_scholes.log_ratio(self.spot, torch.full_like(self.spot, self.middle_strike))
        self.moneyness = log_moneyness / (implied_variance * next_steps * dt).sqrt()
        seen_variance = implied_variance if self.trader_view else self.variance
        self.log_volatility = 0.5 * torch.log(seen_variance / REFERENCE_VOLATILITY**2)
        self.delta_sd = self.gamma * self.spot * (seen_variance * dt).sqrt()
        self.position_features = self.position / self.position_scale
        if self.trader_view:
            self._set_recent(implied_variance)

    def _set_recent(self, implied_variance: Tensor) -> None:
        """What `trader_parts` are made of: moving averages over the last `RECENT` steps or so, which start at what the
        implied variance (num_steps + 1, n) says."""
        dt = self.dynamics.dt
        keep = 1.0 - 1.0 / RECENT
        ages = self.times[:, None] - 1.0 - self.times[:-1]  # (num_steps + 1, num_steps) of what has happened
        weights = torch.where(ages >= 0, (1.0 - keep) * keep ** ages.clamp(min=0), 0.0)
        at_start = keep ** self.times[:, None]
        returns = self.spot.log().diff(dim=0)
        realised = at_start * implied_variance[0] + weights @ (returns.square() / dt)
        self.realised_volatility = 0.5 * torch.log(realised / implied_variance)
        moves = implied_variance.sqrt().diff(dim=0)
        self.leverage = ((weights @ (returns * moves)) / (dt * realised)).clamp(-5, 5)
        # Over the weight of what has happened: one day tells whether volatility moves at all
        seen = (1.0 - at_start).clamp(min=1.0 - keep)
        self.vol_of_vol = 0.5 * torch.log((weights @ moves.square()) / (dt * seen) + 1e-4)
        # What gamma earns in a step is ½Γ(ΔS² − S²σ²dt), of variance ½(ΓS²σ²dt)²
        from_gamma = 0.5 * (self.gamma * self.spot.square() * implied_variance * dt).square()[:-1]
        small = (1e-3 * self.book_scale) ** 2
        earned = at_start * from_gamma[0] + weights @ self.hedged_change.square()
        expected = at_start * from_gamma[0] + weights @ from_gamma
        self.hedged_pnl = (0.5 * torch.log((earned + small) / (expected + small))).clamp(-5, 5)

    def forget(self) -> None:
        """In a trader's view, puts what has been seen lately where it is when an episode starts, at all times."""
        for recent in (self.realised_volatility, self.leverage, self.vol_of_vol, self.hedged_pnl):
            recent.copy_(recent[:1].clone().expand_as(recent))
        self._join_parts()

    def replay(self) -> tuple[Tensor, dict]:
        """Starts the same episodes again: no shares, the initial book bought at its mark, the first orders filled."""
        self.t = 0
        self.holding = torch.zeros_like(self.spot[0])
        self.trades = []  # shares bought in each step, (n,)
        self.holdings = []  # shares held after it
        return self.observe(), {}

    def _seen_variance(self, observation: Tensor) -> Tensor:
        """The variance (n,) that an observation has: the model's, or in a trader's view the implied one."""
        return (REFERENCE_VOLATILITY * torch.exp(self.column(observation, "log-volatility"))) ** 2

    def _next_steps(self, observation: Tensor) -> Tensor:
        """Steps (n,) to the next expiry."""
        return torch.round(self.column(observation, "next step's share").reciprocal())

    def _variance(self, observation: Tensor) -> Tensor:
        """The model's variance (n,) of an observation."""
        seen = self._seen_variance(observation)
        if not self.trader_view:
            return seen
        steps = self._next_steps(observation)  # the implied variance is affine in the model's
        at_zero = self.dynamics.expected_average_variance(torch.zeros_like(seen), steps)
        slope = self.dynamics.expected_average_variance(torch.ones_like(seen), steps) - at_zero
        return ((seen - at_zero) / slope).clamp(min=MIN_VARIANCE)

    def _spot(self, observation: Tensor) -> Tensor:
        """Spot (n,) of an observation."""
        next_steps = self._next_steps(observation)
        average = self._seen_variance(observation)
        if not self.trader_view:
            average = self.dynamics.expected_average_variance(average, next_steps)
        remaining_sd = (average * next_steps * self.dynamics.dt).sqrt()
        return self.middle_strike * torch.exp(self.column(observation, "moneyness") * remaining_sd)

    def decode(self, observation: Tensor) -> HedgingState:
        """Observation (…, n, size) → its natural units."""
        step = torch.round((1.0 - self.column(observation, "time left")) * self.num_steps)
        spot = self._spot(observation)
        variance = self._variance(observation)
        delta = self.column(observation, "book delta")
        delta_sd = self.book_scale * self.column(observation, "book delta's step sd")
        steps_left = (self.expiry - step[..., None]).clamp(min=0)
        return HedgingState(
            step=step.long(),
            spot=spot,
            variance=variance,
            delta=self.book_scale * delta,
            gamma=delta_sd / (spot * (self._seen_variance(observation) * self.dynamics.dt).sqrt()),
            holding=self.book_scale * (self.column(observation, "net delta") - delta),
            position=self.position_scale * observation[..., self.columns["positions"]],
            volatility=self.smile.volatility(step, spot / self.initial_spot, variance),
            time_to_expiry=steps_left * self.dynamics.dt,
        )

    def with_net_delta(self, observation: Tensor, net_delta: Tensor) -> Tensor:
        """The observation (n, size) with another net delta (n,), in the observation's units."""
        column = self.columns["net delta"]
        return torch.cat((observation[:, : column.start], net_delta[:, None], observation[:, column.stop :]), -1)

    def to_band(self, net_delta: Tensor, actions: Tensor) -> Tensor:
        """Net delta (…) in shares → the one that the trade of actions (…, 2) leads to."""
        action = self.by_name(actions)
        return nearest_in_band(net_delta, action["offset"], action["half_width"])

    def after_trade(self, observation: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """The effect of a step's trade, before the market moves: a function of observation and action alone.

        Returns:
            The observation after the trade, which differs in its net delta, and the cost of the trade (n,), currency.
        """
        before = self.book_scale * self.column(observation, "net delta")
        after = self.to_band(before, actions)
        cost = self.cost_rate * (after - before).abs() * self._spot(observation)
        return self.with_net_delta(observation, after / self.book_scale), cost

    def advance(self, actions: Tensor) -> Tensor:
        self._check_running()
        t = self.t
        before = self.holding + self.delta[t]
        traded = self.to_band(before, actions) - before
        self.holding = self.holding + traded
        self.trades.append(traded)
        self.holdings.append(self.holding)
        self.t = t + 1
        if self.t == self.num_steps:  # the last options have been settled; the shares are sold
            self.holding = torch.zeros_like(self.holding)
        return self.observe()

    def settle(self, steps: int | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        end = self.t
        start = end - (end if steps is None else steps)
        traded = torch.stack(self.trades[start:])
        holding = torch.stack(self.holdings[start:])
        turnover = traded.abs()
        cost = self.cost_rate * turnover * self.spot[start:end]
        if end == self.num_steps:
            turnover[-1] += holding[-1].abs()
            cost[-1] += self.cost_rate * holding[-1].abs() * self.spot[end]
        income = self.income[start:end]
        wealth_change = holding * self.spot_change[start:end] + self.book_change[start:end]
        reward = income + wealth_change - cost - 0.5 * self.risk_aversion * wealth_change.square()
        info = {
            "wealth_change": wealth_change,
            "income": income,
            "cost": cost,
            "turnover": turnover,
            "net_delta": holding + self.delta[start:end],
            "hedged_change": self.hedged_change[start:end],
            "hedged_cost": self.hedged_cost[start:end],
        }
        return reward, info

    @property
    def cash(self) -> Tensor:
        """(n,) from all trades and cash flows so far, costs paid."""
        cash = self.cash_flow[: self.t + 1].sum(0)
        if self.t > 0:
            _, info = self.settle()
            cash = cash - (torch.stack(self.trades) * self.spot[: self.t]).sum(0) - info["cost"].sum(0)
        if self.t == self.num_steps:
            cash = cash + self.holdings[-1] * self.spot[-1]
        return cash

    @property
    def wealth(self) -> Tensor:
        """(n,) cash + shares + options at their mark, costs paid; once the episode is over, all of it is cash."""
        return self.cash + self.holding * self.spot[self.t] + self.book_value[self.t]
