"""One global stream of batches, whatever step it begins at, and whichever processes and workers share it."""

import dataclasses
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from lm.data.config import DataConfig
from lm.data.loader import (
    batch_documents,
    evaluation_batches,
    n_evaluation_batches,
    packed,
    training_batches,
    training_size,
)
from lm.data.packing import Batch, make_examples
from lm.data.store import DatasetStore, MemoryStore
from lm.data.writer import DatasetWriter
from lm.errors import UserError

EOS = 0
STREAM = DataConfig(seq_len=16, packing="stream")
DOCUMENTS = DataConfig(seq_len=16, packing="documents")
OVERLAPPING = DataConfig(seq_len=16, stride=5, eval_stride=3)
PADDED = DataConfig(seq_len=16, packing="pad", stride=6, eval_stride=11)
both = pytest.mark.parametrize(
    "config", [STREAM, DOCUMENTS, OVERLAPPING, PADDED], ids=["stream", "documents", "overlapping", "padded"]
)


def make_documents() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [np.append(rng.integers(1, 1000, length), EOS) for length in rng.integers(0, 50, 60)]


@pytest.fixture(scope="module")
def store() -> MemoryStore:
    return MemoryStore(make_documents())


def take(store: MemoryStore | DatasetStore, config: DataConfig, n: int, **settings: int) -> list[Batch]:
    batches = training_batches(store, config, **{"make": packed(EOS), "batch_size": 8, **settings})
    try:
        return list(itertools.islice(batches, n))
    finally:
        batches.close()


def assert_same(found: Iterator[Batch] | list[Batch], expected: list[Batch]) -> None:
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_equal(one, other)


@both
def test_a_resumed_stream_is_the_straight_one(store: MemoryStore, config: DataConfig) -> None:
    steps = 3 * training_size(store, config, make=packed(1))[0] // 8  # three epochs, whose ends fall inside batches
    straight = take(store, config, steps)
    for start in (1, steps // 3, steps // 2, steps - 1):
        assert_same(take(store, config, steps - start, start_step=start), straight[start:])


@both
def test_each_epoch_has_every_example_once_in_its_own_order(store: MemoryStore, config: DataConfig) -> None:
    n = training_size(store, config, make=packed(1))[0]
    rows = np.concatenate([batch["targets"] for batch in take(store, config, -(-2 * n // 8))])
    examples = make_examples(store, seq_len=16, packing=config.packing, bos_id=EOS, stride=config.stride)
    expected = sorted(map(tuple, examples.batch(np.arange(n))["targets"].tolist()))
    epochs = [list(map(tuple, rows[start : start + n].tolist())) for start in (0, n)]
    assert epochs[0] != epochs[1]
    assert [sorted(epoch) for epoch in epochs] == [expected, expected]


def test_another_seed_is_another_order(store: MemoryStore) -> None:
    other = take(store, dataclasses.replace(STREAM, seed=1), 1)
    assert not np.array_equal(other[0]["tokens"], take(store, STREAM, 1)[0]["tokens"])


@pytest.mark.parametrize("seed", [0, 1])
def test_packed_documents_are_in_an_order_that_says_nothing_of_their_lengths(seed: int) -> None:
    """Packing puts the longest first and shuffles; two shuffles of one seed once undid each other."""
    lengths = np.random.default_rng(0).integers(0, 16, 4000)
    store = MemoryStore([np.append(np.ones(n, int), EOS) for n in lengths])
    config = dataclasses.replace(DOCUMENTS, seed=seed)
    batches = take(store, config, training_size(store, config, make=packed(EOS))[0] // 8)
    pieces = np.concatenate([batch["segments"].max(1) for batch in batches])
    assert abs(np.corrcoef(pieces, np.arange(len(pieces)))[0, 1]) < 0.1


def test_a_batch_may_span_epochs() -> None:
    store = MemoryStore([np.arange(34)])  # two examples
    (batch,) = take(store, STREAM, 1)
    assert [sorted(batch["tokens"][i : i + 2, 0].tolist()) for i in range(0, 8, 2)] == [[0, 16]] * 4


@both
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_one_stream(store: MemoryStore, config: DataConfig, processes: int) -> None:
    whole = take(store, config, 12, start_step=3)
    parts = [
        take(store, config, 12, start_step=3, rows=range(8 // processes * i, 8 // processes * (i + 1)))
        for i in range(processes)
    ]
    assert_same([{k: np.concatenate([row[k] for row in rows]) for k in rows[0]} for rows in zip(*parts)], whole)


def test_workers_read_the_same_from_disk(tmp_path: Path, store: MemoryStore) -> None:
    with DatasetWriter(tmp_path, "corpus", EOS) as writer:
        for i, document in enumerate(make_documents()):
            writer.add("train", str(i), document[:-1].tolist(), text_bytes=1, last=True)
        writer.finish()
    disk = DatasetStore(tmp_path, "train")
    expected = take(store, DOCUMENTS, 7, start_step=5)
    assert_same(take(disk, DOCUMENTS, 7, start_step=5), expected)
    with_workers = dataclasses.replace(DOCUMENTS, workers=2)
    assert_same(take(disk, with_workers, 7, start_step=5), expected)
    # An evaluation ends by itself.
    one_worker = dataclasses.replace(DOCUMENTS, workers=1)
    expected = list(evaluation_batches(store, DOCUMENTS, make=packed(EOS), batch_size=64))
    assert_same(evaluation_batches(disk, one_worker, make=packed(EOS), batch_size=64), expected)


@both
@pytest.mark.parametrize("batch_size", [1, 8, 500])
def test_evaluation_scores_every_token_once(store: MemoryStore, config: DataConfig, batch_size: int) -> None:
    batches = list(evaluation_batches(store, config, make=packed(EOS), batch_size=batch_size))
    assert {batch["tokens"].shape for batch in batches} == {(batch_size, 16)}
    scored = np.concatenate([batch["targets"][batch["weights"] > 0] for batch in batches])
    expected = store.read(1 if config.packing == "stream" else 0, store.n_tokens)
    if config.packing == "stream":
        np.testing.assert_array_equal(scored, expected)
    else:
        np.testing.assert_array_equal(np.sort(scored), np.sort(expected))


@both
def test_processes_share_an_evaluation(store: MemoryStore, config: DataConfig) -> None:
    whole = list(evaluation_batches(store, config, make=packed(EOS), batch_size=64))
    parts = [
        list(evaluation_batches(store, config, make=packed(EOS), batch_size=64, rows=range(32 * i, 32 * i + 32)))
        for i in range(2)
    ]
    assert len(parts[0]) == len(parts[1]) == len(whole)
    assert_same([{k: np.concatenate([row[k] for row in rows]) for k in rows[0]} for rows in zip(*parts)], whole)
    first = list(evaluation_batches(store, config, make=packed(EOS), batch_size=64, max_batches=1))
    assert_same(first, whole[:1])
    assert n_evaluation_batches(store, config, make=packed(1), batch_size=64) == len(whole)
    assert n_evaluation_batches(store, config, make=packed(1), batch_size=64, max_batches=1) == 1
    assert len(list(evaluation_batches(store, config, make=packed(EOS), batch_size=64, max_batches=99))) == len(whole)


def test_training_and_evaluation_have_strides_of_their_own(store: MemoryStore) -> None:
    assert training_size(store, OVERLAPPING, make=packed(1))[0] == (store.n_tokens - 1 - 16) // 5 + 1
    assert (
        n_evaluation_batches(store, OVERLAPPING, make=packed(1), batch_size=1) == -(-(store.n_tokens - 1 - 16) // 3) + 1
    )
    assert all(batch["weights"].all() for batch in take(store, OVERLAPPING, 5))


def test_a_short_text_can_be_evaluated() -> None:
    (batch,) = evaluation_batches(MemoryStore([np.array([5, EOS])]), STREAM, make=packed(EOS), batch_size=2)
    assert batch["weights"].sum() == 1


@both
def test_documents_of_a_batch_are_named(store: MemoryStore, config: DataConfig) -> None:
    rows = batch_documents(store, config, make=packed(EOS), batch_size=8, step=11)
    (batch,) = take(store, config, 1, start_step=11)
    offsets = store.document_offsets
    for keys, targets, weights in zip(rows, batch["targets"], batch["weights"]):
        tokens = np.concatenate([store.read(offsets[int(key)], offsets[int(key) + 1]) for key in keys])
        assert set(targets[weights > 0].tolist()) <= set(tokens.tolist())
    assert len(rows) == 8


def test_no_thread_is_left_behind(store: MemoryStore) -> None:
    before = set(threading.enumerate())
    take(store, STREAM, 2)
    list(evaluation_batches(store, STREAM, make=packed(EOS), batch_size=64))
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=5)
        assert not thread.is_alive()


STOPPED = """
import itertools, multiprocessing, os, signal
import numpy as np
from lm.data.config import DataConfig
from lm.data.loader import packed, training_batches
from lm.data.store import MemoryStore

if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    store, config = MemoryStore([np.arange(999)]), DataConfig(seq_len=8, workers=1)
    batches = training_batches(store, config, make=packed(0), batch_size=2)
    next(batches)
    for number in (signal.SIGINT, signal.SIGTERM):
        os.killpg(0, number)
    (worker,) = multiprocessing.active_children()
    print(len(list(itertools.islice(batches, 20))), worker.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_outlive_signals_but_not_the_main_process(tmp_path: Path) -> None:
    script = tmp_path / "stopped.py"
    script.write_text(STOPPED)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    # Its own session: the signals go to that process and its workers, as a terminal's and a scheduler's do.
    stopped = subprocess.Popen(
        [sys.executable, script], env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert stopped.stdout is not None
    count, worker = stopped.stdout.readline().split()
    assert count == "20"
    stopped.stdout.close()
    assert stopped.wait() == -signal.SIGKILL
    deadline = time.monotonic() + 10
    while is_running(int(worker)):
        assert time.monotonic() < deadline, "the worker outlived the process it worked for"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"  # dead, and nobody has asked for its exit status


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch size is 0; it must be at least 1"),
        ({"batch_size": 6, "rows": [5, 6]}, "rows [5, 6] are asked for of batches of 6; they are from 0 to 5"),
        ({"start_step": -1}, "start_step is -1; it must be 0 or more"),
        ({"config": dataclasses.replace(STREAM, workers=-1)}, "data.workers is -1; it must be 0 or more"),
        ({"config": dataclasses.replace(STREAM, prefetch=0)}, "data.prefetch is 0; it must be at least 1"),
        ({"config": dataclasses.replace(STREAM, seq_len=9999)}, "the corpus has 1"),
        ({"config": dataclasses.replace(STREAM, seq_len=0)}, "data.seq-len is 0; it must be at least 1"),
        ({"config": dataclasses.replace(STREAM, stride=0)}, "data.stride is 0; it must be from 1 to data.seq-len (16)"),
        ({"config": dataclasses.replace(STREAM, eval_stride=17)}, "data.eval-stride is 17; it must be from 1 to"),
    ],
)
def test_user_errors(store: MemoryStore, settings: dict[str, object], message: str) -> None:
    arguments = {"store": store, "config": STREAM, "make": packed(EOS), "batch_size": 8, **settings}
    with pytest.raises(UserError) as error:
        training_batches(**arguments)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_evaluation_user_errors(store: MemoryStore) -> None:
    with pytest.raises(UserError, match="max_batches is 0; it must be at least 1"):
        evaluation_batches(store, STREAM, make=packed(EOS), batch_size=8, max_batches=0)
    with pytest.raises(UserError, match="the corpus has 0 tokens and at least 2 are needed"):
        evaluation_batches(MemoryStore([]), STREAM, make=packed(EOS), batch_size=8)
