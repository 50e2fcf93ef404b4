"""Classification by a language model: which word it writes into a pattern, with examples shown or trained for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lm import losses, metrics
from lm.data.config import DataConfig
from lm.data.loader import Maker
from lm.data.objectives.prompts import SEPARATOR, PromptedExamples, make_pattern, slots_of
from lm.data.packing import Examples
from lm.data.parts import has_parts
from lm.data.store import TokenStore
from lm.errors import UserError, check
from lm.models.transformer import ModelConfig, Transformer
from lm.tasks.base import BaseTask, Batch, Sums, reported
from lm.text.chat import encode_behind
from lm.text.tokenizer import Tokenizer

Array = jax.Array


@dataclass(frozen=True, kw_only=True)
class Prompted(BaseTask):
    """The class of a document (`data.label_field`) by the word that is likeliest in a pattern, one for each class.

    A class's score is the sum of the log-probabilities of its word's tokens. Training minimises the cross-entropy of
    the scores over the classes; evaluating an untrained model is zero-shot, or with `shots` few-shot classification.
    """

    kind: Literal["prompted"] = "prompted"
    """The objective."""
    pattern: str = "{text}\n\n{word}"
    """Text around {text}, or around {0} and {1} of a pair (`data.fields`), with the place of the word, {word}; without
    it, the end."""
    words: tuple[str, ...] = ()
    """CLASS=WORD for each class, the space before the word included: '0= terrible' '1= great'."""
    shots: int = 0
    """Documents of the training split shown before the one asked about, with their words, evenly over the classes."""
    shot_seed: int = 0
    """Seed of their draw."""
    calibrate: bool = False
    """Subtract the scores that an empty text gets (https://arxiv.org/abs/2102.09690); twice the work."""
    label_smoothing: float = 0.0
    """Share of the class's probability spread over all classes."""

    @property
    def reports(self) -> tuple[str, ...]:
        """See `Task`."""
        return ("loss", "accuracy", "micro_f1", "macro_f1")

    def __post_init__(self) -> None:
        """Checks ranges."""
        check(0 <= self.label_smoothing < 1, f"task.label_smoothing is {self.label_smoothing}; it is in [0, 1)")
        check(self.shots >= 0, f"task.shots is {self.shots}; it must be 0 or more")
        slots_of(self.pattern)
        for word in self.words:
            name, equals, text = word.partition("=")
            check(
                name and equals and text,
                f"task.words has {word!r}; write CLASS=WORD, such as '0= terrible', with the space before the word",
            )

    def check(self, model: ModelConfig, data: DataConfig) -> None:
        """See `Task`."""
        check(
            model.mask in ("causal", "bidirectional") and not model.encoder_layers,
            f"task {self.kind} needs model.mask causal or bidirectional and no encoder; the model has model.mask"
            f" {model.mask} and model.encoder_layers {model.encoder_layers}",
        )
        slots = slots_of(self.pattern)
        check(
            model.mask != "causal" or slots[-1] == "word",
            f"task.pattern is {self.pattern!r}, and the model, which reads from left to right, tells the word before it"
            " has read the text; put {word} behind it",
        )
        check(
            len(self.words) >= 2,
            f"task.words is {self.words}; give a word for each class, such as '0= terrible' '1= great'",
        )
        check(
            data.label_field is not None or bool(data.mixture.datasets),
            f"task {self.kind} needs the class of each document; set data.label_field to the column that holds it",
        )
        pair = "0" in slots
        check(
            bool(data.mixture.datasets) or (has_parts(data) == pair and not data.sentences),
            f"task.pattern is {self.pattern!r}, "
            + ("of two texts; name their columns in data.fields" if pair else "of one text; leave data.fields out"),
        )

    def maker(self, model: ModelConfig, tokenizer: Tokenizer, labels: Sequence[str]) -> Maker:
        """See `Task`."""
        named = {name: text for name, _, text in (word.partition("=") for word in self.words)}
        check(labels, "the dataset has no classes; prepare it with data.label_field")
        for name in [*labels, *named]:
            where = "task.words has no word for" if name in labels else "the dataset doesn't know task.words'"
            check(
                name in labels and name in named,
                f"{where} the class {name!r}; give one word for each of {', '.join(map(repr, labels))}",
            )
        check(len(named) == len(self.words), f"task.words is {self.words}, with two words for a class; give one each")
        pattern = make_pattern(self.pattern, [named[name] for name in labels], tokenizer)
        mask_id = None
        if model.mask == "bidirectional":
            mask_id = tokenizer.mask_id
            if mask_id is None:
                raise UserError(
                    f"task {self.kind} fills masks in, and the tokenizer has none; train one with"
                    " --tokenizer.special-tokens '<mask>', or take kind wordpiece"
                )

        def make(store: TokenStore, config: DataConfig, training: bool) -> Examples:
            del training  # every document that isn't shown is an example
            return PromptedExamples(
                store,
                config.seq_len,
                pattern,
                bos_id=tokenizer.bos_id,
                eos_id=tokenizer.eos_id,
                mask_id=mask_id,
                shots=self.shots,
                shot_seed=self.shot_seed,
                separator=encode_behind(tokenizer, SEPARATOR),
                calibrate=self.calibrate,
            )

        return make

    def loss_from(
        self, model: Transformer, params: Any, hidden: Array, batch: Batch, dropout_key: Array | None
    ) -> tuple[Array, Sums]:
        """See `Task`; while evaluating also `confusion`, float32 `[C, C]`, labels down."""
        by_row = dropout_key is None
        scores, weights = self.scores(model, params, hidden, batch)
        labels, smoothing = batch["labels"], self.label_smoothing
        total, sums = losses.cross_entropy(scores, labels, weights, label_smoothing=smoothing, by_row=by_row)
        found = reported(sums, weights, by_row)
        if by_row:
            guesses = jnp.argmax(scores, axis=-1)
            found["confusion"] = metrics.confusion(labels, guesses, weights, scores.shape[-1])
        return total, found

    def scores(self, model: Transformer, params: Any, hidden: Array, batch: Batch) -> tuple[Array, Array]:
        """See `Task`: float32 `[B, C]`."""
        places, words, weights = batch["places"], batch["words"], batch["word_weights"]
        B, R, W = places.shape
        C = words.shape[1]
        at = jnp.take_along_axis(hidden, places.reshape(B * R, W, 1), axis=1)
        logits: Any = model.apply({"params": params}, at, method="logits")
        told = jax.nn.log_softmax(logits).reshape(B, R, W, -1)
        # Rows with the text, then those of an empty one; of an encoder one row tells all words.
        told = told.reshape(B, 1 + self.calibrate, -1, W, told.shape[-1])
        told = jnp.broadcast_to(told, (B, 1 + self.calibrate, C, W, told.shape[-1]))
        log_probs = jnp.take_along_axis(told, words[:, None, :, :, None], axis=-1)[..., 0]
        found = jnp.sum(log_probs * weights[:, None], axis=-1)
        return (found[:, 0] - found[:, 1] if self.calibrate else found[:, 0]), batch["label_weights"]

    def summarise(self, sums: metrics.Sums) -> dict[str, float]:
        """See `Task`; a training record has no confusion matrix, and so no F1."""
        if "confusion" in sums:
            return metrics.classification(sums)
        return {"loss": metrics.ratio(sums, "loss"), "accuracy": metrics.ratio(sums, "correct")}
