"""Sequence to sequence: translation, summarisation, questions answered as text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lm.data.config import DataConfig
from lm.data.loader import Maker
from lm.data.objectives.parts import Seq2SeqExamples, TextPairLM
from lm.data.packing import Examples
from lm.data.parts import has_parts
from lm.data.store import TokenStore
from lm.errors import check
from lm.models.transformer import ModelConfig
from lm.tasks.base import TokenTask
from lm.text.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Seq2Seq(TokenTask):
    """Targets from sources, the two parts of a document (`data.fields`, or a `parallel:` source).

    With an encoder-decoder `data.seq_len` is the length of targets; a decoder alone, causal or with a prefix mask,
    reads source and target as one text of that length.
    """

    kind: Literal["seq2seq"] = "seq2seq"
    """The objective."""
    writes_text = True
    source_len: int | None = None
    """Tokens in a source, for an encoder; None = data.seq_len. What is longer is cut."""

    def check(self, model: ModelConfig, data: DataConfig) -> None:
        """See `Task`."""
        check(
            model.encoder_layers > 0 or model.mask in ("causal", "prefix"),
            f"task {self.kind} writes a target token by token; model.mask is {model.mask}: choose causal or prefix, or"
            " set model.encoder_layers",
        )
        check(
            self.source_len is None or (model.encoder_layers > 0 and self.source_len >= 2),
            f"task.source_len is {self.source_len}; it is at least 2, and only with an encoder (model.encoder_layers)",
        )
        check(
            (has_parts(data) and not data.sentences) or bool(data.mixture.datasets),
            f"task {self.kind} needs documents of two parts, source and target; set data.fields to two columns, or"
            " data.source to parallel:SOURCE,TARGET",
        )

    def lengths(self, data: DataConfig) -> tuple[int, int]:
        """See `Task`; of a decoder alone, which has no source, the second is never asked."""
        return data.seq_len, self.source_len or data.seq_len

    def maker(self, model: ModelConfig, tokenizer: Tokenizer, labels: Sequence[str]) -> Maker:
        """See `Task`."""
        del labels

        def make(store: TokenStore, config: DataConfig, training: bool) -> Examples:
            del training  # every pair is an example
            ids = {"bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id}
            if model.encoder_layers:
                return Seq2SeqExamples(store, self.source_len or config.seq_len, config.seq_len, **ids)
            return TextPairLM(store, config.seq_len, **ids)

        return make
