"""The same models and run in torch. Imports torch, so import it where torch is known to be."""

import torch
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
