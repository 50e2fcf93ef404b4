"""Several processes of Python on this machine, each with some fake devices, for tests of what they do together."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
PREAMBLE = """
import sys
process, processes, port = map(int, sys.argv[1:4])
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
from lm import cluster
settings = cluster.ClusterConfig(coordinator=f"127.0.0.1:{port}", processes=processes, process=process, wait=60)
"""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def environment() -> dict[str, str]:
    """This one's, without what was set for a single process with many devices."""
    kept = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "host_platform_device_count" not in flag]
    return kept | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": " ".join(flags)}


def start(
    code: str,
    processes: int,
    arrive: Sequence[int] | None = None,
    *,
    folder: Path | None = None,
    port: int | None = None,
    arguments: Sequence[str] = (),
) -> list[subprocess.Popen]:
    """Starts the processes that `arrive` (default: all) with `code` behind `PREAMBLE`."""
    port = port or free_port()
    return [
        subprocess.Popen(
            [sys.executable, "-c", PREAMBLE + code, str(process), str(processes), str(port), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
            cwd=folder,
        )
        for process in (range(processes) if arrive is None else arrive)
    ]


def finish(started: Sequence[subprocess.Popen], timeout: float = 120) -> list[tuple[int, str, str]]:
    """Exit status, output and errors of each."""
    try:
        told = [process.communicate(timeout=timeout) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, out, err) for process, (out, err) in zip(started, told)]
