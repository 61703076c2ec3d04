"""The classical makers against published values, the best response and the inventory dynamic programming."""

import math

import numpy as np
import pytest
import torch
from conftest import MODELS
from scipy.optimize import minimize_scalar

from envs import AgainstRivals, QuotingEnv, baselines, benchmark, black_scholes, dynamics, makers, optimum

F64 = torch.float64


def gbm_market(num_envs, **settings) -> QuotingEnv:
    return QuotingEnv(num_envs, dynamics.GBM(0.2, 1 / 504), **settings)


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
            half, skew = baselines.avellaneda_stoikov_quotes(
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
    bid, ask = baselines.glft_exact_quotes(risk_aversion, sigma**2, 600.0, k, intensity, 30)
    assert bid[30] == pytest.approx(3.313045, abs=1e-6)
    assert bid[35] == pytest.approx(3.653479, abs=1e-6)
    assert ask[35] == pytest.approx(2.972522, abs=1e-6)
    assert bid[60] == ask[0] == np.inf
    for inventory, index in ((0.0, 30), (5.0, 35)):
        half, skew = baselines.glft_quotes(inventory, risk_aversion, sigma**2, k, intensity)
        assert float(half - skew) == pytest.approx(bid[index], abs=2e-3)
        assert float(half + skew) == pytest.approx(ask[index], abs=2e-3)
    assert float(sum(baselines.glft_quotes(0.0, risk_aversion, sigma**2, k, intensity))) == pytest.approx(
        3.312915, abs=1e-6
    )


def test_quotes_as_risk_aversion_vanishes():
    for formula, more in ((baselines.avellaneda_stoikov_quotes, (0.1, 2.0)), (baselines.glft_quotes, (2.0, 1e3))):
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
    ours = baselines._residual_variance(env, state)[:, None] * (0.01 * greeks.vega) ** 2
    torch.testing.assert_close(ours, expected, rtol=4e-2, atol=0)  # α and ρ are of a whole step, to order κ dt


def test_skew_sells_what_is_held_and_the_spread_narrows_with_time():
    market = QuotingEnv(1)
    named = baselines.avellaneda_stoikov(market, 0.25, 0.8)
    env = AgainstRivals(market, [named])
    still = env.standing_still(3)
    vega = torch.tensor([-1.0, 0.0, 1.0])
    for policy in (named, baselines.glft(market, 1.5, 0.8)):
        early, late = policy(still.observe_at(0, vega)), policy(still.observe_at(50, vega))
        assert early[0, 1] > 0 == early[1, 1] > early[2, 1]
        assert (early[:, 2:] == 0).all()  # Black–Scholes delta, no band
        assert (late[:, 0] != early[:, 0]).all()
    assert (named(still.observe_at(50))[:, 0] < named(still.observe_at(0))[:, 0]).all()
    wide = baselines.avellaneda_stoikov(market, 0.25, 0.8, spread=1.5)
    torch.testing.assert_close(wide(still.observe_at(0))[:, 0], 1.5 * named(still.observe_at(0))[:, 0])


@pytest.mark.parametrize("name", ["gbm", "heston", "garch"])
def test_minimum_variance_target_minimises_the_variance_of_a_step(name):
    market = QuotingEnv(40_000, MODELS[name], dtype=F64, num_steps=3, expiry=60)
    market.reset(seed=0)
    market.position = torch.ones(40_000, 2, 5, dtype=F64) * torch.tensor([[2.0], [-3.0]])
    observation = market.observe()
    policy = baselines.minimum_variance_band(market, baselines.constant_spread(market, 1.0), 0.1)
    target = policy(observation[:, 0])[:, 2].mean()
    assert (policy(observation[:, 0])[:, 3] == 0.1).all()
    hedge = target - (market.position * market.delta[0][:, None]).sum(-1)[0, 0]
    move = market.spot[1] - market.spot[0]
    book = (market.position[:, 0] * (market.mark[1] - market.mark[0])).sum(-1)
    best = -torch.cov(torch.stack((book, move)))[0, 1] / move.var()
    assert float(hedge) == pytest.approx(best.item(), abs=0.02 + 0.05 * abs(target.item()))
    if name == "gbm":
        assert target == 0


@pytest.mark.parametrize(
    ("num_makers", "k", "reference_edge"), [(2, 2.0, 1.0), (3, 2.0, 1.0), (5, 0.7, 0.2), (2, 8.0, 1.5)]
)
def test_nash_and_monopoly_edges(num_makers, k, reference_edge):
    """Each solves its condition; oracles for two makers, k 2 per vol point, d_ref 1 in reference.md."""
    nash, monopoly = (f(num_makers, k, reference_edge) for f in (optimum.nash_edge, optimum.monopoly_edge))

    def share(d):
        return math.exp(-k * (d - reference_edge)) / (1 + num_makers * math.exp(-k * (d - reference_edge)))

    assert nash == pytest.approx(1 / (k * (1 - share(nash))), abs=1e-9)
    assert monopoly == pytest.approx(1 / (k * (1 - num_makers * share(monopoly))), abs=1e-9)
    assert nash < monopoly
    if num_makers == k == 2:
        assert nash == pytest.approx(0.7995, abs=5e-5)
        assert monopoly == pytest.approx(1.187, abs=5e-4)


@pytest.mark.parametrize("cost", [-1.5, 0.0, 0.4, 3.0])
@pytest.mark.parametrize("rivals", [(), (0.8,), (0.3, 1.7), (-2.0, 5.0, 1.0)])
def test_best_response_earns_most(rivals, cost):
    def profit(d):
        picked = math.exp(-2.0 * (d - 1.0))
        return (d - cost) * picked / (1 + picked + sum(math.exp(-2.0 * (r - 1.0)) for r in rivals))

    best = minimize_scalar(lambda d: -profit(d), bounds=(cost, cost + 5), method="bounded", options={"xatol": 1e-10})
    ours = optimum.best_response(torch.tensor(rivals, dtype=F64), 2.0, 1.0, torch.tensor(cost, dtype=F64))
    assert float(ours) == pytest.approx(best.x, abs=1e-5)
    in_floats = optimum.best_response(torch.tensor(rivals), 2.0, 1.0, torch.tensor(cost))
    assert float(in_floats) == pytest.approx(float(ours), abs=1e-5)


def test_dynamic_programming_without_risk_is_the_best_response():
    market = gbm_market(1024, risk_aversion=0.0, cost_rate=0.0)
    env = AgainstRivals(market, [baselines.constant_spread(market, 1.1)])
    policy = optimum.optimal_quotes(env)
    assert policy.marginal_costs.abs().max() < 1e-9
    env.reset(seed=0)
    assert makers.edge_error(env, policy) < 2e-3  # before the first quote the rival's is not known
    still = env.standing_still(1)
    best = optimum.best_response(torch.tensor([1.1]), 2.0, 1.0)
    torch.testing.assert_close(policy(still.observe_at(5))[0], torch.tensor([best, 0.0, 0.0, 0.0]))
    env.reset(seed=0)
    value = {}
    for name, family in (("best", policy), ("less", lambda o: policy(o) * 0.95), ("more", lambda o: policy(o) * 1.05)):
        value[name] = benchmark.play(env, family)["objective_centred"].mean()
    assert value["best"] > max(value["less"], value["more"])


def test_dynamic_programming_charges_for_inventory():
    market = gbm_market(1)
    env = AgainstRivals(market, [baselines.constant_spread(market, 1.1)])
    policy = optimum.optimal_quotes(env, band=0.2)
    costs, vegas = policy.marginal_costs, policy.vegas
    middle = len(vegas) // 2
    assert vegas[middle].abs() < 1e-6
    assert (costs[:, middle] > 0).all()  # flat, every trade adds risk
    torch.testing.assert_close(costs[:, :, 0], costs[:, :, 1].flip(1), rtol=1e-4, atol=1e-5)  # buying mirrors selling
    inner = costs[0, middle - 200 : middle + 200, 0]
    assert (inner.diff() < 0).all()  # the more is held, the more gladly it is sold
    action = policy(env.standing_still(1).observe_at(0, torch.tensor([1.0])))
    assert action[0, 1] < 0
    assert action[0, 3] == pytest.approx(0.2)
    averse = optimum.optimal_quotes(env, risk_aversion=2.0)
    assert averse.value < policy.value
    with pytest.raises(ValueError, match="under heston \\(only gbm\\)"):
        optimum.optimal_quotes(AgainstRivals(QuotingEnv(1), [policy]))


def test_dynamic_programming_predicts_its_value_where_its_assumptions_hold():
    """Far from expiry the spot's moves hardly change the vegas, and hedging is free; so the model is nearly exact."""
    settings = {"num_steps": 20, "expiry": 6000, "risk_aversion": 1e4, "cost_rate": 0.0, "moneyness": (0.0, 0.1)}
    market = gbm_market(8192, **settings, flow_sd=0.0, dtype=F64)
    env = AgainstRivals(market, [baselines.constant_spread(market, 1.1)])
    policy = optimum.optimal_quotes(env)
    env.reset(seed=0)
    played = benchmark.play(env, policy)["objective_centred"]
    neutral = benchmark.play(env, optimum.optimal_quotes(env, risk_aversion=0.0))["objective_centred"]
    assert neutral.mean() < 0.8 * played.mean()  # so inventory does matter here
    assert played.mean() == pytest.approx(policy.value, rel=0.03)


@pytest.mark.slow
def test_tuning_is_repeatable_and_beats_its_neighbours():
    market = QuotingEnv(32, num_steps=4, expiry=8)
    tuned = makers.classical_makers(market)
    assert makers.classical_makers(market).parameters == tuned.parameters
    assert set(tuned.parameters) == {*tuned.policies, makers.RIVAL}
    env = tuned.env
    env.reset(seed=benchmark.TUNING_SEED)
    a, k = tuned.parameters["GLFT, tuned"]
    best = benchmark.play(env, tuned.policies["GLFT, tuned"])["objective_centred"].mean()
    fine = makers.COARSE_TO_FINE[-1]
    for x, y in (
        (a * fine, k),
        (a / fine, k),
        (a, k * fine),
        (a, k / fine),
        (a * fine, k / fine),
        (a / fine, k * fine),
    ):
        assert benchmark.play(env, baselines.glft(market, x, y))["objective_centred"].mean() <= best
    wide = makers.classical_makers(market, rival_spread=1.5, rival_risk_aversion=2.0)
    a, k, spread = tuned.parameters[makers.RIVAL]
    assert wide.parameters[makers.RIVAL] == (2 * a, k, 1.5 * spread)


def test_without_risk_the_rivals_quote_the_nash_edge():
    market = gbm_market(512, risk_aversion=0.0, cost_rate=0.0, num_steps=20, expiry=40)
    tuned = makers.classical_makers(market)
    action = tuned.env.rivals[0](tuned.env.standing_still(1).observe_at(3))
    assert action[0, 0] == pytest.approx(0.7995, rel=0.08)  # the grid's step
    assert action[0, 1].abs() < 1e-4


def test_quotes_stay_finite_where_no_option_has_vega_left():
    market = QuotingEnv(2, num_steps=3, expiry=6)
    market.reset(seed=0)
    spot = torch.tensor([[100.0, 20.0, 20.0, 20.0], [100.0, 500.0, 500.0, 500.0]])
    market.set_market(spot, market.variance.T.clone(), market.intensity.transpose(0, 1), market.marks.transpose(0, 1))
    observation, _ = market.replay()
    for policy in (baselines.avellaneda_stoikov(market, 0.25, 0.8), baselines.glft(market, 1.2, 0.8)):
        market.replay()
        for _ in range(3):
            action = policy(market.observe()[:, 0])
            assert action.isfinite().all()
            observation, reward, *_ = market.step(action[:, None].expand(2, 2, 4))
            assert reward.isfinite().all()
            assert observation.isfinite().all()
