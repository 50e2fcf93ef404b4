"""Tokens as a person reads them."""

from __future__ import annotations

import json
from pathlib import Path


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
