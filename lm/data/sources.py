"""Sources of text: a stream of documents, and fingerprints of the files they come from.

A source is a string: `text:GLOB`, `jsonl:GLOB`, `tfds:NAME[/CONFIG][#SPLIT]`, `tfds:FOLDER[#SPLIT]` or
`python-stdlib`. To add one, write a class with `files` and `documents` and list it in `open_source`.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import json
import os
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lm.data.config import DataConfig
from lm.data.manifest import SourceFile
from lm.errors import UserError, check

FORMS = "text:GLOB, jsonl:GLOB, tfds:NAME[/CONFIG][#SPLIT] or python-stdlib"

_UTF8_BOM = b"\xef\xbb\xbf"
# Folders of the standard library that hold tests, caches or packages that do not come with Python.
_NOT_STDLIB = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class Document:
    """One document of a source."""

    key: str
    """Where it stands: a path below the source's folder, with `:LINE` (from 1) where a file holds several."""
    text: str
    """Its text, as it stands in the file."""


class Source(Protocol):
    """Something that yields documents in an order that never changes."""

    bytes_read: int
    """How much of `files`, in bytes on disk, `documents` has gone through so far; for progress bars."""

    def files(self) -> list[tuple[str, Path]]:
        """Key and path of the files whose content decides what `documents` yields."""
        ...

    def documents(self) -> Iterator[Document]:
        """Streams the documents, one in memory at a time. Raises `UserError` for text that cannot be read."""
        ...


def open_source(source: str, config: DataConfig) -> Source:
    """Finds the files of a source.

    Args:
      source: one of the forms above.
      config: says what one document is (`document`) and which field holds text (`field`).

    Returns:
      The source. Nothing but names has been read.

    Raises:
      UserError: if the form is unknown, or nothing is there.
    """
    form, _, rest = source.partition(":")
    if source == "python-stdlib":
        return _StandardLibrary()
    if form == "text" and rest:
        return _TextFiles(_match(source, rest), config.document)
    if form == "jsonl" and rest:
        return _JsonLines(_match(source, rest), config.field)
    if form == "tfds" and rest:
        return _Tfds(source, rest, config.field)
    raise UserError(f"unknown source {source!r}; choose {FORMS}")


def documents(source: str, config: DataConfig) -> Iterator[Document]:
    """Streams the documents of a source; see `open_source`."""
    return open_source(source, config).documents()


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
        raise _unreadable(path, error) from None
    return SourceFile(path=key, bytes=size, blake2b=digest.hexdigest())


class _Files:
    """A source of files on disk, read one after the other."""

    def __init__(self, matched: list[tuple[str, Path]]):
        self.matched = matched
        self.bytes_read = 0

    def files(self) -> list[tuple[str, Path]]:
        return self.matched

    @contextmanager
    def _open(self, path: Path) -> Iterator[Callable[[], bytes]]:
        """A function that reads the next line of a file, decompressed if its name ends in .gz; b"" at the end."""
        before = self.bytes_read
        try:
            with path.open("rb") as raw:
                readline = gzip.GzipFile(fileobj=raw).readline if path.suffix == ".gz" else raw.readline

                def counted() -> bytes:
                    line = readline()
                    self.bytes_read = before + raw.tell()
                    return line

                yield counted
        except (OSError, EOFError, zlib.error) as error:
            raise _unreadable(path, error) from None

    def _lines(self, path: Path) -> Iterator[tuple[int, str]]:
        """Numbered lines, from 1, with their line ends."""
        offset = 0
        with self._open(path) as readline:
            for number, line in enumerate(iter(readline, b""), 1):
                yield number, _decode(line, path, offset)
                offset += len(line)


class _TextFiles(_Files):
    """`text:`, files of UTF-8 text."""

    def __init__(self, matched: list[tuple[str, Path]], document: str):
        super().__init__(matched)
        self._read = {"file": self._whole, "line": self._by_line, "paragraph": self._by_paragraph}[document]

    def documents(self) -> Iterator[Document]:
        self.bytes_read = 0
        for key, path in self.matched:
            yield from self._read(key, path)

    def _whole(self, key: str, path: Path) -> Iterator[Document]:
        yield Document(key, "".join(line for _, line in self._lines(path)))

    def _by_line(self, key: str, path: Path) -> Iterator[Document]:
        for number, line in self._lines(path):
            yield Document(f"{key}:{number}", _without_line_end(line))

    def _by_paragraph(self, key: str, path: Path) -> Iterator[Document]:
        paragraph: list[str] = []
        first = 1
        for number, line in self._lines(path):
            if line.strip():
                if not paragraph:
                    first = number
                paragraph.append(line)
            elif paragraph:
                yield Document(f"{key}:{first}", _without_line_end("".join(paragraph)))
                paragraph = []
        if paragraph:
            yield Document(f"{key}:{first}", _without_line_end("".join(paragraph)))


class _JsonLines(_Files):
    """`jsonl:`, one JSON object a line; blank lines are passed over."""

    def __init__(self, matched: list[tuple[str, Path]], field: str):
        super().__init__(matched)
        self._field = field

    def documents(self) -> Iterator[Document]:
        self.bytes_read = 0
        for key, path in self.matched:
            for number, line in self._lines(path):
                if line.strip():
                    yield Document(f"{key}:{number}", self._text(line, f"{path}:{number}"))

    def _text(self, line: str, where: str) -> str:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where} is not valid JSON ({_one_line(error)}); mend or remove the line") from None
        check(
            isinstance(record, dict), f"{where} is not a JSON object but {_kind(record)}; one object a line is needed"
        )
        if self._field not in record:
            raise UserError(f"{where} has no field {self._field!r}; it has {_listed(record)}: set data.field")
        text = record[self._field]
        check(
            isinstance(text, str), f"{where}: field {self._field!r} holds {_kind(text)}, not a string; set data.field"
        )
        # JSON can spell half of a surrogate pair, which no encoding can write down; it becomes U+FFFD.
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class _StandardLibrary(_Files):
    """`python-stdlib`, the .py files of the running Python's standard library, without its tests."""

    def __init__(self) -> None:
        root = Path(sysconfig.get_paths()["stdlib"])
        found = []
        for folder, subfolders, names in os.walk(root):
            subfolders[:] = [name for name in subfolders if name not in _NOT_STDLIB]
            found += [Path(folder, name) for name in names if name.endswith(".py")]
        check(found, f"python-stdlib: no .py files in {root}; choose another source: {FORMS}")
        super().__init__(sorted((path.relative_to(root).as_posix(), path) for path in found))

    def documents(self) -> Iterator[Document]:
        self.bytes_read = 0
        for key, path in self.matched:
            try:
                content = path.read_bytes()
                self.bytes_read += len(content)
                yield Document(key, content.decode("utf-8"))
            except UnicodeDecodeError:
                continue  # A few files declare another encoding, on purpose.
            except OSError as error:
                raise _unreadable(path, error) from None


class _Tfds:
    """`tfds:`, a dataset that TFDS has already prepared in ArrayRecord format on this machine."""

    def __init__(self, source: str, rest: str, field: str):
        import tensorflow_datasets as tfds

        self.bytes_read = 0
        self._source = source
        self._field = field
        name, _, split = rest.partition("#")
        self._split = split or "train"
        try:
            if Path(name).expanduser().is_dir():
                self._builder = tfds.builder_from_directory(Path(name).expanduser())
            else:
                self._builder = tfds.builder(name, try_gcs=False)
        except Exception as error:  # TFDS raises its own kinds for unknown names, broken folders, missing modules.
            raise UserError(f"cannot open source {source!r}: {_one_line(error)}") from None
        folder = Path(self._builder.data_dir)
        check(
            (folder / "dataset_info.json").is_file(),
            f"source {source!r} is not prepared in {folder}; prepare it with TFDS, file_format='array_record'",
        )
        try:
            self._records: Any = self._builder.as_data_source(split=self._split)
        except NotImplementedError:
            raise UserError(
                f"source {source!r} is stored as {self._builder.info.file_format}; "
                "prepare it with TFDS again, file_format='array_record'"
            ) from None
        except ValueError:
            raise UserError(
                f"source {source!r} has no split {self._split!r}; it has {', '.join(self._builder.info.splits)}"
            ) from None
        features = self._builder.info.features
        if field not in features:
            raise UserError(f"source {source!r} has no field {field!r}; it has {_listed(features)}: set data.field")

    def files(self) -> list[tuple[str, Path]]:
        shards = self._builder.info.splits[self._split].filepaths
        # A slice (train[:1%]) is no file; as part of the key it still counts in fingerprints.
        return [(f"{Path(shard).name}#{self._split}", Path(shard)) for shard in shards]

    def documents(self) -> Iterator[Document]:
        total = sum(path.stat().st_size for _, path in self.files())
        for i in range(len(self._records)):
            self.bytes_read = total * i // len(self._records)
            value = self._records[i][self._field]
            where = f"{self._source} record {i}"
            check(isinstance(value, bytes | str), f"{where}: field {self._field!r} holds {_kind(value)}, not text")
            try:
                yield Document(f"{self._split}:{i}", value.decode("utf-8") if isinstance(value, bytes) else value)
            except UnicodeDecodeError as error:
                raise UserError(f"{where} is not UTF-8 at byte {error.start} of {self._field!r}") from None


def _match(source: str, pattern: str) -> list[tuple[str, Path]]:
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


def _without_line_end(text: str) -> str:
    return text.removesuffix("\n").removesuffix("\r")


def _decode(content: bytes, path: Path, offset: int) -> str:
    """UTF-8 text that stands `offset` bytes into a file, without the byte order mark some editors put first."""
    if offset == 0 and content.startswith(_UTF8_BOM):
        content, offset = content[len(_UTF8_BOM) :], len(_UTF8_BOM)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8: byte 0x{content[error.start]:02X} at offset {offset + error.start}; "
            "convert it to UTF-8 first"
        ) from None


def _unreadable(path: Path, error: Exception) -> UserError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else _one_line(error)
    return UserError(f"cannot read {path}: {reason}")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def _kind(value: object) -> str:
    return type(value).__name__


def _listed(names: Any) -> str:
    return ", ".join(map(repr, list(names)[:10])) or "none"
