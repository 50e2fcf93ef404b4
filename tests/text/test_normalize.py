"""Rules about how text is written: forms of Unicode, control characters, widths, scripts, spaces."""

import json
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm.text import normalize

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"

any_text = st.text(alphabet=st.characters(), max_size=200)
# Where such rules go wrong: line ends, odd spaces, escapes, zero widths, combining marks, widths, half surrogates.
odd_text = st.text(
    alphabet=st.sampled_from(
        "a1 \t\n\r\v\f\x1b[m0;\x00\x1c\x85\u2028\u00a0\u3000\u200b\u200d\ufeff\u0301\u0316éＡ１，\ud800"
    ),
    max_size=60,
)

RULES = {
    "nfc": normalize.nfc(),
    "nfkc": normalize.nfkc(),
    "control": normalize.control(),
    "halfwidth": normalize.halfwidth(halfwidth_punctuation=False),
    "halfwidth, punctuation": normalize.halfwidth(halfwidth_punctuation=True),
    "whitespace": normalize.whitespace(keep_indentation=False),
    "whitespace, indented": normalize.whitespace(keep_indentation=True),
}


@pytest.mark.parametrize("name", RULES)
@given(text=any_text | odd_text)
def test_twice_is_once(name: str, text: str):
    rule = RULES[name]
    assert rule(rule(text)) == rule(text)


@given(any_text)
def test_normal_forms_are_those_of_unicode(text: str):
    # Nothing this short has runs of combining characters that are broken up.
    if not any(unicodedata.combining(char) for char in text):
        assert RULES["nfc"](text) == unicodedata.normalize("NFC", text)
        assert RULES["nfkc"](text) == unicodedata.normalize("NFKC", text)


def test_nfc_keeps_chinese_punctuation_and_nfkc_does_not():
    assert RULES["nfc"]("e\u0301，①") == "é，①"
    assert RULES["nfkc"]("e\u0301，①ﬁ") == "é,1fi"


def test_long_runs_of_combining_characters_are_broken_up():
    text = "a" + "\u0316\u0301" * 50
    result = RULES["nfc"](text)
    assert result.replace("\u034f", "") != ""
    assert max(len(run) for run in result[1:].split("\u034f")) <= 30
    for start in range(35):  # wherever it begins
        text = "x" * start + "\u0316\u0301" * 16
        assert "\u034f" in RULES["nfc"](text)
    thirty = "a" + "\u0301" * 30
    assert RULES["nfc"](thirty) == unicodedata.normalize("NFC", thirty)


@pytest.mark.parametrize(
    ("broken", "whole"),
    [
        ("schÃ¶n", "schön"),
        ("itâ€™s", "it’s"),
        ("ä¸\xadå›½", "中国"),
        ("l’humanitÃ©", "l’humanité"),
    ],
)
def test_mojibake_is_undone(broken: str, whole: str):
    assert normalize.mojibake()(broken) == whole


@pytest.mark.parametrize(
    "text",
    [
        "“curly” ‘quotes’",
        "＜ＡＢＣ＞，。",
        "ﬁne &lt;b&gt;",
        "São Paulo, Ärger",
        "床前明月光",
        "a\r\nb\x1b[0m",
        "\ud800",
    ],
)
def test_mojibake_leaves_the_rest(text: str):
    assert normalize.mojibake()(text).replace("\ufffd", "\ud800") == text


def test_control_characters_go_and_spelling_stays():
    rule = RULES["control"]
    assert rule("\ufeffa\x00b\u200bc\xadd\u2060") == "abcd"
    assert rule("\x1b[1;31mred\x1b[0m\x1b") == "red"
    assert rule("a\r\nb\rc\u2028d\x85e\ff\vg") == "a\nb\nc\nd\ne\nf\ng"
    assert rule("a\tb\n") == "a\tb\n"
    assert rule("\ud800x\udfff\uffff") == "x"
    assert rule("\u202eevil\u202c \u2066x\u2069") == "evil x"
    for text in ("👩‍👧 family", "می‌خواهم", "क्‍ष", "\u200fשלום", "é\u0301", "\ue000private"):
        assert rule(text) == text


@given(any_text | odd_text)
def test_no_control_characters_are_left(text: str):
    left = {unicodedata.category(char) for char in RULES["control"](text) if char not in "\t\n"}
    assert not left & {"Cc", "Cs", "Zl", "Zp"}


def test_full_width_letters_and_digits_but_not_punctuation():
    text = "ＡＢＣ１２３，中文。（ｘ＋ｙ）！"
    assert RULES["halfwidth"](text) == "ABC123，中文。（x＋y）！"
    assert RULES["halfwidth, punctuation"](text + "　") == "ABC123,中文。(x+y)! "


@given(st.text(alphabet=[chr(code) for code in range(0xFF01, 0xFF5F)]))
def test_half_width_is_what_unicode_says(text: str):
    assert RULES["halfwidth, punctuation"](text) == unicodedata.normalize("NFKC", text)


def test_spaces():
    rule = RULES["whitespace"]
    assert rule("  a \t b\u00a0\u3000c  \r\n\r\n\n\n  d \n e\n\n") == "a b c\n\nd\ne"
    assert rule("　　中文\n　　第二段") == "中文\n第二段"
    assert rule(" \n \n ") == ""


def test_indentation_is_kept_where_asked():
    code = "def f(x):\n    if x:\n\treturn  1   \n\n\n\n    return 2\n"
    assert RULES["whitespace, indented"](code) == "def f(x):\n    if x:\n\treturn 1\n\n    return 2"


@given(any_text | odd_text)
def test_spaces_lose_no_other_character(text: str):
    for name in ("whitespace", "whitespace, indented"):
        assert "".join(RULES[name](text).split()) == "".join(text.split())
        assert "\n\n\n" not in RULES[name](text)


def test_traditional_becomes_simplified():
    rule = normalize.simplified()
    assert rule("舉頭望明月，低頭思故鄉。") == "举头望明月，低头思故乡。"
    assert rule("乾隆皇帝的頭髮乾了") == "乾隆皇帝的头发干了"  # by phrase: 乾 stays in 乾隆
    assert rule("already simplified 简体") == "already simplified 简体"


def test_simplified_is_what_opencc_says_of_tang_poems():
    path = DATA / "zh/poet.tang.0.json"
    if not path.is_file():
        pytest.skip("needs ../shared/data")
    from opencc import OpenCC

    converter, rule = OpenCC("t2s"), normalize.simplified()
    poems = ["\n".join(poem["paragraphs"]) for poem in json.loads(path.read_text("utf-8"))[:200]]
    different = [poem for poem in poems if rule(poem) != converter.convert(poem)]
    assert not different
    assert sum(rule(poem) != poem for poem in poems) > 190


def test_what_nobody_can_see_is_blank():
    unseen = ["", " \n\t\u3000", "\u200b\u200b", "\ufeff", "\u200d\u200c\u2060", "\xad", "\x00\x1b", "\u3164", "\ufe0f"]
    assert [text for text in (*unseen, "".join(unseen)) if not normalize.is_blank(text)] == []
    seen = ["a", "中", ".", "\u200b.", "\u0301", "\u2026", "😀", "\ue000", "\u0600"]
    assert [text for text in seen if normalize.is_blank(text)] == []
    # Controls and spaces by category.
    assert all(
        normalize.is_blank(chr(i)) for i in range(0x110000) if unicodedata.category(chr(i)) in ("Zs", "Zl", "Zp", "Cc")
    )
