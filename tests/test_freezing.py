"""Learning rates by parameter, and frozen parameters: what moves and how much, and what freezing saves."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_runs
import tiny
from tasks.families import experiment as of_family

from lm import run as runs
from lm import tree
from lm.errors import UserError
from lm.models.transformer import Transformer, flops_per_token
from lm.optim import OptimConfig, freezing, make_optimizer, make_schedule, rate_factors
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
    made = make_program(model, CausalLM(), tx, schedule, TrainConfig(batch_size=4), MESH, freezing(settings, params))
    return made, jax.eval_shape(lambda: params)


def whole(made, state) -> dict[str, np.ndarray]:
    """All parameters by the names of the model, as they come back from disk."""
    stored, frozen = made.storage.stored(state), made.storage.frozen(state)
    return {path: np.asarray(leaf) for path, leaf in tree.path_leaves(tree.merge(stored.params, frozen))}


def stepped(made, steps: int = 1) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], Any]:
    """Parameters before and after steps, and the state after them."""
    batch = {name: jnp.asarray(rows) for name, rows in tiny.stream_batch(4, 12, 64).items()}
    with jax.set_mesh(MESH):
        state = made.init()
        before = whole(made, state)
        for _ in range(steps):
            state, _ = made.train_step(state, batch)
        return before, whole(made, state), state


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


def test_frozen_first_layers_are_a_segment_of_their_own() -> None:
    """They have no moments and no gradient, those above train as ever, and on disk names and shapes are the model's."""
    config = tiny.config(**WIDE | {"n_layers": 4})
    sgd = {"optimizer": "sgd", "momentum": 0.9}  # Adam makes much of gradients that are rounding alone
    everything, shapes = program(config, **sgd)
    rates = ("embed/.*=0", "position_embed/.*=0", "layers/[01]/.*=0", ".*=1")
    made, _ = program(config, **sgd, rates=rates)
    before, after, state = stepped(made)
    _, reference, _ = stepped(everything)
    assert {path: leaf.shape for path, leaf in tree.path_leaves(shapes)} == {p: v.shape for p, v in after.items()}
    for path, leaf in after.items():
        if path.startswith("layers/"):
            np.testing.assert_array_equal(leaf[:2], before[path][:2], err_msg=path)
            np.testing.assert_allclose(leaf[2:], reference[path][2:], atol=1e-6, err_msg=path)
        elif "embed" in path:
            np.testing.assert_array_equal(leaf, before[path], err_msg=path)
        else:
            np.testing.assert_allclose(leaf, reference[path], atol=1e-6, err_msg=path)
    assert np.abs(after["layers/mlp/up/kernel"][2:] - before["layers/mlp/up/kernel"][2:]).max() > 1e-4
    moments = [leaf for path, leaf in tree.path_leaves(state.opt_state) if path.endswith("layers/mlp/up/kernel")]
    assert moments
    assert all(moment.shape[0] == 2 for moment in moments)
    assert state.params["layers"]["mlp"]["up"]["kernel"].shape[0] == 2
    # Of the gradients, those of half the layers and of their states are gone.
    head = program(config, **sgd, rates=("head/.*=1", ".*=0"))[0]
    costs = [flops(one, None) for one in (head, made, everything)]
    assert costs[1] - costs[0] < 0.6 * (costs[2] - costs[0])
    # Restored, it is the same state.
    with jax.set_mesh(MESH):
        again = made.storage.restored(made.storage.stored(state), made.storage.frozen(state))
    jax.tree.map(np.testing.assert_array_equal, again, state)


@pytest.mark.parametrize(
    ("rates", "share"),
    [
        (("layers/.*norm/.*=1", ".*=0"), 4 / 6),
        (("head/.*=1", ".*=0"), None),
        (("(embed|position_embed)/.*=0", "layers/[01]/.*=0", ".*=1"), None),
        (("layers/[01]/.*=0", ".*=1"), None),
        ((".*=1",), 1),
    ],
)
def test_counted_operations_are_those_of_what_is_trained(rates: tuple[str, ...], share: float | None) -> None:
    """Against the sums written out for a model whose matrices are counted by hand."""
    config = tiny.config(**WIDE | {"n_layers": 3})
    T, layer, head = 24, 4 * 64 * 64 + 2 * 64 * 256, 64 * 512
    attention = 12 * 64 * T
    whole = flops_per_token(config, T)
    assert whole == 6 * (3 * layer + head) + 3 * attention
    made, _ = program(config, rates=rates)
    needed = whole - made.flops_not_needed(T, 0)
    if rates[0].startswith("layers/.*norm"):
        assert needed == 4 * (3 * layer + head) + 3 * attention
    elif rates[0].startswith("head"):
        assert needed == 2 * 3 * layer + 6 * head + attention
    elif rates[0].startswith("(embed"):
        assert needed == 2 * 2 * layer + 6 * (layer + head) + attention + 2 * attention / 3
    elif rates[0].startswith("layers/["):
        assert needed == 4 * 2 * layer + 6 * (layer + head) + 3 * attention
    else:
        assert needed == share * whole


def test_first_layers_of_both_stacks() -> None:
    config = tiny.config(encoder_layers=3, n_layers=3)
    params, _ = abstract_params(Transformer(config), MESH)
    rates = ("layers/0/.*=0", "encoder_layers/[01]/.*=0", ".*=1")
    freeze = freezing(OptimConfig(rates=rates), params)
    assert freeze.lower == (("layers", 1), ("encoder_layers", 2))
    values = tiny.build(config)[1]
    moving, frozen = freeze.apart(values)
    tokens = np.arange(10, dtype=np.int32).reshape(2, 5)
    plain, parted = (
        model.apply({"params": params}, tokens, source_tokens=tokens + 7)
        for model, params in (
            (Transformer(config), values),
            (Transformer(config, lower=freeze.lower), freeze.joined(moving, frozen)),
        )
    )
    np.testing.assert_array_equal(parted, plain)
    jax.tree.map(np.testing.assert_array_equal, freeze.whole(moving, frozen), values)


def test_layers_in_the_middle_only_do_not_move() -> None:
    before, after, _ = stepped(
        program(tiny.config(n_layers=3), rates=("layers/1/.*=0", "layers/2/mlp/.*=0", ".*=1"))[0]
    )
    path = "layers/mlp/up/kernel"
    moved = np.abs(after[path] - before[path]).max(axis=(1, 2))
    assert moved[0] > 1e-4
    assert list(moved[1:]) == [0, 0]
    assert np.abs(after["layers/attention/value/kernel"] - before["layers/attention/value/kernel"])[2].max() > 1e-4


def test_unfreezing_waits_for_its_step() -> None:
    sgd = {"optimizer": "sgd", "momentum": 0.0}
    made, _ = program(tiny.config(n_layers=2), **sgd, unfreeze=("layers/0/.*=2", "embed/.*=3", "layers/1/.*=1"))
    begun = [stepped(made, steps)[:2] for steps in (1, 2, 3, 4)]
    moved = {
        path: [bool(np.any(after[path] != before[path])) for before, after in begun]
        for path in ("embed/embedding", "final_norm/scale")
    }
    layers = [
        np.abs(after["layers/mlp/up/kernel"] - before["layers/mlp/up/kernel"]).max((1, 2)) for before, after in begun
    ]
    moved |= {f"layer {i}": [bool(change[i] > 0) for change in layers] for i in range(2)}
    assert moved == {
        "embed/embedding": [False, False, False, True],
        "final_norm/scale": [True, True, True, True],
        "layer 0": [False, False, True, True],
        "layer 1": [False, True, True, True],
    }
    # What is held still has moments of its gradients: its first update is as if it had been trained.
    adam, _ = program(tiny.config(), unfreeze=("embed/.*=1",))
    plain, _ = program(tiny.config())
    held, ever = (stepped(one)[2].opt_state for one in (adam, plain))
    mine, theirs = (
        [leaf for path, leaf in tree.path_leaves(state) if path.endswith("embed/embedding")] for state in (held, ever)
    )
    assert mine
    for one, other in zip(mine, theirs, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("optimizer", tiny.fast(["adamw", "lion", "adafactor", "muon"], "adamw", "muon"))
def test_weight_decay_of_groups(optimizer: str) -> None:
    """What a step takes off a parameter besides its update: rate x weight_decay x factor of it."""
    config = tiny.config()
    none, some = (
        stepped(program(config, optimizer=optimizer, weight_decay=0.5, decays=decays)[0])
        for decays in ((".*=0",), ("embed/.*=0.5", "layers/0/mlp/.*=2", "layers/1/mlp/.*=1", r".*scale=1", ".*=0"))
    )
    for path, start in none[0].items():
        if path.endswith("key/bias"):  # its gradient is nothing but rounding
            continue
        if path.startswith("layers/mlp/"):
            factor = np.array([2.0, 1.0]).reshape(-1, *[1] * (start.ndim - 1))
        else:
            factor = 0.5 if path.startswith("embed/") else 1.0 if path.endswith("scale") else 0.0
        taken = none[1][path].astype(np.float64) - some[1][path]
        np.testing.assert_allclose(taken, 0.1 * 0.5 * factor * start, atol=1e-6, err_msg=path)


@pytest.mark.parametrize("ema", tiny.fast([0.0, 0.9], 0.9))
def test_a_frozen_run_keeps_what_is_frozen_once(tmp_path: Path, ema: float) -> None:
    """Checkpoints hold what is trained, by its whole name and shape; the rest is written once and read back."""
    settings = of_family(tmp_path, "gpt", "causal_lm")
    settings = dataclasses.replace(settings, model=dataclasses.replace(settings.model, n_layers=3))
    whole_run = dataclasses.replace(settings, optim=dataclasses.replace(settings.optim, peak_lr=1e-60))
    small_runs.start(whole_run, tmp_path / "whole")
    rates = ("(embed|position_embed)/.*=0", "layers/[01]/.*=0", "layers/2/mlp/.*=1", "layers/.*=0", ".*=1")
    frozen = dataclasses.replace(
        settings,
        optim=dataclasses.replace(settings.optim, rates=rates),
        train=dataclasses.replace(settings.train, ema_decay=ema),
    )
    name = f"frozen-{ema}"
    small_runs.start(frozen, tmp_path / name)
    kept = {path: value for path, value in small_runs.state(tmp_path / name).items() if path.startswith("params/")}
    theirs = {p: v for p, v in small_runs.state(tmp_path / "whole").items() if p.startswith("params/")}
    assert all(value.shape == theirs[path].shape for path, value in kept.items())
    assert {path.split("/")[1] for path in kept} == {"layers", "final_norm"}
    assert {path.split("/")[2] for path in kept if "layers" in path} == {"mlp"}
    loaded = dict(tree.path_leaves(runs.load(tmp_path / name, MESH, "latest").params))
    assert {f"params/{path}" for path in loaded} == set(theirs)
    for path, value in loaded.items():
        if f"params/{path}" not in kept:
            np.testing.assert_array_equal(value, theirs[f"params/{path}"], err_msg=path)
        elif path.startswith("layers/"):
            np.testing.assert_array_equal(value[:2], theirs[f"params/{path}"][:2], err_msg=path)
    small_runs.train_in_parts(frozen, tmp_path / f"parts-{ema}", 3)
    small_runs.assert_same_run(tmp_path / name, tmp_path / f"parts-{ema}")
    shutil.rmtree(tmp_path / name / "frozen")
    with pytest.raises(UserError, match="holds what is frozen in this run; restore it"):
        runs.load(tmp_path / name, MESH)


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
    "no step": ({"unfreeze": ("embed/.*=soon",)}, r"optim.unfreeze has .*; write PATTERN=STEP"),
    "decays not covered": ({"decays": ("layers/.*=1",)}, "match no pattern: embed/embedding, "),
    "decays and everything": ({"decays": (".*=1",), "decay_everything": True}, "leave one out"),
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
