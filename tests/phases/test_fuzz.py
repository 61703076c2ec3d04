"""Bad inputs at random, with a fixed seed: flags, CSVs, checkpoints, args.json. Each is refused in one line, or taken.

Nothing is trained: what gets as far as the first iteration, or the benchmark, has been accepted. Most inputs have to be
refused, so that it is bad input that is tried; none may end in a traceback, change a file, or take much memory.
"""

import contextlib
import copy
import io
import json
import math
import random
import resource
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from common import PHASES, Phase, untuned

from envs.run.run import Run, run_main

pytestmark = pytest.mark.slow
MEMORY = 3 * 2**30  # bytes beyond those in use that a refusal may take
TEXTS = [
    "",
    " ",
    "x",
    "../x",
    "a/b",
    "a\nb",
    "\x1b[31mred",
    "é" * 99,
    "x" * 300,
    "a/" * 3000,
    "-",
    "--",
    "nan",
    "σ",
    ".",
]
NUMBERS = ["0", "-1", "1.5", "-0.0", "1e-320", "1e400", "inf", "-inf", "1_0", "0x10", "67108864", str(2**63), "1e20"]
LONG = ["9" * 400, "-" + "9" * 400, "9" * 5000]
BASE = {"phase3": ["--dynamics", "gbm"], "phase4": ["--dynamics", "gbm"]}  # whose fair values are soon known


class Accepted(BaseException):
    """The command would now begin its work."""


@pytest.fixture(autouse=True)
def nothing_is_trained(monkeypatch, tmp_path):
    begin = Run.begin

    def begin_if_resumed(run, *words):
        if run.args.resume is None or run.checkpoint is None:
            raise Accepted
        begin(run, *words)

    def accepted(*_):
        raise Accepted

    monkeypatch.setattr(Run, "begin", begin_if_resumed)
    monkeypatch.setattr(Run, "iterations", accepted)
    for name in ("phase3", "phase4"):
        monkeypatch.setattr(PHASES[name].module, "classical_makers", untuned)
    monkeypatch.chdir(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


def refusal(phase: Phase, words: list[str]) -> str | None:
    """The line with which a command refuses, or None if it would begin its work."""
    errors = io.StringIO()
    code = None
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            run_main(phase.module.main, words)
        except SystemExit as end:
            code = end.code
        except Accepted:
            return None
    text = errors.getvalue()
    shown = [word[:80] for word in words]
    assert code == 2, f"{shown} ended with {code}: {text}"
    assert text.startswith("error: "), f"{shown} said {text}"
    assert text.count("\n") == 1, f"{shown} said {text}"
    assert text[:-1].isprintable(), f"{shown} said {text!r}"
    assert len(text) < 800, f"{shown} said {len(text)} characters"
    return text


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {
        str(path): path.read_bytes() if path.is_file() else b""
        for path in folder.rglob("*")
        if not path.is_symlink() and "__pycache__" not in str(path)
    }


def tried(phase: Phase, place: Path, inputs, refused: int) -> None:
    """Every command of `inputs` is refused, and changes nothing then, or accepted; at least `refused` are refused.

    Args:
        inputs: of the words of a command; what it yields has just been written into `place`.
    """
    lines = []
    for words in inputs:
        before = contents(place)
        line = refusal(phase, words)
        if line is not None:
            lines.append(line)
            assert contents(place) == before, f"{words} was refused, but has changed files"
    assert len(lines) >= refused, f"only {len(lines)} were refused"


# FLAGS


def bad_words(phase: Phase, rng: random.Random) -> list[str]:
    """One to three flags of the phase with values that are often none of theirs."""
    words = list(BASE.get(phase.name, []))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        name = rng.choice([field.name for field in fields(phase.module.Args)])
        flag = f"--{name.replace('_', '-')}"
        if name in ("track", "compile", "cudagraphs"):
            continue
        kind = rng.random()
        if kind < 0.05:
            words += [flag + rng.choice(("s", "-x", "="))]
        elif kind < 0.15:
            words += [flag]
        elif kind < 0.25:
            words += [flag, *(rng.choice(NUMBERS + TEXTS) for _ in range(rng.randrange(5)))]
        else:
            words += [flag, rng.choice(NUMBERS * 4 + TEXTS + LONG)]
    return words


@pytest.mark.parametrize("name", PHASES)
def test_flags(name, tmp_path):
    rng = random.Random(1)
    tried(PHASES[name], tmp_path, (bad_words(PHASES[name], rng) for _ in range(150)), 100)


# CSVS


def table(header: str, rows: list[list]) -> str:
    return "\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n"


def closes() -> str:
    rng = random.Random(0)
    rows = []
    price = 100.0
    for day in range(700):
        price *= math.exp(rng.gauss(0.0, 0.01 * (1 + (day // 50) % 3)))
        rows.append([f"{2000 + day // 336}-{1 + day % 336 // 28:02}-{1 + day % 28:02}", f"{price:.4f}"])
    return table("date,close", rows)


def quotes() -> str:
    strikes = [0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.2]
    rows = [[t, k, round(0.2 - 0.1 * math.log(k) / math.sqrt(t) * 0.3, 4)] for t in (0.05, 0.25) for k in strikes]
    return table("maturity,strike,implied_volatility", rows)


def spoilt(text: str, rng: random.Random) -> bytes:
    """A CSV with one thing wrong in it, or several."""
    lines = [line.split(",") for line in text.splitlines()]
    for _ in range(rng.choice((1, 1, 3, 30))):
        line = rng.randrange(len(lines))
        column = rng.randrange(len(lines[line]) or 1)
        kind = rng.randrange(9)
        if kind < 4 and lines[line]:
            lines[line][column] = rng.choice([*TEXTS, *NUMBERS, *LONG, '"', "\0", "2000-13-41", "5", "1e-9", "1e9"])
        elif kind == 4:
            lines[line] = lines[line][:column]
        elif kind == 5:
            lines[line] = lines[line] * 2
        elif kind == 6:
            lines.insert(line, list(lines[rng.randrange(len(lines))]))
        elif kind == 7:
            del lines[line:]
            lines = lines or [[""]]
        else:
            other = rng.randrange(len(lines))
            lines[line], lines[other] = lines[other], lines[line]
    content = "\n".join(",".join(line) for line in lines).encode("utf-8", "replace")
    kind = rng.randrange(10)
    if kind == 0:
        at = rng.randrange(len(content) + 1)
        content = content[:at] + rng.randbytes(20) + content[at:]
    elif kind == 1:
        content = content.decode().encode("utf-16")
    elif kind == 2:
        content += b"," + b"x" * 200_000
    return content


@pytest.mark.parametrize(
    ("name", "sound", "flags"),
    [
        ("phase1", closes, ["--dynamics", "garch", "--history"]),
        ("phase0", quotes, ["--reference", "none", "--num-players", "100", "--smile"]),
    ],
)
def test_csvs(name, sound, flags, tmp_path):
    rng = random.Random(2)
    path = tmp_path / "data.csv"

    def inputs():
        path.write_text(sound())
        assert refusal(PHASES[name], [*flags, str(path)]) is None
        for _ in range(80):
            path.write_bytes(spoilt(sound(), rng))
            yield [*flags, str(path)]

    tried(PHASES[name], tmp_path, inputs(), 60)


# RUNS


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """A finished run of every phase, by its name."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "finish", lambda *_: True)
        for name, phase in PHASES.items():
            place = tmp_path_factory.mktemp(name)
            patch.chdir(place)
            module = phase.module
            results = ("result", "contest", "league", "competition")[: 4 if name == "phase4" else 2]
            patch.setattr(module, "benchmark", lambda *_, results=results: results)
            if hasattr(module, "classical_makers"):
                patch.setattr(module, "classical_makers", untuned)
            extra = {"dynamics": "gbm"} if name in BASE else {}
            if name == "phase4":
                extra |= {"exploitability": False, "opponent": "pool", "pool_size": 4}
            module.main(phase.flags(4, **extra))
            (found[name],) = place.glob("runs/*")
    return found


def junk(rng: random.Random):
    """A value that is rarely what a checkpoint or args.json should have."""
    numbers = [None, True, -1, 0, 1, 2**62, 2**63, 10**400, -0.5, 0.5, math.nan, math.inf]
    texts = ["", "x", "x" * 10**6, "a\nb\x1b", "\0", "\ud800"]
    return rng.choice([*numbers, *texts, [], [[]], [1, "a"], ["a"] * 1000, {}, {"a": {}}, {1: 2}, (1.0, 2.0)])


def bad_tensor(tensor: torch.Tensor, rng: random.Random) -> torch.Tensor:
    return rng.choice(
        [
            lambda: tensor.flatten()[:-1].clone(),
            lambda: tensor[None].clone(),
            lambda: tensor.to(torch.complex64),
            lambda: tensor.double() if tensor.dtype != torch.float64 else tensor.half(),
            lambda: torch.full_like(tensor, math.nan) if tensor.is_floating_point() else tensor.float(),
            lambda: torch.zeros(1).expand(10**9),
            lambda: tensor.to_sparse() if tensor.dim() else tensor.bool(),
            lambda: torch.empty(10**9, device="meta"),
        ]
    )()


def changed(content, rng: random.Random):
    """A copy of nested dicts and lists in which one thing is another, missing, or new."""
    inside = content
    if isinstance(content, torch.Tensor):
        return bad_tensor(content, rng) if rng.random() < 0.7 else junk(rng)
    if not isinstance(content, dict | list | tuple) or not content or rng.random() < 0.05:
        return junk(rng)
    inside = dict(content) if isinstance(content, dict) else list(content)
    key = rng.choice(list(inside) if isinstance(inside, dict) else range(len(inside)))
    kind = rng.random()
    if kind < 0.1:
        del inside[key]
    elif kind < 0.15 and isinstance(inside, dict):
        inside[rng.choice(["new", 7, ""])] = junk(rng)
    else:
        inside[key] = changed(inside[key], rng)
    return tuple(inside) if isinstance(content, tuple) else inside


def spoilt_bytes(whole: bytes, rng: random.Random) -> bytes:
    """A file that was cut off, overwritten or mixed up."""
    spot = rng.randrange(len(whole))
    return rng.choice(
        [
            whole[:spot],
            whole[:spot] + rng.randbytes(30) + whole[spot + 30 :],
            whole[:spot] + rng.randbytes(1) + whole[spot + 1 :],
            whole[:spot] + bytes(len(whole) - spot),
            whole[spot:] + whole[:spot],
            whole[:spot] * 2,
        ]
    )


def copy_of(run: Path, place: Path) -> Path:
    folder = place / "run"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(run, folder)
    return folder


def commands(name: str) -> list[tuple[str, list[str]]]:
    """Ways of reading a checkpoint of that phase: the phase that does, and words that the folder's name follows."""
    ways = [(name, ["--evaluate"]), (name, ["--resume"])]
    if name == "phase0":
        ways.append(("phase1", ["--dynamics", "marlvol", "--marlvol-checkpoint"]))
    if name == "phase4":
        ways.append(("phase4", [*BASE["phase4"], "--guests"]))
    return ways


@pytest.mark.parametrize("name", PHASES)
def test_checkpoints(name, runs, tmp_path):
    sound = torch.load(runs[name] / "checkpoint.pt", weights_only=True)
    for reader, words in commands(name):
        rng = random.Random(3)

        def inputs(words=words, rng=rng):
            folder = copy_of(runs[name], tmp_path)
            path = folder / "checkpoint.pt"
            whole = path.read_bytes()
            for i in range(70):
                if i % 7 == 0:
                    path.write_bytes(spoilt_bytes(whole, rng))
                else:
                    content = copy.copy(sound)
                    for _ in range(rng.choice((1, 1, 3))):
                        content = changed(content, rng)
                    try:
                        torch.save(content, path)
                    except Exception:  # not everything can be pickled
                        continue
                yield [*words, str(folder)]

        assert refusal(PHASES[reader], [*words, str(copy_of(runs[name], tmp_path))]) is None
        tried(PHASES[reader], tmp_path, inputs(), 20)


@pytest.mark.parametrize("name", PHASES)
def test_args_json(name, runs, tmp_path):
    rng = random.Random(4)
    sound = json.loads((runs[name] / "args.json").read_text())

    def inputs():
        folder = copy_of(runs[name], tmp_path)
        (folder / "checkpoint.pt").unlink()
        path = folder / "args.json"
        for content in ("[" * 10**5, '{"a":' * 10**5, "", "null", "7" * 5000, '{"seed": 1e999}', "\ufeff{}"):
            path.write_text(content)
            yield ["--resume", str(folder)]
        path.unlink()
        for kind in (path.mkdir, lambda: path.symlink_to(path), lambda: path.symlink_to("/dev/null")):
            kind()
            yield ["--resume", str(folder)]
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        for _ in range(50):
            content = sound
            for _ in range(rng.choice((1, 1, 3))):
                content = changed(content, rng)
            path.write_text(json.dumps(content, default=str))
            yield ["--resume", str(folder)]

    tried(PHASES[name], tmp_path, inputs(), 30)


@pytest.mark.parametrize("name", ["phase1", "phase2"])
def test_metrics(name, runs, tmp_path):
    rng = random.Random(5)

    def inputs():
        folder = copy_of(runs[name], tmp_path)
        path = folder / "metrics.csv"
        text = path.read_text()
        for _ in range(15):
            path.write_bytes(spoilt(text, rng))
            yield ["--resume", str(folder)]
        path.unlink()
        path.mkdir()
        yield ["--resume", str(folder)]

    tried(PHASES[name], tmp_path, inputs(), 8)
