"""Calls that begin alike: what one left serves the next, to the same bits, in nobody's way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio
from triollama import GenerationParams, Llama
from worlds import World

GREEDY = GenerationParams(temperature=0.0, repeat_penalty=1.0, max_tokens=12, ignore_eos=True)
BEGIN = list(range(65, 65 + 90))  # tokens


async def cached(llama: Llama, prompt: list[int], **changes: Any) -> int:
    done = await llama.generate(prompt, GREEDY, **changes)
    assert done.usage.prompt_tokens + done.usage.cached_tokens == len(prompt)
    return done.usage.cached_tokens


@pytest.mark.promise("S30")
def test_the_longest_beginning_in_common_is_reused(world: World) -> None:
    async def main() -> None:
        async with world.open() as llama:
            assert await cached(llama, BEGIN) == 0
            assert await cached(llama, [*BEGIN[:70], 66]) == 70
            assert await cached(llama, [*BEGIN[:40], 66]) == 40
            assert await cached(llama, [66, *BEGIN]) == 0
            statistics = llama.statistics()
            assert statistics.cached_tokens == 110
            assert (statistics.slots_free, statistics.cells_used) == (2, 0)

    world.run(main)


@pytest.mark.promise("S20", "S30")
def test_what_is_reused_changes_no_bit(world: World) -> None:
    prompts = [[*BEGIN[:n], *end] for n in (90, 70, 33) for end in ([66], [67, 68], [66])]

    async def main() -> None:
        expected = []
        for prompt in prompts:
            async with world.open() as llama:
                expected.append(await llama.generate(prompt, GREEDY, logprobs=0))
        async with world.open() as llama:
            reused = 0
            for prompt, whole in zip(prompts, expected, strict=True):
                done = await llama.generate(prompt, GREEDY, logprobs=0)
                assert done.tokens == whole.tokens
                assert done.logprobs == whole.logprobs
                reused += done.usage.cached_tokens
            assert reused > 64 * 4

    world.run(main)


@pytest.mark.promise("S30")
def test_what_was_left_early_is_of_use_too(world: World) -> None:
    async def main() -> None:
        async with world.open() as llama:
            with trio.CancelScope() as scope:
                async with llama.stream(BEGIN, GREEDY) as stream:
                    await stream.receive()
                    scope.cancel()
                    await trio.sleep_forever()
            await stream.ended()
            assert await cached(llama, BEGIN) == 89  # the last token is always computed

    world.run(main)


@pytest.mark.promise("S30")
def test_many_that_begin_alike(world: World) -> None:
    """More than there are places, queued before there is anything to reuse."""

    async def main() -> None:
        async with world.open() as llama:
            prompts = ([*BEGIN, 66 + i] for i in range(12))
            async with llama.map(prompts, GREEDY) as results:
                usages = [one.unwrap().usage async for one in results]
            assert sum(usage.cached_tokens == 90 for usage in usages) >= 10

    world.run(main)


@pytest.mark.promise("S30")
def test_conversations_share_with_calls_and_keep_their_memory(world: World) -> None:
    async def main() -> None:
        async with world.open(max_streams=3, n_ctx=512) as llama:
            chat = llama.conversation(system="It is so. " * 9, params=GREEDY)
            await chat.say("Hello")
            total = chat.total_tokens
            n_cached = await cached(llama, [*chat.tokens[:80], 66])
            assert n_cached == 80
            for n in range(9):  # other calls take every other place
                await cached(llama, [66 + n, *BEGIN])
            reply = await chat.say("And then?")
            assert reply.usage.cached_tokens == total - 1
            assert llama.statistics().evictions == 0

    world.run(main)


@pytest.mark.promise("S23", "S30")
def test_adapters_have_memory_of_their_own(world: World, tmp_path: Path) -> None:
    path = world.write_adapter(tmp_path / "adapter.gguf")

    async def main() -> None:
        async with world.open() as llama:
            adapter = await llama.load_adapter(path)
            assert await cached(llama, BEGIN) == 0
            assert await cached(llama, BEGIN, adapters=[(adapter, 1.0)]) == 0
            assert await cached(llama, BEGIN, adapters=[(adapter, 1.0)]) == 89
            assert await cached(llama, BEGIN, adapters=[(adapter, 0.5)]) == 0
            await llama.unload_adapter(adapter)
            again = await llama.load_adapter(path)
            assert await cached(llama, BEGIN, adapters=[(again, 1.0)]) == 0

    world.run(main, threads=True)


@pytest.mark.promise("S30")
def test_what_cannot_be_reused_is_computed(world: World) -> None:
    async def main() -> None:
        async with world.open() as llama:
            prompt = BEGIN[:60]
            assert await cached(llama, prompt, causal_attention=False) == 0
            assert await cached(llama, prompt) == 0  # that one looked ahead
            assert await cached(llama, prompt, causal_attention=False) == 0
            assert await cached(llama, prompt) == 59
            assert (await llama.score(prompt)).tokens == prompt[1:]
            assert len(await llama.embed("some text")) > 0
            assert await cached(llama, BEGIN[:15]) == 0  # not worth it

    world.run(main)
