"""Tokenizers: exact round trips, separators that text cannot forge, and answers to bad input."""

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.errors import UserError
from lm.text.tokenizer import (
    EOS_NAMES,
    ByteTokenizer,
    Tokenizer,
    TokenizerConfig,
    load_tokenizer,
    train_tokenizer,
)

TEXTS = [
    "The quick brown fox jumps over the lazy dog. It's what they've done, isn't it?\n" * 20,
    "def f(x):\n    return x  +  1\n\n\n" * 20,
    "床前明月光，疑是地上霜。舉頭望明月，低頭思故鄉。\n" * 20,
]
BPE = train_tokenizer(TokenizerConfig(kind="bpe", vocab_size=400), TEXTS)
BYTE = train_tokenizer(TokenizerConfig(kind="byte"), ())
UNIGRAM = train_tokenizer(TokenizerConfig(kind="unigram", vocab_size=400), TEXTS)
PIECES = train_tokenizer(TokenizerConfig(kind="sentencepiece-bpe", vocab_size=380), TEXTS)
LIKELY_PIECES = train_tokenizer(TokenizerConfig(kind="sentencepiece-unigram", vocab_size=320), TEXTS)
# Those that spell every text.
EXACT = {
    "bpe": BPE,
    "byte": BYTE,
    "unigram": UNIGRAM,
    "sentencepiece-bpe": PIECES,
    "sentencepiece-unigram": LIKELY_PIECES,
}
BOTH = pytest.mark.parametrize("tokenizer", EXACT.values(), ids=EXACT.keys())

valid_text = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=200)
# Spaces of all sorts beside words: where cutting a long text goes wrong if it can.
spaced_text = st.text(alphabet=st.sampled_from(" \n\t\r\x1c\x85\u00a0\u3000a1'.s床"), max_size=200)
# What kinds use themselves to spell spaces, bytes, word endings and special tokens.
spellings = st.lists(
    st.sampled_from(
        ["\u2581", "\0", "Ġ", "Ċ", "##", "<0x0A>", "<unk>", "<s>", "</s>", " ⁇ ", "<|endoftext|>", "a", " "]
    )
).map("".join)


@BOTH
@given(text=valid_text | spaced_text | spellings)
@settings(max_examples=100, deadline=None)
def test_any_text_comes_back_exactly(tokenizer: Tokenizer, text: str):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.eos_id not in ids


@BOTH
@given(text=valid_text | spaced_text | spellings, size=st.integers(1, 20))
@settings(max_examples=200, deadline=None)
def test_pieces_encode_like_the_whole(tokenizer: Tokenizer, text: str, size: int):
    pieces = list(tokenizer.pieces(text, size))
    assert "".join(pieces) == text
    assert list(itertools.chain(*tokenizer.encode_batch(pieces))) == tokenizer.encode(text)


@BOTH
@pytest.mark.parametrize("name", EOS_NAMES)
def test_text_cannot_forge_the_separator(tokenizer: Tokenizer, name: str):
    text = f"before{name}after {name}"
    ids = tokenizer.encode(text)
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode(ids) == text


@BOTH
def test_saved_and_loaded_is_the_same(tokenizer: Tokenizer, tmp_path: Path):
    tokenizer.save(tmp_path / "tokenizer")
    loaded = load_tokenizer(tmp_path / "tokenizer")
    text = "It's <|endoftext|> 月光\n"
    assert loaded.encode(text) == tokenizer.encode(text)
    assert loaded.fingerprint() == tokenizer.fingerprint()
    assert (loaded.vocab_size, loaded.eos_id, loaded.bos_id) == (
        tokenizer.vocab_size,
        tokenizer.eos_id,
        tokenizer.bos_id,
    )
    assert list(loaded.pieces("a b " * 10, 4)) == list(tokenizer.pieces("a b " * 10, 4))


@BOTH
def test_cut_characters_decode_to_replacements(tokenizer: Tokenizer):
    ids = tokenizer.encode("\U0001f600")
    assert len(ids) > 1
    assert "\ufffd" in tokenizer.decode(ids[:-1])
    assert tokenizer.decode([tokenizer.eos_id]) == ""


@BOTH
def test_every_id_has_a_spelling(tokenizer: Tokenizer):
    pieces = [tokenizer.id_to_piece(i) for i in range(tokenizer.vocab_size)]
    assert all(pieces)
    assert len(set(pieces)) == len(pieces)
    assert tokenizer.id_to_piece(tokenizer.eos_id) == "<|endoftext|>"
    for outside in (-1, tokenizer.vocab_size):
        with pytest.raises(UserError, match=f"token id {outside} is outside"):
            tokenizer.id_to_piece(outside)


def test_bpe_learns_words_and_training_is_repeatable():
    again = train_tokenizer(TokenizerConfig(kind="bpe", vocab_size=400), iter(TEXTS))
    assert again.fingerprint() == BPE.fingerprint()
    assert BPE.vocab_size <= 400
    assert len(BPE.encode(TEXTS[0])) < len(TEXTS[0]) / 2
    other = train_tokenizer(TokenizerConfig(kind="bpe", vocab_size=400), TEXTS[:1])
    assert other.fingerprint() != BPE.fingerprint()


def test_training_reads_no_more_than_it_may():
    read = []

    def texts():
        for text in ["aaaa aaaa ", "月" * 10, "never read"]:
            read.append(text)
            yield text

    tokenizer = train_tokenizer(TokenizerConfig(kind="bpe", vocab_size=300, training_bytes=14), texts())
    assert read == ["aaaa aaaa ", "月" * 10]
    assert len(tokenizer.encode("aaaa")) == 1


def test_training_passes_on_what_goes_wrong_in_the_texts():
    def texts():
        yield "fine"
        raise UserError("the source broke")

    with pytest.raises(UserError, match="the source broke"):
        train_tokenizer(TokenizerConfig(), texts())


def test_hf_reads_a_file_or_a_folder(tmp_path: Path):
    BPE.save(tmp_path)
    for name in (tmp_path, tmp_path / "tokenizer.json"):
        tokenizer = train_tokenizer(TokenizerConfig(kind=f"hf:{name}"), ())
        assert tokenizer.encode("It's 月光") == BPE.encode("It's 月光")
        assert list(tokenizer.pieces("a b c", 1)) == ["a b c"]


def word_level(vocabulary: dict[str, int]) -> str:
    special = [
        {"id": i, "content": name, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        | {"special": True}
        for name, i in vocabulary.items()
        if name.startswith(("<", "["))
    ]
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"}
    return json.dumps(
        {"version": "1.0", "added_tokens": special, "pre_tokenizer": {"type": "Whitespace"}, "model": model}
    )


@pytest.mark.parametrize(
    ("names", "eos", "bos"),
    [(["</s>", "<s>"], "</s>", "<s>"), (["[CLS]", "[SEP]"], "[SEP]", "[CLS]"), (["<eos>"], "<eos>", "<eos>")],
)
def test_hf_finds_the_separator(tmp_path: Path, names: list[str], eos: str, bos: str):
    vocabulary = {name: i for i, name in enumerate(["[UNK]", "hello", *names])} | {"last": 90}
    path = tmp_path / "t.json"
    path.write_text(word_level(vocabulary))
    tokenizer = train_tokenizer(TokenizerConfig(kind=f"hf:{path}"), ())
    assert (tokenizer.eos_id, tokenizer.bos_id) == (vocabulary[eos], vocabulary[bos])
    assert tokenizer.vocab_size == 91, "ids may have holes; the embedding must still reach the last one"
    assert tokenizer.id_to_piece(50) == "<unused 50>"
    assert vocabulary[eos] not in tokenizer.encode(f"hello {eos}")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"kind": "bbpe"}, "tokenizer.kind is 'bbpe'; choose byte, bpe, .* hf:PATH_OR_NAME or file:PATH"),
        ({"kind": "hf:"}, "choose byte, bpe, .* hf:PATH_OR_NAME or file:PATH"),
        ({"kind": "bpe", "vocab_size": 256}, "vocab_size is 256; .* at least 257"),
        ({"kind": "bpe", "training_bytes": 0}, "training_bytes is 0"),
        ({"kind": "hf:./none.json"}, "no such file or folder"),
        ({"kind": "hf:{tmp}"}, "a folder without a tokenizer.json"),
        ({"kind": "hf:{tmp}/broken.json"}, "is not a Hugging Face tokenizer.json"),
        ({"kind": "hf:{tmp}/latin.json"}, "cannot read the tokenizer"),
        ({"kind": "hf:{tmp}/no_eos.json"}, "has no token that ends a document"),
        ({"kind": "hf:not a name"}, "neither a path that exists nor a name"),
    ],
)
def test_bad_settings_are_answered_in_one_line(tmp_path: Path, config: dict, message: str):
    (tmp_path / "broken.json").write_text('{"model": 1}')
    (tmp_path / "latin.json").write_bytes(b"\xff")
    (tmp_path / "no_eos.json").write_text(word_level({"[UNK]": 0}))
    config["kind"] = config["kind"].replace("{tmp}", str(tmp_path))
    with pytest.raises(UserError, match=message) as caught:
        train_tokenizer(TokenizerConfig(**config), ())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("meta", [None, "{", "[]", "{}", '{"kind": "bpe"}'])
def test_loading_what_is_no_tokenizer(tmp_path: Path, meta: str | None):
    if meta is not None:
        (tmp_path / "tokenizer_meta.json").write_text(meta)
    with pytest.raises(UserError, match="tokenizer in"):
        load_tokenizer(tmp_path)


@BOTH
def test_half_a_surrogate_pair_is_named(tokenizer: Tokenizer):
    with pytest.raises(UserError, match=r"U\+D83D at character 2"):
        tokenizer.encode("ab\ud83d")


def test_byte_ids_are_the_bytes():
    assert ByteTokenizer().encode("aé") == [97, 0xC3, 0xA9]
    assert BYTE.vocab_size == 257
    assert BYTE.encode_batch(["a", ""]) == [[97], []]


GPT2 = Path(__file__).parents[3] / "shared/data/tokenizers"


@pytest.mark.skipif(not GPT2.is_dir(), reason="GPT-2's vocabulary is not here")
def test_gpt2_ids_are_the_published_ones(tmp_path: Path):
    import tokenizers

    hf = tokenizers.ByteLevelBPETokenizer(str(GPT2 / "gpt2-encoder.json"), str(GPT2 / "gpt2-vocab.bpe"))
    hf.save(str(tmp_path / "tokenizer.json"))
    gpt2 = train_tokenizer(TokenizerConfig(kind=f"hf:{tmp_path}"), ())
    assert (gpt2.vocab_size, gpt2.eos_id, gpt2.bos_id) == (50257, 50256, 50256)
    assert gpt2.encode("Hello world") == [15496, 995]
    assert gpt2.decode([15496, 995, 50256]) == "Hello world"
