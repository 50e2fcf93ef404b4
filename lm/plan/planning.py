"""A plan: whether a run fits on chips that need not be there, what moves between them, and how long it would take."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax

from lm import tree
from lm.config import Experiment
from lm.errors import check
from lm.plan.analytic import Estimate, estimate, state_bytes
from lm.plan.chips import Topology
from lm.plan.compiled import Compiled, TooLarge, compile_step
from lm.plan.hlo import Collective
from lm.plan.job import Job, bytes_of, make_job, one_device, rows_apart
from lm.plan.operations import product_flops
from lm.plan.roofline import Times, step_times
from lm.run.training import check_shares
from lm.sharding import sizes_of_axes

_DAY = 86400


@dataclass(frozen=True)
class Plan:
    """What is known of a run on a topology before it is started. Bytes are of one device unless said otherwise."""

    topology: Topology
    sizes: dict[str, int]
    job: Job
    parameters: int
    trained: int
    needed_flops: float
    """Operations of a step over all chips that the model needs: what MFU counts."""
    done_flops: float
    """Operations of a step over all chips that are done: recomputation and masked scores counted."""
    compiled: Compiled | TooLarge | None
    """None where nothing was compiled."""
    analytic: Estimate
    state: int
    checkpoint: int
    """Bytes of a checkpoint on disk."""
    checkpoint_of_host: int
    """Bytes that a host holds in memory while it writes its part."""
    rows_of_host: float
    """Rows of a step that a host reads."""
    batch_of_host: int
    """Bytes of them."""

    @property
    def total(self) -> int:
        """Bytes that a device must have."""
        if self.compiled is not None and self.compiled.total:
            return self.compiled.total
        return self.analytic.total

    @property
    def limit(self) -> int | None:
        """Bytes that a device has; None of fake ones."""
        return None if self.topology.chip is None else self.topology.chip.memory

    @property
    def host(self) -> int:
        """Bytes that wait in the host's memory for the backward pass, as compiled where that was done."""
        return self.compiled.host if isinstance(self.compiled, Compiled) and self.limit else self.analytic.host

    @property
    def fits(self) -> bool | None:
        """Whether the step's memory is there, on the device and its host; None of fake devices."""
        chip = self.topology.chip
        if chip is None:
            return None
        enough = self.total <= chip.memory and self.host * chip.chips_per_host <= chip.host_memory
        return not isinstance(self.compiled, TooLarge) and enough

    @property
    def collectives(self) -> list[Collective]:
        """Collectives of a step, as compiled where that was done."""
        return self.compiled.collectives if isinstance(self.compiled, Compiled) else self.analytic.collectives

    @property
    def traffic(self) -> int:
        """Bytes to and from memory in a step, as compiled for TPUs where that was done."""
        if isinstance(self.compiled, Compiled) and self.topology.platform != "gpu":
            return self.compiled.traffic
        return self.analytic.traffic

    @property
    def times(self) -> Times | None:
        """The least times of a step."""
        across = self.job.experiment.mesh.between_slices
        work = (self.done_flops, self.traffic, self.collectives)
        host = self.host * self.job.train.accumulate  # for each part anew
        return step_times(self.topology, self.sizes, *work, host=host, across=across)

    @property
    def mfu(self) -> tuple[float, float] | None:
        """Model FLOPs utilisation: where nothing overlaps and where everything does."""
        times, chip = self.times, self.topology.chip
        if times is None or chip is None:
            return None
        best = self.needed_flops / (chip.flops * self.topology.devices)
        return best / times.most, best / times.least

    @property
    def tokens_per_day(self) -> tuple[float, float] | None:
        """Tokens of a day: where nothing overlaps and where everything does."""
        if self.times is None:
            return None
        tokens = self.job.tokens_per_step * _DAY
        return tokens / self.times.most, tokens / self.times.least

    @property
    def days(self) -> tuple[float, float] | None:
        """Days of the configured run: where everything overlaps and where nothing does; None in epochs."""
        if self.times is None or self.job.steps is None:
            return None
        return self.job.steps * self.times.least / _DAY, self.job.steps * self.times.most / _DAY

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON."""
        times, compiled = self.times, self.compiled
        train, model = self.job.train, self.job.experiment.model
        return {
            "topology": self.topology.name,
            "devices": self.topology.devices,
            "hosts": self.topology.hosts,
            "chip": None if self.topology.chip is None else dataclasses.asdict(self.topology.chip),
            "mesh": self.sizes,
            "batch_size": train.batch_size,
            "accumulate": train.accumulate,
            "rows_per_device": train.batch_size // rows_apart(self.sizes) // train.accumulate,
            "remat": model.remat,
            "seq_len": self.job.lengths[0],
            "parameters": self.parameters,
            "trained_parameters": self.trained,
            "steps": self.job.steps,
            "tokens_per_step": self.job.tokens_per_step,
            "flops_per_token": self.job.flops_of_token(),
            "flops_per_step": self.needed_flops,
            "flops_done_per_step": self.done_flops,
            "memory": {
                "how": "analytic" if compiled is None else "compiled",
                "needed": self.total,
                "limit": self.limit,
                "fits": self.fits,
                "compiled": None
                if not isinstance(compiled, Compiled)
                else {
                    name: getattr(compiled, name)
                    for name in ("arguments", "aliased", "outputs", "temporary", "code", "peak", "total", "host")
                },
                "analytic": self.analytic.memory | {"total": self.analytic.total},
            },
            "collectives": [
                dataclasses.asdict(one) | {"axes": list(one.axes), "sent": one.sent} for one in self.collectives
            ],
            "memory_traffic": self.traffic,
            "seconds": None
            if times is None
            else {
                "compute": times.compute,
                "memory": times.memory,
                "links": times.links,
                "host": times.host,
                "overlapping": times.least,
                "one_after_another": times.most,
                "bound": times.bound,
            },
            "mfu": self.mfu,
            "tokens_per_day": self.tokens_per_day,
            "days": self.days,
            "checkpoint_bytes": self.checkpoint,
            "host": {
                "memory_of_activations": self.host * self.topology.devices // self.topology.hosts,
                "memory_while_saving": self.checkpoint_of_host,
                "memory": None if self.topology.chip is None else self.topology.chip.host_memory,
                "rows_per_step": self.rows_of_host,
                "batch_bytes": self.batch_of_host,
            },
        }


def plan_run(
    experiment: Experiment, topology: Topology, how: Literal["auto", "yes", "no"] = "auto"
) -> tuple[Plan, list[str]]:
    """Plans a run.

    Args:
      experiment: the run's settings.
      topology: what it is to run on.
      how: `yes` compiles the step, `no` takes the analytic model alone, `auto` compiles wherever that can be done here:
        for TPUs, fake CPU devices and, for its collectives, GPUs up to 64.

    Returns:
      The plan, and what was changed of the settings to make it, a line each.

    Raises:
      UserError: settings, mesh or batch that a run would refuse as well.
    """
    job = checked_job(experiment, topology)
    sizes = sizes_of_axes(experiment.mesh, topology.devices, f"the {topology.devices} devices of the topology")
    job, notes = fitted(job, sizes)
    check_shares(job.experiment, sizes)
    across = experiment.mesh.between_slices
    check(
        sizes[across] % topology.slices == 0,
        f"mesh.{across} is {sizes[across]}, and topology {topology.name} has {topology.slices} slices that it runs"
        f" between (mesh.between_slices); make it a multiple of {topology.slices}",
    )
    check(
        how != "yes" or topology.platform != "gpu",
        f"topology {topology.name}: nothing compiles for GPUs that are not here; leave --compile at auto",
    )
    compiled = None
    if how == "yes" or (how == "auto" and topology.platform != "gpu"):
        compiled = compile_step(job, topology, sizes)
    return make_plan(job, topology, sizes, compiled), notes


def checked_job(experiment: Experiment, topology: Topology) -> Job:
    """The job of an experiment on a topology, its mesh aside.

    Raises:
      UserError: settings that a run would refuse as well.
    """
    job = make_job(experiment, topology.platform)
    check(
        experiment.mesh.devices is None,
        f"mesh.devices is {experiment.mesh.devices}, and a plan is for all chips of its topology; leave it at None, and"
        " name a topology of so many",
    )
    return job


def fitted(job: Job, sizes: Mapping[str, int]) -> tuple[Job, list[str]]:
    """The job with at most so many accumulation steps as its batch has rows for on such a mesh, and what to say of it.

    A config is written for some number of devices; on more of them its batch is cut into fewer parts.
    """
    train, apart = job.train, rows_apart(sizes)
    rows = train.batch_size // apart
    if train.batch_size % apart or rows % train.accumulate == 0:
        return job, []
    accumulate = max(n for n in range(1, train.accumulate + 1) if rows % n == 0)
    note = (
        f"train.accumulate {train.accumulate} does not divide the {rows} rows of a device; planned with"
        f" --train.accumulate {accumulate}"
    )
    return with_settings(job, accumulate=accumulate), [note]


def with_settings(
    job: Job,
    *,
    accumulate: int | None = None,
    batch_size: int | None = None,
    remat: Literal["none", "dots", "offload", "full"] | None = None,
) -> Job:
    """The job with some settings changed; None leaves one as it is."""
    experiment, model = job.experiment, job.model
    train = experiment.train
    train = dataclasses.replace(
        train,
        accumulate=train.accumulate if accumulate is None else accumulate,
        batch_size=train.batch_size if batch_size is None else batch_size,
    )
    if remat is not None:
        model = dataclasses.replace(model, remat=remat)
        experiment = dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, remat=remat))
    return dataclasses.replace(job, experiment=dataclasses.replace(experiment, train=train), model=model)


def make_plan(
    job: Job, topology: Topology, sizes: Mapping[str, int], compiled: Compiled | TooLarge | None = None
) -> Plan:
    """The plan of a job on a mesh that it fits."""
    state = job.state()
    tokens = job.tokens_per_step
    saved = bytes_of(job.stored())
    hosts = topology.hosts
    rows = job.train.batch_size / min(hosts, rows_apart(sizes))
    return Plan(
        topology=topology,
        sizes=dict(sizes),
        job=job,
        parameters=tree.count_parameters((state.params, state.frozen)),
        trained=tree.count_parameters(state.params),
        needed_flops=float(job.flops_of_token()) * tokens,
        done_flops=float(flops_of_row(job)) * job.train.batch_size,
        compiled=compiled,
        analytic=estimate(job, sizes, topology.chip),
        state=state_bytes(job, sizes),
        checkpoint=saved,
        checkpoint_of_host=-(-saved // hosts),
        rows_of_host=rows,
        batch_of_host=int(bytes_of(job.batch(1)) * rows),
    )


_flops: dict[tuple[Any, ...], int] = {}


def flops_of_row(job: Job) -> int:
    """Operations of the matrix products of a step for each row of its batch."""
    key = (job.model, job.task, job.experiment.data, job.experiment.optim)
    if key not in _flops:
        alone = with_settings(job, accumulate=1, batch_size=1)
        mesh = one_device()
        program = alone.program(mesh)
        step: Any = program.train_step
        with jax.set_mesh(mesh):
            _flops[key] = product_flops(step.trace(program.target, alone.batch()).jaxpr.jaxpr)
    return _flops[key]
