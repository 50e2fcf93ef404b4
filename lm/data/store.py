"""Token-addressed reading: a split is one long stream of tokens, and any range of it can be read.

`MemoryStore` holds the stream in memory; `DatasetStore` reads it from a prepared dataset on disk.
"""

from __future__ import annotations

import functools
import itertools
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from lm.data.manifest import questions_path, texts_path
from lm.errors import UserError, check


class Question(NamedTuple):
    """What answers a document that is a question about a text."""

    words: Sequence[str]
    """The text, as it was read: its parts but for the first, the question. Joined they are the text."""
    answers: Sequence[str]
    """The right answers, as they were read; none if there is none."""


class TokenStore(Protocol):
    """One split of a corpus: its documents, each closed by one end-of-text token, one after another."""

    n_tokens: int
    """Tokens in the split, end-of-text tokens included."""
    document_offsets: np.ndarray
    """int64 [n_documents + 1]: document d is `[offsets[d], offsets[d + 1])` of the stream."""
    index_dir: Path | None
    """Folder for indexes computed from this store, or None when they live in memory only."""
    index_name: str
    """What files in `index_dir` that belong to this store are called first."""
    part_starts: np.ndarray | None
    """int64 [n_parts]: where each part begins; it ends where the next one does, the last of a document before its
    end-of-text token. None where documents have no parts."""
    part_offsets: np.ndarray | None
    """int64 [n_documents + 1]: document d has the parts `[offsets[d], offsets[d + 1])`."""
    labels: np.ndarray | None
    """int32 [n_documents]: the class of each document; where it may have several, uint8 [n_documents, ceil(C / 8)], a
    bit for each of C classes (`numpy.packbits`). None where they have none."""
    spans: np.ndarray | None
    """int32 [n_documents, 2]: the first and the last part of the answer of each document, a question; -1 and -1 where
    it has none. None where nothing is asked."""

    @property
    def questions(self) -> Sequence[Question]:
        """What answers each document; only where there are `spans`."""

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens `[start, stop)` of the stream: int32 [stop - start]."""

    def read_ranges(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """The ranges `[starts[i], starts[i] + lengths[i])` one after another: int32 [sum(lengths)]."""

    def document_key(self, document: int) -> str:
        """The name the source gave to a document."""


def part_stops(store: TokenStore) -> np.ndarray:
    """int64 [n_parts]: where each part of a store's documents ends."""
    assert store.part_starts is not None
    assert store.part_offsets is not None
    stops = np.append(store.part_starts[1:], store.n_tokens)
    last = store.part_offsets[1:] - 1  # a document has at least one part
    stops[last] = store.document_offsets[1:] - 1
    return stops


def part_texts(store: TokenStore, document: int, decode: Callable[[list[int]], str]) -> list[str]:
    """The parts of a document as text. Raises `UserError` where documents have none."""
    check(store.part_starts is not None, "the dataset's documents have no parts; prepare it with data.fields")
    assert store.part_starts is not None
    assert store.part_offsets is not None
    first, last = int(store.part_offsets[document]), int(store.part_offsets[document + 1])
    end = int(store.document_offsets[document + 1]) - 1  # before the end-of-text token
    bounds = [*store.part_starts[first:last].tolist(), end]
    tokens = store.read(bounds[0], end).tolist()  # at once, as parts can be words
    return [decode(tokens[start - bounds[0] : stop - bounds[0]]) for start, stop in itertools.pairwise(bounds)]


class MemoryStore:
    """A `TokenStore` over arrays in memory, for tests and synthetic data.

    Args:
      documents: integer arrays, each with its end-of-text token.
      keys: the documents' names; their ordinals by default.
      part_lengths: for each document, the tokens of each of its parts; their sum is one less than the document's.
      labels: the class of each document, or an array of the bits of its classes.
      spans: the first and the last part of each document's answer.
      questions: what answers each document.
    """

    index_dir: Path | None = None
    index_name: str = "memory"

    def __init__(
        self,
        documents: Sequence[np.ndarray],
        keys: Sequence[str] | None = None,
        *,
        part_lengths: Sequence[Sequence[int]] | None = None,
        labels: Sequence[int] | np.ndarray | None = None,
        spans: Sequence[tuple[int, int]] | None = None,
        questions: Sequence[Question] = (),
    ):
        lengths = [len(document) for document in documents]
        self.document_offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
        self.n_tokens = int(self.document_offsets[-1])
        self._tokens = np.concatenate([np.zeros(0, np.int32), *documents]).astype(np.int32)
        self._keys = list(keys) if keys is not None else [str(i) for i in range(len(documents))]
        self.part_starts = self.part_offsets = None
        if part_lengths is not None:
            starts = [start + np.cumsum([0, *parts])[:-1] for start, parts in zip(self.document_offsets, part_lengths)]
            self.part_starts = np.concatenate([np.zeros(0, np.int64), *starts]).astype(np.int64)
            self.part_offsets = np.cumsum([0, *map(len, part_lengths)]).astype(np.int64)
        several = isinstance(labels, np.ndarray) and labels.ndim == 2
        self.labels = None if labels is None else np.asarray(labels, np.uint8 if several else np.int32)
        self.spans = None if spans is None else np.asarray(spans, np.int32).reshape(-1, 2)
        self.questions = questions

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens `[start, stop)` of the stream: int32 [stop - start]. IndexError outside the stream."""
        _check_ranges(np.array([start]), np.array([stop - start]), self.n_tokens)
        return self._tokens[start:stop].copy()

    def read_ranges(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Concatenated ranges: int32 [sum(lengths)]. IndexError outside the stream."""
        _check_ranges(starts, lengths, self.n_tokens)
        return self._tokens[ranges(starts, lengths)]

    def document_key(self, document: int) -> str:
        """The name of a document."""
        return self._keys[document]


class DatasetStore:
    """A `TokenStore` over one split of a prepared dataset: a TFDS folder of ArrayRecord files and its `index/`.

    Opening it maps two index files and nothing more; record files are opened by the first read. Records are
    decoded with TFDS's own protocol buffers but without its feature layer, which is several times slower.
    Safe to share between threads; a pickled copy opens its files anew.

    Args:
      directory: the dataset's folder, which holds `dataset_info.json` and `index/`.
      split: `train`, `validation` or `test`.
      cache_tokens: decoded tokens kept in memory (4 bytes each), so that small corpora are decoded once.

    Raises:
      UserError: the folder or the split is not there.
    """

    def __init__(self, directory: str | Path, split: str, *, cache_tokens: int = 2**24):
        self.directory = Path(directory)
        self.split = split
        self.cache_tokens = cache_tokens
        self.index_dir: Path | None = self.directory / "index"
        self.index_name = split
        found = sorted(path.name.removesuffix(".records.npy") for path in self.index_dir.glob("*.records.npy"))
        check(found, f"no prepared dataset at {self.directory}; make one with: python -m lm prepare")
        check(split in found, f"split {split!r} is not in {self.directory}; it has {', '.join(found)}")
        self._open()

    def _open(self) -> None:
        assert self.index_dir is not None
        load = lambda name: np.asarray(np.load(self.index_dir / f"{self.split}.{name}.npy", mmap_mode="r"))  # noqa: E731
        self.document_offsets = load("documents")
        self._record_offsets = load("records")
        has = lambda name: (self.index_dir / f"{self.split}.{name}.npy").exists()  # noqa: E731
        self.part_starts = load("part_starts") if has("part_starts") else None
        self.part_offsets = load("part_offsets") if has("part_offsets") else None
        self.labels = load("labels") if has("labels") else None
        self.spans = load("spans") if has("spans") else None
        self.n_tokens = int(self._record_offsets[-1])
        self._lock = threading.Lock()
        self._shards: _Shards | None = None
        self._cache: OrderedDict[int, np.ndarray] = OrderedDict()
        self._cached_tokens = 0

    @functools.cached_property
    def questions(self) -> Sequence[Question]:
        """See `TokenStore`; read into memory when it is first asked for."""
        with questions_path(self.directory, self.split).open(encoding="utf-8") as file:
            return [Question(**json.loads(line)) for line in file]

    @functools.cached_property
    def texts(self) -> Sequence[Sequence[str]] | None:
        """The parts of each document as they went to the tokenizer; None where they were not kept, as of training."""
        path = texts_path(self.directory, self.split)
        if not path.exists():
            return None
        with path.open(encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    def __getstate__(self) -> dict[str, Any]:
        """Only the settings travel: files, locks and the cache belong to one process."""
        names = ("directory", "split", "cache_tokens", "index_dir", "index_name")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens `[start, stop)` of the stream: int32 [stop - start]. IndexError outside the stream."""
        return self.read_ranges(np.array([start]), np.array([stop - start]))

    def read_ranges(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Concatenated ranges: int32 [sum(lengths)]. IndexError outside the stream."""
        starts, lengths = _check_ranges(starts, lengths, self.n_tokens)
        starts, lengths = starts[lengths > 0], lengths[lengths > 0]
        if not starts.size:
            return np.zeros(0, np.int32)
        offsets = self._record_offsets
        first = np.searchsorted(offsets, starts, side="right") - 1
        last = np.searchsorted(offsets, starts + lengths - 1, side="right") - 1
        records = np.unique(ranges(first, last - first + 1))
        decoded = self._decoded(records.tolist())
        # The records a range needs are neighbours in `records`, so every range is one piece of the joined buffer.
        begins = np.cumsum([0, *(len(tokens) for tokens in decoded)])
        at = begins[np.searchsorted(records, first)] + starts - offsets[first]
        return np.concatenate(decoded)[ranges(at, lengths)]

    def document_key(self, document: int) -> str:
        """The name the source gave to a document (its `key` feature)."""
        start = self.document_offsets[document]
        record = int(np.searchsorted(self._record_offsets, start, side="right")) - 1
        features = self._open_shards().features([record])[0]
        return features["key"].bytes_list.value[0].decode()

    def _decoded(self, records: list[int]) -> list[np.ndarray]:
        """The tokens of some records, from the cache where they are."""
        with self._lock:
            found = {record: self._cache[record] for record in records if record in self._cache}
            for record in found:
                self._cache.move_to_end(record)
        missing = [record for record in records if record not in found]
        if missing:
            # Outside the lock: two threads may decode the same record, which costs time and harms nothing.
            for record, features in zip(missing, self._open_shards().features(missing)):
                found[record] = np.array(features["tokens"].int64_list.value, np.int32)
            with self._lock:
                for record in missing:
                    if record not in self._cache:
                        self._cache[record] = found[record]
                        self._cached_tokens += len(found[record])
                while self._cached_tokens > self.cache_tokens:
                    self._cached_tokens -= len(self._cache.popitem(last=False)[1])
        return [found[record] for record in records]

    def _open_shards(self) -> _Shards:
        with self._lock:
            if self._shards is None:
                self._shards = _Shards(self.directory, self.split)
                n = len(self._record_offsets) - 1
                check(
                    self._shards.offsets[-1] == n,
                    f"{self.directory} is damaged: its {self.split} files hold {self._shards.offsets[-1]} records, "
                    f"its index {n}; delete the folder and prepare the dataset again",
                )
            return self._shards


class _Shards:
    """The ArrayRecord files of a split, addressed by record ordinal."""

    def __init__(self, directory: Path, split: str):
        # Here, not at the top: it takes half a second that only those who read from disk should pay.
        import tensorflow_datasets as tfds
        from array_record.python.array_record_module import ArrayRecordReader
        from tensorflow_datasets.proto import tf_example_pb2

        self._example = tf_example_pb2.Example
        try:
            info = tfds.builder_from_directory(str(directory)).info.splits[split]
            # No read-ahead: neighbours in the file are rarely neighbours in the shuffled order.
            self._readers = [
                ArrayRecordReader(str(path), options="readahead_buffer_size:0", file_reader_buffer_size=2**15)
                for path in info.filepaths
            ]
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"{directory} cannot be opened ({reason}); delete the folder and prepare the dataset again"
            ) from error
        self.offsets = np.cumsum([0, *info.shard_lengths])

    def features(self, records: list[int]) -> list[Any]:
        """The feature map (name to `tf.train.Feature`) of each record; one call per file is much faster than many."""
        ordinals = np.asarray(records)
        shards = np.searchsorted(self.offsets, ordinals, side="right") - 1
        raw: list[bytes] = [b""] * len(records)
        for shard in np.unique(shards):
            (where,) = np.nonzero(shards == shard)
            found = self._readers[shard].read((ordinals[where] - self.offsets[shard]).tolist())
            for i, record in zip(where, found):
                raw[i] = record
        return [self._example.FromString(record).features.feature for record in raw]


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The integers of `[starts[i], starts[i] + lengths[i])`, range after range: int64 [sum(lengths)]."""
    lengths = np.asarray(lengths, np.int64)
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if ends.size else 0
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(total)


def _check_ranges(starts: np.ndarray, lengths: np.ndarray, n_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    starts, lengths = np.asarray(starts, np.int64), np.asarray(lengths, np.int64)
    wrong = np.flatnonzero((starts < 0) | (lengths < 0) | (starts + lengths > n_tokens))
    if wrong.size:
        start, stop = starts[wrong[0]], starts[wrong[0]] + lengths[wrong[0]]
        raise IndexError(f"tokens [{start}, {stop}) asked of a stream of {n_tokens}.")
    return starts, lengths
