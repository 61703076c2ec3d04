"""Speeds are measured in turns and compared; bad flags are said in a line."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from envs.run.errors import UsageError

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import throughput  # noqa: E402
from throughput import Measure  # noqa: E402


class Fake:
    """A worker that is `factor` times as fast in every turn as in the one before."""

    def __init__(self, speed: float, factor: float = 2.0):
        self.speed = speed
        self.factor = factor
        self.asked = []

    def __call__(self, measure, num_envs):
        self.asked.append((num_envs, measure))
        turn = self.asked.count((num_envs, measure)) - 1
        updates = 7.0 if measure.phase == "phase2" and measure.kind != "market" else None
        return self.speed * self.factor**turn, updates


def test_commits_take_turns_and_ratios_are_of_a_turn():
    args = throughput.Args(phases=("phase1", "phase2"), num_envs=(64,), repeats=3, peers=True, against="abc")
    own, other = Fake(100.0), Fake(50.0, factor=1.0)
    found = throughput.in_turns(args, [own, other])
    kinds = [(phase, kind) for phase in ("phase1", "phase2") for kind in ("market", "eager", "small", "peer")]
    kinds.remove(("phase1", "small"))
    assert own.asked == [(64, Measure(*pair)) for pair in kinds] * 3
    assert other.asked == [asked for asked in own.asked if asked[1].kind != "peer"]
    table = throughput.comparison(args, found)
    rows = {row[1]: row for row in table.body}
    assert rows["phase 1, PPO, eager"] == [
        "64", "phase 1, PPO, eager", "200 [100, 400]", "", "50 [50, 50]", "4.00 [2.00, 8.00]",
    ]  # fmt: skip
    assert rows["phase 2, SAC, eager"][3] == "7 [7, 7]"
    assert rows["Stable-Baselines3 PPO, phase 1's market"][4:] == ["", ""]
    assert throughput.peer_ratios(found) == [
        "64 environments: phase 1, PPO, eager, over Stable-Baselines3 PPO, phase 1's market: 1.00 [1.00, 1.00]",
        "64 environments: phase 2, 64×64, 256 a batch, "
        "over Stable-Baselines3 SAC, 64×64, 256 a batch, phase 2's market: 1.00 [1.00, 1.00]",
    ]


def test_quotes_beside_mbt_gym():
    args = throughput.Args(phases=("market",), num_envs=(2,), repeats=1)
    assert [measure.kind for measure in throughput.measures(args)] == ["market", "mbt_gym"]
    assert throughput.speed(args, Measure("market", "mbt_gym"), 2)[0] > 0
    assert throughput.market_speed(2, steps=1) > 0
    found = throughput.in_turns(args, [Fake(10.0)])
    (line,) = throughput.peer_ratios(found)
    assert line == "2 environments: QuotingEnv, quotes, over mbt_gym's arithmetic, quotes: 1.00"


def test_peers_learn_on_the_cpu_where_there_is_a_gpu(monkeypatch):
    devices = []
    monkeypatch.setattr(throughput, "DEVICE", torch.device("meta"))
    monkeypatch.setattr(throughput, "stable_baselines3_ppo", lambda module, env: devices.append(env.device) or 1.0)
    monkeypatch.setattr(throughput, "stable_baselines3_sac", lambda env: (devices.append(env.device), 1.0))
    for phase in ("phase1", "phase2", "phase3"):
        throughput.speed(throughput.Args(), Measure(phase, "peer"), 2)
    assert devices == [torch.device("cpu")] * 3


def refusal(*flags: str) -> str:
    with pytest.raises(UsageError) as error:
        throughput.main(flags)
    return str(error.value)


def test_bad_flags(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for phase in ("phase1", "phase2", "phase3", "phase4", "market"):
        assert refusal("--num-envs", "0", "--phases", phase) == "--num-envs is 0 (at least 1, at most 1048576)"
    assert refusal("--repeats", "0") == "--repeats is 0 (at least 1, at most 1000)"
    assert refusal("--num-envs") == "--num-envs is empty (one or more)"
    assert refusal("--dynamics", "levy").startswith("--dynamics is 'levy'")
    if shutil.which("git"):
        assert refusal("--against", "no-such-commit").startswith("--against is 'no-such-commit' (a commit of")
        assert refusal("--against=--output=x").startswith("--against is '--output=x' (a commit of")
    assert list(tmp_path.iterdir()) == []


def is_repository() -> bool:
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    return bool(shutil.which("git")) and subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not is_repository(), reason="needs git and a repository")
def test_another_commit_is_measured_in_turns_and_leaves_nothing_behind(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    trees = ["git", "-C", str(ROOT), "worktree", "list"]
    before = subprocess.run(trees, capture_output=True, text=True, check=True).stdout
    assert throughput.main(["--phases", "market", "--num-envs", "2", "--repeats", "2", "--against", "HEAD"])
    assert subprocess.run(trees, capture_output=True, text=True, check=True).stdout == before
    text = (tmp_path / "runs" / "throughput" / "throughput.md").read_text()
    assert re.search(r"\| 2 +\| +QuotingEnv, quotes \| [\d, \[\]]+ \| +\| [\d, \[\]]+ \| [\d. ,\[\]]+ \|", text)
    assert "a second, HEAD" in text
    assert capsys.readouterr().out.count("turn ") == 4


def test_an_error_of_a_worker_is_said_in_a_line(tmp_path, monkeypatch):
    script = tmp_path / "benchmarks" / "throughput.py"
    script.parent.mkdir()
    script.write_text("raise ImportError('another interface')\n")
    worker = throughput.Worker(tmp_path, "HEAD~9", throughput.Args())
    with pytest.raises(
        UsageError, match=r"^HEAD~9, QuotingEnv, quotes, 2 environments: ImportError: another interface$"
    ):
        worker(Measure("market", "market"), 2)
    worker.close()
