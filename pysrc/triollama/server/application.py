"""The server: who may ask, what for, and what becomes of it."""

from __future__ import annotations

import contextlib
import hmac
import ipaddress
import logging
import re
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import msgspec
import trio

from ..checks import check_kind, shown
from ..engine.loaded import LoadedAdapter
from ..errors import ParameterError, StateWriteError
from ..params import GenerationParams
from . import metrics, page
from .anthropic import Anthropic
from .chats import Chats
from .events import event
from .faults import Fault, as_anthropic, as_openai, fault_of
from .http import Connections, GoneError, Limits, Reply, Request
from .openai import OpenAI
from .responses import Responses
from .service import Service

if TYPE_CHECKING:
    from ..llama import Llama

__all__ = ["Server", "by_itself", "serve"]

_log = logging.getLogger("triollama.server")

Answer = Callable[..., Awaitable[None]]


class Server:
    """A Llama behind HTTP: OpenAI's API and Anthropic's, health and metrics.

    llama: opened with ``when_full="raise"`` it refuses (429) what its queue has no room for,
        otherwise that waits.
    name: of the model, for clients; default: its file's.
    api_key: what clients have to know; without one the server listens to this machine alone.
    adapters: loaded ones, by the names that clients may choose them by.
    params: of answers, where a request does not say.
    folder: where conversations are kept, which clients name by the header ``X-Conversation-Id``;
        None: there are none.
    conversation: options of new ones, as for ``Llama.conversation``; ``overflow`` is
        "truncate_turns" unless it says otherwise.
    limits: see Limits. web: offer a page to chat with at ``/``.
    origins: of web pages elsewhere ("https://example.org") that may use it, by CORS.
    """

    def __init__(
        self,
        llama: Llama,
        *,
        name: str | None = None,
        api_key: str | None = None,
        adapters: Mapping[str, LoadedAdapter] | None = None,
        params: GenerationParams | None = None,
        folder: str | Path | None = None,
        conversation: Mapping[str, Any] | None = None,
        limits: Limits | None = None,
        web: bool = False,
        origins: Sequence[str] = (),
    ) -> None:
        self.limits = Limits() if limits is None else limits
        self.llama = llama
        named = name or Path(llama.model.path).stem or llama.model.metadata.get("general.name", "")
        if named in (adapters or {}):
            raise ParameterError(
                f"the model and an adapter are both called {shown(named)}: name one otherwise",
                parameter="adapters",
                value=adapters,
            )
        options = {"overflow": "truncate_turns", **(conversation or {})}
        self._chats = None if folder is None else Chats(llama, Path(folder), **options)
        self._service = Service(
            llama,
            name=named or "model",
            adapters=adapters or {},
            params=GenerationParams() if params is None else params,
            limits=self.limits,
            chats=self._chats,
        )
        check_kind("api_key", api_key, str, type(None))
        if api_key == "":  # everybody would have it
            raise ParameterError("api_key is empty", parameter="api_key", value=api_key)
        try:  # from the environment it may be any bytes
            self._key = None if api_key is None else api_key.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:
            raise ParameterError(
                "api_key has surrogates that stand for no byte", parameter="api_key"
            ) from None
        self._web = web
        self._origins = frozenset(map(check_origin, origins))
        self.connections = Connections(self.limits, self._handle)
        openai, anthropic = OpenAI(self._service), Anthropic(self._service)
        responses = Responses(self._service)
        routes: list[tuple[str, str, Answer]] = [
            ("POST", "/v1/chat/completions", openai.chat),
            ("POST", "/v1/completions", openai.complete),
            ("POST", "/v1/embeddings", openai.embed),
            ("GET", "/v1/models", openai.models),
            ("GET", "/v1/models/(.+)", openai.one_model),
            ("POST", "/v1/responses", responses.create),
            ("GET", "/v1/responses/([^/]+)", responses.get),
            ("DELETE", "/v1/responses/([^/]+)", responses.delete),
            ("POST", "/v1/messages", anthropic.messages),
            ("POST", "/v1/messages/count_tokens", anthropic.count),
            ("GET", "/conversations/([^/]+)", self._conversation),
            ("DELETE", "/conversations/([^/]+)", self._delete),
            ("POST", "/conversations/([^/]+)/fork", self._fork),
            ("POST", "/conversations/([^/]+)/rewind", self._rewind),
            ("GET", "/health", self._health),
            ("GET", "/metrics", self._metrics),
            *([("GET", "/", self._page)] if web else []),
        ]
        self._routes = [(method, re.compile(path), answer) for method, path, answer in routes]

    # Life

    async def run(
        self,
        host: str = "127.0.0.1",
        port: int = 8080,
        *,
        task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Listen until ``drain``; for a nursery: ``port = await nursery.start(server.run)``.

        port: 0 takes a free one. Raises ParameterError for a host that others can reach, without
        an API key; OSError if the address cannot be had.
        """
        if self._key is None and not is_loopback(host):
            raise ParameterError(
                f"{shown(host)} can be reached from other machines: give an api_key, or listen on "
                "127.0.0.1",
                parameter="host",
                value=host,
            )
        if not isinstance(port, int) or not 0 <= port <= 65535:
            why = f"port must be an integer from 0 to 65535, not {shown(port)}"
            raise ParameterError(why, parameter="port", value=port)
        try:
            listeners = await trio.open_tcp_listeners(port, host=host)
        except OSError as error:
            raise OSError(error.errno, error.strerror, f"{host}:{port}") from None
        try:
            with by_itself():
                async with trio.open_nursery() as nursery:
                    if self._chats is not None:
                        await nursery.start(self._chats.run)
                    task_status.started(listeners[0].socket.getsockname()[1])
                    await self.connections.serve(listeners)
                    nursery.cancel_scope.cancel()
        finally:
            for listener in listeners:
                listener.socket.close()

    def drain(self) -> None:
        """Take no more requests; ``run`` returns when those that are being answered have been, at
        the latest after ``limits.drain_seconds``."""
        self.connections.drain()

    # Requests

    async def _handle(self, request: Request, reply: Reply) -> None:
        started = time.monotonic()
        path = "other"  # of what is counted: not of anybody's choice
        status = 499
        try:
            try:
                if request.refused is not None:
                    raise request.refused
                self._check(request, reply)
                answer, found = self._route(request)
                path = re.sub(r"\(.*?\)", "*", found.re.pattern)
                with trio.move_on_after(self.limits.seconds) as scope:
                    await answer(request, reply, *found.groups())
                if scope.cancelled_caught:
                    raise Fault(504, f"an answer may take {self.limits.seconds:g} s here, not more")
            except Exception as error:
                fault = fault_of(error)
                if fault.status == 499:
                    raise GoneError from None
                if fault.status == 500:
                    _log.exception("%s %s failed", request.method, quote(request.path)[:200])
                await self._tell(fault, request, reply)
            status = reply.status
        except (trio.Cancelled, GoneError):
            self._service.metrics.dropped += 1
            raise
        finally:
            self._service.metrics.note(path, status)
            seconds = time.monotonic() - started
            # Quoted, or a path could make lines of its own.
            where = quote(request.path)[:200]
            _log.info("%s %s %d %.3f s", request.method, where, status, seconds)

    async def _tell(self, fault: Fault, request: Request, reply: Reply) -> None:
        """As a status of its own, or where an answer has begun already as its last event."""
        anthropic = request.path.startswith("/v1/messages")
        body = msgspec.json.encode((as_anthropic if anthropic else as_openai)(fault))
        if not reply.status:
            headers = [("retry-after", "1")] if fault.status in (429, 503) else []
            await reply.send(fault.status, body, "application/json", headers)
            return
        if reply.is_torn:
            raise GoneError
        if reply.kind == "text/event-stream":
            await reply.write(event(body, "error" if anthropic else ""))
            await reply.end()

    def _check(self, request: Request, reply: Reply) -> None:
        """Raises Fault for a client that may not ask."""
        origin = request.headers.get("origin")
        host = request.headers.get("host", "")
        if origin is not None:
            if origin in self._origins:
                reply.headers += [("access-control-allow-origin", origin), ("vary", "origin")]
            elif origin.partition("://")[2] != host:
                raise Fault(403, f"web pages of {origin} may not use this server")
        if self._key is None:
            # A page whose name was made to point at this machine would have an origin like ours.
            name = re.sub(r":\d+$", "", host).strip("[]").lower()
            if not is_loopback(name):
                raise Fault(403, f"this server has no API key, so it is not called {shown(name)}")
        elif request.method != "OPTIONS" and request.path not in ("/health", "/"):
            given = request.headers.get("x-api-key", "")
            scheme, _, token = request.headers.get("authorization", "").partition(" ")
            if scheme.lower() == "bearer":
                given = token.strip()
            # Headers were read as Latin-1; a client sends a key's UTF-8.
            if not hmac.compare_digest(given.encode("latin-1"), self._key):
                reply.headers.append(("www-authenticate", "Bearer"))
                raise Fault(401, "this server needs an API key, and this is not it")

    def _route(self, request: Request) -> tuple[Answer, re.Match[str]]:
        others = []
        asked = "GET" if request.method == "HEAD" else request.method
        for method, pattern, answer in self._routes:
            found = pattern.fullmatch(request.path)
            if found and asked == method:
                return answer, found
            if found and request.method == "OPTIONS" and self._origins:
                return self._options, found
            if found:
                others.append(method)
        if others:
            raise Fault(405, f"{request.path} takes {' and '.join(others)}, not {request.method}")
        raise Fault(404, f"there is nothing at {request.method} {request.path}")

    async def _options(self, request: Request, reply: Reply, *words: str) -> None:
        """May a page of another origin ask? The header that says so is there, or not."""
        headers = [
            ("access-control-allow-methods", "GET, POST, DELETE"),
            ("access-control-allow-headers", "*, authorization"),
            ("access-control-max-age", "600"),
        ]
        await reply.send(200, b"", "text/plain", headers)

    # Conversations

    def _kept(self) -> Chats:
        if self._chats is None:
            raise Fault(404, "this server keeps no conversations: it was given no folder for them")
        return self._chats

    async def _save(self) -> None:
        """What was changed. Raises Fault."""
        try:
            await self.llama.flush()
        except StateWriteError:
            why = "it is done, but cannot be saved now; the server goes on trying"
            raise Fault(507, why) from None

    async def _conversation(self, request: Request, reply: Reply, id: str) -> None:
        async with self._kept().open(id) as chat:
            body = {
                "id": chat.id,
                "title": chat.title,
                "parent": chat.parent or None,
                "turns": chat.n_turns,
                "tokens": chat.total_tokens,
                "messages": [message.for_template() for message in chat.messages],
            }
        await reply.send(200, msgspec.json.encode(body), "application/json")

    async def _delete(self, request: Request, reply: Reply, id: str) -> None:
        async with self._kept().open(id) as chat:
            chat.delete()
            await self._save()
        await reply.send(200, msgspec.json.encode({"id": id, "deleted": True}), "application/json")

    async def _fork(self, request: Request, reply: Reply, id: str) -> None:
        class Fork(msgspec.Struct, forbid_unknown_fields=True):
            id: str

        asked = msgspec.json.decode(request.body, type=Fork)
        async with self._kept().open(id) as chat:
            branch = await self._kept().fork(chat, asked.id)
            await self._save()
        body = {"id": branch.id, "parent": id, "turns": branch.n_turns}
        await reply.send(200, msgspec.json.encode(body), "application/json")

    async def _rewind(self, request: Request, reply: Reply, id: str) -> None:
        class Rewind(msgspec.Struct, forbid_unknown_fields=True):
            turns: int = 1

        asked = msgspec.json.decode(request.body, type=Rewind)
        async with self._kept().open(id) as chat:
            try:
                chat.rewind(asked.turns)
            except ParameterError:
                why = f"turns must be from 0 to {chat.n_turns}, not {asked.turns}"
                raise Fault(400, why, param="turns") from None
            await self._save()
            turns = chat.n_turns
        body = msgspec.json.encode({"id": id, "turns": turns})
        await reply.send(200, body, "application/json")

    # How it is

    async def _health(self, request: Request, reply: Reply) -> None:
        try:
            self.llama.statistics()
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            status, body = 503, {"status": "broken", "why": str(error)}
        else:
            draining = self.connections.draining
            status, body = (503, {"status": "draining"}) if draining else (200, {"status": "ok"})
        await reply.send(status, msgspec.json.encode(body), "application/json")

    async def _metrics(self, request: Request, reply: Reply) -> None:
        llama = self.llama
        gauges = {
            "cells_total": ("Positions of the KV cache.", llama.n_ctx * llama.max_streams),
            "connections": ("Open connections.", len(self.connections)),
            "requests": ("Requests that generate, or wait to.", self._service.answering),
        }
        text = self._service.metrics.text(llama.statistics(), gauges)
        await reply.send(200, text.encode(), metrics.KIND)

    async def _page(self, request: Request, reply: Reply) -> None:
        await reply.send(200, page.html(), "text/html; charset=utf-8", page.headers())


@contextlib.contextmanager
def by_itself() -> Iterator[None]:
    """An error that comes alone out of a nursery of ours is no group."""
    try:
        yield
    except BaseExceptionGroup as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
            error = error.exceptions[0]
        raise error from error.__cause__


def check_origin(origin: str) -> str:
    """As browsers send it. Raises ParameterError for what no browser would."""
    if not isinstance(origin, str) or not re.fullmatch(r"null|[a-z][a-z0-9+.-]*://[^/?#]+", origin):
        raise ParameterError(
            f"an origin is a scheme and a host, as 'https://example.org', not {shown(origin)}",
            parameter="origins",
            value=origin,
        )
    return origin


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens there."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


async def serve(
    llama: Llama,
    host: str = "127.0.0.1",
    port: int = 8080,
    *,
    task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED,
    **options: Any,
) -> None:
    """Serve until cancelled: ``port = await nursery.start(serve, llama)``. Options: of Server."""
    await Server(llama, **options).run(host, port, task_status=task_status)
