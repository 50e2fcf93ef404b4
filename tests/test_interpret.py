"""What is captured is what the model computes with, and where nothing is asked for it costs nothing."""

import dataclasses
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from lm.errors import UserError
from lm.interpret import capture
from lm.models import attention, blocks
from lm.models.transformer import Transformer

KINDS = {
    "decoder": {"positions": "rope", "n_kv_heads": 2},
    "window-softcap": {"window": 3, "attention_softcap": 2.0, "attention": "blocked"},
    "bert": {"mask": "bidirectional", "norm_place": "post", "embedding_norm": True},
    "prefix": {"mask": "prefix", "unroll": 1},
    "t5": {
        "encoder_layers": 3,
        "positions": "relative",
        "relative_buckets": 8,
        "relative_distance": 9,
        "scale_attention": False,
        "norm": "rmsnorm",
        "remat": "full",
    },
}


def case(kind: str):
    model, params = tiny.build(tiny.config(**KINDS[kind]))
    batch = tiny.packed_batch(3, 10, 64)
    if kind == "prefix":
        batch["prefix"] = (batch["positions"] < 2).astype(np.int32)
    if kind == "t5":
        source = tiny.packed_batch(3, 13, 64, seed=1)
        batch |= {f"source_{name}": source[name] for name in ("tokens", "positions", "segments")}
    return model, tiny.perturbed(params), batch


def normed(x, params, config):
    """The norm before a block, in float64."""
    if config.norm_place == "post":
        return x
    x = x - x.mean(-1, keepdims=True) * (config.norm == "layernorm")
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_epsilon)
    return x * params["scale"] + params.get("bias", 0)


def values(x, params):
    """What each head reads and writes: `[B, S, D]` to `[B, S, N, D]`, values through the output projection."""
    kernel, out = params["value"]["kernel"], params["out"]["kernel"]
    v = np.einsum("bsd,dkh->bskh", x, kernel) + params["value"].get("bias", 0)
    return np.einsum("bsnh,nhd->bsnd", np.repeat(v, out.shape[0] // kernel.shape[1], axis=2), out)


@pytest.mark.parametrize("kind", KINDS)
def test_probabilities_and_values_make_what_each_layer_adds(kind):
    """The stream after each layer from the stream before it, its probabilities and its weights alone."""
    model, params, batch = case(kind)
    c = model.config
    got = capture(model, params, batch)
    p64 = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    stacks = [("layers", "self", got.hidden)]
    if c.encoder_layers:
        stacks.append(("encoder_layers", "encoder", got.encoder_hidden))
    for name, kind_of_attention, hidden in stacks:
        L, B, T = len(hidden) - 1, *hidden.shape[1:3]
        assert got.attention[kind_of_attention].shape == (L, B, c.n_heads, T, T)
        assert got.attention[kind_of_attention].dtype == np.float32
        for i in range(L):
            layer = jax.tree.map(lambda x, i=i: x[i], p64[name])
            x = hidden[i].astype(np.float64)
            own = layer["attention"]
            y = np.einsum(
                "bnts,bsnd->btd",
                got.attention[kind_of_attention][i],
                values(normed(x, layer["attention_norm"], c), own),
            )
            after = x + y + own["out"]["bias"]
            if c.norm_place == "post":
                after = normed(after, layer["attention_norm"], dataclasses.replace(c, norm_place="pre"))
            if "cross_attention" in layer:
                own = layer["cross_attention"]
                source = got.encoder_hidden[-1].astype(np.float64)
                y = values(normed(source, p64["encoder_norm"], c), own)
                after = after + np.einsum("bnts,bsnd->btd", got.attention["cross"][i], y) + own["out"]["bias"]
            up, down = layer["mlp"]["up"], layer["mlp"]["down"]
            z = normed(after, layer["mlp_norm"], c) @ up["kernel"] + up["bias"]
            z = 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))
            after = after + z @ down["kernel"] + down["bias"]
            if c.norm_place == "post":
                after = normed(after, layer["mlp_norm"], dataclasses.replace(c, norm_place="pre"))
            assert tiny.relative(hidden[i + 1], after) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_sums_to_1_and_is_0_where_nothing_may_be_seen(kind):
    model, params, batch = case(kind)
    got = capture(model, params, batch)
    segments = batch["segments"]
    same = segments[:, :, None] == segments[:, None, :]
    weights = got.attention["self"]
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
    assert np.all(np.where(same[None, :, None], 0, weights) == 0)
    later = np.triu(np.ones((10, 10), bool), 1)
    sees_later = np.any(np.where(later, weights, 0) > 0)
    assert sees_later == (model.config.mask != "causal")
    if kind == "t5":
        source = batch["source_segments"]
        may = (segments[:, :, None] == source[:, None, :]) & (source[:, None, :] > 0)
        cross = got.attention["cross"]
        assert np.all(np.where(may[None, :, None], 0, cross) == 0)
        there = np.broadcast_to(may.any(-1)[None, :, None], cross.shape[:-1])
        np.testing.assert_allclose(cross.sum(-1), there, atol=1e-5)
        assert not may.any(-1).all()  # padding is there


def test_the_stream_ends_in_the_logits():
    for kind in ("decoder", "bert", "t5"):
        model, params, batch = case(kind)
        got = capture(model, params, batch)
        named = {name: batch[name] for name in batch if name not in ("targets", "weights")}
        want = jax.jit(lambda params, named, model=model: model.apply({"params": params}, **named))(params, named)
        last = jnp.asarray(got.hidden[-1])
        logits = model.apply({"params": params}, last, method=lambda m, x: m.logits(m.normed(x)))
        assert tiny.relative(logits, want) < 1e-5


def lowered(model, params, batch) -> str:
    """The program of a gradient, as a training step has it."""

    def loss(params, key):
        rngs = {"dropout": key}
        logits = model.apply({"params": params}, batch["tokens"], deterministic=False, rngs=rngs)
        return jnp.sum(jnp.square(logits))

    return jax.jit(jax.grad(loss)).lower(params, jax.random.key(0)).as_text()


def test_programs_that_capture_nothing_hold_nothing_of_it(monkeypatch):
    """The program is the same, to the letter, as that of a model in which the feature does not exist."""
    model, params = tiny.build(tiny.config(unroll=1, residual_dropout=0.1, remat="full"))
    batch = tiny.stream_batch(2, 8, 64)
    present = lowered(model, params, batch)
    monkeypatch.setattr(blocks.Attention, "_capture", lambda *_: None)
    monkeypatch.setattr(attention, "probabilities", None)
    monkeypatch.setattr(blocks, "INTERMEDIATES", "nowhere")
    monkeypatch.setattr("lm.models.transformer.INTERMEDIATES", "nowhere")
    absent = lowered(Transformer(model.config), params, batch)
    assert hashlib.sha256(present.encode()).digest() == hashlib.sha256(absent.encode()).digest()
    assert "stablehlo.while" in present


def test_what_does_not_fit_is_told():
    model, params, batch = case("t5")
    with pytest.raises(UserError, match="no source_tokens"):
        capture(model, params, {"tokens": batch["tokens"]})
    with pytest.raises(UserError, match="no tokens"):
        capture(model, params, {})
