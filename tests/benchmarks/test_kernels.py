"""Operators of an iteration, counted."""

import sys
from pathlib import Path

import pytest
import torch

import phase1_delta_hedge_ppo as phase1
from envs.run.errors import UsageError

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import kernels  # noqa: E402


def test_operators_do_not_depend_on_the_number_of_environments(monkeypatch):
    monkeypatch.setattr("envs.market.env.ROWS_AHEAD", 0)
    monkeypatch.setattr("envs.networks.BLOCK", 2**62)
    counts = [kernels.operators(phase1, kernels.Args(num_envs)) for num_envs in (8, 64)]
    assert [steps for _, steps in counts] == [8 * 30, 64 * 30]
    assert counts[0][0] == counts[1][0] > 1000


def test_views_are_not_counted():
    x = torch.zeros(4)
    with kernels.Counter() as counter:
        (x.view(2, 2)[0] + 1.0).exp()
    assert counter.count == 2


def test_bad_flags():
    with pytest.raises(UsageError, match="--num-envs is 1 "):
        kernels.main(["--num-envs", "1"])
