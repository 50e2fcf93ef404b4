"""A seeded shuffle that is a formula: where an example stands costs O(1), with no table and no state.

`grain.experimental.index_shuffle` does the same one index at a time, with 32-bit seeds. This one takes whole
batches, mixes seed and epoch into 64 bits, and cannot change under a run when grain is upgraded.
"""

from __future__ import annotations

import math

import numpy as np

# Changing any of these changes the order of every run ever started: don't.
_ROUNDS = 8
_GOLDEN = 0x9E3779B97F4A7C15
_MASK64 = 2**64 - 1


def permute(index: np.ndarray, n: int, *, seed: int, epoch: np.ndarray | int = 0) -> np.ndarray:
    """Applies the permutation of `[0, n)` that belongs to (seed, epoch) to every element of `index`.

    Args:
      index: integers in `[0, n)`, any shape.
      n: how many things are shuffled, at most 2**63 - 1.
      seed: any integer.
      epoch: broadcasts against `index`; each epoch has a permutation of its own.

    Returns:
      int64 array shaped like `index`; for fixed (n, seed, epoch) the map is one to one.

    Raises:
      ValueError: n is not in `[1, 2**63)`, or an index is not in `[0, n)`.
    """
    index = np.asarray(index, np.int64)
    if not 1 <= n < 2**63:
        raise ValueError(f"permute: n is {n}; it must be at least 1 and below 2**63.")
    if index.size and (index.min() < 0 or index.max() >= n):
        raise ValueError(f"permute: indices span [{index.min()}, {index.max()}]; they must lie in [0, {n}).")
    epochs = np.broadcast_to(np.asarray(epoch, np.int64), index.shape).ravel().astype(np.uint64)
    key = _mix(epochs + _mix(np.array([seed & _MASK64], np.uint64)))
    # A Feistel network on the grid [rows, columns], the nearest to a square that holds n, so that few points lie
    # outside [0, n). Those walk on along their cycle until they come back in, which keeps the map one to one.
    rows = math.isqrt(n - 1) + 1
    columns = -(-n // rows)
    x = _feistel(index.ravel().astype(np.uint64), key, rows, columns)
    while (outside := np.flatnonzero(x >= np.uint64(n))).size:
        x[outside] = _feistel(x[outside], key[outside], rows, columns)
    return x.astype(np.int64).reshape(index.shape)


def _feistel(x: np.ndarray, key: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """A keyed permutation of `[0, rows * columns)`; each half is shifted by a hash of the other in turn."""
    row, column = np.divmod(x, np.uint64(columns))
    for i in range(_ROUNDS):
        round_key = key + np.uint64((i + 1) * _GOLDEN & _MASK64)
        if i % 2 == 0:
            row = (row + _mix(column + round_key) % np.uint64(rows)) % np.uint64(rows)
        else:
            column = (column + _mix(row + round_key) % np.uint64(columns)) % np.uint64(columns)
    return row * np.uint64(columns) + column


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: every input bit flips about half of the output bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
