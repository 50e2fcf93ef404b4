"""`lm evaluate`: how good a run is on a split of its dataset, or of the data of a config."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lm import config as configs
from lm import run as runs
from lm.commands.exits import DONE
from lm.commands.shared import RunArgument, open_console, show
from lm.config import Experiment
from lm.console import PreparationReporter
from lm.data.config import DataConfig
from lm.errors import check
from lm.generate import SamplingConfig
from lm.generate.texts import check_output
from lm.judge import check_judgeable, judge
from lm.sharding import MeshConfig
from lm.tasks import AnyTask
from lm.tasks.causal_lm import CausalLM
from lm.text.augment import AugmentConfig
from lm.text.clean import CleanConfig
from lm.text.dedup import DedupConfig
from lm.text.scores import Language


@dataclass(frozen=True, kw_only=True)
class EvaluateArguments:
    """How good a run is on a split of its dataset: its objective's loss and metrics, with standard errors."""

    run: RunArgument
    """Run directory."""
    on: Path | None = None
    """A config file whose data and task count instead of the run's own, with the run's model and tokenizer. Its
    settings of data, clean, dedup, augment and task can be overridden: --on CONFIG.py --data.source ..."""
    split: Literal["train", "validation", "test"] = "validation"
    """Which split."""
    checkpoint: str = "best"
    """best (as train.best has it), latest, or a step."""
    batch_size: int | None = None
    """Rows at a time, which changes no result; None = as in training, or as the config of --on has it."""
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


@dataclass(frozen=True, kw_only=True)
class EvaluateOnArguments(EvaluateArguments):
    """How good a run is on the data and the task of a config."""

    data: DataConfig = field(default_factory=DataConfig)
    """The text and how it is read."""
    clean: CleanConfig = field(default_factory=CleanConfig)
    """The rules every document goes through before anything else."""
    dedup: DedupConfig = field(default_factory=DedupConfig)
    """Which duplicates are removed."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Altered copies of training documents."""
    task: AnyTask = field(default_factory=CausalLM)
    """The objective; the config file chooses it, the command line its settings."""


_SECTIONS = ("data", "clean", "dedup", "augment", "task")


def _parsed(arguments: list[str]) -> tuple[EvaluateArguments, Experiment | None]:
    """What was asked for, and the experiment of `--on` with what was overridden."""
    parts = [part for argument in arguments for part in _split_on(argument)]
    if "--on" not in parts:
        return configs.parse(EvaluateArguments, None, arguments, prog="lm evaluate"), None
    at = parts.index("--on") + 1
    check(at < len(parts), "--on needs the config file whose data the run is evaluated on")
    experiment = configs.load_file(Path(parts[at]))
    default = EvaluateOnArguments(run=tyro.MISSING, **{name: getattr(experiment, name) for name in _SECTIONS})
    asked = configs.parse(EvaluateOnArguments, default, parts, prog=f"lm evaluate RUN --on {parts[at]}")
    return asked, dataclasses.replace(experiment, **{name: getattr(asked, name) for name in _SECTIONS})


def _split_on(argument: str) -> list[str]:
    return argument.split("=", 1) if argument.startswith("--on=") else [argument]


def _scores(asked: EvaluateArguments, on: Experiment | None, console: Console) -> dict[str, Any]:
    """What the run writes, scored; the texts to a file if that is asked for."""
    with console.status("writing") as status:
        judged = judge(
            asked.run,
            asked.scores,
            asked.sampling,
            on=on,
            language=asked.language,
            split=asked.split,
            checkpoint=asked.checkpoint,
            limit=asked.limit,
            on_batch=lambda done, total: status.update(f"writing {done}/{total}"),
        )
    if asked.texts is not None:
        judged.save(asked.texts)
    return judged.scores | {"written": len(judged.texts), "cut": judged.cut}


def _check_scores(asked: EvaluateArguments, on: Experiment | None) -> None:
    """Raises `UserError` where scores can't be had, before anything is computed."""
    if asked.scores:
        check_judgeable(asked.run, asked.sampling, asked.limit, on)
        if asked.texts is not None:
            check_output(asked.texts, "--texts")
        return
    for option, value in (("--texts", asked.texts), ("--limit", asked.limit)):
        check(value is None, f"{option} is {value}, and nothing is written without --scores; add --scores bleu")


def run(arguments: list[str]) -> int:
    """`lm evaluate RUN [options]`."""
    asked, on = _parsed(arguments)
    _check_scores(asked, on)
    console = open_console()
    progress = PreparationReporter(console)
    status = console.status("evaluating")

    def show_batch(done: int, total: int) -> None:
        progress.close()  # two bars at once are one too many
        status.start()
        status.update(f"evaluating {done}/{total}")

    try:
        result = runs.evaluate_run(
            asked.run,
            on=on,
            split=asked.split,
            checkpoint=asked.checkpoint,
            mesh=asked.mesh,
            batch_size=asked.batch_size,
            max_batches=asked.batches,
            with_baselines=asked.baselines,
            progress=None if asked.json else progress,
            on_batch=show_batch,
        )
    finally:
        progress.close()
        status.stop()
    if asked.scores:
        result |= _scores(asked, on, console)
    if asked.json:
        print(json.dumps(result))
        return DONE
    # Above the table, not its title: that would be broken where the table is narrower.
    where = "" if asked.on is None else f" of {asked.on}"
    show(console, f"{asked.run} at step {result['step']}, {result['split']} split{where}")
    table = Table()
    table.add_column("what")
    table.add_column("value", justify="right")
    for name, (label, form) in _ROWS.items():
        if name in result:
            error = f" ± {form.format(result[f'{name}_se'])}" if f"{name}_se" in result else ""
            table.add_row(label, form.format(result[name]) + error)
    console.print(table)
    if len(result.get("classes", ())) > _MOST_CLASSES:
        show(console, f"{len(result['classes'])} classes: --json says of each how often it was right")
    elif "classes" in result:
        _show_classes(console, result)
    return DONE


_MOST_CLASSES = 20  # that a screen has room for


def _show_classes(console: Console, result: dict[str, Any]) -> None:
    """How often each class was right, and what each was told for."""
    names = [one["name"] for one in result["classes"]]
    table = Table()
    table.add_column("class")
    told = names if "confusion" in result else []
    for name in ("is", "told", "right", "F1", *(f"told {name}" for name in told)):
        table.add_column(Text(name), justify="right")
    for i, one in enumerate(result["classes"]):
        f1 = "" if one["f1"] is None else f"{one['f1']:.3f}"
        row = [f"{one[name]:,}" for name in ("labelled", "predicted", "right")]
        confused = [f"{count:,}" for count in result["confusion"][i]] if told else []
        table.add_row(Text(one["name"]), *row, f1, *confused)
    console.print(table)


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
