"""`squad:GLOB`, questions about texts with answers in them, as files of SQuAD 1.1 and 2.0 hold them.

A document is a question: its first part is the question and the others are the words of the text
(`lm.data.parts.words_of`). The questions of one text share a split.
"""

from __future__ import annotations

import itertools
import json
from bisect import bisect_right
from collections.abc import Iterator
from typing import Any

from lm.data.parts import SEPARATOR, join_parts, words_of
from lm.data.sources.base import (
    BAD_ANSWER,
    BROKEN_JSON,
    NO_FIELD,
    NOT_TEXT,
    Document,
    Part,
    kind,
    listed,
    one_line,
)
from lm.data.sources.files import FileSource

_REMEDY = "give a file as SQuAD has it (data, paragraphs, context, qas, id, question, answers, text, answer_start)"


class SquadQuestions(FileSource):
    """`squad:GLOB`; files are read whole, so that `max_document_bytes` is about them."""

    def read_file(self, part: Part, encoding: str) -> Iterator[Document]:
        """See `FileSource`."""
        text, problem = self.content(part, encoding)
        if problem is not None:
            self.problem(*problem)
            return
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            self.problem(BROKEN_JSON, f"{part.path} is not valid JSON ({one_line(error)})", "mend the file")
            return
        del text
        for i, article in enumerate(self._list(content, "data", f"{part.path}") or (), 1):
            where = f"{part.path}: article {i}"
            for j, paragraph in enumerate(self._list(article, "paragraphs", where) or (), 1):
                yield from self._questions(paragraph, f"{where}, paragraph {j}")

    def _questions(self, paragraph: Any, where: str) -> Iterator[Document]:
        """The documents of one text."""
        context = self._text(paragraph, "context", where)
        records = None if context is None else self._list(paragraph, "qas", where)
        if context is None or records is None:
            return
        ends = list(itertools.accumulate(map(len, words_of(context.replace(SEPARATOR, " ")))))
        for number, record in enumerate(records, 1):
            here = f"{where}, question {number}"
            key = self._value(record, "id", str | int, here, "a name")
            question = None if key is None else self._text(record, "question", here)
            found = None if question is None else self._answers(record, context, here)
            if question is None or found is None:
                continue
            span = (-1, -1)
            if found:
                start, answer = found[0]
                # Numbers of parts, of which the question is the first, 0.
                span = 1 + bisect_right(ends, start), 1 + bisect_right(ends, start + len(answer) - 1)
            answers = tuple(_whole(answer.replace(SEPARATOR, " ")) for _, answer in found)
            text = _whole(join_parts([question, context]))
            yield Document(_whole(str(key)), text, group=_whole(context), span=span, answers=answers)

    def _answers(self, record: Any, context: str, where: str) -> list[tuple[int, str]] | None:
        """Where each answer begins, and what it says, without white space around it; None once a problem is told."""
        if record.get("is_impossible") is True:
            return []
        answers = self._list(record, "answers", where)
        if answers is None:
            return None
        found = []
        for number, answer in enumerate(answers, 1):
            here = f"{where}, answer {number}"
            text = self._text(answer, "text", here)
            start = None if text is None else self._value(answer, "answer_start", int, here, "a number")
            if text is None or start is None:
                return None
            there = context[max(start, 0) : max(start, 0) + len(text)]
            if start < 0 or not text.strip() or there != text:
                said = f"{here} is {text!r}, but at {start} the context has {there!r}"
                self.problem(BAD_ANSWER, said, "mend the answer or its answer_start")
                return None
            found.append((start + len(text) - len(text.lstrip()), text.strip()))
        return found

    def _list(self, record: Any, name: str, where: str) -> list[Any] | None:
        return self._value(record, name, list, where, "a list")

    def _text(self, record: Any, name: str, where: str) -> str | None:
        return self._value(record, name, str, where, "text")

    def _value(self, record: Any, name: str, wanted: Any, where: str, what: str) -> Any:
        """A value of an object; None, once its problem is told."""
        if not isinstance(record, dict):
            self.problem(BROKEN_JSON, f"{where} is not a JSON object but {kind(record)}", _REMEDY)
        elif name not in record:
            self.problem(NO_FIELD, f"{where} has no {name!r}; it has {listed(record)}", _REMEDY)
        elif not isinstance(record[name], wanted):
            self.problem(NOT_TEXT, f"{where}: {name!r} holds {kind(record[name])}, not {what}", _REMEDY)
        else:
            return record[name]
        return None


def _whole(text: str) -> str:
    """A text in which half of a surrogate pair, which JSON can spell and no encoding write down, is U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
