"""CalibrationGame: n trajectories of one asset are players, who choose their volatilities and share a pricing error.

Player i's action at time t is the volatility of its own trajectory over [t, t + δ]. The payoffs of all players together
give the Monte Carlo prices, and the distance of these prices from the market's smile is the reward of all players
(Vadori, *Calibration of Derivative Pricing Models: a Multi-Agent Reinforcement Learning Perspective*; equation numbers
are the paper's). The simulation stores no computational graph, so its memory does not grow with the training.

    ln S_{t+1} = ln S_t − ½ σ_t² δ + σ_t √δ Z_t                                                             (5)

There are three tasks. `local-vol` fits the implied volatilities of all strikes and maturities. `exotic` moves the price
of an exotic while the vanillas keep their market prices; by default it is the Bermudan
max{(S_{t1} − k1)⁺, E_{t1}[(S_{t2} − k2)⁺]}. `slv`, stochastic local volatility, fits forward-start options
(S_T/S_s − k)⁺, the vanillas kept as well. Localisation keeps them: σ = σ_loc(t, S) m/√E[m²|S], where the players choose
m (Gyöngy 1986; Guyon & Henry-Labordère 2012).

Shapes: R runs side by side of n players each, (R, n). Under common random numbers all runs have the same Brownian
increments and differ only by their players' actions. S₀ = 1, zero rates. A time step is a trading day, δ = 1/252 years,
or a whole fraction of one; options start and expire at the end of a day.
"""

import copy
import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple

import torch

from envs.calibration.payoffs import DT, make_payoff
from envs.calibration.regression import REGRESSIONS
from envs.market import black_scholes
from envs.market.smiles import CALIBRATED, Surface
from envs.market.units import VOL_POINT
from envs.run.seeds import REFERENCE_SEED

Tensor = torch.Tensor
TASKS = ("local-vol", "exotic", "slv")
STATES = ("local", "non-path-dependent", "path-dependent")
ACTION_MAPS = {"direct": 1, "normal": 2, "stochastic": 3}  # name → size of an action
REFERENCES = ("local-vol", "black-scholes", "none")

FIRST_DAY = 5  # first maturity; a lognormal step has no skew, so the first days cannot be fitted
FIRST_JUDGED = 21  # first maturity of the benchmark; the last one is the last day
STRIKES = torch.linspace(*CALIBRATED, 11, dtype=torch.float64)  # in standard deviations √w(0, t) from the money
FIRST_DATE = 21  # t1 unless another is given: of the exotic, and what a path-dependent state remembers
NODES = 161  # number of nodes of a grid of log-spots
WIDTH = 8.0  # half-width of a grid in standard deviations
REFERENCE_PATHS = 2**21  # paths that measure the errors of daily local volatility
VALIDATION_PATHS = 2**16
MAX_LOG_MULTIPLIER = {"exotic": 1.0, "slv": 3.0}  # task → bound of |ln m|
FORWARD_TENOR = 20  # trading days from start to expiry of the forward-start options
FORWARD_STRIKES = torch.linspace(-1.5, 1.5, 7, dtype=torch.float64)  # in standard deviations from the money


class State(NamedTuple):
    """State of the players, (R, n) each: ln S and ln(σ/`reference_volatility`) of the last step, now and at t1.

    Where m is localised, in the tasks exotic and slv, ln m of the last step takes the place of the volatility.
    """

    log_spot: Tensor
    log_volatility: Tensor
    log_spot_t1: Tensor
    log_volatility_t1: Tensor


class Grid:
    """Nodes on which functions of time and log-spot are tabulated, uniform in standard deviations.

    Attributes:
        scale: (num_steps,) standard deviation √w(0, t) of the log-spot. Row t has that of step t + 1, as at first all
            players are at S₀.
        log_spot: (num_steps, NODES) nodes, symmetric around 0.
    """

    def __init__(self, surface: Surface, num_steps: int, dt: float, device: torch.device | str = "cpu"):
        t = torch.arange(1, num_steps + 1, dtype=torch.float64) * dt
        self.scale = surface(0.0, t).w.sqrt().to(device, torch.float32)
        self.log_spot = self.scale[:, None] * torch.linspace(-WIDTH, WIDTH, NODES, device=device)

    def to(self, device: torch.device) -> "Grid":
        """The same grid on another device."""
        grid = copy.copy(self)
        grid.scale = self.scale.to(device)
        grid.log_spot = self.log_spot.to(device)
        return grid

    def _place(self, t: int, log_spot: Tensor, nodes: int) -> tuple[Tensor, Tensor]:
        """Index of the node below each log-spot (R, n), of 0 … nodes − 2, and the distance to it in nodes."""
        half = 0.5 * (nodes - 1)
        # NaN becomes an index too, so that the run stops where it checks its losses and not here
        u = (log_spot * (half / WIDTH / self.scale[t]) + half).nan_to_num_(0.0).clamp_(0, nodes - 1.001)
        node = u.long()
        return node, u.sub_(node)

    def lookup(self, table: Tensor, t: int, log_spot: Tensor) -> Tensor:
        """A table (R or 1, nodes) of time t at log-spots (R, n): linear between the nodes, constant outside."""
        node, weight = self._place(t, log_spot, table.shape[-1])
        if len(table) > 1:
            node = node + table.shape[-1] * torch.arange(len(table), device=node.device)[:, None]
        values = table.reshape(-1)
        return torch.lerp(values[node], values[node + 1], weight)

    def conditional_mean(self, values: Tensor, t: int, log_spot: Tensor, empty: float = 1.0) -> Tensor:
        """E[values | log-spot] from the players (R, n) at the nodes (R, NODES), by the particle method.

        Guyon & Henry-Labordère (2012) with hat kernels: a player counts at the two nodes around it, linearly in its
        distance to them. The mean is `empty` at a node without players.
        """
        node, weight = self._place(t, log_spot, NODES)
        node = node + NODES * torch.arange(len(values), device=node.device)[:, None]
        total = torch.zeros(len(values) * NODES, device=node.device)
        count = torch.zeros_like(total)
        for index, share in ((node, 1.0 - weight), (node + 1, weight)):
            total.scatter_add_(0, index.flatten(), (share * values).flatten())
            count.scatter_add_(0, index.flatten(), share.flatten())
        return torch.where(count > 0, total / count.clamp(min=1e-9), empty).view(len(values), NODES)


class CalibrationGame:
    """The simulation of the players, their observations, and the errors and rewards that their prices give.

    Args:
        surface: the market's smile.
        num_players, num_runs: n and R.
        num_steps: T, to the last maturity: a trading day for every `steps_per_day` of them.
        task, state, action_map: one each of `TASKS`, `STATES` and `ACTION_MAPS`.
        common: all runs have the same Brownian increments.
        reference: one of `REFERENCES`, a control variate. This model is simulated on the same increments; its expected
            errors are known, so its sampling error can be subtracted. "none" for no correction.
        vega_weights: weight errors of implied volatility by vega instead of equally.
        payoff, days, strikes: see `make_payoff`; days are (`FIRST_DATE`, the last) where None. The first day is t1.
        act_before_t1: the players choose m from the first day on, not from t1 on only.
        regression: one of `REGRESSIONS`, for the exotic's continuation value in the rewards.

    Actions are (R, n, size). Zero means the reference volatility (at the money, last maturity), or m = 1. Their maps:

    - direct, size 1: ln σ_t = a.
    - normal, size 2: ln σ_t ~ N(a₀, (e^{a₁}/10)²), the paper's mean and variance of ln σ_t.
    - stochastic, size 3: ln σ_{t+1} = ln σ_t + μδ + ηρ√δ Z_t + η√(1−ρ²)√δ Z⊥_t (9), with μ = 3a₀, η = 2e^{a₁} and
      ρ = tanh a₂, annualised; σ starts at the local volatility.

    In the tasks exotic and slv the same maps give ln m, within ±`MAX_LOG_MULTIPLIER` (by tanh; the stochastic map is
    clamped). In the exotic task, unless `act_before_t1`, the model is plain local volatility before t1. Then the
    continuation value at t1 depends on S_{t1} alone, else on the last m too.

    Attributes:
        num_days, dt: trading days to the last maturity, and years of a step.
        t1: step at which the exotic's first day ends.
        days, maturity: (days,) trading days and (days, 1) years of the maturities.
        strike, is_call, market_volatility, vega, weights: (days, strikes) of the options, all out of the money; vega in
            the currency of S₀ per vol point, weights of mean 1 over the strikes.
        options: [(day, [(strike, is_call), …]), …], the same options as numbers on the host.
        forward_days: [(start, expiry), …] of the forward-start options, in the task slv alone, as are
        forward_strike, forward_is_call, forward_volatility: (starts, strikes) of them, likewise out of the money;
        forward_options: [(start, expiry, [(strike, is_call), …]), …], the same as numbers on the host.
        local_volatility: (num_steps, NODES) Dupire's σ of every step on the grid.
        leverage: (num_steps, NODES) of √E[m²|S], where it is known; None to estimate it from the players.
        reference_volatility: the market's, at the money at the last maturity.
        constant_volatility: the one whose errors on the judged maturities have the least mean square.

    Raises:
        ValueError: an unknown name, more days than the smile has, or no forward-start options in it for slv.
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
        payoff: str = "bermudan-call",
        days: Sequence[int] | None = None,
        strikes: Sequence[float] | None = None,
        act_before_t1: bool = False,
        regression: str = "knots",
        steps_per_day: int = 1,
        device: torch.device | str = "cpu",
    ):
        self.settings = {name: value for name, value in locals().items() if name != "self"}
        for name, allowed in (
            ("task", TASKS),
            ("state", STATES),
            ("action_map", ACTION_MAPS),
            ("reference", REFERENCES),
            ("regression", REGRESSIONS),
        ):
            if self.settings[name] not in allowed:
                raise ValueError(f"{name} is {self.settings[name]!r} (one of {', '.join(allowed)})")
        last = last_day(surface)
        num_days = num_steps // steps_per_day
        if not FIRST_JUDGED < num_days <= last:
            allowed = f"at least {FIRST_JUDGED + 1}, at most {last}, the last maturity"
            raise ValueError(f"num_steps is {num_days} ({allowed})")
        self.surface = surface
        self.num_players = num_players
        self.num_runs = num_runs
        self.num_steps = num_steps
        self.num_days = num_days
        self.steps_per_day = steps_per_day
        self.dt = DT / steps_per_day
        self.task = task
        self.state_kind = state
        self.action_map = action_map
        self.action_size = ACTION_MAPS[action_map]
        self.observation_size = {"local": 2, "non-path-dependent": 3, "path-dependent": 5}[state]
        self.payoff = make_payoff(payoff, surface, days or (FIRST_DATE, num_days), strikes)
        if self.payoff.days[-1] != num_days:
            raise ValueError(f"days ends with {self.payoff.days[-1]} (num_steps, {num_days})")
        self.t1 = self.payoff.days[0] * steps_per_day
        self.first_move = 0 if task != "exotic" or act_before_t1 else self.t1  # step of the first actions
        self.common = common
        self.reference = reference
        self.regression = regression
        self.device = torch.device(device)
        self._tabulate_local_volatility()
        self._choose_options(vega_weights)
        if task == "slv":
            self._choose_forward_starts()

    def _tabulate_local_volatility(self) -> None:
        """Local volatility of each step: Dupire's at its start.

        On a daily grid this is more accurate than Dupire's in the middle of the step (0.090 to 0.096 vol points).
        """
        self.grid = Grid(self.surface, self.num_steps, self.dt, self.device)
        self.reference_volatility = float(self.surface.implied_volatility(0.0, self.num_days * DT))
        times = (torch.arange(self.num_steps, dtype=torch.float64) * self.dt).clamp(min=1e-6)
        nodes = self.grid.log_spot.double().cpu()
        table = self.surface.local_volatility(nodes, times[:, None]).float()
        self.local_volatility = table.to(self.device)
        self.leverage = None
        self.first_log_volatility = 0.0  # ln σ over the reference volatility before the first step
        if self.action_map == "stochastic" and self.task == "local-vol":
            self.first_log_volatility = math.log(float(table[0, NODES // 2]) / self.reference_volatility)

    def _choose_options(self, vega_weights: bool) -> None:
        """The options whose prices are compared with the market's, and their weights."""
        days = torch.arange(FIRST_DAY, self.num_days + 1)
        maturity = (days * DT)[:, None].double()
        log_strike = STRIKES * self.surface(0.0, maturity).w.sqrt()  # (days, strikes)
        self.days = days
        self.maturity = maturity.to(self.device)
        self.strike = log_strike.exp().to(self.device)
        self.is_call = self.strike >= 1.0
        rows = zip(days.tolist(), self.strike.tolist(), self.is_call.tolist(), strict=True)
        self.options = [(day, list(zip(strikes, calls, strict=True))) for day, strikes, calls in rows]
        self.market_volatility = self.surface.implied_volatility(log_strike, maturity).to(self.device)
        self.constant_volatility = float(judged(self.market_volatility).mean())
        one = torch.ones_like(self.strike)
        vega = VOL_POINT * black_scholes.vega(one, self.strike, self.maturity, self.market_volatility)
        self.vega = vega.clamp(min=1e-7)  # smaller only on a smile with arbitrage
        self.weights = self.vega / self.vega.mean(-1, keepdim=True) if vega_weights else one

    def _choose_forward_starts(self) -> None:
        """The forward-start options that are calibrated to: of three starts, the last one expires at the end."""
        last = self.num_days - FORWARD_TENOR
        starts = sorted({max(1, round(last * i / 3)) for i in (1, 2, 3)})
        self.forward_days = [(start, start + FORWARD_TENOR) for start in starts]
        days = torch.tensor(self.forward_days, dtype=torch.float64) * DT
        start, end = days[:, :1], days[:, 1:]
        at_the_money = self.surface.forward_volatility(0.0, start, end)
        log_strike = FORWARD_STRIKES * at_the_money * math.sqrt(FORWARD_TENOR * DT)
        self.forward_strike = log_strike.exp().to(self.device)
        self.forward_is_call = self.forward_strike >= 1.0
        options = zip(self.forward_days, self.forward_strike.tolist(), self.forward_is_call.tolist(), strict=True)
        self.forward_options = [(*days, list(zip(strikes, calls, strict=True))) for days, strikes, calls in options]
        self.forward_volatility = self.surface.forward_volatility(log_strike, start, end).to(self.device)

    @property
    def localised(self) -> bool:
        """Whether the players choose m, and localisation keeps the vanillas."""
        return self.task != "local-vol"

    @property
    def is_local(self) -> bool:
        """Whether the state is (t, S) alone, so that a policy can be tabulated."""
        return self.state_kind == "local"

    def like(self, **changes) -> "CalibrationGame":
        """The same game with other settings."""
        game = CalibrationGame(**{**self.settings, **changes})
        if not {"surface", "num_steps", "steps_per_day", "reference"} & set(changes):
            game.reference_errors = self.reference_errors  # slow to compute
            if "task" not in changes and self.task == "slv":
                game.reference_forward_errors = self.reference_forward_errors
            if "reference_price" in vars(self):
                game.reference_price = self.reference_price
        return game

    def to(self, device: torch.device) -> "CalibrationGame":
        """The same game on another device, to be started there."""
        game = copy.copy(self)
        game.settings = {**self.settings, "device": device}
        game.device = device
        game.grid = self.grid.to(device)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(game, name, value.to(device))
        return game

    @cached_property
    def reference_errors(self) -> Tensor:
        """Expected errors (days, strikes) of the reference model, vol points; zero without one."""
        return self._errors_of_reference(0, self.volatility_errors, self.market_volatility)

    @cached_property
    def reference_forward_errors(self) -> Tensor:
        """The same (starts, strikes) of the forward-start options."""
        return self._errors_of_reference(1, self.forward_volatility_errors, self.forward_volatility)

    def _errors_of_reference(self, which: int, to_errors: Callable[[Tensor], Tensor], market: Tensor) -> Tensor:
        if self.reference == "local-vol":
            return to_errors(self.dupire_prices[which])
        known = self.constant_volatility if self.reference == "black-scholes" else market
        return (known - market) / VOL_POINT

    @cached_property
    def dupire_prices(self) -> tuple[Tensor, Tensor | None]:
        """Prices of the options and of the forward-start options in daily local volatility, `REFERENCE_PATHS` paths."""
        alone = self.like(num_players=min(REFERENCE_PATHS, 2**17), num_runs=1, reference="none", common=True)
        paths = sample(alone, CalibrationGame.step_dupire, REFERENCE_PATHS, REFERENCE_SEED)
        return paths.prices.mean(0), None if paths.forward_prices is None else paths.forward_prices.mean(0)

    @cached_property
    def node_features(self) -> Tensor:
        """`features` (num_steps, NODES, observation_size) of players at the nodes, for a policy of (t, S) alone."""
        zero = torch.zeros(NODES, device=self.device)
        states = [State(nodes, zero, zero, zero) for nodes in self.grid.log_spot]
        return torch.stack([self.features(t, state) for t, state in enumerate(states)])

    # The simulation

    def reset(self, generator: torch.Generator) -> None:
        """Draws the Brownian increments, in antithetic pairs of players, and puts all players at S₀."""
        half = (self.num_players + 1) // 2
        runs = 1 if self.common else self.num_runs

        def draw() -> Tensor:
            shocks = torch.randn(self.num_steps, runs, half, generator=generator, device=self.device)
            return torch.cat((shocks, -shocks), -1)[..., : self.num_players]

        self.start(draw(), draw() if self.action_map != "direct" else None)

    def start(self, shocks: Tensor, own_shocks: Tensor | None) -> None:
        """Starts on given normals, (T, runs or 1, n) each.

        Args:
            shocks: Z of the spots; n may differ from `num_players`.
            own_shocks: Z⊥ of the stochastic map, or the normals of ln σ_t of the normal map; None for the direct map.
        """
        self.t = 0
        self.shocks = shocks
        self.own_shocks = own_shocks
        zero = torch.zeros(self.num_runs, shocks.shape[-1], device=self.device)
        first = zero + self.first_log_volatility
        self.state = State(zero, first, zero, first)
        self.log_spots = [zero]  # (R, n) at every time
        self.log_volatilities = []  # ln σ (R, n) of every step
        self.remembered = []  # what every step has left as the state's ln σ or ln m, (R, n)
        self.leverages = []  # √E[m²|S] (NODES,) of every step in the last run
        self.reference_log_spots = [torch.zeros_like(shocks[0])] if self.reference != "none" else []

    def features(self, t: int, state: State) -> Tensor:
        """Input (…, observation_size) of the networks, within about ±2: time, ln S in standard deviations, then the
        other components of the state if its kind has them.

        Time is its root, as a diffusion's scale is: local volatility changes fastest on the first days.
        """
        z = 2.0 * state.log_spot / self.grid.scale[t]
        columns = [torch.full_like(z, 4.0 * math.sqrt(t / self.num_steps) - 2.0), z]
        if self.state_kind != "local":
            columns.append(2.0 * state.log_volatility)
        if self.state_kind == "path-dependent":
            columns += [2.0 * state.log_spot_t1 / self.grid.scale[self.t1], 2.0 * state.log_volatility_t1]
        return torch.stack(columns, -1)

    def observe(self) -> Tensor:
        """Features (R, n, observation_size) of the current state."""
        return self.features(self.t, self.state)

    def step(self, actions: Tensor) -> None:
        """Turns the players' actions (R, n, size) into volatilities and moves the spots by a step."""
        t = self.t
        chosen, following = self._map_actions(actions)
        if self.task == "local-vol":
            chosen = chosen.clamp(-3, 3)
            following = following.clamp(-3, 3)
            log_volatility = math.log(self.reference_volatility) + chosen
        elif t < self.first_move:
            following = torch.zeros_like(self.state.log_spot)
            log_volatility = self._local(t, self.state.log_spot).log()
            self.leverages.append(torch.ones_like(self.local_volatility[t]))
        else:
            bound = MAX_LOG_MULTIPLIER[self.task]
            if self.action_map == "stochastic":
                chosen = chosen.clamp(-bound, bound)
                following = following.clamp(-bound, bound)
            else:
                chosen = following = bound * torch.tanh(chosen / bound)
            log_volatility = self._local(t, self.state.log_spot).log() + chosen - self._log_leverage(t, chosen)
        self.move(log_volatility, following)

    def _map_actions(self, actions: Tensor) -> tuple[Tensor, Tensor]:
        """ln σ over the reference volatility, or ln m, of this step and that of the next state, (R, n) each."""
        a = actions.unbind(-1)
        if self.action_map == "direct":
            return a[0], a[0]
        if self.action_map == "normal":
            chosen = a[0] + self.own_std(a[1]) * self.own_shocks[self.t]
            return chosen, chosen
        rho = torch.tanh(a[2])
        eta = 2.0 * a[1].clamp(-10, 2).exp()
        noise = rho * self.shocks[self.t] + (1.0 - rho**2).clamp(min=0).sqrt() * self.own_shocks[self.t]
        chosen = self.state.log_volatility
        return chosen, chosen + 3.0 * a[0] * self.dt + eta * math.sqrt(self.dt) * noise

    @staticmethod
    def own_std(action: Tensor) -> Tensor:
        """Standard deviation of ln σ_t in the normal map."""
        return 0.1 * action.clamp(-10, 3).exp()

    def _local(self, t: int, log_spot: Tensor) -> Tensor:
        return self.grid.lookup(self.local_volatility[t][None], t, log_spot)

    def _log_leverage(self, t: int, chosen: Tensor) -> Tensor:
        """ln √E[m²|S] at the players (R, n): from `leverage` if it is known, else from all players."""
        if self.leverage is not None:
            return self.grid.lookup(self.leverage[t][None], t, self.state.log_spot).log()
        mean = self.grid.conditional_mean((2.0 * chosen).exp(), t, self.state.log_spot)
        self.leverages.append(mean[-1].sqrt())
        return 0.5 * self.grid.lookup(mean, t, self.state.log_spot).log()

    def step_dupire(self) -> None:
        """A step of plain local volatility, without actions."""
        volatility = self._local(self.t, self.state.log_spot)
        self.move(volatility.log(), torch.zeros_like(volatility))

    def step_constant(self) -> None:
        """A step of the best constant volatility, without actions."""
        zero = torch.zeros_like(self.state.log_spot)
        self.move(zero + math.log(self.constant_volatility), zero)

    def move(self, log_volatility: Tensor, following: Tensor) -> None:
        """Moves the spots by a step at these volatilities (R, n), equation (5); `following` becomes the state's."""
        t = self.t
        volatility = log_volatility.exp()
        dt = self.dt
        change = volatility * (math.sqrt(dt) * self.shocks[t]) - (0.5 * dt) * volatility**2
        log_spot = self.state.log_spot + change
        self.t = t + 1
        if self.t <= self.t1:
            self.state = State(log_spot, following, log_spot, following)
        else:
            self.state = State(log_spot, following, self.state.log_spot_t1, self.state.log_volatility_t1)
        self.log_spots.append(log_spot)
        self.log_volatilities.append(log_volatility)
        self.remembered.append(following)
        if self.reference != "none":
            x = self.reference_log_spots[-1]
            sigma = self._local(t, x) if self.reference == "local-vol" else self.constant_volatility
            self.reference_log_spots.append(x + sigma * (math.sqrt(dt) * self.shocks[t]) - (0.5 * dt) * sigma**2)

    # Prices and errors

    def prices(self, log_spots: list[Tensor]) -> Tensor:
        """Monte Carlo prices (R, days, strikes) of the out-of-the-money options, float64."""
        columns = []
        for day, options in self.options:
            spot = log_spots[day * self.steps_per_day].exp()
            payoffs = (((spot - k) if call else (k - spot)).clamp_(min=0).mean(-1) for k, call in options)
            columns.append(torch.stack(list(payoffs), -1))
        return torch.stack(columns, 1).double()

    def volatility_errors(self, prices: Tensor) -> Tensor:
        """Prices (…, days, strikes) → implied volatility minus the market's, in vol points.

        A price of 0, which an option has when no path ends in the money, has volatility 0.
        """
        return _volatility_errors(prices, self.strike, self.maturity, self.is_call, self.market_volatility)

    def errors(self) -> Tensor:
        """Calibration errors (R, days, strikes) of the simulated paths, vol points, with the control variate.

        The reference model has, on the same increments, its expected error plus a sampling error. The players' prices
        share most of this sampling error, so it is subtracted.
        """
        errors = self.volatility_errors(self.prices(self.log_spots))
        if self.reference == "none":
            return errors
        sampled = self.volatility_errors(self.prices(self.reference_log_spots))
        return errors - (sampled - self.reference_errors)

    def forward_prices(self, log_spots: list[Tensor]) -> Tensor:
        """Monte Carlo prices (R, starts, strikes) of the out-of-the-money forward-start options, float64."""
        rows = []
        for start, end, options in self.forward_options:
            ratio = (log_spots[end * self.steps_per_day] - log_spots[start * self.steps_per_day]).exp()
            payoffs = (((ratio - k) if call else (k - ratio)).clamp_(min=0).mean(-1) for k, call in options)
            rows.append(torch.stack(list(payoffs), -1))
        return torch.stack(rows, 1).double()

    def forward_volatility_errors(self, prices: Tensor) -> Tensor:
        """`volatility_errors` of the forward-start options, (…, starts, strikes)."""
        strike = self.forward_strike
        tenor = torch.full_like(strike, FORWARD_TENOR * DT)
        return _volatility_errors(prices, strike, tenor, self.forward_is_call, self.forward_volatility)

    def forward_errors(self) -> Tensor:
        """`errors` of the forward-start options, (R, starts, strikes)."""
        errors = self.forward_volatility_errors(self.forward_prices(self.log_spots))
        if self.reference == "none":
            return errors
        sampled = self.forward_volatility_errors(self.forward_prices(self.reference_log_spots))
        return errors - (sampled - self.reference_forward_errors)

    # Rewards. They telescope (8), so a reward-to-go contains nothing that was settled before.

    def settled(self, rewards: Tensor) -> Tensor:
        """Rewards of every day (num_days, …) → of every step (T, …): a day's is that of its last step."""
        steps = torch.zeros(self.num_steps, *rewards.shape[1:], dtype=rewards.dtype, device=rewards.device)
        steps[self.steps_per_day - 1 :: self.steps_per_day] = rewards
        return steps

    def shared_rewards(self, errors: Tensor) -> Tensor:
        """The reward (R, T) that all players of a run share, vol points²: at every step minus the weighted mean square
        error of the options that expire at its end, equation (6).

        Args:
            errors: (R, days, strikes) of the vanillas; in the task slv (R, starts, strikes) of the forward starts.
        """
        rewards = torch.zeros(self.num_days, len(errors), device=errors.device)
        if self.task == "slv":
            for (_, end), squares in zip(self.forward_days, errors.square().mean(-1).T, strict=True):
                rewards[end - 1] = -squares
        else:
            rewards[FIRST_DAY - 1 :] = -(self.weights * errors.square()).mean(-1).T.float()
        return self.settled(rewards).T

    def difference_rewards(self, errors: Tensor, log_spots: Tensor) -> Tensor:
        """First-order effect of each path on the shared reward: −Σ_m 2ω_m/M (IV_m − c_m)/vega_m · payoff_m(S).

        A path's payoff is 1/n of a price, so this is n times the change of the shared reward that the payoff makes. The
        vega is the market's, so the approximation holds near the market's prices.

        Args:
            errors: (days, strikes), vol points.
            log_spots: (T + 1, …) of the paths at every time.

        Returns:
            (T, …) rewards of every step, vol points².
        """
        coefficient = (-2.0 * self.weights * errors / self.strike.shape[1] / self.vega).to(log_spots)
        spot = log_spots[FIRST_DAY * self.steps_per_day :: self.steps_per_day].exp()
        shape = (-1,) + (1,) * (spot.dim() - 1)
        paid = torch.zeros_like(spot)
        for j in range(self.strike.shape[1]):
            strike = self.strike[:, j].to(spot).view(shape)
            sign = (2.0 * self.is_call[:, j].to(spot) - 1.0).view(shape)
            paid += coefficient[:, j].view(shape) * (sign * (spot - strike)).clamp_(min=0)
        return self.settled(torch.cat((torch.zeros_like(log_spots[1:FIRST_DAY]), paid)))

    # The exotic

    @cached_property
    def exotic_unit(self) -> float:
        """Price of a vol point of the at-the-money option of the last maturity, in which errors of the exotic are."""
        one = torch.ones(())
        return VOL_POINT * float(black_scholes.vega(one, one, self.num_days * DT, self.reference_volatility * one))

    @cached_property
    def reference_price(self) -> float:
        """The exotic's price in daily local volatility, from `REFERENCE_PATHS` paths, units of S₀."""
        alone = self.like(num_players=min(REFERENCE_PATHS, 2**17), num_runs=1, reference="none", common=True)
        prices = []
        for chunk in range(REFERENCE_PATHS // alone.num_players):
            play(alone, CalibrationGame.step_dupire, REFERENCE_SEED + chunk)
            prices.append(float(alone.exotic_paid().double().mean()))
        return sum(prices) / len(prices)

    def exotic_sampling_error(self) -> float | Tensor:
        """By how much these increments make the exotic too dear in local volatility, if that is the reference model.

        A control variate as in `errors`.
        """
        if self.reference != "local-vol":
            return 0.0
        local = copy.copy(self)
        local.state_kind = "local"
        local.log_spots = self.reference_log_spots
        return local.exotic_paid().mean() - self.reference_price

    def exercises(self, t: int) -> list[Tensor]:
        """What exercise pays (R, n) on each exercise day, on the paths stopped at the end of day t (see `Payoff`)."""
        path = self.log_spots[:: self.steps_per_day]
        return [self.payoff.exercise(day, path, t) for day in self.payoff.exercise_days]

    def regressors(self) -> list[list[Tensor]]:
        """What the continuation value on each exercise day but the last depends on, (R, n) each; ln S first.

        The last multiplier counts too, and after t1 the spot at t1, where the state has them. (1, n) where all runs are
        still the same: under common random numbers before the first action.
        """
        rows = []
        for day in self.payoff.exercise_days[:-1]:
            t = day * self.steps_per_day
            row = [self.log_spots[t]]
            if t > self.t1 and self.state_kind == "path-dependent":
                row.append(self.log_spots[self.t1])
            elif t > self.first_move and self.state_kind != "local":
                row.append(self.remembered[t - 1])
            same = self.common and t <= self.first_move
            rows.append([x[: 1 if same else None] for x in row])
        return rows

    def exotic_cashflows(self) -> Tensor:
        """The fake cashflow X̃_t of every day (num_days + 1, R, n), equation (8), with the holder's best exercise.

        At the end it is the true one.
        Expectations are regressions within the sample (Longstaff & Schwartz 2001). On an exercise day the cashflow is
        the greater of exercise and expectation, X̃_t = max{(S_t1 − k1)⁺, E_t1[(S_t − k̃_t)⁺]} for the Bermudan.
        """
        regressions = [REGRESSIONS[self.regression](*row) for row in self.regressors()]
        cashflows = []
        for t in range(self.num_days + 1):
            *exercises, worth = self.exercises(t)
            for k in reversed(range(len(exercises))):
                # Until the exercise day nothing is known of what comes after it
                known = t > self.payoff.exercise_days[k]
                worth = torch.maximum(exercises[k], regressions[k](worth)) if known else exercises[k]
            cashflows.append(worth)
        return torch.stack(cashflows)

    def exotic_paid(self) -> Tensor:
        """Cashflow (R, n) of each path, exercised by the regression; its mean is the price."""
        *exercises, paid = self.exercises(self.num_days)
        regressors = self.regressors()
        for k in reversed(range(len(exercises))):
            continuation = REGRESSIONS[self.regression](*regressors[k])(paid)
            paid = torch.where(exercises[k] >= continuation, exercises[k], paid)
        return paid

    def leverage_effects(self, paid: Tensor) -> Tensor:
        """First-order effect (T, R, n) of each player's multiplier at each step on what all others are paid.

        A player's m also moves E[m²|S], and with it the volatility of everybody at its spot. By this alone it changes
        the sum of `paid` (R, n) by −½ (m²/E[m²|S] − 1) D(S), where D(S) = E[∂paid/∂ln σ_t | S_t = S]. The derivative is
        taken of the lognormal density, ∂paid/∂ln σ_t = paid · (Z² − 1 − σ√δ Z) in expectation (Broadie & Glasserman
        1996), so it contains what the paths do later. At every spot the effects add up to nothing. Z must not depend on
        the other noise of the step, as it does in the stochastic map.
        """
        effects = [torch.zeros_like(paid)] * self.num_steps
        for t in range(self.first_move, self.num_steps):
            log_spot = self.log_spots[t]
            surprise = paid - self.grid.lookup(self.grid.conditional_mean(paid, t, log_spot), t, log_spot)
            z = self.shocks[t]
            score = z**2 - 1.0 - math.sqrt(self.dt) * self.log_volatilities[t].exp() * z
            derivative = self.grid.lookup(self.grid.conditional_mean(surprise * score, t, log_spot), t, log_spot)
            # m²/E[m²|S] = σ²/σ_loc²
            excess = (2.0 * self.log_volatilities[t]).exp() / self._local(t, log_spot) ** 2 - 1.0
            effects[t] = -0.5 * excess * derivative
        return torch.stack(effects)


def _volatility_errors(prices: Tensor, strike: Tensor, maturity: Tensor, is_call: Tensor, market: Tensor) -> Tensor:
    """Implied volatilities of prices (…, rows, strikes) on a spot of 1, minus the market's, in vol points."""
    arguments = (prices, torch.ones_like(strike), strike, maturity, is_call)
    return (black_scholes.implied_volatility(*arguments, iterations=14) - market) / VOL_POINT


def last_day(surface: Surface) -> int:
    """The last whole trading day of a surface; 51, the paper's, for one that does not end."""
    return int(surface.last_maturity / DT + 1e-6) if surface.last_maturity < math.inf else 51


Step = Callable[[CalibrationGame], None]  # a model: it makes one step of a game for all players


@torch.no_grad()
def play(game: CalibrationGame, step: Step, seed: int) -> None:
    """Plays a game once. The Brownian increments depend on the seed, not on the model."""
    game.reset(torch.Generator(game.device).manual_seed(seed))
    for _ in range(game.num_steps):
        step(game)


class Paths(NamedTuple):
    """Prices of the vanillas and the exotic's dates on fresh paths, in chunks of n = `num_players`."""

    prices: Tensor  # (chunks, days, strikes)
    forward_prices: Tensor | None  # (chunks, starts, strikes), in the task slv
    exercises: list[Tensor]  # (chunks, n) what exercise pays, for each exercise day
    regressors: list[list[Tensor]]  # (chunks, n) each, for each exercise day but the last, see `regressors`


def sample(game: CalibrationGame, step: Step, num_paths: int, seed: int) -> Paths:
    """Plays a model on `num_paths` fresh paths, `num_players` at a time."""
    prices, forward, exercises, regressors = [], [], [], []
    for chunk in range(max(1, num_paths // game.num_players)):
        play(game, step, seed + chunk)
        prices.append(game.prices(game.log_spots)[0])
        if game.task == "slv":
            forward.append(game.forward_prices(game.log_spots)[0])
        exercises.append(game.exercises(game.num_days))
        regressors.append(game.regressors())
    return Paths(
        torch.stack(prices),
        torch.stack(forward) if forward else None,
        [torch.cat(column) for column in zip(*exercises, strict=True)],
        [[torch.cat(column) for column in zip(*rows, strict=True)] for rows in zip(*regressors, strict=True)],
    )


def judged(errors: Tensor) -> Tensor:
    """The part of errors (…, days, strikes) that the benchmark judges: maturities from `FIRST_JUDGED` on."""
    return errors[..., FIRST_JUDGED - FIRST_DAY :, :]
