"""Where words begin, for each way of spelling tokens, in English and in Chinese."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from lm.data.objectives.words import WordStarts, word_starts
from lm.text.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer

DATA = Path(__file__).resolve().parents[4] / "shared" / "data"
TEXT = "Don't tokenise 学生们在北京大学学习。你a Über 3.14 (words)\nunbelievably"
SPACED = ["Don", "'", "t", " tokenise"]
CHARACTERS = [" 学", "生", "们", "在", "北", "京", "大", "学", "学", "习"]
JIEBA = [" 学生", "们", "在", "北京大学", "学习"]
REST = ["。", "你", "a", " Über", " 3", ".", "14", " (", "words", ")", "\nunbelievably"]


def words_of(tokenizer: Tokenizer, text: str, words: str) -> list[str]:
    ids = np.array([tokenizer.encode(text)])
    starts = word_starts(tokenizer, ids, words=words)[0]
    assert starts[0]
    return [tokenizer.decode(word.tolist()) for word in np.split(ids[0], np.flatnonzero(starts)[1:])]


@pytest.mark.parametrize(("words", "chinese"), [("pieces", CHARACTERS), ("jieba", JIEBA)])
@pytest.mark.parametrize("kind", ["byte", "char"])
def test_bytes_and_characters_join_to_words(kind: str, words: str, chinese: list[str]) -> None:
    tokenizer = train_tokenizer(TokenizerConfig(kind=kind, vocab_size=100), [TEXT])
    if kind == "byte":
        assert len(tokenizer.encode(TEXT)) > len(TEXT)  # characters are spread over tokens
    assert words_of(tokenizer, TEXT, words) == [*SPACED, *chinese, *REST]


@pytest.mark.parametrize(
    ("kind", "vocab_size"), [("bpe", 280), ("unigram", 270), ("sentencepiece-bpe", 290), ("sentencepiece-unigram", 281)]
)
def test_subwords_join_to_words(kind: str, vocab_size: int) -> None:
    text = "unbelievable things happened there, unbelievably 42 times"
    tokenizer = train_tokenizer(TokenizerConfig(kind=kind, vocab_size=vocab_size), [text * 3])
    assert len(tokenizer.encode(text)) > 9
    expected = ["unbelievable", " things", " happened", " there", ",", " unbelievably", " 42", " times"]
    assert words_of(tokenizer, text, "pieces") == expected


def test_wordpieces_and_words() -> None:
    texts = ["the unbelievable believer 北京大学 的人"] * 3
    tokenizer = train_tokenizer(TokenizerConfig(kind="wordpiece", vocab_size=38), texts)
    ids = np.array([tokenizer.encode("unbelievable 北京大学 believer")])
    pieces = [tokenizer.id_to_piece(i) for i in ids[0]]
    assert any(piece.startswith("##") for piece in pieces)
    starts = word_starts(tokenizer, ids)[0]
    assert starts.tolist() == [not piece.startswith("##") for piece in pieces]
    joined = word_starts(tokenizer, ids, words="jieba")[0]
    spelled = {piece: start for piece, start in zip(pieces, joined) if piece in "北京大学"}
    assert spelled == {"北": True, "京": False, "大": False, "学": False}
    assert joined.sum() == starts.sum() - 3

    tokenizer = train_tokenizer(TokenizerConfig(kind="word", vocab_size=50), texts)
    assert word_starts(tokenizer, np.array([tokenizer.encode(texts[0])])).all()


def test_rows_and_gaps_are_kept_apart() -> None:
    tokenizer = train_tokenizer(TokenizerConfig(kind="char", vocab_size=20), ["北京大学"])
    ids = np.array([tokenizer.encode("北京"), tokenizer.encode("大学")])
    starts = WordStarts(tokenizer, words="jieba")
    assert starts(ids).tolist() == [[True, False], [True, False]]
    ids = np.array([tokenizer.encode("北京大学")])
    assert starts(ids).tolist() == [[True, False, False, False]]
    ids[0, 1] = -1  # not to be masked
    assert starts(ids)[0, 2]
    ids[0, 1] = tokenizer.eos_id
    assert starts(ids)[0, 1:3].all()


def test_chinese_words_behind_broken_and_long_characters() -> None:
    """A row that begins within a character, and one of four bytes: words are still found where they are."""
    tokenizer = train_tokenizer(TokenizerConfig(kind="byte"), [])
    ids = np.array([tokenizer.encode("学😀é北京大学")])[:, 1:]
    starts = word_starts(tokenizer, ids, words="jieba")[0]
    words = np.split(ids[0], np.flatnonzero(starts)[1:])
    assert bytes(words[-1].tolist()).decode() == "北京大学"


def test_a_copy_in_another_process_says_the_same() -> None:
    tokenizer = train_tokenizer(TokenizerConfig(kind="byte"), [])
    ids = np.array([tokenizer.encode(TEXT)])
    starts = WordStarts(tokenizer, words="jieba")
    expected = starts(ids)
    assert (pickle.loads(pickle.dumps(starts))(ids) == expected).all()


@pytest.mark.skipif(not DATA.is_dir(), reason="needs shared/data")
def test_vocabularies_of_gpt2_and_bert() -> None:
    gpt2 = train_tokenizer(TokenizerConfig(kind=f"file:{DATA}/tokenizers/gpt2-encoder.json"), [])
    assert words_of(gpt2, "Antidisestablishment works 北京大学，好", "jieba") == [
        "Antidisestablishment", " works", " 北京大学", "，", "好",
    ]  # fmt: skip
    bert = train_tokenizer(TokenizerConfig(kind=f"file:{DATA}/tokenizers/bert-base-chinese-vocab.txt"), [])
    found = words_of(bert, "我们喜欢自然语言处理", "jieba")
    assert [word.replace(" ", "") for word in found] == ["我们", "喜欢", "自然语言", "处理"]
