"""Does the agent still earn as takers learn what options are worth, and do the classical makers?

Trains phase 3 at every share of informed takers, and evaluates the agent of the default share at every other one. All
classical makers are tuned at each share.

    python benchmarks/informed_sweep.py                    five agents, two at a time: about 20 minutes on two cores
    python benchmarks/informed_sweep.py --shares 0 1 --total-timesteps 1000000

Each run leaves its own folder under runs/; figure and data go to runs/informed_sweep/ (or -2, -3 …). Exit code 0: the
agent trained at each share beats Avellaneda–Stoikov there, lower 95 % bound > 0, at every share.
"""

import shlex
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from as_user import read_benchmark, run_phase  # puts the root of the project on the path, too

from envs.benchmark.makers import AVELLANEDA_STOIKOV
from envs.benchmark.report import Estimate, Table
from envs.figures.quoting import informed_sweep
from envs.run.args import check_range, parse_args
from envs.run.errors import check
from envs.run.files import new_folder, write_json
from envs.run.run import run_main
from phase3_spread_vs_bs import Args as Phase3Args

DEFAULT = Phase3Args.informed_share
HERE = "agent, trained at each share"
ELSEWHERE = f"agent, trained at {DEFAULT:g}"


@dataclass
class Args:
    """Trains phase 3 for several shares of informed takers and draws what every maker earns."""

    shares: tuple[float, ...] = (0.0, 0.1, 0.2, 0.5, 1.0)
    """shares of the takers who compare quotes with the fair value"""
    total_timesteps: int = Phase3Args.total_timesteps
    """environment steps of each run"""
    eval_episodes: int = Phase3Args.eval_episodes
    """episodes of each benchmark"""
    seed: int = 1
    """seed of every run"""
    flags: str = ""
    """further flags of phase3_spread_vs_bs.py, as in --flags="--dynamics garch" (with the equals sign)"""
    jobs: int = 2
    """runs side by side"""


def run(args: Args, share: float, name: str, *flags: str) -> Path:
    """Runs the script as a user would, with that share of informed takers; its run folder."""
    flags = [*flags, "--exp-name", f"{name}_{share:g}", "--informed-share", str(share), *shlex.split(args.flags)]
    flags += ["--eval-episodes", str(args.eval_episodes)]
    return run_phase("phase3_spread_vs_bs.py", flags, f"{name} at {share:g}")


def train(args: Args, share: float) -> Path:
    return run(args, share, "informed", "--seed", str(args.seed), "--total-timesteps", str(args.total_timesteps))


def contestants(trained: dict, evaluated: dict) -> dict[str, dict]:
    """By name, "objective" and "pnl" of every contestant at one share, and "ahead" of Avellaneda–Stoikov for agents."""
    rows = {HERE: trained["rows"]["agent"], ELSEWHERE: evaluated["rows"]["agent"], **trained["rows"]}
    del rows["agent"]
    found = {name: {"objective": row["objective"], "pnl": row["pnl_mean"]} for name, row in rows.items()}
    found[HERE]["ahead"] = trained["advantages"][AVELLANEDA_STOIKOV]
    found[ELSEWHERE]["ahead"] = evaluated["advantages"][AVELLANEDA_STOIKOV]
    return found


def sweep_table(sweep: dict[float, dict[str, dict]]) -> Table:
    """Objective and mean P&L of every contestant at each share, and how far the agents are ahead of the baseline."""
    body = []
    for name in next(iter(sweep.values())):
        cells = (rows.get(name) for rows in sweep.values())
        body.append([name, *("" if x is None else f"{x['objective']:.2f}; {x['pnl']:.2f}" for x in cells)])
    for name in (HERE, ELSEWHERE):
        ahead = (Estimate(**rows[name]["ahead"]).short() for rows in sweep.values())
        body.append([f"{name}: objective above Avellaneda–Stoikov's", *ahead])
    return Table(["objective; mean P&L", *(f"{100 * share:g} % informed" for share in sweep)], body)


def main(argv) -> bool:
    args = parse_args(Args, argv)
    check(len(set(args.shares)) == len(args.shares) > 1, "--shares needs two or more different ones")
    check(all(0 <= share <= 1 for share in args.shares), f"--shares are {args.shares} (0 to 1)")
    check_range(args, 1, 64, "jobs")
    shares = sorted(args.shares)
    others = [share for share in shares if share != DEFAULT]
    with ThreadPoolExecutor(args.jobs) as pool:
        folders = dict(zip([DEFAULT, *others], pool.map(lambda x: train(args, x), [DEFAULT, *others]), strict=True))
        agent = str(folders[DEFAULT])
        moved = list(pool.map(lambda x: run(args, x, "informed_elsewhere", "--evaluate", agent), others))
    evaluated = {DEFAULT: folders[DEFAULT], **dict(zip(others, moved, strict=True))}
    sweep = {x: contestants(read_benchmark(folders[x]), read_benchmark(evaluated[x])) for x in shares}
    folder = new_folder(Path("runs/informed_sweep"))
    write_json(folder / "informed_sweep.json", sweep)
    title = read_benchmark(folders[DEFAULT])["title"]
    informed_sweep(folder / "informed_sweep.png", sweep, f"{title}, seed {args.seed}")
    table = str(sweep_table(sweep))
    (folder / "informed_sweep.md").write_text(table + "\n", encoding="utf-8")
    ahead = all(rows[HERE]["ahead"]["low"] > 0 for rows in sweep.values())
    print(f"\n{table}\n\nahead of Avellaneda–Stoikov at every share: {'yes' if ahead else 'NO'}; figure: {folder}")
    return ahead


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
