"""The value that a stream's JSON text is so far."""

from __future__ import annotations

from typing import Any

import trio

from ..answers import PartialJSON

__all__ = ["Partials"]


class Partials(trio.abc.ReceiveChannel[Any]):
    """Made by ``Stream.partials``: receives from the stream, and gives what its text is so far.

    Plain data: one object that grows in place, so copy what you keep. A string is there from its
    opening quote on, a number or a literal once it is whole, a key with its value.
    """

    def __init__(self, stream: trio.abc.ReceiveChannel[Any]) -> None:
        self._stream = stream
        self._partial = PartialJSON()

    async def receive(self) -> Any:
        """What is there after the next piece with text. Raises what ``Stream.receive`` raises."""
        while True:
            piece = await self._stream.receive()
            if piece.text:
                value = self._partial.feed(piece.text)
                if value is not None:
                    return value

    async def aclose(self) -> None:
        """Close the stream."""
        await self._stream.aclose()
