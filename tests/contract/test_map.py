"""One question asked of many prompts: in order or as they come, bounded, and none lost."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import trio
from trio.testing import MockClock, assert_checkpoints
from triollama import GenerationParams, MapResult
from triollama.errors import (
    AnswerError,
    ContextFullError,
    GrammarError,
    ParameterError,
    TokenError,
)
from triollama.testing import FakeEngine, Reply, open_fake_llama
from worlds import World

GREEDY = GenerationParams(temperature=0.0, repeat_penalty=1.0, max_tokens=12, ignore_eos=True)
WORDS = ["once", "upon", "a time", "there was", "a whale", "in", "the garden"]


class Counted:
    """An iterator that knows how much was taken."""

    def __init__(self, prompts: Any) -> None:
        self._prompts = iter(prompts)
        self.taken = 0

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        found = next(self._prompts)
        self.taken += 1
        return found


@pytest.mark.promise("S29")
@pytest.mark.parametrize("ordered", [True, False])
def test_each_prompt_has_its_result_and_few_are_under_way(world: World, ordered: bool) -> None:
    async def main() -> None:
        async with world.open(max_streams=3) as llama:
            alone = {word: (await llama.generate(word, GREEDY)).text for word in WORDS}
            prompts = Counted(WORDS * 5)
            found: list[MapResult[Any]] = []
            async with llama.map(prompts, GREEDY, ordered=ordered, at_once=4) as results:
                async for one in results:
                    found.append(one)
                    assert prompts.taken <= len(found) + 4
                    assert len(llama.active()) <= 4
                with pytest.raises(trio.EndOfChannel), assert_checkpoints():
                    await results.receive()
            indices = [one.index for one in found]
            assert sorted(indices) == list(range(35))
            assert not ordered or indices == sorted(indices)
            for one in found:
                assert one.error is None
                assert one.unwrap().text == alone[WORDS[one.index % 7]]
            assert llama.active() == []

    world.run(main)


@pytest.mark.promise("S29")
def test_one_that_fails_fails_alone(world: World) -> None:
    async def main() -> None:
        async with world.open() as llama:
            prompts = ["once", "", "upon " * 200, [2**30], b"bytes", 5, "a time"]
            wrong = [None, ParameterError, ContextFullError, TokenError]
            wrong += [ParameterError, ParameterError, None]
            async with llama.map(prompts, GREEDY) as results:
                found = [one async for one in results]
            assert [one.error and type(one.error) for one in found] == wrong
            with pytest.raises(ContextFullError):
                found[2].unwrap()
            assert len(found[6].unwrap().tokens) == 12

    world.run(main)


def test_a_broken_grammar_is_every_prompts_error(world: World) -> None:
    async def main() -> None:
        async with world.open() as llama, llama.map(WORDS, grammar="root") as results:
            assert [type(one.error) async for one in results] == [GrammarError] * 7

    world.run(main, threads=True)


@pytest.mark.promise("S29")
def test_it_goes_on_where_it_came_to(world: World) -> None:
    async def main() -> None:
        async with world.open() as llama:
            async with llama.map(WORDS, GREEDY) as results:
                whole = [(one.index, one.unwrap().text) async for one in results]
            some = []
            async with llama.map(itertools.cycle(WORDS), GREEDY) as endless:
                async for one in endless:
                    some.append((one.index, one.unwrap().text))
                    if len(some) == 3:
                        break
            await trio.testing.wait_all_tasks_blocked()
            assert llama.active() == []
            async with llama.map(WORDS, GREEDY, start=3) as results:
                some += [(one.index, one.unwrap().text) async for one in results]
            assert some == whole
            async with llama.map(WORDS, GREEDY, start=99) as results:
                assert [one async for one in results] == []

    world.run(main)


@pytest.mark.promise("S29")
def test_a_cancelled_receive_loses_none(world: World) -> None:
    async def main() -> None:
        async with world.open() as llama, llama.map(WORDS, GREEDY) as results:
            found: list[int] = []
            for attempt in itertools.count():
                with trio.CancelScope() as scope:
                    if attempt % 2:
                        scope.cancel()
                    else:
                        scope.deadline = trio.current_time() + 0.0007 * (attempt % 7)
                    try:
                        found.append((await results.receive()).index)
                    except trio.EndOfChannel:
                        break
            assert found == list(range(7))

    world.run(main)


@pytest.mark.promise("S29")
def test_a_prompt_that_can_be_read_once_is_not_lost_either(world: World) -> None:
    async def main() -> None:
        async with world.open(max_streams=1, max_queue=0) as llama:
            prompts = (iter(llama.tokenize(word)) for word in WORDS[:2])
            async with (
                llama.stream("once", GREEDY, capacity=1) as before,
                llama.map(prompts, GREEDY, at_once=1) as results,
            ):
                with trio.CancelScope() as scope:
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(results.receive)
                        await trio.testing.wait_all_tasks_blocked()
                        scope.cancel()
                assert scope.cancelled_caught
                before.cancel()
                found = [(one.index, one.unwrap().text) async for one in results]
            whole = [(await llama.generate(word, GREEDY)).text for word in WORDS[:2]]
            assert found == list(enumerate(whole))

    world.run(main)


def test_it_waits_for_room_and_closes_like_a_channel(world: World) -> None:
    async def main() -> None:
        async with world.open(max_streams=1, max_queue=0, when_full="raise") as llama:
            async with llama.map(WORDS, GREEDY) as results:
                assert len([one.unwrap() async for one in results]) == 7
            results = llama.map(WORDS, GREEDY.replace(max_tokens=None), at_once=1)
            async with results:
                with pytest.RaisesGroup(trio.BusyResourceError):
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(results.receive)
                        nursery.start_soon(results.receive)
                with pytest.RaisesGroup(trio.ClosedResourceError):
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(results.receive)
                        await trio.testing.wait_all_tasks_blocked()
                        await results.aclose()
            with pytest.raises(trio.ClosedResourceError):
                await results.receive()
            assert (await llama.generate("once", GREEDY)).text

    world.run(main)


def test_mistakes_are_typed(world: World) -> None:
    async def main() -> None:
        async with world.open() as llama:
            for options in ({"at_once": 0}, {"start": -1}, {"start": 0.5}, {"nonsense": 1}):
                with pytest.raises(ParameterError):
                    llama.map(WORDS, **options)
            for prompts in ("one prompt", b"bytes", 5, None):
                with pytest.raises(ParameterError, match="prompts"):
                    llama.map(prompts)
        with pytest.raises(trio.ClosedResourceError):
            llama.map(WORDS)

    world.run(main)


def test_as_they_come_means_the_quick_ones_first() -> None:
    async def main() -> None:
        fake = FakeEngine(lambda prompt: Reply("x", token_seconds=float(prompt)), max_streams=4)
        async with open_fake_llama(fake) as llama:
            async with llama.map(["9", "1", "5", "2"], ordered=False) as results:
                assert [one.index async for one in results] == [1, 3, 2, 0]
            async with llama.map(["1", "2", "0"], into=int) as results:
                found = [one async for one in results]
                assert [type(one.error) for one in found] == [AnswerError] * 3

    trio.run(main, clock=MockClock(autojump_threshold=0))


def test_when_the_engine_dies_the_whole_does() -> None:
    async def main() -> None:
        fake = FakeEngine()
        async with open_fake_llama(fake) as llama, llama.map(itertools.cycle(WORDS)) as results:
            await results.receive()
            fake.die("boom")
            with pytest.raises(trio.BrokenResourceError, match="boom"):
                await results.receive()

    trio.run(main, clock=MockClock(autojump_threshold=0))
