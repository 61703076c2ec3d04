"""How far the options move in the next step, by state: what a maker who knows the model hedges and is afraid of.

A `StateGrid` holds the states (step, spot, variance) at which tables are made, and interpolates in them. `StepMoves`
simulates one step of the model from every one of these states, with the same scrambled Sobol normals, and measures the
moves of the options' fair values: what of them shares can hedge, and the covariance of the rest.
"""

import math

import torch

from envs.market import black_scholes
from envs.market.quoting import QuotingEnv, QuotingState

Tensor = torch.Tensor
SPOTS, VOLATILITIES = 17, 10  # nodes of the grid
SAMPLES = 2**17  # simulated steps at each time, over all nodes and options: 128 a node for five options


class StateGrid:
    """A grid of states of a market: every step of the episode, the spot, and the root of the variance.

    Attributes:
        spot: (X,) over the initial one, evenly spaced in ln S over ±4 standard deviations at the end of the episode.
        variance: (V,), evenly spaced in √v; a single node where the variance is constant.
    """

    def __init__(self, env: QuotingEnv):
        tensor = {"dtype": torch.float64, "device": env.device}
        dynamics = env.dynamics
        initial = torch.tensor([dynamics.initial_variance], **tensor)
        width = 4.0 * math.sqrt(float(initial) * env.num_steps * dynamics.dt)
        self.log_spot = torch.linspace(-width, width, SPOTS, **tensor)
        mean, spread = dynamics.next_variance_moments(2.0 * initial)
        constant = float(spread) == 0 and float(mean) == 2.0 * float(initial)
        self.root = initial.sqrt() if constant else initial.sqrt() * torch.linspace(0.1, 3.0, VOLATILITIES, **tensor)
        self.spot = self.log_spot.exp()
        self.variance = self.root.square()
        self.num_steps = env.num_steps

    def in_variance(self, table: Tensor, roots: Tensor) -> Tensor:
        """A table (T, V, …) of this grid at other roots of the variance (W,) → (T, W, …), linear in √v."""
        node, weight = _node(roots, self.root)
        weight = weight.view((-1,) + (1,) * (table.dim() - 2))
        return torch.lerp(table[:, node], table[:, (node + 1).clamp(max=len(self.root) - 1)], weight)

    def interpolate(self, table: Tensor, step: Tensor, spot: Tensor, variance: Tensor) -> Tensor:
        """A table (T, X, V, …) at step, spot (over the initial one) and variance, each (n,) → (n, …).

        Linear in ln S and in √v, constant beyond the grid; the last row of the table serves all later steps.
        """
        step = step.long().clamp(max=len(table) - 1)
        i, u = _node(spot.log(), self.log_spot.to(spot))
        j, w = _node(variance.sqrt(), self.root.to(spot))
        next_j = (j + 1).clamp(max=table.shape[2] - 1)
        shape = (-1,) + (1,) * (table.dim() - 3)
        u = u.view(shape)
        w = w.view(shape)
        low = torch.lerp(table[step, i, j], table[step, i + 1, j], u)
        high = torch.lerp(table[step, i, next_j], table[step, i + 1, next_j], u)
        return torch.lerp(low, high, w)


def _node(x: Tensor, nodes: Tensor) -> tuple[Tensor, Tensor]:
    """The evenly spaced node below each x (n,), and how far x is on the way to the next, cut to [0, 1]."""
    if len(nodes) == 1:
        return torch.zeros_like(x, dtype=torch.long), torch.zeros_like(x)
    u = (x - nodes[0]) * (1.0 / (nodes[1] - nodes[0]))
    u = u.clamp(0, len(nodes) - 1)
    node = u.long().clamp(max=len(nodes) - 2)
    return node, u.to(x) - node


class StepMoves:
    """Moves of the options in the next step, at every state of a grid.

    Attributes:
        env, grid: the market, and the states.
        exposure: (T, X, V, O) shares by which the minimum-variance hedge of one option differs from its Black–Scholes
            delta: the net delta that hedges a position q is −q · exposure.
        covariance: (T, X, V, O, O) of what that hedge leaves of the options' moves, currency².
        vegas: (T, X, V, O), currency per vol point.
        gaps: (T, X, V, O) from the reference price to the fair value, vol points.
    """

    @torch.no_grad()
    def __init__(self, env: QuotingEnv):
        self.env = env
        self.grid = StateGrid(env)
        nodes = len(self.grid.spot) * len(self.grid.variance)
        samples = 2 ** max(6, min(13, int(math.log2(SAMPLES / (nodes * env.num_options)))))
        noise = _normals(samples, env.dynamics.noise_size).to(self.grid.spot.device)
        moves = [_moves_at(env, self.grid, t, noise) for t in range(env.num_steps)]
        self.exposure, self.covariance = (torch.stack(x) for x in zip(*moves, strict=True))
        self.vegas, self.gaps = _prices(env, self.grid)
        self._exposure = self.exposure.to(env.dtype)

    def exposure_at(self, state: QuotingState) -> Tensor:
        """`exposure` (n, O) at what a maker observes."""
        return self.grid.interpolate(self._exposure, state.step, state.spot / self.env.initial_spot, state.variance)


def _normals(samples: int, size: int) -> Tensor:
    """Scrambled Sobol normals (samples, size), made to have mean zero and unit covariance."""
    sobol = torch.quasirandom.SobolEngine(size, scramble=True, seed=0).draw(samples).double()
    normals = torch.special.ndtri(sobol.clamp(1e-9, 1.0 - 1e-9))
    normals = normals - normals.mean(0)
    covariance = normals.T @ normals / samples
    return torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), normals.T, upper=False).T


def _moves_at(env: QuotingEnv, grid: StateGrid, t: int, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Exposure (X, V, O) and covariance (X, V, O, O) at step t, from normals (N, noise_size)."""
    now = torch.tensor(float(t), dtype=torch.float64, device=grid.spot.device)
    spot, variance = torch.broadcast_tensors(grid.spot[:, None], grid.variance)  # (X, V)
    _, delta = _fair(env, now, spot, variance)
    shape = (*spot.shape, len(noise))
    flat = [x[..., None].expand(shape).flatten() for x in (spot, variance)]
    log_return, next_variance = env.dynamics.step_from(now, *flat, noise.repeat(spot.numel(), 1))
    log_return = log_return.view(shape)
    log_return = log_return - log_return.exp().mean(-1, keepdim=True).log()  # a martingale on the sample, too
    moved = spot[..., None] * log_return.exp()
    change = env.initial_spot * (moved - spot[..., None])  # (X, V, N)
    later, _ = _fair(env, now + 1.0, moved, next_variance.view(shape))
    move = later - later.mean(2, keepdim=True)  # (X, V, N, O)
    hedge = torch.einsum("xvn,xvno->xvo", change, move) / change.square().sum(-1, keepdim=True)
    left = move - hedge[:, :, None] * change[..., None]
    return hedge - delta, torch.einsum("xvni,xvnj->xvij", left, left) / len(noise)


def _fair(env: QuotingEnv, step: Tensor, spot: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """Fair values and Black–Scholes deltas (…, O) at spot (over the initial one) and variance (…), float64."""
    time_to_expiry = (env.expiry.double() - step) * env.dynamics.dt
    volatility = env.reference_volatility(step, spot, variance)
    arguments = (env.initial_spot * spot[..., None], env.strike.double(), time_to_expiry, volatility, env.is_call)
    value = black_scholes.price(*arguments) + env.premium_at(step, spot, variance)[..., 0]
    return value, black_scholes.delta(*arguments)


def _prices(env: QuotingEnv, grid: StateGrid) -> tuple[Tensor, Tensor]:
    """Vegas and gaps (T, X, V, O) at every state."""
    times = torch.arange(env.num_steps, dtype=torch.float64, device=grid.spot.device)
    states = torch.meshgrid(times, env.initial_spot * grid.spot, grid.variance, indexing="ij")
    shape = (*states[0].shape, env.num_options)
    step, spot, variance = (x.flatten() for x in states)
    state = QuotingState(step, spot, variance, *[None] * 7)
    return env.vegas_at(state).view(shape), env.gap_at(state).view(shape)


def variance_transition(env: QuotingEnv, roots: Tensor, samples: int = 2048) -> Tensor:
    """(V, V) from each root of a variance to the nodes of the next one: rows sum to 1, each sample is shared out
    linearly in √v between its two neighbours."""
    size = len(roots)
    if size == 1:
        return roots.new_ones(1, 1)
    noise = _normals(samples, env.dynamics.noise_size).to(roots.device)
    variance = roots.square().repeat_interleave(samples)
    now = torch.zeros_like(roots[0])
    _, after = env.dynamics.step_from(now, torch.ones_like(variance), variance, noise.repeat(size, 1))
    node, weight = _node(after.sqrt(), roots)
    hat = roots.new_zeros(len(variance), size)
    hat.scatter_(1, node[:, None], 1.0 - weight[:, None])
    hat.scatter_add_(1, node[:, None] + 1, weight[:, None])
    return hat.view(size, samples, size).mean(1)
