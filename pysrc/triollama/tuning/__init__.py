"""Fine-tuning: LoRA adapters trained on the GGUF file that is served.

Data (:func:`prepare_training_data`), settings (:class:`TrainingConfig`), a run (:func:`train`),
its evaluation and its results.
"""

from __future__ import annotations

from .config import QLoRAConfig, TrainingConfig, learning_rate_at
from .dataset import (
    DatasetStatistics,
    Example,
    Row,
    TrainingDataset,
    encode_chat,
    encode_completion,
    encode_text,
    pack_rows,
    prepare_training_data,
    read_jsonl,
)
from .errors import *  # noqa: F403
from .errors import __all__ as _errors
from .evaluate import EvaluationMetrics, evaluate_examples, evaluate_text, without_adapter
from .export import AdapterCompatibility, check_adapter, load_peft, save_merged, save_peft
from .session import TrainingRun, TrainingStep, TrainingSummary, train

__all__ = [
    "AdapterCompatibility",
    "DatasetStatistics",
    "EvaluationMetrics",
    "Example",
    "QLoRAConfig",
    "Row",
    "TrainingConfig",
    "TrainingDataset",
    "TrainingRun",
    "TrainingStep",
    "TrainingSummary",
    "check_adapter",
    "encode_chat",
    "encode_completion",
    "encode_text",
    "evaluate_examples",
    "evaluate_text",
    "learning_rate_at",
    "load_peft",
    "pack_rows",
    "prepare_training_data",
    "read_jsonl",
    "save_merged",
    "save_peft",
    "train",
    "without_adapter",
    *_errors,
]
