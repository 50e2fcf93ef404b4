"""Which documents, and which lines, give way to others that say the same.

Of several the lowest rank stays: test before validation before training, then the order of the sources. Tasks find
pairs (`lm.data.stages`); chains of pairs are followed here, in memory that grows with some 30 bytes a document.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lm.data.corpus import Corpus, save_array
from lm.data.runners import RunnerConfig, Task, run_tasks
from lm.data.stages import REMOVED, DroppedLines, FindExact, FindLines, FindNear
from lm.text.dedup import DedupConfig, first_of_cluster, unique_pairs

# Keys looked at together by one task: 16 to 40 bytes each.
_KEYS_AT_ONCE = 20_000_000


@dataclass(frozen=True)
class Found:
    """Where each document goes, and why some go nowhere."""

    fate: np.ndarray
    """uint8 [n]: the code of its split, or `REMOVED`."""
    fate_file: Path
    dropped_lines: tuple[Path, ...]
    first: np.ndarray
    """int64 [n]: the document that stays for it; itself if it is no duplicate."""
    exact: np.ndarray
    """bool [n]: it equals another."""
    removed: dict[str, int]
    lines: int
    """Lines removed."""


def remove_duplicates(
    work: Path, corpus: Corpus, dedup: DedupConfig, runner: RunnerConfig, report: Callable[[str, int, int | None], None]
) -> Found:
    """Decides where each document goes, from the columns of the corpus.

    Args:
      work: the work folder; `work/units` holds the corpus.
      corpus: all documents.
      dedup: what counts as a duplicate.
      runner: where the work is done.
      report: told the phase, what is done and the total.
    """
    n = len(corpus)
    splits = corpus.column("split").astype(np.uint8)
    # Test before validation before training, then the order of the sources: who stands in a test set stays there.
    ranks = np.empty(n, np.int64)
    ranks[np.lexsort((np.arange(n), -splits.astype(np.int64)))] = np.arange(n)
    work.mkdir(exist_ok=True)
    save_array(work / "ranks.npy", ranks)
    common: dict[str, Any] = {"units": work / "units", "ranks": work / "ranks.npy"}
    parts = 1 + n // _KEYS_AT_ONCE

    def outputs(kind: str, task: type, count: int, **more: Any) -> list[Task]:
        return [
            task(output=work / kind / f"{part:04d}.npy", size=n // count + 1, part=part, parts=count, **common, **more)
            for part in range(count)
        ]

    none = np.zeros((0, 2), np.int64)
    bands = dedup.bands if dedup.near else 0
    exact = outputs("exact", FindExact, parts) if dedup.exact else []
    near = [
        task
        for band in range(bands)
        for task in outputs(f"near-{band:03d}", FindNear, parts, band=band, dedup=dedup, exact=work / "exact.npy")
    ]
    total = sum(task.size for task in [*exact, *near])
    if exact:
        run_tasks(exact, runner, lambda done, _: report("deduplicate", done, total))
    exact_pairs = np.concatenate([none, *(np.load(task.output) for task in exact)])
    equal = np.zeros(n, bool)
    equal[exact_pairs[:, 1]] = True
    save_array(work / "exact.npy", equal)
    if near:
        before = total - sum(task.size for task in near)
        run_tasks(near, runner, lambda done, _: report("deduplicate", before + done, total))
    near_pairs = unique_pairs(np.concatenate([none, *(np.load(task.output) for task in near)]))
    first = first_of_cluster(n, np.concatenate([exact_pairs, near_pairs]), ranks)
    again = first != np.arange(n)
    fate = np.where(again, np.uint8(REMOVED), splits)
    removed = {"exact duplicate": int((again & equal).sum()), "near duplicate": int((again & ~equal).sum())}

    fate_file = work / "fate.npy"
    save_array(fate_file, fate)
    dropped: tuple[Path, ...] = ()
    lines = 0
    if dedup.lines:
        count = 1 + int(corpus.column("line_count").sum()) // _KEYS_AT_ONCE
        # What is kept now and what is left once lines are gone are two files: an interrupted task finds the first.
        tasks = outputs("lines", FindLines, count, fate=fate_file)
        run_tasks(tasks, runner, lambda done, total: report("find repeated lines", done, total))
        dropped = tuple(task.output for task in tasks)
        for offset, emptied, gone in DroppedLines(corpus, dropped).emptied():
            there = fate[offset : offset + len(emptied)]
            removed["repeated lines"] = removed.get("repeated lines", 0) + int((emptied & (there != REMOVED)).sum())
            there[emptied] = REMOVED
            lines += gone
        fate_file = work / "fate-lines.npy"
        save_array(fate_file, fate)
    return Found(fate, fate_file, dropped, first, equal, removed, lines)
