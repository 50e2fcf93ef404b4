"""Generation by encoder-decoders, whose prompts are sources, and by prefix models: as the whole model says."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import linen as nn

from lm.errors import UserError
from lm.generate import Generator, SamplingConfig
from lm.generate import generator as generators
from lm.models.transformer import ModelConfig, Transformer

VOCAB, BOS, EOS, LONGEST = 5, 3, 4, 24
TINY = ModelConfig(
    vocab_size=8, d_model=16, n_layers=2, encoder_layers=1, n_heads=2, max_len=LONGEST, scale_residual_init=False
)
SOURCES = [[0, 1, 2, 0, EOS], [2, EOS], [1, 1, 0, 2, 2, 0, 1, 0, EOS]]
GREEDY = SamplingConfig(temperature=0, max_new_tokens=8)
KINDS = {
    "learned": {},
    "relative, as T5": {
        "positions": "relative",
        "norm": "rmsnorm",
        "use_bias": False,
        "scale_attention": False,
        "scale_logits": True,
        "activation": "relu",
    },
    "sinusoidal, post-norm": {"positions": "sinusoidal", "norm_place": "post", "scale_embeddings": True},
    "rope, two tables, one key head": {
        "positions": "rope",
        "share_embeddings": False,
        "n_kv_heads": 1,
        "tie_embeddings": False,
        "head_bias": True,
    },
}


@functools.cache
def some_params(config: ModelConfig, seed: int = 1):
    init = functools.partial(Transformer(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    rng = np.random.default_rng(seed)
    shapes = nn.unbox(jax.eval_shape(init)["params"])
    return jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.array(rng.normal("scale" in str(path[-1]), 0.5, x.shape), x.dtype), shapes
    )


@functools.cache
def generator(config: ModelConfig = TINY, eos_id: int | None = EOS) -> Generator:
    return Generator(config, some_params(config), vocab_size=VOCAB, eos_id=eos_id, bos_id=BOS)


def whole_model(config: ModelConfig):
    """`(source, target) -> ` float64 log-probabilities of the tokenizer's tokens after the target; nothing cached."""

    @jax.jit
    def apply(source, source_segments, tokens):
        settings = {"source_tokens": source, "source_segments": source_segments} if config.encoder_layers else {}
        return jax.nn.log_softmax(Transformer(config).apply({"params": some_params(config)}, tokens, **settings))

    @functools.cache
    def logprobs(source: tuple[int, ...], target: tuple[int, ...]) -> np.ndarray:
        read, ids = np.zeros((1, 16), np.int32), np.zeros((1, 16), np.int32)
        read[0, : len(source)], ids[0, : len(target)] = source, target
        found = apply(read, (np.arange(16) < len(source))[None].astype(np.int32), ids)
        return np.asarray(found, np.float64)[0, len(target) - 1, :VOCAB]

    return lambda source, target: logprobs(tuple(source), tuple(target))


@pytest.mark.parametrize("kind", tiny.fast(KINDS, "relative, as T5", "rope, two tables, one key head"))
def test_greedy_is_the_whole_models_choice_at_every_token(kind):
    config = dataclasses.replace(TINY, **KINDS[kind])
    logprobs = whole_model(config)
    made = generator(config).generate(SOURCES, GREEDY)
    assert len({round(one.logprobs[0], 2) for one in made}) == len(SOURCES)  # the source matters
    for source, one in zip(SOURCES, made):
        ids = [BOS]
        for logprob in one.logprobs:
            scores = logprobs(source, ids)
            ids.append(int(scores.argmax()))
            assert logprob == pytest.approx(scores[ids[-1]], abs=1e-4)
        assert (one.prompt_ids, one.ids) == (source, ids[1:])
        if one.finished == "eos":
            assert logprobs(source, ids).argmax() == EOS
        else:
            assert len(one.ids) == 8


@pytest.mark.parametrize("kind", ["learned", "relative, as T5"])
def test_a_wide_search_finds_the_best_of_all_texts(kind):
    config = dataclasses.replace(TINY, **KINDS[kind])
    logprobs = whole_model(config)
    sampling = SamplingConfig(max_new_tokens=3, beams=40, n_best=5, length_penalty=1.0)
    made = generator(config).generate(SOURCES, sampling)
    for row, source in enumerate(SOURCES):
        found: list[tuple[float, list[int]]] = []

        def grow(new: list[int], total: float, source: list[int] = source, found: list = found) -> None:
            if new and (new[-1] == EOS or len(new) == 3):
                found.append((total / ((5 + len(new)) / 6), new))
                return
            for token, one in enumerate(logprobs(source, [BOS, *new])):
                grow([*new, token], total + one)

        grow([], 0.0)
        mine = made[5 * row : 5 * row + 5]
        texts = [[*one.ids, *([EOS] if one.finished == "eos" else [])] for one in mine]
        want = sorted(found, reverse=True)[:5]
        assert texts == [new for _, new in want]
        np.testing.assert_allclose([one.score for one in mine], [score for score, _ in want], atol=1e-4)


@pytest.mark.parametrize(
    "sampling",
    [SamplingConfig(max_new_tokens=8, temperature=1.5, seed=3), SamplingConfig(max_new_tokens=8, beams=3)],
    ids=["drawn", "searched"],
)
def test_a_source_does_not_see_the_batch(sampling):
    sources = [*SOURCES, SOURCES[0], [1, 0, EOS]]
    whole = [one.ids for one in generator().generate(sources, sampling)]
    assert [generator().generate([source], sampling)[0].ids for source in SOURCES] == whole[:3]
    assert [one.ids for one in generator().generate(sources, sampling, batch_size=2)] == whole
    assert (whole[0] == whole[3]) == (sampling.beams > 1)


@pytest.mark.parametrize("sampling", [GREEDY, SamplingConfig(beams=2, max_new_tokens=8)], ids=["greedy", "searched"])
def test_the_source_is_encoded_once(monkeypatch, sampling):
    made = Generator(TINY, some_params(TINY), vocab_size=VOCAB, eos_id=EOS, bos_id=BOS)
    want = made.generate(SOURCES, sampling)
    real = generators.prefill

    def forget(params, *arguments, **settings):
        state = real(params, *arguments, **settings)
        for name in params:
            if name.startswith("encoder"):
                params[name] = jax.tree.map(lambda x: x * jnp.nan, params[name])
        for layer in params["layers"]:
            for name in ("key", "value"):
                attention = layer["cross_attention"]
                attention[name] = jax.tree.map(lambda x: x * jnp.nan, attention[name])
        return state

    monkeypatch.setattr(generators, "prefill", forget)
    assert made.generate(SOURCES, sampling) == want


def test_text_is_what_the_decoder_wrote():
    def letters(ids):
        return "".join("abc<."[i] for i in ids)

    pieces = []
    made = generator(eos_id=None).generate(
        SOURCES, GREEDY, decode=letters, on_tokens=lambda *piece: pieces.append(piece)
    )
    for row, one in enumerate(made):
        assert one.text == letters(one.ids)
        assert "".join(text for at, _, text in pieces if at == row) == one.text


def test_no_sequence_repeats_and_what_the_source_says_may_come():
    sampling = dataclasses.replace(GREEDY, no_repeat_ngram=1)
    made = generator(eos_id=None).generate(SOURCES, sampling)
    for one in made:
        assert sorted(one.ids[:4]) == [0, 1, 2, 4]  # all but what it began with, in whatever source they are


def test_the_context_bounds_what_is_written():
    [made] = generator(eos_id=None).generate([[1] * LONGEST], dataclasses.replace(GREEDY, max_new_tokens=100))
    assert len(made.ids) == LONGEST - 1
    with pytest.raises(UserError, match=r"prompt 0 has 25 tokens; a source has at most model\.max_len = 24"):
        generator().generate([[1] * (LONGEST + 1)], GREEDY)


def test_half_precision_keeps_float32_what_computes_in_it():
    config = dataclasses.replace(TINY, compute_dtype="bfloat16", **KINDS["relative, as T5"])
    made = Generator(config, some_params(config), vocab_size=VOCAB, eos_id=EOS, bos_id=BOS)
    assert made._params["relative_bias"]["embedding"].dtype == jnp.float32
    logprobs = whole_model(config)
    [one] = made.generate(SOURCES[:1], GREEDY)
    assert one.logprobs[0] == pytest.approx(logprobs(SOURCES[0], [BOS])[one.ids[0]], abs=0.05)


def test_a_prefix_model_sees_the_prompt_to_both_sides():
    config = dataclasses.replace(TINY, encoder_layers=0, mask="prefix")
    prompts = [[2, 0, 1], [1], [0, 0, 2, 1, 3, 2]]
    made = Generator(config, some_params(config), vocab_size=VOCAB, eos_id=None).generate(prompts, GREEDY)
    blind = Generator(
        dataclasses.replace(config, mask="causal"), some_params(config), vocab_size=VOCAB, eos_id=None
    ).generate(prompts, GREEDY)
    apply = jax.jit(lambda ids, prefix: Transformer(config).apply({"params": some_params(config)}, ids, prefix=prefix))
    for prompt, one in zip(prompts, made):
        ids = list(prompt)
        for logprob in one.logprobs:
            padded = np.zeros((1, 16), np.int32)
            padded[0, : len(ids)] = ids
            prefix = (np.arange(16) < len(prompt))[None].astype(np.int32)
            scores = jax.nn.log_softmax(apply(padded, prefix)[0, len(ids) - 1])
            ids.append(int(scores[:VOCAB].argmax()))
            assert logprob == pytest.approx(float(scores[ids[-1]]), abs=1e-4)
        assert one.ids == ids[len(prompt) :]
    assert made[1].logprobs == pytest.approx(blind[1].logprobs, abs=1e-5)  # one token has no other side
    assert made[2].logprobs != pytest.approx(blind[2].logprobs, abs=1e-2)


def test_what_cannot_generate_is_refused():
    with pytest.raises(UserError, match=r"begins to write with bos_id; give one"):
        Generator(TINY, some_params(TINY), vocab_size=VOCAB, eos_id=EOS)
    with pytest.raises(UserError, match="bos_id is 5; the vocabulary's ids go from 0 to 4"):
        Generator(TINY, some_params(TINY), vocab_size=VOCAB, eos_id=EOS, bos_id=5)
    encoder = dataclasses.replace(TINY, encoder_layers=0, mask="bidirectional")
    with pytest.raises(UserError, match="sees both sides"):
        Generator(encoder, some_params(encoder), vocab_size=VOCAB, eos_id=EOS)
