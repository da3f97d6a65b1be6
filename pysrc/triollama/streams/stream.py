"""One generation as a trio channel."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, cast

import msgspec
import trio

from ..answers import Calls, Parts, Toolbox
from ..checks import check_count, check_kind
from ..errors import BusyError, ParameterError
from ..params import CONSTRAINTS, GenerationParams, draw_seed, make_params
from ..results import Completion, FinishReason, TokenLogprob, ToolCall, Usage
from .partials import Partials

if TYPE_CHECKING:
    from ..answers import Structured
    from ..engine.adapters import Adapters
    from ..engine.core import Core, WhenFull
    from ..engine.loaded import Scaled
    from ..engine.protocol import EngineStream, Taken

__all__ = ["Piece", "Stream"]

# Fixed while a stream runs: they are part of the prompt's KV, or of what was shown already.
_FIXED = (
    "stop",
    "stop_tokens",
    "context_overflow",
    "n_keep",
    "seed",
    "logprobs",
    "special",
    "embeddings",
    "reasoning",
    "thinking",
    "show_schema",
    "max_reasoning_tokens",
    "threads",
    "batch_threads",
    "causal_attention",
)


class Piece(msgspec.Struct, frozen=True):
    """Some text, and the tokens it came from.

    Whole characters, and nothing of a stop string. Only a stream's last piece, and those of an
    answer's ``reasoning`` (thoughts before the text, without the markers), may have no text.
    ``logprobs``: one for each token, if asked for. ``time``: when its last token was sampled, in
    seconds on ``time.monotonic``'s clock.
    """

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None = None
    time: float = 0.0
    reasoning: str = ""

    def __str__(self) -> str:
        return self.text


def _closed_early() -> trio.ClosedResourceError:
    return trio.ClosedResourceError("this stream was closed while it was being entered")


def usage_of(stream: EngineStream) -> Usage:
    """A stream's counts and times, so far."""
    u = stream.usage
    start, first = u["submitted_ns"], u["first_ns"]
    end = u["finished_ns"] or u["last_ns"] or start
    return Usage(
        prompt_tokens=u["prompt"] - u["cached"],
        cached_tokens=u["cached"],
        generated_tokens=u["generated"],
        shifted_tokens=stream.shifted,
        first_token_seconds=(first - start) / 1e9 if first else None,
        seconds=(end - start) / 1e9,
    )


class Stream(trio.abc.ReceiveChannel[Piece]):
    """A generation. Made by :meth:`Llama.stream`; runs from entering ``async with`` to leaving it.

    Iterate for pieces, or ``receive`` them one by one; the channel ends when the generation does,
    ``finish_reason`` then says why. A consumer that does not read costs nobody else anything: the
    stream pauses when its ring is full.

    ``id``: names it to ``Llama.cancel`` and ``Llama.update``. ``text``, ``tokens``, ``logprobs``:
    what was received so far; ``reasoning``: the thoughts before it. ``params``: those in effect,
    ``seed`` among them. ``value``: with
    ``into``, what the text decodes to, once the end was received and it is ``parsed``.
    """

    conversation_id = ""
    """Of the conversation whose turn it is."""

    def __init__(
        self,
        core: Core,
        tokens: list[int],
        params: GenerationParams,
        *,
        into: Structured[Any] | None = None,
        priority: int,
        capacity: int,
        adapters: Adapters | None = None,
        chosen: Scaled = (),
    ) -> None:
        check_count("capacity", capacity, 1)
        check_kind("priority", priority, int)
        seed = draw_seed() if params.seed is None else params.seed
        self.params = params.replace(seed=seed) if params.seed is None else params
        self.prompt = tuple(tokens)
        self.priority = priority
        self.capacity = capacity
        self.into = into
        self.value: Any = None
        self.parsed = False
        self._core = core
        self._adapters = adapters
        self._chosen = chosen
        self._stream: EngineStream | None = None
        self.when_full: WhenFull | None = None  # the Llama's way
        self._entering = trio.CancelScope()
        self._entered = False
        self._closed = False
        self._receiving = False
        self._texts: list[str] = []  # as generated
        self._toolbox: Toolbox | None = None
        self._calls: Calls | None = None
        self._parts = Parts(None, core.vocab)  # until it starts
        self.tool_calls: tuple[ToolCall, ...] = ()
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprob] = []

    def __reduce__(self) -> Any:
        raise TypeError("a stream is one generation: it can be neither copied nor pickled")

    @property
    def engine_stream(self) -> EngineStream:
        """What runs in the engine; BusyError before it does."""
        if self._stream is None:
            raise BusyError("this stream has not started: use it in `async with`")
        return self._stream

    @trio.lowlevel.enable_ki_protection
    async def __aenter__(self) -> Self:
        """Start. Where the queue is full, waits until it has room (or raises QueueFullError: see
        ``open_llama``). Raises ContextFullError, GrammarError, ParameterError, TokenError;
        ClosedResourceError or BrokenResourceError if the engine is gone. A checkpoint."""
        if self._entered or self._closed:
            await trio.lowlevel.checkpoint()
            raise BusyError("a stream runs once; ask for a new one")
        self._entered = True
        self._entering = trio.CancelScope()
        try:
            await self._core.begin()
            with self._entering:
                stream = await self._core.submit(
                    await self._prepare(), self.priority, when_full=self.when_full
                )
                self._start(stream)
            if self._stream is None:
                raise _closed_early()
        except BaseException:
            self._entered = False
            raise
        return self

    async def _prepare(self) -> Callable[[], EngineStream]:
        """What is left to do is done at once."""
        number = 0 if self._adapters is None else await self._adapters.number(self._chosen)
        engine = self._core.engine
        if not self.params.is_constrained:
            sampler = engine.make_sampler(self.params)
        else:  # compiling a grammar may take many steps' time
            sampler = await engine.beside(self._constrained)

        def start() -> EngineStream:
            if self._closed:
                raise _closed_early()
            if self._adapters is not None:
                self._adapters.check(self._chosen)  # unloaded meanwhile?
            return engine.submit(
                self.prompt,
                sampler,
                self.params,
                priority=self.priority,
                capacity=self.capacity,
                adapters=number,
            )

        return start

    def _constrained(self) -> Any:
        new, params, box = self._core.engine.make_sampler, self.params, self._toolbox
        return new(params) if box is None else box.naming(lambda: new(params), new, params)

    def _start(self, stream: EngineStream) -> None:
        self._stream = stream
        self._core.add(self)
        self._parts = Parts(self.params.reasoning, self._core.vocab, self._calls)

    @trio.lowlevel.enable_ki_protection
    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()
        if exc is None:
            await trio.lowlevel.checkpoint()
        else:  # a Cancelled here would replace what is on its way out
            await trio.lowlevel.cancel_shielded_checkpoint()

    @trio.lowlevel.enable_ki_protection
    async def aclose(self) -> None:
        """End the generation where it is, and free its place at once. Who is entering it meanwhile
        gets ClosedResourceError. Idempotent."""
        self._core.check_run()
        self.release()
        await trio.lowlevel.checkpoint()

    def release(self) -> None:
        """What ``aclose`` does, without a checkpoint."""
        if self._closed:
            return
        self._closed = True
        self._entering.cancel()
        if self._stream is not None:
            self._core.remove(self)

    @trio.lowlevel.enable_ki_protection
    async def receive(self) -> Piece:
        """The next piece. If this raises ``Cancelled``, none was consumed.

        Raises EndOfChannel when the generation has ended (also if ``Llama.cancel`` ended it),
        ClosedResourceError after ``aclose`` or after the Llama was closed, BusyResourceError if
        another task is in ``receive``, BrokenResourceError (with its cause) if the engine died,
        and what ended this stream alone, such as GrammarError or DecodeError. With ``into`` the end
        is an AnswerError where the text, being cut short, is no value of the type.
        """
        self._core.check_run()
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._receiving:
            raise trio.BusyResourceError("another task is receiving from this stream")
        self._receiving = True
        waited = False
        try:
            while True:
                if self._closed or self._core.closed:
                    raise trio.ClosedResourceError("this stream was closed")
                # The end is looked at first: what was delivered before it is then seen by take().
                ended = self.engine_stream.finish_reason is not None
                taken = self.engine_stream.take()
                if taken is not None:
                    piece = self._note(taken)
                    break
                if ended:
                    held = self._held_back()
                    if held is not None:
                        piece = held
                        break
                    await trio.lowlevel.cancel_shielded_checkpoint()
                    self._raise_error()
                    self._at_end()
                    raise trio.EndOfChannel
                await self._core.news_of(self.engine_stream)
                waited = True
        finally:
            self._receiving = False
        if not waited:  # to have waited is a checkpoint
            await trio.lowlevel.cancel_shielded_checkpoint()
        return piece

    def _at_end(self) -> None:
        """Everything was received, and no error."""
        self._parse()
        if self.finish_reason != "cancelled":
            self.tool_calls = self._parts.calls()

    def find_calls(self, toolbox: Toolbox, first: int = 0) -> None:
        """Before it is entered: tell calls of these tools from the text. They are its
        ``tool_calls`` when the end was received, which raises AnswerError where one was cut short.
        first: the number of calls before this text."""
        check_kind("toolbox", toolbox, Toolbox)
        check_kind("first", first, int)
        self._toolbox = toolbox
        self._calls = None if toolbox.format is None else toolbox.reader(first)

    def _parse(self) -> None:
        if self.into is not None and self.finish_reason != "cancelled":
            self.value = self.into.parse(self.text, self.finish_reason or "")
            self.parsed = True

    def read_rest(self) -> None:
        """Receive at once what is there of a stream that has ended. Raises what ended it, if that
        was an error."""
        while (taken := self.engine_stream.take()) is not None:
            self._note(taken)
        self._held_back()
        self._raise_error()

    def _note(self, taken: Taken) -> Piece:
        text, tokens, scores, time_ns = taken
        logprobs = None
        if scores is not None:
            logprobs = tuple(
                TokenLogprob(token, logprob, top)
                for token, (logprob, top) in zip(tokens, scores, strict=True)
            )
            self._logprobs.extend(logprobs)
        self._texts.append(text)
        self._tokens.extend(tokens)
        thought, text = self._parts.feed(text, tokens)
        return Piece(text, tokens, logprobs, time_ns / 1e9, thought)

    def _held_back(self) -> Piece | None:
        """At the end: what might have become a marker around thoughts or calls, and did not."""
        thought, text = self._parts.finish()
        return Piece(text, (), reasoning=thought) if thought or text else None

    def _raise_error(self) -> None:
        stream = self.engine_stream
        if stream.finish_reason == "error":
            if stream.failed_with_engine:
                raise trio.BrokenResourceError("the engine died") from stream.error
            assert stream.error is not None
            raise stream.error

    async def ended(self) -> None:
        """Wait until the engine is done with the stream: its place is free, ``usage`` is final.

        Does not read: with a full ring, and nobody reading, this does not come by itself.
        """
        self._core.check_run()
        await trio.lowlevel.checkpoint()
        await self._core.end_of(self.engine_stream)

    def cancel(self) -> None:
        """End it from any task: whoever receives gets the pieces that are there, then the end."""
        self.engine_stream.cancel()

    def update(self, **changes: Any) -> None:
        """Change parameters of the running generation, with effect from the next token.

        ``max_tokens`` and everything about sampling; not those in the prompt's memory, or already
        shown (``seed``, ``stop``, ``logprobs``, ``context_overflow`` and the like): ParameterError.
        """
        for name, value in changes.items():
            if name in _FIXED:
                raise ParameterError(
                    f"{name} cannot change while a stream runs", parameter=name, value=value
                )
        params = make_params(self.params, changes)
        if params.reasoning is not None and any(name in changes for name in CONSTRAINTS):
            raise ParameterError(
                "a constraint cannot change while a stream with thoughts runs", parameter="grammar"
            )
        self.engine_stream.update(params)
        self.params = params

    def set_priority(self, priority: int) -> None:
        """Higher goes first: in the queue, and among prompts that are being read."""
        self.engine_stream.set_priority(priority)
        self.priority = priority

    @property
    def id(self) -> int:
        """Names this stream; set once it runs."""
        return self.engine_stream.id

    @property
    def text(self) -> str:
        """The text received so far, without thoughts."""
        return self._parts.text

    @property
    def reasoning(self) -> str:
        """The thoughts received so far, where ``params.reasoning`` tells them from the text."""
        return self._parts.reasoning

    @property
    def tokens(self) -> list[int]:
        """The tokens received so far."""
        return list(self._tokens)

    @property
    def logprobs(self) -> list[TokenLogprob] | None:
        """One for each token received so far, if asked for."""
        return None if self.params.logprobs is None else list(self._logprobs)

    @property
    def finish_reason(self) -> FinishReason | None:
        """None while it runs."""
        if self._stream is None:
            return None
        reason = cast("FinishReason | None", self._stream.finish_reason)
        return "cancelled" if reason is None and self._closed else reason

    @property
    def stop(self) -> str | None:
        """The stop string that ended the text."""
        index = self.engine_stream.stop_index
        return None if index is None else self.params.stop[index]

    @property
    def end_token(self) -> int | None:
        """The token that ended it, if ``finish_reason`` is "eos"."""
        return self.engine_stream.end_token

    @property
    def usage(self) -> Usage:
        """Counts and times so far; final after ``ended``."""
        return usage_of(self.engine_stream)

    def partials(self) -> Partials:
        """Instead of its pieces, the value that its JSON text is so far, to iterate over."""
        return Partials(self)

    def completion(self) -> Completion:
        """What came of it; BusyError while it runs."""
        reason = self.finish_reason
        if reason is None:
            raise BusyError("the generation is still running")
        embedding = None
        if self.params.embeddings and reason != "error":
            import numpy

            embedding = numpy.asarray(self.engine_stream.values, dtype=numpy.float32)
        assert self.params.seed is not None
        return Completion(
            text=self.text,
            tokens=self.tokens,
            finish_reason=reason,
            usage=self.usage,
            seed=self.params.seed,
            stop=self.stop,
            end_token=self.end_token,
            logprobs=self.logprobs,
            embedding=embedding,
            reasoning=self.reasoning,
            tool_calls=self.tool_calls,
        )
