"""`tfds:` and `hf:`, datasets that another library has prepared on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lm.data.config import DataConfig
from lm.data.parts import wanted_fields
from lm.data.sources.base import BaseSource, Document, Part, listed, one_line
from lm.data.sources.records import document_of
from lm.errors import UserError, check, require


class RecordSource(BaseSource):
    """A source of numbered records that are read in any order; subclasses give `files`, `count` and `record`."""

    def __init__(self, config: DataConfig, source: str):
        super().__init__(config)
        self.source = source
        self.name, _, split = source.partition(":")[2].partition("#")
        self.split = split or "train"
        self._opened: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """Open files do not travel."""
        return {**self.__dict__, "_opened": None}

    def count(self) -> int:
        """How many records there are."""
        raise NotImplementedError

    def record(self, i: int) -> dict[str, Any]:
        """The values of record `i` by field."""
        raise NotImplementedError

    def parts(self, target_bytes: int | None) -> Iterator[Part]:
        """See `BaseSource`."""
        path = self.files()[0][1]
        total, count = sum(path.stat().st_size for _, path in self.files()), self.count()
        step = count if target_bytes is None else max(1, count * target_bytes // max(total, 1))
        for start in range(0, count, max(step, 1)):
            stop = min(start + step, count)
            yield Part(self.split, path, total * stop // count - total * start // count, start, stop)

    def read_part(self, part: Part) -> Iterator[Document]:
        """See `BaseSource`."""
        assert part.stop is not None
        for i in range(part.start, part.stop):
            self.progress(part.bytes * (i - part.start) // (part.stop - part.start))
            document = document_of(self, self.record(i), f"{part.key}:{i}", f"{self.source} record {i}")
            if document is not None:
                yield document


class HuggingFace(RecordSource):
    """`hf:NAME[@CONFIG][#SPLIT]`, from the hub or its cache, or `hf:FOLDER[#SPLIT]`.

    A folder is what `save_to_disk` wrote, or holds files that `load_dataset` reads.
    """

    def __init__(self, config: DataConfig, source: str):
        super().__init__(config, source)
        require("datasets", extra="hf", need=f"source {source!r}")
        names = self._records().column_names
        for field, setting in wanted_fields(config):
            check(
                field in names,
                f"source {source!r} has no column {field!r}; it has {listed(names)}: set {setting}",
            )

    def _records(self) -> Any:
        if self._opened is None:
            records = self._open_anew()
            wanted = dict(wanted_fields(self.config))
            fields = [name for name in records.column_names if name in wanted]
            # Other columns may hold pictures, which take long to decode.
            self._opened = records.select_columns(fields) if len(fields) == len(wanted) else records
        return self._opened

    def _open_anew(self) -> Any:
        import datasets

        name, _, variant = self.name.partition("@")
        folder = Path(name).expanduser()
        try:
            if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
                found = datasets.load_from_disk(str(folder))
                if isinstance(found, datasets.DatasetDict):
                    check(self.split in found, f"no split {self.split!r}; it has {', '.join(found)}")
                    found = found[self.split]
            else:
                name = str(folder) if folder.is_dir() else name
                found = datasets.load_dataset(name, variant or None, split=self.split)
        except Exception as error:  # Of all kinds: the hub's, the builders', the file systems'.
            raise UserError(f"cannot open source {self.source!r}: {one_line(error)}") from None
        check(found.cache_files, f"source {self.source!r} has no files on disk")
        return found

    def files(self) -> list[tuple[str, Path]]:
        """See `Source`."""
        paths = [Path(file["filename"]) for file in self._records().cache_files]
        return [(f"{path.name}#{self.split}", path) for path in paths]

    def count(self) -> int:
        """See `RecordSource`."""
        return len(self._records())

    def record(self, i: int) -> dict[str, Any]:
        """See `RecordSource`."""
        return self._records()[i]


class Tfds(RecordSource):
    """`tfds:NAME[/CONFIG][#SPLIT]` or `tfds:FOLDER[#SPLIT]`, in ArrayRecord format."""

    def __init__(self, config: DataConfig, source: str):
        super().__init__(config, source)
        builder, _ = self._open()
        for field, setting in wanted_fields(config):
            check(
                field in builder.info.features,
                f"source {source!r} has no field {field!r}; it has {listed(builder.info.features)}: set {setting}",
            )

    def _open(self) -> tuple[Any, Any]:
        """The builder and the records."""
        if self._opened is None:
            self._opened = self._open_anew()
        return self._opened

    def _open_anew(self) -> tuple[Any, Any]:
        import tensorflow_datasets as tfds

        source, folder = self.source, Path(self.name).expanduser()
        try:
            builder = tfds.builder_from_directory(folder) if folder.is_dir() else tfds.builder(self.name, try_gcs=False)
        except tfds.core.DatasetNotFoundError:  # Its message lists all datasets there are.
            raise UserError(
                f"cannot open source {source!r}: TFDS knows no such dataset, and no such folder is there; check it"
            ) from None
        except Exception as error:  # TFDS raises its own kinds for unknown names, broken folders, missing modules.
            raise UserError(f"cannot open source {source!r}: {one_line(error)}") from None
        folder = Path(builder.data_dir)
        check(
            (folder / "dataset_info.json").is_file(),
            f"source {source!r} is not prepared in {folder}; prepare it with TFDS, file_format='array_record'",
        )
        try:
            return builder, builder.as_data_source(split=self.split)
        except NotImplementedError:
            raise UserError(
                f"source {source!r} is stored as {builder.info.file_format}; "
                "prepare it with TFDS again, file_format='array_record'"
            ) from None
        except ValueError:
            raise UserError(
                f"source {source!r} has no split {self.split!r}; it has {', '.join(builder.info.splits)}"
            ) from None

    def files(self) -> list[tuple[str, Path]]:
        """See `Source`."""
        shards = self._open()[0].info.splits[self.split].filepaths
        # A slice (train[:1%]) is no file; as part of the key it still counts in fingerprints.
        return [(f"{Path(shard).name}#{self.split}", Path(shard)) for shard in shards]

    def count(self) -> int:
        """See `RecordSource`."""
        return len(self._open()[1])

    def record(self, i: int) -> dict[str, Any]:
        """See `RecordSource`."""
        return self._open()[1][i]
