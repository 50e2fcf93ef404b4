"""Experiments: loaded from files, overridden, saved as JSON and read back equal, strictly."""

import dataclasses
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import small_runs as small

from lm import config as configs
from lm.config import Experiment
from lm.errors import UserError


def test_help_names_every_setting(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        configs.parse(Experiment, None, ["--help"], prog="lm")
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for section in dataclasses.fields(Experiment):
        for setting in dataclasses.fields(getattr(Experiment(), section.name)):
            assert f"--{section.name}.{setting.name}".replace("_", "-") in shown
    assert "Base of the rotary wavelengths. (default: 10000.0)" in shown


def test_overrides_reach_every_type():
    arguments = "--optim.peak-lr 3e-4 --model.positions rope --model.no-use-bias --model.window 8"
    arguments += " --train.steps None --train.tokens 1000 --data.source text:x"
    base = Experiment(train=dataclasses.replace(Experiment().train, steps=3))
    made = configs.parse(Experiment, base, arguments.split(), prog="lm")
    assert (made.optim.peak_lr, made.model.positions, made.model.use_bias) == (3e-4, "rope", False)
    assert (made.model.window, made.train.steps, made.train.tokens, made.data.source) == (8, None, 1000, "text:x")
    assert configs.changed(base, made) == [
        ("model.positions", "learned", "rope"),
        ("model.use_bias", True, False),
        ("model.window", None, 8),
        ("data.source", "python-stdlib", "text:x"),
        ("train.steps", 3, None),
        ("train.tokens", None, 1000),
    ]


def test_underscores_are_understood():
    made = configs.parse(Experiment, Experiment(), ["--optim.peak_lr", "1", "--optim.decay_everything"], prog="lm")
    assert (made.optim.peak_lr, made.optim.decay_everything) == (1.0, True)


def test_json_reads_back_equal(tmp_path: Path):
    experiment = small.experiment(tmp_path, train={"ema_decay": 0.5, "patience": 3}, optim={"l1": 1e-7})
    text = json.dumps(configs.to_dict(experiment))
    assert configs.from_dict(Experiment, json.loads(text)) == experiment


@dataclass(frozen=True)
class Inner:
    a: int = 1
    b: float = 2.0


@dataclass(frozen=True)
class Outer:
    inner: Inner = Inner()
    names: tuple[str, ...] = ("x",)
    kind: Literal["p", "q"] = "p"
    maybe: int | None = None
    on: bool = True


def test_reading_is_strict():
    good = dataclasses.asdict(Outer())
    assert configs.from_dict(Outer, good) == Outer()
    assert configs.from_dict(Outer, {**good, "inner": {"a": 1, "b": 3}}).inner.b == 3.0
    # A setting that was added since takes its default.
    assert configs.from_dict(Outer, {**good, "inner": {"a": 5}}).inner == dataclasses.replace(Outer().inner, a=5)
    for change, says in (
        ({"kind": "r"}, r"here\.kind is 'r'; it must be one of p, q"),
        ({"maybe": "1"}, r"here\.maybe is '1'; it must be of type int"),
        ({"on": 1}, r"here\.on is 1; it must be of type bool"),
        ({"names": "x"}, r"here\.names is 'x'; it must be a list"),
        ({"names": [1]}, r"here\.names is 1; it must be of type str"),
        ({"inner": {"a": True, "b": 1.0}}, r"here\.inner\.a is True; it must be of type int"),
        ({"inner": 3}, r"here\.inner is 3; it must be an object"),
        ({"kinds": 1}, r"here has the unknown setting 'kinds'; did you mean kind\?"),
    ):
        with pytest.raises(UserError, match=says):
            configs.from_dict(Outer, {**good, **change}, "here")
    with pytest.raises(UserError, match=r"here is \[\]; it must be an object"):
        configs.from_dict(Outer, [], "here")


def test_a_config_file_may_define_dataclasses_and_leaves_nothing_behind(tmp_path: Path):
    path = tmp_path / "mine.py"
    path.write_text(
        '"""Says what it is."""\n'
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "from lm.config import Experiment\n"
        "@dataclass\nclass Size:\n    width: int = 3\n"
        "SIZE = Size()\n"
        "def get_config() -> Experiment:\n    assert SIZE.width == 3\n    return Experiment()\n"
    )
    assert configs.load_file(path) == Experiment()
    assert configs.describe(path) == "Says what it is."
    path.write_text(path.read_text().replace("== 3", "== 4"))  # the same size, within the same moment
    with pytest.raises(UserError, match=r"mine\.py, line 10: AssertionError"):
        configs.load_file(path)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.py"]
    assert configs.describe(tmp_path / "nope.py") == ""


def test_a_users_error_in_a_config_is_passed_on(tmp_path: Path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from lm.config import Experiment\nfrom lm.train import TrainConfig\n"
        "def get_config():\n    return Experiment(train=TrainConfig(batch_size=0))\n"
    )
    with pytest.raises(UserError, match=r"train\.batch_size is 0; it must be at least 1"):
        configs.load_file(path)


@pytest.mark.parametrize(
    ("arguments", "write"),
    [
        (["--model.use-bias", "False"], "--model.no-use-bias"),
        (["--model.use-bias=no"], "--model.no-use-bias"),
        (["--model.use-bias", "TRUE"], "--model.use-bias"),
        (["--model.no-use-bias", "true"], "--model.no-use-bias"),
        (["--model.no-use-bias=off"], "--model.use-bias"),
    ],
)
def test_a_flag_with_a_value_is_told_what_to_write(arguments: list[str], write: str):
    with pytest.raises(UserError, match=rf"takes no value, found .*; write {write}; see"):
        configs.parse(Experiment, Experiment(), arguments, prog="lm")
    assert configs.parse(Experiment, Experiment(), [write], prog="lm").model.use_bias == ("no-" not in write)


@pytest.mark.parametrize(
    "arguments",
    [["--names", "a", "--names", "b"], ["--names=a", "--names=b"], ["--part.many-names", "a", "--part.many_names=b"]],
)
def test_a_list_in_two_pieces_is_told_what_to_write(arguments: list[str]):
    @dataclass(frozen=True)
    class Part:
        many_names: tuple[str, ...] = ()

    @dataclass(frozen=True)
    class Whole:
        names: tuple[str, ...] = ()
        part: Part = Part()
        size: int = 1

    option = arguments[0].partition("=")[0]
    with pytest.raises(UserError, match=f"^{option} is given 2 times; write all its values after one: {option} A B$"):
        configs.parse(Whole, Whole(), arguments, prog="lm")
    assert configs.parse(Whole, Whole(), ["--size", "2", "--size", "3", "--names", "a", "b"], prog="lm") == Whole(
        names=("a", "b"), size=3
    )


def test_a_mistake_reads_the_same_whatever_the_terminal_can_show(monkeypatch: pytest.MonkeyPatch):
    said = set()
    for encoding in ("utf-8", "ascii"):
        monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
        with pytest.raises(UserError) as caught:
            configs.parse(Outer, Outer(), ["--mayb", "3"], prog="lm thing")
        said.add(str(caught.value))
    (line,) = said
    assert line.startswith("Unrecognized options: --mayb, 3; Perhaps you meant: --maybe")
    assert line.endswith("; see `lm thing --help`")
    assert "--- " not in line


def test_words_of_truth_are_values_where_a_setting_takes_one():
    with pytest.raises(UserError, match=r"Unrecognized options: --optim\.rate, 3"):
        configs.parse(Experiment, Experiment(), ["--data.field", "true", "--optim.rate", "3"], prog="lm")
    assert configs.parse(Experiment, Experiment(), ["--data.field", "true"], prog="lm").data.field == "true"
