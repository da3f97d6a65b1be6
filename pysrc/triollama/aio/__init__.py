"""The trio side: many streams on one model. Only this package imports trio."""

from __future__ import annotations

from .adapters import LoadedAdapter
from .conversation import Conversation, Conversations, TurnStream
from .llama import Llama, StreamInfo, open_llama, run_llama
from .map import MapResult, MapResults
from .stream import Piece, Stream

__all__ = [
    "Conversation",
    "Conversations",
    "Llama",
    "LoadedAdapter",
    "MapResult",
    "MapResults",
    "Piece",
    "Stream",
    "StreamInfo",
    "TurnStream",
    "open_llama",
    "run_llama",
]
