"""Reports for people: self-contained HTML pages, all from one template (`lm.report.page`)."""

from lm.report.preparation import left_out, preparation_report

__all__ = ["left_out", "preparation_report"]
