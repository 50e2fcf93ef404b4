r"""A small encoder that guesses hidden words of Chinese text, to be fine-tuned.

    python scripts/gather_text.py chinese path/to/public/data data/chinese
    lm prepare configs/finetune/hotel_reviews.py
    lm train configs/finetune/chinese.py --tokenizer.kind file:path/to/hotel_words/tokenizer --run runs/chinese

News of CLUECorpusSmall and titles of THUCNews, in the words of the training split of hotel reviews: the tokenizer is
the one in the folder of the dataset that `lm prepare` names. Two layers of width 64, 10M tokens. About 10 minutes on
one core; validation perplexity 141.4, and 26.7 % of hidden words are guessed. configs/finetune/hotel_text.py goes on.
"""

from lm.config import Experiment
from lm.data.config import DataConfig
from lm.data.objectives.masking import MaskingConfig
from lm.models.transformer import ModelConfig
from lm.optim import OptimConfig
from lm.tasks.masked_lm import MaskedLM
from lm.train import TrainConfig


def get_config() -> Experiment:
    return Experiment(
        data=DataConfig(
            name="chinese",
            source="text:data/chinese/*.txt",
            document="line",
            validation_fraction=0.02,
            licence="CLUECorpusSmall and THUCNews: research use",
            seq_len=128,
            packing="documents",
        ),
        model=ModelConfig(
            d_model=64,
            n_layers=2,
            n_heads=4,
            max_len=128,
            mask="bidirectional",
            embedding_norm=True,
            positions="rope",
            init_std=0.1,
            head_bias=True,
        ),
        task=MaskedLM(masking=MaskingConfig(rate=0.15)),
        optim=OptimConfig(
            optimizer="adamw", peak_lr=4e-3, schedule="linear", warmup=0.05, final_lr_fraction=0.05, weight_decay=0.01
        ),
        train=TrainConfig(steps=2500, batch_size=32, log_every=100, eval_every=500, eval_batches=20, save_every=0),
    )
