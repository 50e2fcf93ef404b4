"""What a run writes to the sources of a split, scored against the targets."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm import run as runs
from lm.config import Experiment
from lm.data.mixture import Mixture
from lm.data.store import DatasetStore, part_texts
from lm.errors import check
from lm.generate import SamplingConfig
from lm.generate.texts import make_generator, write_lines
from lm.records import RunDirectory
from lm.text.scores import Language, score_texts


@dataclass(frozen=True, kw_only=True)
class Judged:
    """Texts and their scores."""

    step: int
    """The checkpoint's."""
    scores: dict[str, Any]
    """Each score by name, from 0 to 100, its standard error (`NAME_se`) and how it was computed (`NAME_signature`)."""
    sources: list[str]
    """What was read."""
    references: list[str]
    """The targets."""
    texts: list[str]
    """What was written."""
    cut: int
    """Sources that were too long and lost their end."""

    def save(self, path: Path) -> None:
        """A JSON object for each text."""
        rows = zip(self.sources, self.references, self.texts, strict=True)
        names = ("source", "reference", "text")
        write_lines(path, [json.dumps(dict(zip(names, row)), ensure_ascii=False) for row in rows])


def check_judgeable(path: Path, sampling: SamplingConfig, limit: int | None, on: Experiment | None = None) -> None:
    """Raises `UserError` where a run writes no texts to sources, or each source would not get one text."""
    kind = (on or runs.load_experiment(RunDirectory.open(path))).task.kind
    what = f"{path} was trained for" if on is None else "the task is"
    check(kind == "seq2seq", f"{what} {kind}; texts are written and scored for task seq2seq")
    check(limit is None or limit >= 1, f"the number of documents is {limit}; it must be at least 1")
    check(sampling.n_best == 1, f"n_best is {sampling.n_best}, but each source gets one text; leave it out")


def judge(
    path: Path,
    names: Sequence[str],
    sampling: SamplingConfig,
    *,
    on: Experiment | None = None,
    language: Language = "en",
    split: str = "validation",
    checkpoint: str = "best",
    batch_size: int = 32,
    limit: int | None = None,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
) -> Judged:
    """Lets a run of task seq2seq write, and scores what it wrote.

    Args:
      path: the run directory.
      names: scores of `lm.text.scores`: bleu, chrf, rouge_l, exact_match, token_f1.
      sampling: how to choose tokens.
      on: an experiment whose data and task count instead of the run's own.
      language: how texts are cut into tokens.
      split: which split of the dataset.
      checkpoint: `best`, `latest` or a step.
      batch_size: sources at a time.
      limit: only the first so many documents; None = all.
      on_batch: called with the sources done and all.

    Raises:
      UserError: see `check_judgeable`; or a checkpoint or split that is not there.
    """
    check_judgeable(path, sampling, limit, on)
    experiment, dataset = runs.measured(path, on, split)
    trained = dataclasses.replace(runs.load(path, runs.inference_mesh(), checkpoint), experiment=experiment)
    opened = dataset.store(split)
    pairs: list[Sequence[str]] = []
    for store in opened.stores if isinstance(opened, Mixture) else [opened]:
        # Texts as they were read, where they were kept: a tokenizer may know fewer letters or words.
        texts = store.texts if isinstance(store, DatasetStore) else None
        for document in range(len(store.document_offsets) - 1):
            if limit is None or len(pairs) < limit:
                decode = trained.tokenizer.decode
                pairs.append(part_texts(store, document, decode) if texts is None else texts[document])
    sources, references = ([pair[part] for pair in pairs] for part in (0, 1))
    target_len, source_len = trained.experiment.task.lengths(trained.experiment.data)
    if trained.model.config.encoder_layers:
        longest = source_len
    else:  # a source keeps at least half of a row, and more where what is written to it leaves room
        longest = max(target_len // 2, target_len - sampling.max_new_tokens)
    prompts = [trained.prompt_ids(source) for source in sources]
    cut = sum(len(ids) > longest for ids in prompts)
    # A source that is too long loses its end, but not the token that ends it.
    prompts = [[*ids[: longest - 1], ids[-1]] if len(ids) > longest else ids for ids in prompts]
    written = make_generator(trained).generate(
        prompts,
        sampling,
        decode=trained.tokenizer.decode,
        batch_size=batch_size,
        on_batch=lambda done: on_batch(done, len(prompts)),
    )
    answers = [one.text or "" for one in written]
    scores: dict[str, Any] = {}
    for name, score in score_texts(names, answers, references, language=language).items():
        scores |= {name: score.value, f"{name}_se": score.se, f"{name}_signature": score.signature}
    return Judged(step=trained.step, scores=scores, sources=sources, references=references, texts=answers, cut=cut)
