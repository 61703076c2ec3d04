"""Every phase in the market that phase 0 has calibrated."""

import numpy as np
import pytest
from common import CPU, MARKET_PHASES, PHASES, dupire_market

from envs.baselines import hedgers
from envs.baselines import makers as formulas
from envs.benchmark import makers
from envs.benchmark.contest import play
from envs.calibration import marlvol
from envs.market.units import TRADING_DAYS
from envs.models import make_model
from envs.run.errors import UsageError
from envs.run.files import save_checkpoint

pytestmark = pytest.mark.parametrize("phase", [PHASES[name] for name in MARKET_PHASES], ids=MARKET_PHASES)


@pytest.fixture(autouse=True)
def fewer_particles(monkeypatch):
    monkeypatch.setattr(marlvol, "PARTICLES", 2**14)


@pytest.fixture
def checkpoint(tmp_path):
    """Phase 0's result in miniature: a market whose projection is Dupire's local volatility, as a table."""
    path = tmp_path / "market.pt"
    save_checkpoint(path, {"phase": "phase0", "args": {}, "iteration": 1, "agent": {}, "market": dupire_market()})
    return path


def test_every_phase_trades_in_it(phase, checkpoint, tmp_path, monkeypatch, quick, capsys):
    """Phase 1 from its training to its evaluation elsewhere; the others' markets, and the strongest classics there."""
    monkeypatch.chdir(tmp_path)
    market = {"dynamics": "marlvol", "marlvol_checkpoint": str(checkpoint)}
    if phase is PHASES["phase1"]:
        phase.module.main(phase.flags(iterations=4, num_evaluations=1, **market))
        assert "BENCHMARK" in capsys.readouterr().out
        (folder,) = (tmp_path / "runs").iterdir()
        phase.module.main(["--resume", str(folder)])
        phase.module.main(["--evaluate", str(folder), "--dynamics", "gbm"])
        return
    args = phase.module.Args(num_steps=30, **market)
    if phase is PHASES["phase2"]:
        env = phase.module.make_env(args, make_model(args), 512, CPU)
        policy = hedgers.constant_band(env, 0.1, hedgers.minimum_variance_delta(env))
    else:
        model = make_model(args, dt=0.5 / TRADING_DAYS)
        env = makers.against_rival(phase.module.make_market(args, model, 512, CPU), (0.2, 0.8))
        policy = formulas.minimum_variance_band(env.env, formulas.glft(env.env, 0.2, 0.8), 0.1)
    env.reset(seed=1)
    outcome = play(env, policy)
    assert all(np.isfinite(x).all() for x in outcome.values())
    assert outcome["pnl"].mean() > -2


def test_bad_markets_are_refused(phase, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    too_long = ["--num-steps", "60", *(["--expiries", "15", "60"] if phase == PHASES["phase2"] else [])]
    unfinished = tmp_path / "unfinished.pt"
    save_checkpoint(unfinished, {"phase": "phase0", "args": {}, "iteration": 1, "agent": {}})
    market = ["--dynamics", "marlvol", "--marlvol-checkpoint"]
    beyond = [*market, str(checkpoint), "--num-steps", "30", "--expiries", "60", "110"]
    beyond = [(beyond, "--expiries ends at 110 (at most 102, where the smile ends)")]
    for flags, message in (
        (["--dynamics", "marlvol"], "--dynamics marlvol needs --marlvol-checkpoint, a run of phase 0"),
        (["--marlvol-checkpoint", str(checkpoint)], "--marlvol-checkpoint needs --dynamics marlvol"),
        ([*market, "nowhere"], "nowhere: no such checkpoint"),
        ([*market, str(unfinished)], "has not been finished"),
        ([*market, str(checkpoint), *too_long], f"--num-steps is {too_long[1]} (at most "),
        *(beyond if phase.name in ("phase3", "phase4") else []),
    ):
        with pytest.raises(UsageError) as refusal:
            phase.module.main(flags)
        assert message in str(refusal.value)
    assert not (tmp_path / "runs").exists()
