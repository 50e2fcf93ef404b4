"""What is trained beside a model: LoRA's terms, put into its matrices and taken out again."""

from lm.peft.lora import merged, unmerged

__all__ = ["merged", "unmerged"]
