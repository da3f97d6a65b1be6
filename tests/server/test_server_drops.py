"""Clients that go away: their places are free, and nobody else notices."""

from __future__ import annotations

import json
import socket
from typing import Any

import pytest
import trio
from servers import Scripted, Site, run_fake, run_native

ASK = {"messages": [{"role": "user", "content": "Hi"}]}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("how", ["close", "reset", "shutdown"])
@pytest.mark.parametrize("state", ["queued", "prompt", "running"])
def test_a_place_is_free_when_its_client_has_gone(state: str, how: str, stream: bool) -> None:
    engine = Scripted(
        "x" * 10_000,
        max_streams=1,
        token_seconds=0.001 if state == "running" else 9.0,
        prompt_token_seconds=9.0 if state == "prompt" else 0.0,
    )

    async def test(site: Site) -> None:
        before = None
        if state == "queued":
            before = site.llama.stream("x")
            await before.__aenter__()
        client = await site.send({**ASK, "stream": stream, "max_tokens": None})
        field = {"queued": "queued", "prompt": "prefilling", "running": "running"}[state]
        await site.until(lambda now: getattr(now, field) == 1)
        if how == "reset":
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        if how == "shutdown":
            await client.send_eof()
        else:
            await client.aclose()
        await site.until(lambda now: now.cancelled == 1)
        assert [one.state for one in site.llama.active()] == (["running"] if before else [])
        if before is not None:
            await before.aclose()
        await site.until(lambda now: now.slots_free == 1)
        text = (await site.get("/metrics")).text
        assert "triollama_dropped_total 1" in text
        await client.aclose()

    run_fake(test, engine)


def test_who_does_not_read_stops_nobody() -> None:
    async def test(site: Site) -> None:
        async with await site.send({**ASK, "stream": True}) as idle:
            await site.until(lambda now: now.parked == 1)
            client = site.openai()
            done = await client.chat.completions.create(model="tiny", max_tokens=5, **ASK)
            assert done.choices[0].message.content == "xxxxx"
            assert site.llama.statistics().parked == 1
            assert idle is not None
        await site.until(lambda now: now.cancelled == 1)

    run_fake(test, Scripted("x" * 10_000_000, n_ctx=100_000_000))


def test_a_campaign_of_disconnects(tiny: Any) -> None:
    """A short one; disconnects.py, run as a program, takes as many as one likes."""
    from disconnects import Campaign

    async def test(site: Site) -> None:
        campaign = Campaign(site.server, site.port, seed=1)
        await campaign.run(150, clients=6)
        found = campaign.found()
        assert found["leaked"] == 0
        assert found["neighbours"] > 0
        assert found["disturbed"] == 0
        assert found["dropped"] > 50

    run_native(test, tiny("llama"), opening={"max_streams": 3, "max_queue": 16})


def test_a_turn_of_a_client_that_went_has_not_happened(tmp_path: Any) -> None:
    async def test(site: Site) -> None:
        headers = {"x-conversation-id": "ann"}
        await site.post("/v1/chat/completions", ASK, headers=headers)
        data = json.dumps({**ASK, "max_tokens": 9}).encode()
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nX-Conversation-Id: ann\r\n"
            f"Content-Length: {len(data)}\r\n\r\n"
        )
        engine._token_seconds = 9.0
        stream = await site.connect()
        await stream.send_all(head.encode() + data)
        await site.until(lambda now: now.running + now.prefilling == 1)
        await stream.aclose()
        await site.until(lambda now: now.cancelled == 1)
        kept = (await site.get("/conversations/ann")).json()
        assert kept["turns"] == 1

    engine = Scripted()
    run_fake(test, engine, folder=tmp_path)


def test_a_task_that_fails_takes_nobody_along() -> None:
    async def ask(site: Site, n: int) -> None:
        body = ASK if n % 2 else {"messages": n}
        answer = await site.post("/v1/chat/completions", body)
        assert answer.status_code == (200 if n % 2 else 400)

    async def run(site: Site) -> None:
        async with trio.open_nursery() as nursery:
            for n in range(8):
                nursery.start_soon(ask, site, n)

    run_fake(run)
