"""Steps and updates per second of the whole loop of a phase (market, policy, update), and of Stable-Baselines3's.

    python benchmarks/throughput.py                                   this machine's CPU
    python benchmarks/throughput.py --num-envs 64 1024 16384 --modes eager cudagraphs
    python benchmarks/throughput.py --peers                           Stable-Baselines3 beside it (CPU)

Each figure is the second half of a run, so that start-up, warm-up and graph capture stay out of it. The table is
written to runs/throughput/ (or -2, -3 …).
"""

import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.vec_env import VecEnv

import phase1_delta_hedge_ppo as phase1
import phase2_multi_order_sac as phase2
import phase3_spread_vs_bs as phase3
import phase4_selfplay as phase4
from envs import AgainstRivals, HedgingEnv
from envs.benchmark.makers import Makers, classical_makers
from envs.benchmark.report import Table
from envs.market.units import TRADING_DAYS
from envs.models import make_model
from envs.run.args import check_range, parse_args
from envs.run.errors import check
from envs.run.files import new_folder, read_metrics
from envs.run.run import Run, run_main


@dataclass
class Args:
    """Measures steps and updates per second of every phase."""

    phases: tuple[Literal["phase1", "phase2", "phase3", "phase4"], ...] = ("phase1", "phase2", "phase3", "phase4")
    """phases to measure"""
    num_envs: tuple[int, ...] = (64, 1024)
    """numbers of environments to measure"""
    modes: tuple[Literal["eager", "cudagraphs", "compile"], ...] = ("eager",)
    """ways of running the loop"""
    iterations: int = 40
    """rollouts and updates of a run"""
    dynamics: str = "gbm"
    """model of the underlying of phases 1 and 2; phases 3 and 4 have their default, heston"""
    torch_threads: int = 1
    """CPU threads of torch"""
    peers: bool = False
    """also measure Stable-Baselines3 on the same batched markets: PPO with the phase's rollout, minibatches and
    epochs; SAC with 64×64 networks and an update of 256 transitions at every step, and phase 2 with the same"""

    def check(self) -> None:
        """Raises UsageError for the first argument that cannot work, in any of the phases."""
        check_range(self, 1, 1024, "torch_threads")
        check_range(self, 2, 10**6, "iterations")
        for flag, values in (("--phases", self.phases), ("--num-envs", self.num_envs), ("--modes", self.modes)):
            check(len(values) > 0, f"{flag} is empty (one or more)")
        for num_envs in self.num_envs:
            for mode in self.modes:
                for name in self.phases:
                    phase_arguments(MODULES[name], self, num_envs, mode).check()


MODULES = {"phase1": phase1, "phase2": phase2, "phase3": phase3, "phase4": phase4}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def trained_speed(module, phase_args, *market) -> float:
    """Environment steps a second in the second half of a training run; `market` is what `train` takes."""
    with tempfile.TemporaryDirectory() as folder:
        module.train(Run(phase_args, module.PHASE, DEVICE, folder=Path(folder)), *market)
        return read_metrics(Path(folder) / "metrics.csv")[-1]["charts/SPS"]


def phase_arguments(module, args: Args, num_envs: int, mode: str, **changes):
    """The phase's own arguments: its defaults, but for what is measured and `changes`."""
    defaults = module.Args()
    settings = {"num_envs": num_envs, "num_evaluations": 2, "save_model": False}
    settings |= {"cudagraphs": mode == "cudagraphs", "compile": mode == "compile"}
    if module in (phase1, phase2):
        settings["dynamics"] = args.dynamics
    if module is phase2:
        episode = num_envs * defaults.num_steps
        settings |= {"utd": max(defaults.utd, 1 / episode), "learning_starts": 0, "buffer_size": max(100_000, episode)}
    phase_args = module.Args(**{**settings, **changes})
    phase_args.total_timesteps = args.iterations * phase_args.steps_per_iteration
    return phase_args


def phase1_speed(args: Args, num_envs: int, mode: str) -> float:
    phase_args = phase_arguments(phase1, args, num_envs, mode)
    return trained_speed(phase1, phase_args, make_model(phase_args))


def phase2_speed(args: Args, num_envs: int, mode: str, **changes) -> tuple[float, float]:
    """Environment steps and updates a second; with the default ratio of the two unless `changes` say otherwise."""
    phase_args = phase_arguments(phase2, args, num_envs, mode, **changes)
    speed = trained_speed(phase2, phase_args, make_model(phase_args))
    episode = num_envs * phase_args.num_steps
    return speed, speed * round(phase_args.utd * episode) / episode


def phase3_market(num_envs: int) -> Makers:
    phase_args = phase3.Args()
    model = make_model(phase_args, dt=0.5 / TRADING_DAYS)
    return classical_makers(phase3.make_market(phase_args, model, num_envs, DEVICE))


def quoting_speed(module, args: Args, num_envs: int, mode: str) -> float:
    """Steps a second of phase 3 or 4: of the agent, not of all the makers."""
    guests = ({},) if module is phase4 else ()
    return trained_speed(module, phase_arguments(module, args, num_envs, mode), phase3_market(64), *guests)


def environment_speed(env: HedgingEnv | AgainstRivals) -> float:
    """Market alone: resets and steps with a constant action."""
    num_envs = env.num_envs
    device = env.device
    action = torch.full((num_envs, *env.single_action_space.shape), 0.05, device=device)
    for repeat in range(13):
        if repeat == 3:
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
        env.reset(seed=repeat)
        for _ in range(env.num_steps):
            env.step(action)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 10 * num_envs * env.num_steps / (time.perf_counter() - start)


def batched(env: HedgingEnv | AgainstRivals):
    """The environment as Stable-Baselines3's VecEnv, so that its own Python loop over rows is not what is measured."""
    num_envs = env.num_envs

    class Batched(VecEnv):
        def __init__(self):
            super().__init__(num_envs, env.single_observation_space, env.single_action_space)

        def reset(self):
            return env.reset()[0].numpy()

        def step_async(self, actions):
            self.actions = torch.as_tensor(actions)
            if isinstance(env, AgainstRivals):
                self.actions[:, :-2].abs_()  # asks and bids: an untrained policy's would cross

        def step_wait(self):
            observation, reward, terminated, _, _ = env.step(self.actions)
            infos = [{} for _ in range(num_envs)]
            if terminated[0]:
                for i, info in enumerate(infos):
                    info["terminal_observation"] = observation[i].numpy()
                observation, _ = env.reset()
            return observation.numpy(), reward.numpy(), terminated.numpy(), infos

        def close(self):
            pass

        def get_attr(self, name, indices=None):
            return [None] * num_envs

        def set_attr(self, *_, **__):
            pass

        def env_method(self, *_, **__):
            return [None] * num_envs

        def env_is_wrapped(self, *_, **__):
            return [False] * num_envs

    return Batched()


def stable_baselines3_ppo(module, env: HedgingEnv | AgainstRivals, steps: int = 200_000) -> float:
    """Steps a second with the networks, rollout, minibatches and epochs of phase 1 or 3, whose script `module` is."""
    batch = env.num_envs * env.num_steps
    iterations = int(np.clip(steps // batch, 2, 40))
    size = batch // module.Args.num_minibatches
    epochs = module.Args.update_epochs
    settings = {"n_steps": env.num_steps, "batch_size": size, "n_epochs": epochs, "learning_rate": 1e-3}
    model = PPO("MlpPolicy", batched(env), **settings, device="cpu")
    model.learn(2 * batch)
    start = time.perf_counter()
    model.learn(iterations * batch)
    return iterations * batch / (time.perf_counter() - start)


def stable_baselines3_sac(env: HedgingEnv, steps: int = 600) -> tuple[float, float]:
    """Environment steps and updates a second, one update of 256 transitions at every step of all environments."""
    settings = {"batch_size": 256, "train_freq": 1, "gradient_steps": 1, "policy_kwargs": {"net_arch": [64, 64]}}
    model = SAC("MlpPolicy", batched(env), **settings, buffer_size=100_000, device="cpu")
    model.learn(60 * env.num_envs)
    start = time.perf_counter()
    model.learn(steps * env.num_envs)
    seconds = time.perf_counter() - start
    return steps * env.num_envs / seconds, steps / seconds


def main(argv) -> bool:
    args = parse_args(Args, argv)
    args.check()
    torch.set_num_threads(args.torch_threads)
    where = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"{os.cpu_count()} CPU cores"
    rows = []  # environments, what, steps/s, updates/s

    def measured(num_envs: int, what: str, steps: float, updates: float | None = None) -> None:
        rows.append([f"{num_envs:,}", what, f"{steps:,.0f}", "" if updates is None else f"{updates:,.0f}"])
        print(*rows[-1], flush=True)

    for num_envs in args.num_envs:
        if "phase1" in args.phases:
            measured(num_envs, "phase 1's market alone", environment_speed(HedgingEnv(num_envs, device=DEVICE)))
            for mode in args.modes:
                measured(num_envs, f"phase 1, PPO, {mode}", phase1_speed(args, num_envs, mode))
            if args.peers:
                measured(num_envs, "Stable-Baselines3 PPO", stable_baselines3_ppo(phase1, HedgingEnv(num_envs)))
        if "phase2" in args.phases:
            phase_args = phase2.Args()
            env = phase2.make_env(phase_args, make_model(phase_args), num_envs, DEVICE)
            measured(num_envs, "phase 2's market alone", environment_speed(env))
            for mode in args.modes:
                measured(num_envs, f"phase 2, SAC, {mode}", *phase2_speed(args, num_envs, mode))
            if args.peers:
                small = {"batch_size": 256, "hidden_size": 64, "utd": 1 / num_envs}
                measured(num_envs, "phase 2, 64×64, 256 a batch", *phase2_speed(args, num_envs, "eager", **small))
                measured(num_envs, "Stable-Baselines3 SAC, the same", *stable_baselines3_sac(env))
        for name in ("phase3", "phase4"):
            if name not in args.phases:
                continue
            module = MODULES[name]
            env = phase3_market(num_envs).env
            number = name[-1]
            measured(num_envs, f"phase {number}'s market and rival alone", environment_speed(env))
            for mode in args.modes:
                measured(num_envs, f"phase {number}, PPO, {mode}", quoting_speed(module, args, num_envs, mode))
            if args.peers and name == "phase3":
                measured(num_envs, "Stable-Baselines3 PPO", stable_baselines3_ppo(phase3, env))
    table = str(Table(["environments", "what", "steps/s", "updates/s"], rows))
    machine = f"{where}, torch {torch.__version__}, {args.torch_threads} thread(s)"
    folder = new_folder(Path("runs/throughput"))
    (folder / "throughput.md").write_text(f"{table}\n\n{machine}\n", encoding="utf-8")
    print(f"\n{table}\n\n{machine}; report: {folder}")
    return True


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
