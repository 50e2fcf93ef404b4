"""Classes of documents, one or any number: learned, counted class by class, resumed, taught, on any mesh."""

import dataclasses
import json
import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from lm import run as runs
from lm.cli import main
from lm.config import Experiment
from lm.data.config import DataConfig, MixtureConfig
from lm.errors import UserError
from lm.models.transformer import Transformer
from lm.optim import OptimConfig
from lm.sharding import MeshConfig
from lm.tasks.classification import Classification
from lm.tasks.distillation import DistillConfig
from lm.text.tokenizer import TokenizerConfig
from lm.train import TrainConfig

sys.path.insert(0, str(Path(__file__).parents[1]))
import small_runs
from tasks.families import FAMILIES

ONE, EIGHT = MeshConfig(devices=1), MeshConfig(fsdp=2, tensor=2)
KINDS = {"colour": ("red", "blue"), "animal": ("cat", "dog"), "verb": ("ran", "saw")}
OTHERS = ("the", "a", "mat", "sky", "tree", "of")


def classes_of(text: str) -> list[str]:
    return [kind for kind, words in KINDS.items() if set(words) & set(text.split())]


def write_corpus(path: Path, documents: int = 400) -> None:
    """Texts whose words tell their classes: any number of them, or by the first word one."""
    rng = np.random.default_rng(0)
    words = [*OTHERS, *OTHERS, *(word for kind in KINDS.values() for word in kind)]
    with path.open("w", encoding="utf-8") as file:
        for _ in range(documents):
            drawn = list(rng.choice(words, rng.integers(2, 8)))
            text = " ".join(drawn)
            file.write(json.dumps({"text": text, "kinds": classes_of(text), "first": drawn[0]}) + "\n")


def experiment(folder: Path, several: bool = True, family: str = "llama", **changes) -> Experiment:
    corpus = folder / "corpus.jsonl"
    if not corpus.exists():
        write_corpus(corpus)
    base = Experiment(
        data=DataConfig(
            source=f"jsonl:{corpus}",
            root=str(folder / "datasets"),
            validation_fraction=0.25,
            seq_len=12,
            label_field="kinds" if several else "first",
            label_separator="," if several else None,
        ),
        tokenizer=TokenizerConfig(kind="word"),
        model=FAMILIES[family],
        task=Classification(multi_label=several),
        optim=OptimConfig(peak_lr=1e-2, warmup=4),
        train=TrainConfig(steps=60, batch_size=32, log_every=10, eval_every=20, save_every=20),
        mesh=ONE,
    )
    sections = {name: dataclasses.replace(getattr(base, name), **values) for name, values in changes.items()}
    return dataclasses.replace(base, **sections)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of documents of any number of classes, chosen by their F1, and one of documents of one class."""
    folder = tmp_path_factory.mktemp("classes")
    small_runs.start(experiment(folder, train={"best": "macro_f1", "steps": 120}), folder / "several")
    small_runs.start(experiment(folder, several=False, family="gpt"), folder / "single")
    return folder


def said(run: Path) -> tuple[list[dict], np.ndarray]:
    """The validation documents, as they were written, and the logits of each, one by one without padding."""
    trained = runs.load(run, runs.inference_mesh())
    dataset = runs.dataset_of(small_runs.RunDirectory(run), trained.experiment)
    store = dataset.store("validation")
    rows = [json.loads(line) for line in (run.parent / "corpus.jsonl").read_text().splitlines()]
    tokenizer, decoder = trained.tokenizer, trained.model.config.mask == "causal"
    found = []

    @jax.jit
    def logits(tokens):
        bound = Transformer(trained.model.config).bind({"params": trained.params})
        return bound.classify(bound.hidden(tokens)[0])[0]

    documents = []
    for document in range(len(store.document_offsets) - 1):
        line = int(store.document_key(document).split(":")[1])
        documents.append(rows[line - 1])
        ids = [*([] if decoder else [tokenizer.bos_id]), *tokenizer.encode(rows[line - 1]["text"]), tokenizer.eos_id]
        found.append(np.asarray(logits(np.array([ids], np.int32)), np.float64))
    return documents, np.array(found)


def test_any_number_of_classes(world: Path):
    result = runs.evaluate_run(world / "several", mesh=ONE)
    documents, logits = said(world / "several")
    names = ["animal", "colour", "verb"]
    is_of = np.array([[name in classes_of(row["text"]) for name in names] for row in documents])
    assert {tuple(row) for row in is_of.tolist()} >= {(False,) * 3, (True,) * 3}, "none and all are among them"
    told = logits > 0
    assert result["accuracy"] == pytest.approx((is_of == told).all(axis=1).mean())
    assert result["accuracy"] > 0.9, "it learns"
    nats = np.logaddexp(0, np.where(is_of, -logits, logits)).mean(axis=1)
    assert result["loss"] == pytest.approx(nats.mean(), rel=1e-4)
    assert result["loss_se"] == pytest.approx(nats.std(ddof=1) / len(nats) ** 0.5, rel=1e-3)
    assert result["tokens"] == len(documents)
    for i, one in enumerate(result["classes"]):
        hits = int((is_of & told)[:, i].sum())
        n, m = int(is_of[:, i].sum()), int(told[:, i].sum())
        assert one == {"name": names[i], "labelled": n, "predicted": m, "right": hits, "f1": 2 * hits / (n + m)}
    assert result["macro_f1"] == pytest.approx(np.mean([one["f1"] for one in result["classes"]]))
    assert "confusion" not in result
    assert 0 < result["micro_f1_se"] < 0.1


def test_one_class(world: Path):
    result = runs.evaluate_run(world / "single", mesh=ONE)
    documents, logits = said(world / "single")
    names = sorted({*OTHERS, *(word for kind in KINDS.values() for word in kind)})
    labels = [names.index(row["first"]) for row in documents]
    confusion = np.zeros((len(names), len(names)), int)
    np.add.at(confusion, (labels, logits.argmax(axis=1)), 1)
    assert result["confusion"] == confusion.tolist()
    assert result["accuracy"] == pytest.approx(np.trace(confusion) / len(documents))
    for i, one in enumerate(result["classes"]):
        counts = confusion[i].sum(), confusion[:, i].sum(), confusion[i, i]
        assert (one["name"], one["labelled"], one["predicted"], one["right"]) == (names[i], *counts)


def test_the_table_shows_each_class(world: Path, capfd: pytest.CaptureFixture[str]):
    assert main(["evaluate", str(world / "several"), "--mesh.devices", "1"]) == 0
    out = capfd.readouterr().out
    result = runs.evaluate_run(world / "several", mesh=ONE)
    for one in result["classes"]:
        cells = [str(one[name]) for name in ("name", "labelled", "predicted", "right")] + [f"{one['f1']:.3f}"]
        assert re.search(r"\W+".join(map(re.escape, cells)), out), one
    assert main(["evaluate", str(world / "single"), "--mesh.devices", "1"]) == 0
    out = capfd.readouterr().out
    assert "told sky" in out
    assert main(["inspect", str(world / "several"), "--text", "the red cat"]) == 0
    page = (world / "several" / "inspect.html").read_text(encoding="utf-8")
    shares = [float(share) for share in re.findall(r'<td class="number">([\d.]+)%</td>', page)]
    assert len(shares) == 3
    assert sum(shares) > 150, "each class for itself: two are there"


@pytest.mark.parametrize("where", ["in parts", pytest.param("on eight devices", marks=pytest.mark.slow)])
def test_it_is_the_straight_run(tmp_path: Path, where: str):
    settings = experiment(tmp_path, train={"steps": 6, "eval_every": 3, "save_every": 3, "log_every": 1})
    settings = dataclasses.replace(settings, task=Classification(multi_label=True, label_smoothing=0.5))
    small_runs.start(settings, tmp_path / "straight")
    if where == "in parts":
        small_runs.train_in_parts(settings, tmp_path / "parts", 2, 4)
        small_runs.assert_same_run(tmp_path / "straight", tmp_path / "parts")
    one = small_runs.metrics(tmp_path / "straight")
    if where == "on eight devices":
        small_runs.start(dataclasses.replace(settings, mesh=EIGHT), tmp_path / "eight")
        eight = small_runs.metrics(tmp_path / "eight")
        assert [record["loss"] for record in eight] == pytest.approx([record["loss"] for record in one], rel=1e-4)
    # With label smoothing what is trained is not what is reported.
    assert all(abs(record["objective"] - record["loss"]) > 1e-4 for record in one[-3:] if record["split"] == "train")


def test_a_student_of_any_number_of_classes(world: Path, tmp_path: Path):
    """Learns from the teacher alone, and from what the teacher said once."""
    assert main(["teach", str(world / "several"), "--output", str(tmp_path / "said"), "--mesh.devices", "1"]) == 0
    for name, distill in (
        ("asks", DistillConfig(teacher=str(world / "several"), weight=1.0)),
        ("reads", DistillConfig(saved=str(tmp_path / "said"), weight=1.0)),
    ):
        settings = dataclasses.replace(experiment(world, train={"steps": 60, "eval_every": 0}), distill=distill)
        small_runs.start(settings, tmp_path / name)
        assert small_runs.metrics(tmp_path / name)[-1]["accuracy"] > 0.7
    asks, reads = (small_runs.metrics(tmp_path / name)[-1]["loss"] for name in ("asks", "reads"))
    assert reads == pytest.approx(asks, abs=0.02)  # saved in half precision


# name: (changes of sections, what the line says)
MISTAKES = {
    "no separator": (
        {"data": {"label_separator": None}},
        r"holds a list, not one value|set both where documents may have",
    ),
    "no task of several": ({"task": {"multi_label": False}}, "task.multi_label is False and data.label_separator ','"),
    "smoothing": ({"task": {"label_smoothing": 1.0}}, "task.label_smoothing is 1.0"),
    "best of another task": (
        {"train": {"best": "perplexity"}},
        "task classification doesn't report; choose one of loss, accuracy, micro_f1, macro_f1",
    ),
    "other classes": ({"data": {"labels": ("verb", "noun")}}, "class '.*', which data.labels does not name"),
    "fewer scores": ({"model": {"n_classes": 2}}, "model.n_classes is 2 and the dataset has 3 classes"),
    "another teacher": (
        {"distill": {"teacher": "single"}},
        "task.multi_label is True, and of the teacher .*single it is False|has 12 classes and the dataset 3",
    ),
    "a mixture of one class": (
        {"data": "mixture", "tokenizer": {"kind": "bpe"}},
        "the dataset has one class for each document, and task.multi_label is True",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_one_line_and_nothing_is_left(world: Path, tmp_path: Path, name: str):
    changes, message = MISTAKES[name]
    folder = json.loads((world / "single" / "dataset.json").read_text())["folder"]

    def go() -> None:
        settings = experiment(world)
        for section, values in changes.items():
            if values == "mixture":
                changed = DataConfig(seq_len=12, mixture=MixtureConfig(datasets=(folder,)))
            else:
                values = {key: str(world / value) if key == "teacher" else value for key, value in values.items()}
                changed = dataclasses.replace(getattr(settings, section), **values)
            settings = dataclasses.replace(settings, **{section: changed})
        if not settings.data.mixture.datasets:
            data = dataclasses.replace(settings.data, root=str(tmp_path / "datasets"))
            settings = dataclasses.replace(settings, data=data)
        else:
            settings = dataclasses.replace(settings, tokenizer=TokenizerConfig())
        small_runs.start(settings, tmp_path / "run")

    with pytest.raises(UserError, match=message) as found:
        go()
    assert "\n" not in str(found.value)
    assert not any(tmp_path.iterdir())


def test_a_held_out_file_with_another_class(tmp_path: Path):
    """Whether the classes are named or those of the training documents."""
    (tmp_path / "held.jsonl").write_text(json.dumps({"text": "a sky", "kinds": ["weather", "verb"]}) + "\n")
    held = {"validation_source": f"jsonl:{tmp_path / 'held.jsonl'}", "root": str(tmp_path / "d")}
    for labels, message in (
        ((), "the validation split has the class 'weather', which the training split lacks; name all classes in"),
        (("animal", "colour", "verb"), "held.jsonl:1 has the class 'weather', which data.labels does not name"),
    ):
        settings = experiment(tmp_path, data=held | {"labels": labels})
        with pytest.raises(UserError, match=message):
            small_runs.start(settings, tmp_path / "run")
        assert not (tmp_path / "run").exists()
        assert not list(tmp_path.glob("d/**/manifest.json"))
