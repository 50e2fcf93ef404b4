"""What every tokenizer is and all kinds share: interface, settings, the plainest kind, where texts may be cut."""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lm.errors import UserError, check
from lm.text.template import ChatTemplate

END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "<unk>"
EOS_NAMES = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "[SEP]")
BOS_NAMES = ("<s>", "<|begin_of_text|>", "<bos>", "[CLS]")
PAD_NAMES = ("[PAD]", "<pad>", "<|pad|>")
MASK_NAMES = ("[MASK]", "<mask>", "<|mask|>")

META_FILE = "tokenizer_meta.json"
# What a pretrained model may call otherwise than its tokenizer's names say: T5 begins with its padding.
ROLES = ("bos_id", "eos_id")
WORD_BOUNDARY = re.compile(r"(?<=\S)[ \n]")
_CHUNKS = re.compile(r"(?<=\S)(?=[ \n])")


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Which tokenizer, and how it is trained when it is of a trained kind."""

    kind: str = "bpe"
    """Nothing to train: byte; hf:PATH_OR_NAME (a tokenizer.json, a folder with one, or a hub name); file:PATH (a
    folder this program saved, a tokenizer.json, vocab.json or encoder.json beside its merges, a vocab.txt, a .model).
    Trained on the corpus: bpe (byte-level, as GPT-2), unigram (byte-level), wordpiece (as BERT), sentencepiece-bpe,
    sentencepiece-unigram, word, char, jieba (Chinese words), maxmatch (words of a list)."""
    vocab_size: int = 8192
    """Most tokens a trained tokenizer may have, special tokens included; byte, hf: and file: bring their own."""
    training_bytes: int = 64_000_000
    """At most so many bytes of text, from the start of the training split, are read to train."""
    special_tokens: tuple[str, ...] = ()
    """Further tokens of a trained kind that text never produces, such as <mask> or <pad>."""
    lowercase: bool = False
    """word, char, wordpiece, and file: with a vocab.txt: small letters only; wordpiece drops accents as well."""
    min_count: int = 1
    """word, char, jieba, maxmatch: what occurs less often in the training text is unknown."""
    splitting: Literal["punctuation", "whitespace"] = "punctuation"
    """word: punctuation marks and Chinese characters stand alone, or only whitespace separates words."""
    hmm: bool = True
    """jieba: guess words that its dictionary lacks."""
    user_words: str | None = None
    """jieba: file with words to know besides its dictionary, one a line, optionally `WORD COUNT`; UTF-8."""
    word_list: str | None = None
    """maxmatch: file with the words to match, the first thing on each line; UTF-8; None = jieba's dictionary."""
    direction: Literal["forward", "backward", "bidirectional"] = "bidirectional"
    """maxmatch: longest words from the left, from the right, or of the two the one with fewer words."""
    byte_fallback: bool = True
    """sentencepiece: characters outside the vocabulary become bytes, so that any text comes back; else unknown."""
    character_coverage: float = 0.9995
    """sentencepiece: share of the training text's characters that get a token of their own."""


class Tokenizer(ABC):
    """Text to ids and back. Ids are Python ints in `[0, vocab_size)`."""

    vocab_size: int
    """One more than the largest id."""
    eos_id: int
    """The token that ends every document."""
    bos_id: int
    """The token that starts one; the same as `eos_id` where the tokenizer has a single separator."""
    unk_id: int | None = None
    """What stands for text outside the vocabulary; None where everything can be spelled, as with bytes."""
    pad_id: int | None = None
    """The token that fills rows, if there is one."""
    mask_id: int | None = None
    """The token that hides another, if there is one."""
    special_tokens: dict[str, int]
    """Tokens with a meaning of their own, which text never produces, by id."""
    chat_template: ChatTemplate | None = None
    """How conversations are written, where it came with a template or was given one; no part of `fingerprint`."""

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without any special token. Raises `UserError` for text that UTF-8 cannot hold."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`[encode(text) for text in texts]`, faster."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; special tokens are left out and bytes that are not UTF-8 become U+FFFD."""

    @abstractmethod
    def id_to_piece(self, token_id: int) -> str:
        """The vocabulary's own spelling of one token, to show to people. Raises `UserError` outside the vocabulary."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Writes the tokenizer into `folder` (created if missing), for `load_tokenizer`."""

    @abstractmethod
    def fingerprint(self) -> str:
        """16 hex digits; equal for tokenizers that encode alike, also after `save` and `load_tokenizer`."""

    def pieces(self, text: str, size: int) -> Iterator[str]:
        """Cuts `text` where encoding piece by piece gives exactly the ids of the whole.

        Pieces are near `size` characters where the tokenizer knows such places; here, in general, it does not,
        and the text comes back whole.
        """
        del size
        yield text


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes as ids 0..255, and 256 as the document separator."""

    vocab_size = 257
    eos_id = 256
    bos_id = 256
    special_tokens = {END_OF_TEXT: 256}  # noqa: RUF012 - nobody writes to it

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer`."""
        return list(utf8(text))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See `Tokenizer`."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """See `Tokenizer`."""
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")

    def id_to_piece(self, token_id: int) -> str:
        """See `Tokenizer`."""
        check_id(token_id, self.vocab_size)
        if token_id == self.eos_id:
            return END_OF_TEXT
        return chr(token_id) if 32 < token_id < 127 else f"<0x{token_id:02X}>"

    def save(self, folder: Path) -> None:
        """See `Tokenizer`."""
        folder.mkdir(parents=True, exist_ok=True)
        write_meta(folder, "byte", template=self.chat_template)

    def fingerprint(self) -> str:
        """See `Tokenizer`."""
        return fingerprint_of("byte", "257")

    def pieces(self, text: str, size: int) -> Iterator[str]:
        """See `Tokenizer`; bytes may be cut between any two characters."""
        yield from cut_anywhere(text, size)


def cut_anywhere(text: str, size: int) -> Iterator[str]:
    """Pieces of `size` characters; an empty text is one piece."""
    yield from (text[i : i + size] for i in range(0, max(len(text), 1), size))


def cut_before(boundary: re.Pattern[str], text: str, size: int) -> Iterator[str]:
    """Pieces of `size` characters or somewhat more, each cut before a match of `boundary`; joined they are `text`."""
    start = 0
    while len(text) - start > size and (found := boundary.search(text, start + size)):
        yield text[start : found.start()]
        start = found.start()
    yield text[start:]


def cut_between_words(text: str, size: int) -> Iterator[str]:
    """Pieces of `size` characters or somewhat more, cut before a space or newline that follows a non-space.

    GPT-2's word pattern never lets a match run from a non-space character into a space, and looks ahead only
    from inside spaces, so it finds the same words in the pieces as in the whole.
    """
    return cut_before(WORD_BOUNDARY, text, size)


def count_chunks(texts: Iterable[str]) -> Counter[str]:
    """How often each piece between the places of `cut_between_words` occurs: words with the space before them."""
    chunks: Counter[str] = Counter()
    for text in texts:
        chunks.update(_CHUNKS.split(text))
    return chunks


def first_bytes(texts: Iterable[str], limit: int) -> Iterator[str]:
    """The texts up to `limit` UTF-8 bytes in all; the last one is cut at a character."""
    for text in texts:
        encoded = utf8(text)
        if len(encoded) >= limit:
            yield encoded[:limit].decode("utf-8", errors="ignore")
            return
        limit -= len(encoded)
        yield text


def most_frequent(counts: Counter[str], *, room: int, min_count: int) -> list[str]:
    """At most `room` of what was counted at least `min_count` times, the most frequent first, ties by code point."""
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return [word for word, count in ranked[: max(room, 0)] if count >= min_count]


def utf8(text: str) -> bytes:
    """The bytes of `text`. Raises `UserError` where it holds half a surrogate pair."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"text holds U+{ord(text[error.start]):04X} at character {error.start}, half of a surrogate pair, "
            "which is not valid Unicode; remove it"
        ) from None


def read_text(path: Path, what: str) -> str:
    """A UTF-8 file without its byte order mark. Raises `UserError`, which calls it `what`, where it is not one."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{what} {path} is not UTF-8 at byte {error.start}; convert it to UTF-8 first") from None
    except OSError as error:
        raise UserError(f"cannot read {what} {path}: {error.strerror or one_line(error)}") from None


def first_of(names: Iterable[str], vocabulary: dict[str, int]) -> int | None:
    """The id of the first name that the vocabulary has."""
    return next((vocabulary[name] for name in names if name in vocabulary), None)


def write_meta(
    folder: Path, kind: str, roles: Mapping[str, int] | None = None, *, template: ChatTemplate | None = None
) -> None:
    """Notes beside a saved tokenizer of which kind it is, of `roles`, see `ROLES`, and its chat template."""
    meta: dict[str, Any] = {"kind": kind, **(roles or {})}
    if template is not None:
        meta["chat_template"] = {"source": template.source, "tokens": dict(template.tokens)}
    (folder / META_FILE).write_text(json.dumps(meta) + "\n", encoding="utf-8")


def check_roles(roles: Mapping[str, int], vocab_size: int, origin: str) -> None:
    """Raises `UserError` for a role that no token can have."""
    for name, token in roles.items():
        check(
            type(token) is int and 0 <= token < vocab_size,
            f"{origin}: {name} is {token!r}; ids go from 0 to {vocab_size - 1}",
        )


def check_id(token_id: int, vocab_size: int) -> None:
    """Raises `UserError` for an id outside the vocabulary."""
    check(
        0 <= token_id < vocab_size, f"token id {token_id} is outside the vocabulary; ids go from 0 to {vocab_size - 1}"
    )


def one_line(error: BaseException) -> str:
    """What another library says went wrong, on one line."""
    return " ".join(str(error).split())[:300]


def fingerprint_of(*parts: str | bytes) -> str:
    """16 hex digits over `parts`."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update((part if isinstance(part, bytes) else part.encode("utf-8")) + b"\0")
    return digest.hexdigest()
