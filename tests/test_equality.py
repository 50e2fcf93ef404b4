"""A run on a mesh is the run on one device; where it isn't, the first place that differs is named."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from lm import equality
from lm.cli import main
from lm.config import Experiment
from lm.data.config import DataConfig
from lm.models import split_attention
from lm.models.presets import bert, gpt2, llama, t5, transformer
from lm.models.transformer import ModelConfig
from lm.optim import OptimConfig
from lm.plan.job import make_job
from lm.sharding import MeshConfig, Rules
from lm.tasks.causal_lm import CausalLM
from lm.tasks.masked_lm import BertPretraining
from lm.tasks.seq2seq import Seq2Seq
from lm.text.tokenizer import TokenizerConfig
from lm.train import TrainConfig

SEQUENCE = Rules(residual_length=("context", "tensor"))
SIZES: dict[str, Any] = {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_len": 64, "vocab_size": None}


DATA = {
    "seq2seq": DataConfig(source="parallel:none,none", seq_len=32),
    "bert": DataConfig(source="text:none", seq_len=32, sentences=True),
}


def experiment(model: ModelConfig, task: Any, mesh: MeshConfig, **train: Any) -> Experiment:
    return Experiment(
        model=model,
        data=DATA.get(task.kind, DataConfig(source="text:none", seq_len=32, packing="documents")),
        tokenizer=TokenizerConfig(kind="byte"),
        task=task,
        optim=OptimConfig(peak_lr=1e-2, warmup=3),
        train=TrainConfig(**{"steps": 10, "batch_size": 8} | train),
        mesh=mesh,
    )


LLAMA = llama("tiny", **SIZES | {"n_kv_heads": 2, "d_ff": 64})
FAMILIES = {
    "llama": (LLAMA, CausalLM(loss_chunk=8)),
    "gpt2": (gpt2("small", **SIZES), CausalLM()),
    "bert": (bert("tiny", **SIZES | {"d_ff": 64}), BertPretraining()),
    "transformer": (transformer("base", **SIZES | {"encoder_layers": 2, "d_ff": 64}), Seq2Seq()),
    "t5": (t5("small", **SIZES | {"encoder_layers": 2, "d_ff": 64}), Seq2Seq()),
}
MESHES = {
    "data 8": MeshConfig(),
    "fsdp 8": MeshConfig(data=1, fsdp=8),
    "tensor 4, data 2": MeshConfig(tensor=4),
    "context 8": MeshConfig(data=1, context=8),
    "context 4, fsdp 2": MeshConfig(data=1, fsdp=2, context=4),
    "data 2, fsdp 2, tensor 2": MeshConfig(fsdp=2, tensor=2),
    "data 2, context 2, tensor 2, sequence": MeshConfig(context=2, tensor=2, rules=SEQUENCE),
}


@pytest.fixture(scope="module")
def alone():
    known: dict[str, equality.Run] = {}

    def of(family: str) -> equality.Run:
        if family not in known:
            known[family] = equality.on_one_device(experiment(*FAMILIES[family], MeshConfig()))
        return known[family]

    return of


# Each family meets each axis in the slow runs; the fast ones are those most likely to break.
FAST = {("llama", "context 4, fsdp 2"), ("t5", "data 2, context 2, tensor 2, sequence")}


@pytest.mark.parametrize(
    ("family", "mesh", "remat", "accumulate"),
    [
        pytest.param(
            family,
            mesh,
            ("none", "dots", "offload", "full")[number % 4] if family != "llama" else ("full", "offload")[number % 2],
            1 + number % 2 if "data 8" not in mesh and "fsdp 8" not in mesh else 1,
            marks=() if (family, mesh) in FAST else pytest.mark.slow,
        )
        for family in FAMILIES
        for number, mesh in enumerate(MESHES)
    ],
)
def test_ten_steps_of_every_family_on_every_mesh(alone, family, mesh, remat, accumulate):
    model, task = FAMILIES[family]
    asked = experiment(dataclasses.replace(model, remat=remat), task, MESHES[mesh], accumulate=accumulate)
    found = equality.compare(alone(family), asked)
    assert found.losses.shape == (3, 10)
    np.testing.assert_allclose(found.losses[1], found.losses[0], rtol=1e-5)
    assert found.losses[0][-1] < found.losses[0][0] - 0.1, "it learns, so that equal losses mean something"
    assert found.first is None, found.first


def test_made_up_batches_hold_what_can_go_wrong():
    for family, (model, task) in FAMILIES.items():
        job = make_job(experiment(model, task, MeshConfig()), "cpu")
        batch = equality.made_up_batch(job, 8, seed=0)
        shapes = job.batch(8)
        assert {name: (x.shape, x.dtype) for name, x in batch.items()} == {
            name: (shape.shape, shape.dtype) for name, shape in shapes.items()
        }, family
        assert batch["tokens"].max() < (job.model.vocab_size or 0)
        scored = batch["weights"] > 0
        assert not scored[-1].any()
        assert not (scored & (batch["segments"] == 0)).any()
        assert len(np.unique(scored.sum(axis=1))) > 3, "rows of unequal weight"
        if task.kind != "bert":
            assert batch["segments"].max() > 1, "documents that must not see each other"
        starts = np.diff(batch["segments"], axis=1, prepend=-1) != 0
        assert (batch["positions"][starts] == 0).all()
        assert (np.diff(batch["positions"], axis=1)[~starts[:, 1:]] == 1).all()


def leaky(options: Any, pair: Any, own: Any, theirs: Any) -> Any:
    """A mask that forgets documents."""
    del own, theirs
    return KEPT_MASK(options, pair, None, None)


KEPT_MASK = split_attention._Options.mask


def test_what_a_kernel_gets_wrong_is_named(alone, monkeypatch):
    asked = experiment(*FAMILIES["llama"], MESHES["context 4, fsdp 2"])
    with monkeypatch.context() as planted:
        planted.setattr(split_attention._Options, "mask", leaky)
        found = equality.compare(alone("llama"), asked)
    assert found.first is not None
    assert found.first.part == "layer 0"
    assert found.first.relative > 1e-3
    assert found.largest("initial").relative == 0


def test_a_wrong_gradient_is_named_by_the_layer_it_comes_from_first(alone, monkeypatch):
    """Of values alone: what comes before, all of the forward pass, is right."""
    asked = experiment(*FAMILIES["llama"], MESHES["context 4, fsdp 2"])

    def backward(*arguments: Any) -> Any:
        query, key, value, *rest = KEPT_BACKWARD(*arguments)
        return query, key, value * 1.01, *rest

    planted = jax.custom_vjp(split_attention._attend_pairs.__wrapped__, nondiff_argnums=(0,))
    planted.defvjp(split_attention._attend_forward, backward)
    monkeypatch.setattr(split_attention, "_attend_pairs", planted)
    found = equality.compare(alone("llama"), asked)
    assert found.first is not None
    assert found.first.part == "gradient of layers/attention/value/kernel, layer 1"
    assert found.largest_of_layers().relative < 1e-5


KEPT_BACKWARD = split_attention._attend_backward


@pytest.mark.slow
def test_rounding_that_grows_is_told_from_a_difference(monkeypatch):
    """At a rate at which nothing is learnt, losses part by more than the tolerance with nothing wrong."""
    model, task = FAMILIES["llama"]
    wild = experiment(model, task, MESHES["context 4, fsdp 2"])
    wild = dataclasses.replace(wild, optim=OptimConfig(peak_lr=0.3, warmup=1, clip_norm=0.0))
    one = equality.on_one_device(wild)
    found = equality.compare(one, wild)
    assert found.largest("loss").relative > found.tolerance
    assert found.first is None, found.first
    # A mistake is more than that from the first step on.
    with monkeypatch.context() as planted:
        planted.setattr(split_attention._Options, "mask", leaky)
        wrong = equality.compare(one, wild)
    losses = [part for part in wrong.parts if part.part.startswith("loss")]
    assert losses[0].relative > losses[0].allowed


CONFIG = """
import sys
sys.path.insert(0, {tests!r})
from test_equality import LLAMA, experiment
from lm.sharding import MeshConfig
from lm.tasks.causal_lm import CausalLM

def get_config():
    return experiment(LLAMA, CausalLM(), MeshConfig(data=1, fsdp=2, context=4))
"""


def test_the_command(tmp_path, monkeypatch, capsys):
    from pathlib import Path

    config = tmp_path / "config.py"
    config.write_text(CONFIG.format(tests=str(Path(__file__).parent)))
    asked = ["doctor", "--check-mesh", str(config), "--steps", "2"]
    assert main(asked) == 0
    said = capsys.readouterr().out
    assert "fsdp 2, context 4 (cpu) beside one device" in said
    assert "8 rows of 32 made-up tokens, float32, no dropout" in said
    assert "the same to the bit" in said
    assert said.splitlines()[-1] == "the same: no difference above 1e-05 of the largest value, or what rounding makes"
    monkeypatch.setattr(split_attention._Options, "mask", leaky)
    assert main(asked) == 1
    assert "DIFFERENT: layer 0 is the first that differs, by " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--check-mesh is given no config file"),
        (["none.py"], "no config file none.py"),
        (["CONFIG", "--mesh.tensor", "3"], r"context 4, tensor 3 does not fit 8 device\(s\)"),
        (["CONFIG", "--data.seq-len", "20"], r"a row \(data.seq_len\) has 20 tokens, not a multiple of 8"),
        (["CONFIG", "--train.batch-size", "3"], "train.batch_size 3 is not a multiple of 2"),
        (["CONFIG", "--steps", "0"], "--steps is 0"),
        (["CONFIG", "--fake-devices", "1", "--mesh.fsdp", "1", "--mesh.context", "1"], "the mesh has one device"),
        (["CONFIG", "--mesh.fsdp", "1", "--mesh.context", "1", "--mesh.devices", "1"], "the mesh has one device"),
        (["CONFIG", "--fake-devices", "64"], "--fake-devices is 64, and jax has started with 8"),
        (["CONFIG", "--tolerance", "2"], "--tolerance is 2.0"),
        (["CONFIG", "--model.d-model", "65536", "--model.n-layers", "8"], "GB are free; make the model smaller"),
        (["CONFIG", "--mesh.rules.embed", "pipe"], "--mesh.rules.embed"),
    ],
)
def test_mistakes(tmp_path, capfd, arguments, message):
    import re
    from pathlib import Path

    config = tmp_path / "config.py"
    config.write_text(CONFIG.format(tests=str(Path(__file__).parent)))
    assert main(["doctor", "--check-mesh", *(str(config) if a == "CONFIG" else a for a in arguments)]) == 2
    err = capfd.readouterr().err
    assert err.startswith("lm: ")
    assert err.count("\n") == 1, err
    assert re.search(message, err), err
