"""Masks: what is personal goes, what only resembles it stays."""

import pytest

from lm.text import mask

URLS, EMAILS, PHONES, IDS, IPS = (
    rule() for rule in (mask.mask_urls, mask.mask_emails, mask.mask_phones, mask.mask_ids, mask.mask_ips)
)


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("see https://example.org/a?b=c#d.", "see <URL>."),
        ("(http://example.org/wiki/Word_(page))", "(<URL>)"),
        ("HTTP://EXAMPLE.ORG, or www.example.org!", "<URL>, or <URL>!"),
        ("请看https://example.org/页，谢谢", "请看<URL>页，谢谢"),
        ("网址：www.example.com.cn。", "网址：<URL>。"),
        ("ftp://files.example.org/x.zip", "<URL>"),
        ('<a href="https://example.org/x">', '<a href="<URL>">'),
    ],
)
def test_addresses_are_masked(text: str, masked: str):
    assert URLS(text) == masked


@pytest.mark.parametrize(
    "text", ["e.g. this", "www. is short for", "std::vector", "http: the protocol", "a://b", "awww.so"]
)
def test_no_address(text: str):
    assert URLS(text) == text


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("write to jo.doe+news@mail.example.co.uk.", "write to <EMAIL>."),
        ("邮箱zhang_san@163.com，谢谢", "邮箱<EMAIL>，谢谢"),
        ("<joe@example.com>", "<<EMAIL>>"),
        ("mailto:joe@example.com", "mailto:<EMAIL>"),
    ],
)
def test_mail_is_masked(text: str, masked: str):
    assert EMAILS(text) == masked


@pytest.mark.parametrize(
    "text", ["@someone on the net", "a @ b", "x@y", "user@localhost", "5 apples @ 2.50", "@media print"]
)
def test_no_mail(text: str):
    assert EMAILS(text) == text


@pytest.mark.parametrize(
    "number",
    [
        "+49 30 1234567",
        "+86 138 0013 8000",
        "+8613800138000",
        "+1 (212) 555-0123",
        "+44 20 7946 0958",
        "(212) 555-0123",
        "212-555-0123",
        "212.555.0123",
        "1-800-555-0199",
        "13800138000",
        "138-0013-8000",
        "138 0013 8000",
        "010-62345678",
        "(0755)26543210",
        "（021）62345678",
        "0571-8765 4321",
        "400-820-8820",
    ],
)
@pytest.mark.parametrize("around", ["call {} now", "电话{}。", "Tel. {}", "{}", "({}),", "电话：{}转3"])
def test_telephone_numbers_are_masked(number: str, around: str):
    assert PHONES(around.format(number)) == around.format("<PHONE>")


NOT_PHONES = [
    "2024-01-15",
    "15.01.2024",
    "01/15/2024",
    "2019-2020",
    "1949年10月1日",
    "12:30:45",
    "$1,299.00",
    "1,234,567,890",
    "12345.67890",
    "v1.2.3",
    "Python 3.11.7",
    "978-7-302-12345-6",
    "ISBN 978-3-16-148410-0",
    "9783161484100",
    "0.138001380001",
    "20240115093000",
    "3.14159265358979",
    "+5 degrees and +10",
    "+ 12 3",
    "1+1=2",
    "12345678",
    "10000000000",
    "12800138000",
    "1380013800012",
    "项目编号2013800138000",
    "1 2 3 4 5 6 7 8 9",
    "010-1234",
    "10-12345678-9",
    "192.168.100.200",
    "112-555-0123",
    "2000-3000-4000",
]


@pytest.mark.parametrize("text", NOT_PHONES)
def test_no_telephone_number(text: str):
    assert PHONES(text) == text
    assert PHONES(f"see {text} there") == f"see {text} there"


# Check digits by their definitions, written out: GB 11643's last character, and Luhn's doubling.
def _resident_id(first: str) -> str:
    total = sum(int(digit) * 2 ** (17 - i) for i, digit in enumerate(first))
    return first + next(c for value, c in enumerate("0123456789X") if (total + value) % 11 == 1)


def _luhn_valid(number: str) -> bool:
    total = 0
    for i, char in enumerate(reversed(number)):
        value = int(char) * (1 + i % 2)
        total += value // 10 + value % 10
    return total % 10 == 0


@pytest.mark.parametrize("first", ["11010519491231002", "44052419800101001", "32031177070600100"[:6] + "19770706001"])
def test_resident_ids_are_masked_if_the_check_digit_agrees(first: str):
    number = _resident_id(first)
    assert IDS(f"身份证号{number}，") == "身份证号<ID>，"
    assert IDS(number.lower()) == "<ID>"
    for last in "0123456789X":
        if last != number[-1]:
            assert IDS(first + last).endswith(first + last) or _luhn_valid(first + last)


def test_the_standards_own_example():
    assert IDS("11010519491231002X") == "<ID>"


@pytest.mark.parametrize("text", ["110105194913310021", "010105194912310028", "11010518491231002X"])
def test_no_resident_id(text: str):
    assert IDS(text) == text  # no such month, no such region, no such century


@pytest.mark.parametrize(
    "number", ["4111111111111111", "5500 0000 0000 0004", "3782-822463-10005", "6011-1111-1111-1117"]
)
def test_cards_are_masked_if_luhn_agrees(number: str):
    digits = "".join(filter(str.isdigit, number))
    assert _luhn_valid(digits)
    assert IDS(f"card {number}.") == "card <ID>."
    wrong = number[:-1] + str((int(number[-1]) + 1) % 10)
    assert IDS(f"card {wrong}.") == f"card {wrong}."


def test_social_security_numbers():
    assert IDS("SSN 123-45-6789") == "SSN <ID>"
    for text in (
        "000-12-3456",
        "666-12-3456",
        "912-34-5678",
        "123-00-4567",
        "123-45-0000",
        "123-456-789",
        "2023-12-3456",
    ):
        assert IDS(text) == text


@pytest.mark.parametrize("text", NOT_PHONES)
def test_no_id(text: str):
    assert IDS(text) == text


def test_ip_addresses():
    assert IPS("from 203.0.113.9 to 2001:db8::8a2e:370:7334.") == "from <IP> to <IP>."
    assert IPS("主机10.1.2.3，") == "主机<IP>，"
    for text in ("127.0.0.1", "0.0.0.0", "::1", "::", "256.1.1.1", "version 1.2.3.4", "v1.2.3.4", "1.2.3", "1.2.3.4.5"):
        assert IPS(text) == text
    for text in ("12:30:45", "std::string", "a::b", "10:20", "dead:beef", "Genesis 1:2:3"):
        assert IPS(text) == text
