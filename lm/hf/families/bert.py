"""BERT with the heads that its files hold: hidden words, next sentences, classes, spans; matrices are `[out, in]`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lm.hf.fields import activation, classes, integer, number, only, their_activation, told_classes
from lm.hf.source import POOLING
from lm.hf.tables import Family, Names, Row, dense, norm
from lm.models.config import ModelConfig

_LAYER = "bert.encoder.layer.{}"
_PAIRS = ("BertForPreTraining", "BertForNextSentencePrediction")
# What heads an architecture has, whatever else is in its files.
_HEADS = {
    "BertModel": (),
    "BertForMaskedLM": ("words",),
    "BertForPreTraining": ("words", "pooler", "pairs"),
    "BertForNextSentencePrediction": ("pooler", "pairs"),
    "BertForSequenceClassification": ("pooler", "classes"),
    "BertForQuestionAnswering": ("spans",),
}
# By what name each shows in files.
_SIGNS = {
    "words": "cls.predictions.transform.dense.weight",
    "pooler": "bert.pooler.dense.weight",
    "pairs": "cls.seq_relationship.weight",
    "classes": "classifier.weight",
    "spans": "qa_outputs.weight",
}


def _rows(architecture: str) -> Sequence[Row]:
    return (
        Row("bert.embeddings.word_embeddings.weight", "embed/embedding"),
        Row("bert.embeddings.position_embeddings.weight", "position_embed/embedding"),
        Row("bert.embeddings.token_type_embeddings.weight", "type_embed/embedding"),
        *norm("bert.embeddings.LayerNorm", "embedding_norm"),
        *dense(f"{_LAYER}.attention.self.query", "layers/attention/query"),
        *dense(f"{_LAYER}.attention.self.key", "layers/attention/key"),
        *dense(f"{_LAYER}.attention.self.value", "layers/attention/value"),
        *dense(f"{_LAYER}.attention.output.dense", "layers/attention/out", inputs=2),
        *norm(f"{_LAYER}.attention.output.LayerNorm", "layers/attention_norm"),
        *dense(f"{_LAYER}.intermediate.dense", "layers/mlp/up"),
        *dense(f"{_LAYER}.output.dense", "layers/mlp/down"),
        *norm(f"{_LAYER}.output.LayerNorm", "layers/mlp_norm"),
        *dense("bert.pooler.dense", "pooler"),
        *dense("cls.predictions.transform.dense", "head_transform/dense"),
        *norm("cls.predictions.transform.LayerNorm", "head_transform/norm"),
        Row("cls.predictions.bias", "head_bias/bias"),
        *dense("cls.seq_relationship" if architecture in _PAIRS else "classifier", "classifier"),
        *dense("qa_outputs", "span_head"),
    )


def _heads(c: Mapping[str, Any], names: Names) -> set[str]:
    """The heads that are there, and those that should be."""
    there = {head for head, name in _SIGNS.items() if name in names}
    for architecture in c.get("architectures") or []:
        there |= set(_HEADS[architecture])
    if "classes" in there:
        there.discard("pairs")  # one classifier, and the later
    return there


def _architecture(c: Mapping[str, Any], names: Names) -> str:
    there = _heads(c, names)
    if "classes" in there:
        return "BertForSequenceClassification"
    if "pairs" in there:
        return "BertForPreTraining" if "words" in there else "BertForNextSentencePrediction"
    if "spans" in there:
        return "BertForQuestionAnswering"
    return "BertForMaskedLM" if "words" in there else "BertModel"


def _read(c: Mapping[str, Any], names: Names) -> ModelConfig:
    only(c, "position_embedding_type", "absolute", "absolute")
    for name in ("is_decoder", "add_cross_attention"):
        only(c, name, False, False)
    only(c, "tie_word_embeddings", True, True)
    there = _heads(c, names)
    n_classes = classes(c) if "classes" in there else 2 * ("pairs" in there)
    mean = c.get(POOLING) == "mean" and not n_classes
    hidden = number(c, "hidden_dropout_prob", 0.1)
    return ModelConfig(
        vocab_size=integer(c, "vocab_size"),
        d_model=integer(c, "hidden_size"),
        n_layers=integer(c, "num_hidden_layers"),
        n_heads=integer(c, "num_attention_heads"),
        d_ff=integer(c, "intermediate_size"),
        max_len=integer(c, "max_position_embeddings", 512),
        mask="bidirectional",
        token_types=integer(c, "type_vocab_size", 2),
        embedding_norm=True,
        norm_place="post",
        norm_epsilon=number(c, "layer_norm_eps", 1e-12),
        activation=activation(c, "hidden_act", "gelu"),
        head_transform="words" in there,
        head_bias="words" in there,
        pooler="pooler" in there and not mean,
        pooling="mean" if mean else "first",
        n_classes=n_classes,
        span_head="spans" in there,
        init_std=number(c, "initializer_range", 0.02),
        scale_residual_init=False,
        embedding_dropout=hidden,
        residual_dropout=hidden,
        attention_dropout=number(c, "attention_probs_dropout_prob", 0.1),
        classifier_dropout=number(c, "classifier_dropout", hidden),
    )


def _choose(kind: str, model: ModelConfig, task: str) -> str:
    if model.n_classes:
        # The names of classifiers differ: of what follows what, and of anything else.
        of_pairs = model.n_classes == 2 and task in ("bert", "masked_lm")
        return _PAIRS[0 if model.head_transform else 1] if of_pairs else "BertForSequenceClassification"
    if model.span_head:
        return "BertForQuestionAnswering"
    return "BertForMaskedLM" if model.head_transform else "BertModel"


def _write(model: ModelConfig, kind: str) -> dict[str, Any]:
    m = model
    config: dict[str, Any] = {
        "model_type": kind,
        "vocab_size": m.vocab_size,
        "hidden_size": m.d_model,
        "num_hidden_layers": m.n_layers,
        "num_attention_heads": m.n_heads,
        "intermediate_size": m.width_of_mlp,
        "max_position_embeddings": m.max_len,
        "type_vocab_size": m.token_types,
        "layer_norm_eps": m.norm_epsilon,
        "hidden_act": their_activation(m.activation),
        "tie_word_embeddings": True,
        "initializer_range": m.init_std,
        "hidden_dropout_prob": m.residual_dropout,
        "attention_probs_dropout_prob": m.attention_dropout,
        "classifier_dropout": m.classifier_dropout,
    }
    if m.n_classes:
        config |= told_classes([f"LABEL_{i}" for i in range(m.n_classes)])
    if m.pooling != "first":
        config[POOLING] = m.pooling
    return config


BERT = Family(
    name="BERT",
    kinds=("bert",),
    architectures=tuple(_HEADS),
    prefix="bert.",
    rows=_rows,
    table="bert.embeddings.word_embeddings.weight",
    head="cls.predictions.decoder.weight",
    known=(
        r"bert\.embeddings\.(position_ids|token_type_ids)",
        r"cls\.predictions\.decoder\.(weight|bias)",  # copies of the table and of cls.predictions.bias
        r"bert\.pooler\.dense\.(weight|bias)",  # of a model that takes the mean instead
    ),
    read=_read,
    write=_write,
    architecture=_architecture,
    choose=_choose,
    renamed=((r"\.gamma$", ".weight"), (r"\.beta$", ".bias")),  # as the first conversions from TensorFlow had it
    tied=True,
)
