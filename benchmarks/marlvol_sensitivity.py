"""Phase 0 against the number of players, of basis players and of time steps; and its memory against time steps.

    .venv/bin/python benchmarks/marlvol_sensitivity.py          about six minutes of one core

Every variant trains for the same number of updates, a tenth of the default's, from the same seed, so the errors are
those of short runs. Memory is what one update adds to a process, beside a neural SDE: the same network on as many paths
of the same game, whose squared errors are differentiated through the simulation (Gierjatowicz et al. 2020). Figures,
table and data go to runs/marlvol_sensitivity/ (or -2, -3 …).
"""

import multiprocessing
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from as_user import read_benchmark, run_phase  # puts the root of the project on the path, too

import phase0_marlvol_calibration as phase0
from envs.benchmark.report import markdown_table
from envs.figures.calibration import sensitivity
from envs.market import smiles
from envs.run.args import check_range, parse_args
from envs.run.errors import check
from envs.run.files import new_folder, peak_memory, read_metrics, write_json
from envs.run.run import run_main

FLAGS = {"num_players": "--num-players", "num_basis": "--num-basis", "steps_per_day": "--steps-per-day"}
LABELS = {"num_players": "players of a run", "num_basis": "basis players", "steps_per_day": "time steps"}
DAYS = 51
MEMORY = {"num_players": 1000, "num_runs": 4, "reference": "none"}  # of both: 5,000 paths


@dataclass
class Args:
    """Trains phase 0 in several sizes and draws its errors, its time and its memory."""

    num_players: tuple[int, ...] = (500, 2000, 5000)
    """n, with the middle one of the other two"""
    num_basis: tuple[int, ...] = (5, 20, 60)
    """n_p, likewise"""
    steps_per_day: tuple[int, ...] = (1, 2, 4)
    """time steps of a day, of which there are 51; with the first one the other two are varied"""
    num_iterations: int = 100
    """updates of each run"""
    seed: int = 1
    """seed of every run"""

    def base(self) -> dict[str, int]:
        """What is not varied."""
        middle = len(self.num_players) // 2, len(self.num_basis) // 2
        return {
            "num_players": self.num_players[middle[0]],
            "num_basis": self.num_basis[middle[1]],
            "steps_per_day": self.steps_per_day[0],
        }


def train(args: Args, sizes: dict[str, int]) -> dict:
    """Errors, and seconds an update, of one run of the script."""
    flags = [word for name, value in sizes.items() for word in (FLAGS[name], str(value))]
    flags += ["--num-iterations", str(args.num_iterations), "--num-evaluations", "1", "--eval-paths", "240000"]
    flags += ["--seed", str(args.seed), "--exp-name", "sensitivity"]
    folder = run_phase("phase0_marlvol_calibration.py", flags, " ".join(flags[:6]))
    last = read_metrics(folder / "metrics.csv")[-1]
    seconds = last["global_step"] / last["charts/SPS"] / args.num_iterations
    return {**sizes, "seconds": seconds, **read_benchmark(folder)["rows"]["agent"]}


# MEMORY


def marlvol_update(game, agent, args) -> None:
    """A rollout and its update."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(agent.actor_mean.parameters())
    phase0.update(agent, optimizer, phase0.rollout(game, agent, args, generator), args, generator)


def neural_sde_update(game, agent, args) -> None:
    """Backpropagation of the mean squared error through the simulation."""
    game.reset(torch.Generator().manual_seed(0))
    for _ in range(game.num_steps):
        game.step(agent.actor_mean(game.observe()))
    loss = -game.shared_rewards(game.errors()).sum()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in agent.actor_mean.parameters())


METHODS = {"MARLVol": marlvol_update, "neural SDE": neural_sde_update}


def memory(method: str, steps_per_day: int) -> float:
    """MiB that one update adds; to be called in a process of its own."""
    torch.set_num_threads(1)
    args = phase0.Args(**MEMORY, steps_per_day=steps_per_day)
    args.fill()
    cpu = torch.device("cpu")
    game = phase0.make_game(args, smiles.SURFACES[args.smile], cpu)
    agent = phase0.Agent(game, args)
    before = peak_memory(cpu)
    METHODS[method](game, agent, args)
    return 1024 * (peak_memory(cpu) - before)


def measure_memory(steps_per_day: tuple[int, ...]) -> dict[str, list[float]]:
    """MiB of each method for each number of steps, every one in a fresh process."""
    context = multiprocessing.get_context("spawn")
    used = {}
    for method in METHODS:
        used[method] = []
        for number in steps_per_day:
            with context.Pool(1) as pool:
                used[method].append(pool.apply(memory, (method, number)))
            print(f"{method}, {DAYS * number} steps: {used[method][-1]:.0f} MiB", flush=True)
    return used


def main(argv) -> bool:
    args = parse_args(Args, argv)
    for name in FLAGS:
        values = getattr(args, name)
        check(len(set(values)) == len(values) > 1, f"--{name.replace('_', '-')} needs two or more different ones")
    check_range(args, 1, 10**6, "num_iterations")
    used = measure_memory(args.steps_per_day)
    rows, known = {}, {}
    for name in FLAGS:
        rows[name] = []
        for value in getattr(args, name):
            sizes = {**args.base(), name: value}
            key = tuple(sizes.values())
            if key not in known:
                known[key] = train(args, sizes)
            rows[name].append(known[key])
    folder = new_folder(Path("runs/marlvol_sensitivity"))
    write_json(folder / "sensitivity.json", {"args": asdict(args), "rows": rows, "memory": used})
    body = []
    for name, runs in rows.items():
        each = DAYS if name == "steps_per_day" else 1
        values = [each * row[name] for row in runs]
        errors = {"agent": [row["rmse"] for row in runs]}
        seconds = [row["seconds"] for row in runs]
        title = f"Phase 0, {args.num_iterations} updates: error against {LABELS[name]}"
        sensitivity(folder / f"{name}.png", values, errors, (LABELS[name], "RMSE (vol points)"), title)
        for value, row, second in zip(values, runs, seconds, strict=True):
            body.append([f"{LABELS[name]}: {value}", f"{row['rmse']:.3f}", f"{row['worst']:.2f}", f"{second:.2f}"])
    steps = [DAYS * number for number in args.steps_per_day]
    title = "Memory that an update adds, 5,000 paths"
    sensitivity(folder / "memory.png", steps, used, ("time steps", "MiB"), title)
    table = markdown_table(["variant", "RMSE", "largest error", "seconds an update"], body)
    memory_body = [[method, *(f"{x:.0f}" for x in values)] for method, values in used.items()]
    table += "\n\n" + markdown_table(["MiB of an update, time steps:", *map(str, steps)], memory_body)
    (folder / "sensitivity.md").write_text(table + "\n", encoding="utf-8")
    print(f"\n{table}\n\nerrors in vol points; report and figures: {folder}")
    return True


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
