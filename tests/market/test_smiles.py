import json
import math

import numpy as np
import pytest
import torch

from envs.market import black_scholes as bs
from envs.market import fair, smiles
from envs.market.smiles import SSVI, SVI, Slices

F64 = torch.float64
SP500, SP500_SLICES, SP500_2024 = (smiles.SURFACES[x] for x in ("sp500-2018", "sp500-2018-slices", "sp500-2024"))
# Axel Vogt's slice of one year, free of calendar spreads by itself but not of butterflies (Gatheral & Jacquier 2014)
VOGT = SVI(-0.0410, 0.1331, 0.3060, 0.3586, 0.4153)


def random_slices(seed=0):
    rng = np.random.default_rng(seed)
    low, high = (0.0, 0.01, -0.9, -0.1, 0.02), (0.05, 0.3, 0.9, 0.1, 0.5)
    return Slices([0.02, 0.1, 0.5, 1.0], [SVI(*rng.uniform(low, high)) for _ in range(4)])


def flat(volatility, maturities=(0.1, 0.2, 0.5)):
    return Slices(maturities, [SVI(volatility**2 * t, 0.0, 0.0, 0.0, 1.0) for t in maturities])


# SURFACES


def test_at_the_money_volatilities():
    volatilities = [100 * SP500_SLICES.implied_volatility(0.0, t).item() for t in SP500_SLICES.maturities]
    assert volatilities == pytest.approx([9.43, 9.33, 9.56, 10.12, 10.33], abs=0.005)
    assert [252 * t for t in SP500_SLICES.maturities] == pytest.approx([20.7, 25.5, 30.4, 40.0, 44.9], abs=0.05)


def test_ssvi_fits_the_slices():
    t = torch.tensor(SP500_SLICES.maturities, dtype=F64)[:, None]
    k = smiles.moneyness_grid(SP500_SLICES, t, torch.linspace(-2.5, 1.2, 75))
    error = 100 * (SP500.implied_volatility(k, t) - SP500_SLICES.implied_volatility(k, t))
    assert error.square().mean().sqrt().item() == pytest.approx(0.23, abs=0.005)
    assert error.abs().max().item() == pytest.approx(0.65, abs=0.01)


def test_heston_surface_is_that_of_the_model():
    """Its spline is exact to 1e-4 vol points, its derivatives are those of w, and it has forward-start options."""
    surface = smiles.HestonSurface(0.05, 0.03, 2.0, 0.5, -0.6)
    t = torch.tensor([1.0, 5.5, 21.0, 51.0, 120.0], dtype=F64)[:, None] / 252
    k = torch.linspace(-3, 3, 13, dtype=F64) * 0.2 * t.sqrt()
    call = fair.heston_call(1.0, k.exp(), t, 0.05, surface.model)
    exact = bs.implied_volatility(call, torch.ones_like(k), k.exp(), t)
    assert 100 * (surface.implied_volatility(k, t) - exact).abs().max() < 1e-3
    values = surface(k, t)
    step = 1e-5
    for name, (dk, dt) in {"dk": (step, 0.0), "dt": (0.0, step)}.items():
        change = (surface(k + dk, t + dt).w - surface(k - dk, t - dt).w) / (2 * step)
        torch.testing.assert_close(getattr(values, name), change, atol=1e-5, rtol=1e-4)
    change = (surface(k + step, t).dk - surface(k - step, t).dk) / (2 * step)
    torch.testing.assert_close(values.dkk, change, atol=1e-4, rtol=1e-3)
    assert surface.local_volatility(0.0, 1e-6).item() == pytest.approx(0.05**0.5, abs=1e-3)
    forward = surface.forward_volatility(k[2], 10 / 252, 31 / 252)
    call = fair.heston_forward_start_call(k[2].exp(), 10 / 252, 21 / 252, surface.model)
    torch.testing.assert_close(bs.price(torch.ones(13, dtype=F64), k[2].exp(), 21 / 252, forward), call)
    assert smiles.from_dict(json.loads(json.dumps(smiles.to_dict(surface)))) == surface
    with pytest.raises(ValueError, match="no forward-start options"):
        SP500.forward_volatility(0.0, 0.1, 0.2)


def test_two_calls_are_worth_the_same():
    """The strike is rounded to six decimals, which is 3e-7 of the price."""
    assert SP500.call_price(0.0, 21 / 252).item() == pytest.approx(0.0106646, abs=5e-8)
    assert SP500.call_price(math.log(1.013996), 51 / 252).item() == pytest.approx(0.0106646, abs=3e-7)


def test_ssvi_has_no_static_arbitrage():
    t = torch.arange(5, 52, dtype=F64)[:, None] / 252
    k = smiles.moneyness_grid(SP500, t, torch.linspace(-2.5, 2.5, 101))
    assert SP500.density_factor(k, t).min() > 0.28
    local = SP500.local_volatility(k, t)
    assert local.min() > 0.065
    assert local.max() < 0.40
    # Gatheral & Jacquier (2014), theorems 4.1 and 4.2: no butterflies at any strike, to 51 days
    theta = SP500(0.0, t).w
    phi = SP500.eta / (theta**SP500.gamma * (1 + theta) ** (1 - SP500.gamma))
    assert (theta * phi * (1 + abs(SP500.rho))).max() < 4
    assert (theta * phi**2 * (1 + abs(SP500.rho))).max().item() == pytest.approx(3.6, abs=0.05)
    far = torch.linspace(-3, 3, 601, dtype=F64)
    days = range(1, 52)
    assert smiles.find_arbitrage(SP500, [day / 252 for day in days], [far] * len(days)) == []


def test_sp500_slices_have_no_butterflies():
    k = [torch.linspace(-0.35, 0.2, 111, dtype=F64)] * 5
    found = smiles.find_arbitrage(SP500_SLICES, SP500_SLICES.maturities, k)
    # one calendar spread, in the right wing of the second slice
    assert [x.kind for x in found] == ["calendar"]
    assert found[0].t == SP500_SLICES.maturities[1]
    assert found[0].k > math.log(1.11)
    assert smiles.find_arbitrage(SP500_2024, SP500_2024.maturities, [k[0][:101]] * 2) == []


@pytest.mark.parametrize("volatility", [0.05, 0.2, 0.9])
def test_local_volatility_of_a_constant_smile(volatility):
    k, t = torch.linspace(-1, 1, 21, dtype=F64), torch.tensor([[0.01], [0.1], [0.3], [0.5]], dtype=F64)
    for surface in (flat(volatility), SSVI(volatility**2, 0.0, 0.0, 0.5, -0.5)):
        expected = torch.full((4, 21), volatility, dtype=F64)
        torch.testing.assert_close(surface.implied_volatility(k, t), expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(surface.local_volatility(k, t), expected, rtol=1e-12, atol=0)


def test_local_variance_of_a_pure_term_structure():
    surface = SSVI(0.01, 0.05, 0.0, 0.4, -0.5)  # η = 0: w = θ(t)
    t = torch.tensor([0.02, 0.1, 0.4], dtype=F64)
    torch.testing.assert_close(surface.local_volatility(-0.1, t), (0.01 + 0.1 * t).sqrt(), rtol=1e-12, atol=0)
    surface = Slices([0.1, 0.3], [SVI(0.004, 0.0, 0.0, 0.0, 1.0), SVI(0.022, 0.0, 0.0, 0.0, 1.0)])
    local = surface.local_volatility(0.2, torch.tensor([0.05, 0.1, 0.2, 0.3], dtype=F64))
    assert local.square().tolist() == pytest.approx([0.04, 0.04, 0.09, 0.09], rel=1e-12)


@pytest.mark.parametrize("surface", [*smiles.SURFACES.values(), random_slices(0), random_slices(1)])
def test_derivatives(surface):
    t = torch.tensor([[0.015], [0.09], [0.11], [0.13], [0.17]], dtype=F64)  # between the maturities of every surface
    k, h = torch.linspace(-0.35, 0.25, 41, dtype=F64), 1e-5
    up, middle, down = surface(k + h, t), surface(k, t), surface(k - h, t)
    assert all(x.shape == (5, 41) for x in middle)
    torch.testing.assert_close(middle.dk, (up.w - down.w) / (2 * h), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(middle.dkk, (up.dk - down.dk) / (2 * h), rtol=1e-6, atol=1e-8)
    growth = (surface(k, t + h).w - surface(k, t - h).w) / (2 * h)
    torch.testing.assert_close(middle.dt, growth, rtol=1e-6, atol=1e-8)


def test_svi_slice():
    """Vertex, wings and minimum of the hyperbola."""
    svi = SVI(0.01, 0.1, -0.6, 0.05, 0.2)
    assert svi.total_variance(torch.tensor(0.05))[0].item() == pytest.approx(0.01 + 0.1 * 0.2)
    lowest = torch.tensor(0.05 + 0.6 * 0.2 / 0.8, dtype=F64)  # m − ρs/√(1 − ρ²)
    w, slope, _ = svi.total_variance(lowest)
    assert (w.item(), slope.item()) == pytest.approx((0.01 + 0.1 * 0.2 * 0.8, 0.0), abs=1e-15)
    _, slope, curvature = svi.total_variance(torch.tensor([-1e4, 1e4], dtype=F64))
    assert slope.tolist() == pytest.approx([-0.16, 0.04], abs=1e-9)
    assert curvature.tolist() == pytest.approx([0, 0], abs=1e-9)


@pytest.mark.parametrize("surface", [SP500_SLICES, SP500_2024, random_slices()])
def test_slices_and_between_them(surface):
    k = torch.linspace(-0.3, 0.2, 26, dtype=F64)
    at = [svi.total_variance(k) for svi in surface.slices]
    for t, expected in zip(surface.maturities, at, strict=True):
        for x, y in zip(surface(k, t), expected, strict=False):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-15)
    first, second = surface.maturities[:2]
    between = surface(k, 0.25 * first + 0.75 * second)
    for x, y, z in zip(between, *at[:2], strict=False):
        torch.testing.assert_close(x, 0.25 * y + 0.75 * z, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(between.dt, (at[1][0] - at[0][0]) / (second - first), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(surface(k, 0.1 * first).w, 0.1 * at[0][0], rtol=1e-12, atol=1e-15)
    assert surface.last_maturity == surface.maturities[-1]


@pytest.mark.parametrize("maturities", [[], [0.0, 0.1], [-0.1, 0.1], [0.2, 0.1], [0.1, 0.1]])
def test_bad_maturities(maturities):
    with pytest.raises(ValueError, match="> 0, increasing"):
        Slices(maturities, [VOGT] * len(maturities))


@pytest.mark.parametrize("num_slices", [1, 3])
def test_as_many_slices_as_maturities(num_slices):
    with pytest.raises(ValueError, match="slices"):
        Slices([0.1, 0.2], [VOGT] * num_slices)


@pytest.mark.parametrize("surface", [*smiles.SURFACES.values(), flat(0.2)])
def test_surface_in_a_checkpoint(surface):
    again = smiles.from_dict(json.loads(json.dumps(smiles.to_dict(surface))))
    k, t = torch.linspace(-0.3, 0.2, 11, dtype=F64), torch.tensor([[0.05], [0.1], [0.15]], dtype=F64)
    assert all(torch.equal(x, y) for x, y in zip(again(k, t), surface(k, t), strict=True))
    assert again.last_maturity == surface.last_maturity


@pytest.mark.parametrize(
    "content",
    [
        {},
        [],
        None,
        {"ssvi": {"alpha": 1.0}},
        {"ssvi": 3},
        {"maturities": [0.1]},
        {"maturities": [0.1], "slices": [[0.0, 0.1]]},
        {"maturities": [0.2, 0.1], "slices": [VOGT] * 2},
        {"maturities": [0.1], "slices": [["a"] * 5]},
    ],
)
def test_not_a_surface(content):
    with pytest.raises((KeyError, TypeError, ValueError)):
        smiles.from_dict(content)


CLEAN = [(flat(0.2), 0.15), (SP500, 5 / 252), (SP500, 21 / 252), (SP500, 51 / 252), (SP500_SLICES, 33 / 365)]


@pytest.mark.parametrize(("surface", "t"), CLEAN)
def test_density(surface, t):
    """g n(d₂)/(K√w) is the second derivative of the call price, and of a martingale."""

    def density(k):
        w = surface(k, t).w
        d2 = -k / w.sqrt() - 0.5 * w.sqrt()
        return surface.density_factor(k, t) * bs.normal_pdf(d2) / (k.exp() * w.sqrt())

    k = smiles.moneyness_grid(surface, t, torch.linspace(-2.5, 1.5, 33))
    strike, h = k.exp(), 2e-4 * surface(0.0, t).w.sqrt() ** 0.5
    call = [surface.call_price((strike + shift * h).log(), t) for shift in (-1, 0, 1)]
    second = (call[0] - 2 * call[1] + call[2]) / h**2
    torch.testing.assert_close(second, density(k), rtol=1e-4, atol=1e-4)

    k = torch.linspace(-2.0, 2.0, 40_001, dtype=F64)
    strike, mass = k.exp(), density(k)
    assert torch.trapezoid(mass, strike).item() == pytest.approx(1.0, abs=1e-6)
    assert torch.trapezoid(mass * strike, strike).item() == pytest.approx(1.0, abs=1e-6)
    payoff = (strike - 0.98).clamp(min=0)
    expected = surface.call_price(math.log(0.98), t).item()
    assert torch.trapezoid(mass * payoff, strike).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("surface", "t"), [*CLEAN, (SP500_2024, 30 / 251)])
def test_local_volatility_is_dupires(surface, t):
    """σ² = 2 ∂C/∂t / (K² ∂²C/∂K²), from call prices."""
    k = smiles.moneyness_grid(surface, t, torch.linspace(-2.0, 1.0, 13))
    strike, h = k.exp(), 1e-4
    call = [surface.call_price((strike + shift * h).log(), t) for shift in (-1, 0, 1)]
    growth = (surface.call_price(k, t + 1e-6) - surface.call_price(k, t - 1e-6)) / 2e-6
    variance = 2 * growth * h**2 / (strike**2 * (call[0] - 2 * call[1] + call[2]))
    torch.testing.assert_close(surface.local_volatility(k, t), variance.sqrt(), rtol=2e-3, atol=0)


def test_local_volatility_keeps_its_bounds():
    butterfly = Slices([1.0], [VOGT])
    assert butterfly.density_factor(0.8, 1.0) < 0
    assert butterfly.local_volatility(0.8, 1.0) == 2.0
    calendar = Slices([0.1, 0.2], [SVI(0.02, 0.0, 0.0, 0.0, 1.0), SVI(0.01, 0.0, 0.0, 0.0, 1.0)])
    assert calendar.local_volatility(0.0, 0.15).item() == pytest.approx(0.01)


def test_call_price_bounds_and_broadcasting():
    k, t = torch.linspace(-0.4, 0.3, 8, dtype=F64), torch.tensor([[0.05], [0.2]], dtype=F64)
    call = SP500.call_price(k, t)
    assert call.shape == SP500.implied_volatility(k, t).shape == SP500.local_volatility(k, t).shape == (2, 8)
    assert (call >= (1 - k.exp()).clamp(min=0)).all()
    assert (call < 1).all()
    assert (call[1] > call[0]).all()
    assert SP500.call_price(k[2].item(), 0.2) == call[1, 2]
    volatility = bs.implied_volatility(call, torch.ones_like(call), k.exp(), t)
    near = k.abs() < 0.15
    torch.testing.assert_close(volatility[:, near], SP500.implied_volatility(k, t)[:, near], rtol=1e-7, atol=0)


def test_moneyness_grid():
    grid = smiles.moneyness_grid(flat(0.3), torch.tensor([[0.25], [0.5]], dtype=F64), [-1.0, 0.0, 2.0])
    assert grid.flatten().tolist() == pytest.approx([-0.15, 0, 0.3, -0.15 * 2**0.5, 0, 0.3 * 2**0.5])


# ARBITRAGE


def test_find_butterfly():
    k = torch.linspace(-1.5, 1.5, 301, dtype=F64)
    (found,) = smiles.find_arbitrage(Slices([1.0], [VOGT]), [1.0], [k])
    density = Slices([1.0], [VOGT]).density_factor(k, 1.0)
    assert found == ("butterfly", k[density.argmin()].item(), 1.0, density.min().item())
    assert 0.6 < found.k < 1.2
    assert found.size < 0
    assert str(found).startswith("butterfly arbitrage at 252.0 days, K/S = ")
    assert smiles.find_arbitrage(Slices([1.0], [VOGT]), [1.0], [k[k < 0.5]]) == []


def test_find_calendar():
    early, late = SVI(0.01, 0.1, -0.3, 0.0, 0.1), SVI(0.015, 0.1, 0.0, 0.0, 0.1)
    surface = Slices([0.1, 0.3], [early, late])
    k = torch.linspace(-0.5, 0.5, 101, dtype=F64)
    (found,) = smiles.find_arbitrage(surface, [0.1, 0.3], [k, k])
    # 0.01 + 0.1 (−0.3k + …) − 0.015 − 0.1 (…) = −0.03k − 0.005 is most at the left end
    assert found[:3] == ("calendar", -0.5, 0.3)
    assert found.size == pytest.approx(0.01)
    assert str(found) == "calendar arbitrage at 75.6 days, K/S = 0.607: total variance falls in time by 0.01"
    # where only one of the maturities has quotes nothing is known
    assert smiles.find_arbitrage(surface, [0.1, 0.3], [k[k > -0.16], k]) == []
    assert smiles.find_arbitrage(surface, [0.1, 0.3], [k[k < -0.3], k[k > 0.3]]) == []
    assert smiles.find_arbitrage(surface, [0.1], [k]) == []
