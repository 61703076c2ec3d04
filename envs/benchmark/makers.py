"""The classical makers, tuned: the rivals of an agent that quotes, and what it has to beat in its seat."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from envs.baselines import makers as formulas
from envs.benchmark.contest import play, tune
from envs.market.hedging import Policy
from envs.market.moves import StepMoves
from envs.market.quoting import QuotingEnv
from envs.market.rivals import AgainstRivals
from envs.optimum.makers import MultiAsset, VegaProgramming
from envs.run.errors import UsageError
from envs.run.seeds import TUNING_SEED

AVELLANEDA_STOIKOV = "Avellaneda–Stoikov, tuned"  # the baseline that the user named, hedged at the Black–Scholes delta
CONSTANT_SPREAD, GLFT = "constant spread, tuned", "GLFT, tuned"
BELIEVER_BAND = "GLFT, min-variance band, tuned"  # the strongest that believes in Black–Scholes
AS_SMILE = "Avellaneda–Stoikov with the smile, tuned"
GLFT_SMILE = "GLFT with the smile, tuned"
MULTI_ASSET = "multi-asset closed form, tuned"
VEGA_DP = "dynamic programming, tuned"
KNOWING = (AS_SMILE, GLFT_SMILE, MULTI_ASSET, VEGA_DP)  # the model, and so the fair values
BEST_RESPONSE = "best response (exact)"  # without risk aversion and costs
RIVAL = "rival"
RISK_NEUTRAL = 1e-6  # the risk aversion of a formula that divides by it, where there is none
NEVER_HEDGED = 1e3  # half-width of a band, shares
COARSE_TO_FINE = (1.3, 1.08)  # ratios of the grids that parameters are tuned on
RECORDED = Path(__file__).with_name("tuned_makers.json")  # written by benchmarks/tune_makers.py

Parameters = dict[str, tuple[float, ...]]


def classical_maker(name: str, env: AgainstRivals, parameters: Sequence[float], moves: StepMoves) -> Policy:
    """The classical maker of that name, in the seat of `env`; `moves` is what those who know the model know of it."""
    market = env.env
    if name == AVELLANEDA_STOIKOV:
        return formulas.avellaneda_stoikov(market, *parameters)
    if name == CONSTANT_SPREAD:
        return formulas.constant_spread(market, *parameters)
    if name == GLFT:
        return formulas.glft(market, *parameters)
    if name == BELIEVER_BAND:
        return formulas.minimum_variance_band(market, formulas.glft(market, *parameters[:2]), parameters[2])
    risk_aversion, other, share, band = parameters
    if name == AS_SMILE:
        quotes = formulas.avellaneda_stoikov(market, risk_aversion, other)
        return formulas.with_the_smile(market, quotes, moves, share, band)
    if name == GLFT_SMILE:
        quotes = formulas.glft(market, risk_aversion, other)
        return formulas.with_the_smile(market, quotes, moves, share, band)
    if name == MULTI_ASSET:
        return MultiAsset(env, moves, risk_aversion, other, share, band)
    if name == VEGA_DP:
        return VegaProgramming(env, moves, risk_aversion, other, share, band)
    raise ValueError(f"no maker is called {name!r}")


@dataclass
class Makers:
    """The classical makers, tuned, in the market that the agent enters.

    Attributes:
        env: that market from the agent's seat (its `like` has it in any size).
        policies: by name, what an agent has to beat in its seat.
        parameters: by the same names, and the rival's: risk aversion and k (or the multiple of the spread), then the
            share of the way to the fair value and the band in shares, or the rival's multiple of the spread.
        origin: where the parameters come from.
    """

    env: AgainstRivals
    policies: dict[str, Policy]
    parameters: Parameters
    origin: str

    @property
    def imitated(self) -> str:
        """Name of the maker that agents start from: the closed form, or without risk aversion GLFT with the smile."""
        return next(name for name in (MULTI_ASSET, GLFT_SMILE, *self.policies) if name in self.policies)


def against(market: QuotingEnv, policy: Policy) -> AgainstRivals:
    """The market from one seat, with the same policy in all the others."""
    return AgainstRivals(market, [policy] * (market.num_makers - 1))


def against_rival(market: QuotingEnv, parameters: Sequence[float]) -> AgainstRivals:
    """The market from one seat, with the Avellaneda–Stoikov maker of these parameters in all the others."""
    return against(market, formulas.avellaneda_stoikov(market, *parameters))


def tune_rival(market: QuotingEnv) -> tuple[float, float]:
    """Risk aversion and k of the Avellaneda–Stoikov maker that is tuned against makers like itself.

    Tunes one seat against rivals with the parameters found before, until they repeat; six times at most, and then they
    are off by a step or two of the grid.
    """
    start = (max(0.25 * market.risk_aversion, RISK_NEUTRAL), 0.8)
    parameters = start
    rivals = None
    for _ in range(6):
        if parameters == rivals:
            break
        rivals = parameters
        env = against_rival(market, rivals)
        env.reset(seed=TUNING_SEED)
        parameters = _tune(AVELLANEDA_STOIKOV, env, rivals, globally=rivals == start)
    return rivals


def _settled(name: str, market: QuotingEnv) -> dict[int, float]:
    """Parameters whose best value in this market is 0 or ∞, by their place.

    Without risk aversion nothing is hedged that costs anything, and where hedging is free there is no band.
    """
    found = {}
    places = {AVELLANEDA_STOIKOV: 2, CONSTANT_SPREAD: 1, GLFT: 2, BELIEVER_BAND: 3}.get(name, 4)
    if market.risk_aversion == 0 and name != CONSTANT_SPREAD:
        found[0] = RISK_NEUTRAL
    if places > 2 and (market.risk_aversion == 0 or market.cost_rate == 0):
        found[places - 1] = 0.0 if market.cost_rate == 0 else NEVER_HEDGED
    return found


def _tune(
    name: str,
    env: AgainstRivals,
    start: Sequence[float],
    moves: StepMoves | None = None,
    globally: bool = False,
) -> tuple[float, ...]:
    """Parameters of the maker, from `start`; see `_settled` for those that are not searched for.

    Quotes too wide for any trade are a local optimum, so a search can go on `globally`, from the best of eight starts.
    """
    settled = _settled(name, env.env)
    free = [i for i in range(len(start)) if i not in settled]

    def complete(values: Sequence[float]) -> tuple[float, ...]:
        found = {**settled, **dict(zip(free, values, strict=True))}
        return tuple(found[i] for i in range(len(start)))

    def family(*values: float) -> Policy:
        return classical_maker(name, env, complete(values), moves)

    def value(values: Sequence[float]) -> float:
        return play(env, family(*values))["objective_centred"].mean()

    starts = [tuple(start[i] for i in free)]
    if globally and free[0] == 0:
        starts = [(start[0] * x, start[1] * y) for x in (0.25, 1.0, 4.0, 16.0) for y in (0.5, 1.0)]
    best = max(starts, key=value) if len(starts) > 1 else starts[0]
    return complete(tune(env, family, best, COARSE_TO_FINE))


def tune_makers(market: QuotingEnv, start: tuple[float, float], rival: tuple[float, ...]) -> Parameters:
    """Parameters of every classical maker, tuned against `rival` from risk aversion and k of `start`; and rival's."""
    env = against_rival(market, rival)
    env.reset(seed=TUNING_SEED)
    found = {
        RIVAL: rival,
        CONSTANT_SPREAD: _tune(CONSTANT_SPREAD, env, (1.2,)),
        AVELLANEDA_STOIKOV: _tune(AVELLANEDA_STOIKOV, env, start, globally=True),
    }
    found[GLFT] = _tune(GLFT, env, (5.0 * start[0], start[1]), globally=True)
    found[BELIEVER_BAND] = _tune(BELIEVER_BAND, env, (*found[GLFT], 0.15))
    moves = StepMoves(market)
    found[AS_SMILE] = _tune(AS_SMILE, env, (*found[AVELLANEDA_STOIKOV], 0.5, 0.15), moves)
    found[GLFT_SMILE] = _tune(GLFT_SMILE, env, (*found[GLFT], 0.5, 0.15), moves)
    if market.risk_aversion > 0:  # else they are the best response
        for name in (MULTI_ASSET, VEGA_DP):
            found[name] = _tune(name, env, (2.0 * market.risk_aversion, 1.1, 0.8, 0.1), moves)
    return found


def describe(market: QuotingEnv) -> str:
    """The market that parameters are tuned for, in words that are the same on every machine."""
    beside = ("num_envs", "dynamics", "privileged", "device", "dtype")
    settings = {name: value for name, value in market.settings.items() if name not in beside}
    if market.toxic_share == 0:
        del settings["toxic_share"]
    model = ", ".join(f"{name} {value:.4g}" for name, value in market.dynamics.parameters().items())
    parts = [] if type(market) is QuotingEnv else [type(market).__name__]  # a market of one's own is tuned for anew
    parts.append(f"{type(market.dynamics).__name__} ({model})")
    for name, value in settings.items():
        if name == "options":
            options = (f"{option.strike:.5g}{'C' if option.is_call else 'P'}{option.expiry}" for option in value)
            parts.append(f"options {' '.join(options)}")
        else:
            parts.append(f"{name} {value:.4g}")
    return ", ".join(parts)


def classical_makers(
    market: QuotingEnv,
    rival_spread: float = 1.0,
    rival_risk_aversion: float = 1.0,
    known: Parameters | None = None,
    origin: str | None = None,
) -> Makers:
    """The rivals, Avellaneda–Stoikov makers tuned against each other, and every classical maker tuned against them.

    The parameters are those recorded in tuned_makers.json if this market is there, and are tuned now if not.

    Args:
        market: its number of rows is the number of episodes that tuning plays.
        rival_spread, rival_risk_aversion: multiples of the tuned rival's half-spread and risk aversion.
        known, origin: parameters of a run that is resumed, so that it meets the very same makers; None for any other.

    Raises:
        UsageError: `known` are not parameters of these makers.
    """
    if known is not None:
        try:
            return assemble(market, known, origin)
        except (AttributeError, KeyError, TypeError, ValueError):
            raise UsageError("the run to resume does not fit this script, its makers have other parameters") from None
    recorded = json.loads(RECORDED.read_text(encoding="utf-8")) if RECORDED.exists() else {}
    found = recorded.get(describe(market))
    if found and rival_spread == rival_risk_aversion == 1.0:
        origin = f"recorded, tuned on {found['episodes']:,} episodes of seed {found['seed']}"
        return assemble(market, found["parameters"], origin)
    risk_aversion, k = found["parameters"][RIVAL][:2] if found else tune_rival(market)
    rival = (rival_risk_aversion * risk_aversion, k, rival_spread)
    parameters = tune_makers(market, (risk_aversion, k), rival)
    return assemble(market, parameters, f"tuned on {market.num_envs:,} episodes of seed {TUNING_SEED}")


def assemble(market: QuotingEnv, parameters: Mapping[str, Sequence[float]], origin: str) -> Makers:
    """The makers with these parameters, the rival's among them, in this market."""
    parameters = {name: tuple(values) for name, values in parameters.items()}
    env = against_rival(market, parameters[RIVAL])
    moves = StepMoves(market) if set(KNOWING) & parameters.keys() else None
    policies = {name: classical_maker(name, env, values, moves) for name, values in parameters.items() if name != RIVAL}
    return Makers(env, policies, parameters, origin)
