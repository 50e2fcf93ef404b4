"""The loss of hidden tokens is that of the whole rows, though the head sees no others."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from lm import losses
from lm.data.objectives.masking import MaskedExamples, Masker
from lm.data.packing import make_examples
from lm.data.store import MemoryStore
from lm.losses import divergence
from lm.sharding import MeshConfig, make_mesh
from lm.tasks.base import hidden_of
from lm.tasks.distillation import DistillConfig, Distilled, make_teacher
from lm.tasks.masked_lm import MaskedLM
from lm.text.tokenizer import TokenizerConfig, train_tokenizer


def batch_of(task: MaskedLM, vocab_size: int) -> dict[str, jax.Array]:
    """Rows of 24 tokens, the last of padding; no two rows have the same number of hidden ones."""
    config = TokenizerConfig(kind="char", vocab_size=vocab_size, special_tokens=("<mask>",))
    tokenizer = train_tokenizer(config, ["the cat sat on the mat and looked at 7 dogs"])
    texts = [tokenizer.encode("the cat sat on the mat"[:n]) for n in (3, 9, 16, 22)]
    store = MemoryStore([np.array([*ids, tokenizer.eos_id]) for ids in texts])
    base = make_examples(store, seq_len=24, packing="pad", bos_id=tokenizer.bos_id)
    rows = MaskedExamples(base, Masker(tokenizer, task.masking, seed=0)).batch(np.array([0, 1, 2, 3, -1]))
    return {name: jnp.asarray(value) for name, value in rows.items()}


@pytest.mark.parametrize("chunk", tiny.fast([0, 2], 2))
def test_the_head_sees_hidden_places_alone(chunk: int) -> None:
    task = MaskedLM(label_smoothing=0.1, z_loss=1e-3, loss_chunk=chunk)
    model, params = tiny.build(dataclasses.replace(tiny.config(), mask="bidirectional"))
    params = tiny.perturbed(params)
    batch = batch_of(task, 64)
    hidden = hidden_of(model, params, batch, None)
    assert len(set(np.asarray((batch["weights"] > 0).sum(1)).tolist())) > 2
    assert task.scored(hidden, batch)[0].shape[:2] == (5, 4)  # 15 % of 24

    def whole(params):
        logits = model.apply({"params": params}, hidden_of(model, params, batch, None), method="logits")
        total, sums = losses.cross_entropy(
            logits, batch["targets"], batch["weights"], label_smoothing=0.1, z_loss=1e-3, by_row=True
        )
        return total, sums

    (expected, sums), expected_grad = jax.jit(jax.value_and_grad(whole, has_aux=True))(params)
    found, rows = jax.jit(lambda params: task.loss(model, params, batch, None))(params)
    assert float(found) == pytest.approx(float(expected), rel=1e-6)
    np.testing.assert_allclose(rows["rows"]["loss"], sums["loss"], rtol=1e-6)
    np.testing.assert_array_equal(rows["rows"]["correct"], sums["correct"])
    np.testing.assert_array_equal(rows["rows"]["weight"], batch["weights"].sum(1))
    grad = jax.jit(jax.grad(lambda params: task.loss(model, params, batch, jax.random.key(0))[0]))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), grad, expected_grad)


def test_a_student_learns_hidden_places_from_its_teacher() -> None:
    task, config = MaskedLM(), DistillConfig(teacher="x", weight=1.0, temperature=2.0, hidden_weight=0.5)
    model, params = tiny.build(dataclasses.replace(tiny.config(), mask="bidirectional"))
    teacher = tiny.perturbed(params, scale=1.0)
    batch = batch_of(task, 64)
    taught = make_teacher(task, model, teacher, config, make_mesh(MeshConfig(devices=1)))(batch)
    hidden = [hidden_of(model, tree, batch, None) for tree in (params, teacher)]
    logits = [model.apply({"params": tree}, x, method="logits") for tree, x in zip((params, teacher), hidden)]
    soft = divergence(*logits, batch["weights"], temperature=2.0)
    a, b = (np.asarray(x, np.float64) for x in hidden)
    cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    expected = 4 * float(soft) + 0.5 * ((1 - cosine) * np.asarray(batch["weights"])).sum()
    total, sums = Distilled(task, config).loss(model, params, taught, jax.random.key(0))
    assert float(sums["soft_loss"]) == pytest.approx(float(soft), rel=1e-5)
    assert float(total) == pytest.approx(expected, rel=1e-5)
