"""What stands on top of the stack: the transform before the output head, pooling, classifier and span scores."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from lm.models.config import ModelConfig
from lm.models.layers import ACTIVATIONS, GATED, Dense, Norm, partitioned, scores

Array = jax.Array


class HeadTransform(nn.Module):
    """BERT's projection, activation and layer norm before the output head (arXiv:1810.04805, as published)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """`[..., D]` to `[..., D]`."""
        c = self.config
        dtype, param_dtype = jnp.dtype(c.compute_dtype), jnp.dtype(c.param_dtype)
        init = nn.initializers.normal(c.init_std)
        x = Dense((c.d_model,), ("embed", None), True, init, dtype, param_dtype, name="dense")(x)
        x = ACTIVATIONS[GATED.get(c.activation, c.activation)](x)
        return Norm("layernorm", c.norm_epsilon, True, dtype, param_dtype, name="norm")(x)


class Bias(nn.Module):
    """A bias on float32 scores, in a module of its own so that it changes no other parameter's initial value."""

    features: int
    axis: str | None
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Float32 `[..., features]` to the same."""
        init = partitioned(nn.initializers.zeros, (self.axis,))
        return x + self.param("bias", init, (self.features,), self.param_dtype).astype(jnp.float32)


class Classifier(nn.Module):
    """A linear map onto a few classes, with float32 scores."""

    n_classes: int
    init_std: float
    dtype: jnp.dtype
    param_dtype: jnp.dtype
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """`[..., D]` to float32 `[..., n_classes]`."""
        init = partitioned(nn.initializers.normal(self.init_std), ("embed", None))
        kernel = self.param("kernel", init, (x.shape[-1], self.n_classes), self.param_dtype)
        found = scores(x.astype(self.dtype), kernel.astype(self.dtype))
        if not self.use_bias:
            return found
        zeros = partitioned(nn.initializers.zeros, (None,))
        return found + self.param("bias", zeros, (self.n_classes,), self.param_dtype).astype(jnp.float32)


def pool(hidden: Array, segments: Array | None, kind: str) -> Array:
    """One vector for each row: its first token, its last, or the mean of all; `[B, T, D]` to `[B, D]`.

    Args:
      hidden: `[B, T, D]`.
      segments: int32 `[B, T]`, 0 = padding, which neither is last nor counts; None = no padding. Rows are not taken
        apart by segment: pack nothing that is to be pooled.
      kind: `first`, `last` or `mean`.
    """
    if kind == "first":
        return hidden[:, 0]
    there = jnp.ones(hidden.shape[:2], jnp.bool) if segments is None else segments > 0
    if kind == "last":
        last = jnp.max(jnp.where(there, jnp.arange(hidden.shape[1]), 0), axis=1)
        return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    total = jnp.sum(jnp.where(there[..., None], hidden.astype(jnp.float32), 0.0), axis=1)
    count = jnp.maximum(jnp.sum(there, axis=1), 1).astype(jnp.float32)
    return (total / count[:, None]).astype(hidden.dtype)
