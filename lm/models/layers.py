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
from flax import struct

from lm.models.lora import OFF, LoraConfig
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


@struct.dataclass
class Weights:
    """What a projection multiplies with, as matrices in the compute dtype."""

    kernel: Array
    """`[in, out]`."""
    bias: Array | None
    """`[out]`."""
    low_rank: tuple[Array, Array] | None
    """`[in, r]` and, scaled, `[r, out]`: a term beside the kernel, which is never added to it here."""


def project(rows: Array, weights: Weights, low_rank_rows: Array) -> Array:
    """`rows @ kernel + bias`, and with a low-rank term `low_rank_rows @ A @ B`: `[..., in]` twice to `[..., out]`."""
    y = rows @ weights.kernel
    if weights.bias is not None:
        y = y + weights.bias
    return add_low_rank(y, weights, low_rank_rows)


def add_low_rank(y: Array, weights: Weights, rows: Array) -> Array:
    """`y` `[..., out]` and what the low-rank term, if there is one, makes of `rows` `[..., in]`."""
    if weights.low_rank is None:
        return y
    a, b = weights.low_rank
    return y + (rows @ a) @ b


def as_rows(x: Array, n_in: int = 1) -> Array:
    """`[..., *in]` with its trailing `n_in` axes as one, and all others as one too: `[rows, in]`.

    Where the length is split over devices the others stay: rows of a batch and parts of them, joined to one axis, are
    in no order that devices could share.
    """
    lead, width = x.shape[:-n_in], math.prod(x.shape[-n_in:])
    return x.reshape(*(lead if is_split("residual_length") else (math.prod(lead),)), width)


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
    lora: LoraConfig = OFF

    @nn.compact
    def weights(self, in_shape: tuple[int, ...]) -> Weights:
        """The parameters, for inputs of this shape."""
        init = partitioned(self.kernel_init, self.axes)
        kernel = self.param("kernel", init, (*in_shape, *self.features), self.param_dtype).astype(self.dtype)
        bias = None
        if self.use_bias:
            init = partitioned(nn.initializers.zeros, self.axes[self.n_in :])
            bias = self.param("bias", init, self.features, self.param_dtype).astype(self.dtype).reshape(-1)
        low_rank = None
        if rank := self.lora.rank:
            # As the authors' code draws A: uniform in +-1 / sqrt(in). B is 0, so that training begins with the base.
            a_init = nn.initializers.variance_scaling(
                1 / 3, "fan_in", "uniform", in_axis=range(len(in_shape)), out_axis=-1
            )
            a = Factor((*in_shape, rank), (*self.axes[: self.n_in], None), a_init, name="lora_a")()
            b = Factor((rank, *self.features), (None, *self.axes[self.n_in :]), nn.initializers.zeros, name="lora_b")()
            b = b * self.lora.scale
            low_rank = (a.reshape(-1, rank).astype(self.dtype), b.reshape(rank, -1).astype(self.dtype))
        return Weights(kernel.reshape(math.prod(in_shape), math.prod(self.features)), bias, low_rank)

    def low_rank_rows(self, rows: Array, deterministic: bool) -> Array:
        """What the low-rank term reads: `rows` after dropout."""
        rate = self.lora.dropout
        if not self.lora.rank or rate == 0.0 or deterministic:
            return rows
        keep = jax.random.bernoulli(self.make_rng("dropout"), 1.0 - rate, rows.shape)
        return jnp.where(keep, rows / (1.0 - rate), 0.0).astype(rows.dtype)

    def __call__(self, x: Array, deterministic: bool = True) -> Array:
        """`[..., *in]` to `[..., *features]`."""
        lead, in_shape = x.shape[: -self.n_in], x.shape[-self.n_in :]
        weights = self.weights(in_shape)
        rows = as_rows(x.astype(self.dtype), self.n_in)
        y = project(rows, weights, self.low_rank_rows(rows, deterministic))
        return y.reshape(*lead, *self.features)


class Factor(nn.Module):
    """One of the two matrices of a low-rank term, float32 whatever the precision of the base is."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    kernel_init: Initializer

    @nn.compact
    def __call__(self) -> Array:
        """The matrix."""
        return self.param("kernel", partitioned(self.kernel_init, self.axes), self.shape, jnp.float32)


def project_together(x: Array, *projections: Dense, deterministic: bool = True) -> list[Array]:
    """`[projection(x) for projection in projections]` as one matrix product, which is faster than several.

    Where features are split over devices the products stay apart: joining split matrices would move them around.
    """
    if is_split("heads"):
        return [projection(x, deterministic) for projection in projections]
    weights = [projection.weights(x.shape[-1:]) for projection in projections]
    first = projections[0]
    rows = as_rows(x.astype(first.dtype))
    y = rows @ jnp.concatenate([one.kernel for one in weights], axis=1)
    if first.use_bias:
        y = y + jnp.concatenate([one.bias for one in weights if one.bias is not None])
    ends = itertools.accumulate(one.kernel.shape[1] for one in weights)
    parts = [
        add_low_rank(part, one, projection.low_rank_rows(rows, deterministic))
        for part, one, projection in zip(jnp.split(y, list(ends)[:-1], axis=-1), weights, projections)
    ]
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
    out = jnp.matmul(as_rows(x), kernel, preferred_element_type=jnp.float32)
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
    lora: LoraConfig = OFF
    path: str = "mlp"

    @nn.compact
    def __call__(self, x: Array, deterministic: bool = True) -> Array:
        """`[B, T, D]` to `[B, T, D]`."""

        x = constrain(x, "batch", "length", None)

        def dense(name: str, x: Array, features: int, axes: tuple[str, str], init: Initializer) -> Array:
            lora = self.lora.at(f"{self.path}/{name}")
            made = Dense((features,), axes, self.use_bias, init, self.dtype, self.param_dtype, lora=lora, name=name)
            return made(x, deterministic)

        hidden = dense("up", x, self.d_ff, ("embed", "mlp"), self.kernel_init)
        if self.activation in GATED:
            gate = dense("gate", x, self.d_ff, ("embed", "mlp"), self.kernel_init)
            hidden = ACTIVATIONS[GATED[self.activation]](gate) * hidden
        else:
            hidden = ACTIVATIONS[self.activation](hidden)
        hidden = constrain(hidden, "batch", "length", "activation_mlp")
        return dense("down", hidden, x.shape[-1], ("mlp", "embed"), self.out_init)


class Adapter(nn.Module):
    """A bottleneck with a residual sum, `x + up(gelu(down(x)))` (arXiv:1902.00751, figure 2); float32 parameters.

    `up` is 0 at first, so that training begins with the model as it was.
    """

    width: int
    kernel_init: Initializer
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """`[B, T, D]` to `[B, T, D]`."""
        f32 = jnp.dtype("float32")
        down = Dense((self.width,), ("embed", None), True, self.kernel_init, self.dtype, f32, name="down")
        zeros = nn.initializers.zeros
        up = Dense((x.shape[-1],), (None, "embed"), True, zeros, self.dtype, f32, name="up")
        return x + up(ACTIVATIONS["gelu"](down(x)))


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
