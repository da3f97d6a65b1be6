"""HTTP/1.1 for trio: h11 speaks it, a connection is a task, and so is each request on it.

While a request is answered its connection is listened to: when the other side goes away, the
answer is cancelled at once, wherever it is.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Awaitable, Callable, Sequence
from email.utils import formatdate
from functools import partial
from urllib.parse import unquote

import h11
import msgspec
import trio

from ..checks import check_count, shown
from ..errors import ParameterError

__all__ = [
    "Connections",
    "GoneError",
    "Handler",
    "Headers",
    "Limits",
    "RefusedError",
    "Reply",
    "Request",
]

_log = logging.getLogger("triollama.server")

Headers = Sequence[tuple[str, str]]

MAX_HEAD = 32 * 1024
"""Bytes of a request's line and headers."""

MAX_AHEAD = 64 * 1024
"""Bytes that a client may send while it is being answered."""

LINGER = 2.0
"""Seconds in which a client may see the last answer of a connection that is closed."""

RECEIVE = 64 * 1024


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What one client, and all of them, may take. Times in seconds.

    ``body_bytes``: of a request. ``connections``: open at the same time; more are closed at once.
    ``requests``: that generate, or wait to, at the same time; more get 429. ``choices``: texts that
    one request may ask for. ``max_tokens``: new tokens of one text, at most; None: the context.
    ``kept_bytes``: of answers that ``/v1/responses`` keeps to be gone on from; 0: none.
    ``seconds``: for an answer, from its request on. ``idle_seconds``: between two requests of a
    connection. ``receive_seconds``: for sending a request. ``drain_seconds``: for the answers that
    run when the server is told to end.
    """

    body_bytes: int = 8 * 2**20
    connections: int = 1024
    requests: int = 256
    choices: int = 64
    max_tokens: int | None = None
    kept_bytes: int = 64 * 2**20
    seconds: float = 600.0
    idle_seconds: float = 75.0
    receive_seconds: float = 30.0
    drain_seconds: float = 30.0

    def __post_init__(self) -> None:
        for name in ("body_bytes", "connections", "requests", "choices"):
            check_count(name, getattr(self, name), 1)
        check_count("kept_bytes", self.kept_bytes, 0)
        if self.max_tokens is not None:
            check_count("max_tokens", self.max_tokens, 1)
        for name in ("seconds", "idle_seconds", "receive_seconds", "drain_seconds"):
            value = getattr(self, name)
            at_once = name == "drain_seconds"  # 0 has a meaning
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not number or not (value > 0 or (value == 0 and at_once)):
                least = "0 or more" if at_once else "more than 0"
                raise ParameterError(
                    f"{name} must be {least} seconds, not {shown(value)}",
                    parameter=name,
                    value=value,
                )


class GoneError(Exception):
    """The client has gone."""


class RefusedError(Exception):
    """An HTTP status, and why, for the client to read."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """A whole request; or, with ``refused``, as much as is known of one that is answered so. Names
    of headers are in lower case."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    refused: RefusedError | None = None


class Reply:
    """The answer to a request: whole by ``send``, or ``begin``, ``write`` and ``end``."""

    def __init__(self, connection: _Connection) -> None:
        self._connection = connection
        self._unsent = b""
        self._sending = False
        self._chunked = False
        self.headers: list[tuple[str, str]] = []
        self.status = 0
        """What was sent; 0 before that."""
        self.kind = ""
        """Of what is sent: its content type."""

    async def send(self, status: int, body: bytes, kind: str, headers: Headers = ()) -> None:
        """All of it."""
        self._head(status, kind, [*headers, ("content-length", str(len(body)))])
        await self.write(body)
        await self.end()

    def begin(self, kind: str, headers: Headers = ()) -> None:
        """Status 200; what is written follows. Goes out with the first of it."""
        self._head(200, kind, headers)

    def _head(self, status: int, kind: str, headers: Headers) -> None:
        self.status, self.kind = status, kind
        fields = [("date", formatdate(usegmt=True)), ("content-type", kind)]
        fields += [*self.headers, *headers]
        if self._connection.ends:
            fields.append(("connection", "close"))
        response = h11.Response(status_code=status, headers=fields)
        self._unsent = self._connection.pack(response)
        self._chunked = b"\r\ntransfer-encoding: chunked\r\n" in self._unsent.lower()

    async def write(self, data: bytes) -> None:
        """More of the body."""
        if data and self._connection.method != "HEAD":
            if self._chunked:  # as h11 would, in a tenth of its time: there is one for each token
                self._unsent += b"%x\r\n%b\r\n" % (len(data), data)
            else:
                self._unsent += self._connection.pack(h11.Data(data=data))
        if self._unsent:
            await trio.lowlevel.checkpoint_if_cancelled()  # all of it waits then
            data, self._unsent = self._connection.send_now(self._unsent), b""
            if data:
                self._sending = True
                try:
                    await self._connection.stream.send_all(data)
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    raise GoneError from None
                self._sending = False

    async def end(self) -> None:
        """The whole body was written."""
        self._unsent += self._connection.pack(h11.EndOfMessage())
        await self.write(b"")

    @property
    def is_torn(self) -> bool:
        """Whether something was sent in part: nothing can follow."""
        return self._sending


_GONE = (GoneError, OSError, trio.BrokenResourceError, trio.ClosedResourceError)

Handler = Callable[[Request, Reply], Awaitable[None]]
"""Answers a request. It is cancelled when nobody wants the answer any more."""


class _Connection:
    def __init__(self, stream: trio.SocketStream, limits: Limits, handler: Handler) -> None:
        self.stream = stream
        self.ends = False  # after this answer
        self.method = self.path = ""  # of what is being answered
        self.idle = trio.CancelScope()
        self._limits = limits
        self._handler = handler
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD)

    def pack(self, event: h11.Event) -> bytes:
        return self._http.send(event) or b""

    def send_now(self, data: bytes) -> bytes:
        """As much as there is room for, without a turn of the event loop for each token. Returns
        the rest. Raises GoneError."""
        if sys.platform == "win32":  # sockets are no files there
            return data
        try:
            return data[os.write(self.stream.socket.fileno(), data) :]
        except BlockingIOError:
            return data
        except OSError:
            raise GoneError from None

    async def run(self) -> None:
        """Requests, until one side has had enough. Raises what ``_GONE`` names."""
        while not self.ends:
            try:
                request = await self._request()
            except (h11.RemoteProtocolError, RefusedError) as error:
                await self._refuse(error)
                break
            if request is None:
                return
            await self._answer(request)
            if {self._http.our_state, self._http.their_state} != {h11.DONE}:
                break
            self._http.start_next_cycle()
        await self._linger()

    # Receiving

    async def _request(self) -> Request | None:
        """The next one; None where there will be none."""
        self.idle = trio.CancelScope(deadline=trio.current_time() + self._limits.idle_seconds)
        self.method = self.path = ""
        if self.ends:
            self.idle.cancel()
        head: object = None
        with self.idle:
            head = await self._event()
        if not isinstance(head, h11.Request):
            return None
        self.method = head.method.decode("ascii")
        target = re.sub("(?i)^https?://[^/?]*", "", head.target.decode("ascii"))  # as to a proxy
        self.path = unquote(target.partition("?")[0]) or "/"
        headers = {name.decode("ascii"): value.decode("latin-1") for name, value in head.headers}
        body = bytearray()
        with trio.move_on_after(self._limits.receive_seconds) as receiving:
            self._check_size(int(headers.get("content-length", 0)))
            while isinstance(event := await self._event(), h11.Data):
                body += event.data
                self._check_size(len(body))
            if not isinstance(event, h11.EndOfMessage):
                return None
        if receiving.cancelled_caught:
            raise RefusedError(408, "the request did not come to its end")
        return Request(method=self.method, path=self.path, headers=headers, body=bytes(body))

    def _check_size(self, size: int) -> None:
        if size > self._limits.body_bytes:
            raise RefusedError(413, f"a body has at most {self._limits.body_bytes} bytes here")

    async def _event(self) -> object:
        while (event := self._http.next_event()) is h11.NEED_DATA:
            if self._http.they_are_waiting_for_100_continue:
                go_on = h11.InformationalResponse(status_code=100, headers=[])
                await self.stream.send_all(self.pack(go_on))
            self._http.receive_data(await self.stream.receive_some(RECEIVE))
        return event

    # Answering

    async def _answer(self, request: Request) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._listen, nursery.cancel_scope)
            try:
                await self._handler(request, Reply(self))
            except GoneError:
                self.ends = True
            nursery.cancel_scope.cancel()

    async def _listen(self, answering: trio.CancelScope) -> None:
        """Cancel the answer when the client goes, or sends too much before it has it."""
        ahead = 0
        try:
            while ahead <= MAX_AHEAD:
                data = await self.stream.receive_some(RECEIVE)
                self._http.receive_data(data)
                ahead += len(data)
                if not data:
                    break
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        self.ends = True
        answering.cancel()

    async def _refuse(self, error: h11.RemoteProtocolError | RefusedError) -> None:
        self.ends = True
        if self._http.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            if not isinstance(error, RefusedError):
                error = RefusedError(error.error_status_hint, str(error))
            request = Request(
                method=self.method, path=self.path, headers={}, body=b"", refused=error
            )
            await self._handler(request, Reply(self))

    async def _linger(self) -> None:
        """Closing at once, with something unread, would take the answer away from the client."""
        with trio.move_on_after(LINGER):
            await self.stream.send_eof()
            while await self.stream.receive_some(RECEIVE):
                pass


class Connections:
    """Everybody who is connected."""

    def __init__(self, limits: Limits, handler: Handler) -> None:
        self._limits = limits
        self._handler = handler
        self._open: set[_Connection] = set()
        self._draining = trio.Event()

    def __len__(self) -> int:
        return len(self._open)

    @property
    def draining(self) -> bool:
        """Whether ``drain`` was called."""
        return self._draining.is_set()

    def drain(self) -> None:
        """No more connections, no more requests: ``serve`` returns when what runs has ended."""
        self._draining.set()
        for connection in self._open:
            connection.ends = True
            connection.idle.cancel()

    async def serve(self, listeners: Sequence[trio.SocketListener]) -> None:
        """Until ``drain``, and then for as long as answers run, at most ``drain_seconds``."""
        async with trio.open_nursery() as answering:
            async with trio.open_nursery() as accepting:
                accepting.start_soon(
                    partial(
                        trio.serve_listeners,
                        self._serve,
                        list(listeners),
                        handler_nursery=answering,
                    )
                )
                await self._draining.wait()
                accepting.cancel_scope.cancel()
            for listener in listeners:
                listener.socket.close()
            answering.cancel_scope.deadline = trio.current_time() + self._limits.drain_seconds

    async def _serve(self, stream: trio.SocketStream) -> None:
        async with stream:
            if len(self._open) >= self._limits.connections or self.draining:
                return
            connection = _Connection(stream, self._limits, self._handler)
            self._open.add(connection)
            try:
                await connection.run()
            except* _GONE:
                pass
            except* Exception:
                _log.exception("a connection failed")
            finally:
                self._open.discard(connection)
