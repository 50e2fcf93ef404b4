"""Cross-entropy against float64 numpy, whole and in chunks."""

import math
import re

import jax
import numpy as np
import pytest
import tiny

from lm.errors import UserError
from lm.losses import binary_cross_entropy, cross_entropy
from lm.tasks.causal_lm import CausalLM

pytestmark = pytest.mark.usefixtures("strict_promotion")


def reference(logits, targets, weights, smoothing, z):
    """Objective, loss and hits as sums over tokens; the objective's targets are spelled out as distributions."""
    logits = logits.astype(np.float64)
    log_z = np.log(np.exp(logits).sum(-1))
    log_p = logits - log_z[..., None]
    vocab = logits.shape[-1]
    wanted = np.eye(vocab)[targets] * (1 - smoothing) + smoothing / vocab
    objective = -(wanted * log_p).sum(-1) + z * log_z**2
    plain = -np.take_along_axis(log_p, targets[..., None], -1)[..., 0]
    hits = logits.argmax(-1) == targets
    return (objective * weights).sum(), (plain * weights).sum(), (hits * weights).sum()


@pytest.mark.parametrize(("smoothing", "z"), [(0.0, 0.0), (0.1, 0.0), (0.0, 1e-2), (0.2, 1e-3)])
def test_cross_entropy_is_its_definition(smoothing, z):
    rng = np.random.default_rng(0)
    logits = 3 * rng.standard_normal((3, 7, 11)).astype(np.float32)
    targets = rng.integers(0, 11, (3, 7), dtype=np.int32)
    weights = rng.uniform(0, 2, (3, 7)).astype(np.float32) * (rng.random((3, 7)) > 0.3)
    total, sums = cross_entropy(logits, targets, weights.astype(np.float32), label_smoothing=smoothing, z_loss=z)
    expected = reference(logits, targets, weights, smoothing, z)
    np.testing.assert_allclose((total, sums["loss"], sums["correct"]), expected, rtol=1e-6)


def test_what_has_weight_0_is_not_scored():
    """Whatever the target is: padding may hold any id, -100 included."""
    rng = np.random.default_rng(1)
    logits = rng.standard_normal((2, 4, 5)).astype(np.float32)
    weights = np.array([[1, 0, 1, 0], [0, 0, 0, 1]], np.float32)
    targets = rng.integers(0, 5, (2, 4), dtype=np.int32)
    odd = np.where(weights > 0, targets, np.int32(-100))

    def total(logits, targets):
        return cross_entropy(logits, targets, weights, label_smoothing=0.1, z_loss=0.1)[0]

    one, grad = jax.value_and_grad(total)(logits, targets)
    other, other_grad = jax.value_and_grad(total)(logits, odd)
    np.testing.assert_array_equal((one, grad[weights > 0].sum()), (other, other_grad[weights > 0].sum()))
    assert not np.any(other_grad[weights == 0])


def test_large_logits_do_not_overflow():
    logits = np.array([[[1e4, 0.0, -1e4]]], np.float32)
    total, sums = cross_entropy(logits, np.array([[1]], np.int32), np.ones((1, 1), np.float32))
    assert float(total) == 1e4
    assert float(sums["correct"]) == 0


B, T, V = 4, 14, 96
CASES = [  # model, task, chunk: 5 does not divide 14, 20 is longer
    ({}, {}, 5),
    ({"tie_embeddings": False}, {"label_smoothing": 0.1}, 7),
    ({"logit_softcap": 2.0}, {"z_loss": 1e-2}, 20),
    ({"tie_embeddings": False, "logit_softcap": 2.0}, {"label_smoothing": 0.2, "z_loss": 1e-3}, 1),
]


def make_mean(model, task, batch):
    def mean(params):
        total, sums = task.loss(model, params, batch, None)
        return total / sums["weight"], sums

    return jax.jit(jax.value_and_grad(mean, has_aux=True))


@pytest.mark.parametrize(("changes", "settings", "chunk"), CASES)
def test_chunked_loss_is_plain_loss(changes, settings, chunk):
    model, params = tiny.build(tiny.config(vocab_size=V, n_layers=1, **changes))
    params = tiny.perturbed(params)
    batch = tiny.packed_batch(B, T, V)
    batch["weights"][:, -1] = 0.7  # what fills the last piece up must not weigh as much
    (plain, plain_sums), plain_grads = make_mean(model, CausalLM(**settings), batch)(params)
    (total, sums), grads = make_mean(model, CausalLM(**settings, loss_chunk=chunk), batch)(params)
    assert abs(total / plain - 1) < 1e-6
    tiny.assert_trees_close(sums, plain_sums, 1e-6)
    tiny.assert_trees_close(grads, plain_grads, 1e-5)
    # Without a gradient it takes another way through the code.
    again, sums = jax.jit(lambda params: CausalLM(**settings, loss_chunk=chunk).loss(model, params, batch, None))(
        params
    )
    assert abs(again / sums["weight"] / plain - 1) < 1e-6
    tiny.assert_trees_close(sums, plain_sums, 1e-6)


def test_the_task_scores_what_the_logits_say():
    model, params = tiny.build(tiny.config(vocab_size=V, n_layers=1))
    params = tiny.perturbed(params)
    batch = tiny.packed_batch(B, T, V)
    logits = jax.jit(lambda p: model.apply({"params": p}, batch["tokens"], batch["positions"], batch["segments"]))(
        params
    )
    task = CausalLM(label_smoothing=0.1, z_loss=1e-3)
    total, sums = jax.jit(lambda p: task.loss(model, p, batch, None))(params)
    expected = reference(np.asarray(logits), batch["targets"], batch["weights"], 0.1, 1e-3)
    np.testing.assert_allclose((total, sums["loss"], sums["correct"]), expected, rtol=1e-5)
    np.testing.assert_allclose(sums["weight"], batch["weights"].sum(), rtol=1e-6)


def test_zero_weight_in_all_is_a_zero_sum():
    model, params = tiny.build(tiny.config(vocab_size=V, n_layers=1))
    batch = tiny.stream_batch(B, T, V)
    batch["weights"] = np.zeros_like(batch["weights"])
    for task in [CausalLM(), CausalLM(loss_chunk=5)]:
        total, sums = jax.jit(lambda p, task=task: task.loss(model, p, batch, None))(params)
        assert float(total) == float(sums["loss"]) == float(sums["weight"]) == 0


def test_with_chunks_the_logits_of_a_batch_never_exist():
    model, _ = tiny.build(tiny.config(vocab_size=512, d_model=16, n_heads=1, d_ff=16, n_layers=1, max_len=16))
    batch = tiny.stream_batch(B, T, 512)
    params = jax.eval_shape(lambda: tiny.build(model.config)[1])

    def largest_float32(task):
        text = make_mean(model, task, batch).lower(params).compile().as_text()
        shapes = re.findall(r"f32\[([\d,]+)\]", text)
        return max(math.prod(int(n) for n in shape.split(",")) for shape in shapes)

    assert largest_float32(CausalLM()) == B * T * 512
    assert largest_float32(CausalLM(loss_chunk=2)) <= 16 * 512  # the embedding; a piece is 4 x 2 x 512


def test_half_precision_in_chunks():
    config = tiny.config(vocab_size=V, n_layers=1, compute_dtype="bfloat16", attention="blocked")
    model, params = tiny.build(config)
    batch = tiny.packed_batch(B, T, V)
    (plain, _), plain_grads = make_mean(model, CausalLM(), batch)(params)
    (total, _), grads = make_mean(model, CausalLM(loss_chunk=5), batch)(params)
    assert abs(total / plain - 1) < 1e-5
    tiny.assert_trees_close(grads, plain_grads, 0.03)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label_smoothing": 1.0}, "task.label_smoothing is 1.0"),
        ({"label_smoothing": -0.1}, "task.label_smoothing is -0.1"),
        ({"z_loss": -1.0}, "task.z_loss is -1.0"),
        ({"loss_chunk": -1}, "task.loss_chunk is -1"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(UserError, match=message):
        CausalLM(**settings)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_binary_cross_entropy_is_its_definition(smoothing):
    rng = np.random.default_rng(0)
    logits = 3 * rng.standard_normal((6, 4)).astype(np.float32)
    targets = (rng.random((6, 4)) < 0.4).astype(np.float32)
    targets[0] = logits[0] > 0
    weights = np.array([1, 1, 0.5, 0, 1, 1], np.float32)
    yes = 1 / (1 + np.exp(-logits.astype(np.float64)))

    def nats(wanted):
        return -(wanted * np.log(yes) + (1 - wanted) * np.log(1 - yes)).mean(axis=1)

    objective = nats(targets * (1 - smoothing) + smoothing / 2)
    total, sums = binary_cross_entropy(logits, targets, weights, label_smoothing=smoothing)
    np.testing.assert_allclose(total, (objective * weights).sum(), rtol=1e-6)
    np.testing.assert_allclose(sums["loss"], (nats(targets) * weights).sum(), rtol=1e-6)
    right = ((yes > 0.5) == (targets > 0)).all(axis=1)
    assert right[0]
    np.testing.assert_allclose(sums["correct"], (right * weights).sum(), rtol=1e-6)
    again, rows = binary_cross_entropy(logits, targets, weights, label_smoothing=smoothing, by_row=True)
    assert again == total
    np.testing.assert_allclose(rows["loss"], nats(targets) * weights, rtol=1e-5)


def test_binary_cross_entropy_of_large_logits():
    logits, targets = np.array([[1e4, -1e4, 1e4]], np.float32), np.array([[1, 0, 0]], np.float32)
    total, gradient = jax.value_and_grad(lambda x: binary_cross_entropy(x, targets, np.ones(1, np.float32))[0])(logits)
    assert total == pytest.approx(1e4 / 3)
    np.testing.assert_allclose(gradient, [[0, 0, 1 / 3]], atol=1e-6)


@pytest.mark.parity
def test_binary_cross_entropy_is_that_of_torch():
    import torch

    rng = np.random.default_rng(0)
    logits, targets = rng.standard_normal((5, 3)).astype(np.float32), (rng.random((5, 3)) < 0.5).astype(np.float32)
    total, _ = binary_cross_entropy(logits, targets, np.ones(5, np.float32))
    expected = torch.nn.BCEWithLogitsLoss()(torch.from_numpy(logits), torch.from_numpy(targets))
    assert float(total) / 5 == pytest.approx(float(expected), rel=1e-6)
