"""The configs that ship: each loads, says how to run it, and survives being saved."""

import itertools
import json
import re
from pathlib import Path

import pytest
import small_runs as small

from lm import config as configs
from lm import run as runs
from lm.cli import main
from lm.config import Experiment

REPOSITORY = Path(__file__).parent.parent
CONFIGS = sorted((REPOSITORY / "configs").glob("*.py"))
PTB = REPOSITORY.parent / "shared" / "data" / "ptb"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_is_a_lab_note_and_an_experiment(path: Path):
    note = configs.describe(path)
    assert re.match(r"[A-Z].*\.\n\n", note), "what it trains, in one sentence"
    assert f"lm train configs/{path.name}" in note, "the exact command"
    assert re.search(r"\d.* minutes?|\d.* seconds|minutes on", note), "the expected time"
    assert re.search(r"(loss|perplexity|bits per byte)\D{1,30}\d", note), "the expected result"
    experiment = configs.load_file(path)
    assert configs.from_dict(Experiment, json.loads(json.dumps(configs.to_dict(experiment)))) == experiment
    runs.check_experiment(experiment)


@pytest.mark.slow
@pytest.mark.skipif(not PTB.exists(), reason="the Penn Treebank is not at hand")
def test_ptb_perplexity_falls_at_every_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    command = ["train", str(REPOSITORY / "configs/ptb_small.py"), "--run", "ptb", "--mesh.devices", "1"]
    for name, file in {"source": "train", "validation-source": "valid", "test-source": "test"}.items():
        command += [f"--data.{name}", f"text:{PTB}/ptb.{file}.txt"]
    command += ["--train.steps", "100", "--train.eval-every", "20", "--train.eval-batches", "20"]
    assert main(command) == 0
    records = small.metrics(tmp_path / "ptb")
    perplexities = [record["perplexity"] for record in records if record["split"] == "validation"]
    assert len(perplexities) == 5
    assert all(later < earlier for earlier, later in itertools.pairwise(perplexities)), perplexities
    assert perplexities[-1] < 400
