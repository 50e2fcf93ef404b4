"""A small GPT on text that every machine has: the running Python's own standard library.

    bash scripts/quickstart.sh          (trains, evaluates, stops, resumes and samples)
    lm train configs/quickstart.py      (the training alone)

About 12 MB of source code, a byte-level BPE of 2,048 tokens trained on 4 MB of it, 2.2M parameters, 440 steps of 2,048
tokens: 5.7 minutes of CPU time, so some three minutes on two idle cores. Expect a validation perplexity near 38,
which is 1.78 bits per byte; zlib at level 9 needs 1.94. (A warmup of a twentieth of the run gives 50 instead.)
"""

from lm.config import Experiment
from lm.data.config import DataConfig
from lm.models.transformer import ModelConfig
from lm.optim import OptimConfig
from lm.text.tokenizer import TokenizerConfig
from lm.train import TrainConfig


def get_config() -> Experiment:
    return Experiment(
        data=DataConfig(name="quickstart", source="python-stdlib", validation_fraction=0.03, seq_len=256),
        tokenizer=TokenizerConfig(kind="bpe", vocab_size=2048, training_bytes=4_000_000),
        model=ModelConfig(
            d_model=192,
            n_layers=4,
            n_heads=6,
            max_len=256,
            positions="rope",
            norm="rmsnorm",
            activation="relu",
            use_bias=False,
            qk_norm=True,
        ),
        optim=OptimConfig(optimizer="adamw", peak_lr=3e-3, schedule="cosine", warmup=0.1, final_lr_fraction=0.1),
        train=TrainConfig(steps=440, batch_size=8, log_every=10, eval_every=100, save_every=100),
    )
