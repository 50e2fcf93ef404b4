"""What depends on the kind of device: its peak, and the options that XLA compiles a step with."""

import os
from pathlib import Path

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


# XLA options by kind of device. Each program is compiled with them, so they depend neither on the environment nor on
# what was imported first. A name that the installed XLA doesn't know is an error; the tests try all of them.

# XLA keeps to half of AVX-512 by default; element-wise work gains from all of it. Ignored by lesser CPUs.
_CPU: dict[str, bool | int] = {"xla_cpu_prefer_vector_width": 512}

# For several GPUs, as NVIDIA's JAX-Toolbox (docs/GPU_performance.md) and MaxText have them. What XLA does by itself is
# not here: asynchronous collectives, on a stream of high priority.
_GPUS: dict[str, bool | int] = {
    # Orders a program so that products run between the start of a collective and its end, instead of waiting for it.
    "xla_gpu_enable_latency_hiding_scheduler": True,
    # Two layers in one turn of the loop over layers: what the second needs is gathered while the first computes, and
    # used where it lies, without a copy. (That a turn begins with what the next one needs has options too, of other
    # names and values in each version of XLA.)
    "xla_gpu_enable_while_loop_double_buffering": True,
    # Small collectives travel as one, up to so many bytes: links are used better by large ones. 512 MiB is a layer of
    # LLaMA 7B in bfloat16 (405 MB), so the gathers of a layer become one; more would only wait longer.
    "xla_gpu_all_gather_combine_threshold_bytes": 512 * 2**20,
    "xla_gpu_reduce_scatter_combine_threshold_bytes": 512 * 2**20,
    "xla_gpu_all_reduce_combine_threshold_bytes": 512 * 2**20,
}

# libtpu overlaps by itself: its scheduler hides latency, gathers and permutes are asynchronous and fused with products,
# products are cut to go along with what they wait for, sums between slices run beside the layers. Asking for any of
# that changed no program (libtpu 0.0.42). What follows is off by default, and on in MaxText
# (benchmarks/xla_flags_library.py).
_TPU_COPIES: dict[str, bool | int] = {
    # For a model in several copies: the sum of their gradients begins and ends apart, and is fused with the products
    # that go on between; it takes both. Without copies nothing large is summed, and memory would grow.
    "xla_enable_async_all_reduce": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": True,
}
_TPU_V6E: dict[str, bool | int] = {
    # KiB of the 128 MiB of vector memory that one operation may take: larger tiles, fewer trips to the main memory.
    "xla_tpu_scoped_vmem_limit_kib": 98304,
}


def compiler_options(mesh: Mesh) -> dict[str, bool | int]:
    """XLA options for the programs that train and evaluate on a mesh, of devices that need not be there.

    Options of a program win over `XLA_FLAGS`. So those that `XLA_FLAGS` or `LIBTPU_INIT_ARGS` name are left out,
    and whoever runs the program has the last word.
    """
    first = mesh.devices.flat[0]
    options: dict[str, bool | int] = {}
    if first.platform == "cpu":
        options |= _CPU
    elif first.platform == "tpu":
        if dict(mesh.shape).get("data", 1) > 1:
            options |= _TPU_COPIES
        if first.device_kind.startswith("TPU v6 lite"):
            options |= _TPU_V6E
    elif mesh.size > 1:  # else there is nothing to overlap
        options |= _GPUS
    taken = _named(os.environ.get("XLA_FLAGS", "")) | _named(os.environ.get("LIBTPU_INIT_ARGS", ""))
    return {name: value for name, value in options.items() if name not in taken}


def _named(flags: str) -> set[str]:
    """The options that a variable names: `--name=value --name …`, or a file that holds them, as XLA reads it."""
    if flags and not flags.lstrip().startswith("-"):
        path = Path(flags)
        flags = path.read_text() if path.is_file() else ""
    return {flag.lstrip("-").partition("=")[0] for flag in flags.split()}
