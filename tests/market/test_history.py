"""Real closes: files of them, the fit of GJR-GARCH, and windows replayed."""

import numpy as np
import pytest
import torch
from common import PHASES

from envs.market.dynamics import draw_noise
from envs.market.history import Historical, fit_garch, load_closes
from envs.models import make_model

F64 = torch.float64


def test_garch_fit_to_the_sp500():
    dates, closes = load_closes()
    assert len(closes) == 5031
    assert str(dates[0]) == "1999-01-04"
    garch = fit_garch(closes)
    figures = (garch.omega * 1e4, garch.alpha, garch.gamma, garch.beta)
    assert figures == pytest.approx((0.020746, 0.0, 0.182566, 0.892038), abs=2e-4)


def test_historical_windows():
    model = make_model(PHASES["phase1"].args(dynamics="historical", history_end="2010-12-31"))
    dates, closes = load_closes()
    start = int((dates <= np.datetime64("2010-12-31")).sum())
    assert str(model.dates[0]) == "2010-12-31"  # its close opens the first window
    assert len(model.log_returns) == len(closes) - start
    assert model.log_returns.exp().mean().item() == pytest.approx(1.0, abs=1e-12)  # no drift is earned
    windows = model.num_windows(30)
    assert windows == len(closes) - start - 29
    spot, variance = model.simulate(torch.zeros(windows, 30, 1, dtype=F64))
    growth = closes[start + 29] / closes[start - 1]
    drift = (closes[start:] / closes[start - 1 : -1]).mean()
    assert spot[0, -1].item() == pytest.approx(100 * growth / drift**30, rel=1e-9)
    assert torch.equal(spot[1, :2] / spot[1, 0], spot[0, 1:3] / spot[0, 1])
    # the filter knows the past only: the same closes up to a day give the same variances up to that day
    shorter = Historical(closes[start - 1 : start + 100], model.garch, closes[:start])
    torch.testing.assert_close(shorter.variances[:100], model.variances[:100], rtol=1e-12, atol=0)
    assert variance[0, 0] == model.variances[0]


def test_bootstrapped_windows_are_those_of_the_closes_until_the_day():
    """Each of them is drawn as often, whatever the number of rows, and none has a close after the day."""
    model = make_model(PHASES["phase1"].args(dynamics="bootstrap", history_end="2010-12-31"))
    _, closes = load_closes()
    before = len(model.log_returns) + 1
    assert str(model.dates[-1]) == "2010-12-31"
    noise = draw_noise(30_000, 30, torch.Generator().manual_seed(1), F64)[..., None]
    start = model.starts(noise)
    assert start.min() == 0
    assert start.max() == model.num_windows(30) - 1 == before - 31
    counts = torch.bincount(start // 100).double()[:-1]
    assert (counts - counts.mean()).abs().max() < 4.5 * counts.mean().sqrt()
    spot, variance = model.simulate(noise[:50])
    every = Historical(closes[:before], model.garch)
    windows, variances = every.simulate(torch.zeros(every.num_windows(30), 30, 1, dtype=F64))
    assert torch.equal(spot, windows[start[:50]])
    assert torch.equal(variance, variances[start[:50]])


def test_two_indices_are_shipped():
    for name, first in ((None, 1228.10), ("nasdaq", 2208.05)):
        dates, closes = load_closes(name)
        assert len(closes) == 5031
        assert closes[0] == pytest.approx(first, abs=0.01)
        assert str(dates[-1]) == "2018-12-31"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("day,close\n2000-01-03,1\n", "line 1: no column 'date'"),
        ("date,open\n2000-01-03,1\n", "line 1: no column 'close'"),
        ("date,close\n2000-01-03,1\n2000-01-04,0\n", "line 3: close 0 is not a positive"),
        ("date,close\n2000-01-03,1\n2000-01-04,-2\n", "line 3: close -2 is not a positive"),
        ("date,close\n2000-01-03,1\n2000-01-04,n/a\n", "line 3: close 'n/a' is not a number"),
        ("date,close\n2000-01-03,1\n2000-01-04,nan\n", "line 3: close nan is not a positive"),
        ("date,close\n2000-01-03,1\n2000-01-04,\n", "line 3: close '' is not a number"),
        ("date,close\n2000-01-03,1\n2000-01-04\n", "line 3: close '' is not a number"),
        ("date,close\n2000-01-03,1\n03/01/2000,2\n", "line 3: date '03/01/2000' is not of the form"),
        ("date,close\n2000-01-03,1\n2000-01-03,2\n", "line 3: date 2000-01-03 does not come after"),
        ("date,close\n2000-01-03,1\n2000-03-03,2\n", "line 3: gap of 60 days"),
        ("date,close\n2000-01-03,1\n", "1 closes"),
        ("", "line 1: no column 'date'"),
    ],
)
def test_bad_history(tmp_path, content, message):
    path = tmp_path / "closes.csv"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        load_closes(str(path))
    assert str(path) in str(error.value)
