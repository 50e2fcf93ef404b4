"""What an objective is: the examples it wants, its loss, and what it reports.

A task is a frozen dataclass of settings. The trainer knows nothing else of objectives, so that a new one takes a file
here and a row in `lm.tasks.TASKS`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from lm import losses, metrics
from lm.data.config import DataConfig
from lm.data.loader import Maker
from lm.data.packing import Examples
from lm.data.store import TokenStore
from lm.errors import check
from lm.models.transformer import ModelConfig, Transformer, head_parameters
from lm.text.tokenizer import Tokenizer

Array = jax.Array
Batch = dict[str, Array]
Sums = dict[str, Any]


class Task(Protocol):
    """The interface of an objective."""

    @property
    def kind(self) -> str:
        """Its name, which stands for it in a saved config."""

    @property
    def spells_text(self) -> bool:
        """Whether every token of the text is scored once, so that bits per byte mean something."""

    @property
    def writes_text(self) -> bool:
        """Whether the model then writes text, token by token."""

    @property
    def reports(self) -> tuple[str, ...]:
        """What an evaluation reports by name, standard errors aside: what `train.best` may be."""

    def check(self, model: ModelConfig, data: DataConfig) -> None:
        """Raises `UserError` where model or data can't serve, as far as settings alone show it."""

    def settle(self, model: ModelConfig, labels: Sequence[str]) -> ModelConfig:
        """The model with what depends on the classes of the dataset."""

    def lengths(self, data: DataConfig) -> tuple[int, int]:
        """Tokens in a row, and source tokens in a row (0 without an encoder)."""

    def maker(self, model: ModelConfig, tokenizer: Tokenizer, labels: Sequence[str]) -> Maker:
        """What makes its examples. Raises `UserError` for a tokenizer, or then a dataset, that can't serve."""

    def balance(self, batch: Batch) -> Batch:
        """A whole training batch, weights of several losses brought to one scale; called before it is cut up."""

    def loss(self, model: Transformer, params: Any, batch: Batch, dropout_key: Array | None) -> tuple[Array, Sums]:
        """The objective's sum over a batch, and the sums to report.

        Args:
          model: the Transformer.
          params: its parameters.
          batch: what its examples give, as arrays on devices; see `lm.data.packing.Examples`.
          dropout_key: a key while training, None (no dropout) while evaluating.

        Returns:
          The sum to minimise after division by `weight`, and float32 sums `loss`, `correct` and `weight`, or others
          that `summarise` knows; while evaluating also those of each row, `[B]`, under the name `rows`.
        """

    def loss_from(
        self, model: Transformer, params: Any, hidden: Array, batch: Batch, dropout_key: Array | None
    ) -> tuple[Array, Sums]:
        """`loss`, from `hidden_of`."""

    def scores(self, model: Transformer, params: Any, hidden: Array, batch: Batch) -> tuple[Array, Array]:
        """What a student learns from a teacher: logits float32 `[..., C]`, and the weight of each row of them."""

    def summarise(self, sums: metrics.Sums) -> dict[str, float]:
        """What is reported, from the sums over all batches: `reports`, and standard errors."""


@runtime_checkable
class AnsweringTask(Protocol):
    """An objective whose model gives texts that can be compared with right ones, which `lm evaluate` then does."""

    def say(self, model: Transformer, params: Any, batch: Batch) -> dict[str, Array]:
        """What the model says of each row of a batch, `[B, …]`."""

    def texts(
        self, said: Iterable[Mapping[str, np.ndarray]], store: TokenStore, examples: Examples
    ) -> list[tuple[str, Sequence[str]]]:
        """Each text that is given, with the right ones, from what is said of the first batches of `examples`."""

    def score_texts(self, texts: Sequence[tuple[str, Sequence[str]]]) -> dict[str, float]:
        """What is reported of them (at least one), with standard errors."""


def hidden_of(model: Transformer, params: Any, batch: Batch, dropout_key: Array | None) -> Array:
    """What the model makes of a batch, up to the heads: `[B, T, D]` in the compute dtype.

    An example may be of several rows: of a batch of `[B, R, T]` it is `[B * R, T, D]`.
    """
    if batch["tokens"].ndim == 3:
        batch = {name: value.reshape(-1, value.shape[-1]) for name, value in batch.items() if value.ndim == 3}
    options: dict[str, Any] = {
        "deterministic": dropout_key is None,
        "rngs": None if dropout_key is None else {"dropout": dropout_key},
    }
    source: Any = None
    if model.config.encoder_layers:
        tokens = batch["source_tokens"]
        at = (batch.get("source_positions"), batch.get("source_segments"))
        source = model.apply({"params": params}, tokens, *at, method="encode", **options)
    found: Any = model.apply(
        {"params": params},
        batch["tokens"],
        batch["positions"],
        batch.get("segments"),
        types=batch.get("types"),
        prefix=batch.get("prefix"),
        source=source,
        source_segments=batch.get("source_segments"),
        method="hidden",
        **options,
    )
    return found[0]


def classified(model: Transformer, params: Any, hidden: Array, batch: Batch, dropout_key: Array | None) -> Array:
    """What the classifier says of each row: float32 `[B, n_classes]`, from `hidden_of`."""
    scores: Any = model.apply(
        {"params": params},
        hidden,
        batch.get("segments"),
        deterministic=dropout_key is None,
        rngs=None if dropout_key is None else {"dropout": jax.random.fold_in(dropout_key, 1)},
        method="classify",
    )
    return scores


def reported(sums: Sums, weight: Array, by_row: bool) -> Sums:
    """Sums with their weight; of rows, `[B]`, the sums over them and the rows themselves."""
    if not by_row:
        return sums | {"weight": weight.sum()}
    rows = sums | {"weight": weight.sum(axis=1) if weight.ndim > 1 else weight}
    return {name: value.sum() for name, value in rows.items()} | {"rows": rows}


class BaseTask:
    """The part of a `Task` that is the same for most."""

    spells_text = False
    writes_text = False

    @property
    def reports(self) -> tuple[str, ...]:
        """See `Task`."""
        return ("loss", "perplexity", "accuracy", *(("bits_per_byte",) if self.spells_text else ()))

    def settle(self, model: ModelConfig, labels: Sequence[str]) -> ModelConfig:
        """See `Task`."""
        del labels
        return model

    def lengths(self, data: DataConfig) -> tuple[int, int]:
        """See `Task`."""
        return data.seq_len, 0

    def balance(self, batch: Batch) -> Batch:
        """See `Task`."""
        return batch

    def loss(self, model: Transformer, params: Any, batch: Batch, dropout_key: Array | None) -> tuple[Array, Sums]:
        """See `Task`."""
        return self.loss_from(model, params, hidden_of(model, params, batch, dropout_key), batch, dropout_key)

    def loss_from(
        self, model: Transformer, params: Any, hidden: Array, batch: Batch, dropout_key: Array | None
    ) -> tuple[Array, Sums]:
        """See `Task`."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class TokenTask(BaseTask):
    """A loss on tokens: cross-entropy of `targets` where `weights` say so. Subclasses say which examples."""

    label_smoothing: float = 0.0
    """Share of the target's probability spread over the vocabulary."""
    z_loss: float = 0.0
    """Factor of the squared log-partition added to the loss; PaLM uses 1e-4."""
    loss_chunk: int = 0
    """Tokens of each row per piece of the loss, so that float32 logits of a whole batch never exist; 0 = off."""

    def __post_init__(self) -> None:
        """Checks ranges."""
        check(0 <= self.label_smoothing < 1, f"task.label_smoothing is {self.label_smoothing}; it is in [0, 1)")
        check(self.z_loss >= 0, f"task.z_loss is {self.z_loss}; it must be 0 or more")
        check(self.loss_chunk >= 0, f"task.loss_chunk is {self.loss_chunk}; it must be 0 (off) or more")

    def loss_from(
        self, model: Transformer, params: Any, hidden: Array, batch: Batch, dropout_key: Array | None
    ) -> tuple[Array, Sums]:
        """See `Task`."""
        by_row = dropout_key is None

        def head_loss(head: Any, hidden: Array, targets: Array, weights: Array) -> tuple[Array, Sums]:
            logits: Any = model.apply({"params": head}, hidden, method="logits")
            return losses.cross_entropy(
                logits, targets, weights, label_smoothing=self.label_smoothing, z_loss=self.z_loss, by_row=by_row
            )

        head = head_parameters(model.config, params)
        hidden, targets, weights = self.scored(hidden, batch)
        if self.loss_chunk:
            total, sums = losses.chunked(head_loss, head, hidden, targets, weights, self.loss_chunk)
        else:
            total, sums = head_loss(head, hidden, targets, weights)
        return total, reported(sums, weights, by_row)

    def scores(self, model: Transformer, params: Any, hidden: Array, batch: Batch) -> tuple[Array, Array]:
        """See `Task`."""
        hidden, _, weights = self.scored(hidden, batch)
        logits: Any = model.apply({"params": params}, hidden, method="logits")
        return logits, weights

    def scored(self, hidden: Array, batch: Batch) -> tuple[Array, Array, Array]:
        """Hidden states `[B, K, D]`, targets and weights `[B, K]` of the places that can have a weight: here, all."""
        return hidden, batch["targets"], batch["weights"]

    def summarise(self, sums: metrics.Sums) -> dict[str, float]:
        """See `Task`."""
        return metrics.language_model(sums)


def check_mask(kind: str, model: ModelConfig, wanted: str) -> None:
    """Raises `UserError` unless the model has no encoder and this mask."""
    check(
        model.mask == wanted and not model.encoder_layers,
        f"task {kind} needs model.mask {wanted} and no encoder; the model has model.mask {model.mask} and "
        f"model.encoder_layers {model.encoder_layers}",
    )


def check_encoder(kind: str, model: ModelConfig) -> None:
    """Raises `UserError` unless the model is an encoder-decoder."""
    check(
        model.encoder_layers > 0 and model.mask == "causal",
        f"task {kind} needs an encoder-decoder: model.encoder_layers above 0 and model.mask causal; the model has "
        f"{model.encoder_layers} and {model.mask}",
    )
