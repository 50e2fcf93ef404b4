"""The step compiled for devices that need not be there: what the compiler says of it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from lm.errors import UserError, check
from lm.plan.chips import Topology
from lm.plan.hlo import Collective, Program
from lm.plan.job import Job
from lm.sharding import make_mesh

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Compiled:
    """A compiled step, per device."""

    arguments: int
    """Bytes of state and batch."""
    aliased: int
    """Bytes of them that the new state takes over."""
    outputs: int
    temporary: int
    """Bytes that the program holds besides, gaps included."""
    code: int
    peak: int
    """Bytes in use at the worst moment, without the gaps; 0 where the compiler does not tell."""
    total: int
    """Bytes that the device must have."""
    collectives: list[Collective]
    traffic: int
    """Bytes to and from memory."""
    host: int = 0
    """Bytes that the program keeps in the host's memory."""


@dataclass(frozen=True)
class TooLarge:
    """The compiler gave up: the step needs more memory than the chip has."""

    total: int
    """Bytes that it would need, as far as the compiler came."""


def devices_of(topology: Topology) -> list[Any]:
    """The devices of a topology, real or not.

    Raises:
      UserError: libtpu is not installed or can't build the topology; or there are too few fake devices.
    """
    chip = topology.chip
    if chip is None:
        devices = jax.devices("cpu")
        check(
            len(devices) >= topology.devices,
            f"topology {topology.name}, and this process has {len(devices)} CPU devices;"
            f" set XLA_FLAGS=--xla_force_host_platform_device_count={topology.devices}",
        )
        return list(devices[: topology.devices])
    check(chip.platform == "tpu", f"topology {topology.name} can't be compiled for here, only planned analytically")
    from jax.experimental import topologies

    options: dict[str, Any] = {}
    if topology.devices == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    if chip.name == "v4":
        options["chip_config_name"] = "megacore"  # a chip is one device, as it is in a run
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    try:
        found = topologies.get_topology_desc(topology.slice_name, platform="tpu", **options)
    except Exception as error:
        text = " ".join(str(error).split())
        if "TPU support not installed" in text:
            raise UserError(
                f"topology {topology.name} is compiled for with libtpu, which is not installed;"
                " install it with `pip install 'jax[tpu]'`, or add --compile no"
            ) from error
        raise UserError(f"topology {topology.name}: {text}") from error
    devices = list(found.devices)
    check(
        len(devices) == topology.devices,
        f"topology {topology.name}: libtpu makes {len(devices)} devices of {topology.devices} chips",
    )
    return devices


def compile_step(job: Job, topology: Topology, sizes: Mapping[str, int]) -> Compiled | TooLarge:
    """Compiles the train step of a job for a topology.

    Args:
      job: the run.
      topology: of TPUs, or of fake devices of this machine.
      sizes: of the mesh's axes.
    """
    axes: dict[str, Any] = dict(sizes)
    mesh = make_mesh(dataclasses.replace(job.experiment.mesh, devices=None, **axes), devices_of(topology))
    lowered = job.lowered(mesh)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        needed = needed_by(str(error))
        if needed is None:
            raise
        return TooLarge(needed)
    plan = compiled.memory_analysis()
    program = Program(compiled.as_text())
    total = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
    return Compiled(
        arguments=plan.argument_size_in_bytes,
        aliased=plan.alias_size_in_bytes,
        outputs=plan.output_size_in_bytes,
        temporary=plan.temp_size_in_bytes,
        code=plan.generated_code_size_in_bytes,
        peak=plan.peak_memory_in_bytes,
        total=total + plan.temp_size_in_bytes + plan.generated_code_size_in_bytes,
        collectives=program.collectives(sizes, topology.slices, job.experiment.mesh.between_slices),
        traffic=program.traffic(),
        host=plan.host_temp_size_in_bytes,
    )


def needed_by(message: str) -> int | None:
    """Bytes that a program needs, from the compiler's complaint that there are too few; None for other complaints."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    found = re.search(r"Used ([0-9.]+)([KMGT]?) of|temporaries \(([0-9.]+)([KMGT]?)\) exceeds", message)
    if not found:
        return 0
    number, unit = (part for part in found.groups() if part is not None)
    return int(float(number) * _UNITS[unit])
