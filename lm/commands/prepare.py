"""`lm prepare`: text to a dataset, without training."""

import contextlib
import dataclasses
import logging
import os
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.table import Table
from rich.text import Text

import lm
from lm import config as configs
from lm.commands.exits import DONE, INTERRUPTED
from lm.commands.shared import check_typed, open_console, show
from lm.config import Experiment
from lm.console import PreparationReporter
from lm.data.atomic import check_writable
from lm.data.config import DataConfig
from lm.data.export import check_export, export_jsonl_zst, export_tfrecord
from lm.data.loader import check_loader_config
from lm.data.manifest import load_manifest
from lm.data.prepare import prepare
from lm.data.runners import RunnerConfig
from lm.errors import UserError, check, require
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
    """The text. How training reads it (seq_len, packing, stride, workers, mixture and the like) shapes no dataset."""
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
    export: Literal["jsonl.zst", "tfrecord"] | None = None
    """Also write the documents in a format that other programs read."""
    export_to: Path | None = None
    """The folder of the export, to be made; None = beside the dataset."""

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
    check_typed(arguments, asked.tokenizer)
    _check_export_settings(asked.export, asked.export_to)
    check_loader_config(asked.data)
    console = open_console()
    progress = PreparationReporter(console)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's stop is as good as Ctrl-C
    try:
        with workers_find_this_package():
            folder = prepare(
                asked.data,
                asked.tokenizer,
                progress,
                clean=asked.clean,
                dedup=asked.dedup,
                augment=asked.augment,
                runner=asked.where,
            )
        exported = _export(folder, asked, progress)
    except KeyboardInterrupt:
        progress.close()
        print("lm: interrupted; the same command goes on where this one was", file=sys.stderr)
        return INTERRUPTED
    finally:
        progress.close()
        signal.signal(signal.SIGTERM, before)
    manifest = load_manifest(folder)
    show(console, f"{folder}")  # a table's title would be broken where the table is narrower
    table = Table()
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
    if exported is not None:
        show(console, f"export {exported}")
    return DONE


@contextlib.contextmanager
def workers_find_this_package() -> Iterator[None]:
    """Processes that Beam starts import this `lm`, not one that happens to lie in the current folder."""
    changed = {
        "PYTHONSAFEPATH": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(Path(lm.__file__).parents[1]), os.environ.get("PYTHONPATH")))),
    }
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _check_export_settings(form: str | None, folder: Path | None) -> None:
    """Raises `UserError` if there can be no such export, before anything is prepared."""
    if form is None:
        check(
            folder is None, f"--export-to is {folder}, but nothing is exported; choose --export jsonl.zst or tfrecord"
        )
        return
    if folder is not None:
        check(not folder.exists(), f"--export-to {folder} is there already; name a folder to be made")
        try:
            check_writable(folder.absolute())
        except OSError as error:
            raise UserError(f"--export-to {folder}: {error.strerror}; name a folder that can be made") from error
    package, extra = {"jsonl.zst": ("zstandard", "text"), "tfrecord": ("tensorflow", "tfrecord")}[form]
    require(package, extra=extra, need=f"--export {form}")


def _export(folder: Path, asked: PrepareArguments, progress: PreparationReporter) -> Path | None:
    if asked.export is None:
        return None
    output = asked.export_to or folder.parent / asked.export
    if output.exists():  # of the same dataset: its folder is named by what it holds
        check_export(output)
    else:
        write = export_jsonl_zst if asked.export == "jsonl.zst" else export_tfrecord
        write(folder, output, progress=lambda done, total: progress("export", done, total))
    return output
