"""BERT, T5 and the Transformer of 2017, small: settings, names of weights, and these as parameters of ours."""

from typing import Any

import numpy as np
from pretrained import params_of

from lm.models.transformer import ModelConfig

VOCAB, WIDTH, HEADS, FF, LENGTH, SOURCE, ROWS = 64, 32, 4, 48, 14, 11, 3
LAYERS, ENCODER_LAYERS = 2, 3
T5_HEAD = 6  # a width of heads that is not WIDTH / HEADS

BERT = ModelConfig(
    vocab_size=VOCAB,
    d_model=WIDTH,
    n_layers=LAYERS,
    n_heads=HEADS,
    d_ff=FF,
    max_len=LENGTH,
    mask="bidirectional",
    token_types=2,
    embedding_norm=True,
    norm_place="post",
    norm_epsilon=1e-12,
    activation="gelu",
    head_transform=True,
    head_bias=True,
    pooler=True,
    n_classes=2,
)
T5 = ModelConfig(
    vocab_size=VOCAB,
    d_model=WIDTH,
    n_layers=LAYERS,
    encoder_layers=ENCODER_LAYERS,
    n_heads=HEADS,
    head_dim=T5_HEAD,
    d_ff=FF,
    positions="relative",
    relative_buckets=8,
    relative_distance=10,
    norm="rmsnorm",
    norm_epsilon=1e-6,
    activation="relu",
    use_bias=False,
    scale_attention=False,
    scale_logits=True,
)
TRANSFORMER = ModelConfig(
    vocab_size=VOCAB,
    d_model=WIDTH,
    n_layers=LAYERS,
    encoder_layers=ENCODER_LAYERS,
    n_heads=HEADS,
    d_ff=FF,
    positions="sinusoidal",
    norm_place="post",
    activation="relu",
    scale_embeddings=True,
)

Weights = dict[str, np.ndarray]
Shapes = dict[str, tuple[int, ...]]


def draw(shapes: Shapes, seed: int = 0) -> Weights:
    """Random weights by name, large enough that attention is far from even; scales of norms around 1."""
    weights = {}
    for number, name in enumerate(sorted(shapes)):
        values = np.random.RandomState(1000 * seed + number).standard_normal(shapes[name]) * 0.3
        one = "norm" in name.lower() and name.endswith("weight")
        weights[name] = (values + one).astype(np.float32)
    return weights


def bert_shapes() -> Shapes:
    """Of `BertForPreTraining`."""
    D = WIDTH

    def dense(name: str, n_in: int, n_out: int) -> Shapes:
        return {f"{name}.weight": (n_out, n_in), f"{name}.bias": (n_out,)}

    def norm(name: str) -> Shapes:
        return {f"{name}.weight": (D,), f"{name}.bias": (D,)}

    tables = {"word": VOCAB, "position": LENGTH, "token_type": 2}
    shapes: Shapes = {f"bert.embeddings.{name}_embeddings.weight": (rows, D) for name, rows in tables.items()}
    shapes |= norm("bert.embeddings.LayerNorm")
    for i in range(LAYERS):
        h = f"bert.encoder.layer.{i}."
        for name in ("self.query", "self.key", "self.value", "output.dense"):
            shapes |= dense(f"{h}attention.{name}", D, D)
        shapes |= norm(f"{h}attention.output.LayerNorm") | norm(f"{h}output.LayerNorm")
        shapes |= dense(f"{h}intermediate.dense", D, FF) | dense(f"{h}output.dense", FF, D)
    shapes |= dense("bert.pooler.dense", D, D) | {"cls.predictions.bias": (VOCAB,)}
    shapes |= dense("cls.predictions.transform.dense", D, D) | norm("cls.predictions.transform.LayerNorm")
    return shapes | dense("cls.seq_relationship", D, 2)


def t5_shapes() -> Shapes:
    """Of `T5ForConditionalGeneration`, version 1.0."""
    D, A = WIDTH, HEADS * T5_HEAD
    shapes: Shapes = {"shared.weight": (VOCAB, D)}
    for stack, layers, parts in [
        ("encoder", ENCODER_LAYERS, ("SelfAttention",)),
        ("decoder", LAYERS, ("SelfAttention", "EncDecAttention")),
    ]:
        shapes[f"{stack}.final_layer_norm.weight"] = (D,)
        bias = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        shapes[bias] = (T5.relative_buckets, HEADS)
        for i in range(layers):
            for j, part in enumerate(parts):
                h = f"{stack}.block.{i}.layer.{j}."
                shapes |= {f"{h}{part}.{name}.weight": (A, D) for name in "qkv"}
                shapes |= {f"{h}{part}.o.weight": (D, A), f"{h}layer_norm.weight": (D,)}
            h = f"{stack}.block.{i}.layer.{len(parts)}."
            shapes |= {f"{h}DenseReluDense.wi.weight": (FF, D), f"{h}DenseReluDense.wo.weight": (D, FF)}
            shapes[f"{h}layer_norm.weight"] = (D,)
    return shapes


def _stacker(weights: Weights, prefix: str, layers: int):
    """A function from a name within a layer, and our shape, to all layers' matrices `[L, *shape]` (theirs are T)."""

    def stack(name: str, shape: tuple[int, ...] = (-1,), transpose: bool = True) -> np.ndarray:
        return np.stack(
            [
                (weights[f"{prefix}{i}.{name}"].T if transpose else weights[f"{prefix}{i}.{name}"]).reshape(shape)
                for i in range(layers)
            ]
        )

    return stack


def bert_params(weights: Weights) -> dict[str, Any]:
    """`BertForPreTraining`'s weights as our parameters; with `qa_outputs` among them, also scores of spans."""
    return params_of(weights, BERT, "bert")


def t5_params(weights: Weights, config: ModelConfig = T5) -> dict[str, Any]:
    """`T5ForConditionalGeneration`'s weights as our parameters."""
    return params_of(weights, config, "seq2seq")


def transformer_params(weights: Weights) -> dict[str, Any]:
    """Weights of `torch_models.Transformer2017` as our parameters: queries, keys and values are rows of one matrix."""
    D, H = WIDTH, WIDTH // HEADS

    def layers_of(name: str, layers: int) -> dict[str, Any]:
        stack = _stacker(weights, f"{name}.layers.", layers)

        def attention(at: str) -> dict[str, Any]:
            kernels = stack(f"{at}.in_proj_weight", (3, HEADS, H, D), transpose=False).transpose(0, 1, 4, 2, 3)
            biases = stack(f"{at}.in_proj_bias", (3, HEADS, H))
            parts = {
                part: {"kernel": kernels[:, i], "bias": biases[:, i]}
                for i, part in enumerate(("query", "key", "value"))
            }
            out = {"kernel": stack(f"{at}.out_proj.weight", (HEADS, H, D)), "bias": stack(f"{at}.out_proj.bias")}
            return parts | {"out": out}

        def norm(at: str) -> dict[str, np.ndarray]:
            return {"scale": stack(f"{at}.weight"), "bias": stack(f"{at}.bias")}

        last = "norm3" if name == "decoder" else "norm2"
        found = {
            "attention": attention("self_attn"),
            "attention_norm": norm("norm1"),
            "mlp": {
                "up": {"kernel": stack("linear1.weight", (D, FF)), "bias": stack("linear1.bias")},
                "down": {"kernel": stack("linear2.weight", (FF, D)), "bias": stack("linear2.bias")},
            },
            "mlp_norm": norm(last),
        }
        if name == "decoder":
            found |= {"cross_attention": attention("multihead_attn"), "cross_norm": norm("norm2")}
        return found

    return {
        "embed": {"embedding": weights["embed.weight"]},
        "layers": layers_of("decoder", LAYERS),
        "encoder_layers": layers_of("encoder", ENCODER_LAYERS),
    }


def bert_batch() -> dict[str, np.ndarray]:
    """Pairs of texts with padding behind, some tokens masked (id 3), and whether the second follows the first."""
    rng = np.random.RandomState(0)
    targets = rng.randint(4, VOCAB, (ROWS, LENGTH))
    lengths, first = np.array([LENGTH, 9, 11])[:, None], np.array([5, 3, 8])[:, None]
    at = np.arange(LENGTH)[None]
    scored = (rng.random_sample((ROWS, LENGTH)) < 0.3) & (at < lengths)
    return {
        "tokens": np.where(at < lengths, np.where(scored, 3, targets), 0).astype(np.int32),
        "targets": targets.astype(np.int32),
        "weights": scored.astype(np.float32),
        "types": ((at >= first) & (at < lengths)).astype(np.int32),
        "segments": (at < lengths).astype(np.int32),
        "labels": np.array([0, 1, 1], np.int32),
    }


def translation_batch() -> dict[str, np.ndarray]:
    """Sources with padding behind, and targets."""
    rng = np.random.RandomState(1)
    source = rng.randint(1, VOCAB, (ROWS, SOURCE))
    there = np.arange(SOURCE)[None] < np.array([SOURCE, 4, 7])[:, None]
    return {
        "tokens": rng.randint(1, VOCAB, (ROWS, LENGTH)).astype(np.int32),
        "source_tokens": np.where(there, source, 0).astype(np.int32),
        "source_segments": there.astype(np.int32),
    }
