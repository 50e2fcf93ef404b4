"""Tokens as a person reads them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from lm.report.texts import is_hidden
from lm.text import compare
from lm.text.tokenizer import Tokenizer


def byte_level(folder: Path) -> bool:
    """Whether the tokenizer spells its pieces in GPT-2's alphabet, in which every byte is a letter."""
    path = folder / "tokenizer.json"
    if not path.exists():
        return False
    decoder = json.loads(path.read_text(encoding="utf-8")).get("decoder") or {}
    return any(part.get("type") == "ByteLevel" for part in [decoder, *decoder.get("decoders", [])])


_PLAIN = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that stand for themselves in that alphabet
_BYTES = {chr(byte): byte for byte in _PLAIN} | {
    chr(256 + i): byte for i, byte in enumerate(sorted(set(range(256)) - set(_PLAIN)))
}


def spelled(piece: str, in_bytes: bool) -> str:
    """A piece with its spaces visible.

    Args:
      piece: as the vocabulary spells it.
      in_bytes: whether that is GPT-2's alphabet: bytes become text, or are listed where they are no whole characters.
    """
    if in_bytes and all(char in _BYTES for char in piece):
        raw = bytes(_BYTES[char] for char in piece)
        try:
            piece = raw.decode("utf-8")
        except UnicodeDecodeError:
            return " ".join(f"<0x{byte:02X}>" for byte in raw)
    return piece.replace(" ", "␣").replace("\n", "↵").replace("\t", "⇥")


_PART = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


def labels(tokenizer: Tokenizer, ids: Sequence[int], *, in_bytes: bool) -> list[str]:
    """A name for each token of a row, in plain text.

    Args:
      tokenizer: whose ids they are.
      ids: the tokens, in order.
      in_bytes: see `spelled`.

    Returns:
      As many names as ids: the piece with its spaces visible; where only several tokens make a character, that
      character with the number of each, as in 你₁ 你₂ 你₃; special tokens by name; hidden characters by code. What is
      no id of the tokenizer, a row that only rounds up the model's vocabulary, is called so.
    """
    special = set(tokenizer.special_tokens.values())
    names: list[str] = []
    while len(names) < len(ids):
        at = len(names)
        if not 0 <= ids[at] < tokenizer.vocab_size:
            names.append(f"<no token {ids[at]}>")
            continue
        piece, alone = tokenizer.id_to_piece(ids[at]), tokenizer.decode([ids[at]])
        if ids[at] in special or not alone:
            names.append(_visible(piece.replace("▁", " "), False))
        elif "\ufffd" not in alone:
            # Bytes that are characters by themselves; other pieces keep what decoding drops: ## and first spaces.
            names.append(_visible(alone if piece.startswith("<0x") else piece.replace("▁", " "), in_bytes))
        else:
            within = [i for i in ids[at : at + 4] if 0 <= i < tokenizer.vocab_size]
            text, width = next(compare.spelled(tokenizer, within))
            if width == 1:
                names.append(_visible(piece, in_bytes))
            else:
                names += [_visible(text, False) + str(part + 1).translate(_PART) for part in range(width)]
    return names


def _visible(piece: str, in_bytes: bool) -> str:
    shown = spelled(piece, in_bytes)
    return "".join(f"U+{ord(char):04X}" if is_hidden(char, True) else char for char in shown)
