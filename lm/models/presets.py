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
    "70b": (8192, 80, 64, 8, 28672, 4096, False),  # LLaMA 2 (arXiv:2307.09288)
}
BERT_SIZES = {  # d_model, n_layers, n_heads; the small ones are those of arXiv:1908.08962
    "tiny": (128, 2, 2),
    "mini": (256, 4, 4),
    "small": (512, 4, 8),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
}
TRANSFORMER_SIZES = {  # d_model, n_heads, d_ff
    "base": (512, 8, 2048),
    "big": (1024, 16, 4096),
}
T5_SIZES = {  # d_model, layers of each stack, n_heads, d_ff
    "small": (512, 6, 8, 2048),
    "base": (768, 12, 12, 3072),
}


def gpt2(size: Literal["small", "medium", "large", "xl"] = "small", **changes: Any) -> ModelConfig:
    """GPT-2 (Radford et al. 2019): learned positions, pre-norm, tanh GELU, biases, tied head, dropout 0.1 off."""
    d_model, n_layers, n_heads = GPT2_SIZES[size]
    base = ModelConfig(vocab_size=50257, d_model=d_model, n_layers=n_layers, n_heads=n_heads, max_len=1024)
    return dataclasses.replace(base, **changes)


def llama(size: Literal["tiny", "1b", "7b", "13b", "70b"] = "7b", **changes: Any) -> ModelConfig:
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


def bert(size: Literal["tiny", "mini", "small", "base", "large"] = "base", **changes: Any) -> ModelConfig:
    """BERT (arXiv:1810.04805) with the heads of its pretraining: masked words, and what follows what (two classes).

    Both sides seen, learned positions, token types, post-norm, exact GELU, the uncased vocabulary; dropout 0.1 off.
    """
    d_model, n_layers, n_heads = BERT_SIZES[size]
    base = ModelConfig(
        vocab_size=30522,
        d_model=d_model,
        n_layers=n_layers,
        n_heads=n_heads,
        max_len=512,
        mask="bidirectional",
        token_types=2,
        embedding_norm=True,
        norm_place="post",
        norm_epsilon=1e-12,
        activation="gelu",
        head_transform=True,
        head_bias=True,
        pooler=True,
        n_classes=2,
        scale_residual_init=False,
    )
    return dataclasses.replace(base, **changes)


def transformer(size: Literal["base", "big"] = "base", **changes: Any) -> ModelConfig:
    """The encoder-decoder of "Attention is all you need" (arXiv:1706.03762): 6 and 6 layers, post-norm, sines, ReLU.

    Source, target and output head share one table of 37,000 rows (the paper's English-German vocabulary), scaled where
    it is read; every projection has a bias. Dropout, 0.1 and 0.3 in the paper, is off.
    """
    d_model, n_heads, d_ff = TRANSFORMER_SIZES[size]
    base = ModelConfig(
        vocab_size=37000,
        d_model=d_model,
        n_layers=6,
        encoder_layers=6,
        n_heads=n_heads,
        d_ff=d_ff,
        positions="sinusoidal",
        scale_embeddings=True,
        norm_place="post",
        activation="relu",
        init_std=d_model**-0.5,  # so that scaled embeddings are of size 1, as large as the sines
        scale_residual_init=False,
    )
    return dataclasses.replace(base, **changes)


def t5(size: Literal["small", "base"] = "base", **changes: Any) -> ModelConfig:
    """T5 1.0 (arXiv:1910.10683): relative positions, RMS norm before each block, ReLU, no biases, tied head.

    For 1.1 change `activation` to geglu_tanh, `tie_embeddings` and `scale_logits` to False, and `d_ff` to its own.
    """
    d_model, layers, n_heads, d_ff = T5_SIZES[size]
    base = ModelConfig(
        vocab_size=32128,
        d_model=d_model,
        n_layers=layers,
        encoder_layers=layers,
        n_heads=n_heads,
        head_dim=64,
        d_ff=d_ff,
        max_len=512,
        positions="relative",
        norm="rmsnorm",
        norm_epsilon=1e-6,
        activation="relu",
        use_bias=False,
        scale_attention=False,
        scale_logits=True,
        scale_residual_init=False,
    )
    return dataclasses.replace(base, **changes)
