"""Bytes that a run's process grows by, beside those of its plan, as JSON: `python resident.py CONFIG.json`.

The step is compiled first, so that what the compiler takes is in the base.
"""

import ctypes
import gc
import json
import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.pop("XLA_FLAGS", None)

import jax
import numpy as np

from lm.config import Experiment, from_dict
from lm.evaluate import to_devices
from lm.plan.chips import parse_topology
from lm.plan.planning import plan_run
from lm.sharding import make_mesh


def memory(name: str) -> int:
    """A number of bytes from /proc: VmRSS now, VmHWM the most so far."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def main() -> None:
    experiment = from_dict(Experiment, json.loads(Path(sys.argv[1]).read_text()))
    plan, _ = plan_run(experiment, parse_topology("cpu:1"))
    job = plan.job
    mesh = make_mesh(experiment.mesh)
    program = job.program(mesh)
    rng = np.random.default_rng(0)
    batch = {
        name: rng.integers(0, 100, leaf.shape).astype(leaf.dtype)
        if name != "weights"
        else np.ones(leaf.shape, leaf.dtype)
        for name, leaf in job.batch().items()
    }
    with jax.set_mesh(mesh):
        init = program.init.lower().compile()
        step = job.lowered(mesh).compile()
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        before = memory("VmRSS")
        state = jax.block_until_ready(init())
        held = memory("VmRSS") - before
        Path("/proc/self/clear_refs").write_text("5")  # the most so far begins anew
        on_device = to_devices(batch, mesh)
        for _ in range(3):
            state, report = step(state, on_device)
            jax.block_until_ready(report)
    grown = memory("VmHWM") - before
    found = {"planned": plan.total, "analytic": plan.analytic.total, "state": plan.state, "held": held, "grown": grown}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
