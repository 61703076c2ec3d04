"""Regressions of a continuation value on the spot."""

import torch

from envs.calibration import regression


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_regressions():
    x = torch.randn(2, 5000, generator=generator())
    cubic = 1 + x - 0.3 * x**3
    torch.testing.assert_close(regression.polynomial_regression(x)(cubic), cubic, atol=1e-4, rtol=1e-4)
    call = x.clamp(min=0)
    fitted = regression.knot_regression(x)(call + torch.randn(x.shape, generator=generator(1)))
    assert (fitted - call).square().mean().sqrt() < 0.12
    knots = regression.knots_of(x, 7)
    basis = regression.hats(x[0], knots)
    torch.testing.assert_close(basis.sum(-1), torch.ones(5000, dtype=torch.float64))
    torch.testing.assert_close(basis @ knots, x[0].double().clamp(knots[0], knots[-1]))


def test_regressions_on_two_regressors():
    x, y = torch.randn(2, 2, 4000, generator=generator())
    values = x.clamp(min=0) * (1 + y)
    for regress in (regression.knot_regression(x, y), regression.polynomial_regression(x, y)):
        fitted = regress(values + torch.randn(x.shape, generator=generator(1)))
        assert (fitted - values).square().mean().sqrt() < 0.3
    constant = regression.knot_regression(x, torch.zeros_like(x))  # as ln m is where nobody has acted
    torch.testing.assert_close(constant(x), x, atol=0.05, rtol=0.05)
