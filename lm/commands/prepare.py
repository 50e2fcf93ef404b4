"""`lm prepare`: text to a dataset, without training."""

import dataclasses
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from rich.table import Table
from rich.text import Text

from lm import config as configs
from lm.commands.exits import DONE
from lm.commands.shared import open_console, show
from lm.config import Experiment
from lm.console import PreparationReporter
from lm.data.config import DataConfig
from lm.data.manifest import load_manifest
from lm.data.prepare import prepare
from lm.data.runners import RunnerConfig
from lm.errors import UserError
from lm.report import left_out, preparation_report
from lm.text.augment import AugmentConfig
from lm.text.clean import CleanConfig
from lm.text.dedup import DedupConfig
from lm.text.tokenizer import TokenizerConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PrepareArguments:
    """Options of `lm prepare`: those sections of an experiment that shape a dataset."""

    data: DataConfig = field(default_factory=DataConfig)
    """The text and how it is read."""
    clean: CleanConfig = field(default_factory=CleanConfig)
    """The rules every document goes through before anything else."""
    dedup: DedupConfig = field(default_factory=DedupConfig)
    """Which duplicates are removed."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Altered copies of training documents."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """How text becomes ids."""

    where: Annotated[RunnerConfig, tyro.conf.arg(name="")] = field(default_factory=RunnerConfig)
    """Where the work is done."""

    @classmethod
    def of(cls, experiment: Experiment) -> "PrepareArguments":
        """The sections of an experiment that stand here too."""
        there = {section.name for section in dataclasses.fields(experiment)}
        return cls(**{name: getattr(experiment, name) for name in there & {f.name for f in dataclasses.fields(cls)}})


def run(arguments: list[str]) -> int:
    """`lm prepare [CONFIG.py] [--data.source ...] [--tokenizer.kind ...]`."""
    experiment, description, prog = Experiment(), "Turns text into a dataset, without training.", "lm prepare"
    if arguments and not arguments[0].startswith("-"):
        path, arguments = Path(arguments[0]), arguments[1:]
        experiment, description, prog = configs.load_file(path), configs.describe(path), f"lm prepare {path}"
    asked = configs.parse(
        PrepareArguments, PrepareArguments.of(experiment), arguments, prog=prog, description=description
    )
    console = open_console()
    progress = PreparationReporter(console)
    try:
        folder = prepare(
            asked.data,
            asked.tokenizer,
            progress,
            clean=asked.clean,
            dedup=asked.dedup,
            augment=asked.augment,
            runner=asked.where,
        )
    finally:
        progress.close()
    manifest = load_manifest(folder)
    table = Table(title=f"{folder}", title_justify="left")
    for column in ("split", "documents", "tokens", "bytes", "tokens per byte"):
        table.add_column(column, justify="left" if column == "split" else "right")
    for split, counts in manifest.splits.items():
        ratio = f"{counts.tokens / counts.bytes:.3f}"
        table.add_row(split, f"{counts.documents:,}", f"{counts.tokens:,}", f"{counts.bytes:,}", ratio)
    console.print(table)
    show(console, f"vocabulary {manifest.vocab_size:,}")
    if reasons := left_out(folder):
        table = Table(title="left out", title_justify="left")
        table.add_column("why")
        table.add_column("documents", justify="right")
        for why, count in reasons:
            table.add_row(Text(why), f"{count:,}")
        console.print(table)
    try:
        show(console, f"report {preparation_report(folder)}")
    except UserError as error:  # somebody else's folder, say: the dataset is as good without
        log.warning("%s", error)
    return DONE
