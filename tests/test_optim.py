"""Schedules against closed forms; every rule against a float64 twin written from its paper, some against torch."""

import math
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm import tree
from lm.errors import UserError
from lm.optim import DECOUPLED, OptimConfig, decay_mask, make_optimizer, make_schedule

RULES = get_args(OptimConfig.__annotations__["optimizer"])
BFLOAT16_RULES = ("adamw", "adam", "sgd", "adadelta", "lion", "muon")
STEPS = 20

L, D, N, K, H, F, V, T = 3, 8, 4, 2, 6, 10, 12, 5
SHAPES = {
    "embed/embedding": (V, D),
    "positions/embedding": (T, D),
    "layers/attention_norm/scale": (L, D),
    "layers/attention_norm/bias": (L, D),
    "layers/attention/query/kernel": (L, D, N, H),
    "layers/attention/query/bias": (L, N, H),
    "layers/attention/key/kernel": (L, D, K, H),
    "layers/attention/key/bias": (L, K, H),
    "layers/attention/value/kernel": (L, D, K, H),
    "layers/attention/value/bias": (L, K, H),
    "layers/attention/out/kernel": (L, N, H, D),
    "layers/attention/out/bias": (L, D),
    "layers/attention/query_norm/scale": (L, H),
    "layers/attention/key_norm/scale": (L, H),
    "layers/mlp_norm/scale": (L, D),
    "layers/mlp/up/kernel": (L, D, F),
    "layers/mlp/up/bias": (L, F),
    "layers/mlp/gate/kernel": (L, D, F),
    "layers/mlp/down/kernel": (L, F, D),
    "layers/mlp/down/bias": (L, D),
    "final_norm/scale": (D,),
    "head/kernel": (D, V),
}
# One leaf of each kind, where every leaf would only be compiled again.
KINDS = (
    "embed/embedding",
    "layers/attention_norm/scale",
    "layers/attention/query/kernel",
    "layers/attention/query/bias",
    "layers/attention/out/kernel",
    "layers/mlp/down/kernel",
    "head/kernel",
)
FEW = {path: SHAPES[path] for path in KINDS}
MUON_LEAVES = {
    "layers/attention/query/kernel",
    "layers/attention/key/kernel",
    "layers/attention/value/kernel",
    "layers/attention/out/kernel",
    "layers/mlp/up/kernel",
    "layers/mlp/gate/kernel",
    "layers/mlp/down/kernel",
}
DECAYED_LEAVES = MUON_LEAVES | {"head/kernel"}


def nest(flat):
    nested = {}
    for path, value in flat.items():
        *parents, name = path.split("/")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return nested


def flatten(nested):
    return {path: np.asarray(leaf, np.float64) for path, leaf in tree.path_leaves(nested)}


def random_tree(seed, shapes=FEW, scale=1.0):
    rng = np.random.default_rng(seed)
    return nest({path: jnp.asarray(scale * rng.normal(size=shape), jnp.float32) for path, shape in shapes.items()})


def random_grads(shapes=FEW, steps=STEPS):
    """Gradients of very different sizes, so that epsilon and clipping matter."""
    return [random_tree(100 + step, shapes, scale=10.0 ** (step % 5 - 3)) for step in range(steps)]


def jit(function):
    """Jitted with little optimisation: these graphs run a few times, so their compilation is what takes time."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def settings(optimizer, **changes):
    """A configuration with clipping off and the decay its rule can have."""
    base = {"weight_decay": 0.1 if optimizer in DECOUPLED else 0.0, "clip_norm": 0.0, "peak_lr": 0.02}
    return OptimConfig(**{"optimizer": optimizer, **base, **changes})


def train(config, params, grads, total_steps=STEPS):
    """The parameters after each update."""
    tx = make_optimizer(config, make_schedule(config, total_steps), params)
    state = tx.init(params)

    @jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    history = []
    for grad in grads:
        params, state = step(params, state, grad)
        history.append(params)
    return history


# Schedules.


def closed_form(config, total, warmup, decay, step):
    peak, final = config.peak_lr, config.peak_lr * config.final_lr_fraction
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min((step - warmup) / max(total - warmup, 1), 1)
    match config.schedule:
        case "constant":
            return peak
        case "linear":
            return peak + (final - peak) * progress
        case "cosine":
            return final + (peak - final) * (1 + math.cos(math.pi * progress)) / 2
        case "inverse_sqrt":
            return peak * math.sqrt(max(warmup, 1) / (step + 1))
        case "wsd":
            into_decay = min(max(step - (total - decay), 0), decay)
            return peak + (final - peak) * (into_decay / decay if decay else 0)


@pytest.mark.parametrize("schedule", get_args(OptimConfig.__annotations__["schedule"]))
@pytest.mark.parametrize(
    ("total", "warmup", "decay", "warmup_steps", "decay_steps"),
    [
        (200, 0.1, 0.2, 20, 40),
        (200, 30, 50, 30, 50),
        (200, 0, 0.2, 0, 40),
        (200, 1, 1, 1, 1),
        (200, 0.004, 0.25, 1, 50),
        (10, 4, 6, 4, 6),
        (10, 2, 0, 2, 0),
        (10, 0, 10, 0, 10),
        (10, 10, 0, 10, 0),
        (1, 0.01, 0, 0, 0),
        (1, 1, 0, 1, 0),
    ],
)
def test_schedule_is_its_closed_form_at_every_step(schedule, total, warmup, decay, warmup_steps, decay_steps):
    config = OptimConfig(schedule=schedule, warmup=warmup, decay=decay, peak_lr=3e-3)
    got = jax.jit(jax.vmap(make_schedule(config, total)))(jnp.arange(total + 5))
    expected = [closed_form(config, total, warmup_steps, decay_steps, step) for step in range(total + 5)]
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=2e-6)


@pytest.mark.parametrize("schedule", get_args(OptimConfig.__annotations__["schedule"]))
@pytest.mark.parametrize("warmup", [0, 1, 10])
def test_no_update_of_a_run_has_rate_zero(schedule, warmup):
    rate = make_schedule(OptimConfig(schedule=schedule, warmup=warmup, final_lr_fraction=0.0), 50)
    assert all(float(rate(step)) > 0 for step in range(50))
    if schedule in ("linear", "cosine", "wsd"):
        assert float(rate(50)) == pytest.approx(0, abs=1e-10)


def test_a_python_step_gives_a_float32_scalar():
    for schedule in ("constant", "cosine"):
        for warmup in (0, 3):
            rate = make_schedule(OptimConfig(schedule=schedule, warmup=warmup), 10)(0)
            assert (rate.dtype, rate.shape, rate.weak_type) == (jnp.float32, (), False)


@pytest.mark.parametrize(
    ("changes", "total", "words"),
    [
        ({}, 0, ("0 steps", "longer")),
        ({"warmup": -0.1}, 10, ("optim.warmup -0.1", "[0, 1)")),
        ({"warmup": math.nan}, 10, ("optim.warmup nan",)),
        ({"warmup": math.inf}, 10, ("optim.warmup inf",)),
        ({"warmup": 1.5}, 10, ("optim.warmup 1.5", "whole number")),
        ({"warmup": 11}, 10, ("optim.warmup of 11 steps", "at most 10")),
        ({"schedule": "wsd", "decay": 12}, 10, ("optim.decay of 12 steps",)),
        ({"schedule": "wsd", "warmup": 0.5, "decay": 0.7}, 10, ("optim.warmup 5 + optim.decay 7", "10 steps")),
        ({"schedule": "wsd", "decay": -1}, 10, ("optim.decay -1",)),
        ({"schedule": "step"}, 10, ("optim.schedule 'step'", "constant, linear, cosine, inverse_sqrt, wsd")),
        ({"peak_lr": 0.0}, 10, ("optim.peak_lr 0.0", "above 0")),
        ({"peak_lr": math.nan}, 10, ("optim.peak_lr nan",)),
        ({"final_lr_fraction": 1.1}, 10, ("optim.final_lr_fraction 1.1", "at most 1")),
    ],
)
def test_bad_schedules_are_user_errors(changes, total, words):
    with pytest.raises(UserError) as error:
        make_schedule(OptimConfig(**changes), total)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)


def test_a_decay_that_wsd_alone_reads_is_not_checked_elsewhere():
    make_schedule(OptimConfig(schedule="cosine", warmup=0.5, decay=0.9), 10)


# Rules, each against its paper's equations in float64. A twin takes one parameter p, its gradient g, its slots (zero at
# first), the update's number t (from 1), the rate and whether the parameter is decayed; it returns the new p.


def adamw_twin(c, p, g, slots, t, lr, path):
    """Loshchilov & Hutter, https://arxiv.org/abs/1711.05101, algorithm 2, with decay lr * wd."""
    m = slots["m"] = c.beta1 * slots.get("m", 0) + (1 - c.beta1) * g
    v = slots["v"] = c.beta2 * slots.get("v", 0) + (1 - c.beta2) * g**2
    m_hat, v_hat = m / (1 - c.beta1**t), v / (1 - c.beta2**t)
    return p - lr * (m_hat / (np.sqrt(v_hat) + c.epsilon) + c.weight_decay * (path in DECAYED_LEAVES) * p)


def sgd_twin(c, p, g, slots, t, lr, path):
    """Heavy ball: b = momentum * b + g."""
    b = slots["b"] = c.momentum * slots.get("b", 0) + g
    return p - lr * b


def adagrad_twin(c, p, g, slots, t, lr, path):
    """Duchi et al., https://jmlr.org/papers/v12/duchi11a.html, diagonal; epsilon inside the root."""
    s = slots["s"] = slots.get("s", 0) + g**2
    return p - lr * g / np.sqrt(s + c.epsilon)


def adadelta_twin(c, p, g, slots, t, lr, path):
    """Zeiler, https://arxiv.org/abs/1212.5701, algorithm 1; rho is beta2."""
    e_g = slots["e_g"] = c.beta2 * slots.get("e_g", 0) + (1 - c.beta2) * g**2
    u = np.sqrt(slots.get("e_x", 0) + c.epsilon) / np.sqrt(e_g + c.epsilon) * g
    slots["e_x"] = c.beta2 * slots.get("e_x", 0) + (1 - c.beta2) * u**2
    return p - lr * u


def lion_twin(c, p, g, slots, t, lr, path):
    """Chen et al., https://arxiv.org/abs/2302.06675, algorithm 2."""
    m = slots.get("m", 0)
    slots["m"] = c.beta2 * m + (1 - c.beta2) * g
    return p - lr * (np.sign(c.beta1 * m + (1 - c.beta1) * g) + c.weight_decay * (path in DECAYED_LEAVES) * p)


def adafactor_twin(c, p, g, slots, t, lr, path):
    """Shazeer & Stern, https://arxiv.org/abs/1804.04235, algorithms 4 and 5, decay 1 - t^-0.8, no momentum."""
    beta = 1 - t**-0.8
    squares = g**2 + 1e-30
    column, row = np.argsort(p.shape)[-2:] if p.ndim > 1 else (0, 0)
    if p.ndim > 1 and p.shape[column] >= 128:
        r = slots["r"] = beta * slots.get("r", 0) + (1 - beta) * squares.mean(row, keepdims=True)
        k = slots["k"] = beta * slots.get("k", 0) + (1 - beta) * squares.mean(column, keepdims=True)
        v = r * k / r.mean(column, keepdims=True)
    else:
        v = slots["v"] = beta * slots.get("v", 0) + (1 - beta) * squares
    u = g / np.sqrt(v)
    u = u / max(1.0, np.sqrt((u**2).mean()))
    rms = max(1e-3, np.sqrt((p**2).mean()))
    return p - lr * (rms * u + c.weight_decay * (path in DECAYED_LEAVES) * p)


def newton_schulz_twin(x, steps):
    """Jordan, https://kellerjordan.github.io/posts/muon: quintic iteration towards the nearest orthogonal matrix."""
    if x.shape[0] > x.shape[1]:
        return newton_schulz_twin(x.T, steps).T
    x = x / (np.linalg.norm(x) + 1e-8)
    for _ in range(steps):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


def muon_twin(c, p, g, slots, t, lr, path):
    """Muon with optax's bias-corrected Nesterov momentum and the scale of https://arxiv.org/abs/2502.16982."""
    if path not in MUON_LEAVES:
        return adamw_twin(c, p, g, slots, t, lr * c.muon_adam_lr_fraction, path)
    b = c.muon_momentum
    m = slots["m"] = b * slots.get("m", 0) + (1 - b) * g
    m = b * m / (1 - b ** (t + 1)) + (1 - b) * g / (1 - b**t)
    inputs = N * H if "attention/out" in path else p.shape[1]
    matrices = m.reshape(L, inputs, -1)
    outputs = matrices.shape[2]
    scale = c.muon_rms * math.sqrt(max(inputs, outputs)) if c.muon_rms else math.sqrt(max(1, outputs / inputs))
    u = scale * np.stack([newton_schulz_twin(matrix, c.muon_steps) for matrix in matrices]).reshape(p.shape)
    return p - lr * (u + c.weight_decay * (path in DECAYED_LEAVES) * p)


@pytest.mark.parametrize(
    ("twin", "config", "shapes"),
    [
        (adamw_twin, settings("adamw"), FEW),
        (adamw_twin, settings("adam", beta1=0.8, beta2=0.999, epsilon=1e-3), FEW),
        (sgd_twin, settings("sgd"), FEW),
        (sgd_twin, settings("sgd", momentum=0.0), FEW),
        (adagrad_twin, settings("adagrad", epsilon=1e-6), FEW),
        (adadelta_twin, settings("adadelta", epsilon=1e-6, peak_lr=1.0), FEW),
        (lion_twin, settings("lion", beta2=0.99), FEW),
        (adafactor_twin, settings("adafactor"), FEW),
        (adafactor_twin, settings("adafactor"), {"layers/mlp/up/kernel": (2, 128, 130), "final_norm/scale": (128,)}),
        (muon_twin, settings("muon"), FEW),
        (muon_twin, settings("muon", muon_rms=0.0, muon_steps=3, muon_adam_lr_fraction=0.1), FEW),
    ],
    ids=lambda value: value.optimizer if isinstance(value, OptimConfig) else None,
)
def test_rule_follows_its_paper(twin, config, shapes):
    params, grads = random_tree(0, shapes), random_grads(shapes)
    expected, slots = flatten(params), {path: {} for path in shapes}
    for t, (got, grad) in enumerate(zip(train(config, params, grads), grads, strict=True), start=1):
        lr = closed_form(config, STEPS, 0, 0, t - 1)
        for path, g in flatten(grad).items():
            expected[path] = twin(config, expected[path], g, slots[path], t, lr, path)
        for path, value in flatten(got).items():
            # Muon's iteration amplifies rounding of small singular values.
            tolerance = 2e-4 if config.optimizer == "muon" else 2e-5
            np.testing.assert_allclose(value, expected[path], rtol=tolerance, atol=tolerance, err_msg=f"{path}, {t}")


@pytest.mark.parity
@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd", "adagrad", "adadelta"])
def test_rule_is_torchs(optimizer):
    """With warmup and cosine through LambdaLR, clipping, and torch's own weight decay (L2 but for AdamW)."""
    torch = pytest.importorskip("torch")
    decay = {"weight_decay": 0.1} if optimizer == "adamw" else {"l2": 0.1}
    # torch adds Adagrad's epsilon outside the root, optax inside: only a tiny one means the same.
    eps = 1e-20 if optimizer == "adagrad" else 1e-6
    # Clipping comes after the penalty here and before it in torch: both at once would differ.
    clip = 1.0 if optimizer == "adamw" else 0.0
    config = settings(optimizer, warmup=5, clip_norm=clip, **decay, **({} if optimizer == "sgd" else {"epsilon": eps}))
    params, grads = random_tree(0), random_grads()

    tensors = {path: torch.tensor(value, requires_grad=True) for path, value in flatten(params).items()}
    groups = [
        {"params": [x for path, x in tensors.items() if path in DECAYED_LEAVES], "weight_decay": 0.1},
        {"params": [x for path, x in tensors.items() if path not in DECAYED_LEAVES], "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    theirs = {
        "adamw": lambda: torch.optim.AdamW(groups, lr=config.peak_lr, betas=betas, eps=eps),
        "adam": lambda: torch.optim.Adam(groups, lr=config.peak_lr, betas=betas, eps=eps),
        "sgd": lambda: torch.optim.SGD(groups, lr=config.peak_lr, momentum=config.momentum),
        "adagrad": lambda: torch.optim.Adagrad(groups, lr=config.peak_lr, eps=eps),
        "adadelta": lambda: torch.optim.Adadelta(groups, lr=config.peak_lr, rho=config.beta2, eps=eps),
    }[optimizer]()
    rate = torch.optim.lr_scheduler.LambdaLR(
        theirs, lambda step: closed_form(config, STEPS, 5, 0, step) / config.peak_lr
    )
    for grad, got in zip(grads, train(config, params, grads), strict=True):
        for path, g in flatten(grad).items():
            tensors[path].grad = torch.tensor(g)
        if clip:
            torch.nn.utils.clip_grad_norm_(tensors.values(), clip)
        theirs.step()
        rate.step()
        for path, value in flatten(got).items():
            np.testing.assert_allclose(value, tensors[path].detach().numpy(), rtol=2e-5, atol=2e-5, err_msg=path)


# What surrounds the rule.


@pytest.mark.parametrize(
    ("optimizer", "setting", "everything"),
    [
        *((rule, "weight_decay", False) for rule in DECOUPLED),
        ("sgd", "l1", False),
        ("adam", "l2", False),
        ("lion", "weight_decay", True),
        ("sgd", "l2", True),
    ],
)
def test_which_leaves_are_decayed(optimizer, setting, everything):
    """With a zero gradient only decay and penalties move a parameter."""
    changes = {"weight_decay": 0.0, setting: 0.1}
    config = settings(optimizer, decay_everything=everything, schedule="constant", warmup=0, **changes)
    params = random_tree(0, SHAPES)
    mask = dict(tree.path_leaves(decay_mask(config, params)))
    after = flatten(train(config, params, [jax.tree.map(jnp.zeros_like, params)])[0])
    for path, before in flatten(params).items():
        assert mask[path] == (everything or path in DECAYED_LEAVES)
        if not mask[path]:
            np.testing.assert_array_equal(after[path], before, err_msg=path)
        elif setting == "weight_decay":
            np.testing.assert_allclose(after[path], before * (1 - 0.02 * 0.1), rtol=1e-6, err_msg=path)
        else:
            assert np.all(after[path] != before), path


def test_penalties_are_added_before_clipping():
    config = settings(
        "sgd", momentum=0.0, l1=0.3, l2=0.2, clip_norm=1.0, peak_lr=1.0, schedule="constant", decay_everything=True
    )
    params, grad = random_tree(0), random_tree(1)
    gradient = {path: flatten(grad)[path] + 0.3 * np.sign(p) + 0.2 * p for path, p in flatten(params).items()}
    norm = math.sqrt(sum((g**2).sum() for g in gradient.values()))
    assert norm > 1
    for path, value in flatten(train(config, params, [grad])[0]).items():
        np.testing.assert_allclose(value, flatten(params)[path] - gradient[path] / norm, atol=1e-6)


@pytest.mark.parametrize("clip_norm", [0.0, 1e6])
def test_small_gradients_are_not_clipped(clip_norm):
    config = settings("sgd", momentum=0.0, clip_norm=clip_norm, peak_lr=1.0, schedule="constant")
    params, grad = random_tree(0), random_tree(1)
    for path, value in flatten(train(config, params, [grad])[0]).items():
        np.testing.assert_allclose(value, flatten(params)[path] - flatten(grad)[path], atol=1e-6)


def test_muon_takes_the_matrices_of_the_layers_and_adam_the_rest():
    params = random_tree(0, SHAPES)
    state = jax.eval_shape(make_optimizer(settings("muon"), optax.constant_schedule(1.0), params).init, params)
    owners = {path: set() for path in SHAPES}
    for path, _ in tree.path_leaves(state):
        for name in SHAPES:
            if path.endswith("/" + name):
                owners[name].add("muon" if "inner_states/muon" in path else "adam")
    assert owners == {path: {"muon" if path in MUON_LEAVES else "adam"} for path in SHAPES}


def test_stacked_layers_move_as_single_ones_under_muon():
    shapes = {path: shape for path, shape in FEW.items() if path in MUON_LEAVES}
    params, grads, config = random_tree(0, shapes), random_grads(shapes, 2), settings("muon")
    stacked = flatten(train(config, params, grads)[-1])
    last, *last_grads = (jax.tree.map(lambda x: x[-1], values) for values in (params, *grads))
    for path, value in flatten(train(config, last, last_grads)[-1]).items():
        np.testing.assert_allclose(stacked[path][-1], value, rtol=1e-4, atol=2e-5, err_msg=path)


def test_muon_makes_each_layers_matrix_nearly_orthogonal():
    config = settings("muon", muon_rms=0.0, weight_decay=0.0, peak_lr=1.0, schedule="constant", warmup=0)
    params = random_tree(0)
    after = train(config, params, [random_tree(1)])[0]
    update = flatten(jax.tree.map(lambda new, old: new - old, after, params))
    for matrix in update["layers/attention/query/kernel"].reshape(L, D, N * H):
        singular = np.linalg.svd(matrix, compute_uv=False) / math.sqrt(N * H / D)
        assert np.all((singular > 0.5) & (singular < 1.5)), singular


# The state.


@pytest.mark.parametrize("optimizer", RULES)
def test_moments_have_their_parameters_paths_and_a_stable_layout(optimizer):
    """Shardings are found by path suffix and equal shape, so every leaf of a parameter's shape must end as it does."""
    params = random_tree(0, SHAPES)
    config = settings(optimizer)
    tx = make_optimizer(config, make_schedule(config, 10), jax.eval_shape(lambda: params))
    state = jax.eval_shape(tx.init, params)
    moments = dict.fromkeys(SHAPES, 0)
    for path, leaf in tree.path_leaves(state):
        owner = next((name for name in SHAPES if path.endswith("/" + name)), None)
        if owner is None:
            # Counters, and Muon's three coefficients.
            assert leaf.shape in ((), (3,)), path
        else:
            # Adafactor keeps placeholders of one element beside moments that are not factored.
            assert leaf.shape == SHAPES[owner] or (optimizer == "adafactor" and leaf.shape == (1,)), path
            moments[owner] += leaf.shape == SHAPES[owner]
    counts = {"adamw": 2, "adam": 2, "sgd": 1, "adagrad": 1, "adadelta": 2, "adafactor": 1, "lion": 1}
    for path, count in moments.items():
        assert count == (counts[optimizer] if optimizer != "muon" else 1 if path in MUON_LEAVES else 2), path

    # The layout of the state neither changes in an update nor with settings that a resumed run may change.
    _, updated = jax.eval_shape(tx.update, params, state, params)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), updated) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    other = settings(optimizer, clip_norm=1.0, l1=0.1, l2=0.1, weight_decay=0.0, decay_everything=True)
    other_state = jax.eval_shape(make_optimizer(other, optax.constant_schedule(1.0), params).init, params)
    assert [path for path, _ in tree.path_leaves(other_state)] == [path for path, _ in tree.path_leaves(state)]


@pytest.mark.parametrize("optimizer", BFLOAT16_RULES)
def test_bfloat16_moments_are_half_as_large_and_nearly_as_good(optimizer):
    shapes = {path: SHAPES[path] for path in ("layers/attention/query/kernel", "final_norm/scale")}
    params = random_tree(0, shapes)
    # A quadratic with its minimum at `target`: rounding must not keep the parameters from getting there.
    target = random_tree(1, shapes)

    def final_parameters(moment_dtype):
        config = settings(optimizer, moment_dtype=moment_dtype, weight_decay=0.0, warmup=10, peak_lr=0.05)
        tx = make_optimizer(config, make_schedule(config, 100), params)

        def step(carry, _):
            params, state = carry
            grads = jax.tree.map(lambda p, t: p - t, params, target)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), length=100)[0])(params)

    def distance(a, b):
        return float(optax.tree.norm(optax.tree.sub(a, b)))

    wide, wide_state = final_parameters("float32")
    narrow, narrow_state = final_parameters("bfloat16")
    for (path, leaf), full in zip(tree.path_leaves(narrow_state), jax.tree.leaves(wide_state), strict=True):
        is_moment = path.endswith(tuple("/" + name for name in SHAPES))
        assert leaf.dtype == (jnp.bfloat16 if is_moment else full.dtype), path
        assert full.dtype == (jnp.int32 if path.endswith("count") else jnp.float32), path
    assert distance(narrow, wide) < 0.03 * distance(wide, params)


@pytest.mark.parametrize("optimizer", RULES)
def test_bfloat16_parameters_have_float32_moments_and_updates(optimizer):
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_tree(0))
    tx = make_optimizer(settings(optimizer), optax.constant_schedule(0.1), params)
    state = jax.eval_shape(tx.init, params)
    updates, _ = jax.eval_shape(tx.update, params, state, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} <= {jnp.dtype("float32"), jnp.dtype("int32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype("float32")}


# Mistakes.


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optimizer": "adamax"}, ("optim.optimizer 'adamax'", "adamw, adam, sgd")),
        (
            {"optimizer": "sgd", "weight_decay": 0.1},
            ("optim.weight_decay 0.1 with sgd", "adamw, adafactor, lion, muon", "l2"),
        ),
        ({"optimizer": "adam", "weight_decay": 0.1}, ("optim.weight_decay 0.1 with adam",)),
        ({"beta1": 1.0}, ("optim.beta1 1.0", "below 1")),
        ({"beta2": -0.1}, ("optim.beta2 -0.1",)),
        ({"momentum": 1.5}, ("optim.momentum 1.5",)),
        ({"epsilon": 0.0}, ("optim.epsilon 0.0", "above 0")),
        ({"weight_decay": -0.1}, ("optim.weight_decay -0.1", "at least 0")),
        ({"weight_decay": math.nan}, ("optim.weight_decay nan",)),
        ({"clip_norm": -1.0}, ("optim.clip_norm -1.0",)),
        ({"l1": math.inf}, ("optim.l1 inf",)),
        ({"muon_steps": 0}, ("optim.muon_steps 0",)),
        ({"muon_adam_lr_fraction": 0.0}, ("optim.muon_adam_lr_fraction 0.0",)),
        ({"moment_dtype": "float16"}, ("optim.moment_dtype 'float16'", "float32, bfloat16")),
        ({"moment_dtype": "bfloat16", "beta2": 0.999}, ("optim.beta2 0.999", "0.996")),
        (
            {"moment_dtype": "bfloat16", "optimizer": "adagrad", "weight_decay": 0.0},
            ("optim.moment_dtype bfloat16 with adagrad",),
        ),
        ({"moment_dtype": "bfloat16", "optimizer": "adafactor"}, ("optim.moment_dtype bfloat16 with adafactor",)),
    ],
)
def test_bad_optimizers_are_user_errors(changes, words):
    with pytest.raises(UserError) as error:
        make_optimizer(OptimConfig(**changes), optax.constant_schedule(1.0), random_tree(0))
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)


NUDGED = {
    **{"beta1": 0.5, "beta2": 0.5, "epsilon": 1e-2, "momentum": 0.5},
    **{"muon_momentum": 0.5, "muon_steps": 2, "muon_rms": 0.5, "muon_adam_lr_fraction": 0.5},
}


@pytest.mark.parametrize("optimizer", RULES)
def test_a_setting_is_read_by_its_rule_or_refused(optimizer):
    """Whichever is accepted changes an update; the others are listed here from the rules' papers."""
    params, grads = random_tree(0, FEW), random_grads(FEW, 2)

    def after(**changes):
        tx = make_optimizer(settings(optimizer, **changes), optax.constant_schedule(0.1), params)

        def run(p):
            state = tx.init(p)
            for g in grads:
                updates, state = tx.update(g, state, p)
                p = optax.apply_updates(p, updates)
            return p

        return flatten(jit(run)(params))

    reads = {
        "adamw": {"beta1", "beta2", "epsilon"},
        "adam": {"beta1", "beta2", "epsilon"},
        "sgd": {"momentum"},
        "adagrad": {"epsilon"},
        "adadelta": {"beta2", "epsilon"},
        "adafactor": set(),
        "lion": {"beta1", "beta2"},
        "muon": set(NUDGED) - {"momentum"},
    }[optimizer]
    before = after()
    for name, value in NUDGED.items():
        if name in reads:
            changed = after(**{name: value})
            assert any((changed[path] != before[path]).any() for path in FEW), name
        else:
            with pytest.raises(UserError, match=f"optim.{name} {value} with {optimizer}, .* only .* read"):
                after(**{name: value})


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_parameter_no_pattern_knows_is_named(optimizer):
    params = random_tree(0, {**FEW, "layers/mlp/router/weights": (L, D, 2)})
    with pytest.raises(UserError, match="layers/mlp/router/weights"):
        make_optimizer(OptimConfig(optimizer=optimizer), optax.constant_schedule(1.0), params)
