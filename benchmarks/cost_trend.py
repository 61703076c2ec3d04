"""As trading gets dearer, the agent hedges less (Whalley & Wilmott 1997: bands widen like the cube root of the cost).

Trains phase 2 once for each cost rate. Each agent starts as the constant band that is best at its own cost, so that the
trend is there before it has learnt anything: what it adds is the distance to the tuned band, in the table and figure.

    python benchmarks/cost_trend.py                        six agents, two at a time: about 20 minutes on two cores
    python benchmarks/cost_trend.py --total-timesteps 1000000 --cost-rates 1e-4 1e-3

Each agent leaves its own run folder under runs/; figure and data go to runs/cost_trend/ (or -2, -3 …). Exit code 0: the
agent trades less and keeps more delta at every step up of the cost, and is nowhere worse than the tuned constant band.
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from as_user import read_benchmark, run_phase  # puts the root of the project on the path, too

from envs.benchmark.report import Estimate, Table
from envs.figures.hedging import cost_trend
from envs.run.args import check_range, parse_args
from envs.run.errors import check
from envs.run.files import new_folder, write_json
from envs.run.run import run_main
from phase2_multi_order_sac import Args as Phase2Args


@dataclass
class Args:
    """Trains phase 2 for several cost rates and draws how much is hedged."""

    cost_rates: tuple[float, ...] = (5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3)
    """proportional costs per unit of currency traded (1e-4 = 1 bp)"""
    total_timesteps: int = Phase2Args.total_timesteps
    """environment steps of each run"""
    eval_episodes: int = Phase2Args.eval_episodes
    """episodes of each benchmark"""
    seed: int = 1
    """seed of every run"""
    jobs: int = 2
    """runs side by side"""


def train(args: Args, cost_rate: float) -> dict:
    """Runs the script as a user would; returns its benchmark.json."""
    name = f"cost_trend_{1e4 * cost_rate:g}bp"
    flags = ["--exp-name", name, "--seed", str(args.seed), "--cost-rate", str(cost_rate)]
    flags += ["--total-timesteps", str(args.total_timesteps), "--eval-episodes", str(args.eval_episodes)]
    folder = run_phase("phase2_multi_order_sac.py", flags, f"{1e4 * cost_rate:g} bp")
    return read_benchmark(folder)


def trend_table(results: dict[float, dict]) -> Table:
    """Hedging of agent and tuned constant band at each cost rate; `results` are their benchmark.json."""
    header = [
        "cost rate",
        "agent: shares traded",
        "|net delta|",
        "band: shares traded",
        "|net delta|",
        "agent − band [95 %]",
    ]
    body = []
    for rate in sorted(results):
        agent = results[rate]["rows"]["agent"]
        band = results[rate]["rows"]["constant band, tuned"]
        ahead = Estimate(**results[rate]["advantages"]["constant band, tuned"])
        traded = [f"{agent['turnover']:.2f}", agent["net_delta"], f"{band['turnover']:.2f}", band["net_delta"]]
        body.append([f"{1e4 * rate:g} bp", *traded, str(ahead)])
    return Table(header, body)


def main(argv) -> bool:
    args = parse_args(Args, argv)
    check(len(set(args.cost_rates)) == len(args.cost_rates) > 1, "--cost-rates needs two or more different ones")
    check_range(args, 1, 64, "jobs")
    check(all(0 < rate <= 0.5 for rate in args.cost_rates), f"--cost-rates are {args.cost_rates} (0 to 0.5)")
    with ThreadPoolExecutor(args.jobs) as pool:
        benchmarks = list(pool.map(lambda rate: train(args, rate), args.cost_rates))
    folder = new_folder(Path("runs/cost_trend"))
    rows = {rate: result["rows"] for rate, result in zip(args.cost_rates, benchmarks, strict=True)}
    write_json(folder / "cost_trend.json", {str(rate): row for rate, row in rows.items()})
    cost_trend(folder / "cost_trend.png", rows, f"Phase 2: hedging against its cost (seed {args.seed})")
    table = str(trend_table(dict(zip(args.cost_rates, benchmarks, strict=True))))
    (folder / "cost_trend.md").write_text(table + "\n", encoding="utf-8")
    print(f"\n{table}\n")
    turnover = [rows[rate]["agent"]["turnover"] for rate in sorted(rows)]
    left = [rows[rate]["agent"]["net_delta"] for rate in sorted(rows)]
    trend = turnover == sorted(turnover, reverse=True) and left == sorted(left)
    worse = [result["advantages"]["constant band, tuned"]["high"] < 0 for result in benchmarks]  # significantly
    print(f"trades less and keeps more delta as the cost grows: {'yes' if trend else 'NO'}")
    print(f"nowhere worse than the tuned constant band: {'NO' if any(worse) else 'yes'}; figure: {folder}")
    return trend and not any(worse)


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
