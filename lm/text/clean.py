"""Cleaning: small rules that change a document or drop it, listed in the settings, counted in a report.

Each rule is one row of `RULES`. To add one, write a function that takes the settings it reads, as keywords named like
the fields of `CleanConfig`, and returns `str -> str | Dropped`; then give it a row.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

from lm.errors import UserError, check, require
from lm.text import filters, mask, normalize
from lm.text.filters import Dropped
from lm.text.html import html
from lm.text.report import CleanReport, RuleReport

__all__ = ["RULES", "CleanConfig", "CleanReport", "Cleaner", "Dropped", "Rule", "check_clean_config"]


@dataclass(frozen=True, kw_only=True)
class CleanConfig:
    """Which rules clean the text, in which order, and their thresholds."""

    rules: tuple[str, ...] = ()
    """Rules in the order in which they are applied, of: html, mojibake, nfc, nfkc, control, halfwidth, simplified,
    whitespace, mask_urls, mask_emails, mask_phones, mask_ids, mask_ips, length, symbols, words, lines, repeated_lines,
    repeated_ngrams, language, blocked_words. None of them: text as it stands."""
    html_adverts: bool = False
    """html: keep what looks like an advert, a newsletter form or a list of other articles inside the article."""
    halfwidth_punctuation: bool = False
    """halfwidth: full-width punctuation and spaces too, which is how Chinese is written properly."""
    keep_indentation: bool = False
    """whitespace: leave the spaces at the beginning of lines, as source code needs them."""
    min_characters: int = 50
    """length: drop documents with fewer characters, spaces not counted."""
    max_characters: int | None = None
    """length: drop documents with more characters, spaces not counted."""
    max_symbol_ratio: float = 0.25
    """symbols: drop documents with a larger share of symbols among the characters that are no spaces."""
    max_hash_ratio: float = 0.1
    """symbols: drop documents with more hashes, or more ellipses, per word (Gopher)."""
    min_mean_word: float = 3.0
    """words: drop documents with shorter words on average, in characters (Gopher)."""
    max_mean_word: float = 10.0
    """words: drop documents with longer words on average, in characters (Gopher)."""
    min_alphabetic_words: float = 0.8
    """words: drop documents in which a smaller share of words has a letter (Gopher)."""
    max_bullet_lines: float = 0.9
    """lines: drop documents with a larger share of lines that begin with a bullet (Gopher)."""
    max_ellipsis_lines: float = 0.3
    """lines: drop documents with a larger share of lines that end in an ellipsis (Gopher)."""
    max_repeated_lines: float = 0.3
    """repeated_lines: drop documents with a larger share of lines, or of paragraphs, that repeat one (Gopher)."""
    max_repeated_line_characters: float = 0.2
    """repeated_lines: drop documents with a larger share of characters in such lines, or paragraphs (Gopher)."""
    max_top_ngram: float = 0.2
    """repeated_ngrams: drop documents with a larger share of characters in the most frequent pair of words; for three
    words in a row 0.9 of it, for four 0.8 (Gopher)."""
    max_repeated_ngrams: float = 0.15
    """repeated_ngrams: drop documents with a larger share of characters in five words in a row that occur again;
    falling to 2/3 of it for ten words (Gopher)."""
    languages: tuple[str, ...] = ()
    """language: keep documents in these languages only, by ISO 639-1 code such as en and zh."""
    min_language_confidence: float = 0.0
    """language: drop documents whose language is less certain, 0 to 1."""
    blocked_words: str | None = None
    """blocked_words: a UTF-8 file with a word or phrase on each line; upper and lower case are the same. Words are
    found whole, Chinese ones anywhere."""
    max_blocked_words: int = 0
    """blocked_words: drop documents in which they occur more often."""


RuleFunction = Callable[[str], "str | Dropped"]


@dataclass(frozen=True)
class Rule:
    """One row of the table of rules."""

    build: Callable[..., RuleFunction]
    """Makes the rule from the settings that it names as keywords; its docstring says what the rule does."""
    package: str | None = None
    """Import name of the optional package that the rule needs."""
    private: bool = False
    """Whether it masks personal data, which examples in reports then don't show either."""

    @property
    def options(self) -> tuple[str, ...]:
        """The fields of `CleanConfig` that the rule reads."""
        return tuple(inspect.signature(self.build).parameters)

    @property
    def summary(self) -> str:
        """What the rule does, in a sentence."""
        return (inspect.getdoc(self.build) or "").split("\n\n")[0].replace("\n", " ")


RULES: dict[str, Rule] = {
    "html": Rule(html, package="trafilatura"),
    "mojibake": Rule(normalize.mojibake, package="ftfy"),
    "nfc": Rule(normalize.nfc),
    "nfkc": Rule(normalize.nfkc),
    "control": Rule(normalize.control),
    "halfwidth": Rule(normalize.halfwidth),
    "simplified": Rule(normalize.simplified, package="opencc"),
    "whitespace": Rule(normalize.whitespace),
    "mask_urls": Rule(mask.mask_urls, private=True),
    "mask_emails": Rule(mask.mask_emails, private=True),
    "mask_phones": Rule(mask.mask_phones, private=True),
    "mask_ids": Rule(mask.mask_ids, private=True),
    "mask_ips": Rule(mask.mask_ips, private=True),
    "length": Rule(filters.length),
    "symbols": Rule(filters.symbols),
    "words": Rule(filters.words),
    "lines": Rule(filters.lines),
    "repeated_lines": Rule(filters.repeated_lines),
    "repeated_ngrams": Rule(filters.repeated_ngrams),
    "language": Rule(filters.language, package="py3langid"),
    "blocked_words": Rule(filters.blocked_words),
}

_SHARES = (
    "max_symbol_ratio",
    "max_hash_ratio",
    "min_alphabetic_words",
    "max_bullet_lines",
    "max_ellipsis_lines",
    "max_repeated_lines",
    "max_repeated_line_characters",
    "max_top_ngram",
    "max_repeated_ngrams",
    "min_language_confidence",
)
_NOT_NEGATIVE = ("min_characters", "max_characters", "min_mean_word", "max_mean_word", "max_blocked_words")


def check_clean_config(config: CleanConfig) -> None:
    """Raises `UserError` if `config` cannot be carried out."""
    for name in config.rules:
        if name not in RULES:
            close = difflib.get_close_matches(name, RULES, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise UserError(f"clean.rules has {name!r}{hint}; the rules are {', '.join(RULES)}")
        check(config.rules.count(name) == 1, f"clean.rules lists {name} twice; once is enough")
    check("html" not in config.rules[1:], "clean.rules has html after other rules; it reads markup, so it comes first")
    _check_options(config)
    for name in config.rules:
        if package := RULES[name].package:
            require(package, extra="text", need=f"the cleaning rule {name}")
    if "language" in config.rules:
        check(
            config.languages, "clean.rules has language, but clean.languages is empty; list those to keep, such as en"
        )
        _check_languages(config.languages)
    if "blocked_words" in config.rules:
        check(config.blocked_words, "clean.rules has blocked_words, but clean.blocked_words names no file")
        filters.read_blocked_words(Path(str(config.blocked_words)))


def _check_options(config: CleanConfig) -> None:
    """Thresholds are in range, and nothing is set that no listed rule reads."""
    read = {option for name in config.rules for option in RULES[name].options}
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name != "rules" and field.name not in read and value != field.default:
            readers = " or ".join(name for name, rule in RULES.items() if field.name in rule.options)
            raise UserError(
                f"clean.{field.name} is {value!r}, but {readers}, which reads it, is not in clean.rules; "
                "list the rule or leave the setting out"
            )
        if field.name in _SHARES:
            check(0 <= value <= 1, f"clean.{field.name} is {value}; it is a share, from 0 to 1")
        if field.name in _NOT_NEGATIVE and value is not None:
            check(value >= 0, f"clean.{field.name} is {value}; it must not be negative")
    for low, high in (("min_characters", "max_characters"), ("min_mean_word", "max_mean_word")):
        least, most = getattr(config, low), getattr(config, high)
        check(most is None or least <= most, f"clean.{low} is {least}, more than clean.{high}, which is {most}")


def _check_languages(wanted: tuple[str, ...]) -> None:
    from lm.text.language import languages

    known = languages()
    for code in wanted:
        if code not in known:
            close = difflib.get_close_matches(code.lower(), sorted(known), 1, cutoff=0.5)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise UserError(
                f"clean.languages has {code!r}{hint}; write ISO 639-1 codes, such as en, zh, de, fr, ja "
                f"({len(known)} languages are known)"
            )


class Cleaner:
    """Applies the rules of a `CleanConfig` to one document after the other and keeps count.

    Build one in each worker process from the config, which can be sent there, and merge the reports of consecutive
    pieces with `CleanReport.merge`.
    """

    report: CleanReport
    """What was done so far."""

    def __init__(self, config: CleanConfig):
        """Builds the rules. Raises `UserError` as `check_clean_config` does."""
        check_clean_config(config)
        self._rules = [
            (name, RULES[name].build(**{option: getattr(config, option) for option in RULES[name].options}))
            for name in config.rules
        ]
        self._masks = [rule for name, rule in self._rules if RULES[name].private]
        self.report = CleanReport(rules={name: RuleReport() for name in config.rules})

    def __call__(self, text: str) -> str | None:
        """What the rules make of a document; None if one of them drops it, or leaves nothing of it."""
        report = self.report
        report.documents += 1
        report.characters_in += len(text)
        result = text
        for name, rule in self._rules:
            passed = self._apply(name, rule, result)
            if passed is None:
                return None
            result = passed
        report.kept += 1
        report.changed += result != text
        report.characters_out += len(result)
        return result

    def _hide(self, text: str) -> str:
        """Masks what the report must not tell, whatever the rule that the example is of."""
        for mask_rule in self._masks:
            text = str(mask_rule(text))
        return text

    def _apply(self, name: str, rule: RuleFunction, text: str) -> str | None:
        counts = self.report.rules[name]
        counts.seen += 1
        counts.characters_in += len(text)
        result = rule(text)
        if not result:
            result = Dropped("empty")
        if isinstance(result, Dropped):
            counts.add_drop(text, result.reason, hide=self._hide)
            return None
        counts.characters_out += len(result)
        if result != text:
            counts.add_change(text, result, hide=self._hide, private=RULES[name].private)
        return result
