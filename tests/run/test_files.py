"""Files of a run: metrics, checkpoints, folders."""

import fcntl
import json
import math
import os
import pickle
import resource
import zipfile

import pytest
import torch

from envs.run import files
from envs.run.errors import UsageError
from envs.run.files import MetricsFile, load_checkpoint, load_weights, read_metrics, save_checkpoint


def test_a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"name": "Black–Scholes", "values": [1, 2.5]})
    assert json.loads(path.read_text(encoding="utf-8")) == {"name": "Black–Scholes", "values": [1, 2.5]}
    assert "Black–Scholes" in path.read_text(encoding="utf-8")
    before = path.read_bytes()

    def interrupted():
        with files.replacing(path) as temporary:
            temporary.write_text("half of")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == before
    with pytest.raises(TypeError):
        files.write_json(path, {"not in JSON": torch.zeros(1)})
    assert path.read_bytes() == before


def test_nothing_is_written_through_a_link(tmp_path):
    """A shared run folder may hold links of the names that a run writes to."""
    folder = tmp_path / "run"
    folder.mkdir()
    target = tmp_path / "precious"
    target.write_text("precious")
    for name in ("a.json", "metrics.csv", "checkpoint.pt", "pnl.png", "a.json.tmp", "checkpoint.pt.tmp"):
        (folder / name).symlink_to(target)
    files.write_json(folder / "a.json", [1])
    MetricsFile(folder / "metrics.csv").write({"step": 1})
    save_checkpoint(folder / "checkpoint.pt", {})
    with files.replacing_files(folder) as fresh:
        (fresh / "pnl.png").write_text("picture")
    assert target.read_text() == "precious"
    assert (folder / "pnl.png").read_text() == "picture"
    assert not any((folder / name).is_symlink() for name in ("a.json", "metrics.csv", "checkpoint.pt", "pnl.png"))
    assert len(list(folder.iterdir())) == 6  # nothing temporary is left


def test_files_that_belong_together_are_all_written_or_none(tmp_path):
    (tmp_path / "metrics.csv").write_text("step\n1\n")
    (tmp_path / "pnl.png").write_text("old")

    def on_a_full_disk():
        with files.replacing_files(tmp_path) as fresh:
            assert (fresh / "metrics.csv").read_text() == "step\n1\n"  # figures are drawn from it
            (fresh / "pnl.png").write_text("ne")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        on_a_full_disk()
    assert (tmp_path / "pnl.png").read_text() == "old"
    with files.replacing_files(tmp_path) as fresh:
        (fresh / "pnl.png").write_text("new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "pnl.png": "new",
        "metrics.csv": "step\n1\n",
    }


def test_what_a_killed_process_left_is_cleared(tmp_path):
    (tmp_path / "target").write_text("precious")
    for name in (".checkpoint.pt.0123456789abcdef.tmp", "mine.tmp", ".mine.tmp"):
        (tmp_path / name).write_text("half")
    (tmp_path / ".files.0123456789abcdef.tmp").mkdir()
    (tmp_path / ".link.0123456789abcdef.tmp").symlink_to(tmp_path / "target")
    files.clear(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"target", "mine.tmp", ".mine.tmp"}
    assert (tmp_path / "target").read_text() == "precious"


def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path):
    """torch says so in an error of its own; it is the file's that counts."""
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, CONTENT)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            save_checkpoint(path, {**CONTENT, "agent": torch.zeros(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


# METRICS


def test_metrics(tmp_path):
    path = tmp_path / "metrics.csv"
    metrics = MetricsFile(path)
    assert read_metrics(path) == []
    for step in (1, 2):
        metrics.write({"step": step, "loss": 0.5 / step})
        assert len(path.read_text().splitlines()) == step + 1  # written at once
    assert read_metrics(path) == [{"step": 1.0, "loss": 0.5}, {"step": 2.0, "loss": 0.25}]
    assert metrics.rows == 2
    assert read_metrics(tmp_path / "none.csv") == []


def test_new_columns_rewrite_the_file(tmp_path):
    path = tmp_path / "metrics.csv"
    metrics = MetricsFile(path)
    metrics.write({"step": 1, "loss": 0.5})
    metrics.write({"step": 2, "gain": 0.1})
    metrics.write({"gain": 0.2, "step": 3, "loss": 0.4})  # in any order
    assert path.read_text().splitlines() == ["step,loss,gain", "1,0.5,nan", "2,nan,0.1", "3,0.4,0.2"]
    assert list(tmp_path.iterdir()) == [path]  # nothing temporary is left
    assert str(read_metrics(path)[0]) == "{'step': 1.0, 'loss': 0.5, 'gain': nan}"


def test_a_resumed_run_drops_the_rows_that_its_checkpoint_has_not_seen(tmp_path):
    path, uninterrupted = tmp_path / "metrics.csv", tmp_path / "other.csv"
    rows = [{"step": i, "loss": 1 / (3 + i)} for i in range(4)] + [{"step": 4, "loss": 0.1, "gain": 1e-17}]
    metrics = MetricsFile(uninterrupted)
    for row in rows:
        metrics.write(row)
    metrics = MetricsFile(path)
    for row in rows[:4]:
        metrics.write(row)
    with open(path, "a") as file:
        file.write("4,0.")  # killed in the middle of a row
    resumed = MetricsFile(path, resume_from=2)
    assert resumed.rows == 2
    assert len(read_metrics(path)) == 2
    for row in rows[2:]:
        resumed.write(row)
    assert path.read_bytes() == uninterrupted.read_bytes()
    assert resumed.rows == 5
    MetricsFile(path, resume_from=None)  # a run from the start
    assert read_metrics(path) == []


def test_rows_that_the_checkpoint_has_seen_are_missing(tmp_path):
    path = tmp_path / "metrics.csv"
    with pytest.raises(UsageError, match=r"metrics.csv: 0 rows, but the checkpoint has seen 3"):
        MetricsFile(path, resume_from=3)
    MetricsFile(path).write({"step": 1})
    with pytest.raises(UsageError, match=r"metrics.csv: 1 rows, but the checkpoint has seen 3"):
        MetricsFile(path, resume_from=3)


@pytest.mark.parametrize("content", [b"step,loss\n1,abc\n", b"step,loss\n1\n", b"step,loss\n1,\n", b"\xff\xfe\x00\x01"])
def test_damaged_metrics(tmp_path, content):
    path = tmp_path / "metrics.csv"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"metrics.csv: damaged"):
        read_metrics(path)


def test_resuming_from_a_file_that_is_no_text(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(UsageError, match=r"metrics.csv: damaged"):
        MetricsFile(path, resume_from=1)


# CHECKPOINTS

CONTENT = {"phase": "phase1", "iteration": 3, "agent": {"weight": torch.arange(3.0)}, "args": {"seed": 1}, "none": None}


def test_a_checkpoint_is_read_as_it_was_written(tmp_path):
    save_checkpoint(tmp_path / "checkpoint.pt", CONTENT)
    for path in (tmp_path, tmp_path / "checkpoint.pt", str(tmp_path)):
        content = load_checkpoint(path, "phase1", ["agent", "iteration"])
        assert torch.equal(content.pop("agent")["weight"], torch.arange(3.0))
        assert content == {name: value for name, value in CONTENT.items() if name != "agent"}


class Malicious:
    """Unpickling it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path):
    trap = tmp_path / "trap"
    path = tmp_path / "checkpoint.pt"
    torch.save({**CONTENT, "extra": Malicious(trap)}, path)
    with pytest.raises(UsageError, match=r"checkpoint.pt: refused, it holds objects other than tensors and numbers"):
        load_checkpoint(path, "phase1")
    path.write_bytes(pickle.dumps({**CONTENT, "agent": Malicious(trap)}))  # without torch's archive around it
    with pytest.raises(UsageError, match=r"checkpoint.pt: not a readable checkpoint"):
        load_checkpoint(path, "phase1")
    assert not trap.exists()
    torch.save(Malicious(trap), path)
    torch.load(path, weights_only=False)  # it would have
    assert trap.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"phase": "phase2"}, "a checkpoint of phase2, not of phase1"),
        ({"phase": 1}, "not a checkpoint of this project"),
        ({"phase": None}, "not a checkpoint of this project"),
        ({"iteration": -1}, "does not fit this script, its iteration is no count"),
        ({"iteration": 1.5}, "does not fit this script, its iteration is no count"),
        ({"iteration": True}, "does not fit this script, its iteration is no count"),
        ({"iteration": 10**400}, "refused, its iteration holds other than real tensors, numbers and text"),
        ({"world_size": "two"}, "does not fit this script, its world_size is no count"),
        ({"rows": None}, "does not fit this script, its rows is no count"),
        ({"steps": [1]}, "does not fit this script, its steps is no count"),
        ({"agent": {"weight": torch.tensor([0.0, torch.nan])}}, "NaN or infinite numbers in its agent"),
        ({"optimizer": [{"moment": torch.tensor(torch.inf)}]}, "NaN or infinite numbers in its optimizer"),
        ({"none": math.nan}, "NaN or infinite numbers in its none"),
        ({"agent": torch.zeros(2, dtype=torch.complex64)}, "refused, its agent holds other than real tensors"),
        ({"agent": torch.eye(2).to_sparse()}, "refused, its agent holds other than real tensors"),
        ({"agent": {"weight": 1j}}, "refused, its agent holds other than real tensors"),
        ({"agent": torch.zeros(1, device="meta").expand(10**9)}, "refused"),
    ],
)
def test_checkpoints_of_another_kind(tmp_path, changes, message):
    save_checkpoint(tmp_path / "checkpoint.pt", {**CONTENT, **changes})
    with pytest.raises(UsageError, match=rf"checkpoint.pt: {message}"):
        load_checkpoint(tmp_path, "phase1")


def nested(depth: int) -> list:
    """A list of two lists that are one list of two lists …: small in a file, 2^depth numbers to go through."""
    inside = [0, 0]
    for _ in range(depth):
        inside = [inside, inside]
    return inside


@pytest.mark.parametrize("big", [torch.zeros(1).expand(10**6), [torch.zeros(1000)] * 1000, nested(50)])
def test_a_checkpoint_is_not_larger_than_its_file(tmp_path, big):
    save_checkpoint(tmp_path / "checkpoint.pt", {**CONTENT, "agent": big})
    with pytest.raises(UsageError, match=r"refused, it unpacks to more than the \d+ bytes that it has"):
        load_checkpoint(tmp_path, "phase1")


def test_a_compressed_checkpoint_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, {**CONTENT, "agent": torch.zeros(10**6)})
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(tmp_path / "small.pt", "w", zipfile.ZIP_DEFLATED) as small:
        for entry in archive.infolist():
            small.writestr(entry.filename, archive.read(entry))
    assert os.path.getsize(tmp_path / "small.pt") < 10**5
    monkeypatch.setattr(torch, "load", None)
    with pytest.raises(UsageError, match=r"small.pt: refused, it unpacks to more than"):
        load_checkpoint(tmp_path / "small.pt", "phase1")


def test_checkpoints_that_cannot_be_read(tmp_path):
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(UsageError, match=r"checkpoint.pt: no such checkpoint"):
        load_checkpoint(tmp_path, "phase1")
    with pytest.raises(UsageError, match="no checkpoint is named"):
        load_checkpoint("", "phase1")
    save_checkpoint(path, CONTENT)
    with pytest.raises(UsageError, match=r"does not fit this script, it has no rows, tracker$"):
        load_checkpoint(path, "phase1", ["agent", "rows", "tracker"])
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"text", whole[:-100]):
        path.write_bytes(content)
        with pytest.raises(UsageError, match=r"checkpoint.pt: (not a readable checkpoint|refused)"):
            load_checkpoint(path, "phase1")
    torch.save([1, 2], path)
    with pytest.raises(UsageError, match="not a checkpoint of this project"):
        load_checkpoint(path, "phase1")


def test_weights():
    network = torch.nn.Linear(2, 3)
    state = {name: torch.ones_like(value) for name, value in network.state_dict().items()}
    load_weights(network, state, "runs/x")
    assert (network.weight == 1).all()
    for other in (torch.nn.Linear(2, 4).state_dict(), {}, None, [1], {**state, "more": torch.zeros(1)}):
        with pytest.raises(UsageError, match=r"^runs/x: does not fit this script, its networks have other shapes$"):
            load_weights(network, other, "runs/x")
    complex_ = {name: value.to(torch.complex64) for name, value in state.items()}  # torch would take the real part
    with pytest.raises(UsageError, match="other shapes"):
        load_weights(network, complex_, "runs/x")


# FOLDERS AND MEMORY


def test_no_two_runs_share_a_folder(tmp_path):
    names = [files.new_folder(tmp_path / "runs" / "gbm__1").name for _ in range(3)]
    assert names == ["gbm__1", "gbm__1-2", "gbm__1-3"]
    assert all((tmp_path / "runs" / name).is_dir() for name in names)


@pytest.mark.parametrize("kind", ["a file", "a link to nowhere"])
def test_no_folder_can_be_made(tmp_path, kind):
    runs = tmp_path / "runs"
    if kind == "a file":
        runs.write_text("")
    else:
        runs.symlink_to(tmp_path / "nowhere" / "further")
    with pytest.raises(UsageError, match=r"runs: no run folder can be made in it \(.*(File exists|Not a directory)"):
        files.new_folder(runs / "gbm__1")


def test_a_folder_is_held_by_one_process(tmp_path):
    files.hold(tmp_path / "absent")
    files.hold(tmp_path)
    files.hold(str(tmp_path))  # the same process
    (tmp_path / "link").symlink_to(tmp_path)
    descriptor = os.open(tmp_path, os.O_RDONLY)  # as another process has it
    with pytest.raises(BlockingIOError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    files.let_go(tmp_path / "link")
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with pytest.raises(UsageError, match=r"another process is at this run \(wait for its end, or stop it\)"):
        files.hold(tmp_path)
    os.close(descriptor)
    files.hold(tmp_path)
    files.let_go(tmp_path)
    files.let_go(tmp_path)


def test_memory():
    cpu = torch.device("cpu")
    files.check_memory(1, cpu, "--num-envs 1")
    with pytest.raises(UsageError, match=r"--num-envs 9 needs 1,024.0 GiB \(at most the .* GiB free on cpu\)"):
        files.check_memory(2**40, cpu, "--num-envs 9")
    assert 0.01 < files.peak_memory(cpu) < 1000


@pytest.mark.parametrize("row", ["1", "1,2,3", "1,two"])
def test_a_damaged_row_is_refused_if_the_checkpoint_has_seen_it_and_dropped_if_not(tmp_path, row):
    """A run that was killed may have left half a row behind its last checkpoint; one before it is damage."""
    path = tmp_path / "metrics.csv"
    path.write_text(f"global_step,loss\n0,1.5\n{row}\n")
    with pytest.raises(UsageError, match="damaged"):
        MetricsFile(path, resume_from=2)
    assert MetricsFile(path, resume_from=1).rows == 1
    assert path.read_text().splitlines() == ["global_step,loss", "0,1.5"]
