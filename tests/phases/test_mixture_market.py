"""The phases that hedge, in many models at once."""

import json

import pytest
from common import PHASES

from envs.models import HedgingArgs, make_model
from envs.run.errors import UsageError


@pytest.mark.parametrize("name", ["phase1", "phase2"])
def test_an_agent_of_many_models_is_evaluated_in_one(name, tmp_path, monkeypatch, capsys):
    """It sees what a trader sees there too, without a word about it."""
    phase = PHASES[name]
    monkeypatch.chdir(tmp_path)
    phase.module.main(phase.flags(iterations=4, num_evaluations=1, dynamics="mixture"))
    printed = capsys.readouterr().out
    assert "min-variance band, tuned" in printed
    assert "beats constant band, tuned" in printed
    assert "beats min-variance" not in printed  # it knows the model of every row
    (folder,) = (tmp_path / "runs").iterdir()
    assert json.loads((folder / "args.json").read_text())["trader_view"]
    assert not (folder / "no_trade_bands.png").exists()  # every row has its own
    phase.module.main(["--resume", str(folder)])
    phase.module.main(["--evaluate", str(folder), "--dynamics", "heston"])
    (evaluated,) = (tmp_path / "runs").glob("heston__*")
    assert json.loads((evaluated / "args.json").read_text())["trader_view"]
    assert (evaluated / "no_trade_bands.png").exists()
    with pytest.raises(UsageError, match="does not fit"):
        phase.module.main(["--evaluate", str(folder), "--dynamics", "heston", "--no-trader-view"])


@pytest.mark.parametrize("name", ["phase1", "phase2"])
def test_a_mixture_is_always_seen_as_a_trader_does(name):
    args = PHASES[name].args(dynamics="mixture")
    assert isinstance(args, HedgingArgs)
    args.check()
    env = PHASES[name].module.make_env(args, make_model(args), 32, "cpu")
    assert env.trader_view
    assert "leverage" in env.columns
    assert not PHASES[name].args().trader_view


@pytest.mark.parametrize("name", ["phase3", "phase4"])
def test_makers_have_one_model(name):
    with pytest.raises(UsageError, match=r"--dynamics is 'mixture' \(one of gbm, garch, heston, merton, marlvol;"):
        PHASES[name].args(dynamics="mixture").check()
