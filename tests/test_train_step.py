"""One step against numpy: its gradient, its guard, its averages, its dropout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from lm import tree
from lm.errors import UserError
from lm.evaluate import evaluate, to_devices
from lm.models.transformer import Transformer
from lm.optim import OptimConfig, make_optimizer, make_schedule
from lm.sharding import MeshConfig, make_mesh
from lm.tasks.causal_lm import CausalLM
from lm.train import TrainConfig, abstract_params, make_program

ROWS, LENGTH, V = 4, 10, 64
ONE = MeshConfig(devices=1)
SGD = OptimConfig(
    optimizer="sgd", peak_lr=0.5, schedule="constant", warmup=0, momentum=0.0, weight_decay=0.0, clip_norm=0.0
)
TASK = CausalLM(label_smoothing=0.1)


def build(optim: OptimConfig, model_changes=None, **train):
    model = Transformer(tiny.config(n_layers=1, **(model_changes or {})))
    mesh = make_mesh(ONE)
    schedule = make_schedule(optim, 10)
    tx = make_optimizer(optim, schedule, abstract_params(model, mesh)[0])
    config = TrainConfig(steps=10, batch_size=ROWS, **train)
    return model, schedule, make_program(model, TASK, tx, schedule, config, mesh)


def host(x):
    """A copy that outlives donation."""
    return jax.tree.map(np.array, x)


def step(program, state, batch):
    state, report = program.train_step(state, to_devices(batch, program.mesh))
    return state, host(report)


def norm(x) -> float:
    return float(np.sqrt(sum(np.sum(np.square(np.asarray(leaf, np.float64))) for leaf in jax.tree.leaves(x))))


def test_the_gradient_is_that_of_the_sum_over_the_weight():
    model, _, program = build(SGD)
    batch = tiny.packed_batch(ROWS, LENGTH, V)
    state = program.init()
    before = host(state.params)

    def mean(params):
        total, sums = TASK.loss(model, params, batch, None)
        return total / jnp.float32(batch["weights"].sum()), sums

    (_, sums), grads = jax.jit(jax.value_and_grad(mean, has_aux=True))(before)
    state, report = step(program, state, batch)
    moved = jax.tree.map(lambda a, b: (a - np.asarray(b)) / 0.5, before, state.params)
    tiny.assert_trees_close(moved, grads, 1e-4)
    np.testing.assert_allclose(report["grad_norm"], norm(grads), rtol=1e-5)
    np.testing.assert_allclose(report["param_norm"], norm(state.params), rtol=1e-5)
    np.testing.assert_allclose(report["weight"], batch["weights"].sum(), rtol=1e-6)
    np.testing.assert_allclose(report["loss"], sums["loss"], rtol=1e-5)
    assert report["objective"] != report["loss"]  # the smoothed one is what is minimised, the plain one reported
    assert (int(state.step), int(state.skipped), bool(report["finite"])) == (1, 0, True)


@pytest.fixture(scope="module")
def guarded():
    """AdamW with averages, warming up, so that every part of the state and the rate moves at each update."""
    return build(OptimConfig(peak_lr=1e-2, warmup=4, schedule="linear"), ema_decay=0.8)


def poisoned(batch):
    return batch | {"weights": np.where(np.arange(LENGTH) == 3, np.float32(np.inf), batch["weights"])}


def test_a_step_that_is_not_finite_changes_nothing_but_the_counts(guarded):
    _, schedule, program = guarded
    good, other = tiny.packed_batch(ROWS, LENGTH, V, seed=1), tiny.packed_batch(ROWS, LENGTH, V, seed=2)
    straight, _ = step(program, program.init(), good)
    straight, straight_report = step(program, straight, other)

    state, _ = step(program, program.init(), good)
    before = host(state)
    state, report = step(program, state, poisoned(other))
    assert not report["finite"]
    assert int(report["skipped"]) == 1
    assert not np.isfinite(report["objective"])
    after = host(state)
    tiny.assert_trees_equal((after.params, after.opt_state, after.ema), (before.params, before.opt_state, before.ema))
    assert (int(after.step), int(after.skipped)) == (2, 1)

    # The next update is the one that would have been made, at the rate it would have had.
    state, report = step(program, state, other)
    assert report["finite"]
    assert report["learning_rate"] == straight_report["learning_rate"] == schedule(1)
    for name in ("params", "opt_state", "ema"):
        tiny.assert_trees_equal(getattr(state, name), getattr(straight, name))
    assert (int(state.step), int(state.skipped)) == (3, 1)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_poisoned_parameters_are_never_averaged_nor_updated(guarded, value):
    _, _, program = guarded
    state = program.init()
    params = state.params | {"embed": {"embedding": state.params["embed"]["embedding"].at[:, 0].set(value)}}
    state = state.replace(params=params)
    before = host(state)
    state, report = step(program, state, tiny.packed_batch(ROWS, LENGTH, V))
    assert not report["finite"]
    tiny.assert_trees_equal((state.params, state.opt_state, state.ema), (before.params, before.opt_state, before.ema))


def test_a_batch_that_scores_nothing_is_no_poison(guarded):
    _, _, program = guarded
    batch = tiny.packed_batch(ROWS, LENGTH, V)
    _, report = step(program, program.init(), batch | {"weights": np.zeros_like(batch["weights"])})
    assert report["finite"]
    assert report["grad_norm"] == report["loss"] == report["weight"] == 0


def test_averages_are_exponential(guarded):
    _, _, program = guarded
    state = program.init()
    average = host(state.params)
    tiny.assert_trees_equal(state.ema, average)
    for seed in range(3):
        state, _ = step(program, state, tiny.packed_batch(ROWS, LENGTH, V, seed=seed))
        average = jax.tree.map(lambda a, p: 0.8 * a + 0.2 * np.asarray(p, np.float64), average, state.params)
    tiny.assert_trees_close(state.ema, average, 1e-6)
    assert norm(jax.tree.map(lambda a, p: a - p, average, host(state.params))) > 0.01


def test_averages_and_sums_are_float32_beside_parameters_in_bfloat16():
    """A thousandth of a parameter is lost in bfloat16's 8 bits; in averages and sums of gradients it must not be."""
    optim = OptimConfig(**{**vars(SGD), "momentum": 0.9})  # whose first trace is the gradient itself
    model, _, program = build(optim, {"param_dtype": "bfloat16"}, ema_decay=0.999, accumulate=ROWS)
    start = program.init()
    assert {x.dtype for x in jax.tree.leaves(start.params)} == {jnp.dtype("bfloat16")}
    away = start.replace(ema=jax.tree.map(lambda p: p.astype(jnp.float32) + 1, start.params))
    before = host(away)
    batch = tiny.packed_batch(ROWS, LENGTH, V)

    def share(changed, expected):
        """Of numbers that agree to float32's accuracy, all leaves together."""
        pairs = zip(jax.tree.leaves(changed), jax.tree.leaves(expected))
        close = [np.isclose(np.asarray(x, np.float64), y, rtol=1e-5, atol=1e-9).ravel() for x, y in pairs]
        return np.concatenate(close).mean()

    def part(params, row):
        return TASK.loss(model, params, row, None)[0]

    gradient = jax.jit(jax.grad(part))
    parts = [gradient(before.params, {key: x[row : row + 1] for key, x in batch.items()}) for row in range(ROWS)]
    assert {x.dtype for x in jax.tree.leaves(parts)} == {jnp.dtype("bfloat16")}
    total = jax.tree.map(lambda *xs: sum(np.asarray(x, np.float64) for x in xs) / batch["weights"].sum(), *parts)

    state, _ = step(program, away, batch)
    traces = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert {x.dtype for x in traces} == {jnp.dtype("float32")}
    # A bfloat16 of a part may fall to either side where it is computed in another program.
    assert share(traces, total) > 0.9
    moved = jax.tree.map(lambda old, new: old + 0.001 * (np.asarray(new, np.float64) - old), before.ema, state.params)
    assert {x.dtype for x in jax.tree.leaves(state.ema)} == {jnp.dtype("float32")}
    assert share(state.ema, moved) == 1
    assert share(state.ema, before.ema) < 0.01


def test_learning_rate_of_each_step_is_the_schedules(guarded):
    _, schedule, program = guarded
    state, rates = program.init(), []
    for _ in range(6):
        state, report = step(program, state, tiny.packed_batch(ROWS, LENGTH, V))
        rates.append(float(report["learning_rate"]))
    np.testing.assert_allclose(rates, [float(schedule(s)) for s in range(6)], rtol=1e-6)
    np.testing.assert_allclose(rates[:4], [2.5e-3, 5e-3, 7.5e-3, 1e-2], rtol=1e-6)


def test_dropout_is_of_the_seed_and_the_step():
    """On in training, new at every step, the same after a resume, off in evaluation."""
    still = OptimConfig(**{**vars(SGD), "peak_lr": 1e-30})
    _, _, program = build(still, {"residual_dropout": 0.2})
    batch = tiny.packed_batch(ROWS, LENGTH, V)

    def losses_from(first, steps):
        state = program.init().replace(step=jnp.int32(first))
        found = []
        for _ in range(steps):
            state, report = step(program, state, batch)
            found.append(float(report["loss"]))
        return found

    straight = losses_from(0, 4)
    assert len(set(straight)) == 4
    assert losses_from(0, 2) + losses_from(2, 2) == straight

    params = program.init().params
    one, two = (host(program.eval_step(params, to_devices(batch, program.mesh))) for _ in range(2))
    tiny.assert_trees_equal(one, two)
    plain = Transformer(tiny.config(n_layers=1))
    expected = jax.jit(lambda p: TASK.loss(plain, p, batch, None)[1]["loss"])(params)
    np.testing.assert_allclose(one["loss"], expected, rtol=1e-6)
    assert float(expected) not in straight


def test_evaluation_divides_once():
    """Batches of unequal weight: the mean over tokens, not the mean of the batches' means."""
    _, _, program = build(SGD)
    params = tiny.perturbed(program.init().params)
    batches = [tiny.packed_batch(ROWS, LENGTH, V, seed=seed) for seed in range(3)]
    batches[1]["weights"][1:] = 0
    seen = []
    result = evaluate(
        program.eval_step, params, batches, program.mesh, tokens_per_byte=0.25, on_batch=lambda done: seen.append(done)
    )
    sums = [host(program.eval_step(params, to_devices(batch, program.mesh))) for batch in batches]
    weight = sum(batch["weights"].astype(np.float64).sum() for batch in batches)
    loss = sum(float(s["loss"]) for s in sums) / weight
    assert seen == [1, 2, 3]
    np.testing.assert_allclose(result["loss"], loss, rtol=1e-6)
    np.testing.assert_allclose(result["perplexity"], np.exp(loss), rtol=1e-6)
    np.testing.assert_allclose(result["accuracy"], sum(float(s["correct"]) for s in sums) / weight, rtol=1e-6)
    np.testing.assert_allclose(result["bits_per_byte"], loss * 0.25 / np.log(2), rtol=1e-6)
    np.testing.assert_allclose(result["tokens"], weight, rtol=1e-6)
    assert abs(loss - np.mean([s["loss"] / s["weight"] for s in sums])) > 1e-4


def test_clipping_and_reported_norm():
    """The norm is that before clipping; the step is that after it."""
    clipped = OptimConfig(**{**vars(SGD), "clip_norm": 1e-3})
    _, _, program = build(clipped)
    state = program.init()
    before = host(state.params)
    state, report = step(program, state, tiny.packed_batch(ROWS, LENGTH, V))
    assert report["grad_norm"] > 0.1
    moved = jax.tree.map(lambda a, b: a.astype(np.float64) - np.asarray(b), before, state.params)
    np.testing.assert_allclose(norm(moved) / 0.5, 1e-3, rtol=1e-2)


def test_state_names_the_parameters_it_holds(guarded):
    _, _, program = guarded
    paths = [path for path, _ in tree.path_leaves(program.target)]
    params = [path for path, _ in tree.path_leaves(program.target.params)]
    for path in params:
        holders = [p for p in paths if p.endswith("/" + path)]
        assert len(holders) == 4, path  # parameter, two moments, average


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 1, "tokens": 5}, r"train.steps and train.tokens are both set"),
        ({"steps": 0}, "train.steps is 0"),
        ({"epochs": -1.0}, "train.epochs is -1.0"),
        ({"batch_size": 0}, "train.batch_size is 0"),
        ({"accumulate": 0}, "train.accumulate is 0"),
        ({"eval_every": -1}, "train.eval_every is -1"),
        ({"eval_batches": 0}, "train.eval_batches is 0"),
        ({"ema_decay": 1.0}, "train.ema_decay is 1.0"),
        ({"patience": 0}, "train.patience is 0"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(UserError, match=message):
        TrainConfig(**settings)


def test_length_of_a_run():
    per = {"tokens_per_step": 100, "steps_per_epoch": 7.5}
    assert TrainConfig(steps=3).total_steps(**per) == 3
    assert TrainConfig(tokens=201).total_steps(**per) == 3
    assert TrainConfig(epochs=2).total_steps(**per) == 15
    assert TrainConfig(epochs=0.1).total_steps(**per) == 1
    with pytest.raises(UserError, match="no length"):
        TrainConfig().total_steps(**per)
