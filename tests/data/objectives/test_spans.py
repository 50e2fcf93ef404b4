"""Span corruption against its definition: source and target together give the text back; prefixes against a loop."""

import itertools
import math
import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.data.objectives.draws import SPANS, row_keys
from lm.data.objectives.spans import (
    PrefixExamples,
    SpanExamples,
    n_sentinels,
    noise_mask,
    sentinel_ids,
    span_counts,
    span_lengths,
)
from lm.data.packing import make_examples
from lm.data.store import MemoryStore
from lm.errors import UserError
from lm.text.tokenizer import TokenizerConfig, train_tokenizer

BOS, EOS, SENTINEL = 7001, 7000, 8000
SENTINELS = np.arange(SENTINEL, SENTINEL + 200)


def keys(n: int) -> np.ndarray:
    return row_keys(0, SPANS, np.zeros(n, np.int64), np.arange(n))


def make_store(n: int) -> MemoryStore:
    return MemoryStore([np.arange(start, min(start + 30, n)) for start in range(0, n, 30)])


def spans_of(mask: np.ndarray) -> list[tuple[bool, int]]:
    return [(bool(value), len(list(run))) for value, run in itertools.groupby(mask.tolist())]


def test_lengths_are_t5s() -> None:
    """What `random_spans_helper` gives in the reference implementation, worked out by hand for the short ones."""
    assert span_lengths(512, density=0.15, mean_length=3) == (568, 114)
    # 13 tokens: 2 cut out in one span; 11 + 1 + 1 places, and 2 + 1 + 1.
    assert span_lengths(13, density=0.15, mean_length=3) == (13, 4)
    assert span_counts(568, density=0.15, mean_length=3) == (85, 28)
    assert n_sentinels(512, density=0.15, mean_length=3) == 28


@settings(max_examples=60, deadline=None)
@given(st.integers(4, 300), st.floats(0.02, 0.9), st.floats(1, 8))
def test_a_window_fills_its_source(seq_len: int, density: float, mean_length: float) -> None:
    length, target_len = span_lengths(seq_len, density=density, mean_length=mean_length)
    noise, spans = span_counts(length, density=density, mean_length=mean_length)
    assert length - noise + spans + 1 <= seq_len
    assert target_len == noise + spans + 1
    mask = noise_mask(length, keys(3), density=density, mean_length=mean_length)
    for row in mask:
        runs = spans_of(row)
        assert [value for value, _ in runs] == [False, True] * spans
        assert sum(n for value, n in runs if value) == noise


def test_density_and_span_length_over_100_000_tokens() -> None:
    mask = noise_mask(568, keys(200), density=0.15, mean_length=3)
    assert mask.size > 100_000
    assert (mask.sum(1) == 85).all()
    lengths = [n for row in mask for value, n in spans_of(row) if value]
    assert len(lengths) == 200 * 28
    # The first of 28 runs of 85 tokens, all ways alike, is k long with probability C(84-k, 26) / C(84, 27).
    first = np.array([next(n for value, n in spans_of(row) if value) for row in mask])
    for k in (1, 2, 5):
        p = math.comb(84 - k, 26) / math.comb(84, 27)
        assert abs((first == k).mean() - p) < 3.5 * np.sqrt(p * (1 - p) / 200)
        assert abs(np.mean(np.array(lengths) == k) - p) < 4 * np.sqrt(p * (1 - p) / len(lengths))


def test_all_masks_are_equally_likely() -> None:
    """8 tokens, 4 of them cut out in 2 spans: 3 ways to part what is cut out, 3 what is kept."""
    n = 18_000
    mask = noise_mask(8, keys(n), density=0.5, mean_length=2)
    counts = Counter(map(bytes, mask))
    assert len(counts) == 9
    expected = n / 9
    assert sum((count - expected) ** 2 / expected for count in counts.values()) < 26.1  # chi-square, 8, p = 0.001


def restore(source: list[int], target: list[int]) -> list[int]:
    """The text, from a source and its target."""
    assert source[-1] == EOS
    assert target[-1] == EOS
    spans: dict[int, list[int]] = {}
    for token in target[:-1]:
        if token >= SENTINEL:
            assert token == SENTINEL + len(spans)  # in their order
            spans[token] = []
        else:
            spans[max(spans)].append(token)
    assert [token for token in source if token >= SENTINEL] == list(spans)
    return [token for part in source[:-1] for token in spans.get(part, [part])]


@pytest.mark.parametrize("training", [True, False])
def test_source_and_target_give_the_text_back(training: bool) -> None:
    store = make_store(700)
    examples = SpanExamples(store, 64, bos_id=BOS, eos_id=EOS, sentinels=SENTINELS, seed=0, training=training)
    assert examples.window == span_lengths(64, density=0.15, mean_length=3)[0]
    index = np.array([*range(len(examples)), -1])
    rows = examples.batch(index, np.zeros_like(index))
    assert all(values.shape[1] == 64 for name, values in rows.items() if name.startswith("source"))
    assert all(values.shape[1] == examples.target_len for name, values in rows.items() if not name.startswith("source"))
    text = []
    for i in range(len(examples)):
        row = {name: values[i] for name, values in rows.items()}
        source = row["source_tokens"][row["source_segments"] > 0].tolist()
        target = row["targets"][row["segments"] > 0].tolist()
        found = restore(source, target)
        text += found
        assert examples.documents(i).tolist() == sorted({token // 30 for token in found})
        n, m = len(target), len(source)
        if i < 9:
            assert (m, n) == (64, examples.target_len)
        assert row["weights"].tolist() == [1.0] * n + [0.0] * (examples.target_len - n)
        assert row["tokens"][:n].tolist() == [BOS, *target[:-1]]
        assert row["positions"][:n].tolist() == list(range(n))
        assert row["source_positions"][:m].tolist() == list(range(m))
        assert not any(row[name][n:].any() for name in ("tokens", "targets", "positions", "segments"))
        assert not any(row[f"source_{name}"][m:].any() for name in ("tokens", "positions", "segments"))
    whole = 700 // examples.window * examples.window
    assert text == list(range(whole if training else 700))
    assert not any(values[-1].any() for values in rows.values())


@pytest.mark.parametrize(("rest", "expected"), [(0, 2), (1, 2), (2, 3)])
def test_a_last_token_alone_is_left_out(rest: int, expected: int) -> None:
    window, _ = span_lengths(64, density=0.15, mean_length=3)
    options = {"bos_id": BOS, "eos_id": EOS, "sentinels": SENTINELS, "seed": 0}
    store = make_store(2 * window + rest)
    assert len(SpanExamples(store, 64, training=False, **options)) == expected
    assert len(SpanExamples(store, 64, training=True, **options)) == 2


def test_spans_are_a_function_of_seed_epoch_and_index() -> None:
    make = lambda seed: SpanExamples(make_store(700), 64, bos_id=BOS, eos_id=EOS, sentinels=SENTINELS, seed=seed)  # noqa: E731
    examples = make(0)
    index, epoch = np.array([3, 1, 3]), np.array([0, 0, 1])
    rows = examples.batch(index, epoch)
    copy = pickle.loads(pickle.dumps(examples))
    for i in range(3):
        alone = copy.batch(index[[i]], epoch[[i]])
        assert all((alone[name][0] == rows[name][i]).all() for name in rows)
    assert (rows["source_tokens"][0] != rows["source_tokens"][2]).any()
    assert (make(1).batch(index, epoch)["source_tokens"] != rows["source_tokens"]).any()


def test_mistakes() -> None:
    tokenizer = train_tokenizer(
        TokenizerConfig(kind="char", vocab_size=40, special_tokens=("<extra_id_0>", "<extra_id_1>")), ["abc"]
    )
    assert [tokenizer.id_to_piece(i) for i in sentinel_ids(tokenizer, 2)] == ["<extra_id_0>", "<extra_id_1>"]
    with pytest.raises(UserError, match=r"needs 28 sentinels here, <extra_id_0> to <extra_id_27>.*lacks <extra_id_2>"):
        sentinel_ids(tokenizer, n_sentinels(512, density=0.15, mean_length=3))
    store = make_store(100)
    options = {"bos_id": BOS, "eos_id": EOS, "seed": 0}
    with pytest.raises(UserError, match="needs 28 sentinels here, and there are 27"):
        SpanExamples(store, 512, sentinels=SENTINELS[:27], **options)
    with pytest.raises(UserError, match=r"the corpus has 100 tokens and data.seq-len 512 needs at least 568"):
        SpanExamples(store, 512, sentinels=SENTINELS, **options)
    for change, message in (({"density": 1.0}, "density"), ({"mean_length": 0.5}, "mean length")):
        with pytest.raises(UserError, match=message):
            SpanExamples(store, 64, sentinels=SENTINELS, **options, **change)
    with pytest.raises(UserError, match=r"data.seq-len is 3"):
        SpanExamples(store, 3, sentinels=SENTINELS, **options)
    with pytest.raises(IndexError, match="example 9 asked; there are 1"):
        SpanExamples(store, 64, sentinels=SENTINELS, **options).batch(np.array([9]), np.array([0]))


@pytest.mark.parametrize("packing", ["stream", "documents", "pad"])
@pytest.mark.parametrize("training", [True, False])
def test_prefixes_equal_their_twin(packing: str, training: bool) -> None:
    store = MemoryStore([np.arange(1, 1 + n) for n in (1, 2, 9, 30, 5, 3, 14)])
    base = make_examples(store, seq_len=12, packing=packing, bos_id=BOS, training=training)
    examples = PrefixExamples(base, seed=0)
    index = np.array([*range(len(base)), -1])
    splits: dict[int, set[int]] = {}
    for epoch in range(40):
        plain, rows = (e.batch(index, np.full_like(index, epoch)) for e in (base, examples))
        assert all((plain[name] == rows[name]).all() for name in plain if name != "weights")
        for i in range(len(index)):
            texts = plain["segments"][i] if "segments" in plain else (index[i] >= 0) * np.ones(12, int)
            for text in set(texts.tolist()) - {0}:
                (columns,) = np.nonzero(texts == text)
                if packing == "stream":  # the last window is shorter
                    columns = columns[: store.n_tokens - i * 12]
                prefix = rows["prefix"][i, columns].tolist()
                p = sum(prefix)
                assert prefix == [1] * p + [0] * (len(columns) - p)
                splits.setdefault(len(columns), set()).add(p)
                for place, column in enumerate(columns):
                    seen = place + 1 < p
                    assert rows["weights"][i, column] == (0 if seen else plain["weights"][i, column])
            assert not rows["prefix"][i, texts == 0].any()
        assert not rows["weights"][-1].any()
    for length, found in splits.items():
        assert found == set(range(1, max(length, 2)))


def test_prefix_lengths_are_even() -> None:
    store = MemoryStore([np.ones(5, np.int32)] * 8000)
    examples = PrefixExamples(make_examples(store, seq_len=5, packing="pad", bos_id=BOS), seed=0)
    index = np.arange(8000)
    counts = np.bincount(examples.batch(index, np.zeros_like(index))["prefix"].sum(1))
    assert counts[0] == 0
    assert np.abs(counts[1:] - 2000).max() < 4 * np.sqrt(8000 * 0.25 * 0.75)
