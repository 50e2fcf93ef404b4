"""LLaMA 2 70B from scratch on a TPU v5p slice of 8x8x8 chips, for the 20 tokens a parameter of Chinchilla.

    lm plan configs/llama_70b.py --topology v5p:8x8x8
    lm train configs/llama_70b.py --run runs/llama_70b

Text is read from data/text/*.jsonl.gz below the working directory, the document in the field "text"; any other source
will do (--data.source). The vocabulary is a byte-level BPE of 32,000, trained on the text itself.

This has not been run: what is tested is that it builds, abstractly, and that its step compiles for the slice
(docs/plan.md). Parameters and AdamW's moments are 828 GB in float32, 1.6 GB a chip; each layer is computed
again in the backward pass. A step is 1,024 rows of 4,096 tokens, two rows a chip; 1,400 billion tokens are 6.2e23
floating-point operations, 77 days on the 512 chips at 40 % of their peak. The paper (arXiv:2307.09288) has 2,000
billion tokens, the batch of 4 million and the learning rate.
"""

from lm.config import Experiment
from lm.data.config import DataConfig
from lm.models.presets import llama
from lm.optim import OptimConfig
from lm.sharding import MeshConfig
from lm.tasks.causal_lm import CausalLM
from lm.text.tokenizer import TokenizerConfig
from lm.train import TrainConfig


def get_config() -> Experiment:
    return Experiment(
        data=DataConfig(
            name="text",
            source="jsonl:data/text/*.jsonl.gz",
            validation_fraction=0.0005,
            seq_len=4096,
        ),
        tokenizer=TokenizerConfig(kind="bpe", vocab_size=32000, training_bytes=1_000_000_000),
        model=llama("70b", compute_dtype="bfloat16", remat="full", unroll=1),
        task=CausalLM(loss_chunk=512),
        optim=OptimConfig(peak_lr=1.5e-4, warmup=2000.0, beta2=0.95, weight_decay=0.1, final_lr_fraction=0.1),
        train=TrainConfig(
            tokens=1_400_000_000_000,
            batch_size=1024,
            eval_every=500,
            eval_batches=20,
            save_every=250,
        ),
        mesh=MeshConfig(data=1, fsdp=-1),
    )
