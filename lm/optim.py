"""Learning-rate schedules and optimizers, all of them optax's.

`make_schedule` gives the learning rate of every update; `make_optimizer` gives one transformation:

    gradient → + penalties (L1, L2) → clip by global norm → rule with decoupled weight decay, times −learning rate
    → times a factor for each parameter, where `rates`, `layer_decay` or `unfreeze` ask for it

Parameters whose factor is 0 are frozen: the transformation is of the others alone (`freezing`). Which parameter is
decayed, and which ones Muon orthogonalises, follows from parameter names through the pattern lists below. Arithmetic is
float32 whatever the parameters' or the stored moments' precision.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib

from lm import tree
from lm.errors import check

# Weight decay and penalties act on matrices. Norms, biases and embeddings are left alone, as in GPT-2 and GPT-3.
DECAY: tuple[tuple[str, bool], ...] = (
    (r"(.*/)?(scale|bias|embedding)", False),
    (r"(.*/)?kernel", True),
)

# Which axes of a kernel are its input (reduction) and output; other axes (layers, experts) are a batch of matrices,
# each orthogonalised by itself. Counted from the end, so that stacked and single layers read alike.
# None: not Muon's. Heads are matrices, but their output axis is a vocabulary or classes, for which Muon's author keeps
# Adam; so have low-rank terms and adapters, which begin at 0.
MUON: tuple[tuple[str, contrib.MuonDimensionNumbers | None], ...] = (
    (r"(.*/)?(scale|bias|embedding)", None),
    (r"(head|classifier|span_head)/kernel", None),
    (r".*/(lora_[ab]|[a-z]*_adapter/(down|up))/kernel", None),
    (r"(.*/)?(cross_)?attention/(query|key|value)/kernel", contrib.MuonDimensionNumbers(-3, (-2, -1))),
    (r"(.*/)?(cross_)?attention/out/kernel", contrib.MuonDimensionNumbers((-3, -2), -1)),
    (r"((.*/)?mlp/(up|gate|down)|head_transform/dense|pooler)/kernel", contrib.MuonDimensionNumbers(-2, -1)),
)

# Rules with decoupled weight decay. The others take an L2 penalty, as in their papers.
DECOUPLED = ("adamw", "adafactor", "lion", "muon")

# Settings that some rules only read. Changed for another rule, such a setting would be ignored, so it is refused.
READ_BY = {
    "beta1": ("adamw", "adam", "lion", "muon"),
    "beta2": ("adamw", "adam", "adadelta", "lion", "muon"),
    "epsilon": ("adamw", "adam", "adagrad", "adadelta", "muon"),
    "momentum": ("sgd",),
    "muon_momentum": ("muon",),
    "muon_steps": ("muon",),
    "muon_rms": ("muon",),
    "muon_adam_lr_fraction": ("muon",),
}

# Rules that keep a second moment as an average with decay beta2.
_AVERAGES_SQUARES = ("adamw", "adam", "adadelta", "muon")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimizer, learning-rate schedule and regularisation."""

    optimizer: Literal["adamw", "adam", "sgd", "adagrad", "adadelta", "adafactor", "lion", "muon"] = "adamw"
    """The update rule."""
    peak_lr: float = 3e-4
    """Highest learning rate. For adafactor it is relative to the root mean square of each parameter."""
    schedule: Literal["constant", "linear", "cosine", "inverse_sqrt", "wsd"] = "cosine"
    """Course of the learning rate after the warmup; wsd (warmup, stable, decay) is constant, then linear."""
    final_lr_fraction: float = 0.1
    """Where linear, cosine and wsd end, as a fraction of peak_lr."""
    warmup: float = 0.01
    """Linear warmup from 0: a fraction of the run when below 1, else a number of steps."""
    decay: float = 0.2
    """Final decay of wsd: a fraction of the run when below 1, else a number of steps."""
    beta1: float = 0.9
    """Decay of the first moment (adamw, adam, lion, and the Adam part of muon)."""
    beta2: float = 0.95
    """Decay of the second moment (adamw, adam, adadelta, the Adam part of muon); for lion, of its momentum."""
    epsilon: float = 1e-8
    """Added to denominators (adamw, adam, adagrad, adadelta, muon). Adadelta's paper has 1e-6."""
    momentum: float = 0.9
    """Momentum of sgd; 0 is plain SGD."""
    weight_decay: float | None = None
    """Each update also takes learning rate x weight_decay of a parameter off it (adamw, adafactor, lion, muon);
    None = 0.1 for these, and none for the other rules."""
    rates: tuple[str, ...] = ()
    """Learning rates of parameters, PATTERN=FACTOR of the schedule's; the first pattern that matches a whole path
    counts, and 0 freezes, which takes no moments and no gradient (--optim.rates 'classifier/.*=1' '.*=0'). Paths have
    the number of a layer where a pattern asks for it ('layers/[0-3]/.*=0'). None = all are trained alike, or, in a
    model with low-rank terms, adapters or a learned prompt, these and the heads alone."""
    unfreeze: tuple[str, ...] = ()
    """When parameters begin to move, PATTERN=STEP, as in `rates` ('layers/1/.*=100' 'layers/0/.*=200' 'embed/.*=300':
    gradual unfreezing, arXiv:1801.06146); until then their moments follow their gradients. What no pattern matches
    moves from the start."""
    decays: tuple[str, ...] = ()
    """Weight decay of parameters, PATTERN=FACTOR of weight_decay, as in `rates`. None = 1 for matrices, 0 for norms,
    biases and embeddings."""
    layer_decay: float = 1.0
    """Each layer learns with this factor of the rate of the one above it, the embeddings below the first; what is
    above the layers has the full rate (as BEiT, arXiv:2106.08254)."""
    decay_everything: bool = False
    """Apply weight_decay, l1 and l2 to norms, biases and embeddings too, not to matrices only."""
    clip_norm: float = 1.0
    """Largest global norm of the gradient; 0 turns clipping off."""
    l1: float = 0.0
    """Penalty l1 x sum |p| in the objective; its gradient is added before clipping, its value not to the loss."""
    l2: float = 0.0
    """Penalty l2 / 2 x sum p^2 in the objective (torch's weight_decay of Adam and SGD), added as l1 is."""
    moment_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision in which moments are stored; updates are computed in float32."""
    muon_momentum: float = 0.95
    """Nesterov momentum of muon."""
    muon_steps: int = 5
    """Newton-Schulz iterations of muon."""
    muon_rms: float = 0.2
    """Root mean square of muon's updates per learning rate: 0.2 is AdamW's, so its rates carry over; 0 scales by
    sqrt(max(1, out / in)) instead, as Muon's author does (then peak_lr is near 0.02)."""
    muon_adam_lr_fraction: float = 1.0
    """Learning rate of muon's other parameters (embeddings, norms, biases, head; AdamW), as a fraction of peak_lr."""


def decoupled_decay(config: OptimConfig) -> float:
    """The weight decay in force."""
    if config.weight_decay is None:
        return 0.1 if config.optimizer in DECOUPLED else 0.0
    return config.weight_decay


def make_schedule(config: OptimConfig, total_steps: int) -> optax.Schedule:
    """The learning rate as a function of the number of updates done.

    Update s (0-based) of a run of S updates with W warmup updates uses

    - s < W: `peak * (s + 1) / W`, so the first update already moves and update W - 1 has the full rate;
    - s >= W, with progress x = (s - W) / (S - W) and final = `final_lr_fraction * peak`:
      constant: `peak`;
      linear: `peak + x * (final - peak)`;
      cosine: `final + (peak - final) * (1 + cos(pi * x)) / 2` (https://arxiv.org/abs/1608.03983, one period);
      inverse_sqrt: `peak * sqrt(max(W, 1) / (s + 1))` (https://arxiv.org/abs/1706.03762);
      wsd: `peak`, and over the last D updates linear with x = (s - (S - D)) / D
      (https://arxiv.org/abs/2404.06395; linear as in https://arxiv.org/abs/2405.18392).

    `final` would be update S's rate, one past the run: no update of the run has rate 0 even if `final` is 0.

    Returns:
        A function from a step (integer or integer array) to a float32 scalar.
    """
    check(total_steps >= 1, f"a run of {total_steps} steps; it needs at least 1: make the run longer")
    _check_choice(config, "schedule")
    _check_positive(config, "peak_lr")
    _check_range(config, "final_lr_fraction", 0, 1)
    warmup = _as_steps(config, "warmup", total_steps)
    peak, final = config.peak_lr, config.final_lr_fraction * config.peak_lr
    after = max(total_steps - warmup, 1)

    main: optax.Schedule
    match config.schedule:
        case "constant":
            main = optax.constant_schedule(peak)
        case "linear":
            main = optax.linear_schedule(peak, final, after)
        case "cosine":
            main = optax.cosine_decay_schedule(peak, after, alpha=config.final_lr_fraction)
        case "inverse_sqrt":
            main = _inverse_sqrt_schedule(peak, warmup)
        case "wsd":
            decay = _as_steps(config, "decay", total_steps)
            check(
                warmup + decay <= total_steps,
                f"optim.warmup {warmup} + optim.decay {decay} steps exceed the run of {total_steps} steps:"
                " shorten one of them or lengthen the run",
            )
            main = optax.linear_schedule(peak, final, decay, transition_begin=total_steps - decay - warmup)
    if warmup:
        main = optax.join_schedules([optax.linear_schedule(peak / warmup, peak, warmup - 1), main], [warmup])

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        return jnp.asarray(main(count), jnp.float32)

    return schedule


def make_optimizer(config: OptimConfig, schedule: optax.Schedule, params: Any) -> optax.GradientTransformation:
    """The whole optimizer; use it as `updates, state = tx.update(grads, state, params)`.

    Args:
        config: the rule and its settings.
        schedule: the learning rate as a function of the number of updates done.
        params: the parameter tree (arrays or `jax.ShapeDtypeStruct`s); only its paths and shapes are read.

    Returns:
        A transformation whose `init` and `update` are pure and can be jitted; both take the trained part of trees,
        `freezing(config, params).apart(params)[0]`. Its updates are float32, to be added to the parameters with
        `optax.apply_updates`. Moments in its state have paths that end with their parameter's.

    Raises:
        UserError: settings that can't work, or a parameter that no pattern of `rates` or `decays` covers.
    """
    _check_optimizer(config)
    freeze = freezing(config, params)
    check(any(jax.tree.leaves(freeze.moves)), "optim.rates freezes every parameter; give one a factor above 0")
    factors, starts, decays = (
        freeze.apart_values(values, params)
        for values in (rate_factors(config, params), first_steps(config, params), decay_factors(config, params))
    )
    params = jax.eval_shape(lambda whole: freeze.apart(whole)[0], params)
    decayed = jax.tree.map(lambda factor: bool(np.all(factor == 1)), decays)
    otherwise = jax.tree.map(lambda factor: 0.0 if np.all(factor == 1) else factor, decays)
    weight_decay = decoupled_decay(config)
    penalised = jax.tree.map(_is_some, decays)
    # A stage that is off stays in its place, so that the state's paths (a checkpoint's) do not depend on it.
    off = optax.identity()
    stages = optax.chain(
        optax.masked(_add_l1_gradient(config.l1), penalised) if config.l1 else off,
        optax.add_decayed_weights(config.l2, penalised) if config.l2 else off,
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else off,
        _make_rule(config, schedule, params, decayed),
        _decay_by(schedule, weight_decay, otherwise) if any(map(_is_some, jax.tree.leaves(otherwise))) else off,
        _scale_by(factors) if config.rates or config.layer_decay != 1 else off,
        _hold_until(starts) if config.unfreeze else off,
    )
    return _compute_in_float32(stages, jnp.dtype(config.moment_dtype))


@dataclass(frozen=True)
class Freeze:
    """Which parameters are frozen, and how a parameter tree is taken apart for that.

    The first layers of a stack are a segment of their own where all of their parameters are frozen: `lower_layers`
    holds them and `layers` the rest, in memory only. The model that computes with it is told so by
    `Transformer(config, lower=...)`.
    """

    moves: Any
    """A tree shaped like the parameters: False where all of a parameter is frozen."""
    lower: tuple[tuple[str, int], ...]
    """Stacks with such a segment, and its layers."""

    def apart(self, params: Any) -> tuple[Any, Any]:
        """What is trained and what is frozen: two trees, in each None for what is in the other."""
        upper, lower = dict(params), {}
        for stack, count in self.lower:
            lower[f"lower_{stack}"] = jax.tree.map(lambda leaf: leaf[:count], params[stack])  # noqa: B023
            upper[stack] = jax.tree.map(lambda leaf: leaf[count:], params[stack])  # noqa: B023
        moving, frozen = tree.split(upper, self.moves)
        return moving, frozen | lower

    def joined(self, moving: Any, frozen: Any) -> Any:
        """The parameters that were taken `apart`, with their segments: what the model computes with."""
        lower = {name: below for name, below in frozen.items() if name.startswith("lower_")}
        rest = {name: child for name, child in frozen.items() if name not in lower}
        return tree.merge(moving, rest) | lower

    def apart_values(self, values: Any, params: Any) -> Any:
        """The trained part of a tree of numbers, one for each parameter or `[L, 1, ...]` for its layers."""

        def cut(path: jax.tree_util.KeyPath, _: Any, value: Any) -> Any:
            count = dict(self.lower).get(tree.path_string(path).split("/")[0], 0)
            return value[count:] if np.ndim(value) else value

        return tree.split(jax.tree_util.tree_map_with_path(cut, params, values), self.moves)[0]

    def whole(self, moving: Any, frozen: Any) -> Any:
        """The parameters that were taken `apart`."""
        made = self.joined(moving, frozen)
        for stack, _ in self.lower:
            below = made.pop(f"lower_{stack}")
            made[stack] = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), below, made[stack])
        return made


def freezing(config: OptimConfig, params: Any) -> Freeze:
    """What is frozen of these parameters (or their shapes)."""
    factors = rate_factors(config, params)
    lower = []
    for stack in tree.STACKS:
        held = [np.ravel(factor) != 0 for factor in jax.tree.leaves(factors.get(stack, {}))]
        if not held:
            continue
        some = functools.reduce(np.logical_or, held)  # of one number, where all layers are alike
        count = int(np.argmax(some)) if some.any() else 0
        if count:
            lower.append((stack, count))
    return Freeze(jax.tree.map(_is_some, factors), tuple(lower))


def rate_factors(config: OptimConfig, params: Any) -> Any:
    """A tree shaped like `params`: factors of the learning rate; of layers that differ one each, `[L, 1, ...]`.

    Raises:
        UserError: a parameter that no pattern of `rates` covers.
    """
    rules = [_rule("rates", text) for text in config.rates] or [(".*", 1.0)]
    factors = _by_layer(params, rules)
    if config.layer_decay == 1:
        return factors
    paths = tree.path_leaves(params)
    check(
        not any(path.startswith("encoder_layers/") for path, _ in paths),
        f"optim.layer_decay is {config.layer_decay}, and an encoder-decoder has two stacks of layers; use optim.rates",
    )
    n_layers = max((leaf.shape[0] for path, leaf in paths if path.startswith("layers/")), default=0)

    def deepen(path: jax.tree_util.KeyPath, factor: Any, leaf: Any) -> Any:
        name = tree.path_string(path)
        if name.startswith("layers/"):
            below_top = np.arange(n_layers, 0, -1, dtype=np.float32).reshape(-1, *[1] * (len(leaf.shape) - 1))
            return factor * np.float32(config.layer_decay) ** below_top
        return factor * config.layer_decay ** (n_layers + 1) if _EMBEDDING.match(name) else factor

    return jax.tree_util.tree_map_with_path(deepen, factors, params)


def first_steps(config: OptimConfig, params: Any) -> Any:
    """A tree as `rate_factors` gives: how many updates each parameter leaves out."""
    return _by_layer(params, [*(_rule("unfreeze", text) for text in config.unfreeze), (".*", 0.0)])


def decay_factors(config: OptimConfig, params: Any) -> Any:
    """A tree as `rate_factors` gives: the factor of weight decay, of which l1 and l2 only ask whether it is 0."""
    if config.decays:
        return _by_layer(params, [_rule("decays", text) for text in config.decays])
    return jax.tree.map(float, decay_mask(config, params))


def check_patterns(config: OptimConfig, params: Any, steps: int | None) -> None:
    """Raises `UserError` for a pattern that a person wrote and that has no effect.

    Args:
        config: the settings.
        params: the parameters' shapes.
        steps: the run's length, None where it is not known yet.
    """
    for setting in ("rates", "unfreeze", "decays"):
        for text in getattr(config, setting):
            pattern, number = _rule(setting, text)
            found = tree.match_layers(params, [(pattern, True), (".*", False)])
            check(
                any(jax.tree.leaves(found)),
                f"optim.{setting} has {text!r}, and no parameter has such a path; paths are"
                f" {', '.join(path for path, _ in tree.path_leaves(params)[:4])}, …, or with a layer's number,"
                " layers/0/…: correct the pattern or leave it out",
            )
            check(
                setting != "unfreeze" or (number.is_integer() and (steps is None or number < steps)),
                f"optim.unfreeze has {text!r}; the step is a whole number"
                + ("" if steps is None else f" below the run's length, {steps}"),
            )


def _by_layer(params: Any, rules: list[tuple[str, float]]) -> Any:
    """The value of each parameter, or of each of its layers as `[L, 1, ...]` where they differ."""

    def one(leaf: Any, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        if len(set(value)) == 1:
            return value[0]
        return np.array(value, np.float32).reshape(-1, *[1] * (len(leaf.shape) - 1))

    return jax.tree.map(one, params, tree.match_layers(params, rules))


# What is added up before the first layer.
_EMBEDDING = re.compile(r"(.*_)?(embed|embedding_norm)/")


def _rule(setting: str, text: str) -> tuple[str, float]:
    """A pattern and its number."""
    pattern, equals, factor = text.rpartition("=")
    try:
        value = float(factor)
    except ValueError:
        value = math.nan
    check(
        equals and pattern and 0 <= value < math.inf,
        f"optim.{setting} has {text!r}; write PATTERN={'STEP' if setting == 'unfreeze' else 'FACTOR'}, with a number of"
        " at least 0 ('.*=0' is for the rest)",
    )
    return pattern, value


def _is_some(factor: Any) -> bool:
    return bool(np.any(np.asarray(factor) != 0))


def _scale_by(factors: Any) -> optax.GradientTransformation:
    """Multiplies updates with a constant each, or one for each layer."""
    return optax.stateless(lambda updates, _: jax.tree.map(lambda update, factor: update * factor, updates, factors))


class Updates(NamedTuple):
    """How many updates there were."""

    done: jax.Array


def _hold_until(starts: Any) -> optax.GradientTransformation:
    """Leaves out the first updates of each parameter: as many as `starts` says."""

    def init(params: Any) -> Updates:
        del params
        return Updates(jnp.zeros((), jnp.int32))

    def update(updates: Any, state: Updates, params: Any = None) -> tuple[Any, Updates]:
        del params
        held = jax.tree.map(lambda u, start: jnp.where(state.done >= start, u, 0.0), updates, starts)
        return held, Updates(optax.safe_increment(state.done))

    return optax.GradientTransformation(init, update)


def _decay_by(schedule: optax.Schedule, weight_decay: float, factors: Any) -> optax.GradientTransformation:
    """Decoupled weight decay with a factor for each parameter, after the learning rate."""

    def init(params: Any) -> Updates:
        del params
        return Updates(jnp.zeros((), jnp.int32))

    def update(updates: Any, state: Updates, params: Any = None) -> tuple[Any, Updates]:
        rate = schedule(state.done) * weight_decay
        decayed = jax.tree.map(lambda u, p, factor: u - rate * factor * p, updates, params, factors)
        return decayed, Updates(optax.safe_increment(state.done))

    return optax.GradientTransformation(init, update)


def decay_mask(config: OptimConfig, params: Any) -> Any:
    """A tree shaped like `params`: True where weight decay and the penalties act."""
    return tree.match_patterns(params, ((".*", True),) if config.decay_everything else DECAY)


def _make_rule(
    config: OptimConfig, schedule: optax.Schedule, params: Any, decayed: Any
) -> optax.GradientTransformation:
    b1, b2, eps, weight_decay = config.beta1, config.beta2, config.epsilon, decoupled_decay(config)
    match config.optimizer:
        case "adamw":
            return optax.adamw(schedule, b1, b2, eps, weight_decay=weight_decay, mask=decayed)
        case "adam":
            return optax.adam(schedule, b1, b2, eps)
        case "sgd":
            return optax.sgd(schedule, momentum=config.momentum or None)
        case "adagrad":
            return optax.adagrad(schedule, initial_accumulator_value=0.0, eps=eps)
        case "adadelta":
            return optax.adadelta(schedule, rho=b2, eps=eps)
        case "adafactor":
            # Its clipping and its relative rate take the root mean square of a leaf: of all stacked layers together.
            # optax adds this decay after the learning rate, so the rate must be in it to mean what it means elsewhere.
            return optax.adafactor(
                schedule, weight_decay_rate=_scaled(schedule, weight_decay), weight_decay_mask=decayed
            )
        case "lion":
            return optax.lion(schedule, b1, b2, weight_decay=weight_decay, mask=decayed)
        case "muon":
            return _make_muon(config, schedule, params, decayed)


def _make_muon(
    config: OptimConfig, schedule: optax.Schedule, params: Any, decayed: Any
) -> optax.GradientTransformation:
    """Muon for the layers' matrices, AdamW for everything else."""
    labels = tree.match_patterns(params, [(pattern, "adam" if d is None else "muon") for pattern, d in MUON])
    # `contrib.muon` brings an Adam of its own, but a Nesterov one, and without a decay mask. It therefore sees
    # its own parameters only: the others are masked in the tree, so they must be in the dimensions as well.
    rules = [(pattern, optax.MaskedNode() if d is None else d) for pattern, d in MUON]
    dimensions = tree.match_patterns(params, rules)
    muon = contrib.muon(
        schedule,
        ns_steps=config.muon_steps,
        beta=config.muon_momentum,
        weight_decay=decoupled_decay(config),
        weight_decay_mask=decayed,
        muon_weight_dimension_numbers=dimensions,
        consistent_rms=config.muon_rms or None,
    )
    adam = optax.adamw(
        _scaled(schedule, config.muon_adam_lr_fraction),
        config.beta1,
        config.beta2,
        config.epsilon,
        weight_decay=decoupled_decay(config),
        mask=decayed,
    )
    return optax.partition({"muon": muon, "adam": adam}, labels)


def _compute_in_float32(inner: optax.GradientTransformation, moment_dtype: jnp.dtype) -> optax.GradientTransformation:
    """Runs `inner` on float32 gradients, parameters and state, and stores its moments as `moment_dtype`.

    A moment is a floating-point leaf of the state whose path ends with a parameter's; other leaves (step counts,
    Muon's coefficients) keep their type.
    """

    def is_floating(x: jax.Array) -> bool:
        return jnp.issubdtype(x.dtype, jnp.floating)

    def to_float32(values: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(jnp.float32) if is_floating(x) else x, values)

    def init(params: optax.Params) -> optax.OptState:
        suffixes = tuple("/" + path for path, _ in tree.path_leaves(params))

        def store(path: jax.tree_util.KeyPath, x: jax.Array) -> jax.Array:
            is_moment = is_floating(x) and ("/" + tree.path_string(path)).endswith(suffixes)
            return x.astype(moment_dtype) if is_moment else x

        return jax.tree.map_with_path(store, inner.init(to_float32(params)))

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        updates, new_state = inner.update(to_float32(updates), to_float32(state), to_float32(params))
        return updates, jax.tree.map(lambda new, old: new.astype(old.dtype), new_state, state)

    return optax.GradientTransformation(init, update)


def _add_l1_gradient(strength: float) -> optax.GradientTransformation:
    """Adds the (sub)gradient of `strength * sum |p|`."""
    return optax.stateless_with_tree_map(lambda g, p: g + strength * jnp.sign(p))


def _inverse_sqrt_schedule(peak: float, warmup: int) -> optax.Schedule:
    """`peak` at the last update of the warmup, then falling with the root of the updates made; counts from its end."""
    unit = max(warmup, 1)
    return lambda count: peak * jnp.sqrt(unit / (count + warmup + 1))


def _scaled(schedule: optax.Schedule, factor: float) -> Callable[[jax.typing.ArrayLike], jax.Array]:
    return lambda count: factor * jnp.asarray(schedule(count))


def _as_steps(config: OptimConfig, name: str, total_steps: int) -> int:
    """A duration setting as a number of steps: below 1 a fraction of the run, else steps already."""
    value = getattr(config, name)
    check(
        0 <= value < 1 or (value >= 1 and float(value).is_integer()),
        f"optim.{name} {value}: give a fraction of the run in [0, 1), or a whole number of steps from 1 on",
    )
    steps = round(value * total_steps) if value < 1 else int(value)
    check(
        steps <= total_steps,
        f"optim.{name} of {steps} steps is longer than the run of {total_steps}: give at most {total_steps}, or a"
        " fraction",
    )
    return steps


def _check_optimizer(config: OptimConfig) -> None:
    """Refuses settings that cannot work, or that would be ignored in silence."""
    name = config.optimizer
    _check_choice(config, "optimizer")
    _check_choice(config, "moment_dtype")
    for decay in ("beta1", "beta2", "momentum", "muon_momentum"):
        _check_range(config, decay, 0, 1, open_end=True)
    for positive in ("epsilon", "muon_adam_lr_fraction"):
        _check_positive(config, positive)
    check(
        not (config.decays and config.decay_everything),
        "optim.decays says which parameters are decayed, and optim.decay_everything that all are; leave one out",
    )
    check(0 < config.layer_decay <= 1, f"optim.layer_decay {config.layer_decay}: give a number above 0, up to 1")
    for strength in ("clip_norm", "l1", "l2", "muon_rms"):
        _check_range(config, strength, 0, math.inf)
    if config.weight_decay is not None:
        _check_range(config, "weight_decay", 0, math.inf)
    check(config.muon_steps >= 1, f"optim.muon_steps {config.muon_steps}: give at least 1 (5 is usual)")
    check(
        name in DECOUPLED or not config.weight_decay,
        f"optim.weight_decay {config.weight_decay} with {name}: only {', '.join(DECOUPLED)} have it; leave it out, and"
        " set optim.l2 for a penalty",
    )
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for setting, rules in READ_BY.items():
        value = getattr(config, setting)
        read = f"only {rules[0]} reads it" if len(rules) == 1 else f"only {', '.join(rules)} read it"
        check(
            name in rules or value == defaults[setting],
            f"optim.{setting} {value} with {name}, which has none: {read};"
            f" leave it out (it is {defaults[setting]} then), or choose another optim.optimizer",
        )
    if config.moment_dtype == "bfloat16":
        # bfloat16 has 8 significant bits: a change by less than 1/256 of the value may be rounded away, every time.
        check(
            name not in ("adagrad", "adafactor"),
            f"optim.moment_dtype bfloat16 with {name}: its second moment would stop changing within about a thousand"
            " steps; use float32",
        )
        check(
            name not in _AVERAGES_SQUARES or 1 - config.beta2 >= 1 / 256,
            f"optim.beta2 {config.beta2} with optim.moment_dtype bfloat16: rounding may keep the second moment from"
            " decaying; use optim.beta2 of at most 0.996, or float32",
        )


def _check_choice(config: OptimConfig, name: str) -> None:
    value, allowed = getattr(config, name), get_args(OptimConfig.__annotations__[name])
    check(value in allowed, f"optim.{name} {value!r}: choose one of {', '.join(allowed)}")


def _check_positive(config: OptimConfig, name: str) -> None:
    value = getattr(config, name)
    check(0 < value < math.inf, f"optim.{name} {value}: give a number above 0")


def _check_range(config: OptimConfig, name: str, low: float, high: float, *, open_end: bool = False) -> None:
    value = getattr(config, name)
    inside = low <= value < high if open_end or high == math.inf else low <= value <= high
    end = "below" if open_end else "at most"
    limits = f"of at least {low}" if high == math.inf else f"of at least {low} and {end} {high}"
    check(inside, f"optim.{name} {value}: give a number {limits}")
