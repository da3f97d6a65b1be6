"""triollama in asyncio programs: the same objects, and cancellation as asyncio has it."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, NamedTuple, TypeVar

import msgspec
import pytest
import trio
import triollama
from triollama import GenerationParams, aio
from triollama.testing import FakeEngine, open_fake_llama

T = TypeVar("T")

GREEDY = GenerationParams(temperature=0.0, repeat_penalty=1.0, ignore_eos=True, max_tokens=8)


class open_fake(aio.open_llama):
    def __init__(self, engine: FakeEngine) -> None:
        self._opening = open_fake_llama(engine)


_new_loop: Callable[[], asyncio.AbstractEventLoop] | None = None


@pytest.fixture(params=["asyncio", "uvloop"], autouse=True)
def loop(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test here, in each loop."""
    if request.param == "uvloop":
        uvloop = pytest.importorskip("uvloop")
        monkeypatch.setattr(sys.modules[__name__], "_new_loop", uvloop.new_event_loop)


def run_loop(main: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=_new_loop) as runner:
        return runner.run(main)


def run(test: Callable[[Any], Awaitable[None]], engine: FakeEngine | None = None) -> None:
    async def main() -> None:
        async with asyncio.timeout(60):
            fake = engine or FakeEngine(lambda prompt: "Hello.", token_seconds=0.0)
            async with open_fake(fake) as llama:
                await test(llama)

    before = threading.active_count()
    run_loop(main())
    assert threading.active_count() <= before + 1  # trio keeps a worker for a while


def test_a_model_serves_asyncio_as_it_serves_trio(tiny: Any) -> None:
    async def in_trio() -> list[Any]:
        async with triollama.open_llama(tiny("llama"), n_ctx=256, threads=1) as llama:
            done = await llama.generate("Once", GREEDY)
            chat = llama.conversation("ann", params=GREEDY)
            reply = await chat.say("Hi")
            rows = await llama.embed(["a", "b"])
            async with llama.map(["x", "y"], GREEDY) as results:
                texts = [one.unwrap().text async for one in results]
            return [done.text, reply.text, rows.tolist(), texts]

    async def in_asyncio() -> list[Any]:
        async with aio.open_llama(tiny("llama"), n_ctx=256, threads=1) as llama:
            async with llama.stream("Once", GREEDY) as stream:
                text = "".join([piece.text async for piece in stream])
            assert stream.finish_reason == "length"
            assert len(stream.tokens) == 8
            chat = llama.conversation("ann", params=GREEDY)
            reply = await chat.say("Hi")
            branch = await chat.fork("bob")
            assert (branch.n_turns, branch.parent) == (1, "ann")
            assert [one.id for one in llama.conversations] == ["ann", "bob"]
            assert llama.conversations["bob"].messages == chat.messages
            rows = await llama.embed(["a", "b"])
            async with llama.map(["x", "y"], GREEDY) as results:
                texts = [one.unwrap().text async for one in results]
            assert llama.n_ctx == 256
            assert llama.statistics().finished >= 5
            return [text, reply.text, rows.tolist(), texts]

    assert run_loop(in_asyncio()) == trio.run(in_trio)


def test_many_tasks_at_once() -> None:
    async def test(llama: Any) -> None:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(llama.generate(f"{n}")) for n in range(30)]
        assert {task.result().text for task in tasks} == {"Hello."}

    run(test)


def test_typed_answers() -> None:
    class City(msgspec.Struct):
        name: str

    async def test(llama: Any) -> None:
        assert await llama.generate("Where?", into=City) == City("Lima")
        async with llama.conversation().stream("Where?", into=City) as stream:
            async for _ in stream:
                pass
        assert stream.value == City("Lima")

    run(test, FakeEngine(lambda prompt: '{"name":"Lima"}', token_seconds=0.0))


def test_a_deadline_frees_the_place() -> None:
    async def test(llama: Any) -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await llama.generate("x")
        assert llama.active() == []
        with pytest.raises(TimeoutError):  # noqa: PT012
            async with asyncio.timeout(0.05), llama.stream("x") as stream:
                async for _ in stream:
                    pass
        assert llama.active() == []
        assert llama.statistics().cancelled == 2

    run(test, FakeEngine(token_seconds=9.0))


def test_a_cancelled_task_in_the_queue() -> None:
    async def test(llama: Any) -> None:
        first = asyncio.create_task(llama.generate("x"))
        second = asyncio.create_task(llama.generate("y"))
        while llama.statistics().queued < 1:
            await asyncio.sleep(0)
        for task in (second, first):
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert llama.active() == []

    run(test, FakeEngine(token_seconds=9.0, max_streams=1))


def test_a_cancelled_turn_has_not_happened() -> None:
    async def test(llama: Any) -> None:
        chat = llama.conversation()
        task = asyncio.create_task(chat.say("Hi"))
        while llama.statistics().running < 1:
            await asyncio.sleep(0)
        assert chat.is_busy
        with pytest.raises(trio.BusyResourceError):
            await chat.say("Again")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (chat.n_turns, chat.is_busy) == (0, False)

    run(test, FakeEngine(lambda prompt: "x" * 9999, token_seconds=0.001))


@pytest.mark.parametrize("again", [0, 1])
def test_no_piece_is_lost_by_a_cancellation(again: int) -> None:
    """Whenever it comes, and however often: also in the moment in which a piece was received."""
    text = "".join(chr(65 + i % 26) for i in range(300))

    async def test(llama: Any) -> None:
        async with llama.stream("x", max_tokens=None) as stream:
            got = ""
            for n in range(100_000):
                task = asyncio.create_task(stream.receive())
                for _ in range(n % 7):
                    await asyncio.sleep(0)
                for _ in range(again):
                    task.cancel()
                    await asyncio.sleep(0)
                task.cancel()
                try:
                    got += (await task).text
                except asyncio.CancelledError:
                    pass
                except trio.EndOfChannel:
                    break
            assert got == text

    run(test, FakeEngine(lambda prompt: text, token_seconds=0.0))


@pytest.mark.parametrize("again", [0, 1, 2])
def test_what_is_cancelled_while_it_is_entered_is_left(again: int) -> None:
    """Whenever it comes, and however often: also in the moment in which it was entered."""

    async def test(llama: Any) -> None:
        chat = llama.conversation(template="plain")
        for n in range(30):
            for entered in (llama.stream("x"), chat.stream("x")):

                async def enter(it: Any = entered) -> None:
                    async with it:
                        await asyncio.Event().wait()

                task = asyncio.create_task(enter())
                for _ in range(n):
                    await asyncio.sleep(0)
                for _ in range(again + 1):
                    task.cancel()
                    await asyncio.sleep(0)
                with pytest.raises(asyncio.CancelledError):
                    await task
                assert llama.active() == []
                assert not chat.is_busy

    run(test, FakeEngine(token_seconds=9.0))


def test_errors_are_the_library_s() -> None:
    async def test(llama: Any) -> None:
        with pytest.raises(triollama.ParameterError):
            await llama.generate("x", temperature=-1)
        with pytest.raises(triollama.ParameterError):
            llama.conversation(overflow="never")
        stream = llama.stream("x")
        with pytest.raises(triollama.BusyError):
            await stream.receive()
        with pytest.raises(AttributeError):
            llama.no_such_thing  # noqa: B018

    run(test)


def test_opening_that_fails_or_is_cancelled() -> None:
    async def main() -> None:
        with pytest.raises(triollama.ModelError, match="broken"):
            async with open_fake(FakeEngine(load_error=triollama.ModelError("broken"))):
                pass
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.02), open_fake(FakeEngine(load_seconds=9.0)):
                pass
        with pytest.raises(FileNotFoundError):
            async with aio.open_llama("none.gguf"):
                pass

    run_loop(main())


def test_after_closing_nothing_goes() -> None:
    async def main() -> None:
        async with open_fake(FakeEngine(token_seconds=9.0)) as llama:
            task = asyncio.create_task(llama.generate("x"))
            while not llama.active():
                await asyncio.sleep(0)
        with pytest.raises(trio.ClosedResourceError):
            await task
        with pytest.raises(trio.ClosedResourceError):
            await llama.generate("x")

    run_loop(main())


def test_what_the_body_raises_comes_out() -> None:
    async def main() -> None:
        with pytest.raises(ZeroDivisionError):
            async with open_fake(FakeEngine()) as llama, llama.stream("x"):
                _ = 1 / 0

    run_loop(main())


def test_a_server_of_asyncio(tiny: Any) -> None:
    """As web frameworks use it: one Llama, a task for each request, cancelled with its client."""

    async def main() -> None:
        async with aio.open_llama(tiny("llama"), n_ctx=2048, max_streams=2, threads=1) as llama:

            async def answer(reader: Any, writer: Any) -> None:
                prompt = (await reader.readline()).decode()
                gone = asyncio.create_task(reader.read())

                async def write() -> None:
                    options = {"max_tokens": 2000, "ignore_eos": True}
                    async with llama.stream(prompt, **options) as stream:
                        async for piece in stream:
                            writer.write(piece.text.encode())
                            await writer.drain()

                writing = asyncio.create_task(write())
                await asyncio.wait((gone, writing), return_when=asyncio.FIRST_COMPLETED)
                writing.cancel()
                await asyncio.wait((writing,))
                writer.close()

            server = await asyncio.start_server(answer, "127.0.0.1", 0)
            port = server.sockets[0].getsockname()[1]
            for _ in range(5):
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.write(b"Once upon\n")
                assert await reader.read(1)
                writer.close()
                with contextlib.suppress(ConnectionError):
                    await writer.wait_closed()
            while llama.active():
                await asyncio.sleep(0.001)
            while llama.statistics().slots_free < 2:
                await asyncio.sleep(0.001)
            server.close()

    run_loop(main())


def test_partial_values_come_as_pieces_do() -> None:
    async def test(llama: Any) -> None:
        async with llama.stream("Where?") as stream:
            seen = [dict(value) async for value in stream.partials()]
        assert seen[-1] == {"name": "Lima"} and len(seen) > 1

    run(test, FakeEngine(lambda prompt: '{"name":"Lima"}', token_seconds=0.0))


def test_an_object_is_the_same_however_it_is_reached(tmp_path: Any) -> None:
    class Sizes(NamedTuple):
        wide: int
        high: int

    async def test(llama: Any) -> None:
        chat, other = llama.conversation("a"), llama.conversation("b")
        await chat.say("Hello")
        assert llama.conversations["a"] == chat != other
        assert {chat, llama.conversations["a"]} == {chat}
        for some in ((one for one in [chat]), {"a": chat}.values(), {chat}, [chat]):
            document = await llama.save(tmp_path / "chats", some)
            assert [one.id for one in document.conversations] == ["a"]
        sized = llama.conversation(variables={"size": Sizes(1, 2)})
        sized.params = sized.params.replace(top_k=3)
        assert sized.params.top_k == 3

    run(test)


CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Lima"}}\n</tool_call>'


def test_tools_are_asyncio_s() -> None:
    started, ended = asyncio.Event(), []

    async def weather(city: str) -> str:
        """The weather of a city."""
        assert asyncio.current_task() is not None
        started.set()
        try:
            await asyncio.sleep(0.001 if city == "Lima" and not slow else 9.0)
        finally:
            ended.append(city)
        return "Sun."

    slow = False

    async def test(llama: Any) -> None:
        nonlocal slow
        chat = llama.conversation(template="chatml")
        assert (await chat.say("Go", tools=[weather])).text == "Sun there."
        assert [m.content for m in chat.messages if m.role == "tool"] == ["Sun."]
        slow = True
        started.clear()
        turn = asyncio.create_task(chat.say("Go"))
        await started.wait()
        turn.cancel()
        with pytest.raises(asyncio.CancelledError):
            await turn
        assert ended == ["Lima", "Lima"]
        assert len(chat.messages) == 4 and not chat.is_busy

    def reply(prompt: str) -> str:
        return "Sun there." if "tool_response" in prompt.rsplit("Go", 1)[1] else CALL

    run(test, FakeEngine(reply, token_seconds=0.0))


def test_a_call_while_it_is_being_closed() -> None:
    class Slow(FakeEngine):
        async def aclose(self) -> None:
            with trio.CancelScope(shield=True):
                closing.set()
                await may_close.wait()
            await super().aclose()

    closing, may_close = asyncio.Event(), trio.Event()

    async def main() -> None:
        opening = open_fake(Slow())
        llama: Any = await opening.__aenter__()
        leaving = asyncio.create_task(opening.__aexit__(None, None, None))
        await closing.wait()
        with pytest.raises(trio.ClosedResourceError):
            await llama.generate("x")
        may_close.set()
        await leaving
        with pytest.raises(trio.ClosedResourceError):
            await llama.generate("x")

    run_loop(main())
