"""A run that begins with another's parameters: what it takes over, what is new, and what it refuses."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import small_runs
import tiny
from tasks.families import experiment as of_family

from lm import run as runs
from lm.config import Experiment
from lm.errors import UserError
from lm.models.transformer import ModelConfig
from lm.optim import OptimConfig
from lm.tasks.causal_lm import PrefixLM
from lm.text.tokenizer import TokenizerConfig, load_tokenizer
from lm.train import InitConfig

# In float32 a rate of 0, so that a run's first checkpoint shows what it began with.
STILL = OptimConfig(optimizer="sgd", momentum=0.0, peak_lr=1e-60, schedule="constant", warmup=0, clip_norm=0)


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parent")
    small_runs.start(of_family(folder, "bert", "masked_lm"), folder / "run")
    return folder


def child(folder: Path, kind: str = "classification", **changes: Any) -> Experiment:
    """An experiment of another objective that says nothing of the model; `changes` are sections, or fields of some."""
    settings = of_family(folder, "bert", kind)
    train = dataclasses.replace(settings.train, steps=1, log_every=1, eval_every=0, save_every=1)
    settings = dataclasses.replace(
        settings,
        model=ModelConfig(attention="xla", unroll=1),
        tokenizer=TokenizerConfig(),
        init_from=InitConfig(run=str(folder / "run")),
        optim=STILL,
        train=train,
    )
    for section, values in changes.items():
        changed = (
            values if dataclasses.is_dataclass(values) else dataclasses.replace(getattr(settings, section), **values)
        )
        settings = dataclasses.replace(settings, **{section: changed})
    return settings


def params(path: Path) -> dict[str, np.ndarray]:
    return {name: value for name, value in small_runs.state(path).items() if name.startswith("params/")}


def test_another_objective_takes_all_but_its_head(parent: Path, tmp_path: Path) -> None:
    reporter = small_runs.Silent()
    runs.start(child(parent), tmp_path / "run", reporter)
    theirs, mine = params(parent / "run"), params(tmp_path / "run")
    assert mine.keys() - theirs.keys() == {"params/classifier/kernel", "params/classifier/bias"}
    assert theirs.keys() <= mine.keys()
    for name in theirs:
        np.testing.assert_array_equal(mine[name], theirs[name], err_msg=name)
    (said,) = [text for text in reporter.named("message") if text.startswith("begins with the parameters of")]
    assert said.endswith("new are classifier/bias, classifier/kernel")
    saved = runs.load_experiment(small_runs.RunDirectory(tmp_path / "run"))
    assert saved.init_from.checkpoint.isdecimal()
    assert (saved.model.d_model, saved.model.mask, saved.model.n_classes) == (16, "bidirectional", 2)
    # A new model of the same seed is another one.
    fresh = dataclasses.replace(child(parent), init_from=InitConfig(), model=saved.model)
    fresh = dataclasses.replace(fresh, tokenizer=of_family(parent, "bert", "classification").tokenizer)
    small_runs.start(fresh, tmp_path / "fresh")
    new = params(tmp_path / "fresh")
    assert any(np.any(new[name] != theirs[name]) for name in theirs)
    np.testing.assert_array_equal(new["params/classifier/kernel"], mine["params/classifier/kernel"])


def test_the_tokenizer_is_that_of_the_run_whatever_would_be_trained(parent: Path, tmp_path: Path) -> None:
    reporter = small_runs.Silent()
    settings = child(parent, "masked_lm", tokenizer=TokenizerConfig(kind="wordpiece", vocab_size=2000))
    runs.start(settings, tmp_path / "run", reporter)
    fingerprints = [load_tokenizer(run / "tokenizer").fingerprint() for run in (parent / "run", tmp_path / "run")]
    assert fingerprints[0] == fingerprints[1]
    assert any("none of kind wordpiece is trained" in text for text in reporter.named("message"))


def test_a_head_of_another_shape_begins_anew(parent: Path, tmp_path: Path) -> None:
    small_runs.start(child(parent), tmp_path / "run")
    changes = {"init_from": {"run": str(tmp_path / "run")}, "data": {"labels": ("True", "maybe", "False")}}
    reporter = small_runs.Silent()
    runs.start(child(parent, **changes), tmp_path / "three", reporter)
    assert any(text.endswith("new are classifier/bias, classifier/kernel") for text in reporter.named("message"))
    theirs, mine = params(tmp_path / "run"), params(tmp_path / "three")
    assert theirs.keys() == mine.keys()
    assert mine["params/classifier/kernel"].shape == (16, 3)
    for name in theirs.keys() - {"params/classifier/kernel", "params/classifier/bias"}:
        np.testing.assert_array_equal(mine[name], theirs[name], err_msg=name)


def test_a_head_of_another_objective_begins_anew(tmp_path: Path) -> None:
    """Two classes of sentence pairs are not those of texts; the pooler below serves both."""
    parent = of_family(tmp_path, "bert", "bert", steps=2)
    small_runs.start(parent, tmp_path / "run")
    reporter = small_runs.Silent()
    settings = child(tmp_path)
    runs.start(settings, tmp_path / "child", reporter)
    assert any(text.endswith("new are classifier/bias, classifier/kernel") for text in reporter.named("message"))
    theirs, mine = params(tmp_path / "run"), params(tmp_path / "child")
    assert np.any(mine["params/classifier/kernel"] != theirs["params/classifier/kernel"])
    np.testing.assert_array_equal(mine["params/pooler/kernel"], theirs["params/pooler/kernel"])


def test_more_of_the_same_in_half_precision_with_an_average(parent: Path, tmp_path: Path) -> None:
    settings = child(parent, "masked_lm", model={"param_dtype": "bfloat16"}, train={"ema_decay": 0.9})
    small_runs.start(settings, tmp_path / "run")
    theirs, mine = params(parent / "run"), small_runs.state(tmp_path / "run")
    for name, value in theirs.items():
        half = np.asarray(jax.numpy.asarray(value, "bfloat16"), np.float32)
        np.testing.assert_array_equal(np.asarray(mine[name], np.float32), half, err_msg=name)
        np.testing.assert_allclose(mine[name.replace("params/", "ema/", 1)], half, rtol=1e-6)


def test_what_is_seen_may_change(tmp_path: Path) -> None:
    small_runs.start(small_runs.experiment(tmp_path), tmp_path / "run")
    settings = small_runs.experiment(tmp_path, train={"steps": 1, "eval_every": 0, "save_every": 1})
    settings = dataclasses.replace(
        settings,
        task=PrefixLM(),
        model=ModelConfig(mask="prefix", attention="xla"),
        optim=STILL,
        init_from=InitConfig(run=str(tmp_path / "run")),
    )
    small_runs.start(settings, tmp_path / "prefix")
    theirs, mine = params(tmp_path / "run"), params(tmp_path / "prefix")
    assert theirs.keys() == mine.keys()
    for name in theirs:
        np.testing.assert_array_equal(mine[name], theirs[name])


def test_a_run_in_parts_is_the_straight_run_and_needs_its_parent_no_more(parent: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    (parent / "run").rename(home)
    try:
        changes = {"optim": OptimConfig(), "train": {"steps": 4}, "init_from": {"run": str(home)}}
        small_runs.start(child(parent, **changes), tmp_path / "straight")
        small_runs.start(child(parent, **changes), tmp_path / "parts", stop_at=2)
    finally:
        home.rename(parent / "run")
    small_runs.resume(tmp_path / "parts")
    small_runs.assert_same_run(tmp_path / "straight", tmp_path / "parts")


@pytest.mark.parametrize("how", tiny.fast(["mean", "pieces"], "pieces"))
def test_another_vocabulary(parent: Path, tmp_path: Path, how: str) -> None:
    """Rows of shared pieces, in the table that is the head as well, stay; every other parameter is taken over."""
    settings = child(
        parent,
        "masked_lm",
        init_from={"resize_vocab": how},
        tokenizer=TokenizerConfig(kind="wordpiece", vocab_size=60, special_tokens=("<mask>",)),
        model={"vocab_multiple": 32},
    )
    reporter = small_runs.Silent()
    runs.start(settings, tmp_path / "run", reporter)
    theirs, mine = params(parent / "run"), params(tmp_path / "run")
    assert theirs.keys() == mine.keys()
    tables = {name for name in theirs if theirs[name].shape != mine[name].shape}
    assert tables == {"params/embed/embedding", "params/head_bias/bias"}
    for name in theirs.keys() - tables:
        np.testing.assert_array_equal(mine[name], theirs[name], err_msg=name)
    old, new = (load_tokenizer(path / "tokenizer") for path in (parent / "run", tmp_path / "run"))
    table, before = mine["params/embed/embedding"], theirs["params/embed/embedding"]
    assert table.shape[0] % 32 == 0
    assert table.shape[0] - 32 < new.vocab_size <= table.shape[0]
    np.testing.assert_array_equal(table[new.mask_id], before[old.mask_id])
    np.testing.assert_array_equal(table[new.encode("s")[-1]], before[old.encode(" s")[-1]])
    (said,) = [text for text in reporter.named("message") if text.startswith("the vocabulary of")]
    assert "rows kept" in said
    assert not (tmp_path / "run" / "pretrained").exists()


MISTAKES = {
    "a size of the vocabulary": (
        {"init_from": {"resize_vocab": "mean"}, "model": {"vocab_size": 500}},
        "model.vocab_size is 500, and init_from.resize_vocab takes the tokenizer's",
    ),
    "no run": ({"init_from": {"run": "nowhere"}}, "nowhere"),
    "no checkpoint": ({"init_from": {"checkpoint": "77"}}, "has no checkpoint '77'"),
    "another width": ({"model": {"d_model": 12}}, "model.d_model is 12, and init_from.run .* has 16; leave it out"),
    "longer": ({"model": {"max_len": 99}}, "position_embed/embedding has the shape .* leave model.max_len out"),
    "another tokenizer": ({"tokenizer": {"kind": "byte"}}, "has the tokenizer .*set tokenizer.kind file:"),
    "another mask": ({"model": {"mask": "causal"}, "task": PrefixLM()}, "needs model.mask prefix"),
}


@pytest.mark.parametrize(("changes", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_told_and_nothing_is_left(
    parent: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        small_runs.start(child(parent, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()
