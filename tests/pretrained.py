"""Folders of pretrained models as transformers writes them, and weights by name as our parameters."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from lm.hf.families import expressed
from lm.hf.load import check_weights, load_params, recognise
from lm.hf.source import Source, open_source
from lm.models.transformer import ModelConfig, Transformer
from lm.sharding import MeshConfig, make_mesh
from lm.train import abstract_params

Weights = dict[str, np.ndarray]


class Held:
    """Weights that are in memory, as `lm.hf.source.Tensors`."""

    def __init__(self, weights: Weights):
        self.weights = weights
        self.shapes = {name: weight.shape for name, weight in weights.items()}

    def read(self, name: str) -> np.ndarray:
        return self.weights[name]

    def forget(self, name: str) -> None:
        pass


def load_source(source: Source) -> tuple[ModelConfig, Any]:
    """The model of a source and its parameters, in float32."""
    found = recognise(source)
    shapes, shardings = abstract_params(Transformer(found.model), make_mesh(MeshConfig(devices=1)))
    check_weights(found, shapes)
    return found.model, load_params(found, shapes, shardings)


def load_folder(folder: Path) -> tuple[ModelConfig, Any]:
    return load_source(open_source(str(folder)))


def params_of(weights: Weights, model: ModelConfig, task: str = "causal_lm") -> Any:
    """Weights by their names as parameters of a model, in numpy; heads beside those of the model are taken, too."""
    config = expressed(model, task)[2]
    return jax.tree.map(np.asarray, load_source(Source(Path(), "weights", config, {}, Held(weights), ()))[1])


def write_folder(folder: Path, weights: Weights, config: dict[str, Any], parts: int = 1) -> Path:
    """A folder with config.json and safetensors, by hand, in one file or several with an index."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    names = sorted(weights)
    if parts == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    where = {}
    for part in range(parts):
        file = f"model-{part + 1:05}-of-{parts:05}.safetensors"
        mine = names[part::parts]  # every file holds something of all layers
        save_file({name: weights[name] for name in mine}, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(mine, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


def random_like(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> Weights:
    """Random weights by name, vectors around 1; `RandomState`, whose numbers numpy promises never to change."""
    rng = np.random.RandomState(seed)
    return {
        name: (rng.standard_normal(shapes[name]) * 0.3 + (len(shapes[name]) == 1)).astype(np.float32)
        for name in sorted(shapes)
    }


GPT2_CONFIG = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "vocab_size": 300,
    "n_positions": 64,
    "n_embd": 16,
    "n_layer": 3,
    "n_head": 2,
    "bos_token_id": 256,
    "eos_token_id": 256,
}


def gpt2_weights(config: dict[str, Any], seed: int = 0) -> Weights:
    """Of `GPT2LMHeadModel`, by the names and shapes of its files."""
    V, T, D, L = (config[name] for name in ("vocab_size", "n_positions", "n_embd", "n_layer"))
    shapes: dict[str, tuple[int, ...]] = {
        "wte.weight": (V, D),
        "wpe.weight": (T, D),
        "ln_f.weight": (D,),
        "ln_f.bias": (D,),
    }
    for i in range(L):
        for name in ("ln_1", "ln_2"):
            shapes |= {f"h.{i}.{name}.weight": (D,), f"h.{i}.{name}.bias": (D,)}
        for name, n_in, n_out in [
            ("attn.c_attn", D, 3 * D),
            ("attn.c_proj", D, D),
            ("mlp.c_fc", D, 4 * D),
            ("mlp.c_proj", 4 * D, D),
        ]:
            shapes |= {f"h.{i}.{name}.weight": (n_in, n_out), f"h.{i}.{name}.bias": (n_out,)}
    return {f"transformer.{name}": weight for name, weight in random_like(shapes, seed).items()}


LLAMA_CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 260,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "tie_word_embeddings": False,
    "bos_token_id": 256,
    "eos_token_id": [257, 258],
}


def llama_weights(config: dict[str, Any], seed: int = 0) -> Weights:
    """Of `LlamaForCausalLM`, by the names and shapes of its files."""
    V, D, L, N = (config[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"))
    F, K = config["intermediate_size"], config["num_key_value_heads"] * D // N
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (V, D),
        "model.norm.weight": (D,),
        "lm_head.weight": (V, D),
    }
    for i in range(L):
        matrices = {"q": (D, D), "k": (K, D), "v": (K, D), "o": (D, D)}
        shapes |= {f"model.layers.{i}.self_attn.{name}_proj.weight": shape for name, shape in matrices.items()}
        matrices = {"gate": (F, D), "up": (F, D), "down": (D, F)}
        shapes |= {f"model.layers.{i}.mlp.{name}_proj.weight": shape for name, shape in matrices.items()}
        shapes |= {f"model.layers.{i}.{name}_layernorm.weight": (D,) for name in ("input", "post_attention")}
    return random_like(shapes, seed)


def golden_tokens(config: dict[str, Any]) -> np.ndarray:
    """Two rows of tokens, int32, long enough for rotary scaling to tell."""
    return np.random.RandomState(1).randint(0, config["vocab_size"], (2, 40)).astype(np.int32)
