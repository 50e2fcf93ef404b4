"""An experiment: the settings of every room, composed, loaded from a file, overridden, saved and read back."""

import ast
import contextlib
import dataclasses
import difflib
import io
import itertools
import re
import runpy
import traceback
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from lm.data.config import DataConfig
from lm.errors import UserError, check
from lm.models.transformer import ModelConfig
from lm.optim import OptimConfig
from lm.sharding import MeshConfig
from lm.tasks import AnyTask
from lm.tasks.causal_lm import CausalLM
from lm.tasks.distillation import DistillConfig
from lm.text.augment import AugmentConfig
from lm.text.clean import CleanConfig
from lm.text.dedup import DedupConfig
from lm.text.tokenizer import TokenizerConfig
from lm.train import InitConfig, TrainConfig

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything a run depends on."""

    init_from: InitConfig = field(default_factory=InitConfig)
    """A run to go on from: fine-tuning, or more pretraining."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The network; of `init_from.run`, what is left at its default comes from there."""
    data: DataConfig = field(default_factory=DataConfig)
    """The text and how it is read."""
    clean: CleanConfig = field(default_factory=CleanConfig)
    """The rules every document goes through before anything else."""
    dedup: DedupConfig = field(default_factory=DedupConfig)
    """Which duplicates are removed."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Altered copies of training documents."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """How text becomes ids."""
    task: AnyTask = field(default_factory=CausalLM)
    """The objective; a config file chooses it, the command line its settings."""
    distill: DistillConfig = field(default_factory=DistillConfig)
    """A teacher to learn from besides the data."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer and learning-rate schedule."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Length, batch, evaluation and saving."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """How devices are arranged."""


def load_file(path: Path) -> Experiment:
    """Runs a config file and returns what its `get_config()` returns; its docstring is `describe(path)`.

    Raises:
      UserError: there is no such file, it fails, or it gives no Experiment.
    """
    check(path.is_file(), f"no config file {path}; see configs/ for examples")
    try:
        # Not an import: that would leave bytecode beside the file, and run stale bytecode after a quick edit.
        get_config = runpy.run_path(str(path), run_name="lm_config").get("get_config")
        check(callable(get_config), f"{path} defines no get_config(); it must return an lm.config.Experiment")
        assert get_config is not None
        experiment = get_config()
    except UserError:
        raise
    except SyntaxError as error:
        raise UserError(f"{path}, line {error.lineno}: {error.msg}; correct the config file") from error
    except (Exception, SystemExit) as error:
        # The file is the user's own program: say where it failed instead of showing our frames above it.
        here = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        where = f"{path}, line {here[-1]}" if here else str(path)
        raise UserError(f"{where}: {type(error).__name__}: {error}; correct the config file") from error
    check(
        isinstance(experiment, Experiment),
        f"get_config() of {path} returned {type(experiment).__name__}; it must return an lm.config.Experiment",
    )
    return experiment


def parse(into: type[T], default: T | None, arguments: Sequence[str], *, prog: str, description: str = "") -> T:
    """Reads command-line arguments into a dataclass, by tyro: `--optim.peak-lr 3e-4` sets `optim.peak_lr`.

    Args:
      into: the dataclass.
      default: what is not given comes from here; None for the dataclass's own defaults.
      arguments: without the program's name.
      prog: the program's name, for messages and help.
      description: what help begins with; the dataclass's docstring if it is empty.

    Raises:
      UserError: an unknown name, a value of the wrong type, or a list in several pieces.
      SystemExit: 0, after `--help`.
    """
    import tyro

    _check_lists(into, arguments)
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            start: dict[str, Any] = {} if default is None else {"default": default}
            return tyro.cli(
                into,
                **start,
                args=list(arguments),
                prog=prog,
                description=description or None,
                # Of several kinds of settings (objectives) the config file has chosen one.
                config=(tyro.conf.AvoidSubcommands,),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        said = _one_line(complaint.getvalue())
        raise UserError(f"{_about_flags(arguments, said) or said}; see `{prog} --help`") from None


def _check_lists(into: Any, arguments: Sequence[str]) -> None:
    """Raises `UserError` for a list that is given twice: the last alone would count, as it should for single values."""
    lists = _lists(into)
    given = [argument.partition("=")[0].replace("_", "-") for argument in arguments if argument.startswith("--")]
    for option in given:
        check(
            given.count(option) == 1 or option.removeprefix("--").rpartition(".")[2] not in lists,
            f"{option} is given {given.count(option)} times; write all its values after one: {option} A B",
        )


def _lists(into: Any) -> set[str]:
    """How the command line calls settings that hold several values, sections aside."""
    if not (isinstance(into, type) and dataclasses.is_dataclass(into)):
        return set().union(*(_lists(choice) for choice in typing.get_args(into)))
    found: set[str] = set()
    for name, hint in typing.get_type_hints(into).items():
        found |= {name.replace("_", "-")} if typing.get_origin(hint) is tuple else _lists(hint)
    return found


def _about_flags(arguments: Sequence[str], said: str) -> str | None:
    """What to write instead of `--flag False`, where that is what `said`, tyro's complaint, is about."""
    rest = re.match(r"Unrecognized options: ([^;]*)", said)
    unknown = rest.group(1).split(", ") if rest else []
    for here, after in itertools.zip_longest(arguments, arguments[1:], fillvalue=""):
        option, given, value = here.partition("=")
        value = value if given else after
        if option.startswith("--") and value in unknown and value.lower() in _TRUTH:
            section, dot, name = option.removeprefix("--").rpartition(".")
            plain = name.removeprefix("no-")
            wanted = _TRUTH[value.lower()] == (name == plain)
            write = f"--{section}{dot}{plain if wanted else 'no-' + plain}"
            return f"{option} takes no value, found {value!r}; write {write}"
    return None


_TRUTH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def _one_line(box: str) -> str:
    """Tyro's framed, wrapped message as one line, without its frame and its closing pointer to the help."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", box)
    sections: list[list[str]] = [[]]
    for line in text.splitlines():
        line = line.strip()
        if line.startswith("╭"):
            continue
        line = line.strip("│╰╯ ")
        if set(line) <= {"─"} or set(line) == {"-"}:
            sections.append([])
        else:
            sections[-1].append(line)
    if "╭" not in text and len(sections) > 1:  # a frame for terminals that have letters alone: the title comes first
        del sections[0]
    parts = [" ".join(" ".join(section).split()) for section in sections]
    parts = [part for part in parts if part and not part.startswith("For full helptext")]
    return "; ".join(parts)


def to_dict(experiment: Experiment) -> dict[str, Any]:
    """JSON-ready settings; `from_dict` reads them back equal."""
    return dataclasses.asdict(experiment)


def from_dict(cls: type[T], values: Any, where: str = "config") -> T:
    """A dataclass from plain JSON, strictly: no unknown key, every value of its declared type.

    A missing key takes its default, so that a run outlives the settings added after it: the default of a new setting
    must be what was done before there was one.

    Raises:
      UserError: naming the key.
    """
    check(isinstance(values, dict), f"{where} is {values!r}; it must be an object")
    hints = typing.get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(typing.cast(Any, cls))}
    unknown = sorted(set(values) - known)
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, n=1)
        meant = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"{where} has the unknown setting {unknown[0]!r}{meant}; it is from another version or edited")
    return cls(**{name: _read(hints[name], values[name], f"{where}.{name}") for name in values})


def _read(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value, where)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union) and all(dataclasses.is_dataclass(a) for a in arguments):
        return _read_kind(arguments, value, where)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        return _read(next(a for a in arguments if a is not type(None)), value, where)
    if origin is typing.Literal:
        check(value in arguments, f"{where} is {value!r}; it must be one of {', '.join(map(str, arguments))}")
        return value
    if origin is tuple:
        check(isinstance(value, list | tuple), f"{where} is {value!r}; it must be a list")
        return tuple(_read(arguments[0], item, where) for item in value)
    if hint is float and type(value) is int:
        return float(value)
    check(type(value) is hint, f"{where} is {value!r}; it must be of type {hint.__name__}")
    return value


def _read_kind(choices: Sequence[Any], value: Any, where: str) -> Any:
    """One of several dataclasses, by its field `kind`; the first where there is none."""
    check(isinstance(value, dict), f"{where} is {value!r}; it must be an object")
    known = {choice.kind: choice for choice in choices}
    kind = value.get("kind", choices[0].kind)
    check(kind in known, f"{where}.kind is {kind!r}; it must be one of {', '.join(known)}")
    return from_dict(known[kind], value, where)


def changed(before: Any, after: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """The settings in which two dataclasses of one type differ: `(name, before, after)`."""
    found = []
    for f in dataclasses.fields(before):
        a, b = getattr(before, f.name), getattr(after, f.name)
        if dataclasses.is_dataclass(a) and type(a) is not type(b):
            found.append((f"{prefix}{f.name}", type(a).__name__, type(b).__name__))
        elif dataclasses.is_dataclass(a):
            found += changed(a, b, f"{prefix}{f.name}.")
        elif a != b:
            found.append((f"{prefix}{f.name}", a, b))
    return found


def describe(path: Path) -> str:
    """The docstring of a config file, or an empty string."""
    try:
        return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    except (OSError, SyntaxError, UnicodeDecodeError):
        return ""
