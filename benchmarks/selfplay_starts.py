"""Do makers that learn from each other compete or collude, and does it matter where they start?

Runs phase 4 from several half-spreads and seeds, without the best response, and draws the edges over training.

    python benchmarks/selfplay_starts.py                   the default market from 0.9 and 1.6 vol points, three seeds
    python benchmarks/selfplay_starts.py --neutral         nothing risked, hedging free; makers who do not look ahead
    python benchmarks/selfplay_starts.py --neutral --flags="--gamma 1"    makers who do
    python benchmarks/selfplay_starts.py --neutral --flags="--dynamics gbm"   in another model than heston

Each run leaves its own folder under runs/; figure and data go to runs/selfplay_starts/ (or -2, -3 …). Exit code 0:
every run passed its benchmark, and the final edges of a seed agree within 4 %.
"""

import shlex
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
from as_user import read_benchmark, run_phase  # puts the root of the project on the path, too

from envs.benchmark.report import Table
from envs.figures.selfplay import edge_over_training
from envs.run.args import check_range, parse_args
from envs.run.errors import check
from envs.run.files import new_folder, read_metrics, write_json
from envs.run.run import run_main

# Nothing is chance there, so that small exploration and small updates come nearer. A maker that also meets classical
# ones, whose quotes are far from Nash in heston, and that reacts weakly to rivals, ends between the answers.
NEUTRAL = shlex.split(
    "--risk-aversion 0 --cost-rate 0 --gamma 0 --classical-share 0 --min-std 0.05 --episodes 2 --num-minibatches 4 "
    "--average 0.1"
)


@dataclass
class Args:
    """Runs phase 4 from several starts and draws how the edges converge."""

    starts: tuple[float, ...] | None = None
    """half-spreads that training starts from, vol points; 0.9 and 1.6, with --neutral 0.5 and 1.2"""
    neutral: bool = False
    """where Nash and monopoly are known: no risk aversion, no cost of hedging; discount factor 0"""
    seeds: tuple[int, ...] = (1, 2, 3)
    """seeds of the runs"""
    flags: str = ""
    """further flags of phase4_selfplay.py, as in --flags="--gamma 1" (with the equals sign)"""
    jobs: int = 2
    """runs side by side"""


def train(args: Args, start: float, seed: int) -> tuple[dict, list[dict]]:
    """Runs the script as a user would; returns its benchmark.json and metrics.csv."""
    flags = ["--exp-name", f"start_{start:g}", "--seed", str(seed), "--start-edge", str(start), "--no-exploitability"]
    flags += [*(NEUTRAL if args.neutral else ()), *shlex.split(args.flags)]
    folder = run_phase("phase4_selfplay.py", flags, f"start {start:g}, seed {seed}")
    return read_benchmark(folder), read_metrics(folder / "metrics.csv")


def final(result: dict, neutral: bool) -> dict:
    """Where a run ended: its mean edges and objective; with `neutral` how far every edge is off Nash, as a share."""
    row = {"passed": result["passed"], "objective": result["rows"]["agent"]["objective"]}
    row |= result["settings"]["competition"]
    if neutral:
        _, body = result["tables"]["edges over the reference price, makers that are all the agent"]
        edges = {name: np.array(values) for name, *values in body}
        off = np.abs(edges["agent"] - edges["Nash"]) / np.maximum(np.abs(edges["Nash"]), 1.0)
        row |= {"off_nash": off.mean(), "most_off_nash": off.max()}
    return row


def starts_table(rows: list[dict], neutral: bool) -> Table:
    """Where each run ended; with `neutral` beside what is known there."""
    header = ["start", "seed", "final edge, mean", "objective", "passed"]
    header += ["off Nash, mean", "at most", "collusion index", "exploitable in closed form"] if neutral else []
    body = []
    for row in rows:
        cells = [f"{row['start']:g}", str(row["seed"]), f"{row['edges']:.4f}", f"{row['objective']:.3f}"]
        cells.append("yes" if row["passed"] else "no")
        if neutral:
            cells += [f"{100 * row[name]:.2f} %" for name in ("off_nash", "most_off_nash")]
            cells += [f"{row['collusion']:+.3f}", f"{100 * row['exploitability']:.3f} %"]
        body.append(cells)
    return Table(header, body)


def main(argv) -> bool:
    args = parse_args(Args, argv)
    if args.starts is None:
        args.starts = (0.5, 1.2) if args.neutral else (0.9, 1.6)
    check(len(set(args.starts)) == len(args.starts) > 1, "--starts needs two or more different ones")
    check(len(set(args.seeds)) == len(args.seeds) > 0, "--seeds needs one or more different ones")
    check_range(args, 1, 64, "jobs")
    pairs = list(product(args.starts, args.seeds))
    with ThreadPoolExecutor(args.jobs) as pool:
        done = dict(zip(pairs, pool.map(lambda pair: train(args, *pair), pairs), strict=True))
    folder = new_folder(Path("runs/selfplay_starts"))
    rows = [
        {"start": start, "seed": seed, **final(result, args.neutral)} for (start, seed), (result, _) in done.items()
    ]
    write_json(folder / "selfplay_starts.json", rows)
    curves = {f"from {start:g}, seed {seed}": curve for (start, seed), (_, curve) in done.items()}
    title = next(iter(done.values()))[0]["title"]
    known = rows[0]
    edge_over_training(folder / "selfplay_starts.png", curves, known["nash"], known["monopoly"], title)
    table = str(starts_table(rows, args.neutral))
    (folder / "selfplay_starts.md").write_text(table + "\n", encoding="utf-8")
    levels = f"Nash {known['nash']:.4f}, monopoly {known['monopoly']:.4f} vol points"
    print(f"\n{levels} on average over options and sides, where nothing is risked\n\n{table}\n")
    apart = {}
    for seed in args.seeds:
        edges = [row["edges"] for row in rows if row["seed"] == seed]
        apart[seed] = max(edges) / min(edges) - 1
        print(f"seed {seed}: final edges {100 * apart[seed]:.2f} % apart")
    print(f"figure: {folder}")
    return all(row["passed"] for row in rows) and max(apart.values()) <= 0.04


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
