"""Runs from beginning to end: what `lm train`, `evaluate` and `generate` do, without a command line."""

from lm.run.datasets import AnyDataset, Dataset, dataset_of, labels_of, split_batches, split_text
from lm.run.evaluation import evaluate_run, measured
from lm.run.teach import teach
from lm.run.training import FREE_ON_RESUME, check_changes, check_experiment, resume, start
from lm.run.use import Trained, embed, inference_mesh, load, load_experiment

__all__ = [
    "FREE_ON_RESUME",
    "AnyDataset",
    "Dataset",
    "Trained",
    "check_changes",
    "check_experiment",
    "dataset_of",
    "embed",
    "evaluate_run",
    "inference_mesh",
    "labels_of",
    "load",
    "load_experiment",
    "measured",
    "resume",
    "split_batches",
    "split_text",
    "start",
    "teach",
]
