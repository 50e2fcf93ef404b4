"""What a run trained beside a frozen model, out alone and onto its base again; and what is wrong with an adapter."""

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import small_runs
import tiny
from pretrained import GPT2_CONFIG, gpt2_weights, write_folder
from safetensors.numpy import load_file, save_file
from tasks.families import BERT, SMALL
from tasks.families import experiment as of_family

from lm import run as runs
from lm import tree
from lm.cli import main
from lm.models.lora import LoraConfig
from lm.models.transformer import ModelConfig
from lm.records import RunDirectory
from lm.tasks.classification import Classification
from lm.text.tokenizer import TokenizerConfig
from lm.train import InitConfig

LORA = LoraConfig(rank=2, alpha=4.0)
WAYS: dict[str, dict[str, Any]] = {
    "lora": {"lora": LORA},
    "adapters": {"adapter_dim": 3},
    "prompt": {"prompt_len": 4},
    "lora and a prompt": {"lora": LORA, "prompt_len": 2},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    source = write_folder(folder / "source", gpt2_weights(GPT2_CONFIG), GPT2_CONFIG | {"eos_token_id": 1})
    small_runs.write_tokenizer(source / "tokenizer.json")
    assert main(["import", str(source), str(folder / "base")]) == 0
    return folder


def tune(folder: Path, name: str, rates: tuple[str, ...] = (), of: str = "base", **model: Any) -> Path:
    """A run of two steps that begins with the base; made once."""
    if not (folder / name).exists():
        made = small_runs.experiment(folder, train={"steps": 2, "eval_every": 0, "save_every": 0})
        made = dataclasses.replace(
            made,
            tokenizer=TokenizerConfig(),
            model=ModelConfig(attention="xla", **model),
            optim=dataclasses.replace(made.optim, rates=rates),
            init_from=InitConfig(run=str(folder / of)),
        )
        assert small_runs.start(made, folder / name).state == "finished"
    return folder / name


def loaded(path: Path) -> dict[str, np.ndarray]:
    params = runs.load(path, runs.inference_mesh(), "latest").params
    return {name: np.asarray(leaf) for name, leaf in tree.path_leaves(params)}


def assert_same(a: Path, b: Path) -> None:
    first, second = loaded(a), loaded(b)
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


@pytest.mark.parametrize("way", tiny.fast(WAYS, "lora", "lora and a prompt"))
def test_out_and_onto_the_base(way, base, tmp_path, capfd):
    run = tune(base, way, **WAYS[way])
    out, again = tmp_path / "out", tmp_path / "again"
    assert main(["export", str(run), str(out), "--adapter"]) == 0
    said = capfd.readouterr().out
    names = {"adapter_config.json", "adapter_model.safetensors"}
    if way != "lora":
        names = {"adapter.json", "adapter.safetensors"}
    assert {path.name for path in out.iterdir()} == names | {"lm.json"}
    assert ("LoRA for PEFT, GPT2LMHeadModel" if way == "lora" else "adapter of this program") in said
    held = sum(weight.size for weight in load_file(next(out.glob("*.safetensors"))).values())
    assert held < 0.2 * sum(leaf.size for leaf in loaded(run).values()), "the base is not in it"
    assert main(["import", str(out), str(again), "--onto", str(base / "base")]) == 0
    assert_same(run, again)
    model = runs.load_experiment(RunDirectory(again)).model
    assert (model.lora.rank, model.lora.scale if model.lora.rank else 2.0) == (2 * ("lora" in way), 2.0)
    # It is a run like the one that trained the adapter: its checkpoint holds no more, and it goes out the same.
    mine, theirs = ({p for p in small_runs.state(path) if p.startswith("params/")} for path in (again, run))
    assert mine == theirs
    assert main(["export", str(again), str(tmp_path / "twice"), "--adapter"]) == 0
    for name in names:
        assert (out / name).read_bytes() == (tmp_path / "twice" / name).read_bytes() or name == "adapter.json"
    assert main(["generate", str(again), "--prompt", "the cat", "--max-new-tokens", "3"]) == 0


def test_a_run_with_terms_goes_out_merged(base, tmp_path):
    run = tune(base, "lora", **WAYS["lora"])
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    assert main(["import", str(tmp_path / "out"), str(tmp_path / "merged")]) == 0
    before, tuned, after = (loaded(path) for path in (base / "base", run, tmp_path / "merged"))
    assert after.keys() == before.keys()
    for name in before:
        expected = before[name].astype(np.float64)
        stem = name.removesuffix("kernel")
        if f"{stem}lora_a/kernel" in tuned:
            a, b = (tuned[f"{stem}lora_{x}/kernel"].astype(np.float64) for x in "ab")
            expected += 2.0 * np.einsum("ldr,lrnh->ldnh", a, b)
            assert np.abs(after[name] - before[name]).max() > 1e-4
        np.testing.assert_allclose(after[name], expected, atol=1e-6, err_msg=name)


def test_an_adapted_run_is_trained_on(base, tmp_path):
    run = tune(base, "lora", **WAYS["lora"])
    assert main(["export", str(run), str(tmp_path / "out"), "--adapter"]) == 0
    shutil.copytree(base, tmp_path / "folder")
    again = tmp_path / "folder" / "again"
    assert main(["import", str(tmp_path / "out"), str(again), "--onto", str(base / "base")]) == 0
    on = tune(tmp_path / "folder", "on", of="again")
    first, then = loaded(again), loaded(on)
    assert {name for name in first if np.any(first[name] != then[name])} == {name for name in first if "lora_" in name}


def test_precision(base, tmp_path):
    run = tune(base, "lora", **WAYS["lora"])
    assert main(["export", str(run), str(tmp_path / "out"), "--adapter", "--dtype", "bfloat16"]) == 0
    weights = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {weight.dtype.name for weight in weights.values()} == {"bfloat16"}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    settings = of_family(folder, "bert", "masked_lm", steps=2, eval_every=0, save_every=0)
    model = ModelConfig(**SMALL, **BERT, activation="gelu")
    small_runs.start(dataclasses.replace(settings, model=model), folder / "base")
    return folder


def test_heads_go_with_the_terms(bert, tmp_path):
    settings = of_family(bert, "bert", "classification", steps=2, eval_every=0, save_every=0)
    model = ModelConfig(attention="xla", unroll=1, mask="bidirectional", pooler=True, lora=LORA)
    settings = dataclasses.replace(
        settings, model=model, tokenizer=TokenizerConfig(), init_from=InitConfig(run=str(bert / "base"))
    )
    run = tmp_path / "run"
    small_runs.start(settings, run)
    assert main(["export", str(run), str(tmp_path / "out"), "--adapter"]) == 0
    told = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (told["task_type"], told["modules_to_save"]) == ("SEQ_CLS", ["bert.pooler.dense", "classifier"])
    again = tmp_path / "again"
    assert main(["import", str(tmp_path / "out"), str(again), "--onto", str(bert / "base")]) == 0
    assert_same(run, again)
    experiment = runs.load_experiment(RunDirectory(again))
    assert experiment.model.n_classes == 2
    assert isinstance(experiment.task, Classification)


def changed(folder: Path, **settings: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def weights(folder: Path, change: Any) -> None:
    """Rewrites the weights: `change` gets a dictionary of them."""
    path = folder / "adapter_model.safetensors"
    found = load_file(path)
    change(found)
    save_file(found, path)


def truncated(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


A, B = (f"base_model.model.transformer.h.1.attn.c_attn.lora_{x}.weight" for x in "AB")


def of_another_width(found: dict[str, np.ndarray]) -> None:
    for name in found:
        found[name] = np.zeros((4, 20) if "lora_A" in name else (60, 4), np.float32)


MISTAKES: dict[str, tuple[Any, str]] = {
    "no adapter": (
        lambda f: [path.unlink() for path in f.iterdir()],
        r"out holds no adapter; one of PEFT has adapter_",
    ),
    "truncated": (truncated, r"is not a whole safetensors file .*; download or copy it again"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), r"lacks adapter_model\.safetensors; copy"),
    "other kind": (lambda f: changed(f, peft_type="LOHA"), r"peft_type 'LOHA'; only LORA is read"),
    "DoRA": (lambda f: changed(f, use_dora=True), r"use_dora True; only LoRA without it is read: merge it"),
    "biases": (lambda f: changed(f, bias="lora_only"), r"bias 'lora_only'; only adapters without trained biases"),
    "a changed base": (
        lambda f: changed(f, init_lora_weights="pissa"),
        r"init_lora_weights 'pissa', which changes the",
    ),
    "a rank that is none": (lambda f: changed(f, r=0), r"has r 0; it must be a number above 0"),
    "a pattern that is none": (lambda f: changed(f, rank_pattern={"(": 3}), r"the pattern '\(' in rank_pattern, which"),
    "another rank": (
        lambda f: changed(f, r=3),
        r"of shape \[4, 16\], not \[3, 16\]: transformer\.h\.\{0-2\}\.attn\.c_attn\.lora_A\.weight; of shape \[48, 4\],"
        r" not \[48, 3\]: .*; name the run of the model that it was trained on",
    ),
    "another width": (
        lambda f: weights(f, of_another_width),
        r"is not of this base; of shape \[4, 20\], not \[4, 16\]",
    ),
    "half a term and a strange one, at once": (
        lambda f: weights(f, lambda found: found.update({B.replace("h.1", "h.9"): found.pop(B)})),
        r"missing: transformer\.h\.1\.attn\.c_attn\.lora_B\.weight; extra: base_model\.model\.transformer\.h\.9\.attn",
    ),
    "other names": (
        lambda f: weights(f, lambda found: found.update({"unet.lora_A.weight": found.pop(A)})),
        r"has unet\.lora_A\.weight; names of PEFT begin with base_model\.model\.",
    ),
    "whole numbers": (
        lambda f: weights(f, lambda found: found.update({A: found[A].astype(np.int8)})),
        r"lora_A\.weight in .* is of int8; only float32",
    ),
    "not JSON": (lambda f: (f / "adapter_config.json").write_text("{"), r"can't read .*adapter_config\.json"),
}


def one_line(capfd) -> str:
    out, err = capfd.readouterr()
    assert not out.strip()
    assert err.startswith("lm: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_of_adapters(name, base, tmp_path, capfd):
    make, message = MISTAKES[name]
    run = tune(base, "lora", **WAYS["lora"])
    assert main(["export", str(run), str(tmp_path / "out"), "--adapter"]) == 0
    capfd.readouterr()
    make(tmp_path / "out")
    assert main(["import", str(tmp_path / "out"), str(tmp_path / "run"), "--onto", str(base / "base")]) == 2
    assert re.search(message, one_line(capfd))
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_mistakes_of_our_own_format(base, tmp_path, capfd):
    run = tune(base, "adapters", **WAYS["adapters"])
    assert main(["export", str(run), str(tmp_path / "out"), "--adapter"]) == 0
    arguments = ["import", str(tmp_path / "out"), str(tmp_path / "run"), "--onto", str(base / "base")]
    told = json.loads((tmp_path / "out" / "adapter.json").read_text())
    for change, message in (
        (
            {"model": told["model"] | {"adapter_dim": 5}},
            r"layers/attention_adapter/down/bias is of shape \[3, 3\], not",
        ),
        ({"model": told["model"] | {"prompt_len": 5}}, r"missing: prompt/embedding; name the run"),
        ({"model": told["model"] | {"d_model": 5}}, r"is not of the format 'lm adapter 1'; export the adapter again"),
        ({"format": "lm adapter 2"}, r"is not of the format 'lm adapter 1'"),
        ({"model": told["model"] | {"adapter_dim": "wide"}}, r"adapter\.json"),
    ):
        (tmp_path / "out" / "adapter.json").write_text(json.dumps(told | change))
        capfd.readouterr()
        assert main(arguments) == 2
        assert re.search(message, one_line(capfd))
        assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_mistakes_of_runs(base, tmp_path, capfd, monkeypatch):
    lora = tune(base, "lora", **WAYS["lora"])
    prompt = tune(base, "prompt", **WAYS["prompt"])
    more = tune(base, "more", rates=(".*lora_.*=1", "embed/.*=1", ".*=0"), lora=LORA)
    assert main(["export", str(lora), str(tmp_path / "out"), "--adapter"]) == 0
    resized = base / "resized"
    shutil.copytree(lora, resized)
    settings = json.loads((lora / "config.json").read_text())
    settings["init_from"]["resize_vocab"] = "mean"
    (resized / "config.json").write_text(json.dumps(settings))
    monkeypatch.chdir(tmp_path)
    export, onto = ["export", str(lora), "new", "--adapter"], ["--onto", str(base / "base")]
    for arguments, message in (
        (
            ["export", str(base / "base"), "new", "--adapter"],
            r"base has no low-rank terms, adapters or learned prompt;",
        ),
        (["export", str(lora), "out", "--adapter"], r"out exists; name another folder"),
        ([*export, "--max-shard-size", "1GB"], r"--max-shard-size is 1GB, and an adapter is one file"),
        ([*export, "--checkpoint", "7"], r"has no checkpoint '7'"),
        (
            ["export", str(prompt), "new"],
            r"has a learned prompt, which no model of transformers has; export .* --adapter",
        ),
        (
            ["export", str(more), "new", "--adapter"],
            r"embed/embedding was trained beside LoRA, and PEFT's files have no",
        ),
        (
            ["export", str(resized), "new", "--adapter"],
            r"resized began with a vocabulary of its own .* so no other model",
        ),
        (["import", "nowhere", "new", *onto], r"there is no folder nowhere; download the adapter"),
        (["import", "out", "out", *onto], r"out exists; name another folder for the run"),
        (["import", "out", "new", "--onto", str(lora)], r"lora has low-rank terms, .* name the run that it was begun"),
        (
            ["import", "out", "new", *onto, "--ids"],
            r"with --onto the tokenizer and the precision are those of that run",
        ),
        (["import", "out", "new", "--onto", "nowhere"], r"nowhere"),
    ):
        capfd.readouterr()
        assert main(arguments) == 2, arguments
        assert re.search(message, one_line(capfd)), arguments
        assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_scales_that_differ_become_one(base, tmp_path):
    """`use_rslora` and patterns, against the sums they mean."""
    run = tune(base, "wide", lora=dataclasses.replace(LORA, targets=".*/(query|value|up)"))
    assert main(["export", str(run), str(tmp_path / "out"), "--adapter"]) == 0
    told = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (told["r"], told["rank_pattern"], told["alpha_pattern"]) == (2, {"c_attn": 4}, {"c_attn": 8})
    changed(tmp_path / "out", use_rslora=True)
    assert main(["import", str(tmp_path / "out"), str(tmp_path / "again"), "--onto", str(base / "base")]) == 0
    first, second = loaded(run), loaded(tmp_path / "again")
    lora = runs.load_experiment(RunDirectory(tmp_path / "again")).model.lora
    for stem, scale in (("attention/query", 8 / 2.0), ("attention/value", 8 / 2.0), ("mlp/up", 4 / 2**0.5)):
        a, b = (
            first[f"layers/{stem}/lora_{x}/kernel"].reshape(3, 16, 2)
            if x == "a"
            else first[f"layers/{stem}/lora_{x}/kernel"].reshape(3, 2, -1)
            for x in "ab"
        )
        expected = scale * a.astype(np.float64) @ b.astype(np.float64)
        a, b = second[f"layers/{stem}/lora_a/kernel"], second[f"layers/{stem}/lora_b/kernel"]
        found = lora.scale * a.reshape(3, 16, -1) @ b.reshape(3, lora.rank, -1)
        np.testing.assert_allclose(found, expected, atol=1e-7)


def test_names_are_those_of_the_table_in_every_family():
    """What PEFT is told ends a name of no other module; `tests/parity/test_hf_adapters.py` asks peft itself."""
    from lm.hf.adapters import peft_adapter
    from lm.hf.families import expressed

    model = tiny.config(positions="rope", norm="rmsnorm", activation="swiglu", use_bias=False, tie_embeddings=False)
    family, architecture, _ = expressed(model, "causal_lm")
    config = dataclasses.replace(model, lora=dataclasses.replace(LORA, targets=".*/(query|down)"))
    leaves = dict(tree.path_leaves(tiny.build(config)[1]))
    told, made = peft_adapter(family, architecture, config, leaves, set(), dtype=np.float32)
    assert told["target_modules"] == ["down_proj", "q_proj"]
    assert made["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"].shape == (2, 32)
    assert made["base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"].shape == (32, 2)
    assert len(made) == 8
    assert not told["fan_in_fan_out"]
    assert jax.tree.leaves(told["rank_pattern"]) == []
