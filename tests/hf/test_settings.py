"""What models need that published ones have: rotary scaling, biases on three projections alone."""

import math

import jax.numpy as jnp
import numpy as np
import tiny

from lm import tree
from lm.models.layers import stretched


def rates_of_llama3(theta: float, width: int, factor: float, low: float, high: float, length: int) -> list[float]:
    """By wavelengths and in float64, as Meta's own program has it."""
    found = []
    for i in range(0, width, 2):
        rate = theta ** (-i / width)
        wavelength = 2 * math.pi / rate
        if wavelength < length / high:
            found.append(rate)
        elif wavelength > length / low:
            found.append(rate / factor)
        else:
            smooth = (length / wavelength - low) / (high - low)
            found.append((1 - smooth) * rate / factor + smooth * rate)
    return found


def test_rates_of_llama3():
    for theta, width, factor, low, high, length in [(5e5, 128, 8.0, 1.0, 4.0, 8192), (1e4, 64, 32.0, 2.0, 3.0, 512)]:
        plain = theta ** (-np.arange(0, width, 2) / width)
        ours = stretched(jnp.asarray(plain, jnp.float32), factor, low, high, length)
        expected = np.array(rates_of_llama3(theta, width, factor, low, high, length))
        np.testing.assert_allclose(ours, expected, rtol=1e-5)
        ratio = expected / plain
        assert ratio[0] == 1
        assert math.isclose(ratio[-1], 1 / factor)
        assert ((ratio > 1.01 / factor) & (ratio < 0.99)).any()


def test_linear_scaling_is_that_of_positions():
    """A text of every fourth position, stretched four times, is the text at all positions."""
    settings = {"positions": "rope", "n_layers": 1}
    model, params = tiny.build(tiny.config(**settings))
    stretched_model, _ = tiny.build(tiny.config(**settings, rope_scaling="linear", rope_factor=4.0))
    tokens = np.random.default_rng(0).integers(0, 64, (2, 6), dtype=np.int32)
    positions = np.broadcast_to(np.arange(6, dtype=np.int32), (2, 6))
    plain = model.apply({"params": params}, tokens, positions)
    far = stretched_model.apply({"params": params}, tokens, 4 * positions)
    np.testing.assert_allclose(far, plain, atol=1e-5)
    assert np.max(np.abs(model.apply({"params": params}, tokens, 4 * positions) - plain)) > 1e-4


def test_biases_on_queries_keys_and_values_alone():
    plain = tiny.init(tiny.config(use_bias=False))
    biased = tiny.init(tiny.config(use_bias=False, qkv_bias=True))
    before, after = dict(tree.path_leaves(plain)), dict(tree.path_leaves(biased))
    added = {f"layers/attention/{name}/bias" for name in ("query", "key", "value")}
    assert set(after) - set(before) == added
    for path, leaf in before.items():
        if path.split("/")[-2] not in ("query", "key", "value"):
            np.testing.assert_array_equal(after[path], leaf, err_msg=path)
    everything = dict(tree.path_leaves(tiny.init(tiny.config())))
    assert dict(tree.path_leaves(tiny.init(tiny.config(qkv_bias=True)))).keys() == everything.keys()
