"""What the server makes of connections, whoever is at their other end."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import h11
import pytest
import trio
import trio.testing
from servers import Scripted, Site, run_fake, site
from triollama import ParameterError
from triollama.server import Limits, Server
from triollama.server.http import Reply
from triollama.testing import open_fake_llama

ASK = {"messages": [{"role": "user", "content": "Hi"}]}


async def rest(stream: trio.SocketStream) -> bytes:
    """All that comes until the other side closes."""
    data = b""
    while more := await stream.receive_some():
        data += more
    return data


async def exchange(site: Site, *parts: bytes) -> bytes:
    """Send, then read to the end."""
    async with await site.connect() as stream:
        for part in parts:
            await stream.send_all(part)
            await trio.testing.wait_all_tasks_blocked()
        return await rest(stream)


def request(body: Any, *headers: str, version: str = "1.1", close: bool = True) -> bytes:
    data = json.dumps(body).encode()
    lines = [
        f"POST /v1/chat/completions HTTP/{version}", "Host: localhost",
        f"Content-Length: {len(data)}", *headers, *(["Connection: close"] if close else []),
    ]  # fmt: skip
    return "\r\n".join([*lines, "", ""]).encode() + data


def test_requests_follow_each_other_on_a_connection() -> None:
    async def test(site: Site) -> None:
        async with await site.connect() as stream:
            await stream.send_all(request(ASK, close=False) + request(ASK, close=False))
            await stream.send_all(request(ASK))  # while the others are being answered
            answers = await rest(stream)
        assert answers.count(b"HTTP/1.1 200") == 3
        assert answers.count(b"Hello there.") == 3

    run_fake(test)


def test_a_request_may_come_in_small_parts_and_chunks() -> None:
    async def test(site: Site) -> None:
        whole = request(ASK)
        answer = await exchange(site, *(whole[i : i + 40] for i in range(0, len(whole), 40)))
        assert b"Hello there." in answer
        body = json.dumps(ASK).encode()
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        chunked = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
        answer = await exchange(site, head + b"Transfer-Encoding: chunked\r\n\r\n", chunked)
        assert b"Hello there." in answer

    run_fake(test)


def test_who_asks_first_is_told_to_go_on() -> None:
    async def test(site: Site) -> None:
        whole = request(ASK, "Expect: 100-continue")
        head, _, body = whole.partition(b"\r\n\r\n")
        async with await site.connect() as stream:
            await stream.send_all(head + b"\r\n\r\n")
            assert (await stream.receive_some()).startswith(b"HTTP/1.1 100")
            await stream.send_all(body)
            assert b"Hello there." in await rest(stream)

    run_fake(test)


def test_an_old_client_gets_a_stream_too() -> None:
    async def test(site: Site) -> None:
        asked = request({**ASK, "stream": True}, version="1.0")
        answer = await exchange(site, asked)
        assert b"chunked" not in answer.lower()
        assert answer.endswith(b"data: [DONE]\n\n")

    run_fake(test)


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),  # no host
        (b"GET /" + b"x" * 40_000 + b" HTTP/1.1\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 40_000, 431),
        (b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999\r\n\r\n", 413),
        (b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: x\r\n\r\n", 501),
        (b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
         b"5000\r\n" + b"z" * 0x5000, 413),
        (b"GET /nowhere HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", 404),
        (b"GET /v1/messages HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", 405),
    ],
)  # fmt: skip
def test_what_is_no_request_for_us(data: bytes, status: int) -> None:
    async def test(site: Site) -> None:
        answer = await exchange(site, data)
        assert answer.split(b" ")[1] == str(status).encode(), answer[:200]
        error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
        assert error["message"]
        kinds = {404: "not_found_error", 501: "server_error"}
        assert error["type"] == kinds.get(status, "invalid_request_error")

    run_fake(test, limits=Limits(body_bytes=10_000))


def test_refusals_before_a_request_was_read_are_its_api_s() -> None:
    async def test(site: Site) -> None:
        head = b"POST /v1/messages HTTP/1.1\r\nHost: localhost\r\nContent-Length: "
        for rest, kind in ((b"99999\r\n\r\n", "request_too_large"),
                           (b"9\r\n\r\n{", "invalid_request_error")):  # fmt: skip
            answer = json.loads((await exchange(site, head + rest)).partition(b"\r\n\r\n")[2])
            assert (answer["type"], answer["error"]["type"]) == ("error", kind)
        counted = (await site.get("/metrics")).text
        assert 'requests_total{path="other",status="413"} 1' in counted

    run_fake(test, limits=Limits(body_bytes=10_000, receive_seconds=0.05))


def test_what_follows_a_head_is_refused_in_full() -> None:
    async def test(site: Site) -> None:
        head = b"HEAD /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
        answers = await exchange(site, head, b"\0\1\r\n\r\n")
        last = answers[answers.rindex(b"HTTP/1.1 ") :]
        assert last.startswith(b"HTTP/1.1 400")
        assert json.loads(last.partition(b"\r\n\r\n")[2])["error"]["message"]

    run_fake(test)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("connections", [0, -1, True, 1.5, "1"]), ("requests", [0]), ("choices", [-1]),
        ("body_bytes", [0]), ("kept_bytes", [-1]), ("max_tokens", [0, "x"]),
        ("seconds", [0, -1, float("nan"), "1", True, None]), ("drain_seconds", [-1]),
    ],
)  # fmt: skip
def test_limits_by_which_nobody_is_served(name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(ParameterError, match=name) as caught:
            Limits(**{name: value})
        assert caught.value.parameter == name
    assert Limits(drain_seconds=0, seconds=float("inf"), kept_bytes=0).drain_seconds == 0


def test_addresses_and_origins_that_are_none() -> None:
    async def test(site: Site) -> None:
        for port in (-1, 65536, "80"):
            with pytest.raises(ParameterError, match="port"):
                await Server(site.llama, name="other").run(port=port)  # type: ignore[arg-type]
        with pytest.raises(OSError, match=f"127.0.0.1:{site.port}"):
            await Server(site.llama, name="other").run(port=site.port)
        with pytest.raises(ParameterError, match="both called 'other'"):
            Server(site.llama, name="other", adapters={"other": None})  # type: ignore[dict-item]
        for origin in ("example.org", "https://example.org/", "*", 5):
            with pytest.raises(ParameterError, match="an origin is"):
                Server(site.llama, origins=[origin])  # type: ignore[list-item]

    run_fake(test)


def test_a_body_that_never_ends() -> None:
    async def test(site: Site) -> None:
        answer = await exchange(site, request(ASK)[:-3])
        assert answer.startswith(b"HTTP/1.1 408")

    run_fake(test, limits=Limits(receive_seconds=0.05))


def test_a_connection_that_does_nothing_is_closed() -> None:
    async def test(site: Site) -> None:
        assert await exchange(site, b"GET /hea") == b""
        assert await exchange(site) == b""

    run_fake(test, limits=Limits(idle_seconds=0.05))


def test_who_sends_too_far_ahead_is_sent_away() -> None:
    async def test(site: Site) -> None:
        async with await site.send(ASK) as stream:
            await site.until(lambda now: now.running + now.prefilling == 1)
            with pytest.raises(trio.BrokenResourceError):  # noqa: PT012
                while True:
                    await stream.send_all(b"x" * 10_000)
        await site.until(lambda now: now.cancelled == 1)

    run_fake(test, Scripted(token_seconds=9.0))


def test_there_are_only_so_many_connections() -> None:
    async def test(site: Site) -> None:
        async with await site.connect(), await site.connect() as second:
            await second.send_all(request(ASK, close=False))
            assert await second.receive_some()
            assert await exchange(site) == b""
        await trio.testing.wait_all_tasks_blocked()
        assert b"Hello" in await exchange(site, request(ASK))

    run_fake(test, limits=Limits(connections=2))


# Who may ask


def test_with_a_key() -> None:
    async def test(site: Site) -> None:
        for headers, status in (
            ({}, 401),
            ({"authorization": "Bearer wrong"}, 401),
            ({"authorization": "Basic right"}, 401),
            ({"x-api-key": "wröng".encode()}, 401),
            ({"authorization": "Bearer right"}, 200),
            ({"x-api-key": "right"}, 200),
        ):
            for path in ("/v1/models", "/metrics"):
                answer = await site.get(path, headers=headers)
                assert answer.status_code == status, headers
            assert (await site.get("/health", headers=headers)).status_code == 200
        import anthropic
        import openai

        await site.openai(api_key="right").models.list()
        with pytest.raises(openai.AuthenticationError):
            await site.openai().models.list()
        with pytest.raises(anthropic.AuthenticationError):
            await site.anthropic().messages.count_tokens(model="tiny", messages=[])
        assert (await site.get("/health", headers={"host": "example.org"})).status_code == 200

    run_fake(test, api_key="right")


def test_a_key_that_everybody_has_is_refused() -> None:
    async def main() -> None:
        async with open_fake_llama(Scripted()) as llama:
            for key in ("", b"right", 5):
                with pytest.raises(ParameterError, match="api_key"):
                    Server(llama, api_key=key)  # type: ignore[arg-type]

    trio.run(main)


def test_a_key_may_be_any_bytes_of_the_environment() -> None:
    async def test(site: Site) -> None:
        headers = {"x-api-key": b"cl\xe9"}
        assert (await site.get("/v1/models", headers=headers)).status_code == 200
        assert (await site.get("/v1/models", headers={"x-api-key": "cl"})).status_code == 401

    run_fake(test, api_key="cl\udce9")


def test_a_key_is_what_its_bytes_are() -> None:
    async def test(site: Site) -> None:
        headers = {"Authorization": "Bearer cl\u00e9".encode()}
        assert (await site.get("/v1/models", headers=headers)).status_code == 200
        headers = {"Authorization": b"Bearer cl\xe9"}
        assert (await site.get("/v1/models", headers=headers)).status_code == 401

    run_fake(test, api_key="cl\u00e9")


def test_a_head_is_an_answer_without_its_body() -> None:
    async def test(site: Site) -> None:
        for path, status in (("/health", 200), ("/v1/models", 200), ("/no", 404)):
            whole, head = await site.get(path), await site.ask("HEAD", path)
            assert (whole.status_code, head.status_code) == (status, status)
            if status == 200:
                assert head.headers["content-length"] == str(len(whole.content))
            assert whole.content and not head.content
        assert (await site.ask("HEAD", "/v1/embeddings")).status_code == 405
        line = b"%b /health HTTP/1.1\r\nHost: localhost\r\n%b\r\n"
        close = b"Connection: close\r\n"
        answers = await exchange(site, line % (b"HEAD", b""), line % (b"GET", close))
        assert answers.count(b"HTTP/1.1 200") == 2 and answers.count(b'"ok"') == 1
        too_much = b"HEAD /health HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n"
        assert (await exchange(site, too_much)).startswith(b"HTTP/1.1 413")

    run_fake(test)


def test_a_target_may_be_the_whole_address() -> None:
    """As clients write it that take the server for a proxy."""

    async def test(site: Site) -> None:
        for target in ("http://localhost/health", "HTTP://LocalHost:80/health?x=http://y/z"):
            line = f"GET {target} HTTP/1.1\r\nHost: LocalHost\r\nConnection: close\r\n\r\n"
            assert (await exchange(site, line.encode())).startswith(b"HTTP/1.1 200")

    run_fake(test)


def test_a_path_makes_no_lines_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async def test(site: Site) -> None:
        await site.get("/x%0d%0aGET%20/health%20200")

    with caplog.at_level("INFO", "triollama.server"):
        run_fake(test)
    assert "GET /x%0D%0AGET%20/health%20200 404" in caplog.text


def test_without_a_key_nobody_else_is_served() -> None:
    async def main() -> None:
        async with open_fake_llama(Scripted()) as llama:
            for host in ("0.0.0.0", "::", "192.0.2.1", "example.org"):
                with pytest.raises(ParameterError, match="api_key"):
                    await Server(llama).run(host, 0)

    trio.run(main)


def test_web_pages_of_others_may_not_ask() -> None:
    """Any page that a browser shows can send requests to this machine, in its user's name."""

    async def test(site: Site) -> None:
        evil, mine = "http://evil.example", f"http://127.0.0.1:{site.port}"
        for headers, status in (
            ({"origin": evil}, 403),
            ({"origin": "null"}, 403),
            ({"origin": mine}, 200),
            ({"host": "evil.example", "origin": evil}, 403),  # its name made to point here
            ({"host": f"evil.example:{site.port}"}, 403),
            ({"host": f"[::1]:{site.port}"}, 200),
            ({"host": "localhost"}, 200),
        ):
            answer = await site.get("/v1/models", headers=headers)
            assert answer.status_code == status, headers
            assert "access-control-allow-origin" not in answer.headers
        assert (await site.ask("OPTIONS", "/v1/models")).status_code == 405

    run_fake(test)


def test_web_pages_of_friends_may() -> None:
    async def test(site: Site) -> None:
        origin = {"origin": "https://friend.example"}
        asked = await site.ask("OPTIONS", "/v1/chat/completions", headers=origin)
        assert asked.status_code == 200
        assert asked.headers["access-control-allow-origin"] == "https://friend.example"
        answer = await site.post("/v1/chat/completions", ASK, headers=origin)
        assert answer.headers["access-control-allow-origin"] == "https://friend.example"
        other = await site.ask("OPTIONS", "/v1/models", headers={"origin": "https://x.example"})
        assert other.status_code == 403

    run_fake(test, origins=["https://friend.example"])


# The end


def test_draining_lets_answers_end() -> None:
    async def main() -> None:
        opened = open_fake_llama(Scripted("x" * 200, token_seconds=0.001))
        async with opened as llama, trio.open_nursery() as nursery:
            server = Server(llama, name="tiny")
            ended = trio.Event()

            async def run(task_status: trio.TaskStatus[int]) -> None:
                await server.run(port=0, task_status=task_status)
                ended.set()

            served = Site(server, llama, await nursery.start(run))
            async with (
                await served.connect() as idle,
                await served.send({**ASK, "stream": True}) as busy,
            ):
                await served.until(lambda now: now.running == 1)
                server.drain()
                assert await rest(idle) == b""
                with pytest.raises(OSError, match="connect"):
                    await served.connect()
                assert not ended.is_set()
                answer = await rest(busy)
            assert answer.rstrip().endswith(b"0")
            assert b"[DONE]" in answer
            await ended.wait()

    trio.run(main)


def test_draining_waits_so_long_and_no_longer() -> None:
    async def test(site: Site) -> None:
        async with await site.send(ASK) as busy:
            await site.until(lambda now: now.running + now.prefilling == 1)
            site.server.drain()
            assert await rest(busy) == b""
        await site.until(lambda now: now.cancelled == 1)

    run_fake(test, Scripted(token_seconds=9.0), limits=Limits(drain_seconds=0.05))


def test_leaving_ends_what_runs() -> None:
    async def main() -> None:
        async with open_fake_llama(Scripted(token_seconds=9.0)) as llama:
            async with site(llama) as served:
                stream = await served.send(ASK)
                await served.until(lambda now: now.running + now.prefilling == 1)
            assert llama.active() == []
            assert await stream.receive_some() == b""
            await stream.aclose()

    trio.run(main)


def test_what_was_not_begun_to_be_sent_waits() -> None:
    """A time limit that passes just before an answer's next piece leaves room for its last one."""
    sent = []

    class Stream:
        async def send_all(self, data: bytes) -> None:
            await trio.lowlevel.checkpoint()
            sent.append(data)

    def pack(event: h11.Event) -> bytes:
        return bytes(event.data) if isinstance(event, h11.Data) else b"<>"

    async def main() -> None:
        connection: Any = SimpleNamespace(
            ends=False, method="GET", stream=Stream(), pack=pack, send_now=lambda data: data
        )
        reply = Reply(connection)
        reply.begin("text/event-stream")
        with trio.CancelScope() as scope:
            scope.cancel()
            await reply.write(b"one")
        assert scope.cancelled_caught
        assert not reply.is_torn
        await reply.write(b"two")
        await reply.end()
        assert sent == [b"<>onetwo", b"<>"]

    trio.run(main)


def test_what_was_sent_in_part_is_torn() -> None:
    """There was room for the beginning alone, and the answer is cancelled while the rest waits."""

    class Stream:
        async def send_all(self, data: bytes) -> None:
            assert data == b"ne"
            await trio.sleep_forever()

    async def main() -> None:
        connection: Any = SimpleNamespace(
            ends=False,
            method="GET",
            stream=Stream(),
            pack=lambda event: bytes(event.data) if isinstance(event, h11.Data) else b"",
            send_now=lambda data: data[1:],
        )
        reply = Reply(connection)
        reply.begin("text/event-stream")
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(reply.write, b"one")
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel()
        assert reply.is_torn

    trio.run(main)
