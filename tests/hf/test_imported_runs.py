"""What later commands make of an imported run: a teacher, a tokenizer of a vocab.txt, a classifier to look into."""

import dataclasses
import itertools
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from pretrained import GPT2_CONFIG, LLAMA_CONFIG, gpt2_weights, llama_weights, write_folder
from safetensors.numpy import load_file
from small_runs import RunDirectory, Silent, experiment, metrics, start, write_tokenizer

from lm import run as runs
from lm.cli import main
from lm.config import Experiment
from lm.data.config import DataConfig
from lm.hf.export import write_configs, write_weights
from lm.hf.families import expressed
from lm.models.transformer import ModelConfig
from lm.sharding import MeshConfig
from lm.tasks.classification import Classification
from lm.text.tokenizer import TokenizerConfig
from lm.train import InitConfig

VOCABULARY = (
    Path(__file__).resolve().parents[2].parent / "shared" / "data" / "tokenizers" / "bert-base-chinese-vocab.txt"
)


def test_a_teacher(tmp_path):
    """A student of an imported model, by its tokenizer, and out again."""
    source = write_folder(tmp_path / "source", gpt2_weights(GPT2_CONFIG), GPT2_CONFIG | {"eos_token_id": 1})
    write_tokenizer(source / "tokenizer.json")
    teacher = tmp_path / "teacher"
    assert main(["import", str(source), str(teacher)]) == 0
    student = experiment(
        tmp_path,
        tokenizer={"kind": f"file:{teacher / 'tokenizer'}"},
        distill={"teacher": str(teacher)},
        model={"vocab_size": 300},
        train={"steps": 2, "eval_every": 0, "save_every": 0},
    )
    assert start(student, tmp_path / "student").state == "finished"
    assert all(np.isfinite(record["loss"]) for record in metrics(tmp_path / "student"))
    assert main(["export", str(tmp_path / "student"), str(tmp_path / "out")]) == 0
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["n_embd"], written["eos_token_id"]) == (16, 1)
    assert main(["import", str(tmp_path / "out"), str(tmp_path / "again")]) == 0
    a, b = (runs.load(tmp_path / name, runs.inference_mesh()) for name in ("student", "again"))
    tiny.assert_trees_equal(a.params, b.params)
    assert a.tokenizer.encode("the 中文") == b.tokenizer.encode("the 中文")
    assert (a.tokenizer.bos_id, a.tokenizer.eos_id) == (b.tokenizer.bos_id, b.tokenizer.eos_id)


def test_fine_tuning(tmp_path):
    """An imported model goes on, and out again under what it said of itself."""
    source = write_folder(tmp_path / "source", gpt2_weights(GPT2_CONFIG), GPT2_CONFIG | {"eos_token_id": 1})
    write_tokenizer(source / "tokenizer.json")
    (source / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    assert main(["import", str(source), str(tmp_path / "run")]) == 0
    tuned = experiment(
        tmp_path,
        train={"steps": 2, "eval_every": 0, "save_every": 0},
    )
    tuned = dataclasses.replace(
        tuned,
        tokenizer=TokenizerConfig(),
        model=ModelConfig(attention="xla"),
        init_from=InitConfig(run=str(tmp_path / "run")),
    )
    assert start(tuned, tmp_path / "tuned").state == "finished"
    a, b = (runs.load(tmp_path / name, runs.inference_mesh()) for name in ("run", "tuned"))
    largest = jax.tree.map(lambda x, y: float(abs(x - y).max()), a.params, b.params)
    assert 0 < max(jax.tree.leaves(largest)) < 0.05  # two steps of 0.01 away, not a new model
    assert b.tokenizer.fingerprint() == a.tokenizer.fingerprint()
    assert main(["export", str(tmp_path / "tuned"), str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["chat_template"] == "{{ messages }}"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 1


def bert(folder: Path, vocab_size: int, **heads) -> None:
    """A small BERT in transformers' form."""
    settings = {"mask": "bidirectional", "token_types": 2, "embedding_norm": True, "norm_place": "post"}
    model, params = tiny.build(tiny.config(**settings, activation="gelu", vocab_size=vocab_size, **heads))
    family, architecture, config = expressed(model.config, "classification" if "n_classes" in heads else "masked_lm")
    folder.mkdir()
    write_weights(folder, family, architecture, params, dtype=np.float32, max_shard_size=10**9)
    write_configs(folder, config, {})


@pytest.mark.skipif(not VOCABULARY.exists(), reason="needs ../shared/data/tokenizers")
@pytest.mark.parametrize("lowercase", [None, True, False])
def test_chinese_bert(lowercase, tmp_path):
    """The published vocabulary, small letters unless tokenizer_config.json says otherwise."""
    bert(tmp_path / "source", 21128, head_transform=True, head_bias=True)
    shutil.copyfile(VOCABULARY, tmp_path / "source" / "vocab.txt")
    if lowercase is not None:
        (tmp_path / "source" / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": lowercase}))
    assert main(["import", str(tmp_path / "source"), str(tmp_path / "run")]) == 0
    trained = runs.load(tmp_path / "run", runs.inference_mesh())
    tokenizer = trained.tokenizer
    assert trained.experiment.task.kind == "masked_lm"
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.mask_id, tokenizer.pad_id) == (101, 102, 103, 0)
    assert [tokenizer.id_to_piece(i) for i in tokenizer.encode("明天天气")] == ["明", "天", "天", "气"]
    assert (tokenizer.encode("HELLO") == tokenizer.encode("hello")) == (lowercase is not False)


def test_a_classifier_can_be_looked_into(tmp_path, capfd):
    """Its classes have no names where there is no dataset."""
    bert(tmp_path / "source", 64, pooler=True, n_classes=3)
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    names = {"id2label": {"0": "bad", "1": "fair", "2": "good"}, "label2id": {"bad": 0, "fair": 1, "good": 2}}
    (tmp_path / "source" / "config.json").write_text(json.dumps(config | names))
    assert main(["import", str(tmp_path / "source"), str(tmp_path / "run")]) == 0
    assert "task classification" in capfd.readouterr().out
    assert main(["inspect", str(tmp_path / "run"), "--text", "5 6 7 8"]) == 0
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {name: written[name] for name in names} == names


TRAINED = {"train": {"steps": 3, "eval_every": 0, "save_every": 0, "batch_size": 8}}


def classify(folder: Path, parent: Path, **task) -> Experiment:
    """A classifier of a few texts that begins with an imported model, whatever that is."""
    several = bool(task.get("multi_label"))
    words = ["red", "blue", "cat", "dog"]
    rows = [[words[i % 4], words[(i // 4) % 4]] for i in range(40)]
    with (folder / "rows.jsonl").open("w") as file:
        for i, row in enumerate(rows):
            label = sorted(set(row)) if several else ("warm" if "red" in row else "cold")
            file.write(json.dumps({"text": " ".join([*row, str(i)]), "y": label}) + "\n")
    settings = experiment(folder, **TRAINED)
    return dataclasses.replace(
        settings,
        data=DataConfig(
            source=f"jsonl:{folder / 'rows.jsonl'}",
            label_field="y",
            label_separator="," if several else None,
            validation_fraction=0.2,
            seq_len=12,
            root=str(folder / "datasets"),
        ),
        tokenizer=TokenizerConfig(),
        model=ModelConfig(attention="xla"),
        task=Classification(**task),
        init_from=InitConfig(run=str(parent)),
    )


def imported(folder: Path, family: str) -> Path:
    """A small model of a family without a classifier, with a tokenizer, as a run."""
    if family == "bert":
        bert(folder / "source", 300, pooler=True)
    else:
        config, weights = {"gpt2": (GPT2_CONFIG, gpt2_weights), "llama": (LLAMA_CONFIG, llama_weights)}[family]
        write_folder(folder / "source", weights(config), config | {"bos_token_id": 0, "eos_token_id": 1})
    write_tokenizer(folder / "source" / "tokenizer.json")
    assert main(["import", str(folder / "source"), str(folder / "parent")]) == 0
    return folder / "parent"


@pytest.mark.parametrize(
    ("family", "several"),
    tiny.fast(itertools.product(["gpt2", "llama", "bert"], [False, True]), ("gpt2", True), ("bert", False)),
)
def test_a_classifier_on_an_imported_model(family, several, tmp_path, capfd):
    """Trained, out under the names of its classes, and in again: the same bits and the same classes."""
    settings = classify(tmp_path, imported(tmp_path, family), multi_label=several)
    assert start(settings, tmp_path / "run").state == "finished"
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    names = ["blue", "cat", "dog", "red"] if several else ["cold", "warm"]
    kind = {"gpt2": "GPT2", "llama": "Llama", "bert": "Bert"}[family]
    assert written["architectures"] == [f"{kind}ForSequenceClassification"]
    assert written["id2label"] == {str(i): name for i, name in enumerate(names)}
    assert written["label2id"] == {name: i for i, name in enumerate(names)}
    assert written["problem_type"] == f"{'multi' if several else 'single'}_label_classification"
    if family != "bert":
        assert written["pad_token_id"] is None
        assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    assert main(["import", str(tmp_path / "out"), str(tmp_path / "again")]) == 0
    a, b = (runs.load(tmp_path / name, runs.inference_mesh()) for name in ("run", "again"))
    kept = {name: value for name, value in a.params.items() if name != "head"}
    tiny.assert_trees_equal(kept, b.params)
    assert b.experiment.task == Classification(multi_label=several)
    assert b.experiment.data.labels == tuple(names)
    # It is as good as the run it came from, on the data of that.
    own = runs.evaluate_run(tmp_path / "run", mesh=MeshConfig(devices=1))
    again = runs.evaluate_run(tmp_path / "again", on=settings, mesh=MeshConfig(devices=1))
    for name in ("loss", "accuracy", "macro_f1", "classes"):
        assert again[name] == (pytest.approx(own[name], rel=1e-5) if name != "classes" else own[name])
    # And it can be trained further: nothing of it is new.
    further = dataclasses.replace(settings, init_from=InitConfig(run=str(tmp_path / "again")))
    reporter = Silent()
    runs.start(further, tmp_path / "further", reporter)
    (said,) = [text for text in reporter.named("message") if text.startswith("begins with the parameters of")]
    assert "new are" not in said


def test_a_classifier_with_a_bias_has_no_place_on_a_decoder(tmp_path, capfd):
    settings = classify(tmp_path, imported(tmp_path, "gpt2"))
    model = dataclasses.replace(
        runs.load_experiment(RunDirectory.open(tmp_path / "parent")).model, classifier_bias=True
    )
    settings = dataclasses.replace(settings, model=model, init_from=InitConfig())
    settings = dataclasses.replace(settings, tokenizer=TokenizerConfig(kind=f"file:{tmp_path / 'parent/tokenizer'}"))
    start(settings, tmp_path / "run")
    capfd.readouterr()
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 2
    assert "nearest is gpt2: model.classifier_bias is True and there False" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()
