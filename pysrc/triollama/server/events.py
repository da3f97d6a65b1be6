"""Server-sent events."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import msgspec
import trio

from .http import Headers, Reply

__all__ = ["Events", "event"]


def event(data: bytes, name: str = "") -> bytes:
    """One of them: ``data`` is JSON, so it has no line breaks."""
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: " + data + b"\n\n"


class Events:
    """A reply made of events. ``shared``: several tasks write them."""

    def __init__(self, reply: Reply, *, shared: bool = False, headers: Headers = ()) -> None:
        self._reply = reply
        self._lock = trio.Lock()
        self.write: Callable[[bytes], Awaitable[None]] = self._in_turn if shared else reply.write
        """Some events."""
        reply.begin("text/event-stream", [("cache-control", "no-cache"), *headers])

    async def _in_turn(self, data: bytes) -> None:
        async with self._lock:
            await self._reply.write(data)

    async def put(self, value: object, name: str = "") -> None:
        """One event, of a value as JSON."""
        await self.write(event(msgspec.json.encode(value), name))

    async def end(self) -> None:
        """No more."""
        await self._reply.end()
