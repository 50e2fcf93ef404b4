"""Objectives: one file each, with its settings, its examples, its loss and what it reports."""

from typing import get_args

from lm.tasks.base import Task
from lm.tasks.causal_lm import CausalLM, PrefixLM
from lm.tasks.classification import Classification
from lm.tasks.extractive_qa import ExtractiveQA
from lm.tasks.instruction import Instruction
from lm.tasks.masked_lm import BertPretraining, MaskedLM
from lm.tasks.prompted import Prompted
from lm.tasks.seq2seq import Seq2Seq
from lm.tasks.span_corruption import SpanCorruption

__all__ = ["TASKS", "AnyTask", "Task"]

AnyTask = (
    CausalLM
    | PrefixLM
    | MaskedLM
    | BertPretraining
    | SpanCorruption
    | Seq2Seq
    | Instruction
    | Classification
    | Prompted
    | ExtractiveQA
)
"""The objectives there are; a config holds one of them."""
TASKS: dict[str, type[AnyTask]] = {task.kind: task for task in get_args(AnyTask)}
"""The same by name, as a saved config has it."""
