"""The one composable Transformer: the families in `lm.models.presets` are settings of the same blocks."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lm.errors import UserError, check
from lm.models.blocks import INTERMEDIATES, Block, Context, make_attention
from lm.models.config import ModelConfig
from lm.models.heads import Bias, Classifier, HeadTransform, pool
from lm.models.layers import GATED, Dense, Embed, Head, Norm, RelativeBias, rotary_angles, sinusoidal, stretched
from lm.models.split_attention import balance, can_balance, restore
from lm.sharding import constrain

__all__ = [
    "HOST",
    "ModelConfig",
    "Transformer",
    "cross_cache",
    "flops_per_token",
    "head_parameters",
    "init_cache",
]

Array = jax.Array

HOST = "pinned_host"  # the memory that `offload` keeps products in
REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "offload": jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", HOST),
    "full": None,
}


class Transformer(nn.Module):
    """Embeddings, a stack of blocks on a leading layer axis, and what stands on it; an encoder before it, if asked for.

    The parts of an encoder-decoder's encoder are named `encoder_...`; all other names are those of its decoder, or of
    the only stack there is, whether that sees one side or both.
    """

    config: ModelConfig
    lower: tuple[tuple[str, int], ...] = ()
    """Stacks (`layers`, `encoder_layers`) whose first so many layers have parameters of their own, `lower_layers` and
    `lower_encoder_layers`, while a part of a model is frozen (`lm.optim.Freeze`); of a whole model, none."""

    def setup(self) -> None:
        """Declares the parts."""
        c = self.config
        if c.vocab_size is None:
            raise UserError("model.vocab_size is None; settle it with ModelConfig.with_vocabulary first")
        dtype, param_dtype = jnp.dtype(c.compute_dtype), jnp.dtype(c.param_dtype)
        init = nn.initializers.normal(c.init_std)

        def table(rows: int, axis: str | None = None) -> Embed:
            return Embed(rows, c.d_model, (axis, "embed"), init, dtype, param_dtype)

        def norm() -> Norm:
            return Norm(c.norm, c.norm_epsilon, c.use_bias, dtype, param_dtype)

        def relative(both_sides: bool) -> RelativeBias:
            return RelativeBias(c.relative_buckets, c.relative_distance, c.n_heads, both_sides, init, param_dtype)

        self.embed = table(c.vocab_size, "vocab")
        if c.prompt_len:
            self.prompt = Embed(c.prompt_len, c.d_model, (None, "embed"), init, dtype, jnp.dtype("float32"))
        if c.positions == "learned":
            self.position_embed = table(c.max_len)
        if c.positions == "relative":
            self.relative_bias = relative(c.mask != "causal")
        if c.token_types:
            self.type_embed = table(c.token_types)
        if c.embedding_norm:
            self.embedding_norm = norm()
        self.embedding_drop = nn.Dropout(c.embedding_dropout)
        lower = dict(self.lower)
        if below := lower.get("layers", 0):
            self.lower_layers = _stack(c, below, encoder=False)
        self.layers = _stack(c, c.n_layers - below, encoder=False)
        if c.norm_place == "pre":
            self.final_norm = norm()

        if c.encoder_layers:
            if not c.share_embeddings:
                self.encoder_embed = table(c.vocab_size, "vocab")
            if c.positions == "learned":
                self.encoder_position_embed = table(c.max_len)
            if c.positions == "relative":
                self.encoder_relative_bias = relative(True)
            if c.embedding_norm:
                self.encoder_embedding_norm = norm()
            self.encoder_embedding_drop = nn.Dropout(c.embedding_dropout)
            if below := lower.get("encoder_layers", 0):
                self.lower_encoder_layers = _stack(c, below, encoder=True)
            self.encoder_layers = _stack(c, c.encoder_layers - below, encoder=True)
            if c.norm_place == "pre":
                self.encoder_norm = norm()

        if c.head_transform:
            self.head_transform = HeadTransform(c)
        if not c.tie_embeddings:
            self.head = Head(c.vocab_size, init, dtype, param_dtype)
        if c.head_bias:
            self.head_bias = Bias(c.vocab_size, "vocab", param_dtype)
        if c.pooler:
            self.pooler = Dense((c.d_model,), ("embed", None), True, init, dtype, param_dtype)
        if c.n_classes:
            self.classifier_drop = nn.Dropout(c.classifier_dropout)
            self.classifier = Classifier(c.n_classes, c.init_std, dtype, param_dtype, c.classifier_bias)
        if c.span_head:
            self.span_head = Classifier(2, c.init_std, dtype, param_dtype)

    def encode(
        self,
        source_tokens: Array,
        source_positions: Array | None = None,
        source_segments: Array | None = None,
        *,
        deterministic: bool = True,
    ) -> Array:
        """The encoder of an encoder-decoder.

        Args:
          source_tokens: int32 `[B, S]`.
          source_positions: int32 `[B, S]`; None = 0, 1, 2, … in every row.
          source_segments: int32 `[B, S]`, 0 = padding; None = no padding and one document a row.
          deterministic: no dropout; otherwise a `dropout` key is needed.

        Returns:
          `[B, S, D]` in the compute dtype, for `hidden` and `cross_cache`.
        """
        check(self.config.encoder_layers > 0, "a source, and the model has no encoder; set model.encoder_layers")
        x, context = self.embedded(source_tokens, source_positions, deterministic, encoder=True)
        if self.is_mutable_collection(INTERMEDIATES):
            self.put_variable(INTERMEDIATES, "encoder_embedded", x)
        context = dataclasses.replace(context, segments=source_segments)
        if "encoder_layers" in dict(self.lower):
            x, _ = self.lower_encoder_layers(x, None, context, deterministic)
        x, _ = self.encoder_layers(x, None, context, deterministic)
        x = self.encoder_norm(x) if self.config.norm_place == "pre" else x
        return constrain(x, "batch", "length", None)

    def hidden(
        self,
        tokens: Array,
        positions: Array | None = None,
        segments: Array | None = None,
        *,
        types: Array | None = None,
        prefix: Array | None = None,
        source: Array | None = None,
        source_segments: Array | None = None,
        cache: dict[str, Array] | None = None,
        cache_at: Array | None = None,
        deterministic: bool = True,
    ) -> tuple[Array, dict[str, Array] | None]:
        """Everything up to the output head.

        Args:
          tokens: int32 `[B, T]`.
          positions: int32 `[B, T]`; None = 0, 1, 2, … in every row. Relative positions count tokens of the row instead.
          segments: int32 `[B, T]`, 0 = padding; None = a stream without documents to separate.
          types: int32 `[B, T]`, token types; None = 0 everywhere.
          prefix: int32 `[B, T]`, for `mask="prefix"`: 1 = sees all tokens of its segment that have a 1, besides those
            before it; None = 0 everywhere. While decoding, all of a prefix comes in one call.
          source: `[B, S, D]` from `encode`, for an encoder-decoder; None where the cache holds `cross_cache`.
          source_segments: int32 `[B, S]`: a token sees the source's tokens of its own segment, or without `segments`
            all but padding (0); None = all of it.
          cache: from `init_cache`, while decoding; then segments must be None.
          cache_at: int32 `[B, T]`, the cache slot of each token.
          deterministic: no dropout; otherwise a `dropout` key is needed.

        Returns:
          `[B, T, D]` in the compute dtype, and the new cache (None without one).
        """
        c = self.config
        if c.encoder_layers:
            there = source is not None or (cache is not None and "source_key" in cache)
            check(there, "the model is an encoder-decoder (model.encoder_layers) and was given no source")
        else:
            check(source is None, "a source, and the model has no encoder; set model.encoder_layers")
        if cache is not None:
            check(c.mask != "bidirectional", "a model that sees both sides (model.mask) can't decode token by token")
        reach = None if cache is None else cache["key"].shape[-2]
        check(cache is None or not c.prompt_len, "a learned prompt is read into a cache by lm.generate alone")
        prompted = c.prompt_len
        x, context = self.embedded(tokens, positions, deterministic, types=types, reach=reach, prompted=prompted > 0)
        if self.is_mutable_collection(INTERMEDIATES):
            self.put_variable(INTERMEDIATES, "embedded", x)
        if prompted:
            if segments is not None:  # a row holds one text: the prompt is of its segment
                segments = jnp.pad(segments, ((0, 0), (prompted, 0)), mode="edge")
            if c.mask == "prefix":
                prefix = jnp.zeros_like(tokens) if prefix is None else prefix
                prefix = jnp.pad(prefix, ((0, 0), (prompted, 0)), constant_values=1)
        context = dataclasses.replace(
            context,
            segments=segments,
            prefix=prefix,
            source=source,
            source_segments=source_segments,
            cache_at=cache_at,
        )
        dropped = c.attention_dropout > 0 and not deterministic
        plain = c.mask == "causal" and context.distance_bias is None and not dropped and cache is None
        if plain and can_balance(x.shape[1]):
            x = balance(x)
            context = dataclasses.replace(
                context,
                segments=None if segments is None else balance(segments),
                angles=None if context.angles is None else jax.tree.map(balance, context.angles),
                balanced=True,
            )
        if "layers" in dict(self.lower):
            check(cache is None, "a model with layers apart (Transformer.lower) doesn't decode; join them first")
            x, _ = self.lower_layers(x, None, context, deterministic)
        x, cache = self.layers(x, cache, context, deterministic)
        if context.balanced:
            x = restore(x)
        return constrain(self.normed(x[:, prompted:]), "batch", "length", None), cache

    def embedded(
        self,
        tokens: Array,
        positions: Array | None,
        deterministic: bool = True,
        *,
        types: Array | None = None,
        reach: int | None = None,
        encoder: bool = False,
        prompted: bool = False,
    ) -> tuple[Array, Context]:
        """What the first layer reads, and what all layers do of positions.

        Args:
          tokens: int32 `[B, T]`.
          positions: as in `hidden`.
          deterministic: no dropout.
          types: as in `hidden`.
          reach: the slots of a cache: relative positions are needed that far; None = the tokens given.
          encoder: of the encoder of an encoder-decoder.
          prompted: put the learned prompt in front; the tokens' positions begin behind it in any case.

        Returns:
          `[B, T, D]`, or `[B, prompt_len + T, D]` with the prompt; and a `Context` with `angles` and `distance_bias`
          alone.
        """
        c = self.config
        B, T = tokens.shape
        check(
            c.positions != "learned" or c.context >= T,
            f"{T} tokens in a row, and model.max_len is {c.max_len}"
            f"{f' with a prompt of {c.prompt_len}' if c.prompt_len else ''}: learned positions know no more;"
            " shorten the rows, or train with a longer max_len",
        )
        if positions is None:
            positions = jnp.arange(T, dtype=jnp.int32)[None]
        x = (self.encoder_embed if encoder and not c.share_embeddings else self.embed)(tokens)
        if c.scale_embeddings:
            x = x * c.d_model**0.5
        if c.prompt_len:
            positions = positions + c.prompt_len
        if prompted:
            before = jnp.arange(c.prompt_len, dtype=jnp.int32)
            prompt = jnp.broadcast_to(self.prompt(before), (B, c.prompt_len, c.d_model))
            x = jnp.concatenate([prompt.astype(x.dtype), x], axis=1)
            before = jnp.broadcast_to(before, (positions.shape[0], c.prompt_len))
            positions = jnp.concatenate([before, positions], axis=1)
            types = None if types is None else jnp.pad(types, ((0, 0), (c.prompt_len, 0)))
        context = Context()
        if c.positions == "learned":
            x = x + (self.encoder_position_embed if encoder else self.position_embed)(positions)
        elif c.positions == "sinusoidal":
            x = x + sinusoidal(positions, c.d_model).astype(x.dtype)
        elif c.positions == "rope":
            angles = rotary_angles(positions, c.width_of_head, c.rope_theta, self._scaled)
            context = Context(angles=angles)
        elif c.positions == "relative":
            bias = self.encoder_relative_bias if encoder else self.relative_bias
            context = Context(distance_bias=bias(reach or x.shape[1]))
        if c.token_types:
            x = x + self.type_embed(jnp.zeros(x.shape[:2], jnp.int32) if types is None else types)
        if c.embedding_norm:
            x = (self.encoder_embedding_norm if encoder else self.embedding_norm)(x)
        x = (self.encoder_embedding_drop if encoder else self.embedding_drop)(x, deterministic=deterministic)
        return constrain(x, "batch", "residual_length", "activation_embed"), context

    def _scaled(self, rates: Array) -> Array:
        """Rotary rates as `rope_scaling` has them: float32 `[H/2]` to the same."""
        c = self.config
        if c.rope_scaling == "linear":
            return rates / c.rope_factor
        if c.rope_scaling == "llama3":
            return stretched(rates, c.rope_factor, c.rope_low_frequency, c.rope_high_frequency, c.rope_original_len)
        return rates

    def normed(self, x: Array) -> Array:
        """What the heads read, from what the last layer wrote: `[B, T, D]`."""
        return self.final_norm(x) if self.config.norm_place == "pre" else x

    def logits(self, hidden: Array) -> Array:
        """`[..., D]` to float32 `[..., V]`. Uses the parameters `head_parameters` names, and no others."""
        c = self.config
        if c.head_transform:
            hidden = self.head_transform(hidden)
        if c.scale_logits:
            hidden = hidden * c.d_model**-0.5
        out = self.embed.attend(hidden) if c.tie_embeddings else self.head(hidden)
        if c.head_bias:
            out = self.head_bias(out)
        return c.logit_softcap * jnp.tanh(out / c.logit_softcap) if c.logit_softcap else out

    def pooled(self, hidden: Array, segments: Array | None = None) -> Array:
        """One vector for each row: `[B, T, D]` and segments int32 `[B, T]` (0 = padding) to `[B, D]`."""
        x = pool(hidden, segments, self.config.pooling)
        return jnp.tanh(self.pooler(x)) if self.config.pooler else x

    def classify(self, hidden: Array, segments: Array | None = None, *, deterministic: bool = True) -> Array:
        """`[B, T, D]` and segments int32 `[B, T]` (0 = padding) to float32 scores `[B, n_classes]`."""
        check(self.config.n_classes > 0, "the model has no classifier; set model.n_classes")
        x = self.classifier_drop(self.pooled(hidden, segments), deterministic=deterministic)
        return self.classifier(x)

    def spans(self, hidden: Array) -> Array:
        """`[B, T, D]` to float32 `[B, T, 2]`: scores of each token as start and as end."""
        check(self.config.span_head, "the model has no scores for spans; set model.span_head")
        return self.span_head(hidden)

    def __call__(
        self,
        tokens: Array,
        positions: Array | None = None,
        segments: Array | None = None,
        *,
        types: Array | None = None,
        prefix: Array | None = None,
        source_tokens: Array | None = None,
        source_positions: Array | None = None,
        source_segments: Array | None = None,
        deterministic: bool = True,
    ) -> Array:
        """int32 `[B, T]` to float32 logits `[B, T, V]`; arguments as in `hidden` and `encode`."""
        c = self.config
        if self.is_initializing() and c.encoder_layers and source_tokens is None:
            source_tokens = tokens
        source = None
        if source_tokens is not None:
            source = self.encode(source_tokens, source_positions, source_segments, deterministic=deterministic)
        hidden, _ = self.hidden(
            tokens,
            positions,
            segments,
            types=types,
            prefix=prefix,
            source=source,
            source_segments=source_segments,
            deterministic=deterministic,
        )
        if self.is_initializing():  # every part gets its parameters, whatever the logits need
            if c.pooler:
                self.pooled(hidden)
            if c.n_classes:
                self.classify(hidden)
            if c.span_head:
                self.spans(hidden)
        return self.logits(hidden)


def _stack(config: ModelConfig, length: int, *, encoder: bool) -> Any:
    """So many blocks of the encoder of an encoder-decoder, or of the other stack, with parameters `[L, ...]`."""
    c = config
    unroll = min(c.unroll, length) or length
    block: Any = Block
    if c.remat != "none":
        # The loop already keeps XLA from merging the two computations, so no barrier is needed (prevent_cse).
        block = nn.remat(Block, policy=REMAT_POLICIES[c.remat], static_argnums=(4,), prevent_cse=c.unroll != 1)
    return nn.scan(
        block,
        variable_axes={"params": 0, INTERMEDIATES: 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(0, nn.broadcast, nn.broadcast),
        out_axes=0,
        length=length,
        unroll=unroll,
        metadata_params={nn.PARTITION_NAME: "layers"},
        check_constancy_invariants=False,  # a second tracing of the block, for outputs that blocks don't have
    )(c, encoder)


def head_parameters(config: ModelConfig, params: dict[str, Any]) -> dict[str, Any]:
    """The part of the parameters that `Transformer.logits` reads."""
    names = ["embed" if config.tie_embeddings else "head"]
    names += [name for name in ("head_transform", "head_bias") if getattr(config, name)]
    return {name: params[name] for name in names}


def init_cache(config: ModelConfig, batch: int, length: int) -> dict[str, Array]:
    """An empty cache for `Transformer.hidden`: keys and values `[L, B, K, length, H]` in the compute dtype."""
    shape = (config.n_layers, batch, config.kv_heads, length, config.width_of_head)
    return {name: jnp.zeros(shape, jnp.dtype(config.compute_dtype)) for name in ("key", "value")}


def cross_cache(config: ModelConfig, params: dict[str, Any], source: Array) -> dict[str, Array]:
    """What decoding needs of a source, computed once; join it to the cache: `init_cache(...) | cross_cache(...)`.

    Args:
      config: the model's.
      params: the model's parameters, without `nn.Partitioned` boxes.
      source: `[B, S, D]` from `Transformer.encode`.

    Returns:
      `source_key` and `source_value`, `[L, B, K, S, H]` each, in the compute dtype.
    """
    project = make_attention(config)

    def of_layer(layer: Any) -> tuple[Array, Array]:
        found: Any = project.apply({"params": layer}, source, method="keys_and_values")
        return found

    key, value = jax.vmap(of_layer)(params["layers"]["cross_attention"])
    return {"source_key": key.swapaxes(2, 3), "source_value": value.swapaxes(2, 3)}


def flops_per_token(config: ModelConfig, seq_len: int, source_len: int = 0) -> int:
    """Floating-point operations of one training token, forward and backward.

    6 for each weight that a token is multiplied with (so the head counts, looked-up tables do not) and
    `12 L N H T` for attention scores and values, as in PaLM (arXiv:2204.02311, appendix B): the causal half is not
    discounted, recomputation by remat is not counted, nor what happens once a row (pooler, classifier).

    Args:
      config: the model's.
      seq_len: tokens in a row.
      source_len: source tokens in a row, of an encoder-decoder; what they cost is spread over the row's `seq_len`
        target tokens, which are those that are counted.
    """
    c = config
    assert c.vocab_size is not None
    D, H = c.d_model, c.width_of_head
    query_and_out, key_and_value = 2 * D * c.n_heads * H, 2 * D * c.kv_heads * H
    mlp = D * c.width_of_mlp * (3 if c.activation in GATED else 2)
    block = query_and_out + key_and_value + mlp

    def scores(layers: int, span: int) -> int:
        return 12 * layers * c.n_heads * H * span

    def seen(length: int) -> int:
        return length if c.window is None else min(length, c.window)

    weights = c.n_layers * block + D * c.vocab_size + (D * D if c.head_transform else 0) + (2 * D if c.span_head else 0)
    token = 6 * weights + scores(c.n_layers, seen(seq_len))
    if not c.encoder_layers:
        return token
    token += 6 * c.n_layers * query_and_out + scores(c.n_layers, source_len)
    source_weights = c.encoder_layers * block + c.n_layers * key_and_value
    source_token = 6 * source_weights + scores(c.encoder_layers, seen(source_len))
    return token + source_len * source_token // seq_len
