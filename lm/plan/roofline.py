"""Times that a step takes at least: computing, memory, links, the host; each as if the others took none."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lm.plan.chips import Chip, Topology
from lm.plan.hlo import BETWEEN_SLICES, Collective


@dataclass(frozen=True)
class Times:
    """Seconds of a step."""

    compute: float
    """Matrix products at the peak rate."""
    memory: float
    """Traffic of the memory at its full bandwidth."""
    links: float
    """Collectives over all links at their full bandwidth."""
    host: float = 0.0
    """What waits in the host's memory for the backward pass, on its way there and back."""

    @property
    def least(self) -> float:
        """Where all of them go on at once."""
        return max(self.compute, self.memory, self.links, self.host)

    @property
    def most(self) -> float:
        """Where one waits for the other, each at its full rate."""
        return self.compute + self.memory + self.links + self.host

    @property
    def bound(self) -> str:
        """Which of them takes longest."""
        return max(("compute", "memory", "links", "host"), key=lambda name: getattr(self, name))


def step_times(
    topology: Topology,
    sizes: Mapping[str, int],
    flops: float,
    traffic: float,
    collectives: Sequence[Collective],
    *,
    host: float = 0.0,
    across: str = "data",
) -> Times | None:
    """The least times of a step; None for fake devices, which have no speed.

    Args:
      topology: the chips.
      sizes: of the mesh's axes, in their order.
      flops: operations of a step over all chips, what is computed twice counted twice.
      traffic: bytes to and from memory of each chip.
      collectives: of each chip.
      host: bytes of each chip that go to its host's memory and come back.
      across: the mesh axis between slices, where there are several.
    """
    chip = topology.chip
    if chip is None:
        return None
    return Times(
        compute=flops / topology.devices / chip.flops,
        memory=traffic / chip.memory_bandwidth,
        links=sum(collective_seconds(topology, sizes, one, across) for one in collectives),
        host=2 * host / chip.host_bandwidth,
    )


def collective_seconds(
    topology: Topology, sizes: Mapping[str, int], collective: Collective, across: str = "data"
) -> float:
    """Seconds of collectives of one kind.

    Within a TPU slice all of a chip's links carry an equal share. Of GPUs, those of one machine talk over NVLink; what
    leaves a machine, or a slice, is shared by the network of those of its chips that take part, and goes on at the same
    time.
    """
    chip = topology.chip
    assert chip is not None
    within = collective.sent / chip.link_bandwidth
    if chip.platform == "tpu":
        if collective.kind.endswith(BETWEEN_SLICES):
            here = 1
        else:  # one that leaves a slice goes over all of its axes
            whole = collective.devices == math.prod(sizes[axis] for axis in collective.axes)
            here = collective.devices // (topology.slices if whole and across in collective.axes else 1)
    else:
        here = _in_one_host(chip, sizes, collective.axes)
    if here >= collective.devices:
        return within
    hosts = collective.devices / here
    # What a machine sends of a ring that goes once through all of them.
    rounds = collective.sent / (collective.payload * (collective.devices - 1) / collective.devices)
    leaving = collective.payload * rounds * (hosts - 1) / hosts
    return max(within if here > 1 else 0.0, leaving / (here * chip.network_bandwidth))


def _in_one_host(chip: Chip, sizes: Mapping[str, int], axes: Sequence[str]) -> int:
    """How many of a collective's devices are in one machine: the mesh's last axis lies closest together."""
    left, together = chip.chips_per_host, 1
    for axis in reversed(list(sizes)):
        share = math.gcd(sizes[axis], left)
        if axis in axes:
            together *= share
        left //= share
    return together
