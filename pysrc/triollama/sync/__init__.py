"""The scripting API: one model, one thread, the least between you and the tokens.

    from triollama.sync import Llama

    with Llama("model.gguf") as llama:
        for piece in llama.stream("Once upon a time", max_tokens=200):
            print(piece, end="", flush=True)
        chat = llama.chat(system="You are terse.")
        print(chat.say("Where is Lima?").text)

Never imports trio. For many generations at once see :func:`triollama.open_llama`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..params import GenerationParams
from ..results import Completion, Ranking, Score, TokenLogprob, Usage
from .llama import Llama
from .reranker import Reranker
from .stream import Stream

if TYPE_CHECKING:
    from .conversation import Conversation
    from .turn import TurnStream

__all__ = [
    "Completion",
    "Conversation",
    "GenerationParams",
    "Llama",
    "Ranking",
    "Reranker",
    "Score",
    "Stream",
    "TokenLogprob",
    "TurnStream",
    "Usage",
]


def __getattr__(name: str) -> Any:  # templates are only for those who chat
    if name == "Conversation":
        from .conversation import Conversation

        return Conversation
    if name == "TurnStream":
        from .turn import TurnStream

        return TurnStream
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
