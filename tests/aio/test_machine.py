"""Any order of calls, against the native engine: nothing hangs, leaks or disturbs others."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from triollama import GenerationParams, Llama, Stream, open_llama
from triollama import _engine as engine
from triollama.errors import QueueFullError

GREEDY = GenerationParams(temperature=0.0, repeat_penalty=1.0)
PROMPTS = ["Once", "upon a time", "in a land " * 9]
Step = tuple[Any, ...]

which = st.integers(0, 9)
steps: st.SearchStrategy[Step] = st.one_of(
    st.tuples(
        st.just("stream"),
        st.integers(0, 2),
        st.sampled_from([0, 1, 9, 40, None]),
        st.integers(1, 4),
        st.integers(0, 2),
    ),
    st.tuples(st.just("receive"), which, st.integers(1, 9)),
    st.tuples(st.just("park"), which),
    st.tuples(st.just("cancel"), which),
    st.tuples(st.just("close"), which),
    st.tuples(st.just("update"), which, st.integers(1, 30)),
    st.tuples(st.just("priority"), which, st.integers(-3, 3)),
    st.tuples(st.just("snapshot")),
    st.tuples(st.just("score"), st.integers(0, 2)),
    st.tuples(st.just("embed"), st.integers(0, 2)),
    st.tuples(st.just("cancel all")),
    st.tuples(st.just("wait")),
)


@pytest.fixture(scope="module")
def expected(tiny: Callable[..., Path]) -> dict[str, Any]:
    """The path, and what each prompt gives alone."""
    path = tiny("gemma3", sliding_window=16)
    texts: list[str] = []

    async def main() -> None:
        async with open_it(path) as llama:
            for prompt in PROMPTS:
                texts.append((await llama.generate(prompt, GREEDY, max_tokens=60)).text)

    trio.run(main)
    return {"path": path, "texts": texts}


def open_it(path: Path) -> open_llama:
    return open_llama(path, n_ctx=256, max_streams=3, max_queue=3, threads=1, deterministic=True)


async def play(path: Path, texts: list[str], script: list[Step]) -> None:
    streams: list[tuple[Stream, int]] = []

    async def do(llama: Llama, nursery: trio.Nursery, step: Step) -> None:
        name, *args = step
        if name == "stream":
            i, max_tokens, capacity, priority = args
            stream = llama.stream(
                PROMPTS[i], GREEDY, max_tokens=max_tokens, capacity=capacity, priority=priority
            )
            with trio.move_on_after(0.02) as waiting:  # for room: nobody may ever make some
                await stream.__aenter__()
            if not waiting.cancelled_caught:
                streams.append((stream, i))
        elif name in ("receive", "park", "cancel", "close", "update", "priority"):
            if not streams:
                return
            stream, _ = streams[args[0] % len(streams)]
            if name == "receive":
                with trio.move_on_after(0.001 * args[1]):
                    await receive(stream, args[1])
            elif name == "park":
                nursery.start_soon(receive, stream, 10_000)
            elif name == "cancel":
                llama.cancel(stream.id)
            elif name == "close":
                await stream.aclose()
            elif name == "update":
                stream.update(max_tokens=args[1])
            else:
                stream.set_priority(args[1])
        elif name == "snapshot":
            statistics = llama.statistics()
            assert 0 <= statistics.slots_free <= 3
            assert statistics.parked <= statistics.running + statistics.prefilling <= 3
            ids = [info.id for info in llama.active()]
            assert ids == sorted(ids)
        elif name in ("score", "embed"):
            try:
                with trio.move_on_after(0.01):
                    await getattr(llama, name)(PROMPTS[args[0]])
            except QueueFullError:
                pass
        elif name == "cancel all":
            llama.cancel_all()
        else:
            await trio.sleep(0.001)

    async def receive(stream: Stream, n: int) -> None:
        try:
            for _ in range(n):
                await stream.receive()
        except (trio.EndOfChannel, trio.ClosedResourceError, trio.BusyResourceError):
            pass

    async with open_it(path) as llama:
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                for step in script:
                    await do(llama, nursery, step)
                nursery.cancel_scope.cancel()
            for stream, i in streams:
                # Updates only change lengths: what came is the beginning of what comes alone.
                assert stream.text.startswith(texts[i]) or texts[i].startswith(stream.text)
                await stream.aclose()
            for stream, _ in streams:
                await stream.ended()
            text = (await llama.generate(PROMPTS[0], GREEDY, max_tokens=60)).text
            assert text == texts[0]
            statistics = llama.statistics()
            assert (statistics.slots_free, statistics.cells_used) == (3, 0)
            assert (statistics.running, statistics.queued) == (0, 0)


@pytest.mark.slow
@settings(
    max_examples=200,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(script=st.lists(steps, min_size=40, max_size=100))
def test_ten_thousand_steps_in_any_order(expected: dict[str, Any], script: list[Step]) -> None:
    before = engine.live_objects()
    trio.run(play, expected["path"], expected["texts"], script)
    assert engine.live_objects() == before


def test_a_long_script_of_everything(expected: dict[str, Any]) -> None:
    script: list[Step] = []
    for i in range(60):
        script += [
            ("stream", i % 3, [9, None, 40, 0][i % 4], 1 + i % 3, i % 3),
            ("park", i),
            ("snapshot",),
            ("receive", i + 1, 3),
            [("cancel", i), ("close", i + 2), ("update", i, 5), ("cancel all",)][i % 4],
            [("score", 1), ("embed", 2), ("wait",), ("priority", i, 2)][i % 4],
        ]
    before = engine.live_objects()
    descriptors = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    trio.run(play, expected["path"], expected["texts"], script)
    assert engine.live_objects() == before
    if descriptors:
        assert len(os.listdir("/proc/self/fd")) == descriptors
