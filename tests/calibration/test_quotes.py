"""Quotes from a CSV file: reading, arbitrage between them, and the SVI slices fitted to them."""

import math

import numpy as np
import pytest
import torch

from envs.calibration import quotes
from envs.market import black_scholes as bs
from envs.market import smiles
from envs.market.smiles import SSVI, SVI, Slices, find_arbitrage

F64 = torch.float64
SPOT = 2813.18
SP500, SP500_2024 = (smiles.SURFACES[x] for x in ("sp500-2018", "sp500-2024"))
HEADER = "maturity,strike,implied_volatility"
STRIKES = np.arange(2500.0, 2976.0, 25.0)
# Axel Vogt's slice of one year, free of calendar spreads by itself but not of butterflies (Gatheral & Jacquier 2014)
VOGT = SVI(-0.0410, 0.1331, 0.3060, 0.3586, 0.4153)


def flat(volatility, maturities=(0.1, 0.2, 0.5)):
    return Slices(maturities, [SVI(volatility**2 * t, 0.0, 0.0, 0.0, 1.0) for t in maturities])


def sample_quotes(surface=SP500, days=(15, 30, 51), strikes=STRIKES, digits=8):
    """Rows (maturity, strike, volatility) of a surface, strikes in the currency, maturity by maturity."""
    maturities = [day / 252 for day in days]
    volatilities = [surface.implied_volatility(np.log(strikes / SPOT), t).numpy().round(digits) for t in maturities]
    return [
        [t, float(k), float(v)]
        for t, row in zip(maturities, volatilities, strict=True)
        for k, v in zip(strikes, row, strict=True)
    ]


def to_csv(rows, header=HEADER):
    return header + "\n" + "".join(",".join(map(str, row)) + "\n" for row in rows)


@pytest.fixture
def csv_file(tmp_path):
    """Writes rows or text or bytes to a file; returns its path."""

    def write(content, **kwargs):
        path = tmp_path / "quotes.csv"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else to_csv(content), **kwargs)
        return str(path)

    return write


def refuse(path, message, **kwargs):
    """`load` raises one printable line that names the file and matches."""
    with pytest.raises(ValueError, match=message) as error:
        quotes.load(path, **{"spot": SPOT, **kwargs})
    assert str(error.value).startswith(path)
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    ("surface", "days"), [(SP500, (15, 30, 51)), (flat(0.1), (20, 50)), (SP500_2024, (20 * 252 / 251,))]
)
def test_load_recovers_a_surface(csv_file, surface, days):
    rows = sample_quotes(surface, days)
    fitted, fits = quotes.load(csv_file(rows), SPOT)
    assert fitted.maturities == [fit.maturity for fit in fits] == sorted({row[0] for row in rows})
    assert [fit.num_quotes for fit in fits] == [len(STRIKES)] * len(days)
    assert max(fit.rmse for fit in fits) <= max(fit.worst for fit in fits) < 1e-3
    t, strike, volatility = torch.tensor(rows, dtype=F64).unbind(1)
    k = (strike / SPOT).log()
    torch.testing.assert_close(fitted.implied_volatility(k, t), volatility, atol=1e-5, rtol=0)
    k = torch.linspace(k.min(), k.max(), 201, dtype=F64)
    assert find_arbitrage(fitted, fitted.maturities, [k] * len(days)) == []


@pytest.mark.parametrize("seed", range(3))
def test_fits_to_clean_quotes_are_clean(csv_file, seed):
    """Random SSVI within its bounds (γ = ½, η²(1 + |ρ|) < 4), ±2 standard deviations, rounded as vendors do."""
    rng = np.random.default_rng(seed)
    rho = rng.uniform(-0.8, 0.3)
    eta = rng.uniform(0.3, 0.95) * 2 / math.sqrt(1 + abs(rho))
    surface = SSVI(rng.uniform(0.01, 0.2), rng.uniform(0.0, 0.05), eta, 0.5, rho)
    rows = []
    for day in (10, 40, 120):
        width = math.sqrt(surface(0.0, day / 252).w)
        strikes = SPOT * np.exp(width * np.linspace(-2, 2, 13))
        rows += sample_quotes(surface, [day], strikes.round(2), digits=4)
    fitted, fits = quotes.load(csv_file(rows), SPOT)
    assert max(fit.worst for fit in fits) < 0.02  # of 0.005 from rounding
    k = [np.log([row[1] / SPOT for row in rows[i : i + 13]]) for i in (0, 13, 26)]
    k = [np.linspace(x[0], x[-1], 301) for x in k]
    assert find_arbitrage(fitted, fitted.maturities, k) == []


def test_fits_to_neighbouring_days(csv_file):
    """Expiries a day apart, whose total variances nearly touch, are as well fitted as distant ones."""
    _, fits = quotes.load(csv_file(sample_quotes(days=(20, 21), strikes=STRIKES[:-1:2])), SPOT)
    assert max(fit.worst for fit in fits) < 0.01


def test_rounded_quotes_are_no_arbitrage(csv_file):
    _, fits = quotes.load(csv_file(sample_quotes(digits=4)), SPOT)
    assert max(fit.worst for fit in fits) < 0.01
    # strikes as near as the S&P 500's
    read = quotes.load_quotes(csv_file(sample_quotes(strikes=np.arange(2600.0, 2900.0, 5.0), digits=4)), SPOT)
    assert quotes.quoted_arbitrage(read) == []


def test_layout_does_not_matter(csv_file):
    rows = sample_quotes(days=(15, 30), digits=6)
    expected = quotes.load_quotes(csv_file(rows), SPOT)
    assert [[q.strike * SPOT for q in smile] for smile in expected] == [pytest.approx(STRIKES)] * 2

    def values(path):
        return [[quote[1:] for quote in smile] for smile in quotes.load_quotes(path, SPOT)]

    plain = [[quote[1:] for quote in smile] for smile in expected]
    shuffled = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    assert values(csv_file(shuffled)) == plain
    assert quotes.load(csv_file(shuffled), SPOT)[1] == quotes.load(csv_file(rows), SPOT)[1]
    assert values(csv_file(to_csv(rows, "Maturity, STRIKE ,Implied_Volatility"))) == plain
    assert values(csv_file(to_csv(rows), encoding="utf-8-sig")) == plain
    assert values(csv_file(to_csv(rows).replace("\n", "\r\n"), newline="")) == plain
    assert values(csv_file(to_csv(rows).replace("\n", "\n\n"))) == plain
    assert values(csv_file(to_csv(rows).replace(",", " , "))) == plain
    more = [[v, "x,é", k, t] for t, k, v in rows]
    assert values(csv_file(to_csv(more, "implied_volatility,what,note,strike,maturity"), encoding="utf-8")) == plain


def test_quotes_know_their_lines(csv_file):
    rows = sample_quotes(days=(30, 15), strikes=STRIKES[::-4])
    read = quotes.load_quotes(csv_file(to_csv(rows).replace("\n", "\n\n", 1)), SPOT)
    assert [[quote.line for quote in smile] for smile in read] == [[12, 11, 10, 9, 8], [7, 6, 5, 4, 3]]
    assert read[0][0] == (12, 15 / 252, 2575 / SPOT, rows[-1][2])


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("maturity", "30d", "maturity '30d' is not a number"),
        ("strike", "", "strike '' is not a number"),
        ("implied_volatility", "9.4%", "implied_volatility '9.4%' is not a number"),
        ("implied_volatility", '"0.1\n"', None),  # a line break within quotes is white space
        ("strike", '"27\n00"', r"strike '27\\n00' is not a number"),
        ("maturity", "0", "maturity 0 .more than 0, at most 5"),
        ("maturity", "-0.1", "maturity -0.1 .more than 0"),
        ("maturity", "nan", "maturity nan .more than 0"),
        ("maturity", "5.01", "maturity 5.01 .more than 0, at most 5"),
        ("strike", "0", "strike 0 .a positive finite number"),
        ("strike", "-2800", "strike -2800 .a positive"),
        ("strike", "inf", "strike inf .a positive finite"),
        ("strike", "nan", "strike nan .a positive"),
        ("strike", "1e999", "strike 1e999 .a positive finite"),
        ("implied_volatility", "0", "implied_volatility 0 .more than 0"),
        ("implied_volatility", "-0.1", "implied_volatility -0.1 .more than 0"),
        ("implied_volatility", "inf", "implied_volatility inf .more than 0"),
        ("implied_volatility", "nan", "implied_volatility nan .more than 0"),
        ("implied_volatility", "9.43", "implied_volatility 9.43 .more than 0, at most 5"),
    ],
)
def test_bad_values(csv_file, column, value, message):
    rows = sample_quotes(flat(0.1), days=(30,))
    rows[7][HEADER.split(",").index(column)] = value
    path = csv_file(rows)
    if message is None:
        assert len(quotes.load_quotes(path, SPOT)[0]) == len(rows)
    else:
        line = 9 + value.count("\n")
        refuse(path, f"quotes.csv, line {line}: {message}")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda rows: rows.append(rows[3]), "line 22: the same maturity and strike as line 5"),
        (lambda rows: rows.append([f"0{rows[3][0]}", "2575.00", 0.5]), "line 22: the same maturity and strike as li"),
        (lambda rows: rows.append([rows[3][0], 2600]), "line 22: implied_volatility '' is not a number"),
        (lambda rows: rows.extend([[0.2, k, 0.1] for k in (3000, 2700, 2600, 2900)]), "line 24: maturity 0.2 has 4 st"),
        (lambda rows: rows.extend([[0.2, k, 0.1] for k in STRIKES[:5]]), r"line 22: .* strikes from 2500 to 2600 \(on"),
        (lambda rows: rows.extend([[0.2, k, 0.1] for k in STRIKES[-5:]]), "line 22: .* strikes from 2875 to 2975"),
        (list.clear, "quotes.csv: no quotes"),
    ],
)
def test_bad_rows(csv_file, edit, message):
    rows = sample_quotes(flat(0.1), days=(30,))
    assert len(rows) == 20
    edit(rows)
    refuse(csv_file(rows), message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "line 1: no column 'maturity' .found: nothing"),
        ("\n\n", "line 1: no column 'maturity'"),
        ("maturity,strike,volatility\n0.1,1,0.2\n", "line 1: no column 'implied_volatility' .found: maturity, strike"),
        ("maturity;strike;implied_volatility\n", "line 1: no column 'maturity'"),
        ("T,strike,implied_volatility\n", "line 1: no column 'maturity'"),
        ('maturity,"str\nike",implied_volatility\n', "no column 'strike'"),
        ("0.1,1,0.2\n", "line 1: no column 'maturity'"),
        (b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR", "not a CSV file in UTF-8"),
        (b"\x1f\x8b\x08\x00\x00", "not a CSV file in UTF-8"),
        (b"PK\x03\x04\x14\x00\x06\x00\x08\x00\x00\x00!\x00", "quotes.csv"),  # a spreadsheet, UTF-8 as far as it goes
        (to_csv([[0.1, 1.0, 0.2]]).encode("utf-16"), "not a CSV file in UTF-8"),
        (to_csv([[0.1, 1.0, 0.2]]).encode() + b"0.1,1.1,\xff\n", "not a CSV file in UTF-8"),
        (f"{HEADER}\n0.1,{'1' * 200_000},0.2\n", "not a CSV file in UTF-8"),
    ],
)
def test_bad_files(csv_file, content, message):
    refuse(csv_file(content), message)


def test_no_such_file(tmp_path):
    refuse(str(tmp_path / "none.csv"), "none.csv: no such file")
    refuse(str(tmp_path), "no such file")


def test_forgotten_spot(csv_file):
    refuse(csv_file(sample_quotes()), r"strikes from 2500 to 2975 \(on both sides of the spot, 1\)", spot=1.0)


def changed(which, factor):
    """Quotes of 20 days (lines 2 to 21) and 30 days (lines 22 to 41), some volatilities changed."""
    rows = sample_quotes(days=(20, 30))
    for row in [rows[which]] if isinstance(which, int) else rows[which]:
        row[2] *= factor
    return rows


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        # too dear
        (changed(9, 1.04), "line 11: butterfly arbitrage with lines 10 and 12: it costs -.* spots .--allow"),
        (changed(30, 1.04), "line 32: butterfly arbitrage with lines 31 and 33"),
        # too cheap, so that it is a wing of the butterfly
        (changed(30, 0.94), "line 31: butterfly arbitrage with lines 30 and 32: .* .and 1 more"),
        # a call dearer than the one of a lower strike, a put than the one of a higher strike
        (changed(39, 2.0), "line 41: vertical spread arbitrage with line 40"),
        (changed(0, 1.5), "line 3: .* arbitrage with line 2"),
        # a later call that is cheaper
        (changed(slice(20, 40), 0.7), r"line (2[2-9]|3\d): calendar arbitrage with line"),
        (changed(slice(20, 40), 0.81), r"line (2[2-9]|3\d): calendar arbitrage with line"),  # at the wings only
    ],
)
def test_quotes_with_arbitrage(csv_file, rows, message):
    refuse(csv_file(rows), message)


@pytest.mark.parametrize("rows", [changed(9, 1.04), changed(slice(20, 40), 0.81)])
def test_arbitrage_allowed(csv_file, rows):
    """The fit is free of arbitrage all the same, and so cannot go through quotes that are not."""
    path = csv_file(rows)
    refuse(path, "arbitrage")
    surface, fits = quotes.load(path, SPOT, allow_arbitrage=True)
    assert surface.maturities == [20 / 252, 30 / 252]
    k = torch.linspace(math.log(2500 / SPOT), math.log(2975 / SPOT), 201, dtype=F64)
    assert find_arbitrage(surface, surface.maturities, [k, k]) == []
    assert 0.05 < max(fit.worst for fit in fits) < 2


def test_fit_to_a_butterfly(csv_file):
    """The penalty trades the quotes for less of it."""
    surface = Slices([1.0], [VOGT])
    path = csv_file(sample_quotes(surface, [252], SPOT * np.exp(np.linspace(-1.2, 1.2, 25))))
    refuse(path, "line 20: vertical spread arbitrage with line 19 .and . more")
    fitted, (fit,) = quotes.load(path, SPOT, allow_arbitrage=True)
    k = torch.linspace(-1.2, 1.2, 241, dtype=F64)
    before, after = (x.density_factor(k, 1.0).min() for x in (surface, fitted))
    assert before < 0
    assert before + 0.001 < after
    assert 0.01 < fit.rmse < 0.5


def test_lines_of_arbitrage_are_the_files(csv_file):
    rows = changed(9, 1.04)
    order = np.random.default_rng(1).permutation(len(rows))
    lines = {i: 2 + order.tolist().index(i) for i in (8, 9, 10)}
    message = f"line {lines[9]}: butterfly arbitrage with lines {lines[8]} and {lines[10]}"
    refuse(csv_file([rows[i] for i in order]), message)


def test_calendar_arbitrage_skips_a_maturity(csv_file):
    """The maturity in between does not quote the strikes."""
    middle = sample_quotes(days=(25,), strikes=STRIKES[:-1] + 12.5)
    rows = changed(slice(20, 40), 0.7)
    refuse(csv_file(rows[:20] + middle + rows[20:]), r"line (4[1-9]|5\d|60): calendar arbitrage with line")


def test_calendar_arbitrage_of_different_strikes(csv_file):
    """An earlier call is dearer than a later butterfly around it, though no strike is quoted twice."""
    later = [[30 / 252, k, 0.7 * v] for _, k, v in sample_quotes(days=(25,), strikes=STRIKES[:-1] + 12.5)]
    refuse(csv_file(sample_quotes(days=(25,)) + later), "line .*: calendar arbitrage with line")


def test_arbitrage_with_a_strike_of_zero(csv_file):
    """Put(0.8) > 8/9 Put(0.9): the put falls with the strike, but not in proportion to it."""
    rows = [[1.0, SPOT * k, 0.3] for k in (0.8, 0.9, 1.0, 1.1, 1.2)]
    one = torch.ones((), dtype=F64)
    put = 0.95 * bs.price(one, 0.9, 1.0, 0.3, False)
    rows[0][2] = bs.implied_volatility(put, one, 0.8, 1.0, False).item()
    refuse(csv_file(rows), "line [23]: .* arbitrage")


def test_fitted_slice_with_arbitrage(csv_file, monkeypatch):
    """The nearest line is named where quotes are clean but the slice fitted to them is not."""
    maturity, strikes = 1.0, SPOT * np.exp(np.linspace(-1.0, 1.0, 9))
    path = csv_file([[maturity, k, 0.3] for k in strikes])
    monkeypatch.setattr(quotes, "fit_svi", lambda smile, before: (VOGT, quotes.Fit(maturity, len(smile), 0.0, 0.0)))
    density = Slices([1.0], [VOGT]).density_factor(torch.linspace(-1, 1, 101), 1.0)
    line = 2 + round((int(density.argmin()) - 50) / 50 / 0.25 + 4)
    refuse(path, f"line {line}: butterfly arbitrage at 252.0 days, .* in the SVI slice fitted to its maturity")
    assert quotes.load(path, SPOT, allow_arbitrage=True)[0].slices == [VOGT]
