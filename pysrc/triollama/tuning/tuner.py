"""``Tuner``: one model that is served, adapted and trained; and ``Tuning``, the protocol of it.

The operations of the Swift API's tuning protocol under Python names, blocking. Training opens the
model file a second time, unrepacked, so what is served goes on untouched until an adapter is
applied.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from os import PathLike
from types import TracebackType
from typing import Any, Protocol, runtime_checkable

import msgspec
import numpy as np

from .._engine import Adapter, Batch, Context, Model, Trainer, set_adapters
from ..chat import ChatTemplate, ChatTokenizer, TurnEnd, template_for_model
from ..errors import AdapterError, ParameterError
from .config import TrainingConfig
from .dataset import TrainingDataset, prepare_training_data
from .encode import Example
from .errors import (
    AdapterApplicationError,
    BaseModelNotLoadedError,
    ContextNotInitializedError,
    IncompatibleAdapterError,
    InvalidSettingError,
    ModelExportError,
    ModelNotLoadedError,
    NoAdapterError,
    SessionNotFoundError,
    TokenizerNotInitializedError,
)
from .evaluate import EvaluationMetrics, evaluate_examples
from .export import AdapterCompatibility, check_adapter, save_merged, save_peft
from .session import Status, TrainingRun, TrainingStep, TrainingSummary, train

__all__ = ["AppliedAdapter", "Comparison", "TrainingMetrics", "TrainingSession", "Tuner", "Tuning"]

_log = logging.getLogger("triollama.tuning")


class AppliedAdapter(msgspec.Struct, frozen=True, kw_only=True):
    """An adapter in use: its file, its scale, when it was applied, what its file says."""

    path: str
    scale: float
    applied_at: datetime
    metadata: dict[str, str]


class TrainingSession(msgspec.Struct, frozen=True, kw_only=True):
    """A training run as a record. ``error`` is why it failed."""

    id: str
    config: TrainingConfig
    start_time: datetime
    end_time: datetime | None
    status: Status
    error: str | None = None


class TrainingMetrics(msgspec.Struct, frozen=True, kw_only=True):
    """Where the current run is."""

    current_epoch: int
    current_step: int
    training_loss: float
    validation_loss: float | None
    learning_rate: float


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """A prompt's answer by the base model and by the adapted one, both greedy.

    ``prompt``: the last message. ``base_ended``, ``tuned_ended``: whether the model ended its turn
    by itself.
    """

    prompt: str
    base: str
    tuned: str
    base_ended: bool = False
    tuned_ended: bool = False


@runtime_checkable
class Tuning(Protocol):
    """What can be asked of a tuner; a fake of the same shape is one, too.

    The Swift protocol's operations: loadModel, applyLoRA, removeLoRA, prepareTrainingData,
    startTrainingSession, stopTrainingSession, getCurrentTrainingSession, getTrainingMetrics,
    evaluateModel, validateLoRACompatibility, setLoRAFallbackMode, saveLoRAAdapter,
    saveFineTunedModel and exportModel.
    """

    def load_model(self, path: str | PathLike[str]) -> None: ...
    def apply_lora(
        self, path: str | PathLike[str], scale: float = 1.0
    ) -> AppliedAdapter | None: ...
    def remove_lora(self, path: str | PathLike[str] | None = None) -> None: ...
    def prepare_training_data(
        self, conversations: Iterable[Any], validation_split: float = 0.1
    ) -> TrainingDataset: ...
    def start_training_session(
        self, dataset: TrainingDataset, config: TrainingConfig
    ) -> TrainingSession: ...
    def stop_training_session(self) -> None: ...
    def current_training_session(self) -> TrainingSession | None: ...
    def training_metrics(self) -> TrainingMetrics | None: ...
    def evaluate_model(self, examples: Sequence[Example]) -> EvaluationMetrics: ...
    def validate_lora_compatibility(self, path: str | PathLike[str]) -> AdapterCompatibility: ...
    def set_lora_fallback_mode(self, enabled: bool) -> None: ...
    def save_lora_adapter(self, path: str | PathLike[str]) -> None: ...
    def save_fine_tuned_model(self, path: str | PathLike[str]) -> None: ...
    def export_model(self, path: str | PathLike[str], format: str = "gguf") -> None: ...


class Tuner:
    """A model to serve, adapt and train. Close it, or use it in a ``with`` statement.

    path: the model's GGUF file; or later, by ``load_model``. template: for chats; None is the
    model's own. n_ctx, threads: of the context that serves ``compare`` and ``logits``.

    One thread at a time, except for ``stop_training_session``, ``current_training_session`` and
    ``training_metrics``.
    """

    def __init__(
        self,
        path: str | PathLike[str] | None = None,
        *,
        template: str | ChatTemplate | None = None,
        n_ctx: int = 2048,
        threads: int | None = None,
    ) -> None:
        self._template = template
        self._n_ctx = n_ctx
        self._threads = threads
        self._model: Model | None = None
        self._context: Context | None = None
        self._applied: dict[str, tuple[Adapter, AppliedAdapter]] = {}
        self._contents: dict[Adapter, bytes] = {}
        self._fallback = False
        self._run: TrainingRun | None = None
        self._session: TrainingSession | None = None
        self._last_step: TrainingStep | None = None
        self._lock = threading.Lock()
        if path is not None:
            self.load_model(path)

    # ---- the model

    def load_model(self, path: str | PathLike[str]) -> None:
        """Load a model, in place of one loaded before. Raises what ``Model`` raises."""
        model = Model(path)
        try:
            context = Context(model, n_ctx=self._n_ctx, n_threads=self._threads)
        except BaseException:
            model.close()
            raise
        self.close()
        self._model, self._context = model, context

    def close(self) -> None:
        """Free adapters, context and model, and the trained weights. Idempotent."""
        if self._run is not None:
            self._run.__exit__(None, None, None)
            self._run = None
        if self._context is not None:
            set_adapters(self._context, [])
            for adapter, _ in self._applied.values():
                adapter.close()
            self._applied.clear()
            self._contents.clear()
            self._context.close()
            self._context = None
        if self._model is not None:
            self._model.close()
            self._model = None

    def __enter__(self) -> Tuner:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def model(self) -> Model:
        """The model that is served; ModelNotLoadedError if there is none."""
        if self._model is None:
            raise ModelNotLoadedError("no model is loaded; call load_model first")
        return self._model

    @property
    def _serving(self) -> Context:
        if self._context is None:
            raise ContextNotInitializedError("no model is loaded; call load_model first")
        return self._context

    # ---- adapters

    @property
    def adapters(self) -> tuple[AppliedAdapter, ...]:
        """The adapters applied, in the order of their application."""
        return tuple(applied for _, applied in self._applied.values())

    def validate_lora_compatibility(self, path: str | PathLike[str]) -> AdapterCompatibility:
        """Whether the adapter fits, and why not; see :func:`check_adapter`."""
        return check_adapter(path, self.model.path, fingerprint=self.model.fingerprint)

    def set_lora_fallback_mode(self, enabled: bool) -> None:
        """Whether ``apply_lora`` goes on without an adapter that does not fit, with a warning."""
        self._fallback = enabled

    def apply_lora(self, path: str | PathLike[str], scale: float = 1.0) -> AppliedAdapter | None:
        """Add an adapter to those applied, or give one applied already another scale. A file that
        holds something else by now takes the place of what was loaded from it before.

        Returns None where fallback mode went on without it. What the context remembered was
        computed otherwise, so it is forgotten. Raises AdapterFileNotFoundError,
        IncompatibleAdapterError, AdapterApplicationError; the set is then as before.
        """
        if not isinstance(scale, (int, float)) or not np.isfinite(scale):
            raise InvalidSettingError(
                f"scale must be a finite number, not {scale!r}", parameter="scale", value=scale
            )
        context = self._serving
        name = os.path.realpath(path)
        found = self.validate_lora_compatibility(path)
        if not found.is_compatible:
            reason = f"the adapter {path} does not fit: {'; '.join(found.problems)}"
            if self._fallback:
                _log.warning("%s; going on without it", reason)
                return None
            raise IncompatibleAdapterError(reason, path=os.fspath(path))
        for warning in found.warnings:
            _log.info("adapter %s: %s", path, warning)
        old = self._applied.get(name)
        try:
            with open(path, "rb") as file:
                contents = hashlib.file_digest(file, "sha256").digest()
            known = old is not None and self._contents[old[0]] == contents
            adapter = old[0] if old and known else Adapter(self.model, path)
        except (AdapterError, OSError) as error:
            raise AdapterApplicationError(str(error), path=os.fspath(path)) from error
        applied = AppliedAdapter(
            path=name,
            scale=float(scale),
            applied_at=datetime.now(UTC),
            metadata=adapter.metadata,
        )
        wanted = {**self._applied, name: (adapter, applied)}
        try:
            self._apply(wanted)
        except ParameterError as error:
            if not known:
                adapter.close()
            raise AdapterApplicationError(str(error), path=os.fspath(path)) from error
        self._applied = wanted
        self._contents[adapter] = contents
        if old and not known:
            del self._contents[old[0]]
            old[0].close()
        context.memory.clear()
        return applied

    def remove_lora(self, path: str | PathLike[str] | None = None) -> None:
        """Remove one adapter, or all. Raises NoAdapterError if there is none to remove."""
        self._serving  # noqa: B018  # raises if nothing is loaded
        names = list(self._applied) if path is None else [os.path.realpath(path)]
        if not names or any(name not in self._applied for name in names):
            raise NoAdapterError(
                "no adapter is applied" if path is None else f"{path} is not applied"
            )
        self._apply({n: pair for n, pair in self._applied.items() if n not in names})
        for name in names:
            adapter, _ = self._applied.pop(name)
            del self._contents[adapter]
            adapter.close()
        self._serving.memory.clear()

    def _apply(self, wanted: Mapping[str, tuple[Adapter, AppliedAdapter]]) -> None:
        pairs = [(adapter, applied.scale) for adapter, applied in wanted.values()]
        set_adapters(self._serving, pairs)

    # ---- data and training

    def prepare_training_data(
        self,
        conversations: Iterable[Any] | str | PathLike[str],
        validation_split: float = 0.1,
        *,
        seed: int = 42,
        max_length: int = 512,
        truncation: str = "error",
        only_last: bool = False,
    ) -> TrainingDataset:
        """See :func:`triollama.tuning.prepare_training_data`; chats by the model's template.

        Raises TokenizerNotInitializedError before a model is loaded.
        """
        if self._model is None:
            raise TokenizerNotInitializedError("no model is loaded; call load_model first")
        return prepare_training_data(
            conversations,
            vocab=self.model.vocab,
            template=template_for_model(self.model, self._template),
            validation_split=validation_split,
            seed=seed,
            max_length=max_length,
            truncation=truncation,
            only_last=only_last,
        )

    def start_training_session(
        self,
        dataset: TrainingDataset,
        config: TrainingConfig | None = None,
        *,
        checkpoint: str | PathLike[str] | None = None,
        resume: bool = False,
        on_step: Callable[[TrainingStep], None] | None = None,
    ) -> TrainingSession:
        """Train to the end, calling ``on_step`` after each step; then the trained adapter can be
        evaluated, saved, merged and applied. Raises what the run raises, with the session failed;
        BaseModelNotLoadedError before a model is loaded.
        """
        if self._model is None:
            raise BaseModelNotLoadedError("no model is loaded; call load_model first")
        model = self._model
        if self._run is not None:
            self._run.__exit__(None, None, None)
            self._run = None
        run = train(model.path, dataset, config, checkpoint=checkpoint, resume=resume)
        with self._lock:
            self._last_step = None
            self._run = run
        self._session = TrainingSession(
            id=run.id,
            config=run.config,
            start_time=datetime.now(UTC),
            end_time=None,
            status="pending",
        )
        try:
            run.__enter__()
            self._session = msgspec.structs.replace(self._session, id=run.id, status="running")
            for step in run:
                with self._lock:
                    self._last_step = step
                if on_step is not None:
                    on_step(step)
        except BaseException as error:
            self._run = None
            if run.status != "pending":
                run.__exit__(type(error), error, error.__traceback__)
            self._finish("failed" if isinstance(error, Exception) else "stopped", str(error))
            raise
        self._finish(run.status, None)
        return self._session

    def _finish(self, status: Status, error: str | None) -> None:
        assert self._session is not None
        self._session = msgspec.structs.replace(
            self._session, status=status, end_time=datetime.now(UTC), error=error
        )

    def stop_training_session(self) -> None:
        """Make the running session end before its next row, with a checkpoint. From any thread.

        Raises SessionNotFoundError if none runs.
        """
        run, session = self._run, self._session
        if run is None or session is None or session.status not in ("pending", "running"):
            raise SessionNotFoundError("no training session is running")
        run.stop()

    def current_training_session(self) -> TrainingSession | None:
        """The latest session, running or not; None before the first."""
        return self._session

    def training_metrics(self) -> TrainingMetrics | None:
        """Where the latest session is; None before its first step."""
        with self._lock:
            step = self._last_step
        if step is None:
            return None
        return TrainingMetrics(
            current_epoch=step.epoch,
            current_step=step.step,
            training_loss=step.loss,
            validation_loss=step.validation_loss,
            learning_rate=step.learning_rate,
        )

    @property
    def _trained(self) -> TrainingRun:
        if self._run is None or self._run.status not in ("completed", "stopped"):
            raise NoAdapterError("no adapter has been trained in this tuner")
        return self._run

    # ---- results

    def training_summary(self) -> TrainingSummary:
        """What is known of the run that has ended. Raises NoAdapterError before one has."""
        return self._trained.summary()

    def evaluate_model(self, examples: Sequence[Example]) -> EvaluationMetrics:
        """Metrics on the examples: with the adapter trained here, else of the base model."""
        model = self.model
        if self._run is not None and self._run.status in ("completed", "stopped"):
            return evaluate_examples(self._run.trainer, examples)
        with Trainer(model.path, rank=1, threads=self._threads) as trainer:
            return evaluate_examples(trainer, examples)

    def save_lora_adapter(self, path: str | PathLike[str]) -> None:
        """The trained adapter as GGUF. Raises NoAdapterError, LoRASaveError."""
        self._trained.save_adapter(path)

    def save_fine_tuned_model(self, path: str | PathLike[str], *, ftype: str = "auto") -> None:
        """The whole model with the trained adapter merged in; see :func:`save_merged`."""
        save_merged(self._trained.trainer, path, ftype=ftype)

    def export_model(self, path: str | PathLike[str], format: str = "gguf") -> None:
        """``"gguf"``: the merged model; ``"gguf-adapter"``: the adapter; ``"peft"``: a folder for
        PEFT. Raises ModelExportError for another format."""
        if format == "gguf":
            self.save_fine_tuned_model(path)
        elif format == "gguf-adapter":
            self.save_lora_adapter(path)
        elif format == "peft":
            save_peft(self._trained.trainer, path)
        else:
            raise ModelExportError(
                f"cannot export to {format!r}; choose gguf, gguf-adapter or peft"
            )

    def apply_trained(self, scale: float = 1.0) -> AppliedAdapter:
        """Serve with the adapter just trained: hot-swapped in, nothing is reloaded."""
        with tempfile.TemporaryDirectory(prefix="triollama-adapter-") as folder:
            path = os.path.join(folder, "trained.gguf")
            self.save_lora_adapter(path)
            applied = self.apply_lora(path, scale)
        if applied is None:
            raise AdapterApplicationError("the trained adapter does not fit the model served")
        return applied

    def logits(self, tokens: Sequence[int]) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Float32 [n_vocab]: the logits after the last of ``tokens``, by base and adapters."""
        context = self._serving
        context.memory.clear()
        self._decode(context, tokens, 0)
        return context.logits(copy=True)

    @staticmethod
    def _decode(context: Context, tokens: Sequence[int], position: int) -> None:
        for at in range(0, len(tokens), 256):
            part = tokens[at : at + 256]
            batch = Batch(len(part))
            for i, token in enumerate(part):
                last = at + i + 1 == len(tokens)
                batch.add(int(token), position + at + i, 0, last)
            context.decode(batch)

    def compare(
        self, prompts: Sequence[str | Sequence[Mapping[str, Any]]], *, max_tokens: int = 64
    ) -> list[Comparison]:
        """Each prompt answered greedily by the base model and with the adapters applied.

        A prompt is what a user says, or a chat's messages so far. Raises NoAdapterError if no
        adapter is applied.
        """
        context = self._serving
        if not self._applied:
            raise NoAdapterError("no adapter is applied; compare would show the base twice")
        template = template_for_model(self.model, self._template)
        tokenizer = ChatTokenizer(self.model.vocab)
        end = tokenizer.turn_end(template)
        messages = [
            [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            for prompt in prompts
        ]
        chats = [tokenizer.encode(template.render(chat)).tokens for chat in messages]
        try:
            self._apply({})
            base = [self._greedy(context, tokens, end, max_tokens) for tokens in chats]
            self._apply(self._applied)
            tuned = [self._greedy(context, tokens, end, max_tokens) for tokens in chats]
        finally:
            self._apply(self._applied)
            context.memory.clear()
        return [
            Comparison(
                prompt=str(chat[-1]["content"]),
                base=a[0],
                tuned=b[0],
                base_ended=a[1],
                tuned_ended=b[1],
            )
            for chat, a, b in zip(messages, base, tuned, strict=True)
        ]

    def _greedy(
        self, context: Context, tokens: Sequence[int], end: TurnEnd, max_tokens: int
    ) -> tuple[str, bool]:
        """The answer, and whether it ended by itself."""
        vocab = self.model.vocab
        context.memory.clear()
        self._decode(context, tokens, 0)
        out: list[int] = []
        text = ""
        room = min(max_tokens, context.n_ctx - len(tokens))
        while len(out) < room:
            token = int(context.logits(copy=True).argmax())
            if vocab.is_eog(token) or token in end.tokens:
                return text, True
            out.append(token)
            text = vocab.detokenize(out)
            stop = min((text.find(one) for one in end.stop if one in text), default=-1)
            if stop >= 0:
                return text[:stop], True
            self._decode(context, [token], len(tokens) + len(out) - 1)
        return text, False
