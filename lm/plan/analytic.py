"""Memory, collectives and memory traffic of a train step from shapes alone, for any number of chips.

A model of what XLA makes of this project's step, not a simulation: it knows the arrays that are large (state,
gradients, what is kept of each layer, attention scores, logits, gathered parameters) and leaves out the rest.
tests/plan/test_analytic.py holds it against compiled programs, docs/results/scale.md shows it beside those of LLaMA 7B
and 70B.
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
from lm.models.layers import GATED
from lm.models.split_attention import BLOCK, pairs_of
from lm.optim import freezing
from lm.plan.chips import Chip
from lm.plan.hlo import Collective
from lm.plan.job import Job, boxed_params, rows_apart
from lm.sharding import LENGTH_AXIS, Rules, parameter_shardings, partition_spec, shardings_like

_FLOAT = 4

# Bytes per attention score that go to and from memory in a step where scores are written out; of kernels that keep
# scores to themselves there are none. Read off compiled programs.
_SCORE_TRAFFIC = 50
# The same for activations, in arrays as wide as the residual stream and as the feed-forward block.
_WIDE_TRAFFIC, _MLP_TRAFFIC = 40, 12
# Bytes per attention score that are in use at the worst moment of the backward pass, by what is computed again; and
# those that programs for TPUs hold besides, in gaps where scores of other moments were.
_SCORE_BYTES = {"none": 4, "dots": 8, "offload": 8, "full": 6}
_SCORE_GAPS = {"none": 0.0, "dots": 10.5, "offload": 2.9, "full": 4.3}
_SCORE_GAPS_SMALL = 2.5  # v5e and v6e, of a core with less memory
_SCORE_GAPS_TENSOR = 3.7  # and so many more where heads are split; seen in one program, of LLaMA 1B over 2 x 2 chips
# Gaps and small arrays of other programs, as a part of what is not state.
_GAPS = 0.05


@dataclass(frozen=True)
class Estimate:
    """What a step takes, per device."""

    memory: dict[str, int]
    """Bytes by what they are for; their sum is what is in use at the worst moment."""
    collectives: list[Collective]
    traffic: int
    """Bytes to and from memory."""
    host: int = 0
    """Bytes that wait in the host's memory for the backward pass."""

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
    stacks = _stacks(job, sizes, platform, at_once)
    return Estimate(
        memory=_memory(job, sizes, chip, parameters, rows, at_once, stacks),
        collectives=_collectives(job, sizes, parameters, at_once, stacks, platform),
        traffic=_traffic(job, sizes, parameters, at_once, stacks),
        host=sum(stack.layers * stack.tokens * stack.kept[1] for stack in stacks),
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
    return local_bytes(
        shapes, shardings_like(shapes, nn.unbox(boxed), parameter_shardings(boxed, mesh, _rules(job)), mesh)
    )


def local_bytes(shapes: Any, shardings: Any) -> int:
    """Bytes of arrays on one device."""
    return sum(
        math.prod(at.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        for leaf, at in zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings, is_leaf=_is_sharding), strict=True)
    )


def _rules(job: Job) -> Rules:
    return job.experiment.mesh.rules


def _is_sharding(leaf: Any) -> bool:
    return isinstance(leaf, NamedSharding)


@functools.lru_cache(maxsize=256)
def _parameters(job: Job, sizes: tuple[tuple[str, int], ...]) -> list[_Parameter]:
    boxed, mesh = boxed_params(job.model), abstract_mesh(dict(sizes))
    params, laid = nn.unbox(boxed), parameter_shardings(boxed, mesh, _rules(job))
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
    stream: int
    """Of the residual stream between blocks, which `mesh.rules` may split further."""
    heads: int
    """Of queries; of what attention gives."""
    keys_and_values: int
    mlp: int
    """Of one of the arrays of the feed-forward block."""
    mlp_arrays: int
    """That go in: 2 of a gated one."""


@dataclass(frozen=True)
class _Stack:
    """Layers of one kind, on one device."""

    name: str
    layers: int
    row: int
    """Tokens of a row, over all devices that share it."""
    shared: int
    """Devices that share it."""
    tokens: int
    """Tokens of all rows that are in work at once, on this device."""
    widths: _Widths
    balanced: bool
    """Whether attention goes through pairs of blocks (`lm.models.split_attention`)."""
    scores: int
    """Attention scores of a layer that are written out in one pass; 0 where a kernel keeps them to itself."""
    live: int
    """Those of them that exist at the same time."""
    kept: tuple[int, int]
    """Bytes of a token and layer that wait for the backward pass: on the device, and in the host's memory."""


def _split(job: Job, sizes: Mapping[str, int], name: str, size: int) -> int:
    """The part of a logical axis that a device has."""
    axes = partition_spec((name,), (size,), dict(sizes), _rules(job))[0]
    parts = math.prod(sizes[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ()))
    return size // parts


def _widths(job: Job, sizes: Mapping[str, int], row: int) -> _Widths:
    c = job.model
    shape, names = (row, c.d_model), ("residual_length", "activation_embed")
    between = partition_spec(names, shape, dict(sizes), _rules(job))
    axes = {axis for found in between for axis in ((found,) if isinstance(found, str) else found or ())}
    further = math.prod(sizes[axis] for axis in axes - {LENGTH_AXIS})
    return _Widths(
        residual=c.d_model,
        stream=c.d_model // further,
        heads=_split(job, sizes, "activation_heads", c.n_heads) * c.width_of_head,
        keys_and_values=2 * _split(job, sizes, "activation_kv", c.kv_heads) * c.width_of_head,
        mlp=_split(job, sizes, "activation_mlp", c.width_of_mlp),
        mlp_arrays=2 if c.activation in GATED else 1,
    )


def _stacks(job: Job, sizes: Mapping[str, int], platform: str, at_once: int) -> list[_Stack]:
    c = job.model
    length, source = job.lengths
    found = [_stack(job, sizes, platform, at_once, "layers", c.n_layers, length + c.prompt_len)]
    if c.encoder_layers:
        found.append(_stack(job, sizes, platform, at_once, "encoder_layers", c.encoder_layers, source))
    return found


def _stack(job: Job, sizes: Mapping[str, int], platform: str, at_once: int, name: str, layers: int, row: int) -> _Stack:
    c = job.model
    shared = sizes[LENGTH_AXIS] if row % sizes[LENGTH_AXIS] == 0 else 1
    tokens = at_once * row // shared
    w = _widths(job, sizes, row)
    heads = w.heads // c.width_of_head
    plain = name == "layers" and c.mask == "causal" and c.positions != "relative" and not c.attention_dropout
    balanced = shared > 1 and plain and row % (2 * shared) == 0
    if balanced:
        chunk = row // (2 * shared)
        blocks = next(n for n in range(-(-chunk // BLOCK), chunk + 1) if chunk % n == 0)
        size = chunk // blocks
        live = at_once * heads * size**2
        scores = live * pairs_of(shared, blocks, size, c.window).shape[1]
    else:
        kernel = "xla" if shared > 1 else attention_kernel(job, platform, row)
        scores = {"cudnn": 0, "blocked": tokens * heads * row * 5 // 8}.get(kernel, tokens * heads * row)
        live = scores
    kept = _kept(job, w, shared, balanced, scores // max(tokens, 1))
    return _Stack(name, layers, row, shared, tokens, w, balanced, scores, live, kept)


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


def _kept(job: Job, widths: _Widths, shared: int, balanced: bool, scores: int) -> tuple[int, int]:
    """Bytes of a token and layer that wait for the backward pass: on the device, and in the host's memory."""
    c, w, item = job.model, widths, np.dtype(job.model.compute_dtype).itemsize
    crossed = 2 * w.residual + w.heads if c.encoder_layers else 0
    if c.remat == "full":
        return item * w.stream, 0
    if c.remat in ("dots", "offload"):
        products = item * (w.stream + w.heads + w.keys_and_values + w.mlp_arrays * w.mlp + crossed)
        return (item * w.stream, products) if c.remat == "offload" else (item * w.stream + products, 0)
    # Norms keep what they compute in float32, attention its scores and probabilities; or by pairs of blocks, the keys
    # and values of the whole row and what it gives in float32.
    narrow = item * (3 * w.residual + w.heads + 3 * w.mlp_arrays * w.mlp + crossed)
    attended = item * (w.heads + shared * w.keys_and_values) + _FLOAT * w.heads
    return narrow + 6 * _FLOAT * w.residual + (attended if balanced else (_FLOAT + item) * scores), 0


def _memory(
    job: Job,
    sizes: Mapping[str, int],
    chip: Chip | None,
    parameters: list[_Parameter],
    rows: int,
    at_once: int,
    stacks: list[_Stack],
) -> dict[str, int]:
    c, item = job.model, np.dtype(job.model.compute_dtype).itemsize
    batch = sum(math.prod(s.shape) * s.dtype.itemsize for s in job.batch(rows).values())
    local = [p.count // (p.fsdp * p.tensor) for p in parameters]
    gradients = sum(_FLOAT * n for n, p in zip(local, parameters) if p.trained)
    # The loop over layers reads copies in the compute dtype, made before it.
    copies = sum(item * n for n, p in zip(local, parameters) if p.layered and p.itemsize != item)
    kept, work, scores = 0, 0, 0
    for stack in stacks:
        w, tokens = stack.widths, stack.tokens
        kept += stack.layers * tokens * stack.kept[0]
        of_layer = [p for p in parameters if p.path.startswith(f"{stack.name}/")]
        layer = sum(p.count // p.tensor for p in of_layer) // max(stack.layers, 1)
        wide = tokens * (3 * w.residual + 2 * w.mlp_arrays * w.mlp) * item
        if stack.balanced:
            # Keys and values of the whole row, and their gradients in float32; the like of queries and results.
            wide += tokens * (stack.shared * w.keys_and_values * (item + _FLOAT) + 3 * w.heads * _FLOAT)
        gathered = layer * item if sizes["fsdp"] > 1 else 0
        work = max(work, stack.live * _SCORE_BYTES[c.remat] + wide + gathered)
        scores = max(scores, stack.live)
    logits, hidden = _ends(job, sizes, at_once)
    tables = sum(p.count // p.tensor for p in parameters if not p.layered and p.fsdp > 1 and p.trained)
    ends = logits * _FLOAT * 2 + hidden * item * 2 + tables * _FLOAT
    parts = {
        "gradients": gradients * (2 if job.train.accumulate > 1 else 1),
        "parameters in the compute dtype": copies,
        "kept for the backward pass": kept,
        "work": max(work, ends),
    }
    if chip is None or chip.platform != "tpu":
        gaps = int(_GAPS * sum(parts.values()))
    else:
        # Where scores were; where layers' gradients lay in the compute dtype, before they were added up in float32; and
        # a second copy of what is added up.
        each = _SCORE_GAPS[c.remat] if chip.axes == 3 else _SCORE_GAPS_SMALL
        each += _SCORE_GAPS_TENSOR if sizes["tensor"] > 1 else 0.0
        gaps = int(scores * each) + copies
        gaps += 2 * gradients if job.train.accumulate > 1 else 0
    return {"state": state_bytes(job, sizes), "batch": batch, **parts, "gaps": gaps}


def _ends(job: Job, sizes: Mapping[str, int], at_once: int) -> tuple[int, int]:
    """Logits that exist at once on a device, and numbers of the hidden states that the head reads."""
    c, length = job.model, job.lengths[0]
    assert c.vocab_size is not None
    shared = sizes[LENGTH_AXIS] if length % sizes[LENGTH_AXIS] == 0 else 1
    chunk = min(getattr(job.task, "loss_chunk", 0) or length, length)
    vocab = _split(job, sizes, "vocab", c.vocab_size)
    return at_once * -(-chunk // shared) * vocab, at_once * length // shared * c.d_model


def _collectives(
    job: Job,
    sizes: Mapping[str, int],
    parameters: list[_Parameter],
    at_once: int,
    stacks: list[_Stack],
    platform: str,
) -> list[Collective]:
    """Gathered parameters, reduced gradients, sums between tensor-parallel products, keys and values of split rows."""
    c, item, times = job.model, np.dtype(job.model.compute_dtype).itemsize, job.train.accumulate
    length = job.lengths[0]
    chunk = getattr(job.task, "loss_chunk", 0)
    copies = ("data", LENGTH_AXIS)  # devices that have the same part of a parameter, and other tokens
    pieces = -(-length // chunk) if chunk else 1
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
                    add("all-reduce", copies, part * item // layers // p.fsdp, layers * times)
                continue
            if table:
                add("all-gather", ("fsdp",), part * p.itemsize, times)
                if p.trained:
                    add("all-reduce", ("data", "fsdp", LENGTH_AXIS), part * _FLOAT, times)
            if head:
                add("all-gather", ("fsdp",), part * item, pieces * times)
                if p.trained:
                    add("reduce-scatter", ("fsdp",), part * _FLOAT, pieces * times)
                    add("all-reduce", copies, part * _FLOAT // p.fsdp, times)
        elif p.trained:
            add("all-reduce", ("data", "fsdp", LENGTH_AXIS), part * (item if p.layered else _FLOAT), times)
    again = 1 if c.remat == "full" else 0
    for stack in stacks:
        w, crossing = stack.widths, bool(c.encoder_layers) and stack.name == "layers"
        width = stack.tokens * c.d_model * item
        # The two products that go back into the residual stream, and the gradients of those that leave it; XLA for
        # CPUs sums each of the latter alone, others what they add up to.
        leave = 3 + w.mlp_arrays if platform == "cpu" else 2
        sums = (2 + leave + again + (2 + again if crossing else 0)) * stack.layers * times
        split = w.stream < w.residual
        add("reduce-scatter" if split and platform != "cpu" else "all-reduce", ("tensor",), width, sums)
        if split:  # what the norms give, and gradients of what goes back, on their way into products
            add("all-gather", ("tensor",), width, (4 if c.remat == "none" else 6) * stack.layers * times)
        if stack.shared > 1:
            # Keys and values of the whole row; where they are not kept, once more in the backward pass.
            row = stack.tokens * stack.shared * w.keys_and_values // 2 * item
            passes = 1 if c.remat == "none" else 2
            add("all-gather", (LENGTH_AXIS,), row, 2 * passes * stack.layers * times)
            add("reduce-scatter", (LENGTH_AXIS,), row, 2 * stack.layers * times)
        if stack.balanced:
            # Two chunks, into balanced order and out of it, and both for the gradients; of two devices each keeps one.
            moved = 1 if stack.shared == 2 else 2
            add("collective-permute", (LENGTH_AXIS,), width // 2, 4 * moved * times)
            if c.positions == "rope":
                angles = stack.tokens * c.width_of_head // 4 * _FLOAT
                add("collective-permute", (LENGTH_AXIS,), angles, 2 * moved * times)
    if crossed := [stack for stack in stacks if stack.name == "encoder_layers" and stack.shared > 1]:
        row = crossed[0].tokens * crossed[0].shared * crossed[0].widths.keys_and_values // 2 * item
        add("all-gather", (LENGTH_AXIS,), row, 2 * (1 if c.remat == "none" else 2) * c.n_layers * times)
        add("reduce-scatter", (LENGTH_AXIS,), row, 2 * c.n_layers * times)
    assert c.vocab_size is not None
    if _split(job, sizes, "vocab", c.vocab_size) < c.vocab_size:
        add("all-reduce", ("tensor",), 2 * _ends(job, sizes, at_once)[1] * item, times)
    collectives = [
        Collective(kind, axes, math.prod(sizes[axis] for axis in axes), payload, count)
        for (kind, axes), (payload, count) in found.items()
    ]
    return sorted(collectives, key=lambda one: -one.payload)


def _traffic(
    job: Job, sizes: Mapping[str, int], parameters: list[_Parameter], at_once: int, stacks: list[_Stack]
) -> int:
    item, times = np.dtype(job.model.compute_dtype).itemsize, job.train.accumulate
    total = 0
    for stack in stacks:
        w = stack.widths
        per_token = _WIDE_TRAFFIC * (w.residual + w.heads + w.keys_and_values) + _MLP_TRAFFIC * w.mlp * (
            w.mlp_arrays + 1
        )
        total += stack.layers * (stack.scores * _SCORE_TRAFFIC + stack.tokens * per_token * item)
    pieces = max(job.lengths[0] // (getattr(job.task, "loss_chunk", 0) or job.lengths[0]), 1)
    total += _ends(job, sizes, at_once)[0] * pieces * _FLOAT * 6
    # Weights: read forward, read twice backward, written where they are gathered, and their gradients.
    total += sum(p.count // p.tensor * item * (7 if p.fsdp > 1 else 5) for p in parameters)
    # The optimizer reads and writes the state and reads gradients.
    return total * times + 3 * state_bytes(job, sizes)
