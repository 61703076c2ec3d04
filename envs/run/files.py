"""Files of a run: written whole or not at all, checkpoints read without executing anything in them."""

import contextlib
import csv
import json
import math
import os
import pickle
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

try:
    import resource
except ImportError:  # on Windows
    resource = None

from envs.run.errors import UsageError, check
from envs.run.ranks import from_rank_0, rank, world_size


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


def load_weights(module: torch.nn.Module, state, source: str) -> None:
    """Gives `module` the weights `state` of a checkpoint; `source` names it in errors.

    Raises:
        UsageError: other shapes, or NaN.
    """
    try:
        module.load_state_dict(state)
    except (RuntimeError, AttributeError, TypeError):
        raise UsageError(f"{source}: does not fit this script, its networks have other shapes") from None
    check(all(x.isfinite().all() for x in module.state_dict().values()), f"{source}: NaN in its networks")


def read_metrics(path: Path, raw: bool = False) -> list[dict]:
    """Rows of a metrics.csv as numbers, or as the strings they are (`raw`); empty if there is none.

    Raises:
        UsageError: a damaged file.
    """
    if not path.is_file():
        return []
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (ValueError, csv.Error):
        raise UsageError(f"{path}: damaged") from None
    return rows if raw else _as_numbers(rows, path)


def _as_numbers(rows: list[dict], path: Path) -> list[dict]:
    try:
        return [{name: float(value) for name, value in row.items()} for row in rows]
    except (ValueError, TypeError):  # too few columns or too many, or no number
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
    if resource is None:
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30


def new_folder(path: Path) -> Path:
    """Creates `path`, or `path-2`, `path-3` … if it exists (two runs may start in the same second).

    Under torchrun rank 0 does, and the others learn its name."""
    if rank() > 0:
        return from_rank_0(None)
    folder = _new_folder(path)
    return folder if world_size() == 1 else from_rank_0(folder)


def _new_folder(path: Path) -> Path:
    candidate, n = path, 1
    while True:
        try:
            candidate.mkdir(parents=True)
            return candidate
        except FileExistsError:
            n += 1
            candidate = path.with_name(f"{path.name}-{n}")
