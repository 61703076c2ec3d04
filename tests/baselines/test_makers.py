"""The classical makers against published values."""

import math

import numpy as np
import pytest
import torch
from common import MODELS, quoted

from envs import AgainstRivals, QuotingEnv
from envs.baselines import makers
from envs.benchmark.contest import play
from envs.market import black_scholes
from envs.market.moves import StepMoves

F64 = torch.float64


def spread_and_skew(market, action):
    """Half-spreads and skews (n, num_options) of an action's quotes."""
    numbers = market.by_name(action)
    return 0.5 * (numbers["ask"] + numbers["bid"]), 0.5 * (numbers["ask"] - numbers["bid"])


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
        env.step(torch.ones(4, 2, env.action_size, dtype=F64))
    state = env.decode(env.observe()[:, 0])
    heston, tau = env.dynamics, state.time_to_expiry[0].item()
    weight = -math.expm1(-4 * tau) / (4 * tau)
    alpha = weight * heston.vol_of_vol * state.variance.sqrt() / (2 * state.volatility)
    greeks = black_scholes.greeks(state.spot[:, None], env.strike, tau, state.volatility[:, None])
    gamma_risk = 0.5 * greeks.gamma**2 * (state.volatility * state.spot)[:, None] ** 4 * heston.dt
    expected = (greeks.vega * alpha[:, None]) ** 2 * (1 - heston.correlation**2) + gamma_risk
    ours = makers._residual_variance(env, state)[:, None] * (0.01 * greeks.vega) ** 2
    torch.testing.assert_close(ours, expected, rtol=4e-2, atol=0)  # α and ρ are of a whole step, to order κ dt
    surface = QuotingEnv(4, options=quoted(60, 120, dt=1 / 504, moneyness=(0.0,)), dtype=F64)
    each = [QuotingEnv(4, options=[option], dtype=F64) for option in surface.options]
    means = [makers._residual_variance(market, state) for market in (surface, *each)]
    torch.testing.assert_close(means[0], 0.5 * (means[1] + means[2]))  # of a surface it is the mean
    assert (means[1] > 1.5 * means[2]).all()


def test_skew_sells_what_is_held_and_the_spread_narrows_with_time():
    market = QuotingEnv(1)
    named = makers.avellaneda_stoikov(market, 0.25, 0.8)
    env = AgainstRivals(market, [named])
    still = env.standing_still(3)
    vega = torch.tensor([-1.0, 0.0, 1.0])
    for policy in (named, makers.glft(market, 1.5, 0.8)):
        early, late = policy(still.observe_at(0, vega)), policy(still.observe_at(50, vega))
        half_spread, skew = spread_and_skew(market, early)
        assert (half_spread == half_spread[:, :1]).all()  # all options alike, up to rounding of the skew
        torch.testing.assert_close(skew, skew[:, :1].expand_as(skew))
        assert skew[0, 1] > 0 == skew[1, 1] > skew[2, 1]
        assert (early[:, 10:] == 0).all()  # Black–Scholes delta, no band
        assert (spread_and_skew(market, late)[0] != half_spread).all()
    early, late = (spread_and_skew(market, named(still.observe_at(t)))[0] for t in (0, 50))
    assert (late < early).all()
    wide = makers.avellaneda_stoikov(market, 0.25, 0.8, spread=1.5)
    torch.testing.assert_close(spread_and_skew(market, wide(still.observe_at(0)))[0], 1.5 * early)


@pytest.mark.parametrize("name", ["gbm", "heston", "garch"])
def test_minimum_variance_target_minimises_the_variance_of_a_step(name):
    """With the smile the book is at its fair value, without it at its reference price."""
    market = QuotingEnv(40_000, MODELS[name], quoted(60), num_steps=3, arrival_rate=1e-6, dtype=F64)
    market.reset(seed=0)
    market.position[:] = torch.ones(40_000, 2, 5, dtype=F64) * torch.tensor([[2.0], [-3.0]])
    observation = market.observe()
    constant = makers.constant_spread(market, 1.0)
    plain = makers.minimum_variance_band(market, constant, 0.1)
    smile = makers.with_the_smile(market, constant, StepMoves(market), 0.5, 0.1)
    move = market.spot[1] - market.spot[0]
    targets = []
    for policy, prices in ((plain, market.reference), (smile, market.mark)):
        action = market.by_name(policy(observation[:, 0]))
        target = action["target"].mean()
        assert (action["band"] == 0.1).all()
        hedge = target - (market.position * market.delta[0][:, None]).sum(-1)[0, 0]
        book = (market.position[:, 0] * (prices[1] - prices[0])).sum(-1)
        best = -torch.cov(torch.stack((book, move)))[0, 1] / move.var()
        assert float(hedge) == pytest.approx(best.item(), abs=0.02 + 0.05 * abs(target.item()))
        targets.append(target.item())
    if name == "gbm":
        assert targets[0] == 0
        assert targets[1] == pytest.approx(0, abs=1e-2)
    else:
        assert min(targets) > 0.1  # vega falls when the market rises


@pytest.mark.parametrize("expiries", [(24,), (16, 24)])
def test_quotes_are_shifted_by_a_share_of_the_way_to_the_fair_value(expiries):
    market = QuotingEnv(16, options=quoted(*expiries, dt=1 / 504), num_steps=12, dtype=F64)
    market.reset(seed=0)
    moves = StepMoves(market)
    quotes = makers.glft(market, 1.5, 0.8)
    plain = makers.minimum_variance_band(market, quotes, 0.2)
    policies = [makers.with_the_smile(market, quotes, moves, share, 0.2) for share in (0.0, 0.4, 1.0)]
    for _ in range(5):
        seen = market.observe()[:, 0]
        gap = market.gap[market.t, :, 0]
        before = market.by_name(plain(seen))
        actions = [market.by_name(policy(seen)) for policy in policies]
        for share, action in zip((0.0, 0.4, 1.0), actions, strict=True):
            torch.testing.assert_close(action["ask"] - before["ask"], share * gap, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(action["bid"] - before["bid"], -share * gap, rtol=1e-5, atol=1e-5)
            assert torch.equal(action["target"], actions[0]["target"])
            assert (action["band"] == 0.2).all()
        state = market.decode(seen)
        expected = -(state.position * moves.exposure_at(state)).sum(-1)
        torch.testing.assert_close(actions[0]["target"], expected)
        market.step(torch.stack([policies[1](seen)] * 2, 1))
    assert actions[0]["target"].abs().max() > 0.01


def test_a_maker_who_knows_the_fair_value_is_not_picked_off():
    """Where all takers are informed, Black–Scholes quotes lose what quotes around the fair value earn."""
    market = QuotingEnv(256, options=quoted(120, dt=1 / 504), num_steps=12, informed_share=1.0)
    moves = StepMoves(market)
    constant = makers.constant_spread(market, 1.0)
    earned = {}
    for share in (0.0, 1.0):
        env = AgainstRivals(market, [constant])
        env.reset(seed=0)
        policy = makers.with_the_smile(market, constant, moves, share, 0.0)
        earned[share] = play(env, policy)["income"].mean()
    assert earned[0.0] < 0 < earned[1.0]


def test_quotes_stay_finite_where_no_option_has_vega_left():
    market = QuotingEnv(2, num_steps=3)
    market.reset(seed=0)
    spot = torch.tensor([[100.0, 20.0, 20.0, 20.0], [100.0, 500.0, 500.0, 500.0]])
    market.set_market(spot, market.variance.T.clone(), market.intensity.transpose(0, 1), market.marks.transpose(0, 1))
    observation, _ = market.replay()
    glft = makers.glft(market, 1.2, 0.8)
    smile = makers.with_the_smile(market, glft, StepMoves(market), 1.0, 0.1)
    for policy in (makers.avellaneda_stoikov(market, 0.25, 0.8), glft, smile):
        market.replay()
        for _ in range(3):
            action = policy(market.observe()[:, 0])
            assert action.isfinite().all()
            observation, reward, *_ = market.step(action[:, None].expand(2, 2, -1))
            assert reward.isfinite().all()
            assert observation.isfinite().all()
