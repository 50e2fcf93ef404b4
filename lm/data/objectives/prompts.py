"""Texts in a pattern with a word for each class, so that a language model tells the class by telling the word."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np

from lm.data.objectives.draws import SHOTS, row_keys, uniform
from lm.data.objectives.pairs import shortened
from lm.data.objectives.parts import labels_in, two_parts
from lm.data.objectives.reading import Piece, check_index, lay_out, places
from lm.data.packing import Batch
from lm.data.store import DatasetStore, TokenStore
from lm.errors import UserError, check
from lm.text.chat import encode_behind
from lm.text.tokenizer import Tokenizer

Slot = Literal["text", "0", "1", "word"]
_SLOT = re.compile(r"\{(text|0|1|word)\}")
SEPARATOR = "\n\n"
"""What stands between examples that are shown."""


@dataclass(frozen=True)
class Pattern:
    """A pattern in tokens."""

    pieces: tuple[np.ndarray | Slot, ...]
    """Ids, int32 [n], and the places between them, in order."""
    words: tuple[np.ndarray, ...]
    """Ids of the word of each class."""

    @property
    def pair(self) -> bool:
        """Whether it takes two texts."""
        return "0" in self.slots

    @property
    def slots(self) -> list[str]:
        """The places, in order."""
        return [piece for piece in self.pieces if isinstance(piece, str)]

    @property
    def place(self) -> int:
        """Which piece is the word's."""
        return next(i for i, piece in enumerate(self.pieces) if isinstance(piece, str) and piece == "word")

    @property
    def longest_word(self) -> int:
        """Tokens."""
        return max(map(len, self.words))


def slots_of(pattern: str) -> list[str]:
    """The places of a pattern in order, that of the word at its end if it doesn't say.

    Raises:
      UserError: a pattern without a text, or with a place that is there twice.
    """
    slots = _SLOT.findall(pattern)
    texts = sorted(slot for slot in slots if slot != "word")
    check(
        texts in (["text"], ["0", "1"]) and slots.count("word") <= 1,
        f"task.pattern is {pattern!r}; it has {{text}} once, or {{0}} and {{1}} once each for a pair of texts, and at"
        " most one {word}",
    )
    return slots if "word" in slots else [*slots, "word"]


def make_pattern(pattern: str, words: Sequence[str], tokenizer: Tokenizer) -> Pattern:
    """A pattern in tokens of a tokenizer; its pieces, texts and words are tokenised apart.

    Args:
      pattern: text with `{text}`, or `{0}` and `{1}`, and `{word}`, which otherwise stands at the end.
      words: one for each class, with the space before it where there is one.
      tokenizer: the model's.

    Raises:
      UserError: see `slots_of`; words that the tokenizer doesn't know or cannot tell apart.
    """
    slots_of(pattern)
    parts = _SLOT.split(pattern if "{word}" in pattern else pattern + "{word}")
    pieces: list[np.ndarray | Slot] = []
    for number, part in enumerate(parts):
        if number % 2:
            pieces.append(cast(Slot, part))  # one of the slots, as the expression says
        elif part:
            pieces.append(np.asarray(encode_behind(tokenizer, part) if number else tokenizer.encode(part), np.int32))
    found: dict[tuple[int, ...], str] = {}
    for word in words:
        ids = tuple(encode_behind(tokenizer, word))
        check(
            ids and tokenizer.unk_id not in ids,
            f"task.words has {word!r}, which the tokenizer doesn't know; choose another word",
        )
        check(
            ids not in found,
            f"task.words has {found.get(ids)!r} and {word!r}, which are the same tokens; choose others",
        )
        found[ids] = word
    return Pattern(tuple(pieces), tuple(np.asarray(ids, np.int32) for ids in found))


class PromptedExamples:
    """Documents with a class, each in a pattern with the word of every class: an example is several rows.

    A decoder reads `[bos] pattern` up to the word's place and then the word: a row for each class; what the pattern has
    behind the place is not read. An encoder reads `[CLS] pattern [SEP]` with a mask in place of each token of the word:
    one row for all classes, whose words have as many tokens.

    Before the pattern stand `shots` documents of the training split with their words, as many of each class as can be,
    drawn by `shot_seed`; they are no examples themselves. The texts, those shown and the one asked about, share the row
    evenly; one that is longer than its share loses its end (the one asked about may take what the others leave).

    Args:
      store: documents with labels; of a pair, with two parts.
      seq_len: T.
      pattern: in tokens.
      bos_id: the first token.
      eos_id: an encoder's last token.
      mask_id: an encoder's mask; None for a decoder.
      shots: documents that are shown.
      shot_seed: of their draw.
      separator: ids between documents that are shown.
      calibrate: add rows in which the text is empty.

    Raises:
      UserError: no labels, or one outside the classes; documents without two parts; no room for a text; too few
        documents to show; words of several lengths for an encoder.
    """

    def __init__(
        self,
        store: TokenStore,
        seq_len: int,
        pattern: Pattern,
        *,
        bos_id: int,
        eos_id: int,
        mask_id: int | None,
        shots: int = 0,
        shot_seed: int = 0,
        separator: Sequence[int] = (),
        calibrate: bool = False,
    ):
        self._store = store
        self._seq_len = seq_len
        self._pattern = pattern
        self._calibrate = calibrate
        n_classes = len(pattern.words)
        self._labels = labels_in(store, n_classes)
        longest = pattern.longest_word
        self._word_piece = pattern.place
        self._asks: list[np.ndarray | Slot] = []  # of the row's end: the pattern as the model is asked
        if mask_id is None:
            self._asks += pattern.pieces[: self._word_piece]
        else:
            lengths = sorted({len(word) for word in pattern.words})
            check(
                len(lengths) == 1,
                f"task.words have {' and '.join(map(str, lengths))} tokens, and the model fills in masks, one a token;"
                " choose words of the same length",
            )
            masks = np.full(longest, mask_id, np.int32)
            self._asks += [masks if isinstance(piece, str) and piece == "word" else piece for piece in pattern.pieces]
            self._asks.append(np.array([eos_id], np.int32))
        self._masked = mask_id is not None

        train = _training_split(store)
        shown = draw_shots(labels_in(train, n_classes), n_classes, shots, shot_seed)
        asked = sum(len(piece) for piece in self._asks if not isinstance(piece, str)) + longest * (not self._masked)
        of_pattern = sum(len(piece) for piece in pattern.pieces if not isinstance(piece, str))
        share = (seq_len - 1 - asked - shots * (of_pattern + longest + len(separator))) // (shots + 1)
        check(
            share >= 1,
            f"the pattern{f', {shots} times shown,' if shots else ''} leaves no room for a text in a row of {seq_len}"
            " (data.seq_len); raise it, shorten task.pattern or lower task.shots",
        )
        begin = [bos_id]
        for document in shown.tolist():
            begin += [*self._shown(train, document, share), *separator]
        self._begin = np.asarray(begin, np.int32)
        self._documents = np.arange(len(self._labels))
        if train is store:
            self._documents = np.setdiff1d(self._documents, shown)
            check(len(self._documents), f"all {shots} training documents are shown (task.shots); none is left")

        room = seq_len - len(begin) - asked
        self._texts = {slot: (starts, kept) for slot, (starts, kept, _) in self._ranges(store, room).items()}
        long = np.any([kept < length for _, kept, length in self._ranges(store, room).values()], axis=0)
        self.cut = int(long[self._documents].sum())

    def _ranges(self, store: TokenStore, room: int) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """By slot, of all documents: where its text starts, the tokens kept of it in so much room, and all it has."""
        if self._pattern.pair:
            (a_start, a), (b_start, b) = two_parts(store, "a pair of texts")
            a_kept, b_kept = shortened(a, b, room)
            return {"0": (a_start, a_kept, a), "1": (b_start, b_kept, b)}
        length = np.diff(store.document_offsets) - 1
        return {"text": (store.document_offsets[:-1], np.minimum(length, room), length)}

    def _shown(self, store: TokenStore, document: int, room: int) -> list[int]:
        """A document in its pattern, with its word, its text in so much room."""
        texts = self._ranges(store, room)
        ids: list[int] = []
        for piece in self._pattern.pieces:
            if not isinstance(piece, str):
                ids += piece.tolist()
            elif piece == "word":
                assert store.labels is not None
                ids += self._pattern.words[int(store.labels[document])].tolist()
            else:
                starts, kept, _ = texts[piece]
                ids += store.read(int(starts[document]), int(starts[document] + kept[document])).tolist()
        return ids

    def __len__(self) -> int:
        return len(self._documents)

    def batch(self, index: np.ndarray, epoch: np.ndarray | int = 0) -> Batch:
        """Examples of R rows: as many as classes for a decoder, one for an encoder, twice that to calibrate.

        Returns:
          `tokens`, `positions`, `segments` int32 [N, R, T]; `places` int32 [N, R, W], columns whose logits tell the
          word's tokens; `words` int32 [N, C, W] and `word_weights` float32 [N, C, W], the words and where they have
          tokens; `labels` int32 [N] and `label_weights` float32 [N].
        """
        index = check_index(index, len(self))
        used = index >= 0
        document = self._documents[np.maximum(index, 0)]
        N, T = len(index), self._seq_len
        C, W = len(self._pattern.words), self._pattern.longest_word
        rows, sizes, columns = [], [], []
        for blank in (False, True)[: 1 + self._calibrate]:
            pieces: list[Piece] = [self._begin]
            for piece in self._asks:
                if isinstance(piece, str):
                    starts, kept = self._texts[piece]
                    pieces.append((starts[document], kept[document] * (not blank)))
                else:
                    pieces.append(piece)
            tokens, ends = lay_out(self._store, used, T, pieces)
            if self._masked:
                rows.append(tokens)
                sizes.append(ends[-1])
                columns.append(ends[self._word_piece])
                continue
            for word in self._pattern.words:
                with_word = tokens.copy()
                with_word[np.arange(N)[used, None], ends[-1][used, None] + np.arange(len(word))] = word
                rows.append(with_word)
                sizes.append(ends[-1] + len(word) * used)
                columns.append(ends[-1] - 1)
        positions, segments = places(np.stack(sizes, axis=1).ravel(), T)
        words, word_weights = np.zeros((C, W), np.int32), np.zeros((C, W), np.float32)
        for c, word in enumerate(self._pattern.words):
            words[c, : len(word)], word_weights[c, : len(word)] = word, 1
        at = np.stack(columns, axis=1)[..., None] + np.arange(W)
        return {
            "tokens": np.stack(rows, axis=1),
            "positions": positions.reshape(N, -1, T),
            "segments": segments.reshape(N, -1, T),
            "places": np.clip(at, 0, T - 1).astype(np.int32),
            "words": np.tile(words, (N, 1, 1)),
            "word_weights": np.tile(word_weights, (N, 1, 1)),
            "labels": np.where(used, self._labels[document], 0).astype(np.int32),
            "label_weights": used.astype(np.float32),
        }

    def documents(self, index: int) -> np.ndarray:
        """The document that is asked about."""
        return self._documents[check_index(np.array([index]), len(self))]


def draw_shots(labels: np.ndarray, n_classes: int, shots: int, seed: int) -> np.ndarray:
    """Ordinals of documents to show, int64 [shots]: as many of each class as can be, drawn, in an order that is drawn.

    Raises:
      UserError: a class has too few documents.
    """
    draw = uniform(row_keys(seed, SHOTS, 0, np.arange(len(labels))), 2).T
    classes = np.argsort(uniform(row_keys(seed, SHOTS, 1, np.arange(n_classes)), 1)[:, 0], kind="stable")
    by_class = {c: np.flatnonzero(labels == c) for c in range(n_classes)}
    chosen: list[int] = []
    for number in range(shots):
        c, rank = int(classes[number % n_classes]), number // n_classes
        mine = by_class[c]
        if rank >= len(mine):
            raise UserError(
                f"task.shots is {shots}, but a class has only {len(mine)} training documents to show; lower it"
            )
        chosen.append(int(mine[np.argsort(draw[0][mine], kind="stable")[rank]]))
    found = np.asarray(chosen, np.int64)
    return found[np.argsort(draw[1][found], kind="stable")]


def _training_split(store: TokenStore) -> TokenStore:
    """Where documents that are shown come from; of a store in memory itself."""
    if isinstance(store, DatasetStore) and store.split != "train":
        return DatasetStore(store.directory, "train")
    return store
