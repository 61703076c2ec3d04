"""Marlvol: the market that phase 0 has calibrated, as a model of the underlying whose options are marked on its smile.

Spots follow the learnt policy day by day, so they are exact martingales, and (5) with several steps to a day keeps the
day's volatility from its beginning. Options are marked at the price that they have in the Markovian projection of the
model, the local volatility √E[σ_t²|S_t], which has the same smile (Gyöngy 1986): today that is the calibrated smile,
later what becomes of it at the spot that has been reached.
"""

import math
from collections.abc import Callable

import numpy as np
import torch

from envs import black_scholes, calibration, runs, smiles
from envs.calibration import DT, NODES, WIDTH, CalibrationGame
from envs.dynamics import Dynamics, Smile

Tensor = torch.Tensor
PARTICLES = 2**18
PROJECTION_SEED = 8_000_000


Policy = Callable[[Tensor], Tensor]  # features (…, observation_size) → mean actions (…, size)


def policy_tables(game: CalibrationGame, policy: Policy) -> Tensor:
    """Mean actions (T, size, nodes) on the game's grid, where the state is (t, S) alone."""
    features = [game.features(t, calibration.at_spots(game.grid.log_spot[t])) for t in range(game.num_steps)]
    return policy(torch.stack(features)).transpose(1, 2)


def mean_actions(game: CalibrationGame, policy: Policy, tables: Tensor | None) -> Tensor:
    """The policy's actions (R, n, size) in the game's state: by its tables (see `policy_tables`) where there are any.

    In one dimension a look-up is faster than a network, and the same for a player whoever else there is."""
    if tables is None:
        return policy(game.observe())
    return torch.stack([game.grid.lookup(row[None], game.t, game.state.log_spot) for row in tables[game.t]], -1)


def policy_step(policy: Policy, tables: Tensor | None) -> calibration.Step:
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
    """The layers of a policy, which `network` makes the same function again.

    Raises:
        ValueError: it is not linear layers with tanh between them.
    """
    layers = [(layer.weight, layer.bias) for layer in policy.modules() if isinstance(layer, torch.nn.Linear)]
    x = torch.linspace(-2, 2, 100 * inputs, device=layers[0][0].device).view(100, inputs)
    if not torch.allclose(network(layers, x), policy(x), atol=1e-4):
        raise ValueError("this policy's network cannot be saved as a market: change marlvol.network with it")
    return layers


@torch.no_grad()
def export_market(game: CalibrationGame, policy: torch.nn.Module) -> dict:
    """All that makes a market of a calibrated policy: tensors, numbers and names, to be saved in a checkpoint.

    The policy is saved as its tables where the state is (t, S), else as its linear layers. Beside it its projection
    √E[σ_t²|S_t] (T, nodes), annualised, and in the Bermudan task the leverage √E[m²|S_t] that localises it, both by
    particles where they are not known.

    Raises:
        ValueError: what `layers_of` raises, with another state than (t, S).
    """
    tables = policy_tables(game, policy) if game.is_local else None
    layers = None if game.is_local else layers_of(policy, game.observation_size)
    leverage, projection = None, None
    if game.task == "bermudan" or not game.is_local:
        particles = game.like(num_players=PARTICLES, num_runs=1, reference="none", common=True)
        calibration.play(particles, policy_step(policy, None), PROJECTION_SEED)
    if game.task == "bermudan":
        leverage, projection = torch.stack(particles.leverages), game.local_volatility  # by construction
    elif game.is_local:
        log_mean_square = 2.0 * tables[:, 0].clamp(-3, 3)
        if game.action_map == "normal":
            log_mean_square = log_mean_square + 2.0 * game.own_std(tables[:, 1]) ** 2
        projection = game.reference_volatility * (0.5 * log_mean_square).exp()
    else:
        rows = []
        for t, log_volatility in enumerate(particles.log_volatilities):
            mean = particles.grid.conditional_mean(
                (2.0 * log_volatility).exp(), t, particles.log_spots[t], empty=math.nan
            )
            rows.append(_fill(mean[0]).sqrt())
        projection = torch.stack(rows)
    names = ("num_steps", "task", "state", "action_map")
    return {
        "surface": smiles.to_dict(game.surface),
        "game": {name: game.settings[name] for name in names},
        "tables": None if tables is None else tables.cpu(),
        "layers": None if layers is None else [(weight.cpu(), bias.cpu()) for weight, bias in layers],
        "leverage": None if leverage is None else leverage.cpu(),
        "projection": projection.detach().cpu(),
    }


def _fill(nodes: Tensor) -> Tensor:
    """Nodes (m,) that nobody has visited (NaN) take the value of the nearest one that somebody has."""
    index = torch.arange(len(nodes), device=nodes.device)
    visited = index[nodes.isfinite()]
    return nodes[visited[(index[:, None] - visited).abs().argmin(-1)]]


class Marlvol(Dynamics):
    """A market of phase 0.

    Args:
        market: what `export_market` made.
        dt: years of a step, a trading day or a whole fraction of one.

    Attributes:
        last_step: steps to the last maturity of the smile.

    Raises:
        ValueError: a market that is of another kind.
    """

    def __init__(self, market: dict, dt: float = DT):
        try:
            game = CalibrationGame(smiles.from_dict(market["surface"]), 1, **market["game"])
            self.projection, self.tables, game.leverage = (
                market[name] for name in ("projection", "tables", "leverage")
            )
            self.layers = market["layers"]
            shapes = [(game.num_steps, NODES)] + [(game.num_steps, NODES)] * (game.task == "bermudan")
            known = [self.projection] + [game.leverage] * (game.task == "bermudan")
            if game.is_local:
                known, shapes = [*known, self.tables], [*shapes, (game.num_steps, game.action_size, NODES)]
            else:
                actions = network(self.layers, torch.zeros(1, game.observation_size))
                known, shapes = [*known, actions], [*shapes, (1, game.action_size)]
            fits = all(x.shape == shape and x.isfinite().all() for x, shape in zip(known, shapes, strict=True))
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
            fits = False
        if not fits:
            raise ValueError("does not fit this script, its market is of another kind")
        self.game, self.volatility = game, game.reference_volatility
        self.steps_per_day = max(1, round(DT / dt))
        self.dt, self.last_step = DT / self.steps_per_day, game.num_steps * self.steps_per_day
        self.noise_size = 1 if game.action_map == "direct" else 2
        self.log_spot = game.grid.log_spot.double()  # (days, nodes), for the tables of marks
        # Everybody begins at S₀, so what the policy would do elsewhere on the first day has no meaning
        self.projection = self.projection.clone()
        self.projection[0] = self.projection[0, NODES // 2]
        if self.steps_per_day > 1:
            self.projection = self._within_days(self.projection)
        self.known_smiles = {}  # tables of the options that have been marked

    @torch.no_grad()
    def _within_days(self, projection: Tensor) -> Tensor:
        """√E[σ_t²|S_t] of every step (last_step, nodes), from that at the beginning of the days (days, nodes).

        Within a day the volatility is that of its beginning, so what is expected of it given the spot since then is
        found by particles, relative to what it would be at that spot.
        """
        generator = torch.Generator().manual_seed(PROJECTION_SEED)
        noise = torch.randn(PARTICLES, self.last_step, self.noise_size, generator=generator)
        spot, variance = self.simulate(noise, 1.0)
        rows = []
        for step in range(self.last_step):
            day, first = step // self.steps_per_day, step % self.steps_per_day == 0
            row = projection[day]
            if day > 0 and not first:
                log_spot = spot[None, :, step].log()
                here = self.game.grid.lookup(row[None], day, log_spot)
                ratio = variance[None, :, step] / here.square()
                row = row * _fill(self.game.grid.conditional_mean(ratio, day, log_spot, empty=math.nan)[0]).sqrt()
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
        row = step.long().clamp(max=len(self.projection) - 1)
        return self.lookup(self.projection, row, step, spot).square()

    def day(self, step: Tensor) -> Tensor:
        """Trading day (from 0, the last one at most) that a step belongs to."""
        return (step // self.steps_per_day).long().clamp(max=self.game.num_steps - 1)

    def lookup(self, table: Tensor, row: Tensor, step: Tensor, spot: Tensor) -> Tensor:
        """Rows of a table (rows, nodes) on the game's grid, at spots over the initial one; all broadcast."""
        row, step, log_spot = torch.broadcast_tensors(row.long(), step, spot.log())
        half = 0.5 * (table.shape[-1] - 1)
        width = self.log_spot[:, -1].to(log_spot)[self.day(step)]
        u = (log_spot * (half / width) + half).clamp(0, table.shape[-1] - 1.001)
        node = u.long()
        table = table.to(log_spot)
        return torch.lerp(table[row, node], table[row, node + 1], u - node)

    def smile(self, strike, expiry):
        return CalibratedSmile(self, strike, expiry)

    def _to(self, device: torch.device) -> None:
        """Moves what the simulation needs; it is where the noise is."""
        game = self.game
        if game.device != device:
            game.device, game.local_volatility = device, game.local_volatility.to(device)
            game.grid.scale, game.grid.log_spot = game.grid.scale.to(device), game.grid.log_spot.to(device)
            game.leverage = None if game.leverage is None else game.leverage.to(device)
            self.tables = None if self.tables is None else self.tables.to(device)
            if self.layers is not None:
                self.layers = [(weight.to(device), bias.to(device)) for weight, bias in self.layers]

    @torch.no_grad()
    def simulate(self, noise, spot=100.0):
        n, num_steps, per_day = len(noise), noise.shape[1], self.steps_per_day
        game = self.game
        self._to(noise.device)
        step = policy_step(lambda features: network(self.layers, features), self.tables)
        needed = min(game.num_steps, num_steps // per_day + 1)  # with the day that the last variance belongs to
        normals = torch.zeros(n, needed * per_day, noise.shape[2], device=noise.device)
        normals[:, :num_steps] = noise
        normals = normals.view(n, needed, per_day, -1)
        shocks = normals[..., 0].sum(-1) / math.sqrt(per_day)
        game.num_players = n  # rows of the noise
        game.start(shocks.T[:, None], normals[:, :, 0, -1].T[:, None] if self.noise_size > 1 else None)
        for _ in range(needed):
            step(game)
        opened = torch.stack([x[0] for x in game.log_spots[:needed]], 1)[..., None]  # at the start of each day
        volatility = torch.stack([x[0] for x in game.log_volatilities], 1).exp()[..., None]
        moves = volatility * math.sqrt(self.dt) * normals[..., 0] - 0.5 * self.dt * volatility**2
        log_spot = (opened + moves.cumsum(-1)).flatten(1)
        log_spot = torch.cat((torch.zeros_like(log_spot[:, :1]), log_spot), 1)[:, : num_steps + 1]
        variance = volatility.square().expand(-1, -1, per_day).flatten(1)
        variance = torch.cat((variance, variance[:, -1:]), 1)[:, : num_steps + 1]
        return (math.log(spot) + log_spot).exp().to(noise), variance.to(noise)


class CalibratedSmile(Smile):
    """Implied volatilities of options in the Markovian projection of a market."""

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
        self.tables = torch.stack([torch.cat((x, x[-1:].expand(steps - len(x), -1))) for x in tables])
        spacing = dynamics.log_spot[:, 1] - dynamics.log_spot[:, 0]
        self.slopes = torch.gradient(self.tables, dim=-1)[0] / spacing[dynamics.day(torch.arange(steps))][:, None]
        self.tables, self.slopes = self.tables.to(strike), self.slopes.to(strike)

    def _at(self, tables: Tensor, step: Tensor, spot: Tensor) -> Tensor:
        step = torch.as_tensor(step, device=spot.device).long()
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
    """Table (expiry + 1, nodes) of an option's implied volatility at every step and spot of the game's grid, float64.

    Backward induction of the out-of-the-money option's value U_t(x) = E[U_{t+1}(x + σ√dt Z − ½σ²dt)], σ the projection
    at (t, x): one Black–Scholes step to expiry, then Gauss–Hermite on a grid of 1/250 of the last day's standard
    deviation. Where nothing is left to the option but rounding, the volatility of the nearest node at which there is.
    """
    dt = dynamics.dt
    x = float(dynamics.log_spot[-1, -1]) * torch.linspace(-1, 1, int(500 * WIDTH) + 1, dtype=torch.float64)
    is_call = strike >= 1.0
    nodes, weights = np.polynomial.hermite_e.hermegauss(15)
    weights = weights / weights.sum()
    table, value = [], None
    for t in reversed(range(expiry)):
        spot, left = x.exp(), (expiry - t) * dt
        step = torch.tensor(t)
        volatility = dynamics.typical_variance(step, spot).sqrt()
        if value is None:
            value = black_scholes.price(spot, strike, dt, volatility, is_call)
        else:
            mean, sd = (x - 0.5 * dt * volatility**2).numpy(), (math.sqrt(dt) * volatility).numpy()
            value = sum(
                w * np.interp(mean + z * sd, x.numpy(), value.numpy()) for z, w in zip(nodes, weights, strict=True)
            )
            value = torch.from_numpy(value)
        at = dynamics.log_spot[dynamics.day(step)]
        price = torch.from_numpy(np.interp(at.numpy(), x.numpy(), value.numpy()))
        sign = 1.0 if is_call else -1.0
        time_value = price - (sign * (at.exp() - strike)).clamp(min=0)
        implied = black_scholes.implied_volatility(price, at.exp(), strike, left, is_call)
        table.append(_fill(torch.where(time_value > 1e-7, implied, math.nan)))
    table = torch.stack(table[::-1])
    return torch.cat((table, table[-1:]))


def load(path: str, dt: float = DT) -> Marlvol:
    """The market of a run of phase 0: its folder or checkpoint.

    Raises:
        ValueError: not a checkpoint of phase 0, or one whose market does not fit.
    """
    content = runs.load_checkpoint(path, "phase0")
    if "market" not in content:
        raise ValueError(f"{path}: the run has not been finished, so there is no market in it (--resume)")
    try:
        return Marlvol(content["market"], dt)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
