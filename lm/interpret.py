"""What a model looks at and what it carries from layer to layer, for study: slow, and of one batch at a time."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.errors import check
from lm.models.blocks import INTERMEDIATES
from lm.models.transformer import Transformer

READ = ("tokens", "positions", "segments", "types", "prefix", "source_tokens", "source_positions", "source_segments")


@dataclass(frozen=True, kw_only=True)
class Captured:
    """What went on inside a model while it read one batch, without dropout."""

    attention: dict[str, np.ndarray]
    """Float32 probabilities `[L, B, N, T, S]`, of queries (T) over keys (S): `self` of the decoder or the only stack,
    and of an encoder-decoder `encoder` (`[L, B, N, S, S]`) and `cross`. A row sums to 1, or is all 0 where a query may
    see nothing."""
    hidden: np.ndarray
    """`[L + 1, B, T, D]` in the compute dtype: what the first layer reads, then what each layer writes. With norms
    before the blocks, the last has not been through the final norm."""
    encoder_hidden: np.ndarray | None
    """The same of an encoder-decoder's encoder, `[L + 1, B, S, D]`; None without one."""


def capture(model: Transformer, params: Any, batch: Mapping[str, Any]) -> Captured:
    """Runs a model over a batch and keeps the attention probabilities and the residual stream of every layer.

    The probabilities are those of attention written out in float32, whichever implementation the model trains with.

    Args:
      model: the Transformer.
      params: its parameters, without `nn.Partitioned` boxes.
      batch: `tokens` int32 `[B, T]` and, where the model's task has them, `positions`, `segments`, `types`, `prefix`,
        `source_tokens` int32 `[B, S]`, `source_positions` and `source_segments`; everything else is left alone.

    Returns:
      Arrays in host memory.

    Raises:
      UserError: no tokens, no source for an encoder-decoder, or a model with a learned prompt.
    """
    check("tokens" in batch, "the batch has no tokens; there is nothing to read")
    check(
        not model.config.prompt_len,
        f"the model has a learned prompt of {model.config.prompt_len} vectors (model.prompt_len), which are no tokens"
        " to be shown; look at the run it was begun with",
    )
    inputs = {name: np.asarray(batch[name]) for name in READ if name in batch}
    check(
        not model.config.encoder_layers or "source_tokens" in inputs,
        "the model is an encoder-decoder (model.encoder_layers), and the batch has no source_tokens",
    )

    def read(params: Any, inputs: dict[str, Any]) -> Any:
        found = _intermediates(model, params, inputs)
        attention = {"self": found["layers"]["attention"]["probabilities"]}
        if model.config.encoder_layers:
            attention["encoder"] = found["encoder_layers"]["attention"]["probabilities"]
            attention["cross"] = found["layers"]["cross_attention"]["probabilities"]
        return attention, _streams(model, found)

    attention, streams = jax.device_get(jax.jit(read)(params, inputs))
    hidden, encoder_hidden = streams["layers"], streams.get("encoder_layers")
    return Captured(attention=attention, hidden=hidden, encoder_hidden=encoder_hidden)


def residual_stream(model: Transformer, params: Any, inputs: Mapping[str, Any]) -> dict[str, jax.Array]:
    """What goes from layer to layer, to be jitted, on any mesh.

    Args:
      model: the Transformer.
      params: its parameters, without `nn.Partitioned` boxes.
      inputs: arrays of a batch whose names stand in `READ`.

    Returns:
      `[L + 1, B, T, D]` in the compute dtype for each stack, `encoder_layers` and `layers`, tokens in their own order.
    """
    return _streams(model, _intermediates(model, params, inputs))


def _intermediates(model: Transformer, params: Any, inputs: Mapping[str, Any]) -> Any:
    _, found = model.apply({"params": params}, **inputs, mutable=[INTERMEDIATES], method=_hidden)
    return found[INTERMEDIATES]


def _streams(model: Transformer, found: Any) -> dict[str, jax.Array]:
    firsts = {"encoder_layers": "encoder_embedded"} if model.config.encoder_layers else {}
    firsts["layers"] = "embedded"
    return {layers: jnp.concatenate([found[first][None], found[layers]["hidden"]]) for layers, first in firsts.items()}


def _hidden(
    model: Transformer,
    tokens: Any,
    source_tokens: Any = None,
    source_positions: Any = None,
    source_segments: Any = None,
    **inputs: Any,
) -> Any:
    """The whole model up to its heads."""
    source = None
    if source_tokens is not None:
        source = model.encode(source_tokens, source_positions, source_segments)
    return model.hidden(tokens, **inputs, source=source, source_segments=source_segments)
