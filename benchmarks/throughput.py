"""Steps per second of the whole PPO loop of phase 1 (market, policy, update), and of Stable-Baselines3 on its market.

    python benchmarks/throughput.py                                   this machine's CPU
    python benchmarks/throughput.py --num-envs 64 1024 16384 --modes eager cudagraphs
    python benchmarks/throughput.py --peers                           Stable-Baselines3 beside it (CPU)

Each figure is the second half of a run, so that start-up, warm-up and graph capture stay out of it.
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
import tyro

import phase1_delta_hedge_ppo as phase1
from envs import HedgingEnv, runs


@dataclass
class Args:
    """Measures steps per second of phase 1."""

    num_envs: tuple[int, ...] = (64, 1024)
    """numbers of environments to measure"""
    modes: tuple[Literal["eager", "cudagraphs", "compile"], ...] = ("eager",)
    """ways of running the loop"""
    iterations: int = 40
    """rollouts and updates of a run"""
    dynamics: str = "gbm"
    """model of the underlying"""
    torch_threads: int = 1
    """CPU threads of torch"""
    peers: bool = False
    """also measure Stable-Baselines3's PPO on the same batched market, with the same rollout, minibatches and epochs"""


def phase1_speed(args: Args, num_envs: int, mode: str) -> float:
    phase_args = phase1.Args(
        num_envs=num_envs,
        dynamics=args.dynamics,
        total_timesteps=args.iterations * num_envs * 30,
        num_evaluations=2,
        save_model=False,
        cudagraphs=mode == "cudagraphs",
        compile=mode == "compile",
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        model = phase1.make_dynamics(phase_args)
        phase1.train(phase_args, model, Path(folder), device, None, None)
        return runs.read_metrics(Path(folder) / "metrics.csv")[-1]["charts/SPS"]


def environment_speed(num_envs: int) -> float:
    """Market alone: resets and steps with a constant action."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    env = HedgingEnv(num_envs, device=device)
    action = torch.full((num_envs, 2), 0.05, device=device)
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


def stable_baselines3_speed(num_envs: int, iterations: int) -> float:
    """PPO of Stable-Baselines3 with the same networks, rollout, minibatches and epochs, on the batched market."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.vec_env import VecEnv

    class Batched(VecEnv):
        """`HedgingEnv` as SB3's VecEnv, so that its own Python loop over environments is not what is measured."""

        def __init__(self):
            self.env = HedgingEnv(num_envs)
            super().__init__(num_envs, self.env.single_observation_space, self.env.single_action_space)

        def reset(self):
            return self.env.reset()[0].numpy()

        def step_async(self, actions):
            self.actions = torch.as_tensor(actions)

        def step_wait(self):
            observation, reward, terminated, _, _ = self.env.step(self.actions)
            infos = [{} for _ in range(num_envs)]
            if self.env.t == self.env.num_steps:
                for i, info in enumerate(infos):
                    info["terminal_observation"] = observation[i].numpy()
                observation, _ = self.env.reset()
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

    batch = num_envs * 30
    model = PPO("MlpPolicy", Batched(), n_steps=30, batch_size=batch // 8, n_epochs=4, learning_rate=1e-3, device="cpu")
    model.learn(2 * batch)
    start = time.perf_counter()
    model.learn(iterations * batch)
    return iterations * batch / (time.perf_counter() - start)


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    torch.set_num_threads(args.torch_threads)
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    rows = []
    for num_envs in args.num_envs:
        rows.append((num_envs, "market alone", environment_speed(num_envs)))
        for mode in args.modes:
            rows.append((num_envs, f"phase 1 PPO, {mode}", phase1_speed(args, num_envs, mode)))
        if args.peers:
            iterations = int(np.clip(200_000 // (num_envs * 30), 2, 40))
            rows.append((num_envs, "Stable-Baselines3 PPO", stable_baselines3_speed(num_envs, iterations)))
    print(f"\n{where}, torch {torch.__version__}, {args.torch_threads} thread(s)\n")
    print("| environments | what | steps/s |\n|---:|---|---:|")
    for num_envs, what, speed in rows:
        print(f"| {num_envs:,} | {what} | {speed:,.0f} |")


if __name__ == "__main__":
    main()
