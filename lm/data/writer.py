"""Writes tokenised documents as a TFDS dataset in ArrayRecord format, without TensorFlow.

One record holds `tokens` int32 `[n]`, n at most `RECORD_TOKENS`; `document` int64, the number of its document in the
shard; `offset` int64, where in the document its first token stands; and `key`, the document's key. Records keep the
order of the documents. Shards are written apart from each other, in any order and by any process; `finish_dataset`
joins what they counted.
"""

from __future__ import annotations

import contextlib
import itertools
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lm.data.corpus import save_array
from lm.data.manifest import DATASET_VERSION, SPLITS, SplitCounts, index_path, questions_path, texts_path
from lm.errors import UserError, check

RECORD_TOKENS = 8192
"""Most tokens in one record: reading a few tokens out of the middle of a long document stays cheap."""

DOCUMENT_COLUMNS = ("part_starts", "part_counts", "labels", "spans")
"""What a shard may know of its documents besides their lengths."""

_SUFFIX = "array_record"


@dataclass(frozen=True)
class Shard:
    """What one shard holds."""

    documents: int
    records: int
    tokens: int
    text_bytes: int
    serialized_bytes: int
    record_lengths: Path
    """int64 .npy `[records]`: tokens of each record."""
    document_lengths: Path
    """int64 .npy `[documents]`: tokens of each document."""
    part_starts: Path | None = None
    """int64 .npy `[parts]`: where in the shard each part begins, in tokens; None where documents have no parts."""
    part_counts: Path | None = None
    """int64 .npy `[documents]`: the parts of each document."""
    labels: Path | None = None
    """int32 .npy `[documents]`: the class of each document; where it may have several, uint8 `[documents, bytes]` with
    a bit a class; None where they have none."""
    spans: Path | None = None
    """int32 .npy `[documents, 2]`: the first and the last part of the answer; None where nothing is asked."""
    questions: Path | None = None
    """An object a document, as `lm.data.manifest.questions_path` says; None where nothing is asked."""
    texts: Path | None = None
    """A list a document, as `lm.data.manifest.texts_path` says; None where texts are not kept."""


def shard_path(folder: Path, name: str, split: str, number: int, count: int) -> Path:
    """Where TFDS looks for shard `number` of `count`."""
    return folder / f"{name}-{split}.{_SUFFIX}-{number:05d}-of-{count:05d}"


class ShardWriter:
    """Writes one shard. Use it in a `with` statement, and call `finish` at its end.

    Args:
      path: the file to write.
      lengths: a prefix for the two files of lengths, which end in `.records.npy` and `.documents.npy`.
      eos_id: the token appended to every document.
    """

    def __init__(self, path: Path, lengths: Path, *, eos_id: int):
        from array_record.python.array_record_module import ArrayRecordWriter

        self._path = path
        self._lengths = lengths
        self._eos_id = eos_id
        self._record_lengths: list[int] = []
        self._document_lengths: list[int] = []
        self._columns: dict[str, list[Any]] = {name: [] for name in DOCUMENT_COLUMNS}
        self._tokens = 0
        self._text_bytes = 0
        self._serialized_bytes = 0
        self._pending = np.zeros(0, np.int32)  # Tokens of the document at hand that fill no record yet.
        self._offset = 0  # Where in that document they begin.
        with _disk_errors(path.parent):
            # Groups of one record: a random read decompresses that record and no other.
            self._records: Any = ArrayRecordWriter(str(path), "group_size:1")

    def add(
        self,
        key: str,
        ids: Sequence[int] | np.ndarray,
        text_bytes: int,
        last: bool,
        *,
        begins_part: bool = False,
        label: int | np.ndarray | None = None,
        span: tuple[int, int] | None = None,
    ) -> None:
        """Appends tokens to the document at hand.

        Args:
          key: the document's key.
          ids: its next tokens.
          text_bytes: UTF-8 bytes that they stand for.
          last: whether the document ends here; the end-of-document token is then appended.
          begins_part: whether they begin a part of the document; then all documents have parts.
          label: the document's class, or the bits of its classes (`numpy.packbits`), or None for all documents; said
            with its last tokens.
          span: the first and the last part of the document's answer, or None for all documents; likewise.
        """
        starts, counts, labels, spans = (self._columns[name] for name in DOCUMENT_COLUMNS)
        if begins_part:
            starts.append(self._tokens)
            counts += [0] * (len(self._document_lengths) + 1 - len(counts))
            counts[-1] += 1
        if last and label is not None:
            labels.append(label)
        if last and span is not None:
            spans.append(span)
        fresh = np.asarray([*ids, self._eos_id] if last else ids, np.int32)
        tokens = np.concatenate([self._pending, fresh])
        whole = len(tokens) if last else len(tokens) - len(tokens) % RECORD_TOKENS
        for start in range(0, whole, RECORD_TOKENS):
            self._write(key, tokens[start : min(start + RECORD_TOKENS, whole)])
        self._pending = tokens[whole:].copy()
        self._tokens += len(fresh)
        self._text_bytes += text_bytes
        if last:
            self._document_lengths.append(self._offset)
            self._offset = 0

    def _write(self, key: str, tokens: np.ndarray) -> None:
        record = _serialize(tokens, len(self._document_lengths), self._offset, key)
        with _disk_errors(self._path.parent):
            self._records.write(record)
        self._serialized_bytes += len(record)
        self._offset += len(tokens)
        self._record_lengths.append(len(tokens))

    def finish(self) -> Shard:
        """Completes the files and counts again what reached the disk."""
        from array_record.python.array_record_module import ArrayRecordReader

        with _disk_errors(self._path.parent):
            self._records.close()
            self._records = None
            reader = ArrayRecordReader(str(self._path))  # The writer does not report every failure, so count.
            found = reader.num_records()
            reader.close()
        n = len(self._record_lengths)
        check(found == n, f"{self._path} holds {found} of {n} records: is the disk full, or broken?")
        columns: dict[str, Path | None] = {}
        for name, values in self._columns.items():
            path = self._lengths.with_name(f"{self._lengths.name}.{name}.npy")
            columns[name] = path if values else None
            if values:
                dtype = np.int32 if name in ("labels", "spans") else np.int64
                save_array(path, np.asarray(values, np.uint8 if isinstance(values[0], np.ndarray) else dtype))
        shard = Shard(
            documents=len(self._document_lengths),
            records=n,
            tokens=sum(self._record_lengths),
            text_bytes=self._text_bytes,
            serialized_bytes=self._serialized_bytes,
            record_lengths=self._lengths.with_name(self._lengths.name + ".records.npy"),
            document_lengths=self._lengths.with_name(self._lengths.name + ".documents.npy"),
            **columns,
        )
        save_array(shard.record_lengths, np.asarray(self._record_lengths, np.int64))
        save_array(shard.document_lengths, np.asarray(self._document_lengths, np.int64))
        return shard

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *failure: object) -> None:
        if self._records is not None:
            with contextlib.suppress(RuntimeError):  # The failure on its way up says more than this one.
                self._records.close()


class DatasetWriter:
    """Writes a dataset of one shard a split, for who has token ids already. Use it in a `with` statement.

    Args:
      folder: an existing folder; `lm.data.store.DatasetStore` reads it afterwards.
      name: the dataset's name.
      eos_id: the token appended to every document.
    """

    def __init__(self, folder: Path, name: str, eos_id: int):
        self._folder = folder
        self._name = name
        self._eos_id = eos_id
        self._writers: dict[str, ShardWriter] = {}
        self._lengths = tempfile.TemporaryDirectory()

    def add(self, split: str, key: str, ids: Sequence[int], text_bytes: int, last: bool) -> None:
        """As `ShardWriter.add`; each split has one document at hand."""
        if split not in self._writers:
            path = shard_path(self._folder, self._name, split, 0, 1)
            self._writers[split] = ShardWriter(path, Path(self._lengths.name, split), eos_id=self._eos_id)
        self._writers[split].add(key, ids, text_bytes, last)

    def finish(self) -> dict[str, SplitCounts]:
        """Completes the dataset."""
        written = {split: [self._writers[split].finish()] for split in SPLITS if split in self._writers}
        return finish_dataset(self._folder, self._name, written)

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(self, *failure: object) -> None:
        for writer in self._writers.values():
            writer.__exit__(*failure)
        self._lengths.cleanup()


def finish_dataset(folder: Path, name: str, splits: Mapping[str, Sequence[Shard]]) -> dict[str, SplitCounts]:
    """Writes the index files and what TFDS wants to know, once all shards are there.

    Args:
      folder: the dataset's folder, which holds the shards.
      name: the dataset's name.
      splits: the shards of each split, in order.

    Returns:
      The size of each split.
    """
    for split, shards in splits.items():
        _write_index(index_path(folder, split, "records"), [shard.record_lengths for shard in shards])
        _write_index(index_path(folder, split, "documents"), [shard.document_lengths for shard in shards])
        counts = [shard.part_counts for shard in shards if shard.part_counts is not None]
        if counts:
            _write_index(index_path(folder, split, "part_offsets"), counts)
            before = itertools.accumulate((shard.tokens for shard in shards), initial=0)
            starts = [np.load(shard.part_starts) + base for shard, base in zip(shards, before) if shard.part_starts]
            save_array(index_path(folder, split, "part_starts"), np.concatenate(starts))
        for of in ("labels", "spans"):
            columns = [np.load(path) for shard in shards if (path := getattr(shard, of)) is not None]
            if columns:
                save_array(index_path(folder, split, of), np.concatenate(columns))
        for of, lines in (("questions", questions_path(folder, split)), ("texts", texts_path(folder, split))):
            found = [path for shard in shards if (path := getattr(shard, of)) is not None]
            if found:
                with lines.open("wb") as file:
                    for path in found:
                        with path.open("rb") as part:
                            shutil.copyfileobj(part, file)
    _write_info(folder, name, splits)
    return {
        split: SplitCounts(
            documents=sum(shard.documents for shard in shards),
            records=sum(shard.records for shard in shards),
            tokens=sum(shard.tokens for shard in shards),
            bytes=sum(shard.text_bytes for shard in shards),
        )
        for split, shards in splits.items()
    }


def _write_index(path: Path, lengths: list[Path]) -> None:
    """Cumulative sums over the files, starting with 0, in memory that one file needs."""
    sizes = [len(np.load(file, mmap_mode="r")) for file in lengths]
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as index:  # not a memory map: on a full disk that ends the process
        header = {"descr": "<i8", "fortran_order": False, "shape": (1 + sum(sizes),)}
        np.lib.format.write_array_header_1_0(index, header)
        total = 0
        index.write(np.int64(total).astype("<i8").tobytes())
        for file in lengths:
            sums = total + np.cumsum(np.load(file))
            index.write(sums.astype("<i8").tobytes())
            total = int(sums[-1]) if len(sums) else total


def _write_info(folder: Path, name: str, splits: Mapping[str, Sequence[Shard]]) -> None:
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import dataset_info, file_adapters, naming
    from tensorflow_datasets.core import splits as tfds_splits

    features = tfds.features.FeaturesDict(
        {
            "tokens": tfds.features.Tensor(shape=(None,), dtype=np.int32),
            "document": tfds.features.Scalar(np.int64),
            "offset": tfds.features.Scalar(np.int64),
            "key": tfds.features.Text(),
        }
    )
    identity = dataset_info.DatasetIdentity(name=name, version=DATASET_VERSION, data_dir=str(folder), module_name="")
    info = dataset_info.DatasetInfo(
        builder=identity,
        description="Tokenised text; manifest.json says from where, and how it was made.",
        features=features,
        disable_shuffling=True,
    )
    info.set_file_format(file_adapters.FileFormat.ARRAY_RECORD)
    template = naming.ShardedFileTemplate(dataset_name=name, data_dir=folder, filetype_suffix=_SUFFIX)
    info.set_splits(
        tfds_splits.SplitDict(
            [
                tfds_splits.SplitInfo(
                    name=split,
                    shard_lengths=[shard.records for shard in shards],
                    num_bytes=sum(shard.serialized_bytes for shard in shards),
                    filename_template=template.replace(split=split),
                )
                for split, shards in splits.items()
            ]
        )
    )
    info.write_to_directory(folder)


def _serialize(tokens: np.ndarray, document: int, offset: int, key: str) -> bytes:
    """A tf.train.Example, the same bytes each time; TFDS's own serializer takes twice as long on short documents."""
    from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

    def integers(values: list[int]) -> tf_feature_pb2.Feature:
        return tf_feature_pb2.Feature(int64_list=tf_feature_pb2.Int64List(value=values))

    text = tf_feature_pb2.Feature(bytes_list=tf_feature_pb2.BytesList(value=[key.encode("utf-8")]))
    feature = {
        "tokens": integers(tokens.tolist()),
        "document": integers([document]),
        "offset": integers([offset]),
        "key": text,
    }
    return tf_example_pb2.Example(features=tf_feature_pb2.Features(feature=feature)).SerializeToString(
        deterministic=True
    )


@contextlib.contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """ArrayRecord reports everything as a RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"cannot write the dataset in {folder}: {reason}; free space or set data.root") from None
