"""Documents of several parts as examples: source and target, texts with a class, questions about a text.

Each document is an example, in its own row; `SpanQAExamples` gives a long text several. What is longer than its row is
cut, and `cut` counts the documents that lost something.
"""

from __future__ import annotations

import numpy as np

from lm.data.objectives.pairs import shortened
from lm.data.objectives.reading import Piece, check_index, lay_out, places
from lm.data.packing import Batch
from lm.data.store import TokenStore, part_stops, ranges
from lm.errors import UserError, check


class Seq2SeqExamples:
    """Pairs of source and target, for an encoder and a decoder.

    The encoder reads source and end-of-text token; the decoder reads `[bos] + target` and tells `target + [eos]`. A
    source that is cut still has its end; a target that is cut has not, as it doesn't end there.

    Args:
      store: documents of two parts, source and target.
      source_len: S, places in a source.
      target_len: T, places in a target.
      bos_id: the decoder's first token.
      eos_id: the last token of sources and targets.

    Raises:
      UserError: documents without two parts, or a length out of range.
    """

    def __init__(self, store: TokenStore, source_len: int, target_len: int, *, bos_id: int, eos_id: int):
        check(source_len >= 2, f"the source's length is {source_len}; it must be at least 2")
        check(target_len >= 1, f"the target's length is {target_len}; it must be at least 1")
        self._store = store
        self._source_len = source_len
        self._target_len = target_len
        self._bos_id = bos_id
        self._eos_id = eos_id
        (self._source, source), (self._target, target) = two_parts(store, "source and target")
        self._source_lengths = np.minimum(source, source_len - 1)
        self._target_lengths = np.minimum(target, target_len)  # with the end, one more target if there is room
        self._ends = target < target_len
        self.cut = int(((source >= source_len) | ~self._ends).sum())

    def __len__(self) -> int:
        return len(self._source)

    def batch(self, index: np.ndarray, epoch: np.ndarray | int = 0) -> Batch:
        """See `Examples`: `source_tokens`, `source_positions`, `source_segments` int32 [N, S], and the decoder's."""
        index = check_index(index, len(self))
        used, i = index >= 0, np.maximum(index, 0)
        S, T = self._source_len, self._target_len
        source = (self._source[i], self._source_lengths[i])
        source_tokens, source_ends = lay_out(self._store, used, S, [source, self._eos_id])
        source_positions, source_segments = places(source_ends[-1], S)
        # One column more than T, for a target that fills the row has its first token pushed on by bos.
        target: list[Piece] = [self._bos_id, (self._target[i], self._target_lengths[i])]
        line, ends = lay_out(self._store, used, T + 2, [*target, self._eos_id])
        positions, segments = places(ends[1] - used + (used & self._ends[i]), T)
        return {
            "source_tokens": source_tokens,
            "source_positions": source_positions,
            "source_segments": source_segments,
            "tokens": line[:, :T] * segments,
            "targets": line[:, 1 : T + 1] * segments,
            "weights": segments.astype(np.float32),
            "positions": positions,
            "segments": segments,
        }

    def documents(self, index: int) -> np.ndarray:
        """The document that the example is."""
        return check_index(np.array([index]), len(self))


class TextPairLM:
    """Pairs of source and target as one text, for a decoder alone: `[bos] source [separator] target [eos]`.

    All up to the separator is `prefix`; the target and its end are scored. Where both are too long together, the
    source keeps at least half of the row and the target what the source leaves; a target that is cut has no end.

    Args:
      store: documents of two parts, source and target.
      seq_len: T.
      bos_id: the first token.
      eos_id: the last target.
      separator_id: the token between source and target; None for `eos_id`.

    Raises:
      UserError: documents without two parts, or a length out of range.
    """

    def __init__(self, store: TokenStore, seq_len: int, *, bos_id: int, eos_id: int, separator_id: int | None = None):
        check(seq_len >= 4, f"data.seq-len is {seq_len}; source and target as one text need at least 4")
        self._store = store
        self._seq_len = seq_len
        self._bos_id = bos_id
        self._eos_id = eos_id
        self._separator_id = eos_id if separator_id is None else separator_id
        (self._source, source), (self._target, target) = two_parts(store, "source and target")
        room = seq_len - 2  # inputs, without bos and separator; the end is no input
        self._source_lengths = np.minimum(source, np.maximum(room - target, room // 2))
        self._target_lengths = np.minimum(target, seq_len - 1 - self._source_lengths)
        self._ends = self._source_lengths + target <= room
        self.cut = int(((self._source_lengths < source) | ~self._ends).sum())

    def __len__(self) -> int:
        return len(self._source)

    def batch(self, index: np.ndarray, epoch: np.ndarray | int = 0) -> Batch:
        """See `Examples`; adds `prefix` int32 [N, T]."""
        index = check_index(index, len(self))
        used, i = index >= 0, np.maximum(index, 0)
        T = self._seq_len
        source, target = (self._source[i], self._source_lengths[i]), (self._target[i], self._target_lengths[i])
        pieces: list[Piece] = [self._bos_id, source, self._separator_id, target, self._eos_id]
        line, ends = lay_out(self._store, used, T + 2, pieces)
        positions, segments = places(ends[3] - used + (used & self._ends[i]), T)
        column, prefix_end = np.arange(T), ends[2][:, None]
        return {
            "tokens": line[:, :T] * segments,
            "targets": line[:, 1 : T + 1] * segments,
            "weights": (segments * (column + 1 >= prefix_end)).astype(np.float32),
            "positions": positions,
            "segments": segments,
            "prefix": segments * (column < prefix_end),
        }

    def documents(self, index: int) -> np.ndarray:
        """The document that the example is."""
        return check_index(np.array([index]), len(self))


class ClassificationExamples:
    """Texts with a class: `[CLS] A [SEP]`, of pairs `[CLS] A [SEP] B [SEP]`; for decoders without `[CLS]`.

    What is too long loses its end; of a pair, the longer text first.

    Args:
      store: documents with labels, all of one class or all of any number; of a pair, with two parts.
      seq_len: T.
      n_classes: labels are in `[0, n_classes)`.
      bos_id: `[CLS]`.
      eos_id: `[SEP]`, and the last token, which a decoder's classifier looks at.
      pair: whether the two parts of a document are A and B; otherwise the whole of it is A.
      decoder: no `[CLS]` and no `types`.

    Raises:
      UserError: no labels, one outside of the classes, documents without two parts, or a length out of range.
    """

    def __init__(
        self,
        store: TokenStore,
        seq_len: int,
        n_classes: int,
        *,
        bos_id: int,
        eos_id: int,
        pair: bool = False,
        decoder: bool = False,
    ):
        around = 1 + pair + (not decoder)
        check(seq_len > around, f"data.seq-len is {seq_len}; a text and what stands around it need more than {around}")
        self._labels = labels_in(store, n_classes, several=True)
        self._n_classes = n_classes
        self._store = store
        self._seq_len = seq_len
        self._bos_id = bos_id
        self._eos_id = eos_id
        self._pair = pair
        self._decoder = decoder
        room = seq_len - around
        if pair:
            (a_start, a), (b_start, b) = two_parts(store, "a pair of texts")
            a_kept, b_kept = shortened(a, b, room)
            self._texts = [(a_start, a_kept), (b_start, b_kept)]
            self.cut = int((a + b > room).sum())
        else:
            length = np.diff(store.document_offsets) - 1
            self._texts = [(store.document_offsets[:-1], np.minimum(length, room))]
            self.cut = int((length > room).sum())

    def __len__(self) -> int:
        return len(self._labels)

    def batch(self, index: np.ndarray, epoch: np.ndarray | int = 0) -> Batch:
        """`tokens`, `positions`, `segments`, for an encoder `types`: int32 [N, T]; `labels`, `label_weights` [N].

        Labels are int32 [N], or where documents may have several classes float32 [N, C], 1 = is of it.
        """
        index = check_index(index, len(self))
        used, i = index >= 0, np.maximum(index, 0)
        pieces: list[Piece] = [] if self._decoder else [self._bos_id]
        for starts, lengths in self._texts:
            pieces += [(starts[i], lengths[i]), self._eos_id]
        tokens, ends = lay_out(self._store, used, self._seq_len, pieces)
        positions, segments = places(ends[-1], self._seq_len)
        rows = {
            "tokens": tokens,
            "positions": positions,
            "segments": segments,
            "labels": self._labels_of(i, used),
            "label_weights": used.astype(np.float32),
        }
        if not self._decoder:
            behind_a = np.arange(self._seq_len) >= ends[2][:, None]
            rows["types"] = segments * behind_a
        return rows

    def _labels_of(self, documents: np.ndarray, used: np.ndarray) -> np.ndarray:
        labels = self._labels[documents]
        if labels.ndim == 1:
            return np.where(used, labels, 0).astype(np.int32)
        return np.unpackbits(labels, axis=1, count=self._n_classes) * used[:, None].astype(np.float32)

    def documents(self, index: int) -> np.ndarray:
        """The document that the example is."""
        return check_index(np.array([index]), len(self))


class SpanQAExamples:
    """Questions whose answer is a span of a text: `[CLS] question [SEP] text [SEP]`, and where the answer stands.

    A document's first part is the question and the others are the words of the text. `store.spans`, int32
    [n_documents, 2], says which parts are the first and the last word of the answer, from 1 on, or -1 and -1 where
    there is none. A text that doesn't fit gives several examples, windows that begin `stride` tokens apart (or less,
    where a long question leaves less room). An answer that isn't whole in a window is at `[CLS]` in its example.

    Args:
      store: such documents.
      seq_len: T.
      bos_id: `[CLS]`.
      eos_id: `[SEP]`.
      stride: tokens from the beginning of a window to that of the next.
      max_question: longer questions are cut, and `cut` counts them.

    Raises:
      UserError: no parts or no spans, a span outside the text, or a setting out of range.
    """

    def __init__(
        self, store: TokenStore, seq_len: int, *, bos_id: int, eos_id: int, stride: int = 128, max_question: int = 64
    ):
        check(stride >= 1, f"the stride of windows is {stride}; it must be at least 1")
        check(max_question >= 1, f"the longest question is {max_question} tokens; it must be at least 1")
        check(
            seq_len >= max_question + 4,
            f"data.seq-len is {seq_len}; with questions of up to {max_question} tokens it must be at least "
            f"{max_question + 4}",
        )
        starts, stops, offsets = parts_of(store, "a question and the words of a text")
        n_parts = np.diff(offsets)
        check_all(store, n_parts >= 2, n_parts, "{} parts, and needs a question and a text's words")
        if store.spans is None:
            raise UserError("the dataset doesn't say where answers are; prepare it from a squad: source")
        first, last = np.asarray(store.spans, np.int64).T
        none = (first == -1) & (last == -1)
        within = (first >= 1) & (first <= last) & (last < n_parts)
        check_all(store, none | within, first, "an answer from word {}, which is not in its text")

        self._store = store
        self._seq_len = seq_len
        self._bos_id = bos_id
        self._eos_id = eos_id
        self._part_starts, self._part_offsets = starts, offsets
        head = offsets[:-1]
        self._question = starts[head]
        length = stops[head] - starts[head]
        self._question_lengths = np.minimum(length, max_question)
        self.cut = int((length > max_question).sum())
        self._text_stops = stops[offsets[1:] - 1]
        # Tokens [first, last) of the stream; an answer of no tokens is none.
        first, last = starts[head + np.maximum(first, 0)], stops[head + np.maximum(last, 0)]
        none |= last <= first
        self._answers = np.where(none, -1, first), np.where(none, -1, last)

        text = starts[head + 1]
        self._room = seq_len - 3 - self._question_lengths
        steps = np.minimum(stride, self._room)
        windows = 1 - (-np.maximum(self._text_stops - text - self._room, 0) // steps)
        self._document = np.repeat(np.arange(len(head)), windows)
        self._begins = text[self._document] + ranges(np.zeros_like(windows), windows) * steps[self._document]

    def __len__(self) -> int:
        return len(self._document)

    def batch(self, index: np.ndarray, epoch: np.ndarray | int = 0) -> Batch:
        """`tokens`, `positions`, `segments`, `types` int32 [N, T]; `starts`, `ends` int32 [N]; `label_weights` [N].

        The answer is the tokens from place `starts` to place `ends` of the row, both in it.
        """
        index = check_index(index, len(self))
        used, i = index >= 0, np.maximum(index, 0)
        document, begin = self._document[i], self._begins[i]
        question = (self._question[document], self._question_lengths[document])
        stop = np.minimum(begin + self._room[document], self._text_stops[document])
        pieces: list[Piece] = [self._bos_id, question, self._eos_id, (begin, stop - begin), self._eos_id]
        tokens, ends = lay_out(self._store, used, self._seq_len, pieces)
        positions, segments = places(ends[-1], self._seq_len)
        first, last = (answer[document] for answer in self._answers)
        inside = used & (first >= begin) & (last <= stop)
        return {
            "tokens": tokens,
            "positions": positions,
            "segments": segments,
            "types": segments * (np.arange(self._seq_len) >= ends[2][:, None]),
            "starts": np.where(inside, ends[2] + first - begin, 0).astype(np.int32),
            "ends": np.where(inside, ends[2] + last - 1 - begin, 0).astype(np.int32),
            "label_weights": used.astype(np.float32),
        }

    def documents(self, index: int) -> np.ndarray:
        """The document that the example is a window of."""
        return self._document[check_index(np.array([index]), len(self))]

    def words(self, index: int) -> np.ndarray:
        """The part of the document that each place of an example belongs to, int64 [T]; -1 where none of the text."""
        i = int(check_index(np.array([index]), len(self))[0])
        document, begin = int(self._document[i]), int(self._begins[i])
        stop = min(begin + int(self._room[document]), int(self._text_stops[document]))
        places = np.full(self._seq_len, -1, np.int64)
        part = np.searchsorted(self._part_starts, np.arange(begin, stop), side="right") - 1
        at = 2 + int(self._question_lengths[document])
        places[at : at + stop - begin] = part - self._part_offsets[document]
        return places


def two_parts(store: TokenStore, what: str) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Start and length, int64 [n_documents], of the two parts of each document. UserError where there aren't two."""
    starts, stops, offsets = parts_of(store, what)
    n_parts = np.diff(offsets)
    check_all(store, n_parts == 2, n_parts, "{} parts, and " + what + " are two")
    first = offsets[:-1]
    return (starts[first], stops[first] - starts[first]), (starts[first + 1], stops[first + 1] - starts[first + 1])


def parts_of(store: TokenStore, what: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Start and stop, int64 [n_parts], of all parts, and `part_offsets`. UserError, of `what`, where there are none."""
    if store.part_starts is None or store.part_offsets is None:
        raise UserError(
            f"{what} are parts of a document, and the dataset's documents have no parts; prepare it with --data.fields "
            "and the names of the columns"
        )
    return store.part_starts, part_stops(store), store.part_offsets


def labels_in(store: TokenStore, n_classes: int, *, several: bool = False) -> np.ndarray:
    """The class of each document, int32 [n_documents]; if there may be `several`, also the bits of its classes.

    Raises:
      UserError: there are none, or one is out of range.
    """
    check(n_classes >= 2, f"there are {n_classes} classes; there must be at least 2")
    if store.labels is None:
        raise UserError("the dataset's documents have no labels; prepare it with --data.label-field")
    labels = np.asarray(store.labels)
    if labels.ndim == 2:
        check(
            several,
            "the dataset has any number of classes for each document, and here each has one; prepare it without"
            " data.label_separator",
        )
        size = -(-n_classes // 8)
        check(
            labels.shape[1] == size,
            f"documents have {labels.shape[1]} bytes of classes, and {n_classes} classes take {size}; prepare the"
            " dataset again",
        )
        return labels
    within = (labels >= 0) & (labels < n_classes)
    check_all(store, within, labels, f"label {{}}, and with {n_classes} classes they go from 0 to {n_classes - 1}")
    return labels


def check_all(store: TokenStore, right: np.ndarray, values: np.ndarray, has: str) -> None:
    """Raises `UserError` unless all documents are right; it names the first that is not and what it has."""
    if not right.all():
        wrong = int(np.argmin(right))
        raise UserError(
            f"document {store.document_key(wrong)} has {has.format(values[wrong])}; {int((~right).sum())} of "
            f"{len(right)} documents are so; prepare the dataset again without them or with other settings"
        )
