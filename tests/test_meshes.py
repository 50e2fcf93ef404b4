"""One device or eight, whole batch or parts: the same losses, the same start, the same checkpoints."""

from dataclasses import replace

import jax
import numpy as np
import pytest
import small_runs
import tiny

from lm import run as runs
from lm.checkpoint import Checkpoints
from lm.evaluate import to_devices
from lm.models.transformer import Transformer
from lm.optim import OptimConfig, make_optimizer, make_schedule
from lm.sharding import MeshConfig, Rules, make_mesh
from lm.tasks.causal_lm import CausalLM
from lm.train import TrainConfig, abstract_params, make_program

STEPS, ROWS, LENGTH = 20, 32, 12
SEQUENCE = Rules(residual_length=("context", "tensor"))  # tokens between blocks lie on both axes
MESHES = {
    "one": MeshConfig(devices=1),
    "data 8": MeshConfig(data=8),
    "fsdp 8": MeshConfig(fsdp=8),
    "tensor 4, data 2": MeshConfig(tensor=4),
    "fsdp 2, tensor 2, data 2": MeshConfig(fsdp=2, tensor=2),
    "context 2, tensor 2, data 2, sequence": MeshConfig(context=2, tensor=2, rules=SEQUENCE),
}
EIGHT = [name for name in MESHES if name != "one"]
OPTIM = OptimConfig(peak_lr=1e-2, warmup=5)

# GPT-2's kind on a stream, its 61 ids no multiple of any mesh axis; LLaMA's kind on packed documents, its two
# key/value heads on four tensor devices, its loss in chunks that do not divide the length.
STREAM = (tiny.config(vocab_size=61, unroll=1, attention="blocked"), CausalLM())
PACKED = (
    tiny.config(
        positions="rope",
        norm="rmsnorm",
        activation="swiglu",
        use_bias=False,
        tie_embeddings=False,
        n_kv_heads=2,
        qk_norm=True,
        unroll=1,
    ),
    CausalLM(loss_chunk=5, z_loss=1e-3),
)


def build(kind, mesh: str, accumulate: int = 1, ema_decay: float = 0.0):
    config, task = kind
    if mesh == EIGHT[3]:
        config = replace(config, unroll=0)  # no part of the result, here as elsewhere
    rules, mesh = MESHES[mesh].rules, make_mesh(MESHES[mesh])
    schedule = make_schedule(OPTIM, STEPS)
    params, _ = abstract_params(Transformer(config), mesh)
    train = TrainConfig(steps=STEPS, batch_size=ROWS, accumulate=accumulate, ema_decay=ema_decay)
    return make_program(
        Transformer(config), task, make_optimizer(OPTIM, schedule, params), schedule, train, mesh, rules=rules
    )


def losses(kind, mesh: str, accumulate: int = 1) -> np.ndarray:
    """Of every step, on the same two batches again and again."""
    make = tiny.stream_batch if kind is STREAM else tiny.packed_batch
    program = build(kind, mesh, accumulate)
    with jax.set_mesh(program.mesh):
        state, values = program.init(), []
        for step in range(STEPS):
            batch = make(ROWS, LENGTH, kind[0].vocab_size, seed=step % 2)
            state, report = program.train_step(state, to_devices(batch, program.mesh))
            values.append(report["loss"] / report["weight"])
        assert int(state.skipped) == 0
        return np.array([float(value) for value in values])


@pytest.fixture(scope="module")
def on_one_device():
    known = {id(kind): losses(kind, "one") for kind in (STREAM, PACKED)}
    for values in known.values():
        assert values[-1] < values[0] - 0.2  # it learns, so that twenty equal losses mean something
    return known


# Weights differ from row to row and one row in each batch has none: a mean of means would show.
@pytest.mark.parametrize(
    ("kind", "mesh", "accumulate"),
    [(STREAM, "one", 4), (PACKED, "one", 4)]
    + [pytest.param(STREAM, mesh, 1, marks=pytest.mark.slow) for mesh in EIGHT[:3]]
    + [(STREAM, mesh, 1) for mesh in EIGHT[3:4]]
    + [(PACKED, mesh, 4) for mesh in EIGHT[:3]]
    + [(PACKED, EIGHT[3], 1), (STREAM, EIGHT[4], 4)],
    ids=lambda x: x if isinstance(x, str) else {id(STREAM): "stream", id(PACKED): "packed"}.get(id(x), str(x)),
)
def test_losses_of_twenty_steps_are_those_of_one_device(on_one_device, kind, mesh, accumulate):
    np.testing.assert_allclose(losses(kind, mesh, accumulate), on_one_device[id(kind)], rtol=1e-5)


@pytest.fixture(scope="module")
def programs():
    """A program with averages for each mesh, and its initial state."""
    built = {name: build(PACKED, name, ema_decay=0.9) for name in MESHES}
    states = {}
    for name, program in built.items():
        with jax.set_mesh(program.mesh):
            states[name] = program.init()
    return built, states


def test_initial_state_is_the_same_to_the_bit_and_born_where_it_belongs(programs):
    built, states = programs
    for name in EIGHT:
        tiny.assert_trees_equal(states[name], states["one"])
        for leaf, wanted in zip(jax.tree.leaves(states[name]), jax.tree.leaves(built[name].target)):
            assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)
    kernel = states["fsdp 8"].params["layers"]["mlp"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.size * 8 == kernel.size


def test_initial_parameters_are_those_of_a_plain_jitted_init(programs):
    config = replace(PACKED[0], unroll=0, remat="full", qk_norm=False)
    plain = dict(jax.tree_util.tree_leaves_with_path(plain_init(config)))
    ours = dict(jax.tree_util.tree_leaves_with_path(programs[1]["fsdp 2, tensor 2, data 2"].params))
    assert set(plain) < set(ours)
    for path, leaf in plain.items():
        np.testing.assert_array_equal(leaf, ours[path], err_msg=jax.tree_util.keystr(path))


def plain_init(config):
    from flax import linen as nn

    from lm.train import INIT, random_key

    def init():
        return nn.unbox(Transformer(config).init(random_key(0, INIT), np.zeros((1, 1), np.int32))["params"])

    return jax.jit(init)()


@pytest.mark.parametrize("source", MESHES)
def test_a_checkpoint_of_any_mesh_is_restored_into_any_other(programs, tmp_path, source):
    built, states = programs
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(3, states[source], {"from": source}, best=None)
    checkpoints.wait()
    for name, program in built.items():
        restored = checkpoints.restore(3, program.target)
        tiny.assert_trees_equal(restored, states[source])
        for leaf, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(program.target)):
            assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim), name
    checkpoints.close()


def test_a_run_with_its_rows_cut_and_its_evaluation(tmp_path):
    """From the command's side: one device and four, and other rules for evaluation than those it was trained with."""
    mesh = MeshConfig(data=1, fsdp=2, context=2, devices=4, rules=Rules(mlp=("fsdp",), embed=("context",)))
    settings = small_runs.experiment(tmp_path, train={"accumulate": 2})
    small_runs.start(settings, tmp_path / "one")
    small_runs.start(replace(settings, mesh=mesh), tmp_path / "four")
    one, four = (
        {(record["step"], record["split"]): record["loss"] for record in small_runs.metrics(tmp_path / name)}
        for name in ("one", "four")
    )
    assert one.keys() == four.keys()
    for at, loss in one.items():
        assert four[at] == pytest.approx(loss, rel=1e-5), at
    laid = replace(mesh, rules=Rules(embed=("fsdp", "context"), vocab=()))
    kernel = runs.load(tmp_path / "one", make_mesh(laid), "latest", laid.rules).params["layers"]["mlp"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.size * 4 == kernel.size
    found = runs.evaluate_run(tmp_path / "one", split="validation", checkpoint="latest", mesh=laid)
    assert found["loss"] == pytest.approx(one[6, "validation"], rel=1e-5)
