"""`tsv:`, `csv:` and `parquet:`, tables with a column of text."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from pathlib import Path

from lm.data.config import DataConfig
from lm.data.parts import wanted_fields
from lm.data.sources.base import (
    BROKEN_ROW,
    DAMAGED,
    NO_FIELD,
    BaseSource,
    Document,
    Part,
    Problem,
    file_size,
    listed,
    one_line,
    reason_of,
    unreadable,
)
from lm.data.sources.files import FileSource, Line, without_line_end
from lm.data.sources.records import document_of
from lm.errors import require

_BATCH_ROWS = 256


class _Rows(FileSource):
    """Rows of values, below a row of names if `header` is set; blank lines are passed over."""

    def rows(self, part: Part, encoding: str) -> Iterator[tuple[int, list[str], Problem | None]]:
        """Number, values and problem of each row of a part, that of names included."""
        raise NotImplementedError

    def read_file(self, part: Part, encoding: str) -> Iterator[Document]:
        """See `FileSource`."""
        names: list[str] | None = None
        if self.config.header:
            names = self._names(part, encoding)
            if names is None:
                return
        for number, values, problem in self.rows(part, encoding):
            if (number == 1 and self.config.header) or (not values and problem is None):
                continue
            where = f"{part.path}:{number}"
            if problem is None and names is not None and len(values) > len(names):
                problem = Problem(BROKEN_ROW, f"{where} has {len(values)} values for {len(names)} columns", "mend it")
            if problem is not None:
                self.problem(*problem)
                continue
            record = dict(zip(names if names is not None else map(str, range(len(values))), values))
            document = document_of(self, record, f"{part.key}:{number}", where)
            if document is not None:
                yield document

    def _names(self, part: Part, encoding: str) -> list[str] | None:
        """The names of a file's columns; None, once its problem is told, where they do not serve."""
        rows = self.rows(Part(part.key, part.path, part.bytes), encoding)
        _, names, problem = next(rows, (1, [], None))
        if problem is None and part.bytes:
            for name, setting in wanted_fields(self.config):
                if names.count(name) != 1:
                    count = names.count(name)
                    found = f"{count} columns named {name!r}" if count else f"no column {name!r}"
                    problem = Problem(
                        NO_FIELD,
                        f"{part.path} has {found}; it has {listed(names)}",
                        f"set {setting}, or --data.no-header if none is named",
                    )
                    break
        if problem is None:
            return names
        if part.start == 0:  # told once for a file
            self.problem(*problem)
        return None


class TabSeparated(_Rows):
    """`tsv:GLOB`: a line is a row, a tab ends a value, and nothing is quoted."""

    cut_at = "line"

    def rows(self, part: Part, encoding: str) -> Iterator[tuple[int, list[str], Problem | None]]:
        """See `_Rows`."""
        for line in self.lines(part, encoding):
            text = without_line_end(line.text)
            yield line.number, text.split("\t") if text else [], line.problem


class CommaSeparated(_Rows):
    """`csv:GLOB`: values in double quotes may hold commas, line ends and, doubled, quotes."""

    cut_at = "row"

    def rows(self, part: Part, encoding: str) -> Iterator[tuple[int, list[str], Problem | None]]:
        """See `_Rows`."""
        return self._parsed(part, _Feed(self.lines(part, encoding), self.config.max_document_bytes))

    def cuts(self, path: Path, encoding: str, target_bytes: int) -> Iterator[tuple[int, int]]:
        """See `FileSource`; with the numbers of rows, which only a parser can tell from lines."""
        # Bytes as characters: in every encoding whose line ends are bytes, so are commas and quotes.
        whole = Part("", path, file_size(path))
        feed = _Feed(self.lines(whole, "latin-1"), self.config.max_document_bytes)
        at = 0
        yield at, 1
        for number, _, _ in self._parsed(whole, feed):
            if feed.offset - at >= target_bytes:
                at = feed.offset
                yield at, number + 1
        if at < feed.offset:
            yield feed.offset, 0

    def _parsed(self, part: Part, feed: _Feed) -> Iterator[tuple[int, list[str], Problem | None]]:
        csv.field_size_limit(sys.maxsize)  # `_Feed` has a limit of its own.
        reader = csv.reader(feed, strict=True)
        number = part.first
        while True:
            feed.begin_row()
            values: list[str] = []
            where, problem = f"{part.path}:{number}", None
            try:
                values = next(reader)
            except StopIteration:
                return
            except csv.Error as error:  # The next line begins a row, as far as anybody can tell.
                reason = one_line(error) + (f"; it goes on for {feed.row_lines} lines" if feed.row_lines > 1 else "")
                problem = Problem(BROKEN_ROW, f"{where} is not valid CSV ({reason})", "mend the row")
            if feed.row_is_too_large():
                problem = self.too_large(where)
            yield number, values, feed.row_problem or problem
            number += 1


class _Feed:
    """Lines for the CSV parser, which says nothing of what it takes."""

    def __init__(self, lines: Iterator[Line], limit: int):
        self.offset = 0
        """Bytes of all lines so far."""
        self._lines = lines
        self._limit = limit
        self.begin_row()

    def begin_row(self) -> None:
        """Counts for the next row from here."""
        self.row_lines = self._row_size = 0
        self.row_problem: Problem | None = None

    def row_is_too_large(self) -> bool:
        """Whether the row has more bytes than the limit; those of a line end do not count."""
        return self._row_size > self._limit + 2

    def __iter__(self) -> _Feed:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        self.offset += line.size
        self._row_size += line.size
        self.row_lines += 1
        self.row_problem = self.row_problem or line.problem
        if self.row_is_too_large():
            raise csv.Error("too large")  # A quote that is never closed must not fill the memory.
        return line.text


class Parquet(BaseSource):
    """`parquet:GLOB`."""

    def __init__(self, config: DataConfig, matched: list[tuple[str, Path]]):
        super().__init__(config)
        self.matched = matched
        require("pyarrow.parquet", extra="text", need="a parquet: source")

    def files(self) -> list[tuple[str, Path]]:
        """See `Source`."""
        return self.matched

    def parts(self, target_bytes: int | None) -> Iterator[Part]:
        """See `BaseSource`; files are cut into row groups."""
        for key, path in self.matched:
            size = file_size(path)
            if target_bytes is None or size <= target_bytes:
                yield Part(key, path, size)
                continue
            groups = self._row_groups(path)
            total = sum(group_bytes for group_bytes, _ in groups)
            start = begin = at = row = 0  # of the part: its first row group, its first byte; of the next group
            first = 1
            for i, (group_bytes, rows) in enumerate(groups, 1):
                at += group_bytes
                row += rows
                end = size * at // total if i < len(groups) else size
                if end - begin >= target_bytes or i == len(groups):
                    yield Part(key, path, end - begin, start, i, first)
                    start, begin, first = i, end, row + 1
            if not groups:
                yield Part(key, path, size)

    def _row_groups(self, path: Path) -> list[tuple[int, int]]:
        """Bytes and rows of each row group; none if the file is damaged, which shows again when it is read."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(path) as file:
                groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
                return [(max(group.total_byte_size, 1), group.num_rows) for group in groups]
        except (OSError, pa.ArrowException):
            return []

    def read_part(self, part: Part) -> Iterator[Document]:
        """See `BaseSource`."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        path, number = part.path, part.first
        wanted = dict(wanted_fields(self.config))
        try:
            with pq.ParquetFile(path) as file:
                for name, setting in wanted.items():
                    if name not in file.schema_arrow.names:
                        if part.start == 0:  # told once for a file
                            found = f"it has {listed(file.schema_arrow.names)}"
                            self.problem(NO_FIELD, f"{path} has no column {name!r}; {found}", f"set {setting}")
                        return
                stop = part.stop if part.stop is not None else file.metadata.num_row_groups
                row_groups = range(part.start, stop)
                rows = sum(file.metadata.row_group(i).num_rows for i in row_groups)
                for batch in file.iter_batches(_BATCH_ROWS, row_groups, columns=list(wanted)):
                    for record in batch.to_pylist():
                        document = document_of(self, record, f"{part.key}:{number}", f"{path}:{number}")
                        if document is not None:
                            yield document
                        number += 1
                    self.progress(part.bytes * (number - part.first) // max(rows, 1))
        except (OSError, pa.ArrowException) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise unreadable(path, error) from None
            self.problem(DAMAGED, f"cannot read {path} from row {number} on: {reason_of(error)}", "get the file again")
