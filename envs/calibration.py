"""CalibrationGame: n trajectories of one asset as players, who choose their volatilities and share a pricing error.

Player i's action at time t is the volatility of its own trajectory over [t, t + δ]; everybody's payoffs together are
the Monte Carlo prices, and their distance from the market's smile is everybody's reward (Vadori, *Calibration of
Derivative Pricing Models: a Multi-Agent Reinforcement Learning Perspective*; equation numbers are the paper's). No
graph of the simulation is stored, so memory does not grow with what is learnt from it.

    ln S_{t+1} = ln S_t − ½ σ_t² δ + σ_t √δ Z_t                                                             (5)

Two tasks. `local-vol`: fit the implied volatilities of all strikes and maturities. `bermudan`: make the Bermudan option
max{(S_{t1} − k1)⁺, E_{t1}[(S_{t2} − k2)⁺]} as cheap as can be while the vanillas stay on the market, which localisation
sees to: σ = σ_loc(t, S) m/√E[m²|S], m what the players choose (Gyöngy 1986; Guyon & Henry-Labordère 2012).

Shapes: R runs side by side of n players each, (R, n). Under common random numbers all runs have the same Brownian
increments, and differ by what their players do. S₀ = 1, zero rates; time steps are trading days, δ = 1/252.
"""

import math
from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import torch
from scipy.optimize import brentq

from envs import black_scholes
from envs.benchmark import BENCHMARK_SEED, VALIDATION_SEED, Z95, Benchmark, Estimate
from envs.dynamics import TRADING_DAYS
from envs.smiles import CALIBRATED, VOL_POINT, Surface

Tensor = torch.Tensor
DT = 1.0 / TRADING_DAYS
TASKS = ("local-vol", "bermudan")
STATES = ("local", "non-path-dependent", "path-dependent")
ACTION_MAPS = {"direct": 1, "normal": 2, "stochastic": 3}  # and how many numbers an action has
REFERENCES = ("local-vol", "black-scholes", "none")

FIRST_DAY = 5  # one lognormal step has no skew, so the first days cannot be fitted
FIRST_JUDGED = 21  # the benchmark's maturities: days 21 … num_steps
STRIKES = torch.linspace(*CALIBRATED, 11, dtype=torch.float64)  # in standard deviations √w(0, t) from the money
EXERCISE_DAY = 21  # t1 of the Bermudan; t2 is the last day
NODES = 161  # of the grids of log-spots, ±8 standard deviations
WIDTH = 8.0
REFERENCE_PATHS, REFERENCE_SEED = 2**21, 9_000_000
VALIDATION_PATHS = 2**16
MAX_LOG_MULTIPLIER = 1.0  # of the Bermudan's m
NUM_KNOTS = 50  # of the exercise rule, where the Bermudan is priced


class State(NamedTuple):
    """What a player knows, (R, n) each: logarithms of its spot and of its last σ over `reference_volatility` (in the
    Bermudan task: of its last m), now and as they were at t1."""

    log_spot: Tensor
    log_volatility: Tensor
    log_spot_t1: Tensor
    log_volatility_t1: Tensor


def at_spots(log_spot: Tensor) -> State:
    """The state of players at these log-spots (…), where nothing else matters."""
    return State(log_spot, *[torch.zeros_like(log_spot)] * 3)


class Grid:
    """Functions of the log-spot at every time, tabulated on nodes that are uniform in standard deviations.

    Attributes:
        log_spot: (num_steps, NODES), symmetric around 0.
    """

    def __init__(self, surface: Surface, num_steps: int, device: torch.device | str = "cpu"):
        t = torch.arange(1, num_steps + 1, dtype=torch.float64) * DT
        self.scale = surface(0.0, t).w.sqrt().to(device, torch.float32)  # one day on: at t = 0 all are at 0
        self.log_spot = self.scale[:, None] * torch.linspace(-WIDTH, WIDTH, NODES, device=device)

    def _place(self, t: int, log_spot: Tensor, nodes: int) -> tuple[Tensor, Tensor]:
        """Index (R, n) of the node below each log-spot, in a table (R, nodes) laid flat, and how far it is beyond."""
        half = 0.5 * (nodes - 1)
        # A spot that is NaN has a place too, so that the run stops where losses are checked
        u = (log_spot * (half / WIDTH / self.scale[t]) + half).nan_to_num_(0.0).clamp_(0, nodes - 1.001)
        node = u.long()
        return node, u.sub_(node)

    def lookup(self, table: Tensor, t: int, log_spot: Tensor) -> Tensor:
        """Values (R or 1, nodes) of time t at log-spots (R, n): linear between the nodes, constant outside."""
        node, weight = self._place(t, log_spot, table.shape[-1])
        if len(table) > 1:
            node = node + table.shape[-1] * torch.arange(len(table), device=node.device)[:, None]
        values = table.reshape(-1)
        return torch.lerp(values[node], values[node + 1], weight)

    def conditional_mean(self, values: Tensor, t: int, log_spot: Tensor, empty: float = 1.0) -> Tensor:
        """E[values | log-spot] of the players (R, n) at the nodes (R, NODES): the particle method.

        Guyon & Henry-Labordère (2012) with hat kernels: a player counts at the two nodes around it, in proportion.
        Where nobody is, the mean is `empty`.
        """
        node, weight = self._place(t, log_spot, NODES)
        node = node + NODES * torch.arange(len(values), device=node.device)[:, None]
        total, count = (torch.zeros(len(values) * NODES, device=node.device) for _ in range(2))
        for index, share in ((node, 1.0 - weight), (node + 1, weight)):
            total.scatter_add_(0, index.flatten(), (share * values).flatten())
            count.scatter_add_(0, index.flatten(), share.flatten())
        return torch.where(count > 0, total / count.clamp(min=1e-9), empty).view(len(values), NODES)


class CalibrationGame:
    """The simulation, what the players see of it, and what the market says about it.

    Args:
        surface: the market's smile.
        num_players, num_runs: n and R.
        num_steps: T, trading days; the last maturity.
        task, state, action_map: of `TASKS`, `STATES` and `ACTION_MAPS`.
        common: all runs have the same Brownian increments.
        reference: of `REFERENCES`, a model simulated on the same increments whose prices are known beside, so that what
            the sample is off by can be taken out of the errors; "none" for no such correction.
        vega_weights: weight errors of implied volatility by vega instead of equally.
        regression: of `REGRESSIONS`, for the Bermudan's continuation value in the rewards.

    An action is (R, n, size), zero for the reference volatility (at the money, last maturity) or for m = 1. Its maps:

    - direct, size 1: ln σ_t = a.
    - normal, size 2: ln σ_t ~ N(a₀, (e^{a₁}/10)²), the paper's mean and variance of ln σ_t.
    - stochastic, size 3: ln σ_{t+1} = ln σ_t + μδ + ηρ√δ Z_t + η√(1−ρ²)√δ Z⊥_t (9), with μ = 10a₀, η = 2e^{a₁} and
      ρ = tanh(a₂ − 1), annualised; the first volatility is the local one.

    In the Bermudan task it is ln m that is chosen so, from day t1 on and within ±`MAX_LOG_MULTIPLIER` (by tanh; the
    stochastic map is cut there); before, the model is plain local volatility, and the continuation value at t1 depends
    on S_{t1} alone.

    Raises:
        ValueError: an unknown name, or more steps than the smile has days.
    """

    def __init__(
        self,
        surface: Surface,
        num_players: int,
        num_runs: int = 1,
        num_steps: int = 51,
        task: str = "local-vol",
        state: str = "local",
        action_map: str = "direct",
        common: bool = True,
        reference: str = "none",
        vega_weights: bool = False,
        regression: str = "knots",
        device: torch.device | str = "cpu",
    ):
        self.settings = {name: value for name, value in locals().items() if name != "self"}
        for name, value, allowed in (
            ("task", task, TASKS),
            ("state", state, STATES),
            ("action_map", action_map, ACTION_MAPS),
            ("reference", reference, REFERENCES),
            ("regression", regression, REGRESSIONS),
        ):
            if value not in allowed:
                raise ValueError(f"{name} is {value!r} (one of {', '.join(allowed)})")
        last = last_day(surface)
        if not FIRST_JUDGED < num_steps <= last:
            allowed = f"at least {FIRST_JUDGED + 1}, at most {last}, the last maturity"
            raise ValueError(f"num_steps is {num_steps} ({allowed})")
        self.surface, self.num_players, self.num_runs, self.num_steps = surface, num_players, num_runs, num_steps
        self.task, self.state_kind, self.action_map, self.common = task, state, action_map, common
        self.action_size, self.device = ACTION_MAPS[action_map], torch.device(device)
        self.observation_size = {"local": 2, "non-path-dependent": 3, "path-dependent": 5}[state]
        self.grid = Grid(surface, num_steps, device)
        self.reference_volatility = float(surface.implied_volatility(0.0, num_steps * DT))
        # Dupire at the start of each step: on a daily grid more accurate than in its middle (0.090 to 0.096 vol points)
        times = (torch.arange(num_steps, dtype=torch.float64) * DT).clamp(min=1e-6)
        nodes = self.grid.log_spot.double().cpu()
        self.local_volatility = surface.local_volatility(nodes, times[:, None]).to(device, torch.float32)
        self.leverage = None  # (num_steps, nodes) of √E[m²|S], where it is known; else from the players themselves

        days = torch.arange(FIRST_DAY, num_steps + 1)
        maturity = (days * DT)[:, None].double()
        log_strike = STRIKES * surface(0.0, maturity).w.sqrt()  # (days, strikes)
        self.days, self.maturity, self.strike = days, maturity.to(device), log_strike.exp().to(device)
        self.is_call = self.strike >= 1.0  # out of the money
        of_day = [list(zip(*row, strict=True)) for row in zip(self.strike.tolist(), self.is_call.tolist(), strict=True)]
        self.options = list(zip(days.tolist(), of_day, strict=True))  # (day, [(strike, is_call), …]), on the host
        self.market_volatility = surface.implied_volatility(log_strike, maturity).to(device)
        self.constant_volatility = float(judged(self.market_volatility).mean())  # of least square error
        one = torch.ones_like(self.strike)
        vega = VOL_POINT * black_scholes.vega(one, self.strike, self.maturity, self.market_volatility)
        self.vega = vega = vega.clamp(min=1e-7)  # smaller only on a smile with arbitrage
        self.weights = vega / vega.mean(-1, keepdim=True) if vega_weights else torch.ones_like(vega)
        self.reference, self.regression = reference, regression
        if task == "bermudan":
            self.strike_t1 = 1.0
            self.strike_t2 = bermudan_strike(surface, EXERCISE_DAY, num_steps)

    @property
    def is_local(self) -> bool:
        """Whether the state is (t, S) alone, so that a policy can be tabulated."""
        return self.state_kind == "local"

    def like(self, **changes) -> "CalibrationGame":
        """The same game with other settings."""
        game = CalibrationGame(**{**self.settings, **changes})
        if not {"surface", "num_steps", "reference"} & set(changes):
            game.reference_errors = self.reference_errors  # which take a while
        return game

    @cached_property
    def reference_errors(self) -> Tensor:
        """Expected errors (days, strikes) of the reference model, vol points; zero without one."""
        if self.reference == "local-vol":
            return dupire_errors(self)
        known = self.constant_volatility if self.reference == "black-scholes" else self.market_volatility
        return (known - self.market_volatility) / VOL_POINT

    # The simulation

    def reset(self, generator: torch.Generator) -> None:
        """Draws the Brownian increments, in antithetic pairs of players, and puts everybody at S₀."""
        half = (self.num_players + 1) // 2
        runs = 1 if self.common else self.num_runs

        def draw() -> Tensor:
            shocks = torch.randn(self.num_steps, runs, half, generator=generator, device=self.device)
            return torch.cat((shocks, -shocks), -1)[..., : self.num_players]

        self.start(draw(), draw() if self.action_map != "direct" else None)

    def start(self, shocks: Tensor, own_shocks: Tensor | None) -> None:
        """Starts on given normals Z, and Z⊥ or those of ln σ_t, (T, runs or 1, n)."""
        zero = torch.zeros(self.num_runs, self.num_players, device=self.device)
        self.t, self.shocks, self.own_shocks = 0, shocks, own_shocks
        first = 0.0
        if self.action_map == "stochastic" and self.task == "local-vol":
            first = math.log(float(self.local_volatility[0, NODES // 2]) / self.reference_volatility)
        self.state = State(zero, zero + first, zero, zero + first)
        self.log_spots = [zero]  # of every time
        self.log_volatilities = []  # ln σ of every step
        self.leverages = []  # √E[m²|S] of every step at the nodes, in the last run
        self.reference_log_spots = [torch.zeros_like(shocks[0])] if self.reference != "none" else []

    def features(self, t: int, state: State) -> Tensor:
        """What the networks see of a state, (…, observation_size), of order one: time, and z = ln S in standard
        deviations; then what else the kind of state has."""
        z = state.log_spot / self.grid.scale[t]
        columns = [torch.full_like(z, 2.0 * t / self.num_steps - 1.0), z]
        if self.state_kind != "local":
            columns.append(2.0 * state.log_volatility)
        if self.state_kind == "path-dependent":
            columns += [state.log_spot_t1 / self.grid.scale[EXERCISE_DAY], 2.0 * state.log_volatility_t1]
        return torch.stack(columns, -1)

    def observe(self) -> Tensor:
        """Features (R, n, observation_size) of the current state."""
        return self.features(self.t, self.state)

    def step(self, actions: Tensor) -> None:
        """The players' actions (R, n, size) become volatilities, and the spots move by a day."""
        t, a, chosen = self.t, actions.unbind(-1), self.state.log_volatility
        if self.action_map == "direct":
            chosen = following = a[0]
        elif self.action_map == "normal":
            chosen = following = a[0] + self.own_std(a[1]) * self.own_shocks[t]
        else:
            rho, eta = torch.tanh(a[2] - 1.0), 2.0 * a[1].clamp(-10, 2).exp()
            noise = rho * self.shocks[t] + (1.0 - rho**2).clamp(min=0).sqrt() * self.own_shocks[t]
            following = chosen + 10.0 * a[0] * DT + eta * math.sqrt(DT) * noise
        if self.task == "local-vol":
            chosen, following = chosen.clamp(-3, 3), following.clamp(-3, 3)
            log_volatility = math.log(self.reference_volatility) + chosen
        elif t < EXERCISE_DAY:
            following = torch.zeros_like(self.state.log_spot)
            log_volatility = self._local(t, self.state.log_spot).log()
            self.leverages.append(torch.ones_like(self.local_volatility[t]))
        else:
            bound = MAX_LOG_MULTIPLIER
            if self.action_map == "stochastic":
                chosen, following = chosen.clamp(-bound, bound), following.clamp(-bound, bound)
            else:
                chosen = following = bound * torch.tanh(chosen / bound)
            log_volatility = self._local(t, self.state.log_spot).log() + chosen - self._log_leverage(t, chosen)
        self.move(log_volatility, following)

    @staticmethod
    def own_std(action: Tensor) -> Tensor:
        """Standard deviation of ln σ_t of the map "normal"."""
        return 0.1 * action.clamp(-10, 3).exp()

    def _local(self, t: int, log_spot: Tensor) -> Tensor:
        return self.grid.lookup(self.local_volatility[t][None], t, log_spot)

    def _log_leverage(self, t: int, chosen: Tensor) -> Tensor:
        """ln √E[m²|S] at the players, from all of them or from the table of a market that is done."""
        if self.leverage is not None:
            return self.grid.lookup(self.leverage[t][None], t, self.state.log_spot).log()
        mean = self.grid.conditional_mean((2.0 * chosen).exp(), t, self.state.log_spot)
        self.leverages.append(mean[-1].sqrt())
        return 0.5 * self.grid.lookup(mean, t, self.state.log_spot).log()

    def step_dupire(self) -> None:
        """A step of plain local volatility instead."""
        volatility = self._local(self.t, self.state.log_spot)
        self.move(volatility.log(), torch.zeros_like(volatility))

    def step_constant(self) -> None:
        """A step of the best constant volatility instead."""
        zero = torch.zeros_like(self.state.log_spot)
        self.move(zero + math.log(self.constant_volatility), zero)

    def move(self, log_volatility: Tensor, following: Tensor) -> None:
        """Moves the spots by a day at these volatilities (R, n), after (5)."""
        t = self.t
        volatility = log_volatility.exp()
        change = volatility * (math.sqrt(DT) * self.shocks[t]) - (0.5 * DT) * volatility**2
        log_spot = self.state.log_spot + change
        self.t = t + 1
        if self.t <= EXERCISE_DAY:
            self.state = State(log_spot, following, log_spot, following)
        else:
            self.state = State(log_spot, following, self.state.log_spot_t1, self.state.log_volatility_t1)
        self.log_spots.append(log_spot)
        self.log_volatilities.append(log_volatility)
        if self.reference != "none":
            x = self.reference_log_spots[-1]
            sigma = self._local(t, x) if self.reference == "local-vol" else self.constant_volatility
            self.reference_log_spots.append(x + sigma * (math.sqrt(DT) * self.shocks[t]) - (0.5 * DT) * sigma**2)

    # Prices and errors

    def prices(self, log_spots: list[Tensor]) -> Tensor:
        """Monte Carlo prices (R, days, strikes) of the out-of-the-money options, float64."""
        columns = []
        for day, options in self.options:
            spot = log_spots[day].exp()
            payoffs = (((spot - k) if call else (k - spot)).clamp_(min=0).mean(-1) for k, call in options)
            columns.append(torch.stack(list(payoffs), -1))
        return torch.stack(columns, 1).double()

    def volatility_errors(self, prices: Tensor) -> Tensor:
        """Prices (…, days, strikes) → implied volatility less the market's, in vol points.

        A price of 0, when nobody ended beyond a strike, has volatility 0.
        """
        arguments = (prices, torch.ones_like(self.strike), self.strike, self.maturity, self.is_call)
        volatility = black_scholes.implied_volatility(*arguments, iterations=14)
        return (volatility - self.market_volatility) / VOL_POINT

    def errors(self) -> Tensor:
        """Calibration errors (R, days, strikes) of what was simulated, vol points; corrected by the reference model.

        The reference on the same paths is off by a known expectation and by what the sample is off; the latter, which
        the players' prices share, is subtracted.
        """
        errors = self.volatility_errors(self.prices(self.log_spots))
        if self.reference == "none":
            return errors
        sampled = self.volatility_errors(self.prices(self.reference_log_spots))
        return errors - (sampled - self.reference_errors)

    # Rewards. Whatever is common to all of the past is left out of a reward-to-go, which makes it telescope (8).

    def shared_rewards(self, errors: Tensor) -> Tensor:
        """Everybody's reward of every step (R, T), vol points²: minus the weighted mean square error of the options
        that expire then, the paper's (6)."""
        rewards = torch.zeros(len(errors), self.num_steps, device=errors.device, dtype=errors.dtype)
        rewards[:, FIRST_DAY - 1 :] = -(self.weights * errors.square()).mean(-1)
        return rewards.float()

    def difference_rewards(self, errors: Tensor, log_spots: Tensor) -> Tensor:
        """Each path's first-order effect on the shared error: −Σ_m 2ω_m/M (IV_m − c_m)/vega_m · payoff_m(S).

        A path is 1/n of the price, so near the market, whose vega this takes, this is n times the derivative of the
        shared reward with respect to its payoffs.

        Args:
            errors: (days, strikes), vol points.
            log_spots: (T + 1, …) of the paths, at every time.

        Returns:
            (T, …) rewards of every step, vol points².
        """
        coefficient = (-2.0 * self.weights * errors / self.strike.shape[1] / self.vega).to(log_spots)
        spot = log_spots[FIRST_DAY:].exp()
        shape = (-1,) + (1,) * (spot.dim() - 1)
        paid = torch.zeros_like(spot)
        for j in range(self.strike.shape[1]):
            strike = self.strike[:, j].to(spot).view(shape)
            sign = (2.0 * self.is_call[:, j].to(spot) - 1.0).view(shape)
            paid += coefficient[:, j].view(shape) * (sign * (spot - strike)).clamp_(min=0)
        return torch.cat((torch.zeros_like(log_spots[1:FIRST_DAY]), paid))

    def _spots_t1(self) -> Tensor:
        """ln S_t1 (R, n), or (1, n) where all runs have the same, as with common random numbers before anybody acts."""
        return self.log_spots[EXERCISE_DAY][: 1 if self.common else None]

    def bermudan_cashflows(self) -> Tensor:
        """The paper's fake cashflow X̃_t (T + 1, R, n), at the end the Bermudan's own, until t1 what is had then (8).

        X̃_t = max{(S_t1 − k1)⁺, E_t1[(S_t − k̃_t)⁺]}, k̃_t = k2^{√(t/t2)}, the expectation by regression on S_t1 within
        the sample (Longstaff & Schwartz 2001).
        """
        spot_t1 = self.log_spots[EXERCISE_DAY].exp()
        exercise = (spot_t1 - self.strike_t1).clamp(min=0)
        regress = REGRESSIONS[self.regression](self._spots_t1())
        cashflows = [exercise] * (EXERCISE_DAY + 1)
        for t in range(EXERCISE_DAY + 1, self.num_steps + 1):
            strike = self.strike_t2 ** math.sqrt(t / self.num_steps)
            cashflows.append(torch.maximum(exercise, regress((self.log_spots[t].exp() - strike).clamp(min=0))))
        return torch.stack(cashflows)

    def bermudan_paid(self) -> Tensor:
        """What each path pays at the end (R, n), exercised by the regression: its first-order effect on the price."""
        spot_t1, spot_t2 = self.log_spots[EXERCISE_DAY].exp(), self.log_spots[-1].exp()
        exercise, paid = (spot_t1 - self.strike_t1).clamp(min=0), (spot_t2 - self.strike_t2).clamp(min=0)
        continuation = REGRESSIONS[self.regression](self._spots_t1())(paid)
        return torch.where(exercise >= continuation, exercise, paid)


def last_day(surface: Surface) -> int:
    """The last whole trading day that the surface has (51, the paper's, where it has no end)."""
    return int(surface.last_maturity / DT + 1e-6) if surface.last_maturity < math.inf else 51


Regression = Callable[[Tensor], Tensor]  # values (R, n) to their fits (R, n)


def regression_on(basis: Tensor) -> Regression:
    """Least squares on a basis (R or 1, n, size), run by run."""
    weights = torch.linalg.pinv(basis.transpose(-1, -2) @ basis, hermitian=True) @ basis.transpose(-1, -2)
    return lambda values: (basis @ (weights @ values.to(basis)[..., None]))[..., 0].to(values)


def polynomial_regression(log_spot: Tensor, degree: int = 8) -> Regression:
    """The paper's: Chebyshev polynomials of the log-spots (R, n)."""
    x = log_spot.double()
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    x = (2.0 * x - low - high) / (high - low).clamp(min=1e-12)
    basis = [torch.ones_like(x), x]
    for _ in range(degree - 1):
        basis.append(2.0 * x * basis[-1] - basis[-2])
    return regression_on(torch.stack(basis, -1))


def knots_of(log_spot: Tensor, num_knots: int) -> Tensor:
    """Quantiles (num_knots,) of log-spots, from the least to the largest; of a hundred thousand of them."""
    sample = log_spot.flatten().double()
    sample = sample[:: max(1, len(sample) // 100_000)]
    return torch.quantile(sample, torch.linspace(0, 1, num_knots, dtype=sample.dtype, device=sample.device))


def hats(log_spot: Tensor, knots: Tensor) -> Tensor:
    """Basis (…, n, num_knots) of the functions that are linear between the knots, at log-spots (…, n)."""
    x = log_spot.double().clamp(knots[0], knots[-1])
    right = torch.searchsorted(knots, x.contiguous()).clamp(1, len(knots) - 1)
    weight = (x - knots[right - 1]) / (knots[right] - knots[right - 1]).clamp(min=1e-12)
    basis = torch.zeros(*x.shape, len(knots), dtype=x.dtype, device=x.device)
    return basis.scatter_(-1, right[..., None], weight[..., None]).scatter_(
        -1, right[..., None] - 1, 1 - weight[..., None]
    )


def knot_regression(log_spot: Tensor, num_knots: int = 25) -> Regression:
    """Piecewise linear functions of the log-spots (R, n), knots at their quantiles.

    A policy can hide from a polynomial what it gains around the exercise boundary; from this less.
    """
    return regression_on(hats(log_spot, knots_of(log_spot, num_knots)))


REGRESSIONS = {"knots": knot_regression, "polynomial": polynomial_regression}


def bermudan_strike(surface: Surface, t1: int, t2: int) -> float:
    """k2 such that the calls (t1, 1) and (t2, k2) are worth the same on the surface."""
    worth = float(surface.call_price(0.0, t1 * DT))
    return math.exp(brentq(lambda k: float(surface.call_price(k, t2 * DT)) - worth, 0.0, 5.0))


def dupire_errors(game: CalibrationGame) -> Tensor:
    """Expected errors (days, strikes) of daily local volatility on that game's options, by `REFERENCE_PATHS`."""
    alone = game.like(num_players=min(REFERENCE_PATHS, 2**17), num_runs=1, reference="none", common=True)
    paths = sample(alone, CalibrationGame.step_dupire, REFERENCE_PATHS, REFERENCE_SEED)
    return alone.volatility_errors(paths.prices.mean(0))


Step = Callable[[CalibrationGame], None]  # makes one step of a game for all players: a model


@torch.no_grad()
def play(game: CalibrationGame, step: Step, seed: int) -> None:
    """Plays a game once. The same seed has the same Brownian increments, whoever steps."""
    game.reset(torch.Generator(game.device).manual_seed(seed))
    for _ in range(game.num_steps):
        step(game)


class Paths(NamedTuple):
    """What is needed of fresh paths, by chunks of as many as the game has players."""

    prices: Tensor  # (chunks, days, strikes)
    log_spot_t1: Tensor  # (chunks, n)
    log_spot_t2: Tensor


def sample(game: CalibrationGame, step: Step, num_paths: int, seed: int) -> Paths:
    """Plays a model on `num_paths` fresh paths, `num_players` at a time."""
    chunks = []
    for chunk in range(max(1, num_paths // game.num_players)):
        play(game, step, seed + chunk)
        chunks.append((game.prices(game.log_spots)[0], game.log_spots[EXERCISE_DAY][0], game.log_spots[-1][0]))
    return Paths(*(torch.stack(column) for column in zip(*chunks, strict=True)))


class Bermudan(NamedTuple):
    """Values of a Bermudan in a model, in S₀; the switch values in vol points of the option (t2, k2)."""

    price: float  # out of sample: a lower bound
    price_in_sample: float  # biased upwards
    floor: float  # the dearer of the two Europeans: no Bermudan is worth less
    switch_value: float
    switch_value_in_sample: float
    without: Tensor  # (chunks,) switch values without each of the chunks of paths, for the jackknife


def bermudan(game: CalibrationGame, paths: Paths) -> Bermudan:
    """Price of the Bermudan, its exercise found on one half of the chunks and priced on the other, and the reverse."""
    at_t1, at_t2 = paths.log_spot_t1, paths.log_spot_t2
    exercise = (at_t1.double().exp() - game.strike_t1).clamp(min=0)
    continuation = (at_t2.double().exp() - game.strike_t2).clamp(min=0)
    half = len(at_t1) // 2
    paid, in_sample = torch.empty_like(exercise), torch.empty_like(exercise)
    for of_rule, of_price in ((slice(half), slice(half, None)), (slice(half, None), slice(half))):
        knots = knots_of(at_t1[of_rule], NUM_KNOTS)
        basis = hats(at_t1[of_rule].flatten(), knots)
        coefficient = torch.linalg.lstsq(basis.T @ basis, basis.T @ continuation[of_rule].flatten()).solution
        in_sample[of_rule] = torch.maximum(exercise[of_rule], (basis @ coefficient).view_as(exercise[of_rule]))
        rule = hats(at_t1[of_price], knots) @ coefficient
        paid[of_price] = torch.where(exercise[of_price] >= rule, exercise[of_price], continuation[of_price])
    chunks = torch.stack([x.mean(-1) for x in (paid, in_sample, exercise, continuation)])  # (4, chunks)

    def switch_values(prices: Tensor) -> Tensor:
        """Prices (4, …) of the above → (2, …), out of sample and in it."""
        worth = torch.cat((prices[:2], prices[2:].amax(0, keepdim=True)))
        arguments = (torch.ones_like(worth), game.strike_t2, game.num_steps * DT)
        volatility = black_scholes.implied_volatility(worth, *arguments) / VOL_POINT
        return volatility[:2] - volatility[2]

    mean = chunks.mean(-1)
    without = (chunks.sum(-1, keepdim=True) - chunks) / (chunks.shape[1] - 1)
    price, price_in_sample, *europeans = mean.tolist()
    return Bermudan(
        price, price_in_sample, max(europeans), *switch_values(mean).tolist(), switch_values(without)[0].cpu()
    )


class Validation:
    """What the learning curve is drawn from: a model on fixed paths, apart from those of training and benchmark.

    Calling it with a `Step` gives the calibration error of days 21 and later; in the Bermudan task the price too.
    """

    def __init__(self, game: CalibrationGame):
        self.game = game.like(num_runs=1, num_players=VALIDATION_PATHS // 2, common=True)

    def __call__(self, step: Step) -> dict[str, float]:
        metrics = {}
        if self.game.task == "bermudan":
            value = bermudan(self.game, sample(self.game, step, VALIDATION_PATHS, VALIDATION_SEED))
            metrics["charts/bermudan_price"], metrics["charts/european_floor"] = value.price, value.floor
            metrics["charts/switch_value"] = value.switch_value
        play(self.game, step, VALIDATION_SEED)
        errors = judged(self.game.errors()[0])
        metrics["charts/rmse"] = float(errors.square().mean().sqrt())
        if self.game.task == "local-vol":
            metrics["charts/max_error"] = float(errors.abs().max())
        return metrics

    def describe(self, metrics: dict[str, float]) -> str:
        """The figure that matters, for a progress bar."""
        error = f"RMSE {metrics['charts/rmse']:.3f} vol points"
        if self.game.task == "local-vol":
            return f"{error}, at most {metrics['charts/max_error']:.2f}"
        return f"switch value {metrics['charts/switch_value']:.2f}, {error}"


AGENT, DUPIRE, CONSTANT = "agent", "Dupire local volatility", "constant volatility"
CALIBRATION_COLUMNS = {
    "rmse": "RMSE",
    "worst": "max",
    "bias": "mean",
    "rmse_early": f"RMSE, days {FIRST_DAY} to {FIRST_JUDGED - 1}",
}
BERMUDAN_COLUMNS = {
    "price": "Bermudan (bp)",
    "floor": "European floor (bp)",
    "switch_value": "switch value",
    "switch_value_in_sample": "in sample",
    "rmse": "vanilla RMSE",
    "worst": "max",
}
MAX_RMSE, MAX_ERROR, MAX_VANILLA_RMSE = 0.12, 0.4, 0.13  # vol points
MIN_PATHS, NUM_CHUNKS = 1_000_000, 12


class Calibration(NamedTuple):
    """A model's prices on fresh paths: errors (days, strikes) in vol points, and those without each of the chunks."""

    errors: Tensor
    without: Tensor  # (chunks, days, strikes), for the jackknife


def benchmark_paths(game: CalibrationGame, step: Step, num_paths: int) -> Paths:
    """The benchmark's paths under a model: the same Brownian increments for all."""
    alone = game.like(num_players=num_paths // NUM_CHUNKS, num_runs=1, reference="none", common=True)
    return sample(alone, step, alone.num_players * NUM_CHUNKS, BENCHMARK_SEED)


def calibrate(game: CalibrationGame, paths: Paths) -> Calibration:
    """Errors of a model's prices on its paths."""
    chunks, total = len(paths.prices), paths.prices.sum(0)
    without = game.volatility_errors((total - paths.prices) / (chunks - 1))
    return Calibration(game.volatility_errors(total / chunks).cpu(), without.cpu())


def rmse(errors: Tensor) -> Tensor:
    """Of the maturities that are judged; (…, days, strikes) → (…)."""
    return judged(errors).square().mean((-1, -2)).sqrt()


def jackknife(value: Tensor, without: Tensor) -> Estimate:
    """A statistic with a 95 % interval, from its values without each of the chunks (Efron & Stein 1981)."""
    chunks = len(without)
    se = float(((chunks - 1) / chunks * (without - without.mean()).square().sum()).sqrt())
    return Estimate(float(value), se, float(value) - Z95 * se, float(value) + Z95 * se)


def _row(errors: Tensor) -> dict[str, float]:
    early, late = errors[: FIRST_JUDGED - FIRST_DAY], judged(errors)
    return {
        "rmse": float(rmse(errors)),
        "worst": float(late.abs().max()),
        "bias": float(late.mean()),
        "rmse_early": float(early.square().mean().sqrt()),
    }


def judge_smile(title: str, settings: dict, played: dict[str, Calibration]) -> Benchmark:
    """The verdict on a calibration: within `MAX_RMSE` and `MAX_ERROR`, and better than constant volatility.

    Args:
        played: by contestant, AGENT, DUPIRE and CONSTANT.
    """
    rows = {name: _row(of.errors) for name, of in played.items()}
    mine = played[AGENT]
    advantages = {
        name: jackknife(rmse(of.errors) - rmse(mine.errors), rmse(of.without) - rmse(mine.without))
        for name, of in played.items()
        if name != AGENT
    }
    result = Benchmark(
        title, settings, rows, advantages, columns=CALIBRATION_COLUMNS, advantage_title="its RMSE − agent's [95 %]"
    )
    ours = rows[AGENT]
    result.require_advantage(CONSTANT)
    result.require(f"RMSE at most {MAX_RMSE}", ours["rmse"] <= MAX_RMSE, f"{ours['rmse']:.4f} vol points")
    result.require(f"no error above {MAX_ERROR}", ours["worst"] <= MAX_ERROR, f"{ours['worst']:.3f} vol points")
    result.require(f"has {MIN_PATHS:,} paths or more", settings["paths"] >= MIN_PATHS, f"{settings['paths']:,}")
    return result


class Dependence(NamedTuple):
    """What a policy of the Bermudan task has learnt: ln m by player and step after t1, and what it depends on.

    Attributes:
        log_spot_t1, log_spot, log_multiplier, volatility: (steps, n) ln S_t1, ln S_t, ln m_t and the localised σ_t.
        slopes: of ln m on ln S_t1 and on ln S_t, by least squares, per standard deviation of each.
        kink: S_t1 at which the mean localised volatility, as two lines in ln S_t1, bends; in the middle 80 % of paths.
    """

    log_spot_t1: Tensor
    log_spot: Tensor
    log_multiplier: Tensor
    volatility: Tensor
    slopes: tuple[float, float]
    kink: float


@torch.no_grad()
def learnt_dependence(game: CalibrationGame, step: Step) -> Dependence:
    """Plays a policy once, on other paths than it was trained on, and looks at what it does."""
    alone = game.like(num_players=VALIDATION_PATHS, num_runs=1, reference="none", common=True)
    alone.reset(torch.Generator(alone.device).manual_seed(BENCHMARK_SEED))
    columns = []
    for t in range(alone.num_steps):
        before = alone.state
        step(alone)
        if t > EXERCISE_DAY:
            chosen = alone.state.log_volatility if alone.action_map != "stochastic" else before.log_volatility
            rows = (before.log_spot_t1, before.log_spot, chosen, alone.log_volatilities[-1].exp())
            columns.append([x[0].cpu() for x in rows])
    at_t1, now, multiplier, volatility = (torch.stack(x) for x in zip(*columns, strict=True))
    x = torch.stack([(y - y.mean()) / y.std() for y in (at_t1.flatten(), now.flatten())], -1).double()
    y = (multiplier - multiplier.mean()).flatten().double()
    slopes = torch.linalg.solve(x.T @ x, x.T @ y)
    # Two lines that meet: the knot with the least squares
    u, mean = at_t1[0].double(), volatility.double().mean(0)
    low, high = torch.quantile(u, torch.tensor([0.1, 0.9], dtype=u.dtype))
    u, mean = (x[(u >= low) & (u <= high)] for x in (u, mean))
    errors = []
    knots = torch.quantile(u, torch.linspace(0.1, 0.9, 81, dtype=u.dtype))
    for knot in knots:
        basis = torch.stack((torch.ones_like(u), u, (u - knot).clamp(min=0)), -1)
        fit = basis @ torch.linalg.solve(basis.T @ basis, basis.T @ mean)
        errors.append((mean - fit).square().mean())
    kink = float(knots[torch.stack(errors).argmin()].exp())
    return Dependence(at_t1, now, multiplier, volatility, tuple(slopes.tolist()), kink)


def judge_bermudan(
    title: str, settings: dict, game: CalibrationGame, played: dict[str, Paths], learnt: Dependence
) -> Benchmark:
    """The verdict on a Bermudan's model: the vanillas stay on the market, and the price is not below the floor.

    With a path-dependent state the switch value must be at most 30 % of plain local volatility's, the larger (in
    sample) estimate of ours against the smaller one of theirs, and volatility rise with S_t1 and fall with S_t. With
    the state (t, S) it must be local volatility's, which localisation makes it. In between, σ_{t−1} can carry memory of
    the way to it, or not: what was learnt is said, and no criterion.

    Args:
        played: `benchmark_paths` of AGENT and DUPIRE.
    """
    rows, values = {}, {}
    for name, of in played.items():
        values[name] = value = bermudan(game, of)
        prices = {"price": 1e4 * value.price, "floor": 1e4 * value.floor}
        switch = {key: getattr(value, key) for key in ("switch_value", "switch_value_in_sample")}
        rows[name] = prices | switch | _row(calibrate(game, of).errors)
    mine, other = values[AGENT], values[DUPIRE]
    saved = jackknife(other.switch_value - mine.switch_value, other.without - mine.without)
    columns = {"columns": BERMUDAN_COLUMNS, "advantage_title": "its switch value − agent's [95 %]"}
    result = Benchmark(title, settings, rows, {DUPIRE: saved}, **columns)
    share = jackknife(mine.switch_value / other.switch_value, mine.without / other.without)
    result.shares["switch value, of local volatility's"] = share
    ours, theirs = rows[AGENT], rows[DUPIRE]
    on_t1, on_now = learnt.slopes
    if game.state_kind == "path-dependent":
        upper = max(share.high, ours["switch_value_in_sample"] / theirs["switch_value"])
        result.require("switch value at most 30 % of local volatility's", upper <= 0.3, f"at most {100 * upper:.1f} %")
        result.require("learnt volatility rises with S_t1", on_t1 > 0, f"ln m {on_t1:+.3f} per standard deviation")
        result.require("learnt volatility falls with S_t", on_now < 0, f"ln m {on_now:+.3f} per standard deviation")
    elif game.is_local:
        apart = ours["switch_value"] - theirs["switch_value"]
        result.require("switch value is local volatility's, within 0.05", abs(apart) <= 0.05, f"{apart:+.3f}")
    settings["ln m per standard deviation of ln S_t1 and of ln S_t"] = f"{on_t1:+.3f}, {on_now:+.3f}"
    ok = ours["rmse"] <= MAX_VANILLA_RMSE
    result.require(f"vanilla RMSE at most {MAX_VANILLA_RMSE}", ok, f"{ours['rmse']:.4f} vol points")
    above = ours["price"] - ours["floor"]
    result.require("not below the European floor", above >= 0, f"{above:+.3f} bp")
    result.require(f"has {MIN_PATHS:,} paths or more", settings["paths"] >= MIN_PATHS, f"{settings['paths']:,}")
    return result


def judged(errors: Tensor) -> Tensor:
    """Errors (…, days, strikes) of the maturities that the benchmark looks at."""
    return errors[..., FIRST_JUDGED - FIRST_DAY :, :]
