"""Does the agent still earn as takers learn what options are worth, and do the classical makers?

Trains phase 3 at every share of informed takers, or of toxic ones, and evaluates the agent of the default share at
every other one. All classical makers are tuned at each share.

    python benchmarks/informed_sweep.py                    five agents, two at a time: about 20 minutes on two cores
    python benchmarks/informed_sweep.py --takers toxic     the same for takers who know the next step's variance
    python benchmarks/informed_sweep.py --shares 0 1 --total-timesteps 1000000

Each run leaves its own folder under runs/; figure and data go to runs/informed_sweep/ (or -2, -3 …). Exit code 0: the
agent trained at each share beats Avellaneda–Stoikov there, lower 95 % bound > 0, at every share.
"""

import shlex
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from as_user import read_benchmark, run_phase  # puts the root of the project on the path, too

from envs.benchmark.makers import AVELLANEDA_STOIKOV
from envs.benchmark.report import Estimate, Table
from envs.figures.quoting import taker_sweep
from envs.run.args import check_range, parse_args
from envs.run.errors import check
from envs.run.files import new_folder, write_json
from envs.run.run import run_main
from phase3_spread_vs_bs import Args as Phase3Args

HERE = "agent, trained at each share"
SHARES = {"informed": (0.0, 0.1, 0.2, 0.5, 1.0), "toxic": (0.0, 0.1, 0.2, 0.4)}


@dataclass
class Args:
    """Trains phase 3 for several shares of knowing takers and draws what every maker earns and how wide it quotes."""

    takers: Literal["informed", "toxic"] = "informed"
    """whose share is varied: those who compare quotes with the fair value, or those who know the next variance, too"""
    shares: tuple[float, ...] | None = None
    """their shares of all takers; by default 0 0.1 0.2 0.5 1, of toxic ones 0 0.1 0.2 0.4"""
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

    @property
    def default(self) -> float:
        """The share of phase 3's default market."""
        return getattr(Phase3Args, f"{self.takers}_share")


def run(args: Args, share: float, name: str, *flags: str) -> Path:
    """Runs the script as a user would, with that share of these takers; its run folder."""
    name = f"{args.takers}{name}"
    flags = [*flags, "--exp-name", f"{name}_{share:g}", f"--{args.takers}-share", str(share), *shlex.split(args.flags)]
    flags += ["--eval-episodes", str(args.eval_episodes)]
    return run_phase("phase3_spread_vs_bs.py", flags, f"{name} at {share:g}")


def train(args: Args, share: float) -> Path:
    return run(args, share, "", "--seed", str(args.seed), "--total-timesteps", str(args.total_timesteps))


def contestants(trained: dict, evaluated: dict, elsewhere: str) -> dict[str, dict]:
    """By name, what every contestant earns at one share and its half-spread, and "ahead" of Avellaneda–Stoikov for
    agents; `elsewhere` is the name of the one that was trained at the default share."""
    rows = {HERE: trained["rows"]["agent"], elsewhere: evaluated["rows"]["agent"], **trained["rows"]}
    del rows["agent"]
    keys = {"objective": "objective", "pnl": "pnl_mean", "half_spread": "half_spread"}
    found = {name: {key: row[own] for key, own in keys.items()} for name, row in rows.items()}
    found[HERE]["ahead"] = trained["advantages"][AVELLANEDA_STOIKOV]
    found[elsewhere]["ahead"] = evaluated["advantages"][AVELLANEDA_STOIKOV]
    return found


def sweep_table(sweep: dict[float, dict[str, dict]], takers: str) -> Table:
    """What every contestant earns at each share, its half-spread, and how far agents are ahead of the baseline."""
    body = []
    cell = "{objective:.2f}; {pnl:.2f}; {half_spread:.2f}"
    names = next(iter(sweep.values()))
    for name in names:
        body.append([name, *(cell.format(**rows[name]) if name in rows else "" for rows in sweep.values())])
    for name in names:
        if "ahead" in names[name]:
            ahead = (Estimate(**rows[name]["ahead"]).short() for rows in sweep.values())
            body.append([f"{name}: objective above Avellaneda–Stoikov's", *ahead])
    return Table(["objective; mean P&L; half-spread", *(f"{100 * share:g} % {takers}" for share in sweep)], body)


def main(argv) -> bool:
    args = parse_args(Args, argv)
    shares = sorted(SHARES[args.takers] if args.shares is None else args.shares)
    check(len(set(shares)) == len(shares) > 1, "--shares needs two or more different ones")
    check(all(0 <= share <= 1 for share in shares), f"--shares are {args.shares} (0 to 1)")
    check_range(args, 1, 64, "jobs")
    others = [share for share in shares if share != args.default]
    first = [args.default, *others]
    with ThreadPoolExecutor(args.jobs) as pool:
        folders = dict(zip(first, pool.map(lambda x: train(args, x), first), strict=True))
        agent = str(folders[args.default])
        moved = list(pool.map(lambda x: run(args, x, "_elsewhere", "--evaluate", agent), others))
    evaluated = {args.default: folders[args.default], **dict(zip(others, moved, strict=True))}
    results = {x: (read_benchmark(folders[x]), read_benchmark(evaluated[x])) for x in shares}
    elsewhere = f"agent, trained at {args.default:g}"
    sweep = {x: contestants(*both, elsewhere) for x, both in results.items()}
    name = f"{args.takers}_sweep"
    folder = new_folder(Path("runs/informed_sweep"))
    write_json(folder / f"{name}.json", sweep)
    title = read_benchmark(folders[args.default])["title"]
    taker_sweep(folder / f"{name}.png", sweep, f"{title}, seed {args.seed}", args.takers)
    table = str(sweep_table(sweep, args.takers))
    (folder / f"{name}.md").write_text(table + "\n", encoding="utf-8")
    ahead = all(rows[HERE]["ahead"]["low"] > 0 for rows in sweep.values())
    print(f"\n{table}\n\nahead of Avellaneda–Stoikov at every share: {'yes' if ahead else 'NO'}; figure: {folder}")
    return ahead


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
