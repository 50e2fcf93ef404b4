"""Meshes, and the one table that says which logical axis lies on which mesh axis."""

from dataclasses import dataclass
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lm import tree
from lm.errors import check

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# Logical axis -> mesh axes. Parameters are split over `fsdp` along their embed axis and over `tensor` along heads,
# feed-forward width or vocabulary; activations over the batch and, between the two products of a block, over `tensor`.
RULES: dict[str, str | tuple[str, ...]] = {
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv": "tensor",
    "mlp": "tensor",
    "batch": BATCH_AXES,
    "activation_heads": "tensor",
    "activation_kv": "tensor",
    "activation_mlp": "tensor",
}


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How devices are arranged; the product of the axes is the number of devices."""

    data: int = -1
    """Copies of the model, each on its part of the batch; -1 = as many as the other axes leave."""
    fsdp: int = 1
    """Devices that split parameters, gradients and optimizer state (ZeRO-3), and the batch; -1 = the rest."""
    tensor: int = 1
    """Devices that split heads, feed-forward width and vocabulary; -1 = the rest."""
    devices: int | None = None
    """Use only the first so many devices; None = all."""


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh with axes `data, fsdp, tensor` over `devices` (default: all of them).

    Raises:
      UserError: the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    if config.devices is not None:
        check(
            1 <= config.devices <= len(devices),
            f"mesh.devices is {config.devices}; this machine has {len(devices)} {devices[0].platform} device(s)",
        )
        devices = devices[: config.devices]
    sizes = [config.data, config.fsdp, config.tensor]
    shown = ", ".join(f"{axis} {size}" for axis, size in zip(MESH_AXES, sizes))
    check(
        sizes.count(-1) <= 1 and all(size == -1 or size >= 1 for size in sizes),
        f"mesh has {shown}; each axis is 1 or more, and at most one is -1 (the rest)",
    )
    known = 1
    for size in sizes:
        known *= size if size != -1 else 1
    rest = len(devices) // known
    filled = [rest if size == -1 else size for size in sizes]
    check(
        known * (rest if -1 in sizes else 1) == len(devices),
        f"mesh {shown} does not fit {len(devices)} device(s); make the product {len(devices)},"
        " set one axis to -1, or use fewer devices with mesh.devices",
    )
    return jax.make_mesh(filled, MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def partition_spec(names: tuple[str | None, ...], shape: tuple[int, ...], axis_sizes: dict[str, int]) -> PartitionSpec:
    """The layout of an array whose axes carry these logical names.

    An axis that its mesh axes do not divide (a vocabulary of 50,257, one key/value head) stays whole on each device.
    """
    spec: list[str | tuple[str, ...] | None] = []
    for name, size in zip(names, shape):
        axes = RULES.get(name) if name is not None else None
        parts = 1
        for axis in (axes,) if isinstance(axes, str) else axes or ():
            parts *= axis_sizes[axis]
        spec.append(axes if parts > 1 and size % parts == 0 else None)
    return PartitionSpec(*spec)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Constrains an activation's layout by logical axis names; does nothing outside `jax.set_mesh`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(names, x.shape, dict(mesh.shape)))


def is_split(name: str) -> bool:
    """Whether the current mesh (`jax.set_mesh`) spreads a logical axis over more than one device."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = RULES[name]
    return not mesh.empty and any(mesh.shape[axis] > 1 for axis in ((axes,) if isinstance(axes, str) else axes))


def parameter_shardings(boxed: Any, mesh: Mesh) -> Any:
    """Shardings of a parameter tree, from the logical names its (abstract) leaves carry as `nn.Partitioned` boxes."""

    def one(leaf: Any) -> NamedSharding:
        if isinstance(leaf, nn.Partitioned):
            return NamedSharding(mesh, partition_spec(leaf.names, leaf.value.shape, dict(mesh.shape)))
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree.map(one, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned))


def shardings_like(state: Any, params: Any, shardings: Any, mesh: Mesh) -> Any:
    """Shardings of a state that holds copies of a parameter tree somewhere inside: optimizer moments, averages.

    A leaf whose path ends with a parameter's path and has its shape lies as that parameter does; every other leaf
    (counters, factored moments) is whole on each device.
    """
    known = {
        path: (leaf.shape, sharding)
        for (path, leaf), sharding in zip(tree.path_leaves(params), jax.tree.leaves(shardings))
    }
    whole = NamedSharding(mesh, PartitionSpec())

    def one(path: jax.tree_util.KeyPath, leaf: Any) -> NamedSharding:
        names = tree.path_string(path).split("/")
        for start in range(len(names)):
            found = known.get("/".join(names[start:]))
            if found is not None and found[0] == leaf.shape:
                return found[1]
        return whole

    return jax.tree_util.tree_map_with_path(one, state)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The layout of every array of a batch: rows over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def process_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """The rows of a batch that lie on this process's devices, ascending: what it has to read."""
    parts = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return sorted({row for part in parts if part is not None for row in range(*part[0].indices(batch_size))})


def check_batch(mesh: Mesh, batch_size: int, accumulate: int = 1) -> None:
    """Raises UserError unless rows divide evenly over accumulation steps and devices."""
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    check(
        batch_size % (rows * accumulate) == 0,
        f"train.batch_size {batch_size} is not a multiple of {rows * accumulate}"
        f" (mesh data x fsdp = {rows}, train.accumulate = {accumulate}); change one of them",
    )
