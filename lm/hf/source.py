"""Where pretrained weights lie: a folder or a name on the hub, its files, and tensors read one at a time.

What is read is data: safetensors, Flax's msgpack, and PyTorch's files through its loader of weights alone. Pickle is
loaded in no other way, and code that comes with a model is not run.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lm.errors import UserError, check, require
from lm.text.base import one_line

CONFIG, GENERATION = "config.json", "generation_config.json"
POOLING = "1_Pooling"
"""Where sentence-transformers says how a text becomes one vector, and the setting of a config.json we read it as."""
SAFETENSORS, MSGPACK, TORCH = "model.safetensors", "flax_model.msgpack", "pytorch_model.bin"
FORMATS = f"{SAFETENSORS}, {SAFETENSORS}.index.json with its parts, {MSGPACK} or {TORCH}"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "encoder.json",
    "vocab.bpe",
    "vocab.txt",
    "*.model",
    "chat_template.jinja",
)
SMALL_FILES = (CONFIG, GENERATION, f"{POOLING}/{CONFIG}", *TOKENIZER_FILES)
_PICKLED = (".pkl", ".pickle", ".pt", ".pth", ".ckpt", ".bin", ".joblib")


class Tensors(Protocol):
    """Weights by name, read when asked for."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every name and its shape."""

    def read(self, name: str) -> np.ndarray:
        """One weight; bfloat16 as in `ml_dtypes`."""

    def forget(self, name: str) -> None:
        """Says that a weight is not read again."""


@dataclass(frozen=True)
class Source:
    """A pretrained model, opened."""

    folder: Path
    origin: str
    """What it was asked for as."""
    config: dict[str, Any]
    generation: dict[str, Any]
    """What generation_config.json holds; empty where there is none."""
    tensors: Tensors
    files: tuple[str, ...]
    """The files of the weights."""


def open_source(name: str) -> Source:
    """Opens a folder, or a model of the hub.

    Raises:
      UserError: there is nothing of the kind, or it is damaged.
    """
    folder = Path(name).expanduser()
    if not folder.exists():
        folder = _download(name)
    check(folder.is_dir(), f"{name} is a file; give the folder that holds {CONFIG} and the weights")
    check(
        (folder / CONFIG).is_file(),
        f"{name} has no {CONFIG}; give a folder as save_pretrained of transformers writes it: {CONFIG} and {FORMATS}",
    )
    config = read_json(folder / CONFIG)
    generation = read_json(folder / GENERATION) if (folder / GENERATION).is_file() else {}
    files, tensors = _open_weights(folder, name)
    return Source(folder, name, config, generation, tensors, files)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises `UserError` where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"can't read {path}: {one_line(error)}; copy it again") from None
    check(isinstance(value, dict), f"{path} is not a JSON object; copy it again")
    return value


def _open_weights(folder: Path, name: str) -> tuple[tuple[str, ...], Tensors]:
    for base, make in ((SAFETENSORS, SafeTensors), (MSGPACK, FlaxTensors), (TORCH, TorchTensors)):
        index = folder / f"{base}.index.json"
        if (folder / base).is_file():
            files: tuple[str, ...] = (base,)
        elif index.is_file():
            files = _parts(index)
        else:
            continue
        return files, make([folder / file for file in files])
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLED)
    check(
        not pickled,
        f"{name} holds pickle files ({', '.join(pickled[:3])}), which can run any program and are not loaded; convert"
        f" them to {SAFETENSORS}",
    )
    raise UserError(f"{name} holds no weights; they are in {FORMATS}")


def _parts(index: Path) -> tuple[str, ...]:
    """The files that an index names, which lie beside it."""
    weights = read_json(index).get("weight_map")
    check(isinstance(weights, dict) and weights, f"{index} has no weight_map; copy it again")
    assert isinstance(weights, dict)
    files = sorted({str(file) for file in weights.values()})
    for file in files:
        check(Path(file).name == file, f"{index} names {file!r}, which is not a file beside it; copy it again")
    missing = [file for file in files if not (index.parent / file).is_file()]
    check(not missing, f"{index.parent} lacks {', '.join(missing)}, which {index.name} names; copy the whole folder")
    return tuple(files)


class SafeTensors:
    """Safetensors files. Each is open only while something is read from it, so that no page of it stays in memory."""

    def __init__(self, paths: list[Path]):
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._path: dict[str, Path] = {}
        for path in paths:
            with self._open(path) as file:
                for name in file.keys():  # noqa: SIM118 - not a dictionary
                    self.shapes[name] = tuple(file.get_slice(name).get_shape())
                    self._path[name] = path

    @staticmethod
    def _open(path: Path) -> Any:
        safetensors = require("safetensors", extra="hf", need="a safetensors file")
        try:
            return safetensors.safe_open(str(path), framework="np")
        except (OSError, safetensors.SafetensorError) as error:
            raise UserError(
                f"{path} is not a whole safetensors file ({one_line(error)}); download or copy it again"
            ) from None

    def read(self, name: str) -> np.ndarray:
        """See `Tensors`."""
        with self._open(self._path[name]) as file:
            return file.get_tensor(name)

    def forget(self, name: str) -> None:
        """See `Tensors`; nothing is held."""


class FlaxTensors:
    """Flax's msgpack file, which is read whole; names are made those of PyTorch, and matrices turned."""

    def __init__(self, paths: list[Path]):
        from flax import serialization, traverse_util

        (path,) = paths
        try:
            tree = serialization.msgpack_restore(path.read_bytes())
            leaves = traverse_util.flatten_dict(tree, sep=".")
        except Exception as error:  # msgpack's own kinds, and what flax makes of what it finds
            raise UserError(f"{path} is not a whole Flax file ({one_line(error)}); download or copy it again") from None
        self._weights: dict[str, np.ndarray] = {}
        for name, leaf in leaves.items():
            if isinstance(leaf, np.ndarray):
                stem, _, last = name.rpartition(".")
                last = {"kernel": "weight", "scale": "weight", "embedding": "weight"}.get(last, last)
                turned = name.endswith(".kernel") and leaf.ndim == 2
                self._weights[f"{stem}.{last}"] = leaf.T if turned else leaf
        self.shapes = {name: weight.shape for name, weight in self._weights.items()}

    def read(self, name: str) -> np.ndarray:
        """See `Tensors`."""
        return self._weights[name]

    def forget(self, name: str) -> None:
        """See `Tensors`."""
        self._weights.pop(name, None)


class TorchTensors:
    """PyTorch's files, by its own loader, which builds tensors and nothing else, and maps them into memory."""

    def __init__(self, paths: list[Path]):
        try:
            import torch
        except ModuleNotFoundError:
            raise UserError(
                f"{paths[0]} is a pickle file, which only torch's loader of weights may read, and torch is not"
                f" installed; install it with `pip install -e '.[parity]'`, or convert the file to {SAFETENSORS}"
            ) from None
        self._weights: dict[str, Any] = {}
        for path in paths:
            try:
                loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except Exception as error:  # of all kinds: zip, pickle and torch each have their own
                raise UserError(
                    f"{path} can't be loaded as weights alone ({one_line(error)[:150]}); convert it to {SAFETENSORS}"
                ) from None
            check(
                isinstance(loaded, dict) and all(isinstance(value, torch.Tensor) for value in loaded.values()),
                f"{path} holds something else than weights by name; convert it to {SAFETENSORS}",
            )
            self._weights |= loaded
        self.shapes = {name: tuple(weight.shape) for name, weight in self._weights.items()}

    def read(self, name: str) -> np.ndarray:
        """See `Tensors`."""
        import torch

        weight = self._weights[name].detach()
        if weight.dtype == torch.bfloat16:
            import ml_dtypes

            return weight.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return weight.numpy()

    def forget(self, name: str) -> None:
        """See `Tensors`."""
        self._weights.pop(name, None)


def _download(name: str) -> Path:
    """A model of the hub, its small files and its weights in the best format that it has; `NAME@REVISION` is one."""
    hub = require("huggingface_hub", extra="hf", need=f"{name}, which is not a folder here, from the hub,")
    errors = require("huggingface_hub.errors", extra="hf", need=name)
    repository, _, revision = name.partition("@")
    at = {"revision": revision or None}
    try:
        try:
            files = [file.rfilename for file in hub.HfApi().model_info(repository, **at).siblings or []]
        except (errors.HfHubHTTPError, errors.HFValidationError):
            raise
        except Exception:  # no connection, of whatever kind: what was downloaded before may do
            return Path(hub.snapshot_download(repository, **at, local_files_only=True))
        for base in (SAFETENSORS, MSGPACK, TORCH):
            stem, _, ending = base.partition(".")
            weights = [base] if base in files else [f"{base}.index.json", f"{stem}-*-of-*.{ending}"]
            if any(fnmatch.fnmatch(file, pattern) for file in files for pattern in weights):
                return Path(hub.snapshot_download(repository, **at, allow_patterns=[*SMALL_FILES, *weights]))
    except errors.HFValidationError:
        raise UserError(
            f"{name} is neither a folder that exists nor a name of the form OWNER/NAME or OWNER/NAME@REVISION"
        ) from None
    except errors.LocalEntryNotFoundError:
        raise UserError(
            f"there is no folder {name}, and as a name on the hub it is not in the local cache and the hub cannot be"
            " reached; give a folder"
        ) from None
    except (errors.HfHubHTTPError, OSError) as error:
        raise UserError(f"cannot download {name}: {one_line(error)}; give a folder") from None
    raise UserError(f"{name} on the hub holds no weights in {FORMATS}")
