"""Documents of several parts: columns of a record (source and target), sentences, or a question and a text's words.

Between reading and tokenising the parts of a document are one text, with a character between them that no text holds.
White space to all that normalises, it joins no two words.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable

from lm.data.config import DataConfig
from lm.errors import check
from lm.text.augment import AugmentConfig
from lm.text.clean import CleanConfig, Cleaner
from lm.text.dedup import DedupConfig
from lm.text.normalize import is_blank
from lm.text.scripts import HAN, KANA, SOUTHEAST_ASIAN
from lm.text.sentences import Sentences, combining_marks
from lm.text.template import ROLES, Message

SEPARATOR = "\x1d"  # the ASCII group separator
_QUESTIONS = "squad:"
MOST_LABELS = 10_000
"""More different labels than this are no classes but a mistaken column."""


def wanted_fields(config: DataConfig) -> list[tuple[str, str]]:
    """The columns a record must have, each with the setting that names it."""
    texts = [(name, "data.fields") for name in config.fields] or [(config.field, "data.field")]
    others = [(config.label_field, "data.label_field"), (config.group_field, "data.group_field")]
    return texts + [(name, setting) for name, setting in others if name is not None]


def check_parts(data: DataConfig, dedup: DedupConfig, augment: AugmentConfig, clean: CleanConfig) -> None:
    """Raises `UserError` for settings of parts and labels that cannot be."""
    check(
        len(data.fields) != 1,
        f"data.fields is {data.fields}; it names two or more columns, and data.field names a single one",
    )
    check(
        not (is_chat(data) and data.sentences),
        "data.sentences makes sentences the parts of a document, and those of data.chat are messages; leave one out",
    )
    check(
        not is_chat(data) or len(data.fields) in (0, 2),
        f"data.chat takes two columns, what is asked and what is answered, and data.fields names {len(data.fields)};"
        " name two, or with data.field one column of messages",
    )
    twice = [name for name in data.fields if data.fields.count(name) > 1]
    check(not twice, f"data.fields names {twice[:1]} twice; each column makes one part")
    asks, joined = asks_questions(data), is_joined(data)
    check(
        not (joined and data.sentences),
        "data.sentences makes sentences the parts of a document, and these have others (data.fields, parallel:,"
        " squad:); leave one out",
    )
    check(
        not (joined and dedup.lines),
        "dedup.lines takes lines out of documents, but these documents are kept in parts (data.fields, parallel:,"
        " squad:); leave one out",
    )
    check(
        not (joined and augment.copies),
        "augment.copies alters texts as a whole, and these documents are kept in parts (data.fields, parallel:,"
        " squad:); leave one out",
    )
    check(
        not (asks and clean.rules),
        f"clean.rules is {', '.join(clean.rules)}, but answers of squad: sources stand at places of the text as it is;"
        " leave the rules out",
    )
    for role in ("source", "validation_source", "test_source"):
        source = getattr(data, role)
        check(
            source is None or source.startswith(_QUESTIONS) == asks,
            f"data.source {data.source!r} and data.{role} {source!r} are not both squad: sources, of questions with"
            " answers; name others",
        )
    check(
        len(set(data.labels)) == len(data.labels) != 1,
        f"data.labels is {data.labels}; name two or more classes, each once, or none",
    )
    check(
        data.label_field is not None or not data.labels,
        "data.labels names classes, but data.label_field does not say where a document's class stands; set it",
    )
    check(
        data.label_separator is None or (data.label_separator and data.label_field is not None),
        f"data.label_separator is {data.label_separator!r}; it is what stands between the classes of a document in"
        " data.label_field: set both, or neither",
    )
    blank = [name for name in data.labels if not name.strip()]
    check(not blank, f"data.labels names the empty class {blank[:1]}; leave it out")


def join_classes(names: Iterable[str]) -> str:
    """Any number of classes as one name, whatever their order."""
    return SEPARATOR.join(sorted({name.replace(SEPARATOR, " ") for name in names}))


def classes_of(label: str, data: DataConfig) -> tuple[str, ...]:
    """The classes that a document's label names: one, or where documents may have several what was joined."""
    if data.label_separator is None:
        return (label,)
    return tuple(label.split(SEPARATOR)) if label else ()


def join_parts(texts: Iterable[str]) -> str:
    """Several texts as one."""
    return SEPARATOR.join(text.replace(SEPARATOR, " ") for text in texts)


def is_joined(data: DataConfig) -> bool:
    """Whether documents are parts with separators between them; in all others a separator is a character like any."""
    return bool(data.fields) or data.source.startswith("parallel:") or asks_questions(data) or is_chat(data)


def is_chat(data: DataConfig) -> bool:
    """Whether documents are conversations."""
    return data.chat.template is not None


def join_messages(messages: Iterable[Message]) -> str:
    """A conversation as one text: the first letters of the roles, then what is said, as parts."""
    messages = tuple(messages)
    return join_parts(["".join(message.role[0] for message in messages), *(message.content for message in messages)])


def split_messages(text: str) -> list[Message]:
    """What `join_messages` joined."""
    letters, *contents = text.split(SEPARATOR)
    roles = {role[0]: role for role in ROLES}
    return [Message(roles[letter], content) for letter, content in zip(letters, contents, strict=True)]


def clean_messages(cleaner: Cleaner, text: str) -> str | None:
    """Cleans every message of a joined conversation, as `clean_parts`; that of the system may have nothing."""
    cleaned = []
    for message in split_messages(text):
        if message.content or message.role != "system":
            found = cleaner(message.content)
            if found is None:
                return None
            if is_blank(found) and message.role != "system":
                return ""
            message = message._replace(content=found)
        cleaned.append(message)
    return join_messages(cleaned)


def clean_parts(cleaner: Cleaner, text: str) -> str | None:
    """Cleans every joined part; None if a rule drops one of them, empty if one has nothing left."""
    cleaned = []
    for part in text.split(SEPARATOR):
        found = cleaner(part)
        if found is None:
            return None
        if is_blank(found):
            return ""
        cleaned.append(found)
    return SEPARATOR.join(cleaned)


def as_one_text(text: str, *, chat: bool = False) -> str:
    """Joined parts, or the messages of a conversation, for what knows none: tokenizer training, statistics, people."""
    if chat:
        text = text.partition(SEPARATOR)[2]
    return text.replace(SEPARATOR, "\n")


def has_parts(data: DataConfig) -> bool:
    """Whether documents have parts."""
    return data.sentences or is_joined(data)


def asks_questions(data: DataConfig) -> bool:
    """Whether documents are questions about a text, with answers."""
    return data.source.startswith(_QUESTIONS)


class PartCutter:
    """Cuts the text of a document into its parts, which joined are the text (but for the separators)."""

    def __init__(self, data: DataConfig):
        self._sentences = Sentences(words=False) if data.sentences else None
        self._asks = asks_questions(data)

    def __call__(self, text: str) -> list[str]:
        """At least one part."""
        if self._asks:
            question, context = text.split(SEPARATOR)
            return [question, *words_of(context)]
        if self._sentences is None:
            return text.split(SEPARATOR)
        parts, gap = [], ""
        for body, end in self._sentences.of(text):
            # White space goes to the sentence behind it, where tokenizers that keep spaces want it.
            stop = end.rstrip()
            parts.append(gap + body + stop)
            gap = end[len(stop) :]
        if not parts:
            return [text]
        parts[-1] += gap
        return parts


def words_of(text: str) -> list[str]:
    """The words of a text, each with the white space before it; joined they are the text. At least one.

    A word is a run of letters and digits with their marks, a run of other characters, a contraction ('s), or one
    character of a script without spaces. Tokenizers of BERT's and GPT-2's kind cut there as well, so that the tokens of
    the words are those of the text.
    """
    words = _word().findall(text)
    if not words:
        return [text]
    words[-1] += text[sum(map(len, words)) :]
    return words


@functools.cache
def _word() -> re.Pattern[str]:
    unspaced, marks = f"々〇{KANA}{HAN}{SOUTHEAST_ASIAN}", combining_marks()
    contraction = r"['’](?:s|t|re|ve|m|ll|d)(?!\w)"
    run = rf"[^\W{unspaced}](?:[^\W{unspaced}]|[{marks}])*+"
    return re.compile(rf"\s*+(?:[{unspaced}][{marks}]*+|{contraction}|{run}|[^\w\s]++)")


def sorted_labels(names: Iterable[str]) -> tuple[str, ...]:
    """Classes in order of id: as numbers if all are, else by code points."""
    found = set(names)
    if all(name.isdecimal() for name in found):
        return tuple(sorted(found, key=lambda name: (int(name), name)))
    return tuple(sorted(found))
