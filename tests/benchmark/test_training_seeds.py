"""How results spread over training seeds."""

import numpy as np
import pytest

from envs.benchmark.training_seeds import interquartile_mean, over_seeds, probability_of_improvement


def test_the_interquartile_mean_leaves_out_a_quarter_at_each_end():
    assert interquartile_mean(np.array([1000.0, 1, 2, 3, 4, 5, 6, -1000])) == 3.5
    assert interquartile_mean(np.array([5.0, 1.0, 3.0])) == 3.0  # a quarter of three is none: the mean
    assert interquartile_mean(np.arange(8.0).reshape(2, 4)).tolist() == [1.5, 5.5]


def test_probability_of_improvement_counts_half_of_a_tie():
    assert probability_of_improvement(np.array([0.2, -0.1, 0.0, 0.4])) == 0.625


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """The bootstrap's intervals are somewhat short at ten seeds; they must not be far off, nor depend on luck."""
    generator = np.random.default_rng(1)
    samples = generator.normal(2.0, 0.5, (200, 10))
    intervals = [over_seeds(sample) for sample in samples]
    covered = np.mean([interval.low <= 2.0 <= interval.high for interval in intervals])
    assert 0.84 <= covered <= 0.98
    assert over_seeds(samples[0]) == intervals[0]


def test_an_interval_is_around_its_statistic_and_needs_three_seeds():
    ahead = over_seeds(np.full(10, 0.3), probability_of_improvement)
    assert (ahead.mean, ahead.low, ahead.high) == (1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="2 training seeds are too few"):
        over_seeds(np.array([1.0, 2.0]))
