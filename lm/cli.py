"""The command line: finds the command, and turns mistakes into one line and an exit status.

`lm.commands`, with its heavy imports, is loaded only when a command runs, so that `lm -h` answers at once.
"""

import importlib
import os
import sys
from collections.abc import Sequence

from lm import __version__
from lm.errors import UserError

COMMANDS = {
    "train": "train a model from a config file, or resume a run",
    "evaluate": "loss, perplexity and bits per byte of a run",
    "generate": "continue prompts with a trained run",
    "prepare": "turn text into a dataset, without training",
    "doctor": "versions, devices, memory, disk: can this machine run it?",
}

# Exit statuses besides 0.
FAILED, MISTAKE, PREEMPTED = 1, 2, 75


def usage() -> str:
    """What `lm -h` prints."""
    lines = [f"  {name:<10} {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            f"lm {__version__}: language models from raw text to samples, in JAX and Flax",
            "",
            "usage: lm COMMAND [options]      (lm COMMAND -h shows a command's options)",
            "",
            *lines,
            "",
            "exit status: 0 done, 1 failed, 2 a mistake in what was asked for, 75 stopped early and resumable",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else MISTAKE
    if arguments[0] == "--version":
        print(f"lm {__version__}")
        return 0
    name, *rest = arguments
    try:
        if name not in COMMANDS:
            raise UserError(f"unknown command {name!r}; choose one of {', '.join(COMMANDS)}")
        commands = importlib.import_module("lm.commands")
        return getattr(commands, name)(rest)
    except UserError as error:
        # One line, also where the message quotes another's that has several.
        print(f"lm: {' '.join(str(error).split())}", file=sys.stderr)
        return MISTAKE
    except KeyboardInterrupt:
        print("lm: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
