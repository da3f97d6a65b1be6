"""Structured concurrency for local language models.

``open_llama`` serves a model to many tasks of a trio program; what it gives, the data and every
error are names of this package. Its modules: ``sync`` for scripts, ``tuning``, ``testing``,
``chat``, ``models``, and ``lowlevel`` for those who drive llama.cpp themselves.

Importing it loads the engine and nothing heavy: a name brings its module when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import errors
from ._engine import build_info
from .errors import *  # noqa: F403 - each of them, by its __all__
from .params import GenerationParams, Reasoning

if TYPE_CHECKING:
    from . import chat, lowlevel, models, sync, testing, tuning
    from .answers import structured
    from .chat import ChatTemplate
    from .conversation.conversation import Conversation
    from .conversation.registry import Conversations
    from .conversation.turn import TurnStream
    from .engine.loaded import LoadedAdapter
    from .engine.statistics import Statistics
    from .files import Message
    from .llama import Llama, StreamInfo
    from .lowlevel import quantize
    from .reranking import Reranker, open_reranker
    from .results import (
        Choice,
        Completion,
        FinishReason,
        Ranking,
        Score,
        TokenLogprob,
        ToolCall,
        Usage,
    )
    from .serving import open_llama, run_llama
    from .streams.map import MapResult, MapResults
    from .streams.stream import Piece, Stream
    from .tuning.errors import (
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

__all__ = [
    "AdapterApplicationError",
    "AdapterFileNotFoundError",
    "BaseModelNotLoadedError",
    "ChatTemplate",
    "CheckpointError",
    "Choice",
    "Completion",
    "ContextNotInitializedError",
    "Conversation",
    "Conversations",
    "DataError",
    "ExampleTooLongError",
    "FinishReason",
    "GenerationParams",
    "IncompatibleAdapterError",
    "InvalidEpochsError",
    "InvalidLearningRateError",
    "InvalidQuantizationError",
    "InvalidRankError",
    "InvalidSettingError",
    "InvalidValidationSplitError",
    "Llama",
    "LoRASaveError",
    "LoadedAdapter",
    "MapResult",
    "MapResults",
    "Message",
    "ModelExportError",
    "ModelNotLoadedError",
    "ModelSaveError",
    "NoAdapterError",
    "NonFiniteLossError",
    "Piece",
    "Ranking",
    "Reasoning",
    "Reranker",
    "Score",
    "SessionNotFoundError",
    "Statistics",
    "Stream",
    "StreamInfo",
    "TokenLogprob",
    "TokenizerNotInitializedError",
    "ToolCall",
    "TuningError",
    "TurnStream",
    "UnsupportedModelError",
    "Usage",
    "__version__",
    "build_info",
    "chat",
    "errors",
    "lowlevel",
    "models",
    "open_llama",
    "open_reranker",
    "quantize",
    "run_llama",
    "structured",
    "sync",
    "testing",
    "tuning",
]
__all__ += errors.__all__

__version__ = "0.1.0"

# Where the names are that only their users pay for.
_HOMES = {
    "Conversation": "conversation.conversation",
    "Conversations": "conversation.registry",
    "Llama": "llama",
    "LoadedAdapter": "engine.loaded",
    "MapResult": "streams.map",
    "MapResults": "streams.map",
    "Piece": "streams.stream",
    "Stream": "streams.stream",
    "StreamInfo": "llama",
    "TurnStream": "conversation.turn",
    "open_llama": "serving",
    "run_llama": "serving",
    "Reranker": "reranking",
    "open_reranker": "reranking",
    "Statistics": "engine.statistics",
    "ChatTemplate": "chat",
    "quantize": "lowlevel",
    "Choice": "results",
    "Completion": "results",
    "FinishReason": "results",
    "Ranking": "results",
    "Score": "results",
    "TokenLogprob": "results",
    "ToolCall": "results",
    "Usage": "results",
    "Message": "files",
    "structured": "answers",
    "AdapterApplicationError": "tuning.errors",
    "AdapterFileNotFoundError": "tuning.errors",
    "BaseModelNotLoadedError": "tuning.errors",
    "CheckpointError": "tuning.errors",
    "ContextNotInitializedError": "tuning.errors",
    "DataError": "tuning.errors",
    "ExampleTooLongError": "tuning.errors",
    "IncompatibleAdapterError": "tuning.errors",
    "InvalidEpochsError": "tuning.errors",
    "InvalidLearningRateError": "tuning.errors",
    "InvalidQuantizationError": "tuning.errors",
    "InvalidRankError": "tuning.errors",
    "InvalidSettingError": "tuning.errors",
    "InvalidValidationSplitError": "tuning.errors",
    "LoRASaveError": "tuning.errors",
    "ModelExportError": "tuning.errors",
    "ModelNotLoadedError": "tuning.errors",
    "ModelSaveError": "tuning.errors",
    "NoAdapterError": "tuning.errors",
    "NonFiniteLossError": "tuning.errors",
    "SessionNotFoundError": "tuning.errors",
    "TokenizerNotInitializedError": "tuning.errors",
    "TuningError": "tuning.errors",
    "UnsupportedModelError": "tuning.errors",
}
_MODULES = ("chat", "lowlevel", "models", "sync", "testing", "tuning")


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    elif name in _MODULES:
        value = importlib.import_module(f".{name}", __name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
