"""What is told of a run: plain data."""

from __future__ import annotations

import msgspec

from .config import TrainingConfig

__all__ = ["TrainingStep", "TrainingSummary"]


class TrainingStep(msgspec.Struct, frozen=True, kw_only=True):
    """One step of the optimiser.

    ``epoch`` counts from 1 and ``step`` from 1 through the whole run. ``loss``: mean of -ln p over
    the step's labels, or of the preference loss over its pairs, and ``accuracy``: the share the
    model had right, both before the step. ``validation_loss`` and ``validation_accuracy``: after
    it, where an evaluation was due. ``gradient_norm``: before clipping. ``tokens_per_second``: of
    this step. ``memory``: bytes of adapter, activations and graph. ``seconds_left``: by this run's
    mean speed.
    """

    epoch: int
    step: int
    total_steps: int
    loss: float
    accuracy: float
    learning_rate: float
    gradient_norm: float
    tokens: int
    tokens_per_second: float
    memory: int
    seconds_left: float
    validation_loss: float | None = None
    validation_accuracy: float | None = None


class TrainingSummary(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a run; rides in checkpoints and exported adapters.

    ``losses``, ``speeds`` (tokens a second): of each step. ``validation``: (step, loss) of each
    evaluation, and ``accuracies`` what it found right. ``best_step``: where the validation loss was
    lowest (0: before the first step). ``stopped_early``: ``patience`` ended the run;
    ``restored_best``: its weights are those of ``best_step``.
    """

    id: str
    base_fingerprint: str
    architecture: str
    config: TrainingConfig
    dataset_hash: str
    step: int
    total_steps: int
    losses: list[float]
    validation: list[tuple[int, float]]
    accuracies: list[float] = []
    speeds: list[float] = []
    best_step: int | None = None
    stopped_early: bool = False
    restored_best: bool = False

    def how_it_ended(self) -> str:
        """A sentence: complete, stopped early and why, or interrupted."""
        if self.stopped_early:
            text = (
                f"stopped early after step {self.step} of {self.total_steps}: the held-out loss had"
                f" not fallen for {self.config.patience} evaluations"
            )
        elif self.step < self.total_steps:
            return f"interrupted after step {self.step} of {self.total_steps}"
        else:
            text = f"complete after step {self.step}"
        if self.restored_best:
            text += f"; the weights are those of step {self.best_step}, the best"
        return text
