"""Encoders, encoder-decoders and prefixes: what may be seen, what changes nothing, cached decoding, heads."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import linen as nn

from lm import tree
from lm.errors import UserError
from lm.generate import decode
from lm.models.heads import pool
from lm.models.transformer import (
    ModelConfig,
    Transformer,
    cross_cache,
    flops_per_token,
    head_parameters,
    init_cache,
)
from lm.sharding import MeshConfig, make_mesh, parameter_shardings

pytestmark = pytest.mark.usefixtures("strict_promotion")

BERT = {
    "mask": "bidirectional",
    "token_types": 2,
    "embedding_norm": True,
    "norm_place": "post",
    "activation": "gelu",
    "head_transform": True,
    "head_bias": True,
    "pooler": True,
    "n_classes": 3,
    "span_head": True,
}
T5 = {
    "encoder_layers": 2,
    "positions": "relative",
    "relative_buckets": 8,
    "relative_distance": 12,
    "norm": "rmsnorm",
    "activation": "geglu_tanh",
    "use_bias": False,
    "scale_attention": False,
    "scale_logits": True,
    "head_dim": 6,
}
TRANSFORMER = {
    "encoder_layers": 3,
    "positions": "sinusoidal",
    "norm_place": "post",
    "activation": "relu",
    "scale_embeddings": True,
}
BART = {
    "encoder_layers": 1,
    "positions": "learned",
    "embedding_norm": True,
    "share_embeddings": False,
    "head_bias": True,
}
ROPE = {"encoder_layers": 2, "positions": "rope", "norm": "rmsnorm", "n_kv_heads": 2, "qk_norm": True}
PREFIX = {"mask": "prefix", "positions": "rope"}
SEQ2SEQ = {"t5": T5, "transformer": TRANSFORMER, "bart": BART, "rope": ROPE}
FAMILIES = {"bert": BERT, "prefix": PREFIX} | SEQ2SEQ


def built(changes: dict, **more) -> tuple[Transformer, dict]:
    """A model whose parameters are far from those it begins with, so that everything matters."""
    model, params = tiny.build(tiny.config(**({"unroll": 1} | changes | more)))
    return model, tiny.perturbed(params)


def touched(outputs, inputs: jax.Array, count: int) -> np.ndarray:
    """Which rows of `inputs` `[T, D]` each of `count` outputs depends on: bool `[count, T]`."""

    def sum_at(x, out):
        return jnp.sum(jnp.square(outputs(x)[out]))

    grads = jax.jit(jax.vmap(jax.grad(sum_at), (None, 0)))(inputs, np.arange(count))
    return np.any(np.asarray(grads) != 0, axis=-1)


def with_places(params: dict, name: str, table) -> dict:
    """Parameters whose position vectors are the argument: as each place has its own, its gradient is that place's."""
    return {"params": params | {name: {"embedding": table}}}


@pytest.mark.parametrize("implementation", tiny.fast(["xla", "blocked"], "blocked"))
def test_an_encoder_sees_both_sides_of_its_own_segment_and_nothing_else(implementation):
    T = 11
    model, params = built(BERT, attention=implementation, max_len=T)
    tokens = np.arange(T, dtype=np.int32)[None]
    segments = np.array([[1] * 4 + [2] * 5 + [0] * 2], np.int32)

    def outputs(table):
        variables = with_places(params, "position_embed", table)
        hidden, _ = model.apply(variables, tokens, None, segments, method="hidden")
        return hidden[0]

    seen = touched(outputs, params["position_embed"]["embedding"], T)
    np.testing.assert_array_equal(seen, segments[0][:, None] == segments[0])


def source_case() -> tuple[np.ndarray, np.ndarray]:
    """Segments of a row of 9 targets and of its 10 sources; target segment 3 has no source."""
    return (
        np.array([[1, 1, 1, 2, 2, 3, 3, 0, 0]], np.int32),
        np.array([[1, 1, 2, 2, 2, 2, 4, 0, 0, 0]], np.int32),
    )


@pytest.mark.parametrize("implementation", tiny.fast(["xla", "blocked"], "xla"))
def test_a_decoder_sees_its_past_and_the_source_of_its_own_segment(implementation):
    model, params = built(BART, attention=implementation, n_layers=1, max_len=10)
    segments, source_segments = source_case()
    T, S = segments.shape[1], source_segments.shape[1]
    tokens, source = np.arange(T, dtype=np.int32)[None], np.arange(S, dtype=np.int32)[None]

    def outputs(name):
        def of(table):
            variables = with_places(params, name, table)
            return model.apply(
                variables, tokens, None, segments, source_tokens=source, source_segments=source_segments
            )[0]

        return of

    own = segments[0][:, None] == segments[0]
    seen = touched(outputs("position_embed"), params["position_embed"]["embedding"], T)[:, :T]
    np.testing.assert_array_equal(seen, own & np.tri(T, dtype=bool))
    seen = touched(outputs("encoder_position_embed"), params["encoder_position_embed"]["embedding"], T)
    np.testing.assert_array_equal(seen, (segments[0][:, None] == source_segments[0]) & (source_segments[0] > 0))


def test_the_encoder_sees_both_sides_of_a_source_segment():
    model, params = built(BART, max_len=10)
    source_segments = source_case()[1]
    source = np.arange(10, dtype=np.int32)[None]

    def outputs(table):
        variables = with_places(params, "encoder_position_embed", table)
        return model.apply(variables, source, None, source_segments, method="encode")[0]

    seen = touched(outputs, params["encoder_position_embed"]["embedding"], 10)
    np.testing.assert_array_equal(seen, source_segments[0][:, None] == source_segments[0])


PREFIX_CASES = [("xla", None), ("blocked", 3), ("xla", 3), ("blocked", None)]


@pytest.mark.parametrize(("implementation", "window"), tiny.fast(PREFIX_CASES, *PREFIX_CASES[:2]))
def test_a_prefix_sees_itself_to_both_sides(implementation, window):
    """Against the definition, place by place, in one layer."""
    T = 12
    model, params = built({"mask": "prefix"}, attention=implementation, window=window, n_layers=1, max_len=T)
    tokens = np.arange(T, dtype=np.int32)[None]
    segments = np.array([[1] * 6 + [2] * 5 + [0]], np.int32)
    prefix = np.array([[1, 1, 1, 0, 0, 0, 1, 1, 0, 0, 0, 0]], np.int32)

    def outputs(table):
        return model.apply(with_places(params, "position_embed", table), tokens, None, segments, prefix=prefix)[0]

    seen = touched(outputs, params["position_embed"]["embedding"], T)
    expected = np.zeros((T, T), bool)
    for t in range(T):
        for s in range(T):
            same = segments[0, t] == segments[0, s]
            near = window is None or abs(t - s) < window
            expected[t, s] = same and near and (s <= t or (prefix[0, t] and prefix[0, s]))
    np.testing.assert_array_equal(seen, expected)
    without = model.apply({"params": params}, tokens, None, segments)
    causal = Transformer(dataclasses.replace(model.config, mask="causal"))
    # The kernel for plain causal attention takes over; to a rounding.
    assert tiny.relative(without, causal.apply({"params": params}, tokens, None, segments)) < 1e-6
    assert tiny.relative(without, model.apply({"params": params}, tokens, None, segments, prefix=prefix)) > 1e-3


@pytest.mark.parametrize("family", tiny.fast(["t5", "bart", "rope"], "t5"))
def test_packed_pairs_give_the_logits_they_give_alone(family):
    model, params = built(SEQ2SEQ[family])
    rng = np.random.default_rng(0)
    tokens, source = (rng.integers(0, 64, (1, length), dtype=np.int32) for length in (12, 14))
    lengths, source_lengths = (5, 4), (3, 8)  # then padding
    segments, source_segments = np.zeros_like(tokens), np.zeros_like(source)
    positions, source_positions = np.zeros_like(tokens), np.zeros_like(source)
    pieces = []
    start = source_start = 0
    for number, (length, source_length) in enumerate(zip(lengths, source_lengths), start=1):
        there = np.s_[0, start : start + length], np.s_[0, source_start : source_start + source_length]
        segments[there[0]], source_segments[there[1]] = number, number
        positions[there[0]], source_positions[there[1]] = np.arange(length), np.arange(source_length)
        pieces.append(there)
        start, source_start = start + length, source_start + source_length
    apply = jax.jit(lambda *args, **kwargs: model.apply({"params": params}, *args, **kwargs))
    packed = apply(
        tokens,
        positions,
        segments,
        source_tokens=source,
        source_positions=source_positions,
        source_segments=source_segments,
    )
    for target, origin in pieces:
        alone = apply(tokens[target][None], source_tokens=source[origin][None])
        assert tiny.relative(packed[target], alone[0]) < 5e-6


CACHED = SEQ2SEQ | {
    "prefix": PREFIX,
    "prefix-relative": {"mask": "prefix", "positions": "relative", "relative_buckets": 8, "relative_distance": 9},
    "relative-window": {"positions": "relative", "window": 4, "n_kv_heads": 2, "scale_attention": False},
    "relative-post": {"positions": "relative", "norm_place": "post", "attention_softcap": 2.0},
}


@pytest.mark.parametrize("kind", tiny.fast(CACHED, "t5", "rope", "prefix", "relative-window"))
def test_cached_logits_equal_uncached(kind):
    """A first piece at once, then token by token; through the stacked layers and through a list of them."""
    model, params = built(CACHED[kind])
    config, rng = model.config, np.random.default_rng(0)
    B, P, T, slots = 3, 7, 12, 16
    tokens = rng.integers(0, 64, (B, T), dtype=np.int32)
    prefix = None
    if config.mask == "prefix":
        prefix = np.array([[1] * 7, [1] * 4 + [0] * 3, [0] * 7], np.int32)
    source, source_segments = None, None
    if config.encoder_layers:
        source = rng.integers(0, 64, (B, 9), dtype=np.int32)
        source_segments = (np.arange(9) < np.array([[9], [4], [6]])).astype(np.int32)

    @jax.jit
    def all_ways(params):
        variables = {"params": params}
        cache, encoded = init_cache(config, B, slots), None
        whole_prefix = None if prefix is None else jnp.pad(prefix, ((0, 0), (0, T - P)))
        if source is not None:
            encoded = model.apply(variables, source, None, source_segments, method="encode")
            cache = cache | cross_cache(config, params, encoded)
        uncached = model.apply(
            variables, tokens, prefix=whole_prefix, source_tokens=source, source_segments=source_segments
        )

        def stacked(cache, tokens, at, prefix=None):
            hidden, cache = model.apply(
                variables,
                tokens,
                at,
                prefix=prefix,
                source_segments=source_segments,
                cache=cache,
                cache_at=at,
                method="hidden",
            )
            return cache, hidden

        ready = decode.for_decoding(params, config)

        def listed(cache, tokens, at, prefix=None):
            hidden, cache = decode.forward(
                model, ready, cache, tokens, at, prefix=prefix, source_segments=source_segments
            )
            return cache, hidden

        found = []
        for forward, start in [(stacked, cache), (listed, decode.unstacked(cache, config.n_layers))]:
            at = jnp.broadcast_to(jnp.arange(P), (B, P))
            cache, first = forward(start, tokens[:, :P], at, prefix)

            def step(cache, at, forward=forward):
                token = jax.lax.dynamic_slice_in_dim(tokens, at, 1, axis=1)
                return forward(cache, token, jnp.broadcast_to(at, (B, 1)))

            _, later = jax.lax.scan(step, cache, jnp.arange(P, T))
            hidden = jnp.concatenate([first, later[:, :, 0].swapaxes(0, 1)], axis=1)
            found.append(model.apply(variables, hidden, method="logits"))
        return uncached, found

    uncached, found = all_ways(params)
    for logits in found:
        assert tiny.relative(logits, uncached) < 1e-5


def test_without_a_cache_of_the_source_it_is_computed_each_time():
    model, params = built(T5)
    tokens, source = np.arange(6, dtype=np.int32)[None], np.arange(9, dtype=np.int32)[None]

    @jax.jit
    def both(params):
        variables, empty = {"params": params}, init_cache(model.config, 1, 6)
        encoded = model.apply(variables, source, method="encode")
        settings = {"cache_at": np.arange(6, dtype=np.int32)[None], "method": "hidden"}
        one, cache = model.apply(variables, tokens, source=encoded, cache=empty, **settings)
        assert set(cache) == {"key", "value"}
        two, _ = model.apply(variables, tokens, cache=empty | cross_cache(model.config, params, encoded), **settings)
        return one, two

    assert tiny.relative(*both(params)) < 1e-6


@pytest.mark.parametrize(
    "positions", tiny.fast(["learned", "sinusoidal", "rope", "relative", "none"], "learned", "relative", "none")
)
def test_the_order_of_a_source_matters_where_it_has_positions(positions):
    model, params = built({"encoder_layers": 1, "n_layers": 1, "positions": positions})
    tokens, source = np.arange(6, dtype=np.int32)[None], np.arange(9, dtype=np.int32)[None]
    apply = jax.jit(lambda source: model.apply({"params": params}, tokens, source_tokens=source))
    difference = tiny.relative(apply(source[:, ::-1]), apply(source))
    assert difference < 1e-5 if positions == "none" else difference > 1e-3


def scored_batch(family: str) -> dict[str, np.ndarray]:
    batch = tiny.packed_batch(4, 12, 64)
    if family == "bert":
        batch["types"] = (batch["positions"] > 2).astype(np.int32)
    if family == "prefix":
        batch["prefix"] = (batch["positions"] < 3).astype(np.int32)
    if family in SEQ2SEQ:
        source = tiny.packed_batch(4, 10, 64, seed=1)
        batch |= {f"source_{name}": source[name] for name in ("tokens", "positions", "segments")}
    return batch


def make_loss(model: Transformer, batch: dict, key=None):
    """Parameters to a loss that reads every head."""
    targets, weights = jnp.asarray(batch["targets"]), jnp.asarray(batch["weights"])
    inputs = {name: value for name, value in batch.items() if name not in ("tokens", "targets", "weights")}

    def forward(model, tokens, positions, segments, types=None, prefix=None, **source):
        settings = {"deterministic": key is None}
        if source:
            inside = source["source_tokens"], source["source_positions"], source["source_segments"]
            source = {"source": model.encode(*inside, **settings), "source_segments": source["source_segments"]}
        hidden, _ = model.hidden(tokens, positions, segments, types=types, prefix=prefix, **source, **settings)
        c = model.config
        other = [model.classify(hidden, segments, **settings)] if c.n_classes else []
        return model.logits(hidden), other + ([model.spans(hidden)] if c.span_head else [])

    def loss(params):
        rngs = None if key is None else {"dropout": key}
        logits, other = model.apply({"params": params}, batch["tokens"], **inputs, rngs=rngs, method=forward)
        nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
        assert all(x.dtype == jnp.float32 for x in (logits, *other))
        return jnp.sum(nll * weights) / weights.sum() + sum((jnp.mean(jnp.square(x - 1)) for x in other), start=0.0)

    return loss


@pytest.mark.parametrize("family", tiny.fast(["bert", "prefix", "t5", "bart"], "bert", "bart"))
def test_every_family_trains_one_step(family):
    model, params = tiny.build(tiny.config(**(FAMILIES[family] | {"unroll": 1})))
    loss = make_loss(model, scored_batch(family))
    before, grads = jax.jit(jax.value_and_grad(loss))(params)
    for path, grad in tree.path_leaves(grads):
        assert np.all(np.isfinite(grad)), path
        # Softmax ignores what is added to all scores of a query, which is what a key's bias does without rope.
        if not path.endswith("key/bias"):
            assert np.any(grad != 0), path
    moved = jax.tree.map(lambda p, g: p - np.float32(0.01) * g, params, grads)
    assert jax.jit(loss)(moved) < before


@pytest.mark.parametrize("family", ["bert", "t5", "bart"])
def test_bfloat16_compute_keeps_scores_and_gradients_in_float32(family):
    model, params = tiny.build(
        tiny.config(**(FAMILIES[family] | {"compute_dtype": "bfloat16", "attention": "blocked"}))
    )
    batch = scored_batch(family)
    value, grads = jax.eval_shape(jax.value_and_grad(make_loss(model, batch)), params)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((value, grads)))
    hidden, _ = jax.eval_shape(
        lambda params: model.apply(
            {"params": params},
            batch["tokens"],
            source=jnp.zeros((4, 5, 32), jnp.bfloat16) if family in SEQ2SEQ else None,
            method="hidden",
        ),
        params,
    )
    assert hidden.dtype == jnp.bfloat16
    if family == "t5":
        exact = make_loss(Transformer(dataclasses.replace(model.config, compute_dtype="float32")), batch)
        values = [float(jax.jit(loss)(params)) for loss in (make_loss(model, batch), exact)]
        assert 0 < abs(values[0] / values[1] - 1) < 0.02


def test_remat_and_unroll_change_no_gradient():
    """Nor the dropout drawn."""
    dropout = dict.fromkeys(("embedding_dropout", "residual_dropout"), 0.1)
    model, params = tiny.build(tiny.config(**(T5 | dropout)))
    batch, key = scored_batch("t5"), jax.random.key(1)
    want = jax.jit(jax.value_and_grad(make_loss(model, batch, key)))(params)
    other = Transformer(dataclasses.replace(model.config, unroll=1, remat="full"))
    found = jax.jit(jax.value_and_grad(make_loss(other, batch, key)))(params)
    assert abs(found[0] - want[0]) < 1e-6 * want[0]
    tiny.assert_trees_close(found[1], want[1], 1e-5)


NEW_PARTS = {
    "bert": {"type_embed", "embedding_norm", "head_transform", "head_bias", "pooler", "classifier", "span_head"},
    "t5": {"encoder_relative_bias", "encoder_layers", "encoder_norm"},
    "transformer": {"encoder_layers"},
    "bart": {"encoder_embed", "encoder_position_embed", "encoder_embedding_norm", "embedding_norm"}
    | {"encoder_layers", "encoder_norm", "head_bias"},
    "rope": {"encoder_layers", "encoder_norm"},
    "prefix": set(),
}
PLAIN = ("d_ff", "head_dim", "n_kv_heads", "activation", "use_bias", "norm", "qk_norm", "norm_place", "positions")


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_family_adds_has_names_of_its_own(family):
    """Beside those of a plain decoder, all of which it has; and each parameter says how it may be split."""
    config = tiny.config(**FAMILIES[family])
    plain = tiny.config(**{name: getattr(config, name) for name in PLAIN})
    boxed = [
        jax.eval_shape(Transformer(c).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
        for c in (config, plain)
    ]
    ours, theirs = ({path: leaf.shape for path, leaf in tree.path_leaves(nn.unbox(p))} for p in boxed)
    assert set(theirs) <= set(ours)
    new = [path.split("/") for path in set(ours) - set(theirs)]
    assert {parts[0] for parts in new} - {"layers"} == NEW_PARTS[family]
    crossing = {parts[1] for parts in new if parts[0] == "layers"}
    assert crossing == ({"cross_attention", "cross_norm"} if config.encoder_layers else set())

    mesh = make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
    paths = [path for path, _ in tree.path_leaves(nn.unbox(boxed[0]))]
    for path, sharding in zip(paths, jax.tree.leaves(parameter_shardings(boxed[0], mesh))):
        matrix = path.endswith(("kernel", "embedding"))
        assert not (matrix and sharding.is_fully_replicated), path
        assert matrix or path.endswith(("scale", "bias")), path


def test_parameters_that_are_shared_with_a_plain_decoder_start_the_same():
    for changes in (BERT, BART):
        config = tiny.config(**(changes | {"scale_residual_init": False}))
        plain = tiny.config(**{name: getattr(config, name) for name in PLAIN}, scale_residual_init=False)
        ours, theirs = (dict(tree.path_leaves(tiny.init(c))) for c in (config, plain))
        for path, leaf in theirs.items():
            np.testing.assert_array_equal(ours[path], leaf, err_msg=path)


# Sums of the absolute initial values, by leaf, of seed 0, so that a change of what a seed means is noticed.
FIRST = {
    "embed/embedding": 32.13090066409677,
    "layers/attention/key/kernel": 32.81628069594444,
    "layers/attention/out/kernel": 16.09215280794183,
    "layers/attention/query/kernel": 32.335514189147034,
    "layers/attention/value/kernel": 31.80708162866722,
    "layers/mlp/down/kernel": 65.0838845486578,
    "layers/mlp/up/kernel": 130.77255236867677,
    "position_embed/embedding": 16.53609775523364,
}


def test_a_plain_decoder_starts_as_it_did():
    config = ModelConfig(vocab_size=64, d_model=32, n_layers=2, n_heads=4, max_len=32)
    leaves = dict(tree.path_leaves(tiny.init(config)))
    sums = {path: float(np.abs(np.asarray(leaf, np.float64)).sum()) for path, leaf in leaves.items()}
    kept = {path: value for path, value in sums.items() if not path.endswith(("bias", "scale"))}
    assert kept.keys() == FIRST.keys()
    for path, value in kept.items():
        assert value == pytest.approx(FIRST[path], rel=1e-6), path


def test_a_decoder_with_a_source_scales_its_output_projections_by_three_sums_a_layer():
    config = tiny.config(encoder_layers=3, d_model=64, d_ff=256, init_std=0.05)
    params = tiny.init(config)
    for name, sums in [("layers", 3 * 2), ("encoder_layers", 2 * 3)]:
        kernel = np.asarray(params[name]["mlp"]["down"]["kernel"])
        assert abs(kernel.std() * math.sqrt(sums) / 0.05 - 1) < 0.05
    out = np.asarray(params["layers"]["cross_attention"]["out"]["kernel"])
    assert abs(out.std() * math.sqrt(6) / 0.05 - 1) < 0.05


def test_a_mesh_changes_no_gradient():
    model, params = built(T5)
    loss = make_loss(model, scored_batch("t5"))
    want = jax.jit(jax.value_and_grad(loss))(params)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    boxed = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, parameter_shardings(boxed, mesh))
        found = jax.jit(jax.value_and_grad(loss))(placed)
    assert abs(found[0] - want[0]) < 1e-5 * abs(want[0])
    tiny.assert_trees_close(found[1], want[1], 1e-4)


def test_pooling():
    hidden = np.random.default_rng(0).standard_normal((3, 5, 4)).astype(np.float32)
    segments = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]], np.int32)
    np.testing.assert_array_equal(pool(hidden, segments, "first"), hidden[:, 0])
    np.testing.assert_array_equal(pool(hidden, None, "last"), hidden[:, -1])
    np.testing.assert_array_equal(pool(hidden, segments, "last")[:2], [hidden[0, 4], hidden[1, 1]])
    np.testing.assert_allclose(pool(hidden, None, "mean"), hidden.mean(axis=1), atol=1e-6)
    means = np.stack([hidden[0].mean(axis=0), hidden[1, :2].mean(axis=0), np.zeros(4)])
    np.testing.assert_allclose(pool(hidden, segments, "mean"), means, atol=1e-6)


@pytest.mark.parametrize("pooling", tiny.fast(["first", "last", "mean"], "last", "mean"))
def test_padding_changes_no_class_score(pooling):
    model, params = built(BERT, pooling=pooling)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 64, (2, 10), dtype=np.int32)
    segments = (np.arange(10) < 6).astype(np.int32)[None].repeat(2, axis=0)

    @jax.jit
    def classes(tokens, segments):
        hidden, _ = model.apply({"params": params}, tokens, None, segments, method="hidden")
        return model.apply({"params": params}, hidden, segments, method="classify")

    scores = classes(tokens, segments)
    assert scores.shape == (2, 3)
    tokens[:, 6:] = rng.integers(0, 64, (2, 4))
    np.testing.assert_array_equal(classes(tokens, segments), scores)
    assert tiny.relative(classes(tokens[:, :6], segments[:, :6]), scores) < 1e-5
    assert tiny.relative(classes(tokens, np.ones_like(segments)), scores) > 1e-3


def test_dropout_of_the_classifier_acts_on_it_alone():
    model, params = built(BERT, classifier_dropout=0.5)
    hidden = np.ones((2, 4, 32), np.float32)
    rngs = {"dropout": jax.random.key(0)}
    plain = model.apply({"params": params}, hidden, method="classify")
    dropped = model.apply({"params": params}, hidden, deterministic=False, rngs=rngs, method="classify")
    assert tiny.relative(dropped, plain) > 0.01
    logits = model.apply({"params": params}, np.ones((1, 3), np.int32), deterministic=False, rngs=rngs)
    np.testing.assert_array_equal(logits, model.apply({"params": params}, np.ones((1, 3), np.int32)))


def test_dropout_of_source_and_target_embeddings_differs():
    """With layers that add nothing, what is left of the embeddings; in two calls, as tasks make them."""
    model, params = tiny.build(tiny.config(encoder_layers=1, n_layers=1, embedding_dropout=0.5, positions="none"))
    zeros = jax.tree.map(jnp.zeros_like, params)
    ones = {name: zeros[name] for name in ("layers", "encoder_layers")}
    ones |= {"embed": {"embedding": jnp.arange(1.0, 33.0) * jnp.ones((64, 1))}}
    norms = {name: jax.tree.map(jnp.ones_like, params[name]) for name in ("final_norm", "encoder_norm")}
    variables, tokens = {"params": ones | norms}, np.zeros((1, 30), np.int32)
    settings = {"deterministic": False, "rngs": {"dropout": jax.random.key(0)}}
    source = model.apply(variables, tokens, **settings, method="encode")
    target, _ = model.apply(variables, tokens, source=source, **settings, method="hidden")
    low = [np.isclose(x, np.min(x, axis=-1, keepdims=True)) for x in map(np.asarray, (source, target))]
    assert 0.4 < np.mean(low[0] == low[1]) < 0.6


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_reads_the_parameters_that_are_named_and_no_others(family):
    model, params = built(FAMILIES[family])
    hidden = np.random.default_rng(0).standard_normal((1, 3, 32)).astype(np.float32)
    head = head_parameters(model.config, params)
    alone = model.apply({"params": head}, hidden, method="logits")
    np.testing.assert_array_equal(alone, model.apply({"params": params}, hidden, method="logits"))
    assert set(head) == {"embed"} | ({"head_transform", "head_bias"} & set(params))
    grads = jax.grad(lambda head: jnp.sum(jnp.square(model.apply({"params": head}, hidden, method="logits"))))(head)
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(grads))


def test_scales():
    """Of embeddings and of logits: factors of sqrt(d_model), each in its place."""
    base, params = built({"positions": "none", "norm_place": "post"})
    scaled = Transformer(dataclasses.replace(base.config, scale_embeddings=True, scale_logits=True))
    tokens = np.arange(5, dtype=np.int32)[None]
    x, _ = base.apply({"params": params}, tokens, None, method="embedded")
    y, _ = scaled.apply({"params": params}, tokens, None, method="embedded")
    np.testing.assert_allclose(y, x * math.sqrt(32), rtol=1e-6)
    logits = base.apply({"params": params}, x, method="logits")
    assert tiny.relative(scaled.apply({"params": params}, x, method="logits"), logits / math.sqrt(32)) < 1e-6


def test_token_types_are_added_and_0_where_none_are_given():
    model, params = built(BERT)
    tokens = np.arange(6, dtype=np.int32)[None]
    apply = jax.jit(lambda types: model.apply({"params": params}, tokens, types=types))
    plain = jax.jit(lambda: model.apply({"params": params}, tokens))()
    assert tiny.relative(apply(np.zeros((1, 6), np.int32)), plain) < 2e-6
    assert tiny.relative(apply(np.array([[0, 0, 1, 1, 1, 1]], np.int32)), plain) > 1e-3


def test_relative_positions_are_told_by_distance_alone():
    """A text further to the right of its row, after another document, gives the same."""
    model, params = built({"positions": "relative", "mask": "bidirectional"})
    tokens = np.random.default_rng(0).integers(0, 64, (1, 8), dtype=np.int32)
    later = np.concatenate([tokens[:, :3], tokens], axis=1)
    segments = np.array([[1] * 3 + [2] * 8], np.int32)
    apply = jax.jit(lambda *args: model.apply({"params": params}, *args))
    assert tiny.relative(apply(later, None, segments)[:, 3:], apply(tokens, None, np.ones_like(tokens))) < 1e-5
    turned = apply(tokens[:, ::-1], None, np.ones_like(tokens))[:, ::-1]
    assert tiny.relative(turned, apply(tokens, None, np.ones_like(tokens))) > 1e-2  # order matters


def test_flops_by_hand():
    from lm.models.presets import bert, t5, transformer

    layer = 4 * 768 * 768 + 2 * 768 * 3072
    weights = 12 * layer + 768 * 768 + 768 * 30522
    assert flops_per_token(bert(), 128) == 6 * weights + 12 * 12 * 768 * 128
    # 20 target and 40 source tokens, so 2 source tokens for each that is counted.
    attention, feed_forward = 4 * 512 * 512, 2 * 512 * 2048
    decoder = 6 * (attention + attention // 2 + feed_forward) + 512 * 37000  # of the source, the query and the output
    encoder = 6 * (attention + feed_forward) + 6 * attention // 2  # and the decoder's keys and values of it
    spans = 12 * 6 * 512 * (20 + 40) + 2 * 12 * 6 * 512 * 40
    assert flops_per_token(transformer(), 20, 40) == 6 * (decoder + 2 * encoder) + spans
    # T5 small differs in its vocabulary alone, as far as products go.
    assert flops_per_token(t5("small"), 20, 40) == flops_per_token(transformer(vocab_size=32128), 20, 40)


@pytest.mark.parametrize("family", tiny.fast(["bert", "t5", "bart"], "t5"))
def test_flops_are_those_xla_counts(family):
    wide = {"d_model": 128, "d_ff": 512, "vocab_size": 512, "max_len": 64, "n_classes": 0, "pooler": False}
    model, params = tiny.build(tiny.config(**(FAMILIES[family] | wide | {"span_head": False})))
    B, T, S = 2, 48, 64
    batch = tiny.stream_batch(B, T, 512)
    source = tiny.stream_batch(B, S, 512)["tokens"] if model.config.encoder_layers else None

    def loss(params):
        logits = model.apply({"params": params}, batch["tokens"], source_tokens=source)
        return jnp.sum(jnp.square(logits))

    compiled = jax.jit(jax.grad(loss)).lower(params).compile()
    counted = compiled.cost_analysis()["flops"] / (B * T * flops_per_token(model.config, T, S))
    assert 0.95 <= counted < 1.2


REFUSED = [
    (
        {"encoder_layers": 2, "mask": "bidirectional"},
        "model.mask = bidirectional does not go with model.encoder_layers = 2",
    ),
    ({"encoder_layers": 2, "token_types": 2}, "model.token_types = 2 does not go with model.encoder_layers = 2"),
    ({"encoder_layers": -1}, "model.encoder_layers is -1"),
    ({"token_types": -1}, "model.token_types is -1"),
    ({"n_classes": -1}, "model.n_classes is -1"),
    ({"n_classes": 2}, "first token of a causal model.*last or mean"),
    ({"pooler": True}, "first token of a causal model.*last or mean"),
    ({"share_embeddings": False}, "model.share_embeddings is False"),
    ({"relative_buckets": 6}, "model.relative_buckets is 6; it must be a multiple of 4"),
    ({"relative_buckets": 64, "relative_distance": 32}, "model.relative_distance = 32"),
    ({"classifier_dropout": 1.0}, "model.classifier_dropout is 1.0"),
    ({"mask": "none"}, "model.mask is 'none'; choose one of causal, bidirectional, prefix"),
    ({"pooling": "max"}, "model.pooling is 'max'"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=lambda x: str(x) if isinstance(x, dict) else "")
def test_a_wrong_setting_is_told_in_one_line(changes, message):
    with pytest.raises(UserError, match=message) as error:
        tiny.config(**changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes", [{"encoder_layers": 2}, {"n_classes": 2, "pooling": "last"}, BERT, {"pooling": "mean"}]
)
def test_what_goes_together_is_taken(changes):
    tiny.config(**changes)


def test_calls_that_do_not_fit_the_model_are_told():
    tokens = jnp.zeros((1, 3), jnp.int32)

    def trace(changes, *args, method, **kwargs):
        model, params = tiny.build(tiny.config(**changes))
        return jax.eval_shape(lambda p: model.apply({"params": p}, *args, method=method, **kwargs), params)

    with pytest.raises(UserError, match="given no source"):
        trace(T5, tokens, method="hidden")
    with pytest.raises(UserError, match="has no encoder"):
        trace({}, tokens, method="encode")
    with pytest.raises(UserError, match="has no encoder"):
        trace({}, tokens, source=jnp.zeros((1, 2, 32)), method="hidden")
    with pytest.raises(UserError, match="has no classifier"):
        trace({}, jnp.zeros((1, 2, 32)), method="classify")
    with pytest.raises(UserError, match="no scores for spans"):
        trace({}, jnp.zeros((1, 2, 32)), method="spans")
    model, _ = tiny.build(tiny.config(**BERT))
    with pytest.raises(UserError, match="sees both sides"):
        trace(BERT, tokens, cache=init_cache(model.config, 1, 4), cache_at=tokens, method="hidden")
