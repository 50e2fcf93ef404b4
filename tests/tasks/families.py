"""Every family with every objective that it can serve: the table that tests go through."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from lm.config import Experiment
from lm.data.config import DataConfig
from lm.data.objectives.masking import MaskingConfig
from lm.models.transformer import ModelConfig
from lm.optim import OptimConfig
from lm.sharding import MeshConfig
from lm.tasks import TASKS, AnyTask
from lm.text.chat import ChatConfig
from lm.text.tokenizer import TokenizerConfig
from lm.train import TrainConfig

SMALL: dict[str, Any] = {"d_model": 16, "n_layers": 2, "n_heads": 4, "d_ff": 32, "max_len": 40, "unroll": 1}
LLAMA = {"positions": "rope", "norm": "rmsnorm", "activation": "swiglu", "use_bias": False, "tie_embeddings": False}
BERT = {"mask": "bidirectional", "norm_place": "post", "embedding_norm": True, "token_types": 2, "pooler": True}
T5 = {"encoder_layers": 2, "positions": "relative", "norm": "rmsnorm", "use_bias": False, "scale_attention": False}
ORIGINAL = {"encoder_layers": 1, "positions": "sinusoidal", "norm_place": "post", "activation": "relu"}
FAMILIES: dict[str, ModelConfig] = {
    "gpt": ModelConfig(**SMALL, pooling="last"),
    "llama": ModelConfig(**SMALL, **LLAMA, n_kv_heads=2, pooling="mean"),
    "prefix": ModelConfig(**SMALL, mask="prefix", pooling="mean"),
    "bert": ModelConfig(**SMALL, **BERT, head_transform=True, head_bias=True),
    "t5": ModelConfig(**SMALL, **T5),
    "transformer": ModelConfig(**SMALL, **ORIGINAL, scale_embeddings=True),
}
SERVES = {
    "causal_lm": ("gpt", "llama"),
    "prefix_lm": ("prefix",),
    "masked_lm": ("bert",),
    "bert": ("bert",),
    "span_corruption": ("t5", "transformer"),
    "seq2seq": ("t5", "transformer", "gpt", "llama", "prefix"),
    "instruction": ("gpt", "llama"),
    "classification": ("bert", "gpt", "llama", "prefix"),
    "prompted": ("gpt", "llama", "bert"),
    "extractive_qa": ("bert",),
}
PAIRS = [(family, kind) for kind, families in SERVES.items() for family in families]
# Each objective and each family once; the rest is slow.
FAST = [("gpt", "causal_lm"), ("prefix", "prefix_lm"), ("bert", "masked_lm"), ("bert", "bert")]
FAST += [("transformer", "span_corruption"), ("t5", "seq2seq"), ("llama", "classification"), ("bert", "extractive_qa")]
FAST += [("llama", "instruction"), ("gpt", "prompted")]

DATA: dict[str, dict[str, Any]] = {
    "prefix_lm": {"packing": "documents"},
    "bert": {"sentences": True},
    "seq2seq": {"fields": ("a", "b")},
    "instruction": {"fields": ("a", "b"), "chat": ChatConfig(template="plain"), "packing": "documents"},
    "classification": {"label_field": "y"},
    "prompted": {"label_field": "y"},
}
SETTINGS: dict[str, dict[str, Any]] = {
    "masked_lm": {"masking": MaskingConfig(whole_words="pieces")},
    "causal_lm": {"loss_chunk": 5},
    "seq2seq": {"label_smoothing": 0.1},
    "prompted": {"pattern": "{text} {word}", "words": ("False=no", "True=ok")},
    "extractive_qa": {"max_question": 8, "stride": 6, "no_answer": 0.0},
}


def write_corpus(path: Path, documents: int = 80) -> None:
    """Documents of some sentences; of two parts, the second the first reversed; and of a class that a word tells."""
    rng = np.random.default_rng(0)
    words = ["cat", "dog", "mat", "sat", "saw", "ran", "the", "a", "red", "blue"]
    with path.open("w", encoding="utf-8") as file:
        for i in range(documents):
            sentences = [" ".join(rng.choice(words, rng.integers(3, 7))).capitalize() + "." for _ in range(3 + i % 3)]
            source = list(rng.choice(words, rng.integers(2, 6)))
            text = " ".join(sentences)
            row = {
                "text": text,
                "a": " ".join(source),
                "b": " ".join(source[::-1]),
                "y": str("red" in text),
                "one": "1",
                "e": "",
            }
            file.write(json.dumps(row) + "\n")


def write_questions(path: Path, texts: int = 40) -> None:
    """Two questions on each text of some words: what follows a word, with an answer or without."""
    rng = np.random.default_rng(0)
    words = ["cat", "dog", "mat", "sat", "saw", "ran", "the", "a", "red", "blue"]
    paragraphs = []
    for i in range(texts):
        drawn = list(rng.choice(words, 10 + i % 30))
        at = int(rng.integers(len(drawn) - 2))
        answer = {"text": drawn[at + 1], "answer_start": len(" ".join([*drawn[: at + 1], ""]))}
        asked = {"id": f"{i}", "question": f"behind {drawn[at]}?", "answers": [answer]}
        without = {"id": f"{i} without", "question": "where is green?", "answers": [], "is_impossible": True}
        paragraphs.append({"context": " ".join(drawn), "qas": [asked, without]})
    path.write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}), encoding="utf-8")


def task_of(kind: str) -> AnyTask:
    return TASKS[kind](**SETTINGS.get(kind, {}))


def experiment(folder: Path, family: str, kind: str, **train: Any) -> Experiment:
    """A run of a few steps."""
    corpus = folder / "corpus.jsonl"
    if not corpus.exists():
        write_corpus(corpus)
        write_questions(folder / "questions.json")
    specials = ("<mask>", *(f"<extra_id_{i}>" for i in range(4)))
    return Experiment(
        data=DataConfig(
            source=f"squad:{folder / 'questions.json'}" if kind == "extractive_qa" else f"jsonl:{corpus}",
            root=str(folder / "datasets"),
            validation_fraction=0.2,
            seq_len=24,
            **DATA.get(kind, {}),
        ),
        tokenizer=TokenizerConfig(kind="bpe", vocab_size=300, special_tokens=specials),
        model=FAMILIES[family],
        task=task_of(kind),
        optim=OptimConfig(peak_lr=1e-2, warmup=2),
        train=dataclasses.replace(
            TrainConfig(steps=6, batch_size=16, accumulate=2, log_every=1, eval_every=3, save_every=3), **train
        ),
        mesh=MeshConfig(devices=1),
    )
