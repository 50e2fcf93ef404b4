"""Duplicates: equal documents, nearly equal documents, and lines that came before.

Everything here is a pure function over one unit's texts, or over a few numbers per document of the whole corpus, so
that a pipeline can work unit by unit and give the same answer for any number of units or workers:

    each unit:  exact_hashes   8 bytes a document
                signatures     4 * permutations bytes a document
                band_keys      8 * bands bytes a document, one column at a time below
                line_hashes    8 bytes a line
    all:        first_of_equal(hashes, ranks)                    which document an equal one gives way to
                candidate_pairs(keys of one band, ordinals)      16 bytes a pair
                similar(signatures, pairs, config)               the pairs that count
                first_of_cluster(n, pairs, ranks)                which document a near one gives way to
                repeated_lines(hashes, ranks)                    which lines go

Ranks say who stays: of a cluster the lowest rank (test before validation before train, then the order of the source),
and of equal ranks the lower index. Clusters are chains: if A is similar to B and B to C, all three are one cluster,
also where A and C are not similar.

A shingle is `ngram` tokens in a row. A token is a word, or one character of a script that puts no spaces between words
(Chinese, Japanese, Thai ...), so that one rule serves every language and mixed text; case, width forms, spaces and
punctuation don't count. `near` compares documents by the Jaccard similarity of their sets of shingles, estimated from
MinHash signatures (Broder 1997): the share of equal entries, with a standard error of sqrt(J (1 - J) / permutations).
"""

from __future__ import annotations

import functools
import hashlib
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lm.errors import check

# Changing a hash, a constant or the ranges below changes which documents of a dataset are kept: don't.
_MASK64 = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
_END = "\0"  # ends a document in a joined text
_CHUNK = 1 << 18  # characters worked on at once: the arrays of a chunk stay in the cache
_PAIRS = 1 << 14  # pairs compared at once
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


@dataclass(frozen=True, kw_only=True)
class DedupConfig:
    """Which duplicates are removed, and what counts as one."""

    exact: bool = False
    """Remove documents that equal an earlier one after NFKC and case folding, spaces left out."""
    near: bool = False
    """Remove documents whose shingles are those of an earlier one to a share of `threshold` or more."""
    lines: bool = False
    """Remove lines that stood in an earlier document; a document left without text is dropped."""
    ngram: int = 2
    """Tokens in a shingle; a token is a word, or one character of Chinese, Japanese, Thai and the like."""
    threshold: float = 0.55
    """Jaccard similarity of shingles from which documents count as near duplicates; 0.55 of 2-grams allows for one
    word in eight replaced, or for a third of the text exchanged in one piece."""
    permutations: int = 128
    """Entries of a signature. More estimate the similarity better and cost time and 4 bytes a document each."""
    bands: int = 32
    """Two documents are compared if their signatures agree in at least one of so many equal parts. More parts find
    less similar pairs; must divide `permutations`."""
    bucket_window: int = 16
    """Each document is compared with so many predecessors that share the band, and with the first one, which keeps
    the work linear where thousands of documents are equal."""
    seed: int = 0
    """Chooses the permutations."""
    min_line_characters: int = 20
    """Shorter lines are never removed. Spaces don't count; a Chinese, Japanese or Korean character counts twice."""


def check_dedup_config(config: DedupConfig) -> None:
    """Raises `UserError` for settings that make no sense."""
    for name in ("ngram", "permutations", "bands", "bucket_window", "min_line_characters"):
        value = getattr(config, name)
        check(value >= 1, f"dedup.{name} is {value}; it must be at least 1.")
    check(config.seed >= 0, f"dedup.seed is {config.seed}; it must not be negative.")
    check(0 < config.threshold <= 1, f"dedup.threshold is {config.threshold}; it must be above 0 and at most 1.")
    check(
        config.permutations % config.bands == 0,
        f"dedup.bands is {config.bands}; it must divide dedup.permutations, {config.permutations}.",
    )


# Equal documents.


def exact_hashes(texts: Sequence[str]) -> np.ndarray:
    """Hashes that are equal for documents that are equal after NFKC and case folding, spaces left out.

    Returns:
      uint64 [n], from BLAKE2b: among 10**9 different documents the odds that any two share a hash are 2.7 %.
    """
    return np.array([_hash_text(_condense(text)) for text in texts], np.uint64)


def first_of_equal(hashes: np.ndarray, ranks: np.ndarray | None = None) -> np.ndarray:
    """For each entry the index of the lowest-ranked entry with the same hash; itself where there is no lower one.

    Equal hashes need to be seen together, no more: a corpus may be split by the high bits of its hashes.

    Args:
      hashes: uint64 [n].
      ranks: integers [n]; by default the order.

    Returns:
      int64 [n].
    """
    order = np.lexsort((hashes,) if ranks is None else (ranks, hashes)).astype(np.int64)
    head = _heads(hashes[order])
    first = np.empty(len(hashes), np.int64)
    first[order] = order[head]
    return first


# Nearly equal documents.


def signatures(texts: Sequence[str], config: DedupConfig) -> np.ndarray:
    """MinHash signatures of the documents' shingles.

    A document of fewer tokens than `ngram` has one shingle, all of it; one without any token (signs only) has its
    characters as its one shingle, so that only what is equal has an equal signature.

    Returns:
      uint32 [n, permutations]; entry p is the least value of permutation p over the shingles.
    """
    # a * h + b modulo 2**32 with odd a is a permutation of the 32-bit hashes; they are well mixed before.
    keys = _mix(_stream(config.seed, 2 * config.permutations)) >> np.uint64(32)
    a, b = keys.astype(np.uint32).reshape(2, -1)
    a |= np.uint32(1)
    result = np.empty((len(texts), config.permutations), np.uint32)
    for begin, end in _chunks(texts):
        hashes, counts = shingles(texts[begin:end], config.ngram)
        starts = np.cumsum(counts) - counts
        least = np.empty((config.permutations, end - begin), np.uint32)
        permuted = np.empty_like(hashes)
        for p in range(config.permutations):
            np.multiply(hashes, a[p], out=permuted)
            permuted += b[p]
            np.minimum.reduceat(permuted, starts, out=least[p])
        result[begin:end] = least.T
    return result


def band_keys(signatures: np.ndarray, config: DedupConfig) -> np.ndarray:
    """One number for each band of each signature, equal where all entries of the band are.

    Args:
      signatures: uint32 [n, permutations].
      config: `bands` is read.

    Returns:
      uint64 [n, bands].
    """
    n, permutations = signatures.shape
    parts = signatures.reshape(n, config.bands, permutations // config.bands)
    keys = np.zeros((n, config.bands), np.uint64)
    for i, factor in enumerate(_mix(_stream(1, parts.shape[2]))):
        keys += parts[:, :, i] * factor
    return _mix(keys)


def candidate_pairs(keys: np.ndarray, ordinals: np.ndarray, window: int) -> np.ndarray:
    """Pairs of documents that agree in one band.

    In a bucket (documents with the same key) each document is paired with its `window` predecessors and with the
    first one. Documents that are alike share many bands, so a pair that a crowded bucket leaves out is met in another.

    Args:
      keys: uint64 [n], one band's column of `band_keys`, or the part of it that holds a range of keys.
      ordinals: int64 [n], the documents' numbers, in any order, each at most once.
      window: at least 1.

    Returns:
      int64 [m, 2], m <= (window + 1) * n: (lower ordinal, higher ordinal), sorted, each pair once.
    """
    order = np.lexsort((ordinals, keys))
    keys, ordinals = keys[order], ordinals[order]
    head = _heads(keys)
    index = np.arange(len(keys))
    found = []
    for back in range(1, window + 1):
        here = index[back:][head[back:] <= index[:-back]]
        if not len(here):
            break
        found.append(np.stack([ordinals[here - back], ordinals[here]], axis=1))
    far = index[index - head > window]
    found.append(np.stack([ordinals[head[far]], ordinals[far]], axis=1))
    return unique_pairs(np.concatenate(found))


def unique_pairs(pairs: np.ndarray) -> np.ndarray:
    """`pairs`, int64 [m, 2], sorted and each once; to merge those of several bands or ranges."""
    pairs = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
    new = np.ones(len(pairs), bool)
    new[1:] = (pairs[1:] != pairs[:-1]).any(axis=1)
    return pairs[new]


def similar(signatures: np.ndarray, pairs: np.ndarray, config: DedupConfig) -> np.ndarray:
    """Whether the share of equal signature entries reaches `threshold`.

    Args:
      signatures: uint32 [n, permutations]; may be a memory map, of which the rows of a few pairs are read at a time.
      pairs: int64 [m, 2], rows of `signatures`.
      config: `threshold` is read.

    Returns:
      bool [m].
    """
    least = int(np.ceil(config.threshold * signatures.shape[1] - 1e-9))
    result = np.empty(len(pairs), bool)
    for i in range(0, len(pairs), _PAIRS):
        left, right = pairs[i : i + _PAIRS].T
        result[i : i + _PAIRS] = np.count_nonzero(signatures[left] == signatures[right], axis=1) >= least
    return result


def first_of_cluster(n: int, pairs: np.ndarray, ranks: np.ndarray | None = None) -> np.ndarray:
    """For each document the lowest-ranked one of its cluster; itself where it is alone or the lowest.

    Args:
      n: number of documents.
      pairs: int64 [m, 2] of documents that belong together, in any order; clusters are the connected components.
      ranks: integers [n]; by default the order.

    Returns:
      int64 [n].
    """
    order = np.arange(n) if ranks is None else np.lexsort((ranks,))  # stable: of equal ranks the lower index leads
    place = np.empty(n, np.int64)
    place[order] = np.arange(n)
    low, high = place[pairs.min(axis=1)], place[pairs.max(axis=1)]
    label = np.arange(n)
    while len(low):
        # Every root takes the lowest root beside it, then every document points at its root.
        np.minimum.at(label, np.maximum(low, high), np.minimum(low, high))
        while (further := label[label] != label).any():
            label[further] = label[label[further]]
        low, high = label[low], label[high]
        low, high = low[low != high], high[low != high]
    return order[label[place]]


def near_duplicates(texts: Sequence[str], config: DedupConfig, ranks: np.ndarray | None = None) -> np.ndarray:
    """All of the near stage in memory.

    Returns:
      int64 [n]: the document whose near duplicate this one is (the lowest-ranked of its cluster), or -1.
    """
    rows = signatures(texts, config)
    keys = band_keys(rows, config)
    ordinals = np.arange(len(texts))
    pairs = unique_pairs(
        np.concatenate([candidate_pairs(keys[:, band], ordinals, config.bucket_window) for band in range(config.bands)])
    )
    first = first_of_cluster(len(texts), pairs[similar(rows, pairs, config)], ranks)
    return np.where(first == ordinals, -1, first)


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
        padded[starts[i]] = _hash_text(_condense(texts[i]))
    inside = np.ones(len(padded), bool)
    for back in range(1, ngram):  # a shingle does not run over the end of its document
        inside[starts + places - back] = False
    hashes = np.zeros(max(len(padded) - ngram + 1, 0), np.uint64)
    for i, factor in enumerate(_mix(_stream(2, ngram))):
        hashes += padded[i : i + len(hashes)] * (factor | np.uint64(1))
    hashes = hashes[inside[: len(hashes)]]
    return (_mix(hashes) >> np.uint64(32)).astype(np.uint32), places - ngram + 1


# Lines.


def line_hashes(text: str, config: DedupConfig) -> tuple[list[str], np.ndarray]:
    r"""The lines of a document and their hashes, equal where `exact_hashes` of the lines would be.

    Returns:
      the parts of `text` between "\n".
      uint64 [lines]: 0 for lines too short to count.
    """
    lines = text.split("\n")
    hashes = np.zeros(len(lines), np.uint64)
    for i, line in enumerate(lines):
        condensed = _condense(line)
        if _width(condensed) >= config.min_line_characters:
            hashes[i] = _hash_text(condensed) or 1
    return lines, hashes


def repeated_lines(hashes: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """Which lines stood in a lower-ranked document; repeats within one document stay.

    Equal hashes need to be seen together, no more: a corpus may be split by the high bits of its hashes.

    Args:
      hashes: uint64 [m] of `line_hashes`.
      ranks: integers [m], the rank of the line's document, different for different documents.

    Returns:
      bool [m].
    """
    return (hashes != 0) & (ranks[first_of_equal(hashes, ranks)] < ranks)


def without_lines(lines: Sequence[str], removed: np.ndarray) -> str:
    """The text of the lines that are not `removed`, bool [lines]; "" if nothing but space is left."""
    text = "\n".join(line for line, gone in zip(lines, removed, strict=True) if not gone)
    return text if text.strip() else ""


# Text to numbers.


def _condense(text: str) -> str:
    """What `exact` compares."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


def _hash_text(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _width(text: str) -> int:
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
    factors = _mix(_stream(3, int(lengths.max())))
    return _mix(np.add.reduceat(codes * factors[within], begins)), counts


def _codes(texts: Sequence[str]) -> np.ndarray:
    """Code points of the texts, each followed by a 0; those that are in no word by any rule are `_KINDS`."""
    joined = _END.join(texts) + _END
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
        elif len(text) > 1 or unicodedata.category(text)[0] == "M" or "ᅠ" <= text <= "ᇿ":
            special[code] = True
            kinds[code] = _in_word(chr(code))
        else:
            folded[code] = ord(text)
            kinds[code] = 1
    folded[_KINDS] = ord(" ")
    while (folded[folded] != folded).any():  # so that it changes nothing in text that is normalised already
        folded = folded[folded]
    for first, last in _UNSPACED:
        kinds[first : last + 1] *= 2
    return folded, kinds[folded], special


def _in_word(character: str) -> bool:
    """Letters, digits and the marks that belong to them; variation selectors do not."""
    if "\ufe00" <= character <= "\ufe0f":
        return False
    return character.isalnum() or unicodedata.category(character)[0] == "M"


def _chunks(texts: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Ranges of documents of about `_CHUNK` characters together, each at least one document."""
    begin = size = 0
    for i, text in enumerate(texts):
        size += len(text)
        if size >= _CHUNK or i + 1 == len(texts):
            yield begin, i + 1
            begin, size = i + 1, 0


def _heads(ordered: np.ndarray) -> np.ndarray:
    """For each place in a sorted array the place where its run of equal values begins."""
    new = np.ones(len(ordered), bool)
    new[1:] = ordered[1:] != ordered[:-1]
    return np.maximum.accumulate(np.where(new, np.arange(len(ordered)), 0))


def _stream(seed: int, n: int) -> np.ndarray:
    """Different 64-bit numbers, uint64 [n], for `_mix`; far apart for different seeds."""
    first = int(_mix(np.array([seed & _MASK64], np.uint64))[0])
    return np.arange(1, n + 1, dtype=np.uint64) * np.uint64(_GOLDEN) + np.uint64(first)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: every input bit flips about half of the output bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
