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
    RULES,
    MeshConfig,
    batch_sharding,
    check_batch,
    constrain,
    make_mesh,
    partition_spec,
    shardings_like,
)
from lm.train import abstract_params


@pytest.mark.parametrize(
    ("settings", "shape"),
    [
        ({}, (8, 1, 1)),
        ({"fsdp": 4}, (2, 4, 1)),
        ({"tensor": 4}, (2, 1, 4)),
        ({"data": 1, "fsdp": -1, "tensor": 2}, (1, 4, 2)),
        ({"data": 2, "fsdp": 2, "tensor": 2}, (2, 2, 2)),
        ({"devices": 1}, (1, 1, 1)),
        ({"devices": 6, "tensor": 3}, (2, 1, 3)),
    ],
)
def test_mesh(settings, shape):
    mesh = make_mesh(MeshConfig(**settings))
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert mesh.devices.shape == shape


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fsdp": 3}, "mesh data -1, fsdp 3, tensor 1 does not fit 8 device"),
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
    check_batch(mesh, 8, 2)
    with pytest.raises(UserError, match=r"batch_size 12 is not a multiple of 8 \(mesh data x fsdp = 4"):
        check_batch(mesh, 12, 2)


SIZES = {"data": 2, "fsdp": 2, "tensor": 4}


@pytest.mark.parametrize(
    ("names", "shape", "spec"),
    [
        (("vocab", "embed"), (64, 32), ("tensor", "fsdp")),
        (("vocab", "embed"), (50257, 32), (None, "fsdp")),
        (("layers", "embed", "kv", "head_dim"), (2, 32, 2, 8), (None, "fsdp", None, None)),
        (("batch", "length", "activation_mlp"), (8, 5, 64), (("data", "fsdp"), None, "tensor")),
        (("batch", "length"), (6, 5), (None, None)),
        ((None, "no such axis"), (4, 4), (None, None)),
    ],
)
def test_an_axis_is_split_where_the_devices_divide_it(names, shape, spec):
    assert partition_spec(names, shape, SIZES) == PartitionSpec(*spec)


def test_axes_of_one_device_are_not_named():
    assert partition_spec(("vocab", "embed"), (64, 32), {"data": 8, "fsdp": 1, "tensor": 1}) == PartitionSpec(
        None, None
    )


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
    assert "layers" not in RULES


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
