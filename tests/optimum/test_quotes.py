"""The best response, the edges of competition and of a cartel, and the inventory dynamic programming."""

import math

import pytest
import torch
from scipy.optimize import minimize_scalar

from envs import AgainstRivals, QuotingEnv
from envs.baselines import makers
from envs.benchmark.contest import play
from envs.benchmark.quoting import edge_error
from envs.market import dynamics
from envs.optimum.quotes import best_response, monopoly_edge, nash_edge, optimal_quotes

F64 = torch.float64


def gbm_market(num_envs, **settings) -> QuotingEnv:
    return QuotingEnv(num_envs, dynamics.GBM(0.2, 1 / 504), **settings)


@pytest.mark.parametrize(
    ("num_makers", "k", "reference_edge"), [(2, 2.0, 1.0), (3, 2.0, 1.0), (5, 0.7, 0.2), (2, 8.0, 1.5)]
)
def test_nash_and_monopoly_edges(num_makers, k, reference_edge):
    """Each solves its condition; oracles for two makers, k 2 per vol point, d_ref 1 in reference.md."""
    nash, monopoly = (f(num_makers, k, reference_edge) for f in (nash_edge, monopoly_edge))

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
    ours = best_response(torch.tensor(rivals, dtype=F64), 2.0, 1.0, torch.tensor(cost, dtype=F64))
    assert float(ours) == pytest.approx(best.x, abs=1e-5)
    in_floats = best_response(torch.tensor(rivals), 2.0, 1.0, torch.tensor(cost))
    assert float(in_floats) == pytest.approx(float(ours), abs=1e-5)


def test_dynamic_programming_without_risk_is_the_best_response():
    market = gbm_market(1024, risk_aversion=0.0, cost_rate=0.0)
    env = AgainstRivals(market, [makers.constant_spread(market, 1.1)])
    policy = optimal_quotes(env)
    assert policy.marginal_costs.abs().max() < 1e-9
    env.reset(seed=0)
    assert edge_error(env, policy) < 2e-3  # before the first quote the rival's is not known
    still = env.standing_still(1)
    best = best_response(torch.tensor([1.1]), 2.0, 1.0)
    torch.testing.assert_close(policy(still.observe_at(5))[0], torch.tensor([best, 0.0, 0.0, 0.0]))
    env.reset(seed=0)
    value = {}
    for name, family in (("best", policy), ("less", lambda o: policy(o) * 0.95), ("more", lambda o: policy(o) * 1.05)):
        value[name] = play(env, family)["objective_centred"].mean()
    assert value["best"] > max(value["less"], value["more"])


def test_dynamic_programming_charges_for_inventory():
    market = gbm_market(1)
    env = AgainstRivals(market, [makers.constant_spread(market, 1.1)])
    policy = optimal_quotes(env, band=0.2)
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
    averse = optimal_quotes(env, risk_aversion=2.0)
    assert averse.value < policy.value
    with pytest.raises(ValueError, match="under heston \\(only gbm\\)"):
        optimal_quotes(AgainstRivals(QuotingEnv(1), [policy]))


def test_dynamic_programming_predicts_its_value_where_its_assumptions_hold():
    """Far from expiry the spot's moves hardly change the vegas, and hedging is free; so the model is nearly exact."""
    settings = {"num_steps": 20, "expiry": 6000, "risk_aversion": 1e4, "cost_rate": 0.0, "moneyness": (0.0, 0.1)}
    market = gbm_market(8192, **settings, flow_sd=0.0, dtype=F64)
    env = AgainstRivals(market, [makers.constant_spread(market, 1.1)])
    policy = optimal_quotes(env)
    env.reset(seed=0)
    played = play(env, policy)["objective_centred"]
    neutral = play(env, optimal_quotes(env, risk_aversion=0.0))["objective_centred"]
    assert neutral.mean() < 0.8 * played.mean()  # so inventory does matter here
    assert played.mean() == pytest.approx(policy.value, rel=0.03)
