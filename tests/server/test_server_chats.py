"""Conversations that clients name by a header, kept between requests and between servers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import openai
import pytest
import trio
from servers import Scripted, Site, run_fake, site
from triollama import StateWriteError
from triollama.testing import open_fake_llama

ANN = {"X-Conversation-Id": "ann"}


async def say(site: Site, *texts: str, id: str = "ann", **more: Any) -> Any:
    """The last of some messages, user and assistant in turn."""
    roles = ["user", "assistant"]
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    return await site.openai().chat.completions.create(
        model="tiny", messages=messages, extra_headers={"X-Conversation-Id": id}, **more
    )


async def kept(site: Site, id: str = "ann") -> list[str]:
    return [one["content"] for one in (await site.get(f"/conversations/{id}")).json()["messages"]]


def test_turns_follow_each_other(tmp_path: Path) -> None:
    async def test(site: Site) -> None:
        done = await say(site, "One")
        assert done.choices[0].message.content == "Hello there."
        await say(site, "Two")  # what is new
        stream = await say(site, "One", "Hello there.", "Two", "Hello there.", "Three", stream=True)
        assert "".join([c.choices[0].delta.content or "" async for c in stream]) == "Hello there."
        hello = "Hello there."
        assert await kept(site) == ["One", hello, "Two", hello, "Three", hello]
        assert engine.prompts[-1].index("One") < engine.prompts[-1].index("Three")
        answer = await site.post(
            "/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}, headers=ANN
        )
        assert answer.headers["x-conversation-id"] == "ann"

    engine = Scripted()
    run_fake(test, engine, folder=tmp_path)


def test_they_outlive_the_server(tmp_path: Path) -> None:
    async def main() -> None:
        for turn in range(3):
            opened = open_fake_llama(Scripted())
            async with opened as llama, site(llama, folder=tmp_path / "made") as served:
                if turn:
                    assert len(await kept(served)) == 2 * turn
                await say(served, f"Turn {turn}")

    trio.run(main)


def test_a_server_that_is_killed_within_a_first_turn_leaves_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    killed = tmp_path / "killed"

    async def first(site: Site) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(say, site, "One", "Two", "Three")
            await site.until(lambda now: now.running + now.prefilling == 1)
            await site.llama.flush()
            shutil.copytree(tmp_path / "kept", killed)
            nursery.cancel_scope.cancel()

    async def second(site: Site) -> None:
        assert (await site.get("/conversations/ann")).status_code == 404
        await say(site, "Four", "Five", "Six")

    run_fake(first, Scripted(token_seconds=9.0), folder=tmp_path / "kept")
    assert "see above" not in caplog.text  # nothing has failed
    run_fake(second, folder=killed)


def test_what_nobody_uses_is_unloaded(tmp_path: Path) -> None:
    async def main() -> None:
        async with open_fake_llama(Scripted()) as llama, site(llama, folder=tmp_path) as served:
            chats = served.server._chats
            assert chats is not None
            await say(served, "One")
            assert "ann" in llama.conversations
            chats.unload(trio.current_time() + 1000)
            assert "ann" not in llama.conversations
            assert await kept(served) == ["One", "Hello there."]
            await served.post("/conversations/ann/fork", {"id": "bob"})
            await served.post("/conversations/bob/rewind", {"turns": 1})
            chats.unload(trio.current_time() + 1000)
            assert len(llama.conversations) == 0
            assert await kept(served, "bob") == []

    trio.run(main)


def test_what_the_program_closes_itself_is_no_loss(tmp_path: Path) -> None:
    async def test(site: Site) -> None:
        await say(site, "One")
        site.llama.conversations["ann"].close()
        chats = site.server._chats
        assert chats is not None
        chats.unload(trio.current_time() + 1000)
        assert await kept(site) == ["One", "Hello there."]

    run_fake(test, folder=tmp_path)


def test_a_history_that_differs_is_refused(tmp_path: Path) -> None:
    async def test(site: Site) -> None:
        await say(site, "One")
        with pytest.raises(openai.ConflictError) as caught:
            await say(site, "One", "Something else", "Two")
        assert caught.value.code == "conversation_differs"
        assert await kept(site) == ["One", "Hello there."]
        # One that begins with a history has it.
        await say(site, "a", "b", "c", id="bob")
        assert await kept(site, "bob") == ["a", "b", "c", "Hello there."]

    run_fake(test, folder=tmp_path)


def test_a_format_beside_tools_is_refused_as_elsewhere(tmp_path: Path) -> None:
    async def test(site: Site) -> None:
        tool = {"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}
        for choice in ("auto", "required"):
            with pytest.raises(openai.BadRequestError) as caught:
                await say(site, "One", tools=[tool], tool_choice=choice,
                          response_format={"type": "json_object"})  # fmt: skip
            assert caught.value.param == "tools"
        await say(site, "One")
        assert await kept(site) == ["One", "Hello there."]

    run_fake(test, folder=tmp_path)


def test_one_answer_at_a_time(tmp_path: Path) -> None:
    async def first(site: Site) -> None:
        with pytest.raises(openai.InternalServerError):
            await say(site, "One")

    async def test(site: Site) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(first, site)
            await site.until(lambda now: now.running + now.prefilling == 1)
            with pytest.raises(openai.ConflictError) as caught:
                await say(site, "Two")
            assert caught.value.code == "busy"
            for path in ("/fork", "/rewind"):
                body = {"id": "bob"} if path == "/fork" else {}
                answer = await site.post(f"/conversations/ann{path}", body)
                assert answer.status_code == 409
            site.llama.cancel_all()

    run_fake(test, Scripted(token_seconds=9.0), folder=tmp_path)


WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather", "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}  # fmt: skip
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "%s"}}\n</tool_call>'


def test_tools_are_called_in_them(tmp_path: Path) -> None:
    async def test(site: Site) -> None:
        create: Any = site.openai().chat.completions.create
        asked: Any = {"model": "tiny", "extra_headers": ANN, "tools": [WEATHER]}
        ask = {"role": "user", "content": "Weather?"}
        done = await create(messages=[ask], **asked)
        calls = done.choices[0].message.tool_calls
        assert done.choices[0].finish_reason == "tool_calls" and len(calls) == 2
        assert "weather of a city" in engine.prompts[-1]
        results = [
            {"role": "tool", "tool_call_id": call.id, "content": f"sunny {at}"}
            for at, call in enumerate(calls)
        ]
        with pytest.raises(openai.BadRequestError, match="wait for"):
            await create(messages=results[:1], **asked)
        # All of it, as clients send it back; what is new alone; and then without tools.
        whole = [ask, done.choices[0].message.model_dump(exclude_none=True), *results]
        done = await create(messages=whole, **asked)
        prompt = engine.prompts[-1]
        places = [prompt.rindex(word) for word in ("Weather?", "sunny 0", "sunny 1")]
        assert places == sorted(places)
        more = [
            {"role": "tool", "tool_call_id": call.id, "content": "rain"}
            for call in done.choices[0].message.tool_calls
        ]
        stream = await create(messages=more, stream=True, tool_choice="none", **asked)
        async for _ in stream:
            pass
        assert "weather of a city" not in engine.prompts[-1] and "rain" in engine.prompts[-1]
        wrong = [{"role": "user", "content": "No"}, *whole[1:]]
        with pytest.raises(openai.ConflictError):
            await create(messages=wrong, **asked)

    engine = Scripted(CALL % "Lima" + "\n" + CALL % "Quito")
    run_fake(test, engine, folder=tmp_path)


def test_a_first_turn_that_fails_leaves_nothing(tmp_path: Path) -> None:
    async def test(site: Site) -> None:
        with pytest.raises(openai.BadRequestError):
            await say(site, "x" * 100)
        assert (await site.get("/conversations/ann")).status_code == 404
        await say(site, "a", "b", "c")
        assert len(await kept(site)) == 4

    run_fake(test, Scripted(n_ctx=80), folder=tmp_path)


def test_they_are_forked_rewound_and_deleted(tmp_path: Path) -> None:
    async def test(site: Site) -> None:
        await say(site, "One")
        await say(site, "Two")
        fork = await site.post("/conversations/ann/fork", {"id": "bob"})
        assert fork.json() == {"id": "bob", "parent": "ann", "turns": 2}
        assert (await site.post("/conversations/ann/fork", {"id": "bob"})).status_code == 409
        rewound = await site.post("/conversations/bob/rewind", {"turns": 1})
        assert rewound.json() == {"id": "bob", "turns": 1}
        for turns in (9, -1, 2**70):
            refused = await site.post("/conversations/bob/rewind", {"turns": turns})
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "turns")
        assert (len(await kept(site)), len(await kept(site, "bob"))) == (4, 2)
        assert (await site.ask("DELETE", "/conversations/ann")).json()["deleted"]
        assert (await site.get("/conversations/ann")).status_code == 404
        assert len(await kept(site, "bob")) == 2

    run_fake(test, folder=tmp_path)


def test_what_is_done_and_not_saved_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(site: Site) -> None:
        await say(site, "One")

        async def full() -> None:
            raise StateWriteError("No space left on device", path="x")

        monkeypatch.setattr(site.llama, "flush", full)
        fork = await site.post("/conversations/ann/fork", {"id": "bob"})
        assert fork.status_code == 507
        assert "it is done" in fork.json()["error"]["message"]
        assert len(await kept(site, "bob")) == 2

    run_fake(test, folder=tmp_path)


@pytest.mark.parametrize("id", [["x"], {}, {"a": 1}, 5])
def test_results_of_calls_whose_ids_are_none(id: Any, tmp_path: Path) -> None:
    async def test(site: Site) -> None:
        await say(site, "One")
        body = {"messages": [{"role": "tool", "tool_call_id": id, "content": "x"}]}
        answer = await site.post("/v1/chat/completions", body, headers=ANN)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "messages[0].tool_call_id"

    run_fake(test, folder=tmp_path)


@pytest.mark.parametrize("id", ["", "x" * 129, "a/b", "ü", "a b"])
def test_ids_that_are_none(id: str, tmp_path: Path) -> None:
    async def test(site: Site) -> None:
        body = {"messages": [{"role": "user", "content": "x"}]}
        headers = {b"x-conversation-id": id.encode()}
        answer = await site.post("/v1/chat/completions", body, headers=headers)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "id")

    run_fake(test, folder=tmp_path)


def test_without_a_folder_there_are_none() -> None:
    async def test(site: Site) -> None:
        with pytest.raises(openai.BadRequestError, match="folder"):
            await say(site, "One")
        assert (await site.get("/conversations/ann")).status_code == 404

    run_fake(test)


@pytest.mark.parametrize("more", [{"n": 2}, {"extra_body": {"chat_template_kwargs": {"a": 1}}}])
def test_what_a_conversation_cannot(more: Any, tmp_path: Path) -> None:
    async def test(site: Site) -> None:
        with pytest.raises(openai.BadRequestError):
            await say(site, "One", **more)

    run_fake(test, folder=tmp_path)
