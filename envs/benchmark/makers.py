"""The classical makers, tuned: the rivals of an agent that quotes, and what it has to beat in its seat."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from envs.baselines import makers as formulas
from envs.benchmark.contest import play, tune
from envs.market.dynamics import GBM
from envs.market.hedging import Policy
from envs.market.quoting import AgainstRivals, QuotingEnv
from envs.optimum.quotes import optimal_quotes
from envs.run.errors import UsageError
from envs.run.seeds import TUNING_SEED

AVELLANEDA_STOIKOV = "Avellaneda–Stoikov, tuned"  # the baseline that the user named, hedged at the Black–Scholes delta
CONSTANT_SPREAD, GLFT = "constant spread, tuned", "GLFT, tuned"
STRONGEST_MAKER = "GLFT, min-variance band, tuned"
INVENTORY_DP = "dynamic programming, tuned"  # under gbm
BEST_RESPONSE = "best response (exact)"  # under gbm without risk aversion and costs
RIVAL = "rival"
RISK_NEUTRAL = 1e-6  # the risk aversion of a formula that divides by it, where there is none
NEVER_HEDGED = 1e3  # half-width of a band, shares
COARSE_TO_FINE = (1.3, 1.08)  # ratios of the grids that parameters are tuned on
RECORDED = Path(__file__).with_name("tuned_makers.json")  # written by benchmarks/tune_makers.py

Parameters = dict[str, tuple[float, ...]]


def classical_maker(name: str, env: AgainstRivals, parameters: Sequence[float]) -> Policy:
    """The classical maker of that name, in the seat of `env`."""
    market = env.env
    if name == AVELLANEDA_STOIKOV:
        return formulas.avellaneda_stoikov(market, *parameters)
    if name == CONSTANT_SPREAD:
        return formulas.constant_spread(market, *parameters)
    if name == GLFT:
        return formulas.glft(market, *parameters)
    if name == STRONGEST_MAKER:
        return formulas.minimum_variance_band(market, formulas.glft(market, *parameters[:2]), parameters[2])
    if name == INVENTORY_DP:
        return optimal_quotes(env, *parameters)
    raise ValueError(f"no maker is called {name!r}")


@dataclass
class Makers:
    """The classical makers, tuned, in the market that the agent enters.

    Attributes:
        env: that market from the agent's seat (its `like` has it in any size).
        policies: by name, what an agent has to beat in its seat.
        parameters: by the same names, and the rival's: risk aversion and k, then the band in shares, or the rival's
            multiple of the spread.
        origin: where the parameters come from.
    """

    env: AgainstRivals
    policies: dict[str, Policy]
    parameters: Parameters
    origin: str


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


def _tune(name: str, env: AgainstRivals, start: Sequence[float], globally: bool = False) -> tuple[float, ...]:
    """Parameters of the maker, from `start`; those whose best value in this market is 0 or ∞ are set to it.

    Without risk aversion nothing is hedged that costs anything, and where hedging is free there is no band. Quotes too
    wide for any trade are a local optimum, so a search can go on `globally`, from the best of eight starts.
    """
    market = env.env
    start = tuple(start)
    first, last = 0, len(start)  # the parameters start[first:last] are searched for
    if market.risk_aversion == 0 and name != CONSTANT_SPREAD:
        first = 1
        start = (RISK_NEUTRAL, *start[1:])
    if len(start) == 3 and (market.risk_aversion == 0 or market.cost_rate == 0):
        last = 2
        start = (*start[:2], 0.0 if market.cost_rate == 0 else NEVER_HEDGED)

    def family(*free: float) -> Policy:
        return classical_maker(name, env, (*start[:first], *free, *start[last:]))

    def value(free: Sequence[float]) -> float:
        return play(env, family(*free))["objective_centred"].mean()

    starts = [start[first:last]]
    if globally and first == 0:
        starts = [(start[0] * x, start[1] * y) for x in (0.25, 1.0, 4.0, 16.0) for y in (0.5, 1.0)]
    return (*start[:first], *tune(env, family, max(starts, key=value), COARSE_TO_FINE), *start[last:])


def tune_makers(market: QuotingEnv, start: tuple[float, float], rival: tuple[float, ...]) -> Parameters:
    """Parameters of every classical maker, tuned against `rival` from risk aversion and k of `start`; and rival's."""
    env = against_rival(market, rival)
    env.reset(seed=TUNING_SEED)
    found = {
        RIVAL: rival,
        CONSTANT_SPREAD: _tune(CONSTANT_SPREAD, env, (1.2,)),
        AVELLANEDA_STOIKOV: _tune(AVELLANEDA_STOIKOV, env, start, True),
    }
    found[GLFT] = _tune(GLFT, env, (5.0 * start[0], start[1]), True)
    found[STRONGEST_MAKER] = _tune(STRONGEST_MAKER, env, (*found[GLFT], 0.15))
    if isinstance(market.dynamics, GBM) and market.risk_aversion > 0:
        found[INVENTORY_DP] = _tune(INVENTORY_DP, env, (2.0 * market.risk_aversion, 0.2, 0.05))
    return found


def describe(market: QuotingEnv) -> str:
    """The market that parameters are tuned for, in words that are the same on every machine."""
    beside = ("num_envs", "dynamics", "privileged", "device", "dtype")
    settings = {name: value for name, value in market.settings.items() if name not in beside}
    model = ", ".join(f"{name} {value:.4g}" for name, value in market.dynamics.parameters().items())
    parts = [] if type(market) is QuotingEnv else [type(market).__name__]  # a market of one's own is tuned for anew
    parts.append(f"{type(market.dynamics).__name__} ({model})")
    for name, value in settings.items():
        value = value if isinstance(value, Sequence) else (value,)
        parts.append(f"{name} {' '.join(f'{x:.4g}' for x in value)}")
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
    policies = {name: classical_maker(name, env, values) for name, values in parameters.items() if name != RIVAL}
    return Makers(env, policies, parameters, origin)
