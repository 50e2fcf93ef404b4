"""A checkpoint in many parts goes into a run without ever being in memory twice."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from pretrained import LLAMA_CONFIG
from safetensors.numpy import save_file

LAYERS, D, F, V = 32, 512, 512, 256  # every parameter a seventh of a layer
SCRIPT = """
import os, re, sys
from pathlib import Path

if hasattr(os, "sched_setaffinity"):  # what is being compressed for the disk is held once more, as many as cores
    os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:2])
from lm.run.pretrained import import_run
from lm.sharding import MeshConfig, make_mesh

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text()).group(1)) * 1024

small, large, runs = map(Path, sys.argv[1:])
mesh = make_mesh(MeshConfig(devices=1))
import_run(str(small), runs / "small", mesh)  # so that the code that it takes is in memory
before = peak()
import_run(str(large), runs / "large", mesh)
print(before, peak())
"""


def checkpoint(folder: Path, d: int, layers: int) -> int:
    """Writes a LLaMA of random weights, each layer a file; returns the bytes of them all."""
    folder.mkdir()
    config = {"vocab_size": V, "hidden_size": d, "num_hidden_layers": layers, "num_key_value_heads": 4}
    (folder / "config.json").write_text(json.dumps(LLAMA_CONFIG | config | {"intermediate_size": F}))
    rng = np.random.default_rng(0)
    where, total = {}, 0

    def write(number: int, shapes: dict[str, tuple[int, ...]]) -> None:
        nonlocal total
        file = f"model-{number:05}-of-{layers + 1:05}.safetensors"
        weights = {name: rng.random(shape, np.float32) for name, shape in shapes.items()}
        save_file(weights, folder / file, metadata={"format": "pt"})
        where.update(dict.fromkeys(weights, file))
        total += sum(weight.nbytes for weight in weights.values())

    write(layers + 1, {"model.embed_tokens.weight": (V, d), "lm_head.weight": (V, d), "model.norm.weight": (d,)})
    for i in range(layers):
        shapes: dict[str, tuple[int, ...]] = {f"self_attn.{name}_proj.weight": (d, d) for name in "qkvo"}
        shapes |= {"mlp.gate_proj.weight": (F, d), "mlp.up_proj.weight": (F, d), "mlp.down_proj.weight": (d, F)}
        shapes |= {"input_layernorm.weight": (d,), "post_attention_layernorm.weight": (d,)}
        write(i + 1, {f"model.layers.{i}.{name}": shape for name, shape in shapes.items()})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return total


def test_the_model_is_in_memory_once(tmp_path):
    checkpoint(tmp_path / "small", 32, 2)
    total = checkpoint(tmp_path / "large", D, LAYERS)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "small"), str(tmp_path / "large"), str(tmp_path / "runs")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    before, after = map(int, done.stdout.split())
    largest = LAYERS * D * F * 4  # the largest parameter, of all layers
    assert after - before > 0.9 * total, "what is measured is not what the import took"
    bound = total + 2 * largest + 60e6
    assert after - before < bound, f"{(after - before) / total:.2f} times the model"
    assert bound < 1.6 * total, "too large to tell that there is no second copy"
