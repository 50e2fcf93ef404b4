"""Beam search: the likeliest texts, all in one compiled loop."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from lm.generate.decode import forward
from lm.generate.sampling import ban_repeats, mask_padding
from lm.models.transformer import ModelConfig, Transformer

Array = jax.Array


@functools.partial(jax.jit, static_argnames=("config", "vocab_size", "beams", "no_repeat"))
def search(
    params: Any,
    state: dict[str, Any],
    limit: Array,
    eos: Array,
    length_penalty: Array,
    n_best: Array,
    *,
    config: ModelConfig,
    vocab_size: int,
    beams: int,
    no_repeat: int = 0,
) -> tuple[Array, Array, Array, Array]:
    """The best continuations of each row.

    Of each row, `beams` unfinished texts are alive. Each step takes the best `2 * beams` of all their continuations by
    log-probability: those that end join the finished ones, of which the best `beams` by score are kept, and the best
    `beams` of the others live on. A text ends with `eos` or at the limit; its score is its log-probability over
    `((5 + n) / 6) ** length_penalty` of its n new tokens (arXiv:1609.08144, section 7), its end included. A row is
    done when no living text can become better than the `n_best`-th finished one: log-probabilities only fall.

    Letters: `B` rows, `K` beams, `M` slots of the cache, `V` vocabulary.

    Args:
      params: from `for_decoding`.
      state: from `prefill` with a history, and `done`, bool `[B]`, rows to leave alone.
      limit: int32 `[B]`, tokens of each row at most, prompt included.
      eos: int32, the token that ends a text; -1 = none.
      length_penalty: float32, not negative.
      n_best: int32, how many of the finished texts matter.
      config: the model's.
      vocab_size: the tokenizer's.
      beams: K.
      no_repeat: as in `draw_chunk`.

    Returns:
      The finished texts of each row, best first: tokens int32 `[B, K, M]`, prompt included, and the log-probabilities
      of the new ones at the same places, float32; where each ends, its `eos` included, int32 `[B, K]`; and its score,
      float32 `[B, K]`, minus infinity where there are not so many.
    """
    model, K = Transformer(config), beams
    B, M = state["history"].shape
    rows, prompt = jnp.arange(B), state["at"] + 1

    def penalty(tokens: Array) -> Array:
        return ((5.0 + tokens.astype(jnp.float32)) / 6.0) ** length_penalty

    def step(carry: Any) -> Any:
        old, at = carry["alive"], carry["at"] + 1
        token = jnp.take_along_axis(old["tokens"], carry["at"][:, None, None], axis=2).reshape(B * K, 1)
        before = jnp.repeat(carry["at"], K)
        hidden, cache = forward(
            model, params, join(carry["cache"], sources), token, before[:, None], source_segments=segments
        )
        logits: Any = model.apply({"params": params}, hidden[:, 0], method="logits")
        logprobs = jax.nn.log_softmax(logits)
        V = logprobs.shape[-1]
        allowed = mask_padding(logprobs, vocab_size)
        if no_repeat:
            allowed = ban_repeats(allowed, old["tokens"].reshape(B * K, M), before, no_repeat, eos)
        totals = old["total"][:, :, None] + allowed.reshape(B, K, V)
        total, index = jax.lax.top_k(totals.reshape(B, K * V), 2 * K)
        beam, token = index // V, (index % V).astype(jnp.int32)

        def put(x: Array, new: Array) -> Array:
            """What was kept of the parents, `[B, K, M]`, as that of their children, `[B, 2K, M]`."""
            x = jnp.take_along_axis(x, beam[:, :, None], axis=1)
            return x.at[rows[:, None], jnp.arange(2 * K), at[:, None]].set(new, mode="drop")

        children = {
            "tokens": put(old["tokens"], token),
            "logprobs": put(old["logprobs"], jnp.take_along_axis(logprobs.reshape(B, K * V), index, axis=1)),
            "end": jnp.broadcast_to(at[:, None] + 1, (B, 2 * K)),
        }
        last = at + 1 >= limit
        ended = (token == eos) | last[:, None]
        score = jnp.where(ended, total / penalty(at + 1 - prompt)[:, None], -jnp.inf)
        finished = best(children | {"score": score}, "score", K, carry["finished"])
        alive = best(children | {"total": jnp.where(ended, -jnp.inf, total), "beam": beam}, "total", K)
        parents = (rows[:, None] * K + alive.pop("beam")).reshape(B * K)

        # The best score that a living text can come to: nothing lost any more, at the length that favours it most.
        hope = alive["total"].max(axis=1) / penalty(limit - prompt)
        new = {"alive": alive, "finished": finished, "at": at}
        kept = {name: carry[name] for name in new}
        new = jax.tree.map(lambda n, o: jnp.where(carry["done"].reshape(B, *[1] * (n.ndim - 1)), o, n), new, kept)
        return new | {
            # A row that is done goes on with a cache of no meaning, which nothing reads.
            "cache": jax.tree.map(lambda x: x[parents], split(cache)[0]),
            "done": carry["done"] | last | (finished["score"][:, n_best - 1] >= hope),
        }

    # A row's texts share its source, so that only the cache of what they say themselves moves with them.
    cache, sources, segments = jax.tree.map(
        lambda x: jnp.repeat(x, K, axis=0), (*split(state["cache"]), state.get("source_segments"))
    )
    nothing = {
        "tokens": jnp.broadcast_to(state["history"][:, None], (B, K, M)),
        "logprobs": jnp.zeros((B, K, M), jnp.float32),
        "end": jnp.broadcast_to(prompt[:, None], (B, K)),
    }
    # At first there is one text: the others, which would be the same, are no choice.
    first = jnp.where(jnp.arange(K) == 0, 0.0, -jnp.inf)
    start = {
        "alive": nothing | {"total": jnp.broadcast_to(first, (B, K))},
        "finished": nothing | {"score": jnp.full((B, K), -jnp.inf)},
        "at": state["at"],
        "cache": cache,
        "done": state["done"],
    }
    found = jax.lax.while_loop(lambda carry: ~carry["done"].all(), step, start)["finished"]
    return found["tokens"], found["logprobs"], found["end"], found["score"]


def split(cache: list[dict[str, Array]]) -> tuple[list[dict[str, Array]], list[dict[str, Array]]]:
    """A cache as what it holds of the texts, and what of their sources."""
    of_source = [{name: x for name, x in layer.items() if name.startswith("source_")} for layer in cache]
    return [{n: x for n, x in layer.items() if n not in of_source[0]} for layer in cache], of_source


def join(cache: list[dict[str, Array]], sources: list[dict[str, Array]]) -> list[dict[str, Array]]:
    """The cache that was split."""
    return [layer | of_source for layer, of_source in zip(cache, sources)]


def best(texts: dict[str, Array], by: str, count: int, others: dict[str, Array] | None = None) -> dict[str, Array]:
    """The `count` texts of each row that are highest in `by`, in falling order: `[B, N, ...]` to `[B, count, ...]`.

    `others` are further texts to choose from, with the same entries; they come first where two are equal.
    """
    if others is not None:
        texts = {name: jnp.concatenate([others[name], texts[name]], axis=1) for name in texts}
    _, chosen = jax.lax.top_k(texts[by], count)
    return {
        name: jnp.take_along_axis(x, chosen.reshape(*chosen.shape, *[1] * (x.ndim - 2)), axis=1)
        for name, x in texts.items()
    }
