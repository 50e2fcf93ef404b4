"""Scores of generated text against references: exact match, token F1, BLEU, chrF, ROUGE-L, all from 0 to 100.

Each comes with a standard error, texts being the independent units, and with what it became on resampled texts: the
same resamples for every score of so many texts, so that two systems can be compared in pairs (`difference`).
"""

from __future__ import annotations

import itertools
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any, Literal, Protocol

import numpy as np

from lm.errors import check, require
from lm.text.sentences import is_unspaced

Language = Literal["en", "zh"]
"""en: words stand between spaces; zh: each Chinese character and kana is a token, other scripts as in en."""

Texts = Sequence[str]
References = Sequence[str | Sequence[str]]
"""For each text what it should say, or several ways to say it; the best counts, or all together as the score has it."""

RESAMPLES = 200


@dataclass(frozen=True, kw_only=True)
class Score:
    """A score of some texts."""

    value: float
    """From 0 to 100, higher is better."""
    se: float
    """Standard error: of a mean over texts by its formula, of a corpus score by the bootstrap; NaN for one text."""
    signature: str
    """How it was computed, to be reported with it."""
    replicates: tuple[float, ...] = field(repr=False)
    """The score of each resample of the texts."""


class ScoreFunction(Protocol):
    """`(predictions, references, *, language, seed) -> Score`."""

    def __call__(self, predictions: Texts, references: References, *, language: Language, seed: int = 0) -> Score:
        """Predictions and as many references; the seed is that of the resamples."""


def exact_match(predictions: Texts, references: References, *, language: Language = "en", seed: int = 0) -> Score:
    """Share of predictions that equal a reference once normalised.

    `en` normalises as SQuAD v1.1 does: lower case, no punctuation, no articles, single spaces. `zh` as CMRC 2018 does:
    lower case, without its list of punctuation.
    """

    def equal(prediction: str, reference: str) -> float:
        return float(_normal(prediction, language) == _normal(reference, language))

    return _mean(_best(equal, predictions, references), f"exact_match|norm:{_NORM[language]}", seed)


def token_f1(predictions: Texts, references: References, *, language: Language = "en", seed: int = 0) -> Score:
    """Mean over predictions of the F1 of their tokens, with the best reference, after normalising as `exact_match`.

    `en`: words in common, in any order (SQuAD v1.1). `zh`: characters of the longest run in common (CMRC 2018, whose
    script also cuts English words at punctuation; here they stand between spaces). Nothing against nothing is 100.
    """

    def f1(prediction: str, reference: str) -> float:
        found, wanted = (list(_units(_normal(text, language), language)) for text in (prediction, reference))
        if not found or not wanted:
            return float(found == wanted)
        if language == "zh":
            common = _longest_common_run(found, wanted)
        else:
            common = (Counter(found) & Counter(wanted)).total()
        return 2 * common / (len(found) + len(wanted))

    return _mean(_best(f1, predictions, references), f"token_f1|norm:{_NORM[language]}", seed)


def bleu(predictions: Texts, references: References, *, language: Language = "en", seed: int = 0) -> Score:
    """Corpus BLEU as sacreBLEU has it, with its tokenizer 13a (en) or zh.

    Raises:
      UserError: sacrebleu is not installed.
    """
    sacrebleu: Any = require("sacrebleu", extra="scores", need="the score bleu")
    metric = sacrebleu.BLEU(tokenize={"en": "13a", "zh": "zh"}[language])
    return _sacrebleu("BLEU", metric, predictions, references, seed)


def chrf(predictions: Texts, references: References, *, language: Language = "en", seed: int = 0) -> Score:
    """Corpus chrF2 as sacreBLEU has it: n-grams of up to 6 characters without spaces, the same in every language.

    Raises:
      UserError: sacrebleu is not installed.
    """
    sacrebleu: Any = require("sacrebleu", extra="scores", need="the score chrf")
    return _sacrebleu("chrF2", sacrebleu.CHRF(), predictions, references, seed)


def rouge_l(predictions: Texts, references: References, *, language: Language = "en", seed: int = 0) -> Score:
    """Mean over predictions of ROUGE-L's F1 with the best reference: the longest common subsequence of tokens.

    `en`: as rouge-score cuts words, without stemming (it knows only a-z and 0-9). `zh`: characters.

    Raises:
      UserError: rouge-score is not installed.
    """
    require("rouge_score", extra="scores", need="the score rouge_l")
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], tokenizer=_Characters() if language == "zh" else None)

    def f1(prediction: str, reference: str) -> float:
        return scorer.score(reference, prediction)["rougeL"].fmeasure

    tokens = {"en": "rouge-score", "zh": "character"}[language]
    signature = f"rougeL|stem:no|tok:{tokens}|version:{metadata.version('rouge-score')}"
    return _mean(_best(f1, predictions, references), signature, seed)


SCORES: dict[str, ScoreFunction] = {
    "exact_match": exact_match,
    "token_f1": token_f1,
    "bleu": bleu,
    "chrf": chrf,
    "rouge_l": rouge_l,
}


def score_texts(
    names: Sequence[str], predictions: Texts, references: References, *, language: Language = "en", seed: int = 0
) -> dict[str, Score]:
    """Several scores by name, in the order asked for.

    Raises:
      UserError: an unknown name, no prediction, not as many references, or a package that is not installed.
    """
    for name in names:
        check(name in SCORES, f"there is no score {name!r}; choose from {', '.join(SCORES)}")
    return {name: SCORES[name](predictions, references, language=language, seed=seed) for name in names}


def difference(a: Score, b: Score) -> tuple[float, float]:
    """How much better `a` is than `b` on the same texts, and the standard error of that, by the paired bootstrap."""
    check(
        len(a.replicates) == len(b.replicates),
        f"one score has {len(a.replicates)} resamples and the other {len(b.replicates)}; compute both in the same way",
    )
    pairs = np.subtract(a.replicates, b.replicates)
    se = math.nan if math.isnan(a.se) or math.isnan(b.se) else float(np.std(pairs, ddof=1))
    return a.value - b.value, se


_NORM = {"en": "squad1.1", "zh": "cmrc2018"}
_PUNCTUATION = {
    "en": str.maketrans("", "", string.punctuation),
    "zh": str.maketrans("", "", "-:_*^/\\~`+=，。：？！“”；’《》·、「」（）－～『』"),
}
_ARTICLE = re.compile(r"\b(a|an|the)\b")


def _normal(text: str, language: Language) -> str:
    text = text.lower().translate(_PUNCTUATION[language])
    if language == "en":
        text = _ARTICLE.sub(" ", text)
    return " ".join(text.split())


def _units(text: str, language: Language) -> list[str]:
    """Tokens: what stands between spaces, in Chinese and Japanese every character."""
    if language == "en":
        return text.split()
    units: list[str] = []
    for unspaced, characters in itertools.groupby(text, is_unspaced):
        run = "".join(characters)
        units += run if unspaced else run.split()
    return units


def _longest_common_run(a: list[str], b: list[str]) -> int:
    longest, before = 0, [0] * (len(b) + 1)
    for x in a:
        row = [0] + [before[j] + 1 if x == y else 0 for j, y in enumerate(b)]
        longest, before = max(longest, *row), row
    return longest


class _Characters:
    """What rouge-score asks of a tokenizer."""

    def tokenize(self, text: str) -> list[str]:
        return _units(re.sub(r"[\W_]+", " ", text.lower()), "zh")


def _several(predictions: Texts, references: References) -> list[list[str]]:
    """The references of each prediction."""
    check(len(predictions) > 0, "there is no text to score; give at least one")
    check(
        len(predictions) == len(references),
        f"{len(predictions)} predictions and {len(references)} references; each prediction needs its own",
    )
    several = [[one] if isinstance(one, str) else list(one) for one in references]
    for index, one in enumerate(several):
        check(one, f"prediction {index} has no reference; give one, an empty text if need be")
    return several


def _best(value: Callable[[str, str], float], predictions: Texts, references: References) -> np.ndarray:
    several = _several(predictions, references)
    return np.array([max(value(text, one) for one in refs) for text, refs in zip(predictions, several)])


def _resamples(n: int, seed: int) -> list[np.ndarray]:
    """How often each of n texts is in each resample; the same for every score."""
    rng = np.random.default_rng(seed)
    return [np.bincount(rng.integers(0, n, n), minlength=n) for _ in range(RESAMPLES)]


def _mean(values: np.ndarray, signature: str, seed: int) -> Score:
    values, n = 100 * values, len(values)
    return Score(
        value=float(values.mean()),
        se=float(values.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan,
        signature=signature,
        replicates=tuple(float(counts @ values / n) for counts in _resamples(n, seed)),
    )


def _sacrebleu(name: str, metric: Any, predictions: Texts, references: References, seed: int) -> Score:
    several = _several(predictions, references)
    streams = list(itertools.zip_longest(*several))  # the first references, the second, ...; None = there is none
    # sacreBLEU's own bootstrap reads its seed from the environment; these two are what it is made of.
    counts = np.array(metric._extract_corpus_statistics(list(predictions), streams), np.int64)

    def value(sums: np.ndarray) -> float:
        return float(metric._compute_score_from_stats(sums.tolist()).score)

    replicates = tuple(value(times @ counts) for times in _resamples(len(counts), seed))
    return Score(
        value=value(counts.sum(axis=0)),
        se=float(np.std(replicates, ddof=1)) if len(counts) > 1 else math.nan,
        signature=f"{name}|{metric.get_signature()}",
        replicates=replicates,
    )
