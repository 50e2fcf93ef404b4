"""Parameters into files that `transformers` loads."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lm import tree
from lm.errors import UserError, check, require
from lm.hf.source import CONFIG, GENERATION, POOLING, SAFETENSORS
from lm.hf.tables import Family, Row

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str) -> int:
    """Bytes, from a number with a unit such as `5GB`. Raises `UserError` for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = found and _UNITS.get(found.group(2).upper())
    check(found and unit and float(found.group(1)) > 0, f"{text!r} is not a size; write it as 5GB or 500MB")
    assert found is not None
    return int(float(found.group(1)) * (unit or 1))


def write_weights(
    folder: Path,
    family: Family,
    architecture: str,
    params: Any,
    *,
    dtype: Any,
    max_shard_size: int,
    on_shard: Callable[[int, int], None] = lambda done, total: None,
) -> list[str]:
    """Writes safetensors files, and their index where there are several; returns the files' names.

    The host holds the weights of one file at a time.

    Args:
      folder: where to; it exists.
      family: whose names.
      architecture: one of the family's.
      params: the model's parameters.
      dtype: of the weights in the files.
      max_shard_size: bytes of a file at most, unless one weight alone has more.
      on_shard: called with the number of files written and of all.
    """
    leaves = dict(tree.path_leaves(params))
    weights = _weights(family.rows_of(architecture, leaves), leaves)
    sizes = {
        name: sum(math.prod(row.layer(leaves[row.ours].shape)) for row, _ in parts) * np.dtype(dtype).itemsize
        for name, parts in weights.items()
    }
    shards: list[list[str]] = [[]]
    room = max_shard_size
    for name, size in sizes.items():
        if shards[-1] and size > room:
            shards.append([])
            room = max_shard_size
        shards[-1].append(name)
        room -= size
    stem, _, ending = SAFETENSORS.partition(".")
    files = [f"{stem}-{i:05}-of-{len(shards):05}.{ending}" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = [SAFETENSORS]
    for done, (file, names) in enumerate(zip(files, shards), 1):
        made = {name: _weight(weights[name], leaves, dtype) for name in names}
        write_safetensors(folder / file, made)
        on_shard(done, len(files))
    if len(shards) > 1:
        where = {name: file for file, names in zip(files, shards) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
        write_json(folder / f"{SAFETENSORS}.index.json", index)
    return files


def _weights(rows: list[Row], leaves: dict[str, Any]) -> dict[str, list[tuple[Row, int]]]:
    """Each weight, with the rows that make it, in the order of their parts, and the layer."""
    found: dict[str, list[tuple[Row, int]]] = {}
    for row in sorted(rows, key=lambda row: row.part):
        for layer, name in enumerate(row.names(leaves[row.ours].shape)):
            found.setdefault(name, []).append((row, layer))
    return dict(sorted(found.items(), key=lambda item: _natural(item[0])))


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts `h.2` before `h.10`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _weight(parts: list[tuple[Row, int]], leaves: dict[str, Any], dtype: Any) -> np.ndarray:
    made = []
    for row, layer in parts:
        leaf = leaves[row.ours]
        made.append(row.to_theirs(np.asarray(jax.device_get(leaf[layer] if row.stacked else leaf))))
    whole = made[0] if len(made) == 1 else np.concatenate(made, axis=parts[0][0].axis)
    return np.ascontiguousarray(whole.astype(dtype))


def write_safetensors(path: Path, weights: dict[str, np.ndarray]) -> None:
    """Writes one file of weights, for whoever may read what this user writes; the library makes it for its owner."""
    path.touch()
    mode = path.stat().st_mode
    require("safetensors.numpy", extra="hf", need="lm export").save_file(weights, path, metadata={"format": "pt"})
    path.chmod(mode)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON as transformers does: two spaces, and keys in order."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def write_configs(folder: Path, config: dict[str, Any], generation: dict[str, Any]) -> None:
    """Writes config.json and generation_config.json; of a model that pools, also what sentence-transformers reads."""
    pooling = config.get(POOLING)
    write_json(folder / CONFIG, {name: value for name, value in config.items() if name != POOLING})
    if pooling is not None:
        (folder / POOLING).mkdir()
        settings = {"word_embedding_dimension": config["hidden_size"], f"pooling_mode_{pooling}_tokens": True}
        write_json(folder / POOLING / CONFIG, settings)
        modules = [("", "Transformer"), (POOLING, "Pooling")]
        write_json(
            folder / "modules.json",
            [
                {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
                for i, (path, kind) in enumerate(modules)
            ],
        )
    write_json(folder / GENERATION, generation)


def unfinished(folder: Path) -> Path:
    """An empty folder beside `folder` to write into, which takes its name when it is whole.

    Raises:
      UserError: `folder` is there already, or can't be made.
    """
    check(not folder.exists(), f"{folder} exists; name another folder, or remove it")
    made = folder.with_name(f".{folder.name}.incomplete")
    try:
        made.mkdir(parents=True)
    except FileExistsError:
        raise UserError(f"{made} is there: another export is writing {folder}, or was killed; remove it") from None
    except OSError as error:
        raise UserError(f"can't write {folder}: {error.strerror}; name another folder") from None
    return made


def token_ids(bos: int, eos: int, pad: int | None) -> Iterator[tuple[str, int]]:
    """What config.json and generation_config.json both say of special tokens; -1 = none."""
    for name, token in (("bos_token_id", bos), ("eos_token_id", eos), ("pad_token_id", pad)):
        if token is not None and token >= 0:
            yield name, token
