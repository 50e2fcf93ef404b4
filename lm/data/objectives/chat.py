"""Conversations as examples: all is read, and what the assistant says is scored."""

from __future__ import annotations

from typing import Literal

import numpy as np

from lm.data.objectives.parts import parts_of
from lm.data.objectives.reading import check_index
from lm.data.packing import Batch, pack_rows
from lm.data.store import TokenStore, ranges
from lm.errors import UserError, check


class ChatExamples:
    """Conversations for a decoder, whole: inputs all tokens but the last, targets all but the first.

    A conversation's parts are what is read and what is answered, in turn; answers have weights. One with more than T
    targets keeps its first token and as many of its last tokens as there is room for. An answer that loses a part is
    not scored; `cut` counts the conversations that lose something. One whose last answer has more than T tokens can't
    be kept.

    Args:
      store: such documents.
      seq_len: T.
      packed: several conversations a row, as `lm.data.packing.pack` lays them; otherwise one a row.
      on_error: what to do with an answer that is longer than a row: `stop`, or `skip` and count it in `left_out`.

    Raises:
      UserError: documents without parts, none that fits, or one that doesn't (`on_error` stop).
    """

    def __init__(self, store: TokenStore, seq_len: int, *, packed: bool, on_error: Literal["stop", "skip"] = "stop"):
        check(seq_len >= 2, f"data.seq-len is {seq_len}; a conversation needs at least 2")
        starts, stops, offsets = parts_of(store, "what is read and what is answered")
        n_parts = np.diff(offsets)
        odd = n_parts % 2 == 1
        if odd.any():
            raise UserError(
                f"document {store.document_key(int(np.argmax(odd)))} has {n_parts[odd][0]} parts, which is no"
                " conversation; prepare the dataset with data.chat.template"
            )
        self._store = store
        self._seq_len = seq_len
        # Answers in order of the stream; the last of each document decides whether it can be used.
        answer = (np.arange(len(starts)) - np.repeat(offsets[:-1], n_parts)) % 2 == 1
        self._answer_starts, self._answer_stops = starts[answer], stops[answer]
        stop = stops[offsets[1:] - 1]
        longest = stop - starts[offsets[1:] - 1]
        fits = longest <= seq_len
        self.left_out = int((~fits).sum())
        if self.left_out and on_error == "stop":
            worst = int(np.argmin(fits))
            raise UserError(
                f"the last response of {store.document_key(worst)} has {longest[worst]} tokens and a row {seq_len}"
                f" (data.seq_len); {self.left_out} of {len(fits)} conversations are so: raise data.seq_len, or"
                " --data.on-error skip to leave such out and count them"
            )
        check(fits.any(), f"no conversation has a last response of at most {seq_len} tokens; raise data.seq_len")
        self._document = np.flatnonzero(fits)
        self._first = store.document_offsets[:-1][fits]
        self._stop = stop[fits]
        length = self._stop - self._first - 1  # targets
        self._lengths = np.minimum(length, seq_len)
        self.cut = int((length > seq_len).sum())
        if packed:
            self._offsets, self._order = pack_rows(self._lengths, seq_len)
        else:
            self._offsets, self._order = np.arange(len(self._lengths) + 1), np.arange(len(self._lengths))

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def batch(self, index: np.ndarray, epoch: np.ndarray | int = 0) -> Batch:
        """See `Examples`: rows with `segments` 1, 2, … by conversation; `positions` restart at each."""
        index = check_index(index, len(self))
        N, T = len(index), self._seq_len
        safe = np.maximum(index, 0)
        counts = np.where(index < 0, 0, self._offsets[safe + 1] - self._offsets[safe])
        which = self._order[ranges(self._offsets[safe], counts)]
        row, rank = np.repeat(np.arange(N), counts), ranges(np.zeros_like(counts), counts)
        lengths = self._lengths[which]
        taken = np.cumsum(np.append(0, lengths))
        column = taken[:-1] - np.repeat(taken[np.cumsum(counts) - counts], counts)

        # A token more than there are targets: the one before the first.
        begins = self._stop[which] - lengths - 1
        read = self._store.read_ranges(begins, lengths + 1)
        heads = np.cumsum(lengths + 1) - lengths - 1
        read[heads] = self._store.read_ranges(self._first[which], np.ones_like(which))
        is_input, is_target = np.ones(len(read), bool), np.ones(len(read), bool)
        is_input[heads + lengths] = is_target[heads] = False

        place = ranges(begins + 1, lengths)  # of each target, in the stream
        answer = np.searchsorted(self._answer_starts, place, side="right") - 1
        lost = np.repeat(np.where(begins > self._first[which], begins + 1, 0), lengths)  # what stands before it
        whole = self._answer_starts[answer] >= lost
        scored = (answer >= 0) & (place < self._answer_stops[answer]) & whole
        where = ranges(row * T + column, lengths)

        def scatter(values: np.ndarray, dtype: type) -> np.ndarray:
            out: np.ndarray = np.zeros(N * T, dtype)
            out[where] = values
            return out.reshape(N, T)

        return {
            "tokens": scatter(read[is_input], np.int32),
            "targets": scatter(read[is_target], np.int32),
            "weights": scatter(scored, np.float32),
            "positions": scatter(ranges(np.zeros_like(lengths), lengths), np.int32),
            "segments": scatter(np.repeat(rank + 1, lengths), np.int32),
        }

    def documents(self, index: int) -> np.ndarray:
        """The conversations of the example."""
        index = int(check_index(np.array([index]), len(self))[0])
        return self._document[self._order[self._offsets[index] : self._offsets[index + 1]]]
