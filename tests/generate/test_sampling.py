import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.errors import UserError
from lm.generate import SamplingConfig
from lm.generate.sampling import (
    adjust,
    draw,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    mask_padding,
    penalise_repetition,
)

B, V = 4, 50


def some_logits(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, (B, V)).astype(np.float32)


def some_seen(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((B, V)) < 0.3


# Twins: one row at a time, in float64, by sorting.


def plain_penalty(row: np.ndarray, seen: np.ndarray, penalty: float) -> np.ndarray:
    return np.array([(x / penalty if x > 0 else x * penalty) if s else x for x, s in zip(row, seen)])


def plain_top_k(row: np.ndarray, k: int) -> np.ndarray:
    least = sorted(row)[::-1][min(k, len(row)) - 1]
    return np.where(row >= least, row, -np.inf)


def softmax(row: np.ndarray) -> np.ndarray:
    e = np.exp(row.astype(np.float64) - row.max())
    return e / e.sum()


def plain_top_p(row: np.ndarray, p: float) -> np.ndarray:
    probabilities, kept, total = softmax(row), np.full(len(row), -np.inf), 0.0
    for i in np.argsort(-row):
        kept[i] = row[i]
        total += probabilities[i]
        if total >= p:
            break
    return kept


def plain_min_p(row: np.ndarray, p: float) -> np.ndarray:
    probabilities = softmax(row)
    return np.where(probabilities >= p * probabilities.max(), row, -np.inf)


def torch_warper(name: str, *args: object):
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process

    processor = getattr(logits_process, name)(*args)
    return lambda ids, logits: processor(torch.tensor(ids), torch.tensor(logits)).numpy()


@pytest.mark.parametrize("k", [1, 2, 17, V, V + 9])
def test_top_k(k):
    logits = some_logits()
    got = np.asarray(keep_top_k(jnp.array(logits), k))
    np.testing.assert_array_equal(got, [plain_top_k(row, k) for row in logits])
    assert (np.isfinite(got).sum(axis=1) == min(k, V)).all()


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.999])
def test_top_p(p):
    logits = some_logits()
    got = np.asarray(keep_top_p(jnp.array(logits), p))
    np.testing.assert_array_equal(got, [plain_top_p(row, p).astype(np.float32) for row in logits])


@pytest.mark.parametrize("p", [0.01, 0.2, 1.0])
def test_min_p(p):
    logits = some_logits()
    got = np.asarray(keep_min_p(jnp.array(logits), p))
    np.testing.assert_array_equal(got, [plain_min_p(row, p).astype(np.float32) for row in logits])


@pytest.mark.parametrize("penalty", [0.5, 1.2, 3.0])
def test_repetition_penalty(penalty):
    logits, seen = some_logits(), some_seen()
    got = penalise_repetition(jnp.array(logits), jnp.array(seen), penalty)
    want = [plain_penalty(row, s, penalty) for row, s in zip(logits, seen)]
    np.testing.assert_allclose(got, want, rtol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    row=st.lists(st.sampled_from([-math.inf, -30.0, -2.5, -1e-30, 1e-38, 0.25, 2.0, 80.0]), min_size=7, max_size=7),
    k=st.integers(1, 9),
)
def test_top_k_with_ties_and_extremes(row, k):
    logits = np.array([row], np.float32)
    got = np.asarray(jax.jit(keep_top_k)(jnp.array(logits), k))
    np.testing.assert_array_equal(got[0], plain_top_k(logits[0], k))


def test_top_p_always_keeps_the_likeliest():
    logits = jnp.array([[0.0, 0.0, 0.0, 0.0], [5.0, -jnp.inf, -jnp.inf, -jnp.inf], [90.0, -90.0, 0.0, 1.0]])
    kept = np.isfinite(keep_top_p(logits, 1e-7))
    assert kept[0].all()  # ties stay
    assert kept[1:].tolist() == [[True, False, False, False]] * 2


def test_excluded_tokens_stay_excluded():
    logits = mask_padding(jnp.array(some_logits()), 20)
    settings = SamplingConfig(temperature=5.0, top_k=40, top_p=0.999, min_p=0.001, repetition_penalty=0.5)
    adjusted = np.asarray(adjust(logits, jnp.ones((B, V), bool), settings.adjustments()))
    assert np.isneginf(adjusted[:, 20:]).all()
    assert np.isfinite(adjusted.max(axis=1)).all()


@pytest.mark.parity
@pytest.mark.parametrize(
    ("settings", "warpers"),
    [
        ({"repetition_penalty": 1.3}, [("RepetitionPenaltyLogitsProcessor", 1.3)]),
        ({"temperature": 0.7}, [("TemperatureLogitsWarper", 0.7)]),
        ({"top_k": 7}, [("TopKLogitsWarper", 7)]),
        ({"top_p": 0.8}, [("TopPLogitsWarper", 0.8)]),
        ({"min_p": 0.05}, [("MinPLogitsWarper", 0.05)]),
        (
            {"repetition_penalty": 1.3, "temperature": 2.0, "top_k": 30, "top_p": 0.9, "min_p": 0.02},
            [
                ("RepetitionPenaltyLogitsProcessor", 1.3),
                ("TemperatureLogitsWarper", 2.0),
                ("TopKLogitsWarper", 30),
                ("TopPLogitsWarper", 0.9),
                ("MinPLogitsWarper", 0.02),
            ],
        ),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_as_hugging_face(settings, warpers):
    for seed in range(3):
        ids = np.random.default_rng(seed).integers(0, V, (B, 12))
        want = some_logits(seed)
        for warper in warpers:
            want = torch_warper(*warper)(ids, want)
        seen = np.zeros((B, V), bool)
        np.put_along_axis(seen, ids, True, axis=1)
        got = adjust(jnp.array(some_logits(seed)), jnp.array(seen), SamplingConfig(**settings).adjustments())
        np.testing.assert_allclose(got, want, rtol=2e-6)


@pytest.mark.parity
def test_order_of_hugging_face_generate():
    # The list that `generate` itself would build, so that a change of order there is seen here.
    pytest.importorskip("torch")
    from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=4, vocab_size=8, n_positions=8))
    config = GenerationConfig(
        do_sample=True, repetition_penalty=1.3, temperature=2.0, top_k=30, top_p=0.9, min_p=0.02, num_beams=1
    )
    model._prepare_special_tokens(config, kwargs_has_attention_mask=True)
    chain = model._get_logits_processor(config, input_ids_seq_length=1, logits_processor=[], device="cpu")
    assert [type(p).__name__.removesuffix("LogitsProcessor").removesuffix("LogitsWarper") for p in chain] == [
        "RepetitionPenalty",
        "Temperature",
        "TopK",
        "TopP",
        "MinP",
    ]


def test_draws_follow_the_distribution():
    logits = np.array([0.0, 1.0, 2.0, -1.0, 3.0, -np.inf], np.float32)
    acting = SamplingConfig(temperature=2.0).adjustments()
    n = 20_000
    adjusted = jnp.broadcast_to(adjust(jnp.array(logits)[None], None, acting), (n, len(logits)))
    tokens = draw(adjusted, jax.random.split(jax.random.key(3), n), acting)
    counts, expected = np.bincount(tokens, minlength=6), n * softmax(logits / 2)
    assert counts[5] == 0
    # Each within 4.5 standard deviations of its binomial.
    assert (np.abs(counts - expected)[:5] < 4.5 * np.sqrt(expected)[:5]).all()


def test_greedy_takes_the_likeliest_and_needs_no_key():
    logits = some_logits()
    acting = SamplingConfig(temperature=0, top_k=3, top_p=0.5, min_p=0.1).adjustments()
    assert acting == {}
    tokens = draw(adjust(jnp.array(logits), None, acting), None, acting)
    assert tokens.dtype == jnp.int32
    np.testing.assert_array_equal(tokens, logits.argmax(axis=1))


def test_other_values_compile_nothing():
    traces = 0

    @jax.jit
    def both(logits, seen, keys, acting):
        nonlocal traces
        traces += 1
        return draw(adjust(logits, seen, acting), keys, acting)

    keys = jax.random.split(jax.random.key(0), B)
    for change in ({}, {"top_k": 9}, {"temperature": 3}, {"temperature": 0.1, "top_p": 0.2}):
        config = dataclasses.replace(SamplingConfig(temperature=0.5, top_k=5, top_p=0.9), **change)
        both(some_logits(), some_seen(), keys, config.adjustments())
    assert traces == 1


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"temperature": 1e-9}, "or at least 0.001"),
        ({"top_k": -3}, "top_k is -3"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_p": math.nan}, "top_p is nan"),
        ({"min_p": -0.1}, "min_p is -0.1"),
        ({"min_p": 1.1}, "min_p is 1.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"repetition_penalty": math.inf}, "repetition_penalty is inf"),
        ({"stop": ("a", "")}, "empty string"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**32}, "seed is 4294967296"),
    ],
)
def test_nonsense_is_refused(settings, said):
    with pytest.raises(UserError, match=said) as error:
        SamplingConfig(**settings)
    assert "\n" not in str(error.value)
