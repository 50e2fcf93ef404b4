"""Encodings: found from the bytes alone, on text nobody here wrote; refusals that name the byte."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm.errors import UserError
from lm.text.encoding import check_encoding, decode, looks_binary

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
needs_data = pytest.mark.skipif(not (DATA / "zh").is_dir(), reason="needs ../shared/data")

ZH = "这个村子里的人都说，今年的雨水比去年多。老人们坐在门口，看着河水一天天地涨上来，谁也没有说话。\n" * 2
ZH_TRADITIONAL = "這個村子裡的人都說，今年的雨水比去年多。老人們坐在門口，看著河水一天天地漲上來，誰也沒有說話。\n" * 2
JA = "川の水は三日前から上がり続けていました。村の人たちは舟を広場に移し、静かに雨を見ていました。\n" * 2
KO = "마을 사람들은 올해 비가 작년보다 많이 왔다고 말했다. 노인들은 문 앞에 앉아서 강물을 보고 있었다.\n" * 2
DE = "Über den Fluß führt eine Brücke. Die Männer stehen dort und grüßen höflich, wenn jemand vorübergeht.\n" * 2
FR = "L’été dernier, la rivière était déjà très haute ; les élèves ne pouvaient plus aller à l’école.\n" * 2
RU = "Вода в реке поднималась уже третий день. Старики сидели у ворот и молча смотрели на дождь.\n" * 2


@pytest.mark.parametrize(
    ("text", "codec"),
    [
        *[(text, "utf-8") for text in (ZH, ZH_TRADITIONAL, JA, KO, DE, RU, "plain", "")],
        *[(text, "utf-8-sig") for text in (ZH, DE)],
        *[(text, codec) for text in (ZH, DE, RU, KO) for codec in ("utf-16", "utf-32")],
        *[(text, codec) for text in (ZH, ZH_TRADITIONAL, DE, RU) for codec in ("utf-16-le", "utf-16-be")],
        *[(ZH, codec) for codec in ("gb2312", "gbk", "gb18030")],
        *[(ZH_TRADITIONAL, codec) for codec in ("big5", "cp950", "big5hkscs", "gb18030")],
        *[(JA, codec) for codec in ("cp932", "shift_jis", "euc_jp", "iso2022_jp")],
        *[(KO, codec) for codec in ("euc_kr", "cp949")],
        *[(DE, codec) for codec in ("latin-1", "cp1252")],
        (FR, "cp1252"),
        *[(RU, codec) for codec in ("cp1251", "koi8_r")],
        ("English first. " * 3000 + ZH, "gb18030"),
        ("# größe\n" + "x = 1\n" * 50, "latin-1"),
    ],
)
def test_found(text: str, codec: str):
    content = text.encode(codec)
    assert decode(content, "auto")[0] == text
    assert not looks_binary(content)


def test_the_codec_is_told():
    assert decode(ZH.encode("gbk"), "auto")[1] == "gb18030"
    assert decode(DE.encode(), "auto")[1] == "utf-8"
    assert decode(b"\xef\xbb\xbfx", "utf-8") == ("x", "utf-8")


def test_a_page_knows_itself():
    # Too short to tell from other Cyrillic and Greek codecs by its letters.
    page = '<html><head><meta charset="iso-8859-7"></head><p>αβγ</p>'
    assert decode(page.encode("iso8859-7"), "auto")[0] == page
    page = '<?xml version="1.0" encoding="GB2312"?><p>镕</p>'  # not in GB2312 proper, in its superset
    assert decode(page.encode("gbk"), "auto")[0] == page


def test_a_page_that_errs_about_itself_is_read_anyway():
    page = f'<meta charset="utf-8">{ZH}'
    assert decode(page.encode("gb18030"), "auto") == (page, "gb18030")


@pytest.mark.parametrize(("text", "codec"), [(ZH, "gb18030"), (ZH_TRADITIONAL, "big5hkscs"), (ZH, "utf-8")])
def test_a_damaged_file_is_not_another_encoding(text: str, codec: str):
    content = bytearray((text * 20).encode(codec))
    content[len(content) // 2] = 0xFF
    found, name = decode(bytes(content), "auto")
    assert name == f"{codec}, damaged"
    assert 1 <= found.count("\ufffd") <= 3
    assert found[:500] == (text * 20)[:500]


def test_strict_says_which_byte():
    with pytest.raises(UserError, match=r"byte 0xd5 at offset 0 is not utf-8.*auto"):
        decode("这".encode("gbk"), "utf-8")
    with pytest.raises(UserError, match=r"at offset 3 is not big5"):
        decode(b"abc\xff", "big5")
    for name in ("utf8x", "rot13", "hex", "zip"):
        with pytest.raises(UserError, match="choose utf-8, auto, or a codec"):
            check_encoding(name)
        with pytest.raises(UserError, match="choose utf-8, auto, or a codec"):
            decode(b"x", name)
    for name in ("auto", "utf-8", "GB18030", "latin-1"):
        check_encoding(name)


def test_binary():
    for content in (
        b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
        b"\x7fELF\x02\x01\x01\0",
        bytes(range(256)),
        b"\0" * 100,
        b"a\0b",
    ):
        assert looks_binary(content)
    for content in (b"", b"x", b"\x1b[31mred\x1b[0m\n" * 3, b"page\fpage\n"):
        assert not looks_binary(content)


@given(st.binary(max_size=300))
def test_any_bytes_become_text(content: bytes):
    text, name = decode(content, "auto")
    assert name
    text.encode("utf-8")  # no lone surrogates
    looks_binary(content)


@given(st.text(max_size=200))
def test_utf8_is_never_taken_for_anything_else(text: str):
    try:
        content = text.encode("utf-8")
    except UnicodeEncodeError:
        return
    if b"\0" not in content and b"\x1b$" not in content and not text.startswith("\ufeff"):
        assert decode(content, "auto") == (text, "utf-8")


def _samples(size: int) -> Iterator[tuple[str, str, bytes, str]]:
    """Pieces of real text, cut between characters: name, codec, bytes, text."""
    chinese = [x for x in (DATA / "zh/CLUECorpusSmall_sampled.txt").read_text("utf-8").splitlines()[::5] if len(x) > 60]
    tang = json.loads((DATA / "zh/poet.tang.0.json").read_text("utf-8"))
    poems = ["\n".join(poem["paragraphs"]) for poem in tang[::5]]
    poems = ["\n".join(poems[i : i + 15]) for i in range(0, len(poems), 15)]
    german = (DATA / "multi30k/val.de").read_text("utf-8").splitlines()
    captions = ["\n".join(german[i : i + 15]) for i in range(0, 600, 15)]
    for name, codec, documents in (
        ("modern Chinese", "gb18030", chinese),
        ("Tang poems", "big5hkscs", poems),
        ("Tang poems", "gb18030", poems),
        ("German", "latin-1", captions),
    ):
        for document in documents:
            content = document.encode(codec, errors="ignore")
            if len(content) >= size:
                text = content[:size].decode(codec, errors="ignore")
                if not text.isascii():
                    yield name, codec, text.encode(codec), text


@needs_data
@pytest.mark.parametrize(("size", "at_least"), [(50, 0.9), (200, 0.98), (1000, 1.0)])
def test_accuracy_on_real_text(size: int, at_least: float):
    right: dict[tuple[str, str], list[bool]] = {}
    for name, codec, content, text in _samples(size):
        right.setdefault((name, codec), []).append(decode(content, "auto")[0] == text)
    assert len(right) >= 3
    for kind, found in right.items():
        assert sum(found) >= at_least * len(found), (kind, sum(found), len(found))
