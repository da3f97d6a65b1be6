"""triollama for asyncio programs: the same objects, awaited there::

    from triollama.aio import open_llama

    async with open_llama("model.gguf", max_streams=8) as llama:
        async with llama.stream("Once upon a time", max_tokens=200) as stream:
            async for piece in stream:
                print(piece.text, end="")
        async with asyncio.timeout(2):
            done = await llama.generate("The capital of France is")

trio runs as the guest of asyncio's loop, in the same thread. What ``open_llama`` gives has every
method of :class:`triollama.Llama`, and so have its streams and conversations; type checkers take
them for those. When a task is cancelled in one of them, what it waits for is cancelled in trio, and
the task goes on, with CancelledError, once that has ended. A turn that was committed in that very
moment stays: a conversation's ``n_turns`` tells. Tools that are async functions run in asyncio.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import os
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterator, ValuesView
from types import TracebackType
from typing import Any, cast

import trio

from .conversation.conversation import Conversation
from .conversation.registry import Conversations
from .errors import BusyError
from .llama import Llama
from .reranking import Reranker
from .reranking import open_reranker as _open_reranker
from .serving import open_llama as _open_llama
from .streams.map import MapResults
from .streams.partials import Partials
from .streams.stream import Stream

__all__ = ["open_llama", "open_reranker"]


class _Guest:
    """A trio program beside the tasks of asyncio's loop, in which a Llama or a Reranker is open."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._nursery: trio.Nursery | None = None
        self._scope = trio.CancelScope()
        self._over: asyncio.Future[None] = self._loop.create_future()

    async def start(self, opening: Any) -> Any:
        """Enter ``opening``, and stay there until ``stop``."""
        opened: asyncio.Future[Any] = self._loop.create_future()

        async def main() -> None:
            with self._scope:
                async with opening as it:
                    try:
                        async with trio.open_nursery() as self._nursery:
                            opened.set_result(it)
                            await trio.sleep_forever()
                    finally:
                        self._nursery = None

        def done(outcome: Any) -> None:
            error = getattr(outcome, "error", None)
            if error is None:
                self._over.set_result(None)
            else:
                self._over.set_exception(error)

        trio.lowlevel.start_guest_run(
            main,
            run_sync_soon_threadsafe=self._loop.call_soon_threadsafe,
            done_callback=done,
            host_uses_signal_set_wakeup_fd=True,
        )
        try:
            await asyncio.wait((opened, self._over), return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            await self.stop()
            raise
        if self._over.done():
            self._over.result()
        return opened.result()

    async def stop(self) -> None:
        """End it, with whatever runs there, also if this is cancelled meanwhile."""
        self._scope.cancel()
        await _through(self._over)
        self._over.result()

    async def call(
        self,
        function: Callable[[], Awaitable[Any]],
        late: Callable[[Any], object] | None = None,
    ) -> Any:
        """Run it in trio. A cancellation here cancels it there, and waits for its end. ``late``
        gets the result, if there is one all the same."""
        if asyncio.get_running_loop() is not self._loop:
            raise BusyError("this belongs to another event loop, the one that opened it")
        if self._nursery is None:
            raise trio.ClosedResourceError("this was closed")
        ended: asyncio.Future[None] = self._loop.create_future()
        scope = trio.CancelScope()
        results: list[Any] = []
        error: BaseException = trio.ClosedResourceError("this was closed")

        async def run() -> None:
            nonlocal error
            try:
                with scope:
                    results.append(await function())
            except trio.Cancelled:  # with everything that runs there
                raise
            except BaseException as caught:
                error = caught
            finally:
                ended.set_result(None)

        self._nursery.start_soon(run)
        try:
            await asyncio.shield(ended)
        except asyncio.CancelledError:
            scope.cancel()
            try:
                await _through(ended)
            finally:  # also if that was cancelled once more
                if results and late is not None:
                    late(results[0])
            raise
        if not results:
            raise error
        return results[0]


async def _through(future: asyncio.Future[None]) -> None:
    """Wait for it, and be cancelled only then."""
    cancelled: asyncio.CancelledError | None = None
    while not future.done():
        try:
            await asyncio.shield(future)
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled


class _There:
    """An object of trio's side, as asyncio's sees it."""

    def __init__(self, guest: _Guest, it: Any) -> None:
        self._guest = guest
        self._it = it
        self._late: list[Any] = []  # received for somebody who was cancelled

    def __repr__(self) -> str:
        return f"<in asyncio: {self._it!r}>"

    def __dir__(self) -> list[str]:
        return dir(self._it)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._it, name)
        if not inspect.ismethod(value):
            return _here(self._guest, value)

        def method(*args: Any, **options: Any) -> Any:
            given = {key: _there(one) for key, one in options.items()}
            call = functools.partial(value, *map(_there, args), **given)
            if inspect.iscoroutinefunction(value):
                return self._receive() if name == "receive" else self._call(call)
            return _here(self._guest, call())

        return method

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("_guest", "_it", "_late"):
            super().__setattr__(name, value)
        else:
            setattr(self._it, name, _there(value))

    async def _call(self, function: Callable[[], Awaitable[Any]]) -> Any:
        return _here(self._guest, await self._guest.call(function))

    async def _receive(self) -> Any:
        if self._late:
            return self._late.pop()
        return await self._guest.call(self._it.receive, self._late.append)

    async def __aenter__(self) -> Any:
        entered: list[Any] = []
        try:
            await self._guest.call(self._it.__aenter__, entered.append)
        except asyncio.CancelledError as error:
            try:
                if entered:  # nobody else will leave it
                    await self.__aexit__(type(error), error, error.__traceback__)
            finally:
                raise error
        return self

    async def __aexit__(self, *exc: Any) -> Any:
        return await self._guest.call(functools.partial(self._it.__aexit__, *exc))

    def __aiter__(self) -> Any:
        return self

    async def __anext__(self) -> Any:
        try:
            return await self._receive()
        except trio.EndOfChannel:
            raise StopAsyncIteration from None

    def __reduce__(self) -> Any:
        raise TypeError("what is open in an event loop can be neither copied nor pickled")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _There) and other._it is self._it

    def __hash__(self) -> int:
        return hash(self._it)

    def __iter__(self) -> Iterator[Any]:
        return (_here(self._guest, one) for one in self._it)

    def __len__(self) -> int:
        return len(self._it)

    def __getitem__(self, key: Any) -> Any:
        return _here(self._guest, self._it[key])

    def __contains__(self, key: Any) -> bool:
        return _there(key) in self._it


_KINDS = (Conversation, Conversations, Llama, MapResults, Partials, Stream)


def _here(guest: _Guest, value: Any) -> Any:
    if isinstance(value, _KINDS):
        return _There(guest, value)
    if isinstance(value, list) and value and isinstance(value[0], _KINDS):
        return [_There(guest, one) for one in value]
    return value


def _there(value: Any) -> Any:
    if isinstance(value, _There):
        return value._it
    if type(value) in (list, tuple, set, frozenset):
        return type(value)(map(_there, value))
    if isinstance(value, (Generator, ValuesView)):
        return map(_there, value)
    return _called_there(value) if inspect.iscoroutinefunction(value) else value


def _called_there(function: Callable[..., Coroutine[Any, Any, Any]]) -> Any:
    """A function of asyncio's, a tool, that trio's side may call."""
    loop = asyncio.get_running_loop()

    @functools.wraps(function)
    async def call(*args: Any, **options: Any) -> Any:
        task = loop.create_task(function(*args, **options))
        ended = trio.Event()
        task.add_done_callback(lambda _: ended.set())
        try:
            await ended.wait()
        except BaseException:
            task.cancel()
            with trio.CancelScope(shield=True):
                await ended.wait()
            raise
        return task.result()

    return call


class _Opening:
    """What is open in trio while its block runs."""

    def __init__(self, opening: Any) -> None:
        self._opening = opening

    async def _open(self) -> Any:
        self._guest = _Guest()
        return _There(self._guest, await self._guest.start(self._opening))

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._guest.stop()


class open_llama(_Opening):
    """``triollama.open_llama`` for asyncio, with the same arguments and errors."""

    def __init__(self, path: str | os.PathLike[str] | None = None, **options: Any) -> None:
        super().__init__(_open_llama(path, **options))

    async def __aenter__(self) -> Llama:
        return cast(Llama, await self._open())


class open_reranker(_Opening):
    """``triollama.open_reranker`` for asyncio, with the same arguments and errors."""

    def __init__(self, path: str | os.PathLike[str], **options: Any) -> None:
        super().__init__(_open_reranker(path, **options))

    async def __aenter__(self) -> Reranker:
        return cast(Reranker, await self._open())
