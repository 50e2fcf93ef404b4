"""Reading by token address gives back what was written, from any thread or process, whatever the cache."""

import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from lm.data.store import DatasetStore, MemoryStore, TokenStore, ranges
from lm.data.writer import RECORD_TOKENS, DatasetWriter
from lm.errors import UserError

EOS = 0


@pytest.fixture(scope="module")
def documents() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    lengths = [*rng.integers(1, 60, 50), 3 * RECORD_TOKENS + 5, RECORD_TOKENS - 1, RECORD_TOKENS, 1]
    return [np.append(rng.integers(1, 50_000, length), EOS).astype(np.int32) for length in lengths]


@pytest.fixture(scope="module")
def folder(documents: list[np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dataset")
    with DatasetWriter(path, "corpus", EOS) as writer:
        for i, document in enumerate(documents):
            writer.add("train", f"文件-{i}", document[:-1].tolist(), text_bytes=1, last=True)
        writer.add("validation", "only", [7], text_bytes=1, last=True)
        writer.finish()
    return path


@pytest.fixture(scope="module")
def stream(documents: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(documents)


@pytest.fixture(params=["memory", "disk", "disk without a cache"])
def store(request: pytest.FixtureRequest, documents: list[np.ndarray], folder: Path) -> TokenStore:
    if request.param == "memory":
        return MemoryStore(documents, [f"文件-{i}" for i in range(len(documents))])
    return DatasetStore(folder, "train", cache_tokens=0 if "without" in request.param else 2**20)


def test_counts(store: TokenStore, documents: list[np.ndarray]) -> None:
    assert store.n_tokens == sum(map(len, documents))
    assert np.diff(store.document_offsets).tolist() == [len(document) for document in documents]
    assert store.document_offsets.dtype == np.int64


def test_reads_any_range(store: TokenStore, stream: np.ndarray) -> None:
    rng = np.random.default_rng(1)
    n = store.n_tokens
    for start, stop in [(0, n), (0, 0), (n, n), (n - 1, n), *np.sort(rng.integers(0, n + 1, (30, 2)), axis=1)]:
        found = store.read(int(start), int(stop))
        assert found.dtype == np.int32
        np.testing.assert_array_equal(found, stream[start:stop])


def test_reads_many_ranges_in_the_order_asked(store: TokenStore, stream: np.ndarray) -> None:
    rng = np.random.default_rng(2)
    starts = rng.integers(0, store.n_tokens - 100, 40)
    lengths = rng.integers(0, 100, 40)
    expected = np.concatenate([stream[start : start + length] for start, length in zip(starts, lengths)])
    np.testing.assert_array_equal(store.read_ranges(starts, lengths), expected)
    assert store.read_ranges(np.array([3]), np.array([0])).dtype == np.int32


def test_names_documents(store: TokenStore, documents: list[np.ndarray]) -> None:
    assert [store.document_key(i) for i in (0, 17, len(documents) - 1)] == ["文件-0", "文件-17", "文件-53"]


@pytest.mark.parametrize(("start", "length"), [(-1, 1), (0, -1), (10**9, 1)])
def test_refuses_what_is_outside(store: TokenStore, start: int, length: int) -> None:
    with pytest.raises(IndexError, match="asked of a stream of"):
        store.read_ranges(np.array([start]), np.array([length]))


def test_a_read_result_is_the_callers(store: TokenStore, stream: np.ndarray) -> None:
    store.read(0, 50)[:] = -1
    np.testing.assert_array_equal(store.read(0, 50), stream[:50])


def test_cache_stays_within_its_budget(folder: Path, stream: np.ndarray) -> None:
    store = DatasetStore(folder, "train", cache_tokens=100)
    for start in range(0, 1000, 37):
        np.testing.assert_array_equal(store.read(start, start + 50), stream[start : start + 50])
        assert store._cached_tokens == sum(map(len, store._cache.values())) <= 100
    assert store._cache


def test_threads_share_a_store(folder: Path, stream: np.ndarray) -> None:
    store = DatasetStore(folder, "train", cache_tokens=500)
    starts = np.random.default_rng(3).integers(0, len(stream) - 200, 300)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda start: store.read(int(start), int(start) + 200), starts))
    for start, tokens in zip(starts, found):
        np.testing.assert_array_equal(tokens, stream[start : start + 200])
    assert store._cached_tokens == sum(map(len, store._cache.values()))


def test_a_pickled_store_carries_settings_only(folder: Path, stream: np.ndarray) -> None:
    store = DatasetStore(folder, "train")
    store.read(0, 1000)
    pickled = pickle.dumps(store)
    assert len(pickled) < 1000
    np.testing.assert_array_equal(pickle.loads(pickled).read(5, 500), stream[5:500])


def test_splits_are_apart(folder: Path) -> None:
    assert DatasetStore(folder, "validation").read(0, 2).tolist() == [7, EOS]


def test_user_errors(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no prepared dataset at .*missing; make one with"):
        DatasetStore(tmp_path / "missing", "train")
    with pytest.raises(UserError, match=r"split 'test' is not in .*; it has train, validation"):
        DatasetStore(folder, "test")


def test_a_damaged_dataset_is_named(folder: Path, tmp_path: Path) -> None:
    index = tmp_path / "index"
    index.mkdir()
    for path in (folder / "index").iterdir():
        (index / path.name).write_bytes(path.read_bytes())
    with pytest.raises(UserError, match=r"cannot be opened .*; delete the folder and prepare the dataset again"):
        DatasetStore(tmp_path, "train").read(0, 1)
    for path in folder.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    np.save(index / "train.records.npy", np.array([0, 5]))
    with pytest.raises(UserError, match="hold 58 records, its index 1; delete the folder"):
        DatasetStore(tmp_path, "train").read(0, 1)


def test_ranges() -> None:
    assert ranges(np.array([5, 0, 9]), np.array([2, 0, 3])).tolist() == [5, 6, 9, 10, 11]
    assert ranges(np.zeros(0, np.int64), np.zeros(0, np.int64)).tolist() == []
