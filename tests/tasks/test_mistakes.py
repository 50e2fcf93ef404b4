"""What an objective can't be done with is told in one line, before a run directory or a dataset is left behind."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from lm.data.objectives.masking import MaskingConfig
from lm.errors import UserError

sys.path.insert(0, str(Path(__file__).parents[1]))
import small_runs
from tasks.families import experiment

NO_SPECIALS = {"tokenizer": {"special_tokens": ()}}
# name: (family, objective, settings by section, what the line says)
MISTAKES: dict[str, tuple[str, str, dict[str, dict[str, Any]], str]] = {
    "hidden tokens, and no look ahead": (
        "gpt",
        "masked_lm",
        {},
        "task masked_lm needs model.mask bidirectional and no encoder; the model has model.mask causal",
    ),
    "next token, and a look ahead": ("bert", "causal_lm", {}, "task causal_lm needs model.mask causal"),
    "prefix of a causal model": ("gpt", "prefix_lm", {}, "task prefix_lm needs model.mask prefix"),
    "spans without an encoder": ("gpt", "span_corruption", {}, "task span_corruption needs an encoder-decoder"),
    "pairs for an encoder-decoder": ("t5", "bert", {}, "task bert needs model.mask bidirectional and no encoder"),
    "targets from both sides": ("bert", "seq2seq", {}, "model.mask is bidirectional: choose causal or prefix"),
    "classes of an encoder-decoder": (
        "t5",
        "classification",
        {},
        "reads one text, and the model is an encoder-decoder",
    ),
    "classes from a first token that saw nothing": (
        "gpt",
        "classification",
        {"model": {"pooling": "first"}},
        "model.pooling is first.*set last or mean",
    ),
    "no token that hides": ("bert", "masked_lm", NO_SPECIALS, "prepare the dataset with --tokenizer.special-tokens"),
    "no sentinels": ("t5", "span_corruption", NO_SPECIALS, "<extra_id_0> to <extra_id_0>, and the tokenizer lacks"),
    "documents of one sentence": (
        "bert",
        "bert",
        {"data": {"field": "a"}},
        "none of the .* documents has two sentences",
    ),
    "sentences unknown": (
        "bert",
        "bert",
        {"data": {"sentences": False}},
        "doesn't say where they begin; set data.sent",
    ),
    "no parts": ("t5", "seq2seq", {"data": {"fields": ()}}, "needs documents of two parts.*set data.fields"),
    "three parts": (
        "t5",
        "seq2seq",
        {"data": {"fields": ("a", "b", "text")}},
        "3 parts, and source and target are two",
    ),
    "no classes": ("bert", "classification", {"data": {"label_field": None}}, "needs the class of each document; set"),
    "no such column": ("bert", "classification", {"data": {"label_field": "z"}}, "has no field 'z'.*set data.label_fi"),
    "other classes": ("bert", "classification", {"model": {"n_classes": 3}}, "n_classes is 3 and the dataset has 2"),
    "classes that are not all named": (
        "bert",
        "classification",
        {"data": {"labels": ("True", "no")}},
        r"has the class 'False', which data.labels does not name \(True, no\); add it there",
    ),
    "no class for a text": (
        "bert",
        "classification",
        {"data": {"label_field": "e"}},
        "field 'e' is empty, and names n",
    ),
    "one class": ("bert", "classification", {"data": {"label_field": "one"}}, "all training documents have the class"),
    "several classes": (
        "bert",
        "classification",
        {"data": {"label_separator": ","}},
        "task.multi_label is False and data.label_separator ','; set both where documents may have several",
    ),
    "sentences of classes": ("bert", "classification", {"data": {"sentences": True}}, "leave data.sentences off"),
    "rate": (
        "bert",
        "masked_lm",
        {"task": {"masking": MaskingConfig(rate=1.5)}},
        "task.masking.rate is 1.5; it must",
    ),
    "short pairs": ("bert", "bert", {"task": {"short_share": 2.0}}, "task.short_share is 2.0; it is a share of the"),
    "density": ("t5", "span_corruption", {"task": {"density": 0.0}}, r"task\.density, .* is 0.0; it must be"),
    "span": ("t5", "span_corruption", {"task": {"mean_span": 0.5}}, r"task\.mean_span, .* is 0.5; it must be"),
    "source longer than the context": (
        "t5",
        "seq2seq",
        {"task": {"source_len": 41}},
        "sources have 41 tokens, more than model.max_len 40; raise it, or lower data.seq_len",
    ),
    "source of a decoder": ("gpt", "seq2seq", {"task": {"source_len": 9}}, "source_len is 9.*only with an encoder"),
    "smoothing": ("bert", "classification", {"task": {"label_smoothing": 1.0}}, "label_smoothing is 1.0; it is in"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mistakes")


@pytest.mark.parametrize(("family", "kind", "changes", "message"), MISTAKES.values(), ids=MISTAKES)
def test_one_line_and_nothing_is_left(
    folder: Path, tmp_path: Path, family: str, kind: str, changes: dict[str, dict[str, Any]], message: str
) -> None:
    settings = experiment(folder, family, kind)
    changes = changes | {"data": {"root": str(tmp_path / "datasets")} | changes.get("data", {})}

    def go() -> None:  # some settings can't even be made
        sections = {name: dataclasses.replace(getattr(settings, name), **values) for name, values in changes.items()}
        small_runs.start(dataclasses.replace(settings, **sections), tmp_path / "run")

    with pytest.raises(UserError, match=message) as found:
        go()
    assert "\n" not in str(found.value)
    assert not any(tmp_path.iterdir())


def test_what_is_cut_is_counted(tmp_path: Path) -> None:
    rows = [{"a": "word " * (40 if i == 3 else 2), "b": "target " * (60 if i == 5 else 1)} for i in range(30)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = experiment(tmp_path, "t5", "seq2seq", steps=3)
    settings = dataclasses.replace(settings, data=dataclasses.replace(settings.data, validation_fraction=0.0))
    told = small_runs.Silent()
    small_runs.runs.start(settings, tmp_path / "run", told)
    assert any("2 of 30 training documents are longer" in message for message in told.named("message"))
