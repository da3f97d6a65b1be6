"""What a Llama promises, whichever engine is behind it: the native one and the fake one alike."""

from __future__ import annotations

import copy
import math
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import assert_checkpoints
from triollama import GenerationParams, Llama, Piece, Stream
from triollama.errors import (
    AdapterError,
    BusyError,
    ContextFullError,
    GrammarError,
    ParameterError,
    QueueFullError,
    TokenError,
)
from triollama.testing import FakeEngine, open_fake_llama
from worlds import World

GREEDY = GenerationParams(temperature=0.0, repeat_penalty=1.0, max_tokens=12, seed=42)
LONG = GREEDY.replace(max_tokens=None)
PROMPT = "Once upon a time"


async def pieces_of(llama: Llama, **changes: Any) -> list[Piece]:
    async with llama.stream(PROMPT, GREEDY, **changes) as stream:
        return [piece async for piece in stream]


async def until(condition: Callable[[], bool]) -> None:
    """Other tasks, and the engine, go on until ``condition``."""
    while not condition():
        await trio.sleep(0.001)


# Streaming


def test_pieces_join_to_the_text_and_the_tokens(world: World) -> None:
    async def main() -> None:
        async with world.open() as llama, llama.stream(PROMPT, GREEDY) as stream:
            pieces = [piece async for piece in stream]
            await stream.ended()
            assert stream.text == "".join(str(piece) for piece in pieces)
            assert stream.tokens == [token for piece in pieces for token in piece.tokens]
            assert len(stream.tokens) == 12
            assert stream.finish_reason == "length"
            assert all(piece.text for piece in pieces[:-1])
            times = [piece.time for piece in pieces]
            assert times == sorted(times)
            usage = stream.usage
            assert usage.prompt_tokens == len(llama.tokenize(PROMPT))
            assert usage.generated_tokens == 12
            assert usage.first_token_seconds is not None
            assert 0 < usage.first_token_seconds <= usage.seconds
            with pytest.raises(trio.EndOfChannel):
                await stream.receive()

    world.run(main)


def test_generate_gives_what_stream_gives(world: World) -> None:
    async def main() -> None:
        async with world.open() as llama:
            text = "".join(str(piece) for piece in await pieces_of(llama))
            completion = await llama.generate(PROMPT, GREEDY)
            assert (completion.text, completion.finish_reason) == (text, "length")
            assert completion.seed == GREEDY.seed
            assert completion.logprobs is None
            tokens = await llama.generate(llama.tokenize(PROMPT), GREEDY)
            assert tokens.text == text

    world.run(main)


@pytest.mark.promise("S20")
def test_streams_beside_each_other_equal_lone_ones(world: World) -> None:
    async def main() -> None:
        async with world.open() as llama:
            prompts = [f"{PROMPT} {i}" for i in range(6)]
            alone = [(await llama.generate(prompt, GREEDY)).text for prompt in prompts]
            together: dict[str, str] = {}

            async def one(prompt: str) -> None:
                together[prompt] = (await llama.generate(prompt, GREEDY)).text

            async with trio.open_nursery() as nursery:
                for prompt in prompts:
                    nursery.start_soon(one, prompt)
            assert [together[prompt] for prompt in prompts] == alone

    world.run(main)


@pytest.mark.promise("S17")
def test_a_stop_string_ends_the_text_before_it(world: World) -> None:
    async def main() -> None:
        async with world.open() as llama:
            whole = (await llama.generate(PROMPT, GREEDY, max_tokens=40)).text
            stop = whole[len(whole) // 2 : len(whole) // 2 + 2]
            completion = await llama.generate(PROMPT, GREEDY, max_tokens=40, stop=("\x01", stop))
            assert completion.text == whole[: whole.index(stop)]
            assert (completion.finish_reason, completion.stop) == ("stop", stop)

    world.run(main)


@pytest.mark.promise("S17")
def test_a_stop_token_ends_it_as_the_vocabularys_own_do(world: World) -> None:
    async def main() -> None:
        async with world.open() as llama:
            whole = await llama.generate(PROMPT, GREEDY, max_tokens=40)
            at = next(i for i in range(3, 40) if whole.tokens[i] not in whole.tokens[:i])
            chosen = whole.tokens[at]
            for changes in ({}, {"ignore_eos": True}, {"logprobs": 0}):
                async with llama.stream(
                    PROMPT, GREEDY, max_tokens=40, stop_tokens=[2, chosen], **changes
                ) as stream:
                    async for _ in stream:
                        pass
                    assert stream.tokens == whole.tokens[:at]
                    assert whole.text.startswith(stream.text)
                    assert (stream.finish_reason, stream.end_token) == ("eos", chosen)
                    completion = stream.completion()
                    assert (completion.end_token, completion.stop) == (chosen, None)
                    assert completion.usage.generated_tokens == at
                    if completion.logprobs is not None:
                        assert len(completion.logprobs) == at
            assert (await llama.generate(PROMPT, GREEDY)).end_token is None
            with pytest.raises(TokenError, match="stop_tokens"):
                await llama.generate(PROMPT, stop_tokens=(2**30,))
            async with llama.stream(PROMPT, LONG, capacity=1) as stream:
                with pytest.raises(ParameterError):
                    stream.update(stop_tokens=(chosen,))

    world.run(main)


def test_logprobs_come_one_for_each_token(world: World) -> None:
    async def main() -> None:
        async with world.open() as llama:
            completion = await llama.generate(PROMPT, GREEDY, logprobs=1)
            assert completion.logprobs is not None
            assert [lp.token for lp in completion.logprobs] == completion.tokens
            for lp in completion.logprobs:
                assert lp.logprob <= 0
                assert lp.top == ((lp.token, pytest.approx(lp.logprob)),)

    world.run(main)


@pytest.mark.promise("S17")
def test_the_context_ends_a_generation(world: World) -> None:
    async def main() -> None:
        async with world.open() as llama:
            completion = await llama.generate([65] * 250, LONG)
            assert (completion.finish_reason, len(completion.tokens)) == ("context", 7)
            with pytest.raises(ContextFullError) as caught:
                await llama.generate([65] * 257, LONG)
            assert (caught.value.needed, caught.value.n_ctx) == (257, 256)

    world.run(main)


def test_a_drawn_seed_is_told(world: World) -> None:
    async def main() -> None:
        async with world.open() as llama:
            one = await llama.generate(PROMPT, GREEDY, seed=None, temperature=1.0)
            again = await llama.generate(PROMPT, GREEDY, seed=one.seed, temperature=1.0)
            assert one.text == again.text

    world.run(main)


@pytest.mark.promise("S24")
def test_score_and_embed_work_beside_streams(world: World) -> None:
    async def main() -> None:
        async with world.open() as llama, llama.stream(PROMPT, LONG, capacity=1) as stream:
            await stream.receive()
            score = await llama.score("upon a time", given="Once ")
            assert len(score.tokens) == len(score.logprobs) > 0
            assert score.total < 0
            assert math.isfinite(score.perplexity)
            one = await llama.embed("a text")
            many = await llama.embed(["a text", "another", "a third", "a fourth", "a fifth"])
            assert many.shape == (5, *one.shape)
            assert many[0] == pytest.approx(one, abs=1e-5)
            assert float((one * one).sum()) == pytest.approx(1.0)
            assert stream.finish_reason is None

    world.run(main)


# Mistakes


@pytest.mark.promise("S18")
def test_mistakes_are_typed_and_cost_no_place(world: World) -> None:
    async def main() -> None:
        async with world.open(max_queue=0, when_full="raise") as llama:
            for wrong in ({"temperature": -1}, {"nonsense": 1}, {"capacity": 0}):
                with pytest.raises(ParameterError):
                    llama.stream(PROMPT, **wrong)
            with pytest.raises(ParameterError):
                llama.stream("")
            with pytest.raises(ParameterError):
                await llama.generate([])
            for token in (-1, 2**30):
                with pytest.raises(TokenError):
                    await llama.generate([token])
            with pytest.raises(ParameterError):
                await llama.embed([])
            with pytest.raises(ParameterError):
                llama.update(123456, max_tokens=1)
            assert llama.cancel(123456) is False
            refused = llama.stream(PROMPT, GREEDY)
            async with llama.stream(PROMPT, LONG), llama.stream(PROMPT, LONG):
                with pytest.raises(QueueFullError):
                    await llama.generate(PROMPT)
                with pytest.raises(QueueFullError):
                    await refused.__aenter__()
            await until(lambda: llama.statistics().slots_free == llama.max_streams)
            async with refused:  # nothing had happened
                assert len([piece async for piece in refused]) > 0

    world.run(main)


@pytest.mark.promise("S18")
def test_entering_waits_for_room_in_a_full_queue(world: World) -> None:
    async def main() -> None:
        async with world.open(max_streams=1, max_queue=0) as llama:
            began: list[str] = []

            async def one(name: str, priority: int) -> None:
                async with llama.stream(PROMPT, GREEDY, priority=priority) as stream:
                    began.append(name)
                    async for _ in stream:
                        pass

            async with (
                llama.stream(PROMPT, LONG, capacity=1) as first,
                trio.open_nursery() as tasks,
            ):
                for name, priority in (("a", 0), ("b", 0), ("urgent", 1)):
                    tasks.start_soon(one, name, priority)
                    await trio.testing.wait_all_tasks_blocked()
                with trio.CancelScope() as gives_up:
                    tasks.start_soon(lambda: trio.sleep(0))
                    gives_up.cancel()
                    await llama.generate(PROMPT, priority=2)
                closed = llama.stream(PROMPT, LONG)
                with pytest.RaisesGroup(trio.ClosedResourceError):
                    async with trio.open_nursery() as entering:
                        entering.start_soon(closed.__aenter__)
                        await trio.testing.wait_all_tasks_blocked()
                        await closed.aclose()
                assert len(llama.active()) == 1
                assert began == []
                await first.aclose()
            assert began == ["urgent", "a", "b"]
            scores = [await llama.score("some text"), await llama.score("some text")]
            assert scores[0].total == scores[1].total

    world.run(main)


@pytest.mark.promise("S5")
def test_who_waits_for_room_learns_of_the_end(world: World) -> None:
    async def main() -> None:
        outcomes: list[str] = []

        async def wait(llama: Llama) -> None:
            try:
                await llama.generate(PROMPT, LONG)
            except trio.ClosedResourceError:
                outcomes.append("closed")

        async with trio.open_nursery() as nursery, world.open(max_streams=1, max_queue=0) as llama:
            for _ in range(3):
                nursery.start_soon(wait, llama)
            await trio.testing.wait_all_tasks_blocked()
        assert outcomes == ["closed"] * 3

    world.run(main)


def test_a_broken_grammar_is_refused(world: World) -> None:
    async def main() -> None:
        async with world.open(max_streams=1, max_queue=0, when_full="raise") as llama:
            for grammar in ("root ::= [a-z", "root ::= nothing", "root"):
                with pytest.raises(GrammarError):
                    await llama.generate(PROMPT, grammar=grammar)
            async with llama.stream(PROMPT, LONG, capacity=1) as stream:
                stream.update(grammar="root ::= [a-z")
                with pytest.raises(GrammarError):
                    async for _ in stream:
                        pass
            await llama.generate(PROMPT, GREEDY, grammar="root ::= [a-z]*")

    world.run(main, threads=True)


def test_adapters_come_and_go(world: World, tmp_path: Path) -> None:
    path = world.write_adapter(tmp_path / "adapter.gguf")
    (tmp_path / "rubbish.gguf").write_bytes(b"GGUF" + bytes(100))

    async def main() -> None:
        async with world.open() as llama:
            for wrong in ("rubbish.gguf", "none.gguf"):
                with pytest.raises(AdapterError, match=wrong):
                    await llama.load_adapter(tmp_path / wrong)
            adapter = await llama.load_adapter(path)
            assert list(llama.adapters) == [adapter]
            chat = llama.conversation(params=GREEDY, adapters=[(adapter, 0.5)])
            await chat.say("Hello")
            with pytest.raises(BusyError, match=chat.id):
                await llama.unload_adapter(adapter)
            chat.set_adapters([])
            assert (await chat.say("And then?")).usage.cached_tokens == 0
            for scale in (0.5, 1.0):
                used = [(adapter, scale)]
                async with llama.stream(PROMPT, LONG, capacity=1, adapters=used) as stream:
                    await stream.receive()
                    with pytest.raises(BusyError, match="wait for it"):
                        await llama.unload_adapter(adapter)
                    assert (await llama.score("some text", adapters=used)).tokens
                await stream.ended()
            await llama.unload_adapter(adapter)
            for call in (llama.generate, llama.score, llama.embed):
                with pytest.raises(ParameterError, match="still loaded"):
                    await call("some text", adapters=used)
            assert len(llama.adapters) == 0

    world.run(main, threads=True)


def test_a_stream_is_not_copied(world: World) -> None:
    async def main() -> None:
        async with world.open() as llama, llama.stream(PROMPT, LONG) as stream:
            for thing in (llama, stream):
                for copier in (copy.copy, copy.deepcopy, pickle.dumps):
                    with pytest.raises(TypeError, match="neither copied nor pickled"):
                        copier(thing)

    world.run(main)


def test_another_trio_run_is_refused(world: World) -> None:
    async def main() -> None:
        async with world.open() as llama, llama.stream(PROMPT, LONG, capacity=1) as stream:
            await stream.receive()
            chat = llama.conversation()
            new, turn = llama.stream(PROMPT), chat.stream("Hello")

            async def elsewhere() -> None:
                for call in (
                    lambda: llama.generate(PROMPT),
                    lambda: llama.score(PROMPT),
                    new.__aenter__,
                    turn.__aenter__,
                    lambda: chat.say("Hello"),
                    stream.receive,
                    stream.ended,
                    stream.aclose,
                ):
                    with pytest.raises(BusyError, match=r"another trio\.run"):
                        await call()

            await trio.to_thread.run_sync(trio.run, elsewhere)
            await stream.receive()
            assert len((await llama.generate(PROMPT, GREEDY)).tokens) == 12

    world.run(main, threads=True)


def test_a_stream_runs_once_and_only_inside_async_with(world: World) -> None:
    async def main() -> None:
        async with world.open() as llama:
            stream = llama.stream(PROMPT, LONG, capacity=1)
            with pytest.raises(BusyError):
                await stream.receive()
            async with stream:
                with pytest.raises(BusyError):
                    await stream.__aenter__()
                with pytest.raises(BusyError):
                    stream.completion()
            with pytest.raises(BusyError):
                await stream.__aenter__()

    world.run(main)


# Channels


@pytest.mark.promise("S8", "S28")
def test_every_async_call_is_a_checkpoint(world: World) -> None:
    async def main() -> None:
        async with world.open() as llama:
            stream = llama.stream(PROMPT, GREEDY)
            with assert_checkpoints():
                await stream.__aenter__()
            for _ in range(3):
                with assert_checkpoints():
                    await stream.receive()
            with assert_checkpoints():
                await stream.aclose()
            with assert_checkpoints():
                await stream.aclose()
            with assert_checkpoints():
                await stream.__aexit__(None, None, None)
            with assert_checkpoints():
                await stream.ended()
            with pytest.raises(trio.ClosedResourceError):
                await stream.receive()
            async with llama.stream(PROMPT, GREEDY) as short:
                async for _ in short:
                    pass
                with pytest.raises(trio.EndOfChannel), assert_checkpoints():
                    await short.receive()
            with assert_checkpoints():
                await llama.generate(PROMPT, GREEDY)
            with assert_checkpoints():
                await llama.score("some text")
            with assert_checkpoints():
                await llama.embed("some text")

    world.run(main)


@pytest.mark.promise("S8", "S28")
def test_opening_and_leaving_are_checkpoints(world: World) -> None:
    async def main() -> None:
        opening = world.open()
        with assert_checkpoints():
            await opening.__aenter__()
        with assert_checkpoints():
            await opening.__aexit__(None, None, None)

    world.run(main)


@pytest.mark.promise("S9")
def test_a_cancelled_receive_consumes_nothing(world: World) -> None:
    async def main() -> None:
        async with world.open() as llama:
            expected = await pieces_of(llama)
            async with llama.stream(PROMPT, GREEDY) as stream:
                got: list[Piece] = []
                attempt = 0
                while True:
                    attempt += 1
                    with trio.CancelScope() as scope:
                        if attempt % 2:
                            scope.cancel()  # before it begins
                        else:
                            scope.deadline = trio.current_time() + 0.0005 * (attempt % 5)
                        try:
                            got.append(await stream.receive())
                        except trio.EndOfChannel:
                            break
            assert [str(p) for p in got] == [str(p) for p in expected]

    world.run(main)


@pytest.mark.promise("S10")
def test_two_receivers_are_one_too_many(world: World) -> None:
    async def main() -> None:
        async with world.open() as llama, llama.stream(PROMPT, LONG, capacity=1) as stream:
            refused = 0

            async def receive_all() -> None:
                nonlocal refused
                try:
                    async for _ in stream:
                        pass
                except trio.BusyResourceError:
                    refused += 1

            async with trio.open_nursery() as nursery:
                nursery.start_soon(receive_all)
                nursery.start_soon(receive_all)
            assert refused == 1

    world.run(main)


@pytest.mark.promise("S11")
def test_closing_wakes_the_receiver(world: World) -> None:
    async def main() -> None:
        async with world.open() as llama:
            full = [llama.stream(PROMPT, LONG, capacity=1) for _ in range(2)]
            async with full[0], full[1]:
                stream = llama.stream(PROMPT, LONG)
                closed = False

                async def receive() -> None:
                    nonlocal closed
                    try:
                        while True:
                            await stream.receive()
                    except trio.ClosedResourceError:
                        closed = True

                async with trio.open_nursery() as nursery:
                    await stream.__aenter__()
                    nursery.start_soon(receive)
                    await trio.testing.wait_all_tasks_blocked()
                    await stream.aclose()
                assert closed
                with pytest.raises(trio.ClosedResourceError):
                    await stream.receive()
                assert stream.finish_reason == "cancelled"

    world.run(main)


# Cancellation


@pytest.mark.promise("S13")
def test_leaving_frees_the_place_at_once(world: World) -> None:
    async def main() -> None:
        async with world.open(max_streams=1, max_queue=0, when_full="raise") as llama:
            for n in (0, 1, 3):
                stream = llama.stream(PROMPT, LONG, capacity=1)

                async def leave(stream: Stream = stream, n: int = n) -> None:
                    async with stream:
                        for _ in range(n):
                            await stream.receive()
                        raise RuntimeError("mine")

                with pytest.raises(RuntimeError, match="mine"):
                    await leave()
                assert stream.finish_reason == "cancelled"
                # No waiting in between: admission has counted it already.
                async with llama.stream(PROMPT, GREEDY) as after:
                    assert len([piece async for piece in after]) > 0
            statistics = llama.statistics()
            assert statistics.slots_free == 1
            assert statistics.cancelled == 3

    world.run(main)


@pytest.mark.promise("S14")
def test_a_deadline_ends_a_generation_and_nothing_else(world: World) -> None:
    async def main() -> None:
        async with world.open() as llama:
            expected = (await llama.generate(PROMPT, GREEDY)).text
            with trio.CancelScope() as scope:
                async with llama.stream(PROMPT, LONG, capacity=1) as stream:
                    await stream.receive()
                    scope.deadline = trio.current_time() + 0.01
                    await trio.sleep_forever()
            assert scope.cancelled_caught
            assert stream.finish_reason == "cancelled"
            assert (await llama.generate(PROMPT, GREEDY)).text == expected

    world.run(main)


@pytest.mark.promise("S14", "S16")
def test_cancel_by_id_ends_the_channel_after_what_is_there(world: World) -> None:
    async def main() -> None:
        async with world.open() as llama:
            whole = (await llama.generate(PROMPT, GREEDY, max_tokens=100)).text
            async with llama.stream(PROMPT, GREEDY, max_tokens=100, capacity=3) as stream:
                await stream.receive()
                await until(lambda: llama.statistics().parked == 1)
                assert llama.cancel(stream.id) is True
                text = stream.text + "".join([str(piece) async for piece in stream])
                assert whole.startswith(text)
                assert len(text) > 1
                assert stream.finish_reason == "cancelled"
                assert stream.completion().text == text
                assert stream.usage.generated_tokens == len(stream.tokens)

    world.run(main)


@pytest.mark.promise("S14")
def test_cancel_all(world: World) -> None:
    async def main() -> None:
        async with world.open() as llama:
            streams = [llama.stream(PROMPT, LONG, capacity=1) for _ in range(5)]
            async with streams[0], streams[1], streams[2], streams[3], streams[4]:
                assert len(llama.active()) == 5
                assert llama.cancel_all() == 5
                for stream in streams:
                    await stream.ended()
                    assert stream.finish_reason == "cancelled"
                assert llama.active() == []
                assert llama.statistics().cancelled == 5

    world.run(main)


@pytest.mark.promise("S15")
def test_cancelling_one_disturbs_no_other(world: World) -> None:
    async def main() -> None:
        async with world.open() as llama:
            expected = (await llama.generate(PROMPT, GREEDY, max_tokens=60)).text
            async with llama.stream(PROMPT, GREEDY, max_tokens=60) as stream:
                texts = []
                async for piece in stream:
                    texts.append(str(piece))
                    async with llama.stream(PROMPT + "!" * len(texts), LONG) as other:
                        if len(texts) % 2:
                            await other.receive()
                assert "".join(texts) == expected

    world.run(main)


# Looking after streams


@pytest.mark.promise("S22")
def test_active_tells_what_runs(world: World) -> None:
    async def main() -> None:
        async with world.open(max_streams=1) as llama:
            async with llama.stream(PROMPT, LONG, capacity=1) as first:
                await first.receive()
                async with llama.stream(PROMPT, LONG, priority=4, capacity=1) as second:
                    await until(lambda: llama.active()[0].waiting > 0)
                    one, two = llama.active()
                    assert (one.id, two.id) == (first.id, second.id)
                    assert (one.state, one.priority, two.priority) == ("running", 0, 4)
                    assert one.usage.generated_tokens >= 2
                    assert two.params == LONG
            assert llama.active() == []

    world.run(main)


@pytest.mark.promise("S21")
def test_an_update_counts_from_the_next_token(world: World) -> None:
    async def main() -> None:
        async with world.open() as llama:
            async with llama.stream(PROMPT, LONG, capacity=1) as stream:
                for _ in range(3):
                    await stream.receive()
                llama.update(stream.id, max_tokens=8)
                assert stream.params.max_tokens == 8
                rest = [piece async for piece in stream]
                assert rest
                assert 8 <= len(stream.tokens) <= 9
                assert stream.finish_reason == "length"
            async with llama.stream(PROMPT, LONG, capacity=1) as stream:
                for wrong in ({"seed": 1}, {"stop": ("x",)}, {"temperature": -1}, {"no": 1}):
                    with pytest.raises(ParameterError):
                        stream.update(**wrong)

    world.run(main)


@pytest.mark.promise("S22")
def test_statistics_add_up(world: World) -> None:
    async def main() -> None:
        async with world.open() as llama:
            for _ in range(3):
                await llama.generate(PROMPT, GREEDY)
            statistics = llama.statistics()
            assert statistics.finished == 3
            assert statistics.generated_tokens == 36
            assert statistics.prompt_tokens == 3 * len(llama.tokenize(PROMPT))
            assert (statistics.running, statistics.queued, statistics.slots_free) == (0, 0, 2)
            assert len(statistics.first_token_s) == 3

    world.run(main)


# Leaving the Llama


@pytest.mark.promise("S5", "S11")
def test_leaving_ends_streams_in_other_tasks(world: World) -> None:
    async def main() -> None:
        outcomes: list[type[BaseException]] = []

        async def consume(llama: Llama) -> None:
            async with llama.stream(PROMPT, LONG, capacity=1) as stream:
                try:
                    while True:
                        await stream.receive()
                        await trio.sleep(0.01)
                except trio.ClosedResourceError as error:
                    outcomes.append(type(error))

        async with trio.open_nursery() as nursery, world.open() as llama:
            for _ in range(5):
                nursery.start_soon(consume, llama)
            await trio.sleep(0.02)
        assert outcomes == [trio.ClosedResourceError] * 5
        with pytest.raises(trio.ClosedResourceError):
            llama.stream(PROMPT)
        with pytest.raises(trio.ClosedResourceError):
            await llama.score("x y")
        with pytest.raises(trio.ClosedResourceError):
            llama.statistics()

    world.run(main)


@pytest.mark.promise("S7")
def test_what_the_body_raises_is_never_wrapped(world: World) -> None:
    async def main() -> None:
        async def leave() -> None:
            async with world.open() as llama:
                await llama.generate(PROMPT, GREEDY)
                raise KeyError("mine")

        with pytest.raises(KeyError, match="mine"):
            await leave()
        group = ExceptionGroup("mine", [ValueError("a"), OSError("b")])
        with pytest.raises(ExceptionGroup) as caught:
            async with world.open():
                raise group
        assert caught.value is group

    world.run(main)


def test_a_cancelled_body_leaves_cleanly_and_may_still_close_streams(world: World) -> None:
    async def main() -> None:
        closed = False
        with trio.CancelScope() as scope:
            async with world.open() as llama:
                stream = llama.stream(PROMPT, LONG, capacity=1)
                await stream.__aenter__()
                scope.cancel()
                try:
                    await trio.sleep_forever()
                finally:
                    with trio.CancelScope(shield=True):
                        await stream.aclose()
                        await stream.ended()
                        closed = True
        assert scope.cancelled_caught
        assert closed

    world.run(main)


@pytest.mark.promise("S18")
def test_many_streams_on_few_places(world: World) -> None:
    async def main() -> None:
        async with world.open(max_streams=3) as llama:
            texts: set[str] = set()

            async def one(i: int) -> None:
                texts.add((await llama.generate(PROMPT, GREEDY)).text)

            async with trio.open_nursery() as nursery:
                for i in range(40):
                    nursery.start_soon(one, i)
            assert len(texts) == 1
            assert llama.statistics().finished == 40

    world.run(main)


@pytest.mark.promise("S19")
def test_nobody_waits_for_who_does_not_read(world: World) -> None:
    async def main() -> None:
        async with world.open() as llama:
            whole = (await llama.generate(PROMPT, GREEDY, max_tokens=50)).text
            async with llama.stream(PROMPT, GREEDY, max_tokens=50, capacity=2) as lazy:
                for _ in range(10):
                    await llama.generate(PROMPT, GREEDY)
                assert lazy.finish_reason is None
                assert "".join([str(piece) async for piece in lazy]) == whole

    world.run(main)


def test_warm_up_leaves_nothing(world: World) -> None:
    async def main() -> None:
        async with world.open() as llama:
            with assert_checkpoints():
                await llama.warm_up()
            counts = llama.statistics()
            assert counts.prompt_tokens > 0
            assert counts.generated_tokens == counts.cells_used == 0
            expected = [piece.text for piece in await pieces_of(llama)]
            async with llama.stream(PROMPT, GREEDY) as stream:
                await llama.warm_up()
                assert [piece.text async for piece in stream] == expected
            assert len(llama.vocab) > 400
            assert llama.model.architecture

    world.run(main)


def test_long_texts_are_tokenized_beside_the_event_loop() -> None:
    beside: list[bool] = []

    class Noted(FakeEngine):
        def tokenize(self, text: str, *, add_special: bool = True) -> list[int]:
            if len(text) > 20_000:
                beside.append(threading.current_thread() is not threading.main_thread())
            return super().tokenize(text, add_special=add_special)

    async def main() -> None:
        engine = Noted(n_ctx=100_000, prompt_token_seconds=0.0)
        async with open_fake_llama(engine) as llama:
            text = "a b " * 6_000
            assert (await llama.embed([text, "a"])).shape[0] == 2
            assert len((await llama.score(text)).tokens) == len(text) - 1
            assert len((await llama.score("x", given=text)).tokens) == 1
            assert (await llama.choose(text, ["a", "bb"])).index in (0, 1)
            with pytest.raises(ContextFullError):
                await llama.embed(text * 5)
        assert beside == [True] * 5

    trio.run(main)
