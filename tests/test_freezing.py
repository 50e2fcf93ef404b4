"""Learning rates by parameter, and frozen parameters: what moves and how much, and what freezing saves."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_runs
import tiny
from tasks.families import experiment as of_family

from lm import tree
from lm.errors import UserError
from lm.models.transformer import Transformer
from lm.optim import OptimConfig, make_optimizer, make_schedule, moving, rate_factors
from lm.sharding import MeshConfig, make_mesh
from lm.tasks.causal_lm import CausalLM
from lm.train import TrainConfig, abstract_params, make_program

MESH = make_mesh(MeshConfig(devices=1))
WIDE = {"n_layers": 3, "d_model": 64, "d_ff": 256, "vocab_size": 512, "tie_embeddings": False, "unroll": 0}


def program(config: Any, **optim: Any):
    settings = OptimConfig(peak_lr=0.1, schedule="constant", warmup=0, clip_norm=0, **optim)
    model, schedule = Transformer(config), make_schedule(settings, 10)
    params, _ = abstract_params(model, MESH)
    tx = make_optimizer(settings, schedule, params)
    made = make_program(model, CausalLM(), tx, schedule, TrainConfig(batch_size=4), MESH, moving(settings, params))
    return made, jax.eval_shape(lambda: params)


def stepped(made) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], Any]:
    """Parameters before and after a step, and the state after it."""
    batch = tiny.stream_batch(4, 12, 64)
    with jax.set_mesh(MESH):
        state = made.init()
        before = {path: np.asarray(leaf) for path, leaf in tree.path_leaves(state.params)}
        state, _ = made.train_step(state, {name: jnp.asarray(rows) for name, rows in batch.items()})
    return before, {path: np.asarray(leaf) for path, leaf in tree.path_leaves(state.params)}, state


def test_a_factor_is_a_factor_of_the_update() -> None:
    """Of plain gradient descent; layers each have their own."""
    sgd = {"optimizer": "sgd", "momentum": 0.0}
    config = tiny.config(n_layers=3)
    before, plain, _ = stepped(program(config, **sgd)[0])
    _, scaled, _ = stepped(program(config, **sgd, rates=(r"final_norm/.*=0", r"layers/mlp/.*=0.5", ".*=1"))[0])
    _, decayed, _ = stepped(program(config, **sgd, layer_decay=0.5)[0])
    for path, start in before.items():
        moved = plain[path].astype(np.float64) - start
        factor = 0.0 if path.startswith("final_norm") else 0.5 if path.startswith("layers/mlp/") else 1.0
        np.testing.assert_allclose(scaled[path] - start, factor * moved, atol=2e-7, err_msg=path)
        if path.startswith("layers/"):
            factors = np.array([0.125, 0.25, 0.5]).reshape(-1, *[1] * (start.ndim - 1))
        else:
            factors = np.array(1.0 if path.startswith("final_norm") else 0.0625)
        np.testing.assert_allclose(decayed[path] - start, factors * moved, atol=2e-7, err_msg=path)
    assert np.abs(plain["layers/mlp/up/kernel"] - before["layers/mlp/up/kernel"]).max() > 1e-4


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "adafactor"])
def test_frozen_parameters_stay_and_the_optimizer_does_not_know_them(optimizer: str) -> None:
    made, _ = program(tiny.config(), optimizer=optimizer, rates=("layers/attention/.*=1", ".*=0"))
    before, after, state = stepped(made)
    for path in before:
        same = np.array_equal(before[path], after[path])
        assert same != path.startswith("layers/attention/") or path.endswith("key/bias"), path
    kept = [path for path, _ in tree.path_leaves(state.opt_state) if path.endswith(tuple(before))]
    assert kept
    assert all("layers/attention/" in path for path in kept)
    everything, _ = program(tiny.config(), optimizer=optimizer)
    held = [sum(leaf.size for leaf in jax.tree.leaves(made.target.opt_state)) for made in (made, everything)]
    assert held[0] < 0.6 * held[1]


def flops(made, params: Any) -> float:
    batch = {name: jnp.asarray(rows) for name, rows in tiny.stream_batch(4, 24, 64).items()}
    with jax.set_mesh(MESH):
        return made.train_step.lower(made.target, batch).compile().cost_analysis()["flops"]


def test_what_is_frozen_costs_no_gradient() -> None:
    """Of a step's three parts (forward, gradients of states, gradients of parameters) freezing takes the last away,
    and where nothing below is trained, the second as well."""
    config = tiny.config(**WIDE)
    whole = flops(*program(config))
    norms = flops(*program(config, rates=(r"layers/.*norm/.*=1", ".*=0")))
    head = flops(*program(config, rates=("head/.*=1", ".*=0")))
    assert 0.6 < norms / whole < 0.75
    assert head / whole < 0.6


def test_a_frozen_run_in_parts_is_the_straight_run(tmp_path: Path) -> None:
    settings = of_family(tmp_path, "bert", "classification")
    optim = dataclasses.replace(settings.optim, rates=("(classifier|pooler)/.*=1", "layers/.*=0.1", ".*=0"))
    settings = dataclasses.replace(settings, optim=optim)
    small_runs.start(settings, tmp_path / "straight")
    small_runs.train_in_parts(settings, tmp_path / "parts", 3)
    small_runs.assert_same_run(tmp_path / "straight", tmp_path / "parts")


MISTAKES = {
    "no number": ({"rates": (".*",)}, r"optim.rates has '\.\*'; write PATTERN=FACTOR"),
    "no pattern": ({"rates": ("=1",)}, "write PATTERN=FACTOR"),
    "negative": ({"rates": (".*=-1",)}, "a number of at least 0"),
    "not covered": ({"rates": ("layers/.*=1",)}, "match no pattern: embed/embedding, .*'.*' covers the rest"),
    "no expression": ({"rates": ("(=1", ".*=0")}, "is not a regular expression"),
    "all": ({"rates": (".*=0",)}, "optim.rates freezes every parameter"),
    "decay": ({"layer_decay": 0.0}, "optim.layer_decay 0.0: give a number above 0"),
}


@pytest.mark.parametrize(("changes", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        program(tiny.config(), **changes)


def test_an_encoder_decoder_has_no_layer_decay() -> None:
    params = {"layers": {"w": jnp.zeros((2, 3))}, "encoder_layers": {"w": jnp.zeros((2, 3))}}
    with pytest.raises(UserError, match=r"two stacks of layers; use optim\.rates"):
        rate_factors(OptimConfig(layer_decay=0.9), params)
