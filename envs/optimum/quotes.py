"""Exact references of quoting where one kind of taker comes, in closed form.

`best_response` is the best edge against given rivals where nothing is risked; `nash_edge` and `monopoly_edge` are the
edges of makers who compete and of makers who agree. `envs.optimum.edges` has both kinds of takers, and the fair value.
"""

import numpy as np
import torch
from scipy.special import lambertw

Tensor = torch.Tensor

LAMBERT_STEPS = 4  # that Lambert's W takes to be right to the last digits of double precision, at any ln z


def best_response(rivals: Tensor, k: float, reference_edge: float, marginal_cost: Tensor | float = 0.0) -> Tensor:
    """Edge that earns most per taker, who picks by logit: argmax_d (d − c) P(picks us | d, rivals' edges).

    The first-order condition d = c + 1/(k(1 − P)) (Anderson, de Palma & Thisse 1992, chapter 7) has the solution
    d = c + (1 + W)/k with Lambert's W e^W = e^{−1 − k(c − d_ref)}/(1 + Σ e^{−k(dᵢ − d_ref)}).

    Args:
        rivals: (…, number of rivals) their edges on the same side, vol points.
        k, reference_edge: of the choice, see `QuotingEnv`.
        marginal_cost: c (…), vol points: the cost of a trade, to be taken from the edge it earns.

    Returns:
        The edge (…), vol points.
    """
    walking_away = rivals.new_full((*rivals.shape[:-1], 1), reference_edge)
    others = -k * (torch.cat((rivals, walking_away), -1) - reference_edge)
    log_z = -1.0 - k * (marginal_cost - reference_edge) - others.logsumexp(-1)
    return marginal_cost + (1.0 + lambert_w(log_z)) / k


def lambert_w(log_z: Tensor) -> Tensor:
    """Lambert's W (…) of z > 0, w e^w = z, from ln z (…), which cannot overflow."""
    tiny = torch.finfo(log_z.dtype).tiny
    w = torch.nn.functional.softplus(log_z).clamp_(min=tiny)
    above = 1.0 + log_z
    for _ in range(LAMBERT_STEPS):  # Newton's method on w + ln w = ln z converges quadratically, from either side
        w = ((above - w.log()) * w).div_(1.0 + w).clamp_(min=tiny)
    return w


def nash_edge(num_makers: int, k: float, reference_edge: float) -> float:
    """Edge, vol points, that is the best response to itself where `num_makers` compete: d = 1/(k(1 − s(d))).

    s(d) is the share of takers that each of them then has. Without risk aversion and costs; see `best_response`.
    """
    edge = torch.tensor(reference_edge, dtype=torch.float64)
    for _ in range(200):  # the best response is a contraction
        edge = best_response(edge.expand(num_makers - 1), k, reference_edge)
    return float(edge)


def monopoly_edge(num_makers: int, k: float, reference_edge: float) -> float:
    """Edge, vol points, that `num_makers` would agree on: d = 1/(k(1 − M s(d))), solved by Lambert's W."""
    return float((1.0 + lambertw(num_makers * np.exp(k * reference_edge - 1.0)).real) / k)
