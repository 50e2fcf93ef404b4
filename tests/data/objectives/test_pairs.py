"""BERT's pairs: what A and B are is read off rows of tokens that all differ, and their law is counted."""

import itertools
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm.data.objectives.masking import Masker, MaskingConfig
from lm.data.objectives.pairs import BertExamples, PairExamples, shortened
from lm.data.store import MemoryStore
from lm.errors import UserError
from lm.text.tokenizer import TokenizerConfig, train_tokenizer

CLS, SEP = 1_000_001, 1_000_002


def make_store(documents: list[list[int]]) -> MemoryStore:
    """Documents of sentences of that many tokens, every token another; 0 ends a document."""
    ids = iter(range(1, 1_000_000))
    made = [np.array([*(next(ids) for _ in range(sum(sentences))), 0]) for sentences in documents]
    return MemoryStore(made, part_lengths=documents)


def corpus(n: int = 60) -> list[list[int]]:
    draw = np.random.default_rng(0)
    documents = [draw.integers(0, 12, draw.integers(1, 20)).tolist() for _ in range(n)]
    documents[3] = [90, 2, 3]  # a sentence longer than a row
    documents[4] = [7]
    documents[5] = [0, 0, 4]
    return documents


class Truth:
    """Document and sentence of each token of a store."""

    def __init__(self, documents: list[list[int]]):
        self.place: dict[int, tuple[int, int]] = {}
        self.tokens: list[list[list[int]]] = []
        token = 0
        for d, sentences in enumerate(documents):
            self.tokens.append([])
            for s, n in enumerate(size for size in sentences if size):
                self.tokens[d].append(list(range(token + 1, token + 1 + n)))
                self.place |= {token + 1 + i: (d, s) for i in range(n)}
                token += n


def texts(rows: dict[str, np.ndarray], i: int) -> tuple[list[int], list[int]]:
    """A and B of a row, and that what is around them is as it should be."""
    used = rows["segments"][i] > 0
    n = used.sum()
    assert used.tolist() == [True] * n + [False] * (len(used) - n)
    assert not any(rows[name][i, n:].any() for name in ("tokens", "targets", "positions", "types", "weights"))
    assert rows["positions"][i, :n].tolist() == list(range(n))
    tokens = rows["tokens"][i, :n].tolist()
    middle = tokens.index(SEP)
    a, b = tokens[1:middle], tokens[middle + 1 : -1]
    assert tokens == [CLS, *a, SEP, *b, SEP]
    assert rows["types"][i, :n].tolist() == [0] * (len(a) + 2) + [1] * (len(b) + 1)
    assert min(len(a), len(b)) > 0
    return a, b


def run(tokens: list[int]) -> bool:
    return tokens == list(range(tokens[0], tokens[-1] + 1))


@pytest.mark.parametrize("seq_len", [5, 12, 40, 128])
def test_rows_hold_texts_that_follow_each_other_or_do_not(seq_len: int) -> None:
    documents = corpus()
    truth = Truth(documents)
    examples = PairExamples(make_store(documents), seq_len, bos_id=CLS, eos_id=SEP, seed=0)
    index = np.array([*range(len(examples)), -1])
    seen: set[int] = set()
    for epoch in range(8):
        rows = examples.batch(index, np.full_like(index, epoch))
        assert not any(values[-1].any() for values in rows.values())
        assert rows["label_weights"].tolist() == [1.0] * len(examples) + [0.0]
        for i in range(len(examples)):
            a, b = texts(rows, i)
            assert run(a)
            assert run(b)
            assert len(a) + len(b) <= seq_len - 3
            (da, sa), (db, sb) = truth.place[a[-1]], truth.place[b[0]]
            assert examples.documents(i).tolist() == [da]
            assert len(truth.tokens[da]) > 1
            seen |= {*a, *b}
            if rows["labels"][i] == 0:
                assert da == db
                assert sb == sa + 1 or len(a) + len(b) == seq_len - 3  # the cut may have taken whole sentences
                assert b[0] > a[-1]
            else:
                assert da != db
            if len(a) + len(b) < seq_len - 3:  # nothing was cut: whole sentences
                assert a == [t for s in truth.tokens[da][truth.place[a[0]][1] : sa + 1] for t in s]
                assert b == [t for s in truth.tokens[db][sb : truth.place[b[-1]][1] + 1] for t in s]
    if seq_len == 40:
        assert len(seen) > 0.9 * sum(map(sum, documents))


def test_shares_of_next_and_of_short() -> None:
    documents = [[5] * 40 for _ in range(50)]
    examples = PairExamples(make_store(documents), 103, bos_id=CLS, eos_id=SEP, seed=0)
    assert len(examples) == 100  # 20 sentences each
    index = np.tile(np.arange(100), 100)
    rows = examples.batch(index, np.repeat(np.arange(100), 100))
    n = len(index)
    labels = rows["labels"]
    assert abs(labels.mean() - 0.5) < 3 * np.sqrt(0.25 / n)
    size = rows["segments"].sum(1)
    # Full rows have 100 tokens, but for B from the end of another document; short ones (aim 2 .. 100) are even.
    next_ones = size[labels == 0] - 3
    full = (next_ones == 100).mean()
    p = 0.9 + 0.1 * 5 / 99  # aims of 96 to 100 fill the row, where as many sentences are left
    assert 0.9 - 3 * np.sqrt(0.09 / len(next_ones)) < full < p + 3 * np.sqrt(0.09 / len(next_ones))
    assert len(set(next_ones.tolist())) > 10
    # A takes 1 .. 19 of the 20 sentences, evenly.
    a = (rows["types"] == 0).sum(1) - 2 - (103 - size)
    whole_rows = (labels == 0) & (size == 103)
    counts = np.bincount(a[whole_rows] // 5, minlength=20)[1:20]
    expected = counts.sum() / 19
    assert ((counts - expected) ** 2 / expected).sum() < 42.3  # chi-square, 18 degrees of freedom, p = 0.001


def test_others_are_drawn_from_all_other_documents() -> None:
    documents = [[3, 3], [3], [3, 3, 3]]
    truth = Truth(documents)
    examples = PairExamples(make_store(documents), 20, bos_id=CLS, eos_id=SEP, seed=0, random_share=1)
    index = np.tile(np.arange(len(examples)), 2000)
    rows = examples.batch(index, np.repeat(np.arange(2000), len(examples)))
    assert rows["labels"].all()
    drawn: dict[int, list[tuple[int, int]]] = {}
    for i in range(len(index)):
        a, b = texts(rows, i)
        drawn.setdefault(truth.place[a[0]][0], []).append(truth.place[b[0]])
    assert set(drawn) == {0, 2}  # the one with a single sentence is never A
    assert {d for d, _ in drawn[0]} == {1, 2}
    assert {d for d, _ in drawn[2]} == {0, 1}
    n = len(drawn[0])
    assert abs(sum(d == 1 for d, _ in drawn[0]) - n / 2) < 4 * np.sqrt(n / 4)
    assert {s for d, s in drawn[0] if d == 2} == {0, 1, 2}


def test_a_text_from_elsewhere_is_as_long_as_the_row_needs() -> None:
    """Of sentences of one token nothing need be cut, so A begins where its chunk does and B fills the row."""
    examples = PairExamples(
        make_store([[1] * 50] * 5), 13, bos_id=CLS, eos_id=SEP, seed=0, random_share=1, short_share=0
    )
    assert len(examples) == 25
    index = np.tile(np.arange(25), 20)
    rows = examples.batch(index, np.repeat(np.arange(20), 25))
    for i in range(len(index)):
        a, b = texts(rows, i)
        assert (a[0] - 1) % 10 == 0
        assert len(a) + len(b) == 10 or b[-1] % 50 == 0  # or its document ends


@given(st.integers(1, 60), st.integers(1, 60), st.integers(2, 70))
def test_the_longer_text_is_shortened_first(a: int, b: int, room: int) -> None:
    left_a, left_b = a, b
    while left_a + left_b > room:
        if left_a > left_b:
            left_a -= 1
        else:
            left_b -= 1
    found = shortened(np.array([a]), np.array([b]), room)
    assert [int(x[0]) for x in found] == [left_a, left_b]


def test_cuts_fall_on_both_ends() -> None:
    documents = [[40, 40] for _ in range(2)]
    examples = PairExamples(make_store(documents), 23, bos_id=CLS, eos_id=SEP, seed=0, random_share=0, short_share=0)
    index = np.zeros(3000, np.int64)
    rows = examples.batch(index, np.arange(3000))
    front = rows["tokens"][:, 1] - 1  # tokens of A lost at its front; 30 are lost in all
    assert abs(front.mean() - 15) < 4 * np.sqrt(30 / 4 / 3000)
    assert abs(front.var() - 30 / 4) < 1


def test_pairs_are_a_function_of_seed_epoch_and_index() -> None:
    documents = corpus()
    make = lambda seed: PairExamples(make_store(documents), 30, bos_id=CLS, eos_id=SEP, seed=seed)  # noqa: E731
    examples = make(0)
    copy = pickle.loads(pickle.dumps(examples))
    index, epoch = np.arange(40), np.arange(40) % 3
    rows = examples.batch(index, epoch)
    for i in range(0, 40, 7):
        alone = copy.batch(index[[i]], epoch[[i]])
        assert all((alone[name][0] == rows[name][i]).all() for name in rows)
    assert (examples.batch(index, epoch + 1)["tokens"] != rows["tokens"]).any()
    assert (make(1).batch(index, epoch)["tokens"] != rows["tokens"]).any()


def test_bert_examples() -> None:
    t = train_tokenizer(TokenizerConfig(kind="wordpiece", vocab_size=60), ["the cat sat on the mat"] * 3)
    sentences = [[t.encode(text) for text in ("the cat", "sat on the mat", "the mat sat")] for _ in range(10)]
    store = MemoryStore(
        [np.array([*itertools.chain(*document), t.eos_id]) for document in sentences],
        part_lengths=[list(map(len, document)) for document in sentences],
    )
    pairs = PairExamples(store, 24, bos_id=t.bos_id, eos_id=t.eos_id, seed=0)
    examples = BertExamples(pairs, Masker(t, MaskingConfig(), seed=0))
    index = np.array([*range(len(examples)), -1])
    epoch = np.zeros_like(index)
    plain, rows = pairs.batch(index, epoch), examples.batch(index, epoch)
    assert set(rows) == {
        "tokens", "targets", "weights", "positions", "segments", "types", "labels", "label_weights",
    }  # fmt: skip
    assert all((plain[name] == rows[name]).all() for name in ("positions", "segments", "types", "labels"))
    assert (rows["targets"] == plain["tokens"]).all()
    words = (plain["segments"] > 0) & ~np.isin(plain["tokens"], [t.bos_id, t.eos_id])
    assert rows["weights"].sum(1).tolist() == [max(1, round(0.15 * n)) if n else 0 for n in words.sum(1).tolist()]
    assert not rows["weights"][~words].any()


def test_mistakes() -> None:
    options = {"bos_id": CLS, "eos_id": SEP, "seed": 0}
    plain = MemoryStore([np.array([1, 2, 0])] * 3)
    with pytest.raises(UserError, match=r"prepare it with --data\.sentences"):
        PairExamples(plain, 20, **options)
    with pytest.raises(UserError, match="none of the 2 documents has two sentences"):
        PairExamples(make_store([[3], [4, 0]]), 20, **options)
    with pytest.raises(UserError, match="the split has one document"):
        PairExamples(make_store([[3, 4], [0]]), 20, **options)
    assert len(PairExamples(make_store([[3, 4], [0]]), 20, random_share=0, **options)) == 1
    with pytest.raises(UserError, match=r"data\.seq-len is 4"):
        PairExamples(make_store([[3, 4], [2]]), 4, **options)
    with pytest.raises(UserError, match=r"random_share is 1\.5"):
        PairExamples(make_store([[3, 4], [2]]), 20, random_share=1.5, **options)
