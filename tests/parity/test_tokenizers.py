"""The same ids as `transformers`: GPT-2's and BERT's vocabularies, and what is trained here, loaded over there."""

import json
from pathlib import Path

import pytest

from lm.text.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer

transformers = pytest.importorskip("transformers", reason="pip install -e .[parity]")

DATA = Path(__file__).parents[3] / "shared" / "data"
VOCABULARIES = DATA / "tokenizers"
LINES = 10_000
EACH = [
    (DATA / "wikitext2" / "train.txt", 4_000),
    (DATA / "multi30k" / "train.de", 1_000),
    (DATA / "zh" / "thucnews_short_dev.txt", 2_500),
    (DATA / "zh" / "CLUECorpusSmall_sampled.txt", 2_500),
]

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:transformers"),
]
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="no published vocabularies here")


@pytest.fixture(scope="module")
def lines() -> list[str]:
    """Real lines in three languages."""
    found = []
    for path, count in EACH:
        with path.open(encoding="utf-8") as file:
            found += [line.rstrip("\n") for line in file][:count]
    assert len(found) == LINES
    return found


def ours(path: Path, **changes) -> Tokenizer:
    return train_tokenizer(TokenizerConfig(kind=f"file:{path}", **changes), ())


@needs_data
@pytest.mark.parametrize("name", ["GPT2Tokenizer", "GPT2TokenizerFast"])
def test_gpt2(name: str, lines: list[str]):
    vocabulary = json.loads((VOCABULARIES / "gpt2-encoder.json").read_text(encoding="utf-8"))
    merges = (VOCABULARIES / "gpt2-vocab.bpe").read_text(encoding="utf-8").split("\n")
    pairs = [tuple(line.split()) for line in merges if line and not line.startswith("#version")]
    theirs = getattr(transformers, name)(vocab=vocabulary, merges=pairs)
    mine = ours(VOCABULARIES / "gpt2-encoder.json")
    assert mine.encode_batch(lines) == theirs(lines)["input_ids"]
    assert mine.eos_id == theirs.eos_token_id
    ids = mine.encode(lines[0] + "月光")
    assert mine.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)


@needs_data
@pytest.mark.parametrize("name", ["BertTokenizer", "BertTokenizerFast"])
@pytest.mark.parametrize(
    ("vocabulary", "lowercase"),
    [
        ("bert-base-uncased-vocab.txt", True),
        ("bert-base-chinese-vocab.txt", False),
        ("bert-base-chinese-vocab.txt", True),
    ],
)
def test_bert(name: str, vocabulary: str, lowercase: bool, lines: list[str]):
    tokens = (VOCABULARIES / vocabulary).read_text(encoding="utf-8").removesuffix("\n").split("\n")
    theirs = getattr(transformers, name)(vocab={token: i for i, token in enumerate(tokens)}, do_lower_case=lowercase)
    mine = ours(VOCABULARIES / vocabulary, lowercase=lowercase)
    assert mine.encode_batch(lines) == theirs(lines, add_special_tokens=False)["input_ids"]
    for one, other in (("eos_id", "sep"), ("bos_id", "cls"), ("pad_id", "pad"), ("mask_id", "mask"), ("unk_id", "unk")):
        assert getattr(mine, one) == getattr(theirs, f"{other}_token_id")


TEXTS = ["The quick brown fox jumps over the lazy dog. It's <unk>!\n" * 30, "床前明月光，疑是地上霜。\t ＡＢ\n" * 30]


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("bpe", {}),
        ("unigram", {}),
        ("wordpiece", {"lowercase": True}),
        ("word", {"lowercase": True}),
        ("word", {"splitting": "whitespace"}),
        ("char", {}),
    ],
)
def test_what_is_trained_here_encodes_the_same_over_there(kind: str, changes: dict, tmp_path: Path):
    special = ("<mask>",) if kind != "wordpiece" else ("<extra>",)
    mine = train_tokenizer(TokenizerConfig(kind=kind, vocab_size=300, special_tokens=special, **changes), TEXTS)
    mine.save(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    texts = [*TEXTS, "  unseen words, 龘 é\r\n\x00", "İstanbul ΣΑΣ", "", *(TEXTS[0][i : i + 50] for i in range(40))]
    assert theirs(texts)["input_ids"] == mine.encode_batch(texts)
    assert len(theirs) == mine.vocab_size
    assert theirs.encode(special[0]) == [mine.special_tokens[special[0]]]


@needs_data
@pytest.mark.parametrize("kind", ["bpe", "unigram", "wordpiece", "word", "char"])
def test_the_same_on_real_lines(kind: str, lines: list[str], tmp_path: Path):
    mine = train_tokenizer(TokenizerConfig(kind=kind, vocab_size=3000, training_bytes=300_000), lines[::20])
    mine.save(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert theirs(lines)["input_ids"] == mine.encode_batch(lines)
