"""What is particular to phase 3; what all phases share is in test_scripts.py."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from common import CPU, IMITATION, PHASES, TUNE, check_margins, invented

import phase3_spread_vs_bs as phase3
from envs import AgainstRivals
from envs.baselines import makers as formulas
from envs.benchmark import makers, quoting, report
from envs.benchmark.contest import play
from envs.figures.quoting import quoting_report
from envs.market import dynamics
from envs.market.moves import StepMoves
from envs.market.units import TRADING_DAYS
from envs.models import make_model
from envs.optimum.makers import BestResponse, MultiAsset
from envs.run.files import read_metrics

PHASE = PHASES["phase3"]


def model_of(args):
    return make_model(args, dt=0.5 / TRADING_DAYS)


def contest_of(classics, policy, episodes):
    """The contest of a policy in the market of these classical makers."""
    market = classics.env.env
    return quoting.quoting_contest("title", classics, policy, None, market.dynamics, episodes)


def make(num_envs=64, model=None, **changes):
    """Flags, a market against one Avellaneda–Stoikov maker, and an agent that has seen the classical one."""
    args = PHASE.args(**changes)
    market = phase3.make_market(args, model or model_of(args), num_envs, CPU)
    rival = formulas.avellaneda_stoikov(market, 0.25, 0.8)
    env = AgainstRivals(market, [rival] * (args.num_makers - 1))
    classic = formulas.minimum_variance_band(market, formulas.glft(market, 1.2, 0.8), 0.15)
    agent = phase3.Agent(market, args.apart)
    agent.fit(env.like(256), classic)
    return args, env, agent, classic


@pytest.fixture
def run(quick, tmp_path, monkeypatch):
    """Calls main in `tmp_path`, in this process: run(*flags) → the newest run folder."""
    monkeypatch.chdir(tmp_path)

    def call(*flags) -> Path:
        phase3.main([str(flag) for flag in flags])
        return max(tmp_path.glob("runs/*"), key=lambda path: path.stat().st_mtime)

    return call


def closed_form(env):
    """The closed form that agents imitate, with parameters that nobody has tuned."""
    return MultiAsset(env, StepMoves(env.env), 3.0, 1.1, 0.8, 0.15)


def test_training_starts_from_the_classical_maker(monkeypatch):
    monkeypatch.setattr(phase3, "IMITATION", IMITATION // 3)
    _, env, agent, _ = make(1024, num_steps=60)
    known = closed_form(env)
    observed, acted = agent.fit(env.like(512), known)
    assert 0.5 < agent.half_spread < 3
    assert agent.band == pytest.approx(0.15)
    neutral = copy.deepcopy(agent)  # one constant half-spread, no skew, no tilts
    agent.imitate(env.env, observed, acted, torch.Generator().manual_seed(0))
    env.reset(seed=1)
    policies = (env.rivals[0], neutral.policy, agent.policy, known)
    named, before, after, best = (play(env, policy)["objective_centred"].mean() for policy in policies)
    assert after > named + 0.8 * (best - named)
    assert after > before + 0.5 * (best - before)


def test_a_neutral_start(tmp_path):
    """One constant half-spread, quotes that neither skew nor tilt, and the hedge of Black–Scholes in a band."""
    args, env, _, _ = make(start="neutral", total_timesteps=64 * 6)
    market = env.env
    classics = makers.assemble(market, invented(makers.AVELLANEDA_STOIKOV, makers.CONSTANT_SPREAD), "invented")
    args.learning_rate = 1e-12
    agent = phase3.train(PHASE.run(args, tmp_path), classics)
    observation, _ = env.reset(seed=0)
    numbers = market.by_name(agent.policy(observation))
    half_spread = 0.5 * (numbers["ask"] + numbers["bid"])
    torch.testing.assert_close(half_spread, agent.half_spread.expand_as(half_spread), rtol=0.05, atol=0)
    assert (numbers["ask"] - numbers["bid"]).abs().max() < 0.1
    assert numbers["target"].abs().max() < 0.05


def test_actions_reach_the_classical_makers():
    _, env, agent, classic = make(512, num_steps=60)
    known = closed_form(env)
    smile = formulas.with_the_smile(env.env, classic, known.moves, 0.4, 0.15)
    for policy in (classic, env.rivals[0], smile, known):
        observation, _ = env.reset(seed=1)
        reached = []
        for _ in range(env.num_steps):
            action = policy(observation)
            numbers = env.env.by_name(action)
            half_spreads, ups = 0.5 * (numbers["ask"] + numbers["bid"]), 0.5 * (numbers["ask"] - numbers["bid"])
            common = half_spreads.mean(-1), ups.mean(-1)
            raw = torch.cat((torch.stack((
                (common[0] / agent.half_spread).log() / 0.6, common[1],
                numbers["target"] / 0.4, (numbers["band"] / agent.band).clamp(min=1e-2).log(),
            ), -1), ups - common[1][:, None], (half_spreads / common[0][:, None]).log() / 0.5), -1)  # fmt: skip
            reached.append((raw.abs() <= 5).all(-1))
            quotes = agent.to_quote(observation, raw)[reached[-1], :11]
            torch.testing.assert_close(quotes, action[reached[-1], :11], rtol=1e-3, atol=1e-3)
            observation, *_ = env.step(action)
        # The fair value of an option far from the money may be any number of its vega's points away
        least = {smile: 0.9, known: 0.9}.get(policy, 0.99)
        assert torch.cat(reached).double().mean() > least


@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_quotes_never_cross_whatever_the_network_says(gamma):
    _, env, agent, _ = make(gamma=gamma)
    observation, _ = env.reset(seed=0)
    size = len(agent.actor_logstd)
    assert size == 4 + 5 + 5  # half-spread, skew, target and band, and a tilt and a width for each option
    wild = 1e9 * torch.randn(64, size, generator=torch.Generator().manual_seed(0))
    for raw in (torch.full((64, size), 1e9), torch.full((64, size), -1e9), wild):
        action = agent.to_quote(observation, raw)
        numbers = env.env.by_name(action)
        assert action.isfinite().all()
        assert (numbers["ask"] + numbers["bid"] >= 0).all()
        env.step(action)


def test_tilts_and_widths_are_of_one_option():
    """A tilt moves one option's quotes up or down, a width spreads them, and nothing else changes."""
    _, env, agent, _ = make()
    observation, _ = env.reset(seed=0)
    plain = env.env.by_name(agent.to_quote(observation, torch.zeros(64, 14)))
    for option in (0, 3):
        for first, same in ((4, "sum"), (9, "difference")):
            raw = torch.zeros(64, 14)
            raw[:, first + option] = 1.0
            numbers = env.env.by_name(agent.to_quote(observation, raw))
            moved = (numbers["ask"] - plain["ask"], numbers["bid"] - plain["bid"])
            assert all((x.abs() > 0.05).nonzero()[:, 1].unique().tolist() == [option] for x in moved)
            unchanged = moved[0] + moved[1] if same == "sum" else moved[0] - moved[1]
            assert unchanged.abs().max() < 1e-5
            assert torch.equal(numbers["target"], plain["target"])
            assert torch.equal(numbers["band"], plain["band"])


def test_a_quote_that_is_credited_apart_has_a_number_of_its_own():
    """It moves by it, in vol points, and nothing else changes."""
    _, env, agent, _ = make(gamma=0.0)
    observation, _ = env.reset(seed=0)
    plain = agent.to_quote(observation, torch.zeros(64, 14))
    torch.testing.assert_close(plain, make()[2].to_quote(observation, torch.zeros(64, 14)))
    for quote in range(10):
        raw = torch.zeros(64, 14)
        raw[:, 4 + quote] = 1.0
        moved = agent.to_quote(observation, raw) - plain
        expected = torch.zeros_like(plain)
        expected[:, quote] = 1.0
        torch.testing.assert_close(moved, expected)


def test_where_only_the_step_counts_a_quote_is_credited_with_what_it_earns():
    """Where nothing is risked and hedging is free, that is all there is to it; where it is not, all that the quotes
    have in common stays with each of them."""
    for changes in ({"risk_aversion": 0.0, "cost_rate": 0.0}, {}):
        args, env, agent, _ = make(32, gamma=0.0, **changes)
        env.generator.manual_seed(5)
        batch = phase3.rollout(env, agent, args, torch.Generator().manual_seed(0))
        incomes = env.env.expected_incomes()[:, :, 0].flatten(2)
        rewards, info = env.settle()
        expected = [args.reward_scale * x for x in (rewards - info["noise"], incomes)]
        whole, own = (x - x.unflatten(1, (-1, 4)).mean(2).repeat_interleave(4, 1) for x in expected)
        common = whole - own.sum(-1)
        advantages = batch.advantages.unflatten(0, (env.num_steps, 32))
        torch.testing.assert_close(advantages[..., 0], whole, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(advantages[..., 1:], own + common[..., None], rtol=1e-4, atol=1e-5)
        assert (common.abs().max() < 1e-5) == (args.risk_aversion == 0)
        assert batch.logprobs.shape == batch.advantages.shape


def test_learns_from_the_reward_less_its_noise():
    args, env, agent, _ = make(32)
    env.generator.manual_seed(5)
    batch = phase3.rollout(env, agent, args, torch.Generator().manual_seed(0))
    env.generator.manual_seed(5)
    observation, _ = env.reset(options={"copies": args.copies})
    noise = phase3.exploration_noise(env, agent, args, torch.Generator().manual_seed(0))
    rewards, raws = [], []
    for t in range(env.num_steps):
        action = agent.network.actor(agent.normalise(observation)) + agent.actor_logstd.exp() * noise[t]
        observation, reward, _, _, info = env.step(agent.to_quote(observation, action))
        rewards.append(args.reward_scale * (reward - info["noise"]))
        raws.append(reward)
    # with λ = 1 the return of the first step is the sum of all rewards
    args.gae_lambda = 1.0
    env.generator.manual_seed(5)
    batch = phase3.rollout(env, agent, args, torch.Generator().manual_seed(0))
    torch.testing.assert_close(batch.returns[:32], torch.stack(rewards).sum(0), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(torch.stack(raws).sum(0) * args.reward_scale, torch.stack(rewards).sum(0))


def test_copies_of_a_market_explore_in_opposite_pairs():
    """So their noise cancels, and what they all earn is luck, which teaches nothing."""
    args, env, agent, _ = make(32, copies=4)
    noise = phase3.exploration_noise(env, agent, args, torch.Generator().manual_seed(0))
    assert noise.shape == (env.num_steps, 32, 14)
    noise = noise[0]
    assert torch.equal(noise[::2], -noise[1::2])
    assert noise[::2].unique(dim=0).shape == (16, 14)
    assert noise.std().item() == pytest.approx(1, abs=0.1)
    batch = phase3.rollout(env, agent, args, torch.Generator().manual_seed(0))
    of_copies = batch.advantages.view(env.num_steps, 8, 4)
    assert of_copies.mean(-1).abs().max() < 1e-5 < of_copies.std()
    args.copies = 1
    (alone, *_) = phase3.exploration_noise(env, agent, args, torch.Generator().manual_seed(0))
    assert not torch.allclose(alone[::2], -alone[1::2])
    batch = phase3.rollout(env, agent, args, torch.Generator().manual_seed(0))
    assert batch.advantages.view(env.num_steps, 8, 4).mean(-1).abs().max() > 0.01


def test_the_average_is_what_is_kept(tmp_path):
    """With an average over all of the run it lags behind the learner, whose exploration has a floor."""
    args, env, _, _ = make(average=1.0, min_std=0.6, learning_rate=0.01)  # exploration begins at e^{-1/2}
    classics = makers.assemble(env.env, invented(makers.AVELLANEDA_STOIKOV, makers.BELIEVER_BAND), "invented")
    average = phase3.train(PHASE.run(args, tmp_path), classics)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    weights = [x["network.actor.4.weight"] for x in (average.state_dict(), saved["agent"], saved["learner"])]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])
    assert not any(p.requires_grad for p in average.parameters())
    assert (saved["learner"]["actor_logstd"].exp() >= 0.6 - 1e-6).all()


@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_logprob_is_gaussian(gamma):
    _, env, agent, _ = make(gamma=gamma)
    observation, _ = env.reset(seed=0)
    observation, noise = agent.normalise(observation), torch.randn(64, 14)
    normal = torch.distributions.Normal(agent.network.actor(observation), agent.actor_logstd.exp())
    action = normal.mean + normal.stddev * noise
    logprob = agent.logprob(noise)
    of_number = normal.log_prob(action)
    expected = of_number.sum(-1, keepdim=True)
    if agent.apart:
        expected = torch.cat((of_number[:, :4].sum(-1, keepdim=True), of_number[:, 4:]), -1)
    torch.testing.assert_close(logprob, expected, rtol=1e-4, atol=1e-4)
    again, entropy, same = agent.evaluate_actions(observation, action)
    torch.testing.assert_close(again, logprob, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(entropy, normal.entropy().sum(-1)[0])
    torch.testing.assert_close(same, agent.network.critic(observation))


def test_training_beats_the_named_baseline(tmp_path, monkeypatch):
    monkeypatch.setattr(phase3, "EPISODES", 1024)
    args = phase3.Args(total_timesteps=200_000, num_envs=128, num_evaluations=2, save_model=False, start="neutral")
    market = phase3.make_market(args, model_of(args), 64, CPU)
    known = invented(makers.AVELLANEDA_STOIKOV, makers.BELIEVER_BAND)
    phase3.train(PHASE.run(args, tmp_path), makers.assemble(market, known, "invented"))
    rows = read_metrics(tmp_path / "metrics.csv")
    curve = [row["charts/gain_over_avellaneda_stoikov"] for row in rows]
    assert curve[-1] > curve[0] + 0.05
    assert curve[-1] > 0.3 * (rows[-1]["charts/objective"] - curve[-1])  # of the baseline's objective


def test_risk_neutral_benchmark_has_the_exact_best_response(run):
    folder = run(*PHASE.flags(dynamics="gbm", risk_aversion=0, cost_rate=0))
    content = json.loads((folder / "benchmark.json").read_text())
    assert makers.BEST_RESPONSE in content["rows"]
    criteria = {criterion["name"] for criterion in content["criteria"]}
    assert criteria == {
        "edge within 3 % of the best response", "objective within 0.5 % of best response (exact)",
        "has 8,192 episodes or more",
    }  # fmt: skip


@pytest.mark.slow
def test_three_makers_and_privileged_observation(run):
    folder = run(*PHASE.flags(num_makers=3), "--privileged")
    state = torch.load(folder / "checkpoint.pt", weights_only=True)["agent"]
    assert len(state["observation_mean"]) == 8 + 20 + 5 + 12
    share = json.loads((folder / "benchmark.json").read_text())["rows"]["agent"]["market_share"]
    assert 0.05 < share < 0.8


@pytest.mark.slow
def test_against_another_rival(run):
    trained = run(*PHASE.flags())
    known = json.loads((trained / "benchmark.json").read_text())["settings"]["rival: parameters"]
    folder = run("--evaluate", trained, "--rival-spread", 0.7, "--rival-risk-aversion", 2)
    rival = json.loads((folder / "benchmark.json").read_text())["settings"]["rival: parameters"]
    assert rival == [2 * known[0], known[1], 0.7]
    sweep = json.loads((trained / "rival_sweep.json").read_text())
    assert set(sweep) == {"half-spread", "risk aversion"}
    assert list(sweep["half-spread"]) == [str(x) for x in quoting.SPREADS]


def test_verdict():
    """Every criterion can fail, and says so."""
    _, env, _, classic = make(512, num_steps=6)
    named = formulas.avellaneda_stoikov(env.env, 0.25, 0.8)
    policies = {makers.AVELLANEDA_STOIKOV: named, makers.BELIEVER_BAND: classic}
    parameters = {makers.AVELLANEDA_STOIKOV: (0.25, 0.8), makers.BELIEVER_BAND: (1.2, 0.8, 0.15)}
    classics = makers.Makers(env, policies, {**parameters, makers.RIVAL: (0.25, 0.8, 1.0)}, "made up")
    contest = contest_of(classics, named, 512)
    result = quoting.judge_quoting({}, contest, default_market=True)
    failed = {criterion.name for criterion in result.criteria if not criterion.passed}
    assert failed == {
        f"beats {makers.AVELLANEDA_STOIKOV}", f"beats {makers.BELIEVER_BAND}",
        f"5 above {makers.AVELLANEDA_STOIKOV}", f"0.3 above {contest.best}", f"P&L sd no higher than of {contest.best}",
        "has 8,192 episodes or more", "quotes follow the smile (correlation 0.95, between)",
    }  # fmt: skip
    assert not result.passed
    assert result.advantages[makers.AVELLANEDA_STOIKOV].mean == 0
    assert f"objective above {makers.AVELLANEDA_STOIKOV}: 0.00 %" in result.verdict()
    row = result.rows["agent"]
    assert row["market_share"] == pytest.approx(0.5, abs=0.03)
    assert row["delta_share"] == pytest.approx(row["net_delta"] / row["gross_delta"])
    assert "market share" in result.table()


def test_rivals_that_quote_absurdly_wide_do_no_harm():
    """Quotes that attract nobody are all alike to the agent."""
    _, env, agent, _ = make(8, num_steps=6)
    observation, _ = env.reset(seed=1)
    wide, absurd = observation.clone(), observation.clone()
    wide[:, agent.rival_edges], absurd[:, agent.rival_edges] = 12.0, 1000.0
    torch.testing.assert_close(agent.policy(wide), agent.policy(absurd), rtol=0, atol=1e-4)


def test_verdict_on_risk_and_on_edges():
    _, env, _, classic = make(512, num_steps=6)
    rash = formulas.constant_spread(env.env, 0.7)  # trades much, never mind what it holds
    parameters = {makers.BELIEVER_BAND: (1.2, 0.8, 0.15), makers.RIVAL: (0.25, 0.8, 1.0)}
    policies = {makers.AVELLANEDA_STOIKOV: env.rivals[0], makers.BELIEVER_BAND: classic}
    contest = contest_of(makers.Makers(env, policies, parameters, "made up"), rash, 512)
    result = quoting.judge_quoting({}, contest, True)
    check_margins(result)
    failed = [c.name for c in result.criteria if not c.passed]
    assert f"P&L sd no higher than of {contest.best}" in failed

    model = dynamics.GBM(0.2, 1 / 504)
    _, env, _, _ = make(512, model, num_steps=6, risk_aversion=0.0, cost_rate=0.0)
    env = AgainstRivals(env.env, [formulas.constant_spread(env.env, 0.8)])
    policies = dict.fromkeys((makers.AVELLANEDA_STOIKOV, makers.BELIEVER_BAND), env.rivals[0])
    classics = makers.Makers(env, policies, {makers.RIVAL: (1e-6, 1.0, 1.0)}, "made up")
    best = BestResponse(env)
    for multiple, passes in ((1.0, True), (1.05, False), (0.95, False)):
        contest = contest_of(classics, lambda o, x=multiple: x * best(o), 512)
        result = quoting.judge_quoting({}, contest, False)
        check_margins(result)
        criteria = {c.name: c.passed for c in result.criteria}
        assert criteria["edge within 3 % of the best response"] == passes


def test_edges_are_measured_against_the_best_response_where_there_is_a_smile():
    """Relative to the best edge, or to a vol point where that is less; those of Black–Scholes are far off."""
    _, env, _, _ = make(64, num_steps=6, risk_aversion=0.0, cost_rate=0.0)
    market = env.env
    env = AgainstRivals(market, [formulas.constant_spread(market, 0.8)])
    env.reset(seed=0)
    best = BestResponse(env)

    def shifted(by):
        def policy(observation):
            numbers = market.by_name(best(observation))
            return market.to_action(ask=numbers["ask"] + by, bid=numbers["bid"] + by, target=0.0, band=0.0)

        return policy

    start = quoting.beside_best(env, best)  # the first best response is to the rival's unknown first quote
    assert start.apart < 0.05
    moved = quoting.beside_best(env, shifted(0.01))
    assert 0.3 * 0.01 < moved.apart - start.apart + 0.01 < 0.021
    np.testing.assert_allclose(moved.edges, start.edges + 0.01, atol=1e-5)
    np.testing.assert_allclose(moved.off, abs(moved.edges - start.exact) / np.maximum(abs(start.exact), 1.0), rtol=1e-6)
    flat = quoting.beside_best(env, formulas.constant_spread(market, 0.8))
    np.testing.assert_allclose(flat.edges, 0.8, rtol=1e-5)
    assert flat.apart > 0.3
    assert flat.off.mean() > 0.3


def test_a_baseline_that_never_trades_is_no_reason_to_stop(run):
    text = (run(*PHASE.flags(choice_sensitivity=2000)) / "benchmark.json").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text


def test_resuming_meets_the_very_same_opponents(run, monkeypatch):
    folder = run(*PHASE.flags())
    before = (folder / "benchmark.json").read_bytes()

    def changed(*_):
        raise AssertionError("tuned anew")

    def resumed(market, *multiples, known=None, origin=None):
        assert known is not None
        return TUNE(market, *multiples, known=known, origin=origin)

    monkeypatch.setattr(phase3, "classical_makers", resumed)
    monkeypatch.setattr(makers, "tune_makers", changed)
    monkeypatch.setattr(makers, "RECORDED", Path("nowhere"))
    run("--resume", folder)
    assert (folder / "benchmark.json").read_bytes() == before


def test_relative_gain():
    rng = np.random.default_rng(0)
    baseline = rng.normal(2.0, 1.0, 4000)
    gain = report.relative_gain(1.5 * baseline, baseline)
    assert gain.mean == pytest.approx(0.5)
    assert gain.se == pytest.approx(0.0, abs=1e-12)
    shares = []
    for seed in range(300):
        rng = np.random.default_rng(seed)
        x = rng.normal(2.0, 1.0, 400)
        shares.append(report.relative_gain(x + rng.normal(0.4, 0.5, 400), x))
    covered = np.mean([share.low < 0.2 < share.high for share in shares])
    assert 0.9 < covered < 0.99


@pytest.mark.parametrize(
    "name", ["heston", *(pytest.param(x, marks=pytest.mark.slow) for x in ("gbm", "garch", "merton"))]
)
def test_recorded_parameters_are_those_of_the_default_market(name):
    args = phase3.Args(dynamics=name)
    model = model_of(args)
    market = phase3.make_market(args, model, 512, CPU)
    if makers.describe(market) not in json.loads(makers.RECORDED.read_text(encoding="utf-8")):
        pytest.skip(f"no parameters are recorded for {name}")
    classics = makers.classical_makers(market)
    assert classics.origin.startswith("recorded")
    assert set(makers.KNOWING) < set(classics.policies)
    # and they are good: nothing on a coarse grid is significantly better on other episodes
    env = classics.env
    env.reset(seed=77)
    for maker, formula in ((makers.AVELLANEDA_STOIKOV, formulas.avellaneda_stoikov), (makers.GLFT, formulas.glft)):
        best = play(env, classics.policies[maker])["objective_centred"]
        a, k = classics.parameters[maker]
        for x, y in (
            (1.3, 1),
            (1 / 1.3, 1),
            (1, 1.3),
            (1, 1 / 1.3),
            (4, 1),
            (0.25, 1),
            (4, 0.5),
            (10, 0.5),
            (0.25, 0.5),
        ):
            other = play(env, formula(env.env, x * a, y * k))["objective_centred"]
            gain = report.estimate(other - best)
            assert gain.mean < max(3 * gain.se, 0.02), (maker, x, y)


def test_figures_of_a_contest_without_training(tmp_path):
    _, env, agent, classic = make(64, dynamics.GBM(0.2, 1 / 504))
    policies = {makers.AVELLANEDA_STOIKOV: env.rivals[0], makers.GLFT: classic, makers.BELIEVER_BAND: classic}
    parameters = dict.fromkeys(policies, (0.25, 0.8)) | {makers.RIVAL: (0.25, 0.8, 1.0)}
    contest = contest_of(makers.Makers(env, policies, parameters, "made up"), agent.policy, 64)
    contest.sweep = quoting.rival_sweep(contest, tuple(contest.policies), episodes=64)
    quoting_report(tmp_path, contest)
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {"learnt_quotes.png", "episode.png", "pnl.png", "rival_sweep.png"}
