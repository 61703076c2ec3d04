"""The Bermudan of the calibration game: its value on fresh paths, and what a policy of its task has learnt."""

from typing import NamedTuple

import torch

from envs.calibration.game import DT, EXERCISE_DAY, VALIDATION_PATHS, CalibrationGame, Paths, Step
from envs.calibration.regression import hats, knots_of
from envs.market import black_scholes
from envs.market.units import VOL_POINT
from envs.run.seeds import BENCHMARK_SEED

Tensor = torch.Tensor
NUM_KNOTS = 50  # of the regression that finds the exercise rule

# THE VALUE


class Bermudan(NamedTuple):
    """Values of a Bermudan in a model, in units of S₀; switch values in vol points of the option (t2, k2)."""

    price: float  # out of sample: a lower bound
    price_in_sample: float  # biased upwards
    floor: float  # the higher of the two European prices, a lower bound of the Bermudan's
    switch_value: float
    switch_value_in_sample: float
    without: Tensor  # (chunks,) switch values when one chunk of paths is left out, for the jackknife


def bermudan(game: CalibrationGame, paths: Paths) -> Bermudan:
    """Price of the Bermudan: each half of the chunks is priced with the exercise rule of the other half."""
    at_t1 = paths.log_spot_t1
    exercise = (at_t1.double().exp() - game.strike_t1).clamp(min=0)
    continuation = (paths.log_spot_t2.double().exp() - game.strike_t2).clamp(min=0)
    paid = torch.empty_like(exercise)
    in_sample = torch.empty_like(exercise)
    half = len(at_t1) // 2
    first, second = slice(half), slice(half, None)
    for fitted, priced in ((first, second), (second, first)):
        knots = knots_of(at_t1[fitted], NUM_KNOTS)
        basis = hats(at_t1[fitted].flatten(), knots)
        coefficient = torch.linalg.lstsq(basis.T @ basis, basis.T @ continuation[fitted].flatten()).solution
        in_sample[fitted] = torch.maximum(exercise[fitted], (basis @ coefficient).view_as(exercise[fitted]))
        rule = hats(at_t1[priced], knots) @ coefficient
        paid[priced] = torch.where(exercise[priced] >= rule, exercise[priced], continuation[priced])
    chunks = torch.stack([x.mean(-1) for x in (paid, in_sample, exercise, continuation)])  # (4, chunks)
    mean = chunks.mean(-1)
    without = (chunks.sum(-1, keepdim=True) - chunks) / (chunks.shape[1] - 1)
    price, price_in_sample, *europeans = mean.tolist()
    switch_value, switch_value_in_sample = _switch_values(game, mean).tolist()
    without = _switch_values(game, without)[0].cpu()
    return Bermudan(price, price_in_sample, max(europeans), switch_value, switch_value_in_sample, without)


def _switch_values(game: CalibrationGame, prices: Tensor) -> Tensor:
    """Prices (4, …), Bermudan out of sample and in sample, European (t1, k1) and (t2, k2) → switch values (2, …)."""
    prices = torch.cat((prices[:2], prices[2:].amax(0, keepdim=True)))
    spot = torch.ones_like(prices)
    volatility = black_scholes.implied_volatility(prices, spot, game.strike_t2, game.num_steps * DT) / VOL_POINT
    return volatility[:2] - volatility[2]


# WHAT WAS LEARNT


class Dependence(NamedTuple):
    """What a policy of the Bermudan task has learnt: ln m of each player and step after t1, and what it depends on.

    Attributes:
        log_spot_t1, log_spot, log_multiplier, volatility: (steps, n) ln S_t1, ln S_t, ln m_t and the localised σ_t.
        slopes: of ln m on ln S_t1 and on ln S_t, by least squares, per standard deviation of each.
        kink: S_t1 at which the mean localised volatility, fitted by two lines in ln S_t1, bends; within the middle 80 %
            of the paths.
    """

    log_spot_t1: Tensor
    log_spot: Tensor
    log_multiplier: Tensor
    volatility: Tensor
    slopes: tuple[float, float]
    kink: float


@torch.no_grad()
def learnt_dependence(game: CalibrationGame, step: Step) -> Dependence:
    """Plays a policy once on fresh paths and regresses its volatilities on the spots."""
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
    slopes = _slopes(at_t1, now, multiplier)
    return Dependence(at_t1, now, multiplier, volatility, slopes, _kink(at_t1[0], volatility.double().mean(0)))


def _slopes(at_t1: Tensor, now: Tensor, multiplier: Tensor) -> tuple[float, float]:
    """Least-squares slopes of ln m on ln S_t1 and on ln S_t, (steps, n) each."""
    x = torch.stack([(y - y.mean()) / y.std() for y in (at_t1.flatten(), now.flatten())], -1).double()
    y = (multiplier - multiplier.mean()).flatten().double()
    return tuple(torch.linalg.solve(x.T @ x, x.T @ y).tolist())


def _kink(at_t1: Tensor, volatility: Tensor) -> float:
    """S_t1 where two lines that meet fit the volatility (n,) best as a function of ln S_t1 (n,)."""
    x = at_t1.double()
    low, high = torch.quantile(x, torch.tensor([0.1, 0.9], dtype=x.dtype))
    middle = (x >= low) & (x <= high)
    x = x[middle]
    y = volatility[middle]
    errors = []
    knots = torch.quantile(x, torch.linspace(0.1, 0.9, 81, dtype=x.dtype))
    for knot in knots:
        basis = torch.stack((torch.ones_like(x), x, (x - knot).clamp(min=0)), -1)
        fit = basis @ torch.linalg.solve(basis.T @ basis, basis.T @ y)
        errors.append((y - fit).square().mean())
    return float(knots[torch.stack(errors).argmin()].exp())
