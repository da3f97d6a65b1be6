"""Servers on loopback sockets, over the fake engine or a tiny model, for tests in trio."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import h11
import trio
import triollama
from triollama.server import Server
from triollama.testing import FakeEngine, open_fake_llama

PATIENCE = 60.0
"""Seconds in which everything here happens."""


class Scripted(FakeEngine):
    """Answers by a script, at once, and notes what was asked: ``prompts`` and ``params``."""

    def __init__(self, reply: Any = "Hello there.", **settings: Any) -> None:
        self.prompts: list[str] = []
        self.params: list[triollama.GenerationParams] = []
        script = reply if callable(reply) else lambda prompt: reply
        times = {"token_seconds": 0.0, "prompt_token_seconds": 0.0}
        super().__init__(script, **{**times, **settings})

    def submit(
        self, tokens: Sequence[int], sampler: Any, params: triollama.GenerationParams, **more: Any
    ) -> Any:
        stream = super().submit(tokens, sampler, params, **more)
        self.prompts.append(self.detokenize(tokens))
        self.params.append(params)
        return stream


@dataclass
class Answer:
    """Of a server."""

    status_code: int
    headers: dict[str, str]
    content: bytes

    @property
    def text(self) -> str:
        return self.content.decode()

    def json(self) -> Any:
        return json.loads(self.content)


class Site:
    """A server that runs, and clients for it."""

    def __init__(self, server: Server, llama: triollama.Llama, port: int) -> None:
        self.server = server
        self.llama = llama
        self.port = port
        self.url = f"http://127.0.0.1:{port}"

    def openai(self, **options: Any) -> Any:
        import openai

        settings: dict[str, Any] = {"api_key": "none", "max_retries": 0, **options}
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", **settings)

    def anthropic(self, **options: Any) -> Any:
        import anthropic

        settings: dict[str, Any] = {"api_key": "none", "max_retries": 0, **options}
        return anthropic.AsyncAnthropic(base_url=self.url, **settings)

    async def get(self, path: str, **options: Any) -> Answer:
        return await self.ask("GET", path, **options)

    async def post(self, path: str, body: Any = None, **options: Any) -> Answer:
        return await self.ask("POST", path, content=json.dumps(body).encode(), **options)

    async def ask(
        self, method: str, path: str, *, content: bytes = b"", headers: Any = None
    ) -> Answer:
        """A request on a connection of its own, and its answer."""
        http = h11.Connection(h11.CLIENT)
        fields = {"host": self.url[7:], "content-length": str(len(content)), "connection": "close"}
        fields |= headers or {}
        head = h11.Request(method=method, target=path, headers=list(fields.items()))
        async with await self.connect() as stream:
            parts = (http.send(head), http.send(h11.Data(content)), http.send(h11.EndOfMessage()))
            await stream.send_all(b"".join(part or b"" for part in parts))
            answer, body = None, b""
            while not isinstance(event := http.next_event(), h11.EndOfMessage):
                if event is h11.NEED_DATA:
                    http.receive_data(await stream.receive_some())
                elif isinstance(event, h11.Data):
                    body += event.data
                else:
                    assert isinstance(event, h11.Response)
                    answer = event
        assert answer is not None
        found = {name.decode(): value.decode("latin-1") for name, value in answer.headers}
        return Answer(answer.status_code, found, body)

    async def connect(self) -> trio.SocketStream:
        return await trio.open_tcp_stream("127.0.0.1", self.port)

    async def send(self, body: Any, path: str = "/v1/chat/completions") -> trio.SocketStream:
        """A request on a connection of its own, whose answer is not read yet."""
        stream = await self.connect()
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
        await stream.send_all(head.encode() + data)
        return stream

    async def until(self, condition: Callable[[triollama.Statistics], bool]) -> None:
        """Until the engine's statistics are so."""
        while not condition(self.llama.statistics()):
            await trio.sleep(0.001)


@contextlib.asynccontextmanager
async def site(llama: triollama.Llama, **options: Any) -> AsyncIterator[Site]:
    """A server for a Llama, until the block is left."""
    async with trio.open_nursery() as nursery:
        server = Server(llama, **{"name": "tiny", **options})

        async def run(task_status: trio.TaskStatus[int]) -> None:
            await server.run(port=0, task_status=task_status)

        yield Site(server, llama, await nursery.start(run))
        nursery.cancel_scope.cancel()


def run_fake(
    test: Callable[[Site], Awaitable[None]],
    engine: FakeEngine | None = None,
    *,
    when_full: Any = "raise",
    **options: Any,
) -> None:
    """A test of a server over the fake engine."""

    async def main() -> None:
        with trio.fail_after(PATIENCE):
            opened = open_fake_llama(engine or Scripted(), when_full=when_full)
            async with opened as llama, site(llama, **options) as served:
                await test(served)

    trio.run(main)


def run_native(
    test: Callable[[Site], Awaitable[None]], path: Any, *, opening: Any = None, **options: Any
) -> None:
    """A test of a server over a model."""
    settings = {"n_ctx": 512, "max_streams": 4, "threads": 1, "deterministic": True}

    async def main() -> None:
        with trio.fail_after(PATIENCE):
            opened = triollama.open_llama(
                path, when_full="raise", **{**settings, **(opening or {})}
            )
            async with opened as llama, site(llama, **options) as served:
                await test(served)

    trio.run(main)
