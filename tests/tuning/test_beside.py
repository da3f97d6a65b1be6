"""Training beside a running Llama: it goes on generating, and gets the adapter in the end."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from triollama import GenerationParams, _engine, open_llama
from triollama.tuning import NoAdapterError, TrainingConfig
from triollama.tuning.aio import AsyncTuner

GREEDY = GenerationParams(temperature=0.0, repeat_penalty=1.0, max_tokens=8)
CHATS = [
    [
        {"role": "user", "content": f"What is {a} and {b}?"},
        {"role": "assistant", "content": f"{a}{b}"},
    ]
    for a in "abcd"
    for b in "xyz"
]
CONFIG = TrainingConfig(rank=4, learning_rate=2e-2, epochs=4, threads=1)


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        with trio.fail_after(100):
            await test()

    trio.run(bounded)


def opened(path: Path) -> open_llama:
    return open_llama(path, n_ctx=256, max_streams=3, threads=1)


def test_streams_go_on_and_conversations_get_the_adapter(tiny: Any, tmp_path: Path) -> None:
    save = tmp_path / "adapter.gguf"

    async def main() -> None:
        async with opened(tiny("gemma3")) as llama:
            tuner = AsyncTuner(llama)
            with pytest.raises(NoAdapterError):
                await tuner.compare(["What?"])
            data = await tuner.prepare_training_data(CHATS, validation_split=0.25)
            chat = llama.conversation(params=GREEDY)
            other = llama.conversation(params=GREEDY)
            before = (await chat.say("What is a and x?")).text
            pieces = [0]  # of a stream that never ends, after each step of the run

            async def talk() -> None:
                async with llama.stream("On", max_tokens=10**6, context_overflow="shift") as stream:
                    async for _ in stream:
                        pieces[-1] += 1

            async with trio.open_nursery() as nursery:
                nursery.start_soon(talk)
                training = tuner.train(data, CONFIG, save=save, swap_into=[chat])
                async with training as steps:
                    async for _ in steps:
                        while not pieces[-1]:  # neither starves the other
                            await trio.sleep(0)
                        pieces.append(0)
                    assert steps.status == "completed"
                assert len(pieces) == training.run.total_steps + 1
                while not pieces[-1]:  # the stream outlived the swap
                    await trio.sleep(0)
                nursery.cancel_scope.cancel()

            chat.rewind()
            after = (await chat.say("What is a and x?")).text
            assert after != before
            assert (await other.say("What is a and x?")).text == before
            fresh = llama.conversation(params=GREEDY, adapters=[(tuner.adapter, 1.0)])
            assert (await fresh.say("What is a and x?")).text == after
            first, second = await tuner.compare(["What is a and x?", CHATS[5][:1]], max_tokens=8)
            assert (first.base, first.tuned) == (before, after)
            assert second.prompt == CHATS[5][0]["content"]

    run(main)
    assert save.exists()
    assert "Trainer" not in _engine.live_objects()


def test_a_run_that_is_stopped_swaps_nothing_in(tiny: Any, tmp_path: Path) -> None:
    save = tmp_path / "adapter.gguf"

    async def main() -> None:
        async with opened(tiny("llama")) as llama:
            tuner = AsyncTuner(llama)
            data = await tuner.prepare_training_data(CHATS, template="chatml")
            async with tuner.train(data, CONFIG, save=save) as steps:
                async for step in steps:
                    if step.step == 2:
                        steps.stop()
            assert steps.status == "stopped"
            with pytest.raises(NoAdapterError):
                tuner.adapter  # noqa: B018

            idle = llama.conversation()

            async def swap_into_a_busy_one() -> None:
                chat = llama.conversation(params=GREEDY)
                training = tuner.train(data, CONFIG, save=save, swap_into=[idle, chat])
                async with chat.stream("Hello", ignore_eos=True), training as steps:
                    async for _ in steps:
                        pass

            with pytest.raises(trio.BusyResourceError):
                await swap_into_a_busy_one()
            assert idle.adapters == ()  # all of them, or none
            llama.conversations.set_adapters([idle], [(tuner.adapter, 0.5)])
            assert idle.adapters == ((tuner.adapter, 0.5),)

    run(main)
