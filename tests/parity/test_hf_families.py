"""Every family and variant: logits of a folder that transformers wrote, as torch computes them, and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pretrained import load_folder

from lm.hf.export import write_weights
from lm.hf.families import expressed
from lm.models.transformer import Transformer

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

V, LENGTH = 64, 20
SIZES = {
    "vocab_size": V,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 32,
}
GROUPED = SIZES | {"num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
GPT2 = {
    "vocab_size": V,
    "n_positions": 32,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
T5 = {
    "vocab_size": V,
    "d_model": 32,
    "d_kv": 6,
    "d_ff": 48,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# name: (class, class of its config, settings)
DECODERS = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "gpt2 exact gelu, narrow": ("GPT2LMHeadModel", "GPT2Config", GPT2 | {"activation_function": "gelu", "n_inner": 24}),
    "gpt2 unscaled, untied": (
        "GPT2LMHeadModel",
        "GPT2Config",
        GPT2 | {"scale_attn_weights": False, "tie_word_embeddings": False},
    ),
    "llama": ("LlamaForCausalLM", "LlamaConfig", SIZES),
    "llama 2 grouped": ("LlamaForCausalLM", "LlamaConfig", GROUPED | {"rms_norm_eps": 1e-5}),
    "llama 3": ("LlamaForCausalLM", "LlamaConfig", GROUPED | {"rope_parameters": LLAMA3}),
    "llama 3 tied": ("LlamaForCausalLM", "LlamaConfig", GROUPED | {"tie_word_embeddings": True}),
    "llama stretched": (
        "LlamaForCausalLM",
        "LlamaConfig",
        GROUPED | {"rope_parameters": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0}},
    ),
    "llama with biases": ("LlamaForCausalLM", "LlamaConfig", GROUPED | {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("MistralForCausalLM", "MistralConfig", GROUPED | {"sliding_window": 5}),
    "mistral without window": ("MistralForCausalLM", "MistralConfig", GROUPED | {"sliding_window": None}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", GROUPED),
    "qwen2 with window": (
        "Qwen2ForCausalLM",
        "Qwen2Config",
        GROUPED | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0},
    ),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", GROUPED | {"head_dim": 12}),
}
BERTS = {
    "words": "BertForMaskedLM",
    "words and pairs": "BertForPreTraining",
    "pairs": "BertForNextSentencePrediction",
    "classes": "BertForSequenceClassification",
    "bare": "BertModel",
    "spans": "BertForQuestionAnswering",
}


def build(cls: str, config: str, settings: dict):
    """A model of transformers with weights far from even."""
    import torch
    import transformers

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = getattr(transformers, cls)(getattr(transformers, config)(**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def padded(seed: int = 0) -> dict[str, np.ndarray]:
    """Rows without padding, with padding behind and before; positions count what is there."""
    rng = np.random.RandomState(seed)
    at = np.arange(LENGTH)[None]
    there = (at >= np.array([0, 0, 0, 6, 3])[:, None]) & (at < np.array([LENGTH, 13, 9, LENGTH, LENGTH])[:, None])
    return {
        "tokens": np.where(there, rng.randint(3, V, there.shape), 0).astype(np.int32),
        "segments": there.astype(np.int32),
        "positions": np.maximum(np.cumsum(there, axis=1) - 1, 0).astype(np.int32),
        "types": ((at >= 8) & there).astype(np.int32),
    }


def as_torch(batch: dict[str, np.ndarray]) -> dict:
    import torch

    return {
        "input_ids": torch.from_numpy(batch["tokens"]).long(),
        "attention_mask": torch.from_numpy(batch["segments"]).long(),
        "position_ids": torch.from_numpy(batch["positions"]).long(),
    }


def close(ours, theirs, there=None, tolerance: float = 1e-4) -> None:
    theirs = theirs.detach().numpy()
    if there is not None:
        ours, theirs = np.asarray(ours)[there], theirs[there]
    assert np.ptp(theirs) > 0.5
    np.testing.assert_allclose(ours, theirs, atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", DECODERS)
def test_logits_of_decoders(name, tmp_path):
    import torch

    theirs = build(*DECODERS[name])
    theirs.save_pretrained(tmp_path)
    model, params = load_folder(tmp_path)
    batch = padded()
    with torch.no_grad():
        expected = theirs(**as_torch(batch)).logits
    arguments = batch["tokens"], batch["positions"], batch["segments"]
    ours = jax.jit(lambda params: Transformer(model).apply({"params": params}, *arguments))(params)
    close(ours, expected, batch["segments"] > 0)


@pytest.mark.parametrize("name", ["gpt2", "llama 2 grouped", "mistral", "qwen2", "qwen3"])
def test_classifiers_on_decoders(name, tmp_path):
    """They read the last token that is no padding, on whichever side that is."""
    import torch

    cls, config, settings = DECODERS[name]
    cls = cls.replace("LMHeadModel", "ForSequenceClassification").replace("ForCausalLM", "ForSequenceClassification")
    theirs = build(cls, config, settings | {"num_labels": 3, "pad_token_id": 0})
    theirs.save_pretrained(tmp_path)
    model, params = load_folder(tmp_path)
    assert (model.n_classes, model.pooling, model.classifier_bias) == (3, "last", False)
    batch = padded()
    with torch.no_grad():
        expected = theirs(**as_torch(batch)).logits
    bound = Transformer(model).bind({"params": params})
    hidden, _ = bound.hidden(batch["tokens"], batch["positions"], batch["segments"])
    close(bound.classify(hidden, batch["segments"]), expected)


@pytest.mark.parametrize("name", ["gpt2", "llama 3"])
def test_gradients_of_decoders(name, tmp_path):
    """By the names of transformers: our gradients go out through the table that brought the weights in."""
    import torch
    from safetensors.numpy import load_file

    theirs = build(*DECODERS[name])
    theirs.save_pretrained(tmp_path)
    model, params = load_folder(tmp_path)
    batch = padded(1)
    targets = np.where(batch["segments"] > 0, np.roll(batch["tokens"], -1, axis=1), -100)
    logits = theirs(**as_torch(batch)).logits
    loss = torch.nn.functional.cross_entropy(logits.reshape(-1, V), torch.from_numpy(targets).long().reshape(-1))
    loss.backward()

    def our_loss(params):
        arguments = batch["tokens"], batch["positions"], batch["segments"]
        logits = Transformer(model).apply({"params": params}, *arguments)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
        return -jnp.sum(jnp.where(targets >= 0, chosen, 0.0)) / np.sum(targets >= 0)

    value, gradient = jax.jit(jax.value_and_grad(our_loss))(params)
    np.testing.assert_allclose(value, float(loss), rtol=1e-5)
    family, architecture, _ = expressed(model, "causal_lm")
    out = tmp_path / "gradient"
    out.mkdir()
    write_weights(out, family, architecture, gradient, dtype=np.float32, max_shard_size=10**9)
    ours = load_file(out / "model.safetensors")
    wanted = {name: parameter.grad.numpy() for name, parameter in theirs.named_parameters()}
    assert ours.keys() == wanted.keys()
    for name, grad in wanted.items():
        largest = np.max(np.abs(grad))
        if name.endswith("c_attn.bias"):  # a bias on keys changes nothing: a third of it is noise around 0
            grad, ours[name] = np.delete(grad, slice(32, 64)), np.delete(ours[name], slice(32, 64))
        assert np.max(np.abs(ours[name] - grad)) <= 1e-3 * largest, name


def outputs(model, params, batch):
    """Everything a BERT may say."""

    @jax.jit
    def run(params):
        bound = Transformer(model).bind({"params": params})
        segments = batch["segments"]
        hidden, _ = bound.hidden(batch["tokens"], batch["positions"], segments, types=batch["types"])
        found = {"hidden": hidden, "words": bound.logits(hidden)}
        if model.pooler:
            found["pooled"] = bound.pooled(hidden, segments)
        if model.n_classes:
            found["classes"] = bound.classify(hidden, segments)
        if model.span_head:
            found["spans"] = bound.spans(hidden)
        return found

    return run(params)


@pytest.mark.parametrize("name", BERTS)
def test_heads_of_bert(name, tmp_path):
    import torch

    settings = SIZES | {"num_labels": 3} if name == "classes" else SIZES
    theirs = build(BERTS[name], "BertConfig", settings)
    theirs.save_pretrained(tmp_path)
    model, params = load_folder(tmp_path)
    batch = padded()
    # The first token stands for a row, so rows have padding behind alone where that counts.
    behind = batch["segments"][:, 0] > 0
    there = batch["segments"] > 0
    ours = outputs(model, params, batch)
    with torch.no_grad():
        out = theirs(**as_torch(batch), token_type_ids=torch.from_numpy(batch["types"]).long())
    if name in ("words", "words and pairs"):
        close(ours["words"], out.logits if name == "words" else out.prediction_logits, there)
    if name == "words and pairs":
        close(ours["classes"], out.seq_relationship_logits, behind)
    if name in ("pairs", "classes"):
        close(ours["classes"], out.logits, behind)
        assert model.n_classes == (3 if name == "classes" else 2)
    if name == "bare":
        close(ours["hidden"], out.last_hidden_state, there)
        close(ours["pooled"], out.pooler_output, behind)
    if name == "spans":
        close(ours["spans"][..., 0], out.start_logits, there)
        close(ours["spans"][..., 1], out.end_logits, there)


def test_bert_as_sentence_embedder(tmp_path):
    """A folder of sentence-transformers that takes the mean of what is there."""
    import torch

    theirs = build("BertModel", "BertConfig", SIZES)
    theirs.save_pretrained(tmp_path)
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    model, params = load_folder(tmp_path)
    assert (model.pooling, model.pooler) == ("mean", False)
    batch = padded()
    with torch.no_grad():
        hidden = theirs(**as_torch(batch), token_type_ids=torch.from_numpy(batch["types"]).long()).last_hidden_state
    mask = torch.from_numpy(batch["segments"])[..., None].float()
    expected = (hidden * mask).sum(1) / mask.sum(1)
    bound = Transformer(model).bind({"params": params})
    ours = bound.pooled(
        bound.hidden(batch["tokens"], batch["positions"], batch["segments"], types=batch["types"])[0], batch["segments"]
    )
    close(ours, expected)


@pytest.mark.parametrize("version", ["1.0", "1.1", "1.1 with a head of its own", "gated silu"])
def test_logits_of_t5(version, tmp_path):
    import torch

    changes = {} if version == "1.0" else {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    if version == "gated silu":
        changes = {"feed_forward_proj": "gated-silu"}
    theirs = build("T5ForConditionalGeneration", "T5Config", T5 | changes)
    theirs.save_pretrained(tmp_path)
    if "head" in version:  # as the files of 1.1 have it; transformers 5 makes none like it, and reads them
        import json

        from safetensors.torch import load_file, save_file

        weights = load_file(tmp_path / "model.safetensors")
        weights["lm_head.weight"] = torch.randn(V, 32)
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((tmp_path / "config.json").read_text())
        del config["scale_decoder_outputs"]
        (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
        theirs = type(theirs).from_pretrained(tmp_path).eval()
    model, params = load_folder(tmp_path)
    assert model.tie_embeddings == ("head" not in version)
    assert model.scale_logits == (version in ("1.0", "gated silu"))
    source, target = padded(), padded(1)["tokens"][:, :7]
    with torch.no_grad():
        expected = theirs(
            input_ids=torch.from_numpy(source["tokens"]).long(),
            attention_mask=torch.from_numpy(source["segments"]).long(),
            decoder_input_ids=torch.from_numpy(target).long(),
        ).logits
    names = {"source_tokens": source["tokens"], "source_segments": source["segments"]}
    ours = jax.jit(lambda params: Transformer(model).apply({"params": params}, target, **names))(params)
    close(ours, expected)
