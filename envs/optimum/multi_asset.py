"""Closed-form market making in many assets whose risks are correlated, by a quadratic value function.

Bergault, Evangelista, Guéant & Vieira (2021, "Closed-form approximations in multi-asset market making") replace the
Hamiltonian of each asset by its second-order expansion, H(p) ≈ H(0) + H'(0) p + ½ H''(0) p². The value function is then
quadratic in the inventories, by a matrix Riccati equation, and the marginal cost of a fill is affine in them.
"""

import torch

Tensor = torch.Tensor


def quadratic_value(
    covariance: Tensor,
    curvature: Tensor,
    slope_ask: Tensor,
    slope_bid: Tensor,
    risk_aversion: Tensor | float,
    time_left: Tensor | float,
    drift: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A and B of the value function θ(q) = −qᵀA q − qᵀB − C of inventories q, with θ = 0 at the end.

    With τ the time left, Λ the curvature of one side and d = H'_bid − H'_ask, the coefficients of q in

        ∂θ/∂τ = qᵀμ − ½ γ qᵀΣ q + Σ_i [H_bid,i((θ(q) − θ(q + z_i e_i))/z_i) + H_ask,i((θ(q) − θ(q − z_i e_i))/z_i)]

    give dA/dτ = ½γΣ − 4AΛA and dB/dτ = −μ − 2A(d + 2ΛB). The sizes z_i drop out, as both sides have the same curvature.
    In the eigenbasis of ½γΛ^½ΣΛ^½ (eigenvalues s), with w = 2√s τ, M = Λ^½AΛ^½ and b = Λ^½B have the components

        m = ½√s tanh w,    b = −½ (Λ^{−½}d) (1 − 1/cosh w) − (Λ^½μ) tanh w/(2√s).

    Args:
        covariance: Σ (…, O, O) of the moves of a unit of each asset after hedging, currency² per unit of time. The unit
            of time is the caller's, a year or a step.
        curvature: Λ (…, O) > 0, H''(0) of one side; where the sides differ, their mean. H_i(p) is the expected profit
            per unit of time, for all z_i units of a fill together, if a unit costs p: H_i(p) = z_i sup_δ Λ_i(δ)(δ − p).
            Where fills arrive at the rate λ and fill with the probability f(δ/vega) at δ above the fair price,
            H_i(p) = z_i λ vega_i h(p/vega_i) with h(c) = max_d f(d)(d − c): slope z_i λ h'(0), curvature
            z_i λ h''(0)/vega_i.
        slope_ask, slope_bid: H'(0) (…, O) < 0 of each side.
        risk_aversion: γ (…), per unit of currency.
        time_left: τ (…), finite.
        drift: μ (…, O), expected move of a unit of each asset, currency per unit of time; none by default.

    Returns:
        A (…, O, O), symmetric and positive semidefinite, and B (…, O).
    """
    root = curvature.sqrt()
    gamma = torch.as_tensor(risk_aversion, dtype=root.dtype, device=root.device)
    tau = torch.as_tensor(time_left, dtype=root.dtype, device=root.device)[..., None]
    scaled = root[..., :, None] * covariance * root[..., None, :]
    s, basis = torch.linalg.eigh(0.5 * gamma[..., None, None] * scaled)
    speed = 2.0 * s.clamp(min=0.0).sqrt()
    w = speed * tau
    inverse_basis = basis / root[..., :, None]  # Λ^{−½} times the eigenvectors
    half_inverse_basis = inverse_basis * (0.25 * speed * w.tanh())[..., None, :]
    a = half_inverse_basis @ inverse_basis.transpose(-1, -2)

    asymmetry = _components(inverse_basis, slope_bid - slope_ask)
    b = -0.5 * asymmetry * w.tanh() * (0.5 * w).tanh()  # 1 − 1/cosh w = tanh w tanh(w/2), which cannot overflow
    if drift is not None:  # tanh w/(2√s) → τ as s → 0
        tiny = torch.finfo(s.dtype).tiny
        effective_time = torch.where(speed > 0.0, w.tanh() / speed.clamp(min=tiny), tau)
        b = b - _components(basis * root[..., :, None], drift) * effective_time
    return a, (inverse_basis @ b[..., None])[..., 0]


def prices_of_risk(a: Tensor, b: Tensor, inventory: Tensor, size: Tensor | float = 1.0) -> Tensor:
    """What a unit of the next fill costs in terms of θ (…, O, 2), currency; the last axis is ASK, BID.

        bid: (θ(q) − θ(q + z_i e_i))/z_i =   2(A q)_i + B_i + z_i A_ii,
        ask: (θ(q) − θ(q − z_i e_i))/z_i = −[2(A q)_i + B_i] + z_i A_ii.

    The best quote δ maximises P(fill at δ)(δ − p) for the price of risk p: the best response to the cost p/vega.

    Args:
        a, b: A (…, O, O) and B (…, O) of `quadratic_value`.
        inventory: q (…, O), units.
        size: z (…, O), units in a fill.
    """
    skew = 2.0 * (a @ inventory[..., None])[..., 0] + b
    own = size * a.diagonal(dim1=-2, dim2=-1)
    return torch.stack([own - skew, own + skew], -1)  # ASK, BID


def _components(basis: Tensor, vector: Tensor) -> Tensor:
    """Uᵀv (…, O) of the columns of U (…, O, O) and v (…, O)."""
    return (basis.transpose(-1, -2) @ vector[..., None])[..., 0]
