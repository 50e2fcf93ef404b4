"""Next-token prediction."""

from dataclasses import dataclass
from typing import Any

import jax

from lm import losses, metrics
from lm.errors import check
from lm.models.transformer import Transformer, head_parameters

Array = jax.Array


@dataclass(frozen=True, kw_only=True)
class CausalLM:
    """Settings of the next-token loss."""

    label_smoothing: float = 0.0
    """Share of the target's probability spread over the vocabulary."""
    z_loss: float = 0.0
    """Factor of the squared log-partition added to the loss; PaLM uses 1e-4."""
    loss_chunk: int = 0
    """Tokens of each row per piece of the loss, so that float32 logits of a whole batch never exist; 0 = off."""

    def __post_init__(self) -> None:
        """Checks ranges."""
        check(0 <= self.label_smoothing < 1, f"task.label_smoothing is {self.label_smoothing}; it is in [0, 1)")
        check(self.z_loss >= 0, f"task.z_loss is {self.z_loss}; it must be 0 or more")
        check(self.loss_chunk >= 0, f"task.loss_chunk is {self.loss_chunk}; it must be 0 (off) or more")

    def loss(
        self, model: Transformer, params: Any, batch: dict[str, Array], dropout_key: Array | None
    ) -> tuple[Array, dict[str, Array]]:
        """The objective's sum over a batch, and the sums to report.

        Args:
          model: the Transformer.
          params: its parameters.
          batch: `tokens`, `targets` int32 `[B, T]`, `weights` float32 `[B, T]`, `positions` int32 `[B, T]`, and
            `segments` int32 `[B, T]` where documents are to be kept apart.
          dropout_key: a key while training, None (no dropout) while evaluating.

        Returns:
          The sum to minimise after division by `weight`, and sums `loss`, `correct` and `weight`: float32 scalars;
          while evaluating also the three of each row, float32 `[B]`, under the name `rows`.
        """
        by_row = dropout_key is None
        hidden, _ = model.apply(
            {"params": params},
            batch["tokens"],
            batch["positions"],
            batch.get("segments"),
            deterministic=dropout_key is None,
            rngs=None if dropout_key is None else {"dropout": dropout_key},
            method="hidden",
        )

        def head_loss(head: Any, hidden: Array, targets: Array, weights: Array):
            logits: Any = model.apply({"params": head}, hidden, method="logits")
            return losses.cross_entropy(
                logits, targets, weights, label_smoothing=self.label_smoothing, z_loss=self.z_loss, by_row=by_row
            )

        head = head_parameters(model.config, params)
        targets, weights = batch["targets"], batch["weights"]
        if self.loss_chunk:
            total, sums = losses.chunked(head_loss, head, hidden, targets, weights, self.loss_chunk)
        else:
            total, sums = head_loss(head, hidden, targets, weights)
        if by_row:
            rows = sums | {"weight": weights.sum(axis=1)}
            return total, {name: value.sum() for name, value in rows.items()} | {"rows": rows}
        return total, sums | {"weight": weights.sum()}

    def summarise(self, sums: metrics.Sums) -> dict[str, float]:
        """What is reported, from the sums over all batches."""
        return metrics.language_model(sums)
