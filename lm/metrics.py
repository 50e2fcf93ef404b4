"""Metrics as sums and weights: added up over batches, devices and hosts, divided once at the end."""

import math
from collections.abc import Mapping


def summarise(sums: Mapping[str, float]) -> dict[str, float]:
    """Turns the sums of a language-model loss into what is reported.

    Args:
      sums: `loss` (nats), `correct` and `weight` (scored tokens), each added over all tokens.

    Returns:
      `loss` (nats per token), `perplexity` and `accuracy` (share of tokens whose highest logit was right).
    """
    weight = sums["weight"]
    loss = sums["loss"] / weight if weight else math.nan
    return {
        "loss": loss,
        "perplexity": perplexity(loss),
        "accuracy": sums["correct"] / weight if weight else math.nan,
    }


def perplexity(loss: float) -> float:
    """`exp` of nats per token; infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def bits_per_byte(loss: float, tokens: float, n_bytes: float) -> float:
    """Nats per token as bits per byte of the text that those tokens spell: comparable across tokenizers."""
    return loss * tokens / (n_bytes * math.log(2))
