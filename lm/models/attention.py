"""Attention: its masks, its implementations and the block of projections around it.

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
from flax import linen as nn

from lm.models.layers import Dense, Initializer, Norm, project_together, rotate
from lm.sharding import constrain

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
) -> Array | None:
    """Which keys each query may see: bool `[B or 1, T, S]`, True = sees; None when all may see all.

    Args:
      query_at: int32 `[B or 1, T]`, the place of each query on the time axis (not its position embedding).
      key_at: int32 `[B or 1, S]`.
      causal: a query sees no later key.
      window: a query sees its own place and the `window - 1` before it (and, if not causal, as many after).
      query_segments: int32 `[B, T]`; with `key_segments` `[B, S]`, only equal segments see each other.
    """
    allowed = []
    distance = query_at[:, :, None] - key_at[:, None, :]
    if causal:
        allowed.append(distance >= 0)
    if window is not None:
        allowed.append(jnp.abs(distance) < window)
    if query_segments is not None and key_segments is not None:
        allowed.append(query_segments[:, :, None] == key_segments[:, None, :])
    return functools.reduce(jnp.logical_and, allowed) if allowed else None


def softmax_attention(
    query: Array,
    key: Array,
    value: Array,
    mask: Array | None,
    *,
    softcap: float = 0.0,
    dropout_rate: float = 0.0,
    dropout_key: Array | None = None,
) -> Array:
    """Attention written out: `[B, T, N, H]`, `[B, S, K, H]` twice, bool `[B or 1, T, S]` to `[B, T, N, H]`.

    Scores and softmax are float32. `softcap` c bounds scores as `c * tanh(scores / c)` (Gemma 2, arXiv:2408.00118);
    dropout acts on the probabilities.
    """
    query, key, value = _heads_first(query, key, value)
    out = _attend(query, key, value, mask, softcap, dropout_rate, dropout_key)
    return _heads_last(out)


def blocked_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    window: int | None,
    segments: Array | None,
    softcap: float,
    dropout_rate: float,
    dropout_key: Array | None,
) -> Array:
    """Causal self-attention in query blocks, each against only the keys it can see; shapes as `softmax_attention`."""
    T = query.shape[1]
    query, key, value = _heads_first(query, key, value)
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
        block_key = None if dropout_key is None else jax.random.fold_in(dropout_key, start)
        keys, values = key[:, :, first:stop], value[:, :, first:stop]
        out.append(_attend(query[:, :, :, start:stop], keys, values, mask, softcap, dropout_rate, block_key))
    return _heads_last(jnp.concatenate(out, axis=3))


def cached_attention(
    query: Array, key: Array, value: Array, query_at: Array, *, window: int | None, softcap: float
) -> Array:
    """Attention over a cache, `CACHE_QUERIES` queries at a time.

    Args:
      query: `[B, K, G, T, H]`.
      key: `[B, K, S, H]`, of all slots. Slots past a row's own end hold nothing yet; causality hides them.
      value: as `key`.
      query_at: int32 `[B, T]`, the slot of each query.
      window: see `attention_mask`.
      softcap: bound on the scores, 0 = none.

    Returns:
      `[B, K, G, T, H]`.
    """
    slots = jnp.arange(key.shape[2])[None]

    def attend(block: tuple[Array, Array]) -> Array:
        queries, at = block
        return _attend(queries, key, value, attention_mask(at, slots, causal=True, window=window), softcap)

    B, K, G, T, H = query.shape
    count = math.ceil(T / CACHE_QUERIES)
    if count == 1:
        return attend((query, query_at))
    size = math.ceil(T / count)
    fill = count * size - T  # queries of nothing, at slot 0; what they find is cut off again
    query = jnp.pad(query, ((0, 0), (0, 0), (0, 0), (0, fill), (0, 0))).reshape(B, K, G, count, size, H)
    query_at = jnp.pad(query_at, ((0, 0), (0, fill))).reshape(B, count, size)
    # A loop, one block after the other, so that the memory of one block serves all.
    out = jax.lax.map(attend, (query.transpose(3, 0, 1, 2, 4, 5), query_at.transpose(1, 0, 2)))
    return out.transpose(1, 2, 3, 0, 4, 5).reshape(B, K, G, count * size, H)[:, :, :, :T]


def _heads_first(query: Array, key: Array, value: Array) -> tuple[Array, Array, Array]:
    """`[B, T, N, H]`, `[B, S, K, H]` twice to `[B, K, G, T, H]`, `[B, K, S, H]` twice.

    The products then run over whole matrices of a head, in the order they lie in memory: on CPUs that takes 0.6 times
    what the same sums take with heads between time and features.
    """
    B, T, N, H = query.shape
    K = key.shape[2]
    query = query.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    return query, key.transpose(0, 2, 1, 3), value.transpose(0, 2, 1, 3)


def _heads_last(out: Array) -> Array:
    """`[B, K, G, T, H]` to `[B, T, N, H]`."""
    B, K, G, T, H = out.shape
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, K * G, H)


def _attend(
    query: Array,
    key: Array,
    value: Array,
    mask: Array | None,
    softcap: float,
    dropout_rate: float = 0.0,
    dropout_key: Array | None = None,
) -> Array:
    """`softmax_attention` with heads first: `[B, K, G, T, H]` and `[B, K, S, H]` twice to `[B, K, G, T, H]`."""
    B, K, G, T, H = query.shape
    S = key.shape[2]
    # Scaling queries, [T, H], is less work than scaling scores, [T, S].
    query = (query.astype(jnp.float32) / math.sqrt(H)).astype(query.dtype)
    # The queries of all heads that share a key head are rows of one matrix.
    rows = query.reshape(B, K, G * T, H)
    scores = jnp.einsum("BKRH,BKSH->BKRS", rows, key, preferred_element_type=jnp.float32).reshape(B, K, G, T, S)
    if softcap:
        scores = softcap * jnp.tanh(scores / softcap)
    if mask is not None:
        # Added, not selected: the gradient then needs no mask, as weights of exactly 0 pass none on.
        scores = scores + jnp.where(mask, 0.0, MASKED)[:, None, None]
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
    softcap: bool,
    dropout: bool,
) -> str:
    """The implementation that computes what was asked for: `xla`, `cudnn` or `blocked`.

    cuDNN's kernels know neither segments, dropout of this kind nor a soft cap, and take only half precision, even
    lengths (their gradient) and some head widths; the `xla` path of `jax.nn` has no dropout and no soft cap. Where
    the request can't serve, the nearest that can is taken and the reason logged once: a kernel that silently ignored
    a segment would train on leaked documents, and a run from a GPU is to be read on a laptop.
    """
    against_cudnn = {
        f"the platform {platform!r}": platform != "gpu",
        "float32": jnp.dtype(dtype).itemsize != 2,
        f"a length of {length}": length % 2 != 0,
        f"a head width of {head_dim}": head_dim % 8 != 0 or head_dim > 128,
        "a window to both sides": window and not causal,
        "segments": segments,
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
      softcap: bound on the scores, 0 = none.
      dropout_rate: of the attention probabilities; needs `dropout_key`.
      dropout_key: a PRNG key, or None when not training.

    Returns:
      `[B, T, N, H]` in the query's dtype.
    """
    dropout = dropout_rate > 0.0 and dropout_key is not None
    choice = choose_implementation(
        implementation,
        platform=jax.default_backend(),
        dtype=query.dtype,
        length=query.shape[1],
        head_dim=query.shape[-1],
        causal=causal,
        window=window is not None,
        segments=segments is not None,
        softcap=softcap > 0.0,
        dropout=dropout,
    )
    if choice == "blocked":
        if causal:
            attend = functools.partial(blocked_attention, window=window, segments=segments)
        else:
            at = jnp.arange(query.shape[1])[None]
            mask = attention_mask(at, at, causal=False, window=window, query_segments=segments, key_segments=segments)
            attend = functools.partial(softmax_attention, mask=mask)
        return attend(query, key, value, softcap=softcap, dropout_rate=dropout_rate, dropout_key=dropout_key)
    mask = None if segments is None else (segments[:, :, None] == segments[:, None, :])[:, None]
    before = None if window is None else (window - 1, 0 if causal else window - 1)
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        mask=mask,
        is_causal=causal,
        local_window_size=before,
        implementation="cudnn" if choice == "cudnn" else "xla",
    )


class Attention(nn.Module):
    """Query, key, value and output projections around `self_attention`, or around a cache while decoding."""

    n_heads: int
    n_kv_heads: int
    head_dim: int
    use_bias: bool
    qk_norm: bool
    norm_epsilon: float
    implementation: str
    causal: bool
    window: int | None
    softcap: float
    dropout_rate: float
    kernel_init: Initializer
    out_init: Initializer
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(
        self,
        x: Array,
        segments: Array | None,
        angles: tuple[Array, Array] | None,
        cache: dict[str, Array] | None,
        cache_at: Array | None,
        deterministic: bool,
    ) -> tuple[Array, dict[str, Array] | None]:
        """Attends over `x` `[B, T, D]`, or over the cache once `x` is written into it.

        Args:
          x: `[B, T, D]`.
          segments: int32 `[B, T]` or None.
          angles: rotary cosines and sines, or None.
          cache: `key` and `value`, `[B, K, S, H]` each, or None when not decoding.
          cache_at: int32 `[B, T]`, the cache slot of each token; equal to its place in the sequence.
          deterministic: no dropout.

        Returns:
          `[B, T, D]`, and the cache with the new keys and values.
        """

        def project(name: str, heads: int, axis: str) -> Dense:
            features, axes = (heads, self.head_dim), ("embed", axis, "head_dim")
            return Dense(features, axes, self.use_bias, self.kernel_init, self.dtype, self.param_dtype, name=name)

        query, key, value = project_together(
            x,
            project("query", self.n_heads, "heads"),
            project("key", self.n_kv_heads, "kv"),
            project("value", self.n_kv_heads, "kv"),
        )
        if self.qk_norm:
            norm = functools.partial(Norm, "rmsnorm", self.norm_epsilon, False, self.dtype, self.param_dtype)
            query, key = norm(name="query_norm")(query), norm(name="key_norm")(key)
        if angles is not None:
            query, key = rotate(query, angles), rotate(key, angles)
        query = constrain(query, "batch", "length", "activation_heads", None)
        key = constrain(key, "batch", "length", "activation_kv", None)
        value = constrain(value, "batch", "length", "activation_kv", None)

        if cache is None:
            dropout_key = None if deterministic or self.dropout_rate == 0.0 else self.make_rng("dropout")
            out = self_attention(
                query,
                key,
                value,
                implementation=self.implementation,
                causal=self.causal,
                window=self.window,
                segments=segments,
                softcap=self.softcap,
                dropout_rate=self.dropout_rate,
                dropout_key=dropout_key,
            )
        else:
            assert cache_at is not None
            query, key, value = _heads_first(query, key, value)
            at = (jnp.arange(x.shape[0])[:, None, None], jnp.arange(self.n_kv_heads)[:, None], cache_at[:, None])
            cache = {
                "key": cache["key"].at[at].set(key.astype(cache["key"].dtype)),
                "value": cache["value"].at[at].set(value.astype(cache["value"].dtype)),
            }
            keys, values = cache["key"].astype(self.dtype), cache["value"].astype(self.dtype)
            attend = functools.partial(cached_attention, window=self.window, softcap=self.softcap)
            out = _heads_last(attend(query, keys, values, cache_at))
        dense = Dense(
            (x.shape[-1],),
            ("heads", "head_dim", "embed"),
            self.use_bias,
            self.out_init,
            self.dtype,
            self.param_dtype,
            n_in=2,
            name="out",
        )
        return dense(out), cache
