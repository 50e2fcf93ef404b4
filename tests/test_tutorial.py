"""The tutorial's commands run, its outputs are real, and both languages show the same."""

import glob
import importlib.util
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
from lm import run as runs
from lm.config import Experiment
from lm.generate import SamplingConfig
from lm.generate.texts import generate_texts
from lm.run import check_experiment
from lm.text.clean import RULES

DOCS = Path(__file__).parent.parent / "docs"
PATHS = sysconfig.get_paths
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


def text_of(name: str, chapter: int | None = None) -> str:
    """A document, or a chapter of it with what stands before the first."""
    text = (DOCS / name).read_text(encoding="utf-8")
    if chapter is None:
        return text
    before, *chapters = re.split(r"^(?=# \d+\. )", text, flags=re.M)
    return before + chapters[chapter - 1]


def blocks(name: str, kind: str, chapter: int | None = None) -> list[str]:
    """The code blocks of a kind ("" for outputs) in a document."""
    text = text_of(name, chapter)
    return [body for found, body in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.S | re.M) if found == kind]


def commands(name: str, chapter: int | None = None) -> list[str]:
    return [line for block in blocks(name, "bash", chapter) for line in block.splitlines() if line]


def files(name: str, chapter: int | None = None) -> dict[str, str]:
    """The files that a reader is asked to save; each says its name first."""
    return {block.partition("\n")[0].removeprefix("# "): block for block in blocks(name, "python", chapter)}


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
    for name, code in files("tutorial.md", 1).items():
        (folder / name).write_text(code, encoding="utf-8")
    outputs = blocks("tutorial.md", "", 1)
    for command in commands("tutorial.md", 1):
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
    assert len(commands("tutorial.md", 1)) >= 10
    # One dataset: that of `lm prepare` is the one that `lm train` finds.
    assert len(list((folder / "datasets/docstrings").glob("*/1.0.0"))) == 1


@pytest.mark.parametrize("name", TUTORIALS)
def test_what_to_try_next_is_there_to_be_tried(name, tmp_path):
    (tmp_path / "words.py").write_text(files(name)["words.py"], encoding="utf-8")
    text = text_of(name, 1)
    listed = [shlex.split(options) for options in re.findall(r"^- `(--[^`]*)`", text, re.M)]
    assert len(listed) == 4
    (second,) = re.findall(r"^- `(--[^`]*)`", text_of(name, 2), re.M)
    qa = configs.load_file(DOCS.parent / "configs" / "families" / "qa_zh.py")
    check_experiment(configs.parse(Experiment, qa, shlex.split(second), prog="lm train"))
    for options in listed:
        if "--run" in options:
            options = options[: options.index("--run")]
        asked = configs.parse(Experiment, configs.load_file(tmp_path / "words.py"), options, prog="lm train")
        check_experiment(asked)


# The second chapter, small: GPT-2 learns nothing, and then the pairs in half the time.
SECOND = {
    "generate": "--max-new-tokens 20",
    "small.py": f"{SMALL} --model.n-layers 1 --train.steps 2 --train.eval-every 0 --mesh.devices 1",
    "configs/families/qa_zh.py": "--train.epochs 80 --train.eval-every 0 --mesh.devices 1",
}


def test_a_gpt2_folder_learns_to_answer(folder, capsys, monkeypatch):
    """The commands of the second chapter: the answers shown are those given, here and by transformers."""
    shutil.copytree(DOCS.parent / "configs", folder / "configs", ignore=shutil.ignore_patterns("__pycache__"))
    for name, code in files("tutorial.md").items():
        (folder / name).write_text(code, encoding="utf-8")
    runpy.run_path("gather.py", run_name="__main__")
    monkeypatch.setattr(sysconfig, "get_paths", PATHS)  # for torch, which asks where its own files are
    outputs = blocks("tutorial.md", "", 2)
    answers = []
    for command in commands("tutorial.md", 2):
        program, *arguments = shlex.split(command)
        capsys.readouterr()
        if program == "python":
            if importlib.util.find_spec("torch") is not None:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    runpy.run_path(arguments[0], run_name="__main__")
                assert capsys.readouterr().out == outputs[-1]
            continue
        small = SECOND.get(arguments[1] if arguments[0] == "train" else arguments[0], "")
        assert cli.main([*arguments, *shlex.split(small)]) == 0, command
        if arguments[:2] == ["generate", "runs/qa"]:
            answers.append(capsys.readouterr().out)
    assert answers[:2] == outputs[1:3] == ["晴朗\n", "四十二。\n"]

    source = Path("models/gpt2")
    assert {path.name for path in source.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    pairs = [json.loads(line) for line in Path("configs/families/qa_zh.jsonl").read_text("utf-8").splitlines()]
    assert len(pairs) == 40
    trained = runs.load(Path("runs/qa"), runs.inference_mesh(), "latest")
    given = generate_texts(
        trained, [pair["prompt"] for pair in pairs], SamplingConfig(temperature=0.0, max_new_tokens=50)
    )
    assert given == [pair["response"] for pair in pairs]
    again = [
        json.loads(line) for line in Path("configs/families/qa_zh_validation.jsonl").read_text("utf-8").splitlines()
    ]
    assert {pair["response"] for pair in again} <= set(given), "the same answers"
    assert not {pair["prompt"] for pair in again} & {pair["prompt"] for pair in pairs}
    for name in TUTORIALS:
        assert json.dumps(pairs[0], ensure_ascii=False) in text_of(name, 2)


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
