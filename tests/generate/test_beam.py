"""Beam search against all sequences of a tiny vocabulary, and against a plain search in Python."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import linen as nn

from lm.errors import UserError
from lm.generate import Generator, SamplingConfig
from lm.models.transformer import ModelConfig, Transformer
from lm.sharding import MeshConfig, make_mesh

VOCAB, EOS = 5, 4
TINY = ModelConfig(vocab_size=8, d_model=16, n_layers=2, n_heads=2, max_len=64)
PROMPTS = [[3, 1, 0], [1], [2, 0, 2, 0, 1, 3, 3]]


@functools.cache
def some_params(config: ModelConfig = TINY, scale: float = 0.5):
    init = functools.partial(Transformer(config).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    rng = np.random.default_rng(6)
    shapes = nn.unbox(jax.eval_shape(init)["params"])
    return jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.array(rng.normal("scale" in str(path[-1]), scale, x.shape), x.dtype), shapes
    )


@functools.cache
def generator(eos_id: int | None = EOS, devices: int = 0) -> Generator:
    mesh = make_mesh(MeshConfig(data=devices, devices=devices)) if devices else None
    return Generator(TINY, some_params(), vocab_size=VOCAB, eos_id=eos_id, mesh=mesh)


@functools.cache
def scored() -> object:
    return jax.jit(
        lambda tokens: jax.nn.log_softmax(
            Transformer(TINY).apply({"params": some_params()}, tokens).astype(jnp.float32)
        )
    )


@functools.cache
def next_logprobs(ids: tuple[int, ...]) -> np.ndarray:
    """Of every token of the tokenizer, after `ids`; float64."""
    padded = np.zeros((1, 32), np.int32)
    padded[0, : len(ids)] = ids
    return np.asarray(scored()(padded), np.float64)[0, len(ids) - 1, :VOCAB]


def penalty(length: int, alpha: float) -> float:
    return ((5 + length) / 6) ** alpha


def repeats(ids: tuple[int, ...], size: int) -> bool:
    """Whether the last `size` tokens have been there before."""
    grams = [ids[i : i + size] for i in range(len(ids) - size + 1)]
    return bool(size) and len(grams) > 1 and grams[-1] in grams[:-1]


def every_text(prompt: list[int], most: int, eos: int, alpha: float, no_repeat: int = 0):
    """All texts after a prompt: (score, new tokens), the best first."""
    found: list[tuple[float, tuple[int, ...]]] = []

    def grow(new: tuple[int, ...], total: float) -> None:
        if new and (new[-1] == eos or len(new) == most):
            found.append((total / penalty(len(new), alpha), new))
            return
        logprobs = next_logprobs((*prompt, *new))
        for token in range(VOCAB):
            if token == eos or not repeats((*prompt, *new, token), no_repeat):
                grow((*new, token), total + logprobs[token])

    grow((), 0.0)
    return sorted(found, reverse=True)


def plain_search(prompt: list[int], most: int, eos: int, alpha: float, beams: int, no_repeat: int = 0):
    """The search of `lm.generate.beam`, without stopping early."""
    alive, finished = [(0.0, ())], []
    for length in range(1, most + 1):
        children = [
            (total + next_logprobs((*prompt, *new))[token], (*new, token))
            for total, new in alive
            for token in range(VOCAB)
            if token == eos or not repeats((*prompt, *new, token), no_repeat)
        ]
        children = sorted(children, reverse=True)[: 2 * beams]
        ended = [child for child in children if child[1][-1] == eos or length == most]
        finished = sorted(finished + [(total / penalty(length, alpha), new) for total, new in ended], reverse=True)
        finished = finished[:beams]
        alive = [child for child in children if child not in ended][:beams]
    return finished


def texts(made, eos: int):
    """What `every_text` gives, from generations."""
    return [(one.score, (*one.ids, *([eos] if one.finished == "eos" else []))) for one in made]


def assert_same(made, want, eos: int = EOS) -> None:
    found = texts(made, eos)
    assert [new for _, new in found] == [new for _, new in want]
    np.testing.assert_allclose([score for score, _ in found], [score for score, _ in want], atol=1e-4)


ALL_TEXTS = [(alpha, no_repeat) for alpha in (0.0, 0.6, 2.0) for no_repeat in (0, 2)]


@pytest.mark.parametrize(("alpha", "no_repeat"), tiny.fast(ALL_TEXTS, (0.0, 2), (0.6, 0), (2.0, 0)))
def test_wide_enough_it_finds_the_best_of_all_texts(alpha, no_repeat):
    sampling = SamplingConfig(max_new_tokens=4, beams=160, n_best=7, length_penalty=alpha, no_repeat_ngram=no_repeat)
    made = generator().generate(PROMPTS, sampling)
    endings = set()
    for row, prompt in enumerate(PROMPTS):
        mine = made[7 * row : 7 * row + 7]
        want = every_text(prompt, 4, EOS, alpha, no_repeat)
        assert no_repeat or len(want) == 1 + 4 + 16 + 64 * 5
        assert_same(mine, want[:7])
        endings |= {one.finished for one in mine}
        assert all(one.prompt_ids == prompt for one in mine)
    assert endings == {"eos", "length"}


@pytest.mark.parametrize("beams", [2, 3, 4])
@pytest.mark.parametrize(("alpha", "eos", "no_repeat"), [(0.0, EOS, 0), (0.6, EOS, 3), (1.5, -1, 0), (1.0, EOS, 2)])
def test_narrow_it_is_the_plain_search(beams, alpha, eos, no_repeat):
    made = generator(EOS if eos >= 0 else None).generate(
        PROMPTS,
        SamplingConfig(max_new_tokens=8, beams=beams, n_best=beams, length_penalty=alpha, no_repeat_ngram=no_repeat),
    )
    for row, prompt in enumerate(PROMPTS):
        want = plain_search(prompt, 8, eos, alpha, beams, no_repeat)
        assert_same(made[beams * row : beams * (row + 1)], want, eos)


def test_a_search_beats_greed():
    greedy = generator().generate(PROMPTS, SamplingConfig(temperature=0, max_new_tokens=8))
    searched = generator().generate(PROMPTS, SamplingConfig(beams=4, length_penalty=0, max_new_tokens=8))
    gains = []
    for prompt, one, best in zip(PROMPTS, greedy, searched):
        ids = (*one.ids, *([EOS] if one.finished == "eos" else []))
        total = sum(next_logprobs((*prompt, *ids[:i]))[token] for i, token in enumerate(ids))
        gains.append(best.score - total)
    assert min(gains) > -1e-4
    assert max(gains) > 0.1


def test_logprobs_are_the_models_own_and_make_the_score():
    for one in generator().generate(PROMPTS, SamplingConfig(beams=3, n_best=3, max_new_tokens=6)):
        ids = [*one.prompt_ids, *one.ids]
        at = len(one.prompt_ids)
        want = [next_logprobs(tuple(ids[:i]))[ids[i]] for i in range(at, len(ids))]
        np.testing.assert_allclose(one.logprobs, want, atol=1e-4)
        total, length = sum(one.logprobs), len(one.ids)
        if one.finished == "eos":
            total, length = total + next_logprobs(tuple(ids))[EOS], length + 1
        assert one.score == pytest.approx(total / penalty(length, 0.6), abs=1e-4)


def test_it_stops_when_nothing_better_can_come(monkeypatch):
    """With an end that is all but certain, a long limit costs no step; a text that may still win is waited for."""
    import lm.generate.beam as beam

    steps = []
    forward = beam.forward

    def counted(*arguments, **settings):
        jax.debug.callback(lambda: steps.append(1))
        return forward(*arguments, **settings)

    monkeypatch.setattr(beam, "forward", counted)
    params = jax.tree.map(jnp.copy, some_params())
    # The embedding is the head: the end's row lies along what every hidden state has, its mean.
    params["final_norm"]["bias"] = jnp.full_like(params["final_norm"]["bias"], 1.0)
    params["embed"]["embedding"] = params["embed"]["embedding"].at[EOS].set(1.0)
    sure = dataclasses.replace(TINY, norm_epsilon=1e-6)  # another model, so that nothing compiled before is used
    made = Generator(sure, params, vocab_size=VOCAB, eos_id=EOS).generate([[1]], SamplingConfig(beams=2))
    jax.effects_barrier()
    assert (made[0].ids, made[0].finished) == ([], "eos")
    assert len(steps) < 5


def test_batches_and_devices_change_nothing():
    prompts = [*PROMPTS, [1], [3, 3], [0, 1, 2, 3]]
    search = SamplingConfig(beams=3, n_best=2, max_new_tokens=6)
    drawing = SamplingConfig(temperature=1.3, max_new_tokens=6, seed=5)
    for sampling in (search, drawing):
        whole = generator().generate(prompts, sampling)
        for batch_size, devices in ((1, 0), (4, 0), (3, 2)):
            again = generator(devices=devices).generate(prompts, sampling, batch_size=batch_size)
            assert [one.ids for one in again] == [one.ids for one in whole], (batch_size, devices)
            assert [one.prompt_ids for one in again] == [one.prompt_ids for one in whole]
    ids = [one.ids for one in generator().generate(prompts, drawing)]
    assert ids[1] != ids[3]  # the same prompt twice


def test_rows_lie_on_all_devices():
    from lm.generate import generator as generators

    seen = []
    real = generators.search

    def spy(params, state, *rest, **settings):
        seen.append(state["cache"][0]["key"].sharding)
        return real(params, state, *rest, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generators, "search", spy)
        generator(devices=4).generate(PROMPTS, SamplingConfig(beams=2, max_new_tokens=2))
    assert len(seen[0].device_set) == 4
    assert seen[0].shard_shape((4, 2, 64, 8))[0] == 1


def test_other_penalties_and_lengths_compile_nothing():
    from lm.generate.beam import search

    generator().generate(PROMPTS, SamplingConfig(beams=3, n_best=1, max_new_tokens=6))
    before = search._cache_size()
    generator().generate(PROMPTS, SamplingConfig(beams=3, n_best=3, length_penalty=2.0, max_new_tokens=9))
    assert search._cache_size() == before


def test_texts_are_told_once_and_cut_at_stop_strings():
    def letters(ids):
        return "".join("abcd."[i] for i in ids)

    sampling = SamplingConfig(beams=3, n_best=2, max_new_tokens=6)
    plain = generator(None).generate(PROMPTS, sampling, decode=letters)
    stop = plain[0].text[2:4]
    told = []
    made = generator(None).generate(
        PROMPTS,
        dataclasses.replace(sampling, stop=(stop,)),
        decode=letters,
        on_tokens=lambda *piece: told.append(piece),
    )
    assert made[0].text == plain[0].text[: plain[0].text.find(stop)]
    assert made[0].finished == "stop"
    assert [piece[0] for piece in told] == list(range(6))
    assert [(piece[1], piece[2]) for piece in told] == [(one.ids, one.text) for one in made]


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_sequence_repeats_without_a_search_either(size, temperature):
    sampling = SamplingConfig(temperature=temperature, max_new_tokens=12, no_repeat_ngram=size, seed=1)
    free = dataclasses.replace(sampling, no_repeat_ngram=0)
    made, loose = (generator().generate(PROMPTS, one) for one in (sampling, free))

    def count(one) -> int:
        ids = tuple(one.prompt_ids + one.ids)
        new = range(len(one.prompt_ids), len(ids))
        return sum(repeats(ids[: i + 1], size) for i in new)

    assert sum(map(count, loose)) > 0
    for one in made:
        assert count(one) == 0
        if temperature == 0:  # and nothing else changed: the likeliest of what was left
            ids = tuple(one.prompt_ids)
            for token in one.ids:
                left = [t for t in range(VOCAB) if t == EOS or not repeats((*ids, t), size)]
                assert token == max(left, key=lambda t, ids=ids: next_logprobs(ids)[t])
                ids = (*ids, token)


def test_where_every_token_would_repeat_and_none_ends_the_text_goes_on():
    sampling = SamplingConfig(temperature=0, max_new_tokens=9, no_repeat_ngram=1)
    [made] = generator(None).generate([[0]], sampling)
    assert len(made.ids) == 9
    assert sorted([0, *made.ids[:4]]) == list(range(VOCAB))


def test_too_few_texts_for_what_was_asked_is_told():
    sampling = SamplingConfig(beams=30, n_best=30, max_new_tokens=1)
    with pytest.raises(UserError, match=r"n_best is 30, but after one of the prompts only 5 text\(s\) can come"):
        generator().generate([[1]], sampling)


def test_a_diverged_model_is_told():
    params = jax.tree.map(lambda x: x * jnp.nan, some_params())
    broken = Generator(TINY, params, vocab_size=VOCAB, eos_id=EOS)
    with pytest.raises(UserError, match="prompt 0: the model's logits are not finite"):
        broken.generate([[1], [2]], SamplingConfig(beams=2, max_new_tokens=2))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"beams": 0}, "beams is 0"),
        ({"beams": 2, "n_best": 3}, "n_best is 3 and beams 2"),
        ({"n_best": 2}, "n_best is 2 and beams 1"),
        ({"beams": 2, "n_best": 0}, "n_best is 0"),
        ({"beams": 2, "length_penalty": -1.0}, "length_penalty is -1.0"),
        ({"beams": 2, "length_penalty": math.inf}, "length_penalty is inf"),
        ({"length_penalty": 1.0}, "only a beam search reads it"),
        ({"no_repeat_ngram": -1}, "no_repeat_ngram is -1"),
        ({"beams": 2, "top_k": 5}, "top_k is 5, but a beam search draws nothing"),
        ({"beams": 2, "temperature": 0.7}, "temperature is 0.7, but a beam search"),
        ({"beams": 2, "repetition_penalty": 1.2}, "repetition_penalty is 1.2, but a beam search"),
    ],
)
def test_nonsense_is_refused(settings, said):
    with pytest.raises(UserError, match=said) as error:
        SamplingConfig(**settings)
    assert "\n" not in str(error.value)


def test_greedy_settings_serve_a_search_too():
    assert SamplingConfig(beams=2, temperature=0).beams == 2
