"""A run moved between numbers of devices and meshes: the same losses, and the same examples in the same order."""

import dataclasses
import functools
import hashlib
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_runs as small

from lm import loop
from lm.config import Experiment
from lm.sharding import MeshConfig

STEPS, BATCH = 8, 16
# (devices, their mesh, where it stops); 8 -> 4 -> 2 -> 8 devices, no two meshes of one shape.
Moves = tuple[tuple[int, MeshConfig, int | None], ...]
MOVES: Moves = (
    (8, MeshConfig(fsdp=2, tensor=2), 2),
    (4, MeshConfig(devices=4, fsdp=4), 4),
    (2, MeshConfig(devices=2, tensor=2), 5),
    (8, MeshConfig(fsdp=4), None),
)
# Where the length is split, tokens lie in another order, and dropout has to fall on the same of them.
LONG: Moves = (
    (8, MeshConfig(context=4), 2),
    (4, MeshConfig(devices=4, fsdp=4), 4),
    (2, MeshConfig(devices=2, context=2), 5),
    (8, MeshConfig(context=2, tensor=2), None),
)
# Rows of packed documents weigh unlike much, dropout draws for every token, two parts are added up at every step, and
# an epoch is shorter than the run: what depended on the mesh, or began anew at a move, would show.
SETTINGS: dict[str, Any] = {
    "data": {"packing": "documents"},
    "model": {"n_heads": 4},
    "train": {"steps": STEPS, "batch_size": BATCH, "accumulate": 2, "ema_decay": 0.9, "save_every": 4, "eval_every": 4},
}


@dataclasses.dataclass
class Seen:
    """What the devices were given, step by step: the rows of each batch, and over how many devices it lay."""

    rows: list[list[str]] = dataclasses.field(default_factory=list)
    meshes: list[dict[str, int]] = dataclasses.field(default_factory=list)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """The batches as they come back from the devices, which is after all that a mesh could do to them."""
    found = Seen()
    to_devices = loop.to_devices

    def look(batch: Any, mesh: Any) -> Any:
        given = to_devices(batch, mesh)
        names = sorted(given)
        arrays = [np.asarray(given[name]) for name in names]
        found.rows.append([hashlib.sha256(b"".join(a[i].tobytes() for a in arrays)).hexdigest() for i in range(BATCH)])
        found.meshes.append(dict(mesh.shape))
        return given

    monkeypatch.setattr(loop, "to_devices", look)
    return found


def move(settings: Experiment, path: Path, moves: Moves) -> None:
    for number, (_, mesh, stop) in enumerate(moves):
        if number == 0:
            outcome = small.start(dataclasses.replace(settings, mesh=mesh), path, stop_at=stop)
        else:
            override = functools.partial(dataclasses.replace, mesh=mesh)
            outcome = small.resume(path, override=override, stop_at=stop)
        assert outcome.state == ("finished" if stop is None else "preempted")


def shape(devices: int, mesh: MeshConfig) -> dict[str, int]:
    others = {"fsdp": mesh.fsdp, "context": mesh.context, "tensor": mesh.tensor}
    return {"data": devices // math.prod(others.values()), **others}


@pytest.mark.parametrize(
    "moves", [MOVES, pytest.param(LONG, marks=pytest.mark.slow)], ids=["split parameters", "long rows"]
)
def test_moved_between_meshes_is_the_straight_run(tmp_path: Path, seen: Seen, moves: Moves) -> None:
    small.write_corpus(tmp_path / "corpus.txt", paragraphs=30)
    settings = small.experiment(tmp_path, **SETTINGS)
    settings = dataclasses.replace(settings, model=dataclasses.replace(settings.model, residual_dropout=0.1))
    move(settings, tmp_path / "straight", ((8, MeshConfig(), None),))
    assert seen.meshes == [shape(8, MeshConfig())] * STEPS
    straight, seen.rows, seen.meshes = seen.rows, [], []

    move(settings, tmp_path / "moved", moves)
    stops = [0, *(stop or STEPS for _, _, stop in moves)]
    parts = zip(moves, itertools.pairwise(stops))
    assert seen.meshes == [shape(devices, mesh) for (devices, mesh, _), steps in parts for _ in range(*steps)]

    assert seen.rows == straight, "each step reads the same rows, in the same order"
    every = [row for rows in straight for row in rows]
    assert STEPS * BATCH / 2 < len(set(every)) < STEPS * BATCH, "rows can be told apart, and a second epoch begins"
    assert small.extra(tmp_path / "moved", STEPS)["examples"] == STEPS * BATCH

    wanted, found = small.metrics(tmp_path / "straight"), small.metrics(tmp_path / "moved")
    for name in ("step", "split", "tokens"):
        assert [record[name] for record in found] == [record[name] for record in wanted]
    losses, moved = (np.array([record["loss"] for record in records]) for records in (wanted, found))
    assert len(losses) == STEPS + 2
    assert losses[STEPS] < losses[0] - 0.3, "it learns, so that equal losses mean something"
    np.testing.assert_allclose(moved, losses, rtol=0, atol=1e-5)
    ends = small.state(tmp_path / "straight"), small.state(tmp_path / "moved")
    assert ends[0].keys() == ends[1].keys()
    for name, value in ends[0].items():
        np.testing.assert_allclose(ends[1][name], value, atol=1e-4, err_msg=name)
