"""LLaMA 7B on a single GPU of 141 GB, an H200: AdamW on all parameters, no part of them elsewhere.

    lm plan configs/llama_7b_h200.py --topology h200:1
    lm train configs/llama_7b_h200.py --run runs/llama_7b_h200
    lm train configs/llama_7b_h200.py --init-from.run runs/llama --run runs/llama_more

Text is read from data/text/*.jsonl.gz below the working directory, the document in the field "text"; any other source
will do (--data.source). The last line goes on with an imported LLaMA.

What makes it fit, by the plan: parameters stay in float32 (27 GB), moments are kept in bfloat16 (27 GB instead of 54),
gradients are summed in float32 over 32 parts of the batch (54 GB with those of a part), and layers keep nothing but
what goes in (`remat` full): 131 of 141 GB with eight rows of 2,048 tokens in a part. With float32 moments 158 GB would
be needed, and 129 GB for a step of one such part alone.

This has not been run: what is tested is that it builds, abstractly. 10 billion tokens, 524,288 a step, are 4.3e20
floating-point operations, 12.6 days on one H200 at 40 % of its peak; 135 billion, for which configs/llama_7b.py is
made, would take half a year.
"""

import dataclasses
from pathlib import Path

from lm.config import Experiment, load_file
from lm.data.config import DataConfig
from lm.text.tokenizer import TokenizerConfig


def get_config() -> Experiment:
    base = load_file(Path(__file__).with_name("llama_7b.py"))
    return dataclasses.replace(
        base,
        data=DataConfig(
            name="text",
            source="jsonl:data/text/*.jsonl.gz",
            validation_fraction=0.0005,
            seq_len=2048,
        ),
        tokenizer=TokenizerConfig(kind="bpe", vocab_size=32000, training_bytes=1_000_000_000),
        model=dataclasses.replace(base.model, remat="full"),
        optim=dataclasses.replace(base.optim, moment_dtype="bfloat16", warmup=500.0),
        train=dataclasses.replace(base.train, tokens=10_000_000_000, batch_size=256, accumulate=32),
    )
