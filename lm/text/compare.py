"""What a tokenizer makes of a text, in numbers that can be put beside another's."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from lm.errors import check
from lm.text.base import Tokenizer, utf8
from lm.text.scripts import HAN, HANGUL, KANA

LONGEST = 5
_ROUNDS, _ENOUGH_SECONDS = 3, 5.0
_WARM_UP = 1000  # characters; jieba reads its dictionary then
_BATCH = 1 << 20  # characters encoded together
# Han, Hiragana, Katakana and Hangul: each character counts as a word, as no space separates words there.
_WORD = re.compile(rf"[{HAN}{KANA}{HANGUL}]|[^\W{HAN}{KANA}{HANGUL}]+(?:['’]\w+)?")


@dataclass(frozen=True)
class Comparison:
    """One tokenizer on some text."""

    name: str
    """As it was named by who asked."""
    vocab_size: int
    """Its ids."""
    tokens: int
    """Tokens of the text; documents end without one."""
    tokens_per_byte: float
    """For each UTF-8 byte."""
    tokens_per_character: float
    """For each code point."""
    tokens_per_word: float
    """For each word, see `count_words`."""
    unknown_rate: float
    """Share of the tokens that stand for something outside the vocabulary."""
    exact: float
    """Share of the documents that come back exactly, `decode(encode(text)) == text`."""
    megabytes_per_second: float
    """Bytes of text encoded, in 10**6 a second, by `encode_batch`."""
    longest: tuple[str, ...]
    """The longest pieces of text that are single tokens, the longest first."""


def compare(
    tokenizers: Mapping[str, Tokenizer],
    texts: Sequence[str],
    *,
    clock: Callable[[], float] = time.perf_counter,
    on_done: Callable[[str], None] = lambda name: None,
) -> list[Comparison]:
    """Encodes and decodes `texts` with each tokenizer.

    Args:
      tokenizers: by the name to show.
      texts: documents.
      clock: tells seconds; the fastest of up to three rounds counts.
      on_done: told each name when it has been measured.

    Raises:
      UserError: there is no text.
    """
    texts = [text for text in texts if text]
    check(texts, "there is no text to compare tokenizers on; name another source")
    size = sum(len(utf8(text)) for text in texts)
    characters, words = sum(map(len, texts)), sum(map(count_words, texts))
    rows = []
    for name, tokenizer in tokenizers.items():
        tokenizer.encode(texts[0][:_WARM_UP])
        seconds, encoded = _timed(tokenizer, texts, clock)
        tokens = sum(map(len, encoded))
        unknown = sum(ids.count(tokenizer.unk_id) for ids in encoded) if tokenizer.unk_id is not None else 0
        used = {i for ids in encoded for i in ids} - set(tokenizer.special_tokens.values()) - {tokenizer.unk_id}
        rows.append(
            Comparison(
                name=name,
                vocab_size=tokenizer.vocab_size,
                tokens=tokens,
                tokens_per_byte=tokens / size,
                tokens_per_character=tokens / characters,
                tokens_per_word=tokens / max(words, 1),
                unknown_rate=unknown / max(tokens, 1),
                exact=sum(tokenizer.decode(ids) == text for ids, text in zip(encoded, texts)) / len(texts),
                megabytes_per_second=size / max(seconds, 1e-9) / 1e6,
                longest=_longest(tokenizer, used),
            )
        )
        on_done(name)
    return rows


def unknown_rate(tokenizer: Tokenizer, texts: Iterable[str]) -> float:
    """Share of the tokens of `texts` that are the unknown one; 0 for a tokenizer that has none."""
    unknown = tokens = 0
    for batch in batches(texts):
        for ids in tokenizer.encode_batch(batch):
            tokens += len(ids)
            unknown += ids.count(tokenizer.unk_id) if tokenizer.unk_id is not None else 0
    return unknown / max(tokens, 1)


def count_words(text: str) -> int:
    """Runs of letters and digits; a Chinese, Japanese or Korean character counts as one each. Punctuation doesn't."""
    return sum(1 for _ in _WORD.finditer(text))


def spelled(tokenizer: Tokenizer, ids: Sequence[int]) -> Iterator[tuple[str, int]]:
    """The text of tokens one by one, to show to people.

    Yields:
      A piece of text and how many tokens spell it: more than one where only together they make a character. What is
      no text, such as bytes that are not UTF-8 or a special token, is spelled as the vocabulary does.
    """
    special = set(tokenizer.special_tokens.values())
    at = 0
    while at < len(ids):
        text, width = tokenizer.id_to_piece(ids[at]), 1
        for end in range(at + 1, min(at + 4, len(ids)) + 1):  # a character has at most four bytes
            if ids[end - 1] in special:
                break
            together = tokenizer.decode(ids[at:end])
            if together and "\ufffd" not in together:
                text, width = together, end - at
                break
        yield text, width
        at += width


def batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Texts in lists of about a million characters."""
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= _BATCH:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _timed(tokenizer: Tokenizer, texts: list[str], clock: Callable[[], float]) -> tuple[float, list[list[int]]]:
    """Seconds of the fastest round, and the ids."""
    cut = list(batches(texts))
    fastest = spent = 0.0
    encoded: list[list[int]] = []
    for round_ in range(_ROUNDS):
        start = clock()
        found = [tokenizer.encode_batch(batch) for batch in cut]
        seconds = clock() - start
        fastest = seconds if round_ == 0 else min(fastest, seconds)
        spent += seconds
        encoded = [ids for batch in found for ids in batch]
        if spent > _ENOUGH_SECONDS:
            break
    return fastest, encoded


def _longest(tokenizer: Tokenizer, used: set[int]) -> tuple[str, ...]:
    pieces = {text for i in used if (text := tokenizer.decode([i])) and "\ufffd" not in text}
    return tuple(sorted(pieces, key=lambda text: (-len(text), text))[:LONGEST])
