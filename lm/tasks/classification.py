"""Classification of texts and of pairs of texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lm import losses, metrics
from lm.data.config import DataConfig
from lm.data.loader import Maker
from lm.data.objectives.parts import ClassificationExamples
from lm.data.packing import Examples
from lm.data.parts import has_parts
from lm.data.store import TokenStore
from lm.errors import check
from lm.models.transformer import ModelConfig, Transformer
from lm.tasks.base import BaseTask, Batch, Sums, classified, reported
from lm.text.tokenizer import Tokenizer

Array = jax.Array


@dataclass(frozen=True, kw_only=True)
class Classification(BaseTask):
    """The class or classes of a document (`data.label_field`); with `data.fields` it is a pair of texts."""

    kind: Literal["classification"] = "classification"
    """The objective."""
    multi_label: bool = False
    """Any number of classes for each document (`data.label_separator`), each told for itself."""
    label_smoothing: float = 0.0
    """Share of the class's probability spread over all classes; with multi_label, of a yes or no over both."""

    def __post_init__(self) -> None:
        """Checks ranges."""
        check(0 <= self.label_smoothing < 1, f"task.label_smoothing is {self.label_smoothing}; it is in [0, 1)")

    @property
    def reports(self) -> tuple[str, ...]:
        """See `Task`."""
        return ("loss", "accuracy", "micro_f1", "macro_f1")

    def check(self, model: ModelConfig, data: DataConfig) -> None:
        """See `Task`."""
        check(
            not model.encoder_layers,
            f"task {self.kind} reads one text, and the model is an encoder-decoder; set model.encoder_layers 0",
        )
        check(
            model.mask != "causal" or model.pooling != "first",
            "model.pooling is first, and the first token of a causal model has seen no other; set last or mean",
        )
        check(
            data.label_field is not None or bool(data.mixture.datasets),
            f"task {self.kind} needs the class of each document; set data.label_field to the column that holds it",
        )
        check(
            self.multi_label == (data.label_separator is not None) or bool(data.mixture.datasets),
            f"task.multi_label is {self.multi_label} and data.label_separator {data.label_separator!r}; set both where"
            " documents may have several classes, or neither",
        )
        check(
            not data.sentences,
            f"task {self.kind} reads whole documents, or the two texts of data.fields; leave data.sentences off",
        )

    def settle(self, model: ModelConfig, labels: Sequence[str]) -> ModelConfig:
        """See `Task`: a score for each class."""
        if not labels:
            return dataclasses.replace(model, n_classes=model.n_classes or 2)  # not known yet
        check(
            model.n_classes in (0, len(labels)),
            f"model.n_classes is {model.n_classes} and the dataset has {len(labels)} classes"
            f" ({', '.join(labels[:5])}{', …' if len(labels) > 5 else ''}); leave it at 0, which takes the dataset's",
        )
        return dataclasses.replace(model, n_classes=len(labels))

    def maker(self, model: ModelConfig, tokenizer: Tokenizer, labels: Sequence[str]) -> Maker:
        """See `Task`."""
        check(labels, "the dataset has no classes; prepare it with data.label_field")

        def make(store: TokenStore, config: DataConfig, training: bool) -> Examples:
            del training  # every document is an example
            several = store.labels is not None and store.labels.ndim == 2
            check(
                several == self.multi_label,
                f"the dataset has {'any number of classes' if several else 'one class'} for each document, and"
                f" task.multi_label is {self.multi_label}; change it, or data.label_separator and prepare again",
            )
            return ClassificationExamples(
                store,
                config.seq_len,
                len(labels),
                bos_id=tokenizer.bos_id,
                eos_id=tokenizer.eos_id,
                pair=has_parts(config) or (bool(config.mixture.datasets) and store.part_starts is not None),
                decoder=model.mask != "bidirectional",
            )

        return make

    def loss_from(
        self, model: Transformer, params: Any, hidden: Array, batch: Batch, dropout_key: Array | None
    ) -> tuple[Array, Sums]:
        """See `Task`; while evaluating also `confusion`, float32 `[C, C]`, labels down, or `metrics.class_counts`."""
        by_row = dropout_key is None
        logits = classified(model, params, hidden, batch, dropout_key)
        labels, weights = batch["labels"], batch["label_weights"]
        smoothing = self.label_smoothing
        if self.multi_label:
            total, sums = losses.binary_cross_entropy(logits, labels, weights, label_smoothing=smoothing, by_row=by_row)
            counts = metrics.class_counts(labels > 0, logits > 0, weights) if by_row else {}
            return total, reported(sums, weights, by_row) | counts
        total, sums = losses.cross_entropy(logits, labels, weights, label_smoothing=smoothing, by_row=by_row)
        found = reported(sums, weights, by_row)
        if by_row:
            guesses = jnp.argmax(logits, axis=-1)
            found["confusion"] = metrics.confusion(labels, guesses, weights, model.config.n_classes)
        return total, found

    def scores(self, model: Transformer, params: Any, hidden: Array, batch: Batch) -> tuple[Array, Array]:
        """See `Task`; with `multi_label`, of each class a yes and a no: `[B, C, 2]`, in the mean over classes."""
        logits, weights = classified(model, params, hidden, batch, None), batch["label_weights"]
        if self.multi_label:
            yes_or_no = jnp.stack([logits, jnp.zeros_like(logits)], axis=-1)
            return yes_or_no, jnp.broadcast_to(weights[:, None] / logits.shape[1], logits.shape)
        return logits, weights

    def summarise(self, sums: metrics.Sums) -> dict[str, float]:
        """See `Task`; a training record has no confusion matrix, and so no F1."""
        if "confusion" in sums:
            return metrics.classification(sums)
        if "counts" in sums:
            return metrics.multi_label(sums)
        return {"loss": metrics.ratio(sums, "loss"), "accuracy": metrics.ratio(sums, "correct")}
