"""Tokenizers of the Hugging Face library, trained here or brought along; each is one `tokenizer.json`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm.errors import UserError
from lm.text.base import (
    BOS_NAMES,
    EOS_NAMES,
    MASK_NAMES,
    PAD_NAMES,
    Tokenizer,
    check_id,
    check_roles,
    cut_anywhere,
    cut_between_words,
    fingerprint_of,
    first_of,
    one_line,
    utf8,
    write_meta,
)

if TYPE_CHECKING:
    import tokenizers

HF_FILE = "tokenizer.json"
# Made here, so that it is known where a text may be cut: these separate words, or their words begin, at a space.
CUT_BETWEEN_WORDS = ("bpe", "unigram", "wordpiece", "word")


class SubwordTokenizer(Tokenizer):
    """A tokenizer of the Hugging Face library: of a kind made here (`bpe`, `word`, ...), or `hf`, brought along."""

    def __init__(self, definition: str, *, kind: str, origin: str, roles: Mapping[str, int] | None = None):
        """Reads a tokenizer.

        Args:
          definition: the content of a `tokenizer.json`; `save` writes it back unchanged.
          kind: which kind this program made, otherwise "hf".
          origin: where it came from, for error messages.
          roles: ids of `ROLES` that the model it belongs to calls otherwise than by name.

        Raises:
          UserError: if it is not a tokenizer, or has no token that separates documents.
        """
        import tokenizers

        try:
            self._hf: tokenizers.Tokenizer = tokenizers.Tokenizer.from_str(definition)
        except Exception as error:  # The Rust side raises plain Exception.
            raise UserError(f"{origin} is not a Hugging Face tokenizer.json: {one_line(error)}") from None
        self._definition = definition
        self._origin = origin
        self.kind = kind
        self.roles = dict(roles or {})
        vocabulary = self._hf.get_vocab(with_added_tokens=True)
        eos = next((name for name in EOS_NAMES if name in vocabulary), None)
        if eos is None:
            raise UserError(f"{origin} has no token that ends a document; it needs one of: {', '.join(EOS_NAMES)}")
        bos = next((name for name in BOS_NAMES if name in vocabulary), eos)
        self.vocab_size = max(vocabulary.values()) + 1
        check_roles(self.roles, self.vocab_size, origin)
        self.eos_id = self.roles.get("eos_id", vocabulary[eos])
        self.bos_id = self.roles.get("bos_id", vocabulary[bos])
        self.unk_id = _unknown(json.loads(definition).get("model") or {}, vocabulary)
        self.pad_id = first_of(PAD_NAMES, vocabulary)
        self.mask_id = first_of(MASK_NAMES, vocabulary)

        ends = [self._hf.id_to_token(i) for i in (self.eos_id, self.bos_id)]
        # Files converted by hand list them as ordinary tokens.
        self._hf.add_special_tokens([end for end in ends if end is not None])
        self._hf.encode_special_tokens = True  # Special tokens spelled out in text are text.
        self._hf.no_truncation()
        self._hf.no_padding()
        special = {token.content: i for i, token in self._hf.get_added_tokens_decoder().items() if token.special}
        self.special_tokens = dict(sorted(special.items(), key=lambda item: item[1]))

    def __reduce__(self) -> tuple[Any, ...]:
        # What the library pickles lacks the switch above: a copy in a worker process would let text forge tokens.
        return _rebuild, (self._definition, self.kind, self._origin, self.roles), {"chat_template": self.chat_template}

    @property
    def definition(self) -> str:
        """The content of its `tokenizer.json`."""
        return self._definition

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer`."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See `Tokenizer`; runs on all cores, without Python's lock."""
        try:
            encodings = self._hf.encode_batch_fast(texts, add_special_tokens=False)
        except TypeError:
            for text in texts:
                utf8(text)
            raise
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """See `Tokenizer`.

        What is unknown shows as the vocabulary spells it, such as `<unk>`. Kind `word` joins words by single spaces:
        the text comes back exactly but for its whitespace, capitals if `lowercase`, and unknown words.
        """
        return self._hf.decode(list(ids), skip_special_tokens=True)

    def id_to_piece(self, token_id: int) -> str:
        """See `Tokenizer`; ids that the vocabulary skips are spelled `<unused N>`."""
        check_id(token_id, self.vocab_size)
        return self._hf.id_to_token(token_id) or f"<unused {token_id}>"

    def save(self, folder: Path) -> None:
        """See `Tokenizer`."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / HF_FILE).write_text(self._definition, encoding="utf-8")
        write_meta(folder, self.kind, self.roles, template=self.chat_template)

    def fingerprint(self) -> str:
        """See `Tokenizer`."""
        return fingerprint_of("hf", self._definition, *(f"{name} {i}" for name, i in sorted(self.roles.items())))

    def pieces(self, text: str, size: int) -> Iterator[str]:
        """See `Tokenizer`.

        Only for tokenizers made here: others (normalisers, no word pattern) promise nothing of the kind.
        """
        if self.kind in CUT_BETWEEN_WORDS:
            yield from cut_between_words(text, size)
        elif self.kind == "char":
            yield from cut_anywhere(text, size)
        else:
            yield text


def _rebuild(definition: str, kind: str, origin: str, roles: Mapping[str, int]) -> SubwordTokenizer:
    return SubwordTokenizer(definition, kind=kind, origin=origin, roles=roles)


def _unknown(model: dict[str, Any], vocabulary: dict[str, int]) -> int | None:
    """The id that a model (as in `tokenizer.json`) gives to what it cannot spell."""
    if model.get("unk_id") is not None:  # Unigram
        return int(model["unk_id"])
    token = model.get("unk_token")  # the others
    return vocabulary.get(token) if token is not None else None
