"""The documentation is reproduced: fake runs in a folder of their own, no training."""

import json
import re
import sys
from pathlib import Path

import pytest

from envs.run.errors import DivergenceError, UsageError
from envs.run.files import write_json
from envs.run.run import run_main

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import reproduce  # noqa: E402

CLASSICS = (reproduce.BS, reproduce.WW, reproduce.BAND, reproduce.ZAKAMOULINE, reproduce.MV_BAND, reproduce.MV_WW)
TABLE = "<!-- reproduce: {} -->\n\n{}\n\n<!-- /reproduce -->"
OLD_SUMMARY = (
    "| phase | question | gain | over | possible |\n| --- | --- | --- | --- | --- |\n"
    "| [1a](docs/phase1.md) | hedge | old 1 | old 2 | old 3 |\n| [3](docs/phase3.md) | quote | old 4 | old 5 | old 6 |"
)


def estimate(mean: float) -> dict:
    return {"mean": mean, "se": 0.01, "low": mean - 0.02, "high": mean + 0.02}


def benchmark(seed: int) -> dict:
    return {
        "passed": True,
        "settings": {},
        "rows": {"agent": {"objective": 1.0}},
        "advantages": {name: estimate(0.1 * seed) for name in (*CLASSICS, "optimum of the fitted model")},
        "shares": {"gap from Black–Scholes delta to exact optimum closed": estimate(0.98 + 0.001 * seed)},
        "criteria": [
            {"name": "beats all", "passed": seed > 1, "detail": "+0.1, lower bound > 0", "margin": seed - 1.5}
        ],
    }


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with documents and stubs of the code, into which `ran` says what was run."""
    monkeypatch.chdir(tmp_path)
    for folder in ("docs", "envs", "benchmarks", "runs"):
        (tmp_path / folder).mkdir()
    for script in {experiment.script for experiment in reproduce.EXPERIMENTS}:
        (tmp_path / script).write_text("# a script\n")
    (tmp_path / "requirements.txt").write_text("torch\n")
    (tmp_path / "envs" / "market.py").write_text("VOLATILITY = 0.2\n")
    documents: dict[str, list[str]] = {}
    for table in reproduce.TABLES:
        old = OLD_SUMMARY if table.name == "results" else "old"
        documents.setdefault(table.document, []).append(TABLE.format(table.name, old))
    for document, tables in documents.items():
        text = "\n\nprose between tables\n\n".join(tables)
        (tmp_path / document).write_text(f"# Title\n\n{text}\n\nthe end\n", encoding="utf-8")
    ran = []

    def run_phase(script: str, flags: list[str], label: str) -> Path:
        ran.append((script, flags))
        if "--resume" in flags:
            folder = Path(flags[flags.index("--resume") + 1])
            seed = json.loads((folder / "args.json").read_text())["seed"]
        else:
            seed = 1
            if "--seed" in flags:
                seed = int(flags[flags.index("--seed") + 1])
            elif "--evaluate" in flags:
                trained = Path(flags[flags.index("--evaluate") + 1])
                seed = json.loads((trained / "args.json").read_text())["seed"]
            name = flags[flags.index("--exp-name") + 1]
            folder = Path(f"runs/gbm__{name}__{seed}__20260101-0000{len(ran):02}")
            folder.mkdir()
            write_json(folder / "args.json", {"seed": seed, "exp_name": name})  # at once: other threads look for it
        (folder / "benchmark.json").write_text(json.dumps(benchmark(seed)))
        return folder

    monkeypatch.setattr(reproduce, "run_phase", run_phase)
    monkeypatch.setattr("envs.run.provenance.git", lambda *arguments: "abc1234" if "rev-parse" in arguments else "")
    return ran


def text_of(document: str) -> str:
    return Path(document).read_text(encoding="utf-8")


def test_a_table_is_replaced_and_the_rest_of_the_document_stays(project):
    before = text_of("docs/phase1.md")
    assert reproduce.main(["phase1-gbm"])
    after = text_of("docs/phase1.md")
    start, end = "<!-- reproduce: phase1-gbm -->", "<!-- /reproduce -->"
    _, rest = after.split(start)
    table = rest[: rest.index(end)]
    assert after.replace(table, "\n\nold\n\n", 1) == before
    assert "    .venv/bin/python phase1_delta_hedge_ppo.py --seed S" in table
    assert "|  | S = 1 | S = 2 | S = 3 |" in table
    assert "| gap closed [95 %] | 98.1 % [96.1, 100.1] | 98.2 % [96.2, 100.2] | 98.3 % [96.3, 100.3] |" in table
    assert "| agent − Whalley–Wilmott | +0.1000 [+0.0800, +0.1200] | +0.2000 [+0.1800, +0.2200] |" in table
    assert "commit abc1234" in table
    assert "torch" in table
    assert "cores" in table


def test_a_second_time_nothing_is_run_and_nothing_changes(project):
    reproduce.main(["phase1-gbm"])
    before = [(file, file.read_bytes()) for file in (Path("README.md"), *Path("docs").iterdir())]
    assert len(project) == 3
    assert reproduce.main(["phase1-gbm"])
    assert len(project) == 3
    assert all(file.read_bytes() == content for file, content in before)


def test_the_readme_gets_ranges_over_the_seeds_and_keeps_cells_without_runs(project):
    assert reproduce.main(["phase1-gbm"])
    text = text_of("README.md")
    assert "| +0.100 to +0.300 | +0.100 to +0.300 | 98.1 to 98.3 % of the gap to dynamic programming |" in text
    assert "| [3](docs/phase3.md) | quote every option against a classical maker | old 4 | old 5 | old 6 |" in text
    assert "old 1" not in text
    assert "| [4](docs/phase4.md) | the same, learnt by self-play | pending | pending | pending |" in text
    assert TABLE.format("answer", "old") in text


def test_a_cell_of_the_readme_without_runs_stays(monkeypatch):
    first, last = [("phase1-gbm", "{gain:.1f}")], [("phase1-gbm", "1")]
    row = ("[1a](docs/phase1.md)", "hedge", first, [("phase2", "{gain:.1f}")], last)
    monkeypatch.setattr(reproduce, "SUMMARY", [row])

    def runs(name: str) -> list[dict]:
        if name == "phase2":
            raise reproduce.Missing(name)
        return [{"gain": 0.5}, {"gain": 0.7}]

    assert reproduce.summary(runs, OLD_SUMMARY).endswith("| [1a](docs/phase1.md) | hedge | 0.5 to 0.7 | old 2 | 1 |")


def test_over_all_seeds_there_are_gains_and_margins_with_their_spread(project):
    assert reproduce.main(["seeds-phase1-gbm", "--seeds", "1", "2", "3", "4"])
    text = text_of("docs/evidence.md")
    assert "| over Whalley–Wilmott, tuned | +0.250 [+0.100, +0.400] | +0.100 to +0.400 | 100 % |" in text
    assert "| gap from Black–Scholes delta to exact optimum closed | 98.2 % [98.1, 98.4] | 98.1 to 98.4 |  |" in text
    assert "| beats all | 3 of 4 | +1 | -0.5 | 0.8 |" in text
    assert TABLE.format("seeds-phase3", "old") in text
    before = text_of("docs/evidence.md")
    assert not reproduce.main(["seeds-phase1-gbm", "--seeds", "1", "2"])
    assert text_of("docs/evidence.md") == before


def test_the_readme_needs_three_seeds(project):
    before = text_of("README.md")
    assert reproduce.main(["phase1-gbm", "--seeds", "1", "7"])
    assert text_of("README.md") == before
    assert "|  | S = 1 | S = 7 |" in text_of("docs/phase1.md")


def test_other_code_makes_a_run_out_of_date(project):
    reproduce.main(["phase1-gbm", "--seeds", "1"])
    Path("phase4_selfplay.py").write_text("# another phase\n")
    reproduce.main(["phase1-gbm", "--seeds", "1"])
    assert len(project) == 1
    Path("envs/market.py").write_text("VOLATILITY = 0.3\n")
    assert reproduce.main(["phase1-gbm", "--seeds", "1", "--any-code"])
    assert len(project) == 1
    reproduce.main(["phase1-gbm", "--seeds", "1"])
    assert len(project) == 2


def test_an_unfinished_run_is_continued(project):
    experiment = reproduce.NAMED["phase1-gbm"]
    for seed in (1, 2):
        folder = Path(f"runs/gbm__phase1-gbm.{reproduce.digest(experiment, (1,))}__{seed}__20260101-000000")
        folder.mkdir()
        (folder / "args.json").write_text(json.dumps({"seed": seed}))
    assert reproduce.main(["phase1-gbm", "--seeds", "1"])
    ((script, flags),) = project
    assert script == "phase1_delta_hedge_ppo.py"
    assert flags[0] == "--resume"
    assert "__1__" in flags[1]
    assert json.loads((Path(flags[1]) / "reproduced.json").read_text())["minutes"] is None


def test_an_evaluation_is_of_the_run_with_its_own_seed(project):
    assert reproduce.main(["phase1-historical", "--seeds", "1", "2"])
    trained, evaluated = project[:2], project[2:]
    assert all("--history-end" in flags for _, flags in trained)
    assert {Path(flags[1]).name.split("__")[2] for _, flags in evaluated} == {"1", "2"}
    assert all(flags[0] == "--evaluate" and "phase1-until-2010" in flags[1] for _, flags in evaluated)
    assert all("--seed" not in flags for _, flags in evaluated)
    assert "--evaluate runs/NAME --dynamics historical" in text_of("docs/phase1.md")


def test_what_is_shown_for_one_seed_is_run_with_the_first(project):
    assert reproduce.main(["phase1-markets", "--seeds", "5", "6"])
    assert {flags[flags.index("--seed") + 1] for _, flags in project} == {"5"}
    assert "| heston | passed |" in text_of("docs/phase1.md")


def test_ctrl_c_stops_and_the_same_command_goes_on(project, monkeypatch, capsys):
    run_phase = reproduce.run_phase

    def interrupted(script, flags, label):
        if "2" in flags:
            raise KeyboardInterrupt
        return run_phase(script, flags, label)

    monkeypatch.setattr(reproduce, "run_phase", interrupted)
    before = text_of("docs/phase1.md")
    with pytest.raises(SystemExit, match="130"):
        reproduce.main(["phase1-gbm", "--jobs", "1"])
    assert "the same command goes on" in capsys.readouterr().err
    assert text_of("docs/phase1.md") == before
    monkeypatch.setattr(reproduce, "run_phase", run_phase)
    assert reproduce.main(["phase1-gbm", "--jobs", "1"])
    assert sorted(flags[flags.index("--seed") + 1] for _, flags in project) == ["1", "2", "3"]


def test_an_error_leaves_its_table_and_does_not_stop_the_others(project, monkeypatch, capsys):
    run_phase = reproduce.run_phase

    def diverging(script, flags, label):
        if "garch" in flags:
            raise DivergenceError(f"{label}: loss is nan")
        return run_phase(script, flags, label)

    monkeypatch.setattr(reproduce, "run_phase", diverging)
    assert not reproduce.main(["phase1-gbm", "phase1-garch"])
    text = text_of("docs/phase1.md")
    assert TABLE.format("phase1-garch", "old") in text
    assert TABLE.format("phase1-gbm", "old") not in text
    printed = capsys.readouterr()
    assert "error: phase1-garch, seed 1: loss is nan" in printed.err
    assert "phase1-garch: left as it is" in printed.out


def test_a_script_that_ends_without_a_benchmark_is_an_error(project, monkeypatch, capsys):
    monkeypatch.setattr(reproduce, "run_phase", lambda script, flags, label: Path())  # a crash while importing
    assert not reproduce.main(["phase1-gbm", "--seeds", "1"])
    assert "error: phase1-gbm, seed 1: ended without a benchmark" in capsys.readouterr().err
    assert not Path("reproduced.json").exists()


@pytest.fixture
def starts(project, monkeypatch):
    """benchmarks/selfplay_starts.py writes a folder of its own each time."""

    def run_script(script, flags, label):
        project.append((script, flags))
        folder = Path("runs/selfplay_starts" + ("" if len(project) == 1 else f"-{len(project)}"))
        folder.mkdir()
        rows = [{"off_nash": 0.012}, {"off_nash": 0.025}]
        (folder / "selfplay_starts.json").write_text(json.dumps(rows))
        (folder / "selfplay_starts.md").write_text("| start |\n| --- |\n| 0.5 |\n")
        (folder / "selfplay_starts.png").write_bytes(b"a figure")
        return Path("start 0.5, seed 1")

    monkeypatch.setattr(reproduce, "run_phase", run_script)
    return project


def test_a_script_of_benchmarks_writes_its_own_table_and_figure(starts):
    assert reproduce.main(["phase4-neutral"])
    assert starts == [("benchmarks/selfplay_starts.py", ["--neutral", "--seeds", "1", "2", "3"])]
    assert "| 0.5 |" in text_of("docs/phase4.md")
    assert Path("docs/phase4_edges_neutral.png").read_bytes() == b"a figure"
    assert reproduce.main(["phase4-neutral"])
    assert len(starts) == 1
    assert reproduce.read_run(Path("runs/selfplay_starts"))["off_nash"] == [0.012, 0.025]
    assert reproduce.main(["phase4-three"])
    assert "--flags=--num-makers 3 --tuning-episodes 512" in starts[1][1]


def test_list_prints_commands_and_runs_nothing(project, capsys):
    reproduce.main(["phase1-gbm", "--seeds", "1"])
    before = {file: file.read_bytes() for file in Path("docs").iterdir()}
    capsys.readouterr()
    assert reproduce.main(["--list"])
    printed = capsys.readouterr().out
    for experiment in reproduce.EXPERIMENTS:
        assert f"{experiment.name} " in printed
    line = next(line for line in printed.splitlines() if line.startswith("phase1-gbm"))
    assert "1/3 done" in line
    assert line.endswith(".venv/bin/python phase1_delta_hedge_ppo.py --seed S")
    assert len(project) == 1
    assert before == {file: file.read_bytes() for file in Path("docs").iterdir()}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["phase9"], "'phase9' is no phase and no table"),
        (["README"], "'README' is no phase and no table"),
        (["--seeds", "1", "1"], "--seeds needs one or more different ones"),
        (["--seeds", "-1"], "--seeds are"),
        (["--jobs", "0"], "--jobs is 0"),
        (["--speed"], "--speed"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(project, capsys, argv, message):
    with pytest.raises(SystemExit) as stopped:
        run_main(reproduce.main, argv)
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert project == []


def test_a_document_without_its_markers_is_an_error(project):
    Path("docs/phase1.md").write_text("# no tables\n")
    with pytest.raises(UsageError, match=re.escape("docs/phase1.md: has 0 tables between")):
        reproduce.main(["phase1-gbm", "--seeds", "1"])


def test_a_run_without_a_figure_of_the_documentation_is_an_error(project, monkeypatch):
    result = benchmark(1)
    del result["advantages"][reproduce.WW]
    monkeypatch.setitem(globals(), "benchmark", lambda seed: result)
    with pytest.raises(UsageError, match=r"has no advantages\[Whalley–Wilmott, tuned\]"):
        reproduce.main(["phase1-gbm", "--seeds", "1"])


def test_templates_print_intervals_and_ranges():
    runs = [{"x": 0.384, "name": "none", "gain": reproduce.Interval(0.4, 0.38, 0.42)}, {"x": 0.4, "name": "none"}]
    assert reproduce.fill("{x:.1%} %, {name}", runs) == "38.4 to 40.0 %, none"
    assert reproduce.fill("{x:.2f}", runs[:1]) == "0.38"
    assert reproduce.fill("{gain:+.1%}; {gain:.2f}", runs[:1]) == "+40.0 % [38.0, 42.0]; +0.40 [+0.38, +0.42]"
    assert reproduce.fill("{edges:.1f}", [{"edges": [2.0, 1.0]}]) == "1.0 to 2.0"
    gains = [{"gain": reproduce.Interval(0.4, 0.38, 0.42)}, {"gain": reproduce.Interval(0.3, 0.27, 0.33)}]
    assert (
        reproduce.fill("{gain:.1%}; {gain:.2f}", gains) == "30.0 to 40.0 % [27.0, 42.0]; +0.30 to +0.40 [+0.27, +0.42]"
    )


def test_of_many_seeds_there_is_one_column_and_a_script_has_no_more_seeds_than_it_is_for(project):
    seeds = tuple(range(1, 8))
    write = reproduce.by_seed(("phase3", [("gain", "{gain:.1f}")]))
    runs = [{"made": {"seed": seed}, "gain": float(seed)} for seed in seeds]
    assert write(lambda name: runs, "").splitlines()[0] == "|  | S = 1 to 7 |"
    assert write(lambda name: runs, "").splitlines()[-1] == "| gain | 1.0 to 7.0 |"
    assert write(lambda name: runs[:5], "").splitlines()[0] == "|  | S = 1 | S = 2 | S = 3 | S = 4 | S = 5 |"
    starts = reproduce.NAMED["phase4-starts"]
    assert reproduce.with_seeds(starts, seeds) == "--seeds 1 2 3"
    assert reproduce.digest(starts, seeds) == reproduce.digest(starts, seeds[:3])


def test_the_strongest_classic_is_the_one_with_the_highest_objective(tmp_path):
    result = benchmark(1)
    makers = (reproduce.AS, reproduce.MULTI_ASSET, reproduce.VEGA_DP)
    for name, objective in zip((*makers, reproduce.BEST_RESPONSE), (0.2, 0.9, 0.8, 2.0), strict=True):
        result["rows"][name] = {"objective": objective}
        result["advantages"][name] = estimate(1.0 - objective)
    write_json(tmp_path / "benchmark.json", result)
    write_json(tmp_path / "reproduced.json", {"seed": 1})
    run = reproduce.read_run(tmp_path)
    found = reproduce.fill("{strongest[label]}: {strongest[objective]:.1f}, {strongest[advantage]:.1f}", [run])
    assert found == "multi-asset closed form: 0.9, +0.1 [+0.1, +0.1]"
    assert run["below_best"] == pytest.approx(0.5)


def test_cross_play_says_how_the_agent_compares_with_its_snapshots(tmp_path):
    played = {
        "names": ["step 0", "step 10", "agent", "GLFT, tuned"],
        "objective": [[1, 1, 1, 1], [2, 2.5, 2, 2], [2.1, 2.4, 2.3, 2.2], [0, 0, 0, 0]],
        "intransitivity": 0.002,
        "cycles": [],
    }
    (tmp_path / "cross_play.json").write_text(json.dumps(played))
    found = reproduce.read_cross_play(tmp_path / "cross_play.json")
    assert found["least_margin"] == pytest.approx(-0.1)
    assert found["snapshots_ahead"] == "1"
    assert found["cycles"] == "none"
    detail = "0 of 36 margins below 0 (Holm's test, 5 %); the least +0.0085 [-0.0351, +0.0520], step 2,250 against GLFT"
    assert reproduce.least_margin(detail) == "[-0.0351, +0.0520], step 2,250, GLFT"


# The documents themselves


class Anything(dict):
    """Every run's result, for the labels of a table alone."""

    def __missing__(self, key):
        return Anything()

    def __getattr__(self, name):
        return Anything()

    def __format__(self, spec):
        return "x"


def first_cells(text: str) -> list[str]:
    return [row.split(" | ")[0].lstrip("| ") for row in text.splitlines() if row.startswith("|")]


@pytest.mark.parametrize("table", reproduce.TABLES, ids=lambda table: table.name)
def test_every_table_stands_in_its_document(table):
    text = (ROOT / table.document).read_text(encoding="utf-8")
    (block,) = re.findall(f"<!-- reproduce: {table.name} -->\n(.*?)\n<!-- /reproduce -->", text, re.DOTALL)
    for name in table.experiments if not table.plain else ():
        assert f"    {reproduce.command(reproduce.NAMED[name], (1, 2, 3))}\n" in block
    if any(reproduce.NAMED[name].is_benchmark for name in table.experiments) or table.name == "answer":
        return  # written by the script itself, or prose
    if table.phase == "evidence":
        return  # its rows are the contestants and criteria of the runs
    if table.name == "phase3-levels":
        assert first_cells(block)[2:] == list(reproduce.LEVELS.values())
        return
    if table.name in ("phase1-mixture", "phase2-mixture"):
        assert first_cells(block)[2:] == list(reproduce.MIXED)
        return
    written = table.write(lambda name: [Anything(made={"seed": 1})], "")
    assert first_cells(block) == first_cells(written)


def test_no_document_has_a_marker_of_no_table():
    documents = (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))
    text = "".join(document.read_text(encoding="utf-8") for document in documents)
    assert set(re.findall(r"<!-- reproduce: (\S+) -->", text)) == {table.name for table in reproduce.TABLES}
    assert text.count("<!-- /reproduce -->") == len(reproduce.TABLES)


def anchors(document: Path) -> set[str]:
    """The headings of a document, as GitHub links to them."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", ["README.md", *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))])
def test_links_resolve(name):
    document = ROOT / name
    for link in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_readme_is_one_screen():
    assert len((ROOT / "README.md").read_text(encoding="utf-8")) <= 12_000


def test_experiments_need_only_experiments_before_them():
    names = [experiment.name for experiment in reproduce.EXPERIMENTS]
    assert len(set(names)) == len(names)
    for i, experiment in enumerate(reproduce.EXPERIMENTS):
        assert set(experiment.needs) <= set(names[:i])
        assert (ROOT / experiment.script).is_file()
    used = {name for table in reproduce.TABLES for name in table.experiments}
    needed = {name for experiment in reproduce.EXPERIMENTS for name in experiment.needs}
    assert used | needed == set(names)


def test_an_agent_of_many_markets_is_measured_beside_the_specialists():
    def run(gain: float, over_band: float) -> dict:
        advantages = {reproduce.BS: gain, reproduce.WW: over_band + 0.1, reproduce.BAND: over_band, "no band": -9.0}
        return {"advantages": {k: reproduce.Interval(x, x - 0.02, x + 0.02) for k, x in advantages.items()}}

    contents = {"many-in-gbm": [run(0.9, 0.3), run(0.95, 0.2)], "gbm": [run(1.0, 0.5), run(2.0, 0.5)]}
    text = reproduce.carried_over("many", {"gbm": "gbm"})(contents.__getitem__, "")
    row = text.splitlines()[-1]
    assert row.startswith("| gbm | +0.900 to +0.950 [+0.880, +0.970] | +1.000 [+0.980, +1.020] | 90 to 95 % |")
    assert row.endswith("| +0.200 to +0.300 [+0.180, +0.320] |")
