"""Flags that every phase has, parsed from the command line or from a saved run, and checked before any work."""

import contextlib
import io
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Literal, Union, get_args, get_origin, get_type_hints

import torch
import tyro

from envs.run.errors import UsageError, check
from envs.run.files import hold, load_checkpoint, read_json
from envs.run.ranks import world_size


@dataclass
class RunArgs:
    """Flags of any run."""

    exp_name: str = "experiment"
    """name of the experiment, part of the run's name"""
    seed: int = 1
    """seed of the run; the same seed gives the same numbers, bitwise, on the same machine (but for phase 0 on a GPU,
    where the order of its sums, float scatter_add_, is not fixed)"""
    quick: bool = False
    """a run of about half a minute that shows everything at work; it ends without a verdict"""
    cuda: bool = True
    """use the GPU if there is one"""
    torch_threads: int = 1
    """CPU threads of torch; these small networks are fastest on one"""
    track: bool = False
    """log to Weights & Biases (WANDB_MODE=offline works without an account)"""
    wandb_project_name: str = "option-market-making"
    """the W&B project"""
    wandb_entity: str | None = None
    """the W&B entity (team); your own account by default"""
    save_model: bool = True
    """write checkpoint.pt, which --resume and --evaluate need"""
    evaluate: str | None = None
    """CHECKPOINT or run folder: no training, only the benchmark; market flags may differ from those trained with"""
    resume: str | None = None
    """run folder: continue it to exactly the numbers of an uninterrupted run"""
    num_evaluations: int = 20
    """how often in the run the policy is evaluated, logged and saved"""

    @property
    def trains(self) -> bool:
        """Whether this command trains anything, so that the flags of training matter."""
        return self.evaluate is None

    def fill(self) -> None:
        """Fills in the flags whose defaults depend on another flag; called before `check`."""

    def check(self) -> None:
        """Raises UsageError for the first argument that cannot work."""
        check_range(self, 1, 1024, "torch_threads")
        letters = self.exp_name.replace("-", "").replace("_", "").replace(".", "")
        fits = letters.isalnum() and len(os.fsencode(self.exp_name)) < 100
        check(fits, f"--exp-name is {self.exp_name!r} (letters, digits and -_. for a file name, under 100 bytes)")
        if self.trains:
            check_range(self, 0, 999_999, "seed")  # see envs/run/seeds.py
            check_range(self, 1, 2**20, "num_evaluations")


@dataclass
class CapturedRunArgs(RunArgs):
    """Flags of a run whose iteration can be captured as a CUDA graph."""

    cudagraphs: bool | None = None
    """capture rollout and update as one CUDA graph, for the launches that dominate with few environments; by default on
    a GPU, in one process, without --compile"""

    def fill(self) -> None:
        """Fills in the flags whose defaults depend on another flag; called before `check`."""
        super().fill()
        if self.cudagraphs is None:
            self.cudagraphs = self._has_gpu and world_size() == 1 and not getattr(self, "compile", False)

    @property
    def _has_gpu(self) -> bool:
        return self.cuda and torch.cuda.is_available()

    def check(self) -> None:
        """Raises UsageError for the first argument that cannot work."""
        super().check()
        if self.trains and self.cudagraphs:
            check(self._has_gpu, "--cudagraphs needs a GPU and --cuda")
            check(not getattr(self, "compile", False), "--cudagraphs and --compile exclude each other")
            check(world_size() == 1, "--cudagraphs is for one process, not for torchrun")


@dataclass
class BatchedRunArgs(CapturedRunArgs):
    """Flags of a run whose iterations are whole episodes of environments side by side.

    A script's Args add `total_timesteps`, `num_envs` and `num_steps`.
    """

    compile: bool = False
    """compile policy and loss with torch.compile (needs a C++ compiler; worth it on long runs)"""

    @property
    def steps_per_iteration(self) -> int:
        """Environment steps of an iteration, over all processes of torchrun."""
        return self.num_envs * self.num_steps * world_size()

    @property
    def num_iterations(self) -> int:
        """Iterations of the run, each a rollout and its updates."""
        return self.total_timesteps // self.steps_per_iteration

    def check(self) -> None:
        """Raises UsageError for the first argument that cannot work."""
        super().check()
        if self.trains:
            check_range(self, 1, 2**20, "num_envs")
            check_range(self, self.steps_per_iteration, 10**12, "total_timesteps")


def check_range(args, low: float, high: float, *fields: str, open_low: bool = False) -> None:
    """Raises `UsageError` unless low ≤ value ≤ high (low < value with `open_low`) for every named field of `args`."""
    for field in fields:
        value = getattr(args, field)
        inside = -math.inf < value < math.inf and value <= high and (value > low if open_low else value >= low)
        left = f"more than {short(low)}" if open_low else f"at least {short(low)}"
        allowed = left if high == math.inf else f"{left}, at most {short(high)}"
        check(inside, f"--{field.replace('_', '-')} is {value} ({allowed})")


def short(number: float) -> str:
    """A number in six digits; of integers that no float can hold, how large they are."""
    if isinstance(number, float) or abs(number) < 10**300:
        return f"{number:g}"
    return f"{'-' if number < 0 else ''}1e{math.log10(abs(number)):.0f}"


def check_choice(args, field: str, names) -> None:
    """Raises `UsageError` unless the named field of `args` is one of `names`."""
    value = getattr(args, field)
    check(value in names, f"--{field.replace('_', '-')} is {value!r} (one of {', '.join(names)})")


def check_ppo(args) -> None:
    """Raises `UsageError` for the first flag of PPO that cannot work."""
    check_range(args, 0, math.inf, "learning_rate", "max_grad_norm", "reward_scale", open_low=True)
    check_range(args, 0, 1, "gamma", "gae_lambda")
    check_range(args, 0, 1, "clip_coef", open_low=True)
    check_range(args, 0, math.inf, "ent_coef", "vf_coef")
    check_range(args, 1, 2**20, "num_minibatches", "update_epochs")
    size = args.num_envs * args.num_steps
    check(
        size % args.num_minibatches == 0 and size // args.num_minibatches > 1,
        f"--num-minibatches is {args.num_minibatches} (must divide num_envs × num_steps = {size}, > 1 each)",
    )


def check_copies(args) -> None:
    """Raises UsageError if `args.copies` rows cannot share a market and explore in opposite pairs."""
    even = args.copies == 1 or args.copies % 2 == 0
    check(
        args.copies >= 1 and even and args.num_envs % args.copies == 0,
        f"--copies is {args.copies} (1 or an even number, must divide --num-envs = {args.num_envs})",
    )


def parse_args(args_class: type, argv: Sequence[str], default=None):
    """Parses `argv` into the dataclass `args_class` with tyro, starting from `default` if given.

    Raises:
        UsageError: with tyro's message on one line.
    """
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(args_class, args=list(argv), default=default)
    except SystemExit as exit_:
        if exit_.code in (0, None):  # --help
            raise
    # Tyro's message is a box, in Unicode or in blanks and dashes: its lines without frame, rules and title
    lines = [line.strip("│╭╮╰╯─ ") for line in errors.getvalue().splitlines()]
    lines = [line for line in lines if line.strip("-") and not line.startswith("For full helptext")]
    raise UsageError(" ".join(lines[1:]))


def parse_command(args_class: type, argv: Sequence[str], phase: str):
    """Parses a phase's command line: (args, checkpoint or None, args of the run that the checkpoint is from or None).

    With --evaluate or --resume the saved run's arguments are the defaults. A resumed run must be the same run, so only
    what does not change its numbers may be given anew; an evaluation may differ in anything.

    Raises:
        UsageError: bad flags, a checkpoint that cannot be used, or a flag that contradicts the run to resume.
    """
    args = parse_args(args_class, argv)
    check(args.evaluate is None or args.resume is None, "--evaluate and --resume exclude each other")
    if args.evaluate is not None:
        checkpoint = load_checkpoint(args.evaluate, phase, ["args", "agent", "iteration"])
        trained = saved_args(args_class, checkpoint["args"], args.evaluate)
        # Flags of the training, perhaps on another machine, that its evaluation does not take over
        default = saved_args(args_class, checkpoint["args"], args.evaluate)
        default.resume = default.evaluate = None
        for name in ("track", "cudagraphs", "compile", "quick"):
            if hasattr(default, name):
                setattr(default, name, getattr(args_class, name))
        return parse_args(args_class, argv, default=default), checkpoint, trained
    if args.resume is not None:
        hold(args.resume)
        checkpoint, trained = _run_to_resume(args_class, args.resume, phase)
        args = parse_args(args_class, argv, default=trained)
        _check_same_run(args, trained, checkpoint)
        return args, checkpoint, trained
    return args, None, None


def _run_to_resume(args_class: type, folder: str, phase: str):
    """Checkpoint (None if the run was stopped before its first) and arguments of the run in `folder`."""
    saved = Path(folder) / "args.json"
    if os.path.lexists(Path(folder) / "checkpoint.pt") or not os.path.lexists(saved):
        checkpoint = load_checkpoint(folder, phase, ["args", "agent", "iteration", "rows", "tracker"])
        content = checkpoint["args"]
    else:
        checkpoint = None
        content = read_json(saved)
    trained = saved_args(args_class, content, folder)
    trained.resume = trained.evaluate = None
    return checkpoint, trained


def _check_same_run(args, trained, checkpoint: dict | None) -> None:
    """Raises `UsageError` if `args` would not continue the run of `trained`."""
    check(Path(args.resume).is_dir(), f"--resume is {args.resume} (a run folder)")
    for name in sorted(set(vars(args)) - {"resume", "track", "wandb_project_name", "wandb_entity"}):
        new, old = getattr(args, name), getattr(trained, name)
        check(new == old, f"--{name.replace('_', '-')} is {new}, but the run to resume has {old}")
    before = world_size() if checkpoint is None else checkpoint.get("world_size", 1)
    check(before == world_size(), f"{args.resume}: was trained by {before} processes, not {world_size()}")


def saved_args(args_class: type, content, source: str):
    """The dataclass `args_class` from a saved dict; unknown names are dropped, missing ones have their defaults.

    Raises:
        UsageError: a value that the command line could not have given.
    """
    args = args_class()
    check(isinstance(content, dict), f"{source}: does not fit this script, its arguments are not a dict")
    hints = get_type_hints(args_class)
    for name, default in vars(args).items():
        value = content.get(name, default)
        if isinstance(value, list):  # as JSON has a tuple
            value = tuple(value)
        what = f"its {name} is {value!r}, a {type(value).__name__}"
        check(_fits(value, hints[name]), f"{source}: does not fit this script, {what}")
        setattr(args, name, value)
    return args


def _fits(value, hint) -> bool:
    """Whether `value` is of the type that the hint of a flag says: int is not float, and bool is neither."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is Literal:
        return type(value) is str and value in parts
    if origin is tuple and parts[1:] == (...,):
        return type(value) is tuple and all(_fits(x, parts[0]) for x in value)
    return type(value) is (origin or hint)
