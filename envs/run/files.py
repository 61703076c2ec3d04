"""Files of a run: written whole or not at all, checkpoints read without executing anything in them."""

import contextlib
import csv
import json
import math
import os
import pickle
import re
import secrets
import shutil
import sys
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch

try:
    import fcntl
    import resource
except ImportError:  # on Windows
    fcntl = resource = None

from envs.run.errors import UsageError, check
from envs.run.forms import same_form
from envs.run.ranks import from_rank_0, rank, world_size

# WRITING


def _fresh(path: Path) -> Path:
    """A name beside `path` that nothing has: two processes never share it, and no link waits there."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def clear(folder: Path) -> None:
    """Removes what a process that was killed while it wrote has left in a run folder."""
    for path in folder.iterdir():
        if not re.fullmatch(r"\..+\.[0-9a-f]{16}\.tmp", path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextlib.contextmanager
def replacing(path: Path):
    """Yields a temporary path to write to, which then replaces `path` at once: the file is whole or as it was.

    A link at `path` is replaced, its target stays as it is.
    """
    temporary = _fresh(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_files(folder: Path):
    """Yields a temporary folder with a copy of `folder`'s metrics.csv; what is written there then replaces the files of
    `folder`, all of it or nothing."""
    temporary = _fresh(folder / "files")
    temporary.mkdir()
    try:
        metrics = temporary / "metrics.csv"
        if (folder / metrics.name).is_file():
            shutil.copyfile(folder / metrics.name, metrics)
        yield temporary
        metrics.unlink(missing_ok=True)
        for path in temporary.iterdir():
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(temporary)


def write_json(path: Path, content) -> None:
    """Writes `content` as JSON, atomically, on rank 0."""
    if rank() == 0:
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


class MetricsFile:
    """metrics.csv: one row per logged iteration, flushed at once. A row may bring new columns.

    On `resume_from` (rows that the checkpoint has seen), later rows of the interrupted run are dropped.
    """

    def __init__(self, path: Path, resume_from: int | None = None):
        self.path = path if rank() == 0 else Path(os.devnull)
        self.kept = read_metrics(path, raw=True)[:resume_from] if resume_from else []
        _as_numbers(self.kept, path)  # a damaged row among those that are kept is refused now
        self.rows = len(self.kept)
        check(self.rows == (resume_from or 0), f"{path}: {self.rows} rows, but the checkpoint has seen {resume_from}")
        self.fields = list(self.kept[0]) if self.kept else []
        self._rewrite()

    def write(self, row: dict) -> None:
        self.kept.append(row)
        self.rows += 1
        new = [name for name in row if name not in self.fields]
        if new:
            self.fields += new
            self._rewrite()
        elif rank() == 0:
            with open(self.path, "a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, self.fields, restval="nan").writerow(row)

    def _rewrite(self) -> None:
        if rank() == 0:
            with replacing(self.path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, self.fields, restval="nan")
                writer.writeheader()
                writer.writerows(self.kept)


# CHECKPOINTS


def save_checkpoint(path: Path, content: dict) -> None:
    """Writes `content` (tensors, numbers, strings, and lists and dicts of them) to `path` atomically, on rank 0.

    Raises:
        OSError: the disk is full, for example. The file is as it was.
    """
    if rank() == 0:
        with replacing(path) as temporary, open(temporary, "wb") as file:
            try:
                torch.save(content, file)
            except RuntimeError as error:  # in which torch wraps what the file says
                raise error.__context__ if isinstance(error.__context__, OSError) else error from None


COUNTS = ("iteration", "steps", "rows", "world_size")  # entries of a checkpoint


def load_checkpoint(path: str | Path, phase: str | Sequence[str], required: Sequence[str] = ()) -> dict:
    """Reads a checkpoint of `phase` (or of one of several) onto the CPU; `path` is the file or its run folder. Never
    executes code from it.

    Raises:
        UsageError: missing, truncated, not a checkpoint, from another phase, without one of the `required` entries,
            or a pickle with code in it.
    """
    check(str(path) != "", "no checkpoint is named after --evaluate or --resume")
    path = Path(path)
    if os.path.isdir(path):
        path = path / "checkpoint.pt"
    check(os.path.isfile(path), f"{path}: no such checkpoint")
    size = _archive_size(path)
    try:
        with warnings.catch_warnings(action="ignore"):  # of a pickle that is about to be refused anyway
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UsageError(f"{path}: refused, it holds objects other than tensors and numbers (or is damaged)") from None
    except Exception:  # torch raises many kinds for a file that is cut off or is no archive
        raise UsageError(f"{path}: not a readable checkpoint (truncated or of another kind)") from None
    is_ours = isinstance(content, dict) and isinstance(content.get("phase"), str)
    check(is_ours, f"{path}: not a checkpoint of this project")
    phases = [phase] if isinstance(phase, str) else phase
    check(content["phase"] in phases, f"{path}: a checkpoint of {content['phase']}, not of {' or '.join(phases)}")
    _check_content(content, size, path)
    for name in COUNTS:
        count = content.get(name, 0)
        fits = type(count) is int and 0 <= count <= 10**15
        check(fits, f"{path}: does not fit this script, its {name} is no count")
    missing = [name for name in required if name not in content]
    check(not missing, f"{path}: does not fit this script, it has no {', '.join(missing)}")
    return content


def _archive_size(path: Path) -> int:
    """Bytes of a checkpoint's file.

    Raises:
        UsageError: it is no archive, or one that unpacks to more than it holds: a few bytes could fill the memory.
    """
    size = os.path.getsize(path)
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except Exception:  # as many kinds as torch
        raise UsageError(f"{path}: not a readable checkpoint (truncated or of another kind)") from None
    check(unpacked <= size, f"{path}: refused, it unpacks to more than the {size} bytes that it has")
    return size


def _check_content(content: dict, size: int, path: Path) -> None:
    """Raises `UsageError` unless `content` is what this project saves, all of it finite and no larger than the file."""
    left = size  # a tensor may be a view, a list may hold itself: both are larger than what they are made of
    inside = list(content.items())  # (entry of the checkpoint, something in it)
    while inside:
        entry, value = inside.pop()
        plain = True
        finite = True
        left -= 1
        if isinstance(value, dict):
            inside += [(entry, x) for pair in value.items() for x in pair]
        elif isinstance(value, list | tuple):
            inside += [(entry, x) for x in value]
        elif isinstance(value, torch.Tensor):
            plain = value.layout is torch.strided and value.device.type == "cpu" and not value.is_quantized
            plain = plain and not value.is_complex()
            left -= value.numel() * value.element_size()
            finite = not plain or left < 0 or bool(value.isfinite().all())
        elif isinstance(value, float):
            finite = math.isfinite(value)
        elif isinstance(value, int):
            plain = abs(value) < 2**63
        else:
            plain = value is None or isinstance(value, str)
        check(left >= 0, f"{path}: refused, it unpacks to more than the {size} bytes that it has")
        check(plain, f"{path}: refused, its {entry} holds other than real tensors, numbers and text")
        check(finite, f"{path}: NaN or infinite numbers in its {entry}")


def load_weights(module: torch.nn.Module, state, source: str) -> None:
    """Gives `module` the weights `state` of a checkpoint; `source` names it in errors.

    Raises:
        UsageError: other shapes.
    """
    check(same_form(state, module.state_dict()), f"{source}: does not fit this script, its networks have other shapes")
    module.load_state_dict(state)


# READING


def read_json(path: Path):
    """The content of a JSON file.

    Raises:
        UsageError: a damaged file, or none.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise UsageError(f"{path}: damaged") from None


def read_metrics(path: Path, raw: bool = False) -> list[dict]:
    """Rows of a metrics.csv as numbers, or as the strings they are (`raw`); empty if there is none.

    Raises:
        UsageError: a damaged file.
    """
    if not os.path.isfile(path):
        return []
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error):
        raise UsageError(f"{path}: damaged") from None
    return rows if raw else _as_numbers(rows, path)


def _as_numbers(rows: list[dict], path: Path) -> list[dict]:
    try:
        return [{name: float(value) for name, value in row.items()} for row in rows]
    except (ValueError, TypeError):  # too few columns or too many, or no number
        raise UsageError(f"{path}: damaged") from None


# MEMORY


def check_memory(num_bytes: int, device: torch.device, what: str) -> None:
    """Raises `UsageError` if `num_bytes` are more than what is free on `device` (where that can be known)."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _free_memory()
    gigabytes, available = num_bytes / 2**30, free / 2**30
    check(num_bytes <= free, f"{what} needs {gigabytes:,.1f} GiB (at most the {available:,.1f} GiB free on {device})")


def _free_memory() -> float:
    """Bytes of memory that processes can have; infinite where that is not known."""
    with contextlib.suppress(OSError):  # Linux: with the cache of files, which goes when memory is needed
        return 1024 * int(re.search(r"MemAvailable: *(\d+) kB", Path("/proc/meminfo").read_text())[1])
    if "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", {}):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return math.inf


def peak_memory(device: torch.device) -> float:
    """GiB that this process has used at most: on a GPU what PyTorch allocated there, else all of it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if resource is None:
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30


# FOLDERS


def new_folder(path: Path) -> Path:
    """Creates `path`, or `path-2`, `path-3` … if it exists (two runs may start in the same second).

    Under torchrun rank 0 does, and the others learn its name.

    Raises:
        UsageError: no folder can be made there.
    """
    if rank() > 0:
        return from_rank_0(None)
    try:
        folder = _new_folder(path)
    except OSError as error:
        raise UsageError(f"{path.parent}: no run folder can be made in it ({error.strerror})") from None
    return folder if world_size() == 1 else from_rank_0(folder)


def _new_folder(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    candidate, n = path, 1
    while True:
        try:
            candidate.mkdir()
            return candidate
        except FileExistsError:
            n += 1
            candidate = path.with_name(f"{path.name}-{n}")


_held = {}  # folder → descriptor that keeps its lock


def hold(folder: str | Path) -> None:
    """Takes a run folder for this process, until `let_go` or the end of the process.

    Raises:
        UsageError: another process has it. Two that continue the same run would spoil it.
    """
    folder = Path(os.path.realpath(folder))
    if rank() > 0 or folder in _held or fcntl is None or not os.path.isdir(folder):
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UsageError(f"{folder}: another process is at this run (wait for its end, or stop it)") from None
    except OSError:  # a file system without locks
        os.close(descriptor)
        return
    _held[folder] = descriptor


def let_go(folder: Path) -> None:
    """Lets others take a folder that this process holds."""
    descriptor = _held.pop(Path(os.path.realpath(folder)), None)
    if descriptor is not None:
        os.close(descriptor)
