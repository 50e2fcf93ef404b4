"""Filters: each threshold against a count made by hand or by a second, plain implementation."""

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.errors import UserError
from lm.text import filters
from lm.text.filters import Dropped

ENGLISH = (
    "The river had been rising for three days before anyone in the village thought of moving the boats. "
    "By the time the ferryman reached the landing, two of them had already drifted past the old mill."
)
CHINESE = (
    "村里的老人说，这条河已经三十年没有涨过这么高的水了。等到摆渡人赶到码头的时候，有两条小船早已顺着水漂过了旧磨坊。"
)


def reason(result: str | Dropped) -> str | None:
    return result.reason if isinstance(result, Dropped) else None


def test_length_counts_no_spaces():
    rule = filters.length(min_characters=3, max_characters=5)
    assert reason(rule("a   b   ")) == "short"
    assert reason(rule("ab\u3000 c")) is None
    assert reason(rule("a b c d e ")) is None
    assert reason(rule("abcdef")) == "long"
    assert reason(filters.length(min_characters=0, max_characters=None)("x" * 10**6)) is None


def test_symbols():
    rule = filters.symbols(max_symbol_ratio=0.25, max_hash_ratio=0.1)
    assert reason(rule("abc <>")) == "symbols"  # 2 of 5
    assert reason(rule("abcdef<>")) is None  # 2 of 8
    assert reason(rule("{}[]|\\^~=+")) == "symbols"
    for text in (
        ENGLISH,
        CHINESE,
        "“Wait—what?” (he said): 3.5%, 1/2",
        "《书》、「话」",
        "हिन्दी में लिखा हुआ पाठ",
        "שָׁלוֹם",
    ):
        assert reason(rule(text)) is None, text
    assert reason(rule("a #b c d e f g h i j")) is None  # 1 in 10
    assert reason(rule("a #b #c d e f g h i j")) == "hashes"
    assert reason(rule("wait... what... " + "word " * 5)) == "ellipses"
    assert reason(rule("走……了……")) == "ellipses"
    assert reason(rule("他想了很久很久，还是没有说话……")) is None


def test_words():
    rule = filters.words(min_mean_word=3, max_mean_word=10, min_alphabetic_words=0.8)
    assert reason(rule(ENGLISH)) is None
    assert reason(rule(CHINESE)) is None
    assert reason(rule("a b c d e f")) == "short words"
    assert reason(rule("incomprehensibilities " * 3)) == "long words"
    assert reason(rule("one two three four 5 6")) == "words without letters"  # 4 of 6
    assert reason(rule("one two three four 5 , . - ( )")) is None  # 4 of 5: marks are no words
    assert reason(rule("... --- !!!")) == "no words"
    assert reason(rule("(one) “two” three, [4x] (5)")) is None  # 4 of 5


def test_lines():
    rule = filters.lines(max_bullet_lines=0.9, max_ellipsis_lines=0.3)
    assert reason(rule("- a\n* b\n• c\n● d")) == "bullets"
    assert reason(rule("- a\n- b\n- c\nd")) is None
    assert reason(rule("-5 degrees\n-6 degrees\n-7 degrees")) is None
    assert reason(rule("one...\ntwo …  \nthree")) == "ellipses at line ends"
    assert reason(rule("one...\n\ntwo\n\nthree\n\nfour")) is None
    assert reason(rule("他走了……")) is None


def test_repeated_lines():
    rule = filters.repeated_lines(max_repeated_lines=0.3, max_repeated_line_characters=0.2)
    assert reason(rule("aa\nbb\naa\ncc")) == "characters in repeated lines"  # 1 of 4 lines; 2 of 8 characters
    assert reason(rule("a\na\nbbbbbbbbbb\ncccccccccc")) is None  # 1 of 4 lines; 1 of 22 characters
    assert reason(rule("a\na\na\nbbbbbbbbbbbbbbbbbbbb\ncccccccccccccccc")) == "repeated lines"  # 2 of 5
    paragraph = "one line\nand another"
    text = f"{paragraph}\n\n{paragraph}"
    assert reason(filters.repeated_lines(max_repeated_lines=0.5, max_repeated_line_characters=0.5)(text)) is None
    assert (
        reason(filters.repeated_lines(max_repeated_lines=0.4, max_repeated_line_characters=1)(text)) == "repeated lines"
    )
    rule = filters.repeated_lines(max_repeated_lines=0.3, max_repeated_line_characters=1)
    assert reason(rule("a\n\nb\nc\nd\n\na")) == "repeated paragraphs"  # 1 of 5 lines, 1 of 3 paragraphs
    assert reason(rule("x\n\n\nx y")) is None


def _gopher(words: list[str], top: float, repeated: float, per_word: int) -> str | None:
    """Table A1 of Rae et al. (2021), word for word."""
    total = sum(map(len, words))
    for n in range(2, 11):
        size = n * per_word
        grams = [tuple(words[i : i + size]) for i in range(len(words) - size + 1)]
        counts = Counter(grams)
        if not counts or counts.most_common(1)[0][1] == 1:
            continue
        if n <= 4:
            chosen = {counts.most_common(1)[0][0]}
            limit = top * {2: 1.0, 3: 0.9, 4: 0.8}[n]
        else:
            chosen = {gram for gram, count in counts.items() if count > 1}
            limit = repeated * {5: 15, 6: 14, 7: 13, 8: 12, 9: 11, 10: 10}[n] / 15
        covered = {j for i, gram in enumerate(grams) if gram in chosen for j in range(i, i + size)}
        share = sum(len(words[j]) for j in covered) / total
        if abs(share - limit) < 1e-9:
            return "equal"
        if share > limit:
            return f"one {n}-gram" if n <= 4 else f"repeated {n}-grams"
    return None


@given(
    words=st.lists(st.sampled_from(["a", "bb", "ccc", "dddd", "e5", "ffffff", "g", "hh", "iii"]), max_size=80)
    | st.lists(st.sampled_from("村里的老人说这条河已经"), max_size=80),
    top=st.floats(0.05, 1),
    repeated=st.floats(0.05, 1),
)
@settings(max_examples=300, deadline=None)
def test_repeated_ngrams_are_those_of_gopher(words: list[str], top: float, repeated: float):
    chinese = bool(words) and words[0] > "\u4e00"
    rule = filters.repeated_ngrams(max_top_ngram=top, max_repeated_ngrams=repeated)
    expected = _gopher(words, top, repeated, 2 if chinese else 1)
    if expected != "equal":
        assert reason(rule(("" if chinese else " ").join(words))) == expected


def test_repetition_with_the_default_thresholds():
    rule = filters.repeated_ngrams(max_top_ngram=0.2, max_repeated_ngrams=0.15)
    assert reason(rule(ENGLISH)) is None
    assert reason(rule(CHINESE)) is None
    assert reason(rule("Buy now! " * 20)) == "one 2-gram"
    assert reason(rule("快来抢购吧！" * 20)) == "one 2-gram"
    assert reason(rule(f"{ENGLISH} {ENGLISH}")) == "repeated 5-grams"
    assert reason(rule(CHINESE + CHINESE)) == "repeated 5-grams"
    assert reason(rule("")) is None


def test_blocked_words(tmp_path: Path):
    path = tmp_path / "words.txt"
    path.write_text("\ufeffspam\nBig  Win\n赌场\n毒\nC++\n\nspam\n", encoding="utf-8")
    rule = filters.blocked_words(blocked_words=str(path), max_blocked_words=0)
    for text in ("Spam!", "a big\nwin", "网上赌场开业", "有毒", "learn c++ now", "SPAM"):
        assert reason(rule(text)) == "blocked words", text
    for text in ("spammer", "antispam", "big winner", "赌 场", "a bigwin", "c+", ""):
        assert reason(rule(text)) is None, text
    one = filters.blocked_words(blocked_words=str(path), max_blocked_words=1)
    assert reason(one("spam and 毒")) == "blocked words"
    assert reason(one("spam")) is None
    assert reason(one("毒")) is None


def test_a_list_of_blocked_words_that_cannot_be_used(tmp_path: Path):
    with pytest.raises(UserError, match="no such file"):
        filters.read_blocked_words(tmp_path / "none.txt")
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(UserError, match="is empty"):
        filters.read_blocked_words(tmp_path / "empty.txt")
    (tmp_path / "gbk.txt").write_bytes("赌场".encode("gbk"))
    with pytest.raises(UserError, match="cannot read"):
        filters.read_blocked_words(tmp_path / "gbk.txt")
    with pytest.raises(UserError, match="cannot read"):
        filters.read_blocked_words(tmp_path)
