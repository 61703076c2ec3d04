"""Stochastic local volatility: Heston's own dynamics through the action map (9), and the dynamics that a model has."""

import math
from typing import NamedTuple

import torch

from envs.calibration.game import VALIDATION_PATHS, CalibrationGame, Step, play
from envs.run.seeds import BENCHMARK_SEED

Tensor = torch.Tensor


def heston_step(game: CalibrationGame) -> None:
    """A step of the model whose prices are the targets: Heston's dynamics of ln √v, by the same map and localisation.

    d ln √v = (κ(θ − v) − ½ξ²)/(2v) dt + ξ/(2√v) dB, where v = v₀m². Its error is that of the daily grid.
    """
    model = game.surface.model
    variance = model.initial_variance * (2.0 * game.state.log_volatility).exp()
    drift = model.mean_reversion * (model.mean_variance - variance) - 0.5 * model.vol_of_vol**2
    eta = 0.5 * model.vol_of_vol / variance.sqrt()
    correlation = torch.full_like(variance, math.atanh(model.correlation))
    game.step(torch.stack((drift / (2.0 * variance) / 3.0, (0.5 * eta).log(), correlation), -1))


class VolatilityDynamics(NamedTuple):
    """How the localised volatility σ moves: η = std(Δσ)/√(δ E[σ²]), annualised, and ρ, the correlation of Δσ with ΔlnS.

    In Heston's model they are ξ/(2√E[v]) and ρ, as √v has the constant volatility ½ξ. Localisation takes out of m what
    is a function of (t, S), so prices do not determine the map's own η and ρ; these of σ they do.
    """

    eta: float
    rho: float


@torch.no_grad()
def volatility_dynamics(game: CalibrationGame, step: Step) -> VolatilityDynamics:
    """Of a model on fresh paths, over all days and paths."""
    alone = game.like(num_players=VALIDATION_PATHS, num_runs=1, reference="none", common=True)
    play(alone, step, BENCHMARK_SEED)
    volatility = torch.stack([x[0] for x in alone.log_volatilities]).double().exp()
    change = volatility.diff(dim=0)
    change = change - change.mean(-1, keepdim=True)
    shock = alone.shocks[: len(change), 0].double()
    spread = change.square().mean().sqrt()
    eta = spread / (alone.dt * volatility.square().mean()).sqrt()
    return VolatilityDynamics(float(eta), float((change * shock).mean() / spread))


def heston_dynamics(game: CalibrationGame) -> VolatilityDynamics:
    """Of the model that the target prices are of."""
    model = game.surface.model
    mean_variance = model.expected_average_variance(torch.tensor(model.initial_variance).double(), game.num_days)
    return VolatilityDynamics(0.5 * model.vol_of_vol / float(mean_variance.sqrt()), model.correlation)
