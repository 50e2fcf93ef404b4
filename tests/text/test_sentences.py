"""Cutting loses nothing, and finds the words that a person would count."""

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.text.sentences import Sentences, is_unspaced

CHARACTERS = Sentences(words=False)
any_text = st.text(st.one_of(st.characters(), st.sampled_from(" .!?。！？，,'\"”\n\t高兴我ab3é\u0301ि")), max_size=60)


@pytest.fixture(scope="module")
def jieba_words() -> Sentences:
    pytest.importorskip("jieba")
    return Sentences(words=True)


@settings(max_examples=300, deadline=None)
@given(any_text)
def test_joined_again_nothing_is_lost(text: str) -> None:
    sentences = CHARACTERS.of(text)
    assert "".join(body + end for body, end in sentences) == text
    for body, _ in sentences:
        parts = CHARACTERS.parts(body)
        assert "".join(parts) == body
        assert len(parts) % 2 == 1
        assert all(parts[1::2])
        # All that could be a word is in one.
        assert not re.search(r"[^\W_]", "".join(parts[::2]))


@settings(max_examples=100, deadline=None)
@given(text=any_text)
def test_jieba_loses_nothing_either(text: str, jieba_words: Sentences) -> None:
    for body, _ in jieba_words.of(text):
        parts = jieba_words.parts(body)
        assert "".join(parts) == body
        assert all(parts[1::2])


def bodies(text: str) -> list[str]:
    return [body for body, _ in CHARACTERS.of(text)]


def test_sentences_end_where_a_reader_stops() -> None:
    assert bodies('He paid 3.50 in all. "Really?" she asked! Yes') == [
        "He paid 3.50 in all",
        '"Really',
        "she asked",
        "Yes",
    ]
    assert bodies("今天很好。“真的吗？”他问！是的") == ["今天很好", "“真的吗", "他问", "是的"]
    assert bodies("one line\n\n two\n") == ["one line", "two"]
    assert bodies("Wait... what?!\n***\nGo.") == ["Wait", "what", "Go"]
    assert bodies("") == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Don't use state-of-the-art v3.14, it's U.S. only", "Don't use state-of-the-art v3.14 it's U.S only"),
        ("naïve cafe\u0301 हिन्दी", "naïve cafe\u0301 हिन्दी"),
        ("我爱 Python3 编程", "我 爱 Python3 编 程"),
        ("ひらがなと漢字", "ひ ら が な と 漢 字"),
        ("_a_ -- (b)", "a b"),
    ],
)
def test_words_are_what_a_reader_counts(text: str, words: str) -> None:
    assert CHARACTERS.parts(text)[1::2] == words.split()


def test_jieba_finds_chinese_words(jieba_words: Sentences) -> None:
    parts = jieba_words.parts("我来到北京清华大学，use Python3吧")
    assert parts[1::2] == ["我", "来到", "北京", "清华大学", "use", "Python3", "吧"]
    assert parts[::2] == ["", "", "", "", "，", " ", "", ""]


def test_a_script_is_told_by_its_characters() -> None:
    assert [is_unspaced(word) for word in ("高", "か", "a", "3", "한")] == [True, True, False, False, False]


def test_text_without_a_full_stop_is_cut_at_spaces() -> None:
    text = "word " * 5000
    sentences = CHARACTERS.of(text)
    assert max(len(body) for body, _ in sentences) <= 4096
    assert all(CHARACTERS.parts(body)[1::2] == ["word"] * body.count("word") for body, _ in sentences)
    assert sum(body.count("word") for body, _ in sentences) == 5000
    assert max(len(body) for body in bodies("高" * 20_000)) <= 4096


@pytest.mark.parametrize("unit", [".", " ", "'", ".x", "\n", "高", "a", "'a", "a'", "?)", "\n ", "a-", "。", "\u0301"])
def test_time_grows_with_the_text_not_with_its_square(unit: str) -> None:
    def seconds(n: int) -> float:
        text = unit * (n // len(unit)) + "x"
        start = time.process_time()
        for body, _ in CHARACTERS.of(text):
            CHARACTERS.parts(body)
        return time.process_time() - start

    seconds(1000)
    small, large = (min(seconds(n) for _ in range(3)) for n in (20_000, 160_000))
    assert large < 8 * 3 * small + 0.02  # 64 times as long, if it grew with the square
