"""What a trained model does with one text, as arrays: attention, the loss of each token, guesses on the way."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm import losses
from lm.data.parts import has_parts
from lm.errors import check
from lm.generate import SamplingConfig
from lm.generate.texts import make_generator
from lm.interpret import capture
from lm.models.transformer import ModelConfig, Transformer, flops_per_token, head_parameters
from lm.run import Trained
from lm.tasks.base import TokenTask, classified, hidden_of
from lm.tasks.classification import Classification

Batch = dict[str, np.ndarray]
Shape = tuple[int, int, int, int]

GUESSES = 5
"""So many tokens are kept of what each layer would write."""

_CAPTURED = 2 << 30  # bytes of float32 weights that may be captured at once
_CHEAP = 1e12  # operations of the passes that score a text of n tokens n times
_ROWS = 32


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A text as the model reads it; B = 1."""

    batch: Batch
    """As training has it: `tokens` [1, T] and so on, without padding and, where there is but one text, `segments`."""
    written: bool = False
    """Whether the target is the model's own."""
    mask_id: int | None = None
    """What hides a token from a model that sees both sides, if it was trained so."""

    @property
    def tokens(self) -> np.ndarray:
        """int32 [T]."""
        return self.batch["tokens"][0]

    @property
    def source(self) -> np.ndarray | None:
        """What an encoder reads, int32 [S]."""
        return self.batch["source_tokens"][0] if "source_tokens" in self.batch else None


@dataclass(frozen=True, kw_only=True)
class Lens:
    """What the output head makes of the residual stream before and after each layer, L layers of T tokens."""

    ids: np.ndarray
    """The likeliest tokens, the first first, int32 [L + 1, T, GUESSES]."""
    probabilities: np.ndarray
    """Theirs, float32 [L + 1, T, GUESSES]."""
    came: np.ndarray
    """The probability of what is to be told, float32 [L + 1, T]; nan where nothing is."""


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """All that is shown of a reading."""

    reading: Reading
    """The text."""
    attention: dict[str, np.ndarray]
    """By kind (`self`, `encoder`, `cross`): float32 [L, N, T, S], rows (queries) that sum to 1."""
    nats: np.ndarray | None
    """-log probability of what each place has to tell, float32 [T], nan where that is nothing; None = not known."""
    lens: Lens | None
    """None where the output head was never trained."""
    classes: np.ndarray | None
    """Probability of each class, float32 [C], of one of them or of each for itself; None without a classifier."""


def read(trained: Trained, texts: Sequence[str], source: str | None, target: str | None) -> Reading:
    """A text, a pair of texts or a source and a target, laid out as the run's examples are.

    Args:
      trained: the run.
      texts: one text, or two that belong together; none where there is a source.
      source: what an encoder reads, or what a decoder alone reads before the target.
      target: what is written to it; None = what the model writes itself, always taking the likeliest token.

    Raises:
      UserError: what is given is not what the model reads, is empty, or is too long.
    """
    config, task, tokenizer = trained.model.config, trained.experiment.task, trained.tokenizer
    takes_source = bool(config.encoder_layers) or task.kind in ("seq2seq", "prefix_lm")
    check(
        source is None or takes_source,
        "--source, but the run's model has no encoder and was not trained on sources; give --text instead",
    )
    check(target is None or source is not None, "--target goes with --source; give both, or --text alone")
    check(not (texts and source is not None), "--text and --source; give one of them")
    check(texts or source is not None, f"there is nothing to look at; give {'--source' if takes_source else '--text'}")
    check(
        not (texts and (config.encoder_layers or task.kind == "seq2seq")),
        "--text, but the run was trained on sources and targets; give --source and, if it is known, --target",
    )
    if source is not None:
        _check_length(config, trained.prompt_ids(source) if config.encoder_layers else [], "the source")
        _encode(trained, source, "--source")
        return _with_target(trained, source, target)

    ids = [_encode(trained, text, "--text") for text in texts]
    row: list[int]
    types: list[int] = []
    data = trained.experiment.data
    pairs = has_parts(data) or bool(data.mixture.datasets)
    several = task.kind in ("bert", "extractive_qa") or (task.kind == "classification" and pairs)
    check(
        len(ids) <= 1 + several,
        f"--text has {len(ids)} texts, and the run was trained on "
        + ("two at most; give one, or two that belong together" if several else "one; quote it as a whole"),
    )
    encoder = config.mask == "bidirectional" and task.kind != "masked_lm"
    if encoder or task.kind == "classification":
        row = [tokenizer.bos_id] if encoder else []
        for text in ids:
            row += [*text, tokenizer.eos_id]
        types = [int(place > len(ids[0]) + 1) for place in range(len(row))] if encoder else []
    else:
        row = trained.prompt_ids(texts[0])
    _check_length(config, row, "the text")
    batch = _row(row)
    if types:
        batch["types"] = np.array([types], np.int32)
    scored = task.kind != "classification" and config.mask != "bidirectional"
    batch["weights"][0, :-1] = float(scored)
    masked = isinstance(task, TokenTask) and config.mask == "bidirectional"
    return Reading(batch=batch, mask_id=tokenizer.mask_id if masked else None)


def inspect(trained: Trained, reading: Reading) -> Inspection:
    """Runs the model on a reading.

    Raises:
      UserError: the text is so long that its attention maps don't fit into memory.
    """
    config, batch = trained.model.config, reading.batch
    needed = 4 * sum(math.prod(shape) for shape in shapes(config, reading).values())
    check(
        needed <= _CAPTURED,
        f"the attention maps of {len(reading.tokens)} tokens take {needed / 2**30:.1f} GiB, more than"
        f" {_CAPTURED / 2**30:.0f}; give a shorter text",
    )
    captured = capture(trained.model, trained.params, batch)
    attention = {name: np.asarray(weights, np.float32)[:, 0] for name, weights in captured.attention.items()}
    lens = nats = classes = None
    if isinstance(trained.experiment.task, TokenTask):
        lens, nats = _lens(trained, np.asarray(captured.hidden)[:, 0], reading)
        if config.mask == "bidirectional":
            nats = _each_hidden(trained, reading)
    if config.n_classes:
        on_device = {name: jnp.asarray(value) for name, value in batch.items()}
        hidden = hidden_of(trained.model, trained.params, on_device, None)
        scores = classified(trained.model, trained.params, hidden, on_device, None)
        task = trained.experiment.task
        each = isinstance(task, Classification) and task.multi_label
        classes = np.asarray(jax.nn.sigmoid(scores[0]) if each else jax.nn.softmax(scores[0]))
    return Inspection(reading=reading, attention=attention, nats=nats, lens=lens, classes=classes)


def shapes(config: ModelConfig, reading: Reading) -> dict[str, Shape]:
    """Layers, heads, queries and keys of each kind of attention."""
    T = len(reading.tokens)
    found = {"self": (config.n_layers, config.n_heads, T, T)}
    if reading.source is not None:
        S = len(reading.source)
        found |= {
            "encoder": (config.encoder_layers, config.n_heads, S, S),
            "cross": (config.n_layers, config.n_heads, T, S),
        }
    return found


def _with_target(trained: Trained, source: str, target: str | None) -> Reading:
    """The reading of a source and its target, or of what the model makes the target to be."""
    config, tokenizer = trained.model.config, trained.tokenizer
    prompt, ended = trained.prompt_ids(source), True
    if target is None:
        found = make_generator(trained).generate([prompt], SamplingConfig(temperature=0.0))[0]
        ids, ended = found.ids, found.finished == "eos"
    else:
        ids = _encode(trained, target, "--target")
    if config.encoder_layers:
        line = [tokenizer.bos_id, *ids, tokenizer.eos_id]
        before = 1
    else:
        line = [*prompt, *ids, tokenizer.eos_id]
        before = len(prompt)
    if not ended:
        line.pop()
    row, targets = line[:-1], line[1:]
    _check_length(config, row, "the target" if config.encoder_layers else "source and target together")
    batch = _row(row)
    batch["targets"] = np.array([targets], np.int32)
    batch["weights"][0, before - 1 :] = 1.0
    if config.mask == "prefix":
        batch["prefix"] = (np.arange(len(row)) < before).astype(np.int32)[None]
    if config.encoder_layers:
        batch |= {f"source_{name}": value for name, value in _row(prompt).items() if name in ("tokens", "positions")}
    return Reading(batch=batch, written=target is None)


def _row(ids: Sequence[int]) -> Batch:
    """A batch of one row, each token to tell the next; nothing scored yet."""
    tokens = np.array([ids], np.int32)
    return {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, axis=1),
        "weights": np.zeros(tokens.shape, np.float32),
        "positions": np.arange(tokens.shape[1], dtype=np.int32)[None],
    }


def _encode(trained: Trained, text: str, option: str) -> list[int]:
    ids = trained.tokenizer.encode(text)
    check(ids, f"{option} has no tokens: the tokenizer makes nothing of {text[:40]!r}; give another text")
    return ids


def _check_length(config: ModelConfig, ids: Sequence[int], what: str) -> None:
    check(
        len(ids) <= config.max_len,
        f"{what} has {len(ids)} tokens, more than the {config.max_len} of model.max_len; give less text",
    )


def _lens(trained: Trained, hidden: np.ndarray, reading: Reading) -> tuple[Lens, np.ndarray]:
    """The lens on `[L + 1, T, D]`, and the loss in nats of each place, [T], at its end."""
    head = _normed_head(trained.model.config, trained.params)
    targets, scored = reading.batch["targets"][0], reading.batch["weights"][0] > 0
    if trained.model.config.mask == "bidirectional":  # what stands there is what is to be told
        targets, scored = reading.tokens, np.ones(len(reading.tokens), bool)
    look = functools.partial(_look, trained.model, trained.tokenizer.vocab_size)
    found = [jax.device_get(look(head, layer, targets)) for layer in hidden]
    ids, probabilities, nats = (np.stack(part) for part in zip(*found))
    nats = np.where(scored, nats, np.nan).astype(np.float32)
    return Lens(ids=ids, probabilities=probabilities, came=np.exp(-nats)), nats[-1]


def _normed_head(config: ModelConfig, params: Any) -> Any:
    head = head_parameters(config, params)
    return head | {"final_norm": params["final_norm"]} if config.norm_place == "pre" else head


@functools.partial(jax.jit, static_argnums=(0, 1))
def _look(model: Transformer, vocab_size: int, head: Any, hidden: jax.Array, targets: jax.Array):
    """Ids and probabilities of the likeliest tokens of each place, [T, GUESSES], and the nats of the targets, [T]."""

    def final(model: Transformer, hidden: jax.Array) -> jax.Array:
        return model.logits(model.normed(hidden))

    logits: Any = model.apply({"params": head}, hidden.astype(model.config.compute_dtype), method=final)
    # Of the whole vocabulary, as in training, though no row beyond the tokenizer's is shown.
    partition = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    best, ids = jax.lax.top_k(logits[:, :vocab_size], min(GUESSES, vocab_size))
    return ids, jnp.exp(best - partition), _nats(logits, targets)


def _nats(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """The loss of each token by itself: `[T, V]` and `[T]` to `[T]`."""
    one = jnp.ones((len(targets), 1), jnp.float32)
    return losses.cross_entropy(logits[:, None], targets[:, None], one, by_row=True)[1]["loss"]


def _each_hidden(trained: Trained, reading: Reading) -> np.ndarray | None:
    """The loss of each token from all others, [T]: the text as often as it has tokens, each time with one hidden.

    Their sum is the text's pseudo-log-likelihood (arXiv:1910.14659). None where nothing hides tokens, or it would take
    long.
    """
    tokens, T = reading.tokens, len(reading.tokens)
    special = list(trained.tokenizer.special_tokens.values())
    places = np.flatnonzero(~np.isin(tokens, special))
    config = trained.model.config
    if reading.mask_id is None or len(places) * T * flops_per_token(config, T) / 3 > _CHEAP:
        return None
    nats = np.full(T, np.nan, np.float32)
    for start in range(0, len(places), _ROWS):
        hidden = places[start : start + _ROWS]
        rows = np.resize(hidden, min(_ROWS, len(places)))  # all of one shape, which is compiled once
        batch = {name: np.repeat(value, len(rows), axis=0) for name, value in reading.batch.items()}
        batch["tokens"][np.arange(len(rows)), rows] = reading.mask_id
        found = _hidden_nats(trained.model, trained.params, batch, rows, tokens[rows])
        nats[hidden] = np.asarray(found)[: len(hidden)]
    return nats


@functools.partial(jax.jit, static_argnums=0)
def _hidden_nats(model: Transformer, params: Any, batch: dict[str, jax.Array], places: jax.Array, targets: jax.Array):
    hidden = hidden_of(model, params, batch, None)
    at_places = jnp.take_along_axis(hidden, places[:, None, None], axis=1)[:, 0]
    logits: Any = model.apply({"params": params}, at_places, method="logits")
    return _nats(logits, targets)
