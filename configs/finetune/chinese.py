r"""A small encoder that guesses hidden words of Chinese text, to be fine-tuned.

    python scripts/gather_text.py chinese path/to/public/data data/chinese
    lm prepare configs/finetune/hotel_reviews.py
    lm train configs/finetune/chinese.py --tokenizer.kind file:path/to/hotel_words/tokenizer --run runs/chinese

News of CLUECorpusSmall and titles of THUCNews, in the words of the training split of hotel reviews: the tokenizer is
the one in the folder of the dataset that `lm prepare` names. Two layers of width 64, 10M tokens. About 10 minutes on
one core; validation perplexity 141.4, and 26.7 % of hidden words are guessed. configs/finetune/hotel_text.py goes on.
"""

import dataclasses
from pathlib import Path

from lm.config import Experiment, load_file
from lm.data.config import DataConfig


def get_config() -> Experiment:
    english = load_file(Path(__file__).with_name("english.py"))
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
        model=dataclasses.replace(english.model, max_len=128),
        task=english.task,
        optim=english.optim,
        train=dataclasses.replace(english.train, steps=2500, batch_size=32, eval_every=500),
    )
