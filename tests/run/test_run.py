"""`Run`: what a checkpoint keeps, when a policy is evaluated, and how a command ends."""

import fcntl
import io
import json
import math
import os
import re
import signal
import sys
import time
from dataclasses import asdict, dataclass
from types import SimpleNamespace

import pytest
import torch

from envs.benchmark.report import Benchmark
from envs.run import run as run_module
from envs.run.args import BatchedRunArgs, RunArgs
from envs.run.errors import DivergenceError, RankLost, UsageError
from envs.run.files import load_checkpoint, read_metrics
from envs.run.graph import CaptureError
from envs.run.run import Run, run_main


@dataclass
class Args(BatchedRunArgs):
    """A script's flags."""

    total_timesteps: int = 240
    num_envs: int = 4
    num_steps: int = 5
    filled: int | None = None

    def fill(self):
        self.filled = 2 * self.num_envs if self.filled is None else self.filled


class Learner:
    """A network, its optimizer, a stream of random numbers and a dict; `learn` changes all four."""

    def __init__(self, run: Run):
        torch.manual_seed(0)
        self.network = torch.nn.Linear(3, 1)
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=0.1)
        self.generator = run.generator(run.args.seed)
        self.buffer = {"rewards": torch.zeros(3), "position": 0}
        self.dict = self.buffer  # the same object: it is filled in place

    def things(self) -> dict:
        return {"agent": self.network, "optimizer": self.optimizer, "generator": self.generator, "buffer": self.buffer}

    def learn(self) -> float:
        x = torch.randn(8, 3, generator=self.generator)
        loss = (self.network(x) - x.sum(-1, keepdim=True)).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        position = self.buffer["position"]
        self.buffer["rewards"][position % 3] = loss.item()
        self.buffer["position"] = position + 1
        return loss.item()


def learn(args: Args, folder, stop_after: int = 12, checkpoint=None) -> tuple[Run, Learner]:
    """Trains, in a run of 12 iterations and 4 evaluations."""
    run = Run(args, "x", "cpu", folder=folder, checkpoint=checkpoint, trained=args)
    learner = Learner(run)
    run.keep(**learner.things())
    for iteration in run.iterations(args.num_iterations, args.steps_per_iteration):
        loss = learner.learn()
        if run.due(iteration):
            run.log({"losses/loss": loss}, f"loss {loss:.2f}", extra=torch.tensor(iteration))
        if iteration == stop_after:
            break
    return run, learner


def args_of(folder=None, **changes) -> Args:
    return Args(num_evaluations=4, resume=None if folder is None else str(folder), **changes)


# CHECKPOINTS


def test_a_resumed_run_has_the_numbers_of_an_uninterrupted_one(tmp_path):
    whole, part = tmp_path / "whole", tmp_path / "part"
    whole.mkdir()
    part.mkdir()
    _, expected = learn(args_of(), whole)
    learn(args_of(), part, stop_after=8)  # the last checkpoint is of iteration 6
    checkpoint = load_checkpoint(part, "x")
    assert checkpoint["iteration"] == 6
    run, learner = learn(args_of(part), part, checkpoint=checkpoint)
    assert (run.iteration, run.steps) == (12, 240)
    for name, value in expected.network.state_dict().items():
        assert torch.equal(learner.network.state_dict()[name], value)
    for p, q in zip(learner.network.parameters(), expected.network.parameters(), strict=True):
        for name, value in expected.optimizer.state[q].items():
            assert torch.equal(learner.optimizer.state[p][name], value)
    assert torch.equal(learner.generator.get_state(), expected.generator.get_state())
    assert learner.buffer is learner.dict
    assert learner.buffer["position"] == 12
    assert torch.equal(learner.buffer["rewards"], expected.buffer["rewards"])
    rows = read_metrics(part / "metrics.csv")
    assert [row["global_step"] for row in rows] == [60, 120, 180, 240]
    losses = [[row["losses/loss"] for row in read_metrics(folder / "metrics.csv")] for folder in (part, whole)]
    assert losses[0] == losses[1]


def test_what_a_checkpoint_holds(tmp_path):
    run, learner = learn(args_of(), tmp_path)
    content = load_checkpoint(tmp_path, "x")
    known = {"phase", "args", "iteration", "steps", "rows", "world_size", "tracker"}
    assert content.keys() == known | {"agent", "optimizer", "generator", "buffer", "extra"}
    assert content["args"] == asdict(run.args)
    assert (content["iteration"], content["steps"], content["rows"], content["world_size"]) == (12, 240, 4, 1)
    assert len(content["generator"]) == 1  # one of each process
    assert content["extra"] == 12
    assert torch.equal(content["agent"]["weight"], learner.network.weight)


def test_nothing_is_restored_in_a_run_from_the_start_nor_in_an_evaluation(tmp_path):
    learn(args_of(), tmp_path)
    checkpoint = load_checkpoint(tmp_path, "x")
    for args, found in ((args_of(), None), (args_of(evaluate=str(tmp_path)), checkpoint)):
        run = Run(args, "x", "cpu", folder=tmp_path, checkpoint=found, trained=args)
        learner = Learner(run)
        fresh = Learner(run).network.weight.clone()
        run.keep(**learner.things())
        assert torch.equal(learner.network.weight, fresh)
        assert learner.buffer["position"] == 0
        assert run.saved("agent") is None
        assert run.metrics.rows == 0
    run.load(learner.network)  # the weights alone
    assert torch.equal(learner.network.weight, checkpoint["agent"]["weight"])


def test_a_run_that_was_stopped_before_its_first_checkpoint(tmp_path):
    run, _ = learn(args_of(tmp_path), tmp_path, checkpoint=None)
    assert run.saved("agent") is None
    assert run.iteration == 12


def test_checkpoints_that_do_not_fit(tmp_path):
    learn(args_of(), tmp_path)
    checkpoint = load_checkpoint(tmp_path, "x")

    def refusal(**changes) -> str:
        run = Run(args_of(tmp_path), "x", "cpu", folder=tmp_path, checkpoint={**checkpoint, **changes})
        learner = Learner(run)
        with pytest.raises(UsageError) as error:
            run.keep(**learner.things(), **({"more": learner.network} if "more" in changes else {}))
        return str(error.value)

    def changed(moments=None, **settings) -> dict:
        """The optimizer's state with other moments of the weight, or other settings."""
        (group,) = checkpoint["optimizer"]["param_groups"]
        state = checkpoint["optimizer"]["state"]
        state = {**state, 0: {**state[0], **(moments or {})}}
        return {"state": state, "param_groups": [{**group, **settings}]}

    assert "optimizer" not in refusal(optimizer=changed(), rows=9)  # sound
    for name, values in {
        "agent": [torch.nn.Linear(4, 1).state_dict(), None, torch.nn.Linear(3, 1).double().state_dict()],
        "optimizer": [
            None, {"state": {}}, changed({"exp_avg": torch.zeros(7)}), changed({"step": "one"}), changed({"more": 1}),
            changed(lr="fast"), changed(betas=0.9), changed(params=[0, 0]), {**changed(), "state": {5: {}}},
        ],
        "generator": [[], None, [torch.zeros(3, dtype=torch.uint8)], {}],
        "buffer": [[1, 2], {"rewards": torch.zeros(4)}, {"rewards": "none"}, {1: 2}],
        "more": ["weights"],
    }.items():  # fmt: skip
        for value in values:
            assert refusal(**{name: value}) == f"{tmp_path}: does not fit this script, its {name} has another form"
    state = torch.zeros_like(checkpoint["generator"][0])
    assert refusal(generator=[state]) == f"{tmp_path}: its generator is damaged, or was made on another device"
    assert refusal(rows=9) == f"{tmp_path / 'metrics.csv'}: 4 rows, but the checkpoint has seen 9"
    run = Run(args_of(tmp_path), "x", "cpu", folder=tmp_path, checkpoint=checkpoint)
    assert run.saved("extra") == 12
    with pytest.raises(UsageError, match=re.escape(f"{tmp_path}: does not fit this script, it has no opponents")):
        run.saved("opponents")
    with pytest.raises(UsageError, match=re.escape(f"{tmp_path}: does not fit this script, it has no critic, pool")):
        run.keep(agent=torch.nn.Linear(3, 1), critic=torch.nn.Linear(3, 1), pool={})


def test_a_dict_has_nothing_that_the_checkpoint_has_not(tmp_path):
    run = Run(args_of(), "x", "cpu", folder=tmp_path)
    run.keep(pool={"step 0": torch.arange(2.0), "size": 1})
    run.log({})
    pool = {"step 9": torch.zeros(2), "size": 5}
    run = Run(args_of(tmp_path), "x", "cpu", folder=tmp_path, checkpoint=load_checkpoint(tmp_path, "x"))
    run.keep(pool=pool)
    assert pool.keys() == {"step 0", "size"}
    assert (pool["step 0"].tolist(), pool["size"]) == ([0.0, 1.0], 1)


def test_other_things_are_saved_as_they_are(tmp_path):
    run = Run(args_of(), "x", "cpu", folder=tmp_path)
    run.keep(origin="tuned", scales=torch.arange(3.0), parameters=[1.0, 2.0])
    run.log({})
    content = load_checkpoint(tmp_path, "x")
    assert (content["origin"], content["scales"].tolist(), content["parameters"]) == ("tuned", [0, 1, 2], [1.0, 2.0])
    scales = torch.zeros(3)
    run = Run(args_of(tmp_path), "x", "cpu", folder=tmp_path, checkpoint=content)
    run.keep(origin="", scales=scales, parameters=[])
    assert scales.tolist() == [0, 0, 0]  # not restored


def test_no_checkpoint_is_written_when_none_is_wanted(tmp_path):
    learn(args_of(save_model=False), tmp_path)
    assert not (tmp_path / "checkpoint.pt").exists()
    assert len(read_metrics(tmp_path / "metrics.csv")) == 4


def test_steps_of_a_checkpoint_from_before_it_said_so():
    args = Args(num_envs=4, num_steps=5)
    assert Run(args, "x", "cpu", checkpoint={"iteration": 3, "world_size": 2}, trained=args).steps == 120
    assert Run(args, "x", "cpu", checkpoint={"iteration": 3}, trained=args).steps == 60
    assert Run(RunArgs(), "x", "cpu", checkpoint={"iteration": 3}, trained=RunArgs()).steps is None
    assert Run(args, "x", "cpu").steps == 0


# ITERATIONS


@pytest.mark.parametrize(("iterations", "evaluations"), [(12, 4), (12, 5), (100, 7), (20, 20), (1, 1), (7, 1)])
def test_the_policy_is_evaluated_as_often_as_asked_for_and_at_the_end(iterations, evaluations, tmp_path):
    run = Run(Args(num_evaluations=evaluations), "x", "cpu", folder=tmp_path)
    due = []
    for iteration in run.iterations(iterations, 20):
        assert (run.iteration, run.steps) == (iteration, 20 * iteration)
        if run.due(iteration):
            due.append(iteration)
    assert run.iteration == iterations
    assert len(due) == evaluations
    assert due[-1] == iterations
    gaps = [b - a for a, b in zip([0, *due], due, strict=False)]
    assert max(gaps) - min(gaps) <= 1  # evenly


def test_the_iterations_after_which_the_policy_is_evaluated():
    run = Run(Args(num_evaluations=4), "x", "cpu")
    assert [i for i in run.iterations(10, 20) if run.due(i)] == [3, 5, 8, 10]


def test_a_run_with_fewer_iterations_than_evaluations_is_evaluated_after_each():
    run = Run(Args(num_evaluations=20), "x", "cpu")
    assert [i for i in run.iterations(3, 20) if run.due(i)] == [1, 2, 3]


def test_a_resumed_run_has_the_iterations_that_are_left():
    args = Args(num_evaluations=4)
    run = Run(args, "x", "cpu", checkpoint={"iteration": 6}, trained=args)
    assert run.steps == 120
    assert [(i, run.steps) for i in run.iterations(12, 20) if run.due(i)] == [(9, 180), (12, 240)]
    run = Run(args, "x", "cpu", checkpoint={"iteration": 12}, trained=args)
    assert list(run.iterations(12, 20)) == []


def test_without_cudagraphs_a_function_is_itself():
    def iterate():
        pass

    for args in (Args(), RunArgs()):  # flags that have it, and flags that do not
        assert Run(args, "x", "cpu").captured(iterate) is iterate
        assert Run(args, "x", "cpu").captured(iterate, torch.nn.Linear(1, 1)) is iterate


def test_with_cudagraphs_each_argument_has_a_graph_of_what_is_kept(tmp_path, monkeypatch):
    captures = []

    def capture(function, module, optimizer, generators):
        captures.append((list(module), optimizer, generators))
        return function

    monkeypatch.setattr(run_module, "cuda_graph", capture)
    run = Run(Args(cudagraphs=True), "x", "cpu", folder=tmp_path)
    learner = Learner(run)
    run.keep(**learner.things())
    calls = []
    iterate = run.captured(lambda *arguments: calls.append(arguments) or len(calls))
    assert captures == []  # at its first call
    assert [iterate(1), iterate(2), iterate(1)] == [1, 2, 3]
    assert calls == [(1,), (2,), (1,)]
    assert captures == [([learner.network], learner.optimizer, [learner.generator])] * 2
    other = torch.nn.Linear(1, 1)
    run.captured(lambda: None, other, learner.optimizer)()
    assert captures[2] == ([other], learner.optimizer, [])


def test_what_cannot_be_captured_goes_on_without_a_graph(tmp_path, monkeypatch, capsys):
    def capture(function, module, optimizer, generators):
        raise CaptureError("operation not permitted")

    monkeypatch.setattr(run_module, "cuda_graph", capture)
    run = Run(Args(cudagraphs=True), "x", "cpu", folder=tmp_path)
    run.keep(**Learner(run).things())
    calls = []
    iterate = run.captured(lambda *arguments: calls.append(arguments))
    for turn in (1, 2, 1):
        iterate(turn)
    assert calls == [(1,), (2,), (1,)]
    line = "no CUDA graph, so the run goes on without: operation not permitted\n"
    assert capsys.readouterr().out == line  # once, not for each argument
    assert run.args.cudagraphs is False  # as the checkpoint says then, so that --resume does the same


def test_the_speed_that_is_logged_does_not_count_the_capture(tmp_path, monkeypatch):
    now = [0.0]

    def capture(function, module, optimizer, generators):
        now[0] += 100.0
        return function

    def iterate(turn):
        now[0] += 1.0

    monkeypatch.setattr(run_module, "cuda_graph", capture)
    monkeypatch.setattr(run_module.time, "perf_counter", lambda: now[0])
    run = Run(Args(cudagraphs=True, num_evaluations=2), "x", "cpu", folder=tmp_path)
    run.keep(**Learner(run).things())
    iterate = run.captured(iterate)
    for iteration in run.iterations(12, 20):
        iterate(iteration % 4)  # turns that come first in the middle of a run
        if run.due(iteration):
            run.log({})
    assert [row["charts/SPS"] for row in read_metrics(tmp_path / "metrics.csv")] == [20.0, 20.0]


def test_streams_of_random_numbers():
    run = Run(Args(), "x", "cpu")
    one, two, other = (torch.rand(3, generator=run.generator(seed)) for seed in (5, 5, 6))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


# NaN


def test_nan_is_named_with_its_step_and_the_last_checkpoint(tmp_path):
    run, learner = learn(args_of(), tmp_path)
    run.check_finite({"loss": 1.0}, learner.network)
    last = f"by step 240; last good: {tmp_path / 'checkpoint.pt'}"
    for value in (math.nan, math.inf, -math.inf):
        with pytest.raises(DivergenceError, match=re.escape(f"loss is {value} {last}")):
            run.check_finite({"fine": 0.0, "loss": value}, learner.network)
    with torch.no_grad():
        learner.network.bias[0] = math.nan
    with pytest.raises(DivergenceError, match=re.escape(f"parameter bias is nan {last}")):
        run.check_finite({"loss": 1.0}, learner.network)
    (tmp_path / "checkpoint.pt").unlink()
    with pytest.raises(DivergenceError, match="there is no checkpoint yet"):
        run.check_finite({"loss": math.nan})
    run.args.save_model = False
    with pytest.raises(DivergenceError, match=re.escape("no checkpoint was kept (--no-save-model)")):
        run.check_finite({"loss": math.nan})


def test_a_checkpoint_with_nan_in_it_is_not_written(tmp_path):
    run, learner = learn(args_of(), tmp_path)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    moment = learner.optimizer.state[learner.network.bias]["exp_avg"]
    for spoilt, name in (
        (learner.network.bias.data, "agent"),
        (moment, "optimizer"),
        (learner.buffer["rewards"], "buffer"),
    ):
        sound = spoilt.clone()
        spoilt[0] = math.inf
        message = f"{name} is NaN or infinite by step 240; last good: {tmp_path / 'checkpoint.pt'}"
        with pytest.raises(DivergenceError, match=re.escape(message)):
            run.log({"losses/loss": 1.0})
        spoilt.copy_(sound)
    with pytest.raises(DivergenceError, match="extra is NaN"):
        run.log({}, extra={"market": [torch.tensor(math.nan)]})
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_errors_of_training_that_mean_nan_name_the_last_checkpoint(tmp_path):
    run, _ = learn(args_of(), tmp_path)

    def train(error, *diverged):
        with run.training(*diverged):
            raise error

    last = f"last good: {tmp_path / 'checkpoint.pt'}"
    with pytest.raises(DivergenceError, match=re.escape(f"ask is nan, by step 240; {last}")):
        train(ValueError("ask is nan"), ValueError)
    with pytest.raises(DivergenceError, match=re.escape(f"rank 1 is gone; {last}")):
        train(RankLost("rank 1 is gone"))
    with pytest.raises(ValueError, match=r"^something else$"):
        train(ValueError("something else"), ArithmeticError)
    with pytest.raises(KeyboardInterrupt):
        train(KeyboardInterrupt())


def test_the_bar_is_closed_before_an_error_is_said(tmp_path, capsys):
    run = Run(Args(), "x", "cpu", folder=tmp_path)

    def train():
        with run.training():
            for _ in run.iterations(3, 20):
                run.check_finite({"loss": math.nan})

    with pytest.raises(DivergenceError):
        train()
    assert capsys.readouterr().err.endswith("\n")


def test_every_row_goes_to_the_tracker(tmp_path):
    rows = []
    run = Run(args_of(), "x", "cpu", folder=tmp_path)
    run.tracker = SimpleNamespace(log=lambda row, step: rows.append((step, row)), id="abc")
    run.keep()
    run.log({"gain": 1.5})
    for iteration in run.iterations(12, 20):
        if run.due(iteration):
            run.log({"gain": 2.0})
    assert [step for step, _ in rows] == [0, 60, 120, 180, 240]
    assert rows[0][1] == {"global_step": 0, "gain": 1.5}
    assert load_checkpoint(tmp_path, "x")["tracker"] == "abc"


# THE COMMAND


def test_opening():
    run = Run.open(Args, ["--num-envs", "8", "--no-cuda"], "x", {"seed": 5})
    assert run.args == Args(num_envs=8, cuda=False, filled=16)  # --quick is not given
    assert run.device == torch.device("cpu")
    assert run.checkpoint is None
    assert torch.get_num_threads() == 1
    run = Run.open(Args, ["--quick", "--num-envs", "8", "--no-cuda"], "x", {"seed": 5, "num_envs": 2})
    assert run.args == Args(num_envs=8, cuda=False, quick=True, seed=5, filled=16)  # other flags still change it
    run = Run.open(Args, ["--seed", "3", "--no-cuda"], "x", lambda args: {"num_envs": args.seed})
    assert run.args == Args(seed=3, num_envs=3, cuda=False, filled=6)
    with pytest.raises(UsageError, match="--num-envs is 0"):
        Run.open(Args, ["--num-envs", "0"], "x", {})


def test_presets_change_neither_an_evaluation_nor_a_resumed_run(tmp_path):
    learn(args_of(cuda=False), tmp_path)
    for flag in ("--evaluate", "--resume"):
        run = Run.open(Args, [flag, str(tmp_path)], "x", lambda args: {"num_envs": 2})
        assert run.args.num_envs == 4
        assert run.checkpoint["iteration"] == run.iteration == 12
        assert run.trained.num_envs == 4


def test_beginning_makes_a_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    args = Args(seed=7, exp_name="try")
    run = Run(args, "x", "cpu")
    run.begin("heston", "a line")
    assert re.fullmatch(r"heston__try__7__\d{8}-\d{6}", run.folder.name)
    assert run.folder.parent.name == "runs"
    assert capsys.readouterr().out == f"{run.folder}: a line\n"
    assert json.loads((run.folder / "args.json").read_text()) == asdict(args)
    again = Run(Args(seed=7, exp_name="try", evaluate="x"), "x", "cpu")
    again.begin("gbm", "")
    assert re.fullmatch(r"gbm__try__evaluate__7__\d{8}-\d{6}", again.folder.name)
    resumed = Run(Args(seed=7, exp_name="try", resume=str(run.folder)), "x", "cpu")
    before = {path.name: path.read_bytes() for path in run.folder.iterdir()}
    assert before.keys() == {"args.json", "origin.json"}
    resumed.begin("heston", "")
    assert resumed.folder == run.folder
    assert {path.name: path.read_bytes() for path in run.folder.iterdir()} == before
    monkeypatch.setattr(run_module, "provenance", lambda *paths: {"commit": "another"})
    resumed.keep()
    first, second = json.loads((run.folder / "origin.json").read_text())
    assert second == {"commit": "another"}  # which has a part in the run, too
    assert first.keys() == {"date", "commit", "versions", "machine"}
    assert len(list((tmp_path / "runs").iterdir())) == 2


@pytest.mark.parametrize(("quick", "good", "passed"), [(False, True, True), (False, False, False), (True, False, True)])
def test_the_end(tmp_path, capsys, quick, good, passed):
    run, _ = learn(args_of(quick=quick), tmp_path)
    result = Benchmark("title", run.settings(), {"agent": {"objective": 1.0, "objective_se": 0.1}}, {}, columns={})
    result.require("is good", good, "as asked")
    assert run.finish(result, lambda folder: (folder / "figure.png").touch()) is passed
    assert (tmp_path / "figure.png").exists()
    content = json.loads((tmp_path / "benchmark.json").read_text())
    assert content["settings"] == {"run seed": 1, "training steps": 240}
    assert content["passed"] == (None if quick else passed)
    page = (tmp_path / "report.html").read_text()
    assert ("BENCHMARK" in page) == (not quick)
    assert "losses/loss" in page  # the learning curve
    out = capsys.readouterr().out
    assert f"report and figures: {tmp_path}" in out
    assert ("BENCHMARK" in out) == (not quick)
    assert ("QUICK RUN" in out) == quick


def test_a_run_that_another_process_is_at(tmp_path, monkeypatch):
    learn(args_of(cuda=False), tmp_path)
    descriptor = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)  # as another process does
    with pytest.raises(UsageError, match="another process is at this run"):
        Run.open(Args, ["--resume", str(tmp_path)], "x", {})
    Run.open(Args, ["--evaluate", str(tmp_path)], "x", {})  # which only reads
    os.close(descriptor)
    Run.open(Args, ["--resume", str(tmp_path)], "x", {})
    monkeypatch.chdir(tmp_path)
    new = Run(Args(), "x", "cpu")
    new.begin("heston", "")  # holds its own
    descriptor = os.open(new.folder, os.O_RDONLY)
    with pytest.raises(BlockingIOError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(descriptor)


def test_modes_of_wandb_that_there_are_not(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "sometimes")
    with pytest.raises(UsageError, match=re.escape("--track: WANDB_MODE is 'sometimes' (one of online, offline")):
        run_module.start_tracker(Args(), "name", None)


def interrupted(argv):
    raise KeyboardInterrupt


def terminated(argv):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)


def raising(error):
    def main(argv):
        raise error

    return main


@pytest.mark.parametrize(
    ("main", "code", "message"),
    [
        (lambda argv: True, 0, ""),
        (lambda argv: False, 1, ""),
        (raising(UsageError("--seed is -1 (at least 0)")), 2, "error: --seed is -1 (at least 0)\n"),
        (raising(DivergenceError("loss is nan by step 9")), 3, "error: loss is nan by step 9\n"),
        (raising(RankLost("a process has died")), 3, "error: a process has died\n"),
        (interrupted, 130, "interrupted; continue with --resume and the run folder\n"),
        (terminated, 130, "interrupted; continue with --resume and the run folder\n"),
        (
            raising(BrokenPipeError()),
            141,
            "stopped, because nobody reads the output",
        ),
        (
            raising(OSError(28, "No space left on device", "runs/x/metrics.csv")),
            3,
            "error: No space left on device: runs/x/metrics.csv; continue with --resume and the run folder\n",
        ),
        (raising(MemoryError("8 GiB")), 3, "error: out of memory, 8 GiB\n"),
        (lambda argv: torch.empty(10**15), 3, "error: out of memory, [enforce fail"),
        (raising(UsageError("a\nb\x1b[31m: no such file")), 2, "error: a\\nb\\x1b[31m: no such file\n"),
        (raising(SystemExit(0)), 0, ""),
    ],
)
def test_exit_codes(main, code, message, capsys):
    with pytest.raises(SystemExit) as end:
        run_main(main, ["flag"])
    assert end.value.code == code
    line = capsys.readouterr().err
    assert line.startswith(message)
    assert line.count("\n") == (code not in (0, 1))


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_output_that_is_not_utf8(monkeypatch, encoding):
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding=encoding))
    with pytest.raises(SystemExit) as end:
        run_main(lambda argv: print("Black–Scholes σ → BENCHMARK PASSED") is None, [])
    assert end.value.code == 0
    assert b"BENCHMARK PASSED" in out.getvalue()


@pytest.mark.parametrize("broken", ["while it runs", "at the end"])
def test_nobody_reads_the_output(monkeypatch, capsys, broken):
    reader, writer = os.pipe()
    os.close(reader)
    monkeypatch.setattr(sys, "stdout", os.fdopen(writer, "w"))
    with pytest.raises(SystemExit) as end:
        run_main(lambda argv: print("a line", flush=broken == "while it runs") is None, [])
    assert end.value.code == 141
    assert capsys.readouterr().err.count("\n") == 1


def test_an_error_of_the_script_has_its_traceback(capsys):
    with pytest.raises(SystemExit) as end:
        run_main(lambda argv: 1 / 0, [])
    assert end.value.code == 3
    assert "ZeroDivisionError" in capsys.readouterr().err
