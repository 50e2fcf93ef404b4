"""Next-token prediction, of all tokens or of those behind a prefix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lm.data.config import DataConfig
from lm.data.loader import Maker, packed
from lm.data.objectives.spans import PrefixExamples
from lm.data.packing import Examples
from lm.data.store import TokenStore
from lm.models.transformer import ModelConfig
from lm.tasks.base import TokenTask, check_mask
from lm.text.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class CausalLM(TokenTask):
    """Every token from those before it."""

    kind: Literal["causal_lm"] = "causal_lm"
    """The objective."""
    spells_text = True
    writes_text = True

    def check(self, model: ModelConfig, data: DataConfig) -> None:
        """See `Task`."""
        del data
        check_mask(self.kind, model, "causal")

    def maker(self, model: ModelConfig, tokenizer: Tokenizer, labels: Sequence[str]) -> Maker:
        """See `Task`."""
        del model, labels
        return packed(tokenizer.bos_id)


@dataclass(frozen=True, kw_only=True)
class PrefixLM(TokenTask):
    """A text's end from its beginning, which is seen to both sides; where it is cut is drawn (arXiv:1910.10683)."""

    kind: Literal["prefix_lm"] = "prefix_lm"
    """The objective."""
    writes_text = True

    def check(self, model: ModelConfig, data: DataConfig) -> None:
        """See `Task`."""
        del data
        check_mask(self.kind, model, "prefix")

    def maker(self, model: ModelConfig, tokenizer: Tokenizer, labels: Sequence[str]) -> Maker:
        """See `Task`."""
        del model, labels
        base = packed(tokenizer.bos_id)

        def make(store: TokenStore, config: DataConfig, training: bool) -> Examples:
            return PrefixExamples(base(store, config, training), seed=config.seed)

        return make
