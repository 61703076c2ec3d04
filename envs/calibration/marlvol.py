"""Marlvol: the market that phase 0 has calibrated, as a model of the underlying whose options are marked on its smile.

Spots follow the learnt policy step by step of its game, a day or a fraction of one, so they are exact martingales. With
several steps of the model to one of the game, its volatility in (5) is that of its beginning. Options are marked at
their price in the Markovian projection of the model, the local volatility √E[σ_t²|S_t], with the same smile (Gyöngy
1986). At the start this is the calibrated smile; later it is the smile that the projection has at the current spot.
"""

import math
from collections.abc import Callable

import numpy as np
import torch

from envs.calibration.game import DT, NODES, WIDTH, CalibrationGame, Step, play
from envs.market import black_scholes, smiles
from envs.market.dynamics import Dynamics, Smile
from envs.run.seeds import PROJECTION_SEED

Tensor = torch.Tensor
GAME = ("num_steps", "steps_per_day", "task", "state", "action_map")  # settings that a market keeps
PARTICLES = 2**18  # paths that estimate the conditional expectations

# THE POLICY

MeanPolicy = Callable[[Tensor], Tensor]  # features (…, observation_size) → mean actions (…, size)


def policy_tables(game: CalibrationGame, policy: MeanPolicy) -> Tensor:
    """Mean actions (T, size, nodes) on the game's grid, for a policy of (t, S) alone."""
    return policy(game.node_features).transpose(1, 2)


def mean_actions(game: CalibrationGame, policy: MeanPolicy, tables: Tensor | None) -> Tensor:
    """The policy's actions (R, n, size) in the game's state, by its tables (see `policy_tables`) unless they are None.

    A look-up is faster than a network, and a player's result does not depend on the number of players."""
    if tables is None:
        return policy(game.observe())
    return torch.stack([game.grid.lookup(row[None], game.t, game.state.log_spot) for row in tables[game.t]], -1)


def policy_step(policy: MeanPolicy, tables: Tensor | None) -> Step:
    """The mean policy as a step of a game."""
    return lambda game: game.step(mean_actions(game, policy, tables))


Layers = list[tuple[Tensor, Tensor]]  # weights and biases of a network with tanh between its layers


def network(layers: Layers, x: Tensor) -> Tensor:
    """Output of the network at x (…, inputs)."""
    for i, (weight, bias) in enumerate(layers):
        x = torch.nn.functional.linear(x.tanh() if i else x, weight, bias)
    return x


@torch.no_grad()
def layers_of(policy: torch.nn.Module, inputs: int) -> Layers:
    """The layers of a policy, from which `network` makes the same function.

    Raises:
        ValueError: the policy is not linear layers with tanh between them.
    """
    layers = [(layer.weight, layer.bias) for layer in policy.modules() if isinstance(layer, torch.nn.Linear)]
    x = torch.linspace(-2, 2, 100 * inputs, device=layers[0][0].device).view(100, inputs)
    if not torch.allclose(network(layers, x), policy(x), atol=1e-4):
        raise ValueError("this policy's network cannot be saved as a market: change marlvol.network with it")
    return layers


# THE MARKET IN A CHECKPOINT


@torch.no_grad()
def export_market(game: CalibrationGame, policy: torch.nn.Module) -> dict:
    """The market of a calibrated policy as tensors, numbers and names, to be saved in a checkpoint.

    The policy is saved as its tables if the state is (t, S), else as its linear layers. The market also has its
    projection √E[σ_t²|S_t] (T, nodes), annualised, and where m is localised the leverage √E[m²|S_t] too.
    Both are estimated by particles unless they are known.

    Raises:
        ValueError: see `layers_of`; only with another state than (t, S).
    """
    tables = policy_tables(game, policy) if game.is_local else None
    layers = None if game.is_local else layers_of(policy, game.observation_size)
    leverage = None
    if game.localised:
        leverage = torch.stack(_played_particles(game, policy).leverages)
        projection = game.local_volatility  # by construction
    elif game.is_local:
        projection = _known_projection(game, tables)
    else:
        projection = _estimated_projection(_played_particles(game, policy))
    return {
        "surface": smiles.to_dict(game.surface),
        "game": {name: game.settings[name] for name in GAME},
        "dates": {name: game.settings[name] for name in ("payoff", "days", "strikes", "act_before_t1")},
        "tables": None if tables is None else tables.cpu(),
        "layers": None if layers is None else [(weight.cpu(), bias.cpu()) for weight, bias in layers],
        "leverage": None if leverage is None else leverage.cpu(),
        "projection": projection.detach().cpu(),
    }


def _played_particles(game: CalibrationGame, policy: MeanPolicy) -> CalibrationGame:
    """A game of `PARTICLES` players that has been played with the mean policy."""
    particles = game.like(num_players=PARTICLES, num_runs=1, reference="none", common=True)
    play(particles, policy_step(policy, None), PROJECTION_SEED)
    return particles


def _known_projection(game: CalibrationGame, tables: Tensor) -> Tensor:
    """√E[σ_t²|S_t] (T, nodes) of a policy of (t, S) alone, in closed form."""
    log_mean_square = 2.0 * tables[:, 0].clamp(-3, 3)
    if game.action_map == "normal":
        log_mean_square = log_mean_square + 2.0 * game.own_std(tables[:, 1]) ** 2
    return game.reference_volatility * (0.5 * log_mean_square).exp()


def _estimated_projection(particles: CalibrationGame) -> Tensor:
    """√E[σ_t²|S_t] (T, nodes) from a game that has been played."""
    rows = []
    for t, log_volatility in enumerate(particles.log_volatilities):
        variance = (2.0 * log_volatility).exp()
        mean = particles.grid.conditional_mean(variance, t, particles.log_spots[t], empty=math.nan)
        rows.append(_fill(mean[0]).sqrt())
    return torch.stack(rows)


def _fill(nodes: Tensor) -> Tensor:
    """Replaces NaN in the values of nodes (m,) by the value of the nearest node that has one."""
    index = torch.arange(len(nodes), device=nodes.device)
    known = index[nodes.isfinite()]
    return nodes[known[(index[:, None] - known).abs().argmin(-1)]]


def _contents(game: CalibrationGame, market: dict) -> list[tuple[Tensor, tuple[int, ...]]]:
    """The tensors of a market, each with the shape that it must have."""
    contents = [(market["projection"], (game.num_steps, NODES))]
    if game.localised:
        contents.append((market["leverage"], (game.num_steps, NODES)))
    if game.is_local:
        contents.append((market["tables"], (game.num_steps, game.action_size, NODES)))
    else:
        actions = network(market["layers"], torch.zeros(1, game.observation_size))
        contents.append((actions, (1, game.action_size)))
    return contents


# THE MODEL


class Marlvol(Dynamics):
    """A market of phase 0.

    Args:
        market: a market made by `export_market`.
        dt: years of a step, one of the game or a whole fraction of one.

    Attributes:
        game: the calibration game, whose grid all tables are on.
        substeps: steps of the model to one of the game, whose steps are called periods here.
        last_step: steps to the last maturity of the smile.
        projection: √E[σ_t²|S_t] (rows, nodes), annualised; a row for each step.

    Raises:
        ValueError: a market of another kind, or one whose periods are shorter than `dt`.
    """

    def __init__(self, market: dict, dt: float = DT):
        try:
            game = CalibrationGame(smiles.from_dict(market["surface"]), 1, **market["game"], **market["dates"])
            game.leverage = market["leverage"]
            self.tables = market["tables"]
            self.layers = market["layers"]
            fits = all(tensor.shape == shape and tensor.isfinite().all() for tensor, shape in _contents(game, market))
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
            fits = False
        if not fits:
            raise ValueError("does not fit this script, its market is of another kind")
        self.game = game
        self.volatility = game.reference_volatility
        self.substeps = round(game.dt / dt)
        if self.substeps < 1:
            raise ValueError(f"was calibrated in steps of 1/{game.steps_per_day} day (at least as long as here)")
        self.dt = game.dt / self.substeps
        self.last_step = game.num_steps * self.substeps
        self.noise_size = 1 if game.action_map == "direct" else 2
        self.log_spot = game.grid.log_spot.double()  # (periods, nodes)
        self.width = self.log_spot[:, -1]
        self._simulations = {}  # device → see `_simulation`
        self._copies = {}  # (name, device, dtype) → see `_copy`
        self.known_smiles = {}  # (strike, expiry) → table of `implied_volatilities`
        self.projection = market["projection"].clone()
        # All players start at S₀, so the policy's volatility elsewhere on the first day has no meaning
        self.projection[0] = self.projection[0, NODES // 2]
        if self.substeps > 1:
            self.projection = self._within_periods(self.projection)

    @torch.no_grad()
    def _within_periods(self, projection: Tensor) -> Tensor:
        """√E[σ_t²|S_t] of every step (last_step, nodes), from that at the beginning of the periods (periods, nodes).

        Within a period a path keeps the volatility of its beginning, while its spot moves on. The expectation given
        the new spot is estimated by particles, as a ratio to the projection at that spot.
        """
        generator = torch.Generator().manual_seed(PROJECTION_SEED)
        noise = torch.randn(PARTICLES, self.last_step, self.noise_size, generator=generator)
        spot, variance = self.simulate(noise, 1.0)
        rows = []
        for step in range(self.last_step):
            period = step // self.substeps
            row = projection[period]
            if period > 0 and step % self.substeps > 0:
                log_spot = spot[None, :, step].log()
                here = self.game.grid.lookup(row[None], period, log_spot)
                ratio = variance[None, :, step] / here.square()
                row = row * _fill(self.game.grid.conditional_mean(ratio, period, log_spot, empty=math.nan)[0]).sqrt()
            rows.append(row)
        return torch.stack(rows)

    @property
    def initial_variance(self) -> float:
        return float(self.typical_variance(torch.tensor(0), torch.tensor(1.0)))

    def parameters(self) -> dict[str, float]:
        return {"mean_volatility": float(self.projection.double().mean()), "dt": self.dt}

    def expected_average_variance(self, variance, num_steps):
        """The square of the reference volatility, whatever the variance: a unit. See `smile` for the marks."""
        return torch.full_like(variance, self.volatility**2) + 0.0 * num_steps

    def typical_variance(self, step, spot):
        """E[σ_t²|S_t], of the Markovian projection."""
        projection = self._copy("projection", spot)
        row = step.long().clamp(max=len(projection) - 1)
        return self.lookup(projection, row, step, spot).square()

    def step_from(self, step, spot, variance, noise):
        """A step of the Markovian projection, whose variance is a function of time and spot."""
        variance = self.typical_variance(step, spot)
        log_return = (variance * self.dt).sqrt() * noise[:, 0] - 0.5 * variance * self.dt
        return log_return, self.typical_variance(step + 1, spot * log_return.exp())

    def period(self, step: Tensor) -> Tensor:
        """Step of the game that a step belongs to, counted from 0; the last one after the end."""
        return (step // self.substeps).long().clamp(max=self.game.num_steps - 1)

    def lookup(self, table: Tensor, row: Tensor, step: Tensor, spot: Tensor) -> Tensor:
        """Rows of a table (rows, nodes) on the game's grid, at spots over the initial one; `row`, `step` and `spot`
        broadcast, and the table has the device and dtype of `spot`."""
        row, step, log_spot = torch.broadcast_tensors(row.long(), step, spot.log())
        half = 0.5 * (table.shape[-1] - 1)
        width = self._copy("width", log_spot)[self.period(step)]
        u = (log_spot * (half / width) + half).clamp(0, table.shape[-1] - 1.001)
        node = u.long()
        return torch.lerp(table[row, node], table[row, node + 1], u - node)

    def smile(self, strike, expiry):
        return CalibratedSmile(self, strike, expiry)

    def _copy(self, name: str, like: Tensor) -> Tensor:
        """The attribute of that name with the device and dtype of `like`, copied at the first call."""
        key = (name, like.device, like.dtype)
        if key not in self._copies:
            self._copies[key] = getattr(self, name).to(like)
        return self._copies[key]

    def _simulation(self, device: torch.device) -> tuple[CalibrationGame, Step]:
        """The game and the policy as its step on a device, copied at the first call."""
        if device not in self._simulations:
            tables = None if self.tables is None else self.tables.to(device)
            layers = [(weight.to(device), bias.to(device)) for weight, bias in self.layers or []]
            step = policy_step(lambda features: network(layers, features), tables)
            self._simulations[device] = self.game.to(device), step
        return self._simulations[device]

    @torch.no_grad()
    def simulate(self, noise, spot=100.0):
        n, num_steps, noise_size = noise.shape
        each = self.substeps
        game, step = self._simulation(noise.device)
        periods = min(game.num_steps, num_steps // each + 1)  # with that of the last variance
        normals = torch.zeros(n, periods * each, noise_size, device=noise.device)
        normals[:, :num_steps] = noise
        normals = normals.view(n, periods, each, noise_size)
        shocks = normals[..., 0].sum(-1) / math.sqrt(each)
        game.start(shocks.T[:, None], normals[:, :, 0, -1].T[:, None] if self.noise_size > 1 else None)
        for _ in range(periods):
            step(game)
        opened = torch.stack([x[0] for x in game.log_spots[:periods]], 1)[..., None]  # at the start of each
        volatility = torch.stack([x[0] for x in game.log_volatilities], 1).exp()[..., None]
        moves = volatility * math.sqrt(self.dt) * normals[..., 0] - 0.5 * self.dt * volatility**2
        log_spot = (opened + moves.cumsum(-1)).flatten(1)
        log_spot = torch.cat((torch.zeros_like(log_spot[:, :1]), log_spot), 1)[:, : num_steps + 1]
        variance = volatility.square().expand(-1, -1, each).flatten(1)
        variance = torch.cat((variance, variance[:, -1:]), 1)[:, : num_steps + 1]
        return (math.log(spot) + log_spot).exp().to(noise), variance.to(noise)


class CalibratedSmile(Smile):
    """Implied volatilities of options in the Markovian projection of a market.

    Attributes:
        tables: (num_options, steps, nodes) volatility of each option at every step and node of the game's grid.
        slopes: of the same shape, ∂σ/∂ln S.
    """

    is_fair = True

    def __init__(self, dynamics: Marlvol, strike: Tensor, expiry: Tensor):
        strike, expiry = torch.broadcast_tensors(strike, expiry)
        super().__init__(dynamics, strike, expiry)
        options = list(zip(strike.tolist(), expiry.long().tolist(), strict=True))
        steps = max(expiry for _, expiry in options) + 1
        if steps - 1 > dynamics.last_step:
            raise ValueError(f"expiry is {steps - 1} (at most {dynamics.last_step} steps, where the smile ends)")
        for option in options:
            if option not in dynamics.known_smiles:
                dynamics.known_smiles[option] = implied_volatilities(dynamics, *option)
        tables = [dynamics.known_smiles[option] for option in options]
        tables = torch.stack([torch.cat((x, x[-1:].expand(steps - len(x), -1))) for x in tables])
        spacing = dynamics.log_spot[:, 1] - dynamics.log_spot[:, 0]
        slopes = torch.gradient(tables, dim=-1)[0] / spacing[dynamics.period(torch.arange(steps))][:, None]
        self.tables = tables.to(strike)
        self.slopes = slopes.to(strike)

    def _at(self, tables: Tensor, step: Tensor, spot: Tensor) -> Tensor:
        step = step.long()
        spot = spot.to(tables.dtype)
        row = step.clamp(max=tables.shape[1] - 1)
        return torch.stack([self.dynamics.lookup(table, row, step, spot) for table in tables], -1)

    def volatility(self, step, spot, variance):
        return self._at(self.tables, step, spot)

    def slope(self, step, spot, variance):
        return self._at(self.slopes, step, spot)

    @property
    def skewed(self):
        return True

    def variance(self, step, spot, volatility):
        return self.dynamics.typical_variance(step.long(), spot)


@torch.no_grad()
def implied_volatilities(dynamics: Marlvol, strike: float, expiry: int) -> Tensor:
    """Table (expiry + 1, nodes) of an option's implied volatility at every step and node of the game's grid, float64.

    Backward induction of the out-of-the-money option's value U_t(x) = E[U_{t+1}(x + σ√dt Z − ½σ²dt)], σ the projection
    at (t, x). The last step to expiry is Black–Scholes, the others are Gauss–Hermite quadrature on a grid of 1/250 of
    the last day's standard deviation. A node at which the option's time value is lost in rounding takes the volatility
    of the nearest node at which it is not.
    """
    dt = dynamics.dt
    x = float(dynamics.width[-1]) * torch.linspace(-1, 1, int(500 * WIDTH) + 1, dtype=torch.float64)
    spot = x.exp()
    is_call = strike >= 1.0
    sign = 1.0 if is_call else -1.0
    points, weights = np.polynomial.hermite_e.hermegauss(15)
    weights = weights / weights.sum()
    rows, value = [], None
    for t in reversed(range(expiry)):
        step = torch.tensor(t)
        volatility = dynamics.typical_variance(step, spot).sqrt()
        if value is None:
            value = black_scholes.price(spot, strike, dt, volatility, is_call)
        else:
            mean = (x - 0.5 * dt * volatility**2).numpy()
            sd = (math.sqrt(dt) * volatility).numpy()
            nexts = (np.interp(mean + z * sd, x.numpy(), value.numpy()) for z in points)
            value = torch.from_numpy(sum(w * u for w, u in zip(weights, nexts, strict=True)))
        nodes = dynamics.log_spot[dynamics.period(step)]
        price = torch.from_numpy(np.interp(nodes.numpy(), x.numpy(), value.numpy()))
        time_value = price - (sign * (nodes.exp() - strike)).clamp(min=0)
        implied = black_scholes.implied_volatility(price, nodes.exp(), strike, (expiry - t) * dt, is_call)
        rows.append(_fill(torch.where(time_value > 1e-7, implied, math.nan)))
    table = torch.stack(rows[::-1])
    return torch.cat((table, table[-1:]))
