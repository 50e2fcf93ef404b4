"""What was trained beside a frozen model, in and out alone: megabytes for a model of gigabytes."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lm import config as configs
from lm import tree
from lm.checkpoint import Checkpoints
from lm.config import Experiment
from lm.errors import UserError, check
from lm.hf.adapters import OWN_CONFIG, own_adapter, peft_adapter, write_adapter
from lm.hf.export import unfinished
from lm.hf.families import expressed
from lm.hf.read_adapters import Adapter, is_peft, read_own, read_peft
from lm.hf.source import CONFIG, read_json
from lm.hf.tables import listed
from lm.models.config import Float, ModelConfig
from lm.models.lora import LoraConfig
from lm.models.transformer import Transformer
from lm.optim import OptimConfig, freezing
from lm.records import RunDirectory, write_json
from lm.run.begin import tuned_rates
from lm.run.datasets import labels_of
from lm.run.pretrained import Exported, new_run, save_parameters
from lm.run.use import load, load_experiment
from lm.tasks import AnyTask
from lm.tasks.classification import Classification
from lm.tasks.extractive_qa import ExtractiveQA
from lm.text.template import ChatTemplate
from lm.text.tokenizer import Tokenizer, TokenizerConfig
from lm.train import abstract_params

ABOUT = "lm.json"
"""Beside an adapter, whatever its format: what it was trained for, and the tokenizer of its base."""
OWN = "adapter"
"""What `Exported.architecture` says of an adapter in our own format."""


def export_adapter(
    path: Path, folder: Path, mesh: Mesh, *, checkpoint: str = "best", dtype: Float | None = None
) -> Exported:
    """Writes what a run trained beside a frozen model: LoRA as the `peft` library loads it, the rest in our own format.

    Low-rank terms and heads are PEFT's; a model with adapters or a learned prompt goes out in our own format, with
    everything that was trained.

    Args:
      path: the run directory.
      folder: where to, not there yet.
      mesh: where the parameters lie on their way.
      checkpoint: `best`, `latest`, or a step.
      dtype: of the weights; None = float32, as they are trained.

    Raises:
      UserError: no such run, `folder` is there, nothing was added to the model, its base is no run, or something was
        trained that PEFT has no place for; then nothing was written.
    """
    check(not folder.exists(), f"{folder} exists; name another folder, or remove it")
    run = RunDirectory.open(path)
    experiment = load_experiment(run)
    model = experiment.model
    own = bool(model.adapter_dim or model.prompt_len)
    check(
        own or model.lora.rank,
        f"{path} has no low-rank terms, adapters or learned prompt; leave out --adapter to export the whole model",
    )
    check(
        experiment.init_from.resize_vocab == "no",
        f"{path} began with a vocabulary of its own (init_from.resize_vocab), so no other model is the base of what it"
        " trained; leave out --adapter to export the whole model",
    )
    if not own:
        family, architecture = _family(run, model, experiment.task.kind)
    trained = load(path, mesh, checkpoint)
    leaves = dict(tree.path_leaves(trained.params))
    moves = dict(tree.path_leaves(freezing(experiment.optim, trained.params).moves))
    moving = {name for name in leaves if moves[name] or "/lora_" in name}
    wanted = jnp.dtype(dtype or "float32")
    if own:
        told, weights = own_adapter(model, leaves, moving, dtype=wanted)
        architecture = OWN
    else:
        told, weights = peft_adapter(family, architecture, model, leaves, moving, dtype=wanted)
    made = unfinished(folder)
    try:
        files = write_adapter(made, told, weights, own=own)
        write_json(made / ABOUT, _about(run, experiment, trained.tokenizer))
        made.replace(folder)
    except OSError as error:
        raise UserError(f"can't write {folder}: {error.strerror}") from error
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return Exported(architecture, files, None)


def _about(run: RunDirectory, experiment: Experiment, tokenizer: Tokenizer) -> dict[str, Any]:
    """What `lm.json` says."""
    settings = configs.to_dict(experiment)
    data = {name: settings["data"][name] for name in ("seq_len", "packing", "chat", "label_separator")}
    template = tokenizer.chat_template
    return {
        "tokenizer": tokenizer.fingerprint(),
        "task": settings["task"],
        "data": data | {"labels": labels_of(run, experiment)},
        "chat_template": None if template is None else {"source": template.source, "tokens": dict(template.tokens)},
    }


@dataclass(frozen=True)
class Adapted:
    """A run that was made of a base and an adapter."""

    experiment: Experiment
    parameters: int
    """Of the adapter."""
    of: int
    """Of the whole model."""


def import_adapter(source: Path, path: Path, onto: Path, mesh: Mesh, *, checkpoint: str = "best") -> Adapted:
    """Makes a run directory of a run's model and an adapter for it, with one checkpoint, of step 0.

    What the adapter holds stands in the checkpoint, the rest of the model in `frozen`, as in a run that trained it.

    Args:
      source: a folder that `lm export --adapter` or PEFT's `save_pretrained` wrote.
      path: the run directory, not there yet.
      onto: the run of the base.
      mesh: where the parameters lie on their way.
      checkpoint: of the base: `best`, `latest`, or a step.

    Raises:
      UserError: anything about the folder or the runs; then nothing was written.
    """
    check(not path.exists(), f"{path} exists; name another folder for the run, or remove it")
    RunDirectory.check_new(path)
    folder = source.expanduser()
    check(folder.is_dir(), f"there is no folder {source}; download the adapter, and give its folder")
    peft = is_peft(folder)
    parent = RunDirectory.open(onto)
    base = load(onto, mesh, checkpoint)
    model, task = base.model.config, base.experiment.task
    check(
        not tuned_rates(model),
        f"{onto} has low-rank terms, adapters or a learned prompt itself; name the run that it was begun from",
    )
    leaves = dict(tree.path_leaves(base.params))
    shapes = {name: tuple(leaf.shape) for name, leaf in leaves.items()}
    if peft:
        family, _ = _family(parent, model, task.kind)
        found = read_peft(folder, family, model, shapes)
    else:
        found = _read_own(folder, model)
    target, shardings = abstract_params(Transformer(found.model), mesh)
    _check_parameters(folder, found, dict(tree.path_leaves(target)), shapes)
    at = dict(tree.path_leaves(shardings))

    def take(place: jax.tree_util.KeyPath, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = tree.path_string(place)
        mine = found.parameters.get(name)
        return jax.device_put((leaves[name] if mine is None else mine).astype(leaf.dtype), at[name])

    params = jax.tree_util.tree_map_with_path(take, target)
    rates = tuned_rates(found.model)
    tuned = dict(tree.path_leaves(freezing(OptimConfig(rates=rates), target).moves))
    optim = OptimConfig(rates=(*(f"{name}=1" for name in found.parameters if not tuned[name]), *rates))
    moving, frozen = tree.split(params, freezing(optim, params).moves)
    tokenizer, task, data = base.tokenizer, _task_of(found.model, model, task), base.experiment.data
    if (folder / ABOUT).is_file():
        about = read_json(folder / ABOUT)
        check(
            about.get("tokenizer") == tokenizer.fingerprint(),
            f"{source} is an adapter for a model with the tokenizer {about.get('tokenizer')}, and {onto} has"
            f" {tokenizer.fingerprint()}; name the run that it was trained beside",
        )
        told = configs.from_dict(
            Experiment, {"task": about.get("task", {}), "data": about.get("data", {})}, where=str(folder / ABOUT)
        )
        task, data = told.task, told.data
        if about.get("chat_template"):
            tokenizer.chat_template = ChatTemplate(**about["chat_template"])
    with new_run(path) as run:
        tokenizer.save(run.tokenizer)
        if parent.pretrained.is_dir():
            shutil.copytree(parent.pretrained, run.pretrained)
        save_parameters(run, moving, base.tokenizer)
        with contextlib.closing(Checkpoints(run.frozen)) as once:
            once.save(0, {"params": frozen}, {}, best=None)
            once.wait()
        experiment = Experiment(
            model=found.model,
            data=data,
            task=task,
            tokenizer=TokenizerConfig(kind=f"file:{run.tokenizer}"),
            optim=optim,
        )
        run.set_status("finished", step=0, reason=f"imported from {source}")
        run.write("config.json", configs.to_dict(experiment))  # last, as it makes the folder a run
    return Adapted(experiment, sum(map(np.size, found.parameters.values())), tree.count_parameters(target))


def _family(run: RunDirectory, model: ModelConfig, task: str) -> tuple[Any, str]:
    """The family of a run's model, and its architecture, low-rank terms aside."""
    original = run.pretrained / CONFIG
    preferred = read_json(original).get("model_type") if original.is_file() else None
    family, architecture, _ = expressed(dataclasses.replace(model, lora=LoraConfig()), task, preferred)
    return family, architecture


def _read_own(folder: Path, model: ModelConfig) -> Adapter:
    settings, weights = read_own(folder)
    settings = dataclasses.asdict(model) | settings
    return Adapter(configs.from_dict(ModelConfig, settings, where=str(folder / OWN_CONFIG)), weights)


def _check_parameters(
    folder: Path, found: Adapter, target: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Raises `UserError` unless base and adapter together are the model; lists all that is wrong."""
    missing = [
        name for name, leaf in target.items() if name not in found.parameters and shapes.get(name) != tuple(leaf.shape)
    ]
    extra = [name for name in found.parameters if name not in target]
    wrong = [
        f"{name} is of shape {list(value.shape)}, not {list(target[name].shape)}"
        for name, value in found.parameters.items()
        if name in target and tuple(value.shape) != tuple(target[name].shape)
    ]
    problems = [f"missing: {listed(missing)}"] if missing else []
    problems += [f"extra: {listed(extra)}"] if extra else []
    problems += wrong[:8]
    check(
        not problems,
        f"the adapter in {folder} is not of this base; {'; '.join(problems)}; name the run of the model that it was"
        " trained on",
    )


def _task_of(model: ModelConfig, base: ModelConfig, task: AnyTask) -> AnyTask:
    """The base's objective, or that of the head which the adapter brings."""
    if model.n_classes and model.n_classes != base.n_classes:
        return Classification()
    return ExtractiveQA() if model.span_head and not base.span_head else task
