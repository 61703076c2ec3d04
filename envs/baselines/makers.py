"""Classical makers as policies: callables observation (n, size) → action of a maker in a `QuotingEnv`, in the two parts
of a `Maker`.

Each constructor takes the market that it is built for and the strategy's parameters. A formula published for one asset
is applied to a book of options by the book's vega.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.linalg import expm

from envs.market.moves import StepMoves
from envs.market.quoting import QuotingEnv, QuotingState, hedged_volatility_variance
from envs.market.rivals import Maker
from envs.market.units import VOL_POINT

Tensor = torch.Tensor


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


def _residual_variance(env: QuotingEnv, state: QuotingState) -> Tensor:
    """Variance rate (n,) of a delta-hedged option per unit of vega, vol points² a year (Stoikov & Sağlam 2009).

    It is (vega α)²(1 − ρ²) + ½Γ²σ⁴S⁴Δt over vega². With one expiry Γ = vega/(S²στ), so it is the same for every option
    and for the book; with several it is the mean over the options.
    """
    steps_left = env.expiry - state.step[:, None]
    variance = state.variance[:, None]
    from_volatility = hedged_volatility_variance(env.dynamics, variance, steps_left)
    tau = steps_left.clamp(min=0.5) * env.dynamics.dt
    volatility = env.reference_volatility(state.step, state.spot / env.initial_spot, state.variance)
    return (from_volatility + 0.5 * (volatility / (tau * VOL_POINT)) ** 2 * env.dynamics.dt).mean(-1)


class AffineMaker(Maker):
    """A maker whose action is affine in its own book, so that the terms of the public state are all that takes time.

    Args:
        env: the market that it is made for.
        terms: public state → action of a maker with nothing (n, actions), and what a net vega of 1 adds to it; of one
            that does not hedge to the Black–Scholes delta, also what a position of 1 takes off the target net delta,
            (n, num_options).
    """

    def __init__(self, env: QuotingEnv, terms: Callable[[QuotingState], Sequence[Tensor]]):
        super().__init__(env, terms, self._respond)

    def _respond(self, terms: Sequence[Tensor], observation: Tensor) -> Tensor:
        with_nothing, by_vega, *exposure = terms
        columns = self.env.columns
        action = torch.addcmul(with_nothing, observation[:, columns["net vega"]], by_vega)
        if exposure:
            hedged = (observation[:, columns["positions"]] * exposure[0]).sum(-1)
            action[:, self.env.action_columns["target"]] -= hedged
        return action


def _skewed(env: QuotingEnv, half_spread: Tensor, skew: Tensor) -> tuple[Tensor, Tensor]:
    """Terms of an `AffineMaker` from the half-spread, and the skew of a book with a vega of 1; both (n,)."""
    return env.quote(half_spread), env.quote(torch.zeros_like(skew), skew)


def constant_spread(env: QuotingEnv, half_spread: float) -> AffineMaker:
    """The same half-spread, in vol points, whatever is held; Black–Scholes delta hedged every step."""

    def terms(state: QuotingState) -> tuple[Tensor, Tensor]:
        return _skewed(env, torch.full_like(state.spot, half_spread), torch.zeros_like(state.spot))

    return AffineMaker(env, terms)


def avellaneda_stoikov(env: QuotingEnv, risk_aversion: float, k: float, spread: float = 1.0) -> AffineMaker:
    """Avellaneda & Stoikov's quotes on the option book; Black–Scholes delta hedged every step.

    One unit of inventory is one option of average vega. Its risk is the residual of the hedge (Stoikov & Sağlam 2009),
    its price is in vol points, and T is the end of the episode.

    Args:
        risk_aversion: γ, 1/currency.
        k: decay of the fill intensity with the edge, per vol point.
        spread: multiple of the formula's half-spread that is quoted.
    """

    def terms(state: QuotingState) -> tuple[Tensor, Tensor]:
        vega = env.vegas_at(state).mean(-1)
        time_left = (env.num_steps - state.step) * env.dynamics.dt
        arguments = (risk_aversion * vega, _residual_variance(env, state), time_left, k)
        half_spread, skew = avellaneda_stoikov_quotes(1.0 / vega, *arguments)
        return _skewed(env, spread * half_spread, skew)

    return AffineMaker(env, terms)


def glft(env: QuotingEnv, risk_aversion: float, k: float) -> AffineMaker:
    """Guéant, Lehalle & Fernandez-Tapia's quotes far from the end, on the option book; delta hedged every step.

    Arguments and units as in `avellaneda_stoikov`; their A is the arrival rate of takers on one side, all options.
    """
    intensity = env.arrival_rate * env.num_options / env.dynamics.dt

    def terms(state: QuotingState) -> tuple[Tensor, Tensor]:
        vega = env.vegas_at(state).mean(-1)
        quotes = glft_quotes(1.0 / vega, risk_aversion * vega, _residual_variance(env, state), k, intensity)
        return _skewed(env, *quotes)

    return AffineMaker(env, terms)


def minimum_variance_band(env: QuotingEnv, quotes: AffineMaker, band: float) -> AffineMaker:
    """The quotes of another maker, hedged to the minimum-variance delta with a no-trade band of ±`band` shares.

    The net delta that minimises the variance of the next step is −Σ position · vega · ∂σ/∂S (Hull & White 2017), ∂σ/∂S
    how far an option's volatility is expected to move with the spot. Options are taken at their reference prices.
    """

    def terms(state: QuotingState) -> tuple[Tensor, ...]:
        slope = env.smile.slope(state.step, state.spot / env.initial_spot, state.variance)
        slope = slope[..., env.at_the_money] if env.smile.is_fair else slope
        exposure = env.vegas_at(state) * slope / (VOL_POINT * state.spot[:, None])
        return *_in_band(env, quotes.terms(state), band), exposure

    return AffineMaker(env, terms)


def with_the_smile(env: QuotingEnv, quotes: AffineMaker, moves: StepMoves, share: float, band: float) -> AffineMaker:
    """The quotes of another maker, shifted by a share of the way from the reference price to the fair value.

    Hedged to the net delta that minimises the variance of the next step at fair values, with a no-trade band.

    Args:
        moves: of the options, see `envs.market.moves`.
        share: 0 leaves the quotes at the reference price, 1 centres them on the fair value.
        band: half-width of the band, shares.
    """

    def terms(state: QuotingState) -> tuple[Tensor, ...]:
        with_nothing, by_vega = _in_band(env, quotes.terms(state), band)
        shift = share * env.gap_at(state)
        return with_nothing + env.to_action(ask=shift, bid=-shift), by_vega, moves.exposure_at(state)

    return AffineMaker(env, terms)


def _in_band(env: QuotingEnv, terms: Sequence[Tensor], band: float) -> tuple[Tensor, Tensor]:
    """The quotes in the terms of a maker, in a no-trade band of this width, and nothing of how that maker hedges."""
    with_nothing, by_vega, *_ = terms
    with_nothing[:, env.action_columns["band"]] = band
    return with_nothing, by_vega
