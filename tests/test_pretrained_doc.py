"""The commands of docs/pretrained.md and docs/finetuning.md run, on models made up for them."""

import re
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import jax
import pytest
import small_runs
from pretrained import GPT2_CONFIG, gpt2_weights, write_folder
from test_objectives_doc import SMALL, folder  # noqa: F401 - a fixture

from lm import cli
from lm import run as runs
from lm.optim import OptimConfig, freezing
from lm.records import RunDirectory

DOCS = Path(__file__).parent.parent / "docs"
BERT = f"{SMALL} --model.d-model 16 --model.n-layers 1 --model.n-heads 2 --model.d-ff 32"


def commands(page: str) -> list[list[str]]:
    blocks = re.findall(r"```bash\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.S)
    return [shlex.split(line, comments=True) for block in blocks for line in block.splitlines() if line]


@pytest.fixture
def models(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:  # noqa: F811
    """A folder with a GPT-2, a config, its text and a BERT's run; the GPT-2 is what the hub has."""
    source = write_folder(folder / "models" / "gpt2", gpt2_weights(GPT2_CONFIG), GPT2_CONFIG | {"eos_token_id": 1})
    small_runs.write_tokenizer(source / "tokenizer.json")
    files = [SimpleNamespace(rfilename=path.name) for path in source.iterdir()]
    hub = SimpleNamespace(model_info=lambda name, revision: SimpleNamespace(siblings=files))
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: str(source))
    sections = [line for line in small_runs.CONFIG.splitlines() if "ModelConfig(" not in line and "kind=" not in line]
    (folder / "CONFIG.py").write_text("\n".join(sections))
    small_runs.write_corpus(folder / "corpus.txt")
    bert = ["train", "configs/families/bert_tiny.py", "--run", "runs/bert", *shlex.split(BERT)]
    assert cli.main(bert) == 0
    return folder


def test_commands_of_pretrained_run(models: Path) -> None:
    shown = commands("pretrained.md")
    assert {words[1] for words in shown} == {"import", "generate", "export"}
    for _, name, *arguments in shown:
        asked = [argument.replace("~/models", str(models / "models")) for argument in arguments]
        if name == "generate":
            asked += ["--max-new-tokens", "3"]
        if name == "export":
            shutil.copytree("runs/gpt2", "runs/mine")
        assert cli.main([name, *asked]) == 0, (name, asked)
    assert (models / "exported" / "mine" / "model.safetensors").exists()


def test_commands_of_finetuning_run(models: Path) -> None:
    assert cli.main(["import", str(models / "models" / "gpt2"), "runs/gpt2"]) == 0
    shown = commands("finetuning.md")
    assert {words[1] for words in shown} == {"train", "export", "import", "evaluate"}
    for number, (_, name, *asked) in enumerate(shown):
        if name == "train":
            run = "runs/lora" if "--model.lora.rank" in asked else f"runs/{number}"
            small = BERT if "sst2" in asked[0] else SMALL
            asked += ["--run", run, *shlex.split(small)]
        if name == "evaluate":
            asked += ["--mesh.devices", "1", "--batches", "2"]
        assert cli.main([name, *asked]) == 0, (name, asked)
    assert (models / "adapters" / "lora" / "adapter_model.safetensors").exists()
    # Every way to freeze that the page shows is one for these models: all parameters are covered, and some move.
    text = (DOCS / "finetuning.md").read_text(encoding="utf-8")
    ways = [re.findall(r"'([^']*)'", line) for line in re.findall(r"^\|[^|]*\| `('.*')` \|$", text, re.M)]
    assert len(ways) == 5
    experiment = runs.load_experiment(RunDirectory.open(models / "runs" / "lora"))
    params = runs.load(models / "runs" / "lora", runs.inference_mesh()).params
    assert experiment.model.lora.rank == 8
    for way in ways:
        moves = jax.tree.leaves(freezing(OptimConfig(rates=tuple(way)), params).moves)
        assert any(moves), way
        assert all(moves) == ("=0" not in " ".join(way)), way
