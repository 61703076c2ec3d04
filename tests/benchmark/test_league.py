"""Cross-play, exploitability and the closed forms of competition."""

import json

import numpy as np
import pytest
import torch
from common import check_margins, quoted
from scipy.stats import norm

from envs import AgainstRivals, QuotingEnv
from envs.baselines import makers as formulas
from envs.benchmark import league, makers
from envs.benchmark.contest import play
from envs.benchmark.quoting import quoting_contest
from envs.benchmark.report import Benchmark, Estimate
from envs.market import dynamics
from envs.optimum.edges import EdgeTable
from envs.optimum.quotes import best_response, monopoly_edge, nash_edge
from envs.run.files import write_json
from envs.run.seeds import BENCHMARK_SEED

HESTON = {"risk_aversion": 0.0, "cost_rate": 0.0}
NEUTRAL = {"dynamics": dynamics.GBM(dt=1 / 504), **HESTON}


def constant(edge: float, tilt: float = 0.0):
    """A maker that always quotes this edge on five options, up to a tilt of asks and bids; it hedges its delta."""
    action = torch.tensor([*[edge + tilt] * 5, *[edge - tilt] * 5, 0.0, 0.0])
    return lambda observation: action.expand(len(observation), 12)


def by_table(market, edges):
    """A maker who looks its edge up in a table by the gap that it faces: `EdgeTable.nash` or `.monopoly`."""

    def policy(observation):
        gap = market.gap_at(market.decode(observation))
        action = torch.zeros(len(observation), market.action_size)
        action[:, :5], action[:, 5:10] = edges(gap), edges(-gap)
        return action

    return policy


def invented(margins, episodes=400, noise=0.1) -> league.CrossPlay:
    """Cross-play whose head-to-head margins are these, and objectives beside."""
    margins = np.array(margins, float)
    names = [f"maker {i}" for i in range(len(margins))]
    errors = np.random.default_rng(0).normal(0, noise, (*margins.shape, episodes))
    objective = 5.0 + 0.5 * margins[..., None] + errors
    share = np.full(margins.shape, 0.25)
    return league.CrossPlay(names, objective, objective.swapaxes(0, 1), share, share)


def test_one_match_gives_both_sides():
    market = QuotingEnv(num_steps=20)
    policies = {"narrow": formulas.glft(market, 2.0, 0.7), "wide": formulas.avellaneda_stoikov(market, 0.23, 0.8)}
    played = league.cross_play(market, policies, 128)
    for i, one in enumerate(policies.values()):
        for j, other in enumerate(policies.values()):
            for seat in (0, 1):
                env = AgainstRivals(market.like(128), [other], seat)
                env.reset(seed=BENCHMARK_SEED)
                if i != j or seat == 0:  # where two quote alike, who comes first is a matter of the seat
                    np.testing.assert_allclose(
                        played.objective[i, j], play(env, one)["objective"], rtol=1e-4, atol=1e-4
                    )
    np.testing.assert_array_equal(played.others[0, 1], played.objective[1, 0])
    np.testing.assert_allclose(played.margins, -played.margins.T)
    assert (played.share + played.others_share < 1).all()
    assert played.share[0, 1] == pytest.approx(played.others_share[1, 0])


def test_with_three_makers_the_others_are_of_one_kind():
    market = QuotingEnv(num_makers=3, num_steps=10, informed_share=0.0)
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
    write_json(tmp_path / "cross_play.json", played.content())
    content = json.loads((tmp_path / "cross_play.json").read_text())
    assert content["names"] == ["maker 0", "maker 1"]
    assert content["margins"][0][1] == pytest.approx(1.0, abs=0.05)
    lines = str(played.table()).splitlines()
    assert len({len(line) for line in lines}) == 1


def test_exploitability():
    market = QuotingEnv(num_steps=20, **NEUTRAL)
    same = league.exploitability(market, constant(1.2), constant(1.2), 256)
    assert same.gain.mean == same.share.mean == 0
    best = float(best_response(torch.tensor([1.2], dtype=torch.float64), 2.0, 1.0))
    better = league.exploitability(market, constant(1.2), constant(best), 8192)
    assert better.gain.low > 0

    def profit(edge, rival):
        odds, others = np.exp(-2 * (edge - 1)), np.exp(-2 * (rival - 1))
        return edge * odds / (1 + odds + others)

    expected = profit(best, 1.2) / profit(1.2, 1.2) - 1
    assert better.share.low < expected < better.share.high


@pytest.mark.parametrize("num_makers", [2, 3, 5])
def test_competition_knows_nash_and_monopoly(num_makers):
    market = QuotingEnv(num_steps=5, num_makers=num_makers, **NEUTRAL)
    nash, monopoly = (solve(num_makers, 2.0, 1.0) for solve in (nash_edge, monopoly_edge))
    at_nash = league.competition(market, constant(nash), 64)
    np.testing.assert_allclose(at_nash.edges, nash, atol=1e-5)
    assert at_nash.edges.shape == (2, 5)
    assert at_nash.off_nash.max() < 1e-3
    assert at_nash.collusion == pytest.approx(0, abs=1e-4)
    assert at_nash.exploitability == pytest.approx(0, abs=1e-5)
    cartel = league.competition(market, constant(monopoly), 64)
    assert cartel.collusion == pytest.approx(1, abs=1e-4)
    assert cartel.exploitability > 0.02
    if num_makers == 2:  # reference.md
        np.testing.assert_allclose(cartel.nash, 0.7995, atol=1e-4)
        np.testing.assert_allclose(cartel.monopoly, 1.187, atol=1e-3)
    tilted = league.competition(market, constant(nash, 0.25), 64)
    np.testing.assert_allclose(tilted.edges, nash + np.array([[0.25], [-0.25]]) * np.ones(5), atol=1e-5)
    np.testing.assert_allclose(tilted.off_nash, 0.25, atol=1e-3)  # of a vol point, as the edge is less than one
    assert tilted.exploitability > 0.01


@pytest.mark.parametrize("informed_share", [0.2, 1.0])
def test_competition_in_heston(informed_share):
    """With both kinds of takers: those who quote Nash edges by option and side are at Nash, the cartel at monopoly."""
    market = QuotingEnv(num_steps=5, options=quoted(120, dt=1 / 504), informed_share=informed_share, **HESTON)
    table = EdgeTable(2, 2.0, 1.0, informed_share)
    at_nash = league.competition(market, by_table(market, table.nash), 64)
    assert at_nash.off_nash.max() < 1e-4
    assert at_nash.collusion == pytest.approx(0, abs=1e-4)
    assert at_nash.exploitability == pytest.approx(0, abs=1e-4)
    assert at_nash.edges.min() < 0 < at_nash.edges.max()  # the fair value is far from the reference
    if informed_share == 1:
        over = at_nash.edges - np.array([[1], [-1]]) * np.array([2.4, 0.78, -0.81, -2.38, -3.42])
        np.testing.assert_allclose(over, 0.7995, atol=0.1)  # where the spot has moved, the gap has too
    cartel = league.competition(market, by_table(market, table.monopoly), 64)
    assert cartel.collusion == pytest.approx(1, abs=1e-4)
    np.testing.assert_allclose(cartel.edges, cartel.monopoly, atol=1e-4)
    flat = league.competition(market, constant(0.7995), 64)
    assert flat.off_nash.max() > 0.5
    assert abs(flat.collusion) > 0.1
    if informed_share < 1:  # or it earns nothing that the gain could be a share of
        assert flat.exploitability > 0.5


def judged(agent, market, **changes):
    """The verdict on `agent` against a constant rival, with what is changed of it."""
    rival = (0.25, 0.8)
    classics = makers.assemble(market, {makers.RIVAL: rival, makers.AVELLANEDA_STOIKOV: rival}, "")
    contest = quoting_contest("", classics, agent, None, market.dynamics, 1024)
    played = league.cross_play(market, {"step 0": constant(2.0), "agent": agent}, 512)
    exploited = league.exploitability(market, agent, agent, 512)
    settings = {"league": played, "snapshots": ["step 0"], "exploited": exploited, **changes}
    compete = league.competition(market, agent, 64)
    return league.judge_selfplay({}, contest, compete=compete, default_market=False, **settings)


def failed(result) -> set[str]:
    check_margins(result)
    return {criterion.name for criterion in result.criteria if not criterion.passed} - {"has 8,192 episodes or more"}


def test_verdict():
    market = QuotingEnv(num_steps=10)
    parameters = {makers.RIVAL: (0.25, 0.8), makers.GLFT_SMILE: (1.2, 0.8, 0.5, 0.15)}
    good = makers.assemble(market, parameters, "").policies[makers.GLFT_SMILE]
    assert failed(judged(good, market)) == set()
    gain = Estimate(0.3, 0.01, 0.28, 0.32)
    exploited = league.Exploitability(gain, Estimate(0.03, 0.001, 0.028, 0.032), 10.0)
    assert failed(judged(good, market, exploited=exploited)) == {"best response gains 2 % at most"}
    assert failed(judged(constant(3.0), market)) >= {f"beats {makers.AVELLANEDA_STOIKOV}"}
    neutral = QuotingEnv(num_steps=10, **NEUTRAL)
    assert failed(judged(constant(0.7995), neutral)) == set()
    # one side too high, the other too low: within 3 % on average, but not each
    assert failed(judged(constant(0.7995, 0.05), neutral)) == {"edges within 3 % of Nash"}
    all_of_them = {"edges within 3 % of Nash", "exploitable, in closed form, by 0.3 % at most"}
    assert failed(judged(constant(1.187), neutral)) == all_of_them | {"collusion index within ±0.1"}


# SNAPSHOTS


def margins_of(p_values, error=0.01):
    """Margins whose one-sided tests of being below zero have these p-values."""
    return [Estimate(mean, error, np.nan, np.nan) for mean in (error * norm.ppf(p_values)).tolist()]


def test_no_snapshot_is_ahead_where_margins_are_noise():
    """36 cells as in the main command: Holm's test errs in at most 5 % of all runs, a look at each interval in most."""
    rng = np.random.default_rng(0)
    runs = rng.normal(0.0, 0.02, (300, 36))
    called = [sum(league.snapshots_ahead([Estimate(x, 0.02, np.nan, np.nan) for x in run], 0.05)) for run in runs]
    assert 0 < sum(number > 0 for number in called) < 300 * 0.05 + 3 * (300 * 0.05 * 0.95) ** 0.5
    assert ((runs + 1.96 * 0.02 < 0).any(1)).mean() > 0.5
    assert sum(league.snapshots_ahead([Estimate(0.038, 0.02, -0.003, 0.078)] * 36, 0.05)) == 0


def test_a_clear_loser_is_found_and_no_one_else():
    rng = np.random.default_rng(1)
    margins = [Estimate(x, 0.02, np.nan, np.nan) for x in rng.normal(0.0, 0.02, 36).tolist()]
    assert not any(league.snapshots_ahead(margins, 0.05))
    margins[17] = Estimate(-0.1, 0.02, -0.139, -0.061)
    assert [i for i, ahead in enumerate(league.snapshots_ahead(margins, 0.05)) if ahead] == [17]
    margins[17] = Estimate(0.1, 0.02, 0.061, 0.139)  # ahead the other way round
    assert not any(league.snapshots_ahead(margins, 0.05))


@pytest.mark.parametrize(
    ("p_values", "ahead"),
    [
        ([0.016, 0.024, 0.049], [True, True, True]),  # 0.05/3, 0.05/2, 0.05; Bonferroni has the first alone
        ([0.049, 0.016, 0.024], [True, True, True]),
        ([0.017, 0.024, 0.049], [False, False, False]),
        ([0.016, 0.026, 0.049], [True, False, False]),  # whoever comes after one that is not ahead is not either
        ([0.049, 0.001, 0.026], [False, True, False]),
        ([0.016, 0.024, 0.051], [True, True, False]),
        ([0.049], [True]),
        ([0.051], [False]),
        ([0.016, 0.016, 0.016], [True, True, True]),
        ([], []),
    ],
)
def test_holms_steps_down(p_values, ahead):
    assert league.snapshots_ahead(margins_of(p_values), 0.05) == ahead


def test_margins_without_error():
    exact = [Estimate(mean, 0.0, mean, mean) for mean in (-1e-3, 0.0, 1e-3)]
    assert league.snapshots_ahead(exact, 0.05) == [True, False, False]
    assert league.snapshots_ahead([*exact, *margins_of([0.4] * 30)], 0.05) == [True, *[False] * 32]
    assert league.snapshots_ahead([Estimate(0.0, 0.0, 0.0, 0.0)] * 2, 0.05) == [False, False]  # of one with itself


def measured(*objectives) -> league.CrossPlay:
    """Cross-play in which policies earn this much, whoever the others are: the agent, then its snapshots."""
    rng = np.random.default_rng(0)
    size = len(objectives)
    names = ["agent", *(f"step {i}" for i in range(size - 1))]
    earned = np.array(objectives)[:, None, None] + rng.normal(0, 0.1, (size, size, 400))
    return league.CrossPlay(names, earned, earned, np.zeros((size, size)), np.zeros((size, size)))


@pytest.mark.parametrize(("objectives", "ahead"), [((5.0, 4.9, 4.0), 0), ((5.0, 5.0, 4.0), 0), ((5.0, 5.1, 4.0), 3)])
def test_progress_is_required(objectives, ahead):
    result = Benchmark("", {}, {}, {})
    league.require_progress(result, measured(*objectives), ["step 0", "step 1"], 0.05)
    (criterion,) = result.criteria
    assert criterion.name == "no snapshot is ahead, whoever the rivals are"
    assert criterion.passed == (ahead == 0)
    check_margins(result)
    assert criterion.detail.startswith(f"{ahead} of 6 margins below 0 (Holm's test, 5 %); the least ")
    assert ", step 0 against " in criterion.detail
    (table,) = result.tables.values()
    assert table.header == ["snapshot", "agent", "step 0", "step 1"]
    assert [row[0] for row in table.body] == ["step 0", "step 1"]
    expected = objectives[0] - objectives[2]
    assert all(float(cell.split()[0]) == pytest.approx(expected, abs=0.05) for cell in table.body[1][1:])


def test_a_run_without_snapshots_is_not_asked_for_progress():
    result = Benchmark("", {}, {}, {})
    league.require_progress(result, measured(5.0, 4.9), [], 0.05)
    assert result.criteria == []
    assert result.tables == {}


# THE BENCHMARK


def classics_of(market) -> makers.Makers:
    """Two classical makers that nobody has tuned, and one that knows the model."""
    found = {makers.RIVAL: (0.25, 0.8), makers.AVELLANEDA_STOIKOV: (0.25, 0.8), makers.BELIEVER_BAND: (1.2, 0.8, 0.1)}
    return makers.assemble(market, {**found, makers.MULTI_ASSET: (3.0, 1.1, 0.8, 0.15)}, "")


def test_validation_measures_both_against_the_classic_and_among_themselves():
    market = QuotingEnv(num_steps=10, **NEUTRAL)
    classics = classics_of(market)
    validate = league.SelfplayValidation(classics, 512)
    metrics = validate(constant(0.9))
    assert metrics["charts/selfplay_half_spread"] == pytest.approx(0.9)
    assert set(metrics) == {
        "charts/objective", "charts/gain_over_avellaneda_stoikov", "charts/selfplay_objective",
        "charts/selfplay_half_spread",
    }  # fmt: skip
    assert validate(constant(0.9)) == metrics  # the same episodes every time
    wider = validate(constant(1.2))
    assert wider["charts/selfplay_objective"] > metrics["charts/selfplay_objective"]  # less competition …
    assert wider["charts/objective"] < metrics["charts/objective"]  # … is no progress
    named = validate(classics.policies[makers.AVELLANEDA_STOIKOV])
    assert named["charts/gain_over_avellaneda_stoikov"] == 0
    assert validate.describe(metrics).startswith("gain over Avellaneda–Stoikov ")


def test_benchmark_has_everyone_against_everyone():
    market = QuotingEnv(num_steps=10)
    past = {"step 0": constant(2.0), "step 640": constant(1.4), "guest": constant(1.0)}
    result, contest, played, compete = league.selfplay_benchmark(
        title="title", settings={"seed": 1}, agent=constant(1.2), classics=classics_of(market), past=past,
        response=constant(1.1), make_market=None, model=market.dynamics, episodes=256, default_market=False,
    )  # fmt: skip
    classics = [makers.AVELLANEDA_STOIKOV, makers.BELIEVER_BAND, makers.MULTI_ASSET]
    names = [*past, "agent", *classics]
    assert played.names == names
    assert set(contest.played) == {"agent", *classics}
    league_table, progress = result.tables.values()
    assert [row[0] for row in league_table.body] == names
    assert [row[0] for row in progress.body] == ["step 0", "step 640"]  # a guest is no snapshot of this run
    assert result.files["cross_play.json"]["names"] == names
    assert result.remarks == [played.summary()]
    assert result.settings["competition"].keys() == {"edges", "nash", "monopoly"}
    np.testing.assert_allclose(compete.edges, 1.2, atol=1e-5)
    asked = [criterion.name for criterion in result.criteria]
    assert asked == [
        f"beats {makers.AVELLANEDA_STOIKOV}", "best response gains 2 % at most",
        "no snapshot is ahead, whoever the rivals are", "has 8,192 episodes or more",
    ]  # fmt: skip
