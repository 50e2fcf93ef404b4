"""BERT with span scores: places, loss and gradient of `BertForQuestionAnswering` in torch."""

import dataclasses

import jax
import numpy as np
import pytest
import torch_families

from lm.models.transformer import Transformer
from lm.tasks.extractive_qa import ExtractiveQA

torch = pytest.importorskip("torch", reason="parity with torch needs it")

CONFIG = dataclasses.replace(torch_families.BERT, span_head=True)
LENGTHS = [(3, 6), (4, 7), (2, 3), (0, 0)]  # tokens of question and text; the last row is padding


def rows() -> dict[str, np.ndarray]:
    rng, T = np.random.RandomState(0), torch_families.LENGTH
    tokens = rng.randint(1, torch_families.VOCAB, (len(LENGTHS), T))
    sizes = np.array([q + text + 3 if text else 0 for q, text in LENGTHS])
    segments = (np.arange(T) < sizes[:, None]).astype(np.int32)
    behind = np.arange(T) >= np.array([q + 2 for q, _ in LENGTHS])[:, None]
    return {
        "tokens": (tokens * segments).astype(np.int32),
        "positions": np.arange(T, dtype=np.int32) * segments,
        "segments": segments,
        "types": (behind * segments).astype(np.int32),
        "starts": np.array([6, 0, 4, 0], np.int32),
        "ends": np.array([9, 0, 4, 0], np.int32),
        "label_weights": np.array([1, 1, 1, 0], np.float32),
    }


def weights() -> torch_families.Weights:
    shapes = torch_families.bert_shapes() | {"qa_outputs.weight": (2, torch_families.WIDTH), "qa_outputs.bias": (2,)}
    return torch_families.draw(shapes)


def theirs(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Of the rows that are none of padding, with the places closed that hold no answer."""
    import transformers

    config = transformers.BertConfig(
        vocab_size=torch_families.VOCAB,
        hidden_size=torch_families.WIDTH,
        num_hidden_layers=torch_families.LAYERS,
        num_attention_heads=torch_families.HEADS,
        intermediate_size=torch_families.FF,
        max_position_embeddings=torch_families.LENGTH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = transformers.BertForQuestionAnswering(config)
    drawn = weights()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(drawn[name]))
    is_open = np.zeros_like(batch["tokens"], bool)
    for row, (question, text) in enumerate(LENGTHS[:3]):
        is_open[row, [0, *range(question + 2, question + 2 + text)]] = True
    closed = torch.from_numpy(np.where(is_open[:3], 0.0, -1e9).astype(np.float32))[..., None]
    model.qa_outputs.register_forward_hook(lambda module, inputs, out: out + closed)
    long = {name: torch.from_numpy(values[:3]).long() for name, values in batch.items() if name != "label_weights"}
    out = model(
        input_ids=long["tokens"],
        token_type_ids=long["types"],
        attention_mask=long["segments"],
        start_positions=long["starts"],
        end_positions=long["ends"],
    )
    out.loss.backward()
    return {
        "open": is_open[:3],
        "start": out.start_logits.detach().numpy(),
        "end": out.end_logits.detach().numpy(),
        "loss": float(out.loss.detach()),
        "gradient": model.bert.embeddings.word_embeddings.weight.grad.numpy(),
    }


def test_scores_loss_and_gradient_are_theirs() -> None:
    batch, drawn, model, task = rows(), weights(), Transformer(CONFIG), ExtractiveQA(max_question=4)
    params = torch_families.bert_params(drawn)
    wanted = theirs(batch)

    def loss(params):
        total, sums = task.loss(model, params, batch, None)
        return total / sums["weight"], sums

    (value, sums), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    assert sums["weight"] == 3
    np.testing.assert_allclose(value, wanted["loss"], rtol=1e-5)
    np.testing.assert_allclose(sums["loss"] / 3, wanted["loss"], rtol=1e-5)
    np.testing.assert_allclose(gradient["embed"]["embedding"], wanted["gradient"], atol=1e-5, rtol=1e-4)

    hidden = model.apply(
        {"params": params}, batch["tokens"], None, batch["segments"], types=batch["types"], method="hidden"
    )[0]
    logits, _ = task.scores(model, params, hidden, batch)
    for at, name in enumerate(("start", "end")):
        ours = np.asarray(logits)[:3, at][wanted["open"]]
        assert np.ptp(ours) > 1
        np.testing.assert_allclose(ours, wanted[name][wanted["open"]], atol=1e-5, rtol=0)
        assert (np.asarray(logits)[:3, at][~wanted["open"]] < -1e8).all()
    assert sums["rows"]["loss"][3] == 0, "padding"
    assert wanted["loss"] > 1
