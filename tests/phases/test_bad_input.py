"""Bad input: one line that names flag or file, value and what is allowed; exit code 2; nothing written."""

import fcntl
import importlib
import os
import pickle

import pytest
import torch
from common import CPU, ROOT

import phase0_marlvol_calibration as phase0
import phase1_delta_hedge_ppo as phase1
import phase2_multi_order_sac as phase2
import phase3_spread_vs_bs as phase3
import phase4_selfplay as phase4
from envs.market import dynamics
from envs.market.units import TRADING_DAYS
from envs.models import make_model
from envs.run import files
from envs.run.run import run_main

MANY = ["--total-timesteps", 10**10, "--buffer-size", 10**9]
HUGE = ["--dynamics", "gbm", "--num-envs", 1_000_000, "--num-steps", 1200]


@pytest.fixture(autouse=True)
def sixteen_gigabytes(monkeypatch):
    """On any machine."""
    monkeypatch.setattr(files, "_free_memory", lambda: 16 * 2**30)


def fails(capsys, tmp_path, monkeypatch, *flags, phase=phase1) -> str:
    """Runs main in an empty folder; returns the one line on stderr."""
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        run_main(phase.main, [*map(str, flags)])
    errors = capsys.readouterr().err
    assert stop.value.code == 2
    assert errors.count("\n") == 1
    assert errors.startswith("error: ")
    assert sorted(tmp_path.rglob("*")) == before
    return errors


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dynamics", "levy"], "--dynamics is 'levy' (one of gbm, garch, heston, merton"),
        (["--dynamics", "historical"], "historical with --evaluate"),
        (["--volatility", -0.2], "--volatility is -0.2 (at least 0.001"),
        (["--volatility", "nan"], "--volatility is nan"),
        (["--volatility", 10, "--num-steps", 500], "--volatility is 10.0 (at most 2.1 over --num-steps)"),
        (["--cost-rate", -1e-3], "--cost-rate is -0.001 (at least 0"),
        (["--risk-aversion", -1], "--risk-aversion is -1.0"),
        (["--num-envs", 0], "--num-envs is 0 (at least 1"),
        (["--num-envs", "many"], "--num-envs"),
        (["--num-steps", 0], "--num-steps is 0"),
        (["--num-minibatches", 7], "--num-minibatches is 7 (must divide num_envs × num_steps = 30720"),
        (["--num-minibatches", 0], "--num-minibatches is 0"),
        (["--total-timesteps", 100], "--total-timesteps is 100 (at least 30720"),
        (["--learning-rate", 0], "--learning-rate is 0.0"),
        (["--gamma", 1.1], "--gamma is 1.1"),
        (["--gae-lambda", -0.1], "--gae-lambda is -0.1"),
        (["--clip-coef", 0], "--clip-coef is 0.0"),
        (["--eval-episodes", 1], "--eval-episodes is 1"),
        (["--eval-episodes", 2**26], "--eval-episodes 67108864 needs 64.0 GiB (at most the"),
        (["--num-envs", 2**20, "--num-steps", 2000, "--total-timesteps", 10**10], "--num-envs 1048576 needs"),
        (["--seed", "9" * 400], "--seed is 999"),
        (["--num-steps", "9" * 400], "--total-timesteps is 12000000 (at least"),
        (["--exp-name", "é" * 60], "under 100 bytes"),
        (["--evaluate", "x" * 300], "no such checkpoint"),
        (["--resume", "a\nb\x1b[31m"], r"a\nb\x1b[31m: no such checkpoint"),
        (["--dynamics", "garch", "--history", "a/" * 3000], "no such file"),
        (["--seed", -1], "--seed is -1"),
        (["--dynamics", "garch", "--history-end", "yesterday"], "--history-end is 'yesterday' (a day, YYYY-MM-DD)"),
        (["--dynamics", "garch", "--history", "absent.csv"], "absent.csv: no such file"),
        (
            ["--dynamics", "garch", "--history-end", "1999-03-01"],
            "closes of S&P 500 until 1999-03-01: 39 closes are too few to fit garch (at least 500); try other",
        ),
        (["--no-such-flag"], "--no-such-flag"),
        (["--history-end", "2010-12-31"], "need --dynamics garch"),
        (["--exp-name", "../../elsewhere"], "--exp-name is '../../elsewhere' (letters, digits"),
        (["--seed", 1_000_000], "--seed is 1000000 (at least 0, at most 999999)"),
        (["--evaluate", ""], "no checkpoint is named"),
        (["--resume", ""], "no checkpoint is named"),
        (["--resume", "runs/absent"], "runs/absent: no such checkpoint"),
        (["--evaluate", "absent.pt"], "absent.pt: no such checkpoint"),
    ],
)
def test_flags(capsys, tmp_path, monkeypatch, flags, message):
    assert message in fails(capsys, tmp_path, monkeypatch, *flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dynamics", "levy"], "--dynamics is 'levy' (one of gbm, garch, heston, merton"),
        (["--arrival-rate", -0.1], "--arrival-rate is -0.1 (more than 0, at most 10)"),
        (["--arrival-rate", 0], "--arrival-rate is 0.0"),
        (["--mean-order-size", 0.5], "--mean-order-size is 0.5 (at least 1"),
        (["--client-spread", -1], "--client-spread is -1.0"),
        (["--cost-rate", -1e-3], "--cost-rate is -0.001 (at least 0"),
        (["--num-strikes", 0], "--num-strikes is 0"),
        (["--strike-spacing", -5], "--strike-spacing is -5.0"),
        (["--strike-spacing", 50], "the lowest strike would be 0"),
        (["--strike-spacing", 1e-20], "--strike-spacing is 1e-20 (at least 0.01"),
        (["--num-strikes", 60, "--strike-spacing", 1], "are 120 options (at most 100)"),
        (["--target-entropy", 1.5], "--target-entropy is 1.5"),
        (["--buffer-size", 10_000_000_000], "--buffer-size 10000000000 needs"),
        (["--eval-episodes", 2**26], "--eval-episodes 67108864 needs 64.0 GiB (at most the"),
        (["--num-envs", 2**20, "--num-steps", 300, "--expiries", 300, *MANY], "--num-envs 1048576 needs"),
        (["--expiries", 30, 15], "--expiries is 30 15 (increasing days from 1 to --num-steps = 30"),
        (["--expiries", 15, 40], "--expiries is 15 40"),
        (["--expiries", 10, 20], "--expiries is 10 20"),
        (["--expiries", 0, 30], "--expiries is 0 30"),
        (["--expiries", 15.5], "--expiries"),
        (["--buffer-size", 100], "--buffer-size is 100 (at least 30720"),
        (["--batch-size", 1_200_000], "--batch-size is 1200000"),
        (["--batch-size", 1_000_001], "--buffer-size is 1000000 (at least 1e+06"),
        (["--random-share", 1.5], "--random-share is 1.5 (at least 0, at most 1)"),
        (["--batch-size", 0], "--batch-size is 0"),
        (["--utd", 0], "--utd is 0"),
        (["--tau", 0], "--tau is 0"),
        (["--gamma", 1.1], "--gamma is 1.1"),
        (["--alpha", 0], "--alpha is 0.0"),
        (["--learning-rate", "nan"], "--learning-rate is nan"),
        (["--learning-starts", -1], "--learning-starts is -1"),
        (["--hidden-size", 0], "--hidden-size is 0"),
        (["--seed", 1_000_000], "--seed is 1000000"),
        (["--total-timesteps", 100], "--total-timesteps is 100 (at least 30720"),
        (["--evaluate", "absent.pt"], "absent.pt: no such checkpoint"),
    ],
)
def test_flags_of_phase2(capsys, tmp_path, monkeypatch, flags, message):
    assert message in fails(capsys, tmp_path, monkeypatch, *flags, phase=phase2)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dynamics", "levy"], "--dynamics is 'levy' (one of gbm, garch, heston, merton"),
        (["--dynamics", "historical"], "historical with --evaluate"),
        (["--choice-sensitivity", 0], "--choice-sensitivity is 0.0 (more than 0"),
        (["--choice-sensitivity", -2], "--choice-sensitivity is -2.0"),
        (["--choice-sensitivity", "nan"], "--choice-sensitivity is nan"),
        (["--arrival-rate", 0], "--arrival-rate is 0.0 (more than 0, at most 20)"),
        (["--flow-sd", -1], "--flow-sd is -1.0"),
        (["--num-makers", 1], "--num-makers is 1 (at least 2, at most 16)"),
        (["--num-makers", 2.5], "--num-makers"),
        (["--moneyness"], "--moneyness is empty (one or more, increasing)"),
        (["--moneyness", 0, -1], "--moneyness is 0 -1 (one or more, increasing)"),
        (["--moneyness", "low"], "--moneyness"),
        (["--moneyness", 0, 7], "--moneyness has 7 (at least -5, at most 5)"),
        (["--expiries"], "--expiries is empty (one or more, increasing)"),
        (["--expiries", 120, 60], "--expiries is 120 60 (one or more, increasing)"),
        (["--expiries", 30, 120], "--expiries begins at 30 (at least --num-steps = 60)"),
        (["--expiries", 61.5], "--expiries"),
        (["--expiries", *range(60, 81)], "--moneyness × --expiries are 105 options (at most 100)"),
        (["--informed-share", 1.5], "--informed-share is 1.5 (at least 0, at most 1)"),
        (["--informed-share", -0.2], "--informed-share is -0.2"),
        (["--min-std", 0], "--min-std is 0.0 (more than 0, at most 1)"),
        (["--copies", 5], "--copies is 5 (1 or an even number, must divide --num-envs = 512)"),
        (["--start", "nowhere"], "--start"),
        (["--average", 0], "--average is 0.0 (more than 0, at most 1)"),
        (["--cost-rate", -1e-3], "--cost-rate is -0.001 (at least 0"),
        (["--risk-aversion", -1], "--risk-aversion is -1.0"),
        (["--mean-reversion", 0], "--mean-reversion is 0.0"),
        (["--vol-of-vol", -0.5], "--vol-of-vol is -0.5"),
        (["--correlation", 1.5], "--correlation is 1.5 (at least -1, at most 1)"),
        (["--vol-of-vol", 4], "--vol-of-vol is 4.0 (at least 0.001, at most 3)"),
        (["--volatility", 0], "--volatility is 0.0"),
        (
            ["--volatility", 0.001, "--vol-of-vol", 3, "--mean-reversion", 0.001],
            "--vol-of-vol is 3.0 (at most 0.045 with this --volatility and --mean-reversion)",
        ),
        (["--rival-spread", 0], "--rival-spread is 0.0"),
        (["--rival-risk-aversion", -1], "--rival-risk-aversion is -1.0"),
        (["--tuning-episodes", 1], "--tuning-episodes is 1"),
        (["--num-envs", 10_000_000], "--num-envs is 10000000"),
        ([*HUGE, "--total-timesteps", 10**10], "--num-envs 1000000 needs"),
        (["--tuning-episodes", 2**26], "--tuning-episodes 67108864 needs"),
        (["--eval-episodes", 2**26], "--eval-episodes 67108864 needs"),
        (["--num-minibatches", 7], "--num-minibatches is 7 (must divide num_envs × num_steps"),
        (["--total-timesteps", 100], "--total-timesteps is 100 (at least"),
        (["--gae-lambda", 2], "--gae-lambda is 2.0"),
        (["--seed", 1_000_000], "--seed is 1000000"),
        (["--history-end", "2010-12-31"], "need --dynamics garch"),
        (["--evaluate", "absent.pt"], "absent.pt: no such checkpoint"),
    ],
)
def test_flags_of_phase3(capsys, tmp_path, monkeypatch, flags, message):
    assert message in fails(capsys, tmp_path, monkeypatch, *flags, phase=phase3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num-makers", 1], "--num-makers is 1 (at least 2, at most 16)"),
        (["--opponent", "nobody"], "--opponent"),
        (["--lag", 0], "--lag is 0 (at least 1, at most the run's"),
        (["--lag", 200, "--total-timesteps", 384_000], "--lag is 200 (at least 1, at most the run's 12 updates)"),
        (["--min-std", 0], "--min-std is 0.0 (more than 0, at most 1)"),
        (["--classical-share", 1.5], "--classical-share is 1.5 (at least 0, at most 1)"),
        (["--pool-size", 1], "--pool-size is 1 (at least 2"),
        (["--pool-sampling", "best"], "--pool-sampling"),
        (["--guests", "runs/absent"], "runs/absent: no such checkpoint"),
        (["--start-edge", 0], "--start-edge is 0.0 (more than 0, at most 10)"),
        (["--start-edge", "nan"], "--start-edge is nan"),
        (["--copies", 3], "--copies is 3 (1 or an even number, must divide --num-envs = 64)"),
        (["--copies", 0], "--copies is 0"),
        (["--average", 0], "--average is 0.0 (more than 0, at most 1)"),
        (["--choice-sensitivity", 0], "--choice-sensitivity is 0.0"),
        (["--moneyness"], "--moneyness is empty (one or more, increasing)"),
        (["--expiries", 60, 60], "--expiries is 60 60 (one or more, increasing)"),
        (["--informed-share", 2], "--informed-share is 2.0 (at least 0, at most 1)"),
        (["--total-timesteps", 100], "--total-timesteps is 100 (at least 30720"),
        ([*HUGE, "--total-timesteps", 10**10], "--num-envs 1000000 with --episodes 8 needs"),
        (["--tuning-episodes", 2**26], "--tuning-episodes 67108864 needs"),
        (["--eval-episodes", 2**26], "--eval-episodes 67108864 needs"),
        (["--dynamics", "historical"], "historical with --evaluate"),
        (["--evaluate", "absent.pt"], "absent.pt: no such checkpoint"),
    ],
)
def test_flags_of_phase4(capsys, tmp_path, monkeypatch, flags, message):
    assert message in fails(capsys, tmp_path, monkeypatch, *flags, phase=phase4)


@pytest.mark.parametrize("phase", [phase3, phase4])
def test_a_market_of_another_size_than_the_maker_knows(capsys, tmp_path, monkeypatch, phase):
    args = phase.Args()
    market = phase.make_market(args, make_model(args, dt=0.5 / TRADING_DAYS), 1, CPU)
    agent = phase.Agent(market)
    content = {"phase": phase.PHASE, "args": vars(args), "agent": agent.state_dict(), "iteration": 0}
    torch.save({**content, "snapshots": {}}, tmp_path / "checkpoint.pt")
    for flags in (["--num-makers", 3], ["--privileged"]):
        flags = ("--evaluate", tmp_path, *flags)
        assert "its networks have other shapes" in fails(capsys, tmp_path, monkeypatch, *flags, phase=phase)
    for flags, message in (
        (["--moneyness", 0.0], "--moneyness has 1, but the agent was trained with 5: it quotes other options"),
        (["--expiries", 60, 120], "--expiries has 2, but the agent was trained with 1: it quotes other options"),
        (["--informed-share", 7], "--informed-share is 7.0 (at least 0, at most 1)"),
    ):
        assert message in fails(capsys, tmp_path, monkeypatch, "--evaluate", tmp_path, *flags, phase=phase)
    if phase is phase4:
        flags = ("--guests", tmp_path, "--num-makers", 3)
        assert "its networks have other shapes" in fails(capsys, tmp_path, monkeypatch, *flags, phase=phase)
        torch.save({**content, "snapshots": {"step 0": torch.zeros(7)}}, tmp_path / "checkpoint.pt")
        line = fails(capsys, tmp_path, monkeypatch, "--evaluate", tmp_path, phase=phase)
        assert "snapshot 'step 0' does not fit this market" in line


def test_a_book_of_another_size_than_the_agent_knows(capsys, tmp_path, monkeypatch):
    args = phase2.Args()
    env = phase2.make_env(args, dynamics.GBM(), 1, CPU)
    agent = phase2.Agent(env, args.hidden_size)
    content = {"phase": "phase2", "args": vars(args), "agent": agent.state_dict(), "iteration": 0}
    torch.save(content, tmp_path / "checkpoint.pt")
    flags = ("--evaluate", tmp_path, "--num-strikes", 3)
    assert "its networks have other shapes" in fails(capsys, tmp_path, monkeypatch, *flags, phase=phase2)
    flags = ("--evaluate", tmp_path, "--num-strikes", 10, "--expiries", 30)  # as many options, but others
    assert "--num-strikes is 10, but the agent" in fails(capsys, tmp_path, monkeypatch, *flags, phase=phase2)
    flags = ("--evaluate", tmp_path, "--exp-name", "../../elsewhere")
    assert "for a file name" in fails(capsys, tmp_path, monkeypatch, *flags, phase=phase2)
    content["args"]["expiries"] = ("a", 30)
    torch.save(content, tmp_path / "checkpoint.pt")
    assert "its expiries is ('a', 30), a tuple" in fails(
        capsys, tmp_path, monkeypatch, "--evaluate", tmp_path, phase=phase2
    )
    torch.save({**content, "iteration": "x"}, tmp_path / "checkpoint.pt")
    assert "its iteration is no count" in fails(capsys, tmp_path, monkeypatch, "--evaluate", tmp_path, phase=phase2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cudagraphs_without_a_gpu(capsys, tmp_path, monkeypatch):
    for phase in (phase0, phase1, phase2, phase3, phase4):
        message = fails(capsys, tmp_path, monkeypatch, "--cudagraphs", True, phase=phase)
        assert "--cudagraphs needs a GPU" in message


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("date,price\n2001-01-01,5\n", "line 1: no column 'close'"),
        ("date,close\n2001-01-01,5\n2001-01-02,0\n", "line 3: close 0 is not a positive"),
        ("date,close\n2001-01-01,5\n2001-01-02,-1\n", "line 3: close -1 is not a positive"),
        ("date,close\n2001-01-01,5\n2001-01-02,five\n", "line 3: close 'five' is not a number"),
        ("date,close\n2001-01-01,5\n2001-02-02,5\n", "line 3: gap of 32 days"),
    ],
)
def test_history(capsys, tmp_path, monkeypatch, rows, message):
    (tmp_path / "closes.csv").write_text(rows)
    line = fails(capsys, tmp_path, monkeypatch, "--dynamics", "garch", "--history", "closes.csv")
    assert f"closes.csv, {message}" in line


class Malicious:
    """What an attacker would put into a shared checkpoint: code that runs when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def checkpoint_file(path, kind: str) -> None:
    args = phase1.Args()
    agent = phase1.Agent(phase1.HedgingEnv(1))
    content = {"phase": "phase1", "args": vars(args), "agent": agent.state_dict(), "iteration": 0, "rows": 0}
    content |= dict.fromkeys(("optimizer", "generator", "market_generator", "tracker")) | {"world_size": 1}
    if kind == "other phase":
        torch.save({**content, "phase": "phase3"}, path)
    elif kind == "truncated":
        torch.save(content, path)
        path.write_bytes(path.read_bytes()[:2000])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("not a checkpoint")
    elif kind == "malicious":
        torch.save({**content, "agent": Malicious(path.parent / "owned")}, path)
    elif kind == "raw pickle":
        path.write_bytes(pickle.dumps(Malicious(path.parent / "owned")))
    elif kind == "foreign":
        torch.save({"weights": torch.zeros(3)}, path)
    elif kind == "other shape":
        torch.save({**content, "agent": {**agent.state_dict(), "actor_logstd": torch.zeros(5)}}, path)
    elif kind == "sound":
        torch.save(content, path)
    elif kind == "NaN":
        torch.save({**content, "agent": {**agent.state_dict(), "actor_logstd": torch.full((2,), torch.nan)}}, path)
    elif kind == "complex":
        torch.save({**content, "agent": {name: x.to(torch.cfloat) for name, x in agent.state_dict().items()}}, path)
    elif kind == "arguments of other types":
        torch.save({**content, "args": {**vars(args), "num_envs": "many"}}, path)
    elif kind == "arguments no dict":
        torch.save({**content, "args": [1, 2]}, path)
    elif kind == "incomplete":
        torch.save({"phase": "phase1"}, path)


@pytest.mark.parametrize("flag", ["--evaluate", "--resume"])
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("other phase", "a checkpoint of phase3, not of phase1"),
        ("truncated", "not a readable checkpoint"),
        ("empty", "not a readable checkpoint"),
        ("text", "checkpoint"),
        ("malicious", "refused"),
        ("raw pickle", "not a readable checkpoint"),
        ("foreign", "not a checkpoint of this project"),
        ("other shape", "does not fit"),
        ("incomplete", "does not fit"),
        ("arguments of other types", "its num_envs is 'many', a str"),
        ("arguments no dict", "its arguments are not a dict"),
        ("NaN", "NaN or infinite numbers in its agent"),
        ("complex", "its agent holds other than real tensors"),
    ],
)
def test_checkpoints(capsys, tmp_path, monkeypatch, flag, kind, message):
    path = tmp_path / "run" / "checkpoint.pt"
    path.parent.mkdir()
    checkpoint_file(path, kind)
    assert message in fails(capsys, tmp_path, monkeypatch, flag, path.parent)
    assert not (path.parent / "owned").exists()


@pytest.mark.parametrize(("trained_until", "seen"), [(None, "their end"), ("2015-12-31", "2015-12-31")])
def test_evaluating_on_closes_that_the_agent_was_trained_on(capsys, tmp_path, monkeypatch, trained_until, seen):
    path = tmp_path / "checkpoint.pt"
    checkpoint_file(path, "sound")
    content = torch.load(path, weights_only=True)
    content["args"] |= {"dynamics": "garch", "history_end": trained_until}
    torch.save(content, path)
    flags = ("--evaluate", path, "--dynamics", "historical", "--history-end", "2010-12-31")
    assert f"trained on closes of the S&P 500 until {seen}" in fails(capsys, tmp_path, monkeypatch, *flags)


def test_too_few_real_closes(capsys, tmp_path, monkeypatch):
    checkpoint_file(tmp_path / "checkpoint.pt", "sound")
    flags = ("--evaluate", tmp_path, "--dynamics", "historical", "--history-end", "2018-11-13")
    assert "there are 31 (at least 360, twelve episodes)" in fails(capsys, tmp_path, monkeypatch, *flags)


def smile_of(volatility: float) -> str:
    rows = [f"{t},{k},{volatility}\n" for t in (0.1, 1, 2) for k in (0.8, 0.9, 1.0, 1.1, 1.2)]
    return "".join(["maturity,strike,implied_volatility\n", *rows])


def test_a_smile_that_nothing_fits(capsys, tmp_path, monkeypatch):
    (tmp_path / "fives.csv").write_text(smile_of(5))
    line = fails(capsys, tmp_path, monkeypatch, "--smile", "fives.csv", phase=phase0)
    assert line.startswith("error: fives.csv: no smile can be fitted to it, ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 100_000, "args.json: damaged"),
        ('{"seed": ' + "9" * 5000 + "}", "args.json: damaged"),
        ('{"history": 2010}', "its history is 2010, a int"),
        ('{"history_end": 20101231}', "its history_end is 20101231, a int"),
        ('{"marlvol_checkpoint": ["runs/x"]}', "its marlvol_checkpoint is ('runs/x',), a tuple"),
        ('{"dynamics": "garch", "history": "a\\u0000b"}', r"a\x00b: no such file"),
        ('{"num_steps": 0}', "--num-steps is 0"),
        (None, "args.json: damaged"),
    ],
)
def test_saved_arguments(capsys, tmp_path, monkeypatch, content, message):
    if content is None:
        (tmp_path / "args.json").mkdir()
    else:
        (tmp_path / "args.json").write_text(content)
    assert message in fails(capsys, tmp_path, monkeypatch, "--resume", tmp_path)


def test_a_run_that_is_still_going_on(capsys, tmp_path, monkeypatch):
    """Two at once would write over each other; the second is refused, and the first loses nothing."""
    checkpoint_file(tmp_path / "checkpoint.pt", "sound")
    descriptor = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    line = fails(capsys, tmp_path, monkeypatch, "--resume", tmp_path)
    os.close(descriptor)
    assert "another process is at this run (wait for its end, or stop it)" in line


def test_runs_that_is_no_folder(capsys, tmp_path, monkeypatch):
    (tmp_path / "runs").write_text("")
    assert "runs: no run folder can be made in it (" in fails(capsys, tmp_path, monkeypatch)


def test_flags_of_the_benchmark_of_speed(capsys, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    throughput = importlib.import_module("throughput")
    for flags, message in (
        (["--num-envs", 0], "--num-envs is 0 (at least 1"),
        (["--num-envs"], "--num-envs is empty"),
        (["--iterations", 1], "--iterations is 1 (at least 2"),
        (["--phases", "phase4", "--num-envs", 6], "--copies is 4"),
    ):
        assert message in fails(capsys, tmp_path, monkeypatch, *flags, phase=throughput)


def test_flags_that_exclude_each_other(capsys, tmp_path, monkeypatch):
    line = fails(capsys, tmp_path, monkeypatch, "--evaluate", "a.pt", "--resume", "runs/b")
    assert "exclude each other" in line
