"""A prepared dataset in formats that other programs read: `jsonl.zst`, and TFRecord files of `tf.train.Example`.

An export is a folder: data files for each split, documents in their order, and `manifest.json` (`ExportManifest`). It
appears under its name only when all of it is on disk (`lm.data.atomic`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lm.data.atomic import whole_folder
from lm.data.manifest import MANIFEST_FILE, TOKENIZER_FOLDER, Manifest, SourceFile, load_manifest
from lm.data.sources import fingerprint_file
from lm.data.store import DatasetStore, part_texts
from lm.errors import UserError, check, require
from lm.text.tokenizer import Tokenizer, load_tokenizer

Progress = Callable[[int, int], None]
"""Called now and then with the documents that are written, and how many there are."""

_READ_TOKENS = 1 << 20  # read together; memory grows with this and with the longest document
_SHARD_BYTES = 256 << 20  # of tokens and text in one TFRecord file
# What tokenizers are known to change: case, spaces, line ends, accents, wide letters, rare characters, special tokens.
_PROBE = " Ab  cD\n\n\tx é e\u0301 ﬁ ｗｉｄｅ① 漢字简体，。龘 😀\u200d don't 3.14 <unk> [UNK] </s> ẞ\r\n "


@dataclass(frozen=True, kw_only=True)
class ExportedSplit:
    """One split of an export."""

    documents: int
    """Documents written."""
    tokens: int
    """Their tokens in the dataset, one end-of-document token a document included."""
    bytes: int
    """UTF-8 bytes of the texts written."""
    prepared_bytes: int
    """UTF-8 bytes of the texts that the dataset was made of."""


@dataclass(frozen=True, kw_only=True)
class ExportManifest:
    """The content of an export's `manifest.json`."""

    format: str
    """jsonl.zst or tfrecord."""
    exact: bool
    """Whether the texts are those that were tokenised, byte for byte. Tokenizers that change case, spaces or rare
    characters cannot give them back."""
    splits: dict[str, ExportedSplit]
    """What was written."""
    files: list[SourceFile]
    """The data files, with size and hash."""
    dataset: dict[str, Any]
    """The dataset's own manifest (`lm.data.manifest.Manifest`) but for its files: the sources with their hashes, the
    settings and rules that shaped it, counts, and the licence note."""


def export_jsonl_zst(
    dataset: Path, output: Path, *, splits: Sequence[str] | None = None, progress: Progress | None = None
) -> ExportManifest:
    """Writes `SPLIT.jsonl.zst`: an object a line with the document's `text` and `key`, compressed by Zstandard.

    Where documents have them, an object also holds `parts`, a list of texts, `label`, the name of a class (a list of
    them where documents may have several), and `answers`, a list of the right answers to a question.

    Args:
      dataset: folder of a prepared dataset.
      output: the folder to make.
      splits: which splits; all by default.
      progress: told how far things are.

    Returns:
      What is written to `manifest.json`.

    Raises:
      UserError: if `output` is there, a split is not, the package zstandard is missing, or the disk cannot be written.
    """
    zstandard = require("zstandard", extra="text", need="export to jsonl.zst")

    @contextlib.contextmanager
    def writer(stem: Path) -> Iterator[Callable[[_Exported], None]]:
        # A checksum, so that damage shows.
        compressor = zstandard.ZstdCompressor(level=9, write_checksum=True)
        with stem.with_name(f"{stem.name}.jsonl.zst").open("wb") as file, compressor.stream_writer(file) as stream:

            def write(document: _Exported) -> None:
                line = json.dumps(document.described(), ensure_ascii=False)
                stream.write(line.encode("utf-8") + b"\n")

            yield write

    return _export("jsonl.zst", dataset, output, splits, progress, writer)


def export_tfrecord(
    dataset: Path, output: Path, *, splits: Sequence[str] | None = None, progress: Progress | None = None
) -> ExportManifest:
    """Writes `SPLIT-00000-of-00001.tfrecord` …: one `tf.train.Example` a document.

    Its features are `tokens` (int64, the end-of-document token included), and as bytes in UTF-8 `text`, `key` and,
    where documents have them, `parts`, `label` and `answers`. Arguments, result and errors are those of
    `export_jsonl_zst`, but that it takes the package tensorflow.
    """
    tf = require("tensorflow", extra="tfrecord", need="export to TFRecord")

    @contextlib.contextmanager
    def writer(stem: Path) -> Iterator[Callable[[_Exported], None]]:
        shards = _Shards(tf, stem)
        try:
            yield shards.write
        finally:
            shards.close()
        shards.rename()

    try:
        return _export("tfrecord", dataset, output, splits, progress, writer)
    except tf.errors.OpError as error:
        raise _cannot_write(output, " ".join(error.message.split())) from None


class _Exported(NamedTuple):
    """A document on its way out."""

    key: str
    text: str
    tokens: np.ndarray
    parts: list[str] | None
    label: str | list[str] | None
    answers: Sequence[str] | None

    def described(self) -> dict[str, Any]:
        """Its texts, key, class and answers, JSON-ready."""
        more = {"parts": self.parts, "label": self.label, "answers": self.answers}
        return {"text": self.text, "key": self.key} | {name: value for name, value in more.items() if value is not None}


_Writer = Callable[[Path], contextlib.AbstractContextManager[Callable[[_Exported], None]]]
"""Given a path to begin file names with, opens what one split is written to."""


def _export(
    form: str,
    dataset: Path,
    output: Path,
    splits: Sequence[str] | None,
    progress: Progress | None,
    writer: _Writer,
) -> ExportManifest:
    manifest = load_manifest(dataset)
    chosen = list(manifest.splits) if splits is None else list(splits)
    check(chosen, "no split is named; leave splits out for all")
    for split in chosen:
        check(
            split in manifest.splits, f"there is no split {split!r} in {dataset}; it has {', '.join(manifest.splits)}"
        )
    tokenizer = load_tokenizer(dataset / TOKENIZER_FOLDER)
    output = output.expanduser().absolute()
    check(not output.exists(), f"{output} is there already; name another folder or remove it")
    report = progress or (lambda done, total: None)
    try:
        with whole_folder(output, lambda: None) as folder:
            if folder is None:
                raise UserError(f"{output} was made by another process just now; name another folder")
            return _write(folder, form, manifest, dataset, chosen, tokenizer, report, writer)
    except OSError as error:
        raise _cannot_write(output, error.strerror or " ".join(str(error).split())) from error


def check_export(folder: Path) -> None:
    """Raises `UserError` unless the export in `folder` is whole: its manifest, and every file of the size it names."""
    path = folder / MANIFEST_FILE
    try:
        sizes = {file["path"]: file["bytes"] for file in json.loads(path.read_text(encoding="utf-8"))["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{folder} is there, but no export: {MANIFEST_FILE} cannot be read; remove the folder"
        ) from None
    for name, size in sizes.items():
        file = folder / name
        check(
            file.is_file() and file.stat().st_size == size,
            f"the export in {folder} is damaged: {name} is not there in full; remove the folder and export again",
        )


def _write(
    folder: Path,
    form: str,
    manifest: Manifest,
    dataset: Path,
    splits: Sequence[str],
    tokenizer: Tokenizer,
    report: Progress,
    writer: _Writer,
) -> ExportManifest:
    total = sum(manifest.splits[split].documents for split in splits)
    done = 0
    written: dict[str, ExportedSplit] = {}
    for split in splits:
        store = DatasetStore(dataset, split, cache_tokens=0)
        text_bytes = 0
        with writer(folder / split) as write:
            for document in _documents(store, tokenizer, manifest.labels):
                write(document)
                text_bytes += len(document.text.encode("utf-8"))
                done += 1
                if done % 1000 == 0:
                    report(done, total)
        counts = manifest.splits[split]
        written[split] = ExportedSplit(
            documents=counts.documents, tokens=counts.tokens, bytes=text_bytes, prepared_bytes=counts.bytes
        )
    report(total, total)
    described = dataclasses.asdict(manifest)
    del described["files"]
    exported = ExportManifest(
        format=form,
        exact=_gives_back(tokenizer) and all(split.bytes == split.prepared_bytes for split in written.values()),
        splits=written,
        files=[fingerprint_file(path.name, path) for path in sorted(folder.iterdir())],
        dataset=described,
    )
    text = json.dumps(dataclasses.asdict(exported), indent=1, ensure_ascii=False)
    (folder / MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")
    return exported


def _documents(store: DatasetStore, tokenizer: Tokenizer, labels: Sequence[str]) -> Iterator[_Exported]:
    """The documents of a split in order."""
    offsets = store.document_offsets
    first, count = 0, len(offsets) - 1
    while first < count:
        # As many whole documents as fit, and one at least.
        last = max(int(np.searchsorted(offsets, offsets[first] + _READ_TOKENS, side="right")) - 1, first + 1)
        tokens = store.read(int(offsets[first]), int(offsets[last]))
        for document in range(first, last):
            begin, end = offsets[document] - offsets[first], offsets[document + 1] - offsets[first]
            ids = tokens[begin:end]
            label = None
            answers = None if store.spans is None else store.questions[document].answers
            parts = None if store.part_starts is None else part_texts(store, document, tokenizer.decode)
            if store.labels is not None:
                label = _named(store.labels[document], labels)
            text = tokenizer.decode(ids[:-1].tolist())
            yield _Exported(store.document_key(document), text, ids, parts, label, answers)
        first = last


def _named(label: np.ndarray, names: Sequence[str]) -> str | list[str]:
    """The class of a document, or all of its classes."""
    if not label.ndim:
        return names[int(label)]
    return [names[i] for i in np.flatnonzero(np.unpackbits(label, count=len(names))).tolist()]


def _gives_back(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer gives back a text that is full of what tokenizers change."""
    return tokenizer.decode(tokenizer.encode(_PROBE)) == _PROBE


class _Shards:
    """TFRecord files, each begun when the one before is full; one at least."""

    def __init__(self, tf: Any, stem: Path):
        self._tf = tf
        self._stem = stem
        self._paths: list[Path] = []
        self._begin()

    def _begin(self) -> None:
        self._paths.append(self._stem.with_name(f"{self._stem.name}-{len(self._paths):05d}"))
        self._file = self._tf.io.TFRecordWriter(str(self._paths[-1]))
        self._bytes = 0

    def write(self, document: _Exported) -> None:
        """Appends a `tf.train.Example`."""
        train = self._tf.train
        feature = {}
        for name, value in document.described().items():
            texts = [value] if isinstance(value, str) else value
            feature[name] = train.Feature(bytes_list=train.BytesList(value=[text.encode("utf-8") for text in texts]))
        feature["tokens"] = train.Feature(int64_list=train.Int64List(value=document.tokens.tolist()))
        example = train.Example(features=train.Features(feature=feature)).SerializeToString(deterministic=True)
        if self._bytes and self._bytes + len(example) > _SHARD_BYTES:
            self.close()
            self._begin()
        self._file.write(example)
        self._bytes += len(example)

    def close(self) -> None:
        """Closes the file at hand."""
        self._file.close()

    def rename(self) -> None:
        """Gives the files their names, which say how many there are."""
        for path in self._paths:
            path.rename(path.with_name(f"{path.name}-of-{len(self._paths):05d}.tfrecord"))


def _cannot_write(output: Path, reason: str) -> UserError:
    return UserError(f"cannot write the export in {output}: {reason}; free space or name another folder")
