"""Attention of rows whose tokens lie on several devices is that of rows on one: values and gradients."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from lm.models import attention, split_attention
from lm.sharding import MeshConfig, Rules, make_mesh, ruled

MESH = make_mesh(MeshConfig(data=1, context=4, tensor=2))
B, T, N, K, H = 2, 32, 4, 2, 8
BATCH = tiny.packed_batch(B, T, 10, seed=3)


@pytest.fixture(autouse=True)
def on_the_mesh():
    with jax.set_mesh(MESH):
        yield


def random(*shape, seed=0, dtype=np.float32):
    return jnp.asarray(np.random.default_rng([seed, len(shape)]).normal(size=shape), dtype)


QUERY, KEY, VALUE, GIVEN = (random(B, T, n, H, seed=seed) for seed, n in enumerate((N, K, K, N)))


def value_and_grads(function, *arrays):
    def scalar(*arrays):
        return jnp.vdot(function(*arrays), GIVEN)

    return jax.jit(function)(*arrays), jax.jit(jax.grad(scalar, argnums=(0, 1, 2)))(*arrays)


def test_balanced_order_and_back():
    x = jnp.arange(T)[None, :, None]
    moved = jax.jit(split_attention.balance)(x)
    chunks = np.asarray(moved).reshape(4, 2, -1)[:, :, 0] // (T // 8)
    np.testing.assert_array_equal(chunks, [[0, 7], [1, 6], [2, 5], [3, 4]])
    assert {shard.data.shape[1] for shard in moved.addressable_shards} == {T // 4}
    np.testing.assert_array_equal(jax.jit(split_attention.restore)(moved), x)


@pytest.mark.parametrize(("devices", "blocks", "size", "window"), [(1, 1, 4, None), (4, 3, 2, None), (4, 2, 4, 6)])
def test_pairs_are_all_that_see_each_other_each_once_and_as_many_on_each_device(devices, blocks, size, window):
    pairs = split_attention.pairs_of(devices, blocks, size, window)
    seen = [(at, keys) for device in pairs for _, at, keys, counts in device if counts]
    at = np.arange(2 * devices * blocks * size)
    distance = at[:, None] - at
    visible = (distance >= 0) & (distance < (window or len(at)))
    wanted = np.argwhere(visible.reshape(len(at) // size, size, -1, size).any(axis=(1, 3)))
    assert sorted(seen) == sorted(map(tuple, wanted.tolist()))
    if window is None:
        assert pairs[..., 3].all(), "balance: no device waits for another"
    for device, own in enumerate(pairs):
        chunk, inside = np.divmod(own[own[:, 3] > 0, 0], blocks)
        natural = np.where(chunk == 0, device, 2 * devices - 1 - device) * blocks + inside
        np.testing.assert_array_equal(natural, own[own[:, 3] > 0, 1])


@pytest.mark.parametrize(
    ("block", "window", "softcap", "scale", "packed"),
    [(1024, None, 0.0, True, False), (2, None, 3.0, False, True), (2, 5, 0.0, True, True)],
)
def test_balanced_attention_is_attention(monkeypatch, block, window, softcap, scale, packed):
    monkeypatch.setattr(split_attention, "BLOCK", block)
    segments = jnp.asarray(BATCH["segments"]) if packed else None
    mask = attention.self_mask(T, causal=True, window=window, segments=segments, prefix=None)
    options = {"scale": scale, "softcap": softcap}

    def split(query, key, value):
        query, key, value, own = (
            None if x is None else split_attention.balance(x) for x in (query, key, value, segments)
        )
        out = split_attention.balanced_attention(query, key, value, window=window, segments=own, **options)
        return split_attention.restore(out)

    found = value_and_grads(split, QUERY, KEY, VALUE)
    wanted = value_and_grads(functools.partial(attention.softmax_attention, mask=mask, **options), QUERY, KEY, VALUE)
    tiny.assert_trees_close(found, wanted, 2e-6)


@pytest.mark.parametrize("axes", [{"fsdp": 2, "context": 4}, {"data": 2, "context": 2, "tensor": 2}])
def test_rows_and_heads_of_other_devices_are_not_asked_for(axes):
    """Left to itself, XLA gathers the keys of all rows."""

    def split(query, key, value):
        query, key, value = (split_attention.balance(x) for x in (query, key, value))
        return split_attention.balanced_attention(
            query, key, value, window=None, segments=None, scale=True, softcap=0.0
        )

    mesh = make_mesh(MeshConfig(**({"data": 1} | axes)))
    at = jax.NamedSharding(mesh, jax.P(("data", "fsdp"), None, "tensor"))
    with jax.set_mesh(mesh):
        arrays = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at) for x in (QUERY, KEY, VALUE)]
        gradients = jax.jit(jax.grad(lambda *arrays: split(*arrays).sum(), argnums=(0, 1, 2)))
        text = gradients.lower(*arrays).compile().as_text()
    heads = K // axes.get("tensor", 1)
    gathered = set(re.findall(r"= f32\[([0-9,]+)\]\S* all-gather", text))
    assert gathered == {f"1,{T},{heads},{H}"}


def test_rules_that_put_heads_where_rows_are():
    """Rows come first, and heads stay whole: no axis is taken twice."""
    mesh = make_mesh(MeshConfig(data=2, context=2, tensor=2))
    rules = Rules(activation_heads=("data", "tensor"), activation_kv=("data",))

    def split(query, key, value):
        moved = (split_attention.balance(x) for x in (query, key, value))
        out = split_attention.balanced_attention(*moved, window=None, segments=None, scale=True, softcap=0.0)
        return split_attention.restore(out)

    with jax.set_mesh(mesh):
        found = jax.jit(ruled(split, rules))(QUERY, KEY, VALUE)
    mask = attention.self_mask(T, causal=True, window=None, segments=None, prefix=None)
    assert tiny.relative(found, attention.softmax_attention(QUERY, KEY, VALUE, mask)) < 2e-6


def test_balanced_attention_in_half_precision():
    """Its error against float32 is that of attention on one device in the same precision."""
    mask = attention.self_mask(T, causal=True, window=None, segments=None, prefix=None)
    exact = attention.softmax_attention(QUERY, KEY, VALUE, mask)
    half = [x.astype(jnp.bfloat16) for x in (QUERY, KEY, VALUE)]

    @jax.jit
    def split(*arrays):
        arrays = [split_attention.balance(x) for x in arrays]
        out = split_attention.balanced_attention(*arrays, window=None, segments=None, scale=True, softcap=0.0)
        return split_attention.restore(out)

    out = split(*half)
    assert out.dtype == jnp.bfloat16
    usual = tiny.relative(attention.softmax_attention(*half, mask), exact)
    assert tiny.relative(out, exact) < 1.5 * usual


@pytest.mark.parametrize("kind", ["bidirectional", "prefix", "relative"])
def test_gathered_attention_is_attention(kind):
    segments = jnp.asarray(BATCH["segments"])
    prefix = (jnp.asarray(BATCH["positions"]) < 3).astype(jnp.int32) if kind == "prefix" else None
    bias = random(N, 2 * T - 1) if kind == "relative" else None
    options = {
        "causal": kind != "bidirectional",
        "window": 7 if kind == "bidirectional" else None,
        "segments": segments,
        "prefix": prefix,
        "distance_bias": bias,
        "scale": True,
        "softcap": 0.0,
        "dropout_rate": 0.0,
        "dropout_key": None,
    }
    found = value_and_grads(functools.partial(split_attention.gathered_attention, **options), QUERY, KEY, VALUE)
    wanted = value_and_grads(functools.partial(attention.self_attention, **options), QUERY, KEY, VALUE)
    tiny.assert_trees_close(found, wanted, 2e-6)


@pytest.mark.parametrize("length", [16, 15], ids=["split", "whole"])
def test_cross_attention_to_a_split_or_a_whole_source(length):
    key, value = KEY[:, :length], VALUE[:, :length]
    segments = jnp.asarray(BATCH["segments"])
    theirs = jnp.minimum(segments[:, :length], 1)  # most tokens see nothing of it
    mask = attention.source_mask(segments, theirs)
    found = value_and_grads(
        lambda q, k, v: split_attention.cross_attention(
            q, k, v, segments, theirs, scale=True, softcap=2.0, dropout_rate=0.0, dropout_key=None
        ),
        QUERY,
        key,
        value,
    )
    wanted = value_and_grads(lambda q, k, v: attention.cross_attention(q, k, v, mask, softcap=2.0), QUERY, key, value)
    tiny.assert_trees_close(found, wanted, 2e-6)


def test_dropout_of_split_rows_keeps_the_mean_and_differs_between_devices():
    options = {"causal": False, "window": None, "segments": None, "prefix": None, "distance_bias": None}
    options |= {"scale": True, "softcap": 0.0, "dropout_rate": 0.5}
    same = jnp.zeros((1, T, 1, T))  # all probabilities are 1 / T
    value = jnp.eye(T)[None, :, None]  # so that outputs are the probabilities

    @jax.jit
    def drop(key):
        return split_attention.gathered_attention(same, same, value, dropout_key=key, **options)[0, :, 0]

    weights = np.asarray(drop(jax.random.key(0))) * T
    assert set(np.unique(weights.round(4))) == {0.0, 2.0}
    assert abs(weights.mean() - 1) < 0.1
    assert (weights[: T // 4] != weights[T // 4 : T // 2]).any(), "each device drops others"


def test_lengths_that_do_not_divide_stay_whole():
    assert [split_attention.parts(length) for length in (32, 12, 10)] == [4, 4, 1]
    assert [split_attention.can_balance(length) for length in (32, 12, 10)] == [True, False, False]
