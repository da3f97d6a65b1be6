"""The trio side: many streams on one model. Only this package imports trio."""

from __future__ import annotations

from .llama import Llama, StreamInfo, open_llama, run_llama
from .stream import Piece, Stream

__all__ = ["Llama", "Piece", "Stream", "StreamInfo", "open_llama", "run_llama"]
