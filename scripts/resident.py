"""What `lm plan` says of memory beside what a real run's process grows by: docs/results/resident.md.

    python scripts/resident.py              # every run in a process of its own; a Markdown table
    python scripts/resident.py unrolled     # one of them; JSON, in bytes

Each run has more than a gigabyte of state and trains three steps on one CPU device. Its step is compiled first, so that
what the compiler takes is in the base and not in the growth. Linux alone: /proc tells what a process takes.
"""

import ctypes
import dataclasses
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.pop("XLA_FLAGS", None)

import jax
import numpy as np

from lm.config import Experiment
from lm.data.config import DataConfig
from lm.evaluate import to_devices
from lm.models.presets import gpt2, llama
from lm.plan.chips import parse_topology
from lm.plan.planning import plan_run
from lm.sharding import make_mesh
from lm.tasks.causal_lm import CausalLM
from lm.text.tokenizer import TokenizerConfig
from lm.train import TrainConfig

_GPT2 = gpt2("small", vocab_size=16384, max_len=256, unroll=1)
_WIDE = {"d_model": 1024, "d_ff": 2816, "n_layers": 8, "n_heads": 16, "n_kv_heads": 4, "vocab_size": 16384}

# Model, rows of 256 tokens in a step, parts that they come in.
RUNS = {
    "plain": (_GPT2, 4, 1),
    "unrolled": (dataclasses.replace(_GPT2, unroll=0), 4, 1),
    "products kept": (dataclasses.replace(_GPT2, remat="dots"), 8, 1),
    "recomputed in parts": (llama("tiny", **_WIDE, remat="full", unroll=1), 8, 2),
}


def experiment_of(name: str) -> Experiment:
    """The settings of a run."""
    model, rows, parts = RUNS[name]
    return Experiment(
        model=model,
        data=DataConfig(seq_len=256),
        tokenizer=TokenizerConfig(kind="byte"),
        task=CausalLM(),
        train=TrainConfig(steps=10, batch_size=rows, accumulate=parts),
    )


def memory(name: str) -> int:
    """Bytes from /proc: VmRSS now, VmHWM the most so far."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def measure(experiment: Experiment) -> dict[str, int]:
    """Bytes that are planned for a run, and those that this process grows by while it trains."""
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
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what the compiler has freed goes back, and is not used again unseen
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
    return found | {"parameters": plan.parameters}


def main() -> None:
    if len(sys.argv) > 1:
        if sys.argv[1] not in RUNS:
            raise SystemExit(f"no run {sys.argv[1]!r}; there are {', '.join(map(repr, RUNS))}")
        print(json.dumps(measure(experiment_of(sys.argv[1]))))
        return
    print("| run | parameters | state, GB | planned, GB | process grows by, GB | planned / grown |")
    print("|---|---:|---:|---:|---:|---:|")
    for name in RUNS:
        done = subprocess.run([sys.executable, __file__, name], capture_output=True, text=True, check=True)
        found = json.loads(done.stdout)
        sizes = [f"{found[what] / 1e9:.3f}" for what in ("state", "planned", "grown")]
        ratio = found["planned"] / found["grown"]
        print(f"| {name} | {found['parameters'] / 1e6:.1f}M | {' | '.join(sizes)} | {ratio:.3f} |", flush=True)


if __name__ == "__main__":
    main()
