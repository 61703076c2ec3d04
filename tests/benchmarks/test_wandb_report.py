"""A W&B report, assembled without a server."""

import json
import sys
from pathlib import Path

import pytest

from envs.run.errors import UsageError

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests" / "benchmarks")]

import wandb_report  # noqa: E402
from test_report import make_run  # noqa: E402


@pytest.fixture
def runs(tmp_path, monkeypatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_API_KEY", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # where nobody is logged in
    for seed in (1, 2):
        (make_run(tmp_path / "runs" / f"seed_{seed}", seed) / "pnl.png").touch()
    return ["seed_1", "seed_2"]


needs_library = pytest.mark.skipif(
    wandb_report.wr is None, reason="needs W&B's library for reports: pip install wandb-workspaces==0.4.13"
)


@needs_library
def test_what_would_be_uploaded(runs, tmp_path):
    assert wandb_report.main([*runs, "--dry-run", "--title", "two seeds"])
    content = json.loads((tmp_path / "runs" / "wandb_report" / "wandb_report.json").read_text())
    grids = [block for block in content["blocks"] if block["type"] == "panel-grid"]
    assert len(grids) == 3  # curves, figures, flags
    for grid in grids:
        (chosen,) = grid["metadata"]["runSets"]
        assert json.dumps(chosen["filters"]).count("seed_") == 2
        assert "displayName" in json.dumps(chosen["filters"])
    text = json.dumps(content)
    for words in ("charts/gain", "global_step", "benchmark/pnl", "BENCHMARK PASSED", "BENCHMARK FAILED: beats rival"):
        assert words in text


@needs_library
def test_without_an_account(runs, tmp_path):
    with pytest.raises(UsageError, match=r"W&B refuses: .*--dry-run needs no account"):
        wandb_report.main(runs)
    assert not (tmp_path / "runs" / "wandb_report").exists()


def test_without_the_library(runs, monkeypatch):
    monkeypatch.setattr(wandb_report, "wr", None)
    with pytest.raises(UsageError, match="pip install wandb-workspaces"):
        wandb_report.main(runs)


@needs_library
def test_a_run_that_is_not_here(runs):
    with pytest.raises(UsageError, match="runs/absent: not a run folder"):
        wandb_report.main(["absent", "--dry-run"])
