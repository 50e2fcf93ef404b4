"""docs/results/scale.md says what the code says today, and the analytic model what compiling gave."""

import json
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "scale_table.py"))
KEPT = json.loads((ROOT / "docs/results/scale.json").read_text(encoding="utf-8"))
PAGE = (ROOT / "docs/results/scale.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("model", "chips"), [("7b", 512), ("7b", 8192), ("70b", 512), ("70b", 4096)])
def test_rows_are_what_is_worked_out_today(model: str, chips: int):
    assert SCRIPT["row_of"](model, chips, KEPT) in PAGE
    assert SCRIPT["parts_of"](model, chips, KEPT) in PAGE


@pytest.mark.parametrize("name", KEPT)
def test_the_model_is_within_ten_percent_of_what_is_compiled(name: str):
    model, _, chips = name.partition(":")
    plan = SCRIPT["plan_of"](model, int(chips), KEPT)
    assert plan.analytic.total == pytest.approx(plan.compiled.total, rel=0.1)
    sums = [SCRIPT["moved"](each) for each in (plan.analytic.collectives, plan.compiled.collectives)]
    assert sums[0] == pytest.approx(sums[1], rel=0.1)


def test_slices_are_joined_where_one_is_not_enough():
    plan = SCRIPT["plan_of"]("7b", 8192, {})
    assert plan.topology.slices == 2
    assert plan.sizes["data"] % 2 == 0
    assert plan.fits
