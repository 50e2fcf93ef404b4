"""Settings of the data room: what is prepared, and how it is read."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import field as field_of  # DataConfig has a field of that name
from typing import Literal

from lm.text.chat import ChatConfig


@dataclass(frozen=True, kw_only=True)
class MixtureConfig:
    """Which prepared datasets are mixed, and how much of each."""

    datasets: tuple[str, ...] = ()
    """Folders of prepared datasets, as `lm prepare` prints them; one tokenizer made them all."""
    weights: tuple[float, ...] = ()
    """Each dataset's share of the examples, in the order of `datasets`, of any sum; none: by size, see temperature."""
    from_steps: tuple[int, ...] = ()
    """Training steps from which other weights hold, first of all 0: `weights` then has a row for each, one after
    another. None: one row for the whole run."""
    temperature: float | None = None
    """Without weights, shares are proportional to tokens ** (1 / temperature): 1 is by size, more is more even.
    None: 1."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where text comes from, how it is split, and how examples are read from the prepared dataset."""

    source: str = "python-stdlib"
    """Text to read. FORM:GLOB names files, as they are or as .gz, .bz2, .xz, .zst; FORM is text, html, jsonl, json,
    csv, tsv, parquet or squad. Or parallel:FILE,FILE, tfds:NAME[/CONFIG][#SPLIT], tfds:FOLDER,
    hf:NAME[@CONFIG][#SPLIT], hf:FOLDER or python-stdlib."""
    validation_source: str | None = None
    """Validation text in the same forms; when given, nothing of `source` is held out for validation."""
    test_source: str | None = None
    """Test text in the same forms; when given, nothing of `source` is held out for testing."""
    document: Literal["file", "paragraph", "line"] = "file"
    """What one document is in text: sources; paragraphs are separated by blank lines."""
    field: str = "text"
    """The field or column that holds the text, wherever a document is a record and not a file; lists of strings are
    joined by newlines."""
    fields: tuple[str, ...] = ()
    """Two or more fields or columns that make the parts of a document, in place of `field`: the source and the target
    of a translation, or a pair of sentences."""
    chat: ChatConfig = field_of(default_factory=ChatConfig)
    """Documents that are conversations: two `fields` of what is asked and answered, or a `field` with a list of
    messages, each of them an object with `role` (system, user or assistant) and `content`."""
    label_field: str | None = None
    """The field or column with the class of a document."""
    label_separator: str | None = None
    """Where a document may have several classes, or none: what stands between their names, such as ','; a list of them
    is taken as it is. None: each document has one class."""
    labels: tuple[str, ...] = ()
    """The classes, in order of id; none given: all that occur in the training split, sorted."""
    sentences: bool = False
    """Note where the sentences of a document begin, for objectives on sentences."""
    group_field: str | None = None
    """A field or column, such as the author: documents that agree in it share a split."""
    header: bool = True
    """Whether csv: and tsv: files begin with the names of their columns; otherwise `field` counts them, from 0."""
    encoding: str = "utf-8"
    """Encoding of text:, jsonl:, json:, csv: and tsv: files, as Python names it; auto finds it out file by file."""
    on_error: Literal["stop", "skip"] = "stop"
    """What to do with input that cannot be used (other encodings, binary or damaged files, broken records, missing
    fields): stop with an error, or skip it, counted by reason."""
    max_document_bytes: int = 1 << 30
    """Larger documents are not used (see `on_error`), so that a file without line ends cannot fill the memory."""
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
    licence: str = ""
    """A note on origin and licence of the text, kept in the dataset's manifest."""

    seq_len: int = 256
    """Tokens in one training example; any length works without preparing again."""
    packing: Literal["stream", "documents", "pad"] = "stream"
    """stream: documents concatenated and cut; documents: attention and positions restart at each document; pad: as
    documents, with one document (or piece of a long one) in an example."""
    seed: int = 0
    """Seed of the order of training examples."""
    workers: int = 0
    """Worker processes that read examples; 0 reads in threads of this process."""
    prefetch: int = 4
    """Batches read ahead."""
    stride: int | None = None
    """Tokens from the beginning of a training window to that of the next (of one document, where documents are kept
    apart): 1 .. seq_len; less than seq_len makes windows overlap. None: seq_len."""
    eval_stride: int | None = None
    """The same in evaluation, where each token is scored once, in the first window that holds it: with a small stride
    nearly all see a long context, and it takes seq_len / eval_stride times as long. None: seq_len."""
    mixture: MixtureConfig = field_of(default_factory=MixtureConfig)
    """Several prepared datasets instead of `source`."""
