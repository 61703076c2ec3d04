"""Least-squares regressions of the Bermudan's continuation value on the spot at t1 (Longstaff & Schwartz 2001)."""

from collections.abc import Callable

import torch

Tensor = torch.Tensor

Regression = Callable[[Tensor], Tensor]  # values (R, n) → their fits (R, n)


def regression_on(basis: Tensor) -> Regression:
    """Least squares on a basis (R or 1, n, size), separately for each run."""
    weights = torch.linalg.pinv(basis.transpose(-1, -2) @ basis, hermitian=True) @ basis.transpose(-1, -2)
    return lambda values: (basis @ (weights @ values.to(basis)[..., None]))[..., 0].to(values)


def polynomial_regression(log_spot: Tensor, degree: int = 8) -> Regression:
    """The paper's regression, on polynomials of the log-spots (R, n); Chebyshev's, for stable numerics."""
    x = log_spot.double()
    low = x.amin(-1, keepdim=True)
    high = x.amax(-1, keepdim=True)
    x = (2.0 * x - low - high) / (high - low).clamp(min=1e-12)
    basis = [torch.ones_like(x), x]
    for _ in range(degree - 1):
        basis.append(2.0 * x * basis[-1] - basis[-2])
    return regression_on(torch.stack(basis, -1))


def knots_of(log_spot: Tensor, num_knots: int) -> Tensor:
    """Uniform quantiles (num_knots,) of the log-spots, minimum and maximum included, from about 100,000 of them."""
    sample = log_spot.flatten().double()
    sample = sample[:: max(1, len(sample) // 100_000)]
    return torch.quantile(sample, torch.linspace(0, 1, num_knots, dtype=sample.dtype, device=sample.device))


def hats(log_spot: Tensor, knots: Tensor) -> Tensor:
    """Basis (…, n, num_knots) of the piecewise linear functions with these knots, at log-spots (…, n)."""
    x = log_spot.double().clamp(knots[0], knots[-1])
    right = torch.searchsorted(knots, x.contiguous()).clamp(1, len(knots) - 1)
    weight = (x - knots[right - 1]) / (knots[right] - knots[right - 1]).clamp(min=1e-12)
    right = right[..., None]
    weight = weight[..., None]
    basis = torch.zeros(*x.shape, len(knots), dtype=x.dtype, device=x.device)
    return basis.scatter_(-1, right, weight).scatter_(-1, right - 1, 1 - weight)


def knot_regression(log_spot: Tensor, num_knots: int = 25) -> Regression:
    """Regression on piecewise linear functions of the log-spots (R, n), with knots at their quantiles.

    A policy can exploit the errors of a polynomial near the exercise boundary, so that the price in training falls
    below the true one; it can exploit this regression less.
    """
    return regression_on(hats(log_spot, knots_of(log_spot, num_knots)))


REGRESSIONS = {"knots": knot_regression, "polynomial": polynomial_regression}
