"""Clients that go away at random moments, beside others that stay.

    python tests/server/disconnects.py MODEL.gguf DISCONNECTS SEED

Requests of every kind are left while they are sent, while they wait, in a prompt, between tokens,
politely or not. In the end nothing is left of them: no stream, no place taken, no connection, no
task, no descriptor. Who stayed has got, to the byte, what one gets who is alone.
"""

from __future__ import annotations

import functools
import json
import os
import random
import socket
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import trio
import triollama
from triollama.server import Limits, Server

GONE = (trio.BrokenResourceError, trio.ClosedResourceError, ConnectionError)
RESET = b"\1\0\0\0\0\0\0\0"  # of SO_LINGER: closing sends RST

STAYS = {"prompt": "Once upon a time", "temperature": 0, "max_tokens": 12, "ignore_eos": True}


class Campaign:
    """Disconnects from a server in this process."""

    def __init__(self, server: Server, port: int, *, seed: int) -> None:
        self._port = port
        self._server = server
        self._llama = server.llama
        self._rng = random.Random(seed)
        self._expected = b""
        self._count = dict.fromkeys(("dropped", "answered", "neighbours", "disturbed", "leaked"), 0)
        self.left: dict[str, int] = {}
        """What is there that should not be, at the end of the last run."""
        self.seconds: list[float] = []
        """From a client's going to its stream's end, of those that were alone."""

    async def run(self, n: int, *, clients: int) -> None:
        """``n`` disconnects, from some clients at a time."""
        _, self._expected = await self._whole()
        descriptors = _descriptors()
        async with trio.open_nursery() as nursery:
            stay = trio.CancelScope()
            nursery.start_soon(self._stay, stay)
            async with trio.open_nursery() as going:
                for _ in range(clients):
                    going.start_soon(self._go, n)
            stay.cancel()
        await self._settle()
        now = self._llama.statistics()
        self.left = {
            "streams": now.running + now.prefilling + now.parked + now.queued,
            "active": len(self._llama.active()),
            "places": self._llama.max_streams - now.slots_free,
            "connections": len(self._server.connections),
            "descriptors": max(0, _descriptors() - descriptors),
        }
        self._count["leaked"] = sum(self.left.values())

    def found(self) -> dict[str, int]:
        """What happened."""
        return dict(self._count)

    async def _settle(self) -> None:
        """What was told to end has ended, and the server has noticed every connection's end."""
        llama = self._llama
        with trio.move_on_after(300):  # for those, too, who had gone before they were accepted
            while (
                llama.active()
                or llama.statistics().slots_free < llama.max_streams
                or len(self._server.connections)
            ):
                await trio.sleep(0.01)

    # Those who stay

    async def _whole(self) -> tuple[int, bytes]:
        async with await self._connect() as stream:
            await stream.send_all(_request("/v1/completions", STAYS))
            data = b""
            while more := await stream.receive_some():
                data += more
        head, _, body = data.partition(b"\r\n\r\n")
        if not head:
            return 0, b""
        status = int(head.split(b" ")[1])
        return status, json.loads(body)["choices"][0]["text"].encode() if status == 200 else b""

    async def _stay(self, scope: trio.CancelScope) -> None:
        with scope:
            while True:
                status, text = await self._whole()
                if status == 200:
                    self._count["neighbours"] += 1
                    self._count["disturbed"] += text != self._expected

    # Those who go

    async def _go(self, n: int) -> None:
        while self._count["dropped"] < n:
            try:
                await self._visit()
            except GONE:
                self._count["dropped"] += 1

    async def _visit(self) -> None:
        rng = self._rng
        path, body = self._any_request()
        data = _request(path, body, keep=True)
        stream = await self._connect()
        reset = rng.random() < 0.3
        if reset:
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        async with stream:
            if rng.random() < 0.1:
                await stream.send_all(data[: rng.randrange(len(data))])
            else:
                await stream.send_all(data)
                if rng.random() < 0.6:
                    await trio.sleep(rng.expovariate(1 / 0.01))
                received = 0
                for _ in range(rng.choice((0, 0, 1, 2, 5))):
                    with trio.move_on_after(0.05):
                        received += len(await stream.receive_some())
                if received and rng.random() < 0.1:
                    await stream.send_eof()
        self._count["dropped"] += 1

    def _any_request(self) -> tuple[str, dict[str, Any]]:
        rng = self._rng
        text = "word " * rng.choice((1, 5, 40))
        body: dict[str, Any] = {
            "stream": rng.random() < 0.7, "temperature": rng.choice((0, 1)), "ignore_eos": True,
            "max_tokens": rng.choice((1, 8, 200)),
        }  # fmt: skip
        kind = rng.randrange(6)
        if kind == 0:
            return "/v1/completions", {**body, "prompt": [text, text + "x"]}
        if kind == 1:
            return "/v1/embeddings", {"input": [text] * rng.choice((1, 8))}
        if kind == 5:
            body["max_output_tokens"] = body.pop("max_tokens")
            return "/v1/responses", {**body, "input": text}
        message = {"role": "user", "content": text}
        if kind == 2:
            return "/v1/messages", {**body, "model": "", "messages": [message]}
        if kind == 3:
            body["n"] = rng.choice((1, 2))
        return "/v1/chat/completions", {**body, "messages": [message]}

    async def _connect(self) -> trio.SocketStream:
        return await trio.open_tcp_stream("127.0.0.1", self._port)

    # How fast

    async def measure(self, n: int) -> None:
        """Nobody else is there: seconds until a stream has ended whose client went."""
        for _ in range(n):
            body = {"prompt": "word " * 20, "stream": True, "max_tokens": 400, "ignore_eos": True}
            stream = await self._connect()
            await stream.send_all(_request("/v1/completions", body))
            await stream.receive_some()
            while not (running := list(self._llama._core.streams.values())):
                await trio.sleep(0)
            inner = running[0].engine_stream
            await trio.sleep(self._rng.random() * 0.005)
            if inner.finish_reason is not None:
                raise RuntimeError("the answer had ended before its client went")
            start = time.monotonic()
            await stream.aclose()
            await self._llama._core.end_of(inner)  # parked: who spins takes the engine's core
            self.seconds.append(inner.usage["finished_ns"] / 1e9 - start)


def _request(path: str, body: dict[str, Any], *, keep: bool = False) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n"
    return (head + ("" if keep else "Connection: close\r\n") + "\r\n").encode() + data


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


async def drive(model: Path, n: int, seed: int) -> int:
    """A whole campaign; the exit status."""
    options = {"n_ctx": 512, "max_streams": 4, "max_queue": 32, "deterministic": True}
    with tempfile.TemporaryDirectory() as folder:
        async with (
            triollama.open_llama(model, threads=1, when_full="raise", **options) as llama,
            trio.open_nursery() as nursery,
        ):
            server = Server(llama, folder=folder, limits=Limits(requests=64))

            async def run(task_status: trio.TaskStatus[int]) -> None:
                await server.run(port=0, task_status=task_status)

            campaign = Campaign(server, await nursery.start(run), seed=seed)
            await campaign.measure(500)
            await campaign.run(n // 10, clients=24)
            memory = _resident()
            start = time.perf_counter()
            await campaign.run(n, clients=24)
            seconds = time.perf_counter() - start
            found = campaign.found()
            print(json.dumps(found), f"{seconds:.0f} s; left:", json.dumps(campaign.left))
            print(
                f"resident: {memory / 1e6:.1f} MB after a tenth, {_resident() / 1e6:.1f} at the end"
            )
            times = sorted(seconds * 1e3 for seconds in campaign.seconds)
            print(
                f"from going to free, of {len(times)}: median {statistics.median(times):.2f} ms,"
                f" 99 of 100 within {times[len(times) * 99 // 100]:.2f} ms"
            )
            nursery.cancel_scope.cancel()
    return 1 if found["leaked"] or found["disturbed"] else 0


if __name__ == "__main__":
    sys.exit(trio.run(functools.partial(drive, Path(sys.argv[1]), *map(int, sys.argv[2:4]))))
