import numpy as np
import pytest
import torch
from common import MODELS, book_env

from envs import HedgingEnv
from envs.baselines import hedgers
from envs.benchmark.contest import play
from envs.benchmark.report import estimate, gap_closed
from envs.optimum.hedge import has_optimum, optimal_hedge


def one_call(num_envs, model=None, **settings):
    """One call, orders for it, no position to begin with: phase 2 at its simplest."""
    settings = {"options": [(100.0, 30)], "arrival_rate": 0.25, "risk_aversion": 0.1, **settings}
    return HedgingEnv(num_envs, model, initial_position=0.0, **settings)


# reference.md: dynamics, cost_rate, risk_aversion → Black–Scholes delta, exact optimum (its s.e. 0.001–0.003)
TABLE = [
    ("gbm", 1e-3, 1.0, -0.367, -0.322),
    pytest.param("gbm", 1e-3, 0.1, -0.283, -0.171, marks=pytest.mark.slow),
    pytest.param("gbm", 5e-3, 1.0, -1.463, -1.005, marks=pytest.mark.slow),
    ("garch", 1e-3, 1.0, -0.450, -0.301),
    pytest.param("garch", 5e-4, 0.5, -0.153, -0.079, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "cost_rate", "risk_aversion", "black_scholes", "best"), TABLE)
def test_reference_table_and_predicted_value(name, cost_rate, risk_aversion, black_scholes, best):
    env = HedgingEnv(200_000, MODELS[name], cost_rate=cost_rate, risk_aversion=risk_aversion)
    env.reset(seed=0)
    exact = optimal_hedge(env)
    played = play(env, exact)
    simulated = estimate(played["objective"])
    assert abs(simulated.mean - exact.value) < 2 * simulated.se
    delta = play(env, hedgers.black_scholes_delta(env))
    for sample, reference in ((played, best), (delta, black_scholes)):
        ours = estimate(sample["objective"])
        assert abs(ours.mean - reference) < 2 * np.hypot(ours.se, 0.003)
    # the noise that no policy can change taken out, the gap agrees to a few parts in a thousand
    gap = estimate(played["objective_centred"] - delta["objective_centred"])
    assert gap.mean == pytest.approx(best - black_scholes, abs=2 * np.hypot(gap.se, 0.0015))


@pytest.mark.parametrize("name", ["gbm", "garch"])
def test_nothing_beats_the_optimum(name):
    env = HedgingEnv(20_000, MODELS[name])
    env.reset(seed=1)
    exact = optimal_hedge(env)
    best = play(env, exact)["objective_centred"]
    centre = hedgers.minimum_variance_delta(env)
    rivals = [hedgers.constant_band(env, h, centre) for h in (0.02, 0.05, 0.1)]
    rivals += [hedgers.whalley_wilmott(env, a) for a in (0.5, 1.0, 2.0)] + [hedgers.zakamouline(env)]
    for shift in (-0.02, 0.02):  # the optimum's own band, moved or widened
        rivals.append(lambda o, shift=shift: exact(o) + torch.tensor([shift, 0.0]))
        rivals.append(lambda o, shift=shift: exact(o) + torch.tensor([0.0, shift]))
    for rival in rivals:
        worse = estimate(best - play(env, rival)["objective_centred"])
        assert worse.mean > 2 * worse.se


def test_free_trading_in_gbm_is_delta_hedging():
    env = HedgingEnv(50_000, cost_rate=0.0)
    env.reset(seed=0)
    exact = optimal_hedge(env)
    ours = play(env, exact)
    delta = play(env, hedgers.black_scholes_delta(env))
    difference = estimate(ours["objective"] - delta["objective"])
    assert abs(difference.mean) < 3 * difference.se + 1e-4
    assert (exact.upper - exact.lower).max() < 1e-6


def test_prohibitive_cost_means_never_hedging():
    env = HedgingEnv(1000, cost_rate=0.5, risk_aversion=0.01)
    env.reset(seed=0)
    assert play(env, optimal_hedge(env))["turnover"].max() < 1e-3


def test_band_is_a_band_and_wider_when_trading_costs_more():
    widths = []
    for cost_rate in (5e-4, 1e-3, 4e-3):
        exact = optimal_hedge(HedgingEnv(1, cost_rate=cost_rate))
        assert (exact.upper >= exact.lower).all()
        middle = len(exact.log_spots) // 2
        widths.append(exact.upper[15, 0, 0, middle] - exact.lower[15, 0, 0, middle])
    assert widths[0] < widths[1] < widths[2]


@pytest.mark.parametrize(
    "refused",
    [HedgingEnv(1, MODELS["heston"]), book_env(1), one_call(1, MODELS["garch"]), one_call(1, arrival_rate=9.0)],
)
def test_others_are_refused(refused):
    assert not has_optimum(refused)
    with pytest.raises(ValueError, match="no exact optimum for"):
        optimal_hedge(refused)


# reference.md, positions limited to ±8: cost_rate, risk_aversion, arrival_rate → Black–Scholes delta, exact optimum,
# and the tuned width of the constant band with the share of the gap that it closes
ORDERS = [
    (1e-3, 0.1, 0.25, -1.102, -0.856, 0.3, 0.86),
    (1e-3, 1.0, 0.25, -1.870, -1.822, 0.05, 0.94),
    (5e-4, 0.1, 0.5, -0.889, -0.785, 0.2, 0.90),
]


def limited(env, limit):
    """The environment's market with clients' orders cut so that no position goes beyond ±limit."""
    size = env.order_size.transpose(0, 1)
    position = torch.zeros(env.num_envs)
    for t in range(env.num_steps):
        wanted = size[:, t, 0, 1] - size[:, t, 0, 0]
        traded = (position + wanted).clamp(-limit, limit) - position
        size[:, t, 0, 1], size[:, t, 0, 0] = traded.clamp(min=0), (-traded).clamp(min=0)
        position = position + traded
    env.set_market(env.spot.T, env.variance.T, (size, size))


@pytest.mark.slow
@pytest.mark.parametrize(("cost_rate", "risk_aversion", "rate", "black_scholes", "best", "width", "share"), ORDERS)
def test_reference_table_with_client_orders(cost_rate, risk_aversion, rate, black_scholes, best, width, share):
    env = one_call(100_000, cost_rate=cost_rate, risk_aversion=risk_aversion, arrival_rate=rate)
    env.reset(seed=0)
    limited(env, 8)
    exact = optimal_hedge(env, position_limit=8)
    policies = {"optimum": exact, "delta": hedgers.black_scholes_delta(env)}
    policies["band"] = hedgers.constant_band(env, width)
    played = {name: play(env, policy) for name, policy in policies.items()}
    levels = {name: estimate(episodes["objective"]) for name, episodes in played.items()}
    assert abs(levels["optimum"].mean - exact.value) < 3 * levels["optimum"].se
    for name, reference in (("optimum", best), ("delta", black_scholes)):  # of 100,000 paths or more, like ours
        assert abs(levels[name].mean - reference) < 3 * 2**0.5 * levels[name].se
    centred = [played[name]["objective_centred"] for name in ("band", "delta", "optimum")]
    closed = gap_closed(*centred)
    tolerance = 0.01 if risk_aversion < 1 else 0.1  # there the reference's gap, 0.048, has two digits
    assert closed.mean == pytest.approx(share, abs=tolerance + 3 * closed.se)


@pytest.mark.slow
def test_nothing_beats_the_optimum_with_client_orders():
    env = one_call(30_000)
    env.reset(seed=1)
    exact = optimal_hedge(env)
    played = play(env, exact)
    simulated = estimate(played["objective"])
    assert abs(simulated.mean - exact.value) < 3 * simulated.se
    rivals = [hedgers.constant_band(env, width) for width in (0.2, 0.27, 0.35)]
    rivals += [hedgers.kallsen_muhle_karbe(env, 0.3), hedgers.whalley_wilmott(env, 0.2)]
    for shift in (-0.1, 0.1):  # the optimum's own band, moved or widened
        rivals.append(lambda o, shift=shift: exact(o) + torch.tensor([shift, 0.0]))
        rivals.append(lambda o, shift=shift: exact(o) + torch.tensor([0.0, 0.5 * shift]))
    for rival in rivals:
        rivals_play = play(env, rival)
        worse = estimate(played["objective_centred"] - rivals_play["objective_centred"])
        assert worse.mean > 2 * worse.se


@pytest.mark.slow
def test_prediction_of_short_horizons_and_large_orders():
    env = one_call(100_000, options=[(100.0, 10)], num_steps=10, arrival_rate=0.5, mean_order_size=2.5)
    env.reset(seed=2)
    exact = optimal_hedge(env)
    simulated = estimate(play(env, exact)["objective_centred"])
    assert abs(simulated.mean - exact.value) < 2 * simulated.se + 0.004


def test_a_put_is_hedged_like_its_call_but_for_the_shares():
    """Symmetric orders in the put instead of the call: the same gamma, so a band of about the same width."""
    envs = [one_call(1, options=[(100.0, 10, is_call)], num_steps=10) for is_call in (True, False)]
    call, put = (optimal_hedge(env, position_limit=6) for env in envs)  # far beyond what is looked at
    assert put.value == pytest.approx(call.value, rel=0.05)
    middle, position = len(call.log_spots) // 2, len(call.positions) // 2 + 3
    widths = [(o.upper - o.lower)[3, position, 0, middle] for o in (call, put)]
    assert widths[0] == pytest.approx(widths[1], rel=0.05)
