"""Conversations of the default model: quantised weights, a sliding window of 512 tokens."""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from triollama import GenerationParams
from triollama.aio import Conversation, Llama, open_llama

GREEDY = GenerationParams(temperature=0.0, repeat_penalty=1.0, max_tokens=8)
TEXT = "The engine thought for a while. It had many words, but never put them together. "


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        with trio.fail_after(550):
            await test()

    trio.run(bounded)


def opened(path: Path, **options: Any) -> open_llama:
    settings = {"n_ctx": 4096, "max_streams": 2, "threads": 2, "deterministic": True, **options}
    return open_llama(path, **settings)


async def filled(llama: Llama, *sizes: int) -> Conversation:
    """A conversation that reaches these numbers of tokens, a turn each."""
    chat = llama.conversation(system="You are terse.", params=GREEDY)
    per_text = len(llama.tokenize(TEXT)) - 1
    for size in sizes:
        await chat.say(TEXT * max(1, (size - chat.total_tokens) // per_text))
    return chat


@pytest.mark.slow
@pytest.mark.model
def test_kv_restored_goes_on_where_it_was(default_model_path: Path, tmp_path: Path) -> None:
    """1,500 tokens, in another Llama: with KV, and by replaying the recorded split."""
    path = tmp_path / "chats.json"
    expected: list[int] = []
    seconds = {}

    async def save() -> None:
        async with opened(default_model_path, n_ctx=2048) as llama:
            chat = await filled(llama, 1200, 1500)
            await llama.save(path, kv=True)
            expected.extend((await chat.say("And so?")).tokens)

    async def go_on(name: str) -> None:
        async with opened(default_model_path, n_ctx=2048) as llama:
            await llama.generate("warm up", GREEDY)
            start = time.perf_counter()
            (chat,) = await llama.restore(path)
            async with chat.stream("And so?") as turn:
                await turn.receive()
                seconds[name] = time.perf_counter() - start
                async for _ in turn:
                    pass
            assert turn.tokens == expected
            assert turn.usage.cached_tokens == (chat.messages[-3].n_computed if name == "kv" else 0)

    run(save)
    run(lambda: go_on("kv"))
    folder = path.with_name(path.name + ".kv")
    folder.rename(tmp_path / "away")
    run(lambda: go_on("recompute"))
    print({name: round(value, 3) for name, value in seconds.items()}, os.cpu_count())


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.parametrize("deterministic", [True, False])
def test_back_past_the_sliding_window(default_model_path: Path, deterministic: bool) -> None:
    """From 3,500 tokens back to 1,000: the answers of a conversation that never went there."""

    async def main() -> None:
        async with opened(default_model_path, deterministic=deterministic) as llama:
            chat = await filled(llama, 1000, 2200, 3500)
            assert chat.total_tokens > 3300
            chat.rewind(2)
            assert chat.total_tokens < 1100
            answer = (await chat.say("What did the engine do?")).tokens
            reused = llama.statistics().cached_tokens
            assert reused > 900  # nothing was computed again
            for other in list(llama.conversations):
                other.close()
            never = await filled(llama, 1000)
            expected = (await never.say("What did the engine do?")).tokens
            if deterministic:
                assert answer == expected
                # Edited back, and evicted to host memory or computed again in between.
                await never.say(TEXT * 60)
                edited = await never.edit(3, "What did the engine do?")
                assert edited.tokens == expected
            else:
                # Rounding may differ; a stale window would give another text altogether.
                same = sum(a == b for a, b in zip(answer, expected, strict=False))
                assert same >= 4

    run(main)
