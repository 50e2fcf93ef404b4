"""Presets have the sizes that were published."""

import jax
import jax.numpy as jnp
import pytest

from lm import tree
from lm.models.presets import (
    BERT_SIZES,
    GPT2_SIZES,
    LLAMA_SIZES,
    T5_SIZES,
    TRANSFORMER_SIZES,
    bert,
    gpt2,
    llama,
    t5,
    transformer,
)
from lm.models.transformer import Transformer


def bert_parameters(d: int, layers: int) -> int:
    """Of `BertForPreTraining` with the head tied to the words' table, as its parts are published."""
    dense, norm = d * d + d, 2 * d
    embeddings = (30522 + 512 + 2) * d + norm
    layer = 4 * dense + norm + (4 * d * d + 4 * d) + (4 * d * d + d) + norm
    words = dense + norm + 30522
    return embeddings + layers * layer + dense + words + 2 * d + 2


def transformer_parameters(d: int, d_ff: int) -> int:
    """Of the paper's figure 1, a bias with every projection."""
    attention, feed_forward, norm = 4 * (d * d + d), 2 * d * d_ff + d_ff + d, 2 * d
    encoder, decoder = attention + feed_forward + 2 * norm, 2 * attention + feed_forward + 3 * norm
    return 37000 * d + 6 * (encoder + decoder)


PUBLISHED = {
    ("gpt2", "small"): 124_439_808,
    ("gpt2", "medium"): 354_823_168,
    ("gpt2", "large"): 774_030_080,
    ("gpt2", "xl"): 1_557_611_200,
    ("llama", "tiny"): 15_191_712,
    ("llama", "1b"): 1_100_048_384,
    ("llama", "7b"): 6_738_415_616,
    ("llama", "13b"): 13_015_864_320,
    ("llama", "70b"): 68_976_648_192,
    ("bert", "tiny"): bert_parameters(128, 2),
    ("bert", "mini"): bert_parameters(256, 4),
    ("bert", "small"): bert_parameters(512, 4),
    ("bert", "base"): 110_106_428,
    ("bert", "large"): bert_parameters(1024, 24),
    ("transformer", "base"): transformer_parameters(512, 2048),
    ("transformer", "big"): transformer_parameters(1024, 4096),
    ("t5", "small"): 60_506_624,
    ("t5", "base"): 222_903_552,
}
FAMILIES = {"gpt2": gpt2, "llama": llama, "bert": bert, "transformer": transformer, "t5": t5}
SIZES = {"gpt2": GPT2_SIZES, "llama": LLAMA_SIZES, "bert": BERT_SIZES, "transformer": TRANSFORMER_SIZES, "t5": T5_SIZES}


def test_every_preset_is_here():
    assert set(PUBLISHED) == {(family, size) for family, sizes in SIZES.items() for size in sizes}


def test_derived_counts_are_in_the_class_that_was_published():
    assert bert_parameters(768, 12) == PUBLISHED["bert", "base"]
    assert 335e6 < PUBLISHED["bert", "large"] < 340e6  # "340M"
    # The paper's table 3 says 65 and 213 million.
    assert abs(PUBLISHED["transformer", "base"] / 65e6 - 1) < 0.04
    assert abs(PUBLISHED["transformer", "big"] / 213e6 - 1) < 0.01


@pytest.mark.parametrize(("family", "size"), sorted(PUBLISHED))
def test_parameter_count(family, size):
    model = Transformer(FAMILIES[family](size))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    assert tree.count_parameters(shapes) == PUBLISHED[family, size]


def test_a_preset_takes_changes():
    config = gpt2("small", n_layers=2, positions="rope")
    assert (config.n_layers, config.positions, config.d_model) == (2, "rope", 768)
