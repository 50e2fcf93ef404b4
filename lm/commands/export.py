"""`lm export`: a run as a model that `transformers` loads."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from lm import config as configs
from lm import run as runs
from lm.commands.exits import DONE
from lm.commands.shared import RunArgument, open_console, show
from lm.run.pretrained import export_run


@dataclass(frozen=True, kw_only=True)
class ExportArguments:
    """Writes a run's model and tokenizer as transformers' from_pretrained loads them."""

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


def run(arguments: list[str]) -> int:
    """`lm export RUN DIR [options]`."""
    asked = configs.parse(ExportArguments, None, arguments, prog="lm export")
    console = open_console()
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
