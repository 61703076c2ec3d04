"""Cross-play, exploitability and the closed forms of competition."""

import json

import numpy as np
import pytest
import torch

from envs import AgainstRivals, QuotingEnv, baselines, benchmark, dynamics, league, makers, optimum

NEUTRAL = {"dynamics": dynamics.GBM(dt=1 / 504), "risk_aversion": 0.0, "cost_rate": 0.0}


def constant(edge: float):
    """A maker that always quotes this edge and hedges its delta."""
    action = torch.tensor([edge, 0.0, 0.0, 0.0])
    return lambda observation: action.expand(len(observation), 4)


def invented(margins, episodes=400, noise=0.1) -> league.CrossPlay:
    """Cross-play whose head-to-head margins are these, and objectives beside."""
    margins = np.array(margins, float)
    names = [f"maker {i}" for i in range(len(margins))]
    errors = np.random.default_rng(0).normal(0, noise, (*margins.shape, episodes))
    objective = 5.0 + 0.5 * margins[..., None] + errors
    share = np.full(margins.shape, 0.25)
    return league.CrossPlay(names, objective, objective.swapaxes(0, 1), share, share)


def test_one_match_gives_both_sides():
    market = QuotingEnv(num_steps=20, expiry=40)
    policies = {"narrow": baselines.glft(market, 2.0, 0.7), "wide": baselines.avellaneda_stoikov(market, 0.23, 0.8)}
    played = league.cross_play(market, policies, 128)
    for i, one in enumerate(policies.values()):
        for j, other in enumerate(policies.values()):
            for seat in (0, 1):
                env = AgainstRivals(market.like(128), [other], seat)
                env.reset(seed=benchmark.BENCHMARK_SEED)
                if i != j or seat == 0:  # where two quote alike, who comes first is a matter of the seat
                    np.testing.assert_allclose(
                        played.objective[i, j], benchmark.play(env, one)["objective"], rtol=1e-4, atol=1e-4
                    )
    np.testing.assert_array_equal(played.others[0, 1], played.objective[1, 0])
    np.testing.assert_allclose(played.margins, -played.margins.T)
    assert (played.share + played.others_share < 1).all()
    assert played.share[0, 1] == pytest.approx(played.others_share[1, 0])


def test_with_three_makers_the_others_are_of_one_kind():
    market = QuotingEnv(num_makers=3, num_steps=10, expiry=20)
    played = league.cross_play(market, {"a": constant(1.0), "b": constant(1.5)}, 256)
    assert played.share[0, 1] > played.share[1, 0]  # the narrower quote
    odds = {"a": 1.0, "b": np.exp(-1.0)}  # exp(−k(d − 1))
    expected = odds["a"] / (1 + odds["a"] + 2 * odds["b"])
    assert played.share[0, 1] == pytest.approx(expected, abs=0.02)
    assert played.others_share[0, 1] == pytest.approx(2 * odds["b"] / (1 + odds["a"] + 2 * odds["b"]), abs=0.02)


def test_ratings_and_intransitivity():
    transitive = invented([[0, 1, 3], [-1, 0, 2], [-3, -2, 0]])
    assert transitive.intransitivity < 0.01
    assert transitive.cycles == []
    assert list(np.argsort(-transitive.ratings)) == [0, 1, 2]
    assert transitive.ratings.sum() == pytest.approx(0, abs=1e-9)
    assert transitive.ratings[0] - transitive.ratings[1] == pytest.approx(0.5, abs=0.05)
    cyclic = invented([[0, 1, -1], [-1, 0, 1], [1, -1, 0]])
    assert cyclic.intransitivity > 0.99
    assert cyclic.cycles == [("maker 0", "maker 1", "maker 2")]
    assert "cycles: maker 0 > maker 1 > maker 2 > maker 0" in cyclic.summary()
    nothing = invented(np.zeros((3, 3)), noise=1.0)
    assert nothing.cycles == []


def test_advantage_is_paired_and_the_report_is_written(tmp_path):
    played = invented([[0, 1], [-1, 0]])
    advantage = played.advantage("maker 0", "maker 1", against="maker 0")
    assert advantage.mean == pytest.approx(0.5, abs=0.05)
    assert advantage.low < 0.5 < advantage.high
    played.write(tmp_path)
    content = json.loads((tmp_path / "cross_play.json").read_text())
    assert content["names"] == ["maker 0", "maker 1"]
    assert content["margins"][0][1] == pytest.approx(1.0, abs=0.05)
    lines = played.table().splitlines()
    assert len({len(line) for line in lines}) == 1


def test_exploitability():
    market = QuotingEnv(num_steps=20, expiry=40, **NEUTRAL)
    same = league.exploitability(market, constant(1.2), constant(1.2), 256)
    assert same.gain.mean == same.share.mean == 0
    best = float(optimum.best_response(torch.tensor([1.2], dtype=torch.float64), 2.0, 1.0))
    better = league.exploitability(market, constant(1.2), constant(best), 8192)
    assert better.gain.low > 0

    def profit(edge, rival):
        odds, others = np.exp(-2 * (edge - 1)), np.exp(-2 * (rival - 1))
        return edge * odds / (1 + odds + others)

    expected = profit(best, 1.2) / profit(1.2, 1.2) - 1
    assert better.share.low < expected < better.share.high


@pytest.mark.parametrize("num_makers", [2, 3, 5])
def test_competition_knows_nash_and_monopoly(num_makers):
    market = QuotingEnv(num_steps=5, expiry=10, num_makers=num_makers, **NEUTRAL)
    nash, monopoly = (solve(num_makers, 2.0, 1.0) for solve in (optimum.nash_edge, optimum.monopoly_edge))
    at_nash = league.competition(market, constant(nash), 64)
    assert at_nash.edge == pytest.approx(nash, abs=1e-5)
    assert at_nash.collusion == pytest.approx(0, abs=1e-4)
    assert at_nash.exploitability == pytest.approx(0, abs=1e-5)
    cartel = league.competition(market, constant(monopoly), 64)
    assert cartel.collusion == pytest.approx(1, abs=1e-4)
    assert cartel.exploitability > 0.02
    if num_makers == 2:  # reference.md
        assert (cartel.nash, cartel.monopoly) == (pytest.approx(0.7995, abs=1e-4), pytest.approx(1.187, abs=1e-3))


def judged(agent, market, **changes):
    """The verdict on `agent` against a constant rival, with what is changed of it."""
    rival = (0.25, 0.8)
    classics = makers.assemble(market, {makers.RIVAL: rival, makers.NAMED_MAKER: rival}, "")
    contest = makers.quoting_contest(classics, agent, 1024)
    played = league.cross_play(market, {"step 0": constant(2.0), "agent": agent}, 512)
    exploited = league.exploitability(market, agent, agent, 512)
    settings = {"snapshots": ["step 0"], "exploited": exploited, **changes}
    compete = league.competition(market, agent, 64)
    snapshots, exploited = settings["snapshots"], settings["exploited"]
    return league.judge_selfplay("", {}, contest, played, snapshots, exploited, compete, default_market=False)


def failed(result) -> set[str]:
    return {criterion.name for criterion in result.criteria if not criterion.passed} - {"has 8,192 episodes or more"}


def test_verdict():
    market = QuotingEnv(num_steps=10, expiry=20)
    good = makers.assemble(market, {makers.RIVAL: (0.25, 0.8), makers.GLFT: (2.0, 0.7)}, "").policies[makers.GLFT]
    assert failed(judged(good, market)) == set()
    gain = benchmark.Estimate(0.3, 0.01, 0.28, 0.32)
    exploited = league.Exploitability(gain, benchmark.Estimate(0.03, 0.001, 0.028, 0.032), 10.0)
    assert failed(judged(good, market, exploited=exploited)) == {"best response gains 2 % at most"}
    assert failed(judged(constant(3.0), market)) >= {f"beats {makers.NAMED_MAKER}"}
    neutral = QuotingEnv(num_steps=10, expiry=20, **NEUTRAL)
    assert failed(judged(constant(0.7995), neutral)) == set()
    all_of_them = {"edge within 3 % of Nash", "exploitable, in closed form, by 0.3 % at most"}
    assert failed(judged(constant(1.187), neutral)) == all_of_them | {"collusion index within ±0.1"}
