"""BERT's pairs of texts: `[CLS] A [SEP] B [SEP]`, where B follows A (label 0) or is from elsewhere (label 1).

A document is cut into chunks of consecutive sentences that fill a row, each an example; how a chunk is used is drawn
anew in each epoch. `BertExamples` masks the pairs.
"""

from __future__ import annotations

import numpy as np

from lm.data.objectives.draws import CUTS, PAIRS, row_keys, uniform, whole
from lm.data.objectives.masking import MaskedExamples, Masker
from lm.data.objectives.reading import Piece, check_index, lay_out, places
from lm.data.packing import Batch
from lm.data.store import TokenStore, part_stops
from lm.errors import UserError, check


class PairExamples:
    """Pairs of texts with their label, nothing masked: an example is a chunk of two or more sentences of a document.

    Chunks follow each other; one ends with the sentence that fills the row, and a last sentence that would be left
    alone takes the one before it into its chunk. In one epoch a chunk gives A, its first sentences, as many as are
    drawn, and B: what is left of the chunk or, with probability `random_share`, as much of another document, from a
    sentence on that is drawn. What A then leaves of the chunk is not used in that epoch. With probability
    `short_share`, only a part of the chunk is used, for about 2 to `seq_len - 3` tokens, so that short texts occur.
    What is too long loses tokens one by one, from the longer of A and B, at the front or the back by a coin.

    Documents of one sentence are never A; they serve as B from elsewhere.

    Args:
      store: documents with parts, which are their sentences; sentences without tokens do not count.
      seq_len: T.
      bos_id: `[CLS]`.
      eos_id: `[SEP]`.
      seed: of the draws.
      random_share: probability that B is from another document.
      short_share: probability that a text is short.

    Raises:
      UserError: documents without sentences, none with two, only one document, or a setting out of range.
    """

    def __init__(
        self,
        store: TokenStore,
        seq_len: int,
        *,
        bos_id: int,
        eos_id: int,
        seed: int,
        random_share: float = 0.5,
        short_share: float = 0.1,
    ):
        check(seq_len >= 5, f"data.seq-len is {seq_len}; pairs of texts and what stands around them need at least 5")
        for name, share in (("random_share", random_share), ("short_share", short_share)):
            check(0 <= share <= 1, f"{name} is {share}; it is a probability, from 0 to 1")
        if store.part_starts is None or store.part_offsets is None:
            raise UserError(
                "pairs of texts need to know where sentences begin, and the dataset doesn't say; prepare it with "
                "--data.sentences"
            )
        self._store = store
        self._seq_len = seq_len
        self._bos_id = bos_id
        self._eos_id = eos_id
        self._seed = seed
        self._random_share = random_share
        self._short_share = short_share

        stops = part_stops(store)
        (said,) = np.nonzero(stops > store.part_starts)
        self._starts, self._stops = store.part_starts[said], stops[said]
        document = np.searchsorted(store.part_offsets, said, side="right") - 1
        # From here on a document is one of those that have sentences.
        self._documents, first = np.unique(document, return_index=True)
        self._first = np.append(first, len(said))
        sentences = np.diff(self._first)
        check(
            (sentences >= 2).any(),
            f"none of the {len(store.document_offsets) - 1} documents has two sentences, so that nothing follows "
            "anything; prepare longer documents with --data.sentences",
        )
        check(
            len(sentences) >= 2 or random_share == 0,
            "the split has one document, and a text from elsewhere needs another; prepare more documents",
        )
        self._chunks = self._cut_into_chunks()
        self._of_chunk = np.searchsorted(self._first, self._chunks[:, 0], side="right") - 1

    def __len__(self) -> int:
        return len(self._chunks)

    def batch(self, index: np.ndarray, epoch: np.ndarray | int = 0) -> Batch:
        """See `Examples`; `types` int32 [N, T] are 1 for B and its `[SEP]`; `labels`, `label_weights` [N]."""
        index = check_index(index, len(self))
        used = index >= 0
        a, b, elsewhere = self._drawn(index, epoch)
        pieces: list[Piece] = [self._bos_id, a, self._eos_id, b, self._eos_id]
        tokens, ends = lay_out(self._store, used, self._seq_len, pieces)
        positions, segments = places(ends[-1], self._seq_len)
        return {
            "tokens": tokens,
            "targets": tokens.copy(),
            "weights": np.zeros(tokens.shape, np.float32),
            "positions": positions,
            "segments": segments,
            "types": segments * (np.arange(self._seq_len) >= ends[2][:, None]),
            "labels": (elsewhere & used).astype(np.int32),
            "label_weights": used.astype(np.float32),
        }

    def documents(self, index: int) -> np.ndarray:
        """The document that A is of; in some epochs B is of another one."""
        chunk = int(check_index(np.array([index]), len(self))[0])
        return self._documents[self._of_chunk[[chunk]]]

    def _cut_into_chunks(self) -> np.ndarray:
        """First sentence of each chunk and the one behind its last, in order: int64 [n_chunks, 2]."""
        n = len(self._starts)
        first = self._first[:-1][np.diff(self._first) >= 2]
        end = self._first[1:][np.diff(self._first) >= 2]
        after = self._end_of_run(np.arange(n), self._starts + self._seq_len - 3)
        found = []
        while first.size:  # a chunk of every document at a time
            last = np.minimum(np.maximum(after[first], first + 2), end)
            # Of a single sentence that is left, `last` is the end; it takes the one before it.
            found.append(np.stack([np.minimum(first, last - 2), last], axis=1))
            first, end = last[last < end], end[last < end]
        chunks = np.concatenate(found)
        return chunks[np.argsort(chunks[:, 0], kind="stable")]

    def _end_of_run(self, first: np.ndarray, upto: np.ndarray) -> np.ndarray:
        """The sentence behind the one that reaches place `upto` of the stream; at least the one behind `first`."""
        return np.maximum(np.searchsorted(self._stops, upto, side="left"), first) + 1

    def _drawn(self, index: np.ndarray, epoch: np.ndarray | int) -> tuple[tuple, tuple, np.ndarray]:
        """Where A and B stand in the stream, (start, length) int64 [N] each, and whether B is from elsewhere."""
        room = self._seq_len - 3
        draw = uniform(row_keys(self._seed, PAIRS, epoch, index), 7).T
        safe = np.maximum(index, 0)
        (first, end), document = self._chunks[safe].T, self._of_chunk[safe]

        short = draw[0] < self._short_share
        aim = np.where(short, 2 + whole(draw[1], room - 1), room)
        first = np.where(short, first + whole(draw[2], end - first - 1), first)
        end = np.where(short, np.clip(self._end_of_run(first, self._starts[first] + aim), first + 2, end), end)

        middle = first + 1 + whole(draw[3], end - first - 1)  # A's sentences are [first, middle)
        a_start, a_stop = self._starts[first], self._stops[middle - 1]
        elsewhere = draw[4] < self._random_share
        other = whole(draw[5], len(self._documents) - 1)
        other += other >= document
        other = np.where(elsewhere, other, document)  # there may be no other
        begin = self._first[other] + whole(draw[6], self._first[other + 1] - self._first[other])
        enough = self._starts[begin] + np.maximum(aim - (a_stop - a_start), 1)
        stop = np.minimum(self._end_of_run(begin, enough), self._first[other + 1])
        b_start = np.where(elsewhere, self._starts[begin], self._starts[middle])
        b_stop = np.where(elsewhere, self._stops[stop - 1], self._stops[end - 1])

        a_length, b_length = a_stop - a_start, b_stop - b_start
        a_kept, b_kept = shortened(a_length, b_length, room)
        a_front, b_front = _coins(row_keys(self._seed, CUTS, epoch, index), a_length - a_kept, b_length - b_kept)
        return (a_start + a_front, a_kept), (b_start + b_front, b_kept), elsewhere


def shortened(a: np.ndarray, b: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray]:
    """Lengths of two texts when the longer one (of equals the second) loses a token until both fit into `room`."""
    a_kept = np.where(a + b <= room, a, np.minimum(a, np.maximum(room - b, -(-room // 2))))
    return a_kept, np.where(a + b <= room, b, room - a_kept)


def _coins(keys: np.ndarray, a_lost: np.ndarray, b_lost: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many of the tokens that A and B lose, they lose at the front: a coin for each of them."""
    a_front, b_front = np.zeros_like(a_lost), np.zeros_like(b_lost)
    for i in np.flatnonzero(a_lost + b_lost):
        heads = uniform(keys[i], int(a_lost[i] + b_lost[i])) < 0.5
        a_front[i], b_front[i] = heads[: a_lost[i]].sum(), heads[a_lost[i] :].sum()
    return a_front, b_front


class BertExamples(MaskedExamples):
    """BERT's examples: pairs of texts with their label (see `PairExamples`), masked (see `MaskedExamples`)."""

    def __init__(self, pairs: PairExamples, masker: Masker):
        super().__init__(pairs, masker)
