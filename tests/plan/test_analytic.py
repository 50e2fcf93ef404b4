"""The analytic model beside what compilers make of the same steps."""

import dataclasses
import importlib.util
import math
from typing import Any

import jax
import pytest

from lm.config import Experiment
from lm.data.config import DataConfig
from lm.models.presets import llama
from lm.plan.analytic import attention_kernel, estimate, local_bytes, state_bytes
from lm.plan.chips import CHIPS, parse_topology
from lm.plan.compiled import Compiled, compile_step
from lm.plan.job import Job, make_job
from lm.plan.planning import with_settings
from lm.sharding import DEFAULT_RULES, MESH_AXES, MeshConfig, Rules, make_mesh, sizes_of_axes
from lm.tasks.causal_lm import CausalLM
from lm.text.tokenizer import TokenizerConfig
from lm.train import TrainConfig


def job(
    platform: str = "cpu",
    train: dict[str, Any] | None = None,
    loss_chunk: int = 16,
    rules: Rules = DEFAULT_RULES,
    length: int = 32,
    **model: Any,
) -> Job:
    small = {
        "d_model": 64,
        "n_layers": 3,
        "n_heads": 4,
        "n_kv_heads": 2,
        "d_ff": 128,
        "vocab_size": 512,
        "max_len": 256,
    }
    return make_job(
        Experiment(
            model=llama("1b", unroll=1, **(small | {"max_len": length} | model)),
            data=DataConfig(seq_len=length),
            tokenizer=TokenizerConfig(kind="byte"),
            task=CausalLM(loss_chunk=loss_chunk),
            train=TrainConfig(**({"steps": 10, "batch_size": 16} | (train or {}))),
            mesh=MeshConfig(rules=rules),
        ),
        platform,
    )


def mesh_of(**axes: int) -> dict[str, int]:
    return sizes_of_axes(MeshConfig(**({"data": 1} | axes)), 8, "8")


@pytest.mark.parametrize("axes", [{"fsdp": 8}, {"data": 2, "fsdp": 4}, {"data": 8}])
@pytest.mark.parametrize("remat", ["full", "dots"])
def test_collectives_are_those_of_the_compiled_step(axes: dict[str, int], remat: str):
    """In float32, as XLA sums nothing else on CPUs; in one piece along `data`, over which it sums each piece there."""
    sizes = mesh_of(**axes)
    one = job(remat=remat, loss_chunk=16 if sizes["data"] == 1 else 0)
    compiled = compile_step(one, parse_topology("cpu:8"), sizes)
    assert isinstance(compiled, Compiled)
    found = estimate(one, sizes, None).collectives
    for name in ("data", "fsdp"):
        sums = [sum(c.payload for c in each if name in c.axes) for each in (found, compiled.collectives)]
        assert sums[0] == pytest.approx(sums[1], rel=0.1)


@pytest.mark.parametrize(
    ("axes", "rules"),
    [
        ({"fsdp": 4, "context": 2}, Rules()),
        ({"context": 8}, Rules()),
        ({"fsdp": 2, "context": 2, "tensor": 2}, Rules()),
        ({"fsdp": 4, "tensor": 2}, Rules(residual_length=("context", "tensor"))),
    ],
)
@pytest.mark.parametrize("remat", ["full", "dots"])
def test_collectives_of_split_rows_are_those_of_the_compiled_step(axes: dict[str, int], rules: Rules, remat: str):
    sizes = mesh_of(**axes)
    one = job(remat=remat, loss_chunk=0, rules=rules, length=256)
    compiled = compile_step(one, parse_topology("cpu:8"), sizes)
    assert isinstance(compiled, Compiled)
    found = estimate(one, sizes, None).collectives
    for name in axes:
        sums = [sum(c.payload for c in each if name in c.axes) for each in (found, compiled.collectives)]
        assert sums[0] == pytest.approx(sums[1], rel=0.1), name
    kinds = [{c.kind for c in each if c.axes == ("context",)} for each in (found, compiled.collectives)]
    assert kinds[0] == kinds[1]


def test_memory_falls_where_rows_and_the_stream_are_split():
    chip, kept = CHIPS["v5p"], "kept for the backward pass"
    one = job("tpu", remat="dots", max_len=8192, length=8192, train={"batch_size": 8})
    alone, spread = (estimate(one, dict.fromkeys(MESH_AXES, 1) | {"context": n}, chip).memory for n in (1, 8))
    assert alone[kept] == 8 * spread[kept]
    assert alone["work"] > 8 * spread["work"], "scores exist for a pair of blocks at a time"
    rules = (Rules(), Rules(residual_length=("context", "tensor")))
    sizes = mesh_of(fsdp=4, tensor=2)
    whole, split = (estimate(job("tpu", remat="full", rules=one), sizes, chip).memory for one in rules)
    assert whole[kept] == 2 * split[kept]


def test_accumulation_moves_as_often_as_it_computes():
    once, twice = (estimate(job(train={"accumulate": n}), mesh_of(fsdp=4, data=2), None).collectives for n in (1, 2))
    assert sum(c.payload for c in twice) == pytest.approx(2 * sum(c.payload for c in once))


def test_the_state_on_a_device_is_what_its_shardings_say():
    one = job()
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    target = one.program(mesh).target
    planned = state_bytes(one, dict(mesh.shape))
    shards = [
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(target)
    ]
    assert planned == sum(shards)
    assert local_bytes(target, jax.tree.map(lambda leaf: leaf.sharding, target)) == planned
    assert state_bytes(one, mesh_of(data=8)) > 3.5 * planned


def test_memory_falls_with_recomputation_and_with_rows_at_once():
    chip, sizes = CHIPS["v5p"], mesh_of(fsdp=8)
    totals = [estimate(job("tpu", remat=remat), sizes, chip).total for remat in ("none", "dots", "full")]
    assert totals == sorted(totals, reverse=True)
    parts = [estimate(job("tpu", train={"accumulate": n}), sizes, chip).memory for n in (1, 2)]
    assert parts[1]["kept for the backward pass"] * 2 == parts[0]["kept for the backward pass"]


def test_a_kernel_that_keeps_its_scores_needs_no_memory_for_them():
    half = job("gpu", compute_dtype="bfloat16", remat="dots")
    assert attention_kernel(half, "gpu", 32) == "cudnn"
    written = dataclasses.replace(
        half, experiment=dataclasses.replace(half.experiment, model=dataclasses.replace(half.model, attention="xla"))
    )
    plans = [estimate(one, mesh_of(fsdp=8), CHIPS["h100"]) for one in (half, written)]
    assert plans[0].traffic < plans[1].traffic
    assert plans[0].memory["work"] <= plans[1].memory["work"]


# Compiled anew: minutes each.
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize(
    ("topology", "axes", "remat"),
    [
        ("v5p:2x2x1", {"fsdp": 4}, "full"),
        ("v5p:2x2x1", {"data": 4}, "full"),
        ("v5p:2x2x1", {"fsdp": 4}, "dots"),
        ("v5p:2x2x1", {"fsdp": 4}, "offload"),
        ("v5p:2x2x1", {"fsdp": 2, "context": 2}, "full"),
        ("v5p:2x2x1", {"fsdp": 2, "tensor": 2}, "full"),
    ],
)
def test_within_ten_percent_of_what_is_compiled_for_tpus(topology: str, axes: dict[str, int], remat: Any):
    rows, length = (2, 8192) if "context" in axes else (16, 2048)
    slice_ = parse_topology(topology)
    sizes = sizes_of_axes(MeshConfig(**({"data": 1} | axes)), slice_.devices, "them")
    one = make_job(
        Experiment(
            model=llama("1b", compute_dtype="bfloat16", unroll=1, remat=remat, max_len=8192),
            data=DataConfig(seq_len=length),
            tokenizer=TokenizerConfig(kind="byte"),
            task=CausalLM(loss_chunk=256),
            train=TrainConfig(steps=10, batch_size=rows),
        ),
        "tpu",
    )
    compiled = compile_step(with_settings(one), slice_, sizes)
    assert isinstance(compiled, Compiled)
    found = estimate(one, sizes, slice_.chip)
    assert found.total == pytest.approx(compiled.total, rel=0.1)
    sums = [sum(c.payload for c in each) for each in (found.collectives, compiled.collectives)]
    assert sums[0] == pytest.approx(sums[1], rel=0.1)
    assert found.host == compiled.host
