"""What does the agent of phase 3 owe to its start, an imitation of the strongest classical maker?

Trains it from there and from a neutral start (one constant half-spread, no skew, no tilts), in the same steps and in
four times as many.

    python benchmarks/ablation_start.py                    three runs for each seed, two at a time

Each run leaves its own folder under runs/; figure and data go to runs/ablation_start/ (or -2, -3 …). Exit code 0: every
agent beats Avellaneda–Stoikov, lower 95 % bound > 0.
"""

import shlex
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from as_user import read_benchmark, run_phase  # puts the root of the project on the path, too

from envs.benchmark.makers import AVELLANEDA_STOIKOV
from envs.benchmark.report import Estimate, Table
from envs.figures import style
from envs.run.args import check_range, parse_args
from envs.run.errors import check
from envs.run.files import new_folder, read_metrics, write_json
from envs.run.run import run_main
from phase3_spread_vs_bs import Args as Phase3Args

VARIANTS = {"classic": ("classic", 1), "neutral": ("neutral", 1), "neutral, four times as long": ("neutral", 4)}
LOOKS = dict(zip(VARIANTS, ((style.AGENT, "-"), (style.OTHER, "-"), (style.OTHER, "--")), strict=True))


@dataclass
class Args:
    """Trains phase 3 from several starts and draws the learning curves."""

    total_timesteps: int = Phase3Args.total_timesteps
    """environment steps of each run but the long ones"""
    eval_episodes: int = Phase3Args.eval_episodes
    """episodes of each benchmark"""
    seeds: tuple[int, ...] = (1, 2, 3)
    """seeds of the runs"""
    flags: str = ""
    """further flags of phase3_spread_vs_bs.py, as in --flags="--dynamics garch" (with the equals sign)"""
    jobs: int = 2
    """runs side by side"""


def train(args: Args, variant: str, seed: int) -> dict:
    """Figures and learning curve of one run."""
    start, times = VARIANTS[variant]
    steps = times * args.total_timesteps
    flags = ["--exp-name", f"start_{start}_{times}", "--seed", str(seed), "--start", start, *shlex.split(args.flags)]
    flags += ["--total-timesteps", str(steps), "--eval-episodes", str(args.eval_episodes)]
    folder = run_phase("phase3_spread_vs_bs.py", flags, f"start {variant}, seed {seed}")
    result = read_benchmark(folder)
    classics = {name: row for name, row in result["rows"].items() if name != "agent"}
    strongest = max(classics, key=lambda name: classics[name]["objective"])
    return {
        "variant": variant,
        "seed": seed,
        "steps": steps,
        "objective": result["rows"]["agent"]["objective"],
        "strongest": strongest,
        "advantages": {name: result["advantages"][name] for name in (AVELLANEDA_STOIKOV, strongest)},
        "curve": read_metrics(folder / "metrics.csv"),
        "title": result["title"],
    }


def learning_curves(path: Path, rows: list[dict]) -> None:
    """Validation objective of every run over its steps, beside Avellaneda–Stoikov's on the same episodes."""
    figure, axes = style.new()
    first = rows[0]["curve"][0]
    baseline = first["charts/objective"] - first["charts/gain_over_avellaneda_stoikov"]
    for variant, (colour, line) in LOOKS.items():
        own = [row["curve"] for row in rows if row["variant"] == variant]
        for i, curve in enumerate(own):
            steps = [row["global_step"] / 1e6 for row in curve]
            objectives = [row["charts/objective"] for row in curve]
            axes.plot(steps, objectives, line, color=colour, label=None if i else f"start: {variant}")
    axes.axhline(baseline, color=style.BASELINE, linestyle=":", label="Avellaneda–Stoikov, tuned")
    axes.set_ylim(bottom=baseline - 2.0)  # a neutral start can be far below
    axes.set(xlabel="environment steps (millions)", ylabel="objective on validation episodes (currency)")
    style.legend(axes, "lower right")
    axes.set_title(f"{rows[0]['title']}: training from another start", fontsize=10)
    style.save(figure, path)


def starts_table(rows: list[dict]) -> Table:
    """Where each run ended, and how far it is above the named baseline and the strongest classical maker."""
    body = []
    for row in rows:
        ahead = [Estimate(**row["advantages"][name]).short() for name in (AVELLANEDA_STOIKOV, row["strongest"])]
        steps = f"{row['steps'] / 1e6:.3g} million"
        body.append([row["variant"], str(row["seed"]), steps, f"{row['objective']:.2f}", *ahead, row["strongest"]])
    header = ["start", "seed", "steps", "objective", "agent − Avellaneda–Stoikov", "agent − strongest classic"]
    return Table([*header, "the strongest classic"], body)


def main(argv) -> bool:
    args = parse_args(Args, argv)
    check(len(set(args.seeds)) == len(args.seeds) > 0, "--seeds needs one or more different ones")
    check_range(args, 1, 64, "jobs")
    pairs = list(product(VARIANTS, args.seeds))
    with ThreadPoolExecutor(args.jobs) as pool:
        rows = list(pool.map(lambda pair: train(args, *pair), pairs))
    folder = new_folder(Path("runs/ablation_start"))
    write_json(folder / "ablation_start.json", rows)
    learning_curves(folder / "ablation_start.png", rows)
    table = str(starts_table(rows))
    (folder / "ablation_start.md").write_text(table + "\n", encoding="utf-8")
    print(f"\n{table}\n\nfigure: {folder}")
    return all(row["advantages"][AVELLANEDA_STOIKOV]["low"] > 0 for row in rows)


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
