"""A run as it goes, in a terminal: one line that moves, and curves."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Sequence
from typing import TextIO

from .records import TrainingStep, TrainingSummary

__all__ = ["Watch", "plot"]


class Watch:
    """Tells of steps and evaluations, on standard error by default.

    In a terminal that is one line, written over; elsewhere, in a log, a line for each evaluation
    and otherwise one in ``interval`` seconds. What ``say`` tells stays.
    """

    def __init__(
        self,
        out: TextIO | None = None,
        *,
        interval: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._out = sys.stderr if out is None else out
        self._moves = self._out.isatty()
        self._interval = interval
        self._clock = clock
        self._told_at: float | None = None
        self._shown = False
        self._held_out: float | None = None

    def step(self, step: TrainingStep) -> None:
        if step.validation_loss is not None:
            self._held_out = step.validation_loss
        text = f"step {step.step}/{step.total_steps}  loss {step.loss:.4f}"
        if self._held_out is not None:
            text += f"  held out {self._held_out:.4f}"
        text += (
            f"  rate {step.learning_rate:.1e}  {step.tokens_per_second:.0f} tokens/s"
            f"  {duration(step.seconds_left)} left"
        )
        last = step.step == step.total_steps
        self._tell(text, step.validation_loss is not None or last)

    def progress(self, what: str, done: int, total: int) -> None:
        """As ``progress`` of :func:`triollama.tuning.train` is called."""
        self._tell(f"{what}: {done} of {total}", False)

    def say(self, text: str) -> None:
        """A line that stays."""
        self.close()
        print(text, file=self._out, flush=True)

    def close(self) -> None:
        """Leave the line that moves as it is, and go on below it."""
        if self._shown:
            print(file=self._out, flush=True)
            self._shown = False

    def _tell(self, text: str, important: bool) -> None:
        if self._moves:
            columns = shutil.get_terminal_size().columns
            self._out.write("\r\x1b[K" + text[: columns - 1])
            self._out.flush()
            self._shown = True
            return
        now = self._clock()
        if important or self._told_at is None or now - self._told_at >= self._interval:
            self._told_at = now
            print(text, file=self._out, flush=True)


def duration(seconds: float) -> str:
    """1:02:03, or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def plot(summary: TrainingSummary, *, width: int = 64, height: int = 12) -> str:
    """The losses of a run by step, as text: ``.`` is the mean training loss of the steps that share
    a column, ``o`` a held-out loss."""
    if not summary.losses:
        return "no steps yet"
    total = len(summary.losses)
    columns = min(width, total)
    means: list[tuple[int, float]] = []
    for column in range(columns):
        part = summary.losses[column * total // columns : (column + 1) * total // columns]
        means.append((column, sum(part) / len(part)))
    held_out = [
        (min(max(step - 1, 0) * columns // total, columns - 1), loss)
        for step, loss in summary.validation
    ]
    values = [loss for _, loss in (*means, *held_out)]
    low, high = min(values), max(values)
    grid = [[" "] * columns for _ in range(height)]
    for mark, points in ((".", means), ("o", held_out)):
        for column, loss in points:
            row = round((high - loss) / (high - low) * (height - 1)) if high > low else 0
            grid[row][column] = mark
    names = {0: f"{high:.3f}", height - 1: f"{low:.3f}"}
    margin = max(map(len, names.values()))
    lines = [f"{names.get(i, ''):>{margin}} |{''.join(row)}" for i, row in enumerate(grid)]
    axis = f"{'':>{margin}} +{'-' * columns}"
    ends = f"{'':>{margin}}  step 1{f'step {total}':>{max(columns - 6, 0)}}"
    return "\n".join([*(line.rstrip() for line in lines), axis, ends, _legend(held_out)])


def _legend(held_out: Sequence[object]) -> str:
    return ". training loss" + ("   o held-out loss" if held_out else "")
