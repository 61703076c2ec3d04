"""One page of several runs."""

import re
import sys
from pathlib import Path

import pytest

from envs.benchmark.report import Benchmark, Criterion, Estimate
from envs.run.errors import UsageError
from envs.run.files import MetricsFile, write_json

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import report  # noqa: E402


def make_run(folder: Path, seed: int, finished: bool = True) -> Path:
    """A run folder as a phase leaves it."""
    folder.mkdir(parents=True)
    write_json(folder / "args.json", {"seed": seed, "gamma": 1.0})
    metrics = MetricsFile(folder / "metrics.csv")
    for step in range(3):
        metrics.write({"global_step": step, "charts/gain": float(seed * step)})
    if finished:
        row = {"objective": float(seed), "objective_se": 0.1}
        gain = {"rival": Estimate(0.5 * seed, 0.0, 0.4 * seed, 0.6 * seed)}
        columns = {"objective": "objective"}
        criteria = [Criterion("beats rival", seed == 1, "")]
        Benchmark("title", {}, {"agent": row}, gain, criteria=criteria, columns=columns).write(folder)
    return folder


@pytest.fixture
def runs(tmp_path, monkeypatch) -> list[Path]:
    monkeypatch.chdir(tmp_path)
    return [make_run(tmp_path / "runs" / f"seed_{seed}", seed, finished=seed < 3) for seed in (1, 2, 3)]


def test_several_runs_on_one_page(runs, tmp_path):
    assert report.main([*map(str, runs)])
    text = (tmp_path / "runs" / "report" / "report.html").read_text()
    rows = re.findall(r"<tr><td>(seed_\d)</td><td>([^<]*)</td><td>([^<]*)</td><td>([^<]*)</td></tr>", text)
    assert rows == [
        ("seed_1", "passed", "1.0000", "+0.5000 [+0.4000, +0.6000]"),
        ("seed_2", "FAILED", "2.0000", "+1.0000 [+0.8000, +1.2000]"),
        ("seed_3", "no benchmark yet", "", ""),
    ]
    assert "<tr><td>seed</td><td>1</td><td>2</td><td>3</td></tr>" in text  # flags that differ
    together = text.split("<h2>The runs</h2>")[0]
    assert together.count("<polyline") == 3
    assert "gamma" not in together
    assert report.main([*map(str, runs)])
    assert (tmp_path / "runs" / "report-2" / "report.html").read_text() == text


def test_runs_of_the_same_name_are_told_apart(runs, tmp_path):
    other = make_run(tmp_path / "elsewhere" / "seed_1", 1)
    report.main([str(runs[0]), str(other)])
    text = (tmp_path / "runs" / "report" / "report.html").read_text()
    assert f"<td>{other}</td>" in text


def test_bad_input(runs, tmp_path):
    def refusal(*folders) -> str:
        with pytest.raises(UsageError) as error:
            report.main([*map(str, folders)])
        return str(error.value)

    assert refusal() == "run folders are 0 (at least 1, at most 64)"
    assert refusal("absent") == "absent: not a run folder, it has no args.json"
    assert refusal(runs[0], runs[0]) == "a run folder is named twice"
    (runs[1] / "metrics.csv").write_text("global_step\nmany\n")
    assert refusal(*runs) == f"{runs[1] / 'metrics.csv'}: damaged"
    (runs[0] / "args.json").rename(tmp_path / "other.json")
    (runs[0] / "args.json").symlink_to(tmp_path / "other.json")
    assert refusal(*runs) == f"{runs[0] / 'args.json'}: a link (a file of the run's own)"
    (runs[0] / "args.json").unlink()
    (runs[0] / "args.json").write_text("[]")
    assert refusal(*runs) == f"{runs[0] / 'args.json'}: damaged"
    (runs[0] / "benchmark.json").write_text("{")
    (runs[0] / "args.json").write_text("{}")
    assert "benchmark.json: damaged" in refusal(*runs)
    assert not (tmp_path / "runs" / "report").exists()
