"""Evaluation: sums over batches, divided once."""

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lm import metrics
from lm.hardware import compiler_options
from lm.models.transformer import Transformer
from lm.sharding import DEFAULT_RULES, Rules, batch_sharding, ruled
from lm.tasks import Task

# What a step gives back: name -> sum over the batch, and where errors are wanted "rows": name -> each row's sum, [B].
# Sums of rows are added up here and take the place of the batch's.
EvalSums = dict[str, Any]
EvalStep = Callable[[Any, dict[str, jax.Array]], EvalSums]


def to_devices(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows of a batch as global arrays, rows spread over `data` and `fsdp`."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items()}


def make_eval_step(
    model: Transformer, task: Task, mesh: Mesh, param_shardings: Any, rules: Rules = DEFAULT_RULES
) -> EvalStep:
    """A jitted `(params, batch) -> sums`; no dropout."""

    def step(params: Any, batch: dict[str, jax.Array]) -> EvalSums:
        return task.loss(model, params, batch, None)[1]

    return jax.jit(
        ruled(step, rules),
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
    summarise: Callable[[Mapping[str, Any]], dict[str, float]] = metrics.language_model,
    tokens_per_byte: float | None = None,
    on_batch: Callable[[int], None] = lambda done: None,
) -> dict[str, float]:
    """Runs `eval_step` over `batches`.

    Args:
      eval_step: from `make_eval_step`.
      params: the parameters, sharded as it expects.
      batches: this process's rows of each batch.
      mesh: the mesh of all.
      summarise: from the sums over all batches to what is reported, as the task wants it; sums are float64, of the
        shape that the step gives them, and what it gives under `rows`, name -> `[B]`, comes as `metrics.row_moments`.
      tokens_per_byte: of the whole split, to report bits per byte, where the loss is one per token.
      on_batch: called with the number of batches done.

    Returns:
      What `summarise` makes of it (of a language model: `loss`, `perplexity`, `accuracy` and their standard errors),
      `tokens` (the sum `weight`: what was scored) and, if asked for, `bits_per_byte` with its standard error.
    """
    total: dict[str, Any] = {}
    # Batches are read back one late, so that the device never waits for the host; sums add up in float64 here.
    waiting: EvalSums | None = None

    def add(sums: EvalSums | None) -> None:
        read = dict(jax.device_get(sums or {}))
        if "rows" in read:
            read |= metrics.row_moments(read["rows"])  # of which one is named `rows`: how many there were
        for name, value in read.items():
            total[name] = total.get(name, 0.0) + np.asarray(value, np.float64)

    for done, batch in enumerate(batches):
        sums = eval_step(params, to_devices(batch, mesh))
        add(waiting)
        waiting = sums
        on_batch(done + 1)
    add(waiting)
    result = summarise(total)
    result["tokens"] = float(total["weight"])
    if tokens_per_byte is not None:
        for name in ("", "_se"):
            if f"loss{name}" in result:
                result[f"bits_per_byte{name}"] = metrics.bits_per_byte(result[f"loss{name}"], tokens_per_byte, 1.0)
    return result


def spoken(
    say: Callable[[Any, dict[str, jax.Array]], dict[str, jax.Array]],
    params: Any,
    batches: Iterable[Mapping[str, np.ndarray]],
    mesh: Mesh,
) -> Iterator[dict[str, np.ndarray]]:
    """`say(params, batch)` of each batch, its arrays `[B, …]` on the host: the rows of all processes, in each."""
    program = jax.jit(
        say,
        in_shardings=(jax.tree.map(lambda x: x.sharding, params), batch_sharding(mesh)),
        out_shardings=NamedSharding(mesh, PartitionSpec()),
        compiler_options=compiler_options(mesh),
    )
    for batch in batches:
        yield jax.device_get(program(params, to_devices(batch, mesh)))


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
