"""Presets have the sizes that were published."""

import jax
import jax.numpy as jnp
import pytest

from lm import tree
from lm.models.presets import GPT2_SIZES, LLAMA_SIZES, gpt2, llama
from lm.models.transformer import Transformer

PUBLISHED = {
    ("gpt2", "small"): 124_439_808,
    ("gpt2", "medium"): 354_823_168,
    ("gpt2", "large"): 774_030_080,
    ("gpt2", "xl"): 1_557_611_200,
    ("llama", "tiny"): 15_191_712,
    ("llama", "1b"): 1_100_048_384,
    ("llama", "7b"): 6_738_415_616,
    ("llama", "13b"): 13_015_864_320,
}
FAMILIES = {"gpt2": gpt2, "llama": llama}


def test_every_preset_is_here():
    assert set(PUBLISHED) == {("gpt2", size) for size in GPT2_SIZES} | {("llama", size) for size in LLAMA_SIZES}


@pytest.mark.parametrize(("family", "size"), sorted(PUBLISHED))
def test_parameter_count(family, size):
    model = Transformer(FAMILIES[family](size))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    assert tree.count_parameters(shapes) == PUBLISHED[family, size]


def test_a_preset_takes_changes():
    config = gpt2("small", n_layers=2, positions="rope")
    assert (config.n_layers, config.positions, config.d_model) == (2, "rope", 768)
