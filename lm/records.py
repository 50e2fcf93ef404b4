"""Run directories: what a run writes about itself, and how later commands read it.

config.json environment.json status.json best.json metrics.jsonl tensorboard/ tokenizer/ checkpoints/<step>/ frozen/
samples.jsonl log.txt loss.png
"""

import fcntl
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from lm.errors import UserError, check

PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
    "tokenizers",
    "sentencepiece",
    "tensorflow-datasets",
)
# Written before config.json makes it a run.
BEGUN = {"log.txt", "environment.json", "dataset.json", "tokenizer", "pretrained"}
STATES = ("running", "finished", "preempted", "failed")

# Fields of a record that say how long something took: all others are the same in every run of the same settings.
TIMINGS = (
    "seconds",
    "tokens_per_second",
    "step_seconds",
    "data_wait_seconds",
    "model_flops_per_second",
    "evaluation_seconds",
)

_TEMPORARY = ".writing-"


def write_json(path: Path, value: Any) -> None:
    """Writes JSON so that a reader finds the old file or the new one, never half of one."""
    temporary = path.with_name(f"{_TEMPORARY}{os.getpid()}-{path.name}")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


class RunDirectory:
    """One run's folder. Held by at most one training process at a time, or by the first of several that train together.

    Args:
      path: the folder.
      writes: whether this process writes what is written once; of several that train together, the first one does.
    """

    def __init__(self, path: Path, *, writes: bool = True):
        self.path, self.writes = path, writes
        self._lock: IO[str] | None = None

    @staticmethod
    def check_new(path: Path) -> None:
        """Raises UserError if a new run can't be made in `path`; writes nothing."""
        if path.exists():
            check(path.is_dir(), f"{path} is a file; choose another folder with --run")
            written = {entry.name for entry in path.iterdir() if not entry.name.startswith(_TEMPORARY)}
            check(
                written <= BEGUN,
                f"{path} is not empty; resume it with `lm train --resume {path}`, or choose another folder with --run",
            )
        parent = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
        check(
            parent.is_dir() and os.access(parent, os.W_OK | os.X_OK),
            f"can't write the run directory {path}: {parent} is not a writable folder; choose another with --run",
        )

    @classmethod
    def create(cls, path: Path, *, writes: bool = True) -> "RunDirectory":
        """Makes a new run directory; raises UserError as `check_new` does, or if the disk refuses."""
        if not writes:
            return cls(path, writes=False)
        cls.check_new(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            (path / "log.txt").touch()
        except OSError as error:
            raise UserError(
                f"can't write the run directory {path} ({error.strerror}); choose another folder with --run"
            ) from error
        return cls(path)

    @classmethod
    def open(cls, path: Path, *, writes: bool = True) -> "RunDirectory":
        """An existing run directory.

        Raises:
          UserError: there is none.
        """
        check(
            (path / "config.json").is_file(),
            f"{path} is not a run directory (it has no config.json); give the folder that `lm train` printed",
        )
        return cls(path, writes=writes)

    def lock(self) -> None:
        """Takes the run for this process until it ends, however it ends.

        Raises:
          UserError: another process trains this run, or it can't be written to.
        """
        if not self.writes:
            return
        try:
            file = (self.path / "log.txt").open("a", encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"{self.path} can't be written to ({error.strerror}); make it writable, or train a copy of it"
            ) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            raise UserError(f"another process is training {self.path}; wait for it or stop it first") from error
        self._lock = file

    def unlock(self) -> None:
        """Lets go of the run."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    @property
    def checkpoints(self) -> Path:
        """Folder of checkpoints, one subfolder a step."""
        return self.path / "checkpoints"

    @property
    def frozen(self) -> Path:
        """Checkpoint of the parameters that are frozen whole, written once; only where there are any."""
        return self.path / "frozen"

    @property
    def pretrained(self) -> Path:
        """What an imported model said of itself, for export: its config.json and tokenizer files; often not there."""
        return self.path / "pretrained"

    @property
    def tokenizer(self) -> Path:
        """Folder of the tokenizer."""
        return self.path / "tokenizer"

    def write(self, name: str, value: Any) -> None:
        """Writes one of the JSON files, once."""
        if self.writes:
            write_json(self.path / name, value)

    def read(self, name: str, *keys: str) -> Any:
        """Reads one of the JSON files, which is to be an object with these keys.

        Raises:
          UserError: it is missing, not JSON, or lacks a key.
        """
        try:
            value = json.loads((self.path / name).read_text(encoding="utf-8"))
            if not isinstance(value, dict) or not all(key in value for key in keys):
                raise ValueError(f"it is not an object with {', '.join(keys) or 'settings'}")
            return value
        except (OSError, ValueError) as error:
            raise UserError(f"can't read {self.path / name}: {error}; the run directory is damaged") from error

    def set_status(self, state: str, **details: Any) -> None:
        """Records `running`, `finished`, `preempted` or `failed`, with details such as the step."""
        assert state in STATES
        self.write("status.json", {"state": state, "pid": os.getpid(), "time": time.time(), **details})

    def status(self) -> str | None:
        """The recorded state, or None before there is one."""
        return self.read("status.json", "state")["state"] if (self.path / "status.json").exists() else None

    def metrics(self) -> Iterator[dict[str, Any]]:
        """The lines of `metrics.jsonl`; a last line cut short by a crash is left out."""
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                return


class _Board:
    """TensorBoard's event files, written by whoever calls.

    tensorboardX's `SummaryWriter` writes in a thread that ends at the first error, as on a full disk; the next call
    that finds its queue full then waits for ever. Here the error reaches the caller.
    """

    def __init__(self, folder: Path, purge_step: int | None):
        """Begins a file; TensorBoard forgets what earlier files in the folder say from `purge_step` on."""
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.summary import scalar

        self._event, self._scalar = Event, scalar
        folder.mkdir(exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"))
        if purge_step is not None:
            log = SessionLog(status=SessionLog.START)
            self._writer.write_event(Event(wall_time=time.time(), step=purge_step, session_log=log))

    def add(self, name: str, value: float, step: int) -> None:
        """A number."""
        self._writer.write_event(self._event(wall_time=time.time(), step=step, summary=self._scalar(name, value)))

    def flush(self) -> None:
        """What was added is on disk."""
        self._writer.flush()

    def close(self) -> None:
        """Ends the file."""
        self._writer.close()


class MetricWriter:
    """Appends to `metrics.jsonl` and `tensorboard/`, continuing after `step` when a run is resumed."""

    def __init__(self, run: RunDirectory, step: int = 0):
        self._file: IO[str] | None = None
        if not run.writes:
            return
        path = run.path / "metrics.jsonl"
        resumed = path.exists()
        if resumed:
            # What was written after the restored checkpoint will be written again.
            kept = [record for record in run.metrics() if record["step"] <= step]
            temporary = path.with_suffix(".tmp")
            temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
            temporary.replace(path)
        self._file = path.open("a", encoding="utf-8")
        self._board = _Board(run.path / "tensorboard", purge_step=step + 1 if resumed else None)

    def write(self, record: dict[str, Any]) -> None:
        """Writes one record: `step`, `split`, `tokens`, `seconds` and any numbers; a non-finite number becomes null."""
        if self._file is None:
            return
        clean = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in record.items()
        }
        self._file.write(json.dumps(clean) + "\n")
        self._file.flush()
        for key, value in clean.items():
            if key not in ("step", "split") and isinstance(value, (int, float)):
                self._board.add(f"{record['split']}/{key}", value, record["step"])
        if record["split"] != "train":  # they are few, and each flush waits for the disk
            self._board.flush()

    def close(self) -> None:
        """Flushes and closes both."""
        if self._file is not None:
            self._file.close()
            self._board.close()


def environment() -> dict[str, Any]:
    """What a result may depend on besides its config: versions, machine, devices, flags, git state."""
    import jax

    def version(package: str) -> str | None:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None

    devices = jax.devices()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {package: version(package) for package in PACKAGES},
        "devices": {"kind": devices[0].device_kind, "count": len(devices), "processes": jax.process_count()},
        "cpu_affinity": sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        **{name: os.environ.get(name, "") for name in FLAGS},
        "git": git_state(),
        "command": sys.argv,
    }


# Variables that say how XLA compiles.
FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")


def git_state() -> dict[str, Any] | None:
    """Commit and cleanness of the code that runs, or None outside a checkout."""

    def git(*args: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Where two environments differ in what a bit-for-bit resume depends on, one line each."""
    lines = []
    for key in ("python", "packages", "devices", "cpu_affinity", *FLAGS):
        if before.get(key, now[key]) != now[key]:  # an older version wrote less down
            lines.append(f"{key} was {before.get(key)}, is {now.get(key)}")
    return lines
