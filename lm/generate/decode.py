"""Cached decoding: prompts in, continuations out.

A batch of prompts is padded on the right; a token's cache slot is its place in its own row, so padding lies after
everything that row can see and is overwritten as the row grows. One compiled function fills the cache from the
prompts, another draws up to `CHUNK` tokens a call; both are compiled once per batch size and length bucket.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from lm import tree
from lm.errors import UserError, check
from lm.generate.sampling import Adjustments, SamplingConfig, adjust, draw, mask_padding
from lm.models.blocks import Block
from lm.models.transformer import ModelConfig, Transformer, init_cache

Array = jax.Array
Finished = Literal["eos", "stop", "length"]

# Tokens between two looks of the host at what came out: it streams them and finds stop strings.
CHUNK = 16
SMALLEST_BUCKET = 64


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What followed one prompt."""

    prompt_ids: list[int]
    """The prompt."""
    ids: list[int]
    """The new tokens, without the end-of-document token; a stop string's tokens are still here."""
    logprobs: list[float]
    """Natural log of the model's own probability of each of `ids`, before any adjustment; float32 values."""
    finished: Finished
    """eos: the model ended the document; stop: a stop string came; length: no more tokens were asked for or fit."""
    text: str | None
    """The new text, cut before the first stop string; None without a decoder."""


OnTokens = Callable[[int, list[int], str], None]


class Generator:
    """A model that is ready to generate. Generators of the same shape share what was compiled."""

    def __init__(self, config: ModelConfig, params: Any, *, vocab_size: int, eos_id: int | None):
        """Takes a model.

        Args:
          config: the model's shape.
          params: its parameters, without `nn.Partitioned` boxes, as in a train state; copied.
          vocab_size: of the tokenizer; the model's ids beyond it are never drawn.
          eos_id: the token that ends a document; None = there is none.

        Raises:
          UserError: the model's vocabulary has no row for some of these ids.
        """
        config = config.with_vocabulary(vocab_size)
        check(
            eos_id is None or 0 <= eos_id < vocab_size,
            f"eos_id is {eos_id}; the vocabulary's ids go from 0 to {vocab_size - 1}",
        )
        self.config, self.vocab_size, self.eos_id = config, vocab_size, eos_id
        self._model = Transformer(config)
        self._params = for_decoding(params, config)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        *,
        decode: Callable[[list[int]], str] | None = None,
        on_tokens: OnTokens | None = None,
    ) -> list[Generation]:
        """Continues every prompt.

        What follows a prompt depends on the seed, the prompt and how many equal prompts stand before it in the list,
        not on the rest of the batch (as far as a batch's size leaves float32 sums the same).

        Args:
          prompts: token ids; start them with the tokenizer's bos where there is no text to start from.
          sampling: how to choose tokens.
          decode: the tokenizer's, to make text and find stop strings.
          on_tokens: called with `(row, ids, text)` as tokens come; the pieces join to `Generation.ids` and
            `Generation.text`, which is why text that may yet turn into a stop string comes later than its tokens.

        Returns:
          One `Generation` a prompt, in order.

        Raises:
          UserError: no prompt, an empty one, an id outside the vocabulary, a prompt that leaves no room in the
            context, or stop strings without a decoder.
        """
        self._check_prompts(prompts)
        check(decode is not None or not sampling.stop, "stop strings need a tokenizer; give one or leave stop out")
        lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        limit = np.minimum(lengths + sampling.max_new_tokens, self.config.max_len).astype(np.int32)
        padded = np.zeros((len(prompts), bucket(int(lengths.max()), self.config.max_len)), np.int32)
        for index, prompt in enumerate(prompts):
            padded[index, : len(prompt)] = prompt
        acting = sampling.adjustments()
        eos = np.int32(-1 if sampling.ignore_eos or self.eos_id is None else self.eos_id)
        hashes, repeats = prompt_streams(prompts)
        rows = [_Row(list(prompt), sampling.stop, decode) for prompt in prompts]

        state = prefill(
            self._params,
            padded,
            lengths,
            np.uint32(sampling.seed),
            hashes,
            repeats,
            acting,
            config=self.config,
            length=bucket(int(limit.max()), self.config.max_len),
        )
        while not all(row.finished for row in rows):
            state["done"] = jnp.array([row.finished is not None for row in rows])
            state, tokens, logprobs = draw_chunk(
                self._params, state, limit, eos, acting, config=self.config, vocab_size=self.vocab_size, chunk=CHUNK
            )
            tokens, logprobs = jax.device_get((tokens, logprobs))
            for index, row in enumerate(rows):
                if row.finished:
                    continue
                new = tokens[index] >= 0
                check(
                    np.isfinite(logprobs[index][new]).all(),
                    f"prompt {index}: the model's logits are not finite; its parameters hold NaN or infinity",
                )
                ids, text = row.take(tokens[index][new].tolist(), logprobs[index][new].tolist(), int(eos), limit[index])
                if on_tokens is not None and (ids or text):
                    on_tokens(index, ids, text)
        return [row.generation() for row in rows]

    def _check_prompts(self, prompts: Sequence[Sequence[int]]) -> None:
        check(len(prompts) > 0, "there is no prompt; give at least one")
        for index, prompt in enumerate(prompts):
            check(len(prompt) > 0, f"prompt {index} has no token; start it with the tokenizer's bos_id")
            check(
                len(prompt) < self.config.max_len,
                f"prompt {index} has {len(prompt)} tokens; the model's context (model.max_len) is"
                f" {self.config.max_len}, new tokens included; shorten it to {self.config.max_len - 1} or fewer",
            )
            for token in prompt:
                if not 0 <= token < self.vocab_size:
                    raise UserError(
                        f"prompt {index} has token id {token}, outside the vocabulary;"
                        f" ids go from 0 to {self.vocab_size - 1}"
                    )


@functools.partial(jax.jit, static_argnames=("config", "length"))
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
) -> dict[str, Any]:
    """The state of `draw_chunk` before the first token.

    Args:
      params: from `for_decoding`.
      tokens: int32 `[B, P]`, prompts padded on the right.
      lengths: int32 `[B]`, of the prompts.
      seed: uint32.
      hashes: uint32 `[B]`, with `repeats` from `prompt_streams`.
      repeats: uint32 `[B]`.
      acting: the adjustments that `draw_chunk` will be given.
      config: the model's.
      length: slots of the cache.
    """
    B, P = tokens.shape
    at = jnp.broadcast_to(jnp.arange(P, dtype=jnp.int32), (B, P))
    cache = unstacked(init_cache(config, B, length), config.n_layers)
    _, cache = forward(Transformer(config), params, cache, tokens, at)
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
    return state


@functools.partial(jax.jit, static_argnames=("config", "vocab_size", "chunk"), donate_argnames="state")
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

    Returns:
      The new state, tokens int32 `[B, chunk]`, -1 where there is none, and their log-probabilities, float32.
    """
    model = Transformer(config)
    rows = jnp.arange(limit.shape[0])

    def step(carry: Any) -> Any:
        i, state, tokens, logprobs = carry
        at, done = state["at"] + 1, state["done"]
        hidden, cache = forward(model, params, state["cache"], state["token"][:, None], state["at"][:, None])
        logits: Any = model.apply({"params": params}, hidden[:, 0], method="logits")
        keys = jax.vmap(jax.random.fold_in)(state["keys"], at)
        token = draw(adjust(mask_padding(logits, vocab_size), state.get("seen"), acting), keys, acting)
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
) -> tuple[Array, list[Any]]:
    """`Transformer.hidden` with a list of layers, for parameters from `for_decoding`.

    Slices of stacked layers would be copied for every token, the cache's along with the parameters': 1.7 times slower.

    Args:
      model: the model.
      params: from `for_decoding`.
      cache: one of each layer; of an encoder-decoder with what `cross_cache` makes.
      tokens: int32 `[B, T]`.
      at: int32 `[B, T]`, their places, which are also their slots of the cache.
      prefix: int32 `[B, T]`, 1 = of a prefix that sees itself to both sides, all of which is here; or None.
      source_segments: int32 `[B, S]`, 0 = padding of the source, which is not seen; or None.

    Returns:
      `[B, T, D]` and the new cache.
    """
    reach = cache[0]["key"].shape[-2]
    read: Any = model.apply({"params": params}, tokens, at, reach=reach, method="embedded")
    x, context = read
    context = dataclasses.replace(context, prefix=prefix, cache_at=at, source_segments=source_segments)
    block: Any = Block(model.config)
    filled = []
    for layer, slots in zip(params["layers"], cache):
        x, slots = block.apply({"params": layer}, x, slots, context, True)
        filled.append(slots)
    hidden: Any = model.apply({"params": params}, x, method="normed")
    return hidden, filled


def bucket(length: int, most: int) -> int:
    """`length` rounded up to a power of two, at least 64, but never above `most`."""
    return min(max(SMALLEST_BUCKET, 1 << (length - 1).bit_length()), most)


@functools.partial(jax.jit, static_argnames="config")
def for_decoding(params: Any, config: ModelConfig) -> Any:
    """Parameters as decoding wants them: a list of layers, and cast once to the dtype that they are used in."""
    # Norms compute in float32 and keep the dtype that they have.
    keep = tree.match_patterns(params, [(r".*norm/.*", True), (r".*", False)])
    params = jax.tree.map(lambda x, kept: x if kept else jnp.asarray(x, config.compute_dtype), params, keep)
    return params | {"layers": unstacked(params["layers"], config.n_layers)}


def unstacked(layers: Any, count: int) -> list[Any]:
    """A tree of `[L, ...]` as a list of L trees."""
    return [jax.tree.map(lambda x: x[layer], layers) for layer in range(count)]  # noqa: B023


def prompt_streams(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """What tells the random streams of prompts apart: a hash of each, and how many equal ones come before it."""
    counts: dict[tuple[int, ...], int] = {}
    hashes, repeats = [], []
    for prompt in map(tuple, prompts):
        hashes.append(zlib.crc32(np.array(prompt, "<i4").tobytes()))
        repeats.append(counts.get(prompt, 0))
        counts[prompt] = repeats[-1] + 1
    return np.array(hashes, np.uint32), np.array(repeats, np.uint32)


class _Row:
    """The host's side of one prompt: its tokens so far, its text, and whether it is finished."""

    def __init__(self, prompt: list[int], stop: tuple[str, ...], decode: Callable[[list[int]], str] | None):
        self.prompt, self.stop, self.decode = prompt, stop, decode
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.finished: Finished | None = None
        self.text = ""  # final: given out already, or about to be
        # Decoded with the prompt in front, since some tokenizers drop the space before the first token.
        self.before = len(decode(prompt).rstrip("\ufffd")) if decode else 0

    def take(self, ids: list[int], logprobs: list[float], eos: int, limit: int) -> tuple[list[int], str]:
        """Adds tokens; returns those that count, and the text that is now certain."""
        first = len(self.ids)
        ended = bool(ids) and ids[-1] == eos
        self.ids += ids[:-1] if ended else ids
        if ended:
            self.finished = "eos"
        elif len(self.prompt) + len(self.ids) >= limit:
            self.finished = "length"
        text = self._decoded(len(self.ids))
        if self._stop_at(text) is not None:
            self.finished = "stop"
            # Of this chunk, the tokens up to the one that completes the stop string.
            while len(self.ids) - 1 > first and self._stop_at(self._decoded(len(self.ids) - 1)) is not None:
                self.ids.pop()
            text = text[: self._stop_at(text)]
        elif self.finished is None:
            text = text[: self._certain(text)]
        self.logprobs += logprobs[: len(self.ids) - first]
        new = text[len(self.text) :]
        self.text += new
        return self.ids[first:], new

    def generation(self) -> Generation:
        """The result, once finished."""
        assert self.finished is not None
        text = self.text if self.decode else None
        return Generation(
            prompt_ids=self.prompt, ids=self.ids, logprobs=self.logprobs, finished=self.finished, text=text
        )

    def _decoded(self, count: int) -> str:
        return self.decode(self.prompt + self.ids[:count])[self.before :] if self.decode else ""

    def _stop_at(self, text: str) -> int | None:
        found = [at for stop in self.stop if (at := text.find(stop)) >= 0]
        return min(found, default=None)

    def _certain(self, text: str) -> int:
        """Length of the part that no further token can change: before a cut character or the start of a stop string."""
        end = len(text.rstrip("\ufffd"))
        for stop in self.stop:
            for size in range(min(len(stop) - 1, end), 0, -1):
                if text.endswith(stop[:size]):
                    end = min(end, len(text) - size)
                    break
        return end
