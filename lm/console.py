"""What a person sees of long work: a progress bar on a terminal, plain lines elsewhere."""

import logging
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

log = logging.getLogger(__name__)


def _count(number: float) -> str:
    """A number in at most four signs and a unit: 1.8k, 41.2M."""
    for unit in ("", "k", "M", "G", "T", "P"):
        if abs(number) < 1000:
            return f"{number:.0f}{unit}" if not unit or number >= 100 else f"{number:.1f}{unit}"
        number /= 1000
    return f"{number:.0f}E"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


# Of what an evaluation finds, what a line has room for.
_EVALUATED = {
    "loss": "loss {:.4f}",
    "perplexity": "perplexity {:.2f}",
    "bits_per_byte": "bits/byte {:.3f}",
    "accuracy": "accuracy {:.1%}",
    "macro_f1": "macro F1 {:.3f}",
    "next_accuracy": "next sentence {:.1%}",
}


class TrainingReporter:
    """Shows a run: a bar with loss, speed and time left on a terminal, a line a record elsewhere."""

    def __init__(self, console: Console):
        self._console = console
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._total = 0
        self._first: tuple[int, float] | None = None

    def start(self, step: int, total: int) -> None:
        """Training begins at `step` of `total`; the first step also compiles."""
        self._total, self._first = total, None
        self.message(f"training from step {step} to {total}; the first step compiles, which takes a moment")
        if self._console.is_terminal:
            self._bar = Progress(
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.description}"),
                console=self._console,
                transient=True,
            )
            self._task = self._bar.add_task("compiling", total=total, completed=step)
            self._bar.start()

    def train(self, record: dict[str, Any]) -> None:
        """A training record."""
        step, speed = record["step"], record["tokens_per_second"]
        parts = [f"loss {record['loss']:.4f}", f"lr {record['learning_rate']:.2e}", f"{_count(speed)} tokens/s"]
        if "mfu" in record:
            parts.append(f"MFU {record['mfu']:.1%}")
        if record["skipped"]:
            parts.append(f"{record['skipped']} skipped")
        parts += self._time_left(step)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step, description="  ".join(parts))
        else:
            self._print(f"step {step}/{self._total}  {'  '.join(parts)}")

    def _time_left(self, step: int) -> list[str]:
        """From the pace since the first record, evaluations included; before it, compiling would be counted in."""
        now = time.monotonic()
        if self._first is None:
            self._first = step, now
            return []
        first_step, first_time = self._first
        pace = (now - first_time) / (step - first_step)
        return [f"ETA {_duration(pace * (self._total - step))}"]

    def evaluating(self, done: int, total: int) -> None:
        """An evaluation goes on."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=f"evaluating {done}/{total}")

    def evaluated(self, record: dict[str, Any]) -> None:
        """A validation record."""
        shown = [pattern.format(record[name]) for name, pattern in _EVALUATED.items() if name in record]
        self.message(f"step {record['step']}/{self._total}  validation {'  '.join(shown)}")

    def message(self, text: str) -> None:
        """A line that stays."""
        log.info(text)
        self._print(text)

    def _print(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Takes the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


_IN_BYTES = ("fingerprint", "read", "train tokenizer", "tokenize")


class PreparationReporter:
    """Shows `lm.data.prepare` at work: a bar a phase on a terminal, a line a phase elsewhere."""

    def __init__(self, console: Console):
        self._console = console
        self._phase = ""
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __call__(self, phase: str, done: int, total: int | None) -> None:
        """`done` of `total` of a phase, most in bytes."""
        if phase != self._phase:
            self.close()
            self._phase = phase
            size = f" ({_count(total)}B)" if total and phase in _IN_BYTES else ""
            if self._console.is_terminal:
                self._bar = Progress(
                    TextColumn("{task.description}"),
                    BarColumn(bar_width=24),
                    TextColumn("{task.percentage:>3.0f}%"),
                    TimeRemainingColumn(),
                    console=self._console,
                    transient=True,
                )
                self._task = self._bar.add_task(f"data: {phase}{size}", total=total)
                self._bar.start()
            else:
                self._console.print(f"data: {phase}{size}", highlight=False, markup=False)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done)
        if total is not None and done >= total:  # the last phase has no next one to end it
            self.close()

    def close(self) -> None:
        """Takes the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
