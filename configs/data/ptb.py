r"""The Penn Treebank word by word, as it has been scored since Mikolov: 10,000 words, one running text.

    lm prepare configs/data/ptb.py      (the dataset alone)
    lm train configs/data/ptb.py

reads data/ptb/ptb.{train,valid,test}.txt below the working directory. Where they lie elsewhere:

    D=path/to/ptb
    lm train configs/data/ptb.py --data.source text:$D/ptb.train.txt \
        --data.validation-source text:$D/ptb.valid.txt --data.test-source text:$D/ptb.test.txt

The files have rare words as `<unk>` and numbers as `N` already, so nothing is cleaned, and words are what spaces
separate. Each line is a document: the `<|endoftext|>` that ends it is PTB's `<eos>`. Prepared, it must count 929,589,
73,760 and 82,430 tokens and a vocabulary of 10,000, `<unk>` and `<eos>` included; then perplexities compare with
published ones. Preparing takes 12 CPU seconds.

1.7M parameters, 900 steps of 1,024 tokens (one epoch): 4.5 minutes of CPU time, evaluations included.
Validation perplexity, over 40 batches, falls at every evaluation, 571 406 337 302 281 272; test perplexity 240.2.
Word frequencies alone give 685 on the validation split. Five epochs (--train.steps None --train.epochs 5) give 123.4 on
the test split, docs/results/word_lm.md; more of them and a larger model are what it takes to do better.
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
            seq_len=64,
        ),
        tokenizer=TokenizerConfig(kind="word", vocab_size=10_000, splitting="whitespace"),
        model=ModelConfig(
            d_model=128,
            n_layers=2,
            n_heads=4,
            max_len=64,
            positions="rope",
            norm="rmsnorm",
            activation="swiglu",
            use_bias=False,
            residual_dropout=0.1,
            embedding_dropout=0.1,
        ),
        optim=OptimConfig(optimizer="adamw", peak_lr=2e-3, schedule="cosine", warmup=0.05, weight_decay=0.1),
        train=TrainConfig(steps=900, batch_size=16, log_every=10, eval_every=150, eval_batches=40, save_every=300),
    )
