import jax
import jax.numpy as jnp
import optax
import pytest

from lm import tree
from lm.errors import UserError

PARAMS = {
    "embed": {"embedding": jnp.zeros((5, 4))},
    "layers": {"mlp": {"up": {"kernel": jnp.zeros((2, 4, 8)), "bias": jnp.zeros((2, 8))}}},
}


def test_paths_name_dicts_tuples_and_attributes():
    state = (optax.TraceState(trace={"a": {"kernel": 1}}), [2])
    assert tree.path_leaves(state) == [("0/trace/a/kernel", 1), ("1/0", 2)]


def test_paths_are_in_flattening_order():
    assert [path for path, _ in tree.path_leaves(PARAMS)] == [
        "embed/embedding",
        "layers/mlp/up/bias",
        "layers/mlp/up/kernel",
    ]
    for (_, leaf), expected in zip(tree.path_leaves(PARAMS), jax.tree.leaves(PARAMS), strict=True):
        assert leaf is expected


def test_first_matching_pattern_wins():
    rules = (("layers/.*bias", "bias"), ("layers/.*", "layer"), (".*", "rest"))
    assert tree.match_patterns(PARAMS, rules) == {
        "embed": {"embedding": "rest"},
        "layers": {"mlp": {"up": {"kernel": "layer", "bias": "bias"}}},
    }


def test_patterns_match_whole_paths():
    with pytest.raises(UserError, match="3 parameter"):
        tree.match_patterns(PARAMS, (("layers", True), ("embedding", True)))


def test_none_is_a_value():
    values = tree.match_patterns(PARAMS, ((".*kernel", 1), (".*", None)))
    assert values == {"embed": {"embedding": None}, "layers": {"mlp": {"up": {"kernel": 1, "bias": None}}}}


def test_uncovered_parameters_are_listed_on_one_line():
    with pytest.raises(UserError) as error:
        tree.match_patterns(PARAMS, ((".*/kernel", True),))
    message = str(error.value)
    assert "2 parameter(s)" in message
    assert "embed/embedding, layers/mlp/up/bias;" in message
    assert "\n" not in message


def test_a_long_list_of_uncovered_parameters_is_cut():
    with pytest.raises(UserError) as error:
        tree.match_patterns({f"p{i:02}": 0 for i in range(20)}, ())
    assert "20 parameter(s)" in str(error.value)
    assert "p07, …" in str(error.value)
    assert "p08" not in str(error.value)


def test_a_broken_pattern_is_a_user_error():
    with pytest.raises(UserError, match="is not a regular expression"):
        tree.match_patterns(PARAMS, (("layers/(", True),))


def test_count_parameters_of_arrays_and_shapes():
    assert tree.count_parameters(PARAMS) == 5 * 4 + 2 * 8 + 2 * 4 * 8
    assert tree.count_parameters(jax.eval_shape(lambda: PARAMS)) == tree.count_parameters(PARAMS)
    assert tree.count_parameters({"scalar": jax.ShapeDtypeStruct((), jnp.float32)}) == 1
