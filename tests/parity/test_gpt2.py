"""Step for step with Hugging Face: against torch where it is, against what it computed where it is not."""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from hugging_face import (
    BETAS,
    CLIP,
    DECAY,
    EPSILON,
    GPT2,
    LENGTH,
    LLAMA,
    PEAK,
    ROWS,
    STEPS,
    WARMUP,
    batch,
    draw,
    gpt2_params,
    gpt2_shapes,
    llama_params,
)

from lm.evaluate import to_devices
from lm.models.transformer import Transformer
from lm.optim import OptimConfig, make_optimizer, make_schedule
from lm.sharding import MeshConfig, make_mesh
from lm.tasks.causal_lm import CausalLM
from lm.train import TrainConfig, make_program

OPTIM = OptimConfig(
    peak_lr=PEAK,
    schedule="constant",
    warmup=WARMUP,
    beta1=BETAS[0],
    beta2=BETAS[1],
    epsilon=EPSILON,
    weight_decay=DECAY,
    clip_norm=CLIP,
)


def our_losses(params) -> np.ndarray:
    """The run through the trainer's own step."""
    schedule = make_schedule(OPTIM, STEPS)
    tx = make_optimizer(OPTIM, schedule, params)
    config = TrainConfig(steps=STEPS, batch_size=ROWS)
    model = Transformer(replace(GPT2, unroll=1))  # compiles faster
    program = make_program(model, CausalLM(), tx, schedule, config, make_mesh(MeshConfig(devices=1)))

    state = program.begin(jax.tree.map(jax.numpy.array, params))  # copies: a program uses them up
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (ROWS, LENGTH))
    losses = []
    for step in range(STEPS):
        data = batch(step)
        arrays = {
            "tokens": data[:, :-1],
            "targets": data[:, 1:],
            "weights": np.ones((ROWS, LENGTH), np.float32),
            "positions": positions,
        }
        state, report = program.train_step(state, to_devices(arrays, program.mesh))
        losses.append(report["loss"] / report["weight"])
    return np.array([float(loss) for loss in losses])


def our_logits(config, params) -> np.ndarray:
    return jax.jit(lambda params, tokens: Transformer(config).apply({"params": params}, tokens))(
        params, batch(0)[:, :-1]
    )


@pytest.fixture(scope="module")
def golden():
    return np.load(Path(__file__).parent / "golden" / "gpt2.npz")


@pytest.fixture(scope="module")
def ours():
    return our_losses(gpt2_params(draw(gpt2_shapes())))


@pytest.fixture
def torch_models():
    import torch_models

    return torch_models


def test_weights_are_those_of_the_golden_file(golden):
    checksum = sum(float(np.abs(w).astype(np.float64).sum()) for w in draw(gpt2_shapes()).values())
    np.testing.assert_allclose(checksum, golden["checksum"], rtol=1e-12)


def test_logits_are_the_golden_ones(golden):
    np.testing.assert_allclose(our_logits(GPT2, gpt2_params(draw(gpt2_shapes()))), golden["logits"], atol=1e-4)


def test_fifty_losses_are_the_golden_ones(golden, ours):
    assert golden["losses"][-1] < golden["losses"][0] - 1  # it learns
    np.testing.assert_allclose(ours, golden["losses"], rtol=1e-4)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_fifty_losses_are_those_of_torch(torch_models, ours):
    np.testing.assert_allclose(ours, torch_models.train(torch_models.gpt2(draw(gpt2_shapes()))), rtol=1e-4)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_logits_are_those_of_torch(torch_models, family):
    model = getattr(torch_models, family)()
    config, convert = {"gpt2": (GPT2, gpt2_params), "llama": (LLAMA, llama_params)}[family]
    expected = torch_models.logits(model, batch(0)[:, :-1])
    assert np.ptp(expected) > 1
    logits = our_logits(config, convert(torch_models.weights_of(model)))
    assert np.max(np.abs(logits - expected)) < 1e-4
