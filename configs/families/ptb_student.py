r"""A quarter of configs/ptb_small.py, alone or taught by it.

    lm train configs/ptb_small.py --run runs/teacher
    lm train configs/families/ptb_student.py --distill.teacher runs/teacher
    lm train configs/families/ptb_student.py

reads what configs/ptb_small.py reads, and takes the same options for where that lies.

RESULT
"""

import dataclasses
from pathlib import Path

from lm.config import Experiment, load_file
from lm.tasks.distillation import DistillConfig


def get_config() -> Experiment:
    teacher = load_file(Path(__file__).parents[1] / "ptb_small.py")
    return dataclasses.replace(
        teacher,
        model=dataclasses.replace(teacher.model, d_model=64, n_layers=2, residual_dropout=0.0),
        distill=DistillConfig(weight=0.9, temperature=1.5),
    )
