"""GPT-2: its matrices are `[in, out]`, queries, keys and values side by side in one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lm.hf.fields import activation, classes, integer, number, only, their_activation, told_classes, truth
from lm.hf.tables import Family, Names, Row, dense, norm
from lm.models.config import ModelConfig

_HEAD, _SCORE, _LAYER = "lm_head.weight", "score.weight", "transformer.h.{}"
_CLASSIFIER = "GPT2ForSequenceClassification"


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
)


def _rows(architecture: str) -> Sequence[Row]:
    """With the one head that an architecture has."""
    classifies = architecture == _CLASSIFIER
    return (*_ROWS, Row(_SCORE, "classifier/kernel", "out_in") if classifies else Row(_HEAD, "head/kernel", "out_in"))


def _architecture(c: Mapping[str, Any], names: Names) -> str:
    return _CLASSIFIER if _SCORE in names or _CLASSIFIER in (c.get("architectures") or []) else "GPT2LMHeadModel"


def _read(c: Mapping[str, Any], names: Names) -> ModelConfig:
    only(c, "scale_attn_by_inverse_layer_idx", False, False)
    only(c, "add_cross_attention", False, False)
    classifies = _architecture(c, names) == _CLASSIFIER
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
        tie_embeddings=classifies or (_HEAD not in names and truth(c, "tie_word_embeddings", True)),
        n_classes=classes(c) if classifies else 0,
        classifier_bias=False,
        pooling="last",
        init_std=number(c, "initializer_range", 0.02),
        embedding_dropout=number(c, "embd_pdrop", 0.1),
        residual_dropout=number(c, "resid_pdrop", 0.1),
        attention_dropout=number(c, "attn_pdrop", 0.1),
    )


def _write(model: ModelConfig, kind: str) -> dict[str, Any]:
    m = model
    config = {
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
    return config | (told_classes([f"LABEL_{i}" for i in range(m.n_classes)]) if m.n_classes else {})


def _choose(kind: str, model: ModelConfig, task: str) -> str:
    return _CLASSIFIER if model.n_classes and task == "classification" else "GPT2LMHeadModel"


GPT2 = Family(
    name="GPT-2",
    kinds=("gpt2",),
    architectures=("GPT2LMHeadModel", "GPT2Model", _CLASSIFIER),
    prefix="transformer.",
    rows=_rows,
    table="transformer.wte.weight",
    head=_HEAD,
    known=(r"transformer\.h\.\d+\.attn\.(masked_)?bias",),  # the causal mask, and what it masks with
    read=_read,
    write=_write,
    architecture=_architecture,
    choose=_choose,
    tied=True,
)
