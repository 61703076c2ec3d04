"""Flags: their ranges, the command line, and those of a saved run."""

import json
import math
import re
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Literal

import pytest

from envs.run import args as args_module
from envs.run.args import (
    BatchedRunArgs,
    RunArgs,
    check_choice,
    check_copies,
    check_ppo,
    check_range,
    parse_args,
    parse_command,
    saved_args,
)
from envs.run.errors import UsageError
from envs.run.files import save_checkpoint


@dataclass
class Args(BatchedRunArgs):
    """A script's flags."""

    total_timesteps: int = 6_000
    """environment steps of the run"""
    num_envs: int = 4
    """environments"""
    num_steps: int = 5
    """steps"""
    learning_rate: float = 1e-3
    """step size"""
    strikes: tuple[float, ...] = (95.0, 105.0)
    """strikes"""
    names: tuple[str, ...] = ()
    """names"""
    history: str | None = None
    """a file"""
    days: tuple[int, ...] | None = None
    """days"""
    edge: float | None = None
    """an edge"""
    start: Literal["classic", "neutral"] = "classic"
    """a start"""


def refused(args) -> str:
    with pytest.raises(UsageError) as refusal:
        args.check()
    return str(refusal.value)


@pytest.mark.parametrize(
    ("value", "bounds", "open_low", "message"),
    [
        (0, (1, 10), False, "--num-envs is 0 (at least 1, at most 10)"),
        (11, (1, 10), False, "--num-envs is 11 (at least 1, at most 10)"),
        (-0.5, (0, math.inf), False, "--num-envs is -0.5 (at least 0)"),
        (0.0, (0, math.inf), True, "--num-envs is 0.0 (more than 0)"),
        (0.0, (0, 0.5), True, "--num-envs is 0.0 (more than 0, at most 0.5)"),
        (math.nan, (0, math.inf), False, "--num-envs is nan (at least 0)"),
        (math.inf, (0, math.inf), False, "--num-envs is inf (at least 0)"),
    ],
)
def test_ranges(value, bounds, open_low, message):
    with pytest.raises(UsageError) as refusal:
        check_range(SimpleNamespace(num_envs=value), *bounds, "num_envs", open_low=open_low)
    assert str(refusal.value) == message


def test_the_ends_of_a_range_belong_to_it():
    args = SimpleNamespace(low=0, high=1.0, between=1e-9)
    check_range(args, 0, 1, "low", "high", "between")
    check_range(args, 0, 1, "between", "high", open_low=True)
    args.between = 2
    with pytest.raises(UsageError, match=r"^--between is 2 "):  # the first that cannot work
        check_range(args, 0, 1, "low", "high", "between")


def test_choices():
    args = SimpleNamespace(action_map="direct")
    check_choice(args, "action_map", ("direct", "normal"))
    with pytest.raises(UsageError, match=re.escape("--action-map is 'direct' (one of normal, stochastic)")):
        check_choice(args, "action_map", ("normal", "stochastic"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exp_name": ""}, "--exp-name is '' (letters, digits and -_. for a file name, under 100 bytes)"),
        ({"exp_name": "a/b"}, "--exp-name is 'a/b' (letters"),
        ({"exp_name": "x" * 100}, "under 100 bytes"),
        ({"exp_name": "é" * 50}, "under 100 bytes"),
        ({"num_envs": 10**400}, "--num-envs is 1000"),
        ({"num_steps": 10**400}, "--total-timesteps is 6000 (at least 1e401, at most 1e+12)"),
        ({"torch_threads": 0}, "--torch-threads is 0 (at least 1, at most 1024)"),
        ({"num_evaluations": 0}, "--num-evaluations is 0 (at least 1, at most 1.04858e+06)"),
        ({"num_envs": 0}, "--num-envs is 0"),
        ({"total_timesteps": 19}, "--total-timesteps is 19 (at least 20, at most 1e+12)"),
        ({"cudagraphs": True, "cuda": False}, "--cudagraphs needs a GPU and --cuda"),
    ],
)
def test_flags_that_cannot_work(changes, message):
    assert message in refused(Args(**changes))


def test_graphs_are_captured_where_they_can_be(monkeypatch):
    def resolved(gpu: bool, processes: int = 1, **changes) -> bool:
        monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
        monkeypatch.setattr(args_module, "world_size", lambda: processes)
        args = Args(**{"total_timesteps": 120, **changes})
        args.fill()
        args.check()
        return args.cudagraphs

    assert resolved(gpu=True) is True
    assert resolved(gpu=False) is False
    assert resolved(gpu=True, cuda=False) is False
    assert resolved(gpu=True, compile=True) is False
    assert resolved(gpu=True, processes=2, total_timesteps=240) is False
    assert resolved(gpu=True, cudagraphs=False) is False
    for changes in ({"cuda": False}, {"compile": True}, {"processes": 2, "total_timesteps": 240}):
        with pytest.raises(UsageError, match="--cudagraphs"):
            resolved(gpu=True, cudagraphs=True, **changes)


def test_flags_of_training_do_not_matter_to_an_evaluation():
    Args().check()
    Args(exp_name="a-b_c.1").check()
    evaluation = Args(evaluate="runs/x", total_timesteps=0, num_envs=0, num_evaluations=0, seed=-1, cudagraphs=True)
    assert not evaluation.trains
    evaluation.check()
    assert "--torch-threads is 0" in refused(Args(evaluate="runs/x", torch_threads=0))


def test_iterations_are_whole():
    args = Args(total_timesteps=119, num_envs=4, num_steps=5)
    assert args.steps_per_iteration == 20
    assert args.num_iterations == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 0.0}, "--learning-rate is 0.0 (more than 0)"),
        ({"max_grad_norm": math.inf}, "--max-grad-norm is inf (more than 0)"),
        ({"gae_lambda": 1.1}, "--gae-lambda is 1.1 (at least 0, at most 1)"),
        ({"clip_coef": 0.0}, "--clip-coef is 0.0 (more than 0, at most 1)"),
        ({"ent_coef": -0.1}, "--ent-coef is -0.1 (at least 0)"),
        ({"update_epochs": 0}, "--update-epochs is 0 (at least 1, at most 1.04858e+06)"),
        ({"num_minibatches": 3}, "--num-minibatches is 3 (must divide num_envs × num_steps = 20, > 1 each)"),
        ({"num_minibatches": 20}, "--num-minibatches is 20 (must divide num_envs × num_steps = 20, > 1 each)"),
    ],
)
def test_flags_of_ppo(changes, message):
    flags = {
        "learning_rate": 1e-3, "max_grad_norm": 0.5, "reward_scale": 1.0, "gamma": 1.0, "gae_lambda": 0.95,
        "clip_coef": 0.2, "ent_coef": 0.0, "vf_coef": 0.5, "num_minibatches": 4, "update_epochs": 4, "num_envs": 4,
        "num_steps": 5,
    }  # fmt: skip
    check_ppo(SimpleNamespace(**flags))
    with pytest.raises(UsageError) as refusal:
        check_ppo(SimpleNamespace(**{**flags, **changes}))
    assert str(refusal.value) == message


# THE COMMAND LINE


def test_parsing():
    assert parse_args(Args, []) == Args()
    words = ["--num-envs", "8", "--track", "--no-cuda", "--strikes", "90", "110", "--history", "closes.csv"]
    assert parse_args(Args, words) == Args(
        num_envs=8, track=True, cuda=False, strikes=(90.0, 110.0), history="closes.csv"
    )
    assert parse_args(Args, ["--seed", "3"], default=Args(num_envs=8)) == Args(num_envs=8, seed=3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nonsense", "1"], "--nonsense"),
        (["--num-envs", "many"], "--num-envs"),
        (["--num-envs"], "--num-envs"),
        (["--learning-rate", "1e-3x"], "--learning-rate"),
        (["stray"], "stray"),
    ],
)
def test_words_that_are_no_flags(words, message):
    """One line, without the frame that tyro draws."""
    with pytest.raises(UsageError) as refusal:
        parse_args(Args, words)
    text = str(refusal.value)
    assert message in text
    assert text.isprintable()
    assert not set("│╭╮╰╯─") & set(text)


def test_help_is_no_error(capsys):
    with pytest.raises(SystemExit) as end:
        parse_args(Args, ["--help"])
    assert end.value.code == 0
    assert "step size" in capsys.readouterr().out


@pytest.fixture
def folder(tmp_path):
    """A run with 8 environments and a checkpoint: folder(**entries) writes it."""

    def write(**entries):
        args = asdict(Args(num_envs=8, strikes=(90.0,), quick=True, track=True, compile=True, cudagraphs=False))
        content = {"phase": "x", "args": args, "iteration": 2, "agent": {}, "rows": 1, "tracker": None, **entries}
        save_checkpoint(tmp_path / "checkpoint.pt", content)
        return tmp_path

    return write


def test_a_command_without_a_checkpoint():
    assert parse_command(Args, ["--num-envs", "8"], "x") == (Args(num_envs=8), None, None)
    with pytest.raises(UsageError, match="--evaluate and --resume exclude each other"):
        parse_command(Args, ["--evaluate", "a", "--resume", "b"], "x")


def test_an_evaluation_has_the_flags_of_the_training_and_its_own(folder):
    path = folder()
    args, checkpoint, trained = parse_command(Args, ["--evaluate", str(path), "--learning-rate", "0.5"], "x")
    assert trained == Args(num_envs=8, strikes=(90.0,), quick=True, track=True, compile=True, cudagraphs=False)
    assert args == Args(num_envs=8, strikes=(90.0,), learning_rate=0.5, evaluate=str(path))  # not how it was trained
    assert args.cudagraphs is None  # resolved anew, perhaps on another machine
    assert checkpoint["iteration"] == 2
    with pytest.raises(UsageError, match="a checkpoint of x, not of y"):
        parse_command(Args, ["--evaluate", str(path)], "y")


def test_a_resumed_run_is_the_same_run(folder):
    path = folder()
    args, checkpoint, trained = parse_command(Args, ["--resume", str(path), "--no-track"], "x")
    assert args == Args(num_envs=8, strikes=(90.0,), quick=True, compile=True, cudagraphs=False, resume=str(path))
    assert checkpoint["rows"] == 1
    assert trained.num_envs == 8
    parse_command(Args, ["--resume", str(path), "--num-envs", "8"], "x")
    for words, message in (
        (["--num-envs", "4"], "--num-envs is 4, but the run to resume has 8"),
        (["--strikes", "95"], "--strikes is (95.0,), but the run to resume has (90.0,)"),
        (["--no-quick"], "--quick is False, but the run to resume has True"),
    ):
        with pytest.raises(UsageError, match=re.escape(message)):
            parse_command(Args, ["--resume", str(path), *words], "x")
    with pytest.raises(UsageError, match=r"checkpoint.pt \(a run folder\)"):
        parse_command(Args, ["--resume", str(path / "checkpoint.pt")], "x")
    with pytest.raises(UsageError, match="was trained by 2 processes, not 1"):
        parse_command(Args, ["--resume", str(folder(world_size=2))], "x")


def test_a_run_that_was_stopped_before_its_first_checkpoint(tmp_path):
    saved = tmp_path / "args.json"
    saved.write_text(json.dumps(asdict(Args(num_envs=8, strikes=(90.0,)))))
    args, checkpoint, trained = parse_command(Args, ["--resume", str(tmp_path)], "x")
    assert checkpoint is None
    assert args.strikes == trained.strikes == (90.0,)  # a list in JSON
    saved.write_text('{"num_envs": 8')
    with pytest.raises(UsageError, match=r"args.json: damaged"):
        parse_command(Args, ["--resume", str(tmp_path)], "x")
    saved.unlink()
    with pytest.raises(UsageError, match="no such checkpoint"):
        parse_command(Args, ["--resume", str(tmp_path)], "x")


def test_copies_of_a_market():
    for copies, num_envs in ((1, 7), (2, 64), (6, 12)):
        check_copies(SimpleNamespace(copies=copies, num_envs=num_envs))
    for copies, num_envs in ((0, 8), (-2, 8), (3, 9), (6, 8)):
        message = f"--copies is {copies} (1 or an even number, must divide --num-envs = {num_envs})"
        with pytest.raises(UsageError, match=re.escape(message)):
            check_copies(SimpleNamespace(copies=copies, num_envs=num_envs))


# SAVED FLAGS


def test_saved_flags():
    content = asdict(Args(num_envs=8, strikes=(90.0,), history="closes.csv"))
    assert saved_args(Args, content, "") == Args(num_envs=8, strikes=(90.0,), history="closes.csv")
    assert saved_args(Args, json.loads(json.dumps(content)), "") == saved_args(Args, content, "")
    assert saved_args(Args, {}, "") == Args()
    assert saved_args(Args, {"days": [60, 120]}, "") == Args(days=(60, 120))  # as JSON has a tuple
    assert saved_args(Args, {"days": None}, "") == Args()
    assert saved_args(Args, {"of an older version": 1, "seed": 3}, "") == Args(seed=3)
    assert saved_args(Args, {"strikes": [], "names": ["a", "b"]}, "") == Args(strikes=(), names=("a", "b"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"num_envs": "8"}, "its num_envs is '8', a str"),
        ({"num_envs": 8.0}, "its num_envs is 8.0, a float"),
        ({"num_envs": True}, "its num_envs is True, a bool"),
        ({"num_envs": None}, "its num_envs is None, a NoneType"),
        ({"track": 1}, "its track is 1, a int"),
        ({"exp_name": 1}, "its exp_name is 1, a int"),
        ({"history": ["a"]}, "its history is ('a',), a tuple"),
        ({"history": True}, "its history is True, a bool"),
        ({"history": 2010}, "its history is 2010, a int"),
        ({"edge": "1"}, "its edge is '1', a str"),
        ({"edge": 1}, "its edge is 1, a int"),
        ({"start": "nowhere"}, "its start is 'nowhere', a str"),
        ({"start": ["classic"]}, "its start is ('classic',), a tuple"),
        ({"days": [60, 61.5]}, "its days is (60, 61.5), a tuple"),
        ({"days": 60}, "its days is 60, a int"),
        ({"strikes": 90.0}, "its strikes is 90.0, a float"),
        ({"strikes": (90, "b")}, "its strikes is (90, 'b'), a tuple"),
        ({"strikes": [[90.0]]}, "its strikes is ([90.0],), a tuple"),
        ({"names": [1]}, "its names is (1,), a tuple"),
        ([("num_envs", 8)], "its arguments are not a dict"),
        (None, "its arguments are not a dict"),
    ],
)
def test_saved_flags_of_another_type(content, message):
    with pytest.raises(UsageError, match=re.escape(f"runs/x: does not fit this script, {message}")):
        saved_args(Args, content, "runs/x")


def test_all_flags_of_a_run_have_defaults():
    assert RunArgs().trains
    RunArgs().fill()
    RunArgs().check()
