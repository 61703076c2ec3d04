import math

import numpy as np
import pytest
import torch
from common import MODELS

from envs.market import dynamics
from envs.market.quoting import hedged_volatility_variance

F64 = torch.float64


def simulate(model, num_paths, num_steps=30, seed=0, dtype=F64):
    generator = torch.Generator().manual_seed(seed)
    noise = dynamics.draw_noise(num_paths, num_steps * model.noise_size, generator, dtype)
    return model.simulate(noise.view(num_paths, num_steps, model.noise_size))


@pytest.mark.parametrize("name", MODELS)
def test_shapes_and_start(name):
    spot, variance = simulate(MODELS[name], 7, 12, dtype=torch.float32)
    assert spot.shape == variance.shape == (7, 13)
    assert spot.dtype == torch.float32
    torch.testing.assert_close(spot[:, 0], torch.full((7,), 100.0))
    torch.testing.assert_close(variance[:, 0], torch.full((7,), float(MODELS[name].initial_variance)))
    assert (spot > 0).all()
    assert (variance >= 0).all()


@pytest.mark.parametrize("name", MODELS)
def test_martingale_at_every_horizon(name):
    spot, _ = simulate(MODELS[name], 200_000, 30)
    error = (spot.mean(0) - 100.0) / (spot.std(0) / len(spot) ** 0.5)
    assert error[1:].abs().max() < 4


@pytest.mark.parametrize("name", MODELS)
def test_martingale_given_the_variance(name):
    """E[S_{t+1}/S_t | v] = 1 from low and from high variance, not only on average."""
    model = MODELS[name]
    noise = torch.randn(400_000, model.noise_size, generator=torch.Generator().manual_seed(1), dtype=F64)
    for variance in (0.2, 1.0, 5.0):
        growth = model.step(torch.full((len(noise),), variance * model.initial_variance, dtype=F64), noise)[0].exp()
        assert abs(growth.mean() - 1) < 4 * growth.std() / len(noise) ** 0.5


@pytest.mark.parametrize("name", MODELS)
def test_expected_average_variance(name):
    """The closed form against the average of simulated variances, from the start and from elsewhere."""
    model = MODELS[name]
    noise = torch.randn(100_000, 20, model.noise_size, generator=torch.Generator().manual_seed(2), dtype=F64)
    _, variance = model.simulate(noise)
    average = variance[:, :20].mean(1)
    expected = model.expected_average_variance(torch.tensor(float(model.initial_variance), dtype=F64), 20)
    # a continuous-time model's closed form averages over the days, the simulation sums at their starts
    assert abs(average.mean() - expected) < 4 * average.std() / len(noise) ** 0.5 + 1e-9
    later, m = variance[:, 10], 10
    error = variance[:, 10:20].mean(1) - model.expected_average_variance(later, m)
    slack = 0.01 * model.initial_variance if name.startswith("heston") else 1e-9
    assert abs(error.mean()) < 4 * error.std() / len(noise) ** 0.5 + slack
    torch.testing.assert_close(model.expected_average_variance(later, torch.tensor(0)), later)


@pytest.mark.parametrize("name", MODELS)
def test_realised_variance_is_the_variance_state(name):
    """E[(ln S_{t+1}/S_t)²] over one step = v dt + O(dt²)."""
    model = MODELS[name]
    noise = torch.randn(400_000, model.noise_size, generator=torch.Generator().manual_seed(3), dtype=F64)
    log_return, _ = model.step(torch.full((len(noise),), float(model.initial_variance), dtype=F64), noise)
    square = log_return**2 / model.dt
    assert abs(square.mean() - model.initial_variance) < 4 * square.std() / len(noise) ** 0.5 + 0.01 * 0.04


@pytest.mark.parametrize("name", MODELS)
def test_batch_independence_and_seeds(name):
    model = MODELS[name]
    full, _ = simulate(model, 100, seed=0)
    for smaller in (1, 3, 16, 37):
        assert torch.equal(simulate(model, smaller, seed=0)[0], full[:smaller])
    assert torch.equal(simulate(model, 100, seed=0)[0], full)
    assert not torch.equal(simulate(model, 100, seed=1)[0], full)
    assert len(full[:, -1].unique()) == 100  # rows do not share a draw


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batch_independence_on_a_gpu():
    generator = torch.Generator("cuda")
    full = dynamics.draw_noise(5000, 30, generator.manual_seed(0))
    assert torch.equal(dynamics.draw_noise(70, 30, generator.manual_seed(0)), full[:70])


def test_heston_moments():
    """Mean and variance of v_t are exact at any step (Andersen 2008, (17)–(18)), also with a coarse one."""
    for dt, num_steps in ((1 / 252, 50), (0.25, 4)):
        model = dynamics.Heston(initial_variance=0.09, dt=dt)
        _, variance = simulate(model, 100_000, num_steps)
        v, t = variance[:, -1], dt * num_steps
        k, theta, xi = model.mean_reversion, model.mean_variance, model.vol_of_vol
        mean = theta + (0.09 - theta) * math.exp(-k * t)
        var = 0.09 * xi**2 * math.exp(-k * t) * (1 - math.exp(-k * t)) / k
        var += theta * xi**2 * (1 - math.exp(-k * t)) ** 2 / (2 * k)
        assert abs(v.mean() - mean) < 4 * v.std() / len(v) ** 0.5
        squares = (v - mean) ** 2
        assert abs(squares.mean() - var) < 4 * squares.std() / len(v) ** 0.5


def test_heston_option_price():
    """Call prices against the characteristic function (Heston 1993, in the form of Albrecher et al. 2007)."""
    from scipy.integrate import quad

    model = dynamics.Heston()
    k, theta, xi, rho, v0 = 4.0, 0.04, 0.5, -0.7, 0.04
    t = 60 / 252

    def characteristic(u):
        d = np.sqrt((rho * xi * 1j * u - k) ** 2 + xi**2 * (1j * u + u**2))
        g = (k - rho * xi * 1j * u - d) / (k - rho * xi * 1j * u + d)
        c = k * theta / xi**2 * ((k - rho * xi * 1j * u - d) * t - 2 * np.log((1 - g * np.exp(-d * t)) / (1 - g)))
        return np.exp(c + v0 / xi**2 * (k - rho * xi * 1j * u - d) * (1 - np.exp(-d * t)) / (1 - g * np.exp(-d * t)))

    spot, _ = simulate(model, 200_000, 60)
    for strike in (90.0, 100.0, 110.0):
        # Lewis (2001): C = S − √(SK)/π ∫ Re[e^{iu ln(S/K)} φ(u − i/2)] du/(u² + ¼)
        x = math.log(100 / strike)
        integral = quad(lambda u, x=x: (np.exp(1j * u * x) * characteristic(u - 0.5j)).real / (u**2 + 0.25), 0, 200)[0]
        exact = 100 - math.sqrt(100 * strike) / math.pi * integral
        payoff = (spot[:, -1] - strike).clamp(min=0)
        assert abs(payoff.mean() - exact) < 4 * payoff.std() / len(payoff) ** 0.5


def test_merton_moments():
    model = dynamics.Merton(jump_rate=20.0, jump_mean=-0.02, jump_volatility=0.03)
    spot, _ = simulate(model, 400_000, 1)
    x = torch.log(spot[:, 1] / 100)
    rate = 20.0 / 252
    expected_variance = model.initial_variance / 252
    third = rate * (model.jump_mean**3 + 3 * model.jump_mean * model.jump_volatility**2)
    centred = x - x.mean()
    for power, expected in ((2, expected_variance), (3, third)):
        sample = centred**power
        assert abs(sample.mean() - expected) < 4 * sample.std() / len(x) ** 0.5
    assert sum(model.jump_probabilities()) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("name", ["garch", "heston"])
def test_return_volatility_covariance(name):
    model = MODELS[name]
    noise = torch.randn(2_000_000, model.noise_size, generator=torch.Generator().manual_seed(4), dtype=F64)
    variance = torch.full((len(noise),), float(model.initial_variance), dtype=F64)
    log_return, after = model.step(variance, noise)
    slope = ((after - after.mean()) * log_return).mean() / log_return.var()
    assert slope == pytest.approx(model.return_volatility_covariance(variance)[0].item(), rel=0.02)


@pytest.mark.parametrize("name", ["gbm", "garch", "heston", "merton"])
def test_moments_of_the_next_variance(name):
    model = MODELS[name]
    variance = torch.full((400_000,), 1.3 * model.initial_variance, dtype=torch.float64)
    noise = torch.randn(400_000, model.noise_size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    _, after = model.step(variance, noise)
    mean, spread = model.next_variance_moments(variance)
    assert after.mean().item() == pytest.approx(mean[0].item(), abs=5 * after.std().item() / 400_000**0.5 + 1e-12)
    assert after.var().item() == pytest.approx(spread[0].item(), rel=0.03, abs=1e-12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vol_of_vol": 0.0}, "vol_of_vol is 0.0"),
        ({"mean_reversion": -1.0}, "mean_reversion is -1.0"),
        ({"initial_variance": float("nan")}, "initial_variance is nan"),
        ({"correlation": 1.2}, "correlation is 1.2"),
        ({"vol_of_vol": 10.0, "correlation": 0.7, "dt": 0.5}, "too much for steps of 0.5 years"),
    ],
)
def test_heston_parameters_that_the_scheme_cannot_take(settings, message):
    with pytest.raises(ValueError, match=message):
        dynamics.Heston(**settings)


def test_heston_takes_what_violates_feller():
    model = dynamics.Heston(vol_of_vol=3.0, correlation=0.9, dt=1 / 504)
    noise = torch.randn(100_000, 60, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    spot, variance = model.simulate(noise)
    assert spot.isfinite().all()
    assert (variance >= 0).all()
    assert abs(spot[:, -1].mean() - 100) < 4 * spot[:, -1].std() / 100_000**0.5


@pytest.mark.parametrize("name", MODELS)
def test_a_whole_number_of_steps_is_a_number_of_steps(name):
    """At 120 steps Heston's slope is 0.645 at half days; a horizon cut to whole variances would give 0.659."""
    model = dynamics.Heston(dt=1 / 504) if name == "heston" else MODELS[name]
    steps = torch.tensor([1, 7, 60, 120, 500])
    slope, exact = (model.variance_slope(x) for x in (steps, steps.double()))
    assert slope.is_floating_point()
    torch.testing.assert_close(slope.double(), exact, rtol=1e-5, atol=1e-6)
    variance = torch.full((5,), 1.3 * model.initial_variance, dtype=F64)
    residual, exact = (hedged_volatility_variance(model, variance, x) for x in (steps, steps.double()))
    torch.testing.assert_close(residual, exact, rtol=1e-5, atol=1e-9)
    if name == "heston":
        assert slope[3].item() == pytest.approx(-math.expm1(-4 * 120 / 504) / (4 * 120 / 504), rel=5e-3)
        assert slope[3].item() == pytest.approx(0.645, abs=1e-3)
