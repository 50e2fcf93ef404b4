"""`text:`, a document a file, paragraph or line; `html:`; and `python-stdlib`, a corpus that is always there."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from lm.data.config import DataConfig
from lm.data.sources.base import UNDECODABLE, BaseSource, Document, Part, Problem, file_size, unreadable
from lm.data.sources.files import FileSource, Line, without_line_end
from lm.errors import check
from lm.text.encoding import decode

# Folders of the standard library that hold tests, caches or packages that do not come with Python.
_NOT_STDLIB = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


class TextFiles(FileSource):
    """`text:GLOB`."""

    def __init__(self, config: DataConfig, matched: list[tuple[str, Path]]):
        super().__init__(config, matched)
        self.cut_at = {"file": None, "line": "line", "paragraph": "paragraph"}[config.document]

    def read_file(self, part: Part, encoding: str) -> Iterator[Document]:
        """See `FileSource`."""
        if self.config.document == "file":
            text, problem = self.content(part, encoding)
            return self._document(part.key, text, problem)
        lines = self.lines(part, encoding)
        return self._by_line(part, lines) if self.config.document == "line" else self._by_paragraph(part, lines)

    def _by_line(self, part: Part, lines: Iterator[Line]) -> Iterator[Document]:
        for line in lines:
            yield from self._document(f"{part.key}:{line.number}", without_line_end(line.text), line.problem)

    def _by_paragraph(self, part: Part, lines: Iterator[Line]) -> Iterator[Document]:
        limit = self.config.max_document_bytes
        texts: list[str] = []
        first = size = 0  # first is 0 between paragraphs
        problem: Problem | None = None
        for line in chain(lines, [Line(0, "", 0)]):  # as if a blank line ended the last one
            if line.problem is None and not line.text.strip():
                if first:
                    yield from self._document(f"{part.key}:{first}", without_line_end("".join(texts)), problem)
                texts, first, size, problem = [], 0, 0, None
                continue
            first = first or line.number
            size += line.size
            if problem is None:
                problem = line.problem or (self.too_large(f"{part.path}:{first}") if size > limit + 2 else None)
            if problem is None:
                texts.append(line.text)
            else:
                texts.clear()

    def _document(self, key: str, text: str, problem: Problem | None) -> Iterator[Document]:
        if problem is None:
            yield Document(key, text)
        else:
            self.problem(*problem)


class HtmlFiles(FileSource):
    """`html:GLOB`, a document a file, with its tags, in the encoding that it names or looks like."""

    def __init__(self, config: DataConfig, matched: list[tuple[str, Path]]):
        super().__init__(config, matched)
        self.encoding = "auto"

    def detect(self, head: bytes, file: BinaryIO) -> str:
        """See `FileSource`: left to `decoded`, which has the whole page."""
        del head, file
        return "auto"

    def decoded(self, content: bytes, path: Path, offset: int, encoding: str) -> tuple[str, Problem | None]:
        """See `FileSource`."""
        del path, offset
        return decode(content, encoding)[0], None

    def read_file(self, part: Part, encoding: str) -> Iterator[Document]:
        """See `FileSource`."""
        text, problem = self.content(part, encoding)
        if problem is None:
            yield Document(part.key, text)
        else:
            self.problem(*problem)


class StandardLibrary(BaseSource):
    """`python-stdlib`, the .py files of the running Python's standard library, without its tests."""

    def __init__(self, config: DataConfig) -> None:
        super().__init__(config)
        root = Path(sysconfig.get_paths()["stdlib"])
        found = []
        for folder, subfolders, names in os.walk(root):
            subfolders[:] = [name for name in subfolders if name not in _NOT_STDLIB]
            found += [Path(folder, name) for name in names if name.endswith(".py")]
        check(found, f"python-stdlib: no .py files in {root}; choose another source")
        self.matched = sorted((path.relative_to(root).as_posix(), path) for path in found)

    def files(self) -> list[tuple[str, Path]]:
        """See `Source`."""
        return self.matched

    def parts(self, target_bytes: int | None) -> Iterator[Part]:
        """See `BaseSource`."""
        for key, path in self.matched:
            yield Part(key, path, file_size(path))

    def read_part(self, part: Part) -> Iterator[Document]:
        """See `BaseSource`."""
        try:
            yield Document(part.key, part.path.read_bytes().decode("utf-8"))
        except UnicodeDecodeError:  # A few files declare another encoding, on purpose.
            self.skipped.add(UNDECODABLE, f"{part.path} is not UTF-8")
        except OSError as error:
            raise unreadable(part.path, error) from None
