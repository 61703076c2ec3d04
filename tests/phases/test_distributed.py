"""Data-parallel training, as torchrun starts it, on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from common import PHASES, ROOT

from envs.run import files
from envs.run.args import parse_command
from envs.run.errors import UsageError


def torchrun(folder: Path, *arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240, check=False
    )


def test_ranks_hold_the_same_parameters_and_simulate_their_own_markets(tmp_path):
    result = torchrun(tmp_path, str(ROOT / "tests" / "phases" / "ranks.py"), "train")
    assert result.returncode == 0, result.stderr[-3000:]
    for phase in ("phase0", "phase1", "phase4"):
        small = PHASES[phase]
        own_steps = 51 * 2 * 200 if phase == "phase0" else small.num_envs * small.num_steps
        ends = [torch.load(tmp_path / phase / f"rank{i}.pt", weights_only=True) for i in (0, 1)]
        for name, value in ends[0].items():
            assert torch.equal(value, ends[1][name]), (phase, name)
        saved = files.load_checkpoint(tmp_path / phase / "checkpoint.pt", phase)
        assert saved["world_size"] == 2
        for stream in ("generator",) if phase == "phase0" else ("generator", "market_generator"):
            assert len(saved[stream]) == 2
            assert not torch.equal(*saved[stream]), (phase, stream)
        rows = files.read_metrics(tmp_path / phase / "metrics.csv")
        assert rows[-1]["global_step"] == 2 * own_steps * saved["iteration"]  # of all ranks together, written by one


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_run_with_a_message_and_a_checkpoint(tmp_path):
    result = torchrun(tmp_path, str(ROOT / "tests" / "phases" / "ranks.py"), "die")
    assert result.returncode != 0
    (line,) = [line.split("error: ")[1] for line in result.stderr.splitlines() if "error: " in line]
    (folder,) = tmp_path.glob("runs/*")
    assert "torchrun" in line
    assert "died" in line
    assert f"last good: runs/{folder.name}/checkpoint.pt" in line
    assert files.load_checkpoint(folder, "phase1")["iteration"] == 2
    with pytest.raises(UsageError, match="was trained by 2 processes, not 1"):
        parse_command(PHASES["phase1"].module.Args, ["--resume", str(folder)], "phase1")
