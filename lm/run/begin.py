"""A new run that begins with the parameters of another: its settings, and its first state."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lm.checkpoint import Checkpoints
from lm.config import Experiment
from lm.errors import check
from lm.models.transformer import ModelConfig, Transformer
from lm.records import RunDirectory
from lm.run.use import choose_checkpoint, load, load_experiment
from lm.text.tokenizer import TokenizerConfig, load_tokenizer
from lm.train import TrainState, abstract_params
from lm.tree import path_leaves, path_string

# Settings of a model that are a new run's own: how it is computed, and the heads its objective wants.
_DROPOUT = ("embedding_dropout", "residual_dropout", "attention_dropout", "classifier_dropout")
_OWN = (*_DROPOUT, "attention", "compute_dtype", "param_dtype", "remat", "unroll", "n_classes", "span_head")
# Settings that a new run may change and otherwise takes over.
_CHANGEABLE = ("mask", "max_len", "pooling", "pooler")
# Parameters of these parts are for one objective; another begins with new ones where the shape is another.
_HEADS = ("classifier", "span_head", "pooler")


def with_parent(experiment: Experiment) -> Experiment:
    """An experiment whose `init_from.run` says what its model is.

    The model is that of the run, with this experiment's dropout, precision, implementation and heads, and with those
    of `mask`, `max_len`, `pooling` and `pooler` that it sets. So is the tokenizer, if none is asked for. The checkpoint
    is settled: another may be the best when the run is resumed.

    Raises:
      UserError: no such run or checkpoint, or a setting of the model that contradicts the run's.
    """
    config = experiment.init_from
    if config.run is None:
        return experiment
    run = RunDirectory.open(Path(config.run))
    with contextlib.closing(Checkpoints.read_only(run.checkpoints)) as checkpoints:
        step = choose_checkpoint(run, checkpoints, config.checkpoint)
    asked, parent = experiment.model, load_experiment(run).model
    taken: dict[str, Any] = {}
    for field in dataclasses.fields(ModelConfig):
        name = field.name
        value, theirs = getattr(asked, name), getattr(parent, name)
        if name in _OWN or (name in _CHANGEABLE and value != field.default):
            taken[name] = value
        else:
            check(
                value in (field.default, theirs),
                f"model.{name} is {value!r}, and init_from.run {config.run} has {theirs!r}; leave it out",
            )
            taken[name] = theirs
    tokenizer = experiment.tokenizer
    if tokenizer == TokenizerConfig() and not experiment.data.mixture.datasets:
        tokenizer = TokenizerConfig(kind=f"file:{run.tokenizer}")
    return dataclasses.replace(
        experiment,
        model=ModelConfig(**taken),
        tokenizer=tokenizer,
        init_from=dataclasses.replace(config, checkpoint=str(step)),
    )


def check_parent(experiment: Experiment, fingerprint: str, params: Any, mesh: Mesh) -> tuple[str, ...]:
    """Raises `UserError` if the parameters of `init_from.run` are not those of this model.

    Args:
      experiment: the experiment, from `with_parent`, its model settled.
      fingerprint: of the tokenizer of its dataset.
      params: shapes of the new model's parameters.
      mesh: any mesh.

    Returns:
      The paths of the parameters that begin anew: heads that the run doesn't have, or has in another shape.
    """
    config = experiment.init_from
    run = RunDirectory.open(Path(config.run or ""))
    known = load_tokenizer(run.tokenizer).fingerprint()
    check(
        known == fingerprint,
        f"init_from.run {config.run} has the tokenizer {known} and the dataset {fingerprint}; set"
        f" tokenizer.kind file:{run.tokenizer}",
    )
    theirs, _ = abstract_params(Transformer(load_experiment(run).model), mesh)
    there = {path: leaf.shape for path, leaf in path_leaves(theirs)}
    new = []
    for path, leaf in path_leaves(params):
        if there.get(path) != leaf.shape:
            check(
                path.split("/")[0] in _HEADS,
                f"{path} has the shape {leaf.shape}, and in init_from.run {config.run} {there.get(path, 'none')}; a"
                " learned table of positions keeps its length: leave model.max_len out",
            )
            new.append(path)
    return tuple(new)


def begun(init: Callable[[], TrainState], experiment: Experiment, fingerprint: str, mesh: Mesh) -> TrainState:
    """The first state: that of a new run, with the parameters of `init_from.run` in it.

    Args:
      init: makes the state of a new run.
      experiment: the experiment, from `with_parent`, its model settled.
      fingerprint: of the tokenizer of its dataset.
      mesh: the mesh.
    """
    state, config = init(), experiment.init_from
    new = check_parent(experiment, fingerprint, state.params, mesh)
    theirs = dict(path_leaves(load(Path(config.run or ""), mesh, config.checkpoint).params))

    def take(path: jax.tree_util.KeyPath, mine: jax.Array) -> jax.Array:
        name = path_string(path)
        # Popped, so that what was cast doesn't stay in memory twice.
        return mine if name in new else jax.device_put(theirs.pop(name).astype(mine.dtype), mine.sharding)

    params = jax.tree_util.tree_map_with_path(take, state.params)
    ema = state.ema
    if ema is not None:
        ema = jax.tree.map(lambda p, e: jax.device_put(jnp.array(p, e.dtype, copy=True), e.sharding), params, ema)
    return dataclasses.replace(state, params=params, ema=ema)
