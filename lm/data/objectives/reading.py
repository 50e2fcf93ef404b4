"""What examples share that read ranges of the stream into rows."""

from __future__ import annotations

import numpy as np

from lm.data.store import TokenStore


def check_index(index: np.ndarray, n: int) -> np.ndarray:
    """`index` as int64. Raises IndexError for an example that there is not; negative ones ask for padding."""
    index = np.asarray(index, np.int64)
    if index.size and index.max() >= n:
        raise IndexError(f"example {index.max()} asked; there are {n}.")
    return index


def read_rows(store: TokenStore, starts: np.ndarray, lengths: np.ndarray, width: int) -> np.ndarray:
    """The ranges `[starts[i], starts[i] + lengths[i])` of the stream, each a row with 0 behind: int32 [N, width]."""
    rows = np.zeros((len(starts), width), np.int32)
    rows[np.arange(width) < lengths[:, None]] = store.read_ranges(starts, lengths)
    return rows


def documents_between(store: TokenStore, start: int, stop: int) -> np.ndarray:
    """Ordinals of the documents with tokens in `[start, stop)` of the stream: int64."""
    offsets = store.document_offsets
    return np.arange(
        np.searchsorted(offsets, start, side="right") - 1, np.searchsorted(offsets, stop - 1, side="right")
    )
