"""Tokenizers found on disk: GPT-2's, BERT's, SentencePiece's, and files that are none of them."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.errors import UserError
from lm.text.files import open_file
from lm.text.spm import SentencePieceTokenizer
from lm.text.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer

TEXTS = ["The quick brown fox jumps over the lazy dog.\n" * 30, "床前明月光，疑是地上霜。\n" * 30]
BPE = train_tokenizer(TokenizerConfig(kind="bpe", vocab_size=320), TEXTS)
VOCAB = (
    "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "qu", "##ick", "床", "cafe", "Café", "."]) + "\n"
)
DATA = Path(__file__).parents[3] / "shared" / "data"


def opened(path: Path, **changes) -> Tokenizer:
    return train_tokenizer(TokenizerConfig(kind=f"file:{path}", **changes), ())


def parts(folder: Path) -> tuple[dict, list[str]]:
    """The vocabulary and merges of BPE, apart, as GPT-2's are."""
    BPE.save(folder)
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    return model["vocab"], [" ".join(pair) for pair in model["merges"]]


@pytest.mark.parametrize(
    ("vocabulary", "merges"),
    [("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"), ("x-encoder.json", "x-vocab.bpe")],
)
def test_vocabulary_and_merges(vocabulary: str, merges: str, tmp_path: Path):
    ids, pairs = parts(tmp_path / "whole")
    folder = tmp_path / "apart"
    folder.mkdir()
    (folder / vocabulary).write_text(json.dumps(ids))
    (folder / merges).write_text("#version: 0.2\n" + "\n".join(pairs) + "\n")
    paths = [folder / vocabulary] if vocabulary.startswith("x") else [folder / vocabulary, folder]
    for path in paths:
        tokenizer = opened(path)
        for text in (*TEXTS, "x <|endoftext|> é\0\n"):
            assert tokenizer.encode(text) == BPE.encode(text)
        assert tokenizer.special_tokens == {"<|endoftext|>": 0}
        assert list(tokenizer.pieces("a b c", 1)) == ["a", " b", " c"]


def test_vocab_txt(tmp_path: Path):
    path = tmp_path / "vocab.txt"
    path.write_text(VOCAB, encoding="utf-8")
    for place in (path, tmp_path):
        tokenizer = opened(place)
        assert tokenizer.encode("the quick床 Café. CAFÉ") == [5, 6, 7, 8, 10, 11, 1]
        assert opened(place, lowercase=True).encode("THE quick床 Café. CAFÉ") == [5, 6, 7, 8, 9, 11, 9]
        assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id, tokenizer.mask_id, tokenizer.unk_id) == (
            3,
            2,
            0,
            4,
            1,
        )
        assert not set(tokenizer.encode("[MASK] [SEP]")) & set(tokenizer.special_tokens.values())
    path.write_bytes(VOCAB.replace("\n", "\r\n").encode("utf-8-sig"))
    assert opened(path).encode("the") == [5], "as written on Windows"


def test_a_tokenizer_json_and_a_folder_of_ours(tmp_path: Path):
    BPE.save(tmp_path)
    for path in (tmp_path / "tokenizer.json", tmp_path):
        assert opened(path).encode(TEXTS[0]) == BPE.encode(TEXTS[0])


def their_model(**options) -> bytes:
    """A model as others train them: with their defaults."""
    import sentencepiece

    model = io.BytesIO()
    lines = [line for text in TEXTS for line in text.splitlines()]
    options = {"vocab_size": 60, "minloglevel": 2, "model_type": "unigram", "hard_vocab_limit": False} | options
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **options)
    return model.getvalue()


def test_models_of_others_encode_and_decode_as_the_library_does(tmp_path: Path):
    import sentencepiece

    for options in (
        {},
        {"byte_fallback": True, "vocab_size": 330},
        {"byte_fallback": True, "vocab_size": 330, "normalization_rule_name": "identity"},
        {"user_defined_symbols": ["<sep>"], "pad_id": 3},
    ):
        model = their_model(**options)
        path = tmp_path / "theirs.model"
        path.write_bytes(model)
        tokenizer = opened(path)
        assert isinstance(tokenizer, SentencePieceTokenizer)
        assert not tokenizer.is_exact
        theirs = sentencepiece.SentencePieceProcessor(model_proto=model)
        for text in (*TEXTS, "  a\tb\n▁ ﬁ 龘 <sep></s>", ""):
            assert tokenizer.encode(text) == theirs.encode(text)
            assert tokenizer.decode(theirs.encode(text)) == theirs.decode(theirs.encode(text))
        assert (tokenizer.bos_id, tokenizer.eos_id) == (theirs.bos_id(), theirs.eos_id()) == (1, 2)
        assert tokenizer.pad_id == (3 if "pad_id" in options else None)
        assert tokenizer.unk_id == (None if "byte_fallback" in options else 0)


def test_a_model_of_ours_is_exact_also_without_its_folder(tmp_path: Path):
    ours = train_tokenizer(TokenizerConfig(kind="sentencepiece-bpe", vocab_size=320), TEXTS)
    ours.save(tmp_path / "saved")
    shutil.copy(tmp_path / "saved" / "tokenizer.model", tmp_path / "m.model")
    moved = opened(tmp_path / "m.model")
    text = "▁ \n\t\0 the 床"
    assert moved.decode(moved.encode(text)) == text
    assert moved.fingerprint() == ours.fingerprint()


@given(cut=st.integers(0, 10_000))
@settings(max_examples=100, deadline=None)
def test_a_model_cut_short_is_never_taken_for_whole(cut: int):
    model = MODEL[: cut % len(MODEL)]
    with pytest.raises(UserError, match=r"cut\.model is not a whole SentencePiece model"):
        SentencePieceTokenizer(model, origin="cut.model")


MODEL = their_model()


def make_bad(tmp: Path) -> None:
    ids, pairs = parts(tmp / "ours")
    for name, content in {
        "empty.txt": "",
        "twice/vocab.txt": "[UNK]\n[CLS]\n[SEP]\na\na\n",
        "lone.json": json.dumps(ids),
        "lone/vocab.json": json.dumps(ids),
        "few/vocab.json": json.dumps({"a": 0, "<|endoftext|>": 1}),
        "few/merges.txt": "",
        "other/vocab.json": json.dumps(ids),
        "other/merges.txt": "q zzz\n",
        "words/vocab.json": json.dumps(ids),
        "words/merges.txt": "a b c\n",
        "broken.json": "{",
        "list.json": "[1]",
        "note.md": "x",
        "two/vocab.txt": VOCAB,
        "two/vocab.json": json.dumps(ids),
        "nothing/readme": "",
        "junk.model": "junk",
        "empty.model": "",
        "saved/tokenizer_meta.json": '{"kind": "words"}',
        "saved/words.json": "{}",
        "gone/tokenizer_meta.json": '{"kind": "sentencepiece"}',
    }.items():
        (tmp / name).parent.mkdir(exist_ok=True)
        (tmp / name).write_text(content, encoding="utf-8")
    (tmp / "latin.txt").write_bytes(b"[UNK]\n\xff\n")
    (tmp / "good.model").write_bytes(MODEL)
    (tmp / "no_eos.model").write_bytes(their_model(eos_id=-1))
    del pairs


BAD = {
    "no such file": ("nowhere.json", "there is no such file or folder"),
    "a folder of something else": ("nothing", "a folder without a tokenizer; name a folder this program saved"),
    "a folder of several": ("two", "a folder with several: vocab.json, vocab.txt; name one"),
    "another ending": ("note.md", "name a folder this program saved, tokenizer.json"),
    "empty vocab.txt": ("empty.txt", r"is not a WordPiece vocabulary: it lacks \[UNK\], \[CLS\], \[SEP\]"),
    "a token twice": ("twice", "'a' stands on two lines"),
    "vocab.txt in Latin-1": ("latin.txt", "is not UTF-8 at byte 6"),
    "a vocabulary without merges": ("lone.json", "without merges; put merges.txt beside it"),
    "vocab.json without merges": ("lone", "without merges; put merges.txt or vocab.bpe beside it"),
    "not byte-level": ("few", "is not a byte-level vocabulary: it lacks 255 of the 256 bytes"),
    "merges of another vocabulary": ("other", "merges.txt does not fit vocab.json"),
    "merges of three": ("words", "'a b c' is not two tokens"),
    "broken JSON": ("broken.json", "is not a tokenizer"),
    "JSON of something else": ("list.json", "is not a Hugging Face tokenizer.json"),
    "a .model of something else": (
        "junk.model",
        "SentencePiece model: it is damaged, or something else; copy",
    ),
    "an empty .model": ("empty.model", "is not a whole SentencePiece model"),
    "a .model without an end": ("no_eos.model", "has no token that ends a document"),
    "words that are none": ("saved", "is not a tokenizer of words"),
    "a saved folder without its model": ("gone", "no tokenizer in .*tokenizer.model is missing"),
}


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    make_bad(folder)
    return folder


@pytest.mark.parametrize(("name", "message"), BAD.values(), ids=BAD.keys())
def test_what_is_no_tokenizer_is_said_in_one_line(bad: Path, name: str, message: str):
    with pytest.raises(UserError, match=message) as caught:
        opened(bad / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["ours", "ours/tokenizer.json", "good.model"])
def test_lowercase_is_for_files_that_do_not_say(bad: Path, name: str):
    with pytest.raises(UserError, match=r"lowercase is set, but file:.* says itself"):
        open_file(str(bad / name), lowercase=True)


@pytest.mark.skipif(not DATA.is_dir(), reason="no real vocabularies here")
def test_the_published_vocabularies():
    gpt2 = opened(DATA / "tokenizers" / "gpt2-encoder.json")
    assert (gpt2.vocab_size, gpt2.eos_id, gpt2.unk_id) == (50257, 50256, None)
    assert gpt2.encode("Hello world") == [15496, 995]
    bert = opened(DATA / "tokenizers" / "bert-base-uncased-vocab.txt", lowercase=True)
    assert (bert.vocab_size, bert.bos_id, bert.eos_id, bert.pad_id, bert.mask_id) == (30522, 101, 102, 0, 103)
    assert bert.encode("Hello, World!") == [7592, 1010, 2088, 999]
    chinese = opened(DATA / "tokenizers" / "bert-base-chinese-vocab.txt")
    assert chinese.vocab_size == 21128
    assert chinese.decode(chinese.encode("北京")) == "北 京"


def test_a_hub_that_is_out_of_reach_is_told_once_and_soon(tmp_path: Path):
    pytest.importorskip("huggingface_hub")
    code = "from lm.text.files import open_hub; open_hub('nope/nope')"
    # Nobody listens at port 9.
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=20)
    assert "UserError: cannot load tokenizer.kind 'hf:nope/nope': the hub cannot be reached" in run.stderr
    assert "Retrying" not in run.stderr
