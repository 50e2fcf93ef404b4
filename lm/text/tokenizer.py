"""Tokenizers: text to token ids and back, in one interface whatever the kind.

All kinds know one token that separates documents, `eos_id`; text never produces it, nor any other special token: a user
who writes `<|endoftext|>` in a document gets those characters, not the separator.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lm.errors import check
from lm.text.base import (
    BOS_NAMES,
    END_OF_TEXT,
    EOS_NAMES,
    UNKNOWN,
    ByteTokenizer,
    Tokenizer,
    TokenizerConfig,
)
from lm.text.files import load_tokenizer, open_file, open_hub
from lm.text.spm import SentencePieceTokenizer, train_sentencepiece
from lm.text.subword import SubwordTokenizer
from lm.text.subword_training import BERT_SPECIAL, train_subword
from lm.text.words import SegmentedTokenizer, train_segmented

__all__ = [
    "BOS_NAMES",
    "END_OF_TEXT",
    "EOS_NAMES",
    "ByteTokenizer",
    "SegmentedTokenizer",
    "SentencePieceTokenizer",
    "SubwordTokenizer",
    "Tokenizer",
    "TokenizerConfig",
    "check_tokenizer_config",
    "is_trained",
    "load_tokenizer",
    "shaping_settings",
    "train_tokenizer",
]

_SENTENCEPIECE = ("sentencepiece-bpe", "sentencepiece-unigram")
_SEGMENTED = ("jieba", "maxmatch")
_WORD_LEVEL = ("word", "char", *_SEGMENTED)
TRAINED_KINDS = ("bpe", "unigram", "wordpiece", *_SENTENCEPIECE, *_WORD_LEVEL)
_FILE_KINDS = ("hf:", "file:")
# Which kinds read a setting; what nobody would read is refused. The settings that are not here are everybody's.
_READ_BY = {
    "special_tokens": TRAINED_KINDS,
    "lowercase": ("word", "char", "wordpiece", "file:"),
    "min_count": _WORD_LEVEL,
    "splitting": ("word",),
    "hmm": ("jieba",),
    "user_words": ("jieba",),
    "word_list": ("maxmatch",),
    "direction": ("maxmatch",),
    "byte_fallback": _SENTENCEPIECE,
    "character_coverage": _SENTENCEPIECE,
}
# A special token in brackets around a letter or digit is one that no kind's pieces of text can spell.
_SPECIAL = re.compile(r"<[^\s<>]*\w[^\s<>]*>|\[[^\s\[\]]*\w[^\s\[\]]*\]")


def train_tokenizer(config: TokenizerConfig, texts: Iterable[str]) -> Tokenizer:
    """Makes the tokenizer that `config` describes.

    Args:
      config: its settings.
      texts: documents to train on, read once, up to `config.training_bytes`; untouched unless `is_trained(config)`.

    Returns:
      The tokenizer. The same settings and texts give the same one, on any machine.

    Raises:
      UserError: for an unknown kind, a vocabulary too small, or a tokenizer that cannot be had.
    """
    check_tokenizer_config(config)
    if config.kind == "byte":
        return ByteTokenizer()
    if config.kind.startswith("hf:"):
        return open_hub(config.kind.removeprefix("hf:"))
    if config.kind.startswith("file:"):
        return open_file(config.kind.removeprefix("file:"), lowercase=config.lowercase)
    if config.kind in _SENTENCEPIECE:
        return train_sentencepiece(config, texts)
    if config.kind in _SEGMENTED:
        return train_segmented(config, texts)
    return train_subword(config, texts)


def is_trained(config: TokenizerConfig) -> bool:
    """Whether the tokenizer is learned from the corpus."""
    return config.kind in TRAINED_KINDS


def shaping_settings(config: TokenizerConfig) -> dict[str, Any]:
    """What decides which tokenizer a trained kind becomes, JSON-ready, to fingerprint a dataset that is not there yet.

    Settings that stand at their default are left out, but for the three that every version has had, so that a setting
    added later changes no fingerprint. A file counts by its content, not its name.
    """
    settings = {"kind": config.kind, "vocab_size": config.vocab_size, "training_bytes": config.training_bytes}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in settings and value != field.default:
            if field.name in ("user_words", "word_list"):
                value = hashlib.blake2b(_content(value, f"tokenizer.{field.name}"), digest_size=16).hexdigest()
            settings[field.name] = list(value) if isinstance(value, tuple) else value
    return settings


def check_tokenizer_config(config: TokenizerConfig) -> None:
    """Raises `UserError` if `config` cannot be carried out, as far as that shows without reading text."""
    kind = config.kind
    form = next((form for form in _FILE_KINDS if kind.startswith(form) and kind != form), None)
    check(
        kind == "byte" or form or kind in TRAINED_KINDS,
        f"tokenizer.kind is {kind!r}; choose byte, {', '.join(TRAINED_KINDS)}, hf:PATH_OR_NAME or file:PATH",
    )
    for field in dataclasses.fields(config):
        readers = _READ_BY.get(field.name)
        check(
            readers is None or (form or kind) in readers or getattr(config, field.name) == field.default,
            f"tokenizer.{field.name} is set, but only {', '.join(readers or ())} read it, and tokenizer.kind is "
            f"{kind!r}; leave one out",
        )
    if is_trained(config):
        _check_trained(config)


def _check_trained(config: TokenizerConfig) -> None:
    builtin = {UNKNOWN, END_OF_TEXT} if config.kind != "wordpiece" else set(BERT_SPECIAL)
    for name in config.special_tokens:
        check(
            _SPECIAL.fullmatch(name),
            f"tokenizer.special_tokens holds {name!r}; write each in brackets, without spaces, as <mask> or [MASK]",
        )
        check(
            config.special_tokens.count(name) == 1,
            f"tokenizer.special_tokens lists {name!r} twice; once is enough",
        )
    taken = [name for name in config.special_tokens if name in builtin]
    check(not taken, f"tokenizer.special_tokens holds {taken[:1]}, which kind {config.kind} has already; leave it out")
    least, what = _least(config)
    check(
        config.vocab_size >= least + len(config.special_tokens),
        f"tokenizer.vocab_size is {config.vocab_size}; {config.kind} needs at least "
        f"{least + len(config.special_tokens)} ({', '.join([what, *config.special_tokens])})",
    )
    check(config.training_bytes > 0, f"tokenizer.training_bytes is {config.training_bytes}; it must be positive")
    check(config.min_count >= 1, f"tokenizer.min_count is {config.min_count}; it must be at least 1")
    check(
        0.9 <= config.character_coverage <= 1,
        f"tokenizer.character_coverage is {config.character_coverage}; it must be from 0.9 to 1",
    )
    for name in ("user_words", "word_list"):
        value = getattr(config, name)
        if value is not None:
            _content(value, f"tokenizer.{name}")


def _least(config: TokenizerConfig) -> tuple[int, str]:
    """The smallest vocabulary of a trained kind, and what it would hold, further special tokens aside."""
    if config.kind in ("bpe", "unigram"):
        return 257, f"256 bytes and {END_OF_TEXT}"
    if config.kind == "wordpiece":
        return 7, f"{', '.join(BERT_SPECIAL)} and two forms of a letter"
    if config.kind in _SENTENCEPIECE and config.byte_fallback:
        return 259, f"256 bytes, {UNKNOWN}, {END_OF_TEXT} and a piece"
    return 3, f"{UNKNOWN}, {END_OF_TEXT} and a piece"


def _content(name: str, setting: str) -> bytes:
    path = Path(name).expanduser()
    check(path.is_file(), f"{setting} is {name!r}, but there is no such file")
    return path.read_bytes()
