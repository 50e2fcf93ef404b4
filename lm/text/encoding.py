"""Bytes to text: strict UTF-8, a named codec, or the likeliest of those that text files are found in.

Detection decodes a sample with every candidate and asks which result reads like text: frequent Chinese characters and
Korean syllables, kana, accented letters between plain ones. Bytes that are UTF-8 are never taken for anything else.
"""

from __future__ import annotations

import codecs
import re

from lm.errors import UserError, check

_BOMS = (  # UTF-32 before UTF-16, whose mark its own begins with
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_CANDIDATES = ("utf-8", "gb18030", "big5hkscs", "cp932", "euc_jp", "cp949", "cp1252", "cp1251", "koi8_r")
_PAIRS = ("utf-16-le", "utf-16-be")
_SAMPLE = 1 << 14  # bytes
_DECLARED = re.compile(
    rb"""<(?:meta\b[^>]{0,200}?\bcharset|\?xml\b[^>]{0,200}?\bencoding)\s{0,9}=\s{0,9}["']?([\w.:-]{2,40})""", re.I
)
_LEAST_LIKENESS = 0.4  # of UTF-16; text has 0.6 and more, bytes at random 0.1
_MOST_DAMAGE = 0.01  # more undecodable characters than this among those beyond ASCII: it is another encoding

# About 340 of the most frequent characters of modern Chinese, and the traditional forms of those that have one.
_HAN = frozenset(
    "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过发后作里用道行所然家种事"
    "成方多经么去法学如都同现当没动面起看定天分还进好小部其些主样理心她本前开但因只从想实日军者意无力它与长把机十民第公此"
    "已工使情明性知全三又关点正业外将两高间由问很最重并物手应战向头文体政美相见被利什二等产或新己制身果加西月话合回特代内"
    "信表化老给世位次度门任常先海通教儿原东声提立及比员解水名真论处走义各入几口认条平系气题活更别打女变四神总何电数安少报"
    "才结反受目太量再感建务做接必场件计管期市直资命山金指许统区保至队形社便空决治展马科司五基眼书非则听白却界达光放强即像"
    "难且权思王象完设式色路记南品住告类求据程北边死张该交规万取望觉术领共确传师观清今切院让识候带导争运"
    "這個們來為國說時會對於著過發後裡種經麼學現當動還進樣開從實軍無與長機關點業將兩間問應戰頭體見產話給門兒東聲員論處義"
    "幾認條係氣題別變總電數報結務場計資許統區隊決馬書則聽卻達強難權設記類據邊張該規萬覺術領確傳師觀讓識帶導爭運沒"
)
_HANGUL = frozenset(
    "이다는에의을가고하지를로한은도기서나사리자어아라시있그것인대해들수보부정만일여주우과게전원구으오면상성제선스장동조비유공국적"
    "니요습안트실신교회용경학연소개무후화세문모음드치생위중방마음물재계년월내민려되때거진입말및"
)
_CYRILLIC = frozenset("оеаинтсрвлкмдпуяыьгзбчйхжшюцщэё")
_LATIN = frozenset("äöüßéèêàâçñóíáúîôûëïåøæœãõìòùýðþ")
_LATIN_SIGNS = frozenset("“”‘’„‚–—…«»°§©®£€¿¡·•´ªº½¼²³\u00a0")
_BEYOND_ASCII = re.compile("[^\x00-\x7f]+")


def decode(content: bytes, encoding: str) -> tuple[str, str]:
    """Text of `content`.

    Args:
      content: a whole file.
      encoding: "utf-8" (strict; a byte order mark is left out), "auto", or the name of any Python text codec (strict).
        "auto" goes by the byte order mark, then UTF-8, then what an HTML or XML file says of itself, then by likeness
        to text. A file of which at most 1 % of the characters beyond ASCII cannot be decoded is damaged rather than of
        another encoding: U+FFFD stands for what is lost.

    Returns:
      The text, and the codec that was used; after "auto", "CODEC, damaged" where anything was replaced.

    Raises:
      UserError: if the codec is unknown, or cannot decode `content`.
    """
    if encoding == "auto":
        return _decode_auto(content)
    name = encoding.lower().replace("_", "-")
    codec = "utf-8-sig" if name in ("utf-8", "utf8") else encoding
    check_encoding(encoding)
    try:
        return content.decode(codec), encoding
    except UnicodeDecodeError as error:
        raise UserError(
            f"byte 0x{content[error.start]:02x} at offset {error.start:,} is not {encoding} ({error.reason}); "
            "name the file's encoding, or auto to have it detected"
        ) from None
    except UnicodeError as error:  # utf-16 without a mark it insists on
        raise UserError(f"this is not {encoding} ({error}); name the file's encoding, or auto") from None


def check_encoding(encoding: str) -> None:
    """Raises `UserError` unless `decode` knows `encoding`."""
    if encoding == "auto":
        return
    try:
        is_text = codecs.lookup(encoding)._is_text_encoding
    except LookupError:
        is_text = False
    check(
        is_text, f"encoding is {encoding!r}; choose utf-8, auto, or a codec of Python's such as gb18030, big5, cp1252"
    )


def looks_binary(content: bytes) -> bool:
    """Whether the start of a file (8 KiB are looked at) is something else than text in any encoding.

    Text has no NUL bytes, unless it is UTF-16 or UTF-32, and hardly any control bytes.
    """
    head = content[:8192]
    if not head or head.startswith(tuple(bom for bom, _ in _BOMS)):
        return False
    if b"\0" in head:
        return _utf16(head) is None
    return len(head.translate(None, _NO_CONTROLS)) > 0.01 * len(head)


# Everything but C0 controls; tab, line and page ends, backspace and escape are found in text.
_NO_CONTROLS = bytes(b for b in range(256) if b >= 32 or b in b"\t\n\v\f\r\b\x1a\x1b")


def _decode_auto(content: bytes) -> tuple[str, str]:
    for bom, codec in _BOMS:
        if content.startswith(bom):
            return _lenient(content, codec)
    if pairs := _utf16(content[:_SAMPLE]):
        return _lenient(content, pairs)
    try:
        text = content.decode("utf-8")
        if b"\x1b$" not in content:
            return text, "utf-8"
        return content.decode("iso2022_jp"), "iso2022_jp"
    except UnicodeDecodeError:
        pass
    if declared := _declared(content):
        try:
            return content.decode(declared), declared
        except UnicodeDecodeError:
            pass  # files say all sorts of things of themselves
    return _lenient(content, _likeliest(content))


def _lenient(content: bytes, codec: str) -> tuple[str, str]:
    try:
        return content.decode(codec), codec
    except UnicodeDecodeError:
        return content.decode(codec, errors="replace"), f"{codec}, damaged"


def _declared(content: bytes) -> str | None:
    """The codec that HTML or XML names at its start; what is called gb2312 or gbk is read as their superset."""
    match = _DECLARED.search(content[:2048])
    if match is None:
        return None
    name = match[1].decode("ascii", errors="replace").lower()
    name = {"gb2312": "gb18030", "gbk": "gb18030", "big5": "big5hkscs", "shift_jis": "cp932", "euc-kr": "cp949"}.get(
        name, "cp1252" if name in ("iso-8859-1", "latin-1", "latin1", "us-ascii") else name
    )
    try:
        info = codecs.lookup(name)
    except LookupError:
        return None
    # Bytes that declare UTF-16 in ASCII are not UTF-16.
    return info.name if info._is_text_encoding and not info.name.startswith(("utf-16", "utf-32")) else None


def _utf16(sample: bytes) -> str | None:
    """The byte order of UTF-16 without a mark; None if it is something else. Any text in it has zeros: in newlines."""
    if b"\0" not in sample:
        return None
    sample = sample[: len(sample) // 2 * 2]
    likeness, codec = max((_likeness(sample.decode(codec, errors="replace"), codec), codec) for codec in _PAIRS)
    return codec if likeness >= _LEAST_LIKENESS else None


def _likeliest(content: bytes) -> str:
    """The candidate whose decoding of a sample reads most like text; the earlier one of equals."""
    # From the line of the first byte beyond ASCII on: what comes before says nothing.
    start = len(content) - len(content.lstrip(bytes(range(128))))
    start = content.rfind(b"\n", max(0, start - 200), start) + 1 or start
    start -= start % 2  # keeps pairs together
    sample = content[start : start + _SAMPLE]
    best, best_score = "latin-1", -1.0
    for codec in (*_CANDIDATES, *(_PAIRS if len(content) % 2 == 0 else ())):
        decoder = codecs.getincrementaldecoder(codec)(errors="replace")
        score = _likeness(decoder.decode(sample), codec)
        if score > best_score:
            best, best_score = codec, score
    if best == "cp1252":
        try:
            content.decode(best)
        except UnicodeDecodeError:
            return "latin-1"  # which has a character for every byte
    return best


def _likeness(text: str, codec: str) -> float:
    """How much the characters of `text` beyond ASCII are those of real text, 0 to 1; -1 if it cannot be this codec."""
    chars = [char for char in text if char > "\x7f"]
    lost = chars.count("\ufffd")
    if not chars or lost > _MOST_DAMAGE * len(chars):
        return -1.0
    if codec == "utf-8":
        return 1.0  # nothing else decodes as UTF-8 but for a few bytes
    if codec == "cp1252":
        return _latin_likeness(text)
    if codec in ("cp1251", "koi8_r"):
        return 0.8 * _cyrillic_likeness(text, len(chars))  # almost any byte is a letter there, so it takes more to tell
    pairs = codec in _PAIRS
    if pairs:
        chars = list(text)  # a wrong byte order spoils plain letters too
    good = 0.0
    for char in chars:
        if char in _HAN or "\u3041" <= char <= "\u30fe" or char in _HANGUL:
            good += 1.0
        elif "\u3000" <= char <= "\u3020" or "\uff01" <= char <= "\uff5e" or char in "“”‘’—…·":
            good += 0.7
        elif pairs and char < "\u0600":
            good += 0.7 if char.isprintable() or char.isspace() else 0.0
        elif "\u4e00" <= char <= "\u9fff" or "\uac00" <= char <= "\ud7a3":
            good += 0.2
    return good / len(chars)


def _cyrillic_likeness(text: str, total: int) -> float:
    """Small letters follow each other; a capital after a small letter is not Russian, nor is a Latin neighbour."""
    good = 0.0
    before = " "
    for char, after in zip(text, text[1:] + " "):
        if char.lower() in _CYRILLIC:
            foreign = (before.isascii() and before.isalpha()) or (after.isascii() and after.isalpha())
            if foreign or (char not in _CYRILLIC and before in _CYRILLIC):
                good -= 0.5
            elif char in _CYRILLIC:
                good += 1.0
        before = char
    return good / total


def _latin_likeness(text: str) -> float:
    """Accented letters stand alone, or two together, beside plain ones; they are mostly small."""
    good = total = 0.0
    for match in _BEYOND_ASCII.finditer(text):
        run = match[0]
        before, after = text[match.start() - 1 : match.start()], text[match.end() : match.end() + 1]
        beside = before.isalpha() or after.isalpha()
        total += len(run)
        for char in run:
            if char in _LATIN_SIGNS:
                good += 0.7 if len(run) == 1 else 0.3
            elif char.lower() not in _LATIN:
                continue
            elif char.isupper() and before.islower():
                good += 0.1
            elif len(run) == 1:
                good += 1.0 if beside else 0.3
            else:
                good += 0.6 if beside and len(run) == 2 and run.islower() else 0.2
    return good / total
