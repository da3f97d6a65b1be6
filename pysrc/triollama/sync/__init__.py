"""The scripting API: one model, one thread, the least between you and the tokens.

    from triollama.sync import Llama

    with Llama("model.gguf") as llama:
        for piece in llama.stream("Once upon a time", max_tokens=200):
            print(piece, end="", flush=True)

Never imports trio. For many generations at once see :func:`triollama.open_llama`.
"""

from __future__ import annotations

from ..params import GenerationParams
from ..results import Completion, Score, TokenLogprob, Usage
from .llama import Llama
from .stream import Stream

__all__ = ["Completion", "GenerationParams", "Llama", "Score", "Stream", "TokenLogprob", "Usage"]
