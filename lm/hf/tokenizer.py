"""A pretrained model's tokenizer in, and a run's tokenizer out, as files that `transformers` loads."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lm.errors import UserError, check
from lm.hf.export import write_json
from lm.hf.source import TOKENIZER_FILES, Source, read_json
from lm.text.base import META_FILE, ROLES, ByteTokenizer, Tokenizer, write_meta
from lm.text.files import TEMPLATE_FILE, load_tokenizer, open_file, template_beside
from lm.text.ids import IdsTokenizer
from lm.text.spm import SPM_FILE, SentencePieceTokenizer
from lm.text.subword import HF_FILE, SubwordTokenizer
from lm.text.subword_training import byte_letters, byte_level

_VOCABULARIES = (HF_FILE, "vocab.json", "encoder.json", "vocab.txt", "*.model")


def special_ids(source: Source, vocab_size: int) -> dict[str, int]:
    """Which ids begin and end texts, as a model's files have it; nothing of what they don't say.

    An encoder-decoder's decoder begins with `decoder_start_token_id`. Of several that end a text the first counts.
    """
    found = {}
    for name, keys in (("bos_id", ("decoder_start_token_id", "bos_token_id")), ("eos_id", ("eos_token_id",))):
        for key in keys:
            value = source.config.get(key, source.generation.get(key))
            if key == "decoder_start_token_id" and value is None and source.config.get("model_type") == "t5":
                value = source.config.get("pad_token_id", 0)  # as T5 does without being told
            value = value[0] if isinstance(value, list) and value else value
            if type(value) is int and 0 <= value < vocab_size:
                found[name] = value
                break
    return found


def open_tokenizer(source: Source, vocab_size: int, *, ids: bool = False) -> Tokenizer:
    """The tokenizer of a pretrained model; without its files, or with `ids`, one whose texts are ids.

    Raises:
      UserError: its files are damaged, or it has ids that the model has no row for.
    """
    roles = special_ids(source, vocab_size)
    if ids or not any(path for pattern in _VOCABULARIES for path in source.folder.glob(pattern)):
        return IdsTokenizer(vocab_size, **roles)
    settings = {}
    if (source.folder / "tokenizer_config.json").is_file():
        settings = read_json(source.folder / "tokenizer_config.json")
    from_words = (source.folder / "vocab.txt").is_file() and not (source.folder / HF_FILE).is_file()
    lowercase = from_words and bool(settings.get("do_lower_case", True))
    tokenizer = open_file(str(source.folder), lowercase=lowercase)
    check(
        tokenizer.vocab_size <= vocab_size,
        f"the tokenizer in {source.origin} has {tokenizer.vocab_size} ids and the model {vocab_size} rows; they don't"
        " belong together: take both from the same model, or leave the tokenizer out with --ids",
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, source: Source, vocab_size: int, folder: Path) -> Tokenizer:
    """Saves a pretrained model's tokenizer with what the model calls its ends, and reads it back."""
    tokenizer.save(folder)
    found = special_ids(source, min(vocab_size, tokenizer.vocab_size))
    roles = {name: i for name, i in found.items() if i != getattr(tokenizer, name)}
    if isinstance(tokenizer, SubwordTokenizer | SentencePieceTokenizer) and roles:
        kind = read_json(folder / META_FILE)["kind"]
        named = {name: roles[name] for name in ROLES if name in roles}
        write_meta(folder, kind, named, template=tokenizer.chat_template)
    return load_tokenizer(folder)


def begins_texts(tokenizer: Tokenizer, family: str) -> bool:
    """Whether a model was trained on texts that begin with its bos: as its tokenizer.json says, or its family."""
    if isinstance(tokenizer, SubwordTokenizer):
        import tokenizers

        ids = tokenizers.Tokenizer.from_str(tokenizer.definition).encode("a").ids
        return bool(ids) and ids[0] == tokenizer.bos_id and tokenizer.id_to_piece(ids[0]) in tokenizer.special_tokens
    return isinstance(tokenizer, SentencePieceTokenizer) and family == "LLaMA"


def copy_files(origin: Path, folder: Path) -> bool:
    """Copies the tokenizer files of a pretrained model; returns whether there are any."""
    paths = sorted(path for pattern in TOKENIZER_FILES for path in origin.glob(pattern) if path.is_file())
    for path in paths:
        shutil.copyfile(path, folder / path.name)
    return any(path for pattern in _VOCABULARIES for path in origin.glob(pattern))


def write_tokenizer(tokenizer: Tokenizer, folder: Path, max_len: int) -> str | None:
    """Writes a tokenizer as `transformers.AutoTokenizer` loads it.

    Returns:
      None, or why there is no form of it there; then nothing was written.
    """
    if isinstance(tokenizer, ByteTokenizer):
        definition: str = _bytes_definition(tokenizer)
    elif isinstance(tokenizer, SubwordTokenizer):
        definition = tokenizer.definition
    elif isinstance(tokenizer, SentencePieceTokenizer):
        tokenizer.save(folder)
        (folder / META_FILE).unlink()
        return f"{SPM_FILE} was written as it is; transformers wants to be told the class that reads it"
    elif isinstance(tokenizer, IdsTokenizer):
        return "the run has no tokenizer, only ids"
    else:
        return "transformers has no tokenizer that cuts texts into words as this run's does, so none was written"
    (folder / HF_FILE).write_text(definition, encoding="utf-8")
    write_json(folder / "tokenizer_config.json", _settings(tokenizer, max_len))
    write_template(tokenizer, folder)
    return None


def write_template(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the chat template that a tokenizer has, where another or none lies in the folder."""
    template, there = tokenizer.chat_template, template_beside(folder)
    if template is not None and (there is None or there.source != template.source):
        (folder / TEMPLATE_FILE).write_text(template.source, encoding="utf-8")


def _settings(tokenizer: Tokenizer, max_len: int) -> dict[str, Any]:
    names: Mapping[str, int | None] = {
        "bos_token": tokenizer.bos_id,
        "eos_token": tokenizer.eos_id,
        "unk_token": tokenizer.unk_id,
        "pad_token": tokenizer.pad_id,
        "mask_token": tokenizer.mask_id,
    }
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_len,
        "clean_up_tokenization_spaces": False,
        **{name: tokenizer.id_to_piece(i) for name, i in names.items() if i is not None},
    }


def _bytes_definition(tokenizer: ByteTokenizer) -> str:
    """Bytes as a byte-level vocabulary without merges: the letter of each byte, in order of bytes."""
    import tokenizers
    from tokenizers import AddedToken, models

    letters = {byte: letter for letter, byte in _bytes_of_letters().items()}
    made: tokenizers.Tokenizer = byte_level(models.BPE({letters[byte]: byte for byte in range(256)}, []))
    for token in tokenizer.special_tokens:
        made.add_special_tokens([AddedToken(token, special=True, normalized=False)])
    if made.get_vocab_size() != tokenizer.vocab_size:
        raise UserError("the vocabulary of bytes has an id too many")
    return made.to_str()


def _bytes_of_letters() -> dict[str, int]:
    """GPT-2's letters of bytes: printable ones stand for themselves, the others follow from U+0100 on."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    found = {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}
    assert set(found) == set(byte_letters())
    return found
