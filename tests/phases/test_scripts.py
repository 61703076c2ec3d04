"""Every phase as a user runs it: short runs of the real scripts, and what a researcher relies on."""

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import wandb
from common import PHASES, ROOT, Phase, phases, untuned
from wandb.proto.wandb_internal_pb2 import Record

from envs.run import files
from envs.run.errors import UsageError
from envs.run.run import run_main


def run_folder(place: Path, pattern="*") -> Path:
    """The newest run folder in `place`."""
    return max((place / "runs").glob(pattern), key=lambda path: path.stat().st_mtime)


# Every model in every phase, in the default suite and in the slow one; but for merton in 2 and 4, for garch where
# `test_evaluate_on_the_real_sp500` trains in it, and for marlvol, which has tests of its own
MODELS_OF = {
    "phase1": (["gbm"], ["garch", "heston", "merton"]),
    "phase2": (["gbm"], ["heston"]),
    "phase3": (["heston"], ["gbm", "merton"]),
    "phase4": (["heston"], ["gbm"]),
}
SMOKES = [pytest.param("phase0", {})] + [
    pytest.param(phase, {"dynamics": name}, marks=marks)
    for phase, suites in MODELS_OF.items()
    for names, marks in zip(suites, ([], [pytest.mark.slow]), strict=True)
    for name in names
]


@pytest.mark.parametrize(("phase", "changes"), SMOKES, indirect=["phase"])
def test_smoke(main, light, tmp_path, phase, changes, capsys):
    passed = main(*phase.flags(**changes))
    verdict = "BENCHMARK PASSED" if passed else "BENCHMARK FAILED"
    assert verdict in capsys.readouterr().out
    folder = run_folder(tmp_path)
    written = {
        "args.json",
        "origin.json",
        "metrics.csv",
        "checkpoint.pt",
        "benchmark.json",
        "benchmark.md",
        "report.html",
    }
    assert {path.name for path in folder.iterdir()} == written | phase.figures
    page = (folder / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') == sum(name.endswith(".png") for name in phase.figures)
    assert verdict in page
    content = json.loads((folder / "benchmark.json").read_text())
    assert content["passed"] == passed
    assert "bars" in content["settings"] or phase.name == "phase3"  # whose bars are of the default market
    assert phase.named <= set(content["rows"])
    solved = phase.name == "phase1" and changes["dynamics"] in ("gbm", "garch")
    assert ("exact optimum" in content["rows"]) == solved
    steps = [row["global_step"] for row in files.read_metrics(folder / "metrics.csv")]
    assert steps == [i * steps[1] for i in range(5)]
    assert steps[1] == 3 * (51 * 2 * 200 if phase.name == "phase0" else phase.num_envs * phase.num_steps)


# A run, and one that was killed and resumed: once for each phase, and several tests look at them


class Resumed(NamedTuple):
    """The folders of a whole run and of one that was killed in the middle and resumed."""

    phase: Phase
    whole: Path
    folder: Path


SLOWLY_RESUMED = [pytest.param(name, marks=pytest.mark.slow) for name in ("phase1", "phase2", "phase3")]


@pytest.fixture(scope="module", params=["phase0", *SLOWLY_RESUMED, "phase4"])
def resumed(request, tmp_path_factory) -> Resumed:
    return whole_and_resumed(PHASES[request.param], tmp_path_factory.mktemp(request.param))


def whole_and_resumed(phase: Phase, place: Path) -> Resumed:
    few = {} if phase.name == "phase0" else {"eval_episodes": 64}
    flags = phase.flags(iterations=24, num_evaluations=8, **few)
    with pytest.MonkeyPatch.context() as patch:
        if hasattr(phase.module, "classical_makers"):
            patch.setattr(phase.module, "classical_makers", untuned)
        patch.setattr("envs.figures.style.save", lambda figure, path: path.write_bytes(b""))
        (place / "whole").mkdir()
        patch.chdir(place / "whole")
        passed = phase.module.main(flags)
        (place / "killed").mkdir()
        patch.chdir(place / "killed")
        kill_in_the_middle(phase, flags, place / "killed")
        (folder,) = (place / "killed").glob("runs/*")
        assert not (folder / "benchmark.json").exists()
        assert len((folder / "metrics.csv").read_text().splitlines()) < 10
        assert phase.module.main(["--resume", str(folder)]) == passed
    (whole,) = (place / "whole").glob("runs/*")
    return Resumed(phase, whole, folder)


AS_A_PROCESS = """
import sys
import common
from common import PHASES
module = PHASES[sys.argv[1]].module
module.classical_makers = common.untuned
module.main(sys.argv[2:])
"""


def kill_in_the_middle(phase: Phase, flags: list[str], place: Path) -> None:
    """Runs the phase in `place`, as a process, and kills it after four rows of metrics, whatever it is doing."""
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, str(ROOT / phase.script), *flags]
    if hasattr(phase.module, "classical_makers"):
        command = [sys.executable, "-c", AS_A_PROCESS, phase.name, *flags]
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, cwd=place, env=environment, **silent)
    deadline = time.time() + 120
    while time.time() < deadline:
        metrics = list(place.glob("runs/*/metrics.csv"))
        if metrics and len(metrics[0].read_text().splitlines()) > 4:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_a_killed_run_resumes_to_the_same_benchmark(resumed):
    assert (resumed.whole / "benchmark.json").read_bytes() == (resumed.folder / "benchmark.json").read_bytes()


def test_a_killed_run_resumes_to_the_same_checkpoint(resumed):
    one, two = (torch.load(x / "checkpoint.pt", weights_only=True) for x in (resumed.whole, resumed.folder))
    assert set(one) == set(two)
    for name, value in one["agent"].items():
        assert torch.equal(value, two["agent"][name]), name
    for stream in ("generator", "market_generator"):
        assert all(torch.equal(x, y) for x, y in zip(one.get(stream, ()), two.get(stream, ()), strict=True))
    if "market" in one:  # which phase 0 leaves to the others
        assert torch.equal(one["market"]["projection"], two["market"]["projection"])


def test_a_killed_run_resumes_to_the_same_learning_curve(resumed):
    curves = [files.read_metrics(x / "metrics.csv", raw=True) for x in (resumed.whole, resumed.folder)]
    for row in curves[0] + curves[1]:
        row.pop("charts/SPS")
    assert curves[0] == curves[1]
    assert len(curves[0]) == 9


def test_a_resumed_run_must_be_the_same_run(resumed):
    with pytest.raises(UsageError) as refusal:
        resumed.phase.module.main(["--resume", str(resumed.folder), "--learning-rate", "0.1"])
    had = resumed.phase.learning_rate
    assert str(refusal.value) == f"--learning-rate is 0.1, but the run to resume has {had}"


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_again(resumed, quick, tmp_path):
    unborn = tmp_path / "unborn"
    unborn.mkdir()
    shutil.copy(resumed.whole / "args.json", unborn)
    if resumed.phase.name == "phase1":  # the code is the same in all of them
        resumed.phase.module.main(["--resume", str(unborn)])
        assert (unborn / "benchmark.json").read_bytes() == (resumed.whole / "benchmark.json").read_bytes()


@phases("1")
def test_a_quick_run_has_no_verdict(main, quick, tmp_path, phase, capsys):
    assert main(*phase.flags(), "--quick", "--num-steps", 30, "--total-timesteps", 30 * 64 * 4)
    out = capsys.readouterr().out
    assert "QUICK RUN: too short for a verdict" in out
    assert "FAILED" not in out
    content = json.loads((run_folder(tmp_path) / "benchmark.json").read_text())
    assert content["passed"] is None


def test_quick_flags_are_flags(phase):
    assert set(phase.module.QUICK) <= set(vars(phase.module.Args()))


def test_seeds_differ(tmp_path, phase):
    weights = []
    for seed in (0, 1):
        args = phase.args(iterations=6, seed=seed, num_evaluations=1, save_model=False)
        agent = phase.train(args, tmp_path)
        weights.append(torch.cat([p.flatten() for p in agent.parameters()]))
    assert not torch.equal(*weights)


def test_evaluate_on_other_markets(resumed, quick, tmp_path, monkeypatch):
    if resumed.phase.name == "phase0":
        return  # it has no such flags; test_phase0.py evaluates on another smile
    monkeypatch.chdir(tmp_path)
    before = {path.name: path.read_bytes() for path in resumed.whole.iterdir()}
    resumed.phase.module.main(["--evaluate", str(resumed.whole), "--dynamics", "heston", "--cost-rate", "2e-3"])
    content = json.loads((run_folder(tmp_path, "*evaluate*") / "benchmark.json").read_text())
    assert content["settings"]["dynamics"] == "heston"
    assert content["settings"]["cost_rate"] == 2e-3
    assert {path.name: path.read_bytes() for path in resumed.whole.iterdir()} == before


@phases("1", slow="2 3 4")
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
    assert ("optimum of the fitted model" in content["rows"]) == (phase.name == "phase1")


@phases("1", slow="0 2 3 4")
def test_track_offline(main, quick, tmp_path, phase, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    few = {} if phase.name == "phase0" else {"eval_episodes": 64}
    main(*phase.flags(4, **few), "--track")
    wandb.teardown()  # or the next run in this process would write where this one did
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    found = list(wandb_records(file))
    steps = [record.history.step.num for record in found if record.WhichOneof("record_type") == "history"]
    logged = [row["global_step"] for row in files.read_metrics(run_folder(tmp_path) / "metrics.csv")]
    assert steps[: len(logged)] == logged  # from step 0
    assert logged[0] == 0
    artifacts = [record.artifact for record in found if record.WhichOneof("record_type") == "artifact"]
    names = {artifact.type: artifact.name for artifact in artifacts}
    assert names["code"] == f"{phase.name}-code"
    assert names["model"].startswith(f"{phase.name}-")
    (code,) = [[entry.path for entry in a.manifest.contents] for a in artifacts if a.type == "code"]
    assert {phase.script, "envs/run/run.py", "envs/benchmark/tuned_makers.json"} <= set(code)


def wandb_records(file: Path):
    """The records of an offline run of W&B: LevelDB's log format, blocks of 32 KiB after a header of 7 bytes."""
    data = file.read_bytes()
    place, record = 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        place += 7 + length
        record += data[place - length : place]
        if kind in (1, 4):  # whole, or its last part
            yield Record.FromString(record)
            record = b""


def test_help_reads_like_documentation(phase, capsys):
    with pytest.raises(SystemExit) as stop:
        phase.module.main(["--help"])
    assert stop.value.code in (0, None)
    text = capsys.readouterr().out
    particular = {"phase0": ("--exploration-std", "the paper's reward")}
    market = ("--num-envs", "--cudagraphs", "exact optimum", "model of the underlying")
    for words in ("Exit code", "--evaluate", "Commands to start from", *particular.get(phase.name, market)):
        assert words in " ".join(text.split())


@phases("", slow="1 2 3 4")
def test_compile_gives_the_same_results(tmp_path, phase):
    few = {"utd": 0.005} if phase.name == "phase2" else {"num_minibatches": 2}
    args = phase.args(iterations=5, num_evaluations=1, save_model=False, **few)
    weights = []
    for compiled in (False, True):
        args.compile = compiled
        agent = phase.train(args, tmp_path)
        weights.append(torch.cat([p.flatten() for p in agent.parameters()]).detach())
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-3, atol=1e-4)


@phases("1 2 3 4")
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_graphs_give_the_same_results(tmp_path, phase):
    args = phase.args(num_evaluations=2, save_model=False)
    weights = []
    for captured in (False, True):
        args.cudagraphs = captured
        agent = phase.train(args, tmp_path, "cuda")
        weights.append(torch.cat([p.flatten() for p in agent.parameters()]).detach())
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-3, atol=1e-4)


@phases("1 4", slow="0 2 3")
def test_divergence_stops_the_run_and_names_the_last_checkpoint(light, tmp_path, phase, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run_main(phase.module.main, phase.flags(learning_rate=1e30))
    assert stop.value.code == 3
    (line,) = [line.split("error: ")[1] for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert "by step " in line
    assert "checkpoint.pt" in line
    checkpoint = files.load_checkpoint(run_folder(tmp_path), phase.name)
    assert all(value.isfinite().all() for value in checkpoint["agent"].values())


@phases("1", slow="4")
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
