"""What can be asked of a tuner, and what it answers with: ``Tuning`` and its records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from os import PathLike
from typing import Any, Protocol, runtime_checkable

import msgspec

from ..checks import shown
from .config import TrainingConfig
from .dataset import TrainingDataset
from .encode import Example
from .errors import InvalidSettingError
from .evaluate import EvaluationMetrics
from .export import AdapterCompatibility
from .session import Status

__all__ = [
    "ENDED",
    "AppliedAdapter",
    "Comparison",
    "TrainingMetrics",
    "TrainingSession",
    "Tuning",
    "chats_of",
]

ENDED = ("eos", "stop")
"""Why an answer was over that the model ended by itself."""


class AppliedAdapter(msgspec.Struct, frozen=True, kw_only=True):
    """An adapter in use: its file, its scale, when it was applied, what its file says. ``path`` is
    empty for what was trained here and is in no file."""

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


def chats_of(prompts: Sequence[Any]) -> list[Sequence[Mapping[str, Any]]]:
    """What is to be compared, as chats: a prompt is what a user says, or a chat's messages so far.
    Raises InvalidSettingError."""
    if isinstance(prompts, (str, bytes)) or not isinstance(prompts, Iterable):
        raise InvalidSettingError(
            f"prompts must be a list of prompts, not {shown(prompts)}",
            parameter="prompts",
            value=prompts,
        )
    chats: list[Sequence[Mapping[str, Any]]] = []
    for prompt in prompts:
        chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        last = chat[-1] if isinstance(chat, (list, tuple)) and chat else None
        if not isinstance(last, Mapping) or not isinstance(last.get("content"), str):
            raise InvalidSettingError(
                f"a prompt is a text, or a list of messages, and not {shown(prompt)}",
                parameter="prompts",
                value=prompts,
            )
        chats.append(chat)
    return chats


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
