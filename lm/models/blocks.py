"""A layer of the Transformer: attention with its projections, attention to a source, feed-forward."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from lm.models import attention, split_attention
from lm.models.config import ModelConfig
from lm.models.layers import Adapter, Dense, Initializer, Mlp, Norm, project_together, rotate
from lm.models.lora import OFF, LoraConfig
from lm.sharding import constrain

Array = jax.Array

# The collection that catches what is only there to be looked at. Where it is not mutable, which is anywhere but in
# `lm.interpret`, nothing of it is computed.
INTERMEDIATES = "intermediates"


@struct.dataclass
class Context:
    """What all layers of a stack read beside the residual stream."""

    segments: Array | None = None
    """int32 `[B, T]`, 0 = padding; None = a stream without documents to separate."""
    prefix: Array | None = None
    """int32 `[B, T]`, 1 = sees all of its segment's prefix; for `mask="prefix"`."""
    angles: tuple[Array, Array] | None = None
    """Rotary cosines and sines, or None."""
    distance_bias: Array | None = None
    """Float32 `[N, 2 R - 1]`, added to scores by distance, from `1 - R` on; or None."""
    cache_at: Array | None = None
    """int32 `[B, T]`, the cache slot of each token, equal to its place in the sequence; None without a cache."""
    source: Array | None = None
    """`[B, S, D]`, what an encoder made; None without one, or where the cache holds its keys and values."""
    source_segments: Array | None = None
    """int32 `[B, S]`, 0 = padding; None = a source without padding that all tokens may see."""
    balanced: bool = struct.field(pytree_node=False, default=False)
    """Whether tokens lie in the order of `lm.models.split_attention`; so does all that is of tokens here."""


class Attention(nn.Module):
    """Query, key, value and output projections around attention to itself, to a cache or to a source."""

    d_model: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    use_bias: bool
    qkv_bias: bool
    qk_norm: bool
    norm_epsilon: float
    implementation: str
    mask: str
    window: int | None
    scale: bool
    softcap: float
    dropout_rate: float
    kernel_init: Initializer
    out_init: Initializer
    dtype: jnp.dtype
    param_dtype: jnp.dtype
    lora: LoraConfig = OFF
    path: str = "attention"
    """Which attention it is, as `lora.targets` has it."""

    def setup(self) -> None:
        """Declares the projections."""

        def project(name: str, heads: int, axis: str) -> Dense:
            features, axes = (heads, self.head_dim), ("embed", axis, "head_dim")
            lora = self.lora.at(f"{self.path}/{name}")
            return Dense(features, axes, self.qkv_bias, self.kernel_init, self.dtype, self.param_dtype, lora=lora)

        self.query = project("query", self.n_heads, "heads")
        self.key = project("key", self.n_kv_heads, "kv")
        self.value = project("value", self.n_kv_heads, "kv")
        if self.qk_norm:
            norm = functools.partial(Norm, "rmsnorm", self.norm_epsilon, False, self.dtype, self.param_dtype)
            self.query_norm, self.key_norm = norm(), norm()
        axes = ("heads", "head_dim", "embed")
        features = (self.d_model,)
        lora = self.lora.at(f"{self.path}/out")
        self.out = Dense(features, axes, self.use_bias, self.out_init, self.dtype, self.param_dtype, n_in=2, lora=lora)

    def __call__(
        self, x: Array, cache: dict[str, Array] | None, context: Context, deterministic: bool
    ) -> tuple[Array, dict[str, Array] | None]:
        """Attends over `x` `[B, T, D]`, or over the cache once `x` is written into it.

        Args:
          x: `[B, T, D]`.
          cache: `key` and `value`, `[B, K, S, H]` each, or None when not decoding.
          context: see `Context`.
          deterministic: no dropout.

        Returns:
          `[B, T, D]`, and the cache with the new keys and values.
        """
        x = constrain(x, "batch", "length", None)
        query, key, value = project_together(x, self.query, self.key, self.value, deterministic=deterministic)
        if self.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        if context.angles is not None:
            query, key = rotate(query, context.angles), rotate(key, context.angles)
        query = constrain(query, "batch", "length", "activation_heads", None)
        key = constrain(key, "batch", "length", "activation_kv", None)
        value = constrain(value, "batch", "length", "activation_kv", None)

        c = context
        prefix = c.prefix if self.mask == "prefix" else None
        if cache is None:
            causal = self.mask != "bidirectional"
            T = x.shape[1]
            scores: dict[str, Any] = {"window": self.window, "scale": self.scale, "softcap": self.softcap}
            rest: dict[str, Any] = {
                "causal": causal,
                "prefix": prefix,
                "distance_bias": c.distance_bias,
                "dropout_rate": self.dropout_rate,
                "dropout_key": self._dropout_key(deterministic),
            }
            if c.balanced:
                out = split_attention.balanced_attention(query, key, value, segments=c.segments, **scores)
            elif split_attention.parts(T) > 1:
                out = split_attention.gathered_attention(query, key, value, segments=c.segments, **scores, **rest)
            else:
                out = attention.self_attention(
                    query, key, value, implementation=self.implementation, segments=c.segments, **scores, **rest
                )
            # Also of its gradient, which would come split as the residual stream is, and scores with it.
            out = constrain(out, "batch", "length", "activation_heads", None)
            segments = c.segments
            if c.balanced and self.is_mutable_collection(INTERMEDIATES):
                query, key = split_attention.restore(query), split_attention.restore(key)
                segments = None if segments is None else split_attention.restore(segments)
            self._capture(
                query,
                key,
                lambda: attention.self_mask(T, causal=causal, window=self.window, segments=segments, prefix=prefix),
                None if c.distance_bias is None else attention.spread(c.distance_bias, T),
            )
        else:
            assert c.cache_at is not None
            query, key, value = attention.heads_first(query, key, value)
            at = (jnp.arange(x.shape[0])[:, None, None], jnp.arange(self.n_kv_heads)[:, None], c.cache_at[:, None])
            cache = cache | {
                "key": cache["key"].at[at].set(key.astype(cache["key"].dtype)),
                "value": cache["value"].at[at].set(value.astype(cache["value"].dtype)),
            }
            keys, values = cache["key"].astype(self.dtype), cache["value"].astype(self.dtype)
            out = attention.heads_last(
                attention.cached_attention(
                    query,
                    keys,
                    values,
                    c.cache_at,
                    window=self.window,
                    prefix=prefix,
                    distance_bias=c.distance_bias,
                    scale=self.scale,
                    softcap=self.softcap,
                )
            )
        return self.out(out, deterministic), cache

    def keys_and_values(self, source: Array, deterministic: bool = True) -> tuple[Array, Array]:
        """What of a source is attended to: `[B, S, D]` to `[B, S, K, H]` twice."""
        key, value = project_together(source, self.key, self.value, deterministic=deterministic)
        if self.qk_norm:
            key = self.key_norm(key)
        key = constrain(key, "batch", "length", "activation_kv", None)
        return key, constrain(value, "batch", "length", "activation_kv", None)

    def to_source(self, x: Array, cache: dict[str, Array] | None, context: Context, deterministic: bool) -> Array:
        """Attends from `x` `[B, T, D]` to the source, or to its keys and values in the cache; `[B, T, D]`."""
        x = constrain(x, "batch", "length", None)
        query = self.query(x, deterministic)
        if self.qk_norm:
            query = self.query_norm(query)
        query = constrain(query, "batch", "length", "activation_heads", None)
        mask = attention.source_mask(context.segments, context.source_segments)
        if cache is not None and "source_key" in cache:
            query = attention.queries_first(query, self.n_kv_heads)
            keys, values = cache["source_key"].astype(self.dtype), cache["source_value"].astype(self.dtype)
            out = attention.heads_last(attention.attend(query, keys, values, mask, None, self.scale, self.softcap))
            return self.out(out if mask is None else attention.only_where_seen(out, mask))
        assert context.source is not None
        key, value = self.keys_and_values(context.source, deterministic)
        options: dict[str, Any] = {
            "scale": self.scale,
            "softcap": self.softcap,
            "dropout_rate": self.dropout_rate,
            "dropout_key": self._dropout_key(deterministic),
        }
        if split_attention.parts(x.shape[1]) > 1:
            of_rows, of_source = context.segments, context.source_segments
            out = split_attention.cross_attention(query, key, value, of_rows, of_source, **options)
        else:
            out = attention.cross_attention(query, key, value, mask, implementation=self.implementation, **options)
        out = constrain(out, "batch", "length", "activation_heads", None)
        if context.balanced and self.is_mutable_collection(INTERMEDIATES):
            query = split_attention.restore(query)
            segments = None if context.segments is None else split_attention.restore(context.segments)
            mask = attention.source_mask(segments, context.source_segments)
        self._capture(query, key, lambda: mask, None)
        return self.out(out, deterministic)

    def _dropout_key(self, deterministic: bool) -> Array | None:
        return None if deterministic or self.dropout_rate == 0.0 else self.make_rng("dropout")

    def _capture(self, query, key, make_mask, bias) -> None:
        """Keeps the probabilities, `[B, N, T, S]`, where someone asked for them."""
        if self.is_mutable_collection(INTERMEDIATES):
            weights = attention.probabilities(
                query, key, make_mask(), bias=bias, scale=self.scale, softcap=self.softcap
            )
            self.put_variable(INTERMEDIATES, "probabilities", weights)


def output_std(config: ModelConfig, encoder: bool) -> float:
    """Standard deviation of the initial output projections of a stack's blocks."""
    sums = 2 * config.encoder_layers if encoder else (3 if config.encoder_layers else 2) * config.n_layers
    return config.init_std / math.sqrt(sums) if config.scale_residual_init else config.init_std


def make_attention(config: ModelConfig, *, name: str | None = None, encoder: bool = False) -> Attention:
    """The attention of a block of the encoder, or of the decoder, or of the only stack there is.

    Args:
      config: the model's.
      name: `attention`, or `cross_attention` for that to a source; None = the latter, used by itself.
      encoder: of the encoder of an encoder-decoder.
    """
    c = config
    return Attention(
        d_model=c.d_model,
        n_heads=c.n_heads,
        n_kv_heads=c.kv_heads,
        head_dim=c.width_of_head,
        use_bias=c.use_bias,
        qkv_bias=c.use_bias or c.qkv_bias,
        qk_norm=c.qk_norm,
        norm_epsilon=c.norm_epsilon,
        implementation=c.attention,
        mask="bidirectional" if encoder else c.mask,
        window=c.window,
        scale=c.scale_attention,
        softcap=c.attention_softcap,
        dropout_rate=c.attention_dropout,
        kernel_init=nn.initializers.normal(c.init_std),
        out_init=nn.initializers.normal(output_std(c, encoder)),
        dtype=jnp.dtype(c.compute_dtype),
        param_dtype=jnp.dtype(c.param_dtype),
        lora=c.lora,
        path=f"{stack_name(encoder)}/{name or 'cross_attention'}",
        name=name,
    )


def stack_name(encoder: bool) -> str:
    """What a stack's parameters are called."""
    return "encoder_layers" if encoder else "layers"


class Dropout(nn.Module):
    """`nn.Dropout` that drops the same of each token, in whichever order tokens lie."""

    rate: float

    @nn.compact
    def __call__(self, x: Array, *, balanced: bool, deterministic: bool) -> Array:
        """`[B, T, D]` to the same."""
        if self.rate == 0.0 or deterministic:
            return x
        keep = jax.random.bernoulli(self.make_rng("dropout"), 1.0 - self.rate, x.shape)
        keep = split_attention.balance(keep) if balanced else keep
        return jnp.where(keep, x / (1.0 - self.rate), 0.0).astype(x.dtype)


class Block(nn.Module):
    """Attention, attention to the source where there is one, and feed-forward, with their norms and residual sums."""

    config: ModelConfig
    encoder: bool = False
    """A block of the encoder of an encoder-decoder."""

    @nn.compact
    def __call__(
        self, x: Array, cache: dict[str, Array] | None, context: Context, deterministic: bool
    ) -> tuple[Array, dict[str, Array] | None]:
        """`[B, T, D]` and this layer's cache to the same; the other arguments as in `Attention`."""
        c = self.config
        dtype, param_dtype = jnp.dtype(c.compute_dtype), jnp.dtype(c.param_dtype)
        kernel_init, out_init = (nn.initializers.normal(std) for std in (c.init_std, output_std(c, self.encoder)))
        attend = make_attention(c, name="attention", encoder=self.encoder)
        path = f"{stack_name(self.encoder)}/mlp"
        widths = (c.width_of_mlp, c.activation, c.use_bias)
        mlp = Mlp(*widths, kernel_init, out_init, dtype, param_dtype, c.lora, path, name="mlp")
        norm = functools.partial(Norm, c.norm, c.norm_epsilon, c.use_bias, dtype, param_dtype)
        attention_norm, mlp_norm = norm(name="attention_norm"), norm(name="mlp_norm")
        drop = functools.partial(Dropout(c.residual_dropout), balanced=context.balanced, deterministic=deterministic)
        pre = c.norm_place == "pre"

        def adapted(y: Array, name: str) -> Array:
            """The hook for adapters: what a part of the block adds to the residual stream, just before it does."""
            return Adapter(c.adapter_dim, kernel_init, dtype, name=name)(y) if c.adapter_dim else y

        def residual(x: Array) -> Array:
            return constrain(x, "batch", "residual_length", "activation_embed")

        y, cache = attend(attention_norm(x) if pre else x, cache, context, deterministic)
        y = adapted(drop(y), "attention_adapter")
        x = residual(x + y if pre else attention_norm(x + y))
        if c.encoder_layers and not self.encoder:
            to_source = make_attention(c, name="cross_attention").to_source
            cross_norm = norm(name="cross_norm")
            y = drop(to_source(cross_norm(x) if pre else x, cache, context, deterministic))
            x = residual(x + y if pre else cross_norm(x + y))
        y = adapted(drop(mlp(mlp_norm(x) if pre else x, deterministic)), "mlp_adapter")
        x = residual(x + y if pre else mlp_norm(x + y))
        if self.is_mutable_collection(INTERMEDIATES):
            self.put_variable(INTERMEDIATES, "hidden", split_attention.restore(x) if context.balanced else x)
        return x, cache
