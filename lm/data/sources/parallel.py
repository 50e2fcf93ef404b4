"""`parallel:FILE,FILE`, text files whose lines belong together: line n of each is a part of document n."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

from lm.data.config import DataConfig
from lm.data.parts import join_parts
from lm.data.sources.base import Document, Part, file_size
from lm.data.sources.files import FileSource, Line, without_line_end
from lm.errors import check


class ParallelLines(FileSource):
    """`parallel:SOURCE,TARGET`, as translations come; the lines of two files or more, in that order.

    It is read in one piece, by one process: how lines pair up only shows from the beginning of the files.
    """

    def __init__(self, config: DataConfig, source: str):
        names = source.partition(":")[2].split(",")
        check(len(names) > 1, f"source {source!r} names one file; name two or more, as in parallel:train.de,train.en")
        paths = [Path(name.strip()).expanduser() for name in names]
        for path in paths:
            check(path.is_file(), f"source {source!r}: no file {path}; name files, relative to {Path.cwd()}")
        super().__init__(config, [(path.name, path) for path in paths])

    def parts(self, target_bytes: int | None) -> Iterator[Part]:
        """See `BaseSource`."""
        del target_bytes
        key, path = self.matched[0]
        yield Part(key, path, sum(file_size(path) for _, path in self.matched))

    def read_part(self, part: Part) -> Iterator[Document]:
        """See `BaseSource`."""
        files = [Part(key, path, file_size(path)) for key, path in self.matched]
        encodings = [self._usable_encoding(file) for file in files]
        if None in encodings:
            return
        lines = [self.lines(file, encoding) for file, encoding in zip(files, encodings) if encoding is not None]
        for number, row in enumerate(itertools.zip_longest(*lines), 1):
            at_end = [file.path for file, line in zip(files, row) if line is None]
            check(
                not at_end,
                f"{at_end[0] if at_end else ''} ends before line {number}, and another file of the source goes on; "
                "lines of a parallel: source belong together",
            )
            problem = next((line.problem for line in row if line.problem is not None), None)
            if problem is None:
                yield self._document(number, row)
            else:
                self.problem(*problem)

    def _document(self, number: int, row: tuple[Line, ...]) -> Document:
        return Document(f"{self.matched[0][0]}:{number}", join_parts(without_line_end(line.text) for line in row))
