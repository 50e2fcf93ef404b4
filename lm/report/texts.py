"""Text of unknown origin, made safe to look at: nothing in it is invisible or moves what stands around it."""

from __future__ import annotations

import difflib
import re
import unicodedata
from typing import Literal

from lm.report.page import Html, element, join
from lm.text.scripts import HAN, KANA, SOUTHEAST_ASIAN

Unit = Literal["character", "word", "mask"]

# Part of how Persian, Hindi, Hebrew and emoji are spelled: joiners, and the marks LRM and RLM.
_SPELLING = {"\u200c", "\u200d", "\u200e", "\u200f"}
_HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # categories without a glyph of their own
_DRAWN = re.compile("[\u0600-\u0605\u06dd\u070f\u0890\u0891\u08e2\U000110bd\U000110cd]")  # but these of Cf have one
_SPACES = {" ": "·", "\t": "⇥", "\n": "↵\n"}
# A run of letters and digits, or one character: of scripts without spaces between words, and whatever else there is.
_UNSPACED = SOUTHEAST_ASIAN + KANA + HAN
_PIECES: dict[Unit, re.Pattern[str]] = {
    "character": re.compile(".", re.DOTALL),
    "word": re.compile(f"[^\\W_{_UNSPACED}]+|.", re.DOTALL),
    "mask": re.compile("<[A-Z]+>|.", re.DOTALL),
}


def shown(text: str) -> Html:
    """`text` within a line, kept apart from the direction of what is around it; hidden characters by name."""
    return element("bdi", _visible(text, spaces=False))


def excerpt(text: str, *, cut: int | None = None) -> Html:
    """`text` as a block of its own, with its line breaks; an ellipsis follows if it has `cut` characters or more."""
    return _block([_visible(text, spaces=False)], text, cut)


def differences(before: str, after: str, *, by: Unit, cut: int) -> tuple[Html, Html]:
    """Two texts as blocks, with what differs marked in both; spaces are made visible there.

    Args:
      before: one text, the beginning or a piece of something.
      after: the other.
      by: what is compared. A changed "character" marks itself, or the "word" that it is in. "mask" compares
        characters too, but `before` has x for every letter and 0 for every digit, and names such as <URL> are one.
      cut: so many characters were kept of the longer texts. What follows where the other text was cut is no
        difference.
    """
    old, new = _PIECES[by].findall(before), _PIECES[by].findall(after)
    marked: tuple[list[Html], list[Html]] = ([], [])
    for tag, i, j, m, n in _operations(old, [_masked(piece) for piece in new] if by == "mask" else new):
        at_end = j == len(old) and n == len(new)
        beyond = at_end and ((tag == "insert" and len(before) >= cut) or (tag == "delete" and len(after) >= cut))
        for parts, piece in ((marked[0], "".join(old[i:j])), (marked[1], "".join(new[m:n]))):
            if tag == "equal" or beyond:
                parts.append(_visible(piece, spaces=False))
            elif piece:
                parts.append(element("mark", _visible(piece, spaces=True)))
    return _block(marked[0], before, cut), _block(marked[1], after, cut)


def _operations(old: list[str], new: list[str]) -> list[tuple[str, int, int, int, int]]:
    """difflib's, for what follows the beginning that both share; it would look for the longest match anywhere."""
    start = 0
    while start < min(len(old), len(new)) and old[start] == new[start]:
        start += 1
    codes = difflib.SequenceMatcher(None, old[start:], new[start:], autojunk=False).get_opcodes()
    return [
        ("equal", 0, start, 0, start),
        *((tag, i + start, j + start, m + start, n + start) for tag, i, j, m, n in codes),
    ]


def _masked(piece: str) -> str:
    """A character as `lm.text.report` shows it of what a mask replaced; longer pieces as they are."""
    if len(piece) > 1:
        return piece
    return "0" if piece.isdigit() else "x" if piece.isalpha() else piece


def _block(parts: list[Html], text: str, cut: int | None) -> Html:
    more = element("span", "…", class_="more") if cut is not None and len(text) >= cut else None
    return element("div", *parts, more, class_="excerpt", dir="auto")


def _visible(text: str, *, spaces: bool) -> Html:
    """Characters that can't be seen by their code, such as U+200B; the rest as it is. `spaces`: spaces too."""
    parts: list[str | Html] = []
    for char in text:
        if spaces and char in _SPACES:
            parts.append(_SPACES[char])
        elif is_hidden(char, spaces):
            parts.append(element("span", f"U+{ord(char):04X}", class_="code", title=unicodedata.name(char, "control")))
        else:
            parts.append(char)
    return join(parts)


def is_hidden(char: str, spaces: bool) -> bool:
    """Whether a character can't be seen, or moves what stands around it. `spaces`: spaces matter."""
    if unicodedata.category(char) in _HIDDEN:
        return not (char in "\n\t" or _DRAWN.match(char) or (char in _SPELLING and not spaces))
    if char.isspace():  # other than a plain space: seen only where it matters
        return spaces
    code = ord(char)
    return code & 0xFFFE == 0xFFFE or 0xFDD0 <= code <= 0xFDEF
