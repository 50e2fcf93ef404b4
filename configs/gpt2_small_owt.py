"""GPT-2 small, 124M parameters, from scratch on OpenWebText, with the batch and schedule of nanoGPT.

    lm train configs/gpt2_small_owt.py --run runs/gpt2_small_owt                          (eight GPUs)
    lm train configs/gpt2_small_owt.py --run runs/gpt2_small_owt --train.accumulate 40    (one GPU)

Text is read from data/openwebtext/*.jsonl.gz below the working directory, the document in the field "text"; any other
source will do (--data.source). The vocabulary is a byte-level BPE of GPT-2's size, trained on the text itself; where
GPT-2's own tokenizer.json is at hand, --tokenizer.kind hf:PATH takes it instead.

This has not been run to its end, nor on a GPU; what is tested is that it builds, and the model's speed on a CPU
(docs/results/train_speed_cpu.md). A step is 480 rows of 1,024 tokens, 600,000 of them 295 billion tokens, or 2.5e20
floating-point operations: three days on eight A100s at 40 % of their peak. nanoGPT reports four days there and a
validation loss of 2.85 nats for each of GPT-2's own tokens.
"""

from lm.config import Experiment
from lm.data.config import DataConfig
from lm.models.presets import gpt2
from lm.optim import OptimConfig
from lm.tasks.causal_lm import CausalLM
from lm.text.tokenizer import TokenizerConfig
from lm.train import TrainConfig


def get_config() -> Experiment:
    return Experiment(
        data=DataConfig(
            name="openwebtext",
            source="jsonl:data/openwebtext/*.jsonl.gz",
            validation_fraction=0.0005,
            seq_len=1024,
        ),
        tokenizer=TokenizerConfig(kind="bpe", vocab_size=50257, training_bytes=1_000_000_000),
        # 47 rows of the table are never used: matrix units want its length to be a multiple of 128.
        model=gpt2("small", vocab_size=50304, compute_dtype="bfloat16"),
        task=CausalLM(loss_chunk=256),
        optim=OptimConfig(peak_lr=6e-4, warmup=2000.0, beta2=0.95, weight_decay=0.1, final_lr_fraction=0.1),
        train=TrainConfig(
            steps=600_000, batch_size=480, accumulate=5, eval_every=1000, eval_batches=100, save_every=1000
        ),
    )
