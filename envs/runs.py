"""The run folder and the manners of a command: arguments checked, files written whole, checkpoints read safely.

Everything here is the same for every phase. Exit codes: 0 benchmark passed, 1 benchmark failed, 2 bad input, 3 an error
or a run that diverged, 130 Ctrl-C. At the end what `torchrun` needs: its processes, the ranks, train one agent
together, and only rank 0 prints and writes.
"""

import contextlib
import csv
import io
import json
import math
import os
import pickle
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import tyro
from tqdm import tqdm


class UsageError(ValueError):
    """Bad input. Its message is one line that names the flag or file, the value and what is allowed."""


class DivergenceError(RuntimeError):
    """A loss, reward or parameter that is NaN or infinite. Its message names it, the step and the last checkpoint."""


class RankLost(Exception):
    """Another process of this torchrun has died, or all are being stopped: training cannot go on."""


def check(condition: bool, message: str) -> None:
    """Raises `UsageError(message)` unless `condition`."""
    if not condition:
        raise UsageError(message)


def check_range(args, low: float, high: float, *fields: str, open_low: bool = False) -> None:
    """Raises `UsageError` unless low ≤ value ≤ high (low < value with `open_low`) for every named field of `args`."""
    for field in fields:
        value = getattr(args, field)
        inside = math.isfinite(value) and value <= high and (value > low if open_low else value >= low)
        left = f"more than {low:g}" if open_low else f"at least {low:g}"
        allowed = left if high == math.inf else f"{left}, at most {high:g}"
        check(inside, f"--{field.replace('_', '-')} is {value} ({allowed})")


def check_name(exp_name: str) -> None:
    """Raises `UsageError` unless `--exp-name` can be part of a folder's name."""
    letters = exp_name.replace("-", "").replace("_", "").replace(".", "")
    check(letters.isalnum() and len(exp_name) < 100, f"--exp-name is {exp_name!r} (a file name)")


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


def parse_command(args_class: type, argv: Sequence[str], phase: str, resume_needs: Sequence[str]):
    """Parses a phase's command line, whose dataclass has `evaluate` and `resume`: (args, checkpoint or None).

    With either of them the saved run's arguments are the defaults. A resumed run must be the same run, so only what
    does not change its numbers may be given anew; an evaluation may differ in anything.

    Raises:
        UsageError: bad flags, a checkpoint that cannot be used, or a flag that contradicts the run to resume.
    """
    args = parse_args(args_class, argv)
    check(args.evaluate is None or args.resume is None, "--evaluate and --resume exclude each other")
    if args.evaluate is None and args.resume is None:
        return args, None
    if args.evaluate is not None:
        checkpoint = load_checkpoint(args.evaluate, phase, ["args", "agent", "iteration"])
        saved = saved_args(args_class, checkpoint["args"], args.evaluate)
        saved.track = saved.cudagraphs = saved.compile = False  # of training, perhaps on another machine
    elif not (Path(args.resume) / "checkpoint.pt").exists() and (Path(args.resume) / "args.json").exists():
        checkpoint = None  # stopped before its first checkpoint: the same run from the start
        try:
            content = json.loads((Path(args.resume) / "args.json").read_text(encoding="utf-8"))
        except ValueError:
            raise UsageError(f"{args.resume}/args.json: damaged") from None
        saved = saved_args(args_class, content, args.resume)
    else:
        checkpoint = load_checkpoint(args.resume, phase, ["args", "agent", "iteration", *resume_needs])
        saved = saved_args(args_class, checkpoint["args"], args.resume)
    saved.resume = saved.evaluate = None
    args = parse_args(args_class, argv, default=saved)
    if args.resume is not None:
        check(Path(args.resume).is_dir(), f"--resume is {args.resume} (a run folder)")
        for name in sorted(set(vars(args)) - {"resume", "track", "wandb_project_name", "wandb_entity"}):
            new, old = getattr(args, name), getattr(saved, name)
            check(new == old, f"--{name.replace('_', '-')} is {new}, but the run to resume has {old}")
        before = world_size() if checkpoint is None else checkpoint.get("world_size", 1)
        check(before == world_size(), f"{args.resume}: was trained by {before} processes, not {world_size()}")
    return args, checkpoint


def saved_args(args_class: type, content, source: str):
    """The dataclass `args_class` from a saved dict; unknown names are dropped, missing ones have their defaults.

    Raises:
        UsageError: a value of another type than the default's.
    """
    args = args_class()
    check(isinstance(content, dict), f"{source}: does not fit this script, its arguments are not a dict")
    for name, default in vars(args).items():
        value = content.get(name, default)
        if isinstance(default, tuple) and isinstance(value, list):  # as JSON has it
            value = tuple(value)
        fits = type(value) in (type(None), str, int, float) if default is None else type(value) is type(default)
        if fits and isinstance(default, tuple):
            fits = all(type(x) is (type(default[0]) if default else str) for x in value)
        check(fits, f"{source}: does not fit this script, its {name} is a {type(value).__name__}")
        setattr(args, name, value)
    return args


def check_finite(values: dict[str, float], step: int, folder: Path) -> None:
    """Raises `DivergenceError`, naming quantity, step and last good checkpoint, if a value is NaN or infinite."""
    for name, value in values.items():
        if not math.isfinite(value):
            raise DivergenceError(f"{name} is {value} by step {step}; {last_good(folder)}")


def last_good(folder: Path) -> str:
    """What is left of a run that has diverged, for its message."""
    checkpoint = folder / "checkpoint.pt"
    return f"last good: {checkpoint}" if checkpoint.exists() else "no checkpoint was kept (--no-save-model)"


def run(main: Callable[[Sequence[str]], bool], argv: Sequence[str]) -> None:
    """Calls `main(argv)` and exits: 0 if it returns True (benchmark passed), 1 if False, else as the module says."""
    try:
        code = 0 if main(argv) else 1
    except UsageError as error:
        if rank() == 0:  # all of them say the same
            print(f"error: {error}", file=sys.stderr)
        code = 2
    except (DivergenceError, RankLost) as error:
        which = f"rank {rank()}: " if world_size() > 1 else ""
        print(f"error: {which}{error}", file=sys.stderr)
        code = 3
    except KeyboardInterrupt:
        if rank() == 0:
            print("interrupted; continue with --resume and the run folder", file=sys.stderr)
        code = 130
    except Exception:
        traceback.print_exc()
        code = 3
    sys.stdout.flush()
    sys.stderr.flush()
    if world_size() > 1 and code not in (0, 1):
        os._exit(code)  # not to wait for ranks that wait for this one
    sys.exit(code)


@contextlib.contextmanager
def replacing(path: Path):
    """Yields a temporary path to write to, which then replaces `path` at once: the file is whole or as it was."""
    temporary = path.with_name(path.name + ".tmp")
    yield temporary
    os.replace(temporary, path)


def write_json(path: Path, content) -> None:
    """Writes `content` as JSON, atomically, on rank 0."""
    if rank() == 0:
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


class MetricsFile:
    """metrics.csv: one row per logged iteration, flushed at once.

    On `resume_from` (rows that the checkpoint has seen), later rows of the interrupted run are dropped.
    """

    def __init__(self, path: Path, fields: Sequence[str], resume_from: int | None = None):
        kept = read_metrics(path, raw=True)[:resume_from] if resume_from else []
        check(len(kept) == (resume_from or 0), f"{path}: {len(kept)} rows, but the checkpoint has seen {resume_from}")
        self.rows = len(kept)
        if rank() == 0:
            with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, fields)
                writer.writeheader()
                writer.writerows(kept)
        path = path if rank() == 0 else Path(os.devnull)
        self.file = open(path, "a", newline="", encoding="utf-8")  # noqa: SIM115  (open as long as the run)
        self.writer = csv.DictWriter(self.file, fields, restval="nan")

    def write(self, row: dict) -> None:
        self.writer.writerow(row)
        self.file.flush()
        self.rows += 1


def save_checkpoint(path: Path, content: dict) -> None:
    """Writes `content` (tensors, numbers, strings, and lists and dicts of them) to `path` atomically, on rank 0."""
    if rank() == 0:
        with replacing(path) as temporary:
            torch.save(content, temporary)


def load_checkpoint(path: str | Path, phase: str, required: Sequence[str] = ()) -> dict:
    """Reads a checkpoint of `phase` onto the CPU; `path` is the file or its run folder. Never executes code from it.

    Raises:
        UsageError: missing, truncated, not a checkpoint, from another phase, without one of the `required` entries,
            or a pickle with code in it.
    """
    check(str(path) != "", "no checkpoint is named after --evaluate or --resume")
    path = Path(path)
    if path.is_dir():
        path = path / "checkpoint.pt"
    check(path.is_file(), f"{path}: no such checkpoint")
    try:
        with warnings.catch_warnings(action="ignore"):  # of a pickle that is about to be refused anyway
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UsageError(f"{path}: refused, it holds objects other than tensors and numbers (or is damaged)") from None
    except Exception:  # torch raises many kinds for a file that is cut off or is no archive
        raise UsageError(f"{path}: not a readable checkpoint (truncated or of another kind)") from None
    is_ours = isinstance(content, dict) and isinstance(content.get("phase"), str)
    check(is_ours, f"{path}: not a checkpoint of this project")
    check(content["phase"] == phase, f"{path}: a checkpoint of {content['phase']}, not of {phase}")
    iteration = content.get("iteration", 0)
    check(isinstance(iteration, int) and iteration >= 0, f"{path}: does not fit this script, its iteration is no count")
    missing = [name for name in required if name not in content]
    check(not missing, f"{path}: does not fit this script, it has no {', '.join(missing)}")
    return content


def read_metrics(path: Path, raw: bool = False) -> list[dict]:
    """Rows of a metrics.csv as numbers, or as the strings they are (`raw`); empty if there is none.

    Raises:
        UsageError: a damaged file.
    """
    if not path.is_file():
        return []
    try:
        with open(path, newline="", encoding="utf-8") as file:
            return [{k: v if raw else float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    except (ValueError, TypeError, csv.Error):
        raise UsageError(f"{path}: damaged") from None


def check_memory(num_bytes: int, device: torch.device, what: str) -> None:
    """Raises `UsageError` if `num_bytes` are more than what is free on `device` (where that can be known)."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
    elif "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", {}):
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    else:
        return
    gigabytes, available = num_bytes / 2**30, free / 2**30
    check(num_bytes <= free, f"{what} needs {gigabytes:,.1f} GiB (at most the {available:,.1f} GiB free on {device})")


def peak_memory(device: torch.device) -> float:
    """GiB that this process has used at most: on a GPU what PyTorch allocated there, else all of it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30


def new_folder(path: Path) -> Path:
    """Creates `path`, or `path-2`, `path-3` … if it exists (two runs may start in the same second).

    Under torchrun rank 0 does, and the others learn its name."""
    if rank() > 0:
        return _collective(lambda: _from_rank_0(None))
    folder = _new_folder(path)
    return folder if world_size() == 1 else _collective(lambda: _from_rank_0(folder))


def _new_folder(path: Path) -> Path:
    candidate, n = path, 1
    while True:
        try:
            candidate.mkdir(parents=True)
            return candidate
        except FileExistsError:
            n += 1
            candidate = path.with_name(f"{path.name}-{n}")


def cuda_graph(function: Callable, module: torch.nn.Module, optimizer, generators) -> Callable:
    """Captures `function()` (no host synchronisation, fixed shapes) as one CUDA graph; returns a callable that replays
    it and returns the same output tensor, overwritten.

    Warming up runs the function for real, so parameters, optimiser state and generators are put back afterwards: the
    captured run does what the eager one would have done.
    """
    parameters = {name: value.clone() for name, value in module.state_dict().items()}
    moments = {p: {name: v.clone() for name, v in state.items()} for p, state in optimizer.state.items()}
    states = [generator.get_state() for generator in generators]

    def put_back() -> None:
        module.load_state_dict(parameters)  # all in place: the graph knows these tensors by address
        for parameter, state in optimizer.state.items():
            for name, value in state.items():
                old = moments.get(parameter)
                value.copy_(old[name]) if old else value.zero_()  # Adam's moments and step count start at zero
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    put_back()
    graph = torch.cuda.CUDAGraph()
    for generator in generators:
        graph.register_generator_state(generator)  # or every replay would draw the same numbers
    with torch.cuda.graph(graph):
        output = function()
    put_back()

    def replay():
        graph.replay()
        return output

    return replay


# DATA-PARALLEL TRAINING, as torchrun starts it


def rank() -> int:
    """Which process of this torchrun this is: 0, the one that prints and writes, without torchrun."""
    return int(os.environ["RANK"]) if dist.is_torchelastic_launched() else 0


def world_size() -> int:
    """How many processes torchrun has started; 1 without."""
    return int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1


def progress_bar(total: int, initial: int = 0) -> tqdm:
    """A bar over environment steps, on rank 0."""
    return tqdm(total=total, initial=initial, unit="step", unit_scale=True, disable=rank() > 0)


def rank_seed(seed: int) -> int:
    """Seed of this rank's own stream of random numbers; `seed` itself on rank 0."""
    return seed + 100_000_000 * rank()  # beyond every other seed


def join_ranks(cuda: bool) -> torch.device:
    """The device of this process: a GPU if `cuda` and there is one, each rank its own, else the CPU.

    Under torchrun the processes meet here (nccl on GPUs, gloo on CPUs), and the output of all but rank 0 is dropped.

    Raises:
        UsageError: more processes than GPUs.
    """
    cuda = cuda and torch.cuda.is_available()
    if world_size() == 1:
        return torch.device("cuda" if cuda else "cpu")

    def stopped(signum, frame):
        raise RankLost("torchrun has stopped this run: one of its processes died, or it was told to")

    signal.signal(signal.SIGTERM, stopped)
    device = torch.device("cpu")
    if cuda:
        local, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        check(local <= gpus, f"--nproc-per-node is {local} (at most the {gpus} GPUs there are)")
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
    if rank() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (as long as the process)
    return device


def _collective(function: Callable):
    """Calls `function`, which talks to the other ranks.

    Raises:
        RankLost: one of them does not answer.
    """
    try:
        return function()
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise RankLost(f"a process of this torchrun has died ({reason})") from None


@contextlib.contextmanager
def naming_last_good(folder: Path):
    """Turns a `RankLost` into a `DivergenceError` that names the last checkpoint."""
    try:
        yield
    except RankLost as error:
        raise DivergenceError(f"{error}; {last_good(folder)}") from error


def _from_rank_0(value):
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def gather(value) -> list:
    """`value` of every rank, in their order; `[value]` without torchrun. For checkpoints."""
    values = [value] * world_size()
    if world_size() > 1:
        _collective(lambda: dist.all_gather_object(values, value))
    return values


def average(tensor: torch.Tensor) -> torch.Tensor:
    """Mean of `tensor` over the ranks, on each of them."""
    if world_size() > 1:
        _collective(lambda: dist.all_reduce(tensor))
        tensor = tensor / world_size()
    return tensor


def average_gradients(module: torch.nn.Module) -> None:
    """Puts the mean over the ranks in the place of each gradient: one message for all of them."""
    if world_size() > 1:
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        mean = average(torch.cat([gradient.flatten() for gradient in gradients]))
        for gradient, part in zip(gradients, mean.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))


def standardise(sample: torch.Tensor) -> torch.Tensor:
    """`sample` (n,) less its mean, over its standard deviation; both those of all ranks' samples together."""
    if world_size() == 1:
        return (sample - sample.mean()) / (sample.std() + 1e-8)
    n = world_size() * len(sample)
    mean, square = average(torch.stack((sample.mean(), sample.square().mean())))
    return (sample - mean) / (((square - mean**2) * n / (n - 1)).clamp(min=0).sqrt() + 1e-8)


def check_equal_parameters(module: torch.nn.Module) -> None:
    """Raises `DivergenceError` unless parameters and buffers are the same, bitwise, on every rank."""
    if world_size() > 1:
        own = torch.cat([value.flatten() for value in module.state_dict().values()]).nan_to_num()
        extremes = torch.cat((own, -own))
        _collective(lambda: dist.all_reduce(extremes, dist.ReduceOp.MAX))
        if not torch.equal(extremes, torch.cat((own, -own))):
            raise DivergenceError("the processes of this torchrun no longer hold the same parameters")
