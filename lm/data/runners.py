"""Runs many small tasks: here, in several processes, or on Apache Beam.

A task is a picklable function of nothing that leaves a file or a folder, `output`, which appears only when it is
whole. What is done therefore stays done, whoever is killed: the next call skips it. Tasks hand results on through
files, never through the runner, so the result is the same on one machine and on a thousand; their folder must be one
that all workers see.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import io
import json
import logging
import multiprocessing
import os
import re
import shutil
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lm.data.workers import start_worker
from lm.errors import UserError, check, require

log = logging.getLogger(__name__)

_OPTION = re.compile(r"(--)?[A-Za-z]\w*(=.*)?", re.DOTALL)

Report = Callable[[int, int], None]
"""Called with what is done and the total, in the unit of `Task.size`."""


@dataclass(frozen=True, kw_only=True)
class RunnerConfig:
    """Where the work of preparing is done. The dataset is the same to the byte, whatever stands here."""

    runner: str = "local"
    """local (processes of this machine), or a runner of Apache Beam: DirectRunner, FlinkRunner, SparkRunner, …"""
    workers: int = 1
    """Processes at work, for local and DirectRunner; other runners take their number from `options`."""
    options: tuple[str, ...] = ()
    """Passed on to Beam, without their dashes: flink_master=localhost:8081 parallelism=8."""


class Task(Protocol):
    """One piece of work."""

    @property
    def output(self) -> Path:
        """The file or folder that is there once the work is done; no two tasks share one."""
        ...

    @property
    def size(self) -> int:
        """How much work it is, for the progress bar; only ratios count."""
        ...

    def __call__(self) -> None:
        """Does the work and makes `output` appear, as `whole_file` and `whole_output` do."""
        ...


def check_runner_config(config: RunnerConfig) -> None:
    """Raises `UserError` if the runner cannot be had."""
    check(config.workers >= 1, f"--workers is {config.workers}; it must be at least 1")
    if config.runner == "local":
        check(not config.options, f"--options {' '.join(config.options)} are for Beam; choose --runner DirectRunner")
        return
    _beam()
    from apache_beam.runners import runner as runners

    try:
        runner = runners.create_runner(config.runner)
    except (ValueError, ImportError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"--runner is {config.runner!r}; choose local, DirectRunner or another runner of Apache Beam ({reason})"
        ) from None
    _check_options(config, runner)


def _check_options(config: RunnerConfig, runner: Any) -> None:
    """Raises `UserError` for options that Beam would refuse in its own way, or drop without a word."""
    from apache_beam.runners.portability.portable_runner import PortableRunner

    given = f"--options {' '.join(config.options)}"
    for option in config.options:
        check(_OPTION.fullmatch(option), f"{given}: {option!r} is no option; write each as NAME or NAME=VALUE")
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint), _quiet():
            options = _beam_options(config)
            known = options.get_all_options()
            unknown = sorted(set(options.get_all_options(retain_unknown_options=True)) - set(known))
    except SystemExit:  # its parser is made for whole programs
        reason = complaint.getvalue().strip().splitlines()[-1].partition("error: ")[2]
        raise UserError(f"{given}: {reason or 'Beam does not take them'}") from None
    if unknown and isinstance(runner, PortableRunner):  # the server that it hands the work to has options of its own
        log.warning("%s: Beam does not know %s; %s may", given, ", ".join(unknown), config.runner)
    elif unknown:
        near = difflib.get_close_matches(unknown[0], known, n=1)
        meant = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"{given}: Beam does not know {unknown[0]}{meant}; correct it or leave it out")


def run_tasks(tasks: Sequence[Task], config: RunnerConfig, report: Report) -> None:
    """Runs the tasks whose output is not there yet, in no particular order.

    Raises:
      UserError: what a task raised; the first in the order of tasks if several did.
      OSError: what a task raised, such as a full disk.
    """
    total = sum(task.size for task in tasks)
    waiting = [task for task in tasks if not task.output.exists()]
    done = total - sum(task.size for task in waiting)
    report(done, total)
    if not waiting:
        return
    if config.runner != "local":
        _run_on_beam(waiting, config)
        report(total, total)
        return
    finished = _in_turn(waiting) if config.workers == 1 or len(waiting) == 1 else _in_processes(waiting, config.workers)
    for task in finished:
        done += task.size
        report(done, total)


def _in_turn(tasks: Sequence[Task]) -> Iterator[Task]:
    for task in tasks:
        task()
        yield task


def _in_processes(tasks: Sequence[Task], workers: int) -> Iterator[Task]:
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of tokenizers' threads
    executor = ProcessPoolExecutor(min(workers, len(tasks)), context, initializer=start_worker)
    try:
        futures = {executor.submit(_call, task): task for task in tasks}
        for future in as_completed(futures):
            future.result()
            yield futures[future]
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _call(task: Task) -> None:
    task()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what others log, errors aside."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _beam():
    """Apache Beam, without the advice it logs on import about services that are not used here."""
    with _quiet():
        return require("apache_beam", extra="beam", need="--runner")


def _beam_options(config: RunnerConfig):
    from apache_beam.options.pipeline_options import PipelineOptions

    # Without dashes, as a command line would take `--options --a=1 --b=2` for options of its own.
    flags = ["--default_sdk_harness_log_level=ERROR", *(f"--{option.removeprefix('--')}" for option in config.options)]
    if config.runner == "DirectRunner" and config.workers > 1:
        flags += [f"--direct_num_workers={config.workers}", "--direct_running_mode=multi_processing"]
    return PipelineOptions(flags)


def _run_on_beam(tasks: Sequence[Task], config: RunnerConfig) -> None:
    beam = _beam()
    logging.getLogger("apache_beam").setLevel(logging.ERROR)
    try:
        with beam.Pipeline(runner=config.runner, options=_beam_options(config)) as pipeline:
            # The shuffle between spreads the tasks over the workers; nothing but their descriptions goes through it.
            _ = pipeline | beam.Create(list(tasks)) | beam.Reshuffle() | beam.Map(_call_and_note_failure)
    except (RuntimeError, OSError, ValueError, ImportError) as error:
        # What tasks raise is noted and told below; this is the runner's own trouble: no cluster, no Java, no network.
        log.debug("Beam failed", exc_info=True)
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"--runner {config.runner} could not run the work: {reason}; see docs/data.md") from error
    for task in tasks:
        note = _note_of(task)
        if note.exists():
            failure = json.loads(note.read_text(encoding="utf-8"))
            note.unlink()
            if failure["errno"] is not None:
                raise OSError(failure["errno"], failure["message"])
            raise (UserError if failure["mistake"] else RuntimeError)(failure["message"])


def _call_and_note_failure(task: Task) -> None:
    """Beam tries a failed task again and wraps what it raised; it is noted in a file instead."""
    if task.output.exists():  # a second try of what another worker has done
        return
    try:
        task()
    except Exception as error:
        noted: dict[str, Any] = {"errno": None, "mistake": isinstance(error, UserError), "message": str(error)}
        if isinstance(error, OSError):
            noted |= {"errno": error.errno, "message": error.strerror or str(error)}
        elif not noted["mistake"]:
            noted["message"] = traceback.format_exc()
        with whole_file(_note_of(task)) as path:
            path.write_text(json.dumps(noted), encoding="utf-8")


def _note_of(task: Task) -> Path:
    return task.output.with_name(task.output.name + ".failure")


@contextlib.contextmanager
def whole_file(output: Path) -> Iterator[Path]:
    """A path to write to, which becomes `output` when the body is through, and vanishes if it fails."""
    output.parent.mkdir(parents=True, exist_ok=True)
    part = output.with_name(f"{output.name}.part-{os.getpid()}-{threading.get_ident()}")
    try:
        yield part
        part.replace(output)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_output(output: Path) -> Iterator[Path]:
    """An empty folder to fill, which becomes `output` when the body is through, and vanishes if it fails."""
    part = output.with_name(f"{output.name}.part-{os.getpid()}-{threading.get_ident()}")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        try:
            part.rename(output)
        except OSError as error:  # another worker did the same task: both wrote the same
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
