"""Numbers about tokenizers, against counts by hand."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm.errors import UserError
from lm.text.compare import batches, compare, count_words, spelled, unknown_rate
from lm.text.tokenizer import TokenizerConfig, train_tokenizer

BYTE = train_tokenizer(TokenizerConfig(kind="byte"), ())
WORD = train_tokenizer(TokenizerConfig(kind="word", vocab_size=100), ["the cat sat , the cat ."])
BPE = train_tokenizer(TokenizerConfig(kind="bpe", vocab_size=300), ["the cat sat on the mat " * 20])


def test_numbers_by_hand():
    texts = ["the cat 床.", "", "a dog"]  # 12 + 5 bytes, 10 + 5 characters, 3 + 2 words
    ticks = itertools.count()
    rows = {row.name: row for row in compare({"b": BYTE, "w": WORD}, texts, clock=lambda: next(ticks) / 2)}
    byte, word = rows["b"], rows["w"]
    assert (byte.vocab_size, byte.tokens, byte.unknown_rate, byte.exact) == (257, 17, 0, 1)
    assert (byte.tokens_per_byte, byte.tokens_per_character, byte.tokens_per_word) == (1, 17 / 15, 17 / 5)
    assert byte.megabytes_per_second == pytest.approx(17 / 0.5 / 1e6), "half a second on this clock"
    assert word.tokens == 6
    assert word.unknown_rate == 3 / 6
    assert word.exact == 0
    assert word.longest == ("cat", "the", ".")
    assert unknown_rate(WORD, iter(texts)) == 3 / 6
    assert unknown_rate(BYTE, texts) == 0
    assert unknown_rate(WORD, []) == 0


def test_no_text_is_refused():
    with pytest.raises(UserError, match="no text to compare"):
        compare({"b": BYTE}, ["", ""])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("It's 3 o'clock, Mr. Über.", 5),
        ("床前明月光，疑是地上霜。", 10),
        ("用GPT2写代码 ok", 6),
        ("カタカナ と 한국어", 4 + 1 + 3),
        ("... !!! \n", 0),
        ("", 0),
    ],
)
def test_a_chinese_sentence_is_not_one_word(text: str, words: int):
    assert count_words(text) == words


def test_pieces_are_spelled_as_text():
    assert list(spelled(BPE, BPE.encode("the cat"))) == [("the", 1), (" cat", 1)]
    assert list(spelled(BYTE, BYTE.encode("a床😀"))) == [("a", 1), ("床", 3), ("😀", 4)]
    assert list(spelled(BYTE, [97, 0xFF, 256, 98])) == [("a", 1), ("<0xFF>", 1), ("<|endoftext|>", 1), ("b", 1)]
    assert list(spelled(WORD, WORD.encode("the zebra"))) == [("the", 1), ("<unk>", 1)]


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd")))
def test_pieces_spell_the_text_and_count_the_tokens(text: str):
    pieces = list(spelled(BPE, BPE.encode(text)))
    assert "".join(piece for piece, _ in pieces) == text
    assert sum(count for _, count in pieces) == len(BPE.encode(text))


def test_batches_hold_all_texts_in_order():
    texts = [str(i) * 300_000 for i in range(10)]
    found = list(batches(texts))
    assert list(itertools.chain(*found)) == texts
    assert len(found) > 1
