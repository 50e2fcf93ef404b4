"""Training from beginning to end, or from where it was stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from lm import cluster, tree
from lm import config as configs
from lm.checkpoint import Checkpoints
from lm.config import Experiment
from lm.data import loader
from lm.data.mixture import MixedDatasets, open_mixture
from lm.data.objectives.taught import TaughtExamples, load_lessons
from lm.data.prepare import Progress
from lm.errors import UserError, check
from lm.loop import Feed, Outcome, Reporter, check_resumable, fit
from lm.models.transformer import HOST, ModelConfig, Transformer
from lm.optim import check_patterns, freezing, make_optimizer, make_schedule
from lm.records import FLAGS, RunDirectory, differences, environment
from lm.run.begin import begun, check_parent, tuned_rates, with_parent
from lm.run.datasets import AnyDataset, check_has_dataset, dataset_of, described, maker, prepared, split_batches
from lm.run.use import choose_checkpoint, load, load_experiment
from lm.sharding import check_batch, check_length, make_mesh, process_rows
from lm.tasks import Task
from lm.tasks.distillation import Distilled, check_lessons, check_teacher, make_teacher
from lm.text.tokenizer import TokenizerConfig, check_tokenizer_config, is_trained, train_tokenizer
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
    "train.hang_minutes",
)


def check_shares(experiment: Experiment, sizes: Mapping[str, int]) -> None:
    """Raises UserError unless rows and their tokens divide evenly over a mesh whose axes have such sizes."""
    model, train = experiment.model, experiment.train
    check_batch(sizes, train.batch_size, train.accumulate)
    seq_len, source_len = experiment.task.lengths(experiment.data)
    prompt = " with model.prompt_len" if model.prompt_len else ""
    check_length(sizes, seq_len + model.prompt_len, model.mask == "causal", f"a row (data.seq_len{prompt})")
    if model.encoder_layers:
        check_length(sizes, source_len, False, "a source (data.seq_len, or task.source_len where the task has it)")


def check_experiment(experiment: Experiment) -> Mesh:
    """Everything that can be told wrong before text is read or a file is written; returns the mesh."""
    mesh = make_mesh(experiment.mesh)
    check_shares(experiment, mesh.shape)
    device = jax.local_devices()[0]
    check(
        experiment.model.remat != "offload" or HOST in {memory.kind for memory in device.addressable_memories()},
        f"model.remat is offload, and a {device.device_kind} device reaches no {HOST} memory; choose dots or full",
    )
    model, data, tokenizer, task = experiment.model, experiment.data, experiment.tokenizer, experiment.task
    loader.check_loader_config(data)
    task.check(model, data)
    seq_len, source_len = task.lengths(data)
    prompt = f" less model.prompt_len {model.prompt_len}" if model.prompt_len else ""
    check(
        data.seq_len <= model.context,
        f"data.seq_len {data.seq_len} is longer than model.max_len {model.max_len}{prompt};"
        " raise one or lower the other",
    )
    check(
        not model.prompt_len or data.packing != "documents",
        f"model.prompt_len is {model.prompt_len}, and with data.packing documents a row holds several texts behind one"
        " prompt; set data.packing to pad, or to stream",
    )
    check(
        not model.encoder_layers or source_len <= model.max_len,
        f"sources have {source_len} tokens, more than model.max_len {model.max_len}; raise it, or lower data.seq_len"
        " (or task.source_len, where the task has one)",
    )
    best = experiment.train.best
    check(
        best in task.reports,
        f"train.best is {best!r}, which task {task.kind} doesn't report; choose one of {', '.join(task.reports)}",
    )
    if experiment.distill.teacher is not None:
        RunDirectory.open(Path(experiment.distill.teacher))
    if experiment.distill.saved is not None:
        load_lessons(Path(experiment.distill.saved))
        check(
            not data.mixture.datasets,
            "distill.saved is of the examples of one dataset, and data.mixture.datasets names several; set"
            " distill.teacher instead",
        )
    if data.mixture.datasets:
        for name, default, value in configs.changed(Experiment(), experiment):
            check(
                name.split(".")[0] not in ("tokenizer", "clean", "dedup", "augment"),
                f"{name} is {value!r}, but data.mixture.datasets are prepared already; leave it at {default!r}",
            )
    else:
        for name, is_set in (("patience", experiment.train.patience is not None), ("best", best != "loss")):
            check(
                not is_set or data.validation_source is not None or data.validation_fraction > 0,
                f"train.{name} needs a validation split; set data.validation_fraction or data.validation_source",
            )
        check_tokenizer_config(tokenizer)
    params, _ = abstract_params(Transformer(settled_model(experiment)), mesh)
    train = experiment.train
    if train.steps is not None or train.tokens is not None:
        steps = train.total_steps(tokens_per_step=train.batch_size * seq_len, steps_per_epoch=math.nan)
    else:
        check(train.epochs is not None, "the run has no length; set one of train.steps, train.tokens and train.epochs")
        steps = 10**6
    patterns = experiment.optim
    if patterns.rates == tuned_rates(experiment.model):  # which may name heads that this model hasn't
        patterns = dataclasses.replace(patterns, rates=())
    check_patterns(patterns, params, steps if train.epochs is None else None)
    make_optimizer(experiment.optim, make_schedule(experiment.optim, steps), params)
    return mesh


def settled_model(experiment: Experiment) -> ModelConfig:
    """The model with what tokenizer and classes say of it, as far as that is known before text is read."""
    data, tokenizer = experiment.data, experiment.tokenizer
    labels: Sequence[str] = data.labels
    if data.mixture.datasets:
        mixed = open_mixture(data.mixture)
        ids, labels = mixed.tokenizer.vocab_size, mixed.labels
    else:
        ids = tokenizer.vocab_size if is_trained(tokenizer) else train_tokenizer(tokenizer, ()).vocab_size
    return experiment.task.settle(experiment.model.with_vocabulary(ids), labels)


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
    asked = experiment
    with cluster.agreeing():
        experiment = with_parent(experiment)
        mesh = check_experiment(experiment)
        RunDirectory.check_new(path)
        experiment = _with_settled_teacher(experiment)
    census(experiment, mesh)
    with contextlib.ExitStack() as undo:
        with cluster.agreeing():
            dataset = undo.enter_context(prepared(experiment, progress))
            model = experiment.model.with_vocabulary(dataset.tokenizer.vocab_size)
            model = experiment.task.settle(model, dataset.labels)
            experiment = dataclasses.replace(experiment, model=model)
            parts = _Parts.build(experiment, dataset, mesh, reporter)
            new: tuple[str, ...] = ()
            if experiment.init_from.run is not None:
                fingerprint = dataset.tokenizer.fingerprint()
                shapes, _ = abstract_params(parts.model, mesh)
                new = check_parent(experiment, fingerprint, shapes, mesh)
                moves = dict(tree.path_leaves(freezing(experiment.optim, shapes).moves))
                drawn = [path for path in new if not moves[path] and "/lora_" not in path]
                check(
                    not drawn,
                    f"{', '.join(drawn)} would begin anew and stay as drawn, as optim.rates freezes it; give it a"
                    " factor above 0",
                )
        cluster.check_agreed({"dataset": dataset.fingerprint}, "the same text and tokenizer")
    if parts.feed.validation is None:
        reporter.message(
            "no validation split, so nothing will be evaluated: no document fell into it; make more and smaller"
            " documents (data.document paragraph or line), raise data.validation_fraction or set data.validation_source"
        )
    if experiment.init_from.run is not None:
        begins_anew = f"; new are {', '.join(new)}" if new else ""
        reporter.message(
            f"begins with the parameters of {experiment.init_from.run} at step {experiment.init_from.checkpoint}"
            f"{begins_anew}"
        )
        if asked.tokenizer not in (TokenizerConfig(), experiment.tokenizer):
            reporter.message(
                f"the tokenizer is that of {experiment.init_from.run}, none of kind {asked.tokenizer.kind} is trained"
                " (init_from.resize_vocab would let the data have its own)"
            )
    target = parts.program.target
    trained, whole = (tree.count_parameters(part) for part in (target.params, (target.params, target.frozen)))
    if trained < whole:
        reporter.message(f"{trained:,} of {whole:,} parameters are trained ({trained / whole:.2%}), the others frozen")
    if parts.cut:
        reporter.message(
            f"{parts.cut} of {parts.examples} training documents are longer than a row and lose a part; a larger"
            " data.seq_len (or task.source_len) keeps it"
        )
    made = [entry for entry in (path / "log.txt", path, *path.parents) if not entry.exists()]
    with cluster.agreeing():
        run = RunDirectory.create(path, writes=cluster.leads())
        run.lock()
    try:
        _check_shared(run, made)
        with cluster.agreeing():
            if run.writes:
                _describe(run, experiment, dataset)
        return _fit(run, parts, reporter, stop_at)
    finally:
        run.unlock()


def _check_shared(run: RunDirectory, made: Sequence[Path]) -> None:
    """Raises `UserError` unless all processes can write to the new run; then what was `made` of it is gone again."""
    try:
        cluster.check_shared(run.path)
    except UserError:
        if run.writes:
            with contextlib.suppress(OSError):  # another process has found a use for a folder
                for entry in made:
                    entry.rmdir() if entry.is_dir() else entry.unlink()
        raise


def _describe(run: RunDirectory, experiment: Experiment, dataset: AnyDataset) -> None:
    """Writes what a run is of."""
    run.write("environment.json", environment())
    run.write("dataset.json", described(dataset))
    dataset.tokenizer.save(run.tokenizer)
    parent = experiment.init_from.run
    original = RunDirectory(Path(parent or "")).pretrained
    # Tokenizer files among it would be those of another vocabulary.
    if parent is not None and experiment.init_from.resize_vocab == "no" and original.is_dir():
        shutil.copytree(original, run.pretrained, dirs_exist_ok=True)
    # Last, as it makes the folder a run: killed before, it can be started again, killed after, resumed.
    run.write("config.json", configs.to_dict(experiment))


def census(experiment: Experiment, mesh: Mesh) -> None:
    """What several processes compare before they begin; raises `UserError` in all where one has something else."""
    if jax.process_count() == 1:
        return
    known = environment()
    settings = json.dumps(configs.to_dict(experiment), sort_keys=True, ensure_ascii=False)
    facts = {f"package {name}": version for name, version in known["packages"].items()}
    facts |= {"python": known["python"], "commit": (known["git"] or {}).get("commit")}
    facts |= {name: known[name] for name in FLAGS}
    facts |= {"devices of each process": jax.local_device_count(), "device kind": known["devices"]["kind"]}
    cluster.check_agreed(facts | {"settings, hashed": hashlib.sha256(settings.encode()).hexdigest()[:16]})
    cluster.check_shared_out("row", process_rows(mesh, experiment.train.batch_size), experiment.train.batch_size)


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
    with cluster.agreeing():
        run = RunDirectory.open(path, writes=cluster.leads())
        run.lock()
    try:
        with cluster.agreeing():
            check_has_dataset(run)
            saved = load_experiment(run)
            experiment = override(saved)
            check_changes(saved, experiment)
            # The run has its tokenizer; the file it may have come from need not be there any more.
            own = dataclasses.replace(experiment, tokenizer=TokenizerConfig(kind=f"file:{run.tokenizer}"))
            mesh = check_experiment(own if not experiment.data.mixture.datasets else experiment)
        census(experiment, mesh)
        saved_any = cluster.gathered(run.checkpoints.is_dir())[0]
        cluster.check_shared(run.checkpoints if saved_any else path)
        with cluster.agreeing():
            dataset = dataset_of(run, experiment, progress, elsewhere=experiment.data.root != saved.data.root)
            parts = _Parts.build(experiment, dataset, mesh, reporter)
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
        run.write("dataset.json", described(dataset))
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
    """Documents that don't fit into a row and lose a part."""

    @classmethod
    def build(cls, experiment: Experiment, dataset: AnyDataset, mesh: Mesh, reporter: Reporter) -> _Parts:
        data, train = experiment.data, experiment.train
        task: Task = experiment.task
        make = maker(experiment, dataset)
        store = dataset.store("train")
        seq_len, source_len = task.lengths(data)
        if experiment.distill.saved is not None:
            make = _taught(experiment, dataset, make)
        examples, cut = loader.training_size(store, data, make=make)
        total = train.total_steps(
            tokens_per_step=train.batch_size * seq_len, steps_per_epoch=examples / train.batch_size
        )
        model = Transformer(experiment.model)
        enrich = None
        if experiment.distill.teacher is not None:
            enrich = _teacher(experiment, dataset, mesh)
        if experiment.distill.on:
            task = Distilled(task, experiment.distill)
        schedule = make_schedule(experiment.optim, total)
        params, _ = abstract_params(model, mesh)
        tx = make_optimizer(experiment.optim, schedule, params)
        freeze = freezing(experiment.optim, params)
        program = make_program(model, task, tx, schedule, train, mesh, freeze, experiment.mesh.rules)
        if experiment.init_from.run is not None:
            first = functools.partial(begun, program, experiment, dataset.tokenizer, mesh, reporter.message)
            program = dataclasses.replace(program, init=first)
        training = functools.partial(
            loader.training_batches,
            store,
            data,
            make=make,
            batch_size=train.batch_size,
            rows=process_rows(mesh, train.batch_size),
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
            rows = process_rows(mesh, train.batch_size)
            limits = train.batch_size, train.eval_batches
            batches, n_batches = split_batches(dataset, experiment, "validation", *limits, rows)
            feed = dataclasses.replace(
                feed,
                validation=batches,
                validation_batches=n_batches,
                tokens_per_byte=dataset.tokens_per_byte("validation") if task.spells_text else None,
            )
        else:
            for name, is_set in (("patience", train.patience is not None), ("best", train.best != "loss")):
                check(not is_set, f"train.{name} needs a validation split; set data.validation_fraction")
        return cls(experiment, dataset, model, program, feed, total, examples, cut)


def _with_settled_teacher(experiment: Experiment) -> Experiment:
    """The step of the teacher's checkpoint instead of its name: another may be the best when the run is resumed."""
    config = experiment.distill
    if config.saved is not None:
        lessons = load_lessons(Path(config.saved))
        return dataclasses.replace(experiment, distill=dataclasses.replace(config, fingerprint=lessons.fingerprint))
    if config.teacher is None:
        return experiment
    run = RunDirectory.open(Path(config.teacher))
    with contextlib.closing(Checkpoints.read_only(run.checkpoints)) as checkpoints:
        step = choose_checkpoint(run, checkpoints, config.checkpoint)
    return dataclasses.replace(experiment, distill=dataclasses.replace(config, checkpoint=str(step)))


def _taught(experiment: Experiment, dataset: AnyDataset, make: loader.Maker) -> loader.Maker:
    """Makes the examples with the logits that were saved of them."""
    config = experiment.distill
    folder = Path(config.saved or "")
    lessons = load_lessons(folder)
    check_lessons(config, experiment.model, experiment.task, lessons)
    _check_same_tokenizer(lessons.teacher, lessons.tokenizer, dataset)
    return lambda *asked: TaughtExamples(make(*asked), folder, config.top_k or lessons.top_k)


def _teacher(experiment: Experiment, dataset: AnyDataset, mesh: Mesh) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """What adds the teacher's scores to a batch."""
    config = experiment.distill
    teacher = load(Path(config.teacher or ""), mesh, config.checkpoint)
    tasks = (experiment.task, teacher.experiment.task)
    check_teacher(config, experiment.model, teacher.experiment.model, tasks, experiment.data)
    _check_same_tokenizer(config.teacher or "", teacher.tokenizer.fingerprint(), dataset)
    return make_teacher(experiment.task, teacher.model, teacher.params, config, mesh)


def _check_same_tokenizer(teacher: str, fingerprint: str, dataset: AnyDataset) -> None:
    check(
        fingerprint == dataset.tokenizer.fingerprint(),
        f"the teacher {teacher} has the tokenizer {fingerprint} and the dataset"
        f" {dataset.tokenizer.fingerprint()}; set tokenizer.kind file:{teacher}/tokenizer",
    )


def _fit(run: RunDirectory, parts: _Parts, reporter: Reporter, stop_at: int | None) -> Outcome:
    run.set_status("running")
    handler: logging.Handler = logging.NullHandler()
    if run.writes:
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
        make = maker(parts.experiment, parts.dataset)
        seen = loader.epochs_seen(store, data, make=make, batch_size=batch_size, step=outcome.step)
        run.write("epochs.json", {"step": outcome.step, "epochs": seen})
        for name, epochs in seen.items():
            reporter.message(f"{epochs:.2f} epochs of {name}")
    return outcome
