"""What depends on the kind of device."""

from types import SimpleNamespace

import jax
import pytest

from lm.hardware import PEAK_FLOPS, peak_flops


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
    ],
)
def test_peak_flops_by_the_longest_name(kind, peak):
    assert peak_flops(SimpleNamespace(device_kind=kind)) == peak
    assert peak in PEAK_FLOPS.values()


def test_peak_flops_of_an_unknown_device_is_none():
    assert peak_flops(jax.devices()[0]) is None
