"""A training run: steps that come one by one, checkpoints, early stopping, exact resumption.

All that a run does follows from its step count: which rows a step takes, which learning rate, which
dropout masks. So a checkpoint is the adapter's state and a little bookkeeping, and a resumed run
gives bit for bit what one never stopped would have given, at the same number of threads.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from os import PathLike
from types import TracebackType
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from .._engine import Trainer
from ..checks import check_kind, check_path
from ..errors import DecodeAborted
from .base import open_trainer, quantised, wants_quantising
from .checkpoint import (
    PARTS,
    Checkpoint,
    check_fits,
    check_replaceable,
    check_writable,
    read_checkpoint,
    write_checkpoint,
)
from .config import TrainingConfig, learning_rate_at
from .dataset import TrainingDataset
from .errors import CheckpointError, InvalidSettingError, LoRASaveError, NonFiniteLossError
from .evaluate import Progress
from .evaluations import Best, Evaluations
from .invocation import check_invoked
from .objective import Metrics, StepLoss, objective_of
from .plan import Plan
from .records import TrainingStep, TrainingSummary
from .sigterm import STATUS, Sigterm

__all__ = ["TrainingRun", "train"]

_log = logging.getLogger("triollama.tuning")

Status = Literal["pending", "running", "stopped", "completed", "failed"]

CHECKPOINT_SECONDS = 60.0
"""Between two checkpoints where nobody says how many steps."""


class TrainingRun:
    """A run, as a context manager that is iterated::

        with train(path, dataset, config, checkpoint="run.ckpt") as run:
            for step in run:
                print(step.step, step.loss)
            run.save_adapter("adapter.gguf")

    ``status`` is pending, running, stopped, completed or failed. Leaving the block early, by an
    exception or Ctrl-C too, writes the checkpoint of the last whole step; so does SIGTERM, in the
    main thread and where nobody else handles it: the block then ends with SystemExit(143).
    ``save_adapter`` and ``summary`` work after the block, too, so that an exception costs no
    weights. One thread iterates; ``stop`` may come from any.
    """

    def __init__(
        self,
        model: str | PathLike[str],
        dataset: TrainingDataset,
        config: TrainingConfig,
        *,
        checkpoint: str | PathLike[str] | None = None,
        resume: bool = False,
        adapter: str | PathLike[str] | None = None,
        progress: Progress | None = None,
    ) -> None:
        check_kind("dataset", dataset, TrainingDataset)
        check_kind("config", config, TrainingConfig)
        check_kind("resume", resume, bool)
        check_kind("progress", progress, Callable, type(None))
        if config.patience is not None and not dataset.validation:
            raise InvalidSettingError(
                "patience needs validation examples; prepare the data with a validation_split",
                parameter="patience",
                value=config.patience,
            )
        self.id = uuid.uuid4().hex
        self.config = config
        self.dataset = dataset
        self.status: Status = "pending"
        self.error: BaseException | None = None
        self.resumed_at = 0
        self._model = check_path("model", model)
        self._checkpoint = None if checkpoint is None else check_path("checkpoint", checkpoint)
        self._resume = resume
        self._adapter = None if adapter is None else check_path("adapter", adapter)
        self._progress = progress
        self._objective = objective_of(dataset, config)
        self._plan: Plan[Any] = Plan(self._objective.units, config, varies=config.packing)
        self._dataset_hash = dataset.hash()
        self._trainer: Trainer | None = None
        self._stopping = threading.Event()
        self._sigterm = Sigterm(self.abort)
        self._losses: list[float] = []
        self._speeds: list[float] = []
        self._evaluated = Evaluations()
        self._stopped_early = False
        self._last_weights: NDArray[np.float32] | None = (
            None  # where the best ones took their place
        )
        self._saved_step: int | None = None
        self._saved_at = 0.0
        self._left: tuple[TrainingSummary, NDArray[np.float32]] | None = None
        self._scratch: tempfile.TemporaryDirectory[str] | None = None

    # ---- the block

    def __enter__(self) -> TrainingRun:
        if self._trainer is not None:
            raise InvalidSettingError("this run has already been entered")
        resume = self._resume and self._checkpoint and os.path.exists(self._checkpoint)
        if self._checkpoint is not None:
            check_writable(self._checkpoint)
            if not self._resume:
                check_replaceable(self._checkpoint)
        try:
            self._trainer = open_trainer(self._base(), self.config)
            if self._adapter is not None:
                self._trainer.load_adapter(self._adapter)
            if self._trainer.invocation:
                examples = (*self.dataset.train, *self.dataset.validation)
                parts = (part for example in examples for part in example.parts)
                check_invoked(parts, self._trainer.invocation)
            self._fingerprint = self._trainer.fingerprint.hex()
            self._architecture = self._trainer.architecture
            if resume and self._checkpoint:
                self._load_checkpoint(self._checkpoint)
        except BaseException:
            self._close()
            raise
        self.status = "running"
        self._saved_at = time.monotonic()
        self.watch_sigterm()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.leave(error)
        finally:
            self._close()
        if error is None:
            self.exit_if_terminated()

    def leave(self, error: BaseException | None) -> None:
        """End the run here, with a checkpoint of its last whole step, and keep its weights."""
        if self.status != "running":
            return
        self.status = "failed" if isinstance(error, Exception) else "stopped"
        self.error = error
        if isinstance(error, NonFiniteLossError | LoRASaveError):
            return  # the checkpoint before it stands
        if self._saved_step != self.trainer.step:
            self.save_checkpoint()
        if self._checkpoint is not None and self.trainer.step < self.total_steps:
            _log.warning(
                "stopped after step %d of %d: %s holds the run. Started again with it, and"
                " resume=True (the command does so by itself), it goes on from there",
                self.trainer.step,
                self.total_steps,
                self._checkpoint,
            )

    def watch_sigterm(self) -> None:
        """Make SIGTERM end the run with its checkpoint, if it has one; see ``Sigterm``."""
        if self._checkpoint is not None:
            self._sigterm.watch()

    def release_sigterm(self) -> None:
        self._sigterm.release()

    def exit_if_terminated(self) -> None:
        """End the process as SIGTERM would have, if it came: SystemExit(143)."""
        if self._sigterm.came:
            raise SystemExit(STATUS)

    def _close(self) -> None:
        self._sigterm.release()
        if self._trainer is not None and not self._trainer.is_closed:
            if self.status != "pending":
                self._left = (self.summary(), self._trainer.get("weights"))
            self._trainer.close()
        if self._scratch is not None:
            self._scratch.cleanup()

    def _base(self) -> str:
        """The model file to train on: with ``qlora``, quantised first unless it already is."""
        if not wants_quantising(self._model, self.config):
            return self._model
        self._scratch = tempfile.TemporaryDirectory(prefix="triollama-qlora-")
        return quantised(self._model, self.config, self._scratch.name)

    @property
    def trainer(self) -> Trainer:
        """The native trainer; raises InvalidSettingError before the block is entered."""
        if self._trainer is None:
            raise InvalidSettingError("the run has not been entered: use it in a with statement")
        return self._trainer

    @property
    def total_steps(self) -> int:
        return self._plan.total_steps

    def stop(self) -> None:
        """End the run before its next row; a step begun is not counted. From any thread."""
        self._stopping.set()

    def abort(self) -> None:
        """As ``stop``, but within a fraction of a row: what is being computed is thrown away."""
        self._stopping.set()
        trainer = self._trainer
        if trainer is not None and not trainer.is_closed:
            trainer.request_abort()

    # ---- the steps

    def __iter__(self) -> Iterator[TrainingStep]:
        """The steps still to be done. May be left and taken up again."""
        trainer, config, plan = self.trainer, self.config, self._plan
        started, first = time.monotonic(), trainer.step
        if self.status != "running":
            return
        try:
            self._evaluate_if_due()  # a run interrupted right after a step has this still to do
            while trainer.step < plan.total_steps and not self._evaluated.exhaust(config.patience):
                begun = time.monotonic()
                index = trainer.step
                rate = learning_rate_at(config, index, plan.total_steps)
                taken = self._one_step(index, rate, begun)
                if taken is None:
                    self.leave(None)
                    self.exit_if_terminated()
                    return
                result, norm = taken
                self._checkpoint_if_due()
                found = self._evaluate_if_due()
                now = time.monotonic()
                memory = trainer.memory
                pace = (now - started) / (trainer.step - first)
                yield TrainingStep(
                    epoch=plan.epoch_of(index) + 1,
                    step=trainer.step,
                    total_steps=plan.total_steps,
                    loss=result.loss,
                    accuracy=result.accuracy,
                    learning_rate=rate,
                    gradient_norm=norm,
                    tokens=result.tokens,
                    tokens_per_second=self._speeds[-1],
                    memory=memory["adapter"] + memory["activations"] + memory["arena"],
                    seconds_left=pace * (plan.total_steps - trainer.step),
                    validation_loss=found.average_loss if found else None,
                    validation_accuracy=found.accuracy if found else None,
                )
        except GeneratorExit:
            raise
        except DecodeAborted:  # in an evaluation: the steps before it stand
            self.leave(None)
            self.exit_if_terminated()
            return
        except Exception as error:
            self.leave(error)
            raise
        self._stopped_early = trainer.step < plan.total_steps
        self.save_checkpoint()  # of the last step: a longer run goes on from there
        if config.patience is not None and self._evaluated.best is not None:
            self._last_weights = trainer.get("weights")
            trainer.set("weights", self._evaluated.best.weights)
        self.status = "completed"

    def _one_step(self, index: int, rate: float, begun: float) -> tuple[StepLoss, float] | None:
        """The loss and the gradient norm of a step; None if the run is to stop."""
        trainer, config = self.trainer, self.config
        trainer.clear_gradients()
        # The masks of dropout follow from this counter, whatever was interrupted before.
        trainer.restore_counters(index, self._plan.units_before(index))
        units = self._plan.units(index)
        result = self._objective.add_gradients(trainer, units, self._stopping.is_set)
        if result is None:
            trainer.clear_gradients()
            return None
        norm = trainer.gradient_norm()
        if not math.isfinite(result.loss) or not math.isfinite(norm):
            trainer.clear_gradients()
            raise NonFiniteLossError(
                f"step {index + 1} has a loss of {result.loss} and a gradient norm of {norm}: it"
                f" was not taken, and the checkpoint before it stands. Lower learning_rate"
                f" ({rate:g} here) or max_grad_norm, or look for damaged data",
                step=index + 1,
            )
        if config.max_grad_norm and norm > config.max_grad_norm:
            trainer.scale_gradients(config.max_grad_norm / norm)
        # Told first: what interrupts after the step finds it told, and before it, one too many.
        self._losses = [*self._losses[:index], result.loss]
        speed = result.tokens / max(time.monotonic() - begun, 1e-9)
        self._speeds = [*self._speeds[:index], speed]
        trainer.adamw_step(
            rate,
            beta1=config.beta1,
            beta2=config.beta2,
            epsilon=config.epsilon,
            weight_decay=config.weight_decay,
        )
        return result, norm

    def _evaluate_if_due(self) -> Metrics | None:
        step = self.trainer.step
        every = self.config.evaluate_every
        due = (
            step == self._plan.total_steps or step % every == 0
            if every
            else self._plan.ends_epoch(step)
        )
        if not self.dataset.validation or (step and not due):
            return None
        if self._evaluated.has(step):
            return None
        found = self._objective.evaluate(self.trainer, self._progress)
        self._evaluated = self._evaluated.after(
            step, found, lambda: self.trainer.get("weights"), self.config.min_delta
        )
        return found

    # ---- results

    def evaluate(self) -> Metrics:
        """Metrics of the adapter as it is now, on the validation examples."""
        return self._objective.evaluate(self.trainer, self._progress)

    def summary(self) -> TrainingSummary:
        if self._left is not None:
            return self._left[0]
        step = self.trainer.step
        losses, accuracies, best = self._evaluated
        return TrainingSummary(
            id=self.id,
            base_fingerprint=self._fingerprint,
            architecture=self._architecture,
            config=self.config,
            dataset_hash=self._dataset_hash,
            step=step,
            total_steps=self._plan.total_steps,
            losses=self._losses[:step],
            speeds=self._speeds[:step],
            validation=list(losses),
            accuracies=list(accuracies),
            best_step=best and best.step,
            stopped_early=self._stopped_early,
            restored_best=self._last_weights is not None,
        )

    @contextlib.contextmanager
    def open_trainer(self) -> Iterator[Trainer]:
        """The trainer with the run's weights, also after the block: then opened anew. Raises
        InvalidSettingError before it."""
        trainer = self.trainer
        if self._left is None:
            yield trainer
            return
        with open_trainer(self._model, self.config) as again:
            again.set("weights", self._left[1])
            yield again

    def save_adapter(self, path: str | PathLike[str]) -> None:
        """The adapter as GGUF, with the run's summary in its metadata; after the block, too. Raises
        LoRASaveError."""
        with self.open_trainer() as trainer:
            metadata = {
                "general.name": f"LoRA of {self._architecture}, rank {self.config.rank}",
                "triollama.base_fingerprint": self._fingerprint,
                "triollama.training": msgspec.json.encode(self.summary()).decode(),
            }
            try:
                trainer.save_adapter(path, metadata)
            except OSError as error:
                raise LoRASaveError(
                    error.errno, f"cannot write the adapter {path}: {error}"
                ) from error

    # ---- checkpoints

    def _checkpoint_if_due(self) -> None:
        every = self.config.checkpoint_every
        if (
            self.trainer.step % every == 0
            if every
            else time.monotonic() - self._saved_at >= CHECKPOINT_SECONDS
        ):
            self.save_checkpoint()

    def save_checkpoint(self) -> None:
        """All that resuming needs, atomically; nothing if the run has no checkpoint path.

        Raises LoRASaveError; the checkpoint before then stands.
        """
        if self._checkpoint is None:
            return
        tensors: dict[str, NDArray[Any]] = {part: self.trainer.get(part) for part in PARTS}
        if self._last_weights is not None:
            tensors["weights"] = self._last_weights
        best = self._evaluated.best
        if best is not None:
            tensors["best_weights"] = best.weights
        tensors |= self._objective.state()
        summary = self.summary()
        write_checkpoint(self._checkpoint, Checkpoint(summary, tensors, best and best.loss))
        self._saved_step = summary.step
        self._saved_at = time.monotonic()

    def _load_checkpoint(self, path: str) -> None:
        trainer = self.trainer
        checkpoint = read_checkpoint(path)
        check_fits(
            path,
            checkpoint,
            fingerprint=self._fingerprint,
            dataset_hash=self._dataset_hash,
            config=self.config,
            n_parameters=trainer.n_parameters,
            total_steps=self._plan.total_steps,
        )
        summary, tensors, best_loss = checkpoint
        if not self._objective.restore(tensors):
            raise CheckpointError(f"the checkpoint {path} belongs to other training data")
        for part in PARTS:
            trainer.set(part, tensors[part])
        trainer.restore_counters(summary.step, self._plan.units_before(summary.step))
        self.id = summary.id
        self.resumed_at = summary.step
        self._losses, self._speeds = list(summary.losses), list(summary.speeds)
        best = None
        if best_loss is not None and summary.best_step is not None:
            best = Best(summary.best_step, best_loss, tensors["best_weights"])
        losses = tuple((step, loss) for step, loss in summary.validation)
        self._evaluated = Evaluations(losses, tuple(summary.accuracies), best)
        self._saved_step = summary.step


def train(
    model: str | PathLike[str],
    dataset: TrainingDataset,
    config: TrainingConfig | None = None,
    *,
    checkpoint: str | PathLike[str] | None = None,
    resume: bool = False,
    adapter: str | PathLike[str] | None = None,
    progress: Progress | None = None,
) -> TrainingRun:
    """A run that trains an adapter on the model file ``model``; see :class:`TrainingRun`.

    checkpoint: where to write checkpoints: every ``config.checkpoint_every`` steps, or once a
    minute, and whenever the run ends; without it there are none. resume: go on from that file, if
    it exists; CheckpointError if it belongs to another model, configuration or dataset (what may
    change, longer runs among it, tells ``TrainingConfig``). adapter: start from these weights.
    progress: called in what takes long between steps, evaluations for one, with what it is and how
    much of how much is done.
    """
    config = TrainingConfig() if config is None else config
    return TrainingRun(
        model,
        dataset,
        config,
        checkpoint=checkpoint,
        resume=resume,
        adapter=adapter,
        progress=progress,
    )
