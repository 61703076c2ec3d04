"""Runs a phase's script as a user would, for the benchmarks that need many runs of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from envs.run.errors import DivergenceError, UsageError  # noqa: E402


def run_phase(script: str, flags: list[str], label: str) -> Path:
    """Runs `script` of the project's root with these flags and one thread, and says how it ended; its run folder.

    Raises:
        UsageError, DivergenceError: the script's own error, after `label`.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / script), *flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1].removeprefix("error: ")
        kind = UsageError if done.returncode == 2 else DivergenceError
        raise kind(f"{label}: {reason}")
    if ":" not in done.stdout:  # an exit code of 1 can also be Python's own, before the script begins
        raise DivergenceError(f"{label}: {(done.stderr.strip().splitlines() or ['it printed nothing'])[-1]}")
    folder = Path(done.stdout.split(":", 1)[0])
    print(f"{label}: {folder}, {'passed' if done.returncode == 0 else 'failed'}", flush=True)
    return folder


def read_benchmark(folder: Path) -> dict:
    """The benchmark.json of a run."""
    return json.loads((folder / "benchmark.json").read_text(encoding="utf-8"))
