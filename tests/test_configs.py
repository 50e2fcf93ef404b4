"""The configs that ship: each loads, says how to run it, and survives being saved."""

import itertools
import json
import math
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import small_runs as small

from lm import config as configs
from lm import run as runs
from lm import tree
from lm.cli import main
from lm.config import Experiment
from lm.models.transformer import Transformer, flops_per_token
from lm.optim import make_optimizer, make_schedule
from lm.train import abstract_params, make_program

REPOSITORY = Path(__file__).parent.parent
CONFIGS = sorted((REPOSITORY / "configs").glob("*.py"))
PTB = REPOSITORY.parent / "shared" / "data" / "ptb"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_is_a_lab_note_and_an_experiment(path: Path):
    note = configs.describe(path)
    assert re.match(r"[A-Z].*\.\n\n", note), "what it trains, in one sentence"
    assert f"lm train configs/{path.name}" in note, "the exact command"
    if "not been run" in note:  # then it says what the time is reckoned from
        assert re.search(r"floating-point operations[:,]\s+\S+\s+days on", note), "the time it would take"
    else:
        assert re.search(r"\d.* minutes?|\d.* seconds|minutes on", note), "the expected time"
        assert re.search(r"(loss|perplexity|bits per byte)\D{1,30}\d", note), "the expected result"
    experiment = configs.load_file(path)
    assert configs.from_dict(Experiment, json.loads(json.dumps(configs.to_dict(experiment)))) == experiment
    runs.check_experiment(experiment)


# Parameters: of a config's own model with its tokenizer's vocabulary, or as published.
PARAMETERS = {
    "gpt2_small": 124_439_808 + 47 * 768,  # Radford et al. 2019, and the rows that fill up the table
    "llama_7b": 6_738_415_616,  # arXiv:2302.13971
}
FLOPS = {"gpt2_small": 2.5e20, "llama_7b": 5.8e21}  # that the notes tell


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_config_too_large_to_run_here_builds_abstractly(name: str):
    """Shapes alone: parameters as published, and one whole step of the batch that the config asks for."""
    experiment = configs.load_file(REPOSITORY / "configs" / f"{name}.py")
    mesh = runs.check_experiment(experiment)
    model, train, length = Transformer(experiment.model), experiment.train, experiment.data.seq_len
    params, _ = abstract_params(model, mesh)
    assert tree.count_parameters(params) == PARAMETERS[name]
    tokens = train.batch_size * length
    steps = train.total_steps(tokens_per_step=tokens, steps_per_epoch=math.nan)
    flops = steps * tokens * flops_per_token(experiment.model, length)
    assert flops == pytest.approx(FLOPS[name], rel=0.03)
    assert f"{FLOPS[name]:.1e}".replace("+", "") in configs.describe(REPOSITORY / "configs" / f"{name}.py")
    schedule = make_schedule(experiment.optim, steps)
    program = make_program(
        model, experiment.task, make_optimizer(experiment.optim, schedule, params), schedule, train, mesh
    )
    row = dict.fromkeys(("tokens", "targets", "positions"), np.int32) | {"weights": np.float32}
    batch = {key: jax.ShapeDtypeStruct((train.batch_size, length), dtype) for key, dtype in row.items()}
    with jax.set_mesh(mesh):
        state, report = jax.eval_shape(program.train_step, program.target, batch)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(
        lambda x: (x.shape, x.dtype), program.target
    )
    assert {x.shape for x in jax.tree.leaves(report)} == {()}


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
