"""Attention where the tokens of a row are split over devices, along the mesh axis `context`.

Each device has its own queries and, while it attends, the keys and values of the whole row, as in LLaMA 3's training
(arXiv:2407.21783, section 3.3.2). Causal rows lie in balanced order: cut into 2 C chunks for C devices, device c holds
chunks c and 2 C - 1 - c, so that all see equally many keys. A device then goes through pairs of a block of its queries
and a block of keys that these can see, with the running softmax of FlashAttention (arXiv:2205.14135), so that scores
exist for one pair at a time. All else stays in natural order and is attended to at once.

Axis letters as in `lm.models.attention`, and C devices, P pairs, R places of a block, X blocks of queries of a device,
Y blocks of keys.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from lm.models import attention
from lm.sharding import LENGTH_AXIS, axes_of, ways

Array = jax.Array

# Tokens of a block, at most.
BLOCK = 1024

_SPLIT = PartitionSpec(None, LENGTH_AXIS)


def parts(length: int) -> int:
    """Devices that share the tokens of a row of this length: 1 where there are no several, or they don't divide it."""
    devices = ways("length")
    return devices if length % devices == 0 else 1


def can_balance(length: int) -> bool:
    """Whether causal rows of this length are split, and cut into chunks for balanced order."""
    return parts(length) > 1 and length % (2 * parts(length)) == 0


def _mapped(function: Any, in_specs: Any, out_specs: Any, also: tuple[str, ...] = ()) -> Any:
    """`function` on what each device along the axis, and `also` others, has; the rest of them stay XLA's affair."""
    axes = {LENGTH_AXIS, *also}
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, axis_names=axes, check_vma=False)


def _moves(devices: int) -> list[list[tuple[int, int]]]:
    """Whence and whither even and odd chunks go from natural to balanced order: device c had chunks 2 c and 2 c + 1."""
    owner = [*range(devices), *reversed(range(devices))]
    return [[(chunk // 2, owner[chunk]) for chunk in range(first, 2 * devices, 2)] for first in (0, 1)]


def balance(x: Array) -> Array:
    """From natural to balanced order along the length: `[B, T, ...]` to the same."""
    even_moves, odd_moves = _moves(parts(x.shape[1]))

    def local(x: Array, number: Array) -> Array:
        even, odd = jnp.split(x, 2, axis=1)
        even = jax.lax.ppermute(even, LENGTH_AXIS, even_moves)
        odd = jax.lax.ppermute(odd, LENGTH_AXIS, odd_moves)
        first = number[0] % 2 == 0
        return jnp.concatenate([jnp.where(first, even, odd), jnp.where(first, odd, even)], axis=1)

    return _mapped(local, (_SPLIT, PartitionSpec(LENGTH_AXIS)), _SPLIT)(x, _numbers(x.shape[1]))


def restore(x: Array) -> Array:
    """From balanced order back to natural: `[B, T, ...]` to the same."""
    even_moves, odd_moves = ([(there, here) for here, there in moves] for moves in _moves(parts(x.shape[1])))

    def local(x: Array, number: Array) -> Array:
        low, high = jnp.split(x, 2, axis=1)
        first = number[0] % 2 == 0
        even = jax.lax.ppermute(jnp.where(first, low, high), LENGTH_AXIS, even_moves)
        odd = jax.lax.ppermute(jnp.where(first, high, low), LENGTH_AXIS, odd_moves)
        return jnp.concatenate([even, odd], axis=1)

    return _mapped(local, (_SPLIT, PartitionSpec(LENGTH_AXIS)), _SPLIT)(x, _numbers(x.shape[1]))


def _numbers(length: int) -> Array:
    """The number of each device along the axis."""
    return jnp.arange(parts(length), dtype=jnp.int32)


def _gather(x: Array) -> Array:
    return jax.lax.all_gather(x, LENGTH_AXIS, axis=1, tiled=True)


def gathered_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    causal: bool,
    window: int | None,
    segments: Array | None,
    prefix: Array | None,
    distance_bias: Array | None,
    scale: bool,
    softcap: float,
    dropout_rate: float,
    dropout_key: Array | None,
) -> Array:
    """Self-attention of rows in natural order; arguments as `lm.models.attention.self_attention`."""
    T = query.shape[1]
    at = jnp.arange(T, dtype=jnp.int32)

    def local(at, query, key, value, segments, prefix, distance_bias, dropout_key):
        mask = attention.attention_mask(
            at[None],
            jnp.arange(T, dtype=jnp.int32)[None],
            causal=causal,
            window=window,
            query_segments=segments,
            key_segments=None if segments is None else _gather(segments),
            query_prefix=prefix,
            key_prefix=None if prefix is None else _gather(prefix),
        )
        bias = None
        if distance_bias is not None:
            zero = (distance_bias.shape[1] - 1) // 2
            bias = distance_bias[:, jnp.arange(T) - at[:, None] + zero][None]
        if dropout_key is not None:
            dropout_key = jax.random.fold_in(dropout_key, at[0])
        return attention.softmax_attention(
            query,
            _gather(key),
            _gather(value),
            mask,
            bias=bias,
            scale=scale,
            softcap=softcap,
            dropout_rate=dropout_rate,
            dropout_key=dropout_key,
        )

    whole = PartitionSpec()
    specs = (PartitionSpec(LENGTH_AXIS), _SPLIT, _SPLIT, _SPLIT, _SPLIT, _SPLIT, whole, whole)
    return _mapped(local, specs, _SPLIT)(at, query, key, value, segments, prefix, distance_bias, dropout_key)


def cross_attention(
    query: Array,
    key: Array,
    value: Array,
    segments: Array | None,
    source_segments: Array | None,
    *,
    scale: bool,
    softcap: float,
    dropout_rate: float,
    dropout_key: Array | None,
) -> Array:
    """Attention of split rows to a source, split or whole; 0 for a query that may see nothing of it.

    Args:
      query: `[B, T, N, H]`.
      key: `[B, S, K, H]`.
      value: `[B, S, K, H]`.
      segments: int32 `[B, T]`, see `lm.models.attention.source_mask`.
      source_segments: int32 `[B, S]`.
      scale: divide scores by the root of H.
      softcap: bound on the scores, 0 = none.
      dropout_rate: of the attention probabilities; needs `dropout_key`.
      dropout_key: a PRNG key, or None when not training.

    Returns:
      `[B, T, N, H]` in the query's dtype.
    """
    split = parts(key.shape[1]) > 1

    def local(number, query, key, value, segments, source_segments, dropout_key):
        if split:
            key, value = _gather(key), _gather(value)
            source_segments = None if source_segments is None else _gather(source_segments)
        mask = attention.source_mask(segments, source_segments)
        if dropout_key is not None:
            dropout_key = jax.random.fold_in(dropout_key, number[0])
        out = attention.softmax_attention(
            query,
            key,
            value,
            mask,
            scale=scale,
            softcap=softcap,
            dropout_rate=dropout_rate,
            dropout_key=dropout_key,
        )
        return out if mask is None else attention.only_where_seen(out, mask)

    source = _SPLIT if split else PartitionSpec()
    specs = (PartitionSpec(LENGTH_AXIS), _SPLIT, source, source, _SPLIT, source, PartitionSpec())
    numbers = _numbers(query.shape[1])
    return _mapped(local, specs, _SPLIT)(numbers, query, key, value, segments, source_segments, dropout_key)


def balanced_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    window: int | None,
    segments: Array | None,
    scale: bool,
    softcap: float,
) -> Array:
    """Causal self-attention of rows in balanced order.

    Args:
      query: `[B, T, N, H]`.
      key: `[B, T, K, H]`, N a multiple of K.
      value: `[B, T, K, H]`.
      window: a query sees its own place and the `window - 1` before it; None = all.
      segments: int32 `[B, T]`, in balanced order as well; None = a stream without documents to separate.
      scale: divide scores by the root of H.
      softcap: bound on the scores, 0 = none.

    Returns:
      `[B, T, N, H]` in the query's dtype.
    """
    T = query.shape[1]
    C = parts(T)
    chunk = T // (2 * C)
    blocks = next(n for n in range(-(-chunk // BLOCK), chunk + 1) if chunk % n == 0)
    size = chunk // blocks
    options = _Options(size, window, scale, softcap)

    def in_blocks(x: Array) -> Array:
        """The device's own `[B, 2 chunk, ...]` to `[X, B, R, ...]`."""
        return jnp.moveaxis(x.reshape(x.shape[0], 2 * blocks, size, *x.shape[2:]), 1, 0)

    def natural_blocks(x: Array) -> Array:
        """`[B, 2 chunk, ...]` of each device to all `[Y, B, R, ...]` in natural order."""
        x = _gather(x).reshape(x.shape[0], C, 2, blocks, size, *x.shape[2:])
        x = jnp.concatenate([x[:, :, 0], x[:, ::-1, 1]], axis=1)
        return jnp.moveaxis(x.reshape(x.shape[0], 2 * C * blocks, size, *x.shape[4:]), 1, 0)

    def local(pairs, query, key, value, segments):
        B, _, N, H = query.shape
        K = key.shape[2]
        queries = in_blocks(query).reshape(2 * blocks, B, size, K, N // K, H).transpose(0, 1, 3, 4, 2, 5)
        keys, values = (natural_blocks(x).swapaxes(2, 3) for x in (key, value))
        own = None if segments is None else in_blocks(segments)
        theirs = None if segments is None else natural_blocks(segments)
        out = _attend_pairs(options, queries, keys, values, pairs[0], own, theirs)
        # [X, B, K, G, R, H] to [B, X, R, K, G, H]
        return out.transpose(1, 0, 4, 2, 3, 5).reshape(B, 2 * chunk, N, H)

    # Rows and heads have nothing to do with each other. XLA, left to itself, gathers the keys of all rows.
    rows, _, heads, _ = axes_of(("batch", "length", "activation_kv", None), key.shape)
    if heads != axes_of(("batch", "length", "activation_heads", None), query.shape)[2]:
        heads = ()
    of_heads, of_rows = PartitionSpec(rows, LENGTH_AXIS, heads), PartitionSpec(rows, LENGTH_AXIS)
    specs = (PartitionSpec(LENGTH_AXIS), of_heads, of_heads, of_heads, of_rows)
    pairs = jnp.asarray(pairs_of(C, blocks, size, window))
    return _mapped(local, specs, of_heads, (*rows, *heads))(pairs, query, key, value, segments)


@functools.cache
def pairs_of(devices: int, blocks: int, size: int, window: int | None) -> np.ndarray:
    """The pairs of blocks that each device goes through: int32 `[C, P, 4]`.

    Of a pair: the block of queries among the device's own, the same in natural order, the block of keys in natural
    order, and 1; or 0 where a device has fewer pairs than others (with a window, not without) and this one is none.

    Args:
      devices: C.
      blocks: of a chunk.
      size: tokens of a block.
      window: see `balanced_attention`.
    """
    found: list[list[tuple[int, int, int, int]]] = []
    for device in range(devices):
        pairs = []
        for half, chunk in enumerate((device, 2 * devices - 1 - device)):
            for block in range(blocks):
                at = chunk * blocks + block
                for keys in range(at + 1):
                    nearest = at * size - ((keys + 1) * size - 1)
                    if window is None or nearest < window:
                        pairs.append((half * blocks + block, at, keys, 1))
        found.append(pairs)
    longest = max(len(pairs) for pairs in found)
    return np.array([pairs + [(0, 0, 0, 0)] * (longest - len(pairs)) for pairs in found], np.int32)


@dataclass(frozen=True)
class _Options:
    """What of a block's attention is no array."""

    size: int
    window: int | None
    scale: bool
    softcap: float

    def mask(self, pair: Array, own: Array | None, theirs: Array | None) -> Array:
        """Which keys of a pair its queries may see: bool `[B or 1, R, R]`; segments are int32 `[X or Y, B, R]`."""
        index, at, keys, counts = pair
        inside = jnp.arange(self.size, dtype=jnp.int32)
        mask = attention.attention_mask(
            (at * self.size + inside)[None],
            (keys * self.size + inside)[None],
            causal=True,
            window=self.window,
            query_segments=None if own is None else own[index],
            key_segments=None if theirs is None else theirs[keys],
        )
        assert mask is not None
        return mask & (counts > 0)

    def scores(self, query: Array, key: Array, mask: Array) -> Array:
        """Float32 `[B, K, G, R, R]` of `[B, K, G, R, H]` and `[B, K, R, H]`."""
        return attention.masked_scores(query, key, mask, None, self.scale, self.softcap)


def _values(weights: Array, value: Array) -> Array:
    """Float32 `[B, K, G, R, H]` of weights `[B, K, G, R, S]` and values `[B, K, S, H]`."""
    return jnp.einsum("BKGRS,BKSH->BKGRH", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend_pairs(options: _Options, query, key, value, pairs, own, theirs) -> Array:
    """Attention by pairs.

    Args:
      options: settings.
      query: `[X, B, K, G, R, H]`.
      key: `[Y, B, K, R, H]`.
      value: as `key`.
      pairs: int32 `[P, 4]`, see `pairs_of`.
      own: segments int32 `[X, B, R]` or None.
      theirs: `[Y, B, R]` or None.

    Returns:
      `[X, B, K, G, R, H]` in the query's dtype.
    """
    return _attend_forward(options, query, key, value, pairs, own, theirs)[0]


def _attend_forward(options: _Options, query, key, value, pairs, own, theirs):
    def add(carry, pair):
        largest, total, out = carry
        index, keys = pair[0], pair[2]
        scores = options.scores(query[index], key[keys], options.mask(pair, own, theirs))
        before = largest[index]
        now = jnp.maximum(before, jnp.max(scores, axis=-1))
        shrink = jnp.exp(before - now)
        weights = jnp.exp(scores - now[..., None])
        return (
            largest.at[index].set(now),
            total.at[index].set(total[index] * shrink + jnp.sum(weights, axis=-1)),
            out.at[index].set(out[index] * shrink[..., None] + _values(weights, value[keys])),
        ), None

    rows = query.shape[:-1]
    start = (
        jnp.full(rows, attention.MASKED, jnp.float32),
        jnp.zeros(rows, jnp.float32),
        jnp.zeros(query.shape, jnp.float32),
    )
    # A block that hides all of itself adds weights of 1 to rows that have seen nothing yet; each row's first key that
    # counts, itself at the latest, shrinks them to nothing.
    (largest, total, out), _ = jax.lax.scan(add, start, pairs)
    out = out / total[..., None]
    log_total = largest + jnp.log(total)
    return out.astype(query.dtype), (query, key, value, pairs, own, theirs, out, log_total)


def _attend_backward(options: _Options, kept, cotangent):
    query, key, value, pairs, own, theirs, out, log_total = kept
    cotangent = cotangent.astype(jnp.float32)
    # The gradient of a softmax is what each weight would give, less what all give together.
    together = jnp.sum(cotangent * out, axis=-1)

    def add(carry, pair):
        query_grad, key_grad, value_grad = carry
        index, keys = pair[0], pair[2]
        mask = options.mask(pair, own, theirs)
        scores, pull = jax.vjp(lambda q, k: options.scores(q, k, mask), query[index], key[keys])
        weights = jnp.exp(scores - log_total[index][..., None])
        of_out = cotangent[index].astype(value.dtype)
        gives = jnp.einsum("BKGRH,BKSH->BKGRS", of_out, value[keys], preferred_element_type=jnp.float32)
        of_query, of_key = pull(weights * (gives - together[index][..., None]))
        of_value = jnp.einsum(
            "BKGRS,BKGRH->BKSH", weights.astype(value.dtype), of_out, preferred_element_type=jnp.float32
        )
        return (
            query_grad.at[index].add(of_query.astype(jnp.float32)),
            key_grad.at[keys].add(of_key.astype(jnp.float32)),
            value_grad.at[keys].add(of_value),
        ), None

    start = tuple(jnp.zeros(x.shape, jnp.float32) for x in (query, key, value))
    grads, _ = jax.lax.scan(add, start, pairs)
    return *(grad.astype(x.dtype) for grad, x in zip(grads, (query, key, value))), None, None, None


_attend_pairs.defvjp(_attend_forward, _attend_backward)
