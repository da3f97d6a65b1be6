"""``Tuner``: one model that is served, adapted and trained, blocking.

It serves with a :class:`triollama.sync.Llama`. Training opens the model file a second time,
unrepacked, so what is served goes on untouched until an adapter is applied.
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
from typing import Any, NamedTuple

import msgspec
import numpy as np

from .._engine import Adapter, Batch, Model, Trainer, set_adapters
from ..chat import ChatTemplate, ChatTokenizer, template_for_model
from ..checks import check_kind, check_path, shown
from ..errors import AdapterError, ParameterError
from ..params import GenerationParams
from ..sync import Llama
from .config import TrainingConfig
from .dataset import TrainingDataset
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
from .evaluate import EvaluationMetrics, Progress, evaluate_examples
from .export import AdapterCompatibility, check_adapter, save_merged, save_peft
from .prepare import prepare_training_data
from .protocol import (
    ENDED,
    AppliedAdapter,
    Comparison,
    TrainingMetrics,
    TrainingSession,
    chats_of,
)
from .records import TrainingStep, TrainingSummary
from .session import Status, TrainingRun, train

__all__ = ["Tuner"]

_log = logging.getLogger("triollama.tuning")


class _Loaded(NamedTuple):
    adapter: Adapter
    contents: bytes
    applied: AppliedAdapter


class Tuner:
    """A model to serve, adapt and train. Close it, or use it in a ``with`` statement.

    path: the model's GGUF file; None is the embedded default model. template: for chats; None is
    the model's own. n_ctx, threads: of the context that serves ``compare`` and ``logits``.

    One thread at a time, except for ``stop_training_session``, ``current_training_session`` and
    ``training_metrics``. Raises what ``triollama.sync.Llama`` raises.
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
        self._llama: Llama | None = None
        self._loaded: dict[str, _Loaded] = {}
        self._fallback = False
        self._run: TrainingRun | None = None
        self._session: TrainingSession | None = None
        self._last_step: TrainingStep | None = None
        self._lock = threading.Lock()
        self.load_model(path)

    # ---- the model

    def load_model(self, path: str | PathLike[str] | None = None) -> None:
        """Load a model, in place of the one before; None is the default model."""
        # Every prompt whole: the base and the adapted model are then asked alike.
        llama = Llama(path, n_ctx=self._n_ctx, threads=self._threads, reuse=False)
        self.close()
        self._llama = llama

    def close(self) -> None:
        """Free adapters, context and model, and the trained weights. Idempotent."""
        self._drop_run()
        if self._llama is not None:
            set_adapters(self._llama.context, [])
            for loaded in self._loaded.values():
                loaded.adapter.close()
            self._loaded.clear()
            self._llama.close()
            self._llama = None

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
        return self._serving(ModelNotLoadedError).model

    def _serving(self, missing: type[ModelNotLoadedError] = ContextNotInitializedError) -> Llama:
        if self._llama is None:
            raise missing("no model is loaded; call load_model first")
        return self._llama

    # ---- adapters

    @property
    def adapters(self) -> tuple[AppliedAdapter, ...]:
        """The adapters applied, in the order of their application."""
        return tuple(loaded.applied for loaded in self._loaded.values())

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
        path = check_path("path", path)
        return self._apply_file(path, os.path.realpath(path), scale)

    def _apply_file(
        self, path: str | PathLike[str], name: str, scale: float
    ) -> AppliedAdapter | None:
        if not isinstance(scale, (int, float)) or not np.isfinite(scale):
            raise InvalidSettingError(
                f"scale must be a finite number, not {shown(scale)}", parameter="scale", value=scale
            )
        self._serving()
        found = self.validate_lora_compatibility(path)
        if not found.is_compatible:
            reason = f"the adapter {path} does not fit: {'; '.join(found.problems)}"
            if self._fallback:
                _log.warning("%s; going on without it", reason)
                return None
            raise IncompatibleAdapterError(reason, path=os.fspath(path))
        if found.invocation:
            raise AdapterApplicationError(
                f"the adapter {path} takes part from its invocation on: triollama.open_llama serves"
                " it so",
                path=os.fspath(path),
            )
        for warning in found.warnings:
            _log.info("adapter %s: %s", path, warning)
        old = self._loaded.get(name)
        try:
            with open(path, "rb") as file:
                contents = hashlib.file_digest(file, "sha256").digest()
            known = old is not None and old.contents == contents
            adapter = old.adapter if old and known else Adapter(self.model, path)
        except (AdapterError, OSError) as error:
            raise AdapterApplicationError(str(error), path=os.fspath(path)) from error
        applied = AppliedAdapter(
            path=name,
            scale=float(scale),
            applied_at=datetime.now(UTC),
            metadata=adapter.metadata,
        )
        try:
            self._set({**self._loaded, name: _Loaded(adapter, contents, applied)})
        except ParameterError as error:
            if not known:
                adapter.close()
            raise AdapterApplicationError(str(error), path=os.fspath(path)) from error
        if old and not known:
            old.adapter.close()
        return applied

    def remove_lora(self, path: str | PathLike[str] | None = None) -> None:
        """Remove one adapter, by its ``path``, or all. Raises NoAdapterError if there is none to
        remove."""
        self._serving()
        names = list(self._loaded)
        if path is not None:
            wanted = check_path("path", path)
            names = [os.path.realpath(wanted) if wanted else ""]
        if not names or any(name not in self._loaded for name in names):
            raise NoAdapterError(
                "no adapter is applied" if path is None else f"{path} is not applied"
            )
        removed = [self._loaded[name] for name in names]
        self._set({name: one for name, one in self._loaded.items() if name not in names})
        for loaded in removed:
            loaded.adapter.close()

    def _set(self, wanted: dict[str, _Loaded]) -> None:
        self._put(wanted)
        self._loaded = wanted

    def _put(self, wanted: Mapping[str, _Loaded]) -> None:
        """Serve with these; what the context remembers was computed with others."""
        context = self._serving().context
        set_adapters(context, [(one.adapter, one.applied.scale) for one in wanted.values()])
        context.memory.clear()

    # ---- data and training

    def prepare_training_data(
        self,
        conversations: Iterable[Any] | str | PathLike[str],
        validation_split: float = 0.1,
        **options: Any,
    ) -> TrainingDataset:
        """See :func:`triollama.tuning.prepare_training_data` for data and options; chats by the
        model's template.

        Raises TokenizerNotInitializedError before a model is loaded.
        """
        model = self._serving(TokenizerNotInitializedError).model
        return prepare_training_data(
            conversations,
            vocab=model.vocab,
            template=template_for_model(model, self._template),
            validation_split=validation_split,
            **options,
        )

    def start_training_session(
        self,
        dataset: TrainingDataset,
        config: TrainingConfig | None = None,
        *,
        checkpoint: str | PathLike[str] | None = None,
        resume: bool = False,
        on_step: Callable[[TrainingStep], None] | None = None,
        progress: Progress | None = None,
    ) -> TrainingSession:
        """Train to the end, calling ``on_step`` after each step; then the trained adapter can be
        evaluated, saved, merged and applied. What was trained before is kept until the run begins.

        Raises what the run raises, with the session failed; the weights of its last whole step are
        then there to be saved all the same. BaseModelNotLoadedError before a model is loaded. The
        other arguments are as for :func:`train`.
        """
        model = self._serving(BaseModelNotLoadedError).model
        check_kind("on_step", on_step, Callable, type(None))
        run = train(
            model.path, dataset, config, checkpoint=checkpoint, resume=resume, progress=progress
        )
        session = TrainingSession(
            id=run.id,
            config=run.config,
            start_time=datetime.now(UTC),
            end_time=None,
            status="pending",
        )
        try:
            run.__enter__()
        except BaseException as error:
            self._session = session
            self._finish("failed" if isinstance(error, Exception) else "stopped", str(error))
            raise
        self._drop_run()
        with self._lock:
            self._last_step = None
            self._run = run
        self._session = msgspec.structs.replace(session, id=run.id, status="running")
        try:
            for step in run:
                with self._lock:
                    self._last_step = step
                if on_step is not None:
                    on_step(step)
            run.exit_if_terminated()
        except BaseException as error:
            try:
                run.leave(error)
            finally:
                self._finish("failed" if isinstance(error, Exception) else "stopped", str(error))
            raise
        self._finish(run.status, None)
        return self._session

    def _drop_run(self) -> None:
        if self._run is not None:
            run, self._run = self._run, None
            run.__exit__(None, None, None)

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
        run = self._run
        if run is None or run.status not in ("completed", "stopped", "failed"):
            raise NoAdapterError("no adapter has been trained in this tuner")
        if run.status == "failed" and not run.trainer.step:
            raise NoAdapterError("the run failed before its first step")
        return run

    # ---- results

    def training_summary(self) -> TrainingSummary:
        """What is known of the run that has ended. Raises NoAdapterError before one has."""
        return self._trained.summary()

    def evaluate_model(
        self, examples: Sequence[Example], *, progress: Progress | None = None
    ) -> EvaluationMetrics:
        """Metrics on the examples: with the adapter trained here, else of the base model. progress:
        see :func:`evaluate_examples`."""
        model = self.model
        try:
            trainer = self._trained.trainer
        except NoAdapterError:
            with Trainer(model.path, rank=1, threads=self._threads) as base:
                return evaluate_examples(base, examples, progress=progress)
        return evaluate_examples(trainer, examples, progress=progress)

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
                f"cannot export to {shown(format)}; choose gguf, gguf-adapter or peft"
            )

    def apply_trained(self, scale: float = 1.0) -> AppliedAdapter:
        """Serve with the adapter just trained, in place of one trained before: hot-swapped in,
        nothing is reloaded. Its ``path`` is empty."""
        with tempfile.TemporaryDirectory(prefix="triollama-adapter-") as folder:
            path = os.path.join(folder, "trained.gguf")
            self.save_lora_adapter(path)
            applied = self._apply_file(path, "", scale)
        if applied is None:
            raise AdapterApplicationError("the trained adapter does not fit the model served")
        return applied

    def logits(self, tokens: Sequence[int]) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Float32 [n_vocab]: the logits after the last of ``tokens``, by base and adapters."""
        context = self._serving().context
        check_kind("tokens", tokens, list, tuple)
        context.memory.clear()
        for at in range(0, len(tokens), 256):
            part = tokens[at : at + 256]
            batch = Batch(len(part))
            for i, token in enumerate(part):
                batch.add(token, at + i, 0, at + i + 1 == len(tokens))
            context.decode(batch)
        return context.logits(copy=True)

    def compare(
        self, prompts: Sequence[str | Sequence[Mapping[str, Any]]], *, max_tokens: int = 64
    ) -> list[Comparison]:
        """Each prompt answered greedily by the base model and with the adapters applied.

        A prompt is what a user says, or a chat's messages so far. Raises NoAdapterError if no
        adapter is applied.
        """
        llama = self._serving()
        if not self._loaded:
            raise NoAdapterError("no adapter is applied; compare would show the base twice")
        template = template_for_model(llama.model, self._template)
        tokenizer = ChatTokenizer(llama.vocab)
        end = tokenizer.turn_end(template)
        greedy = GenerationParams(
            temperature=0.0,
            repeat_penalty=1.0,
            max_tokens=max_tokens,
            stop=end.stop,
            stop_tokens=end.tokens,
        )
        chats = chats_of(prompts)
        tokens = [tokenizer.encode(template.render(chat)).tokens for chat in chats]
        try:
            self._put({})
            base = [llama.generate(prompt, greedy) for prompt in tokens]
        finally:
            self._put(self._loaded)
        tuned = [llama.generate(prompt, greedy) for prompt in tokens]
        return [
            Comparison(
                prompt=str(chat[-1]["content"]),
                base=a.text,
                tuned=b.text,
                base_ended=a.finish_reason in ENDED,
                tuned_ended=b.finish_reason in ENDED,
            )
            for chat, a, b in zip(chats, base, tuned, strict=True)
        ]
