"""What is planned: an experiment as shapes, settled without a look at its data."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from lm.config import Experiment
from lm.errors import check
from lm.models.config import ModelConfig
from lm.models.transformer import Transformer, flops_per_token
from lm.optim import freezing, make_optimizer, make_schedule
from lm.run.begin import with_parent
from lm.run.training import check_experiment, settled_model
from lm.sharding import BATCH_AXES, MESH_AXES, MeshConfig, batch_sharding
from lm.tasks import AnyTask
from lm.train import Program, TrainConfig, TrainState, abstract_params, flops_not_needed, make_program

# A run whose length is in epochs has as many steps as its data says, which a plan doesn't read. Schedules need a
# number; memory and speed don't depend on it.
_STEPS_OF_EPOCHS = 10**6

# The arrays of a training batch by objective, besides `tokens`, `positions` and, where documents are kept apart,
# `segments`. Shapes are [B, T] for targets, [B, S] for sources and [B] for labels.
_ROWS = {
    "causal_lm": ("targets", "weights"),
    "prefix_lm": ("targets", "weights", "prefix"),
    "masked_lm": ("targets", "weights"),
    "bert": ("targets", "weights", "segments", "types", "labels", "label_weights"),
    "span_corruption": ("targets", "weights", "segments", "source_tokens", "source_positions", "source_segments"),
    "seq2seq": ("targets", "weights", "segments", "source_tokens", "source_positions", "source_segments"),
    "instruction": ("targets", "weights", "segments"),
    "classification": ("segments", "labels", "label_weights"),
}
_FLOATS = ("weights", "label_weights")


@dataclass(frozen=True)
class Job:
    """A run's settings with everything settled that memory and speed depend on."""

    experiment: Experiment
    """As it would be started; its model has its vocabulary, its mesh and batch may be changed by a search."""
    model: ModelConfig
    """The same model with the attention of the platform planned for."""
    steps: int | None
    """Length of the run; None where it is given in epochs."""

    @property
    def task(self) -> AnyTask:
        """The objective."""
        return self.experiment.task

    @property
    def train(self) -> TrainConfig:
        """Length and batch."""
        return self.experiment.train

    @property
    def lengths(self) -> tuple[int, int]:
        """Tokens in a row, and source tokens in a row (0 without an encoder)."""
        seq_len, source_len = self.task.lengths(self.experiment.data)
        return seq_len, source_len if self.model.encoder_layers else 0

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a batch that are counted as the run's."""
        return self.train.batch_size * self.lengths[0]

    def batch(self, rows: int | None = None) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes of a training batch of `rows` rows; None = of a step."""
        return batch_shapes(self.experiment, self.model, self.train.batch_size if rows is None else rows)

    def params(self) -> Any:
        """Shapes of the whole model's parameters."""
        return nn.unbox(boxed_params(_plain(self.model)))

    def state(self) -> TrainState:
        """Shapes of the train state."""
        return _program_of(self.plain()).target

    def stored(self) -> Any:
        """Shapes of what a checkpoint holds, with what is frozen and written once."""
        storage = _program_of(self.plain()).storage
        return storage.target, storage.frozen_target

    def plain(self) -> Job:
        """The job with all settings at one value that change no shape of its state."""
        model = _plain(self.model)
        train = dataclasses.replace(self.train, batch_size=1, accumulate=1)
        mesh = MeshConfig(rules=self.experiment.mesh.rules)
        experiment = dataclasses.replace(self.experiment, model=model, train=train, mesh=mesh)
        return dataclasses.replace(self, experiment=experiment, model=model)

    def program(self, mesh: Mesh) -> Program:
        """The program that the run would compile, on a mesh of devices that need not be there."""
        experiment = self.experiment
        model = Transformer(self.model)
        params, _ = abstract_params(model, mesh)
        schedule = make_schedule(experiment.optim, self.steps or _STEPS_OF_EPOCHS)
        tx = make_optimizer(experiment.optim, schedule, params)
        freeze = freezing(experiment.optim, params)
        return make_program(model, self.task, tx, schedule, self.train, mesh, freeze, experiment.mesh.rules)

    def lowered(self, mesh: Mesh) -> Any:
        """The train step of the run, lowered (`jax.stages.Lowered`) from shapes alone."""
        program = self.program(mesh)
        at = batch_sharding(mesh)
        batch = {
            name: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=at) for name, shape in self.batch().items()
        }
        step: Any = program.train_step
        with jax.set_mesh(mesh):
            return step.lower(program.target, batch)

    def flops_of_token(self) -> int:
        """Floating-point operations that a training token needs, whatever is computed twice."""
        params = self.params()
        freeze = freezing(self.experiment.optim, params)
        return flops_per_token(self.model, *self.lengths) - flops_not_needed(self.model, freeze, params, *self.lengths)


def _plain(model: ModelConfig) -> ModelConfig:
    return dataclasses.replace(model, remat="none", unroll=1, attention="auto")


@functools.lru_cache(maxsize=8)
def boxed_params(model: ModelConfig, lower: tuple[tuple[str, int], ...] = ()) -> Any:
    """Shapes of a model's parameters in boxes with the logical names of their axes."""
    init = Transformer(model, lower=lower).init
    return jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]


@functools.lru_cache(maxsize=8)
def _program_of(job: Job) -> Program:
    return job.program(one_device())


def make_job(experiment: Experiment, platform: str) -> Job:
    """Settles an experiment for a platform (`tpu`, `gpu` or `cpu`).

    Raises:
      UserError: what `lm train` would say of these settings, mesh aside; or an objective that can't be planned.
    """
    experiment = with_parent(experiment)
    check(
        not experiment.distill.on,
        "distill is set, and what a teacher takes isn't known from shapes; take the student alone, without"
        " distill.teacher",
    )
    # Everything but the mesh, which is checked against the devices planned for.
    check_experiment(dataclasses.replace(experiment, mesh=MeshConfig(devices=1)))
    model = settled_model(experiment)
    experiment = dataclasses.replace(experiment, model=model)
    batch_shapes(experiment, model, 1)
    train, (seq_len, _) = experiment.train, experiment.task.lengths(experiment.data)
    steps = None
    if train.epochs is None:
        steps = train.total_steps(tokens_per_step=train.batch_size * seq_len, steps_per_epoch=math.nan)
    # The model asks for its attention's kernel where it is traced, which is here and not there.
    if platform != "cpu" and model.attention in ("auto", "cudnn"):
        model = dataclasses.replace(model, attention="xla")
    return Job(experiment, model, steps)


def batch_shapes(experiment: Experiment, model: ModelConfig, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The arrays of a training batch: what the objective's examples give, as shapes.

    Raises:
      UserError: an objective whose batches depend on the tokenizer or the dataset.
    """
    task, data = experiment.task, experiment.data
    several = getattr(task, "multi_label", False)
    check(
        task.kind in _ROWS and not several,
        f"task {task.kind}{' with task.multi_label' if several else ''} has batches whose shape depends on the"
        f" dataset, so that it is neither planned nor checked on made-up ones; can be: {', '.join(_ROWS)}",
    )
    seq_len, source_len = task.lengths(data)
    names = {"tokens", "positions", *_ROWS[task.kind]}
    if task.kind in ("causal_lm", "prefix_lm", "masked_lm") and data.packing != "stream":
        names.add("segments")
    if task.kind == "seq2seq" and not model.encoder_layers:
        names = {name for name in names if not name.startswith("source_")}
        names.add("prefix")
    if task.kind == "classification" and model.mask == "bidirectional":
        names.add("types")
    found = {}
    for name in sorted(names):
        length = () if name.startswith("label") else (source_len if name.startswith("source_") else seq_len,)
        found[name] = jax.ShapeDtypeStruct((rows, *length), jnp.float32 if name in _FLOATS else jnp.int32)
    return found


def rows_apart(sizes: Mapping[str, int]) -> int:
    """Over how many devices the rows of a batch are spread."""
    return math.prod(sizes[axis] for axis in BATCH_AXES)


def bytes_of(shapes: Any) -> int:
    """Bytes of all arrays of a tree."""
    return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(shapes))


def one_device() -> Mesh:
    """A mesh of one device that is here: for shapes, whatever it is."""
    return jax.make_mesh((1,) * len(MESH_AXES), MESH_AXES, devices=jax.devices()[:1])
