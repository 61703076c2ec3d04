"""Shared fixtures. What is not a fixture is in common.py."""

import os

os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")  # else the last bits of a product depend on where its memory lies

import subprocess
import sys
from functools import partial

import pytest
import torch
from common import PHASES, ROOT, Phase, untuned
from PIL import Image

from envs.benchmark import league, makers, quoting
from envs.figures import style

torch.set_num_threads(1)


@pytest.fixture(params=PHASES)
def phase(request) -> Phase:
    return PHASES[request.param]


@pytest.fixture
def main(phase, tmp_path, monkeypatch):
    """Calls the phase's main in `tmp_path`, in this process: main(*flags) → whether the benchmark passed."""
    monkeypatch.chdir(tmp_path)
    return lambda *flags: phase.module.main([str(flag) for flag in flags])


@pytest.fixture
def light(monkeypatch):
    """In phases 3 and 4 nobody tunes the classical makers, and beside the benchmark few episodes are played."""
    monkeypatch.setattr(makers, "classical_makers", untuned)
    monkeypatch.setattr(quoting, "rival_sweep", partial(quoting.rival_sweep, episodes=128))
    monkeypatch.setattr(league, "competition", partial(league.competition, episodes=256))
    for name in ("phase3", "phase4"):
        monkeypatch.setattr(PHASES[name].module, "classical_makers", untuned)
        monkeypatch.setattr(PHASES[name].module, "EPISODES", 256)


@pytest.fixture
def quick(monkeypatch, light):
    """Makes short runs shorter: beside that, figures are made but not rendered (`test_smoke` renders them)."""
    monkeypatch.setattr(style, "save", lambda figure, path: Image.new("L", (1, 1)).save(path))
    monkeypatch.setattr("matplotlib.figure.Figure.tight_layout", lambda self: None)


@pytest.fixture
def script(tmp_path):
    """Runs a script in `tmp_path` as users do, as a process: script("phase1_….py", *flags) → CompletedProcess."""

    def run(name, *flags, env=None, root=ROOT, timeout=240):
        command = [sys.executable, str(root / name), *map(str, flags)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", **(env or {})}
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=timeout, check=False
        )

    return run
