"""What the pieces of a vocabulary stand for in text, however its kind spells them."""

from __future__ import annotations

import re
from typing import Literal

from lm.text.base import ByteTokenizer, Tokenizer
from lm.text.words import SegmentedTokenizer

Spelling = Literal["bytes", "wordpiece", "words", "text"]

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_SENTENCEPIECE_SPACE = "\u2581"

# GPT-2's letters for bytes: printable bytes stand for themselves, the others for letters from U+0100 on.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_BYTE_OF = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(0x100 + i): byte for i, byte in enumerate(sorted(set(range(256)) - set(_PRINTABLE)))
}


def spelling_of(tokenizer: Tokenizer, pieces: list[str]) -> Spelling:
    """How a tokenizer spells its pieces, which are given: `bytes` (GPT-2's letters), `wordpiece`, `words`, or `text`.

    `text` is that of characters and of SentencePiece, with U+2581 for a space and `<0x0A>` for a byte.
    """
    kind = getattr(tokenizer, "kind", "")
    if isinstance(tokenizer, SegmentedTokenizer) or kind == "word":
        return "words"
    if isinstance(tokenizer, ByteTokenizer):
        return "text"
    if set(_BYTE_OF) <= set(pieces):
        return "bytes"
    if kind == "wordpiece" or (kind == "hf" and any(re.match(r"##\w", piece) for piece in pieces)):
        return "wordpiece"
    return "text"


def surface(piece: str, spelling: Spelling) -> bytes:
    """The bytes of text that a piece stands for."""
    if spelling == "bytes":
        return bytes(_BYTE_OF[c] for c in piece) if all(c in _BYTE_OF for c in piece) else piece.encode()
    if spelling == "wordpiece":
        return piece.removeprefix("##").encode() if piece != "##" else b"##"
    if spelling == "text":
        if found := _BYTE.fullmatch(piece):
            return bytes([int(found[1], 16)])
        return piece.replace(_SENTENCEPIECE_SPACE, " ").encode()
    return piece.encode()
