"""The benchmark of phases 1 and 2: every classical hedge, tuned, and the exact optimum where it can be computed."""

from collections.abc import Callable

from envs.baselines import hedgers
from envs.benchmark.bars import FREE_TRADING
from envs.benchmark.contest import Contest, Validation, play, play_fresh, real_closes, require_episodes, tune
from envs.benchmark.report import Benchmark, compare, gap_closed
from envs.market.dynamics import GBM, Dynamics
from envs.market.hedging import HedgingEnv, Policy
from envs.market.history import Historical
from envs.market.mixture import Mixture
from envs.optimum.hedge import has_optimum, optimal_hedge
from envs.run.seeds import BENCHMARK_SEED, TUNING_SEED

BLACK_SCHOLES = "Black–Scholes delta"  # the baseline that the user named, of hedging
MINIMUM_VARIANCE = "min-variance"  # what the names of bands around the minimum-variance delta begin with


def hedging_baselines(env: HedgingEnv) -> tuple[dict[str, Policy], dict[str, float]]:
    """Every classical hedging strategy, the bands tuned on the environment's current market.

    Returns:
        The policies by name, and the tuned parameters by the same names.
    """
    centre = hedgers.minimum_variance_delta(env)
    risk_aversion = max(env.risk_aversion, 1e-3)
    policies = {BLACK_SCHOLES: hedgers.black_scholes_delta(env), "Leland": hedgers.leland(env)}
    families: dict[str, tuple[Callable[[float], Policy], float]] = {
        "Whalley–Wilmott, tuned": (lambda a: hedgers.whalley_wilmott(env, a), risk_aversion),
        "Zakamouline, tuned": (lambda a: hedgers.zakamouline(env, a), risk_aversion),
        "constant band, tuned": (lambda width: hedgers.constant_band(env, width), 0.05 * env.book_scale**0.5),
    }
    asymptotic, authors = hedgers.whalley_wilmott, "Whalley–Wilmott"
    if env.order_law.rate > 0:  # orders move the delta too
        asymptotic, authors = hedgers.kallsen_muhle_karbe, "Kallsen–Muhle-Karbe"
        families[f"{authors}, tuned"] = (lambda a: asymptotic(env, a), risk_aversion)
    if env.smile.skewed:  # elsewhere the centre is Black–Scholes
        policies["minimum-variance delta"] = centre
        start = families["constant band, tuned"][1]
        families[f"{MINIMUM_VARIANCE} band, tuned"] = (lambda width: hedgers.constant_band(env, width, centre), start)
        families[f"{MINIMUM_VARIANCE} {authors}, tuned"] = (lambda a: asymptotic(env, a, centre), risk_aversion)
    parameters = {name: tune(env, family, [start])[0] for name, (family, start) in families.items()}
    policies |= {name: family(parameters[name]) for name, (family, _) in families.items()}
    return policies, parameters


def hedging_validation(env: HedgingEnv) -> Validation:
    """`Validation` beside Black–Scholes delta hedging and, where it is known, the exact optimum."""
    best = optimal_hedge(env) if has_optimum(env) else None
    return Validation(env, hedgers.black_scholes_delta(env), "Black–Scholes", best)


def hedging_benchmark(
    *,
    title: str,
    settings: dict,
    agent: Policy,
    make_env: Callable[[Dynamics, int], HedgingEnv],
    model: Dynamics,
    episodes: int,
    bars: dict[str, float],
) -> tuple[Benchmark, Contest]:
    """The benchmark of a hedging agent: the contest and its verdict.

    Args:
        title, settings: of the report.
        make_env: (model, number of environments) → environment.
        model: of the market to benchmark in; with `Historical`, all its windows are the episodes.
        episodes: number of episodes otherwise.
        bars: HEDGE_OPTION or HEDGE_BOOK of `envs.benchmark.bars`.
    """
    contest = hedging_contest(title, make_env, model, agent, episodes)
    result = judge_hedging(settings, contest, bars)
    if contest.dates is not None:
        result.others["benchmark_non_overlapping"] = judge_hedging(settings, contest.non_overlapping(), bars)
    return result, contest


def hedging_contest(
    title: str, make_env: Callable[[Dynamics, int], HedgingEnv], model: Dynamics, agent: Policy, episodes: int
) -> Contest:
    """Tunes every baseline, solves for the optimum where that can be done, and plays all of them on fresh episodes.

    On real closes nothing is tuned: the baselines, like the agent, come from the model fitted to the time before.
    Arguments as in `hedging_benchmark`.
    """
    historical = isinstance(model, Historical)
    tuning = make_env(model.garch if historical else model, min(16_384, episodes))
    tuning.reset(seed=TUNING_SEED)
    policies, parameters = hedging_baselines(tuning)
    policies = {"agent": agent, **policies}
    # Where no optimum is known, the agent is drawn beside the strongest of the classics.
    best = max(parameters, key=lambda name: play(tuning, policies[name])["objective_centred"].mean())
    exact = has_optimum(tuning) and not historical
    if has_optimum(tuning):
        best = "exact optimum" if exact else "optimum of the fitted model"
        policies[best] = optimal_hedge(tuning)
    settings = {f"{name}: parameter": parameter for name, parameter in parameters.items()}
    settings["tuning seed"] = TUNING_SEED
    if historical:
        env = make_env(model, model.num_windows(tuning.num_steps))
        episodes = env.num_envs
        settings |= real_closes(model, tuning.num_steps)
    else:
        env = make_env(model, min(episodes, 8192))
        settings["benchmark seed"] = BENCHMARK_SEED
        if exact:
            settings["exact optimum: value predicted by dynamic programming"] = policies[best].value
    played = play_fresh(env, policies, episodes, BENCHMARK_SEED)
    # Windows that overlap share days: blocks of twice their length cover the dependence.
    block = 2 * tuning.num_steps if historical else 1
    dates = model.dates if historical else None
    return Contest(title, policies, played, parameters, best, exact, block, settings, tuning, dates)


def judge_hedging(settings: dict, contest: Contest, bars: dict[str, float]) -> Benchmark:
    """The verdict on a hedging agent: it must beat the named baseline and every tuned band, and close the gap.

    Where the exact optimum is known, it must close a share of the gap between the named baseline and the optimum. Where
    trading is free under gbm, agent, optimum and Black–Scholes delta are the same policy, and must agree. Hedges at the
    minimum-variance delta need not be beaten in a mixture.
    """
    played = contest.played
    env = contest.env
    free = env.cost_rate == 0 and contest.exact and isinstance(env.dynamics, GBM)
    bars = FREE_TRADING if free else bars
    settings = {**settings, "episodes": len(played["agent"]["pnl"]), **contest.settings, "bars": bars}
    result = compare(contest.title, settings, played, "agent", contest.block)
    if free:
        for name in (contest.best, BLACK_SCHOLES):
            difference = result.advantages[name].mean
            limit = bars["standard errors"] * result.rows["agent"]["objective_se"]
            detail = f"{difference:+.5f}, within ±{limit:.5f}"
            result.require_at_most(f"agrees with {name}", abs(difference), limit, detail)
    else:
        for name in (BLACK_SCHOLES, *contest.parameters):
            # In a mixture they know the model of every row, which the agent has to guess
            knows_more = name.startswith(MINIMUM_VARIANCE) and isinstance(env.dynamics, Mixture)
            if not knows_more:
                result.require_advantage(name)
    if contest.exact and not free:
        share = gap_closed(*(played[name]["objective"] for name in ("agent", BLACK_SCHOLES, contest.best)))
        result.shares[f"gap from {BLACK_SCHOLES} to {contest.best} closed"] = share
        bar = bars["gap closed"]
        result.require_at_least(f"closes {100 * bar:g} % of the gap", share.mean, bar, f"{100 * share.mean:.2f} %")
    require_episodes(result)
    return result
