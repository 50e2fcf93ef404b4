"""LLaMA 1B, the shape of TinyLlama with 1.1B parameters, for the 20 tokens a parameter of Chinchilla.

    lm plan configs/llama_1b.py --topology v5e:4x4
    lm train configs/llama_1b.py --run runs/llama_1b

Text is read from data/text/*.jsonl.gz below the working directory, the document in the field "text"; any other source
will do (--data.source). The vocabulary is a byte-level BPE of 32,000, trained on the text itself.

This has not been run: what is tested is that it builds, abstractly, and what it takes is planned
(docs/plan.md). Parameters and AdamW's moments are 13.2 GB in float32, which `mesh.fsdp` splits. A step is 512
rows of 2,048 tokens; 22 billion tokens are 1.6e20 floating-point operations, 0.6 days on eight H100s at 40 % of their
peak. TinyLlama (arXiv:2401.02385) saw 3,000 billion tokens.
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
            seq_len=2048,
        ),
        tokenizer=TokenizerConfig(kind="bpe", vocab_size=32000, training_bytes=1_000_000_000),
        model=llama("1b", compute_dtype="bfloat16", remat="full", unroll=1),
        task=CausalLM(loss_chunk=256),
        optim=OptimConfig(peak_lr=4e-4, warmup=2000.0, beta2=0.95, weight_decay=0.1, final_lr_fraction=0.1),
        train=TrainConfig(
            tokens=22_000_000_000,
            batch_size=512,
            accumulate=8,
            eval_every=500,
            eval_batches=50,
            save_every=500,
        ),
        mesh=MeshConfig(data=1, fsdp=-1),
    )
