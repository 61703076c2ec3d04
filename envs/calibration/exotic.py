"""The exotic of the calibration game: its value on fresh paths, and what a policy of its task has learnt."""

from typing import NamedTuple

import torch

from envs.calibration.game import DT, VALIDATION_PATHS, CalibrationGame, Paths, State, Step, play
from envs.calibration.regression import hats_of, knots_for
from envs.market import black_scholes
from envs.market.units import VOL_POINT
from envs.run.seeds import BENCHMARK_SEED

Tensor = torch.Tensor
NUM_KNOTS = (50, 6)  # of the regressions that find the exercise rule: in ln S, in each other regressor
NESTED_STATES = 256  # at t1, from which the nested bound simulates
NESTED_PATHS = 8192  # from each of them

# THE VALUE


class Exotic(NamedTuple):
    """Values of an exotic in a model, in units of S₀.

    Attributes:
        price: by an exercise rule found on other paths, so at most the true price but for Monte Carlo error; it is the
            price itself where there is no choice.
        floor: the dearest of the exercise dates alone, at most the price; 0 where there is no choice.
        without: (chunks, 2) price and floor when one chunk of paths is left out, for the jackknife.
    """

    price: float
    floor: float
    without: Tensor


def value_exotic(paths: Paths) -> Exotic:
    """Value of the exotic: each half of the chunks is priced with the exercise rule of the other half."""
    *exercises, last = [x.double() for x in paths.exercises]
    half = len(last) // 2
    parts = (slice(half), slice(half, None))
    paid = [last[part] for part in parts]
    for k in reversed(range(len(exercises))):
        state = [[x[part] for x in paths.regressors[k]] for part in parts]
        rules = [_continuation(x, y) for x, y in zip(state, paid, strict=True)]
        for i, part in enumerate(parts):
            exercise = exercises[k][part]
            paid[i] = torch.where(exercise >= rules[1 - i](state[i]), exercise, paid[i])
    each = torch.stack([x.mean(-1) for x in (torch.cat(paid), *exercises, last)], -1)  # (chunks, 1 + dates)
    without = (each.sum(0) - each) / (len(each) - 1)
    price, floor = _price_and_floor(each.mean(0)).tolist()
    return Exotic(price, floor, _price_and_floor(without).cpu())


def _continuation(regressors: list[Tensor], paid: Tensor):
    """Least squares of `paid` (chunks, n) on the regressors: regressors → expectation."""
    knots = knots_for(regressors, NUM_KNOTS)
    gram = moment = 0.0
    for row, y in zip(zip(*regressors, strict=True), paid, strict=True):  # a chunk at a time, to save memory
        basis = hats_of(row, knots)
        gram = gram + basis.T @ basis
        moment = moment + basis.T @ y
    coefficient = torch.linalg.pinv(gram, hermitian=True) @ moment
    return lambda others: torch.stack([hats_of(row, knots) @ coefficient for row in zip(*others, strict=True)])


def _price_and_floor(means: Tensor) -> Tensor:
    """Means (…, 1 + dates) of the cashflow and of each date's exercise → price and floor (…, 2)."""
    price, *dates = means.unbind(-1)
    floor = torch.stack(dates).amax(0) if len(dates) > 1 else torch.zeros_like(price)
    return torch.stack((price, floor), -1)


def switch_values(game: CalibrationGame, prices: Tensor) -> Tensor:
    """Price and floor (…, 2) of a Bermudan → its switch value (…), vol points of the European of the last date.

    The paper's: the difference of the implied volatilities of the two prices.
    """
    call = game.payoff.sign > 0
    strike = game.payoff.strikes[-1]
    arguments = (torch.ones_like(prices), strike, game.num_days * DT, torch.full_like(prices, call, dtype=torch.bool))
    volatility = black_scholes.implied_volatility(prices, *arguments) / VOL_POINT
    return volatility[..., 0] - volatility[..., 1]


# AN UPPER BOUND


def is_bermudan(game: CalibrationGame) -> bool:
    """Whether the holder has a choice."""
    return len(game.payoff.exercise_days) > 1


@torch.no_grad()
def nested_gain(game: CalibrationGame, step: Step) -> float:
    """What the choice of a Bermudan with two dates is worth above exercise on the first, by nested simulation.

    Units of S₀; not below the true value but for Monte Carlo error.

    From each of many states at t1 fresh paths start, whose mean is an unbiased estimate of the continuation value. So
    E[(estimate − exercise)⁺] ≥ E[(continuation − exercise)⁺], by Jensen (Broadie & Glasserman 1997; with two dates it
    is the dual bound of Andersen & Broadie 2004 too). The spot itself, whose mean is known, is the control variate,
    with the slope of the other half of the paths. The leverage is that of a large game of its own.
    """
    particles = game.like(num_players=VALIDATION_PATHS, num_runs=1, reference="none", common=True)
    play(particles, step, BENCHMARK_SEED)
    leverage = torch.stack(particles.leverages) if particles.leverages else None
    # States at the middles of equally likely intervals of ln S_t1
    order = particles.log_spots[game.t1][0].argsort()
    chosen = order[len(order) // NESTED_STATES // 2 :: len(order) // NESTED_STATES][:NESTED_STATES]
    log_spot = particles.log_spots[game.t1][0, chosen]
    memory = particles.remembered[game.t1 - 1][0, chosen]
    exercise = particles.exercises(particles.num_days)[0][0].double()
    gains = []
    generator = torch.Generator(game.device).manual_seed(BENCHMARK_SEED)
    for start in range(0, NESTED_STATES, 32):  # 32 at a time, to save memory
        part = slice(start, start + 32)
        ahead = _continue(game, step, log_spot[part], memory[part], leverage, generator)
        gains.append((ahead - exercise[chosen[part]]).clamp(min=0))
    return float(torch.cat(gains).mean())


def _continue(
    game: CalibrationGame,
    step: Step,
    log_spot: Tensor,
    memory: Tensor,
    leverage: Tensor | None,
    generator: torch.Generator,
) -> Tensor:
    """Unbiased estimates (m,) of the continuation value at t1 in states (m,) of ln S and of the last ln m."""
    runs = len(log_spot)
    inner = game.like(num_players=NESTED_PATHS, num_runs=runs, reference="none", common=False)
    inner.leverage = leverage
    inner.reset(generator)
    log_spot, memory = (x[:, None].expand(runs, NESTED_PATHS) for x in (log_spot, memory))
    inner.state = State(log_spot, memory, log_spot, memory)
    inner.t = game.t1
    inner.log_spots = [log_spot] * (game.t1 + 1)
    for _ in range(game.t1, game.num_steps):
        step(inner)
    paid = inner.exercises(inner.num_days)[-1].double()
    change = inner.log_spots[-1].double().exp() - log_spot.double().exp()
    estimates = []
    for fitted, priced in ((0, 1), (1, 0)):  # antithetic partners are both even or both odd
        x = change[:, fitted::2]
        slope = ((x - x.mean(-1, keepdim=True)) * paid[:, fitted::2]).mean(-1) / x.var(-1)
        estimates.append(paid[:, priced::2].mean(-1) - slope * change[:, priced::2].mean(-1))
    return sum(estimates) / 2


# WHAT WAS LEARNT


class Dependence(NamedTuple):
    """What a policy of the exotic task has learnt: m of each player and step after t1, and what it depends on.

    Attributes:
        log_spot_t1, log_spot, log_multiplier, localised: (steps, n) ln S_t1, ln S_t, ln m_t and the localised
            multiplier m/√E[m²|S], which is the paper's localised volatility (its figures 3 and 4) and 1 in plain local
            volatility.
        slopes: of ln m on ln S_t1 and on ln S_t, by least squares, per standard deviation of each.
        kink: S_t1 at which the mean localised multiplier, fitted by two lines in ln S_t1, bends; within the middle 80 %
            of the paths.
    """

    log_spot_t1: Tensor
    log_spot: Tensor
    log_multiplier: Tensor
    localised: Tensor
    slopes: tuple[float, float]
    kink: float


@torch.no_grad()
def learnt_dependence(game: CalibrationGame, step: Step) -> Dependence:
    """Plays a policy once on fresh paths and regresses its multipliers on the spots."""
    alone = game.like(num_players=VALIDATION_PATHS, num_runs=1, reference="none", common=True)
    alone.reset(torch.Generator(alone.device).manual_seed(BENCHMARK_SEED))
    columns = []
    for t in range(alone.num_steps):
        before = alone.state
        step(alone)
        if t > alone.t1:
            multiplier = alone.state.log_volatility if alone.action_map != "stochastic" else before.log_volatility
            local = alone.grid.lookup(alone.local_volatility[t][None], t, before.log_spot)
            localised = alone.log_volatilities[-1].exp() / local
            columns.append([x[0].cpu() for x in (before.log_spot_t1, before.log_spot, multiplier, localised)])
    at_t1, now, multiplier, localised = (torch.stack(x) for x in zip(*columns, strict=True))
    slopes = _slopes(at_t1, now, multiplier)
    return Dependence(at_t1, now, multiplier, localised, slopes, _kink(at_t1[0], localised.double().mean(0)))


def _slopes(at_t1: Tensor, now: Tensor, multiplier: Tensor) -> tuple[float, float]:
    """Least-squares slopes of ln m on ln S_t1 and on ln S_t, (steps, n) each."""
    x = torch.stack([(y - y.mean()) / y.std() for y in (at_t1.flatten(), now.flatten())], -1).double()
    y = (multiplier - multiplier.mean()).flatten().double()
    return tuple(torch.linalg.solve(x.T @ x, x.T @ y).tolist())


def _kink(at_t1: Tensor, localised: Tensor) -> float:
    """S_t1 where two lines that meet fit the mean localised multiplier (n,) best as a function of ln S_t1 (n,)."""
    x = at_t1.double()
    low, high = torch.quantile(x, torch.tensor([0.1, 0.9], dtype=x.dtype))
    middle = (x >= low) & (x <= high)
    x = x[middle]
    y = localised[middle]
    errors = []
    knots = torch.quantile(x, torch.linspace(0.1, 0.9, 81, dtype=x.dtype))
    for knot in knots:
        basis = torch.stack((torch.ones_like(x), x, (x - knot).clamp(min=0)), -1)
        fit = basis @ torch.linalg.solve(basis.T @ basis, basis.T @ y)
        errors.append((y - fit).square().mean())
    return float(knots[torch.stack(errors).argmin()].exp())
