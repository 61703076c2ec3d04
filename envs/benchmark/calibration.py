"""The benchmark of phase 0: a calibrated model on fresh paths, compared with local and constant volatility on them."""

from collections.abc import Mapping
from typing import NamedTuple

import torch

from envs.benchmark.bars import BERMUDAN, MIN_PATHS, SMILE
from envs.benchmark.report import Z95, Benchmark, Estimate
from envs.calibration.bermudan import Dependence, bermudan, learnt_dependence
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
from envs.run.seeds import BENCHMARK_SEED, VALIDATION_SEED

Tensor = torch.Tensor
DUPIRE, CONSTANT = "Dupire local volatility", "constant volatility"
NUM_CHUNKS = 12  # of the paths, for the jackknife
# Key in a model's row → title in the table
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


class Validation:
    """The points of the learning curve: a model on fixed paths, other ones than those of training and benchmark.

    Calling it with a `Step` gives the calibration error of the maturities that are judged; in the Bermudan task the
    price too.
    """

    def __init__(self, game: CalibrationGame):
        self.game = game.like(num_runs=1, num_players=VALIDATION_PATHS // 2, common=True)

    def __call__(self, step: Step) -> dict[str, float]:
        metrics = {}
        if self.game.task == "bermudan":
            value = bermudan(self.game, sample(self.game, step, VALIDATION_PATHS, VALIDATION_SEED))
            metrics["charts/bermudan_price"] = value.price
            metrics["charts/european_floor"] = value.floor
            metrics["charts/switch_value"] = value.switch_value
        play(self.game, step, VALIDATION_SEED)
        errors = judged(self.game.errors()[0])
        metrics["charts/rmse"] = float(errors.square().mean().sqrt())
        if self.game.task == "local-vol":
            metrics["charts/max_error"] = float(errors.abs().max())
        return metrics

    def describe(self, metrics: Mapping[str, float]) -> str:
        """The most important metrics, for a progress bar."""
        error = f"RMSE {metrics['charts/rmse']:.3f} vol points"
        if self.game.task == "local-vol":
            return f"{error}, at most {metrics['charts/max_error']:.2f}"
        return f"switch value {metrics['charts/switch_value']:.2f}, {error}"


# PLAYING


class Calibration(NamedTuple):
    """Errors of a model's prices on fresh paths, in vol points."""

    errors: Tensor  # (days, strikes)
    without: Tensor  # (chunks, days, strikes) when one chunk of paths is left out, for the jackknife


def benchmark_paths(game: CalibrationGame, step: Step, num_paths: int) -> Paths:
    """The benchmark's paths under a model; all models have the same Brownian increments."""
    alone = game.like(num_players=num_paths // NUM_CHUNKS, num_runs=1, reference="none", common=True)
    return sample(alone, step, alone.num_players * NUM_CHUNKS, BENCHMARK_SEED)


def calibrate(game: CalibrationGame, paths: Paths) -> Calibration:
    """Errors of a model's prices on its paths."""
    chunks = len(paths.prices)
    total = paths.prices.sum(0)
    without = game.volatility_errors((total - paths.prices) / (chunks - 1))
    return Calibration(game.volatility_errors(total / chunks).cpu(), without.cpu())


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
    fits = {name: calibrate(game, benchmark_paths(game, step, num_paths)) for name, step in models.items()}
    return judge_smile(title, settings, fits), fits


def bermudan_benchmark(
    *, title: str, settings: Mapping, game: CalibrationGame, models: Mapping[str, Step], num_paths: int
) -> tuple[Benchmark, Dependence]:
    """Plays all models on the same fresh paths and judges the Bermudan of "agent"; also says what "agent" has learnt.

    Args:
        settings: what the report says about the run; the paths, their seed and the strikes are added.
        models: by name, "agent" among them; local volatility is added.
        num_paths: rounded down to a multiple of `NUM_CHUNKS`.
    """
    models = {**models, DUPIRE: CalibrationGame.step_dupire}
    settings = {**settings, **_path_settings(num_paths), "k1": game.strike_t1, "k2": game.strike_t2}
    paths = {name: benchmark_paths(game, step, num_paths) for name, step in models.items()}
    learnt = learnt_dependence(game, models["agent"])
    return judge_bermudan(title, settings, game, paths, learnt), learnt


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
    result.require(f"RMSE at most {bar}", ours["rmse"] <= bar, f"{ours['rmse']:.4f} vol points")
    bar = SMILE["largest error"]
    result.require(f"no error above {bar}", ours["worst"] <= bar, f"{ours['worst']:.3f} vol points")
    _require_paths(result)
    return result


def judge_bermudan(
    title: str, settings: dict, game: CalibrationGame, played: Mapping[str, Paths], learnt: Dependence
) -> Benchmark:
    """The verdict on a Bermudan's model: the vanillas keep their market prices, the price is not below the floor, and
    the switch value is what the state allows.

    - path-dependent: the switch value must be a small share of local volatility's, and volatility must rise with S_t1
      and fall with S_t. The share compares our larger estimate (in sample) with local volatility's smaller one.
    - local, (t, S): the switch value must be local volatility's, as localisation leaves no other.
    - non-path-dependent: no criterion, as σ_{t−1} may or may not carry memory of the path. What was learnt is reported.

    Args:
        settings: what the report says; `paths` is judged.
        played: `benchmark_paths` of "agent" and `DUPIRE`.
    """
    values = {name: bermudan(game, paths) for name, paths in played.items()}
    rows = {}
    for name, value in values.items():
        rows[name] = {
            "price": 1e4 * value.price,
            "floor": 1e4 * value.floor,
            "switch_value": value.switch_value,
            "switch_value_in_sample": value.switch_value_in_sample,
            **_row(calibrate(game, played[name]).errors),
        }
    mine, other = values["agent"], values[DUPIRE]
    saved = jackknife(other.switch_value - mine.switch_value, other.without - mine.without)
    share = jackknife(mine.switch_value / other.switch_value, mine.without / other.without)
    on_t1, on_now = learnt.slopes
    result = Benchmark(
        title,
        {
            **settings,
            "ln m per standard deviation of ln S_t1 and of ln S_t": f"{on_t1:+.3f}, {on_now:+.3f}",
            "mean localised volatility bends at S_t1 =": learnt.kink,
            "bars": BERMUDAN,
        },
        rows,
        {DUPIRE: saved},
        columns=BERMUDAN_COLUMNS,
        advantage_title="its switch value − agent's [95 %]",
    )
    result.shares["switch value, of local volatility's"] = share
    _require_switch_value(result, game, learnt)
    ours = rows["agent"]
    bar = BERMUDAN["vanilla RMSE"]
    result.require(f"vanilla RMSE at most {bar}", ours["rmse"] <= bar, f"{ours['rmse']:.4f} vol points")
    above = ours["price"] - ours["floor"]
    result.require("not below the European floor", above >= 0, f"{above:+.3f} bp")
    _require_paths(result)
    return result


def _require_switch_value(result: Benchmark, game: CalibrationGame, learnt: Dependence) -> None:
    """Adds the criteria of the switch value, see `judge_bermudan`."""
    ours, theirs = result.rows["agent"], result.rows[DUPIRE]
    if game.state_kind == "path-dependent":
        on_t1, on_now = learnt.slopes
        (share,) = result.shares.values()
        bar = BERMUDAN["switch value"]
        upper = max(share.high, ours["switch_value_in_sample"] / theirs["switch_value"])
        name = f"switch value at most {100 * bar:g} % of local volatility's"
        result.require(name, upper <= bar, f"at most {100 * upper:.1f} %")
        result.require("learnt volatility rises with S_t1", on_t1 > 0, f"ln m {on_t1:+.3f} per standard deviation")
        result.require("learnt volatility falls with S_t", on_now < 0, f"ln m {on_now:+.3f} per standard deviation")
    elif game.is_local:
        bar = BERMUDAN["switch value off"]
        off = ours["switch_value"] - theirs["switch_value"]
        result.require(f"switch value is local volatility's, within {bar}", abs(off) <= bar, f"{off:+.3f}")


def _require_paths(result: Benchmark) -> None:
    paths = result.settings["paths"]
    result.require(f"has {MIN_PATHS:,} paths or more", paths >= MIN_PATHS, f"{paths:,}")
