"""The loop around the train step: data in, records out, evaluation and checkpoints when due, and how it stops."""

import contextlib
import dataclasses
import faulthandler
import logging
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import jax
import numpy as np

from lm.checkpoint import Checkpoints
from lm.cluster import Anyone
from lm.errors import check
from lm.evaluate import evaluate, to_devices
from lm.hardware import peak_flops
from lm.metrics import is_better
from lm.models.transformer import Transformer, flops_per_token
from lm.records import MetricWriter, RunDirectory
from lm.train import Program, TrainConfig, TrainState

log = logging.getLogger(__name__)

Array = jax.Array
Batch = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Feed:
    """A run's data, as functions of the step."""

    train: Callable[[int], Iterator[Batch]]
    """Batches from a step on, without end."""
    documents: Callable[[int], list[list[str]]]
    """The documents in each row of a step's batch."""
    seq_len: int
    """Tokens in a row."""
    source_len: int = 0
    """Source tokens in a row, where there is an encoder."""
    enrich: Callable[[dict[str, Array]], dict[str, Array]] = lambda batch: batch
    """Adds to a training batch on devices what another model says of it."""
    validation: Callable[[], Iterable[Batch]] | None = None
    """The validation batches, or None when there is no such split."""
    validation_batches: int = 0
    tokens_per_byte: float | None = None
    """Of the validation split."""


class Reporter(Protocol):
    """What shows a run to a person. Every method may do nothing; `message` may come from another thread."""

    def start(self, step: int, total: int) -> None:
        """Training begins at `step` of `total`."""

    def train(self, record: dict[str, Any]) -> None:
        """A training record."""

    def evaluating(self, done: int, total: int) -> None:
        """`done` of `total` batches of an evaluation."""

    def evaluated(self, record: dict[str, Any]) -> None:
        """A validation record."""

    def message(self, text: str) -> None:
        """A line to keep."""

    def close(self) -> None:
        """The end, good or bad."""


class TrainingHaltedError(Exception):
    """A loss or gradient was not finite and `train.non_finite` is `halt`."""


@dataclass
class Progress:
    """What a checkpoint holds besides arrays."""

    seconds: float = 0.0
    """Time spent training so far, over all sessions."""
    best_step: int | None = None
    best_value: float | None = None
    """Of `train.best`."""
    stale: int = 0
    """Evaluations since the best."""

    @classmethod
    def read(cls, saved: Mapping[str, Any]) -> "Progress":
        """As a checkpoint has it; one of before there was `train.best` called the value by the name of the loss."""
        values = dict(saved)
        if "best_loss" in values:
            values["best_value"] = values.pop("best_loss")
        return cls(**values)


@dataclass(frozen=True)
class Outcome:
    """How a call of `fit` ended."""

    state: Literal["finished", "preempted"]
    step: int
    reason: str
    validation: dict[str, float] | None = field(default=None)


STOPPING = frozenset((signal.SIGTERM, signal.SIGINT))


class StopSignals:
    """While entered, SIGTERM and the first Ctrl-C ask for a stop instead of ending the process.

    Python calls a signal's handler once its main thread is back from the program that is being compiled or run, which
    may take minutes. The number of a signal reaches a wakeup file at once, and a thread that waits there tells of it.
    """

    def __init__(self, tell: Callable[[str], None] = lambda text: None):
        """`tell` is called at once, from another thread, with a line for the person who asked for the stop."""
        self.received: str | None = None
        self._tell = tell
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is not threading.main_thread():
            return self  # whoever runs us there handles signals

        def handle(number: int, _: Any) -> None:
            if self.received is not None and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.received = signal.Signals(number).name

        ours, theirs = socket.socketpair()
        thread = threading.Thread(target=self._watch, args=(ours,), name="stop signals", daemon=True)
        thread.start()
        theirs.setblocking(False)  # as Python wants it: a handler never waits
        before = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        # Undone from last to first: handlers, file, and the thread, which ends with the file.
        self._undo.callback(ours.close)
        self._undo.callback(thread.join)
        self._undo.callback(theirs.close)
        self._undo.callback(signal.set_wakeup_fd, before)
        for number in STOPPING:
            self._undo.callback(signal.signal, number, signal.signal(number, handle))
        return self

    def _watch(self, wakeups: socket.socket) -> None:
        told = False
        while numbers := wakeups.recv(64):
            if not told and STOPPING & set(numbers):
                told = True
                again = "once more" if signal.SIGINT in numbers else "Ctrl-C"
                with contextlib.suppress(OSError):  # whoever read us is gone, as `| head` is
                    self._tell(f"stopping after this step: saving ... ({again}: give up at once)")

    def __exit__(self, *_: object) -> None:
        self._undo.close()


class HangWatch:
    """While entered, ends the process where `alive` isn't called for too long; it is armed by the first call."""

    def __init__(self, minutes: float, stacks: Path):
        """`stacks` is where the stacks of all threads are written; 0 minutes = never."""
        self._seconds, self._stacks = minutes * 60, stacks
        self._last: float | None = None
        self._over = threading.Event()

    def alive(self) -> None:
        """Something was done."""
        self._last = time.monotonic()

    def __enter__(self) -> "HangWatch":
        if self._seconds:
            threading.Thread(target=self._look, name="hang watch", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def _look(self) -> None:
        while not self._over.wait(min(self._seconds / 4, 10)):
            if self._last is None or time.monotonic() - self._last < self._seconds:
                continue
            with contextlib.suppress(OSError), self._stacks.open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
            log.error(
                "no step was done in %g minutes (train.hang_minutes); the stacks of all threads are in %s; what was"
                " saved before is whole: go on with `lm train --resume %s`",
                self._seconds / 60,
                self._stacks,
                self._stacks.parent,
            )
            os._exit(1)  # the thread that hangs, perhaps within a device's driver, can't be asked to end


def fit(
    run: RunDirectory,
    model: Transformer,
    program: Program,
    feed: Feed,
    config: TrainConfig,
    total_steps: int,
    *,
    reporter: Reporter,
    fingerprint: str,
    stop_at: int | None = None,
) -> Outcome:
    """Trains from the last checkpoint, or from the start, to `total_steps`.

    The order within a step is: train, log, evaluate, save, and only then look for a request to stop; so whatever was
    due at a step is done before the run can end there, and a resumed run owes nothing.

    Args:
      run: the run directory, locked.
      model: the Transformer, for its FLOP count.
      program: its compiled parts.
      feed: the data.
      config: lengths and intervals.
      total_steps: where the run ends.
      reporter: what shows progress.
      fingerprint: of the tokenizer; a checkpoint with another one is refused.
      stop_at: stop after this step as if a SIGTERM had come.

    Raises:
      TrainingHaltedError: something was not finite.
      UserError: the checkpoint is of another model.
    """
    with StopSignals(reporter.message) as signals, jax.set_mesh(program.mesh), contextlib.ExitStack() as resources:
        checkpoints = Checkpoints(run.checkpoints, keep=config.keep)
        resources.callback(checkpoints.close)
        state, progress = _restore_or_init(run, checkpoints, program, fingerprint)
        first = int(state.step)
        writer = MetricWriter(run, first)
        resources.callback(writer.close)
        resources.callback(reporter.close)
        reporter.start(first, total_steps)
        batches = feed.train(first)
        resources.callback(getattr(batches, "close", lambda: None))
        watch = resources.enter_context(HangWatch(config.hang_minutes, run.path / f"stacks-{jax.process_index()}.txt"))
        loop = _Loop(
            run, model, program, feed, config, total_steps, reporter, fingerprint, checkpoints, writer, progress, watch
        )
        return loop.run(state, batches, signals, stop_at)


def check_resumable(run: RunDirectory, program: Program, fingerprint: str) -> int:
    """The step from which `fit` would continue; writes nothing.

    Raises:
      UserError: the last checkpoint is of another model or tokenizer.
    """
    if not run.checkpoints.exists():
        return 0
    with contextlib.closing(Checkpoints.read_only(run.checkpoints)) as checkpoints:
        latest = _latest(checkpoints, fingerprint)
        if latest is None:
            return 0
        checkpoints.compare(latest, program.storage.target)
        return latest


def _latest(checkpoints: Checkpoints, fingerprint: str) -> int | None:
    latest = checkpoints.latest()
    if latest is not None:
        trained_with = checkpoints.restore_extra(latest)["tokenizer"]
        check(
            trained_with == fingerprint,
            f"the checkpoint was trained with tokenizer {trained_with}, the data has {fingerprint};"
            " use the dataset the run was started with",
        )
    return latest


def _restore_or_init(
    run: RunDirectory, checkpoints: Checkpoints, program: Program, fingerprint: str
) -> tuple[TrainState, Progress]:
    latest, storage = _latest(checkpoints, fingerprint), program.storage
    if latest is None:
        state = program.init()
        frozen = storage.frozen(state)
        if jax.tree.leaves(frozen):
            with contextlib.closing(Checkpoints(run.frozen)) as once:
                if not once.steps():  # a run that was killed before its first checkpoint has written them already
                    once.save(0, {"params": frozen}, {}, best=None)
        return state, Progress()
    progress = Progress.read(checkpoints.restore_extra(latest)["progress"])
    frozen = restore_frozen(run, storage.frozen_target)
    return storage.restored(checkpoints.restore(latest, storage.target), frozen), progress


def restore_frozen(run: RunDirectory, target: Any) -> Any:
    """The parameters of a run that are frozen whole; `target` as `Storage.frozen_target`.

    Raises:
      UserError: they are not there, or those of another model.
    """
    if not jax.tree.leaves(target):
        return target
    check(run.frozen.is_dir(), f"{run.frozen} is not there, and holds what is frozen in this run; restore it")
    with contextlib.closing(Checkpoints.read_only(run.frozen)) as once:
        check(once.steps(), f"{run.frozen} holds no complete checkpoint of what is frozen in this run; restore it")
        return once.restore(0, {"params": target})["params"]


@dataclass
class _Loop:
    """The state of the loop that is not the model's."""

    run_directory: RunDirectory
    model: Transformer
    program: Program
    feed: Feed
    config: TrainConfig
    total: int
    reporter: Reporter
    fingerprint: str
    checkpoints: Checkpoints
    writer: MetricWriter
    progress: Progress
    watch: HangWatch
    first: int = 0
    saved: int | None = None
    validation: dict[str, float] | None = None

    def run(self, state: TrainState, batches: Iterator[Batch], signals: StopSignals, stop_at: int | None) -> Outcome:
        config = self.config
        step = first = int(state.step)
        self.first = first
        self.saved = first if first else None
        clock = _Clock(self.progress.seconds)
        waiting: tuple[int, dict[str, Array]] | None = None
        anyone = Anyone(self.program.mesh)
        while step < self.total and not self.out_of_patience():
            batch = to_devices(clock.wait_for(batches), self.program.mesh)
            state, report = self.program.train_step(state, self.feed.enrich(batch))
            step += 1
            # The report of the step before: reading this one now would make the device wait for the host.
            self.read(waiting, clock)
            waiting = (step, report)

            last = step == self.total
            stop = anyone.ask(signals.received is not None) or step == stop_at
            evaluate_now = self.feed.validation is not None and (last or _due(step, config.eval_every))
            save_now = last or stop or _due(step, config.save_every)
            if evaluate_now or save_now:
                self.read(waiting, clock)
                waiting = None
            if evaluate_now:
                save_now = self.evaluate(step, state, clock) or save_now
                if self.out_of_patience():
                    last = save_now = True
            if save_now:
                self.save(step, state, clock)
            if last:
                break
            if stop:  # a signal since then is served after the next step, whose report will have been read
                self.checkpoints.wait()
                asked = f"asked to stop at step {step}" if step == stop_at else "another process was told to stop"
                return Outcome("preempted", step, signals.received or asked, self.validation)
        self.checkpoints.wait()
        patience = f"no better validation {config.best} in {config.patience} evaluations"
        return Outcome("finished", step, patience if self.out_of_patience() else "all steps done", self.validation)

    def out_of_patience(self) -> bool:
        """Whether the run ends early: also asked of a restored run, which may have been killed just after its end."""
        return self.config.patience is not None and self.progress.stale >= self.config.patience

    def read(self, waiting: tuple[int, dict[str, Array]] | None, clock: "_Clock") -> None:
        """Reads a step's report back, logs it when due, and halts on what is not finite."""
        if waiting is None:
            return
        step, report = waiting
        self.watch.alive()
        values = {name: float(value) for name, value in jax.device_get(report).items()}
        due = step % self.config.log_every == 0 or step == self.total
        clock.step_done(restart=not due and step == self.first + 1)
        tokens_per_step = self.config.batch_size * self.feed.seq_len
        if not values["finite"] and self.config.non_finite == "halt":
            self.halt(step, values)
        if not due:
            return
        seconds, waited, steps = clock.take()
        speed = tokens_per_step * steps / seconds
        lengths = self.feed.seq_len, self.feed.source_len
        needed = flops_per_token(self.model.config, *lengths) - self.program.flops_not_needed(*lengths)
        flops = speed * needed
        peak = peak_flops(self.program.mesh.devices.flat[0])
        record = {
            "step": step,
            "split": "train",
            "tokens": step * tokens_per_step,
            "seconds": round(clock.total, 3),
            **self.program.summarise(values),
            "objective": values["objective"] / values["weight"] if values["weight"] else math.nan,
            "learning_rate": values["learning_rate"],
            "grad_norm": values["grad_norm"],
            "param_norm": values["param_norm"],
            "skipped": int(values["skipped"]),
            "tokens_per_second": round(speed, 1),
            "step_seconds": round(seconds / steps, 5),
            "data_wait_seconds": round(waited / steps, 5),
            "model_flops_per_second": flops,
        }
        if peak is not None:
            record["mfu"] = flops / (peak * self.program.mesh.size)
        self.writer.write(record)
        self.reporter.train(record)

    def halt(self, step: int, values: dict[str, float]) -> None:
        """Stops at a step that was not applied."""
        self.checkpoints.wait()
        documents = sorted({key for row in self.feed.documents(step - 1) for key in row})
        shown = ", ".join(documents[:5]) + (f" and {len(documents) - 5} more" if len(documents) > 5 else "")
        latest = self.checkpoints.latest()
        raise TrainingHaltedError(
            f"step {step}: loss sum {values['objective']}, gradient norm {values['grad_norm']}; the update was not"
            f" applied. Documents in its batch: {shown}. Last good checkpoint:"
            f" {'none' if latest is None else f'step {latest}'}. Lower optim.peak_lr, look at these documents, or set"
            " train.non_finite to skip."
        )

    def evaluate(self, step: int, state: TrainState, clock: "_Clock") -> bool:
        """Evaluates, logs and returns whether this is the best so far."""
        assert self.feed.validation is not None
        started = time.monotonic()
        params = self.program.evaluated(state)

        def on_batch(done: int) -> None:
            self.watch.alive()
            self.reporter.evaluating(done, total)

        total = self.feed.validation_batches
        result = evaluate(
            self.program.eval_step,
            params,
            self.feed.validation(),
            self.program.mesh,
            summarise=self.program.summarise,
            tokens_per_byte=self.feed.tokens_per_byte,
            on_batch=on_batch,
        )
        took = time.monotonic() - started
        clock.leave_out(took)
        tokens_seen = step * self.config.batch_size * self.feed.seq_len
        scored = result.pop("tokens")
        record = {
            "step": step,
            "split": "validation",
            "tokens": tokens_seen,
            "seconds": round(clock.total, 3),
            **result,
            "scored_tokens": int(scored),
            "evaluation_seconds": round(took, 3),
        }
        self.writer.write(record)
        self.reporter.evaluated(record)
        self.validation = result
        better = is_better(self.config.best, result[self.config.best], self.progress.best_value)
        if better:
            self.progress.best_step, self.progress.best_value, self.progress.stale = step, result[self.config.best], 0
        else:
            self.progress.stale += 1
        return better

    def save(self, step: int, state: TrainState, clock: "_Clock") -> None:
        """Starts a checkpoint, once a step."""
        if self.saved == step:
            return
        started = time.monotonic()
        self.progress.seconds = clock.total
        extra = {
            "examples": step * self.config.batch_size,
            "tokenizer": self.fingerprint,
            "progress": dataclasses.asdict(self.progress),
        }
        self.checkpoints.save(step, self.program.storage.stored(state), extra, best=self.progress.best_step)
        self.saved = step
        self.watch.alive()
        if self.progress.best_step is not None:
            best = {"step": self.progress.best_step, "metric": self.config.best, "value": self.progress.best_value}
            self.run_directory.write("best.json", best)
        clock.leave_out(time.monotonic() - started)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


class _Clock:
    """Time spent training, without evaluating and saving; time spent waiting for data."""

    def __init__(self, already: float):
        self._origin = time.monotonic() - already
        self._mark = time.monotonic()
        self._waited = 0.0
        self._steps = 0

    @property
    def total(self) -> float:
        return time.monotonic() - self._origin

    def wait_for(self, batches: Iterator[Batch]) -> Batch:
        started = time.monotonic()
        batch = next(batches)
        self._waited += time.monotonic() - started
        return batch

    def step_done(self, restart: bool) -> None:
        """Counts a step, or starts anew after it: the first one of a session compiles."""
        self._steps += 1
        if restart:
            self.take()

    def leave_out(self, seconds: float) -> None:
        self._origin += seconds
        self._mark += seconds

    def take(self) -> tuple[float, float, int]:
        """Seconds, seconds waited and steps since the last call."""
        now = time.monotonic()
        taken = max(now - self._mark, 1e-9), self._waited, max(self._steps, 1)
        self._mark, self._waited, self._steps = now, 0.0, 0
        return taken
