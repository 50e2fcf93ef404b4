"""LLaMA 7B from scratch on one machine of eight 80 GB GPUs, for the 20 tokens a parameter of Chinchilla.

    lm train configs/llama_7b.py --run runs/llama_7b

Text is read from data/text/*.jsonl.gz below the working directory, the document in the field "text"; any other source
will do (--data.source). The vocabulary is a byte-level BPE of 32,000, trained on the text itself; LLaMA's own is
--tokenizer.kind hf:PATH with its tokenizer.json.

This has not been run: what is tested is that it builds, abstractly. Parameters, gradients and AdamW's moments, all in
float32, are 108 GB, 13.5 GB a GPU, as `mesh.fsdp` splits them; layers keep the results of their matrix products and
compute the rest again. A step is 512 rows of 2,048 tokens; 135 billion tokens are 5.8e21 floating-point operations,
21 days on eight H100s at 40 % of their peak. The 1,000 billion tokens of the paper (arXiv:2302.13971) took 82,432
hours of an A100.
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
        model=llama("7b", compute_dtype="bfloat16", remat="dots", unroll=1),
        task=CausalLM(loss_chunk=256),
        optim=OptimConfig(peak_lr=3e-4, warmup=2000.0, beta2=0.95, weight_decay=0.1, final_lr_fraction=0.1),
        train=TrainConfig(
            tokens=135_000_000_000,
            batch_size=512,
            accumulate=16,
            eval_every=500,
            eval_batches=50,
            save_every=500,
        ),
        mesh=MeshConfig(data=1, fsdp=-1),
    )
