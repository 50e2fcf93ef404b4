"""The loop around the step: its order, its signals, and what it lets go of."""

import hashlib
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import small_runs as small

from lm import loop as training
from lm import run as runs
from lm.data import loader
from lm.errors import UserError
from lm.loop import StopSignals
from lm.records import RunDirectory
from lm.train import TrainConfig


def test_length_is_exactly_one_of_three():
    at = {"tokens_per_step": 128, "steps_per_epoch": 2.5}
    assert TrainConfig(steps=7).total_steps(**at) == 7
    assert TrainConfig(tokens=128).total_steps(**at) == 1
    assert TrainConfig(tokens=129).total_steps(**at) == 2
    assert TrainConfig(epochs=2).total_steps(**at) == 5
    assert TrainConfig(epochs=1).total_steps(**at) == 3
    with pytest.raises(UserError, match="no length"):
        TrainConfig().total_steps(**at)
    for two in ({"steps": 1, "tokens": 1}, {"tokens": 1, "epochs": 1.0}):
        with pytest.raises(UserError, match="are both set; a run's length is exactly one"):
            TrainConfig(**two)


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"epochs": -1.0},
        {"batch_size": 0},
        {"accumulate": 0},
        {"log_every": 0},
        {"keep": 0},
        {"save_every": -1},
        {"eval_batches": 0},
        {"patience": 0},
        {"ema_decay": 1.0},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_settings_out_of_range_name_themselves_and_their_value(wrong: dict):
    [(name, value)] = wrong.items()
    with pytest.raises(UserError, match=rf"train\.{name} is {value}; it (must|is)"):
        TrainConfig(**wrong)


def test_signals_are_noted_and_given_back():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopSignals() as signals:
        assert signals.received is None
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == "SIGINT"
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):  # a second Ctrl-C does not wait for the step
            os.kill(os.getpid(), signal.SIGINT)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


@pytest.mark.parametrize(("number", "again"), [(signal.SIGINT, "once more"), (signal.SIGTERM, "Ctrl-C")])
def test_a_stop_is_told_at_once_and_once(number: signal.Signals, again: str):
    """While the main thread is in a compiled program, as it is while XLA compiles, and no handler of Python's runs."""
    told: list[tuple[float, str]] = []
    threads = threading.active_count()
    with StopSignals(lambda text: told.append((time.monotonic(), text))) as signals:
        ends = []
        for kind in (number, signal.SIGTERM):  # the second is not a second Ctrl-C, which would give up
            started = time.monotonic()
            threading.Timer(0.1, os.kill, (os.getpid(), kind)).start()
            hashlib.pbkdf2_hmac("sha256", b"", b"", 1_500_000)
            ends.append(time.monotonic())
            assert ends[-1] - started > 0.2, "not long enough to tell"
        assert signals.received is not None
    [(at, text)] = told
    assert at < ends[0] - 0.05
    assert text == f"stopping after this step: saving ... ({again}: give up at once)"
    assert threading.active_count() == threads
    assert signal.set_wakeup_fd(-1) == -1


def test_signals_are_left_to_whoever_runs_the_loop_in_a_thread():
    before = signal.getsignal(signal.SIGTERM)
    inside = []

    def run() -> None:
        with StopSignals(inside.append) as signals:
            inside.append((signals.received, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert inside == [(None, before)]


def _at(when: str, step: int, act):
    """A reporter that acts when it is told of a step."""

    class Acting(small.Silent):
        def train(self, record):
            super().train(record)
            if when == "train" and record["step"] == step:
                act()

        def evaluated(self, record):
            super().evaluated(record)
            if when == "evaluated" and record["step"] == step:
                act()

    return Acting()


def _terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(("when", "step"), [("train", 1), ("train", 3), ("evaluated", 3), ("train", 5)])
def test_a_signal_at_any_point_of_a_step_loses_no_record(tmp_path: Path, when: str, step: int):
    settings = small.experiment(tmp_path)
    small.start(settings, tmp_path / "straight")
    outcome = runs.start(settings, tmp_path / "run", _at(when, step, _terminate))
    # Step 1 is read while step 2 runs, which is finished; from a step that was waited for, another one follows.
    assert (outcome.state, outcome.reason) == ("preempted", "SIGTERM") or outcome.step == 6
    assert step <= outcome.step <= step + 2
    assert small.metrics(tmp_path / "run")[-1]["step"] == outcome.step
    assert small.checkpoint_steps(tmp_path / "run")[-1] == outcome.step
    small.resume(tmp_path / "run")
    small.assert_same_run(tmp_path / "straight", tmp_path / "run")


def test_a_signal_between_the_look_and_the_end_of_a_step_waits_for_the_next(tmp_path: Path, monkeypatch):
    settings = small.experiment(tmp_path)
    small.start(settings, tmp_path / "straight")
    # Nothing is due at step 4 but asking so: the last thing in a step before its end.
    due = training._due

    def asked(step: int, every: int) -> bool:
        if step == 4:
            _terminate()
        return due(step, every)

    monkeypatch.setattr(training, "_due", asked)
    outcome = small.start(settings, tmp_path / "run")
    monkeypatch.undo()
    assert outcome.step == 5
    small.resume(tmp_path / "run")
    small.assert_same_run(tmp_path / "straight", tmp_path / "run")


def test_a_step_is_logged_then_evaluated_then_saved(tmp_path: Path, monkeypatch):
    order = []

    class Telling(small.Silent):
        def train(self, record):
            order.append(f"train {record['step']}")

        def evaluated(self, record):
            order.append(f"evaluate {record['step']}")

    save = training.Checkpoints.save

    def saving(self, step, *arguments, **options):
        order.append(f"save {step}")
        save(self, step, *arguments, **options)

    monkeypatch.setattr(training.Checkpoints, "save", saving)
    settings = small.experiment(tmp_path, train={"eval_every": 2, "save_every": 3, "log_every": 2})
    runs.start(settings, tmp_path / "run", Telling())
    assert " ".join(order) == (
        "train 2 evaluate 2 save 2 save 3 train 4 evaluate 4 save 4 train 6 evaluate 6 save 6"  # 2 and 4 are the best
    )


@pytest.mark.parametrize("where", ["restore", "train", "step"])
def test_whatever_fails_everything_is_let_go_and_the_status_says_so(tmp_path: Path, monkeypatch, where: str):
    settings = small.experiment(tmp_path)
    small.start(settings, tmp_path / "run", stop_at=1)

    def fail(*_, **__):
        raise RuntimeError("made up")

    closed = []
    close = training.Checkpoints.close
    monkeypatch.setattr(training.Checkpoints, "close", lambda self: (closed.append(self), close(self))[1])
    reporter = small.Silent()
    with monkeypatch.context() as patch:
        if where == "restore":
            patch.setattr(training.Checkpoints, "restore", fail)
        elif where == "train":
            patch.setattr(loader, "training_batches", fail)
        else:
            patch.setattr(training, "to_devices", fail)
        with pytest.raises(RuntimeError, match="made up"):
            runs.resume(tmp_path / "run", reporter)
    assert len(closed) >= 1
    if where != "restore":
        assert reporter.named("close") == [None]
    run = RunDirectory(tmp_path / "run")
    assert run.status() == "failed"
    assert run.read("status.json")["reason"] == "made up"
    run.lock()  # nobody holds it
    run.unlock()
    assert small.resume(tmp_path / "run", stop_at=2).state == "preempted"


def test_without_validation_the_run_ends_with_its_last_checkpoint(tmp_path: Path):
    settings = small.experiment(tmp_path, data={"validation_fraction": 0.0}, train={"save_every": 4})
    outcome = small.start(settings, tmp_path / "run")
    assert (outcome.state, outcome.validation) == ("finished", None)
    assert {record["split"] for record in small.metrics(tmp_path / "run")} == {"train"}
    assert small.checkpoint_steps(tmp_path / "run") == [4, 6]
    assert not (tmp_path / "run/best.json").exists()
    with pytest.raises(UserError, match="no split 'validation'; it has train"):
        runs.evaluate_run(tmp_path / "run")


def test_what_hangs_is_ended_and_shows_where(tmp_path: Path, monkeypatch, caplog):
    """Not before the first sign of life, and not while there are any."""
    ended = threading.Event()
    monkeypatch.setattr(training.os, "_exit", lambda status: ended.set() if status == 1 else None)
    stacks = tmp_path / "run" / "stacks-0.txt"
    stacks.parent.mkdir()
    with training.HangWatch(0.4 / 60, stacks) as watch:
        assert not ended.wait(0.8), "nothing was done yet, as while the first step compiles"
        for _ in range(8):
            watch.alive()
            assert not ended.wait(0.1)
        assert ended.wait(5)
    assert "test_what_hangs_is_ended_and_shows_where" in stacks.read_text()
    assert f"lm train --resume {tmp_path / 'run'}" in caplog.text
