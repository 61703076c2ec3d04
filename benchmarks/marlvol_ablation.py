"""What makes MARLVol accurate: phase 0 with one thing changed at a time, every variant given the same time.

    python benchmarks/marlvol_ablation.py                  all variants, three seeds, 100 seconds of training each

How many iterations fit into the time is measured first, by a short run under the same load; then the run has so many,
with the learning rate annealed over them. Writes runs/marlvol_ablation/ablation.json and .md (or -2, -3 …).
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

from as_user import read_benchmark, run_phase  # puts the root of the project on the path, too

from envs.benchmark.report import markdown_table
from envs.run.args import check_range, parse_args
from envs.run.errors import check
from envs.run.files import new_folder, read_metrics, write_json
from envs.run.run import run_main

DIFFERENCE = ["--reward", "difference"]
VARIANTS = {
    "default (shared reward)": [],
    "difference reward": DIFFERENCE,
    "antithetic exploration off": ["--no-antithetic"],
    "critic as the baseline": ["--baseline", "critic"],
    "errors not centred": ["--no-centre-errors"],
    "increments of its own for every run (critic, not centred)": ["--no-common-random-numbers"],
    "no average of the weights": ["--average", "1"],
    "60 basis players": ["--num-basis", "60"],
    "basis players off, shared reward": ["--no-basis-players"],
    "basis players off, difference reward": ["--no-basis-players", *DIFFERENCE],
    "reference model off": ["--reference", "none"],
    "the paper's preset": ["--preset", "paper"],
}


@dataclass
class Args:
    """Runs phase 0 in several variants, each with the same time to train, and tabulates their errors."""

    seconds: float = 100.0
    """of training, each run"""
    seeds: tuple[int, ...] = (1, 2, 3)
    """seeds of the runs"""
    variants: tuple[str, ...] = tuple(VARIANTS)
    """which of them"""
    jobs: int = 2
    """runs side by side"""


def seconds_per_iteration(folder: Path, iterations: int) -> float:
    """The time that an iteration of this run took."""
    last = read_metrics(folder / "metrics.csv")[-1]
    return last["global_step"] / iterations / last["charts/SPS"]


def train(args: Args, variant: str, seed: int) -> dict:
    """Iterations, seconds and errors of one run."""
    flags = ["--seed", str(seed), "--num-evaluations", "1", "--exp-name", "ablation", *VARIANTS[variant]]
    label = f"{variant}, seed {seed}"
    short = run_phase(
        "phase0_marlvol_calibration.py", [*flags, "--num-iterations", "2", "--eval-paths", "12000"], label
    )
    iterations = max(1, round(args.seconds / seconds_per_iteration(short, 2)))
    folder = run_phase("phase0_marlvol_calibration.py", [*flags, "--num-iterations", str(iterations)], label)
    result = read_benchmark(folder)
    seconds = iterations * seconds_per_iteration(folder, iterations)
    return {"variant": variant, "seed": seed, "iterations": iterations, "seconds": seconds, **result["rows"]["agent"]}


def main(argv) -> bool:
    args = parse_args(Args, argv)
    check(len(set(args.seeds)) == len(args.seeds) > 0, "--seeds needs one or more different ones")
    check(set(args.variants) <= set(VARIANTS), f"--variants are {', '.join(VARIANTS)}")
    check_range(args, 1, 64, "jobs")
    check_range(args, 1, 1e5, "seconds")
    pairs = list(product(args.variants, args.seeds))
    with ThreadPoolExecutor(args.jobs) as pool:
        rows = list(pool.map(lambda pair: train(args, *pair), pairs))
    folder = new_folder(Path("runs/marlvol_ablation"))
    write_json(folder / "ablation.json", {"args": asdict(args), "rows": rows})
    body = []
    for variant in args.variants:
        of = [row for row in rows if row["variant"] == variant]
        errors = ", ".join(f"{row['rmse']:.3f}" for row in of)
        mean = sum(row["rmse"] for row in of) / len(of)
        worst = max(row["worst"] for row in of)
        iterations = sum(row["iterations"] for row in of) / len(of)
        seconds = sum(row["seconds"] for row in of) / len(of)
        body.append([variant, f"{mean:.3f}", errors, f"{worst:.2f}", f"{iterations:.0f}", f"{seconds:.0f}"])
    header = [
        "variant",
        "mean RMSE",
        f"seeds {', '.join(map(str, args.seeds))}",
        "largest error",
        "iterations",
        "seconds",
    ]
    table = markdown_table(header, body)
    (folder / "ablation.md").write_text(table + "\n", encoding="utf-8")
    print(f"\n{table}\n\nerrors in vol points; report: {folder}")
    return True


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
