"""The promises of docs/streams.md: each is named by a test, some of them here."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
import triollama
from trio.testing import MockClock, assert_checkpoints
from triollama import GenerationParams, Llama, open_llama
from triollama import _engine as engine
from triollama.errors import AdapterError
from triollama.testing import FakeEngine, open_fake_llama

TESTS = Path(__file__).parents[1]
PAGE = (TESTS.parent / "docs" / "streams.md").read_text(encoding="utf-8")
PROMISES = re.findall(r"^- \*\*(S\d+)\*\*", PAGE, re.MULTILINE)

GREEDY = GenerationParams(temperature=0.0, repeat_penalty=1.0, max_tokens=6, ignore_eos=True)
LONG = GREEDY.replace(max_tokens=None)


@pytest.fixture
def path(tiny: Any) -> Path:
    found: Path = tiny("llama")
    return found


def run(main: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        with trio.fail_after(60):
            await main()

    trio.run(bounded)


def opened(path: Path, **options: Any) -> open_llama:
    return open_llama(path, **{"n_ctx": 256, "max_streams": 2, "threads": 1, **options})


# The list


def marked() -> Iterator[tuple[str, str]]:
    """(promise, test) for every test function with ``@pytest.mark.promise(...)``."""
    for file in sorted(TESTS.rglob("test_*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if not isinstance(node, ast.FunctionDef) or not node.name.startswith("test_"):
                continue
            for decorator in node.decorator_list:
                if ast.unparse(decorator).startswith("pytest.mark.promise("):
                    assert isinstance(decorator, ast.Call)
                    for argument in decorator.args:
                        yield ast.literal_eval(argument), f"{file.name}::{node.name}"


def test_the_list_is_numbered_without_gaps() -> None:
    assert [f"S{i + 1}" for i in range(len(PROMISES))] == PROMISES


def test_every_promise_is_named_by_a_test() -> None:
    named = {promise for promise, _ in marked()}
    assert set(PROMISES) - named == set(), "promises without a test"
    assert named - set(PROMISES) == set(), "tests that name promises which do not exist"


# The shape of the API


TRIO_SIDE = [
    name
    for name, home in triollama._HOMES.items()
    if home.split(".")[0] in ("conversation", "engine", "llama", "serving", "streams")
]


def public_functions() -> Iterator[tuple[str, Any]]:
    """Functions and methods of the trio side, what they inherit from each other included."""
    for name in TRIO_SIDE:
        thing = getattr(triollama, name)
        if inspect.isfunction(thing):
            yield name, thing
            continue
        for attribute, value in inspect.getmembers(thing, inspect.isroutine):
            ours = (getattr(value, "__module__", None) or "").startswith(("triollama", "trio."))
            if ours and (not attribute.startswith("_") or attribute.startswith("__a")):
                yield f"{name}.{attribute}", value


@pytest.mark.promise("S3")
def test_no_function_takes_a_timeout() -> None:
    functions = dict(public_functions())
    assert {"Llama.generate", "Stream.receive", "open_llama.__aenter__"} <= functions.keys()
    for name, function in functions.items():
        assert "timeout" not in inspect.signature(function).parameters, name
    assert "timeout" not in GenerationParams.__struct_fields__


@pytest.mark.promise("S4")
def test_there_is_no_async_generator() -> None:
    for name, function in public_functions():
        assert not inspect.isasyncgenfunction(inspect.unwrap(function)), name


CHECKED = {
    "Conversation.edit",
    "Conversation.fork",
    "Conversation.go_on",
    "Conversation.idle",
    "Conversation.make_title",
    "Conversation.regenerate",
    "Conversation.say",
    "Conversations.flush",
    "Conversations.written",
    "Llama.choose",
    "Llama.embed",
    "Llama.flush",
    "Llama.generate",
    "Llama.load_adapter",
    "Llama.load_control_vector",
    "Llama.restore",
    "Llama.save",
    "Llama.score",
    "Llama.unload_adapter",
    "Llama.warm_up",
    "MapResults.__aenter__",
    "MapResults.__aexit__",
    "MapResults.__anext__",
    "MapResults.aclose",
    "MapResults.receive",
    "Stream.__aenter__",
    "Stream.__aexit__",
    "Stream.__anext__",
    "Stream.aclose",
    "Stream.ended",
    "Stream.receive",
    "TurnStream.__aenter__",
    "TurnStream.__aexit__",
    "TurnStream.__anext__",
    "TurnStream.aclose",
    "TurnStream.ended",
    "TurnStream.receive",
    "open_llama.__aenter__",
    "open_llama.__aexit__",
}
"""What the next test calls."""

ENDLESS = {"Llama.autosave", "run_llama"}
"""They return only when they are cancelled, and wait meanwhile."""


@pytest.mark.promise("S8")
def test_every_async_function_is_in_the_test_of_checkpoints() -> None:
    found = {n for n, f in public_functions() if inspect.iscoroutinefunction(inspect.unwrap(f))}
    assert found == CHECKED | ENDLESS


@pytest.mark.promise("S8")
def test_every_async_call_is_a_checkpoint_also_when_it_succeeds_at_once(
    path: Path, tmp_path: Path
) -> None:
    async def checked(call: Awaitable[Any]) -> Any:
        with assert_checkpoints():
            return await call

    async def scheduled(call: Awaitable[Any]) -> None:
        stops = _Stops()
        trio.lowlevel.add_instrument(stops)
        await call
        trio.lowlevel.remove_instrument(stops)
        assert stops.n > 0

    async def main() -> None:
        opening = opened(path)
        llama: Llama = await checked(opening.__aenter__())
        chat = llama.conversation(params=GREEDY)
        turns = [llama.stream("abc", GREEDY), chat.stream("Hello")]
        for stream in turns:
            await checked(stream.__aenter__())
            await checked(stream.receive())
            await checked(stream.__anext__())
            async for _ in stream:
                pass
            with pytest.raises(StopAsyncIteration), assert_checkpoints():
                await stream.__anext__()
            with pytest.raises(trio.EndOfChannel), assert_checkpoints():
                await stream.receive()
            await checked(stream.ended())
            # Of what was committed nobody hears by Cancelled; others run all the same.
            left = scheduled if stream is turns[1] else checked
            await left(stream.aclose())
            await left(stream.aclose())
            await left(stream.__aexit__(None, None, None))
        await checked(llama.generate("abc", GREEDY))
        await checked(llama.generate("abc", GREEDY, max_tokens=0))
        results = llama.map(["abc"] * 4, GREEDY)
        await checked(results.__aenter__())
        await checked(results.receive())
        await checked(results.__anext__())
        await checked(results.aclose())
        await checked(results.__aexit__(None, None, None))
        await checked(llama.warm_up())
        await checked(llama.score("abc"))
        await checked(llama.choose("abc", ["d", "e"]))
        await checked(llama.embed("abc"))
        await checked(chat.idle())
        await checked(chat.say("More"))
        await checked(chat.go_on())
        await checked(chat.regenerate())
        await checked(chat.edit(0, "Good day"))
        branch = await checked(chat.fork())
        await checked(llama.conversation().fork())  # nothing to share
        await checked(branch.make_title(max_tokens=3))
        await checked(llama.save(tmp_path / "chats.json", [chat]))
        await checked(llama.restore(tmp_path / "chats.json", replace=True))
        async with trio.open_nursery() as nursery:
            await nursery.start(llama.autosave, tmp_path / "auto")
            await checked(llama.flush())
            nursery.cancel_scope.cancel()
        rows = await zeros(llama)
        vector = await checked(llama.load_control_vector(rows))
        assert await checked(llama.load_control_vector(rows)) is vector
        await checked(llama.unload_adapter(vector))
        with pytest.raises(AdapterError), assert_checkpoints():
            await llama.load_adapter(tmp_path / "none.gguf")
        await checked(opening.__aexit__(None, None, None))

    run(main)


class _Stops(trio.abc.Instrument):
    """How often this task has let others run."""

    def __init__(self) -> None:
        self.task = trio.lowlevel.current_task()
        self.n = 0

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        self.n += task is self.task


async def zeros(llama: Llama) -> Any:
    import numpy

    model = llama.model
    return numpy.zeros((model.n_layer - 1, model.n_embd), dtype=numpy.float32)


@pytest.mark.promise("S8")
def test_in_a_cancelled_scope_every_call_raises_cancelled(path: Path) -> None:
    """And nothing has happened, so that the call can be made again."""

    async def main() -> None:
        async with opened(path) as llama:
            chat = llama.conversation(params=GREEDY)
            await chat.say("Hello")
            before = chat.messages
            stream = llama.stream("abc", GREEDY)
            calls: list[Callable[[], Awaitable[Any]]] = [
                lambda: llama.generate("abc", GREEDY),
                lambda: llama.score("abc"),
                lambda: llama.embed("abc"),
                lambda: chat.say("More"),
                lambda: chat.edit(0, "x"),
                chat.regenerate,
                chat.fork,
                stream.__aenter__,
            ]
            for call in calls:
                with trio.CancelScope() as scope:
                    scope.cancel()
                    await call()
                assert scope.cancelled_caught
            assert chat.messages == before
            assert not chat.is_busy
            assert llama.statistics().queued == 0
            async with stream:
                assert len([piece async for piece in stream]) > 0

    run(main)


# Leaving


@pytest.mark.promise("S13")
def test_leaving_a_stream_waits_for_nobody() -> None:
    """An engine that needs 3 seconds to stop: leaving takes none of them, ``ended`` all."""

    async def main() -> None:
        fake = FakeEngine(lambda prompt: "x" * 99, token_seconds=1.0, cancel_seconds=3.0)
        async with open_fake_llama(fake) as llama:
            for road in range(4):
                start = trio.current_time()
                with trio.CancelScope() as scope:
                    try:
                        async with llama.stream("x") as stream:
                            await stream.receive()
                            received = trio.current_time()
                            if road == 1:
                                raise KeyError
                            if road == 2:
                                scope.cancel()
                                await trio.sleep_forever()
                            if road == 3:
                                await stream.aclose()
                                await stream.aclose()
                    except KeyError:
                        pass
                assert trio.current_time() == received > start
                assert stream.finish_reason == "cancelled"
                await stream.ended()
                assert trio.current_time() == received + 3.0

    trio.run(main, clock=MockClock(autojump_threshold=0))


@pytest.mark.promise("S5")
def test_leaving_ends_streams_in_every_state_and_waits_for_the_thread(path: Path) -> None:
    async def main() -> None:
        outcomes: list[str] = []

        async def read(llama: Llama, prompt: Any, capacity: int, pause: float) -> None:
            try:
                async with llama.stream(prompt, LONG, capacity=capacity) as stream:
                    await trio.sleep(pause)
                    async for _ in stream:
                        await trio.sleep(pause)
                outcomes.append("ended")
            except trio.ClosedResourceError:
                outcomes.append("closed")

        for delay in (0.0, 0.002, 0.01, 0.03):
            outcomes.clear()
            async with trio.open_nursery() as nursery:
                async with opened(path, n_ctx=2048, max_streams=2) as llama:
                    for i in range(2):
                        nursery.start_soon(read, llama, "x" * 1500, 1, 0.001)
                        nursery.start_soon(read, llama, "queued", 4, 0.001 * i)
                    await trio.sleep(delay)
                # The thread is gone: what it drove is closed, and can be closed.
                assert "Decoder" not in engine.live_objects()
                assert "Context" not in engine.live_objects()
            assert outcomes == ["closed"] * 4

    run(main)


# What comes out


@pytest.mark.promise("S7")
def test_groups_come_out_as_they_are_also_beside_running_streams(path: Path) -> None:
    async def main() -> None:
        group = BaseExceptionGroup("mine", [ValueError("a"), ExceptionGroup("b", [OSError("c")])])

        async def fail(llama: Llama, error: BaseException) -> None:
            async with llama.stream("x", LONG, capacity=1) as stream:
                await stream.receive()
                raise error

        with pytest.raises(BaseExceptionGroup) as caught:
            async with opened(path) as llama:
                await fail(llama, group)
        assert caught.value is group

        # The user's nursery makes a group of what failed in it; ours adds no layer.
        with pytest.RaisesGroup(LookupError):
            async with opened(path) as llama, trio.open_nursery() as nursery:
                nursery.start_soon(fail, llama, LookupError("mine"))
        with pytest.raises(LookupError):
            async with opened(path) as llama:
                await fail(llama, LookupError("mine"))

        async def wait() -> None:
            async with opened(path) as llama, llama.stream("x", LONG, capacity=1):
                await trio.sleep_forever()

        with pytest.raises(trio.TooSlowError), trio.fail_after(0.05):
            await wait()

    run(main)


@pytest.mark.promise("S12")
def test_who_comes_after_an_engine_died_learns_the_cause_too() -> None:
    async def main() -> None:
        fake = FakeEngine(max_streams=1)
        async with open_fake_llama(fake) as llama:
            running, queued = llama.stream("x", LONG), llama.stream("y", LONG)
            async with running, queued:
                await running.receive()
                fake.die("boom")
                assert running.engine_stream.take() is None
                for stream in (running, queued):
                    with pytest.raises(trio.BrokenResourceError) as caught:
                        await stream.receive()
                    assert str(caught.value.__cause__) == "boom"
            for call in (llama.generate, llama.score, llama.embed):
                with pytest.raises(trio.BrokenResourceError, match="boom"):
                    await call("x")

    trio.run(main, clock=MockClock(autojump_threshold=0))


# Telling


@pytest.mark.promise("S22")
def test_statistics_tell_each_state(path: Path) -> None:
    async def until(condition: Callable[[], bool]) -> None:
        while not condition():
            await trio.sleep(0.001)

    async def main() -> None:
        async with opened(path, max_streams=2, max_queue=5) as llama:
            one, two = (llama.stream("abc", LONG, capacity=1) for _ in range(2))
            third = llama.stream("abc", LONG)
            async with one, two:
                # Both run, and wait for their readers; then nothing is left to do.
                await until(lambda: llama.statistics().parked == 2)
                statistics = llama.statistics()
                assert statistics.running + statistics.prefilling == 2
                assert statistics.slots_free == 0
                n_prompt = len(llama.tokenize("abc"))
                assert statistics.prompt_tokens == 2 * n_prompt
                assert statistics.generated_tokens >= 2
                assert statistics.cells_used >= 2 * n_prompt
                assert len(statistics.first_token_s) == 2
                assert all(seconds > 0 for seconds in statistics.first_token_s)
                states = [info.state for info in llama.active()]
                assert states == ["running", "running"]
            async with third:
                async for _ in third:
                    if len(third.tokens) > 20:
                        break
            await third.ended()
            after = llama.statistics()
            assert (after.cancelled, after.running, after.parked, after.queued) == (3, 0, 0, 0)
            assert (after.cells_used, after.slots_free, len(after.first_token_s)) == (0, 2, 3)
            assert llama.active() == []

    run(main)
