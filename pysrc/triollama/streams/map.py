"""One question asked of any number of prompts."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import msgspec
import trio

from ..answers import Structured
from ..checks import check_kind, shown
from ..engine.core import Core
from ..errors import ParameterError, TriollamaError
from .stream import Stream

__all__ = ["MapResult", "MapResults"]

T = TypeVar("T")
Prompt = str | Iterable[int]


class MapResult(msgspec.Struct, Generic[T], frozen=True, kw_only=True):
    """What came of one prompt: ``result``, or the ``error`` that it failed with.

    ``index``: of the prompt, from 0. ``result``: a Completion, or with ``into`` a value.
    """

    index: int
    result: T | None = None
    error: Exception | None = None

    def unwrap(self) -> T:
        """The result; raises the error."""
        if self.error is not None:
            raise self.error
        return self.result  # type: ignore[return-value]  # None only if that is the value


class MapResults(trio.abc.ReceiveChannel[MapResult[T]]):
    """The results of :meth:`Llama.map`, to be used in ``async with`` and iterated over.

    Needs no task of its own: what runs is an engine's stream for each of the next prompts, and
    ``receive`` starts as many as it takes away. Leaving ends those that run.
    """

    def __init__(
        self,
        core: Core,
        prompts: Iterable[Prompt],
        make_stream: Callable[[Prompt], Stream],
        kind: Structured[Any] | None,
        *,
        ordered: bool,
        at_once: int | None,
        start: int,
    ) -> None:
        check_kind("ordered", ordered, bool)
        for name, value, low in (("at_once", at_once, 1), ("start", start, 0)):
            if value is None and name == "at_once":
                continue
            number = isinstance(value, int) and not isinstance(value, bool)
            if not number or not low <= int(value or 0) <= sys.maxsize:
                raise ParameterError(
                    f"{name} must be an integer from {low} on, not {shown(value)}",
                    parameter=name,
                    value=value,
                )
        if isinstance(prompts, (str, bytes)) or not isinstance(prompts, Iterable):
            raise ParameterError(
                f"prompts must be an iterable of prompts, not {type(prompts).__name__}",
                parameter="prompts",
                value=prompts,
            )
        self._core = core
        self._prompts: Iterator[tuple[int, Prompt]] = itertools.islice(
            enumerate(prompts), start, None
        )
        self._make_stream = make_stream
        self._kind = kind
        self._ordered = ordered
        self._at_once = 2 * core.max_streams if at_once is None else at_once
        self._next: tuple[int, Stream | Exception] | None = None  # not started yet
        self._started: dict[int, Stream | Exception] = {}  # and not received yet, in order
        self._receiving = False
        self._closed = False

    @trio.lowlevel.enable_ki_protection
    async def receive(self) -> MapResult[T]:
        """The next result: in the order of the prompts, or as they come. If this raises
        ``Cancelled``, none was lost.

        Raises EndOfChannel after the last; what iterating over the prompts raises;
        ClosedResourceError and BrokenResourceError as a stream does.
        """
        self._core.check_run()
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._receiving:
            raise trio.BusyResourceError("another task is receiving from this")
        self._receiving = True
        try:
            while True:
                self._check_open()
                await self._start_more()
                self._check_open()
                if not self._started:
                    await trio.lowlevel.cancel_shielded_checkpoint()
                    raise trio.EndOfChannel
                index = self._find_done()
                if index is not None:
                    break
                await self._core.news_of(*self._streams())
        finally:
            self._receiving = False
        found = self._take(index)
        await trio.lowlevel.cancel_shielded_checkpoint()
        return found

    def _check_open(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError("this was closed")
        self._core.check_open()

    async def _start_more(self) -> None:
        while len(self._started) < self._at_once:
            if self._next is None:
                self._next = self._make_next()
            if self._next is None:
                return
            index, started = self._next
            if isinstance(started, Stream):
                try:
                    await started.__aenter__()
                except TriollamaError as error:
                    started = error
            self._started[index] = started
            self._next = None
            if self._closed:  # meanwhile, by another task
                self.release()

    def _make_next(self) -> tuple[int, Stream | Exception] | None:
        """A prompt is looked at once: it may be an iterator."""
        found = next(self._prompts, None)
        if found is None:
            return None
        index, prompt = found
        try:
            return index, self._make_stream(prompt)
        except TriollamaError as error:
            return index, error

    def _streams(self) -> list[Any]:
        return [one.engine_stream for one in self._started.values() if isinstance(one, Stream)]

    def _find_done(self) -> int | None:
        for index, one in self._started.items():
            if isinstance(one, Exception) or one.finish_reason is not None:
                return index
            if self._ordered:
                return None
        return None

    def _take(self, index: int) -> MapResult[T]:
        one = self._started.pop(index)
        if isinstance(one, Exception):
            return MapResult(index=index, error=one)
        try:
            one.read_rest()
            if self._kind is None:
                result: Any = one.completion()
            else:
                result = self._kind.parse(one.text, one.finish_reason or "")
            return MapResult(index=index, result=result)
        except trio.BrokenResourceError:
            raise
        except Exception as error:
            return MapResult(index=index, error=error)
        finally:
            one.release()

    def release(self) -> None:
        """What ``aclose`` does, without a checkpoint."""
        self._closed = True
        for one in self._started.values():
            if isinstance(one, Stream):
                one.release()
        self._started.clear()

    async def __aenter__(self) -> Self:
        await self._core.begin()
        return self

    @trio.lowlevel.enable_ki_protection
    async def aclose(self) -> None:
        """End what runs. Idempotent."""
        self._core.check_run()
        self.release()
        await trio.lowlevel.checkpoint()

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
