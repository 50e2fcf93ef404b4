"""The cleaned documents of a corpus on disk, between reading and writing: one folder a unit of the sources.

A document has an ordinal: its place in the order of the sources. A unit's folder holds, for its documents in order,
their texts and keys (UTF-8, one after another) and what later stages want to know of each as a column: an .npy file
whose first axis is the document (or, for `line_` columns, the line).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lm.data.manifest import SPLITS

SUMMARY_FILE = "summary.json"


def save_array(path: Path, array: np.ndarray) -> None:
    """`np.save`, but a full disk is an `OSError` that says so; numpy's own has no error number."""
    array = np.ascontiguousarray(array)
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(array.data.cast("B") if array.size else b"")


class UnitWriter:
    """Writes one unit into an existing empty folder; `finish` ends it."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._texts = (folder / "texts").open("wb")
        self._keys = (folder / "keys").open("wb")
        self._ends: dict[str, list[int]] = {"texts": [], "keys": []}
        self._columns: dict[str, list[np.ndarray]] = {}

    def add(self, keys: Sequence[str], texts: Sequence[str], columns: dict[str, np.ndarray]) -> None:
        """Appends documents, and their rows of every column."""
        for name, file, values in (("texts", self._texts, texts), ("keys", self._keys, keys)):
            for value in values:
                file.write(value.encode("utf-8"))
                self._ends[name].append(file.tell())
        for name, rows in columns.items():
            self._columns.setdefault(name, []).append(rows)

    def finish(self, summary: dict[str, Any]) -> None:
        """Completes the files; `summary` is what the unit says about itself, as JSON."""
        self._texts.close()
        self._keys.close()
        for name, ends in self._ends.items():
            save_array(self._folder / f"{name}.ends.npy", np.asarray(ends, np.int64))
        for name, parts in self._columns.items():
            save_array(self._folder / f"{name}.npy", np.concatenate(parts))
        (self._folder / SUMMARY_FILE).write_text(json.dumps(summary, ensure_ascii=False), encoding="utf-8")

    def close(self) -> None:
        """Closes what is still open after a failure, which says more than one to come."""
        for file in (self._texts, self._keys):
            with contextlib.suppress(OSError):
                file.close()


@dataclass
class Unit:
    """One unit, opened for reading."""

    folder: Path

    def __len__(self) -> int:
        return len(self._text_ends)

    @cached_property
    def summary(self) -> dict[str, Any]:
        """What the unit says about itself."""
        return json.loads((self.folder / SUMMARY_FILE).read_text(encoding="utf-8"))

    @cached_property
    def _text_ends(self) -> np.ndarray:
        return np.load(self.folder / "texts.ends.npy", mmap_mode="r")

    @cached_property
    def _key_ends(self) -> np.ndarray:
        return np.load(self.folder / "keys.ends.npy", mmap_mode="r")

    def column(self, name: str) -> np.ndarray:
        """A column, mapped and not read; empty if no document of the unit came through."""
        path = self.folder / f"{name}.npy"
        return np.load(path, mmap_mode="r") if path.exists() else np.zeros(0, np.uint64)

    def sizes(self) -> np.ndarray:
        """UTF-8 bytes of each text: int64 [n]."""
        return np.diff(self._text_ends, prepend=0)

    def text(self, i: int) -> str:
        """The text of a document."""
        return self._slice("texts", self._text_ends, i)

    def key(self, i: int) -> str:
        """The key of a document."""
        return self._slice("keys", self._key_ends, i)

    def _slice(self, name: str, ends: np.ndarray, i: int) -> str:
        start = int(ends[i - 1]) if i else 0
        with (self.folder / name).open("rb") as file:
            file.seek(start)
            return file.read(int(ends[i]) - start).decode("utf-8")

    def documents(self, first: int, last: int) -> Iterator[tuple[int, str, str]]:
        """Number in the unit, key and text of documents `[first, last)`, one in memory at a time."""
        with (self.folder / "texts").open("rb") as texts, (self.folder / "keys").open("rb") as keys:
            if first:
                texts.seek(int(self._text_ends[first - 1]))
                keys.seek(int(self._key_ends[first - 1]))
            for i in range(first, last):
                text = texts.read(int(self._text_ends[i]) - texts.tell())
                key = keys.read(int(self._key_ends[i]) - keys.tell())
                yield i, key.decode("utf-8"), text.decode("utf-8")


class Corpus:
    """All units of a work folder, addressed by ordinal.

    Args:
      folder: holds one folder a unit, whose names sort in the order of the sources.
    """

    def __init__(self, folder: Path):
        self.units = [Unit(path) for path in sorted(folder.iterdir()) if ".part-" not in path.name]
        self.offsets = np.cumsum([0, *(len(unit) for unit in self.units)])

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def column(self, name: str) -> np.ndarray:
        """A whole column in memory."""
        parts = [unit.column(name) for unit in self.units if len(unit)]
        return np.concatenate(parts) if parts else np.zeros(0, np.uint64)

    def rows(self, name: str, ordinals: np.ndarray) -> np.ndarray:
        """The rows of a column for some documents, read where they lie."""
        of = np.searchsorted(self.offsets, ordinals, side="right") - 1
        rows: np.ndarray | None = None
        for number in np.unique(of):
            (where,) = np.nonzero(of == number)
            found = self.units[number].column(name)[ordinals[where] - self.offsets[number]]
            if rows is None:
                rows = np.empty((len(ordinals), *found.shape[1:]), found.dtype)
            rows[where] = found
        return np.zeros(0, np.uint64) if rows is None else rows

    def locate(self, ordinal: int) -> tuple[Unit, int]:
        """The unit of a document and its number there."""
        number = int(np.searchsorted(self.offsets, ordinal, side="right")) - 1
        return self.units[number], ordinal - int(self.offsets[number])

    def documents(self, first: int, last: int) -> Iterator[tuple[int, str, str]]:
        """Ordinal, key and text of documents `[first, last)`."""
        for unit, offset in zip(self.units, self.offsets.tolist()):
            start, stop = max(first - offset, 0), min(last - offset, len(unit))
            if start < stop:
                for i, key, text in unit.documents(start, stop):
                    yield offset + i, key, text


def split_code(split: str) -> int:
    """A split as a small number, for columns."""
    return SPLITS.index(split)
