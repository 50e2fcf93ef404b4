"""Exact round trips over real files: prose, poems, tables, web pages, JSON, vocabularies, in four encodings."""

from functools import cache
from pathlib import Path

import pytest

from lm.text.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer

DATA = Path(__file__).parents[3] / "shared" / "data"
FILES = sorted(path for path in DATA.rglob("*") if path.is_file())
KINDS = ("byte", "bpe", "unigram", "sentencepiece-bpe", "sentencepiece-unigram")
EVERY = pytest.mark.parametrize("kind", KINDS)

pytestmark = pytest.mark.skipif(not FILES, reason="no real text here")


def read(path: Path) -> str:
    """The text of a file, in the first encoding that reads it; the last one reads anything."""
    content = path.read_bytes()
    for encoding in ("utf-8", "gb18030", "latin-1"):
        try:
            return content.decode(encoding)
        except UnicodeDecodeError:
            continue
    raise AssertionError("latin-1 reads anything")


@cache
def trained(kind: str) -> Tokenizer:
    english, chinese = DATA / "tinyshakespeare" / "input.txt", DATA / "zh" / "CLUECorpusSmall_sampled.txt"
    texts = [read(english)[:100_000], read(chinese)[:50_000]]
    return train_tokenizer(TokenizerConfig(kind=kind, vocab_size=4000), texts)


def check_exact(kind: str, texts: list[str]) -> None:
    tokenizer = trained(kind)
    for text, ids in zip(texts, tokenizer.encode_batch(texts)):
        assert tokenizer.decode(ids) == text
        assert not set(ids) & set(tokenizer.special_tokens.values())


@EVERY
def test_the_beginning_of_every_file_comes_back(kind: str):
    check_exact(kind, [read(path)[:8_000] for path in FILES])


@EVERY
def test_the_same_in_other_encodings(kind: str):
    """What a wrong guess of the encoding makes of a file is text like any other."""
    wrong = [path.read_bytes()[:6_000].decode("latin-1") for path in FILES]
    check_exact(kind, wrong)


@EVERY
def test_pieces_of_real_text_encode_like_the_whole(kind: str):
    tokenizer = trained(kind)
    for path in FILES[::5]:
        text = read(path)[:30_000]
        pieces = list(tokenizer.pieces(text, 1_000))
        assert [i for ids in tokenizer.encode_batch(pieces) for i in ids] == tokenizer.encode(text)


@pytest.mark.slow
@EVERY
def test_every_file_comes_back_whole(kind: str):
    for path in FILES:
        check_exact(kind, [read(path)])
