"""Fine-tunes one pretrained run in every way, over several seeds, and prints a Markdown table.

    python scripts/finetune_table.py configs/finetune/sst2.py RUN --output runs/finetune [options of lm train]

RUN is what every way but `scratch` begins with, and whose tokenizer all have. Options that are not the script's own go
to every `lm train`, as where the data lies. Runs are made one after another below the output folder; started again, the
script leaves those that are finished alone, and goes on with one that was stopped.

Accuracy is of the last checkpoint, ± a standard error over seeds. Trained parameters and the bytes of the optimizer's
state are counted in the state that is trained. For the seconds of a step all ways take turns in one process, a few
steps each, and the median is told.
"""

import argparse
import json
import math
import os
import platform
import shlex
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from lm import run as runs
from lm import tree
from lm.cli import main as lm
from lm.config import load_file
from lm.data import loader
from lm.evaluate import to_devices
from lm.models.transformer import Transformer
from lm.optim import freezing, make_optimizer, make_schedule
from lm.records import RunDirectory
from lm.run.datasets import maker
from lm.text.tokenizer import TokenizerConfig
from lm.train import abstract_params, make_program

HEAD = r"classifier/.*=1"
UNUSED = r"head_bias/.*=0"  # of the hidden words' head; a classifier doesn't read it
# What each way asks of `lm train`. Rates are those with the best validation accuracy of seed 0.
METHODS: dict[str, tuple[str, ...]] = {
    "scratch": ("--optim.peak-lr", "2e-3", "--optim.rates", UNUSED, ".*=1"),
    "full": ("--optim.peak-lr", "1e-3", "--optim.rates", UNUSED, ".*=1"),
    "frozen-layers": ("--optim.peak-lr", "1e-3", "--optim.rates", UNUSED, r"layers/.*=0", ".*=1"),
    "frozen-below": ("--optim.peak-lr", "3e-3", "--optim.rates", UNUSED, r".*embed.*=0", r"layers/0/.*=0", ".*=1"),
    "head": ("--optim.peak-lr", "1e-2", "--optim.rates", HEAD, ".*=0"),
    "bitfit": ("--optim.peak-lr", "1e-2", "--optim.rates", UNUSED, r".*bias=1", HEAD, ".*=0"),
    "lora": ("--optim.peak-lr", "1e-2", "--model.lora.rank", "8"),
    "adapter": ("--optim.peak-lr", "1e-2", "--model.adapter-dim", "16"),
    "prompt": ("--optim.peak-lr", "1e-2", "--model.prompt-len", "10"),
}


def command(config: Path, parent: Path, method: str, seed: int, rest: list[str]) -> list[str]:
    """The arguments of `lm train` for one run."""
    begin = ["--init-from.run", str(parent)]
    if method == "scratch":  # a config without a tokenizer of its own leaves that to the run it begins with
        own = load_file(config).tokenizer != TokenizerConfig()
        begin = [] if own else ["--tokenizer.kind", f"file:{parent / 'tokenizer'}"]
    return [str(config), *begin, *METHODS[method], "--train.seed", str(seed), "--data.seed", str(seed), *rest]


def trained(run: Path, arguments: list[str]) -> None:
    """Makes sure that the run is finished."""
    state = RunDirectory(run).status() if (run / "config.json").exists() else None
    if state == "finished":
        return
    asked = ["train", *arguments, "--run", str(run)] if state is None else ["train", "--resume", str(run)]
    print(f"lm {shlex.join(asked)}", file=sys.stderr)
    status = lm(asked)
    if status:
        sys.exit(status)


def scored(run: Path, split: str) -> dict[str, Any]:
    """What `lm evaluate` says of the last checkpoint; kept beside the run."""
    kept = run.with_name(f"{run.name}.{split}.json")
    if not kept.exists():
        result = runs.evaluate_run(run, split=split, checkpoint="latest")
        kept.write_text(json.dumps(result) + "\n", encoding="utf-8")
    return json.loads(kept.read_text(encoding="utf-8"))


class Steps:
    """The train step of a finished run, from its beginning, to be timed."""

    def __init__(self, run: Path):
        """Builds what `lm train` builds of the run's settings."""
        directory = RunDirectory.open(run)
        experiment = runs.load_experiment(directory)
        dataset = runs.dataset_of(directory, experiment)
        self.mesh = runs.check_experiment(experiment)
        model = Transformer(experiment.model)
        shapes, _ = abstract_params(model, self.mesh)
        schedule = make_schedule(experiment.optim, 10**6)
        freeze = freezing(experiment.optim, shapes)
        tx = make_optimizer(experiment.optim, schedule, shapes)
        self.program = make_program(model, experiment.task, tx, schedule, experiment.train, self.mesh, freeze)
        self.batches = loader.training_batches(
            dataset.store("train"),
            experiment.data,
            make=maker(experiment, dataset),
            batch_size=experiment.train.batch_size,
        )
        with jax.set_mesh(self.mesh):
            self.state = self.program.init()

    def parameters(self) -> int:
        """How many are trained: those that are in the state but not frozen."""
        return tree.count_parameters(self.program.target.params)

    def optimizer_bytes(self) -> int:
        """What the optimizer's state takes."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self.program.target.opt_state))

    def take(self, count: int) -> list[float]:
        """Seconds of each of so many steps; the loader's time is not among them."""
        found = []
        for _ in range(count):
            batch = to_devices(next(self.batches), self.mesh)
            jax.block_until_ready(batch)
            begun = time.perf_counter()
            with jax.set_mesh(self.mesh):
                self.state, report = self.program.train_step(self.state, batch)
            jax.block_until_ready(report)
            found.append(time.perf_counter() - begun)
        return found


def mean(values: list[float]) -> str:
    """The mean in per cent, with its standard error where there are several."""
    error = f" ± {statistics.stdev(values) / math.sqrt(len(values)):.1%}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1%}{error}".replace("%", "")


def machine() -> str:
    """Versions, processor and cores."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("jax", "flax", "optax"))
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"Python {platform.python_version()}, {packages}; {names[0] if names else platform.machine()}, {cores} cores"


def main() -> None:
    """Trains what is not trained yet and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="how to fine-tune: a config for `lm train`")
    parser.add_argument("parent", type=Path, metavar="RUN", help="the pretrained run")
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs that are made")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=20, help="turns of each way while steps are timed; 0 = none")
    parser.add_argument("--steps", type=int, default=5, help="steps a turn, the first of which is not counted")
    asked, rest = parser.parse_known_args()
    asked.output.mkdir(parents=True, exist_ok=True)
    # All first seeds come first, so that a table of one seed is there early.
    made = {(seed, method): asked.output / f"{method}-{seed}" for seed in asked.seeds for method in asked.methods}
    for (seed, method), run in made.items():
        trained(run, command(asked.config, asked.parent, method, seed, rest))
    steps = {method: Steps(made[asked.seeds[0], method]) for method in asked.methods}
    times: dict[str, list[float]] = {method: [] for method in asked.methods}
    for turn in range(asked.rounds + 1):
        for method, step in steps.items():
            taken = step.take(asked.steps)
            times[method] += taken[1:] if turn else []  # the first turn compiles
    print(f"`{shlex.join(['python', 'scripts/finetune_table.py', *sys.argv[1:]])}`\n\n{machine()}.\n")
    print(
        "| way | test accuracy by seed, % | mean | validation, mean | trained parameters | optimizer, bytes |"
        " seconds a step |\n|---|---|---:|---:|---:|---:|---:|"
    )
    for method in asked.methods:
        test, validation = (
            [scored(made[seed, method], split)["accuracy"] for seed in asked.seeds] for split in ("test", "validation")
        )
        by_seed = ", ".join(f"{100 * accuracy:.1f}" for accuracy in test)
        middle = f"{statistics.median(times[method]):.4f}" if times[method] else ""
        print(
            f"| {method} | {by_seed} | {mean(test)} | {mean(validation)} | {steps[method].parameters():,} |"
            f" {steps[method].optimizer_bytes():,} | {middle} |"
        )
    for step in steps.values():
        step.batches.close()


if __name__ == "__main__":
    main()
