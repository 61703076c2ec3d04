"""A Weights & Biases report of runs that were tracked there: verdicts, learning curves, figures, flags, side by side.

    .venv/bin/pip install wandb-workspaces==0.4.13            # W&B's library for reports, only for this script
    .venv/bin/python benchmarks/wandb_report.py NAME …        # runs/NAME, tracked with --track and synchronised
    .venv/bin/python benchmarks/wandb_report.py NAME … --dry-run    # only writes what would be uploaded

A run has the same name in W&B as its folder in runs/. The report takes verdicts and names of metrics from the folder,
and W&B draws the curves and figures of the runs of these names. Uploading needs an account (`wandb login`).
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from report import Found, overview, read_runs  # puts the root of the project on the path, too

from envs.run.args import RunArgs, parse_args
from envs.run.errors import UsageError, check
from envs.run.files import new_folder, write_json
from envs.run.run import run_main

try:
    import wandb_workspaces.reports.v2 as wr
    from wandb_workspaces import expr
except ImportError:
    wr = expr = None


@dataclass
class Args:
    """Assembles a W&B report of tracked runs."""

    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """names of runs, or their folders"""
    title: str = "Option market making"
    """title of the report"""
    wandb_project_name: str = RunArgs.wandb_project_name
    """the W&B project that the runs are in"""
    wandb_entity: str | None = None
    """the W&B entity (team); your own account by default"""
    dry_run: bool = False
    """upload nothing, and need no account: write the report's specification to runs/wandb_report/"""


def blocks(runs: dict[str, Found]) -> list:
    """The report from top to bottom."""
    metrics = dict.fromkeys(name for run in runs.values() for row in run.curve for name in row)
    charts = [name for name in metrics if name.startswith("charts/")]
    losses = [name for name in metrics if name.startswith("losses/")]
    figures = dict.fromkeys(f"benchmark/{path.stem}" for run in runs.values() for path in run.folder.glob("*.png"))
    parts = [wr.H1("Verdicts"), wr.MarkdownBlock(str(overview(runs)))]
    for title, panels in (
        ("Learning curves", [wr.LinePlot(title=name, x="global_step", y=[name]) for name in charts]),
        ("Figures", [wr.MediaBrowser(title=name, media_keys=[name], num_columns=2) for name in sorted(figures)]),
        ("Losses", [wr.LinePlot(title=name, x="global_step", y=[name]) for name in losses]),
        ("Flags", [wr.RunComparer(diff_only="split")]),
    ):
        if panels:
            chosen = wr.Runset(
                name="runs", filters=expr.And(expr.Metric("Name").isin([*runs]))
            )  # of the report's own project
            parts += [wr.H1(title), wr.PanelGrid(runsets=[chosen], panels=panels)]
    for name, run in runs.items():
        if run.result is not None:
            parts += [wr.H1(name), wr.MarkdownBlock(run.result.text())]
    return parts


def specification(report) -> dict:
    """The report as W&B stores it."""
    return report._to_model().spec.model_dump(mode="json", by_alias=True, exclude_none=True)


def main(argv) -> bool:
    args = parse_args(Args, argv)
    check(wr is not None, "W&B's library for reports is missing (pip install wandb-workspaces==0.4.13)")
    runs = read_runs([name if Path(name).is_dir() else f"runs/{name}" for name in args.names])
    settings = {"project": args.wandb_project_name, "title": args.title, "width": "fluid"}
    if args.dry_run:
        report = wr.Report(**settings, entity=args.wandb_entity or "", blocks=blocks(runs))
        folder = new_folder(Path("runs/wandb_report"))
        write_json(folder / "wandb_report.json", specification(report))
        print(f"nothing uploaded; what would be: {folder / 'wandb_report.json'}")
        return True
    try:
        entity = {} if args.wandb_entity is None else {"entity": args.wandb_entity}  # else W&B asks for yours
        report = wr.Report(**settings, **entity, blocks=blocks(runs)).save()
    except Exception as error:  # of many kinds: no account, no network, no such project
        raise UsageError(f"W&B refuses: {error} (--dry-run needs no account)") from None
    print(f"report: {report.url}")
    return True


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
