"""Every phase as a user runs it: short runs of the real scripts, and what a researcher relies on."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import wandb
from conftest import ROOT

from envs import runs


def run_folder(tmp_path, pattern="*") -> Path:
    folders = sorted((tmp_path / "runs").glob(pattern), key=lambda path: path.stat().st_mtime)
    return folders[-1]


@pytest.fixture
def main(phase, tmp_path, monkeypatch):
    """Calls the phase's main in `tmp_path`, in this process: main(*flags) → whether the benchmark passed."""
    monkeypatch.chdir(tmp_path)
    return lambda *flags: phase.module.main([str(flag) for flag in flags])


# Every model in every phase, but for merton in 2 and 4, for garch where `test_evaluate_on_the_real_sp500` trains in
# it, and for marlvol, which has tests of its own
MODELS_OF = {
    "phase1": ("gbm", "garch", "heston", "merton"),
    "phase2": ("gbm", "heston"),
    "phase3": ("gbm", "heston", "merton"),
    "phase4": ("gbm", "heston"),
}


@pytest.mark.parametrize(
    ("phase", "name"), [(p, name) for p, names in MODELS_OF.items() for name in names], indirect=["phase"]
)
def test_smoke(main, tmp_path, phase, name, capsys):
    passed = main(*phase.flags(dynamics=name))
    verdict = "BENCHMARK PASSED" if passed else "BENCHMARK FAILED"
    assert verdict in capsys.readouterr().out
    folder = run_folder(tmp_path)
    files = {"args.json", "metrics.csv", "checkpoint.pt", "benchmark.json", "benchmark.md"}
    assert {path.name for path in folder.iterdir()} == files | set(phase.figures)
    content = json.loads((folder / "benchmark.json").read_text())
    assert content["passed"] == passed
    assert phase.named <= set(content["rows"])
    assert ("exact optimum" in content["rows"]) == (phase.module.PHASE == "phase1" and name in ("gbm", "garch"))
    rows = runs.read_metrics(folder / "metrics.csv")
    assert [row["global_step"] for row in rows] == [phase.num_envs * phase.num_steps * i for i in (0, 3, 6, 9, 12)]


def test_same_seed_same_numbers_and_killed_runs_resume_to_them(main, quick, tmp_path, phase, monkeypatch, capsys):
    flags = phase.flags(iterations=24, num_evaluations=8)
    first, second = tmp_path / "first", tmp_path / "second"
    folders = []
    for place in (first, second):
        place.mkdir()
        monkeypatch.chdir(place)
        command = [sys.executable, str(ROOT / phase.script), *flags]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if place == first:
            passed = main(*flags)
        else:
            process = subprocess.Popen(
                command, cwd=place, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            deadline = time.time() + 120
            while time.time() < deadline:  # kill it somewhere in the middle, whatever it is doing
                metrics = list(place.glob("runs/*/metrics.csv"))
                if metrics and len(metrics[0].read_text().splitlines()) > 4:
                    break
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
            process.wait()
            (folder,) = place.glob("runs/*")
            assert not (folder / "benchmark.json").exists()
            rows_then = len((folder / "metrics.csv").read_text().splitlines())
            assert rows_then < 10
            assert main("--resume", folder) == passed
        folders.append(next(place.glob("runs/*")))
    one, two = folders
    assert (one / "benchmark.json").read_bytes() == (two / "benchmark.json").read_bytes()
    states = [torch.load(folder / "checkpoint.pt", weights_only=True)["agent"] for folder in folders]
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
    curves = [runs.read_metrics(folder / "metrics.csv", raw=True) for folder in folders]
    for row in curves[0] + curves[1]:
        row.pop("charts/SPS")
    assert curves[0] == curves[1]
    assert len(curves[0]) == 9
    # resuming a finished run repeats its benchmark; another value of a flag would not be the same run
    with pytest.raises(runs.UsageError) as refusal:
        main("--resume", two, "--learning-rate", 0.1)
    had = phase.module.Args().learning_rate
    assert str(refusal.value) == f"--learning-rate is 0.1, but the run to resume has {had}"
    if phase.module.PHASE != "phase1":
        return  # what follows is the same code in all of them
    # a run that was killed before its first checkpoint starts again
    unborn = tmp_path / "unborn"
    unborn.mkdir()
    shutil.copy(one / "args.json", unborn)
    assert main("--resume", unborn) == passed
    assert (unborn / "benchmark.json").read_bytes() == (one / "benchmark.json").read_bytes()


def test_seeds_differ(tmp_path, phase):
    weights = []
    for seed in (0, 1):
        args = phase.args(iterations=6, seed=seed, num_evaluations=1, save_model=False)
        agent, _steps = phase.train(args, tmp_path)
        weights.append(torch.cat([p.flatten() for p in agent.parameters()]))
    assert not torch.equal(*weights)


def test_evaluate_on_other_markets(main, quick, tmp_path, phase):
    main(*phase.flags())
    trained = run_folder(tmp_path)
    before = {path.name: path.read_bytes() for path in trained.iterdir()}
    main("--evaluate", trained, "--dynamics", "heston", "--cost-rate", 2e-3)
    content = json.loads((run_folder(tmp_path, "*evaluate*") / "benchmark.json").read_text())
    assert content["settings"]["dynamics"] == "heston"
    assert content["settings"]["cost_rate"] == 2e-3
    assert {path.name: path.read_bytes() for path in trained.iterdir()} == before


def test_evaluate_on_the_real_sp500(main, quick, tmp_path, phase):
    main(*phase.flags(dynamics="garch", history_end="2010-12-31"))
    main("--evaluate", run_folder(tmp_path), "--dynamics", "historical")
    folder = run_folder(tmp_path, "*evaluate*")
    content = json.loads((folder / "benchmark.json").read_text())
    assert (
        content["settings"]["windows"] == f"all of {phase.num_steps} days, 2011-01-03 to 2018-12-31, returns demeaned"
    )
    assert content["settings"]["episodes"] == 2013 - phase.num_steps
    separate = json.loads((folder / "benchmark_non_overlapping.json").read_text())
    assert separate["settings"]["episodes"] == -(-(2013 - phase.num_steps) // phase.num_steps)
    assert ("optimum of the fitted model" in content["rows"]) == (phase.module.PHASE == "phase1")


def test_copy_and_modify(script, tmp_path, phase):
    """The user's way of working: copy the file, change lines, run it; nothing but envs/ is needed beside it."""
    shutil.copytree(ROOT / "envs", tmp_path / "copy" / "envs")
    source = (ROOT / phase.script).read_text()
    changed = re.sub(r"nn\.(Tanh|ReLU)\((True)?\)", "nn.SiLU()", source).replace(
        "gamma: float = 1.0", "gamma: float = 0.99"
    )
    assert changed.count("SiLU") > 1
    (tmp_path / "copy" / "my_idea.py").write_text(changed)
    result = script("my_idea.py", *phase.flags(), root=tmp_path / "copy")
    assert result.returncode in (0, 1), result.stderr
    folder = run_folder(tmp_path)
    assert "my_idea" in folder.name
    assert json.loads((folder / "args.json").read_text())["gamma"] == 0.99


def test_no_phase_imports_another_and_envs_keeps_to_itself():
    phases = [path.stem for path in ROOT.glob("phase*.py")]
    for path in [*ROOT.glob("phase*.py"), *(ROOT / "envs").glob("*.py")]:
        text = path.read_text()
        assert not re.search(rf"(from|import) ({'|'.join(phases)})", text), path
        if path.parent.name == "envs":
            assert "import wandb" not in text, path
            assert "sys.argv" not in text, path


def test_track_offline(main, quick, tmp_path, phase, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    main(*phase.flags(), "--track")
    wandb.teardown()  # or the next run in this process would write where this one did
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_help_reads_like_documentation(phase, capsys):
    with pytest.raises(SystemExit) as stop:
        phase.module.main(["--help"])
    assert stop.value.code in (0, None)
    text = capsys.readouterr().out
    for words in ("--num-envs", "--cudagraphs", "Exit code", "--evaluate", "exact optimum"):
        assert words in text


def test_compile_gives_the_same_results(tmp_path, phase):
    few = {"utd": 0.005} if phase.module.PHASE == "phase2" else {"num_minibatches": 2}
    args = phase.args(iterations=5, num_evaluations=1, save_model=False, **few)
    weights = []
    for compiled in (False, True):
        args.compile = compiled
        agent, _steps = phase.train(args, tmp_path)
        weights.append(torch.cat([p.flatten() for p in agent.parameters()]).detach())
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_graphs_give_the_same_results(tmp_path, phase):
    args = phase.args(num_evaluations=2, save_model=False)
    weights = []
    for captured in (False, True):
        args.cudagraphs = captured
        agent, _steps = phase.train(args, tmp_path, "cuda")
        weights.append(torch.cat([p.flatten() for p in agent.parameters()]).detach())
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-3, atol=1e-4)


def test_divergence_stops_the_run_and_names_the_last_checkpoint(tmp_path, phase, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        runs.run(phase.module.main, phase.flags(learning_rate=1e30))
    assert stop.value.code == 3
    (line,) = [line.split("error: ")[1] for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert "by step " in line
    assert "checkpoint.pt" in line
    checkpoint = runs.load_checkpoint(run_folder(tmp_path), phase.module.PHASE)
    assert all(value.isfinite().all() for value in checkpoint["agent"].values())


@pytest.mark.parametrize("phase", ["phase1", "phase4"], indirect=True)
def test_interrupt_has_its_own_exit_code(tmp_path, phase):
    command = [sys.executable, str(ROOT / phase.script), *phase.flags(iterations=100_000)]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env={**os.environ}
    )
    deadline = time.time() + 60
    while not list(tmp_path.glob("runs/*/metrics.csv")) and time.time() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume" in errors
