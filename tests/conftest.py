"""Shared fixtures. The scripts are run as users run them: as processes, in a folder of their own."""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from PIL import Image

import phase1_delta_hedge_ppo as phase1
import phase2_multi_order_sac as phase2
import phase3_spread_vs_bs as phase3
import phase4_selfplay as phase4
from envs import HedgingEnv, dynamics, figures, hedging, makers

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


HEDGERS = {"agent", "Black–Scholes delta", "Leland", "Whalley–Wilmott, tuned", "constant band, tuned"}
MAKERS = {
    "agent",
    "Avellaneda–Stoikov, tuned",
    "constant spread, tuned",
    "GLFT, tuned",
    "GLFT, min-variance band, tuned",
}


TUNED, TUNE = {}, makers.classical_makers


def remembered(market, *multiples) -> makers.Makers:
    """`makers.classical_makers`, but each market is tuned for once."""
    key = (makers.describe(market), market.num_envs, multiples)
    if key not in TUNED:
        TUNED[key] = TUNE(market, *multiples)
    return makers.assemble(market, TUNED[key].parameters, TUNED[key].origin)


class Phase(NamedTuple):
    """A phase and the smallest run of it: 12 iterations of `num_envs` episodes of `num_steps`, 4 evaluations."""

    module: ModuleType
    num_envs: int
    small: dict  # flags beside it
    figures: tuple[str, ...]
    named: set[str] = HEDGERS  # contestants that are always in the table
    num_steps: int = 30

    @property
    def script(self) -> str:
        return f"{self.module.__name__}.py"

    def _settings(self, iterations: int, changes: dict) -> dict:
        fields = {"num_envs": self.num_envs, "num_steps": self.num_steps, "num_evaluations": 4, "eval_episodes": 512}
        return {**fields, "total_timesteps": self.num_envs * self.num_steps * iterations, **self.small, **changes}

    def flags(self, iterations: int = 12, **changes) -> list[str]:
        """Command-line flags of the smallest run."""
        fields = self._settings(iterations, changes)
        return [text for name, value in fields.items() for text in (f"--{name.replace('_', '-')}", str(value))]

    def args(self, iterations: int = 12, **changes):
        """The same as the phase's Args."""
        return self.module.Args(**self._settings(iterations, changes))

    def train(self, args, folder: Path, device: str = "cpu"):
        """Trains in gbm, phases 3 and 4 in their default heston: (agent, steps)."""
        market, device = dynamics.GBM(), torch.device(device)
        if self.module in (phase3, phase4):
            model = self.module.make_dynamics(args)
            market = remembered(self.module.make_market(args, model, args.tuning_episodes, device))
        return self.module.train(args, market, folder, device, None, None)[:2]


SAC_SMALL = {
    "learning_starts": 3_000,
    "buffer_size": 6_000,
    "batch_size": 64,
    "hidden_size": 32,
    "utd": 0.01,
    "average": 0.05,
}
QUOTING_FIGURES = ("learning_curve.png", "learnt_quotes.png", "episode.png", "pnl.png")
SELFPLAY_FILES = (
    "cross_play.png", "cross_play.json", "edge_over_training.png", "selfplay_episode.png", "market_shares.png",
)  # fmt: skip
PHASES = {
    "phase1": Phase(phase1, 64, {}, ("learning_curve.png", "no_trade_bands.png", "pnl.png")),
    "phase2": Phase(phase2, 32, SAC_SMALL, ("learning_curve.png", "no_trade_bands.png", "pnl.png", "book_episode.png")),
    "phase3": Phase(
        phase3,
        64,
        {"tuning_episodes": 64},
        (*QUOTING_FIGURES, "rival_sweep.png", "rival_sweep.json"),
        MAKERS,
        num_steps=6,
    ),
    "phase4": Phase(
        phase4,
        64,
        {"tuning_episodes": 64, "num_minibatches": 2},
        (*QUOTING_FIGURES, *SELFPLAY_FILES),
        MAKERS,
        num_steps=6,
    ),
}


@pytest.fixture(params=PHASES)
def phase(request) -> Phase:
    return PHASES[request.param]


@pytest.fixture
def quick(monkeypatch):
    """Makes short runs shorter: figures are made but not rendered (`test_smoke` renders them), and the makers tuned for
    a market are remembered."""
    monkeypatch.setattr(figures, "_save", lambda figure, path: Image.new("L", (1, 1)).save(path))
    monkeypatch.setattr("matplotlib.figure.Figure.tight_layout", lambda self: None)
    monkeypatch.setattr(makers, "classical_makers", remembered)


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
