"""What a text corpus is made of: lengths and frequent n-grams, as counts that add up."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from lm.text.scripts import HAN, KANA, SOUTHEAST_ASIAN

ORDERS = (1, 2, 3)
"""The n of the n-grams that are counted."""

_SAMPLE_CHARACTERS = 1 << 20  # n-grams are counted over so much text of a shard, from its start
_DOCUMENT_CHARACTERS = 1 << 16  # and over so much of one document
_KEPT = 5_000  # n-grams a shard hands on, of each order
_UNSPACED = SOUTHEAST_ASIAN + KANA + HAN
_ALONE = re.compile(f"[々〇{_UNSPACED}]")
_TOKEN = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")


@dataclass
class Statistics:
    """Counts over documents."""

    documents: int = 0
    characters: int = 0
    length_bins: Counter[int] = field(default_factory=Counter)
    """Documents by length: bin b holds those of `[2**b, 2**(b + 1))` characters."""
    sampled_characters: int = 0
    """How much text the n-grams were counted in."""
    ngrams: dict[int, Counter[tuple[str, ...] | str]] = field(default_factory=lambda: {n: Counter() for n in ORDERS})
    """Words in a row, lower case; where words are not spaced (Chinese, Japanese), characters in a row. Tuples where
    they are counted, joined text once summed."""

    def add(self, text: str) -> None:
        """Counts one document."""
        self.documents += 1
        self.characters += len(text)
        self.length_bins[max(len(text).bit_length() - 1, 0)] += 1
        if self.sampled_characters < _SAMPLE_CHARACTERS:
            sample = text[:_DOCUMENT_CHARACTERS]
            self.sampled_characters += len(sample)
            tokens = _TOKEN.findall(sample.lower())
            for n, counter in self.ngrams.items():
                counter.update(zip(*(tokens[i:] for i in range(n))))

    def top(self, n: int, count: int) -> list[tuple[str, int]]:
        """The most frequent n-grams; of equally frequent ones the first in the order of code points."""
        ranked = sorted(((_joined(gram), times) for gram, times in self.ngrams[n].items()), key=lambda x: (-x[1], x[0]))
        return ranked[:count]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; rare n-grams are left out."""
        return {
            "documents": self.documents,
            "characters": self.characters,
            "length_bins": {str(b): count for b, count in sorted(self.length_bins.items())},
            "sampled_characters": self.sampled_characters,
            "ngrams": {str(n): dict(self.top(n, _KEPT)) for n in self.ngrams},
        }

    @classmethod
    def merged(cls, parts: Iterable[dict[str, Any]]) -> Statistics:
        """The sum of what `to_dict` gave for parts of a corpus."""
        total = cls()
        for part in parts:
            total.documents += part["documents"]
            total.characters += part["characters"]
            total.length_bins.update({int(b): count for b, count in part["length_bins"].items()})
            total.sampled_characters += part["sampled_characters"]
            for n, counts in part["ngrams"].items():
                total.ngrams[int(n)].update(counts)
        return total


def _joined(gram: str | tuple[str, ...]) -> str:
    """An n-gram as text: words with spaces between, characters of unspaced scripts without."""
    if isinstance(gram, str):
        return gram
    text = gram[0]
    for left, right in itertools.pairwise(gram):
        text += right if _ALONE.fullmatch(left) and _ALONE.fullmatch(right) else f" {right}"
    return text
