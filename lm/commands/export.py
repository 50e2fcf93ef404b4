"""`lm export`: a run as a model that `transformers` loads."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from lm import config as configs
from lm import run as runs
from lm.commands.exits import DONE
from lm.commands.shared import RunArgument, file_size, open_console, show
from lm.errors import check
from lm.run.adapters import OWN, export_adapter
from lm.run.pretrained import export_run


@dataclass(frozen=True, kw_only=True)
class ExportArguments:
    """Writes a run's model and tokenizer as transformers' from_pretrained loads them, low-rank terms merged."""

    run: RunArgument
    """Run directory."""
    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """Folder to make."""
    checkpoint: str = "best"
    """best (as train.best has it), latest, or a step."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of the weights; None = of the run's parameters."""
    max_shard_size: str = "5GB"
    """Size of a file of weights at most, such as 5GB or 500MB."""
    adapter: bool = False
    """Only what was trained beside a frozen model: low-rank terms and heads, as PeftModel.from_pretrained loads them;
    of a model with adapters or a learned prompt, a file that lm import --onto reads."""


def run(arguments: list[str]) -> int:
    """`lm export RUN DIR [options]`."""
    asked = configs.parse(ExportArguments, None, arguments, prog="lm export")
    console = open_console()
    if asked.adapter:
        return _adapter(asked, console)
    with console.status("exporting") as status:
        made = export_run(
            asked.run,
            asked.folder,
            runs.inference_mesh(),
            checkpoint=asked.checkpoint,
            dtype=asked.dtype,
            max_shard_size=asked.max_shard_size,
            on_shard=lambda done, total: status.update(f"exporting {done}/{total}"),
        )
    show(console, f"{asked.folder}  ({made.architecture}, {len(made.files)} file{'s' * (len(made.files) > 1)})")
    if made.note:
        show(console, f"tokenizer: {made.note}")
    return DONE


def _adapter(asked: ExportArguments, console: Console) -> int:
    check(
        asked.max_shard_size == ExportArguments.max_shard_size,
        f"--max-shard-size is {asked.max_shard_size}, and an adapter is one file; leave one out",
    )
    with console.status("exporting"):
        made = export_adapter(
            asked.run, asked.folder, runs.inference_mesh(), checkpoint=asked.checkpoint, dtype=asked.dtype
        )
    size = sum((asked.folder / name).stat().st_size for name in made.files)
    kind = "adapter of this program" if made.architecture == OWN else f"LoRA for PEFT, {made.architecture}"
    show(console, f"{asked.folder}  ({kind}, {file_size(size)})")
    return DONE
