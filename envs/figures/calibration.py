"""Figures of calibration (phase 0)."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.image import AxesImage

from envs.benchmark.calibration import CONSTANT, DUPIRE, Calibration, rmse
from envs.benchmark.report import Benchmark
from envs.calibration.exotic import Dependence
from envs.calibration.game import FIRST_JUDGED, STRIKES, CalibrationGame
from envs.calibration.marlvol import Marlvol
from envs.figures import style
from envs.figures.style import AGENT, BASELINE, OPTIMUM, OTHER
from envs.run.files import read_metrics

Tensor = torch.Tensor


def calibration_report(
    folder: Path, game: CalibrationGame, result: Benchmark, played: Mapping[str, Calibration], market: Marlvol
) -> None:
    """The figures of a calibrated smile: smiles, local volatility, and training if the folder has a metrics.csv."""
    title = result.title
    curve = read_metrics(folder / "metrics.csv")
    if curve:
        colours = {CONSTANT: BASELINE, DUPIRE: OPTIMUM}
        levels = {name: (result.rows[name]["rmse"], colour) for name, colour in colours.items()}
        calibration_curve(folder / "learning_curve.png", curve, levels, f"{title}: training")
    continuum_of_smiles(folder / "smiles.png", game, played, title)
    learnt_local_volatility(folder / "local_volatility.png", market, title)


def calibration_curve(path: Path, curve: list[dict], levels: Mapping[str, tuple[float, str]], title: str) -> None:
    """RMSE during training beside the levels (label → level, colour) of models that do not learn."""
    figure, axes = style.new()
    steps = [row["global_step"] / 1e6 for row in curve]
    error = [row["charts/rmse"] for row in curve]
    worst = [row["charts/max_error"] for row in curve]
    axes.semilogy(steps, error, color=AGENT, marker=".", label="agent (mean action): RMSE")
    axes.semilogy(steps, worst, color=AGENT, linestyle=":", linewidth=1, label="agent: largest error")
    for label, (level, colour) in levels.items():
        axes.axhline(level, color=colour, linestyle="--", label=f"{label}: RMSE {level:.3f}")
    axes.set(title=title, xlabel="player steps (millions)", ylabel="error of implied volatility (vol points)")
    style.legend(axes)
    style.save(figure, path)


def continuum_of_smiles(path: Path, game: CalibrationGame, played: Mapping[str, Calibration], title: str) -> None:
    """The smiles of market and models, as the paper's figure 1, and the errors of agent and Dupire everywhere."""
    figure, panels = style.new(1, 3, (17, 5), gridspec_kw={"width_ratios": (1.6, 1, 1)})
    _smile_panel(panels[0], game, played)
    for axis, name in zip(panels[1:], ("agent", DUPIRE), strict=True):
        image = _error_panel(axis, game, played[name].errors, name)
    panels[1].set_ylabel("maturity (trading days)")
    figure.colorbar(image, ax=panels[1:], label="model − market (vol points)")
    figure.suptitle(f"{title}: the continuum of smiles", y=1.04)
    style.save(figure, path)


def _smile_panel(axis: Axes, game: CalibrationGame, played: Mapping[str, Calibration]) -> None:
    """Implied volatilities of six maturities: the market's as lines, the models' as marks."""
    maturities = game.days.tolist()
    shown = sorted({day for day in (7, 14, 21, 30, 40, game.num_days) if day <= game.num_days})
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(shown)))
    for day, colour in zip(shown, colours, strict=True):
        i = maturities.index(day)
        strike = game.strike[i].cpu().numpy()
        market = 100 * game.market_volatility[i].cpu().numpy()
        axis.plot(strike, market, color=colour, label=f"day {day}")
        axis.plot(strike, market + played["agent"].errors[i].numpy(), "o", color=colour, markersize=4)
        axis.plot(strike, market + played[DUPIRE].errors[i].numpy(), "x", color=colour, markersize=4, alpha=0.6)
    axis.plot([], [], "ko", markersize=4, label="agent")
    axis.plot([], [], "kx", markersize=4, label=DUPIRE)
    axis.set(
        title="smiles of the market (lines) and of the models (marks)",
        xlabel="strike / spot",
        ylabel="implied volatility (%)",
    )
    style.legend(axis, ncols=2)


def _error_panel(axis: Axes, game: CalibrationGame, errors: Tensor, name: str) -> AxesImage:
    """Heat map of a model's errors (days, strikes), vol points; the line is where the verdict begins."""
    first, *_, last = game.days.tolist()
    half = float(STRIKES[1] - STRIKES[0]) / 2  # of a cell
    extent = (float(STRIKES[0]) - half, float(STRIKES[-1]) + half, last + 0.5, first - 0.5)
    image = axis.imshow(errors.numpy(), aspect="auto", extent=extent, cmap="RdBu", vmin=-0.4, vmax=0.4)
    axis.axhline(FIRST_JUDGED - 0.5, color="black", linewidth=0.8, linestyle="--")
    axis.set_title(f"{name}\nRMSE {float(rmse(errors)):.3f} below the line")
    axis.set_xlabel("ln(strike / spot) (standard deviations)")
    axis.grid(False)
    return image


def learnt_local_volatility(path: Path, market: Marlvol, title: str) -> None:
    """The learnt √E[σ_t²|S_t] beside Dupire's local volatility of the same smile, where 99 % of the paths are."""
    figure, axes = style.new()
    game = market.game
    shown = [day for day in (5, 15, 30, game.num_days - 1) if day < game.num_days]
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.85, len(shown)))
    for day, colour in zip(shown, colours, strict=True):
        t = day * game.steps_per_day
        log_spot = torch.linspace(-2.6, 2.0, 93) * game.grid.scale[t]
        spot = log_spot.exp()
        learnt = 100 * market.typical_variance(torch.tensor(t * market.substeps), spot).sqrt()
        dupire = 100 * game.grid.lookup(game.local_volatility[t][None], t, log_spot[None])[0]
        axes.plot(spot, learnt, color=colour, label=f"day {day}")
        axes.plot(spot, dupire, "--", color=colour, linewidth=1)
    axes.plot([], [], "k-", label="learnt")
    axes.plot([], [], "k--", linewidth=1, label="Dupire")
    axes.set(title=f"{title}: local volatility", xlabel="spot / initial spot", ylabel="volatility (%)")
    style.legend(axes)
    style.save(figure, path)


def exotic_report(
    folder: Path,
    game: CalibrationGame,
    result: Benchmark,
    played: Mapping[str, Calibration],
    learnt: Dependence,
    beside: str | None,
) -> None:
    """The figures of an exotic: the vanillas, what volatility depends on, and the price during training.

    Args:
        folder: of the run; without a metrics.csv in it the price during training is not drawn.
        beside: folder of another run, whose price is drawn too.
    """
    title = result.title
    curves = {"this run": read_metrics(folder / "metrics.csv")}
    if beside is not None:
        curves[Path(beside).name] = read_metrics(Path(beside) / "metrics.csv")
    if curves["this run"]:
        exotic_training(folder / "learning_curve.png", curves, result, title)
    vanilla_smiles(folder / "vanillas.png", game, played, title)
    learnt_dependence(folder / "learnt_dependence.png", learnt, title)


def exotic_training(path: Path, curves: Mapping[str, list[dict]], result: Benchmark, title: str) -> None:
    """The exotic's price (label → rows of a metrics.csv) beside local volatility's and the dearest European's."""
    figure, axes = style.new()
    for (label, curve), colour in zip(curves.items(), (AGENT, OTHER), strict=False):
        steps = [row["global_step"] / 1e6 for row in curve]
        axes.plot(steps, [1e4 * row["charts/exotic_price"] for row in curve], color=colour, marker=".", label=label)
    dupire = result.rows[DUPIRE]["price"]
    floor = result.rows["agent"].get("floor")  # a European payoff has none
    axes.axhline(dupire, color=BASELINE, linestyle="--", label=f"{DUPIRE}: {dupire:.1f}")
    if floor is not None:
        axes.axhline(floor, color="black", linestyle=":", label=f"dearest European: {floor:.1f}")
    axes.set(
        title=f"{title}: price during training",
        xlabel="player steps (millions)",
        ylabel="price (bp of the spot)",
    )
    style.legend(axes)
    style.save(figure, path)


def slv_report(
    folder: Path,
    game: CalibrationGame,
    result: Benchmark,
    played: Mapping[str, Calibration],
    forward: Mapping[str, Tensor],
) -> None:
    """The figures of a stochastic local volatility: forward smiles, vanillas, and training.

    Args:
        folder: of the run; without a metrics.csv in it the training is not drawn.
        forward: by model, errors (starts, strikes) of the forward-start options, vol points.
    """
    title = result.title
    curve = read_metrics(folder / "metrics.csv")
    if curve:
        figure, axes = style.new()
        steps = [row["global_step"] / 1e6 for row in curve]
        forward_rmse = [row["charts/forward_rmse"] for row in curve]
        axes.semilogy(steps, forward_rmse, color=AGENT, marker=".", label="agent (mean action): forward starts")
        axes.semilogy(steps, [row["charts/rmse"] for row in curve], color=OTHER, label="agent: vanillas")
        level = result.rows[DUPIRE]["forward_rmse"]
        axes.axhline(level, color=BASELINE, linestyle="--", label=f"{DUPIRE}: forward starts {level:.3f}")
        axes.set(title=f"{title}: training", xlabel="player steps (millions)", ylabel="RMSE (vol points)")
        style.legend(axes)
        style.save(figure, folder / "learning_curve.png")
    forward_smiles(folder / "forward_smiles.png", game, forward, title)
    vanilla_smiles(folder / "vanillas.png", game, played, title)


def forward_smiles(path: Path, game: CalibrationGame, forward: Mapping[str, Tensor], title: str) -> None:
    """The smiles that forward-start options are worth, a panel for each start: target, local volatility, agent."""
    figure, panels = style.new(1, len(game.forward_days), (5 * len(game.forward_days), 5), squeeze=False)
    for i, (axis, (start, end)) in enumerate(zip(panels[0], game.forward_days, strict=True)):
        strike = game.forward_strike[i].cpu().numpy()
        market = 100 * game.forward_volatility[i].cpu().numpy()
        axis.plot(strike, market, color="black", label="target")
        for name, mark, colour in (("agent", "o", AGENT), (DUPIRE, "x--", BASELINE)):
            axis.plot(strike, market + forward[name][i].numpy(), mark, color=colour, label=name)
        axis.set(title=f"days {start} to {end}", xlabel="strike of S_T/S_start", ylabel="implied volatility (%)")
        style.legend(axis)
    figure.suptitle(f"{title}: forward-start options")
    figure.tight_layout()
    style.save(figure, path)


def sensitivity(
    path: Path, sizes: Sequence[float], curves: Mapping[str, Sequence[float]], labels: tuple[str, str], title: str
) -> None:
    """One or more measures (name → values) against a size that is varied, both on logarithmic axes.

    Args:
        labels: of the axes.
    """
    figure, axes = style.new()
    for (name, values), colour in zip(curves.items(), (AGENT, BASELINE), strict=False):
        axes.loglog(sizes, values, color=colour, marker="o", label=name)
    axes.set(title=title, xlabel=labels[0], ylabel=labels[1])
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.minorticks_off()
    style.legend(axes)
    style.save(figure, path)


def vanilla_smiles(path: Path, game: CalibrationGame, played: Mapping[str, Calibration], title: str) -> None:
    """The vanilla smiles of the game's first date and last day, market and models: the paper's figure 2."""
    figure, panels = style.new(1, 2, (12, 5))
    maturities = game.days.tolist()
    for axis, day in zip(panels, (game.payoff.days[0], game.payoff.days[-1]), strict=True):
        day = max(day, maturities[0])
        i = maturities.index(day)
        strike = game.strike[i].cpu().numpy()
        market = 100 * game.market_volatility[i].cpu().numpy()
        axis.plot(strike, market, color="black", label="market")
        for name, mark, colour in (("agent", "o", AGENT), (DUPIRE, "x", BASELINE)):
            axis.plot(strike, market + played[name].errors[i].numpy(), mark, color=colour, label=name)
        axis.set(title=f"day {day}", xlabel="strike / spot", ylabel="implied volatility (%)")
        style.legend(axis)
    figure.suptitle(f"{title}: the vanillas")
    figure.tight_layout()
    style.save(figure, path)


def learnt_dependence(path: Path, learnt: Dependence, title: str) -> None:
    """What volatility after t1 depends on, as the paper's figures 3 and 4.

    The learnt m and the localised m/√E[m²|S] against ln S_t1 and against ln S_t, and the latter as a surface over both.
    Plain local volatility, the control, is 1 everywhere.
    """
    figure, axes = style.new(2, 3, (17, 8))
    rows = {
        "learnt m": learnt.log_multiplier.exp(),
        "localised m / √E[m² | S_t]": learnt.localised,
    }
    columns = {"ln S_t1": learnt.log_spot_t1, "ln S_t, t > t1": learnt.log_spot}
    for row, (name, values) in zip(axes, rows.items(), strict=True):
        for axis, (xlabel, log_spot) in zip(row, columns.items(), strict=False):
            axis.plot(*_binned(log_spot, values), color=AGENT, marker=".", label="agent, mean over paths and days")
            axis.axhline(1.0, color=BASELINE, linestyle="--", label=DUPIRE)
            axis.set(xlabel=xlabel, ylabel=name)
        row[0].axvline(0.0, color="black", linestyle=":", linewidth=1, label="S_t1 = S_0")
        image = _surface(row[2], learnt.log_spot_t1, learnt.log_spot, values)
        row[2].set(title=name, xlabel="ln S_t1", ylabel="ln S_t, t > t1")
        figure.colorbar(image, ax=row[2])
        for axis in row[:2]:
            style.legend(axis)
    axes[1, 0].axvline(np.log(learnt.kink), color=OPTIMUM, linestyle=":", label=f"bends at {learnt.kink:.3f}")
    style.legend(axes[1, 0])
    figure.suptitle(f"{title}: what the learnt volatility depends on")
    figure.tight_layout()
    style.save(figure, path)


def _surface(axis: Axes, x: Tensor, y: Tensor, values: Tensor):
    """Means of the values in 40 × 40 cells of x and y, all of one shape, between their quantiles 1 % and 99 %."""
    x, y, values = (array.flatten().cpu().numpy() for array in (x, y, values))
    span = [np.quantile(array[:: max(1, len(array) // 200_000)], (0.01, 0.99)) for array in (x, y)]
    total, *edges = np.histogram2d(x, y, 40, span, weights=values)
    count = np.histogram2d(x, y, 40, span)[0]
    mean = np.where(count >= 20, total / np.maximum(count, 1), np.nan)  # fewer are noise
    axis.grid(False)
    return axis.pcolormesh(*edges, mean.T, cmap="viridis")


def _binned(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Means of x and of y, of one shape, in 40 bins of x between its quantiles 1 % and 99 %: (40,) each."""
    x = x.flatten().cpu()
    y = y.flatten().cpu()
    sample = x[:: max(1, len(x) // 200_000)]  # `quantile` takes no more than 16 million
    index = torch.bucketize(x, torch.quantile(sample, torch.linspace(0.01, 0.99, 41)))
    count = torch.bincount(index, minlength=42)[1:-1].clamp(min=1)
    mean_x, mean_y = (torch.bincount(index, value.double(), 42)[1:-1] / count for value in (x, y))
    return mean_x, mean_y
