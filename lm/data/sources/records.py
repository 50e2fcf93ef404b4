"""`jsonl:` and `json:`, files of JSON objects; and how a record becomes a document, in every form that has records."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from lm.data.parts import is_chat, join_classes, join_messages, join_parts, wanted_fields
from lm.data.sources.base import (
    BAD_CHAT,
    BROKEN_JSON,
    EMPTY_MESSAGE,
    NO_FIELD,
    NOT_TEXT,
    UNDECODABLE,
    BaseSource,
    Document,
    Part,
    kind,
    listed,
    one_line,
)
from lm.data.sources.files import FileSource
from lm.text.normalize import is_blank
from lm.text.template import ROLES, Message


def document_of(source: BaseSource, record: Mapping[str, Any], key: str, where: str) -> Document | None:
    """The document of a record; None, once its problem is told.

    Args:
      source: whose settings name the fields, and which is told of problems.
      record: values by field.
      key: the document's key.
      where: where it stands, for messages.
    """
    config = source.config
    for name, setting in wanted_fields(config):
        if name not in record:
            source.problem(NO_FIELD, f"{where} has no field {name!r}; it has {listed(record)}", f"set {setting}")
            return None
    text = _conversation(source, record, where) if is_chat(config) else _joined(source, record, where)
    if text is None:
        return None
    limit = config.max_document_bytes
    if len(text) > limit or (4 * len(text) > limit and len(text.encode("utf-8", "surrogatepass")) > limit):
        source.problem(*source.too_large(where))
        return None
    values: dict[str, str | None] = {"group": None, "label": None}
    for role in values:
        name = getattr(config, f"{role}_field")
        if name is not None:
            value = record[name]
            if role == "label" and config.label_separator is not None:
                values[role] = _classes(source, value, where)
                if values[role] is None:
                    return None
                continue
            if isinstance(value, list | dict) or (role == "label" and value is None):
                found = f"{where}: field {name!r} holds {kind(value)}, not one value"
                remedy = f"set data.{role}_field"
                if role == "label" and isinstance(value, list):
                    remedy += ", or data.label_separator where documents have several classes"
                source.problem(NOT_TEXT, found, remedy)
                return None
            values[role] = None if value is None else _name(value)
            if role == "label" and is_blank(values[role] or ""):
                source.problem(NOT_TEXT, f"{where}: field {name!r} is empty, and names no class", "write it there")
                return None
    return Document(key, text, group=values["group"], label=values["label"])


def _name(value: Any) -> str:
    """A value as text."""
    text = value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)
    return text.encode("utf-8", "replace").decode("utf-8")  # half a surrogate pair becomes "?"


def _classes(source: BaseSource, value: Any, where: str) -> str | None:
    """The classes of a document that may have several, joined; None, once a problem is told."""
    field, separator = source.config.label_field, source.config.label_separator
    given = value.tolist() if isinstance(value, np.ndarray) else value
    if given is None or isinstance(given, dict):
        found = f"{where}: field {field!r} holds {kind(given)}, neither a list nor text"
        source.problem(NOT_TEXT, found, "give a list of classes, an empty one where there is none")
        return None
    if not isinstance(given, list | tuple):
        text = _name(given)
        given = [] if is_blank(text) else text.split(separator)
    wrong = [name for name in given if name is None or isinstance(name, list | dict) or is_blank(_name(name))]
    if wrong:
        found = f"{where}: field {field!r} holds {value!r:.80}, with a class that has no name"
        source.problem(NOT_TEXT, found, "name it or take it out")
        return None
    return join_classes(_name(name).strip() for name in given)


def _joined(source: BaseSource, record: Mapping[str, Any], where: str) -> str | None:
    """The text of a record, of whichever fields; None, once its problem is told."""
    texts = []
    for name in source.config.fields or (source.config.field,):
        text = _text(source, record, name, where)
        if text is None:
            return None
        texts.append(text)
    return join_parts(texts) if source.config.fields else texts[0]


_CHAT_REMEDY = "give a list of objects with role (system, user, assistant) and content, or two columns in data.fields"


def _conversation(source: BaseSource, record: Mapping[str, Any], where: str) -> str | None:
    """The messages of a record, joined, up to the last of the assistant; None, once its problem is told."""
    if source.config.fields:
        asked, answered = source.config.fields
        told: Any = [("user", record[asked], repr(asked)), ("assistant", record[answered], repr(answered))]
    else:
        told = record[source.config.field]
        if not (isinstance(told, list) and all(isinstance(message, Mapping) for message in told)):
            found = f"{where}: field {source.config.field!r} holds {kind(told)}, not a list of objects"
            source.problem(BAD_CHAT, found, _CHAT_REMEDY)
            return None
        names = [f"message {number}" for number in range(1, len(told) + 1)]
        told = [(message.get("role"), message.get("content"), name) for message, name in zip(told, names)]
    messages = []
    for role, content, name in told:
        if role not in ROLES:
            source.problem(BAD_CHAT, f"{where}: {name} has the role {role!r}", _CHAT_REMEDY)
            return None
        if not isinstance(content, str):
            source.problem(NOT_TEXT, f"{where}: {name} ({role}) holds {kind(content)}, not text", _CHAT_REMEDY)
            return None
        if is_blank(content) and role != "system":
            said = "response" if role == "assistant" else "message"
            source.problem(EMPTY_MESSAGE, f"{where}: {name} ({role}) is an empty {said}", "write it or take it out")
            return None
        messages.append(Message(role, content))
    while messages and messages[-1].role != "assistant":
        messages.pop()  # nobody answers
    if not messages:
        source.problem(BAD_CHAT, f"{where} has no message of the assistant, so nothing to learn", _CHAT_REMEDY)
        return None
    return join_messages(messages)


def _text(source: BaseSource, record: Mapping[str, Any], field: str, where: str) -> str | None:
    """The text of one field; None, once its problem is told."""
    setting = "set data.fields" if source.config.fields else "set data.field"
    text = record[field]
    if isinstance(text, list) and all(isinstance(line, str) for line in text):
        text = "\n".join(text)
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8")
        except UnicodeDecodeError as error:
            source.problem(UNDECODABLE, f"{where} is not UTF-8 at byte {error.start} of {field!r}", setting)
            return None
    if not isinstance(text, str):
        source.problem(NOT_TEXT, f"{where}: field {field!r} holds {kind(text)}, not text", setting)
        return None
    return text


class JsonLines(FileSource):
    """`jsonl:GLOB`, one JSON object a line; blank lines are passed over."""

    cut_at = "line"

    def read_file(self, part: Part, encoding: str) -> Iterator[Document]:
        """See `FileSource`."""
        for line in self.lines(part, encoding):
            if line.problem is not None:
                self.problem(*line.problem)
            elif line.text.strip():
                where = f"{part.path}:{line.number}"
                try:
                    record = json.loads(line.text)
                except (ValueError, RecursionError) as error:
                    self.problem(BROKEN_JSON, f"{where} is not valid JSON ({one_line(error)})", "mend the line")
                    continue
                document = json_document(self, record, f"{part.key}:{line.number}", where)
                if document is not None:
                    yield document


class JsonLists(FileSource):
    """`json:GLOB`, files that hold a list of objects and are read whole."""

    def read_file(self, part: Part, encoding: str) -> Iterator[Document]:
        """See `FileSource`."""
        text, problem = self.content(part, encoding)
        if problem is not None:
            self.problem(*problem)
            return
        try:
            records = json.loads(text)
        except (ValueError, RecursionError) as error:
            self.problem(BROKEN_JSON, f"{part.path} is not valid JSON ({one_line(error)})", "mend the file")
            return
        if not isinstance(records, list):
            found = f"{part.path} is not a JSON list but {kind(records)}"
            self.problem(BROKEN_JSON, found, "give a list of objects, or one object a line to jsonl:")
            return
        del text
        for number, record in enumerate(records, 1):
            document = json_document(self, record, f"{part.key}:{number}", f"{part.path}:{number}")
            if document is not None:
                yield document


def json_document(source: BaseSource, record: Any, key: str, where: str) -> Document | None:
    """`document_of` something that JSON was parsed to."""
    if not isinstance(record, dict):
        source.problem(BROKEN_JSON, f"{where} is not a JSON object but {kind(record)}", "give one object a document")
        return None
    document = document_of(source, record, key, where)
    if document is not None:
        try:
            document.text.encode("utf-8")
        except UnicodeEncodeError:
            # JSON can spell half of a surrogate pair, which no encoding can write down; it becomes U+FFFD.
            text = document.text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            return dataclasses.replace(document, text=text)
    return document
