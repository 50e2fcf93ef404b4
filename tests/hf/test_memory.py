"""A checkpoint in many parts goes into a run without ever being in memory twice."""

import json
import subprocess
import sys

import numpy as np
from pretrained import LLAMA_CONFIG
from safetensors.numpy import save_file

LAYERS, D, F, V = 32, 512, 512, 256  # every parameter a seventh of a layer
CONFIG = LLAMA_CONFIG | {
    "vocab_size": V,
    "hidden_size": D,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": 4,
    "intermediate_size": F,
}
SCRIPT = """
import re, sys
from pathlib import Path
import jax
from lm.run.pretrained import import_run
from lm.sharding import MeshConfig, make_mesh

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text()).group(1)) * 1024

jax.block_until_ready(jax.jit(lambda x: x + 1)(1.0))
before = peak()
import_run(sys.argv[1], Path(sys.argv[2]), make_mesh(MeshConfig(devices=1)))
print(before, peak())
"""


def test_the_model_is_in_memory_once(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(CONFIG))
    where, total = {}, 0
    rng = np.random.default_rng(0)

    def write(number: int, shapes: dict[str, tuple[int, ...]]) -> None:
        nonlocal total
        file = f"model-{number:05}-of-{LAYERS + 1:05}.safetensors"
        weights = {name: rng.random(shape, np.float32) for name, shape in shapes.items()}
        save_file(weights, source / file, metadata={"format": "pt"})
        where.update(dict.fromkeys(weights, file))
        total += sum(weight.nbytes for weight in weights.values())

    write(LAYERS + 1, {"model.embed_tokens.weight": (V, D), "lm_head.weight": (V, D), "model.norm.weight": (D,)})
    for i in range(LAYERS):
        shapes: dict[str, tuple[int, ...]] = {f"self_attn.{name}_proj.weight": (D, D) for name in "qkvo"}
        shapes |= {"mlp.gate_proj.weight": (F, D), "mlp.up_proj.weight": (F, D), "mlp.down_proj.weight": (D, F)}
        shapes |= {"input_layernorm.weight": (D,), "post_attention_layernorm.weight": (D,)}
        write(i + 1, {f"model.layers.{i}.{name}": shape for name, shape in shapes.items()})
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))

    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(source), str(tmp_path / "run")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    before, after = map(int, done.stdout.split())
    largest = LAYERS * D * F * 4  # the largest parameter, of all layers
    assert after - before > 0.9 * total, "what is measured is not what the import took"
    bound = total + 2 * largest + 60e6
    assert after - before < bound, f"{(after - before) / total:.2f} times the model"
    assert bound < 1.6 * total, "too large to tell that there is no second copy"
