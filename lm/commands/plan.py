"""`lm plan`: does a run fit on hardware that isn't here, what moves, how long would it take?"""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from lm.commands.exits import DONE, FAILED
from lm.errors import UserError, check

if TYPE_CHECKING:
    from rich.console import Console

    from lm.plan import Plan, Topology

# Before jax is imported: libtpu then neither looks for a TPU of this machine nor asks the cloud what it runs on.
_SETTINGS = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no chip is opened, so that several plans may be made at once
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


def run(arguments: list[str]) -> int:
    """`lm plan CONFIG.py --topology v5p:4x4x4 [options]`."""
    _prepare(arguments)
    from lm import config as configs
    from lm.commands.shared import open_console, show
    from lm.config import Experiment
    from lm.plan import make_plan, parse_topology, plan_run, search
    from lm.plan.picture import draw_plan
    from lm.sharding import MESH_AXES

    @dataclass(frozen=True, kw_only=True)
    class PlanArguments:
        """Options of `lm plan` besides the settings of the experiment."""

        topology: str = "v5p:2x2x1"
        """What to plan for: TPUs by their slice (v4:2x2x2, v5e:4x4, v5p:4x4x4, v6e:16x16), several slices
        (2xv5p:4x4x4), GPUs by their number (a100:8, h100:64, h200:1), or fake devices of this machine (cpu:8)."""
        compile: Literal["auto", "yes", "no"] = "auto"
        """Compile the train step for the topology: auto = TPUs and cpu; no = the analytic model alone, in seconds."""
        search: bool = False
        """Try all meshes, accumulation and recomputation with the run's batch; rank those that fit."""
        search_compile: int = 0
        """With search: compile so many of the best ways."""
        json: bool = False
        """One JSON object instead of tables."""
        output: Path | None = None
        """Also draw the plan as a picture: PLAN.png, or svg or pdf."""
        experiment: Annotated[Experiment, tyro.conf.arg(name="")] = field(default_factory=Experiment)

    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        raise UserError("give a config file first: `lm plan CONFIG.py --topology v5p:4x4x4 [options]`")
    if arguments[0] in ("-h", "--help"):
        configs.parse(PlanArguments, None, ["--help"], prog="lm plan CONFIG.py")
    path = Path(arguments[0])
    default = PlanArguments(experiment=configs.load_file(path))
    asked = configs.parse(PlanArguments, default, arguments[1:], prog=f"lm plan {path}")
    topology = parse_topology(asked.topology)
    check(asked.search_compile >= 0, f"--search-compile is {asked.search_compile}; it must be 0 or more")
    check(
        asked.search or not asked.search_compile,
        f"--search-compile is {asked.search_compile}, and nothing is searched; add --search",
    )
    if asked.search:
        typed = [argument.partition("=")[0] for argument in arguments]
        axes = [option for option in typed if option in {f"--mesh.{axis}" for axis in MESH_AXES}]
        check(not axes, f"{' '.join(axes)} is given, and --search tries all meshes; leave one out")
        check(
            asked.compile != "yes",
            "--compile yes is given, and --search ranks by the analytic model; add --search-compile 3 instead",
        )
    if asked.output is not None:
        check(
            asked.output.suffix in (".png", ".svg", ".pdf"),
            f"--output is {asked.output}; a picture is a .png, .svg or .pdf",
        )
        check(asked.output.parent.is_dir(), f"--output is {asked.output}, and there is no folder {asked.output.parent}")
    console = open_console()
    # What is compiled here runs nowhere here, so that nothing is kept of it.
    import jax

    jax.config.update("jax_enable_compilation_cache", False)
    if asked.search:
        from lm.plan.planning import checked_job

        job = checked_job(asked.experiment, topology)
        with _waiting(console, asked.json, "trying meshes"):
            plans, tried = search(job, topology)
        best = plans[: max(asked.search_compile, 0)]
        compiled: list[Plan] = []
        for at, plan in enumerate(best):
            with _waiting(console, asked.json, f"compiling {at + 1} of {len(best)}"), _quiet():
                from lm.plan.compiled import compile_step

                compiled.append(make_plan(plan.job, topology, plan.sizes, compile_step(plan.job, topology, plan.sizes)))
        plans = compiled + plans[len(compiled) :]
        if asked.json:
            print(json.dumps({"tried": tried, "fit": [plan.to_dict() for plan in plans[:_SHOWN]]}))
        else:
            _show_search(console, topology, plans, tried)
        if asked.output is not None and plans:
            draw_plan(plans[0], asked.output)
        return DONE if plans else FAILED
    with _waiting(console, asked.json, f"compiling for {topology.name}"), _quiet():
        plan, notes = plan_run(asked.experiment, topology, asked.compile)
    if asked.json:
        print(json.dumps(plan.to_dict() | {"notes": notes}))
    else:
        for note in notes:
            show(console, note)
        _show(console, path, plan)
    if asked.output is not None:
        draw_plan(plan, asked.output)
        if not asked.json:
            show(console, f"drawn in {asked.output}")
    return DONE


def _prepare(arguments: list[str]) -> None:
    """Sets what jax and libtpu read when they start; does nothing where jax has started already."""
    devices = 1
    for at, argument in enumerate(arguments):
        name, given, value = argument.partition("=")
        if name == "--topology":
            value = value if given else (arguments[at + 1] if at + 1 < len(arguments) else "")
            if value.startswith("cpu:") and value[4:].isdigit():
                devices = int(value[4:])
    for name, setting in _SETTINGS.items():
        os.environ.setdefault(name, setting)
    os.environ["JAX_PLATFORMS"] = "cpu"  # also where another is set: nothing runs on it
    flag = "--xla_force_host_platform_device_count"
    if devices > 1 and flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}={devices}".strip()


@contextlib.contextmanager
def _waiting(console: "Console", silent: bool, what: str) -> Iterator[None]:
    if silent or not console.is_terminal:
        yield
    else:
        with console.status(what):
            yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps what libtpu writes to standard error, about a TPU that it doesn't find, from the screen."""
    try:
        stderr = sys.stderr.fileno()
    except (OSError, ValueError):  # there is none, as where output is caught by a test
        yield
        return
    sys.stderr.flush()
    kept = os.dup(stderr)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stderr)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, stderr)
        os.close(kept)
        os.close(nowhere)


_SHOWN = 12


def _show(console: "Console", path: Path, plan: "Plan") -> None:
    from rich.table import Table

    from lm.commands.shared import show
    from lm.plan.compiled import Compiled, TooLarge
    from lm.plan.search import what_would_fit

    job, topology, train = plan.job, plan.topology, plan.job.train
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.sizes.items() if size > 1) or "one device"
    show(console, f"{path} on {topology.name}: {topology.devices} chips on {topology.hosts} hosts, mesh {mesh}")
    table = Table()
    table.add_column("what")
    table.add_column("", justify="right")

    def row(what: str, value: str) -> None:
        table.add_row(what, value)

    trained = "" if plan.trained == plan.parameters else f", {plan.trained:,} trained"
    row("parameters", f"{plan.parameters:,}{trained}")
    row("tokens in a step", f"{job.tokens_per_step:,} ({train.batch_size} rows of {job.lengths[0]})")
    row("FLOPs a token, a step", f"{job.flops_of_token():.3g}, {plan.needed_flops:.3g}")
    row(f"FLOPs done in a step (remat {job.model.remat})", f"{plan.done_flops:.3g}")
    row("checkpoint", _bytes(plan.checkpoint))
    row("of it on each host while it is written", _host(plan))
    row("rows a host reads in a step", f"{plan.rows_of_host:g} ({_bytes(plan.batch_of_host)})")
    if plan.times is not None and plan.mfu is not None and plan.tokens_per_day is not None:
        times = plan.times
        row("least seconds of a step: computing", f"{times.compute:.3f}")
        row("  memory", f"{times.memory:.3f}")
        row("  links", f"{times.links:.3f}")
        if times.host:
            row("  the host, there and back", f"{times.host:.3f}")
        row("  all at once, one after another", f"{times.least:.3f}, {times.most:.3f} (bound by {times.bound})")
        row("MFU at most", f"{plan.mfu[1]:.1%}, without overlap {plan.mfu[0]:.1%}")
        row("tokens a day at most", f"{plan.tokens_per_day[1]:.3g}, without overlap {plan.tokens_per_day[0]:.3g}")
        if plan.days is not None:
            days = f"{plan.days[0]:.3g}, without overlap {plan.days[1]:.3g}"
            row(f"days for {job.steps:,} steps at least", days)
    console.print(table)

    memory = Table()
    memory.add_column("memory of a device")
    memory.add_column("GB", justify="right")
    if isinstance(plan.compiled, Compiled):
        one = plan.compiled
        rows = {
            "state and batch": one.arguments,
            "  taken over by the new state": one.aliased,
            "temporary": one.temporary,
            "code": one.code,
        }
        if one.peak:
            rows["  in use at the worst moment, all in all"] = one.peak
        for name, size in rows.items():
            memory.add_row(name, f"{size / 1e9:.2f}")
        memory.add_row("all, as compiled", f"{one.total / 1e9:.2f}")
        memory.add_row("  by the analytic model", f"{plan.analytic.total / 1e9:.2f}")
    else:
        for name, size in plan.analytic.memory.items():
            memory.add_row(name, f"{size / 1e9:.2f}")
        memory.add_row("all, by the analytic model", f"{plan.analytic.total / 1e9:.2f}")
    if plan.limit is not None:
        memory.add_row("the chip has", f"{plan.limit / 1e9:.2f}")
    if plan.host:
        memory.add_row("besides, in the host's memory", f"{plan.host / 1e9:.2f}")
    console.print(memory)

    if plan.collectives:
        moved = Table()
        for name in ("collective", "mesh axes", "devices", "times a step", "GB", "GB sent"):
            moved.add_column(name, justify="left" if name in ("collective", "mesh axes") else "right")
        for each in plan.collectives:
            if each.payload < 1e-5 * plan.collectives[0].payload:
                continue
            sizes = f"{each.payload / 1e9:.3f}", f"{each.sent / 1e9:.3f}"
            moved.add_row(each.kind, " x ".join(each.axes), str(each.devices), f"{each.count:,}", *sizes)
        console.print(moved)
    if plan.fits is None:
        return
    if plan.fits:
        show(console, f"fits: {_bytes(plan.total)} of {_bytes(plan.limit or 0)}")
        return
    needs = _bytes(plan.total) if not isinstance(plan.compiled, TooLarge) or plan.compiled.total else "more"
    show(console, f"does not fit: needs {needs}, a chip has {_bytes(plan.limit or 0)}; {what_would_fit(plan)}")


def _host(plan: "Plan") -> str:
    chip = plan.topology.chip
    has = "" if chip is None else f" of the {_bytes(chip.host_memory)} that it has"
    return f"{_bytes(plan.checkpoint_of_host)}{has}"


def _show_search(console: "Console", topology: "Topology", plans: "list[Plan]", tried: int) -> None:
    from rich.table import Table

    from lm.commands.shared import show
    from lm.plan.search import flags

    if not plans:
        show(console, f"none of {tried} ways to spread this run over {topology.name} fits; take more chips")
        return
    table = Table()
    for name in ("mesh", "rows at once", "accumulate", "remat", "GB", "step at least", "one after another", "MFU"):
        table.add_column(name, justify="left" if name in ("mesh", "remat") else "right")
    for plan in plans[:_SHOWN]:
        times, mfu, train = plan.times, plan.mfu, plan.job.train
        assert times is not None
        assert mfu is not None
        mesh = " x ".join(f"{axis} {size}" for axis, size in plan.sizes.items() if size > 1)
        rows: Any = plan.to_dict()["rows_per_device"]
        how = "" if plan.compiled is None else " compiled"
        cells = (
            f"{plan.total / 1e9:.1f}{how}",
            f"{times.least:.3f}",
            f"{times.most:.3f}",
            f"{mfu[0]:.0%} to {mfu[1]:.0%}",
        )
        table.add_row(mesh or "one device", str(rows), str(train.accumulate), plan.job.model.remat, *cells)
    console.print(table)
    show(console, f"{len(plans)} of {tried} ways fit on {topology.name}; the best: {flags(plans[0])}")


def _bytes(count: float) -> str:
    from lm.report.page import size

    return size(count)
