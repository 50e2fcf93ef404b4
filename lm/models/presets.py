"""Published models as settings of the one Transformer."""

import dataclasses
from typing import Any, Literal

from lm.models.transformer import ModelConfig

GPT2_SIZES = {  # d_model, n_layers, n_heads
    "small": (768, 12, 12),
    "medium": (1024, 24, 16),
    "large": (1280, 36, 20),
    "xl": (1600, 48, 25),
}
LLAMA_SIZES = {  # d_model, n_layers, n_heads, n_kv_heads, d_ff, max_len, tie_embeddings
    "tiny": (288, 6, 6, 6, 768, 256, True),  # the 15M model of llama2.c
    "1b": (2048, 22, 32, 4, 5632, 2048, False),  # TinyLlama 1.1B (arXiv:2401.02385)
    "7b": (4096, 32, 32, 32, 11008, 2048, False),
    "13b": (5120, 40, 40, 40, 13824, 2048, False),
}


def gpt2(size: Literal["small", "medium", "large", "xl"] = "small", **changes: Any) -> ModelConfig:
    """GPT-2 (Radford et al. 2019): learned positions, pre-norm, tanh GELU, biases, tied head, dropout 0.1 off."""
    d_model, n_layers, n_heads = GPT2_SIZES[size]
    base = ModelConfig(vocab_size=50257, d_model=d_model, n_layers=n_layers, n_heads=n_heads, max_len=1024)
    return dataclasses.replace(base, **changes)


def llama(size: Literal["tiny", "1b", "7b", "13b"] = "7b", **changes: Any) -> ModelConfig:
    """LLaMA (arXiv:2302.13971): rotary positions, RMS norm, SwiGLU, no biases, vocabulary of 32,000."""
    d_model, n_layers, n_heads, n_kv_heads, d_ff, max_len, tied = LLAMA_SIZES[size]
    base = ModelConfig(
        vocab_size=32000,
        d_model=d_model,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        d_ff=d_ff,
        max_len=max_len,
        positions="rope",
        norm="rmsnorm",
        activation="swiglu",
        use_bias=False,
        tie_embeddings=tied,
        scale_residual_init=False,
    )
    return dataclasses.replace(base, **changes)
