"""The tutorial's commands run, its outputs are real, and both languages show the same."""

import glob
import json
import re
import runpy
import shlex
import shutil
import sysconfig
import warnings
from pathlib import Path

import pytest

from lm import cli
from lm import config as configs
from lm.config import Experiment
from lm.run import check_experiment
from lm.text.clean import RULES

DOCS = Path(__file__).parent.parent / "docs"
TUTORIALS = ("tutorial.md", "tutorial.zh.md")
# What is made small so that it takes seconds.
SMALL = "--tokenizer.vocab-size 400 --data.validation-fraction 0.4"
TINY = {
    "prepare": SMALL,
    "train": f"{SMALL} --train.steps 2 --train.batch-size 4 --train.eval-every 0 --model.d-model 16"
    " --model.n-layers 1 --model.n-heads 2 --mesh.devices 1",
    "evaluate": "--mesh.devices 1",
    "generate": "--max-new-tokens 4",
}
PRINTS = ("hand.py", "hanzi.py", "rows.py", "windows.py")  # always the same


def blocks(name: str, kind: str) -> list[str]:
    """The code blocks of a kind ("" for outputs) in a document."""
    text = (DOCS / name).read_text(encoding="utf-8")
    return [body for found, body in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.S | re.M) if found == kind]


def commands(name: str) -> list[str]:
    return [line for block in blocks(name, "bash") for line in block.splitlines() if line]


def files(name: str) -> dict[str, str]:
    """The files that a reader is asked to save; each says its name first."""
    return {block.partition("\n")[0].removeprefix("# "): block for block in blocks(name, "python")}


def test_both_languages_show_the_same_code():
    english, chinese = ((commands(name), files(name)) for name in TUTORIALS)
    assert english == chinese
    outputs = [blocks(name, "") for name in TUTORIALS]
    assert outputs[0] == outputs[1]
    for name in TUTORIALS:
        text = (DOCS / name).read_text(encoding="utf-8")
        assert all(f"`{file}`" in text for file in files(name)), "a reader is told how to call each file"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder, and a Python with a small library."""
    library = Path(sysconfig.get_paths()["stdlib"])
    (tmp_path / "library" / "test").mkdir(parents=True)
    for module in ("argparse.py", "ast.py", "textwrap.py", "random.py", "statistics.py", "calendar.py", "heapq.py"):
        shutil.copy(library / module, tmp_path / "library" / module)
    (tmp_path / "library" / "test" / "left_out.py").write_text('"""Of the tests."""\n', encoding="utf-8")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "library")})
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_commands_that_are_shown_run(folder, capsys):
    for name, code in files("tutorial.md").items():
        (folder / name).write_text(code, encoding="utf-8")
    outputs = blocks("tutorial.md", "")
    for command in commands("tutorial.md"):
        program, *arguments = shlex.split(command)
        capsys.readouterr()
        if program == "python":
            with warnings.catch_warnings():
                runpy.run_path(arguments[0], run_name="__main__")
            if arguments[0] in PRINTS:
                assert capsys.readouterr().out in outputs, arguments[0]
            continue
        assert program == "lm"
        given = [path for argument in arguments for path in (sorted(glob.glob(argument)) or [argument])]
        assert cli.main([*given, *shlex.split(TINY.get(given[0], ""))]) == 0, command
    documents = [json.loads(line) for line in (folder / "texts/docstrings.jsonl").read_text("utf-8").splitlines()]
    assert {document["module"] for document in documents} >= {"argparse.py", "heapq.py"}
    assert "test/left_out.py" not in {document["module"] for document in documents}
    assert len(commands("tutorial.md")) >= 10
    # One dataset: that of `lm prepare` is the one that `lm train` finds.
    assert len(list((folder / "datasets/docstrings").glob("*/1.0.0"))) == 1


@pytest.mark.parametrize("name", TUTORIALS)
def test_what_to_try_next_is_there_to_be_tried(name, tmp_path):
    (tmp_path / "words.py").write_text(files(name)["words.py"], encoding="utf-8")
    text = (DOCS / name).read_text(encoding="utf-8")
    listed = [shlex.split(options) for options in re.findall(r"^- `(--[^`]*)`", text, re.M)]
    assert len(listed) == 4
    for options in listed:
        if "--run" in options:
            options = options[: options.index("--run")]
        asked = configs.parse(Experiment, configs.load_file(tmp_path / "words.py"), options, prog="lm train")
        check_experiment(asked)


def test_the_mixture_of_the_data_reference_is_one(folder, capsys):
    """What docs/data.md shows of mixtures, with texts of a few lines."""
    for language, word in (("en", "a fox"), ("zh", "狐狸")):
        (folder / language).mkdir()
        lines = [f"{word} {i} {word} {i * i}" for i in range(300)]
        (folder / language / "t.txt").write_text("\n".join(lines), encoding="utf-8")
    (folder / "mix.py").write_text(files("data.md")["mix.py"], encoding="utf-8")
    section = (DOCS / "data.md").read_text(encoding="utf-8").partition("## Mixtures")[2].partition("\n## ")[0]
    shown = re.findall(r"^    (lm .*?[^\\])$", section, re.S | re.M)
    assert [command.split()[1] for command in shown] == ["prepare", "prepare", "train"]
    tiny = f"{TINY['train'].removeprefix(SMALL)} --data.seq-len 16"
    for command, small in zip(shown, ("--tokenizer.vocab-size 300", "", tiny), strict=True):
        made = [path.name for path in Path("datasets/en").glob("*")]
        words = shlex.split(command.replace("\\\n", " ").replace("FINGERPRINT", "".join(made)))[1:]
        given = [path for word in words for path in (sorted(glob.glob(word)) if "*/1" in word else [word])]
        assert cli.main([*given, *small.split()]) == 0, command
    assert "epochs of datasets/zh" in capsys.readouterr().out


def test_the_table_of_cleaning_rules_is_that_of_the_code():
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \| (.*?) \|$", (DOCS / "data.md").read_text("utf-8"), re.M)
    shown = {
        name: (summary.replace("&lt;", "<").replace("&gt;", ">"), tuple(re.findall(r"`(\w+)`", options)), package)
        for name, summary, options, package in rows
        if name in RULES
    }
    assert shown == {name: (rule.summary, rule.options, rule.package or "") for name, rule in RULES.items()}
    assert list(shown) == list(RULES)


@pytest.mark.parametrize("name", [*TUTORIALS, "data.md"])
def test_links_lead_somewhere(name):
    text = (DOCS / name).read_text(encoding="utf-8")
    anchors = {
        re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.*)$", text, re.M)
    }
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", text):
        assert not target or (DOCS / target).exists(), f"{name} links to {target}"
        assert target or anchor in anchors, f"{name} links to #{anchor}"
