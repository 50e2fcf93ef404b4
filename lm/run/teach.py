"""A run's likeliest choices at every place of its training examples, saved for students."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lm.data.mixture import Mixture
from lm.data.objectives.taught import IDS, LOGITS, Lessons, check_same_each_epoch, digest, load_lessons, save_lessons
from lm.errors import UserError, check
from lm.evaluate import to_devices
from lm.records import RunDirectory
from lm.run.datasets import check_has_dataset, dataset_of, maker
from lm.run.use import load
from lm.sharding import MeshConfig, check_batch, make_mesh
from lm.tasks.distillation import DistillConfig, choices, make_teacher

DEFAULT_TOP_K = 32


def teach(
    path: Path,
    folder: Path,
    *,
    top_k: int | None = None,
    checkpoint: str = "best",
    batch_size: int | None = None,
    mesh: MeshConfig | None = None,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> Lessons:
    """Saves what a run says of each example it was trained on (`lm.data.objectives.taught`).

    Args:
      path: the run directory.
      folder: the folder to make.
      top_k: K, choices at each place; None = 32, or all where there are fewer.
      checkpoint: `best`, `latest` or a step.
      batch_size: examples at a time; None = as in training.
      mesh: where it is computed.
      on_batch: called with the number of examples done, and all.

    Returns:
      What the folder says of itself.

    Raises:
      UserError: no such run, one whose examples change from epoch to epoch, a folder that is there.
    """
    check(batch_size is None or batch_size >= 1, f"the batch size is {batch_size}; it must be at least 1")
    check(jax.process_count() == 1, f"logits are saved by one process, and there are {jax.process_count()}")
    check(not folder.exists(), f"{folder} is there already; name a folder to be made")
    mesh = mesh or MeshConfig()
    devices = make_mesh(mesh)
    trained = load(path, devices, checkpoint, mesh.rules)
    experiment, model = trained.experiment, trained.experiment.model
    check(
        not experiment.data.mixture.datasets,
        f"{path} was trained on a mixture of datasets, and saved logits are of the examples of one; let the student ask"
        f" it (distill.teacher {path})",
    )
    most = choices(experiment.task, model, experiment.data)
    top_k = min(DEFAULT_TOP_K, most) if top_k is None else top_k
    check(1 <= top_k <= most, f"top-k is {top_k}, and there are {most} to choose from; give a number from 1 to that")
    rows = batch_size or experiment.train.batch_size
    check_batch(devices.shape, rows, 1)
    run = RunDirectory.open(path)
    check_has_dataset(run)
    dataset = dataset_of(run, experiment)
    store = dataset.store("train")
    assert not isinstance(store, Mixture)  # as the run has none
    examples = maker(experiment, dataset)(store, experiment.data, True)
    check_same_each_epoch(examples)
    ask = make_teacher(experiment.task, trained.model, trained.params, DistillConfig(top_k=top_k), devices, mesh.rules)

    def said() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for first in range(0, len(examples), rows):
            index = np.arange(first, first + rows)
            batch = examples.batch(np.where(index < len(examples), index, -1))
            with jax.set_mesh(devices):
                taught = ask(to_devices(batch, devices))
            answer = jax.device_get({name: taught[name] for name in (LOGITS, IDS)})
            kept = min(rows, len(examples) - first)
            yield answer[LOGITS][:kept], answer[IDS][:kept]
            on_batch(first + kept, len(examples))

    about: dict[str, Any] = {
        "kind": experiment.task.kind,
        "teacher": str(path),
        "step": trained.step,
        "tokenizer": trained.tokenizer.fingerprint(),
        "vocab_size": model.vocab_size,
        "n_classes": model.n_classes,
        "digest": digest(examples),
    }
    try:
        written = save_lessons(folder, said(), len(examples), about, waiting=lambda: None)
    except OSError as error:
        raise UserError(
            f"{folder}: {error.strerror or error}; nothing was written, free space or name another"
        ) from error
    check(written, f"another process made {folder} meanwhile; name another folder")
    return load_lessons(folder)
