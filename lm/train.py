"""Training: the state, the one sharded step, and the loop around it."""

import contextlib
import dataclasses
import functools
import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lm import metrics
from lm.checkpoint import Checkpoints
from lm.errors import check
from lm.evaluate import evaluate, make_eval_step, to_devices
from lm.models.transformer import Transformer, flops_per_token
from lm.records import MetricWriter, RunDirectory
from lm.sharding import batch_sharding, parameter_shardings, peak_flops, shardings_like
from lm.tasks.causal_lm import CausalLM

Array = jax.Array
Batch = Mapping[str, np.ndarray]

# What each stream of random numbers is for: keys are fold_in(seed, purpose, step), never carried along.
INIT, DROPOUT = 0, 1


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Length, batch, evaluation and saving of a run."""

    steps: int | None = None
    """Length of the run in optimizer steps. Give exactly one of steps, tokens and epochs."""
    tokens: int | None = None
    """Length of the run in training tokens, rounded up to whole steps."""
    epochs: float | None = None
    """Length of the run in passes over the training data, rounded up to whole steps."""
    batch_size: int = 16
    """Sequences per optimizer step, over all devices and accumulation steps."""
    accumulate: int = 1
    """Parts into which each batch is cut to save memory; the result is that of the whole batch."""
    seed: int = 0
    """Seed of initial parameters and dropout; the order of the data has its own, data.seed."""
    log_every: int = 10
    """Steps between training records."""
    eval_every: int = 100
    """Steps between evaluations on the validation split, which also takes place at the end; 0 = only then."""
    eval_batches: int | None = None
    """At most so many validation batches; None = the whole split."""
    save_every: int = 100
    """Steps between checkpoints, of which one is also written at the end; 0 = only then."""
    keep: int = 2
    """How many of the latest checkpoints to keep, besides the best by validation loss."""
    patience: int | None = None
    """Stop after so many evaluations in a row without a better validation loss; None = never."""
    ema_decay: float = 0.0
    """Decay per step of an average of the parameters, used for evaluation and generation; 0 = no average."""
    non_finite: Literal["halt", "skip"] = "halt"
    """At a loss or gradient that is not finite (never applied): stop the run, or skip the batch and count it."""

    def __post_init__(self) -> None:
        """Checks what can be told without data or devices."""
        given = [name for name in ("steps", "tokens", "epochs") if getattr(self, name) is not None]
        check(
            len(given) <= 1,
            f"train.{' and train.'.join(given)} are both set; a run's length is exactly one of steps, tokens, epochs:"
            " set the others to None",
        )
        for name in ("steps", "tokens", "epochs", "patience"):
            value = getattr(self, name)
            check(value is None or value > 0, f"train.{name} is {value}; it must be above 0, or None")
        for name in ("batch_size", "accumulate", "log_every", "keep"):
            check(getattr(self, name) >= 1, f"train.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("eval_every", "save_every"):
            check(getattr(self, name) >= 0, f"train.{name} is {getattr(self, name)}; it must be 0 or more")
        check(
            self.eval_batches is None or self.eval_batches >= 1,
            f"train.eval_batches is {self.eval_batches}; it must be at least 1, or None",
        )
        check(0 <= self.ema_decay < 1, f"train.ema_decay is {self.ema_decay}; it is in [0, 1)")

    def total_steps(self, *, tokens_per_step: int, steps_per_epoch: float) -> int:
        """The run's length in steps."""
        if self.steps is not None:
            return self.steps
        if self.tokens is not None:
            return math.ceil(self.tokens / tokens_per_step)
        check(
            self.epochs is not None, "the run has no length; set exactly one of train.steps, train.tokens, train.epochs"
        )
        assert self.epochs is not None
        return math.ceil(self.epochs * steps_per_epoch)


@struct.dataclass
class TrainState:
    """Everything a step changes. `step` counts batches, `skipped` those that were not applied."""

    step: Array
    params: Any
    opt_state: Any
    ema: Any
    skipped: Array


TrainStep = Callable[[TrainState, Mapping[str, Array]], tuple[TrainState, dict[str, Array]]]


def random_key(seed: int, purpose: int, step: int | Array = 0) -> Array:
    """The key of one purpose at one step."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), purpose), step)


@functools.lru_cache(maxsize=4)  # tracing a deep model takes seconds, and three places of a start ask for it
def abstract_params(model: Transformer, mesh: Mesh) -> tuple[Any, Any]:
    """Shapes and dtypes of the parameters, and their shardings."""
    boxed = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    return nn.unbox(boxed), parameter_shardings(boxed, mesh)


def make_init(model: Transformer, tx: optax.GradientTransformation, ema: bool, seed: int) -> Callable[[], TrainState]:
    """A function that makes the initial state; run it jitted, where its values depend on the seed alone."""

    def init() -> TrainState:
        tokens = jnp.zeros((1, 1), jnp.int32)
        params = nn.unbox(model.init(random_key(seed, INIT), tokens)["params"])
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=tx.init(params),
            # A copy: a donated state must not hold one buffer twice.
            ema=jax.tree.map(jnp.copy, params) if ema else None,
            skipped=jnp.zeros((), jnp.int32),
        )

    return init


def make_train_step(
    model: Transformer,
    task: CausalLM,
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    config: TrainConfig,
) -> TrainStep:
    """One optimizer step, `(state, batch) -> (state, metrics)`, to be jitted.

    The gradient is that of the objective summed over the whole batch and divided once by the whole weight, however
    the batch is cut into accumulation steps or spread over devices. A loss or gradient that is not finite leaves
    parameters, optimizer state and averages as they were.
    """

    def loss_and_grad(params: Any, batch: Mapping[str, Array], key: Array):
        def objective(params: Any):
            return task.loss(model, params, dict(batch), key)

        return jax.value_and_grad(objective, has_aux=True)(params)

    def accumulated(params: Any, batch: Mapping[str, Array], key: Array):
        if config.accumulate == 1:
            return loss_and_grad(params, batch, jax.random.fold_in(key, 0))

        def part_rows(x: Array) -> Array:
            # Every part takes rows from all over the batch, so that each device keeps its own.
            return jnp.swapaxes(x.reshape(-1, config.accumulate, *x.shape[1:]), 0, 1)

        def add(total: Any, part: Any):
            index, rows = part
            return jax.tree.map(jnp.add, total, loss_and_grad(params, rows, jax.random.fold_in(key, index))), None

        parts = jax.tree.map(part_rows, dict(batch))
        first = jax.eval_shape(lambda: loss_and_grad(params, jax.tree.map(lambda x: x[0], parts), key))
        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)
        return jax.lax.scan(add, zero, (jnp.arange(config.accumulate), parts))[0]

    def step(state: TrainState, batch: Mapping[str, Array]) -> tuple[TrainState, dict[str, Array]]:
        key = random_key(config.seed, DROPOUT, state.step)
        (objective, sums), grads = accumulated(state.params, batch, key)
        weight = jnp.where(sums["weight"] > 0, sums["weight"], 1.0)
        grads = jax.tree.map(lambda g: g / weight.astype(g.dtype), grads)
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(objective) & jnp.isfinite(grad_norm)

        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema is not None:
            ema = optax.incremental_update(params, ema, 1.0 - config.ema_decay)
        new = (params, opt_state, ema)
        old = (state.params, state.opt_state, state.ema)
        params, opt_state, ema = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)

        applied = state.step - state.skipped
        skipped = state.skipped + jnp.where(finite, 0, 1)
        report = sums | {
            "objective": objective,
            "grad_norm": grad_norm,
            "param_norm": optax.tree.norm(params),
            "learning_rate": schedule(applied),
            "finite": finite,
            "skipped": skipped,
        }
        return TrainState(state.step + 1, params, opt_state, ema, skipped), report

    return step


@dataclass(frozen=True)
class Program:
    """The compiled parts of a run and the layout of its state."""

    mesh: Mesh
    target: TrainState
    """Shapes, dtypes and shardings of the state."""
    init: Callable[[], TrainState]
    train_step: TrainStep
    eval_step: Any


def make_program(
    model: Transformer,
    task: CausalLM,
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    config: TrainConfig,
    mesh: Mesh,
) -> Program:
    """Jits initialisation, step and evaluation with explicit layouts: the state is born sharded."""
    make_state = make_init(model, tx, config.ema_decay > 0, config.seed)
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(make_state)
    params, param_shardings = abstract_params(model, mesh)
    shardings = shardings_like(shapes, params, param_shardings, mesh)
    target = jax.tree.map(lambda s, at: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at), shapes, shardings)
    whole = NamedSharding(mesh, PartitionSpec())
    train_step = jax.jit(
        make_train_step(model, task, tx, schedule, config),
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, whole),
        donate_argnums=0,
    )
    return Program(
        mesh=mesh,
        target=target,
        init=jax.jit(make_state, out_shardings=shardings),
        train_step=train_step,
        eval_step=make_eval_step(model, task, mesh, param_shardings),
    )


@dataclass(frozen=True)
class Feed:
    """A run's data, as functions of the step."""

    train: Callable[[int], Iterator[Batch]]
    """Batches from a step on, without end."""
    documents: Callable[[int], list[list[str]]]
    """The documents in each row of a step's batch."""
    seq_len: int
    validation: Callable[[], Iterable[Batch]] | None = None
    """The validation batches, or None when there is no such split."""
    validation_batches: int = 0
    tokens_per_byte: float | None = None
    """Of the validation split."""


class Reporter(Protocol):
    """What shows a run to a person. Every method may do nothing."""

    def start(self, step: int, total: int) -> None:
        """Training begins at `step` of `total`."""

    def train(self, record: dict[str, Any]) -> None:
        """A training record."""

    def evaluating(self, done: int, total: int) -> None:
        """`done` of `total` batches of an evaluation."""

    def evaluated(self, record: dict[str, Any]) -> None:
        """A validation record."""

    def message(self, text: str) -> None:
        """A line to keep."""

    def close(self) -> None:
        """The end, good or bad."""


class TrainingHaltedError(Exception):
    """A loss or gradient was not finite and `train.non_finite` is `halt`."""


@dataclass
class Progress:
    """What a checkpoint holds besides arrays."""

    seconds: float = 0.0
    """Time spent training so far, over all sessions."""
    best_step: int | None = None
    best_loss: float | None = None
    stale: int = 0
    """Evaluations since the best."""


@dataclass(frozen=True)
class Outcome:
    """How a call of `fit` ended."""

    state: Literal["finished", "preempted"]
    step: int
    reason: str
    validation: dict[str, float] | None = field(default=None)


class StopSignals:
    """While entered, SIGTERM and the first Ctrl-C ask for a stop instead of ending the process."""

    def __init__(self) -> None:
        self.received: str | None = None

    def __enter__(self) -> "StopSignals":
        def handle(number: int, _: Any) -> None:
            if self.received is not None and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.received = signal.Signals(number).name

        self._previous = {}
        for number in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(ValueError):  # not the main thread: whoever runs us there handles signals
                self._previous[number] = signal.signal(number, handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)


def fit(
    run: RunDirectory,
    model: Transformer,
    program: Program,
    feed: Feed,
    config: TrainConfig,
    total_steps: int,
    *,
    reporter: Reporter,
    fingerprint: str,
    stop_at: int | None = None,
) -> Outcome:
    """Trains from the last checkpoint, or from the start, to `total_steps`.

    The order within a step is: train, log, evaluate, save, and only then look for a request to stop; so whatever was
    due at a step is done before the run can end there, and a resumed run owes nothing.

    Args:
      run: the run directory, locked.
      model: the Transformer, for its FLOP count.
      program: its compiled parts.
      feed: the data.
      config: lengths and intervals.
      total_steps: where the run ends.
      reporter: what shows progress.
      fingerprint: of the tokenizer; a checkpoint with another one is refused.
      stop_at: stop after this step as if a SIGTERM had come.

    Raises:
      TrainingHaltedError: something was not finite.
      UserError: the checkpoint is of another model.
    """
    with StopSignals() as signals, jax.set_mesh(program.mesh), contextlib.ExitStack() as resources:
        checkpoints = Checkpoints(run.checkpoints, keep=config.keep)
        resources.callback(checkpoints.close)
        state, progress = _restore_or_init(checkpoints, program, fingerprint)
        first = int(state.step)
        writer = MetricWriter(run, first)
        resources.callback(writer.close)
        resources.callback(reporter.close)
        reporter.start(first, total_steps)
        batches = feed.train(first)
        resources.callback(getattr(batches, "close", lambda: None))
        loop = _Loop(
            run, model, program, feed, config, total_steps, reporter, fingerprint, checkpoints, writer, progress
        )
        return loop.run(state, batches, signals, stop_at)


def check_resumable(run: RunDirectory, program: Program, fingerprint: str) -> int:
    """The step from which `fit` would continue; writes nothing.

    Raises:
      UserError: the last checkpoint is of another model or tokenizer.
    """
    if not run.checkpoints.exists():
        return 0
    with contextlib.closing(Checkpoints.read_only(run.checkpoints)) as checkpoints:
        latest = _latest(checkpoints, fingerprint)
        if latest is None:
            return 0
        checkpoints.compare(latest, program.target)
        return latest


def _latest(checkpoints: Checkpoints, fingerprint: str) -> int | None:
    latest = checkpoints.latest()
    if latest is not None:
        trained_with = checkpoints.restore_extra(latest)["tokenizer"]
        check(
            trained_with == fingerprint,
            f"the checkpoint was trained with tokenizer {trained_with}, the data has {fingerprint};"
            " use the dataset the run was started with",
        )
    return latest


def _restore_or_init(checkpoints: Checkpoints, program: Program, fingerprint: str) -> tuple[TrainState, Progress]:
    latest = _latest(checkpoints, fingerprint)
    if latest is None:
        return program.init(), Progress()
    progress = Progress(**checkpoints.restore_extra(latest)["progress"])
    return checkpoints.restore(latest, program.target), progress


@dataclass
class _Loop:
    """The state of the loop that is not the model's."""

    run_directory: RunDirectory
    model: Transformer
    program: Program
    feed: Feed
    config: TrainConfig
    total: int
    reporter: Reporter
    fingerprint: str
    checkpoints: Checkpoints
    writer: MetricWriter
    progress: Progress
    saved: int | None = None
    validation: dict[str, float] | None = None

    def run(self, state: TrainState, batches: Iterator[Batch], signals: StopSignals, stop_at: int | None) -> Outcome:
        config = self.config
        step = first = int(state.step)
        self.saved = first if first else None
        clock = _Clock(self.progress.seconds)
        waiting: tuple[int, dict[str, Array]] | None = None
        while step < self.total and not self.out_of_patience():
            batch = to_devices(clock.wait_for(batches), self.program.mesh)
            state, report = self.program.train_step(state, batch)
            step += 1
            # The report of the step before: reading this one now would make the device wait for the host.
            self.read(waiting, clock)
            waiting = (step, report)

            last = step == self.total
            stop = signals.received is not None or step == stop_at
            evaluate_now = self.feed.validation is not None and (last or _due(step, config.eval_every))
            save_now = last or stop or _due(step, config.save_every)
            if evaluate_now or save_now:
                self.read(waiting, clock)
                waiting = None
            if evaluate_now:
                save_now = self.evaluate(step, state, clock) or save_now
                if self.out_of_patience():
                    last = save_now = True
            if save_now:
                self.save(step, state, clock)
            if last:
                break
            if stop:  # a signal since then is served after the next step, whose report will have been read
                self.checkpoints.wait()
                return Outcome("preempted", step, signals.received or f"asked to stop at step {step}", self.validation)
        self.checkpoints.wait()
        patience = f"no better validation loss in {config.patience} evaluations"
        return Outcome("finished", step, patience if self.out_of_patience() else "all steps done", self.validation)

    def out_of_patience(self) -> bool:
        """Whether the run ends early: also asked of a restored run, which may have been killed just after its end."""
        return self.config.patience is not None and self.progress.stale >= self.config.patience

    def read(self, waiting: tuple[int, dict[str, Array]] | None, clock: "_Clock") -> None:
        """Reads a step's report back, logs it when due, and halts on what is not finite."""
        if waiting is None:
            return
        step, report = waiting
        values = {name: float(value) for name, value in jax.device_get(report).items()}
        clock.step_done()
        tokens_per_step = self.config.batch_size * self.feed.seq_len
        if not values["finite"] and self.config.non_finite == "halt":
            self.halt(step, values)
        if step % self.config.log_every and step != self.total:
            return
        seconds, waited, steps = clock.take()
        speed = tokens_per_step * steps / seconds
        flops = speed * flops_per_token(self.model.config, self.feed.seq_len)
        peak = peak_flops(self.program.mesh.devices.flat[0])
        record = {
            "step": step,
            "split": "train",
            "tokens": step * tokens_per_step,
            "seconds": round(clock.total, 3),
            **metrics.summarise(values),
            "objective": values["objective"] / values["weight"] if values["weight"] else math.nan,
            "learning_rate": values["learning_rate"],
            "grad_norm": values["grad_norm"],
            "param_norm": values["param_norm"],
            "skipped": int(values["skipped"]),
            "tokens_per_second": round(speed, 1),
            "step_seconds": round(seconds / steps, 5),
            "data_wait_seconds": round(waited / steps, 5),
            "model_flops_per_second": flops,
        }
        if peak is not None:
            record["mfu"] = flops / (peak * self.program.mesh.size)
        self.writer.write(record)
        self.reporter.train(record)

    def halt(self, step: int, values: dict[str, float]) -> None:
        """Stops at a step that was not applied."""
        self.checkpoints.wait()
        documents = sorted({key for row in self.feed.documents(step - 1) for key in row})
        shown = ", ".join(documents[:5]) + (f" and {len(documents) - 5} more" if len(documents) > 5 else "")
        latest = self.checkpoints.latest()
        raise TrainingHaltedError(
            f"step {step}: loss sum {values['objective']}, gradient norm {values['grad_norm']}; the update was not"
            f" applied. Documents in its batch: {shown}. Last good checkpoint:"
            f" {'none' if latest is None else f'step {latest}'}. Lower optim.peak_lr, look at these documents, or set"
            " train.non_finite to skip."
        )

    def evaluate(self, step: int, state: TrainState, clock: "_Clock") -> bool:
        """Evaluates, logs and returns whether this is the best so far."""
        assert self.feed.validation is not None
        started = time.monotonic()
        params = state.params if state.ema is None else state.ema
        total = self.feed.validation_batches
        result = evaluate(
            self.program.eval_step,
            params,
            self.feed.validation(),
            self.program.mesh,
            tokens_per_byte=self.feed.tokens_per_byte,
            on_batch=lambda done: self.reporter.evaluating(done, total),
        )
        took = time.monotonic() - started
        clock.leave_out(took)
        tokens_seen = step * self.config.batch_size * self.feed.seq_len
        scored = result.pop("tokens")
        record = {
            "step": step,
            "split": "validation",
            "tokens": tokens_seen,
            "seconds": round(clock.total, 3),
            **result,
            "scored_tokens": int(scored),
            "evaluation_seconds": round(took, 3),
        }
        self.writer.write(record)
        self.reporter.evaluated(record)
        self.validation = result
        best = self.progress.best_loss
        better = math.isfinite(result["loss"]) and (best is None or result["loss"] < best)
        if better:
            self.progress.best_step, self.progress.best_loss, self.progress.stale = step, result["loss"], 0
        else:
            self.progress.stale += 1
        return better

    def save(self, step: int, state: TrainState, clock: "_Clock") -> None:
        """Starts a checkpoint, once a step."""
        if self.saved == step:
            return
        self.progress.seconds = clock.total
        extra = {
            "examples": step * self.config.batch_size,
            "tokenizer": self.fingerprint,
            "progress": dataclasses.asdict(self.progress),
        }
        self.checkpoints.save(step, state, extra, best=self.progress.best_step)
        self.saved = step
        if self.progress.best_step is not None:
            best = {"step": self.progress.best_step, "loss": self.progress.best_loss}
            self.run_directory.write("best.json", best)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


class _Clock:
    """Time spent training, without evaluation; time spent waiting for data."""

    def __init__(self, already: float):
        self._origin = time.monotonic() - already
        self._mark = time.monotonic()
        self._waited = 0.0
        self._steps = 0

    @property
    def total(self) -> float:
        return time.monotonic() - self._origin

    def wait_for(self, batches: Iterator[Batch]) -> Batch:
        started = time.monotonic()
        batch = next(batches)
        self._waited += time.monotonic() - started
        return batch

    def step_done(self) -> None:
        self._steps += 1

    def leave_out(self, seconds: float) -> None:
        self._origin += seconds
        self._mark += seconds

    def take(self) -> tuple[float, float, int]:
        """Seconds, seconds waited and steps since the last call."""
        now = time.monotonic()
        taken = max(now - self._mark, 1e-9), self._waited, max(self._steps, 1)
        self._mark, self._waited, self._steps = now, 0.0, 0
        return taken
