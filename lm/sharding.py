"""Meshes, and the one table that says which logical axis lies on which mesh axis."""

import contextlib
import contextvars
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, ParamSpec, TypeVar

import jax
from flax import linen as nn
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lm import tree
from lm.errors import check

Axis = Literal["data", "fsdp", "context", "tensor"]
MESH_AXES: tuple[str, ...] = ("data", "fsdp", "context", "tensor")
BATCH_AXES = ("data", "fsdp")
LENGTH_AXIS = "context"
# These are not for choice: whoever reads the batch, and attention over a split length, count on them.
_FIXED: dict[str, tuple[str, ...]] = {"batch": BATCH_AXES, "length": (LENGTH_AXIS,)}

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Over which mesh axes each logical axis of an array is spread; those that don't divide it are left out.

    Parameters are split over `fsdp` along their embed axis and over `tensor` along heads, feed-forward width or
    vocabulary. Of the axes of one array, none lies on a mesh axis that an earlier one took.
    """

    vocab: tuple[Axis, ...] = ("tensor",)
    """Rows of the embedding and columns of the output head."""
    embed: tuple[Axis, ...] = ("fsdp",)
    """The side of a parameter that meets the residual stream."""
    heads: tuple[Axis, ...] = ("tensor",)
    """Heads of query and output projections."""
    kv: tuple[Axis, ...] = ("tensor",)
    """Key/value heads of their projections."""
    mlp: tuple[Axis, ...] = ("tensor",)
    """Feed-forward width of its projections."""
    activation_heads: tuple[Axis, ...] = ("tensor",)
    """Heads of queries."""
    activation_kv: tuple[Axis, ...] = ("tensor",)
    """Heads of keys and values."""
    activation_mlp: tuple[Axis, ...] = ("tensor",)
    """Feed-forward width, between its products."""
    activation_embed: tuple[Axis, ...] = ()
    """Features of the residual stream between blocks."""
    residual_length: tuple[Axis, ...] = ("context",)
    """Tokens of the residual stream between blocks. `context tensor` splits norms and what is kept of the stream over
    `tensor` too (sequence parallelism, arXiv:2205.05198)."""

    def __post_init__(self) -> None:
        """Checks what can be told without devices."""
        for name, axes in dataclasses.asdict(self).items():
            unknown = [axis for axis in axes if axis not in MESH_AXES]
            check(
                not unknown and len(set(axes)) == len(axes),
                f"mesh.rules.{name} is {' '.join(axes)}; it is none or some of {', '.join(MESH_AXES)}, each once",
            )
        check(
            LENGTH_AXIS in self.residual_length,
            f"mesh.rules.residual_length is {' '.join(self.residual_length) or 'empty'}, without {LENGTH_AXIS}, over"
            f" which attention splits the length; give {LENGTH_AXIS}, or {LENGTH_AXIS} tensor",
        )

    def axes(self, name: str | None) -> tuple[str, ...]:
        """The mesh axes of a logical axis; none of one that isn't in the table."""
        if name in _FIXED:
            return _FIXED[name]
        found: tuple[str, ...] = getattr(self, name, ()) if name is not None else ()
        return found


DEFAULT_RULES = Rules()
_rules: contextvars.ContextVar[Rules] = contextvars.ContextVar("rules", default=DEFAULT_RULES)


@contextlib.contextmanager
def _using(rules: Rules) -> Iterator[None]:
    before = _rules.set(rules)
    try:
        yield
    finally:
        _rules.reset(before)


def ruled(function: Callable[P, T], rules: Rules) -> Callable[P, T]:
    """The function with other rules than the default for `constrain`, whoever traces it."""

    @functools.wraps(function)
    def inside(*args: P.args, **kwargs: P.kwargs) -> T:
        with _using(rules):
            return function(*args, **kwargs)

    return inside


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How devices are arranged; the product of the axes is the number of devices."""

    data: int = -1
    """Copies of the model, each on its part of the batch; -1 = as many as the other axes leave."""
    fsdp: int = 1
    """Devices that split parameters, gradients and optimizer state (ZeRO-3), and the batch; -1 = the rest."""
    context: int = 1
    """Devices that split the tokens of each row, for long ones: every device has the keys of all while it attends
    (arXiv:2407.21783, section 3.3.2); -1 = the rest."""
    tensor: int = 1
    """Devices that split heads, feed-forward width and vocabulary; -1 = the rest."""
    devices: int | None = None
    """Use only the first so many devices; None = all."""
    between_slices: Literal["data", "fsdp"] = "data"
    """The axis that runs between TPU slices, where devices are of several: a multiple of their number. All other axes
    stay within a slice, whose links are faster."""
    rules: Rules = field(default_factory=Rules)
    """Which logical axes lie on which mesh axes."""


def sizes_of_axes(config: MeshConfig, devices: int, of: str) -> dict[str, int]:
    """Sizes of the mesh's axes over so many devices; -1 is filled in.

    Args:
      config: the mesh.
      devices: their number.
      of: what has so many devices, for the message.

    Raises:
      UserError: the axes do not multiply to the number of devices.
    """
    asked = {axis: getattr(config, axis) for axis in MESH_AXES}
    sizes = list(asked.values())
    shown = ", ".join(f"{axis} {size}" for axis, size in asked.items())
    check(
        sizes.count(-1) <= 1 and all(size == -1 or size >= 1 for size in sizes),
        f"mesh has {shown}; each axis is 1 or more, and at most one is -1 (the rest)",
    )
    known = math.prod(size for size in sizes if size != -1)
    rest = devices // known if -1 in sizes else 1
    check(
        known * rest == devices,
        f"mesh {shown} does not fit {of}; make the product {devices}, or set one axis to -1",
    )
    return {axis: size if size != -1 else rest for axis, size in asked.items()}


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh with axes `data, fsdp, context, tensor` over `devices` (default: all of them).

    Raises:
      UserError: the axes do not multiply to the number of devices, or not to that of slices.
    """
    devices = jax.devices() if devices is None else devices
    if config.devices is not None:
        check(
            1 <= config.devices <= len(devices),
            f"mesh.devices is {config.devices}; this machine has {len(devices)} {devices[0].platform} device(s)",
        )
        devices = devices[: config.devices]
    sizes = sizes_of_axes(config, len(devices), f"{len(devices)} device(s) (mesh.devices uses fewer)")
    types = (AxisType.Auto,) * len(MESH_AXES)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return jax.make_mesh(tuple(sizes.values()), MESH_AXES, axis_types=types, devices=devices)
    across = config.between_slices
    check(
        sizes[across] % slices == 0,
        f"mesh.{across} is {sizes[across]}, and devices are of {slices} slices that it runs between"
        f" (mesh.between_slices); make it a multiple of {slices}",
    )
    between = {axis: slices if axis == across else 1 for axis in MESH_AXES}
    within = [size // between[axis] for axis, size in sizes.items()]
    placed = mesh_utils.create_hybrid_device_mesh(within, list(between.values()), devices)
    return Mesh(placed, MESH_AXES, axis_types=types)


def partition_spec(
    names: tuple[str | None, ...], shape: tuple[int, ...], axis_sizes: Mapping[str, int], rules: Rules | None = None
) -> PartitionSpec:
    """The layout of an array whose axes carry these logical names.

    An axis lies on the first of its mesh axes that divide it together (a vocabulary of 50,257, or one key/value head,
    stays whole on each device) and that no axis before it took.

    Args:
      names: logical names; None = whole.
      shape: of the array.
      axis_sizes: of the mesh.
      rules: the table; None = the one that is in force (see `ruled`).
    """
    rules = _rules.get() if rules is None else rules
    spec: list[str | tuple[str, ...] | None] = []
    taken: set[str] = set()
    for name, size in zip(names, shape):
        found: list[str] = []
        parts = 1
        for axis in rules.axes(name):
            if axis in taken or axis_sizes[axis] == 1:
                continue
            if size % (parts * axis_sizes[axis]):
                break
            parts *= axis_sizes[axis]
            found.append(axis)
        taken.update(found)
        spec.append(None if not found else found[0] if len(found) == 1 else tuple(found))
    return PartitionSpec(*spec)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Constrains an activation's layout by logical axis names; does nothing outside `jax.set_mesh`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(names, x.shape, dict(mesh.shape)))


def is_split(name: str) -> bool:
    """Whether the current mesh (`jax.set_mesh`) spreads a logical axis over more than one device."""
    return ways(name) > 1


def ways(name: str) -> int:
    """Over how many devices the current mesh (`jax.set_mesh`) spreads a logical axis, if they divide it."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in _rules.get().axes(name))


def axes_of(names: tuple[str | None, ...], shape: tuple[int, ...]) -> list[tuple[str, ...]]:
    """Over which axes of the current mesh (`jax.set_mesh`) `constrain` spreads each axis of such an array."""
    spec = partition_spec(names, shape, dict(jax.sharding.get_abstract_mesh().shape))
    return [(found,) if isinstance(found, str) else tuple(found or ()) for found in spec]


def parameter_shardings(boxed: Any, mesh: Mesh, rules: Rules = DEFAULT_RULES) -> Any:
    """Shardings of a parameter tree, from the logical names its (abstract) leaves carry as `nn.Partitioned` boxes."""

    def one(leaf: Any) -> NamedSharding:
        if isinstance(leaf, nn.Partitioned):
            return NamedSharding(mesh, partition_spec(leaf.names, leaf.value.shape, dict(mesh.shape), rules))
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
    """The layout of every array of a batch: rows over `data` and `fsdp`, whole along the length.

    Ids are small; the step splits what it makes of them.
    """
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def process_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """The rows of a batch that lie on this process's devices, ascending: what it has to read."""
    parts = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return sorted({row for part in parts if part is not None for row in range(*part[0].indices(batch_size))})


def check_batch(sizes: Mapping[str, int], batch_size: int, accumulate: int = 1) -> None:
    """Raises UserError unless rows divide evenly over accumulation steps and a mesh of these sizes."""
    rows = math.prod(sizes[axis] for axis in BATCH_AXES)
    check(
        batch_size % (rows * accumulate) == 0,
        f"train.batch_size {batch_size} is not a multiple of {rows * accumulate}"
        f" (mesh data x fsdp = {rows}, train.accumulate = {accumulate}); change one of them",
    )


def check_length(sizes: Mapping[str, int], length: int, causal: bool, what: str) -> None:
    """Raises UserError unless the tokens of a row divide evenly over the devices that share them.

    Args:
      sizes: of the mesh's axes.
      length: tokens of a row.
      causal: whether they see those before them alone; two chunks a device then, for balance.
      what: has so many, for the message.
    """
    devices = sizes[LENGTH_AXIS]
    unit = 2 * devices if causal else devices
    check(
        length % unit == 0 or devices == 1,
        f"{what} has {length} tokens, not a multiple of {unit} (mesh.{LENGTH_AXIS} = {devices}"
        f"{', two chunks a device' if causal else ''}); change one of them",
    )
