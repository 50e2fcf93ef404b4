"""The commands of docs/meshes.md run, and the settings it names are there."""

import re
import shlex
from pathlib import Path

import pytest

from lm import cli
from lm import config as configs
from lm.config import Experiment
from lm.sharding import MESH_AXES

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "meshes.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^ {4}lm .*", re.sub(r"\\\n\s*", " ", TEXT), re.MULTILINE)


def test_commands_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    doctor, check = (shlex.split(command)[1:] for command in COMMANDS)
    assert cli.main(doctor) == 0
    assert "data 2, fsdp 2, context 1, tensor 2; train.batch_size must be a multiple of 4" in capsys.readouterr().out
    assert cli.main([*check, "--steps", "2"]) == 0
    assert "the same: no difference above 1e-05" in capsys.readouterr().out


@pytest.mark.parametrize("settings", re.findall(r"`(--(?:mesh|model|optim)\.[a-z. -]+)`", TEXT))
def test_settings_are_settings(settings: str) -> None:
    assert configs.parse(Experiment, None, shlex.split(settings), prog="lm") != Experiment()


def test_every_axis_has_its_row() -> None:
    assert re.findall(r"^\| `mesh\.(\w+)` \|", TEXT, re.MULTILINE) == ["data", "fsdp", "tensor", "context"]
    assert {"data", "fsdp", "tensor", "context"} == set(MESH_AXES)
