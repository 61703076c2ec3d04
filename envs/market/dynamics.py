"""Martingale models of the underlying: each turns a block of standard normals into whole price and variance paths.

    noise (num_paths, num_steps, noise_size)  ->  spot, variance, both (num_paths, num_steps + 1)

`simulate` is a deterministic function of its noise, so the same noise is the same market. The environments draw it once
per episode from an explicit `torch.Generator` (`draw_noise`), which makes every comparison paired. Under every model
E[S_{t+1} | past] = S_t holds exactly in discrete time, whatever the step.

Units: `dt` in years (1/252 = one trading day); `variance` is annualised and is the state that drives the *next* step;
volatilities are annualised decimals. Zero rates and dividends.

A model of your own is a subclass of `Dynamics` with `step` and `expected_average_variance`.
"""

import math
from dataclasses import asdict, dataclass

import torch

from envs.market.black_scholes import normal_cdf
from envs.market.units import TRADING_DAYS

Tensor = torch.Tensor


def draw_noise(num_rows: int, num_columns: int, generator: torch.Generator, dtype=torch.float32) -> Tensor:
    """Standard normals (num_rows, num_columns) whose row i depends on the generator alone, not on `num_rows`.

    PyTorch fills a tensor in an order that depends on its size (on the CPU the last 16 numbers, on a GPU all of them),
    so rows are drawn in whole blocks and the rest of the last block is dropped. Draw once per reseeding or reset: the
    start of a second draw does depend on the size of the first.
    """
    device = generator.device
    block = 16 if device.type == "cpu" else 1024
    num_blocks = -(-num_rows // block)
    if device.type == "cpu":  # sequential, so one call equals many
        return torch.randn(num_blocks * block, num_columns, generator=generator, dtype=dtype)[:num_rows]
    blocks = [
        torch.randn(block, num_columns, generator=generator, dtype=dtype, device=device) for _ in range(num_blocks)
    ]
    return torch.cat(blocks)[:num_rows]


class Dynamics:
    """Base class: loops `step` over time. `noise_size` is the number of normals a path uses per step."""

    noise_size: int = 1
    dt: float = 1 / TRADING_DAYS
    initial_variance: float  # annualised, at the start of every path
    last_step: float = math.inf  # steps after which the model ends
    follows_row_numbers: bool = False  # whether a path depends on the number of its row, not on its noise alone

    @property
    def pricing_model(self) -> "Dynamics":
        """The model under which options have their fair value: this one, unless it only replays what happened."""
        return self

    def step(self, variance: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """One step: variance (n,), noise (n, noise_size) → log-return (n,), next variance (n,); E[e^log-return] = 1."""
        raise NotImplementedError

    def step_from(self, step: Tensor, spot: Tensor, variance: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """`step` of a model that also depends on the time and the spot (over the initial one): here it does not."""
        return self.step(variance, noise)

    def expected_average_variance(self, variance: Tensor, num_steps: Tensor | int) -> Tensor:
        """E[average annualised variance of the next `num_steps` steps | variance], the square of the mark's volatility.

        Shapes broadcast; `variance` itself where num_steps is 0.
        """
        raise NotImplementedError

    def variance_slope(self, steps_left: Tensor) -> Tensor:
        """∂/∂v of `expected_average_variance`, which is affine in v; of the shape of `steps_left`."""
        # A variance is no whole number, though a number of steps may be one
        dtype = steps_left.dtype if steps_left.is_floating_point() else torch.get_default_dtype()
        zero = torch.zeros_like(steps_left, dtype=dtype)
        return self.expected_average_variance(zero + 1.0, steps_left) - self.expected_average_variance(zero, steps_left)

    def smile(self, strike: Tensor, expiry: Tensor) -> "Smile":
        """How options (num_options,) are marked: strikes over the initial spot, expiries in steps from the start."""
        return Smile(self, strike, expiry)

    def typical_variance(self, step: Tensor, spot: Tensor) -> Tensor:
        """A variance to look at policies at, at a step and a spot (over the initial one), which broadcast."""
        return torch.full_like(spot + 0.0 * step, self.initial_variance)

    def parameters(self) -> dict[str, float]:
        """The parameters of the model by name."""
        return asdict(self)

    def simulate(self, noise: Tensor, spot: float = 100.0) -> tuple[Tensor, Tensor]:
        """Noise (n, num_steps, noise_size) → spot and variance, both (n, num_steps + 1)."""
        variance = torch.full_like(noise[:, 0, 0], self.initial_variance)
        log_spot = torch.full_like(variance, math.log(spot))
        log_spots = [log_spot]
        variances = [variance]
        for t in range(noise.shape[1]):
            log_return, variance = self.step(variance, noise[:, t])
            log_spot = log_spot + log_return
            log_spots.append(log_spot)
            variances.append(variance)
        return torch.stack(log_spots, 1).exp(), torch.stack(variances, 1)

    def return_volatility_covariance(self, variance: Tensor) -> Tensor:
        """d<ln S, v>/d<ln S>: expected change of variance per unit of log-return, for the minimum-variance delta."""
        return torch.zeros_like(variance)

    def return_variance(self, variance: Tensor) -> Tensor:
        """E[(S_{t+1}/S_t − 1)² | v], of the simple return of one step; of the shape of `variance`."""
        return torch.expm1(variance * self.dt)

    def next_variance_moments(self, variance: Tensor) -> tuple[Tensor, Tensor]:
        """Conditional mean and variance of the next step's variance, given this one's; both of its shape."""
        return variance, torch.zeros_like(variance)


class Smile:
    """Volatilities that options are marked at: here √E[average variance to expiry], the same for all strikes.

    Attributes:
        dynamics: the model.
        strike, expiry: (num_options,) over the initial spot, and in steps from the start.
        is_fair: whether these are the volatilities at which the options are worth their fair value.
    """

    is_fair = False

    def __init__(self, dynamics: Dynamics, strike: Tensor, expiry: Tensor):
        self.dynamics = dynamics
        self.strike = strike
        self.expiry = expiry

    def steps_left(self, step: Tensor) -> Tensor:
        """Steps (…) since the start → (…, num_options) to expiry."""
        return (self.expiry - step[..., None]).clamp(min=0)

    def volatility(self, step: Tensor, spot: Tensor, variance: Tensor) -> Tensor:
        """Step, spot (over the initial one) and variance, which broadcast to (…) → (…, num_options)."""
        return self.dynamics.expected_average_variance(variance[..., None], self.steps_left(step)).sqrt()

    def variance(self, step: Tensor, spot: Tensor, volatility: Tensor) -> Tensor:
        """The variance (…) at which the middle option has this volatility (…): the inverse of `volatility`."""
        steps_left = self.steps_left(step)[..., len(self.expiry) // 2]
        at_zero = self.dynamics.expected_average_variance(torch.zeros_like(volatility), steps_left)
        return (volatility**2 - at_zero) / self.dynamics.variance_slope(steps_left)

    def slope(self, step: Tensor, spot: Tensor, variance: Tensor) -> Tensor:
        """d<ln S, σ>/d<ln S> (…, num_options): how far the volatility is expected to move with the spot."""
        covariance = self.dynamics.return_volatility_covariance(variance)[..., None]
        variance_slope = self.dynamics.variance_slope(self.steps_left(step))
        return variance_slope * covariance / (2.0 * self.volatility(step, spot, variance))

    @property
    def skewed(self) -> bool:
        """Whether volatilities move with the spot at all. If not, the best delta is Black–Scholes'."""
        return bool(self.dynamics.return_volatility_covariance(torch.ones(1)) != 0)


@dataclass
class GBM(Dynamics):
    """Geometric Brownian motion, ln S_{t+1}/S_t = σ√dt Z − ½σ²dt (Black & Scholes 1973)."""

    volatility: float = 0.2
    dt: float = 1 / TRADING_DAYS

    @property
    def initial_variance(self) -> float:
        return self.volatility**2

    def step(self, variance, noise):
        return (variance * self.dt).sqrt() * noise[:, 0] - 0.5 * variance * self.dt, variance

    def expected_average_variance(self, variance, num_steps):
        return variance + 0.0 * num_steps


@dataclass
class GARCH(Dynamics):
    """GJR-GARCH(1,1) with normal innovations (Glosten, Jagannathan & Runkle 1993), made a martingale.

    With h the variance of the next daily log-return and ε = √h Z:
        ln S_{t+1}/S_t = ε − ½h,    h' = ω + (α + γ·1{ε<0}) ε² + β h.
    ω is in squared daily returns (not percent). Starts at the stationary variance ω/(1 − p), p = α + β + γ/2.
    Steps are trading days: `dt` other than 1/252 would need other parameters.
    """

    omega: float
    alpha: float
    gamma: float
    beta: float
    dt: float = 1 / TRADING_DAYS

    @property
    def persistence(self) -> float:
        """p = α + β + γ/2, the factor by which a deviation of the variance decays in a day."""
        return self.alpha + self.beta + 0.5 * self.gamma

    @property
    def initial_variance(self) -> float:
        return TRADING_DAYS * self.omega / (1.0 - self.persistence)

    def next_variance(self, variance, shock):
        """Annualised variance after a daily shock ε (the return above its mean)."""
        reaction = self.alpha + self.gamma * (shock < 0).to(shock.dtype)
        return TRADING_DAYS * (self.omega + reaction * shock * shock) + self.beta * variance

    def step(self, variance, noise):
        h = variance / TRADING_DAYS
        shock = h.sqrt() * noise[:, 0]
        return shock - 0.5 * h, self.next_variance(variance, shock)

    def expected_average_variance(self, variance, num_steps):
        """v̄ + (v − v̄)(1 − p^m)/(m(1 − p))."""
        m = torch.as_tensor(num_steps, device=variance.device).double()
        p = self.persistence
        mean = self.initial_variance
        weight = torch.where(m > 0, -torch.expm1(m * math.log(p)) / (m.clamp(min=1) * (1.0 - p)), 1.0)
        return mean + (variance - mean) * weight.to(variance.dtype)

    def return_volatility_covariance(self, variance):
        """Cov(v', ε)/h = −252·γ√(2h/π): the ε² of a fall has the weight α + γ, of a rise α (E|Z|³ = √(8/π))."""
        h = variance / TRADING_DAYS
        return -TRADING_DAYS * self.gamma * (2.0 * h / math.pi).sqrt()

    def next_variance_moments(self, variance):
        """Mean ω + p h and variance h²(3(α² + αγ + ½γ²) − (α + ½γ)²), annualised (E Z⁴ = 3, half of it from falls)."""
        mean_square = 3.0 * (self.alpha**2 + self.alpha * self.gamma + 0.5 * self.gamma**2)
        spread = mean_square - (self.alpha + 0.5 * self.gamma) ** 2
        return TRADING_DAYS * self.omega + self.persistence * variance, variance**2 * spread


@dataclass
class Heston(Dynamics):
    """Heston (1993): dv = κ(θ − v)dt + ξ√v dW, dS = S√v dB, d<B, W> = ρ dt.

    Scheme: Andersen (2008), quadratic-exponential with martingale correction (QE-M), γ₁ = γ₂ = ½. The conditional mean
    and variance of v are exact at any step and E[S_{t+1}|S_t] = S_t exactly; Feller's condition is not needed.
    """

    initial_variance: float = 0.04
    mean_variance: float = 0.04
    mean_reversion: float = 4.0
    vol_of_vol: float = 0.5
    correlation: float = -0.7
    dt: float = 1 / TRADING_DAYS
    noise_size: int = 2

    PSI_SWITCH = 1.5  # between the quadratic and the exponential branch; any value in [1, 2] is valid

    def __post_init__(self):
        positive = ("initial_variance", "mean_variance", "mean_reversion", "vol_of_vol", "dt")
        for name in positive:
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)} (more than 0)")
        if not -1 <= self.correlation <= 1:
            raise ValueError(f"correlation is {self.correlation} (at least -1, at most 1)")
        # E[e^{A v'}] must exist in both branches at every v, Andersen (38). With a positive correlation and Feller's
        # condition far from satisfied, it does not.
        _, _, a_coefficient = self._coefficients()
        mean, var = self.next_variance_moments(torch.logspace(-8, 2, 400, dtype=torch.float64))
        psi = var / mean**2
        a, _ = self._quadratic(mean, psi)
        scale = torch.where(psi <= self.PSI_SWITCH, 2 * a, 0.5 * mean * (psi + 1))  # 2a and 1/β
        if a_coefficient * scale.max() > 0.99:
            raise ValueError(
                f"vol_of_vol is {self.vol_of_vol} with correlation {self.correlation}: too much for steps of "
                f"{self.dt:.3g} years to keep the spot a martingale (less vol_of_vol, correlation or dt)"
            )

    def _coefficients(self) -> tuple[float, float, float]:
        """K₂, K₃ = K₄ and A, the coefficient of v' in the conditional mean of S_{t+1}/S_t, Andersen (33)–(36)."""
        rho = self.correlation
        xi = self.vol_of_vol
        dt = self.dt
        k2 = 0.5 * dt * (self.mean_reversion * rho / xi - 0.5) + rho / xi
        k3 = 0.5 * dt * (1 - rho**2)
        return k2, k3, k2 + 0.5 * k3

    def _quadratic(self, mean: Tensor, psi: Tensor) -> tuple[Tensor, Tensor]:
        """a and b² of v' = a(b + Z)² from mean and squared coefficient of variation of v', Andersen (27) and (28)."""
        inverse_psi = 1.0 / psi.clamp(max=self.PSI_SWITCH)
        b2 = 2 * inverse_psi - 1 + (2 * inverse_psi).sqrt() * (2 * inverse_psi - 1).sqrt()
        return mean / (1 + b2), b2

    def return_variance(self, variance):
        """The variance expected on average over the step, to order v dt."""
        x = self.mean_reversion * self.dt
        return (self.mean_variance + (variance - self.mean_variance) * (-math.expm1(-x) / x)) * self.dt

    def next_variance_moments(self, variance):
        """Andersen (17) and (18), exact."""
        kappa = self.mean_reversion
        theta = self.mean_variance
        xi = self.vol_of_vol
        decay = math.exp(-kappa * self.dt)
        mean = theta + (variance - theta) * decay
        return mean, variance * xi**2 * decay * (1 - decay) / kappa + theta * xi**2 * (1 - decay) ** 2 / (2 * kappa)

    def step(self, variance, noise):
        mean, var = self.next_variance_moments(variance)
        psi = var / mean**2
        k2, k3, a_coefficient = self._coefficients()  # K₁ drops out
        # Quadratic branch, v' = a(b + Z)², (23)–(28)
        quadratic = psi <= self.PSI_SWITCH
        a, b2 = self._quadratic(mean, psi)
        v_quadratic = a * (b2.sqrt() + noise[:, 0]) ** 2
        x = 2 * a_coefficient * a
        log_m_quadratic = a_coefficient * b2 * a / (1 - x) - 0.5 * torch.log1p(-x)
        # Exponential branch: an atom at zero of weight p and an exponential tail, (29)–(32)
        psi_tail = psi.clamp(min=self.PSI_SWITCH)
        p = (psi_tail - 1) / (psi_tail + 1)
        beta = (1 - p) / mean
        survival = normal_cdf(-noise[:, 0])  # 1 − U
        v_exponential = torch.log((1 - p) / survival).clamp(min=0) / beta
        log_m_exponential = torch.log(p + beta * (1 - p) / (beta - a_coefficient))
        next_variance = torch.where(quadratic, v_quadratic, v_exponential)
        log_m = torch.where(quadratic, log_m_quadratic, log_m_exponential)
        # ln S' = ln S + K0* + K1 v + K2 v' + √(K3(v + v')) Z, with K0* = −ln E[e^{A v'}] − (K1 + K3/2)v, (33) and (39)
        diffusion = (k3 * (variance + next_variance)).sqrt() * noise[:, 1]
        log_return = -log_m - 0.5 * k3 * variance + k2 * next_variance + diffusion
        return log_return, next_variance

    def expected_average_variance(self, variance, num_steps):
        """θ + (v − θ)(1 − e^{−κτ})/(κτ)."""
        x = torch.as_tensor(num_steps * (self.mean_reversion * self.dt), dtype=variance.dtype, device=variance.device)
        weight = torch.where(x > 0, -torch.expm1(-x) / x.clamp(min=1e-12), 1.0)
        return self.mean_variance + (variance - self.mean_variance) * weight

    def return_volatility_covariance(self, variance):
        """d<ln S, v>/d<ln S> = ρξ."""
        return torch.full_like(variance, self.correlation * self.vol_of_vol)


@dataclass
class Merton(Dynamics):
    """Merton (1976): Brownian motion plus a compound Poisson process of normal jumps in ln S.

    ln S_{t+1}/S_t = c dt + σ√dt Z + Σ_{i≤N} J_i, N ~ Poisson(λdt), J ~ N(μ_J, δ²). N is cut at `MAX_JUMPS` in a step
    and c compensates the cut distribution, so the martingale property stays exact.
    """

    volatility: float = 0.16
    jump_rate: float = 1.0
    jump_mean: float = -0.08
    jump_volatility: float = 0.09
    dt: float = 1 / TRADING_DAYS
    noise_size: int = 3

    MAX_JUMPS = 8

    @property
    def initial_variance(self) -> float:
        """Total variance rate σ² + λ(μ_J² + δ²), constant."""
        return self.volatility**2 + self.jump_rate * (self.jump_mean**2 + self.jump_volatility**2)

    def jump_probabilities(self) -> list[float]:
        """P(N = n), n = 0 … MAX_JUMPS, the last taking the tail."""
        rate = self.jump_rate * self.dt
        probabilities = [math.exp(-rate) * rate**n / math.factorial(n) for n in range(self.MAX_JUMPS)]
        return [*probabilities, max(0.0, 1.0 - sum(probabilities))]

    def step(self, variance, noise):
        probabilities = self.jump_probabilities()
        tail = normal_cdf(-noise[:, 1])  # 1 − U: rare jumps are near 0, where floats are dense
        num_jumps = torch.zeros_like(tail)
        for n in range(1, len(probabilities)):
            num_jumps = num_jumps + (tail < sum(probabilities[n:])).to(tail.dtype)
        growth = self.jump_mean + 0.5 * self.jump_volatility**2
        compensator = math.log(sum(p * math.exp(n * growth) for n, p in enumerate(probabilities)))
        jump = self.jump_mean * num_jumps + self.jump_volatility * num_jumps.sqrt() * noise[:, 2]
        diffusion = self.volatility * math.sqrt(self.dt) * noise[:, 0] - 0.5 * self.volatility**2 * self.dt
        return diffusion + jump - compensator, variance

    def expected_average_variance(self, variance, num_steps):
        return variance + 0.0 * num_steps

    def return_variance(self, variance):
        """e^{σ²dt} E[e^{2ΣJ}]/E[e^{ΣJ}]² − 1: less than the variance of the log-return if jumps go down."""

        def moment(a: int) -> float:
            """E[e^{aΣJ}]."""
            growth = a * self.jump_mean + 0.5 * (a * self.jump_volatility) ** 2
            return sum(p * math.exp(n * growth) for n, p in enumerate(self.jump_probabilities()))

        growth = math.exp(self.volatility**2 * self.dt)
        return torch.full_like(variance, growth * moment(2) / moment(1) ** 2 - 1.0)
