"""Masked language modelling, alone or with next-sentence prediction (BERT, arXiv:1810.04805)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lm import losses, metrics
from lm.data.config import DataConfig
from lm.data.loader import Maker, packed
from lm.data.objectives.masking import MaskedExamples, Masker, MaskingConfig, check_masking_config, most_masked
from lm.data.objectives.pairs import BertExamples, PairExamples
from lm.data.packing import Examples
from lm.data.store import TokenStore
from lm.errors import check
from lm.models.transformer import ModelConfig, Transformer
from lm.tasks.base import Batch, Sums, TokenTask, check_mask, classified, reported
from lm.text.tokenizer import Tokenizer

Array = jax.Array


@dataclass(frozen=True, kw_only=True)
class _MaskingTask(TokenTask):
    """A loss on the tokens that are hidden, so that the head, most of a small model, need not see the others."""

    masking: MaskingConfig = field(default_factory=MaskingConfig)
    """Which tokens are hidden."""

    def scored(self, hidden: Array, batch: Batch) -> tuple[Array, Array, Array]:
        """See `TokenTask`; a row has as many places as masking hides at most, and order among them says nothing."""
        most = most_masked(self.masking.rate, hidden.shape[1])
        weights, at = jax.lax.top_k(batch["weights"], most)
        return (
            jnp.take_along_axis(hidden, at[..., None], axis=1),
            jnp.take_along_axis(batch["targets"], at, axis=1),
            weights,
        )


@dataclass(frozen=True, kw_only=True)
class MaskedLM(_MaskingTask):
    """Hidden tokens from all others."""

    kind: Literal["masked_lm"] = "masked_lm"
    """The objective."""

    def check(self, model: ModelConfig, data: DataConfig) -> None:
        """See `Task`."""
        del data
        check_masking_config(self.masking)
        check_mask(self.kind, model, "bidirectional")

    def maker(self, model: ModelConfig, tokenizer: Tokenizer, labels: Sequence[str]) -> Maker:
        """See `Task`."""
        del model, labels
        base = packed(tokenizer.bos_id)

        def make(store: TokenStore, config: DataConfig, training: bool) -> Examples:
            return MaskedExamples(base(store, config, training), Masker(tokenizer, self.masking, seed=config.seed))

        return make


@dataclass(frozen=True, kw_only=True)
class BertPretraining(_MaskingTask):
    """Hidden tokens of a pair of texts, and whether the second follows the first."""

    kind: Literal["bert"] = "bert"
    """The objective."""
    short_share: float = 0.1
    """Share of pairs that are short, of a drawn length."""
    random_share: float = 0.5
    """Share of pairs whose second text is from elsewhere."""

    @property
    def reports(self) -> tuple[str, ...]:
        """See `Task`."""
        return (*super().reports, "masked_loss", "next_loss", "next_accuracy")

    def check(self, model: ModelConfig, data: DataConfig) -> None:
        """See `Task`."""
        check_masking_config(self.masking)
        for name in ("short_share", "random_share"):
            value = getattr(self, name)
            check(0 <= value <= 1, f"task.{name} is {value}; it is a share of the pairs, from 0 to 1")
        check_mask(self.kind, model, "bidirectional")
        check(
            data.sentences or bool(data.mixture.datasets),
            f"task {self.kind} makes pairs of sentences, and the dataset doesn't say where they begin; set"
            " data.sentences",
        )
        check(
            model.n_classes in (0, 2),
            f"model.n_classes is {model.n_classes}; next-sentence prediction has 2, leave it at 0 or 2",
        )
        check(
            model.token_types != 1,
            "model.token_types is 1; pairs of texts have 2 types: set 2, or 0 for none",
        )

    def settle(self, model: ModelConfig, labels: Sequence[str]) -> ModelConfig:
        """See `Task`."""
        del labels
        return dataclasses.replace(model, n_classes=2)

    def maker(self, model: ModelConfig, tokenizer: Tokenizer, labels: Sequence[str]) -> Maker:
        """See `Task`."""
        del model, labels

        def make(store: TokenStore, config: DataConfig, training: bool) -> Examples:
            del training  # pairs are drawn alike
            pairs = PairExamples(
                store,
                config.seq_len,
                bos_id=tokenizer.bos_id,
                eos_id=tokenizer.eos_id,
                seed=config.seed,
                random_share=self.random_share,
                short_share=self.short_share,
            )
            return BertExamples(pairs, Masker(tokenizer, self.masking, seed=config.seed))

        return make

    def balance(self, batch: Batch) -> Batch:
        """Rows get the weight of tokens: the objective is the mean over tokens plus the mean over rows."""
        tokens, rows = batch["weights"].sum(), batch["label_weights"].sum()
        return batch | {"label_weights": batch["label_weights"] * (tokens / jnp.maximum(rows, 1.0))}

    def loss_from(
        self, model: Transformer, params: Any, hidden: Array, batch: Batch, dropout_key: Array | None
    ) -> tuple[Array, Sums]:
        """See `Task`; sums of the second loss are named `next_…`."""
        objective, sums = super().loss_from(model, params, hidden, batch, dropout_key)
        scores = classified(model, params, hidden, batch, dropout_key)
        weights = batch["label_weights"]
        following, of_rows = losses.cross_entropy(scores, batch["labels"], weights, by_row=dropout_key is None)
        found = reported(of_rows, weights, dropout_key is None)
        rows = {f"next_{name}": value for name, value in found.pop("rows", {}).items()}
        sums |= {f"next_{name}": value for name, value in found.items()}
        return objective + following, sums | ({"rows": sums["rows"] | rows} if rows else {})

    def summarise(self, sums: metrics.Sums) -> dict[str, float]:
        """`loss` is the sum of both, `masked_loss`, `perplexity` and `accuracy` are of hidden tokens."""
        result = metrics.language_model(sums)
        result["masked_loss"] = result["loss"]
        result["next_loss"] = metrics.ratio(sums, "next_loss", "next_weight")
        result["next_accuracy"] = metrics.ratio(sums, "next_correct", "next_weight")
        result["loss"] = result["masked_loss"] + result["next_loss"]
        if "loss_se" in result:
            result["masked_loss_se"] = result["loss_se"]
            result["next_loss_se"] = metrics.ratio_error(sums, "next_loss", "next_weight")
            result["next_accuracy_se"] = metrics.ratio_error(sums, "next_correct", "next_weight")
            both = [("loss", "weight"), ("next_loss", "next_weight")]
            result["loss_se"] = metrics.sum_of_ratios_error(sums, both)
        return result
