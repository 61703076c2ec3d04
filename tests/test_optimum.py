import numpy as np
import pytest
import torch
from conftest import MODELS

from envs import HedgingEnv, baselines, benchmark, optimum

# reference.md: dynamics, cost_rate, risk_aversion → Black–Scholes delta, exact optimum (its s.e. 0.001–0.003)
TABLE = [
    ("gbm", 1e-3, 1.0, -0.367, -0.322),
    ("gbm", 1e-3, 0.1, -0.283, -0.171),
    ("gbm", 5e-3, 1.0, -1.463, -1.005),
    ("garch", 1e-3, 1.0, -0.450, -0.301),
    ("garch", 5e-4, 0.5, -0.153, -0.079),
]


@pytest.mark.parametrize(("name", "cost_rate", "risk_aversion", "black_scholes", "best"), TABLE)
def test_reference_table_and_predicted_value(name, cost_rate, risk_aversion, black_scholes, best):
    env = HedgingEnv(200_000, MODELS[name], cost_rate=cost_rate, risk_aversion=risk_aversion)
    env.reset(seed=0)
    exact = optimum.optimal_hedge(env)
    played = benchmark.play(env, exact)
    simulated = benchmark.estimate(played["objective"])
    assert abs(simulated.mean - exact.value) < 2 * simulated.se
    delta = benchmark.play(env, baselines.black_scholes_delta(env))
    for sample, reference in ((played, best), (delta, black_scholes)):
        ours = benchmark.estimate(sample["objective"])
        assert abs(ours.mean - reference) < 2 * np.hypot(ours.se, 0.003)
    # the noise that no policy can change taken out, the gap agrees to a few parts in a thousand
    gap = benchmark.estimate(played["objective_centred"] - delta["objective_centred"])
    assert gap.mean == pytest.approx(best - black_scholes, abs=2 * np.hypot(gap.se, 0.0015))


@pytest.mark.parametrize("name", ["gbm", "garch"])
def test_nothing_beats_the_optimum(name):
    env = HedgingEnv(20_000, MODELS[name])
    env.reset(seed=1)
    exact = optimum.optimal_hedge(env)
    best = benchmark.play(env, exact)["objective_centred"]
    centre = baselines.minimum_variance_delta(env)
    rivals = [baselines.constant_band(env, h, centre) for h in (0.02, 0.05, 0.1)]
    rivals += [baselines.whalley_wilmott(env, a) for a in (0.5, 1.0, 2.0)] + [baselines.zakamouline(env)]
    for shift in (-0.02, 0.02):  # the optimum's own band, moved or widened
        rivals.append(lambda o, shift=shift: exact(o) + torch.tensor([shift, 0.0]))
        rivals.append(lambda o, shift=shift: exact(o) + torch.tensor([0.0, shift]))
    for rival in rivals:
        worse = benchmark.estimate(best - benchmark.play(env, rival)["objective_centred"])
        assert worse.mean > 2 * worse.se


def test_free_trading_in_gbm_is_delta_hedging():
    env = HedgingEnv(50_000, cost_rate=0.0)
    env.reset(seed=0)
    exact = optimum.optimal_hedge(env)
    ours = benchmark.play(env, exact)
    delta = benchmark.play(env, baselines.black_scholes_delta(env))
    difference = benchmark.estimate(ours["objective"] - delta["objective"])
    assert abs(difference.mean) < 3 * difference.se + 1e-4
    assert (exact.upper - exact.lower).max() < 1e-6


def test_prohibitive_cost_means_never_hedging():
    env = HedgingEnv(1000, cost_rate=0.5, risk_aversion=0.01)
    env.reset(seed=0)
    assert benchmark.play(env, optimum.optimal_hedge(env))["turnover"].max() < 1e-3


def test_band_is_a_band_and_wider_when_trading_costs_more():
    widths = []
    for cost_rate in (5e-4, 1e-3, 4e-3):
        exact = optimum.optimal_hedge(HedgingEnv(1, cost_rate=cost_rate))
        assert (exact.upper >= exact.lower).all()
        middle = len(exact.log_spots) // 2
        widths.append(exact.upper[15, 0, middle] - exact.lower[15, 0, middle])
    assert widths[0] < widths[1] < widths[2]


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="heston"):
        optimum.optimal_hedge(HedgingEnv(1, MODELS["heston"]))
