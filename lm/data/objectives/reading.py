"""What examples share that read ranges of the stream into rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lm.data.store import TokenStore, ranges


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


Piece = int | np.ndarray | tuple[np.ndarray, np.ndarray]
"""What stands in a row: a token of its own, several that are the same in all rows (integers [n]), or a range of the
stream for each row (starts, lengths: int64 [N])."""


def lay_out(store: TokenStore, used: np.ndarray, width: int, pieces: Sequence[Piece]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of pieces, one behind the other.

    Args:
      store: where ranges are read.
      used: bool [N]; other rows stay empty.
      width: T; the pieces fit into it.
      pieces: what stands in each row, in order.

    Returns:
      Tokens with 0 behind the last piece, int32 [N, T]; and where each piece ends, int64 [len(pieces), N].
    """
    N = len(used)
    tokens = np.zeros((N, width), np.int32)
    (rows,) = np.nonzero(used)
    at, ends = np.zeros(N, np.int64), []
    for piece in pieces:
        if isinstance(piece, tuple):
            starts, lengths = piece
            lengths = np.where(used, lengths, 0)
            tokens.ravel()[ranges(np.arange(N) * width + at, lengths)] = store.read_ranges(starts, lengths)
            at = at + lengths
        elif isinstance(piece, np.ndarray):
            tokens[rows[:, None], at[rows, None] + np.arange(len(piece))] = piece
            at = at + used * len(piece)
        else:
            tokens[rows, at[rows]] = piece
            at = at + used
        ends.append(at)
    return tokens, np.stack(ends)


def places(sizes: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Of rows with that many tokens ([N]): `positions` and `segments` (1, and 0 for padding), int32 [N, width]."""
    column = np.arange(width, dtype=np.int32)
    real = column < sizes[:, None]
    return np.where(real, column, 0), real.astype(np.int32)
