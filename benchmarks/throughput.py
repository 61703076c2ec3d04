"""Steps and updates per second of the whole loop of a phase (market, policy, update), beside others in one run.

    python benchmarks/throughput.py                                   this machine's CPU
    python benchmarks/throughput.py --num-envs 64 1024 16384 --modes eager cudagraphs
    python benchmarks/throughput.py --peers                           Stable-Baselines3 beside it (CPU)
    python benchmarks/throughput.py --against HEAD~3                  another commit beside it
    python benchmarks/throughput.py --phases market --num-envs 64 1000 10000    quotes priced a second
    taskset -c 1 python benchmarks/throughput.py …                    all of it on one core

What is compared is measured in turns, --repeats times, so that what else the machine does meets all of it. The table
has medians, in brackets the least and the greatest, and the ratio of each turn. A training loop's figure is the second
half of a run, so that start-up, warm-up and graph capture stay out of it. The table goes to runs/throughput/ (or -2 …).

With --against this very file measures the other commit, which is checked out into a temporary folder (`git worktree`).
That commit must have the same interfaces: `train` of each phase, `Run`, the environments.
"""

import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.vec_env import VecEnv

import phase1_delta_hedge_ppo as phase1
import phase2_multi_order_sac as phase2
import phase3_spread_vs_bs as phase3
import phase4_selfplay as phase4
from envs import AgainstRivals, HedgingEnv, QuotingEnv
from envs.benchmark.makers import Makers, classical_makers
from envs.benchmark.report import Table
from envs.market.units import TRADING_DAYS
from envs.models import make_model
from envs.run.args import check_range, parse_args
from envs.run.errors import UsageError, check
from envs.run.files import new_folder, read_metrics
from envs.run.run import Run, run_main

ROOT = Path(__file__).resolve().parent.parent
Phase = Literal["phase1", "phase2", "phase3", "phase4", "market"]


@dataclass
class Args:
    """Measures steps and updates per second of every phase."""

    phases: tuple[Literal["phase1", "phase2", "phase3", "phase4", "market"], ...] = (
        "phase1",
        "phase2",
        "phase3",
        "phase4",
    )
    """phases to measure; market: quotes that `QuotingEnv` alone prices, beside the arithmetic of an mbt_gym step"""
    num_envs: tuple[int, ...] = (64, 1024)
    """numbers of environments to measure"""
    modes: tuple[Literal["eager", "cudagraphs", "compile"], ...] = ("eager",)
    """ways of running the loop"""
    iterations: int = 40
    """rollouts and updates of a run"""
    repeats: int = 5
    """turns in which everything is measured once"""
    dynamics: str = "gbm"
    """model of the underlying of phases 1 and 2; phases 3 and 4 have their default, heston"""
    torch_threads: int = 1
    """CPU threads of torch"""
    peers: bool = False
    """also measure Stable-Baselines3 on the same batched markets: PPO with the phase's rollout, minibatches and
    epochs; SAC with 64×64 networks and an update of 256 transitions at every step, and phase 2 with the same"""
    against: str | None = None
    """commit to measure beside the present code"""

    def check(self) -> None:
        """Raises UsageError for the first argument that cannot work, in any of the phases."""
        check_range(self, 1, 1024, "torch_threads")
        check_range(self, 2, 10**6, "iterations")
        check_range(self, 1, 1000, "repeats")
        for flag, values in (("--phases", self.phases), ("--num-envs", self.num_envs), ("--modes", self.modes)):
            check(len(values) > 0, f"{flag} is empty (one or more)")
        for num_envs in self.num_envs:
            check(1 <= num_envs <= 2**20, f"--num-envs is {num_envs} (at least 1, at most {2**20})")
            for mode in self.modes:
                for name in self.phases:
                    if name in MODULES:
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


def phase3_market(num_envs: int, device: torch.device) -> Makers:
    phase_args = phase3.Args()
    model = make_model(phase_args, dt=0.5 / TRADING_DAYS)
    return classical_makers(phase3.make_market(phase_args, model, num_envs, device))


def quoting_speed(module, args: Args, num_envs: int, mode: str) -> float:
    """Steps a second of phase 3 or 4: of the agent, not of all the makers."""
    guests = ({},) if module is phase4 else ()
    return trained_speed(module, phase_arguments(module, args, num_envs, mode), phase3_market(64, DEVICE), *guests)


def environment_speed(env: HedgingEnv | AgainstRivals) -> float:
    """Market alone: resets and steps with a constant action."""
    num_envs = env.num_envs
    device = env.device
    action = torch.full((num_envs, *env.single_action_space.shape), 0.05, device=device)
    return 10 * num_envs * env.num_steps / stepping_seconds(env, action, episodes=10, warm_up=3)


def stepping_seconds(
    env: HedgingEnv | AgainstRivals | QuotingEnv, actions: torch.Tensor, episodes: int, warm_up: int
) -> float:
    """Seconds that `episodes` episodes take, each on a fresh market, with the same actions always; after `warm_up`."""
    for episode in range(warm_up + episodes):
        if episode == warm_up:
            if env.device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
        env.reset(seed=episode)
        for _ in range(env.num_steps):
            env.step(actions)
    if env.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


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


def market_speed(num_envs: int, steps: int = 1200) -> float:
    """Quotes that `QuotingEnv` prices a second, drawing of markets included: an ask and a bid a maker and option."""
    market = QuotingEnv(num_envs, device=DEVICE)
    half_spread = torch.ones(num_envs, device=DEVICE)
    actions = market.quote(half_spread, band=0.1)[:, None].expand(-1, market.num_makers, -1).contiguous()
    quotes = market.num_makers * 2 * market.num_options
    episodes = max(2, steps // market.num_steps // max(1, num_envs // 1000))
    seconds = stepping_seconds(market, actions, episodes, warm_up=1)
    return episodes * market.num_steps * num_envs * quotes / seconds


def mbt_gym_speed(num_envs: int, steps: int = 1200) -> float:
    """Quotes a second of the arithmetic of an mbt_gym step (Jerome, Sabate-Vidales, Šiška & Savine 2023) in numpy.

    One asset, a bid and an ask: Brownian mid-price, arrivals of probability λΔt, fills of probability e^{−κ·depth},
    cash and inventory with their limits, P&L as the reward. Their environment's own Python comes on top of it.
    """
    rng = np.random.default_rng(0)
    step_size, intensity, decay, sigma = 1.0 / 200, 140.0, 1.5, 2.0
    state = np.zeros((num_envs, 4))  # cash, inventory, time, mid-price
    state[:, 3] = 100.0
    sign = np.append(-np.ones((num_envs, 1)), np.ones((num_envs, 1)), axis=1)  # of bids and asks
    depths = np.full((num_envs, 2), 0.7)
    for step in range(steps + 100):
        if step == 100:
            start = time.perf_counter()
        before = state.copy()
        arrivals = rng.uniform(size=(num_envs, 2)) < intensity * step_size
        fills = rng.uniform(size=(num_envs, 2)) < np.exp(-decay * depths)
        traded = arrivals * fills
        state[:, 1] += np.sum(traded * -sign, axis=1)
        state[:, 0] += np.sum(sign * traded * (state[:, 3:] + depths * sign), axis=1)
        for column, limit in ((1, 10_000), (0, 10_000_000)):
            clipped = np.clip(state[:, column], -limit, limit)
            if (clipped != state[:, column]).any():
                state[:, column] = clipped
        state[:, 2] += step_size
        state[:, 3] += sigma * step_size**0.5 * rng.normal(size=num_envs)
        after = state.copy()
        worth = after[:, 0] + after[:, 1] * after[:, 3]
        worth - (before[:, 0] + before[:, 1] * before[:, 3])  # the reward
        np.full((num_envs,), False)
    return 2 * num_envs * steps / (time.perf_counter() - start)


# WHAT IS MEASURED


class Measure(NamedTuple):
    """Something that is measured with a number of environments: `kind` is market, small, peer, mbt_gym or a mode."""

    phase: str
    kind: str

    @property
    def title(self) -> str:
        number = self.phase[-1]
        if self.phase == "market":
            return "QuotingEnv, quotes" if self.kind == "market" else "mbt_gym's arithmetic, quotes"
        if self.kind == "market":
            return f"phase {number}'s market" + (" and rival alone" if number in "34" else " alone")
        if self.kind == "peer":
            agent = "SAC, 64×64, 256 a batch" if number == "2" else "PPO"
            return f"Stable-Baselines3 {agent}, phase {number}'s market"
        if self.kind == "small":
            return "phase 2, 64×64, 256 a batch"
        return f"phase {number}, {'SAC' if number == '2' else 'PPO'}, {self.kind}"

    @property
    def is_other(self) -> bool:
        """Whether this project's training has no part in it, so that it is the same at another commit."""
        return self.kind in ("peer", "mbt_gym")


def measures(args: Args) -> list[Measure]:
    """What the command measures with every number of environments."""
    found = []
    for phase in args.phases:
        kinds = ["market", "mbt_gym"] if phase == "market" else ["market", *args.modes]
        if args.peers:
            kinds += {"phase1": ["peer"], "phase2": ["small", "peer"], "phase3": ["peer"]}.get(phase, [])
        found += [Measure(phase, kind) for kind in kinds]
    return found


def speed(args: Args, measure: Measure, num_envs: int) -> tuple[float, float | None]:
    """Steps (or quotes) a second, and updates a second where they are counted."""
    phase, kind = measure
    device = torch.device("cpu") if kind == "peer" else DEVICE  # Stable-Baselines3 takes arrays, and learns on the CPU
    if phase == "market":
        return (market_speed(num_envs) if kind == "market" else mbt_gym_speed(num_envs)), None
    if phase == "phase2":
        phase_args = phase2.Args()
        if kind == "small":
            small = {"batch_size": 256, "hidden_size": 64, "utd": 1 / num_envs}
            return phase2_speed(args, num_envs, "eager", **small)
        if kind not in ("market", "peer"):
            return phase2_speed(args, num_envs, kind)
        env = phase2.make_env(phase_args, make_model(phase_args), num_envs, device)
        return stable_baselines3_sac(env) if kind == "peer" else (environment_speed(env), None)
    if kind in ("market", "peer"):
        env = HedgingEnv(num_envs, device=device) if phase == "phase1" else phase3_market(num_envs, device).env
        return (environment_speed(env) if kind == "market" else stable_baselines3_ppo(MODULES[phase], env)), None
    if phase == "phase1":
        return phase1_speed(args, num_envs, kind), None
    return quoting_speed(MODULES[phase], args, num_envs, kind), None


# MEASURED IN TURNS, each commit in a process of its own


WORKER = "as-worker"  # in the place of the flags


def work() -> bool:
    """Measures what is asked for, line by line: the flags first, then measures; answers in lines of JSON."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what is printed on the way must not look like an answer
    args = Args(**json.loads(sys.stdin.readline()))
    torch.set_num_threads(args.torch_threads)
    for line in sys.stdin:
        phase, kind, num_envs = json.loads(line)
        answers.write(json.dumps(speed(args, Measure(phase, kind), num_envs)) + "\n")
        answers.flush()
    return True


class Worker:
    """A process that measures the code in `root`; its answers are those of `speed`."""

    def __init__(self, root: Path, name: str, args: Args):
        self.name = name
        self.errors = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115  (as long as the process)
        self.process = subprocess.Popen(
            [sys.executable, str(root / "benchmarks" / "throughput.py"), WORKER],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, encoding="utf-8",
        )  # fmt: skip
        self._send(asdict(args))

    def _send(self, message) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()

    def __call__(self, measure: Measure, num_envs: int) -> tuple[float, float | None]:
        self._send((*measure, num_envs))
        answer = self.process.stdout.readline()
        if not answer:
            self.process.wait()
            self.errors.seek(0)
            reason = ([line for line in self.errors.read().splitlines() if line.strip()] or ["it said nothing"])[-1]
            raise UsageError(f"{self.name}, {measure.title}, {num_envs} environments: {reason.strip()}")
        return json.loads(answer)

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()
        self.errors.close()


@contextlib.contextmanager
def checked_out(revision: str) -> Iterator[Path]:
    """Another commit in a temporary folder, with this file in the place of its own.

    Raises:
        UsageError: no such commit, or no repository.
    """

    def git(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)

    check(shutil.which("git") is not None, "--against needs git")
    found = git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    check(found.returncode == 0, f"--against is {revision!r} (a commit of the repository in {ROOT})")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "project"
        made = git("worktree", "add", "--detach", str(root), found.stdout.strip())
        check(made.returncode == 0, f"--against {revision}: {(made.stderr.splitlines() or ['git failed'])[-1]}")
        try:
            (root / "benchmarks").mkdir(exist_ok=True)
            shutil.copyfile(__file__, root / "benchmarks" / "throughput.py")
            yield root
        finally:
            git("worktree", "remove", "--force", str(root))


def in_turns(args: Args, workers: Sequence[Worker]) -> dict[tuple[int, Measure], list[list]]:
    """The answers of every turn, one of each worker: (environments, measure) → turns → workers."""
    found: dict[tuple[int, Measure], list[list]] = {}
    for num_envs in args.num_envs:
        for turn in range(args.repeats):
            for measure in measures(args):
                own = workers[:1] if measure.is_other else workers
                answers = [worker(measure, num_envs) for worker in own]
                found.setdefault((num_envs, measure), []).append(answers)
                shown = ", ".join(f"{a_second:,.0f}" for a_second, _ in answers)
                print(f"turn {turn + 1}: {num_envs:,} environments, {measure.title}: {shown}", flush=True)
    return found


def spread(values: Sequence[float], form: str = ",.0f") -> str:
    """Median, and in brackets the least and the greatest if they are several."""
    middle = f"{statistics.median(values):{form}}"
    return middle if len(values) == 1 else f"{middle} [{min(values):{form}}, {max(values):{form}}]"


def comparison(args: Args, found: dict[tuple[int, Measure], list[list]]) -> Table:
    """A row for each measure: speeds, those of the other commit, and the ratio of each turn."""
    header = ["environments", "what", "a second", "updates a second"]
    header += [f"a second, {args.against}", "ratio"] if args.against else []
    body = []
    for (num_envs, measure), turns in found.items():
        updates = [turn[0][1] for turn in turns]
        row = [f"{num_envs:,}", measure.title, spread([turn[0][0] for turn in turns])]
        row.append("" if None in updates else spread(updates))
        if args.against:
            both = [(turn[0][0], turn[1][0]) for turn in turns if len(turn) == 2]
            row += [spread([y for _, y in both]), spread([x / y for x, y in both], ".2f")] if both else ["", ""]
        body.append(row)
    return Table(header, body)


def peer_ratios(found: dict[tuple[int, Measure], list[list]]) -> list[str]:
    """A line for each of this project's loops that has a peer: how many times as fast, turn by turn."""
    lines = []
    for (num_envs, measure), turns in found.items():
        ours = {"phase2": "small", "market": "market"}.get(measure.phase, "eager")
        mine = found.get((num_envs, Measure(measure.phase, ours)))
        if measure.is_other and mine:
            ratios = [a[0][0] / b[0][0] for a, b in zip(mine, turns, strict=True)]
            who = Measure(measure.phase, ours).title
            lines.append(f"{num_envs:,} environments: {who}, over {measure.title}: {spread(ratios, '.2f')}")
    return lines


def main(argv) -> bool:
    if list(argv) == [WORKER]:
        return work()
    args = parse_args(Args, argv)
    args.check()
    where = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"{os.cpu_count()} CPU cores"
    with contextlib.ExitStack() as stack:
        roots = {"the present code": ROOT}
        if args.against:
            roots[args.against] = stack.enter_context(checked_out(args.against))
        workers = [Worker(root, name, args) for name, root in roots.items()]
        for worker in workers:
            stack.callback(worker.close)
        found = in_turns(args, workers)
    text = "\n\n".join([str(comparison(args, found)), *peer_ratios(found)])
    machine = f"{where}, torch {torch.__version__}, {args.torch_threads} thread(s), {args.repeats} turns"
    folder = new_folder(Path("runs/throughput"))
    (folder / "throughput.md").write_text(f"{text}\n\n{machine}\n", encoding="utf-8")
    print(f"\n{text}\n\n{machine}; report: {folder}")
    return True


if __name__ == "__main__":
    run_main(main, sys.argv[1:])
