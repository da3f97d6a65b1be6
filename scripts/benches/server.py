"""The server: tokens a second and first tokens through HTTP, over the library's own and others'."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import trio
from triollama.models import default_model
from triollama.server import serve

from ._harness import Figure, Options, Pairs
from .streams import N_GEN, N_PROMPT, PARAMS, THREADS, prompt, serving

CLIENTS = (1, 8, 16)
PROGRAM = Path(__file__).with_name("_http_program.py")

_fresh = itertools.count(5_000_000)


def bodies(n: int, n_gen: int = N_GEN) -> str:
    """Requests, one a line, that every server understands alike."""
    sampling = {name: getattr(PARAMS, name) for name in ("temperature", "top_k", "top_p", "min_p")}
    asked = {**sampling, "repeat_penalty": PARAMS.repeat_penalty, "ignore_eos": True}
    return "".join(
        json.dumps({
            "prompt": prompt(next(_fresh), N_PROMPT), "max_tokens": n_gen, "stream": True, **asked
        }) + "\n"
        for _ in range(n)
    )  # fmt: skip


async def through_http(port: int, n: int, n_gen: int = N_GEN) -> dict[str, Any]:
    """What the clients' program says."""
    done = await trio.run_process(
        [sys.executable, str(PROGRAM), str(port)],
        stdin=bodies(n, n_gen).encode(),
        capture_stdout=True,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


async def speed(port: int, n: int) -> float:
    """Tokens a second of ``n`` clients, prompts included."""
    found = await through_http(port, n)
    return float(n * (N_PROMPT + N_GEN) / found["seconds"])


async def of_library(llama: Any, n: int) -> float:
    """The same, without a server: each piece is received, as a server has to."""

    async def one(tokens: list[int]) -> None:
        async with llama.stream(tokens, PARAMS) as stream:
            async for _ in stream:
                pass

    prompts = [prompt(next(_fresh), N_PROMPT) for _ in range(n)]
    async with trio.open_nursery() as nursery:
        start = time.perf_counter()
        for tokens in prompts:
            nursery.start_soon(one, tokens)
    return n * (N_PROMPT + N_GEN) / (time.perf_counter() - start)


async def in_turn(
    a: Callable[[], Awaitable[float]], b: Callable[[], Awaitable[float]], repeats: int
) -> Pairs:
    """``interleave``, for what runs in trio."""
    await a()
    await b()
    found: list[tuple[float, float]] = []
    for i in range(repeats):
        if i % 2:
            second, first = await b(), await a()
        else:
            first, second = await a(), await b()
        found.append((first, second))
    return Pairs(tuple(one for one, _ in found), tuple(other for _, other in found))


def figures(options: Options) -> Iterator[Figure]:
    yield from trio.run(measure, options)


@contextlib.asynccontextmanager
async def served() -> AsyncIterator[tuple[Any, int]]:
    async with serving() as llama, trio.open_nursery() as nursery:
        port = await nursery.start(functools.partial(serve, llama, port=0))
        yield llama, port
        nursery.cancel_scope.cancel()


async def measure(options: Options) -> list[Figure]:
    found: list[Figure] = []
    async with served() as (llama, port):
        for n in CLIENTS:
            name = f"server.{n}_over_library"
            if options.wants(name):
                pairs = await in_turn(
                    functools.partial(speed, port, n),
                    functools.partial(of_library, llama, n),
                    options.repeats_or(11),
                )
                found.append(pairs.ratio(name, target=0.97, note=speeds(pairs)))
        if options.wants("server.first_token_added"):
            pairs = await in_turn(
                functools.partial(first_token, port),
                functools.partial(first_of_library, llama),
                options.repeats_or(51),
            )
            found.append(pairs.difference(
                "server.first_token_added", "ms", scale=1e3, target=2.0,
                note=f"{statistics.median(pairs.b) * 1e3:.1f} ms without a server",
            ))  # fmt: skip
        names = [f"server.{n}_over_llama_server" for n in CLIENTS]
        if options.wants(*names):
            found += await beside_llama_server(options, port)
    return found


def speeds(pairs: Pairs) -> str:
    ours, theirs = statistics.median(pairs.a), statistics.median(pairs.b)
    return f"{ours:.0f} against {theirs:.0f} tok/s"


async def first_token(port: int) -> float:
    return float((await through_http(port, 1, 2))["first"][0])


async def first_of_library(llama: Any) -> float:
    done = await llama.generate(prompt(next(_fresh), N_PROMPT), PARAMS, max_tokens=2)
    return float(done.usage.first_token_seconds)


async def beside_llama_server(options: Options, port: int) -> list[Figure]:
    """Our server over upstream's, asked by the same clients. Both are loaded all the time, and idle
    while the other works."""
    from ._upstream import server_program

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        other = free.getsockname()[1]
    command = [
        str(await trio.to_thread.run_sync(server_program)), "--model", str(default_model()),
        "--port", str(other), "--threads", str(THREADS), "--threads-batch", str(THREADS),
        "--ctx-size", str(2048 * 16), "--parallel", "16", "--kv-unified",
    ]  # fmt: skip
    found: list[Figure] = []
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=dict(os.environ)
    ) as process:
        try:
            await until_healthy(other, process)
            for n in CLIENTS:
                name = f"server.{n}_over_llama_server"
                if options.wants(name):
                    pairs = await in_turn(
                        functools.partial(speed, port, n),
                        functools.partial(speed, other, n),
                        options.repeats_or(11),
                    )
                    found.append(pairs.ratio(name, target=1.0, note=speeds(pairs)))
        finally:
            process.kill()
    return found


async def until_healthy(port: int, process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None:
        with contextlib.suppress(OSError):
            stream = await trio.open_tcp_stream("127.0.0.1", port)
            async with stream:
                await stream.send_all(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
                if b" 200 " in await stream.receive_some():
                    return
        await trio.sleep(0.2)
    raise RuntimeError(f"llama-server ended with {process.returncode}")
