"""Fine-tuning: LoRA adapters trained on the GGUF file that is served.

Data (:func:`prepare_training_data`), settings (:class:`TrainingConfig`), a run (:func:`train`),
its evaluation and its results.
"""

from __future__ import annotations

from .checkpoint import Checkpoint, read_checkpoint
from .config import FREE_TO_CHANGE, QLoRAConfig, TrainingConfig, learning_rate_at
from .dataset import DatasetReport, DatasetStatistics, TrainingDataset
from .encode import Encoder, Example, PreferenceExample
from .errors import (
    AdapterApplicationError,
    AdapterFileNotFoundError,
    BaseModelNotLoadedError,
    CheckpointError,
    ContextNotInitializedError,
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
    TokenizerNotInitializedError,
    TuningError,
    UnsupportedModelError,
)
from .evaluate import (
    EvaluationMetrics,
    Progress,
    evaluate_examples,
    evaluate_text,
    without_adapter,
)
from .export import AdapterCompatibility, check_adapter, load_peft, save_merged, save_peft
from .objective import PreferenceMetrics
from .prepare import prepare_training_data
from .protocol import AppliedAdapter, Comparison, TrainingMetrics, TrainingSession, Tuning
from .reading import read_items, read_jsonl
from .records import TrainingStep, TrainingSummary
from .rows import Row, pack_rows, row_of
from .session import TrainingRun, train
from .tuner import Tuner

__all__ = [
    "FREE_TO_CHANGE",
    "AdapterApplicationError",
    "AdapterCompatibility",
    "AdapterFileNotFoundError",
    "AppliedAdapter",
    "BaseModelNotLoadedError",
    "Checkpoint",
    "CheckpointError",
    "Comparison",
    "ContextNotInitializedError",
    "DataError",
    "DatasetReport",
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
    "PreferenceExample",
    "PreferenceMetrics",
    "Progress",
    "QLoRAConfig",
    "Row",
    "SessionNotFoundError",
    "TokenizerNotInitializedError",
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
    "read_checkpoint",
    "read_items",
    "read_jsonl",
    "row_of",
    "save_merged",
    "save_peft",
    "train",
    "without_adapter",
]
