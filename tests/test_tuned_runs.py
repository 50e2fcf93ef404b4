"""Runs that train low-rank terms, adapters or a prompt of a model that is there already."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_runs
import tiny
from tasks.families import experiment as of_family

from lm import run as runs
from lm import tree
from lm.config import Experiment
from lm.errors import UserError
from lm.generate import SamplingConfig
from lm.generate.texts import generate_texts
from lm.models.lora import LoraConfig
from lm.models.transformer import ModelConfig
from lm.run.begin import tuned_rates
from lm.sharding import MeshConfig, make_mesh
from lm.text.tokenizer import TokenizerConfig
from lm.train import InitConfig

MESH = make_mesh(MeshConfig(devices=1))
LORA = LoraConfig(rank=2, alpha=4.0, dropout=0.1)
WAYS: dict[str, dict[str, Any]] = {
    "lora": {"lora": LORA},
    "adapter": {"adapter_dim": 3},
    "prompt": {"prompt_len": 4},
}


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parent")
    small_runs.start(of_family(folder, "llama", "causal_lm", steps=3), folder / "run")
    return folder


def child(folder: Path, model: dict[str, Any], kind: str = "causal_lm", of: str = "run", **init: Any) -> Experiment:
    settings = of_family(folder, "llama", kind)
    return dataclasses.replace(
        settings,
        model=ModelConfig(attention="xla", unroll=1, pooling=settings.model.pooling, **model),
        tokenizer=TokenizerConfig(),
        init_from=InitConfig(run=str(folder / of), **init),
    )


def loaded(path: Path, checkpoint: str = "latest") -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf) for name, leaf in tree.path_leaves(runs.load(path, MESH, checkpoint).params)}


@pytest.mark.parametrize("way", tiny.fast(WAYS, "lora", "adapter"))
def test_what_is_added_is_trained_alone_and_kept_alone(parent: Path, tmp_path: Path, way: str) -> None:
    """Nothing else moves, checkpoints hold nothing else, and a run in parts is the straight run, without its parent."""
    settings = child(parent, WAYS[way])
    small_runs.start(settings, tmp_path / "run")
    before, after = loaded(parent / "run"), loaded(tmp_path / "run")
    added = after.keys() - before.keys()
    assert added
    norms = {path for path in before if "norm" in path} if way == "adapter" else set()
    assert {path for path in before if np.any(before[path] != after[path])} == norms
    kept = {path for path in small_runs.state(tmp_path / "run") if path.startswith("params/")}
    assert kept == {f"params/{path}" for path in added | norms}
    assert runs.load_experiment(small_runs.RunDirectory(tmp_path / "run")).optim.rates == tuned_rates(settings.model)
    small_runs.train_in_parts(settings, tmp_path / "parts", 3)
    small_runs.assert_same_run(tmp_path / "run", tmp_path / "parts")
    texts = generate_texts(
        runs.load(tmp_path / "run", MESH), ["the cat"], SamplingConfig(temperature=0, max_new_tokens=3)
    )
    assert texts[0]


def test_a_prompt_begins_with_rows_of_the_vocabulary(parent: Path, tmp_path: Path) -> None:
    settings = child(parent, WAYS["prompt"])
    still = dataclasses.replace(settings.optim, peak_lr=1e-60)
    small_runs.start(dataclasses.replace(settings, optim=still), tmp_path / "run")
    found = loaded(tmp_path / "run")
    table = found["embed/embedding"][:300]
    for row in found["prompt/embedding"]:
        assert np.any(np.all(table == row, axis=1))


def test_a_head_is_trained_with_what_is_added(parent: Path, tmp_path: Path) -> None:
    small_runs.start(child(parent, WAYS["lora"], "classification"), tmp_path / "run")
    kept = {path for path in small_runs.state(tmp_path / "run") if path.startswith("params/")}
    assert {path.split("/")[1] for path in kept} == {"classifier", "layers"}
    assert {path.split("/")[-2] for path in kept if "layers" in path} == {"lora_a", "lora_b"}


def test_rates_of_one_s_own_count(parent: Path, tmp_path: Path) -> None:
    settings = child(parent, WAYS["lora"])
    rates = (r".*/lora_b/kernel=1", "embed/.*=0.5", ".*=0")
    settings = dataclasses.replace(settings, optim=dataclasses.replace(settings.optim, rates=rates))
    small_runs.start(settings, tmp_path / "run")
    kept = {path for path in small_runs.state(tmp_path / "run") if path.startswith("params/")}
    assert {"/".join(path.split("/")[-2:]) for path in kept} == {"lora_b/kernel", "embed/embedding"}


def test_a_run_with_terms_is_trained_on_or_merged(parent: Path, tmp_path: Path) -> None:
    small_runs.start(child(parent, WAYS["lora"]), parent / "lora")
    of = {"of": "lora"}
    still = {"peak_lr": 1e-60, "warmup": 0}

    def begun(name: str, settings: Experiment) -> dict[str, np.ndarray]:
        small_runs.start(
            dataclasses.replace(
                settings,
                optim=dataclasses.replace(settings.optim, **still),
                train=dataclasses.replace(settings.train, steps=1, eval_every=0),
            ),
            tmp_path / name,
        )
        return loaded(tmp_path / name)

    theirs = loaded(parent / "lora", "best")
    found = begun("on", child(parent, {}, **of))
    assert found.keys() == theirs.keys()
    assert all(np.array_equal(found[path], theirs[path]) for path in theirs)
    merged = begun("merged", child(parent, {}, **of, merge=True))
    assert merged.keys() == {path for path in theirs if "lora" not in path}
    a, b = (theirs[f"layers/attention/query/{name}/kernel"] for name in ("lora_a", "lora_b"))
    kernel = theirs["layers/attention/query/kernel"] + 2.0 * np.einsum("LDr,LrNH->LDNH", a, b)
    assert np.abs(2.0 * np.einsum("LDr,LrNH->LDNH", a, b)).max() > 1e-4
    np.testing.assert_allclose(merged["layers/attention/query/kernel"], kernel, atol=1e-6)
    anew = begun("anew", child(parent, {"lora": LoraConfig(rank=1)}, **of, merge=True))
    assert anew["layers/attention/query/lora_a/kernel"].shape == (2, 16, 1)
    np.testing.assert_array_equal(anew["layers/attention/query/kernel"], merged["layers/attention/query/kernel"])


MISTAKES = {
    "no parent": (
        {"lora": LORA},
        {"run": None},
        "model.lora is set, for a model that is trained already; name its run",
    ),
    "no parent, two": (
        {"adapter_dim": 2, "prompt_len": 2},
        {"run": None},
        "model.adapter_dim and model.prompt_len are set",
    ),
    "merge nothing": ({}, {"merge": True}, "has no low-rank terms; leave it out"),
    "merge no run": ({}, {"run": None, "merge": True}, "there is no init_from.run whose terms could be merged"),
    "no room": ({"prompt_len": 17}, {}, "data.seq_len 24 is longer than model.max_len 40 less model.prompt_len 17"),
    "packed": ({"prompt_len": 2, "data": {"packing": "documents"}}, {}, "set data.packing to pad, or to stream"),
    "a pattern of nothing": ({"optim": {"rates": ("layers/9/.*=0", ".*=1")}}, {}, "no parameter has such a path"),
    "a wait for nothing": (
        {"optim": {"unfreeze": ("layer/0/.*=1",)}},
        {},
        "optim.unfreeze has .*no parameter has such",
    ),
    "a wait too long": ({"optim": {"unfreeze": (".*=6",)}}, {}, "a whole number below the run's length, 6"),
    "half a step": ({"optim": {"unfreeze": (".*=1.5",)}}, {}, "the step is a whole number below"),
    "decay of nothing": ({"optim": {"decays": ("mlp/.*=1", ".*=0")}}, {}, "optim.decays has .*no parameter has such"),
    "a frozen new head": (
        {"task": "classification", "optim": {"rates": ("layers/.*=1", ".*=0")}},
        {},
        "classifier/bias, classifier/kernel would begin anew and stay as drawn",
    ),
    "targets": ({"lora": LoraConfig(rank=1, targets=".*gate2")}, {}, "matches none of"),
}


@pytest.mark.parametrize(("model", "init", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_leave_nothing_behind(parent: Path, tmp_path: Path, model: Any, init: Any, message: str) -> None:
    def begin() -> None:
        changes = dict(model)
        data, optim = changes.pop("data", {}), changes.pop("optim", {})
        kind = changes.pop("task", "causal_lm")
        settings = child(parent, changes, kind)
        settings = dataclasses.replace(
            settings,
            optim=dataclasses.replace(settings.optim, **optim),
            data=dataclasses.replace(settings.data, **data),
            init_from=dataclasses.replace(settings.init_from, **init),
        )
        if settings.init_from.run is None:
            settings = dataclasses.replace(settings, tokenizer=of_family(parent, "llama", "causal_lm").tokenizer)
        small_runs.start(settings, tmp_path / "run")

    with pytest.raises(UserError, match=message):
        begin()
    assert not (tmp_path / "run").exists()


def test_other_terms_than_the_run_s_are_refused(parent: Path, tmp_path: Path) -> None:
    if not (parent / "lora").exists():
        small_runs.start(child(parent, WAYS["lora"]), parent / "lora")
    with pytest.raises(UserError, match=r"model.lora is .*leave it out, or set init_from.merge"):
        small_runs.start(child(parent, {"lora": LoraConfig(rank=1)}, of="lora"), tmp_path / "run")
