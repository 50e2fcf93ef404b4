"""Meshes that fit, layouts that divide, and errors that say what would."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import PartitionSpec

from lm import tree
from lm.errors import UserError
from lm.models.transformer import Transformer
from lm.sharding import (
    MeshConfig,
    Rules,
    batch_sharding,
    check_batch,
    check_length,
    constrain,
    make_mesh,
    partition_spec,
    ruled,
    shardings_like,
)
from lm.train import abstract_params


@pytest.mark.parametrize(
    ("settings", "shape"),
    [
        ({}, (8, 1, 1, 1)),
        ({"fsdp": 4}, (2, 4, 1, 1)),
        ({"tensor": 4}, (2, 1, 1, 4)),
        ({"context": -1, "data": 2}, (2, 1, 4, 1)),
        ({"data": 1, "fsdp": -1, "tensor": 2}, (1, 4, 1, 2)),
        ({"data": 2, "fsdp": 2, "tensor": 2}, (2, 2, 1, 2)),
        ({"devices": 1}, (1, 1, 1, 1)),
        ({"devices": 6, "tensor": 3}, (2, 1, 1, 3)),
    ],
)
def test_mesh(settings, shape):
    mesh = make_mesh(MeshConfig(**settings))
    assert mesh.axis_names == ("data", "fsdp", "context", "tensor")
    assert mesh.devices.shape == shape


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fsdp": 3}, "mesh data -1, fsdp 3, context 1, tensor 1 does not fit 8 device"),
        ({"context": 3}, "context 3, tensor 1 does not fit 8 device"),
        ({"data": 2}, "does not fit 8 device"),
        ({"tensor": 16}, "does not fit 8 device"),
        ({"fsdp": -1}, "at most one is -1"),
        ({"tensor": 0}, "each axis is 1 or more"),
        ({"fsdp": -2}, "each axis is 1 or more"),
        ({"devices": 9}, "mesh.devices is 9; this machine has 8 cpu"),
        ({"devices": 0}, "mesh.devices is 0"),
    ],
)
def test_a_mesh_that_does_not_fit_is_told_in_one_line(settings, message):
    with pytest.raises(UserError, match=message) as error:
        make_mesh(MeshConfig(**settings))
    assert "\n" not in str(error.value)


def test_batch_must_divide():
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
    check_batch(mesh.shape, 8, 2)
    with pytest.raises(UserError, match=r"batch_size 12 is not a multiple of 8 \(mesh data x fsdp = 4"):
        check_batch(mesh.shape, 12, 2)


@pytest.mark.parametrize(("length", "causal", "unit"), [(12, True, 8), (6, False, 4)])
def test_length_must_divide(length, causal, unit):
    sizes = {"data": 1, "fsdp": 1, "context": 4, "tensor": 1}
    check_length(sizes, 8, causal, "a row (data.seq_len)")
    check_length(sizes | {"context": 1}, 7, causal, "a row (data.seq_len)")
    message = rf"a row \(data.seq_len\) has {length} tokens, not a multiple of {unit} \(mesh.context = 4"
    with pytest.raises(UserError, match=message):
        check_length(sizes, length, causal, "a row (data.seq_len)")


SIZES = {"data": 2, "fsdp": 2, "context": 2, "tensor": 4}


@pytest.mark.parametrize(
    ("names", "shape", "spec"),
    [
        (("vocab", "embed"), (64, 32), ("tensor", "fsdp")),
        (("vocab", "embed"), (50257, 32), (None, "fsdp")),
        (("layers", "embed", "kv", "head_dim"), (2, 32, 2, 8), (None, "fsdp", None, None)),
        (("batch", "length", "activation_mlp"), (8, 5, 64), (("data", "fsdp"), None, "tensor")),
        (("batch", "length"), (6, 6), ("data", "context")),
        (("batch", "length"), (7, 5), (None, None)),
        ((None, "no such axis"), (4, 4), (None, None)),
    ],
)
def test_an_axis_is_split_where_the_devices_divide_it(names, shape, spec):
    assert partition_spec(names, shape, SIZES) == PartitionSpec(*spec)


def test_axes_of_one_device_are_not_named():
    assert partition_spec(("vocab", "embed"), (64, 32), dict.fromkeys(SIZES, 1)) == PartitionSpec(None, None)


@pytest.mark.parametrize(
    ("rules", "names", "shape", "spec"),
    [
        ({"embed": ("fsdp", "tensor")}, ("embed", "mlp"), (32, 64), (("fsdp", "tensor"), None)),
        ({"embed": ("fsdp", "tensor")}, ("embed", "mlp"), (6, 64), ("fsdp", "tensor")),
        ({"mlp": ()}, ("embed", "mlp"), (32, 64), ("fsdp", None)),
        (
            {"residual_length": ("context", "tensor")},
            ("batch", "residual_length"),
            (8, 16),
            (None, ("context", "tensor")),
        ),
        ({"residual_length": ("context", "tensor")}, ("batch", "residual_length"), (8, 6), (None, "context")),
    ],
)
def test_rules_of_a_config(rules, names, shape, spec):
    """No axis of an array lies where one before it does, and each on as many devices as divide it."""
    wanted = PartitionSpec(*(("data", "fsdp") if name == "batch" else one for name, one in zip(names, spec)))
    rules = Rules(**rules)
    assert partition_spec(names, shape, SIZES, rules) == wanted
    assert ruled(lambda: partition_spec(names, shape, SIZES), rules)() == wanted
    assert partition_spec(("mlp",), (64,), SIZES) == PartitionSpec("tensor"), "rules hold inside alone"


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (
            {"embed": ("fsdp", "pipe")},
            "mesh.rules.embed is fsdp pipe; it is none or some of data, fsdp, context, tensor",
        ),
        ({"mlp": ("tensor", "tensor")}, "mesh.rules.mlp is tensor tensor; .*each once"),
        ({"residual_length": ()}, "mesh.rules.residual_length is empty, without context"),
    ],
)
def test_rules_that_mean_nothing(rules, message):
    with pytest.raises(UserError, match=message):
        Rules(**rules)


class FakeChip:
    """A TPU chip of one of several slices, as `jax.experimental.mesh_utils` reads it."""

    platform, device_kind, core_on_chip = "tpu", "TPU v4", 0

    def __init__(self, number, slices):
        self.id, self.slice_index, self.process_index = number, number % slices, 0
        self.coords = (number // slices % 2, number // slices // 2, 0)


def test_one_axis_runs_between_slices_and_all_others_within(monkeypatch):
    chips = [FakeChip(number, 2) for number in range(8)]
    for between, other in (("data", "fsdp"), ("fsdp", "data")):
        mesh = make_mesh(MeshConfig(**{"data": -1, between: 4, other: 2}, between_slices=between), chips)
        placed = mesh.devices[:, :, 0, 0] if between == "data" else mesh.devices[:, :, 0, 0].T
        for half, row in enumerate(placed):
            assert {chip.slice_index for chip in row} == {half // 2}
    with pytest.raises(UserError, match=r"mesh.fsdp is 1, and devices are of 2 slices .* make it a multiple of 2"):
        make_mesh(MeshConfig(data=8, between_slices="fsdp"), chips)


def test_constrain_acts_inside_a_mesh_only():
    x = np.ones((8, 4), np.float32)
    assert constrain(x, "batch", None) is x
    mesh = make_mesh(MeshConfig(fsdp=2))
    with jax.set_mesh(mesh):
        out = jax.jit(lambda x: constrain(x, "batch", None))(x)
    assert out.sharding.is_equivalent_to(batch_sharding(mesh), 2)
    assert out.addressable_shards[0].data.shape == (1, 4)


def test_every_large_parameter_is_split_by_fsdp_and_tensor():
    """And every logical name that is split means something in the table."""
    config = tiny.config(n_kv_heads=4, activation="swiglu", tie_embeddings=False, qk_norm=True)
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=4))
    params, shardings = abstract_params(Transformer(config), mesh)
    for (path, leaf), sharding in zip(tree.path_leaves(params), jax.tree.leaves(shardings), strict=True):
        part = np.prod(sharding.shard_shape(leaf.shape)) * 8
        if path == "position_embed/embedding":
            assert part == leaf.size * 4  # looked up whole: over fsdp only
        elif path.endswith(("kernel", "embedding")):
            assert part == leaf.size, path


def test_moments_lie_as_their_parameters_and_counters_everywhere():
    mesh = make_mesh(MeshConfig(fsdp=4, tensor=2))
    params, shardings = abstract_params(Transformer(tiny.config()), mesh)
    state = jax.eval_shape(optax.chain(optax.clip(1.0), optax.adamw(1e-3)).init, params)
    layout = dict(tree.path_leaves(shardings_like(state, params, shardings, mesh)))
    by_parameter = dict(tree.path_leaves(shardings))
    seen = 0
    for path, sharding in layout.items():
        of = [name for name in by_parameter if path.endswith("/" + name)]
        assert sharding.spec == (by_parameter[max(of, key=len)].spec if of else PartitionSpec()), path
        seen += bool(of)
    assert seen == 2 * len(by_parameter)


def test_a_leaf_of_another_shape_is_whole():
    """A factored moment has its parameter's name, not its shape."""
    mesh = make_mesh(MeshConfig(fsdp=8))
    params, shardings = abstract_params(Transformer(tiny.config()), mesh)
    factored = {"v_row": jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape[:1], jnp.float32), params)}
    for leaf in jax.tree.leaves(shardings_like(factored, {"x": params}, {"x": shardings}, mesh)):
        assert leaf.spec == PartitionSpec()
