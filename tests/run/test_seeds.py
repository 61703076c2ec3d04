import re
from itertools import pairwise

import pytest

from envs.run import seeds
from envs.run.args import RunArgs
from envs.run.errors import UsageError
from envs.run.ranks import rank_seed

SEEDS = {name: value for name, value in vars(seeds).items() if name.endswith("_SEED")}
FURTHEST = 999_999  # --seed, or the number of a batch of episodes


def test_no_two_streams_meet():
    """A stream begins at its seed, and is drawn upwards from there; `--seed` is added to some."""
    assert len(SEEDS) >= 9
    first = sorted([0, *SEEDS.values()])
    assert all(after - before > FURTHEST for before, after in pairwise(first))
    assert min(SEEDS.values()) >= 1_000_000
    assert (
        max(SEEDS.values()) + 2 * FURTHEST < rank_seed(0) + 100_000_000
    )  # where the second process of torchrun begins


def test_seeds_that_the_command_line_takes():
    for seed in (0, FURTHEST):
        RunArgs(seed=seed).check()
    for seed in (-1, FURTHEST + 1):
        with pytest.raises(UsageError, match=re.escape(f"--seed is {seed} (at least 0, at most 999999)")):
            RunArgs(seed=seed).check()
