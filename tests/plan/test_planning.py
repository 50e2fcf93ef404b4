"""Times, searches and what a plan says, from numbers that can be worked out by hand."""

import dataclasses
import json
import math
from pathlib import Path

import pytest

from lm import config as configs
from lm.errors import UserError
from lm.plan.chips import parse_topology
from lm.plan.compiled import needed_by
from lm.plan.hlo import Collective
from lm.plan.planning import plan_run
from lm.plan.roofline import Times, collective_seconds, step_times
from lm.plan.search import meshes, search, what_would_fit
from lm.sharding import MeshConfig

CONFIGS = Path(__file__).parent.parent.parent / "configs"
LLAMA_7B = configs.load_file(CONFIGS / "llama_7b.py")


def test_each_time_is_work_by_rate():
    topology = parse_topology("v5p:4x4x4")
    gather = Collective("all-gather", ("fsdp",), 64, 64e9, 10)
    times = step_times(topology, {"data": 1, "fsdp": 64, "tensor": 1}, 64 * 459e12 * 2, 2765e9 * 3, [gather])
    assert times is not None
    assert (times.compute, times.memory) == pytest.approx((2.0, 3.0))
    assert times.links == pytest.approx(63e9 / 600e9)
    assert times.bound == "memory"
    assert times.least == times.memory
    assert times.most == pytest.approx(5 + times.links)
    assert step_times(parse_topology("cpu:8"), {"data": 8, "fsdp": 1, "tensor": 1}, 1, 1, []) is None


def test_gpus_of_one_machine_talk_faster_than_machines():
    machines = parse_topology("h100:64")
    inside = Collective("all-gather", ("tensor",), 8, 8e9, 1)
    across = Collective("all-gather", ("fsdp",), 8, 8e9, 1)
    sizes = {"data": 1, "fsdp": 8, "tensor": 8}
    assert collective_seconds(machines, sizes, inside) == pytest.approx(7e9 / 450e9)
    # One GPU of each machine, over its own card.
    assert collective_seconds(machines, sizes, across) == pytest.approx(7e9 / 50e9)
    # All eight cards of a machine share what leaves it: seven eighths of the array.
    whole = Collective("all-gather", ("fsdp",), 64, 64e9, 1)
    assert collective_seconds(machines, {"data": 1, "fsdp": 64, "tensor": 1}, whole) == pytest.approx(
        max(63e9 / 450e9, 64e9 * 7 / 8 / (8 * 50e9))
    )


def test_slices_talk_over_the_network():
    topology = parse_topology("2xv5p:4x4x4")
    sizes = {"data": 4, "fsdp": 32, "context": 1, "tensor": 1}
    within = Collective("all-gather", ("fsdp",), 32, 32e9, 1)
    assert collective_seconds(topology, sizes, within) == pytest.approx(31e9 / 600e9)
    # Two chips of each slice sum the same: half of the array leaves each slice over each of them, and as much comes.
    across = Collective("all-reduce", ("data",), 4, 4e9, 1)
    assert collective_seconds(topology, sizes, across) == pytest.approx(2 * 4e9 / 2 / (2 * 6.25e9))
    assert collective_seconds(topology, sizes, across, "fsdp") == pytest.approx(6e9 / 600e9)
    crossing = Collective("all-reduce between slices", ("data",), 2, 2e9, 1)
    assert collective_seconds(topology, sizes, crossing) == pytest.approx(2e9 / 6.25e9)
    inside = Collective("all-reduce", ("data",), 2, 4e9, 1)  # of the four along data, those of one slice
    assert collective_seconds(topology, sizes, inside) == pytest.approx(4e9 / 600e9)
    with pytest.raises(UserError, match="multiple of 2"):
        plan_run(LLAMA_7B, topology, "no")
    plan, _ = plan_run(dataclasses.replace(LLAMA_7B, mesh=MeshConfig(data=2, fsdp=-1)), topology, "no")
    assert (plan.topology.devices, plan.sizes["fsdp"], plan.topology.hosts) == (128, 64, 32)
    assert any(across for one in plan.collectives if (across := "data" in one.axes))


def test_what_waits_in_the_hosts_memory_leaves_the_chip_and_takes_its_time():
    model = dataclasses.replace(LLAMA_7B.model, remat="offload")
    topology = parse_topology("v5p:4x4x4")
    plan, dots = (plan_run(one, topology, "no")[0] for one in (dataclasses.replace(LLAMA_7B, model=model), LLAMA_7B))
    # Queries, keys, values, attention's result; gate and up; of 2,048 tokens and 32 layers in bfloat16.
    products = 32 * 2048 * 2 * (4 * 4096 + 2 * 11008)
    assert plan.host == products
    kept = "kept for the backward pass"
    assert dots.analytic.memory[kept] - plan.analytic.memory[kept] == products
    assert plan.times is not None
    assert plan.job.train.accumulate == 8
    assert plan.times.host == pytest.approx(8 * 2 * products / 16e9), "there and back, for each part"
    assert dots.times is not None
    assert dots.times.host == 0
    assert plan.to_dict()["host"]["memory_of_activations"] == 4 * products


def test_a_search_ranks_what_fits_and_keeps_the_batch():
    job = plan_run(LLAMA_7B, parse_topology("v5p:4x4x4"), "no")[0].job
    plans, tried = search(job, parse_topology("v5p:2x2x2"))
    assert 0 < len(plans) < tried
    means = [round((plan.times.least + plan.times.most) / 2, 6) for plan in plans]
    assert means == sorted(means)
    assert all(plan.fits and plan.job.train.batch_size == 512 for plan in plans)
    assert len({(*plan.sizes.values(), plan.job.model.remat) for plan in plans}) == len(plans)


def test_meshes_multiply_to_the_chips():
    found = list(meshes(8, 12, 2048))
    assert all(sizes["data"] * sizes["fsdp"] * sizes["tensor"] == 8 for sizes in found)
    assert {sizes["tensor"] for sizes in found} == {1, 2, 4}
    assert len(found) == 4 + 3 + 2
    assert {sizes["context"] for sizes in found} == {1}


def test_long_rows_are_split_as_long_as_each_device_has_8192_tokens():
    found = list(meshes(8, 12, 32768))
    assert all(math.prod(sizes.values()) == 8 for sizes in found)
    assert {sizes["context"] for sizes in found} == {1, 2, 4}
    assert len({tuple(sizes.values()) for sizes in found}) == len(found)
    assert {sizes["context"] for sizes in meshes(8, 12, 32767)} == {1}, "two equal chunks each"


def test_what_does_not_fit_says_what_would():
    tiny_slice = dataclasses.replace(LLAMA_7B, mesh=MeshConfig(data=-1))
    plan, _ = plan_run(tiny_slice, parse_topology("v5e:4x4"), "no")
    assert plan.fits is False
    assert "--mesh.fsdp" in what_would_fit(plan)
    plan, _ = plan_run(LLAMA_7B, parse_topology("v5e:1x1"), "no")
    assert plan.fits is False
    assert "chips with" in what_would_fit(plan)


def test_more_devices_than_accumulation_was_meant_for_are_told():
    plan, notes = plan_run(LLAMA_7B, parse_topology("v5p:4x4x4"), "no")
    assert plan.job.train.accumulate == 8
    assert "--train.accumulate 8" in notes[0]
    train = dataclasses.replace(LLAMA_7B.train, accumulate=4)
    assert plan_run(dataclasses.replace(LLAMA_7B, train=train), parse_topology("v5p:4x4x4"), "no")[1] == []


def test_a_batch_or_mesh_that_does_not_divide_is_refused():
    train = dataclasses.replace(LLAMA_7B.train, batch_size=96, accumulate=1)
    with pytest.raises(UserError, match="not a multiple of 64"):
        plan_run(dataclasses.replace(LLAMA_7B, train=train), parse_topology("v5p:4x4x4"), "no")
    with pytest.raises(UserError, match="does not fit the 64 devices"):
        plan_run(dataclasses.replace(LLAMA_7B, mesh=MeshConfig(fsdp=48)), parse_topology("v5p:4x4x4"), "no")
    with pytest.raises(UserError, match=r"mesh\.devices"):
        plan_run(dataclasses.replace(LLAMA_7B, mesh=MeshConfig(devices=4)), parse_topology("v5p:4x4x4"), "no")


def test_what_a_plan_of_7b_says():
    """Numbers that follow from the config: 6.74B parameters, AdamW in float32, 135 billion tokens."""
    plan, _ = plan_run(LLAMA_7B, parse_topology("v5p:4x4x4"), "no")
    said = json.loads(json.dumps(plan.to_dict()))
    assert said["parameters"] == 6_738_415_616
    assert said["checkpoint_bytes"] == pytest.approx(12 * 6_738_415_616, rel=1e-6)
    assert said["host"]["memory_while_saving"] == pytest.approx(12 * 6_738_415_616 / 16, rel=1e-6)
    assert said["host"]["rows_per_step"] == 32
    assert said["steps"] * said["tokens_per_step"] == pytest.approx(135e9, rel=1e-4)
    assert said["flops_per_step"] == said["flops_per_token"] * said["tokens_per_step"]
    assert 1 < said["flops_done_per_step"] / said["flops_per_step"] < 4 / 3
    least, most = said["seconds"]["overlapping"], said["seconds"]["one_after_another"]
    assert said["days"] == [said["steps"] * least / 86400, said["steps"] * most / 86400]
    assert said["mfu"][1] == pytest.approx(said["flops_per_step"] / (64 * 459e12 * least))
    assert said["memory"]["fits"] is True


def test_the_compilers_complaint_says_how_much_it_wanted():
    early = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (17.90G) exceeds"
    )
    late = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 32.05G of 15.75G hbm. Exceeded by 16.30G."
    assert needed_by(early) == int(17.90 * 2**30)
    assert needed_by(late) == int(32.05 * 2**30)
    assert needed_by("RESOURCE_EXHAUSTED: something else") == 0
    assert needed_by("INTERNAL: broken") is None


def test_times_add_up():
    times = Times(1.0, 2.0, 4.0)
    assert (times.least, times.most, times.bound) == (4.0, 7.0, "links")
