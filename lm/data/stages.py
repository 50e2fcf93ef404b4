"""The stages of preparing a dataset, as tasks that any runner can run (`lm.data.runners`).

    ReadUnit            a unit of a source: read, clean, assign to a split, reduce each document to a few numbers
    FindExact, FindNear pairs of documents that say the same, from those numbers alone
    FindLines           lines that stood in an earlier document
    WriteShard          tokenise a run of the documents that are left, and write them as one shard

Between them lie files in a work folder (`lm.data.corpus`). Text crosses from one worker to another only through it;
deduplication moves hashes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lm.data.config import DataConfig
from lm.data.corpus import Corpus, UnitWriter, save_array, split_code
from lm.data.manifest import TOKENIZER_FOLDER
from lm.data.parts import (
    MOST_LABELS,
    PartCutter,
    as_one_text,
    asks_questions,
    classes_of,
    clean_messages,
    clean_parts,
    has_parts,
    is_chat,
    is_joined,
    split_messages,
)
from lm.data.runners import whole_file, whole_output
from lm.data.sources import Unit as SourceUnit
from lm.data.sources import open_source
from lm.data.sources.base import BAD_CHAT
from lm.data.statistics import Statistics
from lm.data.writer import DOCUMENT_COLUMNS, Shard, ShardWriter, shard_path
from lm.errors import UserError, check
from lm.text.augment import AugmentConfig, Augmenter
from lm.text.chat import Chat
from lm.text.clean import CleanConfig, Cleaner
from lm.text.dedup import (
    DedupConfig,
    band_keys,
    candidate_pairs,
    exact_hashes,
    first_of_equal,
    line_hashes,
    repeated_lines,
    signatures,
    similar,
    without_lines,
)
from lm.text.normalize import is_blank
from lm.text.template import ChatTemplate
from lm.text.tokenizer import load_tokenizer

REMOVED = 255
"""In `fate.npy`: the document goes to no split."""

_QUESTIONS_FILE, _TEXTS_FILE = "questions.jsonl", "texts.jsonl"
_BATCH_CHARACTERS = 1 << 20  # handled together; memory grows with this, not with the corpus
_PIECE_CHARACTERS = 1 << 15  # long documents are tokenised in such pieces, which spreads them over the cores


@dataclass(frozen=True)
class ReadUnit:
    """Reads and cleans one unit of a source."""

    output: Path
    size: int
    role: str
    form: str
    unit: SourceUnit
    data: DataConfig
    clean: CleanConfig
    dedup: DedupConfig
    template: ChatTemplate | None = None
    """What will write the conversations, where it is known already; those that it refuses are problems."""

    def __call__(self) -> None:
        """Makes a folder that `lm.data.corpus.Unit` reads."""
        source = open_source(self.form, self.data)
        cleaner = Cleaner(self.clean)
        joined, chat = is_joined(self.data), is_chat(self.data)
        cleaned = functools.partial(clean_messages if chat else clean_parts, cleaner) if joined else cleaner
        counts = {"read": 0, "empty": 0, "dropped": 0}
        keys: list[str] = []
        texts: list[str] = []
        splits: list[int] = []
        labels: list[int] = []
        kinds: dict[str, int] = {}  # of labels, in order of appearance; other units find others
        names: set[str] = set()
        spans: list[tuple[int, int]] = []
        answers: list[tuple[str, ...]] = []  # of all questions of the unit
        characters = 0

        def columns() -> dict[str, np.ndarray]:
            found = self._columns(texts, splits)
            if self.data.label_field is not None:
                found["label"] = np.asarray(labels, np.int32)
            if asks_questions(self.data):
                found["span"] = np.asarray(spans, np.int32).reshape(-1, 2)
            return found

        with whole_output(self.output) as folder:
            writer = UnitWriter(folder)
            try:
                for document in source.read(self.unit):
                    counts["read"] += 1
                    split = split_of(document.group or document.text, self.data) if self.role == "source" else self.role
                    text = cleaned(document.text)
                    if text is None:
                        counts["dropped"] += 1
                    elif text and self.template is not None and (why := _refused(self.template, text)):
                        counts["read"] -= 1
                        if self.data.on_error == "stop":
                            raise UserError(
                                f"{document.key}: {why}, or --data.on-error skip to leave such out and count them"
                            )
                        source.skipped.add(BAD_CHAT, f"{document.key}: {why}")
                    elif is_blank(text):
                        counts["empty"] += 1
                    else:
                        keys.append(document.key)
                        texts.append(text)
                        splits.append(split_code(split.removesuffix("_source")))
                        if document.label is not None:
                            labels.append(kinds.setdefault(document.label, len(kinds)))
                            names.update(classes_of(document.label, self.data))
                            self._check_label(document.label, len(names), document.key)
                        if document.span is not None:
                            spans.append(document.span)
                            answers.append(document.answers)
                        characters += len(text)
                    if characters >= _BATCH_CHARACTERS:
                        writer.add(keys, texts, columns())
                        keys, texts, splits, labels, spans, characters = [], [], [], [], [], 0
                writer.add(keys, texts, columns())
                writer.finish(
                    {
                        "role": self.role,
                        "counts": counts,
                        "labels": list(kinds),
                        "answers": answers,
                        "skipped": dataclasses.asdict(source.skipped),
                        "clean": cleaner.report.to_dict(),
                    }
                )
            finally:
                writer.close()

    def _check_label(self, label: str, count: int, key: str) -> None:
        given = self.data.labels
        for name in classes_of(label, self.data) if given else ():
            check(
                name in given,
                f"{key} has the class {name!r}, which data.labels does not name ({', '.join(given)}); add it there",
            )
        check(
            count <= MOST_LABELS,
            f"data.label_field {self.data.label_field!r} holds more than {MOST_LABELS:,} different values; "
            "name the column of the class",
        )

    def _columns(self, texts: list[str], splits: list[int]) -> dict[str, np.ndarray]:
        columns: dict[str, np.ndarray] = {"split": np.asarray(splits, np.uint8)}
        if self.dedup.exact:
            columns["exact"] = exact_hashes(texts)
        if self.dedup.near:
            columns["signature"] = signatures(texts, self.dedup)
            keys = band_keys(columns["signature"], self.dedup)
            # A column a band: who looks at one band reads nothing of the others.
            columns |= {band_column(band): keys[:, band] for band in range(keys.shape[1])}
        if self.dedup.lines:
            hashes = [line_hashes(text, self.dedup) for text in texts]
            columns["line_hash"] = np.concatenate([np.zeros(0, np.uint64), *(found for _, found in hashes)])
            columns["line_count"] = np.asarray([len(found) for _, found in hashes], np.int64)
            columns["line_solid"] = np.asarray(
                [sum(bool(line.strip()) for line in lines) for lines, _ in hashes], np.int64
            )
        return columns


def split_of(text: str, data: DataConfig) -> str:
    """The split of a document of `data.source`: "train", "validation" or "test".

    It depends on the text (as it was read) and the settings alone, so a document stays in its split when others come
    and go or cleaning changes, and copies of a document share one. Where documents have a group, its name stands for
    the text, so that no group straddles.
    """
    validation = 0.0 if data.validation_source is not None else data.validation_fraction
    test = 0.0 if data.test_source is not None else data.test_fraction
    digest = hashlib.blake2b(f"{data.split_seed}\0".encode(), digest_size=8)
    digest.update(text.encode("utf-8"))
    point = int.from_bytes(digest.digest(), "big") / 2**64
    if point < validation:
        return "validation"
    if point < validation + test:
        return "test"
    return "train"


@dataclass(frozen=True)
class _FindPairs:
    """Writes pairs of documents that say the same: int64 `[m, 2]`, ordinals, the one of lower rank first."""

    output: Path
    size: int
    units: Path
    ranks: Path
    """int64 .npy `[n]`: the rank of each document; of several that say the same the lowest stays."""
    part: int
    parts: int
    """Only keys with `key % parts == part` are looked at, which bounds the memory of one task."""

    def _mine(self, keys: np.ndarray) -> np.ndarray:
        """The ordinals whose key falls to this task."""
        if self.parts == 1:
            return np.arange(len(keys))
        return np.flatnonzero(keys % np.uint64(self.parts) == np.uint64(self.part))

    def _save(self, pairs: np.ndarray) -> None:
        with whole_file(self.output) as path:
            save_array(path, pairs)


@dataclass(frozen=True)
class FindExact(_FindPairs):
    """Documents equal after normalisation, each with the first of its kind."""

    def __call__(self) -> None:
        """See `_FindPairs`."""
        keys = Corpus(self.units).column("exact")
        ordinals = self._mine(keys)
        first = first_of_equal(keys[ordinals], np.load(self.ranks, mmap_mode="r")[ordinals])
        again = np.flatnonzero(first != np.arange(len(first)))
        self._save(np.stack([ordinals[first[again]], ordinals[again]], axis=1))


@dataclass(frozen=True)
class FindNear(_FindPairs):
    """Documents whose signatures agree in a band and are similar as a whole."""

    band: int
    dedup: DedupConfig
    exact: Path
    """bool .npy `[n]`: documents that `FindExact` found; they are left out, or each would meet all its equals here."""

    def __call__(self) -> None:
        """See `_FindPairs`."""
        corpus = Corpus(self.units)
        keys = corpus.column(band_column(self.band))
        ordinals = self._mine(keys)
        ordinals = ordinals[~np.load(self.exact, mmap_mode="r")[ordinals]]
        ranks = np.load(self.ranks, mmap_mode="r")
        order = np.argsort(ranks[ordinals])
        ordinals = ordinals[order]
        # Candidates are named by their place in the order of ranks, so that a pair's lower number is its lower rank.
        pairs = ordinals[candidate_pairs(keys[ordinals], np.arange(len(ordinals)), self.dedup.bucket_window)]
        rows: Any = _Rows(corpus, "signature")  # as good as the array it stands for
        self._save(pairs[similar(rows, pairs, self.dedup)])


def band_column(band: int) -> str:
    """The column of a band's keys."""
    return f"band_{band:03d}"


class _Rows:
    """A column of the whole corpus that is read where rows are asked for."""

    def __init__(self, corpus: Corpus, name: str):
        self._corpus = corpus
        self._name = name
        self.shape = (len(corpus), *next((unit.column(name).shape[1:] for unit in corpus.units if len(unit)), (0,)))

    def __getitem__(self, ordinals: np.ndarray) -> np.ndarray:
        return self._corpus.rows(self._name, ordinals)


@dataclass(frozen=True)
class FindLines(_FindPairs):
    """Lines that stand in a document of lower rank: int64 `[m]`, numbers of lines over the whole corpus."""

    fate: Path

    def __call__(self) -> None:
        """Writes the numbers, ascending."""
        corpus = Corpus(self.units)
        hashes = corpus.column("line_hash")
        lines = self._mine(hashes)
        lines = lines[hashes[lines] != 0]
        owner = np.repeat(np.arange(len(corpus)), corpus.column("line_count"))[lines]
        kept = np.load(self.fate)[owner] != REMOVED  # a document that goes takes no line from another
        lines, owner = lines[kept], owner[kept]
        again = repeated_lines(hashes[lines], np.load(self.ranks, mmap_mode="r")[owner])
        self._save(lines[again])


class DroppedLines:
    """Which lines of which document go, from what `FindLines` found."""

    def __init__(self, corpus: Corpus, files: Sequence[Path]):
        self._files = [np.load(file, mmap_mode="r") for file in files]
        self._corpus = corpus
        lines = [int(unit.column("line_count").sum()) for unit in corpus.units]
        self._offsets = np.cumsum([0, *lines])
        self._unit = -1
        self._mask = np.zeros(0, bool)
        self._ends = np.zeros(0, np.int64)

    def mask(self, ordinal: int) -> np.ndarray:
        """Bool `[lines of the document]`: True = goes."""
        number = int(np.searchsorted(self._corpus.offsets, ordinal, side="right")) - 1
        if number != self._unit:
            self._mask, self._ends = self._of_unit(number)
            self._unit = number
        i = ordinal - int(self._corpus.offsets[number])
        return self._mask[self._ends[i - 1] if i else 0 : self._ends[i]]

    def _of_unit(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        low, high = int(self._offsets[number]), int(self._offsets[number + 1])
        mask = np.zeros(high - low, bool)
        for lines in self._files:
            begin, end = np.searchsorted(lines, [low, high])
            mask[lines[begin:end] - low] = True
        return mask, np.cumsum(self._corpus.units[number].column("line_count").astype(np.int64))

    def emptied(self) -> Iterator[tuple[int, np.ndarray, int]]:
        """For each unit: its first ordinal, bool `[documents]` = no line but blank ones is left, and the lines gone."""
        for number, unit in enumerate(self._corpus.units):
            mask, ends = self._of_unit(number)
            gone = np.diff(np.concatenate([[0], np.cumsum(mask)])[np.concatenate([[0], ends])])
            yield int(self._corpus.offsets[number]), (gone > 0) & (gone >= unit.column("line_solid")), int(mask.sum())


@dataclass(frozen=True)
class WriteShard:
    """Tokenises the documents of one split among ordinals `[first, last)` and writes them as one shard."""

    output: Path
    """A folder: shard.json, statistics.json, token_counts.npy, lengths, what answers questions, and texts."""
    size: int
    units: Path
    fate: Path
    dropped_lines: tuple[Path, ...]
    dataset: Path
    name: str
    split: str
    number: int
    count: int
    first: int
    last: int
    dedup: DedupConfig
    augment: AugmentConfig
    data: DataConfig
    labels: tuple[str, ...]
    """All classes, in order of id."""

    def __call__(self) -> None:
        """See the class."""
        cut = PartCutter(self.data) if has_parts(self.data) else None
        joined, asks, chats = is_joined(self.data), asks_questions(self.data), is_chat(self.data)
        keeps_texts = bool(cut) and joined and not asks and not chats and self.split != "train"
        tokenizer = load_tokenizer(self.dataset / TOKENIZER_FOLDER)
        chat = Chat(tokenizer) if chats else None
        statistics = Statistics()
        token_counts = np.zeros(tokenizer.vocab_size, np.int64)
        batch: list[_Piece] = []
        characters = 0
        with whole_output(self.output) as folder:
            shard_file = folder / "shard"
            lengths = folder / "lengths"
            with (
                ShardWriter(shard_file, lengths, eos_id=tokenizer.eos_id) as writer,
                _lines(folder / _QUESTIONS_FILE, asks) as add_question,
                _lines(folder / _TEXTS_FILE, keeps_texts) as add_texts,
            ):

                def encode() -> None:
                    encoded = iter(tokenizer.encode_batch([piece.text for piece in batch if piece.ids is None]))
                    for piece in batch:
                        ids = next(encoded) if piece.ids is None else piece.ids
                        tokens = np.asarray(ids, np.int64)
                        np.add(token_counts, np.bincount(tokens, minlength=len(token_counts)), out=token_counts)
                        size = len(piece.text.encode("utf-8"))
                        key, last, begins = piece.key, piece.last, piece.begins_part
                        writer.add(key, ids, size, last, begins_part=begins, label=piece.label, span=piece.span)
                    batch.clear()

                for key, text, label, question in self._documents():
                    statistics.add(as_one_text(text, chat=chats) if joined else text)
                    if chat is not None:
                        batch.extend(_chat_pieces(chat, key, text, label))
                        characters += len(text)
                        if characters >= _BATCH_CHARACTERS:
                            encode()
                            characters = 0
                        continue
                    texts = cut(text) if cut else [text]
                    span = None
                    if question is not None:
                        span, answers = question
                        add_question({"words": texts[1:], "answers": answers})
                    add_texts(texts)
                    parts = [list(tokenizer.pieces(part, _PIECE_CHARACTERS)) for part in texts]
                    pieces = [(piece, not number) for part in parts for number, piece in enumerate(part)]
                    for number, (piece, begins) in enumerate(pieces, 1):
                        batch.append(_Piece(key, piece, number == len(pieces), begins and cut is not None, label, span))
                        characters += len(piece)
                        if characters >= _BATCH_CHARACTERS:
                            encode()
                            characters = 0
                encode()
                shard = writer.finish()
            save_array(folder / "token_counts.npy", token_counts)
            (folder / "statistics.json").write_text(json.dumps(statistics.to_dict(), ensure_ascii=False), "utf-8")
            fields = {name: value for name, value in dataclasses.asdict(shard).items() if not isinstance(value, Path)}
            (folder / "shard.json").write_text(json.dumps(fields), encoding="utf-8")
            # The shard itself moves to where TFDS looks for it; the folder that says it is done follows.
            target = shard_path(self.dataset, self.name, self.split, self.number, self.count)
            shard_file.replace(target)

    def _documents(self) -> Iterator[tuple[str, str, _Label | None, _Question | None]]:
        """Key, text, label, and span and answers of the documents to write, copies included."""
        corpus = Corpus(self.units)
        fate = np.load(self.fate, mmap_mode="r")
        mine = split_code(self.split)
        dropped = DroppedLines(corpus, self.dropped_lines) if self.dropped_lines else None
        # Never on validation or test.
        augmenter = Augmenter(self.augment) if self.augment.copies and self.split == "train" else None
        for ordinal, key, text in corpus.documents(self.first, self.last):
            if fate[ordinal] != mine:
                continue
            if dropped is not None and (gone := dropped.mask(ordinal)).any():
                lines, _ = line_hashes(text, self.dedup)
                text = without_lines(lines, gone)
            label = self._label(corpus, ordinal) if self.data.label_field is not None else None
            yield key, text, label, self._question(corpus, ordinal) if asks_questions(self.data) else None
            if augmenter is not None:
                for number, copy in enumerate(augmenter(text, key), 1):
                    yield f"{key}#{number}", copy, label, None

    def _label(self, corpus: Corpus, ordinal: int) -> _Label:
        unit, number = corpus.locate(ordinal)
        names = classes_of(unit.summary["labels"][unit.column("label")[number]], self.data)
        for name in names:
            check(
                name in self._ids,
                f"the {self.split} split has the class {name!r}, which the training split lacks; "
                "name all classes in data.labels",
            )
        if self.data.label_separator is None:
            return self._ids[names[0]]
        bits = np.zeros(len(self.labels), np.uint8)
        bits[[self._ids[name] for name in names]] = 1
        return np.packbits(bits)

    @functools.cached_property
    def _ids(self) -> dict[str, int]:
        """The id of each class."""
        return {name: number for number, name in enumerate(self.labels)}

    def _question(self, corpus: Corpus, ordinal: int) -> _Question:
        unit, number = corpus.locate(ordinal)
        first, last = unit.column("span")[number].tolist()
        return (first, last), unit.summary["answers"][number]


_Label = int | np.ndarray
"""The class of a document, or where it may have several a bit for each there is, as in the index."""
_Question = tuple[tuple[int, int], list[str]]
"""The span and the answers of a document."""


class _Piece(NamedTuple):
    """Text that is tokenised at once."""

    key: str
    text: str
    last: bool
    begins_part: bool
    label: _Label | None
    span: tuple[int, int] | None
    ids: list[int] | None = None
    """Its tokens, where they are known already."""


def _chat_pieces(chat: Chat, key: str, text: str, label: _Label | None) -> list[_Piece]:
    """The parts of a conversation: what is read and what is answered, in turn."""
    try:
        parts = chat.conversation(split_messages(text))
    except UserError as error:
        raise UserError(f"{key}: {error}") from None
    # The bytes of all that is said count where it ends; what the template adds is nobody's text.
    said = [""] * (len(parts) - 1) + [as_one_text(text, chat=True)]
    last = len(parts) - 1
    return [_Piece(key, said[i], i == last, True, label, None, ids) for i, ids in enumerate(parts)]


def _refused(template: ChatTemplate, text: str) -> str | None:
    """Why a template doesn't write a conversation; None if it does."""
    try:
        template.turns(split_messages(text))
    except UserError as error:
        return str(error)
    return None


@contextlib.contextmanager
def _lines(path: Path, wanted: bool) -> Iterator[Callable[[Any], object]]:
    """What adds an object, as a line of JSON, to a file; where the file isn't wanted, it does nothing."""
    if not wanted:
        yield lambda value: None
        return
    with path.open("w", encoding="utf-8") as file:
        yield lambda value: file.write(json.dumps(value, ensure_ascii=False) + "\n")


def read_shard(output: Path) -> tuple[Shard, dict[str, Any], np.ndarray]:
    """What `WriteShard` left in its folder: the shard, its statistics, and int64 `[vocab_size]` token counts."""
    fields = json.loads((output / "shard.json").read_text(encoding="utf-8"))
    files = {"record_lengths": output / "lengths.records.npy", "document_lengths": output / "lengths.documents.npy"}
    for name in DOCUMENT_COLUMNS:
        path = output / f"lengths.{name}.npy"
        if path.exists():
            files[name] = path
    for name, file in (("questions", _QUESTIONS_FILE), ("texts", _TEXTS_FILE)):
        if (output / file).exists():
            files[name] = output / file
    shard = Shard(**fields | files)
    statistics = json.loads((output / "statistics.json").read_text(encoding="utf-8"))
    return shard, statistics, np.load(output / "token_counts.npy")
