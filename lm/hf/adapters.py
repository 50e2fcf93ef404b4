"""What was trained beside a frozen model, written: LoRA in PEFT's file format, the rest in one of our own.

PEFT's names are those of the modules that a family's table has (`lm.hf.families`): `….q_proj.lora_A.weight` `[r, in]`
and `….q_proj.lora_B.weight` `[out, r]` for each layer. Where a module of theirs holds several projections of ours side
by side, as GPT-2's `c_attn` does, their terms become one, of the sum of their ranks and with B in blocks; alpha grows
with the rank, so that alpha / rank stays.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lm.errors import check
from lm.hf.export import write_json, write_safetensors
from lm.hf.tables import Family, Row
from lm.models.config import ModelConfig

PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OWN_CONFIG, OWN_WEIGHTS = "adapter.json", "adapter.safetensors"
OWN_FORMAT = "lm adapter 1"
OWN_SETTINGS = ("lora", "adapter_dim", "prompt_len", "n_classes", "pooling", "pooler", "span_head")
"""The settings of a model that an adapter of our own format brings along."""

PREFIX = "base_model.model."
A_NAME, B_NAME = ".lora_A.weight", ".lora_B.weight"
_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForQuestionAnswering": "QUESTION_ANS",
}
# Models without heads, whose modules lack the family's prefix.
_BARE = ("BertModel", "GPT2Model")
# Heads that PEFT takes for trained whenever its task is theirs.
_HEADS = ("classifier", "span_head")


@dataclass(frozen=True)
class Module:
    """A module of theirs, and the projections of ours in it."""

    name: str
    """With `{}` for the layer."""
    rows: tuple[Row, ...]
    """Their kernels, in order of the parts."""

    @property
    def count(self) -> int:
        """How many parts it has; not all of them need be projections."""
        return self.rows[0].part[1]


def peft_adapter(
    family: Family,
    architecture: str,
    config: ModelConfig,
    leaves: Mapping[str, Any],
    trained: Collection[str],
    *,
    dtype: Any,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The low-rank terms of a model as PEFT has them, and the heads beside them.

    Args:
      family: whose names.
      architecture: one of the family's.
      config: the model's, with its `lora`.
      leaves: its parameters by path.
      trained: the paths of those that were trained.
      dtype: of the weights.

    Returns:
      What `adapter_config.json` says, and the weights by name.

    Raises:
      UserError: something was trained that PEFT's files have no place for.
    """
    rank, modules = config.lora.rank, modules_of(family, architecture, config)
    targeted: dict[str, int] = {}  # terms in a module, by its name
    weights: dict[str, np.ndarray] = {}
    for module in modules:
        rows = [row for row in module.rows if f"{stem(row)}/lora_a/kernel" in leaves]
        if rows:
            targeted[module.name] = len(rows)
            weights |= _terms(module, rows, leaves, rank)
    saved = _saved(family, architecture, config, leaves, trained, targeted)
    for row in saved:
        for layer, name in enumerate(row.names(leaves[row.ours].shape)):
            weights[name] = row.to_theirs(_read(leaves[row.ours], layer if row.stacked else None))

    def named(name: str) -> str:
        """A name as the model has it, whose own lack the family's prefix where it has no heads."""
        return name.removeprefix(family.prefix) if architecture in _BARE else name

    layers = {module.name: range(leaves[module.rows[0].ours].shape[0]) for module in modules}
    everything = {module_of(row) for row in family.rows(architecture)} | {family.head.rpartition(".")[0]}
    ends = {name: _suffixes(name, targeted, everything, layers[name]) for name in targeted}
    least = min(targeted.values())
    more = {re.escape(named(end)): count for name, count in targeted.items() for end in ends[name] if count > least}
    whole = {module_of(row).format(i) for row in saved for i in range(leaves[row.ours].shape[0] if row.stacked else 1)}
    told = {
        "peft_type": "LORA",
        "task_type": next((task for end, task in _TASKS.items() if architecture.endswith(end)), None),
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank * least,
        "lora_alpha": _plain(config.lora.alpha * least),
        "lora_dropout": config.lora.dropout,
        "bias": "none",
        "fan_in_fan_out": modules[0].rows[0].form == "in_out",
        "target_modules": sorted({named(end) for found in ends.values() for end in found}),
        "rank_pattern": {key: rank * count for key, count in more.items()},
        "alpha_pattern": {key: _plain(config.lora.alpha * count) for key, count in more.items()},
        "modules_to_save": sorted(map(named, whole)) or None,
    }
    return told, {PREFIX + named(name): np.ascontiguousarray(weight.astype(dtype)) for name, weight in weights.items()}


def own_adapter(
    config: ModelConfig, leaves: Mapping[str, Any], trained: Collection[str], *, dtype: Any
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What was trained in our own format: the settings that differ from the base, and the parameters by path."""
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name in OWN_SETTINGS}
    weights = {path: _read(leaf, None).astype(dtype) for path, leaf in leaves.items() if path in trained}
    return {"format": OWN_FORMAT, "model": settings}, weights


def write_adapter(folder: Path, told: dict[str, Any], weights: dict[str, np.ndarray], *, own: bool) -> list[str]:
    """Writes an adapter's two files; returns their names."""
    names = [OWN_CONFIG, OWN_WEIGHTS] if own else [PEFT_CONFIG, PEFT_WEIGHTS]
    write_json(folder / names[0], told)
    write_safetensors(folder / names[1], weights)
    return names


def modules_of(family: Family, architecture: str, config: ModelConfig) -> list[Module]:
    """The modules that may have terms, in the order of the table."""
    projections = {f"{path}/kernel" for path in config.projections}
    found: dict[str, list[Row]] = {}
    for row in family.rows(architecture):
        if row.ours in projections:
            found.setdefault(module_of(row), []).append(row)
    return [Module(name, tuple(sorted(rows, key=lambda row: row.part))) for name, rows in found.items()]


def _terms(module: Module, rows: Sequence[Row], leaves: Mapping[str, Any], rank: int) -> dict[str, np.ndarray]:
    """The weights of a module's terms in every layer."""
    made = {}
    for layer in range(leaves[rows[0].ours].shape[0]):
        blocks = []
        for row in rows:
            a, b = (_read(leaves[f"{stem(row)}/{name}/kernel"], layer) for name in ("lora_a", "lora_b"))
            blocks.append((row.part[0], a.reshape(-1, rank).T, b.reshape(rank, -1).T))
        size = blocks[0][2].shape[0]
        whole = np.zeros((size * module.count, rank * len(rows)), np.float32)
        for i, (part, _, b) in enumerate(blocks):
            whole[part * size : (part + 1) * size, i * rank : (i + 1) * rank] = b
        name = module.name.format(layer)
        made[name + A_NAME] = np.concatenate([a for _, a, _ in blocks])
        made[name + B_NAME] = whole
    return made


def _saved(
    family: Family,
    architecture: str,
    config: ModelConfig,
    leaves: Mapping[str, Any],
    trained: Collection[str],
    targeted: Collection[str],
) -> list[Row]:
    """The rows of modules that go whole beside the terms: those of which something was trained, and heads."""
    plain = [path for path in leaves if "/lora_" not in path]
    rows = family.rows_of(architecture, plain)
    names = {module_of(row) for row in rows}
    wanted = {module_of(row): row for row in rows if row.ours in trained or row.ours.split("/")[0] in _HEADS}
    for name, row in wanted.items():
        check(
            name not in targeted
            and row.part[1] == 1
            and not any(other.startswith(f"{name}.") for other in names)
            and not (row.theirs == family.table and config.tie_embeddings),
            f"{row.ours} was trained beside LoRA, and PEFT's files have no place for it; leave out --adapter to export"
            " the whole model",
        )
    return [row for row in rows if module_of(row) in wanted]


def _suffixes(name: str, targeted: Collection[str], everything: Collection[str], layers: range) -> list[str]:
    """What PEFT is told of a module: the shortest end of its name that no other has; else its name in every layer."""
    parts = name.rpartition("{}")[2].strip(".").split(".")
    for start in range(len(parts) - 1, -1, -1):
        end = ".".join(parts[start:])
        if all(other in targeted for other in everything if f".{other}".endswith(f".{end}")):
            return [end]
    return [name.format(layer) for layer in layers]


def stem(row: Row) -> str:
    """The projection that a row's kernel is of."""
    return row.ours.removesuffix("/kernel")


def module_of(row: Row) -> str:
    """The module that a row's weight is of."""
    return row.theirs.rpartition(".")[0]


def _read(leaf: Any, layer: int | None) -> np.ndarray:
    return np.asarray(jax.device_get(leaf if layer is None else leaf[layer]))


def _plain(number: float) -> float | int:
    return int(number) if number == int(number) else number
