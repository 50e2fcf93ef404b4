"""`lm tokenizer`: train one, compare several on a text, show what one makes of a text."""

import dataclasses
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lm import config as configs
from lm.commands.exits import DONE
from lm.commands.shared import open_console, show
from lm.data.config import DataConfig
from lm.data.sources import documents
from lm.errors import UserError, check
from lm.text.base import first_bytes
from lm.text.compare import Comparison, compare, spelled
from lm.text.segment import JiebaSegmenter, agreement
from lm.text.tokenizer import (
    SegmentedTokenizer,
    Tokenizer,
    TokenizerConfig,
    check_tokenizer_config,
    is_trained,
    train_tokenizer,
)

_AGREEMENT_BYTES = 1_000_000
_SAMPLE = 160  # characters
_COLOURS = ("on blue", "on magenta", "on dark_green", "on dark_red", "on dark_cyan")


@dataclass(frozen=True, kw_only=True)
class SourceArguments:
    """Where text comes from."""

    source: str
    """Text to read, in the forms of `lm prepare --data.source`: text:GLOB, jsonl:GLOB, csv:GLOB, python-stdlib, ..."""
    document: Literal["file", "paragraph", "line"] = "file"
    """What one document is in text: sources; paragraphs are separated by blank lines."""
    field: str = "text"
    """The field or column that holds the text, wherever a document is a record and not a file."""
    header: bool = True
    """Whether csv: and tsv: files begin with the names of their columns; otherwise `field` counts them, from 0."""
    encoding: str = "utf-8"
    """Encoding of files, as Python names it; auto finds it out file by file."""
    on_error: Literal["stop", "skip"] = "stop"
    """What to do with input that cannot be used: stop with an error, or skip it."""

    def texts(self) -> Iterator[str]:
        """The texts of its documents."""
        return (document.text for document in documents(self.source, DataConfig(**dataclasses.asdict(self))))


@dataclass(frozen=True, kw_only=True)
class TrainArguments:
    """Trains a tokenizer on text and saves it."""

    output: Path
    """Folder for the tokenizer; use it as `--tokenizer.kind file:FOLDER`."""
    text: Annotated[SourceArguments, tyro.conf.arg(name="")]
    tokenizer: Annotated[TokenizerConfig, tyro.conf.arg(name="")] = dataclasses.field(default_factory=TokenizerConfig)
    measure_bytes: int = 10_000_000
    """The report is about so many bytes from the start of the training text."""


@dataclass(frozen=True, kw_only=True)
class CompareArguments:
    """Puts tokenizers side by side on a text."""

    tokenizers: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="TOKENIZER [TOKENIZER ...]")]
    """Each a path (what file: takes), byte, or hf:PATH_OR_NAME."""
    text: Annotated[SourceArguments, tyro.conf.arg(name="")]
    bytes: int = 10_000_000
    """At most so many bytes of text, from the start."""
    lowercase: bool = False
    """The vocabulary of every vocab.txt is of small letters without accents."""
    json: bool = False
    """One JSON object a line instead of a table."""


@dataclass(frozen=True, kw_only=True)
class ShowArguments:
    """Shows the pieces of a text: coloured on a terminal, otherwise with bars between them."""

    tokenizer: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TOKENIZER")]
    """A path (what file: takes), byte, or hf:PATH_OR_NAME."""
    text: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[TEXT]")] = None
    """The text; none = standard input."""
    lowercase: bool = False
    """The vocabulary of a vocab.txt is of small letters without accents."""
    ids: bool = False
    """Also the ids, on a line of their own."""


_SUBCOMMANDS: dict[str, type[TrainArguments] | type[CompareArguments] | type[ShowArguments]] = {
    "train": TrainArguments,
    "compare": CompareArguments,
    "show": ShowArguments,
}
_Any: Any = (
    Annotated[TrainArguments, tyro.conf.subcommand("train")]
    | Annotated[CompareArguments, tyro.conf.subcommand("compare")]
    | Annotated[ShowArguments, tyro.conf.subcommand("show")]
)


def run(arguments: list[str]) -> int:
    """`lm tokenizer train|compare|show [options]`."""
    name, rest = "".join(arguments[:1]), arguments[1:]
    if name in _SUBCOMMANDS:  # on its own: of several, tyro names another program's help
        asked = configs.parse(_SUBCOMMANDS[name], None, rest, prog=f"lm tokenizer {name}")
    else:
        asked = configs.parse(_Any, None, arguments, prog="lm tokenizer")
    if isinstance(asked, TrainArguments):
        return _train(asked)
    return _compare(asked) if isinstance(asked, CompareArguments) else _show(asked)


def _train(asked: TrainArguments) -> int:
    config, output = asked.tokenizer, asked.output
    check_tokenizer_config(config)
    check(is_trained(config), f"kind {config.kind!r} has nothing to train; use it as `--tokenizer.kind {config.kind}`")
    check(
        not output.exists() or (output.is_dir() and not any(output.iterdir())),
        f"{output} is not empty; choose another folder",
    )
    console = open_console()
    with console.status(f"training {config.kind}") as status:
        tokenizer = train_tokenizer(config, asked.text.texts())
        try:
            tokenizer.save(output)
        except OSError as error:
            raise UserError(f"cannot write {output}: {error.strerror}; choose another folder") from None
        status.update("measuring")
        texts = list(first_bytes(asked.text.texts(), min(asked.measure_bytes, config.training_bytes)))
        (row,) = compare({config.kind: tokenizer}, texts)
        agreed = _agreement(tokenizer, texts)
    show(console, f"{output}: {config.kind}")
    table = Table(show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("vocabulary", f"{row.vocab_size:,}")
    table.add_row("tokens per byte", f"{row.tokens_per_byte:.4f}")
    table.add_row("tokens per character", f"{row.tokens_per_character:.4f}")
    table.add_row("unknown tokens", f"{row.unknown_rate:.3%}" if tokenizer.unk_id is not None else "none possible")
    table.add_row("documents that come back exactly", f"{row.exact:.1%}")
    for label, value in agreed:
        table.add_row(label, value)
    table.add_row("longest pieces", " ".join(map(repr, row.longest)))
    console.print(table)
    show(console, f"measured on {sum(len(text.encode('utf-8')) for text in texts):,} bytes of the training text")
    _pieces(console, tokenizer, next((text for text in texts if text.strip()), "").strip()[:_SAMPLE])
    show(console, f"use it: --tokenizer.kind file:{output}")
    return DONE


def _agreement(tokenizer: Tokenizer, texts: list[str]) -> list[tuple[str, str]]:
    """How far a word list's segmentation agrees with jieba's."""
    if not isinstance(tokenizer, SegmentedTokenizer) or isinstance(tokenizer.segmenter, JiebaSegmenter):
        return []
    try:
        jieba = JiebaSegmenter()
    except UserError as error:  # an extra
        return [("words agreeing with jieba", f"not measured: {error}")]
    found = agreement(tokenizer.segmenter, jieba, first_bytes(texts, _AGREEMENT_BYTES))
    return [
        (
            "words agreeing with jieba",
            f"F1 {found.f1:.1%} (precision {found.precision:.1%}, recall {found.recall:.1%})",
        )
    ]


_COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("vocab_size", "vocabulary", "{:,}"),
    ("tokens", "tokens", "{:,}"),
    ("tokens_per_byte", "per byte", "{:.4f}"),
    ("tokens_per_character", "per character", "{:.4f}"),
    ("tokens_per_word", "per word", "{:.3f}"),
    ("unknown_rate", "unknown", "{:.3%}"),
    ("exact", "exact", "{:.1%}"),
    ("megabytes_per_second", "MB/s", "{:.2f}"),
)


def _compare(asked: CompareArguments) -> int:
    check(asked.tokenizers, "name one tokenizer or more: lm tokenizer compare A B --source ...")
    tokenizers = {name: _open(name, asked.lowercase) for name in asked.tokenizers}
    console = open_console()
    with console.status("reading") as status:
        texts = list(first_bytes(asked.text.texts(), asked.bytes))
        rows = compare(tokenizers, texts, on_done=lambda name: status.update(f"measured {name}"))
    if asked.json:
        for row in rows:
            print(json.dumps(dataclasses.asdict(row), ensure_ascii=False))
        return DONE
    show(console, asked.text.source)
    console.print(_table(rows))
    show(console, "words: runs of letters and digits; each Chinese, Japanese or Korean character counts as one")
    return DONE


def _table(rows: list[Comparison]) -> Table:
    table = Table()
    table.add_column("tokenizer")
    for _, label, _ in _COLUMNS:
        table.add_column(label, justify="right")
    table.add_column("longest pieces")
    for row in rows:
        cells = [form.format(getattr(row, name)) for name, _, form in _COLUMNS]
        table.add_row(Text(row.name), *cells, Text(" ".join(repr(piece[:24]) for piece in row.longest[:3])))
    return table


def _show(asked: ShowArguments) -> int:
    tokenizer = _open(asked.tokenizer, asked.lowercase)
    text = _standard_input() if asked.text is None else asked.text
    console = open_console()
    ids = _pieces(console, tokenizer, text)
    if asked.ids:
        show(console, " ".join(map(str, ids)))
    show(console, f"{len(ids)} tokens, {len(text)} characters, {len(text.encode('utf-8'))} bytes")
    return DONE


def _standard_input() -> str:
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not UTF-8 at byte {error.start}; convert it to UTF-8 first") from None


def _pieces(console: Console, tokenizer: Tokenizer, text: str) -> list[int]:
    """Prints a text with its pieces apart, line ends visible; a piece of several tokens says of how many."""
    ids = tokenizer.encode(text)
    pieces = [
        (piece.replace("\r", "␍").replace("\n", "␤\n"), f"×{count}" if count > 1 else "")
        for piece, count in spelled(tokenizer, ids)
    ]
    if console.is_terminal:
        line = Text()
        for i, (piece, count) in enumerate(pieces):
            line.append(piece + count, style=_COLOURS[i % len(_COLOURS)])
        console.print(line, soft_wrap=True)
    else:
        show(console, "|".join(piece + count for piece, count in pieces))
    return ids


def _open(name: str, lowercase: bool) -> Tokenizer:
    if name == "byte" or name.startswith(("hf:", "file:")):
        kind = name
    else:
        check(Path(name).expanduser().exists(), f"{name!r} is no tokenizer; give a path, byte or hf:PATH_OR_NAME")
        kind = f"file:{name}"
    small = lowercase and kind.startswith("file:") and kind.endswith(".txt")
    return train_tokenizer(TokenizerConfig(kind=kind, lowercase=small), ())
