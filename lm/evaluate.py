"""Evaluation: sums over batches, divided once."""

import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lm import metrics
from lm.models.transformer import Transformer
from lm.sharding import batch_sharding, compiler_options
from lm.tasks.causal_lm import CausalLM

EvalStep = Callable[[Any, dict[str, jax.Array]], dict[str, jax.Array]]


def to_devices(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows of a batch as global arrays, rows spread over `data` and `fsdp`."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}


def make_eval_step(model: Transformer, task: CausalLM, mesh: Mesh, param_shardings: Any) -> EvalStep:
    """A jitted `(params, batch) -> sums`; no dropout."""

    def step(params: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return task.loss(model, params, batch, None)[1]

    return jax.jit(
        step,
        in_shardings=(param_shardings, batch_sharding(mesh)),
        out_shardings=NamedSharding(mesh, PartitionSpec()),
        compiler_options=compiler_options(mesh),
    )


def evaluate(
    eval_step: EvalStep,
    params: Any,
    batches: Iterable[Mapping[str, np.ndarray]],
    mesh: Mesh,
    *,
    tokens_per_byte: float | None = None,
    on_batch: Callable[[int], None] = lambda done: None,
) -> dict[str, float]:
    """Runs `eval_step` over `batches`.

    Args:
      eval_step: from `make_eval_step`.
      params: the parameters, sharded as it expects.
      batches: this process's rows of each batch.
      mesh: the mesh of all.
      tokens_per_byte: of the whole split, to report bits per byte.
      on_batch: called with the number of batches done.

    Returns:
      `loss` (nats per token), `perplexity`, `accuracy`, `tokens` (scored) and, if asked for, `bits_per_byte`.
    """
    total: dict[str, np.float64] = {}
    # Batches are read back one late, so that the device never waits for the host; sums add up in float64 here.
    waiting: dict[str, jax.Array] | None = None

    def add(sums: dict[str, jax.Array] | None) -> None:
        for name, value in (sums or {}).items():
            total[name] = total.get(name, np.float64(0)) + np.float64(jax.device_get(value))

    for done, batch in enumerate(batches):
        sums = eval_step(params, to_devices(batch, mesh))
        add(waiting)
        waiting = sums
        on_batch(done + 1)
    add(waiting)
    result = metrics.summarise({name: float(value) for name, value in total.items()})
    result["tokens"] = float(total["weight"])
    if tokens_per_byte is not None:
        result["bits_per_byte"] = metrics.bits_per_byte(result["loss"], tokens_per_byte, 1.0)
    return result


def baselines(documents: Iterable[bytes]) -> dict[str, float]:
    """Bits per byte of two codes that know nothing of language, on the same text.

    `order0_bits_per_byte` is the entropy of the text's own byte frequencies: what a code that sees one byte at a time
    could reach. `zlib_bits_per_byte` is what zlib at level 9 makes of the documents in a row.
    """
    counts = np.zeros(256, np.int64)
    packer = zlib.compressobj(9)
    packed = 0
    for document in documents:
        counts += np.bincount(np.frombuffer(document, np.uint8), minlength=256)
        packed += len(packer.compress(document))
    packed += len(packer.flush())
    total = counts.sum()
    share = counts[counts > 0] / total
    return {
        "order0_bits_per_byte": float(-(share * np.log2(share)).sum()),
        "zlib_bits_per_byte": float(8 * packed / total),
    }
