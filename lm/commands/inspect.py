"""`lm inspect`: what a run looks at in a text, as a page."""

from dataclasses import dataclass
from pathlib import Path

from lm import config as configs
from lm import run as runs
from lm.commands.exits import DONE
from lm.commands.shared import RunArgument, open_console, show
from lm.errors import check
from lm.records import RunDirectory
from lm.report.attention import About, attention_page, check_head, chosen_layers, draw, write_page
from lm.report.inspection import inspect, read, shapes
from lm.report.page import size
from lm.report.pieces import byte_level

PAGE_FILE = "inspect.html"


@dataclass(frozen=True, kw_only=True)
class InspectArguments:
    """Attention maps, the loss of each token and the logit lens of a text, as one HTML file to click through."""

    run: RunArgument
    """Run directory."""
    text: tuple[str, ...] = ()
    """The text; for a model that was trained on pairs also two (--text A B)."""
    source: str | None = None
    """Instead, of a run that was trained on sources and targets: the source."""
    target: str | None = None
    """What is written to the source; None = what the model itself writes, always taking the likeliest token."""
    checkpoint: str = "best"
    """best (as train.best has it), latest, or a step."""
    layers: tuple[int, ...] = ()
    """Layers whose attention is shown, from 0 (--layers 0 5 11); none = all."""
    head: tuple[int, ...] = ()
    """Layer and head, from 0 (--head 5 3), that is shown large at first, and drawn by itself with --png."""
    output: Path | None = None
    """The page; None = inspect.html in the run directory."""
    png: Path | None = None
    """Folder for pictures besides: all heads of each kind of attention, and one by itself with --head."""


def run(arguments: list[str]) -> int:
    """`lm inspect RUN --text TEXT [options]`."""
    asked = configs.parse(InspectArguments, None, arguments, prog="lm inspect")
    check(len(asked.head) in (0, 2), f"--head has {len(asked.head)} numbers; give a layer and a head: --head 0 3")
    head = (asked.head[0], asked.head[1]) if asked.head else None
    path = RunDirectory.open(asked.run).path
    output = asked.output or path / PAGE_FILE
    for option, wanted in (("--output", asked.output), ("--png", asked.png)):
        if wanted is not None:
            parent = wanted.absolute().parent
            check(parent.is_dir(), f"there is no folder {parent} for {option} {wanted.name}; make it first")
    check(not output.is_dir(), f"--output {output} is a folder; name a file in it, such as {output / PAGE_FILE}")
    check(
        asked.png is None or not asked.png.exists() or asked.png.is_dir(),
        f"--png {asked.png} is a file; name a folder",
    )
    console = open_console()
    with console.status("reading the run") as status:
        trained = runs.load(asked.run, runs.inference_mesh(), asked.checkpoint)
        reading = read(trained, asked.text, asked.source, asked.target)
        sizes = shapes(trained.model.config, reading)
        layers = chosen_layers(sizes, asked.layers)
        if head is not None:
            check_head(sizes, head)
        status.update("looking")
        found = inspect(trained, reading)
        about = About(
            run=path.name or path.absolute().name,
            step=trained.step,
            tokenizer=trained.tokenizer,
            in_bytes=byte_level(RunDirectory(path).tokenizer),
            causal=trained.model.config.mask != "bidirectional",
            classes=_classes(path, trained.experiment.task.kind),
        )
        written = write_page(attention_page(found, about, layers, head), output)
        pictures = [] if asked.png is None else draw(found, about, asked.png, layers, head)
    show(console, f"{output}  ({size(written)}; open it in a browser)")
    for picture in pictures:
        show(console, str(picture))
    return DONE


def _classes(path: Path, kind: str) -> tuple[str, ...]:
    """What the run's classes are called, as far as anybody knows."""
    if kind == "bert":
        return ("the second text follows the first", "the second text is from elsewhere")
    run = RunDirectory(path)
    return runs.labels_of(run, runs.load_experiment(run))
