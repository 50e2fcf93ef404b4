"""T5, 1.0 and 1.1: its matrices are `[out, in]`, its relative positions those of the first layer for all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lm.hf.fields import ACTIVATIONS, GATED, integer, number, refuse, their_activation, truth
from lm.hf.tables import Family, Names, Row, dense, norm
from lm.models.config import ModelConfig

_HEAD = "lm_head.weight"
_BIAS = "{}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"


def _attention(theirs: str, ours: str) -> tuple[Row, ...]:
    return (
        *dense(f"{theirs}.q", f"{ours}/query"),
        *dense(f"{theirs}.k", f"{ours}/key"),
        *dense(f"{theirs}.v", f"{ours}/value"),
        *dense(f"{theirs}.o", f"{ours}/out", inputs=2),
    )


def _feed_forward(theirs: str, ours: str) -> tuple[Row, ...]:
    """Of both kinds: `wi` alone, or `wi_0` through the activation times `wi_1`."""
    gate = f"{ours}/gate/kernel"
    return (
        Row(f"{theirs}.wi.weight", f"{ours}/up/kernel", "out_in", without=gate),
        Row(f"{theirs}.wi_0.weight", gate, "out_in"),
        Row(f"{theirs}.wi_1.weight", f"{ours}/up/kernel", "out_in", beside=gate),
        *dense(f"{theirs}.wo", f"{ours}/down"),
    )


def _stack(theirs: str, ours: str, last: int) -> tuple[Row, ...]:
    layer = f"{theirs}.block.{{}}.layer"
    return (
        *norm(f"{layer}.0.layer_norm", f"{ours}/attention_norm"),
        *_attention(f"{layer}.0.SelfAttention", f"{ours}/attention"),
        *norm(f"{layer}.{last}.layer_norm", f"{ours}/mlp_norm"),
        *_feed_forward(f"{layer}.{last}.DenseReluDense", f"{ours}/mlp"),
    )


_ROWS = (
    Row("shared.weight", "embed/embedding"),
    Row(_BIAS.format("encoder"), "encoder_relative_bias/embedding"),
    Row(_BIAS.format("decoder"), "relative_bias/embedding"),
    *_stack("encoder", "encoder_layers", 1),
    *_stack("decoder", "layers", 2),
    *norm("decoder.block.{}.layer.1.layer_norm", "layers/cross_norm"),
    *_attention("decoder.block.{}.layer.1.EncDecAttention", "layers/cross_attention"),
    *norm("encoder.final_layer_norm", "encoder_norm"),
    *norm("decoder.final_layer_norm", "final_norm"),
    Row(_HEAD, "head/kernel", "out_in"),
)


def _activation(c: Mapping[str, Any]) -> Any:
    """`relu`, or `gated-gelu`, which means the approximation by tanh; `gelu` alone is exact."""
    value = c.get("feed_forward_proj", "relu")
    gate, _, name = str(value).rpartition("-")
    ours = ACTIVATIONS.get("gelu_new" if value == "gated-gelu" else name)
    if ours is None or gate not in ("", "gated") or (gate and ours not in GATED):
        raise refuse("feed_forward_proj", value, "relu, gated-gelu, gated-silu and other activations by name")
    return GATED[ours] if gate else ours


def _their_activation(ours: str) -> str:
    alone = {both: alone for alone, both in GATED.items()}.get(ours)
    if alone is None:
        return their_activation(ours)
    return "gated-gelu" if alone == "gelu_tanh" else f"gated-{their_activation(alone)}"


def _read(c: Mapping[str, Any], names: Names) -> ModelConfig:
    dropout = number(c, "dropout_rate", 0.1)
    encoder_layers = integer(c, "num_layers")
    # Files of 1.1 say that the head isn't tied, and of transformers 5, which ties all heads, that nothing is scaled.
    scaled = truth(c, "scale_decoder_outputs", truth(c, "tie_word_embeddings", True))
    return ModelConfig(
        vocab_size=integer(c, "vocab_size"),
        d_model=integer(c, "d_model"),
        n_layers=integer(c, "num_decoder_layers", encoder_layers),
        encoder_layers=encoder_layers,
        n_heads=integer(c, "num_heads"),
        head_dim=integer(c, "d_kv", 64),
        d_ff=integer(c, "d_ff"),
        max_len=integer(c, "n_positions", 512),
        positions="relative",
        relative_buckets=integer(c, "relative_attention_num_buckets", 32),
        relative_distance=integer(c, "relative_attention_max_distance", 128),
        norm="rmsnorm",
        norm_epsilon=number(c, "layer_norm_epsilon", 1e-6),
        activation=_activation(c),
        use_bias=False,
        scale_attention=False,
        scale_logits=scaled,
        tie_embeddings=_HEAD not in names,
        scale_residual_init=False,
        embedding_dropout=dropout,
        residual_dropout=dropout,
        attention_dropout=dropout,
    )


def _write(model: ModelConfig, kind: str) -> dict[str, Any]:
    m = model
    return {
        "model_type": kind,
        "is_encoder_decoder": True,
        "vocab_size": m.vocab_size,
        "d_model": m.d_model,
        "num_layers": m.encoder_layers,
        "num_decoder_layers": m.n_layers,
        "num_heads": m.n_heads,
        "d_kv": m.width_of_head,
        "d_ff": m.width_of_mlp,
        "n_positions": m.max_len,
        "relative_attention_num_buckets": m.relative_buckets,
        "relative_attention_max_distance": m.relative_distance,
        "layer_norm_epsilon": m.norm_epsilon,
        "feed_forward_proj": _their_activation(m.activation),
        "tie_word_embeddings": m.tie_embeddings,
        "scale_decoder_outputs": m.scale_logits,
        "dropout_rate": m.residual_dropout,
    }


T5 = Family(
    name="T5",
    kinds=("t5",),
    architectures=("T5ForConditionalGeneration", "T5Model", "T5WithLMHeadModel"),
    prefix="",
    rows=lambda architecture: _ROWS,
    table="shared.weight",
    head=_HEAD,
    known=(
        r"(encoder|decoder)\.embed_tokens\.weight",  # copies of the table
        r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",  # which nothing reads
    ),
    read=_read,
    write=_write,
    architecture=lambda config, names: "T5ForConditionalGeneration",
    choose=lambda kind, model, task: "T5ForConditionalGeneration",
    copies=("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"),
    tied=True,
)
