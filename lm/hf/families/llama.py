"""LLaMA and its like: Mistral adds a window, Qwen2 biases on queries, keys and values, Qwen3 norms on the first two.

Matrices are `[out, in]`; features of a head turn with those half a head further on, as ours do, so nothing is permuted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lm.errors import check
from lm.hf.fields import (
    activation,
    classes,
    integer,
    number,
    only,
    optional,
    refuse,
    their_activation,
    told_classes,
    truth,
)
from lm.hf.tables import Family, Names, Row, dense, norm
from lm.models.config import ModelConfig

_HEAD, _SCORE, _LAYER = "lm_head.weight", "score.weight", "model.layers.{}"
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_CLASSIFIERS = {kind: name.replace("CausalLM", "SequenceClassification") for kind, name in _ARCHITECTURES.items()}

_ROWS = (
    Row("model.embed_tokens.weight", "embed/embedding"),
    *norm(f"{_LAYER}.input_layernorm", "layers/attention_norm"),
    *dense(f"{_LAYER}.self_attn.q_proj", "layers/attention/query"),
    *dense(f"{_LAYER}.self_attn.k_proj", "layers/attention/key"),
    *dense(f"{_LAYER}.self_attn.v_proj", "layers/attention/value"),
    *norm(f"{_LAYER}.self_attn.q_norm", "layers/attention/query_norm"),
    *norm(f"{_LAYER}.self_attn.k_norm", "layers/attention/key_norm"),
    *dense(f"{_LAYER}.self_attn.o_proj", "layers/attention/out", inputs=2),
    *norm(f"{_LAYER}.post_attention_layernorm", "layers/mlp_norm"),
    *dense(f"{_LAYER}.mlp.gate_proj", "layers/mlp/gate"),
    *dense(f"{_LAYER}.mlp.up_proj", "layers/mlp/up"),
    *dense(f"{_LAYER}.mlp.down_proj", "layers/mlp/down"),
    *norm("model.norm", "final_norm"),
)


def _rows(architecture: str) -> Sequence[Row]:
    """With the one head that an architecture has."""
    classifies = architecture in _CLASSIFIERS.values()
    return (*_ROWS, Row(_SCORE, "classifier/kernel", "out_in") if classifies else Row(_HEAD, "head/kernel", "out_in"))


def _architecture(c: Mapping[str, Any], names: Names) -> str:
    kind = c["model_type"]
    classifies = _SCORE in names or _CLASSIFIERS[kind] in (c.get("architectures") or [])
    return (_CLASSIFIERS if classifies else _ARCHITECTURES)[kind]


def _rope(c: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings, as transformers 5 writes them (`rope_parameters`) or earlier ones did."""
    found = {**(c.get("rope_scaling") or {}), **(c.get("rope_parameters") or {})}
    found.setdefault("rope_theta", c.get("rope_theta"))
    only({**c, **found}, "partial_rotary_factor", 1.0, 1.0)
    ours: dict[str, Any] = {"rope_theta": number(found, "rope_theta", 10_000.0)}
    kind = found.get("rope_type", found.get("type", "default"))
    if kind == "default":
        return ours
    if kind not in ("linear", "llama3"):
        raise refuse("rope_type", kind, "default, linear, llama3")
    ours |= {"rope_scaling": kind, "rope_factor": number(found, "factor", 1.0)}
    if kind == "llama3":
        length = integer(found, "original_max_position_embeddings", c.get("max_position_embeddings"))
        ours |= {
            "rope_low_frequency": number(found, "low_freq_factor", 1.0),
            "rope_high_frequency": number(found, "high_freq_factor", 4.0),
            "rope_original_len": length,
        }
    return ours


def _window(c: Mapping[str, Any], n_layers: int) -> int | None:
    """The sliding window, which all layers have or none."""
    if c["model_type"] == "llama":
        return None
    if c["model_type"] == "mistral":
        return optional(c, "sliding_window") if "sliding_window" in c else 4096
    if not truth(c, "use_sliding_window", False):
        return None
    first = c.get("max_window_layers", 28)
    kinds = c.get("layer_types") or ["full_attention" if i < first else "sliding_attention" for i in range(n_layers)]
    check(
        len(set(kinds)) == 1,
        "config.json has a sliding window (use_sliding_window) in some layers and not in others; this program has it in"
        " all or none",
    )
    return optional(c, "sliding_window") if kinds[0] == "sliding_attention" else None


def _read(c: Mapping[str, Any], names: Names) -> ModelConfig:
    kind, n_layers, n_heads = c["model_type"], integer(c, "num_hidden_layers"), integer(c, "num_attention_heads")
    biases = truth(c, "attention_bias", False)
    classifies = _architecture(c, names) == _CLASSIFIERS[kind]
    if kind == "llama":
        check(
            biases == truth(c, "mlp_bias", False),
            f"config.json has attention_bias {biases} and mlp_bias {not biases}; this program has both or neither",
        )
    else:
        only(c, "attention_bias", False, False)
    return ModelConfig(
        vocab_size=integer(c, "vocab_size"),
        d_model=integer(c, "hidden_size"),
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=integer(c, "num_key_value_heads", 8 if kind == "mistral" else n_heads),
        head_dim=integer(c, "head_dim", 128 if kind == "qwen3" else integer(c, "hidden_size") // n_heads),
        d_ff=integer(c, "intermediate_size"),
        max_len=integer(c, "max_position_embeddings", 2048),
        positions="rope",
        norm="rmsnorm",
        norm_epsilon=number(c, "rms_norm_eps", 1e-6),
        activation=activation(c, "hidden_act", "silu", gated=True),
        use_bias=biases,
        qkv_bias=kind == "qwen2",
        qk_norm=kind == "qwen3",
        window=_window(c, n_layers),
        tie_embeddings=classifies or (_HEAD not in names and truth(c, "tie_word_embeddings", False)),
        n_classes=classes(c) if classifies else 0,
        classifier_bias=False,
        pooling="last",
        init_std=number(c, "initializer_range", 0.02),
        scale_residual_init=False,
        attention_dropout=number(c, "attention_dropout", 0.0),
        **_rope(c),
    )


def _write(model: ModelConfig, kind: str) -> dict[str, Any]:
    m = model
    config: dict[str, Any] = {
        "model_type": kind,
        "vocab_size": m.vocab_size,
        "hidden_size": m.d_model,
        "num_hidden_layers": m.n_layers,
        "num_attention_heads": m.n_heads,
        "num_key_value_heads": m.kv_heads,
        "head_dim": m.width_of_head,
        "intermediate_size": m.width_of_mlp,
        "max_position_embeddings": m.max_len,
        "rms_norm_eps": m.norm_epsilon,
        "hidden_act": their_activation(m.activation, gated=True),
        "rope_theta": m.rope_theta,
        "rope_scaling": None,
        "tie_word_embeddings": m.tie_embeddings,
        "initializer_range": m.init_std,
        "attention_dropout": m.attention_dropout,
    }
    if m.rope_scaling != "none":
        config["rope_scaling"] = {"rope_type": m.rope_scaling, "factor": m.rope_factor}
    if m.rope_scaling == "llama3":
        config["rope_scaling"] |= {
            "low_freq_factor": m.rope_low_frequency,
            "high_freq_factor": m.rope_high_frequency,
            "original_max_position_embeddings": m.rope_original_len,
        }
    if kind == "llama":
        config |= {"attention_bias": m.use_bias, "mlp_bias": m.use_bias}
    if kind == "mistral":
        config |= {"sliding_window": m.window}
    if kind in ("qwen2", "qwen3"):
        windowed = m.window is not None
        config |= {
            "use_sliding_window": windowed,
            "sliding_window": m.window,
            "max_window_layers": 0 if windowed else m.n_layers,
        }
    if m.n_classes:
        config |= told_classes([f"LABEL_{i}" for i in range(m.n_classes)])
    return config


def _choose(kind: str, model: ModelConfig, task: str) -> str:
    return (_CLASSIFIERS if model.n_classes and task == "classification" else _ARCHITECTURES)[kind]


LLAMA = Family(
    name="LLaMA",
    kinds=tuple(_ARCHITECTURES),
    architectures=(*_ARCHITECTURES.values(), *_CLASSIFIERS.values()),
    prefix="model.",
    rows=_rows,
    table="model.embed_tokens.weight",
    head=_HEAD,
    known=(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",),  # follows from the settings
    read=_read,
    write=_write,
    architecture=_architecture,
    choose=_choose,
)
