"""Phase 1 as a user runs it: short runs of the real script, and what a researcher relies on."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import phase1_delta_hedge_ppo as phase1
from envs import benchmark, dynamics, runs

SCRIPT = "phase1_delta_hedge_ppo.py"
QUICK = ("--num-envs", 64, "--total-timesteps", 64 * 30 * 12, "--num-evaluations", 4, "--eval-episodes", 512)


def run_folder(tmp_path, pattern="*") -> Path:
    folders = sorted((tmp_path / "runs").glob(pattern), key=lambda path: path.stat().st_mtime)
    return folders[-1]


@pytest.mark.parametrize("name", ["gbm", "garch", "heston", "merton"])
def test_smoke(script, tmp_path, name):
    result = script(SCRIPT, "--dynamics", name, *QUICK)
    assert result.returncode in (0, 1), result.stderr
    verdict = "BENCHMARK PASSED" if result.returncode == 0 else "BENCHMARK FAILED"
    assert verdict in result.stdout
    folder = run_folder(tmp_path)
    files = {"args.json", "metrics.csv", "checkpoint.pt", "benchmark.json", "benchmark.md"}
    files |= {"learning_curve.png", "no_trade_bands.png", "pnl.png"}
    assert {path.name for path in folder.iterdir()} == files
    content = json.loads((folder / "benchmark.json").read_text())
    assert content["passed"] == (result.returncode == 0)
    named = {"agent", "Black–Scholes delta", "Leland", "Whalley–Wilmott, tuned", "constant band, tuned"}
    assert named <= set(content["rows"])
    assert ("exact optimum" in content["rows"]) == (name in ("gbm", "garch"))
    rows = runs.read_metrics(folder / "metrics.csv")
    assert len(rows) == 4
    assert rows[-1]["global_step"] == 64 * 30 * 12


def test_same_seed_same_numbers_and_killed_runs_resume_to_them(script, tmp_path):
    flags = ("--num-envs", 64, "--total-timesteps", 64 * 30 * 120, "--num-evaluations", 30, "--eval-episodes", 512)
    first, second = tmp_path / "first", tmp_path / "second"
    folders = []
    for place in (first, second):
        place.mkdir()
        command = [sys.executable, str(ROOT / SCRIPT), *map(str, flags)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if place == first:
            done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode in (0, 1), done.stderr
        else:
            process = subprocess.Popen(
                command, cwd=place, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            deadline = time.time() + 120
            while time.time() < deadline:  # kill it somewhere in the middle, whatever it is doing
                metrics = list(place.glob("runs/*/metrics.csv"))
                if metrics and len(metrics[0].read_text().splitlines()) > 6:
                    break
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
            process.wait()
            (folder,) = place.glob("runs/*")
            assert not (folder / "benchmark.json").exists()
            rows_then = len((folder / "metrics.csv").read_text().splitlines())
            assert rows_then < 31
            resumed = subprocess.run(
                [sys.executable, str(ROOT / SCRIPT), "--resume", str(folder)],
                cwd=place, env=environment, capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert resumed.returncode == done.returncode, resumed.stderr
        folders.append(next(place.glob("runs/*")))
    one, two = folders
    assert (one / "benchmark.json").read_bytes() == (two / "benchmark.json").read_bytes()
    states = [torch.load(folder / "checkpoint.pt", weights_only=True)["agent"] for folder in folders]
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
    curves = [runs.read_metrics(folder / "metrics.csv") for folder in folders]
    for row in curves[0] + curves[1]:
        row.pop("charts/SPS")
    assert curves[0] == curves[1]
    # resuming a finished run repeats its benchmark; another value of a flag would not be the same run
    result = script(SCRIPT, "--resume", two, "--learning-rate", 0.1)
    assert result.returncode == 2
    assert result.stderr == "error: --learning-rate is 0.1, but the run to resume has 0.001\n"


def test_a_run_killed_before_its_first_checkpoint_starts_again(script, tmp_path):
    folder = tmp_path / "runs" / "killed"
    folder.mkdir(parents=True)
    flags = {"num_envs": 64, "total_timesteps": 64 * 30 * 12, "num_evaluations": 4, "eval_episodes": 512}
    runs.write_json(folder / "args.json", {**vars(phase1.Args()), **flags})
    assert script(SCRIPT, "--resume", folder).returncode == 1
    assert script(SCRIPT, *QUICK).returncode == 1
    benchmarks = [path.read_bytes() for path in tmp_path.glob("runs/*/benchmark.json")]
    assert len(benchmarks) == 2
    assert benchmarks[0] == benchmarks[1]


def test_seeds_differ(tmp_path):
    weights = []
    for seed in (0, 1):
        args = phase1.Args(seed=seed, num_envs=32, total_timesteps=32 * 30 * 2, num_evaluations=1, save_model=False)
        agent, _steps = phase1.train(args, dynamics.GBM(), tmp_path, torch.device("cpu"), None, None)
        weights.append(agent.actor_mean[0].weight)
    assert not torch.equal(*weights)


def test_training_improves_the_policy_and_the_agent_agrees_when_trading_is_free(tmp_path):
    """Half a million steps: well above the first evaluation; at zero cost the agent is as good as delta and optimum."""
    for cost_rate in (1e-3, 0.0):
        args = phase1.Args(cost_rate=cost_rate, total_timesteps=30_720 * 16, num_evaluations=4, save_model=False)
        agent, steps = phase1.train(args, dynamics.GBM(), tmp_path, torch.device("cpu"), None, None)
        curve = [row["charts/gain_over_black_scholes"] for row in runs.read_metrics(tmp_path / "metrics.csv")]
        assert curve[-1] > curve[0]
        if cost_rate == 0.0:
            args.eval_episodes = 16_384
            result = phase1.run_benchmark(args, dynamics.GBM(), agent, steps, tmp_path, torch.device("cpu"))
            assert result.passed, result.verdict()
            assert "agrees with exact optimum" in result.verdict()


def test_evaluate_on_other_markets(script, tmp_path):
    script(SCRIPT, *QUICK)
    trained = run_folder(tmp_path)
    before = {path.name: path.read_bytes() for path in trained.iterdir()}
    result = script(SCRIPT, "--evaluate", trained, "--dynamics", "heston", "--cost-rate", 2e-3)
    assert result.returncode in (0, 1), result.stderr
    content = json.loads((run_folder(tmp_path, "*evaluate*") / "benchmark.json").read_text())
    assert content["settings"]["dynamics"] == "heston"
    assert content["settings"]["cost_rate"] == 2e-3
    assert {path.name: path.read_bytes() for path in trained.iterdir()} == before


def test_evaluate_on_the_real_sp500(script, tmp_path):
    script(SCRIPT, "--dynamics", "garch", "--history-end", "2010-12-31", *QUICK)
    result = script(SCRIPT, "--evaluate", run_folder(tmp_path), "--dynamics", "historical")
    assert result.returncode in (0, 1), result.stderr
    folder = run_folder(tmp_path, "*evaluate*")
    content = json.loads((folder / "benchmark.json").read_text())
    assert content["settings"]["windows"] == "all of 30 days, 2011-01-03 to 2018-12-31, returns demeaned"
    assert content["settings"]["episodes"] == 2012 - 29
    separate = json.loads((folder / "benchmark_non_overlapping.json").read_text())
    assert separate["settings"]["episodes"] == -(-(2012 - 29) // 30)
    assert "optimum of the fitted model" in content["rows"]


def test_copy_and_modify(script, tmp_path):
    """The user's way of working: copy the file, change lines, run it; nothing but envs/ is needed beside it."""
    shutil.copytree(ROOT / "envs", tmp_path / "copy" / "envs")
    source = (ROOT / SCRIPT).read_text()
    changed = source.replace("nn.Tanh()", "nn.SiLU()").replace("gae_lambda: float = 0.6", "gae_lambda: float = 0.9")
    assert changed != source
    (tmp_path / "copy" / "my_idea.py").write_text(changed)
    result = script("my_idea.py", *QUICK, root=tmp_path / "copy")
    assert result.returncode in (0, 1), result.stderr
    folder = run_folder(tmp_path)
    assert "my_idea" in folder.name
    assert json.loads((folder / "args.json").read_text())["gae_lambda"] == 0.9


def test_no_phase_imports_another_and_envs_keeps_to_itself():
    phases = [path.stem for path in ROOT.glob("phase*.py")]
    for path in [*ROOT.glob("phase*.py"), *(ROOT / "envs").glob("*.py")]:
        text = path.read_text()
        assert not re.search(rf"(from|import) ({'|'.join(phases)})", text), path
        if path.parent.name == "envs":
            assert "import wandb" not in text, path
            assert "sys.argv" not in text, path


def test_track_offline(script, tmp_path):
    result = script(SCRIPT, *QUICK, "--track", env={"WANDB_MODE": "offline", "WANDB_SILENT": "true"})
    assert result.returncode in (0, 1), result.stderr
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_help_reads_like_documentation(script):
    result = script(SCRIPT, "--help")
    assert result.returncode == 0
    for text in ("--num-envs", "--cudagraphs", "Exit code", "--evaluate", "exact optimum"):
        assert text in result.stdout


def test_compile_gives_the_same_results(tmp_path):
    args = phase1.Args(num_envs=32, total_timesteps=32 * 30 * 2, num_evaluations=1, num_minibatches=2, save_model=False)
    weights = []
    for compiled in (False, True):
        args.compile = compiled
        agent, _steps = phase1.train(args, dynamics.GBM(), tmp_path, torch.device("cpu"), None, None)
        weights.append(torch.cat([p.flatten() for p in agent.parameters()]).detach())
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_graphs_give_the_same_results(tmp_path):
    args = phase1.Args(num_envs=64, total_timesteps=64 * 30 * 10, num_evaluations=2, save_model=False)
    weights = []
    for captured in (False, True):
        args.cudagraphs = captured
        agent, _steps = phase1.train(args, dynamics.GBM(), tmp_path, torch.device("cuda"), None, None)
        weights.append(torch.cat([p.flatten() for p in agent.parameters()]).detach())
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-3, atol=1e-4)


def test_divergence_stops_the_run_and_names_the_last_checkpoint(script, tmp_path):
    result = script(SCRIPT, *QUICK, "--learning-rate", 1e30)
    assert result.returncode == 3
    (line,) = [line.split("error: ")[1] for line in result.stderr.splitlines() if "error: " in line]
    assert " by step " in line
    assert "checkpoint.pt" in line
    checkpoint = runs.load_checkpoint(run_folder(tmp_path), "phase1")
    assert all(value.isfinite().all() for value in checkpoint["agent"].values())


def test_interrupt_has_its_own_exit_code(tmp_path):
    command = [sys.executable, str(ROOT / SCRIPT), "--num-envs", "64"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env={**os.environ}
    )
    deadline = time.time() + 60
    while not list(tmp_path.glob("runs/*/metrics.csv")) and time.time() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume" in errors


def test_agent_policy_is_what_training_acts_with():
    env = phase1.HedgingEnv(16)
    agent = phase1.Agent(env)
    agent.fit_normaliser(env)
    observation, _ = env.reset(seed=0)
    raw, _, _ = agent.act(agent.normalise(observation), torch.zeros(16, 2))
    torch.testing.assert_close(agent.policy(observation), agent.to_band(raw))
    logprob, _, _ = agent.evaluate(agent.normalise(observation), raw)
    expected = torch.distributions.Normal(raw, agent.actor_logstd.exp()).log_prob(raw).sum(-1)
    torch.testing.assert_close(logprob, expected)
    assert benchmark.play(env, agent.policy)["pnl"].shape == (16,)
