"""The market that the flags describe: the model of the underlying, the market of makers, the smile."""

import math
import os
from dataclasses import dataclass
from datetime import date
from itertools import pairwise

import numpy as np

from envs.calibration import quotes
from envs.calibration.game import FIRST_JUDGED, last_day
from envs.calibration.marlvol import Marlvol
from envs.market import smiles
from envs.market.dynamics import GARCH, GBM, Dynamics, Heston, Merton
from envs.market.hedging import Option
from envs.market.history import Bootstrapped, Historical, fit_garch, load_closes
from envs.market.mixture import Mixture, mixed_models
from envs.market.quoting import moneyness_grid
from envs.market.units import TRADING_DAYS
from envs.run.args import check_range, short
from envs.run.errors import UsageError, check
from envs.run.files import load_checkpoint

MOST_DAYS = 504  # trading days to the last maturity of a calibrated smile
MOST_STEPS_PER_DAY = 8  # of the calibration game
FITTED = ("garch", "bootstrap")  # trained on closes
NAMES = ("gbm", "garch", "heston", "merton", "marlvol", "historical")


@dataclass
class ModelArgs:
    """Flags of the model of the underlying. A script's Args add `num_steps`, the steps of an episode."""

    dynamics: str = "gbm"
    """model of the underlying: gbm, garch, heston, merton, marlvol; historical (real closes) with --evaluate only"""
    volatility: float = 0.2
    """annualised volatility of gbm, a decimal"""
    history: str | None = None
    """CSV with columns date and close for garch and historical, or nasdaq; the S&P 500 of 1999–2018 by default"""
    history_end: str | None = None
    """YYYY-MM-DD: garch is fitted on closes up to this day, historical replays the closes after it"""
    marlvol_checkpoint: str | None = None
    """run folder or checkpoint of phase 0, whose market marlvol is"""

    @property
    def models(self) -> list[str]:
        """What --dynamics may be."""
        return [name for name in NAMES if name != "historical" or self.evaluate]

    def check(self) -> None:
        """Raises UsageError for the first argument that cannot work."""
        super().check()
        hint = "" if self.evaluate else "; historical with --evaluate"
        known = f"one of {', '.join(self.models)}{hint}"
        check(self.dynamics in self.models, f"--dynamics is {self.dynamics!r} ({known})")
        calibrated = self.dynamics == "marlvol"
        named = self.marlvol_checkpoint is not None
        check(named or not calibrated, "--dynamics marlvol needs --marlvol-checkpoint, a run of phase 0")
        check(calibrated or not named or self.evaluate, "--marlvol-checkpoint needs --dynamics marlvol")
        fitted = self.dynamics in FITTED or self.evaluate
        check(fitted or not (self.history or self.history_end), "--history and --history-end need --dynamics garch")
        day_of(self.history_end)
        check_range(self, 1, 2520, "num_steps")
        check_range(self, 1e-3, 10, "volatility")
        most = 3 / math.sqrt(self.num_steps / TRADING_DAYS)  # beyond, the spot is as good as zero at the end
        check(self.volatility <= most, f"--volatility is {self.volatility} (at most {most:.2g} over --num-steps)")

    def check_model(self, model: Dynamics) -> None:
        """Raises UsageError if the model ends before the options do."""
        last = model.last_step
        check(self.num_steps <= last, f"--num-steps is {self.num_steps} (at most {last}: the smile ends there)")


def day_of(history_end: str | None) -> date:
    """The day that --history-end names; the last of all if it names none.

    Raises:
        UsageError: no day.
    """
    try:
        return date.max if history_end is None else date.fromisoformat(history_end)
    except ValueError:
        raise UsageError(f"--history-end is {history_end!r} (a day, YYYY-MM-DD)") from None


@dataclass
class HedgingArgs(ModelArgs):
    """Flags of the model of the underlying for an agent that hedges."""

    dynamics: str = "gbm"
    """model of the underlying: gbm, garch, heston, merton, marlvol; mixture, where the environments have the first four
    in turn, with parameters of their own; historical (real closes) with --evaluate only"""
    trader_view: bool = False
    """let the agent see what a trader sees, implied and realised volatility and what delta hedging has earned lately,
    in place of the model's variance; always with mixture, where it has to find out which model it is in"""

    @property
    def models(self) -> list[str]:
        """What --dynamics may be."""
        return [*super().models, "mixture"]

    def fill(self) -> None:
        """Fills in the flags whose defaults depend on another flag; called before `check`."""
        super().fill()
        self.trader_view = self.trader_view or self.dynamics == "mixture"


@dataclass
class HestonArgs(ModelArgs):
    """Flags of the model of the underlying where heston is the default."""

    dynamics: str = "heston"
    """model of the underlying: gbm, garch, heston, merton, marlvol; historical (real closes) with --evaluate only"""
    volatility: float = 0.2
    """annualised volatility, a decimal: of gbm, and at the start and in the long run of heston"""
    mean_reversion: float = 4.0
    """speed of heston's mean reversion, per year"""
    vol_of_vol: float = 0.5
    """volatility of heston's variance"""
    correlation: float = -0.7
    """correlation of heston's variance with the spot"""

    def check(self) -> None:
        """Raises UsageError for the first argument that cannot work."""
        super().check()
        check_range(self, 1e-3, 100, "mean_reversion")
        check_range(self, 1e-3, 3, "vol_of_vol")
        check_range(self, -1, 1, "correlation")
        # Beyond, the variance is zero in all but one of a million paths, and rounding loses that one
        most = self.volatility * math.sqrt(2e6 * self.mean_reversion)
        allowed = f"at most {most:.2g} with this --volatility and --mean-reversion"
        check(self.dynamics != "heston" or self.vol_of_vol <= most, f"--vol-of-vol is {self.vol_of_vol} ({allowed})")


@dataclass
class QuotingArgs(HestonArgs):
    """Flags of a market of makers (`QuotingEnv`)."""

    num_steps: int = 60
    """steps of an episode, half a trading day each (garch, historical: a day)"""
    moneyness: tuple[float, ...] = (-1.0, -0.5, 0.0, 0.5, 1.0)
    """strikes of each expiry T, increasing: z of 100 · exp(z · 0.2 · √T); puts below 0, calls from there up"""
    expiries: tuple[int, ...] | None = None
    """steps to the options' expiries, increasing, each at least --num-steps; by default one, twice --num-steps"""
    num_makers: int = 2
    """makers in the market"""
    arrival_rate: float = 0.5
    """mean number of takers a step who want to buy (and to sell) each option"""
    flow_sd: float = 0.5
    """standard deviation of the order flow's imbalance: takers come at arrival_rate × (1 ± imbalance)"""
    choice_sensitivity: float = 2.0
    """k of the takers' logit choice, per vol point: the larger, the more the best price takes all"""
    informed_share: float = 0.2
    """share of the takers who compare quotes with the fair value; the others compare them with Black–Scholes"""
    toxic_share: float = 0.0
    """share of the takers who know the variance of the next step, too, and what options will be worth at it"""
    cost_rate: float = 5e-4
    """proportional cost of hedging per unit of currency traded (5e-4 = 5 bp)"""
    risk_aversion: float = 1.0
    """weight of ½ΔW² in the reward, 1/currency"""
    privileged: bool = False
    """let the agent see its rivals' vegas and positions (for study)"""

    def market(self) -> dict[str, float]:
        """The settings of `QuotingEnv` by name, but for the options."""
        names = (
            "num_makers", "num_steps", "arrival_rate", "flow_sd", "choice_sensitivity", "informed_share", "toxic_share",
            "cost_rate", "risk_aversion", "privileged",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}

    @property
    def expiry_steps(self) -> tuple[int, ...]:
        """Steps to the options' expiries."""
        return (2 * self.num_steps,) if self.expiries is None else self.expiries

    def options(self, dt: float) -> list[Option]:
        """The options that are quoted, where a step is `dt` years."""
        return moneyness_grid(self.moneyness, self.expiry_steps, dt)

    def described(self) -> dict:
        """The flags that make a market another one, for the report."""
        model = ("dynamics", "volatility", "mean_reversion", "vol_of_vol", "correlation")
        options = {"moneyness": self.moneyness, "expiries": self.expiry_steps}
        return {name: getattr(self, name) for name in model} | options | self.market()

    def check_model(self, model: Dynamics) -> None:
        """Raises UsageError if the model ends before the options do."""
        last = model.last_step
        if self.expiries is None:
            allowed = f"at most {last // 2}: options expire after twice that, and the smile ends"
            check(2 * self.num_steps <= last, f"--num-steps is {self.num_steps} ({allowed})")
        end = self.expiry_steps[-1]
        check(end <= last, f"--expiries ends at {end} (at most {last}, where the smile ends)")

    def check(self) -> None:
        """Raises UsageError for the first argument that cannot work."""
        super().check()
        check_range(self, 2, 16, "num_makers")
        check_range(self, 0, 20, "arrival_rate", open_low=True)
        check_range(self, 0, 10, "flow_sd")
        check_range(self, 0, 1e6, "choice_sensitivity", open_low=True)
        check_range(self, 0, 1, "informed_share")
        most = 1.0 - self.informed_share
        allowed = f"at least 0, at most {short(most)}, what --informed-share leaves"
        check(0 <= self.toxic_share <= most + 1e-6, f"--toxic-share is {self.toxic_share} ({allowed})")
        for flag, values in (("--moneyness", self.moneyness), ("--expiries", self.expiry_steps)):
            increasing = len(values) > 0 and all(a < b for a, b in pairwise(values))
            check(increasing, f"{flag} is {' '.join(short(x) for x in values) or 'empty'} (one or more, increasing)")
        for z in self.moneyness:
            check(abs(z) <= 5, f"--moneyness has {z:g} (at least -5, at most 5)")
        first, last = self.expiry_steps[0], self.expiry_steps[-1]
        check(first >= self.num_steps, f"--expiries begins at {short(first)} (at least --num-steps = {self.num_steps})")
        check(last <= 2520, f"--expiries ends at {short(last)} (at most 2520)")
        number = len(self.moneyness) * len(self.expiry_steps)
        check(number <= 100, f"--moneyness × --expiries are {number} options (at most 100)")
        check_range(self, 0, 0.5, "cost_rate")
        check_range(self, 0, 1e3, "risk_aversion")


@dataclass
class SmileArgs:
    """Flags of the option smile that phase 0 calibrates to."""

    smile: str = "sp500-2018"
    """sp500-2018, sp500-2018-slices, sp500-2024, heston (a model's, with its forward-start options), or a CSV: maturity
    (years), strike, implied_volatility (decimal)"""
    heston: tuple[float, float, float, float, float] = (0.04, 0.04, 4.0, 0.5, -0.7)
    """of --smile heston: variance at the start and in the long run, speed of mean reversion, volatility of variance,
    correlation with the spot"""
    smile_spot: float = 1.0
    """spot (or forward) that the strikes of a CSV belong to"""
    allow_arbitrage: bool = False
    """calibrate to a CSV with static arbitrage all the same"""
    num_steps: int | None = None
    """trading days to the last maturity that is fitted; by default 51, or as many as the smile has"""

    def check(self) -> None:
        """Raises UsageError for the first argument that cannot work."""
        super().check()
        check_range(self, 0, math.inf, "smile_spot", open_low=True)
        if self.num_steps is not None:
            check_range(self, FIRST_JUDGED + 1, MOST_DAYS, "num_steps")
        check(self.smile == "heston" or self.heston == SmileArgs.heston, "--heston is for --smile heston")
        own = self.smile not in smiles.SURFACES
        check(own or self.smile_spot == 1.0, "--smile-spot is for a --smile from a CSV")
        check(own or not self.allow_arbitrage, "--allow-arbitrage is for a --smile from a CSV")


def make_surface(args: SmileArgs) -> tuple[smiles.Surface, list[quotes.Fit]]:
    """The smile that the flags name, or one fitted to a CSV, and how well it fits.

    Raises:
        UsageError: unusable data.
    """
    fits = []
    surface = smiles.SURFACES.get(args.smile)
    if args.smile == "heston":
        surface = make_heston_surface(args.heston)
    if surface is None:
        names = ", ".join(smiles.SURFACES)
        check(os.path.isfile(args.smile), f"--smile is {args.smile!r} (one of {names}, or a CSV file)")
        try:
            surface, fits = quotes.load(args.smile, args.smile_spot, args.allow_arbitrage)
        except ValueError as error:
            where = "" if args.smile in str(error) else f"{args.smile}: no smile can be fitted to it, "
            raise UsageError(f"{where}{error}") from None
    last = last_day(surface)
    shortest = FIRST_JUDGED + 1
    check(last >= shortest, f"--smile is {args.smile}, which ends after {last} days (at least {shortest})")
    return surface, fits


def make_heston_surface(parameters: tuple[float, ...]) -> smiles.HestonSurface:
    """The smiles of Heston's model with these parameters, in the order of `HestonSurface`.

    Raises:
        UsageError: a parameter outside its range.
    """
    ranges = ((1e-4, 1), (1e-4, 1), (1e-3, 100), (1e-3, 3), (-1, 1))
    for value, (low, high) in zip(parameters, ranges, strict=True):
        check(low <= value <= high, f"--heston has {value:g} (at least {low:g}, at most {high:g})")
    try:
        return smiles.HestonSurface(*parameters)
    except ValueError as error:
        raise UsageError(f"--heston: {error}") from None


def make_model(args: ModelArgs, dt: float = 1 / TRADING_DAYS) -> Dynamics:
    """The model of the underlying that the flags describe.

    Args:
        dt: years of a step; garch and historical have their own, a trading day.

    Raises:
        UsageError: unusable data, or more steps than the model has.
    """
    try:
        model = _make_model(args, dt)
    except ValueError as error:
        raise UsageError(str(error)) from None
    args.check_model(model)
    return model


def _make_model(args: ModelArgs, dt: float) -> Dynamics:
    if args.dynamics == "gbm":
        return GBM(args.volatility, dt)
    if args.dynamics == "heston":
        if not isinstance(args, HestonArgs):
            return Heston(dt=dt)
        variance = args.volatility**2
        return Heston(variance, variance, args.mean_reversion, args.vol_of_vol, args.correlation, dt)
    if args.dynamics == "merton":
        return Merton(dt=dt)
    if args.dynamics == "mixture":
        return Mixture(mixed_models(dt))
    if args.dynamics == "marlvol":
        return load_market(args.marlvol_checkpoint, dt)
    if args.dynamics not in (*FITTED, "historical"):
        raise ValueError(f"unknown dynamics {args.dynamics!r} (one of {', '.join(NAMES)})")
    return _model_of_closes(args.history, day_of(args.history_end), args.num_steps, args.dynamics)


def _model_of_closes(path: str | None, last: date, num_steps: int, name: str) -> GARCH | Bootstrapped | Historical:
    """garch fitted to the closes up to the day `last`; windows of these closes (bootstrap), or of those after it
    (historical).

    Raises:
        ValueError: unusable data, or fewer than twelve episodes to replay: no interval means anything then.
    """
    dates, closes = load_closes(path)
    source = path or "S&P 500"
    in_sample = dates <= np.datetime64(last)
    try:
        garch = fit_garch(closes[in_sample])
    except ValueError as error:
        until = "" if last == date.max else f" until {last}"
        hint = "try other --history or --history-end, or --dynamics heston"
        raise ValueError(f"closes of {source}{until}: {error}; {hint}") from None
    if name == "garch":
        return garch
    if name == "bootstrap":
        before = int(in_sample.sum())  # enough for garch, but perhaps not for these episodes
        if before < 12 * num_steps:
            allowed = f"at least {12 * num_steps}, twelve episodes"
            raise ValueError(f"bootstrap draws from the closes until --history-end: there are {before} ({allowed})")
        return Bootstrapped(closes[in_sample], garch, dates=dates[in_sample], source=source)
    after = int((~in_sample).sum())
    if after < 12 * num_steps:  # six blocks of the bootstrap around its mean
        allowed = f"at least {12 * num_steps}, twelve episodes"
        raise ValueError(f"historical replays the closes after --history-end: there are {after} ({allowed})")
    # The last close of the fitting period opens the first window: its return belongs to the evaluation.
    first = int(in_sample.sum()) - 1
    return Historical(closes[first:], garch, warm_up=closes[: first + 1], dates=dates[first:], source=source)


def load_market(path: str, dt: float = 1 / TRADING_DAYS) -> Marlvol:
    """The market of a run of phase 0: its folder or checkpoint.

    Raises:
        ValueError: not a checkpoint of phase 0, or one whose market does not fit.
    """
    content = load_checkpoint(path, "phase0")
    if "market" not in content:
        raise ValueError(f"{path}: the run has not been finished, so there is no market in it (--resume)")
    market = content["market"]
    check(_of_known_size(market), f"{path}: does not fit this script, its market is of another kind")
    try:
        return Marlvol(market, dt)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _of_known_size(market) -> bool:
    """Whether a saved market has as many players, days and maturities as phase 0 makes: memory is taken for each."""
    try:
        game, surface = market["game"], market["surface"]
        per_day = game.get("steps_per_day", 1)  # a market of before says nothing of it
        same = game.keys() | {"steps_per_day"} == {"num_steps", "steps_per_day", "task", "state", "action_map"}
        whole = type(game["num_steps"]) is int and type(per_day) is int and 1 <= per_day <= MOST_STEPS_PER_DAY
        few = game["num_steps"] <= MOST_DAYS * per_day and len(surface.get("maturities", [])) <= MOST_DAYS
        return same and whole and few
    except (AttributeError, KeyError, TypeError):
        return False


def check_options(args: QuotingArgs, trained: QuotingArgs) -> None:
    """Raises `UsageError` if the agent was trained with another number of options."""
    for name, known, new in (
        ("--moneyness has", len(trained.moneyness), len(args.moneyness)),
        ("--expiries has", len(trained.expiry_steps), len(args.expiry_steps)),
    ):
        check(known == new, f"{name} {new}, but the agent was trained with {known}: it quotes other options")


def check_unseen(args: ModelArgs, trained: ModelArgs) -> None:
    """Raises `UsageError` if an agent would be evaluated on real closes that it was trained on."""
    if args.dynamics == "historical" and trained.dynamics in FITTED:
        seen = trained.history_end
        known = seen is not None and trained.history == args.history
        apart = known and day_of(seen) <= day_of(args.history_end)
        until = f"closes of {trained.history or 'the S&P 500'} until {seen or 'their end'}"
        check(apart, f"--history-end is {args.history_end}, but the agent was trained on {until}")
