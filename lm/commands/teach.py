"""`lm teach`: a run's likeliest choices, saved for its students."""

from dataclasses import dataclass, field
from pathlib import Path

from lm import config as configs
from lm import run as runs
from lm.commands.exits import DONE
from lm.commands.shared import RunArgument, file_size, open_console, show
from lm.records import RunDirectory
from lm.sharding import MeshConfig


@dataclass(frozen=True, kw_only=True)
class TeachArguments:
    """Saves what a run says of each of its training examples, so that many students learn from it at no cost.

    A student reads it with --distill.saved FOLDER; its data must be the teacher's. Four bytes for each choice, six
    where the vocabulary has more than 65,536 rows.
    """

    run: RunArgument
    """Run directory of the teacher."""
    output: Path | None = None
    """The folder, to be made; None = logits in the run directory."""
    top_k: int | None = None
    """How many of the likeliest tokens (or classes, or places) are saved; None = 32, or all where there are fewer."""
    checkpoint: str = "best"
    """best (as train.best has it), latest, or a step."""
    batch_size: int | None = None
    """Examples at a time; None = as in training. It changes nothing."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """How devices are arranged."""


def run(arguments: list[str]) -> int:
    """`lm teach RUN [options]`."""
    asked = configs.parse(TeachArguments, None, arguments, prog="lm teach")
    path = RunDirectory.open(asked.run).path
    folder = asked.output or path / "logits"
    console = open_console()
    with console.status("reading the run") as status:
        lessons = runs.teach(
            path,
            folder,
            top_k=asked.top_k,
            checkpoint=asked.checkpoint,
            batch_size=asked.batch_size,
            mesh=asked.mesh,
            on_batch=lambda done, total: status.update(f"teaching {done}/{total}"),
        )
    size = sum(file.stat().st_size for file in folder.iterdir())
    show(console, f"{folder}  ({lessons.examples:,} examples, {lessons.top_k} choices a place, {file_size(size)})")
    show(console, f"a student reads it with --distill.saved {folder}")
    return DONE
