"""Span corruption: what was cut out of a text, from the rest (T5, arXiv:1910.10683)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lm.data.config import DataConfig
from lm.data.loader import Maker
from lm.data.objectives.spans import SpanExamples, n_sentinels, sentinel_ids, span_lengths
from lm.data.packing import Examples
from lm.data.store import TokenStore
from lm.models.transformer import ModelConfig
from lm.tasks.base import TokenTask, check_encoder
from lm.text.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class SpanCorruption(TokenTask):
    """`data.seq_len` is the length of a source; that of a target follows from it."""

    kind: Literal["span_corruption"] = "span_corruption"
    """The objective."""
    writes_text = True
    density: float = 0.15
    """Share of the tokens that is cut out."""
    mean_span: float = 3.0
    """Mean length of what is cut out in one piece."""

    def check(self, model: ModelConfig, data: DataConfig) -> None:
        """See `Task`."""
        check_encoder(self.kind, model)
        n_sentinels(data.seq_len, density=self.density, mean_length=self.mean_span)

    def lengths(self, data: DataConfig) -> tuple[int, int]:
        """See `Task`."""
        return span_lengths(data.seq_len, density=self.density, mean_length=self.mean_span)[1], data.seq_len

    def maker(self, model: ModelConfig, tokenizer: Tokenizer, labels: Sequence[str]) -> Maker:
        """See `Task`."""
        del model, labels

        def make(store: TokenStore, config: DataConfig, training: bool) -> Examples:
            count = n_sentinels(config.seq_len, density=self.density, mean_length=self.mean_span)
            return SpanExamples(
                store,
                config.seq_len,
                bos_id=tokenizer.bos_id,
                eos_id=tokenizer.eos_id,
                sentinels=sentinel_ids(tokenizer, count),
                seed=config.seed,
                density=self.density,
                mean_length=self.mean_span,
                training=training,
            )

        return make
