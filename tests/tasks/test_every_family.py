"""Every family and objective trains on one device and on eight alike, and resumes to the bit."""

import dataclasses
import itertools
import math
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

from lm import run as runs
from lm.config import from_dict, to_dict
from lm.data import loader
from lm.data.prepare import prepare
from lm.evaluate import evaluate, to_devices
from lm.models.transformer import Transformer
from lm.optim import make_optimizer, make_schedule
from lm.sharding import MeshConfig, make_mesh
from lm.tasks import TASKS
from lm.train import abstract_params, make_program

sys.path.insert(0, str(Path(__file__).parents[1]))
import small_runs
from tasks.families import FAMILIES, FAST, PAIRS, SERVES, experiment

ONE, EIGHT = MeshConfig(devices=1), MeshConfig(fsdp=2, tensor=2)
STEPS = 10


# The fast suite asks each of its pairs one of the two questions (a decoder on eight devices is in test_meshes.py).
ON_EIGHT, IN_PARTS = FAST[3:7], [*FAST[:3], *FAST[7:]]


def test_every_objective_and_every_family_is_in_the_table() -> None:
    assert set(SERVES) == set(TASKS), "an objective is missing in tests/tasks/families.py"
    assert {family for family, _ in PAIRS} == set(FAMILIES)
    assert {kind for _, kind in FAST} == set(TASKS)
    assert {family for family, _ in FAST} == set(FAMILIES)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


def losses(folder: Path, family: str, kind: str, mesh_config: MeshConfig) -> tuple[np.ndarray, dict[str, float]]:
    """Of ten steps, on the same two batches again and again, and what an evaluation then says."""
    settings = experiment(folder, family, kind, steps=STEPS)
    data, train, task = settings.data, settings.train, settings.task
    dataset = runs.Dataset.open(prepare(data, settings.tokenizer))
    config = task.settle(settings.model.with_vocabulary(dataset.tokenizer.vocab_size), dataset.labels)
    make = task.maker(config, dataset.tokenizer, dataset.labels)
    mesh, schedule = make_mesh(mesh_config), make_schedule(settings.optim, STEPS)
    model = Transformer(config)
    tx = make_optimizer(settings.optim, schedule, abstract_params(model, mesh)[0])
    program = make_program(model, task, tx, schedule, train, mesh)
    batches = loader.training_batches(dataset.store("train"), data, make=make, batch_size=train.batch_size)
    two, found = list(itertools.islice(batches, 2)), []
    batches.close()
    with jax.set_mesh(mesh):
        state = program.init()
        for step in range(STEPS):
            state, report = program.train_step(state, to_devices(two[step % 2], mesh))
            found.append(float(report["objective"] / report["weight"]))
        held_out = loader.evaluation_batches(dataset.store("validation"), data, make=make, batch_size=16)
        result = evaluate(program.eval_step, state.params, held_out, mesh, summarise=task.summarise)
    return np.array(found), result


@pytest.mark.parametrize(("family", "kind"), tiny.fast(PAIRS, *ON_EIGHT))
def test_losses_on_eight_devices_are_those_of_one(corpus: Path, family: str, kind: str) -> None:
    one, held_out = losses(corpus, family, kind, ONE)
    eight, on_eight = losses(corpus, family, kind, EIGHT)
    # A score of `prompted` adds up logarithms, so that a small loss is a difference of large numbers.
    np.testing.assert_allclose(eight, one, rtol=5e-5 if kind == "prompted" else 1e-5)
    assert one[-3:].mean() < one[:3].mean(), "it learns, so that equal losses mean something"
    assert held_out.keys() == on_eight.keys()
    assert all(math.isfinite(value) for value in held_out.values())
    for name in ("loss", "tokens"):
        assert on_eight[name] == pytest.approx(held_out[name], rel=1e-4)


@pytest.mark.parametrize(("family", "kind"), tiny.fast(PAIRS, *IN_PARTS))
def test_a_run_in_parts_is_the_straight_run(corpus: Path, tmp_path: Path, family: str, kind: str) -> None:
    settings = experiment(corpus, family, kind)
    settings = dataclasses.replace(settings, model=dataclasses.replace(settings.model, residual_dropout=0.1))
    small_runs.start(settings, tmp_path / "straight")
    small_runs.train_in_parts(settings, tmp_path / "parts", 2, 4)
    small_runs.assert_same_run(tmp_path / "straight", tmp_path / "parts")
    records = small_runs.metrics(tmp_path / "straight")
    held_out = [record for record in records if record["split"] == "validation"]
    assert [record["step"] for record in held_out] == [3, 6]
    about = {"step", "split", "tokens", "scored_tokens"}
    assert {name for name in held_out[-1] if not name.endswith("_se")} - about == set(settings.task.reports)


@pytest.mark.parametrize("kind", TASKS)
def test_a_saved_config_names_its_objective(corpus: Path, kind: str) -> None:
    settings = experiment(corpus, SERVES[kind][0], kind)
    saved = to_dict(settings)
    assert saved["task"]["kind"] == kind
    assert from_dict(type(settings), saved) == settings
