"""LoRA in PEFT's files: what the peft library computes with an adapter of ours, and we with one of peft's."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from pretrained import load_folder
from safetensors.numpy import load_file
from small_runs import experiment, start, write_tokenizer
from test_hf_families import DECODERS, SIZES, T5, as_torch, build, close, padded

from lm import run as runs
from lm import tree
from lm.cli import main
from lm.errors import UserError
from lm.generate import SamplingConfig
from lm.generate.texts import make_generator
from lm.hf.adapters import peft_adapter, write_adapter
from lm.hf.export import write_weights
from lm.hf.families import expressed
from lm.hf.read_adapters import read_peft
from lm.models.config import ModelConfig
from lm.models.lora import LoraConfig
from lm.models.transformer import Transformer
from lm.peft import merged
from lm.text.tokenizer import TokenizerConfig
from lm.train import InitConfig

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

RANK = 3
# name: (class, class of its config, settings, targets of ours, of PEFT, ranks of modules of theirs)
LORAS = {
    "gpt2": (*DECODERS["gpt2"], r".*attention/(query|value)", ["c_attn"], {"c_attn": 2 * RANK}),
    "gpt2 everywhere": (
        *DECODERS["gpt2"],
        ".*",
        ["c_attn", "c_fc", "c_proj"],
        {"c_attn": 3 * RANK, "c_proj": RANK, "c_fc": RANK},
    ),
    "gpt2 keys, and out of the mlp": (
        *DECODERS["gpt2"],
        r".*/key|.*/down",
        ["c_attn", "mlp.c_proj"],
        {"c_attn": RANK, "c_proj": RANK},
    ),
    "llama": (
        *DECODERS["llama 2 grouped"],
        r".*attention/(query|value)",
        ["q_proj", "v_proj"],
        {"q_proj": RANK, "v_proj": RANK},
    ),
    "qwen3 everywhere": (
        *DECODERS["qwen3"],
        ".*",
        ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
        {},
    ),
    "bert": (
        "BertForSequenceClassification",
        "BertConfig",
        SIZES | {"num_labels": 3},
        r".*attention/(query|value)",
        ["query", "value"],
        {},
    ),
    "bert, out of the attention": (
        "BertForSequenceClassification",
        "BertConfig",
        SIZES | {"num_labels": 3},
        ".*attention/out|.*/up",
        ["attention.output.dense", "intermediate.dense"],
        {},
    ),
    "bert, out of the mlp": (
        "BertForSequenceClassification",
        "BertConfig",
        SIZES | {"num_labels": 3},
        ".*/down",
        ["bert.encoder.layer.0.output.dense", "bert.encoder.layer.1.output.dense"],
        {},
    ),
    "bert without heads": ("BertModel", "BertConfig", SIZES, ".*/out", ["attention.output.dense"], {}),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        T5,
        r".*attention/(query|value)",
        ["q", "v"],
        {},
    ),
    "t5, the decoder's own attention": (
        "T5ForConditionalGeneration",
        "T5Config",
        T5,
        "layers/attention/query",
        ["decoder.block.0.layer.0.SelfAttention.q", "decoder.block.1.layer.0.SelfAttention.q"],
        {},
    ),
    "t5, across": (
        "T5ForConditionalGeneration",
        "T5Config",
        T5,
        "layers/cross_attention/.*",
        ["EncDecAttention.k", "EncDecAttention.o", "EncDecAttention.q", "EncDecAttention.v"],
        {},
    ),
}


def with_terms(model: ModelConfig, params: Any, targets: str, alpha: float = 5.0) -> tuple[ModelConfig, Any]:
    """A model with low-rank terms that are far from 0 beside the same parameters."""
    config = dataclasses.replace(model, lora=LoraConfig(rank=RANK, alpha=alpha, targets=targets))
    base = dict(tree.path_leaves(params))
    whole = tiny.perturbed(tiny.build(config)[1])
    return config, jax.tree_util.tree_map_with_path(lambda path, leaf: base.get(tree.path_string(path), leaf), whole)


def task_of(model: ModelConfig) -> str:
    if model.encoder_layers:
        return "seq2seq"
    return "causal_lm" if model.mask == "causal" else "classification" if model.n_classes else "masked_lm"


def ours(model: ModelConfig, params: Any) -> np.ndarray:
    """What a model says of `padded()`."""
    batch = padded()
    inputs = batch["tokens"], batch["positions"], batch["segments"]
    bound = Transformer(model).bind({"params": params})
    if model.encoder_layers:
        source = {"source_tokens": batch["tokens"], "source_segments": batch["segments"]}
        return np.asarray(bound(padded(1)["tokens"][:, :7], **source))
    if model.mask == "causal":
        return np.asarray(bound(*inputs))[batch["segments"] > 0]
    hidden = bound.hidden(*inputs)[0]
    return np.asarray(bound.classify(hidden, batch["segments"]) if model.n_classes else hidden[:, 0])[:3]


def theirs(model: Any) -> Any:
    """The same of a model of transformers or peft."""
    import torch

    batch = padded()
    there = torch.from_numpy(batch["segments"] > 0)
    kind = model.config.model_type
    with torch.no_grad():
        if kind == "t5":
            target = torch.from_numpy(padded(1)["tokens"][:, :7]).long()
            inputs = {name: value for name, value in as_torch(batch).items() if name != "position_ids"}
            return model(**inputs, decoder_input_ids=target).logits
        out = model(**as_torch(batch))
    if kind != "bert":
        return out.logits[there]
    return (out.logits if hasattr(out, "logits") else out.last_hidden_state[:, 0])[:3]


def export(folder: Path, model: ModelConfig, params: Any, trained: set[str], kind: str | None = None) -> None:
    plain = dataclasses.replace(model, lora=LoraConfig())
    family, architecture, _ = expressed(plain, task_of(model), kind)
    folder.mkdir()
    made = peft_adapter(family, architecture, model, dict(tree.path_leaves(params)), trained, dtype=np.float32)
    write_adapter(folder, *made, own=False)


@pytest.mark.parametrize(
    "name", tiny.fast(LORAS, "gpt2 everywhere", "gpt2 keys, and out of the mlp", "qwen3 everywhere", "bert", "t5")
)
def test_peft_says_the_same_and_merges_to_the_same(name, tmp_path):
    import transformers
    from peft import PeftModel

    cls, kind, settings, targets, modules, ranks = LORAS[name]
    base = build(cls, kind, settings)
    base.save_pretrained(tmp_path / "base")
    plain, read = load_folder(tmp_path / "base")
    model, params = with_terms(plain, read, targets)
    export(tmp_path / "adapter", model, params, set(), base.config.model_type)
    told = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert told["target_modules"] == modules

    again = getattr(transformers, cls).from_pretrained(tmp_path / "base").eval()
    before = theirs(again).numpy()
    tuned = PeftModel.from_pretrained(again, tmp_path / "adapter").eval()
    expected = ours(model, params)
    close(expected, theirs(tuned))
    assert np.abs(expected - before).max() > 1e-2, "the terms say something"
    assert not np.allclose(expected, ours(plain, read), atol=1e-2)
    for module, sub in tuned.named_modules():
        if hasattr(sub, "lora_A") and (rank := ranks.get(module.split(".")[-1])):
            assert sub.r["default"] == rank, module
            assert sub.scaling["default"] == pytest.approx(5.0 / RANK)

    whole, joined = merged(model, params)
    family, architecture, _ = expressed(whole, task_of(model), base.config.model_type)
    write_weights(tmp_path, family, architecture, joined, dtype=np.float32, max_shard_size=10**9)
    wanted = {name: weight.numpy() for name, weight in tuned.merge_and_unload().state_dict().items()}
    found = load_file(tmp_path / "model.safetensors")
    prefix = "bert." if cls == "BertModel" else ""
    assert {name.removeprefix(prefix) for name in found} <= set(wanted)
    for weight, value in found.items():
        np.testing.assert_allclose(value, wanted[weight.removeprefix(prefix)], atol=1e-5, err_msg=weight)


@pytest.mark.parametrize("name", LORAS)
def test_what_was_written_is_read(name, tmp_path):
    cls, kind, settings, targets, _, _ = LORAS[name]
    base = build(cls, kind, settings)
    base.save_pretrained(tmp_path / "base")
    plain, read = load_folder(tmp_path / "base")
    model, params = with_terms(plain, read, targets)
    export(tmp_path / "adapter", model, params, set(), base.config.model_type)
    family = expressed(plain, task_of(plain), base.config.model_type)[0]
    shapes = {path: leaf.shape for path, leaf in tree.path_leaves(read)}
    found = read_peft(tmp_path / "adapter", family, plain, shapes)
    assert (found.model.lora.rank, found.model.lora.alpha) == (RANK, pytest.approx(5.0))
    leaves = dict(tree.path_leaves(params))
    assert {path for path in found.parameters if "/lora_" in path} == {path for path in leaves if "/lora_" in path}
    for path, value in found.parameters.items():
        np.testing.assert_array_equal(value, leaves[path], err_msg=path)


def tuned_by_peft(base: Any, **settings: Any) -> Any:
    """An adapter as the peft library makes it, its terms away from 0."""
    import torch
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    model = get_peft_model(base, PeftConfig(**settings)).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("gpt2", {"target_modules": ["c_attn"], "r": 4, "lora_alpha": 8}),
        ("gpt2", {"target_modules": "all-linear", "r": 2, "task_type": "CAUSAL_LM"}),
        (
            "gpt2",
            {"target_modules": ["c_attn", "mlp.c_proj"], "rank_pattern": {"c_attn": 5}, "alpha_pattern": {"c_attn": 3}},
        ),
        ("llama", {"target_modules": ["q_proj", "v_proj"], "use_rslora": True, "r": 4}),
        ("llama", {"target_modules": ["k_proj", "down_proj"], "layers_to_transform": [1], "r": 2}),
        ("bert", {"target_modules": ["query", "value"], "task_type": "SEQ_CLS", "lora_dropout": 0.1}),
        ("bert", {"target_modules": ["query"], "modules_to_save": ["classifier", "pooler.dense"]}),
        ("bert without heads", {"target_modules": ["query", "key"]}),
        ("t5", {"target_modules": ["q", "o"], "r": 2, "task_type": "SEQ_2_SEQ_LM"}),
    ],
)
def test_adapters_of_peft(name, settings, tmp_path):
    cls, kind, sizes = LORAS[name][:3]
    base = build(cls, kind, sizes)
    base.save_pretrained(tmp_path / "base")
    model = tuned_by_peft(base, **settings)
    model.save_pretrained(tmp_path / "adapter")
    plain, read = load_folder(tmp_path / "base")
    family = expressed(plain, task_of(plain), base.config.model_type)[0]
    leaves = dict(tree.path_leaves(read))
    found = read_peft(tmp_path / "adapter", family, plain, {path: leaf.shape for path, leaf in leaves.items()})
    shapes = tiny.build(found.model)[1]
    everything = leaves | found.parameters
    params = jax.tree_util.tree_map_with_path(lambda path, _: jnp.asarray(everything[tree.path_string(path)]), shapes)
    assert found.model.lora.dropout == settings.get("lora_dropout", 0.0)
    close(ours(found.model, params), theirs(model))


@pytest.mark.parametrize(
    ("name", "trained", "saved"),
    [
        ("llama", {"final_norm/scale", "head/kernel"}, ["lm_head", "model.norm"]),
        (
            "llama",
            {"layers/attention_norm/scale"},
            ["model.layers.0.input_layernorm", "model.layers.1.input_layernorm"],
        ),
        (
            "bert",
            {"classifier/kernel", "classifier/bias", "pooler/kernel", "pooler/bias"},
            ["bert.pooler.dense", "classifier"],
        ),
    ],
)
def test_what_else_was_trained_goes_along(name, trained, saved, tmp_path):
    import transformers
    from peft import PeftModel

    cls, kind, settings, targets = LORAS[name][:4]
    base = build(cls, kind, settings)
    base.save_pretrained(tmp_path / "base")
    plain, read = load_folder(tmp_path / "base")
    model, params = with_terms(plain, read, targets)
    still = ours(model, params)
    moved = tiny.perturbed(params, seed=7)
    params = jax.tree_util.tree_map_with_path(
        lambda path, old, new: new if tree.path_string(path) in trained else old, params, moved
    )
    export(tmp_path / "adapter", model, params, trained)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["modules_to_save"] == saved
    again = getattr(transformers, cls).from_pretrained(tmp_path / "base").eval()
    expected = ours(model, params)
    assert np.abs(expected - still).max() > 1e-2
    close(expected, theirs(PeftModel.from_pretrained(again, tmp_path / "adapter").eval()))


def test_what_peft_has_no_place_for(tmp_path):
    cls, kind, settings, targets = LORAS["gpt2"][:4]
    build(cls, kind, settings).save_pretrained(tmp_path / "base")
    model, params = with_terms(*load_folder(tmp_path / "base"), targets)
    for path in ("embed/embedding", "layers/attention/query/bias", "layers/attention/key/kernel"):
        with pytest.raises(UserError, match=f"^{path} was trained beside LoRA, and PEFT's files have no place for it;"):
            export(tmp_path / path.replace("/", " "), model, params, {path})


def test_a_run_of_gpt2_writes_the_same(tmp_path):
    """From a folder of transformers through training here to the peft library: 64 greedy tokens."""
    import torch
    import transformers
    from peft import PeftModel

    cls, kind, settings = DECODERS["gpt2"]
    build(cls, kind, settings | {"n_positions": 96, "vocab_size": 260}).save_pretrained(tmp_path / "base")
    write_tokenizer(tmp_path / "base" / "tokenizer.json")
    assert main(["import", str(tmp_path / "base"), str(tmp_path / "imported")]) == 0
    made = experiment(tmp_path, train={"steps": 3, "eval_every": 0, "save_every": 0}, optim={"peak_lr": 0.1})
    lora = LoraConfig(rank=4, dropout=0.1, targets=".*/(query|value|up)")
    made = dataclasses.replace(
        made,
        tokenizer=TokenizerConfig(),
        model=ModelConfig(attention="xla", lora=lora),
        init_from=InitConfig(run=str(tmp_path / "imported")),
    )
    start(made, tmp_path / "run")
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "adapter"), "--adapter"]) == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    prompts, greedy = [[5, 6, 7], [9, 8, 7, 6, 5]], SamplingConfig(temperature=0.0, max_new_tokens=64, ignore_eos=True)

    def said(model: Any) -> list[list[int]]:
        model.generation_config.eos_token_id = None
        made = [model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=64)[0] for ids in prompts]
        return [found[len(ids) :].tolist() for found, ids in zip(made, prompts)]

    before = said(model)
    after = said(PeftModel.from_pretrained(model, tmp_path / "adapter").eval())
    trained = runs.load(tmp_path / "run", runs.inference_mesh(), "latest")
    assert [found.ids for found in make_generator(trained).generate(prompts, greedy)] == after != before
