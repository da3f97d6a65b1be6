"""Help for the tests of programs that use triollama."""

from __future__ import annotations

from .tiny import make_tiny_model

__all__ = ["make_tiny_model"]
