"""Files on disk: opened, decompressed, decoded, and cut into parts where lines start."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from lm.data.config import DataConfig
from lm.data.sources.base import (
    BINARY,
    DAMAGED,
    UNDECODABLE,
    BaseSource,
    Document,
    Part,
    Problem,
    file_size,
    reason_of,
    unreadable,
)
from lm.data.sources.encodings import HEAD_BYTES, find_encoding, is_binary, line_ends_are_bytes, plain_name
from lm.errors import require

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")

_BLOCK = 1 << 20
_DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError)
_BOMS = {"utf-8": b"\xef\xbb\xbf", "gb18030": b"\x84\x31\x95\x33"}


class Line(NamedTuple):
    """A line of a file."""

    number: int
    """From 1."""
    text: str
    """With its line end; where there is a problem, as far as there is any."""
    size: int
    """How long it is on disk, in bytes; in characters for encodings like UTF-16."""
    problem: Problem | None = None
    """Why it cannot be used."""


class FileSource(BaseSource):
    """A source of files on disk, read one after the other; subclasses give `read_file`."""

    cut_at: str | None = None
    """Where files may be cut into parts: None, "line" for line starts, "paragraph" for those after a blank line, "row"
    for what a subclass says in `cuts`."""

    def __init__(self, config: DataConfig, matched: list[tuple[str, Path]]):
        super().__init__(config)
        self.matched = matched
        self.encoding = plain_name(config.encoding)

    def files(self) -> list[tuple[str, Path]]:
        """See `Source`."""
        return self.matched

    def read_file(self, part: Part, encoding: str) -> Iterator[Document]:
        """The documents of a part of a file that is whole and no binary file."""
        raise NotImplementedError

    def detect(self, head: bytes, file: BinaryIO) -> str:
        """The encoding of a file where it is to be found out; see `find_encoding`."""
        return find_encoding(head, file)

    def parts(self, target_bytes: int | None) -> Iterator[Part]:
        """See `BaseSource`."""
        for key, path in self.matched:
            size = file_size(path)
            encoding = self._encoding_to_cut(path) if target_bytes is not None and size > target_bytes else None
            if target_bytes is None or encoding is None:
                yield Part(key, path, size)
                continue
            cuts = list(self.cuts(path, encoding, target_bytes))
            for (start, first), (stop, _) in pairwise(cuts):
                yield Part(key, path, stop - start, start, stop, first, encoding)

    def _encoding_to_cut(self, path: Path) -> str | None:
        """The encoding of a file that may be cut; None for others."""
        if self.cut_at is None or path.suffix in COMPRESSED:
            return None
        with self.open(path) as (file, _):
            head = file.read(HEAD_BYTES)
            if is_binary(head, self.encoding):
                return None
            encoding = self.detect(head, file) if self.encoding == "auto" else self.encoding
        return encoding if line_ends_are_bytes(encoding) else None

    def cuts(self, path: Path, encoding: str, target_bytes: int) -> Iterator[tuple[int, int]]:
        """Offsets to cut at with the numbers of the lines there: the file's start, every `target_bytes`, its end."""
        del encoding
        with self.open(path) as (file, _):
            at, number = 0, 1
            yield at, number
            while True:
                left = target_bytes - 1
                while left and (block := file.read(min(left, _BLOCK))):
                    number += block.count(b"\n")
                    left -= len(block)
                starts_here = False  # whether the next piece is the start of a line
                while piece := file.readline(_BLOCK):
                    ends_here = piece.endswith(b"\n")
                    number += ends_here
                    if ends_here and (self.cut_at == "line" or (starts_here and not piece.strip(b" \t\r\n"))):
                        break
                    starts_here = ends_here
                at = file.tell()
                yield at, number
                if not file.peek(1):
                    return

    def read_part(self, part: Part) -> Iterator[Document]:
        """See `BaseSource`."""
        encoding = self._usable_encoding(part)
        if encoding is not None:
            yield from self.read_file(part, encoding)

    def _usable_encoding(self, part: Part) -> str | None:
        """The encoding of a file; None, once its problem is told, if all of the file is to be left out."""
        if part.encoding is not None:
            return part.encoding
        path = part.path
        try:
            with self._open(path) as (file, _):
                head = file.read(HEAD_BYTES)
                if is_binary(head, self.encoding):
                    self.problem(BINARY, f"{path} looks like a binary file", "name text files only")
                    return None
                encoding = self.detect(head, file) if self.encoding == "auto" else self.encoding
            if self.config.on_error == "skip":
                # What breaks in the middle is left out from its start, so it is gone through once before.
                if encoding != "auto" and not line_ends_are_bytes(encoding):
                    with self._open(path) as (file, _):
                        text = io.TextIOWrapper(file, encoding, newline="\n")
                        while text.read(_BLOCK):
                            pass
                elif path.suffix in COMPRESSED:
                    with self._open(path) as (file, _):
                        while file.read(_BLOCK):
                            pass
        except UnicodeDecodeError:
            self.problem(UNDECODABLE, f"{path} is not {encoding.upper()}", "set data.encoding")
            return None
        except _DAMAGE as error:
            self._damaged(path, error)
            return None
        return encoding

    def _damaged(self, path: Path, error: Exception) -> None:
        """Tells that a file is damaged; what the system says of the disk or of rights is an error in any case."""
        if isinstance(error, OSError) and error.errno is not None:
            raise unreadable(path, error) from None
        self.problem(DAMAGED, f"cannot read {path}: {reason_of(error)}", "get the file again")

    @contextmanager
    def _open(self, path: Path) -> Iterator[tuple[io.BufferedReader, Callable[[], int]]]:
        """See `open`."""
        with path.open("rb") as raw:
            match path.suffix:
                case ".gz":
                    stream: Any = gzip.GzipFile(fileobj=raw)
                case ".bz2":
                    stream = bz2.BZ2File(raw)
                case ".xz":
                    stream = lzma.LZMAFile(raw)  # noqa: SIM115
                case ".zst":
                    stream = io.BufferedReader(_ZstdReader(raw, path), 1 << 16)
                case _:
                    stream = raw
            yield stream, raw.tell

    @contextmanager
    def open(self, path: Path) -> Iterator[tuple[io.BufferedReader, Callable[[], int]]]:
        """A file's content, decompressed by its suffix, and how far it is read on disk; `UserError` if that fails."""
        try:
            with self._open(path) as opened:
                yield opened
        except _DAMAGE as error:
            self._damaged(path, error)
            raise unreadable(path, error) from None  # It was whole when it was looked through.

    def lines(self, part: Part, encoding: str) -> Iterator[Line]:
        """The lines of a part; at most `max_document_bytes` of each are in memory."""
        if not line_ends_are_bytes(encoding):
            yield from self._lines_of_characters(part, encoding)
            return
        limit = self.config.max_document_bytes
        offset, number = part.start, part.first
        with self.open(part.path) as (file, position):
            if offset:
                file.seek(offset)
            while part.stop is None or offset < part.stop:
                line = file.readline(limit + 2)
                if not line:
                    return
                size = len(line)
                problem: Problem | None
                if size > limit and len(line.rstrip(b"\r\n")) > limit:
                    while not line.endswith(b"\n") and (line := file.readline(_BLOCK)):
                        size += len(line)
                    text, problem = "", self.too_large(f"{part.path}:{number}")
                else:
                    text, problem = self.decoded(line, part.path, offset, encoding)
                self.progress(position() - part.start)
                yield Line(number, text, size, problem)
                offset += size
                number += 1

    def _lines_of_characters(self, part: Part, encoding: str) -> Iterator[Line]:
        """Lines in an encoding whose line ends only show when it is decoded."""
        limit = self.config.max_document_bytes
        number = 1
        with self.open(part.path) as (file, position):
            text = io.TextIOWrapper(file, encoding, newline="\n")
            try:
                while line := text.readline(limit + 2):
                    size, problem = len(line), None
                    if size > limit and len(line.rstrip("\r\n")) > limit:
                        while not line.endswith("\n") and (line := text.readline(_BLOCK)):
                            size += len(line)
                        line, problem = "", self.too_large(f"{part.path}:{number}")
                    self.progress(position() - part.start)
                    yield Line(number, line.removeprefix("\ufeff") if number == 1 else line, size, problem)
                    number += 1
            except UnicodeDecodeError as error:
                # Only where problems stop: `_usable_encoding` has looked the file through otherwise.
                found = f"{part.path}:{number} is not {encoding.upper()} ({error.reason})"
                self.problem(UNDECODABLE, found, "set data.encoding")

    def content(self, part: Part, encoding: str) -> tuple[str, Problem | None]:
        """All the text of a file, or its problem."""
        limit = self.config.max_document_bytes
        blocks: list[bytes] = []
        size = 0
        with self.open(part.path) as (file, position):
            while size <= limit and (block := file.read(_BLOCK)):
                blocks.append(block)
                size += len(block)
                self.progress(position())
        if size > limit:
            return "", self.too_large(str(part.path))
        return self.decoded(b"".join(blocks), part.path, 0, encoding)

    def decoded(self, content: bytes, path: Path, offset: int, encoding: str) -> tuple[str, Problem | None]:
        """Text that stands `offset` bytes into a file, without the byte order mark some editors put first."""
        if offset == 0 and (mark := _BOMS.get(encoding)) and content.startswith(mark):
            content, offset = content[len(mark) :], len(mark)
        try:
            text = content.decode(encoding)
        except UnicodeDecodeError as error:
            return content.decode(encoding, "replace"), Problem(
                UNDECODABLE,
                f"{path} is not {encoding.upper()}: byte 0x{content[error.start]:02X} at offset {offset + error.start}",
                "set data.encoding (auto finds it out)" if self.encoding != "auto" else "set data.encoding",
            )
        return text.removeprefix("\ufeff") if offset == 0 else text, None


def without_line_end(text: str) -> str:
    """A line's text."""
    return text.removesuffix("\n").removesuffix("\r")


class _ZstdReader(io.RawIOBase):
    """Decompressed bytes of Zstandard frames; zstandard's own reader is silent where a file ends too early."""

    def __init__(self, raw: BinaryIO, path: Path):
        self._zstd = require("zstandard", extra="text", need=str(path))
        self._raw = raw
        self._frame: Any = None
        self._input = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            block = self._input or self._raw.read(1 << 16)
            if not block:
                if self._frame is not None:
                    raise EOFError("it ends in the middle of a frame")
                return 0
            if self._frame is None:
                self._frame = self._zstd.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
            try:
                self._output = memoryview(self._frame.decompress(block))
            except self._zstd.ZstdError as error:
                raise EOFError(str(error)) from None
            self._input = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = None
        size = min(len(buffer), len(self._output))
        buffer[:size] = self._output[:size]
        self._output = self._output[size:]
        return size
