"""The dynamic programming in (t, ν, vega), and the closed form, on the market of Baldacci, Bergault & Guéant (2021)."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from envs.market.dynamics import Heston
from envs.market.fair import heston_call
from envs.market.quoting import ASK, BID
from envs.optimum.multi_asset import prices_of_risk, quadratic_value
from envs.optimum.vega import (
    ConstantGreeks,
    fills,
    interpolate,
    marginal_costs,
    move,
    trade,
    values,
    variance_transition,
)

F64 = torch.float64
SPOT = 10.0
VARIANCE = 0.0225
STRIKES = torch.tensor([8.0, 9.0, 10.0, 11.0, 12.0], dtype=F64)
EXPIRIES = torch.tensor([1.0, 1.5, 2.0, 3.0], dtype=F64)
AT_THE_MONEY = slice(8, 12)


@cache
def twenty_options() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Prices, V = ∂price/∂√ν and strikes (20,)."""
    strikes, expiries = (grid.flatten() for grid in torch.meshgrid(STRIKES, EXPIRIES, indexing="ij"))
    heston = Heston(VARIANCE, mean_variance=0.0225, mean_reversion=3.0, vol_of_vol=0.2, correlation=-0.5)
    bump = 1e-3

    def price(volatility):
        return heston_call(SPOT, strikes, expiries, volatility**2, heston)

    vegas = (price(VARIANCE**0.5 + bump) - price(VARIANCE**0.5 - bump)) / (2.0 * bump)
    return price(VARIANCE**0.5), vegas, strikes


@cache
def published_market() -> ConstantGreeks:
    prices, vegas, strikes = twenty_options()
    return ConstantGreeks(
        vegas=vegas,
        sizes=5e5 / prices,
        arrivals=252 * 30 / (1 + 0.7 * (SPOT - strikes).abs()),
        alpha=0.7,
        beta=150.0,
        mean_reversion=2.0,
        mean_variance=0.04,
        pricing_mean_reversion=3.0,
        pricing_mean_variance=0.0225,
        vol_of_vol=0.2,
        risk_aversion=1e-3,
        horizon=0.0012,
        vega_limit=1e7,
    )


def grids(num_variances, num_vegas):
    variances = torch.linspace(VARIANCE - 0.0081, VARIANCE + 0.0081, num_variances, dtype=F64)
    return variances, torch.linspace(-1e7, 1e7, num_vegas, dtype=F64)


def at_start(history):
    """u(0, ν₀, 0), in the middle of both grids."""
    _, num_variances, num_vegas = history.shape
    return float(history[0, num_variances // 2, num_vegas // 2])


@cache
def optimum(num_steps, num_vegas):
    return at_start(values(published_market(), *grids(7, num_vegas), num_steps))


def closed_form(market, x):
    """Quotes of the quadratic value function, as a function of the time left: (X, J, 2) edges."""
    edge = market.best_edge(torch.zeros(1, dtype=F64))
    w = market.beta * edge - 1.0  # h(c) = W(e^{−1−α−βc})/β, so h' = −W/(1 + W) and h'' = βW/(1 + W)³
    slope = -market.sizes * market.arrivals * w / (1.0 + w)
    curvature = market.sizes * market.arrivals / market.vegas * market.beta * w / (1.0 + w) ** 3
    covariance = 0.25 * market.vol_of_vol**2 * torch.outer(market.vegas, market.vegas)
    drift = market.premium(torch.tensor(VARIANCE, dtype=F64)) * market.vegas
    inventory = x[:, None] * market.vegas / (market.vegas @ market.vegas)  # any book with the vega x: A sees no more

    def edges(time_left):
        a, b = quadratic_value(covariance, curvature, slope, slope, market.risk_aversion, time_left, drift)
        return market.best_edge(prices_of_risk(a, b, inventory, market.sizes) / market.vegas[:, None])

    return edges


def test_prices_and_vegas():
    """Those of the published legend."""
    prices, vegas, _ = twenty_options()
    assert prices[AT_THE_MONEY].tolist() == pytest.approx([0.58, 0.71, 0.83, 1.02], abs=0.015)
    assert vegas[AT_THE_MONEY].tolist() == pytest.approx([1.25, 1.05, 0.92, 0.76], abs=0.015)


def test_optimum():
    """Independent code has 163,023 and 163,775 on these grids, and 164,001 on one finer (reference.md)."""
    coarse = optimum(180, 41)
    middle = optimum(360, 81)
    assert coarse == pytest.approx(163_023, rel=1e-4)
    assert middle == pytest.approx(163_775, rel=1e-4)
    assert middle == pytest.approx(164_001, rel=5e-3)


def test_optimum_converges():
    finest = optimum(720, 161)
    assert finest == pytest.approx(164_001, rel=1e-4)
    assert 0.0 < finest - optimum(360, 81) < 0.5 * (optimum(360, 81) - optimum(180, 41))


def test_quotes_that_ignore_risk():
    """Half of the optimum: 86,302 in independent code."""
    market = published_market()
    edge = market.best_edge(torch.zeros(1, dtype=F64))
    value = at_start(values(market, *grids(7, 81), 360, lambda time_left: edge))
    assert value == pytest.approx(86_302, rel=1e-3)


def test_closed_form_comes_close():
    """Its quotes reach at least 99 % of the optimum, untuned, and cannot exceed it."""
    market = published_market()
    variances, x = grids(7, 81)
    value = at_start(values(market, variances, x, 360, closed_form(market, x)))
    assert 0.99 * optimum(360, 81) < value < optimum(360, 81)


def test_value_of_the_best_quotes_is_the_optimum():
    """The edges of the optimum, played as a given policy, earn what it says."""
    market = published_market()
    variances, x = grids(3, 41)
    history = values(market, variances, x, 90)
    best = [market.best_edge(marginal_costs(u, x, market.fill_vegas)) for u in history]
    dt = market.horizon / 90
    replayed = values(market, variances, x, 90, lambda time_left: best[90 - round(time_left / dt) + 1])
    torch.testing.assert_close(replayed, history)


def test_without_risk():
    """γ = 0, a_P = a_Q and no limit: u = T Σ_i Σ_sides λ_i z_i V_i max_d f(d) d, whatever the book."""
    market = replace(published_market(), risk_aversion=0.0, mean_reversion=3.0, mean_variance=0.0225, vega_limit=1e12)
    d = torch.linspace(0, 0.1, 100_001, dtype=F64)
    best = (d * torch.sigmoid(-market.alpha - market.beta * d)).max()
    expected = market.horizon * 2.0 * (market.arrivals * market.fill_vegas).sum() * best
    u = values(market, *grids(3, 41), 20)[0]
    torch.testing.assert_close(u, expected.expand_as(u), rtol=1e-8, atol=0)


def test_interpolation_is_linear_beyond_the_grid():
    x = torch.linspace(-2, 2, 9, dtype=F64)
    value = torch.stack([3.0 - x, 2.0 * x + 1.0])
    points = torch.tensor([[-5.0, -2.0, 0.1, 2.0, 4.0]], dtype=F64)
    torch.testing.assert_close(interpolate(value, x, points), torch.cat([3.0 - points, 2.0 * points + 1.0]))


def test_marginal_costs():
    """Of U = −x²: c = 2x + v for buying and −2x + v for selling; fill vegas may depend on the variance."""
    x = torch.linspace(-2, 2, 9, dtype=F64)
    value = -(x**2).expand(2, -1)
    vegas = torch.tensor([0.5, 1.0], dtype=F64)
    inside = slice(2, -2)
    costs = marginal_costs(value, x, vegas)[:, inside]
    expected = 2.0 * x[inside, None] + vegas
    torch.testing.assert_close(costs[..., BID], expected.expand(2, -1, -1))
    torch.testing.assert_close(costs[..., ASK], expected.flip(0).expand(2, -1, -1))
    by_variance = marginal_costs(value, x, torch.stack([vegas, 2.0 * vegas]))
    torch.testing.assert_close(by_variance[:1], marginal_costs(value[:1], x, vegas))
    torch.testing.assert_close(by_variance[1:], marginal_costs(value[1:], x, 2.0 * vegas))


def test_no_fill_leads_beyond_the_limit():
    """A profit of 1 for each fill counts the fills allowed."""
    x = torch.linspace(-3, 3, 7, dtype=F64)
    vegas = torch.tensor([1.0, 2.5], dtype=F64)
    after, costs = trade(torch.zeros(2, 7, dtype=F64), x, vegas, torch.ones_like, limit=2.0)
    assert costs.shape == (2, 7, 2, 2)
    expected = (fills(x, vegas).abs() <= 2.0).double().sum((-2, -1))
    torch.testing.assert_close(after, expected.expand(2, -1))
    assert after[0].tolist() == [2, 2, 3, 2, 3, 2, 2]


def test_move():
    """E over the chain of U at the rescaled vega, less the penalty."""
    x = torch.linspace(-2, 2, 9, dtype=F64)
    value = torch.stack([x, 10.0 + 3.0 * x])
    transition = torch.tensor([[0.75, 0.25], [0.5, 0.5]], dtype=F64)
    penalty = torch.stack([x**2, 2.0 * x**2])
    expected = torch.stack([2.5 + 1.5 * 0.9 * x, 5.0 + 2.0 * 0.9 * x]) - penalty
    torch.testing.assert_close(move(value, x, transition, penalty, rescale=0.9), expected)


def test_variance_transition():
    """Mean and variance of a step inside the grid; upwind differences add |a| h dt to the variance."""
    variances = torch.linspace(0.01, 0.05, 21, dtype=F64)
    drift = 5.0 * (0.03 - variances)
    dt = 1e-4
    transition = variance_transition(variances, drift, 0.3, dt)
    moves = variances - variances[:, None]
    torch.testing.assert_close(transition.sum(1), torch.ones(21, dtype=F64))
    assert (transition >= 0).all()
    inside = slice(1, -1)
    torch.testing.assert_close((transition * moves).sum(1)[inside], (drift * dt)[inside])
    spread = 0.3**2 * variances * dt + drift.abs() * 0.002 * dt
    torch.testing.assert_close((transition * moves**2).sum(1)[inside], spread[inside])
    with pytest.raises(ValueError, match="too long"):
        variance_transition(variances, drift, 0.3, 1e-2)
