"""Augmentation: altered copies of training documents, to stretch a small corpus.

A document is taken as sentences, a sentence as words: runs of letters and digits, and in Chinese and Japanese single
characters or jieba's words. The operations that are listed are applied one after another, in the order of the list:

- `replace`: a word or phrase of the user's table becomes another of its set (synonyms, a class such as cities);
- `delete`: a word is left out; each sentence keeps at least one;
- `swap`: a word changes places with another one of its sentence;
- `splice`: the end of a sentence is replaced by the end of another sentence of the document;
- `split`: a sentence becomes two;
- `typos`: a word with Latin letters gets one slip of the keyboard: a neighbouring, doubled, missing or transposed key.

What a copy becomes is a function of (settings, document, key, number of the copy) and of nothing else.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import itertools
import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from lm.errors import UserError, check
from lm.text.base import read_text
from lm.text.segment import JiebaSegmenter
from lm.text.sentences import Sentence, Sentences, is_unspaced

Operation = Literal["replace", "delete", "swap", "splice", "split", "typos"]

VERSION = 1
"""Counted up when the same settings give other copies."""

_ATTEMPTS = 8  # draws for one copy, until it differs from what is there
_SEAM = re.compile(r"[\s,;:，、；：—-]*+")  # between words where a sentence may be cut
_COMMAS = ",;:)]”’"


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Altered copies of training documents; validation and test text is never touched."""

    copies: int = 0
    """Altered copies added behind each training document; 0 adds none."""
    operations: tuple[Operation, ...] = ("delete", "swap")
    """Applied to every copy in this order: replace, delete, swap, splice, split, typos."""
    rate: float = 0.1
    """Chance of each word (splice and split: of each sentence) to be altered by each operation."""
    table: str | None = None
    """File for `replace`: a line of tab-separated words per set, or JSON (.json): a list of lists, or name to list."""
    chinese: Literal["characters", "words"] = "characters"
    """What is altered as one word in Chinese: a character, or a word as jieba finds it."""
    seed: int = 0
    """Seed of everything that is drawn."""


def check_augment_config(config: AugmentConfig) -> None:
    """Raises UserError if a setting is out of range, contradicts another or names a table that cannot be used."""
    check(config.copies >= 0, f"augment.copies is {config.copies}; it must be 0 (no augmentation) or more")
    if config.copies == 0:
        changed = [f.name for f in fields(config) if getattr(config, f.name) != f.default]
        check(
            not changed,
            f"augment.{changed[0] if changed else ''} is set, but augment.copies is 0; set augment.copies to 1 or more",
        )
        return
    known = get_args(Operation)
    check(config.operations, f"augment.operations is empty; list some of {', '.join(known)}")
    for operation in config.operations:
        check(operation in known, f"augment.operations has {operation!r}; allowed are {', '.join(known)}")
    twice = [name for name in known if config.operations.count(name) > 1]
    check(not twice, f"augment.operations lists {', '.join(twice)} more than once; list each operation once")
    check(0 < config.rate <= 1, f"augment.rate is {config.rate}; it must be above 0 and at most 1")
    check(
        config.chinese in ("characters", "words"),
        f"augment.chinese is {config.chinese!r}; it must be characters or words",
    )
    if "replace" in config.operations:
        check(config.table is not None, "augment.operations has replace; give it augment.table, a file of word sets")
        assert config.table is not None
        read_table(Path(config.table))
    else:
        check(
            config.table is None,
            f"augment.table is {config.table!r}, which only replace uses; add replace to augment.operations",
        )
    if config.chinese == "words":
        Sentences(words=True)


def augment_fingerprint(config: AugmentConfig) -> dict[str, Any]:
    """What decides the copies, JSON-ready: the settings, with the table's content instead of its name.

    Without copies it is empty. Raises UserError if the table cannot be read.
    """
    if config.copies == 0:
        return {}
    values = {f.name: getattr(config, f.name) for f in fields(config)}
    if config.table is not None:
        table = json.dumps(read_table(Path(config.table)), ensure_ascii=True)
        values["table"] = hashlib.blake2b(table.encode(), digest_size=16).hexdigest()
    values["operations"] = list(config.operations)
    if config.chinese == "words":
        values["segmenter"] = JiebaSegmenter().settings()
    return {"version": VERSION, **values}


class Augmenter:
    """Makes altered copies of documents.

    Raises:
      UserError: as `check_augment_config`.
    """

    def __init__(self, config: AugmentConfig):
        check_augment_config(config)
        self.config = config
        self._sentences = Sentences(words=config.chinese == "words")
        operations: dict[Operation, Callable[[], _Operation]] = {
            "replace": lambda: _Replace(read_table(Path(config.table or ""))),
            "delete": lambda: _each(_delete),
            "swap": lambda: _each(_swap),
            "splice": lambda: _splice,
            "split": lambda: _split,
            "typos": lambda: _each(_typos),
        }
        self._operations = [operations[name]() for name in config.operations]

    def __call__(self, text: str, key: str) -> list[str]:
        """Altered copies of a document.

        Args:
          text: the document.
          key: its key; two documents of one text and different keys get different copies.

        Returns:
          `config.copies` texts, fewer where the document offers too little to alter: none equals the document or an
          earlier copy, as that would only repeat it.
        """
        copies = [text]
        for number in range(1, self.config.copies + 1):
            for attempt in range(_ATTEMPTS):
                copy = self._copy(text, _Chance(self.config.rate, self.config.seed, key, number, attempt))
                if copy not in copies:
                    copies.append(copy)
                    break
        return copies[1:]

    def _copy(self, text: str, chance: _Chance) -> str:
        for operation in self._operations:
            # Parsed anew each time: an operation may move what sentences and words are.
            text = "".join(body + end for body, end in operation(self._sentences.of(text), chance, self._sentences))
        return text


class _Chance:
    """Numbers drawn from a name. Of `random.Random` only `random()` is used: the one promised to stay as it is."""

    def __init__(self, rate: float, *name: object):
        written = "\0".join(map(str, name)).encode("utf-8", errors="surrogatepass")
        self._rate = rate
        self._random = random.Random(int.from_bytes(hashlib.blake2b(written, digest_size=16).digest())).random

    def hit(self) -> bool:
        """True at `rate`."""
        return self._random() < self._rate

    def below(self, n: int) -> int:
        """An integer of `[0, n)`."""
        return min(int(self._random() * n), n - 1)


_Operation = Callable[[Sequence[Sentence], _Chance, Sentences], list[Sentence]]


def _each(alter: Callable[[list[str], _Chance], None]) -> _Operation:
    """An operation that alters the parts of one sentence at a time."""

    def operation(sentences: Sequence[Sentence], chance: _Chance, reader: Sentences) -> list[Sentence]:
        altered = []
        for body, end in sentences:
            parts = reader.parts(body)
            alter(parts, chance)
            altered.append(("".join(parts), end))
        return altered

    return operation


def _delete(parts: list[str], chance: _Chance) -> None:
    left = len(parts) // 2
    for at in reversed(range(1, len(parts), 2)):
        if left > 1 and chance.hit():
            before, after = parts[at - 1], parts[at + 1]
            # One of the two spaces around the word goes with it; none stays before a comma or the full stop.
            if (not before or before[-1].isspace()) and after[:1].isspace():
                after = after[1:]
            elif after[:1] in _COMMAS if after else at + 2 == len(parts):
                before = before.rstrip()
            parts[at - 1 : at + 2] = [before + after]
            left -= 1


def _swap(parts: list[str], chance: _Chance) -> None:
    n = len(parts) // 2
    for i in range(n):
        if n > 1 and chance.hit():
            j = chance.below(n - 1)
            j += j >= i
            parts[2 * i + 1], parts[2 * j + 1] = parts[2 * j + 1], parts[2 * i + 1]


def _splice(sentences: Sequence[Sentence], chance: _Chance, reader: Sentences) -> list[Sentence]:
    altered = list(sentences)
    for i, (body, end) in enumerate(sentences):
        if len(sentences) > 1 and chance.hit():
            j = chance.below(len(sentences) - 1)
            head, tail = reader.parts(body), reader.parts(sentences[j + (j >= i)][0])
            n, m = len(head) // 2, len(tail) // 2
            if n > 1 and m > 1:
                kept, skipped = 1 + chance.below(n - 1), 1 + chance.below(m - 1)
                altered[i] = ("".join(head[: 2 * kept] + tail[2 * skipped :]), end)
    return altered


def _split(sentences: Sequence[Sentence], chance: _Chance, reader: Sentences) -> list[Sentence]:
    altered = []
    for body, end in sentences:
        if not chance.hit():
            altered.append((body, end))
            continue
        parts = reader.parts(body)
        seams = [at for at in range(2, len(parts) - 1, 2) if _SEAM.fullmatch(parts[at])]
        if not seams:
            altered.append((body, end))
            continue
        at = seams[chance.below(len(seams))]
        rest = "".join(parts[at + 1 :])
        if is_unspaced(parts[at - 1]):
            stop = "。"
        else:
            # As the text does it: tokenised text has a space before its full stops, and maybe no capitals.
            stop = " . " if body[-1:].isspace() else ". "
            if parts[1][0].isupper():
                rest = rest[0].upper() + rest[1:]
        altered += [("".join(parts[:at]), stop), (rest, end)]
    return altered


def _typos(parts: list[str], chance: _Chance) -> None:
    for at in range(1, len(parts), 2):
        letters = [i for i, letter in enumerate(parts[at]) if letter.isascii() and letter.isalpha()]
        if letters and chance.hit():
            parts[at] = _typo(parts[at], letters[chance.below(len(letters))], chance)


def _typo(word: str, at: int, chance: _Chance) -> str:
    letter = word[at]
    kind = chance.below(4)
    if kind == 1:
        return word[:at] + letter + word[at:]
    if kind == 2 and len(word) > 1:
        return word[:at] + word[at + 1 :]
    if kind == 3 and at + 1 < len(word) and word[at + 1] != letter:
        return word[:at] + word[at + 1] + letter + word[at + 2 :]
    keys = _neighbours()[letter.lower()]
    key = keys[chance.below(len(keys))]
    return word[:at] + (key.upper() if letter.isupper() else key) + word[at + 1 :]


@functools.cache
def _neighbours() -> dict[str, str]:
    """The letters whose keys touch a letter's key on a QWERTY keyboard, whose rows are shifted a little."""
    place = {
        letter: (row, column + shift)
        for row, (letters, shift) in enumerate([("qwertyuiop", 0.0), ("asdfghjkl", 0.25), ("zxcvbnm", 0.75)])
        for column, letter in enumerate(letters)
    }
    return {
        a: "".join(b for b in place if b != a and abs(place[a][0] - place[b][0]) <= 1 and abs(x - place[b][1]) <= 1)
        for a, (_, x) in place.items()
    }


class _Replace:
    """The operation `replace`: at each place the longest entry that covers whole words."""

    def __init__(self, table: Sequence[Sequence[str]]):
        others: dict[str, dict[str, None]] = {}  # dicts, as they keep the order of the table
        self._spelled: set[str] = set()
        for words in table:
            for word in words:
                others.setdefault(_lower(word), {}).update(dict.fromkeys(words))
                self._spelled.add(word)
        self._others = {
            word: tuple(other for other in found if _lower(other) != word) for word, found in others.items()
        }
        lengths: dict[str, set[int]] = {}
        for word in self._others:
            lengths.setdefault(word[0], set()).add(len(word))
        self._lengths = {first: sorted(found, reverse=True) for first, found in lengths.items()}

    def __call__(self, sentences: Sequence[Sentence], chance: _Chance, reader: Sentences) -> list[Sentence]:
        return [(self._replace(body, reader.parts(body), chance), end) for body, end in sentences]

    def _replace(self, body: str, parts: list[str], chance: _Chance) -> str:
        edges = [0, *itertools.accumulate(map(len, parts))]
        starts, stops = edges[1:-1:2], edges[2::2]  # of words
        lowered = _lower(body)
        pieces, copied = [], 0
        for start in starts:
            if start < copied:
                continue
            for length in self._lengths.get(lowered[start], ()):
                stop = start + length
                last = bisect.bisect_left(starts, stop) - 1
                others = self._others.get(lowered[start:stop])
                if others is not None and stops[last] <= stop:
                    if chance.hit():
                        other = others[chance.below(len(others))]
                        pieces += [body[copied:start], self._in_case_of(body[start:stop], other)]
                    else:
                        pieces.append(body[copied:stop])
                    copied = stop
                    break
        return "".join([*pieces, body[copied:]])

    def _in_case_of(self, found: str, other: str) -> str:
        """`other` with the capitals of `found`, unless the table itself spells it so."""
        if found in self._spelled:
            return other
        if len(found) > 1 and found.isupper():
            return other.upper()
        return other[0].upper() + other[1:] if found[0].isupper() else other


def _lower(text: str) -> str:
    """Lower case of the same length, so that places in it are places in the text."""
    lowered = text.lower()
    return lowered if len(lowered) == len(text) else "".join(c.lower() if len(c.lower()) == 1 else c for c in text)


def read_table(path: Path) -> list[list[str]]:
    """The sets of words of a table, in its order.

    Raises:
      UserError: no such file, not UTF-8, not of the form, or a set of fewer than two words.
    """
    text = read_text(path, "augment.table")
    if path.suffix == ".json":
        sets = _json_sets(path, text)
    else:
        sets = [
            (f"line {number}", [word.strip() for word in line.split("\t")])
            for number, line in enumerate(text.split("\n"), start=1)
            if line.strip()
        ]
    check(sets, f"augment.table {path} is empty; write a set of interchangeable words on each line, separated by tabs")
    for where, words in sets:
        check(all(words), f"augment.table {path}, {where}: an empty word; remove it")
        odd = [word for word in words if not word[0].isalnum()]
        check(
            not odd,
            f"augment.table {path}, {where}: {odd[0] if odd else ''!r} begins with a mark; an entry begins with a"
            " letter, a digit or a Chinese character",
        )
        check(
            len({_lower(word) for word in words}) > 1,
            f"augment.table {path}, {where}: {words[0]!r} stands alone; a set has two or more words"
            + ("" if path.suffix == ".json" else ", separated by tabs"),
        )
    return [words for _, words in sets]


def _json_sets(path: Path, text: str) -> list[tuple[str, list[str]]]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"augment.table {path} is not JSON: {error}") from error
    if isinstance(content, list):
        content = {f"set {number}": words for number, words in enumerate(content, start=1)}
    check(isinstance(content, dict), f"augment.table {path} must hold a list of lists of words, or names with lists")
    for where, words in content.items():
        check(
            isinstance(words, list) and words and all(isinstance(word, str) for word in words),
            f"augment.table {path}, {where}: a set must be a list of words",
        )
    return [(where, [word.strip() for word in words]) for where, words in content.items()]
