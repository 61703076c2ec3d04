"""Classical hedging strategies as policies: callables observation (n, 7) → action (n, 2) of a `HedgingEnv`.

Each constructor takes the environment whose market it is built for and, where the strategy has one, its parameter. A
band is centred on the Black–Scholes delta unless another `centre` (itself a policy) is given.
"""

import math
from collections.abc import Callable

import torch

from envs import black_scholes
from envs.hedging import HedgingEnv

Tensor = torch.Tensor
Policy = Callable[[Tensor], Tensor]


def black_scholes_delta(env: HedgingEnv) -> Policy:
    """Holds the Black–Scholes delta, every step (Black & Scholes 1973)."""
    return lambda observation: observation.new_zeros(len(observation), 2)


def leland(env: HedgingEnv) -> Policy:
    """Holds the delta at Leland's (1985) volatility, every step: σ̂² = σ²[1 + √(2/π) k/(σ√Δt)] for a short option.

    k is the round-trip cost rate (two trades), Δt the time between trades.
    """

    def policy(observation: Tensor) -> Tensor:
        state = env.decode(observation)
        k, sigma = 2.0 * env.cost_rate, state.volatility
        adjusted = sigma * (1.0 + math.sqrt(2.0 / math.pi) * k / (sigma * math.sqrt(env.dynamics.dt))).sqrt()
        target = black_scholes.delta(state.spot, env.strike, state.time_to_expiry, adjusted)
        return torch.stack((target - state.delta, torch.zeros_like(target)), -1)

    return policy


def minimum_variance_delta(env: HedgingEnv) -> Policy:
    """Holds the delta that minimises the variance of the next step: Δ + vega · ∂σ/∂S (Hull & White 2017, eq. 5).

    The mark's volatility moves with the spot through the model's return–volatility covariance c = d<ln S, v>/d<ln S>:
    ∂σ/∂S = (∂σ²/∂v) c / (2σS). Equal to Black–Scholes where volatility does not move with the spot (gbm, merton).
    """

    def policy(observation: Tensor) -> Tensor:
        state = env.decode(observation)
        steps_left = env.num_steps - state.step
        average = env.dynamics.expected_average_variance
        slope = average(state.variance + 1.0, steps_left) - average(state.variance, steps_left)  # affine in variance
        covariance = env.dynamics.return_volatility_covariance(state.variance)
        vega = black_scholes.vega(state.spot, env.strike, state.time_to_expiry, state.volatility)
        offset = vega * slope * covariance / (2.0 * state.volatility * state.spot)
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


def zakamouline_half_width(spot, gamma, volatility, time_to_expiry, cost_rate, risk_aversion) -> Tensor:
    """H₀ + H₁: H₀ = λ/(aSσ²τ), H₁ = 1.12 λ^0.31 τ^0.05 σ^−0.25 (|Γ|/a)^0.5 (Zakamouline 2006), zero rates."""
    h0 = cost_rate / (risk_aversion * spot * volatility**2 * time_to_expiry)
    gamma_term = (gamma.abs() / risk_aversion) ** 0.5
    return h0 + 1.12 * cost_rate**0.31 * time_to_expiry**0.05 * volatility**-0.25 * gamma_term


def zakamouline_volatility(spot, gamma, volatility, time_to_expiry, cost_rate, risk_aversion) -> Tensor:
    """σ_m = σ√(1 + 4.76 λ^0.78 τ^−0.02 σ^−0.25 (aS²|Γ|)^0.15) for a short option (Zakamouline 2006), zero rates."""
    risk = (risk_aversion * spot**2 * gamma.abs()) ** 0.15
    return volatility * (1.0 + 4.76 * cost_rate**0.78 * time_to_expiry**-0.02 * volatility**-0.25 * risk).sqrt()


def zakamouline(env: HedgingEnv, risk_aversion: float | None = None) -> Policy:
    """Band of Zakamouline (2006), fitted to the exact utility-based hedge: modified delta ± (H₀ + H₁)."""
    risk_aversion = env.risk_aversion if risk_aversion is None else risk_aversion

    def policy(observation: Tensor) -> Tensor:
        state = env.decode(observation)
        tau = state.time_to_expiry.clamp(min=0.5 * env.dynamics.dt)
        arguments = (state.spot, state.gamma, state.volatility, tau, env.cost_rate, risk_aversion)
        target = black_scholes.delta(state.spot, env.strike, state.time_to_expiry, zakamouline_volatility(*arguments))
        return torch.stack((target - state.delta, zakamouline_half_width(*arguments)), -1)

    return policy
