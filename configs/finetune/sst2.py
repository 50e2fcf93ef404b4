r"""Sentiment of film reviews, from the encoder of configs/finetune/english.py.

    lm train configs/finetune/sst2.py --init-from.run runs/english --run runs/sst2
    lm train configs/finetune/sst2.py --tokenizer.kind file:runs/english/tokenizer --run runs/scratch
    python scripts/finetune_table.py configs/finetune/sst2.py runs/english --output runs/finetune

The second is the same model from scratch, the last line every way to fine-tune, each three times. The files of SST-2
lie in data/sst2. Five epochs take about 40 seconds on one core; validation loss 0.557 and accuracy 81.1 % with the
pretrained model. The table, and what pretraining gives with 250 labels, stand in docs/results/finetune.md.
"""

import dataclasses
from pathlib import Path

from lm.config import Experiment, load_file
from lm.data.config import DataConfig
from lm.optim import OptimConfig
from lm.tasks.classification import Classification
from lm.text.tokenizer import TokenizerConfig
from lm.train import TrainConfig


def get_config() -> Experiment:
    english = load_file(Path(__file__).with_name("english.py"))
    dropout = dict.fromkeys(("embedding_dropout", "residual_dropout", "classifier_dropout"), 0.3)
    return Experiment(
        data=DataConfig(
            name="sst2",
            source="tsv:data/sst2/train.tsv",
            validation_source="tsv:data/sst2/dev.tsv",
            test_source="tsv:data/sst2/test.tsv",
            header=False,
            field="0",
            label_field="1",
            licence="SST-2 (Socher et al. 2013): research use",
            seq_len=48,
        ),
        tokenizer=TokenizerConfig(),  # the pretrained model's
        model=dataclasses.replace(english.model, pooling="mean", **dropout),
        task=Classification(),
        optim=OptimConfig(optimizer="adamw", peak_lr=1e-3, schedule="cosine", warmup=0.1, weight_decay=0.1),
        train=TrainConfig(epochs=5, batch_size=64, log_every=50, eval_every=108, save_every=0),
    )
