"""LoRA (arXiv:2106.09685): what a low-rank term is added to."""

import re
from dataclasses import dataclass

from lm.errors import UserError, check


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank terms beside projections: `x W + alpha / rank * x A B`, of which A and B alone are trained."""

    rank: int = 0
    """Columns of A and rows of B; 0 = no low-rank terms."""
    alpha: float = 16.0
    """The term is multiplied with alpha / rank."""
    dropout: float = 0.0
    """Dropout rate on what A reads."""
    targets: str = r".*attention/(query|value)"
    """Which projections have one: a regular expression that matches a whole path such as layers/attention/query or
    layers/mlp/up ('.*' = all, '.*/mlp/.*' = those of feed-forward blocks)."""

    def __post_init__(self) -> None:
        """Checks ranges, and that the pattern is one."""
        check(self.rank >= 0, f"model.lora.rank is {self.rank}; it must be 0 (off) or more")
        if not self.rank:
            for name, field in type(self).__dataclass_fields__.items():
                value = getattr(self, name)
                check(
                    value == field.default,
                    f"model.lora.{name} is {value!r}, and without model.lora.rank there are no terms; set the rank",
                )
        check(self.alpha > 0, f"model.lora.alpha is {self.alpha}; it must be above 0")
        check(0.0 <= self.dropout < 1.0, f"model.lora.dropout is {self.dropout}; a dropout rate is in [0, 1)")
        try:
            re.compile(self.targets)
        except re.error as error:
            raise UserError(
                f"model.lora.targets is {self.targets!r}, which is no regular expression ({error}); correct it"
            ) from error

    def at(self, path: str) -> "LoraConfig":
        """These settings for the projection of that path, off where it is no target."""
        return self if self.rank and re.fullmatch(self.targets, path) else OFF

    @property
    def scale(self) -> float:
        """What the term is multiplied with."""
        return self.alpha / self.rank


OFF = LoraConfig()
