r"""WikiText-2 word by word: 33,278 words, one running text.

    lm prepare configs/data/wikitext2.py      (the dataset alone)
    lm train configs/data/wikitext2.py

reads data/wikitext2/{train,valid}.txt below the working directory. Where they lie elsewhere, and with the test file:

    D=path/to/wikitext2
    lm train configs/data/wikitext2.py --data.source text:$D/train.txt \
        --data.validation-source text:$D/valid.txt --data.test-source text:$D/test.txt

The files have rare words as `<unk>` already, so nothing is cleaned, and words are what spaces separate. Each line, a
paragraph or a heading, is a document. Prepared, it counts 2,075,677 and 216,347 tokens and a vocabulary of 33,278,
`<unk>` and the end of a document included. That is one token less for each of the 14,250 blank lines than in the
literature (2,088,628 and 217,646), which counts an `<eos>` for those too: an easy token, so published perplexities are
a little lower than ours for the same model. Preparing takes 11 CPU seconds.

4.7M parameters, 300 steps of 1,024 tokens (a seventh of an epoch): 4.4 minutes of CPU time.
Validation perplexity, over 40 batches, 886 733 678 at the evaluations; word frequencies alone give 983. This shows
that the data are right; `--train.epochs 10 --train.steps None` and a larger model make a language model.
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
            name="wikitext2_words",
            source="text:data/wikitext2/train.txt",
            validation_source="text:data/wikitext2/valid.txt",
            document="line",
            licence="WikiText-2, Wikipedia text: CC BY-SA 3.0",
            seq_len=64,
        ),
        tokenizer=TokenizerConfig(kind="word", vocab_size=33_278, splitting="whitespace"),
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
        train=TrainConfig(steps=300, batch_size=16, log_every=10, eval_every=100, eval_batches=40, save_every=150),
    )
