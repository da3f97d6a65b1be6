"""A tuner of one's own: it keeps the protocol, and what is written for the protocol takes both."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from os import PathLike, fspath
from typing import Any

from triollama.tuning import (
    AdapterCompatibility,
    AppliedAdapter,
    EvaluationMetrics,
    Example,
    NoAdapterError,
    TrainingConfig,
    TrainingDataset,
    TrainingMetrics,
    TrainingSession,
    Tuner,
    Tuning,
)


class FakeTuner:
    """Trains nothing, and remembers what it was asked."""

    def __init__(self) -> None:
        self.applied: dict[str, AppliedAdapter] = {}
        self.session: TrainingSession | None = None

    def load_model(self, path: str | PathLike[str]) -> None:
        self.applied.clear()

    def apply_lora(self, path: str | PathLike[str], scale: float = 1.0) -> AppliedAdapter | None:
        name = fspath(path)
        self.applied[name] = AppliedAdapter(
            path=name, scale=scale, applied_at=datetime.now(UTC), metadata={}
        )
        return self.applied[name]

    def remove_lora(self, path: str | PathLike[str] | None = None) -> None:
        if not self.applied:
            raise NoAdapterError("nothing is applied")
        self.applied.clear()

    def prepare_training_data(
        self, conversations: Iterable[Any], validation_split: float = 0.1
    ) -> TrainingDataset:
        raise NotImplementedError

    def start_training_session(
        self, dataset: TrainingDataset, config: TrainingConfig
    ) -> TrainingSession:
        now = datetime.now(UTC)
        self.session = TrainingSession(
            id="fake", config=config, start_time=now, end_time=now, status="completed"
        )
        return self.session

    def stop_training_session(self) -> None: ...

    def current_training_session(self) -> TrainingSession | None:
        return self.session

    def training_metrics(self) -> TrainingMetrics | None:
        return None

    def evaluate_model(self, examples: Sequence[Example]) -> EvaluationMetrics:
        return EvaluationMetrics(
            perplexity=1.0, average_loss=0.0, accuracy=1.0, total_examples=0, total_tokens=0
        )

    def validate_lora_compatibility(self, path: str | PathLike[str]) -> AdapterCompatibility:
        return AdapterCompatibility(is_compatible=True, problems=(), warnings=())

    def set_lora_fallback_mode(self, enabled: bool) -> None: ...
    def save_lora_adapter(self, path: str | PathLike[str]) -> None: ...
    def save_fine_tuned_model(self, path: str | PathLike[str]) -> None: ...
    def export_model(self, path: str | PathLike[str], format: str = "gguf") -> None: ...


def tune(tuner: Tuning, chats: list[list[dict[str, str]]]) -> float:
    data = tuner.prepare_training_data(chats, validation_split=0.2)
    session = tuner.start_training_session(data, TrainingConfig(rank=4))
    metrics = tuner.training_metrics()
    if session.status == "completed" and metrics is not None:
        tuner.save_lora_adapter("adapter.gguf")
        tuner.apply_lora("adapter.gguf", scale=0.5)
    return tuner.evaluate_model(data.validation).perplexity


def main() -> None:
    fake = FakeTuner()
    tune(fake, [])
    with Tuner("model.gguf") as tuner:
        tune(tuner, [])
