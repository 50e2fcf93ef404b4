"""The commands of docs/objectives.md and of the notes in configs/families run, on texts made up for them."""

import ast
import csv
import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny

from lm import cli
from lm.tasks import TASKS

ROOT = Path(__file__).parent.parent
DOCUMENT = ROOT / "docs" / "objectives.md"
FAMILIES = sorted((ROOT / "configs" / "families").glob("*.py"))
WORDS = re.findall(r"\w+", "ein hund rennt über die wiese und eine frau sieht ihm zu während kinder spielen")
SMALL = (
    "--train.epochs None --train.steps 2 --train.batch-size 8 --train.eval-every 0 --train.log-every 1 --mesh.devices 1"
)
TINY = {
    "train": f"{SMALL} --model.d-model 16 --model.n-layers 1 --model.n-heads 2 --model.d-ff 32",
    "evaluate": "--mesh.devices 1 --batches 1",
    "generate": "--max-new-tokens 4",
    "teach": "--top-k 4 --mesh.devices 1",
}


def commands(text: str) -> list[str]:
    """The indented commands of a text, lines that end with a backslash joined."""
    joined = re.sub(r"\\\n\s*", " ", text)
    return [line.strip() for line in joined.splitlines() if re.match(r"^ {4}lm ", line)]


def sentence(rng: np.random.Generator) -> str:
    return " ".join(rng.choice(WORDS, rng.integers(6, 14))) + " ."


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with configs, and texts where they look for them."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs", ignore=shutil.ignore_patterns("__pycache__"))
    rng = np.random.default_rng(0)
    for name, files, lines in (
        ("multi30k", ("train.de", "train.en", "val.de", "val.en"), 60),
        ("multi30k", ("test_2016_flickr.de", "test_2016_flickr.en"), 4),
        ("ptb", ("ptb.train.txt", "ptb.valid.txt", "ptb.test.txt"), 200),
        ("wikitext2", ("train.txt", "valid.txt"), 60),
    ):
        (tmp_path / "data" / name).mkdir(parents=True, exist_ok=True)
        for file in files:
            long = 5 if name == "wikitext2" else 1
            texts = [" ".join(sentence(rng).capitalize() for _ in range(long)) for _ in range(lines)]
            (tmp_path / "data" / name / file).write_text("\n".join(texts) + "\n", encoding="utf-8")
    (tmp_path / "data" / "sst2").mkdir()
    for file in ("train.tsv", "dev.tsv", "test.tsv"):
        rows = "".join(f"{sentence(rng)}\t{i % 2}\n" for i in range(60))
        (tmp_path / "data" / "sst2" / file).write_text(rows, encoding="utf-8")
    (tmp_path / "data" / "zh").mkdir()
    with (tmp_path / "data" / "zh" / "ChnSentiCorp_htl_all.csv").open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("label", "review"))
        rows.writerows((i % 2, "房间" + "很好大小干净"[i % 5 :] + str(i)) for i in range(80))
    (tmp_path / "in.txt").write_text("ein hund\neine frau\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(command: str, at: str) -> None:
    """A command, made small; RUN is the folder `at`, and a new run goes there."""
    _, name, *arguments = shlex.split(command.replace(" RUN", f" {at}"))
    small = shlex.split(TINY[name])
    if name == "train" and "--run" not in arguments:
        shutil.rmtree(at, ignore_errors=True)
        small += ["--run", at]
    if "--sampling.beams" in arguments:
        small += ["--sampling.max-new-tokens", "4"]
    if "--beams" in arguments:
        arguments[arguments.index("--beams") + 1] = "2"
    assert cli.main([name, *arguments, *small]) == 0, command


def test_commands_of_the_page_run(folder: Path) -> None:
    pytest.importorskip("sacrebleu")
    run("lm train configs/families/multi30k.py --run runs/teacher", "runs/teacher")
    shown = commands(DOCUMENT.read_text(encoding="utf-8"))
    assert len(shown) >= 5
    for command in shown:
        run(command, "runs/shown")
    texts = [json.loads(line) for line in (folder / "out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [set(row) for row in texts] == [{"source", "reference", "text"}] * 4
    assert len((folder / "out.txt").read_text(encoding="utf-8").splitlines()) == 2


QUICK = [path for path in FAMILIES if path.stem in ("bert_tiny", "multi30k", "qa_zh", "sst2_finetune")]


@pytest.mark.parametrize("path", tiny.fast(FAMILIES, *QUICK), ids=lambda path: path.stem)
def test_commands_of_a_note_run(folder: Path, path: Path) -> None:
    shown = commands(ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "")
    here = [command for command in shown if "$D" not in command and "path/to" not in command]
    assert any(path.stem in command for command in here)
    if any("--scores" in command for command in here):
        pytest.importorskip("sacrebleu")
    for command in here:
        run(command, "runs/note")


def test_every_objective_is_on_the_page() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert re.findall(r"^\| `[A-Z]\w+` \| `(\w+)` \|", text, re.MULTILINE) == list(TASKS)
