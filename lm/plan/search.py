"""Meshes, accumulation and recomputation tried one by one on the analytic model; those that fit, the fastest first."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, get_args

from lm.errors import check
from lm.plan.analytic import estimate
from lm.plan.chips import Topology
from lm.plan.job import Job, rows_apart
from lm.plan.planning import Plan, make_plan, with_settings
from lm.sharding import MESH_AXES

Remat = Literal["none", "dots", "offload", "full"]

# Tensor parallelism sums activations twice a layer in each direction, which wants the closest devices.
_MOST_TENSOR = 16
# Keys and values of the whole row come to each device in every layer, which the work of its own tokens has to be worth:
# LLaMA 3 splits rows of 131,072 over 16 (arXiv:2407.21783, table 4).
_LEAST_CONTEXT = 8192


def search(job: Job, topology: Topology) -> tuple[list[Plan], int]:
    """Plans of all ways to spread a job over a topology that fit, by the analytic model.

    The batch of a step stays as it is: what is tried computes the same.

    Returns:
      Plans, the fastest first (where times are equal, that with the least memory), and how many ways were tried.

    Raises:
      UserError: no mesh divides the batch, or the topology has no chips to fit.
    """
    chip = topology.chip
    check(
        chip is not None,
        f"topology {topology.name} has neither speed nor a limit of memory; search on chips, such as v5p:4x4x4",
    )
    assert chip is not None
    found, tried = [], 0
    length = job.lengths[0] + job.model.prompt_len
    for sizes in meshes(topology.devices, job.model.n_heads, length):
        if sizes[job.experiment.mesh.between_slices] % topology.slices:
            continue
        apart = rows_apart(sizes)
        if job.train.batch_size % apart:
            continue
        rows = job.train.batch_size // apart
        for remat in get_args(Remat):
            for accumulate in (n for n in range(1, rows + 1) if rows % n == 0):
                tried += 1
                one = with_settings(job, accumulate=accumulate, remat=remat)
                needs = estimate(one, sizes, chip)
                if needs.total <= chip.memory and needs.host * chip.chips_per_host <= chip.host_memory:
                    found.append(make_plan(one, topology, sizes))
                    break  # more parts gather parameters more often
    check(
        tried,
        f"no mesh of {topology.devices} chips divides train.batch_size {job.train.batch_size}; change it, or the"
        " topology",
    )
    return sorted(found, key=_rank), tried


def _rank(plan: Plan) -> tuple[float, float]:
    times = plan.times
    assert times is not None
    # Between the best and the worst case: what overlaps is not known.
    return round((times.least + times.most) / 2, 6), plan.total


def meshes(devices: int, heads: int, length: int) -> Iterator[dict[str, int]]:
    """All ways to multiply the axes to so many devices.

    Args:
      devices: their number.
      heads: of queries, which `tensor` divides.
      length: tokens of a row, of which `context` leaves each device 8,192 or more, in two equal chunks.
    """
    for tensor in (n for n in range(1, _MOST_TENSOR + 1) if devices % n == 0 and heads % n == 0):
        most = max(length // _LEAST_CONTEXT, 1)
        for context in (
            n for n in range(1, most + 1) if devices // tensor % n == 0 and (n == 1 or length % (2 * n) == 0)
        ):
            rest = devices // tensor // context
            for fsdp in (n for n in range(1, rest + 1) if rest % n == 0):
                axes = {"data": rest // fsdp, "fsdp": fsdp, "context": context, "tensor": tensor}
                sizes = {axis: axes[axis] for axis in MESH_AXES}
                assert math.prod(sizes.values()) == devices
                yield sizes


def what_would_fit(plan: Plan) -> str:
    """What to change of a run that doesn't fit, in words: on these chips, or how many more it takes."""
    job, topology = plan.job, plan.topology
    assert topology.chip is not None
    plans, _ = search(job, topology)
    if plans:
        best = plans[0]
        return f"on these chips it fits with {flags(best)}"
    chip, devices = topology.chip, topology.devices
    more = devices * 2
    while more <= max(devices * 64, 64) and (not chip.largest or more <= chip.largest):
        if job.train.batch_size % more == 0:
            wider = Topology(f"{chip.name}:{more}", chip, (more,))
            sizes = dict.fromkeys(MESH_AXES, 1) | {"fsdp": more}
            tried = make_plan(with_settings(job, accumulate=job.train.batch_size // more, remat="full"), wider, sizes)
            if tried.fits:
                return f"it would fit on {more} chips with {flags(tried)}"
        more *= 2
    return f"no mesh of up to {more // 2} chips fits this batch; a smaller model, lower precision or other chips would"


def flags(plan: Plan) -> str:
    """The settings of a plan as they are typed."""
    shape = " ".join(f"--mesh.{axis} {size}" for axis, size in plan.sizes.items())
    return f"{shape} --train.accumulate {plan.job.train.accumulate} --model.remat {plan.job.model.remat}"
