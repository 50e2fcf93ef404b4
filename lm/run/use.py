"""A run that is trained: loaded, and ready to be used."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from lm import config as configs
from lm import tree
from lm.checkpoint import Checkpoints
from lm.config import Experiment
from lm.errors import check
from lm.loop import restore_frozen
from lm.models.heads import pool
from lm.models.transformer import Transformer
from lm.optim import freezing
from lm.records import RunDirectory
from lm.sharding import DEFAULT_RULES, MeshConfig, Rules, make_mesh
from lm.text.chat import Chat
from lm.text.template import Message
from lm.text.tokenizer import Tokenizer, load_tokenizer
from lm.train import abstract_params

Pooling = Literal["first", "last", "mean"]


def load_experiment(run: RunDirectory) -> Experiment:
    """The settings a run was started with."""
    return configs.from_dict(Experiment, run.read("config.json"), where=str(run.path / "config.json"))


@dataclass(frozen=True)
class Trained:
    """A trained run, ready to be used."""

    experiment: Experiment
    tokenizer: Tokenizer
    model: Transformer
    params: Any
    step: int
    before: tuple[Message, ...] | None = None
    """What was said before a prompt, which is then a user's turn; None = nothing, and a turn only where the run
    learned from conversations (task instruction)."""

    @functools.cached_property
    def chat(self) -> Chat | None:
        """How prompts become conversations; None where they are texts to go on from."""
        talks = self.before is not None or self.experiment.task.kind == "instruction"
        return Chat(self.tokenizer) if talks else None

    @property
    def end_id(self) -> int:
        """The token that ends what it writes."""
        return self.tokenizer.eos_id if self.chat is None else self.chat.end_id

    def prompt_ids(self, text: str) -> list[int]:
        """A prompt as documents begin in training: packed documents after bos; in a stream, after the eos before them.

        In a stream, where text is cut anywhere, only a prompt without text must begin at a document's begin. Sources
        have an end: of an encoder-decoder that is all, a decoder alone begins them as a document. Of a conversation it
        is the user's turn, and what comes before the answer.
        """
        if self.chat is not None:
            return self.chat.prompt([*(self.before or ()), Message("user", text)])
        ids = self.tokenizer.encode(text)
        if self.model.config.encoder_layers:
            return [*ids, self.tokenizer.eos_id]
        if self.experiment.task.kind == "seq2seq":
            return [self.tokenizer.bos_id, *ids, self.tokenizer.eos_id]
        if self.experiment.data.packing != "stream":
            return [self.tokenizer.bos_id, *ids]
        return ids or [self.tokenizer.eos_id]


def embed(
    trained: Trained, texts: Sequence[str], *, pooling: Pooling | None = None, batch_size: int = 32
) -> np.ndarray:
    """A vector for each text, from the hidden states of an encoder or a decoder.

    An encoder reads `[CLS] text [SEP]`, a decoder the text and the token that ends it; what is longer than
    `model.max_len` loses its end. A projection behind the pooling (BERT's pooler, made for pairs) is not applied.

    Args:
      trained: from `load`, on one device.
      texts: what is read.
      pooling: `first` or `last` token, or the `mean` of all; None = as `model.pooling` has it.
      batch_size: texts at a time, those of like lengths together; it changes no vector.

    Returns:
      float32 `[N, D]`, in the order of the texts, not scaled to a length.

    Raises:
      UserError: an encoder-decoder.
    """
    config, tokenizer = trained.model.config, trained.tokenizer
    check(not config.encoder_layers, "the run is an encoder-decoder, which has no vector for a text; use another model")
    begin = [tokenizer.bos_id] if config.mask == "bidirectional" else []
    room = config.context - len(begin) - 1
    rows = [[*begin, *tokenizer.encode(text)[:room], tokenizer.eos_id] for text in texts]

    @jax.jit
    def vectors(params: Any, tokens: Array, segments: Array) -> Array:
        hidden: Any = trained.model.apply({"params": params}, tokens, None, segments, method="hidden")
        return pool(hidden[0], segments, pooling or config.pooling).astype(jnp.float32)

    found = np.zeros((len(rows), config.d_model), np.float32)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        # Lengths in powers of two, so that few programs are compiled.
        length = min(config.context, 1 << (len(rows[chosen[-1]]) - 1).bit_length())
        tokens, segments = np.zeros((2, batch_size, length), np.int32)
        for row, i in enumerate(chosen):
            tokens[row, : len(rows[i])], segments[row, : len(rows[i])] = rows[i], 1
        found[chosen] = np.asarray(vectors(trained.params, tokens, segments))[: len(chosen)]
    return found


def load(path: Path, mesh: Mesh, checkpoint: str = "best", rules: Rules = DEFAULT_RULES) -> Trained:
    """Reads a run's parameters (their average where the run keeps one) onto a mesh.

    Args:
      path: the run directory.
      mesh: any mesh.
      checkpoint: `best` (as `train.best` has it; the latest where there was no evaluation), `latest`, or a step.
      rules: which logical axes lie on which mesh axes.

    Raises:
      UserError: no such run or checkpoint.
    """
    run = RunDirectory.open(path)
    experiment = load_experiment(run)
    model = Transformer(experiment.model)
    shapes, shardings = abstract_params(model, mesh, rules)
    averaged = experiment.train.ema_decay > 0
    target = jax.tree.map(lambda s, at: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at), shapes, shardings)
    trained, frozen = tree.split(target, freezing(experiment.optim, shapes).moves)
    if averaged:
        trained = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, jnp.float32, sharding=s.sharding), trained)
    checkpoints = Checkpoints.read_only(run.checkpoints)
    try:
        step = choose_checkpoint(run, checkpoints, checkpoint)
        name = "ema" if averaged else "params"
        params = tree.merge(checkpoints.restore(step, {name: trained})[name], restore_frozen(run, frozen))
    finally:
        checkpoints.close()
    return Trained(experiment, load_tokenizer(run.tokenizer), model, params, step)


def choose_checkpoint(run: RunDirectory, checkpoints: Checkpoints, wanted: str) -> int:
    """The step that `best`, `latest` or a number names. Raises `UserError` where there is none."""
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


def inference_mesh() -> Mesh:
    """One device: where generation runs."""
    return make_mesh(MeshConfig(data=1, devices=1))
