"""`lm doctor --check-mesh`: does a config compute on its mesh what it computes on one device?"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from lm.commands.exits import DONE, FAILED
from lm.errors import check

if TYPE_CHECKING:
    from rich.console import Console

    from lm.config import Experiment
    from lm.equality import Comparison

# Host memory that both runs take, in copies of the train state: that on one device, what it leaves on the host to be
# compared, and the state spread over fake devices, which a gradient and its average double.
_STATES = 4


def run(path: Path, arguments: list[str], free: int | None) -> int:
    """`lm doctor --check-mesh CONFIG.py [settings]`, with so many bytes of host memory free."""
    import jax

    from lm import config as configs
    from lm.commands.shared import open_console, show
    from lm.config import Experiment
    from lm.equality import compare, on_one_device
    from lm.run.training import check_shares
    from lm.sharding import make_mesh

    @dataclass(frozen=True, kw_only=True)
    class CheckMeshArguments:
        """Options of `lm doctor --check-mesh` besides the settings of the experiment."""

        fake_devices: int = 8
        """Devices that this machine's CPU stands for; 0 = the devices that are there."""
        steps: int = 10
        """Optimizer steps whose losses are compared."""
        tolerance: float = 1e-5
        """Relative difference that rounding may make."""
        experiment: Annotated[Experiment, tyro.conf.arg(name="")] = field(default_factory=Experiment)

    default = CheckMeshArguments(experiment=configs.load_file(path))
    asked = configs.parse(CheckMeshArguments, default, arguments, prog=f"lm doctor --check-mesh {path}")
    check(0 <= asked.fake_devices <= 1024, f"--fake-devices is {asked.fake_devices}; it is from 0 to 1024")
    check(asked.steps >= 1, f"--steps is {asked.steps}; it must be at least 1")
    check(0 < asked.tolerance < 1, f"--tolerance is {asked.tolerance}; it is between 0 and 1")
    if asked.fake_devices:
        _fake(asked.fake_devices)
    console = open_console()
    devices = jax.devices()[: asked.fake_devices or None]
    mesh = make_mesh(asked.experiment.mesh, devices)
    check(
        mesh.size > 1,
        "the mesh has one device, and nothing to compare it with; give --fake-devices 8, and mesh.devices None",
    )
    check_shares(asked.experiment, mesh.shape)
    if devices[0].platform == "cpu" and free is not None:
        _check_memory(asked.experiment, free)
    alone = on_one_device(asked.experiment, steps=asked.steps, device=devices[0])
    found = compare(alone, asked.experiment, tolerance=asked.tolerance, devices=devices)
    show(console, f"lm doctor --check-mesh {path}")
    for name, text in _rows(found, asked.experiment, devices[0].platform):
        show(console, f"  {name:<9}  {text}")
    return _verdict(console, found)


def _fake(count: int) -> None:
    import jax

    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # jax has started, with as many devices as it was told to have
        here = len(jax.devices())
        check(here >= count, f"--fake-devices is {count}, and jax has started with {here}; ask for at most so many")


def _check_memory(experiment: "Experiment", free: int) -> None:
    """Refuses what would end in the hands of the kernel's memory killer."""
    from lm.plan.job import bytes_of, make_job

    needed = _STATES * bytes_of(make_job(experiment, "cpu").state())
    check(
        needed < free,
        f"the check takes about {needed / 1e9:,.0f} GB on fake devices, and {free / 1e9:,.0f} GB are free; make the"
        " model smaller for it, as with --model.n-layers 2 --model.d-model 256, or run it where the devices are"
        " (--fake-devices 0)",
    )


def _rows(found: "Comparison", experiment: "Experiment", platform: str) -> list[tuple[str, str]]:
    from lm.equality import MOVED

    rows, (length, source) = experiment.train.batch_size, experiment.task.lengths(experiment.data)
    shape = ", ".join(f"{axis} {size}" for axis, size in found.sizes.items() if size > 1) or "data 1"
    tokens = f"{rows} rows of {length}{f' and {source}' if source else ''} made-up tokens"
    first, last = found.losses[1][[0, -1]]
    said = [("mesh", f"{shape} ({platform}) beside one device"), ("batch", f"{tokens}, float32, no dropout")]
    for name, kind in (("start", "initial"), ("layers", ""), ("gradients", "gradient"), ("losses", "loss")):
        largest = found.largest(kind) if kind else found.largest_of_layers()
        where = "the same to the bit" if largest.relative == 0 else f"{largest.relative:.1e} at {largest.part}"
        said.append((name, where + (f"; {first:.4f} to {last:.4f} nats" if kind == "loss" else "")))
    said.append(
        ("rounding", f"makes {found.grown:.1e} of a loss, by one device with its parameters moved by {MOVED:g}")
    )
    return said


def _verdict(console: "Console", found: "Comparison") -> int:
    from lm.commands.shared import show

    first = found.first
    if first is None:
        show(console, f"the same: no difference above {found.tolerance:g} of the largest value, or what rounding makes")
        return DONE
    show(
        console,
        f"DIFFERENT: {first.part} is the first that differs, by {first.relative:.1e} of its largest value (allowed"
        f" {first.allowed:.1e})",
    )
    return FAILED
