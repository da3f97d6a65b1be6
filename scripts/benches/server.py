"""The server: tokens a second and first tokens through HTTP, over the library's own and others'."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import trio
from triollama.models import default_model
from triollama.server import serve

from ._harness import Figure, Options, Pairs
from ._upstream import server_program
from .streams import N_GEN, N_PROMPT, PARAMS, THREADS, prompt, serving

CLIENTS = {1: 41, 8: 25, 16: 15}
"""Numbers of clients, and repeats of each beside the library, which is close."""
REPEATS = 7
"""Beside other servers."""
N_ANSWER = 128
"""Tokens of an answer beside the library's. What a request costs before them is a figure of its
own; between servers answers are as short as the streams' of other sections."""
PROGRAM = Path(__file__).with_name("_http_program.py")
PEER_PROGRAM = Path(__file__).with_name("_peer_server.py")
STREAMS = 16
N_CELLS = 2048 * STREAMS

_fresh = itertools.count(5_000_000)


def bodies(n: int, n_gen: int = N_GEN) -> str:
    """Requests, one a line, that every server understands alike."""
    sampling = {name: getattr(PARAMS, name) for name in ("temperature", "top_k", "top_p", "min_p")}
    asked = {
        **sampling, "repeat_penalty": PARAMS.repeat_penalty, "ignore_eos": True,
        "max_tokens": n_gen, "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    prompts = [prompt(next(_fresh), N_PROMPT) for _ in range(n)]
    return "".join(json.dumps({"prompt": tokens, **asked}) + "\n" for tokens in prompts)


async def through_http(port: int, n: int, n_gen: int = N_GEN) -> dict[str, Any]:
    """What the clients' program says."""
    done = await trio.run_process(
        [sys.executable, str(PROGRAM), str(port)],
        stdin=bodies(n, n_gen).encode(),
        capture_stdout=True,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    if found["tokens"] != [n_gen] * n:
        raise RuntimeError(f"{found['tokens']} tokens came where {n_gen} each were asked for")
    return found


async def speed(port: int, n: int, n_gen: int = N_GEN) -> float:
    """Tokens a second of ``n`` clients, prompts included."""
    found = await through_http(port, n, n_gen)
    return float(n * (N_PROMPT + n_gen) / found["seconds"])


async def rest() -> None:
    """As long as the engine rests while the clients' program starts: threads that sleep need time
    to wake."""
    await trio.run_process([sys.executable, str(PROGRAM), "0"], stdin=b"", capture_stdout=True)


async def of_library(llama: Any, n: int) -> float:
    """The same, without a server: each piece is received, as a server has to."""
    await rest()

    async def one(tokens: list[int]) -> None:
        async with llama.stream(tokens, PARAMS, max_tokens=N_ANSWER) as stream:
            async for _ in stream:
                pass

    prompts = [prompt(next(_fresh), N_PROMPT) for _ in range(n)]
    async with trio.open_nursery() as nursery:
        start = time.perf_counter()
        for tokens in prompts:
            nursery.start_soon(one, tokens)
    return n * (N_PROMPT + N_ANSWER) / (time.perf_counter() - start)


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
    yield from trio.run(beside_library, options)
    commands = {"llama_server": upstream_command}
    if python := options.peers.get("xllamacpp"):
        commands["xllamacpp"] = functools.partial(xllamacpp_command, python)
    for name, command in commands.items():
        if options.wants(*(f"server.{n}_over_{name}" for n in CLIENTS)):
            yield from trio.run(beside_another, options, name, command)


@contextlib.asynccontextmanager
async def served() -> AsyncIterator[tuple[Any, int]]:
    async with serving() as llama, trio.open_nursery() as nursery:
        port = await nursery.start(functools.partial(serve, llama, port=0))
        yield llama, port
        nursery.cancel_scope.cancel()


async def beside_library(options: Options) -> list[Figure]:
    found: list[Figure] = []
    async with served() as (llama, port):
        for n, repeats in CLIENTS.items():
            name = f"server.{n}_over_library"
            if options.wants(name):
                pairs = await in_turn(
                    functools.partial(speed, port, n, N_ANSWER),
                    functools.partial(of_library, llama, n),
                    options.repeats_or(repeats),
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
    return found


def speeds(pairs: Pairs) -> str:
    ours, theirs = statistics.median(pairs.a), statistics.median(pairs.b)
    return f"{ours:.0f} against {theirs:.0f} tok/s"


async def first_token(port: int) -> float:
    return float((await through_http(port, 1, 2))["first"][0])


async def first_of_library(llama: Any) -> float:
    await rest()
    async with llama.stream(prompt(next(_fresh), N_PROMPT), PARAMS, max_tokens=2) as stream:
        start = time.perf_counter()
        await stream.receive()
        return time.perf_counter() - start


def upstream_command(port: int) -> Sequence[str]:
    """Upstream's server, with nothing to look up: no prompt begins as another does."""
    return [
        str(server_program()), "--model", str(default_model()), "--port", str(port),
        "--threads", str(THREADS), "--threads-batch", str(THREADS),
        "--ctx-size", str(N_CELLS), "--parallel", str(STREAMS), "--kv-unified",
        "--no-cache-prompt", "--cache-ram", "0",
    ]  # fmt: skip


def xllamacpp_command(python: str, port: int) -> Sequence[str]:
    words = (default_model(), port, STREAMS, N_CELLS, THREADS)
    return [python, str(PEER_PROGRAM), *map(str, words)]


async def beside_another(
    options: Options, name: str, command: Callable[[int], Sequence[str]]
) -> list[Figure]:
    """Our server over another, asked by the same clients. Both are loaded all the time, and idle
    while the other works."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        other = free.getsockname()[1]
    words = await trio.to_thread.run_sync(command, other)
    found: list[Figure] = []
    silent = subprocess.DEVNULL
    with subprocess.Popen(words, stdin=silent, stdout=silent, stderr=silent) as process:
        try:
            await until_healthy(other, process)
            async with served() as (_, port):
                for n in CLIENTS:
                    figure = f"server.{n}_over_{name}"
                    if options.wants(figure):
                        pairs = await in_turn(
                            functools.partial(speed, port, n),
                            functools.partial(speed, other, n),
                            options.repeats_or(REPEATS),
                        )
                        found.append(pairs.ratio(figure, target=1.0, note=speeds(pairs)))
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
    raise RuntimeError(f"{process.args!r} ended with {process.returncode}")
