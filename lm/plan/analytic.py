"""Memory, collectives and memory traffic of a train step from shapes alone, for any number of chips.

A model of what XLA makes of this project's step, not a simulation: it knows the arrays that are large (state,
gradients, what is kept of each layer, attention scores, logits, gathered parameters) and leaves out the rest.
tests/plan/test_analytic.py holds it against compiled programs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from lm import tree
from lm.models.attention import choose_implementation
from lm.models.config import ModelConfig
from lm.models.layers import GATED
from lm.optim import freezing
from lm.plan.chips import Chip
from lm.plan.hlo import Collective
from lm.plan.job import Job, boxed_params, rows_apart
from lm.sharding import parameter_shardings, partition_spec, shardings_like

_FLOAT = 4

# Bytes per attention score that go to and from memory in a step where scores are written out; of kernels that keep
# scores to themselves there are none. Read off compiled programs.
_SCORE_TRAFFIC = 50
# The same for activations, in arrays as wide as the residual stream and as the feed-forward block.
_WIDE_TRAFFIC, _MLP_TRAFFIC = 40, 12
# Bytes per attention score that are in use at the worst moment of the backward pass, by what is computed again; and
# those that programs for TPUs hold besides, in gaps where scores of other moments were.
_SCORE_BYTES = {"none": 4, "dots": 8, "full": 6}
_SCORE_GAPS = {"none": 0.0, "dots": 10.5, "full": 6.7}
_SCORE_GAPS_SMALL = 2.5  # v5e and v6e, of a core with less memory
_GAPS = 0.05


@dataclass(frozen=True)
class Estimate:
    """What a step takes, per device."""

    memory: dict[str, int]
    """Bytes by what they are for; their sum is what is in use at the worst moment."""
    collectives: list[Collective]
    traffic: int
    """Bytes to and from memory."""

    @property
    def total(self) -> int:
        """Bytes in use at the worst moment."""
        return sum(self.memory.values())


@dataclass(frozen=True)
class _Parameter:
    """A parameter as it lies on devices."""

    path: str
    count: int
    itemsize: int
    fsdp: int
    """Devices along `fsdp` that share it, 1 if it is whole on each."""
    tensor: int
    trained: bool

    @property
    def layered(self) -> bool:
        """Whether it is gathered layer by layer."""
        return self.path.split("/")[0] in tree.STACKS


def estimate(job: Job, sizes: Mapping[str, int], chip: Chip | None) -> Estimate:
    """What the step of a job takes on a mesh of such sizes.

    Args:
      job: the run.
      sizes: of the mesh's axes, in their order.
      chip: what it is; None = fake devices of this machine.
    """
    platform = "cpu" if chip is None else chip.platform
    parameters = _parameters(job.plain(), tuple(sizes.items()))
    rows = job.train.batch_size // rows_apart(sizes)
    at_once = rows // job.train.accumulate
    return Estimate(
        memory=_memory(job, sizes, chip, parameters, rows, at_once),
        collectives=_collectives(job, sizes, parameters, at_once),
        traffic=_traffic(job, sizes, platform, parameters, at_once),
    )


def abstract_mesh(sizes: Mapping[str, int]) -> Mesh:
    """A mesh without devices; what reads no more than its axes takes it for one that has them."""
    return cast(Mesh, AbstractMesh(tuple(sizes.values()), tuple(sizes)))


def state_bytes(job: Job, sizes: Mapping[str, int]) -> int:
    """Bytes of the train state on one device of a mesh of such sizes."""
    return _state_bytes(job.plain(), tuple(sizes.items()))


@functools.lru_cache(maxsize=256)  # a search asks for each mesh many times
def _state_bytes(job: Job, sizes: tuple[tuple[str, int], ...]) -> int:
    mesh, shapes = abstract_mesh(dict(sizes)), job.state()
    boxed = boxed_params(job.model, freezing(job.experiment.optim, job.params()).lower)
    return local_bytes(shapes, shardings_like(shapes, nn.unbox(boxed), parameter_shardings(boxed, mesh), mesh))


def local_bytes(shapes: Any, shardings: Any) -> int:
    """Bytes of arrays on one device."""
    return sum(
        math.prod(at.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        for leaf, at in zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings, is_leaf=_is_sharding), strict=True)
    )


def _is_sharding(leaf: Any) -> bool:
    return isinstance(leaf, NamedSharding)


@functools.lru_cache(maxsize=256)
def _parameters(job: Job, sizes: tuple[tuple[str, int], ...]) -> list[_Parameter]:
    boxed, mesh = boxed_params(job.model), abstract_mesh(dict(sizes))
    params, laid = nn.unbox(boxed), parameter_shardings(boxed, mesh)
    moves = jax.tree.leaves(freezing(job.experiment.optim, params).moves)
    found = []
    for (path, leaf), at, moved in zip(
        tree.path_leaves(params), jax.tree.leaves(laid, is_leaf=_is_sharding), moves, strict=True
    ):
        axes = {axis for axes in at.spec if axes is not None for axis in ((axes,) if isinstance(axes, str) else axes)}
        fsdp, tensor = (mesh.shape[axis] if axis in axes else 1 for axis in ("fsdp", "tensor"))
        found.append(_Parameter(path, math.prod(leaf.shape), np.dtype(leaf.dtype).itemsize, fsdp, tensor, bool(moved)))
    return found


@dataclass(frozen=True)
class _Widths:
    """Features of a token in one layer, on one device."""

    residual: int
    heads: int
    """Of queries; of what attention gives."""
    keys_and_values: int
    mlp: int
    """Of one of the arrays of the feed-forward block."""
    mlp_arrays: int
    """That go in: 2 of a gated one."""
    vocab: int
    scores: int
    """Attention scores of a token that are written out; 0 where a kernel keeps them to itself."""


def _split(sizes: Mapping[str, int], name: str, size: int) -> int:
    """The part of a logical axis that a device has."""
    axes = partition_spec((name,), (size,), dict(sizes))[0]
    parts = math.prod(sizes[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ()))
    return size // parts


def _widths(job: Job, sizes: Mapping[str, int], platform: str, length: int, seen: int) -> _Widths:
    c = job.model
    assert c.vocab_size is not None
    heads = _split(sizes, "heads", c.n_heads)
    scores = heads * seen
    kernel = attention_kernel(job, platform, length)
    if kernel == "cudnn":
        scores = 0
    elif kernel == "blocked":
        scores = scores * 5 // 8
    return _Widths(
        residual=c.d_model,
        heads=heads * c.width_of_head,
        keys_and_values=2 * _split(sizes, "kv", c.kv_heads) * c.width_of_head,
        mlp=_split(sizes, "mlp", c.width_of_mlp),
        mlp_arrays=2 if c.activation in GATED else 1,
        vocab=_split(sizes, "vocab", c.vocab_size),
        scores=scores,
    )


def attention_kernel(job: Job, platform: str, length: int) -> str:
    """The implementation of self-attention that the run would take on a platform."""
    c = job.model
    return choose_implementation(
        job.experiment.model.attention if platform == "gpu" else c.attention,
        platform=platform,
        dtype=c.compute_dtype,
        length=length,
        head_dim=c.width_of_head,
        causal=c.mask == "causal",
        window=c.window is not None,
        segments="segments" in job.batch(1),
        prefix=c.mask == "prefix",
        relative=c.positions == "relative",
        softcap=c.attention_softcap > 0,
        dropout=c.attention_dropout > 0,
    )


def _stacks(job: Job) -> list[tuple[str, int, int]]:
    """Stacks by name, with their layers and the tokens of a row."""
    length, source = job.lengths
    found = [("layers", job.model.n_layers, length + job.model.prompt_len)]
    return found + ([("encoder_layers", job.model.encoder_layers, source)] if job.model.encoder_layers else [])


def kept_bytes(model: ModelConfig, widths: _Widths) -> int:
    """Bytes of a token and layer that wait for the backward pass."""
    w, item = widths, np.dtype(model.compute_dtype).itemsize
    crossed = 2 * w.residual + w.heads if model.encoder_layers else 0
    if model.remat == "full":
        return item * w.residual
    if model.remat == "dots":
        return item * (2 * w.residual + w.heads + w.keys_and_values + w.mlp_arrays * w.mlp + crossed)
    # Norms keep what they compute in float32, attention its scores and probabilities.
    narrow = item * (3 * w.residual + w.heads + 3 * w.mlp_arrays * w.mlp + crossed)
    return narrow + 6 * _FLOAT * w.residual + (_FLOAT + item) * w.scores


def _memory(
    job: Job,
    sizes: Mapping[str, int],
    chip: Chip | None,
    parameters: list[_Parameter],
    rows: int,
    at_once: int,
) -> dict[str, int]:
    c, item = job.model, np.dtype(job.model.compute_dtype).itemsize
    platform = "cpu" if chip is None else chip.platform
    batch = sum(math.prod(s.shape) * s.dtype.itemsize for s in job.batch(rows).values())
    local = [p.count // (p.fsdp * p.tensor) for p in parameters]
    gradients = sum(_FLOAT * n for n, p in zip(local, parameters) if p.trained)
    # The loop over layers reads copies in the compute dtype, made before it.
    copies = sum(item * n for n, p in zip(local, parameters) if p.layered and p.itemsize != item)
    kept, work, scores = 0, 0, 0
    for stack, layers, length in _stacks(job):
        tokens = at_once * length
        w = _widths(job, sizes, platform, length, length)
        kept += layers * tokens * kept_bytes(c, w)
        layer = sum(p.count // p.tensor for p in parameters if p.path.startswith(f"{stack}/")) // max(layers, 1)
        wide = tokens * (3 * w.residual + 2 * w.mlp_arrays * w.mlp) * item
        gathered = layer * item if sizes["fsdp"] > 1 else 0
        work = max(work, tokens * w.scores * _SCORE_BYTES[c.remat] + wide + 2 * gathered)
        scores = max(scores, tokens * w.scores)
    length = job.lengths[0]
    w = _widths(job, sizes, platform, length, length)
    chunk = getattr(job.task, "loss_chunk", 0) or length
    logits = at_once * min(chunk, length) * w.vocab * _FLOAT * 2
    hidden = at_once * length * w.residual * item * 2
    tables = sum(p.count // p.tensor for p in parameters if not p.layered and p.fsdp > 1 and p.trained)
    ends = logits + hidden + tables * _FLOAT
    parts = {
        "gradients": gradients * (2 if job.train.accumulate > 1 else 1),
        "parameters in the compute dtype": copies,
        "kept for the backward pass": kept,
        "work": max(work, ends),
    }
    gaps = int(_GAPS * sum(parts.values()))
    if chip is not None and chip.platform == "tpu":
        gaps += int(scores * (_SCORE_GAPS[c.remat] if chip.axes == 3 else _SCORE_GAPS_SMALL))
    return {"state": state_bytes(job, sizes), "batch": batch, **parts, "gaps": gaps}


def _collectives(job: Job, sizes: Mapping[str, int], parameters: list[_Parameter], at_once: int) -> list[Collective]:
    """Gathered parameters, reduced gradients, and the sums between tensor-parallel products."""
    c, item, times = job.model, np.dtype(job.model.compute_dtype).itemsize, job.train.accumulate
    length = job.lengths[0]
    chunk = getattr(job.task, "loss_chunk", 0)
    pieces = -(-length // chunk) if chunk else 1
    fsdp, tensor = sizes["fsdp"], sizes["tensor"]
    found: dict[tuple[str, tuple[str, ...]], list[int]] = {}

    def add(kind: str, axes: tuple[str, ...], payload: int, count: int) -> None:
        axes = tuple(axis for axis in axes if sizes[axis] > 1)
        if axes and payload and count:
            total = found.setdefault((kind, axes), [0, 0])
            total[0] += payload * count
            total[1] += count

    # Forward and backward; without recomputation XLA gathers once more for the gradients.
    gathers = 3 if c.remat == "none" else 2
    for p in parameters:
        part = p.count // p.tensor
        head = p.path.startswith("head/") or (p.path == "embed/embedding" and c.tie_embeddings)
        table = "embed" in p.path.split("/")[0]
        if p.fsdp > 1:
            if p.layered:
                layers = c.n_layers if p.path.startswith("layers/") else c.encoder_layers
                add("all-gather", ("fsdp",), part * item // layers, gathers * layers * times)
                if p.trained:
                    add("reduce-scatter", ("fsdp",), part * item // layers, layers * times)
                    add("all-reduce", ("data",), part * item // layers // fsdp, layers * times)
                continue
            if table:
                add("all-gather", ("fsdp",), part * p.itemsize, times)
                if p.trained:
                    add("all-reduce", ("data", "fsdp"), part * _FLOAT, times)
            if head:
                add("all-gather", ("fsdp",), part * item, pieces * times)
                if p.trained:
                    add("reduce-scatter", ("fsdp",), part * _FLOAT, pieces * times)
                    add("all-reduce", ("data",), part * _FLOAT // fsdp, times)
        elif p.trained:
            add("all-reduce", ("data", "fsdp"), part * (item if p.layered else _FLOAT), times)
    if tensor > 1:
        again = 1 if c.remat == "full" else 0
        for stack, layers, row in _stacks(job):
            sums = 4 + again + (2 + again if c.encoder_layers and stack == "layers" else 0)
            add("all-reduce", ("tensor",), at_once * row * c.d_model * item, sums * layers * times)
        assert c.vocab_size is not None
        if _split(sizes, "vocab", c.vocab_size) < c.vocab_size:
            add("all-reduce", ("tensor",), 2 * at_once * length * c.d_model * item, times)
    collectives = [
        Collective(kind, axes, math.prod(sizes[axis] for axis in axes), payload, count)
        for (kind, axes), (payload, count) in found.items()
    ]
    return sorted(collectives, key=lambda one: -one.payload)


def _traffic(
    job: Job,
    sizes: Mapping[str, int],
    platform: str,
    parameters: list[_Parameter],
    at_once: int,
) -> int:
    item, times = np.dtype(job.model.compute_dtype).itemsize, job.train.accumulate
    total = 0
    for _, layers, length in _stacks(job):
        w = _widths(job, sizes, platform, length, length)
        per_token = _WIDE_TRAFFIC * (w.residual + w.heads + w.keys_and_values) + _MLP_TRAFFIC * w.mlp * (
            w.mlp_arrays + 1
        )
        total += layers * at_once * length * (w.scores * _SCORE_TRAFFIC + per_token * item)
    length = job.lengths[0]
    w = _widths(job, sizes, platform, length, length)
    total += at_once * length * w.vocab * _FLOAT * 6
    # Weights: read forward, read twice backward, written where they are gathered, and their gradients.
    total += sum(p.count // p.tensor * item * (7 if p.fsdp > 1 else 5) for p in parameters)
    # The optimizer reads and writes the state and reads gradients.
    return total * times + 3 * state_bytes(job, sizes)
