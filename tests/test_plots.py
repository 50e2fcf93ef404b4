"""Pictures of runs: everything is on them, and nothing covers anything."""

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from lm.plots import plot_losses


def records(steps: int, every: int) -> list[dict[str, Any]]:
    """A falling, noisy training loss, and a validation loss now and then."""
    rng = np.random.default_rng(0)
    found = []
    for step in range(1, steps + 1):
        loss = 2 + 5 * math.exp(-step / steps * 4)
        found.append({"split": "train", "tokens": step * 2048, "loss": loss + rng.normal(0, 0.1)})
        if step % every == 0:
            found.append({"split": "validation", "tokens": step * 2048, "loss": loss})
    return found


@pytest.mark.parametrize(("steps", "every"), [(70, 10), (6, 3), (200, 200), (3, 1), (75, 10)])
def test_the_final_loss_is_written_where_nothing_is_drawn(tmp_path: Path, monkeypatch, steps: int, every: int):
    figures: list[Figure] = []
    save = Figure.savefig

    def keep(self: Figure, *arguments: Any, **options: Any) -> None:
        save(self, *arguments, **options)
        figures.append(self)

    monkeypatch.setattr(Figure, "savefig", keep)
    drawn = records(steps, every)
    plot_losses(drawn, tmp_path / "loss.png")
    [figure] = figures
    figure.draw_without_rendering()  # saving may have had another resolution
    [axes] = figure.axes
    [label] = axes.texts
    assert label.get_text() == f"{[r['loss'] for r in drawn if r['split'] == 'validation'][-1]:.3f}"
    box = label.get_window_extent()
    inside = figure.bbox
    assert inside.x0 <= box.x0
    assert box.x1 <= inside.x1
    assert inside.y0 <= box.y0
    assert box.y1 <= inside.y1
    for line in axes.lines:
        path = axes.transData.transform(line.get_xydata())
        points = np.concatenate([np.linspace(a, b, 50) for a, b in itertools.pairwise(path)] or [path])
        reach = line.get_markersize() / 2 if line.get_marker() not in ("None", None) else 1
        within = (points >= np.array([box.x0, box.y0]) - reach) & (points <= np.array([box.x1, box.y1]) + reach)
        assert not within.all(axis=1).any(), line.get_label()


def test_a_loss_that_was_not_finite_and_a_run_without_records(tmp_path: Path):
    plot_losses([{"split": "train", "tokens": 1, "loss": None}], tmp_path / "loss.png")
    plot_losses([], tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()
    plot_losses([*records(4, 2), {"split": "train", "tokens": 9999, "loss": None}], tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 5000
