"""What several commands share: where things are said, and arguments they have in common."""

import io
import logging
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import absl.logging
import jax
import tyro
from rich.console import Console

from lm import run as runs
from lm.cluster import leads
from lm.errors import check
from lm.records import RunDirectory
from lm.text.tokenizer import TokenizerConfig, is_trained

RunArgument = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]


def check_typed(arguments: list[str], tokenizer: TokenizerConfig) -> None:
    """Raises `UserError` for a setting that was typed and that a tokenizer of this kind does not read.

    `check_tokenizer_config` can't: every config file sets its vocabulary, and `--tokenizer.kind byte` is to be typed
    with any of them.
    """
    if is_trained(tokenizer):
        return
    typed = {argument.partition("=")[0].replace("_", "-") for argument in arguments}
    for option in ("--tokenizer.vocab-size", "--tokenizer.training-bytes"):
        check(
            option not in typed,
            f"{option} is set, but nothing is trained with tokenizer.kind {tokenizer.kind!r}; leave one out",
        )


def launched(environment: Mapping[str, str]) -> bool:
    """Whether a launcher that JAX knows has started this process as one of several, as its variables say."""
    counts = (environment.get(name, "1") for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"))
    several = any(count.isdigit() and int(count) > 1 for count in counts)
    hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES", "")
    in_job = "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment
    return several or "," in hosts or in_job


def open_console() -> Console:
    """Sets up what is said where: results on standard output, our warnings on standard error."""
    log = logging.getLogger("lm")
    log.setLevel(logging.INFO)
    log.propagate = False
    for handler in list(log.handlers):
        log.removeHandler(handler)
    warnings = logging.StreamHandler()
    warnings.setLevel(logging.WARNING)
    warnings.setFormatter(logging.Formatter("lm: %(message)s"))
    log.addHandler(warnings)
    absl.logging.set_verbosity(absl.logging.ERROR)  # orbax and grain tell a lot that no user can act on
    # Orbax logs the errors of its threads with their tracebacks, and then raises them where they can be told.
    absl.logging.get_absl_logger().addFilter(_not_orbax)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    # What was compiled once is kept, so that a resumed run, or another like it, starts at once.
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "lm" / "xla"))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that can't show a character gets a question mark
            stream.reconfigure(errors="replace")
    # Of several processes the first one speaks.
    return Console(width=None if sys.stdout.isatty() else 200, emoji=False, quiet=not leads())


def _not_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in Path(record.pathname).parts


def show(console: Console, text: str = "") -> None:
    """A line as it is: nothing in it is markup, and it is not wrapped."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def file_size(count: int) -> str:
    """Bytes, for reading."""
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count / 1e3:,.1f} kB"


def next_commands(console: Console, path: Path) -> None:
    """What a finished run can be used for."""
    run = shlex.quote(str(path))
    task = runs.load_experiment(RunDirectory.open(path)).task
    show(console, "next:")
    show(console, f"  lm evaluate {run}{' --baselines' if task.spells_text else ''}")
    if task.writes_text:
        show(console, f'  lm generate {run} --prompt "..."')
    show(console, f"  tensorboard --logdir {run}/tensorboard    (loss curves are in {run}/loss.png)")
