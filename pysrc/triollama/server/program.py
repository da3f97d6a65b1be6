"""The server as a program: options, signals, and the way out."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import trio

from ..params import GenerationParams
from ..serving import open_llama
from .application import Server, by_itself
from .http import Limits

__all__ = ["run_server"]


async def run_server(
    model: str | Path | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 8080,
    adapters: Mapping[str, str | Path] | None = None,
    params: GenerationParams | None = None,
    limits: Limits | None = None,
    ready: Callable[[str], object] = print,
    llama: Mapping[str, Any] | None = None,
    **options: Any,
) -> None:
    """Serve a model until SIGTERM or SIGINT. The first lets the answers end that run (at most
    ``limits.drain_seconds``), a second one does not wait for them.

    model: a GGUF file; None: the embedded default model. adapters: files, by the names that clients
    choose them by. ready: called with a line that tells where it listens. llama: options of
    ``open_llama``. options: of Server. Raises what those raise, and OSError for the address.
    """
    opening = {"when_full": "raise", **(llama or {})}
    with by_itself():
        async with open_llama(model, **opening) as opened, trio.open_nursery() as nursery:
            files = (adapters or {}).items()
            loaded = {name: await opened.load_adapter(path) for name, path in files}
            server = Server(opened, adapters=loaded, params=params, limits=limits, **options)
            with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
                await opened.warm_up()

                async def listen(task_status: trio.TaskStatus[int]) -> None:
                    await server.run(host, port, task_status=task_status)
                    nursery.cancel_scope.cancel()

                bound = await nursery.start(listen)
                ready(f"listening on http://{f'[{host}]' if ':' in host else host}:{bound}")
                async for _ in signals:
                    server.drain()
                    async for _ in signals:
                        nursery.cancel_scope.cancel()
