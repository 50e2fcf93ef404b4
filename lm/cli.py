"""The command line: finds the command, and turns mistakes into one line and an exit status.

The command's module in `lm.commands`, with its heavy imports, is loaded only then, so that `lm -h` answers at once.
"""

import importlib
import keyword
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from lm import __version__
from lm.commands.exits import DONE, FAILED, INTERRUPTED, MISTAKE
from lm.errors import UserError

COMMANDS = {
    "train": "train a model from a config file, or resume a run",
    "evaluate": "loss, perplexity and bits per byte of a run",
    "generate": "continue prompts with a trained run",
    "inspect": "what a run looks at in a text: attention maps, losses, guesses of each layer, as a page",
    "import": "make a run of a pretrained model of Hugging Face",
    "export": "write a run as a model that transformers loads",
    "teach": "save a run's logits for students to learn from (distillation)",
    "prepare": "turn text into a dataset, without training",
    "tokenizer": "train, compare or look at tokenizers",
    "plan": "does a run fit on hardware that isn't here, and how long would it take?",
    "doctor": "versions, devices, memory, disk: can this machine run it?",
}

# Those that compute, and so allocate and free the same gigabyte at every step.
COMPUTING = ("train", "evaluate", "generate", "inspect", "teach")
TUNABLE = "glibc.malloc.hugetlb"
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def usage() -> str:
    """What `lm -h` prints."""
    lines = [f"  {name:<10} {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            f"lm {__version__}: language models from raw text to samples, in JAX and Flax",
            "",
            "usage: lm COMMAND [options]      (lm COMMAND -h or lm help COMMAND shows a command's options)",
            "",
            *lines,
            "",
            "exit status: 0 done, 1 failed, 2 a mistake in what was asked for, 75 stopped early and resumable,\n"
            "             130 interrupted before there was anything to save",
        ]
    )


def with_huge_pages(environment: Mapping[str, str], mode: str) -> dict[str, str] | None:
    """`environment` with glibc's malloc asking for huge pages, or None where that changes nothing.

    XLA on a CPU takes its temporary memory from malloc anew at every step; in pages of 4 KiB the kernel spends a sixth
    of a small model's step handing them out (docs/results/train_speed_cpu.md). glibc before 2.35 ignores the setting.

    Args:
      environment: the environment variables now. Who sets the tunable, to whatever value, is left alone.
      mode: what the kernel says of transparent huge pages; only `madvise` waits to be asked.
    """
    tunables = environment.get("GLIBC_TUNABLES", "")
    if "[madvise]" not in mode or TUNABLE in tunables:
        return None
    return {**environment, "GLIBC_TUNABLES": ":".join(filter(None, (tunables, f"{TUNABLE}=1")))}


def entry() -> int:
    """The `lm` program: `main` on the process's own arguments, restarted with huge pages where they help."""
    if len(sys.argv) > 1 and sys.argv[1] in COMPUTING and HUGE_PAGES.exists() and sys.executable:
        environment = with_huge_pages(os.environ, HUGE_PAGES.read_text())
        if environment is not None:  # malloc reads it when a program starts: same process, same arguments, once more
            os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
    return main(sys.argv[1:])


def main(arguments: Sequence[str]) -> int:
    """Runs one command and returns its exit status."""
    arguments = list(arguments)
    if arguments[:1] == ["help"]:
        arguments = [*arguments[1:2], "-h"]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return DONE if arguments else MISTAKE
    if arguments[0] == "--version":
        print(f"lm {__version__}")
        return DONE
    name, *rest = arguments
    try:
        if name not in COMMANDS:
            raise UserError(f"unknown command {name!r}; choose one of {', '.join(COMMANDS)}")
        module = f"{name}_" if keyword.iskeyword(name) else name
        return importlib.import_module(f"lm.commands.{module}").run(rest)
    except UserError as error:
        # One line, also where the message quotes another's that has several.
        print(f"lm: {' '.join(str(error).split())}", file=sys.stderr)
        return MISTAKE
    except KeyboardInterrupt:
        print("lm: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
