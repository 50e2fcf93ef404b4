"""Norms, positions, activations and projections against their formulas in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.models import layers
from lm.models.layers import ACTIVATIONS, Dense, Embed, Head, Mlp, Norm

pytestmark = pytest.mark.usefixtures("strict_promotion")

F32 = jnp.dtype("float32")
BF16 = jnp.dtype("bfloat16")
X = np.random.default_rng(0).standard_normal((2, 5, 8)).astype(np.float32)
ONES = jax.nn.initializers.normal(1.0)

erf = np.vectorize(math.erf)
FORMULAS = {
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: x * 0.5 * (1 + erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "tanh": np.tanh,
}


def test_every_activation_has_a_formula_here():
    assert set(FORMULAS) == set(ACTIVATIONS)


@pytest.mark.parametrize("name", sorted(FORMULAS))
def test_activation(name):
    x = np.linspace(-6, 6, 101)
    np.testing.assert_allclose(ACTIVATIONS[name](jnp.float32(x)), FORMULAS[name](x), atol=1e-6)


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("use_bias", [True, False])
def test_norm(kind, use_bias):
    x = X * 3 + 1
    norm = Norm(kind, 1e-3, use_bias, F32, F32)
    scale, bias = np.arange(1.0, 9.0, dtype=np.float32), np.linspace(-1, 1, 8, dtype=np.float32)
    params = {"scale": scale} | ({"bias": bias} if use_bias and kind == "layernorm" else {})
    assert set(norm.init(jax.random.key(0), x)["params"]) == set(params)

    y = x.astype(np.float64)
    if kind == "layernorm":
        y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-3)
    else:
        y = y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-3)
    y = y * scale + params.get("bias", 0)
    np.testing.assert_allclose(norm.apply({"params": params}, x), y, atol=1e-5)


def test_norm_of_large_bfloat16_values_is_computed_in_float32():
    x = jnp.asarray(X * 3 + 200, BF16)
    y = Norm("layernorm", 1e-5, False, BF16, F32).apply({"params": {"scale": np.ones(8, np.float32)}}, x)
    assert y.dtype == BF16
    exact = np.asarray(x, np.float64)
    exact = (exact - exact.mean(-1, keepdims=True)) / np.sqrt(exact.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(np.asarray(y, np.float64), exact, atol=0.02)


def test_rotary_positions_turn_complex_numbers():
    positions = np.array([[0, 1, 2, 7, 100], [3, 0, 0, 5, 31]], np.int32)
    heads, width, theta = 3, 8, 10_000.0
    x = np.random.default_rng(1).standard_normal((2, 5, heads, width)).astype(np.float32)
    out = layers.rotate(x, layers.rotary_angles(positions, width, theta))

    half = width // 2
    numbers = x[..., :half] + 1j * x[..., half:].astype(np.float64)
    rates = np.array([theta ** (-2 * i / width) for i in range(half)])
    turned = numbers * np.exp(1j * positions[:, :, None, None] * rates)
    np.testing.assert_allclose(out, np.concatenate([turned.real, turned.imag], axis=-1), atol=2e-5)


def test_rotary_scores_depend_on_distance_only():
    rng = np.random.default_rng(2)
    query, key = (np.tile(rng.standard_normal((1, 1, 1, 8)), (1, 6, 1, 1)).astype(np.float32) for _ in range(2))

    def scores(shift: int) -> np.ndarray:
        angles = layers.rotary_angles(np.arange(6, dtype=np.int32)[None] + np.int32(shift), 8, 100.0)
        return np.einsum("BTNH,BSNH->TS", layers.rotate(query, angles), layers.rotate(key, angles))

    np.testing.assert_allclose(scores(0), scores(40), atol=1e-4)
    assert np.ptp(np.diagonal(scores(0), 1)) < 1e-5
    assert np.ptp(scores(0)[0]) > 0.1


@pytest.mark.parametrize("d_model", [8, 7])
def test_sinusoidal_positions_are_the_papers(d_model):
    positions = np.array([[0, 1, 2, 50], [9, 8, 7, 1000]], np.int32)
    expected = np.zeros((2, 4, d_model))
    for row, column in np.ndindex(positions.shape):
        for i in range(d_model):
            angle = positions[row, column] / 10_000 ** ((i - i % 2) / d_model)
            expected[row, column, i] = np.cos(angle) if i % 2 else np.sin(angle)
    np.testing.assert_allclose(layers.sinusoidal(positions, d_model), expected, atol=1e-4)


@pytest.mark.parametrize("use_bias", [True, False])
def test_dense_maps_the_trailing_axes(use_bias):
    x = X.reshape(2, 5, 4, 2)
    dense = Dense((3, 6), ("heads", "head_dim", "mlp", None), use_bias, ONES, F32, F32, n_in=2)
    params = dense.init(jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda p: p.unbox() + 1, params, is_leaf=lambda p: hasattr(p, "unbox"))
    expected = np.einsum("btij,ijkl->btkl", x, params["kernel"]) + (params["bias"] if use_bias else 0)
    assert ("bias" in params) == use_bias
    np.testing.assert_allclose(dense.apply({"params": params}, x), expected, atol=1e-5)


@pytest.mark.parametrize("activation", ["gelu_tanh", "relu", "swiglu", "geglu"])
def test_feed_forward(activation):
    mlp = Mlp(12, activation, True, ONES, ONES, F32, F32)
    params = jax.tree.map(
        lambda p: p.unbox() + 0.1, mlp.init(jax.random.key(0), X)["params"], is_leaf=lambda p: hasattr(p, "unbox")
    )

    def project(name: str, x: np.ndarray) -> np.ndarray:
        return x @ np.asarray(params[name]["kernel"], np.float64) + np.asarray(params[name]["bias"], np.float64)

    if activation in ("swiglu", "geglu"):
        gate = FORMULAS["silu" if activation == "swiglu" else "gelu"](project("gate", X))
        hidden = gate * project("up", X)
    else:
        hidden = FORMULAS[activation](project("up", X))
        assert "gate" not in params
    np.testing.assert_allclose(mlp.apply({"params": params}, X), project("down", hidden), rtol=1e-4, atol=1e-3)


def test_embedding_reads_rows_and_scores_against_them():
    table = np.random.default_rng(3).standard_normal((10, 8)).astype(np.float32)
    embed = Embed(10, 8, ("vocab", "embed"), ONES, F32, F32)
    variables = {"params": {"embedding": table}}
    ids = np.array([[0, 9, 3]], np.int32)
    np.testing.assert_array_equal(embed.apply(variables, ids), table[ids])
    np.testing.assert_allclose(embed.apply(variables, X, method="attend"), X @ table.T, atol=1e-5)


def test_half_precision_scores_are_float32_and_more_than_half_precise():
    """Operands are bfloat16, their sums are not."""
    x = jnp.asarray(np.random.default_rng(4).standard_normal((3, 512)), BF16)
    kernel = np.random.default_rng(5).standard_normal((512, 7)).astype(np.float32)
    out = Head(7, ONES, BF16, F32).apply({"params": {"kernel": kernel}}, x)
    assert out.dtype == F32
    exact = np.asarray(x, np.float64) @ np.asarray(jnp.asarray(kernel, BF16), np.float64)
    np.testing.assert_allclose(out, exact, atol=1e-3)


def test_distances_fall_into_t5s_buckets():
    """Of 32 for both sides: 8 of one distance each, then ranges up to 128, and 16 further on for later keys."""
    edges = [8, 12, 16, 23, 32, 46, 64, 91]  # 8 * 16 ** (i / 8), rounded up: where bucket 8 + i begins
    both = layers.distance_buckets(np.arange(-300, 301), 32, 128, True)
    for distance, bucket in zip(range(-300, 301), both):
        away = abs(distance)
        expected = away if away < 8 else 7 + sum(away >= edge for edge in edges)
        assert bucket == expected + 16 * (distance > 0), distance
    one = layers.distance_buckets(np.arange(-300, 301), 32, 128, False)
    edges = [math.ceil(round(16 * 8 ** (i / 16), 9)) for i in range(16)]
    for distance, bucket in zip(range(-300, 301), one):
        away = max(-distance, 0)
        assert bucket == (away if away < 16 else 15 + sum(away >= edge for edge in edges)), distance


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 4), (4, 1), (5, 5), (3, 7), (7, 2)])
def test_distances_spread_over_queries_and_keys(rows, columns):
    by_distance = np.random.default_rng(0).standard_normal((2, rows + columns - 1)).astype(np.float32)
    matrix = layers.spread(by_distance, rows)
    assert matrix.shape == (1, 2, rows, columns)
    for t, s in np.ndindex(rows, columns):
        np.testing.assert_array_equal(matrix[0, :, t, s], by_distance[:, s - t + rows - 1])


@pytest.mark.parametrize("both_sides", [True, False])
def test_relative_bias_reads_its_table_by_distance(both_sides):
    bias = layers.RelativeBias(8, 10, 3, both_sides, ONES, F32)
    table = np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32)
    out = bias.apply({"params": {"embedding": table}}, 6)
    assert out.shape == (3, 11)
    assert out.dtype == F32
    rows = layers.distance_buckets(np.arange(-5, 6), 8, 10, both_sides)
    np.testing.assert_array_equal(out, table[rows].T)
