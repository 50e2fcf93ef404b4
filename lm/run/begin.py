"""A new run that begins with the parameters of another: its settings, and its first state."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh

from lm.checkpoint import Checkpoints
from lm.config import Experiment
from lm.errors import check
from lm.models.lora import LoraConfig
from lm.models.transformer import ModelConfig, Transformer
from lm.peft import merged
from lm.records import RunDirectory
from lm.run.use import choose_checkpoint, load, load_experiment
from lm.text.tokenizer import Tokenizer, TokenizerConfig, is_trained, load_tokenizer
from lm.train import INIT, Program, TrainState, abstract_params, random_key
from lm.tree import path_leaves, path_string
from lm.vocabulary import resized

# Settings of a model that are a new run's own: how it is computed, and the heads its objective wants.
_DROPOUT = ("embedding_dropout", "residual_dropout", "attention_dropout", "classifier_dropout")
_OWN = (
    *_DROPOUT,
    "vocab_multiple",
    "attention",
    "compute_dtype",
    "param_dtype",
    "remat",
    "unroll",
    "n_classes",
    "span_head",
)
# Settings that a new run may change and otherwise takes over.
_CHANGEABLE = ("mask", "max_len", "pooling", "pooler", "classifier_bias")
# What may be added to a model that has none of it, and is otherwise taken over.
_ADDED = ("lora", "adapter_dim", "prompt_len")
# Parameters of these parts are for one objective; another begins with new ones where the shape is another.
_HEADS = r"(classifier|span_head|pooler)/.*"
_OBJECTIVES_OWN = r"(classifier|span_head)/.*"
# Which parameters are trained in a model with one of these, besides its heads. With adapters, as their authors have it,
# the norms as well.
_TUNED = {
    "lora": r".*/lora_[ab]/kernel",
    "adapter_dim": r".*/[a-z]+_adapter/.*",
    "prompt_len": r"prompt/embedding",
}
_TUNED_NORMS = r"(.*/)?[a-z_]*norm/.*"


def with_parent(experiment: Experiment) -> Experiment:
    """An experiment whose `init_from.run` says what its model is.

    The model is that of the run, with this experiment's dropout, precision, implementation and heads, and with those
    of `mask`, `max_len`, `pooling` and `pooler` that it sets; low-rank terms, adapters and a learned prompt are its own
    where the run has none. So is the tokenizer, unless a finished one is asked for or `resize_vocab` lets the data have
    its own. The checkpoint is settled: another may be the best when the run is resumed. So is what is trained of a
    model with low-rank terms, adapters or a learned prompt.

    Raises:
      UserError: no such run or checkpoint, or a setting of the model that contradicts the run's.
    """
    config = experiment.init_from
    if config.run is None:
        tuned = [name for name in _ADDED if getattr(experiment.model, name) != getattr(ModelConfig(), name)]
        check(
            not tuned,
            f"model.{' and model.'.join(tuned)} {'are' if tuned[1:] else 'is'} set, for a model that is trained"
            " already; name its run with init_from.run",
        )
        check(not config.merge, "init_from.merge is set, and there is no init_from.run whose terms could be merged")
        return experiment
    run = RunDirectory.open(Path(config.run))
    with contextlib.closing(Checkpoints.read_only(run.checkpoints)) as checkpoints:
        step = choose_checkpoint(run, checkpoints, config.checkpoint)
    asked, parent = experiment.model, load_experiment(run).model
    if config.merge:
        check(parent.lora.rank, f"init_from.merge is set, and {config.run} has no low-rank terms; leave it out")
        parent = dataclasses.replace(parent, lora=LoraConfig())
    taken: dict[str, Any] = {}
    for field in dataclasses.fields(ModelConfig):
        name = field.name
        value, theirs = getattr(asked, name), getattr(parent, name)
        default = getattr(ModelConfig(), name)
        if name == "vocab_size" and config.resize_vocab != "no":
            check(
                value is None,
                f"model.vocab_size is {value}, and init_from.resize_vocab takes the tokenizer's, padded to a multiple"
                " of model.vocab_multiple; leave it out",
            )
            taken[name] = None
        elif name in _OWN or (name in _CHANGEABLE and value != default) or (name in _ADDED and theirs == default):
            taken[name] = value
        else:
            remedy = "leave it out, or set init_from.merge" if name == "lora" else "leave it out"
            check(
                value in (default, theirs),
                f"model.{name} is {value!r}, and init_from.run {config.run} has {theirs!r}; {remedy}",
            )
            taken[name] = theirs
    tokenizer = experiment.tokenizer
    # One that would be trained on the data is for models that begin anew, unless the vocabulary is to be another.
    own = is_trained(tokenizer) and config.resize_vocab != "no" and tokenizer != TokenizerConfig()
    if is_trained(tokenizer) and not own and not experiment.data.mixture.datasets:
        tokenizer = TokenizerConfig(kind=f"file:{run.tokenizer}")
    model, optim = ModelConfig(**taken), experiment.optim
    if not optim.rates and (rates := tuned_rates(model)):
        optim = dataclasses.replace(optim, rates=rates)
    return dataclasses.replace(
        experiment,
        model=model,
        optim=optim,
        tokenizer=tokenizer,
        init_from=dataclasses.replace(config, checkpoint=str(step)),
    )


def tuned_rates(model: ModelConfig) -> tuple[str, ...]:
    """`optim.rates` of a model with low-rank terms, adapters or a learned prompt: these and the heads; else none."""
    tuned = [pattern for name, pattern in _TUNED.items() if getattr(model, name) != getattr(ModelConfig(), name)]
    if model.adapter_dim:
        tuned.append(_TUNED_NORMS)
    return (*(f"{pattern}=1" for pattern in (*tuned, _HEADS)), ".*=0") if tuned else ()


def check_parent(experiment: Experiment, fingerprint: str, params: Any, mesh: Mesh) -> tuple[str, ...]:
    """Raises `UserError` if the parameters of `init_from.run` are not those of this model.

    Args:
      experiment: the experiment, from `with_parent`, its model settled.
      fingerprint: of the tokenizer of its dataset.
      params: shapes of the new model's parameters.
      mesh: any mesh.

    Returns:
      The paths of the parameters that begin anew: heads that the run doesn't have, or has in another shape or for
      another objective, and what is added to its model.
    """
    config = experiment.init_from
    run = RunDirectory.open(Path(config.run or ""))
    known = load_tokenizer(run.tokenizer).fingerprint()
    check(
        known == fingerprint or config.resize_vocab != "no",
        f"init_from.run {config.run} has the tokenizer {known} and the dataset {fingerprint}; set"
        f" tokenizer.kind file:{run.tokenizer}, or init_from.resize_vocab to take the dataset's",
    )
    settings = load_experiment(run)
    parent = settings.model
    if config.merge:
        parent = dataclasses.replace(parent, lora=LoraConfig())
    if config.resize_vocab != "no":
        parent = dataclasses.replace(parent, vocab_size=experiment.model.vocab_size)
    theirs, _ = abstract_params(Transformer(parent), mesh)
    there = {path: leaf.shape for path, leaf in path_leaves(theirs)}
    new = []
    another = settings.task.kind != experiment.task.kind
    for path, leaf in path_leaves(params):
        if another and re.fullmatch(_OBJECTIVES_OWN, path):  # two classes may be of sentences that follow, or of praise
            new.append(path)
        elif there.get(path) != leaf.shape:
            check(
                any(re.fullmatch(pattern, path) for pattern in (_HEADS, *_TUNED.values())),
                f"{path} has the shape {leaf.shape}, and in init_from.run {config.run} {there.get(path, 'none')}; a"
                " learned table of positions keeps its length: leave model.max_len out",
            )
            new.append(path)
    return tuple(new)


def begun(
    program: Program, experiment: Experiment, tokenizer: Tokenizer, mesh: Mesh, tell: Callable[[str], None]
) -> TrainState:
    """The first state: that of a new run, with the parameters of `init_from.run` in it.

    Args:
      program: the new run's.
      experiment: the experiment, from `with_parent`, its model settled.
      tokenizer: of its dataset.
      mesh: the mesh.
      tell: called with a line on what became of the vocabulary, where it is another.
    """
    config, model = experiment.init_from, Transformer(experiment.model)
    shapes, shardings = abstract_params(model, mesh)
    new = check_parent(experiment, tokenizer.fingerprint(), shapes, mesh)
    at = dict(path_leaves(shardings))

    def draw() -> dict[str, jax.Array]:
        key = random_key(experiment.train.seed, INIT)
        drawn = dict(path_leaves(nn.unbox(model.init(key, jnp.zeros((1, 1), jnp.int32))["params"])))
        return {path: drawn[path] for path in new}

    # Of all that init draws the compiler keeps what is new, so that a model is never there twice.
    made: dict[str, jax.Array] = jax.jit(draw, out_shardings={path: at[path] for path in new})() if new else {}
    parent = load(Path(config.run or ""), mesh, config.checkpoint)
    params = merged(parent.model.config, parent.params)[1] if config.merge else parent.params
    if config.resize_vocab != "no":
        shape = dataclasses.replace(parent.model.config, vocab_multiple=experiment.model.vocab_multiple)
        seed = experiment.train.seed
        _, params, carried = resized(shape, params, parent.tokenizer, tokenizer, how=config.resize_vocab, seed=seed)
        tell(f"the vocabulary of {tokenizer.vocab_size} pieces: {carried}")
    theirs = dict(path_leaves(params))
    del parent, params
    if "prompt/embedding" in new:
        made["prompt/embedding"] = _drawn_prompt(experiment, theirs["embed/embedding"], tokenizer.vocab_size, at)

    def take(path: jax.tree_util.KeyPath, mine: jax.ShapeDtypeStruct) -> jax.Array:
        name = path_string(path)
        # Popped, so that what was cast doesn't stay in memory twice.
        return made.pop(name) if name in made else jax.device_put(theirs.pop(name).astype(mine.dtype), at[name])

    return program.begin(jax.tree_util.tree_map_with_path(take, shapes))


def _drawn_prompt(experiment: Experiment, table: jax.Array, ids: int, at: dict[str, Any]) -> jax.Array:
    """Rows of the vocabulary, drawn: better than noise to begin a learned prompt with (arXiv:2104.08691, figure 3b)."""
    model = experiment.model
    key = random_key(experiment.train.seed, INIT)
    rows = jax.random.choice(key, ids, (model.prompt_len,), replace=ids < model.prompt_len)
    scale = model.d_model**0.5 if model.scale_embeddings else 1.0
    return jax.device_put(table[rows].astype(jnp.float32) * scale, at["prompt/embedding"])
