import math

import pytest
import torch
from common import MODELS, book_env

from envs import HedgingEnv
from envs.baselines import hedgers
from envs.benchmark.contest import play
from envs.benchmark.report import estimate
from envs.market import black_scholes

F64 = torch.float64


def tensor(x):
    return torch.tensor(x, dtype=F64)


def test_whalley_wilmott_half_width():
    gamma = black_scholes.gamma(tensor(100.0), 100.0, 0.25, 0.2)
    assert hedgers.whalley_wilmott_half_width(100.0, gamma, 1e-3, 1.0).item() == pytest.approx(0.06198337, abs=1e-8)


def test_zakamouline_half_width():
    args = (tensor(5000.0), tensor(0.02), tensor(0.2), tensor(0.25), 5e-4, 1.0)
    assert hedgers.zakamouline_half_width(*args).item() == pytest.approx(0.020954, abs=1e-6)
    args = (args[0], -args[1], *args[2:])  # Γ < 0: a short option
    # hedging a short option costs, so its volatility is above the market's, and equal to it when trading is free
    # 0.2 √(1 + 4.76 · 5e-4^0.78 · 0.25^−0.02 · 0.2^−0.25 · (5000² · 0.02)^0.15), worked out by hand
    assert hedgers.zakamouline_volatility(*args).item() == pytest.approx(0.2 * math.sqrt(1 + 0.139454572), abs=1e-6)
    assert hedgers.zakamouline_volatility(*args[:4], 0.0, 1.0).item() == 0.2
    long = (args[0], -args[1], *args[2:])
    assert hedgers.zakamouline_volatility(*long).item() == pytest.approx(0.2 * math.sqrt(1 - 0.139454572), abs=1e-6)


def test_leland_volatility():
    """Holds the delta at σ√(1 + √(2/π) k/(σ√Δt)), k = 2 · cost_rate, written out for one state."""
    env = HedgingEnv(1, cost_rate=5e-3, dtype=F64)
    env.reset(seed=0)
    offset, half_width = hedgers.leland(env)(env.observe())[0]
    adjusted = 0.2 * math.sqrt(1 + math.sqrt(2 / math.pi) * 0.01 / (0.2 * math.sqrt(1 / 252)))
    target = black_scholes.delta(tensor(100.0), 100.0, 30 / 252, adjusted)
    assert half_width == 0
    assert offset.item() == pytest.approx((target + env.delta[0]).item(), abs=1e-12)


@pytest.mark.parametrize("make_env", [HedgingEnv, book_env])
@pytest.mark.parametrize("name", MODELS)
def test_every_baseline_is_finite_everywhere_and_keeps_its_shape(name, make_env):
    env = make_env(2000, MODELS[name])
    env.reset(seed=0)
    centre = hedgers.minimum_variance_delta(env)
    policies = [
        hedgers.black_scholes_delta(env), hedgers.leland(env), centre, hedgers.constant_band(env, 0.1, centre),
        hedgers.whalley_wilmott(env, 2.0, centre), hedgers.zakamouline(env),
        hedgers.kallsen_muhle_karbe(env),
    ]  # fmt: skip
    for policy in policies:
        env.replay()
        for _ in range(env.num_steps):
            action = policy(env.observe())
            assert action.shape == (2000, 2)
            assert action.isfinite().all()
            assert (action[:, 1] >= 0).all()
            env.step(action)


@pytest.mark.parametrize("make_env", [HedgingEnv, book_env])
@pytest.mark.parametrize("policy", [hedgers.whalley_wilmott, hedgers.leland, hedgers.kallsen_muhle_karbe])
def test_free_trading_makes_it_the_black_scholes_delta(policy, make_env):
    env = make_env(1000, cost_rate=0.0, dtype=F64)
    env.reset(seed=0)
    ours = play(env, policy(env))["pnl"]
    delta = play(env, hedgers.black_scholes_delta(env))["pnl"]
    assert abs(ours - delta).max() < 1e-9


@pytest.mark.parametrize("make_env", [HedgingEnv, book_env])
def test_black_scholes_delta_holds_the_delta(make_env):
    env = make_env(100, dtype=F64)
    env.reset(seed=0)
    assert play(env, hedgers.black_scholes_delta(env))["net_delta"].max() < 1e-12


@pytest.mark.parametrize("make_env", [HedgingEnv, book_env])
@pytest.mark.parametrize("name", ["garch", "heston"])
def test_minimum_variance_delta_has_less_variance_step_by_step(name, make_env):
    env = make_env(20_000, MODELS[name], cost_rate=0.0)
    env.reset(seed=0)
    minimum_variance = play(env, hedgers.minimum_variance_delta(env))
    delta = play(env, hedgers.black_scholes_delta(env))
    gain = estimate(minimum_variance["objective_centred"] - delta["objective_centred"])
    assert gain.low > 0  # free trading: the centred objective is −½ Σ ΔW²


def test_minimum_variance_delta_is_black_scholes_when_volatility_does_not_move_with_the_spot():
    for name in ("gbm", "merton"):
        env = HedgingEnv(10, MODELS[name])
        env.reset(seed=0)
        assert (hedgers.minimum_variance_delta(env)(env.observe()) == 0).all()


def test_kallsen_muhle_karbe_is_whalley_wilmott_without_orders_and_wider_with_them():
    env = HedgingEnv(500, dtype=F64)
    env.reset(seed=0)
    observation = env.observe()
    ours, without = hedgers.kallsen_muhle_karbe(env)(observation), hedgers.whalley_wilmott(env)(observation)
    torch.testing.assert_close(ours, without)
    env = book_env(500, dtype=F64)
    observation, _ = env.reset(seed=0)
    policies = (hedgers.kallsen_muhle_karbe(env), hedgers.whalley_wilmott(env))
    ours, without = (policy(observation)[:, 1] for policy in policies)
    assert (ours > without).all()
    # worked out for one row: orders add 2 μ E[size²] Σ Δ² to the variance of the delta over a step
    spot, variance = env.spot[0, 0], env.variance[0, 0]
    delta = black_scholes.delta(spot, env.strike, env.expiry / 252, 0.2, env.is_call)
    flow = 2 * 0.1 * 6.0 * delta.square().sum()  # E[size²] = 2·2² − 2 = 6
    slope = (env.gamma[0, 0] ** 2 + flow / (spot**2 * variance / 252)).sqrt()
    expected = hedgers.whalley_wilmott_half_width(spot, slope, 1e-3, 1.0)
    assert ours[0].item() == pytest.approx(expected.item(), rel=1e-9)


def test_book_baselines_reduce_to_those_of_one_sold_call():
    """The same book told as one option and as two halves gives the same trades."""
    one = HedgingEnv(200, dtype=F64)
    halves = HedgingEnv(200, options=[(100.0, 30), (100.0, 30)], initial_position=-0.5, dtype=F64)
    for policy in (hedgers.leland, hedgers.zakamouline, hedgers.whalley_wilmott):
        for env in (one, halves):
            env.reset(seed=0)
        first, second = (play(env, policy(env))["objective"] for env in (one, halves))
        assert abs(first - second).max() < 1e-9
