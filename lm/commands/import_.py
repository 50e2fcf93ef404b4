"""`lm import`: a pretrained model of Hugging Face as a run."""

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from lm import config as configs
from lm.commands.exits import DONE
from lm.commands.shared import open_console, show
from lm.errors import check
from lm.run.adapters import import_adapter
from lm.run.pretrained import import_run
from lm.sharding import MeshConfig, make_mesh
from lm.text.ids import IdsTokenizer


@dataclass(frozen=True, kw_only=True)
class ImportArguments:
    """Makes a run directory of a pretrained model (GPT-2, LLaMA, Mistral, Qwen2, Qwen3, BERT, T5) or of an adapter."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """A folder that holds config.json and weights, or NAME or NAME@REVISION of the Hugging Face hub; with --onto, an
    adapter."""
    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Run directory to make."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the parameters, and of what is computed with them."""
    onto: Path | None = None
    """Run of the model that SOURCE is an adapter for, as PEFT's save_pretrained or lm export --adapter wrote it."""
    ids: bool = False
    """Leave the tokenizer out: ids in, ids out."""
    mesh: MeshConfig = field(default_factory=lambda: MeshConfig(data=1, devices=1))
    """How devices are arranged, for a model that is too large for one."""


def run(arguments: list[str]) -> int:
    """`lm import SOURCE RUN [options]`."""
    asked = configs.parse(ImportArguments, None, arguments, prog="lm import")
    console = open_console()
    if asked.onto is not None:
        return _adapter(asked, asked.onto, console)
    with console.status("importing") as status:
        found = import_run(
            asked.source,
            asked.run,
            make_mesh(asked.mesh),
            dtype=asked.dtype,
            ids=asked.ids,
            on_leaf=lambda done, total: status.update(f"importing {done}/{total}"),
        )
    model, kind = found.experiment.model, found.pretrained.architecture
    show(console, f"{asked.run}  ({kind}, {found.parameters:,} parameters, {model.param_dtype})")
    run = shlex.quote(str(asked.run))
    show(console, f"task {found.experiment.task.kind}, {found.tokenizer.vocab_size:,} ids of {model.vocab_size:,} rows")
    if found.experiment.task.writes_text:
        prompt = "5 6 7" if isinstance(found.tokenizer, IdsTokenizer) else "..."
        show(console, f'next: lm generate {run} --prompt "{prompt}"')
    else:
        show(console, f"next: lm train CONFIG --init-from.run {run}")
    return DONE


def _adapter(asked: ImportArguments, onto: Path, console: Console) -> int:
    check(
        not asked.ids and asked.dtype == ImportArguments.dtype,
        "with --onto the tokenizer and the precision are those of that run; leave out --ids and --dtype",
    )
    with console.status("importing"):
        made = import_adapter(Path(asked.source), asked.run, onto, make_mesh(asked.mesh))
    show(console, f"{asked.run}  ({made.parameters:,} parameters of an adapter, {made.of:,} in all)")
    run = shlex.quote(str(asked.run))
    if made.experiment.task.writes_text:
        show(console, f'next: lm generate {run} --prompt "..."')
    else:
        show(console, f"next: lm evaluate {run} --on CONFIG")
    return DONE
