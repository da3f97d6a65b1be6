"""Conversations of the default model: quantised weights, a sliding window of 512 tokens."""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from triollama import Conversation, GenerationParams, Llama, open_llama

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
def test_back_past_the_sliding_window(
    default_model_path: Path, tmp_path: Path, deterministic: bool
) -> None:
    """From 3,500 tokens back to 1,000, by five roads: the answers of a conversation that never
    went there."""
    file = tmp_path / "chats.json"
    question = "What did the engine do?"

    def check(found: list[int], expected: list[int]) -> None:
        if deterministic:
            assert found == expected
        else:
            # Rounding may differ; a stale window would give another text altogether.
            assert sum(a == b for a, b in zip(found, expected, strict=False)) >= 4

    async def main() -> None:
        options = {"deterministic": deterministic, "host_bytes": 1 << 28}
        async with opened(default_model_path, **options) as llama:
            never = await filled(llama, 1000)
            expected = (await never.say(question)).tokens
            never.close()
            chat = await filled(llama, 1000, 2200, 3500)
            assert chat.total_tokens > 3300
            await llama.save(file, [chat], kv=True)
            # Edited: messages are system, user, assistant, user...
            branch = await chat.fork()
            check((await branch.edit(3, question)).tokens, expected)
            branch.close()
            # Rewound where it is.
            before = llama.statistics()
            chat.rewind(2)
            assert chat.total_tokens < 1100
            check((await chat.say(question)).tokens, expected)
            if deterministic:  # the cells are all there: nothing was computed again
                assert llama.statistics().cached_tokens - before.cached_tokens > 900
            # Evicted, then rewound: a blob holds the window alone.
            (chat,) = await llama.restore(file, replace=True)
            evictions = llama.statistics().evictions
            others = [llama.conversation(params=GREEDY) for _ in range(2)]
            for other in others:
                await other.say("Hello")
            assert llama.statistics().evictions > evictions
            chat.rewind(2)
            check((await chat.say(question)).tokens, expected)
            for other in others:
                other.close()
            # Restored, gone on, and then rewound.
            (chat,) = await llama.restore(file, replace=True)
            reply = await chat.say("And so?")
            assert reply.usage.cached_tokens > 3300
            chat.rewind(3)
            check((await chat.say(question)).tokens, expected)

    run(main)
