#!/usr/bin/env python3
"""A chat server: one conversation a connection, JSON lines over TCP.

    python examples/chat_server.py MODEL.gguf chats.state [PORT]
    nc 127.0.0.1 4321
    {"id": "ann"}
    {"say": "Hello"}

The server answers ``{"turns": n}``, then for each ``say`` its text in pieces, ``{"text": "..."}``,
and ``{"end": "eos", "turns": n}``: by then the turn is on disk. ``{"stop": true}`` ends an answer
in the middle, and so does going away: the conversation is then as if nothing had been asked.
``{"forget": true}`` deletes it. What nobody is connected to is unloaded after a while, and read
from the file when its client is back, which may be after a restart.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import trio
import triollama

MAX_LINE = 100_000
MAX_WAITING = 16
"""Requests that a client may send ahead."""


class Lines:
    """JSON objects, one a line, over a byte stream."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
        self._buffer = b""

    async def receive(self) -> dict[str, Any] | None:
        """The next object, or None where the other side has gone."""
        while b"\n" not in self._buffer:
            if len(self._buffer) > MAX_LINE:
                raise ValueError("a line is too long")
            data = await self._stream.receive_some()
            if not data:
                return None
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\n", 1)
        try:
            value = json.loads(line)
        except RecursionError:
            raise ValueError("a line is nested too deeply") from None
        if not isinstance(value, dict):
            raise ValueError("a line must be a JSON object")
        return value

    async def send(self, **fields: Any) -> None:
        await self._stream.send_all(json.dumps(fields).encode() + b"\n")


class ChatServer:
    """The conversations of a Llama, for whoever connects.

    idle: seconds after which a conversation that nobody is connected to is unloaded.
    options: of new conversations.
    """

    def __init__(
        self, llama: triollama.Llama, path: Path, *, idle: float = 60.0, **options: Any
    ) -> None:
        self.llama = llama
        self.path = path
        self.idle = idle
        self.options = options
        self._connected: set[str] = set()
        self._left: dict[str, float] = {}
        self._waking = trio.Lock()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Save each turn before it ends, and unload what is idle, until cancelled."""
        async with trio.open_nursery() as nursery:
            await nursery.start(lambda task_status: self.llama.autosave(
                self.path, sync="commit", task_status=task_status
            ))  # fmt: skip
            task_status.started()
            while True:
                await trio.sleep(self.idle / 4)
                for id, left in list(self._left.items()):
                    if left + self.idle < trio.current_time():
                        del self._left[id]
                        self.llama.conversations[id].close()  # the file keeps it

    async def serve(self, stream: trio.abc.Stream) -> None:
        """One connection."""
        lines = Lines(stream)
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async with stream:
                try:
                    hello = await lines.receive()
                    if hello is not None:
                        async with self._conversation(str(hello.get("id", ""))) as chat:
                            await lines.send(turns=chat.n_turns)
                            await self._talk(chat, lines)
                except (ValueError, triollama.TriollamaError) as error:
                    await lines.send(error=str(error))

    @contextlib.asynccontextmanager
    async def _conversation(self, id: str) -> AsyncIterator[triollama.Conversation]:
        """The one of this id: open, in the file, or new. Nobody else gets it meanwhile."""
        if id in self._connected:
            raise ValueError(f"{id!r} is connected already")
        self._connected.add(id)
        self._left.pop(id, None)
        try:
            async with self._waking:
                chats = self.llama.conversations
                chat = chats[id] if id in chats else await self._wake(id)
            yield chat
        finally:
            self._connected.discard(id)
            if id in self.llama.conversations:
                self._left[id] = trio.current_time()

    async def _wake(self, id: str) -> triollama.Conversation:
        try:
            return (await self.llama.restore(self.path, [id]))[0]
        except triollama.ParameterError as error:
            if error.parameter != "ids":
                raise
            return self.llama.conversation(id, **self.options)  # the file has none

    async def _talk(self, chat: triollama.Conversation, lines: Lines) -> None:
        """Answer until the client goes; then the answer that runs is cancelled."""
        ask, asked = trio.open_memory_channel[dict[str, Any]](MAX_WAITING)
        turn = trio.CancelScope()

        async def listen() -> None:
            while (request := await lines.receive()) is not None:
                if request.get("stop"):
                    turn.cancel()
                else:
                    ask.send_nowait(request)  # who does not wait for answers is sent away
            nursery.cancel_scope.cancel()

        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(listen)
                async for request in asked:
                    if request.get("forget"):
                        chat.delete()
                        nursery.cancel_scope.cancel()
                        break
                    turn = trio.CancelScope()
                    end = "stopped"
                    with turn:
                        async with chat.stream(request.get("say", "")) as answer:
                            async for piece in answer:
                                await lines.send(text=piece.text)
                            end = answer.finish_reason or ""
                    await lines.send(end=end, turns=chat.n_turns)
        except* (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        except* trio.WouldBlock:
            raise ValueError("too many requests are waiting") from None
        except* (ValueError, triollama.TriollamaError) as group:
            raise ValueError(str(group.exceptions[0])) from group


async def main(model: str, path: str, port: int = 4321) -> None:
    async with triollama.open_llama(model, max_streams=8) as llama, trio.open_nursery() as nursery:
        server = ChatServer(llama, Path(path), overflow="truncate_turns")
        await nursery.start(server.run)
        print(f"listening on 127.0.0.1:{port}", flush=True)
        await trio.serve_tcp(server.serve, port, host="127.0.0.1")


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        trio.run(main, sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 4321)
