"""The quadratic value function against the Riccati equations and against brute-force dynamic programming."""

import pytest
import torch
from scipy.integrate import solve_ivp

from envs.market.quoting import ASK, BID
from envs.optimum.multi_asset import prices_of_risk, quadratic_value

F64 = torch.float64


def market(num_assets, rank, seed=0):
    """Σ (O, O) of the given rank, Λ, H'_ask, H'_bid and μ (O,)."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape):
        return torch.rand(*shape, dtype=F64, generator=generator)

    factors = uniform(num_assets, rank) - 0.3
    return (
        factors @ factors.T,
        0.2 + uniform(num_assets),
        -0.5 - uniform(num_assets),
        -0.5 - uniform(num_assets),
        (uniform(num_assets) - 0.5),
    )


@pytest.mark.parametrize(("num_assets", "rank"), [(1, 1), (4, 4), (5, 2)])
@pytest.mark.parametrize("time_left", [0.1, 1.0, 8.0])
def test_riccati(num_assets, rank, time_left):
    """dA/dτ = ½γΣ − 4AΛA and dB/dτ = −μ − 2A(d + 2ΛB) from 0, by Runge–Kutta."""
    covariance, curvature, ask, bid, drift = market(num_assets, rank)
    gamma = 0.7

    def derivative(_, state):
        a = torch.from_numpy(state[:-num_assets].reshape(num_assets, num_assets))
        b = torch.from_numpy(state[-num_assets:])
        da = 0.5 * gamma * covariance - 4.0 * a @ (curvature[:, None] * a)
        db = -drift - 2.0 * a @ (bid - ask + 2.0 * curvature * b)
        return torch.cat([da.flatten(), db]).numpy()

    start = torch.zeros(num_assets * (num_assets + 1), dtype=F64).numpy()
    end = torch.from_numpy(solve_ivp(derivative, (0.0, time_left), start, "DOP853", rtol=1e-11, atol=1e-12).y[:, -1])
    a, b = quadratic_value(covariance, curvature, ask, bid, gamma, time_left, drift)
    torch.testing.assert_close(a.flatten(), end[:-num_assets], rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(b, end[-num_assets:], rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("num_assets", [1, 2])
def test_dynamic_programming(num_assets):
    """θ on a lattice of inventories, every fill in turn: the same cost of the next fill near the middle.

    With quadratic Hamiltonians the closed form is exact; the lattice ends too far away to matter.
    """
    covariance, curvature, ask, bid, drift = market(num_assets, num_assets, seed=1)
    curvature = 0.3 * curvature
    gamma = 0.1
    size = 0.5 + torch.arange(num_assets, dtype=F64)
    axis = torch.arange(-14, 15, dtype=F64)
    lattice = torch.stack(torch.meshgrid(*[axis] * num_assets, indexing="ij"), -1)
    q = lattice * size
    running = q @ drift - 0.5 * gamma * ((q @ covariance) * q).sum(-1)

    def derivative(theta):
        rate = running.clone()
        for i in range(num_assets):
            step = (theta.narrow(i, 0, 28) - theta.narrow(i, 1, 28)) / size[i]  # (θ(q) − θ(q + z_i e_i))/z_i
            rate.narrow(i, 0, 28).add_(bid[i] * step + 0.5 * curvature[i] * step**2)
            rate.narrow(i, 1, 28).add_(-ask[i] * step + 0.5 * curvature[i] * step**2)
        return rate

    theta = torch.zeros_like(running)
    dt = 1.0 / 400
    for _ in range(400):  # Runge–Kutta of fourth order
        k1 = derivative(theta)
        k2 = derivative(theta + 0.5 * dt * k1)
        k3 = derivative(theta + 0.5 * dt * k2)
        k4 = derivative(theta + dt * k3)
        theta = theta + dt / 6.0 * (k1 + 2.0 * k2 + 2.0 * k3 + k4)

    a, b = quadratic_value(covariance, curvature, ask, bid, gamma, 1.0, drift)
    for shift in (0, 2):
        position = [14 + shift] * num_assets
        costs = prices_of_risk(a, b, q[tuple(position)], size)
        for i in range(num_assets):
            for side, sign in ((ASK, -1), (BID, 1)):
                after = list(position)
                after[i] += sign
                expected = (theta[tuple(position)] - theta[tuple(after)]) / size[i]
                torch.testing.assert_close(costs[i, side], expected, rtol=1e-4, atol=1e-5)


def test_without_risk_aversion():
    """γ = 0: A = 0, and B = −μτ is the drift alone."""
    covariance, curvature, ask, bid, drift = market(4, 2)
    a, b = quadratic_value(covariance, curvature, ask, bid, 0.0, 3.0, drift)
    torch.testing.assert_close(a, torch.zeros_like(a))
    torch.testing.assert_close(b, -3.0 * drift)
    _, b = quadratic_value(covariance, curvature, ask, bid, 0.0, 3.0)
    torch.testing.assert_close(b, torch.zeros_like(b))


def test_symmetric_sides_have_no_linear_term():
    covariance, curvature, ask, _, _ = market(4, 4)
    _, b = quadratic_value(covariance, curvature, ask, ask, 1.0, 2.0)
    torch.testing.assert_close(b, torch.zeros_like(b))


def test_takers_who_sell_more_make_the_maker_shade_down():
    """If bids fill more often (H'_bid < H'_ask < 0) the maker expects to be long: buying costs more, selling less."""
    covariance, curvature, ask, _, _ = market(1, 1)
    a, b = quadratic_value(covariance, curvature, ask, 2.0 * ask, 1.0, 2.0)
    costs = prices_of_risk(a, b, torch.zeros(1, dtype=F64))
    assert costs[0, BID] > costs[0, ASK]


def test_batches():
    """Rows of a batch, each with its own parameters and time left, equal single calls, also in float32."""
    rows = [market(3, 2, seed) for seed in range(4)]
    covariance, curvature, ask, bid, drift = (torch.stack(column) for column in zip(*rows, strict=True))
    time_left = torch.tensor([0.0, 0.5, 1.0, 100.0], dtype=F64)
    inventory = drift.flip(0)
    a, b = quadratic_value(covariance, curvature, ask, bid, 0.5, time_left, drift)
    costs = prices_of_risk(a, b, inventory, 2.0)
    for i, row in enumerate(rows):
        one = quadratic_value(*row[:4], 0.5, float(time_left[i]), row[4])
        torch.testing.assert_close((a[i], b[i]), one)
        torch.testing.assert_close(costs[i], prices_of_risk(*one, inventory[i], 2.0))
    single = [tensor.float() for tensor in (covariance, curvature, ask, bid)]
    a32, b32 = quadratic_value(*single, 0.5, time_left.float(), drift.float())
    torch.testing.assert_close(a32, a.float(), rtol=1e-3, atol=1e-3)
    assert b32.isfinite().all()
