"""Topologies by name, and the one table of chips."""

import pytest

from lm.errors import UserError
from lm.hardware import PEAK_FLOPS
from lm.plan.chips import CHIPS, parse_topology


@pytest.mark.parametrize(
    ("text", "devices", "hosts"),
    [
        ("v5p:4x4x4", 64, 16),
        ("v5p:16x16x24", 6144, 1536),
        ("2xv5p:16x16x16", 8192, 2048),
        ("4xv5e:2x2", 16, 4),
        ("v5e:4x4", 16, 4),
        ("v5e:1x1", 1, 1),
        ("v6e:16x16", 256, 64),
        ("v4:2x2x1", 4, 1),
        ("h100:64", 64, 8),
        ("h200:1", 1, 1),
        ("cpu:8", 8, 1),
    ],
)
def test_a_name_says_how_many(text: str, devices: int, hosts: int):
    topology = parse_topology(text)
    assert (topology.devices, topology.hosts) == (devices, hosts)


@pytest.mark.parametrize(
    "text",
    [
        "v5x:4x4",
        "v5p",
        "v5p:",
        "v5p:4x4",
        "v5p:4xx4",
        "v5p:0x4x4",
        "v5p:3x3x3",
        "v5e:64x64",
        "v5p:16x16x32",
        "2xh100:8",
        "2xcpu:8",
        "0xv5p:4x4x4",
        "h100:12",
        "h100:2x8",
        "cpu:2x4",
    ],
)
def test_what_there_is_not(text: str):
    with pytest.raises(UserError, match="topology"):
        parse_topology(text)


def test_an_unknown_chip_is_told_the_known_ones():
    with pytest.raises(UserError) as error:
        parse_topology("v9:4x4")
    assert all(name in str(error.value) for name in CHIPS)


def test_the_rates_are_those_of_a_run():
    """A run's MFU and a plan's are of the same peak."""
    for chip in CHIPS.values():
        kinds = [kind for kind in PEAK_FLOPS if chip.kind.startswith(kind)]
        assert PEAK_FLOPS[max(kinds, key=len)] == chip.flops
        assert chip.source
        assert 100 < chip.flops / chip.memory_bandwidth < 700, "operations a byte of memory"
        assert chip.link_bandwidth < chip.memory_bandwidth
        assert chip.network_bandwidth < chip.link_bandwidth
