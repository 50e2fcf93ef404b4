"""Sources of text: a stream of documents, and fingerprints of the files they come from.

A source is a string, FORM:WHERE (`FORMS`). To add a form, write a class like those of this package, list it in
`open_source`, and name in `SHAPING_FIELDS_BY_FORM` the settings that change its documents.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lm.data.config import DataConfig
from lm.data.parts import wanted_fields
from lm.data.sources.base import Document, Part, SkipCounts, Source, Unit, fingerprint_file, match
from lm.data.sources.encodings import plain_name
from lm.data.sources.libraries import HuggingFace, Tfds
from lm.data.sources.parallel import ParallelLines
from lm.data.sources.records import JsonLines, JsonLists
from lm.data.sources.squad import SquadQuestions
from lm.data.sources.tables import CommaSeparated, Parquet, TabSeparated
from lm.data.sources.text import HtmlFiles, StandardLibrary, TextFiles
from lm.errors import check

__all__ = [
    "FORMS",
    "SHAPING_FIELDS_BY_FORM",
    "Document",
    "Part",
    "SkipCounts",
    "Source",
    "Unit",
    "check_source_config",
    "documents",
    "fingerprint_file",
    "form_of",
    "open_source",
    "shaping",
]

FORMS = (
    "text:GLOB, parallel:FILE,FILE, html:GLOB, jsonl:GLOB, json:GLOB, csv:GLOB, tsv:GLOB, parquet:GLOB, squad:GLOB, "
    "tfds:NAME[/CONFIG][#SPLIT], hf:NAME[@CONFIG][#SPLIT] or python-stdlib"
)

_FILES: dict[str, Callable[[DataConfig, list[tuple[str, Path]]], Source]] = {
    "text": TextFiles,
    "html": HtmlFiles,
    "jsonl": JsonLines,
    "json": JsonLists,
    "csv": CommaSeparated,
    "tsv": TabSeparated,
    "parquet": Parquet,
    "squad": SquadQuestions,
}
_LIBRARIES: dict[str, Callable[[DataConfig, str], Source]] = {"tfds": Tfds, "hf": HuggingFace}

_SKIPPING = ("on_error", "max_document_bytes")
_ANY_FILE = ("encoding", *_SKIPPING)
_RECORD = ("field", "fields", "chat", "label_field", "label_separator", "labels", "group_field", "sentences")
SHAPING_FIELDS_BY_FORM: dict[str, tuple[str, ...]] = {
    "text": ("document", "sentences", *_ANY_FILE),
    "parallel": _ANY_FILE,
    "html": ("sentences", *_SKIPPING),
    "jsonl": (*_RECORD, *_ANY_FILE),
    "json": (*_RECORD, *_ANY_FILE),
    "csv": (*_RECORD, "header", *_ANY_FILE),
    "tsv": (*_RECORD, "header", *_ANY_FILE),
    "parquet": (*_RECORD, *_SKIPPING),
    "squad": _ANY_FILE,
    "tfds": (*_RECORD, *_SKIPPING),
    "hf": (*_RECORD, *_SKIPPING),
    "python-stdlib": ("sentences",),
}
"""The settings of `DataConfig` that change the documents of each form; see `shaping`."""


def form_of(source: str) -> str:
    """What stands before the colon of a source: a key of `SHAPING_FIELDS_BY_FORM`. Raises `UserError` for others."""
    form, _, where = source.partition(":")
    check(
        form in SHAPING_FIELDS_BY_FORM and bool(where) == (form != "python-stdlib"),
        f"unknown source {source!r}; choose {FORMS}",
    )
    return form


def shaping(source: str, config: DataConfig) -> dict[str, Any]:
    """The settings that change the documents of a source, with their values.

    Settings that came later and are as if they weren't there are left out: `on_error` "stop", which either changes
    nothing or leaves no dataset, a limit that only then counts, no group, UTF-8, a header.
    """
    found = {name: getattr(config, name) for name in SHAPING_FIELDS_BY_FORM[form_of(source)]}
    if found.get("on_error") != "skip":
        found.pop("max_document_bytes", None)
    if found.get("fields"):
        del found["field"]
    if "chat" in found:
        found["chat"] = dataclasses.asdict(config.chat)
    without_effect = {
        "on_error": "stop",
        "fields": (),
        "chat": {"template": None},
        "label_field": None,
        "label_separator": None,
        "labels": (),
        "sentences": False,
        "group_field": None,
        "encoding": "utf-8",
        "header": True,
    }
    if "encoding" in found:
        found["encoding"] = plain_name(config.encoding)
    return {name: value for name, value in found.items() if without_effect.get(name, ...) != value}


def check_source_config(config: DataConfig) -> None:
    """Raises `UserError` for settings of sources that cannot be."""
    plain_name(config.encoding)
    check(
        config.document in ("file", "paragraph", "line"),
        f"data.document is {config.document!r}; choose file, paragraph or line",
    )
    check(config.on_error in ("stop", "skip"), f"data.on_error is {config.on_error!r}; choose stop or skip")
    check(
        config.max_document_bytes >= 1,
        f"data.max_document_bytes is {config.max_document_bytes}; it must be at least 1",
    )
    form = form_of(config.source)
    chat = config.chat.template
    check(
        chat is None or "chat" in SHAPING_FIELDS_BY_FORM[form],
        f"data.chat.template is {chat!r}, but documents of {config.source!r} have no fields; leave it out",
    )
    for name in ("fields", "label_field", "group_field"):
        value = getattr(config, name)
        check(
            not value or name in SHAPING_FIELDS_BY_FORM[form],
            f"data.{name} is {value!r}, but documents of {config.source!r} have no fields; leave it out",
        )
    sources = (config.source, config.validation_source, config.test_source)
    if not config.header and any(form_of(source) in ("csv", "tsv") for source in sources if source is not None):
        for column, setting in wanted_fields(config):
            check(
                column.isdecimal(),
                f"{setting} is {column!r}, but --data.no-header says that columns have no names; "
                "give its number, 0 for the first",
            )


def open_source(source: str, config: DataConfig) -> Source:
    """Finds the files of a source.

    Args:
      source: one of the forms above.
      config: says what one document is (`document`), which field holds text (`field`), and so on.

    Returns:
      The source. Nothing but names has been read.

    Raises:
      UserError: if the form is unknown, nothing is there, or a setting cannot be.
    """
    form = form_of(source)
    check_source_config(config)
    if form in _LIBRARIES:
        return _LIBRARIES[form](config, source)
    if form == "parallel":
        return ParallelLines(config, source)
    if form in _FILES:
        return _FILES[form](config, match(source, source.partition(":")[2]))
    return StandardLibrary(config)


def documents(source: str, config: DataConfig) -> Iterator[Document]:
    """Streams the documents of a source; see `open_source`."""
    return open_source(source, config).documents()
