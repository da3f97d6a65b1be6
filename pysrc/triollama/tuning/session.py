"""A training run: steps that come one by one, checkpoints, early stopping, exact resumption.

All that a run does follows from its step count: which rows a step takes, which learning rate, which
dropout masks. So a checkpoint is the adapter's state and a little bookkeeping, and a resumed run
gives bit for bit what one never stopped would have given, at the same number of threads.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from os import PathLike
from types import TracebackType
from typing import Literal

import msgspec
import numpy as np

from .._engine import Trainer, quantize, read_gguf
from ..errors import DecodeAborted, ParameterError, UnsupportedError
from .config import TrainingConfig, learning_rate_at
from .dataset import Row, TrainingDataset
from .errors import (
    CheckpointError,
    InvalidRankError,
    InvalidSettingError,
    LoRASaveError,
    NonFiniteLossError,
    UnsupportedModelError,
)
from .evaluate import EvaluationMetrics, evaluate_examples
from .tensors import TensorFileError, read_tensors, write_tensors

__all__ = ["TrainingRun", "TrainingStep", "TrainingSummary", "train"]

_log = logging.getLogger("triollama.tuning")

Status = Literal["pending", "running", "stopped", "completed", "failed"]

_FREE_TO_CHANGE = ("threads", "checkpoint_every")
"""Settings that a resumed run may have otherwise: they do not change what is computed."""


class TrainingStep(msgspec.Struct, frozen=True, kw_only=True):
    """One step of the optimiser.

    ``epoch`` counts from 1 and ``step`` from 1 through the whole run. ``loss``: mean of -ln p over
    the step's labels, and ``accuracy``: the share the model had right, both before the step.
    ``validation_loss``: after it, where an evaluation was due. ``gradient_norm``: before clipping.
    ``tokens_per_second``: of this step. ``memory``: bytes of adapter, activations and graph.
    ``seconds_left``: by this run's mean speed.
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


class TrainingSummary(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a run; rides in checkpoints and exported adapters.

    ``losses``: of each step. ``validation``: (step, loss) of each evaluation. ``best_step``: where
    the validation loss was lowest (0: before the first step).
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
    best_step: int | None = None
    stopped_early: bool = False
    restored_best: bool = False


class _Plan:
    """Which rows each step takes."""

    def __init__(self, dataset: TrainingDataset, config: TrainingConfig) -> None:
        self._dataset = dataset
        self._config = config
        self._per_step = config.batch_size * config.accumulation
        self._rows: tuple[int, list[Row]] | None = None
        self.first_step: list[int] = [0]  # of each epoch, and one past the last
        self._first_row: list[int] = [0]
        for epoch in range(config.epochs):
            same = epoch and not config.packing  # without packing all epochs are of one length
            n_rows = self._first_row[1] if same else len(self._rows_of(epoch))
            self.first_step.append(self.first_step[-1] + math.ceil(n_rows / self._per_step))
            self._first_row.append(self._first_row[-1] + n_rows)
        self.total_steps = min(self.first_step[-1], config.max_steps or self.first_step[-1])

    def _rows_of(self, epoch: int) -> list[Row]:
        if self._rows is None or self._rows[0] != epoch:
            config = self._config
            rows = self._dataset.rows(
                epoch, seed=config.seed, shuffle=config.shuffle, packing=config.packing
            )
            self._rows = (epoch, rows)
        return self._rows[1]

    def epoch_of(self, step: int) -> int:
        """The epoch, from 0, that step ``step``, from 0, belongs to."""
        return int(np.searchsorted(self.first_step, step, side="right")) - 1

    def rows_before(self, step: int) -> int:
        """How many rows the steps before this one take together."""
        epoch = min(self.epoch_of(step), self._config.epochs - 1)
        within = (step - self.first_step[epoch]) * self._per_step
        return min(self._first_row[epoch] + within, self._first_row[epoch + 1])

    def rows(self, step: int) -> list[Row]:
        epoch = self.epoch_of(step)
        at = (step - self.first_step[epoch]) * self._per_step
        return self._rows_of(epoch)[at : at + self._per_step]

    def ends_epoch(self, step: int) -> bool:
        """Whether ``step`` steps, done, complete an epoch or the run."""
        return step in self.first_step[1:] or step == self.total_steps


class TrainingRun:
    """A run, as a context manager that is iterated::

        with train(path, dataset, config, checkpoint="run.ckpt") as run:
            for step in run:
                print(step.step, step.loss)
            run.save_adapter("adapter.gguf")

    ``status`` is pending, running, stopped, completed or failed. Leaving the block early, by an
    exception or Ctrl-C too, writes the checkpoint of the last whole step. One thread iterates;
    ``stop`` may come from any.
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
    ) -> None:
        if dataset.max_length > config.max_length:
            raise InvalidSettingError(
                f"the dataset has rows of up to {dataset.max_length} tokens, and the run's"
                f" max_length is {config.max_length}",
                parameter="max_length",
                value=config.max_length,
            )
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
        self._model = os.fspath(model)
        self._checkpoint = None if checkpoint is None else os.fspath(checkpoint)
        self._resume = resume
        self._adapter = adapter
        self._plan = _Plan(dataset, config)
        self._dataset_hash = dataset.hash()
        self._trainer: Trainer | None = None
        self._stopping = threading.Event()
        self._losses: list[float] = []
        self._validation: list[tuple[int, float]] = []
        self._best: tuple[int, float] | None = None
        self._best_weights: np.ndarray | None = None
        self._stopped_early = False
        self._restored_best = False
        self._saved_step: int | None = None
        self._scratch: tempfile.TemporaryDirectory[str] | None = None

    # ---- the block

    def __enter__(self) -> TrainingRun:
        config = self.config
        if self._trainer is not None:
            raise InvalidSettingError("this run has already been entered")
        self._check_replaceable()
        try:
            self._trainer = Trainer(
                self._base(),
                rank=config.rank,
                alpha=config.alpha,
                rslora=config.rslora,
                targets=config.gguf_targets,
                dropout=config.dropout,
                seed=config.seed,
                precision=config.effective_precision,
                threads=config.threads,
                n_gpu_layers=config.n_gpu_layers,
            )
        except UnsupportedError as error:
            raise UnsupportedModelError(str(error)) from error
        except ParameterError as error:
            if not str(error).startswith("rank"):
                raise
            raise InvalidRankError(str(error), parameter="rank", value=config.rank) from error
        try:
            if self._adapter is not None:
                self._trainer.load_adapter(self._adapter)
            self._fingerprint = self._trainer.fingerprint.hex()
            if self._resume and self._checkpoint and os.path.exists(self._checkpoint):
                self._load_checkpoint(self._checkpoint)
        except BaseException:
            self._trainer.close()
            raise
        self.status = "running"
        return self

    def _check_replaceable(self) -> None:
        """Refuse to put a checkpoint in place of another kind of file, a model's or data."""
        if self._checkpoint is None or not os.path.exists(self._checkpoint):
            return
        with open(self._checkpoint, "rb") as file:
            head = file.read(4096)
        if head and not self._resume and b"triollama-checkpoint-" not in head:
            raise CheckpointError(
                f"{self._checkpoint} is there and is no checkpoint: it is not replaced; remove it,"
                " or choose another name"
            )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if self.status == "running":  # left early; the state is that of the last whole step
                self.status = "failed" if isinstance(error, Exception) else "stopped"
                self.error = error
                if self._saved_step != self.trainer.step:
                    self.save_checkpoint()
        finally:
            self.trainer.close()
            if self._scratch is not None:
                self._scratch.cleanup()

    def _base(self) -> str:
        """The model file to train on: with ``qlora``, quantised first unless it already is."""
        if self.config.qlora is None:
            return self._model
        _, tensors = read_gguf(self._model)
        matrices = {kind for name, (kind, _) in tensors.items() if name.startswith("blk.")}
        if matrices - {"f32", "f16", "bf16"}:
            return self._model
        self._scratch = tempfile.TemporaryDirectory(prefix="triollama-qlora-")
        target = os.path.join(self._scratch.name, "base.gguf")
        _log.info("quantising %s to %s", self._model, self.config.qlora.ftype)
        quantize(self._model, target, self.config.qlora.ftype, threads=self.config.threads)
        return target

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
            while trainer.step < plan.total_steps and not self._exhausted():
                begun = time.monotonic()
                index = trainer.step
                rate = learning_rate_at(config, index, plan.total_steps)
                result = self._one_step(index, rate)
                if result is None:
                    self.status = "stopped"
                    self.save_checkpoint()
                    return
                loss, accuracy, norm, tokens = result
                self._losses = [*self._losses[:index], loss]
                validation = self._evaluate_if_due()
                if config.checkpoint_every and trainer.step % config.checkpoint_every == 0:
                    self.save_checkpoint()
                now = time.monotonic()
                memory = trainer.memory
                pace = (now - started) / (trainer.step - first)
                yield TrainingStep(
                    epoch=plan.epoch_of(index) + 1,
                    step=trainer.step,
                    total_steps=plan.total_steps,
                    loss=loss,
                    accuracy=accuracy,
                    learning_rate=rate,
                    gradient_norm=norm,
                    tokens=tokens,
                    tokens_per_second=tokens / max(now - begun, 1e-9),
                    memory=memory["adapter"] + memory["activations"] + memory["arena"],
                    seconds_left=pace * (plan.total_steps - trainer.step),
                    validation_loss=validation,
                )
        except GeneratorExit:
            raise
        except DecodeAborted:  # in an evaluation: the steps before it stand
            self.status = "stopped"
            self.save_checkpoint()
            return
        except Exception as error:
            self.status = "failed"
            self.error = error
            raise
        self._stopped_early = trainer.step < plan.total_steps
        if config.patience is not None and self._best_weights is not None:
            trainer.set("weights", self._best_weights)
            self._restored_best = True
        self.status = "completed"
        self.save_checkpoint()

    def _one_step(self, index: int, rate: float) -> tuple[float, float, float, int] | None:
        """Loss, accuracy, gradient norm and tokens of a step; None if the run is to stop."""
        trainer, config = self.trainer, self.config
        rows = self._plan.rows(index)
        n_labels = sum(row.n_labels for row in rows)
        trainer.clear_gradients()
        # The masks of dropout follow from this counter, whatever was interrupted before.
        trainer.restore_counters(index, self._plan.rows_before(index))
        total, hits = 0.0, 0
        for row in rows:
            if self._stopping.is_set():
                trainer.clear_gradients()
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
        loss = total / n_labels
        norm = trainer.gradient_norm()
        if not math.isfinite(loss) or not math.isfinite(norm):
            trainer.clear_gradients()
            raise NonFiniteLossError(
                f"step {index + 1} has a loss of {loss} and a gradient norm of {norm}: it was not"
                f" taken, and the checkpoint before it stands. Lower learning_rate ({rate:g} here)"
                " or max_grad_norm, or look for damaged data",
                step=index + 1,
            )
        if config.max_grad_norm and norm > config.max_grad_norm:
            trainer.scale_gradients(config.max_grad_norm / norm)
        trainer.adamw_step(
            rate,
            beta1=config.beta1,
            beta2=config.beta2,
            epsilon=config.epsilon,
            weight_decay=config.weight_decay,
        )
        return loss, hits / n_labels, norm, sum(len(row.tokens) for row in rows)

    def _evaluate_if_due(self) -> float | None:
        step = self.trainer.step
        every = self.config.evaluate_every
        due = (
            step == self._plan.total_steps or step % every == 0
            if every
            else self._plan.ends_epoch(step)
        )
        if not self.dataset.validation or (step and not due):
            return None
        if self._validation and self._validation[-1][0] == step:
            return None
        loss = evaluate_examples(self.trainer, self.dataset.validation).average_loss
        self._validation.append((step, loss))
        if self._best is None or loss < self._best[1] - self.config.min_delta:
            self._best = (step, loss)
            self._best_weights = self.trainer.get("weights")
        return loss

    def _exhausted(self) -> bool:
        """Whether ``patience`` evaluations have passed without a better one."""
        if self.config.patience is None or self._best is None:
            return False
        since = [step for step, _ in self._validation if step > self._best[0]]
        return len(since) >= self.config.patience

    # ---- results

    def evaluate(self) -> EvaluationMetrics:
        """Metrics of the adapter as it is now, on the validation examples."""
        return evaluate_examples(self.trainer, self.dataset.validation)

    def summary(self) -> TrainingSummary:
        return TrainingSummary(
            id=self.id,
            base_fingerprint=self._fingerprint,
            architecture=self.trainer.architecture,
            config=self.config,
            dataset_hash=self._dataset_hash,
            step=self.trainer.step,
            total_steps=self._plan.total_steps,
            losses=list(self._losses),
            validation=list(self._validation),
            best_step=self._best[0] if self._best else None,
            stopped_early=self._stopped_early,
            restored_best=self._restored_best,
        )

    def save_adapter(self, path: str | PathLike[str]) -> None:
        """The adapter as GGUF, with the run's summary in its metadata. Raises LoRASaveError."""
        text = msgspec.json.encode(self.summary()).decode()
        metadata = {
            "general.name": f"LoRA of {self.trainer.architecture}, rank {self.config.rank}",
            "triollama.base_fingerprint": self._fingerprint,
            "triollama.training": text,
        }
        try:
            self.trainer.save_adapter(path, metadata)
        except OSError as error:
            raise LoRASaveError(error.errno, f"cannot write the adapter {path}: {error}") from error

    # ---- checkpoints

    def save_checkpoint(self) -> None:
        """All that resuming needs, atomically; nothing if the run has no checkpoint path.

        Raises LoRASaveError; the checkpoint before then stands.
        """
        if self._checkpoint is None:
            return
        parts = ("weights", "first_moments", "second_moments")
        tensors = {part: self.trainer.get(part) for part in parts}
        if self._best_weights is not None:
            tensors["best_weights"] = self._best_weights
        summary = msgspec.json.encode(self.summary()).decode()
        best_loss = "" if self._best is None else repr(self._best[1])
        metadata = {
            "format": "triollama-checkpoint-1",
            "summary": summary,
            "best_loss": best_loss,
            "sha256": _checksum(tensors, summary, best_loss),
        }
        try:
            write_tensors(self._checkpoint, tensors, metadata)
        except OSError as error:
            raise LoRASaveError(
                error.errno, f"cannot write the checkpoint {self._checkpoint}: {error}"
            ) from error
        self._saved_step = self.trainer.step

    def _load_checkpoint(self, path: str) -> None:
        try:
            tensors, metadata = read_tensors(path)
            if metadata.get("format") != "triollama-checkpoint-1":
                raise CheckpointError(f"{path} is no checkpoint of triollama")
            best_loss = metadata["best_loss"]
            if _checksum(tensors, metadata["summary"], best_loss) != metadata["sha256"]:
                raise CheckpointError(f"the checkpoint {path} is damaged: its checksum is wrong")
            summary = msgspec.json.decode(metadata["summary"], type=TrainingSummary)
            best = None
            if summary.best_step is not None:
                best = (summary.best_step, float(best_loss))
        except (TensorFileError, msgspec.MsgspecError, KeyError, ValueError) as error:
            raise CheckpointError(f"the checkpoint {path} cannot be read: {error}") from error
        self._check_same(path, summary)
        trainer = self.trainer
        parts = ["weights", "first_moments", "second_moments"]
        for part in (*parts, "best_weights") if best else parts:
            found = tensors.get(part)
            if found is None or found.shape != (trainer.n_parameters,) or found.dtype != np.float32:
                raise CheckpointError(f"the checkpoint {path} does not hold this adapter's {part}")
        steps = (len(summary.losses), *(step for step, _ in summary.validation))
        if not 0 <= summary.step <= self._plan.total_steps or any(
            not 0 <= step <= summary.step for step in (*steps, *(best or (0,))[:1])
        ):
            raise CheckpointError(
                f"the checkpoint {path} says it is of step {summary.step}, with"
                f" {len(summary.losses)} losses; this run has {self._plan.total_steps} steps"
            )
        for part in parts:
            trainer.set(part, tensors[part])
        trainer.restore_counters(summary.step, self._plan.rows_before(summary.step))
        self.id = summary.id
        self._losses = list(summary.losses)
        self._validation = [(step, loss) for step, loss in summary.validation]
        if best is not None:
            self._best = best
            self._best_weights = tensors["best_weights"]
        self._saved_step = summary.step

    def _check_same(self, path: str, summary: TrainingSummary) -> None:
        if summary.base_fingerprint != self._fingerprint:
            raise CheckpointError(f"the checkpoint {path} belongs to another base model")
        if summary.dataset_hash != self._dataset_hash:
            raise CheckpointError(f"the checkpoint {path} belongs to other training data")
        changed = [
            name
            for name in TrainingConfig.__struct_fields__
            if name not in _FREE_TO_CHANGE
            and getattr(summary.config, name) != getattr(self.config, name)
        ]
        if changed:
            raise CheckpointError(
                f"the checkpoint {path} was made with other settings: {', '.join(changed)}"
            )


def _checksum(tensors: Mapping[str, np.ndarray], *texts: str) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].tobytes())
    for text in texts:
        digest.update(text.encode())
    return digest.hexdigest()


def train(
    model: str | PathLike[str],
    dataset: TrainingDataset,
    config: TrainingConfig | None = None,
    *,
    checkpoint: str | PathLike[str] | None = None,
    resume: bool = False,
    adapter: str | PathLike[str] | None = None,
) -> TrainingRun:
    """A run that trains an adapter on the model file ``model``; see :class:`TrainingRun`.

    checkpoint: where to write checkpoints; without it there are none. resume: go on from that
    file, if it exists; CheckpointError if it belongs to another model, configuration or dataset.
    adapter: start from these weights.
    """
    config = config or TrainingConfig()
    return TrainingRun(
        model, dataset, config, checkpoint=checkpoint, resume=resume, adapter=adapter
    )
