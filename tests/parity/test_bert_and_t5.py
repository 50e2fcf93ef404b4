"""BERT, T5 and the Transformer of 2017: the same numbers as torch, or as it computed where it is absent."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_families
from flax import linen as nn

from lm import losses, tree
from lm.generate import decode
from lm.models.layers import distance_buckets
from lm.models.transformer import Transformer, cross_cache, init_cache


def bert_outputs(params) -> dict[str, np.ndarray]:
    model, batch = Transformer(torch_families.BERT), torch_families.bert_batch()

    @jax.jit
    def outputs(params):
        bound = model.bind({"params": params})
        hidden, _ = bound.hidden(batch["tokens"], None, batch["segments"], types=batch["types"])
        logits, classes = bound.logits(hidden), bound.classify(hidden, batch["segments"])
        words = losses.cross_entropy(logits, batch["targets"], batch["weights"])[0] / batch["weights"].sum()
        ones = np.ones(torch_families.ROWS, np.float32)
        pairs = losses.cross_entropy(classes, batch["labels"], ones)[0] / torch_families.ROWS
        return {"logits": logits, "classes": classes, "loss": words + pairs}

    return outputs(params)


def seq2seq_logits(config, params) -> np.ndarray:
    batch = torch_families.translation_batch()
    return jax.jit(lambda params: Transformer(config).apply({"params": params}, **batch))(params)


def close_to_bert(ours, theirs) -> None:
    there = torch_families.bert_batch()["segments"] > 0
    assert np.ptp(theirs["logits"]) > 1
    np.testing.assert_allclose(ours["logits"][there], np.asarray(theirs["logits"])[there], atol=2e-5, rtol=0)
    np.testing.assert_allclose(ours["classes"], theirs["classes"], atol=1e-5, rtol=0)
    np.testing.assert_allclose(ours["loss"], theirs["loss"], rtol=1e-5)


@pytest.fixture(scope="module")
def golden():
    return np.load(Path(__file__).parent / "golden" / "families.npz")


@pytest.fixture
def torch_models():
    import torch_models

    return torch_models


@pytest.mark.parametrize(("family", "config"), [("bert", torch_families.BERT), ("t5", torch_families.T5)])
def test_every_parameter_has_a_weight_and_its_shape(family, config):
    weights = torch_families.draw(getattr(torch_families, f"{family}_shapes")())
    theirs = {path: leaf.shape for path, leaf in tree.path_leaves(getattr(torch_families, f"{family}_params")(weights))}
    boxed = jax.eval_shape(Transformer(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    assert theirs == {path: leaf.shape for path, leaf in tree.path_leaves(nn.unbox(boxed))}


def test_bert_is_the_golden_one(golden):
    ours = bert_outputs(torch_families.bert_params(torch_families.draw(torch_families.bert_shapes())))
    close_to_bert(ours, {name: golden[f"bert_{name}"] for name in ("logits", "classes", "loss")})


def test_t5_is_the_golden_one(golden):
    ours = seq2seq_logits(torch_families.T5, torch_families.t5_params(torch_families.draw(torch_families.t5_shapes())))
    assert np.ptp(golden["t5"]) > 1
    np.testing.assert_allclose(ours, golden["t5"], atol=1e-5, rtol=0)


def test_t5_decoded_token_by_token_is_the_golden_one(golden):
    """The source through the encoder once, its keys and values into the cache, and then one token at a time."""
    config = torch_families.T5
    params = torch_families.t5_params(torch_families.draw(torch_families.t5_shapes()))
    batch, model = torch_families.translation_batch(), Transformer(config)
    segments = batch["source_segments"]

    @jax.jit
    def all_tokens(params):
        source = model.apply({"params": params}, batch["source_tokens"], None, segments, method="encode")
        cache = init_cache(config, torch_families.ROWS, torch_families.LENGTH) | cross_cache(config, params, source)
        cache = decode.unstacked(cache, config.n_layers)
        ready = decode.for_decoding(params, config)

        def step(cache, at):
            tokens = jax.lax.dynamic_slice_in_dim(batch["tokens"], at, 1, axis=1)
            at = np.full((torch_families.ROWS, 1), 0, np.int32) + at
            hidden, cache = decode.forward(model, ready, cache, tokens, at, source_segments=segments)
            return cache, model.apply({"params": params}, hidden[:, 0], method="logits")

        return jax.lax.scan(step, cache, np.arange(torch_families.LENGTH, dtype=np.int32))[1].swapaxes(0, 1)

    np.testing.assert_allclose(all_tokens(params), golden["t5"], atol=1e-5, rtol=0)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_bert_is_that_of_torch(torch_models):
    model = torch_models.bert()
    ours = bert_outputs(torch_families.bert_params(torch_models.weights_of(model)))
    close_to_bert(ours, torch_models.bert_outputs(model))


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("gated", [False, True], ids=["1.0", "1.1"])
def test_t5_is_that_of_torch(torch_models, gated):
    model = torch_models.t5(gated)
    # `transformers` 5 ties the head of 1.1 too, and leaves out the scale.
    changes = {"activation": "geglu_tanh", "scale_logits": False} if gated else {}
    config = replace(torch_families.T5, **changes)
    ours = seq2seq_logits(config, torch_families.t5_params(torch_models.weights_of(model), config))
    np.testing.assert_allclose(ours, torch_models.t5_logits(model), atol=1e-5, rtol=0)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_the_transformer_of_2017_is_that_of_torch(torch_models):
    import torch

    model = torch_models.transformer()
    ours = seq2seq_logits(torch_families.TRANSFORMER, torch_families.transformer_params(torch_models.weights_of(model)))
    with torch.no_grad():
        theirs = model(torch_families.translation_batch()).numpy()
    assert np.ptp(theirs) > 1
    np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("buckets", "furthest"), [(32, 128), (8, 10), (64, 512)])
@pytest.mark.parametrize("both_sides", [True, False])
def test_buckets_of_distances_are_those_of_t5(buckets, furthest, both_sides):
    import torch
    from transformers.models.t5.modeling_t5 import T5Attention

    distance = np.arange(-3000, 3001)
    theirs = T5Attention._relative_position_bucket(torch.from_numpy(distance), both_sides, buckets, furthest)
    np.testing.assert_array_equal(distance_buckets(distance, buckets, furthest, both_sides), theirs.numpy())
