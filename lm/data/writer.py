"""Writes tokenised documents as a TFDS dataset in ArrayRecord format, without TensorFlow.

One record holds `tokens` int32 `[n]`, n at most `RECORD_TOKENS`; `document` int64, the number of its document in the
split; `offset` int64, where in the document its first token stands; and `key`, the document's key. Records keep the
order of the documents. Memory does not grow with the dataset: index entries go to disk as they come.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from lm.data.manifest import DATASET_VERSION, SPLITS, SplitCounts, index_path
from lm.errors import UserError, check

RECORD_TOKENS = 8192
"""Most tokens in one record: reading a few tokens out of the middle of a long document stays cheap."""

_SHARD_BYTES = 256 << 20


class DatasetWriter:
    """Writes the splits of one dataset into a folder. Use it in a `with` statement, and call `finish` at its end."""

    def __init__(self, folder: Path, name: str, eos_id: int):
        """Opens files in `folder` for a dataset called `name`, whose documents end in `eos_id`."""
        import tensorflow_datasets as tfds

        self._folder = folder
        self._name = name
        self._features = tfds.features.FeaturesDict(
            {
                "tokens": tfds.features.Tensor(shape=(None,), dtype=np.int32),
                "document": tfds.features.Scalar(np.int64),
                "offset": tfds.features.Scalar(np.int64),
                "key": tfds.features.Text(),
            }
        )
        self._splits = {split: _SplitWriter(folder, name, split, eos_id) for split in SPLITS}

    def add(self, split: str, key: str, ids: list[int], text_bytes: int, last: bool) -> None:
        """Appends tokens to the document at hand.

        Args:
          split: the split of the document; each split has one document at hand.
          key: the document's key.
          ids: its next tokens.
          text_bytes: UTF-8 bytes that they stand for.
          last: whether the document ends here; the end-of-document token is then appended.
        """
        self._splits[split].add(key, ids, text_bytes, last)

    def finish(self) -> dict[str, SplitCounts]:
        """Completes the files and writes what TFDS wants to know; returns the splits that hold documents."""
        for writer in self._splits.values():
            writer.finish()
        written = {split: writer for split, writer in self._splits.items() if writer.documents}
        self._write_info(written)
        return {
            split: SplitCounts(
                documents=writer.documents,
                records=sum(writer.shard_lengths),
                tokens=writer.tokens,
                bytes=writer.text_bytes,
            )
            for split, writer in written.items()
        }

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for writer in self._splits.values():
            writer.abandon()

    def _write_info(self, splits: dict[str, _SplitWriter]) -> None:
        from tensorflow_datasets.core import dataset_info, file_adapters, naming
        from tensorflow_datasets.core import splits as tfds_splits

        identity = dataset_info.DatasetIdentity(
            name=self._name, version=DATASET_VERSION, data_dir=str(self._folder), module_name=""
        )
        info = dataset_info.DatasetInfo(
            builder=identity,
            description="Tokenised text; manifest.json says from where, and how it was made.",
            features=self._features,
            disable_shuffling=True,
        )
        info.set_file_format(file_adapters.FileFormat.ARRAY_RECORD)
        template = naming.ShardedFileTemplate(dataset_name=self._name, data_dir=self._folder, filetype_suffix=_SUFFIX)
        info.set_splits(
            tfds_splits.SplitDict(
                [
                    tfds_splits.SplitInfo(
                        name=split,
                        shard_lengths=writer.shard_lengths,
                        num_bytes=writer.serialized_bytes,
                        filename_template=template.replace(split=split),
                    )
                    for split, writer in splits.items()
                ]
            )
        )
        info.write_to_directory(self._folder)


_SUFFIX = "array_record"


class _SplitWriter:
    """Shards and index of one split; no file appears before its first document."""

    def __init__(self, folder: Path, name: str, split: str, eos_id: int):
        self.documents = 0
        self.tokens = 0
        self.text_bytes = 0
        self.serialized_bytes = 0
        self.shard_lengths: list[int] = []
        self._folder = folder
        self._stem = f"{name}-{split}.{_SUFFIX}"
        self._split = split
        self._eos_id = eos_id
        self._shard: Any = None
        self._shard_bytes = 0
        self._indexes: dict[str, _Index] = {}
        self._pending = np.zeros(0, np.int32)  # Tokens of the document at hand that fill no record yet.
        self._offset = 0  # Where in that document they begin.

    def add(self, key: str, ids: list[int], text_bytes: int, last: bool) -> None:
        if not self._indexes:
            self._indexes = {of: _Index(index_path(self._folder, self._split, of)) for of in ("records", "documents")}
        fresh = np.asarray([*ids, self._eos_id] if last else ids, np.int32)
        tokens = np.concatenate([self._pending, fresh])
        whole = len(tokens) if last else len(tokens) - len(tokens) % RECORD_TOKENS
        for start in range(0, whole, RECORD_TOKENS):
            self._write(key, tokens[start : min(start + RECORD_TOKENS, whole)])
        self._pending = tokens[whole:].copy()
        self.text_bytes += text_bytes
        if last:
            self.documents += 1
            self._offset = 0
            self._indexes["documents"].append(self.tokens)

    def _write(self, key: str, tokens: np.ndarray) -> None:
        record = _serialize(tokens, self.documents, self._offset, key)
        if self._shard is None or self._shard_bytes + len(record) > _SHARD_BYTES:
            self._open_shard()
        with _disk_errors(self._folder):
            self._shard.write(record)
        self._shard_bytes += len(record)
        self.serialized_bytes += len(record)
        self.shard_lengths[-1] += 1
        self._offset += len(tokens)
        self.tokens += len(tokens)
        self._indexes["records"].append(self.tokens)

    def _shard_path(self, number: int) -> Path:
        """Where a shard is written; how many there will be is known only at the end."""
        return self._folder / f"{self._stem}-{number:05d}"

    def _open_shard(self) -> None:
        from array_record.python.array_record_module import ArrayRecordWriter

        self._close_shard()
        with _disk_errors(self._folder):
            # Groups of one record: a random read decompresses that record and no other.
            self._shard = ArrayRecordWriter(str(self._shard_path(len(self.shard_lengths))), "group_size:1")
        self._shard_bytes = 0
        self.shard_lengths.append(0)

    def _close_shard(self) -> None:
        from array_record.python.array_record_module import ArrayRecordReader

        if self._shard is None:
            return
        path = self._shard_path(len(self.shard_lengths) - 1)
        with _disk_errors(self._folder):
            self._shard.close()
            self._shard = None
            reader = ArrayRecordReader(str(path))  # The writer does not report every failure, so count.
            found = reader.num_records()
            reader.close()
        check(found == self.shard_lengths[-1], f"{path} holds {found} of {self.shard_lengths[-1]} records: bad disk?")

    def finish(self) -> None:
        self._close_shard()
        for index in self._indexes.values():
            index.finish()
        count = len(self.shard_lengths)
        for number in range(count):
            self._shard_path(number).rename(self._folder / f"{self._stem}-{number:05d}-of-{count:05d}")

    def abandon(self) -> None:
        """Closes what is still open after a failure."""
        if self._shard is not None:
            with contextlib.suppress(RuntimeError):  # The failure on its way up says more than this one.
                self._shard.close()
            self._shard = None
        for index in self._indexes.values():
            index.close()


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


class _Index:
    """An .npy file of int64 cumulative counts, starting with 0, that grows on disk."""

    def __init__(self, path: Path):
        path.parent.mkdir(exist_ok=True)
        self._file: BinaryIO = path.open("wb")
        self._entries = 0
        self._header()
        self._data_start = self._file.tell()
        self.append(0)

    def append(self, total: int) -> None:
        self._file.write(total.to_bytes(8, "little", signed=True))
        self._entries += 1

    def finish(self) -> None:
        """Writes the header again, now with the length; numpy leaves room for it to grow in place."""
        self._file.seek(0)
        self._header()
        assert self._file.tell() == self._data_start
        self.close()

    def close(self) -> None:
        self._file.close()

    def _header(self) -> None:
        header = {"descr": "<i8", "fortran_order": False, "shape": (self._entries,)}
        np.lib.format.write_array_header_1_0(self._file, header)


@contextlib.contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """ArrayRecord reports everything as a RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"cannot write the dataset in {folder}: {reason}; free space or set data.root") from None
