"""Chat templates: rendered as transformers renders them, in a sandbox, and cut into what is read and answered."""

import datetime

import pytest
from chats import DATED, GEMMA, LLAMA2, LLAMA3, QWEN, SCORED, THINKING

from lm.errors import UserError
from lm.text.template import ChatTemplate, Message

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
TALK = [
    Message("user", "Wie geht's? <b>&</b>"),
    Message("assistant", "好的。"),
    Message("user", " spaces "),
    Message("assistant", "Ja.\n"),
]
SYSTEM = Message("system", "Be kind.")


def test_an_answer_follows_what_is_read_before_it() -> None:
    turns = ChatTemplate(LLAMA2, TOKENS).turns([SYSTEM, *TALK])
    assert turns == [
        "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nWie geht's? <b>&</b> [/INST]",
        " 好的。 </s>",
        "<s>[INST] spaces [/INST]",
        " Ja. </s>",
    ]


def test_what_nobody_answers_is_left_out() -> None:
    template = ChatTemplate(QWEN)
    assert template.turns([*TALK, Message("user", "?")]) == template.turns(TALK)
    with pytest.raises(UserError, match="no message of the assistant"):
        template.turns(TALK[:1])


@pytest.mark.parametrize("source", [QWEN, LLAMA2, LLAMA3, SCORED])
def test_turns_are_the_whole_conversation(source: str) -> None:
    template = ChatTemplate(source, TOKENS)
    assert "".join(template.turns(TALK)) == template.render(TALK)


def test_a_template_that_rewrites_what_was_said_is_told() -> None:
    template = ChatTemplate(THINKING)
    assert len(template.turns(TALK[:2])) == 2
    with pytest.raises(UserError, match=r"otherwise when it goes on: '.*', and then '.*'; choose") as told:
        template.turns(TALK)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (GEMMA, r"refuses the conversation \(System role not supported\)"),
        ("{% for m in messages %}", "is not one"),
        ("{{ messages[7].content.x }}", "refuses"),
        ("{{ messages.append(1) }}", "refuses"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses"),
        ("{{ 1 // 0 }}", "refuses"),
        ("{% for i in range(10**9) %}x{% endfor %}", "refuses"),
        ("{% include 'other' %}", "refuses"),
    ],
)
def test_a_template_that_fails_or_reaches_out_is_told_in_a_line(source: str, says: str) -> None:
    with pytest.raises(UserError, match=says) as told:
        ChatTemplate(source, TOKENS).render([SYSTEM, *TALK])
    assert "\n" not in str(told.value)


def test_the_date_never_changes() -> None:
    """Of LLaMA 3.1's template, which asks for it: the same text makes the same dataset tomorrow."""
    assert ChatTemplate(DATED).render(TALK[:1]).startswith("Today is 26 Jul 2024.")


@pytest.mark.parity
@pytest.mark.parametrize("ask", [True, False])
@pytest.mark.parametrize("source", [QWEN, LLAMA2, LLAMA3, SCORED, DATED, THINKING])
def test_transformers_renders_the_same(source: str, ask: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils", reason="pip install -e .[parity]")

    class Then(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2024, 7, 26)

    monkeypatch.setattr(utils, "datetime", Then)
    for messages in (TALK, TALK[:1], [SYSTEM, *TALK]):
        told = [message._asdict() for message in messages]
        theirs, _ = utils.render_jinja_template([told], chat_template=source, add_generation_prompt=ask, **TOKENS)
        assert ChatTemplate(source, TOKENS).render(messages, ask=ask) == theirs[0]
