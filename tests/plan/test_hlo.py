"""Collectives and traffic: of texts whose answer is known by hand, of programs whose answer follows from shapes."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lm.plan.hlo import GATHERED_BY_SUMS, Collective, Program

SIZES = {"data": 2, "fsdp": 4, "tensor": 2}

# A loop of 8 rounds (its counter goes up by 2 to 16), a gather in it, an array that is summed, and a reduce-scatter as
# TPUs write it: a fusion of a sum and a slice.
TEXT = """HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%all-reduce-scatter (input: f32[64,8]) -> f32[16,8] {
  %input = f32[64,8]{1,0} parameter(0)
  %all-reduce.9 = f32[64,8]{1,0} all-reduce(%input), channel_id=9, replica_groups=[4,4]<=[2,4,2]T(0,2,1), to_apply=%add
  %zero = s32[] constant(0)
  ROOT %mine = f32[16,8]{1,0} dynamic-slice(%all-reduce.9, %zero, %zero), dynamic_slice_sizes={16,8}
}

%body (state: (s32[], bf16[4,100])) -> (s32[], bf16[4,100]) {
  %state = (s32[], bf16[4,100]{1,0}) parameter(0)
  %at = s32[] get-tuple-element(%state), index=0
  %two = s32[] constant(2)
  %next = s32[] add(%at, %two)
  %part = bf16[4,100]{1,0} get-tuple-element(%state), index=1
  %whole = bf16[16,100]{1,0} all-gather(%part), channel_id=1, replica_groups=BY_FSDP, dimensions={0}
  ROOT %out = (s32[], bf16[4,100]{1,0}) tuple(%next, %part)
}

%condition (state.1: (s32[], bf16[4,100])) -> pred[] {
  %state.1 = (s32[], bf16[4,100]{1,0}) parameter(0)
  %limit = s32[] constant(16)
  %at.1 = s32[] get-tuple-element(%state.1), index=0
  ROOT %less = pred[] compare(%at.1, %limit), direction=LT
}

ENTRY %main (a: bf16[4,100], b: f32[64,8]) -> f32[16,8] {
  %a = bf16[4,100]{1,0} parameter(0)
  %b = f32[64,8]{1,0} parameter(1)
  %start = s32[] constant(0)
  %first = (s32[], bf16[4,100]{1,0}) tuple(%start, %a)
  %loop = (s32[], bf16[4,100]{1,0}) while(%first), condition=%condition, body=%body
  %all-reduce.1 = (f32[64,8]{1,0}) all-reduce(%b), channel_id=2, replica_groups=BY_TENSOR, to_apply=%add
  %summed = f32[64,8]{1,0} get-tuple-element(%all-reduce.1), index=0
  %moved = f32[64,8]{1,0} collective-permute(%summed), channel_id=3, source_target_pairs={{0,8},{8,0},{1,9},{9,1}}
  ROOT %scattered = f32[16,8]{1,0} fusion(%moved), kind=kCustom, calls=%all-reduce-scatter
}
""".replace("BY_FSDP", "{{0,2,4,6},{1,3,5,7},{8,10,12,14},{9,11,13,15}}")
BY_TENSOR = "mesh['axis_0'=8,'axis_1'=2] {'axis_1'}"


def known() -> str:
    return TEXT.replace("BY_TENSOR", BY_TENSOR)


def test_loops_groups_and_fusions_of_a_known_text():
    found = {(one.kind, one.axes): one for one in Program(known()).collectives(SIZES)}
    assert found.keys() == {
        ("all-gather", ("fsdp",)),
        ("all-reduce", ("tensor",)),
        ("collective-permute", ("data",)),
        ("reduce-scatter", ("fsdp",)),
    }
    gather = found["all-gather", ("fsdp",)]
    assert (gather.devices, gather.count, gather.payload) == (4, 8, 8 * 16 * 100 * 2)
    assert gather.sent == gather.payload * 3 / 4
    assert found["all-reduce", ("tensor",)].payload == found["reduce-scatter", ("fsdp",)].payload == 64 * 8 * 4


def test_a_collective_that_several_fusions_do_together_counts_once():
    piece = known().replace(
        "ROOT %scattered",
        "%again = f32[16,8]{1,0} fusion(%moved), kind=kCustom, calls=%all-reduce-scatter\n  ROOT %scattered",
    )
    assert Program(piece).collectives(SIZES) == Program(known()).collectives(SIZES)


def test_those_that_stand_alone_count_each_whatever_their_channel():
    """All that `jax.shard_map` writes has channel 1."""
    line = next(line for line in known().splitlines() if "%whole = " in line)
    doubled = known().replace(line, f"{line}\n{line.replace('%whole', '%other')}")
    gathers = [
        next(one for one in Program(text).collectives(SIZES) if one.kind == "all-gather") for text in (known(), doubled)
    ]
    assert gathers[1].payload == 2 * gathers[0].payload


def test_what_a_device_sends_to_itself_is_not_moved():
    text = known().replace("{{0,8},{8,0},{1,9},{9,1}}", "{{0,0},{1,1}}")
    assert "collective-permute" not in {one.kind for one in Program(text).collectives(SIZES)}


def test_what_is_handed_to_the_host_goes_to_other_slices():
    attributes = '_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_transfer_type="ALL_REDUCE"'
    line = (
        "  %go = token[] after-all()\n"
        "  %handed = (f32[64,8]{1,0}, u32[], token[]) send(%b, %go), channel_id=9, is_host_transfer=true,"
        f" frontend_attributes={{{attributes}}}\n"
    )
    text = known().replace("  %start = s32[]", f"{line}  %start = s32[]", 1)
    found = Program(text).collectives(SIZES, 2, "data")
    crossing = next(one for one in found if one.kind == "all-reduce between slices")
    assert (crossing.axes, crossing.devices, crossing.payload, crossing.sent) == (("data",), 2, 2048, 2048)
    assert len(found) == len(Program(known()).collectives(SIZES)) + 1


def test_a_device_part_among_zeros_that_is_summed_is_a_gather():
    text = (
        known()
        .replace("all-reduce(%b)", "all-reduce(%placed)")
        .replace(
            "  %all-reduce.1",
            "  %placed = f32[64,8]{1,0} dynamic-update-slice(%b, %b, %start, %start)\n  %all-reduce.1",
        )
    )
    kinds = [one.kind for one in Program(text).collectives(SIZES)]
    assert GATHERED_BY_SUMS in kinds
    assert "all-reduce" not in kinds


@pytest.mark.parametrize(
    ("groups", "axes"),
    [
        ("replica_groups={{0,8},{1,9},{2,10},{3,11},{4,12},{5,13},{6,14},{7,15}}", ("data",)),
        ("replica_groups=[8,2]<=[16]", ("tensor",)),
        ("replica_groups=[8,2]<=[2,8]T(1,0)", ("data",)),
        ("replica_groups=[4,4]<=[8,2]T(1,0)", ("fsdp",)),
        ("replica_groups=mesh['a'=2,'b'=4,'c'=2] {'b'}", ("fsdp",)),
        ("replica_groups=mesh['a'=2,'b'=4,'c'=2] {'a','b'}", ("data", "fsdp")),
        ("replica_groups=mesh['a'=16] {'a':(2)4}", ("fsdp",)),
        ("replica_groups=mesh['a'=8,'b'=2], device_ids=([2,8]T(1,0)) {'b'}", ("data",)),
        ("replica_groups={}", ("data", "fsdp", "tensor")),
    ],
)
def test_every_way_to_write_groups(groups: str, axes: tuple[str, ...]):
    """Devices are numbered along the mesh, its last axis fastest."""
    text = TEXT.replace("replica_groups=BY_TENSOR", groups)
    found = next(one for one in Program(text).collectives(SIZES) if one.kind == "all-reduce")
    assert found.axes == axes


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def test_a_scanned_gather_counts_as_often_as_it_runs(mesh):
    """Layers of `[64, 32]` that lie split over fsdp: each is gathered once, whatever the compiler does besides."""
    layers = jax.ShapeDtypeStruct((6, 64, 32), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(None, "fsdp")))
    rows = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))

    def apply(rows, layers):
        whole = NamedSharding(mesh, PartitionSpec())

        def one(x, layer):
            layer = jax.lax.with_sharding_constraint(layer, whole)
            return jnp.tanh(x @ layer @ layer.T), None

        return jax.lax.scan(one, rows, layers)[0]

    text = jax.jit(apply).lower(rows, layers).compile().as_text()
    found = [one for one in Program(text).collectives({"data": 2, "fsdp": 4}) if one.kind == "all-gather"]
    assert [(one.axes, one.devices, one.payload) for one in found] == [(("fsdp",), 4, 6 * 64 * 32 * 4)]


def test_traffic_counts_slices_and_rounds():
    """A sum over 10 rounds of a slice each reads the array once, not ten times."""
    array = jax.ShapeDtypeStruct((10, 1024, 256), jnp.float32)

    def total(array):
        return jax.lax.scan(lambda sum, part: (sum + part, None), jnp.zeros((1024, 256)), array)[0]

    traffic = Program(jax.jit(total).lower(array).compile().as_text()).traffic()
    whole = 10 * 1024 * 256 * 4
    assert 3 * whole <= traffic <= 4 * whole  # each part read, the sum read and written


def test_what_is_sent_around_a_ring():
    of = {
        kind: Collective(kind, ("fsdp",), 4, 100.0, 1).sent
        for kind in ("all-gather", "all-reduce", "collective-permute")
    }
    assert of == {"all-gather": 75.0, "all-reduce": 150.0, "collective-permute": 100.0}
