r"""Pretraining continued on Chinese hotel reviews, without their classes.

    lm train configs/finetune/hotel_text.py --init-from.run runs/chinese --run runs/hotel_text

goes on with the model of configs/finetune/chinese.py on the text of the training split of
configs/finetune/hotel_reviews.py, whose validation and test splits it doesn't read. About 8 minutes on one core;
validation perplexity 61.3, and 33.4 % of hidden words are guessed.
"""

import dataclasses
from pathlib import Path

from lm.config import Experiment, load_file


def get_config() -> Experiment:
    reviews, chinese = (load_file(Path(__file__).with_name(f"{name}.py")) for name in ("hotel_reviews", "chinese"))
    return dataclasses.replace(
        reviews,
        data=dataclasses.replace(reviews.data, packing="documents"),  # the same dataset, and so the same splits
        model=chinese.model,
        task=chinese.task,
        optim=dataclasses.replace(chinese.optim, peak_lr=2e-3),
        train=dataclasses.replace(chinese.train, steps=2500),
    )
