"""Exact bounds of an exotic's price over all models that reprice the vanillas: martingale optimal transport.

The calls of a maturity determine the law of the spot on that date (Breeden & Litzenberger 1978). A model is a
martingale with these laws, and they leave its joint law free. The least and the greatest price of an exotic over all
models are linear programmes in the joint law (Beiglböck, Henry-Labordère & Penkner 2013), solved here on a grid of
spots by SciPy's HiGHS.

On the grid a law is its call prices C_d(x_k), convex in x_k. Two laws allow a martingale from one to the other if and
only if no call is cheaper on the later date (Strassen 1965). The calendar spread s_k = C_{d+1}(x_k) − C_d(x_k) ≥ 0 is
then the number of butterflies around x_k that the later law has more. A model that remembers the path splits its law
into *classes*. Each class is a martingale with spreads ≥ 0 of its own, and the classes' spreads add up to the market's.

- `payoff_bounds` has a class for each path of nodes on the dates that the payoff depends on.
- `least_bermudan`, the min over models of the max over exercise rules, has the same classes. The price is least where
  the holder knows no more than the path, and there the Snell envelope is the least solution of linear inequalities.
- `greatest_bermudan`, the max over both, has two classes, exercised and alive. The holder may know more than the path:
  of paths through the same nodes some are exercised and others not. Only with such models is the greatest price what a
  superhedge costs (Hobson & Neuberger 2017; Bayraktar & Zhou 2017; Aksamit, Deng, Obłój & Tan 2019).

Both are prices in some model. The least price is not what a buyer can secure by hedging: he has the max over exercise
rules of the min over models, which can be less (Bayraktar, Huang & Zhou 2015).

Prices and spots are in one currency; rates and dividends are zero. N nodes, D dates.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
from scipy.optimize import isotonic_regression, linprog

from envs.market.smiles import Surface

RANGE = (-12.0, 8.0)  # of the nodes, in standard deviations of the last date from the money
SCALE = 1e4  # of probabilities in a programme, as HiGHS's tolerance is absolute (1e-7)


# MARGINALS


class Marginals(NamedTuple):
    """Laws of the spot on successive dates, on one grid and exactly in convex order.

    Attributes:
        nodes: (N,) spots, increasing.
        calls: (D, N) prices of the calls struck at the nodes: convex, 0 at the last node, no less on a later date.
        repair: the largest change of a given price that this took, currency.
    """

    nodes: np.ndarray
    calls: np.ndarray
    repair: float

    @property
    def masses(self) -> np.ndarray:
        """(D, N) probabilities of the nodes: the differences of the calls' slopes, ≥ 0 but for rounding."""
        slopes = np.diff(self.calls) / np.diff(self.nodes)
        return np.maximum(np.diff(slopes, prepend=-1.0, append=0.0), 0.0)

    @property
    def spreads(self) -> np.ndarray:
        """(D − 1, N − 2) prices of the calendar spreads between a date and the next, at the inner nodes."""
        return np.diff(self.calls, axis=0)[:, 1:-1]


def marginals(nodes: np.ndarray, calls: np.ndarray) -> Marginals:
    """The laws on the nodes with these call prices, which are changed where they admit arbitrage.

    Butterflies: each date takes the greatest convex function below its prices. Calendar spreads: each call takes the
    highest price so far, which is convex again. Between two nodes the law on the grid has its mass at both, with the
    same mean.

    Args:
        nodes: (N,) strikes, increasing. The first must be so low that its call has no time value, the last so high that
            its call is worth nothing; they are given these prices.
        calls: (D, N) prices. The spot is nodes[0] + calls[0, 0].

    Raises:
        ValueError: nodes that do not increase, or a shape that does not match.
    """
    nodes = np.asarray(nodes, dtype=float)
    calls = np.asarray(calls, dtype=float)
    if nodes.ndim != 1 or len(nodes) < 3 or np.any(np.diff(nodes) <= 0):
        raise ValueError("nodes must be three spots or more, increasing")
    if calls.ndim != 2 or calls.shape[1] != len(nodes):
        raise ValueError(f"calls have the shape {calls.shape} (dates, {len(nodes)} nodes)")
    spot = nodes[0] + calls[0, 0]
    forward = np.maximum(spot - nodes, 0.0)
    repaired = np.maximum(calls, forward)
    repaired[:, [0, -1]] = forward[[0, -1]]
    width = np.diff(nodes)
    for row in repaired:  # isotonic slopes are those of the greatest convex minorant (Barlow et al. 1972, section 1.2)
        row[1:] = row[0] + np.cumsum(width * isotonic_regression(np.diff(row) / width, weights=width).x)
    repaired[:, -1] = 0.0  # to rounding
    repaired = np.maximum.accumulate(repaired)
    return Marginals(nodes, repaired, float(np.abs(repaired - calls).max()))


def surface_marginals(
    surface: Surface, maturities: Sequence[float], strikes: Sequence[float] = (), num_nodes: int = 81
) -> Marginals:
    """The laws of a surface's spot, which is 1 today, at maturities (years, increasing).

    The nodes are 0 and, in log-spots, a sinh grid over `RANGE`, dense at the money. The nodes nearest to the spot and
    the strikes are moved there, so that Europeans with these strikes keep the market's price.

    Raises:
        ValueError: maturities that are not positive and increasing, or strikes too close to each other for the grid.
    """
    if min(maturities) <= 0 or any(a >= b for a, b in pairwise(maturities)):
        raise ValueError(f"maturities are {maturities} (> 0, increasing)")
    deviation = float(surface(0.0, maturities[-1]).w.sqrt())
    log_nodes = deviation * np.sinh(np.linspace(*np.arcsinh(RANGE), num_nodes - 1))
    for strike in {1.0, *strikes}:
        log_nodes[np.abs(log_nodes - np.log(strike)).argmin()] = np.log(strike)
    if not np.isin(np.log([1.0, *strikes]), log_nodes).all():
        raise ValueError(f"strikes are {list(strikes)}: two of them or the spot share a node of {num_nodes}")
    calls = [surface.call_price(log_nodes, t).numpy() for t in maturities]
    return marginals(np.concatenate(([0.0], np.exp(log_nodes))), np.insert(calls, 0, 1.0, axis=1))


# BOUNDS


class Bounds(NamedTuple):
    """The least and the greatest price over all models, currency."""

    least: float
    greatest: float


def payoff_bounds(laws: Marginals, payoff: np.ndarray, fixings: Sequence[int]) -> Bounds:
    """Bounds of an option that pays a function of the spots on some dates and gives no choice to its holder.

    Dates before the first fixing do not matter; dates between fixings can narrow the bounds. Each date after a fixing
    adds about 2 N^(number of fixings so far + 1) variables.

    Args:
        payoff: (N, …, N), an axis for each fixing: its value at the nodes, currency. With x = laws.nodes, a
            forward-start call is np.maximum(x[None, :] − x[:, None], 0).
        fixings: indices of dates, increasing.

    Raises:
        ValueError: a payoff of another shape, or dates that are not there.
        RuntimeError: HiGHS found no solution.

    References: Beiglböck, Henry-Labordère & Penkner (2013), *Model-independent bounds for option prices: a mass
    transport approach*; Hobson & Klimmek (2015) and Hobson & Neuberger (2012) for the forward-start straddle.
    """
    if np.shape(payoff) != (len(laws.nodes),) * len(fixings):
        raise ValueError(f"the payoff has the shape {np.shape(payoff)} ({len(laws.nodes)} nodes, each of the fixings)")
    program = _Program()
    joint = _add_joint_law(program, laws, fixings)
    cost = np.ravel(payoff)
    return Bounds(program.minimise({joint[-1]: cost}), -program.minimise({joint[-1]: -cost}))


def least_bermudan(
    laws: Marginals, exercise: Mapping[int, np.ndarray], variance_ratio: tuple[float, float] = (0.0, np.inf)
) -> float:
    """The least price of a Bermudan over all models in which its holder exercises best, currency.

    A model attains it, so this is the infimum and not a bound below it. The programme grows as N^(number of exercise
    dates), so three dates take a coarse grid.

    Args:
        exercise: index of a date → (N,) what exercise pays there at each node, currency, ≥ 0. A Bermudan call is
            {date: np.maximum(laws.nodes − strike, 0), …}.
        variance_ratio: bounds of m²/E[m²|S] in models whose volatility is σ_loc(t, S) m/√E[m²|S]; by default none.
            From date to date the models make implicit steps (Andreasen & Huge 2011), so dates must be close to each
            other. Bounds close to 1 leave little but Dupire's local volatility.

    Raises:
        ValueError: a payoff of another shape or below 0, dates that are not there, bounds that exclude 1.
        RuntimeError: HiGHS found no solution.
    """
    dates, payoffs = _exercises(laws, exercise)
    low, high = variance_ratio
    if not 0.0 <= low < 1.0 < high:
        raise ValueError(f"variance_ratio is {variance_ratio} (0 ≤ low < 1 < high)")
    num_nodes = len(laws.nodes)
    program = _Program()
    joint = _add_joint_law(program, laws, dates, variance_ratio)
    # V_k, the Snell envelope times the probability of the path of nodes, is the least one above exercise and above what
    # the next date's adds up to; `following` gives the latter, a row for each path
    following = {joint[-1]: sp.kron(sp.eye_array(num_nodes ** (len(dates) - 1)), payoffs[-1][None])}
    for k in reversed(range(len(dates) - 1)):
        earlier = sp.eye_array(num_nodes**k)
        value = program.variables(num_nodes ** (k + 1))
        below = {value: -sp.eye_array(num_nodes ** (k + 1))}
        program.at_most(below | {joint[k]: sp.kron(earlier, sp.diags_array(payoffs[k]))}, 0.0)
        program.at_most(below | following, 0.0)
        following = {value: sp.kron(earlier, np.ones((1, num_nodes)))}
    return program.minimise({block: row.toarray()[0] for block, row in following.items()})


def greatest_bermudan(laws: Marginals, exercise: Mapping[int, np.ndarray]) -> float:
    """The greatest price of a Bermudan over all models and exercise rules, currency.

    The class that is alive has between none and all of the market's mass at each node, and of each calendar spread; the
    class that was exercised has the rest. So the programme has 3 N variables a date, however many exercise dates.

    Args:
        exercise: see `least_bermudan`.

    Raises:
        ValueError, RuntimeError: see `least_bermudan`.

    References: Hobson & Neuberger (2017), *On the value of being American*; Aksamit, Deng, Obłój & Tan (2019), *The
    robust pricing–hedging duality for American options in discrete time financial markets*.
    """
    dates, payoffs = _exercises(laws, exercise)
    payoff = dict(zip(dates, payoffs, strict=True))
    each = sp.eye_array(len(laws.nodes))
    butterflies = _butterflies(laws.nodes)
    program = _Program()
    cost = {}
    alive = None
    for date in range(dates[0], dates[-1] + 1):
        mass = laws.masses[date]
        before = alive
        alive = program.variables(len(mass), mass)
        left = {alive: each}
        if date in payoff:
            exercised = program.variables(len(mass), mass)
            left[exercised] = each
            cost[exercised] = -payoff[date]
        if before is None:
            program.equal(left, mass)
        else:
            spread = laws.spreads[date - 1]
            moved = program.variables(len(spread), spread)
            program.equal(left | {before: -each, moved: -butterflies}, 0.0)
    return -program.minimise(cost)


def _exercises(laws: Marginals, exercise: Mapping[int, np.ndarray]) -> tuple[list[int], list[np.ndarray]]:
    """The exercise dates, increasing, and the payoff of each, checked."""
    dates = sorted(exercise)
    payoffs = [np.asarray(exercise[date], dtype=float) for date in dates]
    for payoff in payoffs:
        if payoff.shape != laws.nodes.shape or payoff.min() < 0:
            raise ValueError(f"exercise must pay 0 or more at each of the {len(laws.nodes)} nodes")
    _check_dates(laws, dates)
    return dates, payoffs


def _check_dates(laws: Marginals, dates: Sequence[int]) -> None:
    increasing = all(a < b for a, b in pairwise(dates))
    if not dates or not increasing or dates[0] < 0 or dates[-1] >= len(laws.calls):
        raise ValueError(f"dates are {list(dates)} (increasing, each from 0 to {len(laws.calls) - 1})")


# THE PROGRAMME


def _butterflies(nodes: np.ndarray) -> sp.csr_array:
    """(N, N − 2): what a spread of one at an inner node adds to the masses, at the node and its neighbours.

    It keeps mass and mean, and adds one to the call struck at that node alone.
    """
    inverse = 1.0 / np.diff(nodes)
    diagonals = [inverse[:-1], -(inverse[:-1] + inverse[1:]), inverse[1:]]
    return sp.diags_array(diagonals, offsets=[0, -1, -2], shape=(len(nodes), len(nodes) - 2)).tocsr()


class _Program:
    """A linear programme in blocks of variables ≥ 0, each known by its index.

    Rows are added in sets: Σ_blocks matrix @ block is equal to, or at most, the right side.
    """

    def __init__(self):
        self._high = []  # upper bounds of each block
        self._equal = []  # (terms, right side)
        self._at_most = []

    def variables(self, size: int, high: np.ndarray | float = np.inf) -> int:
        """A new block of variables, at most `high`."""
        self._high.append(np.broadcast_to(high, size))
        return len(self._high) - 1

    def equal(self, terms: Mapping[int, sp.sparray], right: np.ndarray | float) -> None:
        """Adds rows: block → matrix (rows, size of the block), and the right side (rows,)."""
        self._equal.append((terms, right))

    def at_most(self, terms: Mapping[int, sp.sparray], right: np.ndarray | float) -> None:
        """Adds rows, see `equal`."""
        self._at_most.append((terms, right))

    def minimise(self, cost: Mapping[int, np.ndarray]) -> float:
        """The least Σ_blocks cost · block; blocks that are not named cost nothing."""
        costs = [cost.get(block, np.zeros(len(high))) for block, high in enumerate(self._high)]
        high = SCALE * np.concatenate(self._high)
        equalities, right = self._stack(self._equal)
        limits, limit = self._stack(self._at_most)
        bounds = np.stack((np.zeros_like(high), high), -1)
        for method in ("highs-ipm", "highs-ds"):  # the interior point is faster on most, and stalls on some
            found = linprog(np.concatenate(costs), limits, limit, equalities, right, bounds, method)
            if found.status == 0:
                return found.fun / SCALE
        raise RuntimeError(f"HiGHS: {found.message}")

    def _stack(self, rows: Sequence) -> tuple[sp.csc_array, np.ndarray] | tuple[None, None]:
        """The matrix of all rows, and the right side."""
        if not rows:
            return None, None
        matrices = []
        right_sides = []
        for terms, right in rows:
            num_rows = next(iter(terms.values())).shape[0]
            empty = [sp.csc_array((num_rows, len(high))) for high in self._high]
            matrices.append(sp.hstack([terms.get(block, zero) for block, zero in enumerate(empty)]))
            right_sides.append(np.broadcast_to(right, num_rows))
        return sp.vstack(matrices, format="csc"), SCALE * np.concatenate(right_sides)


def _add_joint_law(
    program: _Program, laws: Marginals, fixings: Sequence[int], ratio: tuple[float, float] = (0.0, np.inf)
) -> list[int]:
    """Adds the law of a martingale with these marginals, from the first fixing to the last.

    A class is a path of nodes on the fixings so far. On the first date after a fixing it starts from one node.

    Args:
        ratio: bounds of a class's spread at a node, over the share that it would have in proportion to its mass there.

    Returns:
        For each fixing k = 0, 1, … a block (N^(k + 1),): the probability of each path of nodes on the fixings so far.
    """
    _check_dates(laws, fixings)
    num_nodes = len(laws.nodes)
    each = sp.eye_array(num_nodes)
    inner = each.tocsr()[1:-1]
    butterflies = _butterflies(laws.nodes)
    at_itself = sp.csr_array((np.ones(num_nodes), (np.arange(num_nodes) * (num_nodes + 1), np.arange(num_nodes))))
    law = program.variables(num_nodes)  # of every class, (classes · N,)
    program.equal({law: each}, laws.masses[fixings[0]])
    joint = [law]
    classes = 1
    for date in range(fixings[0] + 1, fixings[-1] + 1):
        start = sp.eye_array(classes * num_nodes)
        if date - 1 in fixings:
            start = sp.kron(sp.eye_array(classes), at_itself)
            classes *= num_nodes
        each_class = sp.eye_array(classes)
        spread = laws.spreads[date - 1]
        before = law
        law = program.variables(classes * num_nodes)
        moved = program.variables(classes * len(spread))
        stays = sp.kron(each_class, each)
        program.equal({law: stays, before: -start, moved: -sp.kron(each_class, butterflies)}, 0.0)
        program.equal({moved: sp.kron(np.ones((1, classes)), sp.eye_array(len(spread)))}, spread)
        low, high = ratio
        mass = laws.masses[date][1:-1]
        rate = np.divide(spread, mass, out=np.zeros_like(spread), where=mass > 0)
        share = sp.kron(each_class, sp.diags_array(rate) @ inner)
        own = sp.eye_array(classes * len(spread))
        if high < np.inf:
            program.at_most({moved: own, law: -high * share}, 0.0)
        if low > 0.0:
            program.at_most({moved: -own, law: low * share}, 0.0)
        if date in fixings:
            joint.append(law)
    return joint
