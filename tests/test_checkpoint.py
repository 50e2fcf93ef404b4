"""Checkpoints: what is kept, what comes back, and what is refused before anything is read."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import NamedSharding, PartitionSpec

from lm import tree
from lm.checkpoint import Checkpoints, read_arrays, whole_steps
from lm.errors import UserError
from lm.sharding import MeshConfig, make_mesh
from lm.train import TrainState

MESH = make_mesh(MeshConfig(fsdp=8))
WHOLE = NamedSharding(MESH, PartitionSpec())
SPLIT = NamedSharding(MESH, PartitionSpec("fsdp"))


def state(width: int = 8, extra: bool = False, ema: bool = True) -> TrainState:
    """A small training state: nested dictionaries, tuples with empty places, counters, half precision."""
    params = {"a": {"kernel": jnp.arange(width * 4.0).reshape(width, 4)}, "b": {"scale": jnp.ones(3, jnp.bfloat16)}}
    if extra:
        params["c"] = {"bias": jnp.zeros(2)}
    opt_state = optax.chain(optax.identity(), optax.adamw(1e-3)).init(params)
    average = jax.tree.map(lambda p: p + 1, params) if ema else None
    return TrainState(
        step=jnp.int32(5), params=params, frozen=None, opt_state=opt_state, ema=average, skipped=jnp.int32(1)
    )


def target(tree, sharding=WHOLE):
    def one(x):
        at = sharding if x.ndim == 2 else WHOLE
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at)

    return jax.tree.map(one, tree)


@pytest.fixture
def checkpoints(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    yield checkpoints
    checkpoints.close()


def test_a_state_comes_back_as_it_was_laid_out_as_asked(checkpoints):
    saved = state()
    checkpoints.save(5, saved, {"examples": 80, "nested": {"best": None, "loss": 1.25}}, best=None)
    checkpoints.wait()
    restored = checkpoints.restore(5, target(saved, SPLIT))
    tiny.assert_trees_equal(restored, saved)
    assert isinstance(restored, TrainState)
    assert restored.params["b"]["scale"].dtype == jnp.bfloat16
    assert restored.params["a"]["kernel"].sharding == SPLIT
    assert checkpoints.restore_extra(5) == {"examples": 80, "nested": {"best": None, "loss": 1.25}}


def test_arrays_are_read_as_they_are_on_disk(checkpoints, tmp_path):
    saved = state()
    for step in (3, 12):
        checkpoints.save(step, saved, {}, best=None)
    checkpoints.wait()
    (tmp_path / "checkpoints" / "15.orbax-checkpoint-tmp").mkdir()
    assert whole_steps(tmp_path / "checkpoints") == [3, 12]
    assert whole_steps(tmp_path / "nothing") == []
    found = read_arrays(tmp_path / "checkpoints", 12)
    leaves = dict(tree.path_leaves(saved))
    assert found.keys() == leaves.keys()
    for path, leaf in leaves.items():
        assert found[path].dtype == leaf.dtype
        np.testing.assert_array_equal(found[path], leaf, err_msg=path)


def test_a_whole_part_may_be_read_alone(checkpoints):
    saved = state()
    checkpoints.save(1, saved, {}, best=None)
    checkpoints.wait()
    for name in ("params", "ema"):
        part = checkpoints.restore(1, {name: target(getattr(saved, name))})
        tiny.assert_trees_equal(part, {name: getattr(saved, name)})


def test_what_differs_is_named_and_nothing_is_read(checkpoints):
    checkpoints.save(2, state(), {}, best=None)
    checkpoints.wait()
    with pytest.raises(UserError) as error:
        checkpoints.restore(2, target(state(width=16, extra=True)))
    message = str(error.value)
    assert "\n" not in message
    assert "params/a/kernel is (8, 4), not (16, 4)" in message
    assert "params/c/bias is missing" in message
    with pytest.raises(UserError, match="params/b/scale is extra"):
        checkpoints.restore(2, {"params": {"a": target(state().params["a"])}})


def test_an_average_that_was_not_saved_is_missing(checkpoints):
    checkpoints.save(2, state(ema=False), {}, best=None)
    checkpoints.wait()
    with pytest.raises(UserError, match="ema/a/kernel is missing"):
        checkpoints.restore(2, target(state()))


def test_the_latest_and_the_best_are_kept(checkpoints):
    for step, best in [(1, None), (2, 2), (3, 2), (4, 2), (5, 2)]:
        checkpoints.save(step, {"x": jnp.full(2, step)}, {}, best=best)
    checkpoints.wait()
    assert checkpoints.steps() == [2, 4, 5]
    assert checkpoints.latest() == 5
    checkpoints.save(6, {"x": jnp.full(2, 6)}, {}, best=6)
    checkpoints.wait()
    assert checkpoints.steps() == [5, 6]
    restored = checkpoints.restore(6, target({"x": jnp.full(2, 6)}))
    np.testing.assert_array_equal(restored["x"], [6, 6])


def test_a_second_session_goes_on_where_the_first_ended(tmp_path):
    first = Checkpoints(tmp_path / "c", keep=2)
    first.save(1, {"x": jnp.ones(2)}, {"n": 1}, best=1)
    first.close()
    second = Checkpoints(tmp_path / "c", keep=1)
    assert second.latest() == 1
    for step in (2, 3):
        second.save(step, {"x": jnp.ones(2)}, {"n": step}, best=1)
    second.wait()
    assert second.steps() == [1, 3]
    assert second.restore_extra(1) == {"n": 1}
    second.close()


def test_what_a_crash_left_half_written_is_not_a_checkpoint(tmp_path):
    first = Checkpoints(tmp_path / "c")
    first.save(1, {"x": jnp.ones(2)}, {}, best=None)
    first.close()
    whole = tmp_path / "c" / "1"
    half = tmp_path / "c" / "2.orbax-checkpoint-tmp"
    half.mkdir()
    (half / "state").mkdir()
    second = Checkpoints(tmp_path / "c")
    assert second.steps() == [1]
    assert whole.is_dir()
    second.save(2, {"x": jnp.zeros(2)}, {}, best=None)
    second.wait()
    np.testing.assert_array_equal(second.restore(2, target({"x": jnp.zeros(2)}))["x"], [0, 0])
    second.close()


def test_no_checkpoint_yet(checkpoints):
    assert checkpoints.latest() is None
    assert checkpoints.steps() == []
