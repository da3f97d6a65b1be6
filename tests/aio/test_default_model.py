"""The promises that need real weights: once, on the default model."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from triollama import GenerationParams, Llama, open_llama

pytestmark = pytest.mark.slow

GREEDY = GenerationParams(temperature=0.0, repeat_penalty=1.0, max_tokens=8, ignore_eos=True)
OPTIONS: dict[str, Any] = {"n_ctx": 1024, "max_streams": 4}


def run(main: Callable[[], Any]) -> None:
    async def bounded() -> None:
        with trio.fail_after(500):
            await main()

    trio.run(bounded)


def words(seed: int, n: int) -> list[int]:
    return [2, *(1000 + (seed * 7919 + i * 104729) % 200_000 for i in range(n - 1))]


async def wait_until(condition: Callable[[], bool]) -> None:
    while not condition():
        await trio.sleep(0.002)


@pytest.mark.promise("S14", "S15")
@pytest.mark.parametrize("n_others", [0, 1, 3])
def test_cancelled_in_its_prompt_and_at_each_token_it_disturbs_nobody(
    default_model_path: Path, n_others: int
) -> None:
    others = [words(10 + i, 20) for i in range(n_others)]
    # After so many prompt tokens in all, or after so many tokens of its own. Each time another
    # prompt, of which nothing is there yet.
    rounds = [(1, 0), (3, 0), (5, 1), (5, 3), (5, 6)]
    victims = [words(20 + i, 160) for i in range(len(rounds))]

    async def main() -> None:
        async with open_llama(default_model_path, deterministic=True, **OPTIONS) as llama:
            alone = [(await llama.generate(p, GREEDY)).tokens for p in others]
            wholes = [(await llama.generate(p, GREEDY)).tokens for p in victims]
        async with open_llama(default_model_path, deterministic=True, **OPTIONS) as llama:

            async def survive(llama: Llama, i: int) -> None:
                assert (await llama.generate(others[i], GREEDY)).tokens == alone[i]

            for (chunks, tokens), victim, whole in zip(rounds, victims, wholes, strict=True):
                async with trio.open_nursery() as nursery:
                    for i in range(n_others):
                        nursery.start_soon(survive, llama, i)
                    before = llama.statistics().prompt_tokens
                    async with llama.stream(victim, GREEDY, capacity=1) as stream:
                        for _ in range(tokens):
                            await stream.receive()
                        if not tokens:
                            await wait_until(
                                lambda seen=before + 32 * chunks: (  # type: ignore[misc]
                                    llama.statistics().prompt_tokens >= seen
                                )
                            )
                    await stream.ended()
                    assert stream.finish_reason == "cancelled"
                    assert stream.tokens == whole[: len(stream.tokens)]
                assert llama.statistics().cells_used == 0
                assert (await llama.generate(victim, GREEDY)).tokens == whole

    run(main)


@pytest.mark.promise("S19")
def test_64_streams_on_16_places_finish_beside_one_that_nobody_reads(
    default_model_path: Path,
) -> None:
    async def main() -> None:
        async with open_llama(default_model_path, n_ctx=256, max_streams=16) as llama:
            lengths: list[int] = []

            async def one(i: int) -> None:
                lengths.append(len((await llama.generate(words(i, 12), GREEDY)).tokens))

            async with llama.stream(words(99, 12), GREEDY, max_tokens=200, capacity=2) as lazy:
                await wait_until(lambda: lazy.engine_stream.waiting == 2)
                peak = 0
                for _ in range(2):
                    async with trio.open_nursery() as nursery:
                        for i in range(64):
                            nursery.start_soon(one, i)
                    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                    # In the second round nothing may be left of the first.
                    assert peak == 0 or after < 1.02 * peak
                    peak = after
                assert lazy.finish_reason is None
                assert lazy.engine_stream.waiting == 2
            assert lengths == [8] * 128

    run(main)
