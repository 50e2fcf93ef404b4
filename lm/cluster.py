"""Several processes as one: how they find each other, what they must agree on, and how one's trouble reaches all.

Everything here is also right for a process alone, where it does nothing.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from lm.errors import UserError, check


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """The processes of a run; each is started with the same command, on its own devices."""

    launcher: Literal["auto", "explicit", "none"] = "auto"
    """How processes find each other: auto = as SLURM, Open MPI, GKE (JobSet) or Cloud TPU tell, where one of them has
    started several; explicit = by the settings below; none = a process alone."""
    coordinator: str | None = None
    """HOST:PORT of the first process, where the others ask for it; sets launcher to explicit."""
    processes: int | None = None
    """How many processes there are; for launcher explicit."""
    process: int | None = None
    """Which one this is, from 0; for launcher explicit."""
    wait: int = 300
    """Seconds to wait for all processes to arrive."""
    heartbeat: int = 100
    """Seconds without a sign of life after which a process counts as lost, and all others end."""

    def __post_init__(self) -> None:
        """Checks what can be told by itself."""
        given = {name: getattr(self, name) for name in ("coordinator", "processes", "process")}
        named = [f"cluster.{name}" for name, value in given.items() if value is not None]
        check(
            not named or len(named) == len(given),
            f"{' and '.join(named)} given; processes find each other by cluster.coordinator, cluster.processes and"
            " cluster.process, all three",
        )
        check(
            self.launcher != "explicit" or named,
            "cluster.launcher is explicit; give cluster.coordinator, cluster.processes and cluster.process",
        )
        check(self.launcher != "none" or not named, f"cluster.launcher is none, and {', '.join(named)} is given")
        for name in ("wait", "heartbeat"):
            check(getattr(self, name) >= 1, f"cluster.{name} is {getattr(self, name)}; it must be at least 1 (seconds)")
        if self.coordinator is not None:
            assert self.processes is not None
            assert self.process is not None
            host, colon, port = self.coordinator.rpartition(":")
            check(
                host and colon and port.isdigit() and 1 <= int(port) <= 65535,
                f"cluster.coordinator is {self.coordinator!r}; write HOST:PORT of the first process, the port from 1 to"
                " 65535",
            )
            check(self.processes >= 1, f"cluster.processes is {self.processes}; it must be at least 1")
            check(
                0 <= self.process < self.processes,
                f"cluster.process is {self.process}; with cluster.processes {self.processes} it is from 0 to"
                f" {self.processes - 1}",
            )


def join(config: ClusterConfig, *, launched: bool = False) -> None:
    """Meets the other processes; before anything asks JAX for devices.

    Args:
      config: how.
      launched: whether a launcher that JAX knows has started several processes, for `auto`.

    Raises:
      UserError: not all of them arrived in time, two say that they are the same, or the launcher says nothing that
        JAX understands.
    """
    explicit = config.coordinator is not None
    if not explicit and (config.launcher == "none" or not launched):
        return
    if explicit:  # JAX's own client ends the process, with a stack trace, where somebody is missing
        assert config.coordinator is not None
        host, _, port = config.coordinator.rpartition(":")
        call = _call_the_roll if config.process == 0 else _answer
        call(host, int(port), config)
    try:
        jax.distributed.initialize(  # without names it asks the launcher
            coordinator_address=config.coordinator,
            num_processes=config.processes,
            process_id=config.process,
            initialization_timeout=config.wait,
            heartbeat_timeout_seconds=config.heartbeat,
        )
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"the processes could not be joined: {reason}; look at what the launcher told them") from None


_READY = b"go\n"
_SAYS_WITHIN = 2.0
"""Seconds for a process that has connected to say who it is, which it does at once."""


def _call_the_roll(host: str, port: int, config: ClusterConfig) -> None:
    """Waits, as the first process, for all others to say who they are, and tells them to go on."""
    assert config.processes is not None
    deadline = time.monotonic() + config.wait
    arrived: set[int] = set()
    lines: list[socket.socket] = []
    with contextlib.ExitStack() as open_sockets:
        try:
            server = open_sockets.enter_context(socket.create_server(("", port), backlog=config.processes))
        except OSError as error:
            raise UserError(
                f"process 0 can't listen on port {port} of cluster.coordinator {host}:{port} ({error.strerror}); choose"
                " a free port of this machine"
            ) from None
        problem: str | None = None
        while len(arrived) + 1 < config.processes and problem is None:
            server.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                found = open_sockets.enter_context(server.accept()[0])
            except TimeoutError:
                missing = [i for i in range(1, config.processes) if i not in arrived]
                problem = (
                    f"{len(arrived) + 1} of {config.processes} processes arrived within cluster.wait = {config.wait}"
                    f" seconds; missing are {', '.join(map(str, missing[:8]))}{', …' if missing[8:] else ''}"
                )
                continue
            except OSError:  # gone again
                continue
            found.settimeout(_SAYS_WITHIN)
            try:
                process, processes = map(int, found.makefile("r").readline(100).split())
            except (OSError, ValueError):
                continue  # none of ours: a health check, a scanner of ports
            if processes != config.processes:
                problem = (
                    f"process {process} was started with cluster.processes {processes}, and process 0 with"
                    f" {config.processes}; give all the same"
                )
            elif process in arrived or process == 0:
                problem = f"two processes were started with cluster.process {process}; give each its own"
            arrived.add(process)
            lines.append(found)
        for found in lines:
            with contextlib.suppress(OSError):
                found.sendall(_READY if problem is None else f"{problem}\n".encode())
        check(problem is None, problem or "")


def _answer(host: str, port: int, config: ClusterConfig) -> None:
    """Says to the first process who this is, and waits for its word."""
    deadline = time.monotonic() + config.wait
    reason = "no answer"
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((host, port), timeout=max(deadline - time.monotonic(), 0.01)) as first:
                first.sendall(f"{config.process} {config.processes}\n".encode())
                # The first process may wait a little longer, as it may have started later.
                first.settimeout(max(deadline - time.monotonic(), 0) + 5)
                told = first.makefile("rb").readline()
            if told == _READY:
                return
            check(not told, told.decode(errors="replace").strip())
        except OSError as error:
            reason = error.strerror or str(error)
        time.sleep(0.2)
    raise UserError(
        f"process {config.process} of {config.processes} did not find process 0 at cluster.coordinator {host}:{port}"
        f" within cluster.wait = {config.wait} seconds ({reason}); start it, or correct the address"
    )


LEAVING = 10.0
"""Seconds within which what goes wrong in one process has gone wrong in all, where it does in all."""


class Watch:
    """While entered, each process learns at once that another has ended without a word, as one that is killed does.

    JAX learns of it by its own heartbeat, after `cluster.heartbeat`, and then ends the process with a stack trace;
    until then a process waits for what the lost one was to send. Here every process holds a connection to the first,
    which the system closes with the process.

    A process that leaves by an error of its own, such as a full disk of one host, says so; JAX would then have it and
    the others wait for each other. What goes wrong in all of them, each tells by itself.
    """

    def __init__(self, lost: Callable[[str, bool], None]):
        """`lost` is called from another thread and should end this process.

        It is given what became of the other one, and whether that one waits at its end for `part` of all others.
        """
        self._lost = lost
        self._undo = contextlib.ExitStack()
        self._lines: dict[int, socket.socket] = {}
        self._leaving = threading.Event()

    def __enter__(self) -> Watch:
        count = jax.process_count()
        if count == 1:
            return self
        if jax.process_index() == 0:
            server = socket.create_server(("", 0), backlog=count)
            gathered([socket.gethostname(), server.getsockname()[1]])
            server.settimeout(60)
            with server:
                while len(self._lines) < count - 1:
                    line = server.accept()[0]
                    line.settimeout(_SAYS_WITHIN)
                    try:
                        self._lines[int(line.makefile("r").readline(100))] = line
                    except (OSError, ValueError):  # none of ours
                        line.close()
        else:
            host, port = gathered(None)[0]
            # On the first one's own host its name may lead nowhere.
            host = "127.0.0.1" if host == socket.gethostname() else host
            line = socket.create_connection((host, port), timeout=60)
            line.sendall(f"{jax.process_index()}\n".encode())
            self._lines[0] = line
        for process, line in self._lines.items():
            line.settimeout(None)
            line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            self._undo.callback(line.close)
            watcher = threading.Thread(target=self._listen, args=(process, line), name=f"watch {process}", daemon=True)
            watcher.start()
        return self

    def _listen(self, process: int, line: socket.socket) -> None:
        try:
            told = line.makefile("r").readline()
        except OSError:
            told = ""
        if told == "bye\n" or self._leaving.is_set():
            return
        # The first process passes on what it hears: `lost 3` or `failed 3`.
        kind, _, number = told.strip().partition(" ")
        failed, gone = kind == "failed", int(number) if number.isdigit() else process
        if failed and self._leaving.wait(LEAVING):
            return
        if jax.process_index() == 0:
            self._say(f"{'failed' if failed else 'lost'} {gone}\n")
        became = "failed, as its own output says" if failed else "ended without a word"
        self._lost(f"process {gone} {became}", failed)

    def _say(self, text: str) -> None:
        for line in self._lines.values():
            with contextlib.suppress(OSError):
                line.sendall(text.encode())

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._leaving.set()
        self._say("bye\n" if kind is None else f"failed {jax.process_index()}\n")
        self._undo.close()


def part(seconds: float = 10.0) -> None:
    """Lets go of a process that waits at its end for this one, which is about to end too; gives up after `seconds`."""
    leaving = threading.Thread(target=jax.distributed.shutdown, name="part", daemon=True)
    leaving.start()
    leaving.join(seconds)


class Anyone:
    """Asks at every step whether any process wants something, such as to stop, without making a device wait.

    All processes get the same answer at the same step: what was asked at a step is known at the next.
    """

    def __init__(self, mesh: jax.sharding.Mesh):
        """`mesh` is of all processes."""
        self._rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(mesh.axis_names))
        whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        self._any = jax.jit(jnp.max, in_shardings=self._rows, out_shardings=whole)
        self._shape = (mesh.size,)
        self._local = mesh.local_mesh.size
        self._asked: jax.Array | None = None

    def ask(self, mine: bool) -> bool:
        """Says what this process wants, and returns whether any wanted it when this was called last."""
        if jax.process_count() == 1:
            return mine
        before, flags = self._asked, np.full(self._local, mine, np.int32)
        self._asked = self._any(jax.make_array_from_process_local_data(self._rows, flags, self._shape))
        return before is not None and bool(jax.device_get(before))


def leads() -> bool:
    """Whether this is the process that speaks, and writes what is written once; asks no device where there is one."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def gathered(value: Any) -> list[Any]:
    """What each process gives, in their order; JSON-ready values of any size."""
    if jax.process_count() == 1:
        return [value]
    text = json.dumps(value, ensure_ascii=False, sort_keys=True).encode()
    sizes = np.asarray(multihost_utils.process_allgather(np.array(len(text), np.int32))).reshape(-1)
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(text)] = np.frombuffer(text, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(sizes), -1)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes)]


def wait_for_all(name: str) -> None:
    """Returns when every process is here; `name` says where, and is the same for all."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def check_agreed(facts: Mapping[str, Any], same: str = "the same code, versions and settings") -> None:
    """Raises `UserError` in every process where one has another value than the first.

    Args:
      facts: JSON-ready values by what they are called.
      same: what all are to be started with.
    """
    told = gathered(dict(facts))
    for name in told[0]:
        for process, theirs in enumerate(told):
            check(
                theirs.get(name) == told[0][name],
                f"process {process} has {name} {_short(theirs.get(name))}, and process 0 {_short(told[0][name])};"
                f" start all processes with {same}",
            )


def check_shared_out(what: str, mine: list[int], total: int) -> None:
    """Raises `UserError` in every process unless `total` numbers are shared out among the processes.

    Two have the same numbers, as where the devices that split a row belong to several, or none in common.
    """
    told = [set(numbers) for numbers in gathered(mine)]
    for process, numbers in enumerate(told):
        for other, theirs in enumerate(told[:process]):
            both = sorted(numbers & theirs)
            check(
                not both or numbers == theirs,
                f"{what} {both[:5]} belong to process {other} and to process {process}, which share no others; check"
                " cluster.process of each",
            )
    missing = sorted(set(range(total)).difference(*told))
    check(not missing, f"{what} {missing[:5]} of {total} belong to no process; check cluster.process of each")


SEEN_WITHIN = 60.0
"""Seconds within which what one host writes is there for all: so long NFS remembers of a name that nothing has it."""


def check_shared(folder: Path) -> None:
    """Raises `UserError` in every process unless `folder` is the same for all, and each can write there.

    Args:
      folder: as each process finds it; the first one has it.
    """
    told = gathered([socket.gethostname(), secrets.token_hex(8), str(folder.absolute())])
    if len(told) == 1:
        return
    (first, token, theirs), me = told[0], jax.process_index()
    # Hidden, and named as `RunDirectory` names what is being written: one that is left behind is in nobody's way.
    marks = [folder / f".writing-{token}-{process}" for process in range(len(told))]
    try:
        with agreeing():
            if me == 0:
                _write_mark(marks[0])
        with agreeing():
            deadline = time.monotonic() + SEEN_WITHIN
            while not (seen := marks[0].exists()) and time.monotonic() < deadline:
                time.sleep(0.2)
            found = "another folder" if folder.is_dir() else "not there"
            check(
                seen,
                f"{folder.absolute()} on host {told[me][0]} is {found}, not the {theirs} of process 0 on host {first};"
                " all processes of a run write its checkpoints together: give --run a folder of a file system that all"
                " hosts share",
            )
            if me != 0:
                _write_mark(marks[me])
    finally:
        for mark in marks if me == 0 else [marks[me]]:
            with contextlib.suppress(OSError):
                mark.unlink(missing_ok=True)


def _write_mark(path: Path) -> None:
    try:
        path.touch()
    except OSError as error:
        raise UserError(
            f"can't write to {path.parent.absolute()} on host {socket.gethostname()} ({error.strerror}); all processes"
            " of a run write its checkpoints together: make it writable there, or choose another folder with --run"
        ) from None


@contextlib.contextmanager
def agreeing() -> Iterator[None]:
    """What goes wrong in one process within, as a UserError, is raised in all, which would wait for it otherwise.

    Everything within is local: a process that waits for others there would wait for one that failed.
    """
    failure: str | None = None
    own: UserError | None = None
    try:
        yield
    except UserError as error:
        failure, own = str(error), error
    told = gathered(failure)
    if own is not None:
        raise own
    for process, message in enumerate(told):
        check(message is None, f"process {process}: {message}")


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."
