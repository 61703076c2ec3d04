"""report.html: self-contained, escaped, and drawn from what the files say."""

import base64
import math
import re
from html.parser import HTMLParser

import pytest

from envs.benchmark.report import Benchmark, Criterion, Estimate, Table
from envs.run import page
from envs.run.errors import UsageError
from envs.run.files import read_json, write_json
from envs.run.provenance import provenance, read_origin

NASTY = '<img src="http://evil.example/x.png" onerror="alert(1)"><script>alert(2)</script>'
PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
EMPTY = {"meta", "link", "img", "path", "br"}  # elements that nobody closes


class Elements(HTMLParser):
    """All elements of a page, and whether they are nested soundly."""

    def __init__(self, text: str):
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def benchmark(name: str = "agent") -> Benchmark:
    rows = {name: 1.25, "rival": 1.0}
    rows = {key: {"objective": x, "objective_se": 0.01, "pnl_mean": 2.0} for key, x in rows.items()}
    return Benchmark(
        f"a title, {name}",
        {"seed": 1, name: {"k": 2.0}},
        rows,
        {"rival": Estimate(0.25, 0.01, 0.23, 0.27)},
        shares={"share closed": Estimate(0.5, 0.0, 0.5, 0.5)},
        criteria=[Criterion("beats rival", True, "+0.25")],
        columns={"objective": "objective", "pnl_mean": "P&L mean"},
        remarks=[f"a remark of {name}"],
        tables={f"table of {name}": Table(["x", name], [[name, 0.125]])},
    )


def elements_of(folder, name: str) -> list[tuple[str, dict]]:
    """Elements of the page of a run in which everything is called `name`."""
    (folder / "pnl.png").write_bytes(PIXEL)
    (folder / "metrics.csv").write_text(f'global_step,"charts/{name.replace(chr(34), "")}"\n0,1.0\n10,2.0\n')
    parts = page.run_parts(folder, {"exp_name": name, name: 3}, [{"commit": name, name: name}])
    return Elements(page.page(name, benchmark(name).html(), *parts)).found


def test_a_page_asks_nobody_for_anything(tmp_path):
    found = elements_of(tmp_path, "agent")
    tags = {tag for tag, _ in found}
    assert not tags & {"script", "iframe", "object", "embed", "audio", "video", "form", "base", "a"}
    sources = [value for _, attributes in found for key, value in attributes.items() if key in ("src", "href")]
    assert len(sources) == 2  # a figure, and the icon that browsers would look for
    assert all(source.startswith("data:") for source in sources)
    assert not re.search(r"url\(|@import|https?:", page.STYLE)
    (policy,) = [a["content"] for tag, a in found if tag == "meta" and "http-equiv" in a]
    assert policy.startswith("default-src 'none'")
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in found


def test_whatever_a_run_is_called_is_text(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    usual, nasty = elements_of(tmp_path / "a", "agent"), elements_of(tmp_path / "b", NASTY)
    assert [tag for tag, _ in nasty] == [tag for tag, _ in usual]
    assert [sorted(attributes) for _, attributes in nasty] == [sorted(attributes) for _, attributes in usual]


def test_what_is_on_it(tmp_path):
    (tmp_path / "pnl.png").write_bytes(PIXEL)
    result = benchmark()
    text = page.page("a run", result.html(), *page.run_parts(tmp_path, {"seed": 7}, [{"commit": "abc1234"}]))
    encoded = base64.b64encode(PIXEL).decode()
    for words in (
        "BENCHMARK PASSED", "share closed: 50.00 %", "beats rival: +0.25", "a remark", "+0.2500 [+0.2300, +0.2700]",
        "1.2500 ± 0.0100", "0.125", "k 2", "<td>seed</td><td>7</td>", "abc1234", encoded,
    ):  # fmt: skip
        assert words in text
    assert "Learning curves" not in text  # there are none
    result.require("is perfect", False, "no")
    assert '<p class="verdict failed">BENCHMARK FAILED: is perfect</p>' in result.html()
    result.withdraw("QUICK RUN")
    assert '<p class="verdict open">QUICK RUN</p>' in result.html()


def test_figures_that_are_not_the_runs_own_are_left_out(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (tmp_path / "secret.png").write_bytes(PIXEL)
    (run / "link.png").symlink_to(tmp_path / "secret.png")
    (run / "text.png").write_text("no figure")
    (run / "folder.png").mkdir()
    (run / "large.png").write_bytes(PIXEL + bytes(page.LARGEST))
    assert page.figures(run) == ""
    (run / "own.png").write_bytes(PIXEL)
    assert page.figures(run).count("<img") == 1


def points_of(chart: str) -> list[list[tuple[float, float]]]:
    """The points of every line of a chart."""
    lines = re.findall(r'points="([^"]*)"', chart)
    return [[tuple(map(float, pair.split(","))) for pair in line.split()] for line in lines]


def test_curves_of_several_runs_share_their_axes():
    runs = {
        "a": [{"global_step": 100.0 * i, "charts/x": float(i)} for i in range(11)],
        "b": [{"global_step": 50.0 * i, "charts/x": 10.0 - i, "losses/y": 1.0} for i in range(11)],
    }
    found = Elements(page.curves(runs)).found
    assert [attributes["aria-label"] for _, attributes in found if "aria-label" in attributes] == [
        "charts/x", "losses/y",
    ]  # fmt: skip
    first, second = points_of(page._chart("charts/x", runs))
    assert first[0] == (page.LEFT, page.BOTTOM)
    assert first[-1] == (page.RIGHT, page.TOP)
    assert second[0] == (page.LEFT, page.TOP)
    assert second[-1] == ((page.LEFT + page.RIGHT) / 2, page.BOTTOM)


def test_early_values_do_not_squash_a_curve_and_nan_is_left_out():
    values = [-1e6, 1.0, 2.0, math.nan, 3.0, math.inf, 4.0, 4.0, 4.0, 4.0, 5.0]
    rows = [{"global_step": 100.0 * i, "charts/x": y} for i, y in enumerate(values)]
    ((first, *points),) = points_of(page._chart("charts/x", {"a": rows}))
    assert len(points) == 8
    assert first[1] > page.BOTTOM  # below the axes, where it is cut off
    assert points[1][1] - points[-1][1] > 100  # from 2 to 5
    assert page._chart("charts/x", {"a": [{"global_step": 0.0, "charts/x": math.nan}]}) == ""
    ((one,),) = points_of(page._chart("charts/x", {"a": [{"global_step": 0.0, "charts/x": 0.0}]}))
    assert one[0] == page.LEFT


def test_long_curves_are_thinned_and_keep_their_end():
    rows = [{"global_step": float(i), "charts/x": float(i)} for i in range(10_001)]
    (points,) = points_of(page._chart("charts/x", {"a": rows}))
    assert len(points) <= page.POINTS + 1
    assert points[-1] == (page.RIGHT, page.TOP)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-3.2, 7.9), (0.0, 1e-9), (1e6, 1.5e6), (2.0, 2.0)])
def test_ticks(low, high):
    ticks = page._ticks(low, high)
    assert all(low - 1e-9 * abs(low) <= tick <= high * (1 + 1e-9) for tick in ticks)
    assert len(ticks) == 1 if low == high else 2 <= len(ticks) <= 6


# WHERE A RUN WAS MADE


def test_provenance_has_no_name_of_a_person_or_a_machine():
    found = provenance()
    assert found.keys() == {"date", "commit", "versions", "machine"}
    assert re.fullmatch(r"[0-9a-f]{7,}( with changes)?|unknown", found["commit"])
    assert "torch" in found["versions"]
    assert "cores" in found["machine"]


def test_origin_of_a_run(tmp_path):
    assert read_origin(tmp_path) == []
    write_json(tmp_path / "origin.json", [{"commit": "abc"}])
    assert read_origin(tmp_path) == [{"commit": "abc"}]
    for content in ({}, [1], [{"x": 1}] * 2000):
        write_json(tmp_path / "origin.json", content)
        with pytest.raises(UsageError, match=r"origin\.json: damaged"):
            read_origin(tmp_path)
    (tmp_path / "secret.json").write_text("[]")
    (tmp_path / "origin.json").unlink()
    (tmp_path / "origin.json").symlink_to(tmp_path / "secret.json")
    assert read_origin(tmp_path) == []


# A BENCHMARK READ FROM ITS FILES


def test_a_benchmark_is_read_as_it_was_written(tmp_path):
    result = benchmark()
    result.others["benchmark_half"] = benchmark("agent")
    result.write(tmp_path)
    assert Benchmark.read(tmp_path) == result
    assert Benchmark.read(tmp_path).html() == result.html()
    result.withdraw("QUICK RUN: too short")
    result.write(tmp_path)
    assert Benchmark.read(tmp_path).withdrawn == "QUICK RUN: too short"


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": {"agent": {}}}, {"rows": 3}, {"advantages": {"rival": {"mean": 1.0}}}, {"tables": {"x": [["a"]]}},
        {"shares": {"x": {"mean": "a", "se": 0, "low": 0, "high": 0}}}, {"unknown": 1}, {"columns": {"fees": "fees"}},
        {"settings": {"x": {"y": []}}}, {"criteria": [1]}, {"remarks": 5}, {"title": None, "columns": None},
    ],
)  # fmt: skip
def test_a_damaged_benchmark_is_said_in_a_line(tmp_path, changes):
    benchmark().write(tmp_path)
    content = {**read_json(tmp_path / "benchmark.json"), **changes}
    write_json(tmp_path / "benchmark.json", content)
    with pytest.raises(UsageError, match=r"benchmark\.json: damaged, or of another version"):
        Benchmark.read(tmp_path)
