"""`lm evaluate`: how good a run is on a split of its dataset."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from lm import config as configs
from lm import run as runs
from lm.commands.exits import DONE
from lm.commands.shared import RunArgument, open_console, show
from lm.errors import check
from lm.generate import SamplingConfig
from lm.generate.texts import check_output
from lm.judge import check_judgeable, judge
from lm.sharding import MeshConfig
from lm.text.scores import Language


@dataclass(frozen=True, kw_only=True)
class EvaluateArguments:
    """How good a run is on a split of its dataset: its objective's loss and metrics, with standard errors."""

    run: RunArgument
    """Run directory."""
    split: Literal["train", "validation", "test"] = "validation"
    """Which split."""
    checkpoint: str = "best"
    """best (by validation loss), latest, or a step."""
    batches: int | None = None
    """At most so many batches; None = the whole split."""
    scores: tuple[Literal["bleu", "chrf", "rouge_l", "exact_match", "token_f1"], ...] = ()
    """Also write a text to each source of the split (task seq2seq) and score it against the target."""
    language: Language = "en"
    """How scores cut texts: en by words, zh by characters."""
    texts: Path | None = None
    """With scores: where to write sources, targets and texts, as JSON lines; None = nowhere."""
    limit: int | None = None
    """With scores: only so many documents are written to; None = all."""
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(temperature=0.0))
    """How texts are written."""
    baselines: bool = False
    """Also compress the same text without a model: byte entropy and zlib."""
    json: bool = False
    """One JSON object instead of a table."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """How devices are arranged."""


def _scores(asked: EvaluateArguments, console: Console) -> dict[str, Any]:
    """What the run writes, scored; the texts to a file if that is asked for."""
    with console.status("writing") as status:
        judged = judge(
            asked.run,
            asked.scores,
            asked.sampling,
            language=asked.language,
            split=asked.split,
            checkpoint=asked.checkpoint,
            limit=asked.limit,
            on_batch=lambda done, total: status.update(f"writing {done}/{total}"),
        )
    if asked.texts is not None:
        judged.save(asked.texts)
    return judged.scores | {"written": len(judged.texts), "cut": judged.cut}


def _check_scores(asked: EvaluateArguments) -> None:
    """Raises `UserError` where scores can't be had, before anything is computed."""
    if asked.scores:
        check_judgeable(asked.run, asked.sampling, asked.limit)
        if asked.texts is not None:
            check_output(asked.texts, "--texts")
        return
    for option, value in (("--texts", asked.texts), ("--limit", asked.limit)):
        check(value is None, f"{option} is {value}, and nothing is written without --scores; add --scores bleu")


def run(arguments: list[str]) -> int:
    """`lm evaluate RUN [options]`."""
    asked = configs.parse(EvaluateArguments, None, arguments, prog="lm evaluate")
    _check_scores(asked)
    console = open_console()
    with console.status("evaluating") as status:
        result = runs.evaluate_run(
            asked.run,
            split=asked.split,
            checkpoint=asked.checkpoint,
            mesh=asked.mesh,
            max_batches=asked.batches,
            with_baselines=asked.baselines,
            on_batch=lambda done, total: status.update(f"evaluating {done}/{total}"),
        )
    if asked.scores:
        result |= _scores(asked, console)
    if asked.json:
        print(json.dumps(result))
        return DONE
    # Above the table, not its title: that would be broken where the table is narrower.
    show(console, f"{asked.run} at step {result['step']}, {result['split']} split")
    table = Table()
    table.add_column("what")
    table.add_column("value", justify="right")
    for name, (label, form) in _ROWS.items():
        if name in result:
            error = f" ± {form.format(result[f'{name}_se'])}" if f"{name}_se" in result else ""
            table.add_row(label, form.format(result[name]) + error)
    console.print(table)
    return DONE


# What a table shows, in this order, of what the objective reports; ± is a standard error.
_ROWS = {
    "tokens": ("scored", "{:,.0f}"),
    "loss": ("loss (nats)", "{:.4f}"),
    "masked_loss": ("  of masked tokens", "{:.4f}"),
    "next_loss": ("  of next sentences", "{:.4f}"),
    "perplexity": ("perplexity", "{:.3f}"),
    "accuracy": ("accuracy", "{:.2%}"),
    "next_accuracy": ("accuracy of next sentences", "{:.2%}"),
    "macro_f1": ("macro F1", "{:.3f}"),
    "micro_f1": ("micro F1", "{:.3f}"),
    "exact_match": ("exact match (of 100)", "{:.2f}"),
    "f1": ("F1 of words (of 100)", "{:.2f}"),
    "bits_per_byte": ("bits per byte", "{:.3f}"),
    "written": ("texts written", "{:,}"),
    "cut": ("  whose source lost its end", "{:,}"),
    "bleu": ("BLEU", "{:.2f}"),
    "chrf": ("chrF", "{:.2f}"),
    "rouge_l": ("ROUGE-L", "{:.2f}"),
    "token_f1": ("F1 of tokens", "{:.2f}"),
    "order0_bits_per_byte": ("  byte frequencies alone (order-0 entropy)", "{:.3f}"),
    "zlib_bits_per_byte": ("  zlib level 9", "{:.3f}"),
}
