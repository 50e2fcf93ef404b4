r"""A word-level language model of the Penn Treebank with about 24M parameters, heavily regularised, for one GPU.

    lm train configs/ptb_word.py

reads data/ptb/ptb.{train,valid,test}.txt below the working directory. Where they lie elsewhere:

    D=path/to/ptb
    lm train configs/ptb_word.py --data.source text:$D/ptb.train.txt \
        --data.validation-source text:$D/ptb.valid.txt --data.test-source text:$D/ptb.test.txt

23.8M parameters, 49,797 steps of 2,240 tokens (60 epochs of half-overlapping windows). It has not been run, as it
takes a GPU: 1.6e16 floating-point operations, 0.01 days on one H200 at a fiftieth of its peak. Published, on the
test split, with `<eos>` counted as here: AWD-LSTM 57.3, Transformer-XL 54.5 (24M parameters each).

On a CPU configs/data/ptb.py trains a small model of the same words: test perplexity 123.4 after five epochs.
"""

from lm.config import Experiment
from lm.data.config import DataConfig
from lm.models.transformer import ModelConfig
from lm.optim import OptimConfig
from lm.text.tokenizer import TokenizerConfig
from lm.train import TrainConfig


def get_config() -> Experiment:
    return Experiment(
        data=DataConfig(
            name="ptb_words",
            source="text:data/ptb/ptb.train.txt",
            validation_source="text:data/ptb/ptb.valid.txt",
            test_source="text:data/ptb/ptb.test.txt",
            document="line",
            licence="Penn Treebank, LDC99T42, in Mikolov's preprocessing: research use only",
            seq_len=70,
            stride=35,  # half-overlapping windows: a token is seen with a short and with a long context
            eval_stride=10,
        ),
        tokenizer=TokenizerConfig(kind="word", vocab_size=10_000, splitting="whitespace"),
        model=ModelConfig(
            d_model=448,
            n_layers=8,
            n_heads=7,
            max_len=70,
            positions="rope",
            norm="rmsnorm",
            use_bias=False,
            compute_dtype="bfloat16",
            embedding_dropout=0.5,
            residual_dropout=0.4,
            attention_dropout=0.2,
        ),
        optim=OptimConfig(optimizer="adamw", peak_lr=6e-4, schedule="cosine", warmup=0.05, weight_decay=0.3),
        train=TrainConfig(epochs=60, batch_size=32, ema_decay=0.999, log_every=50, eval_every=800, save_every=1600),
    )
