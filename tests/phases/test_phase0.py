"""Phase 0 as a user runs it: short runs of the real script, its learning, and what it refuses."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from common import CPU, PHASES, ROOT

import phase0_marlvol_calibration as phase0
from envs.benchmark import calibration as judging
from envs.calibration import exotic, marlvol, quotes
from envs.calibration import game as simulation
from envs.calibration.game import FIRST_DATE, TASKS
from envs.market import smiles
from envs.models import load_market
from envs.run.args import parse_args
from envs.run.errors import DivergenceError, UsageError
from envs.run.files import read_metrics

PHASE = PHASES["phase0"]
FILES = {"args.json", "metrics.csv", "checkpoint.pt", "benchmark.json", "benchmark.md", "learning_curve.png"}
FILES |= {"origin.json", "report.html"}
FIGURES = {
    "local-vol": {"smiles.png", "local_volatility.png"},
    "exotic": {"learnt_dependence.png", "vanillas.png"},
    "slv": {"forward_smiles.png", "vanillas.png"},
}


@pytest.fixture(autouse=True)
def few_paths(monkeypatch):
    monkeypatch.setattr(simulation, "REFERENCE_PATHS", 4096)
    monkeypatch.setattr(judging, "VALIDATION_PATHS", 4096)
    monkeypatch.setattr(exotic, "VALIDATION_PATHS", 4096)
    monkeypatch.setattr(exotic, "NESTED_STATES", 32)
    monkeypatch.setattr(exotic, "NESTED_PATHS", 64)
    monkeypatch.setattr(judging, "NUM_NODES", 21)
    monkeypatch.setattr(marlvol, "PARTICLES", 4096)


def flags(**changes) -> list[str]:
    return PHASE.flags(4, **{"num_evaluations": 2, "reference": "local-vol", **changes})


@pytest.fixture
def main(tmp_path, monkeypatch):
    """Runs the script in this process: main(**changes) → its run folder."""
    monkeypatch.chdir(tmp_path)

    def call(*words, **changes) -> Path:
        before = set(tmp_path.glob("runs/*"))
        call.passed = phase0.main([*flags(**changes), *map(str, words)])
        (folder,) = set(tmp_path.glob("runs/*")) - before
        return folder

    return call


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"reward": "shared", "interpolation": "nearest", "reference": "black-scholes", "vega_weights": True},
        {"common_random_numbers": False, "antithetic": False, "learn_std": True, "reference": "none"},
        {"reward": "difference", "basis_players": False, "baseline": "critic"},
        {"action_map": "normal", "smile": "sp500-2024", "num_steps": 30},
        {"action_map": "stochastic", "state": "non-path-dependent", "num_basis": 5},
        {"state": "non-path-dependent", "interpolation": "linear", "state_std": True},
        {"task": "slv", "smile": "heston", "neighbours": 3},
        {"task": "exotic", "steps_per_day": 2},
        {"task": "exotic"},
        {"task": "exotic", "state": "local"},
        {"task": "exotic", "state": "non-path-dependent", "reward": "difference", "regression": "polynomial"},
        {"task": "exotic", "payoff": "forward-start-call", "objective": "max", "act_before_t1": True},
        {"task": "exotic", "payoff": "asian-call", "objective": "target", "target_price": 60.0},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())) or "default",
)
def test_smoke(main, changes, capsys):
    folder = main(**changes)
    out = capsys.readouterr().out
    assert ("BENCHMARK PASSED" if main.passed else "BENCHMARK FAILED") in out
    assert "memory at its peak" in out
    task = changes.get("task", "local-vol")
    assert {path.name for path in folder.iterdir()} == FILES | FIGURES[task]
    content = json.loads((folder / "benchmark.json").read_text())
    assert {"agent", "Dupire local volatility"} <= set(content["rows"])
    rows = read_metrics(folder / "metrics.csv")
    days = changes.get("num_steps", 40 if changes.get("smile") == "sp500-2024" else 51)
    steps = days * changes.get("steps_per_day", 1) * 200 * 2
    assert [row["global_step"] for row in rows] == [0, 2 * steps, 4 * steps]
    model = load_market(str(folder), 1 / 504)  # a market for the other phases
    spot, _ = model.simulate(torch.zeros(2, 22, model.noise_size))
    assert spot.isfinite().all()


@pytest.mark.parametrize("reward", [pytest.param("difference", marks=pytest.mark.slow), "shared"])
def test_training_calibrates(reward, tmp_path):
    """A few seconds take it a good part of the way from constant volatility to the smile."""
    few = {"difference": (4, 50, 0.15), "shared": (10, 20, 0.05)}[reward]
    args = phase0.Args(
        reward=reward, num_players=2000, num_runs=few[0], num_basis=few[1], exploration_std=few[2], num_iterations=35,
        num_evaluations=2, save_model=False, hidden_size=32, learning_rate=1e-2, average=1.0,
    )  # fmt: skip
    args.fill()
    game = phase0.make_game(args, smiles.SURFACES["sp500-2018"], CPU)
    phase0.train(PHASE.run(args, tmp_path), game)
    errors = [row["charts/rmse"] for row in read_metrics(tmp_path / "metrics.csv")]
    assert errors[0] > 3
    assert errors[-1] < 0.8 * errors[0]


def learnt(tmp_path, iterations, **settings):
    """First and last point of the learning curve of a few updates."""
    fast = {
        "reference": "none",
        "num_players": 1000,
        "num_runs": 4,
        "hidden_size": 32,
        "anneal_lr": False,
        "average": 1.0,
    }
    length = {"num_iterations": iterations, "num_evaluations": 1}
    args = phase0.Args(**{**fast, **length, **settings}, save_model=False)
    args.fill()
    args.check()
    phase0.train(PHASE.run(args, tmp_path), phase0.make_game(args, smiles.SURFACES[args.smile], CPU))
    return read_metrics(tmp_path / "metrics.csv")


@pytest.mark.parametrize("reward", ["shared", "difference"])
def test_training_makes_the_bermudan_cheaper(reward, tmp_path, monkeypatch):
    monkeypatch.setattr(judging, "VALIDATION_PATHS", 2**14)
    first, last = (
        1e4 * row["charts/exotic_price"] for row in learnt(tmp_path, 12, task="exotic", num_basis=30, reward=reward)
    )
    assert last < first - 1.2


def test_training_fits_forward_starts(tmp_path, monkeypatch):
    """The first steps from η = 2 and ρ = 0 to the model's 1.25 and −0.7."""
    monkeypatch.setattr(judging, "VALIDATION_PATHS", 2**14)
    rows = learnt(tmp_path, 16, task="slv", smile="heston", num_basis=8, exploration_std=0.5, target_kl=0.05)
    assert rows[-1]["charts/forward_rmse"] < 0.95 * rows[0]["charts/forward_rmse"]
    assert max(row["charts/rmse"] for row in rows) < 0.5


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "reward"), [("min", "difference"), ("max", "shared"), ("target", "difference")])
def test_training_moves_the_exotic(objective, reward, tmp_path, monkeypatch):
    """In a few updates the Bermudan's price, 131 bp in local volatility, goes where it is to go."""
    monkeypatch.setattr(judging, "VALIDATION_PATHS", 2**16)
    target = 124.0 if objective == "target" else None
    args = phase0.Args(
        task="exotic", objective=objective, target_price=target, reward=reward, num_players=2000, num_runs=4,
        reference="none", num_iterations=25, num_evaluations=1, save_model=False, hidden_size=32, average=1.0,
    )  # fmt: skip
    args.fill()
    game = phase0.make_game(args, smiles.SURFACES["sp500-2018"], CPU)
    phase0.train(PHASE.run(args, tmp_path), game)
    first, last = (1e4 * row["charts/exotic_price"] for row in read_metrics(tmp_path / "metrics.csv"))
    if objective == "target":
        assert abs(last - 124) < 0.7 * abs(first - 124)
    else:
        assert (last - first) * (1 if objective == "max" else -1) > 3


def test_weight_of_the_kl_penalty_follows_the_divergence(monkeypatch):
    """Twice the target raises it by half, less than half of the target lowers it; in between it stays."""
    args = phase0.Args(num_players=200, num_runs=2, num_basis=10, reference="none", update_epochs=1, num_minibatches=1)
    args.fill()
    game = phase0.make_game(args, smiles.SURFACES["sp500-2018"], CPU)
    agent = phase0.Agent(game, args)
    optimizer = torch.optim.SGD(agent.actor_mean.parameters(), lr=0.0)
    batch = phase0.rollout(game, agent, args, torch.Generator().manual_seed(0))
    for kl, factor in ((0.021, 1.5), (0.019, 1.0), (0.006, 1.0), (0.004, 1 / 1.5)):
        parts = torch.tensor([0.0, 0.0, kl, 0.0])
        loss = agent.actor_mean(batch.observations).sum()
        monkeypatch.setattr(phase0, "ppo_loss", lambda *_, result=(loss, parts): result)
        agent.kl_coef.fill_(1.0)
        phase0.update(agent, optimizer, batch, args, torch.Generator().manual_seed(0))
        assert agent.kl_coef.item() == pytest.approx(factor)


def test_a_policy_that_jumps_away_has_diverged(main):
    """Its parameters stay finite, but one update moves it by many standard deviations of its exploration."""
    with pytest.raises(DivergenceError, match=r"losses/approx_kl was .* \(at most 100\) by step 40800; last good: "):
        main(learning_rate=1e6)


@pytest.mark.parametrize("held", [True, False])
def test_the_kl_penalty_holds_the_policy(held):
    """With a learning rate that is too high an update goes far; the rule raises the weight until it goes less far."""
    args = phase0.Args(
        num_players=200, num_runs=4, num_basis=20, reference="none", hidden_size=16, learning_rate=0.05, clip_coef=1.0,
        target_kl=0.01 if held else 1e9,
    )  # fmt: skip
    args.fill()
    game = phase0.make_game(args, smiles.SURFACES["sp500-2018"], CPU)
    torch.manual_seed(0)
    agent = phase0.Agent(game, args)
    optimizer = torch.optim.Adam(agent.actor_mean.parameters(), lr=args.learning_rate)
    generator = torch.Generator().manual_seed(0)
    kl = []
    for _ in range(16):
        batch = phase0.rollout(game, agent, args, generator)
        kl.append(phase0.update(agent, optimizer, batch, args, generator)[2].item())
    late = sum(kl[6:]) / 10
    assert 0.002 < late < 0.025 if held else late > 0.05


def test_exploration_comes_in_pairs():
    pairs = phase0.sample_noise(phase0.Args(num_runs=4), (3, 2), torch.Generator().manual_seed(0))
    assert pairs.shape == (4, 3, 2)
    assert torch.equal(pairs[:2], -pairs[2:])


@pytest.mark.parametrize(
    ("settings", "dimensions"),
    [
        ({"state": "local"}, 1),
        ({"state": "non-path-dependent", "interpolation": "linear"}, 2),
        ({"task": "exotic", "interpolation": "linear"}, 3),
        ({"task": "exotic", "interpolation": "nearest", "neighbours": 3}, 4),
    ],
)
def test_everyone_explores_as_the_basis_players_around(settings, dimensions):
    """Noise that is a smooth function of the state at the basis players is about the same function at all others."""
    args = phase0.Args(reference="none", num_players=2000, num_basis=200, num_runs=2, **settings)
    args.fill()
    args.check()
    game = phase0.make_game(args, smiles.SURFACES["sp500-2018"], CPU)
    game.reset(torch.Generator().manual_seed(0))
    for _ in range(30):
        game.step(0.3 * torch.randn(3, 2000, 1, generator=torch.Generator().manual_seed(game.t)))
    points = game.state.log_spot[:2, :, None] / 0.03 if dimensions == 1 else game.observe()[:2, :, 1:]
    values = points.clamp(-2, 2).sum(-1, keepdim=True)
    players = torch.arange(0, 2000, 10)
    found = phase0.spread_noise(game, args, players, values[:, players])
    error = (found - values).square().mean() / values.var()
    assert error < {1: 1e-3, 2: 0.02, 3: 0.08, 4: 0.2}[dimensions]
    torch.testing.assert_close(found[:, players], values[:, players], atol=0.02, rtol=0)


@pytest.mark.parametrize("task", TASKS)
def test_rollout_is_what_it_says(task):
    """Advantages add up to nothing over runs, the last run does not explore, and actions explain their noise."""
    smile = "heston" if task == "slv" else "sp500-2018"
    args = phase0.Args(task=task, smile=smile, reference="none", num_players=300, num_basis=20, num_runs=4)
    args.fill()
    game = phase0.make_game(args, smiles.SURFACES[smile], CPU)
    agent = phase0.Agent(game, args)
    played, step = [], game.step
    game.step = lambda actions: (played.append(actions.clone()), step(actions))
    batch = phase0.rollout(game, agent, args, torch.Generator().manual_seed(1))
    steps = 51 - FIRST_DATE if task == "exotic" else 51
    size = game.action_size
    assert batch.actions.shape == (steps * 4 * 20, size)
    assert batch.observations.isfinite().all()
    # what is learnt from is what was played
    for t, (actions, recorded) in enumerate(zip(played[-steps:], batch.actions.view(steps, 4, 20, size), strict=True)):
        assert all(torch.isin(recorded[b], actions[b]).all() for b in range(4)), t
    advantages = batch.advantages.view(steps, 4, 20)
    torch.testing.assert_close(advantages.mean(1), torch.zeros(steps, 20), atol=1e-4, rtol=0)
    noise = ((batch.actions - batch.means) / args.exploration_std).view(steps, 4, 20, size)
    torch.testing.assert_close(noise[:, :2], -noise[:, 2:], atol=2e-3, rtol=0)
    assert noise.std().item() == pytest.approx(1, abs=0.1)
    game.step = step
    alone = game.like(num_runs=1)
    alone.start(game.shocks, game.own_shocks)
    for _ in range(51):
        agent.stepper(alone)(alone)
    torch.testing.assert_close(alone.log_spots[-1][0], game.log_spots[-1][-1], atol=1e-5, rtol=0)


@pytest.mark.slow
def test_evaluate_repeats_the_benchmark_and_takes_another_smile(main):
    folder = main(task="exotic")
    again = main("--evaluate", folder)
    results = [json.loads((x / "benchmark.json").read_text()) for x in (folder, again)]
    assert results[0] == results[1]
    beside = main("--beside", folder, task="exotic")
    assert json.loads((beside / "benchmark.json").read_text())["rows"] == results[0]["rows"]
    first = main()
    for words, message in (
        (["--task", "exotic"], "--task is exotic, but the agent was trained with local-vol"),
        (["--task", "exotic", "--beside", folder], "--beside is for the figure of a training"),
    ):
        with pytest.raises(UsageError, match=message):
            main("--evaluate", first, *words)
    with pytest.raises(UsageError, match=r"--beside is .* \(the folder of a run with --task exotic\)"):
        main("--beside", first, task="exotic")
    other = main("--evaluate", first, "--smile", "sp500-2024")
    assert json.loads((other / "benchmark.json").read_text())["settings"]["days"] == 40


def test_the_example_of_quotes():
    """benchmarks/steep_smile.csv is the default surface with ρ = −0.7, and free of arbitrage."""
    surface, fits = quotes.load(str(ROOT / "benchmarks" / "steep_smile.csv"))
    steep = replace(smiles.SURFACES["sp500-2018"], rho=-0.7)
    for fit in fits:
        k = smiles.moneyness_grid(steep, fit.maturity, torch.linspace(-2.5, 1.5, 9))
        error = surface.implied_volatility(k, fit.maturity) - steep.implied_volatility(k, fit.maturity)
        assert 100 * error.abs().max() < 0.03
    assert [round(252 * fit.maturity) for fit in fits] == [5, 10, 15, 21, 30, 40, 51]


def test_a_smile_of_ones_own(main, tmp_path, capsys):
    surface = smiles.SURFACES["sp500-2018"]
    lines = ["maturity,strike,implied_volatility"]
    for days in (10, 25, 40):
        k = smiles.torch.linspace(-2.0, 1.2, 9).double() * surface(0.0, days / 252).w.sqrt()
        volatilities = surface.implied_volatility(k, days / 252)
        lines += [f"{days / 252},{2800 * math_exp},{v}" for math_exp, v in zip(k.exp(), volatilities, strict=True)]
    path = tmp_path / "quotes.csv"
    path.write_text("\n".join(lines).replace("tensor(", "").replace(")", ""))
    folder = main("--smile", path, "--smile-spot", 2800)
    assert capsys.readouterr().out.count("vol points\n") >= 3  # the fit of each maturity
    assert json.loads((folder / "benchmark.json").read_text())["settings"]["days"] == 40
    damaged = path.read_text().splitlines()
    damaged[5] = damaged[5].rsplit(",", 1)[0] + ",0.6"
    path.write_text("\n".join(damaged))
    with pytest.raises(UsageError) as refusal:
        main("--smile", path, "--smile-spot", 2800)
    assert "quotes.csv, line " in str(refusal.value)
    assert "arbitrage" in str(refusal.value)
    assert "--allow-arbitrage" in str(refusal.value)
    main("--smile", path, "--smile-spot", 2800, "--allow-arbitrage")


def test_the_papers_preset():
    args = parse_args(phase0.Args, [], default=phase0.Args(**phase0.PRESETS["paper"]))
    args.fill()
    args.check()
    assert (args.num_players, args.num_runs, args.hidden_layers, args.hidden_size) == (120_000, 10, 3, 50)
    assert (args.clip_coef, args.target_kl, args.learning_rate, args.update_epochs) == (0.3, 0.01, 1e-4, 30)
    assert args.reward == "shared"
    assert not args.common_random_numbers


def test_preset_gives_way_to_other_flags(main):
    folder = main("--preset", "paper")
    saved = json.loads((folder / "args.json").read_text())
    assert saved["num_players"] == PHASE.iteration["num_players"]
    assert (saved["action_map"], saved["update_epochs"]) == ("normal", 30)
    assert set(saved) == set(asdict(phase0.Args()))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--task", "american"], "--task is 'american' (one of local-vol, exotic, slv)"),
        (["--state", "global"], "--state is 'global' (one of local, non-path-dependent, path-dependent)"),
        (["--smile", "nowhere.csv"], "--smile is 'nowhere.csv' (one of sp500-2018, sp500-2018-slices, sp500-2024, h"),
        (["--num-steps", "20"], "--num-steps is 20 (at least 22, at most 504)"),
        (["--num-steps", "60"], "--num-steps is 60 (at least 22, at most 51, the last maturity)"),
        (["--num-runs", "1"], "--num-runs is 1 (at least 2 with --baseline runs)"),
        (["--baseline", "runs", "--no-common-random-numbers"], "--baseline runs needs common random numbers"),
        (["--num-runs", "5"], "--num-runs is 5 (even with --antithetic)"),
        (["--num-basis", "1"], "--num-basis is 1 (at least 2"),
        (["--num-basis", "20000"], "--num-basis is 20000 (at least 2, at most"),
        (["--allow-arbitrage"], "--allow-arbitrage is for a --smile from a CSV"),
        (["--task", "exotic", "--vega-weights"], "--vega-weights is for --task local-vol"),
        (["--num-players", "5"], "--num-players is 5 (at least 100"),
        (["--num-players", "4000000", "--num-runs", "1000"], "GiB free on cpu"),
        (["--num-iterations", "0"], "--num-iterations is 0 (at least 1"),
        (["--exploration-std", "0"], "--exploration-std is 0.0 (more than 0)"),
        (["--clip-coef", "2"], "--clip-coef is 2.0 (more than 0, at most 1)"),
        (["--eval-paths", "10"], "--eval-paths is 10 (at least 1000"),
        (["--task", "exotic", "--act-before-t1", "--interpolation", "linear"], "--interpolation linear is for states"),
        (["--steps-per-day", "9"], "--steps-per-day is 9 (at least 1, at most 8)"),
        (["--neighbours", "2"], "--neighbours is for --interpolation nearest"),
        (["--task", "exotic", "--neighbours", "99"], "--neighbours is 99 (at least 1, at most 60)"),
        (["--task", "slv"], "--task slv needs --smile heston"),
        (["--task", "slv", "--smile", "heston", "--state", "local"], "--task slv needs a --state with the last"),
        (["--task", "slv", "--smile", "heston", "--reward", "difference"], "--task slv is for --reward shared"),
        (["--heston", "0.04", "0.04", "4", "0.5", "0"], "--heston is for --smile heston"),
        (["--smile", "heston", "--heston", "0.04", "0", "4", "0.5", "0"], "--heston has 0 (at least 0.0001, at most"),
        (["--action-map", "stochastic"], "--action-map stochastic needs a --state with the last volatility"),
        (["--beside", "runs/x"], "--beside is for --task exotic"),
        (["--strikes", "1.0"], "--strikes is for --task exotic"),
        (["--objective", "max"], "--objective is for --task exotic"),
        (["--task", "exotic", "--objective", "least"], "--objective is 'least' (one of min, max, target)"),
        (["--task", "exotic", "--objective", "target"], "--objective target needs --target-price"),
        (["--task", "exotic", "--target-price", "120"], "--target-price is for --objective target"),
        (["--task", "exotic", "--payoff", "lookback"], "--payoff is 'lookback' (one of bermudan-call"),
        (["--task", "exotic", "--strikes", "1.0"], "--strikes is 1 (2 of bermudan-call, positive"),
        (["--task", "exotic", "--days", "51", "21"], "--days is 51 21 (two or more, increasing"),
        (["--task", "exotic", "--days", "21", "40"], "--days ends with 40 (--num-steps, 51)"),
        (
            ["--task", "exotic", "--action-map", "stochastic", "--reward", "difference"],
            "--reward difference of --task exotic is for --action-map direct or normal",
        ),
        (["--preset", "fast"], "--preset is 'fast' (one of default, paper)"),
        (["--smile-spot", "0"], "--smile-spot is 0.0 (more than 0)"),
        (["--smile-spot", "2"], "--smile-spot is for a --smile from a CSV"),
        (["--evaluate", "nowhere"], "nowhere: no such checkpoint"),
    ],
)
def test_bad_input(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as refusal:
        phase0.main(words)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "runs").exists()


def test_exit_code_of_bad_input(script):
    refused = script(PHASE.script, "--num-runs", "3")
    assert refused.returncode == 2
    assert refused.stderr.strip() == "error: --num-runs is 3 (even with --antithetic)"


def test_copy_and_modify(script, tmp_path):
    """Another network, and another reward: what a market is made of is the policy's own."""
    shutil.copytree(ROOT / "envs", tmp_path / "copy" / "envs")
    text = (ROOT / PHASE.script).read_text()
    for old, new in {
        "nn.Tanh()": "nn.SiLU()",
        "rewards = game.shared_rewards(explored)": "rewards = 2.0 * game.shared_rewards(explored)",
    }.items():
        assert text.count(old) == 1
        text = text.replace(old, new)
    (tmp_path / "copy" / "my_idea.py").write_text(text)
    done = script("my_idea.py", *flags(reward="shared", reference="none"), root=tmp_path / "copy")
    assert done.returncode in (0, 1), done.stderr
    (folder,) = tmp_path.glob("runs/*my_idea*")
    assert load_market(str(folder)).tables.isfinite().all()
