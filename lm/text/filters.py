"""Rules that keep a document as it is or drop it: length, symbols, words, lines, repetition, language, blocked words.

Thresholds follow Gopher (Rae et al. 2021, table A1 and appendix A1.1) and C4 (Raffel et al. 2020). A character of
Chinese, Japanese or Thai counts as a word of its own, since these are written without spaces.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unicodedata import category

import numpy as np

from lm.errors import UserError, check
from lm.text.language import identify
from lm.text.scripts import HAN, KANA, SOUTHEAST_ASIAN


@dataclass(frozen=True)
class Dropped:
    """What a rule returns instead of text: the document goes, for this reason."""

    reason: str


FilterRule = Callable[[str], str | Dropped]

# Scripts without spaces between words: Thai to Khmer, kana, Han.
SPACELESS = SOUTHEAST_ASIAN + KANA + HAN
_UNIT = re.compile(rf"[{SPACELESS}]|[^\W{SPACELESS}]+")
_STRIDE = np.uint64(0x9E3779B97F4A7C15)


def length(*, min_characters: int, max_characters: int | None) -> FilterRule:
    """Drops documents with fewer or more characters than wanted, spaces not counted."""

    def rule(text: str) -> str | Dropped:
        written = _written(text)
        if written < min_characters:
            return Dropped("short")
        if max_characters is not None and written > max_characters:
            return Dropped("long")
        return text

    return rule


def symbols(*, max_symbol_ratio: float, max_hash_ratio: float) -> FilterRule:
    """Drops documents of symbols: characters that belong to no word and no sentence; hashes or ellipses by the word."""

    def rule(text: str) -> str | Dropped:
        odd = Counter("".join(_ODD_RUN.findall(text)))
        # Combining marks, which are parts of letters, are no symbols.
        if sum(n for char, n in odd.items() if category(char)[0] != "M") > max_symbol_ratio * _written(text):
            return Dropped("symbols")
        counts = {"hashes": text.count("#"), "ellipses": len(_ELLIPSIS.findall(text))}
        if any(counts.values()):
            words = len(_UNIT.findall(text))
            for name, count in counts.items():
                if count > max_hash_ratio * words:
                    return Dropped(name)
        return text

    return rule


def words(*, min_mean_word: float, max_mean_word: float, min_alphabetic_words: float) -> FilterRule:
    """Drops documents whose words are too short or long on average, or mostly without a letter (Gopher).

    Words are what spaces separate, if there is a letter or digit in it. Text with more than a tenth of its letters in
    scripts without spaces is left alone.
    """

    def rule(text: str) -> str | Dropped:
        if _spaceless_share(text) > 0.1:
            return text
        found = _SPACED_WORD.findall(text)
        if not found:
            return Dropped("no words")
        if len(_SPACED_WORD_WITH_LETTER.findall(text)) < min_alphabetic_words * len(found):
            return Dropped("words without letters")
        mean = sum(map(len, found)) / len(found)
        if mean < min_mean_word:
            return Dropped("short words")
        return Dropped("long words") if mean > max_mean_word else text

    return rule


def lines(*, max_bullet_lines: float, max_ellipsis_lines: float) -> FilterRule:
    """Drops lists and teasers: documents in which too many lines begin with a bullet or end in an ellipsis (Gopher).

    Documents of fewer than three lines are neither.
    """

    def rule(text: str) -> str | Dropped:
        total = len(_LINE.findall(text))
        if total < 3:
            return text
        if len(_BULLET.findall(text)) > max_bullet_lines * total:
            return Dropped("bullets")
        if len(_ELLIPSIS_END.findall(text)) > max_ellipsis_lines * total:
            return Dropped("ellipses at line ends")
        return text

    return rule


def repeated_lines(*, max_repeated_lines: float, max_repeated_line_characters: float) -> FilterRule:
    """Drops documents whose lines or paragraphs say again what an earlier one said (Gopher).

    The share of lines, and of characters in lines, that repeat an earlier line; the same for paragraphs, which are what
    blank lines separate.
    """

    def rule(text: str) -> str | Dropped:
        for separator, name in ((_NEWLINES, "lines"), (_PARAGRAPHS, "paragraphs")):
            pieces = [stripped for piece in separator.split(text) if (stripped := piece.strip())]
            if len(pieces) < 2:
                continue
            distinct = set(pieces)
            if len(pieces) - len(distinct) > max_repeated_lines * len(pieces):
                return Dropped(f"repeated {name}")
            total = sum(map(len, pieces))
            if total - sum(map(len, distinct)) > max_repeated_line_characters * total:
                return Dropped(f"characters in repeated {name}")
        return text

    return rule


def repeated_ngrams(*, max_top_ngram: float, max_repeated_ngrams: float) -> FilterRule:
    """Drops documents that say the same words over and over (Gopher).

    For n of 2, 3, 4: the share of characters in the most frequent n-gram, at most 1, 0.9, 0.8 of `max_top_ngram`. For
    n of 5 to 10: the share in n-grams that occur more than once, at most `max_repeated_ngrams` for 5, falling evenly to
    2/3 of it for 10. Characters are counted once, however many n-grams they are in, and those between words not at all.
    Gopher's own thresholds are those of 0.20 and 0.15. In text written without spaces two characters stand for a word.
    """

    def rule(text: str) -> str | Dropped:
        units = _UNIT.findall(text.lower())
        per_word = 2 if _spaceless_share(text) > 0.5 else 1
        number = {unit: i for i, unit in enumerate(dict.fromkeys(units))}
        ids = _mix(np.fromiter(map(number.__getitem__, units), np.uint64, len(units)))
        sizes = np.fromiter(map(len, units), np.int64, len(units))
        total = int(sizes.sum())
        starts = np.arange(len(units))  # where the n-grams begin that can still repeat
        hashes = ids
        for n in range(2, 10 * per_word + 1):
            # An n-gram repeats only if its beginning does, so that few places are left to look at after the first n.
            fits = starts <= len(units) - n
            starts = starts[fits]
            hashes = _mix(hashes[fits] * _STRIDE + ids[starts + n - 1])
            _, which, counts = np.unique(hashes, return_inverse=True, return_counts=True)
            again = counts[which] > 1
            starts, hashes = starts[again], hashes[again]
            if not len(starts):
                break
            words, part = divmod(n, per_word)
            if part or words < 2:
                continue
            if words <= 4:
                frequency = counts[which[again]]
                top = starts[hashes == hashes[frequency.argmax()]]  # the earliest of equals
                if _share(top, sizes, n, total) > max_top_ngram * (1 - 0.1 * (words - 2)):
                    return Dropped(f"one {words}-gram")
            elif _share(starts, sizes, n, total) > max_repeated_ngrams * (1 - (words - 5) / 15):
                return Dropped(f"repeated {words}-grams")
        return text

    return rule


def language(*, languages: tuple[str, ...], min_language_confidence: float) -> FilterRule:
    """Drops documents in other languages than those listed."""
    wanted = frozenset(languages)

    def rule(text: str) -> str | Dropped:
        found, confidence = identify(text)
        if found in wanted and confidence >= min_language_confidence:
            return text
        return Dropped(f"language {found}" if found not in wanted else "language uncertain")

    return rule


def blocked_words(*, blocked_words: str | None, max_blocked_words: int) -> FilterRule:
    """Drops documents with more than so many occurrences of words from a list."""
    check(blocked_words is not None, "clean.blocked_words is not set; it names the file of the rule blocked_words")
    entries = read_blocked_words(Path(str(blocked_words)))
    by_word: dict[str, list[re.Pattern[str]]] = {}
    by_pair: dict[str, list[str]] = {}
    for entry in entries:
        if _SPACELESS_CHARACTER.search(entry):
            by_pair.setdefault(entry[:2], []).append(entry)
        else:
            first = _WORD.search(entry)
            spelled = r"\s+".join(map(re.escape, entry.split()))
            whole = re.compile(rf"(?<!\w){spelled}(?!\w)")
            by_word.setdefault(first[0] if first else entry, []).append(whole)
    single = [pair for pair in by_pair if len(pair) == 1]

    def rule(text: str) -> str | Dropped:
        text_lower = text.casefold()
        found = 0
        # Which words and pairs of characters occur at all is quickly known; few entries are then looked for.
        if by_word:
            for word in by_word.keys() & set(_WORD.findall(text_lower)):
                found += sum(len(pattern.findall(text_lower)) for pattern in by_word[word])
        if by_pair:
            pairs = by_pair.keys() & set(map(str.__add__, text_lower, text_lower[1:]))
            for pair in (*pairs, *single):
                found += sum(text_lower.count(entry) for entry in by_pair[pair])
        return Dropped("blocked words") if found > max_blocked_words else text

    return rule


def read_blocked_words(path: Path) -> list[str]:
    """The entries of a list of blocked words: one word or phrase a line, in any case. Raises `UserError`."""
    try:
        content = path.expanduser().read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"clean.blocked_words is {str(path)!r}, but there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read clean.blocked_words {path}: {error}") from None
    entries = [" ".join(line.casefold().split()) for line in content.splitlines()]
    found = list(dict.fromkeys(entry for entry in entries if entry))
    check(found, f"clean.blocked_words {path} is empty; it holds one word or phrase a line")
    return found


_ODD_RUN = re.compile(r"[^\w\s.,;:!?'\"()，。、；：！？（）．“”‘’«»《》〈〉「」『』【】·…—–%％&/¿¡-]+")
_WORD = re.compile(r"\w+")
# From its first sign, whatever that is, to the next space; of digits only, or with a letter.
_SPACED_WORD = re.compile(r"(?<!\S)(?:[^\w\s]|_)*+[^\W_]\S*")
_SPACED_WORD_WITH_LETTER = re.compile(r"(?<!\S)(?:[^\w\s]|[\d_])*+[^\W\d_]\S*")
_ELLIPSIS = re.compile(r"\.{3,}|…+|。{3,}|．{3,}")
_LETTER = re.compile(r"[^\W\d_]")
_SPACELESS_CHARACTER = re.compile(f"[{SPACELESS}]")
_NEWLINES = re.compile(r"\n+")
_PARAGRAPHS = re.compile(r"\n[^\S\n]*\n\s*")
_LINE = re.compile(r"^[^\S\n]*\S", re.MULTILINE)
_BULLET = re.compile(r"^[^\S\n]*(?:[•‣▪▫●○◦■□◆◇➢►▶·∙※★☆✓✔]|[-*+–—][^\S\n])", re.MULTILINE)
_ELLIPSIS_END = re.compile(r"(?:\.\.\.|…)[^\S\n]*$", re.MULTILINE)


def _mix(values: np.ndarray) -> np.ndarray:
    """Spreads the bits of uint64 `values` (splitmix64), so that sums and products of them hardly ever meet."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _share(starts: np.ndarray, sizes: np.ndarray, n: int, total: int) -> float:
    """The share of characters in n-grams that begin at the (distinct) `starts`, each character counted once."""
    steps = np.zeros(len(sizes) + 1, np.int64)
    steps[starts] += 1
    steps[starts + n] -= 1
    return float(sizes[np.cumsum(steps)[:-1] > 0].sum()) / total


def _written(text: str) -> int:
    """Characters that are not spaces."""
    return len("".join(text.split()))


def _spaceless_share(text: str) -> float:
    """The share of scripts without spaces among the letters of the first 2,000 characters."""
    letters = _LETTER.findall(text[:2000])
    return len(_SPACELESS_CHARACTER.findall(text[:2000])) / len(letters) if letters else 0.0
