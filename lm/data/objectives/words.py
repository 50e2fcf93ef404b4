"""Where words begin among tokens, so that all pieces of a word can be masked together.

A word is what its tokenizer's kind says: a WordPiece and the `##` pieces behind it; a token of a word-level kind; and
else, for bytes, characters, byte-level BPE and SentencePiece, a run of letters and digits with the space before it.
A punctuation mark is a word, and so is a Chinese character, unless jieba finds that it belongs to a longer one.
"""

from __future__ import annotations

import re
from typing import Literal

import numpy as np

from lm.text.segment import JiebaSegmenter
from lm.text.sentences import is_unspaced
from lm.text.spelling import spelling_of, surface
from lm.text.tokenizer import Tokenizer

_HAN = re.compile(r"[〇\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]{2,}")
_BREAK = b"\0"  # stands where no word goes on

# Bytes within a character, as they are when the others are in another token.
_CONTINUATIONS = "".join(map(chr, range(0xDC80, 0xDCC0)))
# What a character, or the byte of one whose others are in another token, says about words.
_SPACE, _IDEOGRAPH, _LETTER, _CONTINUATION, _MARK = range(5)
# _GOES_ON[last of the token before, first of this one]: whether a word goes on.
_GOES_ON = np.zeros((5, 5), bool)
_GOES_ON[:, _CONTINUATION] = True
_GOES_ON[_SPACE, [_IDEOGRAPH, _LETTER, _MARK]] = True
_GOES_ON[_LETTER, _LETTER] = True


class WordStarts:
    """Where words begin, for one tokenizer; made once, as it looks at the whole vocabulary. Can be pickled.

    Args:
      tokenizer: whose tokens are asked about.
      words: `pieces`, or `jieba` for Chinese words as well.

    Raises:
      UserError: jieba is asked for and not installed.
    """

    def __init__(self, tokenizer: Tokenizer, *, words: Literal["pieces", "jieba"] = "pieces"):
        pieces = [tokenizer.id_to_piece(i) for i in range(tokenizer.vocab_size)]
        kind = spelling_of(tokenizer, pieces)
        fixed = {*tokenizer.special_tokens.values(), tokenizer.unk_id}
        self._surfaces = [_BREAK if i in fixed else surface(piece, kind) for i, piece in enumerate(pieces)]
        self._surfaces.append(_BREAK)  # -1: no token
        texts = [one.decode("utf-8", errors="surrogateescape") or "\0" for one in self._surfaces]
        self._first = np.array([_class_of(text[0]) for text in texts], np.int8)
        self._last = np.array([_class_of(text.rstrip(_CONTINUATIONS)[-1:] or text[-1]) for text in texts], np.int8)
        self._joined: np.ndarray | None = None
        if kind in ("wordpiece", "words"):
            self._joined = np.array([kind == "wordpiece" and piece.startswith("##") for piece in [*pieces, ""]])
        self._segmenter = JiebaSegmenter() if words == "jieba" else None

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        """bool [N, T], True where a word begins; a row begins one. `tokens`: ints [N, T], -1 where there is none."""
        starts = np.ones(tokens.shape, bool)
        if self._joined is not None:
            starts[:, 1:] = ~self._joined[tokens[:, 1:]]
        else:
            last = self._last[tokens]
            # Bytes within a character are of its first byte's class, which stands in a token before.
            column = np.where(last == _CONTINUATION, 0, np.arange(tokens.shape[1]))
            last = np.take_along_axis(last, np.maximum.accumulate(column, axis=1), 1)
            starts[:, 1:] = ~_GOES_ON[last[:, :-1], self._first[tokens[:, 1:]]]
        if self._segmenter is not None:
            starts &= ~self._inside_words(tokens)
        return starts

    def _inside_words(self, tokens: np.ndarray) -> np.ndarray:
        """bool [N, T]: the token begins inside a Chinese word of jieba's."""
        assert self._segmenter is not None
        rows = np.concatenate([tokens, np.full((len(tokens), 1), -1)], axis=1)  # no word reaches into the next row
        surfaces = [self._surfaces[i] for i in rows.ravel().tolist()]
        sizes = np.fromiter(map(len, surfaces), np.int64, len(surfaces))
        text = b"".join(surfaces).decode("utf-8", errors="surrogateescape")
        codes = np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), np.uint32)
        widths = 1 + (codes >= 0x80).astype(np.int64) + (codes >= 0x800) + (codes >= 0x10000)
        widths[(codes >= 0xDC80) & (codes <= 0xDCFF)] = 1  # a byte that is no character
        inside = np.zeros(len(text) + 1, bool)  # by character
        for run in _HAN.finditer(text):
            at = run.start()
            for word in self._segmenter.words(run.group()):
                inside[at + 1 : at + len(word)] = True
                at += len(word)
        by_byte = np.zeros(int(sizes.sum()) + 1, bool)
        by_byte[np.cumsum(widths) - widths] = inside[:-1]
        return by_byte[np.cumsum(sizes) - sizes].reshape(rows.shape)[:, :-1] & (tokens >= 0)


def word_starts(
    tokenizer: Tokenizer, tokens: np.ndarray, *, words: Literal["pieces", "jieba"] = "pieces"
) -> np.ndarray:
    """Where words begin: bool like `tokens`, integers [N, T]. For many batches, keep a `WordStarts`."""
    return WordStarts(tokenizer, words=words)(tokens)


def _class_of(character: str) -> int:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # one byte of a character that is spread over tokens
        byte = code - 0xDC00
        if byte < 0xC0:
            return _CONTINUATION
        return _IDEOGRAPH if 0xE3 <= byte <= 0xE9 else _LETTER
    if character.isspace():
        return _SPACE
    if is_unspaced(character):
        return _IDEOGRAPH
    return _LETTER if re.match(r"\w", character) else _MARK
