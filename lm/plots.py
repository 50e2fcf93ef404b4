"""Pictures of runs."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any


def plot_losses(records: Iterable[dict[str, Any]], path: Path) -> None:
    """Draws training and validation loss over tokens as a PNG; without any record there is nothing to draw."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    curves: dict[str, list[tuple[float, float]]] = {}
    for record in records:
        if record.get("loss") is not None:
            curves.setdefault(record["split"], []).append((record["tokens"], record["loss"]))
    if not curves:
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    styles: dict[str, dict[str, Any]] = {
        "train": {"color": "#9db4d6", "linewidth": 1.2},
        "validation": {"color": "#c0392b", "linewidth": 1.8, "marker": "o", "markersize": 4},
    }
    for split, points in curves.items():
        tokens, losses = zip(*points)
        style: dict[str, Any] = {"marker": "o", "markersize": 3} if len(points) < 10 else {}
        axes.plot(tokens, losses, label=split, **(style | styles.get(split, {})))
    if "validation" in curves:
        _, losses = zip(*curves["validation"])
        # At its height, right of the axes, where no curve runs; the layout makes room for it.
        axes.annotate(
            f"{losses[-1]:.3f}",
            (1, losses[-1]),
            xycoords=axes.get_yaxis_transform(),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            color=styles["validation"]["color"],
        )
    axes.set(xlabel="tokens", ylabel="loss (nats per token)")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
