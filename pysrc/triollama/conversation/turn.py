"""A turn: the answer as a stream, and the one step in which it becomes part of the conversation."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol, Self

import trio

from ..answers import Structured, Toolbox
from ..chat import TurnEnd
from ..engine.loaded import activated
from ..engine.protocol import EngineStream, Taken
from ..errors import BusyError, StateError
from ..files import Message
from ..params import GenerationParams
from ..streams.stream import Piece, Stream
from ..uninterrupted import uninterrupted
from .answer import Continued
from .choices import Choose, OnCancel
from .finished import Answer, after_shifts, state_after
from .history import Shift, State, common_length
from .ledger import Ledger
from .plan import Plan, Wanted, make_plan
from .samplers import make_sampler, planned_params, state_of
from .tools import reader_for

__all__ = ["TurnStream"]


class _Named(Protocol):
    @property
    def id(self) -> str: ...


class TurnStream(Stream):
    """The answer of a turn, as a stream. Receiving its end commits the turn. Made by
    ``Conversation.stream`` and its kin.

    It commits in one step, after the last checkpoint on the way: a call that commits a turn never
    raises Cancelled, and one that raises Cancelled has committed nothing, unless ``on_cancel`` is
    "keep": then what was said so far.

    ``value``: with ``into``, what the answer decodes to, once it was received and ``parsed``.
    ``tool_calls``: what the model asks for, once the answer was received.
    """

    def __init__(
        self,
        conversation: _Named,
        ledger: Ledger,
        choose: Choose,
        params: GenerationParams,
        end: TurnEnd,
        on_cancel: OnCancel,
        into: Structured[Any] | None = None,
        toolbox: Toolbox | None = None,
        *,
        fresh_sampler: bool = False,
        interrupt: bool = False,
        priority: int,
        capacity: int,
    ) -> None:
        super().__init__(ledger.core, [], params, into=into, priority=priority, capacity=capacity)
        self._asked = self.params, toolbox
        self.conversation = conversation
        self.conversation_id = conversation.id
        self.committed = False
        self._refused = False
        self._ledger = ledger
        self._choose = choose
        self._end = end
        self._plan: Plan | None = None
        self._on_cancel = on_cancel
        self._fresh_sampler = fresh_sampler
        self._interrupt = interrupt
        self._sampler: Any = None
        self._writing: trio.Event | None = None  # a commit that may be taken back until it is set
        self._left: deque[Piece] = deque()  # pieces that were kept before they were received
        self._continued = Continued(b"", bytes)

    # Beginning

    @trio.lowlevel.enable_ki_protection
    async def __aenter__(self) -> Self:
        if self._entered or self._closed:
            await trio.lowlevel.checkpoint()
            raise BusyError("a stream runs once; ask for a new one")
        self._core.check_run()
        self._entered = True
        ledger = self._ledger
        try:
            if self._interrupt:
                await ledger.interrupt()
            # Before any checkpoint, so that who has just waited for idle() is not too late.
            self._entering = trio.CancelScope()
            ledger.begin(self, self._end_for_another, self._entering.cancel)
        except BaseException as error:
            self._entered = False
            if isinstance(error, Exception):
                await trio.lowlevel.checkpoint()
            raise
        try:
            with self._entering:
                await self._core.begin()
                self._start(await self._core.submit(await self._prepare(), self.priority))
            if self._entering.cancel_called:
                why = "was interrupted by another"
                if self._closed or ledger.closed:
                    why = "or its conversation was closed"
                raise trio.ClosedResourceError(f"this turn {why} before it began")
        except BaseException:
            if self._stream is None:  # nothing has happened: it can be entered again
                self._entered = False
                ledger.end(self)
            else:
                self._let_go()
            raise
        return self

    async def _prepare(self) -> Callable[[], EngineStream]:
        ledger, engine = self._ledger, self._core.engine
        base, added = self._choose(ledger.state)
        self._plan = plan = await self._make_plan(base, added)
        self.prompt = plan.tokens
        self._continued = Continued.after(base, added, plan.tokens, ledger.prompts.bytes_of)
        # It may be entered again, when what it goes on from is another.
        params, toolbox = self._asked
        self.params, self._toolbox = planned_params(
            params, plan, ledger.prompts, toolbox, self._end
        )
        sequence = ledger.sequence
        await ledger.sequences.settled(sequence)
        adapters = await ledger.adapters.number(ledger.chosen)
        if plan.shift is not None and self._remembers(base, plan.shift):
            await ledger.sequences.shift(sequence, plan.shift)
        ledger.check_open()
        begin_with = 0 if activated(ledger.chosen) else adapters
        cached = await ledger.sequences.borrow(sequence, plan, begin_with)
        params = self.params
        if params.context_overflow == "shift":
            params = params.replace(n_keep=plan.n_keep)
        self._sampler, shown = await make_sampler(
            engine, params, plan, fresh=self._fresh_sampler, toolbox=self._toolbox
        )
        self.params = self.params.replace(seed=self._sampler.seed)

        def start() -> EngineStream:
            ledger.check_open()
            stream = engine.submit(
                plan.tokens,
                self._sampler,
                params,
                priority=self.priority,
                capacity=self.capacity,
                accept_from=shown,
                sequence=sequence.number,
                cached=cached,
                commit=plan.commit,
                keep_on_cancel=True,
                adapters=adapters,
            )
            sequence.lend(stream, cached, self._held)
            return stream

        return start

    def _start(self, stream: EngineStream) -> None:
        assert self._plan is not None
        source = self._ledger.prompts.template.source
        self._calls = reader_for(self._toolbox, self._plan, source, self._core.vocab)
        super()._start(stream)
        if not self._plan.messages:  # it goes on with these
            tokens = self._plan.base.messages[-1].tokens
            self._parts.resume(self._ledger.prompts.text_of(tokens), tokens)

    async def _make_plan(self, base: State, added: tuple[Message, ...]) -> Plan:
        ledger = self._ledger
        params, toolbox = self._asked
        ledger.prompts.thinking = params.thinking
        ledger.prompts.may_call = toolbox is not None
        planning = make_plan(ledger.prompts, base, added, params, ledger.overflow, self._core.n_ctx)
        wanted = next(planning)
        while True:
            tokens = await self._tokens_of(wanted)
            try:
                wanted = planning.send(tokens)
            except StopIteration as end:
                plan: Plan = end.value
                return plan

    async def _tokens_of(self, wanted: Wanted) -> tuple[int, ...]:
        """Beside the event loop, where it takes long enough to be noticed by others."""
        base, added, _ = wanted
        prompts = self._ledger.prompts
        if prompts.are_long((*base.messages, *added)):
            return await self._core.engine.beside(lambda: prompts.tokens(*wanted))
        return prompts.tokens(*wanted)

    def _remembers(self, base: State, shift: Shift) -> bool:
        """Whether the sequence holds, before a shift, more than what the shift keeps anyway."""
        return common_length(self._ledger.sequence.tokens, base.tokens) > shift.keep + shift.drop

    # Receiving

    @trio.lowlevel.enable_ki_protection
    async def receive(self) -> Piece:
        """The next piece; EndOfChannel once the turn is committed. Otherwise as a Stream's."""
        while True:
            try:
                piece = await super().receive()
            except trio.EndOfChannel:
                if self._left:
                    return self._left.popleft()
                rest = self._continued.rest()
                if rest is not None:
                    return super()._note(rest)
                await self._finish()
                raise
            if piece.tokens or piece.text:
                return piece

    def _note(self, taken: Taken) -> Piece:
        mended = self._continued.mend(taken)
        return Piece("", ()) if mended is None else super()._note(mended)

    def _at_end(self) -> None:
        """Of the engine's pieces: there may be more of our own."""

    async def _finish(self) -> None:
        """The end was received."""
        reason = self.engine_stream.finish_reason or ""
        ledger = self._ledger
        if self.committed or ledger.turn is not self or ledger.closed or reason == "cancelled":
            return
        self._refused = True
        self._parse()
        self.tool_calls = self._parts.calls()
        self._refused = False
        self._commit()
        self._writing = trio.Event()
        try:
            await ledger.written()
        except StateError:
            ledger.take_back()
            self.committed, self._refused = False, True
            raise
        finally:
            self._writing.set()

    # Leaving

    @trio.lowlevel.enable_ki_protection
    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._leave()
        if exc is None and not self.committed:
            await trio.lowlevel.checkpoint()
        else:
            await trio.lowlevel.cancel_shielded_checkpoint()

    @trio.lowlevel.enable_ki_protection
    async def aclose(self) -> None:
        """End the turn where it is: what was said stays only with ``on_cancel="keep"``."""
        self._core.check_run()
        await self._leave()
        if self.committed:
            await trio.lowlevel.cancel_shielded_checkpoint()
        else:
            await trio.lowlevel.checkpoint()

    async def _leave(self) -> None:
        """The sequence is free once the engine has let go of it, which the next turn waits for;
        only what is to be kept is waited for here: milliseconds on a CPU, elsewhere a step."""
        try:
            if self._keeps() and not self._closed and self._stream is not None:
                stream = self._stream
                stream.cancel()
                try:
                    await uninterrupted(lambda: self._core.end_of(stream))
                except trio.ClosedResourceError:
                    pass  # the engine went: there is nothing to go on from
                finally:
                    self._keep()
                await self._kept()
        finally:
            self._let_go()

    def _let_go(self) -> None:
        self._ledger.sequence.leaving = True
        self.release()
        self._ledger.end(self)

    async def _end_for_another(self) -> None:
        """End it by its policy, from another task: its reader gets what was said, then the end."""
        if self._stream is None:
            self._entering.cancel()
            await self._ledger.freed()
            return
        self._stream.cancel()
        await self._core.end_of(self._stream)
        if self._writing is not None:
            await self._writing.wait()
        self._keep()
        await self._kept()
        self._ledger.end(self)

    def _keeps(self) -> bool:
        mine = self._ledger.turn is self and not self._ledger.closed
        return mine and self._on_cancel == "keep" and not self.committed and not self._refused

    def _keep(self) -> None:
        """Commit what was said, by the policy, of a stream that has ended."""
        stream = self._stream
        if stream is None or stream.finish_reason in (None, "error") or not self._keeps():
            return
        while (taken := stream.take()) is not None:
            self._left.append(self._note(taken))
        rest = self._continued.rest()
        if rest is not None:
            self._left.append(super()._note(rest))
        held = self._held_back()
        if held is not None:
            self._left.append(held)
        if self._tokens:
            self._commit()

    async def _kept(self) -> None:
        if self.committed:
            with contextlib.suppress(StateError):  # the autosave says so, and goes on
                await self._ledger.written()

    # What it leaves

    def _held(self) -> tuple[int, ...]:
        """Tokens of what the stream has left in its sequence."""
        assert self._plan is not None
        plan, stream = self._plan, self.engine_stream
        if not stream.usage["admitted_ns"]:  # it never ran
            return self._ledger.sequence.tokens
        generated, done = after_shifts(plan, self._tokens, stream.shifts, self._core.n_ctx)
        if len(done) < len(stream.shifts):  # not all of it was received
            generated = generated[: plan.n_keep]
        return generated[: stream.position]

    def _commit(self) -> None:
        """All that a commit is: nothing in here waits, and until its end nothing has changed."""
        assert self._plan is not None
        ledger, stream = self._ledger, self.engine_stream
        ledger.sequence.settle()
        reason = stream.finish_reason or "cancelled"
        usage = self.usage
        answer = Answer(
            text=self.text,
            generated="".join(self._texts),
            reasoning=self.reasoning,
            tool_calls=tuple(call.for_message() for call in self.tool_calls),
            tokens=self._tokens,
            n_generated=usage.generated_tokens,
            drops=stream.shifts,
            n_held=len(ledger.sequence.tokens),
            finish_reason=reason,
            sampler=state_of(
                self._sampler, stream.sampler_state(), self.params, whole=reason in ("eos", "stop")
            ),
        )
        ledger.commit(state_after(self._plan, answer, self._continued, self._core.n_ctx), usage)
        self.committed = True
