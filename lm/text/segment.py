"""Chinese text to words: jieba, and matching of the longest words of a list; and how far two ways agree.

A segmenter cuts a text into words that joined are the text. It works on blocks, between which no word reaches, so that
a text may be cut between blocks.
"""

from __future__ import annotations

import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

from lm.errors import check, require
from lm.text.base import cut_before, read_text

# What jieba keeps together in one block; it cuts at every other character.
_JIEBA_BLOCK = r"\u4E00-\u9FD5a-zA-Z0-9+#&._%\-"
# Longer blocks are cut, for jieba's guessing of new words takes time that grows with their square.
_LONGEST_BLOCK = 4096


class Segmenter(ABC):
    """Cuts text into words. Instances may be sent to other processes."""

    @abstractmethod
    def words(self, text: str) -> list[str]:
        """The words of `text` in order; whitespace and punctuation are words too. Joined they are `text`."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """JSON-ready; `make_segmenter` makes an equal one of it."""

    @abstractmethod
    def pieces(self, text: str, size: int) -> Iterator[str]:
        """Cuts `text` at blocks, in pieces of `size` characters or more."""


class JiebaSegmenter(Segmenter):
    """jieba's accurate mode on a dictionary of its own, which nothing else in the process changes."""

    _BREAK = re.compile(rf"[^{_JIEBA_BLOCK}\n]")  # "\r\n" stays together
    _BLOCKS = re.compile(rf"[{_JIEBA_BLOCK}]{{1,{_LONGEST_BLOCK}}}|[^{_JIEBA_BLOCK}]+")
    _LONG = re.compile(rf"[{_JIEBA_BLOCK}]{{{_LONGEST_BLOCK + 1}}}")

    def __init__(self, *, hmm: bool = True, user_words: Mapping[str, int | None] | None = None):
        """Takes settings; the dictionary is read when the first text comes.

        Args:
          hmm: whether to guess words that the dictionary lacks.
          user_words: words to know besides, each with its frequency, or None for one that makes it a word.
        """
        self._version: str = _jieba().__version__
        self._hmm = hmm
        self._user_words = dict(user_words or {})
        self._cut: Callable[..., Iterator[str]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cut": None}

    def words(self, text: str) -> list[str]:
        """See `Segmenter`; as `jieba.lcut`, but for blocks of more than 4,096 characters, which are cut."""
        cut = self._cut = self._cut or _jieba_cut(self._user_words)
        if not self._LONG.search(text):
            return list(cut(text, HMM=self._hmm))
        return [word for block in self._BLOCKS.findall(text) for word in cut(block, HMM=self._hmm)]

    def settings(self) -> dict[str, Any]:
        """See `Segmenter`."""
        return {"name": "jieba", "version": self._version, "hmm": self._hmm, "user_words": self._user_words}

    def pieces(self, text: str, size: int) -> Iterator[str]:
        """See `Segmenter`."""
        return cut_before(self._BREAK, text, size)


class MaxMatch(Segmenter):
    """Longest words of a list, from the left, from the right, or the better of the two.

    Blocks are runs of letters, digits and whatever else the list's words contain. Where no word of the list begins
    (or ends, from the right), a run of ASCII letters and digits is a word, and so is any other single character.
    `bidirectional` takes of each block the cut with fewer words; of equals the one with fewer single characters, and
    else the one from the right, which errs less in Chinese.
    """

    def __init__(self, words: Iterable[str], *, direction: str = "bidirectional"):
        """Indexes the list. `direction`: forward, backward or bidirectional."""
        self._words = frozenset(words)
        self._direction = direction
        characters = set("".join(word for word in self._words if len(word) > 1))
        extra = {c for c in characters if not re.match(r"[\w\s]", c)}
        block = r"\w" + "".join(map(re.escape, sorted(extra)))
        self._blocks = re.compile(rf"[{block}]+|[^{block}]")
        self._break = re.compile(rf"[^{block}]")
        # The lengths of the words that begin (end) with two characters, longest first: most places have no entry.
        self._beginning = _lengths(self._words, slice(2)) if direction != "backward" else {}
        self._ending = _lengths(self._words, slice(-2, None)) if direction != "forward" else {}

    def words(self, text: str) -> list[str]:
        """See `Segmenter`."""
        found: list[str] = []
        for block in self._blocks.findall(text):
            if len(block) == 1:
                found.append(block)
            else:
                found += self._block(block)
        return found

    def _block(self, block: str) -> list[str]:
        if self._direction == "forward":
            return self._forward(block)
        backward = self._backward(block)
        if self._direction == "backward":
            return backward
        forward = self._forward(block)
        if len(forward) == len(backward):
            return forward if _singles(forward) < _singles(backward) else backward
        return min(forward, backward, key=len)

    def _forward(self, block: str) -> list[str]:
        found: list[str] = []
        words, lengths_at = self._words, self._beginning.get
        at, end = 0, len(block)
        while at < end:
            for length in lengths_at(block[at : at + 2], ()):
                word = block[at : at + length]
                if word in words:
                    break
            else:
                word = block[at]
                if word in _ASCII:
                    stop = at + 1
                    while stop < end and block[stop] in _ASCII:
                        stop += 1
                    word = block[at:stop]
            found.append(word)
            at += len(word)
        return found

    def _backward(self, block: str) -> list[str]:
        found: list[str] = []
        words, lengths_at = self._words, self._ending.get
        end = len(block)
        while end > 1:
            for length in lengths_at(block[end - 2 : end], ()):
                word = block[end - length if length < end else 0 : end]
                if word in words:
                    break
            else:
                word = block[end - 1]
                if word in _ASCII:
                    start = end - 1
                    while start and block[start - 1] in _ASCII:
                        start -= 1
                    word = block[start:end]
            found.append(word)
            end -= len(word)
        if end:
            found.append(block[0])
        found.reverse()
        return found

    def settings(self) -> dict[str, Any]:
        """See `Segmenter`."""
        return {"name": "maxmatch", "direction": self._direction, "words": sorted(self._words)}

    def pieces(self, text: str, size: int) -> Iterator[str]:
        """See `Segmenter`."""
        return cut_before(self._break, text, size)


_ASCII = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789")


def make_segmenter(settings: dict[str, Any]) -> Segmenter:
    """The segmenter that `Segmenter.settings` described.

    Raises:
      UserError: it was another version of jieba, which cuts by another dictionary.
      KeyError, TypeError: they describe no segmenter.
    """
    if settings["name"] == "jieba":
        made = JiebaSegmenter(hmm=settings["hmm"], user_words=settings["user_words"])
        installed = made.settings()["version"]
        check(
            installed == settings["version"],
            f"the tokenizer cuts words as jieba {settings['version']} does, and jieba {installed} is installed; "
            f"install the other: pip install jieba=={settings['version']}",
        )
        return made
    return MaxMatch(settings["words"], direction=settings["direction"])


def read_user_words(path: Path) -> dict[str, int | None]:
    """Words of a file in jieba's form, `WORD`, `WORD COUNT` or `WORD COUNT TAG` a line, with their counts.

    Raises:
      UserError: it cannot be read, is not UTF-8, or holds no word.
    """
    words: dict[str, int | None] = {}
    for fields in _fields(path, "tokenizer.user_words"):
        check(
            fields[1:2] != ["0"],
            f"tokenizer.user_words {path} gives {fields[0]!r} the count 0; raise it or leave the word out",
        )
        words[fields[0]] = int(fields[1]) if len(fields) > 1 and fields[1].isdecimal() else None
    return words


def read_word_list(path: Path | None) -> list[str]:
    """The first thing on each line of a file, sorted, each once; None = the words of jieba's dictionary.

    Raises:
      UserError: it cannot be read, is not UTF-8, or holds no word.
    """
    if path is None:
        return _jieba_words()
    return sorted({fields[0] for fields in _fields(path, "tokenizer.word_list")})


@dataclass(frozen=True)
class Agreement:
    """How far one segmentation agrees with another, over words that stand at the same place."""

    precision: float
    """Share of the words that are words of the reference too."""
    recall: float
    """Share of the reference's words that were found."""

    @property
    def f1(self) -> float:
        """Harmonic mean of the two."""
        both = self.precision + self.recall
        return 2 * self.precision * self.recall / both if both else 0.0


def agreement(segmenter: Segmenter, reference: Segmenter, texts: Iterable[str]) -> Agreement:
    """Compares the words of `texts` that hold a letter or digit; whitespace and punctuation don't count."""
    found = wanted = common = 0
    for text in texts:
        ours, theirs = _spans(segmenter.words(text)), _spans(reference.words(text))
        found, wanted, common = found + len(ours), wanted + len(theirs), common + len(ours & theirs)
    return Agreement(common / max(found, 1), common / max(wanted, 1))


def _spans(words: list[str]) -> set[tuple[int, int]]:
    ends = accumulate(map(len, words))
    return {(end - len(word), end) for word, end in zip(words, ends) if any(c.isalnum() for c in word)}


def _lengths(words: Iterable[str], key: slice) -> dict[str, tuple[int, ...]]:
    """The lengths, longest first, of the words of two characters or more that share a beginning or end."""
    found: dict[str, int] = {}  # a bit a length: a set each, of hundreds of thousands, takes seconds
    for word in words:
        if len(word) > 1:
            pair = word[key]
            found[pair] = found.get(pair, 0) | 1 << len(word)
    lengths = {bits: tuple(n for n in range(bits.bit_length() - 1, 1, -1) if bits >> n & 1) for bits in found.values()}
    return {pair: lengths[bits] for pair, bits in found.items()}


def _singles(words: list[str]) -> int:
    return sum(len(word) == 1 for word in words)


def _fields(path: Path, setting: str) -> list[list[str]]:
    lines = [line.split() for line in read_text(path.expanduser(), setting).split("\n")]
    found = [fields for fields in lines if fields]
    check(found, f"{setting} {path} holds no word; write one a line")
    return found


def _jieba() -> Any:
    with warnings.catch_warnings():  # Its patterns and its way to its data warn on newer Pythons.
        warnings.simplefilter("ignore")
        return require("jieba", extra="text", need="segmenting Chinese with jieba")


@cache
def _jieba_dictionary() -> tuple[Mapping[str, int], int]:
    """Frequencies of jieba's words and of their beginnings (0), and the sum of them; kept, for reading takes a second.

    Read from its text, not by `jieba.initialize`: that logs, and keeps a cache in the folder for temporary files,
    where anyone can put another.
    """
    with _jieba_dictionary_file().open("rb") as file:
        return _jieba().Tokenizer.gen_pfdict(file)


def _jieba_words() -> list[str]:
    """The words of jieba's dictionary, sorted; without their beginnings, which take most of the time to make."""
    lines = _jieba_dictionary_file().read_text(encoding="utf-8").splitlines()
    return sorted({word for word, count, *_ in (line.split(" ") for line in lines) if count != "0"})


def _jieba_dictionary_file() -> Path:
    jieba = _jieba()
    return Path(jieba.__file__).parent / jieba.DEFAULT_DICT_NAME


def _jieba_cut(user_words: Mapping[str, int | None]) -> Callable[..., Iterator[str]]:
    made = _jieba().Tokenizer()
    known, made.total = _jieba_dictionary()
    made.FREQ = {**known} if user_words else known  # nothing else writes to it
    made.initialized = True
    for word, count in user_words.items():
        made.add_word(word, count)
    return made.cut
