"""Settings of the data room: what is prepared, and how it is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where text comes from, how it is split, and how examples are read from the prepared dataset."""

    source: str = "python-stdlib"
    """Text to read: text:GLOB, jsonl:GLOB, tfds:NAME[/CONFIG], tfds:FOLDER or python-stdlib; .gz files work too."""
    validation_source: str | None = None
    """Validation text in the same forms; when given, nothing of `source` is held out for validation."""
    test_source: str | None = None
    """Test text in the same forms; when given, nothing of `source` is held out for testing."""
    document: Literal["file", "paragraph", "line"] = "file"
    """What one document is in text: sources; paragraphs are separated by blank lines."""
    field: str = "text"
    """The field that holds the text in jsonl: and tfds: sources."""
    validation_fraction: float = 0.05
    """Fraction of the documents of `source` held out for validation, by a hash of their text."""
    test_fraction: float = 0.0
    """Fraction of the documents of `source` held out for testing, by a hash of their text."""
    split_seed: int = 0
    """Seed of the hash that assigns documents to splits."""
    name: str = "corpus"
    """Name of the dataset; prepared datasets live in ROOT/NAME/FINGERPRINT/1.0.0."""
    root: str = "datasets"
    """Folder of all prepared datasets."""

    seq_len: int = 256
    """Tokens in one training example; any length works without preparing again."""
    packing: Literal["stream", "documents"] = "stream"
    """stream: documents concatenated and cut; documents: attention and positions restart at each document."""
    seed: int = 0
    """Seed of the order of training examples."""
    workers: int = 0
    """Worker processes that read examples; 0 reads in threads of this process."""
    prefetch: int = 4
    """Batches read ahead."""
