"""Help for the tests of programs that use triollama.

``make_tiny_model`` writes models of a few hundred kilobytes; ``FakeEngine`` with
``open_fake_llama`` serves scripted replies without any model, in simulated time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .fake import FakeEngine, Reply
from .tiny import make_tiny_model

if TYPE_CHECKING:
    from .simulated import open_fake_llama

__all__ = ["FakeEngine", "Reply", "make_tiny_model", "open_fake_llama"]


def __getattr__(name: str) -> Any:
    # trio is imported only by whoever uses the async side.
    if name == "open_fake_llama":
        from .simulated import open_fake_llama

        return open_fake_llama
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
