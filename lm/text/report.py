"""What cleaning did: counts and a few examples for each rule, mergeable piece by piece."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

MOST_EXAMPLES = 3
_BEFORE_DIFFERENCE = 20  # characters of an excerpt
_EXCERPT = 80
_MARGIN = 400  # characters around an excerpt in which masks look, so that they find what it cuts in two
# What `lm.text.mask` puts in the place of something, and such a word as `change_example` hides it.
_MASK = re.compile(r"<(?:[A-Z]{2,9}|x{2,9})>")
_LONGEST_MASK = 11


@dataclass
class RuleReport:
    """What one rule did to the documents that reached it."""

    seen: int = 0
    changed: int = 0
    dropped: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    """Why documents were dropped, and how many for each reason."""
    characters_in: int = 0
    characters_out: int = 0
    """Characters of what the rule passed on."""
    changes: list[dict[str, str]] = field(default_factory=list)
    """The first few changes in document order: excerpts `before` and `after`, around the first difference."""
    drops: list[dict[str, str]] = field(default_factory=list)
    """The first few dropped documents: how the `text` begins, and `why` it went."""

    def add_change(self, before: str, after: str, *, hide: Callable[[str], str] | None, private: bool) -> None:
        """Counts a change; for `hide` and `private` see `change_example`."""
        self.changed += 1
        if len(self.changes) < MOST_EXAMPLES:
            self.changes.append(change_example(before, after, hide=hide, private=private))

    def add_drop(self, text: str, why: str, *, hide: Callable[[str], str] | None) -> None:
        """Counts a dropped document."""
        self.dropped += 1
        self.reasons[why] = self.reasons.get(why, 0) + 1
        if len(self.drops) < MOST_EXAMPLES:
            self.drops.append({"text": excerpt(text, hide=hide), "why": why})

    def add(self, other: RuleReport) -> None:
        """Takes in the counts of documents that come later."""
        self.seen += other.seen
        self.changed += other.changed
        self.dropped += other.dropped
        for reason, count in other.reasons.items():
            self.reasons[reason] = self.reasons.get(reason, 0) + count
        self.characters_in += other.characters_in
        self.characters_out += other.characters_out
        self.changes = [*self.changes, *other.changes][:MOST_EXAMPLES]
        self.drops = [*self.drops, *other.drops][:MOST_EXAMPLES]


@dataclass
class CleanReport:
    """What cleaning did, in all and rule by rule."""

    documents: int = 0
    kept: int = 0
    changed: int = 0
    """Documents that were kept and are no longer what they were."""
    characters_in: int = 0
    characters_out: int = 0
    rules: dict[str, RuleReport] = field(default_factory=dict)
    """By name, in the order in which the rules are applied."""

    @property
    def dropped(self) -> int:
        """Documents that some rule dropped."""
        return self.documents - self.kept

    @staticmethod
    def merge(reports: Sequence[CleanReport]) -> CleanReport:
        """The report of all documents together.

        Args:
          reports: of consecutive pieces of a corpus, in document order.

        Returns:
          What one cleaner would have reported for the whole.
        """
        whole = CleanReport()
        for report in reports:
            whole.documents += report.documents
            whole.kept += report.kept
            whole.changed += report.changed
            whole.characters_in += report.characters_in
            whole.characters_out += report.characters_out
            for name, rule in report.rules.items():
                whole.rules.setdefault(name, RuleReport()).add(rule)
        return whole

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON can hold it."""
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> CleanReport:
        """The report that `to_dict` made `values` of."""
        rules = {name: RuleReport(**rule) for name, rule in values["rules"].items()}
        return CleanReport(**{**values, "rules": rules})


def change_example(before: str, after: str, *, hide: Callable[[str], str] | None, private: bool) -> dict[str, str]:
    """Excerpts of both texts around their first difference.

    Args:
      before: the text as it came.
      after: what became of it.
      hide: applied to both excerpts, with some text around them, so that they tell nothing that is masked later.
      private: whether the change itself was a mask: letters of `before` become x, its digits 0.
    """
    start = _common_prefix(before, after)
    first = _without_half_a_mask(before, max(0, start - _MARGIN))
    before, after = before[first : start + _MARGIN], after[first : start + _MARGIN]
    if private:
        before = "".join("0" if char.isdigit() else "x" if char.isalpha() else char for char in before)
    if hide is not None:
        before, after = (before if private else hide(before)), hide(after)
    start = start - first if private else _common_prefix(before, after)
    cut = _without_half_a_mask(after, max(0, start - _BEFORE_DIFFERENCE))
    return {
        "before": _storable(beginning(before[cut:], _EXCERPT)),
        "after": _storable(beginning(after[cut:], _EXCERPT)),
    }


def excerpt(text: str, *, hide: Callable[[str], str] | None) -> str:
    """How `text` begins, after `hide`."""
    text = text[:_MARGIN]
    return _storable(beginning(text if hide is None else hide(text), _EXCERPT))


def beginning(text: str, length: int) -> str:
    """The first `length` characters of `text`, and the rest of a mask, such as <PHONE>, that they would cut in two."""
    over = _mask_around(text, length)
    return text[: over.end() if over else length]


def _without_half_a_mask(text: str, start: int) -> int:
    """`start`, or where the mask begins in which it is."""
    over = _mask_around(text, start)
    return over.start() if over else start


def _mask_around(text: str, place: int) -> re.Match[str] | None:
    """The mask that begins before `place` and ends after it."""
    near = _MASK.finditer(text, max(0, place - _LONGEST_MASK + 1), place + _LONGEST_MASK)
    return next((mask for mask in near if mask.start() < place < mask.end()), None)


def _storable(text: str) -> str:
    """Text that UTF-8 can hold."""
    return text.encode("utf-8", errors="backslashreplace").decode("utf-8")


def _common_prefix(a: str, b: str) -> int:
    """How many characters `a` and `b` begin with in common: halving, so that long texts are compared in C."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
