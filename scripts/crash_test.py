"""Kills a small training run again and again, resumes it, and asks whether anything was lost.

    python scripts/crash_test.py                    (20 kills, some minutes)
    python scripts/crash_test.py --kills 5 --seed 1

One run goes straight through. Another, of the same settings, gets SIGKILL at random moments, once as it begins,
every other time while a checkpoint is being written, and is resumed by `lm train --resume`. After each kill the last
whole checkpoint must be readable, and no older than the save before the last one that was begun. At the end both
runs must agree to the last bit in parameters, optimizer state and every logged number but timings. Exit status 0 if
so, else 1.
"""

import argparse
import logging
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lm.checkpoint import read_arrays, whole_steps
from lm.records import TIMINGS, RunDirectory

SAVE_EVERY = 50
CONFIG = '''"""A model of a few thousand parameters on made-up text."""

from lm.config import Experiment
from lm.data.config import DataConfig
from lm.models.transformer import ModelConfig
from lm.optim import OptimConfig
from lm.sharding import MeshConfig
from lm.text.tokenizer import TokenizerConfig
from lm.train import TrainConfig


def get_config() -> Experiment:
    return Experiment(
        data=DataConfig(source="text:corpus.txt", document="line", seq_len=32, packing="documents"),
        tokenizer=TokenizerConfig(kind="byte"),
        model=ModelConfig(d_model=16, n_layers=1, n_heads=2, max_len=32, residual_dropout=0.1),
        optim=OptimConfig(peak_lr=3e-3),
        train=TrainConfig(
            steps=STEPS, batch_size=8, accumulate=2, ema_decay=0.99, log_every=5, eval_every=50, save_every=EVERY
        ),
        mesh=MeshConfig(devices=1),
    )
'''


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="how often to kill (default: 20)")
    parser.add_argument("--steps", type=int, default=0, help="length of the run (default: 100 a kill)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments (default: 0)")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    arguments = parser.parse_args()
    logging.getLogger("absl").setLevel(logging.ERROR)  # orbax warns of a file that only a manager writes
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        return crash_test(folder, arguments.kills, arguments.steps or 100 * arguments.kills, arguments.seed)


def crash_test(folder: Path, kills: int, steps: int, seed: int) -> int:
    """Runs the test in `folder`, shows it, and returns the exit status."""
    choose = random.Random(seed)
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "its", "dog"]
    lines = [" ".join(choose.choices(words, k=choose.randint(3, 12))) for _ in range(400)]
    (folder / "corpus.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "config.py").write_text(CONFIG.replace("STEPS", str(steps)).replace("EVERY", str(SAVE_EVERY)))

    print(f"straight run of {steps} steps ...", flush=True)
    started = time.monotonic()
    finish(folder, ["config.py", "--run", "straight"])
    print(f"done in {time.monotonic() - started:.0f} s; killing the other {kills} times ...", flush=True)

    killed = folder / "killed"
    rows, failures = [], []
    command = ["config.py", "--run", "killed"]
    for number in range(1, kills + 1):
        # Some kills spread over the run, whatever its speed: each waits for progress, then for a moment within it.
        target = steps * number / (kills + 1) + choose.uniform(0, steps / (kills + 1) / 2)
        while_saving = number % 2 == 0
        process = start(folder, command)
        began = last_checkpoint(killed)
        if number == 1:  # as it begins, when the run directory is made
            wait_for(process, killed.exists)
        else:
            wait_for(process, lambda target=target: last_logged(killed) >= target)
        if while_saving:
            wait_for(process, lambda: begun_checkpoints(killed), pause=0.0)
            time.sleep(choose.uniform(0, 0.03))
        else:
            time.sleep(choose.uniform(0, 0.5))
        alive = process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        logged, saved, unfinished = last_logged(killed), last_checkpoint(killed), begun_checkpoints(killed)
        problems = [] if alive else ["it had ended before the kill"]
        try:
            if saved:
                read_arrays(killed / "checkpoints", saved)
        except Exception as error:  # whatever makes a checkpoint unreadable is what we look for
            problems.append(f"checkpoint {saved} can't be read: {type(error).__name__}: {error}")
        # A save may be on its way when the next one is due, which then waits for it: two intervals at most.
        if logged - saved > 2 * SAVE_EVERY:
            problems.append(f"{logged - saved} steps lost")
        if saved < began:
            problems.append(f"checkpoint {began} is gone")
        rows.append((number, began, logged, saved, logged - saved, ", ".join(unfinished) or "-", problems))
        failures += problems
        print(f"kill {number}: at step {logged}, last whole checkpoint {saved} {'; '.join(problems)}", flush=True)
        command = ["--resume", "killed"] if (killed / "config.json").exists() else command
    finish(folder, command)
    failures += differences(folder / "straight", killed)
    show(rows, failures, time.monotonic() - started)
    return 1 if failures else 0


def start(folder: Path, arguments: list[str]) -> subprocess.Popen:
    """`lm train` in the folder, in a process of its own."""
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    command = [sys.executable, "-m", "lm", "train", *arguments]
    with (folder / "output.txt").open("ab") as output:
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT)


def finish(folder: Path, arguments: list[str]) -> None:
    """Runs `lm train` to its end."""
    status = start(folder, arguments).wait()
    if status:
        sys.exit(f"lm train {' '.join(arguments)} ended with {status}:\n{(folder / 'output.txt').read_text()[-2000:]}")


def wait_for(process: subprocess.Popen, condition: Any, pause: float = 0.01) -> None:
    """Returns when the condition holds or the process has ended."""
    while process.poll() is None and not condition():
        time.sleep(pause)


def last_logged(run: Path) -> int:
    """The last step with a record."""
    return max((record["step"] for record in RunDirectory(run).metrics()), default=0)


def last_checkpoint(run: Path) -> int:
    """The last step with a whole checkpoint; 0 for none."""
    return max(whole_steps(run / "checkpoints"), default=0)


def begun_checkpoints(run: Path) -> list[str]:
    """The names of checkpoints that are being written, or were when the run was killed."""
    folder = run / "checkpoints"
    return sorted(name for name in os.listdir(folder) if not name.isdigit()) if folder.exists() else []


def differences(straight: Path, killed: Path) -> list[str]:
    """What is not the same to the bit, one line each."""
    found = []
    step = last_checkpoint(straight)
    if step != last_checkpoint(killed):
        return [f"the last checkpoints are {step} and {last_checkpoint(killed)}"]
    a, b = (read_arrays(run / "checkpoints", step) for run in (straight, killed))
    found += [f"{path} is in one run only" for path in a.keys() ^ b.keys()]
    found += [f"{path} differs" for path in a.keys() & b.keys() if a[path].tobytes() != b[path].tobytes()]
    left, right = (
        [{key: value for key, value in record.items() if key not in TIMINGS} for record in RunDirectory(run).metrics()]
        for run in (straight, killed)
    )
    if len(left) != len(right):
        found.append(f"{len(left)} and {len(right)} records")
    found += [f"records differ: {x} and {y}" for x, y in zip(left, right) if x != y][:5]
    print(f"compared {len(a)} arrays of {sum(x.size for x in a.values()):,} numbers and {len(left)} records")
    return found


def show(rows: list[tuple], failures: list[str], seconds: float) -> None:
    """The table and the verdict."""
    table = Table("kill", "resumed from", "killed after step", "last whole checkpoint", "steps lost", "being written")
    for *cells, problems in rows:
        table.add_row(*map(str, cells), style="red" if problems else None)
    console = Console(width=120)
    console.print(table)
    in_saves = sum(row[5] != "-" for row in rows)
    for failure in failures:
        console.print(f"  {failure}", highlight=False, markup=False)
    verdict = f"FAILED: {len(failures)} problem(s)" if failures else "nothing lost: both runs are the same to the bit"
    print(f"{verdict}; {len(rows)} kills, {in_saves} of them while a checkpoint was being written; {seconds:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
