"""Which encoding a file is in, found out without holding all of it in memory."""

from __future__ import annotations

import codecs
from typing import BinaryIO

from lm.errors import UserError
from lm.text.encoding import decode, looks_binary

HEAD_BYTES = 1 << 13

_SAMPLE = 1 << 20
_CONTEXT = 1 << 14
_WIDE_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)  # UTF-32-LE begins like UTF-16-LE


def plain_name(encoding: str) -> str:
    """Python's own name of an encoding, or "auto". Raises `UserError` if there is none."""
    if encoding == "auto":
        return encoding
    try:
        "a\n".encode(encoding)
        return codecs.lookup(encoding).name.removesuffix("-sig")  # a byte order mark is passed over anyway
    except (LookupError, UnicodeError):
        raise UserError(
            f"data.encoding is {encoding!r}, which Python does not know; choose auto, utf-8, gb18030, big5, latin-1 …"
        ) from None


def line_ends_are_bytes(encoding: str) -> bool:
    """Whether every byte 0x0A is a line end, and what follows it can be decoded without what precedes."""
    return "a\n".encode(encoding) == b"a\n" and not encoding.startswith(("iso2022", "hz", "utf-7"))


def is_binary(head: bytes, encoding: str) -> bool:
    """Whether `head`, the first `HEAD_BYTES` of a file, cannot be text in an encoding, or in any for "auto"."""
    if encoding != "auto":
        if not line_ends_are_bytes(encoding):
            return False
        if b"\0" in head and not head.startswith(_WIDE_MARKS):
            return True
    return looks_binary(head)


def find_encoding(head: bytes, file: BinaryIO) -> str:
    """Finds out the encoding of a file.

    Args:
      head: what has been read of it.
      file: the rest.

    Returns:
      UTF-8 if all of it is, otherwise what it looks like in its first mebibyte, or where it stops being UTF-8.
    """
    sample = head + file.read(_SAMPLE - len(head))
    if not _is_utf8(sample):
        return _likeliest(sample)
    tail = _incomplete(sample)
    found = _likeliest(sample[: len(sample) - len(tail)])
    if found != "utf-8":
        return found
    before = sample[-_CONTEXT:]  # a few bytes that are not UTF-8 after much that is are damage
    while block := file.read(_SAMPLE):
        if not _is_utf8(tail + block):
            return _likeliest(before + block)
        tail = _incomplete(tail + block)
        before = block[-_CONTEXT:]
    return _likeliest(before) if tail else "utf-8"


def _likeliest(sample: bytes) -> str:
    return plain_name(decode(sample, "auto")[1].removesuffix(", damaged"))


def _is_utf8(content: bytes) -> bool:
    """Whether it is UTF-8 as far as it goes; its last character may be cut off."""
    try:
        codecs.utf_8_decode(content, "strict", False)
    except UnicodeDecodeError:
        return False
    return True


def _incomplete(content: bytes) -> bytes:
    """The bytes of an unfinished character at the end of UTF-8."""
    return content[codecs.utf_8_decode(content, "strict", False)[1] :]
