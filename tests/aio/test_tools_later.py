"""Tools that a conversation is given, or loses, after it has begun: the model is told of them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from triollama import GenerationParams, Llama, open_llama
from triollama.errors import AnswerError, ParameterError
from triollama.testing import FakeEngine, open_fake_llama

GREEDY = GenerationParams(temperature=0.0, repeat_penalty=1.0, max_tokens=12, ignore_eos=True)


class Noting(FakeEngine):
    """Answers, and notes the prompts."""

    def __init__(self) -> None:
        self.prompts: list[str] = []
        super().__init__(lambda prompt: "Hello there.", token_seconds=0.0)

    def submit(self, tokens: Any, *arguments: Any, **options: Any) -> Any:
        self.prompts.append(self.detokenize(tokens))
        return super().submit(tokens, *arguments, **options)


def weather(city: str) -> str:
    """The weather of a city."""
    return f"sunny in {city}"


def clock() -> str:
    """What time it is."""
    return "noon"


def run(test: Callable[[Llama, list[str]], Awaitable[None]]) -> None:
    async def main() -> None:
        engine = Noting()
        async with open_fake_llama(engine) as llama:
            await test(llama, engine.prompts)

    trio.run(main)


def test_tools_of_a_later_turn_are_shown() -> None:
    async def test(llama: Llama, prompts: list[str]) -> None:
        chat = llama.conversation(template="chatml")
        await chat.say("One")
        assert "weather of a city" not in prompts[-1]
        await chat.say("Two", tools=[weather])
        assert "weather of a city" in prompts[-1] and "One" in prompts[-1]
        await chat.say("Three", tools=[clock])
        assert "weather of a city" not in prompts[-1] and "What time it is" in prompts[-1]
        await chat.say("Four")  # from that turn on
        assert prompts[-1].startswith(prompts[-2]) and "What time it is" in prompts[-1]

    run(test)


def test_a_restored_conversation_is_told_of_its_tools_once(tmp_path: Path) -> None:
    async def test(llama: Llama, prompts: list[str]) -> None:
        chat = llama.conversation("ann", template="chatml", tools=[weather])
        await chat.say("One")
        await llama.save(tmp_path / "chats")
        chat.delete()
        (back,) = await llama.restore(tmp_path / "chats")
        await back.say("Two")
        assert prompts[-1].startswith(prompts[0]) and prompts[-1].count("weather of a city") == 1
        await back.say("Three", tools=[clock])
        assert "weather of a city" not in prompts[-1] and "What time it is" in prompts[-1]

    run(test)


def test_tools_that_were_set_before_a_restore_are_told_of_after_it(tmp_path: Path) -> None:
    async def test(llama: Llama, prompts: list[str]) -> None:
        for tools, before in (([weather], None), (None, [weather]), ([clock], [weather])):
            chat = llama.conversation("ann", template="chatml", tools=before)
            await chat.say("One")
            chat.set_tools(tools)
            await llama.save(tmp_path / "chats")
            (back,) = await llama.restore(tmp_path / "chats", replace=True)
            await back.say("Two")
            assert ("weather of a city" in prompts[-1]) == (tools == [weather])
            assert ("What time it is" in prompts[-1]) == (tools == [clock])
            back.delete()

    run(test)


FREE = GREEDY.replace(temperature=1.0, top_k=0, top_p=1.0, seed=3, max_tokens=90, ignore_eos=False)
FLIP = {"name": "flip", "parameters": {"type": "object", "properties": {"up": {"type": "boolean"}}}}


def test_an_answer_that_began_to_call_goes_on_to_the_calls(tiny: Any, tmp_path: Path) -> None:
    """Also one that had to call, after a restore and beside others; not without its tools."""

    async def main() -> None:
        opened = open_llama(tiny("llama"), n_ctx=2048, threads=1, deterministic=True)
        async with opened as llama:
            found = set()
            for seed in range(40):
                params = FREE.replace(seed=seed)
                chat = llama.conversation(
                    "ann", template="chatml", params=params, tools=[FLIP], on_cancel="keep"
                )
                async with chat.stream("Flip.", tool_choice="required") as turn:
                    await turn.receive()
                await llama.save(tmp_path / "chats", [chat])
                (back,) = await llama.restore(tmp_path / "chats", replace=True)
                back.set_tools([FLIP, {"name": "other"}])
                try:
                    more = await back.go_on()
                    assert more.tool_calls and {call.name for call in more.tool_calls} == {"flip"}
                    assert "tool_call" not in back.messages[-1].content
                    found.add("calls")
                except AnswerError:  # by max_tokens
                    found.add("cut")
                if back.messages[-1].was_cut:
                    before = back.messages
                    for others in (None, [{"name": "other"}]):
                        back.set_tools(others)
                        with pytest.raises(ParameterError, match=r"may call flip.*set_tools"):
                            await back.go_on()
                    assert back.messages == before and not back.is_busy
                    assert (await back.go_on(regex="#{3}")).text == "###"
                    found.add("gone")
                back.delete()
                if found >= {"calls", "gone"}:
                    return
            raise AssertionError(found)

    trio.run(main)


def test_what_the_new_tools_leave_alone_is_not_computed_again(tiny: Any) -> None:
    """And a model goes on as if the tools had been there from the start."""

    async def main() -> None:
        opened = open_llama(tiny("llama"), n_ctx=1024, threads=1, deterministic=True)
        async with opened as llama:
            late = llama.conversation(template="chatml", params=GREEDY)
            await late.say("One")
            done = await late.say("Two", tools=[clock])
            first = llama.conversation(
                template="chatml",
                params=GREEDY,
                messages=[message.for_template() for message in late.messages[:2]],
            )
            same = await first.say("Two", tools=[clock])
            assert same.tokens == done.tokens
            assert (await late.say("Three")).usage.cached_tokens > len(done.tokens)

    trio.run(main)
