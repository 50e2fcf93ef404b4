"""`lm teach`: what is saved is what the teacher says, and students learn the same from it."""

import dataclasses
import json
import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from lm import run as runs
from lm.cli import main
from lm.config import Experiment
from lm.data.objectives.taught import IDS, LOGITS, TaughtExamples, load_lessons
from lm.errors import UserError
from lm.evaluate import to_devices
from lm.records import RunDirectory
from lm.run.datasets import maker
from lm.sharding import MeshConfig
from lm.tasks.base import hidden_of
from lm.tasks.distillation import DistillConfig

sys.path.insert(0, str(Path(__file__).parents[1]))
import small_runs
from tasks.families import experiment

K = 2
PAIRS = [("t5", "seq2seq"), ("gpt", "causal_lm"), ("bert", "extractive_qa")]


def taught(folder: Path, family: str, kind: str) -> Path:
    """A folder with a teacher's run, and what it says."""
    settings = experiment(folder, family, kind)
    small_runs.start(settings, folder / "run")
    assert main(["teach", str(folder / "run"), "--top-k", str(K), "--mesh.devices", "1"]) == 0
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return taught(tmp_path_factory.mktemp("classifier"), "bert", "classification")


def student(folder: Path, family: str, kind: str, **distill: Any) -> Experiment:
    settings = experiment(folder, family, kind)
    config = {"saved": str(folder / "run" / "logits"), "weight": 0.7} | distill
    small = dataclasses.replace(settings.model, n_layers=1, residual_dropout=0.1)
    return dataclasses.replace(settings, model=small, distill=DistillConfig(**config))


def check_pair(folder: Path, family: str, kind: str) -> None:
    trained = runs.load(folder / "run", runs.inference_mesh())
    dataset = runs.dataset_of(RunDirectory(folder / "run"), trained.experiment)
    base = maker(trained.experiment, dataset)(dataset.store("train"), trained.experiment.data, True)
    saved = pickle.loads(pickle.dumps(TaughtExamples(base, folder / "run" / "logits", K)))
    index = np.array([len(base) - 1, 0, -1, 2])
    rows = saved.batch(index)
    batch = to_devices(base.batch(index), runs.inference_mesh())
    scores, _ = trained.experiment.task.scores(
        trained.model, trained.params, hidden_of(trained.model, trained.params, batch, None), batch
    )
    top, ids = jax.device_get(jax.lax.top_k(scores, rows[LOGITS].shape[-1]))
    used = index >= 0
    expected = np.maximum(top - top[..., :1], np.finfo(np.float16).min)
    np.testing.assert_allclose(rows[LOGITS][used], expected[used], rtol=6e-4, atol=1e-4)
    agree = rows[IDS][used] == ids[used]
    assert agree[np.abs(np.diff(expected[used], append=-np.inf)) > 1e-3].all()  # nearly equal ones may change places
    assert not rows[LOGITS][~used].any()

    online = DistillConfig(teacher=str(folder / "run"), top_k=rows[LOGITS].shape[-1], weight=0.7)
    settings = student(folder, family, kind)
    small_runs.start(settings, folder / "read")
    small_runs.start(dataclasses.replace(settings, distill=online), folder / "asked")
    losses = []
    for name in ("read", "asked"):
        losses.append([m["soft_loss"] for m in small_runs.metrics(folder / name) if m["split"] == "train"])
    # Half precision moves a logit by 0.05 % and a divergence by less than that in nats, however small it is.
    np.testing.assert_allclose(*losses, rtol=2e-3, atol=2e-5)
    assert max(losses[0]) > 0.005


def test_a_student_learns_from_saved_logits_what_it_learns_from_the_teacher(classifier: Path) -> None:
    check_pair(classifier, "bert", "classification")


@pytest.mark.slow
@pytest.mark.parametrize(("family", "kind"), PAIRS)
def test_other_objectives_are_saved_alike(tmp_path: Path, family: str, kind: str) -> None:
    check_pair(taught(tmp_path, family, kind), family, kind)


def test_static_masks_can_be_taught_and_dynamic_ones_cannot(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    settings = experiment(tmp_path, "bert", "masked_lm")
    static = dataclasses.replace(settings.task.masking, dynamic=False)
    small_runs.start(settings, tmp_path / "dynamic")
    small_runs.start(
        dataclasses.replace(settings, task=dataclasses.replace(settings.task, masking=static)), tmp_path / "static"
    )
    assert main(["teach", str(tmp_path / "dynamic"), "--mesh.devices", "1"]) == 2
    assert "drawn anew in each epoch" in capsys.readouterr().err
    assert not (tmp_path / "dynamic" / "logits").exists()
    assert main(["teach", str(tmp_path / "static"), "--top-k", "2", "--mesh.devices", "1"]) == 0
    said = json.loads((tmp_path / "static" / "logits" / "lessons.json").read_text())
    assert np.load(tmp_path / "static" / "logits" / "ids.npy").shape[0] == said["examples"]


@pytest.mark.slow
def test_a_run_in_parts_is_the_straight_run(classifier: Path, tmp_path: Path) -> None:
    settings = student(classifier, "bert", "classification")
    small_runs.start(settings, tmp_path / "straight")
    small_runs.train_in_parts(settings, tmp_path / "parts", 3)
    small_runs.assert_same_run(tmp_path / "straight", tmp_path / "parts")


def test_logits_that_changed_are_noticed(classifier: Path, tmp_path: Path) -> None:
    settings = student(classifier, "bert", "classification")
    small_runs.start(settings, tmp_path / "run", stop_at=2)
    path = classifier / "run" / "logits" / "lessons.json"
    before = path.read_text()
    path.write_text(before.replace(json.loads(before)["fingerprint"], "0" * 16))
    try:
        with pytest.raises(UserError, match="now holds 0000000000000000; restore them or start a new run"):
            small_runs.resume(tmp_path / "run")
    finally:
        path.write_text(before)


@pytest.mark.parametrize("left", [0, 200], ids=["empty", "cut"])
def test_damaged_logits_are_told(classifier: Path, tmp_path: Path, left: int) -> None:
    shutil.copytree(classifier / "run" / "logits", tmp_path / "logits")
    path = tmp_path / "logits" / "ids.npy"
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(UserError, match=r"ids\.npy can't be read; make it anew with `lm teach RUN`"):
        load_lessons(tmp_path / "logits")


STUDENTS = {
    "no folder": ({"saved": "nowhere"}, {}, "nowhere holds no saved logits .* make them with `lm teach RUN`"),
    "other rows": ({}, {"data": {"seq_len": 12}}, r"was made of other training examples [^;]*; .*data\.seq_len"),
    "more than saved": ({"top_k": 3}, {}, "distill.top_k is 3, and .* holds 2 choices"),
    "another vocabulary": ({}, {"model": {"vocab_size": 512}}, "the teacher's vocabulary has 384 rows"),
}


@pytest.mark.parametrize(("distill", "changes", "message"), STUDENTS.values(), ids=STUDENTS)
def test_mistakes_of_students(
    classifier: Path, tmp_path: Path, distill: dict[str, Any], changes: dict[str, dict[str, Any]], message: str
) -> None:
    settings = student(classifier, "bert", "classification", **distill)
    for section, values in changes.items():
        changed = dataclasses.replace(getattr(settings, section), **values)
        settings = dataclasses.replace(settings, **{section: changed})
    with pytest.raises(UserError, match=message):
        small_runs.start(settings, tmp_path / "run")
    assert not (tmp_path / "run").exists()


TEACHERS = {
    "there already": ([], "logits is there already; name a folder to be made"),
    "nothing to choose": (["--top-k", "0", "--output", "new"], "top-k is 0"),
    "no rows": (["--batch-size", "-1", "--output", "new"], "the batch size is -1"),
    "too many": (["--top-k", "999", "--output", "new"], "there are 2 to choose from"),
    "no checkpoint": (["--checkpoint", "99", "--output", "new"], "has no checkpoint '99'"),
}


@pytest.mark.parametrize(("options", "message"), TEACHERS.values(), ids=TEACHERS)
def test_mistakes_of_teachers(
    classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, options, message
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["teach", str(classifier / "run"), "--mesh.devices", "1", *options]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_imported_run_has_nothing_to_say_it_of(classifier: Path, tmp_path: Path) -> None:
    shutil.copytree(classifier / "run", tmp_path / "run")
    (tmp_path / "run" / "dataset.json").unlink()
    (tmp_path / "run" / "pretrained").mkdir()
    with pytest.raises(UserError, match="was imported, so it has no dataset"):
        runs.teach(tmp_path / "run", tmp_path / "logits", mesh=MeshConfig(devices=1))


def test_settings_that_exclude_each_other() -> None:
    with pytest.raises(UserError, match="logits come from one of them"):
        DistillConfig(teacher="a", saved="b")
    with pytest.raises(UserError, match="holds logits alone"):
        DistillConfig(saved="b", hidden_weight=0.1)
