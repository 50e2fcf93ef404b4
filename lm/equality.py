"""One run on one device and on many: are they the same, and if not, where do they part?

What is computed must not depend on the mesh. Both run here, in float32 and without dropout, on made-up batches; the
first place that differs is named: initial parameters, the residual stream layer by layer, gradients, the losses of a
few steps. Steps make differences grow, whether they come from rounding or from a mistake; how fast they do, a third run
tells, on one device as the first, whose parameters are moved by as much as rounding may.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from lm import tree
from lm.config import Experiment
from lm.evaluate import to_devices
from lm.interpret import READ, residual_stream
from lm.models.transformer import Transformer
from lm.plan.job import Job, make_job
from lm.run.training import check_shares
from lm.sharding import MeshConfig, Rules, batch_sharding, make_mesh, ruled
from lm.train import INIT, TrainState, abstract_params, random_key

BATCHES = 2  # that the steps go through in turn
MOVED = 1e-6  # by which the third run's parameters are moved, relative to each; gradients are as exact as that
_GROWN = 10  # a loss may differ by so many times what the third run's does


@dataclass(frozen=True)
class Run:
    """What a run computed, on the host."""

    params: dict[str, np.ndarray]
    streams: dict[str, np.ndarray]
    """`[L + 1, B, T, D]` of each stack: what its first layer reads, then what each layer writes."""
    gradients: dict[str, np.ndarray]
    losses: np.ndarray
    moved: np.ndarray
    """Losses of the run whose parameters were moved; the same where there was none."""


@dataclass(frozen=True)
class Difference:
    """How far one part of the computation is from that on one device."""

    part: str
    """`initial …`, `layer 3`, `gradient of …`, `loss of step 4`."""
    relative: float
    """The largest difference, relative to the part's largest value (of gradients at least a hundredth of the largest
    of all)."""
    allowed: float
    """What rounding may make of it."""


@dataclass(frozen=True)
class Comparison:
    """A run on a mesh beside the same on one device."""

    sizes: dict[str, int]
    """Of the mesh's axes."""
    parts: list[Difference]
    """In the order in which they are computed."""
    losses: np.ndarray
    """Float64 `[3, steps]`, nats: on one device, on the mesh, on one device with parameters moved by `MOVED`."""
    tolerance: float

    @property
    def first(self) -> Difference | None:
        """The first part that differs by more than rounding; what comes after it differs because it does."""
        return next((one for one in self.parts if not one.relative <= one.allowed), None)

    @property
    def grown(self) -> float:
        """The largest relative difference of a loss that moving the parameters by `MOVED` makes."""
        return float(_growth(self.losses)[-1])

    def largest(self, kind: str) -> Difference:
        """The largest difference among parts whose names begin so."""
        return max((one for one in self.parts if one.part.startswith(kind)), key=lambda one: one.relative)

    def largest_of_layers(self) -> Difference:
        """The largest difference of the residual stream."""
        others = ("initial", "gradient", "loss")
        return max((one for one in self.parts if not one.part.startswith(others)), key=lambda one: one.relative)


def _growth(losses: np.ndarray) -> np.ndarray:
    """Of each step, what rounding has grown to so far, relative to the loss: from `Comparison.losses`, `[steps]`."""
    return np.maximum.accumulate(np.abs(losses[2] - losses[0]) / np.abs(losses[0]))


def on_one_device(experiment: Experiment, *, steps: int = 10, device: jax.Device | None = None) -> Run:
    """The run that others are compared with: nothing is split, cut up or computed again.

    Args:
      experiment: what `lm train` would run; its data are not read.
      steps: optimizer steps, through `BATCHES` batches in turn.
      device: where; None = the first.

    Raises:
      UserError: settings that a run would refuse as well.
    """
    job = make_job(_exact(experiment), jax.default_backend())
    model = dataclasses.replace(job.experiment.model, remat="none", unroll=0)
    train = dataclasses.replace(job.train, accumulate=1)
    alone = dataclasses.replace(job.experiment, model=model, train=train, mesh=MeshConfig(devices=1))
    mesh = make_mesh(alone.mesh, None if device is None else [device])
    return _run(dataclasses.replace(job, experiment=alone, model=model), mesh, Rules(), steps, moved=True)


def compare(
    one: Run, experiment: Experiment, *, tolerance: float = 1e-5, devices: list[jax.Device] | None = None
) -> Comparison:
    """Runs an experiment on its mesh, as far as it was run on one device.

    Args:
      one: from `on_one_device`.
      experiment: the same, with the mesh, accumulation and recomputation that are asked about.
      tolerance: relative difference that rounding may make.
      devices: for the mesh; None = all there are.

    Raises:
      UserError: settings, mesh or batch that a run would refuse as well.
    """
    job = make_job(_exact(experiment), jax.default_backend())
    mesh = make_mesh(experiment.mesh, devices)
    check_shares(job.experiment, mesh.shape)
    many = _run(job, mesh, experiment.mesh.rules, len(one.losses))
    parts = [
        *((f"initial {name}", _apart(many.params[name], one.params[name])) for name in one.params),
        *_streams_apart(one.streams, many.streams),
        *_gradients_apart(one.gradients, many.gradients),
    ]
    losses = np.stack([one.losses, many.losses, one.moved])
    grown = _growth(losses)
    found = [Difference(name, relative, tolerance) for name, relative in parts]
    found += [
        Difference(f"loss of step {step + 1}", _apart(b, a), max(tolerance, _GROWN * float(grown[step])))
        for step, (a, b) in enumerate(zip(one.losses, many.losses, strict=True))
    ]
    return Comparison(dict(mesh.shape), found, losses, tolerance)


def _exact(experiment: Experiment) -> Experiment:
    """The experiment in float32 and without dropout, where equal means equal."""
    model = experiment.model
    rates: dict[str, Any] = {field.name: 0.0 for field in dataclasses.fields(model) if field.name.endswith("_dropout")}
    lora = dataclasses.replace(model.lora, dropout=0.0)
    exact = dataclasses.replace(model, compute_dtype="float32", param_dtype="float32", lora=lora, **rates)
    return dataclasses.replace(experiment, model=exact)


def _run(job: Job, mesh: Mesh, rules: Rules, steps: int, *, moved: bool = False) -> Run:
    model, rows = Transformer(job.model), job.train.batch_size
    batches = [made_up_batch(job, rows, seed) for seed in range(BATCHES)]
    _, laid = abstract_params(model, mesh, rules)

    def initial() -> Any:
        return nn.unbox(model.init(random_key(job.train.seed, INIT), jnp.zeros((1, 1), jnp.int32))["params"])

    def streams(params: Any, batch: Mapping[str, Any]) -> dict[str, jax.Array]:
        return residual_stream(model, params, {name: batch[name] for name in READ if name in batch})

    def gradients(params: Any, batch: Mapping[str, Any]) -> Any:
        batch = job.task.balance(dict(batch))
        return jax.grad(lambda params: job.task.loss(model, params, dict(batch), None)[0])(params)

    with jax.set_mesh(mesh):
        at: dict[str, Any] = {"in_shardings": (laid, batch_sharding(mesh))}
        whole = jax.jit(initial, out_shardings=laid)()
        batch = to_devices(batches[0], mesh)
        params = _by_path(whole)
        stream = jax.device_get(jax.jit(ruled(streams, rules), **at)(whole, batch))
        gradient = _by_path(jax.jit(ruled(gradients, rules), **at, out_shardings=laid)(whole, batch))
        del whole
        program = job.program(mesh)

        def losses(state: TrainState) -> np.ndarray:
            found = np.zeros(steps)
            for step in range(steps):
                state, report = program.train_step(state, to_devices(batches[step % BATCHES], mesh))
                found[step] = program.summarise(jax.device_get(report))["loss"]
            return found

        own = losses(program.init())
        other = losses(jax.jit(_moved, donate_argnums=0)(program.init())) if moved else own
    return Run(params=params, streams=stream, gradients=gradient, losses=own, moved=other)


def _moved(state: TrainState) -> TrainState:
    """The state with each parameter up or down by `MOVED` of itself."""
    keys = iter(jax.random.split(jax.random.key(0), len(jax.tree.leaves(state.params))))

    def move(leaf: jax.Array) -> jax.Array:
        return leaf * (1 + MOVED * jax.random.rademacher(next(keys), leaf.shape, leaf.dtype))

    return dataclasses.replace(state, params=jax.tree.map(move, state.params))


def _by_path(params: Any) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in tree.path_leaves(jax.device_get(params))}


def _apart(found: Any, wanted: Any, scale: float = 0.0) -> float:
    """The largest difference, relative to the largest wanted value or to `scale`; infinite where one isn't finite."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    if not (np.isfinite(found).all() and np.isfinite(wanted).all()):
        return float("inf")
    largest = max(float(np.max(np.abs(wanted), initial=0.0)), scale)
    return float(np.max(np.abs(found - wanted), initial=0.0)) / max(largest, 1e-30)


def _streams_apart(one: dict[str, np.ndarray], many: dict[str, np.ndarray]) -> Iterator[tuple[str, float]]:
    for stack, wanted in one.items():
        of = "encoder " if stack.startswith("encoder") else ""
        for number, (a, b) in enumerate(zip(wanted, many[stack], strict=True)):
            yield f"{of}layer {number - 1}" if number else f"{of}embedding", _apart(b, a)


def _gradients_apart(one: dict[str, np.ndarray], many: dict[str, np.ndarray]) -> list[tuple[str, float]]:
    """From the last layer to the first, as they are computed."""
    layers = max(len(gradient) for path, gradient in one.items() if path.split("/")[0] in tree.STACKS)
    floor = max(float(np.max(np.abs(gradient), initial=0.0)) for gradient in one.values()) / 100
    found: list[tuple[int, str, float]] = []
    for path, wanted in one.items():
        if path.split("/")[0] not in tree.STACKS:
            below = "embed" in path.split("/")[0]  # embeddings come last; what stands on the stack comes first
            found.append((1 if below else -layers, f"gradient of {path}", _apart(many[path], wanted, floor)))
            continue
        for layer, (a, b) in enumerate(zip(wanted, many[path], strict=True)):
            found.append((-layer, f"gradient of {path}, layer {layer}", _apart(b, a, floor)))
    return [(name, relative) for _, name, relative in sorted(found, key=lambda one: one[0])]


def made_up_batch(job: Job, rows: int, seed: int) -> dict[str, np.ndarray]:
    """A batch of the job's objective with everything in it that can go wrong on a mesh.

    Rows of several documents and padding where the objective has segments, weights that differ from token to token,
    and a last row that isn't scored: a mean of means would show.
    """
    rng = np.random.default_rng(seed)
    shapes = {name: shape.shape for name, shape in job.batch(rows).items()}
    found: dict[str, np.ndarray] = {}
    for prefix in ("", "source_"):
        if f"{prefix}tokens" not in shapes:
            continue
        length = shapes[f"{prefix}tokens"][1]
        segments = _made_up_segments(rng, rows, length, packed=job.task.kind in _PACKED)
        found[f"{prefix}segments"] = segments
        starts = np.diff(segments, axis=1, prepend=-1) != 0
        begun = np.maximum.accumulate(np.where(starts, np.arange(length), 0), axis=1)
        found[f"{prefix}positions"] = (np.arange(length) - begun).astype(np.int32)
    assert job.model.vocab_size is not None
    ids = {"tokens": job.model.vocab_size, "source_tokens": job.model.vocab_size, "targets": job.model.vocab_size}
    ids |= {"types": max(job.model.token_types, 1), "labels": max(job.model.n_classes, 1)}
    for name, shape in shapes.items():
        if name in ids:
            found[name] = rng.integers(0, ids[name], shape, dtype=np.int32)
        elif name in ("weights", "label_weights"):
            found[name] = rng.uniform(0.1, 2.0, shape).astype(np.float32)
            found[name][-1] = 0.0
        elif name == "prefix":
            found[name] = (found["positions"] < 3).astype(np.int32)
    if "segments" not in shapes:  # one document a row, or a stream of them that nothing separates
        found["positions"] = np.tile(np.arange(shapes["tokens"][1], dtype=np.int32), (rows, 1))
    elif "weights" in found:
        found["weights"] *= found["segments"] > 0
    return {name: found[name] for name in shapes}


_PACKED = ("causal_lm", "prefix_lm", "masked_lm", "span_corruption", "seq2seq", "instruction")


def _made_up_segments(rng: np.random.Generator, rows: int, length: int, *, packed: bool) -> np.ndarray:
    """Int32 `[rows, length]`: up to three documents and, in most rows, padding (0)."""
    segments = np.ones((rows, length), np.int32)
    for row in range(rows):
        cuts = np.sort(rng.integers(length // 4, length + 1, 3))
        if packed:
            segments[row, cuts[0] :] = 2
            segments[row, cuts[1] :] = 3
        segments[row, cuts[2] :] = 0
    return segments
