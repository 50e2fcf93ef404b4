"""Random numbers as a formula: what is drawn for a row depends on (seed, purpose, epoch, index) and on nothing else.

numpy's generators carry state and promise no equal numbers across versions; these are whole batches at a time, and a
run that was begun with one numpy goes on with the next.
"""

from __future__ import annotations

import numpy as np

from lm.text.shingles import mix

# What numbers are drawn for: objectives that share a seed draw apart. Changing one changes every run ever started.
MASKS, SPANS, PREFIXES, PAIRS, CUTS, SHOTS = 1, 2, 3, 4, 5, 6

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MASK64 = 2**64 - 1


def row_keys(seed: int, purpose: int, epoch: np.ndarray | int, index: np.ndarray) -> np.ndarray:
    """A key for each row, uint64 shaped like `index`; `epoch` and `index` are integers that broadcast."""
    key = mix(np.array([seed & _MASK64], np.uint64)) + np.uint64(purpose)
    for part in np.broadcast_arrays(np.asarray(epoch, np.int64), np.asarray(index, np.int64)):
        key = mix(mix(key) + part.astype(np.uint64) * _GOLDEN)
    return key


def uniform(keys: np.ndarray, n: int) -> np.ndarray:
    """The first `n` numbers in [0, 1) of each key: float64 [*keys.shape, n]. SplitMix64, which passes BigCrush."""
    states = keys[..., None] + np.arange(1, n + 1, dtype=np.uint64) * _GOLDEN
    return (mix(states) >> np.uint64(11)) * 2.0**-53


def whole(draws: np.ndarray, n: np.ndarray | int) -> np.ndarray:
    """Integers in `[0, n)` from numbers in [0, 1); int64, 0 where n is 0 or less."""
    return np.maximum((draws * n).astype(np.int64), 0)
