"""The evaluations of a run so far, and whether it should go on."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .objective import Metrics

__all__ = ["Best", "Evaluations"]


class Best(NamedTuple):
    step: int
    loss: float
    weights: NDArray[np.float32]


class Evaluations(NamedTuple):
    """``losses``: (step, held-out loss). Replaced as a whole, so that what interrupts leaves none
    by half."""

    losses: tuple[tuple[int, float], ...] = ()
    accuracies: tuple[float, ...] = ()
    best: Best | None = None

    def after(
        self,
        step: int,
        found: Metrics,
        weights: Callable[[], NDArray[np.float32]],
        min_delta: float,
    ) -> Evaluations:
        """With one more, after this step, and its ``weights`` if it is best by ``min_delta``."""
        best = self.best
        if best is None or found.average_loss < best.loss - min_delta:
            best = Best(step, found.average_loss, weights())
        return Evaluations(
            (*self.losses, (step, found.average_loss)), (*self.accuracies, found.accuracy), best
        )

    def has(self, step: int) -> bool:
        return bool(self.losses) and self.losses[-1][0] == step

    def exhaust(self, patience: int | None) -> bool:
        """Whether so many have passed without a better one."""
        if patience is None or self.best is None:
            return False
        return sum(step > self.best.step for step, _ in self.losses) >= patience
