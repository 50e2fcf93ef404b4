"""Span corruption (T5, arXiv:1910.10683) and prefixes: what is to be written is a part of running text.

Span corruption cuts spans out of a window of the stream. The source holds a sentinel where each was, and the target
every sentinel and the span it stands for; both end with the end-of-text token. A prefix language model sees the first
part of a text to both sides and is scored on the rest.
"""

from __future__ import annotations

import shlex

import numpy as np

from lm.data.objectives.draws import PREFIXES, SPANS, row_keys, uniform, whole
from lm.data.objectives.masking import real_tokens
from lm.data.objectives.reading import check_index, documents_between, places, read_rows
from lm.data.packing import Batch, Examples
from lm.data.store import TokenStore
from lm.errors import UserError, check
from lm.text.tokenizer import Tokenizer


def span_counts(length: int, *, density: float, mean_length: float) -> tuple[int, int]:
    """How many tokens of a window are cut out, and in how many spans; halves are rounded to even.

    Args:
      length: tokens in the window, at least 2.
      density: share of them that is cut out.
      mean_length: tokens in a span, on average.
    """
    noise = min(max(round(length * density), 1), length - 1)
    return noise, min(max(round(noise / mean_length), 1), noise, length - noise)


def span_lengths(source_len: int, *, density: float, mean_length: float) -> tuple[int, int]:
    """The longest window whose source fits, and how long its target is; each ends with one end-of-text token.

    Args:
      source_len: S, places in a source, at least 4.
      density: see `span_counts`.
      mean_length: see `span_counts`.

    Returns:
      Tokens in a window, and places in a target. 512 places at 0.15 and 3 give 568 and 114, as in T5.
    """

    def source(length: int) -> int:
        noise, spans = span_counts(length, density=density, mean_length=mean_length)
        return length - noise + spans + 1

    length = source_len - 1
    while source(length + 1) <= source_len:
        length += 1
    noise, spans = span_counts(length, density=density, mean_length=mean_length)
    return length, noise + spans + 1


def sentinel_ids(tokenizer: Tokenizer, n: int) -> np.ndarray:
    """The ids of `<extra_id_0>`, `<extra_id_1>`, …: int32 [n]. Raises `UserError` if the tokenizer lacks one."""
    names = [f"<extra_id_{i}>" for i in range(n)]
    missing = [name for name in names if name not in tokenizer.special_tokens]
    if missing:
        raise UserError(
            f"span corruption needs {n} sentinels here, <extra_id_0> to {names[-1]}, and the tokenizer lacks "
            f"{missing[0]}; add them all to tokenizer.special_tokens, or make data.seq-len smaller; for a shell:"
            f" --tokenizer.special-tokens {shlex.join(names)}"
        )
    return np.array([tokenizer.special_tokens[name] for name in names], np.int32)


def noise_mask(length: int, keys: np.ndarray, *, density: float, mean_length: float) -> np.ndarray:
    """Which tokens of windows are cut out.

    Kept and cut runs take turns, a kept one first and a cut one last, each of at least one token. Among the masks with
    `span_counts` tokens in as many spans, all are equally likely.

    Args:
      length: tokens in each window, at least 2.
      keys: uint64 [N], one a window.
      density: share of the tokens that is cut out.
      mean_length: tokens in a span, on average.

    Returns:
      bool [N, length].
    """
    noise, spans = span_counts(length, density=density, mean_length=mean_length)
    kept = length - noise
    draws = uniform(keys, noise + kept - 2)
    cut = _run_lengths(draws[:, : noise - 1], noise, spans)
    left = _run_lengths(draws[:, noise - 1 :], kept, spans)
    runs = np.stack([left, cut], axis=2).reshape(len(keys), 2 * spans)
    begins = np.zeros((len(keys), length), np.int8)
    np.put_along_axis(begins, np.cumsum(runs, axis=1)[:, :-1], 1, axis=1)
    return np.cumsum(begins, axis=1) % 2 == 1


def _run_lengths(draws: np.ndarray, items: int, runs: int) -> np.ndarray:
    """Cuts `items` in a row into runs, all ways equally likely: [N, runs], by `items - 1` draws [N, items - 1]."""
    cuts = np.sort(np.argsort(draws, axis=1, kind="stable")[:, : runs - 1], axis=1) + 1
    ends = np.pad(cuts, ((0, 0), (1, 1)), constant_values=((0, 0), (0, items)))
    return np.diff(ends, axis=1)


class SpanExamples:
    """Windows of the stream with spans cut out: `source_*` for the encoder, what was cut out for the decoder.

    Example i is tokens `[i * L, (i + 1) * L)` of the stream, L as `span_lengths` says. Training leaves out a last,
    shorter window; evaluation pads it, and leaves out a single last token.

    Args:
      store: where tokens are read.
      seq_len: S, places in a source.
      bos_id: the decoder's first token.
      eos_id: the last token of sources and targets.
      sentinels: int32, ids that stand for spans, in their order (`sentinel_ids`); as many as `n_sentinels` says.
      seed: of the draws.
      density: share of the tokens that is cut out.
      mean_length: tokens in a span, on average.
      training: see above.

    Raises:
      UserError: a setting out of range, too few sentinels, a corpus shorter than one example.
    """

    def __init__(
        self,
        store: TokenStore,
        seq_len: int,
        *,
        bos_id: int,
        eos_id: int,
        sentinels: np.ndarray,
        seed: int,
        density: float = 0.15,
        mean_length: float = 3.0,
        training: bool = True,
    ):
        needed = n_sentinels(seq_len, density=density, mean_length=mean_length)
        check(
            len(sentinels) >= needed,
            f"span corruption needs {needed} sentinels here, and there are {len(sentinels)}; add <extra_id_0> … to "
            "tokenizer.special_tokens",
        )
        self.window, self.target_len = span_lengths(seq_len, density=density, mean_length=mean_length)
        whole_windows, rest = divmod(store.n_tokens, self.window)
        self._n = whole_windows + (not training and rest >= 2)
        check(
            self._n > 0,
            f"the corpus has {store.n_tokens} tokens and data.seq-len {seq_len} needs at least "
            f"{self.window if training else 2}; add text or make data.seq-len smaller",
        )
        self._store = store
        self._seq_len = seq_len
        self._bos_id = bos_id
        self._eos_id = eos_id
        self._sentinels = np.asarray(sentinels, np.int32)
        self._seed = seed
        self._density = density
        self._mean_length = mean_length

    def __len__(self) -> int:
        return self._n

    def batch(self, index: np.ndarray, epoch: np.ndarray | int = 0) -> Batch:
        """See `Examples`: `source_tokens`, `source_positions`, `source_segments` int32 [N, S], and the decoder's."""
        index = check_index(index, self._n)
        N, S, T = len(index), self._seq_len, self.target_len
        keys = row_keys(self._seed, SPANS, epoch, index)
        starts = np.maximum(index, 0) * self.window
        lengths = np.where(index < 0, 0, np.minimum(self.window, self._store.n_tokens - starts))
        windows = read_rows(self._store, starts, lengths, self.window)
        source, targets = np.zeros((N, S), np.int32), np.zeros((N, T), np.int32)
        source_lengths, target_lengths = np.zeros(N, np.int64), np.zeros(N, np.int64)
        for length in np.unique(lengths[lengths > 0]).tolist():  # one, but for an evaluation's last window
            (rows,) = np.nonzero(lengths == length)
            cut = noise_mask(length, keys[rows], density=self._density, mean_length=self._mean_length)
            for out, out_lengths, gone in ((source, source_lengths, cut), (targets, target_lengths, ~cut)):
                made = self._written(windows[rows, :length], gone)
                out[rows, : made.shape[1]] = made
                out_lengths[rows] = made.shape[1]
        tokens = np.zeros_like(targets)
        tokens[:, 1:] = targets[:, :-1]
        tokens[:, 0] = self._bos_id
        positions, segments = places(target_lengths, T)
        source_positions, source_segments = places(source_lengths, S)
        return {
            "source_tokens": source,
            "source_positions": source_positions,
            "source_segments": source_segments,
            "tokens": tokens * segments,
            "targets": targets,
            "weights": segments.astype(np.float32),
            "positions": positions,
            "segments": segments,
        }

    def documents(self, index: int) -> np.ndarray:
        """Documents that the window has tokens of."""
        start = int(check_index(np.array([index]), self._n)[0]) * self.window
        return documents_between(self._store, start, min(start + self.window, self._store.n_tokens))

    def _written(self, windows: np.ndarray, gone: np.ndarray) -> np.ndarray:
        """Windows [N, L] with a sentinel in place of each run that is `gone`, and the end: int32 [N, the same]."""
        first = gone.copy()
        first[:, 1:] &= ~gone[:, :-1]
        rank = np.cumsum(first, axis=1) - 1
        marked = np.where(first, self._sentinels[np.maximum(rank, 0)], windows)
        written = marked[first | ~gone].reshape(len(windows), -1)  # as many in each row
        return np.pad(written, ((0, 0), (0, 1)), constant_values=self._eos_id)


def n_sentinels(seq_len: int, *, density: float, mean_length: float) -> int:
    """How many sentinels `SpanExamples` needs. Raises `UserError` for a setting out of range."""
    check(seq_len >= 4, f"data.seq-len is {seq_len}; span corruption needs at least 4")
    check(0 < density < 1, f"task.density, the share of tokens cut out, is {density}; it must be between 0 and 1")
    check(mean_length >= 1, f"task.mean_span, the mean length of spans, is {mean_length}; it must be at least 1")
    length, _ = span_lengths(seq_len, density=density, mean_length=mean_length)
    return span_counts(length, density=density, mean_length=mean_length)[1]


class PrefixExamples:
    """Causal examples, the first part of each text a prefix that sees itself to both sides.

    Of a text (a segment; in a stream, the row) of n tokens, the first p are the prefix, 1 <= p < n, all equally
    likely; of a text of one token, that one. Targets inside the prefix are not scored, as the model sees them.

    Args:
      base: causal examples, each target the token after.
      seed: of the draws.
    """

    def __init__(self, base: Examples, seed: int):
        self._base = base
        self._seed = seed

    def __len__(self) -> int:
        return len(self._base)

    def batch(self, index: np.ndarray, epoch: np.ndarray | int = 0) -> Batch:
        """See `Examples`; adds `prefix` int32 [N, T]."""
        index = np.asarray(index, np.int64)
        rows = self._base.batch(index, epoch)
        real = real_tokens(rows, index)
        N, T = real.shape
        segments = rows["segments"] if "segments" in rows else real.astype(np.int32)
        n_texts = int(segments.max(initial=0))
        row = np.arange(N)[:, None]
        sizes = np.bincount((row * (n_texts + 1) + segments)[real], minlength=N * (n_texts + 1))
        sizes = sizes.reshape(N, n_texts + 1)[:, 1:]  # of each text
        firsts = np.cumsum(sizes, axis=1) - sizes
        splits = 1 + whole(uniform(row_keys(self._seed, PREFIXES, epoch, index), n_texts), sizes - 1)
        ends = firsts + np.minimum(splits, sizes)
        if n_texts == 0:
            return rows | {"prefix": np.zeros((N, T), np.int32)}
        end = ends[row, np.maximum(segments - 1, 0)]  # where the prefix of each place's text ends
        column = np.arange(T)
        return rows | {
            "prefix": (real & (column < end)).astype(np.int32),
            "weights": np.where(real & (column + 1 < end), 0, rows["weights"]).astype(np.float32),
        }

    def documents(self, index: int) -> np.ndarray:
        """See `Examples`."""
        return self._base.documents(index)
