"""What is wrong with a folder, or with what was asked for: one line, status 2, and nothing written."""

import json
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from pretrained import GPT2_CONFIG, LLAMA_CONFIG, gpt2_weights, llama_weights, write_folder

from lm.cli import main
from lm.hf.source import TorchTensors
from lm.hf.tables import listed


def folder_of(path: Path, **changes) -> Path:
    config = GPT2_CONFIG | changes
    return write_folder(path, gpt2_weights(GPT2_CONFIG), config)


def truncated(path: Path) -> None:
    whole = folder_of(path) / "model.safetensors"
    whole.write_bytes(whole.read_bytes()[:-1000])


def other_tensors(path: Path) -> None:
    """A missing layer norm, a matrix turned in two layers, a table too long and two weights too many, at once."""
    weights = gpt2_weights(GPT2_CONFIG)
    del weights["transformer.h.1.ln_2.bias"]
    for i in (0, 1):
        name = f"transformer.h.{i}.mlp.c_fc.weight"
        weights[name] = np.ascontiguousarray(weights[name].T)
    weights["transformer.wpe.weight"] = np.zeros((65, 16), np.float32)
    weights |= {f"transformer.h.{i}.adapter.weight": np.zeros(3, np.float32) for i in (0, 2)}
    write_folder(path, weights, GPT2_CONFIG)


def with_tokenizer(path: Path) -> None:
    folder = folder_of(path)
    vocabulary = {"<|endoftext|>": 0} | {f"w{i}": i for i in range(1, 301)}
    import tokenizers

    tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary)).save(str(folder / "tokenizer.json"))


def without_config(path: Path) -> None:
    (folder_of(path) / "config.json").unlink()


def only(path: Path, name: str, content: bytes) -> None:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(GPT2_CONFIG))
    (path / name).write_bytes(content)


def lacks_a_part(path: Path) -> None:
    write_folder(path, gpt2_weights(GPT2_CONFIG), GPT2_CONFIG, parts=3)
    (path / "model-00002-of-00003.safetensors").unlink()


def outside(path: Path) -> None:
    write_folder(path, gpt2_weights(GPT2_CONFIG), GPT2_CONFIG, parts=2)
    (path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../secret.safetensors"}}')


def whole_numbers(path: Path) -> None:
    weights = gpt2_weights(GPT2_CONFIG)
    weights["transformer.h.0.mlp.c_fc.weight"] = np.ones((16, 64), np.int8)
    write_folder(path, weights, GPT2_CONFIG)


def llama(path: Path, **changes) -> None:
    write_folder(path, llama_weights(LLAMA_CONFIG), LLAMA_CONFIG | changes)


MISTAKES = {
    "nothing there": (
        lambda path: None,
        r"there is no folder .*source, and .*|neither a folder that exists nor a name",
    ),
    "truncated": (truncated, r"model\.safetensors is not a whole safetensors file .*; download or copy it again"),
    "wrong tensors": (
        other_tensors,
        r"missing: transformer\.h\.1\.ln_2\.bias; extra: transformer\.h\.\{0,2\}\.adapter\.weight; "
        r"of shape \[65, 16\], not \[64, 16\]: transformer\.wpe\.weight; "
        r"of shape \[64, 16\], not \[16, 64\]: transformer\.h\.\{0-1\}\.mlp\.c_fc\.weight; take both",
    ),
    "layers that config.json lacks": (
        lambda path: folder_of(path, n_layer=2),
        r"extra: transformer\.h\.2\.attn\.c_attn\.bias, transformer\.h\.2\.",
    ),
    "pickle": (
        lambda path: only(path, "weights.pkl", pickle.dumps({"a": 1})),
        r"holds pickle files \(weights\.pkl\), which can run any program and are not loaded; convert",
    ),
    "no config": (without_config, r"has no config\.json; give a folder"),
    "no weights": (lambda path: only(path, "README.md", b"weights soon"), r"holds no weights; they are in"),
    "not JSON": (lambda path: only(path, "config.json", b"{"), r"can't read .*config\.json: .*; copy it again"),
    "unknown family": (
        lambda path: folder_of(path, model_type="mamba"),
        r"model_type 'mamba'; supported are gpt2, llama, mistral, qwen2, qwen3, bert, t5",
    ),
    "unknown architecture": (
        lambda path: folder_of(path, architectures=["GPT2ForTokenClassification"]),
        r"\['GPT2ForTokenClassification'\]; supported of gpt2 are GPT2LMHeadModel, GPT2Model, GPT2ForSeq",
    ),
    "quantised": (lambda path: folder_of(path, quantization_config={"bits": 4}), r"has a quantization_config"),
    "whole numbers": (whole_numbers, r"c_fc\.weight in .* is of int8; only float32, float16 and bfloat16"),
    "regression": (
        lambda path: folder_of(path, architectures=["GPT2ForSequenceClassification"], num_labels=1),
        r"has one class, which transformers takes for a regression",
    ),
    "regression of several": (
        lambda path: folder_of(path, architectures=["GPT2ForSequenceClassification"], problem_type="regression"),
        r"problem_type 'regression'; what is known is single_label_classification and multi_label_classification",
    ),
    "a classifier that the weights lack": (
        lambda path: folder_of(path, architectures=["GPT2ForSequenceClassification"]),
        r"missing: score\.weight",
    ),
    "unknown setting": (
        lambda path: folder_of(path, scale_attn_by_inverse_layer_idx=True),
        r"scale_attn_by_inverse_layer_idx True; this program has only False",
    ),
    "unknown activation": (
        lambda path: folder_of(path, activation_function="snake"),
        r"'snake'; what is known is gelu",
    ),
    "size that is text": (lambda path: folder_of(path, n_embd="16"), r"n_embd '16'; it must be a whole number"),
    "unknown rotary scaling": (
        lambda path: llama(path, rope_scaling={"type": "yarn", "factor": 2.0}),
        r"rope_type 'yarn'; what is known is default, linear, llama3",
    ),
    "half of the biases": (lambda path: llama(path, attention_bias=True), r"attention_bias True and mlp_bias False"),
    "window in some layers": (
        lambda path: llama(
            path, model_type="qwen2", architectures=["Qwen2ForCausalLM"], use_sliding_window=True, max_window_layers=1
        ),
        r"in some layers and not in others",
    ),
    "tokenizer of another model": (with_tokenizer, r"has 301 ids and the model 300 rows; they don't belong together"),
    "a part is missing": (lacks_a_part, r"lacks model-00002-of-00003\.safetensors, which model\.safetensors\.index"),
    "index that points outside": (outside, r"names '\.\./secret\.safetensors', which is not a file beside it"),
    "damaged msgpack": (lambda path: only(path, "flax_model.msgpack", b"\x93\x01"), r"is not a whole Flax file"),
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def one_line(capfd) -> str:
    out, err = capfd.readouterr()
    assert not out.strip()
    assert err.startswith("lm: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize("name", MISTAKES)
def test_import(name, here, capfd):
    make, message = MISTAKES[name]
    make(here / "source")
    assert main(["import", "source", "run"]) == 2
    assert re.search(message, one_line(capfd))
    assert not (here / "run").exists()


def test_what_is_there_stays(here, capfd):
    folder_of(here / "source")
    (here / "run").mkdir()
    assert main(["import", "source", "run"]) == 2
    assert "run exists; name another folder" in one_line(capfd)
    assert not list((here / "run").iterdir())


def test_a_file_as_source(here, capfd):
    folder_of(here / "source")
    assert main(["import", "source/model.safetensors", "run"]) == 2
    assert "is a file; give the folder" in one_line(capfd)


@pytest.mark.parity
def test_a_pickle_that_is_no_weights_runs_nothing(here, capfd):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (Path("touched"),))

    import torch

    only(here / "source", "notes.txt", b"")
    torch.save({"transformer.wte.weight": Evil()}, here / "source" / "pytorch_model.bin")
    assert main(["import", "source", "run"]) == 2
    assert re.search(r"pytorch_model\.bin can't be loaded as weights alone", one_line(capfd))
    assert not (here / "touched").exists()


def test_torch_files_want_torch(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    with pytest.raises(Exception, match="pickle file, which only torch's loader of weights may read, and torch is not"):
        TorchTensors([Path("pytorch_model.bin")])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    folder_of(folder / "source")
    assert main(["import", str(folder / "source"), str(folder / "run")]) == 0
    return folder / "run"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask": "prefix"}, r"nearest is gpt2: model\.mask is 'prefix' and there 'causal'; train a model"),
        ({"positions": "sinusoidal"}, r"model\.positions is 'sinusoidal' and there 'learned'"),
        ({"qk_norm": True}, r"model\.qk_norm is True and there False"),
        ({"norm_place": "post"}, r"model\.norm_place is 'post' and there 'pre'"),
    ],
)
def test_settings_that_no_family_has(run, changes, message, tmp_path, capfd):
    shutil.copytree(run, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    config["model"] |= changes
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    capfd.readouterr()
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 2
    assert re.search(message, one_line(capfd))
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["out", "--max-shard-size", "big"], "'big' is not a size; write it as 5GB"),
        (["run"], "run exists; name another folder"),
        (["out", "--checkpoint", "7"], "has no checkpoint '7'; choose best, latest or one of 0"),
    ],
)
def test_arguments(run, arguments, message, monkeypatch, capfd):
    monkeypatch.chdir(run.parent)
    capfd.readouterr()
    assert main(["export", "run", *arguments]) == 2
    assert message in one_line(capfd)
    assert {path.name for path in run.parent.iterdir()} == {"source", "run"}


def test_no_dataset_to_evaluate_on(run, capfd):
    capfd.readouterr()
    assert main(["evaluate", str(run)]) == 2
    assert "was imported, so it has no dataset" in one_line(capfd)


def test_names_in_a_line():
    names = ["h.0.a", "h.1.a", "h.2.a", "h.5.a", "h.3.b", "c", "d.1.e.2"]
    assert listed(names) == "h.{0-2,5}.a, h.3.b, c, d.1.e.2"
