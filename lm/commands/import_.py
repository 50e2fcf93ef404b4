"""`lm import`: a pretrained model of Hugging Face as a run."""

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from lm import config as configs
from lm.commands.exits import DONE
from lm.commands.shared import open_console, show
from lm.run.pretrained import import_run
from lm.sharding import MeshConfig, make_mesh
from lm.text.ids import IdsTokenizer


@dataclass(frozen=True, kw_only=True)
class ImportArguments:
    """Makes a run directory of a pretrained model: GPT-2, LLaMA, Mistral, Qwen2, Qwen3, BERT or T5."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """A folder that holds config.json and weights, or a name on the Hugging Face hub."""
    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Run directory to make."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the parameters, and of what is computed with them."""
    ids: bool = False
    """Leave the tokenizer out: ids in, ids out."""
    mesh: MeshConfig = field(default_factory=lambda: MeshConfig(data=1, devices=1))
    """How devices are arranged, for a model that is too large for one."""


def run(arguments: list[str]) -> int:
    """`lm import SOURCE RUN [options]`."""
    asked = configs.parse(ImportArguments, None, arguments, prog="lm import")
    console = open_console()
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
    return DONE
