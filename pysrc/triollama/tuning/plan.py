"""Which units of work each step of a run takes: a function of its number."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import numpy as np

from .config import TrainingConfig

__all__ = ["Plan"]

Unit = TypeVar("Unit")


class Plan(Generic[Unit]):
    """``units``: those of an epoch, from 0, in order; the same for the same epoch. ``varies``:
    whether epochs have different numbers of them."""

    def __init__(
        self, units: Callable[[int], Sequence[Unit]], config: TrainingConfig, *, varies: bool
    ) -> None:
        self._make = units
        self._epochs = config.epochs
        self._per_step = config.batch_size * config.accumulation
        self._made: tuple[int, Sequence[Unit]] | None = None
        self.first_step: list[int] = [0]  # of each epoch, and one past the last
        self._first_unit: list[int] = [0]
        for epoch in range(config.epochs):
            n = len(self._of_epoch(epoch)) if varies or not epoch else self._first_unit[1]
            self.first_step.append(self.first_step[-1] + math.ceil(n / self._per_step))
            self._first_unit.append(self._first_unit[-1] + n)
        self.total_steps = min(self.first_step[-1], config.max_steps or self.first_step[-1])

    def _of_epoch(self, epoch: int) -> Sequence[Unit]:
        if self._made is None or self._made[0] != epoch:
            self._made = (epoch, self._make(epoch))
        return self._made[1]

    def epoch_of(self, step: int) -> int:
        """The epoch, from 0, that step ``step``, from 0, belongs to."""
        return int(np.searchsorted(self.first_step, step, side="right")) - 1

    def units_before(self, step: int) -> int:
        """How many units the steps before this one take together."""
        epoch = min(self.epoch_of(step), self._epochs - 1)
        within = (step - self.first_step[epoch]) * self._per_step
        return min(self._first_unit[epoch] + within, self._first_unit[epoch + 1])

    def units(self, step: int) -> Sequence[Unit]:
        epoch = self.epoch_of(step)
        at = (step - self.first_step[epoch]) * self._per_step
        return self._of_epoch(epoch)[at : at + self._per_step]

    def ends_epoch(self, step: int) -> bool:
        """Whether ``step`` steps, done, complete an epoch or the run."""
        return step in self.first_step[1:] or step == self.total_steps
