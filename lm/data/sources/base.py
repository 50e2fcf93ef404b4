"""What every source shares: documents, units of work, and the count of what was left out."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from lm.data.config import DataConfig
from lm.data.manifest import SourceFile
from lm.errors import UserError, check

_EXAMPLES = 5

# Why something is left out where `on_error` is "skip".
BINARY = "binary file"
UNDECODABLE = "undecodable text"
DAMAGED = "damaged file"
BROKEN_JSON = "broken JSON"
BROKEN_ROW = "broken row"
NO_FIELD = "no such field"
NOT_TEXT = "field without text"
BAD_ANSWER = "answer out of place"
BAD_CHAT = "no conversation"
EMPTY_MESSAGE = "empty message"
TOO_LARGE = "larger than max_document_bytes"


@dataclass(frozen=True)
class Document:
    """One document of a source."""

    key: str
    """Where it stands: a path below the source's folder, with `:LINE` or `:ROW` (from 1) where a file holds several."""
    text: str
    """Its text, as it stands in the file."""
    group: str | None = None
    """The value of `DataConfig.group_field`: documents of one group share a split. None: a group of its own."""
    label: str | None = None
    """The value of `DataConfig.label_field`; of several classes all of them, as `lm.data.parts.join_classes` does."""
    span: tuple[int, int] | None = None
    """Of a question: the first and the last part of its first answer; -1 and -1 if there is none."""
    answers: tuple[str, ...] = ()
    """Of a question: every right answer."""


@dataclass(frozen=True)
class Part:
    """A file, or a stretch of one."""

    key: str
    """The file's key in `Source.files`."""
    path: Path
    """The file."""
    bytes: int
    """Its share of the file's size on disk."""
    start: int = 0
    """Where it begins: a byte, a row group or a record, as its source counts."""
    stop: int | None = None
    """Where it ends, in the same count; None for the end of the file."""
    first: int = 1
    """Number of its first line or row in the file, from 1."""
    encoding: str | None = None
    """The file's encoding, where it has been found out."""


@dataclass(frozen=True)
class Unit:
    """A piece of work: what one process reads in one go. Small, and can be pickled."""

    parts: tuple[Part, ...]

    @property
    def bytes(self) -> int:
        """Its share of the sizes on disk; those of all units add up to the size of `Source.files`."""
        return sum(part.bytes for part in self.parts)


@dataclass
class SkipCounts:
    """What was left out because it could not be used."""

    counts: dict[str, int] = field(default_factory=dict)
    """How many by reason: documents, or whole files."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """The first few by reason: where they stand, and what is wrong."""

    def add(self, reason: str, example: str) -> None:
        """Counts one."""
        self.merge(SkipCounts({reason: 1}, {reason: [example]}))

    def merge(self, other: SkipCounts) -> None:
        """Adds the counts of what comes after; in the order of units, the same for any number of workers."""
        for reason, count in other.counts.items():
            self.counts[reason] = self.counts.get(reason, 0) + count
            shown = self.examples.setdefault(reason, [])
            shown += other.examples[reason][: _EXAMPLES - len(shown)]

    @property
    def total(self) -> int:
        """How many in all."""
        return sum(self.counts.values())


class Problem(NamedTuple):
    """The arguments of `BaseSource.problem`."""

    reason: str
    example: str
    remedy: str


class Source(Protocol):
    """Something that yields documents in an order that never changes. It can be pickled."""

    bytes_read: int
    """How much of `files`, in bytes on disk, the latest `read` or `documents` has gone through; for progress bars."""
    skipped: SkipCounts
    """What the latest `read` or `documents` has left out so far."""

    def files(self) -> list[tuple[str, Path]]:
        """Key and path of the files whose content decides what `documents` yields."""
        ...

    def units(self, target_bytes: int) -> list[Unit]:
        """Cuts the source into units of about so many bytes on disk.

        Their documents, one unit after the other, are `documents()`. They depend on the files and `target_bytes`
        alone. Large files are cut where that can be done; small files share a unit.
        """
        ...

    def read(self, unit: Unit) -> Iterator[Document]:
        """Streams the documents of a unit, one in memory at a time; counts from 0 in `bytes_read` and `skipped`.

        Raises `UserError` for what cannot be read where `on_error` is "stop".
        """
        ...

    def documents(self) -> Iterator[Document]:
        """Streams all documents; see `read`."""
        ...


class BaseSource:
    """The part of a `Source` that is the same for all: subclasses give `files`, `parts` and `read_part`."""

    def __init__(self, config: DataConfig):
        self.config = config
        self.bytes_read = 0
        self.skipped = SkipCounts()
        self._before = 0  # bytes of the parts that are read

    def files(self) -> list[tuple[str, Path]]:
        """See `Source`."""
        raise NotImplementedError

    def parts(self, target_bytes: int | None) -> Iterator[Part]:
        """Files, those much larger than `target_bytes` cut into parts of about that size; None for whole files."""
        raise NotImplementedError

    def read_part(self, part: Part) -> Iterator[Document]:
        """The documents of a part; sets `self.bytes_read` to `progress(done)` as it goes."""
        raise NotImplementedError

    def units(self, target_bytes: int) -> list[Unit]:
        """See `Source`."""
        check(target_bytes > 0, f"units of {target_bytes} bytes were asked for; at least 1 is needed")
        units: list[Unit] = []
        group: list[Part] = []
        size = 0
        for part in self.parts(target_bytes):
            if group and size + part.bytes > target_bytes:
                units.append(Unit(tuple(group)))
                group, size = [], 0
            group.append(part)
            size += part.bytes
        self.bytes_read = 0
        return [*units, Unit(tuple(group))] if group else units

    def read(self, unit: Unit) -> Iterator[Document]:
        """See `Source`."""
        return self._read(unit.parts)

    def documents(self) -> Iterator[Document]:
        """See `Source`."""
        return self._read(self.parts(None))

    def _read(self, parts: Iterator[Part] | Sequence[Part]) -> Iterator[Document]:
        self.bytes_read = 0
        self.skipped = SkipCounts()
        done = 0
        for part in parts:
            self._before = done
            yield from self.read_part(part)
            done += part.bytes
            self.bytes_read = done

    def progress(self, done: int) -> None:
        """Notes that `done` bytes of the part at hand are read."""
        self.bytes_read = self._before + done

    def too_large(self, where: str) -> Problem:
        """The problem of a document that is longer than `max_document_bytes`."""
        return Problem(
            TOO_LARGE,
            f"{where} is longer than data.max_document_bytes {self.config.max_document_bytes}",
            "raise data.max_document_bytes, or make smaller documents (data.document)",
        )

    def problem(self, reason: str, example: str, remedy: str) -> None:
        """Input that cannot be used: counts it, or raises `UserError` where `on_error` is "stop".

        Args:
          reason: one of the names at the top of this module.
          example: where it stands and what is wrong.
          remedy: what the user can do about it.
        """
        if self.config.on_error == "stop":
            raise UserError(f"{example}; {remedy}, or --data.on-error skip to leave such out and count them")
        self.skipped.add(reason, example)


def fingerprint_file(key: str, path: Path) -> SourceFile:
    """Size and content hash of a file. Raises `UserError` if it cannot be read."""
    digest = hashlib.blake2b(digest_size=16)
    size = 0
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
                size += len(block)
    except OSError as error:
        raise unreadable(path, error) from None
    return SourceFile(path=key, bytes=size, blake2b=digest.hexdigest())


def file_size(path: Path) -> int:
    """Size of a file, 0 if it is gone: whoever reads it will say so."""
    return path.stat().st_size if path.exists() else 0


def match(source: str, pattern: str) -> list[tuple[str, Path]]:
    """Sorted (key, path) of the files that a glob names; keys are paths below its fixed part."""
    path = Path(pattern).expanduser()
    check(not path.is_dir(), f"source {source!r} is a folder; name its files, as in {source.rstrip('/')}/**/*.txt")
    if path.is_file():
        return [(path.name, path)]
    fixed = []
    for part in path.parts[:-1]:
        if glob.has_magic(part):
            break
        fixed.append(part)
    base = Path(*fixed)
    found = [Path(name) for name in glob.glob(str(path), recursive=True)]
    files = sorted((file.relative_to(base).as_posix(), file) for file in found if file.is_file())
    check(files, f"source {source!r} matches no file; check the path, relative to {Path.cwd()}")
    return files


def unreadable(path: Path, error: Exception) -> UserError:
    """The `UserError` for a file that the system, or a decompressor, cannot read."""
    return UserError(f"cannot read {path}: {reason_of(error)}")


def reason_of(error: Exception) -> str:
    """What went wrong, in a few words."""
    return error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)


def one_line(error: BaseException) -> str:
    """An exception's message on one line, cut where it is long."""
    return " ".join(str(error).split())[:300]


_KINDS = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}


def kind(value: object) -> str:
    """What a value is, as JSON calls it, for messages."""
    return "null" if value is None else _KINDS.get(type(value), type(value).__name__)


def listed(names: Any) -> str:
    """The first few of some names, for messages."""
    return ", ".join(map(repr, list(names)[:10])) or "none"
