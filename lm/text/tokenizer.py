"""Tokenizers: text to token ids and back.

Three kinds: `byte` (nothing to train), `bpe` (byte-level BPE as in GPT-2, trained on the corpus) and `hf:...`
(any Hugging Face `tokenizer.json`). All know one token that separates documents, `eos_id`; text never
produces it: a user who writes `<|endoftext|>` in a document gets those characters, not the separator.
"""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lm.errors import UserError, check

if TYPE_CHECKING:
    import tokenizers

END_OF_TEXT = "<|endoftext|>"
EOS_NAMES = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "[SEP]")
BOS_NAMES = ("<s>", "<|begin_of_text|>", "<bos>", "[CLS]")

_META_FILE = "tokenizer_meta.json"
_HF_FILE = "tokenizer.json"
_TRAINING_PIECE = 1 << 16  # characters; long documents reach the trainer in pieces, so that all cores count
_BOUNDARY = re.compile(r"(?<=\S)[ \n]")


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Which tokenizer, and how it is trained when it is of a trained kind."""

    kind: str = "bpe"
    """byte, bpe (trained on the corpus), or hf:PATH_OR_NAME: a tokenizer.json, a folder with one, or a hub name."""
    vocab_size: int = 8192
    """Most tokens a trained tokenizer may have, special tokens included; byte and hf: bring their own."""
    training_bytes: int = 64_000_000
    """At most so many bytes of text, from the start of the training split, are read to train."""


class Tokenizer(ABC):
    """Text to ids and back. Ids are Python ints in `[0, vocab_size)`."""

    vocab_size: int
    """One more than the largest id."""
    eos_id: int
    """The token that ends every document."""
    bos_id: int
    """The token that starts one; the same as `eos_id` where the tokenizer has a single separator."""

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

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer`."""
        try:
            return list(text.encode("utf-8"))
        except UnicodeEncodeError as error:
            raise _not_unicode(error) from None

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See `Tokenizer`."""
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """See `Tokenizer`."""
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")

    def id_to_piece(self, token_id: int) -> str:
        """See `Tokenizer`."""
        _check_id(token_id, self.vocab_size)
        if token_id == self.eos_id:
            return END_OF_TEXT
        return chr(token_id) if 32 < token_id < 127 else f"<0x{token_id:02X}>"

    def save(self, folder: Path) -> None:
        """See `Tokenizer`."""
        folder.mkdir(parents=True, exist_ok=True)
        _write_meta(folder, {"kind": "byte"})

    def fingerprint(self) -> str:
        """See `Tokenizer`."""
        return _hash("byte", "257")

    def pieces(self, text: str, size: int) -> Iterator[str]:
        """See `Tokenizer`; bytes may be cut between any two characters."""
        yield from (text[i : i + size] for i in range(0, max(len(text), 1), size))


class SubwordTokenizer(Tokenizer):
    """A Hugging Face `tokenizers` tokenizer, of the kind `bpe` (trained here) or `hf` (brought along)."""

    def __init__(self, definition: str, *, kind: str, origin: str):
        """Reads a tokenizer.

        Args:
          definition: the content of a `tokenizer.json`; `save` writes it back unchanged.
          kind: "bpe" if `_train_bpe` made it, otherwise "hf".
          origin: where it came from, for error messages.

        Raises:
          UserError: if it is not a tokenizer, or has no token that separates documents.
        """
        import tokenizers

        try:
            self._hf: tokenizers.Tokenizer = tokenizers.Tokenizer.from_str(definition)
        except Exception as error:  # The Rust side raises plain Exception.
            raise UserError(f"{origin} is not a Hugging Face tokenizer.json: {_one_line(error)}") from None
        self._definition = definition
        self.kind = kind
        vocabulary = self._hf.get_vocab(with_added_tokens=True)
        eos = next((name for name in EOS_NAMES if name in vocabulary), None)
        if eos is None:
            raise UserError(f"{origin} has no token that ends a document; it needs one of: {', '.join(EOS_NAMES)}")
        bos = next((name for name in BOS_NAMES if name in vocabulary), eos)
        self.vocab_size = max(vocabulary.values()) + 1
        self.eos_id = vocabulary[eos]
        self.bos_id = vocabulary[bos]

        self._hf.add_special_tokens([eos, bos])  # Files converted by hand list them as ordinary tokens.
        self._hf.encode_special_tokens = True  # Special tokens spelled out in text are text.
        self._hf.no_truncation()
        self._hf.no_padding()

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer`."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See `Tokenizer`; runs on all cores, without Python's lock."""
        try:
            encodings = self._hf.encode_batch_fast(texts, add_special_tokens=False)
        except TypeError:
            for text in texts:
                try:
                    text.encode("utf-8")
                except UnicodeEncodeError as error:
                    raise _not_unicode(error) from None
            raise
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """See `Tokenizer`."""
        return self._hf.decode(list(ids), skip_special_tokens=True)

    def id_to_piece(self, token_id: int) -> str:
        """See `Tokenizer`; ids that the vocabulary skips are spelled `<unused N>`."""
        _check_id(token_id, self.vocab_size)
        return self._hf.id_to_token(token_id) or f"<unused {token_id}>"

    def save(self, folder: Path) -> None:
        """See `Tokenizer`."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _HF_FILE).write_text(self._definition, encoding="utf-8")
        _write_meta(folder, {"kind": self.kind})

    def fingerprint(self) -> str:
        """See `Tokenizer`."""
        return _hash("hf", self._definition)

    def pieces(self, text: str, size: int) -> Iterator[str]:
        """See `Tokenizer`.

        Only for tokenizers trained here: others (normalisers, no word pattern) promise nothing of the kind.
        """
        if self.kind == "bpe":
            yield from _cut_between_words(text, size)
        else:
            yield text


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
        return _load_hf(config.kind.removeprefix("hf:"))
    return _train_bpe(config, texts)


def is_trained(config: TokenizerConfig) -> bool:
    """Whether the tokenizer is learned from the corpus."""
    return config.kind == "bpe"


def check_tokenizer_config(config: TokenizerConfig) -> None:
    """Raises `UserError` if `config` cannot be carried out, as far as that shows without reading anything."""
    if config.kind not in ("byte", "bpe") and not (config.kind.startswith("hf:") and config.kind != "hf:"):
        raise UserError(f"tokenizer.kind is {config.kind!r}; choose byte, bpe or hf:PATH_OR_NAME")
    if is_trained(config):
        check(
            config.vocab_size >= 257,
            f"tokenizer.vocab_size is {config.vocab_size}; "
            f"byte-level bpe needs at least 257 (256 bytes and {END_OF_TEXT})",
        )
        check(config.training_bytes > 0, f"tokenizer.training_bytes is {config.training_bytes}; it must be positive")


def load_tokenizer(folder: Path) -> Tokenizer:
    """Reads what `Tokenizer.save` wrote into `folder`. Raises `UserError` if that is not there."""
    meta_file = folder / _META_FILE
    try:
        kind = json.loads(meta_file.read_text(encoding="utf-8"))["kind"]
        if kind == "byte":
            return ByteTokenizer()
        definition = (folder / _HF_FILE).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(f"no tokenizer in {folder}: {error.filename} is missing") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"cannot read the tokenizer in {folder}: {_one_line(error)}") from None
    return SubwordTokenizer(definition, kind=kind, origin=str(folder / _HF_FILE))


def _train_bpe(config: TokenizerConfig, texts: Iterable[str]) -> SubwordTokenizer:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    blank = tokenizers.Tokenizer(models.BPE())
    blank.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    blank.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    limited = _first_bytes(texts, config.training_bytes)
    blank.train_from_iterator(
        (piece for text in limited for piece in _cut_between_words(text, _TRAINING_PIECE)), trainer
    )
    return SubwordTokenizer(blank.to_str(), kind="bpe", origin="the trained tokenizer")


def _cut_between_words(text: str, size: int) -> Iterator[str]:
    """Pieces of `size` characters or somewhat more, cut before a space or newline that follows a non-space.

    GPT-2's word pattern never lets a match run from a non-space character into a space, and looks ahead only
    from inside spaces, so it finds the same words in the pieces as in the whole.
    """
    start = 0
    while len(text) - start > size and (boundary := _BOUNDARY.search(text, start + size)):
        yield text[start : boundary.start()]
        start = boundary.start()
    yield text[start:]


def _first_bytes(texts: Iterable[str], limit: int) -> Iterator[str]:
    """The texts up to `limit` UTF-8 bytes in all; the last one is cut at a character."""
    for text in texts:
        encoded = text.encode("utf-8")
        if len(encoded) >= limit:
            yield encoded[:limit].decode("utf-8", errors="ignore")
            return
        limit -= len(encoded)
        yield text


def _load_hf(name: str) -> SubwordTokenizer:
    """From a `tokenizer.json`, a folder that holds one, or the hub."""
    path = Path(name).expanduser()
    if path.is_dir():
        path = path / _HF_FILE
        check(path.is_file(), f"tokenizer.kind is 'hf:{name}', a folder without a {_HF_FILE}; add one or name another")
    elif not path.exists():
        if path.suffix == ".json" or name.startswith((".", "/", "~")):
            raise UserError(f"tokenizer.kind is 'hf:{name}', but there is no such file or folder")
        path = _download(name)
    try:
        definition = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the tokenizer {path}: {_one_line(error)}") from None
    return SubwordTokenizer(definition, kind="hf", origin=str(path))


def _download(name: str) -> Path:
    """The cached or downloaded `tokenizer.json` of a hub repository."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, _HF_FILE))
    except LocalEntryNotFoundError:
        reason = "the hub cannot be reached and the file is not in the local cache"
    except EntryNotFoundError:
        reason = f"that repository has no {_HF_FILE}"
    except HFValidationError:
        reason = "that is neither a path that exists nor a name of the form OWNER/NAME"
    except OSError as error:
        reason = _one_line(error)
    raise UserError(f"cannot load tokenizer.kind 'hf:{name}': {reason}; a path to a local {_HF_FILE} works offline")


def _write_meta(folder: Path, meta: dict[str, str]) -> None:
    (folder / _META_FILE).write_text(json.dumps(meta) + "\n", encoding="utf-8")


def _check_id(token_id: int, vocab_size: int) -> None:
    check(
        0 <= token_id < vocab_size, f"token id {token_id} is outside the vocabulary; ids go from 0 to {vocab_size - 1}"
    )


def _not_unicode(error: UnicodeEncodeError) -> UserError:
    return UserError(
        f"text holds U+{ord(error.object[error.start]):04X} at character {error.start}, half of a surrogate pair, "
        "which is not valid Unicode; remove it"
    )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def _hash(*parts: str) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part.encode("utf-8") + b"\0")
    return digest.hexdigest()
