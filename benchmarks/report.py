"""One page of several runs: their verdicts side by side, their learning curves together, then each of them.

    python benchmarks/report.py runs/A runs/B …

The page is self-contained (no script, no request to anywhere) and goes to runs/report/report.html (or -2, -3 …). Every
run folder has a report.html of its own; this one is for comparing.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tyro

from envs.benchmark.report import Benchmark, Table
from envs.run import page
from envs.run.args import parse_args
from envs.run.errors import check
from envs.run.files import new_folder, read_json, read_metrics, replacing
from envs.run.provenance import read_origin
from envs.run.run import run_main

MOST = 64  # runs of a page


@dataclass
class Args:
    """Makes one page of several runs."""

    runs: tyro.conf.Positional[tuple[str, ...]] = ()
    """run folders"""


class Found(NamedTuple):
    """A run folder: its flags, what made it, its learning curve, and its benchmark once there is one."""

    folder: Path
    args: dict
    origin: list[dict]
    curve: list[dict]
    result: Benchmark | None


def read_run(folder: Path) -> Found:
    """Reads a run folder; a link in it is not the run's, and is refused.

    Raises:
        UsageError: no run folder, or a damaged file in it.
    """
    check(folder.is_dir() and (folder / "args.json").is_file(), f"{folder}: not a run folder, it has no args.json")
    for name in ("args.json", "metrics.csv"):
        check(not (folder / name).is_symlink(), f"{folder / name}: a link (a file of the run's own)")
    args = read_json(folder / "args.json")
    check(isinstance(args, dict), f"{folder / 'args.json'}: damaged")
    result = Benchmark.read(folder) if (folder / "benchmark.json").is_file() else None
    return Found(folder, args, read_origin(folder), read_metrics(folder / "metrics.csv"), result)


def read_runs(folders: Sequence[str]) -> dict[str, Found]:
    """The runs in these folders by name; by path, where names are not enough to tell them apart.

    Raises:
        UsageError: none, too many, one twice, or one that cannot be read.
    """
    check(0 < len(folders) <= MOST, f"run folders are {len(folders)} (at least 1, at most {MOST})")
    paths = [Path(folder).resolve() for folder in folders]
    check(len(set(paths)) == len(paths), "a run folder is named twice")
    names = [path.name for path in paths]
    names = names if len(set(names)) == len(names) else [*map(str, paths)]
    return {name: read_run(Path(folder)) for name, folder in zip(names, folders, strict=True)}


def overview(runs: Mapping[str, Found]) -> Table:
    """A row for each run: verdict, objective, and the agent's advantage over every contestant that any run has."""
    results = {name: run.result for name, run in runs.items() if run.result is not None}
    others = dict.fromkeys(other for result in results.values() for other in result.advantages)
    body = []
    for name, run in runs.items():
        verdict, objective, advantages = "no benchmark yet", "", {}
        if run.result is not None:
            verdict = "no verdict" if run.result.withdrawn else "passed" if run.result.passed else "FAILED"
            agent = run.result.rows.get("agent", {})
            objective = f"{agent['objective']:.4f}" if "objective" in agent else ""
            advantages = run.result.advantages
        body.append([name, verdict, objective, *(str(advantages.get(other, "")) for other in others)])
    return Table(["run", "verdict", "objective", *(f"agent − {other}" for other in others)], body)


def differing(runs: Mapping[str, Found]) -> str:
    """The flags that are not the same in all runs."""
    flags = dict.fromkeys(flag for run in runs.values() for flag in run.args)
    rows = [[flag, *(run.args.get(flag, "") for run in runs.values())] for flag in flags]
    rows = [row for row in rows if len(set(map(str, row[1:]))) > 1]
    return page.table(["flag", *runs], rows) if rows else ""


def main(argv) -> bool:
    args = parse_args(Args, argv)
    runs = read_runs(args.runs)
    each = []
    for name, run in runs.items():
        summary = [run.result.html()] if run.result is not None else []
        each.append(page.folded(name, *summary, *page.run_parts(run.folder, run.args, run.origin)))
    parts = [page.table(*overview(runs)), differing(runs), "<h2>Learning curves</h2>"]
    parts += [page.curves({name: run.curve for name, run in runs.items()}), "<h2>The runs</h2>", *each]
    title = f"{len(runs)} runs" if len(runs) > 1 else next(iter(runs))
    folder = new_folder(Path("runs/report"))
    with replacing(folder / "report.html") as temporary:
        temporary.write_text(page.page(title, *parts), encoding="utf-8")
    print(f"report: {folder / 'report.html'}")
    return True


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
