"""Training: its settings, the state, and the one sharded step. The loop around it is `lm.loop`."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lm import tree
from lm.errors import check
from lm.evaluate import make_eval_step
from lm.hardware import compiler_options
from lm.models.transformer import ModelConfig, Transformer
from lm.optim import Freeze, OptimConfig, freezing
from lm.sharding import DEFAULT_RULES, Rules, batch_sharding, parameter_shardings, ruled, shardings_like
from lm.tasks import Task

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
    """Steps between checkpoints; one is also written at the end and at every best evaluation; 0 = only then."""
    keep: int = 2
    """How many of the latest checkpoints to keep, besides the best (see best)."""
    best: str = "loss"
    """What of an evaluation makes a checkpoint the best: loss, or anything else that the task reports, such as
    accuracy or macro_f1. Of losses, perplexity and bits per byte the lowest is best, of all others the highest."""
    patience: int | None = None
    """Stop after so many evaluations in a row that were not the best so far (see best); None = never."""
    ema_decay: float = 0.0
    """Decay per step of an average of the parameters, used for evaluation and generation; 0 = no average."""
    hang_minutes: float = 0.0
    """End the run where no step, evaluated batch or checkpoint was done in so many minutes, once the first step is: the
    stacks of all threads go to stacks-PROCESS.txt in the run directory, and the exit status is 1; 0 = wait for ever."""
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
            check(value is None or 0 < value < math.inf, f"train.{name} is {value}; it must be above 0, or None")
        check(0 <= self.seed < 2**32, f"train.seed is {self.seed}; it must be from 0 to {2**32 - 1}")
        for name in ("batch_size", "accumulate", "log_every", "keep"):
            check(getattr(self, name) >= 1, f"train.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("eval_every", "save_every"):
            check(getattr(self, name) >= 0, f"train.{name} is {getattr(self, name)}; it must be 0 or more")
        check(
            self.eval_batches is None or self.eval_batches >= 1,
            f"train.eval_batches is {self.eval_batches}; it must be at least 1, or None",
        )
        check(
            0 <= self.hang_minutes < math.inf,
            f"train.hang_minutes is {self.hang_minutes}; it must be 0 (off) or more",
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


@dataclass(frozen=True, kw_only=True)
class InitConfig:
    """What a new run begins with."""

    run: str | None = None
    """Run directory, trained or imported, whose model, tokenizer and parameters it begins with; None = a new model."""
    checkpoint: str = "best"
    """The run's checkpoint: best, latest or a step."""
    merge: bool = False
    """Add the run's low-rank terms to the matrices that they stand beside; otherwise they are trained on."""
    resize_vocab: Literal["no", "mean", "pieces"] = "no"
    """Take another tokenizer than the run's: rows of pieces that both have stay, a new one is the mean of all rows with
    a little noise (mean), or the mean of the rows of the pieces that the old tokenizer cuts it into (pieces). The
    table is padded to a multiple of model.vocab_multiple."""


@struct.dataclass
class TrainState:
    """Everything a step changes. `step` counts batches, `skipped` those that were not applied."""

    step: Array
    params: Any
    """Those that are trained; None in place of each other one."""
    frozen: Any
    """The others, and first layers that are frozen as a segment of their own; see `lm.optim.Freeze`."""
    opt_state: Any
    ema: Any
    """The average of `params`, or None."""
    skipped: Array


TrainStep = Callable[[TrainState, Mapping[str, Array]], tuple[TrainState, dict[str, Array]]]


def random_key(seed: int, purpose: int, step: int | Array = 0) -> Array:
    """The key of one purpose at one step."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), purpose), step)


@functools.lru_cache(maxsize=4)  # tracing a deep model takes seconds, and three places of a start ask for it
def abstract_params(model: Transformer, mesh: Mesh, rules: Rules = DEFAULT_RULES) -> tuple[Any, Any]:
    """Shapes and dtypes of the parameters, and their shardings."""
    boxed = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    return nn.unbox(boxed), parameter_shardings(boxed, mesh, rules)


def make_init(
    model: Transformer, tx: optax.GradientTransformation, ema: bool, seed: int, freeze: Freeze
) -> Callable[[], TrainState]:
    """A function that makes the initial state; run it jitted, where its values depend on the seed alone."""

    def init() -> TrainState:
        tokens = jnp.zeros((1, 1), jnp.int32)
        whole = nn.unbox(model.init(random_key(seed, INIT), tokens)["params"])
        return first_state(whole, tx, ema, freeze)

    return init


def first_state(params: Any, tx: optax.GradientTransformation, ema: bool, freeze: Freeze) -> TrainState:
    """The state before the first step, from a whole model's parameters."""
    moving, frozen = freeze.apart(params)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=moving,
        frozen=frozen,
        opt_state=tx.init(moving),
        # A copy: a donated state must not hold one buffer twice.
        # In float32: a slow average's steps are too small for bfloat16.
        ema=jax.tree.map(lambda p: jnp.array(p, jnp.float32, copy=True), moving) if ema else None,
        skipped=jnp.zeros((), jnp.int32),
    )


def make_train_step(
    model: Transformer,
    task: Task,
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    config: TrainConfig,
    freeze: Freeze,
) -> TrainStep:
    """One optimizer step, `(state, batch) -> (state, metrics)`, to be jitted.

    The gradient is that of the objective summed over the whole batch and divided once by the whole weight, however
    the batch is cut into accumulation steps or spread over devices; of frozen parameters none is computed. A loss or
    gradient that is not finite leaves parameters, optimizer state and averages as they were.

    Args:
      model: the Transformer, with the segments of `freeze`.
      task: the objective.
      tx: the optimizer, of the parameters that are trained.
      schedule: its learning rate, to be reported.
      config: length and batch.
      freeze: what is frozen.
    """

    def loss_and_grad(params: tuple[Any, Any], batch: Mapping[str, Array], key: Array):
        moving, frozen = params

        def objective(moving: Any):
            return task.loss(model, freeze.joined(moving, frozen), dict(batch), key)

        return jax.value_and_grad(objective, has_aux=True)(moving)

    def accumulated(params: Any, batch: Mapping[str, Array], key: Array):
        if config.accumulate == 1:
            return loss_and_grad(params, batch, jax.random.fold_in(key, 0))

        def part_rows(x: Array) -> Array:
            # Every part takes rows from all over the batch, so that each device keeps its own.
            return jnp.swapaxes(x.reshape(-1, config.accumulate, *x.shape[1:]), 0, 1)

        def add(total: Any, part: Any):
            index, rows = part
            new = loss_and_grad(params, rows, jax.random.fold_in(key, index))
            return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, new), None

        parts = jax.tree.map(part_rows, dict(batch))
        first = jax.eval_shape(lambda: loss_and_grad(params, jax.tree.map(lambda x: x[0], parts), key))
        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), first)
        return jax.lax.scan(add, zero, (jnp.arange(config.accumulate), parts))[0]

    def step(state: TrainState, batch: Mapping[str, Array]) -> tuple[TrainState, dict[str, Array]]:
        key = random_key(config.seed, DROPOUT, state.step)
        batch = task.balance(dict(batch))
        (objective, sums), grads = accumulated((state.params, state.frozen), batch, key)
        weight = jnp.where(sums["weight"] > 0, sums["weight"], 1.0)
        grads = jax.tree.map(lambda g: g.astype(jnp.float32) / weight, grads)
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(objective) & jnp.isfinite(grad_norm)

        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema is not None:
            # In float32: the product of a half-precision parameter and a small share would be rounded to 1 in 256.
            ema = optax.incremental_update(optax.tree.cast(params, jnp.float32), ema, 1.0 - config.ema_decay)
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
        return TrainState(state.step + 1, params, state.frozen, opt_state, ema, skipped), report

    return step


@dataclass(frozen=True)
class Storage:
    """How a state is kept on disk: by the names and shapes of the model, whatever of it is frozen."""

    target: TrainState
    """Shapes, dtypes and shardings of what a checkpoint holds: of the parameters those that are trained, with all of
    their layers; `frozen` is None."""
    frozen_target: Any
    """The same of the parameters that are frozen whole, which are stored once; None in place of each other one."""
    stored: Callable[[TrainState], TrainState]
    """From a state to what a checkpoint holds of it."""
    frozen: Callable[[TrainState], Any]
    """From a state to the parameters that are frozen whole."""
    restored: Callable[[TrainState, Any], TrainState]
    """The state, from both."""


def make_storage(freeze: Freeze, shapes: TrainState, shardings: TrainState, params: Any, laid: Any) -> Storage:
    """How the states of a run are stored.

    Args:
      freeze: what is frozen.
      shapes: of the state.
      shardings: of the state.
      params: shapes of the whole model's parameters.
      laid: their shardings.
    """
    trained_at, frozen_at = tree.split(laid, freeze.moves)
    at = dataclasses.replace(shardings, params=trained_at, ema=None if shapes.ema is None else trained_at, frozen=None)

    def cast(frozen: Any) -> Any:
        return jax.tree.map(lambda p: p.astype(jnp.float32), frozen)

    def stored(state: TrainState) -> TrainState:
        trained = tree.split(freeze.whole(state.params, state.frozen), freeze.moves)[0]
        ema = state.ema
        if ema is not None:
            ema = tree.split(freeze.whole(ema, cast(state.frozen)), freeze.moves)[0]
        return dataclasses.replace(state, params=trained, ema=ema, frozen=None)

    def frozen(state: TrainState) -> Any:
        return tree.split(freeze.whole(state.params, state.frozen), freeze.moves)[1]

    def restored(state: TrainState, frozen: Any) -> TrainState:
        moving, apart = freeze.apart(tree.merge(state.params, frozen))
        ema = state.ema
        if ema is not None:
            ema = freeze.apart(tree.merge(ema, cast(frozen)))[0]
        return dataclasses.replace(state, params=moving, frozen=apart, ema=ema)

    def laid_out(shapes: Any, at: Any) -> Any:
        return jax.tree.map(lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes, at)

    target, frozen_target = (jax.eval_shape(part, shapes) for part in (stored, frozen))
    if freeze.lower:  # arrays are joined or cut, which goes on their devices; otherwise all stay the same
        stored, frozen = jax.jit(stored, out_shardings=at), jax.jit(frozen, out_shardings=frozen_at)
        restored = jax.jit(restored, out_shardings=shardings)
    return Storage(
        target=laid_out(target, at),
        frozen_target=laid_out(frozen_target, frozen_at),
        stored=stored,
        frozen=frozen,
        restored=restored,
    )


def flops_not_needed(model: ModelConfig, freeze: Freeze, params: Any, seq_len: int, source_len: int = 0) -> int:
    """Floating-point operations of `flops_per_token` that a training token doesn't take, as something is frozen.

    Of a frozen matrix no gradient is computed: 2 of 6 for each of its weights. Of first layers with nothing to be
    trained in or below them no gradient passes through either, so that the forward pass is all there is.

    Args:
      model: the model's settings.
      freeze: what is frozen.
      params: shapes of the whole model's parameters.
      seq_len: tokens in a row.
      source_len: source tokens in a row, of an encoder-decoder.
    """
    moves = dict(tree.path_leaves(freeze.moves))
    below = any(moved for path, moved in moves.items() if BELOW_LAYERS.match(path))
    lowest = dict(freeze.lower)
    for stack, layers in (("layers", model.n_layers), ("encoder_layers", model.encoder_layers)):
        if not any(moved for path, moved in moves.items() if path.startswith(f"{stack}/")):
            lowest[stack] = layers
    saved = 0
    for path, leaf in tree.path_leaves(params):
        stack, name = path.split("/")[0], path.split("/")[-1]
        table = path == "embed/embedding" and model.tie_embeddings
        if not table and (name != "kernel" or stack in ("classifier", "pooler")):
            continue
        frozen = leaf.shape[0] if not moves[path] else 0
        lower = lowest.get(stack, 0)
        rows = max(frozen, lower) * 2 + (0 if below or stack not in tree.STACKS else lower * 2)
        size = math.prod(leaf.shape[1:]) * rows
        saved += size * source_len // seq_len if stack == "encoder_layers" else size
    if not below:
        span = seq_len if model.window is None else min(seq_len, model.window)
        saved += 8 * lowest.get("layers", 0) * model.n_heads * model.width_of_head * span
    return saved


# What is added up before the first layer, and so has its gradient through all of them.
BELOW_LAYERS = re.compile(r"(prompt|(.*_)?embed|(.*_)?embedding_norm)/")


@dataclass(frozen=True)
class Program:
    """The compiled parts of a run and the layout of its state."""

    mesh: Mesh
    target: TrainState
    """Shapes, dtypes and shardings of the state."""
    storage: Storage
    init: Callable[[], TrainState]
    begin: Callable[[Any], TrainState]
    """The first state of a whole model's parameters, which are used up."""
    train_step: TrainStep
    eval_step: Any
    summarise: Callable[[Mapping[str, Any]], dict[str, float]]
    """From the sums of either to what is reported."""
    flops_not_needed: Callable[[int, int], int]
    """`flops_not_needed`, from the tokens in a row and the source tokens."""
    evaluated: Callable[[TrainState], Any]
    """From a state to the parameters for `eval_step`: the average, where there is one."""


def make_program(
    model: Transformer,
    task: Task,
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    config: TrainConfig,
    mesh: Mesh,
    freeze: Freeze | None = None,
    rules: Rules = DEFAULT_RULES,
) -> Program:
    """Jits initialisation, step and evaluation with explicit layouts: the state is born sharded.

    Args:
      model: the Transformer.
      task: the objective.
      tx: the optimizer, of the parameters that are trained.
      schedule: its learning rate, to be reported.
      config: length and batch.
      mesh: the mesh.
      freeze: what is frozen; None = nothing.
      rules: which logical axes lie on which mesh axes.
    """
    if freeze is None:
        freeze = freezing(OptimConfig(), abstract_params(model, mesh)[0])
    make_state = make_init(model, tx, config.ema_decay > 0, config.seed, freeze)
    segmented = Transformer(model.config, lower=freeze.lower)
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(make_state)
    params, param_shardings = abstract_params(segmented, mesh, rules)
    shardings = shardings_like(shapes, params, param_shardings, mesh)
    whole = NamedSharding(mesh, PartitionSpec())
    train_step = jax.jit(
        ruled(make_train_step(segmented, task, tx, schedule, config, freeze), rules),
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, whole),
        donate_argnums=0,
        compiler_options=compiler_options(mesh),
    )

    def begin(params: Any) -> TrainState:
        return first_state(params, tx, config.ema_decay > 0, freeze)

    return Program(
        mesh=mesh,
        target=jax.tree.map(lambda s, at: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at), shapes, shardings),
        storage=make_storage(freeze, shapes, shardings, *abstract_params(model, mesh, rules)),
        init=jax.jit(make_state, out_shardings=shardings),
        # Parameters that stay as they are keep their memory; of stacks that are cut there is nothing to keep.
        begin=jax.jit(begin, out_shardings=shardings, donate_argnums=() if freeze.lower else 0),
        train_step=train_step,
        eval_step=make_eval_step(segmented, task, mesh, param_shardings, rules),
        summarise=task.summarise,
        flops_not_needed=functools.partial(flops_not_needed, model.config, freeze, abstract_params(model, mesh)[0]),
        evaluated=lambda state: freeze.joined(state.params if state.ema is None else state.ema, state.frozen),
    )
