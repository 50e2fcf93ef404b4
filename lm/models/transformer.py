"""The one composable Transformer: GPT-2 and LLaMA (`lm.models.presets`) are settings of the same blocks."""

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

import jax
import jax.numpy as jnp
from flax import linen as nn

from lm.errors import UserError, check
from lm.models.attention import Attention
from lm.models.layers import GATED, Embed, Head, Mlp, Norm, rotary_angles, sinusoidal
from lm.sharding import constrain

Array = jax.Array
Float = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape and parts of a Transformer."""

    vocab_size: int | None = None
    """Rows of the embedding; None = the tokenizer's size, rounded up to a multiple of `vocab_multiple`."""
    vocab_multiple: int = 128
    """Rounding of a vocabulary size taken from the tokenizer; matrix units want multiples of 128."""
    d_model: int = 384
    """Width of the residual stream."""
    n_layers: int = 6
    """Number of blocks."""
    n_heads: int = 6
    """Attention heads."""
    n_kv_heads: int | None = None
    """Key/value heads; None = n_heads, fewer = grouped-query, 1 = multi-query attention."""
    head_dim: int | None = None
    """Width of a head; None = d_model / n_heads."""
    d_ff: int | None = None
    """Width of the feed-forward block; None = 4 d_model, or 8/3 d_model rounded up to 128 for gated activations."""
    max_len: int = 1024
    """Longest sequence; the rows of a learned position table."""
    positions: Literal["learned", "sinusoidal", "rope", "none"] = "learned"
    """Position encoding."""
    rope_theta: float = 10_000.0
    """Base of the rotary wavelengths."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """Kind of norm."""
    norm_place: Literal["pre", "post"] = "pre"
    """Norm before each block's input (and once at the end), or after each residual sum."""
    norm_epsilon: float = 1e-5
    """Added to the variance."""
    activation: Literal["relu", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh", "swiglu", "geglu"] = "gelu_tanh"
    """Of the feed-forward block; swiglu and geglu add a gate projection."""
    use_bias: bool = True
    """Biases in projections and layer norms."""
    tie_embeddings: bool = True
    """The output head is the embedding table."""
    qk_norm: bool = False
    """RMS norm on queries and keys, per head."""
    attention_softcap: float = 0.0
    """Bound on attention scores, c tanh(s / c); 0 = off."""
    logit_softcap: float = 0.0
    """Bound on output logits; 0 = off."""
    window: int | None = None
    """Sliding window: tokens see themselves and the window - 1 before them; None = all."""
    embedding_dropout: float = 0.0
    """Dropout rate after the embeddings."""
    residual_dropout: float = 0.0
    """Dropout rate on the output of each attention and feed-forward block."""
    attention_dropout: float = 0.0
    """Dropout rate on attention probabilities."""
    init_std: float = 0.02
    """Standard deviation of initial matrices and tables."""
    scale_residual_init: bool = True
    """Divide the initial output projections of both blocks by sqrt(2 n_layers), as GPT-2 does."""
    attention: Literal["auto", "xla", "cudnn", "blocked"] = "auto"
    """Attention implementation; auto = cudnn on GPUs where it serves, blocked on CPUs, else xla."""
    compute_dtype: Float = "float32"
    """Of matrix products and activations; softmax, norms and loss stay in float32."""
    param_dtype: Float = "float32"
    """Of the parameters."""
    remat: Literal["none", "dots", "full"] = "none"
    """What the backward pass computes again: nothing, all but matrix products, or each whole layer."""
    unroll: int = 0
    """Layers per loop iteration, 0 = all: more runs faster and compiles slower; changes no name, shape or value."""

    def __post_init__(self) -> None:
        """Checks what can be told without data or devices."""
        for name, hint in get_type_hints(type(self)).items():
            value, allowed = getattr(self, name), get_args(hint)
            if get_origin(hint) is Literal:
                check(value in allowed, f"model.{name} is {value!r}; choose one of {', '.join(allowed)}")
        for name in ("d_model", "n_layers", "n_heads", "max_len", "vocab_multiple"):
            value = getattr(self, name)
            check(value >= 1, f"model.{name} is {value}; it must be at least 1")
        for name in ("vocab_size", "n_kv_heads", "head_dim", "d_ff", "window"):
            value = getattr(self, name)
            check(value is None or value >= 1, f"model.{name} is {value}; it must be at least 1, or None")
        check(
            self.head_dim is not None or self.d_model % self.n_heads == 0,
            f"model.n_heads = {self.n_heads} does not divide model.d_model = {self.d_model};"
            f" choose a divisor or set model.head_dim",
        )
        check(
            self.n_heads % self.kv_heads == 0,
            f"model.n_kv_heads = {self.kv_heads} does not divide model.n_heads = {self.n_heads}; choose a divisor",
        )
        check(
            self.positions != "rope" or self.width_of_head % 2 == 0,
            f"model.positions = rope needs an even head width, found {self.width_of_head}; change model.n_heads",
        )
        for name in ("rope_theta", "norm_epsilon"):
            check(getattr(self, name) > 0, f"model.{name} is {getattr(self, name)}; it must be above 0")
        for name in ("attention_softcap", "logit_softcap", "init_std"):
            check(getattr(self, name) >= 0, f"model.{name} is {getattr(self, name)}; it must be 0 or more")
        for name in ("embedding_dropout", "residual_dropout", "attention_dropout"):
            rate = getattr(self, name)
            check(0.0 <= rate < 1.0, f"model.{name} is {rate}; a dropout rate is in [0, 1)")
        check(
            0 <= self.unroll <= self.n_layers,
            f"model.unroll = {self.unroll} is not between 0 (all) and model.n_layers = {self.n_layers}",
        )

    @property
    def kv_heads(self) -> int:
        """K: key/value heads."""
        return self.n_kv_heads or self.n_heads

    @property
    def width_of_head(self) -> int:
        """H: head width."""
        return self.head_dim or self.d_model // self.n_heads

    @property
    def width_of_mlp(self) -> int:
        """F: feed-forward width."""
        if self.d_ff is not None:
            return self.d_ff
        if self.activation in GATED:
            return math.ceil(8 * self.d_model / 3 / 128) * 128
        return 4 * self.d_model

    def with_vocabulary(self, tokenizer_size: int) -> "ModelConfig":
        """This model with its vocabulary settled for a tokenizer of so many ids.

        Raises:
          UserError: the model's vocabulary has no row for some of the tokenizer's ids.
        """
        if self.vocab_size is None:
            rounded = math.ceil(tokenizer_size / self.vocab_multiple) * self.vocab_multiple
            return dataclasses.replace(self, vocab_size=rounded)
        check(
            self.vocab_size >= tokenizer_size,
            f"the tokenizer has {tokenizer_size} ids but model.vocab_size is {self.vocab_size};"
            f" set model.vocab_size to {tokenizer_size} or more, or to None to take the tokenizer's",
        )
        return self


class Block(nn.Module):
    """Attention and feed-forward with their norms and residual sums."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x: Array,
        cache: dict[str, Array] | None,
        segments: Array | None,
        angles: tuple[Array, Array] | None,
        cache_at: Array | None,
        deterministic: bool,
    ) -> tuple[Array, dict[str, Array] | None]:
        """`[B, T, D]` and this layer's cache to the same; the other arguments as in `Attention`."""
        c = self.config
        dtype, param_dtype = jnp.dtype(c.compute_dtype), jnp.dtype(c.param_dtype)
        kernel_init = nn.initializers.normal(c.init_std)
        out_std = c.init_std / math.sqrt(2 * c.n_layers) if c.scale_residual_init else c.init_std
        out_init = nn.initializers.normal(out_std)
        attention = Attention(
            n_heads=c.n_heads,
            n_kv_heads=c.kv_heads,
            head_dim=c.width_of_head,
            use_bias=c.use_bias,
            qk_norm=c.qk_norm,
            norm_epsilon=c.norm_epsilon,
            implementation=c.attention,
            causal=True,
            window=c.window,
            softcap=c.attention_softcap,
            dropout_rate=c.attention_dropout,
            kernel_init=kernel_init,
            out_init=out_init,
            dtype=dtype,
            param_dtype=param_dtype,
            name="attention",
        )
        mlp = Mlp(c.width_of_mlp, c.activation, c.use_bias, kernel_init, out_init, dtype, param_dtype, name="mlp")
        norm = functools.partial(Norm, c.norm, c.norm_epsilon, c.use_bias, dtype, param_dtype)
        attention_norm, mlp_norm = norm(name="attention_norm"), norm(name="mlp_norm")
        drop = nn.Dropout(c.residual_dropout, deterministic=deterministic)

        if c.norm_place == "pre":
            y, cache = attention(attention_norm(x), segments, angles, cache, cache_at, deterministic)
            x = x + drop(y)
            x = x + drop(mlp(mlp_norm(x)))
        else:
            y, cache = attention(x, segments, angles, cache, cache_at, deterministic)
            x = attention_norm(x + drop(y))
            x = mlp_norm(x + drop(mlp(x)))
        return constrain(x, "batch", "length", "activation_embed"), cache


REMAT_POLICIES = {"dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable, "full": None}


class Transformer(nn.Module):
    """A decoder: embeddings, a stack of blocks on a leading layer axis, and an output head."""

    config: ModelConfig

    def setup(self) -> None:
        """Declares the parts."""
        c = self.config
        if c.vocab_size is None:
            raise UserError("model.vocab_size is None; settle it with ModelConfig.with_vocabulary first")
        dtype, param_dtype = jnp.dtype(c.compute_dtype), jnp.dtype(c.param_dtype)
        init = nn.initializers.normal(c.init_std)
        self.embed = Embed(c.vocab_size, c.d_model, ("vocab", "embed"), init, dtype, param_dtype)
        if c.positions == "learned":
            self.position_embed = Embed(c.max_len, c.d_model, (None, "embed"), init, dtype, param_dtype)
        self.embedding_drop = nn.Dropout(c.embedding_dropout)
        block: Any = Block
        if c.remat != "none":
            # The loop already keeps XLA from merging the two computations, so no barrier is needed (prevent_cse).
            block = nn.remat(Block, policy=REMAT_POLICIES[c.remat], static_argnums=(6,), prevent_cse=c.unroll != 1)
        self.layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast),
            out_axes=0,
            length=c.n_layers,
            unroll=c.unroll or c.n_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c)
        if c.norm_place == "pre":
            self.final_norm = Norm(c.norm, c.norm_epsilon, c.use_bias, dtype, param_dtype)
        if not c.tie_embeddings:
            self.head = Head(c.vocab_size, init, dtype, param_dtype)

    def hidden(
        self,
        tokens: Array,
        positions: Array | None = None,
        segments: Array | None = None,
        *,
        cache: dict[str, Array] | None = None,
        cache_at: Array | None = None,
        deterministic: bool = True,
    ) -> tuple[Array, dict[str, Array] | None]:
        """Everything up to the output head.

        Args:
          tokens: int32 `[B, T]`.
          positions: int32 `[B, T]`; None = 0, 1, 2, … in every row.
          segments: int32 `[B, T]`, 0 = padding; None = a stream without documents to separate.
          cache: from `init_cache`, while decoding; then segments must be None.
          cache_at: int32 `[B, T]`, the cache slot of each token.
          deterministic: no dropout; otherwise a `dropout` key is needed.

        Returns:
          `[B, T, D]` in the compute dtype, and the new cache (None without one).
        """
        if positions is None:
            positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        x, angles = self.embedded(tokens, positions, deterministic)
        x, cache = self.layers(x, cache, segments, angles, cache_at, deterministic)
        return self.normed(x), cache

    def embedded(
        self, tokens: Array, positions: Array, deterministic: bool = True
    ) -> tuple[Array, tuple[Array, Array] | None]:
        """What the first layer reads: int32 `[B, T]` twice to `[B, T, D]` and the rotary angles, None without rope."""
        c = self.config
        check(
            c.positions != "learned" or tokens.shape[1] <= c.max_len,
            f"{tokens.shape[1]} tokens in a row, and model.max_len is {c.max_len}: learned positions know no more;"
            " shorten the rows, or train with a longer max_len",
        )
        x = self.embed(tokens)
        angles = None
        if c.positions == "learned":
            x = x + self.position_embed(positions)
        elif c.positions == "sinusoidal":
            x = x + sinusoidal(positions, c.d_model).astype(x.dtype)
        elif c.positions == "rope":
            angles = rotary_angles(positions, c.width_of_head, c.rope_theta)
        x = self.embedding_drop(x, deterministic=deterministic)
        return constrain(x, "batch", "length", "activation_embed"), angles

    def normed(self, x: Array) -> Array:
        """What the head reads, from what the last layer wrote: `[B, T, D]`."""
        return self.final_norm(x) if self.config.norm_place == "pre" else x

    def logits(self, hidden: Array) -> Array:
        """`[..., D]` to float32 `[..., V]`. Uses the parameters `head_parameters` names, and no others."""
        c = self.config
        out = self.embed.attend(hidden) if c.tie_embeddings else self.head(hidden)
        return c.logit_softcap * jnp.tanh(out / c.logit_softcap) if c.logit_softcap else out

    def __call__(
        self,
        tokens: Array,
        positions: Array | None = None,
        segments: Array | None = None,
        *,
        deterministic: bool = True,
    ) -> Array:
        """int32 `[B, T]` to float32 logits `[B, T, V]`; arguments as in `hidden`."""
        hidden, _ = self.hidden(tokens, positions, segments, deterministic=deterministic)
        return self.logits(hidden)


def head_parameters(config: ModelConfig, params: dict[str, Any]) -> dict[str, Any]:
    """The part of the parameters that `Transformer.logits` reads."""
    name = "embed" if config.tie_embeddings else "head"
    return {name: params[name]}


def init_cache(config: ModelConfig, batch: int, length: int) -> dict[str, Array]:
    """An empty cache for `Transformer.hidden`: keys and values `[L, B, K, length, H]` in the compute dtype."""
    shape = (config.n_layers, batch, config.kv_heads, length, config.width_of_head)
    return {name: jnp.zeros(shape, jnp.dtype(config.compute_dtype)) for name in ("key", "value")}


def flops_per_token(config: ModelConfig, seq_len: int) -> int:
    """Floating-point operations of one training token, forward and backward.

    6 for each weight that a token is multiplied with (so the head counts, looked-up tables do not) and
    `12 L N H T` for attention scores and values, as in PaLM (arXiv:2204.02311, appendix B): the causal half is not
    discounted and recomputation by remat is not counted.
    """
    c = config
    assert c.vocab_size is not None
    attention = c.d_model * c.width_of_head * (2 * c.n_heads + 2 * c.kv_heads)
    mlp = c.d_model * c.width_of_mlp * (3 if c.activation in GATED else 2)
    weights = c.n_layers * (attention + mlp) + c.d_model * c.vocab_size
    span = seq_len if c.window is None else min(seq_len, c.window)
    return 6 * weights + 12 * c.n_layers * c.n_heads * c.width_of_head * span
