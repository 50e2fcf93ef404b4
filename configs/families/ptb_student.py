r"""A quarter of configs/ptb_small.py, alone or taught by it.

    lm train configs/ptb_small.py --run runs/teacher
    lm train configs/families/ptb_student.py --distill.teacher runs/teacher
    lm train configs/families/ptb_student.py

reads what configs/ptb_small.py reads, and takes the same options for where that lies.

0.26M parameters, 600 steps: about three minutes on two CPU cores, as long with the teacher. Validation loss alone
3.994, taught 3.951; the teacher's is 3.867, so that a third of the gap is recovered (one seed). All figures are in
docs/results/families.md.
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
        optim=dataclasses.replace(teacher.optim, peak_lr=8e-3),
        distill=DistillConfig(weight=1.0, temperature=1.0),
    )
