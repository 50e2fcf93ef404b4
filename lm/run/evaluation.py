"""How good a run is on a split: of its own dataset, or of the data and the task of another experiment."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from lm import metrics
from lm.checkpoint import Checkpoints
from lm.config import Experiment
from lm.data.loader import check_loader_config
from lm.data.mixture import Mixture, open_mixture
from lm.data.prepare import Progress
from lm.errors import check
from lm.evaluate import baselines, evaluate, make_eval_step, spoken
from lm.records import RunDirectory
from lm.run.datasets import (
    AnyDataset,
    dataset_of,
    labels_of,
    maker,
    prepared,
    split_batches,
    split_text,
    store_batches,
)
from lm.run.use import Trained, choose_checkpoint, load, load_experiment
from lm.sharding import MeshConfig, Rules, make_mesh, ruled
from lm.tasks.base import AnsweringTask
from lm.text.tokenizer import TokenizerConfig, load_tokenizer


def evaluate_run(
    path: Path,
    *,
    on: Experiment | None = None,
    split: str = "validation",
    checkpoint: str = "best",
    mesh: MeshConfig | None = None,
    batch_size: int | None = None,
    max_batches: int | None = None,
    with_baselines: bool = False,
    progress: Progress | None = None,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Evaluates a run on a split.

    Args:
      path: the run directory.
      on: an experiment whose data and task count instead of the run's own (see `measured`).
      split: `train`, `validation` or `test`.
      checkpoint: `best`, `latest` or a step.
      mesh: where it is computed.
      batch_size: rows at a time; None = as in training, of `on` if that is given. It changes no result.
      max_batches: at most so many; None = the whole split.
      with_baselines: also the bits per byte of two codes that know nothing of language.
      progress: told how far a dataset is that must be prepared first.
      on_batch: called with the number of batches done, and of all.

    Returns:
      `step`, `split`, what the task reports (of a language model `loss`, `perplexity`, `accuracy` and
      `bits_per_byte`), `tokens`; of an `AnsweringTask` also the scores of its texts, of a classifier what
      `lm.metrics.by_class` says.

    Raises:
      UserError: no such run, checkpoint or split; or see `measured`.
    """
    check(batch_size is None or batch_size >= 1, f"the batch size is {batch_size}; it must be at least 1")
    mesh = mesh or MeshConfig()
    devices = make_mesh(mesh)
    rows = devices.shape["data"] * devices.shape["fsdp"]
    wanted = batch_size or (on or load_experiment(RunDirectory.open(path))).train.batch_size
    batch_size = math.ceil(wanted / rows) * rows
    with contextlib.closing(Checkpoints.read_only(RunDirectory.open(path).checkpoints)) as checkpoints:
        checkpoint = str(choose_checkpoint(RunDirectory.open(path), checkpoints, checkpoint))
    experiment, dataset = measured(path, on, split, progress)
    batches, total = split_batches(dataset, experiment, split, batch_size, max_batches)
    trained = dataclasses.replace(load(path, devices, checkpoint, mesh.rules), experiment=experiment)
    task = experiment.task
    classes: dict[str, Any] = {}

    def summarise(sums: Mapping[str, Any]) -> dict[str, float]:
        classes.update(metrics.by_class(sums, dataset.labels))
        return task.summarise(sums)

    with jax.set_mesh(devices):
        shardings = jax.tree.map(lambda x: x.sharding, trained.params)
        step = make_eval_step(trained.model, task, devices, shardings, mesh.rules)
        result = evaluate(
            step,
            trained.params,
            batches(),
            devices,
            tokens_per_byte=dataset.tokens_per_byte(split) if task.spells_text else None,
            summarise=summarise,
            on_batch=lambda done: on_batch(done, total),
        )
        result |= _text_scores(trained, dataset, split, batch_size, max_batches, devices, mesh.rules)
    report: dict[str, Any] = {"step": trained.step, "split": split, **result, **classes}
    if with_baselines:
        report |= baselines(split_text(dataset, split))
    return report


def measured(
    path: Path, on: Experiment | None, split: str, progress: Progress | None = None
) -> tuple[Experiment, AnyDataset]:
    """The experiment that a run is measured by, its model settled, and the dataset, which has the split.

    Without `on` both are the run's own. Otherwise data, task and batch size are those of `on`, its documents prepared
    with the run's tokenizer; the model is the run's, and so are the names of its classes, where it has any.

    Raises:
      UserError: no such run or split; the run has no dataset of its own; its model can't do the task, or its tokenizer
        or classes are not those of the data. A dataset that was prepared for nothing is gone again.
    """
    run = RunDirectory.open(path)
    own = load_experiment(run)
    if on is None:
        dataset = dataset_of(run, own, progress)
        dataset.store(split)
        return own, dataset
    experiment = _placed(run, own, on)
    with prepared(experiment, progress, min_tokens=1) as dataset:
        dataset.store(split)
        known, theirs = load_tokenizer(run.tokenizer).fingerprint(), dataset.tokenizer.fingerprint()
        check(
            known == theirs,
            f"{path} has the tokenizer {known} and the dataset {theirs}; prepare it with tokenizer.kind"
            f" file:{run.tokenizer}",
        )
        _check_heads(path, experiment, dataset.labels)
        split_batches(dataset, experiment, split, 1, 1)
    return experiment, dataset


def _placed(run: RunDirectory, own: Experiment, on: Experiment) -> Experiment:
    """The run on the data and the task of `on`. Raises `UserError` for what settings alone show."""
    model, task, data = own.model, on.task, on.data
    check_loader_config(data)
    _check_heads(run.path, dataclasses.replace(own, task=task), ())
    task.check(model, data)
    for what, length in zip(("rows have", "sources have"), task.lengths(data)):
        check(
            length <= model.context,
            f"{what} {length} tokens, and {run.path} has room for {model.context}; lower data.seq_len (or"
            " task.source_len, where the task has one)",
        )
    names = labels_of(run, own) if task.kind == "classification" else ()
    if data.mixture.datasets:
        tokenizer, labels = TokenizerConfig(), open_mixture(data.mixture).labels
    else:
        tokenizer, labels = TokenizerConfig(kind=f"file:{run.tokenizer}"), data.labels or names
        data = dataclasses.replace(data, labels=labels)
    if names and labels:
        check(
            tuple(labels) == names,
            f"{run.path} has the classes {', '.join(names)}, and the data {', '.join(labels)}; leave data.labels out,"
            " or evaluate on data with the same classes in the same order",
        )
    experiment = dataclasses.replace(own, data=data, task=task, tokenizer=tokenizer, train=on.train)
    experiment = dataclasses.replace(experiment, clean=on.clean, dedup=on.dedup, augment=on.augment)
    _check_heads(run.path, experiment, labels)
    return experiment


def _check_heads(path: Path, experiment: Experiment, labels: Sequence[str]) -> None:
    """Raises `UserError` where the task reads a head that the model lacks; no labels: not known yet."""
    model, task = experiment.model, experiment.task
    headless = dataclasses.replace(model, n_classes=0, span_head=False, pooling="mean")
    wanted = task.settle(headless, labels)
    for name, there, needed in (
        ("classifier (model.n_classes)", model.n_classes, wanted.n_classes),
        ("head for answers (model.span_head)", model.span_head, wanted.span_head),
    ):
        check(
            there or not needed,
            f"task {task.kind} needs a {name}, and the model of {path} has none; fine-tune it with --init-from.run"
            f" {path}, or choose a config of another task",
        )
    check(
        not wanted.n_classes or not labels or wanted.n_classes == model.n_classes,
        f"the data has {wanted.n_classes} classes ({', '.join(labels[:5])}{', …' if len(labels) > 5 else ''}), and the"
        f" model of {path} tells {model.n_classes} apart; evaluate on data with as many",
    )


def _text_scores(
    trained: Trained,
    dataset: AnyDataset,
    split: str,
    batch_size: int,
    max_batches: int | None,
    mesh: Mesh,
    rules: Rules,
) -> dict[str, float]:
    """Scores of the texts that a model gives, where its task has any and the batches hold a whole one."""
    experiment, task = trained.experiment, trained.experiment.task
    if not isinstance(task, AnsweringTask):
        return {}
    make = maker(experiment, dataset)
    opened = dataset.store(split)
    texts: list[tuple[str, Sequence[str]]] = []
    for store in opened.stores if isinstance(opened, Mixture) else [opened]:
        batches, count = store_batches(store, experiment, make, batch_size, max_batches)
        said = spoken(ruled(functools.partial(task.say, trained.model), rules), trained.params, batches(), mesh)
        texts += task.texts(said, store, make(store, experiment.data, False))
        max_batches = None if max_batches is None else max_batches - count
        if max_batches == 0:
            break
    return task.score_texts(texts) if texts else {}
