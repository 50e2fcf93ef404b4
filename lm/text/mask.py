"""Rules that hide personal data: web addresses, e-mail, telephone, identity and card numbers, IP addresses.

What is found gives way to a word in angle brackets, such as <EMAIL>. Numbers are taken for what they seem only where
the form is unmistakable or a check digit agrees: a corpus is full of dates, prices, versions and book numbers.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable

MaskRule = Callable[[str], str]

_URL = re.compile(
    r"(?:(?<![a-z0-9])(?:https?|ftp)://|(?<![\w.@/-])www\.(?=[a-z0-9-]{1,63}\.))"
    r"[^\s<>\"'`{}|\\^\[\]（）《》「」【】，。；：！？、“”‘’\u4e00-\u9fff]+",
    re.I,
)
_URL_TAIL = ".,;:!?'\")]}…"
_EMAIL = re.compile(
    r"(?<![a-z0-9._%+@-])[a-z0-9](?:[a-z0-9._%+-]{0,62}[a-z0-9_+-])?@(?:[a-z0-9-]{1,63}\.){1,8}[a-z]{2,24}(?![a-z0-9@])",
    re.I,
)


def mask_urls() -> MaskRule:
    """Web addresses become <URL>; those without a scheme only where they begin with www."""

    def replace(match: re.Match[str]) -> str:
        address = match[0]
        kept = address.rstrip(_URL_TAIL)
        # A closing parenthesis belongs to the address if it was opened there.
        tail = address[len(kept) :]
        if tail.startswith(")") and kept.count("(") > kept.count(")"):
            tail = tail[1:]
        return "<URL>" + tail

    def rule(text: str) -> str:
        return _URL.sub(replace, text)

    return rule


def mask_emails() -> MaskRule:
    """E-mail addresses become <EMAIL>."""

    def rule(text: str) -> str:
        return _EMAIL.sub("<EMAIL>", text) if "@" in text else text

    return rule


_START = r"(?<![0-9A-Za-z_.+/:#=@-])"
_END = r"(?![0-9A-Za-z_@/:=]|[-.,:][0-9])"
_PHONE = re.compile(
    _START + r"(?:"
    # +49 30 123456, +1 (212) 555-0123, +86 138 0013 8000: a plus, a country code, 7 to 15 digits in all
    r"\+[1-9]\d{0,14}(?:[ .\u00a0-]?\(\d{1,5}\)|[ .\u00a0-]\d{1,12}|(?<=\))\d{1,12}){0,6}"
    # (212) 555-0123, 212-555-0123, 212.555.0123: area and exchange never begin with 0 or 1
    r"|(?:1[ .-])?\([2-9]\d{2}\)[ \u00a0]?[2-9]\d{2}[ .-]\d{4}"
    r"|(?:1[.-])?[2-9]\d{2}([.-])[2-9]\d{2}\1\d{4}"
    # Chinese mobile: 11 digits, the second 3 to 9
    r"|(?:86[ -]?)?1[3-9]\d([ -]?)\d{4}\2\d{4}"
    # Chinese landline: 010-12345678, (0755)1234567, 0571 8765 4321
    r"|(?:[(（]0(?:10|2\d|[3-9]\d{2})[)）][ ]?|0(?:10|2\d|[3-9]\d{2})[- ])[2-8]\d{2,3}[- ]?\d{4}(?:-\d{1,5})?"
    r"|[48]00-\d{3}-?\d{4}"
    r")" + _END
)


def mask_phones() -> MaskRule:
    """Telephone numbers become <PHONE>: international, North American, Chinese mobile and landline."""

    def replace(match: re.Match[str]) -> str:
        digits = sum(map(str.isdigit, match[0]))
        return "<PHONE>" if 7 <= digits <= 15 else match[0]

    def rule(text: str) -> str:
        return _PHONE.sub(replace, text)

    return rule


_CHINESE_ID = re.compile(
    r"(?<![0-9A-Za-z_.])[1-9]\d{5}(?:19|20)\d{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])\d{3}[\dXx](?![0-9A-Za-z_])"
)
_SSN = re.compile(r"(?<![0-9A-Za-z_.#/-])(?!000|666|9)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![0-9A-Za-z_/-]|\.\d)")
_CARD = re.compile(
    r"(?<![0-9A-Za-z_.#/-])[2-6]\d{3}(?:([ -]?)\d{4}\1\d{4}\1\d{1,7}|([ -]?)\d{6}\2\d{5})(?![0-9A-Za-z_/-]|\.\d)"
)
_WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)


def mask_ids() -> MaskRule:
    """Chinese resident identity numbers and payment cards, if their check digit agrees, and US SSNs become <ID>."""

    def rule(text: str) -> str:
        text = _CHINESE_ID.sub(lambda match: "<ID>" if _is_resident_id(match[0]) else match[0], text)
        text = _CARD.sub(lambda match: "<ID>" if _is_card(match[0]) else match[0], text)
        return _SSN.sub("<ID>", text)

    return rule


_IPV4 = re.compile(r"(?<![0-9A-Za-z_.-])(?:\d{1,3}\.){3}\d{1,3}(?![0-9A-Za-z_-]|\.\d)")
# Addresses in use begin with 2 or 3, or are local: fc, fd, fe. What else has colons is a time, a verse, or C++.
_IPV6 = re.compile(
    r"(?<![0-9A-Za-z_:.])(?:[23][0-9a-f]{3}|f[cde][0-9a-f]{2})(?::[0-9a-f]{0,4}){2,7}(?![0-9A-Za-z_:]|\.\d)", re.I
)
_VERSION_BEFORE = re.compile(r"(?:\bv|version|ver\.?|release|build|section|§|版本|版)\s*$", re.I)


def mask_ips() -> MaskRule:
    """IP addresses become <IP>, but for those that name no machine (0.0.0.0, 127.0.0.1, ::) and version numbers."""

    def replace(match: re.Match[str]) -> str:
        before = match.string[max(0, match.start() - 12) : match.start()]
        if _VERSION_BEFORE.search(before):
            return match[0]
        try:
            address = ipaddress.ip_address(match[0])
        except ValueError:
            return match[0]
        return match[0] if address.is_loopback or address.is_unspecified else "<IP>"

    def rule(text: str) -> str:
        return _IPV6.sub(replace, _IPV4.sub(replace, text))

    return rule


def _is_resident_id(number: str) -> bool:
    """Whether the last character is the check digit of GB 11643 (ISO 7064, MOD 11-2)."""
    total = sum(int(digit) * weight for digit, weight in zip(number, _WEIGHTS))
    return "10X98765432"[total % 11] == number[-1].upper()


def _is_card(number: str) -> bool:
    """Whether the digits, 13 to 19, have the check digit of ISO/IEC 7812 (Luhn)."""
    digits = [int(char) for char in number if char.isdigit()]
    if not 13 <= len(digits) <= 19:
        return False
    doubled = [digit * 2 - 9 * (digit > 4) for digit in digits[-2::-2]]
    return (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0
