import math

import pytest
import torch

from envs.market import black_scholes as bs

F64 = torch.float64


def grid():
    """Spot, strike, time to expiry and volatility (n,) from deep out of the money to deep in the money."""
    strikes = torch.tensor([60.0, 85.0, 99.0, 100.0, 101.0, 120.0, 170.0], dtype=F64)
    taus = torch.tensor([1 / 252, 30 / 252, 1.0, 5.0], dtype=F64)
    volatilities = torch.tensor([0.05, 0.2, 0.8], dtype=F64)
    strike, tau, volatility = (x.flatten() for x in torch.meshgrid(strikes, taus, volatilities, indexing="ij"))
    return torch.full_like(strike, 100.0), strike, tau, volatility


def test_known_values():
    # S = K = 100, σ = 20 %, one year: 200 (N(0.1) − ½)
    assert bs.price(torch.tensor(100.0, dtype=F64), 100, 1, 0.2).item() == pytest.approx(7.965567455405804, abs=1e-12)
    assert bs.delta(torch.tensor(100.0, dtype=F64), 100, 1, 0.2).item() == pytest.approx(0.539827837277029, abs=1e-12)
    assert bs.gamma(torch.tensor(100.0, dtype=F64), 100, 0.25, 0.2).item() == pytest.approx(0.03984439, abs=1e-8)


def test_put_call_parity():
    spot, strike, tau, volatility = grid()
    call, put = (bs.price(spot, strike, tau, volatility, c) for c in (True, False))
    torch.testing.assert_close(call - put, spot - strike, atol=1e-11, rtol=0)
    deltas = [bs.delta(spot, strike, tau, volatility, c) for c in (True, False)]
    torch.testing.assert_close(deltas[0] - deltas[1], torch.ones_like(spot), atol=1e-14, rtol=0)


@pytest.mark.parametrize("is_call", [True, False])
def test_greeks_are_the_derivatives_of_the_price(is_call):
    spot, strike, tau, volatility = (x.clone().requires_grad_() for x in grid())
    value = bs.price(spot, strike, tau, volatility, is_call)
    d_spot, d_tau, d_volatility = torch.autograd.grad(value.sum(), (spot, tau, volatility), create_graph=True)
    d2_spot = torch.autograd.grad(d_spot.sum(), spot)[0]
    close = {"atol": 1e-10, "rtol": 1e-8}
    torch.testing.assert_close(bs.delta(spot, strike, tau, volatility, is_call), d_spot, **close)
    torch.testing.assert_close(bs.gamma(spot, strike, tau, volatility), d2_spot, **close)
    torch.testing.assert_close(bs.vega(spot, strike, tau, volatility), d_volatility, **close)
    torch.testing.assert_close(bs.theta(spot, strike, tau, volatility), -d_tau, **close)


def test_black_scholes_equation():
    spot, strike, tau, volatility = grid()
    theta, gamma = bs.theta(spot, strike, tau, volatility), bs.gamma(spot, strike, tau, volatility)
    torch.testing.assert_close(theta, -0.5 * volatility**2 * spot**2 * gamma, atol=1e-10, rtol=1e-10)


def test_price_is_the_expected_payoff():
    z = torch.randn(400_000, generator=torch.Generator().manual_seed(0), dtype=F64)
    terminal = 100 * torch.exp(0.3 * z - 0.045)
    for strike in (80.0, 100.0, 130.0):
        payoff = (terminal - strike).clamp(min=0)
        error = payoff.mean() - bs.price(torch.tensor(100.0, dtype=F64), strike, 1.0, 0.3)
        assert abs(error) < 4 * payoff.std() / len(z) ** 0.5


@pytest.mark.parametrize(("tau", "volatility"), [(0.0, 0.2), (1.0, 0.0), (0.0, 0.0)])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_limits_without_uncertainty(tau, volatility, dtype):
    spot = torch.tensor([90.0, 100.0, 110.0], dtype=dtype, requires_grad=True)
    value = bs.price(spot, 100.0, tau, volatility)
    assert value.tolist() == [0.0, 0.0, 10.0]
    assert bs.price(spot, 100.0, tau, volatility, False).tolist() == [10.0, 0.0, 0.0]
    assert bs.delta(spot, 100.0, tau, volatility).tolist() == [0.0, 0.5, 1.0]
    assert torch.autograd.grad(value.sum(), spot)[0].tolist() == [0.0, 0.5, 1.0]
    assert bs.gamma(spot, 100.0, tau, volatility).tolist() == [0.0, math.inf, 0.0]
    assert bs.theta(spot, 100.0, tau, volatility)[[0, 2]].tolist() == [0.0, 0.0]
    assert not bs.theta(spot, 100.0, tau, volatility).isnan().any()
    # with time but no volatility, the at-the-money vega is S√τ n(0)
    at_the_money = 100 * tau**0.5 * bs.INV_SQRT_2PI if tau else 0.0
    assert bs.vega(spot, 100.0, tau, volatility).tolist() == pytest.approx([0.0, at_the_money, 0.0])


def test_far_from_the_money():
    spot = torch.tensor([1.0, 1e4], dtype=F64)
    assert bs.price(spot, 100.0, 0.1, 0.2).tolist() == pytest.approx([0.0, 9900.0])
    assert bs.delta(spot, 100.0, 0.1, 0.2).tolist() == [0.0, 1.0]
    for greek in (bs.gamma, bs.vega, bs.theta):
        assert greek(spot, 100.0, 0.1, 0.2).abs().max() < 1e-100


def test_left_tail_of_the_normal_distribution():
    from scipy.special import ndtr

    x = torch.linspace(-30, 5, 71, dtype=F64)
    torch.testing.assert_close(bs.normal_cdf(x), torch.from_numpy(ndtr(x.numpy())), rtol=1e-12, atol=0)


@pytest.mark.parametrize("tau", [1 / 252, 30 / 252, 1.0, 5.0])
@pytest.mark.parametrize("volatility", [0.01, 0.2, 1.0])
@pytest.mark.parametrize("is_call", [True, False])
def test_implied_volatility_inverts_the_price(tau, volatility, is_call):
    deviations = torch.linspace(-5, 5, 201, dtype=F64)
    spot = torch.tensor(100.0, dtype=F64)
    strike = 100 * torch.exp(deviations * volatility * tau**0.5)
    value = bs.price(spot, strike, tau, volatility, is_call)
    implied = bs.implied_volatility(value, spot, strike, tau, is_call)
    error = (implied - volatility).abs()
    in_the_money = (deviations < 0) if is_call else (deviations > 0)
    # In the money the price carries its time value to its own last digit only: half a rounding of it over the vega.
    resolution = torch.finfo(F64).eps * value / bs.vega(spot, strike, tau, volatility)
    assert (error[in_the_money] <= resolution[in_the_money] + 1e-10).all()
    assert error[~in_the_money].max() < 1e-10


def test_implied_volatility_outside_the_arbitrage_bounds():
    spot, strike = torch.tensor(100.0, dtype=F64), 80.0
    implied = bs.implied_volatility(torch.tensor([-1.0, 19.99, 20.0, 25.0, 100.0, 120.0], dtype=F64), spot, strike, 1.0)
    assert implied.isnan().tolist() == [True, True, False, False, True, True]
    assert implied[2] == 0.0
    put = bs.implied_volatility(torch.tensor([0.0, 5.0, 80.0], dtype=F64), spot, strike, 1.0, is_call=False)
    assert put.isnan().tolist() == [False, False, True]
    assert bs.implied_volatility(torch.tensor(20.0), 100.0, strike, 0.0).isnan()
    assert bs.implied_volatility(torch.tensor(math.nan), 100.0, strike, 1.0).isnan()


def test_implied_volatility_is_differentiable():
    spot, strike, tau, volatility = grid()
    keep = bs.vega(spot, strike, tau, volatility) > 1e-3
    spot, strike, tau, volatility = (x[keep] for x in (spot, strike, tau, volatility))
    value = bs.price(spot, strike, tau, volatility).requires_grad_()
    gradient = torch.autograd.grad(bs.implied_volatility(value, spot, strike, tau).sum(), value)[0]
    torch.testing.assert_close(gradient, 1 / bs.vega(spot, strike, tau, volatility), rtol=1e-5, atol=1e-8)


def test_float32_and_broadcasting():
    value = bs.price(torch.full((5, 1), 100.0), torch.tensor([90.0, 100.0, 110.0]), 0.5, 0.2, torch.tensor(True))
    assert value.shape == (5, 3)
    assert value.dtype == torch.float32
    implied = bs.implied_volatility(value, torch.full((5, 1), 100.0), torch.tensor([90.0, 100.0, 110.0]), 0.5)
    torch.testing.assert_close(implied, torch.full((5, 3), 0.2), atol=1e-5, rtol=0)


def test_greeks_at_once_are_those_one_by_one():
    generator = torch.Generator().manual_seed(0)
    spot = 100 * torch.exp(0.2 * torch.randn(500, generator=generator, dtype=torch.float64))
    tau = torch.rand(500, generator=generator, dtype=torch.float64).round(decimals=1)  # zero among them
    is_call = torch.rand(500, generator=generator) < 0.5
    together = bs.greeks(spot, 100.0, tau, 0.2, is_call)
    assert torch.equal(together.price, bs.price(spot, 100.0, tau, 0.2, is_call))
    assert torch.equal(together.delta, bs.delta(spot, 100.0, tau, 0.2, is_call))
    assert torch.equal(together.gamma, bs.gamma(spot, 100.0, tau, 0.2))
    assert torch.equal(together.vega, bs.vega(spot, 100.0, tau, 0.2))
