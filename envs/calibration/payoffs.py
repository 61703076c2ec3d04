"""Exotic options on the daily spots of a path: what they pay, and when their holder may exercise.

Every payoff has days on which its holder chooses between what exercise pays and what comes later; the last day is its
maturity. A European payoff has its maturity alone. The spot is 1 at the start, rates are zero, days are trading days.

A path is the list of its log-spots (R, n) at every day so far, R runs of n players. `t` is a day at which the path is
stopped: S_u = S_t for u > t. So a payoff has a fake cashflow at every t, equation (8) of the paper (Vadori), which at
the end is the true one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from scipy.optimize import brentq

from envs.market.smiles import Surface
from envs.market.units import TRADING_DAYS

Tensor = torch.Tensor
DT = 1.0 / TRADING_DAYS


@dataclass
class Payoff:
    """Base class.

    Attributes:
        days: trading days of the payoff, increasing: t1, which a path-dependent policy remembers, …, the maturity.
        strikes: as the class says, in units of the initial spot.
    """

    days: tuple[int, ...]
    strikes: tuple[float, ...]

    strikes_are = "strike"  # for messages
    num_strikes = 1

    @property
    def exercise_days(self) -> tuple[int, ...]:
        """Days on which the holder may exercise; the last one is the maturity."""
        return self.days[-1:]

    def exercise(self, day: int, path: Sequence[Tensor], t: int) -> Tensor:
        """What exercise on this day pays (R, n), in units of the initial spot, on the path stopped at t."""
        raise NotImplementedError

    @staticmethod
    def default_strikes(surface: Surface, days: Sequence[int]) -> tuple[float, ...]:
        """The strikes where none are given."""
        return (1.0,)


@dataclass
class BermudanCall(Payoff):
    """(S_d − k_d)⁺ on one of the days d, a strike for each. By default all the calls are worth the same."""

    strikes_are = "strikes, one for each of --days"
    sign = 1.0

    @property
    def exercise_days(self):
        return self.days

    def exercise(self, day, path, t):
        """On a stopped path the strike is the paper's k̃_t = k^√(t/d): a call on less time is worth less."""
        u = min(t, day)
        strike = self.strikes[self.days.index(day)] ** math.sqrt(u / day)
        return (self.sign * (path[u].exp() - strike)).clamp(min=0)

    @classmethod
    def default_strikes(cls, surface, days):
        def worth(k: float, day: int) -> float:
            call = float(surface.call_price(k, day * DT))
            return call if cls.sign > 0 else call - 1.0 + math.exp(k)

        first = worth(0.0, days[0])
        span = (0.0, 5.0) if cls.sign > 0 else (-5.0, 0.0)
        return (1.0, *(math.exp(brentq(lambda k, day=day: worth(k, day) - first, *span)) for day in days[1:]))


@dataclass
class BermudanPut(BermudanCall):
    """(k_d − S_d)⁺ on one of the days d, a strike for each. By default all the puts are worth the same."""

    sign = -1.0


@dataclass
class ForwardStartCall(Payoff):
    """(S_T/S_t1 − k)⁺, t1 the first of the days: it prices the smile that there is at t1."""

    def exercise(self, day, path, t):
        first = self.days[0]
        return ((path[min(t, day)] - path[min(t, first)]).exp() - self.strikes[0]).clamp(min=0)


@dataclass
class AsianCall(Payoff):
    """(mean of S over the days after 0 − k)⁺."""

    def exercise(self, day, path, t):
        t = min(t, day)
        total = sum(x.exp() for x in path[1 : t + 1]) + (day - t) * path[t].exp()
        return (total / day - self.strikes[0]).clamp(min=0)


@dataclass
class UpAndOutCall(Payoff):
    """(S_T − k)⁺ unless S has been at the barrier or above on one of the days to T."""

    strikes_are = "strike and barrier"
    num_strikes = 2

    def exercise(self, day, path, t):
        strike, barrier = self.strikes
        highest = torch.stack(list(path[: min(t, day) + 1])).amax(0)
        return torch.where(highest < math.log(barrier), (path[min(t, day)].exp() - strike).clamp(min=0), 0.0)

    @staticmethod
    def default_strikes(surface, days):
        return (1.0, math.exp(1.5 * float(surface(0.0, days[-1] * DT).w.sqrt())))


@dataclass
class VarianceSwap(Payoff):
    """Realised variance of the daily log-returns, annualised: its price is the fair strike.

    The vanillas fix it in every diffusion (Neuberger 1994), so no policy can move it much: a control.
    """

    strikes_are = "strikes"
    num_strikes = 0

    def exercise(self, day, path, t):
        total = sum((b - a) ** 2 for a, b in pairwise(path[: min(t, day) + 1]))
        return total / (day * DT) + torch.zeros_like(path[0])

    @staticmethod
    def default_strikes(surface, days):
        return ()


PAYOFFS = {
    "bermudan-call": BermudanCall,
    "bermudan-put": BermudanPut,
    "forward-start-call": ForwardStartCall,
    "asian-call": AsianCall,
    "up-and-out-call": UpAndOutCall,
    "variance-swap": VarianceSwap,
}


def make_payoff(name: str, surface: Surface, days: Sequence[int], strikes: Sequence[float] | None = None) -> Payoff:
    """The payoff of that name.

    Args:
        days: see `Payoff`.
        strikes: None for its default on this surface.

    Raises:
        ValueError: a name that is not in `PAYOFFS`, days that do not increase or are too few, or strikes of the wrong
            number or not positive.
    """
    if name not in PAYOFFS:
        raise ValueError(f"payoff is {name!r} (one of {', '.join(PAYOFFS)})")
    kind = PAYOFFS[name]
    days = tuple(days)
    if len(days) < 2 or days[0] < 1 or any(a >= b for a, b in pairwise(days)):
        raise ValueError(f"days is {' '.join(map(str, days))} (two or more, increasing, the first at least 1)")
    if strikes is None:
        strikes = kind.default_strikes(surface, days)
    expected = len(days) if issubclass(kind, BermudanCall) else kind.num_strikes
    if len(strikes) != expected or min(strikes, default=1.0) <= 0:
        found = " ".join(f"{k:g}" for k in strikes)
        raise ValueError(f"strikes is {found} ({expected} of {name}, positive: {kind.strikes_are})")
    return kind(days, tuple(strikes))
