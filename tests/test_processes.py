"""Runs of several processes, each with two fake devices: the same numbers, one stop for all, and what a loss leaves."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import processes
import pytest
import small_runs

from lm.sharding import MeshConfig

COMMAND = """
from lm.cli import main
asked = ["--cluster.coordinator", f"127.0.0.1:{port}", "--cluster.processes", str(processes)]
raise SystemExit(main(["train", *sys.argv[4:], *asked, "--cluster.process", str(process)]))
"""
LENGTHS = {"steps": 8, "save_every": 4, "eval_every": 4}
STEPS = ["--train.steps", "8", "--train.save-every", "4", "--train.eval-every", "4"]


def write(folder: Path, seed: int = 0) -> Path:
    """What `lm train CONFIG.py` needs."""
    folder.mkdir(exist_ok=True)
    (folder / "CONFIG.py").write_text(small_runs.CONFIG.replace("MeshConfig(devices=1)", "MeshConfig(fsdp=2)"))
    small_runs.write_corpus(folder / "corpus.txt", seed=seed)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("runs"))


def launch(
    folder: Path, count: int, *arguments: str, own: Sequence[Sequence[str]] = (), before: str = ""
) -> list[subprocess.Popen]:
    """`lm train` with the same arguments in each process, and with what is its own; `before` is done by each first."""
    extra, code = own or [()] * count, before + COMMAND
    return [
        processes.start(code, count, arrive=[i], folder=folder, port=port, arguments=[*arguments, *extra[i]])[0]
        for port in [processes.free_port()]
        for i in range(count)
    ]


def train(folder: Path, count: int, *arguments: str, status: int = 0) -> list[tuple[int, str, str]]:
    told = processes.finish(launch(folder, count, *arguments), timeout=240)
    assert [code for code, _, _ in told] == [status] * count, told
    return told


def line_of(errors: str) -> str:
    """The one line that says what was wrong."""
    (line,) = [line for line in errors.splitlines() if line.startswith("lm:")]
    assert "Traceback" not in errors
    return line


def losses(run: Path) -> dict[tuple[int, str], float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {(record["step"], record["split"]): record["loss"] for record in records}


def assert_close(found: dict[tuple[int, str], float], wanted: dict[tuple[int, str], float]) -> None:
    assert found.keys() == wanted.keys()
    assert max(abs(found[at] - loss) for at, loss in wanted.items()) < 1e-5


@pytest.fixture(scope="module")
def one(folder: Path) -> Path:
    """The run of one process, this one, on one device."""
    small_runs.start(small_runs.experiment(folder, train=LENGTHS), folder / "one")
    return folder / "one"


@pytest.fixture(scope="module")
def two(folder: Path) -> Path:
    """The run of two processes."""
    told = train(folder, 2, "CONFIG.py", "--run", "two", *STEPS)
    assert "finished at step 8" in told[0][1]
    assert "step" not in told[1][1], "the first one speaks"
    return folder / "two"


@pytest.fixture(scope="module")
def four(folder: Path) -> Path:
    """That of four, stopped in the middle."""
    told = train(folder, 4, "CONFIG.py", "--run", "four", *STEPS, "--stop-at", "4", status=75)
    assert "everything is saved" in told[0][1]
    assert not [out for _, out, _ in told[1:] if "saved" in out]
    return folder / "four"


def test_two_are_as_one(one: Path, two: Path) -> None:
    wanted = losses(one)
    assert len(wanted) == 10
    assert wanted[8, "train"] < wanted[1, "train"] - 0.3, "it learns, so that equal losses mean something"
    assert_close(losses(two), wanted)


def test_four_are_as_one_and_one_goes_on_from_them(one: Path, four: Path) -> None:
    wanted = losses(one)
    assert_close(losses(four), {at: loss for at, loss in wanted.items() if at[0] <= 4})
    run = shutil.copytree(four, four.with_name("four, then one"))
    small_runs.resume(run, override=lambda settings: dataclasses.replace(settings, mesh=MeshConfig(devices=1)))
    assert_close(losses(run), wanted)


def test_two_go_on_from_four_on_other_axes(one: Path, four: Path) -> None:
    run = shutil.copytree(four, four.with_name("four-two"))
    train(run.parent, 2, "--resume", run.name, "--mesh.fsdp", "1", "--mesh.tensor", "2")
    assert_close(losses(run), losses(one))


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_several_go_on_from_one_on_other_axes(folder: Path, one: Path, count: int) -> None:
    name = f"one-{count}"
    small_runs.start(small_runs.experiment(folder, train=LENGTHS), folder / name, stop_at=4)
    train(folder, count, "--resume", name, "--mesh.fsdp", "1", "--mesh.tensor", "2", "--mesh.devices", "None")
    assert_close(losses(folder / name), losses(one))


# The second process stays at its seventh step until it is killed, while the first waits for what it was to send.
HELD = """
import time
import lm.loop
from pathlib import Path
to_devices, given = lm.loop.to_devices, 0
def held(*arguments):
    global given
    given += 1
    if process == 1 and given == 7:
        Path("held").touch()
        time.sleep(600)
    return to_devices(*arguments)
lm.loop.to_devices = held
"""


def test_killed_and_gone_on_with_it_is_the_straight_run(folder: Path, two: Path) -> None:
    started = launch(folder, 2, "CONFIG.py", "--run", "killed", *STEPS, before=HELD)
    wait_for_checkpoint(folder / "killed", 4, started)
    while not (folder / "held").exists():
        assert all(process.poll() is None for process in started), processes.finish(started)
        time.sleep(0.1)
    started[1].send_signal(signal.SIGKILL)
    sent = time.monotonic()
    (status, _, errors), (killed, _, _) = processes.finish(started, timeout=60)
    assert (status, killed) == (1, -signal.SIGKILL), errors
    assert time.monotonic() - sent < 20
    assert line_of(errors) == (
        "lm: training failed: process 1 ended without a word; what was saved before is whole: start all processes again"
        " with `lm train --resume killed`"
    )
    assert json.loads((folder / "killed" / "status.json").read_text())["state"] == "failed"
    assert small_runs.checkpoint_steps(folder / "killed") == [4]
    assert max(step for step, _ in losses(folder / "killed")) < 8
    train(folder, 2, "--resume", "killed")
    small_runs.assert_same_run(folder / "killed", two)


FAILING = """
import errno
import lm.loop
cluster.LEAVING = 1.0
to_devices, given = lm.loop.to_devices, 0
def failing(*arguments):
    global given
    given += 1
    if process == FAILS and given == 2:
        raise OSError(errno.ENOSPC, "No space left on device")
    return to_devices(*arguments)
lm.loop.to_devices = failing
"""


@pytest.mark.parametrize("fails", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_one_that_fails_alone_ends_all(folder: Path, fails: int) -> None:
    name = f"failed-{fails}"
    before = FAILING.replace("FAILS", str(fails))
    told = processes.finish(launch(folder, 2, "CONFIG.py", "--run", name, *STEPS, before=before), timeout=90)
    assert [status for status, _, _ in told] == [1, 1], told
    assert line_of(told[fails][2]).startswith("lm: training failed: No space left on device: ")
    line = line_of(told[1 - fails][2])
    assert line.startswith(f"lm: training failed: process {fails} failed, as its own output says; what was saved")
    assert line.endswith(f"start all processes again with `lm train --resume {name}`")
    assert json.loads((folder / name / "status.json").read_text())["state"] == "failed"


@pytest.mark.slow
def test_stopped_killed_at_any_moment_and_gone_on_with_it_is_the_straight_run(folder: Path) -> None:
    """A SIGTERM to one stops all at one step; a killed one ends the others in seconds; the bits are the same."""
    steps = ["--train.steps", "400", "--train.save-every", "50", "--train.eval-every", "0", "--train.log-every", "50"]
    train(folder, 2, "CONFIG.py", "--run", "straight", *steps)
    step = 0
    for number, kind in ((15, signal.SIGTERM), (9, signal.SIGKILL)):
        begin = ["--resume", "parts"] if step else ["CONFIG.py", "--run", "parts", *steps]
        started = launch(folder, 2, *begin)
        wait_for_checkpoint(folder / "parts", step + 1, started)
        started[1].send_signal(kind)
        sent = time.monotonic()
        told = processes.finish(started, timeout=60)
        if kind == signal.SIGTERM:
            assert [code for code, _, _ in told] == [75, 75], told
            assert "another process was told to stop" in told[0][1]
        else:
            assert [code for code, _, _ in told] == [1, -number], told
            assert time.monotonic() - sent < 20
            assert line_of(told[0][2]).startswith("lm: training failed: process 1 ended without a word; what was")
            assert json.loads((folder / "parts" / "status.json").read_text())["state"] == "failed"
        step = small_runs.whole_steps(folder / "parts" / "checkpoints")[-1]
    train(folder, 2, "--resume", "parts")
    mine, theirs = (small_runs.state(folder / name) for name in ("parts", "straight"))
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(mine[name], value, err_msg=name)


def wait_for_checkpoint(run: Path, step: int, started: Sequence[subprocess.Popen]) -> None:
    for _ in range(1200):
        if [found for found in small_runs.whole_steps(run / "checkpoints") if found >= step]:
            return
        assert all(process.poll() is None for process in started), processes.finish(started)
        time.sleep(0.1)
    raise AssertionError("no checkpoint")


def test_other_settings_in_one_process_stop_all(folder: Path) -> None:
    own = [(), ("--optim.peak-lr", "0.5")]
    told = processes.finish(launch(folder, 2, "CONFIG.py", "--run", "run", *STEPS, own=own))
    for status, _, errors in told:
        assert status == 2, errors
        line = line_of(errors)
        assert line.startswith("lm: process 1 has settings, hashed ")
        assert line.endswith("; start all processes with the same code, versions and settings")
    assert not (folder / "run").exists()


def test_who_does_not_come_is_told_in_a_line(folder: Path) -> None:
    asked = ["CONFIG.py", "--run", "run", "--cluster.wait", "2"]
    started = [
        processes.start(COMMAND, 3, arrive=[process], folder=folder, arguments=asked)[0] for process in (0, 2)
    ]  # each in a cluster of its own
    first, third = processes.finish(started)
    for (status, _, errors), wanted in (
        (first, "1 of 3 processes arrived within cluster.wait = 2 seconds; missing are 1, 2"),
        (third, "process 2 of 3 did not find process 0 at cluster.coordinator"),
    ):
        assert status == 2, errors
        assert line_of(errors).startswith(f"lm: {wanted}")
    assert not (folder / "run").exists()


# Commands that two processes, once they have met, do one after the other; each says how its own ended.
ATTEMPTS = """
import contextlib, io, json, os
from pathlib import Path
from unittest import mock
from lm.cli import main
from lm.run import training

cluster.join(settings)
cluster.SEEN_WITHIN = 1.0
environment, touch = training.environment, Path.touch

def attempt(name, *arguments):
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        status = main(["train", *arguments, "--cluster.launcher", "none"])
    print("told", json.dumps([name, status, errors.getvalue()]), flush=True)

def other_version():
    return environment() | {"packages": environment()["packages"] | {"jax": "0.0.1"}}

def refused(path, **options):
    if "-1" in path.name:
        raise PermissionError(13, "Permission denied")
    touch(path, **options)

@contextlib.contextmanager
def within(folder):
    os.chdir(folder if process == 1 else ".")
    yield
    os.chdir(folders["all"])

folders = json.loads(sys.argv[4])
new = ["CONFIG.py", "--run", "runs/run", *sys.argv[5:]]
elsewhere = mock.patch.object(training, "environment", other_version) if process == 1 else contextlib.nullcontext()
with elsewhere:
    attempt("version", *new)
attempt("mesh", *new, "--mesh.fsdp", "3")
with within(folders["other text"]):
    attempt("text", "CONFIG.py", "--run", folders["all"] + "/runs/run", *sys.argv[5:])
with within(folders["not there"]):
    attempt("not there", *new)
with within(folders["empty"]):
    attempt("empty", *new)
with mock.patch.object(Path, "touch", refused):
    attempt("refused", *new)
    attempt("refused when resumed", "--resume", "four, refused")
cluster.wait_for_all("the end")
"""


def test_mistakes_of_one_are_told_by_all_and_nothing_is_written(folder: Path, four: Path, tmp_path: Path) -> None:
    run = shutil.copytree(four, folder / "four, refused")
    before = written(run)
    others = {
        "not there": write(tmp_path / "a"),
        "empty": write(tmp_path / "b"),
        "other text": write(tmp_path / "c", 1),
    }
    (others["empty"] / "runs" / "run").mkdir(parents=True)
    places = {name: str(path) for name, path in {"all": folder, **others}.items()}
    started = processes.start(ATTEMPTS, 2, folder=folder, arguments=[json.dumps(places), *STEPS])
    shared = "all processes of a run write its checkpoints together: give --run a folder of a file system that all"
    wanted = {
        "version": r"process 1 has package jax 0.0.1, and process 0 [\d.]+; start all processes with the same code,",
        "mesh": r"mesh .*fsdp 3.* does not fit 4 device\(s\).*; make the product 4",
        "text": r"process 1 has dataset \w+, and process 0 \w+; start all processes with the same text and tokenizer",
        "not there": rf"\S*/a/runs/run on host \S+ is not there, not the \S+ of process 0 on host \S+; {shared}",
        "empty": rf"\S*/b/runs/run on host \S+ is another folder, not the \S+ of process 0 on host \S+; {shared}",
        "refused": r"can't write to \S+/runs/run on host \S+ \(Permission denied\); all",
        "refused when resumed": r"can't write to .*refused/checkpoints on host \S+ \(Permission denied\); all",
    }
    for process, (status, out, errors) in enumerate(processes.finish(started)):
        assert status == 0, errors
        told = [json.loads(line.removeprefix("told ")) for line in out.splitlines() if line.startswith("told ")]
        assert [name for name, _, _ in told] == list(wanted), out
        for name, status, errors in told:
            # Who made the mistake says it; the others say whose it is.
            local = name in ("not there", "empty", "refused", "refused when resumed")
            whose = "process 1: " if process == 0 and local else ""
            assert status == 2, (name, errors)
            assert re.match(f"lm: {whose}{wanted[name]}", line_of(errors)), (name, errors)
    assert not (folder / "runs").exists()
    assert not list((others["empty"] / "runs" / "run").iterdir())
    assert written(run) == before


def written(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("noticed", [True, False], ids=["at the start", "when it is saved"])
def test_a_run_that_one_host_can_only_read(folder: Path, four: Path, noticed: bool) -> None:
    """With a file system that is read-only for one process: told before it goes on; or, where it becomes so later, by
    that process, and all end."""
    run = shutil.copytree(four, folder / f"read-only-{noticed}" / "run").parent
    mount = f"mount --bind {run} {run} && mount -o remount,bind,ro {run}"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True, check=False).returncode:
        pytest.skip("making a file system read-only for one process needs root")
    code = processes.PREAMBLE + ("" if noticed else "cluster.check_shared = lambda folder: None") + COMMAND
    port = processes.free_port()
    started = []
    for process, mine in enumerate(("true", mount)):
        command = [sys.executable, "-c", code, str(process), "2", str(port), "--resume", str(run / "run")]
        started.append(
            subprocess.Popen(
                ["unshare", "-m", "sh", "-c", f'{mine} && exec "$0" "$@"', *command],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=folder,
                env=processes.environment(),
            )
        )
    told = processes.finish(started)
    assert [status for status, _, _ in told] == ([2, 2] if noticed else [1, 1]), told
    first, second = line_of(told[0][2]), told[1][2].strip()
    if noticed:
        refused = "can't write to .*/checkpoints on host .* \\(Read-only file system\\); all processes of a run write"
        assert re.match(f"lm: process 1: {refused}", first)
        assert re.match(f"lm: {refused}", second)
    else:
        assert "process 1 failed, as its own output says" in first
        # orbax's threads may say at the end what became of them.
        assert second.splitlines()[0].startswith("lm: training failed: Read-only file system: ")
    assert small_runs.checkpoint_steps(run / "run") == [4]


@pytest.mark.slow
def test_the_launcher_goes_on_after_a_killed_process(folder: Path) -> None:
    """scripts/launch/local_processes.sh with one of two killed: both begin again from the checkpoint and finish."""
    script = processes.ROOT / "scripts" / "launch" / "local_processes.sh"
    steps = ["--train.steps", "300", "--train.save-every", "50", "--train.eval-every", "0"]
    launcher = subprocess.Popen(
        ["bash", str(script), "2", "CONFIG.py", "run", *steps],
        cwd=folder,
        env=processes.environment() | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2", "PAUSE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for_checkpoint(folder / "run", 50, [launcher])
        named = "--cluster.process 1"
        found = [
            int(path.name)
            for path in Path("/proc").iterdir()
            if path.name.isdigit()
            and in_folder(path, folder)
            and named in command_of(path)
            and " train " in command_of(path)
        ]
        child = max(found)  # the program, not the script that started it
        os.kill(child, signal.SIGKILL)
        out, errors = launcher.communicate(timeout=200)
    finally:
        launcher.kill()
    assert launcher.returncode == 0, errors
    assert "attempt 1 ended with status 137" in errors
    assert "finished at step 300" in out


def in_folder(path: Path, folder: Path) -> bool:
    try:
        return (path / "cwd").resolve() == folder.resolve()
    except OSError:
        return False


def command_of(path: Path) -> str:
    try:
        return (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
