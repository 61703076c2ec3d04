"""The classical makers against published values."""

import math

import numpy as np
import pytest
import torch
from common import MODELS

from envs import AgainstRivals, QuotingEnv
from envs.baselines import makers
from envs.market import black_scholes

F64 = torch.float64


@pytest.mark.parametrize(
    ("risk_aversion", "spread", "profit", "sd", "sd_inventory", "symmetric"),
    [
        (0.1, 1.49, 65.0, 6.6, 2.9, (68.4, 12.7, 8.4)),
        (0.01, 1.35, 68.6, 8.7, 5.1, None),
        (1.0, 3.02, 31.4, 5.0, 1.7, None),
    ],
)
def test_published_table_of_avellaneda_and_stoikov(risk_aversion, spread, profit, sd, sd_inventory, symmetric):
    """Their tables 1 to 3: s 100, T 1, σ 2, dt 0.005, k 1.5, A 140; 1,000 paths there, 20,000 here."""
    steps, dt, sigma, k, intensity, paths = 200, 0.005, 2.0, 1.5, 140.0, 20_000
    for centred, expected in ((True, (profit, sd, sd_inventory)), (False, symmetric)):
        if expected is None:
            continue
        rng = np.random.default_rng(0)
        mid, cash, inventory = np.full(paths, 100.0), np.zeros(paths), np.zeros(paths)
        spreads = []
        for t in range(steps):
            time_left = 1.0 - t * dt
            half, skew = makers.avellaneda_stoikov_quotes(
                torch.from_numpy(inventory), risk_aversion, sigma**2, time_left, k
            )
            spreads.append(2 * float(half))
            half = float(half) if centred else 0.5 * spread
            skew = skew.numpy() if centred else 0.0
            ask, bid = half + skew, half - skew  # distances from the mid
            sold = rng.random(paths) < intensity * np.exp(-k * ask) * dt
            bought = rng.random(paths) < intensity * np.exp(-k * bid) * dt
            cash += sold * (mid + ask) - bought * (mid - bid)
            inventory += bought * 1.0 - sold
            mid = mid + sigma * math.sqrt(dt) * rng.choice([-1.0, 1.0], paths)
        profits = cash + inventory * mid
        assert np.mean(spreads) == pytest.approx(spread, abs=0.015)
        # three standard errors of their 1,000 paths, and rounding
        assert profits.mean() == pytest.approx(expected[0], abs=3 * expected[1] / 1000**0.5 + 0.05)
        assert profits.std() == pytest.approx(expected[1], abs=3 * expected[1] / 2000**0.5 + 0.05)
        assert inventory.std() == pytest.approx(expected[2], abs=3 * expected[2] / 2000**0.5 + 0.05)


def test_glft_against_its_exact_solution_and_the_oracle():
    sigma, intensity, k, risk_aversion = 0.3, 0.9, 0.3, 0.01
    bid, ask = makers.glft_exact_quotes(risk_aversion, sigma**2, 600.0, k, intensity, 30)
    assert bid[30] == pytest.approx(3.313045, abs=1e-6)
    assert bid[35] == pytest.approx(3.653479, abs=1e-6)
    assert ask[35] == pytest.approx(2.972522, abs=1e-6)
    assert bid[60] == ask[0] == np.inf
    for inventory, index in ((0.0, 30), (5.0, 35)):
        half, skew = makers.glft_quotes(inventory, risk_aversion, sigma**2, k, intensity)
        assert float(half - skew) == pytest.approx(bid[index], abs=2e-3)
        assert float(half + skew) == pytest.approx(ask[index], abs=2e-3)
    assert float(sum(makers.glft_quotes(0.0, risk_aversion, sigma**2, k, intensity))) == pytest.approx(
        3.312915, abs=1e-6
    )


def test_quotes_as_risk_aversion_vanishes():
    for formula, more in ((makers.avellaneda_stoikov_quotes, (0.1, 2.0)), (makers.glft_quotes, (2.0, 1e3))):
        half, skew = formula(torch.tensor(3.0), torch.tensor(1e-6), torch.tensor(9.0), *more)
        assert float(half) == pytest.approx(0.5, abs=2e-3)
        assert abs(float(skew)) < 2e-3


def test_residual_variance_of_a_hedged_option():
    """Stoikov & Sağlam (2009): (vega α)²(1 − ρ²) + ½Γ²σ⁴S⁴Δt, written out for every option of model B."""
    env = QuotingEnv(4, dtype=F64)
    env.reset(seed=0)
    for _ in range(7):
        env.step(torch.full((4, 2, 4), 1.0, dtype=F64))
    state = env.decode(env.observe()[:, 0])
    heston, tau = env.dynamics, state.time_to_expiry[0].item()
    weight = -math.expm1(-4 * tau) / (4 * tau)
    alpha = weight * heston.vol_of_vol * state.variance.sqrt() / (2 * state.volatility)
    greeks = black_scholes.greeks(state.spot[:, None], env.strike, tau, state.volatility[:, None])
    gamma_risk = 0.5 * greeks.gamma**2 * (state.volatility * state.spot)[:, None] ** 4 * heston.dt
    expected = (greeks.vega * alpha[:, None]) ** 2 * (1 - heston.correlation**2) + gamma_risk
    ours = makers._residual_variance(env, state)[:, None] * (0.01 * greeks.vega) ** 2
    torch.testing.assert_close(ours, expected, rtol=4e-2, atol=0)  # α and ρ are of a whole step, to order κ dt


def test_skew_sells_what_is_held_and_the_spread_narrows_with_time():
    market = QuotingEnv(1)
    named = makers.avellaneda_stoikov(market, 0.25, 0.8)
    env = AgainstRivals(market, [named])
    still = env.standing_still(3)
    vega = torch.tensor([-1.0, 0.0, 1.0])
    for policy in (named, makers.glft(market, 1.5, 0.8)):
        early, late = policy(still.observe_at(0, vega)), policy(still.observe_at(50, vega))
        assert early[0, 1] > 0 == early[1, 1] > early[2, 1]
        assert (early[:, 2:] == 0).all()  # Black–Scholes delta, no band
        assert (late[:, 0] != early[:, 0]).all()
    assert (named(still.observe_at(50))[:, 0] < named(still.observe_at(0))[:, 0]).all()
    wide = makers.avellaneda_stoikov(market, 0.25, 0.8, spread=1.5)
    torch.testing.assert_close(wide(still.observe_at(0))[:, 0], 1.5 * named(still.observe_at(0))[:, 0])


@pytest.mark.parametrize("name", ["gbm", "heston", "garch"])
def test_minimum_variance_target_minimises_the_variance_of_a_step(name):
    market = QuotingEnv(40_000, MODELS[name], dtype=F64, num_steps=3, expiry=60)
    market.reset(seed=0)
    market.position = torch.ones(40_000, 2, 5, dtype=F64) * torch.tensor([[2.0], [-3.0]])
    observation = market.observe()
    policy = makers.minimum_variance_band(market, makers.constant_spread(market, 1.0), 0.1)
    target = policy(observation[:, 0])[:, 2].mean()
    assert (policy(observation[:, 0])[:, 3] == 0.1).all()
    hedge = target - (market.position * market.delta[0][:, None]).sum(-1)[0, 0]
    move = market.spot[1] - market.spot[0]
    book = (market.position[:, 0] * (market.mark[1] - market.mark[0])).sum(-1)
    best = -torch.cov(torch.stack((book, move)))[0, 1] / move.var()
    assert float(hedge) == pytest.approx(best.item(), abs=0.02 + 0.05 * abs(target.item()))
    if name == "gbm":
        assert target == 0


def test_quotes_stay_finite_where_no_option_has_vega_left():
    market = QuotingEnv(2, num_steps=3, expiry=6)
    market.reset(seed=0)
    spot = torch.tensor([[100.0, 20.0, 20.0, 20.0], [100.0, 500.0, 500.0, 500.0]])
    market.set_market(spot, market.variance.T.clone(), market.intensity.transpose(0, 1), market.marks.transpose(0, 1))
    observation, _ = market.replay()
    for policy in (makers.avellaneda_stoikov(market, 0.25, 0.8), makers.glft(market, 1.2, 0.8)):
        market.replay()
        for _ in range(3):
            action = policy(market.observe()[:, 0])
            assert action.isfinite().all()
            observation, reward, *_ = market.step(action[:, None].expand(2, 2, 4))
            assert reward.isfinite().all()
            assert observation.isfinite().all()
