"""Learning from a teacher: the loss as it is written down, and runs that do."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from scipy.special import log_softmax

from lm import losses
from lm.data.objectives.taught import LOGITS
from lm.errors import UserError
from lm.evaluate import to_devices
from lm.models.transformer import Transformer
from lm.sharding import MeshConfig, make_mesh
from lm.tasks.causal_lm import CausalLM
from lm.tasks.distillation import DistillConfig, Distilled, make_teacher

sys.path.insert(0, str(Path(__file__).parents[1]))
import small_runs
from tasks.families import experiment


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32) * 3


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_is_that_of_the_definition(temperature: float) -> None:
    student, teacher = draw(3, 4, 9), draw(3, 4, 9, seed=1)
    weights = np.random.default_rng(2).uniform(0, 2, (3, 4)).astype(np.float32)
    p, q = (log_softmax(x.astype(np.float64) / temperature, axis=-1) for x in (teacher, student))
    expected = ((np.exp(p) * (p - q)).sum(-1) * weights).sum()
    found = losses.divergence(jnp.array(student), jnp.array(teacher), jnp.array(weights), temperature=temperature)
    assert float(found) == pytest.approx(expected, rel=1e-5)
    assert float(losses.divergence(jnp.array(teacher), jnp.array(teacher), jnp.array(weights))) < 1e-5

    top, ids = jax.lax.top_k(jnp.array(teacher), 3)
    kept = log_softmax(np.asarray(top, np.float64) / temperature, axis=-1)
    expected = ((np.exp(kept) * (kept - np.take_along_axis(q, np.asarray(ids), -1))).sum(-1) * weights).sum()
    found = losses.divergence(jnp.array(student), top, jnp.array(weights), temperature=temperature, ids=ids)
    assert float(found) == pytest.approx(expected, rel=1e-5)


def gradient(task: Any, model: Transformer, params: Any, batch: dict[str, Any]) -> Any:
    key = jax.random.key(0)
    return jax.grad(lambda params: task.loss(model, params, batch, key)[0])(params)


def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it() -> None:
    mesh = make_mesh(MeshConfig(devices=1))
    model, params = tiny.build(tiny.config())
    batch = to_devices(tiny.packed_batch(4, 12, 64), mesh)
    config = DistillConfig(teacher="x", weight=1.0, temperature=3.0, hidden_weight=0.5)
    taught = make_teacher(CausalLM(), model, params, config, mesh)(batch)
    assert taught[LOGITS].shape == (4, 12, 64)
    grads = gradient(Distilled(CausalLM(), config), model, params, taught)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(grads)) < 1e-4

    # Weight 0 is the objective alone, and evaluation is so in any case.
    hard = gradient(CausalLM(), model, params, batch)
    tiny.assert_trees_equal(gradient(Distilled(CausalLM(), DistillConfig(weight=0.0)), model, params, taught), hard)
    alone, _ = CausalLM().loss(model, params, batch, None)
    assert float(Distilled(CausalLM(), config).loss(model, params, batch, None)[0]) == float(alone)


def test_the_objective_is_the_sum_of_its_parts() -> None:
    mesh = make_mesh(MeshConfig(devices=1))
    model, params = tiny.build(tiny.config())
    _, other = tiny.build(tiny.config(), seed=1)
    other = tiny.perturbed(other)
    batch = to_devices(tiny.packed_batch(4, 12, 64), mesh)
    config = DistillConfig(teacher="x", weight=0.3, temperature=2.0, hidden_weight=0.7)
    taught = make_teacher(CausalLM(), model, other, config, mesh)(batch)
    key = jax.random.key(0)
    total, sums = Distilled(CausalLM(), config).loss(model, params, taught, key)
    hard, _ = CausalLM().loss(model, params, batch, key)

    hidden = {}
    for name, tree in (("student", params), ("teacher", other)):
        found = model.apply({"params": tree}, batch["tokens"], batch["positions"], batch["segments"], method="hidden")
        hidden[name] = np.asarray(found[0], np.float64)
    weights = np.asarray(batch["weights"], np.float64)
    norms = {name: np.linalg.norm(x, axis=-1) for name, x in hidden.items()}
    cosine = (hidden["student"] * hidden["teacher"]).sum(-1) / (norms["student"] * norms["teacher"])
    expected = 0.7 * float(hard) + 0.3 * 4 * float(sums["soft_loss"]) + 0.7 * ((1 - cosine) * weights).sum()
    assert float(total) == pytest.approx(expected, rel=1e-5)
    assert float(sums["soft_loss"]) > 1


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    small_runs.start(experiment(folder, "bert", "classification"), folder / "run")
    return folder


def student(folder: Path, **distill: Any) -> Any:
    settings = experiment(folder, "bert", "classification")
    config = DistillConfig(teacher=str(folder / "run"), **distill)
    small = dataclasses.replace(settings.model, n_layers=1, residual_dropout=0.1)
    return dataclasses.replace(settings, model=small, distill=config)


def test_a_distilled_run_in_parts_is_the_straight_run(teacher: Path, tmp_path: Path) -> None:
    settings = student(teacher, hidden_weight=0.1, top_k=2)
    small_runs.start(settings, tmp_path / "straight")
    small_runs.train_in_parts(settings, tmp_path / "parts", 3)
    small_runs.assert_same_run(tmp_path / "straight", tmp_path / "parts")
    records = small_runs.metrics(tmp_path / "straight")
    assert all("soft_loss" in record for record in records if record["split"] == "train")
    assert not any("soft_loss" in record for record in records if record["split"] == "validation")
    # Which checkpoint was the best may change; what the run was begun with is kept.
    saved = small_runs.runs.load_experiment(small_runs.RunDirectory(tmp_path / "straight"))
    assert saved.distill.checkpoint.isdecimal()


MISTAKES = {
    "no run": ({"teacher": "nowhere"}, {}, "nowhere"),
    "no such checkpoint": ({"checkpoint": "7"}, {}, "has no checkpoint '7'"),
    "another objective": ({}, {"task": ("bert", "masked_lm")}, "was trained for classification"),
    "another vocabulary": ({}, {"vocab_size": 512}, "the teacher's vocabulary has 384 rows"),
    "another width": ({"hidden_weight": 1.0}, {"d_model": 8}, "of width 8 here and 16 in the teacher"),
    "too many": ({"top_k": 3}, {}, "distill.top_k is 3"),
    "another family": ({}, {"mask": "causal", "pooling": "mean", "pooler": False}, "they read different examples"),
    "a shorter context": ({}, {"max_len": 64, "seq_len": 48}, "rows here have 48 tokens, and the teacher"),
}


@pytest.mark.parametrize(("distill", "model", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_told(
    teacher: Path, tmp_path: Path, distill: dict[str, Any], model: dict[str, Any], message: str
) -> None:
    settings = student(teacher)
    settings = dataclasses.replace(settings, distill=dataclasses.replace(settings.distill, **distill))
    changes = dict(model)
    if "task" in changes:
        other = experiment(teacher, *changes.pop("task"))
        settings = dataclasses.replace(settings, task=other.task)
    if "seq_len" in changes:
        settings = dataclasses.replace(
            settings, data=dataclasses.replace(settings.data, seq_len=changes.pop("seq_len"))
        )
    settings = dataclasses.replace(settings, model=dataclasses.replace(settings.model, **changes))
    with pytest.raises(UserError, match=message):
        small_runs.start(settings, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "value"), [("weight", 1.1), ("temperature", 0.0), ("top_k", -1), ("hidden_weight", -0.1)]
)
def test_settings_out_of_range_are_told(name: str, value: float) -> None:
    with pytest.raises(UserError, match=f"distill.{name} is {value}"):
        DistillConfig(**{name: value})
