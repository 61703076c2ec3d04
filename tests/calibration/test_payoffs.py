"""The exotics: against closed forms under gbm, and as Monte Carlo finds them under local volatility."""

import math
import re

import pytest
import torch
from scipy.stats import norm

from envs.calibration.exotic import value_exotic
from envs.calibration.game import DT, CalibrationGame, play, sample
from envs.calibration.payoffs import PAYOFFS, BermudanCall, make_payoff
from envs.market import black_scholes, smiles

SP500 = smiles.SURFACES["sp500-2018"]
FLAT = 0.0123**0.5  # volatility of a surface without skew


def flat_game(payoff, num_players=2**15, **settings):
    """A game whose market and whose Dupire model are gbm."""
    surface = smiles.SSVI(FLAT**2, 0.0, 1e-6, 0.3, 0.0, last_maturity=60 * DT)
    game = CalibrationGame(surface, num_players, task="exotic", payoff=payoff, **settings)
    assert game.local_volatility.sub(FLAT).abs().max() < 1e-4
    return game


def priced(game, chunks=4):
    value = value_exotic(sample(game, CalibrationGame.step_dupire, chunks * game.num_players, 3))
    prices = value.without[:, 0]
    error = float((prices - prices.mean()).square().sum().mul((chunks - 1) / chunks).sqrt())
    return value.price, error


def call(strike, days):
    """Black–Scholes with the flat volatility."""
    return float(black_scholes.price(torch.tensor(1.0), torch.tensor(strike), days * DT, torch.tensor(FLAT)))


def geometric_asian(strike, days):
    """A lower bound of the Asian call, in closed form: the mean of the log-spots is normal."""
    variance = FLAT**2 * DT * sum((i / days) ** 2 for i in range(1, days + 1))
    mean = -0.5 * FLAT**2 * DT * (days + 1) / 2
    sd = math.sqrt(variance)
    d = (mean - math.log(strike)) / sd
    return math.exp(mean + 0.5 * variance) * norm.cdf(d + sd) - strike * norm.cdf(d)


def up_and_out(strike, barrier, days):
    """Up-and-out call (Reiner & Rubinstein 1991), the barrier moved for daily monitoring (Broadie et al. 1997)."""
    barrier = barrier * math.exp(0.5826 * FLAT * math.sqrt(DT))
    sd = FLAT * math.sqrt(days * DT)

    def up_in_or_vanilla(s):  # E[(S − k)⁺; S < barrier] from s
        def value(x):
            d = math.log(s / x) / sd + 0.5 * sd
            return s * norm.cdf(d) - strike * norm.cdf(d - sd)

        return value(strike) - value(barrier)

    return up_in_or_vanilla(1.0) - barrier * up_in_or_vanilla(barrier**2) / barrier**2 * 1.0


def two_dates(k1, k2, first, last):
    """Bermudan call with two dates, by quadrature over S_t1."""
    z, w = torch.linspace(-7, 7, 20001, dtype=torch.float64), 14 / 20000
    spot = torch.exp(FLAT * math.sqrt(first * DT) * z - 0.5 * FLAT**2 * first * DT)
    later = black_scholes.price(spot, torch.tensor(k2), (last - first) * DT, torch.tensor(FLAT).double())
    density = torch.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
    return float((torch.maximum((spot - k1).clamp(min=0), later) * density).sum() * w)


def test_closed_forms_under_gbm():
    price, error = priced(flat_game("forward-start-call"))
    assert price == pytest.approx(call(1.0, 30), abs=4 * error)
    assert error < 0.01 * price
    price, error = priced(flat_game("variance-swap"))
    assert price == pytest.approx(FLAT**2 + FLAT**4 * DT / 4, abs=4 * error)
    price, error = priced(flat_game("asian-call"))
    geometric = geometric_asian(1.0, 51)
    assert geometric - 4 * error < price < 1.01 * geometric + 4 * error
    price, error = priced(flat_game("up-and-out-call", strikes=(1.0, 1.05)))
    assert price == pytest.approx(up_and_out(1.0, 1.05, 51), abs=4 * error + 0.01 * price)
    price, error = priced(flat_game("bermudan-call", strikes=(1.0, 1.01)))
    assert price == pytest.approx(two_dates(1.0, 1.01, 21, 51), abs=4 * error)


def test_symmetry_of_bermudan_calls_and_puts():
    """Under gbm, with S as numeraire: the put at k is k times the call at 1/k (put–call symmetry)."""
    game = flat_game("bermudan-put", strikes=(1.0, 0.99), days=(21, 51))
    put, error = priced(game)
    path = [x.double() for x in game.log_spots]
    assert torch.equal(game.payoff.exercise(21, path, 51), (1 - path[21].exp()).clamp(min=0))
    assert put > max(call(1.0, 21), call(0.99, 51) - 0.01) - 4 * error


def test_more_dates_are_worth_more():
    """A third date adds value, two equal the quadrature's, and dates on which nobody would exercise add none."""
    two, error = priced(flat_game("bermudan-call", strikes=(1.0, 1.01)))
    three, _ = priced(flat_game("bermudan-call", days=(21, 36, 51), strikes=(1.0, 1.005, 1.01)))
    same, _ = priced(flat_game("bermudan-call", days=(21, 36, 51), strikes=(1.0, 3.0, 1.01)))
    assert three > two + 4 * error
    assert same == pytest.approx(two, abs=3e-5)


@pytest.mark.parametrize("name", PAYOFFS)
def test_stopped_paths_end_in_the_true_cashflow(name):
    """The fake cashflow (8) at t knows nothing of the path after t."""
    game = CalibrationGame(SP500, 500, task="exotic", payoff=name)
    play(game, CalibrationGame.step_dupire, 1)
    payoff, path = game.payoff, game.log_spots
    other = path[:31] + [x + 0.1 for x in path[31:]]
    last = payoff.exercise_days[-1]
    torch.testing.assert_close(payoff.exercise(last, path, 30), payoff.exercise(last, other, 30))
    stopped = path[:31] + [path[30]] * 21
    if not isinstance(payoff, BermudanCall):  # whose strike is scaled
        torch.testing.assert_close(payoff.exercise(last, path, 30), payoff.exercise(last, stopped, 51))
    assert not torch.allclose(payoff.exercise(last, path, 51), payoff.exercise(last, other, 51))
    assert game.exotic_cashflows().shape == (52, 1, 500)
    assert game.exotic_paid().isfinite().all()


def test_localisation_fixes_the_variance_swap():
    """Whatever the players do, the vanillas fix the price of variance (Neuberger 1994); not that of a forward start."""
    wild = {"variance-swap": 0.01, "forward-start-call": 0.02}
    changes = {}
    for name in wild:
        game = CalibrationGame(SP500, 2**16, task="exotic", state="path-dependent", payoff=name)
        play(game, CalibrationGame.step_dupire, 2)
        plain = game.exotic_paid().mean()
        play(game, lambda g: g.step((20 * g.state.log_spot_t1 - 10 * g.state.log_spot).clamp(-0.8, 0.8)[..., None]), 2)
        changes[name] = abs(float(game.exotic_paid().mean() / plain - 1))
    assert changes["variance-swap"] < wild["variance-swap"]
    assert changes["forward-start-call"] > wild["forward-start-call"]


def test_default_strikes_are_worth_the_same():
    for name in ("bermudan-call", "bermudan-put"):
        payoff = make_payoff(name, SP500, (21, 36, 51))
        worth = [
            float(SP500.call_price(math.log(k), d * DT)) - (0 if payoff.sign > 0 else 1 - k)
            for d, k in zip(payoff.days, payoff.strikes, strict=True)
        ]
        assert worth == pytest.approx([worth[0]] * 3, rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("lookback", (21, 51)), "payoff is 'lookback' (one of bermudan-call"),
        (("asian-call", (51, 21)), "days is 51 21 (two or more, increasing, the first at least 1)"),
        (("bermudan-call", (21, 51), (1.0,)), "strikes is 1 (2 of bermudan-call, positive: "),
        (("up-and-out-call", (21, 51), (1.0, -1.0)), "strikes is 1 -1 (2 of up-and-out-call, positive: "),
    ],
)
def test_bad_payoffs(arguments, message):
    name, days, *strikes = arguments
    with pytest.raises(ValueError, match=re.escape(message)):
        make_payoff(name, SP500, days, *strikes)
