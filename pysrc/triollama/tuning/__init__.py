"""Fine-tuning: LoRA adapters trained on the GGUF file that is served.

Data (:func:`prepare_training_data`), settings (:class:`TrainingConfig`), a run (:func:`train`),
its evaluation and its results.
"""

from __future__ import annotations

from .config import QLoRAConfig, TrainingConfig, learning_rate_at
from .dataset import (
    DatasetStatistics,
    Row,
    TrainingDataset,
    pack_rows,
    prepare_training_data,
    read_items,
    read_jsonl,
)
from .encode import Encoder, Example
from .errors import (
    AdapterApplicationError,
    AdapterFileNotFoundError,
    CheckpointError,
    DataError,
    ExampleTooLongError,
    IncompatibleAdapterError,
    InvalidEpochsError,
    InvalidLearningRateError,
    InvalidQuantizationError,
    InvalidRankError,
    InvalidSettingError,
    InvalidValidationSplitError,
    LoRASaveError,
    ModelExportError,
    ModelNotLoadedError,
    ModelSaveError,
    NoAdapterError,
    NonFiniteLossError,
    SessionNotFoundError,
    TuningError,
    UnsupportedModelError,
)
from .evaluate import EvaluationMetrics, evaluate_examples, evaluate_text, without_adapter
from .export import AdapterCompatibility, check_adapter, load_peft, save_merged, save_peft
from .session import TrainingRun, TrainingStep, TrainingSummary, train
from .tuner import (
    AppliedAdapter,
    Comparison,
    TrainingMetrics,
    TrainingSession,
    Tuner,
    Tuning,
)

__all__ = [
    "AdapterApplicationError",
    "AdapterCompatibility",
    "AdapterFileNotFoundError",
    "AppliedAdapter",
    "CheckpointError",
    "Comparison",
    "DataError",
    "DatasetStatistics",
    "Encoder",
    "EvaluationMetrics",
    "Example",
    "ExampleTooLongError",
    "IncompatibleAdapterError",
    "InvalidEpochsError",
    "InvalidLearningRateError",
    "InvalidQuantizationError",
    "InvalidRankError",
    "InvalidSettingError",
    "InvalidValidationSplitError",
    "LoRASaveError",
    "ModelExportError",
    "ModelNotLoadedError",
    "ModelSaveError",
    "NoAdapterError",
    "NonFiniteLossError",
    "QLoRAConfig",
    "Row",
    "SessionNotFoundError",
    "TrainingConfig",
    "TrainingDataset",
    "TrainingMetrics",
    "TrainingRun",
    "TrainingSession",
    "TrainingStep",
    "TrainingSummary",
    "Tuner",
    "Tuning",
    "TuningError",
    "UnsupportedModelError",
    "check_adapter",
    "evaluate_examples",
    "evaluate_text",
    "learning_rate_at",
    "load_peft",
    "pack_rows",
    "prepare_training_data",
    "read_items",
    "read_jsonl",
    "save_merged",
    "save_peft",
    "train",
    "without_adapter",
]
