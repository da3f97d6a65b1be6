"""What a run minimises: the negative log-likelihood of texts, or a loss over preferences.

An objective knows its units of work, adds their gradients to a trainer's, and evaluates. A step's
loss is a mean over all its labels, or over its pairs, however they are cut into rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from .._engine import Trainer
from ..errors import DecodeAborted
from .config import TrainingConfig
from .dataset import TrainingDataset
from .encode import PreferenceExample
from .errors import DataError, InvalidSettingError
from .evaluate import EvaluationMetrics, Progress, evaluate_examples, without_adapter
from .rows import Row, row_of

__all__ = [
    "Likelihood",
    "Objective",
    "PreferenceMetrics",
    "Preferences",
    "StepLoss",
    "objective_of",
]


class StepLoss(NamedTuple):
    """Of one step, before it: the loss, the share that was right, and how many tokens were
    computed."""

    loss: float
    accuracy: float
    tokens: int


class PreferenceMetrics(msgspec.Struct, frozen=True):
    """Over pairs. ``accuracy``: the share in which the model moved from the reference towards the
    better answer more than towards the worse one. ``margin``: mean of beta times the difference.
    ``likelier``: the share in which the model itself finds the better answer the likelier one (by
    the token, for IPO)."""

    average_loss: float
    accuracy: float
    margin: float
    likelier: float
    total_examples: int
    total_tokens: int


Metrics = EvaluationMetrics | PreferenceMetrics
Stopping = Callable[[], bool]


class Objective(Protocol):
    def units(self, epoch: int) -> Sequence[Any]:
        """The units of an epoch, from 0."""
        ...

    def add_gradients(
        self, trainer: Trainer, units: Sequence[Any], stopping: Stopping
    ) -> StepLoss | None:
        """Those of the units' mean loss; None if it stopped between two rows, or was aborted."""
        ...

    def evaluate(self, trainer: Trainer, progress: Progress | None) -> Metrics:
        """On the validation examples."""
        ...

    def state(self) -> dict[str, NDArray[Any]]:
        """What a checkpoint keeps, by name."""
        ...

    def restore(self, tensors: Mapping[str, NDArray[Any]]) -> bool:
        """The reverse; False if the arrays are not of this dataset."""
        ...


def objective_of(dataset: TrainingDataset, config: TrainingConfig) -> Objective:
    """What the data ask for. Raises InvalidSettingError."""
    return (Preferences if dataset.has_preferences else Likelihood)(dataset, config)


class Likelihood:
    """-ln p of the learned tokens; a unit is a row."""

    def __init__(self, dataset: TrainingDataset, config: TrainingConfig) -> None:
        self._dataset = dataset
        self._config = config

    def units(self, epoch: int) -> list[Row]:
        config = self._config
        return self._dataset.rows(
            epoch, seed=config.seed, shuffle=config.shuffle, packing=config.packing
        )

    def state(self) -> dict[str, NDArray[Any]]:
        return {}

    def restore(self, tensors: Mapping[str, NDArray[Any]]) -> bool:
        return True

    def add_gradients(
        self, trainer: Trainer, units: Sequence[Row], stopping: Stopping
    ) -> StepLoss | None:
        n_labels = sum(row.n_labels for row in units)
        total, hits = 0.0, 0
        for row in units:
            if stopping():
                return None
            try:
                result = trainer.forward_backward(
                    row.tokens,
                    row.labels,
                    positions=row.positions,
                    segments=row.segments,
                    weights=np.full(len(row.tokens), 1.0 / n_labels, np.float32),
                )
            except DecodeAborted:
                return None
            total += float(result.nll.sum(dtype=np.float64))
            hits += int((result.predicted == row.labels[row.labels >= 0]).sum())
        return StepLoss(total / n_labels, hits / n_labels, sum(len(row.tokens) for row in units))

    def evaluate(self, trainer: Trainer, progress: Progress | None) -> EvaluationMetrics:
        return evaluate_examples(trainer, self._dataset.validation, progress=progress)


class _Pair(NamedTuple):
    """Rows of the two answers, and their log-probabilities by the reference."""

    chosen: Row
    rejected: Row
    reference: tuple[float, float]


class _PairLoss(NamedTuple):
    """``slope``: the derivative of the loss in h."""

    loss: float
    h: float
    slope: float
    likelier: bool


class Preferences:
    """DPO and IPO over pairs of answers; a unit is a pair.

    With h the difference between the two answers of ln p(answer) - ln p_reference(answer), the loss
    of a pair is -ln sigmoid(beta h), or for IPO, whose logarithms are means over tokens,
    (h - 1 / (2 beta))^2. Its gradient is that of the two logarithms, times a number that follows
    from h: so each pair is computed once for h, and once more with these numbers as the weights of
    its labels, the worse answer's negative.
    """

    def __init__(self, dataset: TrainingDataset, config: TrainingConfig) -> None:
        for name, off in (("dropout", 0.0), ("packing", False)):
            if getattr(config, name) != off:
                raise InvalidSettingError(
                    f"preferences are learned without {name}: {name}={off}",
                    parameter=name,
                    value=getattr(config, name),
                )
        self._dataset = dataset
        self._config = config
        # [examples, 2], held out ones last; NaN until a pair is wanted for the first time.
        self._reference = np.full((len(self._examples), 2), np.nan)

    @property
    def _examples(self) -> tuple[PreferenceExample, ...]:
        return (*self._dataset.train, *self._dataset.validation)

    def units(self, epoch: int) -> Sequence[int]:
        return self._dataset.order(epoch, seed=self._config.seed, shuffle=self._config.shuffle)

    def state(self) -> dict[str, NDArray[Any]]:
        return {"reference": self._reference}

    def restore(self, tensors: Mapping[str, NDArray[Any]]) -> bool:
        found = tensors.get("reference")
        if found is None or found.shape != self._reference.shape or found.dtype != np.float64:
            return False
        self._reference = found.copy()
        return True

    def _pair(self, trainer: Trainer, index: int) -> _Pair:
        chosen, rejected = (row_of([part]) for part in self._examples[index].parts)
        if np.isnan(self._reference[index]).any():
            with without_adapter(trainer):
                found = [self._logp(trainer, row) for row in (chosen, rejected)]
            self._reference[index] = found
        a, b = self._reference[index]
        return _Pair(chosen, rejected, (float(a), float(b)))

    def _logp(self, trainer: Trainer, row: Row) -> float:
        """ln p of the row's labels: the sum, or IPO's mean."""
        nll = trainer.evaluate(row.tokens, row.labels).nll
        total = -float(nll.sum(dtype=np.float64))
        return total / len(nll) if self._config.preference_loss == "ipo" else total

    def _loss(self, trainer: Trainer, pair: _Pair) -> _PairLoss:
        beta = self._config.beta
        better, worse = (self._logp(trainer, row) for row in (pair.chosen, pair.rejected))
        h = (better - pair.reference[0]) - (worse - pair.reference[1])
        if self._config.preference_loss == "ipo":
            off = h - 1.0 / (2.0 * beta)
            return _PairLoss(off * off, h, 2.0 * off, better > worse)
        x = beta * h
        # ln(1 + e^-x) and its derivative, without overflow.
        loss = math.log1p(math.exp(-abs(x))) + max(-x, 0.0)
        return _PairLoss(loss, h, -beta / (1.0 + math.exp(min(x, 700.0))), better > worse)

    def add_gradients(
        self, trainer: Trainer, units: Sequence[int], stopping: Stopping
    ) -> StepLoss | None:
        total, right, tokens = 0.0, 0, 0
        for index in units:
            try:
                if stopping():
                    return None
                pair = self._pair(trainer, index)
                found = self._loss(trainer, pair)
                for row, sign in ((pair.chosen, -1.0), (pair.rejected, 1.0)):
                    if stopping():
                        return None
                    weight = sign * found.slope / len(units)
                    if self._config.preference_loss == "ipo":
                        weight /= row.n_labels
                    weights = np.full(len(row.tokens), weight, np.float32)
                    trainer.forward_backward(row.tokens, row.labels, weights=weights)
                    tokens += len(row.tokens)
            except DecodeAborted:
                return None
            total += found.loss
            right += found.h > 0.0
        return StepLoss(total / len(units), right / len(units), tokens)

    def evaluate(self, trainer: Trainer, progress: Progress | None) -> PreferenceMetrics:
        first, n = len(self._dataset.train), len(self._dataset.validation)
        found = []
        for i in range(n):
            found.append(self._loss(trainer, self._pair(trainer, first + i)))
            if progress:
                progress("held out", i + 1, n)
        if not found:
            raise DataError("there is no pair to evaluate on")
        examples = self._dataset.validation
        return PreferenceMetrics(
            average_loss=math.fsum(one.loss for one in found) / n,
            accuracy=sum(one.h > 0.0 for one in found) / n,
            margin=self._config.beta * math.fsum(one.h for one in found) / n,
            likelier=sum(one.likelier for one in found) / n,
            total_examples=n,
            total_tokens=sum(part.n_targets for example in examples for part in example.parts),
        )
