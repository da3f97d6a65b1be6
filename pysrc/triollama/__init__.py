"""Structured concurrency for local language models.

``triollama.sync`` is the API for scripts; ``triollama.open_llama`` the one for trio. The async
side, and with it trio, is imported only when one of its names is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._engine import build_info
from .errors import TriollamaError
from .params import GenerationParams

if TYPE_CHECKING:
    from .aio import open_llama, run_llama

__all__ = [
    "GenerationParams",
    "TriollamaError",
    "__version__",
    "build_info",
    "open_llama",
    "run_llama",
]

__version__ = "0.1.0"

_ASYNC = ("open_llama", "run_llama")


def __getattr__(name: str) -> Any:
    if name in _ASYNC:
        from . import aio

        return getattr(aio, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
