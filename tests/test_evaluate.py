"""Evaluation: sums divided once, whatever the batches."""

import math
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import linen as nn

from lm import metrics
from lm.evaluate import baselines, evaluate, make_eval_step
from lm.sharding import MeshConfig, make_mesh
from lm.tasks.causal_lm import CausalLM
from lm.train import abstract_params

ROWS, LENGTH, VOCAB = 10, 16, 64


@pytest.fixture(scope="module")
def trained():
    model, params = tiny.build(tiny.config(residual_dropout=0.5))
    return model, tiny.perturbed(nn.unbox(params))


@pytest.fixture(scope="module")
def text():
    return tiny.packed_batch(ROWS, LENGTH, VOCAB)


SMOOTHED = CausalLM(label_smoothing=0.1, z_loss=0.1)


def _evaluate(trained, batches, task=SMOOTHED, **options):
    model, params = trained
    mesh = make_mesh(MeshConfig(devices=1))
    with jax.set_mesh(mesh):
        step = make_eval_step(model, task, mesh, abstract_params(model, mesh)[1])
        return evaluate(step, params, batches, mesh, **options)


def _cut(batch, size):
    """Batches of `size` rows, the last filled up with rows of weight 0."""
    for begin in range(0, ROWS, size):
        part = {name: rows[begin : begin + size] for name, rows in batch.items()}
        missing = size - len(part["tokens"])
        yield {name: np.concatenate([rows, np.zeros((missing, LENGTH), rows.dtype)]) for name, rows in part.items()}


def test_loss_is_the_weighted_mean_over_tokens_in_float64(trained, text):
    model, params = trained
    logits = model.apply({"params": params}, text["tokens"], text["positions"], text["segments"])
    logits = np.asarray(logits[0] if isinstance(logits, tuple) else logits, np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nats = -np.take_along_axis(log_p, text["targets"][..., None].astype(int), -1)[..., 0]
    weights = text["weights"].astype(np.float64)
    expected = float((nats * weights).sum() / weights.sum())
    # Neither label smoothing nor z-loss nor dropout is part of what is reported.
    result = _evaluate(trained, [text], tokens_per_byte=0.5)
    assert result["loss"] == pytest.approx(expected, rel=1e-6)
    assert result["perplexity"] == pytest.approx(math.exp(expected), rel=1e-6)
    assert result["bits_per_byte"] == pytest.approx(expected * 0.5 / math.log(2), rel=1e-6)
    right = (logits.argmax(-1) == text["targets"]) * weights
    assert result["accuracy"] == pytest.approx(right.sum() / weights.sum(), rel=1e-6)
    assert result["tokens"] == pytest.approx(weights.sum(), rel=1e-6)
    # Rows weigh differently, so that a mean of means would be seen.
    means = [(n * w).sum() / w.sum() for n, w in zip(nats, weights) if w.sum()]
    assert abs(np.mean(means) - expected) > 1e-3


@pytest.mark.parametrize("chunk", [0, 5])
def test_errors_take_rows_as_the_units(trained, text, chunk):
    model, params = trained
    logits = np.asarray(
        model.apply({"params": params}, text["tokens"], text["positions"], text["segments"]), np.float64
    )
    nats = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, text["targets"][..., None], -1)[..., 0]
    right = logits.argmax(-1) == text["targets"]
    weights = text["weights"].astype(np.float64)
    result = _evaluate(trained, _cut(text, 4), task=CausalLM(loss_chunk=chunk), tokens_per_byte=0.5)
    n = (weights.sum(axis=1) > 0).sum()
    assert n == ROWS - 1
    for name, values in (("loss", nats), ("accuracy", right)):
        mean = (values * weights).sum() / weights.sum()
        remainders = ((values - mean) * weights).sum(axis=1)
        error = math.sqrt(n / (n - 1) * (remainders**2).sum()) / weights.sum()
        assert result[f"{name}_se"] == pytest.approx(error, rel=1e-5)
    assert result["perplexity_se"] == pytest.approx(result["perplexity"] * result["loss_se"], rel=1e-9)
    assert result["bits_per_byte_se"] == pytest.approx(result["loss_se"] * 0.5 / math.log(2), rel=1e-9)


def test_rows_spread_over_devices_give_the_same(trained, text):
    model, params = trained
    mesh = make_mesh(MeshConfig(data=2, fsdp=1, devices=2))
    with jax.set_mesh(mesh):
        step = make_eval_step(model, CausalLM(), mesh, abstract_params(model, mesh)[1])
        spread = evaluate(step, params, _cut(text, 4), mesh)
    assert spread == pytest.approx(_evaluate(trained, [text]), rel=1e-5)


def test_a_task_may_sum_arrays_and_summarise_in_its_own_way():
    mesh = make_mesh(MeshConfig(devices=1))

    @jax.jit
    def step(params, batch):
        counts = metrics.confusion(batch["labels"], batch["predicted"], batch["weights"], 3)
        return {"loss": batch["weights"].sum() * 2, "weight": batch["weights"].sum(), "confusion": counts}

    rng = np.random.default_rng(0)
    labels, predicted = rng.integers(0, 3, (2, 4, 5), np.int32)
    weights = np.ones((4, 5), np.float32)
    weights[-1, 2:] = 0
    batches = [{"labels": a, "predicted": b, "weights": w} for a, b, w in zip(labels, predicted, weights)]
    seen = {}

    def summarise(sums):
        seen.update(sums)
        return metrics.classification(sums)

    result = evaluate(step, None, batches, mesh, summarise=summarise)
    want = np.zeros((3, 3))
    np.add.at(want, (labels.ravel(), predicted.ravel()), weights.ravel())
    assert seen["confusion"].dtype == np.float64
    np.testing.assert_array_equal(seen["confusion"], want)
    assert result["accuracy"] == np.trace(want) / 17
    assert (result["loss"], result["tokens"]) == (2, 17)


@pytest.mark.parametrize("size", [1, 3, 4])
def test_any_batch_size_and_a_padded_last_batch_give_the_same_loss(trained, text, size):
    whole = _evaluate(trained, [text])
    done = []
    cut = _evaluate(trained, _cut(text, size), on_batch=done.append)
    assert done == list(range(1, math.ceil(ROWS / size) + 1))
    for name, value in whole.items():
        assert cut[name] == pytest.approx(value, rel=1e-6)


def test_nothing_to_score_is_not_a_number(trained, text):
    nothing = {**text, "weights": np.zeros_like(text["weights"])}
    result = _evaluate(trained, [nothing])
    assert math.isnan(result["loss"])
    assert result["tokens"] == 0
    assert "loss_se" not in result


def test_sums_do_not_lose_small_terms():
    mesh = make_mesh(MeshConfig(devices=1))

    def step(params, batch):  # float32 would stop counting at 2**24
        return {"loss": batch["x"].sum(), "correct": jnp.zeros(()), "weight": jnp.ones(())}

    batches = [{"x": np.float32([2.0**25])}] + [{"x": np.float32([1.0])}] * 3
    result = evaluate(step, None, batches, mesh)
    assert result["loss"] * 4 == 2**25 + 3


def test_baselines_against_zlib_and_the_entropy_of_bytes():
    rng = np.random.default_rng(0)
    documents = [bytes(rng.choice(list(b"abc "), p=[0.5, 0.25, 0.125, 0.125], size=n).tolist()) for n in (1, 500, 3000)]
    text = b"".join(documents)
    found = baselines(iter(documents))
    _, counts = np.unique(list(text), return_counts=True)
    entropy = -sum(n / len(text) * math.log2(n / len(text)) for n in counts)
    assert found["order0_bits_per_byte"] == pytest.approx(entropy, rel=1e-12)
    assert found["order0_bits_per_byte"] == pytest.approx(1.75, abs=0.05)
    assert found["zlib_bits_per_byte"] == 8 * len(zlib.compress(text, 9)) / len(text)
    assert baselines([b"aaaa"])["order0_bits_per_byte"] == 0
