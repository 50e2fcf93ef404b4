"""A teacher's likeliest choices, saved once and read beside the examples they were made of.

A folder holds `logits.npy` float16 `[n, ..., K]`, `ids.npy` `[n, ..., K]` and `lessons.json`; row i is of example i, so
that the order of training, its epochs and its batches are free, while what is in an example is not.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lm.data.atomic import whole_folder
from lm.data.packing import Batch, Examples
from lm.errors import UserError, check

LOGITS, IDS = "teacher_logits", "teacher_ids"
_MANIFEST, _VERSION, _SAMPLE = "lessons.json", 1, 64


@dataclass(frozen=True, kw_only=True)
class Lessons:
    """What `lessons.json` says."""

    version: int
    """Of the format."""
    kind: str
    """The objective."""
    teacher: str
    """Run directory of the teacher."""
    step: int
    """Its checkpoint."""
    tokenizer: str
    """Fingerprint of its tokenizer."""
    vocab_size: int
    """Rows of its vocabulary."""
    n_classes: int
    """Its classes."""
    examples: int
    """How many examples there are."""
    digest: str
    """Of what some of the examples hold, in hex."""
    top_k: int
    """Choices at each place."""
    fingerprint: str
    """Of all logits and ids, in hex."""


def check_same_each_epoch(examples: Examples) -> None:
    """Raises `UserError` if examples are drawn anew in each epoch: what is saved of one would be wrong in others."""
    index = _sample(len(examples))
    first, second = examples.batch(index, 0), examples.batch(index, 1)
    check(
        all(np.array_equal(first[name], second[name]) for name in first),
        "the examples of this objective are drawn anew in each epoch, and saved logits would fit one of them only; let"
        " the student ask the teacher itself (distill.teacher), or train a masked_lm with task.masking.dynamic off",
    )


def digest(examples: Examples) -> str:
    """Tells examples apart by what some of them hold, in hex."""
    found = hashlib.sha256(str(len(examples)).encode())
    rows = examples.batch(_sample(len(examples)))
    for name in sorted(rows):
        found.update(name.encode() + str(rows[name].shape).encode() + np.ascontiguousarray(rows[name]).tobytes())
    return found.hexdigest()[:16]


def _sample(n: int) -> np.ndarray:
    """Up to 64 examples, spread over all; the first and the last are among them."""
    return np.unique(np.linspace(0, max(n - 1, 0), min(n, _SAMPLE)).astype(np.int64))


def save_lessons(
    folder: Path,
    said: Iterable[tuple[np.ndarray, np.ndarray]],
    n: int,
    about: dict[str, Any],
    waiting: Callable[[], None],
) -> bool:
    """Writes a folder that is whole or not there.

    Args:
      folder: where; nothing happens if it is there.
      said: logits float32 `[B, ..., K]`, the highest first, and their ids, of the examples in order; B may differ.
      n: how many examples there are.
      about: the fields of `Lessons` that the arrays don't say.
      waiting: called once if another process is writing the same.

    Returns:
      Whether it was written.
    """
    with whole_folder(folder, waiting) as building:
        if building is None:
            return False
        found, k = hashlib.sha256(), 0
        with (building / "logits.npy").open("wb") as logits_file, (building / "ids.npy").open("wb") as ids_file:
            for logits, ids in said:
                # Only differences count; beside the highest, half precision is exact to 0.05 % of a difference.
                logits = np.maximum(logits - logits[..., :1], np.finfo(np.float16).min).astype(np.float16)
                ids = ids.astype(np.uint16 if about["vocab_size"] <= 2**16 else np.int32)
                for file, rows in ((logits_file, logits), (ids_file, ids)):
                    if not k:
                        header = {"descr": rows.dtype.str, "fortran_order": False, "shape": (n, *rows.shape[1:])}
                        np.lib.format.write_array_header_1_0(file, header)
                    file.write(rows.tobytes())
                    found.update(rows.tobytes())
                k = logits.shape[-1]
        lessons = Lessons(version=_VERSION, top_k=k, fingerprint=found.hexdigest()[:16], examples=n, **about)
        (building / _MANIFEST).write_text(json.dumps(asdict(lessons), indent=1) + "\n", encoding="utf-8")
    return True


def load_lessons(folder: Path) -> Lessons:
    """What a folder says of itself. Raises `UserError` if `lm teach` did not make it."""
    path = folder / _MANIFEST
    try:
        found = Lessons(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder} holds no saved logits ({_MANIFEST}); make them with `lm teach RUN`") from error
    check(found.version == _VERSION, f"{path} has version {found.version}, and this lm reads {_VERSION}; teach again")
    for name in ("logits", "ids"):
        try:
            shape = np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False).shape
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{folder}/{name}.npy can't be read; make it anew with `lm teach RUN`") from error
        check(
            (shape[0], shape[-1]) == (found.examples, found.top_k),
            f"{folder}/{name}.npy is of other examples than {path} says; make it anew with `lm teach RUN`",
        )
    return found


class TaughtExamples:
    """Examples with what a teacher said of them: `teacher_logits` float32 and `teacher_ids` int32, `[N, ..., K]`.

    Args:
      base: the examples.
      folder: what `save_lessons` wrote of them.
      top_k: how many choices are read.

    Raises:
      UserError: they are not the examples that the teacher saw.
    """

    def __init__(self, base: Examples, folder: Path, top_k: int):
        lessons = load_lessons(folder)
        check(
            (lessons.examples, lessons.digest) == (len(base), digest(base)),
            f"{folder} was made of other training examples ({lessons.examples}, here {len(base)}); what is read, and"
            f" how (data.seq_len, data.packing, data.stride, data.seed, task), must be as in {lessons.teacher}",
        )
        self._base = base
        self._folder = folder
        self._top_k = top_k
        self._open()

    def _open(self) -> None:
        self._logits, self._ids = (
            np.load(self._folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ("logits", "ids")
        )

    def __getstate__(self) -> dict[str, Any]:
        # Another process opens the files itself; a mapped array would be sent whole.
        return {name: value for name, value in self.__dict__.items() if name not in ("_logits", "_ids")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def __len__(self) -> int:
        return len(self._base)

    def batch(self, index: np.ndarray, epoch: np.ndarray | int = 0) -> Batch:
        """See `Examples`; a row of padding has equal logits."""
        rows = self._base.batch(index, epoch)
        index = np.asarray(index, np.int64)
        at = np.maximum(index, 0)
        used = (index >= 0).reshape(-1, *[1] * (self._logits.ndim - 1))
        logits = self._logits[at, ..., : self._top_k].astype(np.float32)
        ids = self._ids[at, ..., : self._top_k].astype(np.int32)
        return rows | {LOGITS: logits * used, IDS: ids * used}

    def documents(self, index: int) -> np.ndarray:
        """See `Examples`."""
        return self._base.documents(index)
