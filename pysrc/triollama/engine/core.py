"""An engine that is served: what streams, adapters and conversations share."""

from __future__ import annotations

import bisect
import contextlib
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, Protocol

import trio

from ..checks import check_kind
from ..errors import BusyError, EngineError, ParameterError, QueueFullError
from ..params import GenerationParams
from .protocol import Engine, EngineStream, Model, Reply, Vocab
from .pump import Pump

__all__ = ["LONG", "Core", "OpenStream", "WhenFull"]

LONG = 20_000
"""Characters of a text whose tokenizing takes milliseconds: others should not wait for it."""

WhenFull = Literal["wait", "raise"]


class OpenStream(Protocol):
    """A stream that was entered and not left yet, as the registry knows it."""

    params: GenerationParams
    priority: int
    conversation_id: str

    @property
    def engine_stream(self) -> EngineStream: ...
    def release(self) -> None: ...
    def update(self, **changes: Any) -> None: ...


class _Ticket:
    """A place in the queue for the queue: those of less ``rank`` first, then of less ``number``."""

    def __init__(self, rank: int, number: int) -> None:
        self._key = (rank, number)
        self.room = trio.Event()

    def __lt__(self, other: _Ticket) -> bool:
        return self._key < other._key


class Core:
    """The engine, the pump that brings its news, and the streams that are open.

    when_full: whether ``submit`` waits for room in a full queue, or raises QueueFullError.
    """

    def __init__(self, engine: Engine, *, when_full: WhenFull = "wait") -> None:
        self.engine = engine
        self.pump = Pump(engine)
        self.streams: dict[int, OpenStream] = {}
        self.closed = False
        self._when_full = when_full
        self._token = trio.lowlevel.current_trio_token()
        self._admitted: dict[int, EngineStream] = {}  # that were not seen to have ended
        self._waiting: list[_Ticket] = []  # for room in the queue, in order
        self._numbers = itertools.count()
        self._gone = trio.Event()
        self.pump.watch(self._on_news)

    # What is known without asking

    @property
    def n_ctx(self) -> int:
        return self.engine.n_ctx

    @property
    def max_streams(self) -> int:
        return self.engine.max_streams

    @property
    def deterministic(self) -> bool:
        return self.engine.deterministic

    @property
    def model(self) -> Model:
        return self.engine.model

    @property
    def vocab(self) -> Vocab:
        return self.engine.vocab

    def prompt_tokens(self, prompt: str | Iterable[int], name: str = "prompt") -> list[int]:
        """Text tokenized, with special tokens added; tokens as they are."""
        if isinstance(prompt, str) and prompt:
            return self.engine.tokenize(prompt)
        if isinstance(prompt, (str, bytes, bytearray)) or not isinstance(prompt, Iterable):
            why = "is empty" if prompt == "" else f"is {type(prompt).__name__}, not text or tokens"
            raise ParameterError(f"the {name} {why}", parameter=name, value=prompt)
        return list(prompt)

    async def tokenize(self, text: str, *, add_special: bool = True) -> list[int]:
        """A text tokenized, beside the event loop if it is long. Not always a checkpoint."""
        if len(text) <= LONG:
            return self.engine.tokenize(text, add_special=add_special)
        return await self.engine.beside(lambda: self.engine.tokenize(text, add_special=add_special))

    async def tokens_of(self, prompt: str | Iterable[int], name: str = "prompt") -> list[int]:
        """As ``prompt_tokens``, beside the event loop if it is a long text."""
        if isinstance(prompt, str) and len(prompt) > LONG:
            return await self.tokenize(prompt)
        return self.prompt_tokens(prompt, name)

    # Every call

    def check_open(self) -> None:
        """Raises ClosedResourceError once it is being closed, BrokenResourceError if it died, and
        what ``check_run`` raises."""
        self.check_run()
        if self.closed:
            raise trio.ClosedResourceError("this Llama was closed")
        cause = self.engine.cause_of_death
        if cause:
            raise trio.BrokenResourceError(f"the engine died: {cause}") from EngineError(cause)

    def check_run(self) -> None:
        """Raises BusyError in another ``trio.run`` than the one that opened it, whose tasks cannot
        be woken from here."""
        if not trio.lowlevel.in_trio_run() or trio.lowlevel.current_trio_token() is self._token:
            return
        raise BusyError(
            "this Llama belongs to another trio.run, the one that opened it: open one here too, or "
            "go there by trio.from_thread.run(..., trio_token=...)"
        )

    async def begin(self) -> None:
        """What every async call begins with: a checkpoint, in the right run, of what is open."""
        self.check_run()
        await trio.lowlevel.checkpoint()
        self.check_open()

    # Streams

    async def submit(
        self,
        start: Callable[[], EngineStream],
        priority: int = 0,
        *,
        when_full: WhenFull | None = None,
    ) -> EngineStream:
        """What ``start`` gives, once the queue has room: the higher priority first, then who came
        first. If this raises, Cancelled included, nothing was started. Not always a checkpoint."""
        self.check_open()
        check_kind("priority", priority, int)
        refuses = (when_full or self._when_full) == "raise"
        ticket = _Ticket(-priority, next(self._numbers))
        if refuses or not self._waiting or ticket < self._waiting[0]:
            try:
                return self._admit(start)
            except QueueFullError:
                if refuses:
                    raise
        bisect.insort(self._waiting, ticket)
        try:
            while True:
                await ticket.room.wait()
                self.check_open()
                ticket.room = trio.Event()
                with contextlib.suppress(QueueFullError):
                    return self._admit(start)
        finally:
            self._waiting.remove(ticket)
            self._make_room()  # for the next one too, or instead

    def _admit(self, start: Callable[[], EngineStream]) -> EngineStream:
        try:
            stream = start()
        except EngineError:
            self.check_open()  # it may have died since
            raise
        self._admitted[stream.id] = stream
        return stream

    def _on_news(self, ids: Sequence[int]) -> None:
        for id in ids:
            stream = self._admitted.get(id)
            if stream is not None and stream.finish_reason is not None:
                del self._admitted[id]
                self._make_room()

    def _make_room(self) -> None:
        """A place may be free: who is first in the queue looks."""
        if self._waiting:
            self._waiting[0].room.set()

    def add(self, stream: OpenStream) -> None:
        """It runs, and is to be found by its id."""
        self.streams[stream.engine_stream.id] = stream

    def remove(self, stream: OpenStream) -> None:
        """It was left: its place is free, and whoever waits for it looks again."""
        inner = stream.engine_stream
        inner.cancel()
        if self.streams.get(inner.id) is stream:
            del self.streams[inner.id]
        self.pump.wake(inner.id)
        self._make_room()

    # Waiting

    async def news_of(self, *streams: EngineStream) -> None:
        """Until there is something new of a stream: wake-ups may be for nothing. Raises
        ClosedResourceError if there never will be."""
        if self.pump.stopped:
            await self._gone.wait()
            if all(stream.finish_reason is None for stream in streams):
                raise trio.ClosedResourceError("this Llama was closed")
            return
        await self.pump.wait_for(*(stream.id for stream in streams))

    async def end_of(self, stream: EngineStream) -> None:
        """Until it has ended, at the latest when the engine is closed. Not always a checkpoint."""
        while stream.finish_reason is None:
            await self.news_of(stream)

    async def answer(self, reply: Reply) -> Reply:
        """Wait until the engine has answered. Raises what the command failed with; where this is
        cancelled the command is carried out all the same."""
        while not reply.is_done:
            if self.pump.stopped:
                raise trio.ClosedResourceError("this Llama was closed")
            await self.pump.wait_for(reply.id)
        _ = reply.value
        return reply

    # The end

    def close(self) -> None:
        """End every stream. Nothing can be started any more."""
        self.closed = True
        for ticket in self._waiting:
            ticket.room.set()
        for stream in list(self.streams.values()):
            stream.release()

    async def aclose(self) -> None:
        """After ``close``: until everything is freed. May be interrupted and called again."""
        await self.pump.stop()
        await self.engine.aclose()
        self._gone.set()
