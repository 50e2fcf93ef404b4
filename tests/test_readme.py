"""What the READMEs show works, and both show the same."""

import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from lm import cli

ROOT = Path(__file__).parent.parent
READMES = ("README.md", "README.zh.md")
TINY = shlex.split(
    "--train.steps 2 --train.batch-size 8 --train.log-every 1 --model.d-model 16 --model.n-layers 1 --model.n-heads 2"
    " --data.seq-len 32 --tokenizer.kind byte --data.validation-fraction 0.3 --mesh.devices 1"
)


def blocks(name: str) -> list[str]:
    """The commands of a README's code blocks."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return [line for block in re.findall(r"```bash\n(.*?)```", text, re.S) for line in block.splitlines() if line]


def table(name: str) -> list[str]:
    """The commands of its command table, as they are written there."""
    return re.findall(r"^\| `(lm [^`]*)`", (ROOT / name).read_text(encoding="utf-8"), re.M)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder like the repository's, with a little text of one's own."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "my" / "texts").mkdir(parents=True)
    for i in range(12):
        words = " ".join(f"word{(i * 7 + j) % 23}" for j in range(120))
        (tmp_path / "my" / "texts" / f"{i}.txt").write_text(words, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_both_readmes_show_the_same_commands():
    assert blocks("README.md") == blocks("README.zh.md")
    english, chinese = ([command.split()[:2] for command in table(name)] for name in READMES)
    assert english == chinese
    assert {command[1] for command in english} == set(cli.COMMANDS)


@pytest.mark.parametrize("name", READMES)
def test_every_extra_is_listed(name: str):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    rows = re.findall(r"^\| (`\w+`(?:[,、] ?`\w+`)*) \|", (ROOT / name).read_text(encoding="utf-8"), re.M)
    assert sorted(re.findall(r"`(\w+)`", " ".join(rows))) == sorted(project["optional-dependencies"])


def test_scripts_that_are_shown_are_there_and_parse():
    scripts = [shlex.split(command)[1] for command in blocks("README.md") if command.startswith("bash ")]
    assert scripts == ["scripts/quickstart.sh", "scripts/test.sh"]
    for script in [*scripts, "scripts/common.sh"]:
        subprocess.run(["bash", "-n", ROOT / script], check=True)


def test_commands_that_are_shown_run(folder, capsys):
    shown = [shlex.split(command) for command in blocks("README.md") if command.startswith("lm ")]
    assert [command[:2] for command in shown] == [["lm", "train"]]
    assert cli.main([*shown[0][1:], *TINY]) == 0
    run = "runs/mine"
    # The table's commands, with a folder for RUN and one of the options that it names.
    assert cli.main(["evaluate", run, "--baselines", "--mesh.devices", "1"]) == 0
    assert cli.main(["generate", run, "--prompt", "word1 ", "--temperature", "0.8", "--max-new-tokens", "4"]) == 0
    assert cli.main(["train", "--resume", run]) == 0
    prepare = ["prepare", "configs/quickstart.py", "--data.source", "text:my/texts/*.txt", "--tokenizer.kind", "byte"]
    assert cli.main(prepare) == 0
    assert cli.main(["doctor"]) == 0
    assert "next:" in capsys.readouterr().out


@pytest.mark.parametrize("name", READMES)
def test_links_lead_somewhere(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert (ROOT / target).exists(), f"{name} links to {target}"
