"""In and out again: the same bits, under the same names, whatever the files."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import tiny
import tokenizers
from flax import serialization, traverse_util
from pretrained import (
    GPT2_CONFIG,
    LLAMA_CONFIG,
    Weights,
    gpt2_weights,
    llama_weights,
    load_folder,
    write_folder,
)
from safetensors.numpy import load_file

from lm import run as runs
from lm import tree
from lm.checkpoint import read_arrays
from lm.cli import main
from lm.hf.export import parse_size, write_configs, write_weights
from lm.hf.families import expressed
from lm.records import RunDirectory

ROPE: dict[str, Any] = {
    "positions": "rope",
    "norm": "rmsnorm",
    "activation": "swiglu",
    "use_bias": False,
    "tie_embeddings": False,
    "n_kv_heads": 2,
}
LLAMA3 = {"rope_scaling": "llama3", "rope_original_len": 16, "rope_theta": 5e5}
BERT: dict[str, Any] = {
    "mask": "bidirectional",
    "token_types": 2,
    "embedding_norm": True,
    "norm_place": "post",
    "activation": "gelu",
}
WORDS = {"head_transform": True, "head_bias": True}
T5: dict[str, Any] = {
    "encoder_layers": 3,
    "head_dim": 6,
    "positions": "relative",
    "relative_buckets": 8,
    "relative_distance": 10,
    "norm": "rmsnorm",
    "activation": "relu",
    "use_bias": False,
    "scale_attention": False,
    "scale_logits": True,
}
# name: (settings, kind of task, model_type, architecture)
MODELS = {
    "gpt2": ({}, "causal_lm", "gpt2", "GPT2LMHeadModel"),
    "gpt2 untied, exact gelu": (
        {"tie_embeddings": False, "activation": "gelu"},
        "causal_lm",
        "gpt2",
        "GPT2LMHeadModel",
    ),
    "llama": (ROPE, "causal_lm", "llama", "LlamaForCausalLM"),
    "llama 3": (ROPE | LLAMA3, "causal_lm", "llama", "LlamaForCausalLM"),
    "llama with biases": (ROPE | {"use_bias": True}, "causal_lm", "llama", "LlamaForCausalLM"),
    "mistral": (ROPE | {"window": 5}, "causal_lm", "mistral", "MistralForCausalLM"),
    "qwen2": (ROPE | {"qkv_bias": True}, "causal_lm", "qwen2", "Qwen2ForCausalLM"),
    "qwen3": (ROPE | {"qk_norm": True, "head_dim": 12, "window": 7}, "causal_lm", "qwen3", "Qwen3ForCausalLM"),
    **{
        f"{kind} of classes": (
            changes | {"n_classes": 3, "classifier_bias": False, "pooling": "last", "tie_embeddings": True},
            "classification",
            kind,
            f"{name}ForSequenceClassification",
        )
        for kind, name, changes in (
            ("gpt2", "GPT2", {}),
            ("llama", "Llama", ROPE | LLAMA3),
            ("mistral", "Mistral", ROPE | {"window": 5}),
            ("qwen2", "Qwen2", ROPE | {"qkv_bias": True}),
            ("qwen3", "Qwen3", ROPE | {"qk_norm": True}),
        )
    },
    "bert": (BERT | WORDS | {"pooler": True, "n_classes": 2}, "bert", "bert", "BertForPreTraining"),
    "bert of words": (BERT | WORDS, "masked_lm", "bert", "BertForMaskedLM"),
    "bert of pairs": (BERT | {"pooler": True, "n_classes": 2}, "bert", "bert", "BertForNextSentencePrediction"),
    "bert of classes": (
        BERT | WORDS | {"pooler": True, "n_classes": 2},
        "classification",
        "bert",
        "BertForSequenceClassification",
    ),
    "bert of spans": (BERT | {"span_head": True}, "extractive_qa", "bert", "BertForQuestionAnswering"),
    "bert that takes the mean": (BERT | {"pooling": "mean"}, "masked_lm", "bert", "BertModel"),
    "t5": (T5, "seq2seq", "t5", "T5ForConditionalGeneration"),
    "t5 1.1": (
        T5 | {"activation": "geglu_tanh", "tie_embeddings": False, "scale_logits": False},
        "span_corruption",
        "t5",
        "T5ForConditionalGeneration",
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_out_and_in(name, tmp_path):
    settings, task, kind, wanted = MODELS[name]
    model, params = tiny.build(tiny.config(**settings))
    params = tiny.perturbed(params)
    family, architecture, config = expressed(model.config, task)
    assert (config["model_type"], architecture) == (kind, wanted)
    write_weights(tmp_path, family, architecture, params, dtype=np.float32, max_shard_size=10**9)
    write_configs(tmp_path, config, {})
    assert len({path.stat().st_mode for path in tmp_path.iterdir() if path.is_file()}) == 1, (
        "weights are read by who reads the config"
    )
    back, found = load_folder(tmp_path)
    tiny.assert_trees_equal(found, params)
    # Nothing that counts is lost: the model that comes back is called the same.
    assert expressed(back, task)[1:] == (architecture, config)
    same = {"d_ff": 48, "n_kv_heads": back.kv_heads, "head_dim": back.width_of_head}
    free = ("attention", "scale_residual_init", "init_std", "max_len", *(same if settings else ()))
    if not model.config.n_classes:
        free += ("classifier_bias", "pooling") if not settings.get("pooling") else ("classifier_bias",)
    for field in dataclasses.fields(back):
        if field.name not in (*free, *same) and not field.name.startswith(("rope_", "relative_")):
            assert getattr(back, field.name) == getattr(model.config, field.name), field.name


def weights_in(folder: Path) -> Weights:
    return {name: weight for path in sorted(folder.glob("*.safetensors")) for name, weight in load_file(path).items()}


def assert_same_weights(a: Weights, b: Weights) -> None:
    assert a.keys() == b.keys()
    for name, weight in a.items():
        assert weight.dtype == b[name].dtype
        np.testing.assert_array_equal(weight, b[name], err_msg=name)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_in_and_out_and_in(family, tmp_path, capfd):
    config, make = {"gpt2": (GPT2_CONFIG, gpt2_weights), "llama": (LLAMA_CONFIG, llama_weights)}[family]
    source = write_folder(tmp_path / "source", make(config), config, parts=4)
    (source / "generation_config.json").write_text('{"eos_token_id": 256, "temperature": 0.7}')
    first, out, second = (str(tmp_path / name) for name in ("first", "out", "second"))
    assert main(["import", str(source), first]) == 0
    assert main(["export", first, out, "--max-shard-size", "8KB"]) == 0
    told = capfd.readouterr().out
    assert config["architectures"][0] in told
    assert "float32" in told
    assert main(["import", out, second]) == 0
    assert_same_weights(weights_in(source), weights_in(Path(out)))
    files = sorted(Path(out).glob("model-*.safetensors"))
    assert len(files) > 3
    index = json.loads((Path(out) / "model.safetensors.index.json").read_text())
    assert {index["weight_map"][name] for name in weights_in(source)} == {path.name for path in files}
    assert index["metadata"]["total_size"] == sum(weight.nbytes for weight in weights_in(source).values())
    for path in files:
        held = load_file(path)
        assert len(held) == 1 or sum(weight.nbytes for weight in held.values()) <= 8000
    a, b = (read_arrays(Path(run) / "checkpoints", 0) for run in (first, second))
    assert a.keys() == b.keys()
    assert all(np.array_equal(a[path], b[path]) for path in a)
    assert json.loads((Path(out) / "generation_config.json").read_text()) == {"eos_token_id": 256, "temperature": 0.7}
    written = json.loads((Path(out) / "config.json").read_text())
    assert written["eos_token_id"] == config["eos_token_id"]
    experiments = [runs.load_experiment(RunDirectory.open(Path(run))) for run in (first, second)]
    assert experiments[0].model == experiments[1].model


def test_bfloat16(tmp_path):
    """Half precision goes through float32 and back unchanged; to it, numbers are rounded to the nearest."""
    weights = gpt2_weights(GPT2_CONFIG)
    half = {name: weight.astype(ml_dtypes.bfloat16) for name, weight in weights.items()}
    source = str(write_folder(tmp_path / "half", half, GPT2_CONFIG))
    whole = str(write_folder(tmp_path / "whole", weights, GPT2_CONFIG))
    assert main(["import", source, str(tmp_path / "a")]) == 0
    assert main(["export", str(tmp_path / "a"), str(tmp_path / "a out"), "--dtype", "bfloat16"]) == 0
    assert_same_weights(half, weights_in(tmp_path / "a out"))
    assert json.loads((tmp_path / "a out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert main(["import", whole, str(tmp_path / "b"), "--dtype", "bfloat16"]) == 0
    assert {leaf.dtype.name for leaf in read_arrays(tmp_path / "b" / "checkpoints", 0).values()} == {"bfloat16"}
    assert main(["export", str(tmp_path / "b"), str(tmp_path / "b out")]) == 0
    assert_same_weights(half, weights_in(tmp_path / "b out"))


def as_flax(weights: Weights) -> dict[str, Any]:
    """As the Flax models of transformers 4 wrote it: matrices turned, other names."""
    leaves = {}
    for name, weight in weights.items():
        stem, _, last = name.rpartition(".")
        if last == "weight" and weight.ndim == 2:
            table = stem.endswith(("wte", "wpe"))
            leaves[f"{stem}.{'embedding' if table else 'kernel'}"] = weight if table else weight.T
        else:
            leaves[f"{stem}.{'scale' if last == 'weight' else last}"] = weight
    return traverse_util.unflatten_dict(leaves, sep=".")


def same_params(a: Any, b: Any) -> None:
    tiny.assert_trees_equal(jax.tree.map(np.asarray, a), jax.tree.map(np.asarray, b))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """GPT-2's weights and what they are as parameters."""
    weights = gpt2_weights(GPT2_CONFIG)
    return weights, load_folder(write_folder(tmp_path_factory.mktemp("plain") / "source", weights, GPT2_CONFIG))[1]


def test_flax_files(plain, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(GPT2_CONFIG))
    (tmp_path / "flax_model.msgpack").write_bytes(serialization.msgpack_serialize(as_flax(plain[0])))
    same_params(load_folder(tmp_path)[1], plain[1])


@pytest.mark.parity
@pytest.mark.parametrize("parts", [1, 3])
def test_torch_files(parts, plain, tmp_path):
    import torch

    (tmp_path / "config.json").write_text(json.dumps(GPT2_CONFIG))
    weights = {name: torch.from_numpy(weight) for name, weight in plain[0].items()}
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    files = ["pytorch_model.bin"] if parts == 1 else [f"pytorch_model-0000{i}-of-00003.bin" for i in (1, 2, 3)]
    where = {}
    for i, file in enumerate(files):
        held = {name: weights[name] for name in sorted(weights)[i::parts]}
        torch.save(held, tmp_path / file)
        where |= dict.fromkeys(held, file)
    if parts > 1:
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    same_params(load_folder(tmp_path)[1], plain[1])


def test_what_files_hold_besides(plain, tmp_path):
    """Masks and a copy of the table; names without their beginning, as the hub's GPT-2 has them."""
    weights, params = plain
    mask = np.tril(np.ones((1, 1, 64, 64), np.uint8))
    bare = {name.removeprefix("transformer."): weight for name, weight in weights.items()}
    bare |= {f"h.{i}.attn.bias": mask for i in range(3)}
    bare |= {f"h.{i}.attn.masked_bias": np.array(-1e4, np.float32) for i in range(3)}
    same_params(load_folder(write_folder(tmp_path / "bare", bare, GPT2_CONFIG))[1], params)
    copied = weights | {"lm_head.weight": weights["transformer.wte.weight"].copy()}
    model, found = load_folder(write_folder(tmp_path / "copied", copied, GPT2_CONFIG))
    assert model.tie_embeddings
    same_params(found, params)
    only_head = {name.replace("transformer.wte", "lm_head"): weight for name, weight in weights.items()}
    same_params(load_folder(write_folder(tmp_path / "only head", only_head, GPT2_CONFIG))[1], params)


def test_a_head_that_differs_is_no_copy(plain, tmp_path):
    weights = plain[0] | {"lm_head.weight": plain[0]["transformer.wte.weight"] + 1}
    model, params = load_folder(write_folder(tmp_path / "source", weights, GPT2_CONFIG))
    assert not model.tie_embeddings
    np.testing.assert_array_equal(params["head"]["kernel"].T, weights["lm_head.weight"])


def test_old_names_and_positions_of_bert(tmp_path):
    """Norms with `gamma` and `beta`, a bias twice, ids of positions: as the first files of BERT are."""
    model, params = tiny.build(tiny.config(**BERT, **WORDS, pooler=True, n_classes=2))
    params = tiny.perturbed(params)
    family, architecture, config = expressed(model.config, "bert")
    new = tmp_path / "new"
    new.mkdir()
    write_weights(new, family, architecture, params, dtype=np.float32, max_shard_size=10**9)
    weights = weights_in(new)
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): weight
        for name, weight in weights.items()
    }
    old["bert.embeddings.position_ids"] = np.arange(32)[None]
    old["cls.predictions.decoder.weight"] = weights["bert.embeddings.word_embeddings.weight"]
    old["cls.predictions.decoder.bias"] = weights["cls.predictions.bias"]
    # The hub's files of bert-base say BertForMaskedLM and hold the other heads too.
    config |= {"architectures": ["BertForMaskedLM"]}
    same_params(load_folder(write_folder(tmp_path / "old", old, config))[1], params)


def test_sizes():
    assert [parse_size(text) for text in ("5GB", "500 MB", "1.5KiB", "77")] == [5 * 10**9, 5 * 10**8, 1536, 77]


class TestRun:
    """An imported run is a run."""

    def test_ids_in_ids_out(self, tmp_path, capfd):
        source = write_folder(tmp_path / "source", gpt2_weights(GPT2_CONFIG), GPT2_CONFIG)
        run = tmp_path / "run"
        assert main(["import", str(source), str(run)]) == 0
        names = {path.name for path in run.iterdir()}
        assert {"config.json", "environment.json", "status.json", "tokenizer", "checkpoints"} <= names
        assert RunDirectory.open(run).status() == "finished"
        capfd.readouterr()
        assert main(["generate", str(run), "--prompt", "5 6 7", "--max-new-tokens", "4", "--ignore-eos", "--json"]) == 0
        made = json.loads(capfd.readouterr().out)
        assert made["prompt_ids"] == [5, 6, 7]
        assert made["text"].split() == [str(i) for i in made["ids"]]
        assert main(["generate", str(run), "--prompt", "five"]) == 2
        assert "came without a tokenizer, so its texts are token ids" in capfd.readouterr().err
        assert main(["generate", str(run), "--prompt", "300"]) == 2
        assert "300 is outside the vocabulary" in capfd.readouterr().err

    def test_tokenizer(self, tmp_path, capfd):
        """With a tokenizer, texts; what begins and ends them is what the model's config.json says."""
        source = write_folder(tmp_path / "source", llama_weights(LLAMA_CONFIG), LLAMA_CONFIG)
        alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
        vocabulary = {piece: i for i, piece in enumerate([*alphabet, "<s>", "</s>", "<|stop|>"])}
        made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
        made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = tokenizers.decoders.ByteLevel()
        made.add_special_tokens(["<s>", "</s>", "<|stop|>"])
        made.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 256)])
        made.save(str(source / "tokenizer.json"))
        (source / "tokenizer_config.json").write_text('{"chat_template": "hello"}')
        (source / "config.json").write_text(json.dumps(LLAMA_CONFIG | {"eos_token_id": [258, 257]}))
        run = tmp_path / "run"
        assert main(["import", str(source), str(run)]) == 0
        trained = runs.load(run, runs.inference_mesh())
        assert (trained.tokenizer.bos_id, trained.tokenizer.eos_id) == (256, 258)
        assert trained.prompt_ids("ab") == [256, *trained.tokenizer.encode("ab")]
        assert "<|stop|>" not in trained.tokenizer.decode([258])
        assert main(["export", str(run), str(tmp_path / "out")]) == 0
        assert (tmp_path / "out" / "tokenizer_config.json").read_text() == '{"chat_template": "hello"}'
        # The vocabulary is the model's, and the tokenizer can be left out.
        assert main(["import", str(source), str(tmp_path / "ids"), "--ids"]) == 0
        assert runs.load(tmp_path / "ids", runs.inference_mesh()).tokenizer.encode("17 4") == [17, 4]

    def test_parameters_are_spread_over_a_mesh(self, tmp_path, capfd):
        source = str(write_folder(tmp_path / "source", llama_weights(LLAMA_CONFIG), LLAMA_CONFIG))
        mesh = ["--mesh.data", "1", "--mesh.fsdp", "2", "--mesh.tensor", "2", "--mesh.devices", "4"]
        assert main(["import", source, str(tmp_path / "spread"), *mesh]) == 0
        assert main(["import", source, str(tmp_path / "one")]) == 0
        a, b = (read_arrays(tmp_path / name / "checkpoints", 0) for name in ("spread", "one"))
        assert all(np.array_equal(a[path], b[path]) for path in a)
        assert len(a) == len(tree.path_leaves(runs.load(tmp_path / "one", runs.inference_mesh()).params))
