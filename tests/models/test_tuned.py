"""Low-rank terms, adapters and learned prompts in the model, against sums written out and against plain models."""

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import linen as nn

from lm import tree
from lm.errors import UserError
from lm.generate import Generator, SamplingConfig
from lm.models.layers import Adapter, Dense, project_together
from lm.models.lora import LoraConfig
from lm.models.transformer import ModelConfig, Transformer
from lm.sharding import MeshConfig, make_mesh, parameter_shardings

F32 = jnp.dtype("float32")
TOKENS = np.random.default_rng(1).integers(1, 64, (3, 12), np.int32)
LLAMA = {"positions": "rope", "norm": "rmsnorm", "activation": "swiglu", "use_bias": False, "n_kv_heads": 2}
BERT = {"mask": "bidirectional", "norm_place": "post", "embedding_norm": True, "token_types": 2}
EVERYWHERE = LoraConfig(rank=3, alpha=6.0, targets=".*")
FAMILIES = {
    "gpt": {},
    "llama": LLAMA | {"qk_norm": True, "remat": "full", "unroll": 1},
    "bert": BERT,
    "t5": {"encoder_layers": 2, "positions": "relative", "norm": "rmsnorm", "use_bias": False},
}


def noisy(config: ModelConfig, scale: float = 0.2) -> tuple[Transformer, Any]:
    """A model whose parameters are all drawn, those that begin with 0 as well."""
    model, params = tiny.build(config)
    rng = np.random.default_rng(7)
    return model, jax.tree.map(lambda p: p + scale * rng.standard_normal(p.shape).astype(np.float32), params)


@functools.cache
def applied(model: Transformer):
    return jax.jit(functools.partial(model.apply))


def logits(model: Transformer, params: Any, **inputs: Any) -> np.ndarray:
    if model.config.encoder_layers:
        inputs = {"source_tokens": TOKENS + 0, **inputs}
    return np.asarray(applied(model)({"params": params}, TOKENS, **inputs))


@pytest.mark.parametrize("family", tiny.fast(FAMILIES, "llama"))
def test_a_model_begins_as_it_was(family: str) -> None:
    """Low-rank terms and adapters change neither what a model computes at first nor another parameter's value."""
    plain = tiny.config(**FAMILIES[family])
    tuned = dataclasses.replace(plain, lora=EVERYWHERE, adapter_dim=5)
    before, after = (dict(tree.path_leaves(tiny.init(config))) for config in (plain, tuned))
    for path, leaf in before.items():
        np.testing.assert_array_equal(after[path], leaf, err_msg=path)
    new = after.keys() - before.keys()
    assert {path.split("/")[-2] for path in new} == {"lora_a", "lora_b", "down", "up"}
    assert all(np.any(np.asarray(after[path])) == path.endswith(("lora_a/kernel", "down/kernel")) for path in new)
    np.testing.assert_array_equal(*(logits(Transformer(c), tiny.init(c)) for c in (plain, tuned)))


def test_a_low_rank_term_is_the_paper_s() -> None:
    """`x W + b + alpha / rank * x A B`, in float64; alone and beside other projections."""
    rng, lora = np.random.default_rng(0), LoraConfig(rank=2, alpha=5.0)
    dense = functools.partial(Dense, axes=(None, None, None), use_bias=True, dtype=F32, param_dtype=F32)
    with_term = dense((3, 4), kernel_init=jax.nn.initializers.normal(1.0), lora=lora)
    x = rng.standard_normal((5, 6)).astype(np.float32)
    params = nn.unbox(with_term.init(jax.random.key(0), x))["params"]
    params = jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape), p.dtype), params)
    values = {path: np.asarray(leaf, np.float64) for path, leaf in tree.path_leaves(params)}
    a, b = values["lora_a/kernel"], values["lora_b/kernel"].reshape(2, -1)
    wanted = x @ values["kernel"].reshape(6, -1) + values["bias"].reshape(-1) + 2.5 * (x @ a) @ b
    np.testing.assert_allclose(with_term.apply({"params": params}, x).reshape(5, -1), wanted, rtol=2e-5)
    plain = dense((3, 4), kernel_init=jax.nn.initializers.normal(1.0))
    bare = {"kernel": params["kernel"], "bias": params["bias"]}
    both = project_together(jnp.asarray(x), with_term.bind({"params": params}), plain.bind({"params": bare}))
    np.testing.assert_allclose(both[0].reshape(5, -1), wanted, rtol=2e-5)
    np.testing.assert_allclose(both[1], plain.apply({"params": bare}, x), rtol=1e-5)


def test_an_adapter_is_the_paper_s() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, 8)).astype(np.float32)
    adapter = Adapter(5, jax.nn.initializers.normal(1.0), F32)
    params = jax.tree.map(
        lambda p: jnp.asarray(rng.standard_normal(p.shape), p.dtype),
        nn.unbox(adapter.init(jax.random.key(0), x))["params"],
    )
    v = {path: np.asarray(leaf, np.float64) for path, leaf in tree.path_leaves(params)}
    inner = x @ v["down/kernel"] + v["down/bias"]
    erf = np.vectorize(math.erf)
    gelu = inner * 0.5 * (1 + erf(inner / np.sqrt(2)))
    wanted = x + gelu @ v["up/kernel"] + v["up/bias"]
    np.testing.assert_allclose(adapter.apply({"params": params}, x), wanted, rtol=1e-5, atol=1e-5)


def test_dropout_is_on_what_the_term_reads_alone() -> None:
    """The mean over many draws is the value without dropout, and without a term nothing is drawn."""
    config = tiny.config(n_layers=1, lora=LoraConfig(rank=2, dropout=0.5, targets=r".*attention/value"))
    model, params = noisy(config)
    key = jax.random.key(0)
    fixed = logits(model, params)

    @jax.jit
    def drawn(params: Any, key: Any) -> Any:
        return model.apply({"params": params}, TOKENS, deterministic=False, rngs={"dropout": key})

    several = np.stack([drawn(params, jax.random.fold_in(key, i)) for i in range(3)])
    assert np.abs(several[0] - several[1]).max() > 1e-3
    silent = jax.tree_util.tree_map_with_path(lambda path, p: p * ("lora_b" not in str(path)), params)
    np.testing.assert_allclose(drawn(silent, key), logits(model, silent), atol=1e-6)
    dense = Dense(
        (4,), (None, None), False, jax.nn.initializers.normal(1.0), F32, F32, lora=LoraConfig(rank=2, dropout=0.5)
    )
    x = np.random.default_rng(0).standard_normal((3, 6)).astype(np.float32)
    weights = jax.tree.map(lambda p: p + 0.5, nn.unbox(dense.init(jax.random.key(0), x))["params"])
    keys = jax.random.split(key, 4000)
    rows = jax.vmap(lambda key: dense.apply({"params": weights}, x, False, rngs={"dropout": key}))(keys)
    error = np.abs(np.mean(rows, axis=0) - dense.apply({"params": weights}, x))
    assert np.all(error < 5 * np.std(rows, axis=0) / np.sqrt(len(keys)) + 1e-6)
    assert fixed.shape == several[0].shape


def test_the_base_in_half_precision_has_float32_terms() -> None:
    config = tiny.config(param_dtype="bfloat16", compute_dtype="bfloat16", lora=EVERYWHERE, adapter_dim=4, prompt_len=2)
    kinds = {path: leaf.dtype for path, leaf in tree.path_leaves(tiny.build(config)[1])}
    assert {str(kind) for path, kind in kinds.items() if "lora" in path or "adapter" in path or "prompt/" in path} == {
        "float32"
    }
    assert {str(kind) for path, kind in kinds.items() if path.endswith("query/kernel")} == {"bfloat16"}


@pytest.mark.parametrize("family", tiny.fast(["gpt", "llama"], "llama"))
def test_a_mesh_computes_the_same(family: str) -> None:
    config = tiny.config(**FAMILIES[family], lora=EVERYWHERE, adapter_dim=4, prompt_len=3)
    model, params = noisy(config)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    boxed = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    at = parameter_shardings(boxed, mesh)
    a = at["layers"]["attention"]["query"]["lora_a"]["kernel"]
    assert a.spec[1] == "fsdp", "a term lies as its kernel does"
    tokens = np.concatenate([TOKENS, TOKENS[:1]])
    wanted = model.apply({"params": params}, tokens)
    with jax.set_mesh(mesh):
        found = jax.jit(lambda p: model.apply({"params": p}, tokens))(jax.device_put(params, at))
    np.testing.assert_allclose(found, wanted, atol=2e-5)


PROMPTED = {
    "learned": {},
    "rope": LLAMA,
    "relative": {"positions": "relative", "window": 6},
    "sinusoidal": {"positions": "sinusoidal", "scale_embeddings": True, "embedding_norm": True},
    "bert": BERT,
    "prefix": {"mask": "prefix"},
}


@pytest.mark.parametrize(
    ("kind", "padded"),
    tiny.fast(
        itertools.product(PROMPTED, [False, True]),
        *[("learned", True), ("rope", False), ("relative", True), ("sinusoidal", False), ("bert", True)],
        ("prefix", True),
    ),
)
def test_a_prompt_of_tokens_vectors_is_those_tokens(kind: str, padded: bool) -> None:
    """A learned prompt that holds the vectors of some tokens, against the plain model with these tokens in front."""
    config = tiny.config(**PROMPTED[kind])
    plain, params = noisy(config)
    before = np.array([5, 9, 2, 33], np.int32)
    prompted = Transformer(dataclasses.replace(config, prompt_len=4))
    table = params["embed"]["embedding"] * (config.d_model**0.5 if config.scale_embeddings else 1)
    with_prompt = params | {"prompt": {"embedding": table[before]}}
    line = np.concatenate([np.broadcast_to(before, (3, 4)), TOKENS], axis=1)
    inputs: dict[str, Any] = {}
    if padded:
        inputs["segments"] = (np.arange(12) < np.array([12, 7, 1])[:, None]).astype(np.int32)
    if kind == "bert":
        inputs["types"] = np.broadcast_to(np.arange(12, dtype=np.int32) > 6, (3, 12)).astype(np.int32)
    if kind == "prefix":
        inputs["prefix"] = np.broadcast_to(np.arange(12, dtype=np.int32) < 4, (3, 12)).astype(np.int32)
    theirs = {name: np.pad(rows, ((0, 0), (4, 0)), mode="edge") for name, rows in inputs.items()}
    found = prompted.apply({"params": with_prompt}, TOKENS, **inputs)
    wanted = plain.apply({"params": params}, line, **theirs)[:, 4:]
    there = inputs.get("segments", np.ones((3, 12))) > 0
    np.testing.assert_allclose(np.asarray(found)[there], np.asarray(wanted)[there], atol=2e-5)


@pytest.mark.parametrize("kind", tiny.fast(["learned", "rope", "relative", "prefix"], "rope", "prefix"))
def test_decoding_with_a_cache_is_running_the_whole_model(kind: str) -> None:
    """Greedy tokens of a model with all three, from prompts of several lengths."""
    changes = PROMPTED[kind] | {"lora": EVERYWHERE, "adapter_dim": 4, "prompt_len": 3}
    model, params = noisy(tiny.config(**changes))
    generator = Generator(model.config, params, vocab_size=64, eos_id=None)
    prompts = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7], [2, 7]]
    apply = jax.jit(lambda tokens, prefix: model.apply({"params": params}, tokens, prefix=prefix))
    for prompt, made in zip(prompts, generator.generate(prompts, SamplingConfig(temperature=0, max_new_tokens=6))):
        ids = list(prompt)
        for logprob in made.logprobs:
            rows = np.zeros((1, 20), np.int32)
            rows[0, : len(ids)] = ids
            prefix = (np.arange(20) < len(prompt)).astype(np.int32)[None]
            scores = apply(rows, prefix)[0, len(ids) - 1]
            ids.append(int(np.argmax(scores)))
            assert logprob == pytest.approx(float(jax.nn.log_softmax(scores)[ids[-1]]), abs=1e-4)
        assert made.ids == ids[len(prompt) :]
    beams = generator.generate(prompts[:1], SamplingConfig(beams=2, max_new_tokens=3))
    assert len(beams[0].ids) == 3
    longest = Generator(model.config, params, vocab_size=64, eos_id=None)
    with pytest.raises(UserError, match=r"29 tokens; the model's context .* is 29, new tokens included"):
        longest.generate([[1] * 29], SamplingConfig())


MISTAKES = {
    "rank": ({"lora": {"rank": -1}}, "model.lora.rank is -1"),
    "alpha": ({"lora": {"rank": 1, "alpha": 0.0}}, "model.lora.alpha is 0.0"),
    "dropout": ({"lora": {"rank": 1, "dropout": 1.0}}, "model.lora.dropout is 1.0"),
    "no rank": ({"lora": {"alpha": 32.0}}, r"model.lora.alpha is 32.0, and without model.lora.rank .* set the rank"),
    "too high": ({"lora": {"rank": 33}}, "model.lora.rank is 33, more than model.d_model = 32"),
    "no expression": (
        {"lora": {"rank": 1, "targets": "("}},
        r"model.lora.targets is '\(', which is no regular expression",
    ),
    "nothing matched": (
        {"lora": {"rank": 2, "targets": "c_attn"}},
        "matches none of layers/attention/query, layers/attention/key, .*layers/mlp/down; it is a regular expression",
    ),
    "adapter": ({"adapter_dim": -1}, "model.adapter_dim is -1"),
    "prompt": ({"prompt_len": 32}, "model.prompt_len = 32 leaves no room in model.max_len = 32"),
    "prompt of an encoder-decoder": (
        {"prompt_len": 2, "encoder_layers": 1},
        "set model.lora.rank or model.adapter_dim",
    ),
}


@pytest.mark.parametrize(("changes", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny.config(**{name: LoraConfig(**v) if isinstance(v, dict) else v for name, v in changes.items()})


def test_a_row_too_long_for_the_prompt() -> None:
    model, params = tiny.build(tiny.config(prompt_len=25))
    with pytest.raises(UserError, match=r"12 tokens in a row, and model.max_len is 32 with a prompt of 25"):
        model.apply({"params": params}, TOKENS)
