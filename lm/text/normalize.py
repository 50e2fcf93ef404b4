"""Rules that change how text is written, not what it says: Unicode forms, mojibake, control characters, spaces.

Each function takes the settings it reads and returns a rule, `str -> str`. Those without settings are rules themselves.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Literal

from lm.errors import require

_LONG_RUN = 30
_JOINER = "\u034f"


def nfc() -> Callable[[str], str]:
    """Unicode normal form C: one spelling for what looks the same."""
    return _normal_form("NFC")


def nfkc() -> Callable[[str], str]:
    """Unicode normal form KC: compatibility characters too, so that ，becomes a comma, ① a 1 and ﬁ two letters."""
    return _normal_form("NFKC")


def mojibake() -> Callable[[str], str]:
    """Undoes text that was decoded with the wrong codec, such as schÃ¶n for schön; nothing else is changed."""
    ftfy = require("ftfy", extra="text", need="the cleaning rule mojibake")
    config = ftfy.TextFixerConfig(
        unescape_html=False,
        remove_terminal_escapes=False,
        fix_latin_ligatures=False,
        fix_character_width=False,
        uncurl_quotes=False,
        fix_line_breaks=False,
        remove_control_chars=False,
        normalization=None,
        explain=False,
    )

    def rule(text: str) -> str:
        return text if text.isascii() else ftfy.fix_text(text, config)

    return rule


_TERMINAL = re.compile(r"\x1b(?:\[[0-?]{0,40}[ -/]{0,9}[@-~]|[@-Z\\-_])")
_LINE_ENDS = re.compile(r"\r\n?|[\v\f\x1c-\x1e\x85\u2028\u2029]")
# C0 and C1 controls but tab and newline; soft hyphen, zero-width space, word joiner, byte order mark; bidirectional
# embeddings and overrides; halves of surrogate pairs; what Unicode says is no character. Joiners (ZWJ, ZWNJ) and the
# marks LRM and RLM are part of how Persian, Hindi, Hebrew and emoji are spelled, and stay.
_CONTROLS = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x9f\xad\u200b\u2060\ufeff\u202a-\u202e\u2066-\u2069\ufff9-\ufffb"
    "\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff\U0001fffe\U0001ffff\U000e0001]"
)


def control() -> Callable[[str], str]:
    """Removes control and invisible characters and terminal colours; every kind of line end becomes a newline."""

    def rule(text: str) -> str:
        if "\x1b" in text:
            text = _TERMINAL.sub("", text)
        return _CONTROLS.sub("", _LINE_ENDS.sub("\n", text))

    return rule


# White space, controls, and what has no width or glyph of its own (Unicode's Default_Ignorable_Code_Point).
_NOTHING_TO_SEE = re.compile(
    "[\\s\x00-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f"
    "\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]*"
)


def is_blank(text: str) -> bool:
    """Whether nothing of a text could be seen: it is empty, or all spaces, controls and characters without width."""
    return _NOTHING_TO_SEE.fullmatch(text) is not None


_WIDE_ALPHANUMERIC = {wide: wide - 0xFEE0 for wide in range(0xFF01, 0xFF5F) if chr(wide - 0xFEE0).isalnum()}
_WIDE_ALL = {wide: wide - 0xFEE0 for wide in range(0xFF01, 0xFF5F)} | {0x3000: 0x20}
_WIDE = re.compile("[\uff01-\uff5e\u3000]+")


def halfwidth(*, halfwidth_punctuation: bool) -> Callable[[str], str]:
    """Full-width letters and digits become plain ones; Chinese punctuation stays unless asked for."""
    table = _WIDE_ALL if halfwidth_punctuation else _WIDE_ALPHANUMERIC

    def rule(text: str) -> str:
        return _WIDE.sub(lambda match: match[0].translate(table), text)

    return rule


def simplified() -> Callable[[str], str]:
    """Traditional Chinese characters become simplified ones, by OpenCC's tables (phrases first, then characters)."""
    phrases, characters = _opencc_tables()
    pattern = re.compile("|".join(sorted(map(re.escape, phrases), key=len, reverse=True)))

    def rule(text: str) -> str:
        if text.isascii():
            return text
        pieces, end = [], 0
        for match in pattern.finditer(text):
            pieces += [text[end : match.start()].translate(characters), phrases[match[0]]]
            end = match.end()
        return "".join([*pieces, text[end:].translate(characters)])

    return rule


_SPACES = re.compile(r"[^\S\n]+")
_LINE_EDGES = re.compile(r" ?\n ?")
_BLANK_LINES = re.compile(r"\n{3,}")
_INNER_SPACES = re.compile(r"(?<=\S)[^\S\n]+")
_TRAILING = re.compile(r"(?<=\S)[^\S\n]+(?=\n)")


def whitespace(*, keep_indentation: bool) -> Callable[[str], str]:
    """One space between words, none at the ends of lines, at most one blank line in a row."""

    def rule(text: str) -> str:
        text = _LINE_ENDS.sub("\n", text)
        if keep_indentation:
            lines = (line.rstrip() for line in text.split("\n"))
            text = _INNER_SPACES.sub(" ", "\n".join(lines))
            return _BLANK_LINES.sub("\n\n", text).strip("\n")
        text = _LINE_EDGES.sub("\n", _SPACES.sub(" ", text))
        return _BLANK_LINES.sub("\n\n", text).strip()

    return rule


def _normal_form(form: Literal["NFC", "NFKC"]) -> Callable[[str], str]:
    combining, long_run = _combining()

    def rule(text: str) -> str:
        if text.isascii():
            return text
        # Sorting a run of combining characters takes the square of its length, so that runs are first broken as in
        # Unicode's stream-safe text format (UAX #15): a grapheme joiner after every 30. No language comes near that.
        # Looking at every 30th character is enough to know that there is none.
        if combining.search(text[::_LONG_RUN]):
            text = long_run.sub(lambda match: match[0] + _JOINER, text)
        return text if unicodedata.is_normalized(form, text) else unicodedata.normalize(form, text)

    return rule


@cache
def _combining() -> tuple[re.Pattern[str], re.Pattern[str]]:
    """A combining character; and as many of them as may follow each other, with one more to come."""
    chars = "".join(chr(code) for code in range(0x20000) if unicodedata.combining(chr(code)))
    return re.compile(f"[{chars}]"), re.compile(f"[{chars}]{{{_LONG_RUN}}}(?=[{chars}])")


@cache
def _opencc_tables() -> tuple[dict[str, str], dict[int, str]]:
    """Phrases and characters, traditional to simplified, from the package's dictionaries.

    Its own converter walks a tree of substrings in Python, at half a megabyte a second.
    """
    opencc = require("opencc", extra="text", need="the cleaning rule simplified")
    folder = Path(str(opencc.__file__)).parent / "dictionary"
    phrases, characters = (
        dict(line.split("\t") for line in (folder / name).read_text(encoding="utf-8").splitlines() if line)
        for name in ("TSPhrases.txt", "TSCharacters.txt")
    )
    # Of several possibilities the first is the usual one.
    phrases = {key: value.split(" ")[0] for key, value in phrases.items()}
    return phrases, {ord(key): value.split(" ")[0] for key, value in characters.items()}
