"""Weights of Hugging Face models as parameters of ours, and the training run both are put through."""

from typing import Any

import numpy as np
from pretrained import params_of

from lm.models.transformer import ModelConfig

VOCAB, WIDTH, LAYERS, HEADS, LENGTH, ROWS, STEPS = 256, 64, 4, 4, 32, 4, 50
PEAK, WARMUP, DECAY, BETAS, EPSILON, CLIP = 3e-3, 10, 0.1, (0.9, 0.95), 1e-8, 1.0

GPT2 = ModelConfig(vocab_size=VOCAB, d_model=WIDTH, n_layers=LAYERS, n_heads=HEADS, max_len=LENGTH)
LLAMA = ModelConfig(
    vocab_size=VOCAB,
    d_model=WIDTH,
    n_layers=LAYERS,
    n_heads=HEADS,
    n_kv_heads=2,
    d_ff=96,
    max_len=LENGTH,
    positions="rope",
    norm="rmsnorm",
    norm_epsilon=1e-6,
    activation="swiglu",
    use_bias=False,
    tie_embeddings=False,
)

Weights = dict[str, np.ndarray]


def draw(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> Weights:
    """Random weights by name, none at 0 or 1; `RandomState`, whose numbers numpy promises never to change."""
    weights = {}
    for number, name in enumerate(sorted(shapes)):
        values = np.random.RandomState(1000 * seed + number).standard_normal(shapes[name]) * 0.05
        one = ".ln_" in name or "norm" in name
        weights[name] = (values + (one and name.endswith("weight"))).astype(np.float32)
    return weights


def gpt2_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of `GPT2LMHeadModel`, so that weights can be drawn without torch."""
    D = WIDTH
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (VOCAB, D),
        "transformer.wpe.weight": (LENGTH, D),
        "transformer.ln_f.weight": (D,),
        "transformer.ln_f.bias": (D,),
    }
    for i in range(LAYERS):
        h = f"transformer.h.{i}."
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"{h}{norm}.weight": (D,), f"{h}{norm}.bias": (D,)}
        for name, n_in, n_out in [
            ("attn.c_attn", D, 3 * D),
            ("attn.c_proj", D, D),
            ("mlp.c_fc", D, 4 * D),
            ("mlp.c_proj", 4 * D, D),
        ]:
            shapes |= {f"{h}{name}.weight": (n_in, n_out), f"{h}{name}.bias": (n_out,)}
    return shapes


def gpt2_params(weights: Weights) -> dict[str, Any]:
    """GPT-2's weights as our parameters."""
    return params_of(weights, GPT2)


def llama_params(weights: Weights) -> dict[str, Any]:
    """LLaMA's weights as our parameters."""
    return params_of(weights, LLAMA)


def batch(step: int) -> np.ndarray:
    """Tokens `[ROWS, LENGTH + 1]` that can be learnt: each row counts up by a step of its own, with slips."""
    rng = np.random.RandomState(step)
    start, stride = rng.randint(0, VOCAB, (ROWS, 1)), rng.randint(1, 6, (ROWS, 1))
    slips = rng.randint(0, VOCAB, (ROWS, LENGTH + 1)) * (rng.random_sample((ROWS, LENGTH + 1)) < 0.05)
    return ((start + stride * np.arange(LENGTH + 1) + slips) % VOCAB).astype(np.int32)


def learning_rate(step: int) -> float:
    """Linear warmup, then constant."""
    return PEAK * min(1.0, (step + 1) / WARMUP)
