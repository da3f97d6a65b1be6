"""An engine that computes nothing: scripted replies, latencies and failures, in simulated time.

It keeps the same contract as the native engine (one test suite runs against both) and does all
its waiting through trio's clock, so that with ``trio.testing.MockClock(autojump_threshold=0)``
tests of timeouts and races take no real time.
"""

from __future__ import annotations

import heapq
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, TypeVar

from ..checks import check_count, check_kind, shown
from ..engine.protocol import Sampler
from ..engine.statistics import Statistics
from ..errors import (
    ClosedError,
    ContextFullError,
    EngineError,
    ParameterError,
    QueueFullError,
)
from ..params import GenerationParams
from .fake_memory import END, FakeLayout, FakeMemory, FakeSampler, check_tokens
from .fake_stream import FakeStream, Reply, Turn

T = TypeVar("T")

__all__ = ["FakeEngine", "Reply"]


def _echo(prompt: str) -> str:
    return f" and so on, after {prompt!r}." * 200


class FakeEngine(FakeMemory):
    """Answers prompts by a script.

    reply: a function from the prompt's text to a ``Reply`` or a string.
    token_seconds, prompt_token_seconds: time that a generated token, and a token of a prompt, take.
    cancel_seconds: time until a cancelled stream has ended.
    load_seconds, load_error: how loading goes.
    n_ctx, max_streams, max_queue: as for ``open_llama``.

    Adapters are files in GGUF's format, and change nothing; a grammar must be one, and binds
    nobody.
    ``die(cause)`` breaks it, as a failure inside llama.cpp would. Time is trio's; without trio
    ``advance()`` does what is due by ``clock``, ``delay()`` says when that is next.
    """

    deterministic = True

    def __init__(
        self,
        reply: Callable[[str], Reply | str] = _echo,
        *,
        token_seconds: float = 0.02,
        prompt_token_seconds: float = 0.001,
        cancel_seconds: float = 0.0,
        load_seconds: float = 0.0,
        load_error: Exception | None = None,
        n_ctx: int = 4096,
        max_streams: int = 4,
        max_queue: int = 1024,
    ) -> None:
        check_kind("reply", reply, Callable)
        check_count("n_ctx", n_ctx, 1)
        check_count("max_streams", max_streams, 1)
        check_count("max_queue", max_queue, 0)
        for seconds in (token_seconds, prompt_token_seconds, cancel_seconds, load_seconds):
            check_kind("seconds", seconds, int, float)
        check_kind("load_error", load_error, Exception, type(None))
        super().__init__()
        self.n_ctx = n_ctx
        self.max_streams = max_streams
        self.load_seconds = load_seconds
        self.load_error = load_error
        self.closed = False
        self.cause_of_death = ""
        self.clock: Callable[[], float] = lambda: 0.0  # seconds; set by whoever drives it
        self.vocab = self.model.vocab
        self.layout = FakeLayout(max_streams)
        self._reply = reply
        self._token_seconds = token_seconds
        self._prompt_token_seconds = prompt_token_seconds
        self._cancel_seconds = cancel_seconds
        self._max_queue = max_queue
        self._queue: list[FakeStream] = []
        self._active: list[FakeStream] = []
        self._counted = 0
        self._due: list[tuple[float, int, int, FakeStream]] = []
        self._count: dict[str, int] = dict.fromkeys(
            (
                "finished",
                "cancelled",
                "failed",
                "prompt_tokens",
                "cached_tokens",
                "generated_tokens",
                "steps",
            ),
            0,
        )
        self._token: Any = None  # of the trio.run it serves in
        self._bell: Any = None
        self._first_token_s: list[float] = []

    # Text

    def tokenize(self, text: str, *, add_special: bool = True) -> list[int]:
        return self.vocab.tokenize(text)

    def detokenize(self, tokens: Iterable[int]) -> str:
        return self.vocab.detokenize(tokens)

    def make_sampler(self, params: GenerationParams) -> FakeSampler:
        return FakeSampler(params)

    # Streams

    def submit(
        self,
        tokens: Sequence[int],
        sampler: Sampler,
        params: GenerationParams,
        *,
        priority: int = 0,
        capacity: int = 64,
        adapters: int = 0,
        sequence: int = 0,
        cached: int = 0,
        commit: int = 0,
        keep_on_cancel: bool = False,
        accept_from: int = 0,
    ) -> FakeStream:
        turn = Turn(sequence, cached, commit, keep_on_cancel, adapters)
        return self._submit("generate", tokens, params, priority, capacity, turn)

    def submit_other(
        self,
        kind: Literal["score", "embed"],
        tokens: Sequence[int],
        *,
        priority: int = 0,
        pooling: str = "mean",
        given: int = 1,
        adapters: int = 0,
    ) -> FakeStream:
        if not isinstance(pooling, str) or pooling not in ("mean", "cls", "last"):
            raise ParameterError(
                f"pooling must be 'mean', 'cls' or 'last', not {shown(pooling)}",
                parameter="pooling",
                value=pooling,
            )
        turn = Turn(adapters=adapters, given=given)
        return self._submit(kind, tokens, GenerationParams(), priority, 64, turn)

    def _submit(
        self,
        kind: str,
        tokens: Sequence[int],
        params: GenerationParams,
        priority: int,
        capacity: int,
        turn: Turn,
    ) -> FakeStream:
        self.advance()
        if self.closed:
            raise ClosedError("the engine is closed")
        if self.cause_of_death:
            raise EngineError(self.cause_of_death)
        tokens = check_tokens("tokens", tokens)
        check_tokens("stop_tokens", params.stop_tokens)
        check_kind("priority", priority, int)
        if not tokens:
            raise ParameterError("the prompt is empty; give at least one token", parameter="tokens")
        if len(tokens) > self.n_ctx:
            raise ContextFullError(
                f"the prompt has {len(tokens)} tokens; the context holds n_ctx={self.n_ctx}",
                needed=len(tokens),
                n_ctx=self.n_ctx,
            )
        if self._counted >= self.max_streams + self._max_queue:
            raise QueueFullError(
                f"{self.max_streams} streams run and {self._max_queue} wait; the queue is full"
            )
        reply = self._reply(self.detokenize(tokens)) if kind == "generate" else Reply("")
        if isinstance(reply, str):
            reply = Reply(reply)
        check_kind("what reply gives", reply, Reply)
        stream = FakeStream(
            self, self._new_id(), list(tokens), params, reply, kind, priority, capacity, turn
        )
        stream.times["submitted_ns"] = self._ns()
        self._counted += 1
        self._queue.append(stream)
        self._admit()
        return stream

    def uses(self, sequence: int = 0, adapters: int = 0) -> bool:
        return any(
            (sequence and s.turn.sequence == sequence) or (adapters and s.turn.adapters == adapters)
            for s in (*self._active, *self._queue)
        )

    def cancel_of(self, sequence: int) -> None:
        for stream in [*self._active, *self._queue]:
            if stream.turn.sequence == sequence:
                stream.cancel()

    def statistics(self) -> Statistics:
        started = [s for s in self._active if s.n_sent]
        return Statistics(
            running=len(started),
            prefilling=len(self._active) - len(started),
            parked=sum(s.parked for s in self._active),
            queued=len(self._queue),
            sequences=len(self.sequences),
            slots_free=self.max_streams - len(self._active),
            cells_used=sum(s.n_prompt + s.n_sent for s in self._active)
            + sum(map(len, self.sequences.values())),
            first_token_s=list(self._first_token_s),
            **self._count,
        )

    def die(self, cause: str) -> None:
        """Break: every stream ends with this cause, and nothing can be started any more."""
        self.cause_of_death = cause
        for stream in [*self._active, *self._queue]:
            stream.failed_with_engine = True
            stream.error = EngineError(cause)
            self.end_stream(stream, "error")

    def close(self) -> None:
        """End every stream as cancelled."""
        self.do_commands()
        for stream in [*self._active, *self._queue]:
            self.end_stream(stream, "cancelled")
        self.closed = True

    # In trio

    def start(self) -> None:
        """Take the time from trio's clock."""
        import trio

        self._token = trio.lowlevel.current_trio_token()
        self._bell = trio.Event()
        self.clock = trio.current_time

    def changed(self) -> None:
        import trio

        if self._token is None:
            return
        if trio.lowlevel.in_trio_run():
            self._ring()
        else:  # a worker thread
            self._token.run_sync_soon(self._ring)

    def _ring(self) -> None:
        self._bell.set()

    async def fingerprint(self) -> bytes:
        return self.model.fingerprint

    async def beside(self, work: Callable[[], T]) -> T:
        import trio

        testing = sys.modules.get("trio.testing")  # not imported for this: it imports a lot
        if testing is not None and isinstance(trio.lowlevel.current_clock(), testing.MockClock):
            await trio.lowlevel.checkpoint()
            return work()  # a clock that jumps would not wait for a thread
        return await trio.to_thread.run_sync(work)

    async def wait(self) -> None:
        import trio

        while True:
            self._bell = trio.Event()
            self.advance()
            if self.has_news():
                await trio.lowlevel.checkpoint()
                return
            delay = self.delay()
            with trio.move_on_after(float("inf") if delay is None else delay):
                await self._bell.wait()

    async def aclose(self) -> None:
        import trio

        self.close()
        await trio.lowlevel.cancel_shielded_checkpoint()

    # Time

    def poll(self) -> list[int]:
        """Ids with news since the last call."""
        news, self._news = self._news, []
        return news

    def has_news(self) -> bool:
        """Whether ``poll`` would give any."""
        return bool(self._news)

    def delay(self) -> float | None:
        """Seconds until something is due; None: nothing is until something changes."""
        while self._due and self._due[0][2] != self._due[0][3].version:
            heapq.heappop(self._due)
        return max(0.0, self._due[0][0] - self.clock()) if self._due else None

    def advance(self) -> None:
        """Do what is due."""
        self.do_commands()
        while self._due and self._due[0][0] <= self.clock():
            _, _, version, stream = heapq.heappop(self._due)
            if version == stream.version:
                self._step(stream)

    def _ns(self) -> int:
        return max(1, int(self.clock() * 1e9))

    def _schedule(self, stream: FakeStream, seconds: float) -> None:
        stream.version += 1
        heapq.heappush(self._due, (self.clock() + seconds, stream.id, stream.version, stream))
        self.changed()

    def _admit(self) -> None:
        self._queue.sort(key=lambda s: (-s.priority, s.id))
        while self._queue and len(self._active) < self.max_streams:
            stream = self._queue.pop(0)
            self._active.append(stream)
            stream.times["admitted_ns"] = self._ns()
            turn = stream.turn
            if turn.sequence:
                stream.cached = self.begin(turn.sequence, stream.tokens, turn.cached, turn.adapters)
            elif stream.kind == "generate" and stream.params.causal_attention:
                places = self.max_streams - len(self._active)
                stream.cached = self.begin_alike(stream.tokens, turn.adapters, places)
            self._count["cached_tokens"] += stream.cached
            n_new = stream.n_prompt - stream.cached
            self._schedule(stream, n_new * self._prompt_token_seconds)

    def unpark(self, stream: FakeStream) -> None:
        stream.parked = False
        if not stream.cancelled:
            self._schedule(stream, self._seconds(stream))

    def _seconds(self, stream: FakeStream) -> float:
        own = stream.reply.token_seconds
        return self._token_seconds if own is None else own

    def cancel_stream(self, stream: FakeStream) -> None:
        self._counted -= 1
        if stream in self._queue or not self._cancel_seconds:  # as soon as the engine looks
            self.post(lambda: self.end_stream(stream, "cancelled"))
        else:
            self._schedule(stream, self._cancel_seconds)

    def _step(self, stream: FakeStream) -> None:
        self._count["steps"] += 1
        if stream.cancelled:
            self.end_stream(stream, "cancelled")
            return
        if stream.kind != "generate":
            self._count["prompt_tokens"] += stream.n_prompt
            stream.values = self._values(stream.kind, stream.tokens)
            if stream.kind == "score":
                stream.values = stream.values[stream.turn.given - 1 :]
            self.end_stream(stream, "done")
            return
        if not stream.started:
            stream.started = True
            self._count["prompt_tokens"] += stream.n_prompt - stream.cached
        if not self.check_length(stream):
            return
        if stream.n_sent == len(stream.reply.text):
            if stream.reply.error is not None:
                stream.error = stream.reply.error
                self.end_stream(stream, "error")
            else:
                stream.end_token = END
                self.end_stream(stream, "eos")
            return
        character = stream.reply.text[stream.n_sent]
        if ord(character) in stream.params.stop_tokens:
            stream.end_token = ord(character)
            self.end_stream(stream, "eos")
            return
        self._emit(stream, character)
        if stream.finish_reason is None and self.check_length(stream):
            if len(stream.ring) >= stream.capacity:
                stream.parked = True
            else:
                self._schedule(stream, self._seconds(stream))

    def _emit(self, stream: FakeStream, character: str) -> None:
        if stream.n_sent == 0:
            stream.times["first_ns"] = self._ns()
            self._first_token_s.append(self.clock() - stream.times["submitted_ns"] / 1e9)
        stream.times["last_ns"] = self._ns()
        stream.n_sent += 1
        self._count["generated_tokens"] += 1
        stream.held += character
        stream.held_tokens.append(ord(character))
        if stream.params.logprobs is not None:
            top = tuple((ord(character), 0.0) for _ in range(min(1, stream.params.logprobs)))
            stream.held_scores.append((0.0, top))
        for index, stop in enumerate(stream.params.stop):
            if stop in stream.held:
                stream.held = stream.held[: stream.held.index(stop)]
                stream.stop_index = index
                self.end_stream(stream, "stop")
                return
        keep = max((_overlap(stream.held, stop) for stop in stream.params.stop), default=0)
        shown = stream.held[: len(stream.held) - keep]
        if shown:
            stream.held = stream.held[len(shown) :]
            self._deliver(stream, shown)

    def _deliver(self, stream: FakeStream, text: str) -> None:
        scores = tuple(stream.held_scores) or None
        if not stream.ring:
            self._news.append(stream.id)
        stream.ring.append((text, tuple(stream.held_tokens), scores, stream.times["last_ns"]))
        stream.held_tokens = []
        stream.held_scores = []

    def check_length(self, stream: FakeStream) -> bool:
        """False if the stream has come to its end."""
        if stream.finish_reason is not None or stream not in self._active:
            return False
        most = stream.params.max_tokens
        if most is not None and stream.n_sent >= most:
            self.end_stream(stream, "length")
            return False
        if stream.n_prompt + stream.n_sent > self.n_ctx:
            self.end_stream(stream, "context")
            return False
        return True

    def end_stream(self, stream: FakeStream, reason: str) -> None:
        if stream.finish_reason is not None:
            return
        if stream.held or stream.held_tokens:
            self._deliver(stream, stream.held)
            stream.held = ""
        stream.version += 1
        stream.parked = False
        stream.times["finished_ns"] = self._ns()
        self._settle(stream, reason)
        stream.finish_reason = reason
        if not stream.cancelled:
            self._counted -= 1
        for streams in (self._active, self._queue):
            if stream in streams:
                streams.remove(stream)
        kind = {"cancelled": "cancelled", "error": "failed"}.get(reason, "finished")
        self._count[kind] += 1
        self._news.append(stream.id)
        self.changed()
        if not self.cause_of_death:
            self._admit()

    def _settle(self, stream: FakeStream, reason: str) -> None:
        """What stays in a sequence: as the native engine leaves it."""
        turn = stream.turn
        if stream in self._queue or stream.kind != "generate":
            return
        said = [ord(character) for character in stream.reply.text[: stream.n_sent]]
        # The last token that was said is computed only if something comes after it.
        n_said = stream.n_sent if reason == "eos" else max(0, stream.n_sent - 1)
        n = stream.n_prompt + n_said if stream.started else stream.cached
        if not turn.sequence:
            if reason != "error" and stream.params.causal_attention:
                self.leave([*stream.tokens, *said][:n], turn.adapters)
            return
        if reason == "error" or (reason == "cancelled" and not turn.keep_on_cancel):
            n = min(n, turn.commit)
        stream.position = n
        held = [*stream.tokens, *said][:n]
        self.end(turn.sequence, held)

    def _values(self, kind: str, tokens: Sequence[int]) -> list[float]:
        if kind == "score":
            return [-1.0 - token % 7 for token in tokens[1:]]
        return [sum(token % modulus for token in tokens) / len(tokens) for modulus in (3, 5, 7, 11)]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    for n in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[len(text) - n :]):
            return n
    return 0
