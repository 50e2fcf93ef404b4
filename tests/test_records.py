"""Run directories: whole files, one holder, metrics that survive a crash."""

import errno
import json
import math
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lm.errors import UserError
from lm.records import MetricWriter, RunDirectory, differences, environment, write_json


def _record(step: int, split: str = "train", **more: float) -> dict:
    return {"step": step, "split": split, "tokens": 10 * step, "seconds": 0.5, "loss": 1.0 / step, **more}


def test_metrics_read_back_as_written_and_what_is_not_finite_is_null(tmp_path: Path):
    run = RunDirectory.create(tmp_path / "run")
    writer = MetricWriter(run)
    third = 1 / 3
    writer.write(_record(1, loss=third))
    writer.write(_record(2, "validation", loss=math.nan, perplexity=math.inf))
    writer.close()
    first, second = run.metrics()
    assert first["loss"] == third
    assert (second["loss"], second["perplexity"]) == (None, None)
    assert list((run.path / "tensorboard").iterdir())


def test_each_line_is_on_its_way_before_the_next(tmp_path: Path):
    run = RunDirectory.create(tmp_path / "run")
    writer = MetricWriter(run)
    writer.write(_record(1))
    assert len(list(run.metrics())) == 1
    writer.close()


def test_a_resumed_writer_drops_later_lines_and_a_half_one(tmp_path: Path):
    run = RunDirectory.create(tmp_path / "run")
    writer = MetricWriter(run)
    for step in range(1, 6):
        writer.write(_record(step))
    writer.close()
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "spl')
    assert [record["step"] for record in run.metrics()] == [1, 2, 3, 4, 5]
    writer = MetricWriter(run, 3)
    writer.write(_record(4, loss=7.0))
    writer.close()
    assert [(record["step"], record["loss"]) for record in run.metrics()][2:] == [(3, 1 / 3), (4, 7.0)]
    assert [json.loads(line)["step"] for line in (run.path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4]
    MetricWriter(run, 0).close()
    assert list(run.metrics()) == []


def events(folder: Path) -> list[list[Any]]:
    """The events of each file, in the order in which the files were made."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns):
        data, at = path.read_bytes(), 0
        found.append([])
        while at < len(data):
            (size,) = struct.unpack_from("Q", data, at)
            found[-1].append(Event.FromString(data[at + 12 : at + 12 + size]))
            at += 12 + size + 4
    return found


def test_tensorboard_is_told_what_to_forget(tmp_path: Path):
    run = RunDirectory.create(tmp_path / "run")
    purged = []
    for step in (0, 0, 3):  # a new run, one killed before its first checkpoint, one resumed from step 3
        MetricWriter(run, step).close()
        (written,) = events(run.path / "tensorboard")
        purged.append([event.step for event in written if event.HasField("session_log")])
        shutil.rmtree(run.path / "tensorboard")
    assert purged == [[], [1], [4]]


def test_tensorboard_reads_what_was_written(tmp_path: Path):
    run = RunDirectory.create(tmp_path / "run")
    writer = MetricWriter(run)
    writer.write(_record(1, loss=0.25))
    writer.write(_record(2, "validation", loss=math.nan))
    assert len(events(run.path / "tensorboard")[0]) == 6  # on disk with the validation record, not only at the end
    writer.close()
    (written,) = events(run.path / "tensorboard")
    found = {(event.step, v.tag): v.simple_value for event in written for v in event.summary.value}
    assert found[1, "train/loss"] == 0.25
    assert found[2, "validation/tokens"] == 20
    assert (2, "validation/loss") not in found
    assert written[0].file_version == "brain.Event:2"


def test_a_disk_that_is_full_is_an_error_and_not_a_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from tensorboardX.record_writer import RecordWriter

    def full(self: Any, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    writer = MetricWriter(RunDirectory.create(tmp_path / "run"))
    monkeypatch.setattr(RecordWriter, "write", full)
    for step in range(1, 100):  # more than any queue holds
        with pytest.raises(OSError, match="No space left"):
            writer.write(_record(step))
    writer.close()


def test_a_run_has_one_holder_whoever_asks(tmp_path: Path):
    run = RunDirectory.create(tmp_path / "run")
    run.write("config.json", {})
    run.lock()
    code = "import sys, pathlib, lm.records as r; r.RunDirectory(pathlib.Path(sys.argv[1])).lock()"
    done = subprocess.run([sys.executable, "-c", code, str(run.path)], capture_output=True, text=True, timeout=60)
    assert "another process is training" in done.stderr
    with pytest.raises(UserError, match=r"another process is training .*; wait for it or stop it first"):
        RunDirectory.open(run.path).lock()
    run.unlock()
    again = RunDirectory.open(run.path)
    again.lock()
    again.unlock()
    again.unlock()


def test_new_runs_want_a_new_folder(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    RunDirectory.check_new(tmp_path / "empty")
    RunDirectory.check_new(tmp_path / "a" / "b" / "c")
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]
    run = RunDirectory.create(tmp_path / "a" / "b")
    RunDirectory.check_new(run.path)  # killed as it began: it can begin again
    (run.path / ".writing-123-config.json").touch()
    RunDirectory.create(run.path)
    run.write("config.json", {})
    with pytest.raises(UserError, match="is not empty; resume it"):
        RunDirectory.create(run.path)
    (run.path / "config.json").unlink()
    with pytest.raises(UserError, match=r"has no config\.json"):
        RunDirectory.open(run.path)


def test_a_file_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "status.json"
    write_json(path, {"a": "中文"})

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        write_json(path, {"a": "b"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": "中文"}


def test_status(tmp_path: Path):
    run = RunDirectory.create(tmp_path / "run")
    assert run.status() is None
    run.set_status("preempted", step=3, reason="SIGTERM")
    status = run.read("status.json")
    assert (run.status(), status["step"], status["pid"]) == ("preempted", 3, os.getpid())
    (run.path / "status.json").write_text("{")
    with pytest.raises(UserError, match=r"can't read .*status\.json: .*; the run directory is damaged"):
        run.status()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"folder": "x"}', "not an object with folder, fingerprint"),
        ('["folder", "fingerprint"]', "not an object"),
        ('"folder fingerprint"', "not an object"),
        ("null", "not an object"),
        ('{"folder": "x", "finger', "Unterminated"),
        ("", "Expecting value"),
    ],
)
def test_a_damaged_file_is_named_with_what_it_lacks(tmp_path: Path, text: str, says: str):
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(UserError, match=rf"can't read .*dataset\.json: .*{says}.*; the run directory is damaged"):
        RunDirectory(tmp_path).read("dataset.json", "folder", "fingerprint")


def test_a_file_that_is_missing_is_named_and_one_with_all_keys_is_read(tmp_path: Path):
    with pytest.raises(UserError, match=r"can't read .*dataset\.json"):
        RunDirectory(tmp_path).read("dataset.json", "folder")
    RunDirectory(tmp_path).write("dataset.json", {"folder": "x", "fingerprint": "y", "more": 1})
    assert RunDirectory(tmp_path).read("dataset.json", "folder", "fingerprint")["more"] == 1


def test_environment_says_what_a_result_depends_on():
    now = environment()
    assert json.loads(json.dumps(now)) == now
    assert now["devices"] == {"kind": "cpu", "count": 8, "processes": 1}
    assert {"jax", "optax", "numpy"} <= now["packages"].keys()
    assert differences(now, now) == []
    before = {**now, "python": "3.0", "packages": {**now["packages"], "jax": "0.1"}, "git": None, "command": []}
    assert len(differences(before, now)) == 2
    assert differences(before, now)[0].startswith("python was 3.0, is 3.")


def test_a_run_that_can_not_be_written_to_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDirectory.create(tmp_path / "run")
    write = Path.open

    def refused(path: Path, mode: str = "r", **options: Any) -> Any:
        if "a" in mode:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return write(path, mode, **options)

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(UserError, match=r"run can't be written to \(Permission denied\); make it writable"):
        run.lock()
