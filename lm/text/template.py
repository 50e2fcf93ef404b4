"""Chat templates: how the messages of a conversation are written as one text.

A template is a program in Jinja's language, as tokenizers of chat models bring one along. It runs in Jinja's sandbox,
with what transformers gives to templates, but for the date: one that asks for today's is told 26 July 2024, so that
the same conversations always give the same text.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from lm.errors import UserError, check

Role = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant")
_DATE = datetime.datetime(2024, 7, 26)


class Message(NamedTuple):
    """What one side says."""

    role: Role
    """Who speaks."""
    content: str
    """What is said."""


@dataclass(frozen=True)
class ChatTemplate:
    """A template and the tokens it may name."""

    source: str
    """The program."""
    tokens: Mapping[str, str] = field(default_factory=dict)
    """What the variables `bos_token`, `eos_token`, … stand for."""

    def render(self, messages: Sequence[Message], *, ask: bool = False) -> str:
        """The messages as one text.

        Args:
          messages: in order.
          ask: end with what comes before an answer, for the model to go on.

        Raises:
          UserError: the template fails, or refuses these messages.
        """
        told = [message._asdict() for message in messages]
        compiled = _compiled(self.source)
        try:
            return compiled.render(
                messages=told, tools=None, documents=None, add_generation_prompt=ask, **dict(self.tokens)
            )
        except Exception as error:  # whatever a program can raise
            raise UserError(
                f"the chat template refuses the conversation ({_one_line(error)}); change the messages, or choose"
                " another --data.chat.template"
            ) from None

    def turns(self, messages: Sequence[Message]) -> list[str]:
        """A conversation cut into what is read and what is answered, in turn.

        What is read before an answer is what `render` gives of the messages before it with `ask`, and the answer is
        what follows there when it is among the messages; joined, the texts are what `render` gives of all messages up
        to the last answer.

        Returns:
          Texts, two for each message of the assistant. What follows the last is left out.

        Raises:
          UserError: there is no answer, the template fails, or it writes a conversation otherwise when it goes on.
        """
        texts: list[str] = []
        done = ""
        for number, message in enumerate(messages):
            if message.role == "assistant":
                before = self.render(messages[:number], ask=True)
                whole = self.render(messages[: number + 1])
                _check_goes_on(done, before)
                _check_goes_on(before, whole)
                texts += [before[len(done) :], whole[len(before) :]]
                done = whole
        check(texts, "the conversation has no message of the assistant, so nothing is learned from it; leave it out")
        return texts


def _check_goes_on(first: str, then: str) -> None:
    if not then.startswith(first):
        at = next(i for i, (a, b) in enumerate(zip(first + "\0", then + "\0")) if a != b)
        raise UserError(
            f"the chat template writes the beginning of a conversation otherwise when it goes on:"
            f" {first[max(at - 20, 0) : at + 20]!r}, and then {then[max(at - 20, 0) : at + 20]!r}; choose"
            " --data.chat.template chatml, or give conversations with one answer"
        )


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> Any:
    """A template in a sandbox. Raises `UserError` where it is none."""
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """`{% generation %}`, which marks what an assistant wrote: its body as it is."""

        tags = {"generation"}  # noqa: RUF012 - nobody writes to it

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: Any = 0):
        # Jinja's own escapes what has a meaning in HTML.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = _DATE.strftime
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise UserError(
            f"the chat template is not one ({_one_line(error)}); mend it, or choose another --data.chat.template"
        ) from None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
