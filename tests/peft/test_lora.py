"""Low-rank terms put into the matrices they stand beside, and taken out again."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
import tiny

from lm import tree
from lm.models.lora import LoraConfig
from lm.models.transformer import ModelConfig, Transformer
from lm.peft import merged, unmerged

TOKENS = np.random.default_rng(1).integers(1, 64, (2, 9), np.int32)
FAMILIES = {
    "gpt": {},
    "llama": {"positions": "rope", "norm": "rmsnorm", "activation": "swiglu", "use_bias": False, "n_kv_heads": 2},
    "t5": {"encoder_layers": 3, "positions": "relative", "norm": "rmsnorm", "use_bias": False},
}


def noisy(config: ModelConfig) -> Any:
    rng = np.random.default_rng(7)
    params = tiny.build(config)[1]
    return jax.tree.map(lambda p: p + (0.2 * rng.standard_normal(p.shape)).astype(p.dtype), params)


def logits(config: ModelConfig, params: Any) -> np.ndarray:
    source = {"source_tokens": TOKENS} if config.encoder_layers else {}
    return np.asarray(Transformer(config).apply({"params": params}, TOKENS, **source))


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_computes_the_same(family: str) -> None:
    config = tiny.config(**FAMILIES[family], lora=LoraConfig(rank=3, alpha=2.0, targets=".*"))
    params = noisy(config)
    plain, whole = merged(config, params)
    assert plain == dataclasses.replace(config, lora=LoraConfig())
    shapes = tree.path_leaves(jax.eval_shape(lambda: tiny.build(plain)[1]))
    assert [(path, leaf.shape) for path, leaf in tree.path_leaves(whole)] == [(p, s.shape) for p, s in shapes]
    np.testing.assert_allclose(logits(plain, whole), logits(config, params), atol=2e-5)
    for path, leaf in tree.path_leaves(whole):
        if not path.endswith("kernel"):
            np.testing.assert_array_equal(leaf, dict(tree.path_leaves(params))[path], err_msg=path)


def test_a_merged_kernel_in_float64() -> None:
    config = tiny.config(lora=LoraConfig(rank=3, alpha=2.0, targets=".*(out|up)"))
    params = noisy(config)
    found = dict(tree.path_leaves(merged(config, params)[1]))
    values = {path: np.asarray(leaf, np.float64) for path, leaf in tree.path_leaves(params)}
    for name, term in (("attention/out", "LNHr,LrD->LNHD"), ("mlp/up", "LDr,LrF->LDF")):
        a, b = (values[f"layers/{name}/{factor}/kernel"] for factor in ("lora_a", "lora_b"))
        wanted = values[f"layers/{name}/kernel"] + 2 / 3 * np.einsum(term, a, b)
        np.testing.assert_allclose(found[f"layers/{name}/kernel"], wanted, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(found["layers/mlp/down/kernel"], params["layers"]["mlp"]["down"]["kernel"])


def test_unmerged_is_what_it_was() -> None:
    config = tiny.config(lora=LoraConfig(rank=2, targets=".*"))
    params = noisy(config)
    again = unmerged(config, merged(config, params)[1], params)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    for (path, leaf), (_, was) in zip(tree.path_leaves(again), tree.path_leaves(params), strict=True):
        np.testing.assert_allclose(leaf, was, atol=1e-6, err_msg=path)


def test_half_precision_rounds_the_sum_once() -> None:
    config = tiny.config(param_dtype="bfloat16", lora=LoraConfig(rank=2, targets=".*up"))
    params = noisy(config)
    up = params["layers"]["mlp"]["up"]
    wanted = np.asarray(up["kernel"], np.float32) + 8 * np.asarray(up["lora_a"]["kernel"] @ up["lora_b"]["kernel"])
    found = merged(config, params)[1]["layers"]["mlp"]["up"]["kernel"]
    assert found.dtype == "bfloat16"
    np.testing.assert_array_equal(found, wanted.astype(found.dtype))
