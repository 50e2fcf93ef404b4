"""What a person sees: plain lines in a pipe, a bar on a terminal, and nothing left behind."""

import io
import re
from typing import Any

import pytest
from rich.console import Console

from lm import console
from lm.console import PreparationReporter, TrainingReporter


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(console, "time", made)
    return made


def _pair(terminal: bool) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, force_terminal=terminal, width=120, color_system=None), out


def _record(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "loss": 2.5, "learning_rate": 1e-3, "tokens_per_second": 41_234.0, "skipped": 0, **more}


VALIDATION = {"step": 20, "loss": 2.0, "perplexity": 7.389, "accuracy": 0.25, "bits_per_byte": 1.234}


def test_plain_lines_where_no_terminal_is(clock: Clock):
    screen, out = _pair(terminal=False)
    reporter = TrainingReporter(screen)
    reporter.start(0, 100)
    clock.now += 30  # compiling
    reporter.train(_record(10))
    clock.now += 20
    reporter.train(_record(20, mfu=0.451, skipped=2))
    reporter.evaluating(1, 2)
    clock.now += 10
    reporter.evaluated(VALIDATION)
    clock.now += 10
    reporter.train(_record(30))
    reporter.message("[bold]as it stands[/bold]")
    reporter.close()
    assert out.getvalue().splitlines() == [
        "training from step 0 to 100; the first step compiles, which takes a moment",
        "step 10/100  loss 2.5000  lr 1.00e-03  41.2k tokens/s",
        # 20 s for 10 steps, 80 to go: compiling is not counted
        "step 20/100  loss 2.5000  lr 1.00e-03  41.2k tokens/s  MFU 45.1%  2 skipped  ETA 2:40",
        "step 20/100  validation loss 2.0000  perplexity 7.39  bits/byte 1.234  accuracy 25.0%",
        # 40 s for 20 steps, an evaluation among them: 70 to go
        "step 30/100  loss 2.5000  lr 1.00e-03  41.2k tokens/s  ETA 2:20",
        "[bold]as it stands[/bold]",
    ]


def test_a_resumed_run_is_not_credited_with_the_steps_before(clock: Clock):
    screen, out = _pair(terminal=False)
    reporter = TrainingReporter(screen)
    reporter.start(500, 1000)
    for step in (510, 520, 1000):
        clock.now += 10
        reporter.train(_record(step))
    lines = out.getvalue().splitlines()
    assert "ETA" not in lines[1]
    assert lines[2].endswith("ETA 8:00")
    assert lines[3].endswith("ETA 0:00")


def test_a_bar_on_a_terminal(clock: Clock):
    screen, out = _pair(terminal=True)
    reporter = TrainingReporter(screen)
    reporter.start(0, 100)
    reporter.train(_record(10))
    clock.now += 20
    reporter.train(_record(20))
    assert reporter._bar is not None
    reporter._bar.refresh()
    shown = out.getvalue()
    assert re.search(r"20/100 *loss 2\.5000  lr 1\.00e-03  41\.2k tokens/s  ETA 2:40", shown)
    reporter.evaluating(3, 7)
    reporter._bar.refresh()
    assert "evaluating 3/7" in out.getvalue()
    reporter.evaluated(VALIDATION)
    reporter.close()
    reporter.close()
    assert "validation loss 2.0000" in out.getvalue()
    assert screen._live_stack == []
    assert out.getvalue().rindex("\x1b[?25h") > out.getvalue().rindex("\x1b[?25l")  # the cursor is back


def test_preparation_takes_its_bars_away_before_training_shows_its_own():
    screen, out = _pair(terminal=True)
    progress = PreparationReporter(screen)
    progress("fingerprint", 50, 100)
    assert len(screen._live_stack) == 1
    progress("fingerprint", 100, 100)
    assert screen._live_stack == []
    progress("train tokenizer", 10, 64_000_000)
    progress("tokenize", 50, 100)
    assert len(screen._live_stack) == 1
    progress("tokenize", 100, 100)
    assert screen._live_stack == []
    progress("wait", 0, None)
    progress.close()
    assert screen._live_stack == []
    assert "data: train tokenizer (64.0MB)" in out.getvalue()


def test_preparation_in_plain_lines():
    screen, out = _pair(terminal=False)
    progress = PreparationReporter(screen)
    for done in (0, 500, 1000):
        progress("tokenize", done, 1500)
    progress("wait", 0, None)
    assert out.getvalue().splitlines() == ["data: tokenize (1.5kB)", "data: wait"]


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0"), (999, "999"), (1000, "1.0k"), (41_234, "41.2k"), (412_345, "412k"), (2.5e9, "2.5G")]
)
def test_counts(number: float, text: str):
    assert console._count(number) == text


def test_durations():
    assert [console._duration(s) for s in (0, 59.6, 3599, 3600, 90_061)] == [
        "0:00",
        "1:00",
        "59:59",
        "1:00:00",
        "25:01:01",
    ]
