"""The whole model: what it may see, what changes nothing, how it starts, what it refuses."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from lm import tree
from lm.errors import UserError
from lm.models.blocks import Context
from lm.models.layers import ACTIVATIONS, GATED
from lm.models.transformer import ModelConfig, Transformer, flops_per_token
from lm.tasks.causal_lm import CausalLM

pytestmark = pytest.mark.usefixtures("strict_promotion")


def logits_of(model, params, batch, **kwargs):
    call = jax.jit(lambda params: model.apply({"params": params}, batch["tokens"], batch["positions"], **kwargs))
    return call(params)


def make_loss_and_grad(model, batch, key=None, task=None):
    """Parameters to mean loss and its gradient, through the task."""

    def mean(params):
        total, sums = (task or CausalLM()).loss(model, params, batch, key)
        return total / sums["weight"]

    return jax.jit(jax.value_and_grad(mean))


# Every value of every field, and most pairs of values.
VARIANTS = [
    {"activation": "relu", "positions": "learned", "norm": "layernorm", "norm_place": "pre"},
    {"activation": "gelu", "positions": "sinusoidal", "norm": "rmsnorm", "norm_place": "post", "use_bias": False},
    {"activation": "gelu_tanh", "positions": "rope", "norm": "layernorm", "norm_place": "post", "n_kv_heads": 2},
    {"activation": "silu", "positions": "none", "norm": "rmsnorm", "norm_place": "pre", "tie_embeddings": False},
    {"activation": "sigmoid", "positions": "learned", "norm": "rmsnorm", "qk_norm": True, "n_kv_heads": 1},
    {"activation": "tanh", "positions": "rope", "norm": "rmsnorm", "attention_softcap": 5.0, "logit_softcap": 3.0},
    {"activation": "swiglu", "positions": "sinusoidal", "norm": "layernorm", "window": 3, "tie_embeddings": False},
    {"activation": "geglu", "positions": "none", "norm": "layernorm", "norm_place": "post", "head_dim": 6},
    {"activation": "geglu_tanh", "positions": "relative", "norm": "rmsnorm", "scale_attention": False, "n_kv_heads": 2},
    {"activation": "swiglu", "positions": "rope", "norm_place": "post", "qk_norm": True, "window": 4, "head_dim": 12},
]


def test_the_variants_hold_every_kind():
    assert {v["activation"] for v in VARIANTS} == set(ACTIVATIONS) | set(GATED)
    assert {v["positions"] for v in VARIANTS} == {"learned", "sinusoidal", "rope", "relative", "none"}


@pytest.mark.parametrize("changes", VARIANTS, ids=lambda v: f"{v['activation']}-{v['positions']}")
def test_every_kind_trains_one_step(changes):
    model, params = tiny.build(tiny.config(unroll=1, **changes))
    batch = tiny.packed_batch(4, 12, 64)
    loss_and_grad = make_loss_and_grad(model, batch)
    before, grads = loss_and_grad(params)
    assert abs(float(before) - math.log(64)) < 0.2
    for path, grad in tree.path_leaves(grads):
        assert np.all(np.isfinite(grad)), path
        # Softmax ignores what is added to all scores of a query, which is what a key's bias does without rope.
        if not path.endswith("key/bias"):
            assert np.any(grad != 0), path
    moved = jax.tree.map(lambda p, g: p - np.float32(0.05) * g, params, grads)
    after, _ = loss_and_grad(moved)
    assert after < before


def test_post_norm_model_is_its_definition():
    """The Transformer of 2017, decoder part without cross-attention, in float64 numpy."""
    config = tiny.config(positions="sinusoidal", norm_place="post", activation="relu")
    model, params = tiny.build(config)
    params = tiny.perturbed(params)
    batch = tiny.stream_batch(2, 9, 64)
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def norm(x, name, i):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + config.norm_epsilon)
        return x * p["layers"][name]["scale"][i] + p["layers"][name]["bias"][i]

    def dense(x, part, name, i, rule):
        return np.einsum(rule, x, p["layers"][part][name]["kernel"][i]) + p["layers"][part][name]["bias"][i]

    at = np.arange(9)[:, None] / 10_000 ** (np.arange(0, 32, 2) / 32)
    x = p["embed"]["embedding"][batch["tokens"]] + np.stack([np.sin(at), np.cos(at)], -1).reshape(9, 32)
    for i in range(2):
        q, k, v = (dense(x, "attention", name, i, "btd,dnh->btnh") for name in ("query", "key", "value"))
        scores = np.einsum("btnh,bsnh->bnts", q, k) / math.sqrt(8)
        weights = np.exp(np.where(np.tri(9, dtype=bool), scores, -np.inf))
        weights /= weights.sum(-1, keepdims=True)
        y = dense(np.einsum("bnts,bsnh->btnh", weights, v), "attention", "out", i, "btnh,nhd->btd")
        x = norm(x + y, "attention_norm", i)
        hidden = np.maximum(dense(x, "mlp", "up", i, "btd,df->btf"), 0)
        x = norm(x + dense(hidden, "mlp", "down", i, "btf,fd->btd"), "mlp_norm", i)
    assert tiny.relative(logits_of(model, params, batch), x @ p["embed"]["embedding"].T) < 2e-6


@pytest.mark.parametrize(("implementation", "window"), [("xla", None), ("blocked", None), ("xla", 3), ("blocked", 3)])
def test_no_gradient_from_the_future_nor_from_beyond_the_window(implementation, window):
    T = 12
    model, params = tiny.build(tiny.config(attention=implementation, window=window))
    params = tiny.perturbed(params)
    batch = tiny.stream_batch(1, T, 64)

    def sum_at(table, at):
        # Each place has a position vector of its own, so its gradient is that place's.
        logits = model.apply(
            {"params": params | {"position_embed": {"embedding": table}}}, batch["tokens"], batch["positions"]
        )
        return jnp.sum(jnp.square(logits[0, at]))

    grads = jax.jit(jax.vmap(jax.grad(sum_at), (None, 0)))(params["position_embed"]["embedding"], np.arange(T))
    touched = np.any(np.asarray(grads) != 0, axis=-1)[:, :T]
    t, s = np.arange(T)[:, None], np.arange(T)[None]
    reach = T if window is None else model.config.n_layers * (window - 1)
    np.testing.assert_array_equal(touched, (s <= t) & (t - s <= reach))


@pytest.mark.parametrize("implementation", ["xla", "blocked"])
def test_no_gradient_across_packed_documents(implementation):
    T = 11
    model, params = tiny.build(tiny.config(attention=implementation))
    params = tiny.perturbed(params)
    batch = tiny.stream_batch(1, T, 64)
    segments = np.array([[1] * 4 + [2] * 5 + [0] * 2], np.int32)

    def sum_at(table, at):
        variables = {"params": params | {"position_embed": {"embedding": table}}}
        logits = model.apply(variables, batch["tokens"], batch["positions"], segments)
        return jnp.sum(jnp.square(logits[0, at]))

    grads = jax.jit(jax.vmap(jax.grad(sum_at), (None, 0)))(params["position_embed"]["embedding"], np.arange(T))
    touched = np.any(np.asarray(grads) != 0, axis=-1)[:, :T]
    np.testing.assert_array_equal(touched, np.tri(T, dtype=bool) & (segments == segments.T))


@pytest.mark.parametrize(
    ("implementation", "positions", "window"),
    [("xla", "learned", None), ("blocked", "rope", 4), ("xla", "rope", 3), ("blocked", "sinusoidal", None)],
)
def test_a_packed_document_gives_the_logits_it_gives_alone(implementation, positions, window):
    model, params = tiny.build(tiny.config(attention=implementation, positions=positions, window=window))
    params = tiny.perturbed(params)
    batch = tiny.packed_batch(3, 15, 64)
    packed = logits_of(model, params, batch, segments=batch["segments"])
    alone = jax.jit(lambda tokens: model.apply({"params": params}, tokens))
    for row, number in [(0, 1), (0, 2), (1, 2), (1, 3), (2, 1)]:
        at = np.flatnonzero(batch["segments"][row] == number)
        # Padded on the right, which causality hides, so that one program serves every length.
        tokens = np.zeros((1, 15), np.int32)
        tokens[0, : len(at)] = batch["tokens"][row, at]
        assert tiny.relative(packed[row, at], alone(tokens)[0, : len(at)]) < 5e-6


@pytest.mark.parametrize(
    ("rate", "settings"),
    [
        (
            0.0,
            [
                {"unroll": 1, "remat": "dots"},
                {"unroll": 1},
                {"remat": "dots"},
                {"remat": "full"},
                {"unroll": 1, "remat": "offload"},
            ],
        ),
        (0.1, [{"unroll": 1, "remat": "full"}]),
    ],
)
def test_remat_and_unroll_change_no_gradient(rate, settings):
    """Nor the dropout drawn. (Two layers: `unroll=2` is `unroll=0`.)"""
    base = tiny.config(unroll=0, residual_dropout=rate)
    model, params = tiny.build(base)
    batch = tiny.packed_batch(2, 10, 64)
    key = jax.random.key(1)
    loss, grads = make_loss_and_grad(model, batch, key)(params)
    for setting in settings:
        other = Transformer(dataclasses.replace(base, **setting))
        other_loss, other_grads = make_loss_and_grad(other, batch, key)(params)
        assert abs(other_loss - loss) < 1e-6 * loss, setting
        tiny.assert_trees_close(other_grads, grads, 1e-5)


def test_offload_keeps_products_on_the_host():
    """Those of a layer that its backward pass reads: queries, keys and values in one, what attention adds, and `up`."""
    model, params = tiny.build(tiny.config(remat="offload", unroll=1))
    batch = tiny.stream_batch(2, 8, 64)
    text = jax.make_jaxpr(make_loss_and_grad(model, batch))(params).pretty_print(use_color=False)
    there = re.findall(r"f32<host>\[([\d,]+)\] = device_put", text)
    and_back = re.findall(r"f32\[([\d,]+)\] = device_put", text)
    assert sorted(there) == sorted(and_back) == ["16,32", "16,48", "16,96"]


def test_initial_parameters_depend_on_the_seed_and_their_own_name_only():
    base = tiny.config(n_kv_heads=2)
    params = tiny.init(base)
    tiny.assert_trees_equal(tiny.init(dataclasses.replace(base, unroll=1, remat="full", residual_dropout=0.1)), params)
    more = {"qk_norm": True, "tie_embeddings": False, "activation": "swiglu", "positions": "rope"}
    others = dict(tree.path_leaves(tiny.init(dataclasses.replace(base, **more))))
    ours = dict(tree.path_leaves(params))
    assert set(ours) - set(others) == {"position_embed/embedding"}
    assert len(set(others) - set(ours)) == 5  # two norms, a gate and its bias, a head
    for path in set(ours) & set(others):
        np.testing.assert_array_equal(ours[path], others[path], err_msg=path)
    other_seed = tiny.init(base, seed=1)
    assert not np.array_equal(other_seed["embed"]["embedding"], params["embed"]["embedding"])


@pytest.mark.parametrize(("layers", "scaled"), [(8, True), (1, False)])
def test_initial_values_are_as_configured(layers, scaled):
    config = tiny.config(d_model=64, d_ff=160, n_layers=layers, init_std=0.03, scale_residual_init=scaled)
    params = tiny.init(dataclasses.replace(config, tie_embeddings=False, unroll=1))
    for path, leaf in tree.path_leaves(params):
        name = path.split("/")[-1]
        if name == "bias":
            assert not np.any(leaf), path
        elif name == "scale":
            assert np.all(leaf == 1), path
        else:
            inner = path.endswith(("attention/out/kernel", "mlp/down/kernel"))
            std = 0.03 / math.sqrt(2 * layers) if inner and scaled else 0.03
            deviation = 5 / math.sqrt(2 * leaf.size)  # five standard errors
            assert abs(np.std(leaf) / std - 1) < deviation, path
            assert abs(np.mean(leaf)) < 5 * std / math.sqrt(leaf.size), path
    kernels = np.asarray(params["layers"]["mlp"]["up"]["kernel"]).reshape(layers, -1)
    assert np.max(np.abs(np.corrcoef(kernels) - np.eye(layers))) < 0.1  # layers differ


def test_bfloat16_compute_keeps_logits_loss_and_parameters_in_float32():
    config = tiny.config(
        compute_dtype="bfloat16", attention="blocked", positions="rope", activation="swiglu", norm="rmsnorm"
    )
    model, params = tiny.build(config)
    batch = tiny.packed_batch(4, 12, 64)
    logits = logits_of(model, params, batch)
    assert logits.dtype == jnp.float32
    # More than bfloat16 can tell apart: the sums of the head's products were never rounded to it.
    assert np.any(np.asarray(logits.astype(jnp.bfloat16), np.float32) != logits)
    exact = logits_of(Transformer(dataclasses.replace(config, compute_dtype="float32")), params, batch)
    assert 0 < tiny.relative(logits, exact) < 0.03
    for task in [CausalLM(), CausalLM(loss_chunk=5)]:
        loss, grads = make_loss_and_grad(model, batch, task=task)(params)
        assert loss.dtype == jnp.float32
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((params, grads)))


def test_bfloat16_parameters():
    model, params = tiny.build(tiny.config(compute_dtype="bfloat16", attention="blocked", param_dtype="bfloat16"))
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(params))
    batch = tiny.packed_batch(4, 12, 64)
    for task in [CausalLM(), CausalLM(loss_chunk=5)]:
        loss, grads = make_loss_and_grad(model, batch, task=task)(params)
        assert loss.dtype == jnp.float32
        assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize("place", ["embedding", "residual", "attention"])
def test_dropout_is_off_when_deterministic_and_follows_its_key(place):
    plain, params = tiny.build(tiny.config())
    params = tiny.perturbed(params)
    model = Transformer(dataclasses.replace(plain.config, **{f"{place}_dropout": 0.3}))
    batch = tiny.stream_batch(2, 8, 64)
    np.testing.assert_array_equal(logits_of(model, params, batch), logits_of(plain, params, batch))

    @jax.jit
    def dropped(key):
        return model.apply({"params": params}, batch["tokens"], deterministic=False, rngs={"dropout": key})

    one, two, one_again = dropped(jax.random.key(1)), dropped(jax.random.key(2)), dropped(jax.random.key(1))
    np.testing.assert_array_equal(one, one_again)
    assert tiny.relative(one, two) > 0.01


def test_layers_do_not_share_their_dropout():
    """With every other path closed, the two layers' residual masks would otherwise coincide."""
    model, params = tiny.build(tiny.config(residual_dropout=0.5, positions="none"))
    x = params["layers"]
    ones = jax.tree.map(jnp.zeros_like, x)
    ones["mlp"]["down"]["bias"] = jnp.ones_like(x["mlp"]["down"]["bias"])  # each block adds exactly 1 where it is kept
    variables = {"params": params | {"layers": ones, "embed": jax.tree.map(jnp.zeros_like, params["embed"])}}
    ids = np.zeros((1, 400), np.int32)

    def run(key):
        # Before the last norm: the number of layers that kept each feature, times 2.
        bound = model.bind(variables, rngs={"dropout": key})
        return bound.layers(bound.embed(ids), None, Context(), False)[0]

    kept = np.asarray(jax.jit(run)(jax.random.key(0))) / 2
    shares = [np.mean(kept == n) for n in (0, 1, 2)]
    np.testing.assert_allclose(shares, [0.25, 0.5, 0.25], atol=0.03)


@pytest.mark.parametrize(
    "changes",
    [
        {"d_model": 128, "d_ff": 512, "vocab_size": 512},
        {"d_model": 128, "vocab_size": 512, "activation": "swiglu", "n_kv_heads": 2, "d_ff": None, "positions": "rope"},
        {"d_model": 128, "d_ff": 256, "vocab_size": 1024, "tie_embeddings": False, "head_dim": 48},
    ],
)
def test_flops_per_token_are_those_xla_counts(changes):
    config = tiny.config(max_len=64, attention="xla", **changes)
    model = Transformer(config)
    B, T = 2, 64
    batch = tiny.stream_batch(B, T, config.vocab_size)
    params = jax.eval_shape(lambda: tiny.build(config)[1])

    def loss(params):
        return CausalLM().loss(model, params, batch, None)[0]

    counted = jax.jit(jax.grad(loss)).lower(params).compile().cost_analysis()["flops"]
    # XLA also counts norms, softmax and activations; at this width they are some percent.
    assert 1.0 <= counted / (B * T * flops_per_token(config, T)) < 1.15


def test_flops_of_gpt2_small_by_hand():
    from lm.models.presets import gpt2

    matrices = 12 * (4 * 768 * 768 + 2 * 768 * 3072) + 768 * 50257
    assert flops_per_token(gpt2(), 1024) == 6 * matrices + 12 * 12 * 768 * 1024
    assert flops_per_token(gpt2(window=256), 1024) == 6 * matrices + 12 * 12 * 768 * 256


REFUSED = [
    ({"n_heads": 5}, "model.n_heads = 5 does not divide model.d_model = 32"),
    ({"n_kv_heads": 3}, "model.n_kv_heads = 3 does not divide model.n_heads = 4"),
    ({"positions": "rope", "head_dim": 7}, "even head width, found 7"),
    ({"n_layers": 0}, "model.n_layers is 0"),
    ({"vocab_size": 0}, "model.vocab_size is 0"),
    ({"window": 0}, "model.window is 0"),
    ({"d_ff": -1}, "model.d_ff is -1"),
    ({"residual_dropout": 1.0}, "model.residual_dropout is 1.0"),
    ({"attention_dropout": -0.1}, "model.attention_dropout is -0.1"),
    ({"unroll": 3}, "model.unroll = 3"),
    ({"attention_softcap": -1.0}, "model.attention_softcap is -1.0"),
    ({"logit_softcap": -1.0}, "model.logit_softcap is -1.0"),
    ({"norm_epsilon": -1e-5}, "model.norm_epsilon is -1e-05"),
    ({"init_std": -0.1}, "model.init_std is -0.1"),
    ({"rope_theta": 0.0}, "model.rope_theta is 0.0"),
    ({"positions": "rotary"}, "model.positions is 'rotary'.*learned, sinusoidal, rope, relative, none"),
    ({"norm": "layer"}, "model.norm is 'layer'"),
    ({"norm_place": "both"}, "model.norm_place is 'both'"),
    ({"activation": "mish"}, "model.activation is 'mish'"),
    ({"attention": "flash"}, "model.attention is 'flash'"),
    ({"compute_dtype": "float16"}, "model.compute_dtype is 'float16'"),
    ({"param_dtype": "int8"}, "model.param_dtype is 'int8'"),
    ({"remat": "all"}, "model.remat is 'all'"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=lambda x: str(x) if isinstance(x, dict) else "")
def test_a_wrong_setting_is_told_in_one_line(changes, message):
    with pytest.raises(UserError, match=message) as error:
        tiny.config(**changes)
    assert "\n" not in str(error.value)


def test_vocabulary_is_settled_by_the_tokenizer():
    config = ModelConfig(vocab_size=None)
    assert config.with_vocabulary(257).vocab_size == 384
    assert config.with_vocabulary(256).vocab_size == 256
    assert tiny.config(vocab_size=300).with_vocabulary(300).vocab_size == 300
    with pytest.raises(UserError, match=r"301 ids but model\.vocab_size is 300"):
        tiny.config(vocab_size=300).with_vocabulary(301)
    with pytest.raises(UserError, match="vocab_size is None"):
        Transformer(config).init(jax.random.key(0), np.zeros((1, 1), np.int32))


def test_derived_widths():
    assert ModelConfig(d_model=384, activation="swiglu").width_of_mlp == 1024
    assert ModelConfig(d_model=384).width_of_mlp == 1536
    assert ModelConfig(d_model=384, n_heads=6).width_of_head == 64
    assert ModelConfig(n_kv_heads=2).kv_heads == 2
    assert ModelConfig(n_heads=3).kv_heads == 3


def test_rows_longer_than_the_learned_positions_are_refused_as_the_model_is_traced():
    tokens = jnp.zeros((1, 33), jnp.int32)
    model, params = tiny.build(tiny.config(positions="learned"))
    for positions in (None, jnp.arange(33)[None]):
        with pytest.raises(UserError, match=r"33 tokens in a row, and model\.max_len is 32"):
            jax.eval_shape(lambda p, at=positions: model.apply({"params": p}, tokens, at), params)
    for positions in ("rope", "sinusoidal", "none"):  # these know any length
        model, params = tiny.build(tiny.config(positions=positions))
        assert jax.eval_shape(lambda p, m=model: m.apply({"params": p}, tokens), params).shape == (1, 33, 64)
