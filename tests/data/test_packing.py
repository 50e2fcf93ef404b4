"""Packing against twins in plain Python: every target is scored once, beside the token that came before it."""

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lm.data.packing
from lm.data.packing import Packing, make_examples, pack
from lm.data.store import MemoryStore
from lm.errors import UserError

EOS = 0
BOS = 99_999

corpora = st.lists(st.integers(0, 40), min_size=1, max_size=30)


def make_store(lengths: list[int]) -> MemoryStore:
    """Documents of that many tokens and one EOS; every token but EOS is different, so that all can be told apart."""
    ids = iter(range(1, sum(lengths) + 1))
    return MemoryStore([np.array([*(next(ids) for _ in range(length)), EOS]) for length in lengths])


def all_rows(examples: lm.data.packing.Examples) -> dict[str, np.ndarray]:
    return examples.batch(np.arange(len(examples)))


@settings(max_examples=60, deadline=None)
@given(lengths=corpora, seq_len=st.integers(1, 24), drop=st.booleans())
def test_stream_equals_its_twin(lengths: list[int], seq_len: int, drop: bool) -> None:
    store = make_store(lengths)
    stream = store.read(0, store.n_tokens).tolist()
    if store.n_tokens < (seq_len + 1 if drop else 2):
        with pytest.raises(UserError, match="the corpus has"):
            make_examples(store, seq_len=seq_len, packing="stream", bos_id=BOS, training=drop)
        return
    examples = make_examples(store, seq_len=seq_len, packing="stream", bos_id=BOS, training=drop)
    twin = [stream[i : i + seq_len + 1] for i in range(0, len(stream) - 1, seq_len)]
    twin = [piece for piece in twin if len(piece) == seq_len + 1 or not drop]
    assert len(examples) == len(twin)
    rows = all_rows(examples)
    assert set(rows) == {"tokens", "targets", "weights", "positions"}
    for i, piece in enumerate(twin):
        # The last example of an evaluation may be shorter; its end is not scored.
        assert rows["tokens"][i, : len(piece) - 1].tolist() == piece[:-1]
        assert rows["targets"][i, : len(piece) - 1].tolist() == piece[1:]
        assert rows["weights"][i].tolist() == [1.0] * (len(piece) - 1) + [0.0] * (seq_len + 1 - len(piece))
        assert rows["positions"][i].tolist() == list(range(seq_len))
        documents = np.repeat(np.arange(len(lengths)), np.diff(store.document_offsets))
        expected = documents[i * seq_len : i * seq_len + len(piece)]
        assert examples.documents(i).tolist() == sorted(set(expected.tolist()))
    if not drop:
        assert rows["weights"].sum() == len(stream) - 1


@settings(max_examples=80, deadline=None)
@given(lengths=corpora, seq_len=st.integers(1, 24))
def test_documents_equal_their_twin(lengths: list[int], seq_len: int) -> None:
    store = make_store(lengths)
    examples = make_examples(store, seq_len=seq_len, packing="documents", bos_id=BOS, training=False)
    # The twin: pieces of (input, target) pairs.
    pieces = []
    for d in range(len(lengths)):
        ids = store.read(*store.document_offsets[d : d + 2].tolist()).tolist()
        pairs = list(zip([BOS, *ids[:-1]], ids))
        pieces += [pairs[i : i + seq_len] for i in range(0, len(pairs), seq_len)]

    found = []
    document_of = np.repeat(np.arange(len(lengths)), lengths)  # by token, as token t is the t-th of all but EOS
    rows = all_rows(examples)
    assert set(rows) == {"tokens", "targets", "weights", "positions", "segments"}
    for i in range(len(examples)):
        row = {name: values[i] for name, values in rows.items()}
        used = row["segments"] > 0
        np.testing.assert_array_equal(row["weights"], used)
        assert not any(row[name][~used].any() for name in row)
        assert used[0]
        assert not (np.diff(used.astype(int)) > 0).any()  # padding only at the end
        for segment in range(1, row["segments"].max() + 1):
            (where,) = np.nonzero(row["segments"] == segment)
            assert (np.diff(where) == 1).all()
            assert row["positions"][where].tolist() == list(range(where.size))
            found.append(list(zip(row["tokens"][where].tolist(), row["targets"][where].tolist())))
        documents = document_of[row["targets"][row["targets"] > 0] - 1]
        assert set(documents.tolist()) <= set(examples.documents(i).tolist())
        assert len(examples.documents(i)) <= row["segments"].max()
    assert sorted(found) == sorted(pieces)
    assert rows["weights"].sum() == store.n_tokens


windows = st.integers(1, 12).flatmap(lambda T: st.tuples(st.just(T), st.integers(1, T)))
packings = st.sampled_from(["stream", "documents", "pad"])


@settings(max_examples=150, deadline=None)
@given(lengths=corpora, window=windows, packing=packings)
def test_evaluation_scores_every_token_once_whatever_the_stride(
    lengths: list[int], window: tuple[int, int], packing: Packing
) -> None:
    seq_len, stride = window
    store = make_store(lengths)
    if store.n_tokens < 2:
        return
    examples = make_examples(store, seq_len=seq_len, packing=packing, bos_id=BOS, stride=stride, training=False)
    rows = all_rows(examples)
    scored = np.sort(rows["targets"][rows["weights"] == 1])
    assert set(np.unique(rows["weights"])) <= {0.0, 1.0}
    expected = store.read(1 if packing == "stream" else 0, store.n_tokens)
    np.testing.assert_array_equal(scored, np.sort(expected))


@settings(max_examples=150, deadline=None)
@given(lengths=corpora, window=windows, training=st.booleans())
def test_overlapping_stream_equals_its_twin(lengths: list[int], window: tuple[int, int], training: bool) -> None:
    seq_len, stride = window
    store = make_store(lengths)
    stream = store.read(0, store.n_tokens).tolist()
    if store.n_tokens < (seq_len + 1 if training else 2):
        return
    examples = make_examples(store, seq_len=seq_len, packing="stream", bos_id=BOS, stride=stride, training=training)
    twin, scored = [], set()
    for start in range(0, len(stream), stride):
        places = range(start + 1, min(start + seq_len + 1, len(stream)))
        if len(places) == seq_len if training else set(places) - scored:
            twin.append([(stream[at - 1], stream[at], float(training or at not in scored)) for at in places])
            scored.update(places)
    rows = all_rows(examples)
    assert len(examples) == len(twin)
    for i, window_ in enumerate(twin):
        n = len(window_)
        found = zip(rows["tokens"][i], rows["targets"][i], rows["weights"][i])
        assert list(found)[:n] == window_
        assert not rows["weights"][i, n:].any()
        documents = np.repeat(np.arange(len(lengths)), np.diff(store.document_offsets))
        expected = set(documents[i * stride : i * stride + n + 1].tolist())
        assert examples.documents(i).tolist() == sorted(expected)


@settings(max_examples=150, deadline=None)
@given(lengths=corpora, window=windows, training=st.booleans(), packing=st.sampled_from(["documents", "pad"]))
def test_overlapping_pieces_equal_their_twin(
    lengths: list[int], window: tuple[int, int], training: bool, packing: Packing
) -> None:
    seq_len, stride = window
    store = make_store(lengths)
    if store.n_tokens < (seq_len + 1 if training else 1):
        return
    examples = make_examples(store, seq_len=seq_len, packing=packing, bos_id=BOS, stride=stride, training=training)
    pieces = []
    for d in range(len(lengths)):
        ids = store.read(*store.document_offsets[d : d + 2].tolist()).tolist()
        done = 0
        for start in itertools.count(0, stride):
            stop = min(start + seq_len, len(ids))
            pieces.append(
                [(([BOS, *ids])[at], ids[at], float(training or at >= done), at - start) for at in range(start, stop)]
            )
            done = stop
            if done == len(ids):
                break
    rows = all_rows(examples)
    found = []
    for i in range(len(examples)):
        for segment in range(1, rows["segments"][i].max() + 1):
            where = rows["segments"][i] == segment
            columns = (rows[name][i][where].tolist() for name in ("tokens", "targets", "weights", "positions"))
            found.append(list(zip(*columns)))
        padding = rows["segments"][i] == 0
        assert not any(rows[name][i][padding].any() for name in rows)
    if packing == "pad":
        assert found == pieces  # one in each example, in the order of the documents
        assert len(examples) == len(pieces)
        assert (rows["segments"][:, 0] == 1).all()
        assert rows["segments"].max() == 1
    assert sorted(found) == sorted(pieces)


def test_stride_one_is_the_windows_of_a_word_level_tutorial() -> None:
    # for i in range(len(text) - T): x = text[i : i + T], y = text[i + 1 : i + T + 1]
    store = make_store([20])
    text = store.read(0, 21)
    rows = all_rows(make_examples(store, seq_len=4, packing="stream", bos_id=BOS, stride=1))
    np.testing.assert_array_equal(rows["tokens"], [text[i : i + 4] for i in range(len(text) - 4)])
    np.testing.assert_array_equal(rows["targets"], [text[i + 1 : i + 5] for i in range(len(text) - 4)])
    assert rows["weights"].all()


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 50).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c), max_size=60))))
def test_pack_is_best_fit_decreasing(case: tuple[int, list[int]]) -> None:
    capacity, lengths = case
    bins, n_bins = pack(np.array(lengths, np.int64), capacity)
    loads = np.bincount(bins, weights=lengths, minlength=n_bins)
    assert len(loads) == n_bins
    assert (loads > 0).all()
    assert (loads <= capacity).all()
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fits = [room for room in rooms if room >= length]
        if fits:
            rooms.remove(min(fits))
            rooms.append(min(fits) - length)
        else:
            rooms.append(capacity - length)
    assert sorted(capacity - loads) == sorted(rooms)


def test_pack_fills_and_is_fast_at_a_million() -> None:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(5.5, 1.2, 1_000_000).astype(np.int64), 1, 1024)
    _, n_bins = pack(lengths, 1024)
    assert lengths.sum() / (n_bins * 1024) > 0.999


def test_examples_do_not_depend_on_their_company() -> None:
    store = make_store([5, 30, 0, 7, 12, 3, 3, 40])
    for packing, stride in itertools.product(("stream", "documents", "pad"), (None, 4)):
        examples = make_examples(store, seq_len=9, packing=packing, bos_id=BOS, stride=stride)
        rows = all_rows(examples)
        order = np.random.default_rng(0).permutation(len(examples))
        for name, values in examples.batch(order).items():
            np.testing.assert_array_equal(values, rows[name][order])
            assert values.dtype == (np.float32 if name == "weights" else np.int32)
            assert values.flags.c_contiguous
        padded = examples.batch(np.array([-1, 1, -1]))
        assert padded["weights"][[0, 2]].sum() == 0
        np.testing.assert_array_equal(padded["targets"][1], rows["targets"][1])
        assert examples.batch(np.array([-1, -1]))["weights"].sum() == 0
        with pytest.raises(IndexError, match="there are"):
            examples.batch(np.array([len(examples)]))


def test_the_packing_is_cached_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store([5, 30, 0, 7, 12, 3, 3, 40])
    expected = all_rows(make_examples(store, seq_len=9, packing="documents", bos_id=BOS))
    store.index_dir = tmp_path

    def rows() -> dict[str, np.ndarray]:
        return all_rows(make_examples(store, seq_len=9, packing="documents", bos_id=BOS))

    def disk_full(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", disk_full)
        np.testing.assert_equal(rows(), expected)
    assert list(tmp_path.iterdir()) == []
    np.testing.assert_equal(rows(), expected)
    assert len(list(tmp_path.iterdir())) == 2
    with monkeypatch.context() as patch:
        patch.setattr(lm.data.packing, "pack", None)  # not called again
        np.testing.assert_equal(rows(), expected)
    # Other documents or another length: another file.
    make_examples(store, seq_len=10, packing="documents", bos_id=BOS)
    other = make_store([5, 30, 0, 7, 12, 3, 4, 39])
    other.index_dir = tmp_path
    make_examples(other, seq_len=9, packing="documents", bos_id=BOS)
    assert len(list(tmp_path.iterdir())) == 6
    make_examples(store, seq_len=9, packing="documents", bos_id=BOS, stride=4)
    assert len(list(tmp_path.iterdir())) == 8
    for packing in ("stream", "pad"):
        make_examples(store, seq_len=9, packing=packing, bos_id=BOS)
    assert len(list(tmp_path.iterdir())) == 8


@dataclasses.dataclass
class Mistake:
    lengths: list[int]
    settings: dict[str, object]
    message: str


@pytest.mark.parametrize(
    "mistake",
    [
        Mistake([9], {"seq_len": 0}, "data.seq-len is 0; it must be at least 1"),
        Mistake([9], {"seq_len": 10}, "the corpus has 10 tokens and data.seq-len 10 needs at least 11; add text or"),
        Mistake([9], {"packing": "documents", "seq_len": 10}, "the corpus has 10 tokens and data.seq-len 10 needs"),
        Mistake([], {"training": False}, "the corpus has 0 tokens and at least 2 are needed"),
        Mistake([9], {"stride": 0}, "the stride is 0; it must be between 1 and data.seq-len (4), or tokens would"),
        Mistake([9], {"stride": 5}, "the stride is 5; it must be between 1 and data.seq-len (4), or tokens would"),
        Mistake([9], {"packing": "bins", "seq_len": 2}, "data.packing is 'bins'; it must be stream, documents or pad"),
    ],
)
def test_user_errors(mistake: Mistake) -> None:
    with pytest.raises(UserError) as error:
        make_examples(
            make_store(mistake.lengths), **{"seq_len": 4, "packing": "stream", "bos_id": 0, **mistake.settings}
        )
    assert str(error.value).startswith(mistake.message)
    assert "\n" not in str(error.value)
