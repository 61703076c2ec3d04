"""Dynamic programming of a market maker of options in the state (t, ν, x): time, variance and vega of the book.

Baldacci, Bergault & Guéant (2021, "Algorithmic market making for options"): with deltas hedged, a book of many options
on one stock is to first order a position in its volatility, so its vega replaces the vector of inventories.

A step backwards consists of `move` (variance, risk, ageing of the book) and `trade` (takers). `values` composes them
for the market with constant Greeks of section 4.1, `ConstantGreeks`. Units are the caller's: if vega is in currency per
unit of volatility, then edges and costs are in that unit of volatility.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from envs.optimum.quotes import best_response

Tensor = torch.Tensor
Profit = Callable[[Tensor], Tensor]  # marginal costs (V, X, J, 2) → expected profit of the step (V, X, J, 2)


def interpolate(value: Tensor, x: Tensor, points: Tensor) -> Tensor:
    """U (V, X) on equally spaced vegas x (X,) → at points (V or 1, …), giving (V, …). Linear, also beyond the grid."""
    u = (points - x[0]) / (x[1] - x[0])
    index = u.floor().clamp(0, len(x) - 2)
    weight = u - index
    flat = index.long().flatten(1).expand(len(value), -1)
    lower = value.gather(1, flat).view(-1, *points.shape[1:])
    upper = value.gather(1, flat + 1).view(-1, *points.shape[1:])
    return torch.lerp(lower, upper, weight)


def fills(x: Tensor, fill_vegas: Tensor) -> Tensor:
    """Vega after a fill (V or 1, X, J, 2), the last axis ASK, BID: x − v_j, as vega is sold, and x + v_j."""
    num_options = fill_vegas.shape[-1]
    step = fill_vegas.reshape(-1, 1, num_options)
    return x[:, None, None] + torch.stack([-step, step], -1)


def marginal_costs(value: Tensor, x: Tensor, fill_vegas: Tensor) -> Tensor:
    """c = (U(ν, x) − U(ν, x ∓ v_j))/v_j (V, X, J, 2): what a fill takes from the value function, per unit of vega.

    The profit of a fill at the edge d is v_j (d − c). Positive where the fill adds risk, negative where it removes it.

    Args:
        value: U (V, X).
        x: (X,) vega of the book, equally spaced.
        fill_vegas: v (J,) vega of a fill in each option, or (V, J) where it depends on the variance.
    """
    change = interpolate(value, x, fills(x, fill_vegas)) - value[:, :, None, None]
    return -change / fill_vegas.reshape(-1, 1, fill_vegas.shape[-1], 1)


def trade(
    value: Tensor, x: Tensor, fill_vegas: Tensor, profit: Profit, limit: float | None = None
) -> tuple[Tensor, Tensor]:
    """Takers of one step: U → U + Σ_j Σ_sides 1{|x ∓ v_j| ≤ limit} profit_j(c).

    All fills of a step start from the same U, so expect fewer than one in a step; cut longer steps into substeps.

    Args:
        value, x, fill_vegas: see `marginal_costs`.
        profit: marginal costs c (V, X, J, 2) → the step's expected Σ v_j P(fill)(d − c) (V, X, J, 2), currency. At the
            best quote d this is the Hamiltonian; at any other it evaluates a policy.
        limit: greatest |vega| that a fill may lead to, by default the end of the grid.

    Returns:
        The new U (V, X), and c (V, X, J, 2); where a fill is refused, c comes from U extended linearly.
    """
    limit = float(x[-1]) if limit is None else limit
    costs = marginal_costs(value, x, fill_vegas)
    allowed = fills(x, fill_vegas).abs() <= limit * (1.0 + 1e-12)  # to rounding
    return value + torch.where(allowed, profit(costs), 0.0).sum((-2, -1)), costs


def move(value: Tensor, x: Tensor, transition: Tensor, penalty: Tensor, rescale: float = 1.0) -> Tensor:
    """What lies between two steps: U(ν, x) = −penalty(ν, x) + Σ_ν' P(ν, ν') U_next(ν', x · rescale).

    Args:
        value: U_next (V, X).
        x: (X,) vega of the book, equally spaced.
        transition: P (V, V), a row for each ν of the earlier step.
        penalty: (V, X) cost of holding the book over the step, currency.
        rescale: vega of a held book at the later step, relative to the earlier.
    """
    if rescale != 1.0:
        value = interpolate(value, x, (x * rescale)[None])
    return transition @ value - penalty


def variance_transition(variances: Tensor, drift: Tensor, vol_of_vol: float, dt: float) -> Tensor:
    """I + dt L (V, V) for dν = a dt + ξ√ν dW: explicit, central in ∂²/∂ν², upwind in ∂/∂ν, reflected at both ends.

    A Markov chain on the nodes: rows sum to one and, for dt < 1/max(rates), nothing is negative, so U stays monotone
    (Kushner & Dupuis 2001, section 5.1).

    Args:
        variances: ν (V,), equally spaced, per year.
        drift: a(ν) (V,), per year².
        vol_of_vol: ξ.
        dt: years.

    Raises:
        ValueError: dt is too long.
    """
    spacing = variances[1] - variances[0]
    diffusion = 0.5 * vol_of_vol**2 * variances / spacing**2
    up = (diffusion + drift.clamp(min=0.0) / spacing)[:-1]
    down = (diffusion - drift.clamp(max=0.0) / spacing)[1:]
    rates = torch.diag(up, 1) + torch.diag(down, -1)
    transition = dt * rates + torch.diag(1.0 - dt * rates.sum(1))
    if bool((transition < 0.0).any()):
        raise ValueError(f"steps of {dt:g} years are too long for the grid of variances")
    return transition


@dataclass(frozen=True)
class ConstantGreeks:
    """The market of Baldacci, Bergault & Guéant (2021, section 4.1): Heston, and options whose Greeks do not change.

    Takers fill at the edge d = δ/V_i (price over the fair one, per unit of vega) with intensity λ_i/(1 + e^{α + β d}).
    """

    vegas: Tensor
    """V_i (J,) = ∂price/∂√ν, currency per option"""
    sizes: Tensor
    """z_i (J,), options in a fill"""
    arrivals: Tensor
    """λ_i (J,), per year"""
    alpha: float
    """α of the intensity"""
    beta: float
    """β of the intensity, per unit of volatility"""
    mean_reversion: float
    """speed of ν, per year"""
    mean_variance: float
    """mean of ν"""
    pricing_mean_reversion: float
    """speed of ν under the pricing measure, per year"""
    pricing_mean_variance: float
    """mean of ν under the pricing measure"""
    vol_of_vol: float
    """ξ"""
    risk_aversion: float
    """γ, per unit of currency"""
    horizon: float
    """T, years"""
    vega_limit: float
    """greatest |vega| of the book"""

    @property
    def fill_vegas(self) -> Tensor:
        """v (J,) = z_i V_i."""
        return self.sizes * self.vegas

    def drift(self, variances: Tensor) -> Tensor:
        """a_P(ν) = κ(θ − ν)."""
        return self.mean_reversion * (self.mean_variance - variances)

    def premium(self, variances: Tensor) -> Tensor:
        """(a_P(ν) − a_Q(ν))/(2√ν): what a unit of vega is expected to earn in a year."""
        drift_q = self.pricing_mean_reversion * (self.pricing_mean_variance - variances)
        return (self.drift(variances) - drift_q) / (2.0 * variances.sqrt())

    def best_edge(self, costs: Tensor) -> Tensor:
        """argmax_d (d − c)/(1 + e^{α + βd}), any shape: the logit choice between this maker and walking away."""
        return best_response(costs.new_empty(*costs.shape, 0), self.beta, -self.alpha / self.beta, costs)

    def profit(self, edges: Tensor, costs: Tensor, dt: float) -> Tensor:
        """λ_j dt v_j (d − c)/(1 + e^{α + βd}) (V, X, J, 2) of quotes at the edges d, which broadcast with the costs."""
        scale = (dt * self.arrivals * self.fill_vegas)[:, None]
        return scale * torch.sigmoid(-self.alpha - self.beta * edges) * (edges - costs)


@torch.no_grad()
def values(
    market: ConstantGreeks,
    variances: Tensor,
    x: Tensor,
    num_steps: int,
    edges: Callable[[float], Tensor] | None = None,
) -> Tensor:
    """Value function by explicit steps (Baldacci, Bergault & Guéant 2021), or that of given quotes.

        0 = ∂_t u + a_P ∂_ν u + ½ν ξ² ∂_νν u + x (a_P − a_Q)/(2√ν) − γ ξ²/8 x²
            + Σ_i Σ_sides z_i 1{|x ∓ z_i V_i| ≤ limit} H_i((u(x) − u(x ∓ z_i V_i))/z_i),  u(T) = 0.

    Args:
        variances: ν (V,), equally spaced.
        x: (X,) vega of the book, equally spaced.
        num_steps: of the horizon.
        edges: time left, years → edges d, broadcast with (V, X, J, 2); by default the best ones.

    Returns:
        u (num_steps + 1, V, X), currency.
    """
    dt = market.horizon / num_steps
    transition = variance_transition(variances, market.drift(variances), market.vol_of_vol, dt)
    risk = market.risk_aversion * market.vol_of_vol**2 / 8.0 * x**2
    penalty = dt * (risk - market.premium(variances)[:, None] * x)
    value = x.new_zeros(len(variances), len(x))
    history = [value]
    for step in range(1, num_steps + 1):
        quotes = None if edges is None else edges(step * dt)

        def profit(costs: Tensor, quotes: Tensor | None = quotes) -> Tensor:
            return market.profit(market.best_edge(costs) if quotes is None else quotes, costs, dt)

        traded, _ = trade(value, x, market.fill_vegas, profit, market.vega_limit)
        value = traded - value + move(value, x, transition, penalty)  # both act on the same u, as Euler's scheme has it
        history.append(value)
    return torch.stack(history[::-1])
