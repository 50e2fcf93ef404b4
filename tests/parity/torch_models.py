"""The same models and run in torch. Imports torch, so import it where torch is known to be."""

import numpy as np
import torch
import torch_families
import transformers
from hugging_face import (
    BETAS,
    CLIP,
    DECAY,
    EPSILON,
    HEADS,
    LAYERS,
    LENGTH,
    LLAMA,
    STEPS,
    VOCAB,
    WIDTH,
    Weights,
    batch,
    draw,
    learning_rate,
)

torch.set_num_threads(1)  # small matrices, and other tests beside


def gpt2(weights: Weights | None = None) -> torch.nn.Module:
    """`GPT2LMHeadModel` without dropout, with these weights or drawn ones."""
    config = transformers.GPT2Config(
        vocab_size=VOCAB,
        n_positions=LENGTH,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return _with_weights(transformers.GPT2LMHeadModel(config), weights)


def llama() -> torch.nn.Module:
    """`LlamaForCausalLM` with half as many key/value heads as heads."""
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        max_position_embeddings=LENGTH,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=LLAMA.kv_heads,
        intermediate_size=LLAMA.width_of_mlp,
        rms_norm_eps=LLAMA.norm_epsilon,
        tie_word_embeddings=False,
    )
    return _with_weights(transformers.LlamaForCausalLM(config), None)


def _with_weights(model: torch.nn.Module, weights: Weights | None) -> torch.nn.Module:
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    weights = draw(shapes) if weights is None else weights
    assert {name: w.shape for name, w in weights.items()} == shapes
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(weights[name]))
    return model


def weights_of(model: torch.nn.Module) -> Weights:
    """Copies by name."""
    return {name: p.detach().numpy().copy() for name, p in model.named_parameters()}


def logits(model: torch.nn.Module, tokens) -> object:
    """Of one batch, as numpy."""
    with torch.no_grad():
        return model(torch.from_numpy(tokens).long()).logits.numpy()


def train(model: torch.nn.Module) -> list[float]:
    """The losses of the run: AdamW, decay on matrices only, warmup, clipping."""
    decayed = [p for name, p in model.named_parameters() if p.ndim == 2 and ".wte." not in name and ".wpe." not in name]
    kept = {id(p) for p in decayed}
    groups = [
        {"params": decayed, "weight_decay": DECAY},
        {"params": [p for p in model.parameters() if id(p) not in kept], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=BETAS, eps=EPSILON)
    losses = []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        data = torch.from_numpy(batch(step)).long()
        out = model(data[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(out.reshape(-1, VOCAB), data[:, 1:].reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def bert() -> torch.nn.Module:
    """`BertForPreTraining` without dropout, with drawn weights."""
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
    return _with_weights(transformers.BertForPreTraining(config), torch_families.draw(torch_families.bert_shapes()))


def bert_outputs(model: torch.nn.Module) -> dict[str, object]:
    """Scores of words and of what follows what, and the loss of both, on `torch_families.bert_batch()`."""
    batch = torch_families.bert_batch()
    labels = np.where(batch["weights"] > 0, batch["targets"], -100)
    with torch.no_grad():
        out = model(
            input_ids=_long(batch["tokens"]),
            token_type_ids=_long(batch["types"]),
            attention_mask=_long(batch["segments"]),
            labels=_long(labels),
            next_sentence_label=_long(batch["labels"]),
        )
    return {
        "logits": out.prediction_logits.numpy(),
        "classes": out.seq_relationship_logits.numpy(),
        "loss": float(out.loss),
    }


def t5(gated: bool = False) -> torch.nn.Module:
    """`T5ForConditionalGeneration` without dropout, with drawn weights: 1.0, or 1.1 (gated, logits unscaled)."""
    config = transformers.T5Config(
        vocab_size=torch_families.VOCAB,
        d_model=torch_families.WIDTH,
        d_kv=torch_families.T5_HEAD,
        d_ff=torch_families.FF,
        num_layers=torch_families.ENCODER_LAYERS,
        num_decoder_layers=torch_families.LAYERS,
        num_heads=torch_families.HEADS,
        relative_attention_num_buckets=torch_families.T5.relative_buckets,
        relative_attention_max_distance=torch_families.T5.relative_distance,
        dropout_rate=0.0,
        **({"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False} if gated else {}),
    )
    model = transformers.T5ForConditionalGeneration(config)
    return _with_weights(model, None if gated else torch_families.draw(torch_families.t5_shapes()))


def t5_logits(model: torch.nn.Module) -> object:
    """Of `torch_families.translation_batch()`."""
    batch = torch_families.translation_batch()
    with torch.no_grad():
        out = model(
            input_ids=_long(batch["source_tokens"]),
            attention_mask=_long(batch["source_segments"]),
            decoder_input_ids=_long(batch["tokens"]),
        )
    return out.logits.numpy()


class Transformer2017(torch.nn.Module):
    """Torch's own layers of encoder and decoder between one table and the same as head."""

    def __init__(self):
        super().__init__()
        sizes = {"d_model": torch_families.WIDTH, "nhead": torch_families.HEADS, "dim_feedforward": torch_families.FF}
        settings = sizes | {"dropout": 0.0, "batch_first": True}
        self.embed = torch.nn.Embedding(torch_families.VOCAB, torch_families.WIDTH)
        self.encoder = torch.nn.TransformerEncoder(
            torch.nn.TransformerEncoderLayer(**settings), torch_families.ENCODER_LAYERS, enable_nested_tensor=False
        )
        self.decoder = torch.nn.TransformerDecoder(torch.nn.TransformerDecoderLayer(**settings), torch_families.LAYERS)

    def embedded(self, tokens: torch.Tensor) -> torch.Tensor:
        """Scaled, and with sines and cosines in turn."""
        at = np.arange(tokens.shape[1])[:, None] / 10_000 ** (
            np.arange(0, torch_families.WIDTH, 2) / torch_families.WIDTH
        )
        places = np.stack([np.sin(at), np.cos(at)], -1).reshape(tokens.shape[1], torch_families.WIDTH)
        return self.embed(tokens) * torch_families.WIDTH**0.5 + torch.from_numpy(places.astype(np.float32))

    def forward(self, batch: dict[str, np.ndarray]) -> torch.Tensor:
        """Logits."""
        padding = torch.from_numpy(batch["source_segments"] == 0)
        memory = self.encoder(self.embedded(_long(batch["source_tokens"])), src_key_padding_mask=padding)
        future = torch.triu(torch.ones(torch_families.LENGTH, torch_families.LENGTH, dtype=torch.bool), 1)
        x = self.decoder(
            self.embedded(_long(batch["tokens"])), memory, tgt_mask=future, memory_key_padding_mask=padding
        )
        return x @ self.embed.weight.T


def transformer() -> torch.nn.Module:
    """With drawn weights."""
    model = Transformer2017()
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    return _with_weights(model, torch_families.draw(shapes))


def _long(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x).long()
