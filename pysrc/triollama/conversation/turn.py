"""A turn: the answer as a stream, and the one step in which it becomes part of the conversation."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Any, Literal, Protocol, Self

import msgspec
import trio

from ..checks import shown
from ..engine.protocol import EngineStream, Taken
from ..errors import BusyError, ParameterError, StateError
from ..files import Message
from ..params import GenerationParams
from ..streams.stream import Piece, Stream
from ..structured import Structured
from ..uninterrupted import uninterrupted
from .answer import REPLACED, Continued, unfinished_character
from .choices import Choose
from .history import Shift, State, Turn, common_length, now, shifted, went_on_from
from .ledger import Ledger
from .plan import Plan, Wanted, make_plan
from .samplers import make_sampler, state_of, with_grammar

__all__ = ["OnCancel", "TurnStream", "check_policy"]

OnCancel = Literal["rollback", "keep"]


def check_policy(on_cancel: Any) -> OnCancel:
    """``on_cancel``, if it is one. Raises ParameterError."""
    if not isinstance(on_cancel, str) or on_cancel not in ("rollback", "keep"):
        raise ParameterError(
            f"on_cancel must be 'rollback' or 'keep', not {shown(on_cancel)}",
            parameter="on_cancel",
            value=on_cancel,
        )
    policy: OnCancel = on_cancel
    return policy


class _Named(Protocol):
    @property
    def id(self) -> str: ...


class TurnStream(Stream):
    """The answer of a turn, as a stream. Receiving its end commits the turn.

    It commits in one step, after the last checkpoint on the way: a call that commits a turn never
    raises Cancelled, and one that raises Cancelled has committed nothing, unless ``on_cancel`` is
    "keep": then what was said so far.

    ``value``: with ``into``, what the answer decodes to, once it was received and ``parsed``.
    """

    def __init__(
        self,
        conversation: _Named,
        ledger: Ledger,
        choose: Choose,
        params: GenerationParams,
        on_cancel: OnCancel,
        into: Structured[Any] | None = None,
        *,
        fresh_sampler: bool = False,
        interrupt: bool = False,
        priority: int,
        capacity: int,
    ) -> None:
        super().__init__(ledger.core, [], params, into=into, priority=priority, capacity=capacity)
        self.conversation = conversation
        self.conversation_id = conversation.id
        self.committed = False
        self._refused = False
        self._ledger = ledger
        self._choose = choose
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
        if not added:
            last = base.messages[-1].tokens
            if last and plan.tokens[-len(last) :] == last:  # not what its text was read as
                pending = unfinished_character(ledger.prompts.bytes_of(last))
                self._continued = Continued(pending, ledger.prompts.bytes_of)
        self.params = with_grammar(self.params, plan)
        sequence = ledger.sequence
        await ledger.sequences.settled(sequence)
        adapters = await ledger.adapters.number(ledger.chosen)
        if plan.shift is not None and self._remembers(base, plan.shift):
            await ledger.sequences.shift(sequence, plan.shift)
        ledger.check_open()
        cached = await ledger.sequences.borrow(sequence, plan, adapters)
        params = self.params
        if params.context_overflow == "shift":
            params = params.replace(n_keep=plan.n_keep)
        self._sampler, shown = await make_sampler(engine, params, plan, fresh=self._fresh_sampler)
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

    async def _make_plan(self, base: State, added: tuple[Message, ...]) -> Plan:
        ledger = self._ledger
        planning = make_plan(
            ledger.prompts, base, added, self.params, ledger.overflow, self._core.n_ctx
        )
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
        if self._tokens:
            self._commit()

    async def _kept(self) -> None:
        if self.committed:
            with contextlib.suppress(StateError):  # the autosave says so, and goes on
                await self._ledger.written()

    # What it leaves

    def _after_shifts(self) -> tuple[tuple[int, ...], list[Shift]]:
        """The tokens that the context holds after what was received, and the shifts on the way."""
        assert self._plan is not None
        plan, n_ctx = self._plan, self._core.n_ctx
        drops = list(self.engine_stream.shifts)
        if not drops:
            return plan.tokens + tuple(self._tokens), []
        tokens, done = list(plan.tokens), []
        for token in self._tokens:
            tokens.append(token)
            if drops and len(tokens) > n_ctx:
                done.append(Shift(plan.n_keep, drops.pop(0)))
                del tokens[plan.n_keep : plan.n_keep + done[-1].drop]
        return tuple(tokens), done

    def _held(self) -> tuple[int, ...]:
        """Tokens of what the stream has left in its sequence."""
        assert self._plan is not None
        plan, stream = self._plan, self.engine_stream
        if not stream.usage["admitted_ns"]:  # it never ran
            return self._ledger.sequence.tokens
        generated, done = self._after_shifts()
        if len(done) < len(stream.shifts):  # not all of it was received
            generated = generated[: plan.n_keep]
        return generated[: stream.position]

    def _commit(self) -> None:
        """All that a commit is: nothing in here waits, and until its end nothing has changed."""
        assert self._plan is not None
        ledger, plan = self._ledger, self._plan
        ledger.sequence.settle()
        held, shifts = self._after_shifts()
        kept = self._tokens_in_text()
        tokens = held[: len(held) - (len(self._tokens) - len(kept))]
        base = plan.base if shifts else went_on_from(plan.base, plan.commit)
        for shift in shifts:
            base = shifted(base, shift)
        n_computed = min(len(ledger.sequence.tokens), len(tokens))
        reason = self.engine_stream.finish_reason or "cancelled"
        usage = self.usage
        answer = Message(
            role="assistant",
            content=self.text,
            created=now(),
            tokens=tuple(kept),
            n_tokens=usage.generated_tokens,
            n_context=len(tokens),
            n_computed=n_computed,
            finish_reason=reason,
        )
        messages, turns = base.messages, base.turns
        if not plan.messages:  # it went on with the answer of the last turn
            answer = _joined(messages[-1], answer, whole=self._continued.whole)
            messages, turns = messages[:-1], turns[:-1]
        messages = (*messages, *plan.messages, answer)
        sampler, params, unfinished = state_of(
            self._sampler,
            self.engine_stream.sampler_state(),
            self.params,
            whole=reason in ("eos", "stop"),
        )
        turn = Turn(len(messages), len(tokens), n_computed, sampler, params, unfinished)
        state = State(
            messages=messages,
            tokens=tokens,
            n_computed=n_computed,
            turns=(*turns, turn),
            dropped=plan.dropped,
        )
        ledger.commit(state, usage)
        self.committed = True

    def _tokens_in_text(self) -> list[int]:
        """The first of the tokens, as many as are in the text: a stop string is not."""
        text = self._continued.replaced + self.text
        n, bytes_of = len(self._tokens), self._ledger.prompts.bytes_of
        data = self._continued.pending + bytes_of(self._tokens)
        while n and not text.startswith(data.decode("utf-8", "replace")):
            n -= 1
            data = data[: len(data) - len(bytes_of(self._tokens[n : n + 1]))]
        return self._tokens[:n]


def _joined(one: Message, more: Message, *, whole: bool) -> Message:
    """An answer and what it went on with. ``whole``: that completed the character at its end."""
    content = one.content.removesuffix(REPLACED) if whole else one.content
    return msgspec.structs.replace(
        more,
        created=one.created,
        content=content + more.content,
        tokens=one.tokens + more.tokens,
        n_tokens=one.n_tokens + more.n_tokens,
        extras=one.extras,
    )
