"""Conversations as tokens: which template writes them, and what of them is learned."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lm.errors import UserError, check
from lm.text.base import Tokenizer
from lm.text.ids import IdsTokenizer
from lm.text.subword import SubwordTokenizer
from lm.text.template import ChatTemplate, Message


@dataclass(frozen=True, kw_only=True)
class ChatConfig:
    """How conversations are written."""

    template: Literal["tokenizer", "plain", "chatml"] | None = None
    """Documents are conversations, written by: the template that came with the tokenizer; plain: bos, message, eos,
    message, eos, …; chatml: <|im_start|>ROLE, message, <|im_end|>. None: documents are no conversations."""


_PLAIN = (
    "{{ BOS }}"
    "{%- for message in messages %}{{ message['content'] }}{{ EOS }}{% endfor %}"
)  # fmt: skip
_CHATML = (
    "{%- for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] }}"
    "{{ END if message['role'] == 'assistant' else '<|im_end|>' }}{{ '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_BUILT_IN = {"plain": _PLAIN, "chatml": _CHATML}
_IM_END = "<|im_end|>"
# A noncharacter, which no text holds: behind the first letter of what is only spelled like a special token.
_MARK = "\ufdd0"


def template_for(config: ChatConfig, tokenizer: Tokenizer) -> ChatTemplate | None:
    """The template that a config names, None for none; one that is built in names the tokenizer's own tokens.

    Raises:
      UserError: the tokenizer has none, or its texts are ids.
    """
    if config.template is None:
        return None
    check(
        not isinstance(tokenizer, IdsTokenizer),
        "data.chat writes texts, and this model came without a tokenizer; import it with its tokenizer's files",
    )
    if config.template == "tokenizer":
        check(
            tokenizer.chat_template is not None,
            "data.chat.template is tokenizer, but no chat template came with the tokenizer; choose plain or chatml",
        )
        return tokenizer.chat_template
    bos, eos = (tokenizer.id_to_piece(i) for i in (tokenizer.bos_id, tokenizer.eos_id))
    end = _IM_END if _IM_END in tokenizer.special_tokens else eos
    spelled = {
        name: json.dumps(token, ensure_ascii=False) for name, token in (("BOS", bos), ("EOS", eos), ("END", end))
    }
    return ChatTemplate(re.sub(r"\b(BOS|EOS|END)\b", lambda found: spelled[found[0]], _BUILT_IN[config.template]))


def check_chat_config(config: ChatConfig, tokenizer: Tokenizer | None) -> None:
    """Raises `UserError` for a template that cannot be had; `tokenizer` is None where it is yet to be trained."""
    check(
        config.template in (None, "tokenizer", *_BUILT_IN),
        f"data.chat.template is {config.template!r}; choose tokenizer, plain or chatml",
    )
    if tokenizer is not None:
        template_for(config, tokenizer)
    check(
        config.template != "tokenizer" or tokenizer is not None,
        "data.chat.template is tokenizer, but this tokenizer is yet to be trained and brings none; choose plain or"
        " chatml, or set tokenizer.kind to file: or hf: with a folder that holds one",
    )


def encode_behind(tokenizer: Tokenizer, text: str) -> list[int]:
    """Tokens of a text that follows another: without the space that some tokenizers put before each text."""
    newline, ids = tokenizer.encode("\n"), tokenizer.encode("\n" + text)
    return ids[len(newline) :] if ids[: len(newline)] == newline else tokenizer.encode(text)


Piece = str | int
"""A text, or a special token."""


class Chat:
    """A tokenizer with its chat template.

    What a message holds is text whatever it looks like: one that says `<|im_end|>` gives the tokens of these
    characters, never the special token. Those come from the template alone.
    """

    def __init__(self, tokenizer: Tokenizer):
        """Takes a tokenizer. Raises `UserError` for one without a template."""
        if tokenizer.chat_template is None:
            raise UserError("no chat template came with the tokenizer; set data.chat.template to plain or chatml")
        self.template = tokenizer.chat_template
        self._tokenizer = tokenizer
        names = sorted(tokenizer.special_tokens, key=lambda name: (-len(name), name))
        self._special = re.compile("|".join(map(re.escape, names)) or "(?!)")
        # Whether a text's tokens are the same wherever it begins; some tokenizers put a space before each text.
        self._same_anywhere = tokenizer.encode("\na") == tokenizer.encode("\n") + tokenizer.encode("a")

    def conversation(self, messages: Sequence[Message]) -> list[list[int]]:
        """Token ids of what is read and what is answered, in turn; see `ChatTemplate.turns`.

        An answer ends with the special token that the template puts behind it; the last, where there is none, with the
        tokenizer's end of text. What else the template puts there is read.

        Raises:
          UserError: as `ChatTemplate.turns`.
        """
        return self._encode(self._parts(messages))

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of messages and what comes before the answer. Raises `UserError` where the template fails."""
        text = self.template.render([self._guarded(message) for message in messages], ask=True)
        return self._encode([self._cut(text)])[0]

    @functools.cached_property
    def end_id(self) -> int:
        """The token that ends an answer."""
        return self.conversation([Message("user", "a"), Message("assistant", "b")])[1][-1]

    def _guarded(self, message: Message) -> Message:
        content = message.content.replace(_MARK, "")
        return message._replace(content=self._special.sub(lambda found: found[0][0] + _MARK + found[0][1:], content))

    def _parts(self, messages: Sequence[Message]) -> list[list[Piece]]:
        parts: list[list[Piece]] = []
        rest: list[Piece] = []  # behind the end of the last answer
        turns = self.template.turns([self._guarded(message) for message in messages])
        for read, answer in zip(turns[::2], turns[1::2]):
            parts.append([*rest, *self._cut(read)])
            pieces, rest = self._cut(answer), []
            special = [place for place, piece in enumerate(pieces) if isinstance(piece, int)]
            if special and all(isinstance(piece, str) and not piece.strip() for piece in pieces[special[-1] + 1 :]):
                pieces, rest = pieces[: special[-1] + 1], pieces[special[-1] + 1 :]
            parts.append(pieces)
        if not (parts[-1] and isinstance(parts[-1][-1], int)):
            parts[-1].append(self._tokenizer.eos_id)
        return parts

    def _cut(self, text: str) -> list[Piece]:
        """A text that a template wrote, cut at its special tokens."""
        pieces: list[Piece] = []
        at = 0
        for found in self._special.finditer(text):
            pieces += [text[at : found.start()], self._tokenizer.special_tokens[found[0]]]
            at = found.end()
        pieces.append(text[at:])
        return [piece.replace(_MARK, "") if isinstance(piece, str) else piece for piece in pieces if piece != ""]

    def _encode(self, parts: Sequence[Sequence[Piece]]) -> list[list[int]]:
        texts = [piece for part in parts for piece in part if isinstance(piece, str)]
        if self._same_anywhere:
            encoded = iter(self._tokenizer.encode_batch(texts))
        rows: list[list[int]] = []
        before: Piece | None = None
        for part in parts:
            row: list[int] = []
            for piece in part:
                if isinstance(piece, int):
                    row.append(piece)
                else:
                    row += next(encoded) if self._same_anywhere else self._encode_behind(before, piece)
                before = piece
            rows.append(row)
        return rows

    def _encode_behind(self, before: Piece | None, text: str) -> list[int]:
        """Tokens of a text as they are where it does not begin a document."""
        if isinstance(before, str):
            return encode_behind(self._tokenizer, text)
        if isinstance(before, int) and self._parsing is not None and not self._special.search(text):
            ids = self._parsing.encode(self._tokenizer.id_to_piece(before) + text, add_special_tokens=False).ids
            if ids[0] == before:
                return ids[1:]
        return self._tokenizer.encode(text)

    @functools.cached_property
    def _parsing(self) -> Any:
        """The tokenizer as the library has it, which knows what a text is behind a special token."""
        if not isinstance(self._tokenizer, SubwordTokenizer):
            return None
        import tokenizers

        made = tokenizers.Tokenizer.from_str(self._tokenizer.definition)
        made.no_truncation()
        made.no_padding()
        return made
