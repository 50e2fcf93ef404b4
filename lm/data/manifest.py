"""What a prepared dataset says about itself, and where its files are.

A dataset is one folder, `ROOT/NAME/FINGERPRINT/1.0.0`, that TFDS reads as it stands (`dataset_info.json`,
`features.json`, ArrayRecord shards). Beside those files lie

- `manifest.json`, a `Manifest`: counts, settings and the fingerprints of what was read;
- `report.json`, what was read, changed, dropped and found twice, and counts over the text (`lm.data.prepare`);
- `tokenizer/`, for `lm.text.tokenizer.load_tokenizer`;
- `index/SPLIT.records.npy`, int64 `[records + 1]`: the tokens before each record, and their total at the end;
- `index/SPLIT.documents.npy`, int64 `[documents + 1]`: the tokens before each document, and their total;
- where documents have parts, `index/SPLIT.part_starts.npy`, int64 `[parts]`: the tokens before each part, and
  `index/SPLIT.part_offsets.npy`, int64 `[documents + 1]`: the parts before each document, and their total;
- where documents have classes, `index/SPLIT.labels.npy`, int32 `[documents]`; where each may have several, uint8
  `[documents, ceil(classes / 8)]`, a bit a class (`numpy.packbits`);
- where documents are questions, `index/SPLIT.spans.npy`, int32 `[documents, 2]`, the first and the last part of the
  answer (-1 and -1 if there is none), and `index/SPLIT.questions.jsonl`, an object a document with the text's `words`
  and all right `answers` as they were read, whatever the tokenizer makes of them;
- where documents have columns, `index/SPLIT.texts.jsonl` of the validation and the test split: a list a document, its
  parts as they went to the tokenizer, which may have lost something of them.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm.errors import UserError, check

FORMAT_VERSION = 3
"""Raised whenever the bytes of a dataset change for the same settings and sources."""
DATASET_VERSION = "1.0.0"
MANIFEST_FILE = "manifest.json"
TOKENIZER_FOLDER = "tokenizer"
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, kw_only=True)
class SplitCounts:
    """The size of one split."""

    documents: int
    """Documents written."""
    records: int
    """ArrayRecord records; a long document takes several."""
    tokens: int
    """Tokens, one end-of-document token per document included."""
    bytes: int
    """UTF-8 bytes of the documents' text."""


@dataclass(frozen=True, kw_only=True)
class SourceFile:
    """One file that was read."""

    path: str
    """Path below the folder that the source names, with forward slashes."""
    bytes: int
    """Size on disk."""
    blake2b: str
    """128-bit BLAKE2b of the content on disk, in hex."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of `manifest.json`."""

    name: str
    """The dataset's name (`DataConfig.name`)."""
    format_version: int
    """`FORMAT_VERSION` of the code that wrote it."""
    fingerprint: str
    """12 hex digits: settings, tokenizer and source content."""
    settings: dict[str, Any]
    """The settings that shaped it: {"data": ..., "tokenizer": ..., "clean": ..., "dedup": ..., "augment": ...}."""
    splits: dict[str, SplitCounts]
    """The splits that hold documents; always `train`."""
    skipped_documents: int
    """Documents left out because they hold nothing but whitespace."""
    removed_documents: dict[str, int]
    """Documents left out for other reasons: "unreadable", "cleaning", "exact duplicate", "near duplicate", "lines"."""
    licence: str
    """What the settings say about origin and licence of the text (`DataConfig.licence`)."""
    packages: dict[str, str]
    """Versions of the packages that had a say in the text."""
    sources: dict[str, list[SourceFile]]
    """Files read, by the setting that names them: source, validation_source, test_source."""
    tokenizer_fingerprint: str
    """`Tokenizer.fingerprint()`."""
    vocab_size: int
    """`Tokenizer.vocab_size`."""
    eos_id: int
    """`Tokenizer.eos_id`, the token that ends each document."""
    labels: list[str] = dataclasses.field(default_factory=list)
    """The classes of documents, in order of id; empty where they have none."""
    files: dict[str, int]
    """Size in bytes of every other file of the dataset, so that a partial copy shows."""


def index_path(folder: Path, split: str, of: str) -> Path:
    """Path of an index file of `split`; `of` is "records", "documents", or a column of documents."""
    return folder / "index" / f"{split}.{of}.npy"


def questions_path(folder: Path, split: str) -> Path:
    """Path of the words and the answers of the questions of `split`."""
    return folder / "index" / f"{split}.questions.jsonl"


def texts_path(folder: Path, split: str) -> Path:
    """Path of the parts of the documents of `split`, as text."""
    return folder / "index" / f"{split}.texts.jsonl"


def save_manifest(manifest: Manifest, folder: Path) -> None:
    """Writes `manifest.json` into `folder`."""
    text = json.dumps(dataclasses.asdict(manifest), indent=1, ensure_ascii=False)
    (folder / MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")


def load_manifest(folder: Path) -> Manifest:
    """Reads the manifest of the dataset in `folder` and checks that its files are there, by size.

    Raises:
      UserError: if there is no dataset, it is incomplete, or another version of this code wrote it.
    """
    path = folder / MANIFEST_FILE
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        version = raw["format_version"]
        check(
            version == FORMAT_VERSION,
            f"{folder} has dataset format {version}; this version reads {FORMAT_VERSION}: run prepare again",
        )
        raw["splits"] = {split: SplitCounts(**counts) for split, counts in raw["splits"].items()}
        raw["sources"] = {role: [SourceFile(**file) for file in files] for role, files in raw["sources"].items()}
        manifest = Manifest(**raw)
    except FileNotFoundError:
        below = [file.parent for depth in ("*", "*/*") for file in sorted(folder.glob(f"{depth}/{MANIFEST_FILE}"))]
        meant = below[0] if len(below) == 1 else "the folder that lm prepare prints, .../NAME/FINGERPRINT/1.0.0"
        raise UserError(f"no prepared dataset in {folder}: {MANIFEST_FILE} is missing; name {meant}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"cannot read {path}: {error}; delete {folder} and run prepare again") from None
    for name, size in manifest.files.items():
        file = folder / name
        found = f"has {file.stat().st_size} bytes" if file.is_file() else "is gone"
        check(
            found == f"has {size} bytes",
            f"the dataset in {folder} is damaged: {name} {found}, expected {size} bytes; "
            "delete the folder and run prepare again",
        )
    return manifest
