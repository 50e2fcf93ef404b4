"""LoRA's terms (arXiv:2106.09685) added to the matrices that they stand beside, and taken out again."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from lm.models.config import ModelConfig
from lm.models.lora import LoraConfig
from lm.tree import STACKS

FACTORS = ("lora_a", "lora_b")


def merged(config: ModelConfig, params: Any) -> tuple[ModelConfig, Any]:
    """The same model without low-rank terms: each is added to its kernel, in float32, and rounded to its precision.

    Args:
      config: the model's.
      params: its parameters.

    Returns:
      The model without `lora`, and its parameters; those that have no term are the same arrays.
    """
    return dataclasses.replace(config, lora=LoraConfig()), _walk(params, config.lora, 1.0)


def unmerged(config: ModelConfig, params: Any, terms: Any) -> Any:
    """The parameters before `merged`: the terms are subtracted from the kernels and stand beside them again.

    Kernels that were rounded come back as near as their precision allows, not to the bit.

    Args:
      config: the model's, with its `lora`.
      params: from `merged`.
      terms: a tree that holds `lora_a` and `lora_b` at their places, such as the parameters that were merged.
    """
    return _walk(params, config.lora, -1.0, terms)


def _walk(node: Any, lora: LoraConfig, sign: float, terms: Any = None, stacked: bool = False) -> Any:
    """A subtree with its terms added; where `terms` are given, with those."""
    found = node if terms is None else terms
    if not isinstance(node, dict):
        return node
    made = {
        name: _walk(child, lora, sign, None if terms is None else terms[name], stacked or name in STACKS)
        for name, child in node.items()
        if name not in FACTORS
    }
    if FACTORS[0] in found:
        a, b = (found[name]["kernel"] for name in FACTORS)
        made["kernel"] = _sum(made["kernel"], a, b, sign * lora.scale, stacked=stacked)
        if terms is not None:
            made |= {name: found[name] for name in FACTORS}
    return made


@functools.partial(jax.jit, static_argnames="stacked")
def _sum(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float, *, stacked: bool) -> jax.Array:
    """`kernel + scale * a b`: `[L, *in, *out]`, `[L, *in, r]` and `[L, r, *out]`, or all without L."""
    rank = a.shape[-1]

    def one(kernel: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        term = scale * (a.reshape(-1, rank) @ b.reshape(rank, -1)).reshape(kernel.shape)
        return (kernel.astype(jnp.float32) + term).astype(kernel.dtype)

    return (jax.vmap(one) if stacked else one)(kernel, a, b)
