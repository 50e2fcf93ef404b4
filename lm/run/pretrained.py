"""Pretrained models of Hugging Face as runs, and runs as models that `transformers` loads."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lm import config as configs
from lm import tree
from lm.checkpoint import Checkpoints
from lm.config import Experiment
from lm.data.config import DataConfig
from lm.errors import UserError, check
from lm.hf.export import parse_size, token_ids, unfinished, write_configs, write_weights
from lm.hf.families import expressed
from lm.hf.fields import MULTI_LABEL, class_names, told_classes
from lm.hf.load import Pretrained, check_weights, load_params, recognise
from lm.hf.source import CONFIG, GENERATION, open_source, read_json
from lm.hf.tokenizer import (
    begins_texts,
    copy_files,
    open_tokenizer,
    save_tokenizer,
    write_template,
    write_tokenizer,
)
from lm.loop import Progress
from lm.models.config import Float
from lm.models.lora import LoraConfig
from lm.models.transformer import Transformer
from lm.peft import merged
from lm.records import RunDirectory, environment
from lm.run.datasets import labels_of
from lm.run.use import load
from lm.tasks import AnyTask
from lm.tasks.causal_lm import CausalLM
from lm.tasks.classification import Classification
from lm.tasks.extractive_qa import ExtractiveQA
from lm.tasks.masked_lm import BertPretraining, MaskedLM
from lm.tasks.seq2seq import Seq2Seq
from lm.text.tokenizer import Tokenizer, TokenizerConfig
from lm.train import abstract_params

# What config.json says in ways that change, or of the files that are replaced.
_REPLACED = ("rope_parameters", "rope_scaling", "layer_types", "auto_map", "torch_dtype", "transformers_version")


@dataclass(frozen=True)
class Imported:
    """What was imported."""

    pretrained: Pretrained
    experiment: Experiment
    tokenizer: Tokenizer
    parameters: int


def import_run(
    source: str,
    path: Path,
    mesh: Mesh,
    *,
    dtype: Float = "float32",
    ids: bool = False,
    on_leaf: Callable[[int, int], None] = lambda done, total: None,
) -> Imported:
    """Makes a run directory of a pretrained model, with one checkpoint, of step 0.

    Args:
      source: a folder or a name on the hub.
      path: the run directory, not there yet.
      mesh: where the parameters lie on their way.
      dtype: of the parameters and of what is computed with them.
      ids: leave the tokenizer out: ids in, ids out.
      on_leaf: called with the number of parameters read and of all.

    Raises:
      UserError: anything about source or path; then nothing was written.
    """
    check(not path.exists(), f"{path} exists; name another folder for the run, or remove it")
    RunDirectory.check_new(path)
    opened = open_source(source)
    found = recognise(opened)
    model = dataclasses.replace(found.model, param_dtype=dtype, compute_dtype=dtype)
    vocab_size = model.vocab_size
    assert vocab_size is not None
    shapes, shardings = abstract_params(Transformer(model), mesh)
    check_weights(found, shapes)
    tokenizer = open_tokenizer(opened, vocab_size, ids=ids)
    params = load_params(found, shapes, shardings, on_leaf)

    with new_run(path) as run:
        original = run.pretrained
        original.mkdir()
        for name in (CONFIG, GENERATION):
            if (opened.folder / name).is_file():
                shutil.copyfile(opened.folder / name, original / name)
        if not ids:
            copy_files(opened.folder, original)
        tokenizer = save_tokenizer(tokenizer, opened, vocab_size, run.tokenizer)
        save_parameters(run, params, tokenizer)
        data = DataConfig(
            seq_len=min(model.max_len, 1024),
            packing="documents" if begins_texts(tokenizer, found.family.name) else "stream",
        )
        task = _task_of(found)
        if isinstance(task, Classification):
            data = dataclasses.replace(data, labels=class_names(opened.config, model.n_classes))
        experiment = Experiment(
            model=model,
            data=data,
            task=task,
            tokenizer=TokenizerConfig(kind=f"file:{run.tokenizer}"),
        )
        run.set_status("finished", step=0, reason=f"imported from {source}")
        run.write("config.json", configs.to_dict(experiment))  # last, as it makes the folder a run
    return Imported(found, experiment, tokenizer, tree.count_parameters(shapes))


@contextlib.contextmanager
def new_run(path: Path) -> Iterator[RunDirectory]:
    """A run directory, locked, to write a whole run into; where that fails it is gone again."""
    run = RunDirectory.create(path)
    run.lock()
    try:
        run.write("environment.json", environment())
        yield run
    except BaseException as error:  # Ctrl-C as well: what is there is none of a run
        shutil.rmtree(path, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(f"can't write {path}: {error.strerror}") from error
        raise
    finally:
        run.unlock()


def save_parameters(run: RunDirectory, params: Any, tokenizer: Tokenizer) -> None:
    """Writes a run's one checkpoint, of step 0."""
    extra = {"examples": 0, "tokenizer": tokenizer.fingerprint(), "progress": dataclasses.asdict(Progress())}
    in_flight = max(leaf.nbytes for leaf in jax.tree.leaves(params)) + 2**20
    with contextlib.closing(Checkpoints(run.checkpoints, keep=1, in_flight=in_flight)) as checkpoints:
        checkpoints.save(0, {"params": params}, extra, best=None)
        checkpoints.wait()


def _task_of(found: Pretrained) -> AnyTask:
    """What a pretrained model was trained for, as far as its heads show it."""
    model = found.model
    if found.architecture.endswith("ForSequenceClassification"):
        return Classification(multi_label=found.source.config.get("problem_type") == MULTI_LABEL)
    if model.encoder_layers:
        return Seq2Seq()
    if model.mask == "causal":
        return CausalLM()
    if model.span_head:
        return ExtractiveQA()
    if model.head_transform:
        return BertPretraining() if model.n_classes else MaskedLM()
    return Classification() if model.n_classes else MaskedLM()


@dataclass(frozen=True)
class Exported:
    """What was exported."""

    architecture: str
    files: list[str]
    note: str | None
    """What transformers can't be given of the tokenizer, if so."""


def export_run(
    path: Path,
    folder: Path,
    mesh: Mesh,
    *,
    checkpoint: str = "best",
    dtype: Float | None = None,
    max_shard_size: str = "5GB",
    on_shard: Callable[[int, int], None] = lambda done, total: None,
) -> Exported:
    """Writes a run's model and tokenizer as `transformers.AutoModel….from_pretrained` loads them.

    Low-rank terms are merged into their matrices.

    Args:
      path: the run directory.
      folder: where to, not there yet.
      mesh: where the parameters lie on their way.
      checkpoint: `best`, `latest`, or a step.
      dtype: of the weights; None = of the run's parameters.
      max_shard_size: of a file of weights, such as `5GB`.
      on_shard: called with the number of files written and of all.

    Raises:
      UserError: no such run, `folder` is there, or no family can express the model; then nothing was written.
    """
    size = parse_size(max_shard_size)
    check(not folder.exists(), f"{folder} exists; name another folder, or remove it")
    run = RunDirectory.open(path)
    experiment = configs.from_dict(Experiment, run.read("config.json"), where=str(run.path / "config.json"))
    original = run.pretrained
    config = read_json(original / CONFIG) if (original / CONFIG).is_file() else {}
    tuned, task = experiment.model, experiment.task.kind
    check(
        not (tuned.adapter_dim or tuned.prompt_len),
        f"{path} has {'adapters' if tuned.adapter_dim else 'a learned prompt'}, which no model of transformers has;"
        " export what was trained alone, with --adapter",
    )
    model = dataclasses.replace(tuned, lora=LoraConfig())
    family, architecture, ours = expressed(model, task, config.get("model_type"))
    trained = load(path, mesh, checkpoint)
    params = merged(tuned, trained.params)[1] if tuned.lora.rank else trained.params
    tokenizer = trained.tokenizer
    kept = {name: value for name, value in config.items() if name not in _REPLACED}
    if config.get("model_type") != ours["model_type"]:
        kept = {}
    named = dict(token_ids(tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id))
    if model.encoder_layers:
        named |= {"decoder_start_token_id": tokenizer.bos_id, "pad_token_id": named.get("pad_token_id", 0)}
    if isinstance(experiment.task, Classification):
        names = labels_of(run, experiment) or class_names(kept, model.n_classes)
        ours |= told_classes(names) if len(names) == model.n_classes else {}
        ours["problem_type"] = MULTI_LABEL if experiment.task.multi_label else "single_label_classification"
        has_head = any(row.ours == "head/kernel" for row in family.rows(architecture))
        params = {name: value for name, value in params.items() if name != "head" or has_head}
        if model.mask == "causal":  # transformers looks at the last token that is no padding: that must not be the end
            pad = named.get("pad_token_id")
            ours["pad_token_id"] = pad if pad != named.get("eos_token_id") else None
    wanted = dtype or model.param_dtype
    generation = read_json(original / GENERATION) if kept and (original / GENERATION).is_file() else named
    made = unfinished(folder)
    try:
        files = write_weights(
            made,
            family,
            architecture,
            params,
            dtype=jnp.dtype(wanted),
            max_shard_size=size,
            on_shard=on_shard,
        )
        told: dict[str, Any] = named if not kept else {}
        write_configs(made, kept | told | ours | {"dtype": wanted}, generation)
        note = None
        if not (original.is_dir() and copy_files(original, made)):
            note = write_tokenizer(tokenizer, made, model.max_len)
        else:
            write_template(tokenizer, made)
        made.replace(folder)
    except OSError as error:
        raise UserError(f"can't write {folder}: {error.strerror}") from error
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return Exported(architecture, files, note)
