"""Distillation: any objective, with a trained model's scores as targets beside the data's (arXiv:1503.02531).

The teacher goes over each batch before the step does, as a program of its own, and leaves its scores in the batch, or
they were saved once (`lm teach`) and are read beside the examples; the step knows nothing of a second model, and
evaluation nothing of distillation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lm import losses, metrics
from lm.data.config import DataConfig
from lm.data.loader import Maker
from lm.data.objectives.taught import IDS, LOGITS, Lessons
from lm.errors import check
from lm.hardware import compiler_options
from lm.models.transformer import ModelConfig, Transformer
from lm.sharding import DEFAULT_RULES, Rules, batch_sharding, ruled
from lm.tasks.base import Batch, Sums, Task, hidden_of
from lm.text.tokenizer import Tokenizer

Array = jax.Array
HIDDEN = "teacher_hidden"


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """What is learned from a teacher."""

    teacher: str | None = None
    """Run directory of the teacher, a model of the same objective and tokenizer; None = no distillation."""
    saved: str | None = None
    """Instead, a folder that `lm teach` made of it: its logits, for the same training examples."""
    fingerprint: str | None = None
    """What the saved folder holds; filled in when a run starts, and a resumed run finds the same or stops."""
    checkpoint: str = "best"
    """The teacher's checkpoint: best, latest or a step."""
    weight: float = 0.5
    """Share of the soft loss in the objective; the rest is the objective's own, hard loss."""
    temperature: float = 2.0
    """Divides the logits of both before they are compared; the soft loss is multiplied with its square."""
    top_k: int = 0
    """Only the teacher's k likeliest classes or tokens count, scaled to a sum of 1; 0 = all (that are saved)."""
    hidden_weight: float = 0.0
    """Factor of 1 - cosine between what teacher and student give their heads, of the same width, by place; 0 = off."""

    def __post_init__(self) -> None:
        """Checks ranges."""
        check(0 <= self.weight <= 1, f"distill.weight is {self.weight}; it is a share, from 0 to 1")
        check(self.temperature > 0, f"distill.temperature is {self.temperature}; it must be above 0")
        check(self.top_k >= 0, f"distill.top_k is {self.top_k}; it must be 0 (all) or more")
        check(self.hidden_weight >= 0, f"distill.hidden_weight is {self.hidden_weight}; it must be 0 (off) or more")
        check(
            self.teacher is None or self.saved is None,
            f"distill.teacher is {self.teacher} and distill.saved {self.saved}; logits come from one of them",
        )
        check(
            not self.hidden_weight or self.saved is None,
            f"distill.hidden_weight is {self.hidden_weight}, and distill.saved {self.saved} holds logits alone; set"
            " distill.teacher to compare hidden states",
        )

    @property
    def on(self) -> bool:
        """Whether there is a teacher."""
        return self.teacher is not None or self.saved is not None


def check_teacher(
    config: DistillConfig, student: ModelConfig, teacher: ModelConfig, tasks: tuple[Task, Task], data: DataConfig
) -> None:
    """Raises `UserError` where a student can't learn from a teacher; `tasks` are those of both, in that order."""
    _check_same_objective(
        config.teacher, student, tasks[0].kind, tasks[1].kind, (teacher.vocab_size or 0, teacher.n_classes)
    )
    # One batch is for both, and what is in it follows from these two.
    mine, theirs = ((bool(model.encoder_layers), model.mask == "bidirectional") for model in (student, teacher))
    check(
        mine == theirs,
        f"the teacher {config.teacher} has model.encoder_layers {teacher.encoder_layers} and model.mask {teacher.mask},"
        f" the student {student.encoder_layers} and {student.mask}: they read different examples of task"
        f" {tasks[0].kind}; choose a teacher of the same family",
    )
    longest = max(tasks[0].lengths(data)[: 2 if student.encoder_layers else 1])
    check(
        longest <= teacher.max_len,
        f"rows here have {longest} tokens, and the teacher {config.teacher} was made for model.max_len"
        f" {teacher.max_len}; lower data.seq_len, or choose another teacher",
    )
    check(
        not config.hidden_weight or student.d_model == teacher.d_model,
        f"distill.hidden_weight compares hidden states, of width {student.d_model} here and {teacher.d_model} in the"
        " teacher; make model.d_model equal, or leave distill.hidden_weight at 0",
    )
    here, there = (getattr(task, "multi_label", False) for task in tasks)
    check(
        here == there,
        f"task.multi_label is {here}, and of the teacher {config.teacher} it is {there}; choose a teacher of the same"
        " objective",
    )
    most = choices(tasks[0], student, data)
    check(config.top_k <= most, f"distill.top_k is {config.top_k}, and there are {most} to choose from; lower it")


def check_lessons(config: DistillConfig, student: ModelConfig, task: Task, lessons: Lessons) -> None:
    """Raises `UserError` where a student can't learn from what was saved; `TaughtExamples` compares the examples."""
    _check_same_objective(config.saved, student, task.kind, lessons.kind, (lessons.vocab_size, lessons.n_classes))
    check(
        config.top_k <= lessons.top_k,
        f"distill.top_k is {config.top_k}, and {config.saved} holds {lessons.top_k} choices at each place; lower it",
    )
    check(
        config.fingerprint in (None, lessons.fingerprint),
        f"the run was started with saved logits {config.fingerprint}, but {config.saved} now holds"
        f" {lessons.fingerprint}; restore them or start a new run",
    )


def _check_same_objective(
    teacher: str | None, student: ModelConfig, kind: str, taught: str, sizes: tuple[int, int]
) -> None:
    vocab_size, n_classes = sizes
    check(
        kind == taught,
        f"the teacher {teacher} was trained for {taught}, and the task here is {kind}; choose a"
        " teacher of the same objective",
    )
    check(
        student.vocab_size == vocab_size,
        f"the teacher's vocabulary has {vocab_size} rows and the student's {student.vocab_size}; set"
        f" model.vocab_size {vocab_size}",
    )
    check(
        student.n_classes == n_classes,
        f"the teacher {teacher} has {n_classes} classes and the dataset {student.n_classes}",
    )


def choices(task: Task, model: ModelConfig, data: DataConfig) -> int:
    """How many classes, places or tokens a model of an objective chooses from."""
    classes = 2 if getattr(task, "multi_label", False) else model.n_classes  # yes or no, of each class
    several = {"classification": classes, "extractive_qa": data.seq_len}  # all others choose tokens
    return several.get(task.kind, model.vocab_size or 0)


def make_teacher(
    task: Task, model: Transformer, params: Any, config: DistillConfig, mesh: Mesh, rules: Rules = DEFAULT_RULES
) -> Callable[[Batch], Batch]:
    """A function that adds to a batch on devices what the teacher says of it.

    Args:
      task: the objective.
      model: the teacher.
      params: its parameters, on the mesh.
      config: what is wanted of it.
      mesh: the mesh.
      rules: which logical axes lie on which mesh axes.
    """

    def say(params: Any, batch: Batch) -> Batch:
        hidden = hidden_of(model, params, batch, None)
        logits, _ = task.scores(model, params, hidden, batch)
        said = {LOGITS: logits}
        if config.top_k:
            said[LOGITS], said[IDS] = jax.lax.top_k(logits, config.top_k)
        if config.hidden_weight:
            said[HIDDEN] = hidden
        return said

    rows = batch_sharding(mesh)
    shardings = jax.tree.map(lambda x: x.sharding, params)
    program = jax.jit(
        ruled(say, rules),
        in_shardings=(shardings, rows),
        out_shardings=rows,
        compiler_options=compiler_options(mesh),
    )
    return lambda batch: batch | program(params, batch)


@dataclass(frozen=True)
class Distilled:
    """A task whose training loss also has a teacher's part; else it is that task. See `Task` for what it does."""

    task: Task
    config: DistillConfig

    @property
    def kind(self) -> str:
        """The kind of the task."""
        return self.task.kind

    @property
    def spells_text(self) -> bool:
        """As the task."""
        return self.task.spells_text

    @property
    def writes_text(self) -> bool:
        """As the task."""
        return self.task.writes_text

    @property
    def reports(self) -> tuple[str, ...]:
        """As the task."""
        return self.task.reports

    def check(self, model: ModelConfig, data: DataConfig) -> None:
        """As the task."""
        self.task.check(model, data)

    def settle(self, model: ModelConfig, labels: Sequence[str]) -> ModelConfig:
        """As the task."""
        return self.task.settle(model, labels)

    def lengths(self, data: DataConfig) -> tuple[int, int]:
        """As the task."""
        return self.task.lengths(data)

    def maker(self, model: ModelConfig, tokenizer: Tokenizer, labels: Sequence[str]) -> Maker:
        """As the task."""
        return self.task.maker(model, tokenizer, labels)

    def balance(self, batch: Batch) -> Batch:
        """As the task."""
        return self.task.balance(batch)

    def loss(self, model: Transformer, params: Any, batch: Batch, dropout_key: Array | None) -> tuple[Array, Sums]:
        """See `Task`."""
        return self.loss_from(model, params, hidden_of(model, params, batch, dropout_key), batch, dropout_key)

    def loss_from(
        self, model: Transformer, params: Any, hidden: Array, batch: Batch, dropout_key: Array | None
    ) -> tuple[Array, Sums]:
        """The task's loss; while training `(1 - weight) * hard + weight * soft + hidden_weight * (1 - cosine)`.

        The sums report the hard loss, and as `soft_loss` the divergence from the teacher, in nats at the temperature.
        """
        hard, sums = self.task.loss_from(model, params, hidden, batch, dropout_key)
        if dropout_key is None:
            return hard, sums
        c = self.config
        logits, weights = self.task.scores(model, params, hidden, batch)
        soft = losses.divergence(logits, batch[LOGITS], weights, temperature=c.temperature, ids=batch.get(IDS))
        objective = (1 - c.weight) * hard + c.weight * c.temperature**2 * soft
        if c.hidden_weight:
            objective += c.hidden_weight * _cosine_loss(hidden, batch[HIDDEN], batch.get("weights", weights))
        return objective, sums | {"soft_loss": jax.lax.stop_gradient(soft)}

    def scores(self, model: Transformer, params: Any, hidden: Array, batch: Batch) -> tuple[Array, Array]:
        """As the task."""
        return self.task.scores(model, params, hidden, batch)

    def summarise(self, sums: metrics.Sums) -> dict[str, float]:
        """As the task; a training record also has `soft_loss`."""
        result = self.task.summarise(sums)
        return result | {"soft_loss": metrics.ratio(sums, "soft_loss")} if "soft_loss" in sums else result


def _cosine_loss(student: Array, teacher: Array, weights: Array) -> Array:
    """Weighted sum of 1 - cosine, of `[B, T, D]` twice; others than `[B, T]` weigh means of rows."""

    def unit(x: Array) -> Array:
        x = x.astype(jnp.float32)
        return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-12)

    distance = 1 - jnp.sum(unit(student) * unit(teacher), axis=-1)
    if weights.shape == distance.shape:
        return jnp.sum(distance * weights)
    return jnp.sum(jnp.mean(distance, axis=1) * weights.reshape(len(weights), -1).sum(axis=1))
