"""Runs of several processes, each with two fake devices: the same numbers, one stop for all, and what a loss leaves."""

import dataclasses
import json
import os
import signal
import subprocess
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
STEPS = ["--train.steps", "8", "--train.save-every", "2", "--train.eval-every", "4"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "CONFIG.py").write_text(small_runs.CONFIG.replace("MeshConfig(devices=1)", "MeshConfig(fsdp=2)"))
    small_runs.write_corpus(tmp_path / "corpus.txt")
    return tmp_path


def launch(folder: Path, count: int, *arguments: str, own: Sequence[Sequence[str]] = ()) -> list[subprocess.Popen]:
    """`lm train` with the same arguments in each process, and with what is its own."""
    extra = own or [()] * count
    return [
        processes.start(COMMAND, count, arrive=[i], folder=folder, port=port, arguments=[*arguments, *extra[i]])[0]
        for port in [processes.free_port()]
        for i in range(count)
    ]


def train(folder: Path, count: int, *arguments: str, status: int = 0) -> list[tuple[int, str, str]]:
    told = processes.finish(launch(folder, count, *arguments), timeout=240)
    assert [code for code, _, _ in told] == [status] * count, told
    return told


def losses(run: Path) -> dict[tuple[int, str], float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {(record["step"], record["split"]): record["loss"] for record in records}


def alone(folder: Path, name: str, **mesh: int) -> Path:
    """The same run of one process, this one."""
    settings = small_runs.experiment(folder, train={"steps": 8, "save_every": 2, "eval_every": 4})
    small_runs.start(dataclasses.replace(settings, mesh=MeshConfig(**mesh)), folder / name)
    return folder / name


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_are_as_one_and_each_goes_on_from_the_other(folder: Path, count: int) -> None:
    wanted = losses(alone(folder, "one", devices=2 * count, fsdp=2))
    told = train(folder, count, "CONFIG.py", "--run", "several", *STEPS, "--stop-at", "4", status=75)
    assert "everything is saved" in told[0][1]
    assert not [out for _, out, _ in told[1:] if out.replace("[Gloo]", "") and "saved" in out], "the first one speaks"
    small_runs.resume(
        folder / "several", override=lambda settings: dataclasses.replace(settings, mesh=MeshConfig(devices=1))
    )
    found = losses(folder / "several")
    assert found.keys() == wanted.keys()
    for at, loss in wanted.items():
        assert found[at] == pytest.approx(loss, abs=1e-5), at


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_several_go_on_from_one_on_other_axes(folder: Path, count: int) -> None:
    wanted = losses(alone(folder, "one", devices=1))
    settings = small_runs.experiment(folder, train={"steps": 8, "save_every": 2, "eval_every": 4})
    small_runs.start(dataclasses.replace(settings, mesh=MeshConfig(devices=1)), folder / "back", stop_at=4)
    train(folder, count, "--resume", "back", "--mesh.fsdp", "1", "--mesh.tensor", "2", "--mesh.devices", "None")
    for at, loss in losses(folder / "back").items():
        assert loss == pytest.approx(wanted[at], abs=1e-5), at


@pytest.mark.slow
def test_stopped_killed_and_gone_on_with_it_is_the_straight_run(folder: Path) -> None:
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
            (line,) = [line for line in told[0][2].splitlines() if line.startswith("lm:")]
            assert line.startswith(
                "lm: training failed: process 1 ended without a word; what was saved before is whole"
            )
            assert line.endswith("`lm train --resume parts`")
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
        (line,) = [line for line in errors.splitlines() if line.startswith("lm:")]
        assert line.startswith("lm: process 1 has settings, hashed ")
        assert line.endswith("; start all processes with the same code, versions and settings")
    assert not (folder / "run").exists()


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
