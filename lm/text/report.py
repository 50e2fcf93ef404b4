"""What cleaning did: counts and a few examples for each rule, mergeable piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

MOST_EXAMPLES = 3
_BEFORE_DIFFERENCE = 20  # characters of an excerpt
_EXCERPT = 80


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

    def add_change(self, before: str, after: str, *, private: bool) -> None:
        """Counts a change; for `private`, see `change_example`."""
        self.changed += 1
        if len(self.changes) < MOST_EXAMPLES:
            self.changes.append(change_example(before, after, private=private))

    def add_drop(self, text: str, why: str) -> None:
        """Counts a dropped document."""
        self.dropped += 1
        self.reasons[why] = self.reasons.get(why, 0) + 1
        if len(self.drops) < MOST_EXAMPLES:
            self.drops.append({"text": excerpt(text), "why": why})

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


def change_example(before: str, after: str, *, private: bool) -> dict[str, str]:
    """Excerpts of both texts around their first difference.

    Args:
      before: the text as it came.
      after: what became of it.
      private: whether what was replaced must not be told: letters of `before` become x, its digits 0.
    """
    start = max(0, _common_prefix(before, after) - _BEFORE_DIFFERENCE)
    end = start + _EXCERPT
    return {"before": excerpt(before[start:end], private=private), "after": excerpt(after[start:end], private=private)}


def excerpt(text: str, *, private: bool = False) -> str:
    """How `text` begins, fit for UTF-8 and, if `private`, with x for letters and 0 for digits."""
    text = text[:_EXCERPT]
    if private:
        text = "".join("0" if char.isdigit() else "x" if char.isalpha() else char for char in text)
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
