"""The best response, and the edges of competition and of a cartel, in closed form."""

import math

import pytest
import torch
from scipy.optimize import minimize_scalar

from envs.optimum.quotes import best_response, monopoly_edge, nash_edge

F64 = torch.float64


@pytest.mark.parametrize(
    ("num_makers", "k", "reference_edge"), [(2, 2.0, 1.0), (3, 2.0, 1.0), (5, 0.7, 0.2), (2, 8.0, 1.5)]
)
def test_nash_and_monopoly_edges(num_makers, k, reference_edge):
    """Each solves its condition; oracles for two makers, k 2 per vol point, d_ref 1 in reference.md."""
    nash, monopoly = (f(num_makers, k, reference_edge) for f in (nash_edge, monopoly_edge))

    def share(d):
        return math.exp(-k * (d - reference_edge)) / (1 + num_makers * math.exp(-k * (d - reference_edge)))

    assert nash == pytest.approx(1 / (k * (1 - share(nash))), abs=1e-9)
    assert monopoly == pytest.approx(1 / (k * (1 - num_makers * share(monopoly))), abs=1e-9)
    assert nash < monopoly
    if num_makers == k == 2:
        assert nash == pytest.approx(0.7995, abs=5e-5)
        assert monopoly == pytest.approx(1.187, abs=5e-4)


@pytest.mark.parametrize("cost", [-1.5, 0.0, 0.4, 3.0])
@pytest.mark.parametrize("rivals", [(), (0.8,), (0.3, 1.7), (-2.0, 5.0, 1.0)])
def test_best_response_earns_most(rivals, cost):
    def profit(d):
        picked = math.exp(-2.0 * (d - 1.0))
        return (d - cost) * picked / (1 + picked + sum(math.exp(-2.0 * (r - 1.0)) for r in rivals))

    best = minimize_scalar(lambda d: -profit(d), bounds=(cost, cost + 5), method="bounded", options={"xatol": 1e-10})
    ours = best_response(torch.tensor(rivals, dtype=F64), 2.0, 1.0, torch.tensor(cost, dtype=F64))
    assert float(ours) == pytest.approx(best.x, abs=1e-5)
    in_floats = best_response(torch.tensor(rivals), 2.0, 1.0, torch.tensor(cost))
    assert float(in_floats) == pytest.approx(float(ours), abs=1e-5)
