"""What each trained kind promises: repeatable training, known cuts, words, unknowns, special tokens, refusals."""

import itertools
import json
import os
import pickle
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.errors import UserError
from lm.text.tokenizer import (
    END_OF_TEXT,
    TRAINED_KINDS,
    SentencePieceTokenizer,
    Tokenizer,
    TokenizerConfig,
    check_tokenizer_config,
    load_tokenizer,
    shaping_settings,
    train_tokenizer,
)

TEXTS = [
    "The quick brown fox jumps over the lazy dog. It's what they've done, isn't it? Über café <unk> x.\n" * 10,
    "def f(x):\n\treturn x  +  1\n\n\n" * 10,
    "床前明月光，疑是地上霜。舉頭望明月，低頭思故鄉。我来到北京清华大学，研究生命的起源。\r\n" * 10,
]
SIZES = {"unigram": 330, "sentencepiece-unigram": 340, "sentencepiece-bpe": 360, "wordpiece": 250}
EVERY = pytest.mark.parametrize("kind", TRAINED_KINDS)


WORD_LIST = Path(__file__).with_name("word_list.txt")


def config(kind: str, **changes) -> TokenizerConfig:
    listed = {"word_list": str(WORD_LIST)} if kind == "maxmatch" else {}
    return TokenizerConfig(**{"kind": kind, "vocab_size": SIZES.get(kind, 300)} | listed | changes)


@cache
def trained(kind: str, **changes) -> Tokenizer:
    if kind == "jieba":
        pytest.importorskip("jieba", reason="jieba is an extra")
    return train_tokenizer(config(kind, **changes), TEXTS)


def pieces_of(tokenizer: Tokenizer, text: str) -> list[str]:
    return [tokenizer.id_to_piece(i) for i in tokenizer.encode(text)]


FINGERPRINTS = """
import json, sys
sys.path.insert(0, sys.argv[1])
import test_tokenizer_kinds as room
kinds = room.TRAINED_KINDS if len(sys.argv) < 3 else sys.argv[2:]
print(json.dumps({kind: room.trained(kind).fingerprint() for kind in kinds}))
"""


def test_training_repeats_to_the_bit_in_another_process_with_other_hashes_and_threads():
    pytest.importorskip("jieba", reason="jieba is an extra")
    environment = os.environ | {"PYTHONHASHSEED": "7", "RAYON_NUM_THREADS": "1"}
    program = [sys.executable, "-W", "error", "-c", FINGERPRINTS, str(Path(__file__).parent)]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=True)
    assert done.stderr == "", "libraries keep quiet"
    assert json.loads(done.stdout) == {kind: trained(kind).fingerprint() for kind in TRAINED_KINDS}


@EVERY
def test_saved_loaded_and_sent_to_a_process_it_is_the_same(kind: str, tmp_path: Path):
    tokenizer = trained(kind)
    tokenizer.save(tmp_path)
    text = f"It's {END_OF_TEXT} 月光\n<unk> [SEP]"
    through_file = train_tokenizer(TokenizerConfig(kind=f"file:{tmp_path}"), ())
    for other in (load_tokenizer(tmp_path), through_file, pickle.loads(pickle.dumps(tokenizer))):
        assert other.encode(text) == tokenizer.encode(text)
        assert other.fingerprint() == tokenizer.fingerprint()
        for name in ("vocab_size", "eos_id", "bos_id", "unk_id", "pad_id", "mask_id", "special_tokens"):
            assert getattr(other, name) == getattr(tokenizer, name)
        assert list(other.pieces("a b。c \nd", 1)) == list(tokenizer.pieces("a b。c \nd", 1))


@EVERY
def test_ids_spellings_and_special_tokens_fit_together(kind: str):
    tokenizer = trained(kind, special_tokens=("<mask>", "<pad>") if kind != "wordpiece" else ("<extra>",))
    spellings = [tokenizer.id_to_piece(i) for i in range(tokenizer.vocab_size)]
    assert len(set(spellings)) == len(spellings) <= config(kind).vocab_size
    assert all(spellings[i] == name for name, i in tokenizer.special_tokens.items())
    assert tokenizer.eos_id in tokenizer.special_tokens.values()
    assert spellings[tokenizer.mask_id] == ("[MASK]" if kind == "wordpiece" else "<mask>")
    assert spellings[tokenizer.pad_id] == ("[PAD]" if kind == "wordpiece" else "<pad>")
    assert tokenizer.decode([tokenizer.eos_id, tokenizer.mask_id]) == ""
    if tokenizer.unk_id is not None:
        assert spellings[tokenizer.unk_id] == ("[UNK]" if kind == "wordpiece" else "<unk>")
        assert tokenizer.decode([tokenizer.unk_id]).strip() in ("<unk>", "[UNK]", "⁇")


@EVERY
def test_text_never_becomes_a_special_token(kind: str):
    mine = ("<mask>", "<9>") if kind != "wordpiece" else ("<extra>",)
    tokenizer = trained(kind, special_tokens=mine)
    spelled = " ".join(tokenizer.special_tokens) + "".join(tokenizer.special_tokens) + "<0x0A>"
    assert not set(tokenizer.encode(spelled)) & set(tokenizer.special_tokens.values())


text = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60)
spaced = st.text(alphabet=st.sampled_from(" \n\t\r\x1c\x85\u00a0\u3000a1'.,床明月。，北京é\u0301ΣςİC+#"), max_size=80)


@EVERY
@given(text=text | spaced, size=st.integers(1, 9))
@settings(max_examples=120, deadline=None)
def test_pieces_encode_like_the_whole(kind: str, text: str, size: int):
    for tokenizer in (
        trained(kind),
        *([trained(kind, lowercase=True)] if kind in ("word", "char", "wordpiece") else ()),
    ):
        pieces = list(tokenizer.pieces(text, size))
        assert "".join(pieces) == text
        assert list(itertools.chain(*tokenizer.encode_batch(pieces))) == tokenizer.encode(text)


@EVERY
def test_long_documents_are_cut(kind: str):
    text = "a word or two and 床前明月光，疑是地上霜。 \n" * 100
    longest = max(map(len, trained(kind).pieces(text, 50)))
    assert longest <= 2 * 50


@pytest.mark.parametrize("kind", ["word", "char", "jieba", "maxmatch"])
def test_the_vocabulary_is_sorted_by_frequency(kind: str):
    pytest.importorskip("jieba", reason="jieba is an extra")
    text = "b b b c c a a 月 月 月 月 z"
    tokenizer = train_tokenizer(config(kind), [text])
    words = [tokenizer.id_to_piece(i) for i in range(tokenizer.vocab_size)]
    spaces = [] if kind == "word" else [" "]
    assert words == ["<unk>", *spaces, "月", "b", "a", "c", "z", END_OF_TEXT]
    often = train_tokenizer(config(kind, min_count=3), [text])
    assert [often.id_to_piece(i) for i in range(often.vocab_size)] == ["<unk>", *spaces, "月", "b", END_OF_TEXT]
    assert often.encode("月a") == [often.encode("月")[0], often.unk_id]
    few = train_tokenizer(config(kind, vocab_size=4 + len(spaces)), [text])
    assert [few.id_to_piece(i) for i in range(few.vocab_size)] == ["<unk>", *spaces, "月", "b", END_OF_TEXT]


def test_words_and_punctuation_stand_apart_and_chinese_characters_alone():
    tokenizer = trained("word")
    assert pieces_of(tokenizer, "It's done, isn't it?") == ["It's", "done", ",", "isn't", "it", "?"]
    assert pieces_of(tokenizer, "疑是地 上霜。") == ["疑", "是", "地", "上", "霜", "。"]
    assert tokenizer.decode(tokenizer.encode("over  the\nlazy dog .")) == "over the lazy dog ."
    assert tokenizer.decode(tokenizer.encode("the zebra")) == "the <unk>"
    by_space = trained("word", splitting="whitespace")
    assert pieces_of(by_space, "It's done, isn't it?") == ["It's", "done,", "isn't", "it?"]
    assert by_space.encode("<unk>") == [by_space.unk_id], "as the Penn Treebank spells it"
    small = trained("word", lowercase=True)
    assert pieces_of(small, "THE Quick") == ["the", "quick"]


def test_characters():
    tokenizer = trained("char")
    assert pieces_of(tokenizer, "a 月\n") == ["a", " ", "月", "\n"]
    assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in TEXTS)
    assert tokenizer.decode(tokenizer.encode("a龘b")) == "a<unk>b"


def test_wordpiece_spells_words_from_their_beginning():
    tokenizer = trained("wordpiece")
    assert tokenizer.special_tokens == {"[PAD]": 0, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4}
    assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.unk_id) == (3, 2, 1)
    spelled = pieces_of(tokenizer, "foxes")
    assert len(spelled) > 1
    assert all(piece.startswith("##") for piece in spelled[1:])
    assert spelled[0] + "".join(piece[2:] for piece in spelled[1:]) == "foxes"
    assert tokenizer.decode(tokenizer.encode("the quick foxes")) == "the quick foxes"
    assert pieces_of(trained("wordpiece", lowercase=True), "CAFÉ") == pieces_of(
        trained("wordpiece", lowercase=True), "cafe"
    )
    assert "[UNK]" not in pieces_of(tokenizer, "".join(TEXTS)), "every character of the training text is spelled"


def test_wordpiece_keeps_the_frequent_characters_where_not_all_fit():
    tokenizer = train_tokenizer(config("wordpiece", vocab_size=9), ["ab ab ab ba ba c d"])
    assert tokenizer.vocab_size <= 9
    assert pieces_of(tokenizer, "abba c") == ["a", "##b", "##b", "##a", "[UNK]"]


def test_sentencepiece_without_bytes_has_unknowns_but_keeps_lines():
    tokenizer = trained("sentencepiece-bpe", byte_fallback=False, vocab_size=150)
    assert isinstance(tokenizer, SentencePieceTokenizer)
    assert not tokenizer.is_exact
    assert tokenizer.encode("龘") == [tokenizer.unk_id]
    assert tokenizer.decode(tokenizer.encode("fox\n\tdog")) == "fox\n\tdog"


def test_character_coverage_decides_which_characters_get_a_token():
    def has(text: str, **changes) -> bool:
        tokenizer = train_tokenizer(
            config("sentencepiece-bpe", vocab_size=262, **changes), ["a" * 1000 + "b" * 10 + "c"]
        )
        return len(tokenizer.encode(text)) == 1 and not tokenizer.id_to_piece(tokenizer.encode(text)[0]).startswith(
            "<0x"
        )

    assert has("c", character_coverage=1.0)
    assert not has("c", character_coverage=0.99)
    assert has("a", character_coverage=0.99)


def test_training_stops_at_its_bytes_and_passes_on_what_goes_wrong():
    def texts(read: list[str]):
        for text in ["the first text " * 40, "never read"]:
            read.append(text)
            yield text
        raise UserError("the source broke")

    pytest.importorskip("jieba", reason="jieba is an extra")
    for kind in TRAINED_KINDS:
        read: list[str] = []
        train_tokenizer(config(kind, vocab_size=268, training_bytes=500), texts(read))
        assert len(read) == 1, kind
        with pytest.raises(UserError, match="the source broke"):
            train_tokenizer(config(kind), texts([]))


BAD = {
    "no such kind": ({"kind": "bytes"}, "tokenizer.kind is 'bytes'; choose byte, bpe,"),
    "a path is missing": ({"kind": "file:"}, "hf:PATH_OR_NAME or file:PATH"),
    "setting of another kind": ({"kind": "bpe", "lowercase": True}, "tokenizer.lowercase is set, but only word, char,"),
    "splitting of another kind": ({"kind": "jieba", "splitting": "whitespace"}, "splitting is set, but only word read"),
    "hmm of another kind": ({"kind": "maxmatch", "hmm": False}, "hmm is set, but only jieba"),
    "words of another kind": ({"kind": "maxmatch", "user_words": "x"}, "user_words is set, but only jieba"),
    "list of another kind": ({"kind": "jieba", "word_list": "x"}, "word_list is set, but only maxmatch"),
    "direction of another kind": ({"kind": "word", "direction": "forward"}, "direction is set, but only maxmatch"),
    "min_count of another kind": ({"kind": "unigram", "min_count": 2}, "min_count is set, but only word, char,"),
    "bytes of another kind": (
        {"kind": "bpe", "byte_fallback": False},
        "byte_fallback is set, but only sentencepiece-bpe",
    ),
    "coverage of another kind": ({"kind": "hf:x", "character_coverage": 1.0}, "character_coverage is set, but only"),
    "special tokens of no training": (
        {"kind": "byte", "special_tokens": ("<a>",)},
        "special_tokens is set, but only bpe",
    ),
    "special token without brackets": (
        {"kind": "bpe", "special_tokens": ("mask",)},
        r"holds 'mask'; write each in brac",
    ),
    "special token with a space": ({"kind": "bpe", "special_tokens": ("<a b>",)}, r"holds '<a b>'"),
    "special token of punctuation": ({"kind": "bpe", "special_tokens": ("<||>",)}, r"holds '<\|\|>'"),
    "special token twice": ({"kind": "bpe", "special_tokens": ("<a>", "<a>")}, "lists '<a>' twice"),
    "special token there already": ({"kind": "wordpiece", "special_tokens": ("[SEP]",)}, "which kind wordpiece has"),
    "room for bytes": ({"kind": "unigram", "vocab_size": 256}, "vocab_size is 256; unigram needs at least 257"),
    "room for special tokens": (
        {"kind": "bpe", "vocab_size": 257, "special_tokens": ("<a>",)},
        r"needs at least 258 \(256 bytes and <\|endoftext\|>, <a>\)",
    ),
    "room for pieces": ({"kind": "sentencepiece-bpe", "vocab_size": 258}, "needs at least 259"),
    "room for words": ({"kind": "word", "vocab_size": 2}, "word needs at least 3"),
    "room for wordpiece": ({"kind": "wordpiece", "vocab_size": 6}, "wordpiece needs at least 7"),
    "min_count": ({"kind": "word", "min_count": 0}, "min_count is 0; it must be at least 1"),
    "coverage": ({"kind": "sentencepiece-bpe", "character_coverage": 99.95}, "must be from 0.9 to 1"),
    "no user words": (
        {"kind": "jieba", "user_words": "nowhere.txt"},
        "user_words is 'nowhere.txt', but there is no such",
    ),
    "no word list": (
        {"kind": "maxmatch", "word_list": "nowhere.txt"},
        "word_list is 'nowhere.txt', but there is no such",
    ),
}


@pytest.mark.parametrize(("settings", "message"), BAD.values(), ids=BAD.keys())
def test_settings_that_cannot_be_are_refused_before_anything_is_read(settings: dict, message: str):
    with pytest.raises(UserError, match=message) as caught:
        check_tokenizer_config(TokenizerConfig(**settings))
    assert "\n" not in str(caught.value)


TOO = {
    "too many pieces": (
        "sentencepiece-bpe",
        {"vocab_size": 5000},
        r"5000; .* at most \d+: lower it to that or add text",
    ),
    "too many pieces (unigram)": ("sentencepiece-unigram", {"vocab_size": 5000}, r"at most \d+: lower it"),
    "more characters than room": (
        "sentencepiece-bpe",
        {"vocab_size": 260},
        r"260; the characters .* alone take \d+: raise",
    ),
    "nothing often enough": ("word", {"min_count": 1000}, "no word of the training text occurs 1000 times"),
    "nothing often enough (jieba)": ("jieba", {"min_count": 1000}, "no word of the training text occurs 1000 times"),
}


@pytest.mark.parametrize(("kind", "changes", "message"), TOO.values(), ids=TOO.keys())
def test_what_the_text_does_not_allow(kind: str, changes: dict, message: str):
    with pytest.raises(UserError, match=message) as caught:
        trained(kind, **changes)
    assert "\n" not in str(caught.value)


def test_the_bound_that_is_named_holds():
    with pytest.raises(UserError, match="at most") as caught:
        trained("sentencepiece-bpe", vocab_size=5000)
    bound = int(str(caught.value).split("at most ")[1].split(":")[0])
    assert trained("sentencepiece-bpe", vocab_size=bound).vocab_size == bound


@pytest.mark.parametrize("kind", [kind for kind in TRAINED_KINDS if kind not in ("bpe", "wordpiece")])
def test_no_text_at_all(kind: str):
    with pytest.raises(UserError, match=r"no text|no word of the training text"):
        train_tokenizer(config(kind), [])


def test_shaping_settings_leave_out_what_changes_nothing(tmp_path: Path):
    plain = TokenizerConfig()
    assert shaping_settings(plain) == {"kind": "bpe", "vocab_size": 8192, "training_bytes": 64_000_000}
    assert shaping_settings(config("word", min_count=2))["min_count"] == 2
    one, other = tmp_path / "one.txt", tmp_path / "other.txt"
    one.write_text("北京\n")
    other.write_text("北京\n")
    lists = [shaping_settings(config("maxmatch", word_list=str(path))) for path in (one, other)]
    assert lists[0] == lists[1]
    other.write_text("南京\n")
    assert shaping_settings(config("maxmatch", word_list=str(other))) != lists[0]
    json.dumps(shaping_settings(config("bpe", special_tokens=("<a>",))))
