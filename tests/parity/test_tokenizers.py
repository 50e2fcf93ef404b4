"""The same ids as `transformers`: GPT-2's and BERT's vocabularies, and what is trained here, loaded over there."""

import functools
import itertools
import json
import math
from pathlib import Path

import pytest
import tiny

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


def gpt2_files() -> tuple[dict[str, int], list[tuple[str, str]]]:
    vocabulary = json.loads((VOCABULARIES / "gpt2-encoder.json").read_text(encoding="utf-8"))
    merges = (VOCABULARIES / "gpt2-vocab.bpe").read_text(encoding="utf-8").split("\n")[1:-1]
    return vocabulary, [(line.split()[0], line.split()[1]) for line in merges]


@needs_data
def test_gpt2(lines: list[str]):
    assert transformers.GPT2TokenizerFast is transformers.GPT2Tokenizer, "one class since version 5"
    vocabulary, merges = gpt2_files()
    theirs = transformers.GPT2Tokenizer(vocab=vocabulary, merges=merges)
    mine = ours(VOCABULARIES / "gpt2-encoder.json")
    assert mine.encode_batch(lines) == theirs(lines)["input_ids"]
    assert mine.eos_id == theirs.eos_token_id
    ids = mine.encode(lines[0] + "月光")
    assert mine.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)


@needs_data
def test_gpt2_as_first_published(lines: list[str]):
    """The algorithm of GPT-2's own encoder.py, in Python and slow."""
    regex = pytest.importorskip("regex")
    words = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    vocabulary, merges = gpt2_files()
    rank = {pair: i for i, pair in enumerate(merges)}
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    letter = {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(rest)}

    @functools.cache
    def encode(word: str) -> list[int]:
        parts = [letter[b] for b in word.encode("utf-8")]
        while len(parts) > 1:
            first = min(itertools.pairwise(parts), key=lambda pair: rank.get(pair, math.inf))
            if first not in rank:
                break
            merged, i = [], 0
            while i < len(parts):
                whole = tuple(parts[i : i + 2]) == first
                merged.append("".join(first) if whole else parts[i])
                i += 2 if whole else 1
            parts = merged
        return [vocabulary[part] for part in parts]

    mine = ours(VOCABULARIES / "gpt2-encoder.json")
    some = lines[::10]
    expected = [[i for word in words.findall(line) for i in encode(word)] for line in some]
    assert mine.encode_batch(some) == expected


@needs_data
@pytest.mark.parametrize(
    ("vocabulary", "lowercase"), [("bert-base-uncased-vocab.txt", True), ("bert-base-chinese-vocab.txt", False)]
)
def test_bert(vocabulary: str, lowercase: bool, lines: list[str]):
    assert transformers.BertTokenizerFast is transformers.BertTokenizer, "one class since version 5"
    tokens = (VOCABULARIES / vocabulary).read_text(encoding="utf-8").removesuffix("\n").split("\n")
    theirs = transformers.BertTokenizer(vocab={token: i for i, token in enumerate(tokens)}, do_lower_case=lowercase)
    mine = ours(VOCABULARIES / vocabulary, lowercase=lowercase)
    ids = mine.encode_batch(lines)
    assert ids == theirs(lines, add_special_tokens=False)["input_ids"]
    for one, other in (("eos_id", "sep"), ("bos_id", "cls"), ("pad_id", "pad"), ("mask_id", "mask"), ("unk_id", "unk")):
        assert getattr(mine, one) == getattr(theirs, f"{other}_token_id")

    legacy = pytest.importorskip("transformers.models.bert.tokenization_bert_legacy")  # another one, in Python
    slow = legacy.BertTokenizerLegacy(str(VOCABULARIES / vocabulary), do_lower_case=lowercase)
    assert [slow.convert_tokens_to_ids(slow.tokenize(line)) for line in lines[::5]] == ids[::5]


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
@pytest.mark.parametrize("kind", tiny.fast(["bpe", "unigram", "wordpiece", "word", "char"], "bpe", "wordpiece"))
def test_the_same_on_real_lines(kind: str, lines: list[str], tmp_path: Path):
    mine = train_tokenizer(TokenizerConfig(kind=kind, vocab_size=3000, training_bytes=300_000), lines[::20])
    mine.save(tmp_path)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert theirs(lines)["input_ids"] == mine.encode_batch(lines)
