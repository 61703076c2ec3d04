"""Operators of one iteration of every phase, rollout and update: on a GPU each is a kernel, or a few.

    python benchmarks/kernels.py

They are counted on the CPU, views aside, with what only a CPU does switched off. The time that their launches take
without CUDA graphs is computed, not measured. The table goes to runs/kernels/ (or -2 …).
"""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import throughput
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import phase1_delta_hedge_ppo as phase1
import phase2_multi_order_sac as phase2
import phase4_selfplay as phase4
from envs import networks
from envs.benchmark.report import Table
from envs.market import env as market_env
from envs.models import make_model
from envs.run.args import check_range, parse_args
from envs.run.files import new_folder
from envs.run.run import Run, run_main

LAUNCH = 5e-6  # seconds: what PyTorch takes to launch a small kernel, about


@dataclass
class Args:
    """Counts the operators of one iteration of every phase."""

    num_envs: int = 64
    """environments; more of them need no more operators, but for phase 2, which then makes more updates"""

    def check(self) -> None:
        """Raises UsageError for the first argument that cannot work."""
        check_range(self, 8, 2**16, "num_envs")


class Counter(TorchDispatchMode):
    """Counts the operators within it, views aside."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


class CountingRun(Run):
    """A run that counts the operators of its latest iteration, `operators`."""

    operators = 0

    def captured(self, function, *things):
        def counted(*arguments):
            with torch.autograd.set_multithreading_enabled(False), Counter() as counter:  # which is of one thread
                result = function(*arguments)
            self.operators = counter.count
            return result

        return counted


def operators(module, args: Args) -> tuple[int, int]:
    """Operators of an iteration of the phase with its defaults, and the environment steps that they make."""
    phase_args = throughput.phase_arguments(module, throughput.Args(iterations=2), args.num_envs, "eager")
    model = make_model(phase_args) if module in (phase1, phase2) else None
    market = (model,) if model else (throughput.phase3_market(64, torch.device("cpu")),)
    market += ({},) if module is phase4 else ()
    with tempfile.TemporaryDirectory() as folder:
        run = CountingRun(phase_args, module.PHASE, "cpu", folder=Path(folder))
        module.train(run, *market)
    return run.operators, phase_args.steps_per_iteration


def main(argv) -> bool:
    args = parse_args(Args, argv)
    args.check()
    market_env.ROWS_AHEAD = 0
    networks.BLOCK = 2**62
    header = ["phase", "operators an iteration", "environment steps", "a step of all", "launches, ms (computed)"]
    body = []
    for name, module in throughput.MODULES.items():
        count, steps = operators(module, args)
        of_all = module.Args.num_steps
        body.append([name, f"{count:,}", f"{steps:,}", f"{count / of_all:,.0f}", f"{1e3 * LAUNCH * count:,.0f}"])
    text = str(Table(header, body))
    text += f"\n\n{args.num_envs} environments; {1e6 * LAUNCH:g} µs a launch"
    folder = new_folder(Path("runs/kernels"))
    (folder / "kernels.md").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}; report: {folder}")
    return True


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
