"""How results spread over training seeds (Agarwal, Schwarzer, Castro, Courville & Bellemare 2021).

The interval of a benchmark is over its episodes: how well one trained agent is known. Another seed trains another
agent, and by how much it differs only several runs can say.
"""

from collections.abc import Callable

import numpy as np
from scipy.stats import trim_mean

from envs.benchmark.report import Estimate

RESAMPLES = 10_000


def interquartile_mean(values: np.ndarray, axis: int = -1) -> np.ndarray:
    """Mean of the middle half of the values along an axis: a quarter of them, rounded down, is left out at each end."""
    return trim_mean(values, 0.25, axis)


def probability_of_improvement(advantages: np.ndarray, axis: int = -1) -> np.ndarray:
    """Share of the runs whose advantage is above zero; one of exactly zero counts half."""
    return (0.5 * (np.sign(advantages) + 1.0)).mean(axis)


def over_seeds(values: np.ndarray, statistic: Callable = interquartile_mean, seed: int = 0) -> Estimate:
    """A statistic of one value a training seed (n,), with its percentile bootstrap over the seeds, 95 %.

    Agarwal et al. resample the runs of each task apart ("stratified"); here a task has a table of its own.

    Raises:
        ValueError: fewer than three values, of which no interval can be made.
    """
    values = np.asarray(values, dtype=np.float64)
    if len(values) < 3:
        raise ValueError(f"{len(values)} training seeds are too few for an interval (at least 3)")
    drawn = np.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))
    resampled = statistic(values[drawn])
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Estimate(float(statistic(values)), float(resampled.std(ddof=1)), float(low), float(high))
