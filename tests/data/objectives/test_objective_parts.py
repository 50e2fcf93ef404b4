"""Documents of parts against examples written out by hand, and twins that make one row at a time."""

import pickle
from typing import Any

import numpy as np
import pytest

from lm.data.objectives.parts import ClassificationExamples, Seq2SeqExamples, SpanQAExamples, TextPairLM, labels_in
from lm.data.store import MemoryStore
from lm.errors import UserError

BOS, EOS, SEP = 901, 902, 903
Row = dict[str, np.ndarray]


def make_store(documents: list[list[list[int]]], labels: list[int] | None = None) -> MemoryStore:
    tokens = [np.array([*(token for part in parts for token in part), 0]) for parts in documents]
    return MemoryStore(tokens, part_lengths=[list(map(len, parts)) for parts in documents], labels=labels)


def random_documents(n: int, parts: int, longest: int) -> list[list[list[int]]]:
    draw = np.random.default_rng(0)
    return [[draw.integers(1, 900, draw.integers(0, longest)).tolist() for _ in range(parts)] for _ in range(n)]


def rows_of(examples: Any) -> list[Row]:
    """Every example, asked for in one batch with padding, and each alone by a copy."""
    index = np.array([*range(len(examples)), -1])
    batch = examples.batch(index)
    assert not any(values[-1].any() for values in batch.values())
    for name, values in batch.items():
        assert values.dtype == (np.float32 if "weight" in name else np.int32), name
    copy = pickle.loads(pickle.dumps(examples))
    for i in range(len(examples)):
        alone = copy.batch(np.array([i]), np.array([5]))
        assert all((alone[name][0] == batch[name][i]).all() for name in batch)
        assert len(examples.documents(i)) == 1
    with pytest.raises(IndexError):
        examples.batch(np.array([len(examples)]))
    return [{name: values[i] for name, values in batch.items()} for i in range(len(examples))]


def expect(row: Row, side: str = "", **expected: list[int]) -> None:
    """What each array begins with; behind it is 0."""
    n = max(map(len, expected.values()))
    expected |= {"positions": list(range(n)), "segments": [1] * n}
    for name, values in expected.items():
        found = row[side + name].tolist()
        assert found == values + [0] * (len(found) - len(values)), side + name


def test_source_and_target() -> None:
    store = make_store([[[1, 2, 3], [4, 5]], [[6], []], [[7] * 9, [8]], [[9], [10, 11, 12, 13]]])
    examples = Seq2SeqExamples(store, 5, 4, bos_id=BOS, eos_id=EOS)
    rows = rows_of(examples)
    expect(rows[0], "source_", tokens=[1, 2, 3, EOS])
    expect(rows[0], tokens=[BOS, 4, 5], targets=[4, 5, EOS], weights=[1, 1, 1])
    expect(rows[1], tokens=[BOS], targets=[EOS], weights=[1])
    expect(rows[2], "source_", tokens=[7, 7, 7, 7, EOS])  # cut, with its end
    expect(rows[3], tokens=[BOS, 10, 11, 12], targets=[10, 11, 12, 13], weights=[1] * 4)  # cut, without it
    assert examples.cut == 2
    assert [examples.documents(i).tolist() for i in range(4)] == [[0], [1], [2], [3]]


def test_source_and_target_equal_their_twin() -> None:
    documents = random_documents(60, 2, 12)
    examples = Seq2SeqExamples(make_store(documents), 8, 6, bos_id=BOS, eos_id=EOS)
    cut = 0
    for row, (source, target) in zip(rows_of(examples), documents, strict=True):
        expect(row, "source_", tokens=[*source[:7], EOS])
        line = [BOS, *target, EOS][:7]
        expect(row, tokens=line[:-1], targets=line[1:], weights=[1] * (len(line) - 1))
        cut += len(source) > 7 or len(target) > 5
    assert examples.cut == cut


def test_source_and_target_as_one_text() -> None:
    documents = [[[1, 2, 3], [4, 5]], [[1] * 9, [4, 5]], [[1] * 9, [4] * 9], [[1, 2], [4] * 9], [[], []]]
    examples = TextPairLM(make_store(documents), 8, bos_id=BOS, eos_id=EOS, separator_id=SEP)
    rows = rows_of(examples)
    expect(
        rows[0],
        tokens=[BOS, 1, 2, 3, SEP, 4, 5],
        targets=[1, 2, 3, SEP, 4, 5, EOS],
        weights=[0, 0, 0, 0, 1, 1, 1],
        prefix=[1, 1, 1, 1, 1, 0, 0],
    )
    expect(rows[1], tokens=[BOS, 1, 1, 1, 1, SEP, 4, 5], targets=[1, 1, 1, 1, SEP, 4, 5, EOS])
    expect(rows[2], tokens=[BOS, 1, 1, 1, SEP, 4, 4, 4], targets=[1, 1, 1, SEP, 4, 4, 4, 4])
    expect(rows[3], tokens=[BOS, 1, 2, SEP, 4, 4, 4, 4], targets=[1, 2, SEP, 4, 4, 4, 4, 4])
    expect(rows[4], tokens=[BOS, SEP], targets=[SEP, EOS], weights=[0, 1], prefix=[1, 1])
    assert examples.cut == 3
    plain = TextPairLM(make_store(documents), 8, bos_id=BOS, eos_id=EOS)
    assert rows_of(plain)[0]["tokens"][4] == EOS


def test_one_text_scores_the_target_alone() -> None:
    documents = random_documents(60, 2, 14)
    examples = TextPairLM(make_store(documents), 16, bos_id=BOS, eos_id=EOS)
    for row, (source, target) in zip(rows_of(examples), documents, strict=True):
        scored = row["targets"][row["weights"] > 0].tolist()
        assert scored == [*target, EOS][: len(scored)]
        assert len(scored) >= min(len(target) + 1, 8)
        # The first scored place is the last of the prefix: the separator sees all of the source.
        assert row["prefix"].sum() == np.argmax(row["weights"]) + 1
        assert row["tokens"][row["prefix"] > 0].tolist() == [BOS, *source[: row["prefix"].sum() - 2], EOS]


def test_texts_with_a_class() -> None:
    documents = [[[1, 2], [3]], [[4] * 9, [5]], [[6] * 4, [7] * 9]]
    store = make_store(documents, labels=[2, 0, 1])
    pairs = ClassificationExamples(store, 9, 3, bos_id=BOS, eos_id=EOS, pair=True)
    rows = rows_of(pairs)
    expect(rows[0], tokens=[BOS, 1, 2, EOS, 3, EOS], types=[0, 0, 0, 0, 1, 1])
    expect(rows[1], tokens=[BOS, 4, 4, 4, 4, 4, EOS, 5, EOS], types=[0] * 7 + [1] * 2)
    expect(rows[2], tokens=[BOS, 6, 6, 6, EOS, 7, 7, 7, EOS], types=[0] * 5 + [1] * 4)
    assert [int(row["labels"]) for row in rows] == [2, 0, 1]
    assert [float(row["label_weights"]) for row in rows] == [1, 1, 1]
    assert pairs.cut == 2

    single = ClassificationExamples(store, 9, 3, bos_id=BOS, eos_id=EOS)
    rows = rows_of(single)
    expect(rows[0], tokens=[BOS, 1, 2, 3, EOS], types=[0] * 5)
    expect(rows[2], tokens=[BOS, 6, 6, 6, 6, 7, 7, 7, EOS], types=[0] * 9)
    assert single.cut == 2

    decoder = ClassificationExamples(store, 9, 3, bos_id=BOS, eos_id=EOS, decoder=True)
    rows = rows_of(decoder)
    expect(rows[0], tokens=[1, 2, 3, EOS])
    expect(rows[1], tokens=[4, 4, 4, 4, 4, 4, 4, 4, EOS])
    assert "types" not in rows[0]
    rows = rows_of(ClassificationExamples(store, 9, 3, bos_id=BOS, eos_id=EOS, decoder=True, pair=True))
    expect(rows[0], tokens=[1, 2, EOS, 3, EOS])


def test_the_whole_of_a_document_without_parts_has_a_class() -> None:
    store = MemoryStore([np.array([1, 2, 3, 0]), np.array([0])], labels=[1, 0])
    rows = rows_of(ClassificationExamples(store, 8, 2, bos_id=BOS, eos_id=EOS))
    expect(rows[0], tokens=[BOS, 1, 2, 3, EOS])
    expect(rows[1], tokens=[BOS, EOS])


def test_several_classes() -> None:
    labels = np.array([[1, 0, 0, 0, 0, 0, 0, 0, 0, 1], [0] * 10, [0, 1, 0, 0, 0, 0, 0, 1, 1, 0]], np.uint8)
    store = MemoryStore([np.array([i, 0]) for i in range(3)], labels=np.packbits(labels, axis=1))
    examples = ClassificationExamples(store, 8, 10, bos_id=BOS, eos_id=EOS)
    rows = examples.batch(np.array([2, 0, -1, 1]))
    assert rows["labels"].dtype == np.float32
    np.testing.assert_array_equal(rows["labels"], [labels[2], labels[0], [0] * 10, [0] * 10])
    assert rows["label_weights"].tolist() == [1, 1, 0, 1]
    with pytest.raises(UserError, match="documents have 2 bytes of classes, and 3 classes take 1; prepare"):
        ClassificationExamples(store, 8, 3, bos_id=BOS, eos_id=EOS)
    with pytest.raises(UserError, match="any number of classes for each document, and here each has one; prepare it"):
        labels_in(store, 10)


def qa_store(documents: list[list[list[int]]], spans: list[tuple[int, int]]) -> MemoryStore:
    store = make_store(documents)
    store.spans = np.array(spans, np.int32)
    return store


def test_an_answer_in_a_short_text() -> None:
    documents = [[[1, 2], [3], [4, 5], [6], [7]], [[1] * 9, [3], [4]], [[1], [2]]]
    examples = SpanQAExamples(
        qa_store(documents, [(2, 3), (1, 1), (-1, -1)]), 16, bos_id=BOS, eos_id=EOS, max_question=4, stride=4
    )
    rows = rows_of(examples)
    assert len(rows) == 3
    expect(rows[0], tokens=[BOS, 1, 2, EOS, 3, 4, 5, 6, 7, EOS], types=[0] * 4 + [1] * 6)
    assert rows[0]["tokens"][rows[0]["starts"] : rows[0]["ends"] + 1].tolist() == [4, 5, 6]
    assert examples.words(0).tolist() == [-1] * 4 + [1, 2, 2, 3, 4] + [-1] * 7
    expect(rows[1], tokens=[BOS, 1, 1, 1, 1, EOS, 3, 4, EOS])
    assert (rows[1]["starts"], rows[1]["ends"]) == (6, 6)
    assert (rows[2]["starts"], rows[2]["ends"]) == (0, 0)
    assert float(rows[2]["label_weights"]) == 1
    assert examples.cut == 1


def test_windows_of_long_texts_equal_their_twin() -> None:
    draw = np.random.default_rng(1)
    ids = iter(range(1000, 100_000))
    documents, spans = [], []
    for _ in range(40):
        words = [[next(ids) for _ in range(draw.integers(0, 4))] for _ in range(draw.integers(1, 50))]
        documents.append([[next(ids) for _ in range(draw.integers(0, 8))], *words])
        first = int(draw.integers(1, len(words) + 1))
        spans.append((first, int(min(len(words), first + draw.integers(0, 3)))))
    T, stride, longest = 24, 9, 5
    examples = SpanQAExamples(
        qa_store(documents, spans), T, bos_id=BOS, eos_id=EOS, max_question=longest, stride=stride
    )
    rows, at, found = rows_of(examples), 0, 0
    for d, ((question, *words), (first, last)) in enumerate(zip(documents, spans, strict=True)):
        question = question[:longest]
        text = [(token, part) for part, word in enumerate(words, 1) for token in word]
        answer = [token for word in words[first - 1 : last] for token in word]
        room = T - 3 - len(question)
        begin = 0
        while True:
            window = text[begin : begin + room]
            row = rows[at]
            expect(row, tokens=[BOS, *question, EOS, *(token for token, _ in window), EOS])
            assert examples.documents(at).tolist() == [d]
            expected = [-1] * (2 + len(question)) + [part for _, part in window]
            assert examples.words(at).tolist() == expected + [-1] * (T - len(expected))
            if answer and set(answer) <= {token for token, _ in window}:
                assert row["tokens"][row["starts"] : row["ends"] + 1].tolist() == answer
                found += 1
            else:
                assert (row["starts"], row["ends"]) == (0, 0)
            at += 1
            if begin + room >= len(text):
                break
            begin += min(stride, room)
    assert at == len(rows) > 60
    assert found > 30


def test_mistakes() -> None:
    ids = {"bos_id": BOS, "eos_id": EOS}
    plain = MemoryStore([np.array([1, 2, 0])] * 2)
    three = make_store([[[1], [2]], [[1], [2], [3]]], labels=[0, 3])
    for make in (
        lambda store: Seq2SeqExamples(store, 8, 8, **ids),
        lambda store: TextPairLM(store, 8, **ids),
    ):
        with pytest.raises(UserError, match=r"source and target are parts .* --data\.fields"):
            make(plain)
        with pytest.raises(UserError, match="document 1 has 3 parts, and source and target are two; 1 of 2"):
            make(three)
    with pytest.raises(UserError, match=r"no labels; prepare it with --data\.label-field"):
        ClassificationExamples(plain, 8, 2, **ids)
    with pytest.raises(UserError, match="document 1 has label 3, and with 3 classes they go from 0 to 2"):
        ClassificationExamples(three, 8, 3, **ids)
    with pytest.raises(UserError, match="there are 1 classes"):
        ClassificationExamples(three, 8, 1, **ids)
    with pytest.raises(UserError, match="document 1 has 3 parts, and a pair of texts are two"):
        ClassificationExamples(three, 8, 4, pair=True, **ids)
    with pytest.raises(UserError, match=r"data\.seq-len is 3"):
        ClassificationExamples(three, 3, 4, pair=True, **ids)
    with pytest.raises(UserError, match="a question and the words of a text are parts"):
        SpanQAExamples(plain, 100, **ids)
    with pytest.raises(UserError, match="doesn't say where answers are"):
        SpanQAExamples(three, 100, **ids)
    with pytest.raises(UserError, match=r"data\.seq-len is 60; with questions of up to 64"):
        SpanQAExamples(three, 60, **ids)
    documents = [[[1], [2]], [[1], [2], [3]]]
    for wrong in ((0, 1), (2, 1), (1, 3), (-1, 1)):
        with pytest.raises(UserError, match="document 1 has an answer from word"):
            SpanQAExamples(qa_store(documents, [(1, 1), wrong]), 100, **ids)
    with pytest.raises(UserError, match="document 0 has 1 parts"):
        SpanQAExamples(qa_store([[[1]]], [(1, 1)]), 100, **ids)
