"""The commands of `lm.cli`: read arguments, call the rooms, show what came out."""

import dataclasses
import io
import json
import logging
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Annotated, Literal

import absl.logging
import jax
import tyro
from rich.console import Console
from rich.table import Table

from lm import config as configs
from lm import run as runs
from lm.config import Experiment
from lm.console import PreparationReporter, TrainingReporter
from lm.data.manifest import load_manifest
from lm.data.prepare import prepare as prepare_dataset
from lm.errors import UserError, check
from lm.generate import Generator, SamplingConfig
from lm.loop import Outcome, TrainingHaltedError
from lm.plots import plot_losses
from lm.records import RunDirectory
from lm.sharding import MeshConfig, make_mesh, peak_flops

DONE, FAILED, PREEMPTED = 0, 1, 75
RunArgument = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]


def _console() -> Console:
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
    # What was compiled once is kept, so that a resumed run, or another like it, starts at once.
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "lm" / "xla"))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that can't show a character gets a question mark
            stream.reconfigure(errors="replace")
    return Console(width=None if sys.stdout.isatty() else 200, emoji=False)


def _show(console: Console, text: str = "") -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


@dataclass(frozen=True, kw_only=True)
class TrainArguments:
    """Options of `lm train` besides the settings of the experiment."""

    run: Path | None = None
    """Folder of the new run; None = runs/NAME-DATE-TIME."""
    stop_at: int | None = None
    """Stop after this step as if preempted: save, and exit with status 75."""
    experiment: Annotated[Experiment, tyro.conf.arg(name="")] = field(default_factory=Experiment)


def train(arguments: list[str]) -> int:
    """`lm train CONFIG.py [options]` or `lm train --resume RUN [options]`."""
    arguments = [part for argument in arguments for part in _split_resume(argument)]
    if "--resume" in arguments:
        at = arguments.index("--resume")
        check(at + 1 < len(arguments), "--resume needs the run directory to continue")
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
    console = _console()
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
    experiment: Annotated[Experiment, tyro.conf.arg(name="")] = field(default_factory=Experiment)


def _resume(path: Path, rest: list[str]) -> int:
    run = RunDirectory.open(path)
    prog = f"lm train --resume {path}"
    saved = runs.load_experiment(run)
    parsed = configs.parse(_ResumeArguments, _ResumeArguments(experiment=saved), rest, prog=prog)
    runs.check_changes(saved, parsed.experiment)
    console = _console()
    if run.status() == "finished":
        _show(console, f"{path} is finished; nothing to resume")
        _next_commands(console, path)
        return DONE
    return _train(
        console,
        path,
        lambda reporter, progress: runs.resume(
            path, reporter, override=lambda _: parsed.experiment, progress=progress, stop_at=parsed.stop_at
        ),
    )


def _train(console: Console, path: Path, go: Callable[[TrainingReporter, PreparationReporter], Outcome]) -> int:
    progress = PreparationReporter(console)
    try:
        outcome = go(TrainingReporter(console), progress)
    except TrainingHaltedError as error:
        print(f"lm: training halted: {error}", file=sys.stderr)
        return FAILED
    finally:
        progress.close()
    if outcome.state == "preempted":
        _show(console, f"stopped after step {outcome.step} ({outcome.reason}); everything is saved")
        _show(console, f"resume with: lm train --resume {shlex.quote(str(path))}")
        return PREEMPTED
    plot_losses(RunDirectory(path).metrics(), path / "loss.png")
    _show(console, f"finished at step {outcome.step} ({outcome.reason}); run directory: {path}")
    _next_commands(console, path)
    return DONE


def _next_commands(console: Console, path: Path) -> None:
    run = shlex.quote(str(path))
    _show(console, "next:")
    _show(console, f"  lm evaluate {run} --baselines")
    _show(console, f'  lm generate {run} --prompt "..."')
    _show(console, f"  tensorboard --logdir {run}/tensorboard    (loss curves are in {run}/loss.png)")


@dataclass(frozen=True, kw_only=True)
class EvaluateArguments:
    """Loss, perplexity, accuracy and bits per byte of a run on a split of its dataset."""

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


def evaluate(arguments: list[str]) -> int:
    """`lm evaluate RUN [options]`."""
    asked = configs.parse(EvaluateArguments, None, arguments, prog="lm evaluate")
    console = _console()
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
    table = Table(title=f"{asked.run} at step {result['step']}, {result['split']} split", title_justify="left")
    table.add_column("what")
    table.add_column("value", justify="right")
    for name, form in (
        ("tokens", "{:,.0f}"),
        ("loss", "{:.4f}"),
        ("perplexity", "{:.3f}"),
        ("accuracy", "{:.2%}"),
        ("bits_per_byte", "{:.3f}"),
        ("order0_bits_per_byte", "{:.3f}"),
        ("zlib_bits_per_byte", "{:.3f}"),
    ):
        if name in result:
            table.add_row(_LABELS.get(name, name), form.format(result[name]))
    console.print(table)
    return DONE


_LABELS = {
    "tokens": "tokens scored",
    "loss": "loss (nats per token)",
    "accuracy": "accuracy (next token)",
    "bits_per_byte": "bits per byte",
    "order0_bits_per_byte": "  byte frequencies alone (order-0 entropy)",
    "zlib_bits_per_byte": "  zlib level 9",
}


@dataclass(frozen=True, kw_only=True)
class PrepareArguments:
    """Options of `lm prepare`: the dataset's settings."""

    experiment: Annotated[Experiment, tyro.conf.arg(name="")] = field(default_factory=Experiment)


def prepare(arguments: list[str]) -> int:
    """`lm prepare [CONFIG.py] [--data.source ...] [--tokenizer.kind ...]`."""
    experiment, description = Experiment(), "Turns text into a dataset; takes the settings of lm train."
    prog = "lm prepare"
    if arguments and not arguments[0].startswith("-"):
        path, arguments = Path(arguments[0]), arguments[1:]
        experiment, description, prog = configs.load_file(path), configs.describe(path), f"lm prepare {path}"
    parsed = configs.parse(
        PrepareArguments, PrepareArguments(experiment=experiment), arguments, prog=prog, description=description
    )
    console = _console()
    progress = PreparationReporter(console)
    try:
        folder = prepare_dataset(parsed.experiment.data, parsed.experiment.tokenizer, progress)
    finally:
        progress.close()
    manifest = load_manifest(folder)
    table = Table(title=f"{folder}", title_justify="left")
    for column in ("split", "documents", "tokens", "bytes", "tokens per byte"):
        table.add_column(column, justify="left" if column == "split" else "right")
    for split, counts in manifest.splits.items():
        ratio = f"{counts.tokens / counts.bytes:.3f}"
        table.add_row(split, f"{counts.documents:,}", f"{counts.tokens:,}", f"{counts.bytes:,}", ratio)
    console.print(table)
    _show(console, f"vocabulary {manifest.vocab_size:,}; {manifest.skipped_documents} empty documents skipped")
    return DONE


@dataclass(frozen=True, kw_only=True)
class GenerateArguments:
    """Continues prompts with a trained run."""

    run: RunArgument
    """Run directory."""
    prompt: tuple[str, ...] = ()
    """Texts to continue, all in one batch; none = start from nothing."""
    prompt_ids: tuple[str, ...] = ()
    """Prompts as token ids instead, such as 1,5,9."""
    checkpoint: str = "best"
    """best (by validation loss), latest, or a step."""
    json: bool = False
    """One JSON object a line: prompt, ids, text and log-probabilities."""
    sampling: Annotated[SamplingConfig, tyro.conf.arg(name="")] = field(default_factory=SamplingConfig)


def generate(arguments: list[str]) -> int:
    """`lm generate RUN --prompt TEXT ... [options]`."""
    asked = configs.parse(GenerateArguments, None, arguments, prog="lm generate")
    check(not (asked.prompt and asked.prompt_ids), "give --prompt or --prompt-ids, not both")
    _console()
    trained = runs.load(asked.run, runs.inference_mesh(), asked.checkpoint)
    tokenizer = trained.tokenizer
    if asked.prompt_ids:
        ids = [_parse_ids(text, tokenizer.vocab_size) for text in asked.prompt_ids]
        texts = [tokenizer.decode(row) for row in ids]
    else:
        texts = list(asked.prompt) or [""]
        ids = [tokenizer.encode(text) or [tokenizer.bos_id] for text in texts]
    generator = Generator(
        trained.model.config, trained.params, vocab_size=tokenizer.vocab_size, eos_id=tokenizer.eos_id
    )
    stream = not asked.json and len(ids) == 1
    if stream:
        _write(texts[0])
    results = generator.generate(
        ids,
        asked.sampling,
        decode=tokenizer.decode,
        on_tokens=(lambda row, ids, text: _write(text)) if stream else None,
    )
    lines = []
    for text, result in zip(texts, results):
        lines.append(
            {
                "prompt": text,
                "prompt_ids": result.prompt_ids,
                "ids": result.ids,
                "text": result.text,
                "logprobs": [round(value, 6) for value in result.logprobs],
                "finished": result.finished,
            }
        )
    if asked.json:
        for line in lines:
            print(json.dumps(line, ensure_ascii=False))
    elif stream:
        _write("\n")
    else:
        for number, (text, result) in enumerate(zip(texts, results), 1):
            _write(f"--- {number} of {len(results)}\n{text}{result.text or ''}\n")
    settings = dataclasses.asdict(asked.sampling)
    try:
        with (asked.run / "samples.jsonl").open("a", encoding="utf-8") as file:
            for line in lines:
                file.write(json.dumps({"step": trained.step, **line, "sampling": settings}, ensure_ascii=False) + "\n")
    except OSError as error:  # somebody else's run: the samples were shown, they are just not kept
        logging.getLogger(__name__).warning("samples were not added to %s: %s", asked.run, error.strerror)
    return DONE


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _parse_ids(text: str, vocab_size: int) -> list[int]:
    try:
        ids = [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--prompt-ids {text!r} is not a list of ids; write them as 1,5,9") from None
    for i in ids:
        check(0 <= i < vocab_size, f"--prompt-ids has {i}, outside the vocabulary; ids go from 0 to {vocab_size - 1}")
    return ids


EXTRAS = {"torch": "parity tests", "transformers": "parity tests"}
REQUIRED = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "array-record",
    "tensorflow-datasets",
    "tokenizers",
    "huggingface-hub",
    "tyro",
    "rich",
    "tensorboardX",
    "matplotlib",
    "absl-py",
    "numpy",
)


@dataclass(frozen=True, kw_only=True)
class DoctorArguments:
    """Versions, devices, how a mesh fits, free memory and disk, and which extras are installed."""

    mesh: MeshConfig = field(default_factory=MeshConfig)
    """The mesh to try."""


def doctor(arguments: list[str]) -> int:
    """`lm doctor [--mesh.fsdp 4 ...]`."""
    asked = configs.parse(DoctorArguments, None, arguments, prog="lm doctor")
    console = _console()
    table = Table(show_header=False, title="lm doctor", title_justify="left")
    table.add_row("python", f"{platform.python_version()} on {platform.platform()}")
    missing = []
    for package in REQUIRED:
        version = _version(package)
        missing += [package] if version is None else []
        table.add_row(package, version or "MISSING")
    for package, use in EXTRAS.items():
        table.add_row(f"{package} (extra)", _version(package) or f"not installed; needed for {use}")
    devices = jax.devices()
    peak = peak_flops(devices[0])
    speed = f", {peak / 1e12:.0f} TFLOP/s bf16 each" if peak else ", peak FLOP/s unknown (no MFU will be shown)"
    table.add_row("devices", f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform}){speed}")
    stats = devices[0].memory_stats()
    if stats and "bytes_limit" in stats:
        free = stats["bytes_limit"] - stats.get("bytes_in_use", 0)
        table.add_row("device memory", f"{free / 2**30:.1f} of {stats['bytes_limit'] / 2**30:.1f} GiB free")
    table.add_row("host memory", _host_memory())
    disk = shutil.disk_usage(Path.cwd())
    table.add_row("disk here", f"{disk.free / 2**30:.1f} of {disk.total / 2**30:.1f} GiB free")
    try:
        mesh = make_mesh(asked.mesh)
        fit = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
        rows = mesh.shape["data"] * mesh.shape["fsdp"]
        table.add_row("mesh", f"{fit}; train.batch_size must be a multiple of {rows} x train.accumulate")
    finally:
        console.print(table)
    check(not missing, f"missing packages: {', '.join(missing)}; run `pip install -r requirements.txt`")
    return DONE


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _host_memory() -> str:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return "unknown"
    sizes = {line.split(":")[0]: int(line.split()[1]) / 2**20 for line in lines}
    return f"{sizes['MemAvailable']:.1f} of {sizes['MemTotal']:.1f} GiB free"
