"""Runs from beginning to end: what `lm train`, `evaluate` and `generate` do, without a command line."""

import contextlib
import dataclasses
import functools
import itertools
import logging
import math
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from lm import config as configs
from lm.checkpoint import Checkpoints
from lm.config import Experiment
from lm.data import loader
from lm.data.manifest import TOKENIZER_FOLDER, Manifest, load_manifest
from lm.data.mixture import MixedDatasets, Mixture, open_mixture
from lm.data.prepare import Progress, prepare
from lm.data.store import DatasetStore, TokenStore
from lm.errors import UserError, check
from lm.evaluate import baselines, evaluate, make_eval_step, spoken
from lm.loop import Feed, Outcome, Reporter, check_resumable, fit
from lm.models.transformer import Transformer
from lm.optim import make_optimizer, make_schedule
from lm.records import RunDirectory, differences, environment
from lm.sharding import MeshConfig, check_batch, make_mesh
from lm.tasks import Task
from lm.tasks.base import AnsweringTask
from lm.tasks.distillation import Distilled, check_teacher, make_teacher
from lm.text.tokenizer import Tokenizer, check_tokenizer_config, is_trained, load_tokenizer, train_tokenizer
from lm.train import Program, abstract_params, make_program

# Settings that a resumed run may change: where and how it runs, never what it computes.
FREE_ON_RESUME = (
    "mesh.",
    "data.root",
    "data.workers",
    "data.prefetch",
    "model.attention",
    "model.remat",
    "model.unroll",
    "train.log_every",
    "train.eval_every",
    "train.eval_batches",
    "train.save_every",
    "train.keep",
    "train.patience",
    "train.non_finite",
)


@dataclass(frozen=True)
class Dataset:
    """A prepared dataset, opened."""

    folder: Path
    manifest: Manifest
    tokenizer: Tokenizer

    @property
    def folders(self) -> tuple[Path, ...]:
        """Where it is; a mixture is in several."""
        return (self.folder,)

    @property
    def fingerprint(self) -> str:
        """What it holds, in hex."""
        return self.manifest.fingerprint

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits it has."""
        return tuple(self.manifest.splits)

    @classmethod
    def open(cls, folder: Path) -> "Dataset":
        """Opens what `lm.data.prepare` made."""
        return cls(folder, load_manifest(folder), load_tokenizer(folder / TOKENIZER_FOLDER))

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes of its documents, in order of id; none if they have none."""
        return tuple(self.manifest.labels)

    def store(self, split: str) -> DatasetStore:
        """The tokens of a split.

        Raises:
          UserError: the dataset has no such split.
        """
        splits = self.manifest.splits
        check(split in splits, f"the dataset has no split {split!r}; it has {', '.join(splits)}")
        return DatasetStore(self.folder, split)

    def tokens_per_byte(self, split: str) -> float:
        """Tokens, ends of documents included, for each byte of a split's text."""
        counts = self.manifest.splits[split]
        return counts.tokens / counts.bytes


AnyDataset = Dataset | MixedDatasets
"""What a run can be trained on."""


def check_experiment(experiment: Experiment) -> Mesh:
    """Everything that can be told wrong before text is read or a file is written; returns the mesh."""
    mesh = make_mesh(experiment.mesh)
    check_batch(mesh, experiment.train.batch_size, experiment.train.accumulate)
    model, data, tokenizer, task = experiment.model, experiment.data, experiment.tokenizer, experiment.task
    loader.check_loader_config(data)
    task.check(model, data)
    seq_len, source_len = task.lengths(data)
    check(
        data.seq_len <= model.max_len,
        f"data.seq_len {data.seq_len} is longer than model.max_len {model.max_len}; raise one or lower the other",
    )
    check(
        not model.encoder_layers or source_len <= model.max_len,
        f"sources have {source_len} tokens, more than model.max_len {model.max_len}; raise it, or make them shorter",
    )
    labels: Sequence[str] = data.labels
    if experiment.distill.teacher is not None:
        RunDirectory.open(Path(experiment.distill.teacher))
    if data.mixture.datasets:
        for name, default, value in configs.changed(Experiment(), experiment):
            check(
                name.split(".")[0] not in ("tokenizer", "clean", "dedup", "augment"),
                f"{name} is {value!r}, but data.mixture.datasets are prepared already; leave it at {default!r}",
            )
        mixed = open_mixture(data.mixture)
        ids, labels = mixed.tokenizer.vocab_size, mixed.labels
    else:
        check(
            experiment.train.patience is None or data.validation_source is not None or data.validation_fraction > 0,
            "train.patience needs a validation split; set data.validation_fraction or data.validation_source",
        )
        check_tokenizer_config(tokenizer)
        ids = tokenizer.vocab_size if is_trained(tokenizer) else train_tokenizer(tokenizer, ()).vocab_size
    settled = task.settle(model.with_vocabulary(ids), labels)
    params, _ = abstract_params(Transformer(settled), mesh)
    train = experiment.train
    if train.steps is not None or train.tokens is not None:
        steps = train.total_steps(tokens_per_step=train.batch_size * seq_len, steps_per_epoch=math.nan)
    else:
        check(train.epochs is not None, "the run has no length; set one of train.steps, train.tokens and train.epochs")
        steps = 10**6
    make_optimizer(experiment.optim, make_schedule(experiment.optim, steps), params)
    return mesh


def start(
    experiment: Experiment,
    path: Path,
    reporter: Reporter,
    *,
    progress: Progress | None = None,
    stop_at: int | None = None,
) -> Outcome:
    """Trains a new run in the folder `path`; prepares the dataset if it is not there.

    Raises:
      UserError: anything about the settings; then no run directory was made.
      TrainingHaltedError: something was not finite.
    """
    mesh = check_experiment(experiment)
    RunDirectory.check_new(path)
    experiment = _with_settled_teacher(experiment)
    with _prepared(experiment, progress) as dataset:
        model = experiment.model.with_vocabulary(dataset.tokenizer.vocab_size)
        model = experiment.task.settle(model, dataset.labels)
        experiment = dataclasses.replace(experiment, model=model)
        parts = _Parts.build(experiment, dataset, mesh)
    if parts.feed.validation is None:
        reporter.message(
            "no validation split, so nothing will be evaluated: no document fell into it; make more and smaller"
            " documents (data.document paragraph or line), raise data.validation_fraction or set data.validation_source"
        )
    if parts.cut:
        reporter.message(
            f"{parts.cut} of {parts.examples} training documents are longer than a row and lose a part; a larger"
            " data.seq_len (or task.source_len) keeps it"
        )
    run = RunDirectory.create(path)
    run.lock()
    try:
        run.write("environment.json", environment())
        run.write("dataset.json", _described(dataset))
        dataset.tokenizer.save(run.tokenizer)
        # Last, as it makes the folder a run: killed before, it can be started again, killed after, resumed.
        run.write("config.json", configs.to_dict(experiment))
        return _fit(run, parts, reporter, stop_at)
    finally:
        run.unlock()


def resume(
    path: Path,
    reporter: Reporter,
    *,
    override: Callable[[Experiment], Experiment] = lambda experiment: experiment,
    progress: Progress | None = None,
    stop_at: int | None = None,
) -> Outcome:
    """Continues a run from its last checkpoint (from the start if it has none).

    Raises:
      UserError: not a run, in use, of another model or dataset, or `override` changes what it computes.
    """
    run = RunDirectory.open(path)
    run.lock()
    try:
        saved = load_experiment(run)
        experiment = override(saved)
        check_changes(saved, experiment)
        mesh = check_experiment(experiment)
        dataset = dataset_of(run, experiment, progress, elsewhere=experiment.data.root != saved.data.root)
        parts = _Parts.build(experiment, dataset, mesh)
        step = check_resumable(run, parts.program, dataset.tokenizer.fingerprint())
        check(
            stop_at is None or stop_at > step,
            f"can't stop at step {stop_at}: the run's last checkpoint is of step {step}; stop later",
        )
        # Nothing has been written so far; from here on the run is on its way.
        now = environment()
        for line in differences(run.read("environment.json"), now):
            reporter.message(f"not the same environment, so the last bits may differ: {line}")
        if experiment != saved:
            run.write("config.json", configs.to_dict(experiment))
        run.write("dataset.json", _described(dataset))
        run.write("environment.json", now)
        return _fit(run, parts, reporter, stop_at)
    finally:
        run.unlock()


def check_changes(saved: Experiment, asked: Experiment) -> None:
    """Raises UserError if a resumed run was asked to compute something else."""
    for name, before, after in configs.changed(saved, asked):
        check(
            name in FREE_ON_RESUME or name.split(".")[0] + "." in FREE_ON_RESUME,
            f"{name} is {after!r} but the run was started with {before!r}; a resumed run keeps what it computes:"
            " leave it out, or start a new run",
        )


def load_experiment(run: RunDirectory) -> Experiment:
    """The settings a run was started with."""
    return configs.from_dict(Experiment, run.read("config.json"), where=str(run.path / "config.json"))


@contextlib.contextmanager
def _prepared(experiment: Experiment, progress: Progress | None) -> Iterator[AnyDataset]:
    """The dataset of an experiment, prepared if it is not there; those of a mixture must be there.

    One that this call made is removed again if the body finds a mistake that could not be told without it: a mistake
    leaves nothing behind.
    """
    data = experiment.data
    if data.mixture.datasets:
        yield open_mixture(data.mixture)
        return
    home = Path(data.root).expanduser() / data.name
    before, missing = set(home.glob("*/*")), [path for path in (home, *home.parents) if not path.exists()]
    phases = set()

    def told(phase: str, done: int, total: int | None) -> None:
        phases.add(phase)
        if progress is not None:
            progress(phase, done, total)

    # A corpus too short to train on is refused before a dataset of it is left behind.
    folder = prepare(
        data,
        experiment.tokenizer,
        told,
        clean=experiment.clean,
        dedup=experiment.dedup,
        augment=experiment.augment,
        min_tokens=data.seq_len + 1,
    )
    try:
        yield Dataset.open(folder)
    except UserError:
        # Another process made it if it was waited for, or if there was nothing to do but to read the source.
        if folder not in before and "wait" not in phases and phases > {"fingerprint"}:
            _remove(folder, missing)
        raise


def _remove(folder: Path, parents: list[Path]) -> None:
    """Removes a dataset's folder, and those of its parents that it leaves empty."""
    # Under a name that `lm.data.atomic` cleans away, so that being killed here leaves no half of a dataset.
    going = folder.with_name(f".incomplete-{secrets.token_hex(8)}")
    folder.rename(going)
    shutil.rmtree(going)
    with contextlib.suppress(OSError):  # not empty: another process works there
        for path in (folder.parent, *parents):
            path.rmdir()


def _described(dataset: AnyDataset) -> dict[str, Any]:
    """What `dataset.json` says."""
    folders = [str(folder.absolute()) for folder in dataset.folders]
    return {"folder": folders[0], "folders": folders, "fingerprint": dataset.fingerprint}


def dataset_of(
    run: RunDirectory, experiment: Experiment, progress: Progress | None = None, *, elsewhere: bool = False
) -> AnyDataset:
    """The dataset a run was started with, from its folder, from below `data.root`, or prepared again.

    With `elsewhere`, `data.root` has been changed and its old folder does not count.
    """
    recorded = run.read("dataset.json", "folder", "fingerprint")
    if experiment.data.mixture.datasets:
        mixed = open_mixture(experiment.data.mixture)
        check(
            mixed.fingerprint == recorded["fingerprint"],
            f"the run was started with the mixture {recorded['fingerprint']}, but its datasets now make"
            f" {mixed.fingerprint}; restore them or start a new run",
        )
        return mixed
    old = Path(recorded["folder"])
    below_root = Path(experiment.data.root).expanduser() / experiment.data.name / recorded["fingerprint"] / old.name
    wanted = below_root if elsewhere else old
    for folder in (wanted, below_root):
        if folder.exists():
            dataset = Dataset.open(folder)
            check(
                dataset.manifest.fingerprint == recorded["fingerprint"],
                f"the run was started with dataset {recorded['fingerprint']} but {folder} holds"
                f" {dataset.manifest.fingerprint}; restore it or start a new run",
            )
            return dataset
    with _prepared(experiment, progress) as prepared:
        check(
            prepared.fingerprint == recorded["fingerprint"],
            f"the run was started with dataset {recorded['fingerprint']}, which is not in {wanted},"
            f" and preparing it again gives {prepared.fingerprint}: the source text has changed; restore it or"
            " start a new run",
        )
    return prepared


@dataclass(frozen=True)
class _Parts:
    """What `fit` needs, built from settings and a dataset."""

    experiment: Experiment
    dataset: AnyDataset
    model: Transformer
    program: Program
    feed: Feed
    total_steps: int
    examples: int
    """Training examples in an epoch."""
    cut: int
    """How many of them are of documents that don't fit into a row."""

    @classmethod
    def build(cls, experiment: Experiment, dataset: AnyDataset, mesh: Mesh) -> "_Parts":
        data, train = experiment.data, experiment.train
        task: Task = experiment.task
        make = _maker(experiment, dataset)
        store = dataset.store("train")
        seq_len, source_len = task.lengths(data)
        total = train.total_steps(
            tokens_per_step=train.batch_size * seq_len,
            steps_per_epoch=loader.steps_per_epoch(store, data, make=make, batch_size=train.batch_size),
        )
        model = Transformer(experiment.model)
        enrich = None
        if experiment.distill.teacher is not None:
            enrich = _teacher(experiment, dataset, mesh)
            task = Distilled(task, experiment.distill)
        schedule = make_schedule(experiment.optim, total)
        tx = make_optimizer(experiment.optim, schedule, abstract_params(model, mesh)[0])
        program = make_program(model, task, tx, schedule, train, mesh)
        training = functools.partial(
            loader.training_batches,
            store,
            data,
            make=make,
            batch_size=train.batch_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        documents = functools.partial(loader.batch_documents, store, data, make=make, batch_size=train.batch_size)
        feed = Feed(
            train=lambda step: training(start_step=step),
            documents=lambda step: documents(step=step),
            seq_len=seq_len,
            source_len=source_len if experiment.model.encoder_layers else 0,
        )
        if enrich is not None:
            feed = dataclasses.replace(feed, enrich=enrich)
        if "validation" in dataset.splits:
            batches, n_batches = split_batches(dataset, experiment, "validation", train.batch_size, train.eval_batches)
            feed = dataclasses.replace(
                feed,
                validation=batches,
                validation_batches=n_batches,
                tokens_per_byte=dataset.tokens_per_byte("validation") if task.spells_text else None,
            )
        else:
            check(train.patience is None, "train.patience needs a validation split; set data.validation_fraction")
        examples, cut = loader.n_training_examples(store, data, make=make), loader.n_cut(store, data, make=make)
        return cls(experiment, dataset, model, program, feed, total, examples, cut)


def _with_settled_teacher(experiment: Experiment) -> Experiment:
    """The step of the teacher's checkpoint instead of its name: another may be the best when the run is resumed."""
    config = experiment.distill
    if config.teacher is None:
        return experiment
    run = RunDirectory.open(Path(config.teacher))
    with contextlib.closing(Checkpoints.read_only(run.checkpoints)) as checkpoints:
        step = _choose_checkpoint(run, checkpoints, config.checkpoint)
    return dataclasses.replace(experiment, distill=dataclasses.replace(config, checkpoint=str(step)))


def _teacher(experiment: Experiment, dataset: AnyDataset, mesh: Mesh) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """What adds the teacher's scores to a batch."""
    config = experiment.distill
    teacher = load(Path(config.teacher or ""), mesh, config.checkpoint)
    tasks = (experiment.task, teacher.experiment.task)
    check_teacher(config, experiment.model, teacher.experiment.model, tasks, experiment.data)
    check(
        teacher.tokenizer.fingerprint() == dataset.tokenizer.fingerprint(),
        f"the teacher {config.teacher} has the tokenizer {teacher.tokenizer.fingerprint()} and the dataset"
        f" {dataset.tokenizer.fingerprint()}; set tokenizer.kind file:{config.teacher}/tokenizer",
    )
    return make_teacher(experiment.task, teacher.model, teacher.params, config, mesh)


def _maker(experiment: Experiment, dataset: AnyDataset) -> loader.Maker:
    return experiment.task.maker(experiment.model, dataset.tokenizer, dataset.labels)


def split_batches(
    dataset: AnyDataset, experiment: Experiment, split: str, batch_size: int, max_batches: int | None
) -> tuple[Callable[[], Any], int]:
    """A function that starts over with the batches of a split, each example once, and how many there are."""
    return store_batches(dataset.store(split), experiment, _maker(experiment, dataset), batch_size, max_batches)


def store_batches(
    store: TokenStore | Mixture, experiment: Experiment, make: loader.Maker, batch_size: int, max_batches: int | None
) -> tuple[Callable[[], Any], int]:
    """`split_batches` of a store."""
    count = loader.n_evaluation_batches(
        store, experiment.data, make=make, batch_size=batch_size, max_batches=max_batches
    )
    batches = functools.partial(
        loader.evaluation_batches,
        store,
        experiment.data,
        make=make,
        batch_size=batch_size,
        max_batches=max_batches,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    return batches, count


def _fit(run: RunDirectory, parts: _Parts, reporter: Reporter, stop_at: int | None) -> Outcome:
    run.set_status("running")
    handler = logging.FileHandler(run.path / "log.txt", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("lm")
    logger.addHandler(handler)
    try:
        outcome = fit(
            run,
            parts.model,
            parts.program,
            parts.feed,
            parts.experiment.train,
            parts.total_steps,
            reporter=reporter,
            fingerprint=parts.dataset.tokenizer.fingerprint(),
            stop_at=stop_at,
        )
    except BaseException as error:
        with contextlib.suppress(OSError):  # on a full disk it can't be written either; what was raised says so
            run.set_status("failed", reason=str(error) or type(error).__name__)
        logger.info("failed: %s", error)  # for log.txt; whoever called us tells the person
        raise
    finally:
        logger.removeHandler(handler)
        handler.close()
    run.set_status(outcome.state, step=outcome.step, reason=outcome.reason)
    if isinstance(parts.dataset, MixedDatasets):
        data, batch_size = parts.experiment.data, parts.experiment.train.batch_size
        store = parts.dataset.store("train")
        make = _maker(parts.experiment, parts.dataset)
        seen = loader.epochs_seen(store, data, make=make, batch_size=batch_size, step=outcome.step)
        run.write("epochs.json", {"step": outcome.step, "epochs": seen})
        for name, epochs in seen.items():
            reporter.message(f"{epochs:.2f} epochs of {name}")
    return outcome


@dataclass(frozen=True)
class Trained:
    """A trained run, ready to be used."""

    experiment: Experiment
    tokenizer: Tokenizer
    model: Transformer
    params: Any
    step: int

    def prompt_ids(self, text: str) -> list[int]:
        """A prompt as documents begin in training: packed documents after bos; in a stream, after the eos before them.

        In a stream, where text is cut anywhere, only a prompt without text must begin at a document's begin. Sources
        have an end: of an encoder-decoder that is all, a decoder alone begins them as a document.
        """
        ids = self.tokenizer.encode(text)
        if self.model.config.encoder_layers:
            return [*ids, self.tokenizer.eos_id]
        if self.experiment.task.kind == "seq2seq":
            return [self.tokenizer.bos_id, *ids, self.tokenizer.eos_id]
        if self.experiment.data.packing != "stream":
            return [self.tokenizer.bos_id, *ids]
        return ids or [self.tokenizer.eos_id]


def load(path: Path, mesh: Mesh, checkpoint: str = "best") -> Trained:
    """Reads a run's parameters (their average where the run keeps one) onto a mesh.

    Args:
      path: the run directory.
      mesh: any mesh.
      checkpoint: `best` (by validation loss; the latest where there was no evaluation), `latest`, or a step.

    Raises:
      UserError: no such run or checkpoint.
    """
    run = RunDirectory.open(path)
    experiment = load_experiment(run)
    model = Transformer(experiment.model)
    shapes, shardings = abstract_params(model, mesh)
    averaged = experiment.train.ema_decay > 0

    def stored(shape: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape.shape, jnp.float32 if averaged else shape.dtype, sharding=sharding)

    target = jax.tree.map(stored, shapes, shardings)
    checkpoints = Checkpoints.read_only(run.checkpoints)
    try:
        step = _choose_checkpoint(run, checkpoints, checkpoint)
        name = "ema" if averaged else "params"
        params = checkpoints.restore(step, {name: target})[name]
    finally:
        checkpoints.close()
    return Trained(experiment, load_tokenizer(run.tokenizer), model, params, step)


def _choose_checkpoint(run: RunDirectory, checkpoints: Checkpoints, wanted: str) -> int:
    steps = checkpoints.steps()
    check(steps, f"{run.path} has no complete checkpoint yet; train it further with `lm train --resume {run.path}`")
    if wanted == "best":
        # As the latest checkpoint has it: best.json may be ahead, of a checkpoint that a crash kept from being whole.
        best = checkpoints.restore_extra(steps[-1])["progress"]["best_step"]
        return best if best in steps else steps[-1]
    if wanted == "latest":
        return steps[-1]
    shown = ", ".join(map(str, steps))
    check(
        wanted in map(str, steps),
        f"{run.path} has no checkpoint {wanted!r}; choose best, latest or one of {shown}",
    )
    return int(wanted)


def evaluate_run(
    path: Path,
    *,
    split: str = "validation",
    checkpoint: str = "best",
    mesh: MeshConfig | None = None,
    max_batches: int | None = None,
    with_baselines: bool = False,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Evaluates a run on a split of its dataset.

    Returns:
      `step`, `split`, `loss`, `perplexity`, `accuracy`, `tokens`, `bits_per_byte` and, if asked for, the bits per byte
      of two baselines on the same text; of an `AnsweringTask` also the scores of its texts.
    """
    run = RunDirectory.open(path)
    devices = make_mesh(mesh or MeshConfig())
    trained = load(path, devices, checkpoint)
    dataset = dataset_of(run, trained.experiment, None)
    rows = devices.shape["data"] * devices.shape["fsdp"]
    batch_size = math.ceil(trained.experiment.train.batch_size / rows) * rows
    batches, total = split_batches(dataset, trained.experiment, split, batch_size, max_batches)
    with jax.set_mesh(devices):
        shardings = jax.tree.map(lambda x: x.sharding, trained.params)
        step = make_eval_step(trained.model, trained.experiment.task, devices, shardings)
        result = evaluate(
            step,
            trained.params,
            batches(),
            devices,
            tokens_per_byte=dataset.tokens_per_byte(split) if trained.experiment.task.spells_text else None,
            summarise=trained.experiment.task.summarise,
            on_batch=lambda done: on_batch(done, total),
        )
        result |= _text_scores(trained, dataset, split, batch_size, max_batches, devices)
    report: dict[str, Any] = {"step": trained.step, "split": split, **result}
    if with_baselines:
        report |= baselines(split_text(dataset, split))
    return report


def _text_scores(
    trained: Trained, dataset: AnyDataset, split: str, batch_size: int, max_batches: int | None, mesh: Mesh
) -> dict[str, float]:
    """Scores of the texts that a model gives, where its task has any and the batches hold a whole one."""
    experiment, task = trained.experiment, trained.experiment.task
    if not isinstance(task, AnsweringTask):
        return {}
    make = _maker(experiment, dataset)
    opened = dataset.store(split)
    texts: list[tuple[str, Sequence[str]]] = []
    for store in opened.stores if isinstance(opened, Mixture) else [opened]:
        batches, count = store_batches(store, experiment, make, batch_size, max_batches)
        said = spoken(functools.partial(task.say, trained.model), trained.params, batches(), mesh)
        texts += task.texts(said, store, make(store, experiment.data, False))
        max_batches = None if max_batches is None else max_batches - count
        if max_batches == 0:
            break
    return task.score_texts(texts) if texts else {}


def split_text(dataset: AnyDataset, split: str) -> Iterator[bytes]:
    """The text of each document of a split, as its tokens spell it, in UTF-8."""
    opened = dataset.store(split)
    for store in opened.stores if isinstance(opened, Mixture) else [opened]:
        for start, stop in itertools.pairwise(store.document_offsets):
            ids = store.read(int(start), int(stop) - 1)
            yield dataset.tokenizer.decode(ids.tolist()).encode()


def inference_mesh() -> Mesh:
    """One device: where generation runs."""
    return make_mesh(MeshConfig(data=1, devices=1))
