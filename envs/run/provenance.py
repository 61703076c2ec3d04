"""Where a run's numbers come from: commit, versions and machine."""

import os
import platform
import re
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import torch

from envs.run.errors import check
from envs.run.files import read_json

ROOT = Path(__file__).resolve().parent.parent.parent
MOST = 1000  # commands that have a part in a run


def provenance(*paths: str) -> dict[str, str]:
    """Date, commit, versions and machine.

    Args:
        paths: files and folders of the project whose changes make it another commit's code; all of it by default.
    """
    head = git("rev-parse", "--short", "HEAD")
    changes = git("status", "--porcelain", "--", *paths)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": f"{head} with changes" if head and changes else head or "unknown",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}",
        "machine": machine(),
    }


def read_origin(folder: Path) -> list[dict[str, str]]:
    """`provenance` of every command that had a part in a run, from its origin.json; a link is not the run's.

    Raises:
        UsageError: a damaged file.
    """
    path = folder / "origin.json"
    if path.is_symlink() or not path.is_file():
        return []
    content = read_json(path)
    fits = isinstance(content, list) and len(content) <= MOST
    fits = fits and all(isinstance(entry, dict) and len(entry) <= MOST for entry in content)
    check(fits, f"{path}: damaged")
    return content


def git(*arguments: str) -> str:
    """The output of a git command in the project's root; empty without git or a repository."""
    if shutil.which("git") is None:
        return ""
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def machine() -> str:
    """Name of the processor, number of its cores, and the GPU if there is one."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.+)", info.read_text(encoding="utf-8")) if info.is_file() else []
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores{gpu}"
