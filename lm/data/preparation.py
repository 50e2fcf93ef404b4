"""What a preparation says about its work: the content of `report.json` (`lm.report` makes a page of it)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from lm.data.corpus import Corpus
from lm.data.manifest import SPLITS, SplitCounts
from lm.data.sources import SkipCounts
from lm.data.statistics import ORDERS, Statistics
from lm.text.clean import CleanReport
from lm.text.report import beginning
from lm.text.tokenizer import Tokenizer

REPORT_FILE = "report.json"
EXCERPT_CHARACTERS = 300
"""So much is shown of a document that is a duplicate, or has one."""

_EXAMPLES = 20  # pairs of duplicates shown


def reading_report(corpus: Corpus) -> dict[str, Any]:
    """Documents read, left out and cleaned, from what the units say about themselves.

    Returns:
      `documents`: by role of the source, how many were read, empty and dropped by cleaning; `skipped`: by role, what
      could not be read (`SkipCounts`) and its total; `clean`: a `CleanReport`.
    """
    documents: dict[str, dict[str, int]] = {}
    skipped: dict[str, SkipCounts] = {}
    for unit in corpus.units:
        counts = documents.setdefault(unit.summary["role"], {})
        for name, count in unit.summary["counts"].items():
            counts[name] = counts.get(name, 0) + count
        skipped.setdefault(unit.summary["role"], SkipCounts()).merge(SkipCounts(**unit.summary["skipped"]))
    clean = CleanReport.merge([CleanReport.from_dict(unit.summary["clean"]) for unit in corpus.units])
    return {
        "documents": documents,
        "skipped": {role: {"total": found.total, **dataclasses.asdict(found)} for role, found in skipped.items()},
        "clean": clean.to_dict(),
    }


def duplicates_report(
    corpus: Corpus, first: np.ndarray, exact: np.ndarray, removed: dict[str, int], lines: int
) -> dict[str, Any]:
    """Duplicates found, with examples.

    Args:
      corpus: all documents.
      first: int64 `[n]`, the document that stays for each; itself if it is no duplicate.
      exact: bool `[n]`, documents that equal another.
      removed: documents removed, by reason.
      lines: lines removed.
    """
    (again,) = np.nonzero(first != np.arange(len(first)))
    splits = corpus.column("split")
    across: dict[str, int] = {}
    for code_again in range(len(SPLITS)):
        for code_first in range(len(SPLITS)):
            count = int(((splits[again] == code_again) & (splits[first[again]] == code_first)).sum())
            if count and code_again != code_first:
                across[f"{SPLITS[code_again]} document that also stands in {SPLITS[code_first]}"] = count
    # The first pairs of each kind, those across splits before others: they are what a reader worries about.
    order = np.lexsort((again, splits[again] == splits[first[again]], exact[again]))
    equal = again[order[exact[again[order]]]][: _EXAMPLES // 2]
    near = again[order[~exact[again[order]]]][: _EXAMPLES // 2]
    return {
        "removed": removed,
        "across_splits": across,
        "lines_removed": lines,
        "examples": [
            {
                "kind": "exact" if exact[ordinal] else "near",
                **_excerpt(corpus, int(ordinal), "removed"),
                **_excerpt(corpus, int(first[ordinal]), "kept"),
            }
            for ordinal in [*near, *equal]
        ],
    }


def _excerpt(corpus: Corpus, ordinal: int, what: str) -> dict[str, str]:
    unit, i = corpus.locate(ordinal)
    split = SPLITS[int(unit.column("split")[i])]
    text = beginning(unit.text(i), EXCERPT_CHARACTERS)
    return {f"{what}_key": unit.key(i), f"{what}_split": split, f"{what}_text": text}


def split_report(
    counts: SplitCounts, parts: Sequence[tuple[dict[str, Any], np.ndarray]], tokenizer: Tokenizer
) -> dict[str, Any]:
    """Size, lengths, n-grams and tokens of one split; `parts` are the statistics and token counts of its shards."""
    statistics = Statistics.merged(part for part, _ in parts)
    token_counts = np.sum([count for _, count in parts], axis=0)
    frequent = np.argsort(-token_counts, kind="stable")[:20]
    unknown = None if tokenizer.unk_id is None else int(token_counts[tokenizer.unk_id])
    return {
        **dataclasses.asdict(counts),
        "characters": statistics.characters,
        "length_bins": {str(b): count for b, count in sorted(statistics.length_bins.items())},
        "sampled_characters": statistics.sampled_characters,
        "ngrams": {str(n): statistics.top(n, 20) for n in ORDERS},
        "unknown_tokens": unknown,
        "unused_tokens": int((token_counts == 0).sum()),
        "frequent_tokens": [[tokenizer.id_to_piece(int(i)), int(token_counts[i])] for i in frequent if token_counts[i]],
    }
