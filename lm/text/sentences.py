"""A document as sentences and a sentence as words, to alter them: joined again, nothing is lost.

A word is a run of letters and digits with their combining marks, and what holds them together: `don't`, `3.14`. In
Chinese and Japanese, which put no spaces, it is a character, or a word as jieba finds it. Other scripts without spaces,
such as Thai, are not cut into words: what stands between spaces counts as one.
"""

from __future__ import annotations

import functools
import itertools
import re
import unicodedata

from lm.text.scripts import HAN, KANA
from lm.text.segment import JiebaSegmenter

Sentence = tuple[str, str]
"""What it says; its full stop and the white space behind it."""

_LONGEST = 4096  # characters; text without a full stop is cut, so that memory stays bounded
_UNSPACED = f"々〇{KANA}{HAN}"
_IS_UNSPACED = re.compile(f"[{_UNSPACED}]")
_CLOSING = "\"')\\]”’」』）】》"
# Every branch begins where a run begins and never backs up, so that a megabyte of dots takes linear time.
_END = re.compile(rf"(?<![.!?])[.!?]++[{_CLOSING}]*+(?:\s++|\Z)|[。！？…]++[{_CLOSING}]*+\s*+|\n\s*+")


def is_unspaced(word: str) -> bool:
    """Whether a word is of a script that puts no spaces: Chinese characters and kana."""
    return _IS_UNSPACED.match(word) is not None


class Sentences:
    """Cuts documents into sentences and sentences into words.

    Args:
      words: whether Chinese is cut into jieba's words, and not into characters.

    Raises:
      UserError: jieba is asked for and not installed.
    """

    def __init__(self, *, words: bool):
        self._segmenter = JiebaSegmenter() if words else None
        self._unit = re.compile(rf"([{_UNSPACED}]{'++' if words else ''}|{_spaced_word()})")

    def of(self, text: str) -> list[Sentence]:
        """The sentences of a document; what holds no word at all belongs to the end of the sentence before."""
        sentences: list[Sentence] = []
        start = 0
        for found in _END.finditer(text):
            self._add(sentences, text[start : found.start()], found.group())
            start = found.end()
        self._add(sentences, text[start:], "")
        return sentences

    def _add(self, sentences: list[Sentence], body: str, end: str) -> None:
        start = 0
        while len(body) - start > _LONGEST:
            cut = body.rfind(" ", start + 1, start + _LONGEST)
            cut = start + _LONGEST if cut < 0 else cut
            sentences.append((body[start:cut], ""))
            start = cut
        body = body[start:]
        if sentences and not self._unit.search(body):
            before, its_end = sentences.pop()
            sentences.append((before, its_end + body + end))
        elif body or end:
            sentences.append((body, end))

    def parts(self, body: str) -> list[str]:
        """What a sentence says: words at odd places, at even ones what stands around them, empty where nothing does."""
        parts = self._unit.split(body)
        if self._segmenter is None:
            return parts
        finer = parts[:1]
        for unit, gap in zip(parts[1::2], parts[2::2], strict=True):
            for word in self._segmenter.words(unit) if is_unspaced(unit) else [unit]:
                finer += [word, ""]
            finer[-1] = gap
        return finer


@functools.cache
def combining_marks() -> str:
    """Characters that belong to the letter before them, as the inside of a regular expression's `[...]`."""
    marks = [i for i in range(0x20000) if unicodedata.category(chr(i)) in ("Mn", "Mc")]
    runs = [list(run) for _, run in itertools.groupby(enumerate(marks), lambda pair: pair[1] - pair[0])]
    return "".join(f"{chr(run[0][1])}-{chr(run[-1][1])}" for run in runs)


@functools.cache
def _spaced_word() -> str:
    """The pattern of one word of a script that puts spaces."""
    letter = rf"[^\W_{_UNSPACED}]"
    part = rf"{letter}(?:{letter}|[{combining_marks()}])*+"
    return rf"{part}(?:['’.-]{part})*+"
