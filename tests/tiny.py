"""Small models and batches that several tests share."""

import functools
import itertools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lm.models.transformer import ModelConfig, Transformer


def fast(cases: Iterable[Any], *chosen: Any) -> list[Any]:
    """Cases (tuples where a test takes several) of a parametrised test: those not chosen are marked slow."""
    cases = list(cases)
    assert set(chosen) <= set(cases)
    values = {case: case if isinstance(case, tuple) else (case,) for case in cases}
    return [pytest.param(*values[case], marks=() if case in chosen else pytest.mark.slow) for case in cases]


def config(**changes: Any) -> ModelConfig:
    """Two layers of width 32; the attention that compiles fastest."""
    small = {
        "vocab_size": 64,
        "d_model": 32,
        "n_layers": 2,
        "n_heads": 4,
        "d_ff": 48,
        "max_len": 32,
        "attention": "xla",
    }
    return ModelConfig(**(small | changes))


def build(model_config: ModelConfig, seed: int = 0) -> tuple[Transformer, Any]:
    """A model and parameters of the sizes they begin with, drawn by numpy: `init` takes seconds to compile."""
    model = Transformer(model_config)
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: Any) -> jax.Array:
        name = path[-1].key
        if name in ("scale", "bias"):
            return jnp.full(leaf.shape, float(name == "scale"), leaf.dtype)
        return jnp.asarray(model_config.init_std * rng.standard_normal(leaf.shape), leaf.dtype)

    return model, jax.tree_util.tree_map_with_path(draw, shapes)


def init(model_config: ModelConfig, seed: int = 0) -> Any:
    """Initial parameters as a run has them."""
    return _compiled_init(model_config)(seed)


@functools.cache
def _compiled_init(model_config: ModelConfig):
    model = Transformer(model_config)
    tokens = jnp.zeros((1, 1), jnp.int32)
    return jax.jit(lambda seed: nn.unbox(model.init(jax.random.key(seed), tokens)["params"]))


def perturbed(params: Any, seed: int = 0, scale: float = 0.2) -> Any:
    """Parameters away from their initial values, so that no bias is 0 and no scale is 1."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: p + jnp.asarray(scale * rng.standard_normal(p.shape), p.dtype), params)


def stream_batch(rows: int, length: int, vocab: int, seed: int = 0) -> dict[str, np.ndarray]:
    """A batch without documents to separate, everything scored."""
    tokens = np.random.default_rng(seed).integers(0, vocab, (rows, length + 1), dtype=np.int32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length)).copy()
    weights = np.ones((rows, length), np.float32)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": weights, "positions": positions}


def packed_batch(rows: int, length: int, vocab: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Rows of two or three documents and padding; weights of many sizes, rows of unequal weight, one row of none."""
    rng = np.random.default_rng(seed)
    batch = stream_batch(rows, length, vocab, seed)
    batch["segments"] = np.zeros((rows, length), np.int32)
    batch["weights"] = rng.uniform(0.1, 2.0, (rows, length)).astype(np.float32)
    for row in range(rows):
        cuts = np.sort(rng.choice(np.arange(1, length), 3, replace=False))
        edges = [0, *cuts[: 2 + row % 2], length if row % 3 == 0 else cuts[-1]]
        for number, (start, stop) in enumerate(itertools.pairwise(edges), start=1):
            batch["segments"][row, start:stop] = number
            batch["positions"][row, start:stop] = np.arange(stop - start)
            batch["weights"][row, stop - 1 : stop] = 0  # a document's last token predicts nothing
    batch["weights"][batch["segments"] == 0] = 0
    batch["positions"][batch["segments"] == 0] = 0
    batch["weights"][-1] = 0
    return batch


def relative(a: Any, b: Any) -> float:
    """Largest difference, relative to the largest value."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.max(np.abs(a - b)) / max(np.max(np.abs(b)), 1e-30))


def assert_trees_close(a: Any, b: Any, tolerance: float) -> None:
    """Every leaf within `tolerance` of its counterpart's largest value.

    Or of a hundredth of the largest anywhere: where a gradient is 0 in exact arithmetic, only noise is left.
    """
    assert jax.tree.structure(a) == jax.tree.structure(b)
    largest = max(float(np.max(np.abs(np.asarray(y, np.float64)))) for y in jax.tree.leaves(b))
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b)):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        scale = max(np.max(np.abs(y)), largest / 100)
        assert np.max(np.abs(x - y)) <= tolerance * scale, jax.tree_util.keystr(path)


def assert_trees_equal(a: Any, b: Any) -> None:
    """Every leaf the same to the bit."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b)):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=jax.tree_util.keystr(path))
