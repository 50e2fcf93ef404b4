r"""A BERT of two layers on WikiText-2: masked words, and whether one piece of text follows another.

    lm train configs/families/bert_tiny.py

reads data/wikitext2/{train,valid}.txt below the working directory. Where they lie elsewhere:

    D=path/to/wikitext2
    lm train configs/families/bert_tiny.py --data.source text:$D/train.txt --data.validation-source text:$D/valid.txt

1.0M parameters, 6,000 steps of 64 pairs: about 27 minutes of CPU time. Validation accuracy on hidden tokens rises at
every evaluation, 16.8 27.8 33.1 34.6 36.1 36.8 37.2 37.6 37.9 38.3 38.8 38.9 % (perplexity 343 to 45). Next sentences
stay at a half for 2,000 steps, and are then learned: 54.2 55.1 59.9 65.3 66.2 67.2 70.2 71.0 71.7 %.
docs/results/families.md has all figures.
"""

from lm.config import Experiment
from lm.data.config import DataConfig
from lm.data.objectives.masking import MaskingConfig
from lm.models.presets import bert
from lm.optim import OptimConfig
from lm.tasks.masked_lm import BertPretraining
from lm.text.clean import CleanConfig
from lm.text.tokenizer import TokenizerConfig
from lm.train import TrainConfig


def get_config() -> Experiment:
    return Experiment(
        data=DataConfig(
            name="wikitext2_sentences",
            source="text:data/wikitext2/train.txt",
            validation_source="text:data/wikitext2/valid.txt",
            document="line",
            sentences=True,
            licence="WikiText-2, Wikipedia text: CC BY-SA 3.0",
            seq_len=64,
        ),
        clean=CleanConfig(rules=("length",), min_characters=200),  # no headings: they never follow anything
        tokenizer=TokenizerConfig(kind="wordpiece", vocab_size=4096, lowercase=True),
        model=bert(
            "tiny", vocab_size=None, max_len=64, embedding_dropout=0.0, residual_dropout=0.0, attention_dropout=0.0
        ),
        task=BertPretraining(masking=MaskingConfig(whole_words="pieces")),
        optim=OptimConfig(optimizer="adamw", peak_lr=2e-3, schedule="linear", warmup=0.1, weight_decay=0.01),
        train=TrainConfig(steps=6000, batch_size=64, log_every=100, eval_every=500, save_every=2000),
    )
