"""A run as TensorBoard shows it, written while it goes."""

from __future__ import annotations

import contextlib
import importlib
from os import PathLike
from typing import Any

from ..checks import check_path
from .config import learning_rate_at
from .records import TrainingSummary

__all__ = ["Events"]


class Events:
    """Writes events for TensorBoard into a folder: the losses, the learning rate and the tokens a
    second of each step, and the held-out loss and accuracy of each evaluation.

    after: the step from which the run goes on; what was before it is there from before. Raises
    ImportError where neither tensorboardX nor PyTorch with TensorBoard is installed.
    """

    def __init__(self, folder: str | PathLike[str], *, after: int = 0) -> None:
        self._writer = _writer(check_path("folder", folder))
        self._steps = after
        self._evaluated = after or -1  # step 0 is evaluated, too

    def update(self, summary: TrainingSummary) -> None:
        """Write what is not written yet; flushed, so that who watches sees it."""
        scalar = self._writer.add_scalar
        for step in range(self._steps + 1, len(summary.losses) + 1):
            rate = learning_rate_at(summary.config, step - 1, summary.total_steps)
            scalar("loss/training", summary.losses[step - 1], step)
            scalar("learning_rate", rate, step)
            if step <= len(summary.speeds):
                scalar("tokens_per_second", summary.speeds[step - 1], step)
        self._steps = len(summary.losses)
        for (step, loss), accuracy in zip(summary.validation, summary.accuracies, strict=False):
            if step > self._evaluated:
                scalar("loss/held_out", loss, step)
                scalar("accuracy/held_out", accuracy, step)
                self._evaluated = step
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _writer(folder: str) -> Any:
    for name in ("tensorboardX", "torch.utils.tensorboard"):
        with contextlib.suppress(ImportError):
            return importlib.import_module(name).SummaryWriter(folder)
    raise ImportError(
        "events for TensorBoard are written by tensorboardX: pip install 'triollama[tensorboard]'"
    )
