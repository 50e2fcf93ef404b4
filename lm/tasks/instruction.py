"""Instructions: a decoder learns to answer, in conversations of one turn or several."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from lm.data.config import DataConfig
from lm.data.loader import Maker
from lm.data.objectives.chat import ChatExamples
from lm.data.packing import Examples
from lm.data.parts import is_chat
from lm.data.store import TokenStore
from lm.errors import check
from lm.models.transformer import ModelConfig
from lm.tasks.base import TokenTask, check_mask
from lm.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Instruction(TokenTask):
    """What the assistant says in conversations (`data.chat`), with the token that ends it; all else is only read.

    `data.packing` documents puts several conversations into a row, kept apart; pad gives each a row.
    """

    kind: Literal["instruction"] = "instruction"
    """The objective."""
    writes_text = True

    def check(self, model: ModelConfig, data: DataConfig) -> None:
        """See `Task`."""
        check_mask(self.kind, model, "causal")
        check(
            is_chat(data) or bool(data.mixture.datasets),
            f"task {self.kind} needs conversations; set data.chat.template (tokenizer, plain or chatml), and"
            " data.fields to what is asked and answered or data.field to a column of messages",
        )
        check(
            data.packing != "stream",
            f"task {self.kind} keeps conversations apart; set data.packing to documents (several a row) or pad",
        )
        for name in ("stride", "eval_stride"):
            check(
                getattr(data, name) is None,
                f"data.{name} cuts long documents into windows, and task {self.kind} keeps conversations whole;"
                " leave it out",
            )

    def maker(self, model: ModelConfig, tokenizer: Tokenizer, labels: Sequence[str]) -> Maker:
        """See `Task`."""
        del model, tokenizer, labels
        told = False

        def make(store: TokenStore, config: DataConfig, training: bool) -> Examples:
            nonlocal told
            packed = config.packing == "documents"
            examples = ChatExamples(store, config.seq_len, packed=packed, on_error=config.on_error)
            if examples.left_out and training and not told:
                told = True
                log.warning(
                    "%d of %d conversations are left out of training: their last response is longer than a row",
                    examples.left_out,
                    len(store.document_offsets) - 1,
                )
            return examples

        return make
