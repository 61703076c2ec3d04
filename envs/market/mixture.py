"""Mixture: environments side by side that each follow a model of their own.

An agent that is trained in one model is made for it. One that meets many of them, without being told which, has to find
out from what it sees (a trader's view, `HedgingEnv`).
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.stats import qmc

from envs.market.dynamics import GARCH, GBM, Dynamics, Heston, Merton, Smile
from envs.market.units import TRADING_DAYS

Tensor = torch.Tensor
# Of each kind of model, its parameters' ranges. Volatilities are of the long run; garch's reaction is α + γ/2, of which
# falls alone have the share `from_falls`; merton's jumps come on top of its volatility.
RANGES = {
    "gbm": {"volatility": (0.1, 0.35)},
    "heston": {
        "volatility": (0.12, 0.32), "start": (0.8, 1.25), "mean_reversion": (2.0, 8.0), "vol_of_vol": (0.2, 0.9),
        "correlation": (-0.9, -0.2),
    },
    "garch": {
        "volatility": (0.12, 0.32), "reaction": (0.05, 0.12), "from_falls": (0.4, 1.0), "persistence": (0.96, 0.99),
    },
    "merton": {
        "volatility": (0.1, 0.28), "jump_rate": (0.5, 2.0), "jump_mean": (-0.12, -0.03),
        "jump_volatility": (0.05, 0.12),
    },
}  # fmt: skip
OF_EACH = 4  # models of each kind


def mixed_models(dt: float, of_each: int = OF_EACH, kinds: Sequence[str] = tuple(RANGES)) -> list[Dynamics]:
    """Models of all `kinds` in turn, their parameters spread over `RANGES` (a scrambled Sobol sequence).

    Args:
        dt: years of a step; a trading day if garch is among them.
        of_each: how many of each kind, a power of two.
    """
    models = []
    for kind in kinds:
        low, high = np.array(list(RANGES[kind].values())).T
        points = qmc.scale(qmc.Sobol(len(low), seed=0).random(of_each), low, high)
        models.append([_model(kind, dt, **dict(zip(RANGES[kind], map(float, x), strict=True))) for x in points])
    return [model for turn in zip(*models, strict=True) for model in turn]


def _model(kind: str, dt: float, volatility: float, **parameters: float) -> Dynamics:
    """A model from its parameters as `RANGES` names them."""
    if kind == "gbm":
        return GBM(volatility, dt)
    if kind == "heston":
        start = volatility * parameters.pop("start")
        return Heston(start**2, volatility**2, dt=dt, **parameters)
    if kind == "merton":
        return Merton(volatility, dt=dt, **parameters)
    reaction = parameters["reaction"]
    persistence = parameters["persistence"]
    return GARCH(
        omega=volatility**2 * (1.0 - persistence) / TRADING_DAYS,
        alpha=reaction * (1.0 - parameters["from_falls"]),
        gamma=2.0 * reaction * parameters["from_falls"],
        beta=persistence - reaction,
        dt=dt,
    )


class Mixture(Dynamics):
    """Row i of the environments follows model i modulo their number.

    Methods take tensors (…, n) whose last axis are the rows, and give what each row's own model says.

    Args:
        models: with one time step.
    """

    follows_row_numbers = True

    def __init__(self, models: Sequence[Dynamics]):
        self.models = list(models)
        steps = {model.dt for model in models}
        if len(steps) != 1:
            raise ValueError(f"the models have {len(steps)} different time steps (one)")
        self.dt = steps.pop()
        self.noise_size = max(model.noise_size for model in models)
        self.initial_variance = float(np.median([model.initial_variance for model in models]))
        self.last_step = min(model.last_step for model in models)

    def by_row(self, compute: Callable[..., Tensor], *values: Tensor, axis: int = -1) -> Tensor:
        """compute(number of a model, values of its rows) for every model, put together again.

        Args:
            compute: returns the rows of its values, too, on the axis `axis`.
            values: broadcast to (…, n).
        """
        values = torch.broadcast_tensors(*values)
        size = len(self.models)
        n = values[0].shape[-1]
        parts = [compute(k, *(x[..., k::size] for x in values)).movedim(axis, -1) for k in range(min(size, n))]
        result = parts[0].new_empty(*parts[0].shape[:-1], n)
        for k, part in enumerate(parts):
            result[..., k::size] = part
        return result.movedim(-1, axis)

    def simulate(self, noise, spot=100.0):
        def paths(k: int, noise: Tensor) -> Tensor:
            model = self.models[k]
            return torch.stack(model.simulate(noise.movedim(-1, 0)[..., : model.noise_size], spot))

        return self.by_row(paths, noise.movedim(0, -1), axis=1).unbind()

    def expected_average_variance(self, variance, num_steps):
        steps = torch.as_tensor(num_steps, device=variance.device)
        return self.by_row(lambda k, *x: self.models[k].expected_average_variance(*x), variance, steps)

    def return_volatility_covariance(self, variance):
        return self.by_row(lambda k, v: self.models[k].return_volatility_covariance(v), variance)

    def return_variance(self, variance):
        return self.by_row(lambda k, v: self.models[k].return_variance(v), variance)

    def smile(self, strike, expiry):
        return MixedSmile(self, strike, expiry)

    def parameters(self):
        return {f"model {k}": str(model) for k, model in enumerate(self.models)}


class MixedSmile(Smile):
    """What options are marked at, where every row has a model of its own."""

    def __init__(self, dynamics: Mixture, strike: Tensor, expiry: Tensor):
        super().__init__(dynamics, strike, expiry)
        self.smiles = [model.smile(strike, expiry) for model in dynamics.models]

    def volatility(self, step, spot, variance):
        return self.dynamics.by_row(lambda k, *x: self.smiles[k].volatility(*x), step, spot, variance, axis=-2)

    def slope(self, step, spot, variance):
        return self.dynamics.by_row(lambda k, *x: self.smiles[k].slope(*x), step, spot, variance, axis=-2)

    @property
    def skewed(self):
        return any(smile.skewed for smile in self.smiles)
