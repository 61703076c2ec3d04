"""Classical hedges as policies: callables observation (n, size) → action (n, 2) of a `HedgingEnv`.

Each constructor takes the environment whose market it is built for and the strategy's parameters, if it has any. A band
is centred on the hedge of the book's Black–Scholes delta unless another `centre` (itself a policy) is given. A formula
published for one sold option is applied to a book by the book's gamma, and by its sign where buyer and seller differ.
"""

import math

import torch

from envs.market import black_scholes
from envs.market.hedging import HedgingEnv, HedgingState, Policy

Tensor = torch.Tensor


def black_scholes_delta(env: HedgingEnv) -> Policy:
    """Holds the hedge of the book's Black–Scholes delta, every step (Black & Scholes 1973)."""
    return lambda observation: env.to_action(offset=torch.zeros_like(observation[:, 0]))


def _offset(env: HedgingEnv, state: HedgingState, volatility: Tensor) -> Tensor:
    """Offset (n,) that hedges the book's delta at other volatilities (n, num_options) than the mark's."""
    arguments = (state.spot[:, None], env.strike, state.time_to_expiry, volatility, env.is_call)
    return state.delta - (state.position * black_scholes.delta(*arguments)).sum(-1)


def leland(env: HedgingEnv) -> Policy:
    """Holds the delta at Leland's (1985) volatility, every step: σ̂² = σ²[1 + √(2/π) k/(σ√Δt)] for a short option.

    k is the round-trip cost rate (two trades), Δt the time between trades; a book that is long gamma has the minus sign
    (Hoggard, Whalley & Wilmott 1994).
    """

    def policy(observation: Tensor) -> Tensor:
        state = env.decode(observation)
        k = 2.0 * env.cost_rate
        sigma = state.volatility
        adjustment = math.sqrt(2.0 / math.pi) * k / (sigma * math.sqrt(env.dynamics.dt))
        factor = (1.0 - state.gamma.sign()[:, None] * adjustment).clamp(min=1e-4)
        return env.to_action(offset=_offset(env, state, sigma * factor.sqrt()))

    return policy


def minimum_variance_delta(env: HedgingEnv) -> Policy:
    """Hedges the delta that minimises the variance of the next step: Δ + vega · ∂σ/∂S (Hull & White 2017, eq. 5).

    ∂σ/∂S is how far the mark's volatility is expected to move with the spot, see `Smile.slope`. Under gbm and merton it
    is 0 and the delta is Black–Scholes'.
    """

    def policy(observation: Tensor) -> Tensor:
        state = env.decode(observation)
        spot = state.spot[..., None]
        slope = env.smile.slope(state.step, state.spot / env.initial_spot, state.variance)
        vega = black_scholes.vega(spot, env.strike, state.time_to_expiry, state.volatility)
        return env.to_action(offset=-(state.position * vega * slope / spot).sum(-1))

    return policy


def constant_band(env: HedgingEnv, half_width: float, centre: Policy | None = None) -> Policy:
    """No-trade band of constant half-width, in shares, around `centre`; trades to the nearest edge."""
    centre = centre or black_scholes_delta(env)

    def policy(observation: Tensor) -> Tensor:
        return env.to_action(offset=env.by_name(centre(observation))["offset"], half_width=half_width)

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
        return env.to_action(offset=env.by_name(centre(observation))["offset"], half_width=half_width)

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
        return env.to_action(offset=env.by_name(centre(observation))["offset"], half_width=half_width)

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
        arguments = (state.spot[:, None], state.gamma[:, None], state.volatility, tau, env.cost_rate, risk_aversion)
        of_last = (state.spot, state.gamma, state.volatility[:, last], tau[:, last], env.cost_rate, risk_aversion)
        offset = _offset(env, state, zakamouline_volatility(*arguments))
        return env.to_action(offset=offset, half_width=zakamouline_half_width(*of_last))

    return policy
