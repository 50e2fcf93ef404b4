"""The commands of docs/instructions.md run, on models and texts made up for them."""

import json
import re
import shlex
import shutil
from pathlib import Path

import chats
import numpy as np
import pytest
from pretrained import GPT2_CONFIG, gpt2_weights, write_folder

from lm import cli
from lm.text.files import TEMPLATE_FILE

PAGE = Path(__file__).parent.parent / "docs" / "instructions.md"
TINY = {
    "train": "--train.epochs None --train.steps 2 --train.eval-every 0 --mesh.devices 1",
    "generate": "--max-new-tokens 3",
    "evaluate": "--mesh.devices 1 --json",
}
TALKS, WORDS = 1, 2  # the sections


def section(number: int) -> str:
    return re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.M)[number]


def commands(number: int) -> list[list[str]]:
    blocks = re.findall(r"```bash\n(.*?)```", section(number), re.S)
    return [shlex.split(line, comments=True) for block in blocks for line in block.splitlines() if line]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the page's files, a run of a GPT-2, a chat model, and texts that the files read."""
    monkeypatch.chdir(tmp_path)
    for body in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S):
        (tmp_path / body.partition("\n")[0].removeprefix("# ")).write_text(body, encoding="utf-8")
    for name, template in (("gpt2", None), ("chat", chats.QWEN)):
        config = GPT2_CONFIG | {"n_positions": 256, "bos_token_id": 256, "eos_token_id": 257}
        made = write_folder(tmp_path / "models" / name, gpt2_weights(config), config)
        chats.write_folder(made, chats.byte_tokenizer(), template)
    assert cli.main(["import", "models/gpt2", "runs/gpt2"]) == 0
    with (tmp_path / "talks.jsonl").open("w", encoding="utf-8") as file:
        for i in range(40):
            talk = [("user", f"你好 {i}"), ("assistant", f"好 {i}"), ("user", "a?"), ("assistant", "b")][
                : 2 + i % 2 * 2
            ]
            messages = [{"role": role, "content": content} for role, content in talk]
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    rng = np.random.default_rng(0)
    with (tmp_path / "reviews.jsonl").open("w", encoding="utf-8") as file:
        for i in range(200):
            file.write(json.dumps({"text": " ".join(rng.choice(["a", "film"], 5)) + f" {i}", "label": i % 2}) + "\n")
    return tmp_path


def run(command: list[str]) -> None:
    _, name, *arguments = command
    assert cli.main([name, *arguments, *shlex.split(TINY.get(name, ""))]) == 0, command


def test_commands_about_conversations_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = commands(TALKS)
    assert {words[1] for words in shown} == {"train", "generate", "export", "import"}
    for command in shown:
        run(command)
    told = [json.loads(line) for line in (folder / "runs/talk/samples.jsonl").read_text("utf-8").splitlines()]
    lengths = [len(one["prompt_ids"]) for one in told]
    assert lengths[1] > lengths[0], "what the system says comes before"
    assert (folder / "exported" / "talk" / TEMPLATE_FILE).exists()


def test_commands_about_words_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = commands(WORDS)
    assert [words[1] for words in shown] == ["evaluate"] * 4 + ["train"]
    found = []
    for command in shown:
        capsys.readouterr()
        run(command)
        if command[1] == "evaluate":
            found.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    assert all({"accuracy", "accuracy_se", "macro_f1", "macro_f1_se", "loss_se"} <= result.keys() for result in found)
    assert len({result["loss"] for result in found}) == 4, "each asks in another way"
    assert len(list((folder / "datasets" / "reviews").glob("*/1.0.0"))) == 1, "of the same documents"
    shutil.rmtree(folder / "runs" / "reviews")


def test_files_of_the_page_are_named() -> None:
    text = PAGE.read_text(encoding="utf-8")
    names = [body.partition("\n")[0].removeprefix("# ") for body in re.findall(r"```python\n(.*?)```", text, re.S)]
    assert names == ["talk.py", "reviews.py"]
    assert all(f"Save this as `{name}`" in text for name in names)


def test_links_and_names_lead_somewhere() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)\)", text):
        assert target.startswith("https://") or (PAGE.parent / target).exists(), target
    for target in re.findall(r"`(tests/[^`]+)`", text):
        assert (PAGE.parent.parent / target).exists(), target
