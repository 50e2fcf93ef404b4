"""Batches by step number: the loader's only state is the step, so resuming is starting at another one.

The training stream is epoch after epoch of the split's examples, each epoch in an order of its own
(`lm.data.permutation`). The batch of step s is examples `[s * B, (s + 1) * B)` of that stream, whatever the number of
processes, worker processes or threads.

Where a function takes a store it also takes a `Mixture` of several; `lm.data.mixture` then says which example is the
n-th of the stream.
"""

from __future__ import annotations

import itertools
import multiprocessing
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np

from lm.data.config import DataConfig
from lm.data.mixture import MixedExamples, Mixture, MixtureOrder, check_mixture_config
from lm.data.packing import Batch, Examples, make_examples
from lm.data.permutation import permute
from lm.data.store import TokenStore
from lm.data.workers import start_worker
from lm.errors import UserError, check

_ENDLESS = 2**53  # steps; far beyond any run, and within what grain counts
_THREADS = 2  # that read in the main process; more gain nothing, as much of the work holds Python's lock


Maker = Callable[[TokenStore, DataConfig, bool], Examples]
"""Makes the examples of a store: (store, settings, whether to train on them)."""


def packed(bos_id: int) -> Maker:
    """Examples of next-token prediction (`lm.data.packing`); `bos_id` comes before each document that is kept apart."""

    def make(store: TokenStore, config: DataConfig, training: bool) -> Examples:
        return make_examples(
            store,
            seq_len=config.seq_len,
            packing=config.packing,
            bos_id=bos_id,
            stride=config.stride if training else config.eval_stride,
            training=training,
        )

    return make


BatchIterator = Generator[Batch, None, None]
"""Reading ahead begins with the first batch; `close()` (or the end, or losing the last reference) ends it."""


def check_loader_config(config: DataConfig) -> None:
    """Raises UserError if a setting of how examples are read is out of range; reads no file."""
    check(config.seq_len >= 1, f"data.seq-len is {config.seq_len}; it must be at least 1")
    for name, stride in (("data.stride", config.stride), ("data.eval-stride", config.eval_stride)):
        check(
            stride is None or 1 <= stride <= config.seq_len,
            f"{name} is {stride}; it must be from 1 to data.seq-len ({config.seq_len}), or tokens would be passed over",
        )
    check(config.workers >= 0, f"data.workers is {config.workers}; it must be 0 or more")
    check(config.prefetch >= 1, f"data.prefetch is {config.prefetch}; it must be at least 1")
    check_mixture_config(config.mixture)
    if config.mixture.datasets:
        for name in ("source", "validation_source", "test_source"):
            value, default = getattr(config, name), getattr(DataConfig, name)
            check(
                value == default,
                f"data.{name} is {value!r}, but data.mixture.datasets names prepared datasets, and a run reads one or"
                f" the other; begin from a config that leaves data.{name} at {default!r}",
            )


def training_batches(
    store: TokenStore | Mixture,
    config: DataConfig,
    *,
    make: Maker,
    batch_size: int,
    start_step: int = 0,
    rows: Sequence[int] | None = None,
) -> BatchIterator:
    """An endless iterator over the batches of steps `start_step`, `start_step + 1`, …

    Args:
      store: where tokens are read; the training split of one dataset, or of several.
      config: `seed`, `workers`, `prefetch` and what `make` reads are used.
      make: makes a store's examples, as the objective wants them; `packed` for next-token prediction.
      batch_size: B, rows of the global batch.
      start_step: where to begin; a straight run from there on gives the same batches.
      rows: which rows of each batch are read here, ascending; None = all. Several processes read each its own.

    Returns:
      An iterator over dicts of numpy arrays of these rows (see `Examples.batch`). Call its `close()` when done.

    Raises:
      UserError: a setting out of range, a row that no batch has, a corpus shorter than one example.
    """
    check_loader_config(config)
    check(start_step >= 0, f"start_step is {start_step}; it must be 0 or more")
    chosen = _chosen_rows(batch_size, rows)
    read = _training_batch(store, config, make, batch_size, chosen)
    return _iterate(read, range(start_step, _ENDLESS), config)


def evaluation_batches(
    store: TokenStore | Mixture,
    config: DataConfig,
    *,
    make: Maker,
    batch_size: int,
    max_batches: int | None = None,
    rows: Sequence[int] | None = None,
) -> BatchIterator:
    """An iterator over every example once, in order; arguments and errors as for `training_batches`.

    Every token is scored once. Windows begin `eval_stride` tokens apart. The datasets of a mixture come one after
    the other; for the result of one alone, give its own store.

    The last batch is filled with rows of weight 0, so that all batches have one shape and all processes the same
    number of them. `max_batches` stops earlier.
    """
    check_loader_config(config)
    chosen = _chosen_rows(batch_size, rows)
    examples = _examples(store, config, make, training=False)
    n_batches = _count_batches(examples, batch_size, max_batches)
    return _iterate(_EvaluationBatch(examples, batch_size, chosen), range(n_batches), config)


def n_evaluation_batches(
    store: TokenStore | Mixture, config: DataConfig, *, make: Maker, batch_size: int, max_batches: int | None = None
) -> int:
    """How many batches `evaluation_batches` gives."""
    examples = _examples(store, config, make, training=False)
    return _count_batches(examples, batch_size, max_batches)


def _count_batches(examples: Examples, batch_size: int, max_batches: int | None) -> int:
    check(max_batches is None or max_batches >= 1, f"max_batches is {max_batches}; it must be at least 1")
    n_batches = -(-len(examples) // batch_size)
    return n_batches if max_batches is None else min(n_batches, max_batches)


def training_size(store: TokenStore | Mixture, config: DataConfig, *, make: Maker) -> tuple[int, int]:
    """Examples in one epoch, and documents that lose a part because a row, which must hold them whole, is too short.

    In a mixture, of all datasets together: some are then seen more than once in as many steps, others in part (see
    `epochs_seen`). Raises UserError as `training_batches` does.
    """
    examples = _examples(store, config, make, training=True)
    return len(examples), getattr(examples, "cut", 0)


def epochs_seen(store: Mixture, config: DataConfig, *, make: Maker, batch_size: int, step: int) -> dict[str, float]:
    """How often each dataset of a mixture, by name, has been gone through when `step` steps are done."""
    read = _training_batch(store, config, make, batch_size, np.arange(0))
    assert isinstance(read.order, MixtureOrder)
    counts = read.order.counts(step * batch_size)
    return {part.name: count / size for part, count, size in zip(store.parts, counts, read.order.sizes, strict=True)}


def batch_documents(
    store: TokenStore | Mixture, config: DataConfig, *, make: Maker, batch_size: int, step: int
) -> list[list[str]]:
    """The keys of the documents in each row of a step's global batch, to name them or to look at them again."""
    read = _training_batch(store, config, make, batch_size, np.arange(batch_size))
    documents = [read.examples.documents(int(index)) for index in read.index(step)[0]]
    return [[store.document_key(int(document)) for document in row] for row in documents]


@dataclass(frozen=True)
class _EpochOrder:
    """Which example is the n-th of the stream, where there is one dataset, and in which epoch: one after the other."""

    n: int
    seed: int

    def __call__(self, place: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        epoch, position = np.divmod(place, self.n)
        return permute(position, self.n, seed=self.seed, epoch=epoch), epoch


@dataclass(frozen=True)
class _TrainingBatch:
    """Step to batch. A class and not a closure, so that it reaches worker processes."""

    examples: Examples
    order: _EpochOrder | MixtureOrder
    batch_size: int
    rows: np.ndarray

    def index(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        return self.order(step * self.batch_size + self.rows)

    def __call__(self, step: int) -> Batch:
        return self.examples.batch(*self.index(step))


@dataclass(frozen=True)
class _EvaluationBatch:
    examples: Examples
    batch_size: int
    rows: np.ndarray

    def __call__(self, step: int) -> Batch:
        index = step * self.batch_size + self.rows
        return self.examples.batch(np.where(index < len(self.examples), index, -1))


def _training_batch(
    store: TokenStore | Mixture, config: DataConfig, make: Maker, batch_size: int, rows: np.ndarray
) -> _TrainingBatch:
    examples = _examples(store, config, make, training=True)
    if isinstance(store, Mixture):
        assert isinstance(examples, MixedExamples)
        order = store.order(examples.sizes, batch_size=batch_size, seed=config.seed)
        return _TrainingBatch(examples, order, batch_size, rows)
    return _TrainingBatch(examples, _EpochOrder(len(examples), config.seed), batch_size, rows)


def _examples(store: TokenStore | Mixture, config: DataConfig, make: Maker, *, training: bool) -> Examples:
    if isinstance(store, Mixture):
        parts = []
        for part in store.parts:
            try:
                parts.append(_examples(part.store, config, make, training=training))
            except UserError as error:
                raise UserError(f"{part.name}: {error}") from None
        return MixedExamples(store, parts)
    return make(store, config, training)


def _chosen_rows(batch_size: int, rows: Sequence[int] | None) -> np.ndarray:
    check(batch_size >= 1, f"batch size is {batch_size}; it must be at least 1")
    chosen = np.arange(batch_size) if rows is None else np.asarray(rows)
    check(
        chosen.size and chosen.min() >= 0 and chosen.max() < batch_size,
        f"rows {chosen.tolist()[:8]} are asked for of batches of {batch_size}; they are from 0 to {batch_size - 1}",
    )
    return chosen


def _iterate(read: Callable[[int], Batch], steps: range, config: DataConfig) -> BatchIterator:
    if config.workers:
        return _with_workers(read, steps, config.workers, ahead=max(config.prefetch, config.workers))
    return _with_threads(read, steps, min(config.prefetch, _THREADS), ahead=config.prefetch)


def _with_threads(read: Callable[[int], Batch], steps: range, threads: int, ahead: int) -> BatchIterator:
    # Here, not at the top: grain imports jax, which worker processes can do without.
    import grain

    dataset = grain.MapDataset.range(steps.start, steps.stop).map(read)
    iterator = iter(dataset.to_iter_dataset(grain.ReadOptions(threads, prefetch_buffer_size=ahead)))
    try:
        yield from iterator
    finally:
        iterator.close()


def _with_workers(read: Callable[[int], Batch], steps: range, workers: int, ahead: int) -> BatchIterator:
    """Reads in worker processes, in order.

    Instead of grain's `mp_prefetch`, which needs room in /dev/shm and leaves blocks there when it is closed before
    the end of the data, as a reader of an endless stream always is; sent through pipes instead, its batches keep
    `close` waiting for 25 seconds (grain 0.2.18).
    """
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of JAX's threads
    executor = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(read,))
    try:
        remaining = iter(steps)
        pending = deque(executor.submit(_read_in_worker, step) for step in itertools.islice(remaining, ahead))
        while pending:
            batch = pending.popleft().result()
            pending.extend(executor.submit(_read_in_worker, step) for step in itertools.islice(remaining, 1))
            yield batch
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


_worker_read: Callable[[int], Batch]  # what this process does, where it is a worker


def _start_worker(read: Callable[[int], Batch]) -> None:
    """Makes a process a worker; the main one still wants a batch to finish its step when it is told to stop."""
    global _worker_read
    _worker_read = read
    start_worker()


def _read_in_worker(step: int) -> Batch:
    return _worker_read(step)
