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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np

from lm.errors import check
from lm.text.shingles import condense, hash_text, mix, shingles, stream, width

_CHUNK = 1 << 18  # characters worked on at once: the arrays of a chunk stay in the cache
_ROWS = 1 << 10  # signatures or pairs worked on at once


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
    the work linear where thousands of documents are alike."""
    seed: int = 0
    """Chooses the permutations."""
    min_line_characters: int = 20
    """Shorter lines are never removed. Spaces don't count; a Chinese, Japanese or Korean character counts twice."""


_READ_BY = {
    **dict.fromkeys(("ngram", "threshold", "permutations", "bands", "bucket_window", "seed"), "near"),
    "min_line_characters": "lines",
}


def check_dedup_config(config: DedupConfig) -> None:
    """Raises `UserError` for settings that make no sense."""
    for name in ("ngram", "permutations", "bands", "bucket_window", "min_line_characters"):
        value = getattr(config, name)
        check(value >= 1, f"dedup.{name} is {value}; it must be at least 1")
    check(config.seed >= 0, f"dedup.seed is {config.seed}; it must not be negative")
    check(0 < config.threshold <= 1, f"dedup.threshold is {config.threshold}; it must be above 0 and at most 1")
    check(
        config.permutations % config.bands == 0,
        f"dedup.bands is {config.bands}; it must divide dedup.permutations, {config.permutations}",
    )
    for field in fields(config):
        value, reader = getattr(config, field.name), _READ_BY.get(field.name)
        check(
            reader is None or value == field.default or getattr(config, reader),
            f"dedup.{field.name} is {value}, but dedup.{reader}, which reads it, is off; "
            f"add --dedup.{reader} or leave the setting out",
        )


# Equal documents.


def exact_hashes(texts: Sequence[str]) -> np.ndarray:
    """Hashes that are equal for documents that are equal after NFKC and case folding, spaces left out.

    Returns:
      uint64 [n], from BLAKE2b: among 10**9 different documents the odds that any two share a hash are 2.7 %.
    """
    return np.array([hash_text(condense(text)) for text in texts], np.uint64)


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
    keys = mix(stream(config.seed, 2 * config.permutations)) >> np.uint64(32)
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
    keys = np.zeros((n, config.bands), np.uint64)
    factors = mix(stream(1, permutations // config.bands))
    for i in range(0, n, _ROWS):  # a few rows at a time: their numbers stay in the cache
        parts = signatures[i : i + _ROWS].reshape(-1, config.bands, len(factors))
        for j, factor in enumerate(factors):
            keys[i : i + _ROWS] += parts[:, :, j] * factor
        keys[i : i + _ROWS] = mix(keys[i : i + _ROWS])
    return keys


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
    for i in range(0, len(pairs), _ROWS):
        left, right = pairs[i : i + _ROWS].T
        result[i : i + _ROWS] = np.count_nonzero(signatures[left] == signatures[right], axis=1) >= least
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
    places = np.arange(len(texts))
    order = places if ranks is None else np.lexsort((ranks,))  # buckets are walked in the order of ranks
    bands = [candidate_pairs(keys[order, band], places, config.bucket_window) for band in range(config.bands)]
    pairs = order[unique_pairs(np.concatenate(bands))]
    first = first_of_cluster(len(texts), pairs[similar(rows, pairs, config)], ranks)
    return np.where(first == places, -1, first)


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
        condensed = condense(line)
        if width(condensed) >= config.min_line_characters:
            hashes[i] = hash_text(condensed) or 1
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


# Help.


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
