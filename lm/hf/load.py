"""Weights into parameters: compared in every name and shape first, then read a layer at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from lm import tree
from lm.errors import UserError, check
from lm.hf.families import family_of
from lm.hf.source import CONFIG, POOLING, Source, read_json
from lm.hf.tables import Family, Row, Shape, listed
from lm.models.config import ModelConfig


@dataclass(frozen=True)
class Pretrained:
    """A pretrained model, known but not read."""

    source: Source
    family: Family
    architecture: str
    model: ModelConfig
    names: dict[str, str]
    """The names of the table that are there, and what the files call them."""


def recognise(source: Source) -> Pretrained:
    """What a source holds, from its config.json and the names in its files.

    Raises:
      UserError: an architecture or a setting that is not supported.
    """
    family = family_of(source.config)
    names = family.canonical(source.tensors.shapes)
    config = dict(source.config)
    if (pooling := _pooling(source)) is not None:
        config[POOLING] = pooling
    if family.head in names and _is_copy(source, names, family, config):
        del names[family.head]
    architecture = family.architecture(config, names)
    model = family.read(config, names)
    return Pretrained(source, family, architecture, model, names)


def _pooling(source: Source) -> str | None:
    """How sentence-transformers, whose folder it may be, makes one vector of a text: `mean`, or None for otherwise."""
    path = source.folder / POOLING / CONFIG
    means = path.is_file() and read_json(path).get("pooling_mode_mean_tokens") is True
    return "mean" if means else None


def _is_copy(source: Source, names: dict[str, str], family: Family, config: dict[str, Any]) -> bool:
    """Whether the output head in the files is the token embedding again; where they differ, the files are right."""
    if family.table not in names or not config.get("tie_word_embeddings", family.tied):
        return False
    head, table = names[family.head], names[family.table]
    shapes = source.tensors.shapes
    return shapes[head] == shapes[table] and np.array_equal(source.tensors.read(head), source.tensors.read(table))


def check_weights(found: Pretrained, shapes: Any) -> None:
    """Raises `UserError` that lists every weight which is missing, too many or of another shape.

    Args:
      found: from `recognise`.
      shapes: the model's parameters, a tree of `jax.ShapeDtypeStruct`.
    """
    sizes = {path: tuple(leaf.shape) for path, leaf in tree.path_leaves(shapes)}
    there, family = found.source.tensors.shapes, found.family
    expected = {
        name: row.their_shape(row.layer(sizes[row.ours]))
        for row in family.rows_of(found.architecture, sizes)
        for name in row.names(sizes[row.ours])
    }
    missing = [name for name in expected if name not in found.names]
    extra = [name for name in found.names if name not in expected and name != family.head and not family.ignores(name)]
    wrong: dict[tuple[Shape, Shape], list[str]] = {}
    for name, shape in expected.items():
        if name in found.names and there[found.names[name]] != shape:
            wrong.setdefault((there[found.names[name]], shape), []).append(name)
    problems = [f"missing: {listed(missing)}"] if missing else []
    problems += [f"extra: {listed(found.names[name] for name in extra)}"] if extra else []
    problems += [f"of shape {list(is_)}, not {list(wanted)}: {listed(names)}" for (is_, wanted), names in wrong.items()]
    if problems:
        raise UserError(
            f"the weights in {found.source.origin} are not those its config.json says; {'; '.join(problems)}; take both"
            " from the same model"
        )


def load_params(
    found: Pretrained, shapes: Any, shardings: Any, on_leaf: Callable[[int, int], None] = lambda done, total: None
) -> Any:
    """The parameters, each leaf on its devices before the next is read.

    The host holds one leaf of all layers at a time, and one layer of it once more.

    Args:
      found: from `recognise`, after `check_weights`.
      shapes: the model's parameters, a tree of `jax.ShapeDtypeStruct` with the dtype that is wanted.
      shardings: a tree of shardings, as `shapes`.
      on_leaf: called with the number of parameters read and of all.

    Raises:
      UserError: a weight of whole numbers, or one that cannot be read.
    """
    leaves = tree.path_leaves(shapes)
    tensors = found.source.tensors
    rows = {row.ours: row for row in found.family.rows_of(found.architecture, dict(leaves))}
    uses: dict[str, int] = {}
    for path, leaf in leaves:
        for name in rows[path].names(leaf.shape):
            uses[name] = uses.get(name, 0) + 1

    def filled(path: str, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        row: Row = rows[path]
        buffer = np.empty(leaf.shape, leaf.dtype)
        layers = buffer if row.stacked else buffer[None]
        for layer, name in zip(layers, row.names(leaf.shape)):
            weight = tensors.read(found.names[name])
            check(
                weight.dtype.kind == "f" or weight.dtype.name == "bfloat16",
                f"{found.names[name]} in {found.source.origin} is of {weight.dtype}; only float32, float16 and bfloat16"
                " weights are read: import the model as it was before it was quantised",
            )
            layer[...] = row.to_ours(weight, layer.shape)
            uses[name] -= 1
            if not uses[name]:
                tensors.forget(found.names[name])
        return buffer

    placed = []
    for done, ((path, leaf), sharding) in enumerate(zip(leaves, jax.tree.leaves(shardings)), 1):
        placed.append(jax.block_until_ready(jax.device_put(filled(path, leaf), sharding)))
        on_leaf(done, len(leaves))
    return jax.tree.unflatten(jax.tree.structure(shapes), placed)
