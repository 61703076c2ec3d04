"""Bounds over all models: known cases, small problems solved otherwise, and the Bermudan of phase 0."""

from functools import cache
from itertools import product

import numpy as np
import pytest
import scipy.sparse as sp
from scipy.optimize import brentq
from scipy.sparse.linalg import spsolve

from envs.market import black_scholes, smiles
from envs.market.units import TRADING_DAYS
from envs.optimum.transport import (
    Bounds,
    Marginals,
    _butterflies,
    greatest_bermudan,
    least_bermudan,
    marginals,
    payoff_bounds,
    surface_marginals,
)

SP500 = smiles.SURFACES["sp500-2018"]
BP = 1e-4  # of the spot
T1, T2 = 21, 51  # days


def calls_on(nodes, masses) -> np.ndarray:
    """Calls struck at the nodes, (…, N) masses → (…, N) prices."""
    return np.asarray(masses) @ np.maximum(nodes[:, None] - nodes, 0.0)


def laws_of(nodes, *masses) -> Marginals:
    return marginals(nodes, calls_on(nodes, masses))


@cache
def strike_t2() -> float:
    """k2 such that the calls (t1, 1) and (t2, k2) are worth the same."""
    worth = SP500.call_price(0.0, T1 / TRADING_DAYS)
    return float(np.exp(brentq(lambda k: float(SP500.call_price(k, T2 / TRADING_DAYS) - worth), 0.0, 1.0)))


def phase0_bermudan(*days: int, num_nodes: int) -> tuple[Marginals, dict[int, np.ndarray]]:
    """The S&P 500's laws on these days, and the Bermudan call of the first and the last."""
    laws = surface_marginals(SP500, [day / TRADING_DAYS for day in days], [1.0, strike_t2()], num_nodes)
    return laws, {0: np.maximum(laws.nodes - 1.0, 0), len(days) - 1: np.maximum(laws.nodes - strike_t2(), 0)}


def implicit_dupire(laws: Marginals) -> np.ndarray:
    """Joint law (N, N) of the first and the last date under local volatility, by Andreasen & Huge's (2011) steps."""
    joint = np.diag(laws.masses[0])
    for mass, spread in zip(laws.masses[1:], laws.spreads, strict=True):
        moved = _butterflies(laws.nodes) @ sp.diags_array(spread / mass[1:-1])
        step = sp.eye_array(len(mass)) - sp.hstack([sp.csc_array((len(mass), 1)), moved, sp.csc_array((len(mass), 1))])
        joint = spsolve(step.tocsc(), joint.T).T
    return joint


def bermudan_price(joint: np.ndarray, first: np.ndarray, last: np.ndarray) -> float:
    """Two dates, joint law (N, N), the holder knows the spot alone."""
    return np.maximum(joint.sum(1) * first, joint @ last).sum()


# MARGINALS


def test_marginals_are_in_convex_order_and_have_the_market_s_prices():
    """Butterflies and calendars are exactly free of arbitrage; calls at the nodes keep their price to 0.001 bp."""
    laws, exercise = phase0_bermudan(*range(T1, T2 + 1), num_nodes=81)
    assert laws.repair < 1e-3 * BP
    assert (np.diff(laws.calls) / np.diff(laws.nodes)).min() >= -1.0
    assert np.diff(np.diff(laws.calls) / np.diff(laws.nodes)).min() > -1e-12
    assert laws.spreads.min() >= 0.0
    np.testing.assert_allclose(laws.masses.sum(1), 1.0, atol=1e-12)
    np.testing.assert_allclose(laws.masses @ laws.nodes, 1.0, atol=1e-12)
    np.testing.assert_allclose(calls_on(laws.nodes, laws.masses), laws.calls, atol=1e-12)
    for date, day in ((0, T1), (len(laws.calls) - 1, T2)):
        strike = 1.0 if date == 0 else strike_t2()
        price = float(SP500.call_price(np.log(strike), day / TRADING_DAYS))
        assert laws.masses[date] @ exercise[date] == pytest.approx(price, abs=1e-3 * BP)


def test_arbitrage_is_repaired():
    """A butterfly of negative price and a calendar spread of negative price vanish; clean prices stay as they are."""
    nodes = np.array([0.0, 0.5, 1.0, 1.5, 2.0])
    clean = calls_on(nodes, [[0, 0.2, 0.6, 0.2, 0], [0.1, 0.2, 0.4, 0.2, 0.1]])
    assert marginals(nodes, clean).repair < 1e-15
    np.testing.assert_allclose(marginals(nodes, clean).calls, clean, atol=1e-15)
    bad = clean.copy()
    bad[0, 2] += 0.15  # above the chord of its neighbours
    laws = marginals(nodes, bad)
    assert np.diff(laws.calls, 2).min() > -1e-15
    assert laws.spreads.min() >= 0
    assert laws.repair == pytest.approx(0.05)  # down to the chord
    late = marginals(nodes, clean[::-1])
    np.testing.assert_allclose(late.calls, clean[[1, 1]], atol=1e-15)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: marginals([0.0, 2.0, 1.0], np.zeros((1, 3))), "increasing"),
        (lambda: marginals([0.0, 1.0, 2.0], np.zeros((1, 4))), r"\(1, 4\)"),
        (lambda: surface_marginals(SP500, [0.2, 0.1]), "increasing"),
        (lambda: surface_marginals(SP500, [0.1, 0.2], [1.0, 1.0001]), "strikes"),
        (lambda: payoff_bounds(small(), np.zeros((3, 3)), (0, 1)), r"\(3, 3\)"),
        (lambda: payoff_bounds(small(), np.zeros((5, 5)), (0, 2)), "from 0 to 1"),
        (lambda: least_bermudan(small(), {0: np.full(5, -1.0)}), "0 or more"),
        (lambda: least_bermudan(small(), {0: np.ones(5)}, (2.0, 3.0)), "variance_ratio"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# SMALL PROBLEMS


def small() -> Marginals:
    nodes = np.array([0.0, 0.5, 1.0, 1.5, 2.0])
    return laws_of(nodes, [0, 0.3, 0.4, 0.3, 0], [0.1, 0.25, 0.3, 0.25, 0.1])


def test_one_date_is_the_european():
    laws = small()
    payoff = np.maximum(1.25 - laws.nodes, 0)
    price = laws.masses[1] @ payoff
    assert payoff_bounds(laws, payoff, [1]) == pytest.approx((price, price))
    assert least_bermudan(laws, {1: payoff}) == pytest.approx(price)
    assert greatest_bermudan(laws, {1: payoff}) == pytest.approx(price)


def test_a_payoff_that_adds_up_has_one_price():
    """f(S_t1) + g(S_t2) + h(S_t1)(S_t2 − S_t1): two Europeans and a hedge, whose gain has the mean 0."""
    laws = small()
    x = laws.nodes
    first = np.cos(3.0 * x)
    last = x**2
    payoff = first[:, None] + last[None, :] + np.exp(x)[:, None] * (x[None, :] - x[:, None])
    price = laws.masses[0] @ first + laws.masses[1] @ last
    assert payoff_bounds(laws, payoff, (0, 1)) == pytest.approx((price, price), abs=1e-6)


def test_equal_laws_leave_only_the_diagonal():
    laws = laws_of(small().nodes, *[small().masses[0]] * 3)
    x = laws.nodes
    payoff = np.sin(5.0 * x)[:, None] * x[None, :] ** 2
    price = laws.masses[0] @ np.diag(payoff)
    assert payoff_bounds(laws, payoff, (0, 2)) == pytest.approx((price, price), abs=1e-6)
    higher = np.maximum(np.maximum(x - 1.0, 0), np.maximum(1.0 - x, 0))
    exercise = {0: np.maximum(x - 1.0, 0), 2: np.maximum(1.0 - x, 0)}
    for price in (least_bermudan(laws, exercise), greatest_bermudan(laws, exercise)):
        assert price == pytest.approx(laws.masses[0] @ higher, abs=1e-6)


STEPS = ([0, 0.5, 0.5, 0], [0.25, 0.25, 0.25, 0.25])  # laws on the nodes 0, 1, 2, 3


@cache
def couplings() -> np.ndarray:
    """Joint laws (n, 4, 4) of all martingales with the laws `STEPS`, on a fine mesh that has the corners.

    The path that starts at 1 has a and b of the market's spreads of 0.25 at the nodes 1 and 2.
    """
    a, b = np.meshgrid(*[np.linspace(0.0, 0.25, 193)] * 2)
    a, b = a.ravel(), b.ravel()
    one = np.stack((a, 0.5 - 2 * a + b, a - 2 * b, b), -1)
    two = np.array(STEPS[1]) - one
    joint = np.stack((np.zeros_like(one), one, two, np.zeros_like(one)), 1)
    return joint[joint.min((1, 2)) > -1e-12]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_payoff_against_all_couplings(seed):
    laws = laws_of(np.arange(4.0), *STEPS)
    payoff = np.random.default_rng(seed).normal(size=(4, 4))
    prices = (couplings() * payoff).sum((1, 2))
    assert payoff_bounds(laws, payoff, (0, 1)) == pytest.approx((prices.min(), prices.max()), abs=1e-6)


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_bermudan_against_all_couplings(seed):
    """A holder who knows the path alone: the least price is theirs, the greatest at least theirs."""
    laws = laws_of(np.arange(4.0), *STEPS)
    first, last = np.random.default_rng(seed).uniform(size=(2, 4))
    prices = np.array([bermudan_price(joint, first, last) for joint in couplings()])
    exercise = {0: first, 1: last}
    least = least_bermudan(laws, exercise)
    assert least <= prices.min() + 1e-7
    assert least == pytest.approx(prices.min(), abs=3e-3)  # the mesh's
    assert greatest_bermudan(laws, exercise) >= prices.max() - 1e-7


def test_greatest_bermudan_needs_a_holder_who_knows_more_than_the_path():
    """From 1 the spot goes to 0, 1, 2 or stays: half of the paths at 1 know that they stay, and are exercised.

    S = 1 at first, ¼, ½, ¼ at last. Exercise pays 1, waiting 2 at the ends alone. Who knows the path has max(1, ½ · 2),
    who is told whether the spot will move has ½ · 1 + ½ · 2.
    """
    laws = laws_of(np.arange(3.0), [0, 1, 0], [0.25, 0.5, 0.25])
    exercise = {0: np.array([0.0, 1.0, 0.0]), 1: np.array([2.0, 0.0, 2.0])}
    assert least_bermudan(laws, exercise) == pytest.approx(1.0)
    assert greatest_bermudan(laws, exercise) == pytest.approx(1.5)


def test_dates_between_narrow_the_bounds():
    """If the spot leaves 2 before it leaves 1, no path from 1 can come to 3 by way of 2; else 1/8 of all can."""
    nodes = np.arange(4.0)
    payoff = np.zeros((4, 4))
    payoff[1, 3] = 1.0
    bounds = payoff_bounds(laws_of(nodes, *STEPS), payoff, (0, 1))
    assert bounds == pytest.approx((0.0, 0.125), abs=1e-7)
    bounds = payoff_bounds(laws_of(nodes, STEPS[0], [0, 0.75, 0, 0.25], STEPS[1]), payoff, (0, 2))
    assert bounds == pytest.approx((0.0, 0.0), abs=1e-7)


def uniform_laws(num_nodes: int) -> Marginals:
    """The uniform laws on (−1, 1) and (−2, 2)."""
    nodes = np.linspace(-2.0, 2.0, num_nodes)
    return marginals(nodes, [np.where(nodes > -a, np.maximum(a - nodes, 0) ** 2 / (4 * a), -nodes) for a in (1.0, 2.0)])


def test_forward_start_straddle_of_uniform_laws():
    """Least: what the laws share stays, the rest goes to (−x ± √(12 − 3x²))/2 (Hobson & Klimmek 2015), which is worth
    3/2 − π/(2√3). Greatest: x ± 1 (Hobson & Neuberger 2012), worth 1."""
    exact = Bounds(1.5 - np.pi / (2.0 * np.sqrt(3.0)), 1.0)
    errors = []
    for num_nodes in (17, 33):
        laws = uniform_laws(num_nodes)
        payoff = np.abs(laws.nodes[None, :] - laws.nodes[:, None])
        errors.append(np.abs(np.subtract(payoff_bounds(laws, payoff, (0, 1)), exact)).max())
    assert errors[1] < 0.4 * errors[0]
    assert errors[1] < 2e-3


def test_three_dates_in_a_binomial_tree():
    """Steps of ½ up or down are the only martingale with the tree's laws, as E[(ΔS)²] leaves no longer ones; so least
    and greatest price are the tree's, by backward induction."""
    nodes = np.arange(-0.5, 2.75, 0.5)
    up = np.eye(7, k=1)
    tree = 0.5 * (up + up.T)  # of the inner nodes
    masses = [np.linalg.matrix_power(tree, step)[3] for step in (1, 2, 3)]
    payoffs = np.random.default_rng(5).uniform(size=(3, 7))
    value = payoffs[2]
    for payoff in payoffs[1::-1]:
        value = np.maximum(payoff, tree @ value)
    laws = laws_of(nodes, *masses)
    exercise = dict(enumerate(payoffs))
    assert least_bermudan(laws, exercise) == pytest.approx(masses[0] @ value, abs=1e-6)
    assert greatest_bermudan(laws, exercise) == pytest.approx(masses[0] @ value, abs=1e-6)
    asian = np.maximum((nodes[:, None, None] + nodes[:, None] + nodes) / 3.0 - 1.0, 0.0)
    paths = 1.0 + np.cumsum(np.array(list(product((-0.5, 0.5), repeat=3))), 1)
    price = np.maximum(paths.mean(1) - 1.0, 0).mean()
    assert payoff_bounds(laws, asian, (0, 1, 2)) == pytest.approx((price, price), abs=1e-6)


def test_an_exercise_date_that_pays_nothing_changes_nothing():
    laws = laws_of(np.arange(4.0), STEPS[0], STEPS[1], [0.375, 0.125, 0.125, 0.375])
    call = np.maximum(laws.nodes - 1.5, 0)
    put = np.maximum(1.5 - laws.nodes, 0)
    for bound in (least_bermudan, greatest_bermudan):
        with_it = bound(laws, {0: call, 1: np.zeros(4), 2: put})
        assert with_it == pytest.approx(bound(laws, {0: call, 2: put}), abs=1e-6)
        assert bound(laws, {0: call, 1: 2.0 * put, 2: put}) > with_it + 1e-3


# MARKETS


def test_bermudan_of_phase_0():
    """Least: both Europeans' price, 106.65 bp. Greatest: 168.00, 167.27, 167.13 and 167.12 bp on 41, 81, 161 and 641
    nodes. Dates between change neither."""
    european = float(SP500.call_price(0.0, T1 / TRADING_DAYS))
    assert european == pytest.approx(106.65 * BP, abs=0.01 * BP)
    for days, num_nodes in (((T1, T2), 41), ((T1, 36, T2), 25)):
        laws, exercise = phase0_bermudan(*days, num_nodes=num_nodes)
        assert least_bermudan(laws, exercise) == pytest.approx(european, abs=1e-3 * BP)
    daily = greatest_bermudan(*phase0_bermudan(*range(T1, T2 + 1), num_nodes=41))
    greatest = [greatest_bermudan(*phase0_bermudan(T1, T2, num_nodes=n)) / BP for n in (41, 81, 161)]
    assert daily / BP == pytest.approx(greatest[0], abs=1e-3)
    assert greatest[2] == pytest.approx(167.13, abs=0.01)
    assert abs(greatest[2] - greatest[1]) < 0.3 * abs(greatest[1] - greatest[0])


def test_bounds_bracket_local_volatility():
    """128.8 bp in Dupire's model, in daily implicit steps; where variances are nearly Dupire's, so is the price."""
    laws, exercise = phase0_bermudan(*range(T1, T2 + 1), num_nodes=81)
    first, last = exercise.values()
    joint = implicit_dupire(laws)
    np.testing.assert_allclose(joint.sum(0), laws.masses[-1], atol=1e-12)
    assert bermudan_price(joint, first, last) == pytest.approx(128.8 * BP, abs=0.1 * BP)
    laws, exercise = phase0_bermudan(T1, 36, T2, num_nodes=17)
    dupire = bermudan_price(implicit_dupire(laws), *exercise.values())
    free, low, high, both, near = (
        least_bermudan(laws, exercise, ratio)
        for ratio in ((0.0, np.inf), (0.5, np.inf), (0.0, 2.0), (0.5, 2.0), (0.99, 1.01))
    )
    assert free + BP < min(low, high)
    assert max(low, high) + BP < both
    assert both + BP < near < dupire
    assert near == pytest.approx(dupire, abs=0.5 * BP)
    assert dupire < greatest_bermudan(laws, exercise) - BP


def test_bounds_bracket_black_scholes():
    """Bermudan put in a market without a smile; its price is an integral over S_t1."""
    volatility = 0.2
    t1, t2 = 0.1, 0.25
    flat = smiles.SSVI(volatility**2, 0.0, 0.0, 0.3, 0.0)
    laws = surface_marginals(flat, [t1, t2], num_nodes=31)
    first = np.maximum(1.02 - laws.nodes, 0)
    last = np.maximum(1.0 - laws.nodes, 0)
    z = np.linspace(-8.0, 8.0, 4001)
    spot = smiles.double(np.exp(volatility * np.sqrt(t1) * z - 0.5 * volatility**2 * t1))
    waiting = black_scholes.price(spot, 1.0, t2 - t1, volatility, is_call=False)
    worth = np.maximum(np.maximum(1.02 - spot.numpy(), 0), waiting.numpy())
    price = (worth * np.exp(-0.5 * z**2)).sum() * (z[1] - z[0]) / np.sqrt(2.0 * np.pi)
    exercise = {0: first, 1: last}
    europeans = laws.masses[0] @ first, laws.masses[1] @ last
    assert max(europeans) <= least_bermudan(laws, exercise) + 1e-7 < price - 1e-4
    assert price + 1e-4 < greatest_bermudan(laws, exercise)
