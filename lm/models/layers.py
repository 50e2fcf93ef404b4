"""Projections, norms, embeddings, positions and the feed-forward block.

Every matrix is a parameter named `kernel`, every table `embedding`, every norm `scale`, every offset `bias`, each in a
submodule of its own: an added parameter then leaves the random keys, and so the initial values, of the others alone.
Axis letters are explained once, in `lm.models.attention`.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from lm.sharding import constrain, is_split

Array = jax.Array
Initializer = Callable[..., Any]

GATED = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh"}
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "silu": jax.nn.silu,
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
}


def partitioned(init: Initializer, names: Sequence[str | None]) -> Initializer:
    """`init` with logical axis names attached to what it returns."""
    return nn.with_logical_partitioning(init, tuple(names))


class Dense(nn.Module):
    """A linear map over the trailing `n_in` axes of its input, onto `features`.

    The product runs as one matrix product `[rows, in] @ [in, out]`: on CPUs XLA multiplies a batch of matrices
    `[B, T, in]` far slower than the same numbers laid out as rows.
    """

    features: tuple[int, ...]
    axes: tuple[str | None, ...]  # logical names of the kernel's axes: inputs, then features
    use_bias: bool
    kernel_init: Initializer
    dtype: jnp.dtype
    param_dtype: jnp.dtype
    n_in: int = 1

    @nn.compact
    def weights(self, in_shape: tuple[int, ...]) -> tuple[Array, Array | None]:
        """The kernel as a matrix `[in, out]` and the bias `[out]`, in the compute dtype."""
        init = partitioned(self.kernel_init, self.axes)
        kernel = self.param("kernel", init, (*in_shape, *self.features), self.param_dtype).astype(self.dtype)
        bias = None
        if self.use_bias:
            init = partitioned(nn.initializers.zeros, self.axes[self.n_in :])
            bias = self.param("bias", init, self.features, self.param_dtype).astype(self.dtype).reshape(-1)
        return kernel.reshape(math.prod(in_shape), math.prod(self.features)), bias

    def __call__(self, x: Array) -> Array:
        """`[..., *in]` to `[..., *features]`."""
        lead, in_shape = x.shape[: -self.n_in], x.shape[-self.n_in :]
        kernel, bias = self.weights(in_shape)
        y = x.astype(self.dtype).reshape(math.prod(lead), math.prod(in_shape)) @ kernel
        if bias is not None:
            y = y + bias
        return y.reshape(*lead, *self.features)


def project_together(x: Array, *projections: Dense) -> list[Array]:
    """`[projection(x) for projection in projections]` as one matrix product, which is faster than several.

    Where features are split over devices the products stay apart: joining split matrices would move them around.
    """
    if is_split("heads"):
        return [projection(x) for projection in projections]
    kernels, biases = zip(*(projection.weights(x.shape[-1:]) for projection in projections))
    first = projections[0]
    y = x.astype(first.dtype).reshape(-1, x.shape[-1]) @ jnp.concatenate(kernels, axis=1)
    if first.use_bias:
        y = y + jnp.concatenate(biases)
    ends = itertools.accumulate(kernel.shape[1] for kernel in kernels)
    parts = jnp.split(y, list(ends)[:-1], axis=1)
    return [part.reshape(*x.shape[:-1], *projection.features) for part, projection in zip(parts, projections)]


class Norm(nn.Module):
    """Layer norm (arXiv:1607.06450) or RMS norm (arXiv:1910.07467) over the last axis, computed in float32."""

    kind: str
    epsilon: float
    use_bias: bool
    dtype: jnp.dtype
    param_dtype: jnp.dtype
    axis: str = "norm"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Same shape as `x`, in the compute dtype."""
        dim = x.shape[-1]
        scale = self.param("scale", partitioned(nn.initializers.ones, (self.axis,)), (dim,), self.param_dtype)
        x = x.astype(jnp.float32)
        if self.kind == "layernorm":
            x = x - jnp.mean(x, axis=-1, keepdims=True)
        # Of centred values the mean square is the variance, without the cancellation of E[x^2] - E[x]^2.
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        x = x * scale.astype(jnp.float32)
        if self.use_bias and self.kind == "layernorm":
            bias = self.param("bias", partitioned(nn.initializers.zeros, (self.axis,)), (dim,), self.param_dtype)
            x = x + bias.astype(jnp.float32)
        return x.astype(self.dtype)


class Embed(nn.Module):
    """A table of vectors, `[rows, D]`, read by index."""

    rows: int
    features: int
    axes: tuple[str | None, str | None]
    table_init: Initializer
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    def setup(self) -> None:
        """Declares the table."""
        shape = (self.rows, self.features)
        self.embedding = self.param("embedding", partitioned(self.table_init, self.axes), shape, self.param_dtype)

    def __call__(self, ids: Array) -> Array:
        """int32 `[...]` to `[..., D]`."""
        # Rows are looked up whole: a table split along its features would have to be put together after the lookup.
        table = constrain(self.embedding, self.axes[0], None)
        return jnp.take(table, ids, axis=0).astype(self.dtype)

    def attend(self, x: Array) -> Array:
        """`[..., D]` to float32 scores `[..., rows]`: the output head that shares this table."""
        return scores(x, self.embedding.astype(self.dtype).T)


def scores(x: Array, kernel: Array) -> Array:
    """`[..., D] @ [D, V]`, operands in their own dtype, accumulated and returned in float32."""
    rows = x.reshape(-1, x.shape[-1])
    out = jax.lax.dot(rows, kernel, preferred_element_type=jnp.float32)
    return out.reshape(*x.shape[:-1], kernel.shape[-1])


class Head(nn.Module):
    """An output head with a matrix of its own, `[D, V]`."""

    vocab_size: int
    kernel_init: Initializer
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """`[..., D]` to float32 scores `[..., V]`."""
        init = partitioned(self.kernel_init, ("embed", "vocab"))
        kernel = self.param("kernel", init, (x.shape[-1], self.vocab_size), self.param_dtype)
        return scores(x, kernel.astype(self.dtype))


class Mlp(nn.Module):
    """Two projections around an activation, or the gated form `down(act(gate(x)) * up(x))` (arXiv:2002.05202)."""

    d_ff: int
    activation: str
    use_bias: bool
    kernel_init: Initializer
    out_init: Initializer
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """`[B, T, D]` to `[B, T, D]`."""

        def project(name: str, features: int, axes: tuple[str, str], init: Initializer) -> Dense:
            return Dense((features,), axes, self.use_bias, init, self.dtype, self.param_dtype, name=name)

        hidden = project("up", self.d_ff, ("embed", "mlp"), self.kernel_init)(x)
        if self.activation in GATED:
            gate = project("gate", self.d_ff, ("embed", "mlp"), self.kernel_init)(x)
            hidden = ACTIVATIONS[GATED[self.activation]](gate) * hidden
        else:
            hidden = ACTIVATIONS[self.activation](hidden)
        hidden = constrain(hidden, "batch", "length", "activation_mlp")
        return project("down", x.shape[-1], ("mlp", "embed"), self.out_init)(hidden)


def sinusoidal(positions: Array, d_model: int) -> Array:
    """Fixed position vectors (arXiv:1706.03762, section 3.5): int32 `[B, T]` to float32 `[B, T, D]`.

    Sines fill the even and cosines the odd features, as in the paper.
    """
    rates = jnp.exp(jnp.arange(0, d_model, 2, dtype=jnp.float32) * (-math.log(10_000.0) / d_model))
    angles = positions[..., None].astype(jnp.float32) * rates
    return jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1).reshape(*positions.shape, -1)[..., :d_model]


def stretched(rates: Array, factor: float, low: float, high: float, original_len: int) -> Array:
    """LLaMA 3.1's rates, for texts `factor` times as long (arXiv:2407.21783): float32 `[H/2]` to the same.

    Pairs that turn at least `high` times within `original_len` positions keep their rate, those that turn at most `low`
    times are slowed by `factor`, and in between the share that is kept grows with the turns.
    """
    turns = original_len * rates / (2 * math.pi)
    kept = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return rates * (kept + (1 - kept) / factor)


def rotary_angles(
    positions: Array, head_dim: int, theta: float, scaling: Callable[[Array], Array] = lambda rates: rates
) -> tuple[Array, Array]:
    """Cosines and sines for `rotate`: int32 `[B, T]` to two float32 `[B, T, 1, H/2]`.

    From each position to the next a pair of features turns by its rate; `scaling` changes the rates, float32 `[H/2]`.
    """
    rates = scaling(theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim))
    angles = positions[..., None, None].astype(jnp.float32) * rates
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Array, angles: tuple[Array, Array]) -> Array:
    """Rotary positions (arXiv:2104.09864) on `[B, T, N, H]`.

    Feature i turns with feature i + H/2, the layout of LLaMA weights as Hugging Face stores them; the paper's
    interleaved pairs are a permutation of it.
    """
    cos, sin = angles
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


class RelativeBias(nn.Module):
    """T5's relative positions (arXiv:1910.10683, section 2.1): what each head adds to a score, by distance."""

    buckets: int
    max_distance: int
    n_heads: int
    both_sides: bool
    table_init: Initializer
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, reach: int) -> Array:
        """Float32 `[N, 2 reach - 1]`: the bias of distances `1 - reach` to `reach - 1`, from query to key."""
        init = partitioned(self.table_init, (None, "heads"))
        table = self.param("embedding", init, (self.buckets, self.n_heads), self.param_dtype)
        bucket = distance_buckets(np.arange(1 - reach, reach), self.buckets, self.max_distance, self.both_sides)
        return jnp.take(table, bucket, axis=0).astype(jnp.float32).T


def distance_buckets(distance: np.ndarray, buckets: int, max_distance: int, both_sides: bool) -> np.ndarray:
    """The row of T5's table for each distance (key place minus query place), int32, same shape.

    Half of the rows are for one distance each, the others for ranges that grow as the logarithm does, the last for
    `max_distance` and all beyond. Where tokens see both sides, later keys have rows of their own.
    """
    away, first = (np.abs(distance), np.where(distance > 0, buckets // 2, 0)) if both_sides else (-distance, 0)
    rows = buckets // 2 if both_sides else buckets
    away = np.maximum(away, 0)
    exact = rows // 2
    # In float32, as the published models were trained: the edges of some ranges lie on what is rounded.
    ratio = np.log(np.maximum(away, 1).astype(np.float32) / np.float32(exact)) / np.float32(
        math.log(max_distance / exact)
    )
    ranged = exact + (ratio * np.float32(rows - exact)).astype(np.int32)
    return (first + np.where(away < exact, away, np.minimum(ranged, rows - 1))).astype(np.int32)


def spread(by_distance: Array, rows: int) -> Array:
    """Values of distances as a matrix of queries and keys: `[N, rows + columns - 1]` to `[1, N, rows, columns]`.

    Entry `[t, s]` is that of distance `s - t`; the first is that of the last row to the first column. Made of copies
    only, laid side by side so that each row starts one entry earlier: a lookup's gradient would be a slow scatter.
    """
    N, length = by_distance.shape
    padded = jnp.pad(by_distance, ((0, 0), (0, 1)))
    copies = jnp.broadcast_to(padded[:, None], (N, rows, length + 1)).reshape(N, -1)
    shifted = copies[:, rows - 1 : rows - 1 + rows * length].reshape(1, N, rows, length)
    return shifted[..., : length - rows + 1]
