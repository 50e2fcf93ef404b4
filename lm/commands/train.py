"""`lm train`: a new run from a config file, or the rest of one."""

import errno
import os
import shlex
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, NoReturn

import jax
import tyro
from rich.console import Console

from lm import config as configs
from lm import run as runs
from lm.cluster import ClusterConfig, Watch, join, leads, part
from lm.commands.exits import DONE, FAILED, PREEMPTED
from lm.commands.shared import check_typed, launched, next_commands, open_console, show
from lm.config import Experiment
from lm.console import PreparationReporter, TrainingReporter
from lm.errors import UserError, check
from lm.loop import Outcome, TrainingHaltedError
from lm.plots import plot_losses
from lm.records import RunDirectory

# A disk that is full, over its quota, read-only or broken is nobody's bug.
DISK_PROBLEMS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


@dataclass(frozen=True, kw_only=True)
class TrainArguments:
    """Options of `lm train` besides the settings of the experiment."""

    run: Path | None = None
    """Folder of the new run; None = runs/NAME-DATE-TIME."""
    stop_at: int | None = None
    """Stop after this step as if preempted: save, and exit with status 75."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Several processes that train together."""
    experiment: Annotated[Experiment, tyro.conf.arg(name="")] = field(default_factory=Experiment)


def run(arguments: list[str]) -> int:
    """`lm train CONFIG.py [options]` or `lm train --resume RUN [options]`."""
    arguments = [part for argument in arguments for part in _split_resume(argument)]
    if "--resume" in arguments:
        at = arguments.index("--resume")
        check(at + 1 < len(arguments), "--resume needs the run directory to continue")
        if arguments[at + 1] in ("-h", "--help"):
            _parse_resume(None, ["--help"], prog="lm train --resume RUN")
        path = Path(arguments[at + 1])
        rest = arguments[:at] + arguments[at + 2 :]
        check(not rest or rest[0].startswith("-"), f"give either a config file or --resume, not both ({rest[:1]})")
        return _resume(path, rest)
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        raise UserError("give a config file first: `lm train CONFIG.py [options]`, or `lm train --resume RUN`")
    if arguments[0] in ("-h", "--help"):
        description = "lm train CONFIG.py [options]   or   lm train --resume RUN [options]"
        configs.parse(TrainArguments, None, ["--help"], prog="lm train CONFIG.py", description=description)
    path, rest = Path(arguments[0]), arguments[1:]
    parsed = configs.parse(
        TrainArguments,
        TrainArguments(experiment=configs.load_file(path)),
        rest,
        prog=f"lm train {path}",
        description=configs.describe(path),
    )
    check_typed(rest, parsed.experiment.tokenizer)
    join(parsed.cluster, launched=launched(os.environ))
    check(
        parsed.run is not None or jax.process_count() == 1,
        "several processes need one folder to write to; give --run FOLDER",
    )
    console = open_console()
    run = parsed.run or Path("runs") / f"{path.stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    return _train(
        console,
        run,
        lambda reporter, progress: runs.start(
            parsed.experiment, run, reporter, progress=progress, stop_at=parsed.stop_at
        ),
    )


def _split_resume(argument: str) -> list[str]:
    return argument.split("=", 1) if argument.startswith("--resume=") else [argument]


@dataclass(frozen=True, kw_only=True)
class _ResumeArguments:
    stop_at: int | None = None
    """Stop after this step as if preempted: save, and exit with status 75."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Several processes that train together; they may be more or fewer than before."""
    experiment: Annotated[Experiment, tyro.conf.arg(name="")] = field(default_factory=Experiment)


def _parse_resume(default: _ResumeArguments | None, arguments: list[str], prog: str) -> _ResumeArguments:
    free = ", ".join(name + "*" if name.endswith(".") else name for name in runs.FREE_ON_RESUME)
    description = (
        "Continues a run that was stopped or killed. A resumed run keeps what it computes; these settings may change:"
        f" {free}."
    )
    return configs.parse(_ResumeArguments, default, arguments, prog=prog, description=description)


def _resume(path: Path, rest: list[str]) -> int:
    run = RunDirectory.open(path)
    saved = runs.load_experiment(run)
    parsed = _parse_resume(_ResumeArguments(experiment=saved), rest, prog=f"lm train --resume {path}")
    runs.check_changes(saved, parsed.experiment)
    join(parsed.cluster, launched=launched(os.environ))
    console = open_console()
    if run.status() == "finished":
        show(console, f"{path} is finished; nothing to resume")
        next_commands(console, path)
        return DONE
    return _train(
        console,
        path,
        lambda reporter, progress: runs.resume(
            path, reporter, override=lambda _: parsed.experiment, progress=progress, stop_at=parsed.stop_at
        ),
    )


_giving_up = threading.Lock()


def _give_up(path: Path, reason: str, awaited: bool = False) -> NoReturn:
    """Ends this process, from whatever thread: what another was to send it will never come.

    With `awaited`, the other one waits for this one to part from it.
    """
    _giving_up.acquire()  # for good: who comes second, as where the loss shows in two ways, has nothing to add
    begun = (path / "config.json").exists()
    print(
        f"lm: training failed: {reason}; what was saved before is whole: start all processes again with"
        f" `lm train --resume {shlex.quote(str(path))}`"
        if begun
        else f"lm: training failed: {reason}; nothing was saved yet: start all processes again",
        file=sys.stderr,
        flush=True,
    )
    if leads() and begun:
        RunDirectory(path).set_status("failed", reason=reason)
    if awaited:
        part()
    os._exit(FAILED)  # JAX would wait at its exit for the one that is gone


def _train(console: Console, path: Path, go: Callable[[TrainingReporter, PreparationReporter], Outcome]) -> int:
    progress = PreparationReporter(console)
    try:
        with Watch(lambda became, awaited: _give_up(path, became, awaited)):
            outcome = go(TrainingReporter(console), progress)
    except TrainingHaltedError as error:
        print(f"lm: training halted: {error}", file=sys.stderr)
        return FAILED
    except OSError as error:
        if error.errno not in DISK_PROBLEMS or not (path / "config.json").exists():
            raise
        # A new line first, all in one write: threads of an interrupted save may be printing what became of them.
        sys.stderr.write(
            f"\nlm: training failed: {error.strerror}: {error.filename or path}; what was saved before is whole:"
            f" mend that and go on with `lm train --resume {shlex.quote(str(path))}`\n"
        )
        return FAILED
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        _give_up(path, f"the processes lost each other: {' '.join(str(error).split())[:200]}")
    finally:
        progress.close()
    if not leads():
        return PREEMPTED if outcome.state == "preempted" else DONE
    plot_losses(RunDirectory(path).metrics(), path / "loss.png")
    if outcome.state == "preempted":
        show(console, f"stopped after step {outcome.step} ({outcome.reason}); everything is saved")
        show(console, f"resume with: lm train --resume {shlex.quote(str(path))}")
        return PREEMPTED
    show(console, f"finished at step {outcome.step} ({outcome.reason}); run directory: {path}")
    next_commands(console, path)
    return DONE
