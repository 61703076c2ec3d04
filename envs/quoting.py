"""QuotingEnv: makers compete for takers of European options and hedge what they are left with.

In every step each maker quotes a bid and an ask on every option, takers arrive and trade with a maker or walk away,
every maker hedges the delta of its book at a cost, and then the market moves: quote → fills → hedge → move. With
W = cash + shares + options marked at Black–Scholes, ΔW its change as the market moves, and income the edge over the
mark that the step's fills have earned, a maker's reward is

    r_t = income_t + ΔW_t − cost_t − ½ · risk_aversion · ΔW_t²          (Kolm & Ritter 2019, eq. 7),

so risk is that of the inventory, not of the earned edge. The episode ends before the options expire: the book is marked
and the hedge unwound at cost.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from scipy.stats import poisson

from envs import black_scholes
from envs.dynamics import Dynamics, Heston, draw_noise, normal_cdf
from envs.hedging import MIN_VARIANCE, REFERENCE_VOLATILITY, HedgingEnv

Tensor = torch.Tensor
VOL_POINT = 0.01
ASK, BID = 0, 1  # takers buy at the ask and sell at the bid: the last axis of quotes, takers and fills
MAX_FLOW = 0.9  # the order flow's imbalance is cut here, so that some takers come to either side

OBSERVATION_NAMES = (
    "time left",
    "√τ",
    "moneyness",
    "log implied volatility",
    "net vega",
    "net delta",
    "vega risk",
    "order flow",
)  # after them the rivals' last ask and bid edges, the own positions, and (privileged) the rivals' vegas and positions
VEGA = OBSERVATION_NAMES.index("net vega")
ACTION_NAMES = ("half_spread", "skew", "target", "band")


class BadQuote(ValueError):
    """An action that no market takes. The message names what, whose and when."""


class QuotingState(NamedTuple):
    """What a maker's observation says, in natural units; (n,) but for the last two."""

    step: Tensor  # steps made so far, integer
    spot: Tensor  # currency
    variance: Tensor  # annualised variance that drives the next step
    volatility: Tensor  # implied, the mark's
    time_to_expiry: Tensor  # years
    vega: Tensor  # of the own book, currency per vol point
    net_delta: Tensor  # own, shares, before this step's fills
    flow: Tensor  # moving average of takers' buys less sells, per expected taker
    rivals: Tensor  # (n, num_makers − 1, 2) their last ask and bid edge, vol points
    position: Tensor  # (n, num_options) own, + long


class QuotingEnv(VectorEnv):
    """A market of `num_makers` makers in European calls of one expiry, many episodes side by side.

    Takers: on each option, those who buy and those who sell are Poisson processes with intensities λ(1 + f) and
    λ(1 − f), f an autoregressive imbalance (a Cox process: order flow is persistent). A taker sees every maker's quote
    and picks by multinomial logit (McFadden 1974): P(maker i) ∝ exp(−k(dᵢ − d_ref)), outside option 1, dᵢ the maker's
    edge on that side in vol points. Each taker carries a mark, uniform in [0, 1]; the makers' intervals on it are laid
    out in the order of their edges, best first. So every policy on the same seed meets the same takers, and swapping
    two makers swaps their results path by path (where two quote exactly alike, the lower seat comes first).

    Args:
        num_envs: episodes side by side; all start and end together.
        dynamics: model of the underlying; its `dt` is the time between quotes. Default: Heston, half a trading day.
        num_makers: makers, at least 1. All seats are alike.
        num_steps: steps of an episode.
        expiry: step at which the options expire, at least `num_steps`.
        moneyness: z of every option: its strike is spot · exp(z · 0.2 · √T).
        arrival_rate: λ, mean number of takers a step on each option and side.
        flow_sd, flow_half_life: standard deviation of f, and its half-life in steps.
        choice_sensitivity: k, per vol point. The larger, the more the best price takes all.
        reference_edge: d_ref, vol points: at this edge a single maker and the outside option are picked alike.
        spot: initial spot, currency.
        cost_rate: proportional cost of hedging per unit of currency traded.
        risk_aversion: weight of ½ΔW², 1/currency.
        privileged: every maker observes its rivals' vegas and positions too.
        device, dtype: where and in what precision everything lives.

    Action (n, num_makers, 4): half-spread h ≥ 0 and skew s in vol points, target net delta and half-width ≥ 0 of a
    no-trade band around it in shares. The ask is quoted at an edge of h + s above the mark, the bid at h − s below it,
    both times the option's vega: a positive skew attracts sellers. After the fills the holding moves to the nearest
    edge of the band, if the net delta is outside. A negative band counts as 0.

    Observation (n, num_makers, 8 + 2(num_makers − 1) + num_options), see `OBSERVATION_NAMES`: public information and
    the own book. Share of the time left; √τ to expiry; ln(S/S₀)/(σ√τ); ln(σ/20 %) of the implied volatility; own net
    vega, currency per vol point; own net delta, shares; vega risk, what one standard deviation of the volatility's own
    (unhedgeable) move in the next step is worth to the book, currency; moving average of takers' buys less sells, per
    taker expected; the rivals' last ask and bid edge in vol points, next seat first (before any quote: d_ref); own
    positions. With `privileged`, the rivals' vegas and then their positions.

    `info` holds, per step, environment and maker: `wealth_change` ΔW, `income`, `cost`, `turnover` (shares, absolute),
    `net_delta` (shares, after hedging), `gross_delta` (Σ |position · delta|), `net_vega`, `half_spread`, `sold` and
    `bought` (options), `fills` (both) and `trades` (of all makers together). And `noise`, a part of the reward whose
    conditional mean is zero (to first order in dt) whatever the maker does: what income, ΔW and ½ΔW² are above their
    expectations, to first order in spot and variance. The reward without it has the same optimum and far less variance.

    There is no autoreset (`AutoresetMode.DISABLED`). On a CPU each step checks its actions; on a GPU that would mean to
    wait for the device, and NaN shows up in the rewards.

    Raises:
        ValueError: an argument outside its range; `BadQuote`, which is one, an action that is NaN or whose quotes cross
            (half-spread < 0).
    """

    metadata = {"autoreset_mode": AutoresetMode.DISABLED, "render_modes": []}

    def __init__(
        self,
        num_envs: int = 1,
        dynamics: Dynamics | None = None,
        num_makers: int = 2,
        num_steps: int = 60,
        expiry: int = 120,
        moneyness: Sequence[float] = (-1.0, -0.5, 0.0, 0.5, 1.0),
        arrival_rate: float = 0.5,
        flow_sd: float = 0.5,
        flow_half_life: float = 8.0,
        choice_sensitivity: float = 2.0,
        reference_edge: float = 1.0,
        spot: float = 100.0,
        cost_rate: float = 5e-4,
        risk_aversion: float = 1.0,
        privileged: bool = False,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        self.settings = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        for name, value in {"num_envs": num_envs, "num_makers": num_makers, "num_steps": num_steps}.items():
            if not (1 <= value < float("inf") and value == int(value)):
                raise ValueError(f"{name} is {value} (a whole number, at least 1)")
        positive = {"choice_sensitivity": choice_sensitivity, "flow_half_life": flow_half_life, "spot": spot}
        for name, value in {**positive, "arrival_rate": arrival_rate}.items():
            if not 0 < value < float("inf"):
                raise ValueError(f"{name} is {value} (more than 0)")
        for name, value in {"cost_rate": cost_rate, "risk_aversion": risk_aversion, "flow_sd": flow_sd}.items():
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name} is {value} (0 or more)")
        if not abs(reference_edge) < float("inf"):
            raise ValueError(f"reference_edge is {reference_edge} (a finite number)")
        if not (num_steps <= expiry < float("inf") and expiry == int(expiry)):
            raise ValueError(f"expiry is {expiry} (whole steps, at least num_steps = {num_steps})")
        if len(moneyness) == 0 or not all(abs(z) <= 5 for z in moneyness):
            raise ValueError(f"moneyness is {list(moneyness)} (one or more, each at least -5, at most 5)")
        self.num_envs, self.num_makers, self.num_steps = num_envs, num_makers, num_steps
        self.num_options = len(moneyness)
        self.dynamics = dynamics if dynamics is not None else Heston(dt=1 / 504)
        self.expiry, self.initial_spot, self.arrival_rate = expiry, float(spot), float(arrival_rate)
        self.choice_sensitivity, self.reference_edge = float(choice_sensitivity), float(reference_edge)
        self.flow_sd, self.flow_persistence = float(flow_sd), 0.5 ** (1.0 / flow_half_life)
        self.cost_rate, self.risk_aversion, self.privileged = float(cost_rate), float(risk_aversion), privileged
        self.device, self.dtype = torch.device(device), dtype
        tensor = {"device": self.device, "dtype": dtype}
        root = REFERENCE_VOLATILITY * (expiry * self.dynamics.dt) ** 0.5
        self.strike = torch.tensor([spot * np.exp(z * root) for z in moneyness], **tensor)
        self.steps_left = expiry - torch.arange(num_steps + 1, **tensor)  # to expiry, at each time
        # More takers than this on one option and side in a step would come once in a million, in the busiest flow
        busiest = arrival_rate * (1.0 + (MAX_FLOW if flow_sd > 0 else 0.0))
        self.max_takers = max(1, int(poisson.isf(1e-6, busiest)))
        self.smile = self.dynamics.smile(self.strike / self.initial_spot, torch.full((1,), float(expiry), **tensor))
        seats = torch.arange(num_makers, device=self.device)
        self.rivals = (seats[:, None] + torch.arange(1, num_makers, device=self.device)) % num_makers  # next seat first

        size = len(OBSERVATION_NAMES) + 2 * (num_makers - 1) + self.num_options
        size += (num_makers - 1) * (1 + self.num_options) if privileged else 0
        self.maker_observation_space = gym.spaces.Box(-np.inf, np.inf, (size,), np.float32)
        low, high = np.array([0.0, -5.0, -5.0, 0.0], np.float32), np.full(4, 5.0, np.float32)
        self.maker_action_space = gym.spaces.Box(low, high, dtype=np.float32)
        batch = gym.vector.utils.batch_space
        self.single_observation_space = batch(self.maker_observation_space, num_makers)
        self.single_action_space = batch(self.maker_action_space, num_makers)
        self.observation_space = batch(self.single_observation_space, num_envs)
        self.action_space = batch(self.single_action_space, num_envs)
        self.generator = torch.Generator(self.device)
        self.generator.seed()  # as gymnasium does: random until reset(seed=…)
        self.t = num_steps  # so that step before reset is an error

    def like(self, num_envs: int) -> "QuotingEnv":
        """The same environment with another number of rows."""
        return QuotingEnv(**{**self.settings, "num_envs": num_envs})

    @property
    def noise_size(self) -> int:
        """Random numbers that an episode takes."""
        takers = 2 * self.num_options * self.max_takers
        return self.num_steps * (self.dynamics.noise_size + 1 + takers)

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Tensor, dict]:
        """Draws the whole market of an episode, takers and their marks included. Returns observation, empty info.

        The same seed gives the same market, whatever the policies; row i does not depend on `num_envs`.

        Args:
            options: `copies` (1 unless given, must divide `num_envs`): so many neighbouring rows get the same market,
                takers included, so that what differs between them is what the makers do.
        """
        copies = (options or {}).get("copies", 1)
        if not (copies >= 1 and self.num_envs % copies == 0):
            raise ValueError(f"copies is {copies} (at least 1, must divide num_envs = {self.num_envs})")
        mask = (options or {}).get("reset_mask")
        if mask is not None and not np.all(mask):
            raise ValueError("all environments end together: reset_mask must be all True")
        if seed is not None:
            self.generator.manual_seed(seed)
        n, steps, per_step = self.num_envs // copies, self.num_steps, self.dynamics.noise_size
        noise = draw_noise(n, self.noise_size, self.generator, self.dtype)
        of_market, of_flow, of_takers = noise.split(
            (steps * per_step, steps, noise.shape[1] - steps * (per_step + 1)), 1
        )
        spot, variance = self.dynamics.simulate(of_market.view(n, steps, per_step), self.initial_spot)
        flow = self._autoregression(of_flow)
        intensity = self.arrival_rate * torch.stack((1.0 + flow, 1.0 - flow), -1)  # (n, steps, 2)
        # A Poisson process of this intensity on the line of marks: sums of exponentials. Those beyond 1 do not arrive.
        # (In place: there are thousands an episode.)
        gaps = normal_cdf(of_takers).clamp_(min=torch.finfo(self.dtype).tiny).log_().neg_()
        marks = gaps.view(n, steps, 2, self.num_options, self.max_takers).cumsum(-1)
        marks.div_(intensity[..., None, None])
        market = (spot, variance, intensity, marks)
        if copies > 1:
            market = (x.repeat_interleave(copies, 0) for x in market)
        self.set_market(*market)
        return self.replay()

    def _autoregression(self, noise: Tensor) -> Tensor:
        """Imbalance f of the order flow (n, steps), stationary, cut at ±`MAX_FLOW`, from normals of that shape."""
        flow, flows = self.flow_sd * noise[:, 0], []
        for t in range(noise.shape[1]):
            flows.append(flow)
            if t + 1 < noise.shape[1]:
                innovation = self.flow_sd * (1.0 - self.flow_persistence**2) ** 0.5 * noise[:, t + 1]
                flow = self.flow_persistence * flow + innovation
        return torch.stack(flows, 1).clamp(-MAX_FLOW, MAX_FLOW)

    def set_market(self, spot: Tensor, variance: Tensor, intensity: Tensor, marks: Tensor) -> None:
        """Replaces the market by a given one; `replay` then starts on it.

        Computes all that does not depend on actions, for all times at once, stored time first: (num_steps + 1, n, …).

        Args:
            spot, variance: (n, num_steps + 1).
            intensity: (n, num_steps, 2) mean number of takers who buy and who sell, on each option.
            marks: (n, num_steps, 2, num_options, max_takers) of the takers, increasing; beyond 1: none.
        """
        dt, steps_left = self.dynamics.dt, self.steps_left[:, None]
        self.spot, self.variance = spot.T.contiguous(), variance.T.clamp(min=MIN_VARIANCE).contiguous()
        self.intensity, self.marks = intensity.transpose(0, 1), marks.transpose(0, 1).contiguous()
        steps = self.expiry - steps_left  # made so far
        volatility = self.smile.volatility(steps, self.spot / self.initial_spot, self.variance)  # (…, 1 or num_options)
        self.volatility = volatility[..., volatility.shape[-1] // 2]
        time_to_expiry = steps_left * dt
        self.mark, self.delta, gamma, vega = black_scholes.greeks(
            self.spot[..., None], self.strike, time_to_expiry[..., None], volatility
        )
        self.gamma = torch.where(time_to_expiry[..., None] > 0, gamma, 0.0)  # ∞ at expiry at the money
        self.vega = VOL_POINT * vega  # per vol point
        self.total_vega = self.vega.sum(-1)
        # ∂mark/∂v = 100 · vega · ∂σ/∂v, the same ∂σ/∂v for all options
        self.volatility_slope = volatility_slope(self.dynamics, self.volatility, steps_left)
        mean, self.next_variance_variance = self.dynamics.next_variance_moments(self.variance)
        self.variance_surprise = self.variance[1:] - mean[:-1]
        self.covariance = self.dynamics.return_volatility_covariance(self.variance) * self.variance * dt
        self.return_variance = self.dynamics.return_variance(self.variance)
        self.residual_sd = hedged_volatility_variance(self.dynamics, self.variance, steps_left).sqrt() * dt**0.5
        total_volatility = self.volatility * time_to_expiry.clamp(min=0.5 * dt).sqrt()
        features = (
            (1.0 - torch.arange(self.num_steps + 1, device=self.device) / self.num_steps)[:, None].expand_as(self.spot),
            time_to_expiry.sqrt().expand_as(self.spot),
            black_scholes.log_ratio(self.spot, torch.full_like(self.spot, self.initial_spot)) / total_volatility,
            torch.log(self.volatility / REFERENCE_VOLATILITY),
        )
        self.features = torch.stack(features, -1)

    def replay(self) -> tuple[Tensor, dict]:
        """Starts the same episodes again, every maker with nothing. Returns observation and an empty info."""
        n, makers = self.num_envs, self.num_makers
        zeros = torch.zeros((n, makers), device=self.device, dtype=self.dtype)
        self.t, self.holding, self.cash, self.flow = 0, zeros, zeros, zeros[:, 0]
        self.position = zeros[..., None].expand(n, makers, self.num_options)
        self.edges = torch.full((n, makers, 2), self.reference_edge, device=self.device, dtype=self.dtype)
        return self.observe(), {}

    def observe(self) -> Tensor:
        """Observation (n, num_makers, size) of the current state, each maker from its own seat."""
        t, n, makers = self.t, self.num_envs, self.num_makers
        vega = (self.position * self.vega[t][:, None]).sum(-1)
        net_delta = self.holding + (self.position * self.delta[t][:, None]).sum(-1)
        risk = vega * self.residual_sd[t][:, None]
        own = torch.stack((vega, net_delta, risk, self.flow[:, None].expand(n, makers)), -1)
        parts = [self.features[t][:, None].expand(n, makers, 4), own]
        if makers > 1:
            parts.append(self.edges[:, self.rivals].flatten(2))
        parts.append(self.position)
        if self.privileged and makers > 1:
            parts += [vega[:, self.rivals], self.position[:, self.rivals].flatten(2)]
        return torch.cat(parts, -1)

    def decode(self, observation: Tensor) -> QuotingState:
        """Observation of one maker (n, size) → its natural units."""
        time_left, root, moneyness, log_volatility, vega, net_delta, _, flow = observation[:, :8].unbind(-1)
        step = torch.round((1.0 - time_left) * self.num_steps)
        volatility = REFERENCE_VOLATILITY * log_volatility.exp()
        scale = volatility * ((self.expiry - step).clamp(min=0.5) * self.dynamics.dt).sqrt()
        spot = (moneyness * scale).exp()
        variance = self.smile.variance(step, spot, volatility)
        split = 8 + 2 * (self.num_makers - 1)
        return QuotingState(
            step.long(), self.initial_spot * spot, variance.clamp(min=MIN_VARIANCE), volatility,
            root**2, vega, net_delta, flow, observation[:, 8:split].unflatten(-1, (-1, 2)),
            observation[:, split : split + self.num_options],
        )  # fmt: skip

    @staticmethod
    def to_edges(actions: Tensor) -> Tensor:
        """Actions (…, 4) → edges of the ask and of the bid (…, 2), vol points."""
        half_spread, skew = actions[..., 0], actions[..., 1]
        return torch.stack((half_spread + skew, half_spread - skew), -1)

    def choice_probabilities(self, edges: Tensor) -> Tensor:
        """P(a taker picks each maker): edges (n, num_makers, 2) in vol points → the same shape; the rest walk away."""
        utility = -self.choice_sensitivity * (edges - self.reference_edge)
        return torch.cat((utility, torch.zeros_like(utility[:, :1])), 1).softmax(1)[:, :-1]

    def _fills(self, edges: Tensor, probabilities: Tensor) -> Tensor:
        """Number of takers who trade with each maker, (n, num_makers, 2, num_options)."""
        # The best price has the first interval of marks, the next the second, …
        order = edges.argsort(dim=1, stable=True)
        bounds = probabilities.gather(1, order).cumsum(1)[..., None, None]
        below = (self.marks[self.t][:, None] < bounds).sum(-1, dtype=self.dtype)
        served = below.diff(dim=1, prepend=torch.zeros_like(below[:, :1]))
        return torch.zeros_like(served).scatter(1, order[..., None].expand_as(served), served)

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, dict]:
        """Quotes, fills, hedges, then moves the market.

        Args:
            actions: (n, num_makers, 4), see the class.

        Returns:
            observation (n, num_makers, size), reward (n, num_makers), terminated and truncated (n,), info.

        Raises:
            RuntimeError: the episode is over; call `reset`.
            BadQuote: on a CPU, an action that is not finite, or a half-spread below 0.
        """
        if self.t >= self.num_steps:
            raise RuntimeError("the episode is over (or never began): call reset()")
        if self.device.type == "cpu":
            self._check(actions)
        t, spot, position = self.t, self.spot[self.t][:, None], self.position
        half_spread, _, target, band = actions.unbind(-1)
        self.edges = edges = self.to_edges(actions)
        probabilities = self.choice_probabilities(edges)
        self.fills = fills = self._fills(edges, probabilities)
        income = ((fills * self.vega[t][:, None, None]).sum(-1) * edges).sum(-1)
        expected_income = (probabilities * self.intensity[t][:, None] * edges).sum(-1) * self.total_vega[t][:, None]
        bought = fills[:, :, BID] - fills[:, :, ASK]
        self.position = position = position + bought
        cash = self.cash + income - (bought * self.mark[t][:, None]).sum(-1)

        option_delta = position * self.delta[t][:, None]
        net_delta = self.holding + option_delta.sum(-1)
        traded = HedgingEnv.to_band(net_delta, torch.stack((target, band), -1)) - net_delta
        net_delta, holding, turnover = net_delta + traded, self.holding + traded, traded.abs()
        cost = self.cost_rate * turnover * spot

        move = (self.spot[t + 1] - self.spot[t])[:, None]
        wealth_change = holding * move + (position * (self.mark[t + 1] - self.mark[t])[:, None]).sum(-1)
        vega = (position * self.vega[t][:, None]).sum(-1)
        noise = income - expected_income + self._surprise(net_delta, vega, position, move)
        trades = fills.sum(1)  # of all makers
        imbalance = (trades[:, ASK] - trades[:, BID]).sum(-1) / (2.0 * self.num_options * self.arrival_rate)
        self.flow = self.flow_persistence * self.flow + (1.0 - self.flow_persistence) * imbalance
        cash = cash - traded * spot - cost
        self.t = t + 1
        done = self.t == self.num_steps
        if done:  # the book stays, at its mark; the shares are sold
            unwinding = self.cost_rate * holding.abs() * self.spot[t + 1][:, None]
            cost, turnover = cost + unwinding, turnover + holding.abs()
            cash = cash + holding * self.spot[t + 1][:, None] - unwinding
            holding = torch.zeros_like(holding)
        self.holding, self.cash = holding, cash
        reward = income + wealth_change - cost - 0.5 * self.risk_aversion * wealth_change**2
        terminated = torch.full((self.num_envs,), done, device=self.device)
        info = {
            "wealth_change": wealth_change,
            "income": income,
            "cost": cost,
            "turnover": turnover,
            "net_delta": net_delta,
            "gross_delta": option_delta.abs().sum(-1),
            "net_vega": vega,
            "half_spread": half_spread,
            "sold": fills[:, :, ASK].sum(-1),
            "bought": fills[:, :, BID].sum(-1),
            "fills": fills.sum((-1, -2)),
            "trades": trades.sum((-1, -2))[:, None].expand_as(income),
            "noise": noise,
        }
        return self.observe(), reward, terminated, torch.zeros_like(terminated), info

    def _surprise(self, net_delta: Tensor, vega: Tensor, position: Tensor, move: Tensor) -> Tensor:
        """The part of ΔW − ½ · risk_aversion · ΔW² that a step's spot and variance explain, less its expectation.

        To first order ΔW is L = net delta · ΔS + ∂W/∂v · (v' − E v'), whose mean and mean square are known, and to
        second order in the spot ½Γ(ΔS² − E ΔS²) more.
        """
        t, a = self.t, self.risk_aversion
        spot, slope = self.spot[t][:, None], vega * self.volatility_slope[t][:, None]
        square = spot**2 * self.return_variance[t][:, None]  # E ΔS²
        linear = net_delta * move + slope * self.variance_surprise[t][:, None]
        expected = net_delta**2 * square + slope**2 * self.next_variance_variance[t][:, None]
        expected = expected + 2.0 * net_delta * slope * spot * self.covariance[t][:, None]
        gamma = (position * self.gamma[t][:, None]).sum(-1)
        return linear + 0.5 * gamma * (move**2 - square) - 0.5 * a * (linear**2 - expected)

    def _check(self, actions: Tensor) -> None:
        if actions.shape != (self.num_envs, self.num_makers, 4):
            wanted = (self.num_envs, self.num_makers, 4)
            raise BadQuote(f"actions have the shape {tuple(actions.shape)} ({wanted}: environments, makers, 4)")
        low = actions.amin((0, 1))  # NaN wherever there is one
        if not torch.isfinite(low.sum() + actions.amax()):
            maker, name = divmod(int((~actions.isfinite()).any(0).flatten().nonzero()[0]), 4)
            raise BadQuote(f"{ACTION_NAMES[name]} of maker {maker} is not finite at step {self.t}")
        if low[0] < 0:
            raise BadQuote(f"half_spread is {low[0].item():g} at step {self.t} (0 or more, or the quotes cross)")

    @property
    def wealth(self) -> Tensor:
        """(n, num_makers) cash + shares + options at their mark, costs paid."""
        options = (self.position * self.mark[self.t][:, None]).sum(-1)
        return self.cash + self.holding * self.spot[self.t][:, None] + options


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


class AgainstRivals(VectorEnv):
    """One seat of a `QuotingEnv`, the others taken by given policies: a market for one learner or one contestant.

    Args:
        env: the market of all makers.
        rivals: their policies, observation (n, size) → action (n, 4), one for every other seat, next seat first.
        seat: of the learner.

    Observation (n, size), action (n, 4), reward (n,) and `info` (n,) are those of the seat, see `QuotingEnv`.
    """

    metadata = QuotingEnv.metadata

    def __init__(self, env: QuotingEnv, rivals: Sequence[Callable[[Tensor], Tensor]], seat: int = 0):
        if len(rivals) != env.num_makers - 1:
            raise ValueError(f"{len(rivals)} rivals (num_makers − 1 = {env.num_makers - 1})")
        if not 0 <= seat < env.num_makers:
            raise ValueError(f"seat is {seat} (at least 0, at most {env.num_makers - 1})")
        self.env, self.rivals, self.seat = env, list(rivals), seat
        self.other_seats = [(seat + 1 + i) % env.num_makers for i in range(len(rivals))]
        self.num_envs, self.num_steps, self.device = env.num_envs, env.num_steps, env.device
        self.single_observation_space, self.single_action_space = env.maker_observation_space, env.maker_action_space
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, env.num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, env.num_envs)

    @property
    def generator(self) -> torch.Generator:
        return self.env.generator

    def like(self, num_envs: int) -> "AgainstRivals":
        """The same market with another number of rows."""
        return AgainstRivals(self.env.like(num_envs), self.rivals, self.seat)

    def standing_still(self, num_envs: int, variance: Tensor | float | None = None) -> "AgainstRivals":
        """A market to look at policies in: the spot does not move, no taker comes, the variance (n,) stays."""
        still = self.like(num_envs)
        market, steps = still.env, self.num_steps
        tensor = {"device": self.device, "dtype": market.dtype}
        variance = torch.as_tensor(market.dynamics.initial_variance if variance is None else variance, **tensor)
        intensity = torch.full((num_envs, steps, 2), market.arrival_rate, **tensor)
        nobody = torch.full((num_envs, steps, 2, market.num_options, 1), 2.0, **tensor)
        spot = torch.full((num_envs, steps + 1), market.initial_spot, **tensor)
        market.set_market(spot, variance.expand(num_envs)[:, None].expand_as(spot), intensity, nobody)
        still.replay()
        return still

    def observe_at(self, t: int, vega: Tensor | float = 0.0) -> Tensor:
        """What the seat sees (n, size) at step t of the current market, holding `vega` (currency per vol point) in the
        middle option, hedged, after the rivals have quoted without inventory."""
        market = self.env
        market.replay()
        market.t = t
        for seat, policy in zip(self.other_seats, self.rivals, strict=True):
            market.edges[:, seat] = market.to_edges(policy(market.observe()[:, seat]))
        middle = market.num_options // 2
        held = vega / market.vega[t, :, middle]
        market.position, market.holding = market.position.clone(), market.holding.clone()
        market.position[:, self.seat, middle] = held
        market.holding[:, self.seat] = -held * market.delta[t, :, middle]
        return market.observe()[:, self.seat]

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Tensor, dict]:
        """As `QuotingEnv.reset`, from the seat."""
        self.observations, info = self.env.reset(seed=seed, options=options)
        return self.observations[:, self.seat], info

    def replay(self) -> tuple[Tensor, dict]:
        """As `QuotingEnv.replay`, from the seat."""
        self.observations, info = self.env.replay()
        return self.observations[:, self.seat], info

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, dict]:
        """actions (n, 4) → observation (n, size), reward, terminated, truncated (n,), info of the seat."""
        everyone = [None] * self.env.num_makers
        everyone[self.seat] = actions
        for seat, policy in zip(self.other_seats, self.rivals, strict=True):
            everyone[seat] = policy(self.observations[:, seat])
        self.observations, reward, terminated, truncated, info = self.env.step(torch.stack(everyone, 1))
        info = {name: value[:, self.seat] for name, value in info.items()}
        return self.observations[:, self.seat], reward[:, self.seat], terminated, truncated, info


class QuotingGymEnv(gym.Env):
    """One maker against Avellaneda–Stoikov makers, one environment, numpy in and out: gymnasium's `OptionQuoting-v0`.

    Args:
        rival_risk_aversion, rival_k: parameters of the rivals (`baselines.avellaneda_stoikov`); the defaults are tuned
            in the default market.
        settings: as `QuotingEnv`.
    """

    metadata = {"render_modes": []}

    def __init__(self, rival_risk_aversion: float = 0.23, rival_k: float = 0.8, **settings):
        from envs import baselines  # which imports this module

        market = QuotingEnv(num_envs=1, **settings)
        rival = baselines.avellaneda_stoikov(market, rival_risk_aversion, rival_k)
        self.env = AgainstRivals(market, [rival] * (market.num_makers - 1))
        self.observation_space = self.env.single_observation_space
        self.action_space = self.env.single_action_space

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        observation, _ = self.env.reset(seed=seed)
        return observation[0].float().cpu().numpy(), {}

    def step(self, action):
        action = torch.as_tensor(action, dtype=self.env.env.dtype, device=self.env.device)[None]
        observation, reward, terminated, truncated, info = self.env.step(action)
        info = {name: value.item() for name, value in info.items()}
        return observation[0].float().cpu().numpy(), reward.item(), terminated.item(), truncated.item(), info
