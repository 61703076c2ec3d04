"""Classical strategies as policies: callables observation (n, …) → action, (n, 2) of a `HedgingEnv` (hedging) or (n, 4)
of a maker in a `QuotingEnv` (quoting).

Each constructor takes the environment whose market it is built for and, where the strategy has any, its parameters. A
band is centred on the hedge of the book's Black–Scholes delta unless another `centre` (itself a policy) is given. What
was published for one sold option is applied to a book by its gamma, and by its sign where buyer and seller differ; what
was published for one asset is applied to a book of options by its vega.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from scipy.linalg import expm

from envs import black_scholes
from envs.hedging import HedgingEnv, HedgingState
from envs.quoting import VOL_POINT, QuotingEnv, QuotingState, hedged_volatility_variance

Tensor = torch.Tensor
Policy = Callable[[Tensor], Tensor]


def black_scholes_delta(env: HedgingEnv) -> Policy:
    """Holds the hedge of the book's Black–Scholes delta, every step (Black & Scholes 1973)."""
    return lambda observation: observation.new_zeros(len(observation), 2)


def _offset(env: HedgingEnv, state: HedgingState, volatility: Tensor) -> Tensor:
    """Centre offset (n,) that hedges the book's delta at other volatilities (n, num_options) than the mark's."""
    arguments = (state.spot[:, None], env.strike, state.time_to_expiry, volatility, env.is_call)
    return state.delta - (state.position * black_scholes.delta(*arguments)).sum(-1)


def leland(env: HedgingEnv) -> Policy:
    """Holds the delta at Leland's (1985) volatility, every step: σ̂² = σ²[1 + √(2/π) k/(σ√Δt)] for a short option.

    k is the round-trip cost rate (two trades), Δt the time between trades; a book that is long gamma has the minus sign
    (Hoggard, Whalley & Wilmott 1994).
    """

    def policy(observation: Tensor) -> Tensor:
        state = env.decode(observation)
        k, sigma = 2.0 * env.cost_rate, state.volatility
        adjustment = math.sqrt(2.0 / math.pi) * k / (sigma * math.sqrt(env.dynamics.dt))
        factor = (1.0 - state.gamma.sign()[:, None] * adjustment).clamp(min=1e-4)
        offset = _offset(env, state, sigma * factor.sqrt())
        return torch.stack((offset, torch.zeros_like(offset)), -1)

    return policy


def minimum_variance_delta(env: HedgingEnv) -> Policy:
    """Hedges the delta that minimises the variance of the next step: Δ + vega · ∂σ/∂S (Hull & White 2017, eq. 5).

    ∂σ/∂S is how far the mark's volatility is expected to move with the spot, see `Smile.slope`. Equal to Black–Scholes
    where it does not (gbm, merton).
    """

    def policy(observation: Tensor) -> Tensor:
        state = env.decode(observation)
        spot = state.spot[:, None]
        slope = env.smile.slope(state.step, state.spot / env.initial_spot, state.variance)
        vega = black_scholes.vega(spot, env.strike, state.time_to_expiry, state.volatility)
        offset = -(state.position * vega * slope / spot).sum(-1)
        return torch.stack((offset, torch.zeros_like(offset)), -1)

    return policy


def constant_band(env: HedgingEnv, half_width: float, centre: Policy | None = None) -> Policy:
    """No-trade band of constant half-width, in shares, around `centre`; trades to the nearest edge."""
    centre = centre or black_scholes_delta(env)

    def policy(observation: Tensor) -> Tensor:
        offset = centre(observation)[:, 0]
        return torch.stack((offset, torch.full_like(offset, half_width)), -1)

    return policy


def whalley_wilmott_half_width(spot, gamma, cost_rate, risk_aversion) -> Tensor:
    """H = (3/2 · λ S Γ²/a)^{1/3}, in shares (Whalley & Wilmott 1997, eq. 3.6)."""
    return (1.5 * cost_rate * spot * gamma**2 / risk_aversion) ** (1.0 / 3.0)


def whalley_wilmott(env: HedgingEnv, risk_aversion: float | None = None, centre: Policy | None = None) -> Policy:
    """No-trade band of Whalley & Wilmott (1997), for small costs; `risk_aversion` defaults to the environment's."""
    centre = centre or black_scholes_delta(env)
    risk_aversion = env.risk_aversion if risk_aversion is None else risk_aversion

    def policy(observation: Tensor) -> Tensor:
        state = env.decode(observation)
        half_width = whalley_wilmott_half_width(state.spot, state.gamma, env.cost_rate, risk_aversion)
        return torch.stack((centre(observation)[:, 0], half_width), -1)

    return policy


def kallsen_muhle_karbe(env: HedgingEnv, risk_aversion: float | None = None, centre: Policy | None = None) -> Policy:
    """Whalley & Wilmott's band for a delta that client orders move too (Kallsen & Muhle-Karbe 2015).

    For small costs the half-width is (3/2 · λ S/a · d<φ>/d<S>)^{1/3} shares, φ the frictionless hedge. Without orders
    d<φ>/d<S> = Γ², which is Whalley & Wilmott; the orders of a step add the variance Σ 2μ E[size²] Δ² to φ.
    """
    centre = centre or black_scholes_delta(env)
    risk_aversion = env.risk_aversion if risk_aversion is None else risk_aversion

    def policy(observation: Tensor) -> Tensor:
        state = env.decode(observation)
        alive = state.time_to_expiry > 0
        delta = black_scholes.delta(
            state.spot[:, None], env.strike, state.time_to_expiry, state.volatility, env.is_call
        )
        order_variance = 2.0 * env.order_law.variance * (delta.square() * alive).sum(-1)
        rate = (state.gamma.square() + order_variance / (state.spot.square() * state.variance * env.dynamics.dt)).sqrt()
        half_width = whalley_wilmott_half_width(state.spot, rate, env.cost_rate, risk_aversion)
        return torch.stack((centre(observation)[:, 0], half_width), -1)

    return policy


def zakamouline_half_width(spot, gamma, volatility, time_to_expiry, cost_rate, risk_aversion) -> Tensor:
    """H₀ + H₁: H₀ = λ/(aSσ²τ), H₁ = 1.12 λ^0.31 τ^0.05 σ^−0.25 (|Γ|/a)^0.5 (Zakamouline 2006), zero rates."""
    h0 = cost_rate / (risk_aversion * spot * volatility**2 * time_to_expiry)
    gamma_term = (gamma.abs() / risk_aversion) ** 0.5
    return h0 + 1.12 * cost_rate**0.31 * time_to_expiry**0.05 * volatility**-0.25 * gamma_term


def zakamouline_volatility(spot, gamma, volatility, time_to_expiry, cost_rate, risk_aversion) -> Tensor:
    """σ_m = σ√(1 ± 4.76 λ^0.78 τ^−0.02 σ^−0.25 (aS²|Γ|)^0.15), + for a short option (Γ < 0); Zakamouline (2006)."""
    risk = (risk_aversion * spot**2 * gamma.abs()) ** 0.15
    change = 4.76 * cost_rate**0.78 * time_to_expiry**-0.02 * volatility**-0.25 * risk
    return volatility * (1.0 - gamma.sign() * change).clamp(min=1e-4).sqrt()


def zakamouline(env: HedgingEnv, risk_aversion: float | None = None) -> Policy:
    """Band of Zakamouline (2006), fitted to the exact utility-based hedge: modified delta ± (H₀ + H₁).

    For a book, τ and σ of the half-width are those of the last expiry.
    """
    risk_aversion = env.risk_aversion if risk_aversion is None else risk_aversion
    last = int(env.expiry.argmax())

    def policy(observation: Tensor) -> Tensor:
        state = env.decode(observation)
        tau = state.time_to_expiry.clamp(min=0.5 * env.dynamics.dt)
        spot, gamma = state.spot[:, None], state.gamma[:, None]
        arguments = (env.cost_rate, risk_aversion)
        offset = _offset(env, state, zakamouline_volatility(spot, gamma, state.volatility, tau, *arguments))
        half_width = zakamouline_half_width(
            state.spot, state.gamma, state.volatility[:, last], tau[:, last], *arguments
        )
        return torch.stack((offset, half_width), -1)

    return policy


def avellaneda_stoikov_quotes(inventory, risk_aversion, variance_rate, time_left, k):
    """Half-spread and skew of Avellaneda & Stoikov (2008), (29) and (30); the units of price are the caller's.

    Reservation price s + skew, skew = −qγσ²(T − t); half-spread ½γσ²(T − t) + ln(1 + γ/k)/γ.

    Args:
        inventory: q, units held.
        risk_aversion: γ > 0, per unit of price (a tensor or a number, like the others).
        variance_rate: σ² of one unit's price, per unit of time.
        time_left: T − t.
        k: decay of the fill intensity A e^{−kδ} with the distance δ from the mid.
    """
    risk_aversion = torch.as_tensor(risk_aversion)
    risk = risk_aversion * variance_rate * time_left
    return 0.5 * risk + torch.log1p(risk_aversion / k) / risk_aversion, -inventory * risk


def glft_quotes(inventory, risk_aversion, variance_rate, k, intensity):
    """Half-spread and skew of Guéant, Lehalle & Fernandez-Tapia (2013), far from the end, (4.6) and (4.7).

    With c = ln(1 + γ/k)/γ and w = √(σ²γ/(2kA) (1 + γ/k)^{1 + k/γ}): half-spread c + w/2, skew −q w. Arguments as in
    `avellaneda_stoikov_quotes`; `intensity` is A.
    """
    risk_aversion = torch.as_tensor(risk_aversion)
    log_factor = torch.log1p(risk_aversion / k)
    power = torch.exp((1.0 + k / risk_aversion) * log_factor)
    width = (variance_rate * risk_aversion / (2.0 * k * intensity) * power).sqrt()
    return log_factor / risk_aversion + 0.5 * width, -inventory * width


def glft_exact_quotes(
    risk_aversion: float, variance_rate: float, time_left: float, k: float, intensity: float, limit: int
):
    """Exact bid and ask distances of Guéant, Lehalle & Fernandez-Tapia (2013), theorem 1, by the matrix exponential.

    v(t) = e^{−M(T−t)} 1 with M = diag(½kγσ²q²) − η on the first off-diagonals, η = A(1 + γ/k)^{−(1 + k/γ)}.

    Returns:
        Bid and ask distance from the mid (2·limit + 1,) at inventories −limit … limit; ∞ where the limit forbids it.
    """
    inventory = np.arange(-limit, limit + 1)
    eta = intensity * (1 + risk_aversion / k) ** -(1 + k / risk_aversion)
    off = np.full(2 * limit, -eta)
    matrix = np.diag(0.5 * k * risk_aversion * variance_rate * inventory**2) + np.diag(off, 1) + np.diag(off, -1)
    log_v = np.log(expm(-matrix * time_left).sum(1))
    constant = np.log1p(risk_aversion / k) / risk_aversion
    bid = np.append((log_v[:-1] - log_v[1:]) / k + constant, np.inf)
    ask = np.append(np.inf, (log_v[1:] - log_v[:-1]) / k + constant)
    return bid, ask


MIN_VEGA = 1e-3  # currency per vol point: where a jump has left every strike far behind, formulas would divide by zero


def _mean_vega(env: QuotingEnv, state: QuotingState) -> Tensor:
    """Vega (n,) of the average option, currency per vol point."""
    arguments = (state.spot[:, None], env.strike, state.time_to_expiry[:, None], state.volatility[:, None])
    return (VOL_POINT * black_scholes.vega(*arguments).mean(-1)).clamp(min=MIN_VEGA)


def _residual_variance(env: QuotingEnv, state: QuotingState) -> Tensor:
    """Variance rate (n,) of a delta-hedged option per unit of vega, vol points² a year (Stoikov & Sağlam 2009).

    (vega α)²(1 − ρ²) + ½Γ²σ⁴S⁴Δt over vega². With one expiry Γ = vega/(S²στ), so it is the same for every option, and
    for the book.
    """
    of_volatility = hedged_volatility_variance(env.dynamics, state.variance, env.expiry - state.step)
    tau = state.time_to_expiry.clamp(min=0.5 * env.dynamics.dt)
    return of_volatility + 0.5 * (state.volatility / (tau * VOL_POINT)) ** 2 * env.dynamics.dt


def _quotes(half_spread: Tensor, skew: Tensor, target: Tensor | float = 0.0, band: float = 0.0) -> Tensor:
    """Action (n, 4) of a maker."""
    return torch.stack(torch.broadcast_tensors(half_spread, skew, *(x + 0.0 * skew for x in (target, band))), -1)


def constant_spread(env: QuotingEnv, half_spread: float) -> Policy:
    """The same half-spread, in vol points, whatever is held; Black–Scholes delta hedged every step."""
    return lambda observation: _quotes(torch.full_like(observation[:, 0], half_spread), 0.0 * observation[:, 0])


def avellaneda_stoikov(env: QuotingEnv, risk_aversion: float, k: float, spread: float = 1.0) -> Policy:
    """Avellaneda & Stoikov's quotes on the option book; Black–Scholes delta hedged every step.

    One unit of inventory is one option of average vega; its risk is what the hedge leaves (Stoikov & Sağlam 2009), its
    price is counted in vol points, and time runs to the end of the episode.

    Args:
        risk_aversion: γ, 1/currency.
        k: decay of the fill intensity with the edge, per vol point.
        spread: multiple of the formula's half-spread that is quoted.
    """

    def policy(observation: Tensor) -> Tensor:
        state = env.decode(observation)
        vega, time_left = _mean_vega(env, state), observation[:, 0] * env.num_steps * env.dynamics.dt
        arguments = (state.vega / vega, risk_aversion * vega, _residual_variance(env, state), time_left, k)
        half_spread, skew = avellaneda_stoikov_quotes(*arguments)
        return _quotes(spread * half_spread, skew)

    return policy


def glft(env: QuotingEnv, risk_aversion: float, k: float) -> Policy:
    """Guéant, Lehalle & Fernandez-Tapia's quotes far from the end, on the option book; delta hedged every step.

    Arguments and units as in `avellaneda_stoikov`; their A is the arrival rate of takers on one side, all options.
    """
    intensity = env.arrival_rate * env.num_options / env.dynamics.dt

    def policy(observation: Tensor) -> Tensor:
        state = env.decode(observation)
        vega = _mean_vega(env, state)
        arguments = (state.vega / vega, risk_aversion * vega, _residual_variance(env, state), k, intensity)
        return _quotes(*glft_quotes(*arguments))

    return policy


def minimum_variance_band(env: QuotingEnv, quotes: Policy, band: float) -> Policy:
    """The quotes of another policy, hedged to the minimum-variance delta with a no-trade band of `band` shares.

    The net delta that minimises the variance of the next step is −vega · ∂σ/∂S (Hull & White 2017), ∂σ/∂S how far the
    volatility of the middle option is expected to move with the spot.
    """

    def policy(observation: Tensor) -> Tensor:
        state, action = env.decode(observation), quotes(observation)
        slope = env.smile.slope(state.step, state.spot / env.initial_spot, state.variance)
        target = -state.vega * slope[..., slope.shape[-1] // 2] / (VOL_POINT * state.spot)
        return _quotes(action[:, 0], action[:, 1], target, band)

    return policy
