"""The commands of docs/pretrained.md run, on models made up for them."""

import re
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import small_runs
from pretrained import GPT2_CONFIG, gpt2_weights, write_folder
from test_objectives_doc import SMALL, folder  # noqa: F401 - a fixture

from lm import cli

PAGE = Path(__file__).parent.parent / "docs" / "pretrained.md"
BERT = f"{SMALL} --model.d-model 16 --model.n-layers 1 --model.n-heads 2 --model.d-ff 32"


def commands() -> list[list[str]]:
    blocks = re.findall(r"```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    return [shlex.split(line, comments=True) for block in blocks for line in block.splitlines() if line]


def test_commands_of_the_page_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    source = write_folder(folder / "models" / "gpt2", gpt2_weights(GPT2_CONFIG), GPT2_CONFIG | {"eos_token_id": 1})
    small_runs.write_tokenizer(source / "tokenizer.json")
    files = [SimpleNamespace(rfilename=path.name) for path in source.iterdir()]
    hub = SimpleNamespace(model_info=lambda name: SimpleNamespace(siblings=files))
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: str(source))
    sections = [line for line in small_runs.CONFIG.splitlines() if "ModelConfig(" not in line and "kind=" not in line]
    (folder / "CONFIG.py").write_text("\n".join(sections))
    small_runs.write_corpus(folder / "corpus.txt")
    bert = ["train", "configs/families/bert_tiny.py", "--run", "runs/bert", *shlex.split(BERT)]
    assert cli.main(bert) == 0

    shown = commands()
    assert {words[1] for words in shown} == {"import", "generate", "export", "train"}
    for number, (_, name, *arguments) in enumerate(shown):
        asked = [argument.replace("~/models", str(folder / "models")) for argument in arguments]
        if name == "generate":
            asked += ["--max-new-tokens", "3"]
        if name == "export":
            shutil.copytree("runs/gpt2", "runs/mine")
        if name == "train":
            asked += ["--run", f"runs/{number}", *shlex.split(BERT if "sst2" in asked[0] else SMALL)]
        assert cli.main([name, *asked]) == 0, (name, asked)
    assert (folder / "exported" / "mine" / "model.safetensors").exists()
