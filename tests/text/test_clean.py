"""Cleaning as a whole: settings that cannot be meant, the report, any text, work in proportion to length."""

import json
import pickle
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from lm import errors
from lm.errors import UserError
from lm.text.clean import RULES, CleanConfig, Cleaner, CleanReport, check_clean_config
from lm.text.report import MOST_EXAMPLES

ENGLISH = "The river had been rising for three days before anyone in the village thought of moving the boats."
CHINESE = "村里的老人说，这条河已经三十年没有涨过这么高的水了。等到摆渡人赶到码头的时候，小船早已漂走了。"
MASKS = tuple(name for name, rule in RULES.items() if rule.private)

any_text = st.text(alphabet=st.characters(), max_size=300)
documents = st.lists(
    any_text
    | st.sampled_from(
        [
            "",
            "short",
            ENGLISH,
            f"  {CHINESE}  ",
            f"{ENGLISH} Write to jo@example.com or call 212-555-0123.",
            "spam " + ENGLISH,
            "Der Fluss stieg schon seit drei Tagen, bevor jemand an die Boote dachte.",
            f"<html><body><p>{ENGLISH}</p></body></html>",
            "<p></p>",
            "schÃ¶n ＡＢＣ 舉頭",
            "buy now! " * 30,
        ]
    ),
    max_size=12,
)


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> CleanConfig:
    words = tmp_path_factory.mktemp("words") / "blocked.txt"
    words.write_text("spam\n赌场\n", encoding="utf-8")
    return CleanConfig(rules=tuple(RULES), languages=("en", "zh"), blocked_words=str(words), min_characters=10)


@pytest.fixture(scope="module")
def rules(everything: CleanConfig) -> dict[str, Callable]:
    return {
        name: rule.build(**{option: getattr(everything, option) for option in rule.options})
        for name, rule in RULES.items()
    }


def clean(config: CleanConfig, texts: list[str]) -> tuple[list[str | None], CleanReport]:
    cleaner = Cleaner(pickle.loads(pickle.dumps(config)))
    return [cleaner(text) for text in texts], cleaner.report


def test_no_rules_leave_text_as_it_stands():
    texts = ["", " \x00 a\r\n", "\ud800"]
    results, report = clean(CleanConfig(), texts)
    assert results == texts
    assert (report.documents, report.kept, report.changed) == (3, 3, 0)


def test_rules_apply_in_the_order_listed():
    text = "ab\u3000\u3000cd"
    assert clean(CleanConfig(rules=("whitespace", "nfkc")), [text])[0] == ["ab cd"]
    long = f"{ENGLISH}   "
    short_first, _ = clean(
        CleanConfig(rules=("length", "mask_urls"), min_characters=20), ["https://example.org/" + "x" * 40]
    )
    mask_first, _ = clean(
        CleanConfig(rules=("mask_urls", "length"), min_characters=20), ["https://example.org/" + "x" * 40]
    )
    assert short_first == ["<URL>"]
    assert mask_first == [None]
    assert clean(CleanConfig(rules=("length", "whitespace")), [long])[0] == [ENGLISH]


def test_every_option_belongs_to_a_rule_and_every_rule_is_described():
    options = {option for rule in RULES.values() for option in rule.options}
    assert options == {field.name for field in fields(CleanConfig)} - {"rules"}
    source = Path(str(__import__("lm.text.clean").text.clean.__file__)).read_text("utf-8")
    listed = source.split("Rules in the order in which they are applied, of:")[1].split(". None of them")[0]
    assert [name.strip() for name in listed.split(",")] == list(RULES)
    for name, rule in RULES.items():
        assert rule.summary.endswith("."), name


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rules": ("nfd",)}, r"'nfd'; did you mean nfc\?; the rules are html, "),
        ({"rules": ("zzzz",)}, r"'zzzz'; the rules are"),
        ({"rules": ("nfc", "control", "nfc")}, "lists nfc twice"),
        ({"rules": ("nfc", "html")}, "html after other rules"),
        ({"min_characters": 10}, r"clean.min_characters is 10, but length, which reads it, is not in clean.rules"),
        ({"rules": ("length",), "languages": ("en",)}, "clean.languages is .* but language, which reads it"),
        ({"rules": ("length",), "min_characters": -1}, "clean.min_characters is -1; it must not be negative"),
        (
            {"rules": ("length",), "max_characters": 9},
            "clean.min_characters is 50, more than clean.max_characters, which is 9",
        ),
        ({"rules": ("words",), "min_mean_word": 11.0}, "more than clean.max_mean_word"),
        ({"rules": ("symbols",), "max_symbol_ratio": 25.0}, "max_symbol_ratio is 25.0; it is a share, from 0 to 1"),
        ({"rules": ("symbols",), "max_symbol_ratio": float("nan")}, "it is a share"),
        ({"rules": ("language",)}, "clean.languages is empty"),
        ({"rules": ("language",), "languages": ("en", "english")}, "'english'; write ISO 639-1 codes, such as en, zh"),
        ({"rules": ("language",), "languages": ("zh-CN",)}, r"'zh-CN'; did you mean zh\?"),
        ({"rules": ("blocked_words",)}, "clean.blocked_words names no file"),
        ({"rules": ("blocked_words",), "blocked_words": "/no/such/file"}, "'/no/such/file', but there is no such file"),
    ],
)
def test_settings_that_cannot_be_meant(values: dict, message: str):
    with pytest.raises(UserError, match=message) as caught:
        check_clean_config(CleanConfig(**values))
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=message):
        Cleaner(CleanConfig(**values))


@pytest.mark.parametrize("name", [name for name, rule in RULES.items() if rule.package])
def test_a_missing_package_is_named(name: str, monkeypatch: pytest.MonkeyPatch):
    package = RULES[name].package
    real = errors.importlib.import_module

    def missing(wanted: str):
        if wanted.split(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {wanted!r}", name=package)
        return real(wanted)

    monkeypatch.setattr(errors.importlib, "import_module", missing)
    languages = ("en",) if name == "language" else ()
    with pytest.raises(UserError, match=rf"rule {name} needs the package {package}; install it with .*\[text\]"):
        check_clean_config(CleanConfig(rules=(name,), languages=languages))


def test_counts_and_reasons():
    config = CleanConfig(rules=("whitespace", "length", "language"), min_characters=10, languages=("en",))
    results, report = clean(config, [ENGLISH, f"  {ENGLISH}  ", "short", "   ", CHINESE])
    assert results == [ENGLISH, ENGLISH, None, None, None]
    assert (report.documents, report.kept, report.changed, report.dropped) == (5, 2, 1, 3)
    assert report.characters_in == 2 * len(ENGLISH) + 4 + 5 + 3 + len(CHINESE)
    assert report.characters_out == 2 * len(ENGLISH)
    spaces, length, language = report.rules.values()
    assert (spaces.seen, spaces.changed, spaces.dropped, spaces.reasons) == (5, 1, 1, {"empty": 1})
    assert (length.seen, length.changed, length.dropped, length.reasons) == (4, 0, 1, {"short": 1})
    assert (language.seen, language.dropped, language.reasons) == (3, 1, {"language zh": 1})
    assert spaces.characters_out == length.characters_in == 2 * len(ENGLISH) + 5 + len(CHINESE)
    assert spaces.changes == [{"before": f"  {ENGLISH}"[:80], "after": ENGLISH[:80]}]
    assert length.drops == [{"text": "short", "why": "short"}]
    assert language.drops[0]["text"] == CHINESE[:80]


def test_no_example_begins_or_ends_within_a_mask():
    for shift in range(30):
        # A change, with a telephone number at each end of what is shown of it, and of a dropped document's beginning.
        text = "a" * shift + " 212-555-0123 " + "b" * 12 + "  c" + "d" * 35 + " 212-555-0123 " + "e" * 500
        cleaner = Cleaner(CleanConfig(rules=("mask_phones", "whitespace", "length"), max_characters=400))
        cleaner(text)
        rules = cleaner.report.rules
        (change,), (drop,), (masked,) = rules["whitespace"].changes, rules["length"].drops, rules["mask_phones"].changes
        for shown in (change["before"], change["after"], drop["text"], masked["after"]):
            assert len(shown) >= 80
            assert shown.count("<") == shown.count(">") >= 1, (shift, shown)
            assert shown.count("PHONE>") == shown.count("<PHONE>")


def test_examples_are_the_first_and_show_the_difference():
    texts = [f"{i} " + "word " * 500 + f"here{i}  is the change " + "word " * 500 for i in range(6)]
    _, report = clean(CleanConfig(rules=("whitespace",)), texts)
    changes = report.rules["whitespace"].changes
    assert len(changes) == MOST_EXAMPLES
    for i, example in enumerate(changes):
        assert f"here{i}  is the change" in example["before"]
        assert f"here{i} is the change" in example["after"]
        assert len(example["before"]) <= 80


@given(documents, st.integers(0, 12), st.integers(0, 12))
@settings(max_examples=60, deadline=None)
def test_reports_of_pieces_merge_to_that_of_the_whole(everything: CleanConfig, texts: list[str], a: int, b: int):
    a, b = sorted((a, b))
    whole = clean(everything, texts)[1]
    pieces = [clean(everything, part)[1] for part in (texts[:a], texts[a:b], texts[b:])]
    assert CleanReport.merge(pieces) == whole
    first, second, third = pieces
    left = CleanReport.merge([CleanReport.merge([first, second]), third])
    right = CleanReport.merge([first, CleanReport.merge([second, third])])
    assert left == right == whole
    assert CleanReport.merge([CleanReport(), whole]) == whole
    stored = json.loads(json.dumps(whole.to_dict(), ensure_ascii=False).encode("utf-8"))
    assert CleanReport.from_dict(stored) == whole
    assert list(stored["rules"]) == list(RULES)
    seen = texts and whole.documents
    for rule in whole.rules.values():  # what one rule passes on the next one sees
        assert rule.seen == (seen or 0)
        seen = rule.seen - rule.dropped
        assert sum(rule.reasons.values()) == rule.dropped
    assert (seen or 0) == whole.kept


def test_merging_changes_nothing_that_is_merged():
    _, report = clean(CleanConfig(rules=("length",)), ["short"])
    before = json.dumps(report.to_dict())
    CleanReport.merge([report, report])
    assert json.dumps(report.to_dict()) == before


@pytest.mark.parametrize("rules", [("whitespace", *MASKS, "length"), (*MASKS, "length"), ("length", *MASKS)])
def test_reports_show_nothing_that_is_masked(rules: tuple[str, ...]):
    secrets = ("jo.doe@example.com", "https://example.org/secret", "212-555-0123", "4111 1111 1111 1111", "203.0.113.9")
    texts = [f"{padding}My  data are {secret}, keep it." for secret in secrets for padding in ("", "x" * 30 + " ")]
    texts += [f"{secret}  and {secret}" for secret in secrets]
    for minimum in (0, 1000):
        for text in texts:
            report = json.dumps(clean(CleanConfig(rules=rules, min_characters=minimum), [text])[1].to_dict())
            assert not [secret for secret in secrets if secret in report or secret[:12] in report]
            assert "<" in report or "0" in report


@given(any_text)
@settings(max_examples=100, deadline=None)
def test_any_text_passes_every_rule(rules: dict[str, Callable], text: str):
    sound = text.encode("utf-8", errors="ignore").decode("utf-8")
    for name, rule in rules.items():
        rule(text)
        result = rule(sound)
        if isinstance(result, str):
            result.encode("utf-8")  # no lone surrogates
            if RULES[name].private:
                assert rule(result) == result  # a mask is nothing to mask


REPEATED = {
    "spaces": " ",
    "newlines": "\n",
    "spaces and lines": " \n",
    "parentheses": "(",
    "tags": "<p>",
    "less": "<",
    "addresses": "a@",
    "mails": "a@a.",
    "digits": "7",
    "phone-like": "+1 ",
    "grouped digits": "138-0",
    "dots": ".",
    "hyphens": "-",
    "colons": "2001:",
    "octets": "1.",
    "underscores": "_",
    "www": "www.",
    "https": "https://",
    "Chinese": "水",
    "full width": "Ａ",
    "zero": "\x00",
    "escapes": "\x1b[",
    "combining": "\u0316\u0301",
    "right to left": "שָ",
    "mojibake": "Ã¤",
    "quotes": "“",
    "traditional": "乾隆頭",
    "words": "ab ",
    "one word": "spam ",
    "bullets": "- ",
    "Thai": "ก",
}


@pytest.mark.parametrize("name", tiny.fast(RULES, *list(RULES)[::3]))
def test_work_grows_with_the_text_and_no_faster(rules: dict[str, Callable], name: str):
    """Four times the text takes about four times as long; the square would take sixteen times."""
    rule, slow = rules[name], {}
    for kind, unit in REPEATED.items():
        small = unit * (20_000 // len(unit))
        times = []
        for text in (small, small * 4):
            runs = []
            for _ in range(2):
                start = time.process_time()
                rule(text)
                runs.append(time.process_time() - start)
            times.append(min(runs))
        # What takes next to nothing is left out, for its noise; 80 kB in the square of something would not.
        if times[1] > 0.05 and times[1] > 9 * times[0]:
            slow[kind] = times
    assert not slow


def test_long_lines_of_everything_are_fine(everything: CleanConfig):
    text = "".join((ENGLISH, "\x00", CHINESE, "\u202e", "שָׁלוֹם", "e\u0301\u0301", " ")) * 2000
    results, _ = clean(CleanConfig(rules=tuple(r for r in RULES if not r.startswith("repeated"))[1:-2]), [text])
    assert results[0] is not None
    assert "\x00" not in results[0]
    assert "\n" not in results[0]
