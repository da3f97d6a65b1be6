"""A model over HTTP, for clients of OpenAI's and Anthropic's APIs; ``pip install
'triollama[server]'``::

    async with triollama.open_llama("model.gguf", when_full="raise") as llama:
        await serve(llama, port=8080)

Each request is a task: when its client goes away it is cancelled at once, and its place is free.
``python -m triollama.server MODEL`` is a program of it.
"""

from __future__ import annotations

try:
    import h11  # noqa: F401 - asked for here, to say how to get it
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "the server needs the package h11: pip install 'triollama[server]'", name="h11"
    ) from error

from .application import Server, serve
from .http import Limits
from .program import run_server

__all__ = ["Limits", "Server", "run_server", "serve"]
