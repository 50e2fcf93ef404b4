"""Tokenizers found on disk or on the hub: what this program saved, and the formats that others write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lm.errors import UserError, check
from lm.text.base import END_OF_TEXT, META_FILE, ROLES, ByteTokenizer, Tokenizer, one_line, read_text
from lm.text.ids import load_ids
from lm.text.spm import SPM_FILE, SentencePieceTokenizer
from lm.text.subword import HF_FILE, SubwordTokenizer
from lm.text.subword_training import BERT_SPECIAL, byte_letters, byte_level, wordpiece
from lm.text.template import ChatTemplate
from lm.text.words import WORDS_FILE, SegmentedTokenizer

FORMS = (
    f"a folder this program saved, {HF_FILE}, vocab.json or encoder.json beside merges.txt or vocab.bpe, vocab.txt, "
    "or a .model"
)
_BPE_FILES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))
_VOCAB_FILE = "vocab.txt"
TEMPLATE_FILE = "chat_template.jinja"
_SETTINGS_FILE, _SPECIAL_FILE = "tokenizer_config.json", "special_tokens_map.json"


def load_tokenizer(folder: Path) -> Tokenizer:
    """Reads what `Tokenizer.save` wrote into `folder`. Raises `UserError` if that is not there."""
    try:
        meta = json.loads((folder / META_FILE).read_text(encoding="utf-8"))
        kind, roles = meta["kind"], {name: meta[name] for name in ROLES if name in meta}
        template = ChatTemplate(**meta["chat_template"]) if "chat_template" in meta else None
        tokenizer = _load(folder, kind, roles)
    except FileNotFoundError as error:
        raise UserError(f"no tokenizer in {folder}: {error.filename} is missing") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"cannot read the tokenizer in {folder}: {one_line(error)}") from None
    tokenizer.chat_template = template
    return tokenizer


def _load(folder: Path, kind: str, roles: dict[str, int]) -> Tokenizer:
    if kind == "byte":
        return ByteTokenizer()
    if kind == "sentencepiece":
        path = folder / SPM_FILE
        return SentencePieceTokenizer(path.read_bytes(), origin=str(path), roles=roles)
    if kind == "ids":
        return load_ids(folder)
    path = folder / (WORDS_FILE if kind == "words" else HF_FILE)
    definition = path.read_text(encoding="utf-8")
    if kind == "words":
        return SegmentedTokenizer(definition, origin=str(path))
    return SubwordTokenizer(definition, kind=kind, origin=str(path), roles=roles)


def template_beside(folder: Path) -> ChatTemplate | None:
    """The chat template that lies in a folder of transformers, if there is one.

    It is chat_template.jinja, or what tokenizer_config.json holds, which also says what tokens are called.

    Raises:
      UserError: a file that cannot be read.
    """
    settings = _json_object(folder / _SETTINGS_FILE)
    tokens = {}
    for name, value in {**_json_object(folder / _SPECIAL_FILE), **settings}.items():
        spelling = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(spelling, str):
            tokens[name] = spelling
    source = settings.get("chat_template")
    if isinstance(source, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
        source = named.get("default")
    if (folder / TEMPLATE_FILE).is_file():
        source = read_text(folder / TEMPLATE_FILE, "the chat template")
    return ChatTemplate(source, tokens) if isinstance(source, str) else None


def _json_object(path: Path) -> dict[str, Any]:
    """What a file holds; nothing where there is no file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(read_text(path, "the tokenizer's settings"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON: {one_line(error)}; copy it again") from None
    return value if isinstance(value, dict) else {}


def open_file(name: str, *, lowercase: bool = False) -> Tokenizer:
    """A tokenizer from a path, of whichever form it is.

    Args:
      name: one of `FORMS`, or a folder that holds one.
      lowercase: whether the vocabulary of a vocab.txt is of small letters without accents; the file doesn't say.

    Raises:
      UserError: nothing is there, it is not what its name says, or `lowercase` is given for another form.
    """
    path = Path(name).expanduser()
    check(path.exists(), f"tokenizer.kind is 'file:{name}', but there is no such file or folder")
    if path.is_dir():
        if (path / META_FILE).exists():
            _check_case(name, lowercase)
            return load_tokenizer(path)
        path = _in_folder(path, name)
    tokenizer = _from_file(path, name, lowercase)
    tokenizer.chat_template = template_beside(path.parent)
    return tokenizer


def _from_file(path: Path, name: str, lowercase: bool) -> Tokenizer:
    if path.suffix == ".txt" and not path.name.endswith("merges.txt"):
        return _from_vocab_txt(path, lowercase)
    _check_case(name, lowercase)
    if path.suffix == ".model":
        try:
            return SentencePieceTokenizer(path.read_bytes(), origin=str(path))
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
    check(path.suffix == ".json", f"tokenizer.kind is 'file:{name}'; name {FORMS}")
    content = read_text(path, "the tokenizer")
    try:
        parsed = json.loads(content)
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not a tokenizer: {one_line(error)}") from None
    if isinstance(parsed, dict) and parsed and all(type(i) is int for i in parsed.values()):
        return _from_vocab_and_merges(path, parsed)
    return SubwordTokenizer(content, kind="hf", origin=str(path))


def open_hub(name: str) -> SubwordTokenizer:
    """From a `tokenizer.json`, a folder that holds one, or the hub."""
    path = Path(name).expanduser()
    if path.is_dir():
        path = path / HF_FILE
        check(path.is_file(), f"tokenizer.kind is 'hf:{name}', a folder without a {HF_FILE}; add one or name another")
    elif not path.exists():
        if path.suffix == ".json" or name.startswith((".", "/", "~")):
            raise UserError(f"tokenizer.kind is 'hf:{name}', but there is no such file or folder")
        path = _download(name)
    try:
        definition = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the tokenizer {path}: {one_line(error)}") from None
    tokenizer = SubwordTokenizer(definition, kind="hf", origin=str(path))
    tokenizer.chat_template = template_beside(path.parent)
    return tokenizer


def _in_folder(folder: Path, name: str) -> Path:
    """The one tokenizer that a folder holds; a tokenizer.json before the files it was made from."""
    if (folder / HF_FILE).exists():
        return folder / HF_FILE
    found = [folder / vocabulary for vocabulary, _ in _BPE_FILES if (folder / vocabulary).exists()]
    found += [path for path in [folder / _VOCAB_FILE] if path.exists()]
    found += sorted(folder.glob("*.model"))
    check(found, f"tokenizer.kind is 'file:{name}', a folder without a tokenizer; name {FORMS}")
    check(
        len(found) == 1,
        f"tokenizer.kind is 'file:{name}', a folder with several: {', '.join(path.name for path in found)}; name one",
    )
    return found[0]


def _check_case(name: str, lowercase: bool) -> None:
    check(
        not lowercase, f"tokenizer.lowercase is set, but file:{name} says itself what it does to capitals; leave it out"
    )


def _from_vocab_txt(path: Path, lowercase: bool) -> SubwordTokenizer:
    """BERT's WordPiece: a token a line, its id the number of the line, from 0."""
    lines = read_text(path, "the vocabulary").removesuffix("\n").split("\n")
    tokens = [line.removesuffix("\r") for line in lines]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) < len(tokens):
        twice = next(token for i, token in enumerate(tokens) if vocabulary[token] != i)
        raise UserError(f"{path} is not a vocabulary: {twice!r} stands on two lines; every token has one")
    missing = [name for name in ("[UNK]", "[CLS]", "[SEP]") if name not in vocabulary]
    check(not missing, f"{path} is not a WordPiece vocabulary: it lacks {', '.join(missing)}; a token stands on a line")
    made = wordpiece(vocabulary, lowercase=lowercase)
    made.add_special_tokens([name for name in BERT_SPECIAL if name in vocabulary and name != "[UNK]"])
    return SubwordTokenizer(made.to_str(), kind="wordpiece", origin=str(path))


def _from_vocab_and_merges(path: Path, vocabulary: dict[str, int]) -> SubwordTokenizer:
    """GPT-2's byte-level BPE: ids in one file, merges, the first one first, in another."""
    from tokenizers import models

    names = [
        path.name.removesuffix(ours) + theirs
        for ours, theirs in _BPE_FILES + tuple((vocab, _BPE_FILES[1 - i][1]) for i, (vocab, _) in enumerate(_BPE_FILES))
        if path.name.endswith(ours)
    ]
    beside = next((path.with_name(name) for name in names if path.with_name(name).exists()), None)
    if beside is None:
        wanted = " or ".join(names) or "merges.txt"
        raise UserError(f"{path} holds a vocabulary without merges; put {wanted} beside it")
    lines = read_text(beside, "the merges").split("\n")
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    bad = next((line for line in merges if len(line) != 2), None)
    check(bad is None, f"{beside} does not hold merges: {' '.join(bad or ())!r} is not two tokens with a space between")
    missing = [letter for letter in byte_letters() if letter not in vocabulary]
    check(not missing, f"{path} is not a byte-level vocabulary: it lacks {len(missing)} of the 256 bytes")
    try:
        made = byte_level(models.BPE(vocabulary, [(first, second) for first, second in merges]))
    except Exception as error:  # The Rust side raises plain Exception.
        raise UserError(f"{beside} does not fit {path.name}: {one_line(error)}") from None
    if END_OF_TEXT in vocabulary:
        made.add_special_tokens([END_OF_TEXT])
    return SubwordTokenizer(made.to_str(), kind="bpe", origin=str(path))


def _download(name: str) -> Path:
    """The cached or downloaded `tokenizer.json` of a hub repository."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, HF_FILE, local_files_only=not _hub_answers(name)))
    except LocalEntryNotFoundError:
        reason = "the hub cannot be reached and the file is not in the local cache"
    except EntryNotFoundError:
        reason = f"that repository has no {HF_FILE}"
    except HFValidationError:
        reason = "that is neither a path that exists nor a name of the form OWNER/NAME"
    except OSError as error:
        reason = one_line(error)
    raise UserError(f"cannot load tokenizer.kind 'hf:{name}': {reason}; a path to a local {HF_FILE} works offline")


def _hub_answers(name: str) -> bool:
    """Whether the hub can be reached, asked once; `hf_hub_download` asks again and again, for half a minute."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    try:
        get_hf_file_metadata(hf_hub_url(name, HF_FILE))
    except HfHubHTTPError:  # An answer, whatever it says.
        return True
    except Exception:  # Of all kinds: the connection's, the hub's offline mode, names that cannot be.
        return False
    return True
