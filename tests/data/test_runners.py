"""Runners: every task is done once, on whatever runs it, and what is done stays done."""

import errno
import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from lm.data.runners import (
    RunnerConfig,
    check_runner_config,
    run_tasks,
    whole_file,
    whole_output,
)
from lm.errors import UserError

LOCAL, TWO, BEAM = RunnerConfig(), RunnerConfig(workers=2), RunnerConfig(runner="DirectRunner")


@dataclass(frozen=True)
class Note:
    """Appends its name to a log, and fails if told to."""

    output: Path
    log: Path
    failure: str = ""
    size: int = 10

    def __call__(self) -> None:
        with self.log.open("a") as log:
            log.write(f"{self.output.name} {os.getpid()}\n")
        if self.failure == "mistake":
            raise UserError(f"{self.output.name} is wrong")
        if self.failure == "disk":
            raise OSError(errno.ENOSPC, "No space left on device")
        with whole_file(self.output) as path:
            path.write_text("done")


def ran(log: Path) -> list[str]:
    return sorted(line.split()[0] for line in log.read_text().splitlines()) if log.exists() else []


@pytest.mark.parametrize("config", [LOCAL, TWO, BEAM], ids=["local", "two processes", "beam"])
def test_each_task_runs_once_and_what_is_done_is_not_done_again(tmp_path: Path, config: RunnerConfig):
    log = tmp_path / "log"
    tasks = [Note(tmp_path / f"t{i}", log, size=i) for i in range(5)]
    tasks[3].output.write_text("from before")
    reports: list[tuple[int, int]] = []
    run_tasks(tasks, config, lambda done, total: reports.append((done, total)))
    assert ran(log) == ["t0", "t1", "t2", "t4"]
    assert reports[0] == (3, 10)
    assert reports[-1] == (10, 10)
    assert tasks[3].output.read_text() == "from before"
    run_tasks(tasks, config, lambda done, total: None)
    assert len(ran(log)) == 4


def test_two_workers_are_other_processes(tmp_path: Path):
    log = tmp_path / "log"
    run_tasks([Note(tmp_path / f"t{i}", log) for i in range(4)], TWO, lambda done, total: None)
    assert str(os.getpid()) not in {line.split()[1] for line in log.read_text().splitlines()}


@pytest.mark.parametrize("config", [LOCAL, TWO, BEAM], ids=["local", "two processes", "beam"])
@pytest.mark.parametrize(("failure", "expected"), [("mistake", UserError), ("disk", OSError)])
def test_a_failure_arrives_as_it_was_raised(tmp_path: Path, config: RunnerConfig, failure: str, expected: type):
    tasks = [Note(tmp_path / "a", tmp_path / "log"), Note(tmp_path / "b", tmp_path / "log", failure)]
    with pytest.raises(expected) as caught:
        run_tasks(tasks, config, lambda done, total: None)
    if failure == "disk":
        assert caught.value.errno == errno.ENOSPC
    else:
        assert str(caught.value) == "b is wrong"
    # Mended, the rest is done.
    run_tasks([tasks[0], Note(tmp_path / "b", tmp_path / "log")], config, lambda done, total: None)
    assert (tmp_path / "b").read_text() == "done"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "log"]


def test_a_file_or_folder_is_whole_or_not_there(tmp_path: Path):
    def fail(open_part) -> None:
        with open_part(tmp_path / "x") as part:
            (part / "y" if part.is_dir() else part).write_text("half")
            raise KeyError

    for open_part in (whole_file, whole_output):
        with pytest.raises(KeyError):
            fail(open_part)
    assert not list(tmp_path.iterdir())
    with whole_output(tmp_path / "x") as part:
        (part / "y").write_text("first")
    with whole_output(tmp_path / "x") as part:  # another worker was faster: its result stays
        (part / "y").write_text("second")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x" / "y").read_text() == "first"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (RunnerConfig(workers=0), "--workers is 0; it must be at least 1"),
        (RunnerConfig(options=("--x=1",)), "--options --x=1 are for Beam"),
        (
            RunnerConfig(runner="DirectRunner", options=("direct_num_workers=many",)),
            "--options direct_num_workers=many: .*invalid int value: 'many'",
        ),
        (
            RunnerConfig(runner="DirectRunner", options=("direct_num_worker=2",)),
            "--options direct_num_worker=2: Beam does not know direct_num_worker; did you mean direct_num_workers",
        ),
        (RunnerConfig(runner="DirectRunner", options=("job_name", "a b")), "'a b' is no option; write each as NAME or"),
        (RunnerConfig(runner="NoSuchRunner"), "--runner is 'NoSuchRunner'; choose local, DirectRunner"),
    ],
)
def test_a_runner_that_cannot_be_had_is_refused(config: RunnerConfig, message: str):
    with pytest.raises(UserError, match=message):
        check_runner_config(config)


def test_a_job_server_may_have_options_of_its_own(caplog: pytest.LogCaptureFixture):
    pytest.importorskip("apache_beam")
    check_runner_config(RunnerConfig(runner="FlinkRunner", options=("parallelism=8", "object_reuse=true")))
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.endswith("Beam does not know object_reuse; FlinkRunner may")


@pytest.mark.parametrize("dashes", ["", "--"])
def test_beam_is_given_its_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dashes: str):
    """Several of them: on a command line only words without dashes can follow one another."""
    beam = pytest.importorskip("apache_beam")
    real, seen = beam.Pipeline, []

    def recorded(*, runner, options):
        seen.append(options.get_all_options())
        return real(runner=runner, options=options)

    monkeypatch.setattr(beam, "Pipeline", recorded)
    options = (f"{dashes}job_name=night", f"{dashes}direct_num_workers=1")
    config = RunnerConfig(runner="DirectRunner", options=options)
    run_tasks([Note(tmp_path / "t", tmp_path / "log")], config, lambda done, total: None)
    assert [(given["job_name"], given["direct_num_workers"]) for given in seen] == [("night", 1)]


@dataclass(frozen=True)
class Broken(Note):
    def __call__(self) -> None:
        raise KeyError("a bug of ours")


def test_a_bug_in_a_task_is_no_mistake_of_the_users(tmp_path: Path):
    with pytest.raises(RuntimeError, match="KeyError: 'a bug of ours'"):
        run_tasks([Broken(tmp_path / "a", tmp_path / "log")], BEAM, lambda done, total: None)
