"""``triollama serve``: the server's own program."""

from __future__ import annotations

from .common import passed_on

__all__ = ["serve"]


def _serve(name: str, arguments: list[str]) -> int:
    from ..server.__main__ import main

    return main(arguments)


serve = passed_on(
    "serve", "Serve a model over HTTP: OpenAI's and Anthropic's APIs, a page.", _serve
)
