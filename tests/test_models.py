"""The model of the underlying that the flags describe."""

from dataclasses import asdict, dataclass

import numpy as np
import pytest
import torch
from common import MARKET_PHASES, PHASES, SP500_GARCH, dupire_market, model_called

from envs import models
from envs.market import dynamics
from envs.market.dynamics import GBM, Heston, Merton
from envs.market.history import load_closes
from envs.models import HestonArgs, ModelArgs, QuotingArgs, make_model
from envs.run.args import RunArgs
from envs.run.errors import UsageError
from envs.run.files import save_checkpoint


@dataclass
class Args(ModelArgs, RunArgs):
    num_steps: int = 30


@dataclass
class QuoterArgs(QuotingArgs, RunArgs):
    pass


def test_every_name_makes_its_model():
    assert make_model(Args()) == GBM(0.2, 1 / 252)
    assert make_model(Args(volatility=0.3), dt=1 / 504) == GBM(0.3, 1 / 504)
    assert make_model(Args(dynamics="heston")) == Heston()
    assert make_model(Args(dynamics="merton"), dt=1 / 504) == Merton(dt=1 / 504)
    garch = make_model(Args(dynamics="garch"))
    assert garch.initial_variance == pytest.approx(SP500_GARCH.initial_variance, rel=1e-3)
    assert garch.dt == 1 / 252


def test_flags_of_heston():
    """The volatility is that at the start and in the long run; scripts without the flags have the model's defaults."""
    args = QuoterArgs(volatility=0.3, mean_reversion=2.0, vol_of_vol=0.4, correlation=-0.5)
    assert make_model(args, dt=1 / 504) == Heston(0.09, 0.09, 2.0, 0.4, -0.5, 1 / 504)
    assert asdict(make_model(QuoterArgs(), dt=1 / 504)) == pytest.approx(asdict(Heston(dt=1 / 504)))
    assert make_model(Args(dynamics="heston", volatility=0.3)) == Heston()
    impossible = QuoterArgs(vol_of_vol=3.0, correlation=1.0)
    impossible.check()  # each flag alone is within its range
    with pytest.raises(UsageError, match=r"vol_of_vol is 3.0 with correlation 1.0: too much for steps"):
        make_model(impossible, dt=1.0)


def test_historical_needs_closes_after_the_fit():
    with pytest.raises(ValueError, match="history-end"):
        make_model(Args(dynamics="historical"))
    with pytest.raises(ValueError, match="at least 500"):
        make_model(Args(dynamics="garch", history_end="1999-06-30"))
    with pytest.raises(ValueError, match="--dynamics is 'levy'"):
        Args(dynamics="levy").check()
    with pytest.raises(UsageError, match=r"after --history-end: there are \d+ \(at least 360, twelve episodes\)"):
        make_model(Args(dynamics="historical", history_end="2017-12-29"))


def test_own_history(tmp_path):
    path = tmp_path / "closes.csv"
    noise = dynamics.draw_noise(1, 1500, torch.Generator().manual_seed(0), torch.float64)
    spot, _ = SP500_GARCH.simulate(noise[..., None])
    days = np.arange(np.datetime64("2000-01-03"), np.datetime64("2000-01-03") + 1501)
    path.write_text("Date,Close\n" + "".join(f"{d},{s:.6f}\n" for d, s in zip(days, spot[0].tolist(), strict=True)))
    garch = make_model(Args(dynamics="garch", history=str(path)))
    assert 0.5 < garch.initial_variance / SP500_GARCH.initial_variance < 2
    dates, closes = load_closes(str(path))
    assert len(dates) == len(closes) == 1501
    last = str(days[1000])
    replayed = make_model(Args(dynamics="historical", history=str(path), history_end=last))
    assert replayed.source == str(path)
    assert str(replayed.dates[0]) == last


def test_closes_that_garch_does_not_fit(tmp_path):
    path = tmp_path / "closes.csv"
    days = np.arange(np.datetime64("2000-01-03"), np.datetime64("2000-01-03") + 600)
    path.write_text("date,close\n" + "".join(f"{day},100\n" for day in days))
    with pytest.raises(UsageError) as refusal:
        make_model(Args(dynamics="garch", history=str(path), history_end="2001-07-01"))
    start, end = str(refusal.value).split(": ", 1)
    assert start == f"closes of {path} until 2001-07-01"
    assert end.endswith("; try other --history or --history-end, or --dynamics heston")


@pytest.mark.parametrize("path", ["x" * 300, "a/" * 3000, "nul\0", "\ud800", "\n", "."])
def test_paths_that_no_file_can_have(path):
    with pytest.raises(UsageError, match="no such file"):
        make_model(Args(dynamics="garch", history=path))
    with pytest.raises(UsageError, match="no such checkpoint"):
        make_model(Args(dynamics="marlvol", marlvol_checkpoint=path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dynamics": "historical"}, "(one of gbm, garch, heston, merton, marlvol; historical with --evaluate)"),
        ({"dynamics": "marlvol"}, "--dynamics marlvol needs --marlvol-checkpoint, a run of phase 0"),
        ({"marlvol_checkpoint": "x"}, "--marlvol-checkpoint needs --dynamics marlvol"),
        ({"history_end": "2010-12-31"}, "--history and --history-end need --dynamics garch"),
        ({"history": "closes.csv", "dynamics": "merton"}, "--history and --history-end need --dynamics garch"),
        ({"dynamics": "garch", "history_end": "2010-13-01"}, "--history-end is '2010-13-01' (a day, YYYY-MM-DD)"),
        ({"dynamics": "garch", "history_end": ""}, "--history-end is '' (a day, YYYY-MM-DD)"),
        ({"num_steps": 0}, "--num-steps is 0 (at least 1, at most 2520)"),
        ({"volatility": float("nan")}, "--volatility is nan (at least 0.001, at most 10)"),
        ({"volatility": 4.0, "num_steps": 252}, "--volatility is 4.0 (at most 3 over --num-steps)"),
    ],
)
def test_flags_that_cannot_work(changes, message):
    with pytest.raises(UsageError) as refusal:
        Args(**changes).check()
    assert message in str(refusal.value)
    Args().check()


def test_real_closes_are_drawn_in_phase_1_alone():
    PHASES["phase1"].args(dynamics="bootstrap", history_end="2010-12-31").check()
    for name in ("phase2", "phase3", "phase4"):
        with pytest.raises(UsageError, match="--dynamics is 'bootstrap'"):
            PHASES[name].args(dynamics="bootstrap").check()
    with pytest.raises(
        UsageError, match=r"closes until --history-end: there are 504 \(at least 1200, twelve episodes\)"
    ):
        make_model(PHASES["phase1"].args(dynamics="bootstrap", history_end="2000-12-29", num_steps=100))


def test_an_evaluation_may_name_any_market():
    for changes in ({"dynamics": "historical"}, {"marlvol_checkpoint": "x"}, {"history_end": "2010-12-31"}):
        Args(evaluate="runs/x", **changes).check()


@pytest.mark.parametrize(
    ("flag", "value"),
    [("mean_reversion", 0.0), ("vol_of_vol", 4.0), ("correlation", -1.5), ("num_makers", 1), ("arrival_rate", 0.0),
     ("flow_sd", -1.0), ("choice_sensitivity", 0.0), ("cost_rate", 0.6), ("risk_aversion", float("inf")),
     ("informed_share", 1.5), ("informed_share", -0.1), ("informed_share", float("nan")),
     ("toxic_share", 0.9), ("toxic_share", -0.1), ("toxic_share", float("nan"))],
)  # fmt: skip
def test_flags_of_a_market_of_makers_that_cannot_work(flag, value):
    QuoterArgs().check()
    with pytest.raises(UsageError, match=f"--{flag.replace('_', '-')} is {value}"):
        QuoterArgs(**{flag: value}).check()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moneyness": ()}, "--moneyness is empty (one or more, increasing)"),
        ({"moneyness": (0.5, 0.0)}, "--moneyness is 0.5 0 (one or more, increasing)"),
        ({"moneyness": (0.0, 0.0)}, "--moneyness is 0 0 (one or more, increasing)"),
        ({"moneyness": (0.0, float("nan"))}, "--moneyness is 0 nan (one or more, increasing)"),
        ({"moneyness": (float("nan"),)}, "--moneyness has nan (at least -5, at most 5)"),
        ({"moneyness": (-6.0, 0.0)}, "--moneyness has -6 (at least -5, at most 5)"),
        ({"expiries": ()}, "--expiries is empty (one or more, increasing)"),
        ({"expiries": (120, 60)}, "--expiries is 120 60 (one or more, increasing)"),
        ({"expiries": (-(10**400), 0, 0)}, "--expiries is -1e400 0 0 (one or more, increasing)"),
        ({"expiries": (10**400,)}, "--expiries ends at 1e400 (at most 2520)"),
        ({"expiries": (59, 120)}, "--expiries begins at 59 (at least --num-steps = 60)"),
        ({"expiries": (120, 3000)}, "--expiries ends at 3000 (at most 2520)"),
        ({"expiries": tuple(range(60, 81))}, "--moneyness × --expiries are 105 options (at most 100)"),
    ],
)
def test_options_that_cannot_be_quoted(changes, message):
    with pytest.raises(UsageError) as refusal:
        QuoterArgs(**changes).check()
    assert message in str(refusal.value)


def test_options_that_the_flags_describe():
    """Out of the money, of one expiry twice the episode's length unless others are named."""
    args = QuoterArgs(num_steps=10, moneyness=(-1.0, 0.0, 2.0))
    assert args.expiry_steps == (20,)
    options = args.options(1 / 504)
    root = 0.2 * (20 / 504) ** 0.5
    assert [option.strike for option in options] == [pytest.approx(100 * np.exp(z * root)) for z in (-1, 0, 2)]
    assert [option[1:] for option in options] == [(20, False), (20, True), (20, True)]
    surface = QuoterArgs(num_steps=10, expiries=(10, 40)).options(1 / 252)
    assert [option.expiry for option in surface] == [10] * 5 + [40] * 5
    assert surface[9].strike == pytest.approx(100 * np.exp(0.2 * (40 / 252) ** 0.5))
    described = QuoterArgs(expiries=(60, 120)).described()
    assert described["expiries"] == (60, 120)
    assert described["moneyness"] == (-1.0, -0.5, 0.0, 0.5, 1.0)
    assert described["informed_share"] == 0.2
    assert QuoterArgs().described() == QuoterArgs(expiries=(120,)).described()  # the same market, said otherwise


def test_options_of_another_agent():
    """A network has a column for every option: their numbers must be the same."""
    trained = QuoterArgs(expiries=(60, 120))
    models.check_options(QuoterArgs(expiries=(80, 200), moneyness=(-2.0, -1.0, 0.0, 1.0, 2.0)), trained)
    for changes, message in (
        ({"moneyness": (0.0,), "expiries": (60, 120)}, "--moneyness has 1, but the agent was trained with 5"),
        ({}, "--expiries has 1, but the agent was trained with 2"),
        ({"moneyness": tuple(range(-4, 6)), "expiries": (60,)}, "--moneyness has 10"),  # as many, but others
    ):
        with pytest.raises(UsageError) as refusal:
            models.check_options(QuoterArgs(**changes), trained)
        assert message in str(refusal.value)


def test_options_beyond_a_calibrated_smile(monkeypatch):
    """51 days of it, in half days."""
    market = model_called("marlvol")
    monkeypatch.setattr(models, "load_market", lambda path, dt: market)
    args = QuoterArgs(dynamics="marlvol", marlvol_checkpoint="x", num_steps=25)
    assert make_model(args) is market
    for changes, message in (
        ({"num_steps": 26}, "--num-steps is 26 (at most 25: options expire after twice that, and the smile ends)"),
        ({"expiries": (30, 60)}, "--expiries ends at 60 (at most 51, where the smile ends)"),
        ({"num_steps": 60, "expiries": (60,)}, "--expiries ends at 60 (at most 51"),
    ):
        with pytest.raises(UsageError) as refusal:
            make_model(QuoterArgs(**{**vars(args), **changes}))
        assert str(refusal.value).startswith(message)


@pytest.mark.parametrize("name", MARKET_PHASES)
def test_flags_are_those_of_every_script(name):
    """All phases that trade in a market have these flags, and makers those of their market too."""
    args = PHASES[name].args()
    assert isinstance(args, ModelArgs)
    args.check()
    if isinstance(args, QuotingArgs):
        assert isinstance(args, HestonArgs)
        assert args.dynamics == "heston"
        assert {**args.market(), "dynamics": "heston"}.items() <= args.described().items()


def test_closes_that_an_agent_was_trained_on():
    def refused(trained, evaluated):
        try:
            models.check_unseen(Args(dynamics="historical", **evaluated), Args(**trained))
        except UsageError as error:
            return str(error)
        return None

    seen = {"dynamics": "garch", "history_end": "2010-12-31"}
    assert refused(seen, {"history_end": "2010-12-31"}) is None
    assert refused(seen, {"history_end": "2014-12-31"}) is None
    assert refused({"dynamics": "gbm"}, {"history_end": "2000-12-31"}) is None
    for written in ("20101231", "2010-W52-5"):  # the same day
        assert refused(seen, {"history_end": written}) is None
        assert refused({**seen, "history_end": written}, {"history_end": "2010-12-31"}) is None
    for written in ("20100104", "2010-W01-1", "2010-12-30"):  # days before, though some are behind it as text
        assert "was trained on closes" in refused(seen, {"history_end": written})
    assert "--history-end is 'then'" in refused({**seen, "history_end": "then"}, {"history_end": "2014-12-31"})
    message = refused(seen, {"history_end": "2009-12-31"})
    assert message == "--history-end is 2009-12-31, but the agent was trained on closes of the S&P 500 until 2010-12-31"
    assert "until their end" in refused({"dynamics": "garch"}, {"history_end": "2009-12-31"})
    other = refused({**seen, "history": "a.csv"}, {"history_end": "2014-12-31", "history": "b.csv"})
    assert "closes of a.csv until 2010-12-31" in other


def test_markets_that_cannot_be_loaded(tmp_path):
    with pytest.raises(ValueError, match="nowhere: no such checkpoint"):
        models.load_market("nowhere")
    path = tmp_path / "checkpoint.pt"
    content = {"phase": "phase0", "args": {}, "iteration": 1, "agent": {}}
    save_checkpoint(path, content)
    with pytest.raises(ValueError, match="the run has not been finished, so there is no market in it"):
        models.load_market(str(tmp_path))
    save_checkpoint(path, {**content, "market": {"tables": None}})
    with pytest.raises(ValueError, match=r"checkpoint.pt: does not fit this script, its market is of another kind"):
        models.load_market(str(path))
    market = dupire_market()
    save_checkpoint(path, {**content, "market": market})
    assert models.load_market(str(path)).last_step == 51
    kinds = ({"num_runs": 10**7}, {"num_steps": 10**7}, {"num_steps": "51"}, {"task": ["local-vol"]})
    for game in (*kinds, {"steps_per_day": 0}, {"steps_per_day": 10**6, "num_steps": 51 * 10**6}):
        save_checkpoint(path, {**content, "market": {**market, "game": {**market["game"], **game}}})
        with pytest.raises(ValueError, match="its market is of another kind"):
            models.load_market(str(path))
    maturities = {"maturities": [(1 + i) / 252 for i in range(10**5)], "slices": [[0.04, 0.4, -0.5, 0.0, 0.1]] * 10**5}
    save_checkpoint(path, {**content, "market": {**market, "surface": maturities}})
    with pytest.raises(ValueError, match="its market is of another kind"):
        models.load_market(str(path))
    save_checkpoint(path, {**content, "phase": "phase1"})
    with pytest.raises(UsageError, match="a checkpoint of phase1, not of phase0"):
        make_model(Args(dynamics="marlvol", marlvol_checkpoint=str(path)))
