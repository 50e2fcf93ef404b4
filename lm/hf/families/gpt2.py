"""GPT-2: its matrices are `[in, out]`, queries, keys and values side by side in one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lm.hf.fields import activation, integer, number, only, their_activation, truth
from lm.hf.tables import Family, Names, Row, dense, norm
from lm.models.config import ModelConfig

_HEAD, _LAYER = "lm_head.weight", "transformer.h.{}"


def _packed(index: int, ours: str) -> tuple[Row, Row]:
    theirs = f"{_LAYER}.attn.c_attn"
    return (
        Row(f"{theirs}.weight", f"{ours}/kernel", "in_out", part=(index, 3)),
        Row(f"{theirs}.bias", f"{ours}/bias", "flat", part=(index, 3)),
    )


_ROWS = (
    Row("transformer.wte.weight", "embed/embedding"),
    Row("transformer.wpe.weight", "position_embed/embedding"),
    *norm(f"{_LAYER}.ln_1", "layers/attention_norm"),
    *_packed(0, "layers/attention/query"),
    *_packed(1, "layers/attention/key"),
    *_packed(2, "layers/attention/value"),
    *dense(f"{_LAYER}.attn.c_proj", "layers/attention/out", inputs=2, form="in_out"),
    *norm(f"{_LAYER}.ln_2", "layers/mlp_norm"),
    *dense(f"{_LAYER}.mlp.c_fc", "layers/mlp/up", form="in_out"),
    *dense(f"{_LAYER}.mlp.c_proj", "layers/mlp/down", form="in_out"),
    *norm("transformer.ln_f", "final_norm"),
    Row(_HEAD, "head/kernel", "out_in"),
)


def _read(c: Mapping[str, Any], names: Names) -> ModelConfig:
    only(c, "scale_attn_by_inverse_layer_idx", False, False)
    only(c, "add_cross_attention", False, False)
    return ModelConfig(
        vocab_size=integer(c, "vocab_size"),
        d_model=integer(c, "n_embd"),
        n_layers=integer(c, "n_layer"),
        n_heads=integer(c, "n_head"),
        d_ff=integer(c, "n_inner", 4 * integer(c, "n_embd")),
        max_len=integer(c, "n_positions"),
        activation=activation(c, "activation_function", "gelu_new"),
        norm_epsilon=number(c, "layer_norm_epsilon", 1e-5),
        scale_attention=truth(c, "scale_attn_weights", True),
        tie_embeddings=_HEAD not in names and truth(c, "tie_word_embeddings", True),
        init_std=number(c, "initializer_range", 0.02),
        embedding_dropout=number(c, "embd_pdrop", 0.1),
        residual_dropout=number(c, "resid_pdrop", 0.1),
        attention_dropout=number(c, "attn_pdrop", 0.1),
    )


def _write(model: ModelConfig, kind: str) -> dict[str, Any]:
    m = model
    return {
        "model_type": kind,
        "vocab_size": m.vocab_size,
        "n_embd": m.d_model,
        "n_layer": m.n_layers,
        "n_head": m.n_heads,
        "n_inner": m.width_of_mlp,
        "n_positions": m.max_len,
        "n_ctx": m.max_len,
        "activation_function": their_activation(m.activation),
        "layer_norm_epsilon": m.norm_epsilon,
        "scale_attn_weights": m.scale_attention,
        "tie_word_embeddings": m.tie_embeddings,
        "initializer_range": m.init_std,
        "embd_pdrop": m.embedding_dropout,
        "resid_pdrop": m.residual_dropout,
        "attn_pdrop": m.attention_dropout,
    }


GPT2 = Family(
    name="GPT-2",
    kinds=("gpt2",),
    architectures=("GPT2LMHeadModel", "GPT2Model"),
    prefix="transformer.",
    rows=lambda architecture: _ROWS,
    table="transformer.wte.weight",
    head=_HEAD,
    known=(r"transformer\.h\.\d+\.attn\.(masked_)?bias",),  # the causal mask, and what it masks with
    read=_read,
    write=_write,
    architecture=lambda config, names: "GPT2LMHeadModel",
    choose=lambda kind, model, task: "GPT2LMHeadModel",
    tied=True,
)
