"""Every implementation of attention against plain float64 numpy, and what no query may ever see."""

import logging
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.models import attention
from lm.models.attention import attention_mask, choose_implementation, softmax_attention

pytestmark = pytest.mark.usefixtures("strict_promotion")
ON_CPU = ("xla", "blocked")
STATIC = ("implementation", "causal", "window", "softcap", "dropout_rate", "scale")
self_attention = jax.jit(attention.self_attention, static_argnames=STATIC)
cross_attention = jax.jit(attention.cross_attention, static_argnames=("implementation", "softcap", "scale"))


def inputs(T: int, N: int, K: int, *, B: int = 2, H: int = 8, seed: int = 0) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    shapes = (B, T, N, H), (B, T, K, H), (B, T, K, H)
    return tuple(rng.standard_normal(shape).astype(np.float32) for shape in shapes)


def documents(T: int, B: int = 2) -> np.ndarray:
    """Segments of unequal rows: documents, then padding (0)."""
    segments = np.zeros((B, T), np.int32)
    for row in range(B):
        first, second = T // 3 + row, (2 * T) // 3 + row
        segments[row, :first], segments[row, first:second] = 1, 2
        segments[row, second : T - row] = 3
    return segments


def reference(
    query,
    key,
    value,
    *,
    causal=True,
    window=None,
    segments=None,
    prefix=None,
    distance_bias=None,
    scale=True,
    softcap=0.0,
) -> np.ndarray:
    """Attention as its definition reads: one query at a time, float64."""
    T = query.shape[1]

    def seen(b, t):
        return [
            s
            for s in range(T)
            if (s <= t or not causal or (prefix is not None and prefix[b, s] and prefix[b, t]))
            and (window is None or abs(t - s) < window)
            and (segments is None or segments[b, s] == segments[b, t])
        ]

    return by_definition(query, key, value, seen, distance_bias, scale, softcap)


def by_definition(query, key, value, seen, distance_bias=None, scale=True, softcap=0.0) -> np.ndarray:
    """`seen(b, t)` lists the keys of a query; where there are none, the result is 0."""
    query, key, value = (x.astype(np.float64) for x in (query, key, value))
    B, T, N, H = query.shape
    group = N // key.shape[2]
    out = np.zeros_like(query)
    for b in range(B):
        for n in range(N):
            for t in range(T):
                at = seen(b, t)
                if len(at) == 0:
                    continue
                scores = key[b, at, n // group] @ query[b, t, n] / (math.sqrt(H) if scale else 1)
                if distance_bias is not None:
                    scores = scores + [distance_bias[n, s - t + T - 1] for s in at]
                if softcap:
                    scores = softcap * np.tanh(scores / softcap)
                weights = np.exp(scores - scores.max())
                out[b, t, n] = weights / weights.sum() @ value[b, at, n // group]
    return out


CASES = [  # T, N, K, window, packed, softcap: every pair of settings meets at least once
    (8, 4, 4, None, False, 0.0),
    (8, 4, 2, 3, True, 1.5),
    (13, 4, 1, None, True, 0.0),
    (13, 2, 2, 5, False, 1.5),
    (7, 4, 1, 3, False, 0.0),
    (9, 4, 2, 20, True, 0.0),
    (3, 4, 2, None, True, 1.5),
    (2, 2, 1, 1, False, 0.0),
    (1, 2, 2, None, False, 0.0),
    (6, 2, 1, 2, True, 0.0),
]


@pytest.mark.parametrize("implementation", ON_CPU)
@pytest.mark.parametrize(("T", "N", "K", "window", "packed", "softcap"), CASES)
def test_causal_attention_is_its_definition(implementation, T, N, K, window, packed, softcap):
    query, key, value = inputs(T, N, K)
    settings = {"window": window, "segments": documents(T) if packed else None, "softcap": softcap}
    out = self_attention(query, key, value, implementation=implementation, **settings)
    np.testing.assert_allclose(out, reference(query, key, value, **settings), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("implementation", ON_CPU)
@pytest.mark.parametrize(("T", "window", "packed"), [(8, None, True), (9, 3, False), (5, 2, True)])
def test_attention_to_both_sides_is_its_definition(implementation, T, window, packed):
    query, key, value = inputs(T, 4, 2)
    settings = {"causal": False, "window": window, "segments": documents(T) if packed else None}
    out = self_attention(query, key, value, implementation=implementation, **settings)
    np.testing.assert_allclose(out, reference(query, key, value, **settings), atol=2e-6, rtol=1e-5)


FURTHER = [  # causal, window, packed, prefix, relative, scale, softcap
    (True, None, False, False, True, True, 0.0),
    (True, 3, True, False, True, False, 1.5),
    (True, None, True, True, False, False, 0.0),
    (True, 4, False, True, True, True, 0.0),
    (True, None, True, True, True, True, 1.5),
    (False, None, True, False, True, False, 0.0),
    (False, 3, False, False, True, True, 0.0),
]


@pytest.mark.parametrize("implementation", ON_CPU)
@pytest.mark.parametrize("case", FURTHER)
def test_prefixes_and_relative_positions_are_their_definitions(implementation, case):
    causal, window, packed, with_prefix, relative, scale, softcap = case
    T, N = 9, 4
    query, key, value = inputs(T, N, 2)
    rng = np.random.default_rng(1)
    settings = {
        "causal": causal,
        "window": window,
        "segments": documents(T) if packed else None,
        "prefix": (rng.random((2, T)) < 0.5).astype(np.int32) if with_prefix else None,
        "distance_bias": rng.standard_normal((N, 2 * T - 1)).astype(np.float32) if relative else None,
        "scale": scale,
        "softcap": softcap,
    }
    out = self_attention(query, key, value, implementation=implementation, **settings)
    np.testing.assert_allclose(out, reference(query, key, value, **settings), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("implementation", ON_CPU)
@pytest.mark.parametrize("causal", [True, False])
def test_the_gradient_of_a_bias_is_that_of_plain_attention(implementation, causal):
    T, N = 11, 2
    query, key, value = inputs(T, N, 1)
    bias = np.random.default_rng(1).standard_normal((N, 2 * T - 1)).astype(np.float32)
    mask = attention.self_mask(T, causal=causal, window=None, segments=None, prefix=None)
    at = np.arange(T)

    def plain(bias):
        spread = bias[None, :, at[None] - at[:, None] + T - 1]
        return jnp.sum(jnp.sin(softmax_attention(query, key, value, mask, bias=spread)))

    def chosen(bias):
        out = self_attention(query, key, value, implementation=implementation, causal=causal, distance_bias=bias)
        return jnp.sum(jnp.sin(out))

    ours, theirs = jax.jit(jax.grad(chosen))(bias), jax.jit(jax.grad(plain))(bias)
    np.testing.assert_allclose(ours, theirs, atol=2e-6)
    assert np.any(np.asarray(ours)[:, : T - 1] != 0)


@pytest.mark.parametrize("implementation", ON_CPU)
@pytest.mark.parametrize(("K", "scale", "softcap"), [(4, True, 0.0), (2, False, 0.0), (1, True, 1.5)])
def test_attention_to_a_source_is_its_definition(implementation, K, scale, softcap):
    """Of other lengths, with padding on both sides and a segment without a source."""
    query, *_ = inputs(7, 4, 4)
    _, key, value = inputs(9, 4, K, seed=1)
    segments = np.array([[1, 1, 2, 2, 3, 3, 0], [1, 1, 1, 1, 1, 1, 1]], np.int32)
    source = np.array([[1, 1, 1, 2, 4, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0, 0, 0]], np.int32)
    settings = {"implementation": implementation, "scale": scale, "softcap": softcap}

    def seen(b, t):
        return [s for s in range(9) if source[b, s] and source[b, s] == segments[b, t]]

    out = cross_attention(query, key, value, attention.source_mask(segments, source), **settings)
    right = by_definition(query, key, value, seen, None, scale, softcap)
    np.testing.assert_allclose(out, right, atol=2e-6, rtol=1e-5)
    assert not np.any(right[0, 4:])
    # Without segments of its own a token sees all of the source but padding; without any, all of it.
    out = cross_attention(query, key, value, attention.source_mask(None, source), **settings)
    right = by_definition(query, key, value, lambda b, t: np.flatnonzero(source[b]), None, scale, softcap)
    np.testing.assert_allclose(out, right, atol=2e-6, rtol=1e-5)
    assert attention.source_mask(segments, None) is None
    out = cross_attention(query, key, value, None, **settings)
    right = by_definition(query, key, value, lambda b, t: np.arange(9), None, scale, softcap)
    np.testing.assert_allclose(out, right, atol=2e-6, rtol=1e-5)


def test_a_source_that_nobody_may_see_gets_no_gradient():
    query, key, value = inputs(4, 2, 2)
    segments, source = np.full((2, 4), 2, np.int32), np.ones((2, 4), np.int32)
    mask = attention.source_mask(segments, source)
    for implementation in ON_CPU:
        grads = jax.grad(lambda qkv, i=implementation: jnp.sum(jnp.sin(cross_attention(*qkv, mask, implementation=i))))(
            (query, key, value)
        )
        assert not any(np.any(grad) for grad in grads)


def test_probabilities_are_what_attention_gives_values():
    T, N = 8, 4
    query, key, value = inputs(T, N, 2)
    mask = attention.self_mask(T, causal=True, window=5, segments=documents(T), prefix=None)
    bias = np.random.default_rng(1).standard_normal((1, N, T, T)).astype(np.float32)
    weights = attention.probabilities(query, key, mask, bias=bias, softcap=2.0)
    out = softmax_attention(query, key, value, mask, bias=bias, softcap=2.0)
    values = np.repeat(value, 2, axis=2)
    np.testing.assert_allclose(np.einsum("BNTS,BSNH->BTNH", weights, values), out, atol=2e-6)


@pytest.mark.parametrize("implementation", ON_CPU)
@pytest.mark.parametrize(("window", "packed"), [(None, False), (4, False), (None, True), (4, True)])
def test_gradients_are_those_of_plain_attention(implementation, window, packed):
    query, key, value = inputs(11, 4, 2)
    segments = documents(11) if packed else None
    at = jnp.arange(11)[None]
    mask = attention_mask(at, at, causal=True, window=window, query_segments=segments, key_segments=segments)

    def chosen(qkv):
        out = self_attention(*qkv, implementation=implementation, window=window, segments=segments)
        return jnp.sum(jnp.sin(out))

    def plain(qkv):
        return jnp.sum(jnp.sin(softmax_attention(*qkv, mask)))

    qkv = query, key, value
    for ours, theirs in zip(jax.jit(jax.grad(chosen))(qkv), jax.jit(jax.grad(plain))(qkv)):
        np.testing.assert_allclose(ours, theirs, atol=2e-6)


@pytest.mark.parametrize("implementation", ON_CPU)
@pytest.mark.parametrize(("window", "packed"), [(None, False), (3, False), (None, True), (3, True)])
def test_a_query_has_gradient_exactly_where_it_may_look(implementation, window, packed):
    T = 10
    query, key, value = inputs(T, 2, 2, B=1)
    segments = documents(T, B=1) if packed else np.ones((1, T), np.int32)

    def summed(key, value, at):
        given = segments if packed else None
        out = self_attention(query, key, value, implementation=implementation, window=window, segments=given)
        return jnp.sum(jnp.square(out[0, at]))

    grads = jax.jit(jax.vmap(jax.grad(summed, argnums=(0, 1)), in_axes=(None, None, 0)))(key, value, np.arange(T))
    touches = [np.any(np.asarray(g) != 0, axis=(1, 3, 4)) for g in grads]  # [T, S]
    t, s = np.arange(T)[:, None], np.arange(T)[None]
    allowed = (s <= t) & (segments[0][:, None] == segments[0][None])
    if window is not None:
        allowed &= t - s < window
    np.testing.assert_array_equal(touches[1], allowed)
    assert not np.any(touches[0] & ~allowed)


@pytest.mark.parametrize("implementation", ON_CPU)
def test_bfloat16_stays_bfloat16_and_close(implementation):
    query, key, value = inputs(9, 4, 2)
    halves = [jnp.asarray(x, jnp.bfloat16) for x in (query, key, value)]
    # `jax.nn`'s own arithmetic on bfloat16 does not pass the strict rules.
    with jax.numpy_dtype_promotion("standard" if implementation == "xla" else "strict"):
        out = self_attention(*halves, implementation=implementation, segments=documents(9))
    assert out.dtype == jnp.bfloat16
    exact = reference(*(np.asarray(x, np.float32) for x in halves), segments=documents(9))
    np.testing.assert_allclose(np.asarray(out, np.float32), exact, atol=0.03)


def test_large_scores_do_not_overflow():
    query, key, value = inputs(6, 2, 2)
    for implementation in ON_CPU:
        out = self_attention(query * 1e3, key * 1e3, value, implementation=implementation)
        assert np.all(np.isfinite(out))


def test_dropout_keeps_the_mean_and_drops_the_share():
    rate = 0.25
    one_row = inputs(8, 2, 2, B=1)
    rows = [np.repeat(x, 3000, axis=0) for x in one_row]
    dropped = np.asarray(self_attention(*rows, dropout_rate=rate, dropout_key=jax.random.key(0)))
    np.testing.assert_allclose(dropped.mean(axis=0, keepdims=True), reference(*one_row), atol=0.1)
    # The first query sees one key: its output is the value / (1 - rate), or nothing.
    np.testing.assert_allclose(np.all(dropped[:, 0] == 0, axis=-1).mean(axis=0), rate, atol=0.03)


def test_no_dropout_without_a_key():
    query, key, value = inputs(5, 2, 2)
    out = self_attention(query, key, value, dropout_rate=0.5, dropout_key=None)
    np.testing.assert_array_equal(out, self_attention(query, key, value))


def test_a_mask_that_hides_nothing_is_none():
    at = np.arange(4)[None]
    assert attention_mask(at, at, causal=False, window=None) is None


PLAIN = {
    "dtype": jnp.bfloat16,
    "length": 64,
    "head_dim": 64,
    "causal": True,
    "window": False,
    "segments": False,
    "prefix": False,
    "relative": False,
    "softcap": False,
    "dropout": False,
}
CHOICES = [
    # requested, platform, changes, chosen
    ("auto", "gpu", {}, "cudnn"),
    ("auto", "gpu", {"dtype": jnp.float32}, "xla"),
    ("auto", "gpu", {"segments": True}, "xla"),
    ("auto", "gpu", {"softcap": True}, "blocked"),
    ("auto", "gpu", {"dropout": True}, "blocked"),
    ("auto", "gpu", {"dropout": True, "segments": True}, "blocked"),
    ("auto", "gpu", {"window": True}, "cudnn"),
    ("auto", "gpu", {"causal": False}, "cudnn"),
    ("auto", "gpu", {"window": True, "causal": False}, "xla"),
    ("auto", "gpu", {"head_dim": 128}, "cudnn"),
    ("auto", "gpu", {"head_dim": 20}, "xla"),
    ("auto", "gpu", {"length": 63}, "xla"),
    ("auto", "gpu", {"head_dim": 256}, "xla"),
    ("auto", "gpu", {"prefix": True}, "xla"),
    ("auto", "gpu", {"relative": True}, "xla"),
    ("cudnn", "gpu", {"relative": True, "dropout": True}, "blocked"),
    ("auto", "cpu", {}, "blocked"),
    ("auto", "cpu", {"dtype": jnp.float32, "segments": True}, "blocked"),
    ("auto", "cpu", {"causal": False}, "xla"),
    ("auto", "cpu", {"causal": False, "dropout": True}, "blocked"),
    ("auto", "tpu", {}, "xla"),
    ("auto", "tpu", {"segments": True}, "xla"),
    ("auto", "tpu", {"softcap": True}, "blocked"),
    ("cudnn", "gpu", {}, "cudnn"),
    ("cudnn", "gpu", {"segments": True}, "xla"),
    ("cudnn", "gpu", {"softcap": True}, "blocked"),
    ("cudnn", "gpu", {"dropout": True}, "blocked"),
    ("cudnn", "gpu", {"dtype": jnp.float32}, "xla"),
    ("cudnn", "cpu", {}, "blocked"),
    ("cudnn", "cpu", {"causal": False}, "xla"),
    ("cudnn", "tpu", {}, "xla"),
    ("xla", "cpu", {"segments": True}, "xla"),
    ("xla", "cpu", {"softcap": True}, "blocked"),
    ("xla", "cpu", {"dropout": True}, "blocked"),
    ("blocked", "gpu", {"segments": True}, "blocked"),
]


@pytest.mark.parametrize(("requested", "platform", "changes", "chosen"), CHOICES)
def test_choice_of_implementation(requested, platform, changes, chosen):
    assert choose_implementation(requested, platform=platform, **(PLAIN | changes)) == chosen


def test_a_fallback_is_told_once(caplog):
    attention._say_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            choose_implementation("cudnn", platform="gpu", **(PLAIN | {"segments": True}))
    assert len(caplog.records) == 1
    assert "segments" in caplog.text


def test_the_usual_choices_are_silent(caplog):
    attention._say_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        choose_implementation("auto", platform="gpu", **PLAIN)
        choose_implementation("auto", platform="cpu", **(PLAIN | {"segments": True}))
        choose_implementation("auto", platform="tpu", **(PLAIN | {"segments": True}))
    assert not caplog.records


def test_relative_positions_and_prefixes_fall_back_from_cudnn(monkeypatch, caplog):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    attention._say_once.cache_clear()
    query, key, value = (jnp.asarray(x, jnp.bfloat16) for x in inputs(8, 4, 4))
    bias, prefix = jnp.zeros((4, 15)), jnp.ones((2, 8), jnp.int32)
    with jax.numpy_dtype_promotion("standard"), caplog.at_level(logging.WARNING):
        for settings in ({"distance_bias": bias}, {"prefix": prefix}):
            trace = jax.make_jaxpr(lambda q, s=settings: attention.self_attention(q, key, value, **s))
            assert "cudnn" not in str(trace(query))
    assert "relative positions" in caplog.text
    assert "a prefix" in caplog.text


@pytest.mark.parametrize(("T", "K", "window"), [(16, 4, None), (14, 2, None), (16, 1, 4)])
def test_cudnn_takes_our_shapes_and_arguments(monkeypatch, T, K, window):
    """Without a GPU the kernel can't run, but its call can be lowered: shapes, dtypes and settings are checked."""
    from jax._src.cudnn import fused_attention_stablehlo as kernels

    monkeypatch.setattr(kernels, "check_cudnn_version", lambda: 91200)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    halves = [jnp.asarray(x, jnp.bfloat16) for x in inputs(T, 4, K)]

    def loss(qkv):
        return jnp.sum(attention.self_attention(*qkv, window=window).astype(jnp.float32))

    with jax.numpy_dtype_promotion("standard"):
        text = jax.jit(jax.grad(loss)).trace(halves).lower(lowering_platforms=("cuda",)).as_text()
    assert "fmhaSoftmaxBackward" in text
    assert "CAUSAL" in text
    assert "NO_MASK" not in text
    if window:
        assert f"sliding_window_length\\22: {window}" in text


@pytest.mark.parametrize(
    ("T", "window", "softcap", "block", "relative", "prefix"),
    [
        (12, None, 0.0, 4, False, 0),
        (13, 5, 0.0, 4, False, 0),
        (7, None, 1.5, 6, False, 0),
        (13, None, 0.0, 4, True, 0),
        (11, None, 0.0, 4, False, 6),
        (10, 4, 0.0, 4, True, 7),
    ],
)
def test_queries_over_a_cache_may_be_cut(monkeypatch, T, window, softcap, block, relative, prefix):
    """Cut or not, the same: and for a row that fills the cache from its start, plain causal attention."""
    B, N, K, S = 2, 4, 2, 16
    query, key, value = inputs(S, N, K, B=B)
    at = np.stack([np.arange(T), 3 + np.arange(T)]).astype(np.int32)  # the second row has 3 tokens in the cache already
    asked = np.take_along_axis(query, at[:, :, None, None], axis=1)
    q, k, v = attention.heads_first(jnp.asarray(asked), jnp.asarray(key), jnp.asarray(value))
    bias = jnp.asarray(np.random.default_rng(1).standard_normal((N, 2 * S - 1)), jnp.float32) if relative else None
    # In the second row the prefix begins where the queries do: what came before it was not part of it.
    in_prefix = np.zeros((B, S), np.int32)
    in_prefix[0, :prefix], in_prefix[1, 3 : 3 + prefix] = 1, 1
    settings = {"window": window, "softcap": softcap, "distance_bias": bias}

    def attend():
        given = np.take_along_axis(in_prefix, at, axis=1) if prefix else None
        out = jax.jit(lambda: attention.cached_attention(q, k, v, at, prefix=given, **settings))()
        return attention.heads_last(out)

    whole = attend()
    monkeypatch.setattr(attention, "CACHE_QUERIES", block)
    cut = attend()
    assert cut.shape == (B, T, N, 8)
    np.testing.assert_allclose(cut, whole, atol=1e-6, rtol=0)
    right = reference(query, key, value, prefix=in_prefix, **settings)
    np.testing.assert_allclose(cut, np.take_along_axis(right, at[:, :, None, None], axis=1), atol=2e-6, rtol=1e-5)


def test_the_scores_of_a_long_prompt_are_never_all_there_at_once():
    """Of LLaMA 7B's 2,048 tokens: compiled, not run."""
    T, N, H = 2048, 32, 128
    shapes = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((1, N, 1, T, H), (1, N, T, H), (1, N, T, H))]
    attend = jax.jit(lambda q, k, v, at: attention.cached_attention(q, k, v, at, window=None, softcap=0.0))
    compiled = attend.lower(*shapes, jax.ShapeDtypeStruct((1, T), jnp.int32)).compile()
    all_scores = 4 * N * T * T
    assert compiled.memory_analysis().temp_size_in_bytes < all_scores / 2
