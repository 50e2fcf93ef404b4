"""Extractive question answering: where in a text the answer to a question stands (SQuAD, arXiv:1606.05250)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm import losses, metrics
from lm.data.config import DataConfig
from lm.data.loader import Maker
from lm.data.objectives.parts import SpanQAExamples
from lm.data.packing import Examples
from lm.data.parts import asks_questions
from lm.data.store import TokenStore
from lm.errors import check
from lm.models.transformer import ModelConfig, Transformer
from lm.tasks.base import BaseTask, Batch, Sums, check_mask, hidden_of, reported
from lm.text.scores import Language, exact_match, token_f1
from lm.text.tokenizer import Tokenizer

Array = jax.Array

CLOSED = -1e9
"""The score of a place where no answer can begin or end: of padding, the question and separators. Finite, so that
products with a probability of 0 are 0."""
N_BEST = 20
"""Answers looked at in each window."""


class Answer(NamedTuple):
    """An answer that a model gives."""

    text: str
    """Whole words of the text, without white space around them; empty for "no answer"."""
    score: float
    """The model's scores of its start and its end, added; of "no answer" less the task's `no_answer`."""


@dataclass(frozen=True, kw_only=True)
class ExtractiveQA(BaseTask):
    """The first and the last token of the answer, of questions about texts (`squad:` sources)."""

    kind: Literal["extractive_qa"] = "extractive_qa"
    """The objective."""
    stride: int = 128
    """Tokens from one window of a text that doesn't fit into data.seq_len to the next."""
    max_question: int = 64
    """Longer questions are cut, in tokens."""
    max_answer: int = 30
    """The longest answer given, in tokens."""
    no_answer: float | None = None
    """By how much "no answer" must outscore the best answer to be given; None = every question has an answer."""
    language: Language = "en"
    """How answers are compared: en by words as SQuAD does, zh by characters as CMRC 2018 does."""

    def __post_init__(self) -> None:
        """Checks ranges."""
        for name in ("stride", "max_question", "max_answer"):
            value = getattr(self, name)
            check(value >= 1, f"task.{name} is {value}; it must be at least 1")

    @property
    def reports(self) -> tuple[str, ...]:
        """See `Task`."""
        return ("loss", "accuracy")

    def check(self, model: ModelConfig, data: DataConfig) -> None:
        """See `Task`."""
        check_mask(self.kind, model, "bidirectional")
        check(
            asks_questions(data) or bool(data.mixture.datasets),
            f"task {self.kind} needs questions with answers in a text; set data.source to squad:GLOB",
        )
        check(
            model.token_types != 1,
            "model.token_types is 1; a question and a text have 2 types: set 2, or 0 for none",
        )
        check(
            data.seq_len >= self.max_question + 4,
            f"data.seq_len is {data.seq_len}; with questions of up to {self.max_question} tokens (task.max_question) it"
            f" must be at least {self.max_question + 4}",
        )

    def settle(self, model: ModelConfig, labels: Sequence[str]) -> ModelConfig:
        """See `Task`."""
        del labels
        return dataclasses.replace(model, span_head=True)

    def maker(self, model: ModelConfig, tokenizer: Tokenizer, labels: Sequence[str]) -> Maker:
        """See `Task`."""
        del model, labels

        def make(store: TokenStore, config: DataConfig, training: bool) -> Examples:
            del training  # every window is an example
            examples = SpanQAExamples(
                store,
                config.seq_len,
                bos_id=tokenizer.bos_id,
                eos_id=tokenizer.eos_id,
                stride=self.stride,
                max_question=self.max_question,
            )
            without = 0 if store.spans is None else int((store.spans[:, 0] < 0).sum())
            check(
                self.no_answer is not None or not without,
                f"{without} of the dataset's {len(store.document_offsets) - 1} questions have no answer; set"
                " task.no_answer, as to 0",
            )
            return examples

        return make

    def loss_from(
        self, model: Transformer, params: Any, hidden: Array, batch: Batch, dropout_key: Array | None
    ) -> tuple[Array, Sums]:
        """See `Task`: the mean of both cross-entropies; `correct` are windows with both places right."""
        by_row = dropout_key is None
        logits, weights = self.scores(model, params, hidden, batch)
        targets = jnp.stack([batch["starts"], batch["ends"]], axis=1)
        total, sums = losses.cross_entropy(logits, targets, weights, by_row=by_row)
        right = jnp.all(jnp.argmax(logits, axis=-1) == targets, axis=1) * batch["label_weights"]
        sums["correct"] = right if by_row else right.sum()
        return total, reported(sums, batch["label_weights"], by_row)

    def scores(self, model: Transformer, params: Any, hidden: Array, batch: Batch) -> tuple[Array, Array]:
        """See `Task`: of each place as start and as end, float32 `[B, 2, T]`, `CLOSED` where neither can be."""
        spans: Any = model.apply({"params": params}, hidden, method="spans")
        place, last = jnp.arange(spans.shape[1]), batch["segments"].sum(axis=1, keepdims=True) - 1
        # [CLS] and the text; of the second type there is also the separator behind it.
        is_open = (place == 0) | ((batch["types"] > 0) & (place < last))
        logits = jnp.where(is_open[:, None], jnp.moveaxis(spans, -1, 1), CLOSED)
        return logits, jnp.repeat(batch["label_weights"][:, None] / 2, 2, axis=1)

    def summarise(self, sums: metrics.Sums) -> dict[str, float]:
        """`loss` in nats and `accuracy`, of windows, with their standard errors."""
        result = {"loss": metrics.ratio(sums, "loss"), "accuracy": metrics.ratio(sums, "correct")}
        if sums.get("rows", 0) >= 2:
            result["loss_se"] = metrics.ratio_error(sums, "loss")
            result["accuracy_se"] = metrics.ratio_error(sums, "correct")
        return result

    def say(self, model: Transformer, params: Any, batch: Batch) -> dict[str, Array]:
        """See `AnsweringTask`: `best_spans` of each window."""
        logits, _ = self.scores(model, params, hidden_of(model, params, batch, None), batch)
        return best_spans(logits, self.max_answer, N_BEST)

    def answers(
        self, said: Iterable[Mapping[str, np.ndarray]], store: TokenStore, examples: SpanQAExamples
    ) -> dict[int, list[Answer]]:
        """The best answers to each document, best first, over all its windows; never none at all.

        Args:
          said: what `say` gives for each batch of `examples`, in order; a document with windows beyond the last batch
            gets no answer.
          store: the documents.
          examples: their windows.
        """
        answers: dict[int, list[Answer]] = {}
        found: dict[tuple[int, int], float] = {}  # by first and last word
        without = np.inf
        rows = (dict(zip(batch, row)) for batch in said for row in zip(*batch.values()))
        for index, row in zip(range(len(examples)), rows):
            words, real = examples.words(index), row["score"] > CLOSED / 2
            for first, last, score in zip(*(row[name][real].tolist() for name in ("first", "last", "score"))):
                span = int(words[first]), int(words[last])
                found[span] = max(found.get(span, -np.inf), score)
            without = min(without, float(row["none"]))  # as BERT: each window must do without the answer
            (document,) = examples.documents(index)
            if index + 1 == len(examples) or examples.documents(index + 1)[0] != document:
                answers[int(document)] = self._ranked(found, without, store.questions[document].words)
                found, without = {}, np.inf
        return answers

    def _ranked(self, found: dict[tuple[int, int], float], without: float, words: Sequence[str]) -> list[Answer]:
        given = [Answer("".join(words[first - 1 : last]).strip(), score) for (first, last), score in found.items()]
        if self.no_answer is not None or not given:
            given.append(Answer("", without - (self.no_answer or 0.0)))
        return sorted(given, key=lambda answer: -answer.score)[:N_BEST]

    def texts(
        self, said: Iterable[Mapping[str, np.ndarray]], store: TokenStore, examples: Examples
    ) -> list[tuple[str, Sequence[str]]]:
        """See `AnsweringTask`."""
        assert isinstance(examples, SpanQAExamples)
        answers = self.answers(said, store, examples)
        return [(best[0].text, store.questions[document].answers or [""]) for document, best in answers.items()]

    def score_texts(self, texts: Sequence[tuple[str, Sequence[str]]]) -> dict[str, float]:
        """See `AnsweringTask`: `exact_match` and `f1` from 0 to 100, and their standard errors."""
        given, right = [text for text, _ in texts], [answers for _, answers in texts]
        result: dict[str, float] = {}
        for name, function in (("exact_match", exact_match), ("f1", token_f1)):
            score = function(given, right, language=self.language)
            result |= {name: score.value, f"{name}_se": score.se}
        return result


def best_spans(logits: Array, longest: int, n: int) -> dict[str, Array]:
    """The spans with the highest sum of the scores of their first and last place.

    Args:
      logits: of each place as start and as end, float32 `[B, 2, T]`; place 0 is `[CLS]` and in no span.
      longest: places in a span, at most.
      n: how many spans.

    Returns:
      `score` float32, `first` and `last` int32, `[B, n]`, best first (at most as many as there are); `none` float32
      `[B]`, the score of `[CLS]` as both. Spans with `CLOSED` places are among them where there are too few.
    """
    B, _, T = logits.shape
    starts, ends = logits[:, 0], logits[:, 1]
    width = min(longest, T)
    at = jnp.arange(T)[:, None] + jnp.arange(width)
    reached = jnp.pad(ends, ((0, 0), (0, width)), constant_values=CLOSED)[:, at]
    both = (starts[:, :, None] + reached).at[:, 0].set(2 * CLOSED)
    score, flat = jax.lax.top_k(both.reshape(B, T * width), min(n, T * width))
    first, length = jnp.divmod(flat, width)
    return {"score": score, "first": first, "last": first + length, "none": starts[:, 0] + ends[:, 0]}
