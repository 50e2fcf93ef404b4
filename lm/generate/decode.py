"""Cached decoding: the compiled parts.

A batch of prompts is padded on the right; a token's cache slot is its place in its own row, so padding lies after
everything that row can see and is overwritten as the row grows. One compiled function fills the cache from the
prompts, another draws some tokens a call; both are compiled once per batch size and length bucket.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from lm import tree
from lm.generate.sampling import Adjustments, adjust, ban_repeats, draw, mask_padding
from lm.models.blocks import Block
from lm.models.transformer import ModelConfig, Transformer, cross_cache, init_cache

Array = jax.Array

SMALLEST_BUCKET = 64


@functools.partial(jax.jit, static_argnames=("config", "length", "history"))
def prefill(
    params: Any,
    tokens: Array,
    lengths: Array,
    seed: Array,
    hashes: Array,
    repeats: Array,
    acting: Adjustments,
    *,
    config: ModelConfig,
    length: int,
    history: bool,
    source: tuple[Array, Array] | None = None,
) -> dict[str, Any]:
    """The state of `draw_chunk`, or of a beam search, before the first token.

    Args:
      params: from `for_decoding`.
      tokens: int32 `[B, P]`, prompts padded on the right; of an encoder-decoder what its decoder begins with.
      lengths: int32 `[B]`, of the prompts.
      seed: uint32.
      hashes: uint32 `[B]`, with `repeats` from `prompt_streams`.
      repeats: uint32 `[B]`.
      acting: the adjustments that `draw_chunk` will be given.
      config: the model's.
      length: slots of the cache, those of a learned prompt not counted.
      history: whether to keep the tokens of each row, int32 `[B, length]`, each at its place.
      source: what an encoder-decoder reads, int32 `[B, S]`, padded on the right, and its lengths, int32 `[B]`.
    """
    B, P = tokens.shape
    at = jnp.broadcast_to(jnp.arange(P, dtype=jnp.int32), (B, P))
    cache, segments = unstacked(init_cache(config, B, length + config.prompt_len), config.n_layers), None
    if source is not None:
        segments = (jnp.arange(source[0].shape[1]) < source[1][:, None]).astype(jnp.int32)
        sources = source_cache(config, params, source[0], segments)
        cache = [slots | of_source for slots, of_source in zip(cache, sources)]
    # A prompt is the prefix that a prefix model was trained to go on from; its padding is none of it.
    prefix = (at < lengths[:, None]).astype(jnp.int32) if config.mask == "prefix" else None
    model = Transformer(config)
    _, cache = forward(model, params, cache, tokens, at, prefix=prefix, source_segments=segments, begins=True)
    fold = jax.vmap(jax.random.fold_in)
    state = {
        "cache": cache,
        # The last token of each prompt goes through the model again, in the loop: one place that draws.
        "token": jnp.take_along_axis(tokens, lengths[:, None] - 1, axis=1)[:, 0],
        "at": lengths - 1,
        "keys": fold(fold(jnp.broadcast_to(jax.random.key(seed), (B,)), hashes), repeats),
    }
    if "repetition_penalty" in acting:
        assert config.vocab_size is not None
        seen = jnp.zeros((B, config.vocab_size), jnp.bool)
        state["seen"] = seen.at[jnp.arange(B)[:, None], tokens].max(at < lengths[:, None])
    if segments is not None:
        state["source_segments"] = segments
    if history:
        state["history"] = jnp.pad(tokens, [(0, 0), (0, length - P)])
    return state


@functools.partial(jax.jit, static_argnames=("config", "vocab_size", "chunk", "no_repeat"), donate_argnames="state")
def draw_chunk(
    params: Any,
    state: dict[str, Any],
    limit: Array,
    eos: Array,
    acting: Adjustments,
    *,
    config: ModelConfig,
    vocab_size: int,
    chunk: int,
    no_repeat: int = 0,
) -> tuple[dict[str, Any], Array, Array]:
    """Up to `chunk` more tokens of each row that is not done.

    Args:
      params: from `for_decoding`.
      state: from `prefill` or the call before, and `done`, bool `[B]`; its memory is used again.
      limit: int32 `[B]`, tokens of each row at most, prompt included.
      eos: int32, the token that ends a row; -1 = none.
      acting: from `SamplingConfig.adjustments`.
      config: the model's.
      vocab_size: the tokenizer's.
      chunk: tokens at most.
      no_repeat: length of the sequences of tokens that no row may repeat; needs `history`. 0 = off.

    Returns:
      The new state, tokens int32 `[B, chunk]`, -1 where there is none, and their log-probabilities, float32.
    """
    model = Transformer(config)
    rows = jnp.arange(limit.shape[0])

    def step(carry: Any) -> Any:
        i, state, tokens, logprobs = carry
        at, done = state["at"] + 1, state["done"]
        hidden, cache = forward(
            model,
            params,
            state["cache"],
            state["token"][:, None],
            state["at"][:, None],
            source_segments=state.get("source_segments"),
        )
        logits: Any = model.apply({"params": params}, hidden[:, 0], method="logits")
        keys = jax.vmap(jax.random.fold_in)(state["keys"], at)
        allowed = mask_padding(logits, vocab_size)
        if no_repeat:
            allowed = ban_repeats(allowed, state["history"], state["at"], no_repeat, eos)
        token = draw(adjust(allowed, state.get("seen"), acting), keys, acting)
        tokens = tokens.at[:, i].set(jnp.where(done, -1, token))
        logprobs = logprobs.at[:, i].set(jax.nn.log_softmax(logits)[rows, token])
        # A row that is done repeats its last token at its place, which changes nothing.
        state = state | {
            "cache": cache,
            "token": jnp.where(done, state["token"], token),
            "at": jnp.where(done, state["at"], at),
            "done": done | (token == eos) | (at + 1 >= limit),
        }
        if "seen" in state:
            state["seen"] = state["seen"].at[rows, token].set(True)
        if no_repeat:
            state["history"] = state["history"].at[rows, at].set(token, mode="drop")  # a row that is done has no more
        return i + 1, state, tokens, logprobs

    def going(carry: Any) -> Array:
        i, state, *_ = carry
        return (i < chunk) & ~state["done"].all()

    shape = (limit.shape[0], chunk)
    start = (0, state, jnp.full(shape, -1, jnp.int32), jnp.zeros(shape, jnp.float32))
    _, state, tokens, logprobs = jax.lax.while_loop(going, step, start)
    return state, tokens, logprobs


def forward(
    model: Transformer,
    params: Any,
    cache: list[Any],
    tokens: Array,
    at: Array,
    *,
    prefix: Array | None = None,
    source_segments: Array | None = None,
    begins: bool = False,
) -> tuple[Array, list[Any]]:
    """`Transformer.hidden` with a list of layers, for parameters from `for_decoding`.

    Slices of stacked layers would be copied for every token, the cache's along with the parameters': 1.7 times slower.

    Args:
      model: the model.
      params: from `for_decoding`.
      cache: one of each layer; of an encoder-decoder with what `cross_cache` makes.
      tokens: int32 `[B, T]`.
      at: int32 `[B, T]`, their places, which are also their slots of the cache, behind those of a learned prompt.
      prefix: int32 `[B, T]`, 1 = of a prefix that sees itself to both sides, all of which is here; or None.
      source_segments: int32 `[B, S]`, 0 = padding of the source, which is not seen; or None.
      begins: the cache is empty, and a learned prompt goes into it first.

    Returns:
      `[B, T, D]`, of the learned prompt as well where it was read, and the new cache.
    """
    reach, P = cache[0]["key"].shape[-2], model.config.prompt_len
    begins = begins and P > 0
    read: Any = model.apply({"params": params}, tokens, at, reach=reach, prompted=begins, method="embedded")
    x, context = read
    slots_at = at + P
    if begins:
        before = jnp.broadcast_to(jnp.arange(P, dtype=at.dtype), (at.shape[0], P))
        slots_at = jnp.concatenate([before, slots_at], axis=1)
        prefix = None if prefix is None else jnp.pad(prefix, ((0, 0), (P, 0)), constant_values=1)
    context = dataclasses.replace(context, prefix=prefix, cache_at=slots_at, source_segments=source_segments)
    block: Any = Block(model.config)
    filled = []
    for layer, slots in zip(params["layers"], cache):
        x, slots = block.apply({"params": layer}, x, slots, context, True)
        filled.append(slots)
    hidden: Any = model.apply({"params": params}, x, method="normed")
    return hidden, filled


def source_cache(config: ModelConfig, params: Any, tokens: Array, segments: Array) -> list[dict[str, Array]]:
    """What each layer of an encoder-decoder keeps of a source, for parameters from `for_decoding`.

    Args:
      config: the model's.
      params: from `for_decoding`.
      tokens: int32 `[B, S]`.
      segments: int32 `[B, S]`, 0 = padding.
    """
    source: Any = Transformer(config).apply({"params": params}, tokens, None, segments, method="encode")
    made = []
    for layer in params["layers"]:
        of_one = cross_cache(config, {"layers": jax.tree.map(lambda x: x[None], layer)}, source)
        made += unstacked(of_one, 1)
    return made


def bucket(length: int, most: int) -> int:
    """`length` rounded up to a power of two, at least 64, but never above `most`."""
    return min(max(SMALLEST_BUCKET, 1 << (length - 1).bit_length()), most)


@functools.partial(jax.jit, static_argnames="config")
def for_decoding(params: Any, config: ModelConfig) -> Any:
    """Parameters as decoding wants them: a list of layers, and cast once to the dtype that they are used in."""
    # What computes in float32 keeps the dtype that it has.
    keep = tree.match_patterns(params, [(r".*(norm|relative_bias|head_bias)/.*", True), (r".*", False)])
    params = jax.tree.map(lambda x, kept: x if kept else jnp.asarray(x, config.compute_dtype), params, keep)
    return params | {"layers": unstacked(params["layers"], config.n_layers)}


def unstacked(layers: Any, count: int) -> list[Any]:
    """A tree of `[L, ...]` as a list of L trees."""
    return [jax.tree.map(lambda x: x[layer], layers) for layer in range(count)]  # noqa: B023
