import math
from functools import cache

import numpy as np
import pytest
import torch
from common import MODELS, SP500_GARCH
from scipy.integrate import quad
from scipy.stats import ncx2, norm

from envs.market import black_scholes, dynamics, fair

F64 = torch.float64
NAMES = [name for name in MODELS if name != "marlvol"]  # the fair values of marlvol are not tables in the variance
NUM_STEPS = 40
STRIKES = torch.tensor([88.0, 95.0, 100.0, 104.0, 110.0], dtype=F64)
HALF_DAYS = dynamics.Heston(dt=1 / 504)


@cache
def table_of(name: str) -> fair.PremiumTable:
    return fair.premium_table(MODELS[name], 0, NUM_STEPS)


@cache
def half_days() -> fair.PremiumTable:
    return fair.premium_table(HALF_DAYS, 60, 240)


def reference_volatility(model, variance, steps_left):
    return model.expected_average_variance(variance, steps_left).sqrt()


def paths(model, num_paths, num_steps, seed):
    generator = torch.Generator().manual_seed(seed)
    noise = dynamics.draw_noise(num_paths, num_steps * model.noise_size, generator, F64)
    spot, variance = model.simulate(noise.view(num_paths, num_steps, model.noise_size))
    return spot[..., None], variance[..., None]


def errors_of(sample):
    """Mean over standard error, of every column."""
    return sample.mean(0) / (sample.std(0) / len(sample) ** 0.5 + 1e-12)


# HESTON


@pytest.mark.parametrize(("years", "published"), [(1.0, 5.785155450), (10.0, 22.318945791474590)])
def test_heston_call_is_that_of_fang_and_oosterlee(years, published):
    """Fang & Oosterlee (2008), section 5.2: eight published digits for one year, all for ten."""
    model = dynamics.Heston(
        initial_variance=0.0175, mean_variance=0.0398, mean_reversion=1.5768, vol_of_vol=0.5751, correlation=-0.5711
    )
    assert fair.heston_call(100.0, 100.0, years, 0.0175, model).item() == pytest.approx(published, abs=2e-8)


def test_heston_call_against_the_published_formula():
    """Against φ as Albrecher et al. (2007) print it, integrated adaptively: other strikes, times and variances."""

    def characteristic(u, tau, v, k=4.0, theta=0.04, xi=0.5, rho=-0.7):
        d = np.sqrt((rho * xi * 1j * u - k) ** 2 + xi**2 * (1j * u + u**2))
        g = (k - rho * xi * 1j * u - d) / (k - rho * xi * 1j * u + d)
        c = k * theta / xi**2 * ((k - rho * xi * 1j * u - d) * tau - 2 * np.log((1 - g * np.exp(-d * tau)) / (1 - g)))
        return np.exp(c + v / xi**2 * (k - rho * xi * 1j * u - d) * (1 - np.exp(-d * tau)) / (1 - g * np.exp(-d * tau)))

    for strike, tau, v in ((80.0, 0.1, 0.04), (100.0, 0.25, 0.01), (115.0, 0.5, 0.2), (300.0, 2.0, 0.04)):
        x = math.log(100 / strike)
        args = (x, tau, v)
        integral = quad(
            lambda u, x, tau, v: (np.exp(1j * u * x) * characteristic(u - 0.5j, tau, v)).real / (u**2 + 0.25),
            *(0, 400, args), limit=500, epsabs=1e-12,
        )[0]  # fmt: skip
        exact = 100 - math.sqrt(100 * strike) / math.pi * integral
        assert fair.heston_call(100.0, strike, tau, v, dynamics.Heston()).item() == pytest.approx(exact, abs=1e-7)


def test_heston_forward_starts():
    """They are vanillas averaged over the law of the variance at the start, and vanillas themselves from today on."""
    model = dynamics.Heston(0.05, 0.04, 3.0, 0.6, -0.6)
    strike = np.array([0.9, 0.97, 1.0, 1.05])
    start, tau = 21 / 252, 30 / 252
    found = fair.heston_forward_start_call(strike, start, tau, model)
    decay = math.exp(-3.0 * start)
    scale = 0.36 * (1 - decay) / 12
    law = ncx2(4 * 3 * 0.04 / 0.36, 0.05 * decay / scale, scale=scale)  # Cox, Ingersoll & Ross (1985)
    node, weight = np.polynomial.legendre.leggauss(200)
    root = 0.5 * (node + 1)
    node = law.ppf(1 - 1e-12) * root**3  # the density is infinite at 0
    weight = weight * root**2 * law.pdf(node)
    averaged = [fair.heston_call(1.0, k, tau, node, model).numpy() @ weight / weight.sum() for k in strike]
    np.testing.assert_allclose(found.numpy(), averaged, atol=2e-8)
    today = fair.heston_forward_start_call(strike, 0.0, tau, model)
    torch.testing.assert_close(today, fair.heston_call(1.0, strike, tau, 0.05, model), atol=1e-14, rtol=0)


def test_heston_smile_at_the_start():
    """Implied volatilities and premiums in vol points by independent code, to the digits noted there."""
    tau = 120 / 504
    strike = 100 * torch.exp(torch.linspace(-1, 1, 5, dtype=F64) * 0.2 * math.sqrt(tau))
    spot = torch.full_like(strike, 100.0)
    variance = torch.tensor(0.04, dtype=F64)
    premium = half_days()(torch.tensor(120), (spot / strike).log(), variance)[:, 0] * strike
    call = black_scholes.price(spot, strike, tau, 0.2) + premium
    volatility = black_scholes.implied_volatility(call, spot, strike, tau)
    expected = torch.tensor([22.3, 20.7, 19.2, 17.6, 16.2], dtype=F64)
    torch.testing.assert_close(100 * volatility, expected, atol=0.1, rtol=0)
    expected = torch.tensor([2.40, 0.78, -0.81, -2.38, -3.42], dtype=F64)
    points = 100 * premium / black_scholes.vega(spot, strike, tau, 0.2)
    torch.testing.assert_close(points, expected, atol=0.01, rtol=0)


@pytest.mark.parametrize("num_steps", [60, 120, 240])
def test_heston_table_is_accurate(num_steps):
    """Between the nodes, to 0.01 vol points of the option's own vega; and its derivatives are those of the formula."""
    generator = torch.Generator().manual_seed(num_steps)
    uniform = torch.rand(2, 300, generator=generator, dtype=F64)
    variance = (0.1 + 0.3 * uniform[0]) ** 2
    volatility = reference_volatility(HALF_DAYS, variance, num_steps)
    tau = num_steps / 504
    x = (5 * uniform[1] - 2.5) * volatility * math.sqrt(tau)

    def exact(x, variance):
        volatility = reference_volatility(HALF_DAYS, variance, num_steps)
        call = fair.heston_call(x.exp(), 1.0, tau, variance, HALF_DAYS)
        return call - black_scholes.price(x.exp(), 1.0, tau, volatility)

    premium, in_x, in_v = half_days()(torch.tensor(num_steps), x, variance).unbind(-1)
    vega = black_scholes.vega(x.exp(), 1.0, tau, volatility)
    assert ((premium - exact(x, variance)) / vega).abs().max() < 0.01 * 0.01
    eps = 1e-4
    slope = (exact(x + eps, variance) - exact(x - eps, variance)) / (2 * eps)
    assert (in_x - slope).abs().max() < 2e-3
    assert slope.abs().max() > 0.05
    step = eps * variance
    slope = (exact(x, variance + step) - exact(x, variance - step)) / (2 * step)
    assert (in_v - slope).abs().max() < 3e-3
    assert slope.abs().max() > 0.05


def test_without_vol_of_vol_there_is_no_premium():
    table = fair.premium_table(dynamics.Heston(vol_of_vol=1e-4), 1, 30)
    assert table.values[..., 0].abs().max() < 2e-6
    garch = dynamics.GARCH(omega=4e-6, alpha=0.0, gamma=0.0, beta=0.97)
    # Here the variance is known in advance. The first steps are least accurate: the premium is read from the grid
    assert fair.premium_table(garch, 1, 10).values[..., 0].abs().max() < 2e-6


# MERTON


def test_merton_against_integration():
    """E[(S − K)⁺] over the density of ln S, a Poisson mixture of normals, integrated adaptively."""
    model = dynamics.Merton()
    growth = math.exp(model.jump_mean + 0.5 * model.jump_volatility**2) - 1
    table = table_of("merton")
    for num_steps in (1, 10, 40):
        tau = num_steps * model.dt

        def density(y, tau=tau):
            total = 0.0
            for n in range(12):
                weight = math.exp(-model.jump_rate * tau) * (model.jump_rate * tau) ** n / math.factorial(n)
                mean = n * model.jump_mean - (0.5 * model.volatility**2 + model.jump_rate * growth) * tau
                total += weight * norm.pdf(y, mean, math.sqrt(model.volatility**2 * tau + n * model.jump_volatility**2))
            return total

        for strike in (90.0, 100.0, 103.0):
            x = math.log(100 / strike)
            breaks = [y for y in (-0.3, -0.1, -0.03, 0.0, 0.03) if y < -x]
            put = quad(lambda y, x=x: (1 - math.exp(x + y)) * density(y), -1.2, -x, points=breaks, limit=200)[0]
            volatility = math.sqrt(model.initial_variance)
            reference = black_scholes.price(torch.tensor(math.exp(x), dtype=F64), 1.0, tau, volatility, False)
            found = table(torch.tensor(num_steps), torch.tensor(x, dtype=F64), torch.tensor(0.04, dtype=F64))[0]
            vega = black_scholes.vega(torch.tensor(1.0, dtype=F64), 1.0, tau, volatility)
            assert abs(found - (put - reference)) < 1e-4 * vega


def test_merton_without_jumps_is_black_scholes():
    values = fair.premium_table(dynamics.Merton(jump_rate=0.0), 0, 5).values
    torch.testing.assert_close(values, torch.zeros_like(values), atol=1e-12, rtol=0)


# BACKWARD INDUCTION


def test_garch_against_simulation():
    """200,000 paths, with Black–Scholes' delta hedge as control variate: a martingale, so it changes no mean."""
    model = SP500_GARCH
    table = table_of("garch")
    spot, variance = paths(model, 200_000, NUM_STEPS, seed=5)
    payoff = (spot[:, -1] - STRIKES).clamp(min=0)
    for t in range(NUM_STEPS):
        m = NUM_STEPS - t
        delta = black_scholes.delta(spot[:, t], STRIKES, m * model.dt, reference_volatility(model, variance[:, t], m))
        payoff = payoff - delta * (spot[:, t + 1] - spot[:, t])
    start = torch.full_like(STRIKES, 100.0)
    v = torch.tensor(model.initial_variance, dtype=F64)
    volatility = reference_volatility(model, v, NUM_STEPS)
    premium = STRIKES * table(torch.tensor(NUM_STEPS), (start / STRIKES).log(), v)[:, 0]
    fair_value = black_scholes.price(start, STRIKES, NUM_STEPS * model.dt, volatility) + premium
    standard_error = payoff.std(0) / len(payoff) ** 0.5
    assert ((payoff.mean(0) - fair_value).abs() < 4 * standard_error).all()
    assert (premium.abs() > 10 * standard_error).any()  # the test would see a premium left out


def test_garch_one_step_is_lognormal():
    values = fair.premium_table(SP500_GARCH, 1, 1).values[..., 0]
    assert values.abs().max() < 1e-6


def test_induction_is_converged(monkeypatch):
    """Half as many nodes again in every direction move no premium by 0.01 vol points of the vega at the money."""
    coarse = table_of("garch")
    monkeypatch.setattr(fair, "NUM_MONEYNESS", 201)
    monkeypatch.setattr(fair, "NUM_INDUCTION_VARIANCES", 91)
    monkeypatch.setattr(fair, "HALF_LINE_NODES", {1: 12})
    fine = fair.premium_table(SP500_GARCH, 16, 16)
    v = torch.linspace(0.08, 0.5, 40, dtype=F64)[:, None] ** 2
    volatility = reference_volatility(SP500_GARCH, v, 16)
    x = torch.linspace(-2.5, 2.5, 81, dtype=F64) * volatility * math.sqrt(16 / 252)
    difference = (coarse(torch.tensor(16), x, v) - fine(torch.tensor(16), x, v))[..., 0]
    vega = black_scholes.vega(torch.tensor(1.0, dtype=F64), 1.0, 16 / 252, volatility)
    assert (difference / vega).abs().max() < 1e-4


def test_heston_by_induction():
    """The induction over the scheme's own steps against the characteristic function in continuous time."""
    model = dynamics.Heston()
    table = table_of("heston")
    *_, (m, premium) = fair._induction_slabs(model, table.moneyness, table.variance, 6)
    exact = table.values[m, ..., 0]
    volatility = reference_volatility(model, table.variance, m)
    x = table.moneyness[:, None] * math.sqrt(m * model.dt)
    vega = black_scholes.vega(torch.ones(1, dtype=F64), 1.0, m * model.dt, volatility)
    points = 100 * (premium - exact) / vega
    visited = (table.variance > 0.1**2) & (table.variance < 0.5**2)
    near = (x.abs() < 2.5 * volatility * math.sqrt(m * model.dt)) & visited
    assert points[near].abs().max() < 0.05
    assert (100 * exact / vega)[near].abs().max() > 0.7


def test_a_model_without_a_step_has_no_table():
    class Stepless(dynamics.Dynamics):
        initial_variance = 0.04

    with pytest.raises(NotImplementedError):
        fair.premium_table(Stepless(), 1, 2)
    with pytest.raises(ValueError, match="steps to expiry from 5 to 4"):
        fair.premium_table(dynamics.GBM(), 5, 4)


# EVERY MODEL


@pytest.mark.parametrize("name", NAMES)
def test_fair_values_are_martingales(name):
    """E[F_t] = F_0 for five strikes, and so after a delta hedge, which leaves a small part of the variance.

    Calls only: a put is a call less the spot, a martingale, plus the strike.
    """
    model = MODELS[name]
    table = table_of(name)
    spot, variance = paths(model, 20_000, NUM_STEPS, seed=6)
    gains = torch.zeros(len(spot), len(STRIKES), dtype=F64)
    for t in range(NUM_STEPS + 1):
        m = NUM_STEPS - t
        now = spot[:, t]
        volatility = reference_volatility(model, variance[:, t], m)
        price, delta, _, _ = black_scholes.greeks(now, STRIKES, m * model.dt, volatility)
        premium, in_x, _ = (STRIKES[:, None] * table(torch.tensor(m), (now / STRIKES).log(), variance[:, t])).unbind(-1)
        value = price + premium
        if t == 0:
            start = value[0].clone()
        elif t in (1, 5, 20, 30, 39, 40):
            assert errors_of(value - start).abs().max() < 4
            hedged = value - start - gains
            assert errors_of(hedged).abs().max() < 4
            assert hedged.var(0).sum() < 0.3 * (value - start).var(0).sum()
        if t < NUM_STEPS:
            gains = gains + (delta + in_x / now) * (spot[:, t + 1] - now)


@pytest.mark.parametrize("name", NAMES)
def test_limits(name):
    """Nothing at expiry, next to nothing far from the money, no NaN anywhere, and in gbm nothing at all."""
    table = table_of(name)
    x = torch.linspace(-3, 3, 25, dtype=F64)
    v = torch.linspace(0, 1.2, 13, dtype=F64)[:, None]
    assert (table(torch.tensor(0), x, v) == 0).all()
    far = table(torch.tensor([[1.0], [20.0], [40.0]], dtype=F64), torch.tensor([-3.0, 3.0], dtype=F64), v[:2, None])
    assert far.shape == (2, 3, 2, 3)
    assert far[..., 0].abs().max() < 1e-4
    everywhere = table(torch.arange(-2, 44)[:, None, None], x, v)
    assert everywhere.isfinite().all()
    assert torch.equal(everywhere[-1], table(torch.tensor(NUM_STEPS), x, v))
    assert bool((everywhere == 0).all()) == (name == "gbm")


# THE TABLE


def test_interpolation_at_the_nodes_and_derivatives():
    """At the nodes, the values; between them, derivatives are the differences of the premium."""
    table = half_days()
    m = 90
    x = table.moneyness[1:-1, None] * math.sqrt(m * table.dt)
    v = table.variance[:-1]
    found = table(torch.tensor(m), x, v)
    torch.testing.assert_close(found, table.values[m - 60, 1:-1, :-1], atol=1e-9, rtol=1e-9)
    x = torch.linspace(-0.25, 0.25, 101, dtype=F64)[:, None]
    v = torch.linspace(0.1, 0.4, 31, dtype=F64) ** 2
    _, in_x, in_v = table(torch.tensor(m), x, v).unbind(-1)
    shifted = [table(torch.tensor(m), x + eps, v)[..., 0] for eps in (1e-3, -1e-3)]
    assert ((shifted[0] - shifted[1]) / 2e-3 - in_x).abs().max() < 3e-3
    shifted = [table(torch.tensor(m), x, v + eps)[..., 0] for eps in (1e-4, -1e-4)]
    assert ((shifted[0] - shifted[1]) / 2e-4 - in_v).abs().max() < 1e-2


def test_table_broadcasts_and_converts():
    table = half_days()
    generator = torch.Generator().manual_seed(7)
    m = torch.randint(60, 241, (7, 1, 2), generator=generator)
    x = 0.1 * torch.randn(7, 50, 2, generator=generator, dtype=F64)
    v = 0.2 * torch.rand(7, 50, 1, generator=generator, dtype=F64)
    together = table(m, x, v)
    assert together.shape == (7, 50, 2, 3)
    one_by_one = table(m.expand(7, 50, 2).reshape(-1), x.reshape(-1), v.expand(7, 50, 2).reshape(-1))
    assert torch.equal(together.view(-1, 3), one_by_one)
    single = table.to(torch.float32)
    assert single.last == table.last == 240
    assert single.values.dtype == torch.float32
    found = single(m.float(), x.float(), v.float())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), together, atol=2e-6, rtol=1e-4)
    smaller = fair.premium_table(HALF_DAYS, 239, 240)
    assert torch.equal(smaller.values, table.values[-2:])
