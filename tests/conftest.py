"""Shared fixtures. The scripts are run as users run them: as processes, in a folder of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from envs import HedgingEnv, dynamics, hedging

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)

# Fitted to the S&P 500 of 1999–2018 (test_dynamics checks the fit); written out so that most tests need no fit.
SP500_GARCH = dynamics.GARCH(omega=2.0746e-6, alpha=0.0, gamma=0.182566, beta=0.892038)
MODELS = {
    "gbm": dynamics.GBM(),
    "garch": SP500_GARCH,
    "heston": dynamics.Heston(),
    "heston without Feller": dynamics.Heston(initial_variance=0.02, mean_reversion=1.0, vol_of_vol=0.9),
    "merton": dynamics.Merton(),
}


def book_env(num_envs: int, model=None, **settings) -> HedgingEnv:
    """A book as phase 2 has it: ten options, two expiries, client orders."""
    options = hedging.option_grid([90, 95, 100, 105, 110], [15, 30])
    orders = {"arrival_rate": 0.1, "mean_order_size": 2.0, "client_spread": 0.05}
    return HedgingEnv(num_envs, model, **{"options": options, "initial_position": 0.0, **orders, **settings})


@pytest.fixture
def script(tmp_path):
    """Runs a phase script in `tmp_path`: script("phase1_….py", *flags) → CompletedProcess with text output."""

    def run(name, *flags, env=None, root=ROOT, timeout=240):
        command = [sys.executable, str(root / name), *map(str, flags)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", **(env or {})}
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=timeout, check=False
        )

    return run
