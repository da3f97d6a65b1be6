"""A stream of the fake engine: what it was asked, what it says, and where its reader is."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import msgspec

from ..errors import BusyError, ClosedError, GrammarError
from ..params import UNCONSTRAINED, GenerationParams
from .fake_memory import FakeSampler

__all__ = ["FakeStream", "Reply", "Turn"]


class Reply(msgspec.Struct, frozen=True):
    """What the fake answers: ``text``, one token a character, then the end.

    ``error``: raised to the reader after the text instead of ending. ``token_seconds``: time a
    token takes, None for the engine's own.
    """

    text: str
    error: Exception | None = None
    token_seconds: float | None = None


class Turn(msgspec.Struct, frozen=True):
    """What a stream has to do with a sequence: see ``Decoder.submit``."""

    sequence: int = 0
    cached: int = 0
    commit: int = 0
    keep_on_cancel: bool = False
    adapters: int = 0
    given: int = 1


class _Engine(Protocol):
    """What a stream asks of the engine that it is of."""

    closed: bool

    def post(self, command: Callable[[], None]) -> None: ...
    def unpark(self, stream: FakeStream) -> None: ...
    def cancel_stream(self, stream: FakeStream) -> None: ...
    def end_stream(self, stream: FakeStream, reason: str) -> None: ...
    def check_length(self, stream: FakeStream) -> bool: ...


class FakeStream:
    """A stream of the fake: same members as the native ``DecoderStream``."""

    def __init__(
        self,
        engine: _Engine,
        id: int,
        tokens: list[int],
        params: GenerationParams,
        reply: Reply,
        kind: str,
        priority: int,
        capacity: int,
        turn: Turn,
    ) -> None:
        self.id = id
        self.turn = turn
        self.cached = 0
        self.started = False  # the prompt was read
        self.kind = kind
        self.priority = priority
        self.capacity = capacity
        self.finish_reason: str | None = None
        self.error: Exception | None = None
        self.failed_with_engine = False
        self.stop_index: int | None = None
        self.end_token: int | None = None
        self.shifted = 0
        self.shifts: tuple[int, ...] = ()  # it ends where the context does
        self.position = 0
        self.values: list[float] = []
        self.params = params
        self.reply = reply
        self.n_prompt = len(tokens)
        self.tokens = tokens
        self.n_sent = 0
        self.held: str = ""
        self.held_tokens: list[int] = []
        self.held_scores: list[Any] = []
        self.ring: deque[tuple[str, tuple[int, ...], Any, int]] = deque()
        self.parked = False
        self.cancelled = False
        self.version = 0
        self.times = {"submitted_ns": 0, "admitted_ns": 0, "first_ns": 0, "last_ns": 0}
        self.times["finished_ns"] = 0
        self._engine = engine

    @property
    def waiting(self) -> int:
        return len(self.ring)

    @property
    def usage(self) -> dict[str, int]:
        return {
            "prompt": self.n_prompt,
            "cached": self.cached,
            "generated": self.n_sent,
            **self.times,
        }

    def take(self) -> tuple[str, tuple[int, ...], Any, int] | None:
        if self._engine.closed:
            raise ClosedError("the engine is closed")
        if not self.ring:
            return None
        piece = self.ring.popleft()
        if self.parked and len(self.ring) <= self.capacity // 2:
            self._engine.unpark(self)
        return piece

    def cancel(self) -> None:
        if not self._engine.closed and self.finish_reason is None and not self.cancelled:
            self.cancelled = True
            self._engine.cancel_stream(self)

    def update(self, params: GenerationParams) -> None:
        def change() -> None:
            try:
                FakeSampler(params)
            except GrammarError as error:
                self.error = error
                self._engine.end_stream(self, "error")
            self.params = params
            self._engine.check_length(self)

        self._engine.post(change)

    def set_priority(self, priority: int) -> None:
        self.priority = priority

    def sampler_state(self) -> bytes:
        if self.finish_reason is None:
            raise BusyError("the stream is still running")
        return FakeSampler(self.params.replace(**UNCONSTRAINED)).save_state()
