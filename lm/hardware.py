"""What depends on the kind of device: its peak, and the options that XLA compiles a step with."""

import jax
from jax.sharding import Mesh

# Peak dense bf16 FLOP/s of one device, by what `jax.Device.device_kind` starts with; from the vendors' data sheets.
PEAK_FLOPS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}


def peak_flops(device: jax.Device) -> float | None:
    """Peak bf16 FLOP/s of a device, or None when it is not in the table (CPUs, unknown chips)."""
    for kind in sorted(PEAK_FLOPS, key=len, reverse=True):
        if device.device_kind.startswith(kind):
            return PEAK_FLOPS[kind]
    return None


def compiler_options(mesh: Mesh) -> dict[str, int]:
    """XLA options for the programs that train and evaluate, by the kind of device."""
    if mesh.devices.flat[0].platform == "cpu":
        # XLA keeps to half of AVX-512 by default; element-wise work gains from all of it. Ignored by lesser CPUs.
        return {"xla_cpu_prefer_vector_width": 512}
    return {}
