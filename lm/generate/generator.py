"""Prompts in, continuations out: the host's side of decoding."""

import contextlib
import zlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from lm.errors import UserError, check
from lm.generate.beam import search
from lm.generate.decode import bucket, draw_chunk, for_decoding, prefill
from lm.generate.sampling import SamplingConfig
from lm.models.transformer import ModelConfig
from lm.peft import merged
from lm.sharding import batch_sharding

Finished = Literal["eos", "stop", "length"]
Decode = Callable[[list[int]], str]

# Tokens between two looks of the host at what came out: it streams them and finds stop strings.
CHUNK = 16


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What followed one prompt."""

    prompt_ids: list[int]
    """The prompt."""
    ids: list[int]
    """The new tokens, without the end-of-document token; a stop string's tokens are still here."""
    logprobs: list[float]
    """Natural log of the model's own probability of each of `ids`, before any adjustment; float32 values."""
    finished: Finished
    """eos: the model ended the document; stop: a stop string came; length: no more tokens were asked for or fit."""
    text: str | None
    """The new text, cut before the first stop string; None without a decoder."""
    score: float | None = None
    """Of a beam search: the log-probability of what was found, with its end, over the length penalty."""


OnTokens = Callable[[int, list[int], str], None]


class Generator:
    """A model that is ready to generate. Generators of the same shape share what was compiled."""

    def __init__(
        self,
        config: ModelConfig,
        params: Any,
        *,
        vocab_size: int,
        eos_id: int | None,
        bos_id: int | None = None,
        mesh: Mesh | None = None,
    ):
        """Takes a model.

        Args:
          config: the model's shape.
          params: its parameters, without `nn.Partitioned` boxes, as in a train state; copied.
          vocab_size: of the tokenizer; the model's ids beyond it are never drawn.
          eos_id: the token that ends a document; None = there is none.
          bos_id: what the decoder of an encoder-decoder begins with, whose prompts are sources; others need none.
          mesh: where the parameters lie, to spread prompts over its axes `data` and `fsdp`; None = on one device.

        Raises:
          UserError: the model's vocabulary has no row for some of these ids, or it does not go from left to right.
        """
        check(
            config.mask != "bidirectional",
            "the model sees both sides (model.mask is bidirectional), so it can't continue a text;"
            " generation needs a causal or prefix model, or an encoder-decoder",
        )
        config = config.with_vocabulary(vocab_size)
        if config.lora.rank:  # beside the matrices, terms would cost a product each for every token
            config, params = merged(config, params)
        for name, token in (("eos_id", eos_id), ("bos_id", bos_id)):
            check(
                token is None or 0 <= token < vocab_size,
                f"{name} is {token}; the vocabulary's ids go from 0 to {vocab_size - 1}",
            )
        check(
            bos_id is not None or not config.encoder_layers,
            "an encoder-decoder (model.encoder_layers) begins to write with bos_id; give one",
        )
        self.config, self.vocab_size, self.eos_id, self.mesh = config, vocab_size, eos_id, mesh
        self._first = [bos_id] if bos_id is not None and config.encoder_layers else None
        with self._on_mesh():
            self._params = for_decoding(params, config)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        *,
        decode: Decode | None = None,
        on_tokens: OnTokens | None = None,
        batch_size: int | None = None,
        on_batch: Callable[[int], None] = lambda done: None,
    ) -> list[Generation]:
        """Continues every prompt.

        What follows a prompt depends on the seed, the prompt and how many equal prompts stand before it in the list,
        not on the rest of the batch (as far as a batch's size leaves float32 sums the same).

        Args:
          prompts: token ids; start them with the tokenizer's bos where there is no text to start from. Of an
            encoder-decoder the sources, as they were in training (with their eos).
          sampling: how to choose tokens.
          decode: the tokenizer's, to make text and find stop strings; what a beam search found is cut there.
          on_tokens: called with `(place in what is returned, ids, text)` as tokens come, by a beam search once for
            each text; the pieces join to `Generation.ids` and `Generation.text`, which is why text that may yet turn
            into a stop string comes later than its tokens.
          batch_size: prompts at a time, those of like lengths together; None = all.
          on_batch: called with the number of prompts done.

        Returns:
          One `Generation` a prompt, in order; from a beam search `sampling.n_best` each, the best first.

        Raises:
          UserError: no prompt, an empty one, an id outside the vocabulary, a prompt that leaves no room in the
            context, stop strings without a decoder, or a vocabulary too small for as many texts as were asked for.
        """
        self.check_prompts(prompts)
        check(decode is not None or not sampling.stop, "stop strings need a tokenizer; give one or leave stop out")
        check(batch_size is None or batch_size >= 1, f"batch_size is {batch_size}; it must be at least 1")
        order, size = list(range(len(prompts))), len(prompts)
        if batch_size is not None and batch_size < size:
            order.sort(key=lambda index: len(prompts[index]))
            size = batch_size
        hashes, repeats = prompt_streams(prompts)
        made: dict[int, Generation] = {}
        for begin in range(0, len(order), size):
            indices = order[begin : begin + size]
            # Every batch has as many rows, since another number would compile anew, and every device as many.
            missing = -(-size // self._row_parts) * self._row_parts - len(indices)
            rows = indices + indices[-1:] * missing
            texts = [list(prompts[row]) for row in rows]
            batch = _Batch(texts, self._first, missing, hashes[rows], repeats[rows])
            places = [[index * sampling.n_best + rank for rank in range(sampling.n_best)] for index in indices]
            with self._on_mesh():
                if sampling.beams > 1:
                    made |= self._search(batch, places, sampling, decode, on_tokens)
                else:
                    made |= self._draw(batch, places, sampling, decode, on_tokens)
            on_batch(begin + len(indices))
        return [made[place] for place in range(len(made))]

    def _draw(
        self,
        batch: "_Batch",
        places: list[list[int]],
        sampling: SamplingConfig,
        decode: Decode | None,
        on_tokens: OnTokens | None,
    ) -> dict[int, Generation]:
        """One text of each prompt, token by token."""
        acting, eos = sampling.adjustments(), self._eos(sampling)
        limit = batch.limit(sampling, self.config)
        state = self._begin(batch, limit, sampling)
        rows = [_Row(*batch.row(index), sampling.stop, decode) for index in range(len(places))]
        while not all(row.finished for row in rows):
            done = [row.finished is not None for row in rows] + [True] * batch.missing
            state, *drawn = draw_chunk(
                self._params,
                state | {"done": self._place(np.array(done))},
                self._place(limit),
                eos,
                acting,
                config=self.config,
                vocab_size=self.vocab_size,
                chunk=CHUNK,
                no_repeat=sampling.no_repeat_ngram,
            )
            tokens, logprobs = jax.device_get(drawn)
            for index, ((place,), row) in enumerate(zip(places, rows)):
                if row.finished:
                    continue
                new = tokens[index] >= 0
                self._check_finite(place, logprobs[index][new])
                ids, text = row.take(tokens[index][new].tolist(), logprobs[index][new].tolist(), int(eos), limit[index])
                if on_tokens is not None and (ids or text):
                    on_tokens(place, ids, text)
        return {place: row.generation() for (place,), row in zip(places, rows)}

    def _search(
        self,
        batch: "_Batch",
        places: list[list[int]],
        sampling: SamplingConfig,
        decode: Decode | None,
        on_tokens: OnTokens | None,
    ) -> dict[int, Generation]:
        """The likeliest texts of each prompt."""
        eos, limit = self._eos(sampling), batch.limit(sampling, self.config)
        found = search(
            self._params,
            self._begin(batch, limit, sampling) | {"done": self._place(np.arange(len(limit)) >= len(places))},
            self._place(limit),
            eos,
            np.float32(sampling.length_penalty),
            np.int32(sampling.n_best),
            config=self.config,
            vocab_size=self.vocab_size,
            beams=sampling.beams,
            no_repeat=sampling.no_repeat_ngram,
        )
        tokens, logprobs, ends, scores = jax.device_get(found)
        made = {}
        for index, row_places in enumerate(places):
            self._check_finite(row_places[0] // sampling.n_best, scores[index, :1])
            count = int(np.isfinite(scores[index]).sum())
            check(
                count >= sampling.n_best,
                f"n_best is {sampling.n_best}, but after one of the prompts only {count} text(s) can come; lower it",
            )
            for rank, place in enumerate(row_places):
                new = slice(batch.lengths[index], ends[index, rank])
                row = _Row(*batch.row(index), sampling.stop, decode)
                row.score = float(scores[index, rank])
                ids, text = row.take(
                    tokens[index, rank, new].tolist(), logprobs[index, rank, new].tolist(), int(eos), limit[index]
                )
                if on_tokens is not None and (ids or text):
                    on_tokens(place, ids, text)
                made[place] = row.generation()
        return made

    def _begin(self, batch: "_Batch", limit: np.ndarray, sampling: SamplingConfig) -> dict[str, Any]:
        """The state after the prompts."""
        width = 1 if self._first else bucket(int(batch.lengths.max()), self.config.context)
        source = None
        if self._first:
            lengths = np.array([len(prompt) for prompt in batch.prompts], np.int32)
            padded = pad(batch.prompts, bucket(int(lengths.max()), self.config.context))
            source = self._place(padded), self._place(lengths)
        return prefill(
            self._params,
            self._place(pad(batch.begins, width)),
            self._place(batch.lengths),
            np.uint32(sampling.seed),
            self._place(batch.hashes),
            self._place(batch.repeats),
            sampling.adjustments(),
            config=self.config,
            length=bucket(int(limit.max()), self.config.context),
            history=sampling.beams > 1 or sampling.no_repeat_ngram > 0,
            source=source,
        )

    def _eos(self, sampling: SamplingConfig) -> np.int32:
        return np.int32(-1 if sampling.ignore_eos or self.eos_id is None else self.eos_id)

    def _on_mesh(self) -> AbstractContextManager[Any]:
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    @property
    def _row_parts(self) -> int:
        return 1 if self.mesh is None else self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    def _place(self, rows: np.ndarray) -> Any:
        """Rows on their devices."""
        return rows if self.mesh is None else jax.device_put(rows, batch_sharding(self.mesh))

    @staticmethod
    def _check_finite(prompt: int, values: np.ndarray) -> None:
        check(
            np.isfinite(values).all(),
            f"prompt {prompt}: the model's logits are not finite; its parameters hold NaN or infinity",
        )

    def check_prompts(
        self, prompts: Sequence[Sequence[int]], name: Callable[[int], str] = lambda index: f"prompt {index}"
    ) -> None:
        """Raises `UserError` for prompts that `generate` can't serve, told by `name` of their index."""
        check(len(prompts) > 0, "there is no prompt; give at least one")
        for index, prompt in enumerate(prompts):
            n, most = len(prompt), self.config.context
            check(n > 0, f"{name(index)} has no token; start it with the tokenizer's bos_id")
            if self._first:
                check(
                    n <= most,
                    f"{name(index)} has {n} tokens; a source has at most model.max_len = {most}; shorten it",
                )
            check(
                self._first or n < most,
                f"{name(index)} has {n} tokens; the model's context (model.max_len) is {most}, new tokens included;"
                f" shorten it to {most - 1} or fewer",
            )
            for token in prompt:
                if not 0 <= token < self.vocab_size:
                    raise UserError(
                        f"{name(index)} has token id {token}, outside the vocabulary;"
                        f" ids go from 0 to {self.vocab_size - 1}"
                    )


def prompt_streams(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """What tells the random streams of prompts apart: a hash of each, and how many equal ones come before it."""
    counts: dict[tuple[int, ...], int] = {}
    hashes, repeats = [], []
    for prompt in map(tuple, prompts):
        hashes.append(zlib.crc32(np.array(prompt, "<i4").tobytes()))
        repeats.append(counts.get(prompt, 0))
        counts[prompt] = repeats[-1] + 1
    return np.array(hashes, np.uint32), np.array(repeats, np.uint32)


def pad(rows: Sequence[Sequence[int]], width: int) -> np.ndarray:
    """Token ids as int32 `[B, width]`, 0 behind them."""
    padded = np.zeros((len(rows), width), np.int32)
    for at, row in enumerate(rows):
        padded[at, : len(row)] = row
    return padded


class _Batch:
    """Prompts that run together; the last `missing` only fill the batch up.

    A row begins with its prompt; of an encoder-decoder with `first`, and the prompt is the source.
    """

    def __init__(
        self, prompts: list[list[int]], first: list[int] | None, missing: int, hashes: np.ndarray, repeats: np.ndarray
    ):
        self.prompts, self.missing, self.hashes, self.repeats = prompts, missing, hashes, repeats
        self.begins = [first or prompt for prompt in prompts]
        self.lengths = np.array([len(begin) for begin in self.begins], np.int32)

    def row(self, index: int) -> tuple[list[int], list[int]]:
        """A row's prompt, and what it begins with."""
        return self.prompts[index], self.begins[index]

    def limit(self, sampling: SamplingConfig, config: ModelConfig) -> np.ndarray:
        """How long each row may become, prompt included: int32 `[B]`."""
        return np.minimum(self.lengths + sampling.max_new_tokens, config.context).astype(np.int32)


class _Row:
    """The host's side of one prompt: its tokens so far, its text, and whether it is finished."""

    def __init__(self, prompt: list[int], begin: list[int], stop: tuple[str, ...], decode: Decode | None):
        self.prompt, self.begin, self.stop, self.decode = prompt, begin, stop, decode
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.finished: Finished | None = None
        self.score: float | None = None
        self.text = ""  # final: given out already, or about to be
        # Decoded with what stands in front, since some tokenizers drop the space before the first token.
        self.before = len(decode(begin).rstrip("\ufffd")) if decode else 0

    def take(self, ids: list[int], logprobs: list[float], eos: int, limit: int) -> tuple[list[int], str]:
        """Adds tokens; returns those that count, and the text that is now certain."""
        first = len(self.ids)
        ended = bool(ids) and ids[-1] == eos
        self.ids += ids[:-1] if ended else ids
        if ended:
            self.finished = "eos"
        elif len(self.begin) + len(self.ids) >= limit:
            self.finished = "length"
        text = self._decoded(len(self.ids))
        if self._stop_at(text) is not None:
            self.finished = "stop"
            # Of this chunk, the tokens up to the one that completes the stop string.
            while len(self.ids) - 1 > first and self._stop_at(self._decoded(len(self.ids) - 1)) is not None:
                self.ids.pop()
            text = text[: self._stop_at(text)]
        elif self.finished is None:
            text = text[: self._certain(text)]
        self.logprobs += logprobs[: len(self.ids) - first]
        new = text[len(self.text) :]
        self.text += new
        return self.ids[first:], new

    def generation(self) -> Generation:
        """The result, once finished."""
        assert self.finished is not None
        text = self.text if self.decode else None
        return Generation(
            prompt_ids=self.prompt,
            ids=self.ids,
            logprobs=self.logprobs,
            finished=self.finished,
            text=text,
            score=self.score,
        )

    def _decoded(self, count: int) -> str:
        return self.decode(self.begin + self.ids[:count])[self.before :] if self.decode else ""

    def _stop_at(self, text: str) -> int | None:
        found = [at for stop in self.stop if (at := text.find(stop)) >= 0]
        return min(found, default=None)

    def _certain(self, text: str) -> int:
        """Length of the part that no further token can change: before a cut character or the start of a stop string."""
        end = len(text.rstrip("\ufffd"))
        for stop in self.stop:
            for size in range(min(len(stop) - 1, end), 0, -1):
                if text.endswith(stop[:size]):
                    end = min(end, len(text) - size)
                    break
        return end
