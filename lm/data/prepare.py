"""Text to a tokenised dataset on disk, in TFDS's ArrayRecord format (`lm.data.manifest` describes the folder).

The documents stream by twice: once to train the tokenizer, once to be encoded and written; memory does not grow with
the corpus. The dataset appears under its name only when all of it is on disk (`lm.data.atomic`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lm.data.atomic import whole_folder
from lm.data.config import DataConfig
from lm.data.manifest import (
    DATASET_VERSION,
    FORMAT_VERSION,
    TOKENIZER_FOLDER,
    Manifest,
    SourceFile,
    SplitCounts,
    load_manifest,
    save_manifest,
)
from lm.data.sources import Document, Source, fingerprint_file, open_source
from lm.data.writer import DatasetWriter
from lm.errors import UserError, check
from lm.text.tokenizer import Tokenizer, TokenizerConfig, check_tokenizer_config, is_trained, train_tokenizer

Progress = Callable[[str, int, int | None], None]
"""Called now and then with a phase ("fingerprint", "wait", "train tokenizer", "tokenize"), what is done and the
total; both in bytes, the total None where nobody knows it."""

_BATCH_CHARACTERS = 1 << 20  # encoded together; memory grows with this, not with the corpus
_PIECE_CHARACTERS = 1 << 15  # long documents are cut so, which spreads them over the cores
# The settings that shape a dataset; the others of DataConfig are about reading it.
_SHAPING = (
    "source",
    "validation_source",
    "test_source",
    "document",
    "field",
    "validation_fraction",
    "test_fraction",
    "split_seed",
)


def prepare(
    data: DataConfig, tokenizer: TokenizerConfig, progress: Progress | None = None, *, min_tokens: int = 1
) -> Path:
    """Makes sure that the dataset these settings describe is on disk.

    Args:
      data: where text comes from, how it is split, and where datasets live (`root`, `name`).
      tokenizer: which tokenizer; trained kinds learn from the training split.
      progress: told how far things are.
      min_tokens: a new dataset whose training split has fewer is refused and not left behind.

    Returns:
      Its folder, `root/name/FINGERPRINT/1.0.0`. The fingerprint covers the settings that shape the dataset and the
      content of the source files, so that the same text and settings find the folder of last time, and any change
      makes a new one.

    Raises:
      UserError: for settings or text that cannot be used, an empty training split, or a disk that cannot be written.
    """
    report = progress or (lambda phase, done, total: None)
    _check_settings(data, tokenizer)
    sources = {
        role: open_source(form, data)
        for role in ("source", "validation_source", "test_source")
        if (form := getattr(data, role)) is not None
    }
    seen = _modified(sources)
    files = _fingerprint_sources(sources, report)
    # A tokenizer that is brought along shapes the dataset as much as the text does.
    brought = None if is_trained(tokenizer) else train_tokenizer(tokenizer, ())
    fingerprint = _fingerprint(data, tokenizer, brought, files)

    folder = Path(data.root).expanduser() / data.name / fingerprint / DATASET_VERSION
    if folder.exists():
        load_manifest(folder)
        return folder
    try:
        with whole_folder(folder, lambda: report("wait", 0, None)) as building:
            if building is not None:
                _build(building, data, tokenizer, brought, sources, files, fingerprint, report, min_tokens)
                _check_unchanged(seen, _modified(sources))
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        raise UserError(f"cannot write the dataset in {folder}: {reason}; free space or set data.root") from error
    return folder


def split_of(text: str, data: DataConfig) -> str:
    """The split of a document of `data.source`: "train", "validation" or "test".

    It depends on the text and the settings alone, so a document stays in its split when others come and go, and
    copies of a document share one.
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


def _check_settings(data: DataConfig, tokenizer: TokenizerConfig) -> None:
    check_tokenizer_config(tokenizer)
    check(
        re.fullmatch(r"[a-z][a-z0-9_]*", data.name),
        f"data.name is {data.name!r}; use lower-case letters, digits and _, and start with a letter",
    )
    check(
        data.document in ("file", "paragraph", "line"),
        f"data.document is {data.document!r}; choose file, paragraph or line",
    )
    validation, test = data.validation_fraction, data.test_fraction
    check(
        validation >= 0 and test >= 0 and validation + test < 1,
        f"data.validation_fraction is {validation} and data.test_fraction {test}; "
        "both must be at least 0 and their sum below 1",
    )


def _fingerprint_sources(sources: dict[str, Source], report: Progress) -> dict[str, list[SourceFile]]:
    found = {role: source.files() for role, source in sources.items()}
    total = sum(_size(path) for files in found.values() for _, path in files)
    done = 0
    fingerprints: dict[str, list[SourceFile]] = {}
    for role, files in found.items():
        fingerprints[role] = []
        for key, path in files:
            fingerprints[role].append(fingerprint_file(key, path))
            done += fingerprints[role][-1].bytes
            report("fingerprint", done, total)
    return fingerprints


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _modified(sources: dict[str, Source]) -> dict[Path, int]:
    """When each source file was last written, in nanoseconds; -1 if it is gone."""
    paths = [path for source in sources.values() for _, path in source.files()]
    return {path: path.stat().st_mtime_ns if path.exists() else -1 for path in paths}


def _check_unchanged(before: dict[Path, int], after: dict[Path, int]) -> None:
    for path, modified in before.items():
        check(after.get(path) == modified, f"{path} changed while it was read; run prepare again")


def _fingerprint(
    data: DataConfig, tokenizer: TokenizerConfig, brought: Tokenizer | None, files: dict[str, list[SourceFile]]
) -> str:
    """12 hex digits over what shapes the dataset; settings without effect are left out."""
    forms = {role: getattr(data, role).partition(":")[0] for role in files}
    shape: dict[str, Any] = {
        "format": FORMAT_VERSION,
        "forms": forms,
        "files": {role: [dataclasses.astuple(file) for file in listed] for role, listed in files.items()},
    }
    if "text" in forms.values():
        shape["document"] = data.document
    if {"jsonl", "tfds"}.intersection(forms.values()):
        shape["field"] = data.field
    shape["held_out"] = [
        data.validation_fraction if data.validation_source is None else 0,
        data.test_fraction if data.test_source is None else 0,
    ]
    if any(shape["held_out"]):
        shape["split_seed"] = data.split_seed
    shape["tokenizer"] = brought.fingerprint() if brought else dataclasses.asdict(tokenizer)
    return hashlib.blake2b(json.dumps(shape, sort_keys=True).encode("utf-8"), digest_size=6).hexdigest()


def _build(
    folder: Path,
    data: DataConfig,
    tokenizer_config: TokenizerConfig,
    brought: Tokenizer | None,
    sources: dict[str, Source],
    files: dict[str, list[SourceFile]],
    fingerprint: str,
    report: Progress,
    min_tokens: int,
) -> None:
    """Writes the whole dataset into `folder`, an empty folder."""
    tokenizer = brought or train_tokenizer(tokenizer_config, _training_texts(data, tokenizer_config, sources, report))
    tokenizer.save(folder / TOKENIZER_FOLDER)

    total = sum(file.bytes for listed in files.values() for file in listed)
    skipped = 0
    batch: list[_Piece] = []
    batch_characters = 0
    with DatasetWriter(folder, data.name, tokenizer.eos_id) as writer:
        for split, document in _split_documents(sources, data):
            if _is_empty(document):
                skipped += 1
                continue
            pieces = list(tokenizer.pieces(document.text, _PIECE_CHARACTERS))
            for number, text in enumerate(pieces, 1):
                batch.append(_Piece(split, document.key, text, number == len(pieces)))
                batch_characters += len(text)
                if batch_characters >= _BATCH_CHARACTERS:
                    _encode(batch, tokenizer, writer)
                    batch, batch_characters = [], 0
                    report("tokenize", sum(source.bytes_read for source in sources.values()), total)
        _encode(batch, tokenizer, writer)
        splits = writer.finish()
    report("tokenize", total, total)
    _check_splits(splits, skipped, data)
    tokens = splits["train"].tokens
    check(
        tokens >= min_tokens,
        f"the training split has {tokens} tokens, fewer than the {min_tokens} that one sequence takes (data.seq_len "
        f"{data.seq_len}); lower data.seq_len or add text",
    )

    manifest = Manifest(
        name=data.name,
        format_version=FORMAT_VERSION,
        fingerprint=fingerprint,
        settings={
            "data": {name: getattr(data, name) for name in _SHAPING},
            "tokenizer": dataclasses.asdict(tokenizer_config),
        },
        splits=splits,
        skipped_documents=skipped,
        sources=files,
        tokenizer_fingerprint=tokenizer.fingerprint(),
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        files={path.relative_to(folder).as_posix(): path.stat().st_size for path in _files_below(folder)},
    )
    save_manifest(manifest, folder)


class _Piece(NamedTuple):
    """A document, or a part of a long one, on its way to the tokenizer."""

    split: str
    key: str
    text: str
    last: bool


def _encode(batch: list[_Piece], tokenizer: Tokenizer, writer: DatasetWriter) -> None:
    for piece, ids in zip(batch, tokenizer.encode_batch([piece.text for piece in batch])):
        writer.add(piece.split, piece.key, ids, len(piece.text.encode("utf-8")), piece.last)


def _split_documents(sources: dict[str, Source], data: DataConfig) -> Iterator[tuple[str, Document]]:
    for document in sources["source"].documents():
        yield split_of(document.text, data), document
    for split in ("validation", "test"):
        if (source := sources.get(f"{split}_source")) is not None:
            for document in source.documents():
                yield split, document


def _training_texts(
    data: DataConfig, tokenizer: TokenizerConfig, sources: dict[str, Source], report: Progress
) -> Iterator[str]:
    source = {"source": sources["source"]}
    done = 0
    for split, document in _split_documents(source, data):
        if split == "train" and not _is_empty(document):
            yield document.text
            done += len(document.text.encode("utf-8"))
            report("train tokenizer", done, tokenizer.training_bytes)


def _is_empty(document: Document) -> bool:
    return not document.text or document.text.isspace()


def _check_splits(splits: dict[str, SplitCounts], skipped: int, data: DataConfig) -> None:
    if "train" not in splits:
        held_out = sum(counts.documents for split, counts in splits.items() if data.validation_source is None)
        if held_out:
            raise UserError(
                f"the training split is empty: the {held_out} documents of data.source {data.source!r} were all held "
                "out; make more documents (data.document) or lower data.validation_fraction and data.test_fraction"
            )
        raise UserError(f"data.source {data.source!r} holds no text ({skipped} empty documents); name another source")
    for split in ("validation", "test"):
        source = getattr(data, f"{split}_source")
        check(
            source is None or split in splits,
            f"data.{split}_source {source!r} holds no text; name another source or leave it out",
        )


def _files_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
