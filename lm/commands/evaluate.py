"""`lm evaluate`: how good a run is on a split of its dataset."""

import json
from dataclasses import dataclass, field
from typing import Literal

from rich.table import Table

from lm import config as configs
from lm import run as runs
from lm.commands.exits import DONE
from lm.commands.shared import RunArgument, open_console, show
from lm.sharding import MeshConfig


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
    baselines: bool = False
    """Also compress the same text without a model: byte entropy and zlib."""
    json: bool = False
    """One JSON object instead of a table."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """How devices are arranged."""


def run(arguments: list[str]) -> int:
    """`lm evaluate RUN [options]`."""
    asked = configs.parse(EvaluateArguments, None, arguments, prog="lm evaluate")
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
    "bits_per_byte": ("bits per byte", "{:.3f}"),
    "order0_bits_per_byte": ("  byte frequencies alone (order-0 entropy)", "{:.3f}"),
    "zlib_bits_per_byte": ("  zlib level 9", "{:.3f}"),
}
