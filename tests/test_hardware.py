"""What depends on the kind of device."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lm.hardware import PEAK_FLOPS, compiler_options, peak_flops
from lm.sharding import MeshConfig, make_mesh

ROOT = Path(__file__).parent.parent


def mesh_of(platform: str, devices: int, *, data: int = 1, kind: str = "") -> SimpleNamespace:
    """What `compiler_options` looks at of a mesh."""
    found = np.array([SimpleNamespace(platform=platform, device_kind=kind)] * devices)
    return SimpleNamespace(devices=found, size=devices, shape={"data": data, "fsdp": devices // data})


@pytest.fixture(autouse=True)
def _nothing_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS"):
        monkeypatch.delenv(name, raising=False)


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


def compiled(options: dict) -> None:
    jax.jit(lambda x: x + 1, compiler_options=options)(jnp.ones(2)).block_until_ready()


def test_the_installed_xla_knows_every_option_for_gpus_and_cpus():
    """The CPU's XLA parses the options of all platforms that it was built for, and refuses what it doesn't know."""
    options = compiler_options(mesh_of("gpu", 8))
    assert "xla_gpu_enable_latency_hiding_scheduler" in options
    for name, value in (options | compiler_options(mesh_of("cpu", 1))).items():
        compiled({name: value})
        with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
            compiled({f"{name}_of_no_xla": value})


def test_options_are_for_those_whom_they_concern():
    assert compiler_options(mesh_of("gpu", 1)) == {}
    assert compiler_options(mesh_of("cpu", 1)) == compiler_options(mesh_of("cpu", 8))
    assert compiler_options(mesh_of("tpu", 8)) == {}
    copies = {"xla_enable_async_all_reduce", "xla_tpu_enable_async_collective_fusion_fuse_all_reduce"}
    assert set(compiler_options(mesh_of("tpu", 8, data=2))) == copies
    assert set(compiler_options(mesh_of("tpu", 1, kind="TPU v6 lite"))) == {"xla_tpu_scoped_vmem_limit_kib"}
    assert compiler_options(mesh_of("tpu", 1, kind="TPU v5 lite")) == {}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize(("topology", "slices"), [("v5e:2x2", 1), ("v5e:2x2", 2), ("v6e:2x2", 1), ("v5p:2x2x1", 1)])
def test_the_installed_libtpu_knows_every_option(topology: str, slices: int):
    """A sum over copies of a model, compiled for chips that aren't here with all that these would be given."""
    from jax.experimental import topologies

    found = topologies.get_topology_desc(topology, platform="tpu", num_slices=slices).devices
    mesh = make_mesh(MeshConfig(data=2, fsdp=-1), list(found))
    options = compiler_options(mesh)
    assert "xla_enable_async_all_reduce" in options
    assert ("xla_tpu_scoped_vmem_limit_kib" in options) == topology.startswith("v6e")
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    whole = NamedSharding(mesh, PartitionSpec())
    array = jax.ShapeDtypeStruct((64, 256), jnp.float32, sharding=rows)

    def lowered():
        return jax.jit(lambda x: x.sum(0), out_shardings=whole).lower(array)

    assert "all-reduce" in lowered().compile(compiler_options=options).as_text()
    for name in options:
        with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
            lowered().compile(compiler_options={f"{name}_of_no_xla": True})


def test_what_the_environment_names_is_left_to_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    mesh = mesh_of("gpu", 8)
    whole = compiler_options(mesh)
    flags = "--xla_gpu_enable_latency_hiding_scheduler=false --xla_dump_to=/tmp/x"
    rest = {name: value for name, value in whole.items() if name != "xla_gpu_enable_latency_hiding_scheduler"}
    assert len(rest) == len(whole) - 1
    monkeypatch.setenv("XLA_FLAGS", flags)
    assert compiler_options(mesh) == rest
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_latency_hiding")
    assert compiler_options(mesh) == whole, "another name"
    monkeypatch.setenv("LIBTPU_INIT_ARGS", flags)
    assert compiler_options(mesh) == rest
    # XLA takes a value that begins with no dash as the name of a file.
    monkeypatch.delenv("LIBTPU_INIT_ARGS")
    (tmp_path / "flags").write_text(flags.replace(" ", "\n"))
    monkeypatch.setenv("XLA_FLAGS", str(tmp_path / "flags"))
    assert compiler_options(mesh) == rest
    monkeypatch.setenv("XLA_FLAGS", str(tmp_path / "none"))
    assert compiler_options(mesh) == whole


WIDTHS = """
import jax, jax.numpy as jnp
from lm.hardware import compiler_options
from lm.sharding import MeshConfig, make_mesh
options = compiler_options(make_mesh(MeshConfig(devices=1))) if {ours} else {{"xla_cpu_prefer_vector_width": 512}}
jax.jit(lambda x: jnp.tanh(x) * 2 + jnp.sin(x), compiler_options=options)(jnp.ones(3000)).block_until_ready()
"""


def test_options_of_a_program_win_over_the_environment_so_ours_give_way(tmp_path: Path):
    """As docs/pods.md says: what XLA compiled a program with, read from what it dumps."""

    def width(flags: str, *, ours: bool) -> set[str]:
        folder = tmp_path / f"{bool(flags)}{ours}"
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
        environment["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # what is taken from there is not compiled
        environment["XLA_FLAGS"] = f"{flags} --xla_dump_to={folder} --xla_dump_hlo_module_re=.*lambda.*"
        code = WIDTHS.format(ours=ours)
        subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=120, cwd=tmp_path)
        dumped = "".join(path.read_text() for path in folder.glob("*lambda*.debug_options"))
        return set(re.findall(r"xla_cpu_prefer_vector_width: (\d+)", dumped))

    assert width("", ours=True) == {"512"}
    assert width("--xla_cpu_prefer_vector_width=128", ours=False) == {"512"}
    assert width("--xla_cpu_prefer_vector_width=128", ours=True) == {"128"}
