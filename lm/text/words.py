"""Tokenizers of Chinese words: a segmenter finds them, a vocabulary by frequency numbers them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lm.errors import UserError, check
from lm.text.base import (
    END_OF_TEXT,
    MASK_NAMES,
    PAD_NAMES,
    UNKNOWN,
    Tokenizer,
    TokenizerConfig,
    check_id,
    fingerprint_of,
    first_bytes,
    first_of,
    most_frequent,
    one_line,
    utf8,
    write_meta,
)
from lm.text.segment import (
    JiebaSegmenter,
    MaxMatch,
    Segmenter,
    make_segmenter,
    read_user_words,
    read_word_list,
)

WORDS_FILE = "words.json"
_TRAINING_PIECE = 1 << 16  # characters


class SegmentedTokenizer(Tokenizer):
    """Words as a segmenter cuts them: id 0 is the unknown word, then words by frequency, then special tokens."""

    unk_id = 0

    def __init__(self, definition: str, *, origin: str, segmenter: Segmenter | None = None):
        """Reads a tokenizer.

        Args:
          definition: the content of `words.json`: segmenter, words and special tokens; `save` writes it back unchanged.
          origin: where it came from, for error messages.
          segmenter: the one that `definition` describes, if it is made already: a large one takes seconds.

        Raises:
          UserError: if it is none, or its segmenter is not installed as it was.
        """
        try:
            parts = json.loads(definition)
            self.segmenter: Segmenter = segmenter or make_segmenter(parts["segmenter"])
            self._words: list[str] = [UNKNOWN, *parts["words"]]
            special: list[str] = parts["special_tokens"]
            self._ids = {word: i for i, word in enumerate(self._words)}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{origin} is not a tokenizer of words: {one_line(error)}") from None
        self._definition = definition
        self._origin = origin
        self.special_tokens = {name: len(self._words) + i for i, name in enumerate(special)}
        self._spellings = [*self._words, *special]
        self.vocab_size = len(self._spellings)
        self.eos_id = self.bos_id = self.special_tokens[END_OF_TEXT]
        self.pad_id = first_of(PAD_NAMES, self.special_tokens)
        self.mask_id = first_of(MASK_NAMES, self.special_tokens)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self._definition, self._origin), {"chat_template": self.chat_template}

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer`."""
        utf8(text)
        known = self._ids.get
        return [known(word, 0) for word in self.segmenter.words(text)]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See `Tokenizer`; in this thread, as segmenters are written in Python."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """See `Tokenizer`. Words, which include spaces, are joined: exact but for the unknown, shown as `<unk>`."""
        return "".join([self._words[i] for i in ids if i < len(self._words)])

    def id_to_piece(self, token_id: int) -> str:
        """See `Tokenizer`."""
        check_id(token_id, self.vocab_size)
        return self._spellings[token_id]

    def save(self, folder: Path) -> None:
        """See `Tokenizer`."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / WORDS_FILE).write_text(self._definition, encoding="utf-8")
        write_meta(folder, "words", template=self.chat_template)

    def fingerprint(self) -> str:
        """See `Tokenizer`."""
        return fingerprint_of("words", self._definition)

    def pieces(self, text: str, size: int) -> Iterator[str]:
        """See `Tokenizer`; at the segmenter's blocks."""
        return self.segmenter.pieces(text, size)


def segmenter_of(config: TokenizerConfig) -> Segmenter:
    """The segmenter of kind `jieba` or `maxmatch`. Raises `UserError` for a list of words that cannot be read."""
    if config.kind == "jieba":
        known = read_user_words(Path(config.user_words)) if config.user_words is not None else None
        return JiebaSegmenter(hmm=config.hmm, user_words=known)
    listed = read_word_list(Path(config.word_list) if config.word_list is not None else None)
    return MaxMatch(listed, direction=config.direction)


def train_segmented(config: TokenizerConfig, texts: Iterable[str]) -> SegmentedTokenizer:
    """Counts words as kind `jieba` or `maxmatch` finds them, and keeps the most frequent."""
    segmenter = segmenter_of(config)
    counts: Counter[str] = Counter()
    for text in first_bytes(texts, config.training_bytes):
        for piece in segmenter.pieces(text, _TRAINING_PIECE):
            counts.update(segmenter.words(piece))
    special = [END_OF_TEXT, *config.special_tokens]
    for name in (UNKNOWN, *special):
        counts.pop(name, None)
    words = most_frequent(counts, room=config.vocab_size - 1 - len(special), min_count=config.min_count)
    check(
        words,
        f"no word of the training text occurs {config.min_count} times (tokenizer.min_count); lower it or add text",
    )
    parts = {"segmenter": segmenter.settings(), "words": words, "special_tokens": special}
    definition = json.dumps(parts, ensure_ascii=False) + "\n"
    return SegmentedTokenizer(definition, origin="the trained tokenizer", segmenter=segmenter)


def _rebuild(definition: str, origin: str) -> SegmentedTokenizer:
    return SegmentedTokenizer(definition, origin=origin)
