"""Text to numbers for deduplication: tokens, and hashes of shingles, many documents at a time.

A token is a word, or one character of a script that puts no spaces between words (Chinese, Japanese, Thai ...), after
NFKC and case folding; punctuation and spaces are in none. Code points become classes by a table, and only documents
with characters that NFKC treats by their neighbours are normalised as text, which is ten times slower.
"""

from __future__ import annotations

import functools
import hashlib
import re
import unicodedata
from collections.abc import Sequence

import numpy as np

# Changing a hash, a constant or the ranges below changes which documents of a dataset are kept: don't.
_MASK64 = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
_END = "\0"  # ends a document in a joined text
# Scripts without spaces between words: Thai, Lao, Tibetan, Myanmar, Khmer, CJK and kana, compatibility forms, CJK B-J.
_UNSPACED = (
    (0x0E00, 0x0FFF),
    (0x1000, 0x109F),
    (0x1780, 0x17FF),
    (0x2E80, 0x30FF),
    (0x3100, 0x312F),
    (0x31A0, 0x31BF),
    (0x31F0, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x3FFFF),
)
_WIDE = re.compile("[" + "".join(f"{chr(a)}-{chr(b)}" for a, b in _UNSPACED) + "\uac00-\ud7a3]")
_KINDS = 0x40000  # code points from here on (tags, selectors, private use) are in no word
# Letters that neither NFKC nor case folding changes, assigned or not yet: Chinese characters, Hangul syllables.
_PLAIN = ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0x20000, 0x2F7FF), (0x2FA20, 0x3FFFF))


def shingles(texts: Sequence[str], ngram: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of all shingles, repeated ones included; about 30 bytes of memory a character while it works.

    Returns:
      uint32 [s]: the hashes, document after document.
      int64 [n]: how many each document has; at least 1.
    """
    tokens, counts = _tokens(texts)
    # Every document gets at least `ngram` places; what a short one leaves over is 0 and counts for nothing.
    places = np.maximum(counts, ngram)
    starts = np.cumsum(places) - places
    padded = np.zeros(int(places.sum()), np.uint64)
    padded[np.arange(len(tokens)) + np.repeat(starts - (np.cumsum(counts) - counts), counts)] = tokens
    for i in np.flatnonzero(counts == 0).tolist():
        padded[starts[i]] = hash_text(condense(texts[i]))
    inside = np.ones(len(padded), bool)
    for back in range(1, ngram):  # a shingle does not run over the end of its document
        inside[starts + places - back] = False
    hashes = np.zeros(max(len(padded) - ngram + 1, 0), np.uint64)
    for i, factor in enumerate(mix(stream(2, ngram))):
        hashes += padded[i : i + len(hashes)] * (factor | np.uint64(1))
    hashes = hashes[inside[: len(hashes)]]
    return (mix(hashes) >> np.uint64(32)).astype(np.uint32), places - ngram + 1


def condense(text: str) -> str:
    """The text after NFKC and case folding, without spaces: what equal documents and lines share."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


def hash_text(text: str) -> int:
    """64 bits of BLAKE2b, in [0, 2**64)."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def width(text: str) -> int:
    """Characters; those of Chinese, Japanese, Korean and the like count twice."""
    return len(text) if text.isascii() else len(text) + len(_WIDE.findall(text))


def _tokens(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of the tokens, uint64 [t], document after document, and how many each document has, int64 [n]."""
    folded, kinds, special = _characters()
    codes = _codes(texts)
    ends = np.flatnonzero(codes == 0)
    if (places := np.flatnonzero(special[codes])).size:
        texts = list(texts)
        for i in np.unique(np.searchsorted(ends, places)).tolist():
            texts[i] = unicodedata.normalize("NFKC", texts[i]).casefold()
        codes = _codes(texts)
        ends = np.flatnonzero(codes == 0)
    codes, kind = folded[codes], kinds[codes]
    word = kind != 0
    starts = word.copy()
    starts[1:] &= (kind[1:] == 2) | (kind[:-1] != 1)
    counts = np.diff(np.cumsum(starts)[ends], prepend=0)
    begins = np.flatnonzero(starts[word])
    if not len(begins):
        return np.zeros(0, np.uint64), counts
    codes = codes[word]
    lengths = np.diff(begins, append=len(codes))
    within = np.arange(len(codes)) - np.repeat(begins, lengths)
    factors = mix(stream(3, int(lengths.max())))
    return mix(np.add.reduceat(codes * factors[within], begins)), counts


def _codes(texts: Sequence[str]) -> np.ndarray:
    """Code points of the texts, each followed by a 0; those that are in no word by any rule are `_KINDS`."""
    joined = _END.join([*texts, ""])
    if joined.count(_END) > len(texts):
        joined = "".join(text.replace(_END, " ") + _END for text in texts)
    codes = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), "<u4")
    return np.minimum(codes, np.uint32(_KINDS))


@functools.cache
def _characters() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What each code point is; the last entry is for all from `_KINDS` on.

    Returns:
      uint32: the code point that stands for it after NFKC and case folding; a space for what is in no word.
      uint8: 0 between words, 1 part of a word, 2 a token by itself.
      bool: whether only normalising the text around it tells what it becomes: marks that may join the character
        before them, and characters that become several.
    """
    folded = np.arange(_KINDS + 1, dtype=np.uint32)
    kinds = np.zeros(_KINDS + 1, np.uint8)
    special = np.zeros(_KINDS + 1, bool)
    for first, last in _PLAIN:
        kinds[first : last + 1] = 1
    for code in np.flatnonzero(kinds[:_KINDS] == 0).tolist():
        text = unicodedata.normalize("NFKC", chr(code)).casefold()
        if not any(map(_in_word, text)):
            folded[code] = ord(" ") if code else 0
        elif len(text) > 1 or unicodedata.category(text)[0] == "M" or "\u1160" <= text <= "\u11ff":
            special[code] = True
            kinds[code] = _in_word(chr(code))
        else:
            folded[code] = ord(text)
            kinds[code] = 1
    folded[_KINDS] = ord(" ")
    for first, last in _UNSPACED:
        kinds[first : last + 1] *= 2
    return folded, kinds[folded], special


def _in_word(character: str) -> bool:
    """Letters, digits and the marks that belong to them; variation selectors do not."""
    if "\ufe00" <= character <= "\ufe0f":
        return False
    return character.isalnum() or unicodedata.category(character)[0] == "M"


def stream(seed: int, n: int) -> np.ndarray:
    """Different 64-bit numbers, uint64 [n], for `mix`; far apart for different seeds."""
    first = int(mix(np.array([seed & _MASK64], np.uint64))[0])
    return np.arange(1, n + 1, dtype=np.uint64) * np.uint64(_GOLDEN) + np.uint64(first)


def mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: every input bit flips about half of the output bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
