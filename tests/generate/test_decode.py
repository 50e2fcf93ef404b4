import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lm.errors import UserError
from lm.generate import Generator, SamplingConfig, decode
from lm.generate import generator as generators
from lm.generate.sampling import draw
from lm.models.transformer import ModelConfig, Transformer, init_cache
from lm.text.tokenizer import ByteTokenizer

VOCAB = 40
TINY = ModelConfig(vocab_size=48, d_model=32, n_layers=2, n_heads=4, max_len=96)
PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7], [2, 7]]
GREEDY = SamplingConfig(temperature=0, max_new_tokens=20)


@functools.cache
def some_params(config: ModelConfig):
    """Random values for every leaf, biases and norms too; nothing to compile."""
    init = functools.partial(Transformer(config).init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
    rng = np.random.default_rng(0)
    shapes = nn.unbox(jax.eval_shape(init)["params"])
    return jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.array(rng.normal("scale" in str(path[-1]), 0.3, x.shape), x.dtype), shapes
    )


@functools.cache
def generator(eos_id: int | None = None) -> Generator:
    return Generator(TINY, some_params(TINY), vocab_size=VOCAB, eos_id=eos_id)


def letters(ids: list[int]) -> str:
    """A decoder of one character a token, all different."""
    return "".join(chr(ord("A") + i) for i in ids)


def full_logits(config: ModelConfig):
    """Uncached logits of one sequence at a time, compiled once for the longest."""
    apply = jax.jit(functools.partial(Transformer(config).apply, {"params": some_params(config)}))

    def logits(ids: list[int], length: int = TINY.max_len) -> np.ndarray:
        padded = np.zeros((1, length), np.int32)
        padded[0, : len(ids)] = ids
        return np.asarray(apply(padded))[0, : len(ids)]

    return logits


# Pairwise: every position encoding, kind of heads, norm place and bound meets every other at least once, or nearly.
KINDS = {
    "learned": {},
    "learned-gqa-post-window": {"n_kv_heads": 2, "norm_place": "post", "window": 5},
    "rope-gqa-window-rmsnorm": {"n_kv_heads": 2, "window": 4, "norm": "rmsnorm", "activation": "swiglu"},
    "rope-mqa-post-softcap": {"n_kv_heads": 1, "norm_place": "post", "attention_softcap": 2.0, "logit_softcap": 3.0},
    "sinusoidal-mqa-window": {"n_kv_heads": 1, "window": 1, "use_bias": False},
    "sinusoidal-softcap": {"attention_softcap": 2.0, "tie_embeddings": False},
    "none-mqa-window-softcap": {"n_kv_heads": 1, "window": 6, "attention_softcap": 1.5, "qk_norm": True},
    "none-gqa-post": {"n_kv_heads": 2, "norm_place": "post", "norm": "rmsnorm", "head_dim": 6},
}


@pytest.mark.parametrize("kind", KINDS)
def test_cached_logits_equal_uncached(kind):
    config = dataclasses.replace(TINY, max_len=24, positions=kind.split("-")[0], **KINDS[kind])
    rows = np.random.default_rng(0).integers(0, 48, (3, 24), np.int32)
    lengths = np.array([3, 11, 1], np.int32)  # of the prompts; the rest comes token by token
    padded = np.where(np.arange(16) < lengths[:, None], rows[:, :16], 0)
    model = Transformer(config)

    @jax.jit
    def all_ways(params):
        ready = decode.for_decoding(params, config)

        def forward(cache, tokens, at):
            hidden, cache = decode.forward(model, ready, cache, tokens, at)
            return cache, model.apply({"params": params}, hidden, method="logits")

        def step(cache, at):
            return forward(cache, jnp.take_along_axis(jnp.array(rows), at, axis=1), at)

        cache = decode.unstacked(init_cache(config, 3, 24), config.n_layers)
        cache, prompt = forward(cache, padded, jnp.broadcast_to(jnp.arange(16), (3, 16)))
        _, later = jax.lax.scan(step, cache, lengths[:, None] + np.arange(13, dtype=np.int32)[:, None, None])
        return prompt, later[:, :, 0], model.apply({"params": params}, rows)

    prompt, later, want = all_ways(some_params(config))
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(prompt[row, :length], want[row, :length], atol=1e-5, rtol=0)
        np.testing.assert_allclose(later[:, row], want[row, length : length + 13], atol=1e-5, rtol=0)


def test_greedy_equals_running_the_whole_model_for_every_token():
    logits = full_logits(TINY)
    for prompt, made in zip(PROMPTS, generator().generate(PROMPTS, GREEDY)):
        ids = list(prompt)
        for logprob in made.logprobs:
            scores = logits(ids)[-1]
            ids.append(int(scores[:VOCAB].argmax()))
            assert logprob == pytest.approx(float(jax.nn.log_softmax(scores)[ids[-1]]), abs=1e-5)
        assert made.prompt_ids == prompt
        assert made.ids == ids[len(prompt) :]
        assert (len(made.ids), len(made.logprobs), made.finished, made.text) == (20, 20, "length", None)


def test_greedy_with_a_repetition_penalty_equals_the_plain_loop():
    logits, penalty = full_logits(TINY), 5.0
    sampling = dataclasses.replace(GREEDY, repetition_penalty=penalty)
    for prompt, made in zip(PROMPTS, generator().generate(PROMPTS, sampling)):
        ids = list(prompt)
        for _ in range(20):
            scores = logits(ids)[-1][:VOCAB].copy()
            for token in set(ids):
                scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
            ids.append(int(scores.argmax()))
        assert made.ids == ids[len(prompt) :]


def test_a_sample_does_not_depend_on_the_batch_the_chunks_or_the_length(monkeypatch):
    sampling = SamplingConfig(temperature=1.5, top_k=30, top_p=0.95, max_new_tokens=20, seed=7)
    together = [made.ids for made in generator().generate(PROMPTS, sampling)]
    assert [generator().generate([prompt], sampling)[0].ids for prompt in PROMPTS] == together
    assert [made.ids for made in generator().generate(PROMPTS[::-1], sampling)] == together[::-1]
    shorter = dataclasses.replace(sampling, max_new_tokens=5)
    assert [made.ids for made in generator().generate(PROMPTS, shorter)] == [ids[:5] for ids in together]

    monkeypatch.setattr(generators, "CHUNK", 7)
    assert [made.ids for made in generator().generate(PROMPTS, sampling)] == together


def test_seeds_and_repeated_prompts_differ_and_the_same_seed_does_not():
    sampling = SamplingConfig(temperature=1.5, max_new_tokens=20)
    first, second = (made.ids for made in generator().generate([[3], [3]], sampling))
    assert first != second
    again = [made.ids for made in generator().generate([[3], [3]], sampling)]
    assert again == [first, second]
    other = [made.ids for made in generator().generate([[3], [3]], dataclasses.replace(sampling, seed=1))]
    assert first not in other
    assert second not in other


def test_compiles_once_per_batch_and_length_bucket(monkeypatch):
    traced = []
    monkeypatch.setattr(decode, "init_cache", lambda *args: (traced.append("prefill"), init_cache(*args))[1])
    monkeypatch.setattr(decode, "draw", lambda *args: (traced.append("decode"), draw(*args))[1])
    config = dataclasses.replace(TINY, max_len=300, n_layers=1, positions="none")

    def compiled(lengths: list[int], **settings: object) -> set[str]:
        traced.clear()
        made = Generator(config, some_params(config), vocab_size=VOCAB, eos_id=None)  # shares what others compiled
        made.generate([[1] * length for length in lengths], SamplingConfig(**{"max_new_tokens": 18} | settings))
        return set(traced)

    assert compiled([5]) == {"prefill", "decode"}
    # Other lengths of the same bucket, values and seeds: nothing.
    assert compiled([30]) == compiled([46]) == set()
    assert compiled([1], max_new_tokens=40, temperature=0.3, seed=9, ignore_eos=True) == set()
    assert compiled([5, 9]) == {"prefill", "decode"}
    assert compiled([46, 1]) == set()
    assert compiled([60]) == {"prefill", "decode"}  # a cache of 128
    assert compiled([50]) == set()
    assert compiled([100]) == {"prefill"}  # the same cache, a longer prompt
    assert compiled([5], max_new_tokens=1000) == {"prefill", "decode"}  # the context: 300, not 512
    assert compiled([280]) == {"prefill"}
    assert compiled([299]) == set()


def test_buckets():
    assert [decode.bucket(n, 1000) for n in (1, 64, 65, 128, 129, 600, 1000)] == [64, 64, 128, 128, 256, 1000, 1000]
    assert decode.bucket(3, 20) == 20


def test_ends_with_eos_unless_told_to_ignore_it():
    plain = generator().generate(PROMPTS, GREEDY)
    eos = plain[1].ids[6]
    ended = generator(eos).generate(PROMPTS, GREEDY, decode=letters)
    for before, after in zip(plain, ended):
        if eos in before.ids:
            assert after.ids == before.ids[: before.ids.index(eos)]
            assert after.finished == "eos"
        else:
            assert after.ids == before.ids
            assert after.finished == "length"
        assert after.logprobs == pytest.approx(before.logprobs[: len(after.ids)], abs=1e-6)
        assert after.text == letters(after.ids)
    assert ended[1].finished == "eos"
    ignoring = generator(eos).generate(PROMPTS, dataclasses.replace(GREEDY, ignore_eos=True))
    assert [made.ids for made in ignoring] == [made.ids for made in plain]


def test_stop_strings_cut_the_text():
    plain = generator().generate(PROMPTS, SamplingConfig(max_new_tokens=40), decode=letters)
    text = plain[1].text
    assert text is not None
    stops = (text[20:23], text[25:27], "not there")
    made = generator().generate(PROMPTS, SamplingConfig(max_new_tokens=40, stop=stops), decode=letters)
    for before, after in zip(plain, made):
        assert before.text is not None
        found = [before.text.find(stop) for stop in stops if stop in before.text]
        assert after.text == before.text[: min(found, default=40)]
        assert after.finished == ("stop" if found else "length")
        assert before.ids[: len(after.ids)] == after.ids
        assert len(after.logprobs) == len(after.ids)
    # One token a letter: the tokens end with the first stop string.
    assert letters(made[1].ids) in {text[: text.find(stop) + len(stop)] for stop in stops[:2]}


def test_streams_what_it_returns():
    text = generator().generate(PROMPTS, SamplingConfig(max_new_tokens=40), decode=letters)[1].text
    assert text is not None
    pieces: list[tuple[int, list[int], str]] = []
    sampling = SamplingConfig(max_new_tokens=40, stop=(text[15:18],))  # across the border of two chunks
    made = generator().generate(PROMPTS, sampling, decode=letters, on_tokens=lambda *piece: pieces.append(piece))
    for row, one in enumerate(made):
        assert [i for index, ids, _ in pieces for i in ids if index == row] == one.ids
        assert "".join(new for index, _, new in pieces if index == row) == one.text
    assert len(pieces) > len(PROMPTS)


def test_text_waits_for_whole_characters_and_possible_stops():
    tokenizer = ByteTokenizer()
    row = generators._Row([], tokenizer.encode("价"), ("##",), tokenizer.decode)
    said = [row.take([byte], [0.0], eos=256, limit=100)[1] for byte in "é中#a##".encode()]
    assert said == ["", "é", "", "", "中", "", "#a", "", ""]
    assert row.finished == "stop"
    assert row.generation().text == "é中#a"

    row = generators._Row([65], [65], (), tokenizer.decode)
    row.take([0xE4, 0xB8], [0.0, 0.0], eos=256, limit=3)  # ends inside a character: shown as what it is
    assert row.generation().text == "\ufffd"


def test_context_bounds_the_length():
    long = [1] * (TINY.max_len - 5)
    made = generator().generate([long, [1]], SamplingConfig(temperature=0, max_new_tokens=30))
    assert [len(one.ids) for one in made] == [5, 30]
    assert [one.finished for one in made] == ["length", "length"]
    logits = full_logits(TINY)
    assert made[0].ids[-1] == int(logits(long + made[0].ids[:-1])[-1][:VOCAB].argmax())


def test_never_draws_ids_beyond_the_tokenizer():
    made = Generator(TINY, some_params(TINY), vocab_size=5, eos_id=None)
    ids = made.generate([[1], [2]], SamplingConfig(temperature=100.0, max_new_tokens=60))
    assert {i for one in ids for i in one.ids} == {0, 1, 2, 3, 4}


def test_parameters_are_cast_once_but_norms_keep_float32():
    config = dataclasses.replace(TINY, compute_dtype="bfloat16")
    params = decode.for_decoding(some_params(config), config)
    assert len(params["layers"]) == 2
    assert params["embed"]["embedding"].dtype == jnp.bfloat16
    layer = params["layers"][1]
    assert layer["attention"]["query"]["kernel"].dtype == jnp.bfloat16
    assert layer["attention_norm"]["scale"].dtype == jnp.float32
    made = Generator(config, some_params(config), vocab_size=VOCAB, eos_id=None).generate(PROMPTS, GREEDY)[0]
    scores = full_logits(config)(PROMPTS[0])[-1]
    assert made.logprobs[0] == pytest.approx(float(jax.nn.log_softmax(scores)[made.ids[0]]), abs=0.05)


@pytest.mark.parametrize(
    ("prompts", "sampling", "said"),
    [
        ([], {}, "there is no prompt"),
        ([[1], []], {}, "prompt 1 has no token"),
        ([[1, 40]], {}, "prompt 0 has token id 40, outside the vocabulary; ids go from 0 to 39"),
        ([[1, -1]], {}, "token id -1"),
        ([[1] * 96], {}, "prompt 0 has 96 tokens; .* 96, .* 95 or fewer"),
        ([[1]], {"stop": ("x",)}, "need a tokenizer"),
    ],
)
def test_nonsense_is_refused(prompts, sampling, said):
    with pytest.raises(UserError, match=said) as error:
        generator().generate(prompts, SamplingConfig(**sampling))
    assert "\n" not in str(error.value)


def test_a_model_too_small_for_the_tokenizer_is_refused():
    with pytest.raises(UserError, match=r"the tokenizer has 49 ids but model\.vocab_size is 48"):
        Generator(TINY, some_params(TINY), vocab_size=49, eos_id=None)
    with pytest.raises(UserError, match="eos_id is 40"):
        Generator(TINY, some_params(TINY), vocab_size=40, eos_id=40)


def test_a_diverged_model_is_told():
    params = jax.tree.map(lambda x: x * jnp.nan, some_params(TINY))
    with pytest.raises(UserError, match="prompt 0: the model's logits are not finite"):
        Generator(TINY, params, vocab_size=VOCAB, eos_id=None).generate([[1]], GREEDY)
