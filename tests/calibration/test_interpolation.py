"""Interpolation of scattered values, against SciPy's and where the answer is known."""

import pytest
import torch
from scipy.interpolate import LinearNDInterpolator

from envs.calibration import interpolation


def scattered(dimension, runs=2, n=40, m=300, size=2):
    """Basis points, values, and points about the middle."""
    generator = torch.Generator().manual_seed(dimension)
    basis = torch.randn(runs, n, dimension, generator=generator)
    values = torch.randn(runs, n, size, generator=generator)
    return basis, values, 0.5 * torch.randn(runs, m, dimension, generator=generator)


@pytest.mark.parametrize("dimension", [2, 3])
def test_linear_is_scipys(dimension, monkeypatch):
    basis, values, points = scattered(dimension)
    found = interpolation.linear(basis, values, points)
    inside = []
    for row in range(len(basis)):
        expected = torch.as_tensor(LinearNDInterpolator(basis[row].numpy(), values[row].numpy())(points[row].numpy()))
        inside.append(expected.isfinite().all(-1))
        torch.testing.assert_close(found[row][inside[-1]], expected[inside[-1]].float(), atol=1e-3, rtol=0)
    assert torch.stack(inside).float().mean() > 0.9
    assert found.isfinite().all()
    assert found.abs().max() <= values.abs().max() + 1e-4  # outside too: no extrapolation
    torch.testing.assert_close(interpolation.linear(basis, values, basis), values, atol=1e-3, rtol=0)
    monkeypatch.setattr(interpolation, "MOST_NUMBERS", 1000)  # in small parts it is the same
    torch.testing.assert_close(interpolation.linear(basis, values, points), found)


def test_linear_on_a_line():
    basis = torch.tensor([[[0.0], [2.0], [1.0]]])
    values = torch.tensor([[[1.0], [3.0], [-1.0]]])
    points = torch.tensor([-5.0, 0.0, 0.5, 1.0, 1.75, 2.0, 9.0])[None, :, None]
    expected = [1.0, 1.0, 0.0, -1.0, 2.0, 3.0, 3.0]
    assert interpolation.linear(basis, values, points).flatten().tolist() == expected
    # in a plane or in space, too, where the points are on a line in it
    direction = torch.tensor([0.6, 0.0, -0.8])
    found = interpolation.linear(basis * direction, values, points * direction)
    torch.testing.assert_close(found.flatten(), torch.tensor(expected))


def test_linear_where_all_points_are_the_same():
    basis, values, points = torch.ones(1, 4, 3), torch.full((1, 4, 1), 2.0), torch.ones(1, 6, 3)
    assert (interpolation.linear(basis, values, points) == 2.0).all()


def test_nearest_and_its_mean():
    basis, values, points = scattered(3)
    near = torch.cdist(points, basis).argmin(-1)
    expected = torch.stack([v[index] for v, index in zip(values, near, strict=True)])
    assert torch.equal(interpolation.nearest(basis, values, points), expected)
    torch.testing.assert_close(interpolation.nearest(basis, values, basis, 3), values, atol=0.02, rtol=0)
    alike = torch.full_like(values, 0.7)
    torch.testing.assert_close(interpolation.nearest(basis, alike, points, 5), alike[:, :1].expand(-1, 300, -1))
    # two neighbours at distances 1 and 3: weights 3/4 and 1/4
    line = torch.tensor([[[0.0], [4.0], [50.0]]])
    found = interpolation.nearest(line, torch.tensor([[[4.0], [8.0], [-9.0]]]), torch.tensor([[[1.0]]]), 2)
    assert found.item() == pytest.approx(5.0)
