"""Adapters read: LoRA as PEFT writes it, and our own format, each for a base that is a run here."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lm.errors import UserError, check
from lm.hf.adapters import (
    A_NAME,
    B_NAME,
    OWN_CONFIG,
    OWN_FORMAT,
    OWN_SETTINGS,
    OWN_WEIGHTS,
    PEFT_CONFIG,
    PEFT_WEIGHTS,
    PREFIX,
    Module,
    modules_of,
    stem,
)
from lm.hf.source import SafeTensors, Tensors, TorchTensors, read_json
from lm.hf.tables import Family, Row, Shape, listed
from lm.models.config import ModelConfig
from lm.models.lora import LoraConfig

_TORCH = "adapter_model.bin"
# Settings of PEFT that make another model of the same weights.
_UNSUPPORTED = (
    "use_dora",
    "lora_bias",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
)
# Settings of a model that go with a classifier.
_OF_CLASSIFIERS = ("n_classes", "pooling", "pooler", "classifier_bias")
_INITS = (True, False, None, "gaussian", "eva", "orthogonal")  # others change the base


@dataclass(frozen=True)
class Adapter:
    """An adapter that was read: a model that has it, and its parameters by path."""

    model: ModelConfig
    parameters: dict[str, np.ndarray]


def is_peft(folder: Path) -> bool:
    """Whether a folder is one of PEFT's, or of our own format.

    Raises:
      UserError: it is neither.
    """
    peft = (folder / PEFT_CONFIG).is_file()
    check(
        peft or (folder / OWN_CONFIG).is_file(),
        f"{folder} holds no adapter; one of PEFT has {PEFT_CONFIG} and {PEFT_WEIGHTS}, one of this program {OWN_CONFIG}"
        f" and {OWN_WEIGHTS}",
    )
    return peft


def read_own(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """An adapter of our own format: its settings of the model and its parameters by path."""
    told = read_json(folder / OWN_CONFIG)
    settings = told.get("model")
    check(
        told.get("format") == OWN_FORMAT and isinstance(settings, dict) and set(settings) <= set(OWN_SETTINGS),
        f"{folder / OWN_CONFIG} is not of the format {OWN_FORMAT!r}; export the adapter again",
    )
    assert isinstance(settings, dict)
    check((folder / OWN_WEIGHTS).is_file(), f"{folder} lacks {OWN_WEIGHTS}; copy the whole folder")
    tensors = SafeTensors([folder / OWN_WEIGHTS])
    return settings, {name: tensors.read(name) for name in tensors.shapes}


def read_peft(folder: Path, family: Family, model: ModelConfig, shapes: Mapping[str, Shape]) -> Adapter:
    """A LoRA adapter of PEFT, for a base.

    Terms of different rank become one rank, filled with zeros, and of different scale (`alpha_pattern`, `use_rslora`)
    one scale, the rest of it in B.

    Args:
      folder: what `save_pretrained` of PEFT wrote.
      family: the base's.
      model: the base, without low-rank terms.
      shapes: of its parameters, by path.

    Raises:
      UserError: a setting that is not supported, or weights that are not those of the base; all of these are listed.
    """
    told = read_json(folder / PEFT_CONFIG)
    _check_settings(told)
    tensors = _open(folder)
    names = _canonical(tensors.shapes, family, folder)
    architecture, model, shapes = _with_classifier(names, tensors, family, model, shapes)
    modules = modules_of(family, architecture, model)
    rules = _Scales(told)
    whole = {
        name: (row, layer)
        for row in family.rows(architecture)
        if row.ours in shapes and row.part[1] == 1
        for layer, name in enumerate(row.names(shapes[row.ours]))
    }
    problems = _problems(names, tensors, modules, whole, shapes, rules)
    check(
        not problems,
        f"the adapter in {folder} is not of this base; {'; '.join(problems)}; name the run of the model that it was"
        " trained on",
    )
    read = {name: _floats(tensors.read(file), file, folder) for name, file in names.items()}
    lora, parameters = _joined(modules, read, shapes, rules, told)
    for name in [name for name in names if name in whole]:
        row, layer = whole[name]
        if row.ours not in parameters:
            parameters[row.ours] = np.zeros(shapes[row.ours], np.float32)
        place = parameters[row.ours][layer] if row.stacked else parameters[row.ours]
        place[...] = row.to_ours(read[name], place.shape)
    return Adapter(dataclasses.replace(model, lora=lora), parameters)


def _problems(
    names: Mapping[str, str],
    tensors: Tensors,
    modules: Sequence[Module],
    whole: Mapping[str, tuple[Row, int]],
    shapes: Mapping[str, Shape],
    rules: _Scales,
) -> list[str]:
    """What is wrong with an adapter's weights, all of it."""
    by_name = {module.name.format(i): module for module in modules for i in range(shapes[module.rows[0].ours][0])}
    targeted = sorted({name.removesuffix(end) for name in names for end in (A_NAME, B_NAME)} & set(by_name))
    expected: dict[str, Shape] = {}
    for name in targeted:
        row = by_name[name].rows[0]
        shape, rank = row.layer(shapes[row.ours]), rules.rank(name)
        expected[name + A_NAME] = (rank, math.prod(shape[: row.inputs]))
        expected[name + B_NAME] = (math.prod(shape[row.inputs :]) * by_name[name].count, rank)
    # A weight beside the terms that is there in one layer has to be there in all.
    beside = {row.ours for name, (row, _) in whole.items() if name in names}
    expected |= {
        name: row.their_shape(row.layer(shapes[row.ours])) for name, (row, _) in whole.items() if row.ours in beside
    }
    missing = [name for name in expected if name not in names]
    extra = [name for name in names if name not in expected]
    problems = [f"missing: {listed(missing)}"] if missing else []
    problems += [f"extra: {listed(names[name] for name in extra)}"] if extra else []
    wrong: dict[tuple[Shape, Shape], list[str]] = {}
    for name in names:
        if name in expected and (found := tensors.shapes[names[name]]) != expected[name]:
            wrong.setdefault((found, expected[name]), []).append(name)
    problems += [f"of shape {list(is_)}, not {list(wanted)}: {listed(some)}" for (is_, wanted), some in wrong.items()]
    return problems if targeted or problems else ["it has no low-rank term"]


def _check_settings(told: Mapping[str, Any]) -> None:
    kind = told.get("peft_type")
    check(kind == "LORA", f"{PEFT_CONFIG} has peft_type {kind!r}; only LORA is read")
    for name in _UNSUPPORTED:
        check(
            not told.get(name),
            f"{PEFT_CONFIG} has {name} {told.get(name)!r}; only LoRA without it is read: merge it into the base with"
            " peft's merge_and_unload, and import the whole model",
        )
    bias = told.get("bias", "none")
    check(bias == "none", f"{PEFT_CONFIG} has bias {bias!r}; only adapters without trained biases ('none') are read")
    init = told.get("init_lora_weights", True)
    check(
        any(init is known or init == known for known in _INITS),
        f"{PEFT_CONFIG} has init_lora_weights {init!r}, which changes the base as well; convert the adapter with"
        " save_pretrained(path_initial_model_for_weight_conversion=...) of peft",
    )


class _Scales:
    """Ranks and scales of modules, as PEFT's patterns have them."""

    def __init__(self, told: Mapping[str, Any]):
        self._rank = _number(told, "r", 8)
        self._alpha = _number(told, "lora_alpha", 8)
        self._root = bool(told.get("use_rslora"))
        self._ranks, self._alphas = (_patterns(told, name) for name in ("rank_pattern", "alpha_pattern"))

    def rank(self, module: str) -> int:
        """Columns of a module's terms."""
        return int(self._of(self._ranks, module, self._rank))

    def scale(self, module: str) -> float:
        """What its term is multiplied with."""
        rank = self.rank(module)
        return self._of(self._alphas, module, self._alpha) / (math.sqrt(rank) if self._root else rank)

    @staticmethod
    def _of(patterns: Mapping[re.Pattern[str], float], module: str, default: float) -> float:
        return next((value for pattern, value in patterns.items() if pattern.fullmatch(module)), default)


def _number(told: Mapping[str, Any], name: str, default: float) -> float:
    value = told.get(name, default)
    check(type(value) in (int, float) and value > 0, f"{PEFT_CONFIG} has {name} {value!r}; it must be a number above 0")
    return value


def _patterns(told: Mapping[str, Any], name: str) -> dict[re.Pattern[str], float]:
    found = told.get(name) or {}
    check(isinstance(found, dict), f"{PEFT_CONFIG} has {name} {found!r}; it must map names of modules to numbers")
    made = {}
    for key in found:
        value = _number(found, key, 0)
        try:
            made[re.compile(rf"(?:.*\.)?(?:{key})")] = value
        except re.error as error:
            raise UserError(f"{PEFT_CONFIG} has the pattern {key!r} in {name}, which is none ({error})") from error
    return made


def _open(folder: Path) -> Tensors:
    if (folder / PEFT_WEIGHTS).is_file():
        return SafeTensors([folder / PEFT_WEIGHTS])
    check((folder / _TORCH).is_file(), f"{folder} lacks {PEFT_WEIGHTS}; copy the whole folder")
    return TorchTensors([folder / _TORCH])


def _canonical(names: Collection[str], family: Family, folder: Path) -> dict[str, str]:
    """From the names of the table to those in the file."""
    strange = [name for name in names if not name.startswith(PREFIX)]
    check(not strange, f"{folder / PEFT_WEIGHTS} has {listed(strange[:3])}; names of PEFT begin with {PREFIX}")
    plain = {name.removeprefix(PREFIX): name for name in names}
    heads = {row.theirs.split(".")[0] for architecture in family.architectures for row in family.rows(architecture)} | {
        family.head.split(".")[0]
    }
    bare = family.prefix and not any(name.startswith(family.prefix) for name in plain)
    return {
        (family.prefix + name if bare and name.split(".")[0] not in heads else name): file
        for name, file in plain.items()
    }


def _with_classifier(
    names: Mapping[str, str], tensors: Tensors, family: Family, model: ModelConfig, shapes: Mapping[str, Shape]
) -> tuple[str, ModelConfig, Mapping[str, Shape]]:
    """The architecture whose names an adapter has; and the base with the classifier that it brings, if it does."""
    for architecture in family.architectures:
        rows = {row.ours: row for row in family.rows(architecture)}
        row = rows.get("classifier/kernel")
        if row is None or row.theirs not in names:
            continue
        shape = tensors.shapes[names[row.theirs]]
        check(len(shape) == 2, f"{names[row.theirs]} is of shape {list(shape)}; a classifier has two axes")
        n_classes = shape[0] if row.form == "out_in" else shape[1]
        config = family.write(model, family.kinds[0]) | {
            "architectures": [architecture],
            "id2label": {str(i): f"LABEL_{i}" for i in range(n_classes)},
        }
        read = family.read(config, [row.theirs for row in rows.values() if row.ours in shapes] + [row.theirs])
        changes = {name: getattr(read, name) for name in _OF_CLASSIFIERS if hasattr(read, name)}
        brought: dict[str, Shape] = {"classifier/kernel": (model.d_model, n_classes)}
        if "classifier/bias" in rows:
            brought["classifier/bias"] = (n_classes,)
        return architecture, dataclasses.replace(model, **changes), {**shapes, **brought}
    return family.choose(family.kinds[0], model, ""), model, shapes


def _floats(weight: np.ndarray, name: str, folder: Path) -> np.ndarray:
    check(
        weight.dtype.kind == "f" or weight.dtype.name == "bfloat16",
        f"{name} in {folder} is of {weight.dtype}; only float32, float16 and bfloat16 weights are read",
    )
    return weight.astype(np.float32)


def _joined(
    modules: Sequence[Module],
    read: Mapping[str, np.ndarray],
    shapes: Mapping[str, Shape],
    rules: _Scales,
    told: Mapping[str, Any],
) -> tuple[LoraConfig, dict[str, np.ndarray]]:
    """All terms as ours: of one rank and one scale, layers stacked."""
    terms: dict[str, list[tuple[int, np.ndarray, np.ndarray, float]]] = {}  # by projection: layer, A, B, scale
    kernels: dict[str, Row] = {}
    for module in modules:
        layers = {
            layer: (read[name + A_NAME], read[name + B_NAME], rules.scale(name))
            for layer in range(shapes[module.rows[0].ours][0])
            if (name := module.name.format(layer)) + A_NAME in read
        }
        for row, columns in _columns(module, {layer: b for layer, (_, b, _) in layers.items()}):
            kernels[stem(row)] = row
            size = math.prod(shapes[row.ours][1 + row.inputs :])
            block = slice(row.part[0] * size, (row.part[0] + 1) * size)
            terms[stem(row)] = [
                (layer, a[columns[layer]], b[block][:, columns[layer]], scale)
                for layer, (a, b, scale) in layers.items()
            ]
    rank = max(len(a) for found in terms.values() for _, a, _, _ in found)
    scale = next(scale for found in terms.values() for _, _, _, scale in found)
    dropout = told.get("lora_dropout") or 0.0
    lora = LoraConfig(rank=rank, alpha=float(scale * rank), dropout=float(dropout), targets="|".join(sorted(terms)))
    parameters: dict[str, np.ndarray] = {}
    for path, found in terms.items():
        row = kernels[path]
        count, layer_shape = shapes[row.ours][0], row.layer(shapes[row.ours])
        n_in, n_out = layer_shape[: row.inputs], layer_shape[row.inputs :]
        a_all, b_all = np.zeros((count, *n_in, rank), np.float32), np.zeros((count, rank, *n_out), np.float32)
        for layer, a, b, own in found:
            a_all[layer].reshape(-1, rank)[:, : len(a)] = a.T
            b_all[layer].reshape(rank, -1)[: len(a)] = (1.0 if own == scale else own / scale) * b.T
        parameters |= {f"{path}/lora_a/kernel": a_all, f"{path}/lora_b/kernel": b_all}
    return lora, parameters


def _columns(module: Module, b: Mapping[int, np.ndarray]) -> list[tuple[Row, dict[int, np.ndarray]]]:
    """The projections in a module that have terms, and which of its columns are theirs in each layer.

    Of several parts, each has the columns in which its block of B is not 0; all of them where B is 0 as a whole.
    """
    if not b:
        return []
    every = {layer: np.ones(whole.shape[1], bool) for layer, whole in b.items()}
    if module.count == 1 or not any(whole.any() for whole in b.values()):
        return [(row, every) for row in module.rows]
    found = []
    for row in module.rows:
        used: dict[int, np.ndarray] = {}
        for layer, whole in b.items():
            size = whole.shape[0] // module.count
            used[layer] = np.any(whole[row.part[0] * size : (row.part[0] + 1) * size], axis=0)
        if any(columns.any() for columns in used.values()):
            found.append((row, used))
    return found
