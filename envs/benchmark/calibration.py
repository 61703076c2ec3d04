"""The benchmark of phase 0: a calibrated model on fresh paths, compared with local and constant volatility on them."""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch

from envs.benchmark.bars import EXOTIC, MIN_PATHS, SLV, SMILE
from envs.benchmark.report import Z95, Benchmark, Estimate
from envs.calibration.exotic import (
    Dependence,
    is_bermudan,
    learnt_dependence,
    nested_gain,
    switch_values,
    value_exotic,
)
from envs.calibration.game import (
    FIRST_DAY,
    FIRST_JUDGED,
    VALIDATION_PATHS,
    CalibrationGame,
    Paths,
    Step,
    judged,
    play,
    sample,
)
from envs.calibration.payoffs import DT, ForwardStartCall
from envs.calibration.slv import VolatilityDynamics, heston_dynamics, heston_step, volatility_dynamics
from envs.optimum import transport
from envs.run.seeds import BENCHMARK_SEED, VALIDATION_SEED

Tensor = torch.Tensor
DUPIRE, CONSTANT = "Dupire local volatility", "constant volatility"
HESTON = "Heston, in daily steps"  # the model that the task slv's target prices are of
NUM_CHUNKS = 12  # of the paths, for the jackknife
# Key in a model's row → title in the table
CALIBRATION_COLUMNS = {
    "rmse": "RMSE",
    "worst": "max",
    "bias": "mean",
    "rmse_early": f"RMSE, days {FIRST_DAY} to {FIRST_JUDGED - 1}",
}
BASIS_POINT = 1e-4
EXOTIC_COLUMNS = {
    "price": "price (bp)",
    "upper": "at most (bp)",
    "floor": "dearest European (bp)",
    "switch_value": "switch value",
    "rmse": "vanilla RMSE",
    "worst": "max",
}
SLV_COLUMNS = {
    "forward_rmse": "forward-start RMSE",
    "forward_worst": "max",
    "rmse": "vanilla RMSE",
    "worst": "max, vanillas",
    "eta": "η of σ",
    "rho": "ρ of σ and S",
}
NUM_NODES = 81  # of the grid on which the bounds are computed


class Validation:
    """The points of the learning curve: a model on fixed paths, other ones than those of training and benchmark.

    Calling it with a `Step` gives the calibration error of the maturities that are judged; in the exotic task the price
    too, and a Bermudan's switch value; in the task slv the error of the forward-start options.
    """

    def __init__(self, game: CalibrationGame):
        self.game = game.like(num_runs=1, num_players=VALIDATION_PATHS // 2, common=True)

    def __call__(self, step: Step) -> dict[str, float]:
        metrics = {}
        if self.game.task == "exotic":
            value = value_exotic(sample(self.game, step, VALIDATION_PATHS, VALIDATION_SEED))
            metrics["charts/exotic_price"] = value.price
            metrics["charts/european_floor"] = value.floor
            if is_bermudan(self.game):
                metrics["charts/switch_value"] = float(switch_values(self.game, torch.tensor(value[:2])))
        play(self.game, step, VALIDATION_SEED)
        errors = judged(self.game.errors()[0])
        metrics["charts/rmse"] = float(errors.square().mean().sqrt())
        if self.game.task == "local-vol":
            metrics["charts/max_error"] = float(errors.abs().max())
        if self.game.task == "slv":
            forward = self.game.forward_errors()[0]
            metrics["charts/forward_rmse"] = float(forward.square().mean().sqrt())
            metrics["charts/forward_max_error"] = float(forward.abs().max())
        return metrics

    def describe(self, metrics: Mapping[str, float]) -> str:
        """The most important metrics, for a progress bar."""
        error = f"RMSE {metrics['charts/rmse']:.3f} vol points"
        if self.game.task == "local-vol":
            return f"{error}, at most {metrics['charts/max_error']:.2f}"
        if self.game.task == "slv":
            return f"forward starts: RMSE {metrics['charts/forward_rmse']:.3f}; vanillas: {error}"
        return f"price {metrics['charts/exotic_price'] / BASIS_POINT:.2f} bp, {error}"


# PLAYING


class Calibration(NamedTuple):
    """Errors of a model's prices on fresh paths, in vol points."""

    errors: Tensor  # (days, strikes)
    without: Tensor  # (chunks, days, strikes) when one chunk of paths is left out, for the jackknife


def benchmark_paths(game: CalibrationGame, step: Step, num_paths: int) -> Paths:
    """The benchmark's paths under a model; all models have the same Brownian increments."""
    alone = game.like(num_players=num_paths // NUM_CHUNKS, num_runs=1, reference="none", common=True)
    return sample(alone, step, alone.num_players * NUM_CHUNKS, BENCHMARK_SEED)


def calibrate(prices: Tensor, to_errors: Callable[[Tensor], Tensor]) -> Calibration:
    """Errors of a model's prices (chunks, …), by the game's function of prices → errors."""
    chunks = len(prices)
    total = prices.sum(0)
    without = to_errors((total - prices) / (chunks - 1))
    return Calibration(to_errors(total / chunks).cpu(), without.cpu())


def smile_benchmark(
    *, title: str, settings: Mapping, game: CalibrationGame, models: Mapping[str, Step], num_paths: int
) -> tuple[Benchmark, dict[str, Calibration]]:
    """Plays all models on the same fresh paths and judges how well "agent" fits the smile.

    Args:
        settings: what the report says about the run; the paths and their seed are added.
        models: by name, "agent" among them; local and constant volatility are added.
        num_paths: rounded down to a multiple of `NUM_CHUNKS`.
    """
    models = {**models, DUPIRE: CalibrationGame.step_dupire, CONSTANT: CalibrationGame.step_constant}
    settings = {**settings, **_path_settings(num_paths)}
    fits = {
        name: calibrate(benchmark_paths(game, step, num_paths).prices, game.volatility_errors)
        for name, step in models.items()
    }
    return judge_smile(title, settings, fits), fits


def exotic_benchmark(
    *,
    title: str,
    settings: Mapping,
    game: CalibrationGame,
    models: Mapping[str, Step],
    num_paths: int,
    objective: str,
    target_price: float | None = None,
) -> tuple[Benchmark, dict[str, Calibration], Dependence]:
    """Plays all models on the same fresh paths and judges the exotic of "agent".

    Args:
        settings: what the report says about the run; the paths, their seed, days and strikes are added.
        models: by name, "agent" among them; local volatility is added.
        num_paths: rounded down to a multiple of `NUM_CHUNKS`.
        objective, target_price: see `judge_exotic`.

    Returns:
        The verdict, the errors of the vanillas, and what "agent" has learnt.
    """
    models = {**models, DUPIRE: CalibrationGame.step_dupire}
    payoff = game.payoff
    settings = {**settings, **_path_settings(num_paths), "days": payoff.days, "strikes": payoff.strikes}
    played = {name: price_exotic(game, step, num_paths) for name, step in models.items()}
    learnt = learnt_dependence(game, models["agent"])
    result = judge_exotic(title, settings, game, played, learnt, objective, target_price)
    return result, {name: exotic.vanillas for name, exotic in played.items()}, learnt


def slv_benchmark(
    *, title: str, settings: Mapping, game: CalibrationGame, models: Mapping[str, Step], num_paths: int
) -> tuple[Benchmark, dict[str, Calibration], dict[str, Tensor]]:
    """Plays all models on the same fresh paths and judges how well "agent" fits the forward-start options.

    Args:
        settings: what the report says about the run; the paths and their seed are added.
        models: by name, "agent" among them; local volatility, and the model that the prices are of, are added.
        num_paths: rounded down to a multiple of `NUM_CHUNKS`.

    Returns:
        The verdict, and by model the errors of the vanillas and of the forward starts (starts, strikes), vol points.
    """
    models = {**models, DUPIRE: CalibrationGame.step_dupire, HESTON: heston_step}
    settings = {**settings, **_path_settings(num_paths)}
    fits, forward, dynamics = {}, {}, {}
    for name, step in models.items():
        paths = benchmark_paths(game, step, num_paths)
        fits[name] = calibrate(paths.prices, game.volatility_errors)
        forward[name] = calibrate(paths.forward_prices, game.forward_volatility_errors)
        dynamics[name] = volatility_dynamics(game, step)
    result = judge_slv(title, settings, game, fits, forward, dynamics)
    return result, fits, {name: fit.errors for name, fit in forward.items()}


def _path_settings(num_paths: int) -> dict[str, int]:
    return {"paths": num_paths // NUM_CHUNKS * NUM_CHUNKS, "benchmark seed": BENCHMARK_SEED}


# JUDGING


def rmse(errors: Tensor) -> Tensor:
    """Root mean square of the errors that are judged; (…, days, strikes) → (…)."""
    return judged(errors).square().mean((-1, -2)).sqrt()


def jackknife(value: Tensor, without: Tensor) -> Estimate:
    """A statistic with a 95 % interval, from its values when one chunk of paths is left out (Efron & Stein 1981)."""
    chunks = len(without)
    se = float(((chunks - 1) / chunks * (without - without.mean()).square().sum()).sqrt())
    return Estimate(float(value), se, float(value) - Z95 * se, float(value) + Z95 * se)


def _row(errors: Tensor) -> dict[str, float]:
    early = errors[: FIRST_JUDGED - FIRST_DAY]
    late = judged(errors)
    return {
        "rmse": float(rmse(errors)),
        "worst": float(late.abs().max()),
        "bias": float(late.mean()),
        "rmse_early": float(early.square().mean().sqrt()),
    }


def judge_smile(title: str, settings: dict, played: Mapping[str, Calibration]) -> Benchmark:
    """The verdict on a calibration: errors within the bars, and an RMSE below constant volatility's.

    Args:
        settings: what the report says; `paths` is judged.
        played: by model, "agent", `DUPIRE` and `CONSTANT` among them.
    """
    rows = {name: _row(fit.errors) for name, fit in played.items()}
    mine = played["agent"]
    advantages = {
        name: jackknife(rmse(fit.errors) - rmse(mine.errors), rmse(fit.without) - rmse(mine.without))
        for name, fit in played.items()
        if name != "agent"
    }
    settings = {**settings, "bars": SMILE}
    result = Benchmark(
        title, settings, rows, advantages, columns=CALIBRATION_COLUMNS, advantage_title="its RMSE − agent's [95 %]"
    )
    ours = rows["agent"]
    result.require_advantage(CONSTANT)
    bar = SMILE["RMSE"]
    result.require_at_most(f"RMSE at most {bar}", ours["rmse"], bar, f"{ours['rmse']:.4f} vol points")
    bar = SMILE["largest error"]
    result.require_at_most(f"no error above {bar}", ours["worst"], bar, f"{ours['worst']:.3f} vol points")
    _require_paths(result)
    return result


# THE EXOTIC


class PricedExotic(NamedTuple):
    """An exotic in a model, in units of S₀.

    `price` is by an exercise rule found on other paths, so it is not above the model's price but for Monte Carlo error;
    `upper` is by nested simulation and not below it. They are equal where the holder has no choice; `upper` is NaN with
    more than two dates. `floor` is the dearest exercise date alone, 0 where there is no choice.
    """

    price: float
    upper: float
    floor: float
    without: Tensor  # (chunks, 2) price and floor when one chunk of paths is left out, for the jackknife
    vanillas: Calibration


def price_exotic(game: CalibrationGame, step: Step, num_paths: int) -> PricedExotic:
    """Prices of the exotic and errors of the vanillas in a model, on the benchmark's paths."""
    paths = benchmark_paths(game, step, num_paths)
    value = value_exotic(paths)
    vanillas = calibrate(paths.prices, game.volatility_errors)
    upper = value.price
    if is_bermudan(game):
        two = len(game.payoff.exercise_days) == 2
        upper = float(paths.exercises[0].double().mean()) + nested_gain(game, step) if two else math.nan
    return PricedExotic(value.price, upper, value.floor, value.without, vanillas)


def price_bound(game: CalibrationGame, objective: str) -> float | None:
    """The least ("min") or greatest ("max") price over all models that reprice the vanillas of the payoff's days, units
    of S₀; None for a payoff or an objective that has none here. See `envs.optimum.transport`."""
    payoff = game.payoff
    european = isinstance(payoff, ForwardStartCall)
    two = is_bermudan(game) and len(payoff.days) == 2
    if objective == "target" or not (european or two):
        return None
    strikes = () if european else payoff.strikes
    laws = transport.surface_marginals(game.surface, [day * DT for day in payoff.days], strikes, NUM_NODES)
    x = laws.nodes
    if european:
        ratio = x[None, :] / np.maximum(x, x[1])[:, None]
        bounds = transport.payoff_bounds(laws, np.maximum(ratio - payoff.strikes[0], 0.0), (0, len(payoff.days) - 1))
        return bounds.least if objective == "min" else bounds.greatest
    exercise = {i: np.maximum(payoff.sign * (x - k), 0.0) for i, k in enumerate(payoff.strikes)}
    bound = transport.least_bermudan if objective == "min" else transport.greatest_bermudan
    return bound(laws, exercise)


def market_floor(game: CalibrationGame) -> float:
    """The dearest of a Bermudan's Europeans on the market, units of S₀; 0 for other payoffs."""
    if not is_bermudan(game):
        return 0.0
    payoff = game.payoff
    worth = []
    for day, strike in zip(payoff.days, payoff.strikes, strict=True):
        call = float(game.surface.call_price(math.log(strike), day * DT))
        worth.append(call if payoff.sign > 0 else call - 1.0 + strike)
    return max(worth)


def judge_exotic(
    title: str,
    settings: dict,
    game: CalibrationGame,
    played: Mapping[str, PricedExotic],
    learnt: Dependence,
    objective: str,
    target_price: float | None = None,
) -> Benchmark:
    """The verdict on an exotic's model: the vanillas keep their market prices, and the exotic has the price asked for.

    - min, max, of a payoff with a bound and with a path-dependent state: the share of the way from local volatility's
      price to the bound, each above its dearest European, since a model's vanillas are not exactly the market's. A
      Bermudan's price has two sides; the agent's is taken from the worse one, local volatility's from the other.
    - target: the price is the target's, within a bar in vol points of the at-the-money option of the last maturity.
    - a state of (t, S) alone: the price is local volatility's, as localisation leaves no other.

    Args:
        settings: what the report says; `paths` is judged.
        played: `price_exotic` of "agent" and `DUPIRE`.
        objective: min, max or target.
        target_price: units of S₀, for the objective target.
    """
    rows = {name: _exotic_row(game, exotic) for name, exotic in played.items()}
    mine, other = played["agent"], played[DUPIRE]
    saved = jackknife((other.price - mine.price) / BASIS_POINT, (other.without - mine.without)[:, 0] / BASIS_POINT)
    on_t1, on_now = learnt.slopes
    result = Benchmark(
        title,
        {
            **settings,
            "ln m per standard deviation of ln S_t1 and of ln S_t": f"{on_t1:+.3f}, {on_now:+.3f}",
            "mean localised multiplier bends at S_t1 =": learnt.kink,
            "bars": EXOTIC,
        },
        rows,
        {DUPIRE: saved},
        columns={key: title for key, title in EXOTIC_COLUMNS.items() if key in rows["agent"]},
        advantage_title="its price − agent's (bp) [95 %]",
    )
    _require_price(result, game, mine, other, objective, target_price)
    bar = EXOTIC["vanilla RMSE"]
    ours = rows["agent"]
    result.require_at_most(f"vanilla RMSE at most {bar}", ours["rmse"], bar, f"{ours['rmse']:.4f} vol points")
    if is_bermudan(game):
        above = ours["price"] - ours["floor"]
        result.require_at_least("not below the dearest European", above, 0, f"{above:+.3f} bp")
    _require_paths(result)
    return result


def _require_price(
    result: Benchmark,
    game: CalibrationGame,
    mine: PricedExotic,
    other: PricedExotic,
    objective: str,
    target_price: float | None,
) -> None:
    """Adds the criterion of the exotic's price, see `judge_exotic`; `other` is local volatility's."""
    unit = game.exotic_unit
    if game.is_local:
        bar = EXOTIC["local, off local volatility's price"]
        off = abs(mine.price - other.price) / unit
        result.require_at_most(f"price is local volatility's, within {bar} vol points", off, bar, f"{off:.3f}")
    elif objective == "target":
        bar = EXOTIC["off the target"]
        off = (mine.price - target_price) / unit
        result.require_at_most(f"price within {bar} vol points of the target", abs(off), bar, f"{off:+.4f}")
        if "upper" in result.rows["agent"]:
            result.remarks.append(
                f"its upper bound is {(mine.upper - target_price) / unit:+.4f} vol points off the target"
            )
    else:
        _require_way(result, game, mine, other, objective)


def _exotic_row(game: CalibrationGame, exotic: PricedExotic) -> dict[str, float]:
    """A model's row in the table; without what its payoff does not have."""
    row = {"price": exotic.price / BASIS_POINT}
    if is_bermudan(game):
        if not math.isnan(exotic.upper):
            row["upper"] = exotic.upper / BASIS_POINT
        row["floor"] = exotic.floor / BASIS_POINT
        prices = torch.tensor([exotic.price, exotic.floor], dtype=torch.float64)
        row["switch_value"] = float(switch_values(game, prices))
    return row | _row(exotic.vanillas.errors)


def _require_way(
    result: Benchmark, game: CalibrationGame, mine: PricedExotic, other: PricedExotic, objective: str
) -> None:
    """Adds the share of the way from local volatility to the bound, and its criterion, see `judge_exotic`."""
    bound = price_bound(game, objective)
    if bound is None:
        return
    goal = bound - market_floor(game)
    over = [exotic.price - exotic.floor for exotic in (mine, other)]
    without = [exotic.without[:, 0] - exotic.without[:, 1] for exotic in (mine, other)]
    share = jackknife((over[1] - over[0]) / (over[1] - goal), (without[1] - without[0]) / (without[1] - goal))
    # The bound of the price on the side that does the agent no favour
    doubt = mine.upper - mine.price if objective == "min" else other.upper - other.price
    least = share.low - (0.0 if math.isnan(doubt) else max(doubt, 0.0) / abs(over[1] - goal))
    result.settings["bound of all models (bp)"] = bound / BASIS_POINT
    result.shares["way to the bound of all models"] = share
    bar = EXOTIC["way to the bound"]
    if game.state_kind == "path-dependent" and objective == "min":
        result.require_at_least(f"{100 * bar:g} % of the way to the bound", least, bar, f"at least {100 * least:.1f} %")


# STOCHASTIC LOCAL VOLATILITY


def judge_slv(
    title: str,
    settings: dict,
    game: CalibrationGame,
    vanillas: Mapping[str, Calibration],
    forward: Mapping[str, Calibration],
    dynamics: Mapping[str, VolatilityDynamics],
) -> Benchmark:
    """The verdict on a stochastic local volatility: the forward-start options and the vanillas are on the market.

    Args:
        settings: what the report says; `paths` is judged.
        vanillas, forward, dynamics: by model, "agent" and `DUPIRE` among them.
    """

    def size(errors: Tensor) -> Tensor:
        return errors.square().mean((-1, -2)).sqrt()

    rows = {
        name: {
            "forward_rmse": float(size(fit.errors)),
            "forward_worst": float(fit.errors.abs().max()),
            **_row(vanillas[name].errors),
            **dynamics[name]._asdict(),
        }
        for name, fit in forward.items()
    }
    mine = forward["agent"]
    advantages = {
        name: jackknife(size(fit.errors) - size(mine.errors), size(fit.without) - size(mine.without))
        for name, fit in forward.items()
        if name != "agent"
    }
    truth = heston_dynamics(game)
    settings = {**settings, "true η, ρ": f"{truth.eta:.3f}, {truth.rho:.3f}", "bars": SLV}
    result = Benchmark(
        title, settings, rows, advantages, columns=SLV_COLUMNS, advantage_title="its forward RMSE − agent's [95 %]"
    )
    result.remarks.append(f"η and ρ of the model that the prices are of: {truth.eta:.3f}, {truth.rho:.3f}")
    ours = rows["agent"]
    result.require_advantage(DUPIRE)
    bar = SLV["largest forward-start error"]
    worst = ours["forward_worst"]
    result.require_at_most(f"no forward-start error above {bar}", worst, bar, f"{worst:.3f} vol points")
    bar = SLV["vanilla RMSE"]
    result.require_at_most(f"vanilla RMSE at most {bar}", ours["rmse"], bar, f"{ours['rmse']:.4f} vol points")
    _require_paths(result)
    return result


def _require_paths(result: Benchmark) -> None:
    paths = result.settings["paths"]
    result.require(f"has {MIN_PATHS:,} paths or more", paths >= MIN_PATHS, f"{paths:,}")
