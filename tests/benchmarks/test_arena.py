"""The arena: agents, a user's maker and the classics; the maker that docs/arena.md shows."""

import json
import re
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from common import CPU, untuned

import phase3_spread_vs_bs as phase3
import phase4_selfplay as phase4
from envs.benchmark.league import LEAGUE
from envs.models import make_model
from envs.run.errors import UsageError
from envs.run.files import save_checkpoint

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import arena  # noqa: E402

SMALL = {"num_steps": 6, "moneyness": (-0.5, 0.5)}
EPISODES = ("--episodes", "32")


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(arena, "classical_makers", untuned)
    monkeypatch.setattr(arena, "DEVICE", CPU)
    return tmp_path


def make_run(folder: Path, module, **market) -> str:
    """A run folder with the checkpoint of an agent that nobody has trained."""
    args = module.Args(**{**SMALL, **market})
    torch.manual_seed(0)
    agent = module.Agent(module.make_market(args, make_model(args, dt=1 / 504), 1, CPU))
    folder.mkdir(parents=True)
    save_checkpoint(
        folder / "checkpoint.pt", {"phase": module.PHASE, "args": asdict(args), "agent": agent.state_dict()}
    )
    return str(folder)


def documented_maker() -> str:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "arena.md").read_text(), re.DOTALL)
    return code


def test_the_documented_maker_has_ten_lines():
    assert len([line for line in documented_maker().splitlines() if line]) <= 10


def test_agents_of_both_phases_and_the_documented_maker(place, capsys):
    (place / "my_maker.py").write_text(documented_maker())
    runs = [make_run(place / "runs" / "A", phase3), make_run(place / "runs" / "B", phase4)]
    assert arena.main([*runs, "my_maker.py", *EPISODES])
    content = json.loads((place / "runs" / "arena" / "arena.json").read_text())
    assert content["names"] == ["A", "B", "my_maker", *LEAGUE]
    assert sum(content["ratings"]) == pytest.approx(0.0, abs=1e-9)
    own = content["share of takers"][2]
    assert all(0.05 < share < 0.95 for share in own)  # takers trade with it, whoever the rival is
    table = (place / "runs" / "arena" / "arena.md").read_text()
    assert "my_maker" in table
    assert "Arena (heston, 2 makers, 32 episodes of each match)" in table
    page = (place / "runs" / "arena" / "report.html").read_text()
    assert page.count("data:image/png") == 1
    assert "report and figure: runs/arena" in capsys.readouterr().out


def test_flags_make_another_market(place):
    (place / "my_maker.py").write_text(documented_maker())
    flags = "--flags=--dynamics gbm --num-makers 3 --num-steps 6 --moneyness 0"
    assert arena.main(["my_maker.py", flags, *EPISODES])
    assert "Arena (gbm, 3 makers" in (place / "runs" / "arena" / "arena.md").read_text()


def test_a_maker_of_two_parts_is_played_as_the_classics_are(place):
    (place / "two.py").write_text(
        "from envs.baselines import makers\n\ndef maker(market):\n    return makers.constant_spread(market, 1)\n"
    )
    args = phase4.Args(**SMALL)
    market = phase4.make_market(args, make_model(args, dt=1 / 504), 4, CPU)
    policy = arena.load_maker("two.py", market)
    assert isinstance(policy, arena.Maker)
    assert market.by_name(policy(market.reset(seed=1)[0][:, 0]))["ask"].unique() == 1.0


def test_names_without_the_time_where_that_is_enough():
    one, two = "runs/heston__x__1__20261124-124529", "runs/heston__x__2__20261124-124529-2"
    assert arena.names_of([f"{one}/checkpoint.pt", f"{two}/checkpoint.pt", "a/mine.py"]) == [
        "heston__x__1", "heston__x__2", "mine",
    ]  # fmt: skip
    again = "runs/heston__x__1__20261125-124529/checkpoint.pt"
    assert arena.names_of([f"{one}/checkpoint.pt", again])[0] == "heston__x__1__20261124-124529"


POLICY = "def maker(market):\n    def policy(observation):\n        {}\n    return policy\n"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("def maker(market:\n", "line 1: SyntaxError: "),
        ("x = 1\n\nprint(y)\n", "line 3: NameError: name 'y' is not defined"),
        ("raise SystemExit(0)\n", "line 1: SystemExit: 0"),
        ("def quote(market):\n    pass\n", "has no function maker(market)"),
        ("maker = 3\n", "has no function maker(market)"),
        ("def maker():\n    pass\n", "TypeError: maker() takes 0 positional arguments but 1 was given"),
        ("def maker(market):\n    return 3\n", "maker(market) is a int (a policy, observation → action)"),
        (POLICY.format("return 3"), "its action has the shape (), a int ((8, 6), a tensor)"),
        (POLICY.format("return observation[:, :3]"), "its action has the shape (8, 3) ((8, 6), a tensor)"),
        (POLICY.format("return observation[:, :6] * float('nan')"), "its action is NaN or infinite"),
        (POLICY.format("return 0 * observation[:, :6] - 1"), "ask + bid of an option are -2 (0 or more"),
        (POLICY.format("return observation.undefined"), "line 3: AttributeError"),
        (POLICY.format("return 0 * observation[:, :6] + (1 if observation[0, 0] > 0.5 else -1)"), "ask + bid of"),
    ],
)  # fmt: skip
def test_bad_makers(place, code, message):
    (place / "my_maker.py").write_text(code)
    with pytest.raises(UsageError) as error:
        arena.main(["my_maker.py", "--flags=--num-steps 6 --moneyness -0.5 0.5", *EPISODES])
    assert str(error.value).startswith("my_maker.py")
    assert message in str(error.value)
    assert not (place / "runs").exists()


def test_bad_entrants(place):
    def refusal(*flags: str) -> str:
        with pytest.raises(UsageError) as error:
            arena.main([*flags])
        return str(error.value)

    run = make_run(place / "runs" / "A", phase4)
    (place / "my_maker.py").write_text(documented_maker())
    assert refusal() == "entrants are 0 (at least 1, at most 24)"
    assert refusal("absent.py") == "absent.py: no such file"
    assert refusal("runs/absent") == "runs/absent: no such checkpoint"
    assert refusal(run, f"{run}/checkpoint.pt") == "two entrants are called 'A'"
    assert refusal("my_maker.py", "--episodes", "1") == "--episodes is 1 (at least 2, at most 1.04858e+06)"
    assert "--dynamics is 'historical'" in refusal(run, "--flags=--dynamics historical")
    assert "No closing quotation" in refusal(run, '--flags="')
    other = make_run(place / "runs" / "B", phase4, moneyness=(0.0,))
    assert refusal(run, other).startswith(f"{other}: --moneyness has 2, but the agent was trained with 1")
    save_checkpoint(place / "runs" / "B" / "checkpoint.pt", {"phase": "phase1", "args": {}, "agent": {}})
    assert refusal(other).endswith("checkpoint.pt: a checkpoint of phase1, not of phase3 or phase4")
