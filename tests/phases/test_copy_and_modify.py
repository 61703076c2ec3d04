"""The user's way of working: copy a script, change lines, run it; nothing but envs/ is needed beside it."""

import json
import shutil

import pytest
import torch
from common import IMITATION, PHASES, ROOT, phases

from envs.benchmark import makers
from envs.market import dynamics


@pytest.fixture
def copied(tmp_path, script):
    """copied(phase, edits, …) → the run folder of a small run of the script's copy with these edits (old → new)."""

    def run(phase, edits: dict[str, str], **flags):
        shutil.copytree(ROOT / "envs", tmp_path / "copy" / "envs")
        source = (ROOT / phase.script).read_text()
        if phase.name in ("phase3", "phase4"):  # for speed
            edits = {**edits, f"IMITATION = {IMITATION}": "IMITATION = 20"}
        for old, new in edits.items():
            assert old in source, old
            source = source.replace(old, new)
        (tmp_path / "copy" / "my_idea.py").write_text(source)
        few = flags if phase.name == "phase0" else {"eval_episodes": 64, **flags}
        result = script("my_idea.py", *phase.flags(4, num_evaluations=2, **few), root=tmp_path / "copy")
        assert result.returncode in (0, 1), result.stderr
        (folder,) = tmp_path.glob("runs/*my_idea*")
        assert (folder / "benchmark.json").exists(), result.stderr
        return folder

    return run


# A network that is not of `envs.networks`
MY_NETWORK = """
class MyNetwork(nn.Module):
    def __init__(self, inputs: int, actions: int, hidden: int):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU())
        self.mean = nn.Linear(hidden, actions)
        self.value = nn.Linear(hidden, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.actor(x), self.critic(x)

    def actor(self, x: Tensor) -> Tensor:
        return self.mean(self.body(x))

    def critic(self, x: Tensor) -> Tensor:
        return self.value(self.body(x))[:, 0]


class Agent(nn.Module):
"""


@phases("", slow="1 3 4")  # with fewer edits they are below; 0 is in test_phase0.py
def test_another_network(copied, phase):
    edits = {"self.network = ActorCritic(": "self.network = MyNetwork(", "class Agent(nn.Module):\n": MY_NETWORK}
    folder = copied(phase, {**edits, "gae_lambda: float = ": "gae_lambda: float = 0.9 * "})
    assert "network.body.2.weight" in torch.load(folder / "checkpoint.pt", weights_only=True)["agent"]
    default = phase.module.Args().gae_lambda
    assert json.loads((folder / "args.json").read_text())["gae_lambda"] == pytest.approx(0.9 * default)


# A market whose makers also choose a premium on all asks, and see the spot's last move
MY_MARKET = """
class MyMarket(QuotingEnv):
    def action_bounds(self):
        return {**super().action_bounds(), "premium": (-1.0, 1.0)}

    def observation_parts(self):
        last_move = Part(1, lambda env: 100 * (env.spot[env.t] / env.spot[max(env.t - 1, 0)] - 1)[:, None, None])
        return {"last move": last_move, **super().observation_parts()}

    def to_edges(self, actions):
        premium = self.by_name(actions)["premium"][..., None]
        return super().to_edges(actions) + torch.stack((premium, torch.zeros_like(premium)), -2)


def make_market(args: Args, model: Dynamics, num_envs: int, device: torch.device) -> QuotingEnv:
    return MyMarket("""


@phases("3", slow="4")
def test_one_more_action_another_observation_and_a_wider_network_take_four_edits(copied, phase):
    header = "def make_market(args: Args, model: Dynamics, num_envs: int, device: torch.device) -> QuotingEnv:\n"
    folder = copied(
        phase,
        {
            f"{header}    return QuotingEnv(": "from envs.market.env import Part\n" + MY_MARKET,
            "self.parts = (4, options, options)": "self.parts = (5, options, options)",
            "target, band), -1)": "target, band, 0.2 * common[:, 4:]), -1)",
            "HIDDEN = 64": "HIDDEN = 96",
        },
        risk_aversion=0.0,  # or tuning them all takes long
    )
    agent = torch.load(folder / "checkpoint.pt", weights_only=True)["agent"]
    assert 0.1 < agent["observation_std"][0] != 1.0  # the first column is the new one, and it is standardised
    usual = (
        PHASES[phase.name]
        .module.Agent(PHASES[phase.name].module.make_market(phase.args(), dynamics.GBM(), 1, torch.device("cpu")))
        .state_dict()
    )
    assert len(agent["actor_logstd"]) == 1 + len(usual["actor_logstd"]) == 15
    assert len(agent["observation_mean"]) == 1 + len(usual["observation_mean"])
    assert agent["network.actor.0.weight"].shape == (96, len(agent["observation_mean"]))
    assert agent["network.actor.4.weight"].shape == (15, 96)
    row = json.loads((folder / "benchmark.json").read_text())["rows"]
    assert set(row) >= phase.named - {makers.MULTI_ASSET, makers.VEGA_DP}  # the classical makers play beside it
    columns = (folder / "metrics.csv").read_text().splitlines()[0]
    assert "losses/action_std_14" in columns
