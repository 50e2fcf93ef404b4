"""Chips by name: what they compute, hold and move, and how many a topology has.

Bandwidths are bytes per second and chip in one direction, with all links at work at once; vendors often give the sum of
both directions, which is twice that. Capacities are what a program can have: of TPUs the size in GiB, of GPUs the
vendor's decimal gigabytes.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from lm.errors import check

_GIB = 2**30
_CLOUD = "https://cloud.google.com/tpu/docs"


@dataclass(frozen=True, kw_only=True)
class Chip:
    """One accelerator as jax sees it: a device."""

    name: str
    kind: str
    """What `jax.Device.device_kind` starts with."""
    platform: str
    """`tpu` or `gpu`."""
    flops: float
    """Peak dense bfloat16 FLOP/s."""
    memory: int
    """Bytes of device memory."""
    memory_bandwidth: float
    link_bandwidth: float
    """Within a slice (ICI) or a machine (NVLink)."""
    network_bandwidth: float
    """Between slices or machines, the chip's share of its host's."""
    chips_per_host: int
    host_memory: int
    """Bytes of a host's RAM."""
    host_bandwidth: float
    """Between a chip and its host's memory (PCIe). TPUs: https://jax-ml.github.io/scaling-book/tpus; GPUs: 16 lanes of
    PCIe 4 (A100) or 5, as their data sheets have it."""
    largest: int
    """Chips of the largest slice that can be had; of GPUs, none."""
    axes: int
    """Axes of a topology: 2 or 3 of a torus, 1 of GPUs (their number)."""
    source: str


CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip(
            name="v4",
            kind="TPU v4",
            platform="tpu",
            flops=275e12,
            memory=32 * _GIB,
            memory_bandwidth=1200e9,
            link_bandwidth=300e9,
            network_bandwidth=6.25e9,
            chips_per_host=4,
            host_memory=407 * _GIB,
            host_bandwidth=16e9,
            largest=4096,
            axes=3,
            source=f"{_CLOUD}/v4; links: 6 x 50 GB/s, arXiv:2304.01433, table 4",
        ),
        Chip(
            name="v5e",
            kind="TPU v5 lite",
            platform="tpu",
            flops=197e12,
            memory=16 * _GIB,
            memory_bandwidth=819e9,
            link_bandwidth=200e9,
            network_bandwidth=3.125e9,
            chips_per_host=4,
            host_memory=192 * 10**9,
            host_bandwidth=16e9,
            largest=256,
            axes=2,
            source=f"{_CLOUD}/v5e (400 GB/s of links in both directions; 6.4 Tbit/s of network a pod of 256)",
        ),
        Chip(
            name="v5p",
            kind="TPU v5",
            platform="tpu",
            flops=459e12,
            memory=95 * _GIB,
            memory_bandwidth=2765e9,
            link_bandwidth=600e9,
            network_bandwidth=6.25e9,
            chips_per_host=4,
            host_memory=448 * 10**9,
            host_bandwidth=16e9,
            largest=6144,
            axes=3,
            source=f"{_CLOUD}/v5p (1,200 GB/s of links in both directions; 50 Gbit/s of network; 16x16x24 at most)",
        ),
        Chip(
            name="v6e",
            kind="TPU v6 lite",
            platform="tpu",
            flops=918e12,
            memory=32 * _GIB,
            memory_bandwidth=1638e9,
            link_bandwidth=400e9,
            network_bandwidth=12.5e9,
            chips_per_host=4,
            host_memory=720 * 10**9,
            host_bandwidth=32e9,
            largest=256,
            axes=2,
            source=f"{_CLOUD}/v6e (800 GB/s of links in both directions)",
        ),
        Chip(
            name="a100",
            kind="NVIDIA A100",
            platform="gpu",
            flops=312e12,
            memory=80 * 10**9,
            memory_bandwidth=2039e9,
            link_bandwidth=300e9,
            network_bandwidth=25e9,
            chips_per_host=8,
            host_memory=2048 * 10**9,
            host_bandwidth=32e9,
            largest=0,
            axes=1,
            source="NVIDIA A100 80GB SXM and DGX A100 640GB data sheets (NVLink 600 GB/s both ways, 8 x 200 Gbit/s)",
        ),
        Chip(
            name="h100",
            kind="NVIDIA H100 80GB HBM3",
            platform="gpu",
            flops=989e12,
            memory=80 * 10**9,
            memory_bandwidth=3350e9,
            link_bandwidth=450e9,
            network_bandwidth=50e9,
            chips_per_host=8,
            host_memory=2048 * 10**9,
            host_bandwidth=64e9,
            largest=0,
            axes=1,
            source="NVIDIA H100 SXM and DGX H100 data sheets (dense; NVLink 900 GB/s both ways, 8 x 400 Gbit/s)",
        ),
        Chip(
            name="h200",
            kind="NVIDIA H200",
            platform="gpu",
            flops=989e12,
            memory=141 * 10**9,
            memory_bandwidth=4800e9,
            link_bandwidth=450e9,
            network_bandwidth=50e9,
            chips_per_host=8,
            host_memory=2048 * 10**9,
            host_bandwidth=64e9,
            largest=0,
            axes=1,
            source="NVIDIA H200 SXM and DGX H200 data sheets (dense; NVLink 900 GB/s both ways, 8 x 400 Gbit/s)",
        ),
    )
}


@dataclass(frozen=True)
class Topology:
    """So many chips of a kind, and how they are wired."""

    name: str
    """As it was asked for: `v5p:4x4x4`, `2xv5p:4x4x4`, `h100:64`."""
    chip: Chip | None
    """None for `cpu:N`, fake devices of this machine."""
    shape: tuple[int, ...]
    slices: int = 1
    """So many of them, joined over the data-centre network."""

    @property
    def devices(self) -> int:
        """Number of chips."""
        return math.prod(self.shape) * self.slices

    @property
    def slice_name(self) -> str:
        """One of its slices."""
        return self.name.partition("x")[2] if self.slices > 1 else self.name

    @property
    def hosts(self) -> int:
        """Number of machines."""
        if self.chip is None:
            return 1
        return math.ceil(self.devices / self.slices / self.chip.chips_per_host) * self.slices

    @property
    def platform(self) -> str:
        """`tpu`, `gpu` or `cpu`."""
        return "cpu" if self.chip is None else self.chip.platform


def describe_known() -> str:
    """The topologies that can be named, in words."""
    tpus = ", ".join(
        f"{chip.name}:{'4x4x4' if chip.axes == 3 else '4x4'}" for chip in CHIPS.values() if chip.platform == "tpu"
    )
    gpus = ", ".join(f"{chip.name}:8" for chip in CHIPS.values() if chip.platform == "gpu")
    return (
        f"{tpus} (chips along each axis; 2xv5p:4x4x4 = two such slices), {gpus} (number of GPUs), cpu:8 (fake devices"
        " of this machine)"
    )


def parse_topology(text: str) -> Topology:
    """A topology from its name.

    Raises:
      UserError: no such chip, or a shape that it does not come in.
    """
    slices, whole = 1, text
    if joined := re.fullmatch(r"([1-9][0-9]{0,3})x([a-z].*)", text):
        slices, text = int(joined[1]), joined[2]
    name, _, size = text.partition(":")
    known = f"unknown topology {whole!r}; known are {describe_known()}"
    check(name in CHIPS or name == "cpu", known)
    check(re.fullmatch(r"[1-9][0-9]*(x[1-9][0-9]*)*", size), known)
    shape = tuple(int(part) for part in size.split("x"))
    check(
        slices == 1 or (name in CHIPS and CHIPS[name].platform == "tpu"),
        f"topology {whole!r}: only TPUs come in slices; give a number, as in {name}:{slices * math.prod(shape)}",
    )
    if name == "cpu":
        check(len(shape) == 1 and shape[0] <= 1024, f"topology {text!r}: of cpu give a number of devices up to 1024")
        return Topology(text, None, shape)
    chip = CHIPS[name]
    if chip.axes == 1:
        check(len(shape) == 1, f"topology {text!r}: of GPUs give their number, as in {name}:{math.prod(shape)}")
        check(
            shape[0] <= chip.chips_per_host or shape[0] % chip.chips_per_host == 0,
            f"topology {text!r}: machines have {chip.chips_per_host} GPUs; give at most so many, or a multiple",
        )
        return Topology(text, chip, shape)
    check(
        len(shape) == chip.axes,
        f"topology {text!r}: {name} has {chip.axes} axes, as in {name}:{'x'.join(['4'] * chip.axes)}",
    )
    check(
        shape == (1,) * chip.axes or (shape[0] % 2 == 0 and shape[1] % 2 == 0),
        f"topology {text!r}: a host of {name} has 2x2 chips, so that the first two axes are even; or all are 1",
    )
    chips = math.prod(shape)
    check(
        chips <= chip.largest,
        f"topology {whole!r}: {chips} chips, and a slice of {name} has at most {chip.largest}; join several smaller"
        f" ones, as in 2x{name}:{'x'.join(['4'] * chip.axes)}",
    )
    return Topology(whole, chip, shape, slices)
