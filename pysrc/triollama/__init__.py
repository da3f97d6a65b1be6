"""Structured concurrency for local language models.

``triollama.sync`` is the API for scripts; ``triollama.open_llama`` the one for trio. The async
side, and with it trio, is imported only when one of its names is used.
"""

from __future__ import annotations

from ._openmp import short_spin

with short_spin():
    from ._engine import build_info

from .errors import TriollamaError
from .params import GenerationParams

__all__ = ["GenerationParams", "TriollamaError", "__version__", "build_info"]

__version__ = "0.1.0"
