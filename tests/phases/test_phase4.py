"""What is particular to phase 4; what all phases share is in test_scripts.py."""

import copy
import importlib
import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from common import CPU, PHASES, ROOT, invented

import phase4_selfplay as phase4
from envs.baselines import makers as formulas
from envs.benchmark import makers
from envs.benchmark.contest import Validation
from envs.benchmark.makers import against
from envs.market.units import TRADING_DAYS
from envs.models import make_model
from envs.run import files, run
from envs.run.errors import UsageError
from envs.run.run import Run

PHASE = PHASES["phase4"]
CLASSICS = (makers.AVELLANEDA_STOIKOV, makers.BELIEVER_BAND)  # who know no moves of options, which take time to measure


def make(num_envs=12, **changes):
    """Flags, the classical makers of a market, and an agent that nobody has trained."""
    args = PHASE.args(**{"num_envs": num_envs, **changes})
    market = phase4.make_market(args, make_model(args, dt=0.5 / TRADING_DAYS), 64, CPU)
    classics = makers.assemble(market, invented(*CLASSICS), "invented")
    torch.manual_seed(args.seed)
    agent = phase4.Agent(market, args.apart)
    agent.fit([classics.env.like(64)], classics.policies[makers.BELIEVER_BAND])
    return args, classics, agent


def trained(folder: Path, saves: list | None = None, checkpoint=None, monkeypatch=None, **changes):
    """The state of an agent after a small run; `saves` collects what it would have written."""
    args, classics, _ = make(**changes)
    if saves is not None:
        monkeypatch.setattr(run, "save_checkpoint", lambda path, content: saves.append(copy.deepcopy(content)))
    if checkpoint is not None:
        args.resume = str(folder)
    command = Run(args, "phase4", CPU, folder=folder, checkpoint=checkpoint, trained=args)
    agent, snapshots = phase4.train(command, classics, {})
    return agent.state_dict(), snapshots


def marked(agent, number: float):
    """The agent with all parameters set to a number, to be recognised."""
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter.fill_(number)
    return agent


def number(agent) -> float:
    return next(agent.network.parameters()).flatten()[0].item()


def test_a_snapshot_is_the_whole_agent():
    _, classics, agent = make()
    other = phase4.Agent(classics.env.env)
    phase4.from_vector(other, phase4.to_vector(agent))
    for name, value in agent.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    observation = torch.randn(5, classics.env.single_observation_space.shape[0])
    assert torch.equal(phase4.at(phase4.to_vector(agent), other)(observation), agent.policy(observation))


@pytest.mark.parametrize("lag", [1, 3])
def test_the_opponent_is_lag_updates_behind(lag):
    args, classics, agent = make(opponent="lag", lag=lag, classical_share=0.0)
    opponents = phase4.Opponents(
        args, marked(agent, 0.0), [], [classics.policies[makers.AVELLANEDA_STOIKOV]], classics.env.env.like(args.rows)
    )
    played = []
    for iteration in range(1, 9):
        opponents.advance(agent, iteration, torch.Generator())
        played.append(number(opponents.newest))
        marked(agent, float(iteration))  # the update
    assert played == [float(max(0, i - lag)) for i in range(8)]


def test_the_pool_is_bounded_and_evenly_spaced():
    args, classics, agent = make(opponent="pool", pool_size=4, classical_share=0.0)
    opponents = phase4.Opponents(
        args, agent, [], [classics.policies[makers.AVELLANEDA_STOIKOV]], classics.env.env.like(args.rows)
    )
    generator, met = torch.Generator().manual_seed(0), set()
    for iteration in range(1, 41):
        marked(agent, float(iteration))
        opponents.advance(agent, iteration, generator)
        met.add(number(opponents.past))
        kept = [x[0].item() for x in opponents.pool[: opponents.stored]]
    assert len(opponents.pool) == 4
    assert [1 + born for born in opponents.born[: opponents.stored].tolist()] == kept  # each knows its age
    gaps = {round(b - a) for a, b in pairwise(kept)}
    assert len(gaps) == 1
    assert kept[-1] > 24
    assert len(met) > 6  # and several were met


def test_prioritised_sampling_meets_the_strong_more_often():
    args, classics, agent = make(opponent="pool", pool_size=4, pool_sampling="prioritised", classical_share=0.0)
    opponents = phase4.Opponents(
        args, agent, [], [classics.policies[makers.AVELLANEDA_STOIKOV]], classics.env.env.like(args.rows)
    )
    for iteration in (1, 2, 3):
        opponents.advance(marked(agent, float(iteration)), iteration, torch.Generator().manual_seed(0))
    opponents.spacing, met = 1000, []  # no more snapshots: these three
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        opponents.advance(agent, 4, generator)
        met.append(number(opponents.past))
        opponents.score(torch.full((args.num_envs,), 0.1 if met[-1] == 2.0 else -0.1))
    assert set(met) == {1.0, 2.0, 3.0}
    assert met[100:].count(2.0) > 2 * max(met[100:].count(1.0), met[100:].count(3.0))


def test_seats_go_round():
    args, classics, agent = make(num_envs=7, num_makers=3, copies=1)
    market = classics.env.env.like(7)
    rival = torch.tensor([*[0.123] * 10, 0.0, 0.5])
    generator = torch.Generator().manual_seed(0)
    batch, _ = phase4.rollout(market, agent, lambda x: rival.expand(len(x), 12), args, generator)
    assert batch.observations.shape[0] == 7 * args.num_steps
    own = ((market.edges - 0.123).abs() > 1e-4).all(-1).all(-1)  # who quoted something else
    assert own.nonzero().tolist() == [[i, i % 3] for i in range(7)]


def test_copies_of_a_market_explore_in_opposite_pairs():
    args, classics, agent = make(num_envs=16, copies=4)
    market = classics.env.env.like(16)
    noise = phase4.exploration_noise(market, agent, args, torch.Generator().manual_seed(0))
    assert torch.equal(noise[:, ::2], -noise[:, 1::2])
    batch, _ = phase4.rollout(market, agent, agent.policy, args, torch.Generator().manual_seed(0))
    of_copies = batch.advantages.view(args.num_steps, 4, 4)
    assert of_copies.mean(-1).abs().max() < 1e-5 < of_copies.std()


def test_advantages_do_not_depend_on_the_seat():
    """Two makers alike: what the agent learns in either seat has the same distribution."""
    args, classics, agent = make(num_envs=2048)
    market = classics.env.env.like(2048)
    market.generator.manual_seed(0)
    batch, lead = phase4.rollout(market, agent, agent.policy, args, torch.Generator().manual_seed(0))
    returns = batch.returns.view(args.num_steps, -1)[0]
    difference = returns[::2].mean() - returns[1::2].mean()
    assert abs(difference) < 4 * returns.std() * (4 / 2048) ** 0.5
    assert lead.mean() > 0  # exploration costs something


@pytest.mark.parametrize(
    "changes", [{"num_makers": 3}, {"num_makers": 5, "opponent": "pool"}, {"opponent": "baseline"}]
)
def test_more_makers_and_other_opponents(tmp_path, changes):
    state, snapshots = trained(tmp_path, **changes)
    assert all(value.isfinite().all() for value in state.values())
    assert next(iter(snapshots)) == "step 0"
    assert len(snapshots) == 4
    rows = files.read_metrics(tmp_path / "metrics.csv")
    assert rows[-1]["charts/selfplay_half_spread"] > 0


@pytest.mark.parametrize(
    "changes",
    [{"opponent": "league", "pool_size": 3, "pool_sampling": "prioritised"}, {"opponent": "lag", "lag": 3}],
)
def test_resume_restores_opponents_bitwise(tmp_path, monkeypatch, changes):
    saves = []
    whole, snapshots = trained(tmp_path, saves, monkeypatch=monkeypatch, **changes)
    middle = saves[2]
    assert 0 < middle["iteration"] < saves[-1]["iteration"]
    resumed, again = trained(tmp_path, saves, middle, monkeypatch, **changes)
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name
    assert list(snapshots) == list(again)
    for name in snapshots:
        assert torch.equal(snapshots[name], again[name])


def test_rivals_are_seen_by_the_takers_they_attract():
    _, classics, agent = make()
    observation, _ = classics.env.reset(seed=0)  # rivals count as quoting the reference edge: half of the takers
    middle, width = torch.tensor(0.0).expand(5), torch.tensor(1.0).expand(5)
    seen = agent.seen(observation)
    torch.testing.assert_close(seen[:, 8:18], torch.cat((middle, width)).expand(len(seen), -1))
    assert torch.equal(seen[:, :8], observation[:, :8])
    assert torch.equal(seen[:, 18:], observation[:, 18:])
    observation[:, 8], observation[:, 13] = 100.0, 0.0  # of the first option, the ask and the bid
    seen = agent.seen(observation)
    attracted = 1 / (1 + math.exp(-2.0))
    torch.testing.assert_close(seen[:, 8], torch.full((len(seen),), -attracted))
    torch.testing.assert_close(seen[:, 13], torch.full((len(seen),), attracted))
    others = [*range(9, 13), *range(14, 18)]
    torch.testing.assert_close(seen[:, others], torch.cat((middle[1:], width[1:])).expand(len(seen), -1))


def test_start_edge_and_average(tmp_path):
    args, classics, _ = make(start_edge=0.7, total_timesteps=12 * 6, average=1.0)
    agent, snapshots = phase4.train(PHASE.run(args, tmp_path), classics, {})
    assert agent.half_spread == pytest.approx(0.7)
    (first,) = snapshots
    assert not torch.equal(snapshots[first], phase4.to_vector(agent))
    assert not any(p.requires_grad for p in agent.parameters())  # the average is no function of the past to autograd


def test_a_best_response_leaves_the_policy_as_it_is_and_is_never_worse(tmp_path):
    args, classics, agent = make(num_envs=64, learning_rate=0.5)  # nothing good can come of that
    before = copy.deepcopy(agent.state_dict())
    response = phase4.best_response(PHASE.run(args, tmp_path), classics.env.env, agent)
    for name, value in agent.state_dict().items():
        assert torch.equal(value, before[name]), name
    frozen = against(classics.env.env.like(phase4.EPISODES), agent.policy)
    assert Validation(frozen, agent.policy, "frozen")(response.policy)["charts/gain_over_frozen"] >= 0


def test_a_best_response_exploits_a_bad_policy(tmp_path):
    changes = {"risk_aversion": 0.0, "cost_rate": 0.0, "dynamics": "gbm"}
    args, classics, agent = make(num_envs=512, total_timesteps=512 * 6 * 40, learning_rate=2e-3, **changes)
    agent.half_spread.fill_(1.8)  # twice what competition allows
    response = phase4.best_response(PHASE.run(args, tmp_path), classics.env.env, agent)
    observation, _ = classics.env.reset(seed=0)
    assert response.policy(observation)[:, :10].mean() < 0.9 * agent.policy(observation)[:, :10].mean()


@pytest.mark.slow
def test_guests_join_cross_play_and_pool(quick, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    phase4.main(PHASE.flags(iterations=4, eval_episodes=64))
    (first,) = tmp_path.glob("runs/*")
    name = first.name
    flags = PHASE.flags(iterations=4, eval_episodes=64, opponent="pool", seed=2, start_edge=1.1)
    phase4.main([*flags, "--guests", str(first), "--no-exploitability"])
    newest = max(tmp_path.glob("runs/*"), key=lambda path: path.stat().st_mtime)
    with pytest.raises(UsageError, match="was trained with --gamma 1, its actions mean something else"):
        phase4.main([*flags, "--guests", str(first), "--gamma", "0"])
    first.rename(tmp_path / "moved")  # the run knows its guests without their files
    phase4.main(["--resume", str(newest)])
    phase4.main(["--evaluate", str(newest), "--no-exploitability", "--cost-rate", "1e-3"])
    (first := tmp_path / "moved").rename(tmp_path / "runs" / name)
    first = tmp_path / "runs" / name
    assert f"guest {first.name}" in json.loads((newest / "cross_play.json").read_text())["names"]
    content = files.load_checkpoint(newest, "phase4")
    guest = files.load_checkpoint(first, "phase4")["agent"]
    assert torch.equal(content["opponents"]["pool"][0][:4], next(iter(guest.values())).flatten()[:4])
    assert capsys.readouterr().out.count("best response, trained, gains") == 1


def test_the_classical_maker_as_opponent_is_phase3s_rival():
    args, classics, agent = make(opponent="baseline")
    market = classics.env.env.like(args.rows)
    opponents = phase4.Opponents(args, agent, [], [classics.policies[name] for name in CLASSICS], market)
    observation = market.reset(seed=0)[0][:, 1]
    rival = formulas.avellaneda_stoikov(classics.env.env, 0.25, 0.8)
    opponents.advance(agent, 1, torch.Generator())
    torch.testing.assert_close(opponents.policy(observation), rival(observation))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
def test_opponents_have_the_rows_that_were_asked_for(share):
    args, classics, agent = make(
        num_envs=200, num_makers=3, episodes=2, opponent="league", classical_share=share, past_share=0.4
    )
    known = [classics.policies[name] for name in CLASSICS]
    market = classics.env.env.like(args.rows)
    opponents = phase4.Opponents(args, agent, [], known, market)
    opponents.advance(agent, args.num_iterations + 1, torch.Generator())  # at the end of the run
    marked(opponents.past, 0.1)
    seen = market.reset(seed=0)[0][:, 1:].flatten(0, 1)  # of two other seats in each of 400 rows
    ends = [round(400 * share), round(800 * share), round(800 * (share + (1 - share) * 0.4)), 800]
    played = opponents.policy(seen)
    assert len(played) == 800
    first = 0
    for policy, end in zip((*known, opponents.past.policy, opponents.newest.policy), ends, strict=True):
        torch.testing.assert_close(played[first:end], policy(seen)[first:end])
        first = end


def test_the_classical_makers_share_grows_during_the_run():
    args, classics, agent = make(
        num_envs=200, num_makers=3, episodes=2, classical_share=0.5, total_timesteps=12 * 12_000
    )
    known = [classics.policies[name] for name in CLASSICS]
    market = classics.env.env.like(args.rows)
    opponents = phase4.Opponents(args, agent, [], known, market)
    seen = market.reset(seed=0)[0][:, 1:].flatten(0, 1)  # of two other seats in each of 400 rows
    assert args.num_iterations > 10
    for done in (0.0, 0.5, 1.0):
        opponents.advance(agent, 1 + round(done * args.num_iterations), torch.Generator())
        own = opponents.newest.policy(seen)
        played = (opponents.policy(seen) - own).abs().amax(1) > 1e-4  # by a classical maker
        assert not played[400:].any()
        done = round(done * args.num_iterations) / args.num_iterations
        share = phase4.CLASSICS_AT_FIRST + (1 - phase4.CLASSICS_AT_FIRST) * done
        for rows in played[:400].view(len(known), -1):  # of each of them
            assert rows.double().mean() == pytest.approx(share, abs=8 / len(rows))
            assert torch.equal(rows, rows.sort(descending=True).values)


def test_starts_must_end_alike(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    selfplay_starts = importlib.import_module("selfplay_starts")
    curve = [{"global_step": 0, "charts/selfplay_half_spread": 1.0}]

    def ends(slope):
        def train(args, start, seed):
            edge = 0.8 + slope * start
            found = {"edges": edge, "nash": 0.8, "monopoly": 1.2, "collusion": 0.0, "exploitability": 0.0}
            options = [["agent", edge, 2.0 * edge], ["Nash", 0.8, 1.6], ["monopoly", 1.2, 2.4]]
            tables = {
                "edges over the reference price, makers that are all the agent": [["", "ask 0", "bid 0"], options]
            }
            rows = {"agent": {"objective": 3.0}}
            return {
                "passed": True,
                "title": "",
                "settings": {"competition": found},
                "rows": rows,
                "tables": tables,
            }, curve

        return train

    monkeypatch.setattr(selfplay_starts, "train", ends(0.01))
    assert selfplay_starts.main(["--neutral"])
    printed = capsys.readouterr().out
    assert "seed 3: final edges 0.87 % apart" in printed
    assert "0.8120 3.000 yes 1.35 % 1.50 %" in " ".join(printed.replace("|", " ").split())
    monkeypatch.setattr(selfplay_starts, "train", ends(0.1))
    assert not selfplay_starts.main([])
    assert (tmp_path / "runs" / "selfplay_starts-2" / "selfplay_starts.png").exists()
    with pytest.raises(UsageError, match="--starts needs two"):
        selfplay_starts.main(["--starts", "1.0"])
