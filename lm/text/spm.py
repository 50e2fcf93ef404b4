"""SentencePiece: training, and models trained here or elsewhere.

SentencePiece spells a space U+2581 and so cannot tell the two apart, and what a tab, a newline or NUL does depends on
how a model was trained. Where a model has bytes to fall back on and leaves text as it is, these four never reach it:
they become their bytes, and decoding joins bytes, so that every text comes back exactly.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm.errors import UserError, check
from lm.text.base import (
    END_OF_TEXT,
    MASK_NAMES,
    PAD_NAMES,
    UNKNOWN,
    Tokenizer,
    TokenizerConfig,
    check_id,
    check_roles,
    cut_anywhere,
    cut_before,
    fingerprint_of,
    first_bytes,
    first_of,
    one_line,
    utf8,
    write_meta,
)

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

SPM_FILE = "tokenizer.model"
_SPACE = "\u2581"
_PARTS = re.compile(f"[^\n\t\0{_SPACE}]+|[\n\t\0{_SPACE}]+")
_AS_BYTES = frozenset(f"\n\t\0{_SPACE}")
_NEWLINE = re.compile("\n")
# Longest part given to a model at once, in characters: in float32 the sums of a longer one lose what decides ties.
_LONGEST = 1 << 14
# The trainer drops sentences of more bytes than it was told; these are cut to so many characters of at most 4 bytes.
_SENTENCE = 1 << 12
# Sums depend on how the work is split, so it is split alike on every machine, whatever its cores.
_THREADS = 16
# How much less likely, in nats, a letter that never occurred is than the least likely piece.
_UNSEEN = 10.0


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model (`.model`)."""

    def __init__(self, model: bytes, *, origin: str, roles: Mapping[str, int] | None = None):
        """Reads a model.

        Args:
          model: the content of a `.model` file; `save` writes it back unchanged.
          origin: where it came from, for error messages.
          roles: ids of `ROLES` that the model it belongs to calls otherwise.

        Raises:
          UserError: if it is not a whole model, or has no token that separates documents.
        """
        from sentencepiece import SentencePieceProcessor

        try:
            self._model = SentencePieceProcessor(model_proto=model)
            parts = dict(_fields(model))
            trainer, normalizer = dict(_fields(parts[_TRAINER])), dict(_fields(parts[_NORMALIZER]))
        except (RuntimeError, KeyError, IndexError) as error:
            why = "it ends too early" if isinstance(error, LookupError) else "it is damaged, or something else"
            raise UserError(f"{origin} is not a whole SentencePiece model: {why}; copy or train it again") from None
        self._bytes = model
        self._origin = origin
        sp = self._model
        check(
            sp.eos_id() >= 0,
            f"{origin} has no token that ends a document; train it with an end-of-sentence id (eos_id)",
        )
        self.vocab_size = sp.get_piece_size()
        self.roles = dict(roles or {})
        check_roles(self.roles, self.vocab_size, origin)
        self.eos_id = self.roles.get("eos_id", sp.eos_id())
        self.bos_id = self.roles.get("bos_id", sp.bos_id() if sp.bos_id() >= 0 else self.eos_id)
        spellings = [sp.id_to_piece(i) for i in range(self.vocab_size)]
        self.special_tokens = {spelling: i for i, spelling in enumerate(spellings) if sp.is_control(i)}
        self.pad_id = sp.pad_id() if sp.pad_id() >= 0 else first_of(PAD_NAMES, self.special_tokens)
        self.mask_id = first_of(MASK_NAMES, self.special_tokens)
        self.unk_id = None if trainer.get(_BYTE_FALLBACK) else sp.unk_id()
        self._surface = None
        if self.unk_id is None and _keeps_text(model, normalizer):
            self._surface = [_surface(sp, i, spelling) for i, spelling in enumerate(spellings)]
        self._byte_ids = {}
        if self._surface is not None:
            self._byte_ids = {c: [sp.piece_to_id(f"<0x{b:02X}>") for b in c.encode()] for c in _AS_BYTES}

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self._bytes, self._origin, self.roles), {"chat_template": self.chat_template}

    @property
    def is_exact(self) -> bool:
        """Whether any text comes back exactly: the model has all bytes and changes nothing before it looks."""
        return self._surface is not None

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer`."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See `Tokenizer`; on all cores.

        A model that keeps text exactly is given a line at a time; any other the whole text, as by the library itself.
        """
        for text in texts:
            utf8(text)
        if not self.is_exact:
            return self._model.encode(list(texts), num_threads=-1)
        cut = [_parts(text) for text in texts]
        ordinary = [part for parts in cut for part in parts if part[0] not in _AS_BYTES]
        encoded = iter(self._model.encode(ordinary, num_threads=-1))
        rows = []
        for parts in cut:
            row: list[int] = []
            for part in parts:
                if part[0] not in _AS_BYTES:
                    row += next(encoded)
                else:
                    for character in part:
                        row += self._byte_ids[character]
            rows.append(row)
        return rows

    def decode(self, ids: Iterable[int]) -> str:
        """See `Tokenizer`; a model that is not exact decodes as the library does, with ` ⁇ ` for what is unknown."""
        if self._surface is not None:
            return b"".join(map(self._surface.__getitem__, ids)).decode("utf-8", errors="replace")
        return self._model.decode(list(ids))

    def id_to_piece(self, token_id: int) -> str:
        """See `Tokenizer`."""
        check_id(token_id, self.vocab_size)
        return self._model.id_to_piece(token_id)

    def save(self, folder: Path) -> None:
        """See `Tokenizer`."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SPM_FILE).write_bytes(self._bytes)
        write_meta(folder, "sentencepiece", self.roles, template=self.chat_template)

    def fingerprint(self) -> str:
        """See `Tokenizer`."""
        roles = (f"{name} {i}" for name, i in sorted(self.roles.items()))
        return fingerprint_of("sentencepiece", self._bytes, *roles)

    def pieces(self, text: str, size: int) -> Iterator[str]:
        """See `Tokenizer`; an exact model sees a line at a time, so text may be cut before any newline."""
        if self.is_exact:
            yield from cut_before(_NEWLINE, text, size)
        else:
            yield text


def train_sentencepiece(config: TokenizerConfig, texts: Iterable[str]) -> SentencePieceTokenizer:
    """Trains kind `sentencepiece-bpe` or `sentencepiece-unigram`.

    Raises:
      UserError: for a vocabulary larger or smaller than the text allows; the message names the bound.
    """
    sentences = (
        piece
        for text in first_bytes(texts, config.training_bytes)
        for part in _PARTS.findall(text)
        if part[0] not in _AS_BYTES
        for piece in cut_anywhere(part, _SENTENCE)
    )
    model = _train(
        sentences,
        model_type=config.kind.removeprefix("sentencepiece-"),
        vocab_size=config.vocab_size,
        character_coverage=config.character_coverage,
        byte_fallback=config.byte_fallback,
        eos_id=1,
        eos_piece=END_OF_TEXT,
        control_symbols=list(config.special_tokens),
        # Without bytes, lines would run together where these are unknown.
        user_defined_symbols=[] if config.byte_fallback else ["\n", "\t"],
    )
    return SentencePieceTokenizer(model, origin="the trained tokenizer")


def unigram_pieces(words: Counter[str], *, vocab_size: int, alphabet: Sequence[str]) -> list[tuple[str, float]]:
    """Pieces of words with their log-probabilities, for a Unigram model.

    Args:
      words: words that hold no letter outside `alphabet`, and how often each occurs.
      vocab_size: most pieces there may be.
      alphabet: letters that become pieces in any case.
    """
    from sentencepiece import SentencePieceProcessor

    counted: Counter[str] = Counter()
    for word, count in words.items():
        for piece in cut_anywhere(word, _SENTENCE):
            counted[piece] += count
    unseen = sorted(set(alphabet) - {letter for word in counted for letter in word})
    model = _train(
        (f"{word}\t{count}" for word, count in sorted(counted.items())),
        input_format="tsv",
        model_type="unigram",
        vocab_size=vocab_size - len(unseen) + 1,
        hard_vocab_limit=False,
        character_coverage=1.0,
        split_by_unicode_script=False,
        split_by_number=False,
        eos_id=-1,
    )
    sp = SentencePieceProcessor(model_proto=model)
    pieces = [(sp.id_to_piece(i), sp.get_score(i)) for i in range(1, sp.get_piece_size())]  # 0 is the unknown
    lowest = min(score for _, score in pieces) - _UNSEEN
    return pieces + [(letter, lowest) for letter in unseen]


def _train(sentences: Iterable[str], **options: Any) -> bytes:
    import sentencepiece

    broke: list[Exception] = []

    def watched() -> Iterator[str]:
        try:
            yield from sentences
        except Exception as error:  # The library would make a RuntimeError of it.
            broke.append(error)
            raise

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=watched(),
            model_writer=model,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=1 << 20,
            num_threads=_THREADS,
            minloglevel=2,
            unk_id=0,
            unk_piece=UNKNOWN,
            bos_id=-1,
            pad_id=-1,
            **options,
        )
    except RuntimeError as error:
        if broke:
            raise broke[0] from None
        raise _explained(error, options["vocab_size"]) from None
    return model.getvalue()


def _explained(error: RuntimeError, vocab_size: int) -> UserError:
    said = one_line(error)
    if found := re.search(r"set it to a value <= (\d+)", said):
        return UserError(
            f"tokenizer.vocab_size is {vocab_size}; the training text has pieces for at most {found[1]}: lower it to "
            "that or add text"
        )
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", said):
        return UserError(
            f"tokenizer.vocab_size is {vocab_size}; the characters of the training text alone take {found[1]}: raise "
            "it above that or lower tokenizer.character_coverage"
        )
    if "sentences_.empty()" in said:
        return UserError("there is no text to train a tokenizer on; name another source")
    return UserError(f"SentencePiece cannot be trained: {said}")


def _parts(text: str) -> list[str]:
    """`text` cut into what a model sees, of at most `_LONGEST` characters, and runs of what becomes bytes."""
    parts = _PARTS.findall(text)
    if max(map(len, parts), default=0) <= _LONGEST:
        return parts
    return [piece for part in parts for piece in cut_anywhere(part, _LONGEST)]


def _surface(sp: SentencePieceProcessor, token_id: int, spelling: str) -> bytes:
    """The bytes of text that a token stands for."""
    if sp.is_control(token_id) or sp.is_unknown(token_id):
        return b""
    return bytes([int(spelling[3:5], 16)]) if sp.is_byte(token_id) else spelling.replace(_SPACE, " ").encode("utf-8")


def _keeps_text(model: bytes, normalizer: dict[int, Any]) -> bool:
    """Whether a model looks at text as it stands, and at nothing before its own pieces."""
    return (
        not normalizer.get(_CHARSMAP)
        and not normalizer.get(_DUMMY_PREFIX, 1)
        and not normalizer.get(_REMOVE_SPACES, 1)
        and bool(normalizer.get(_ESCAPE_SPACES, 1))
        and not any(
            number == _PIECE and dict(_fields(value)).get(_PIECE_TYPE) == _USER_DEFINED
            for number, value in _fields(model)
        )
    )


# Numbers of the fields of sentencepiece_model.proto that are read here, and of one value. The package's own classes for
# them want a newer protobuf than other packages allow.
_PIECE, _TRAINER, _NORMALIZER = 1, 2, 3
_PIECE_TYPE, _USER_DEFINED = 3, 4
_BYTE_FALLBACK = 35
_CHARSMAP, _DUMMY_PREFIX, _REMOVE_SPACES, _ESCAPE_SPACES = 2, 3, 4, 5


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of the fields of a protocol buffer: integers, or bytes. Raises IndexError if it is cut off."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        size = {0: 0, 1: 8, 5: 4}.get(key & 7)
        if size == 0:
            value, at = _varint(message, at)
            yield key >> 3, value
            continue
        if size is None:
            size, at = _varint(message, at)
        if at + size > len(message):
            raise IndexError
        yield key >> 3, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, and where it ends."""
    value = shift = 0
    while message[at] & 0x80:
        value |= (message[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
    return value | message[at] << shift, at + 1


def _rebuild(model: bytes, origin: str, roles: Mapping[str, int]) -> SentencePieceTokenizer:
    return SentencePieceTokenizer(model, origin=origin, roles=roles)
