"""Interpolation of the basis players' exploration in state space, from a few scattered points to all players.

Shapes: R runs side by side; basis points (R, n_p, d) with values (R, n_p, size); points (R, m, d) → (R, m, size).
"""

import numpy as np
import torch
from scipy.spatial import Delaunay

Tensor = torch.Tensor
MOST_NUMBERS = 2**24  # of a temporary tensor


def nearest(basis: Tensor, values: Tensor, points: Tensor, neighbours: int = 1) -> Tensor:
    """Mean of the nearest basis points' values, weighted by the inverse of their distance (Shepard 1968)."""
    if neighbours == 1:
        # ‖x − b‖² without ‖x‖²; `min` is faster than `argmin`
        distance = torch.baddbmm(basis.square().sum(-1)[:, None], points, basis.transpose(1, 2), alpha=-2.0)
        index = distance.min(-1).indices
        return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))
    near = torch.cdist(points, basis).topk(neighbours, largest=False)
    weight = 1.0 / near.values.clamp(min=1e-6)
    return _weighted(values, near.indices, weight / weight.sum(-1, keepdim=True))


def linear(basis: Tensor, values: Tensor, points: Tensor) -> Tensor:
    """Piecewise linear between the basis points, of any dimension d; outside their convex hull about constant.

    In one dimension between neighbours, in more on the simplices of Delaunay's triangulation. SciPy makes it of the
    basis points, a few dozens; points are located in it and interpolated on their own device. Dimensions in which the
    basis points do not differ are left out: at the first steps a state has fewer than later.
    """
    if basis.shape[-1] == 1:
        return _linear_on_a_line(basis[..., 0], values, points[..., 0])
    rows = [_linear_on_simplices(*row) for row in zip(basis, values, points, strict=True)]
    return torch.stack(rows)


def _linear_on_a_line(basis: Tensor, values: Tensor, points: Tensor) -> Tensor:
    """`linear` at positions (R, n_p) and (R, m)."""
    position, order = basis.sort(-1)
    values = values.gather(1, order[..., None].expand_as(values))
    right = torch.searchsorted(position, points.contiguous()).clamp(1, basis.shape[1] - 1)
    left_position, right_position = position.gather(1, right - 1), position.gather(1, right)
    weight = ((points - left_position) / (right_position - left_position).clamp(min=1e-9)).clamp(0, 1)[..., None]
    index = right[..., None].expand(-1, -1, values.shape[-1])
    return torch.lerp(values.gather(1, index - 1), values.gather(1, index), weight)


def _linear_on_simplices(basis: Tensor, values: Tensor, points: Tensor) -> Tensor:
    """`linear` of one run, (n_p, d), (n_p, size) and (m, d)."""
    axes = _principal_axes(basis)
    if axes.shape[1] < 2:
        line = (basis @ axes).sum(-1), (points @ axes).sum(-1)  # 0 where all basis points are the same
        return _linear_on_a_line(line[0][None], values[None], line[1][None])[0]
    triangulation = Delaunay((basis @ axes).double().cpu().numpy())
    corners = torch.as_tensor(triangulation.simplices, device=basis.device).long()  # (simplices, d + 1)
    # Barycentric coordinates are affine: those of the first d corners are T (x − r), and all add up to 1
    transform = torch.as_tensor(np.nan_to_num(triangulation.transform, nan=-1e9)).to(basis)
    matrix, origin = transform[:, :-1], transform[:, -1]
    offset = (matrix @ origin[..., None])[..., 0]
    weights = []
    most = max(1, MOST_NUMBERS // corners.numel())
    for part in (points @ axes).split(most):
        first = torch.einsum("sij,mj->msi", matrix, part) - offset
        all_of_them = torch.cat((first, 1.0 - first.sum(-1, keepdim=True)), -1)
        # The simplex that holds the point has no negative coordinate; outside the hull, the least negative one
        simplex = all_of_them.amin(-1).max(-1).indices
        inside = all_of_them[torch.arange(len(part), device=part.device), simplex].clamp(min=0)
        weights.append((corners[simplex], inside / inside.sum(-1, keepdim=True)))
    index, weight = (torch.cat(column) for column in zip(*weights, strict=True))
    return _weighted(values[None], index[None], weight[None])[0]


def _principal_axes(basis: Tensor) -> Tensor:
    """Axes (d, r) in which the basis points (n_p, d) differ, orthonormal."""
    centred = basis - basis.mean(0)
    _, size, axes = torch.linalg.svd(centred, full_matrices=False)
    return axes[size > 1e-4 * size[0].clamp(min=1e-12)].T


def _weighted(values: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """Sum of weight · values[index] over the last axis of index and weight (R, m, k)."""
    runs, m, k = index.shape
    chosen = values.gather(1, index.reshape(runs, m * k, 1).expand(-1, -1, values.shape[-1]))
    return (weight[..., None] * chosen.view(runs, m, k, -1)).sum(-2)
