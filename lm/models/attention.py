"""Attention: its masks and its implementations. The projections around it are in `lm.models.blocks`.

Axis letters, used all over this package:

    B batch   T query time   S key time   D embed   N heads   K key/value heads   G = N / K   H head dim
    F mlp     V vocab        L layers     E experts
"""

import functools
import logging
import math
from typing import Any

import jax
import jax.numpy as jnp

from lm.models.layers import spread

Array = jax.Array
log = logging.getLogger(__name__)

# Queries are cut into this many blocks, each against the keys up to its own end: the upper triangle that a full
# product would compute and throw away shrinks from 1/2 to 1/8 of the work.
QUERY_BLOCKS = 4

# Queries that go over the cache at once: a long prompt's scores exist for so many queries at a time, not for all.
CACHE_QUERIES = 256

# Added to a score that must not count: far below any score, and finite, so that a row of nothing else is not NaN.
MASKED = -1e30


def attention_mask(
    query_at: Array,
    key_at: Array,
    *,
    causal: bool,
    window: int | None,
    query_segments: Array | None = None,
    key_segments: Array | None = None,
    query_prefix: Array | None = None,
    key_prefix: Array | None = None,
) -> Array | None:
    """Which keys each query may see: bool `[B or 1, T, S]`, True = sees; None when all may see all.

    Args:
      query_at: int32 `[B or 1, T]`, the place of each query on the time axis (not its position embedding).
      key_at: int32 `[B or 1, S]`.
      causal: a query sees no later key.
      window: a query sees its own place and the `window - 1` before it (and, if not causal, as many after).
      query_segments: int32 `[B, T]`; with `key_segments` `[B, S]`, only equal segments see each other.
      key_segments: see `query_segments`.
      query_prefix: int32 `[B, T]`; with `key_prefix` `[B, S]`, causality does not bind those that both have a 1.
      key_prefix: see `query_prefix`.
    """
    allowed = []
    distance = query_at[:, :, None] - key_at[:, None, :]
    if causal and query_prefix is not None and key_prefix is not None:
        allowed.append((distance >= 0) | ((query_prefix[:, :, None] > 0) & (key_prefix[:, None, :] > 0)))
    elif causal:
        allowed.append(distance >= 0)
    if window is not None:
        allowed.append(jnp.abs(distance) < window)
    if query_segments is not None and key_segments is not None:
        allowed.append(query_segments[:, :, None] == key_segments[:, None, :])
    return functools.reduce(jnp.logical_and, allowed) if allowed else None


def source_mask(segments: Array | None, source_segments: Array | None) -> Array | None:
    """Which tokens of a source each token may see: bool `[B, T, S]`; None when all may see all.

    Args:
      segments: int32 `[B, T]`; None = every token belongs to every segment of its row's source.
      source_segments: int32 `[B, S]`, 0 = padding, which nobody sees; None = a source without padding, all of it seen.
    """
    if source_segments is None:
        return None
    there = source_segments[:, None, :] > 0
    return there if segments is None else there & (segments[:, :, None] == source_segments[:, None, :])


def softmax_attention(
    query: Array,
    key: Array,
    value: Array,
    mask: Array | None,
    *,
    bias: Array | None = None,
    scale: bool = True,
    softcap: float = 0.0,
    dropout_rate: float = 0.0,
    dropout_key: Array | None = None,
) -> Array:
    """Attention written out: `[B, T, N, H]`, `[B, S, K, H]` twice, bool `[B or 1, T, S]` to `[B, T, N, H]`.

    Scores and softmax are float32. `bias`, float32 `[B or 1, N, T, S]`, is added to the scores, which `scale` divides
    by the root of H before and `softcap` c bounds as `c * tanh(scores / c)` after (Gemma 2, arXiv:2408.00118); dropout
    acts on the probabilities.
    """
    query, key, value = heads_first(query, key, value)
    out = attend(query, key, value, mask, bias, scale, softcap, dropout_rate, dropout_key)
    return heads_last(out)


def probabilities(
    query: Array,
    key: Array,
    mask: Array | None,
    *,
    bias: Array | None = None,
    scale: bool = True,
    softcap: float = 0.0,
) -> Array:
    """The weights `softmax_attention` gives values before dropout: `[B, T, N, H]`, `[B, S, K, H]` to `[B, N, T, S]`.

    Float32; each row sums to 1, or is all 0 where a query may see nothing.
    """
    query, key, _ = heads_first(query, key, key)
    B, K, G, T, _ = query.shape
    scores = masked_scores(query, key, mask, bias, scale, softcap)
    weights = jax.nn.softmax(scores, axis=-1).reshape(B, K * G, T, key.shape[2])
    return weights if mask is None else jnp.where(mask[:, None], weights, 0.0)


def blocked_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    window: int | None,
    segments: Array | None,
    distance_bias: Array | None,
    scale: bool,
    softcap: float,
    dropout_rate: float,
    dropout_key: Array | None,
) -> Array:
    """Causal self-attention in query blocks, each against only the keys it can see; arguments as `self_attention`."""
    T = query.shape[1]
    query, key, value = heads_first(query, key, value)
    size = math.ceil(T / QUERY_BLOCKS)
    out = []
    for start in range(0, T, size):
        stop = min(start + size, T)
        first = 0 if window is None else max(0, start - window + 1)
        mask = attention_mask(
            jnp.arange(start, stop)[None],
            jnp.arange(first, stop)[None],
            causal=True,
            window=window,
            query_segments=None if segments is None else segments[:, start:stop],
            key_segments=None if segments is None else segments[:, first:stop],
        )
        # Of all distances, which are -(T - 1) to T - 1: those from the last query here to the first key, and back.
        bias = None
        if distance_bias is not None:
            bias = spread(distance_bias[:, first - stop + T : stop - start + T - 1], stop - start)
        block_key = None if dropout_key is None else jax.random.fold_in(dropout_key, start)
        keys, values = key[:, :, first:stop], value[:, :, first:stop]
        queries = query[:, :, :, start:stop]
        out.append(attend(queries, keys, values, mask, bias, scale, softcap, dropout_rate, block_key))
    return heads_last(jnp.concatenate(out, axis=3))


def cached_attention(
    query: Array,
    key: Array,
    value: Array,
    query_at: Array,
    *,
    window: int | None,
    prefix: Array | None = None,
    distance_bias: Array | None = None,
    scale: bool = True,
    softcap: float,
) -> Array:
    """Causal attention over a cache, `CACHE_QUERIES` queries at a time.

    Args:
      query: `[B, K, G, T, H]`.
      key: `[B, K, S, H]`, of all slots. Slots past a row's own end hold nothing yet; causality hides them.
      value: as `key`.
      query_at: int32 `[B, T]`, the slot of each query.
      window: see `attention_mask`.
      prefix: int32 `[B, T]`, 1 = sees all other queries here that have a 1; None = no query does.
      distance_bias: see `self_attention`; of at least S places.
      scale: divide scores by the root of H.
      softcap: bound on the scores, 0 = none.

    Returns:
      `[B, K, G, T, H]`.
    """
    B, K, G, T, H = query.shape
    S = key.shape[2]
    slots = jnp.arange(S)[None]
    key_prefix = None
    if prefix is not None:
        key_prefix = jnp.zeros((B, S), prefix.dtype).at[jnp.arange(B)[:, None], query_at].max(prefix)

    def block_of(block: tuple[Array, Array, Array | None]) -> Array:
        queries, at, in_prefix = block
        mask = attention_mask(at, slots, causal=True, window=window, query_prefix=in_prefix, key_prefix=key_prefix)
        bias = None
        if distance_bias is not None:
            zero = (distance_bias.shape[1] - 1) // 2
            bias = distance_bias[:, slots[:, None] - at[:, :, None] + zero].swapaxes(0, 1)
        return attend(queries, key, value, mask, bias, scale, softcap)

    count = math.ceil(T / CACHE_QUERIES)
    if count == 1:
        return block_of((query, query_at, prefix))
    size = math.ceil(T / count)
    fill = count * size - T  # queries of nothing, at slot 0; what they find is cut off again

    def blocks(places: Array) -> Array:
        return jnp.pad(places, ((0, 0), (0, fill))).reshape(B, count, size).transpose(1, 0, 2)

    query = jnp.pad(query, ((0, 0), (0, 0), (0, 0), (0, fill), (0, 0))).reshape(B, K, G, count, size, H)
    parts = query.transpose(3, 0, 1, 2, 4, 5), blocks(query_at), None if prefix is None else blocks(prefix)
    # A loop, one block after the other, so that the memory of one block serves all.
    out = jax.lax.map(block_of, parts)
    return out.transpose(1, 2, 3, 0, 4, 5).reshape(B, K, G, count * size, H)[:, :, :, :T]


def heads_first(query: Array, key: Array, value: Array) -> tuple[Array, Array, Array]:
    """`[B, T, N, H]`, `[B, S, K, H]` twice to `[B, K, G, T, H]`, `[B, K, S, H]` twice.

    The products then run over whole matrices of a head, in the order they lie in memory: on CPUs that takes 0.6 times
    what the same sums take with heads between time and features.
    """
    return queries_first(query, key.shape[2]), key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)


def queries_first(query: Array, kv_heads: int) -> Array:
    """`[B, T, N, H]` to `[B, K, G, T, H]`."""
    B, T, N, H = query.shape
    return query.reshape(B, T, kv_heads, N // kv_heads, H).transpose(0, 2, 3, 1, 4)


def heads_last(out: Array) -> Array:
    """`[B, K, G, T, H]` to `[B, T, N, H]`."""
    B, K, G, T, H = out.shape
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, K * G, H)


def masked_scores(
    query: Array, key: Array, mask: Array | None, bias: Array | None, scale: bool, softcap: float
) -> Array:
    """Float32 scores `[B, K, G, T, S]` of `[B, K, G, T, H]` and `[B, K, S, H]`, far below all others where masked."""
    B, K, G, T, H = query.shape
    S = key.shape[2]
    if scale:
        # Scaling queries, [T, H], is less work than scaling scores, [T, S].
        query = (query.astype(jnp.float32) / math.sqrt(H)).astype(query.dtype)
    # The queries of all heads that share a key head are rows of one matrix.
    rows = query.reshape(B, K, G * T, H)
    scores = jnp.einsum("BKRH,BKSH->BKRS", rows, key, preferred_element_type=jnp.float32).reshape(B, K, G, T, S)
    if bias is not None:
        scores = scores + bias.reshape(-1, K, G, T, S)
    if softcap:
        scores = softcap * jnp.tanh(scores / softcap)
    if mask is not None:
        # Added, not selected: the gradient then needs no mask, as weights of exactly 0 pass none on.
        scores = scores + jnp.where(mask, 0.0, MASKED)[:, None, None]
    return scores


def attend(
    query: Array,
    key: Array,
    value: Array,
    mask: Array | None,
    bias: Array | None,
    scale: bool,
    softcap: float,
    dropout_rate: float = 0.0,
    dropout_key: Array | None = None,
) -> Array:
    """`softmax_attention` with heads first: `[B, K, G, T, H]` and `[B, K, S, H]` twice to `[B, K, G, T, H]`."""
    B, K, G, T, H = query.shape
    S = key.shape[2]
    scores = masked_scores(query, key, mask, bias, scale, softcap)
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if dropout_rate > 0.0 and dropout_key is not None:
        keep = jax.random.bernoulli(dropout_key, 1.0 - dropout_rate, weights.shape)
        weights = jnp.where(keep, weights / (1.0 - dropout_rate), 0.0)
    rows = weights.astype(value.dtype).reshape(B, K, G * T, S)
    out = jnp.einsum("BKRS,BKSH->BKRH", rows, value, preferred_element_type=jnp.float32)
    # The sum divides the product with the values, [T, H], not the probabilities, [T, S].
    return (out.reshape(B, K, G, T, H) / total).astype(query.dtype)


@functools.cache
def _say_once(message: str) -> None:
    log.warning(message)


def choose_implementation(
    requested: str,
    *,
    platform: str,
    dtype: Any,
    length: int,
    head_dim: int,
    causal: bool,
    window: bool,
    segments: bool,
    prefix: bool,
    relative: bool,
    softcap: bool,
    dropout: bool,
) -> str:
    """The implementation that computes what was asked for: `xla`, `cudnn` or `blocked`.

    cuDNN's kernels know neither segments, prefixes, dropout of this kind nor a soft cap, are given no bias for relative
    positions, and take only half precision, even lengths (their gradient) and some head widths; the `xla` path of
    `jax.nn` has no dropout and no soft cap. Where the request can't serve, the nearest that can is taken and the reason
    logged once: a kernel that silently ignored a segment would train on leaked documents, and a run from a GPU is to be
    read on a laptop.
    """
    against_cudnn = {
        f"the platform {platform!r}": platform != "gpu",
        "float32": jnp.dtype(dtype).itemsize != 2,
        f"a length of {length}": length % 2 != 0,
        f"a head width of {head_dim}": head_dim % 8 != 0 or head_dim > 128,
        "a window to both sides": window and not causal,
        "segments": segments,
        "a prefix": prefix,
        "relative positions": relative,
        "soft cap": softcap,
        "dropout": dropout,
    }
    reasons = ", ".join(name for name, there in against_cudnn.items() if there)
    choice = "blocked" if (platform == "cpu" and causal) or softcap or dropout else "xla"
    if requested == "cudnn" or (requested == "auto" and platform == "gpu"):
        if not reasons:
            return "cudnn"
        _say_once(f"attention: cuDNN does not serve {reasons}; using the slower {choice!r} implementation")
        return choice
    if requested == "auto":
        return choice
    if requested == "xla" and (softcap or dropout):
        _say_once("attention: 'xla' has no soft cap and no dropout; using the 'blocked' implementation")
        return "blocked"
    return requested


def self_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    implementation: str = "auto",
    causal: bool = True,
    window: int | None = None,
    segments: Array | None = None,
    prefix: Array | None = None,
    distance_bias: Array | None = None,
    scale: bool = True,
    softcap: float = 0.0,
    dropout_rate: float = 0.0,
    dropout_key: Array | None = None,
) -> Array:
    """Self-attention by the chosen implementation.

    Args:
      query: `[B, T, N, H]`.
      key: `[B, T, K, H]`, N a multiple of K.
      value: `[B, T, K, H]`.
      implementation: `auto`, `xla`, `cudnn` or `blocked`.
      causal: a query sees no later key.
      window: see `attention_mask`.
      segments: int32 `[B, T]`, or None for a stream without documents to separate.
      prefix: int32 `[B, T]`, 1 = sees also the later tokens that have a 1; or None.
      distance_bias: float32 `[N, 2 T - 1]`, added to the scores by the distance from query to key, from `1 - T` on.
      scale: divide scores by the root of H.
      softcap: bound on the scores, 0 = none.
      dropout_rate: of the attention probabilities; needs `dropout_key`.
      dropout_key: a PRNG key, or None when not training.

    Returns:
      `[B, T, N, H]` in the query's dtype.
    """
    T = query.shape[1]
    dropout = dropout_rate > 0.0 and dropout_key is not None
    ordered = causal and prefix is None  # what kernels mean by causal
    choice = choose_implementation(
        implementation,
        platform=jax.default_backend(),
        dtype=query.dtype,
        length=T,
        head_dim=query.shape[-1],
        causal=ordered,
        window=window is not None,
        segments=segments is not None,
        prefix=prefix is not None,
        relative=distance_bias is not None,
        softcap=softcap > 0.0,
        dropout=dropout,
    )
    if choice == "blocked" and ordered:
        return blocked_attention(
            query,
            key,
            value,
            window=window,
            segments=segments,
            distance_bias=distance_bias,
            scale=scale,
            softcap=softcap,
            dropout_rate=dropout_rate,
            dropout_key=dropout_key,
        )
    bias = None if distance_bias is None else spread(distance_bias, T)
    if choice == "blocked":
        mask = self_mask(T, causal=causal, window=window, segments=segments, prefix=prefix)
        return softmax_attention(
            query,
            key,
            value,
            mask,
            bias=bias,
            scale=scale,
            softcap=softcap,
            dropout_rate=dropout_rate,
            dropout_key=dropout_key,
        )
    if prefix is None:
        mask = None if segments is None else segments[:, :, None] == segments[:, None, :]
        before = None if window is None else (window - 1, 0 if causal else window - 1)
    else:
        mask, before = self_mask(T, causal=causal, window=window, segments=segments, prefix=prefix), None
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        bias=bias,
        mask=None if mask is None else mask[:, None],
        scale=None if scale else 1.0,
        is_causal=ordered,
        local_window_size=before,
        implementation="cudnn" if choice == "cudnn" else "xla",
    )


def self_mask(
    length: int, *, causal: bool, window: int | None, segments: Array | None, prefix: Array | None
) -> Array | None:
    """`attention_mask` of a row with itself."""
    at = jnp.arange(length)[None]
    return attention_mask(
        at,
        at,
        causal=causal,
        window=window,
        query_segments=segments,
        key_segments=segments,
        query_prefix=prefix,
        key_prefix=prefix,
    )


def cross_attention(
    query: Array,
    key: Array,
    value: Array,
    mask: Array | None,
    *,
    implementation: str = "auto",
    scale: bool = True,
    softcap: float = 0.0,
    dropout_rate: float = 0.0,
    dropout_key: Array | None = None,
) -> Array:
    """Attention to another sequence by the chosen implementation; 0 for a query that may see nothing of it.

    Args:
      query: `[B, T, N, H]`.
      key: `[B, S, K, H]`, N a multiple of K.
      value: `[B, S, K, H]`.
      mask: bool `[B, T, S]` from `source_mask`, or None.
      implementation: `auto`, `xla`, `cudnn` or `blocked`.
      scale: divide scores by the root of H.
      softcap: bound on the scores, 0 = none.
      dropout_rate: of the attention probabilities; needs `dropout_key`.
      dropout_key: a PRNG key, or None when not training.

    Returns:
      `[B, T, N, H]` in the query's dtype.
    """
    choice = choose_implementation(
        implementation,
        platform=jax.default_backend(),
        dtype=query.dtype,
        length=max(query.shape[1], key.shape[1], key=lambda length: length % 2),  # an odd one, if there is one
        head_dim=query.shape[-1],
        causal=False,
        window=False,
        segments=mask is not None,
        prefix=False,
        relative=False,
        softcap=softcap > 0.0,
        dropout=dropout_rate > 0.0 and dropout_key is not None,
    )
    if choice == "blocked":
        out = softmax_attention(
            query,
            key,
            value,
            mask,
            scale=scale,
            softcap=softcap,
            dropout_rate=dropout_rate,
            dropout_key=dropout_key,
        )
    else:
        out = jax.nn.dot_product_attention(
            query,
            key,
            value,
            mask=None if mask is None else mask[:, None],
            scale=None if scale else 1.0,
            implementation="cudnn" if choice == "cudnn" else "xla",
        )
    return out if mask is None else only_where_seen(out, mask)


def only_where_seen(out: Array, mask: Array) -> Array:
    """`[B, T, N, H]` with 0 where a query may see no key: softmax over nothing is the mean of what is hidden."""
    return jnp.where(jnp.any(mask, axis=-1)[:, :, None, None], out, 0)
