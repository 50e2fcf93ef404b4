"""From a stream of tokens to examples of one length: example i is a function of (store, settings, i) and nothing else.

A window holds `seq_len` targets, and windows begin every `stride` targets: `seq_len` apart, or closer, so that they
overlap. `stream` lays windows over the concatenated documents. `documents` and `pad` keep documents apart: each becomes
one piece, or several windows when it is longer than `seq_len`. `documents` packs pieces whole into examples with as
little padding as best-fit decreasing leaves, `pad` gives each an example of its own.

Training scores all that is in a window, so a token trains once in every window that holds it. Evaluation scores each
token once, in the first window that holds it, where what precedes it in the overlap is context: with a small stride
that is the sliding-window perplexity.
"""

from __future__ import annotations

import bisect
import hashlib
import os
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from lm.data.permutation import permute
from lm.data.store import TokenStore, ranges
from lm.errors import UserError, check

Batch = dict[str, np.ndarray]
Packing = Literal["stream", "documents", "pad"]

# In the name of cached packings; count it up when the packing changes.
_VERSION = 2

# Of the shuffle of packed examples. Not a seed that anybody chooses: the shuffle of training with the same seed, made
# by the same formula, would undo it.
_SHUFFLE = 0x7061636B696E67


class Examples(Protocol):
    """A fixed sequence of examples; safe to share between threads and to send to other processes."""

    def __len__(self) -> int:
        """How many examples there are."""

    def batch(self, index: np.ndarray, epoch: np.ndarray | int = 0) -> Batch:
        """The examples `index` ([N] integers) as rows.

        Args:
          index: which examples.
          epoch: [N] integers, or one for all: how often each has been seen before. Examples that are drawn at random
            differ by it; evaluation asks for 0.

        Returns:
          `tokens`, `targets`, `positions` int32 [N, T], `weights` float32 [N, T], and `segments` int32 [N, T] when
          documents are kept apart. A negative index gives a row of padding, which scores nothing.
        """

    def documents(self, index: int) -> np.ndarray:
        """Ordinals of the documents that example `index` holds tokens of: int64, in order of appearance."""


def make_examples(
    store: TokenStore,
    *,
    seq_len: int,
    packing: Packing,
    bos_id: int,
    stride: int | None = None,
    training: bool = True,
) -> Examples:
    """The examples of a split.

    Args:
      store: where tokens are read.
      seq_len: T, inputs (and targets) in one example.
      packing: `stream`, `documents` or `pad`.
      bos_id: the token before the first token of a document, when documents are kept apart.
      stride: targets from the beginning of a window to that of the next, at most T; None for T.
      training: leave out a stream's last, shorter window and score all in the others; otherwise pad it, and score
        every token once.

    Raises:
      UserError: a setting out of range, or a corpus shorter than one example.
    """
    check(seq_len >= 1, f"data.seq-len is {seq_len}; it must be at least 1")
    stride = seq_len if stride is None else stride
    check(
        1 <= stride <= seq_len,
        f"the stride is {stride}; it must be between 1 and data.seq-len ({seq_len}), or tokens would be passed over",
    )
    # Training on a corpus shorter than one example is nearly always a mistake; scoring one is not.
    needed = seq_len + 1 if training else 2 if packing == "stream" else 1
    if store.n_tokens < needed:
        what = f"data.seq-len {seq_len} needs at least {needed}" if training else f"at least {needed} are needed"
        raise UserError(f"the corpus has {store.n_tokens} tokens and {what}; add text or make data.seq-len smaller")
    if packing == "stream":
        return StreamExamples(store, seq_len, stride, training=training)
    if packing in ("documents", "pad"):
        return DocumentExamples(store, seq_len, stride, bos_id, packed=packing == "documents", training=training)
    raise UserError(f"data.packing is {packing!r}; it must be stream, documents or pad")


class StreamExamples:
    """Example i reads tokens `[i*S, i*S + T]` of the stream: inputs all but the last, targets all but the first."""

    def __init__(self, store: TokenStore, seq_len: int, stride: int, *, training: bool):
        self._store = store
        self._seq_len = seq_len
        self._stride = stride
        self._training = training
        beyond_first = store.n_tokens - 1 - seq_len  # targets; the very first token of all is none
        self._n = 1 + (beyond_first // stride if training else -(-max(beyond_first, 0) // stride))

    def __len__(self) -> int:
        return self._n

    def batch(self, index: np.ndarray, epoch: np.ndarray | int = 0) -> Batch:
        """Rows without `segments`: nothing separates documents, so that the plain causal kernel serves."""
        T = self._seq_len
        index = _check_index(index, self._n)
        starts = np.maximum(index, 0) * self._stride
        lengths = np.where(index < 0, 0, np.minimum(T + 1, self._store.n_tokens - starts))
        block = np.zeros((len(index), T + 1), np.int32)
        block[np.arange(T + 1) < lengths[:, None]] = self._store.read_ranges(starts, lengths)
        seen = np.where((starts == 0) | self._training, 0, T - self._stride)  # targets that an earlier window scored
        column = np.arange(T)
        return {
            "tokens": np.ascontiguousarray(block[:, :-1]),
            "targets": np.ascontiguousarray(block[:, 1:]),
            "weights": ((column + 1 < lengths[:, None]) & (column >= seen[:, None])).astype(np.float32),
            "positions": np.tile(np.arange(T, dtype=np.int32), (len(index), 1)),
        }

    def documents(self, index: int) -> np.ndarray:
        """Documents that overlap the tokens of the example."""
        offsets, start = self._store.document_offsets, int(_check_index(np.array([index]), self._n)[0]) * self._stride
        stop = min(start + self._seq_len + 1, self._store.n_tokens)
        return np.arange(
            np.searchsorted(offsets, start, side="right") - 1, np.searchsorted(offsets, stop - 1, side="right")
        )


class DocumentExamples:
    """Documents kept apart: inputs `[bos] + ids`, targets `ids + [eos]`, packed whole where they fit, or padded.

    A document with more than T targets becomes pieces of at most T targets that begin every S targets. A later
    piece's first input is the token before its first target; its positions restart and attention does not reach back.
    """

    def __init__(self, store: TokenStore, seq_len: int, stride: int, bos_id: int, *, packed: bool, training: bool):
        self._store = store
        self._seq_len = seq_len
        self._stride = stride
        self._bos_id = bos_id
        self._training = training
        if packed:
            self._example_offsets, self._piece_starts = _packing_index(store, seq_len, stride)
        else:
            self._piece_starts = _piece_starts(store.document_offsets, seq_len, stride)
            self._example_offsets = np.arange(len(self._piece_starts) + 1)

    def __len__(self) -> int:
        return len(self._example_offsets) - 1

    def batch(self, index: np.ndarray, epoch: np.ndarray | int = 0) -> Batch:
        """Rows with `segments` 1, 2, … by piece and 0 for padding; `positions` restart at each piece."""
        index = _check_index(index, len(self))
        N, T = len(index), self._seq_len
        row, rank, begins, starts, lengths, opens = self._pieces(index)

        # One read brings the targets and, for later pieces, the token before them.
        read = self._store.read_ranges(starts - ~opens, lengths + ~opens)
        before = np.cumsum(lengths + ~opens) - lengths - 1  # where that extra token is
        targets = np.delete(read, before[~opens])
        first = np.cumsum(lengths) - lengths  # where each piece begins in `targets`
        tokens = np.empty_like(targets)
        tokens[1:] = targets[:-1]
        tokens[first[opens]] = self._bos_id
        tokens[first[~opens]] = read[before[~opens]]

        where = ranges(row * T + begins, lengths)
        place = ranges(np.zeros_like(lengths), lengths)  # in the piece
        seen = np.where(opens | self._training, 0, T - self._stride)  # targets that an earlier piece scored

        def scatter(values: np.ndarray, dtype: type) -> np.ndarray:
            out: np.ndarray = np.zeros(N * T, dtype)
            out[where] = values
            return out.reshape(N, T)

        return {
            "tokens": scatter(tokens, np.int32),
            "targets": scatter(targets, np.int32),
            "weights": scatter((place >= np.repeat(seen, lengths)).astype(np.float32), np.float32),
            "positions": scatter(place, np.int32),
            "segments": scatter(np.repeat(rank + 1, lengths), np.int32),
        }

    def documents(self, index: int) -> np.ndarray:
        """Documents whose pieces are in the example."""
        index = int(_check_index(np.array([index]), len(self))[0])
        starts = self._piece_starts[self._example_offsets[index] : self._example_offsets[index + 1]]
        return np.unique(np.searchsorted(self._store.document_offsets, starts, side="right") - 1)

    def _pieces(self, index: np.ndarray) -> tuple[np.ndarray, ...]:
        """The pieces of some examples: row, rank in the row, column, first target, length, opens its document."""
        safe = np.maximum(index, 0)
        firsts = self._example_offsets[safe]
        counts = np.where(index < 0, 0, self._example_offsets[safe + 1] - firsts)
        starts = self._piece_starts[ranges(firsts, counts)]
        document = np.searchsorted(self._store.document_offsets, starts, side="right") - 1
        lengths = np.minimum(self._seq_len, self._store.document_offsets[document + 1] - starts)
        rank = ranges(np.zeros_like(counts), counts)
        # A column is what the row's earlier pieces took: a running sum that restarts with the row.
        taken = np.cumsum(np.append(0, lengths))
        begins = taken[:-1] - np.repeat(taken[np.cumsum(counts) - counts], counts)
        row = np.repeat(np.arange(len(index)), counts)
        return row, rank, begins, starts, lengths, self._store.document_offsets[document] == starts


def pack(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """Best-fit decreasing: the longest piece first, each into the fullest bin that still holds it.

    Bins with equal room are handled together, so the work grows with the number of different lengths, and only
    the sorting of pieces grows with their number.

    Args:
      lengths: integers [n] in `[1, capacity]`.
      capacity: what one bin holds.

    Returns:
      The bin of each piece, int64 [n], and the number of bins.
    """
    counts = np.bincount(lengths, minlength=capacity + 1)
    groups: dict[int, list[tuple[int, int]]] = defaultdict(list)  # room left -> (first bin, bins) with that room
    rooms: list[int] = []  # the keys of `groups`, sorted

    def add(room: int, first: int, bins: int) -> None:
        if room > 0 and bins > 0:
            if not groups[room]:
                bisect.insort(rooms, room)
            groups[room].append((first, bins))

    fills: list[tuple[int, int, int]] = []  # (first bin, bins, pieces put into each), in order of decreasing length
    n_bins = 0
    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        while left:
            at = bisect.bisect_left(rooms, length)
            if at == len(rooms):
                new = -(-left // (capacity // length))
                add(capacity, n_bins, new)
                n_bins += new
            room = rooms[at]
            first, bins = groups[room].pop()
            if not groups[room]:
                rooms.pop(at)
            each = min(room // length, left)
            filled = min(bins, left // each)
            fills.append((first, filled, each))
            left -= filled * each
            add(room - each * length, first, filled)
            add(room, first + filled, bins - filled)

    first_bins, filled_bins, pieces = np.array(fills, np.int64).reshape(-1, 3).T
    bin_of_piece = np.empty(len(lengths), np.int64)
    by_length = np.argsort(-np.asarray(lengths), kind="stable")
    bin_of_piece[by_length] = np.repeat(ranges(first_bins, filled_bins), np.repeat(pieces, filled_bins))
    return bin_of_piece, n_bins


def _packing_index(store: TokenStore, seq_len: int, stride: int) -> tuple[np.ndarray, np.ndarray]:
    """(int64 [n_examples + 1] offsets into pieces, int64 [n_pieces] first target of each), cached on disk if possible.

    The cache is named by what it depends on. A file appears whole or not at all, and whoever computes it writes the
    same bytes, so that processes that race do no harm.
    """
    if store.index_dir is None:
        return _pack_documents(store.document_offsets, seq_len, stride)
    digest = hashlib.blake2b(np.ascontiguousarray(store.document_offsets).data, digest_size=8).hexdigest()
    lengths = f"{seq_len}" if stride == seq_len else f"{seq_len}-{stride}"
    stem = f"{store.index_name}.packing-v{_VERSION}-{lengths}-{digest}"
    paths = [store.index_dir / f"{stem}.{part}.npy" for part in ("examples", "pieces")]
    if not all(path.exists() for path in paths):
        arrays = _pack_documents(store.document_offsets, seq_len, stride)
        try:
            for path, array in zip(paths, arrays):
                _save_atomically(path, array)
        except OSError:
            return arrays  # a dataset that may not be written to is packed anew each time
    offsets, starts = (np.asarray(np.load(path, mmap_mode="r")) for path in paths)
    return offsets, starts


def _piece_starts(document_offsets: np.ndarray, seq_len: int, stride: int) -> np.ndarray:
    """The first target of each piece, int64 [n_pieces], in the order of the stream."""
    document_lengths = np.diff(document_offsets)
    pieces_of = np.where(document_lengths > 0, 1 - (-np.maximum(document_lengths - seq_len, 0) // stride), 0)
    first = np.repeat(document_offsets[:-1], pieces_of)
    return first + ranges(np.zeros_like(pieces_of), pieces_of) * stride


def _pack_documents(document_offsets: np.ndarray, seq_len: int, stride: int) -> tuple[np.ndarray, np.ndarray]:
    starts = _piece_starts(document_offsets, seq_len, stride)
    document = np.searchsorted(document_offsets, starts, side="right") - 1
    lengths = np.minimum(document_offsets[document + 1] - starts, seq_len)
    offsets, order = pack_rows(lengths, seq_len)
    return offsets, starts[order]


def pack_rows(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Examples of pieces that `pack` puts together.

    Args:
      lengths: integers [n] in `[1, capacity]`.
      capacity: what one example holds.

    Returns:
      Where the pieces of each example begin among all, int64 [n_examples + 1], and the pieces by example, in their
      order inside: int64 [n].
    """
    bins, n_bins = pack(lengths, capacity)
    # Bins come out longest piece first. Shuffle them, so that the first few of an evaluation are a fair sample.
    bins = permute(np.arange(n_bins), n_bins, seed=_SHUFFLE)[bins] if n_bins else bins
    offsets = np.concatenate([[0], np.cumsum(np.bincount(bins, minlength=n_bins))]).astype(np.int64)
    return offsets, np.argsort(bins, kind="stable")


def _save_atomically(path: Path, array: np.ndarray) -> None:
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            np.save(file, array, allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _check_index(index: np.ndarray, n: int) -> np.ndarray:
    index = np.asarray(index, np.int64)
    if index.size and index.max() >= n:
        raise IndexError(f"example {index.max()} asked; there are {n}.")
    return index
