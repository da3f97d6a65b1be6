"""Every async call of a Llama and its conversations, cancelled at each of its checkpoints.

It either raises Cancelled, and is as if it had never been called, or it returns and has happened:
never half of it, and never both. Native engine and fake one alike.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import trio
import worlds
from cancelling import cut, interrupt
from test_conversations import GREEDY, SYSTEM, World, world  # noqa: F401
from trio.testing import MockClock
from triollama import (
    Conversation,
    GenerationParams,
    Llama,
    StateError,
    Stream,
    TurnStream,
)
from triollama._engine import live_objects
from triollama.files import load_document
from triollama.testing import FakeEngine, open_fake_llama

SHORT = GREEDY.replace(max_tokens=4)
SAMPLED = SHORT.replace(temperature=1.2, top_k=0, top_p=1.0, seed=7)

Change = Callable[[Conversation], Awaitable[Any]]


async def streamed(turn: TurnStream) -> str:
    async with turn:
        async for _ in turn:
            pass
        return turn.text


TURNS: dict[str, Change] = {
    "say": lambda chat: chat.say("And then?"),
    "edit": lambda chat: chat.edit(1, "Good morning"),
    "edit the last": lambda chat: chat.edit(3, "Good morning"),
    "regenerate": lambda chat: chat.regenerate(seed=5),
    "go_on": lambda chat: chat.go_on(),
    "stream": lambda chat: streamed(chat.stream("And then?", capacity=1)),
    "stream_again": lambda chat: streamed(chat.stream_again(seed=5)),
    "stream_on": lambda chat: streamed(chat.stream_on()),
    "interrupt": lambda chat: chat.say("And then?", interrupt=True),
    "make_title": lambda chat: chat.make_title(max_tokens=4),
    "fork": lambda chat: chat.fork("branch"),
}


def seen(chat: Conversation) -> tuple[Any, ...]:
    """All that is seen of a conversation, but for times."""
    return (
        [(m.role, m.content, m.tokens, m.finish_reason, m.n_computed) for m in chat.messages],
        chat.tokens,
        chat.n_turns,
        chat.title,
        chat.is_busy,
    )


async def prepared(llama: Llama, params: GenerationParams, **options: Any) -> Conversation:
    chat = llama.conversation(system=SYSTEM, params=params, **options)
    await chat.say("Hello")
    await chat.say("Who lives here?")
    return chat


async def goes_on(chat: Conversation) -> list[int]:
    """What it says next."""
    reply = await chat.say("What now?")
    return list(reply.tokens)


@pytest.mark.promise("S8", "S14", "S27")
@pytest.mark.parametrize(
    ("name", "params"),
    [*((name, SHORT) for name in TURNS), ("say", SAMPLED), ("go_on", SAMPLED), ("fork", SAMPLED)],
)
def test_a_conversation(world: World, name: str, params: GenerationParams) -> None:  # noqa: F811
    change = TURNS[name]

    async def main() -> None:
        async with world.open(max_streams=4) as llama:
            idle = await prepared(llama, params)
            before, next_before = seen(idle), await goes_on(idle)
            idle.close()
            changed = await prepared(llama, params)
            await change(changed)
            branches = [chat for chat in llama.conversations if chat is not changed]
            after, next_after = seen(changed), await goes_on(changed)
            for chat in [*branches, changed]:
                chat.close()
            n_cancelled = 0
            for n in range(1, 200):
                chat = await prepared(llama, params)
                told = (chat.updated, chat.messages)
                found = await cut(lambda: change(chat), n)  # noqa: B023
                others = [other for other in llama.conversations if other is not chat]
                if found.cancelled:
                    n_cancelled += 1
                    assert seen(chat) == before, f"after {n} checkpoints"
                    assert (chat.updated, chat.messages) == told
                    assert others == []
                    assert await goes_on(chat) == next_before, f"after {n} checkpoints"
                else:
                    assert seen(chat) == after
                    assert len(others) == len(branches)
                    assert await goes_on(chat) == next_after
                for other in others:
                    assert seen(other)[:3] == before[:3]
                    assert await goes_on(other) == next_before
                for one in [*others, chat]:
                    one.close()
                if not found.reached:
                    break
            else:
                pytest.fail("it never came to its end")
            assert n_cancelled >= 1
            assert len(llama.conversations) == 0
            while llama.statistics().sequences:
                await trio.sleep(0.001)

    world.run(main)


@pytest.mark.promise("S27")
def test_what_is_kept_is_what_was_said(world: World) -> None:  # noqa: F811
    """With on_cancel="keep" a cancelled turn leaves a beginning of its answer, once."""

    async def main() -> None:
        async with world.open() as llama:
            whole = await prepared(llama, SHORT)
            before = whole.messages
            await whole.say("And then?")
            answer, tokens = whole.messages[-1], whole.tokens
            lengths = set()
            for n in range(1, 200):
                chat = await prepared(llama, SHORT, on_cancel="keep")
                found = await cut(lambda: chat.say("And then?"), n)  # noqa: B023
                assert [m.content for m in chat.messages[: len(before)]] == [
                    m.content for m in before
                ]
                assert not chat.is_busy
                assert chat.tokens == tokens[: len(chat.tokens)]
                if chat.n_turns == 3:
                    kept = chat.messages[-1]
                    assert len(chat.messages) == len(before) + 2
                    assert kept.tokens == answer.tokens[: len(kept.tokens)]
                    assert kept.content == answer.content[: len(kept.content)]
                    lengths.add(len(kept.tokens))
                    # The fake is asked anew, and may say anything.
                    if kept.finish_reason == "cancelled" and world.kind == "native":
                        await chat.go_on(max_tokens=4 - len(kept.tokens))
                        assert chat.messages[-1].tokens == answer.tokens
                else:
                    assert found.cancelled
                    assert chat.n_turns == 2
                chat.close()
                if not found.reached:
                    break
            assert len(answer.tokens) in lengths

    world.run(main)


@pytest.mark.promise("S6", "S27")
@pytest.mark.parametrize("policy", ["rollback", "keep"])
@pytest.mark.parametrize("name", ["say", "edit", "go_on", "make_title", "fork"])
def test_ctrl_c(world: World, name: str, policy: Any) -> None:  # noqa: F811
    """KeyboardInterrupt at any checkpoint: what is there is there once, and can be gone on from."""
    change = TURNS[name]

    async def main() -> None:
        async with world.open(max_streams=4) as llama:
            idle = await prepared(llama, SHORT)
            before, next_before = seen(idle), await goes_on(idle)
            changed = await prepared(llama, SHORT)
            await change(changed)
            after, next_after = seen(changed), await goes_on(changed)
            for other in list(llama.conversations):
                other.close()
            for n in range(1, 200):
                chat = await prepared(llama, SHORT, on_cancel=policy)
                found = await interrupt(lambda: change(chat), n)  # noqa: B023
                now = seen(chat)
                if now == before:
                    assert await goes_on(chat) == next_before, f"after {n} checkpoints"
                elif now == after:
                    assert await goes_on(chat) == next_after, f"after {n} checkpoints"
                else:
                    assert policy == "keep"
                    kept = chat.messages[-1].content
                    assert after[0][-1][1].startswith(kept)
                    assert len(chat.messages) == len(after[0])
                for other in list(llama.conversations):
                    other.close()
                if not found.reached:
                    break
                assert found.cancelled
            else:
                pytest.fail("it never came to its end")

    world.run(main)


@pytest.mark.promise("S6", "S27")
def test_ctrl_c_while_tools_run() -> None:
    """At any checkpoint of the turn: it has happened or not, and the next one can begin."""

    def add(a: int, b: int) -> int:
        """Adds."""
        return a + b

    def reply(prompt: str) -> str:
        if "Go" in prompt and "tool_response" not in prompt.split("Go", 1)[1]:
            return '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'
        return "Done."

    async def main() -> None:
        async with open_fake_llama(FakeEngine(reply)) as llama:
            for n in (*range(1, 30), *range(30, 1000, 7)):
                chat = llama.conversation(template="chatml", tools=[add])
                found = await interrupt(lambda: chat.say("Go"), n)  # noqa: B023
                assert not chat.is_busy, f"after {n} checkpoints"
                assert len(chat.messages) in (0, 4)
                assert (await chat.say("Bye")).text == "Done."
                chat.close()
                if not found.reached:
                    break
            else:
                pytest.fail("it never came to its end")
            assert n > 4

    trio.run(main, clock=MockClock(autojump_threshold=0))


@pytest.mark.promise("S8", "S9", "S13")
def test_streams(world: World) -> None:  # noqa: F811
    """Plain calls leave nothing, wherever they are cut."""

    async def looked_at(llama: Llama) -> None:
        async with llama.stream("Once upon", SHORT, capacity=1) as stream:
            await stream.receive()
            await stream.aclose()

    calls: dict[str, Callable[[Llama], Awaitable[Any]]] = {
        "generate": lambda llama: llama.generate("Once upon", SHORT),
        "score": lambda llama: llama.score("Once upon a time"),
        "choose": lambda llama: llama.choose("Once upon a time", [" a", " the"]),
        "embed": lambda llama: llama.embed(["Once upon", "a time"]),
        "stream": looked_at,
        "warm_up": lambda llama: llama.warm_up(),
    }

    async def main() -> None:
        async with world.open() as llama:
            for call in calls.values():
                await call(llama)
                n_cancelled = 0
                for n in range(1, 200):
                    found = await cut(lambda: call(llama), n)  # noqa: B023
                    n_cancelled += found.cancelled
                    assert llama.active() == []
                    if not found.reached:
                        break
                else:
                    pytest.fail("it never came to its end")
                assert n_cancelled >= 1
            while llama.statistics().slots_free < llama.max_streams:
                await trio.sleep(0.001)
            counts = llama.statistics()
            assert (counts.running, counts.queued, counts.cells_used) == (0, 0, 0)

    world.run(main)


@pytest.mark.promise("S27")
def test_files(world: World, tmp_path: Path) -> None:  # noqa: F811
    """A save leaves the old file or the new one; a restore opens all conversations or none."""
    path, new = tmp_path / "chats.json", tmp_path / "new.json"

    async def main() -> None:
        async with world.open(max_streams=4) as llama:
            for id in ("a", "b"):
                await llama.conversation(id, system=SYSTEM, params=SHORT).say("Hello")
            await llama.save(path, kv=True)
            for n in range(1, 100):
                found = await cut(lambda: llama.save(new, kv=True), n)
                assert new.exists() is not found.cancelled
                assert found.cancelled or len(load_document(new).conversations) == 2
                for file in tmp_path.glob("new*"):
                    shutil.rmtree(file) if file.is_dir() else file.unlink()
                if not found.reached:
                    break
            else:
                pytest.fail("it never came to its end")
            assert n > 2
            for chat in list(llama.conversations):
                chat.close()
            for n in range(1, 100):
                found = await cut(lambda: llama.restore(path), n)
                assert len(llama.conversations) == (0 if found.cancelled else 2)
                for chat in list(llama.conversations):
                    assert len((await chat.say("And then?")).tokens) == 4
                    chat.close()
                if not found.reached:
                    break
            else:
                pytest.fail("it never came to its end")
            assert n > 2
            while llama.statistics().sequences:
                await trio.sleep(0.001)

    world.run(main, threads=True)


@pytest.mark.promise("S27")
def test_a_turn_that_ends_on_disk(world: World, tmp_path: Path) -> None:  # noqa: F811
    """With ``sync="commit"``: cancelled it is neither in memory nor in the file, else in both."""
    path = tmp_path / "auto"

    async def autosave(llama: Llama, task_status: Any) -> None:
        await llama.autosave(path, sync="commit", every=1000.0, task_status=task_status)

    async def main() -> None:
        async with world.open() as llama, trio.open_nursery() as nursery:
            await nursery.start(autosave, llama)
            for n in range(1, 200):
                chat = llama.conversation(f"{n}", params=SHORT)
                await chat.say("Hello")
                found = await cut(lambda: chat.say("And then?"), n)  # noqa: B023
                assert chat.n_turns == (1 if found.cancelled else 2)
                saved = {one.id: one for one in load_document(path).conversations}[chat.id]
                assert saved.messages == chat.messages
                chat.delete()
                if not found.reached:
                    break
            else:
                pytest.fail("it never came to its end")
            assert n > 2
            nursery.cancel_scope.cancel()

    world.run(main, threads=True)


@pytest.mark.promise("S27")
def test_an_autosave(world: World, tmp_path: Path) -> None:  # noqa: F811
    """Wherever it is cancelled, what it had begun to keep is in its file, and the file is free."""
    path = tmp_path / "auto"

    async def main() -> None:
        async with world.open() as llama:
            chat = llama.conversation("a", params=SHORT)
            await chat.say("Hello")
            kept = 0
            for n in range(1, 30):
                begun = trio.Event()

                async def follow(begun: trio.Event = begun) -> None:
                    async with trio.open_nursery() as nursery:
                        await nursery.start(llama.autosave, path)
                        begun.set()
                        chat.title = "new"
                        await llama.flush()
                        nursery.cancel_scope.cancel()

                found = await cut(follow, n)
                if begun.is_set():
                    (saved,) = load_document(path).conversations
                    assert saved.messages == chat.messages
                    assert saved.title == "new"
                    kept += 1
                chat.title = ""
                while (tmp_path / ".auto.lock").exists():  # a thread that was left behind
                    await trio.sleep(0.001)
                path.unlink(missing_ok=True)
                if not found.reached:
                    break
            assert kept > 1

    world.run(main, threads=True)


@pytest.mark.promise("S27")
def test_an_autosave_at_its_own_checkpoints(world: World, tmp_path: Path) -> None:  # noqa: F811
    """Cut while others change what it keeps: what ``flush`` acknowledged is in the file, and the
    next autosave can have it."""
    path = tmp_path / "auto"

    async def main() -> None:
        async with world.open() as llama:
            chat = llama.conversation("a", params=SHORT)
            acknowledged = 0

            async def change() -> None:
                nonlocal acknowledged
                with contextlib.suppress(StateError):  # until no autosave runs any more
                    for number in range(acknowledged + 1, 10_000):
                        chat.title = str(number)
                        await llama.flush()
                        acknowledged = number

            async def save(nursery: trio.Nursery) -> None:
                class Status:
                    def started(self, value: object = None) -> None:
                        nursery.start_soon(change)

                await llama.autosave(path, every=1000.0, task_status=Status())  # type: ignore[arg-type]

            for n in range(1, 40):
                before = acknowledged
                async with trio.open_nursery() as nursery:
                    found = await cut(lambda: save(nursery), n)
                assert found.cancelled
                if acknowledged > before:
                    (saved,) = load_document(path).conversations
                    assert int(saved.title) >= acknowledged
            assert acknowledged > 10

    world.run(main, threads=True)


@pytest.mark.promise("S27")
def test_a_flush(world: World, tmp_path: Path) -> None:  # noqa: F811
    """It returns, and everything is in the file; cancelled, nothing is lost for the next one."""
    path = tmp_path / "auto"

    async def main() -> None:
        async with world.open() as llama, trio.open_nursery() as nursery:
            chat = llama.conversation("a", params=SHORT)
            await nursery.start(functools.partial(llama.autosave, path, every=1000.0))
            for n in range(1, 50):
                chat.title = f"title {n}"
                found = await cut(llama.flush, n)
                if found.cancelled:
                    await llama.flush()
                (saved,) = load_document(path).conversations
                assert saved.title == chat.title
                if not found.reached:
                    break
            else:
                pytest.fail("it never came to its end")
            assert n > 1
            nursery.cancel_scope.cancel()

    world.run(main, threads=True)


@pytest.mark.promise("S8", "S9")
@pytest.mark.parametrize("ordered", [True, False])
def test_a_map(world: World, ordered: bool) -> None:  # noqa: F811
    """Each ``receive`` is cut at each of its checkpoints before it may go on: no result is lost,
    none comes twice. Left anywhere, nothing runs on."""
    prompts = ["Tell me of the sea", "Tell me of a cat", "", "Tell me of snow", "And an island"]

    def mapped(llama: Llama) -> Any:
        return llama.map(prompts, SHORT, ordered=ordered, at_once=2)

    async def received(results: Any) -> dict[int, str]:
        found = {}
        while True:
            for n in range(1, 100):
                try:
                    one = await cut(results.receive, n)
                except trio.EndOfChannel:
                    return found
                if not one.cancelled:
                    assert one.result.index not in found
                    found[one.result.index] = one.result.result and one.result.result.text
                    break

    async def whole(llama: Llama) -> dict[int, str]:
        async with mapped(llama) as results:
            return {one.index: one.result and one.result.text async for one in results}

    async def main() -> None:
        async with world.open() as llama:
            expected = await whole(llama)
            assert len(expected) == len(prompts)
            assert expected[2] is None  # it failed alone
            async with mapped(llama) as results:
                assert await received(results) == expected
            for n in range(1, 500):
                found = await cut(lambda: whole(llama), n)
                assert found.cancelled or found.result == expected
                assert llama.active() == []
                if not found.reached:
                    break
            else:
                pytest.fail("it never came to its end")
            assert n > len(prompts)
            while llama.statistics().slots_free < llama.max_streams:
                await trio.sleep(0.001)

    world.run(main)


@pytest.mark.promise("S23")
def test_loading_an_adapter(world: World, tmp_path: Path) -> None:  # noqa: F811
    adapters = worlds.World(world.kind, world._path)
    path = adapters.write_adapter(tmp_path / "adapter.gguf")

    async def main() -> None:
        async with world.open() as llama:
            before = live_objects().get("Adapter", 0)
            for n in range(1, 100):
                found = await cut(lambda: llama.load_adapter(path), n)
                assert len(llama.adapters) == (0 if found.cancelled else 1)
                for adapter in llama.adapters:
                    await llama.generate("Once", SHORT, adapters=[(adapter, 0.5)])
                    await llama.unload_adapter(adapter)
                assert live_objects().get("Adapter", 0) == before
                if not found.reached:
                    break
            else:
                pytest.fail("it never came to its end")
            assert n > 2

    world.run(main, threads=True)


@pytest.mark.promise("S23")
def test_adapters(world: World) -> None:  # noqa: F811
    async def main() -> None:
        async with world.open() as llama:
            rows = numpy.zeros((llama.model.n_layer - 1, llama.model.n_embd), dtype=numpy.float32)
            for n in range(1, 100):
                found = await cut(lambda: llama.load_control_vector(rows), n)
                assert len(llama.adapters) == (0 if found.cancelled else 1)
                for vector in llama.adapters:
                    await llama.unload_adapter(vector)
                if not found.reached:
                    break
            for n in range(1, 100):
                vector = await llama.load_control_vector(rows)
                await llama.generate("Once", SHORT, adapters=[(vector, 0.5)])
                found = await cut(lambda: llama.unload_adapter(vector), n)  # noqa: B023
                assert len(llama.adapters) == (1 if found.cancelled else 0)
                for vector in llama.adapters:
                    await llama.generate("Once", SHORT, adapters=[(vector, 0.5)])
                if not found.reached:
                    break
            else:
                pytest.fail("it never came to its end")

    world.run(main)


@pytest.mark.promise("S9")
def test_no_piece_is_lost(world: World) -> None:  # noqa: F811
    """Each ``receive`` is cut at each of its checkpoints before it may go on."""

    async def received(stream: Stream) -> str:
        text = ""
        while True:
            for n in range(1, 50):
                try:
                    found = await cut(stream.receive, n)
                except trio.EndOfChannel:
                    return text
                if not found.cancelled:
                    text += found.result.text
                    break

    async def main() -> None:
        async with world.open() as llama:
            expected = (await llama.generate("Once upon", SHORT)).text
            async with llama.stream("Once upon", SHORT, capacity=1) as stream:
                assert await received(stream) == expected
            chat = await prepared(llama, SHORT)
            expected = (await chat.say("And then?")).text
            chat.rewind()
            async with chat.stream("And then?", capacity=1) as turn:
                assert await received(turn) == expected
            assert turn.committed
            assert chat.messages[-1].content == expected

    world.run(main)


@pytest.mark.promise("S27")
def test_each_end_of_a_turn_by_itself(world: World) -> None:  # noqa: F811
    """Entering, receiving the end, leaving, ``aclose``: whichever is cut, the turn is committed by
    then or it never is."""

    ways: dict[str, Callable[[TurnStream], Awaitable[None]]] = {
        "read": lambda turn: turn.__aexit__(None, None, None),
        "leave": lambda turn: turn.__aexit__(None, None, None),
        "close": lambda turn: turn.aclose(),
    }

    async def main() -> None:
        async with world.open() as llama:
            for policy in ("rollback", "keep"):
                for n in range(1, 30):
                    for way, call in ways.items():
                        chat = await prepared(llama, SHORT, on_cancel=policy)
                        turn = chat.stream("And then?", capacity=1)
                        entered = await cut(turn.__aenter__, n)
                        if entered.cancelled:
                            assert not chat.is_busy
                            await turn.__aenter__()  # nothing has happened: again
                        first = await turn.receive()
                        assert first.text
                        if way == "read":
                            async for _ in turn:
                                pass
                            assert turn.committed
                        found = await cut(lambda: call(turn), n)  # noqa: B023
                        assert not chat.is_busy
                        assert turn.committed == (way == "read" or policy == "keep")
                        if turn.committed:
                            assert not found.cancelled, (policy, way, n)
                        assert chat.n_turns == 2 + turn.committed
                        await turn.aclose()
                        await chat.say("What now?")
                        chat.close()
                    if not entered.reached and not found.reached:
                        break
                else:
                    pytest.fail("it never came to its end")

    world.run(main)


def test_every_async_method_of_a_conversation_is_here() -> None:
    methods = {
        name
        for name, value in inspect.getmembers(Conversation, inspect.isfunction)
        if inspect.iscoroutinefunction(inspect.unwrap(value)) and not name.startswith("_")
    }
    assert methods <= {*TURNS, "idle"}


def test_every_async_method_of_a_llama_is_here() -> None:
    methods = {
        name
        for name, value in inspect.getmembers(Llama, inspect.isfunction)
        if inspect.iscoroutinefunction(inspect.unwrap(value)) and not name.startswith("_")
    }
    assert methods == {
        *("generate", "score", "choose", "embed", "warm_up"),  # test_streams
        *("save", "restore"),  # test_files
        *("autosave", "flush"),
        *("load_adapter", "load_control_vector", "unload_adapter"),
    }
