"""What a conversation and its turns share: its state, its place in memory, whose turn it is."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from ..engine.adapters import Adapters
from ..engine.core import Core
from ..engine.loaded import Scaled
from ..results import Usage
from .history import State
from .plan import Overflow, Prompts
from .sequences import Sequence, Sequences

__all__ = ["Ledger"]


class Ledger:
    """One turn at a time holds it, from ``begin`` to ``end``; meanwhile nobody else changes it."""

    def __init__(
        self,
        core: Core,
        sequences: Sequences,
        adapters: Adapters,
        prompts: Prompts,
        overflow: Overflow,
        state: State,
        chosen: Scaled,
        changed: Callable[[], None],
        written: Callable[[], Awaitable[None]],
    ) -> None:
        self.core = core
        self.sequences = sequences
        self.adapters = adapters
        self.prompts = prompts
        self.overflow: Overflow = overflow
        self.state = state
        self.chosen = chosen
        self.sequence: Sequence = sequences.make()
        self.turn: object | None = None
        self._end_turn: Callable[[], Awaitable[None]]
        self._give_up: Callable[[], None]
        self.closed = False
        self.n_prompt_tokens = 0
        self.n_generated_tokens = 0
        self._freed = trio.Event()
        self._before = (state, 0, 0)
        self._changed = changed
        self.written = written
        """Waits for the files that promise to have each commit. Raises StateError."""

    def check_open(self) -> None:
        if self.closed:
            raise trio.ClosedResourceError("this conversation was closed")
        self.core.check_open()

    def check_idle(self) -> None:
        """Raises BusyResourceError in mid-turn."""
        self.check_open()
        if self.turn is not None:
            raise trio.BusyResourceError(
                "a turn of this conversation is running: await idle(), or interrupt=True ends it"
            )

    def begin(
        self, turn: object, end: Callable[[], Awaitable[None]], give_up: Callable[[], None]
    ) -> None:
        """It is this one's turn. ``end``: how others end it, ``give_up``: if it has not begun."""
        self.check_idle()
        self.turn, self._end_turn, self._give_up = turn, end, give_up
        self._freed = trio.Event()

    def end(self, turn: object) -> None:
        """No longer, if it was."""
        if self.turn is turn:
            self.turn = None
            self._freed.set()

    async def freed(self) -> None:
        """Until the turn that runs now has ended."""
        await self._freed.wait()

    async def idle(self) -> None:
        """Until no turn runs."""
        while self.turn is not None:
            await self._freed.wait()

    async def interrupt(self) -> None:
        """End whatever turn runs, by its policy, until none does."""
        while self.turn is not None:
            await self._end_turn()

    def commit(self, state: State, usage: Usage) -> None:
        """A turn has become part of the conversation."""
        self._before = (self.state, self.n_prompt_tokens, self.n_generated_tokens)
        self.state = state
        self.n_prompt_tokens += usage.prompt_tokens
        self.n_generated_tokens += usage.generated_tokens
        self._changed()

    def take_back(self) -> None:
        """The last commit."""
        self.state, self.n_prompt_tokens, self.n_generated_tokens = self._before
        self._changed()

    def close(self) -> None:
        """Free the memory, and cancel the turn that runs or is about to."""
        self.closed = True
        if self.turn is not None:
            self._give_up()
        self.sequences.drop(self.sequence)

    def forget(self) -> None:
        """What is in memory: the next turn computes everything."""
        old, self.sequence = self.sequence, self.sequences.make()
        self.sequences.drop(old)
