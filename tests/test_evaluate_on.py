"""`lm evaluate RUN --on CONFIG.py`: a run, also an imported one, on the data and the task of a config."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import small_runs
from pretrained import GPT2_CONFIG, gpt2_weights, write_folder
from tasks.families import experiment as of_family

from lm import run as runs
from lm.cli import main
from lm.config import Experiment
from lm.data.config import MixtureConfig
from lm.errors import UserError
from lm.models.transformer import ModelConfig
from lm.run.evaluation import evaluate_run
from lm.sharding import MeshConfig
from lm.text.tokenizer import TokenizerConfig

ONE = MeshConfig(devices=1)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An imported GPT-2, a run of each of three objectives, and a config for each."""
    folder = tmp_path_factory.mktemp("on")
    source = write_folder(folder / "source", gpt2_weights(GPT2_CONFIG), GPT2_CONFIG | {"eos_token_id": 1})
    small_runs.write_tokenizer(source / "tokenizer.json")
    assert main(["import", str(source), str(folder / "gpt2")]) == 0
    small_runs.write_corpus(folder / "corpus.txt")
    text = small_runs.CONFIG.replace("text:corpus.txt", f"text:{folder}/corpus.txt")
    (folder / "config.py").write_text(text.replace("seq_len=16", f"seq_len=16, root={str(folder / 'prepared')!r}"))
    for family, kind in (("bert", "classification"), ("gpt", "seq2seq")):
        small_runs.start(of_family(folder, family, kind, steps=3), folder / kind)
    return folder


def brute_force(run: Path, ids: np.ndarray, length: int, stride: int) -> tuple[np.ndarray, np.ndarray]:
    """Nats and whether it was right, for each token but the first, from the tokens its first window has before it."""
    trained = runs.load(run, runs.inference_mesh())
    apply = jax.jit(lambda tokens: trained.model.apply({"params": trained.params}, tokens)[0])

    def forward(tokens: np.ndarray) -> np.ndarray:
        """Logits behind the last of some tokens; what stands behind them in the row isn't seen."""
        row = np.zeros((1, length), np.int32)
        row[0, : len(tokens)] = tokens
        return np.asarray(apply(row)[len(tokens) - 1], np.float64)

    nats, right = [], []
    for at in range(1, len(ids)):
        window = 0
        while window + length < at:  # the window's targets are the tokens behind its first, to the length-th
            window += stride
        logits = forward(ids[window:at])
        nats.append(np.log(np.exp(logits).sum()) - logits[ids[at]])
        right.append(logits.argmax() == ids[at])
    return np.asarray(nats), np.asarray(right)


@pytest.mark.parametrize("stride", [pytest.param(1, marks=pytest.mark.slow), 5, None])
def test_sliding_windows_of_an_imported_model(world: Path, stride: int | None, capfd: pytest.CaptureFixture[str]):
    options = [] if stride is None else ["--data.eval-stride", str(stride)]
    arguments = ["--on", str(world / "config.py"), "--split", "test", "--mesh.devices", "1", "--json"]
    capfd.readouterr()
    assert main(["evaluate", str(world / "gpt2"), *arguments, *options]) == 0
    told = json.loads(capfd.readouterr().out)
    trained = runs.load(world / "gpt2", runs.inference_mesh())
    (folder,) = {path.parent for path in (world / "prepared").glob("*/*/*/manifest.json")}
    dataset = runs.Dataset.open(folder)
    store = dataset.store("test")
    ids = store.read(0, store.n_tokens)
    texts = (world / "corpus.txt").read_text().split("\n\n")
    spelled = [trained.tokenizer.decode(part.tolist()) for part in np.split(ids, store.document_offsets[1:-1])]
    assert {text.removesuffix("</s>") for text in spelled} <= {text.strip() for text in texts}
    nats, right = brute_force(world / "gpt2", ids, 16, stride or 16)
    assert told["tokens"] == len(nats) == store.n_tokens - 1
    assert told["loss"] == pytest.approx(nats.mean(), rel=1e-5)
    assert told["perplexity"] == pytest.approx(np.exp(nats.mean()), rel=1e-4)
    assert told["accuracy"] == pytest.approx(right.mean())
    bytes_ = sum(len(text.removesuffix("</s>").encode()) for text in spelled)
    assert told["bits_per_byte"] == pytest.approx(nats.mean() / np.log(2) * store.n_tokens / bytes_, rel=1e-5)
    for name in ("loss", "perplexity", "accuracy", "bits_per_byte"):
        assert told[f"{name}_se"] >= 0


def on(world: Path, family: str, kind: str, **sections) -> Experiment:
    settings = of_family(world, family, kind)
    for name, changes in sections.items():
        changed = (
            changes if dataclasses.is_dataclass(changes) else dataclasses.replace(getattr(settings, name), **changes)
        )
        settings = dataclasses.replace(settings, **{name: changed})
    return settings


@pytest.mark.parametrize(("family", "kind"), [("bert", "classification"), ("gpt", "seq2seq")])
def test_on_its_own_config_a_run_is_as_good_as_it_is(world: Path, family: str, kind: str):
    """Whatever model, tokenizer and length of training that config has, and however many rows go at a time."""
    other = {"model": ModelConfig(), "tokenizer": TokenizerConfig(kind="byte"), "train": {"batch_size": 3}}
    own = evaluate_run(world / kind, mesh=ONE)
    again = evaluate_run(world / kind, on=on(world, family, kind, **other), mesh=ONE)
    assert own.keys() == again.keys()
    for name, value in own.items():
        assert again[name] == (value if isinstance(value, str | list) else pytest.approx(value, rel=1e-5)), name
    few = evaluate_run(world / kind, mesh=ONE, batch_size=2, max_batches=1)
    assert few["tokens"] < own["tokens"]


def test_its_own_classes_count(world: Path, tmp_path: Path):
    """A config that doesn't name classes is read with those of the run, in their order."""
    settings = on(world, "bert", "classification", data={"labels": ("True", "False")})
    small_runs.start(settings, tmp_path / "run")
    own = evaluate_run(tmp_path / "run", mesh=ONE)
    again = evaluate_run(tmp_path / "run", on=on(world, "bert", "classification"), mesh=ONE)
    assert again == own
    with pytest.raises(
        UserError, match=r"has the classes True, False, and the data False, True; leave data.labels out"
    ):
        evaluate_run(
            tmp_path / "run", on=on(world, "bert", "classification", data={"labels": ("False", "True")}), mesh=ONE
        )


def test_texts_are_scored_there_too(world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    config = f"""
import sys
sys.path[:0] = {[str(Path(__file__).parent)]!r}
from pathlib import Path
from tasks.families import experiment

def get_config():
    return experiment(Path({str(world)!r}), "gpt", "seq2seq")
"""
    (tmp_path / "config.py").write_text(config)
    arguments = ["--scores", "token_f1", "--mesh.devices", "1", "--sampling.max-new-tokens", "4"]
    written = []
    for options in ([], ["--on", str(tmp_path / "config.py")], [f"--on={tmp_path / 'config.py'}", "--limit", "3"]):
        output = tmp_path / f"{len(written)}.jsonl"
        assert main(["evaluate", str(world / "seq2seq"), *arguments, "--texts", str(output), *options]) == 0
        written.append(output.read_text())
    assert written[0] == written[1]
    assert len(written[0].splitlines()) > 3
    assert written[2].splitlines() == written[0].splitlines()[:3]


# name: (run, family and objective of the config, settings of it, what the line says)
MISTAKES = {
    "no classifier": ("gpt2", ("gpt", "classification"), {}, r"needs a classifier.*gpt2 has none; fine-tune it with"),
    "no head for answers": (
        "classification",
        ("bert", "extractive_qa"),
        {},
        r"task extractive_qa needs a head for answers \(model\.span_head\), and the model of .* has none",
    ),
    "another mask": ("gpt2", ("bert", "masked_lm"), {}, "task masked_lm needs model.mask bidirectional"),
    "longer than the model": (
        "gpt2",
        ("gpt", "causal_lm"),
        {"data": {"seq_len": 65}},
        "rows have 65 tokens, and .*gpt2 has room for 64; lower data.seq_len",
    ),
    "a source longer than the model": (
        "seq2seq",
        ("gpt", "seq2seq"),
        {"data": {"seq_len": 41}},
        "41 tokens, and .* room for 40",
    ),
    "stride": (
        "gpt2",
        ("gpt", "causal_lm"),
        {"data": {"eval_stride": 99}},
        "data.eval-stride is 99; it must be from 1",
    ),
    "other classes": (
        "classification",
        ("bert", "classification"),
        {"data": {"label_field": "b"}},
        r"has the class '.*', which data\.labels does not name \(False, True\)",
    ),
    "more classes": (
        "classification",
        ("bert", "classification"),
        {"data": {"labels": ("False", "True", "maybe")}},
        "has the classes False, True, and the data False, True, maybe; leave",
    ),
    "no such split": (
        "classification",
        ("bert", "classification"),
        {},
        "the dataset has no split 'test'; it has train",
    ),
    "no text": ("gpt2", ("gpt", "causal_lm"), {"data": {"source": "text:nope"}}, "'text:nope' matches no file"),
    "another tokenizer": (
        "gpt2",
        ("gpt", "causal_lm"),
        "mixture",
        r"gpt2 has the tokenizer .* and the dataset .*; prepare it with tokenizer.kind file:.*gpt2/tokenizer",
    ),
}


@pytest.mark.parametrize(("run", "of", "changes", "message"), MISTAKES.values(), ids=MISTAKES)
def test_one_line_and_nothing_is_left(world: Path, tmp_path: Path, run: str, of, changes, message: str):
    folder = json.loads((world / "classification" / "dataset.json").read_text())["folder"]
    if changes == "mixture":
        settings = on(world, *of)
        mixed = dataclasses.replace(type(settings.data)(seq_len=8), mixture=MixtureConfig(datasets=(folder,)))
        settings = dataclasses.replace(settings, data=mixed)
    else:
        settings = on(world, *of, **(changes | {"data": {"root": str(tmp_path / "new")} | changes.get("data", {})}))
    with pytest.raises(UserError, match=message) as found:
        evaluate_run(world / run, on=settings, split="test" if "no split" in message else "validation", mesh=ONE)
    assert "\n" not in str(found.value)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--on"], "--on needs the config file"),
        (["--on", "nope.py"], "no config file nope.py"),
        (["--on", "config.py", "--model.d-model", "3"], "Unrecognized options: --model.d-model"),
        (["--data.seq-len", "8"], "Unrecognized options: --data.seq-len"),
        (["--on", "config.py", "--batch-size", "0"], "the batch size is 0; it must be at least 1"),
        (["--on", "config.py", "--checkpoint", "7"], "gpt2 has no checkpoint '7'"),
        (["--on", "config.py", "--scores", "bleu"], "the task is causal_lm; texts are written"),
        ([], "was imported, so it has no dataset; name one with `lm evaluate gpt2 --on CONFIG.py`"),
    ],
)
def test_the_command_says_what_is_wrong(world: Path, monkeypatch, arguments, message, capfd):
    monkeypatch.chdir(world)
    assert main(["evaluate", "gpt2", *arguments]) == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1
    assert re.search(message, err), err


def test_as_many_classes_are_needed(world: Path, tmp_path: Path):
    """Of a run whose classes have no names, as many an imported one."""
    shutil.copytree(world / "classification", tmp_path / "run")
    (tmp_path / "run" / "dataset.json").unlink()
    settings = on(world, "bert", "classification", data={"labels": ("a", "b", "c")})
    with pytest.raises(UserError, match=r"the data has 3 classes \(a, b, c\), and the model of .* tells 2 apart"):
        evaluate_run(tmp_path / "run", on=settings, mesh=ONE)
