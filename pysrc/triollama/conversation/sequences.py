"""What the model's memory holds of conversations: kept, shared, shifted, and never misremembered.

A record says at most what is there. Whoever changes a sequence says first how much of it stays, so
that whatever ends him, a cancellation or Ctrl-C between two lines, leaves no record that lies.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable

from .._engine import WORTH_SHARING
from ..engine.core import Core
from ..engine.protocol import EngineStream
from ..errors import ClosedError, StateError
from .history import Shift, common_length
from .plan import Plan

__all__ = ["Held", "Sequence", "Sequences"]

_log = logging.getLogger("triollama.conversation")

CANDIDATES = 64
"""Sequences that are looked at for a common beginning, those used last first."""

Held = Callable[[], tuple[int, ...]]
"""Tokens that a stream has left in its sequence; called once it has ended."""


class Sequence:
    """A conversation's place in the model's memory, and the ``tokens`` that it holds. ``number`` is
    the decoder's name for it."""

    __slots__ = ("leaving", "number", "start", "tokens", "used")

    def __init__(self, number: int) -> None:
        self.number = number
        self.tokens: tuple[int, ...] = ()
        self.start: tuple[int, ...] | None = None  # where the index has it
        self.used: tuple[EngineStream, Held] | None = None  # by one not known to have ended
        self.leaving = False  # the stream was told to end

    def keep(self, n: int) -> None:
        """No more than this is sure to be there."""
        self.tokens = self.tokens[:n]

    def lend(self, stream: EngineStream, cached: int, held: Held) -> None:
        """A stream writes to it now, after the first ``cached`` tokens."""
        self.keep(cached)
        self.leaving = False
        self.used = (stream, held)

    def settle(self) -> bool:
        """Note what a stream left, if it has ended; False while it has not."""
        if self.used is not None:
            stream, held = self.used
            if stream.finish_reason is None:
                return False
            self.tokens = held()
            self.used = None
        return True


def reusable(sequence: Sequence, plan: Plan) -> int:
    """How much of what a sequence holds serves this turn."""
    return min(common_length(sequence.tokens, plan.tokens), len(plan.tokens) - 1)


class Sequences:
    """All sequences of conversations, and which of them begin alike."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._engine = core.engine
        self._by_start: dict[tuple[int, ...], dict[int, Sequence]] = {}

    def make(self) -> Sequence:
        """An empty one."""
        return Sequence(self._engine.make_sequence())

    def drop(self, sequence: Sequence) -> None:
        """Free its memory; a stream that uses it is cancelled."""
        self._place(sequence, None)
        sequence.keep(0)
        with contextlib.suppress(ClosedError):  # with the engine everything went
            self._engine.drop_sequence(sequence.number)

    async def settled(self, sequence: Sequence) -> bool:
        """Wait until a stream that was told to end has let go of it: on CPU that is milliseconds.
        False if one uses it that was not."""
        while not sequence.settle():
            if not sequence.leaving:
                return False
            self._core.check_open()
            assert sequence.used is not None
            await self._core.news_of(sequence.used[0])
        return True

    # What serves a turn

    async def borrow(self, sequence: Sequence, plan: Plan, adapters: int) -> int:
        """How much of a turn's prompt is there: in its own sequence, or else copied from another
        one with the longest beginning in common. Memory belongs to the adapters that computed it.
        """
        cached = reusable(sequence, plan)
        if cached >= WORTH_SHARING or len(plan.tokens) < WORTH_SHARING:
            return cached
        start = (adapters, *plan.tokens[:WORTH_SHARING])
        best, source = max(cached, WORTH_SHARING - 1), None
        for other in list(self._by_start.get(start, {}).values())[-CANDIDATES:]:
            if other is not sequence and other.settle():
                n = reusable(other, plan)
                if n > best:
                    best, source = n, other
        self._place(sequence, start)
        if source is not None:
            await self.share(source, sequence, best)
        return reusable(sequence, plan)

    def _place(self, sequence: Sequence, start: tuple[int, ...] | None) -> None:
        """Where to look for sequences that begin alike, those used last at the end."""
        if sequence.start is not None:
            some = self._by_start[sequence.start]
            del some[sequence.number]
            if not some:
                del self._by_start[sequence.start]
        if start is not None:
            self._by_start.setdefault(start, {})[sequence.number] = sequence
        sequence.start = start

    # Commands. The decoder takes them in order: a turn that begins meanwhile, or after a caller
    # that no longer waits, comes after them.

    async def share(self, source: Sequence, target: Sequence, n: int) -> None:
        """Give ``target`` the first ``n`` positions of ``source``, or what the cache allows."""
        target.keep(0)
        tokens = source.tokens
        try:
            reply = self._engine.fork_sequence(source.number, target.number, n)
            got = (await self._core.answer(reply)).value
        except StateError as error:
            _log.debug("a sequence could not be shared: %s", error)
            return
        target.tokens = tokens
        target.keep(min(got, n))

    async def shift(self, sequence: Sequence, shift: Shift) -> None:
        """Forget part of what a sequence holds; all of it where that cannot be."""
        tokens = sequence.tokens
        sequence.keep(min(shift.keep, len(tokens)))
        try:
            reply = self._engine.shift_sequence(sequence.number, shift.keep, shift.drop)
            n = (await self._core.answer(reply)).value
        except StateError as error:
            _log.debug("a sequence could not be shifted: %s", error)
            sequence.keep(0)
        else:
            sequence.tokens = shift.of(tokens)[:n]

    async def save(self, sequence: Sequence, tokens: tuple[int, ...]) -> tuple[int, bytes]:
        """How many of ``tokens`` an idle sequence holds, and its memory; 0 if it holds others."""
        idle = await self.settled(sequence)
        if not idle or not sequence.tokens or sequence.tokens != tokens[: len(sequence.tokens)]:
            return 0, b""
        reply = await self._core.answer(self._engine.save_sequence(sequence.number))
        data, got = reply.data, reply.value
        # More than is known of is of no use: nobody could say what it is.
        return (got, data) if data and got <= len(sequence.tokens) else (0, b"")
