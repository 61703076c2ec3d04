"""Least-squares regressions of an exotic's continuation value on the state at an exercise date (Longstaff & Schwartz
2001)."""

from collections.abc import Callable, Sequence
from functools import reduce

import torch

Tensor = torch.Tensor

Regression = Callable[[Tensor], Tensor]  # values (R, n) → their fits (R, n)


def regression_on(basis: Tensor) -> Regression:
    """Least squares on a basis (R or 1, n, size), separately for each run."""
    weights = torch.linalg.pinv(basis.transpose(-1, -2) @ basis, hermitian=True) @ basis.transpose(-1, -2)
    return lambda values: (basis @ (weights @ values.to(basis)[..., None]))[..., 0].to(values)


def products(first: Tensor, second: Tensor) -> Tensor:
    """All products of two bases (…, n, a) and (…, n, b): (…, n, a · b)."""
    return (first[..., :, None] * second[..., None, :]).flatten(-2)


def chebyshev(x: Tensor, degree: int) -> Tensor:
    """Polynomials (R, n, degree + 1) of regressors (R, n); Chebyshev's, for stable numerics."""
    x = x.double()
    low = x.amin(-1, keepdim=True)
    high = x.amax(-1, keepdim=True)
    x = (2.0 * x - low - high) / (high - low).clamp(min=1e-12)
    basis = [torch.ones_like(x), x]
    for _ in range(degree - 1):
        basis.append(2.0 * x * basis[-1] - basis[-2])
    return torch.stack(basis, -1)


def polynomial_regression(log_spot: Tensor, *others: Tensor) -> Regression:
    """The paper's regression, on polynomials of degree 8 of the log-spots (R, n), times degree 2 of the `others`."""
    basis = chebyshev(log_spot, 8)
    for x in others:
        basis = products(basis, chebyshev(x, 2))
    return regression_on(basis)


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


def knot_regression(log_spot: Tensor, *others: Tensor) -> Regression:
    """Regression on piecewise linear functions of the log-spots (R, n), with 25 knots at their quantiles, times those
    of the `others` with 4.

    A policy can exploit the errors of a polynomial near the exercise boundary, so that the price in training falls
    below the true one; it can exploit this regression less.
    """
    return regression_on(knot_basis((log_spot, *others), (25, 4)))


def knots_for(regressors: Sequence[Tensor], sizes: tuple[int, int]) -> list[Tensor]:
    """Knots of each regressor: `sizes[0]` of the first, `sizes[1]` of each other."""
    return [knots_of(x, sizes[min(i, 1)]) for i, x in enumerate(regressors)]


def hats_of(regressors: Sequence[Tensor], knots: Sequence[Tensor]) -> Tensor:
    """Basis (…, n, size): the products of the regressors' piecewise linear functions."""
    return reduce(products, map(hats, regressors, knots))


def knot_basis(regressors: Sequence[Tensor], sizes: tuple[int, int]) -> Tensor:
    """`hats_of` regressors (R, n) with knots at their own quantiles."""
    return hats_of(regressors, knots_for(regressors, sizes))


REGRESSIONS = {"knots": knot_regression, "polynomial": polynomial_regression}
