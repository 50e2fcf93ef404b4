"""The families, and which of them a config.json or a model of ours belongs to."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lm.errors import UserError, check
from lm.hf.families.bert import BERT
from lm.hf.families.gpt2 import GPT2
from lm.hf.families.llama import LLAMA
from lm.hf.families.t5 import T5
from lm.hf.tables import Family
from lm.models.config import ModelConfig

FAMILIES = (GPT2, LLAMA, BERT, T5)

# Settings that say how a model is computed, made at first or trained, not what it computes.
_FREE = {
    "attention",
    "compute_dtype",
    "param_dtype",
    "remat",
    "unroll",
    "vocab_multiple",
    "init_std",
    "scale_residual_init",
    "embedding_dropout",
    "residual_dropout",
    "attention_dropout",
    "classifier_dropout",
}
# Settings that say nothing unless another has one of these values.
_ONLY_WITH = {
    "rope_theta": ("positions", ("rope",)),
    "rope_scaling": ("positions", ("rope",)),
    "rope_factor": ("rope_scaling", ("linear", "llama3")),
    "rope_low_frequency": ("rope_scaling", ("llama3",)),
    "rope_high_frequency": ("rope_scaling", ("llama3",)),
    "rope_original_len": ("rope_scaling", ("llama3",)),
    "relative_buckets": ("positions", ("relative",)),
    "relative_distance": ("positions", ("relative",)),
    "max_len": ("positions", ("learned",)),
    "qkv_bias": ("use_bias", (False,)),
}


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a config.json. Raises `UserError` for one that is not known, naming those that are."""
    kind, wanted = config.get("model_type"), config.get("architectures") or []
    kinds = ", ".join(kind for family in FAMILIES for kind in family.kinds)
    found = next((family for family in FAMILIES if kind in family.kinds), None)
    if found is None:
        raise UserError(f"config.json has model_type {kind!r}; supported are {kinds}")
    check(
        isinstance(wanted, list) and all(name in found.architectures for name in wanted),
        f"config.json has architectures {wanted!r}; supported of {kind} are {', '.join(found.architectures)}",
    )
    check(
        config.get("quantization_config") is None,
        "config.json has a quantization_config; import the weights as they were before they were quantised",
    )
    return found


def expressed(model: ModelConfig, task: str, preferred: str | None = None) -> tuple[Family, str, dict[str, Any]]:
    """How the families' models call a model.

    Args:
      model: the model, its vocabulary settled.
      task: the kind of the objective it was trained for, which tells heads apart.
      preferred: the `model_type` to take where several serve, such as that of an imported model.

    Returns:
      The family, one of its architectures, and a config.json. Of a classifier, an output head of its own has no place.

    Raises:
      UserError: no family can express it; the setting that is in the way is named.
    """
    if task == "classification" and model.n_classes:
        model = dataclasses.replace(model, tie_embeddings=True)  # classifiers there have no output head
    best: list[tuple[str, Any, Any]] = []
    nearest = ""
    kinds = [(family, kind) for family in FAMILIES for kind in family.kinds]
    for family, kind in sorted(kinds, key=lambda pair: pair[1] != preferred):
        architecture = family.choose(kind, model, task)
        config = family.write(model, kind) | {"architectures": [architecture]}
        names = {row.theirs for row in family.rows(architecture) if _has(model, row.ours)}
        try:
            differences = _differences(model, family.read(config, names))
        except UserError as error:
            differences = [("", "", str(error))]
            if best:
                continue
        if not differences:
            return family, architecture, config
        if not best or len(differences) < len(best):
            best, nearest = differences, kind
    name, _, other = best[0]
    told = ", ".join(f"model.{name} is {value!r} and there {other!r}" for name, value, other in best[:3] if name)
    raise UserError(
        f"no supported model of transformers is like this one; the nearest is {nearest}:"
        f" {told or f'{name}{other}'}; train a model with its settings to export it"
    )


def _has(model: ModelConfig, path: str) -> bool:
    """Whether a model has a head that this path is of; of all other parameters it says True."""
    part = path.split("/")[0]
    heads = {
        "head": not model.tie_embeddings,
        "head_bias": model.head_bias,
        "head_transform": model.head_transform,
        "pooler": model.pooler,
        "classifier": model.n_classes > 0,
        "span_head": model.span_head,
        "type_embed": model.token_types > 0,
    }
    return heads.get(part, True)


def _differences(model: ModelConfig, other: ModelConfig) -> list[tuple[str, Any, Any]]:
    """The settings in which two models differ that say what is computed: `(name, of the first, of the second)`."""
    mine, theirs = _meant(model), _meant(other)
    return [(name, mine[name], theirs[name]) for name in mine if mine[name] != theirs[name]]


def _meant(model: ModelConfig) -> dict[str, Any]:
    """Every setting that counts, None spelled out."""
    values = dataclasses.asdict(model)
    for name, (other, allowed) in _ONLY_WITH.items():
        if values[other] not in allowed:
            values[name] = None
    if not (model.n_classes or model.pooler):
        values["pooling"] = None
    if not model.n_classes:
        values["classifier_bias"] = None
    values |= {"n_kv_heads": model.kv_heads, "head_dim": model.width_of_head, "d_ff": model.width_of_mlp}
    return {name: value for name, value in values.items() if name not in _FREE}
